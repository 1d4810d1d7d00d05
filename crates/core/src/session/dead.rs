//! Rows that Postgres has and Redis cannot hold. Their keys are recorded in Redis and kept here, so that no reader is
//! told that such a row does not exist.
//!
//! A record changes in the same batch as its row: it is written in place of the row, and removed when the row is
//! written or deleted. Memory is bounded: if a table has more such rows than fit, none of its missing keys proves
//! anything until a load finds fewer. A mistake here answers "no such row" for a row that exists, or 503 forever.

use super::load_messages::LoadId;
use crate::command::{self, DeadKey, Key};
use crate::schema::TableId;
use std::collections::BTreeMap;

/// The most records over all tables. There are fewer if Redis accepts small batches only, because one batch must be
/// able to remove them all.
pub const DEAD_KEYS: usize = 4_096;
const DEAD_KEYS_BYTES: usize = 256 << 10;

pub(super) struct DeadKeys {
    keys: BTreeMap<Key, Recorded>,
    bytes: usize,
    weight: usize,
    most: usize,
    most_weight: usize,
    /// Indexed by table.
    tables: Vec<OfTable>,
}

struct Recorded {
    table: TableId,
    dead: DeadKey,
    since: Since,
}

#[derive(Default)]
struct OfTable {
    count: u64,
    /// When a row was last left unrecorded.
    more: Option<Since>,
}

/// The weight of the command that removes the record, which includes the name of its hash.
fn weight_of_record(key: &Key) -> usize {
    command::weight_of_key(key) + HASH_NAME_BYTES
}

/// `prefetchd:{slot}:dead-keys:63`, where the slot's name has at most 63 bytes.
const HASH_NAME_BYTES: usize = 96;

/// The ID that the next load would have got at the time. Tells records that a load has confirmed from older ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Since(pub u64);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Insertion {
    New,
    Again,
    /// No space is left for it.
    NotRecorded,
}

impl DeadKeys {
    /// `most_weight` limits the weight of a batch that removes all records.
    pub fn new(tables: usize, most: usize, most_weight: usize) -> Self {
        let tables = std::iter::repeat_with(OfTable::default).take(tables).collect();
        DeadKeys { keys: BTreeMap::new(), bytes: 0, weight: 0, most, most_weight, tables }
    }

    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    pub fn contains(&self, key: &Key) -> bool {
        self.keys.contains_key(key)
    }

    pub fn count(&self, table: TableId) -> u64 {
        self.tables[table.index()].count
    }

    pub fn of(&self, table: TableId) -> Vec<Key> {
        self.keys_where(|recorded| recorded.table == table)
    }

    /// Whether the table may have more such rows than are recorded.
    pub fn more(&self, table: TableId) -> bool {
        self.tables[table.index()].more.is_some()
    }

    pub fn more_since(&self, table: TableId) -> Option<Since> {
        self.tables[table.index()].more
    }

    /// The rows that were left unrecorded until then do not exist any more.
    pub fn no_more_than(&mut self, table: TableId, since: Option<Since>) {
        let more = &mut self.tables[table.index()].more;
        *more = more.filter(|_| *more != since);
    }

    pub fn insert(&mut self, table: TableId, key: Key, dead: DeadKey, since: Since) -> Insertion {
        if let Some(recorded) = self.keys.get_mut(&key) {
            *recorded = Recorded { table, dead, since };
            return Insertion::Again;
        }
        let (bytes, weight) = (self.bytes + key.as_bytes().len(), self.weight + weight_of_record(&key));
        if self.keys.len() >= self.most || bytes > DEAD_KEYS_BYTES || weight > self.most_weight {
            self.miss(table, since);
            return Insertion::NotRecorded;
        }
        (self.bytes, self.weight) = (bytes, weight);
        self.tables[table.index()].count += 1;
        self.keys.insert(key, Recorded { table, dead, since });
        Insertion::New
    }

    /// Notes that a row of this table is not recorded.
    pub fn miss(&mut self, table: TableId, since: Since) {
        self.tables[table.index()].more = Some(since);
    }

    /// Removes a record, and returns its table.
    pub fn remove(&mut self, key: &Key) -> Option<TableId> {
        let recorded = self.keys.remove(key)?;
        self.bytes -= key.as_bytes().len();
        self.weight -= weight_of_record(key);
        self.tables[recorded.table.index()].count -= 1;
        Some(recorded.table)
    }

    /// Removes the records of a table that is empty now.
    pub fn clear(&mut self, table: TableId) -> Vec<Key> {
        self.tables[table.index()].more = None;
        self.remove_where(|recorded| recorded.table == table)
    }

    /// Keeps this table's records over the load that begins, which cannot confirm them.
    pub fn keep(&mut self, table: TableId, since: Since) {
        self.tables[table.index()].more = self.tables[table.index()].more.map(|_| since);
        self.keys.values_mut().filter(|recorded| recorded.table == table).for_each(|recorded| recorded.since = since);
    }

    /// A load has read the whole table. Removes and returns the records that predate the load and that it did not
    /// confirm.
    pub fn ended(&mut self, table: TableId, load: LoadId) -> Vec<Key> {
        let before = Since(load.0);
        let of_table = &mut self.tables[table.index()];
        of_table.more = of_table.more.filter(|since| *since > before);
        self.remove_where(|recorded| recorded.table == table && recorded.since <= before)
    }

    fn remove_where(&mut self, is_gone: impl Fn(&Recorded) -> bool) -> Vec<Key> {
        let gone = self.keys_where(is_gone);
        gone.iter().for_each(|key| {
            self.remove(key);
        });
        gone
    }

    fn keys_where(&self, is_meant: impl Fn(&Recorded) -> bool) -> Vec<Key> {
        self.keys.iter().filter(|(_, recorded)| is_meant(recorded)).map(|(key, _)| key.clone()).collect()
    }

    /// Returns the first `most` records, for people.
    pub fn first(&self, most: usize) -> impl Iterator<Item = (&Key, &DeadKey)> {
        self.keys.iter().take(most).map(|(key, recorded)| (key, &recorded.dead))
    }
}

/// When to write an entry to the dead-letter stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Letter {
    /// Always: the row has changed.
    Always,
    /// Unless the row is recorded: a load has read it, perhaps not for the first time.
    UnlessRecorded,
    /// Only if it is recorded now: a comparison has read the row, and would otherwise write an entry each time if there
    /// is no space for the record.
    IfNew,
}

impl Letter {
    pub fn is_written(self, recorded: Insertion) -> bool {
        match (self, recorded) {
            (Letter::Always, _) | (_, Insertion::New) | (Letter::UnlessRecorded, Insertion::NotRecorded) => true,
            (Letter::UnlessRecorded | Letter::IfNew, _) => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;

    const A: TableId = TableId(0);
    const B: TableId = TableId(1);

    fn key(text: &str) -> Key {
        Key(Bytes::copy_from_slice(text.as_bytes()))
    }

    fn dead() -> DeadKey {
        DeadKey { table: "t".to_owned(), reason: "too_large".to_owned(), lsn: "0/1".to_owned() }
    }

    #[test]
    fn a_load_removes_what_it_has_not_found() {
        let mut keys = DeadKeys::new(2, 10, usize::MAX);
        for (table, text, since) in [(A, "a:1", 1), (A, "a:2", 1), (B, "b:1", 1)] {
            assert_eq!(keys.insert(table, key(text), dead(), Since(since)), Insertion::New);
        }
        // Load 1 has begun.
        assert_eq!(keys.insert(A, key("a:2"), dead(), Since(2)), Insertion::Again);
        assert_eq!(keys.insert(A, key("a:3"), dead(), Since(2)), Insertion::New);
        assert_eq!(keys.ended(A, LoadId(1)), [key("a:1")]);
        assert_eq!((keys.count(A), keys.count(B)), (2, 1));
        assert!(keys.contains(&key("a:3")) && !keys.contains(&key("a:1")));
        keys.keep(A, Since(3));
        assert!(keys.ended(A, LoadId(2)).is_empty() && keys.ended(B, LoadId(2)) == [key("b:1")]);
    }

    #[test]
    fn beyond_the_bound_the_table_says_so_until_a_load_finds_fewer() {
        let mut keys = DeadKeys::new(2, 2, usize::MAX);
        for n in 0..3 {
            keys.insert(A, key(&format!("a:{n}")), dead(), Since(1));
        }
        assert_eq!((keys.count(A), keys.more(A), keys.more(B)), (2, true, false));
        // Removing one does not tell which rows are left unrecorded.
        assert_eq!(keys.remove(&key("a:0")), Some(A));
        assert!(keys.more(A));
        // Load 1 finds three again, load 2 only two.
        for n in 0..3 {
            keys.insert(A, key(&format!("a:{n}")), dead(), Since(2));
        }
        assert_eq!(keys.ended(A, LoadId(1)), [] as [Key; 0]);
        assert!(keys.more(A));
        keys.insert(A, key("a:1"), dead(), Since(3));
        assert_eq!(keys.ended(A, LoadId(2)), [key("a:0")]);
        assert_eq!((keys.count(A), keys.more(A)), (1, false));
        let long = "k".repeat(DEAD_KEYS_BYTES);
        assert_eq!(keys.insert(B, key(&long), dead(), Since(3)), Insertion::NotRecorded);
        assert!(keys.more(B));
        assert!(keys.clear(B).is_empty() && !keys.more(B));
    }
}
