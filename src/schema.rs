//! What a table is: to the configuration, to the catalog, and to the stream.

use bytes::Bytes;
use std::fmt;
use std::str::FromStr;

/// A Postgres object identifier.
pub type Oid = u32;

/// The place of a table in the configuration: a cheap name for the hot path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TableId(pub u16);

impl TableId {
    pub fn index(self) -> usize {
        usize::from(self.0)
    }
}

/// A schema-qualified table name, unquoted.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct QualifiedName {
    pub schema: String,
    pub table: String,
}

impl fmt::Display for QualifiedName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.schema, self.table)
    }
}

/// What becomes of a NULL column.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum NullRule {
    /// A field with an empty value.
    Empty,
    /// No field.
    Omit,
}

/// `cache:category:{id}`: a literal that ends in `:`, then columns separated by `:`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyTemplate {
    /// Everything before the first column; the prefix that belongs to prefetchd. Never empty.
    pub literal: String,
    /// In the order of the template; at least one.
    pub columns: Vec<String>,
}

impl fmt::Display for KeyTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.literal)?;
        for (i, column) in self.columns.iter().enumerate() {
            write!(f, "{}{{{column}}}", if i == 0 { "" } else { ":" })?;
        }
        Ok(())
    }
}

/// One `[[tables]]` entry, checked as far as the configuration alone can be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TableSpec {
    pub id: TableId,
    /// The name in URLs, metrics and logs.
    pub name: String,
    pub table: QualifiedName,
    pub key: KeyTemplate,
    /// Empty = all columns.
    pub columns: Vec<String>,
    /// (column, field)
    pub rename: Vec<(String, String)>,
    pub null: NullRule,
    pub ttl_ms: u64,
}

/// `REPLICA IDENTITY` of a table: what identifies the old row of an UPDATE or DELETE.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ReplicaIdentity {
    /// The primary key.
    Default,
    /// Nothing: UPDATE and DELETE of a published table fail.
    Nothing,
    /// Every column.
    Full,
    /// A unique index.
    Index,
}

/// A table as the stream last described it. Row cells come in the order of `columns`.
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
    /// Part of the identity, as the stream says: every column under `REPLICA IDENTITY FULL`. The cache key's columns
    /// come from the catalog instead.
    pub in_identity: bool,
}

/// What the catalog says of a table beyond its columns. Rows may have changed without a word in the stream where it is
/// not what it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CatalogMark {
    /// Of what decides which rows there are and how they are written: the relation and its partitions, the row filter,
    /// the labels of enums.
    pub shape: u64,
    /// Of the files that hold the rows: new ones after TRUNCATE, VACUUM FULL, CLUSTER and many an ALTER TABLE.
    pub storage: u64,
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

/// How rows of one shape become hashes: which cell goes into which field.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    pub fields: Vec<Field>,
    pub null: NullRule,
    /// Cells that a row of this shape has.
    pub cells: usize,
    pub ttl_ms: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Field {
    /// The cell's place in the row.
    pub cell: usize,
    pub name: Bytes,
    pub render: Render,
}

impl Render {
    /// The field's value for a cell's text.
    pub fn value(self, text: &[u8]) -> &[u8] {
        match (self, text) {
            (Render::Boolean, b"t") => b"true",
            (Render::Boolean, b"f") => b"false",
            (Render::Boolean | Render::AsIs, other) => other,
        }
    }
}
