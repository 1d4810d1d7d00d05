//! A small Postgres: a WAL, transactions whose commits are in the WAL before snapshots see them, row locks, and a
//! logical slot.
//!
//! As in Postgres, transactions hold their locks until they are visible. `flushed` may lie inside the last record.
//! Whatever is not flushed is lost in a crash, whether it was visible or not (`synchronous_commit = off`).

use super::Rng;
use crate::change::{Begin, Change, CommitTime, Delivery, NewRow, Nonce, OldRow, Row, RowBuilder};
use crate::checkpoint::Blocked;
use crate::loader::range::Tid;
use crate::lsn::{CommitLsn, EndLsn, Lsn};
use crate::schema::{
    CatalogMark, Composition, LeafFile, Oid, QualifiedName, Relation, RelationColumn, ReplicaIdentity,
};
use bytes::{BufMut, BytesMut};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

pub const TABLES: u16 = 2;
pub const IDS: u64 = 4;
/// The number of pages that a leaf has when it is looked up. A few rows lie beyond them.
pub const PAGES: u32 = 6;
/// The second table has two partitions.
const MOST_LEAVES: usize = 2;
/// A transaction with more changes than this is applied in parts.
pub const ATOMIC: usize = 3;
/// For how long no row changes after a copy was taken.
const QUIET_STEPS: u32 = 250;
const OPEN_AT_ONCE: usize = 4;

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct RowId {
    pub table: u16,
    pub id: u64,
}

impl fmt::Debug for RowId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", if self.table == 0 { 'a' } else { 'b' }, self.id)
    }
}

/// `small` changes with every write. Each large value may stay the same, in which case the stream omits it from an
/// UPDATE.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Values {
    pub small: u64,
    pub large: [u64; 2],
}

/// The size of the largest value that Redis accepts in the simulation.
pub const VALUE_BYTES: usize = 300;

impl Values {
    /// What Redis shows in place of a row that it cannot hold, as the sign that it is recorded as a dead letter.
    pub const DEAD: Values = Values { small: 0, large: [0, 0] };

    pub fn shown(self) -> Values {
        if is_too_large(self.large[1]) { Values::DEAD } else { self }
    }
}

/// Returns whether a value exceeds [`VALUE_BYTES`]. Some of the huge ones do.
fn is_too_large(huge: u64) -> bool {
    huge % 8 == 7
}

fn text(value: u64, cell: usize) -> String {
    let digits = if cell == 3 && is_too_large(value) { VALUE_BYTES + 1 } else { 1 };
    format!("{value:0digits$}")
}

impl fmt::Debug for Values {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if *self == Values::DEAD {
            return f.write_str("dead");
        }
        write!(f, "{}/{}/{}", self.small, self.large[0], self.large[1])
    }
}

/// A column that is added and dropped. A row that is written while the column exists gets the same value in it as in
/// `small`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extra {
    NoColumn,
    /// The row was written before the column was added.
    Null,
    OfRow,
}

#[derive(Debug, Clone)]
pub enum Op {
    Insert { row: RowId, values: Values },
    Update { from: RowId, to: RowId, values: Values, large_sent: [bool; 2] },
    Delete { row: RowId },
    Truncate { tables: Vec<u16> },
    Mark(Nonce),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    Open,
    /// Its commit record is in the WAL.
    Logged,
    /// Snapshots see it.
    Visible,
    Aborted,
}

#[derive(Debug, Clone)]
pub struct Transaction {
    xid: Option<u64>,
    pub phase: Phase,
    pub ops: Vec<Op>,
    pub locks: BTreeSet<RowId>,
    pub truncates: BTreeSet<u16>,
    /// Where its commit record begins and ends.
    pub commit: u64,
    pub end: u64,
    /// Unique across all transactions on all timelines.
    time: u64,
    /// Whether it grows beyond the atomic limits.
    large: bool,
    /// Whether it may become visible before it is flushed.
    asynchronous: bool,
    /// For the tables that it holds locks on, [`Postgres::columns`] as of its commit.
    columns: [u64; TABLES as usize],
}

impl Transaction {
    fn holds_locks(&self) -> bool {
        matches!(self.phase, Phase::Open | Phase::Logged)
    }

    /// Returns whether applying it may take more than one batch.
    pub fn is_split(&self, atomic: usize, clears_in_parts: bool) -> bool {
        self.ops.len() > atomic || (clears_in_parts && !self.truncates.is_empty())
    }
}

#[derive(Debug, Clone, Copy)]
struct Tuple {
    row: RowId,
    values: Values,
    tid: Tid,
    /// The table's [`Postgres::columns`] when the row was written.
    columns: u64,
    xmin: u64,
    xmax: Option<u64>,
}

#[derive(Debug, Clone, Copy)]
pub struct WalRecord {
    pub start: u64,
    pub end: u64,
    /// The transaction whose commit this record is.
    pub transaction: Option<usize>,
}

/// A version that a row once had; without values, the row was deleted.
#[derive(Debug, Clone, Copy)]
pub struct Version {
    pub commit: u64,
    pub end: u64,
    pub values: Option<Values>,
    /// Whether its transaction truncated the table.
    pub truncated: bool,
}

#[derive(Debug, Clone, Copy)]
pub struct Slot {
    pub confirmed: u64,
    /// Where the slot was created. Transactions that committed before are not sent.
    pub born: u64,
    /// Where the slot is after a restart.
    persisted: u64,
    /// The session whose walsender holds it.
    pub active: Option<u64>,
    /// Whether Postgres has removed WAL that it needs.
    pub is_lost: bool,
}

/// A temporary slot, which is dropped when the session that creates it ends.
#[derive(Clone)]
enum TemporarySlot {
    /// The transactions that it waits for.
    Waits {
        second_time: bool,
        wait: BTreeSet<u64>,
    },
    Made {
        point: u64,
    },
}

/// What takes the place of a rewound server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Successor {
    /// A promoted standby.
    Promoted,
    /// An older data directory, which continues as if nothing had happened.
    Restored,
}

#[derive(Clone)]
pub struct Postgres {
    pub timeline: u32,
    /// The timelines that this one descends from, and where each of them ended.
    ancestors: Vec<(u32, u64)>,
    /// The newest timeline that has ever existed on any server.
    newest_timeline: u32,
    next_xid: u64,
    latest_completed: u64,
    pub transactions: Vec<Transaction>,
    heap: Vec<Tuple>,
    pub wal: Vec<WalRecord>,
    pub inserted: u64,
    pub flushed: u64,
    filenodes: [[u32; MOST_LEAVES]; TABLES as usize],
    /// For each table, the transaction that truncated it, unless its files were rewritten since.
    written_by: [Option<u32>; TABLES as usize],
    /// For each table, a number that stands for what it consists of and which rows it publishes, beyond its columns.
    shapes: [u64; TABLES as usize],
    /// Whether the last partition is part of the table. Until it is attached, the stream does not contain its changes.
    attached: [bool; TABLES as usize],
    /// How often it was attached or detached.
    attachments: [u64; TABLES as usize],
    /// How many rows the partitions had that were attached.
    pub attached_rows: u64,
    /// How often the extra column was added or dropped. An odd number means that it exists.
    pub columns: [u64; TABLES as usize],
    /// Whether the table cannot be followed at the moment.
    pub unfit: [bool; TABLES as usize],
    /// The number of steps in which no row changes; only unrelated WAL is written.
    quiet_steps: u32,
    last_value: u64,
    pub history: BTreeMap<RowId, Vec<Version>>,
    pub slot: Option<Slot>,
    /// Temporary slots, by the daemon whose session creates them.
    temporary: BTreeMap<u64, TemporarySlot>,
    /// Whether tables are so large that the keys which a TRUNCATE removes are removed in parts, which readers may see.
    pub clears_in_parts: bool,
    /// The maximum number of dead letters whose keys a daemon records.
    pub most_dead_keys: usize,
    /// The number of changes up to which a transaction is certain to be applied atomically.
    pub atomic: usize,
    /// Transactions that no snapshot sees yet.
    running: BTreeSet<u64>,
    /// The probability that a committed transaction becomes visible in a step, in percent.
    visible_percent: u64,
    asynchronous_percent: u64,
    /// The proportion of transactions that exceed the atomic limits, in percent.
    large_percent: u64,
    /// The proportion of changes that are a TRUNCATE, in percent.
    pub truncate_percent: u64,
}

/// A random action that is not possible at the moment does nothing.
impl Postgres {
    pub fn new(rng: &mut Rng) -> Self {
        let first_xid = *rng.pick(&[740, (1 << 32) - 8, (1 << 32) - 25, (1 << 33) - 12, (1 << 31) - 6]);
        let mut history = BTreeMap::new();
        for table in 0..TABLES {
            for id in 0..IDS {
                history
                    .insert(RowId { table, id }, vec![Version { commit: 0, end: 0, values: None, truncated: false }]);
            }
        }
        Postgres {
            timeline: 1,
            ancestors: Vec::new(),
            newest_timeline: 1,
            next_xid: first_xid,
            latest_completed: first_xid - 1,
            transactions: Vec::new(),
            heap: Vec::new(),
            wal: Vec::new(),
            inserted: 0x10_0000,
            flushed: 0x10_0000,
            filenodes: [[1; MOST_LEAVES]; TABLES as usize],
            written_by: [None; TABLES as usize],
            shapes: [1; TABLES as usize],
            attached: std::array::from_fn(|table| leaves(table as u16) == 1 || rng.percent(20)),
            attachments: [0; TABLES as usize],
            attached_rows: 0,
            columns: [0; TABLES as usize],
            unfit: [false; TABLES as usize],
            quiet_steps: 0,
            last_value: 0,
            history,
            slot: None,
            temporary: BTreeMap::new(),
            clears_in_parts: rng.percent(20),
            most_dead_keys: *rng.pick(&[100, 100, 1]),
            atomic: ATOMIC,
            running: BTreeSet::new(),
            visible_percent: *rng.pick(&[90, 50, 15, 4]),
            asynchronous_percent: *rng.pick(&[0, 0, 30]),
            large_percent: *rng.pick(&[10, 15, 50]),
            truncate_percent: 4,
        }
    }

    fn fresh(&mut self) -> u64 {
        self.last_value += 1;
        self.last_value
    }

    fn running(&self) -> impl Iterator<Item = &Transaction> {
        self.transactions.iter().filter(|t| t.holds_locks())
    }

    /// Returns what `pg_current_snapshot()` would return.
    pub fn snapshot(&self) -> String {
        let xmax = self.latest_completed + 1;
        let running: Vec<u64> = self.running.iter().copied().filter(|x| *x < xmax).collect();
        snapshot_text(running.first().copied().unwrap_or(xmax), xmax, &running)
    }

    fn is_visible(&self, xid: u64) -> bool {
        !self.running.contains(&xid)
    }

    /// Returns what a new snapshot sees, with each row's position in its leaf.
    pub fn rows(&self, table: u16) -> Vec<(RowId, Values, Extra, Tid)> {
        let seen = |t: &&Tuple| self.is_visible(t.xmin) && !t.xmax.is_some_and(|x| self.is_visible(x));
        let rows = self.heap.iter().filter(|t| t.row.table == table).filter(seen);
        rows.map(|t| (t.row, t.values, self.extra(t), t.tid)).collect()
    }

    fn extra(&self, tuple: &Tuple) -> Extra {
        let columns = self.columns[usize::from(tuple.row.table)];
        match has_extra(columns) {
            false => Extra::NoColumn,
            true if tuple.columns == columns => Extra::OfRow,
            true => Extra::Null,
        }
    }

    pub fn extras(&self) -> BTreeMap<RowId, Extra> {
        (0..TABLES).flat_map(|table| self.rows(table)).map(|(row, _, extra, _)| (row, extra)).collect()
    }

    /// ACCESS SHARE waits while another transaction truncates the table.
    pub fn is_readable(&self, table: u16) -> bool {
        !self.running().any(|t| t.truncates.contains(&table))
    }

    fn is_locked(&self, row: RowId, me: usize) -> bool {
        let others = self.transactions.iter().enumerate().filter(|(i, t)| *i != me && t.holds_locks());
        others.map(|(_, t)| t).any(|t| t.locks.contains(&row) || t.truncates.contains(&row.table))
    }

    fn is_busy(&self, table: u16, me: Option<usize>) -> bool {
        let others = self.transactions.iter().enumerate().filter(|(i, t)| Some(*i) != me && t.holds_locks());
        others.map(|(_, t)| t).any(|t| t.truncates.contains(&table) || t.locks.iter().any(|r| r.table == table))
    }

    /// Returns the tuple that transaction `me` sees of a row that no other transaction has locked.
    fn current(&self, row: RowId, me: Option<u64>) -> Option<usize> {
        let mine = |xid: u64| Some(xid) == me || self.is_visible(xid);
        self.heap.iter().position(|t| t.row == row && mine(t.xmin) && !t.xmax.is_some_and(mine))
    }

    fn assign(&mut self, me: usize, rng: &mut Rng) -> u64 {
        if let Some(xid) = self.transactions[me].xid {
            return xid;
        }
        // A subtransaction uses up an XID now and then.
        self.next_xid += u64::from(rng.percent(20));
        while self.next_xid & 0xffff_ffff < 3 {
            self.next_xid += 1;
        }
        let xid = self.next_xid;
        self.next_xid += 1;
        self.transactions[me].xid = Some(xid);
        self.running.insert(xid);
        xid
    }

    fn begin(&mut self, rng: &mut Rng) -> usize {
        self.transactions.push(Transaction {
            xid: None,
            phase: Phase::Open,
            ops: Vec::new(),
            locks: BTreeSet::new(),
            truncates: BTreeSet::new(),
            commit: 0,
            end: 0,
            time: 0,
            large: rng.percent(self.large_percent),
            asynchronous: rng.percent(self.asynchronous_percent),
            columns: self.columns,
        });
        self.transactions.len() - 1
    }

    fn put(&mut self, row: RowId, values: Values, xid: u64, near: Option<u32>, rng: &mut Rng) {
        let block = match near {
            Some(page) if rng.percent(40) => page,
            _ if rng.percent(80) => some_page(rng),
            _ => PAGES + rng.below(3) as u32,
        };
        // No other version of any row has this position.
        let tid = Tid { block, offset: self.fresh() as u16 };
        let columns = self.columns[usize::from(row.table)];
        self.heap.push(Tuple { row, values, tid, columns, xmin: xid, xmax: None });
    }

    fn change(&mut self, me: usize, rng: &mut Rng) {
        let row = RowId { table: rng.below(u64::from(TABLES)) as u16, id: rng.below(IDS) };
        if rng.percent(self.truncate_percent) {
            return self.truncate(me, rng);
        }
        if self.is_locked(row, me) || !self.is_attached(row) {
            return;
        }
        let current = self.current(row, self.transactions[me].xid);
        let Some(current) = current else {
            let xid = self.assign(me, rng);
            let values = Values { small: self.fresh(), large: [self.fresh(), self.fresh()] };
            self.put(row, values, xid, None, rng);
            self.transactions[me].locks.insert(row);
            self.transactions[me].ops.push(Op::Insert { row, values });
            return;
        };
        let dice = rng.below(100);
        let to = if (20..45).contains(&dice) { RowId { id: rng.below(IDS), ..row } } else { row };
        if !self.is_attached(to) {
            return;
        }
        if to != row && (self.is_locked(to, me) || self.current(to, self.transactions[me].xid).is_some()) {
            return;
        }
        let xid = self.assign(me, rng);
        let old = self.heap[current];
        self.heap[current].xmax = Some(xid);
        self.transactions[me].locks.extend([row, to]);
        if dice < 20 {
            self.transactions[me].ops.push(Op::Delete { row });
            return;
        }
        let large_sent = [rng.percent(50), rng.percent(50)];
        let large = [0, 1].map(|i| if large_sent[i] { self.fresh() } else { old.values.large[i] });
        let values = Values { small: self.fresh(), large };
        self.put(to, values, xid, Some(old.tid.block), rng);
        self.transactions[me].ops.push(Op::Update { from: row, to, values, large_sent });
    }

    fn truncate(&mut self, me: usize, rng: &mut Rng) {
        let first = rng.below(u64::from(TABLES)) as u16;
        let tables: Vec<u16> = if rng.percent(25) { (0..TABLES).collect() } else { vec![first] };
        if tables.iter().any(|t| self.is_busy(*t, Some(me))) {
            return;
        }
        let xid = self.assign(me, rng);
        let mine: Vec<usize> = (0..self.heap.len())
            .filter(|i| tables.contains(&self.heap[*i].row.table))
            .filter(|i| self.current(self.heap[*i].row, Some(xid)) == Some(*i))
            .collect();
        mine.into_iter().for_each(|i| self.heap[i].xmax = Some(xid));
        self.transactions[me].truncates.extend(tables.iter().copied());
        self.transactions[me].ops.push(Op::Truncate { tables });
    }

    /// Whether an open transaction truncates.
    pub fn may_truncate_now(&self) -> bool {
        self.transactions.iter().any(|t| t.phase == Phase::Open && !t.truncates.is_empty())
    }

    fn append(&mut self, transaction: Option<usize>, rng: &mut Rng) -> WalRecord {
        let start = self.inserted + rng.below(3) * 8;
        let end = start + 8 + rng.below(6) * 8;
        let record = WalRecord { start, end, transaction };
        self.inserted = end;
        self.wal.push(record);
        record
    }

    fn commit(&mut self, me: usize, rng: &mut Rng) {
        let WalRecord { start: commit, end, .. } = self.append(Some(me), rng);
        let time = self.fresh();
        let transaction = &mut self.transactions[me];
        (transaction.commit, transaction.end, transaction.phase) = (commit, end, Phase::Logged);
        (transaction.time, transaction.columns) = (time, self.columns);
        let (ops, truncates) = (transaction.ops.clone(), transaction.truncates.clone());
        let every_state = transaction.is_split(self.atomic, self.clears_in_parts);
        let mut states: BTreeMap<RowId, Version> = BTreeMap::new();
        for op in &ops {
            let changed: Vec<(RowId, Option<Values>)> = match op {
                Op::Insert { row, values } => vec![(*row, Some(*values))],
                Op::Update { from, to, values, .. } if from == to => vec![(*to, Some(*values))],
                Op::Update { from, to, values, .. } => vec![(*from, None), (*to, Some(*values))],
                Op::Delete { row } => vec![(*row, None)],
                Op::Truncate { tables } => {
                    self.history.keys().filter(|r| tables.contains(&r.table)).map(|r| (*r, None)).collect()
                }
                Op::Mark(_) => Vec::new(),
            };
            for (row, values) in changed {
                let truncated = truncates.contains(&row.table);
                let version = Version { commit, end, values: values.map(Values::shown), truncated };
                states.insert(row, version);
                if every_state {
                    self.remember(row, version);
                }
            }
        }
        if !every_state {
            states.into_iter().for_each(|(row, version)| self.remember(row, version));
        }
    }

    fn remember(&mut self, row: RowId, version: Version) {
        let versions = self.history.get_mut(&row).expect("every row is there");
        // A TRUNCATE is recorded even if the row is gone already: applied in parts, it may remove the key ahead of the
        // deletion.
        let is_news = |last: &Version| last.values.is_some() || (version.truncated && !last.truncated);
        if version.values.is_some() || versions.last().is_none_or(is_news) {
            versions.push(version);
        }
    }

    fn finish(&mut self, me: usize) {
        let transaction = &mut self.transactions[me];
        transaction.phase = Phase::Visible;
        let xid = transaction.xid;
        let truncated: Vec<u16> = transaction.truncates.iter().copied().collect();
        for table in truncated.into_iter().map(usize::from) {
            self.filenodes[table].iter_mut().for_each(|leaf| *leaf += 1);
            self.written_by[table] = xid.map(|xid| (xid & 0xffff_ffff) as u32);
        }
        self.latest_completed = self.latest_completed.max(xid.unwrap_or(0));
        self.running.retain(|x| Some(*x) != xid);
        self.clean();
    }

    fn abort(&mut self, me: usize) {
        let transaction = &mut self.transactions[me];
        transaction.phase = Phase::Aborted;
        let Some(xid) = transaction.xid else { return };
        self.latest_completed = self.latest_completed.max(xid);
        self.running.remove(&xid);
        self.heap.retain(|t| t.xmin != xid);
        self.heap.iter_mut().filter(|t| t.xmax == Some(xid)).for_each(|t| t.xmax = None);
    }

    /// Removes tuples whose deletion is visible and flushed, so that not even a crash can bring them back.
    fn clean(&mut self) {
        let gone: BTreeSet<u64> = (self.transactions.iter())
            .filter(|t| t.phase == Phase::Visible && t.end <= self.flushed)
            .filter_map(|t| t.xid)
            .collect();
        self.heap.retain(|t| !t.xmax.is_some_and(|x| gone.contains(&x)));
    }

    fn flush(&mut self, rng: &mut Rng) {
        let last = self.wal.last().filter(|last| last.start < last.end - 8);
        self.flushed = match last {
            // Whole pages are flushed, regardless of where records end.
            Some(last) if rng.percent(25) => self.flushed.max(last.start + 8),
            _ => self.inserted,
        };
    }

    fn pick(&self, phase: Phase, rng: &mut Rng) -> Option<usize> {
        let of_phase: Vec<usize> =
            (0..self.transactions.len()).filter(|i| self.transactions[*i].phase == phase).collect();
        (!of_phase.is_empty()).then(|| *rng.pick(&of_phase))
    }

    /// Performs a step of the applications.
    pub fn step(&mut self, rng: &mut Rng) {
        if self.quiet_steps > 0 {
            self.quiet_steps -= 1;
            return self.write_something_else(rng);
        }
        let open = self.transactions.iter().filter(|t| t.phase == Phase::Open).count();
        match rng.below(100) {
            0..20 if open < OPEN_AT_ONCE => {
                self.begin(rng);
            }
            0..62 => {
                let Some(me) = self.pick(Phase::Open, rng) else { return };
                let limit = if self.transactions[me].large { 9 } else { ATOMIC };
                if self.transactions[me].ops.len() < limit {
                    self.change(me, rng);
                }
            }
            62..78 => {
                let Some(me) = self.pick(Phase::Open, rng) else { return };
                let is_empty = self.transactions[me].ops.is_empty();
                if is_empty || rng.percent(12) {
                    self.abort(me);
                } else if !self.transactions[me].large || self.transactions[me].ops.len() > 5 || rng.percent(20) {
                    self.commit(me, rng);
                }
            }
            78..86 => self.flush(rng),
            86..97 => self.become_visible(rng),
            97 => self.rewrite(rng),
            98 => {
                self.append(None, rng);
            }
            _ if rng.percent(40) => self.alter(rng),
            _ => self.rewrite(rng),
        }
    }

    /// Returns a copy for [`Postgres::set_back`]. Often the server then changes no row for a while although its
    /// position advances. In that case nothing in Redis shows that later commits of the copy belong to another history.
    pub fn copy(&mut self, rng: &mut Rng) -> Postgres {
        let copy = self.clone();
        if rng.percent(50) {
            self.quiet_steps = QUIET_STEPS;
        }
        copy
    }

    fn write_something_else(&mut self, rng: &mut Rng) {
        match rng.below(20) {
            0 => drop(self.append(None, rng)),
            1..8 => self.flush(rng),
            _ => self.become_visible(rng),
        }
    }

    fn become_visible(&mut self, rng: &mut Rng) {
        let Some(me) = self.pick(Phase::Logged, rng) else { return };
        let transaction = &self.transactions[me];
        if (transaction.asynchronous || transaction.end <= self.flushed) && rng.percent(self.visible_percent) {
            self.finish(me);
        }
    }

    /// ALTER TABLE: adds or drops a column while no other transaction holds locks on the table.
    fn alter(&mut self, rng: &mut Rng) {
        let table = rng.below(u64::from(TABLES)) as u16;
        if self.is_busy(table, None) {
            return;
        }
        let me = self.begin(rng);
        self.assign(me, rng);
        self.commit(me, rng);
        self.flushed = self.inserted;
        self.finish(me);
        self.columns[usize::from(table)] += 1;
        // A column added under an old name is a different column.
        self.shapes[usize::from(table)] += 1;
    }

    /// VACUUM FULL of a table or partition: rows move without a message in the stream.
    fn rewrite(&mut self, rng: &mut Rng) {
        let table = rng.below(u64::from(TABLES)) as u16;
        if !self.is_busy(table, None) {
            let leaf = rng.below(leaves(table) as u64) as usize;
            self.filenodes[usize::from(table)][leaf] += 1;
            self.written_by[usize::from(table)] = None;
            let there = |t: &&mut Tuple| t.row.table == table && leaf_of(t.row) == leaf;
            self.heap.iter_mut().filter(there).for_each(|t| t.tid.block = some_page(rng));
        }
    }

    /// Changes a row filter, which the stream does not announce.
    pub fn change_shape(&mut self, rng: &mut Rng) {
        self.shapes[rng.below(u64::from(TABLES)) as usize] += 1;
    }

    /// ALTER TABLE ... ATTACH PARTITION with a partition that has rows, which the stream does not announce. Returns
    /// those rows. If every table has all of its partitions, one that never had rows is detached instead. Nothing
    /// happens while Redis has rows of the partition, which may be from before this server was rewound: until somebody
    /// reads the catalog, they would count as attached rows.
    pub fn attach(&mut self, is_in_redis: impl Fn(&RowId) -> bool, rng: &mut Rng) -> Vec<RowId> {
        let last = |row: &RowId| leaf_of(*row) == leaves(row.table) - 1;
        let tables = (0..TABLES).filter(|table| leaves(*table) > 1 && !self.is_busy(*table, None));
        let Some(table) = tables.min_by_key(|table| self.attached[usize::from(*table)]) else { return Vec::new() };
        let all = (0..IDS).map(|id| RowId { table, id }).filter(last);
        if all.clone().any(|row| is_in_redis(&row)) {
            return Vec::new();
        }
        if self.attached[usize::from(table)] {
            // Not even one whose deletion is on its way.
            let had_rows = self.history.iter().any(|(row, all)| row.table == table && last(row) && all.len() > 1);
            self.attached[usize::from(table)] = had_rows;
            self.attachments[usize::from(table)] += u64::from(!had_rows);
            return Vec::new();
        }
        self.attached[usize::from(table)] = true;
        self.attachments[usize::from(table)] += 1;
        let me = self.begin(rng);
        let xid = self.assign(me, rng);
        self.commit(me, rng);
        let (commit, end) = (self.transactions[me].commit, self.transactions[me].end);
        let rows: Vec<RowId> = all.filter(|_| rng.percent(80)).collect();
        self.attached_rows += rows.len() as u64;
        for row in &rows {
            let values = Values { small: self.fresh(), large: [self.fresh(), self.fresh()] };
            self.put(*row, values, xid, None, rng);
            self.remember(*row, Version { commit, end, values: Some(values.shown()), truncated: false });
        }
        self.flushed = self.inserted;
        self.finish(me);
        rows
    }

    fn is_attached(&self, row: RowId) -> bool {
        self.attached[usize::from(row.table)] || leaf_of(row) < leaves(row.table) - 1
    }

    /// Returns whether a column was dropped and added again, so that its values may be lost before anybody reads the
    /// catalog.
    pub fn has_readded(&self) -> bool {
        self.columns.iter().any(|columns| *columns > 2)
    }

    /// Returns what the catalog says.
    pub fn mark(&self, table: u16) -> CatalogMark {
        let [first, second] = self.filenodes[usize::from(table)].map(u64::from);
        let attachments = self.attachments[usize::from(table)];
        CatalogMark { shape: self.shapes[usize::from(table)] << 16 | attachments, storage: first << 32 | second }
    }

    pub fn composition(&self, table: u16) -> Composition {
        let leaves = leaves(table) - usize::from(!self.attached[usize::from(table)]);
        let file = |leaf| LeafFile { oid: leaf as u32, filenode: self.filenode(table, leaf) };
        Composition { apart_from_leaves: self.shapes[usize::from(table)], leaves: (0..leaves).map(file).collect() }
    }

    pub fn filenode(&self, table: u16, leaf: usize) -> u32 {
        self.filenodes[usize::from(table)][leaf]
    }

    pub fn written_by(&self, table: u16) -> Option<u32> {
        self.written_by[usize::from(table)]
    }

    /// Returns where the last record ends, which is how far the walsender gets.
    pub fn last_record(&self) -> u64 {
        self.wal.last().map_or(0, |record| record.end)
    }

    /// Performs `pg_logical_emit_message` in a transaction of its own that is flushed.
    pub fn emit_mark(&mut self, nonce: Nonce, rng: &mut Rng) {
        let me = self.begin(rng);
        self.assign(me, rng);
        self.transactions[me].ops.push(Op::Mark(nonce));
        self.commit(me, rng);
        self.flushed = self.inserted;
        if rng.percent(80) {
            self.finish(me);
        }
    }

    /// Ends all activity and makes its results visible.
    pub fn settle(&mut self, rng: &mut Rng) {
        while let Some(me) = self.pick(Phase::Open, rng) {
            if self.transactions[me].ops.is_empty() { self.abort(me) } else { self.commit(me, rng) }
        }
        self.unfit = [false; TABLES as usize];
        self.settle_visible(rng);
    }

    pub fn settle_visible(&mut self, rng: &mut Rng) {
        self.flushed = self.inserted;
        while let Some(me) = self.pick(Phase::Logged, rng) {
            self.finish(me);
        }
    }

    /// Stops or crashes the server. A crash loses what was not flushed. The slot may return to an earlier position.
    pub fn restart(&mut self, crash: bool, rng: &mut Rng) {
        if !crash {
            self.flushed = self.inserted;
        }
        for me in 0..self.transactions.len() {
            let lost = self.transactions[me].end > self.flushed;
            match self.transactions[me].phase {
                Phase::Open => self.abort(me),
                Phase::Logged | Phase::Visible if lost => self.abort(me),
                Phase::Logged => self.finish(me),
                Phase::Visible | Phase::Aborted => {}
            }
        }
        self.wal.retain(|r| r.end <= self.flushed);
        let flushed = self.flushed;
        self.history.values_mut().for_each(|versions| versions.retain(|v| v.end <= flushed));
        // The end-of-recovery checkpoint.
        self.inserted = self.flushed;
        self.append(None, rng);
        self.flushed = self.inserted;
        self.temporary.clear();
        if let Some(slot) = &mut self.slot {
            slot.confirmed = slot.persisted;
            slot.active = None;
        }
    }

    /// Returns where `timeline` ended, if this timeline descends from it.
    pub fn ended(&self, timeline: u32) -> Option<u64> {
        self.ancestors.iter().find(|(of, _)| *of == timeline).map(|(_, end)| *end)
    }

    /// Replaces the server with `copy`, with the positions and transaction IDs of the copy. The slot exists if it was
    /// part of the copy, or if somebody has created it again.
    pub fn set_back(&mut self, mut copy: Postgres, how: Successor, rng: &mut Rng) {
        (copy.last_value, copy.newest_timeline) = (self.last_value, self.newest_timeline);
        let end = copy.flushed;
        copy.quiet_steps = 0;
        // The next TRUNCATE would excuse that rows are missing.
        copy.truncate_percent = copy.truncate_percent.min(4);
        copy.restart(true, rng);
        if how == Successor::Promoted {
            copy.ancestors.push((copy.timeline, end));
            // The next timeline that the copy knows of. A sibling may have taken the same number.
            copy.timeline += 1;
        }
        if rng.percent(40) {
            copy.slot = None;
        }
        // It may have written more WAL before anybody looks, even beyond its former position.
        let steps = *rng.pick(&[0, 10, 60, 200, 1_000]);
        for _ in 0..rng.below(steps + 1) {
            if steps == 1_000 && copy.flushed > self.flushed {
                break;
            }
            copy.step(rng);
        }
        // Only on a new timeline: on the same one, the slot might be created exactly where Redis is, and nothing would
        // reveal the other history.
        let is_new = copy.timeline > copy.newest_timeline;
        copy.newest_timeline = copy.newest_timeline.max(copy.timeline);
        if is_new && copy.slot.is_none() && rng.percent(40) {
            copy.settle(rng);
            let point = copy.append(None, rng).end;
            copy.flushed = copy.inserted;
            copy.slot = Some(Slot { born: point, confirmed: point, persisted: point, active: None, is_lost: false });
        }
        *self = copy;
    }

    /// Continues the creation of a temporary slot, which waits twice for the transactions that are running. Once the
    /// slot exists, returns what its exported snapshot sees.
    pub fn create_temporary_slot(&mut self, by: u64, rng: &mut Rng) -> Option<String> {
        let running = self.running.clone();
        let first = || TemporarySlot::Waits { second_time: false, wait: running.clone() };
        match self.temporary.entry(by).or_insert_with(first) {
            TemporarySlot::Waits { wait, .. } if wait.iter().any(|x| running.contains(x)) => return None,
            TemporarySlot::Waits { second_time: second_time @ false, wait } => {
                (*second_time, *wait) = (true, running);
                return None;
            }
            TemporarySlot::Waits { .. } => {}
            TemporarySlot::Made { .. } => return None,
        }
        let point = self.append(None, rng).end;
        self.flushed = self.inserted;
        self.temporary.insert(by, TemporarySlot::Made { point });
        // Built from the WAL, the snapshot sees commits that ordinary snapshots may not see yet, and treats every other
        // transaction ID between them as running.
        let committed = |t: &&Transaction| matches!(t.phase, Phase::Logged | Phase::Visible);
        let committed: BTreeSet<u64> = self.transactions.iter().filter(committed).filter_map(|t| t.xid).collect();
        let xmax = committed.last().map_or(self.latest_completed, |x| *x).max(self.latest_completed) + 1;
        let xmin = self.running.first().copied().unwrap_or(xmax).min(xmax);
        let running: Vec<u64> = (xmin..xmax).filter(|x| !committed.contains(x)).collect();
        Some(snapshot_text(xmin, xmax, &running))
    }

    /// Performs `pg_copy_logical_replication_slot`: the slot exists at once, at the position of the temporary one.
    /// Fails if the slot exists already or the temporary one is gone.
    pub fn name_slot(&mut self, by: u64) -> Result<u64, ()> {
        match self.temporary.remove(&by) {
            Some(TemporarySlot::Made { point }) if self.slot.is_none() => {
                self.slot =
                    Some(Slot { born: point, confirmed: point, persisted: point, active: None, is_lost: false });
                Ok(point)
            }
            Some(_) | None => Err(()),
        }
    }

    /// Drops the temporary slot of a session that has ended.
    pub fn drop_temporary_slot(&mut self, by: u64) {
        self.temporary.remove(&by);
    }

    pub fn confirm(&mut self, session: u64, at: u64, rng: &mut Rng) {
        if let Some(slot) = self.slot.as_mut().filter(|s| s.active == Some(session)) {
            slot.confirmed = slot.confirmed.max(at);
            if rng.percent(30) {
                slot.persisted = slot.confirmed;
            }
        }
    }

    /// Returns what a snapshot taken now sees of all rows.
    pub fn truth(&self) -> BTreeMap<RowId, Values> {
        (0..TABLES).flat_map(|table| self.rows(table)).map(|(row, values, ..)| (row, values.shown())).collect()
    }

    /// Returns a committed transaction as the stream delivers it.
    pub fn deliveries(&self, transaction: usize, told: &mut [Option<u64>; TABLES as usize]) -> Vec<Delivery> {
        let t = &self.transactions[transaction];
        let commit = CommitLsn(lsn(t.commit));
        let xid = (t.xid.unwrap_or(0) & 0xffff_ffff) as u32;
        let mut out = vec![Delivery::Begin(Begin { xid, commit, time: CommitTime(t.time as i64) })];
        for op in &t.ops {
            let tables: &[u16] = match op {
                Op::Insert { row, .. } | Op::Delete { row } | Op::Update { from: row, .. } => &[row.table],
                Op::Truncate { tables } => tables,
                Op::Mark(_) => &[],
            };
            for table in tables {
                let columns = t.columns[usize::from(*table)];
                if told[usize::from(*table)].replace(columns) != Some(columns) {
                    out.push(Delivery::Relation(relation(*table, columns)));
                }
            }
            let written = |row: &RowId| match has_extra(t.columns[usize::from(row.table)]) {
                true => Extra::OfRow,
                false => Extra::NoColumn,
            };
            out.push(match op {
                Op::Insert { row, values } => Delivery::Change(Change::Insert {
                    relation: oid(row.table),
                    new: full(*row, *values, written(row)),
                }),
                Op::Update { from, to, values, large_sent } => {
                    let old = (from != to).then(|| OldRow::Key(only_key(*from, written(from))));
                    let new = updated(*to, *values, written(to), *large_sent);
                    Delivery::Change(Change::Update { relation: oid(to.table), old, new })
                }
                Op::Delete { row } => Delivery::Change(Change::Delete {
                    relation: oid(row.table),
                    old: OldRow::Key(only_key(*row, written(row))),
                }),
                Op::Truncate { tables } => {
                    Delivery::Change(Change::Truncate { relations: tables.iter().copied().map(oid).collect() })
                }
                Op::Mark(nonce) => Delivery::Mark(*nonce),
            });
        }
        out.push(Delivery::Commit { commit, end: end_lsn(t.end) });
        out
    }
}

fn snapshot_text(xmin: u64, xmax: u64, running: &[u64]) -> String {
    let running: Vec<String> = running.iter().map(u64::to_string).collect();
    format!("{xmin}:{xmax}:{}", running.join(","))
}

pub fn lsn(at: u64) -> Lsn {
    Lsn::new(at).expect("no position is zero")
}

pub fn end_lsn(at: u64) -> EndLsn {
    EndLsn(lsn(at))
}

fn some_page(rng: &mut Rng) -> u32 {
    rng.below(u64::from(PAGES)) as u32
}

/// Returns the number of tables or partitions that hold the rows.
pub fn leaves(table: u16) -> usize {
    if table == 0 { 1 } else { MOST_LEAVES }
}

pub fn leaf_of(row: RowId) -> usize {
    (row.id * leaves(row.table) as u64 / IDS) as usize
}

/// Returns why a table cannot be followed.
pub fn unfit() -> Blocked {
    Blocked { because: "the role may not read it".to_owned(), remedy: "grant SELECT".to_owned() }
}

/// The type of all columns.
pub const TEXT: Oid = 25;

fn oid(table: u16) -> Oid {
    100 + u32::from(table)
}

pub fn name(table: u16) -> QualifiedName {
    QualifiedName { schema: "public".to_owned(), table: if table == 0 { "a" } else { "b" }.to_owned() }
}

pub fn has_extra(columns: u64) -> bool {
    columns % 2 == 1
}

/// `columns`: see [`Postgres::columns`].
pub fn relation(table: u16, columns: u64) -> Arc<Relation> {
    let column = |name: &str| RelationColumn {
        name: name.to_owned(),
        type_oid: TEXT,
        type_modifier: -1,
        in_identity: name == "id",
    };
    let names = ["id", "small", "large", "huge", "extra"];
    let names = &names[..if has_extra(columns) { 5 } else { 4 }];
    Arc::new(Relation {
        oid: oid(table),
        name: name(table),
        identity: ReplicaIdentity::Default,
        columns: names.iter().copied().map(column).collect(),
    })
}

pub fn full(row: RowId, values: Values, extra: Extra) -> Row {
    let mut out = RowBuilder::with_capacity(32);
    for (cell, value) in [row.id, values.small, values.large[0], values.large[1]].into_iter().enumerate() {
        out.text(text(value, cell).as_bytes());
    }
    match extra {
        Extra::NoColumn => {}
        Extra::Null => out.null(),
        Extra::OfRow => out.text(values.small.to_string().as_bytes()),
    }
    out.row()
}

fn only_key(row: RowId, extra: Extra) -> Row {
    let mut out = RowBuilder::with_capacity(16);
    out.text(row.id.to_string().as_bytes());
    let others = if extra == Extra::NoColumn { 3 } else { 4 };
    (0..others).for_each(|_| out.null());
    out.row()
}

pub fn updated(row: RowId, values: Values, extra: Extra, large_sent: [bool; 2]) -> NewRow {
    let mut wire = BytesMut::new();
    let mut cells =
        vec![(row.id, true), (values.small, true), (values.large[0], large_sent[0]), (values.large[1], large_sent[1])];
    cells.extend((extra == Extra::OfRow).then_some((values.small, true)));
    wire.put_u16(cells.len() as u16);
    for (cell, (value, sent)) in cells.into_iter().enumerate() {
        let text = text(value, cell);
        if sent {
            wire.put_u8(b't');
            wire.put_u32(text.len() as u32);
            wire.put_slice(text.as_bytes());
        } else {
            wire.put_u8(b'u');
        }
    }
    NewRow::take(&mut wire.freeze()).expect("well-formed")
}
