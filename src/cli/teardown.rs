//! `prefetchd teardown`: undoes what the daemon has created in Postgres and, with `--keys`, in Redis.
//!
//! It may be interrupted anywhere and run again, because what is already gone counts as done. The order is: write to
//! the checkpoint that its rows can no longer be relied on; drop the slot, since the WAL that a forgotten slot retains
//! can fill the disk; drop the publication; remove the keys; and remove the checkpoint last, since nothing else says
//! who created the publication and which prefixes were ever used. Every write to Redis is refused once another writer
//! has touched the checkpoint.

use super::{Failure, print, printable, runtime};
use crate::bridge::context::{application_name, own_keys, own_prefix};
use crate::checkpoint::{Checkpoint, SlotState, TableState};
use crate::code::Code;
use crate::command::Key;
use crate::config::Config;
use crate::lanes::tags::every_mark;
use crate::plan::key::Area;
use crate::remedy::Sql;
use crate::resp::batch::{Batch, OwnKeys};
use crate::schema::TableSpec;
use crate::sink::SinkError;
use crate::sink::any_writer::AnyWriter;
use crate::source::SourceError;
use crate::source::connect::{self, PostgresClient};
use crate::source::slot;
use crate::source::wire::ReplicationConnection;
use crate::words::counted;
use clap::Args;
use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};
use tokio::time::timeout;

/// Differs from the daemon's name, which is used to look for daemons.
const APPLICATION_NAME: &str = "prefetchd teardown";
/// Postgres may notice the end of a daemon a little late.
const STOPPED_PATIENCE: Duration = Duration::from_secs(3);
const POLL: Duration = Duration::from_millis(100);
/// The time limit for one page of keys.
const REDIS_PATIENCE: Duration = Duration::from_secs(30);

#[derive(Debug, Args)]
pub(super) struct TeardownArgs {
    /// Also remove the cached keys and prefetchd's own keys from Redis
    #[arg(long)]
    keys: bool,
}

/// Redis, if it can be reached.
struct Cache {
    writer: AnyWriter,
    own: OwnKeys,
    /// The checkpoint that is watched.
    checkpoint: Option<Checkpoint>,
}

pub(super) fn run(file: Option<&Path>, args: &TeardownArgs) -> Result<(), Failure> {
    let config = Config::load(file)?;
    runtime()?.block_on(teardown(&config, args.keys))
}

async fn teardown(config: &Config, keys: bool) -> Result<(), Failure> {
    let client = connect::connect(&config.postgres.target, APPLICATION_NAME).await.map_err(postgres)?;
    let slot = until_unused(config, &client).await?;
    let mut cache = match Cache::open(config).await {
        Ok(cache) => Ok(cache),
        // Dropping the slot cannot wait, and is correct whatever Redis holds.
        Err(error) => Err(redis(error)),
    };
    if let Ok(cache) = &mut cache {
        cache.same_server(config).await?;
        cache.distrust().await.map_err(redis)?;
    }

    let name = &config.postgres.slot;
    slot::drop_slot(&client.client, name).await.map_err(postgres)?;
    say(&match slot {
        SlotState::Absent => format!("slot {name}: does not exist"),
        SlotState::Invalidated { .. } | SlotState::Ready { .. } => format!("slot {name}: dropped"),
    })?;
    let made =
        cache.as_ref().map(|cache| cache.checkpoint.as_ref().is_some_and(|c| c.made(&config.postgres.publication)));
    publication(config, &client, made.ok()).await?;

    let cache = cache?;
    if keys { cache.remove_keys(config).await } else { cache.leave_keys(config).await }
}

/// Refuses while a daemon is running or standing by, because it would create everything again.
async fn until_unused(config: &Config, client: &PostgresClient) -> Result<SlotState, Failure> {
    let name = &config.postgres.slot;
    let began = Instant::now();
    loop {
        let mut pids = slot::sessions_named(&client.client, &application_name(name)).await.map_err(postgres)?;
        let state = match slot::slot_state(&client.client, name).await {
            // It is just being created.
            Err(SourceError::SlotInUse { pid, .. }) => {
                pids.extend(pid);
                None
            }
            state => Some(state.map_err(postgres)?),
        };
        if let Some(SlotState::Ready { active_pid, .. }) = &state {
            pids.extend(*active_pid);
        }
        if let Some(state) = state.filter(|_| pids.is_empty()) {
            return Ok(state);
        }
        if began.elapsed() > STOPPED_PATIENCE {
            let pids = pids.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            return Err(Failure::work(
                Code::SlotInUse,
                format!(
                    "slot {name} is in use (in Postgres: pid {pids}): stop every prefetchd that uses this slot, then run this \
                 again; nothing was removed"
                ),
            ));
        }
        tokio::time::sleep(POLL).await;
    }
}

/// `made` says whether prefetchd created it, if that is known.
async fn publication(config: &Config, client: &PostgresClient, made: Option<bool>) -> Result<(), Failure> {
    let name = &config.postgres.publication;
    if slot::publication(&client.client, name).await.map_err(postgres)?.is_none() {
        return say(&format!("publication {name}: does not exist"));
    }
    if made == Some(true) {
        slot::drop_publication(&client.client, name).await.map_err(postgres)?;
        return say(&format!("publication {name}: dropped"));
    }
    let who = match made {
        Some(_) => "there is no record that prefetchd created it",
        None => "only Redis records whether prefetchd created it",
    };
    say(&format!("publication {name}: stays, {who}; as its owner: {}", Sql::DropPublication { publication: name }))
}

impl Cache {
    async fn open(config: &Config) -> Result<Cache, SinkError> {
        let own = own_keys(config);
        let (writer, armed) = AnyWriter::connect(&config.redis.target, &own, config.lanes()).await?;
        let checkpoint = armed.checkpoint.and_then(|stored| Checkpoint::read(&stored.head, &stored.entries).ok());
        Ok(Cache { writer, own, checkpoint })
    }

    /// What the checkpoint says about a publication applies to the checkpoint's server only.
    async fn same_server(&self, config: &Config) -> Result<(), Failure> {
        let Some(c) = &self.checkpoint else { return Ok(()) };
        let connected = ReplicationConnection::connect(&config.postgres.target, APPLICATION_NAME).await;
        let identity = slot::identify(&mut connected.map_err(postgres)?).await.map_err(postgres)?;
        if (&c.system_id, &c.database) == (&identity.system_id, &identity.database) {
            return Ok(());
        }
        Err(Failure::work(
            Code::OtherPostgres,
            format!(
                "the checkpoint in Redis belongs to database {} of system {}, and this is {} of {}: correct postgres.url or \
             redis.url, or remove the key {} first; nothing was removed",
                c.database,
                c.system_id,
                identity.database,
                identity.system_id,
                self.own.checkpoint()
            ),
        ))
    }

    /// Tells readers who go by the checkpoint, and the next start of a daemon, that the rows are no longer kept up to
    /// date.
    async fn distrust(&mut self) -> Result<(), SinkError> {
        if let Some(checkpoint) = &mut self.checkpoint {
            checkpoint.epoch += 1;
            checkpoint.tables.values_mut().for_each(|table| table.state = TableState::Healing);
        }
        self.write().await
    }

    async fn write(&mut self) -> Result<(), SinkError> {
        let Some(checkpoint) = &mut self.checkpoint else { return Ok(()) };
        checkpoint.seq += 1;
        let entries = Batch::of_entries(&self.own, self.writer.limits(), checkpoint.entries())?;
        let (json, target) = (checkpoint.to_json(), self.writer.target().to_string());
        answered(target, self.writer.execute(&entries, &json)).await.map(drop)
    }

    async fn leave_keys(mut self, config: &Config) -> Result<(), Failure> {
        if let Some(checkpoint) = self.checkpoint.as_mut().filter(|c| c.made(&config.postgres.publication)) {
            // The next publication of that name will have been created by somebody else.
            checkpoint.made_publication = None;
            self.write().await.map_err(redis)?;
        }
        for area in self.areas(config) {
            say(&format!("{}: stay until their TTL expires", shown(&area)))?;
        }
        if self.checkpoint.is_some() {
            let key = self.own.checkpoint();
            say(&format!("checkpoint {key}: stays, and says that the rows cannot be relied on"))?;
        }
        if let Some(stream) = self.own.changes() {
            say(&format!("change stream {}: stays, without a TTL", stream.key))?;
        }
        let marks = self.writer.marks().len();
        if marks > 0 {
            let pattern = every_mark(&config.postgres.slot);
            let marks = counted(marks, "hash slot");
            say(&format!("marks of {marks}, {pattern}: stay, without a TTL"))?;
        }
        say("to remove the keys from Redis as well: prefetchd teardown --keys")
    }

    async fn remove_keys(mut self, config: &Config) -> Result<(), Failure> {
        let checkpoint = self.own.checkpoint().clone();
        let own = Area::Prefix(own_prefix(&config.postgres.slot));
        for area in self.areas(config).into_iter().chain([own]) {
            let removed = match &area {
                Area::Prefix(prefix) => self.remove_under(prefix, &checkpoint).await,
                Area::One(key) => self.remove(&[Key(key.clone().into())]).await,
            };
            say(&format!("{}: {} removed", shown(&area), removed.map_err(redis)?))?;
        }
        if let Some(stream) = self.own.changes().cloned() {
            let removed = self.remove(std::slice::from_ref(&stream.key)).await.map_err(redis)?;
            let what = if removed > 0 { "removed" } else { "does not exist" };
            say(&format!("change stream {}: {what}", stream.key))?;
        }
        let marks = self.writer.marks();
        if !marks.is_empty() {
            let removed = self.remove(&marks).await.map_err(redis)?;
            say(&format!("marks of hash slots: {removed} removed"))?;
        }
        let removed = self.remove(std::slice::from_ref(&checkpoint)).await.map_err(redis)?;
        say(&format!("checkpoint {checkpoint}: {}", if removed > 0 { "removed" } else { "does not exist" }))
    }

    /// Returns where the keys of the configured tables and lookups lie, and of those that only the checkpoint knows.
    fn areas(&self, config: &Config) -> BTreeSet<Area> {
        let configured = config.tables.iter().flat_map(TableSpec::areas);
        let marks = self.checkpoint.iter().flat_map(|checkpoint| checkpoint.tables.values());
        let templates = marks.flat_map(|mark| mark.lookups.iter().chain([&mark.template]));
        let retired = self.checkpoint.iter().flat_map(|checkpoint| &checkpoint.retired);
        // No prefetchd can have written with a template that cannot be parsed.
        configured.chain(templates.chain(retired).filter_map(|template| Area::of(template))).collect()
    }

    async fn remove_under(&mut self, prefix: &str, but: &Key) -> Result<u64, SinkError> {
        let (mut cursor, mut removed) = (0, 0);
        loop {
            let target = self.writer.target().to_string();
            let (next, mut keys) = answered(target, self.writer.scan_page(prefix.as_bytes(), cursor)).await?;
            keys.retain(|key| key != but);
            if !keys.is_empty() {
                removed += self.remove(&keys).await?;
            }
            cursor = next;
            if cursor == 0 {
                return Ok(removed);
            }
        }
    }

    async fn remove(&mut self, keys: &[Key]) -> Result<u64, SinkError> {
        let target = self.writer.target().to_string();
        answered(target, self.writer.remove(keys)).await
    }
}

fn shown(area: &Area) -> String {
    match area {
        Area::Prefix(prefix) => format!("keys {prefix}*"),
        Area::One(key) => format!("key {key}"),
    }
}

async fn answered<T>(redis: String, asked: impl Future<Output = Result<T, SinkError>>) -> Result<T, SinkError> {
    timeout(REDIS_PATIENCE, asked).await.unwrap_or(Err(SinkError::TimedOut { redis, after: REDIS_PATIENCE }))
}

fn say(line: &str) -> Result<(), Failure> {
    print(&format!("{}\n", printable(line)))
}

fn postgres(error: SourceError) -> Failure {
    Failure::of(error.disposition(), error.code(), format!("postgres: {error}"))
}

fn redis(error: SinkError) -> Failure {
    Failure::of(error.disposition(), error.code(), format!("redis: {error}; run this again once that is fixed"))
}
