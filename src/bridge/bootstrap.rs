//! From nothing to a session: gathers what is known of both servers, asks the resume table, and performs what
//! [`Startup`] requests until the stream can start.
//!
//! The publication is older than the slot, or decoding fails for good. Nothing is held in Postgres while Redis is away.
//! Every other rule about the order is in [`Startup`].

use super::BridgeError;
use super::context::{Context, prefixes};
use super::prerequisites::{self, Described, Published};
use super::room;
use super::standby::{self, Waited};
use crate::checkpoint::{Checkpoint, SlotState};
use crate::code::Code;
use crate::command::{DeadKey, Key};
use crate::lanes::Lost;
use crate::lanes::book::{Judged, Places};
use crate::lsn::EndLsn;
use crate::progress::resume::{self, Facts, HashSlots, ResumeDecision};
use crate::progress::visibility::Snapshot;
use crate::reason::{Heal, Reason};
use crate::resp::batch::Batch;
use crate::session::startup::{Done, Request, Startup};
use crate::session::takeover::{Taken, Takeover};
use crate::session::{DEAD_KEYS, SafeWhen, Spread, Start};
use crate::sink::SinkError;
use crate::sink::any_syncer::AnySyncer;
use crate::sink::any_writer::AnyWriter;
use crate::sink::survey;
use crate::sink::writer::Armed;
use crate::source::connect::PostgresClient;
use crate::source::limits;
use crate::source::new_slot::{self, TemporarySlot};
use crate::source::roles::Roles;
use crate::source::slot::{self, Identity, ServerFacts};
use crate::source::snapshot;
use crate::source::stream::{self, Stream};
use crate::source::wire::ReplicationConnection;
use crate::status::State;
use bytes::Bytes;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// How often it is checked whether snapshots see what a new slot leaves out.
const VISIBILITY_INTERVAL: Duration = Duration::from_millis(50);
/// How long slot creation waits before the status and the log name what it waits for.
const SLOT_PATIENCE: Duration = Duration::from_secs(2);
/// `waiting_for` in the status meanwhile.
const MAKING_THE_SLOT: &str = "the replication slot is being made";
/// How many keys a TRUNCATE removes in one batch: some 10 MB of commands.
const CLEAR_KEYS: usize = 100_000;

/// Everything that a session works with.
pub struct Session {
    pub start: Start,
    pub writer: AnyWriter,
    /// Set if a change is not durable as soon as Redis has it in memory.
    pub syncer: Option<AnySyncer>,
    pub stream: Stream,
    /// A connection of the role that reads, for the sample taken once a second.
    pub client: PostgresClient,
    pub retired: Vec<String>,
    pub walsender_pid: i32,
}

pub async fn begin(ctx: &Context) -> Result<Session, BridgeError> {
    let postgres = Postgres::connect(ctx).await?;
    let redis = Redis::connect(ctx).await?;
    let mut replication = postgres.replicate(ctx).await?;
    let (client, reads) = (postgres.roles.replicates(), postgres.roles.reads());
    let identity = slot::identify(&mut replication).await?;
    let (system_id, database) = (identity.system_id.clone(), identity.database.clone());
    ctx.update(|status| {
        status.source = Some(ctx.source(system_id, identity.timeline, database, &postgres.facts));
    });
    let found = redis.found.as_ref();
    // After a lost connection, the first sample tells.
    if !(ctx.goes_on() && has_kept_everything(ctx, found)) {
        ctx.update(|status| status.fresh_as_of = None);
    }
    let published = prerequisites::publish(ctx, client, found).await?;
    let slot = slot::slot_state(&client.client, &ctx.config.postgres.slot).await?;
    let replace_slot = why_replaced(ctx, client, &published).await?;
    let timeline_ended = timeline_end(&mut replication, &identity, found).await?;
    let judged = match &slot {
        SlotState::Ready { confirmed, .. } => {
            let end = timeline_ended.map_or(identity.flushed, |end| identity.flushed.min(EndLsn(end)));
            redis.writer.judge(*confirmed, end)
        }
        SlotState::Absent | SlotState::Invalidated { .. } => None,
    };
    let loss = judged.as_ref().and_then(Judged::loss);
    let hash_slots = HashSlots::of(judged.as_ref(), loss.as_ref());
    let went_back = ctx.memory().went_back;
    let facts = Facts {
        checkpoint: found,
        slot: &slot,
        replace_slot: replace_slot.as_ref(),
        system_id: &identity.system_id,
        database: &identity.database,
        timeline: identity.timeline,
        checkpoint_timeline_ended: timeline_ended,
        flushed: identity.flushed,
        went_back: went_back.as_deref(),
        adopt: ctx.adopt,
        hash_slots,
        redis_time_ms: redis.armed.redis_time_ms,
        tables: &postgres.described.tables,
        added: &published.added,
    };
    let decision = resume::decide(&facts);
    let streams_on = matches!(decision, ResumeDecision::Stream { .. });
    let lost = hash_slots.lost.filter(|_| streams_on);
    if decision.loads() || lost.is_some() {
        // Before anything is written: a load that does not fit would only fill Redis at the expense of others.
        let limit = redis.writer.server().maxmemory_bytes;
        room::or_wait(reads, &ctx.specs, &ctx.config.postgres.publication, limit).await?;
    }
    match &decision {
        ResumeDecision::NewSlot { because, .. } => {
            // The next attempt checks again: by then somebody else may have created the slot.
            ctx.remember(|memory| memory.undefined_in_stream = false);
            prerequisites::require_create(ctx, &because.text)?;
            tracing::info!(slot = ctx.config.postgres.slot, %because, "making the replication slot");
        }
        ResumeDecision::Deliver { because, .. } => {
            tracing::warn!(code = Code::LoadsAgain.as_str(), %because, "loading every table again");
        }
        ResumeDecision::Refuse { .. } | ResumeDecision::Stream { .. } => {}
    }
    let made = published.created.then_some(ctx.config.postgres.publication.as_str());
    let takeover = Takeover {
        facts: &facts,
        specs: &ctx.specs,
        epoch_seen: ctx.epoch.load(Ordering::Relaxed).max(ctx.sightings.newest().0),
        made_publication: made.or_else(|| found?.made_publication.as_deref()),
        evicted: redis.writer.server().evicted_keys,
    };
    if let Some(Lost { because, .. }) = lost {
        tracing::warn!(code = Code::LoadsAgain.as_str(), because, "loading what lies in these hash slots again");
    }
    let (startup, request) = Startup::begin(&takeover, decision).map_err(BridgeError::Refused)?;
    let Redis { mut writer, syncer, armed, .. } = redis;
    match judged.as_ref().filter(|_| streams_on) {
        None => writer.disown(),
        Some(judged) => writer.heal(&judged.lost),
    }
    let (spread, places) = match &writer {
        AnyWriter::One(_) => (Spread::OneSlot, Places::default()),
        AnyWriter::Lanes(_) => {
            let judged = judged.filter(|_| streams_on).unwrap_or_default();
            (Spread::Slots { ahead: judged.greatest, last: judged.last }, judged.places)
        }
    };
    let mut servers = Servers { ctx, client, reads, replication, writer };
    let (taken, redis_time_ms) = servers.take_over(startup, request).await?;
    let Servers { replication, writer, .. } = servers;
    postgres
        .stream(
            ctx,
            replication,
            Sink { writer, spread, places, syncer, redis_time_ms, dead_keys: armed.dead_keys },
            taken,
        )
        .await
}

/// Whether Redis has all that this process knows to have been in it. On a cluster, the record alone does not tell.
fn has_kept_everything(ctx: &Context, found: Option<&Checkpoint>) -> bool {
    let has_kept = |found: &Checkpoint| {
        let applied = ctx.has_applied();
        (found.epoch, found.seq) >= ctx.sightings.newest() && applied.is_none_or(|applied| found.lsn >= applied)
    };
    ctx.config.lanes().is_none() && found.is_some_and(has_kept)
}

/// The connections of both roles, and what is known of the server.
struct Postgres {
    roles: Roles,
    facts: ServerFacts,
    described: Described,
}

impl Postgres {
    /// Returns once no other process holds the slot.
    async fn connect(ctx: &Context) -> Result<Self, BridgeError> {
        let settings = &ctx.config.postgres;
        let roles = Roles::connect(&settings.target, settings.reader.as_ref(), &ctx.application_name).await?;
        let (client, reads) = (roles.replicates(), roles.reads());
        let facts = slot::server_facts(&client.client).await?;
        ctx.update(|status| status.slot_limit_bytes = facts.slot_limit_bytes);
        prerequisites::check_server(&facts, &ctx.application_name)?;
        if !ctx.has_begun() {
            // If the right is revoked later, loads report it and everything else continues.
            snapshot::may_emit_marks(&reads.client).await?;
        }
        let mut described = prerequisites::describe(ctx, reads).await?;
        if standby::wait(ctx, client, &facts).await? == Waited::ForAnother {
            described = prerequisites::describe(ctx, reads).await?;
        }
        // Also while Redis is down, when the slot retains more and more WAL.
        ctx.slot_keeps(&snapshot::sample(&client.client, &settings.slot).await?);
        Ok(Postgres { roles, facts, described })
    }

    /// Opens the connection that the stream will use.
    async fn replicate(&self, ctx: &Context) -> Result<ReplicationConnection, BridgeError> {
        let client = self.roles.replicates();
        let replication = ReplicationConnection::connect(&ctx.config.postgres.target, &ctx.application_name).await;
        let replication = match replication {
            Ok(replication) => replication,
            Err(error) => return Err(limits::explained_by(client, &ctx.application_name, error).await.into()),
        };
        if replication.server_started() != client.server_started {
            return Err(BridgeError::Waiting(
                Code::PostgresRestarted,
                "postgres.url leads to two servers in turn, or postgres has restarted".to_owned(),
            ));
        }
        Ok(replication)
    }

    async fn stream(
        self,
        ctx: &Context,
        mut replication: ReplicationConnection,
        sink: Sink,
        taken: Taken,
    ) -> Result<Session, BridgeError> {
        let settings = &ctx.config.postgres;
        let client = &self.roles.replicates().client;
        if settings.failover && new_slot::keep_on_standbys(client, &mut replication, &settings.slot).await? {
            tracing::info!(slot = settings.slot, "the slot is now one that standbys keep");
        }
        let Taken { from, checkpoint, load, lost } = taken;
        let walsender_pid = replication.backend_pid();
        let copy = replication.start(&settings.slot, &settings.publication, from).await?;
        let retired = checkpoint.retired.clone();
        let dead_key = |(key, json): (_, Bytes)| (key, DeadKey::from_json(&json));
        let start = Start {
            specs: ctx.specs.clone(),
            redis_time_ms: sink.redis_time_ms,
            from,
            load,
            lost,
            types: self.described.types,
            own: ctx.own.clone(),
            spread: sink.spread,
            places: sink.places,
            limits: ctx.plan_for(sink.writer.server()),
            safe_when: match (sink.spread, &sink.syncer) {
                (Spread::OneSlot, None) => SafeWhen::Acknowledged,
                (Spread::Slots { .. }, _) | (_, Some(_)) => SafeWhen::Told,
            },
            atomic_changes: ctx.config.cache.max_atomic_changes,
            dead_keys: sink.dead_keys.into_iter().map(dead_key).collect(),
            most_dead_keys: DEAD_KEYS,
            clear_keys: CLEAR_KEYS,
            atomic_bytes: ctx.config.cache.max_atomic_bytes,
            wal_segment_bytes: self.facts.wal_segment_bytes,
            verify_every: ctx.config.cache.verify_every,
            paused: ctx.is_paused(),
            now: Instant::now(),
            checkpoint,
        };
        let followed = ctx.specs.iter().map(|spec| spec.table.clone()).collect();
        let (client, stream) = (self.roles.into_reader(), stream::spawn(copy, followed));
        Ok(Session { start, writer: sink.writer, syncer: sink.syncer, stream, client, retired, walsender_pid })
    }
}

/// The writer's connection, on which the checkpoint has been watched since it was read.
struct Redis {
    writer: AnyWriter,
    syncer: Option<AnySyncer>,
    armed: Armed,
    found: Option<Checkpoint>,
}

impl Redis {
    async fn connect(ctx: &Context) -> Result<Self, BridgeError> {
        let config = &ctx.config;
        let (mut writer, mut armed) = AnyWriter::connect(&config.redis.target, &ctx.own, config.lanes()).await?;
        ctx.remember(|memory| memory.capacity.connected(writer.server()));
        if let Some(software) = &writer.server().software {
            ctx.say_once(&format!("redis at {} is {software}", config.redis.target));
        }
        let (target, durability) = (&config.redis.target, config.redis.durability);
        let prefixes = prefixes(config);
        survey::require(target, &ctx.own, &prefixes, durability, config.lanes()).await?;
        let lanes = config.lanes().zip(writer.lives());
        let syncer = AnySyncer::connect(target, &ctx.own, durability, lanes).await?;
        for lost in writer.lost() {
            ctx.say_once(&lost.to_string());
        }
        if !writer.trusts_packing().await? {
            ctx.say_once(
                "redis does not give back a row that was written by RESTORE as it was: a row takes three commands instead \
                 of one, which is slower",
            );
        }
        let found = armed.checkpoint.take().and_then(|stored| match Checkpoint::read(&stored.head, &stored.entries) {
            Ok(checkpoint) => Some(checkpoint),
            Err(error) => {
                let code = Code::CheckpointUnreadable.as_str();
                tracing::warn!(code, %error, "the checkpoint in redis cannot be read, treated as lost");
                None
            }
        });
        let marks = found.iter().flat_map(|found| found.tables.values());
        let templates = marks.flat_map(|mark| mark.lookups.iter().chain([&mark.template]));
        let known = templates.chain(found.iter().flat_map(|found| &found.retired));
        if let Some(template) = config.out_of_reach(known) {
            let text = format!(
                "redis holds keys of an earlier configuration, {template:?}, in other hash slots than that of the present \
                 ones: run prefetchd teardown --keys with the earlier configuration first"
            );
            return Err(BridgeError::Setup(Code::EarlierConfiguration, text));
        }
        Ok(Redis { writer, syncer, armed, found })
    }
}

/// What remains of it for the session.
struct Sink {
    writer: AnyWriter,
    spread: Spread,
    places: Places,
    syncer: Option<AnySyncer>,
    redis_time_ms: u64,
    dead_keys: Vec<(Key, Bytes)>,
}

/// Why the slot has to be replaced although Postgres shows it as sound.
async fn why_replaced(
    ctx: &Context,
    client: &PostgresClient,
    published: &Published,
) -> Result<Option<Reason>, BridgeError> {
    let memory = ctx.memory();
    let younger = memory.undefined_in_stream && {
        let (slot, publication) = (&ctx.config.postgres.slot, &ctx.config.postgres.publication);
        slot::publication_may_be_younger(&client.client, slot, publication).await? == Some(true)
    };
    if published.created || younger {
        // Decoding from a position before the publication existed always fails.
        return Ok(Some(Reason::heals(Heal::SlotLost, "the publication was missing and has been made again")));
    }
    let skipped = memory.stuck_at().filter(|_| memory.skip);
    Ok(skipped.map(|at| Reason::heals(Heal::Skipped, format!("an operator skipped the change at {at}"))))
}

/// Where the checkpoint's timeline ended. `None` if it is the server's timeline or unknown.
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

/// What the requests of [`Startup`] are performed with.
struct Servers<'a> {
    ctx: &'a Context,
    /// Of the role that replicates.
    client: &'a PostgresClient,
    reads: &'a PostgresClient,
    replication: ReplicationConnection,
    writer: AnyWriter,
}

impl Servers<'_> {
    /// Performs the requests until the stream can start. Also returns Redis TIME as of the takeover's checkpoint.
    async fn take_over(&mut self, mut startup: Startup, first: Request) -> Result<(Taken, u64), BridgeError> {
        let slot = &self.ctx.config.postgres.slot;
        let (mut request, mut redis_time_ms) = (first, 0);
        let (mut temporary, mut is_new, mut waits) = (None, false, false);
        loop {
            let done = match request {
                Request::Disown(checkpoint) => {
                    self.write(&checkpoint).await?;
                    self.nothing_counts(&checkpoint);
                    Done::Written
                }
                Request::DropSlot => {
                    slot::drop_slot(&self.client.client, slot).await?;
                    Done::Dropped
                }
                Request::CreateTemporarySlot => {
                    let created = temporary.insert(self.create_temporary().await?);
                    let left_out = new_slot::exported_snapshot(&self.reads.client, &created.snapshot_name).await?;
                    Done::Created { left_out: parse(&left_out)? }
                }
                Request::TakeSnapshot => {
                    if std::mem::replace(&mut waits, true) {
                        waits_for_visibility(self.ctx).await;
                    }
                    let sample = snapshot::sample(&self.reads.client, slot).await?;
                    Done::Snapshot(parse(&sample.snapshot)?)
                }
                Request::NameSlot => {
                    let confirmed = self.name_slot(temporary.take()).await?;
                    is_new = true;
                    Done::Named { confirmed }
                }
                Request::TakeOver(checkpoint) => {
                    redis_time_ms = self.write(&checkpoint).await?;
                    Done::Written
                }
                Request::Stream(taken) => {
                    self.has_taken_over(&taken, is_new);
                    return Ok((*taken, redis_time_ms));
                }
            };
            request = startup.step(done);
        }
    }

    async fn write(&mut self, checkpoint: &Checkpoint) -> Result<u64, BridgeError> {
        let entries = Batch::of_entries(&self.ctx.own, self.writer.limits(), checkpoint.entries());
        Ok(self.writer.execute(&entries.map_err(SinkError::from)?, &checkpoint.to_json()).await?.redis_time_ms)
    }

    /// Shows that nothing in Redis is vouched for, and that the slot is being created.
    fn nothing_counts(&self, checkpoint: &Checkpoint) {
        self.ctx.update(|status| {
            status.waiting_for = Some(MAKING_THE_SLOT.to_owned());
            for table in &mut status.tables {
                table.state = checkpoint.tables.get(&*table.name).map(|mark| mark.state);
            }
        });
    }

    /// Creates the temporary slot and reports what it waits for: every transaction that was running has to end first.
    async fn create_temporary(&mut self) -> Result<TemporarySlot, BridgeError> {
        let Servers { ctx, client, replication, .. } = self;
        let settings = &ctx.config.postgres;
        if settings.failover {
            new_slot::require_failover_slots(replication).await?;
        }
        let pid = replication.backend_pid();
        let create = new_slot::create_temporary(replication, &settings.slot);
        tokio::pin!(create);
        let mut look = tokio::time::interval_at(tokio::time::Instant::now() + SLOT_PATIENCE, SLOT_PATIENCE);
        let mut said = String::new();
        loop {
            tokio::select! {
                created = &mut create => {
                    ctx.update(|status| status.waiting_for = Some(MAKING_THE_SLOT.to_owned()));
                    return Ok(created?);
                }
                _ = look.tick() => {
                    let blockers = new_slot::slot_creation_blockers(&client.client, pid).await?;
                    let list = blockers.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
                    let waiting = format!("slot creation waits for running transactions to end: {list}");
                    if waiting != said {
                        ctx.set_state(State::Connecting, Some(Code::SlotWaits), Some(waiting.clone()));
                        said = waiting;
                    }
                }
            }
        }
    }

    async fn name_slot(&mut self, temporary: Option<TemporarySlot>) -> Result<EndLsn, BridgeError> {
        let slot = &self.ctx.config.postgres.slot;
        let temporary = temporary.ok_or(BridgeError::Internal("a slot is named that was not made"))?;
        let confirmed = new_slot::name_slot(&self.client.client, &mut self.replication, &temporary, slot).await?;
        tracing::info!(slot, lsn = %confirmed, "slot created");
        Ok(confirmed)
    }

    /// The takeover's checkpoint is acknowledged: it no longer claims anything that Postgres has lost.
    fn has_taken_over(&self, taken: &Taken, is_new: bool) {
        if taken.load.is_empty() {
            tracing::info!(lsn = %taken.checkpoint.lsn, "resuming, nothing to load");
        }
        self.ctx.epoch.store(taken.checkpoint.epoch, Ordering::Relaxed);
        self.ctx.remember(|memory| {
            memory.went_back = None;
            if std::mem::take(&mut memory.skip) || is_new {
                memory.undecodable = None;
            }
        });
    }
}

async fn waits_for_visibility(ctx: &Context) {
    let waiting = "waits until what committed before the slot was made is visible (synchronous replication?)";
    ctx.set_state(State::Connecting, Some(Code::SlotWaits), Some(waiting.to_owned()));
    tokio::time::sleep(VISIBILITY_INTERVAL).await;
}

fn parse(snapshot: &str) -> Result<Snapshot, BridgeError> {
    snapshot.parse().map_err(|_| BridgeError::Internal("postgres sent a malformed snapshot"))
}
