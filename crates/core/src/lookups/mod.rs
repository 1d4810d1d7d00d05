//! Lookups: sets and sorted sets whose members are rows. At the end of every batch, *a row is a member of exactly the lists
//! that its hash's values in Redis give*.
//!
//! Everything here is a function of fields as they lie in Redis, never of what Postgres sent, or of what a list should
//! contain by its history. A list is the value at one key of a lookup. [`Lookups`] says of which lists a row is a member,
//! [`changes`] what a batch adds and removes, [`questions`] what has to be read before that is known, and [`sweep`] compares
//! all members with their rows.
//!
//! It must not know SQL, RESP or the session. A mistake here lets a lookup and its rows disagree.

mod array;
pub mod changes;
pub mod questions;
mod score;
pub mod sweep;

pub use score::Score;

use crate::change::{Cell, PartialRow, Row};
use crate::command::{self, Key};
use crate::fingerprint::Fingerprint;
use crate::format::Format;
use crate::plan::key::{self, Area};
use crate::schema::{Field, Layout, NullRule, TableSpec};
use bytes::Bytes;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;

/// A row of which a lookup would need more is a member of none of its lists: that many lists, or that many bytes of their
/// keys and the row's name in each. It bounds what one row adds to a batch.
pub const MOST_LISTS: usize = 1_000;
pub const MOST_BYTES: usize = 64 << 10;

/// The lookups of one table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lookups {
    /// The literal of the table's key. What follows it in a row's key is the row's name in the lists.
    literal: Bytes,
    /// The fields that [`Values`] has. The first is one of the key's columns, which every row has.
    fields: Arc<[Bytes]>,
    lookups: Vec<Lookup>,
    null: NullRule,
    pub ttl_ms: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Lookup {
    area: Area,
    /// As places in [`Lookups::fields`].
    columns: Vec<Column>,
    order: Option<usize>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Column {
    Value(usize),
    EachElement(usize),
}

/// What kind of value a list is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ListKind {
    Set,
    SortedSet,
}

/// The values of the fields that a table's lookups use. `None` is no field.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Values(Box<[Option<Bytes>]>);

/// The lists of which a row is a member, with its score in those that are sorted.
pub type Memberships = BTreeMap<Key, Option<Score>>;

impl Lookups {
    /// Returns `None` if the table has no lookups.
    pub fn of(spec: &TableSpec) -> Option<Arc<Self>> {
        if spec.lookups.is_empty() {
            return None;
        }
        // What the writer reads of a row to know its memberships are fields of a hash.
        assert_eq!(spec.format, Format::Hash, "the configuration refuses others");
        let mut fields: Vec<Bytes> = Vec::new();
        let mut place = |column: &String| {
            let renamed = spec.rename.iter().find(|(from, _)| from == column).map(|(_, to)| to);
            let field = Bytes::copy_from_slice(renamed.unwrap_or(column).as_bytes());
            fields.iter().position(|known| *known == field).unwrap_or_else(|| {
                fields.push(field);
                fields.len() - 1
            })
        };
        place(&spec.key.columns[0]);
        let lookups = spec.lookups.iter().map(|lookup| Lookup {
            area: Area::of_lookup(&lookup.key),
            columns: lookup
                .key
                .columns
                .iter()
                .map(|column| match column.each_element {
                    true => Column::EachElement(place(&column.name)),
                    false => Column::Value(place(&column.name)),
                })
                .collect(),
            order: lookup.order.as_ref().map(&mut place),
        });
        let lookups = lookups.collect();
        let literal = Bytes::copy_from_slice(spec.key.literal.as_bytes());
        Some(Arc::new(Lookups { literal, fields: fields.into(), lookups, null: spec.null, ttl_ms: spec.ttl_ms }))
    }

    /// Returns the fingerprint of a table's lookups. `None` if it has none.
    pub fn fingerprint_of(spec: &TableSpec) -> Option<u64> {
        Self::of(spec).map(|lookups| lookups.fingerprint())
    }

    /// Returns the fields to read of a row, in the order of [`Values::read`].
    pub fn fields(&self) -> &Arc<[Bytes]> {
        &self.fields
    }

    pub fn count(&self) -> usize {
        self.lookups.len()
    }

    /// Returns the keys that the lookup at this place can have.
    pub fn area(&self, lookup: usize) -> &Area {
        &self.lookups[lookup].area
    }

    pub fn kind(&self, lookup: usize) -> ListKind {
        match self.lookups[lookup].order {
            Some(_) => ListKind::SortedSet,
            None => ListKind::Set,
        }
    }

    /// Returns the kind of the list at a key; `None` if none of the lookups has such a key.
    pub fn kind_at(&self, list: &Key) -> Option<ListKind> {
        (0..self.count()).find(|lookup| self.area(*lookup).has(list)).map(|lookup| self.kind(lookup))
    }

    /// Returns the name that the row at this key has in the lists.
    pub fn member(&self, row: &Key) -> Bytes {
        row.0.slice(self.literal.len().min(row.0.len())..)
    }

    /// Returns the key of the row that has this name.
    pub fn row(&self, member: &[u8]) -> Key {
        Key([&self.literal[..], member].concat().into())
    }

    // ---- values -----------------------------------------------------------------------------------------------------

    /// Returns the values that the hash of this row has.
    pub fn values_of(&self, layout: &Layout, row: &Row) -> Values {
        self.values(layout, |field| Some(row.cell(field.cell)))
    }

    /// Returns the values that the hash has once `row` is written over `base`.
    pub fn values_over(&self, base: &Values, layout: &Layout, row: &PartialRow) -> Values {
        let mut values = self.values(layout, |field| match row.cell(field.cell) {
            Cell::Text(text) => Some(Some(text)),
            Cell::Null => Some(None),
            Cell::Unchanged => None,
        });
        for (value, (name, base)) in values.0.iter_mut().zip(self.fields.iter().zip(&base.0)) {
            let field = layout.fields.iter().find(|field| field.name == *name);
            if field.is_some_and(|field| row.cell(field.cell) == Cell::Unchanged) {
                value.clone_from(base);
            }
        }
        values
    }

    /// Returns the values of a hash that has none of the fields.
    pub fn no_values(&self) -> Values {
        Values(vec![None; self.fields.len()].into())
    }

    /// `cell`: the text of a field's cell, `Some(None)` if it is NULL, `None` if it is not known.
    fn values<'r>(&self, layout: &Layout, cell: impl Fn(&Field) -> Option<Option<&'r [u8]>>) -> Values {
        let value = |name: &Bytes| {
            let field = layout.fields.iter().find(|field| field.name == *name)?;
            match (cell(field)?, self.null) {
                (Some(text), _) => Some(Bytes::copy_from_slice(field.render.value(text))),
                (None, NullRule::Empty) => Some(Bytes::new()),
                (None, NullRule::Omit) => None,
            }
        };
        Values(self.fields.iter().map(value).collect())
    }

    // ---- memberships ------------------------------------------------------------------------------------------------

    /// Returns the lists of which the row at `key` is a member.
    pub fn memberships(&self, row: &Key, values: &Values) -> Memberships {
        let mut all = Memberships::new();
        let name_bytes = row.0.len().saturating_sub(self.literal.len());
        for lookup in &self.lookups {
            let lists = self.lists(lookup, values).unwrap_or_default();
            let bytes: usize = lists.iter().map(|list| list.0.len() + name_bytes).sum();
            if lists.len() > MOST_LISTS || bytes > MOST_BYTES {
                continue;
            }
            let score = lookup.order.map(|place| match &values.0[place] {
                Some(value) => Score::of(value),
                None => Score::of_null(),
            });
            all.extend(lists.into_iter().map(|list| (list, score)));
        }
        all
    }

    /// `None` if there are none.
    fn lists(&self, lookup: &Lookup, values: &Values) -> Option<Vec<Key>> {
        let mut each = None;
        let mut parts: Vec<Cow<'_, [u8]>> = Vec::with_capacity(lookup.columns.len());
        for column in &lookup.columns {
            match column {
                Column::Value(place) => parts.push(Cow::Borrowed(match (&values.0[*place], self.null) {
                    (Some(value), _) => &value[..],
                    (None, NullRule::Empty) => b"",
                    (None, NullRule::Omit) => return None,
                })),
                Column::EachElement(place) => {
                    each = Some((parts.len(), array::elements(values.0[*place].as_ref()?)?));
                    parts.push(Cow::Borrowed(b""));
                }
            }
        }
        let literal = lookup.area.prefix().as_bytes();
        let list = |parts: &[Cow<'_, [u8]>]| {
            let longest: usize = parts.iter().map(|part| part.len()).sum();
            // Otherwise the key could be longer than Redis takes.
            (longest <= MOST_BYTES).then(|| key::encode(literal, parts.iter().map(|part| &part[..])))
        };
        let Some((place, elements)) = each else { return Some(vec![list(&parts)?]) };
        if elements.len() > MOST_LISTS {
            return None;
        }
        elements
            .into_iter()
            .map(|element| {
                parts[place] = element;
                list(&parts)
            })
            .collect()
    }

    /// An upper bound for the [`command::weight`] of what these values add to a batch, or take away.
    pub fn weight_of(&self, row: &Key, values: &Values) -> usize {
        let name_bytes = row.0.len();
        self.memberships(row, values).keys().map(|list| weight_of_membership(list.0.len(), name_bytes)).sum()
    }

    /// The same for a row of which the texts of the fields' cells are known, as far as `text` returns them.
    pub fn weight_of_texts<'r>(&self, row_bytes: usize, text: impl Fn(usize) -> Option<&'r [u8]>) -> usize {
        let text = |place: usize| text(place).unwrap_or_default();
        let of = |lookup: &Lookup| {
            let (mut lists, mut list_bytes, mut element_bytes) = (1, lookup.area.prefix().len(), 0);
            for column in &lookup.columns {
                // In a key of several columns, some bytes take three. A boolean gets longer.
                match column {
                    Column::Value(place) => list_bytes += 3 * text(*place).len() + 4,
                    Column::EachElement(place) => {
                        element_bytes = 3 * text(*place).len();
                        lists = memchr::memchr_iter(b',', text(*place)).count() + 1;
                    }
                }
            }
            // With more, there are none.
            let lists = lists.min(MOST_LISTS);
            let bytes = (lists * list_bytes + element_bytes).min(MOST_BYTES);
            lists * weight_of_membership(0, row_bytes) + 3 * bytes
        };
        self.lookups.iter().map(of).sum()
    }

    /// Differs if a row may be a member of other lists, or have other scores.
    pub fn fingerprint(&self) -> u64 {
        let mut hash = Fingerprint::default();
        hash.add(&self.literal);
        hash.add(match self.null {
            NullRule::Empty => b"empty",
            NullRule::Omit => b"omit",
        });
        for lookup in &self.lookups {
            hash.add(lookup.area.prefix().as_bytes());
            for column in &lookup.columns {
                let (kind, place) = match column {
                    Column::Value(place) => (&b"value"[..], place),
                    Column::EachElement(place) => (&b"element"[..], place),
                };
                hash.add(kind);
                hash.add(&self.fields[*place]);
            }
            hash.add(b"order");
            hash.add(lookup.order.map_or(&[][..], |place| &self.fields[place]));
        }
        hash.get()
    }
}

/// Each list of a batch has a command to remove members, one to add them and one for its TTL.
fn weight_of_membership(list_bytes: usize, name_bytes: usize) -> usize {
    /// Of a command besides its key, of a member, and of a score.
    const COMMAND_BYTES: usize = 64;
    const MEMBER_BYTES: usize = 64;
    command::weight(3 * (list_bytes + COMMAND_BYTES) + 2 * (name_bytes + MEMBER_BYTES), 3, 2)
}

impl Values {
    /// What Redis has of a row: the values of [`Lookups::fields`]. `None` if there is no row.
    pub fn read(values: Vec<Option<Bytes>>) -> Option<Self> {
        values.first()?.is_some().then_some(Values(values.into()))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::change::RowBuilder;
    use crate::format::Form;
    use crate::plan::key::{parse_lookup, parse_template};
    use crate::schema::{LookupSpec, QualifiedName, Render, TableId};

    pub fn spec(key: &str, null: NullRule, lookups: &[(&str, Option<&str>)]) -> TableSpec {
        TableSpec {
            id: TableId(0),
            name: "t".to_owned(),
            table: QualifiedName { schema: "public".to_owned(), table: "t".to_owned() },
            key: parse_template(key).expect("a template"),
            columns: Vec::new(),
            rename: vec![("parent_id".to_owned(), "parent".to_owned())],
            null,
            ttl_ms: 1000,
            format: Format::Hash,
            lookups: lookups
                .iter()
                .map(|(key, order)| LookupSpec {
                    name: (*key).to_owned(),
                    key: parse_lookup(key).expect("a template"),
                    order: order.map(str::to_owned),
                })
                .collect(),
        }
    }

    const COLUMNS: [&str; 5] = ["id", "parent", "place", "tags", "shown"];

    fn layout(null: NullRule) -> Layout {
        let render = |name: &str| if name == "shown" { Render::Boolean } else { Render::AsIs };
        let field =
            |(cell, name): (usize, &&str)| Field { cell, name: Bytes::from((*name).to_owned()), render: render(name) };
        let fields = COLUMNS.iter().enumerate().map(field).collect();
        Layout { fields, null, cells: 5, ttl_ms: 1000, form: Form::Hash }
    }

    fn row(cells: [Option<&str>; 5]) -> Row {
        let mut row = RowBuilder::with_capacity(0);
        cells.iter().for_each(|cell| row.cell(cell.map(str::as_bytes)));
        row.row()
    }

    /// The memberships of the row `t:1` as text.
    fn lists(spec: &TableSpec, cells: [Option<&str>; 5]) -> Vec<String> {
        let lookups = Lookups::of(spec).expect("it has lookups");
        let values = lookups.values_of(&layout(spec.null), &row(cells));
        let all = lookups.memberships(&Key(Bytes::from_static(b"t:1")), &values);
        all.iter()
            .map(|(list, score)| match score {
                Some(score) => format!("{list}={score}"),
                None => list.to_string(),
            })
            .collect()
    }

    #[test]
    fn a_row_is_a_member_of_the_lists_that_its_values_give() {
        let spec = spec(
            "t:{id}",
            NullRule::Empty,
            &[
                ("p:{parent_id}", Some("place")),
                ("all", None),
                ("g:{tags[]}", None),
                ("s:{shown}:{parent_id}", Some("shown")),
            ],
        );
        let of = |cells| lists(&spec, cells);
        assert_eq!(
            of([Some("1"), Some("a:b"), Some("7"), Some("{x,y,x}"), Some("t")]),
            ["all", "g:x", "g:y", "p:a:b=7", "s:true:a%3Ab=1"]
        );
        // NULL counts as the empty value, and comes last.
        assert_eq!(of([Some("1"), None, None, None, None]), ["all", "p:=+inf", "s::=+inf"]);
    }

    #[test]
    fn null_is_no_member_where_it_is_no_field() {
        let spec =
            spec("t:{id}", NullRule::Omit, &[("p:{parent_id}", Some("place")), ("all", None), ("g:{tags[]}", None)]);
        assert_eq!(lists(&spec, [Some("1"), None, None, None, None]), ["all"]);
        assert_eq!(lists(&spec, [Some("1"), Some(""), None, Some("{}"), None]), ["all", "p:=+inf"]);
    }

    #[test]
    fn a_row_with_too_many_memberships_has_none() {
        let spec = spec("t:{id}", NullRule::Empty, &[("g:{tags[]}", None), ("p:{parent_id}", None)]);
        let tags = |count: usize| format!("{{{}}}", (0..count).map(|n| n.to_string()).collect::<Vec<_>>().join(","));
        let count = |tags: &str, parent: &str| lists(&spec, [Some("1"), Some(parent), None, Some(tags), None]).len();
        assert_eq!(count(&tags(MOST_LISTS), "x"), MOST_LISTS + 1);
        assert_eq!(count(&tags(MOST_LISTS + 1), "x"), 1);
        assert_eq!(count("{a}", &"x".repeat(MOST_BYTES - 10)), 2);
        assert_eq!(count("{a}", &"x".repeat(MOST_BYTES + 1)), 1);
        assert_eq!(count(&format!("{{{}}}", "x".repeat(MOST_BYTES + 1)), "a"), 1);
    }

    #[test]
    fn a_value_that_was_not_sent_is_that_of_the_hash_before() {
        let spec = spec("t:{id}", NullRule::Empty, &[("p:{parent_id}", Some("place"))]);
        let lookups = Lookups::of(&spec).expect("it has lookups");
        let layout = layout(NullRule::Empty);
        let before = lookups.values_of(&layout, &row([Some("1"), Some("a"), Some("7"), None, None]));
        let mut wire = bytes::BytesMut::new();
        // The order is NULL now, and the parent was not sent.
        wire.extend_from_slice(b"\0\x05t\0\0\0\x011unnn");
        let crate::change::NewRow::Partial(partial) = crate::change::NewRow::take(&mut wire.freeze()).expect("a tuple")
        else {
            panic!("a cell is left out");
        };
        let after = lookups.values_over(&before, &layout, &partial);
        assert_eq!(after, lookups.values_of(&layout, &row([Some("1"), Some("a"), None, None, None])));
    }

    #[test]
    fn a_row_is_named_by_what_follows_the_literal() {
        let lookups = Lookups::of(&spec("t:{id}:{parent_id}", NullRule::Empty, &[("all", None)])).expect("lookups");
        let key = Key(Bytes::from_static(b"t:eu:4711"));
        assert_eq!(&lookups.member(&key)[..], b"eu:4711");
        assert_eq!(lookups.row(b"eu:4711"), key);
        assert_eq!(&lookups.fields()[..], [&b"id"[..]]);
    }

    #[test]
    fn every_difference_changes_the_fingerprint() {
        let of = |key: &str, null, lookups: &[(&str, Option<&str>)]| {
            Lookups::of(&spec(key, null, lookups)).expect("lookups").fingerprint()
        };
        let base = of("t:{id}", NullRule::Empty, &[("p:{parent_id}", Some("place"))]);
        let others = [
            of("u:{id}", NullRule::Empty, &[("p:{parent_id}", Some("place"))]),
            of("t:{id}", NullRule::Omit, &[("p:{parent_id}", Some("place"))]),
            of("t:{id}", NullRule::Empty, &[("q:{parent_id}", Some("place"))]),
            of("t:{id}", NullRule::Empty, &[("p:{tags}", Some("place"))]),
            of("t:{id}", NullRule::Empty, &[("p:{parent_id[]}", Some("place"))]),
            of("t:{id}", NullRule::Empty, &[("p:{parent_id}", None)]),
            of("t:{id}", NullRule::Empty, &[("p:{parent_id}", Some("id"))]),
            of("t:{id}", NullRule::Empty, &[("p:{parent_id}", Some("place")), ("all", None)]),
        ];
        others.iter().enumerate().for_each(|(i, other)| assert_ne!(*other, base, "{i}"));
    }

    #[test]
    fn the_weight_is_known_before_the_values() {
        let lookups = [("p:{parent_id}:{shown}", Some("place")), ("g:{tags[]}", None), ("all", None)];
        let lookups = Lookups::of(&spec("t:{id}", NullRule::Empty, &lookups)).expect("lookups");
        let key = Key(Bytes::from_static(b"t:1"));
        let numbers = (0..900).map(|n| n.to_string()).collect::<Vec<_>>().join(",");
        for tags in ["{}", "{a,b,c}", "{%,%%}", &format!("{{{}}}", ["x"; 3000].join(",")), &format!("{{{numbers}}}")] {
            let row = row([Some("1"), Some("a:c"), Some("7"), Some(tags), Some("f")]);
            let values = lookups.values_of(&layout(NullRule::Empty), &row);
            let place = |place: usize| COLUMNS.iter().position(|name| lookups.fields[place] == *name);
            let most = lookups.weight_of_texts(key.0.len(), |at| row.cell(place(at).expect("a column")));
            let weight = lookups.weight_of(&key, &values);
            assert!(weight <= most, "{weight} {most} {tags:.20}");
        }
    }
}
