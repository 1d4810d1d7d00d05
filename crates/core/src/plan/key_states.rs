//! The state of every key that one batch touches. However often a key changed, only its last state is sent.
//!
//! Changes come in stream order, and each key yields at most one command. A merge is based on the row that was in
//! Redis when the batch began, so a row whose key changed takes its unchanged large values from its old key. A mistake
//! here tears a row, loses a large value or brings back a deleted row.

use super::key::Poison;
use super::mapping::Mapping;
use super::order::Order;
use crate::change::{Begin, Change, NewRow, OldRow, PartialRow, Row};
use crate::command::{Base, Command, DeadLetter, Key, weight_of_document};
use crate::format::{Form, Format};
use crate::schema::{Layout, TableId};
use crate::typed::document;
use crate::typed::json::Json;
use crate::typed::row_type::JsonType;
use bytes::Bytes;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;

#[derive(Debug, Default)]
pub struct KeyStates {
    /// In the order in which the keys were first touched, so that the same changes produce the same bytes.
    states: Vec<Option<(TableId, Key, KeyState)>>,
    places: HashMap<Key, usize>,
    /// Tables whose keys that were in Redis before this batch are all removed.
    truncated: Vec<TableId>,
    dead_letters: Vec<DeadLetter>,
    /// If changes are announced.
    order: Option<Order>,
}

#[derive(Debug, Clone)]
enum KeyState {
    Absent,
    Full(Arc<Layout>, Row),
    /// The row that was at `base` when the batch began, overwritten with the known cells.
    Over {
        base: Key,
        layout: Arc<Layout>,
        row: PartialRow,
    },
    /// The key changed and its state cannot be derived, or not be written. The row must be read again.
    Unknown,
}

/// A row as the batch may write it.
#[derive(Debug, Clone, Copy)]
pub enum RowState<'a> {
    Full(&'a Layout, &'a Row),
    /// The hash at `base`, overwritten with the known cells.
    Over {
        base: &'a Key,
        layout: &'a Layout,
        row: &'a PartialRow,
    },
}

/// The keys that a change touched.
#[derive(Debug, PartialEq, Eq)]
pub struct Applied {
    pub key: Key,
    /// The old key, if the row's key changed.
    pub also: Option<Key>,
}

/// What to send for the batch.
#[derive(Debug)]
pub struct Finished {
    /// In this order: each [`Command::Keep`] precedes everything that could change the hash it copies.
    pub commands: Vec<Command>,
    /// Keys that must be read again. Nothing is sent for them, so Redis keeps what it has.
    pub pending: Vec<(TableId, Key)>,
}

/// What documents are patched with.
#[derive(Debug, Clone, Copy)]
pub struct Documents<'a> {
    /// Those that were in Redis when the batch began, as far as they were read.
    pub bases: &'a HashMap<Key, Bytes>,
    /// How much all patched documents may weigh.
    pub room_bytes: usize,
}

impl KeyStates {
    pub fn has_dead_letters(&self) -> bool {
        !self.dead_letters.is_empty()
    }

    /// What follows until the next call is of this transaction, and is announced.
    pub fn announces(&mut self, by: Begin) {
        self.order.get_or_insert_default().follows(by);
    }

    /// Takes the order in which keys and tables were last changed, if changes are announced.
    pub fn take_order(&mut self) -> Option<Order> {
        self.order.take()
    }

    /// Adds one change of a row.
    ///
    /// # Errors
    ///
    /// If the row has no key. The change is then ignored, except that the old key, if known, becomes absent.
    pub fn apply(&mut self, mapping: &Arc<Mapping>, change: &Change) -> Result<Applied, Poison> {
        let table = mapping.table;
        match change {
            Change::Insert { new, .. } => {
                let key = mapping.key.encode(new)?;
                self.set(table, key.clone(), KeyState::full(mapping, new));
                Ok(Applied { key, also: None })
            }
            Change::Update { old, new, .. } => self.update(mapping, old.as_ref(), new),
            Change::Delete { old, .. } => {
                let key = mapping.key.encode(old.row())?;
                self.set(table, key.clone(), KeyState::Absent);
                Ok(Applied { key, also: None })
            }
            Change::Truncate { .. } => unreachable!("a TRUNCATE covers several tables and goes through `truncate`"),
            Change::Foreign { .. } => unreachable!("a table that is not configured has no mapping"),
        }
    }

    fn update(&mut self, mapping: &Arc<Mapping>, old: Option<&OldRow>, new: &NewRow) -> Result<Applied, Poison> {
        let table = mapping.table;
        let old_key = old.map(|old| mapping.key.encode(old.row())).transpose()?;
        let new_key = match new {
            NewRow::Full(row) => mapping.key.encode(row),
            NewRow::Partial(row) => mapping.key.encode_partial(row),
        };
        let key = match new_key {
            Ok(key) => key,
            Err(poison) => {
                if let Some(old_key) = old_key {
                    self.set(table, old_key, KeyState::Absent);
                }
                return Err(poison);
            }
        };
        let moved_from = old_key.filter(|old_key| *old_key != key);
        let state = match new {
            NewRow::Full(row) => KeyState::full(mapping, row),
            NewRow::Partial(row) => self.over(mapping, moved_from.as_ref().unwrap_or(&key), row),
        };
        if let Some(old_key) = &moved_from {
            self.set(table, old_key.clone(), KeyState::Absent);
        }
        self.set(table, key.clone(), state);
        Ok(Applied { key, also: moved_from })
    }

    /// The state of the row that was at `from`, with these cells changed.
    fn over(&self, mapping: &Mapping, from: &Key, row: &PartialRow) -> KeyState {
        let layout = mapping.layout.clone();
        match self.state(from) {
            _ if !mapping.is_writable => KeyState::Unknown,
            None if self.truncated.contains(&mapping.table) => KeyState::Unknown,
            None => KeyState::Over { base: from.clone(), layout, row: row.clone() },
            Some(KeyState::Full(before, known)) if *before == layout => {
                KeyState::Full(layout, row.completed_from(known))
            }
            Some(KeyState::Over { base, layout: before, row: known }) if *before == layout => {
                KeyState::Over { base: base.clone(), layout, row: row.over(known) }
            }
            // The columns changed within the batch, or the row should not have existed.
            Some(KeyState::Full(..) | KeyState::Over { .. } | KeyState::Absent | KeyState::Unknown) => {
                KeyState::Unknown
            }
        }
    }

    /// Removes every row of the table, including those of this batch.
    pub fn truncate(&mut self, table: TableId) {
        for slot in &mut self.states {
            if let Some((_, key, _)) = slot.take_if(|(of, ..)| *of == table) {
                self.places.remove(&key);
            }
        }
        if !self.truncated.contains(&table) {
            self.truncated.push(table);
        }
        if let Some(order) = &mut self.order {
            order.truncates(table);
        }
    }

    /// Tables whose keys must all be removed from Redis before the commands run.
    pub fn truncated(&self) -> impl Iterator<Item = TableId> + use<'_> {
        self.truncated.iter().copied()
    }

    pub fn dead_letter(&mut self, letter: DeadLetter) {
        self.dead_letters.push(letter);
    }

    /// The bases of merges, with the formats that they must have.
    pub fn bases(&self) -> impl Iterator<Item = (&Key, Format)> {
        self.states.iter().flatten().filter_map(|(_, _, state)| match state {
            KeyState::Over { base, layout, .. } => Some((base, layout.form.format())),
            KeyState::Absent | KeyState::Full(..) | KeyState::Unknown => None,
        })
    }

    /// The keys whose rows the batch may change.
    pub fn touched(&self) -> impl Iterator<Item = (TableId, &Key)> {
        self.states.iter().flatten().map(|(table, key, _)| (*table, key))
    }

    /// Whether the batch may change any of these rows.
    pub fn touches_any<'k>(&self, mut keys: impl Iterator<Item = &'k Key>) -> bool {
        !self.places.is_empty() && keys.any(|key| self.places.contains_key(key))
    }

    /// The rows that the batch may write: each with its table, its key and, if some of its cells are those of the hash at
    /// another key or the same, that key.
    pub fn rows(&self) -> impl Iterator<Item = (TableId, &Key, RowState<'_>)> {
        self.states.iter().flatten().filter_map(|(table, key, state)| {
            let state = match state {
                KeyState::Full(layout, row) => RowState::Full(layout, row),
                KeyState::Over { base, layout, row } => RowState::Over { base, layout, row },
                KeyState::Absent | KeyState::Unknown => return None,
            };
            Some((*table, key, state))
        })
    }

    /// Returns whether this batch alone determines the key, whatever Redis had there before.
    pub fn settles(&self, key: &Key) -> bool {
        self.state(key).is_some_and(KeyState::settles)
    }

    /// The keys that this batch alone determines, whatever Redis had there before.
    pub fn settled(&self) -> impl Iterator<Item = (TableId, Key)> + use<'_> {
        self.states
            .iter()
            .flatten()
            .filter(|(_, _, state)| state.settles())
            .map(|(table, key, _)| (*table, key.clone()))
    }

    /// Returns the commands. `mergeable` tells whether the table's rows were written with its present mapping; `is_row`
    /// tells whether the key is a correct row of its table's format (a hash must be watched, too); `copies`, whether a row
    /// can be copied to another key.
    pub fn finish(
        self,
        mergeable: impl Fn(TableId) -> bool,
        is_row: impl Fn(&Key) -> bool,
        copies: bool,
        Documents { bases, mut room_bytes }: Documents<'_>,
    ) -> Finished {
        let mut keeps = Vec::new();
        let mut commands = Vec::with_capacity(self.places.len());
        let mut pending = Vec::new();
        for (table, key, state) in self.states.into_iter().flatten() {
            match state {
                KeyState::Absent => commands.push(Command::Delete { key }),
                KeyState::Full(layout, row) => commands.push(Command::Put { key, layout, row }),
                KeyState::Over { base, layout, row }
                    if mergeable(table) && layout.can_be_merged() && is_row(&base) && (copies || base == key) =>
                {
                    if let Form::Json(types) = &layout.form {
                        let old = bases.get(&base);
                        match old.and_then(|old| patched(&layout, types, old, &row, &key, &mut room_bytes)) {
                            Some(document) => {
                                commands.push(Command::PutDocument { key, document, ttl_ms: layout.ttl_ms });
                            }
                            None => pending.push((table, key)),
                        }
                        continue;
                    }
                    let base = if base == key {
                        Base::SameKey
                    } else {
                        let slot = u32::try_from(keeps.len()).expect("fewer keys than 2^32 lie in memory");
                        keeps.push(Command::Keep { key: base, slot });
                        Base::Kept(slot)
                    };
                    commands.push(Command::Merge { key, base, layout, row });
                }
                KeyState::Over { .. } | KeyState::Unknown => pending.push((table, key)),
            }
        }
        keeps.append(&mut commands);
        keeps.extend(self.dead_letters.into_iter().map(Command::DeadLetter));
        Finished { commands: keeps, pending }
    }

    fn state(&self, key: &Key) -> Option<&KeyState> {
        self.states[*self.places.get(key)?].as_ref().map(|(_, _, state)| state)
    }

    fn set(&mut self, table: TableId, key: Key, state: KeyState) {
        if let Some(order) = &mut self.order {
            order.changes(table, &key);
        }
        match self.places.entry(key) {
            Entry::Occupied(place) => {
                let key = place.key().clone();
                self.states[*place.get()] = Some((table, key, state));
            }
            Entry::Vacant(place) => {
                let key = place.key().clone();
                place.insert(self.states.len());
                self.states.push(Some((table, key, state)));
            }
        }
    }
}

/// Returns a document with the known cells of `row`, if that is certain and there is room for it.
fn patched(
    layout: &Layout,
    types: &[JsonType],
    old: &[u8],
    row: &PartialRow,
    key: &Key,
    room_bytes: &mut usize,
) -> Option<Bytes> {
    let mut out = Json::new(*room_bytes);
    document::patch(layout, types, old, row, &mut out)?;
    *room_bytes = room_bytes.checked_sub(weight_of_document(key, out.length()))?;
    Some(out.finish()?.into())
}

impl KeyState {
    fn full(mapping: &Mapping, row: &Row) -> Self {
        match mapping.is_writable {
            true => KeyState::Full(mapping.layout.clone(), row.clone()),
            false => KeyState::Unknown,
        }
    }

    fn settles(&self) -> bool {
        match self {
            KeyState::Absent | KeyState::Full(..) => true,
            KeyState::Over { .. } | KeyState::Unknown => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::mapping::tests::{relation, spec, types};
    use super::*;
    use crate::change::{Cell, RowBuilder};
    use crate::schema::TableSpec;
    use bytes::{BufMut, BytesMut};
    use proptest::prelude::*;
    use std::collections::{BTreeMap, HashSet};
    use std::sync::LazyLock;

    /// The rows of the model: ID, a small value, and a large value that an UPDATE may leave out.
    type Id = u8;
    type Rows = BTreeMap<Id, (u32, u32)>;

    const NAMES: [&str; 3] = ["id", "small", "large"];

    fn mapping(format: Format) -> Arc<Mapping> {
        let shape = relation(&NAMES.map(|name| (name, 25)));
        Arc::new(Mapping::bind(&TableSpec { format, ..spec() }, &shape, &types()).expect("fits"))
    }

    /// No document is there, and none is needed.
    fn no_documents() -> Documents<'static> {
        static NONE: LazyLock<HashMap<Key, Bytes>> = LazyLock::new(HashMap::new);
        Documents { bases: &NONE, room_bytes: 0 }
    }

    fn full(id: Id, small: u32, large: u32) -> Row {
        let mut b = RowBuilder::with_capacity(16);
        b.text(id.to_string().as_bytes());
        b.text(small.to_string().as_bytes());
        b.text(large.to_string().as_bytes());
        b.row()
    }

    fn without_large(id: Id, small: u32) -> NewRow {
        let mut wire = BytesMut::new();
        wire.put_u16(3);
        for text in [id.to_string(), small.to_string()] {
            wire.put_u8(b't');
            wire.put_u32(u32::try_from(text.len()).expect("short"));
            wire.put_slice(text.as_bytes());
        }
        wire.put_u8(b'u');
        NewRow::take(&mut wire.freeze()).expect("well-formed")
    }

    fn old(id: Id) -> OldRow {
        let mut b = RowBuilder::with_capacity(16);
        b.text(id.to_string().as_bytes());
        b.null();
        b.null();
        OldRow::Key(b.row())
    }

    fn key(id: Id) -> Key {
        Key(Bytes::from(format!("t:{id}")))
    }

    /// What an application may do. A step that does not apply to the present rows does nothing.
    #[derive(Debug, Clone)]
    enum Doing {
        Insert(Id),
        UpdateAll(Id),
        UpdateSmall(Id),
        Move(Id, Id),
        MoveWithoutLarge(Id, Id),
        Delete(Id),
        Truncate,
        /// Writes the batch to Redis.
        Flush,
    }

    fn doings() -> impl Strategy<Value = Vec<Doing>> {
        let id = || 0..4_u8;
        let one = prop_oneof![
            4 => id().prop_map(Doing::Insert),
            2 => id().prop_map(Doing::UpdateAll),
            4 => id().prop_map(Doing::UpdateSmall),
            2 => (id(), id()).prop_map(|(a, b)| Doing::Move(a, b)),
            4 => (id(), id()).prop_map(|(a, b)| Doing::MoveWithoutLarge(a, b)),
            3 => id().prop_map(Doing::Delete),
            1 => Just(Doing::Truncate),
            2 => Just(Doing::Flush),
        ];
        prop::collection::vec(one, 1..40)
    }

    fn take(batch: &mut KeyStates, rows: &mut Rows, mapping: &Arc<Mapping>, doing: &Doing, stamp: u32) {
        let change = match *doing {
            Doing::Insert(id) if !rows.contains_key(&id) => {
                rows.insert(id, (stamp, stamp));
                Change::Insert { relation: 7, new: full(id, stamp, stamp) }
            }
            Doing::UpdateAll(id) if rows.contains_key(&id) => {
                rows.insert(id, (stamp, stamp));
                Change::Update { relation: 7, old: None, new: NewRow::Full(full(id, stamp, stamp)) }
            }
            Doing::UpdateSmall(id) => {
                let Some(row) = rows.get_mut(&id) else { return };
                row.0 = stamp;
                Change::Update { relation: 7, old: None, new: without_large(id, stamp) }
            }
            Doing::Move(from, to) if from != to && !rows.contains_key(&to) => {
                if rows.remove(&from).is_none() {
                    return;
                }
                rows.insert(to, (stamp, stamp));
                Change::Update { relation: 7, old: Some(old(from)), new: NewRow::Full(full(to, stamp, stamp)) }
            }
            Doing::MoveWithoutLarge(from, to) if from != to && !rows.contains_key(&to) => {
                let Some((_, large)) = rows.remove(&from) else { return };
                rows.insert(to, (stamp, large));
                Change::Update { relation: 7, old: Some(old(from)), new: without_large(to, stamp) }
            }
            Doing::Delete(id) => {
                if rows.remove(&id).is_none() {
                    return;
                }
                Change::Delete { relation: 7, old: old(id) }
            }
            Doing::Truncate => {
                rows.clear();
                batch.truncate(mapping.table);
                return;
            }
            Doing::Insert(_) | Doing::UpdateAll(_) | Doing::Move(..) | Doing::MoveWithoutLarge(..) | Doing::Flush => {
                return;
            }
        };
        batch.apply(mapping, &change).expect("every row has its key");
    }

    /// A model of Redis that implements these commands only.
    #[derive(Debug, Default, Clone, PartialEq)]
    struct Redis(BTreeMap<Key, BTreeMap<usize, Vec<u8>>>);

    impl Redis {
        fn perform(&mut self, commands: Vec<Command>) {
            let mut kept = BTreeMap::new();
            for command in commands {
                match command {
                    Command::Put { key, row, .. } => {
                        let cells = row.cells().enumerate().map(|(i, c)| (i, c.expect("no NULL here").to_vec()));
                        self.0.insert(key, cells.collect());
                    }
                    Command::PutDocument { key, document, .. } => {
                        let fields: Vec<(String, String)> = serde_json::from_slice::<BTreeMap<_, _>>(&document)
                            .expect("a document")
                            .into_iter()
                            .collect();
                        let place = |name: &str| NAMES.iter().position(|of| *of == name).expect("a field");
                        let cells = fields.into_iter().map(|(name, value)| (place(&name), value.into_bytes()));
                        self.0.insert(key, cells.collect());
                    }
                    Command::Keep { key, slot } => {
                        kept.insert(slot, self.0.get(&key).cloned().expect("kept only what is there"));
                    }
                    Command::Merge { key, base, row, .. } => {
                        let mut hash = match base {
                            Base::SameKey => self.0.get(&key).cloned().expect("merged only into what is there"),
                            Base::Kept(slot) => kept.remove(&slot).expect("kept before"),
                        };
                        for (i, cell) in row.cells().enumerate() {
                            if let Cell::Text(text) = cell {
                                hash.insert(i, text.to_vec());
                            }
                        }
                        self.0.insert(key, hash);
                    }
                    Command::Delete { key } => {
                        self.0.remove(&key);
                    }
                    Command::Renew { .. }
                    | Command::Join { .. }
                    | Command::Leave { .. }
                    | Command::DeadLetter(_)
                    | Command::Announce(_)
                    | Command::Remember { .. }
                    | Command::Forget { .. }
                    | Command::Enter { .. } => unreachable!("not made here"),
                }
            }
        }

        /// The rows as documents.
        fn documents(&self, mapping: &Mapping) -> HashMap<Key, Bytes> {
            let Form::Json(types) = &mapping.layout.form else { return HashMap::new() };
            let document = |cells: &BTreeMap<usize, Vec<u8>>| {
                let (mut row, mut out) = (RowBuilder::with_capacity(16), Json::new(usize::MAX));
                cells.values().for_each(|cell| row.text(cell));
                document::write(&mapping.layout, types, &row.row(), &mut out);
                out.finish().expect("no limit").into()
            };
            self.0.iter().map(|(key, cells)| (key.clone(), document(cells))).collect()
        }

        fn equals(&self, rows: &Rows, but: &[Key]) -> Result<(), TestCaseError> {
            let mut expected = Redis::default();
            expected.perform(
                rows.iter()
                    .map(|(id, (small, large))| Command::Put {
                        key: key(*id),
                        layout: mapping(Format::Hash).layout.clone(),
                        row: full(*id, *small, *large),
                    })
                    .collect(),
            );
            let mut found = self.clone();
            for key in but {
                expected.0.remove(key);
                found.0.remove(key);
            }
            prop_assert_eq!(found, expected);
            Ok(())
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(3_000))]

        /// After every batch Redis has exactly the rows that Postgres has. Losing a row makes it pending and has no
        /// other effect.
        #[test]
        fn a_batch_leaves_what_postgres_has(
            doings in doings(),
            lost in prop::option::of(0..4_u8),
            format in prop::sample::select(vec![Format::Hash, Format::Json]),
        ) {
            let mapping = mapping(format);
            let (mut rows, mut redis, mut batch) = (Rows::new(), Redis::default(), KeyStates::default());
            let mut waiting: HashSet<Key> = HashSet::new();
            for (stamp, doing) in doings.iter().chain([&Doing::Flush]).enumerate() {
                let stamp = u32::try_from(stamp).expect("few steps");
                take(&mut batch, &mut rows, &mapping, doing, stamp);
                let Doing::Flush = doing else { continue };
                if let Some(lost) = lost.filter(|_| stamp % 2 == 1)
                    && redis.0.remove(&key(lost)).is_some()
                {
                    waiting.insert(key(lost));
                }
                let batch = std::mem::take(&mut batch);
                if batch.truncated().next().is_some() {
                    redis.0.clear();
                    waiting.clear();
                }
                // The bases as they were before this batch, which may also settle one.
                let lost_now = waiting.clone();
                for (_, key) in batch.settled() {
                    waiting.remove(&key);
                }
                let there: HashSet<Key> = redis.0.keys().filter(|k| !lost_now.contains(*k)).cloned().collect();
                let documents = redis.documents(&mapping);
                let documents = Documents { bases: &documents, room_bytes: usize::MAX };
                let finished = batch.finish(|_| true, |key| there.contains(key), true, documents);
                redis.perform(finished.commands);
                waiting.extend(finished.pending.into_iter().map(|(_, key)| key));
                if lost.is_none() {
                    prop_assert!(waiting.is_empty(), "nothing is pending where nothing was lost: {:?}", waiting);
                }
                redis.equals(&rows, &waiting.iter().cloned().collect::<Vec<_>>())?;
            }
        }

        /// Nothing is merged into the hashes of a table that is being loaded.
        #[test]
        fn nothing_is_merged_into_hashes_that_may_be_wrong(doings in doings()) {
            let (mapping, mut rows, mut batch) = (mapping(Format::Hash), Rows::new(), KeyStates::default());
            for (stamp, doing) in doings.iter().enumerate() {
                take(&mut batch, &mut rows, &mapping, doing, u32::try_from(stamp).expect("few steps"));
            }
            let over = batch.bases().count();
            let finished = batch.finish(|_| false, |_| true, true, no_documents());
            let merges = |c: &Command| matches!(c, Command::Merge { .. } | Command::Keep { .. });
            prop_assert!(!finished.commands.iter().any(merges));
            prop_assert!(finished.pending.len() >= over);
        }
    }

    #[test]
    fn a_swap_in_one_transaction_takes_the_large_values_along() {
        let (mapping, mut batch) = (mapping(Format::Hash), KeyStates::default());
        let moved = |from, to| Change::Update { relation: 7, old: Some(old(from)), new: without_large(to, 9) };
        for change in [moved(1, 3), moved(2, 1), moved(3, 2)] {
            batch.apply(&mapping, &change).expect("has its key");
        }
        let mut redis = Redis::default();
        for id in [1, 2] {
            redis.perform(vec![Command::Put {
                key: key(id),
                layout: mapping.layout.clone(),
                row: full(id, 0, u32::from(id)),
            }]);
        }
        assert_eq!(batch.bases().count(), 2);
        redis.perform(batch.finish(|_| true, |_| true, true, no_documents()).commands);
        redis.equals(&Rows::from([(1, (9, 2)), (2, (9, 1))]), &[]).expect("swapped");
    }

    #[test]
    fn a_document_for_which_there_is_no_room_is_read_again() {
        let mapping = mapping(Format::Json);
        let bases = HashMap::from([1, 2].map(|id| (key(id), Bytes::from(r#"{"id":"1","small":"2","large":"3"}"#))));
        let weight = weight_of_document(&key(1), r#"{"id":"1","small":"9","large":"3"}"#.len());
        for (room_bytes, fit) in [(2 * weight, 2), (2 * weight - 1, 1), (weight - 1, 0)] {
            let mut batch = KeyStates::default();
            for id in [1, 2] {
                let update = Change::Update { relation: 7, old: None, new: without_large(id, 9) };
                batch.apply(&mapping, &update).expect("has its key");
            }
            let finished = batch.finish(|_| true, |_| true, true, Documents { bases: &bases, room_bytes });
            assert_eq!((finished.commands.len(), finished.pending.len()), (fit, 2 - fit));
        }
    }

    /// A type that the stream names may be a new one.
    #[test]
    fn a_row_of_unknown_types_is_read_again() {
        let shape = relation(&[("id", 25), ("small", 25), ("large", 99)]);
        let spec = TableSpec { format: Format::Json, ..spec() };
        let mapping = Arc::new(Mapping::bind(&spec, &shape, &types()).expect("fits"));
        let mut batch = KeyStates::default();
        for change in [
            Change::Insert { relation: 7, new: full(1, 1, 1) },
            Change::Update { relation: 7, old: None, new: NewRow::Full(full(2, 1, 1)) },
            Change::Update { relation: 7, old: None, new: without_large(3, 1) },
            Change::Update { relation: 7, old: Some(old(4)), new: without_large(5, 1) },
        ] {
            batch.apply(&mapping, &change).expect("has its key");
        }
        let finished = batch.finish(|_| true, |_| true, true, no_documents());
        assert_eq!(finished.commands, [Command::Delete { key: key(4) }]);
        assert_eq!(finished.pending, [1, 2, 3, 5].map(|id| (TableId(0), key(id))));
    }

    #[test]
    fn another_shape_in_one_batch_is_read_again() {
        let mut batch = KeyStates::default();
        let narrow = mapping(Format::Hash);
        let shape = relation(&[("id", 25), ("small", 25), ("large", 16)]);
        let other = Arc::new(Mapping::bind(&spec(), &shape, &types()).expect("fits"));
        let update = |id, small| Change::Update { relation: 7, old: None, new: without_large(id, small) };
        batch.apply(&narrow, &Change::Insert { relation: 7, new: full(1, 1, 1) }).expect("has its key");
        batch.apply(&narrow, &update(2, 1)).expect("has its key");
        for id in [1, 2] {
            batch.apply(&other, &update(id, 2)).expect("has its key");
            assert!(!batch.settles(&key(id)));
        }
        assert_eq!(
            batch.finish(|_| true, |_| true, true, no_documents()).pending,
            [1, 2].map(|id| (TableId(0), key(id)))
        );
    }

    #[test]
    fn a_large_value_does_not_come_back_from_before_a_truncate() {
        let (mapping, mut batch) = (mapping(Format::Hash), KeyStates::default());
        batch.truncate(mapping.table);
        batch
            .apply(&mapping, &Change::Update { relation: 7, old: None, new: without_large(1, 2) })
            .expect("has its key");
        assert_eq!(batch.bases().count(), 0);
        assert_eq!(batch.finish(|_| true, |_| true, true, no_documents()).pending, [(TableId(0), key(1))]);
    }

    #[test]
    fn a_row_that_cannot_be_copied_to_its_new_key_is_read_again() {
        let (mapping, mut batch) = (mapping(Format::Hash), KeyStates::default());
        let moved = Change::Update { relation: 7, old: Some(old(1)), new: without_large(2, 5) };
        let stays = Change::Update { relation: 7, old: None, new: without_large(3, 5) };
        [moved, stays].iter().for_each(|change| drop(batch.apply(&mapping, change).expect("has its key")));
        let finished = batch.finish(|_| true, |_| true, false, no_documents());
        assert_eq!(finished.pending, [(TableId(0), key(2))]);
        let merges = |c: &Command| matches!(c, Command::Merge { key: k, base: Base::SameKey, .. } if *k == key(3));
        assert!(matches!(&finished.commands[..], [Command::Delete { .. }, merge] if merges(merge)), "{finished:?}");
    }

    #[test]
    fn a_dead_letter_is_written_after_everything_else() {
        let (mapping, mut batch) = (mapping(Format::Hash), KeyStates::default());
        assert!(!batch.has_dead_letters());
        let (table, key) = ("t".to_owned(), Bytes::new());
        let letter = DeadLetter { table, key, lsn: String::new(), xid: 9, reason: String::new(), row: Bytes::new() };
        batch.dead_letter(letter);
        assert!(batch.has_dead_letters());
        batch.apply(&mapping, &Change::Delete { relation: 7, old: old(1) }).expect("has its key");
        let finished = batch.finish(|_| true, |_| true, true, no_documents());
        assert!(matches!(&finished.commands[..], [Command::Delete { .. }, Command::DeadLetter(l)] if l.xid == 9));
    }

    #[test]
    fn a_whole_row_and_a_deletion_settle_their_keys() {
        let (mapping, mut batch) = (mapping(Format::Hash), KeyStates::default());
        let insert = Change::Insert { relation: 7, new: full(1, 1, 1) };
        let update = Change::Update { relation: 7, old: None, new: without_large(2, 1) };
        for change in [insert, update, Change::Delete { relation: 7, old: old(3) }] {
            batch.apply(&mapping, &change).expect("has its key");
        }
        assert_eq!([1, 2, 3, 4].map(|id| batch.settles(&key(id))), [true, false, true, false]);
        assert_eq!(batch.settled().collect::<Vec<_>>(), [1, 3].map(|id| (TableId(0), key(id))));
    }
}
