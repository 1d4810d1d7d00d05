//! From nothing to a session: looks at both servers, asks the resume table, takes over the checkpoint, opens the stream.
//!
//! The order matters. The publication is older than the slot, or decoding fails for good. The checkpoint is raised
//! before the stream starts, so that an older writer is refused from then on. Nothing is held in Postgres while Redis
//! is away.

use super::BridgeError;
use super::run::Context;
use super::state::Start;
use crate::checkpoint::{Checkpoint, SlotState, TableMark, TableState};
use crate::config::Create;
use crate::lsn::EndLsn;
use crate::plan::mapping::{self, Mapping};
use crate::progress::resume::{self, ConfiguredTable, Facts, ResumeDecision};
use crate::progress::visibility::Snapshot;
use crate::reason::{Heal, Reason};
use crate::schema::{Oid, TableId};
use crate::sink::batch::Batch;
use crate::sink::writer::Writer;
use crate::source::connect::{self, PostgresClient};
use crate::source::slot::{self, Identity, ServerFacts};
use crate::source::snapshot;
use crate::source::stream::{self, Stream};
use crate::source::wire::ReplicationConnection;
use crate::status::{Source, State};
use std::collections::{BTreeMap, HashSet};
use std::time::{Duration, Instant};

/// The oldest Postgres whose pgoutput sends logical messages.
const OLDEST_POSTGRES: u32 = 140_000;
/// How often a standby looks whether the slot is free.
const STANDBY_INTERVAL: Duration = Duration::from_millis(500);
/// How long slot creation waits before it is worth a word.
const SLOT_PATIENCE: Duration = Duration::from_secs(2);

/// Everything that a session works with.
pub struct Session {
    pub start: Start,
    pub writer: Writer,
    pub stream: Stream,
    /// For the once-a-second sample.
    pub client: PostgresClient,
    pub retired: Vec<String>,
    pub walsender_pid: i32,
}

struct Described {
    tables: Vec<ConfiguredTable>,
    booleans: HashSet<Oid>,
}

pub async fn begin(ctx: &Context) -> Result<Session, BridgeError> {
    let config = &ctx.config;
    let client = connect::connect(&config.postgres.target, &ctx.application_name).await?;
    let facts = slot::server_facts(&client.client).await?;
    check_server(&facts, &ctx.application_name)?;
    let described = describe(ctx, &client).await?;
    wait_for_slot(ctx, &client).await?;

    let (mut writer, armed) = Writer::connect(&config.redis.target, &ctx.own).await?;
    for lost in writer.lost() {
        ctx.say_once(&lost.to_string());
    }
    let found = armed.checkpoint.as_deref().and_then(|json| match Checkpoint::from_json(json) {
        Ok(checkpoint) => Some(checkpoint),
        Err(error) => {
            tracing::warn!(%error, "the checkpoint in redis cannot be read, treated as lost");
            None
        }
    });

    let mut replication = ReplicationConnection::connect(&config.postgres.target, &ctx.application_name).await?;
    let identity = slot::identify(&mut replication).await?;
    ctx.set_source(Source {
        system_id: identity.system_id.clone(),
        timeline: identity.timeline,
        database: identity.database.clone(),
        slot: config.postgres.slot.clone(),
        publication: config.postgres.publication.clone(),
        wal_segment_bytes: facts.wal_segment_bytes,
    });
    ctx.update(|status| status.slot_limit_bytes = facts.slot_limit_bytes);
    let published = publish(ctx, &client, found.as_ref()).await?;
    let slot = slot::slot_state(&client.client, &config.postgres.slot).await?;
    let went_back = ctx.went_back();
    let mut decision = resume::decide(&Facts {
        checkpoint: found.as_ref(),
        slot: &slot,
        system_id: &identity.system_id,
        database: &identity.database,
        timeline: identity.timeline,
        checkpoint_timeline_ended: timeline_end(&mut replication, &identity, found.as_ref()).await?,
        flushed: identity.flushed,
        went_back: went_back.as_deref(),
        adopt: ctx.adopt,
        redis_time_ms: armed.redis_time_ms,
        tables: &described.tables,
    });
    if published.created && !matches!(slot, SlotState::Absent) && !matches!(decision, ResumeDecision::Refuse { .. }) {
        // Decoding from before the publication's creation fails for good.
        let because = Reason::heals(Heal::SlotLost, "the publication was missing and has been made again");
        decision = ResumeDecision::NewSlot { drop_old: true, because };
    }

    let mut taken = Takeover { ctx, identity: &identity, found: found.as_ref(), redis_time_ms: armed.redis_time_ms };
    let made_publication = published.created || found.as_ref().is_some_and(|c| c.made_publication);
    let (from, checkpoint, load, expect) = match decision {
        ResumeDecision::Refuse { because } => return Err(BridgeError::Refused(because)),
        ResumeDecision::NewSlot { drop_old, because } => {
            require_create(ctx, &because.text)?;
            // First of all: whoever finds the slot without knowing its snapshot must make it anew.
            let state = if found.is_some() { TableState::Healing } else { TableState::Loading };
            let mut checkpoint = taken.checkpoint(identity.flushed, state, &described.tables);
            checkpoint.creating_slot = true;
            checkpoint.made_publication = made_publication;
            write(ctx, &mut writer, &checkpoint).await?;
            if drop_old {
                slot::drop_slot(&client.client, &config.postgres.slot).await?;
            }
            let created = create_slot(ctx, &client, &mut replication).await?;
            let seen = slot::exported_snapshot(&client.client, &created.snapshot_name).await?;
            tracing::info!(slot = config.postgres.slot, lsn = %created.consistent_point, %because, "slot created");
            checkpoint.creating_slot = false;
            checkpoint.slot_snapshot = Some(seen);
            (checkpoint.lsn, checkpoint.base) = (created.consistent_point, created.consistent_point);
            (created.consistent_point, checkpoint, all_tables(ctx, &because), None)
        }
        ResumeDecision::Deliver { from, base, because } => {
            tracing::warn!(%because, "loading every table again");
            let checkpoint = taken.checkpoint(base, TableState::Healing, &described.tables);
            (from, checkpoint, all_tables(ctx, &because), None)
        }
        ResumeDecision::Stream { from, load } => {
            let Some(found) = &found else {
                return Err(BridgeError::Internal("the resume table streams without a checkpoint"));
            };
            let load = load.into_iter().chain(published.added);
            let mut loads: BTreeMap<TableId, Reason> = BTreeMap::new();
            for (name, because) in load {
                if let Some(spec) = config.tables.iter().find(|t| t.name == name) {
                    loads.entry(spec.id).or_insert(because);
                }
            }
            let checkpoint = taken.resumed(found, &described.tables, &loads);
            let expect = found.last.filter(|last| last.end > from);
            if loads.is_empty() {
                tracing::info!(lsn = %found.lsn, "resuming, nothing to load");
            }
            (from, checkpoint, loads.into_iter().collect(), expect)
        }
    };
    let mut checkpoint = checkpoint;
    checkpoint.made_publication = made_publication;
    checkpoint.seq += 1;
    let redis_time_ms = write(ctx, &mut writer, &checkpoint).await?;
    ctx.epoch.store(checkpoint.epoch, std::sync::atomic::Ordering::Relaxed);
    // The checkpoint no longer claims what Postgres has lost.
    ctx.forget_went_back();

    let walsender_pid = replication.backend_pid();
    let copy = replication.start(&config.postgres.slot, &config.postgres.publication, from).await?;
    let slot_snapshot = match &checkpoint.slot_snapshot {
        Some(text) => Some(
            text.parse::<Snapshot>().map_err(|_| BridgeError::Internal("the checkpoint holds a malformed snapshot"))?,
        ),
        None => None,
    };
    let retired = checkpoint.retired.clone();
    let start = Start {
        specs: ctx.specs.clone(),
        redis_time_ms,
        from,
        load,
        expect,
        booleans: described.booleans,
        slot_snapshot,
        own: ctx.own.clone(),
        limits: writer.limits(),
        atomic_changes: config.cache.max_atomic_changes,
        atomic_bytes: config.cache.max_atomic_bytes,
        wal_segment_bytes: facts.wal_segment_bytes,
        now: Instant::now(),
        checkpoint,
    };
    Ok(Session { start, writer, stream: stream::spawn(copy), client, retired, walsender_pid })
}

fn check_server(facts: &ServerFacts, application_name: &str) -> Result<(), BridgeError> {
    let setup = |message: String| Err(BridgeError::Setup(message));
    if facts.version_num < OLDEST_POSTGRES {
        return setup(format!("postgres {} is too old: prefetchd needs 14 or newer", facts.version_num / 10_000));
    }
    if facts.in_recovery {
        return Err(BridgeError::Waiting(
            "postgres is a standby in recovery; prefetchd follows the primary".to_owned(),
        ));
    }
    if facts.wal_level != "logical" {
        return setup(format!(
            "postgres has wal_level = {}: ALTER SYSTEM SET wal_level = logical, then restart postgres",
            facts.wal_level
        ));
    }
    if facts.names_as_synchronous_standby(application_name) {
        return setup(format!(
            "synchronous_standby_names would make prefetchd a synchronous standby, and commits would wait for it: \
             name your standbys there instead of '*' (it is {:?})",
            facts.synchronous_standby_names
        ));
    }
    Ok(())
}

/// Looks at every configured table, and stops where one cannot be followed.
async fn describe(ctx: &Context, client: &PostgresClient) -> Result<Described, BridgeError> {
    let booleans = snapshot::boolean_types(&client.client).await?;
    let mut tables = Vec::new();
    for spec in ctx.specs.iter() {
        let catalog = snapshot::describe(&client.client, &spec.table, &ctx.config.postgres.publication).await?;
        let Some(catalog) = catalog else {
            return Err(BridgeError::Setup(format!(
                "table {} (tables.name = {:?}) does not exist in this database: create it, or correct `table`",
                spec.table, spec.name
            )));
        };
        let setup = |error: mapping::MappingError| BridgeError::Setup(error.to_string());
        mapping::check_identity(spec, catalog.identity, &catalog.identity_columns).map_err(setup)?;
        let mapping = Mapping::bind(spec, &catalog.relation(), &booleans).map_err(setup)?;
        tables.push(ConfiguredTable {
            name: spec.name.clone(),
            template: spec.key.to_string(),
            fingerprint: mapping.fingerprint,
        });
    }
    Ok(Described { tables, booleans })
}

/// Returns when nobody else holds the slot. Until then this daemon is a standby.
async fn wait_for_slot(ctx: &Context, client: &PostgresClient) -> Result<(), BridgeError> {
    loop {
        match slot::slot_state(&client.client, &ctx.config.postgres.slot).await? {
            SlotState::Ready { active_pid: Some(pid), .. } if ctx.was_our_walsender(pid) => {
                // The last session's connection, which Postgres has not noticed to be gone.
                slot::terminate_backend(&client.client, pid).await?;
            }
            SlotState::Ready { active_pid: Some(pid), .. } => {
                ctx.set_state(State::Standby, Some(format!("the slot is held by another process, pid {pid}")));
            }
            SlotState::Ready { active_pid: None, .. } | SlotState::Absent | SlotState::Invalidated { .. } => {
                return Ok(());
            }
        }
        tokio::time::sleep(STANDBY_INTERVAL).await;
    }
}

struct Published {
    created: bool,
    /// Tables that were missing from it, and why they must be loaded.
    added: Vec<(String, Reason)>,
}

async fn publish(ctx: &Context, client: &PostgresClient, found: Option<&Checkpoint>) -> Result<Published, BridgeError> {
    let settings = &ctx.config.postgres;
    let name = &settings.publication;
    let tables: Vec<_> = ctx.specs.iter().map(|s| s.table.clone()).collect();
    let Some(publication) = slot::publication(&client.client, name).await? else {
        if settings.create == Create::Never {
            let list = tables.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            return Err(BridgeError::Setup(format!(
                "publication {name} does not exist: CREATE PUBLICATION {name} FOR TABLE {list}, or set postgres.create = true"
            )));
        }
        slot::create_publication(&client.client, name, &tables).await?;
        tracing::info!(publication = name, "publication created");
        return Ok(Published { created: true, added: Vec::new() });
    };
    let lacking = publication.lacking_operations();
    if !lacking.is_empty() {
        return Err(BridgeError::Setup(format!(
            "publication {name} does not publish {}: ALTER PUBLICATION {name} SET (publish = 'insert, update, delete, truncate')",
            lacking.join(", ")
        )));
    }
    let mut added = Vec::new();
    for spec in ctx.specs.iter().filter(|s| !publication.covers(&s.table)) {
        let ours = found.is_some_and(|c| c.made_publication) && settings.create == Create::WhereMissing;
        if !ours {
            return Err(BridgeError::Setup(format!(
                "table {} is not in publication {name}: ALTER PUBLICATION {name} ADD TABLE {}",
                spec.table, spec.table
            )));
        }
        slot::add_table(&client.client, name, &spec.table).await?;
        tracing::info!(publication = name, table = spec.name, "table added to the publication");
        added.push((spec.name.clone(), Reason::ordinary("it was missing from the publication")));
    }
    Ok(Published { created: false, added })
}

fn require_create(ctx: &Context, because: &str) -> Result<(), BridgeError> {
    if ctx.config.postgres.create == Create::WhereMissing {
        return Ok(());
    }
    let slot = &ctx.config.postgres.slot;
    Err(BridgeError::Setup(format!(
        "{because}, and postgres.create is false: \
         SELECT pg_create_logical_replication_slot('{slot}', 'pgoutput'), or set postgres.create = true"
    )))
}

/// Where the checkpoint's timeline ended, if it is not the server's.
async fn timeline_end(
    replication: &mut ReplicationConnection,
    identity: &Identity,
    found: Option<&Checkpoint>,
) -> Result<Option<crate::lsn::Lsn>, BridgeError> {
    let Some(checkpoint) = found.filter(|c| c.timeline != identity.timeline && c.system_id == identity.system_id)
    else {
        return Ok(None);
    };
    let history = slot::timeline_history(replication, identity.timeline).await?;
    Ok(history.into_iter().find(|t| t.timeline == checkpoint.timeline).map(|t| t.end))
}

/// Creates the slot, and says what it waits for: every transaction that was running has to end first.
async fn create_slot(
    ctx: &Context,
    client: &PostgresClient,
    replication: &mut ReplicationConnection,
) -> Result<slot::CreatedSlot, BridgeError> {
    let settings = &ctx.config.postgres;
    let pid = replication.backend_pid();
    let create = slot::create_slot(replication, &settings.slot, settings.failover);
    tokio::pin!(create);
    let mut look = tokio::time::interval_at(tokio::time::Instant::now() + SLOT_PATIENCE, SLOT_PATIENCE);
    let mut said = String::new();
    loop {
        tokio::select! {
            created = &mut create => {
                if !said.is_empty() {
                    ctx.set_state(State::Connecting, None);
                }
                return Ok(created?);
            }
            _ = look.tick() => {
                let blockers = slot::slot_creation_blockers(&client.client, pid).await?;
                let list = blockers.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
                let waiting = format!("slot creation waits for running transactions to end: {list}");
                if waiting != said {
                    tracing::warn!(slot = settings.slot, blockers = list, "slot creation waits for running transactions to end");
                    ctx.set_state(State::Connecting, Some(waiting.clone()));
                    said = waiting;
                }
            }
        }
    }
}

async fn write(ctx: &Context, writer: &mut Writer, checkpoint: &Checkpoint) -> Result<u64, BridgeError> {
    let nothing = Batch::new(ctx.own.clone(), writer.limits());
    Ok(writer.execute(&nothing, &checkpoint.to_json()).await?.redis_time_ms)
}

fn all_tables(ctx: &Context, because: &Reason) -> Vec<(TableId, Reason)> {
    ctx.specs.iter().map(|spec| (spec.id, because.clone())).collect()
}

/// Makes the checkpoint with which this daemon becomes the writer.
struct Takeover<'a> {
    ctx: &'a Context,
    identity: &'a Identity,
    found: Option<&'a Checkpoint>,
    redis_time_ms: u64,
}

impl Takeover<'_> {
    /// Above every epoch that was ever seen, also after Redis lost the last one.
    fn epoch(&self) -> u64 {
        let seen = self.ctx.epoch.load(std::sync::atomic::Ordering::Relaxed);
        let found = self.found.map_or(self.redis_time_ms / 1000, |c| c.epoch);
        seen.max(found) + 1
    }

    fn marks(&self, tables: &[ConfiguredTable], state: TableState) -> BTreeMap<String, TableMark> {
        let mark = |t: &ConfiguredTable| TableMark {
            template: t.template.clone(),
            fingerprint: t.fingerprint,
            state,
            ttl_until_ms: None,
        };
        tables.iter().map(|t| (t.name.clone(), mark(t))).collect()
    }

    /// Templates whose keys nobody configures any more.
    fn retired(&self, tables: &[ConfiguredTable]) -> Vec<String> {
        let Some(found) = self.found else { return Vec::new() };
        let known = found.retired.iter().chain(found.tables.values().map(|m| &m.template));
        let mut retired: Vec<String> = known.filter(|t| !tables.iter().any(|c| c.template == **t)).cloned().collect();
        retired.sort();
        retired.dedup();
        retired
    }

    /// Nothing that Redis has is trusted to be complete.
    fn checkpoint(&mut self, at: EndLsn, state: TableState, tables: &[ConfiguredTable]) -> Checkpoint {
        Checkpoint {
            system_id: self.identity.system_id.clone(),
            timeline: self.identity.timeline,
            database: self.identity.database.clone(),
            lsn: at,
            epoch: self.epoch(),
            seq: self.found.map_or(0, |c| c.seq) + 1,
            creating_slot: false,
            within: None,
            last: None,
            beat_ms: self.redis_time_ms,
            base: at,
            slot_snapshot: None,
            made_publication: false,
            tables: self.marks(tables, state),
            retired: self.retired(tables),
        }
    }

    /// Everything that Redis has stands; some tables are loaded beside the stream.
    fn resumed(&self, found: &Checkpoint, tables: &[ConfiguredTable], loads: &BTreeMap<TableId, Reason>) -> Checkpoint {
        let mut checkpoint = found.clone();
        checkpoint.epoch = self.epoch();
        checkpoint.timeline = self.identity.timeline;
        checkpoint.beat_ms = self.redis_time_ms;
        checkpoint.retired = self.retired(tables);
        let fresh = self.marks(tables, TableState::Loading);
        checkpoint.tables.retain(|name, _| fresh.contains_key(name));
        for spec in self.ctx.specs.iter() {
            let mark = checkpoint.tables.get(&spec.name);
            let kept = mark.filter(|m| m.state == TableState::Healing).map(|m| m.state);
            if loads.contains_key(&spec.id) {
                let state = kept.unwrap_or(TableState::Loading);
                let mark = fresh.get(&spec.name).cloned().map(|m| TableMark { state, ..m });
                checkpoint.tables.extend(mark.map(|m| (spec.name.clone(), m)));
            }
        }
        checkpoint
    }
}

/// The name under which the daemon's connections show up in Postgres.
pub fn application_name(slot: &str) -> String {
    format!("prefetchd_{slot}")
}

/// The prefix of everything that is prefetchd's own in Redis.
pub fn own_prefix(slot: &str) -> String {
    format!("prefetchd:{{{slot}}}:")
}
