//! What a table is to the configuration, to the catalog and to the stream.

use crate::format::{Form, Format};
use crate::typed::redisjson;
use bytes::Bytes;
use std::collections::HashSet;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// A Postgres object identifier.
pub type Oid = u32;

/// A table's index in the configuration: a cheap identifier for the hot path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TableId(pub u16);

impl TableId {
    pub fn index(self) -> usize {
        usize::from(self.0)
    }
}

/// A schema-qualified table name. The parts are spelled as in the catalog; `Display` quotes them as SQL and the
/// configuration do.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct QualifiedName {
    pub schema: String,
    pub table: String,
}

impl fmt::Display for QualifiedName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", Identifier(&self.schema), Identifier(&self.table))
    }
}

/// An identifier as SQL writes it, quoted if necessary.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identifier<'a>(pub &'a str);

/// Words that cannot be used unquoted as a name in Postgres 14 to 18: `pg_get_keywords()` without the unreserved ones.
const KEYWORDS: &str = "\
    all analyse analyze and any array as asc asymmetric authorization between bigint binary bit boolean both \
    case cast char character check coalesce collate collation column concurrently constraint create cross \
    current_catalog current_date current_role current_schema current_time current_timestamp current_user dec \
    decimal default deferrable desc distinct do else end except exists extract false fetch float for foreign \
    freeze from full grant greatest group grouping having ilike in initially inner inout int integer \
    intersect interval into is isnull join json json_array json_arrayagg json_exists json_object \
    json_objectagg json_query json_scalar json_serialize json_table json_value lateral leading least left \
    like limit localtime localtimestamp merge_action national natural nchar none normalize not notnull null \
    nullif numeric offset on only or order out outer overlaps overlay placing position precision primary real \
    references returning right row select session_user setof similar smallint some substring symmetric \
    system_user table tablesample then time timestamp to trailing treat trim true union unique user using \
    values varchar variadic verbose when where window with xmlattributes xmlconcat xmlelement xmlexists \
    xmlforest xmlnamespaces xmlparse xmlpi xmlroot xmlserialize xmltable";

impl fmt::Display for Identifier<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_';
        let begins = self.0.bytes().next().is_some_and(|b| !b.is_ascii_digit());
        if begins && self.0.bytes().all(plain) && !KEYWORDS.split(' ').any(|word| word == self.0) {
            return f.write_str(self.0);
        }
        write!(f, "\"{}\"", self.0.replace('"', "\"\""))
    }
}

/// How a NULL column is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum NullRule {
    /// As a field with an empty value.
    Empty,
    /// As no field.
    Omit,
}

/// `cache:category:{id}`: a literal that ends in `:`, then columns separated by `:`. Braces of the literal are doubled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyTemplate {
    /// Everything before the first column: the prefix that belongs to prefetchd. Never empty.
    pub literal: String,
    /// In the template's order; at least one.
    pub columns: Vec<String>,
}

impl fmt::Display for KeyTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.literal.replace('{', "{{").replace('}', "}}"))?;
        for (i, column) in self.columns.iter().enumerate() {
            write!(f, "{}{{{column}}}", if i == 0 { "" } else { ":" })?;
        }
        Ok(())
    }
}

/// `cache:by-parent:{parent_id}`: a literal, then columns separated by `:`, or a literal alone. Braces of the literal are
/// doubled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LookupTemplate {
    /// Never empty. Ends in `:` if columns follow.
    pub literal: String,
    pub columns: Vec<LookupColumn>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LookupColumn {
    pub name: String,
    /// Written `{tags[]}`: one list for each element of an array. At most one column of a template.
    pub each_element: bool,
}

impl fmt::Display for LookupTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.literal.replace('{', "{{").replace('}', "}}"))?;
        for (i, LookupColumn { name, each_element }) in self.columns.iter().enumerate() {
            let (colon, brackets) = (if i == 0 { "" } else { ":" }, if *each_element { "[]" } else { "" });
            write!(f, "{colon}{{{name}{brackets}}}")?;
        }
        Ok(())
    }
}

/// One `[[tables.lookups]]` entry: sets, or sorted sets, whose members are rows of the table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LookupSpec {
    /// The name in URLs.
    pub name: String,
    pub key: LookupTemplate,
    /// The column by which the rows are ordered; `None` for a set without an order.
    pub order: Option<String>,
}

/// One `[[tables]]` entry, checked as far as possible without the catalog.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TableSpec {
    pub id: TableId,
    /// The name in URLs, metrics and logs.
    pub name: String,
    pub table: QualifiedName,
    pub key: KeyTemplate,
    /// All columns if empty.
    pub columns: Vec<String>,
    /// (column, field).
    pub rename: Vec<(String, String)>,
    pub null: NullRule,
    pub ttl_ms: u64,
    pub format: Format,
    pub lookups: Vec<LookupSpec>,
}

impl TableSpec {
    /// Whether it is the same, at whatever place of the configuration.
    pub fn is_like(&self, other: &TableSpec) -> bool {
        let TableSpec { id: _, name, table, key, columns, rename, null, ttl_ms, format, lookups } = self;
        // The name first: most others differ by it.
        (name, table, key, columns) == (&other.name, &other.table, &other.key, &other.columns)
            && (rename, null, ttl_ms) == (&other.rename, &other.null, &other.ttl_ms)
            && (format, lookups) == (&other.format, &other.lookups)
    }

    /// The text that each key of a row begins with, and those of the keys of lists.
    pub fn literals(&self) -> impl Iterator<Item = &str> {
        let lists = self.lookups.iter().map(|lookup| &*lookup.key.literal);
        std::iter::once(&*self.key.literal).chain(lists)
    }
}

/// The `REPLICA IDENTITY` of a table: which columns Postgres sends of the old row for an UPDATE or DELETE.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ReplicaIdentity {
    /// The primary key.
    Default,
    /// None: Postgres rejects UPDATE and DELETE on a published table.
    Nothing,
    /// Every column.
    Full,
    /// A unique index.
    Index,
}

/// A table as the stream last described it. The cells of its rows are in the order of `columns`.
///
/// <https://www.postgresql.org/docs/current/protocol-logicalrep-message-formats.html>
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Relation {
    pub oid: Oid,
    pub name: QualifiedName,
    pub identity: ReplicaIdentity,
    pub columns: Vec<RelationColumn>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RelationColumn {
    pub name: String,
    pub type_oid: Oid,
    pub type_modifier: i32,
    /// Whether the stream marks it as part of the identity; with `REPLICA IDENTITY FULL` that is every column. The
    /// columns of the cache key come from the catalog instead.
    pub in_identity: bool,
}

/// Hashes of what the catalog says about a table beyond its columns. If one of them changes, rows may have changed
/// without a message in the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CatalogMark {
    /// Covers what decides which rows there are and how they are written: the relation and its partitions, the row
    /// filter, the labels of enums.
    pub shape: u64,
    /// Covers the files that hold the rows: new after TRUNCATE, VACUUM FULL, CLUSTER and many forms of ALTER TABLE.
    pub storage: u64,
}

/// What a table consists of. Used to tell an attached partition from any other change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Composition {
    /// Like [`CatalogMark::shape`], but without the leaves.
    pub apart_from_leaves: u64,
    /// The tables that hold the rows, in a fixed order: the table itself, or its partitions at the lowest level.
    pub leaves: Arc<[LeafFile]>,
}

/// A table or partition, and the file that holds its rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct LeafFile {
    pub oid: Oid,
    pub filenode: Oid,
}

impl Composition {
    /// Returns the leaves that were added, if nothing else has changed since `before`. Returns `None` if no leaf was
    /// added.
    pub fn attached_since(&self, before: &Composition) -> Option<Arc<[Oid]>> {
        let old: HashSet<LeafFile> = before.leaves.iter().copied().collect();
        let new: Vec<Oid> = self.leaves.iter().filter(|leaf| !old.contains(leaf)).map(|leaf| leaf.oid).collect();
        let is_all_that_changed = self.apart_from_leaves == before.apart_from_leaves
            && self.leaves.len() - new.len() == before.leaves.len()
            && !new.is_empty();
        is_all_that_changed.then(|| new.into())
    }
}

impl fmt::Display for CatalogMark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}:{:016x}", self.shape, self.storage)
    }
}

impl FromStr for CatalogMark {
    type Err = ();

    fn from_str(s: &str) -> Result<Self, ()> {
        let half = |s: &str| u64::from_str_radix(s, 16).map_err(|_| ());
        let (shape, storage) = s.split_once(':').ok_or(())?;
        Ok(CatalogMark { shape: half(shape)?, storage: half(storage)? })
    }
}

/// How a column's text becomes a field's value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Render {
    /// The bytes of the type's output function.
    AsIs,
    /// `t` and `f` become `true` and `false`.
    Boolean,
}

/// How rows of one shape become hashes or documents: which cell is written to which field.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    pub fields: Vec<Field>,
    pub null: NullRule,
    /// The number of cells in a row of this shape.
    pub cells: usize,
    pub ttl_ms: u64,
    pub form: Form,
}

impl Layout {
    /// Whether an UPDATE without large values can be written over a row in Redis, member by member.
    pub fn can_be_merged(&self) -> bool {
        match self.form {
            Form::Hash | Form::Json(_) => true,
            Form::RedisJson(_) => self.fields.iter().all(|field| redisjson::path(&field.name).is_some()),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Field {
    /// The cell's index in the row.
    pub cell: usize,
    pub name: Bytes,
    pub render: Render,
}

impl Render {
    /// Returns the field's value for a cell's text.
    pub fn value(self, text: &[u8]) -> &[u8] {
        match (self, text) {
            (Render::Boolean, b"t") => b"true",
            (Render::Boolean, b"f") => b"false",
            (Render::Boolean | Render::AsIs, other) => other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_quoted_where_it_must_be() {
        for (name, written) in [
            ("orders", "orders"),
            ("_x1", "_x1"),
            ("User", "\"User\""),
            ("user", "\"user\""),
            ("timestamp", "\"timestamp\""),
            ("1st", "\"1st\""),
            ("a b", "\"a b\""),
            ("a\"b", "\"a\"\"b\""),
            ("größe", "\"größe\""),
            ("", "\"\""),
        ] {
            assert_eq!(Identifier(name).to_string(), written);
        }
        let name = QualifiedName { schema: "public".to_owned(), table: "A \"b\".c".to_owned() };
        assert_eq!(name.to_string(), "public.\"A \"\"b\"\".c\"");
    }
}
