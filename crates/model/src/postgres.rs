//! Postgres: a WAL, transactions that are in it before snapshots see them, and a slot whose confirmed position may
//! decrease.

use crate::rng::Rng;
use std::collections::BTreeSet;

pub const TABLES: usize = 2;
pub const IDS: usize = 5;
pub const KEYS: usize = TABLES * IDS;
/// The number of values in the column behind the lookup of table 0.
pub const PARENTS: usize = 3;
pub const LANES: usize = 4;

/// A row's number, across both tables.
pub type Key = usize;
/// A set of keys, tables, lanes or parents.
pub type Bits = u32;

pub fn table_of(key: Key) -> usize {
    key / IDS
}

pub fn lane_of(key: Key) -> usize {
    [0, 1, 2, 3, 0, 1, 2, 3, 1, 2][key]
}

pub fn lookup_lane(parent: usize) -> usize {
    [1, 2, 0][parent]
}

pub fn keys_of(table: usize) -> std::ops::Range<Key> {
    table * IDS..(table + 1) * IDS
}

/// `big` is the column that a partial update omits.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Row {
    pub big: u32,
    pub small: u32,
    pub parent: usize,
}

impl std::fmt::Debug for Row {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{} of {}", self.big, self.small, self.parent)
    }
}

pub type Rows = [Option<Row>; KEYS];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    Put(Key, Row),
    Patch(Key, u32, usize),
    Delete(Key),
    Truncate(usize),
}

impl Change {
    pub fn touches(self, key: Key) -> bool {
        match self {
            Change::Put(k, _) | Change::Patch(k, ..) | Change::Delete(k) => k == key,
            Change::Truncate(table) => table_of(key) == table,
        }
    }

    /// Returns the parent that the row has afterwards.
    pub fn parent(self) -> Option<usize> {
        match self {
            Change::Put(_, row) => Some(row.parent),
            Change::Patch(_, _, parent) => Some(parent),
            Change::Delete(_) | Change::Truncate(_) => None,
        }
    }

    pub fn apply(self, rows: &mut Rows) {
        match self {
            Change::Put(key, row) => rows[key] = Some(row),
            Change::Patch(key, small, parent) => {
                if let Some(row) = &mut rows[key] {
                    (row.small, row.parent) = (small, parent);
                }
            }
            Change::Delete(key) => rows[key] = None,
            Change::Truncate(table) => keys_of(table).for_each(|key| rows[key] = None),
        }
    }
}

/// A number of complete entries of the WAL, and of changes of the next entry.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Position(pub usize, pub usize);

impl Position {
    /// Not less than `Row::small` of any change before it, and less than that of any change after it.
    pub fn version(self) -> u32 {
        (self.0 * 8 + self.1) as u32
    }
}

impl std::fmt::Debug for Position {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.1 {
            0 => write!(f, "@{}", self.0),
            n => write!(f, "@{}+{n}", self.0),
        }
    }
}

/// What a snapshot sees: entries before `end` that are not in `unseen`.
#[derive(Debug, Clone)]
pub struct Snapshot {
    end: usize,
    unseen: BTreeSet<usize>,
    pub rows: Rows,
}

impl Snapshot {
    pub fn sees(&self, entry: usize) -> bool {
        entry < self.end && !self.unseen.contains(&entry)
    }

    pub fn end(&self) -> usize {
        self.end
    }
}

#[derive(Default)]
pub struct Postgres {
    /// Transactions; one without changes is a watermark.
    pub wal: Vec<Vec<Change>>,
    states: Vec<Rows>,
    /// In the WAL, but not yet visible to snapshots. Their rows are locked.
    pub invisible: BTreeSet<usize>,
    pub confirmed: usize,
    /// What a restart rewinds `confirmed` to.
    pub durable: usize,
    /// The daemon whose walsender holds the slot.
    pub owner: Option<usize>,
}

impl Postgres {
    pub fn end(&self) -> usize {
        self.wal.len()
    }

    fn push(&mut self, changes: Vec<Change>) {
        let mut rows = self.states.last().copied().unwrap_or_default();
        if self.states.is_empty() {
            self.states.push(rows);
        }
        changes.iter().for_each(|change| change.apply(&mut rows));
        self.wal.push(changes);
        self.states.push(rows);
    }

    pub fn watermark(&mut self) -> usize {
        self.push(Vec::new());
        self.end()
    }

    pub fn commit(&mut self, rng: &mut Rng) -> String {
        let entry = self.end();
        let locked = |key: Key| self.invisible.iter().any(|&e| self.wal[e].iter().any(|change| change.touches(key)));
        let mut rows = self.states.last().copied().unwrap_or_default();
        let mut changes = Vec::new();
        for _ in 0..1 + rng.below(5) {
            let change = match rng.below(24) {
                0 => Change::Truncate(rng.below(TABLES)),
                1..=5 => Change::Delete(rng.below(KEYS)),
                _ => {
                    let (key, version) = (rng.below(KEYS), (entry * 8 + changes.len() + 1) as u32);
                    let parent = rows[key].map_or(0, |row| row.parent);
                    let parent = if rng.one_in(2) { rng.below(PARENTS) } else { parent };
                    match rows[key] {
                        Some(_) if rng.one_in(3) => Change::Patch(key, version, parent),
                        _ => Change::Put(key, Row { big: version, small: version, parent }),
                    }
                }
            };
            if (0..KEYS).any(|key| change.touches(key) && locked(key)) {
                continue;
            }
            change.apply(&mut rows);
            changes.push(change);
        }
        let text = format!("commit @{entry} {changes:?}");
        self.push(changes);
        if rng.one_in(3) {
            self.invisible.insert(entry);
        }
        text
    }

    pub fn snapshot(&self) -> Snapshot {
        let first = self.invisible.first().copied().unwrap_or(self.end());
        let mut rows = self.state(Position(first, 0));
        for entry in (first..self.end()).filter(|entry| !self.invisible.contains(entry)) {
            self.wal[entry].iter().for_each(|change| change.apply(&mut rows));
        }
        Snapshot { end: self.end(), unseen: self.invisible.clone(), rows }
    }

    /// Returns the rows after everything before `at`.
    pub fn state(&self, at: Position) -> Rows {
        let mut rows = self.states.get(at.0).copied().unwrap_or_default();
        if at.1 > 0 {
            self.wal[at.0][..at.1].iter().for_each(|change| change.apply(&mut rows));
        }
        rows
    }

    pub fn restart(&mut self, rng: &mut Rng) {
        self.confirmed = self.durable + rng.below(self.confirmed - self.durable + 1);
        self.invisible.clear();
        self.owner = None;
    }
}
