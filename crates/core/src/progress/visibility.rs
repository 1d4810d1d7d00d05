//! Decides which rows of a chunk are superseded by the stream.
//!
//! A chunk is read under a snapshot while the stream delivers transactions. If a delivered transaction that the
//! snapshot does not see touched a key, the stream's version of the row is newer. For every other key, the chunk's row
//! *is* the stream's state. A watermark in the WAL is not enough to tell: a commit may be in the WAL for seconds before
//! snapshots see it.
//!
//! It must not know rows, Redis or time. A mistake here overwrites a row with an older version.

use crate::command::Key;
use crate::lsn::EndLsn;
use crate::rules::{Rule, holds};
use crate::schema::TableId;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fmt;
use std::str::FromStr;

/// The most keys that the record holds over all transactions, about 20 MB. Beyond this limit, a transaction counts as
/// having touched its tables as a whole, and chunks that do not see it are read again.
const KEYS_HELD: usize = 200_000;
/// The most transactions that the record holds. Beyond this limit, neighbours are merged in pairs; a pair counts as
/// seen when both are.
const TRANSACTIONS_HELD: usize = 100_000;

/// A snapshot as `pg_current_snapshot()` returns it: `xmin:xmax:xip,…`, with 64-bit transaction IDs.
///
/// <https://www.postgresql.org/docs/current/functions-info.html#FUNCTIONS-PG-SNAPSHOT-PARTS>
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// Every transaction below it has ended.
    xmin: u64,
    /// No transaction at or above it is visible.
    xmax: u64,
    /// Transactions between the two that were in progress; ascending.
    running: Vec<u64>,
}

/// A text that is not a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a snapshot: expected xmin:xmax:xip,…")]
pub struct NotASnapshot(pub String);

impl FromStr for Snapshot {
    type Err = NotASnapshot;

    fn from_str(s: &str) -> Result<Self, NotASnapshot> {
        let parse = || {
            let mut parts = s.splitn(3, ':');
            let (xmin, xmax, list) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?, parts.next()?);
            let mut running: Vec<u64> = match list {
                "" => Vec::new(),
                list => list.split(',').map(|x| x.parse().ok()).collect::<Option<_>>()?,
            };
            running.sort_unstable();
            Some(Snapshot { xmin, xmax, running })
        };
        parse().filter(|s| s.xmin <= s.xmax).ok_or_else(|| NotASnapshot(s.to_owned()))
    }
}

impl fmt::Display for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:", self.xmin, self.xmax)?;
        for (i, xid) in self.running.iter().enumerate() {
            write!(f, "{}{xid}", if i == 0 { "" } else { "," })?;
        }
        Ok(())
    }
}

impl Snapshot {
    /// Returns whether it sees this committed transaction. `xid` is as pgoutput sends it: the low 32 bits.
    pub fn sees(&self, xid: u32) -> bool {
        self.sees_full(self.widen(xid))
    }

    /// Returns whether it sees every transaction that `other` sees.
    pub fn sees_all_that(&self, other: &Snapshot) -> bool {
        self.running.iter().all(|xid| !other.sees_full(*xid)) && {
            // Of the transactions between this xmax and the other's, `other` may not see any.
            let beyond = other.xmax.saturating_sub(self.xmax);
            let unseen = other.running.len() - other.running.partition_point(|x| *x < self.xmax);
            beyond == 0 || u64::try_from(unseen).is_ok_and(|n| n == beyond)
        }
    }

    fn sees_full(&self, xid: u64) -> bool {
        xid < self.xmax && self.running.binary_search(&xid).is_err()
    }

    /// Returns the 64-bit ID that ends in these 32 bits and is nearest to this snapshot. Transactions that matter at
    /// the same time are never 2^31 apart, because Postgres would have stopped assigning IDs before.
    fn widen(&self, xid: u32) -> u64 {
        const ROUND: u64 = 1 << 32;
        let same_round = (self.xmax & !(ROUND - 1)) | u64::from(xid);
        if same_round > self.xmax && same_round - self.xmax > ROUND / 2 {
            same_round.saturating_sub(ROUND)
        } else if self.xmax > same_round && self.xmax - same_round > ROUND / 2 {
            same_round + ROUND
        } else {
            same_round
        }
    }
}

/// What is recorded for each transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Recording {
    /// The tables that it touched. Sufficient while nothing is loaded.
    Tables,
    /// The keys that it touched.
    Keys,
}

/// What the delivered transactions touched, for those that some snapshot may not see.
#[derive(Debug)]
pub struct Record {
    recording: Recording,
    /// In the order in which they were delivered.
    transactions: VecDeque<Recorded>,
    /// Whether the last one is still being delivered, or is being applied in parts.
    open: bool,
    /// How many entries of [`Recorded::touched`] are [`Touched::Whole`].
    wholes: usize,
    /// Each key with the last transaction that touched it.
    ///
    /// The last one is enough: each earlier transaction held the row's lock until it was visible, so a snapshot that
    /// sees the last one sees them all.
    keys: HashMap<Key, u32>,
}

#[derive(Debug)]
struct Recorded {
    xids: Vec<u32>,
    /// `None` while the transaction is open.
    end: Option<EndLsn>,
    touched: BTreeMap<TableId, Touched>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Touched {
    Keys,
    Whole,
}

/// Whether a chunk may be written.
#[derive(Debug)]
pub enum Judged<'a> {
    /// It may, except for the rows that the stream has superseded.
    Known(Known<'a>),
    ReadAgain(Why),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    /// The snapshot does not see a transaction that was delivered but not applied.
    BelowBase,
    /// The snapshot does not see a transaction that touched the whole table, by TRUNCATE or with too many keys.
    WholeTable,
}

/// The keys for which the stream has superseded a snapshot.
#[derive(Debug, Clone, Copy)]
pub struct Known<'a> {
    keys: &'a HashMap<Key, u32>,
    snapshot: &'a Snapshot,
}

impl Known<'_> {
    pub fn contains(&self, key: &Key) -> bool {
        holds(Rule::LeaveKeysToStream) && self.keys.get(key).is_some_and(|xid| !self.snapshot.sees(*xid))
    }
}

impl Record {
    pub fn new(recording: Recording) -> Self {
        Record { recording, transactions: VecDeque::new(), open: false, wholes: 0, keys: HashMap::new() }
    }

    /// Changes what is recorded from now on.
    pub fn set(&mut self, recording: Recording) {
        self.recording = recording;
    }

    pub fn begin(&mut self, xid: u32) {
        self.open = true;
        self.transactions.push_back(Recorded { xids: vec![xid], end: None, touched: BTreeMap::new() });
    }

    pub fn touch(&mut self, table: TableId, key: Key) {
        if self.recording == Recording::Tables || self.keys.len() >= KEYS_HELD {
            return self.touch_table(table);
        }
        let Some(open) = self.transactions.back_mut().filter(|_| self.open) else { return };
        open.touched.entry(table).or_insert(Touched::Keys);
        if let Some(xid) = open.xids.last() {
            self.keys.insert(key, *xid);
        }
    }

    pub fn touch_table(&mut self, table: TableId) {
        if let Some(open) = self.transactions.back_mut().filter(|_| self.open) {
            let before = open.touched.insert(table, Touched::Whole);
            self.wholes += usize::from(before != Some(Touched::Whole));
        }
    }

    pub fn end(&mut self, end: EndLsn) {
        if !std::mem::take(&mut self.open) {
            return;
        }
        if self.transactions.back().is_some_and(|t| t.touched.is_empty()) {
            self.transactions.pop_back();
        } else if let Some(open) = self.transactions.back_mut() {
            open.end = Some(end);
        }
        if self.transactions.len() > TRANSACTIONS_HELD {
            self.merge_neighbours();
        }
    }

    /// Drops the transactions that the newest snapshot and those of all reads in progress see.
    pub fn prune(&mut self, newest: &Snapshot, floors: &[Snapshot]) {
        let floors = if holds(Rule::RecordForOpenReads) { floors } else { &[] };
        let seen = |xid: &u32| newest.sees(*xid) && floors.iter().all(|floor| floor.sees(*xid));
        self.transactions.retain(|t| t.end.is_none() || !t.xids.iter().all(seen));
        self.count_wholes();
        let open = self.transactions.back().filter(|_| self.open).and_then(|t| t.xids.last().copied());
        self.keys.retain(|_, xid| Some(*xid) == open || !seen(xid));
        if self.keys.len() < self.keys.capacity() / 4 {
            self.keys.shrink_to(self.keys.len() * 2);
        }
    }

    /// Decides what becomes of a chunk of `table` that was read under `snapshot`. Transactions that ended at or before
    /// `base` may be missing from Redis, so the chunk must have seen them.
    pub fn judge<'a>(&'a self, table: TableId, snapshot: &'a Snapshot, base: EndLsn) -> Judged<'a> {
        for transaction in &self.transactions {
            let below_base = transaction.end.is_some_and(|end| end <= base) && holds(Rule::ReadAgainBelowBase);
            if !below_base && self.wholes == 0 {
                // Transactions are ordered by their ends, so none of the rest can matter.
                break;
            }
            let Some(touched) = transaction.touched.get(&table) else { continue };
            if !below_base && (*touched == Touched::Keys || !holds(Rule::ReadAgainAfterTruncate)) {
                continue;
            }
            if transaction.xids.iter().all(|xid| snapshot.sees(*xid)) {
                continue;
            }
            return Judged::ReadAgain(if below_base { Why::BelowBase } else { Why::WholeTable });
        }
        Judged::Known(Known { keys: &self.keys, snapshot })
    }

    /// Halves the number of transactions by merging neighbours.
    fn merge_neighbours(&mut self) {
        let mut merged: VecDeque<Recorded> = VecDeque::with_capacity(self.transactions.len() / 2 + 1);
        let mut all = std::mem::take(&mut self.transactions).into_iter();
        while let Some(mut first) = all.next() {
            if let Some(second) = all.next() {
                first.xids.extend(second.xids);
                // The earlier end, because if either may be missing from Redis, neither may be left to the stream.
                first.end = first.end.into_iter().chain(second.end).min();
                for (table, touched) in second.touched {
                    let before = first.touched.entry(table).or_insert(touched);
                    *before = touched.max(*before);
                }
            }
            merged.push_back(first);
        }
        self.transactions = merged;
        self.count_wholes();
    }

    fn count_wholes(&mut self) {
        let touched = self.transactions.iter().flat_map(|t| t.touched.values());
        self.wholes = touched.filter(|t| **t == Touched::Whole).count();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lsn::Lsn;
    use bytes::Bytes;
    use proptest::prelude::*;

    const TABLE: TableId = TableId(0);

    fn snapshot(text: &str) -> Snapshot {
        text.parse().expect("a literal snapshot")
    }

    fn end(n: u64) -> EndLsn {
        EndLsn(Lsn::new(n).expect("not zero"))
    }

    fn key(n: u32) -> Key {
        Key(Bytes::from(format!("t:{n}")))
    }

    fn touching(record: &mut Record, xid: u32, at: u64, keys: &[u32]) {
        record.begin(xid);
        keys.iter().for_each(|k| record.touch(TABLE, key(*k)));
        record.end(end(at));
    }

    #[derive(Debug, PartialEq)]
    enum Verdict {
        Known(Vec<u32>),
        ReadAgain(Why),
    }

    /// Returns which of the first ten keys the stream has superseded.
    fn judged(record: &Record, table: TableId, snapshot: &Snapshot, base: u64) -> Verdict {
        match record.judge(table, snapshot, end(base)) {
            Judged::Known(known) => Verdict::Known((0..10).filter(|k| known.contains(&key(*k))).collect()),
            Judged::ReadAgain(why) => Verdict::ReadAgain(why),
        }
    }

    fn known(keys: &[u32]) -> Verdict {
        Verdict::Known(keys.to_vec())
    }

    #[test]
    fn reads_what_postgres_prints() {
        for text in ["748:748:", "745:748:745,747", "4294967300:4294967310:4294967301"] {
            assert_eq!(snapshot(text).to_string(), text);
        }
        for text in ["", "1", "1:2", "1:2:x", "2:1:", "1:2:1,", "a:b:", "1:2:1:"] {
            assert!(text.parse::<Snapshot>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn sees_what_was_over_when_it_was_taken() {
        let s = snapshot("10:15:10,12");
        let seen: Vec<u32> = (8..18).filter(|xid| s.sees(*xid)).collect();
        assert_eq!(seen, [8, 9, 11, 13, 14]);
    }

    #[test]
    fn short_ids_belong_to_the_nearest_round() {
        let s = snapshot("8589934590:8589934600:8589934594");
        assert!(s.sees(0xffff_fffe), "two before the wrap");
        assert!(s.sees(1));
        assert!(!s.sees(2), "8589934594 is under way");
        assert!(!s.sees(8));
        assert!(!s.sees(100), "after it, and not a round before");
        assert!(s.sees(u32::MAX - 100));
        let young = snapshot("3:10:");
        assert!(young.sees(9) && !young.sees(10) && young.sees(3));
        for before_the_wrap in ["4294967290:4294967294:", "8589934586:8589934590:"].map(snapshot) {
            assert!(!before_the_wrap.sees(3), "a later transaction, beyond the wrap");
        }
    }

    proptest! {
        #[test]
        fn sees_all_that_agrees_with_looking_at_each(
            (a, b) in (snapshots(), snapshots())
        ) {
            let each = (0..40).all(|xid| !b.sees(xid) || a.sees(xid));
            prop_assert_eq!(a.sees_all_that(&b), each, "{} {}", a, b);
        }
    }

    fn snapshots() -> impl Strategy<Value = Snapshot> {
        (3_u64..20, 0_u64..10, prop::collection::btree_set(0_u64..10, 0..5)).prop_map(|(xmin, width, running)| {
            let running: Vec<u64> = running.into_iter().filter(|x| *x < width).map(|x| xmin + x).collect();
            Snapshot { xmin, xmax: xmin + width, running }
        })
    }

    #[test]
    fn a_key_touched_by_what_the_chunk_does_not_see_is_left_to_the_stream() {
        let mut record = Record::new(Recording::Keys);
        touching(&mut record, 10, 100, &[1, 2]);
        touching(&mut record, 11, 110, &[3]);
        touching(&mut record, 12, 120, &[1, 4]);
        assert_eq!(judged(&record, TABLE, &snapshot("11:13:11"), 1), known(&[3]));
        assert_eq!(judged(&record, TABLE, &snapshot("11:12:11"), 1), known(&[1, 3, 4]));
    }

    #[test]
    fn an_open_transaction_counts_as_far_as_it_has_come() {
        let mut record = Record::new(Recording::Keys);
        record.begin(10);
        record.touch(TABLE, key(1));
        assert_eq!(judged(&record, TABLE, &snapshot("10:10:"), 1), known(&[1]));
    }

    #[test]
    fn what_may_be_missing_from_redis_must_have_been_seen() {
        let mut record = Record::new(Recording::Keys);
        touching(&mut record, 10, 100, &[1]);
        let old = snapshot("10:10:");
        assert_eq!(judged(&record, TABLE, &old, 99), known(&[1]));
        assert_eq!(judged(&record, TABLE, &old, 100), Verdict::ReadAgain(Why::BelowBase), "as one with its neighbour");
        assert_eq!(judged(&record, TABLE, &snapshot("11:11:"), 100), known(&[]));
    }

    #[test]
    fn a_truncate_that_is_not_seen_spoils_the_chunk() {
        let mut record = Record::new(Recording::Keys);
        record.begin(10);
        record.touch(TABLE, key(1));
        record.touch_table(TABLE);
        record.touch(TABLE, key(2));
        record.end(end(100));
        assert_eq!(judged(&record, TABLE, &snapshot("10:10:"), 1), Verdict::ReadAgain(Why::WholeTable));
        assert_eq!(judged(&record, TABLE, &snapshot("11:11:"), 1), known(&[]));
    }

    #[test]
    fn a_truncate_is_forgotten_with_its_transaction() {
        let mut record = Record::new(Recording::Keys);
        touching(&mut record, 10, 100, &[1]);
        record.begin(11);
        record.touch_table(TABLE);
        record.touch_table(TABLE);
        record.end(end(110));
        record.begin(12);
        record.touch(TableId(1), key(2));
        record.touch(TableId(2), key(3));
        record.end(end(120));
        record.prune(&snapshot("13:13:"), &[snapshot("11:11:")]);
        assert_eq!((record.transactions.len(), record.wholes), (2, 1));
        assert_eq!(judged(&record, TABLE, &snapshot("11:11:"), 1), Verdict::ReadAgain(Why::WholeTable));
        assert_eq!(judged(&record, TableId(1), &snapshot("11:11:"), 1), known(&[2, 3]), "another table");
        record.prune(&snapshot("13:13:"), &[]);
        assert_eq!((record.transactions.len(), record.wholes), (0, 0));
    }

    #[test]
    fn without_keys_every_touched_table_counts_as_a_whole() {
        let mut record = Record::new(Recording::Tables);
        touching(&mut record, 10, 100, &[1]);
        record.set(Recording::Keys);
        touching(&mut record, 11, 110, &[2]);
        assert_eq!(judged(&record, TABLE, &snapshot("10:10:"), 1), Verdict::ReadAgain(Why::WholeTable));
        assert_eq!(judged(&record, TABLE, &snapshot("11:11:"), 1), known(&[2]));
    }

    #[test]
    fn only_what_everybody_sees_is_forgotten() {
        let mut record = Record::new(Recording::Keys);
        touching(&mut record, 10, 100, &[1]);
        touching(&mut record, 11, 110, &[2]);
        record.prune(&snapshot("12:12:"), &[snapshot("11:11:")]);
        assert_eq!(judged(&record, TABLE, &snapshot("5:5:"), 1), known(&[2]));
        record.prune(&snapshot("11:12:11"), &[]);
        assert_eq!(judged(&record, TABLE, &snapshot("5:5:"), 1), known(&[2]), "not visible to anybody yet");
        record.begin(12);
        record.touch(TABLE, key(3));
        record.prune(&snapshot("20:20:"), &[]);
        record.touch(TABLE, key(4));
        record.end(end(120));
        assert_eq!(judged(&record, TABLE, &snapshot("5:5:"), 1), known(&[3, 4]), "the open one is kept");
    }

    #[test]
    fn its_memory_is_bounded_and_what_it_cannot_hold_counts_as_the_whole_table() {
        let mut record = Record::new(Recording::Keys);
        record.begin(10);
        (0..KEYS_HELD as u32 + 1).for_each(|k| record.touch(TABLE, key(k)));
        record.end(end(100));
        assert_eq!(record.keys.len(), KEYS_HELD);
        assert_eq!(judged(&record, TABLE, &snapshot("10:10:"), 1), Verdict::ReadAgain(Why::WholeTable));
        record.prune(&snapshot("11:11:"), &[]);
        assert!(record.keys.capacity() < KEYS_HELD / 4, "what is no longer needed is given back");

        let mut record = Record::new(Recording::Keys);
        let many = TRANSACTIONS_HELD as u32 + 1;
        let touch = |record: &mut Record, xid| touching(record, xid + 3, u64::from(xid) + 100, &[xid]);
        (0..many - 1).for_each(|xid| touch(&mut record, xid));
        assert_eq!(record.transactions.len(), TRANSACTIONS_HELD);
        touch(&mut record, many - 1);
        assert_eq!(record.transactions.len(), TRANSACTIONS_HELD / 2 + 1);
        let second_unseen = snapshot(&format!("4:{}:4", many + 3));
        assert_eq!(judged(&record, TABLE, &second_unseen, 99), known(&[1]));
        assert_eq!(
            judged(&record, TABLE, &second_unseen, 100),
            Verdict::ReadAgain(Why::BelowBase),
            "as one with its neighbour"
        );
        record.prune(&snapshot(&format!("{0}:{0}:", many + 3)), &[]);
        assert!(record.transactions.is_empty());
    }
}
