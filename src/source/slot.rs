//! What a stream requires: settings of the server, the publication, the replication slot.
//!
//! It must not decide whether a slot may be created or dropped. A mistake here uses a slot that has lost changes, or makes
//! commits wait for a daemon that is a synchronous standby without knowing it.
//!
//! Catalog columns that older servers lack are read through `to_jsonb`.
//!
//! <https://www.postgresql.org/docs/current/protocol-replication.html>
//! <https://www.postgresql.org/docs/current/view-pg-replication-slots.html>

use super::SourceError;
use super::answer::{Cells, act, look, quoted};
use super::wire::ReplicationConnection;
use crate::checkpoint::SlotState;
use crate::code::Code;
use crate::lsn::{EndLsn, Lsn};
use crate::remedy::Sql;
use crate::schema::QualifiedName;
use postgres_protocol::escape::escape_literal;
use std::collections::{BTreeSet, HashSet};
use std::time::Duration;
use tokio_postgres::{Client, SimpleQueryRow};

/// The output plugin that is built into Postgres.
pub(super) const PLUGIN: &str = "pgoutput";
/// How long altering a publication waits for a lock on a table.
const LOCK_TIMEOUT: Duration = Duration::from_secs(5);

/// The server's version, and the settings that decide whether it can be followed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerFacts {
    /// 150013 for 15.13.
    pub version_num: u32,
    /// It is a standby, or still in recovery.
    pub in_recovery: bool,
    pub wal_level: String,
    /// Since Postgres 19: `logical` as long as there is a logical slot, also where `wal_level` is `replica`.
    /// <https://www.postgresql.org/docs/devel/runtime-config-preset.html>
    pub effective_wal_level: Option<String>,
    /// As configured.
    pub synchronous_standby_names: String,
    pub wal_segment_bytes: u64,
    /// `max_slot_wal_keep_size`: a slot that retains more WAL is invalidated. `None` = no limit.
    pub slot_limit_bytes: Option<u64>,
    /// How many more slots can be created.
    pub free_slots: u64,
    /// How many more replication connections can be opened.
    pub free_walsenders: u64,
    /// `server_encoding`. With `SQL_ASCII`, values are sent as stored, in whatever encoding that is.
    pub encoding: String,
}

/// The answer to IDENTIFY_SYSTEM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Of the cluster: the same on its standbys.
    pub system_id: String,
    pub timeline: u32,
    pub database: String,
    /// WAL is flushed up to here.
    pub flushed: EndLsn,
}

/// An ancestor of the server's timeline.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EarlierTimeline {
    pub timeline: u32,
    /// What lies beyond it on that timeline is not part of the server's history.
    pub end: Lsn,
}

/// What a publication sends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Publication {
    pub name: String,
    /// FOR ALL TABLES, future ones included.
    pub all_tables: bool,
    /// Partitions are published under the name of the partitioned table.
    pub via_partition_root: bool,
    lacking: Vec<&'static str>,
    /// Under the names by which they are published, however they were added.
    tables: HashSet<QualifiedName>,
}

impl ServerFacts {
    /// Whether the WAL has what a logical slot needs, or will have it from the first such slot on.
    pub fn can_decode(&self) -> bool {
        match self.wal_level.as_str() {
            "logical" => true,
            "replica" => self.effective_wal_level.is_some(),
            _ => false,
        }
    }

    /// Whether `synchronous_standby_names` would make a walsender of this name a synchronous standby.
    pub fn names_as_synchronous_standby(&self, application_name: &str) -> bool {
        let names = standby_names(&self.synchronous_standby_names);
        names.iter().any(|name| name == "*" || name.eq_ignore_ascii_case(application_name))
    }
}

impl Publication {
    /// Operations that it does not publish.
    pub fn lacking_operations(&self) -> &[&'static str] {
        &self.lacking
    }

    /// Whether changes of this table are published under this name. False for a partition published as part of its root.
    pub fn covers(&self, table: &QualifiedName) -> bool {
        self.tables.contains(table)
    }
}

/// The names in `synchronous_standby_names`: `a, "b"`, `2 (a, b)`, `FIRST 2 (a, b)`, `ANY 1 (*)`. Meant for texts that
/// Postgres has accepted, but never fails.
///
/// <https://www.postgresql.org/docs/current/runtime-config-replication.html#GUC-SYNCHRONOUS-STANDBY-NAMES>
fn standby_names(setting: &str) -> Vec<String> {
    let mut names = Vec::new();
    let mut rest = setting.chars().peekable();
    while let Some(c) = rest.next() {
        match c {
            // A method and a number came before it.
            '(' => names.clear(),
            '"' => {
                let mut name = String::new();
                while let Some(c) = rest.next() {
                    match c {
                        '"' if rest.next_if_eq(&'"').is_some() => name.push('"'),
                        '"' => break,
                        c => name.push(c),
                    }
                }
                names.push(name);
            }
            ',' | ')' => {}
            c if c.is_ascii_whitespace() || c == '\x0b' => {}
            c => {
                let mut name = String::from(c);
                while let Some(c) = rest.next_if(|c| !matches!(c, ',' | '(' | ')' | '"') && !c.is_ascii_whitespace()) {
                    name.push(c);
                }
                names.push(name);
            }
        }
    }
    names
}

pub async fn server_facts(client: &Client) -> Result<ServerFacts, SourceError> {
    let doing = "asking for the server's settings";
    let sql = "SELECT current_setting('server_version_num'), pg_is_in_recovery(), current_setting('wal_level'),
                      current_setting('synchronous_standby_names'), pg_size_bytes(current_setting('wal_segment_size')),
                      (SELECT setting::bigint * 1048576 FROM pg_settings
                        WHERE name = 'max_slot_wal_keep_size' AND setting::bigint >= 0),
                      greatest(current_setting('max_replication_slots')::bigint
                               - (SELECT count(*) FROM pg_replication_slots), 0),
                      greatest(current_setting('max_wal_senders')::bigint
                               - (SELECT count(*) FROM pg_stat_replication), 0),
                      current_setting('server_encoding'), current_setting('effective_wal_level', true)";
    let row = one_row(client, doing, sql).await?;
    let row = Cells { doing, row: &row };
    Ok(ServerFacts {
        version_num: row.parse(0)?,
        in_recovery: row.yes(1)?,
        wal_level: row.text(2)?.to_owned(),
        synchronous_standby_names: row.text(3)?.to_owned(),
        wal_segment_bytes: row.parse(4)?,
        slot_limit_bytes: row.parse_optional(5)?,
        free_slots: row.parse(6)?,
        free_walsenders: row.parse(7)?,
        encoding: row.text(8)?.to_owned(),
        effective_wal_level: row.optional(9)?.map(str::to_owned),
    })
}

/// Asks on the connection that the stream will use, since that is the server that matters.
pub async fn identify(replication: &mut ReplicationConnection) -> Result<Identity, SourceError> {
    let doing = "identifying the server";
    let rows = replication.command("IDENTIFY_SYSTEM").await?;
    let unexpected = |what: &str| SourceError::unexpected(doing, what);
    match rows.into_iter().next().as_deref() {
        Some([Some(system_id), Some(timeline), Some(flushed), Some(database), ..]) => Ok(Identity {
            system_id: system_id.clone(),
            timeline: timeline.parse().map_err(|_| unexpected("no timeline"))?,
            database: database.clone(),
            flushed: EndLsn(flushed.parse().map_err(|_| unexpected("no position"))?),
        }),
        Some(_) | None => Err(unexpected("no answer that names a database")),
    }
}

/// The ancestors of this timeline, the oldest first. Empty if the server no longer has the history file: then it is unknown
/// where they ended.
pub async fn timeline_history(
    replication: &mut ReplicationConnection,
    timeline: u32,
) -> Result<Vec<EarlierTimeline>, SourceError> {
    // The first one has no past, and asking for it is an error.
    if timeline <= 1 {
        return Ok(Vec::new());
    }
    let rows = match replication.query(&format!("TIMELINE_HISTORY {timeline}")).await {
        Ok(rows) => rows,
        Err(SourceError::Failed { error, .. }) if error.code == "58P01" => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    match rows.into_iter().next().as_deref() {
        Some([_, Some(content), ..]) => parse_history(content),
        Some(_) | None => Err(SourceError::unexpected("asking for the timeline's history", "no content")),
    }
}

/// Each line has a timeline, a position and a reason; there may be comments and empty lines.
fn parse_history(content: &str) -> Result<Vec<EarlierTimeline>, SourceError> {
    let lines = content.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines
        .map(|line| {
            let mut words = line.split_ascii_whitespace();
            let timeline = words.next().and_then(|word| word.parse().ok());
            let end = words.next().and_then(|word| word.parse().ok());
            match (timeline, end) {
                (Some(timeline), Some(end)) => Ok(EarlierTimeline { timeline, end }),
                _ => Err(SourceError::unexpected("reading a timeline's history", format!("the line {line:?}"))),
            }
        })
        .collect()
}

/// The state of the slot. One that can never be used is an error that says why; one that another session is still creating
/// is [`SourceError::SlotInUse`].
pub async fn slot_state(client: &Client, name: &str) -> Result<SlotState, SourceError> {
    let doing = format!("looking at replication slot {name}");
    let sql = format!(
        "SELECT s.slot_type, s.plugin, s.database, current_database(), s.temporary,
                coalesce(to_jsonb(s) ->> 'two_phase', 'false'), s.active_pid, s.wal_status,
                to_jsonb(s) ->> 'invalidation_reason', coalesce(to_jsonb(s) ->> 'conflicting', 'false'),
                s.confirmed_flush_lsn
           FROM pg_replication_slots s WHERE s.slot_name = {}",
        escape_literal(name)
    );
    let results = look(client, &doing, &sql).await?;
    let Some(row) = results.iter().flatten().next() else { return Ok(SlotState::Absent) };
    let row = Cells { doing: &doing, row };
    let unsuitable = |is: String, remedy: &str| {
        let remedy = format!("set postgres.slot to {remedy}");
        Err(SourceError::unsuitable(Code::SlotUnsuitable, format!("replication slot {name} {is}"), remedy))
    };
    const ANOTHER: &str = "another name, or drop this one if nobody needs it";
    if row.text(0)? != "logical" {
        return unsuitable("is a physical one, of a standby or a backup".to_owned(), "another name");
    }
    if let Some(plugin) = row.optional(1)?.filter(|plugin| *plugin != PLUGIN) {
        return unsuitable(format!("was made for the plugin {plugin} instead of {PLUGIN}"), ANOTHER);
    }
    if let Some(database) = row.optional(2)?
        && database != row.text(3)?
    {
        let is = format!("belongs to database {database}, and this is {}", row.text(3)?);
        return unsuitable(is, "another name, or correct the database in postgres.url");
    }
    let active_pid = row.parse_optional(6)?;
    if row.yes(4)? {
        return unsuitable(
            format!("is temporary, and ends with its session ({})", super::holder(&active_pid)),
            ANOTHER,
        );
    }
    if row.text(5)? == "true" {
        return unsuitable("was made with two_phase, which this stream does not follow".to_owned(), ANOTHER);
    }
    let lost = row.optional(7)? == Some("lost");
    let conflicting = row.text(9)? == "true";
    match (row.optional(8)?, lost, conflicting) {
        (Some(reason), _, _) => Ok(SlotState::Invalidated { reason: invalidation(reason).to_owned() }),
        (None, true, _) => Ok(SlotState::Invalidated { reason: invalidation("wal_removed").to_owned() }),
        (None, false, true) => Ok(SlotState::Invalidated { reason: invalidation("rows_removed").to_owned() }),
        (None, false, false) => match row.parse_optional(10)? {
            Some(confirmed) => Ok(SlotState::Ready { confirmed: EndLsn(confirmed), active_pid }),
            // Still being created: it has no position yet, and disappears if its session ends first.
            None => Err(SourceError::SlotInUse { slot: name.to_owned(), pid: active_pid }),
        },
    }
}

/// `invalidation_reason`, in words.
fn invalidation(reason: &str) -> &str {
    match reason {
        "wal_removed" => "Postgres removed WAL that it needs (max_slot_wal_keep_size)",
        "rows_removed" => "Postgres removed catalog rows that it needs",
        "wal_level_insufficient" => "wal_level was lowered",
        "idle_timeout" => "nobody read it for longer than idle_replication_slot_timeout",
        other => other,
    }
}

/// The server processes of connections with this application_name.
pub async fn sessions_named(client: &Client, application_name: &str) -> Result<BTreeSet<i32>, SourceError> {
    let doing = format!("looking for sessions of {application_name}");
    // Postgres keeps the first 63 bytes of it.
    let sql = format!(
        "SELECT pid FROM pg_stat_activity WHERE application_name = {}::name::text AND pid <> pg_backend_pid()",
        escape_literal(application_name)
    );
    let results = look(client, &doing, &sql).await?;
    results.iter().flatten().map(|row| Cells { doing: &doing, row }.parse(0)).collect()
}

/// Drops the slot if it exists.
pub async fn drop_slot(client: &Client, name: &str) -> Result<(), SourceError> {
    let literal = escape_literal(name);
    let sql =
        format!("SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = {literal}");
    match act(client, &format!("dropping replication slot {name}"), &sql).await {
        Ok(_) => Ok(()),
        Err(SourceError::Failed { error, .. }) if error.code == "42704" => Ok(()),
        Err(SourceError::Failed { error, .. }) if error.code == "55006" => {
            Err(SourceError::SlotInUse { slot: name.to_owned(), pid: None })
        }
        Err(error) => Err(error),
    }
}

/// Terminates the walsender `pid` if it still holds a slot and belongs to a daemon of this name and role: the number may
/// have been reused. Returns whether there was one.
pub async fn terminate_walsender(client: &Client, pid: i32, application_name: &str) -> Result<bool, SourceError> {
    let sql = format!(
        "SELECT pg_terminate_backend(s.active_pid)
           FROM pg_replication_slots s JOIN pg_stat_activity a ON a.pid = s.active_pid
          WHERE s.active_pid = {pid} AND a.application_name = {} AND a.usename = current_user",
        escape_literal(application_name)
    );
    let results = act(client, &format!("ending walsender {pid}"), &sql).await?;
    Ok(results.first().is_some_and(|rows| !rows.is_empty()))
}

/// A database, as seen from an ordinary connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Database {
    pub name: String,
    /// `None` if the role may not ask.
    pub system_id: Option<String>,
}

pub async fn database(client: &Client) -> Result<Database, SourceError> {
    let doing = "asking for the name of the database";
    let row = one_row(client, doing, "SELECT current_database()").await?;
    let name = Cells { doing, row: &row }.text(0)?.to_owned();
    Ok(Database { name, system_id: system_identifier(client).await? })
}

/// Whether the session has the right to replicate, by its role or by one that it is a member of.
pub async fn may_replicate(client: &Client) -> Result<bool, SourceError> {
    let doing = "asking for the right to replicate";
    let row = one_row(client, doing, &format!("SELECT {MAY_REPLICATE}")).await?;
    Cells { doing, row: &row }.yes(0)
}

/// The same as a condition. On Amazon RDS the right is membership in a role.
pub(super) const MAY_REPLICATE: &str =
    "EXISTS (SELECT FROM pg_roles r WHERE (r.rolsuper OR r.rolreplication OR r.rolname = 'rds_replication')
                                      AND pg_has_role(r.oid, 'MEMBER'))";

/// The system identifier. `None` if the role may not ask.
pub async fn system_identifier(client: &Client) -> Result<Option<String>, SourceError> {
    let sql = "SELECT CASE WHEN has_function_privilege('pg_control_system()', 'EXECUTE')
                           THEN (SELECT system_identifier::text FROM pg_control_system()) END";
    let results = look(client, "asking for the system identifier", sql).await?;
    Ok(results.first().and_then(|rows| rows.first()).and_then(|row| row.get(0)).map(str::to_owned))
}

/// The publication, or `None` if there is none of that name.
pub async fn publication(client: &Client, name: &str) -> Result<Option<Publication>, SourceError> {
    let doing = format!("looking at publication {name}");
    let literal = escape_literal(name);
    let sql = format!(
        "SELECT p.puballtables, p.pubviaroot, p.pubinsert, p.pubupdate, p.pubdelete, p.pubtruncate
           FROM pg_publication p WHERE p.pubname = {literal};
         SELECT t.schemaname, t.tablename FROM pg_publication_tables t WHERE t.pubname = {literal}"
    );
    let results = look(client, &doing, &sql).await?;
    let [publication, tables] = &results[..] else {
        return Err(SourceError::unexpected(doing, format!("{} results instead of 2", results.len())));
    };
    let Some(row) = publication.first() else { return Ok(None) };
    let row = Cells { doing: &doing, row };
    let mut out = Publication {
        name: name.to_owned(),
        all_tables: row.yes(0)?,
        via_partition_root: row.yes(1)?,
        lacking: Vec::new(),
        tables: HashSet::with_capacity(tables.len()),
    };
    for (index, operation) in [(2, "insert"), (3, "update"), (4, "delete"), (5, "truncate")] {
        if !row.yes(index)? {
            out.lacking.push(operation);
        }
    }
    for row in tables {
        let row = Cells { doing: &doing, row };
        out.tables.insert(QualifiedName { schema: row.text(0)?.to_owned(), table: row.text(1)?.to_owned() });
    }
    Ok(Some(out))
}

/// Whether the publication may have been created or altered after the slot's position; `None` if one of them does not exist.
/// If not, decoding finds the publication at any position of the slot, since the slot's catalog contains all older
/// transactions.
pub async fn publication_may_be_younger(
    client: &Client,
    slot: &str,
    publication: &str,
) -> Result<Option<bool>, SourceError> {
    let doing = format!("comparing publication {publication} with slot {slot}");
    let sql = format!(
        "SELECT age(p.xmin) <= age(s.catalog_xmin) FROM pg_publication p, pg_replication_slots s
          WHERE p.pubname = {} AND s.slot_name = {}",
        escape_literal(publication),
        escape_literal(slot)
    );
    let results = look(client, &doing, &sql).await?;
    let Some(row) = results.iter().flatten().next() else { return Ok(None) };
    Ok(Some(Cells { doing: &doing, row }.optional(0)? == Some("t")))
}

/// Creates the publication of these tables, partitioned ones under their root. The role must own them and have CREATE on
/// the database.
pub async fn create_publication(client: &Client, name: &str, tables: &[QualifiedName]) -> Result<(), SourceError> {
    let statement = Sql::CreatePublication { publication: name, tables };
    change_publication(client, &format!("creating publication {name}"), "", statement).await
}

/// Whether the role may create a publication at all, whatever its tables.
pub async fn may_create_publication(client: &Client) -> Result<bool, SourceError> {
    let doing = "asking for the right to make a publication";
    let row = one_row(client, doing, "SELECT has_database_privilege(current_database(), 'CREATE')").await?;
    Cells { doing, row: &row }.yes(0)
}

/// Whether the table exists and the role may publish it. Trying it would leave an ERROR in the server's log.
pub async fn may_publish(client: &Client, table: &QualifiedName) -> Result<bool, SourceError> {
    let sql = format!(
        "SELECT pg_has_role(c.relowner, 'USAGE') AND c.relkind IN ('r', 'p') AND c.relpersistence = 'p'
           FROM pg_class c WHERE c.oid = to_regclass({})",
        escape_literal(&quoted(table))
    );
    let doing = format!("asking whether table {table} can be published");
    let results = look(client, &doing, &sql).await?;
    results.iter().flatten().next().map_or(Ok(false), |row| Cells { doing: &doing, row }.yes(0))
}

/// Adds a table to the publication. Waits for transactions that write to the table: their earlier changes would never be
/// sent, and a load that begins before they commit would not see them.
pub async fn add_table(client: &Client, name: &str, table: &QualifiedName) -> Result<(), SourceError> {
    let statement = Sql::AddTableOnly { publication: name, table };
    let lock = format!("LOCK TABLE {} IN SHARE MODE;", quoted(table));
    change_publication(client, &format!("adding table {table} to publication {name}"), &lock, statement).await
}

/// Drops the publication if it exists.
pub async fn drop_publication(client: &Client, name: &str) -> Result<(), SourceError> {
    let statement = Sql::DropPublication { publication: name };
    match change_publication(client, &format!("dropping publication {name}"), "", statement).await {
        Err(SourceError::Failed { error, .. }) if error.code == "42704" => Ok(()),
        done => done,
    }
}

/// `first` runs before the statement, in the same transaction.
async fn change_publication(client: &Client, doing: &str, first: &str, statement: Sql<'_>) -> Result<(), SourceError> {
    let sql = format!("SET LOCAL lock_timeout = {}; {first} {statement}", LOCK_TIMEOUT.as_millis());
    match act(client, doing, &sql).await {
        Ok(_) => Ok(()),
        Err(SourceError::Failed { error, .. }) if error.code == "42501" => Err(SourceError::unsuitable(
            Code::PostgresRights,
            format!("{doing} is not allowed to this role ({})", error.message),
            format!("as the owner: {statement}"),
        )),
        Err(error) => Err(error),
    }
}

async fn one_row(client: &Client, doing: &str, sql: &str) -> Result<SimpleQueryRow, SourceError> {
    let results = look(client, doing, sql).await?;
    results.into_iter().flatten().next().ok_or_else(|| SourceError::unexpected(doing, "no answer"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts() -> ServerFacts {
        ServerFacts {
            version_num: 150_000,
            in_recovery: false,
            wal_level: "logical".to_owned(),
            effective_wal_level: None,
            synchronous_standby_names: String::new(),
            wal_segment_bytes: 16 << 20,
            slot_limit_bytes: None,
            free_slots: 1,
            free_walsenders: 1,
            encoding: "UTF8".to_owned(),
        }
    }

    fn named(setting: &str, application_name: &str) -> bool {
        let facts = ServerFacts { synchronous_standby_names: setting.to_owned(), ..facts() };
        facts.names_as_synchronous_standby(application_name)
    }

    #[test]
    fn replica_is_enough_where_the_first_slot_raises_the_level() {
        for (wal_level, effective, can_decode) in [
            ("logical", None, true),
            ("logical", Some("logical"), true),
            ("replica", None, false),
            ("replica", Some("replica"), true),
            ("replica", Some("logical"), true),
            ("minimal", Some("minimal"), false),
        ] {
            let effective_wal_level = effective.map(str::to_owned);
            let facts = ServerFacts { wal_level: wal_level.to_owned(), effective_wal_level, ..facts() };
            assert_eq!(facts.can_decode(), can_decode, "{wal_level}, {effective:?}");
        }
    }

    #[test]
    fn synchronous_standbys_are_named_as_postgres_reads_them() {
        for setting in [
            "*",
            "\"*\"",
            "prefetchd_a",
            "other,PREFETCHD_A",
            " \"prefetchd_a\" ",
            "1 (prefetchd_a)",
            "2(s1,prefetchd_a)",
            "FIRST 1 (s1, s2, prefetchd_a)",
            "any 2 (s1, \"Prefetchd_A\")",
            "ANY 1 (*)",
        ] {
            assert!(named(setting, "prefetchd_a"), "{setting}");
        }
        for setting in
            ["", "s1", "prefetchd", "FIRST 1 (s1)", "\"prefetchd\"\"_a\"", "\"prefetchd_a,s1\"", "1 (s1, s2)"]
        {
            assert!(!named(setting, "prefetchd_a"), "{setting}");
        }
        assert!(named("1 (1, 2)", "2"), "a number may be a name");
        assert!(!named("3 (1, 2)", "3"), "and this one is a count");
        assert!(!named("FIRST 1 (a)", "first"));
        assert!(named("\"a\"\"b\"", "a\"b"));
    }

    #[test]
    fn a_history_is_read_line_by_line() {
        let content =
            "1\t0/3000158\tno recovery target specified\n\n# a comment\n2\t1A/5\tbefore 2000-01-01 00:00:00+00\n";
        let earlier = |timeline, end: &str| EarlierTimeline { timeline, end: end.parse().unwrap() };
        assert_eq!(parse_history(content).unwrap(), [earlier(1, "0/3000158"), earlier(2, "1A/5")]);
        assert_eq!(parse_history("").unwrap(), []);
        for bad in ["1", "x\t0/1\tr", "1\t0\tr"] {
            assert!(parse_history(bad).is_err(), "{bad}");
        }
    }
}
