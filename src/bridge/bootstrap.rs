//! From nothing to a session: looks at both servers, asks the resume table, takes over the checkpoint, opens the stream.
//!
//! The order matters. The publication is older than the slot, or decoding fails for good. The checkpoint is raised
//! before the stream starts, so that an older writer is refused from then on. Nothing is held in Postgres while Redis
//! is away.

use super::BridgeError;
use super::catalog;
use super::room;
use super::run::Context;
use super::standby::{self, Waited};
use crate::checkpoint::{Checkpoint, SlotState};
use crate::command::DeadKey;
use crate::config::Create;
use crate::loader::range::Sizes;
use crate::lsn::EndLsn;
use crate::plan::mapping::{self, Mapping};
use crate::progress::resume::{self, ConfiguredTable, Facts, ResumeDecision};
use crate::progress::visibility::Snapshot;
use crate::reason::{Heal, Reason};
use crate::remedy::Sql;
use crate::resp::batch::Batch;
use crate::schema::{CatalogMark, Oid, TableSpec};
use crate::session::takeover::{self, Taken, Takeover};
use crate::session::{DEAD_KEYS, SafeWhen, Start};
use crate::sink::SinkError;
use crate::sink::durability::Syncer;
use crate::sink::survey;
use crate::sink::writer::Writer;
use crate::source::SourceError;
use crate::source::connect::PostgresClient;
use crate::source::limits;
use crate::source::new_slot::{self, TemporarySlot};
use crate::source::roles::Roles;
use crate::source::slot::{self, Identity, ServerFacts};
use crate::source::snapshot::{self, Asked, CatalogTable};
use crate::source::stream::{self, Stream};
use crate::source::wire::ReplicationConnection;
use crate::status::State;
use std::collections::HashSet;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// The oldest Postgres whose pgoutput sends logical messages.
const OLDEST_POSTGRES: u32 = 140_000;
/// How often it is looked whether snapshots see what a new slot leaves out.
const VISIBILITY_INTERVAL: Duration = Duration::from_millis(50);
/// How long slot creation waits before it is worth a word.
const SLOT_PATIENCE: Duration = Duration::from_secs(2);
/// What the status waits for meanwhile.
const MAKING_THE_SLOT: &str = "the replication slot is being made";
/// A TRUNCATE removes so many keys at once: some 10 MB of commands.
const CLEAR_KEYS: usize = 100_000;

/// Everything that a session works with.
pub struct Session {
    pub start: Start,
    pub writer: Writer,
    /// Where a change in Redis's memory does not count as safe yet.
    pub syncer: Option<Syncer>,
    pub stream: Stream,
    /// Of the role that reads, for the once-a-second sample.
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
    let (target, reader) = (&config.postgres.target, config.postgres.reader.as_ref());
    let roles = Roles::connect(target, reader, &ctx.application_name).await?;
    let (client, reads) = (roles.replicates(), roles.reads());
    let facts = slot::server_facts(&client.client).await?;
    ctx.update(|status| status.slot_limit_bytes = facts.slot_limit_bytes);
    check_server(&facts, &ctx.application_name)?;
    if !ctx.has_begun() {
        // Where it is revoked later, the loads that need it say so, and everything else goes on.
        snapshot::may_emit_marks(&reads.client).await?;
    }
    let mut described = describe(ctx, reads).await?;
    if standby::wait(ctx, client, &facts).await? == Waited::ForAnother {
        described = describe(ctx, reads).await?;
    }
    // Also while Redis is away, for then it grows.
    ctx.slot_keeps(&snapshot::sample(&client.client, &config.postgres.slot).await?);

    let (mut writer, armed) = Writer::connect(&config.redis.target, &ctx.own).await?;
    ctx.remember(|memory| memory.capacity.connected(writer.server()));
    if let Some(software) = &writer.server().software {
        ctx.say_once(&format!("redis at {} is {software}", config.redis.target));
    }
    survey::require(&config.redis.target, &ctx.own, &config.key_prefixes(), config.redis.durability).await?;
    let syncer = Syncer::connect(&config.redis.target, &ctx.own, config.redis.durability).await?;
    for lost in writer.lost() {
        ctx.say_once(&lost.to_string());
    }
    let found = armed.checkpoint.and_then(|stored| match Checkpoint::read(&stored.head, &stored.entries) {
        Ok(checkpoint) => Some(checkpoint),
        Err(error) => {
            tracing::warn!(%error, "the checkpoint in redis cannot be read, treated as lost");
            None
        }
    });

    let replication = ReplicationConnection::connect(target, &ctx.application_name).await;
    let mut replication = match replication {
        Ok(replication) => replication,
        Err(error) => return Err(limits::explained_by(client, &ctx.application_name, error).await.into()),
    };
    if replication.server_started() != client.server_started {
        return Err(BridgeError::Waiting(
            "postgres.url leads to two servers in turn, or postgres has restarted".to_owned(),
        ));
    }
    let identity = slot::identify(&mut replication).await?;
    let source = ctx.source(identity.system_id.clone(), identity.timeline, identity.database.clone(), &facts);
    ctx.update(|status| status.source = Some(source));
    let published = publish(ctx, client, found.as_ref()).await?;
    let slot = slot::slot_state(&client.client, &config.postgres.slot).await?;
    let memory = ctx.memory();
    let mut decision = resume::decide(&Facts {
        checkpoint: found.as_ref(),
        slot: &slot,
        system_id: &identity.system_id,
        database: &identity.database,
        timeline: identity.timeline,
        checkpoint_timeline_ended: timeline_end(&mut replication, &identity, found.as_ref()).await?,
        flushed: identity.flushed,
        went_back: memory.went_back.as_deref(),
        adopt: ctx.adopt,
        redis_time_ms: armed.redis_time_ms,
        tables: &described.tables,
    });
    let has_slot = !matches!(slot, SlotState::Absent);
    if has_slot && !matches!(decision, ResumeDecision::Refuse { .. }) {
        let younger = memory.undefined_in_stream && {
            let (slot, publication) = (&config.postgres.slot, &config.postgres.publication);
            slot::publication_may_be_younger(&client.client, slot, publication).await? == Some(true)
        };
        if published.created || younger {
            // Decoding from before the publication's creation fails for good.
            let because = Reason::heals(Heal::SlotLost, "the publication was missing and has been made again");
            decision = ResumeDecision::NewSlot { drop_old: true, because };
        } else if let (Some(at), true) = (memory.stuck_at(), memory.skip) {
            let because = Reason::heals(Heal::Skipped, format!("an operator skipped the change at {at}"));
            decision = ResumeDecision::NewSlot { drop_old: true, because };
        }
    }

    if decision.loads() || !published.added.is_empty() {
        // Before anything is written: a load that cannot end would only fill Redis for everybody else.
        let limit = writer.server().maxmemory_bytes;
        room::or_wait(reads, &ctx.specs, &config.postgres.publication, limit).await?;
    }

    let made = published.created.then_some(config.postgres.publication.as_str());
    let takeover = Takeover {
        system_id: &identity.system_id,
        timeline: identity.timeline,
        database: &identity.database,
        found: found.as_ref(),
        specs: &ctx.specs,
        tables: &described.tables,
        epoch_seen: ctx.epoch.load(Ordering::Relaxed).max(ctx.sightings.newest().0),
        redis_time_ms: armed.redis_time_ms,
        made_publication: made.or_else(|| found.as_ref()?.made_publication.as_deref()),
        evicted: writer.server().evicted_keys,
    };
    let new_slot = matches!(decision, ResumeDecision::NewSlot { .. });
    let taken = match decision {
        ResumeDecision::Refuse { because } => return Err(BridgeError::Refused(because)),
        ResumeDecision::NewSlot { drop_old, because } => {
            // Somebody else may make it: look again each time, rather than go by what the last attempt found.
            ctx.remember(|memory| memory.undefined_in_stream = false);
            require_create(ctx, &because.text)?;
            let before = takeover.before_the_slot(identity.flushed, &because);
            write(ctx, &mut writer, &before).await?;
            // From here on it is known what Redis holds: nothing that counts.
            ctx.update(|status| {
                status.waiting_for = Some(MAKING_THE_SLOT.to_owned());
                for table in &mut status.tables {
                    table.state = before.tables.get(&*table.name).map(|mark| mark.state);
                }
            });
            if drop_old {
                slot::drop_slot(&client.client, &config.postgres.slot).await?;
            }
            let confirmed = create_slot(ctx, client, reads, &mut replication).await?;
            tracing::info!(slot = config.postgres.slot, lsn = %confirmed, %because, "slot created");
            takeover.with_the_slot(before, confirmed, &because)
        }
        ResumeDecision::Deliver { from, base, because } => {
            tracing::warn!(%because, "loading every table again");
            takeover.anew(from, base, &because)
        }
        ResumeDecision::Stream { from, load } => {
            let Some(found) = &found else {
                return Err(BridgeError::Internal("the resume table streams without a checkpoint"));
            };
            let taken = takeover.resumed(found, from, load.into_iter().chain(published.added));
            if taken.load.is_empty() {
                tracing::info!(lsn = %found.lsn, "resuming, nothing to load");
            }
            taken
        }
    };
    let Taken { from, checkpoint, load } = taken;
    let redis_time_ms = write(ctx, &mut writer, &checkpoint).await?;
    ctx.epoch.store(checkpoint.epoch, Ordering::Relaxed);
    // The checkpoint no longer claims what Postgres has lost.
    ctx.remember(|memory| {
        memory.went_back = None;
        if std::mem::take(&mut memory.skip) || new_slot {
            memory.undecodable = None;
        }
    });

    let walsender_pid = replication.backend_pid();
    if config.postgres.failover
        && new_slot::keep_on_standbys(&client.client, &mut replication, &config.postgres.slot).await?
    {
        tracing::info!(slot = config.postgres.slot, "the slot is now one that standbys keep");
    }
    let copy = replication.start(&config.postgres.slot, &config.postgres.publication, from).await?;
    let retired = checkpoint.retired.clone();
    let start = Start {
        specs: ctx.specs.clone(),
        redis_time_ms,
        from,
        load,
        booleans: described.booleans,
        own: ctx.own.clone(),
        limits: ctx.plan_for(writer.server()),
        safe_when: if syncer.is_some() { SafeWhen::Told } else { SafeWhen::Acknowledged },
        atomic_changes: config.cache.max_atomic_changes,
        dead_keys: armed.dead_keys.into_iter().map(|(key, json)| (key, DeadKey::from_json(&json))).collect(),
        most_dead_keys: DEAD_KEYS,
        clear_keys: CLEAR_KEYS,
        atomic_bytes: config.cache.max_atomic_bytes,
        wal_segment_bytes: facts.wal_segment_bytes,
        verify_every: config.cache.verify_every,
        paused: ctx.is_paused(),
        now: Instant::now(),
        checkpoint,
    };
    let followed = ctx.specs.iter().map(|spec| spec.table.clone()).collect();
    let (client, stream) = (roles.into_reader(), stream::spawn(copy, followed));
    Ok(Session { start, writer, syncer, stream, client, retired, walsender_pid })
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
            "postgres has wal_level = {}: {} then restart postgres",
            facts.wal_level,
            Sql::WalLevelLogical
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

/// Looks at every configured table. At the start it stops where one cannot be followed, unless its owner alone decides that;
/// later it leaves that one to the loader, which says so and stops that table alone.
async fn describe(ctx: &Context, client: &PostgresClient) -> Result<Described, BridgeError> {
    let booleans = snapshot::boolean_types(&client.client).await?;
    let mut tables = Vec::new();
    let asked: Vec<Asked<'_>> =
        ctx.specs.iter().map(|spec| Asked { name: &spec.table, chosen: &spec.columns }).collect();
    let publication = &ctx.config.postgres.publication;
    let found = snapshot::describe_all(&client.client, &asked, publication, Sizes::Remembered).await?;
    for (spec, found) in ctx.specs.iter().zip(found) {
        let seen = found.map_err(BridgeError::from).and_then(|catalog| describe_table(ctx, spec, catalog, &booleans));
        let stops_that_table_alone = match &seen {
            Err(BridgeError::Source(SourceError::OwnersCode { .. })) => true,
            Err(BridgeError::Setup(_)) => ctx.has_begun(),
            Err(BridgeError::Source(error)) => error.is_about_the_table() && ctx.has_begun(),
            Ok(_) | Err(_) => false,
        };
        let (fingerprint, catalog) = match seen {
            Err(_) if stops_that_table_alone => (0, CatalogMark { shape: 0, storage: 0 }),
            seen => seen?,
        };
        let template = spec.key.to_string();
        tables.push(ConfiguredTable { name: spec.name.clone(), template, fingerprint, catalog });
    }
    Ok(Described { tables, booleans })
}

fn describe_table(
    ctx: &Context,
    spec: &TableSpec,
    catalog: Option<CatalogTable>,
    booleans: &HashSet<Oid>,
) -> Result<(u64, CatalogMark), BridgeError> {
    let Some(catalog) = catalog else {
        return Err(BridgeError::Setup(format!(
            "table {} (tables.name = {:?}) does not exist in this database: create it, or correct `table`",
            spec.table, spec.name
        )));
    };
    if let Some(left_out) = catalog.left_out(&ctx.config.postgres.publication) {
        ctx.said.left_out(&spec.name, &left_out);
    }
    let setup = |error: mapping::MappingError| BridgeError::Setup(error.knowing(&catalog.generated).to_string());
    mapping::check_identity(spec, catalog.identity, &catalog.identity_columns, &catalog.relation()).map_err(setup)?;
    let mapping = Mapping::bind(spec, &catalog.relation(), booleans).map_err(setup)?;
    Ok((mapping.fingerprint, catalog.mark()))
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
            let create = Sql::CreatePublication { publication: name, tables: &tables };
            return Err(BridgeError::Setup(format!(
                "publication {name} does not exist: set postgres.create = true, or {create}"
            )));
        }
        slot::create_publication(&client.client, name, &tables).await?;
        tracing::info!(publication = name, "publication created");
        return Ok(Published { created: true, added: Vec::new() });
    };
    catalog::publishes_everything(&publication)?;
    let mut added = Vec::new();
    for spec in ctx.specs.iter().filter(|s| !publication.covers(&s.table)) {
        let ours = found.is_some_and(|c| c.made(name)) && settings.create == Create::WhereMissing;
        if !ours && ctx.has_begun() {
            added.push((spec.name.clone(), Reason::ordinary("it is missing from the publication")));
            continue;
        }
        if !ours {
            let add = Sql::AddTable { publication: name, table: &spec.table };
            return Err(BridgeError::Setup(format!("table {} is not in publication {name}: {add}", spec.table)));
        }
        match slot::add_table(&client.client, name, &spec.table).await {
            // It was dropped: the loader says so.
            Err(error) if error.is_about_the_table() && ctx.has_begun() => {}
            done => done?,
        }
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
        "{because}, and postgres.create is false: set postgres.create = true, or {}",
        Sql::CreateSlot { slot }
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

/// Makes the slot: as a temporary one first, which gets the name when every snapshot sees what it leaves out. Returns its
/// position.
async fn create_slot(
    ctx: &Context,
    client: &PostgresClient,
    reads: &PostgresClient,
    replication: &mut ReplicationConnection,
) -> Result<EndLsn, BridgeError> {
    let settings = &ctx.config.postgres;
    if settings.failover {
        new_slot::require_failover_slots(replication).await?;
    }
    let temporary = create_temporary(ctx, client, replication).await?;
    let left_out = new_slot::exported_snapshot(&reads.client, &temporary.snapshot_name).await?;
    until_seen(ctx, reads, &left_out).await?;
    Ok(new_slot::name_slot(&client.client, replication, &temporary, &settings.slot).await?)
}

/// Makes the temporary slot, and says what it waits for: every transaction that was running has to end first.
async fn create_temporary(
    ctx: &Context,
    client: &PostgresClient,
    replication: &mut ReplicationConnection,
) -> Result<TemporarySlot, BridgeError> {
    let pid = replication.backend_pid();
    let create = new_slot::create_temporary(replication, &ctx.config.postgres.slot);
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
                    ctx.set_state(State::Connecting, Some(waiting.clone()));
                    said = waiting;
                }
            }
        }
    }
}

/// Waits until a slot that leaves this out may get its name.
async fn until_seen(ctx: &Context, client: &PostgresClient, left_out: &str) -> Result<(), BridgeError> {
    let parse =
        |text: &str| text.parse::<Snapshot>().map_err(|_| BridgeError::Internal("postgres sent a malformed snapshot"));
    let left_out = parse(left_out)?;
    loop {
        let sample = snapshot::sample(&client.client, &ctx.config.postgres.slot).await?;
        if takeover::may_be_named(&left_out, &parse(&sample.snapshot)?) {
            return Ok(());
        }
        let waiting = "waits until what committed before the slot was made is visible (synchronous replication?)";
        ctx.set_state(State::Connecting, Some(waiting.to_owned()));
        tokio::time::sleep(VISIBILITY_INTERVAL).await;
    }
}

async fn write(ctx: &Context, writer: &mut Writer, checkpoint: &Checkpoint) -> Result<u64, BridgeError> {
    let entries = Batch::of_entries(&ctx.own, writer.limits(), checkpoint.entries()).map_err(SinkError::from)?;
    Ok(writer.execute(&entries, &checkpoint.to_json()).await?.redis_time_ms)
}

/// The name under which the daemon's connections show up in Postgres.
pub fn application_name(slot: &str) -> String {
    format!("prefetchd_{slot}")
}

/// The prefix of everything that is prefetchd's own in Redis.
pub fn own_prefix(slot: &str) -> String {
    format!("prefetchd:{{{slot}}}:")
}
