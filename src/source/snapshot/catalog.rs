//! What the catalog and the publication say about tables: their columns, keys, partitions, and what the role may read.
//!
//! It describes and refuses; rows are read elsewhere. A mistake here gives a load another shape than the stream, or
//! follows a table of which Postgres does not send everything.

use super::catalog_sql::{Asked, columns_sql, heads_sql, leaves_sql};
use crate::code::Code;
use crate::fingerprint::Fingerprint;
use crate::format::Format;
use crate::loader::range::{Extent, Sizes};
use crate::remedy::Sql;
use crate::schema::{
    CatalogMark, Composition, LeafFile, Oid, QualifiedName, Relation, RelationColumn, ReplicaIdentity,
};
use crate::source::SourceError;
use crate::source::answer::{Cells, begin_sql, in_transaction, look, query};
use crate::typed::known::KnownTypes;
use crate::typed::row_type::{Attribute, ColumnType, DEEPEST, Inexact, JsonType};
use postgres_protocol::escape::{escape_identifier, escape_literal};
use serde_json::Value;
use std::collections::{HashMap, HashSet};
use std::num::NonZeroU64;
use std::time::Duration;
use tokio_postgres::{Client, SimpleQueryRow};

/// How long a description waits for a lock: only measured sizes and, since Postgres 16, published columns take locks,
/// each for a moment.
const DESCRIBE_LOCK_TIMEOUT: Duration = Duration::from_secs(1);
/// Tables described by one query.
const TABLES_A_QUERY: usize = 1_000;
/// Columns, or partitions, in one answer about several tables, which is held in memory as a whole.
const ROWS_AN_ANSWER: u64 = 20_000;
/// The most types of which the description of a column's type consists. Composite types of composite types may be large.
const MOST_JSON_TYPES: usize = 5_000;
/// Size in bytes of a heap page (`BLCKSZ`) in every packaged Postgres.
const PAGE_BYTES: u64 = 8192;

/// A table as the catalog and the publication describe it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CatalogTable {
    pub oid: Oid,
    pub name: QualifiedName,
    pub kind: TableKind,
    pub identity: ReplicaIdentity,
    /// The columns of the primary key or of the identity index; under FULL those of the primary key. Empty if no key is
    /// usable: a deferrable one is not.
    pub identity_columns: Vec<String>,
    pub published: InPublication,
    /// What the stream sends, in its order: only columns of a column list, and no generated columns (unless they are
    /// published).
    pub columns: Vec<CatalogColumn>,
    pub estimated: Estimated,
    /// The relations that hold rows: the table itself, or its partitions at the lowest level. Ordered by oid.
    pub leaves: Vec<Leaf>,
    /// What the role may read of it.
    pub access: Access,
    /// Columns that the stream leaves out because they are generated.
    pub generated: Vec<String>,
    /// Tables that inherit from it, other than partitions: a SELECT returns their rows, the stream and a load do not.
    pub heirs: Heirs,
}

/// How the publication contains a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InPublication {
    /// The publication lists it. Otherwise the table is described as if it were published in full.
    pub is_listed: bool,
    /// An SQL condition on the columns, every name in it qualified.
    pub row_filter: Option<String>,
    /// Changes if the table, or the publication itself, was removed and added again. What happened in between was not
    /// sent, and since Postgres 18 no error says so.
    pub membership: String,
}

/// An estimate from the last ANALYZE and the current size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Estimated {
    pub rows: u64,
    /// Heap and TOAST, as stored: large values are usually compressed there.
    pub bytes: u64,
}

impl Estimated {
    /// About how many rows have this size, at least one. `None` if nothing is known.
    pub fn rows_in(self, bytes: usize) -> Option<NonZeroU64> {
        let share = u128::from(self.rows) * bytes as u128 / u128::from(self.bytes.max(1));
        NonZeroU64::new(u64::try_from(share).unwrap_or(u64::MAX).max(1)).filter(|_| self.rows > 0)
    }
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
    /// The columns that are needed, but not `ctid`; nor may it LOCK the table.
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
    /// Its type, or the type that it is a domain over, at any depth. As SQL writes it, qualified and without a
    /// modifier: `pg_catalog."varchar"`.
    pub base_type: String,
    pub from_text: FromText,
    /// boolean, or a domain over it, at any depth.
    pub boolean: bool,
    /// The type's own equality operator, as SQL writes it: an extension's type has it in another schema than
    /// `pg_catalog`, and a plain `=` would fall back to another type's operator, which no index supports.
    pub equals: String,
    /// Its `>` and `<=`, in the order that ORDER BY uses.
    pub greater: String,
    pub at_most: String,
    /// Its attribute number, which another column of the same name does not have, and a digest of its type's
    /// definition: the labels of enums, the attributes of composite types, the types of elements and subtypes, at any
    /// depth.
    pub made_of: String,
    /// What it becomes in JSON.
    pub json: ColumnType,
    /// The configuration selects it, or it identifies rows. Other columns are not read, and the role needs no privilege
    /// on them.
    pub needed: bool,
}

/// How a text becomes a value of a column's base type without running code of the type's owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FromText {
    /// By a cast: all casts to it came with the server.
    Cast,
    /// As a literal, which uses the type's input function and no cast: its owner may `CREATE CAST (text AS …)`.
    Literal,
    /// Not at all: it is an array of such values; or it contains domains (or may come to), whose constraints its input
    /// function checks; or it is a range with functions of its owner: reading a value calls the canonical function, and
    /// planning a comparison of order calls the difference function.
    Never,
}

/// A table without partitions, or one partition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leaf {
    pub oid: Oid,
    pub name: QualifiedName,
    /// Changes when all its rows are rewritten: TRUNCATE, VACUUM FULL, CLUSTER, many forms of ALTER TABLE.
    pub filenode: Oid,
    /// The transaction that last changed its entry in `pg_class`, which assigned this file or came later; `None` while
    /// the entry is being changed.
    pub changed_by: Option<u32>,
    /// Changes when it is attached, even if it was detached only a moment ago: rows may have been written in between.
    pub attached: String,
    pub pages: u32,
}

impl CatalogTable {
    /// Returns the shape of the rows that a load yields: that of the stream.
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

    /// Returns how it can be divided into chunks.
    pub fn extent(&self) -> Extent {
        match self.access {
            Access::Whole => Extent::Pages(self.leaves.iter().map(|leaf| leaf.pages).collect()),
            Access::Columns => Extent::Leaves(self.leaves.len()),
        }
    }

    /// Returns what rows of this format need to know of the types of its columns. `booleans`: boolean and the domains
    /// over it.
    pub fn known_types(&self, format: Format, booleans: &HashSet<Oid>) -> KnownTypes {
        let in_json = |c: &CatalogColumn| {
            let inexact = c.json.inexact.clone();
            (c.type_oid, inexact.map_or_else(|| Ok(c.json.json_type.clone()), Err))
        };
        let in_json = match format {
            Format::Hash => HashMap::new(),
            Format::Json | Format::RedisJson => self.columns.iter().map(in_json).collect(),
        };
        KnownTypes { booleans: booleans.clone(), in_json }
    }

    /// Returns what the stream does not announce.
    pub fn mark(&self) -> CatalogMark {
        let (mut shape, mut storage) = (self.shape_apart_from_leaves(), Fingerprint::default());
        for leaf in &self.leaves {
            shape.add(&leaf.oid.to_le_bytes());
            shape.add(leaf.attached.as_bytes());
            storage.add(&leaf.filenode.to_le_bytes());
        }
        CatalogMark { shape: shape.get(), storage: storage.get() }
    }

    fn shape_apart_from_leaves(&self) -> Fingerprint {
        let mut shape = Fingerprint::default();
        shape.add(&self.oid.to_le_bytes());
        shape.add(self.published.row_filter.as_deref().unwrap_or_default().as_bytes());
        let made_of = self.columns.iter().filter(|c| c.needed).map(|c| c.made_of.as_str());
        shape.add(made_of.collect::<Vec<_>>().join(",").as_bytes());
        shape.add(self.published.membership.as_bytes());
        shape
    }

    /// Returns the parts of [`Self::mark`] that tell an attached partition from other changes.
    pub fn composition(&self) -> Composition {
        let file = |leaf: &Leaf| LeafFile { oid: leaf.oid, filenode: leaf.filenode };
        let leaves = self.leaves.iter().map(file).collect();
        Composition { apart_from_leaves: self.shape_apart_from_leaves().get(), leaves }
    }

    /// Returns a warning about rows that a query shows and the cache does not have. `None` if there can be none.
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

    /// Returns the transaction that gave all leaves their files, if a single one did and nothing came later.
    pub fn written_by(&self) -> Option<u32> {
        let first = self.leaves.first()?.changed_by;
        first.filter(|_| self.leaves.iter().all(|leaf| leaf.changed_by == first))
    }

    pub(super) fn column(&self, name: &str) -> Option<&CatalogColumn> {
        self.columns.iter().find(|c| c.name == name)
    }

    pub(super) fn row_filter_sql(&self) -> String {
        self.published.row_filter.as_ref().map_or_else(String::new, |filter| format!(" AND ({filter})"))
    }
}

impl CatalogColumn {
    /// Returns its value in `t`, of the base type: a domain's owner may create operators of the same names for the
    /// domain.
    pub(super) fn value(&self) -> String {
        format!("t.{}::{}", escape_identifier(&self.name), self.base_type)
    }

    /// Returns a text as a value of the base type. Not for [`FromText::Never`].
    pub(super) fn literal(&self, text: &str) -> String {
        format!("{}::{}", escape_literal(text), self.base_type)
    }

    /// Returns the condition that it equals column `k` of the wanted keys, whose type is that of [`Self::wanted_type`].
    pub(super) fn is_wanted(&self, k: &str) -> String {
        match self.from_text {
            FromText::Cast => format!("{} {} {k}::{}", self.value(), self.equals, self.base_type),
            FromText::Literal => format!("{} {} {k}", self.value(), self.equals),
            // As COPY writes it, with the output function.
            FromText::Never => format!("format('%s', t.{}) OPERATOR(pg_catalog.=) {k}", escape_identifier(&self.name)),
        }
    }

    pub(super) fn wanted_type(&self) -> &str {
        match self.from_text {
            FromText::Cast | FromText::Never => "pg_catalog.text",
            FromText::Literal => &self.base_type,
        }
    }
}

/// The catalog's description of a table. `None` if there is none of that name. An error if it can never be followed, or
/// could not be examined.
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

/// Describes tables from the catalog, as `publication` publishes them (or would, if it does not yet). Returns one
/// description for each, in their order.
///
/// # Errors
/// If the connection was lost, or the server could not answer this time.
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
            // One of them prevents the others from being described.
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

/// If one of the tables is locked, sizes are those of the last ANALYZE.
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

/// What the catalog has about a table, before its columns and partitions are queried.
struct Head {
    place: usize,
    oid: Oid,
    attributes: u64,
    leaves: u64,
    row: SimpleQueryRow,
}

/// Describes all of them under one snapshot.
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

/// Returns the rows of a query about each of these tables, grouped by place, its first column. The query gets a
/// subquery of all their columns in `pg_class`, and `place`. If `weight` predicts many rows, it is run in parts: each
/// answer is held in memory.
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

/// Returns the current name of the table with this oid; `None` if it was dropped.
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

/// The answers of [`planned_now`](super::catalog_sql::planned_now) and current_user begin at `index`.
pub(super) fn refuse_code(table: &QualifiedName, row: &Cells<'_>, index: usize) -> Result<(), SourceError> {
    match row.optional(index)? {
        Some(function) => Err(runs_code(table, row.text(index + 1)?, function)),
        None => Ok(()),
    }
}

/// `function`: what `planned_code` returned.
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

/// The arguments of [`describe`].
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
        // The partitions are read one by one.
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
/// If the publication cannot send the table under its own name.
fn published(asked: &Question<'_>, kind: TableKind, table: &Cells<'_>) -> Result<InPublication, SourceError> {
    let Question { name, publication, .. } = *asked;
    if !table.yes(4)? {
        return Err(SourceError::unsuitable(
            Code::TableKind,
            format!("table {name} belongs to Postgres itself, which never publishes it"),
            "take it out of the configuration",
        ));
    }
    if let Some(whole) = table.optional(8)? {
        return Err(SourceError::unsuitable(
            Code::TablePartition,
            format!("table {name} is a partition of {whole}, which publication {publication} publishes as a whole"),
            format!("configure {whole} instead"),
        ));
    }
    let is_listed = table.yes(6)?;
    if let (TableKind::Partitioned, false, Some(part)) = (kind, is_listed, table.optional(9)?) {
        return Err(SourceError::unsuitable(
            Code::PublicationPartitions,
            format!("publication {publication} sends the partitions of {name} under their own names ({part})"),
            Sql::PublishViaRoot { publication }.to_string(),
        ));
    }
    let row_filter = table.optional(7)?.map(str::to_owned);
    Ok(InPublication { is_listed, row_filter, membership: table.optional(17)?.unwrap_or_default().to_owned() })
}

fn leaf(row: &Cells<'_>) -> Result<Leaf, SourceError> {
    Ok(Leaf {
        oid: row.parse(1)?,
        name: QualifiedName { schema: row.text(2)?.to_owned(), table: row.text(3)?.to_owned() },
        filenode: row.parse(8)?,
        changed_by: row.optional(17)?.and_then(|xid| xid.parse().ok()),
        attached: row.text(18)?.to_owned(),
        pages: u32::try_from(row.parse::<u64>(9)?).unwrap_or(u32::MAX),
    })
}

/// Returns what may be read of a partition.
///
/// # Errors
/// If it cannot be followed as a part of `whole`.
fn partition_access(
    whole: &CatalogTable,
    name: &QualifiedName,
    needed: &Needed<'_>,
    row: &Cells<'_>,
) -> Result<Access, SourceError> {
    let what = format!("{name}, a partition of {},", whole.name);
    kind(&what, name, row.text(4)?, row.text(5)?)?;
    let access = readable(&what, name, needed, row, 13)?;
    // The partition's own identity decides what Postgres logs of an old row.
    if identity(row, 6)? == ReplicaIdentity::Full || row.names(7)? == whole.identity_columns {
        return Ok(access);
    }
    let remedy = match whole.identity {
        ReplicaIdentity::Default => Sql::IdentityDefault { table: name },
        // Works whatever its indexes are called.
        ReplicaIdentity::Index | ReplicaIdentity::Full | ReplicaIdentity::Nothing => Sql::IdentityFull { table: name },
    };
    let fact = format!("table {what} has another replica identity than the whole");
    Err(SourceError::unsuitable(Code::TableIdentity, fact, remedy.to_string()))
}

/// As the planner estimates, but without column widths.
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
        json: column_type(row, 12, !row.yes(11)?)?,
    })
}

/// Reads what a column's type becomes in JSON.
fn column_type(row: &Cells<'_>, index: usize, may_be_null: bool) -> Result<ColumnType, SourceError> {
    let unexpected = |what: &str| SourceError::unexpected(row.doing, format!("types of a column: {what}"));
    let parts: Vec<Vec<Value>> = serde_json::from_str(row.text(index)?).map_err(|e| unexpected(&e.to_string()))?;
    let by_oid: HashMap<u64, &[Value]> =
        parts.iter().filter_map(|part| Some((part.first()?.as_u64()?, &part[1..]))).collect();
    let mut types = Types { by_oid: &by_oid, room: MOST_JSON_TYPES, inexact: None };
    let json_type = types.json_type(row.parse(2)?, DEEPEST);
    let json_type = json_type.ok_or_else(|| unexpected(row.text(index).unwrap_or_default()))?;
    Ok(ColumnType { json_type, may_be_null, inexact: types.inexact })
}

/// The types of which the description of a column's type consists.
struct Types<'a> {
    by_oid: &'a HashMap<u64, &'a [Value]>,
    /// How many may still be described.
    room: usize,
    inexact: Option<Inexact>,
}

impl Types<'_> {
    /// Whatever is too deep or too large becomes a string, and what only a cast can write.
    fn json_type(&mut self, oid: u64, depth: usize) -> Option<JsonType> {
        let (kind, details) = self.by_oid.get(&oid)?.split_first()?;
        let (Some(deeper), Some(rest)) = (depth.checked_sub(1).filter(|left| *left > 0), self.room.checked_sub(1))
        else {
            self.inexact.get_or_insert(Inexact::TooLarge);
            return Some(JsonType::String);
        };
        self.room = rest;
        let mut part = |oid: &Value| self.json_type(oid.as_u64()?, deeper);
        Some(match (kind.as_str()?, details) {
            ("domain", [base]) => part(base)?,
            ("number", []) => JsonType::Number,
            ("boolean", []) => JsonType::Boolean,
            ("timestamp", []) => JsonType::Timestamp,
            ("timestamptz", []) => JsonType::TimestampTz,
            ("json", []) => JsonType::Json,
            ("vector", [of]) => JsonType::Vector(Box::new(part(of)?)),
            ("array", [of, delimiter]) => {
                let delimiter = delimiter.as_str()?.bytes().next().filter(u8::is_ascii)?;
                JsonType::Array { delimiter, of: Box::new(part(of)?) }
            }
            ("composite", [attributes]) => {
                let attributes = attributes.as_array().map_or(&[][..], Vec::as_slice).iter().map(|attribute| {
                    let json_type = part(attribute.get(1)?)?;
                    Some(Attribute { name: attribute.get(0)?.as_str()?.to_owned(), json_type })
                });
                JsonType::Composite(attributes.collect::<Option<_>>()?)
            }
            ("string", []) => JsonType::String,
            ("cast", [name]) => {
                self.inexact.get_or_insert(Inexact::OwnCast(name.as_str()?.to_owned()));
                JsonType::String
            }
            _ => return None,
        })
    }
}

/// `what` begins a sentence after "table".
fn kind(what: &str, name: &QualifiedName, relkind: &str, persistence: &str) -> Result<TableKind, SourceError> {
    let no =
        |is: &str, remedy: &str| Err(SourceError::unsuitable(Code::TableKind, format!("table {what} is {is}"), remedy));
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

/// The role that reads, and what it needs of a table.
struct Needed<'a> {
    role: &'a str,
    columns: Vec<String>,
    /// Some columns are sufficient, so no more needs to be granted.
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
            Code::TableUnreadable,
            format!("table {what} may not be read by role {role}{columns}"),
            format!("{usage}{select}"),
        ));
    }
    if row.yes(index + 3)? {
        return Err(SourceError::unsuitable(
            Code::TableRowSecurity,
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

/// Returns bool and every domain over it, at any depth.
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
