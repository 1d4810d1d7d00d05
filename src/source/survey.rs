//! Questions to Postgres before anything is started: how large the rows are, how fast the WAL grows, what would be in
//! the way.
//!
//! It must change nothing and delay nobody: a query that takes long is cancelled. A mistake here gives wrong advice, or
//! refuses a load that would fit. Sizes are measured on the present rows, because statistics may be outdated.

use super::SourceError;
use super::answer::{Cells, look, quoted};
use super::new_slot::Blocker;
use super::slot::publication_may_be_younger;
use super::snapshot::{Access, CatalogTable, TableKind};
use crate::lsn::Lsn;
use postgres_protocol::escape::{escape_identifier, escape_literal};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio_postgres::Client;

/// How many pages of a table are sampled.
const PAGES_SAMPLED: f64 = 500.0;
const PATIENCE: Duration = Duration::from_secs(5);
/// The longest value that Redis keeps in a listpack, by default.
const COMPACT_VALUE_BYTES: u32 = 64;
/// A longer value is not decompressed to be measured. Its size on disk is used instead.
const MEASURED_VALUE_BYTES: u32 = 2_000;

/// The rows of a table, estimated from a sample of its pages.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct TableSize {
    pub rows: f64,
    /// Of all rows: their values, and the caller's constant for each row.
    pub bytes: f64,
    /// The standard error of `bytes`; 0 if every page was sampled.
    pub error_bytes: f64,
    /// The number of rows that have a value over [`COMPACT_VALUE_BYTES`].
    pub wide_rows: f64,
}

/// A sample of the WAL.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct WalSample {
    pub at: Lsn,
    /// The average since the statistics were last reset.
    pub average_bytes_per_second: Option<f64>,
}

/// A transaction that would delay the creation of a slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpenTransaction {
    pub blocker: Blocker,
    /// Distinguishes it from a later transaction of the same session.
    pub xid: String,
}

/// Samples the `columns` of a table (a column that is listed twice counts twice). `row_bytes` is added for each row.
pub async fn sizes(
    client: &Client,
    table: &CatalogTable,
    columns: &[&str],
    row_bytes: u64,
) -> Result<TableSize, SourceError> {
    let doing = format!("sampling table {}", table.name);
    let pages: f64 = table.leaves.iter().map(|leaf| f64::from(leaf.pages)).sum();
    let share = if pages <= PAGES_SAMPLED { 1.0 } else { PAGES_SAMPLED / pages };
    // Tables that inherit are not read; all partitions of a partitioned table are.
    let only = match table.kind {
        TableKind::Table => "ONLY ",
        TableKind::Partitioned => "",
    };
    let lengths: Vec<String> = columns
        .iter()
        .map(|column| {
            let c = escape_identifier(column);
            // Uses the output function, because a cast to text may call a function of the type's owner.
            format!(
                "coalesce(CASE WHEN pg_column_size({c}) > {MEASURED_VALUE_BYTES} THEN pg_column_size({c})
                               ELSE octet_length(format('%s', {c})) END, 0)::bigint"
            )
        })
        .collect();
    let filter = table.published.row_filter.as_ref().map_or_else(String::new, |filter| format!(" WHERE ({filter})"));
    // Only a role that may read the whole table may see where a row is. Without that, the sample's error is unknown and
    // may be anything.
    let (page, error) = match table.access {
        Access::Whole => (" GROUP BY tableoid, (ctid::text::point)[0]", None),
        Access::Columns => ("", Some(if share < 1.0 { f64::INFINITY } else { 0.0 })),
    };
    // Always the same pages, so that the result is stable as long as the table does not change.
    let sql = format!(
        "SET LOCAL statement_timeout = {patience};
         SELECT coalesce(sum(rows), 0), coalesce(sum(bytes), 0), coalesce(sum(bytes ^ 2), 0), coalesce(sum(wide), 0)
           FROM (SELECT count(*)::float8 AS rows, sum({row_bytes} + {sum})::float8 AS bytes,
                        (count(*) FILTER (WHERE greatest({lengths}) > {COMPACT_VALUE_BYTES}))::float8 AS wide
                   FROM {only}{table} TABLESAMPLE pg_catalog.system ({percent}) REPEATABLE (1){filter}{page}) page",
        patience = PATIENCE.as_millis(),
        sum = lengths.join(" + "),
        lengths = lengths.join(", "),
        table = quoted(&table.name),
        percent = share * 100.0,
    );
    let results = look(client, &doing, &sql).await?;
    let row = results.iter().flatten().next().ok_or_else(|| SourceError::unexpected(&*doing, "no answer"))?;
    let row = Cells { doing: &doing, row };
    let squares: f64 = row.parse(2)?;
    Ok(TableSize {
        rows: row.parse::<f64>(0)? / share,
        bytes: row.parse::<f64>(1)? / share,
        // Each page is sampled with the same probability, independently of the others: the Horvitz-Thompson estimator.
        error_bytes: error.unwrap_or_else(|| ((1.0 - share) * squares).sqrt() / share),
        wide_rows: row.parse::<f64>(3)? / share,
    })
}

/// What a report of a problem needs to know of the server.
#[derive(Debug, Clone, Default)]
pub struct Reported {
    pub version: String,
    /// `name = value unit`
    pub settings: Vec<String>,
    /// The slot's row of pg_replication_slots, as JSON.
    pub slot: Option<String>,
    pub published_tables: Vec<String>,
}

/// The settings that prefetchd depends on.
const REPORTED_SETTINGS: &str = "'wal_level', 'max_replication_slots', 'max_wal_senders', 'max_connections', 'wal_sender_timeout', \
     'max_slot_wal_keep_size', 'idle_replication_slot_timeout', 'logical_decoding_work_mem', 'wal_segment_size', \
     'synchronous_commit', 'synchronous_standby_names', 'server_encoding', 'track_commit_timestamp'";

/// Reads no row of any table.
pub async fn report(client: &Client, slot: &str, publication: &str) -> Result<Reported, SourceError> {
    let doing = "asking for what a report needs";
    let sql = format!(
        "SET LOCAL statement_timeout = {patience};
         SELECT version();
         SELECT name || ' = ' || setting || coalesce(' ' || unit, '') FROM pg_settings WHERE name IN ({REPORTED_SETTINGS})
          ORDER BY name;
         SELECT row_to_json(s)::text FROM pg_replication_slots s WHERE slot_name = {slot};
         SELECT format('%I.%I', schemaname, tablename) FROM pg_publication_tables WHERE pubname = {publication}
          ORDER BY schemaname, tablename",
        patience = PATIENCE.as_millis(),
        slot = escape_literal(slot),
        publication = escape_literal(publication),
    );
    let results = look(client, doing, &sql).await?;
    let column = |statement: usize| {
        let rows = results.get(statement).into_iter().flatten();
        rows.map(|row| Cells { doing, row }.text(0).map(str::to_owned)).collect::<Result<Vec<_>, _>>()
    };
    // The first is SET.
    let (version, slot) = (column(1)?.pop().unwrap_or_default(), column(3)?.pop());
    Ok(Reported { version, settings: column(2)?, slot, published_tables: column(4)? })
}

/// Returns milliseconds since the Unix epoch, by the server's clock.
pub async fn time_ms(client: &Client) -> Result<i64, SourceError> {
    let doing = "asking for the time";
    let results = look(client, doing, "SELECT (extract(epoch FROM clock_timestamp()) * 1000)::bigint").await?;
    let row = results.iter().flatten().next().ok_or_else(|| SourceError::unexpected(doing, "no answer"))?;
    Cells { doing, row }.parse(0)
}

/// Returns the position of the WAL, and how fast it has grown on average.
pub async fn wal(client: &Client) -> Result<WalSample, SourceError> {
    let doing = "asking how fast the WAL grows";
    let sql = "SELECT pg_current_wal_insert_lsn(),
                      w.wal_bytes::float8 / greatest(extract(epoch FROM clock_timestamp() - w.stats_reset)::float8, 1)
                 FROM (VALUES (1)) one LEFT JOIN pg_stat_wal w ON true";
    let results = look(client, doing, sql).await?;
    let row = results.iter().flatten().next().ok_or_else(|| SourceError::unexpected(doing, "no answer"))?;
    let row = Cells { doing, row };
    Ok(WalSample { at: row.parse(0)?, average_bytes_per_second: row.parse_optional(1)? })
}

/// Returns the transactions that write, in any database, and the prepared ones.
pub async fn open_transactions(client: &Client) -> Result<Vec<OpenTransaction>, SourceError> {
    let doing = "asking which transactions are open";
    let sql = "SELECT a.pid, a.application_name, NULL, a.xact_start::timestamptz(0)::text, a.backend_xid::text
                 FROM pg_stat_activity a WHERE a.backend_xid IS NOT NULL AND a.pid <> pg_backend_pid()
                UNION ALL
               SELECT NULL, NULL, p.gid, p.prepared::timestamptz(0)::text, p.transaction::text FROM pg_prepared_xacts p";
    let results = look(client, doing, sql).await?;
    let open = |row| {
        let row = Cells { doing, row };
        let since = row.optional(3)?.map(str::to_owned);
        let blocker = match row.optional(2)? {
            Some(gid) => Blocker::Prepared { gid: gid.to_owned(), since: since.unwrap_or_default() },
            None => Blocker::Session {
                pid: row.parse(0)?,
                application: row.optional(1)?.unwrap_or_default().to_owned(),
                since,
            },
        };
        Ok(OpenTransaction { blocker, xid: row.text(4)?.to_owned() })
    };
    results.iter().flatten().map(open).collect()
}

/// Whether the slot's position precedes the creation of the publication, in which case the slot can never be decoded.
/// `None` if that cannot be determined.
pub async fn publication_is_younger(
    client: &Client,
    slot: &str,
    publication: &str,
) -> Result<Option<bool>, SourceError> {
    let doing = format!("comparing publication {publication} with slot {slot}");
    // A list of identifiers, as a literal.
    let names = escape_literal(&escape_identifier(publication));
    match publication_may_be_younger(client, slot, publication).await? {
        Some(true) => {}
        known => return Ok(known),
    }
    let slot = escape_literal(slot);
    // The publication may only have been altered. Decoding tells, and peeking consumes nothing.
    let sql = format!(
        "SET LOCAL statement_timeout = {};
         SELECT count(*) FROM pg_logical_slot_peek_binary_changes({slot}, NULL, 1,
                                                                  'proto_version', '1', 'publication_names', {names})",
        PATIENCE.as_millis()
    );
    match look(client, &doing, &sql).await {
        Ok(results) => {
            let row = results.iter().flatten().next();
            // Nothing to decode proves nothing.
            Ok(row.and_then(|row| row.get(0)).filter(|count| *count != "0").map(|_| false))
        }
        Err(SourceError::Failed { error, .. }) if error.code == "42704" => Ok(Some(true)),
        Err(SourceError::Failed { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Returns when the server started, which is the same on every path to it.
pub async fn started_at(client: &Client) -> Result<String, SourceError> {
    let doing = "asking when the server started";
    let results = look(client, doing, "SELECT pg_postmaster_start_time()").await?;
    let row = results.iter().flatten().next().ok_or_else(|| SourceError::unexpected(doing, "no answer"))?;
    Ok(Cells { doing, row }.text(0)?.to_owned())
}

/// Whether the role of this connection is a superuser.
pub async fn is_superuser(client: &Client) -> Result<bool, SourceError> {
    let doing = "asking for the role's rights";
    let sql = "SELECT rolsuper FROM pg_catalog.pg_roles WHERE rolname OPERATOR(pg_catalog.=) CURRENT_USER";
    let results = look(client, doing, sql).await?;
    let row = results.iter().flatten().next().ok_or_else(|| SourceError::unexpected(doing, "no answer"))?;
    Cells { doing, row }.yes(0)
}

/// Returns the directories in which the server's socket may be: those in its settings, if the role may read them, and
/// the usual ones.
pub async fn socket_directories(client: &Client) -> Result<Vec<PathBuf>, SourceError> {
    let doing = "asking for the socket's directory";
    // If the role may not read it, there is no such row.
    let sql = "SELECT setting FROM pg_settings WHERE name = 'unix_socket_directories'";
    let results = look(client, doing, sql).await?;
    let named = results.iter().flatten().next().and_then(|row| row.get(0)).unwrap_or_default();
    let named = named.split(',').map(|dir| dir.trim().trim_matches('"'));
    let all = named.chain(["/run/postgresql", "/var/run/postgresql", "/tmp"]).filter(|dir| dir.starts_with('/'));
    let mut directories: Vec<PathBuf> = Vec::new();
    for dir in all.map(|dir| Path::new(dir).canonicalize().unwrap_or_else(|_| dir.into())) {
        if !directories.contains(&dir) {
            directories.push(dir);
        }
    }
    Ok(directories)
}
