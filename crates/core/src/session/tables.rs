//! All tables, the records of rows that Redis cannot hold, and the IDs of loads.

use super::dead::{DeadKeys, Insertion, Since};
use super::hash_slots::HashSlots;
use super::load_messages::{LoadId, Only};
use super::table::Table;
use crate::checkpoint::{Blocked, Checkpoint, TableMark, TableState};
use crate::command::{DeadKey, Key};
use crate::lanes::Lost;
use crate::lookups::changes::Known;
use crate::lookups::ttls::ListTtls;
use crate::plan::key;
use crate::reason::Reason;
use crate::schema::{TableId, TableSpec};
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

/// The time between two loads because of evictions: initially, and at most.
const EVICTION_PAUSE: Duration = Duration::from_secs(10);
const EVICTION_PAUSE_LONGEST: Duration = Duration::from_secs(300);

pub(super) struct Tables {
    tables: Vec<Table>,
    /// Tables that may have changed since the last checkpoint, so that a batch costs nothing for the others.
    touched: BTreeSet<TableId>,
    dead: DeadKeys,
    /// Those of them that live, or do not exist, as far as has been delivered. A hash slot is ahead of that.
    living: BTreeSet<Key>,
    /// Tables that are empty as far as has been delivered, and since when they may have had more such rows than are recorded.
    emptied: BTreeMap<TableId, Option<Since>>,
    hash_slots: HashSlots,
    list_ttls: ListTtls,
    next_load: u64,
    evictions: Evictions,
}

/// What others may see of a table.
#[derive(Debug, Clone)]
pub struct TableSeen {
    pub state: TableState,
    /// Rows written by the load in progress, and their estimated total.
    pub load_progress: Option<(u64, u64)>,
    /// When that load began.
    pub load_began: Option<Instant>,
    /// By Redis TIME, as the two fields of [`TableMark`].
    pub compared_ms: Option<u64>,
    pub verified_ms: Option<u64>,
    pub blocked: Option<Blocked>,
    /// Why it is being loaded.
    pub because: Option<String>,
    /// Keys were removed and are not loaded again yet.
    pub removed: bool,
    /// As the two fields of [`TableMark`].
    pub dead_letters: u64,
    pub more_dead_letters: bool,
}

/// When tables whose rows Redis evicts may be loaded again.
struct Evictions {
    load_from: Instant,
    pause: Duration,
}

impl Tables {
    pub fn new(specs: &[TableSpec], checkpoint: &Checkpoint, dead: DeadKeys, now: Instant) -> Self {
        let Checkpoint { lsn, base, .. } = *checkpoint;
        let mark = |spec: &TableSpec| checkpoint.tables.get(&spec.name);
        Tables {
            tables: specs.iter().map(|spec| Table::new(spec.clone(), mark(spec), lsn, base, now)).collect(),
            touched: specs.iter().map(|spec| spec.id).collect(),
            dead,
            living: BTreeSet::new(),
            emptied: BTreeMap::new(),
            hash_slots: HashSlots::default(),
            list_ttls: ListTtls::default(),
            next_load: 1,
            evictions: Evictions { load_from: now, pause: EVICTION_PAUSE / 2 },
        }
    }

    pub fn get(&self, id: TableId) -> &Table {
        &self.tables[id.index()]
    }

    pub fn get_mut(&mut self, id: TableId) -> &mut Table {
        self.touched.insert(id);
        &mut self.tables[id.index()]
    }

    pub fn iter(&self) -> impl Iterator<Item = &Table> {
        self.tables.iter()
    }

    pub fn ids(&self, is_wanted: impl Fn(&Table) -> bool) -> Vec<TableId> {
        self.tables.iter().filter(|table| is_wanted(table)).map(Table::id).collect()
    }

    pub fn any(&self, is_so: impl Fn(&Table) -> bool) -> bool {
        self.tables.iter().any(is_so)
    }

    pub fn is_any_read(&self) -> bool {
        self.any(|table| table.load().is_some())
    }

    pub fn name(&self, id: TableId) -> &str {
        &self.get(id).spec.name
    }

    /// Returns the table that this key belongs to.
    pub fn owner_of(&self, key: &Key) -> Option<TableId> {
        let is_owner = |table: &&Table| key.as_bytes().starts_with(table.spec.key.literal.as_bytes());
        self.tables.iter().find(is_owner).map(Table::id)
    }

    pub fn have_lookups(&self) -> bool {
        self.any(|table| table.lookups().is_some())
    }

    /// What may be assumed about the memberships of rows of this table that are written now.
    pub fn knows(&self, id: TableId) -> Known {
        // Where rows were lost, lists have the members that those gave.
        if self.is_healing() { Known::Nothing } else { self.get(id).knows() }
    }

    pub fn is_healing(&self) -> bool {
        self.hash_slots.is_healing()
    }

    /// The change stream lacks changes of any table.
    pub fn change_beside(&mut self) {
        self.tables.iter_mut().for_each(Table::changes_beside);
    }

    /// How many times as much as the removal of its key the removal of a row may weigh, because of its memberships.
    pub fn weight_of_removal(&self) -> usize {
        let lookups = self.tables.iter().filter_map(|table| Some(table.lookups()?.count())).max();
        1 + 4 * lookups.unwrap_or(0)
    }

    /// Returns the table that this key belongs to, if it has lookups.
    pub fn with_lookups(&self, key: &Key) -> Option<TableId> {
        self.owner_of(key).filter(|id| self.get(*id).lookups().is_some())
    }

    pub fn list_ttls(&mut self) -> &mut ListTtls {
        &mut self.list_ttls
    }

    pub fn new_load(&mut self) -> LoadId {
        let id = LoadId(self.next_load);
        self.next_load += 1;
        id
    }

    /// The time stamp of what is recorded now.
    fn since(&self) -> Since {
        Since(self.next_load)
    }

    // ---- what is reported -------------------------------------------------------------------------------------------

    /// Updates the states for the next checkpoint.
    pub fn settle(&mut self) {
        let changed = self.tables.iter_mut().filter_map(|table| table.settle().then(|| table.id()));
        self.touched.extend(changed);
    }

    /// Returns the entries of the tables that may have changed since the last checkpoint, by name.
    pub fn take_marks(&mut self) -> impl Iterator<Item = (&str, TableMark)> {
        let touched = std::mem::take(&mut self.touched);
        touched.into_iter().filter_map(|id| {
            let table = self.get(id);
            Some((table.spec.name.as_str(), table.mark(self.dead(table))?))
        })
    }

    /// Whether the entry of some table in `written` is out of date.
    pub fn say_otherwise(&self, written: &Checkpoint) -> bool {
        self.any(|table| {
            let written = written.tables.get(&table.spec.name);
            written.is_some_and(|mark| table.says_otherwise(mark, self.dead.more(table.id())))
        })
    }

    pub fn seen(&self) -> Vec<TableSeen> {
        self.tables.iter().map(|table| table.seen(self.dead(table))).collect()
    }

    fn dead(&self, table: &Table) -> (u64, bool) {
        (self.dead.count(table.id()), self.dead.more(table.id()))
    }

    // ---- hash slots -------------------------------------------------------------------------------------------------

    pub fn hash_slots(&mut self) -> &mut HashSlots {
        &mut self.hash_slots
    }

    pub fn lose(&mut self, lost: Lost) {
        self.hash_slots.lose(lost, self.tables.iter().map(Table::id));
    }

    /// See [`HashSlots::next`].
    pub fn hash_slots_to_read(&mut self, now: Instant) -> Option<(Only, Reason, Vec<TableId>)> {
        let readable = self.tables.iter().filter(|table| !table.is_broken()).map(Table::id);
        self.hash_slots.next(readable, LoadId(self.next_load), now)
    }

    /// Whether what lies at this key may be missing or old.
    pub fn is_lost(&self, key: &Key) -> bool {
        !self.hash_slots.is_idle()
            && self.owner_of(key).is_some_and(|id| self.hash_slots.lacks(id, key) && !self.get(id).has_read())
    }

    // ---- evictions --------------------------------------------------------------------------------------------------

    /// Whether tables may be loaded because of evictions. A Redis that is too small evicts again what a load brings
    /// back, so the pause grows with each load.
    pub fn may_load_evicted(&mut self, now: Instant) -> bool {
        let Evictions { load_from, pause } = &mut self.evictions;
        if now < *load_from {
            return false;
        }
        let was_quiet = now.saturating_duration_since(*load_from) > EVICTION_PAUSE_LONGEST;
        *pause = if was_quiet { EVICTION_PAUSE } else { (*pause * 2).min(EVICTION_PAUSE_LONGEST) };
        *load_from = now + *pause;
        true
    }

    // ---- rows that Redis cannot hold --------------------------------------------------------------------------------

    /// Takes what Redis had recorded when the session began. Returns the records to remove: those of tables that are no
    /// longer configured, and those that are too many.
    pub fn restore_dead_keys(&mut self, found: Vec<(Key, DeadKey)>, checkpoint: &Checkpoint) -> Vec<Key> {
        let mut forgotten = Vec::new();
        for (key, dead) in found {
            let owner = self.tables.iter().map(|t| &t.spec).find(|spec| key::decode(&spec.key, &key).is_some());
            let recorded = owner.map(|spec| self.dead.insert(spec.id, key.clone(), dead, Since(0)));
            if recorded.is_none_or(|recorded| recorded == Insertion::NotRecorded) {
                forgotten.push(key);
            }
        }
        for table in &self.tables {
            let (id, mark) = (table.id(), checkpoint.tables.get(&table.spec.name));
            // Somebody removed a record, and it is not known which.
            if mark.is_some_and(|mark| mark.more_dead_letters || mark.dead_letters > self.dead.count(id)) {
                self.dead.miss(id, Since(0));
            }
        }
        forgotten
    }

    pub fn dead_keys(&self, most: usize) -> Vec<(Key, DeadKey)> {
        self.dead.first(most).map(|(key, dead)| (key.clone(), dead.clone())).collect()
    }

    pub fn dead_of(&self, table: TableId) -> Vec<Key> {
        self.dead.of(table)
    }

    pub fn is_dead(&self, key: &Key) -> bool {
        self.dead.contains(key)
    }

    /// Records that the row at this key cannot be held.
    pub fn dies(&mut self, table: TableId, key: Key, dead: DeadKey) -> Insertion {
        self.touched.insert(table);
        self.living.remove(&key);
        self.dead.insert(table, key, dead, self.since())
    }

    /// A row whose key is not known cannot be held.
    pub fn a_row_dies(&mut self, table: TableId) {
        self.touched.insert(table);
        self.dead.miss(table, self.since());
    }

    /// The row at this key is written or does not exist. Returns whether it was recorded.
    pub fn lives(&mut self, key: &Key) -> bool {
        let removed = if self.dead.is_empty() { None } else { self.dead.remove(key) };
        self.touched.extend(removed);
        removed.is_some()
    }

    /// Like [`Self::lives`], but the record stays until [`Self::take_living`]: in a hash slot that is ahead, the row may be dead
    /// again.
    pub fn lives_for_now(&mut self, key: &Key) {
        if self.is_dead(key) {
            self.living.insert(key.clone());
        }
    }

    /// The same for all records of a table.
    pub fn clear_dead_for_now(&mut self, table: TableId) {
        self.living.extend(self.dead.of(table));
        self.emptied.insert(table, self.dead.more_since(table));
    }

    /// Returns the keys of records that are to be removed now that no hash slot is ahead.
    pub fn take_living(&mut self) -> BTreeSet<Key> {
        for (table, since) in std::mem::take(&mut self.emptied) {
            self.touched.insert(table);
            self.dead.no_more_than(table, since);
        }
        std::mem::take(&mut self.living)
    }

    /// The load that begins cannot confirm this table's records.
    pub fn keep_dead(&mut self, table: TableId) {
        self.dead.keep(table, self.since());
    }

    /// The table is empty. Returns the records to remove.
    pub fn clear_dead(&mut self, table: TableId) -> Vec<Key> {
        self.touched.insert(table);
        self.dead.clear(table)
    }

    /// A load has read the whole table. Returns the records that it did not confirm.
    pub fn end_dead(&mut self, table: TableId, load: LoadId) -> Vec<Key> {
        self.touched.insert(table);
        self.dead.ended(table, load)
    }
}
