//! `prefetchd check`: whether the daemon could work with this configuration and these servers, one line a finding.
//!
//! It looks with the daemon's own eyes (the same connections, queries and rules) and changes nothing, so it may be run
//! beside a running daemon. Where a server is not reachable what depends on it stays unsaid.

use super::{EX_CONFIG, Failure, print, printable, runtime};
use crate::bridge::bootstrap::{application_name, own_prefix};
use crate::checkpoint::{Checkpoint, SlotState};
use crate::config::{Config, Create};
use crate::error::Disposition;
use crate::plan::mapping::{self, Mapping};
use crate::sink::SinkError;
use crate::sink::batch::OwnKeys;
use crate::sink::reader::Reader;
use crate::sink::writer::{Server, Writer};
use crate::source::SourceError;
use crate::source::connect::{self, PostgresClient};
use crate::source::slot::{self, Identity, Publication, ServerFacts};
use crate::source::snapshot::{self, CatalogTable, Sizes};
use crate::source::wire::ReplicationConnection;
use std::path::Path;

const OLDEST_POSTGRES: u32 = 140_000;
/// From this version on a slot can be a failover slot.
const FAILOVER_SINCE: u32 = 170_000;
/// Pages of SCAN in which keys of somebody else are looked for: a look, not a count.
const PAGES_LOOKED_AT: usize = 200;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Level {
    Ok,
    Warn,
    Fail,
    /// Shown as `fail`; waiting may help.
    Unreachable,
}

/// What was found so far. A line is printed as soon as it is known.
#[derive(Debug, Default)]
struct Findings {
    failed: usize,
    unreachable: usize,
}

impl Findings {
    fn say(&mut self, level: Level, text: &str) -> Result<(), Failure> {
        let word = match level {
            Level::Ok => "ok  ",
            Level::Warn => "warn",
            Level::Fail | Level::Unreachable => "fail",
        };
        match level {
            Level::Ok | Level::Warn => {}
            Level::Fail => self.failed += 1,
            Level::Unreachable => self.unreachable += 1,
        }
        print(&format!("{word}  {}\n", printable(text)))
    }

    fn ok(&mut self, text: impl AsRef<str>) -> Result<(), Failure> {
        self.say(Level::Ok, text.as_ref())
    }

    fn warn(&mut self, text: impl AsRef<str>) -> Result<(), Failure> {
        self.say(Level::Warn, text.as_ref())
    }

    fn fail(&mut self, text: impl AsRef<str>) -> Result<(), Failure> {
        self.say(Level::Fail, text.as_ref())
    }

    /// `None` where it was an error, which is said.
    fn of_postgres<T>(&mut self, result: Result<T, SourceError>) -> Result<Option<T>, Failure> {
        match result {
            Ok(value) => Ok(Some(value)),
            Err(error) => {
                self.say(level(error.disposition()), &format!("postgres: {error}"))?;
                Ok(None)
            }
        }
    }

    fn end(&self) -> Result<(), Failure> {
        match (self.failed, self.unreachable) {
            (0, 0) => Ok(()),
            (0, _) => Err(Failure { code: 1, message: None }),
            _ => Err(Failure { code: EX_CONFIG, message: None }),
        }
    }
}

fn level(disposition: Disposition) -> Level {
    match disposition {
        Disposition::Stop => Level::Fail,
        Disposition::Retry | Disposition::Reload => Level::Unreachable,
    }
}

pub(super) fn run(file: Option<&Path>) -> Result<(), Failure> {
    let mut findings = Findings::default();
    let config = match Config::load(file) {
        Ok(config) => config,
        Err(error) => {
            // With its line breaks: it may show how a file begins.
            print(&format!("fail  configuration: {error}\n"))?;
            return Err(Failure { code: EX_CONFIG, message: None });
        }
    };
    let names: Vec<&str> = config.tables.iter().map(|t| t.name.as_str()).collect();
    findings.ok(format!("configuration: reads well, tables {}", names.join(", ")))?;
    for warning in &config.warnings {
        findings.warn(format!("configuration: {warning}"))?;
    }
    listen(&config, &mut findings)?;
    let runtime = runtime()?;
    runtime.block_on(async {
        let checkpoint = redis(&config, &mut findings).await?;
        postgres(&config, checkpoint.as_ref(), &mut findings).await
    })?;
    findings.end()
}

fn listen(config: &Config, findings: &mut Findings) -> Result<(), Failure> {
    let listen = config.http.listen;
    if listen.ip().is_loopback() {
        return findings.ok(format!("http: listens on {listen}, for this machine alone"));
    }
    let admin = match config.http.admin_token {
        Some(_) => "",
        None => ", and admin operations are refused: set http.admin_token_file",
    };
    findings.warn(format!(
        "http: {listen} can be reached from other machines, and reads need no token{admin}: \
         put a proxy or firewall in front, or listen on 127.0.0.1"
    ))
}

async fn redis(config: &Config, findings: &mut Findings) -> Result<Option<Checkpoint>, Failure> {
    let target = &config.redis.target;
    let own = OwnKeys::under(&own_prefix(&config.postgres.slot));
    let (writer, armed) = match Writer::connect(target, &own).await {
        Ok(connected) => connected,
        Err(error) => {
            let level = match &error {
                // Waiting does not make it a master, unless a failover is under way.
                SinkError::Replica { .. } => Level::Fail,
                other => level(other.disposition()),
            };
            findings.say(level, &format!("redis: {error}"))?;
            return Ok(None);
        }
    };
    let version = writer.server().version.as_deref().unwrap_or("of unknown version");
    findings.ok(format!("redis: {target} answers, {version}"))?;
    for lost in writer.lost() {
        findings.warn(format!("redis: {lost}"))?;
    }
    memory(writer.server(), findings)?;
    match armed.checkpoint.as_deref().map(Checkpoint::from_json) {
        Some(Ok(checkpoint)) => {
            let (lsn, epoch) = (checkpoint.lsn, checkpoint.epoch);
            findings.ok(format!("redis: a checkpoint of slot {} at {lsn}, epoch {epoch}", config.postgres.slot))?;
            Ok(Some(checkpoint))
        }
        Some(Err(error)) => {
            findings.warn(format!("redis: {error}: every table will be loaded again"))?;
            Ok(None)
        }
        None => {
            findings.ok("redis: no checkpoint yet: the first start loads every table")?;
            foreign_keys(config, &own, findings).await?;
            Ok(None)
        }
    }
}

/// A cache that forgets by itself cannot tell a row that is not there from one that was evicted.
fn memory(server: &Server, findings: &mut Findings) -> Result<(), Failure> {
    match (server.maxmemory_bytes, server.maxmemory_policy.as_deref()) {
        (Some(0), _) => findings.ok("redis: no maxmemory, so nothing is evicted")?,
        (Some(limit), Some("noeviction")) => {
            let used = server.used_memory_bytes.unwrap_or_default();
            let text = format!("{} of maxmemory {} used, noeviction", size(used), size(limit));
            findings.ok(format!("redis: {text}"))?;
        }
        (Some(limit), Some(policy)) => findings.fail(format!(
            "redis: with maxmemory {} and {policy} it removes keys of rows: CONFIG SET maxmemory-policy noeviction",
            size(limit)
        ))?,
        (Some(_), None) | (None, _) => {
            findings.warn("redis: it does not tell its maxmemory and policy: make sure that it is noeviction")?;
        }
    }
    match server.evicted_keys {
        Some(evicted) if evicted > 0 => {
            findings.warn(format!("redis: it has evicted {evicted} keys since its start: give it more memory"))
        }
        _ => Ok(()),
    }
}

/// What lies under a table's prefix before the first start goes as an orphan: worth a word while it is there.
async fn foreign_keys(config: &Config, own: &OwnKeys, findings: &mut Findings) -> Result<(), Failure> {
    let reader = Reader::connect_lazy(&config.redis.target, own.checkpoint());
    for table in &config.tables {
        let (mut cursor, mut found) = (0, 0);
        for _ in 0..PAGES_LOOKED_AT {
            match reader.scan_page(table.key.literal.as_bytes(), cursor).await {
                Ok((next, keys)) => (cursor, found) = (next, found + keys.len()),
                Err(error) => return findings.say(level(error.disposition()), &format!("redis: {error}")),
            }
            if cursor == 0 {
                break;
            }
        }
        if found > 0 {
            findings.warn(format!(
                "redis: {found} keys or more lie under {:?} already, and those that are no rows of {} will be removed: \
                 choose another literal for `key` if somebody needs them",
                table.key.literal, table.table
            ))?;
        }
    }
    Ok(())
}

async fn postgres(config: &Config, found: Option<&Checkpoint>, findings: &mut Findings) -> Result<(), Failure> {
    let target = &config.postgres.target;
    let name = application_name(&config.postgres.slot);
    let Some(client) = findings.of_postgres(connect::connect(target, &name).await)? else { return Ok(()) };
    let Some(facts) = findings.of_postgres(slot::server_facts(&client).await)? else { return Ok(()) };
    server(config, &facts, &name, findings)?;
    let slot = findings.of_postgres(slot::slot_state(&client, &config.postgres.slot).await)?;
    // A walsender is taken for a moment; the daemon's own may be the last.
    let held = matches!(slot, Some(SlotState::Ready { active_pid: Some(_), .. }));
    if facts.free_walsenders == 0 {
        let text = "postgres: no replication connection is free: raise max_wal_senders, or end another";
        findings.say(if held { Level::Warn } else { Level::Fail }, text)?;
    } else if let Some(identity) = identify(config, &name, findings).await? {
        same_server(&identity, found, findings)?;
    }
    if let Some(slot) = slot {
        slot_found(config, &facts, &slot, findings)?;
    }
    let publication = slot::publication(&client, &config.postgres.publication).await;
    let Some(publication) = findings.of_postgres(publication)? else { return Ok(()) };
    publication_found(config, &client, publication.as_ref(), findings).await?;
    let ours = found.is_some_and(|checkpoint| checkpoint.made_publication);
    tables(config, &client, publication.as_ref(), ours, findings).await
}

fn server(config: &Config, facts: &ServerFacts, name: &str, findings: &mut Findings) -> Result<(), Failure> {
    let major = facts.version_num / 10_000;
    let at = config.postgres.target.describe();
    if facts.version_num < OLDEST_POSTGRES {
        findings.fail(format!("postgres: {at} is version {major}: prefetchd needs 14 or newer"))?;
    } else {
        findings.ok(format!("postgres: {at} answers, {major}.{}", facts.version_num % 10_000))?;
    }
    if facts.in_recovery {
        findings.fail("postgres: it is a standby in recovery: point postgres.url at the primary")?;
    }
    match facts.wal_level.as_str() {
        "logical" => findings.ok("postgres: wal_level = logical")?,
        other => findings.fail(format!(
            "postgres: wal_level = {other}: ALTER SYSTEM SET wal_level = logical, then restart postgres"
        ))?,
    }
    if facts.names_as_synchronous_standby(name) {
        findings.fail(format!(
            "postgres: synchronous_standby_names = {:?} makes prefetchd a synchronous standby, for which commits wait: \
             name your standbys there",
            facts.synchronous_standby_names
        ))?;
    }
    if facts.encoding == "SQL_ASCII" {
        findings
            .warn("postgres: the database is SQL_ASCII: values reach Redis in whatever encoding they were written")?;
    }
    if config.postgres.failover && facts.version_num < FAILOVER_SINCE {
        findings.fail(format!(
            "postgres: {major} has no failover slots: set postgres.failover = false, or upgrade to 17"
        ))?;
    }
    match facts.slot_limit_bytes {
        Some(limit) => findings
            .ok(format!("postgres: keeps up to {} of WAL for a slot that nobody reads, then gives it up", size(limit))),
        None => findings.warn(
            "postgres: keeps WAL without limit for a slot that nobody reads, until the disk is full: \
             ALTER SYSTEM SET max_slot_wal_keep_size = '50GB' (what the disk can spare)",
        ),
    }
}

/// On a connection as the stream has it: pg_hba.conf and the role's REPLICATION decide about it.
async fn identify(config: &Config, name: &str, findings: &mut Findings) -> Result<Option<Identity>, Failure> {
    let connected = ReplicationConnection::connect(&config.postgres.target, name).await;
    let Some(mut replication) = findings.of_postgres(connected)? else { return Ok(None) };
    let identity = findings.of_postgres(slot::identify(&mut replication).await)?;
    if let Some(identity) = &identity {
        findings.ok(format!("postgres: lets the role replicate, system {}", identity.system_id))?;
    }
    Ok(identity)
}

fn same_server(identity: &Identity, found: Option<&Checkpoint>, findings: &mut Findings) -> Result<(), Failure> {
    match found {
        Some(c) if (&c.system_id, &c.database) != (&identity.system_id, &identity.database) => findings.fail(format!(
            "the checkpoint in redis is of database {} of system {}, and this is {} of {}: \
             correct postgres.url or redis.url, or load from here with prefetchd run --adopt",
            c.database, c.system_id, identity.database, identity.system_id
        )),
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
            findings.warn(format!("slot {name}: lost, {reason}: the next start makes a new one and loads every table"))
        }
        (SlotState::Invalidated { reason }, Create::Never) => findings
            .fail(format!("slot {name}: lost, {reason}: SELECT pg_drop_replication_slot('{name}'), and make it anew")),
        (SlotState::Absent, Create::Never) => findings.fail(format!(
            "slot {name}: missing: SELECT pg_create_logical_replication_slot('{name}', 'pgoutput'), \
             or set postgres.create = true"
        )),
        (SlotState::Absent, Create::WhereMissing) if facts.free_slots == 0 => findings.fail(format!(
            "slot {name}: missing, and there is no room for it: raise max_replication_slots, or drop a slot that \
             nobody reads"
        )),
        (SlotState::Absent, Create::WhereMissing) => findings.ok(format!("slot {name}: the first start makes it")),
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
        let list = config.tables.iter().map(|t| t.table.to_string()).collect::<Vec<_>>().join(", ");
        let remedy = format!("CREATE PUBLICATION {name} FOR TABLE {list} WITH (publish_via_partition_root = true)");
        if config.postgres.create == Create::Never {
            return findings.fail(format!("publication {name}: missing: {remedy}, or set postgres.create = true"));
        }
        let sql = "SELECT has_database_privilege(current_database(), 'CREATE')";
        let may = client.query_one(sql, &[]).await.and_then(|row| row.try_get::<_, bool>(0)).unwrap_or(true);
        return match may {
            true => findings.ok(format!("publication {name}: the first start makes it")),
            false => findings.fail(format!(
                "publication {name}: missing, and the role may not make it (CREATE on the database): {remedy} as the \
                 owner of the tables"
            )),
        };
    };
    match publication.lacking_operations() {
        [] => findings.ok(format!("publication {name}: publishes every operation")),
        lacking => findings.fail(format!(
            "publication {name}: leaves out {}: ALTER PUBLICATION {name} SET (publish = 'insert, update, delete, truncate')",
            lacking.join(", ")
        )),
    }
}

async fn tables(
    config: &Config,
    client: &PostgresClient,
    publication: Option<&Publication>,
    ours: bool,
    findings: &mut Findings,
) -> Result<(), Failure> {
    let Some(booleans) = findings.of_postgres(snapshot::boolean_types(client).await)? else { return Ok(()) };
    for spec in &config.tables {
        let name = &spec.name;
        let described = snapshot::describe(client, &spec.table, &config.postgres.publication, Sizes::Measured).await;
        let Some(described) = findings.of_postgres(described)? else { continue };
        let Some(table) = described else {
            findings.fail(format!(
                "table {name}: {} does not exist in this database: create it, or correct `table`",
                spec.table
            ))?;
            continue;
        };
        let identified = mapping::check_identity(spec, table.identity, &table.identity_columns);
        let bound = identified.and_then(|()| Mapping::bind(spec, &table.relation(), &booleans));
        if let Err(error) = bound {
            findings.fail(format!("table {name}: {error}"))?;
            continue;
        }
        if published(config, client, publication, ours, spec.name.as_str(), &table, findings).await? {
            let filter = if table.row_filter.is_some() { ", of which the publication sends some" } else { "" };
            let bytes = size(table.estimated_bytes);
            findings.ok(format!("table {name}: {}, {bytes} on disk{filter}, as {}", spec.table, spec.key))?;
        }
    }
    Ok(())
}

/// Whether the publication sends the table, or will; if not, it is said.
async fn published(
    config: &Config,
    client: &PostgresClient,
    publication: Option<&Publication>,
    ours: bool,
    name: &str,
    table: &CatalogTable,
    findings: &mut Findings,
) -> Result<bool, Failure> {
    let publication_name = &config.postgres.publication;
    if publication.is_some_and(|publication| publication.covers(&table.name)) {
        return Ok(true);
    }
    let add = format!("ALTER PUBLICATION {publication_name} ADD TABLE {}", table.name);
    let made = config.postgres.create == Create::WhereMissing && (publication.is_none() || ours);
    if !made {
        // A publication that is missing altogether has been said.
        if publication.is_some() {
            findings.fail(format!("table {name}: {} is not in publication {publication_name}: {add}", table.name))?;
        }
        return Ok(publication.is_none());
    }
    let sql = "SELECT pg_has_role(relowner, 'USAGE') FROM pg_class WHERE oid = $1";
    let owns = client.query_opt(sql, &[&table.oid]).await.ok().flatten().and_then(|row| row.try_get(0).ok());
    if owns == Some(false) {
        findings.fail(format!(
            "table {name}: {} is not published, and only its owner may do that: \
             create publication {publication_name} or add the table as the owner",
            table.name
        ))?;
        return Ok(false);
    }
    Ok(true)
}

fn size(bytes: u64) -> String {
    bytesize::ByteSize::b(bytes).display().si().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(findings: &[Level]) -> Option<u8> {
        let mut all = Findings::default();
        for level in findings {
            all.say(*level, "a finding").expect("stdout is there");
        }
        all.end().err().map(|failure| failure.code)
    }

    #[test]
    fn what_a_person_must_mend_comes_before_what_may_pass() {
        for (findings, code) in [
            (&[][..], None),
            (&[Level::Ok, Level::Warn], None),
            (&[Level::Ok, Level::Unreachable], Some(1)),
            (&[Level::Fail, Level::Ok], Some(78)),
            (&[Level::Fail, Level::Unreachable], Some(78)),
        ] {
            assert_eq!(after(findings), code, "{findings:?}");
        }
    }

    #[test]
    fn eviction_is_a_failure_only_where_it_can_happen() {
        for (maxmemory, policy, failed) in [
            (Some(0), Some("allkeys-lru"), 0),
            (Some(1 << 20), Some("noeviction"), 0),
            (Some(1 << 20), Some("allkeys-lru"), 1),
            (Some(1 << 20), Some("volatile-ttl"), 1),
            (None, None, 0),
        ] {
            let server =
                Server { maxmemory_bytes: maxmemory, maxmemory_policy: policy.map(str::to_owned), ..Server::default() };
            let mut findings = Findings::default();
            memory(&server, &mut findings).expect("stdout is there");
            assert_eq!(findings.failed, failed, "{maxmemory:?} {policy:?}");
        }
    }
}
