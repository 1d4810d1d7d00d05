//! Reads tables as they are: what the catalog says of them, and their rows in chunks, each with the snapshot that it was
//! read under.
//!
//! It must not know keys, Redis or what the stream has delivered: whether a chunk may be used is decided by whoever
//! compares its snapshot with the stream. Where it is wrong, rows are missing from a load without a trace, or have another
//! shape than the stream gives them.
//!
//! Everything goes over one ordinary connection, whose settings every transaction pins ([`PINS`]): `search_path` is
//! `pg_catalog`, so every other name is qualified. A reading call opens a transaction and ends it, also when it fails.
//! A call that is *dropped* half-way leaves its transaction open: throw the client away then.
//!
//! No code of a table's, type's or schema's owner may run as the role that reads. Nothing but real tables is read; no
//! value is cast where a cast function or a domain's constraint could be the owner's ([`FromText`]); and where the planner
//! alone would call a function of theirs ([`planned_code`]), a role that may replicate does not read.

use super::SourceError;
use super::answer::{Cells, PINS, act, in_transaction, look, query, quoted};
use super::assemble::MARK_PREFIX;
use super::connect::{CancelRequest, PostgresClient};
use super::slot::MAY_REPLICATE;
use crate::change::{Nonce, Row, RowBuilder};
use crate::fingerprint::Fingerprint;
use crate::loader::range::{Extent, KeyBound, Range, Sizes, Span, Tid, TidBound};
use crate::lsn::{EndLsn, Lsn};
use crate::remedy::Sql;
use crate::schema::{CatalogMark, Oid, QualifiedName, Relation, RelationColumn, ReplicaIdentity};
use bytes::{BufMut, Bytes, BytesMut};
use futures_util::TryStreamExt;
use memchr::{memchr, memchr_iter};
use postgres_protocol::escape::{escape_identifier, escape_literal};
use std::collections::{HashMap, HashSet};
use std::fmt::Write;
use std::num::NonZeroU64;
use std::pin::pin;
use std::str::FromStr;
use std::time::Duration;
use tokio_postgres::{Client, CopyOutStream, SimpleQueryRow};

/// How long a read waits for somebody's lock on the table (TRUNCATE, VACUUM FULL, most of ALTER TABLE). Meanwhile it holds
/// up nobody but the next of those.
const LOCK_TIMEOUT: Duration = Duration::from_secs(10);
/// No time at all, as far as Postgres has that.
const NO_WAIT: Duration = Duration::from_millis(1);
/// How long a description waits for one: only sizes that are measured, and since Postgres 16 the columns that are published,
/// take locks, each for a moment.
const DESCRIBE_LOCK_TIMEOUT: Duration = Duration::from_secs(1);
/// How long a daemon that is frozen between two statements keeps its lock on the table, and an ALTER TABLE behind that,
/// and everybody else behind this one.
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);
/// Tables that are described by one query.
const TABLES_A_QUERY: usize = 1_000;
/// Columns, or partitions, of one answer about several tables: it is held in memory as a whole.
const ROWS_AN_ANSWER: u64 = 20_000;
/// Tables that inherit from one, as far as they are named.
const HEIRS_NAMED: u32 = 3;
/// Attempts to get a lock and a snapshot between which the table was not written anew. Each one more takes another rewrite.
const LOCK_ATTEMPTS: u32 = 10;
/// Bytes of heap in one page (`BLCKSZ`) of every packaged Postgres.
const PAGE_BYTES: u64 = 8192;

const QUERY_CANCELED: &str = "57014";
const UNDEFINED_TABLE: &str = "42P01";
const UNDEFINED_SCHEMA: &str = "3F000";

/// A table as the catalog and the publication describe it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CatalogTable {
    pub oid: Oid,
    pub name: QualifiedName,
    pub kind: TableKind,
    pub identity: ReplicaIdentity,
    /// The columns of the primary key or of the index that is the identity; under FULL those of the primary key. Empty
    /// where there is none that can serve: a deferrable key cannot.
    pub identity_columns: Vec<String>,
    pub published: Published,
    /// What the stream sends, in its order: no generated columns (unless they are published), only those of a column list.
    pub columns: Vec<CatalogColumn>,
    pub estimated: Estimated,
    /// What holds rows: the table itself, or its partitions at the lowest level. Ordered by oid.
    pub leaves: Vec<Leaf>,
    /// What the role may read of it.
    pub access: Access,
    /// Columns that the stream leaves out because they are generated.
    pub generated: Vec<String>,
    /// Tables that inherit from it, partitions aside: a SELECT shows their rows, the stream and a load do not bring them.
    pub heirs: Heirs,
}

/// How the publication has a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Published {
    /// The publication lists it. Otherwise the table is described as if it were published whole.
    pub is_listed: bool,
    /// An SQL condition on the columns, every name in it qualified.
    pub row_filter: Option<String>,
    /// Other than before where the table, or the publication itself, left and came back. What happened in between was not
    /// sent, and since Postgres 18 no error says so.
    pub membership: String,
}

/// A guess from the last ANALYZE and the present size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Estimated {
    pub rows: u64,
    /// Heap and TOAST, as stored: large values are usually compressed there.
    pub bytes: u64,
}

/// Tables that inherit directly from another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Heirs {
    pub count: u64,
    /// The first few of them.
    pub some: Vec<QualifiedName>,
}

/// What a role may read of a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    Whole,
    /// The columns that are needed. Not `ctid`, nor may it LOCK the table.
    Columns,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TableKind {
    Table,
    Partitioned,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CatalogColumn {
    pub name: String,
    pub type_oid: Oid,
    pub type_modifier: i32,
    /// Its type, or what it is a domain over, through any depth. As SQL writes it, qualified and without a modifier:
    /// `pg_catalog."varchar"`.
    pub base_type: String,
    pub from_text: FromText,
    /// boolean, or a domain over it, through any depth.
    pub boolean: bool,
    /// The type's own equality, as SQL writes it: an extension's type has it in another schema than `pg_catalog`, and a
    /// plain `=` would fall back to that of another type, which no index serves.
    pub equals: String,
    /// Its `>` and `<=`, of the order that ORDER BY goes by.
    pub greater: String,
    pub at_most: String,
    /// Its number, which another column of the same name does not have, and a digest of what its type is made of: the labels
    /// of enums, the attributes of composite types, the types of elements and subtypes, through any depth.
    pub made_of: String,
    /// The configuration chooses it, or it identifies rows. The others are not read, and the role needs no right to them.
    pub needed: bool,
}

/// How a text becomes a value of a column's base type, without running code of whoever owns that.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FromText {
    /// By a cast: all of those came with the server.
    Cast,
    /// As a literal, which takes the type's input function and no cast: `CREATE CAST (text AS …)` is its owner's right.
    Literal,
    /// Not at all: it is an array of such values, has domains inside (or may get some), whose constraints its input function
    /// checks, or is a range with functions of its owner: to read a value calls the canonical one, and to plan a comparison
    /// of order the difference.
    Never,
}

/// A table without partitions, or one partition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leaf {
    pub oid: Oid,
    pub name: QualifiedName,
    /// Changes when all its rows are written anew: TRUNCATE, VACUUM FULL, CLUSTER, many an ALTER TABLE.
    pub filenode: Oid,
    /// The transaction that last changed its entry in `pg_class`, so that gave it this file or came later; `None` where it
    /// changes just now.
    pub changed_by: Option<u32>,
    pub pages: u32,
}

/// A part of a table that is to be read.
#[derive(Debug, Clone, Copy)]
pub struct Part<'a> {
    pub table: &'a CatalogTable,
    pub range: &'a Range,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReadRange {
    Rows(ReadRows),
    /// The table or partition is called otherwise by now, or it is gone, or no longer a part of the whole.
    Gone,
}

/// What a range was read under, and what is left of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReadRows {
    /// `pg_current_snapshot()`.
    pub snapshot: String,
    /// As it is now, and stays while the read lasts. Where it differs from [`Leaf::filenode`], rows may have moved between
    /// ranges.
    pub filenode: Oid,
    pub rows: u64,
    /// Of the rows as they are kept in memory.
    pub bytes: usize,
    /// What the limit left over, from right behind the last row.
    pub rest: Option<Range>,
}

/// Which cells a lookup by key brings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    /// All of [`CatalogTable::columns`].
    WholeRows,
    /// The key's columns, in the order they were asked by.
    KeysOnly,
}

/// Where the server is, and what its snapshots see: taken together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sample {
    /// `pg_current_snapshot()`.
    pub snapshot: String,
    /// The WAL is on disk up to here. At a page boundary this may include the page's header, see
    /// [`Lsn::before_page_header`].
    pub flushed: Lsn,
    /// `None` = there is no such slot.
    pub slot: Option<SlotSample>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlotSample {
    pub confirmed: Option<EndLsn>,
    /// `reserved`, `extended`, `unreserved`, `lost`.
    pub wal_status: Option<String>,
    /// WAL that the slot keeps from being removed.
    pub retained_bytes: u64,
    /// The walsender that holds it.
    pub active_pid: Option<i32>,
}

impl CatalogTable {
    /// The shape of the rows that a load yields: that of the stream.
    pub fn relation(&self) -> Relation {
        let in_identity = |name: &String| match self.identity {
            ReplicaIdentity::Full => true,
            ReplicaIdentity::Nothing => false,
            ReplicaIdentity::Default | ReplicaIdentity::Index => self.identity_columns.contains(name),
        };
        let column = |c: &CatalogColumn| RelationColumn {
            name: c.name.clone(),
            type_oid: c.type_oid,
            type_modifier: c.type_modifier,
            in_identity: in_identity(&c.name),
        };
        Relation {
            oid: self.oid,
            name: self.name.clone(),
            identity: self.identity,
            columns: self.columns.iter().map(column).collect(),
        }
    }

    /// How it can be cut into chunks.
    pub fn extent(&self) -> Extent {
        match self.access {
            Access::Whole => Extent::Pages(self.leaves.iter().map(|leaf| leaf.pages).collect()),
            Access::Columns => Extent::Leaves(self.leaves.len()),
        }
    }

    /// What the stream does not tell of.
    pub fn mark(&self) -> CatalogMark {
        let (mut shape, mut storage) = (Fingerprint::default(), Fingerprint::default());
        shape.add(&self.oid.to_le_bytes());
        shape.add(self.published.row_filter.as_deref().unwrap_or_default().as_bytes());
        let made_of = self.columns.iter().filter(|c| c.needed).map(|c| c.made_of.as_str());
        shape.add(made_of.collect::<Vec<_>>().join(",").as_bytes());
        shape.add(self.published.membership.as_bytes());
        for leaf in &self.leaves {
            shape.add(&leaf.oid.to_le_bytes());
            storage.add(&leaf.filenode.to_le_bytes());
        }
        CatalogMark { shape: shape.get(), storage: storage.get() }
    }

    /// Which rows a query shows and the cache does not have, as a warning. `None` where there can be none.
    pub fn left_out(&self, publication: &str) -> Option<String> {
        let Heirs { count, some } = &self.heirs;
        let add = Sql::AddTable { publication, table: some.first()? };
        let (name, named) = (&self.name, some.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "));
        let more = if *count > some.len() as u64 { ", …" } else { "" };
        let inherit = if *count == 1 { "1 table inherits" } else { &format!("{count} tables inherit") };
        Some(format!(
            "{inherit} from {name} ({named}{more}): a query of {name} shows their rows, and they are not cached: make it a \
             partitioned table, or configure each of them as a table of its own, and publish it: {add}"
        ))
    }

    /// The transaction that made the files of all leaves what they are, where one did and nothing came later.
    pub fn written_by(&self) -> Option<u32> {
        let first = self.leaves.first()?.changed_by;
        first.filter(|_| self.leaves.iter().all(|leaf| leaf.changed_by == first))
    }

    fn column(&self, name: &str) -> Option<&CatalogColumn> {
        self.columns.iter().find(|c| c.name == name)
    }

    fn row_filter_sql(&self) -> String {
        self.published.row_filter.as_ref().map_or_else(String::new, |filter| format!(" AND ({filter})"))
    }
}

impl CatalogColumn {
    /// Its value in `t`, of the base type: a domain's owner may make operators of the same names for the domain.
    fn value(&self) -> String {
        format!("t.{}::{}", escape_identifier(&self.name), self.base_type)
    }

    /// A text as a value of the base type. Not for [`FromText::Never`].
    fn literal(&self, text: &str) -> String {
        format!("{}::{}", escape_literal(text), self.base_type)
    }

    /// The condition that it has the value in column `k` of [`wanted`], which is of the type that [`Self::wanted_type`]
    /// says.
    fn is_wanted(&self, k: &str) -> String {
        match self.from_text {
            FromText::Cast => format!("{} {} {k}::{}", self.value(), self.equals, self.base_type),
            FromText::Literal => format!("{} {} {k}", self.value(), self.equals),
            // As COPY writes it, by the output function.
            FromText::Never => format!("format('%s', t.{}) OPERATOR(pg_catalog.=) {k}", escape_identifier(&self.name)),
        }
    }

    fn wanted_type(&self) -> &str {
        match self.from_text {
            FromText::Cast | FromText::Never => "pg_catalog.text",
            FromText::Literal => &self.base_type,
        }
    }
}

/// A table that is to be described.
#[derive(Debug, Clone, Copy)]
pub struct Asked<'a> {
    pub name: &'a QualifiedName,
    /// The columns that the configuration chooses, none of them meaning all.
    pub chosen: &'a [String],
}

/// What the catalog says of a table. `None` where there is none of that name. What can never be followed, or could not be
/// looked at, is an error that says so.
pub type Described = Result<Option<CatalogTable>, SourceError>;

/// [`describe_all`] for one table.
pub async fn describe(
    client: &Client,
    name: &QualifiedName,
    publication: &str,
    chosen: &[String],
    sizes: Sizes,
) -> Described {
    describe_alone(client, Asked { name, chosen }, publication, sizes).await?
}

/// Asks the catalog for tables, as `publication` publishes them (or would, if it does not yet): one answer for each, in
/// their order.
///
/// # Errors
/// Where the connection was lost, or the server could not answer this time.
pub async fn describe_all(
    client: &Client,
    asked: &[Asked<'_>],
    publication: &str,
    sizes: Sizes,
) -> Result<Vec<Described>, SourceError> {
    let mut out = Vec::with_capacity(asked.len());
    for some in asked.chunks(TABLES_A_QUERY) {
        match describe_some(client, some, publication, sizes).await {
            Ok(described) => out.extend(described),
            // One of them keeps the others from being looked at.
            Err(error) if error.is_about_the_table() => {
                for one in some {
                    out.push(describe_alone(client, *one, publication, sizes).await?);
                }
            }
            Err(error) => return Err(error),
        }
    }
    Ok(out)
}

async fn describe_alone(
    client: &Client,
    asked: Asked<'_>,
    publication: &str,
    sizes: Sizes,
) -> Result<Described, SourceError> {
    match describe_some(client, &[asked], publication, sizes).await {
        Ok(mut described) => Ok(described.pop().expect("an answer for each table")),
        Err(error) if error.is_about_the_table() => Ok(Err(error)),
        Err(error) => Err(error),
    }
}

/// Sizes are those of the last ANALYZE where one of the tables is locked.
async fn describe_some(
    client: &Client,
    asked: &[Asked<'_>],
    publication: &str,
    sizes: Sizes,
) -> Result<Vec<Described>, SourceError> {
    match describe_at_once(client, asked, publication, sizes).await {
        Err(error) if sizes == Sizes::Measured && error.is_about_a_lock() => {
            describe_at_once(client, asked, publication, Sizes::Remembered).await
        }
        described => described,
    }
}

/// What the catalog has of a table, before its columns and partitions are asked for.
struct Head {
    place: usize,
    oid: Oid,
    attributes: u64,
    leaves: u64,
    row: SimpleQueryRow,
}

/// All of them as one snapshot sees them.
async fn describe_at_once(
    client: &Client,
    asked: &[Asked<'_>],
    publication: &str,
    sizes: Sizes,
) -> Result<Vec<Described>, SourceError> {
    let doing = match asked {
        [one] => format!("describing table {}", one.name),
        _ => format!("describing {} tables", asked.len()),
    };
    let (heads, columns, leaves) = in_transaction(client, &doing, async {
        let begin = format!("{} {}", begin_sql(DESCRIBE_LOCK_TIMEOUT), heads_sql(asked, publication));
        let results = query(client, &doing, &begin).await?;
        let heads = results.into_iter().last().unwrap_or_default().into_iter().map(|row| {
            let cells = Cells { doing: &doing, row: &row };
            let (oid, place) = (cells.parse(0)?, cells.parse(22)?);
            let (attributes, leaves) = (cells.parse(23)?, cells.parse(24)?);
            Ok(Head { place, oid, attributes, leaves, row })
        });
        let heads = heads.collect::<Result<Vec<_>, SourceError>>()?;
        let columns = |these: &str| columns_sql(these, publication);
        let columns = rows_of(client, &doing, &heads, |head| head.attributes, columns).await?;
        let leaves = rows_of(client, &doing, &heads, |head| head.leaves, |these| leaves_sql(these, sizes)).await?;
        Ok((heads, columns, leaves))
    })
    .await?;
    let mut described: Vec<Described> = asked.iter().map(|_| Ok(None)).collect();
    for Head { place, row, .. } in &heads {
        let Asked { name, chosen } = asked[*place];
        let question = Question { doing: &doing, name, publication, chosen };
        let (columns, leaves) = (columns.get(place), leaves.get(place));
        let (columns, leaves) = (columns.map_or(&[][..], Vec::as_slice), leaves.map_or(&[][..], Vec::as_slice));
        described[*place] = catalog_table(&question, row, columns, leaves).map(Some);
    }
    Ok(described)
}

/// What a query answers about each of these tables, by their place: its first column. It is given a query of all their
/// columns in `pg_class`, and `place`. Of many rows, as `weight` foretells, it is asked in parts: each answer is held in
/// memory.
async fn rows_of(
    client: &Client,
    doing: &str,
    heads: &[Head],
    weight: impl Fn(&Head) -> u64,
    sql: impl Fn(&str) -> String,
) -> Result<HashMap<usize, Vec<SimpleQueryRow>>, SourceError> {
    let mut out: HashMap<usize, Vec<SimpleQueryRow>> = HashMap::new();
    let mut rows = 0;
    let parts = heads.chunk_by(|_, next| {
        rows += weight(next);
        let fits = rows <= ROWS_AN_ANSWER;
        rows = if fits { rows } else { 0 };
        fits
    });
    for part in parts {
        let places = part.iter().map(|Head { place, oid, .. }| format!("({place}, {oid}::oid)")).collect::<Vec<_>>();
        let places = places.join(", ");
        let these =
            format!("SELECT w.place, c.* FROM (VALUES {places}) w(place, oid) JOIN pg_class c ON c.oid = w.oid");
        for row in query(client, doing, &sql(&these)).await?.into_iter().flatten() {
            let place = Cells { doing, row: &row }.parse(0)?;
            out.entry(place).or_default().push(row);
        }
    }
    Ok(out)
}

/// What the table with this oid is called now; `None` where it is gone.
pub async fn name_of(client: &Client, oid: Oid) -> Result<Option<QualifiedName>, SourceError> {
    let doing = "looking for a table under another name";
    let sql = format!(
        "SELECT n.nspname, c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = {oid}"
    );
    let results = look(client, doing, &sql).await?;
    let Some(row) = results.iter().flatten().next() else { return Ok(None) };
    let row = Cells { doing, row };
    Ok(Some(QualifiedName { schema: row.text(0)?.to_owned(), table: row.text(1)?.to_owned() }))
}

/// The columns of the primary key of `c`, or of the index that is its identity: as RelationGetIndexList chooses it, which
/// leaves deferrable and invalid ones out.
const IDENTITY: &str = "(SELECT json_agg(a.attname ORDER BY k.place)
           FROM pg_index i
          CROSS JOIN LATERAL unnest(i.indkey) WITH ORDINALITY AS k(attnum, place)
           JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.attnum
          WHERE i.indrelid = c.oid AND i.indisvalid AND i.indimmediate AND k.place <= i.indnkeyatts
            AND CASE c.relreplident WHEN 'i' THEN i.indisreplident WHEN 'n' THEN false ELSE i.indisprimary END)";

/// Four columns about `c` for [`readable`]. LOCK TABLE and `ctid` take the right to the whole table.
const RIGHTS: &str = "has_schema_privilege(c.relnamespace, 'USAGE'), has_table_privilege(c.oid, 'SELECT'),
               CASE WHEN NOT has_table_privilege(c.oid, 'SELECT') THEN
                   (SELECT json_agg(h.attname) FROM pg_attribute h
                     WHERE h.attrelid = c.oid AND h.attnum > 0 AND NOT h.attisdropped
                       AND NOT has_column_privilege(c.oid, h.attnum, 'SELECT')) END,
               row_security_active(c.oid)";

/// A recursive query for the tables of `this` and all that are partitions of them: place and oid. Unlike
/// pg_partition_tree(), it waits for nobody's lock.
const TREE: &str = "SELECT place, oid FROM this
         UNION ALL
        SELECT tree.place, i.inhrelid
          FROM tree JOIN pg_class k ON k.oid = tree.oid AND k.relkind = 'p'
          JOIN pg_inherits i ON i.inhparent = tree.oid AND NOT i.inhdetachpending";

/// A query for what the publication lists, a row each: its oid, the numbers of its columns, its row filter. As
/// `pg_publication_tables` has it, whose plan may ask for the whole list once for each table. Servers before 15 have neither
/// columns nor filters: both names then mean those of `older`.
fn listed_sql(publication: &str) -> String {
    format!(
        "SELECT listed.* FROM (VALUES (NULL::int2vector, NULL::pg_node_tree)) older(attrs, qual)
          CROSS JOIN LATERAL (
                SELECT relid, attrs, qual
                  FROM pg_publication p CROSS JOIN LATERAL pg_get_publication_tables(p.pubname::text)
                 WHERE p.pubname = {}) listed",
        escape_literal(publication)
    )
}

fn heads_sql(asked: &[Asked<'_>], publication: &str) -> String {
    let name = |(place, Asked { name, .. }): (usize, &Asked<'_>)| {
        format!("({place}, {}, {})", escape_literal(&name.schema), escape_literal(&name.table))
    };
    let names = asked.iter().enumerate().map(name).collect::<Vec<_>>().join(", ");
    let (listed, planned_code) = (listed_sql(publication), planned_code("SELECT place, oid FROM family"));
    let publication = escape_literal(publication);
    let heirs_count =
        "CASE WHEN c.relkind = 'p' THEN 0 ELSE (SELECT count(*) FROM pg_inherits i WHERE i.inhparent = c.oid) END";
    // Schema and name by turns.
    let heirs_names = format!(
        "(SELECT json_agg(h.part ORDER BY h.oid, h.place)
            FROM (SELECT i.oid, p.part, p.place
                    FROM (SELECT h.oid, hn.nspname, h.relname
                            FROM pg_inherits i JOIN pg_class h ON h.oid = i.inhrelid
                            JOIN pg_namespace hn ON hn.oid = h.relnamespace
                           WHERE c.relkind <> 'p' AND i.inhparent = c.oid ORDER BY h.oid LIMIT {HEIRS_NAMED}) i
                   CROSS JOIN LATERAL (VALUES (i.nspname, 1), (i.relname, 2)) p(part, place)) h)"
    );
    format!(
        "WITH RECURSIVE this AS MATERIALIZED (
            SELECT w.place, c.* FROM (VALUES {names}) w(place, schema, name)
              JOIN pg_namespace n ON n.nspname = w.schema::name
              JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = w.name::name),
        tree(place, oid) AS ({TREE}),
        ancestors(place, oid) AS (
            SELECT c.place, a.relid FROM this c CROSS JOIN LATERAL pg_partition_ancestors(c.oid) a
             WHERE c.relispartition AND a.relid <> c.oid),
        -- The bounds of a partition that has partitions are planned, too, in terms of its ancestors' keys.
        family(place, oid) AS (SELECT place, oid FROM tree UNION ALL SELECT place, oid FROM ancestors),
        planned(place, code) AS ({planned_code}),
        listed(oid, attrs, qual) AS MATERIALIZED ({listed}),
        whole(place, oid) AS (SELECT a.place, min(l.oid) FROM ancestors a JOIN listed l ON l.oid = a.oid GROUP BY 1),
        part(place, oid) AS (
            SELECT t.place, min(l.oid) FROM tree t JOIN this c ON c.place = t.place AND c.oid <> t.oid
              JOIN listed l ON l.oid = t.oid GROUP BY 1),
        leaves(place, count) AS (SELECT place, count(*) FROM tree GROUP BY 1)
        SELECT c.oid, c.relkind, c.relpersistence, c.relreplident, pg_relation_is_publishable(c.oid), {IDENTITY},
               l.oid IS NOT NULL, pg_get_expr(l.qual, l.oid), whole.oid::regclass, part.oid::regclass, {RIGHTS}, current_user,
               -- Row filter and column list, since 15. Of the filter's tree the columns that it reads.
               (SELECT json_agg(DISTINCT f.attname)
                  FROM pg_publication p JOIN pg_publication_rel r ON r.prpubid = p.oid AND r.prrelid = c.oid
                 CROSS JOIN LATERAL regexp_matches(to_jsonb(r) ->> 'prqual', ':varattno ([0-9]+)', 'g') var
                  JOIN pg_attribute f ON f.attrelid = c.oid AND f.attnum = var[1]::int
                 WHERE p.pubname = {publication}),
               EXISTS (SELECT FROM pg_publication p JOIN pg_publication_rel r ON r.prpubid = p.oid AND r.prrelid = c.oid
                        WHERE p.pubname = {publication} AND to_jsonb(r) ->> 'prattrs' IS NOT NULL),
               (SELECT p.oid || ' ' || p.xmin || ' ' || coalesce(r.oid, 0) FROM pg_publication p
                  LEFT JOIN pg_publication_rel r ON r.prpubid = p.oid AND r.prrelid = c.oid
                 WHERE p.pubname = {publication}),
               {heirs_count}, {heirs_names},
               (SELECT json_agg(g.attname) FROM pg_attribute g
                 WHERE g.attrelid = c.oid AND g.attgenerated <> '' AND NOT g.attisdropped),
               planned.code, c.place, c.relnatts, leaves.count
          FROM this c JOIN leaves ON leaves.place = c.place LEFT JOIN planned ON planned.place = c.place
          LEFT JOIN listed l ON l.oid = c.oid LEFT JOIN whole ON whole.place = c.place
          LEFT JOIN part ON part.place = c.place"
    )
}

/// What the publication sends of the columns of these tables, in the order that it sends them.
fn columns_sql(these: &str, publication: &str) -> String {
    let listed = listed_sql(publication);
    // The type's own comparisons, by their strategy in its default btree operator class.
    let operator = |strategy: u8, otherwise: &str| {
        format!(
            "coalesce((SELECT format('OPERATOR(%I.%s)', n.nspname, o.oprname)
                           FROM pg_opclass k
                           JOIN pg_amop m ON m.amopfamily = k.opcfamily AND m.amopstrategy = {strategy}
                                         AND m.amoplefttype = k.opcintype AND m.amoprighttype = k.opcintype
                           JOIN pg_operator o ON o.oid = m.amopopr JOIN pg_namespace n ON n.oid = o.oprnamespace
                          WHERE k.opcintype = base.oid AND k.opcdefault
                            AND k.opcmethod = (SELECT oid FROM pg_am WHERE amname = 'btree')), 'OPERATOR(pg_catalog.{otherwise})')"
        )
    };
    let (equals, greater, at_most) = (operator(3, "="), operator(5, ">"), operator(2, "<="));
    format!(
        "WITH RECURSIVE this AS MATERIALIZED ({these}),
        listed(oid, attrs, qual) AS MATERIALIZED ({listed}),
        a AS MATERIALIZED (
            SELECT c.place, a.* FROM this c JOIN pg_attribute a ON a.attrelid = c.oid LEFT JOIN listed l ON l.oid = c.oid
             WHERE a.attnum > 0 AND NOT a.attisdropped AND (l.attrs IS NULL OR a.attnum = ANY (l.attrs))
               -- Before 18 never published, whatever 15 says in attrs; from 18 on attrs is exact, where it is there.
               AND (a.attgenerated = '' OR (current_setting('server_version_num')::int >= 180000
                                            AND a.attnum = ANY (l.attrs)))),
        -- Each type once, however many columns are of it: itself, and what it is a domain over, through any depth.
        chain(type, oid, typtype, typbasetype) AS (
            SELECT t.oid, t.oid, t.typtype, t.typbasetype FROM pg_type t WHERE t.oid IN (SELECT a.atttypid FROM a)
             UNION ALL
            SELECT chain.type, t.oid, t.typtype, t.typbasetype FROM chain JOIN pg_type t ON t.oid = chain.typbasetype
             WHERE chain.typtype = 'd'),
        -- The types that its values are made of. Those of the server itself, below 16384, never change.
        reached(type, oid) AS (
            SELECT a.atttypid, a.atttypid FROM a WHERE a.atttypid >= 16384
             UNION
            SELECT reached.type, part.oid
              FROM reached JOIN pg_type t ON t.oid = reached.oid
             CROSS JOIN LATERAL (
                SELECT t.typbasetype UNION ALL SELECT t.typelem
                 UNION ALL
                SELECT x.atttypid FROM pg_attribute x
                 WHERE x.attrelid = t.typrelid AND x.attnum > 0 AND NOT x.attisdropped
                 UNION ALL
                SELECT g.rngsubtype FROM pg_range g WHERE g.rngtypid = t.oid
                 UNION ALL
                SELECT g.rngtypid FROM pg_range g WHERE g.rngmultitypid = t.oid) part(oid)
             WHERE part.oid >= 16384),
        made_of(type, what) AS (
            SELECT reached.type, reached.oid || ' ' || coalesce(
                       (SELECT json_agg(e.enumlabel ORDER BY e.oid)::text FROM pg_enum e WHERE e.enumtypid = t.oid),
                       (SELECT json_agg(json_build_array(x.attnum, x.atttypid, x.atttypmod) ORDER BY x.attnum)::text
                          FROM pg_attribute x
                         WHERE x.attrelid = t.typrelid AND x.attnum > 0 AND NOT x.attisdropped), '')
              FROM reached JOIN pg_type t ON t.oid = reached.oid),
        types AS MATERIALIZED (
            SELECT base.type, format('%I.%I', bn.nspname, bt.typname) AS base, base.oid = 'bool'::regtype AS boolean,
                   {equals} AS equals, {greater} AS greater, {at_most} AS at_most,
                   (SELECT hashtextextended(string_agg(of.what, ';' ORDER BY of.what), 0) FROM made_of of
                     WHERE of.type = base.type) AS made_of,
                   CASE WHEN base.oid < 16384 THEN 'cast'
                        WHEN bt.typcategory = 'A' THEN 'never'
                        -- A composite type may get an attribute of a domain at any time.
                        WHEN EXISTS (SELECT FROM reached r JOIN pg_type t ON t.oid = r.oid
                                      WHERE r.type = base.type AND t.typtype IN ('c', 'd') AND r.oid NOT IN
                                            (SELECT over.oid FROM chain over WHERE over.type = base.type AND over.typtype = 'd'))
                        THEN 'never'
                        WHEN EXISTS (SELECT FROM reached r JOIN pg_range g ON r.oid IN (g.rngtypid, g.rngmultitypid)
                                      WHERE r.type = base.type
                                        AND (g.rngcanonical::oid >= 16384 OR g.rngsubdiff::oid >= 16384))
                        THEN 'never'
                        ELSE 'literal' END AS from_text
              FROM chain base
              JOIN pg_type bt ON bt.oid = base.oid JOIN pg_namespace bn ON bn.oid = bt.typnamespace
             WHERE base.typtype <> 'd')
        SELECT a.place, a.attname, a.atttypid, a.atttypmod, types.base, types.boolean, types.equals, types.greater,
               types.at_most, a.attnum || ' ' || coalesce(types.made_of::text, ''), types.from_text
          FROM a JOIN types ON types.type = a.atttypid
         ORDER BY a.place, a.attnum"
    )
}

/// What holds the rows of these tables.
fn leaves_sql(these: &str, sizes: Sizes) -> String {
    let (pages, bytes) = match sizes {
        Sizes::Measured => ("pg_relation_size(c.oid) / current_setting('block_size')::int", "pg_table_size(c.oid)"),
        Sizes::Remembered => {
            ("greatest(c.relpages, 0)", "greatest(c.relpages, 0) * current_setting('block_size')::bigint")
        }
    };
    format!(
        "WITH RECURSIVE this AS MATERIALIZED ({these}), tree(place, oid) AS ({TREE})
        SELECT tree.place, c.oid, n.nspname, c.relname, c.relkind, c.relpersistence, c.relreplident, {IDENTITY},
               pg_relation_filenode(c.oid), {pages}, {bytes}, c.relpages, c.reltuples::float8, {RIGHTS},
               -- The function answers as of now, whatever the snapshot sees.
               CASE WHEN pg_relation_filenode(c.oid) = c.relfilenode THEN c.xmin::text END
          FROM tree JOIN pg_class c ON c.oid = tree.oid JOIN pg_namespace n ON n.oid = c.relnamespace
         WHERE c.relkind <> 'p'
         ORDER BY tree.place, c.oid"
    )
}

/// A query for functions that another role may replace, and that Postgres calls as the reading role when it merely plans to
/// read one of `relations` (a query of place and oid), one a place: the planner simplifies the expressions of indexes,
/// statistics and partition keys, and calls IMMUTABLE functions of constants for that. No row where there is none, or where
/// the reading role, and every role that it can become, may not replicate: then there is little to be gained.
///
/// `eval_const_expressions` in relcache.c, plancat.c and partcache.c
fn planned_code(relations: &str) -> String {
    format!(
        "SELECT f.place, min(p.oid::regprocedure::text)
            FROM ({relations}) f(place, oid)
           CROSS JOIN LATERAL (
                  SELECT 'pg_class'::regclass AS class, i.indexrelid AS oid FROM pg_index i
                   WHERE i.indrelid = f.oid AND (i.indexprs IS NOT NULL OR i.indpred IS NOT NULL)
                   UNION ALL
                  SELECT 'pg_statistic_ext'::regclass, s.oid FROM pg_statistic_ext s WHERE s.stxrelid = f.oid
                   UNION ALL
                  SELECT 'pg_class'::regclass, k.partrelid FROM pg_partitioned_table k
                   WHERE k.partrelid = f.oid) holder
            JOIN pg_depend d ON d.classid = holder.class AND d.objid = holder.oid
            LEFT JOIN pg_operator o ON o.oid = d.refobjid AND d.refclassid = 'pg_operator'::regclass
            JOIN pg_proc p ON p.oid = coalesce(o.oprcode, d.refobjid)
                          AND (d.refclassid = 'pg_proc'::regclass OR o.oid IS NOT NULL)
            JOIN pg_roles owner ON owner.oid = p.proowner AND NOT owner.rolsuper AND owner.rolname <> current_user
           WHERE {MAY_REPLICATE}
           GROUP BY 1"
    )
}

/// [`planned_code`] of what has this name now, of its partitions, and of what it is a partition of.
fn planned_now(table: &QualifiedName) -> String {
    let now = format!("to_regclass({})", escape_literal(&quoted(table)));
    let family = format!(
        "SELECT 0, {now}::oid UNION SELECT 0, t.relid FROM pg_partition_tree({now}) t \
         UNION SELECT 0, a.relid FROM pg_partition_ancestors({now}) a"
    );
    format!("(SELECT code FROM ({}) planned(place, code))", planned_code(&family))
}

/// The answers of [`planned_now`] and current_user begin at `index`.
fn refuse_code(table: &QualifiedName, row: &Cells<'_>, index: usize) -> Result<(), SourceError> {
    match row.optional(index)? {
        Some(function) => Err(runs_code(table, row.text(index + 1)?, function)),
        None => Ok(()),
    }
}

/// `function`: what [`planned_code`] found.
fn runs_code(table: &QualifiedName, role: &str, function: &str) -> SourceError {
    SourceError::OwnersCode {
        fact: format!(
            "an index, the statistics or the partition key of table {table} uses {function}: planning a read would run what \
             its owner makes of it as role {role}, which may replicate"
        ),
        remedy:
            "read with a role that may not (postgres.reader_url), or drop what uses the function, or have a superuser \
                 write a function of the same body anew for it, once they have read that and all that it calls"
                .to_owned(),
    }
}

/// What [`describe`] was asked.
struct Question<'a> {
    doing: &'a str,
    name: &'a QualifiedName,
    publication: &'a str,
    chosen: &'a [String],
}

fn catalog_table(
    asked: &Question<'_>,
    table: &SimpleQueryRow,
    columns: &[SimpleQueryRow],
    leaves: &[SimpleQueryRow],
) -> Result<CatalogTable, SourceError> {
    let Question { doing, name, chosen, .. } = *asked;
    let table = Cells { doing, row: table };
    let kind = kind(&name.to_string(), name, table.text(1)?, table.text(2)?)?;
    let published = published(asked, kind, &table)?;
    let identity_columns = table.names(5)?;
    let columns = columns.iter().map(|row| column(&Cells { doing, row }, chosen, &identity_columns));
    let columns = columns.collect::<Result<Vec<_>, _>>()?;
    let mut read: Vec<String> = columns.iter().filter(|c| c.needed).map(|c| c.name.clone()).collect();
    let filtered_by = table.names(15)?.into_iter();
    read.extend(filtered_by.filter(|name| !columns.iter().any(|c| c.needed && c.name == *name)));
    let needed = Needed { role: table.text(14)?, columns: read, some_only: !chosen.is_empty() || table.yes(16)? };
    let access = readable(&name.to_string(), name, &needed, &table, 10)?;
    if let Some(function) = table.optional(21)? {
        return Err(runs_code(name, needed.role, function));
    }
    let mut out = CatalogTable {
        oid: table.parse(0)?,
        name: name.clone(),
        kind,
        identity: identity(&table, 3)?,
        identity_columns,
        published,
        columns,
        estimated: Estimated::default(),
        leaves: Vec::new(),
        access,
        generated: table.names(20)?,
        heirs: heirs(&table)?,
    };
    for row in leaves {
        let row = Cells { doing, row };
        let leaf = leaf(&row)?;
        // Rows are read from the partitions one by one.
        if kind == TableKind::Partitioned && partition_access(&out, &leaf.name, &needed, &row)? == Access::Columns {
            out.access = Access::Columns;
        }
        let Estimated { rows, bytes } = estimated(&row)?;
        out.estimated.rows += rows;
        out.estimated.bytes += bytes;
        out.leaves.push(leaf);
    }
    Ok(out)
}

/// # Errors
/// Where the publication cannot send the table under its own name.
fn published(asked: &Question<'_>, kind: TableKind, table: &Cells<'_>) -> Result<Published, SourceError> {
    let Question { name, publication, .. } = *asked;
    if !table.yes(4)? {
        return Err(SourceError::unsuitable(
            format!("table {name} belongs to Postgres itself, which never publishes it"),
            "take it out of the configuration",
        ));
    }
    if let Some(whole) = table.optional(8)? {
        return Err(SourceError::unsuitable(
            format!("table {name} is a partition of {whole}, which publication {publication} publishes as a whole"),
            format!("configure {whole} instead"),
        ));
    }
    let is_listed = table.yes(6)?;
    if let (TableKind::Partitioned, false, Some(part)) = (kind, is_listed, table.optional(9)?) {
        return Err(SourceError::unsuitable(
            format!("publication {publication} sends the partitions of {name} under their own names ({part})"),
            Sql::PublishViaRoot { publication }.to_string(),
        ));
    }
    let row_filter = table.optional(7)?.map(str::to_owned);
    Ok(Published { is_listed, row_filter, membership: table.optional(17)?.unwrap_or_default().to_owned() })
}

fn leaf(row: &Cells<'_>) -> Result<Leaf, SourceError> {
    Ok(Leaf {
        oid: row.parse(1)?,
        name: QualifiedName { schema: row.text(2)?.to_owned(), table: row.text(3)?.to_owned() },
        filenode: row.parse(8)?,
        changed_by: row.optional(17)?.and_then(|xid| xid.parse().ok()),
        pages: u32::try_from(row.parse::<u64>(9)?).unwrap_or(u32::MAX),
    })
}

/// What may be read of a partition.
///
/// # Errors
/// Where it cannot be followed as a part of `whole`.
fn partition_access(
    whole: &CatalogTable,
    name: &QualifiedName,
    needed: &Needed<'_>,
    row: &Cells<'_>,
) -> Result<Access, SourceError> {
    let what = format!("{name}, a partition of {},", whole.name);
    kind(&what, name, row.text(4)?, row.text(5)?)?;
    let access = readable(&what, name, needed, row, 13)?;
    // The old row of a change is what the partition's own identity lets Postgres log.
    if identity(row, 6)? == ReplicaIdentity::Full || row.names(7)? == whole.identity_columns {
        return Ok(access);
    }
    let remedy = match whole.identity {
        ReplicaIdentity::Default => Sql::IdentityDefault { table: name },
        // Whatever its indexes are called.
        ReplicaIdentity::Index | ReplicaIdentity::Full | ReplicaIdentity::Nothing => Sql::IdentityFull { table: name },
    };
    let fact = format!("table {what} has another replica identity than the whole");
    Err(SourceError::unsuitable(fact, remedy.to_string()))
}

/// As the planner estimates, without its look at column widths.
fn estimated(leaf: &Cells<'_>) -> Result<Estimated, SourceError> {
    let (pages, bytes): (u64, u64) = (leaf.parse(9)?, leaf.parse(10)?);
    let (pages_then, rows_then): (u64, f64) = (leaf.parse(11)?, leaf.parse(12)?);
    let rows = match (pages_then, rows_then) {
        (1.., 0.0..) => (rows_then / pages_then as f64 * pages as f64) as u64,
        _ => pages * (PAGE_BYTES / 100),
    };
    Ok(Estimated { rows, bytes })
}

fn heirs(table: &Cells<'_>) -> Result<Heirs, SourceError> {
    let names = table.names(19)?;
    let some = names.chunks_exact(2).map(|name| QualifiedName { schema: name[0].clone(), table: name[1].clone() });
    Ok(Heirs { count: table.parse(18)?, some: some.collect() })
}

fn column(row: &Cells<'_>, chosen: &[String], identity: &[String]) -> Result<CatalogColumn, SourceError> {
    let name = row.text(1)?.to_owned();
    Ok(CatalogColumn {
        needed: chosen.is_empty() || chosen.contains(&name) || identity.contains(&name),
        name,
        type_oid: row.parse(2)?,
        type_modifier: row.parse(3)?,
        base_type: row.text(4)?.to_owned(),
        from_text: match row.text(10)? {
            "cast" => FromText::Cast,
            "literal" => FromText::Literal,
            _ => FromText::Never,
        },
        boolean: row.yes(5)?,
        equals: row.text(6)?.to_owned(),
        greater: row.text(7)?.to_owned(),
        at_most: row.text(8)?.to_owned(),
        made_of: row.optional(9)?.unwrap_or_default().to_owned(),
    })
}

/// `what` begins a sentence after "table".
fn kind(what: &str, name: &QualifiedName, relkind: &str, persistence: &str) -> Result<TableKind, SourceError> {
    let no = |is: &str, remedy: &str| Err(SourceError::unsuitable(format!("table {what} is {is}"), remedy.to_owned()));
    match (relkind, persistence) {
        ("r" | "p", "u") => no("unlogged: its changes are not in the WAL", &Sql::SetLogged { table: name }.to_string()),
        ("r" | "p", "t") => no("temporary: no other session sees it", "use a permanent table"),
        ("r", _) => Ok(TableKind::Table),
        ("p", _) => Ok(TableKind::Partitioned),
        ("v", _) => no("a view", "configure the tables that it reads"),
        ("m", _) => no("a materialized view, which Postgres does not replicate", "configure the tables that it reads"),
        ("f", _) => no("a foreign table: its changes are made elsewhere", "follow the server where its rows are"),
        (_, _) => no("no table", "configure a table"),
    }
}

/// Who reads, and what of a table.
struct Needed<'a> {
    role: &'a str,
    columns: Vec<String>,
    /// Some of its columns are enough, so no more is to be granted.
    some_only: bool,
}

/// `what` as in [`kind`]; the four answers about the role's rights begin at `index`.
fn readable(
    what: &str,
    name: &QualifiedName,
    needed: &Needed<'_>,
    row: &Cells<'_>,
    index: usize,
) -> Result<Access, SourceError> {
    let role = needed.role;
    let (enters, whole) = (row.yes(index)?, row.yes(index + 1)?);
    let hidden = row.names(index + 2)?;
    let lacks: Vec<&str> = needed.columns.iter().filter(|c| hidden.contains(c)).map(String::as_str).collect();
    if !enters || !lacks.is_empty() {
        let usage = Sql::UseSchema { schema: &name.schema, role };
        let usage = if enters { String::new() } else { format!("{usage} ") };
        let granted = if needed.some_only { &needed.columns[..] } else { &[] };
        let select = Sql::Select { columns: granted, table: name, role };
        let columns =
            if needed.some_only && enters { format!(" (columns {})", lacks.join(", ")) } else { String::new() };
        return Err(SourceError::unsuitable(
            format!("table {what} may not be read by role {role}{columns}"),
            format!("{usage}{select}"),
        ));
    }
    if row.yes(index + 3)? {
        return Err(SourceError::unsuitable(
            format!("table {what} has policies that hide rows from role {role}, and not from the stream"),
            Sql::BypassRowSecurity { role }.to_string(),
        ));
    }
    Ok(if whole { Access::Whole } else { Access::Columns })
}

fn identity(row: &Cells<'_>, index: usize) -> Result<ReplicaIdentity, SourceError> {
    match row.text(index)? {
        "d" => Ok(ReplicaIdentity::Default),
        "n" => Ok(ReplicaIdentity::Nothing),
        "f" => Ok(ReplicaIdentity::Full),
        "i" => Ok(ReplicaIdentity::Index),
        other => Err(SourceError::unexpected(row.doing, format!("the replica identity {other:?}"))),
    }
}

/// What a snapshot sees now. The same text twice: no transaction that could have changed anything has ended in between.
pub async fn current(client: &Client) -> Result<String, SourceError> {
    let doing = "asking for a snapshot";
    let results = look(client, doing, "SELECT pg_current_snapshot()").await?;
    let row = results.iter().flatten().next().ok_or_else(|| SourceError::unexpected(doing, "no answer"))?;
    Cells { doing, row }.text(0).map(str::to_owned)
}

/// bool, and every domain over it, through any depth.
pub async fn boolean_types(client: &Client) -> Result<HashSet<Oid>, SourceError> {
    let doing = "listing boolean types";
    let sql = "WITH RECURSIVE boolean(oid) AS (
                   VALUES ('bool'::regtype::oid)
                    UNION ALL
                   SELECT t.oid FROM boolean JOIN pg_type t ON t.typbasetype = boolean.oid AND t.typtype = 'd')
               SELECT oid FROM boolean";
    let results = look(client, doing, sql).await?;
    results.iter().flatten().map(|row| Cells { doing, row }.parse(0)).collect()
}

/// Reads the rows of a range as one snapshot sees them, in the order of their places, and hands them to `on_row`. Stops
/// after the row with which `max_bytes` are reached: no more than that and one row are ever held, and about as much again
/// is read and thrown away before the server is made to stop. Locks the partition that it reads, and no other.
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
        // A partition under its name: dropped or renamed since the table was described.
        Err(error)
            if part.table.kind == TableKind::Partitioned
                && matches!(code(&error), Some(UNDEFINED_TABLE | UNDEFINED_SCHEMA)) =>
        {
            Ok(ReadRange::Gone)
        }
        Err(error) => Err(error),
    }
}

/// As [`read_range`], for several ranges of whatever tables, each [`Access::Whole`], as one snapshot sees all of them;
/// `max_bytes` are for all together. Fails at once where somebody has locked one of them: no lock is held while another one
/// is waited for. Brings the first ones only where more does not fit.
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
        // What stopped it may have ended the transaction.
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

/// What a literal cannot be compared with.
fn is_opaque(column: &&CatalogColumn) -> bool {
    column.from_text == FromText::Never
}

/// How far a read of a range has come.
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

    /// A COPY line without what stands for the row's place.
    fn place<'l>(&mut self, line: &'l [u8], doing: &str) -> Result<&'l [u8], SourceError> {
        let ReadSoFar::Place(last) = self else { return Ok(line.strip_suffix(b"\n").unwrap_or(line)) };
        let unexpected = |what: &str| SourceError::unexpected(doing, what);
        let (tid, cells) = split_tid(line).ok_or_else(|| unexpected("a COPY line without a ctid"))?;
        // What the rest of a range begins behind: in any other order, rows would be lost.
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

    /// What is left of `span`.
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

/// Where a read by key has come to.
fn bound_at(row: &Row, table: &CatalogTable, doing: &str) -> Result<KeyBound, SourceError> {
    let value = |name: &String| {
        let cell = table.columns.iter().position(|c| c.name == *name).and_then(|at| row.cell(at));
        let cell = cell.ok_or_else(|| SourceError::unexpected(doing, format!("a row without its key {name}")))?;
        std::str::from_utf8(cell).map(str::to_owned).map_err(|_| {
            // Only in a database without an encoding.
            SourceError::unsuitable(
                format!("table {} has keys that are not UTF-8, and only some of its columns may be read", table.name),
                format!("grant SELECT on the whole of {}", quoted(&table.name)),
            )
        })
    };
    table.identity_columns.iter().map(value).collect::<Result<_, _>>().map(KeyBound)
}

/// `None`: it has no key to go by.
fn range_sql(table: &CatalogTable, leaf: &QualifiedName, range: &Range) -> Option<String> {
    let cells = table.columns.iter().map(|c| match c.needed {
        true => format!("t.{}", escape_identifier(&c.name)),
        false => "NULL".to_owned(),
    });
    let cells = cells.collect::<Vec<_>>().join(", ");
    // The row filter names columns without their table: the one that is read is the only one in its scope.
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

/// Rows whose key comes behind the bound's.
fn beyond(key: &[&CatalogColumn], bound: &KeyBound) -> String {
    by_row(key, bound, |c| &c.greater).unwrap_or_else(|| by_column(key, bound))
}

fn up_to(key: &[&CatalogColumn], bound: &KeyBound) -> String {
    by_row(key, bound, |c| &c.at_most).unwrap_or_else(|| format!("NOT ({})", by_column(key, bound)))
}

/// As one comparison of rows, which an index serves. `None` where the columns' operators are not of one schema.
fn by_row(key: &[&CatalogColumn], bound: &KeyBound, operator: impl Fn(&CatalogColumn) -> &String) -> Option<String> {
    let compares = operator(key.first()?);
    if key.iter().any(|c| operator(c) != compares) {
        return None;
    }
    let columns = key.iter().map(|c| c.value()).collect::<Vec<_>>().join(", ");
    let values = key.iter().zip(&bound.0).map(|(c, value)| c.literal(value)).collect::<Vec<_>>().join(", ");
    Some(match key {
        // ROW(a) OPERATOR(…) ROW(b) takes more than one column.
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

/// `(block,offset)`, a tab, and the rest of a COPY line without its newline.
fn split_tid(line: &[u8]) -> Option<(Tid, &[u8])> {
    let line = line.strip_suffix(b"\n")?;
    let end = memchr(b'\t', line).unwrap_or(line.len());
    let tid = std::str::from_utf8(&line[..end]).ok()?.parse().ok()?;
    Some((tid, line.get(end + 1..).unwrap_or_default()))
}

/// How a COPY that was to be stopped came to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum CopyEnd {
    /// There was nothing left.
    AtOnce,
    /// There were more rows, now thrown away.
    Early,
}

/// Ends a COPY of which no more is wanted. The rest is thrown away as it comes; the server is asked to stop where that is
/// more than `patience` bytes, and only then: it reports every cancelled statement in its log. The transaction may have
/// failed by then, which nobody minds: it has nothing to do but to end.
async fn stop(
    client: &PostgresClient,
    doing: &str,
    mut copy: std::pin::Pin<&mut CopyOutStream>,
    patience: usize,
) -> Result<CopyEnd, SourceError> {
    let (mut thrown_away, mut cancel) = (0, None);
    let ended = loop {
        match copy.try_next().await {
            Ok(Some(line)) => thrown_away += line.len(),
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

/// Reads the rows of the given keys, each a value for every one of `key_columns`, as one snapshot sees them, and answers
/// which (`pg_current_snapshot()`). A key that no
/// row can have (a word for an integer) is no error: it just does not exist. Rows come in no order, and a key's text may
/// differ from the one that found it (`007` finds 7): whoever asks compares.
pub async fn read_keys(
    client: &Client,
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
    client: &Client,
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

/// Collects, since a value may turn out to be bad only after rows have come.
async fn copy_keys(
    client: &Client,
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

/// The keys as a table of columns k0, k1, ... An array a column: Postgres takes several times as long to read a list of
/// VALUES.
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

/// `None` where no row can have these values.
fn texts<'a>(key: &[&CatalogColumn], values: &'a [Bytes]) -> Option<Vec<&'a str>> {
    if key.len() != values.len() {
        return None;
    }
    let text = |(column, value): (&&CatalogColumn, &'a Bytes)| {
        std::str::from_utf8(value).ok().filter(|text| !text.contains('\0') && may_be(column.type_oid, text))
    };
    key.iter().zip(values).map(text).collect()
}

/// Whether the type's output function can have written `text`. Only for types whose output is simple to tell; it saves
/// asking Postgres, which reports every failed cast in its log.
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

/// Those that Postgres can read. Halves until the bad ones stand alone.
async fn castable<'a>(
    client: &Client,
    doing: &str,
    key: &[&CatalogColumn],
    texts: Vec<Vec<&'a str>>,
) -> Result<Vec<Vec<&'a str>>, SourceError> {
    let (mut good, mut unknown) = (Vec::new(), vec![texts]);
    // Looks at every value, so that every cast is made.
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

/// Data exceptions, and a domain's constraints. Nothing that a renamed type could cause: then no key at all would seem to
/// exist.
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
    /// From one place to another, in the order of the places.
    ByPlace,
    /// From one key to another, in the order of their index.
    InKeyOrder,
    /// Key by key.
    ByKey,
}

impl Way {
    /// Makes the planner avoid every other way, whatever it thinks of the table's size. This forbids nothing where there is
    /// no other way.
    fn settings(self) -> &'static str {
        match self {
            // Leaves the TID Range Scan, and behind it the sequential scan, which must begin at the beginning.
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

/// Begins a reading transaction over the whole of a table, with a lock and a snapshot between which the table was not
/// written anew: the snapshot.
///
/// First the lock, then the snapshot: that is what LOCK TABLE is for. A role that may read some columns only is not let
/// LOCK; for it a SELECT of no row takes the same lock, and that has a snapshot before it has the lock. What a rewrite in
/// between would hide from that snapshot ([MVCC caveats]) is read after another attempt.
///
/// [MVCC caveats]: https://www.postgresql.org/docs/current/mvcc-caveats.html
async fn lock(client: &Client, doing: &str, table: &CatalogTable) -> Result<String, SourceError> {
    if table.access == Access::Columns {
        // The query that is its lock is planned, too.
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
        format!("table {table} has columns of other types than a moment ago"),
        "nothing is to be done, it is looked at again",
    )
}

fn no_table(leaf: &QualifiedName, table: &QualifiedName) -> SourceError {
    SourceError::unsuitable(
        format!("{leaf}, read as table {table}, is no table any more"),
        "put a table in its place, or take it out of the configuration",
    )
}

/// Whether a column is no longer what it was described as, where that matters: the casts and operators of a condition mean
/// what they were chosen for with these types only. Once the table, or one partition, is locked, they stay.
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

/// The last two results are the snapshot, and the leaves as it sees them.
fn lock_sql(table: &CatalogTable) -> String {
    let begin = begin_sql(LOCK_TIMEOUT);
    let name = quoted(&table.name);
    let (only, leaves) = match table.kind {
        TableKind::Table => ("ONLY ", "(SELECT t.oid FROM this t)"),
        TableKind::Partitioned => ("", "(SELECT p.relid FROM this t CROSS JOIN LATERAL pg_partition_tree(t.oid) p)"),
    };
    let lock = match table.access {
        Access::Whole => format!("LOCK TABLE {only}{name} IN ACCESS SHARE MODE"),
        // Not WHERE false, which leaves the partitions alone.
        Access::Columns => format!("SELECT FROM {only}{name} LIMIT 0"),
    };
    let (schema, relation) = (escape_literal(&table.name.schema), escape_literal(&table.name.table));
    let (settings, now) = (Way::ByKey.settings(), escape_literal(&name));
    let (planned, changed) = (planned_now(&table.name), types_changed(table, Way::ByKey));
    // pg_relation_filenode() and to_regclass() answer as of now, whatever the snapshot sees.
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

/// Whether the snapshot is younger than every rewrite.
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

/// As [`lock`], for the table or partition of each part and no other: the snapshot, and the file that each lies in. `None`
/// where the name is no longer that of this part of the table.
async fn lock_leaves(
    client: &Client,
    doing: &str,
    parts: &[Part<'_>],
) -> Result<(String, Vec<Option<Oid>>), SourceError> {
    let leaves = || parts.iter().map(|part| &part.table.leaves[part.range.leaf].name);
    let by_columns = parts.iter().any(|part| part.table.access == Access::Columns);
    let checks = leaves_now_sql(parts);
    if by_columns {
        // The query that is its lock is planned, too.
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
    // These functions, and to_regclass(), answer as of now, whatever the snapshot sees.
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

/// The file of each part. `None` where the snapshot is older than a rewrite.
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

/// Without compilation and workers: what is asked looks far more expensive than it is.
fn begin_sql(lock_timeout: Duration) -> String {
    let (lock, idle) = (lock_timeout.as_millis(), IDLE_TIMEOUT.as_millis());
    format!(
        "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; {} SET LOCAL lock_timeout = {lock};
        SET LOCAL idle_in_transaction_session_timeout = {idle};
        SET LOCAL jit = off; SET LOCAL max_parallel_workers_per_gather = 0;",
        *PINS
    )
}

/// Writes marks into the WAL, at least one, and waits until they are on disk; answers where the last one ends. The stream
/// brings each as [`crate::change::Delivery::Mark`].
pub async fn emit_marks(client: &Client, nonces: &[Nonce]) -> Result<Lsn, SourceError> {
    let doing = "writing a mark into the WAL";
    let prefix = escape_literal(MARK_PREFIX);
    let marks = nonces.iter().map(|nonce| format!("pg_logical_emit_message(true, {prefix}, '\\x{nonce:?}'::bytea)"));
    // Transactional, since the commit flushes it, however the role's sessions commit otherwise. `local`: a standby that is
    // away must not hold up a load.
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

/// Checks the right that every load and every verification needs: PUBLIC has it unless somebody has revoked it.
///
/// # Errors
/// [`SourceError::Unsuitable`] with the GRANT where the role lacks it.
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
        format!(
            "role {role} may not execute {function}, which every load and verification needs to mark its place in the WAL"
        ),
        Sql::Execute { function, role }.to_string(),
    ))
}

/// Asks where the server is, what its snapshots see, and how the slot stands. An error on a standby.
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

/// A line is not what COPY TO writes in text format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadCopyLine {
    #[error("a COPY line with {found} values instead of {expected}")]
    CellCount { expected: usize, found: usize },
    #[error("a COPY line with an escape that COPY TO does not write, in value {cell}")]
    Escape { cell: usize },
}

/// Takes apart one line of COPY's text format, without its newline, into `cells` cells.
///
/// <https://www.postgresql.org/docs/current/sql-copy.html#id-1.9.3.55.9.2>
pub fn parse_copy_line(line: &[u8], cells: usize, out: &mut RowBuilder) -> Result<(), BadCopyLine> {
    // Tabs inside values are escaped. A line of no cells is as empty as a line of one empty cell.
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

/// False at an escape that is none.
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
            // COPY FROM takes more, COPY TO writes no more.
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
