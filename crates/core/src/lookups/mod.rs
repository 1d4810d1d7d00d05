//! Lookups: sets and sorted sets whose members are rows. At the end of every batch, *a row is a member of exactly the lists
//! that its values in Redis give*.
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
pub mod ttls;
mod value;

pub use score::Score;
pub use value::Fields;

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
    /// The fields that [`Values`] has.
    fields: Arc<Fields>,
    lookups: Vec<Lookup>,
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

impl Lookup {
    fn kind(&self) -> ListKind {
        match self.order {
            Some(_) => ListKind::SortedSet,
            None => ListKind::Set,
        }
    }
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
        let mut names: Vec<Bytes> = Vec::new();
        let mut place = |column: &String| {
            let renamed = spec.rename.iter().find(|(from, _)| from == column).map(|(_, to)| to);
            let field = Bytes::copy_from_slice(renamed.unwrap_or(column).as_bytes());
            names.iter().position(|known| *known == field).unwrap_or_else(|| {
                names.push(field);
                names.len() - 1
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
        let fields = Arc::new(Fields { format: spec.format, null: spec.null, names: names.into() });
        Some(Arc::new(Lookups { literal, fields, lookups, ttl_ms: spec.ttl_ms }))
    }

    /// Returns the fingerprint of a table's lookups. `None` if it has none.
    pub fn fingerprint_of(spec: &TableSpec) -> Option<u64> {
        Self::of(spec).map(|lookups| lookups.fingerprint())
    }

    /// Returns the fields to read of a row, in the order of [`Values::read`].
    pub fn fields(&self) -> &Arc<Fields> {
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
        self.lookups[lookup].kind()
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

    /// Returns the values that this row has in Redis.
    pub fn values_of(&self, layout: &Layout, row: &Row) -> Values {
        let value = |name: &Bytes| {
            let (place, field) = field_of(layout, name)?;
            self.fields.of_cell(layout, place, row.cell(field.cell))
        };
        Values(self.fields.names.iter().map(value).collect())
    }

    /// Returns the values that Redis has once `row` is written over `base`.
    pub fn values_over(&self, base: &Values, layout: &Layout, row: &PartialRow) -> Values {
        let value = |(name, base): (&Bytes, &Option<Bytes>)| {
            let (place, field) = field_of(layout, name)?;
            match row.cell(field.cell) {
                Cell::Text(text) => self.fields.of_cell(layout, place, Some(text)),
                Cell::Null => self.fields.of_cell(layout, place, None),
                Cell::Unchanged => base.clone(),
            }
        };
        Values(self.fields.names.iter().zip(&base.0).map(value).collect())
    }

    /// Returns the values of a row that is written as this document.
    pub fn values_in(&self, document: &[u8]) -> Values {
        Values(self.fields.in_document(document).into())
    }

    /// Returns the values of a row that has these fields as a hash.
    pub fn values_among(&self, fields: &[(Bytes, Bytes)]) -> Values {
        let value = |name: &Bytes| fields.iter().find(|(field, _)| field == name).map(|(_, value)| value.clone());
        Values(self.fields.names.iter().map(value).collect())
    }

    /// Returns the values of a row that has none of the fields.
    pub fn no_values(&self) -> Values {
        Values(vec![None; self.fields.names.len()].into())
    }

    // ---- memberships ------------------------------------------------------------------------------------------------

    /// Returns the lists of which the row at `key` is a member.
    pub fn memberships(&self, row: &Key, values: &Values) -> Memberships {
        self.each_membership(row, values).map(|(list, _, score)| (list, score)).collect()
    }

    /// The same with the kind of each list. No list comes twice.
    pub fn each_membership(&self, row: &Key, values: &Values) -> impl Iterator<Item = (Key, ListKind, Option<Score>)> {
        let of = move |lookup: &Lookup| {
            let kind = lookup.kind();
            self.memberships_of(lookup, row, values).map(move |(list, score)| (list, kind, score))
        };
        self.lookups.iter().flat_map(of)
    }

    fn memberships_of(
        &self,
        lookup: &Lookup,
        row: &Key,
        values: &Values,
    ) -> impl Iterator<Item = (Key, Option<Score>)> + use<> {
        let name_bytes = row.0.len().saturating_sub(self.literal.len());
        let mut lists = self.lists(lookup, values).unwrap_or_default();
        let bytes: usize = lists.iter().map(|list| list.0.len() + name_bytes).sum();
        if lists.len() > MOST_LISTS || bytes > MOST_BYTES {
            lists.clear();
        }
        let score = lookup.order.map(|place| match &values.0[place] {
            Some(value) => Score::of(value),
            None => Score::of_null(),
        });
        lists.into_iter().map(move |list| (list, score))
    }

    /// Returns the score of the row at `key` in this list; `None` if it is no member.
    pub fn membership(&self, row: &Key, values: &Values, list: &Key) -> Option<Option<Score>> {
        let lookup = self.lookups.iter().find(|lookup| lookup.area.has(list))?;
        self.memberships_of(lookup, row, values).find(|(of, _)| of == list).map(|(_, score)| score)
    }

    /// `None` if there are none.
    fn lists(&self, lookup: &Lookup, values: &Values) -> Option<Vec<Key>> {
        let mut each = None;
        let mut parts: Vec<Cow<'_, [u8]>> = Vec::with_capacity(lookup.columns.len());
        for column in &lookup.columns {
            match column {
                Column::Value(place) => parts.push(Cow::Borrowed(match (&values.0[*place], self.fields.null) {
                    (Some(value), _) => &value[..],
                    (None, NullRule::Empty) => b"",
                    (None, NullRule::Omit) => return None,
                })),
                Column::EachElement(place) => {
                    each = Some((parts.len(), self.fields.elements(values.0[*place].as_ref()?)?));
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
    pub fn weight_of_texts<'r>(
        &self,
        layout: &Layout,
        row_bytes: usize,
        text: impl Fn(&Field) -> Option<&'r [u8]>,
    ) -> usize {
        let text_of = |name: &Bytes| {
            let Some((place, field)) = field_of(layout, name) else { return Cow::Borrowed(&b""[..]) };
            match (text(field), layout.form.format()) {
                (None, _) => Cow::Borrowed(&b""[..]),
                (Some(text), Format::Hash) => Cow::Borrowed(text),
                (text, Format::Json | Format::RedisJson) => {
                    Cow::Owned(self.fields.of_cell(layout, place, text).unwrap_or_default().into())
                }
            }
        };
        let texts: Vec<Cow<'_, [u8]>> = self.fields.names.iter().map(text_of).collect();
        let text = |place: usize| &texts[place][..];
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
        hash.add(self.fields.format.as_str().as_bytes());
        hash.add(match self.fields.null {
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
                hash.add(&self.fields.names[*place]);
            }
            hash.add(b"order");
            hash.add(lookup.order.map_or(&[][..], |place| &self.fields.names[place]));
        }
        hash.get()
    }
}

fn field_of<'l>(layout: &'l Layout, name: &Bytes) -> Option<(usize, &'l Field)> {
    layout.fields.iter().enumerate().find(|(_, field)| field.name == *name)
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
    use crate::typed::document;
    use crate::typed::json::Json;
    use crate::typed::row_type::JsonType;
    use crate::typed::row_type::tests::json_types;
    use proptest::prelude::*;

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

    proptest! {
        /// What a batch relies on is what is read back of the document that it has written.
        #[test]
        fn a_document_has_the_values_of_its_row(
            types in prop::collection::vec(json_types(), 5),
            cells in prop::collection::vec((
                prop::option::of("[-0-9{}\\[\\](),;:\"\\\\ tfNUL]{0,12}|[0-9]{1,3}|\\{[a-z,]{0,5}\\}|null|\\PC{0,8}"),
                prop::option::of("[0-9]{1,3}|\\{\\}|\\[1, 2\\]|2026-01-01 00:00:00\\+00|\\PC{0,8}"),
                any::<bool>(),
            ), 5),
            null in prop::sample::select(vec![NullRule::Empty, NullRule::Omit]),
        ) {
            let lookups = [("p:{parent_id}", Some("place")), ("g:{tags[]}:{shown}", None)];
            let of = Lookups::of(&TableSpec { format: Format::Json, ..spec("t:{id}", null, &lookups) }).expect("lookups");
            let layout = Layout { form: Form::Json(types.clone()), ..layout(null) };
            let document = |row: &Row| {
                let mut out = Json::new(usize::MAX);
                document::write(&layout, &types, row, &mut out);
                out.finish().expect("no limit")
            };
            let bytes = |text: &Option<String>| text.as_deref().map(|text| text.as_bytes().to_vec());
            let build = |cells: Vec<Option<Vec<u8>>>| {
                let mut row = RowBuilder::with_capacity(0);
                cells.iter().for_each(|cell| row.cell(cell.as_deref()));
                row.row()
            };
            let before = build(cells.iter().map(|(before, ..)| bytes(before)).collect());
            let old = of.values_of(&layout, &before);
            prop_assert_eq!(of.values_in(&document(&before)), old.clone());

            let after: Vec<Option<Vec<u8>>> =
                cells.iter().map(|(before, after, stays)| bytes(if *stays { before } else { after })).collect();
            let sent: Vec<Cell<'_>> = cells.iter().zip(&after).map(|((_, _, stays), after)| match (stays, after) {
                (true, _) => Cell::Unchanged,
                (false, Some(text)) => Cell::Text(text),
                (false, None) => Cell::Null,
            }).collect();
            if sent.contains(&Cell::Unchanged) {
                let over = of.values_over(&old, &layout, &PartialRow::of(&sent));
                prop_assert_eq!(of.values_in(&document(&build(after.clone()))), over);
            }
        }
    }

    #[test]
    fn rows_in_json_are_members_by_what_their_documents_show() {
        let lookups = [("p:{parent_id}", Some("place")), ("g:{tags[]}", None), ("s:{shown}", None)];
        let of = Lookups::of(&TableSpec { format: Format::Json, ..spec("t:{id}", NullRule::Empty, &lookups) });
        let of = of.expect("lookups");
        let lists = |document: &str| {
            let all = of.memberships(&Key(Bytes::from_static(b"t:1")), &of.values_in(document.as_bytes()));
            all.iter()
                .map(|(list, score)| format!("{list}{}", score.map_or(String::new(), |s| format!("={s}"))))
                .collect::<Vec<_>>()
        };
        assert_eq!(
            lists(r#"{"id":1,"parent":"a:b","place":"1970-01-02T00:00:00+00:00","tags":["x","y"],"shown":true}"#),
            ["g:x", "g:y", "p:a:b=86400", "s:true"]
        );
        assert_eq!(lists(r#"{"id":1,"parent":null,"place":null,"tags":null,"shown":null}"#), ["p:=+inf", "s:"]);
    }

    #[test]
    fn a_row_is_named_by_what_follows_the_literal() {
        let lookups = Lookups::of(&spec("t:{id}:{parent_id}", NullRule::Empty, &[("all", None)])).expect("lookups");
        let key = Key(Bytes::from_static(b"t:eu:4711"));
        assert_eq!(&lookups.member(&key)[..], b"eu:4711");
        assert_eq!(lookups.row(b"eu:4711"), key);
        assert_eq!(&lookups.fields().names[..], [&b"id"[..]]);
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
        let in_json =
            TableSpec { format: Format::Json, ..spec("t:{id}", NullRule::Empty, &[("p:{parent_id}", Some("place"))]) };
        assert_ne!(Lookups::fingerprint_of(&in_json), Some(base));
    }

    #[test]
    fn the_weight_is_known_before_the_values() {
        let lookups = [("p:{parent_id}:{shown}", Some("place")), ("g:{tags[]}", None), ("all", None)];
        let spec = spec("t:{id}", NullRule::Empty, &lookups);
        let key = Key(Bytes::from_static(b"t:1"));
        let of_tags = JsonType::Array { delimiter: b',', of: Box::new(JsonType::String) };
        let types = vec![JsonType::Number, JsonType::String, JsonType::TimestampTz, of_tags, JsonType::Boolean];
        let numbers = (0..900).map(|n| n.to_string()).collect::<Vec<_>>().join(",");
        for tags in ["{}", "{a,b,c}", "{%,%%}", &format!("{{{}}}", ["x"; 3000].join(",")), &format!("{{{numbers}}}")] {
            let row = row([Some("1"), Some("a:\u{1}\"c"), Some("2026-01-01 00:00:00+00"), Some(tags), Some("f")]);
            for (format, form) in [(Format::Hash, Form::Hash), (Format::Json, Form::Json(types.clone()))] {
                let lookups = Lookups::of(&TableSpec { format, ..spec.clone() }).expect("lookups");
                let layout = Layout { form, ..layout(NullRule::Empty) };
                let values = lookups.values_of(&layout, &row);
                let most = lookups.weight_of_texts(&layout, key.0.len(), |field| row.cell(field.cell));
                let weight = lookups.weight_of(&key, &values);
                assert!(weight > 0 && weight <= most, "{format:?} {weight} {most} {tags:.20}");
            }
        }
    }
}
