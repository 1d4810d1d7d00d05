//! How the rows of one table with one set of columns become hashes or documents: the configuration, bound by column name
//! to a relation.
//!
//! The fingerprint distinguishes the rows of one mapping from those of another. A mistake here puts values into the
//! wrong fields, or lets a changed table go unnoticed.

use super::key::KeyEncoder;
use crate::change::{Cell, Change, NewRow, Row};
use crate::command::{self, Key};
use crate::fingerprint::Fingerprint;
use crate::format::{Form, Format};
use crate::lookups::Lookups;
use crate::remedy::Sql;
use crate::schema::{Field, Layout, NullRule, Relation, Render, ReplicaIdentity, TableId, TableSpec};
use crate::typed::document;
use crate::typed::json::Json;
use crate::typed::known::KnownTypes;
use crate::typed::row_type::{Inexact, JsonType};
use bytes::Bytes;
use std::collections::HashSet;
use std::sync::Arc;

/// The most bytes of a value that a dead letter shows.
const LETTER_VALUE_BYTES: usize = 4096;
/// The most bytes of a row that a dead letter shows, before JSON escaping makes it up to six times as long. The lowest
/// limit that Redis accepts for `proto-max-bulk-len` is 1 MB.
const LETTER_ROW_BYTES: usize = 128 << 10;

/// Bytes that RESP adds to a field's name and value, and that a boolean gains by being spelled out.
const FIELD_BYTES: usize = 40;
/// Bytes of a command and its arguments besides its key and fields, including the temporary key of a copied row.
const COMMAND_BYTES: usize = 160;

/// The configuration does not match the table.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MappingError {
    #[error(
        "table {table} has no column {column:?}, which `{setting}` of {name:?} names: add it, or correct the configuration (it has {has})"
    )]
    NoColumn { table: String, name: String, setting: &'static str, column: String, has: String },
    #[error("`columns` of {name:?} leaves out {column:?}, which its key needs: add it")]
    KeyLeftOut { name: String, column: String },
    #[error("`columns` of {name:?} leaves out {column:?}, which lookup {lookup:?} needs: add it")]
    LookupLeftOut { name: String, lookup: String, column: String },
    #[error("{0} is ordered by, has no score: order by a number, boolean, date or timestamp, or leave `order` out")]
    NoScore(OfLookup),
    #[error("{0} takes the elements of, is no array: write the column without \"[]\"")]
    NoArray(OfLookup),
    #[error("{0} takes the elements of, is an array whose elements are not separated by commas: choose another column")]
    OtherDelimiter(OfLookup),
    #[error("`columns` of {name:?} names {column:?} twice: name it once")]
    Twice { name: String, column: String },
    #[error("columns {first:?} and {second:?} of {name:?} would both become field {field:?}: correct `rename`")]
    OneField { name: String, first: String, second: String, field: String },
    #[error(
        "column {column:?} of table {table}, which `{setting}` of {name:?} names, is generated, and the publication does \
         not send generated columns: name another column (from Postgres 18 on, the publication can send it: \
         publish_generated_columns = stored)"
    )]
    Generated { table: String, name: String, setting: &'static str, column: String },
    #[error(
        "column {column:?} of table {table} has a type with a cast to json of its own ({type_name}), which only Postgres can \
         perform: leave the column out with `columns` of {name:?}, or write format = \"hash\""
    )]
    OwnCast { table: String, name: String, column: String, type_name: String },
    #[error(
        "the type of column {column:?} of table {table} consists of too many types to be written as JSON: leave the column \
         out with `columns` of {name:?}, or write format = \"hash\""
    )]
    TypeTooLarge { table: String, name: String, column: String },
    #[error(
        "table {table} has replica identity NOTHING, so Postgres cannot say which row an UPDATE or DELETE changes: {remedy}"
    )]
    IdentityNothing { table: String, remedy: String },
    #[error(
        "table {table} has no primary key, so nothing identifies its rows, and Postgres refuses every UPDATE and DELETE of it \
         while it is published: give it a primary key, or, where the key's columns are unique and never NULL: {remedy}"
    )]
    NoIdentity { table: String, remedy: String },
    #[error(
        "the key of {name:?} is made of ({template}), but rows of {table} are identified by ({identity}): write the key \
         with exactly these columns{remedy}"
    )]
    OtherIdentity { name: String, table: String, template: String, identity: String, remedy: String },
}

/// A column of a lookup whose type does not fit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OfLookup {
    pub table: String,
    pub name: String,
    pub lookup: String,
    pub column: String,
    pub type_name: String,
}

impl std::fmt::Display for OfLookup {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let OfLookup { table, name, lookup, column, type_name } = self;
        write!(f, "column {column:?} ({type_name}) of table {table}, which lookup {lookup:?} of {name:?}")
    }
}

impl MappingError {
    /// Turns a missing column into a generated one if it is among `generated`, the table's generated columns that are
    /// not sent.
    pub fn knowing(self, generated: &[String]) -> Self {
        match self {
            MappingError::NoColumn { table, name, setting, column, .. } if generated.contains(&column) => {
                MappingError::Generated { table, name, setting, column }
            }
            other => other,
        }
    }
}

/// The mapping of one table's rows, with one set of columns, to hashes or documents.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mapping {
    pub table: TableId,
    pub layout: Arc<Layout>,
    pub key: KeyEncoder,
    pub lookups: Option<Arc<Lookups>>,
    /// Bytes of the field names, including what RESP adds to them and to their values. See [`Self::weight_of`].
    field_bytes: usize,
    /// Equal for two mappings exactly if the same rows of the same relation produce the same hashes, or documents, with
    /// the same TTL.
    pub fingerprint: u64,
    /// Whether rows can be written. The types of columns may not be known yet, which a document needs.
    pub is_writable: bool,
}

impl Mapping {
    /// # Errors
    ///
    /// If the configuration names a column that the relation does not have, or maps two columns to one field; or if a
    /// document would need a type that cannot be written as JSON.
    pub fn bind(spec: &TableSpec, relation: &Relation, types: &KnownTypes) -> Result<Self, MappingError> {
        let place = |setting: &'static str, column: &str| {
            relation.columns.iter().position(|c| c.name == column).ok_or_else(|| MappingError::NoColumn {
                table: spec.table.to_string(),
                name: spec.name.clone(),
                setting,
                column: column.to_owned(),
                has: relation.columns.iter().map(|c| c.name.as_str()).collect::<Vec<_>>().join(", "),
            })
        };
        let render = |cell: usize| match types.booleans.contains(&relation.columns[cell].type_oid) {
            true => Render::Boolean,
            false => Render::AsIs,
        };
        let mut key_cells = Vec::with_capacity(spec.key.columns.len());
        for column in &spec.key.columns {
            let cell = place("key", column)?;
            key_cells.push((cell, column.clone(), render(cell)));
            if !spec.columns.is_empty() && !spec.columns.contains(column) {
                return Err(MappingError::KeyLeftOut { name: spec.name.clone(), column: column.clone() });
            }
        }
        let chosen: Vec<usize> = if spec.columns.is_empty() {
            (0..relation.columns.len()).collect()
        } else {
            spec.columns.iter().map(|column| place("columns", column)).collect::<Result<_, _>>()?
        };
        for (column, _) in &spec.rename {
            place("rename", column)?;
        }
        for lookup in &spec.lookups {
            let columns = lookup.key.columns.iter().map(|column| &column.name);
            for (setting, column) in columns
                .map(|column| ("lookups.key", column))
                .chain(lookup.order.iter().map(|column| ("lookups.order", column)))
            {
                let cell = place(setting, column)?;
                if !chosen.contains(&cell) {
                    let (name, lookup) = (spec.name.clone(), lookup.name.clone());
                    return Err(MappingError::LookupLeftOut { name, lookup, column: column.clone() });
                }
            }
        }

        let mut fields: Vec<Field> = Vec::with_capacity(chosen.len());
        for cell in chosen {
            let column = &relation.columns[cell];
            let renamed = spec.rename.iter().find(|(from, _)| *from == column.name).map(|(_, to)| to);
            let name = Bytes::copy_from_slice(renamed.unwrap_or(&column.name).as_bytes());
            if let Some(other) = fields.iter().find(|f| f.cell == cell || f.name == name) {
                let first = relation.columns[other.cell].name.clone();
                return Err(if other.cell == cell {
                    MappingError::Twice { name: spec.name.clone(), column: first }
                } else {
                    let field = String::from_utf8_lossy(&name).into_owned();
                    MappingError::OneField { name: spec.name.clone(), first, second: column.name.clone(), field }
                });
            }
            fields.push(Field { cell, name, render: render(cell) });
        }
        let (form, is_writable) = match spec.format {
            Format::Hash => (Form::Hash, true),
            Format::Json | Format::RedisJson => {
                // In the order of the table's columns.
                fields.sort_by_key(|field| field.cell);
                let types = json_types(spec, relation, &fields, types)?;
                let is_writable = types.is_some();
                let form = if spec.format == Format::Json { Form::Json } else { Form::RedisJson };
                (form(types.unwrap_or_default()), is_writable)
            }
        };
        let fingerprint = fingerprint(spec, relation, &fields, &form);
        let layout = Layout { fields, null: spec.null, cells: relation.columns.len(), ttl_ms: spec.ttl_ms, form };
        let key = KeyEncoder::new(&spec.key.literal, key_cells);
        let field_bytes = layout.fields.iter().map(|field| field.name.len() + FIELD_BYTES).sum();
        let lookups = Lookups::of(spec);
        let mut fields_of_lookups = lookups.iter().flat_map(|lookups| &lookups.fields().names);
        let is_field = |name: &Bytes| layout.fields.iter().any(|field| field.name == *name);
        assert!(fields_of_lookups.all(is_field), "columns of lookups are among the fields");
        let layout = Arc::new(layout);
        Ok(Mapping { table: spec.id, layout, key, lookups, field_bytes, fingerprint, is_writable })
    }

    /// An upper bound for the [`command::weight`] of the commands that write this change. Of a document, without the
    /// values that an UPDATE leaves out.
    pub fn weight_of(&self, change: &Change) -> usize {
        match change {
            Change::Insert { new, .. } => self.weight_of_row(new),
            Change::Delete { old, .. } => {
                let key_bytes = self.key_bytes(old.row());
                self.weight_of_commands(1, key_bytes) + self.weight_of_members(key_bytes, |cell| old.row().cell(cell))
            }
            Change::Update { old, new, .. } => {
                let (new_row, partial) = match new {
                    NewRow::Full(row) => (self.weight_of_row(row), false),
                    NewRow::Partial(row) => {
                        let key_bytes = self.key.len_at_most(|cell| row.cell(cell));
                        let values = match self.layout.form.json_types() {
                            None => self.weight_of_fields(row.len_bytes()),
                            Some(types) => length(|out| document::write_known(&self.layout, types, row, out)),
                        };
                        let text = |cell| match row.cell(cell) {
                            Cell::Text(text) => Some(text),
                            Cell::Null | Cell::Unchanged => None,
                        };
                        let members = self.weight_of_members(key_bytes, text);
                        // Of a RedisJSON document, each member is set by itself.
                        let is_by_member = matches!(self.layout.form, Form::RedisJson(_));
                        let commands = 3 + if is_by_member { self.layout.fields.len() } else { 0 };
                        (values + self.weight_of_commands(commands, key_bytes) + members, true)
                    }
                };
                let old_key = old.as_ref().map_or(0, |old| self.key_bytes(old.row()));
                // DEL of the old key; if the rest of the row is there, also COPY and RENAME.
                new_row + old.as_ref().map_or(0, |_| self.weight_of_commands(if partial { 3 } else { 1 }, old_key))
            }
            Change::Truncate { .. } | Change::Foreign { .. } => 0,
        }
    }

    /// Returns what the announcements of this change weigh. `each`: what one weighs without the row's key.
    pub fn weight_of_announcements(&self, change: &Change, each: usize) -> usize {
        let of_new = |new: &NewRow| match new {
            NewRow::Full(row) => self.key_bytes(row),
            NewRow::Partial(row) => self.key.len_at_most(|cell| row.cell(cell)),
        };
        match change {
            Change::Insert { new, .. } => each + self.key_bytes(new),
            Change::Delete { old, .. } => each + self.key_bytes(old.row()),
            Change::Update { old, new, .. } => {
                each + of_new(new) + old.as_ref().map_or(0, |old| each + self.key_bytes(old.row()))
            }
            Change::Truncate { .. } | Change::Foreign { .. } => 0,
        }
    }

    /// The same for a row that is written in full.
    pub fn weight_of_row(&self, row: &Row) -> usize {
        let values = match self.layout.form.json_types() {
            None => self.weight_of_fields(row.len_bytes()),
            Some(types) => length(|out| document::write(&self.layout, types, row, out)),
        };
        let key_bytes = self.key_bytes(row);
        let members = self.weight_of_members(key_bytes, |cell| row.cell(cell));
        values + self.weight_of_commands(3, key_bytes) + members
    }

    /// Twice the weight of the new memberships: those that the row had are known only when the batch is written, and are
    /// mostly as many.
    fn weight_of_members<'r>(&self, key_bytes: usize, text: impl Fn(usize) -> Option<&'r [u8]>) -> usize {
        let of = |lookups: &Arc<Lookups>| lookups.weight_of_texts(&self.layout, key_bytes, |field| text(field.cell));
        2 * self.lookups.as_ref().map_or(0, of)
    }

    fn key_bytes(&self, row: &Row) -> usize {
        self.key.len_at_most(|cell| row.cell(cell).map_or(Cell::Null, Cell::Text))
    }

    fn weight_of_fields(&self, row_bytes: usize) -> usize {
        row_bytes + command::weight(self.field_bytes, 0, self.layout.fields.len())
    }

    fn weight_of_commands(&self, commands: usize, key_bytes: usize) -> usize {
        command::weight(commands * (COMMAND_BYTES + key_bytes), commands, 0)
    }

    /// The keys that a change touches: the new row's and, if Postgres sent the old row, the old row's.
    pub fn keys_of(&self, change: &Change) -> impl Iterator<Item = Key> + use<> {
        let new_key = |new: &NewRow| match new {
            NewRow::Full(row) => self.key.encode(row).ok(),
            NewRow::Partial(row) => self.key.encode_partial(row).ok(),
        };
        let keys = match change {
            Change::Insert { new, .. } => [self.key.encode(new).ok(), None],
            Change::Update { old, new, .. } => {
                [new_key(new), old.as_ref().and_then(|old| self.key.encode(old.row()).ok())]
            }
            Change::Delete { old, .. } => [self.key.encode(old.row()).ok(), None],
            Change::Truncate { .. } | Change::Foreign { .. } => [None, None],
        };
        keys.into_iter().flatten()
    }

    /// The new row of a change as JSON, for the dead-letter stream. Bytes that are not UTF-8 become U+FFFD. Long values
    /// are cut, because the stream keeps thousands of rows, some of them dead letters for being too large.
    pub fn row_json(&self, change: &Change) -> Bytes {
        match change {
            Change::Insert { new, .. } | Change::Update { new: NewRow::Full(new), .. } => self.full_row_json(new),
            Change::Update { new: NewRow::Partial(new), .. } => self.json(|cell| match new.cell(cell) {
                Cell::Text(text) => Some(text),
                Cell::Null | Cell::Unchanged => None,
            }),
            Change::Delete { old, .. } => self.full_row_json(old.row()),
            Change::Truncate { .. } | Change::Foreign { .. } => Bytes::new(),
        }
    }

    /// The same for a row that a load read.
    pub fn full_row_json(&self, row: &Row) -> Bytes {
        self.json(|cell| row.cell(cell))
    }

    fn json<'r>(&self, cell: impl Fn(usize) -> Option<&'r [u8]>) -> Bytes {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let most = LETTER_VALUE_BYTES.min(LETTER_ROW_BYTES / self.layout.fields.len().max(1));
        let cut = |value: &[u8]| match value.get(..most) {
            Some(beginning) if value.len() > most => {
                let whole = String::from_utf8_lossy(beginning);
                format!("{}… ({} bytes)", whole.trim_end_matches('\u{fffd}'), value.len())
            }
            Some(_) | None => text(value),
        };
        let field = |f: &Field| {
            let value = cell(f.cell).map_or(serde_json::Value::Null, |v| cut(f.render.value(v)).into());
            (text(&f.name), value)
        };
        let row: serde_json::Map<_, _> = self.layout.fields.iter().map(field).collect();
        Bytes::from(serde_json::Value::Object(row).to_string())
    }
}

/// The length of what `write` writes.
fn length(write: impl FnOnce(&mut Json)) -> usize {
    let mut counted = Json::new(0);
    write(&mut counted);
    counted.length()
}

/// Returns what the fields become in JSON, or `None` if a type is not known yet.
fn json_types(
    spec: &TableSpec,
    relation: &Relation,
    fields: &[Field],
    types: &KnownTypes,
) -> Result<Option<Vec<JsonType>>, MappingError> {
    let mut of_fields = Vec::with_capacity(fields.len());
    for field in fields {
        let column = &relation.columns[field.cell];
        let place = || (spec.table.to_string(), spec.name.clone(), column.name.clone());
        match types.in_json.get(&column.type_oid) {
            Some(Ok(json_type)) => of_fields.push(json_type.clone()),
            Some(Err(Inexact::OwnCast(type_name))) => {
                let ((table, name, column), type_name) = (place(), type_name.clone());
                return Err(MappingError::OwnCast { table, name, column, type_name });
            }
            Some(Err(Inexact::TooLarge)) => {
                let (table, name, column) = place();
                return Err(MappingError::TypeTooLarge { table, name, column });
            }
            None => return Ok(None),
        }
    }
    Ok(Some(of_fields))
}

/// Independent of columns that are not used; for hashes, also of the order of columns.
fn fingerprint(spec: &TableSpec, relation: &Relation, fields: &[Field], form: &Form) -> u64 {
    let mut hash = Fingerprint::default();
    let mut add = |bytes: &[u8]| hash.add(bytes);
    add(spec.key.to_string().as_bytes());
    add(match spec.null {
        NullRule::Empty => b"empty",
        NullRule::Omit => b"omit",
    });
    add(&spec.ttl_ms.to_le_bytes());
    add(&relation.oid.to_le_bytes());
    let in_order = fields;
    let mut fields: Vec<&Field> = fields.iter().collect();
    fields.sort_by(|a, b| a.name.cmp(&b.name));
    for field in fields {
        let column = &relation.columns[field.cell];
        add(&field.name);
        add(column.name.as_bytes());
        add(&column.type_oid.to_le_bytes());
        add(&column.type_modifier.to_le_bytes());
        add(match field.render {
            Render::AsIs => b"as is",
            Render::Boolean => b"boolean",
        });
    }
    match form.json_types() {
        None => {}
        Some(types) => {
            add(form.format().as_str().as_bytes());
            in_order.iter().for_each(|field| add(&field.name));
            types.iter().for_each(|json_type| add(json_type.encoded().as_bytes()));
        }
    }
    hash.get()
}

/// Checks that the template consists of exactly the columns that identify a row, in any order. With fewer, two rows
/// would share a key; with more, the old key of a DELETE would not be known.
///
/// `identity_columns` are those of the primary key or of the chosen index, from the catalog; empty if there are none.
///
/// # Errors
///
/// If the identity cannot serve as the key. The message ends with the remedy in SQL.
pub fn check_identity(
    spec: &TableSpec,
    identity: ReplicaIdentity,
    identity_columns: &[String],
    relation: &Relation,
) -> Result<(), MappingError> {
    let table = spec.table.to_string();
    match identity {
        ReplicaIdentity::Nothing => {
            let remedy = Sql::IdentityDefault { table: &spec.table }.to_string();
            return Err(MappingError::IdentityNothing { table, remedy });
        }
        ReplicaIdentity::Default | ReplicaIdentity::Full | ReplicaIdentity::Index => {}
    }
    let by_index = Sql::IdentityIndex { table: &spec.table, columns: &spec.key.columns };
    if identity_columns.is_empty() {
        return Err(MappingError::NoIdentity { table, remedy: by_index.to_string() });
    }
    let of_template: HashSet<&String> = spec.key.columns.iter().collect();
    if of_template != identity_columns.iter().collect() {
        return Err(MappingError::OtherIdentity {
            name: spec.name.clone(),
            table,
            template: spec.key.columns.join(", "),
            identity: identity_columns.join(", "),
            remedy: match spec.key.columns.iter().all(|key| relation.columns.iter().any(|c| c.name == *key)) {
                true => format!(", or, where those of the key are unique and never NULL: {by_index}"),
                false => String::new(),
            },
        });
    }
    Ok(())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::plan::key::parse_template;
    use crate::schema::{Oid, QualifiedName, RelationColumn};

    const TEXT: Oid = 25;
    const BOOL: Oid = 16;

    pub fn relation(columns: &[(&str, Oid)]) -> Relation {
        let column = |(name, type_oid): &(&str, Oid)| RelationColumn {
            name: (*name).to_owned(),
            type_oid: *type_oid,
            type_modifier: -1,
            in_identity: *name == "id",
        };
        Relation {
            oid: 7,
            name: QualifiedName { schema: "public".to_owned(), table: "t".to_owned() },
            identity: ReplicaIdentity::Default,
            columns: columns.iter().map(column).collect(),
        }
    }

    pub fn spec() -> TableSpec {
        TableSpec {
            id: TableId(0),
            name: "t".to_owned(),
            table: QualifiedName { schema: "public".to_owned(), table: "t".to_owned() },
            key: parse_template("t:{id}").expect("a template"),
            columns: Vec::new(),
            rename: Vec::new(),
            null: NullRule::Empty,
            ttl_ms: 1000,
            format: Format::Hash,
            lookups: Vec::new(),
        }
    }

    pub fn types() -> KnownTypes {
        let in_json = [(TEXT, Ok(JsonType::String)), (BOOL, Ok(JsonType::Boolean))];
        KnownTypes { booleans: HashSet::from([BOOL]), in_json: in_json.into() }
    }

    fn bind(spec: &TableSpec, columns: &[(&str, Oid)]) -> Result<Mapping, MappingError> {
        Mapping::bind(spec, &relation(columns), &types())
    }

    #[test]
    fn binds_by_name_and_not_by_place() {
        let a = bind(&spec(), &[("id", TEXT), ("on", BOOL)]).expect("fits");
        let b = bind(&spec(), &[("on", BOOL), ("id", TEXT)]).expect("fits");
        assert_eq!(a.layout.fields[1], Field { cell: 1, name: Bytes::from_static(b"on"), render: Render::Boolean });
        assert_eq!(a.fingerprint, b.fingerprint);
        assert_ne!(a.key, b.key);
    }

    #[test]
    fn every_difference_that_shows_in_a_hash_changes_the_fingerprint() {
        let base = bind(&spec(), &[("id", TEXT), ("a", TEXT)]).expect("fits").fingerprint;
        let with = |change: &dyn Fn(&mut TableSpec)| {
            let mut spec = spec();
            change(&mut spec);
            bind(&spec, &[("id", TEXT), ("a", TEXT)]).expect("fits").fingerprint
        };
        let others = [
            with(&|s| s.null = NullRule::Omit),
            with(&|s| s.ttl_ms = 2000),
            with(&|s| s.key = parse_template("u:{id}").expect("a template")),
            with(&|s| s.columns = vec!["id".to_owned()]),
            with(&|s| s.rename = vec![("a".to_owned(), "b".to_owned())]),
            with(&|s| s.format = Format::Json),
            bind(&spec(), &[("id", TEXT), ("a", BOOL)]).expect("fits").fingerprint,
            bind(&spec(), &[("id", TEXT), ("a", TEXT), ("b", TEXT)]).expect("fits").fingerprint,
        ];
        for (i, other) in others.iter().enumerate() {
            assert_ne!(*other, base, "difference {i}");
        }
        let unused = with(&|s| s.columns = vec!["id".to_owned()]);
        let mut spec = spec();
        spec.columns = vec!["id".to_owned()];
        assert_eq!(bind(&spec, &[("id", TEXT)]).expect("fits").fingerprint, unused, "an unused column does not matter");
    }

    /// Another one would load every table of everybody after an upgrade.
    #[test]
    fn the_fingerprint_is_settled() {
        let spec = |format| TableSpec { format, rename: vec![("a".to_owned(), "b".to_owned())], ..spec() };
        let of = |format| bind(&spec(format), &[("id", TEXT), ("a", BOOL)]).expect("fits").fingerprint;
        assert_eq!(
            [Format::Hash, Format::Json, Format::RedisJson].map(of),
            [7_526_868_083_315_818_598, 7_744_931_387_900_956_975, 16_326_572_367_227_043_719]
        );
    }

    #[test]
    fn a_document_depends_on_the_order_of_columns_and_on_what_their_types_consist_of() {
        let spec = TableSpec { format: Format::Json, columns: vec!["a".to_owned(), "id".to_owned()], ..spec() };
        let bind = |columns: &[(&str, Oid)], types: &KnownTypes| Mapping::bind(&spec, &relation(columns), types);
        let base = bind(&[("id", TEXT), ("a", BOOL)], &types()).expect("fits");
        assert_eq!(base.layout.form, Form::Json(vec![JsonType::String, JsonType::Boolean]), "in the table's order");
        let backwards = bind(&[("a", BOOL), ("id", TEXT)], &types()).expect("fits");
        assert_ne!(backwards.fingerprint, base.fingerprint);
        let mut others = types();
        others.in_json.insert(BOOL, Ok(JsonType::Number));
        assert_ne!(bind(&[("id", TEXT), ("a", BOOL)], &others).expect("fits").fingerprint, base.fingerprint);
        let unknown = bind(&[("id", TEXT), ("a", 99)], &types()).expect("it is learned later");
        assert!(base.is_writable && !unknown.is_writable);
        others.in_json.insert(99, Err(Inexact::OwnCast("public.hstore".to_owned())));
        let refused = bind(&[("id", TEXT), ("a", 99)], &others).expect_err("only Postgres can do that").to_string();
        assert!(
            refused.starts_with(
                r#"column "a" of table public.t has a type with a cast to json of its own (public.hstore)"#
            )
        );
        others.in_json.insert(99, Err(Inexact::TooLarge));
        assert!(bind(&[("id", TEXT), ("a", 99)], &others).is_err_and(|e| e.to_string().contains("too many types")));
        assert!(bind(&[("id", TEXT), ("a", TEXT), ("b", 99)], &others).is_ok(), "a column that is not used");
    }

    #[test]
    fn names_what_does_not_fit() {
        let message = |change: &dyn Fn(&mut TableSpec)| {
            let mut spec = spec();
            change(&mut spec);
            bind(&spec, &[("id", TEXT), ("a", TEXT)]).expect_err("does not fit").to_string()
        };
        assert_eq!(
            message(&|s| s.columns = vec!["id".to_owned(), "nmae".to_owned()]),
            r#"table public.t has no column "nmae", which `columns` of "t" names: add it, or correct the configuration (it has id, a)"#
        );
        assert_eq!(
            message(&|s| s.columns = vec!["a".to_owned()]),
            r#"`columns` of "t" leaves out "id", which its key needs: add it"#
        );
        assert_eq!(
            message(&|s| s.rename = vec![("a".to_owned(), "id".to_owned())]),
            r#"columns "id" and "a" of "t" would both become field "id": correct `rename`"#
        );
        assert!(message(&|s| s.rename = vec![("x".to_owned(), "y".to_owned())]).contains("`rename`"));
        assert!(message(&|s| s.columns = ["id", "a", "a"].map(str::to_owned).to_vec()).contains("twice"));
    }

    #[test]
    fn two_columns_may_swap_their_names() {
        let mut spec = spec();
        spec.rename = vec![("id".to_owned(), "a".to_owned()), ("a".to_owned(), "id".to_owned())];
        assert!(bind(&spec, &[("id", TEXT), ("a", TEXT)]).is_ok());
    }

    #[test]
    fn the_key_is_the_identity_in_any_order() {
        let mut spec = spec();
        spec.key = parse_template("t:{b}:{a}").expect("a template");
        let columns = |c: &[&str]| c.iter().map(|c| (*c).to_owned()).collect::<Vec<_>>();
        let known = relation(&[("a", TEXT), ("b", TEXT), ("c", TEXT)]);
        let check =
            |identity, c: &[&str]| check_identity(&spec, identity, &columns(c), &known).map_err(|e| e.to_string());
        assert_eq!(check(ReplicaIdentity::Default, &["a", "b"]), Ok(()));
        assert_eq!(check(ReplicaIdentity::Full, &["a", "b"]), Ok(()));
        assert!(check(ReplicaIdentity::Default, &["a"]).is_err_and(|e| e.contains("identified by (a)")));
        assert!(check(ReplicaIdentity::Index, &["a", "b", "c"]).is_err());
        assert!(check(ReplicaIdentity::Default, &[]).is_err_and(|e| e.contains("no primary key")));
        assert!(check(ReplicaIdentity::Nothing, &["a", "b"]).is_err_and(|e| e.contains("REPLICA IDENTITY DEFAULT")));
    }
}
