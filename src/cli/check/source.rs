//! The findings about Postgres, and about Postgres and Redis together.

use super::sink::Seen;
use super::{Clock, Failure, Findings, Level, clocks, level, size};
use crate::bridge::context::application_name;
use crate::bridge::{lookup_columns, room};
use crate::checkpoint::{Checkpoint, SlotState};
use crate::code::Code;
use crate::config::{Config, Create};
use crate::format::Format;
use crate::loader::range::Sizes;
use crate::plan::mapping::{self, Mapping};
use crate::remedy::{Conninfo, Sql, Toml};
use crate::schema::TableSpec;
use crate::source::connect::{self, PostgresClient};
use crate::source::limits::{self, ConnectionLimits, Limit, Opens};
use crate::source::roles::Roles;
use crate::source::slot::{self, Identity, Publication, ServerFacts};
use crate::source::snapshot::{self, CatalogTable};
use crate::source::survey::{self, WalSample};
use crate::source::wire::ReplicationConnection;
use std::time::{Duration, Instant};

const OLDEST_POSTGRES: u32 = 140_000;
/// The first version in which a slot can be a failover slot.
const FAILOVER_SINCE: u32 = 170_000;
/// A slot to create, and the temporary slot that it is copied from.
const SLOTS_TO_MAKE_ONE: u64 = 2;
/// The time between two samples of what changes: the WAL position, and transactions that may have ended.
const A_MOMENT: Duration = Duration::from_secs(1);
/// The outage that a slot should survive.
const OUTAGE: Duration = Duration::from_secs(60 * 60);
/// Longer times are not calculated.
const LONG: Duration = Duration::from_secs(30 * 24 * 60 * 60);
/// The share from which on little space is left.
const NEARLY_FULL: f64 = 0.8;

pub(super) async fn look(config: &Config, redis: Option<&Seen>, findings: &mut Findings) -> Result<(), Failure> {
    let target = &config.postgres.target;
    let found = redis.and_then(|redis| redis.checkpoint.as_ref());
    let name = application_name(&config.postgres.slot);
    let reader = config.postgres.reader.as_ref();
    let Some(roles) = findings.of_postgres(Roles::connect(target, reader, &name).await)? else { return Ok(()) };
    let (client, reads) = (roles.replicates(), roles.reads());
    let Some(facts) = findings.of_postgres(slot::server_facts(client).await)? else { return Ok(()) };
    server(config, &facts, &name, findings)?;
    if findings.of_postgres(survey::is_superuser(client).await)? == Some(true) {
        findings.warn(Code::PostgresSuperuser, format!(
            "postgres: role {} is a superuser, whose password gives access to the whole server: use a role with the rights of \
             migrations/002_role.sql",
            config.postgres.target.user
        ))?;
    }
    if let Some(reader) = reader {
        reader_found(&reader.user, reads, findings).await?;
    }
    let opens = match reader {
        None => &[(client, Opens::Everything)][..],
        Some(_) => &[(client, Opens::Replication), (reads, Opens::Reading)],
    };
    let mut enough = true;
    for (client, opens) in opens {
        let limits = limits::connection_limits(client, &name, *opens).await;
        enough &= match findings.of_postgres(limits)? {
            Some(limits) => connections(&limits, findings)?,
            None => false,
        };
    }
    if enough {
        findings.ok("postgres: has enough free connections for a daemon")?;
    }
    findings.of_postgres(snapshot::may_emit_marks(reads).await)?;
    let wal = match facts.in_recovery {
        true => None,
        false => findings.of_postgres(survey::wal(client).await)?.map(|sample| (sample, Instant::now())),
    };
    socket(config, client, &name, findings).await?;
    let slot = findings.of_postgres(slot::slot_state(client, &config.postgres.slot).await)?;
    // The test occupies a walsender for a moment. The daemon's own may be the last one available.
    let held = matches!(slot, Some(SlotState::Ready { active_pid: Some(_), .. }));
    if facts.free_walsenders == 0 {
        let text = "postgres: no replication connection is free: raise max_wal_senders, or end another one";
        findings.problem(if held { Level::Warn } else { Level::Fail }, Code::WalSenders, text)?;
    } else if let Some(identity) = identify(config, &name, findings).await? {
        same_server(&identity, found, findings)?;
    }
    let publication = slot::publication(client, &config.postgres.publication).await;
    let publication = findings.of_postgres(publication)?;
    if let Some(slot) = slot {
        slot_found(config, &facts, &slot, findings)?;
        match slot {
            SlotState::Ready { active_pid: None, .. } if matches!(publication, Some(Some(_))) => {
                publication_age(config, client, findings).await?;
            }
            SlotState::Ready { .. } => {}
            SlotState::Absent | SlotState::Invalidated { .. } => in_the_way(config, client, findings).await?,
        }
    }
    if let Some(publication) = publication {
        publication_found(config, client, publication.as_ref(), findings).await?;
        let ours = found.is_some_and(|checkpoint| checkpoint.made(&config.postgres.publication));
        tables(config, &roles, publication.as_ref(), ours, findings).await?;
    }
    if let Some(redis) = redis {
        working_set(config, reads, redis, findings).await?;
    }
    if let Some(before) = wal {
        retention(client, &facts, before, findings).await?;
    }
    let ask = async { survey::time_ms(client).await.map(Some) };
    let clock = findings.of_postgres(Clock::ask(ask).await)?.flatten();
    clocks(clock, redis.and_then(|redis| redis.clock), findings)
}

fn server(config: &Config, facts: &ServerFacts, name: &str, findings: &mut Findings) -> Result<(), Failure> {
    let major = facts.version_num / 10_000;
    let at = config.postgres.target.describe();
    if facts.version_num < OLDEST_POSTGRES {
        findings
            .fail(Code::PostgresVersion, format!("postgres: {at} is version {major}: prefetchd needs 14 or newer"))?;
    } else {
        findings.ok(format!("postgres: {at} answers, {major}.{}", facts.version_num % 10_000))?;
    }
    if facts.in_recovery {
        let text = "postgres: it is a standby in recovery: point postgres.url at the primary";
        findings.fail(Code::PostgresStandby, text)?;
    }
    match facts.wal_level.as_str() {
        "logical" => findings.ok("postgres: wal_level = logical")?,
        level if facts.can_decode() => {
            let effective = facts.effective_wal_level.as_deref().unwrap_or_default();
            findings.ok(format!(
                "postgres: wal_level = {level}, and effective_wal_level, now {effective}, is logical while there is a slot"
            ))?;
        }
        other => {
            let text = format!("postgres: wal_level = {other}: {} then restart postgres", Sql::WalLevelLogical);
            findings.fail(Code::WalLevel, text)?;
        }
    }
    if facts.names_as_synchronous_standby(name) {
        findings.fail(Code::SynchronousStandby, format!(
            "postgres: synchronous_standby_names = {:?} makes prefetchd a synchronous standby, for which commits wait: \
             name your standbys there",
            facts.synchronous_standby_names
        ))?;
    }
    if facts.encoding == "SQL_ASCII" {
        findings.warn(
            Code::SqlAscii,
            "postgres: the database is SQL_ASCII: values reach Redis in the encoding in which they were written",
        )?;
    }
    if config.postgres.failover && facts.version_num < FAILOVER_SINCE {
        findings.fail(
            Code::FailoverSlots,
            format!("postgres: {major} has no failover slots: set postgres.failover = false, or upgrade to 17"),
        )?;
    }
    Ok(())
}

/// Checks the role that only reads.
async fn reader_found(role: &str, reads: &PostgresClient, findings: &mut Findings) -> Result<(), Failure> {
    match findings.of_postgres(slot::may_replicate(reads).await)? {
        Some(true) => findings.warn(Code::ReaderReplicates, format!(
            "postgres: role {role} of postgres.reader_url may replicate: functions that table owners attach to their tables can \
             run as this role: {}",
            Sql::NoReplication { role }
        )),
        Some(false) => findings.ok(format!("postgres: role {role} may read, but not replicate")),
        None => Ok(()),
    }
}

/// Returns whether a daemon can open the connections that it needs, and prints a problem otherwise. Connections of a
/// running daemon count as available.
fn connections(limits: &ConnectionLimits, findings: &mut Findings) -> Result<bool, Failure> {
    let mut enough = true;
    // Walsenders are reported where one is tried.
    for limit in limits.0.iter().filter(|limit| limit.limit != Limit::WalSenders) {
        let (fact, remedy, left) = (limit.fact(), limit.remedy(), limit.left_for_us());
        let (least, wanted) = (limit.least, limit.wanted);
        if left < least {
            enough = false;
            findings.fail(
                Code::PostgresConnections,
                format!("postgres: {fact}, and prefetchd needs {least} of them, {wanted} to load fast: {remedy}"),
            )?;
        } else if left < wanted {
            enough = false;
            findings.warn(
                Code::PostgresConnections,
                format!(
                    "postgres: {fact}, and prefetchd opens up to {wanted}: with fewer, it loads more slowly: {remedy}"
                ),
            )?;
        }
    }
    Ok(enough)
}

/// Suggests the Unix socket of a local server, which saves a walsender much of its work.
async fn socket(config: &Config, client: &PostgresClient, name: &str, findings: &mut Findings) -> Result<(), Failure> {
    let target = &config.postgres.target;
    let Some(port) = target.loopback_port() else { return Ok(()) };
    let Some(started) = findings.of_postgres(survey::started_at(client).await)? else { return Ok(()) };
    let Some(directories) = findings.of_postgres(survey::socket_directories(client).await)? else { return Ok(()) };
    for directory in directories.iter().filter(|directory| directory.join(format!(".s.PGSQL.{port}")).exists()) {
        let through = target.through_socket(directory, port);
        let Ok(other) = connect::connect(&through, name).await else { continue };
        if survey::started_at(&other).await.is_ok_and(|other| other == started) {
            let (directory, port) = (directory.to_string_lossy(), port.to_string());
            let pairs = [("host", &*directory), ("port", &port), ("user", &target.user), ("dbname", &target.database)];
            let url = Conninfo(&pairs).to_string();
            return findings.warn(Code::PostgresSocket, format!(
                "postgres: reached over TCP, although it has a socket on this machine: changes arrive twice as fast with postgres.url = {}",
                Toml(&url)
            ));
        }
    }
    Ok(())
}

/// Warns about long transactions, which delay the creation of a slot.
async fn in_the_way(config: &Config, client: &PostgresClient, findings: &mut Findings) -> Result<(), Failure> {
    if config.postgres.create == Create::Never {
        return Ok(());
    }
    let Some(mut open) = findings.of_postgres(survey::open_transactions(client).await)? else { return Ok(()) };
    if open.is_empty() {
        return Ok(());
    }
    tokio::time::sleep(A_MOMENT).await;
    let Some(later) = findings.of_postgres(survey::open_transactions(client).await)? else { return Ok(()) };
    open.retain(|one| later.iter().any(|other| other.xid == one.xid));
    if open.is_empty() {
        return Ok(());
    }
    let list = open.iter().map(|one| one.blocker.to_string()).collect::<Vec<_>>().join(", ");
    findings.warn(
        Code::SlotWaits,
        format!("slot {}: creating it will wait until these transactions have ended: {list}", config.postgres.slot),
    )
}

/// A slot decodes with the catalog as of its position, at which the publication must already exist.
async fn publication_age(config: &Config, client: &PostgresClient, findings: &mut Findings) -> Result<(), Failure> {
    let (slot, publication) = (&config.postgres.slot, &config.postgres.publication);
    let younger = survey::publication_is_younger(client, slot, publication).await;
    if findings.of_postgres(younger)?.flatten() != Some(true) {
        return Ok(());
    }
    let fact = format!(
        "slot {slot}: its position precedes the creation of publication {publication}, so it can never be read"
    );
    match config.postgres.create {
        Create::WhereMissing => {
            findings.warn(Code::SlotTooOld, format!("{fact}: the next start creates a new one and loads every table"))
        }
        Create::Never => findings.fail(Code::SlotTooOld, format!("{fact}: {}", Sql::RecreateSlot { slot })),
    }
}

/// Checks whether the rows fit into Redis.
async fn working_set(
    config: &Config,
    client: &PostgresClient,
    redis: &Seen,
    findings: &mut Findings,
) -> Result<(), Failure> {
    let needed = room::working_set(client, &config.tables, &config.postgres.publication).await;
    // No estimate, or no table that could be examined.
    let Some(needed) = findings.of_postgres(needed)?.filter(|needed| needed.rows > 0.0) else { return Ok(()) };
    let Some(limit) = redis.server.maxmemory_bytes.filter(|limit| *limit > 0) else {
        return findings.ok(format!("memory: {needed}"));
    };
    if let Some(why) = room::refusal(&needed, limit) {
        return findings.fail(Code::RedisTooSmall, format!("memory: {why}"));
    }
    // If there is a checkpoint, the memory used now is ours; otherwise it is somebody else's.
    let others = match &redis.checkpoint {
        Some(_) => 0,
        None => redis.server.used_memory_bytes.unwrap_or_default(),
    };
    let beside = if others > 0 { format!(", and {} are already in use", size(others)) } else { String::new() };
    let text = format!("memory: {needed}{beside}; redis has maxmemory {}", size(limit));
    match needed.bytes + others as f64 > limit as f64 * NEARLY_FULL {
        false => findings.ok(text),
        true => {
            let text = format!("{text}: raise it, or configure fewer tables or columns: a full redis stalls");
            findings.warn(Code::RedisTooSmall, text)
        }
    }
}

/// Checks how long prefetchd may be stopped before Postgres invalidates its slot.
async fn retention(
    client: &PostgresClient,
    facts: &ServerFacts,
    (before, at): (WalSample, Instant),
    findings: &mut Findings,
) -> Result<(), Failure> {
    let Some(limit) = facts.slot_limit_bytes else {
        return findings.warn(
            Code::WalUnlimited,
            format!(
                "postgres: keeps WAL without limit for a slot that is not read, until the disk is full: \
             {} (what the disk can spare)",
                Sql::SlotWalLimit(50 << 10)
            ),
        );
    };
    tokio::time::sleep(A_MOMENT.saturating_sub(at.elapsed())).await;
    let Some(now) = findings.of_postgres(survey::wal(client).await)? else { return Ok(()) };
    let grown = now.at.bytes_since(before.at);
    let rate = (grown as f64 / at.elapsed().as_secs_f64()).max(now.average_bytes_per_second.unwrap_or_default());
    let outage = Duration::try_from_secs_f64(limit as f64 / rate.max(f64::MIN_POSITIVE)).unwrap_or(LONG);
    let lasts = match outage >= LONG {
        true => "for more than 30 days".to_owned(),
        false => format!("for {}", humantime::format_duration(Duration::from_secs(outage.as_secs()))),
    };
    let text = format!(
        "postgres: keeps up to {} of WAL for a slot that is not read: prefetchd may be stopped {lasts} at {}/s",
        size(limit),
        size(rate as u64)
    );
    match outage < OUTAGE {
        false => findings.ok(text),
        true => {
            let megabytes = (rate * OUTAGE.as_secs_f64() / f64::from(1 << 20)).ceil();
            findings.warn(
                Code::WalLimitLow,
                format!(
                    "{text}, then every table is loaded again: enough for an hour would be: {}",
                    Sql::SlotWalLimit(megabytes as u64)
                ),
            )
        }
    }
}

/// Uses a replication connection, because pg_hba.conf and the role's REPLICATION attribute decide about those.
async fn identify(config: &Config, name: &str, findings: &mut Findings) -> Result<Option<Identity>, Failure> {
    let connected = ReplicationConnection::connect(&config.postgres.target, name).await;
    let Some(mut replication) = findings.of_postgres(connected)? else { return Ok(None) };
    let identity = findings.of_postgres(slot::identify(&mut replication).await)?;
    if let Some(identity) = &identity {
        findings.ok(format!("postgres: the role may replicate, system {}", identity.system_id))?;
    }
    Ok(identity)
}

fn same_server(identity: &Identity, found: Option<&Checkpoint>, findings: &mut Findings) -> Result<(), Failure> {
    match found {
        Some(c) if (&c.system_id, &c.database) != (&identity.system_id, &identity.database) => findings.fail(
            Code::OtherPostgres,
            format!(
                "the checkpoint in redis belongs to database {} of system {}, and this is {} of {}: \
             correct postgres.url or redis.url, or load from here with prefetchd run --adopt",
                c.database, c.system_id, identity.database, identity.system_id
            ),
        ),
        _ => Ok(()),
    }
}

fn slot_found(config: &Config, facts: &ServerFacts, slot: &SlotState, findings: &mut Findings) -> Result<(), Failure> {
    let name = &config.postgres.slot;
    match (slot, config.postgres.create) {
        (SlotState::Ready { active_pid: Some(pid), .. }, _) => {
            findings.ok(format!("slot {name}: in use by pid {pid}; a second daemon would stand by"))
        }
        (SlotState::Ready { confirmed, active_pid: None }, _) => {
            findings.ok(format!("slot {name}: ready, from {confirmed}"))
        }
        (SlotState::Invalidated { reason }, Create::WhereMissing) => {
            let text = format!("slot {name}: lost, {reason}: the next start creates a new one and loads every table");
            findings.warn(Code::SlotLost, text)
        }
        (SlotState::Invalidated { reason }, Create::Never) => {
            let text = format!("slot {name}: lost, {reason}: {}", Sql::RecreateSlot { slot: name });
            findings.fail(Code::SlotLost, text)
        }
        (SlotState::Absent, Create::Never) => {
            let remedy = Sql::CreateSlot { slot: name };
            let text = format!("slot {name}: missing: set postgres.create = true, or {remedy}");
            findings.fail(Code::SlotMissing, text)
        }
        (SlotState::Absent, Create::WhereMissing) if facts.free_slots < SLOTS_TO_MAKE_ONE => findings.fail(Code::SlotsExhausted, format!(
            "slot {name}: missing, and there are not enough free replication slots ({} free, and creating it takes \
             {SLOTS_TO_MAKE_ONE}, one of them for a moment): raise max_replication_slots, or drop a slot that is not read",
            facts.free_slots
        )),
        (SlotState::Absent, Create::WhereMissing) => findings.ok(format!("slot {name}: the first start creates it")),
    }
}

async fn publication_found(
    config: &Config,
    client: &PostgresClient,
    publication: Option<&Publication>,
    findings: &mut Findings,
) -> Result<(), Failure> {
    let name = &config.postgres.publication;
    let Some(publication) = publication else {
        let tables: Vec<_> = config.tables.iter().map(|t| t.table.clone()).collect();
        let remedy = Sql::CreatePublication { publication: name, tables: &tables };
        if config.postgres.create == Create::Never {
            let text = format!("publication {name}: missing: set postgres.create = true, or {remedy}");
            return findings.fail(Code::PublicationMissing, text);
        }
        return match slot::may_create_publication(client).await.unwrap_or(true) {
            true => findings.ok(format!("publication {name}: the first start creates it")),
            false => findings.fail(Code::PublicationMissing, format!(
                "publication {name}: missing, and the role may not create it (CREATE on the database): as the owner of the \
                 tables: {remedy}"
            )),
        };
    };
    match publication.lacking_operations() {
        [] => findings.ok(format!("publication {name}: publishes every operation")),
        lacking => findings.fail(
            Code::PublicationOperations,
            format!(
                "publication {name}: leaves out {}: {}",
                lacking.join(", "),
                Sql::PublishEverything { publication: name }
            ),
        ),
    }
}

async fn tables(
    config: &Config,
    roles: &Roles,
    publication: Option<&Publication>,
    ours: bool,
    findings: &mut Findings,
) -> Result<(), Failure> {
    let Some(booleans) = findings.of_postgres(snapshot::boolean_types(roles.reads()).await)? else { return Ok(()) };
    for spec in &config.tables {
        let described = snapshot::describe(
            roles.reads(),
            &spec.table,
            &config.postgres.publication,
            &spec.columns,
            Sizes::Measured,
        )
        .await;
        let table = match described {
            Ok(Some(table)) => table,
            Ok(None) => {
                let text = format!(
                    "{} does not exist in this database: if it has another name now, correct `table`, else create it",
                    spec.table
                );
                findings.of_table(Level::Fail, Code::TableMissing, spec, &text)?;
                continue;
            }
            Err(error) if error.is_about_the_query() => {
                findings.of_table(level(error.disposition()), error.code(), spec, &error.to_string())?;
                continue;
            }
            // The connection is of no use for the other tables either.
            Err(error) => return findings.of_postgres::<()>(Err(error)).map(drop),
        };
        let identified = mapping::check_identity(spec, table.identity, &table.identity_columns, &table.relation());
        let types = table.known_types(spec.format, &booleans);
        let bound = identified.and_then(|()| Mapping::bind(spec, &table.relation(), &types));
        let bound = bound.and_then(|_| lookup_columns::check(spec, &table));
        if let Err(error) = bound {
            let error = error.knowing(&table.generated);
            findings.of_table(Level::Fail, Code::of_mapping(&error), spec, &error.to_string())?;
            continue;
        }
        if let Some(left_out) = table.left_out(&config.postgres.publication) {
            findings.of_table(Level::Warn, Code::TableHeirs, spec, &left_out)?;
        }
        if published(config, roles.replicates(), publication, ours, spec, &table, findings).await? {
            let filter =
                if table.published.row_filter.is_some() { ", of which the publication sends some" } else { "" };
            let bytes = size(table.estimated.bytes);
            let as_json = match spec.format {
                Format::Hash => "",
                Format::Json => ", in JSON",
                Format::RedisJson => ", as a RedisJSON document",
            };
            let TableSpec { name, table, key, .. } = spec;
            findings.ok(format!("table {name}: {table}, {bytes} on disk{filter}, as {key}{as_json}"))?;
        }
    }
    Ok(())
}

/// Checks whether the publication includes the table, or will once it is created, and prints a problem otherwise.
async fn published(
    config: &Config,
    client: &PostgresClient,
    publication: Option<&Publication>,
    ours: bool,
    spec: &TableSpec,
    table: &CatalogTable,
    findings: &mut Findings,
) -> Result<bool, Failure> {
    let publication_name = &config.postgres.publication;
    if publication.is_some_and(|publication| publication.covers(&table.name)) {
        return Ok(true);
    }
    let tables = [table.name.clone()];
    let add = match publication {
        Some(_) => Sql::AddTable { publication: publication_name, table: &table.name },
        None => Sql::CreatePublication { publication: publication_name, tables: &tables },
    };
    let made = config.postgres.create == Create::WhereMissing && (publication.is_none() || ours);
    if !made {
        // A missing publication has already been reported.
        if publication.is_some() {
            let text = format!("{} is not in publication {publication_name}: {add}", table.name);
            findings.of_table(Level::Fail, Code::TableUnpublished, spec, &text)?;
        }
        return Ok(publication.is_none());
    }
    if !slot::may_publish(client, &table.name).await.unwrap_or(true) {
        let text = format!("{} is not published, and only its owner may do that: as the owner: {add}", table.name);
        findings.of_table(Level::Fail, Code::TableUnpublished, spec, &text)?;
        return Ok(false);
    }
    Ok(true)
}
