//! Takes the stream's deliveries. An open transaction is buffered until its commit, then planned into the growing
//! batch. What it touched is recorded for the loads, and compared with what the checkpoint says was applied.

use super::growing::Growing;
use super::shapes::Shapes;
use super::tables::Tables;
use super::turn::Turn;
use crate::change::{Begin, Change, Delivery};
use crate::checkpoint::{Blocked, Checkpoint, LastTransaction, Place, Within};
use crate::lsn::EndLsn;
use crate::plan::mapping::Mapping;
use crate::progress::redelivery::{Ahead, Redelivered, Redelivery};
use crate::progress::visibility::{Judged, Record, Recording, Snapshot};
use crate::resp::batch::Limits;
use crate::schema::{Relation, TableId, TableSpec};
use crate::typed::known::KnownTypes;
use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;

/// Bytes that a change takes besides its row: its message's frame, and its place in memory.
const CHANGE_BYTES: usize = 128;

pub(super) struct Intake {
    shapes: Shapes,
    record: Record,
    watch: Redelivery,
    /// Transactions whose commit begins before it are already in Redis.
    apply_above: EndLsn,
    /// Some hash slots have everything before it, so that what is delivered until then is not written to them.
    left_out_until: Option<Place>,
    received: EndLsn,
    /// Deliveries that wait until the growing batch has been sent.
    undelivered: VecDeque<Delivery>,
    open: Option<Open>,
    /// What the announcement of a change weighs without its key, if changes are announced.
    announcement: Option<usize>,
    /// The limits of a transaction that is applied atomically.
    atomic_changes: u64,
    atomic_bytes: usize,
}

/// The transaction that is being delivered.
struct Open {
    begin: Begin,
    /// The checkpoint covers it: it is recorded but not applied.
    covered: bool,
    /// How many of its changes are already in Redis.
    skip: u64,
    delivered: u64,
    changes: Vec<Queued>,
    bytes: usize,
    /// An upper bound of what its changes add to a batch. See [`command::weight`](crate::command::weight).
    weight: usize,
    /// It is over the atomic limits, and is applied in parts.
    split: bool,
    /// Tables that it has truncated without writing a row afterwards.
    emptied: BTreeSet<TableId>,
    /// It changes something in Redis.
    touched: bool,
    /// It changes a table of which Redis has everything that the checkpoint covers.
    followed: bool,
    /// It contains a chunk's watermark.
    marked: bool,
}

impl Open {
    /// Whether the next change is to be applied.
    fn applies_next(&self) -> bool {
        !self.covered && self.delivered >= self.skip
    }
}

/// A change, resolved to its table.
enum Queued {
    Row(Arc<Mapping>, Change),
    Truncate(TableId),
}

impl Intake {
    /// `from` is where the stream begins; `until`, how far a hash slot is; `ahead`, the last transaction of which one has
    /// anything.
    pub fn new(
        specs: Arc<[TableSpec]>,
        types: KnownTypes,
        checkpoint: &Checkpoint,
        (from, (until, ahead)): (EndLsn, (Option<Place>, Option<Ahead>)),
        recording: Recording,
        (atomic_changes, atomic_bytes): (u64, usize),
        announcement: Option<usize>,
    ) -> Self {
        Intake {
            shapes: Shapes::new(specs, types),
            record: Record::new(recording),
            watch: Redelivery::new(checkpoint, ahead, until, from),
            apply_above: checkpoint.lsn,
            left_out_until: until,
            received: from,
            undelivered: VecDeque::new(),
            open: None,
            announcement,
            atomic_changes,
            atomic_bytes,
        }
    }

    pub fn received(&self) -> EndLsn {
        self.received
    }

    /// Everything before it was delivered, or was in Redis when the session began.
    pub fn delivered_or_covered(&self) -> EndLsn {
        self.received.max(self.apply_above)
    }

    pub fn shapes(&self) -> &Shapes {
        &self.shapes
    }

    pub fn learn_types(&mut self, found: KnownTypes) {
        self.shapes.learn_types(found);
    }

    /// The transaction that is being delivered, if it will be applied.
    pub fn open(&self) -> Option<&Begin> {
        self.open.as_ref().filter(|open| !open.covered && open.touched).map(|open| &open.begin)
    }

    // ---- deliveries that wait ---------------------------------------------------------------------------------------

    pub fn hold(&mut self, items: Vec<Delivery>) {
        self.undelivered.extend(items);
    }

    pub fn holds_back(&self) -> bool {
        !self.undelivered.is_empty()
    }

    /// Stops taking deliveries. A transaction that is not complete will be delivered again.
    pub fn drain(&mut self) {
        self.open = None;
        self.undelivered.clear();
    }

    /// Returns the next delivery if it fits into the growing batch.
    pub fn next_that_fits(&mut self, growing: &mut Growing, tables: &mut Tables, limits: &Limits) -> Option<Delivery> {
        let item = self.undelivered.pop_front()?;
        if self.makes_room_for(&item, growing, tables, limits) {
            return Some(item);
        }
        self.undelivered.push_front(item);
        None
    }

    /// Whether this fits into the growing batch. Splits the open transaction if this would make it too large.
    fn makes_room_for(&mut self, item: &Delivery, growing: &mut Growing, tables: &mut Tables, limits: &Limits) -> bool {
        let Some(open) = self.open.as_ref().filter(|open| !open.covered) else { return true };
        let change = match item {
            Delivery::Change(change) => change,
            Delivery::Commit { .. } => return growing.fits(open.weight, limits),
            Delivery::Begin(_) | Delivery::Relation(_) | Delivery::Mark(_) | Delivery::Position(_) => return true,
        };
        if !open.applies_next() {
            return true;
        }
        let weight = self.weight_of(change);
        let bytes = open.bytes + change.len_bytes() + CHANGE_BYTES;
        let is_over = open.delivered >= self.atomic_changes
            || bytes > self.atomic_bytes
            || open.weight + weight > limits.stream_bytes();
        let mut split = open.split;
        if !split && is_over && open.delivered > 0 {
            if !growing.fits(open.weight, limits) {
                return false;
            }
            self.split_open(growing, tables);
            split = true;
        }
        !(is_over || split) || growing.fits(weight, limits)
    }

    fn weight_of(&self, change: &Change) -> usize {
        match change {
            Change::Insert { relation, .. } | Change::Update { relation, .. } | Change::Delete { relation, .. } => {
                match self.shapes.mapping(*relation) {
                    Some(Ok(mapping)) => {
                        let announced =
                            self.announcement.map_or(0, |each| mapping.weight_of_announcements(change, each));
                        mapping.weight_of(change) + announced
                    }
                    Some(Err(_)) | None => 0,
                }
            }
            // Its keys are looked up, and weighed, when the batch is in flight.
            Change::Truncate { relations } => self.announcement.unwrap_or(0) * relations.len(),
            Change::Foreign { .. } => 0,
        }
    }

    // ---- deliveries -------------------------------------------------------------------------------------------------

    /// `within` says how much of a split transaction is already in Redis.
    pub fn begin(&mut self, begin: Begin, within: Option<Within>, turn: &mut Turn) {
        assert!(self.open.is_none(), "transactions do not overlap");
        self.record.begin(begin.xid);
        turn.heeds(self.watch.begins(&begin));
        let skip = within.filter(|within| within.begin == begin).map_or(0, |within| within.changes_done);
        self.open = Some(Open {
            begin,
            // A server position may fall inside a commit record. A transaction whose commit began before it counts as
            // covered, here and in the record.
            covered: begin.commit.0 < self.apply_above.0,
            skip,
            delivered: 0,
            changes: Vec::new(),
            bytes: 0,
            weight: 0,
            split: skip > 0,
            emptied: BTreeSet::new(),
            touched: false,
            followed: false,
            marked: false,
        });
    }

    pub fn relation(&mut self, relation: Arc<Relation>) {
        self.shapes.describe(relation);
    }

    /// The open transaction contains a chunk's watermark.
    pub fn mark(&mut self) {
        if let Some(open) = &mut self.open {
            open.marked = true;
        }
    }

    /// Returns the mapping of a row that will be applied, or why its table cannot be followed.
    pub fn shape_of(&self, change: &Change) -> Option<Result<&Mapping, (TableId, &Blocked)>> {
        let (Change::Insert { relation, .. } | Change::Update { relation, .. } | Change::Delete { relation, .. }) =
            change
        else {
            return None;
        };
        let open = self.open.as_ref().expect("a change belongs to a transaction");
        if !open.applies_next() {
            return None;
        }
        match self.shapes.mapping(*relation)? {
            Ok(mapping) => Some(Ok(mapping)),
            Err(why) => self.shapes.table(*relation).map(|table| Err((table, why))),
        }
    }

    pub fn change(&mut self, change: Change, growing: &mut Growing, tables: &mut Tables) {
        let weight = self.weight_of(&change);
        let open = self.open.as_mut().expect("a change belongs to a transaction");
        let applies = open.applies_next();
        open.delivered += 1;
        // Includes rows of tables that are not configured: they share the same buffers.
        open.bytes += change.len_bytes() + CHANGE_BYTES;
        open.weight += if applies { weight } else { 0 };
        match change {
            Change::Foreign { .. } => {}
            Change::Truncate { relations } => {
                for table in relations.iter().filter_map(|oid| self.shapes.table(*oid)) {
                    open.emptied.insert(table);
                    open.followed |= tables.get(table).was_followed();
                    open.touched |= !open.covered || open.followed;
                    if applies {
                        open.changes.push(Queued::Truncate(table));
                    } else {
                        self.record.touch_table(table);
                    }
                }
            }
            Change::Insert { relation, .. } | Change::Update { relation, .. } | Change::Delete { relation, .. } => {
                if let Some(table) = self.shapes.table(relation) {
                    open.emptied.remove(&table);
                }
                if let Some(Ok(mapping)) = self.shapes.mapping(relation) {
                    open.followed |= tables.get(mapping.table).was_followed();
                    if applies {
                        open.changes.push(Queued::Row(mapping.clone(), change));
                        open.touched = true;
                    } else {
                        open.touched |= !open.covered || open.followed;
                        mapping.keys_of(&change).for_each(|key| self.record.touch(mapping.table, key));
                    }
                }
            }
        }
        open.split |= applies && (open.delivered > self.atomic_changes || open.bytes > self.atomic_bytes);
        if applies && open.split {
            let part = Within { begin: open.begin, changes_done: open.delivered };
            self.plan_open(growing, tables);
            growing.is_within(Some(part));
        }
    }

    pub fn commit(&mut self, end: EndLsn, growing: &mut Growing, tables: &mut Tables, turn: &mut Turn) {
        let open = self.open.as_ref().expect("a transaction that ends has begun");
        if !open.covered {
            self.plan_open(growing, tables);
        }
        let Open { begin, covered, skip, split, emptied, touched, followed, marked, .. } =
            self.open.take().expect("a transaction that ends has begun");
        for table in emptied {
            tables.get_mut(table).was_emptied_by(begin.xid);
        }
        // Covered transactions count as "at or below base", even one whose commit record straddles it. So does one that
        // an earlier session began to apply: some of its rows may have been pending there, or removed since, and that is no
        // longer known.
        let is_left_out = self.left_out_until.is_some_and(|until| Place { at: begin.commit.0, done: 1 } <= until);
        self.record.end(if covered || skip > 0 || is_left_out { end.min(self.apply_above) } else { end });
        self.received = self.received.max(end);
        turn.heeds(self.watch.transaction(end, &begin));
        if covered {
            if touched {
                turn.heeds(self.watch.covered(&begin));
            }
            return;
        }
        if followed {
            turn.heeds(self.watch.applied(&begin));
        }
        growing.reaches(end);
        if split {
            growing.is_within(None);
        }
        let last = LastTransaction { end, xid: begin.xid, time: begin.time };
        match touched {
            true => growing.applies(last),
            // A load has written rows that were committed before it: a rewind of Postgres past it must be noticed.
            false if marked => growing.passes(last),
            false => {}
        }
    }

    /// Everything before `at` has been delivered.
    pub fn position(&mut self, at: EndLsn) -> Redelivered {
        self.received = self.received.max(at);
        self.watch.reached(at)
    }

    // ---- planning ---------------------------------------------------------------------------------------------------

    /// Applies what has been delivered of the open transaction, and the rest as it arrives.
    fn split_open(&mut self, growing: &mut Growing, tables: &mut Tables) {
        let open = self.open.as_mut().expect("a transaction is open");
        open.split = true;
        let part = Within { begin: open.begin, changes_done: open.delivered };
        self.plan_open(growing, tables);
        growing.is_within(Some(part));
    }

    /// Moves what has been delivered of the open transaction into the growing batch.
    fn plan_open(&mut self, growing: &mut Growing, tables: &mut Tables) {
        let open = self.open.as_mut().expect("a transaction is open");
        let begin = open.begin;
        open.bytes = 0;
        growing.weighs(std::mem::take(&mut open.weight));
        for queued in std::mem::take(&mut open.changes) {
            match queued {
                Queued::Truncate(table) => {
                    self.record.touch_table(table);
                    growing.truncate(table, begin);
                }
                Queued::Row(mapping, change) => {
                    let table = mapping.table;
                    match growing.row(&mapping, &change, &begin, tables.name(table)) {
                        Ok(applied) => {
                            self.record.touch(table, applied.key);
                            applied.also.into_iter().for_each(|old| self.record.touch(table, old));
                        }
                        Err(poison) if poison.has_unknown_key() => tables.a_row_dies(table),
                        Err(_) => {}
                    }
                }
            }
        }
    }

    // ---- what loads need --------------------------------------------------------------------------------------------

    /// Changes what is recorded from now on.
    pub fn records(&mut self, recording: Recording) {
        self.record.set(recording);
    }

    pub fn judge<'a>(&'a self, table: TableId, snapshot: &'a Snapshot, base: EndLsn) -> Judged<'a> {
        self.record.judge(table, snapshot, base)
    }

    /// Drops records of transactions that every snapshot sees.
    pub fn prune(&mut self, newest: &Snapshot, floors: &[Snapshot]) {
        self.record.prune(newest, floors);
    }
}
