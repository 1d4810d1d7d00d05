//! Reads tables: what the catalog says about them ([`catalog`]), and their rows in chunks, each with the snapshot under
//! which it was read.
//!
//! It must not know keys, Redis or what the stream has delivered: the caller decides whether a chunk may be used, by
//! comparing its snapshot with the stream. A mistake here silently omits rows from a load, or gives them another shape
//! than the stream does.
//!
//! Everything runs on one ordinary connection, whose settings every transaction pins ([`super::answer::PINS`]):
//! `search_path` is `pg_catalog`, so every other name is qualified. A call that reads opens a transaction and ends it,
//! also when it fails. A call that is *dropped* half-way leaves its transaction open: the client must then be
//! discarded.
//!
//! No code of the owner of a table, type or schema may run as the role that reads. Only real tables are read; no value
//! is cast if a cast function or a domain's constraint could be the owner's ([`FromText`]); and if planning alone would
//! call a function of the owner ([`planned_now`]), a role that may replicate does not read.

mod catalog;
mod catalog_sql;

pub use catalog::{
    Access, CatalogColumn, CatalogTable, Described, Estimated, FromText, Heirs, InPublication, Leaf, TableKind,
    boolean_types, describe, describe_all, name_of,
};
pub use catalog_sql::Asked;

use super::SourceError;
use super::answer::{Cells, act, begin_sql, in_transaction, look, query, quoted};
use super::assemble::MARK_PREFIX;
use super::connect::{CancelRequest, PostgresClient};
use crate::change::{Nonce, Row, RowBuilder};
use crate::code::Code;
use crate::loader::range::{KeyBound, Range, Span, Tid, TidBound};
use crate::lsn::{EndLsn, Lsn};
use crate::remedy::Sql;
use crate::schema::{Oid, QualifiedName};
use bytes::{BufMut, Bytes, BytesMut};
use catalog::refuse_code;
use catalog_sql::{planned_code, planned_now};
use futures_util::TryStreamExt;
use memchr::{memchr, memchr_iter};
use postgres_protocol::escape::{escape_identifier, escape_literal};
use std::fmt::Write;
use std::num::NonZeroU64;
use std::pin::pin;
use std::str::FromStr;
use std::time::Duration;
use tokio_postgres::{Client, CopyOutStream, SimpleQueryRow};

/// How long a read waits for a conflicting lock on the table (TRUNCATE, VACUUM FULL, most forms of ALTER TABLE). While
/// it waits it blocks only other statements of that kind.
const LOCK_TIMEOUT: Duration = Duration::from_secs(10);
/// As little waiting as Postgres allows.
const NO_WAIT: Duration = Duration::from_millis(1);
/// Attempts to get a lock and a snapshot with no rewrite of the table in between. Each further attempt takes another
/// rewrite.
const LOCK_ATTEMPTS: u32 = 10;

const QUERY_CANCELED: &str = "57014";
const UNDEFINED_TABLE: &str = "42P01";
const UNDEFINED_SCHEMA: &str = "3F000";

/// A part of a table to be read.
#[derive(Debug, Clone, Copy)]
pub struct Part<'a> {
    pub table: &'a CatalogTable,
    pub range: &'a Range,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReadRange {
    Rows(ReadRows),
    /// The table or partition has been renamed or dropped, or is no longer part of the table.
    Gone,
}

/// The snapshot under which a range was read, and what is left of the range.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReadRows {
    /// `pg_current_snapshot()`.
    pub snapshot: String,
    /// The current file, which stays the same during the read. If it differs from [`Leaf::filenode`], rows may have
    /// moved between ranges.
    pub filenode: Oid,
    pub rows: u64,
    /// Size of the rows in memory.
    pub bytes: usize,
    /// What is left because of the limit, starting right after the last row.
    pub rest: Option<Range>,
}

/// Which cells a lookup by key returns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    /// All of [`CatalogTable::columns`].
    WholeRows,
    /// The key's columns, in the order in which they were given.
    KeysOnly,
}

/// The server's position and what its snapshots see, taken together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sample {
    /// `pg_current_snapshot()`.
    pub snapshot: String,
    /// The WAL is flushed up to here. At a page boundary this may include the page's header, see
    /// [`Lsn::before_page_header`].
    pub flushed: Lsn,
    /// `None`: there is no such slot.
    pub slot: Option<SlotSample>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlotSample {
    pub confirmed: Option<EndLsn>,
    /// `reserved`, `extended`, `unreserved`, `lost`.
    pub wal_status: Option<String>,
    /// WAL that the slot retains.
    pub retained_bytes: u64,
    /// The walsender that uses it.
    pub active_pid: Option<i32>,
}

/// Returns the current snapshot. If it is the same text twice, no transaction that could have changed anything ended in
/// between.
pub async fn current(client: &Client) -> Result<String, SourceError> {
    let doing = "asking for a snapshot";
    let results = look(client, doing, "SELECT pg_current_snapshot()").await?;
    let row = results.iter().flatten().next().ok_or_else(|| SourceError::unexpected(doing, "no answer"))?;
    Cells { doing, row }.text(0).map(str::to_owned)
}

/// Reads the rows of a range under one snapshot, in the order of their places, and passes them to `on_row`. Stops after
/// the row that reaches `max_bytes`: at most that and one row are held, and about as much again is read and discarded
/// before the server is asked to stop. Locks only the partition that it reads.
pub async fn read_range(
    client: &PostgresClient,
    part: Part<'_>,
    max_bytes: usize,
    mut on_row: impl FnMut(Row),
) -> Result<ReadRange, SourceError> {
    let doing = format!("reading table {}", part.table.name);
    let parts = [part];
    let read = read_ranges_in_transaction(client, &doing, &parts, max_bytes, |_, row| on_row(row));
    match in_transaction(client, &doing, read).await {
        Ok(mut read) => Ok(read.pop().expect("the first one is always read")),
        // A partition of that name no longer exists: it was dropped or renamed after the table was described.
        Err(error)
            if part.table.kind == TableKind::Partitioned
                && matches!(code(&error), Some(UNDEFINED_TABLE | UNDEFINED_SCHEMA)) =>
        {
            Ok(ReadRange::Gone)
        }
        Err(error) => Err(error),
    }
}

/// Like [`read_range`], for several ranges of any tables, each [`Access::Whole`], all under one snapshot; `max_bytes`
/// applies to their sum. Fails immediately if one of them is locked: no lock is held while waiting for another. Returns
/// only the first ranges if the rest does not fit.
pub async fn read_ranges(
    client: &PostgresClient,
    parts: &[Part<'_>],
    max_bytes: usize,
    on_row: impl FnMut(usize, Row),
) -> Result<Vec<ReadRange>, SourceError> {
    let doing = format!("reading {} tables", parts.len());
    in_transaction(client, &doing, read_ranges_in_transaction(client, &doing, parts, max_bytes, on_row)).await
}

async fn read_ranges_in_transaction(
    client: &PostgresClient,
    doing: &str,
    parts: &[Part<'_>],
    max_bytes: usize,
    mut on_row: impl FnMut(usize, Row),
) -> Result<Vec<ReadRange>, SourceError> {
    let (snapshot, files) = lock_leaves(client, doing, parts).await?;
    let (mut out, mut left) = (Vec::with_capacity(parts.len()), max_bytes);
    for (place, (part, file)) in parts.iter().zip(files).enumerate() {
        let Some(filenode) = file else {
            out.push(ReadRange::Gone);
            continue;
        };
        let read = ReadRows { snapshot: snapshot.clone(), filenode, rows: 0, bytes: 0, rest: None };
        let read = read_rows(client, doing, *part, left, read, |row| on_row(place, row)).await?;
        // Stopping it may have ended the transaction.
        let full = read.rest.is_some() || read.bytes >= left;
        left = left.saturating_sub(read.bytes);
        out.push(ReadRange::Rows(read));
        if full {
            break;
        }
    }
    Ok(out)
}

async fn read_rows(
    client: &PostgresClient,
    doing: &str,
    Part { table, range }: Part<'_>,
    max_bytes: usize,
    mut read: ReadRows,
    mut on_row: impl FnMut(Row),
) -> Result<ReadRows, SourceError> {
    let mut reached = ReadSoFar::before(table, range, doing)?;
    let sql = range_sql(table, &table.leaves[range.leaf].name, range)
        .ok_or_else(|| SourceError::unexpected(doing, "a range by key of a table without a key"))?;
    let copy = client.copy_out(&sql).await.map_err(|e| SourceError::query(doing, e))?;
    let mut copy = pin!(copy);
    let rest = |reached: &ReadSoFar, at_most_rows: Option<u64>| {
        let at_most_rows = at_most_rows.and_then(NonZeroU64::new);
        reached.span(&range.span, table, doing).map(|span| Some(Range { leaf: range.leaf, span, at_most_rows }))
    };
    while let Some(line) = copy.try_next().await.map_err(|e| SourceError::query(doing, e))? {
        client.receives(line.len());
        let cells = reached.place(&line, doing)?;
        let mut row = RowBuilder::with_capacity(cells.len() + 5 * table.columns.len());
        parse_copy_line(cells, table.columns.len(), &mut row)
            .map_err(|e| SourceError::unexpected(doing, e.to_string()))?;
        let row = row.row();
        read.rows += 1;
        read.bytes += row.len_bytes();
        reached.row(&row);
        on_row(row);
        if read.bytes >= max_bytes {
            let ended = stop(client, doing, copy.as_mut(), max_bytes).await?;
            // The row that reached the limit may have been the last.
            let was_last = ended == CopyEnd::AtOnce && range.at_most_rows.is_none_or(|limit| read.rows < limit.get());
            read.rest = if was_last { None } else { rest(&reached, Some(read.rows))? };
            return Ok(read);
        }
    }
    if let Some(limit) = range.at_most_rows.filter(|limit| read.rows == limit.get()) {
        let next = if read.bytes < max_bytes / 2 { limit.get().saturating_mul(2) } else { limit.get() };
        read.rest = rest(&reached, Some(next))?;
    }
    Ok(read)
}

/// Whether its values cannot be compared with a literal.
fn is_opaque(column: &&CatalogColumn) -> bool {
    column.from_text == FromText::Never
}

/// Progress of the read of a range.
enum ReadSoFar {
    Place(Option<Tid>),
    Key(Option<Row>),
}

impl ReadSoFar {
    fn before(table: &CatalogTable, range: &Range, doing: &str) -> Result<Self, SourceError> {
        match range.span {
            Span::Places { from: TidBound::Page(_), .. } => Ok(ReadSoFar::Place(None)),
            Span::Places { from: TidBound::Behind(tid), .. } => Ok(ReadSoFar::Place(Some(tid))),
            Span::Keys { .. } if table.identity_columns.is_empty() => {
                Err(SourceError::unexpected(doing, "a range by key of a table without a key"))
            }
            Span::Keys { .. } => {
                match table.identity_columns.iter().filter_map(|name| table.column(name)).find(is_opaque) {
                    Some(column) => Err(SourceError::unsuitable(
                        Code::TableUnreadable,
                        format!(
                            "table {} is read in the order of its key {}, an array, a composite type, or one with domains or functions of its own",
                            table.name, column.name
                        ),
                        format!("grant SELECT on the whole of {}", quoted(&table.name)),
                    )),
                    None => Ok(ReadSoFar::Key(None)),
                }
            }
        }
    }

    /// Returns a COPY line without the part that holds the row's place.
    fn place<'l>(&mut self, line: &'l [u8], doing: &str) -> Result<&'l [u8], SourceError> {
        let ReadSoFar::Place(last) = self else { return Ok(line.strip_suffix(b"\n").unwrap_or(line)) };
        let unexpected = |what: &str| SourceError::unexpected(doing, what);
        let (tid, cells) = split_tid(line).ok_or_else(|| unexpected("a COPY line without a ctid"))?;
        // The rest of a range starts after the last place: in any other order, rows would be lost.
        if last.is_some_and(|last| tid <= last) {
            return Err(unexpected("rows that are not in the order of their ctid"));
        }
        *last = Some(tid);
        Ok(cells)
    }

    fn row(&mut self, row: &Row) {
        if let ReadSoFar::Key(last) = self {
            *last = Some(row.clone());
        }
    }

    /// Returns what is left of `span`.
    fn span(&self, span: &Span, table: &CatalogTable, doing: &str) -> Result<Span, SourceError> {
        Ok(match (self, span) {
            (ReadSoFar::Place(Some(tid)), Span::Places { to, .. }) => {
                Span::Places { from: TidBound::Behind(*tid), to: *to }
            }
            (ReadSoFar::Key(Some(row)), Span::Keys { through, .. }) => {
                Span::Keys { after: Some(bound_at(row, table, doing)?), through: through.clone() }
            }
            (ReadSoFar::Place(_) | ReadSoFar::Key(_), span) => span.clone(),
        })
    }
}

/// Returns the key that a read by key has reached.
fn bound_at(row: &Row, table: &CatalogTable, doing: &str) -> Result<KeyBound, SourceError> {
    let value = |name: &String| {
        let cell = table.columns.iter().position(|c| c.name == *name).and_then(|at| row.cell(at));
        let cell = cell.ok_or_else(|| SourceError::unexpected(doing, format!("a row without its key {name}")))?;
        std::str::from_utf8(cell).map(str::to_owned).map_err(|_| {
            // Possible only in a database without an encoding.
            SourceError::unsuitable(
                Code::TableUnreadable,
                format!("table {} has keys that are not UTF-8, and only some of its columns may be read", table.name),
                format!("grant SELECT on the whole of {}", quoted(&table.name)),
            )
        })
    };
    table.identity_columns.iter().map(value).collect::<Result<_, _>>().map(KeyBound)
}

/// Returns `None` if the table has no key to read by.
fn range_sql(table: &CatalogTable, leaf: &QualifiedName, range: &Range) -> Option<String> {
    let cells = table.columns.iter().map(|c| match c.needed {
        true => format!("t.{}", escape_identifier(&c.name)),
        false => "NULL".to_owned(),
    });
    let cells = cells.collect::<Vec<_>>().join(", ");
    // The row filter names columns without their table: only the table being read may be in its scope.
    let from = format!("FROM ONLY {} AS t WHERE ", quoted(leaf));
    let filter = table.row_filter_sql();
    let mut sql = match &range.span {
        Span::Places { from: bound, to } => {
            let after = match bound {
                TidBound::Page(page) => format!("ctid >= '({page},0)'::tid"),
                TidBound::Behind(tid) => format!("ctid > '{tid}'::tid"),
            };
            let before = to.map_or_else(String::new, |to| format!(" AND ctid < '({to},0)'::tid"));
            let comma = if table.columns.is_empty() { "" } else { ", " };
            format!("COPY (SELECT ctid{comma}{cells} {from}{after}{before}{filter}")
        }
        Span::Keys { after, through } => {
            let key: Vec<&CatalogColumn> =
                table.identity_columns.iter().map(|name| table.column(name)).collect::<Option<_>>()?;
            let after = after.as_ref().map_or_else(|| "true".to_owned(), |bound| beyond(&key, bound));
            let through = through.as_ref().map_or_else(String::new, |b| format!(" AND {}", up_to(&key, b)));
            let order = key.iter().map(|c| format!("t.{}", escape_identifier(&c.name))).collect::<Vec<_>>().join(", ");
            format!("COPY (SELECT {cells} {from}{after}{through}{filter} ORDER BY {order}")
        }
    };
    if let Some(limit) = range.at_most_rows {
        let _ = write!(sql, " LIMIT {limit}");
    }
    sql.push_str(") TO STDOUT");
    Some(sql)
}

/// The condition for rows whose key comes after the bound.
fn beyond(key: &[&CatalogColumn], bound: &KeyBound) -> String {
    by_row(key, bound, |c| &c.greater).unwrap_or_else(|| by_column(key, bound))
}

fn up_to(key: &[&CatalogColumn], bound: &KeyBound) -> String {
    by_row(key, bound, |c| &c.at_most).unwrap_or_else(|| format!("NOT ({})", by_column(key, bound)))
}

/// As one row comparison, which an index supports. `None` if the columns' operators are in different schemas.
fn by_row(key: &[&CatalogColumn], bound: &KeyBound, operator: impl Fn(&CatalogColumn) -> &String) -> Option<String> {
    let compares = operator(key.first()?);
    if key.iter().any(|c| operator(c) != compares) {
        return None;
    }
    let columns = key.iter().map(|c| c.value()).collect::<Vec<_>>().join(", ");
    let values = key.iter().zip(&bound.0).map(|(c, value)| c.literal(value)).collect::<Vec<_>>().join(", ");
    Some(match key {
        // ROW(a) OPERATOR(…) ROW(b) requires more than one column.
        [_] => format!("{columns} {compares} {values}"),
        _ => format!("ROW({columns}) {compares} ROW({values})"),
    })
}

/// The same as `a > x OR a = x AND (b > y OR …)`.
fn by_column(key: &[&CatalogColumn], bound: &KeyBound) -> String {
    let columns = key.iter().zip(&bound.0).rev();
    columns.fold(String::new(), |rest, (c, value)| {
        let (column, value) = (c.value(), c.literal(value));
        let equal = match rest.is_empty() {
            true => String::new(),
            false => format!(" OR {column} {} {value} AND {rest}", c.equals),
        };
        format!("({column} {} {value}{equal})", c.greater)
    })
}

/// Splits a COPY line without its newline into `(block,offset)` and what follows the tab.
fn split_tid(line: &[u8]) -> Option<(Tid, &[u8])> {
    let line = line.strip_suffix(b"\n")?;
    let end = memchr(b'\t', line).unwrap_or(line.len());
    let tid = std::str::from_utf8(&line[..end]).ok()?.parse().ok()?;
    Some((tid, line.get(end + 1..).unwrap_or_default()))
}

/// How a COPY that was to be stopped ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum CopyEnd {
    /// No rows were left.
    AtOnce,
    /// There were more rows, which were discarded.
    Early,
}

/// Ends a COPY whose remaining rows are not wanted. They are discarded as they arrive; only if they exceed `patience`
/// bytes is the server asked to stop, because it logs every cancelled statement. The transaction may have failed by
/// then, which does not matter: nothing follows but its end.
async fn stop(
    client: &PostgresClient,
    doing: &str,
    mut copy: std::pin::Pin<&mut CopyOutStream>,
    patience: usize,
) -> Result<CopyEnd, SourceError> {
    let (mut thrown_away, mut cancel) = (0, None);
    let ended = loop {
        match copy.try_next().await {
            Ok(Some(line)) => {
                client.receives(line.len());
                thrown_away += line.len();
            }
            Ok(None) if thrown_away == 0 => break CopyEnd::AtOnce,
            Ok(None) => break CopyEnd::Early,
            Err(e) => {
                let error = SourceError::query(doing, e);
                if cancel.is_some() && code(&error) == Some(QUERY_CANCELED) {
                    break CopyEnd::Early;
                }
                return Err(error);
            }
        }
        if thrown_away > patience && cancel.is_none() {
            cancel = Some(client.cancel().await);
            if cancel == Some(CancelRequest::NotSent) {
                tracing::debug!("could not ask postgres to stop a read, throwing its rest away");
            }
        }
    };
    match cancel {
        Some(CancelRequest::Unanswered) => Err(SourceError::unexpected(doing, "no answer to a cancel request")),
        Some(CancelRequest::Handled | CancelRequest::NotSent) | None => Ok(ended),
    }
}

/// Reads the rows with the given keys, each a value for every one of `key_columns`, under one snapshot, and returns
/// that snapshot (`pg_current_snapshot()`). A key that no row can have (a word for an integer) is not an error: it just
/// does not exist. Rows arrive in no particular order, and a key's text may differ from the one that found it (`007`
/// finds 7), so the caller must compare.
pub async fn read_keys(
    client: &PostgresClient,
    table: &CatalogTable,
    key_columns: &[String],
    keys: &[Vec<Bytes>],
    wanted: Wanted,
    on_row: impl FnMut(Row),
) -> Result<String, SourceError> {
    let doing = format!("reading keys of table {}", table.name);
    let columns = key_columns.iter().map(|name| {
        table
            .column(name)
            .ok_or_else(|| SourceError::unexpected(&*doing, format!("a key column {name} that is not there")))
    });
    let key = columns.collect::<Result<Vec<_>, _>>()?;
    let read = read_keys_in_transaction(client, &doing, table, &key, keys, wanted, on_row);
    in_transaction(client, &doing, read).await
}

async fn read_keys_in_transaction(
    client: &PostgresClient,
    doing: &str,
    table: &CatalogTable,
    key: &[&CatalogColumn],
    keys: &[Vec<Bytes>],
    wanted: Wanted,
    on_row: impl FnMut(Row),
) -> Result<String, SourceError> {
    let snapshot = lock(client, doing, table).await?;
    let mut texts: Vec<Vec<&str>> = keys.iter().filter_map(|values| texts(key, values)).collect();
    if texts.is_empty() {
        return Ok(snapshot);
    }
    let cells: Vec<Option<&str>> = match wanted {
        Wanted::WholeRows => table.columns.iter().map(|c| c.needed.then_some(c.name.as_str())).collect(),
        Wanted::KeysOnly => key.iter().map(|c| Some(c.name.as_str())).collect(),
    };
    savepoint(client, doing).await?;
    let rows = match copy_keys(client, doing, table, key, &cells, &texts).await {
        Err(error) if is_bad_value(&error) => {
            back_to_savepoint(client, doing).await?;
            texts = castable(client, doing, key, texts).await?;
            match texts.is_empty() {
                true => Vec::new(),
                false => copy_keys(client, doing, table, key, &cells, &texts).await?,
            }
        }
        other => other?,
    };
    rows.into_iter().for_each(on_row);
    Ok(snapshot)
}

/// Collects the rows, since a value may turn out to be invalid after some of them have arrived.
async fn copy_keys(
    client: &PostgresClient,
    doing: &str,
    table: &CatalogTable,
    key: &[&CatalogColumn],
    cells: &[Option<&str>],
    texts: &[Vec<&str>],
) -> Result<Vec<Row>, SourceError> {
    let sql = keys_sql(table, key, cells, texts);
    let copy = client.copy_out(&sql).await.map_err(|e| SourceError::query(doing, e))?;
    let mut copy = pin!(copy);
    let mut rows = Vec::new();
    while let Some(line) = copy.try_next().await.map_err(|e| SourceError::query(doing, e))? {
        client.receives(line.len());
        let line = line.strip_suffix(b"\n").unwrap_or(&line);
        let mut row = RowBuilder::with_capacity(line.len() + 5 * cells.len());
        parse_copy_line(line, cells.len(), &mut row).map_err(|e| SourceError::unexpected(doing, e.to_string()))?;
        rows.push(row.row());
    }
    Ok(rows)
}

fn keys_sql(table: &CatalogTable, key: &[&CatalogColumn], cells: &[Option<&str>], texts: &[Vec<&str>]) -> String {
    let mut sql = String::from("COPY (SELECT ");
    for (i, name) in cells.iter().enumerate() {
        let name = name.map_or_else(|| "NULL".to_owned(), escape_identifier);
        let _ = write!(sql, "{}{name}", if i == 0 { "" } else { ", " });
    }
    let only = match table.kind {
        TableKind::Table => "ONLY ",
        TableKind::Partitioned => "",
    };
    // The row filter names columns without their table: nothing else that has columns may be in its scope.
    let _ =
        write!(sql, " FROM {only}{} AS t WHERE EXISTS (SELECT FROM {} WHERE ", quoted(&table.name), wanted(key, texts));
    for (i, column) in key.iter().enumerate() {
        let and = if i == 0 { "" } else { " AND " };
        let _ = write!(sql, "{and}{}", column.is_wanted(&format!("wanted.k{i}")));
    }
    let _ = write!(sql, "){}) TO STDOUT", table.row_filter_sql());
    sql
}

/// Returns the keys as a table with columns k0, k1, ... One array for each column: Postgres takes several times as long
/// to parse a VALUES list.
fn wanted(key: &[&CatalogColumn], texts: &[Vec<&str>]) -> String {
    let (mut arrays, mut names) = (Vec::new(), Vec::new());
    for (i, column) in key.iter().enumerate() {
        let mut array = String::from("{");
        for (row, text) in texts.iter().map(|texts| texts[i]).enumerate() {
            array.push_str(if row == 0 { "\"" } else { ",\"" });
            for c in text.chars() {
                if matches!(c, '"' | '\\') {
                    array.push('\\');
                }
                array.push(c);
            }
            array.push('"');
        }
        array.push('}');
        arrays.push(format!("{}::{}[]", escape_literal(&array), column.wanted_type()));
        names.push(format!("k{i}"));
    }
    format!("unnest({}) AS wanted({})", arrays.join(", "), names.join(", "))
}

/// Returns `None` if no row can have these values.
fn texts<'a>(key: &[&CatalogColumn], values: &'a [Bytes]) -> Option<Vec<&'a str>> {
    if key.len() != values.len() {
        return None;
    }
    let text = |(column, value): (&&CatalogColumn, &'a Bytes)| {
        std::str::from_utf8(value).ok().filter(|text| !text.contains('\0') && may_be(column.type_oid, text))
    };
    key.iter().zip(values).map(text).collect()
}

/// Whether the type's output function can have written `text`. Only for types whose output is easy to recognize; it
/// saves asking Postgres, which logs every failed cast.
fn may_be(type_oid: Oid, text: &str) -> bool {
    fn integer<T: FromStr + ToString>(text: &str) -> bool {
        text.parse::<T>().is_ok_and(|n| n.to_string() == text)
    }
    match type_oid {
        20 => integer::<i64>(text),
        21 => integer::<i16>(text),
        23 => integer::<i32>(text),
        26 => integer::<u32>(text),
        2950 => {
            let dash = |at| matches!(at, 8 | 13 | 18 | 23);
            let fits = |(at, b)| if dash(at) { b == b'-' } else { matches!(b, b'0'..=b'9' | b'a'..=b'f') };
            text.len() == 36 && text.bytes().enumerate().all(fits)
        }
        _ => true,
    }
}

/// Returns those that Postgres can cast, by halving the list until the bad ones are isolated.
async fn castable<'a>(
    client: &Client,
    doing: &str,
    key: &[&CatalogColumn],
    texts: Vec<Vec<&'a str>>,
) -> Result<Vec<Vec<&'a str>>, SourceError> {
    let (mut good, mut unknown) = (Vec::new(), vec![texts]);
    // Evaluates every value, so that every cast is made.
    let nulls = key.iter().enumerate().map(|(i, column)| match column.from_text {
        FromText::Cast => format!("wanted.k{i}::{} IS NULL", column.base_type),
        FromText::Literal | FromText::Never => format!("wanted.k{i} IS NULL"),
    });
    let nulls = nulls.collect::<Vec<_>>().join(" OR ");
    while let Some(mut group) = unknown.pop() {
        let sql = format!("SELECT count(*) FROM {} WHERE {nulls}", wanted(key, &group));
        match query(client, doing, &sql).await {
            Ok(_) => good.append(&mut group),
            Err(error) if is_bad_value(&error) => {
                back_to_savepoint(client, doing).await?;
                if group.len() > 1 {
                    unknown.push(group.split_off(group.len() / 2));
                    unknown.push(group);
                }
            }
            Err(error) => return Err(error),
        }
    }
    Ok(good)
}

/// Data exceptions, and violations of a domain's constraints. No error that a renamed type could cause: otherwise no
/// key at all would seem to exist.
fn is_bad_value(error: &SourceError) -> bool {
    code(error).is_some_and(|code| code.starts_with("22") || code.starts_with("23"))
}

async fn savepoint(client: &Client, doing: &str) -> Result<(), SourceError> {
    query(client, doing, "SAVEPOINT keys").await.map(drop)
}

async fn back_to_savepoint(client: &Client, doing: &str) -> Result<(), SourceError> {
    query(client, doing, "ROLLBACK TO SAVEPOINT keys").await.map(drop)
}

/// How a reading transaction finds its rows.
#[derive(Debug, Clone, Copy)]
enum Way {
    /// From one place to another, in order of place.
    ByPlace,
    /// From one key to another, in index order.
    InKeyOrder,
    /// Key by key.
    ByKey,
}

impl Way {
    /// Makes the planner avoid every other way, whatever it believes about the table's size. A way without an
    /// alternative remains possible.
    fn settings(self) -> &'static str {
        match self {
            // Leaves the TID Range Scan and, as a fallback, the sequential scan, which must start at the beginning.
            Way::ByPlace => {
                "SET LOCAL synchronize_seqscans = off;
                SET LOCAL enable_tidscan = on; SET LOCAL enable_seqscan = off; SET LOCAL enable_indexscan = off;
                SET LOCAL enable_indexonlyscan = off; SET LOCAL enable_bitmapscan = off;"
            }
            Way::InKeyOrder => {
                "SET LOCAL enable_seqscan = off;
                SET LOCAL enable_bitmapscan = off; SET LOCAL enable_sort = off;"
            }
            Way::ByKey => "SET LOCAL enable_seqscan = off;",
        }
    }
}

/// Begins a reading transaction over a whole table, with a lock and a snapshot between which the table was not
/// rewritten. Returns the snapshot.
///
/// First the lock, then the snapshot: that is the purpose of LOCK TABLE. A role that may read only some columns may not
/// LOCK; for it a SELECT of no rows takes the same lock, but its snapshot precedes the lock. If a rewrite in between
/// would hide rows from that snapshot ([MVCC caveats]), another attempt is made.
///
/// [MVCC caveats]: https://www.postgresql.org/docs/current/mvcc-caveats.html
async fn lock(client: &Client, doing: &str, table: &CatalogTable) -> Result<String, SourceError> {
    if table.access == Access::Columns {
        // The query that takes the lock is planned, too.
        let results = look(client, doing, &format!("SELECT {}, current_user", planned_now(&table.name))).await?;
        results.iter().flatten().try_for_each(|row| refuse_code(&table.name, &Cells { doing, row }, 0))?;
    }
    let sql = lock_sql(table);
    for attempt in 0..LOCK_ATTEMPTS {
        if attempt > 0 {
            query(client, doing, "ROLLBACK").await?;
        }
        let results = query(client, doing, &sql).await?;
        let [.., snapshot, leaves] = &results[..] else {
            return Err(SourceError::unexpected(doing, "too few results".to_owned()));
        };
        let [row] = &snapshot[..] else {
            return Err(SourceError::unexpected(doing, "no snapshot".to_owned()));
        };
        let row = Cells { doing, row };
        refuse_code(&table.name, &row, 1)?;
        if see_all(doing, &table.name, leaves)? {
            if row.yes(3)? {
                return Err(other_types(&table.name));
            }
            return Ok(row.text(0)?.to_owned());
        }
    }
    Err(rewritten_again(doing))
}

fn rewritten_again(doing: &str) -> SourceError {
    SourceError::unexpected(doing, "a table that is written anew again and again")
}

fn other_types(table: &QualifiedName) -> SourceError {
    SourceError::unsuitable(
        Code::TableChanged,
        format!("table {table} has columns of other types than a moment ago"),
        "nothing is to be done, it is looked at again",
    )
}

fn no_table(leaf: &QualifiedName, table: &QualifiedName) -> SourceError {
    SourceError::unsuitable(
        Code::TableChanged,
        format!("{leaf}, read as table {table}, is no table any more"),
        "put a table in its place, or take it out of the configuration",
    )
}

/// Whether the type of a relevant column is no longer the one described: the casts and operators of a condition are
/// valid for the described types only. They cannot change once the table, or one partition, is locked.
fn types_changed(table: &CatalogTable, way: Way) -> String {
    let compares = !matches!(way, Way::ByPlace) || table.published.row_filter.is_some();
    let columns = table.columns.iter().map(|c| format!("({}, {})", escape_literal(&c.name), c.type_oid));
    let columns = columns.collect::<Vec<_>>().join(", ");
    if !compares || columns.is_empty() {
        return "false".to_owned();
    }
    let now = escape_literal(&quoted(&table.name));
    format!(
        "EXISTS (SELECT FROM (VALUES {columns}) described(name, type)
                  WHERE NOT EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = to_regclass({now})
                                       AND a.attname = described.name AND a.atttypid = described.type))"
    )
}

/// The last two results are the snapshot, and the leaves under that snapshot.
fn lock_sql(table: &CatalogTable) -> String {
    let begin = begin_sql(LOCK_TIMEOUT);
    let name = quoted(&table.name);
    let (only, leaves) = match table.kind {
        TableKind::Table => ("ONLY ", "(SELECT t.oid FROM this t)"),
        TableKind::Partitioned => ("", "(SELECT p.relid FROM this t CROSS JOIN LATERAL pg_partition_tree(t.oid) p)"),
    };
    let lock = match table.access {
        Access::Whole => format!("LOCK TABLE {only}{name} IN ACCESS SHARE MODE"),
        // Not WHERE false, which would not lock the partitions.
        Access::Columns => format!("SELECT FROM {only}{name} LIMIT 0"),
    };
    let (schema, relation) = (escape_literal(&table.name.schema), escape_literal(&table.name.table));
    let (settings, now) = (Way::ByKey.settings(), escape_literal(&name));
    let (planned, changed) = (planned_now(&table.name), types_changed(table, Way::ByKey));
    // pg_relation_filenode() and to_regclass() answer as of now, not as of the snapshot.
    format!(
        "{begin} {settings}
        {lock};
        SELECT pg_current_snapshot(), {planned}, current_user, {changed};
        WITH this AS (SELECT c.oid FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
                       WHERE n.nspname = {schema} AND c.relname = {relation})
        SELECT n.nspname, c.relname,
               coalesce(pg_relation_filenode(c.oid), 0) = c.relfilenode
               AND EXISTS (SELECT FROM this WHERE this.oid = to_regclass({now})), c.relkind
          FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
         WHERE c.oid IN {leaves} AND c.relkind <> 'p' ORDER BY c.oid"
    )
}

/// Whether the snapshot is newer than every rewrite.
fn see_all(doing: &str, table: &QualifiedName, leaves: &[SimpleQueryRow]) -> Result<bool, SourceError> {
    for row in leaves {
        let row = Cells { doing, row };
        if !row.yes(2)? {
            return Ok(false);
        }
        if row.text(3)? != "r" {
            let leaf = QualifiedName { schema: row.text(0)?.to_owned(), table: row.text(1)?.to_owned() };
            return Err(no_table(&leaf, table));
        }
    }
    Ok(true)
}

/// Like [`lock`], but only for the table or partition of each part. Returns the snapshot, and the file that each part
/// lies in. `None` if the name no longer belongs to this part of the table.
async fn lock_leaves(
    client: &Client,
    doing: &str,
    parts: &[Part<'_>],
) -> Result<(String, Vec<Option<Oid>>), SourceError> {
    let leaves = || parts.iter().map(|part| &part.table.leaves[part.range.leaf].name);
    let by_columns = parts.iter().any(|part| part.table.access == Access::Columns);
    let checks = leaves_now_sql(parts);
    if by_columns {
        // The query that takes the lock is planned, too.
        let results = look(client, doing, &checks).await?;
        files_now(doing, parts, results.last().map_or(&[], Vec::as_slice))?;
    }
    let (timeout, way) = match parts {
        [Part { range: Range { span: Span::Keys { .. }, .. }, .. }] => (LOCK_TIMEOUT, Way::InKeyOrder),
        [_] => (LOCK_TIMEOUT, Way::ByPlace),
        _ => (NO_WAIT, Way::ByPlace),
    };
    let names = leaves().map(|name| format!("ONLY {}", quoted(name))).collect::<Vec<_>>().join(", ");
    let lock = match by_columns {
        true => format!("SELECT FROM {names} LIMIT 0"),
        false => format!("LOCK TABLE {names} IN ACCESS SHARE MODE"),
    };
    let sql = format!("{} {} {lock}; {checks}", begin_sql(timeout), way.settings());
    for attempt in 0..LOCK_ATTEMPTS {
        if attempt > 0 {
            query(client, doing, "ROLLBACK").await?;
        }
        let results = query(client, doing, &sql).await?;
        let rows = results.last().map_or(&[][..], Vec::as_slice);
        if let Some(files) = files_now(doing, parts, rows)? {
            let first = rows.first().ok_or_else(|| SourceError::unexpected(doing, "no snapshot"))?;
            return Ok((Cells { doing, row: first }.text(0)?.to_owned(), files));
        }
    }
    Err(rewritten_again(doing))
}

/// One row for each part, in their order; the snapshot comes first.
fn leaves_now_sql(parts: &[Part<'_>]) -> String {
    let part = |(place, Part { table, range }): (usize, &Part<'_>)| {
        let way = match range.span {
            Span::Places { .. } => Way::ByPlace,
            Span::Keys { .. } => Way::InKeyOrder,
        };
        let (leaf, changed) = (&table.leaves[range.leaf], types_changed(table, way));
        let name = escape_literal(&quoted(&leaf.name));
        format!("({place}, {}::oid, {}::oid, to_regclass({name})::oid, {changed})", table.oid, leaf.oid)
    };
    let these = parts.iter().enumerate().map(part).collect::<Vec<_>>().join(", ");
    let planned = planned_code(
        "SELECT place, named FROM these UNION SELECT t.place, a.relid FROM these t, pg_partition_ancestors(t.named) a",
    );
    // These functions, and to_regclass(), answer as of now, not as of the snapshot.
    format!(
        "WITH these(place, whole, leaf, named, changed) AS (VALUES {these}), planned(place, code) AS ({planned})
        SELECT pg_current_snapshot(), planned.code, current_user, these.changed, named.relkind,
               these.named = these.leaf
               AND (these.leaf = these.whole OR these.whole IN (SELECT relid FROM pg_partition_ancestors(these.leaf))),
               pg_relation_filenode(these.leaf), pg_relation_filenode(these.leaf) = c.relfilenode
          FROM these LEFT JOIN planned ON planned.place = these.place
          LEFT JOIN pg_class named ON named.oid = these.named LEFT JOIN pg_class c ON c.oid = these.leaf
         ORDER BY these.place"
    )
}

/// Returns the file of each part. `None` if the snapshot is older than a rewrite.
fn files_now(
    doing: &str,
    parts: &[Part<'_>],
    rows: &[SimpleQueryRow],
) -> Result<Option<Vec<Option<Oid>>>, SourceError> {
    let mut files = Vec::with_capacity(parts.len());
    for (Part { table, range }, row) in parts.iter().zip(rows) {
        let row = Cells { doing, row };
        refuse_code(&table.name, &row, 1)?;
        if row.optional(4)?.is_some_and(|kind| kind != "r") {
            return Err(no_table(&table.leaves[range.leaf].name, &table.name));
        }
        if row.optional(5)? != Some("t") {
            files.push(None);
            continue;
        }
        if row.optional(7)? != Some("t") {
            return Ok(None);
        }
        if row.yes(3)? {
            return Err(other_types(&table.name));
        }
        files.push(Some(row.parse(6)?));
    }
    Ok(Some(files))
}

/// Writes watermarks into the WAL, at least one, and waits until they are flushed. Returns where the last one ends. The
/// stream delivers each as [`crate::change::Delivery::Mark`].
pub async fn emit_marks(client: &Client, nonces: &[Nonce]) -> Result<Lsn, SourceError> {
    let doing = "writing a mark into the WAL";
    let prefix = escape_literal(MARK_PREFIX);
    let marks = nonces.iter().map(|nonce| format!("pg_logical_emit_message(true, {prefix}, '\\x{nonce:?}'::bytea)"));
    // Transactional, because the commit flushes it, whatever the role's synchronous_commit is. `local`: a standby that
    // is down must not hold up a load.
    let sql = format!("SET LOCAL synchronous_commit = local; VALUES ({})", marks.collect::<Vec<_>>().join("), ("));
    let results = match act(client, doing, &sql).await {
        Ok(results) => results,
        Err(error) => {
            if matches!(&error, SourceError::Failed { error, .. } if error.code == "42501") {
                may_emit_marks(client).await?;
            }
            return Err(error);
        }
    };
    let row = results.iter().flatten().last();
    let row = row.ok_or_else(|| SourceError::unexpected(doing, "no position".to_owned()))?;
    Cells { doing, row }.parse(0)
}

/// Checks the privilege that every load and every verification needs: PUBLIC has it unless it was revoked.
///
/// # Errors
/// [`SourceError::Unsuitable`] with the GRANT if the role lacks it.
pub async fn may_emit_marks(client: &Client) -> Result<(), SourceError> {
    let doing = "checking the right to write marks into the WAL";
    // Postgres 17 gave the function a fourth argument.
    let sql = "SELECT has_function_privilege(p.oid, 'EXECUTE'), p.oid::regprocedure, current_user
                 FROM pg_proc p
                WHERE p.proname = 'pg_logical_emit_message' AND p.pronamespace = 'pg_catalog'::regnamespace
                  AND p.proargtypes[2] = 'bytea'::regtype";
    let results = look(client, doing, sql).await?;
    let row = results.iter().flatten().next().ok_or_else(|| SourceError::unexpected(doing, "no such function"))?;
    let row = Cells { doing, row };
    if row.yes(0)? {
        return Ok(());
    }
    let (function, role) = (row.text(1)?, row.text(2)?);
    Err(SourceError::unsuitable(
        Code::WalMarks,
        format!(
            "role {role} may not execute {function}, which every load and verification needs to mark its place in the WAL"
        ),
        Sql::Execute { function, role }.to_string(),
    ))
}

/// Asks for the server's position, what its snapshots see, and the state of the slot. Fails on a standby.
pub async fn sample(client: &Client, slot: &str) -> Result<Sample, SourceError> {
    let doing = "asking for the server's position";
    let sql = format!(
        "SELECT pg_current_snapshot(), pg_current_wal_flush_lsn(), s.slot_name, s.confirmed_flush_lsn, s.wal_status,
                greatest(pg_wal_lsn_diff(pg_current_wal_flush_lsn(), s.restart_lsn), 0), s.active_pid
           FROM (VALUES (1)) one LEFT JOIN pg_replication_slots s ON s.slot_name = {}",
        escape_literal(slot)
    );
    let results = look(client, doing, &sql).await?;
    let row = results.iter().flatten().next();
    let row = Cells { doing, row: row.ok_or_else(|| SourceError::unexpected(doing, "no answer".to_owned()))? };
    let slot = match row.optional(2)? {
        None => None,
        Some(_) => Some(SlotSample {
            confirmed: row.parse_optional(3)?.map(EndLsn),
            wal_status: row.optional(4)?.map(str::to_owned),
            retained_bytes: row.parse_optional(5)?.unwrap_or(0),
            active_pid: row.parse_optional(6)?,
        }),
    };
    Ok(Sample { snapshot: row.text(0)?.to_owned(), flushed: row.parse(1)?, slot })
}

/// A line that COPY TO does not write in text format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadCopyLine {
    #[error("a COPY line with {found} values instead of {expected}")]
    CellCount { expected: usize, found: usize },
    #[error("a COPY line with an escape that COPY TO does not write, in value {cell}")]
    Escape { cell: usize },
}

/// Parses one line of COPY's text format, without its newline, into `cells` cells.
///
/// <https://www.postgresql.org/docs/current/sql-copy.html#id-1.9.3.55.9.2>
pub fn parse_copy_line(line: &[u8], cells: usize, out: &mut RowBuilder) -> Result<(), BadCopyLine> {
    // Tabs inside values are escaped. A line without cells looks like a line with one empty cell.
    let found = if cells == 0 && line.is_empty() { 0 } else { memchr_iter(b'\t', line).count() + 1 };
    if found != cells {
        return Err(BadCopyLine::CellCount { expected: cells, found });
    }
    let escapes = memchr(b'\\', line).is_some();
    let mut rest = line;
    for cell in 0..cells {
        let end = memchr(b'\t', rest).unwrap_or(rest.len());
        let text = &rest[..end];
        match (escapes, text) {
            (false, text) => out.text(text),
            (true, b"\\N") => out.null(),
            (true, text) => {
                let mut good = true;
                out.text_with(|out| good = unescape(text, out));
                if !good {
                    return Err(BadCopyLine::Escape { cell });
                }
            }
        }
        rest = rest.get(end + 1..).unwrap_or_default();
    }
    Ok(())
}

/// Returns `false` for an invalid escape.
fn unescape(mut text: &[u8], out: &mut BytesMut) -> bool {
    while let Some(at) = memchr(b'\\', text) {
        out.put_slice(&text[..at]);
        out.put_u8(match text.get(at + 1) {
            Some(b'b') => 0x08,
            Some(b't') => b'\t',
            Some(b'n') => b'\n',
            Some(b'v') => 0x0b,
            Some(b'f') => 0x0c,
            Some(b'r') => b'\r',
            Some(b'\\') => b'\\',
            // COPY FROM accepts more, COPY TO writes no others.
            Some(_) | None => return false,
        });
        text = &text[at + 2..];
    }
    out.put_slice(text);
    true
}

fn code(error: &SourceError) -> Option<&str> {
    error.server().map(|e| e.code.as_str())
}
