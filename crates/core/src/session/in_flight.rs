//! The batch in flight, from its start until Redis acknowledges it: finds the keys to clear, compares a part of a
//! chunk, inspects the bases of merges, then writes everything together with the checkpoint.

use super::dead::{Insertion, Letter};
use super::growing::Grown;
use super::inspect::{Bases, Differences, Inspection, Probe};
use super::judge_chunk::JudgedPart;
use super::load_messages::{LoadOrder, Verdict};
use super::members::{Asked, Inspected, Outcomes, Then};
use super::operate::Removal;
use super::outbox::HEARTBEAT;
use super::sweeping::Swept;
use super::table::Load;
use super::turn::Turn;
use super::{Applied, Effect, Machine, NAMED, load_messages::Purpose, weight_of_keys};
use crate::admin::{Answer, Repair, Tally};
use crate::command::{self, Announced, Base, Command, DeadKey, DeadLetter, Key, Unwritable};
use crate::format::Format;
use crate::plan::key_states::{Documents, KeyStates};
use crate::progress::visibility::Recording;
use crate::resp::batch::{Batch, EncodeError, Limits};
use crate::schema::TableId;
use crate::session::chunk_queue::weight_of_letter;
use bytes::Bytes;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};

/// The most bytes of documents that are patched for one batch. They are held in memory twice.
const DOCUMENTS_BYTES: usize = 64 << 20;

/// A batch that Redis has not acknowledged.
pub(super) struct InFlight {
    grown: Grown,
    part: Option<JudgedPart>,
    pub step: Step,
    /// Truncated tables whose keys are still to be found.
    clear: VecDeque<TableId>,
    /// The keys to remove. A set, because SCAN may return a key twice.
    cleared: BTreeSet<Key>,
    /// Loads that may end with this batch, and those that do.
    finished: Vec<TableId>,
    loaded: Vec<(TableId, Load)>,
    /// An operator's removal. The batch then contains nothing else.
    removal: Option<Removal>,
    pub inspected: Inspected,
    /// What a step of a comparison of members has still to write.
    pub mending: VecDeque<Command>,
}

pub(super) enum Step {
    Comparing,
    Scanning(TableId),
    /// Writing a heartbeat, perhaps with the removal of some of the keys found so far.
    Clearing(AfterClearing),
    Probing(Inspection),
    /// Reading rows and lists, for the members of lookups.
    Inspecting(Asked, Then),
    /// A step of a comparison of members with the rows of this table. The batch contains nothing else.
    Sweeping(TableId),
    Executing,
}

/// What to do once the keys found so far fit into the batch.
#[derive(Clone, Copy)]
pub(super) enum AfterClearing {
    /// Continue the scan from this cursor.
    Scan(TableId, u64),
    /// Continue with the next table, or with the batch.
    Continue,
    /// Write the batch; its keys have been probed.
    Execute,
}

impl InFlight {
    fn new(grown: Grown) -> Self {
        let (clear, cleared, finished, loaded) = (VecDeque::new(), BTreeSet::new(), Vec::new(), Vec::new());
        let inspected = Inspected::default();
        InFlight {
            grown,
            part: None,
            step: Step::Executing,
            clear,
            cleared,
            finished,
            loaded,
            removal: None,
            inspected,
            mending: VecDeque::new(),
        }
    }

    /// A step of a comparison of members. `nothing` is written with it.
    pub fn sweeping(nothing: Grown, table: TableId) -> Self {
        InFlight { step: Step::Sweeping(table), ..InFlight::new(nothing) }
    }

    pub fn changes(&self) -> &KeyStates {
        &self.grown.changes.batch
    }

    pub fn part(&self) -> Option<&JudgedPart> {
        self.part.as_ref()
    }

    /// Keys that are removed whatever they hold.
    pub fn removed(&self) -> impl Iterator<Item = &Key> {
        self.cleared.iter().chain(&self.grown.chores.orphans)
    }

    pub fn oldest_commit(&self) -> Option<crate::change::CommitTime> {
        self.grown.applied.commits.first().copied()
    }

    /// What the batch must know about keys.
    fn inspection(&self, limits: &Limits) -> Inspection {
        let (mut types, mut documents) = (Vec::new(), Vec::new());
        for (key, format) in self.grown.changes.batch.bases() {
            match format {
                Format::Hash | Format::RedisJson => types.push(key.clone()),
                Format::Json => documents.push(key.clone()),
            }
        }
        types.extend(self.removal.iter().flat_map(|removal| removal.keys.iter().flatten().cloned()));
        types.extend(self.part.iter().flat_map(|part| part.must_exist.iter().cloned()));
        Inspection { types, documents, most_bytes: self.documents_bytes(limits) }
    }

    /// How much documents may weigh whose changes do not say how long they are.
    fn documents_bytes(&self, limits: &Limits) -> usize {
        limits.stream_bytes().saturating_sub(self.grown.changes.weight).min(DOCUMENTS_BYTES)
    }

    /// Takes as many keys as one batch may remove.
    fn some_to_clear(&mut self, limit: usize) -> Vec<Key> {
        let (mut keys, mut weight) = (Vec::new(), 0);
        while let Some(key) = self.cleared.pop_first() {
            weight += command::weight_of_key(&key);
            keys.push(key);
            if weight + command::weight_of_key(&keys[0]) > limit {
                break;
            }
        }
        keys
    }
}

/// Keys that this batch settles or leaves to be read again.
#[derive(Default)]
struct Keys {
    /// Keys of the stream that are correct after this batch.
    settled: Vec<(TableId, Key)>,
    /// Keys of the stream that must be read again.
    pending: Vec<(TableId, Key)>,
    /// Keys of the chunk that are correct after this batch.
    resolved: HashSet<Key>,
    /// Keys of the chunk that were left to the stream and do not exist.
    missing: Vec<Key>,
    /// Of tables with lookups.
    outcomes: Outcomes,
}

impl Machine {
    pub(super) fn batch_in_flight(&mut self) -> &mut InFlight {
        self.in_flight.as_mut().expect("a batch is in flight")
    }

    // ---- start ------------------------------------------------------------------------------------------------------

    pub(super) fn start_batch(&mut self, turn: &mut Turn) {
        if self.outbox.has_caught_up()
            && let Some(removal) = self.desk.next_removal()
        {
            let clear = removal.keys.is_none().then_some(removal.table).into_iter().collect();
            self.in_flight = Some(InFlight { clear, removal: Some(removal), ..InFlight::new(Grown::nothing()) });
            return self.continue_batch(turn);
        }
        let finished = self.tables.ids(|table| table.is_whole());
        // While a transaction is split, a row of a chunk could show more of it than the stream has delivered.
        let split = self.is_split();
        let moved = self.growing.through().is_some_and(|through| through > self.outbox.checkpoint().lsn);
        let is_open = moved || self.outbox.checkpoint().lists_in_doubt;
        let is_urgent = moved && self.feedback.position_is_wanted() || self.draining && is_open;
        let part_waits = !split && self.chunks.has_ready(self.outbox.done());
        let is_due = self.outbox.heartbeat_is_due(turn.now);
        let has_news = || self.tables.say_otherwise(self.outbox.checkpoint());
        let is_needed =
            self.growing.has_work() || part_waits || !finished.is_empty() || is_urgent || is_due || has_news();
        let is_turn_of_sweep = !is_needed || !self.has_swept;
        let swept = if is_turn_of_sweep { self.sweep(turn) } else { Swept::Nothing };
        self.has_swept = swept == Swept::Began;
        match swept {
            Swept::Began => return,
            // A load may have ended with it.
            Swept::Ended => return self.start_batch(turn),
            Swept::Nothing if !is_needed => return,
            Swept::Nothing => {}
        }
        if self.part_goes_alone() {
            let grown = Grown::nothing();
            let part = self.take_part(&grown.changes.batch, turn);
            self.in_flight = Some(InFlight { part, ..InFlight::new(grown) });
            return self.continue_batch(turn);
        }
        let grown = self.growing.take(self.outbox.limits());
        self.outbox.batch_leaves();
        let part = if split { None } else { self.part_beside(&grown, turn) };
        let clear = grown.changes.batch.truncated().collect();
        self.in_flight = Some(InFlight { part, clear, finished, ..InFlight::new(grown) });
        self.continue_batch(turn);
    }

    /// Returns the next part of a chunk that can be written together with this batch.
    fn part_beside(&mut self, grown: &Grown, turn: &mut Turn) -> Option<JudgedPart> {
        while self.chunks.has_ready(self.outbox.done()) && !self.puts_off_part(grown.changes.weight) {
            if let Some(taken) = self.take_part(&grown.changes.batch, turn) {
                return Some(taken);
            }
        }
        None
    }

    /// Postpones the next part of a chunk if it is one large row, or if the batch contains a large change.
    fn puts_off_part(&mut self, weight: usize) -> bool {
        let limits = self.outbox.limits();
        let is_small = || self.chunks.next_weight().is_none_or(|part| part <= limits.rows_bytes());
        if weight <= limits.stream_bytes() && (weight == 0 || is_small()) {
            return false;
        }
        // Everything delivered before its watermark is in this batch or already in Redis.
        self.chunks.put_off(self.outbox.left());
        true
    }

    /// Whether a postponed part can be written alone, because Redis has everything that its snapshot saw.
    fn part_goes_alone(&self) -> bool {
        let is_between = self.outbox.checkpoint().within.is_none();
        is_between && self.chunks.has_ready(self.outbox.done()) && self.chunks.goes_alone()
    }

    /// Takes the next step: find keys to clear, compare, look at the bases of merges, write.
    fn continue_batch(&mut self, turn: &mut Turn) {
        let in_flight = self.in_flight.as_mut().expect("a batch is in flight");
        if let Some(table) = in_flight.clear.front().copied() {
            return self.scan(table, 0, turn);
        }
        if !matches!(in_flight.step, Step::Comparing)
            && let Some(part) = &in_flight.part
            && let Some(comparison) = part.comparison(self.tables.get(part.table).spec.format)
        {
            in_flight.step = Step::Comparing;
            return turn.does(Effect::Compare(comparison));
        }
        let inspection = in_flight.inspection(self.outbox.limits());
        if inspection.is_empty() {
            return self.execute(Bases::default(), turn);
        }
        in_flight.step = Step::Probing(inspection.clone());
        turn.does(Effect::Probe(inspection));
    }

    // ---- answers ----------------------------------------------------------------------------------------------------

    /// Takes Redis's differences from a part of a chunk.
    pub(super) fn compared(&mut self, differences: &Differences, turn: &mut Turn) {
        let in_flight = self.batch_in_flight();
        assert!(matches!(in_flight.step, Step::Comparing), "nothing was compared");
        let part = in_flight.part.as_mut().expect("a part is being compared");
        part.compared(differences);
        let table = part.table;
        let mut keys: Vec<_> = part.differing(differences).map(|(kind, key)| (kind, key.clone())).collect();
        // The differences are in no order, and the same run must always do the same.
        keys.sort_unstable_by(|(_, a), (_, b)| a.cmp(b));
        let known = self.tables.get(table).load().map_or(0, |load| load.tally.drift());
        keys.truncate(NAMED.saturating_sub(usize::try_from(known).unwrap_or(usize::MAX)));
        if !keys.is_empty() {
            turn.does(Effect::Differs { table, keys });
        }
        self.continue_batch(turn);
    }

    /// Redis refuses to return values to compare. The batch is written without that part of a chunk.
    pub(super) fn part_not_compared(&mut self, why: &str, turn: &mut Turn) {
        let in_flight = self.batch_in_flight();
        assert!(matches!(in_flight.step, Step::Comparing), "nothing was compared");
        let taken = in_flight.part.take().expect("a part is being compared");
        self.part_is_judged(&taken, Verdict::GivenUp, turn);
        if let Some(load) = taken.of {
            self.not_compared(taken.table, load, why, turn);
        }
        self.continue_batch(turn);
    }

    pub(super) fn probed(&mut self, found: Vec<Probe>, turn: &mut Turn) {
        let in_flight = self.in_flight.as_mut().expect("a batch is in flight");
        let Step::Probing(inspection) = &mut in_flight.step else { panic!("no keys were probed") };
        let inspection = std::mem::take(inspection);
        assert_eq!(inspection.keys().count(), found.len(), "an answer for each key");
        if let Some(removal) = &mut in_flight.removal {
            let probed = inspection.types.into_iter().zip(found);
            in_flight.cleared = probed.filter(|(_, probe)| *probe != Probe::Absent).map(|(key, _)| key).collect();
            removal.deleted = in_flight.cleared.len() as u64;
            let table = removal.table;
            if removal.deleted > 0 {
                self.tables.get_mut(table).keys_are_removed();
            }
            return self.clear(AfterClearing::Execute, turn);
        }
        let of_part = in_flight.part.as_ref().map(|part| self.tables.get(part.table).spec.format);
        let mut found = found.into_iter();
        let mut bases = Bases::default();
        let of_bases = in_flight.grown.changes.batch.bases().map(|(_, format)| format);
        let of_bases: Vec<Format> = of_bases.filter(|format| *format != Format::Json).collect();
        let mut of_bases = of_bases.into_iter();
        for (key, probe) in inspection.types.into_iter().zip(&mut found) {
            let format = of_bases.next().or(of_part).expect("the key must exist for a part");
            if probe.is_row(format) {
                bases.rows.insert(key);
            }
        }
        for (key, probe) in inspection.documents.into_iter().zip(found) {
            if let Probe::Document(document) = probe {
                bases.rows.insert(key.clone());
                bases.documents.insert(key, document);
            }
        }
        self.execute(bases, turn);
    }

    // ---- keys to clear ----------------------------------------------------------------------------------------------

    /// Asks for the table's keys.
    fn scan(&mut self, table: TableId, cursor: u64, turn: &mut Turn) {
        self.batch_in_flight().step = Step::Scanning(table);
        let prefix = Bytes::from(self.tables.get(table).spec.key.literal.clone());
        turn.does(Effect::Scan { prefix, cursor, limit: self.clear_keys, within: HEARTBEAT });
    }

    pub(super) fn scanned(&mut self, keys: Vec<Key>, next: u64, turn: &mut Turn) {
        let (clear_keys, stream_bytes) = (self.clear_keys, self.outbox.limits().stream_bytes());
        let in_flight = self.in_flight.as_mut().expect("a batch is in flight");
        let table = match in_flight.step {
            Step::Scanning(table) => table,
            Step::Sweeping(table) => return self.scanned_for_sweep(table, keys, next, turn),
            _ => panic!("no table was scanned"),
        };
        let before = in_flight.cleared.len();
        in_flight.cleared.extend(keys);
        let found = (in_flight.cleared.len() - before) as u64;
        if let Some(removal) = in_flight.removal.as_mut().filter(|_| found > 0) {
            removal.deleted += found;
            self.tables.get_mut(table).keys_are_removed();
        }
        if next == 0 {
            in_flight.clear.pop_front();
            return self.clear(AfterClearing::Continue, turn);
        }
        let is_much = in_flight.cleared.len() >= clear_keys;
        let limit = stream_bytes / self.tables.weight_of_removal();
        let keys = if is_much { in_flight.some_to_clear(limit) } else { Vec::new() };
        self.inspect(Then::Clear(keys, AfterClearing::Scan(table, next)), turn);
    }

    /// Removes keys in batches of their own until the rest fits into the batch in flight.
    fn clear(&mut self, then: AfterClearing, turn: &mut Turn) {
        let (limits, times) = (*self.outbox.limits(), self.tables.weight_of_removal());
        let in_flight = self.batch_in_flight();
        let room = limits.stream_bytes().saturating_sub(in_flight.grown.changes.weight) + limits.cleared_bytes();
        if weight_of_keys(&in_flight.cleared) > room / times {
            let keys = in_flight.some_to_clear(limits.stream_bytes() / times);
            return self.inspect(Then::Clear(keys, then), turn);
        }
        match then {
            AfterClearing::Scan(table, cursor) => self.scan(table, cursor, turn),
            AfterClearing::Continue => self.continue_batch(turn),
            AfterClearing::Execute => self.execute(Bases::default(), turn),
        }
    }

    /// Removes these keys without advancing the position. After a crash the TRUNCATE is delivered again; otherwise,
    /// Postgres was rewound.
    pub(super) fn write_clearing(&mut self, keys: Vec<Key>, then: AfterClearing, turn: &mut Turn) {
        let in_flight = self.batch_in_flight();
        in_flight.step = Step::Clearing(then);
        let inspected = std::mem::take(&mut in_flight.inspected);
        let (mut batch, mut outcomes) = (self.outbox.new_batch(), Outcomes::default());
        if !keys.is_empty() {
            let truncated_by = self.batch_in_flight().grown.changes.truncated_by;
            self.outbox.clears_for(truncated_by);
        }
        for key in keys {
            outcomes.removed(&key, &self.tables);
            turn.puts(&mut batch, &Command::Delete { key });
        }
        let place = self.outbox.checkpoint().place();
        self.write_members(outcomes, &inspected, place, &mut batch, turn);
        let checkpoint = self.outbox.seal(&mut batch, &mut self.tables, self.feedback.confirmed(), turn);
        turn.does(Effect::Execute { batch, checkpoint, changes: 0 });
    }

    // ---- the write --------------------------------------------------------------------------------------------------

    /// Writes the batch, once its rows are inspected. `bases`: what the probed keys hold.
    fn execute(&mut self, bases: Bases, turn: &mut Turn) {
        self.inspect(Then::Write(bases), turn);
    }

    pub(super) fn write(&mut self, bases: &Bases, turn: &mut Turn) {
        let mut in_flight = self.in_flight.take().expect("a batch is in flight");
        let (mut out, mut keys) = (self.outbox.new_batch(), Keys::default());
        self.write_changes(&mut in_flight, bases, &mut keys, &mut out, turn);
        self.write_renewals(&in_flight, &mut out, turn);
        if let Some(part) = &mut in_flight.part {
            let inspected = &in_flight.inspected;
            self.write_part(part, (&bases.rows, inspected), &mut in_flight.grown.applied, &mut keys, &mut out, turn);
        }
        let (outcomes, place) = (std::mem::take(&mut keys.outcomes), self.outbox.place_after(&in_flight.grown));
        self.write_members(outcomes, &in_flight.inspected, place, &mut out, turn);
        self.settle_keys(in_flight.part.as_mut(), keys, turn);
        self.finish_loads(&mut in_flight, &mut out, turn);
        self.announce_loaded(&mut out, turn);
        self.tables.settle();
        if let Some(page) = in_flight.grown.chores.renewal.as_ref().filter(|page| page.ends_round) {
            let redis_now_ms = self.outbox.redis_now_ms(turn.now);
            self.tables.get_mut(page.table).renewal_ends(redis_now_ms);
        }
        if !self.tables.any(|table| table.load().is_some() || table.has_pending()) {
            self.intake.records(Recording::Tables);
        }
        self.outbox.advance(&in_flight.grown);
        if self.outbox.has_caught_up() {
            self.tables.take_living().iter().for_each(|key| self.lives(key, &mut out, turn));
            self.read_dead_again(turn);
        }
        let checkpoint = self.outbox.seal(&mut out, &mut self.tables, self.feedback.confirmed(), turn);
        in_flight.step = Step::Executing;
        let changes = in_flight.grown.changes.count;
        self.in_flight = Some(in_flight);
        turn.does(Effect::Execute { batch: out, checkpoint, changes });
    }

    /// Writes the stream's changes, after removing everything that has to be gone before them.
    fn write_changes(
        &mut self,
        in_flight: &mut InFlight,
        bases: &Bases,
        keys: &mut Keys,
        out: &mut Batch,
        turn: &mut Turn,
    ) {
        let documents_bytes = in_flight.documents_bytes(self.outbox.limits());
        let Grown { changes, chores, applied, .. } = &mut in_flight.grown;
        let mut batch = std::mem::take(&mut changes.batch);
        let order = batch.take_order();
        let mut forgotten = std::mem::take(&mut chores.forgotten);
        for table in batch.truncated() {
            self.tables.get_mut(table).was_truncated();
            match self.outbox.has_caught_up() {
                true => forgotten.extend(self.tables.clear_dead(table)),
                false => self.tables.clear_dead_for_now(table),
            }
        }
        self.forget(&forgotten, out, turn);
        let orphans = std::mem::take(&mut chores.orphans);
        for key in std::mem::take(&mut in_flight.cleared).into_iter().chain(orphans) {
            keys.outcomes.removed(&key, &self.tables);
            turn.puts(out, &Command::Delete { key });
        }
        if self.tables.any(|table| table.has_pending()) {
            keys.settled = batch.settled().collect();
        }
        let (tables, shapes) = (&self.tables, self.intake.shapes());
        let is_mergeable = |table: TableId| tables.get(table).is_mergeable(shapes.fingerprint(table));
        // A merge needs a correct row.
        let is_wrong = |key: &Key| tables.is_lost(key) || tables.any(|table| table.is_pending(key));
        let is_row = |key: &Key| bases.rows.contains(key) && !is_wrong(key);
        let documents = Documents { bases: &bases.documents, room_bytes: documents_bytes };
        let mut finished = batch.finish(is_mergeable, is_row, self.outbox.is_one_transaction(), documents);
        let kept = kept(&finished.commands);
        let (mut became, of_stream) = (HashMap::new(), finished.pending.len());
        for command in &finished.commands {
            if order.is_some() {
                became.extend(announced(command));
            }
            match out.push(command) {
                Ok(()) => {
                    keys.outcomes.wrote(command, &kept, &in_flight.inspected, &self.tables);
                    if let Command::Put { key, .. }
                    | Command::PutDocument { key, .. }
                    | Command::Merge { key, .. }
                    | Command::Delete { key } = command
                    {
                        self.lives(key, out, turn);
                    }
                }
                Err(too_large) if matches!(command, Command::DeadLetter(_)) => {
                    put_letter_without_row(&too_large, command, out, turn);
                }
                Err(too_large @ EncodeError::Batch { .. }) => turn.does(Effect::TooLarge(too_large)),
                // The type may have changed since it was looked up.
                Err(EncodeError::Unrepresentable { key }) => {
                    let table = self.tables.owner_of(&key).expect("a row belongs to a table");
                    self.drops_copy(command, out, turn);
                    became.remove(&key);
                    finished.pending.push((table, key));
                }
                Err(
                    too_large @ (EncodeError::NotHeld { .. }
                    | EncodeError::Document { .. }
                    | EncodeError::Value { .. }
                    | EncodeError::Row { .. }),
                ) => {
                    let xid = changes.last.map_or(0, |last| last.xid);
                    let (table, row) =
                        self.refused(command, &too_large, |key| changes.large.remove(key), xid, out, turn);
                    became.get_mut(&row.key).into_iter().for_each(|op| *op = Announced::Delete);
                    keys.outcomes.gone(table, &row.key, &self.tables);
                    self.dies(table, row, Letter::Always, applied, out, turn);
                }
            }
        }
        if finished.pending.len() > of_stream {
            let unwritten: HashSet<&Key> = finished.pending[of_stream..].iter().map(|(_, key)| key).collect();
            keys.settled.retain(|(_, key)| !unwritten.contains(key));
        }
        if let Some(order) = order {
            self.announce_changes(order, &became, out, turn);
        }
        keys.pending = finished.pending;
    }

    /// Returns the dead letter for a row of the stream that Redis cannot hold.
    fn refused(
        &self,
        command: &Command,
        why: &EncodeError,
        letter_of: impl FnOnce(&Key) -> Option<DeadLetter>,
        xid: u32,
        out: &mut Batch,
        turn: &mut Turn,
    ) -> (TableId, Unwritable) {
        let (Command::Put { key, .. } | Command::PutDocument { key, .. } | Command::Merge { key, .. }) = command else {
            panic!("only a row can be too large on its own");
        };
        let table = self.tables.owner_of(key).expect("a row belongs to a table");
        self.drops_copy(command, out, turn);
        let letter = letter_of(key).unwrap_or_else(|| DeadLetter {
            table: self.tables.name(table).to_owned(),
            key: key.0.clone(),
            lsn: self.intake.received().to_string(),
            xid,
            reason: String::new(),
            row: Bytes::new(),
        });
        let letter = DeadLetter { reason: why.to_string(), ..letter };
        (table, Unwritable { key: key.clone(), code: why.code(), letter })
    }

    /// A merge that is not written consumes no copy, so that is removed.
    fn drops_copy(&self, command: &Command, out: &mut Batch, turn: &mut Turn) {
        if let Command::Merge { base: Base::Kept(slot), .. } = command {
            turn.puts(out, &Command::Delete { key: self.outbox.own().kept(*slot) });
        }
    }

    fn write_renewals(&self, in_flight: &InFlight, out: &mut Batch, turn: &mut Turn) {
        let chores = &in_flight.grown.chores;
        let pages = chores.renewal.iter().map(|page| (page.table, &page.keys));
        for (table, keys) in pages.chain(chores.renewing.iter().map(|(table, keys)| (*table, keys))) {
            let ttl_ms = self.tables.get(table).spec.ttl_ms;
            keys.iter().for_each(|key| turn.puts(out, &Command::Renew { key: key.clone(), ttl_ms }));
        }
    }

    /// Writes the rows that a load, a comparison or a reread of keys has found.
    fn write_part(
        &mut self,
        part: &mut JudgedPart,
        (there, inspected): (&HashSet<Key>, &Inspected),
        applied: &mut Applied,
        keys: &mut Keys,
        out: &mut Batch,
        turn: &mut Turn,
    ) {
        if self.announces() {
            self.announce_part(part, out, turn);
        }
        for key in part.deletes.drain(..) {
            keys.outcomes.gone(part.table, &key, &self.tables);
            self.lives(&key, out, turn);
            turn.puts(out, &Command::Delete { key });
        }
        match part.members() {
            Some(members) => self.push_members(part.table, members, out, turn),
            None => keys.outcomes.loaded(part, &self.tables),
        }
        if let Some(rows) = part.rows.take() {
            if let Err(too_large) = out.push_rows(&rows, |key| part.writes(key)) {
                turn.does(Effect::TooLarge(too_large));
            }
            let written = rows.rows.iter().map(|(key, _)| key).filter(|key| part.writes(key));
            written.for_each(|key| self.lives(key, out, turn));
        }
        let letter = if part.compares.is_some() { Letter::IfNew } else { Letter::UnlessRecorded };
        for mut row in part.unwritable.drain(..) {
            row.letter.lsn = self.outbox.checkpoint().lsn.to_string();
            keys.outcomes.gone(part.table, &row.key, &self.tables);
            self.dies(part.table, row, letter, applied, out, turn);
        }
        keys.resolved.extend(part.resolved.drain(..));
        for key in part.must_exist.drain(..) {
            if there.contains(&key) {
                // The stream wrote the row, perhaps before a restart: its TTL must last as long as that of the rows
                // around it.
                keys.outcomes.stays(part.table, &key, inspected);
                let ttl_ms = self.tables.get(part.table).spec.ttl_ms;
                turn.puts(out, &Command::Renew { key, ttl_ms });
            } else {
                keys.missing.push(key);
            }
        }
        if self.announces() && !keys.missing.is_empty() {
            self.tables.get_mut(part.table).changes_beside();
        }
    }

    /// Removes the keys that are now correct from the pending keys, and adds those to be read again.
    fn settle_keys(&mut self, part: Option<&mut JudgedPart>, keys: Keys, turn: &mut Turn) {
        let Keys { settled, pending, resolved, missing, .. } = keys;
        for (table, key) in settled {
            self.tables.get_mut(table).is_settled(&key);
        }
        if let Some(part) = part {
            let table = self.tables.get_mut(part.table);
            resolved.iter().for_each(|key| table.is_settled(key));
            self.pend(part.table, missing, turn);
            let again: Vec<Key> = part.compares.iter_mut().flat_map(|compares| compares.again.drain(..)).collect();
            if let Some(load) = self.tables.get_mut(part.table).reads_again(part.of, again.len()) {
                self.reads_again(part.table, &again, Some(load));
            }
        }
        let mut by_table: BTreeMap<TableId, Vec<Key>> = BTreeMap::new();
        for (table, key) in pending.into_iter().filter(|(_, key)| !resolved.contains(key)) {
            by_table.entry(table).or_default().push(key);
        }
        for (table, keys) in by_table {
            self.pend(table, keys, turn);
        }
    }

    /// Ends the loads that this batch's checkpoint declares complete.
    fn finish_loads(&mut self, in_flight: &mut InFlight, out: &mut Batch, turn: &mut Turn) {
        let is_verification = self.desk.is_verifying();
        for id in std::mem::take(&mut in_flight.finished) {
            let Some(load) = self.tables.get_mut(id).finish(is_verification) else { continue };
            if load.purpose != Purpose::Compare(Repair::OnlyCount) && load.is_of_the_whole_table() {
                let gone = self.tables.end_dead(id, load.id);
                self.forget(&gone, out, turn);
            }
            if load.purpose == Purpose::Fill {
                self.tables.hash_slots().were_read(id, &load);
            }
            if !self.announces() {
                self.tables.get_mut(id).tells_of_changes_beside();
            }
            in_flight.loaded.push((id, load));
        }
    }

    // ---- dead letters -----------------------------------------------------------------------------------------------

    /// Removes the record of a dead letter: the row at `key` is written by this batch, or does not exist.
    fn lives(&mut self, key: &Key, out: &mut Batch, turn: &mut Turn) {
        if !self.outbox.has_caught_up() {
            return self.tables.lives_for_now(key);
        }
        if self.tables.lives(key) {
            turn.puts(out, &Command::Forget { key: key.clone() });
        }
    }

    /// Writes the record of a row that Redis cannot hold. No old version stays in its place.
    fn dies(
        &mut self,
        table: TableId,
        unwritable: Unwritable,
        letters: Letter,
        applied: &mut Applied,
        out: &mut Batch,
        turn: &mut Turn,
    ) {
        let Unwritable { key, code, letter } = unwritable;
        let dead = DeadKey { table: letter.table.clone(), reason: code.to_owned(), lsn: letter.lsn.clone() };
        turn.puts(out, &Command::Delete { key: key.clone() });
        let recorded = self.tables.dies(table, key.clone(), dead.clone());
        if recorded != Insertion::NotRecorded {
            turn.puts(out, &Command::Remember { key, dead });
        }
        if letters.is_written(recorded) {
            applied.dead_letters.push((table, code));
            // The rest of the batch needs space, too.
            let is_large = out.weight() + weight_of_letter(&letter) > self.outbox.limits().batch_bytes / 2;
            let row = if is_large { Bytes::new() } else { letter.row.clone() };
            let letter = Command::DeadLetter(DeadLetter { row, ..letter });
            if let Err(too_large) = out.push(&letter) {
                put_letter_without_row(&too_large, &letter, out, turn);
            }
        }
    }

    /// Removes records of dead letters, except those that were recorded again since.
    fn forget(&self, keys: &[Key], out: &mut Batch, turn: &mut Turn) {
        for key in keys.iter().filter(|key| !self.tables.is_dead(key)) {
            turn.puts(out, &Command::Forget { key: key.clone() });
        }
    }

    // ---- acknowledged -----------------------------------------------------------------------------------------------

    pub(super) fn executed(&mut self, redis_time_ms: u64, turn: &mut Turn) {
        if let Some(InFlight { step: Step::Sweeping(_), .. }) = self.in_flight {
            self.outbox.executed_beside(redis_time_ms, turn.now);
            return self.mended(turn);
        }
        self.outbox.executed(redis_time_ms, turn.now);
        if let Some(InFlight { step: Step::Clearing(then), .. }) = self.in_flight {
            return self.clear(then, turn);
        }
        let in_flight = self.in_flight.take().expect("a batch is in flight");
        assert!(matches!(in_flight.step, Step::Executing), "nothing was executed");
        self.outbox.all_done();
        let Grown { chores, mut applied, .. } = in_flight.grown;
        if let Some(part) = in_flight.part {
            self.part_is_written(part, &mut applied, turn);
        }
        if let Some(page) = chores.renewal {
            applied.renewed += page.keys.len() as u64;
            turn.does(Effect::Renewed(page.table));
        }
        applied.renewed += chores.renewing.map_or(0, |(_, keys)| keys.len() as u64);
        for (table, load) in in_flight.loaded {
            match load.purpose {
                Purpose::Fill => {
                    let is_whole = load.is_of_the_whole_table();
                    let (rows, started, because) = (load.tally.rows, load.started, load.because);
                    turn.does(Effect::TableLoaded { table, rows, is_whole, started, because });
                }
                Purpose::Compare(_) => self.table_compared(table, &load, turn),
            }
        }
        if let Some(removal) = in_flight.removal {
            turn.answers(removal.ask, Ok(Answer::Deleted(removal.deleted)));
        }
        self.feedback.acknowledged(self.outbox.acknowledged().lsn, self.intake.received());
        turn.does(Effect::Applied(Box::new(applied)));
        self.look_for_expired(redis_time_ms, turn);
        let settled = self.tables.hash_slots().take_settled();
        if !settled.is_empty() {
            turn.does(Effect::Settled(settled));
        }
        self.read_hash_slots(turn);
    }

    fn part_is_written(&mut self, part: JudgedPart, applied: &mut Applied, turn: &mut Turn) {
        if part.compares.is_none() || !self.desk.is_verifying() {
            applied.count(part.table).loaded += part.row_count;
        }
        let rows = if part.of_load { part.row_count } else { 0 };
        let found = part.compares.as_ref().map_or(Tally::default(), |compares| compares.found);
        self.tables.get_mut(part.table).wrote(part.of, rows, &found);
        self.part_is_judged(&part, Verdict::Written, turn);
    }

    /// Tells the loader what became of a chunk, once its last part is done.
    fn part_is_judged(&mut self, part: &JudgedPart, verdict: Verdict, turn: &mut Turn) {
        if !part.last_part {
            return;
        }
        if !part.of_load {
            self.key_reads.settle();
        }
        turn.orders(LoadOrder::Verdict(part.chunk, verdict));
    }
}

/// What a command makes of the key of a row.
fn announced(command: &Command) -> Option<(Key, Announced)> {
    match command {
        Command::Put { key, .. } | Command::PutDocument { key, .. } | Command::Merge { key, .. } => {
            Some((key.clone(), Announced::Upsert))
        }
        Command::Delete { key } => Some((key.clone(), Announced::Delete)),
        _ => None,
    }
}

/// Returns the keys of the hashes that the commands copy, by the number of the copy.
fn kept(commands: &[Command]) -> Vec<Key> {
    let kept = commands.iter().map_while(|command| match command {
        Command::Keep { key, .. } => Some(key.clone()),
        _ => None,
    });
    kept.collect()
}

/// Writes a dead letter without its row: the key and the reason matter more, and Postgres has the row.
fn put_letter_without_row(why: &EncodeError, letter: &Command, out: &mut Batch, turn: &mut Turn) {
    match letter {
        Command::DeadLetter(letter) if !letter.row.is_empty() => {
            turn.puts(out, &Command::DeadLetter(DeadLetter { row: Bytes::new(), ..letter.clone() }));
        }
        _ => turn.does(Effect::TooLarge(why.clone())),
    }
}
