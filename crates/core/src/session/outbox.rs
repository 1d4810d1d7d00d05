//! The checkpoint as last sent and as last acknowledged, and Redis's clock.

use super::growing::Grown;
use super::tables::Tables;
use super::turn::Turn;
use crate::change::Begin;
use crate::checkpoint::{Checkpoint, Place, Within};
use crate::command::{Command, Key};
use crate::lanes::Lane;
use crate::lanes::book::Places;
use crate::lsn::EndLsn;
use crate::progress::ledger::ConfirmedLsn;
use crate::progress::redelivery::Ahead;
use crate::resp::batch::{Batch, Limits, OwnKeys};
use crate::rules::{Rule, holds};
use std::time::{Duration, Instant};

/// How often the checkpoint is written when no batch writes it.
pub const HEARTBEAT: Duration = Duration::from_secs(1);

/// A growing batch stops taking changes at this number: large enough to use Redis efficiently, small enough that a
/// commit does not wait behind a backlog.
const BATCH_CHANGES: u64 = 4_000;
/// The same over hash slots, each of which costs a call, whether it gets one change or several.
const BATCH_CHANGES_OF_SLOTS: u64 = 12_000;

/// How the keys lie in Redis.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Spread {
    /// Together: a batch is one transaction.
    OneSlot,
    /// Over hash slots: a batch is one call for each. A session that ended in between left some of them ahead of the
    /// checkpoint, at most at this place. A batch from before a slot's place is not written to it.
    /// `last` is the last transaction of which any slot has something.
    Slots { ahead: Option<Place>, last: Option<Ahead> },
}

impl Spread {
    /// Returns how far any slot is, and the last transaction of which one has something.
    pub(super) fn ahead(&self) -> (Option<Place>, Option<Ahead>) {
        match self {
            Spread::OneSlot => (None, None),
            Spread::Slots { ahead, last } => (*ahead, *last),
        }
    }
}

pub(super) struct Outbox {
    own: OwnKeys,
    limits: Limits,
    spread: Spread,
    /// Where hash slots were when the session began. One that is ahead of a batch is not written.
    places: Places,
    /// As last sent. While a batch is in flight, Redis may still have the previous one. Its tables are the entries that
    /// were sent, or that Redis had already.
    checkpoint: Checkpoint,
    acknowledged: Acknowledged,
    last_executed: Instant,
    redis_clock: (u64, Instant),
    /// When the first part of a split transaction was sent, by Redis TIME, until its last part is.
    split_since_ms: Option<u64>,
    /// How many batches with changes were sent, and how many of them were acknowledged.
    left: u64,
    done: u64,
}

/// What Redis has acknowledged.
#[derive(Clone, Copy)]
pub(super) struct Acknowledged {
    pub lsn: EndLsn,
    pub seq: u64,
}

impl Outbox {
    pub fn new(
        own: OwnKeys,
        limits: Limits,
        (spread, places): (Spread, Places),
        checkpoint: Checkpoint,
        redis_time_ms: u64,
        now: Instant,
    ) -> Self {
        Outbox {
            own,
            limits,
            spread,
            places,
            acknowledged: Acknowledged { lsn: checkpoint.lsn, seq: checkpoint.seq },
            checkpoint,
            last_executed: now,
            redis_clock: (redis_time_ms, now),
            split_since_ms: None,
            left: 0,
            done: 0,
        }
    }

    pub fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    pub fn acknowledged(&self) -> Acknowledged {
        self.acknowledged
    }

    pub fn own(&self) -> &OwnKeys {
        &self.own
    }

    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Whether a batch is written to every hash slot that it concerns. Before that, only the stream's changes may be in it:
    /// they are redelivered.
    pub fn has_caught_up(&self) -> bool {
        match self.spread {
            Spread::OneSlot => true,
            Spread::Slots { ahead, .. } => ahead <= Some(self.checkpoint.place()) || !holds(Rule::LoadWhenLanesAreEven),
        }
    }

    /// Returns the position of the checkpoint after this batch, and how much of the next transaction Redis then has.
    fn after(&self, grown: &Grown) -> (EndLsn, Option<Within>) {
        let lsn = grown.through.map_or(self.checkpoint.lsn, |through| through.max(self.checkpoint.lsn));
        (lsn, grown.changes.within.unwrap_or(self.checkpoint.within))
    }

    /// Returns where the checkpoint is after this batch.
    pub fn place_after(&self, grown: &Grown) -> Place {
        let (lsn, within) = self.after(grown);
        Place::of(lsn, within)
    }

    /// Whether the row at this key is as a later batch of an earlier session has left it, and its lists with it: it lies in a
    /// hash slot that is ahead of a batch that ends at `place`.
    pub fn is_ahead(&self, row: &Key, place: Place) -> bool {
        if self.places.is_empty() || !holds(Rule::LeaveListsOfLanesAhead) {
            return false;
        }
        let at = self.places.get(&Lane::of(row.as_bytes()));
        at.is_some_and(|at| at.has_batch(Some(self.checkpoint.place()), place))
    }

    /// Whether a batch is one transaction, so that it can also copy a row to another key.
    pub fn is_one_transaction(&self) -> bool {
        self.spread == Spread::OneSlot
    }

    /// How many changes of the stream a batch takes while another one is in flight.
    pub fn most_changes(&self) -> u64 {
        match self.spread {
            Spread::OneSlot => BATCH_CHANGES,
            Spread::Slots { .. } => BATCH_CHANGES_OF_SLOTS,
        }
    }

    /// Takes effect with the next batch.
    pub fn plans_for(&mut self, limits: Limits) {
        self.limits.planned_bytes = limits.planned_bytes;
    }

    pub fn new_batch(&self) -> Batch {
        Batch::new(self.own.clone(), self.limits)
    }

    // ---- Redis's clock ----------------------------------------------------------------------------------------------

    pub fn redis_now_ms(&self, now: Instant) -> u64 {
        let (at, then) = self.redis_clock;
        at + u64::try_from(now.saturating_duration_since(then).as_millis()).unwrap_or(u64::MAX / 2)
    }

    /// From when on rows have a full TTL that a load which begins now may leave to the stream. Its snapshots may not see
    /// the transaction that is being applied in parts, some of which may be in Redis already.
    pub fn load_starts_ms(&self, now: Instant) -> u64 {
        self.split_since_ms.unwrap_or(u64::MAX).min(self.redis_now_ms(now))
    }

    /// A lower bound of what Redis's clock showed at `when`.
    pub fn redis_time_ms(&self, when: Instant) -> u64 {
        let (at, then) = self.redis_clock;
        let before = then.saturating_duration_since(when).as_millis();
        match u64::try_from(before) {
            Ok(0) => self.redis_now_ms(when),
            Ok(before) => at.saturating_sub(before + 1),
            Err(_) => 0,
        }
    }

    pub fn heartbeat_is_due(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.last_executed) >= HEARTBEAT
    }

    // ---- batches ----------------------------------------------------------------------------------------------------

    pub fn batch_leaves(&mut self) {
        self.left += 1;
    }

    pub fn left(&self) -> u64 {
        self.left
    }

    pub fn done(&self) -> u64 {
        self.done
    }

    /// Advances the next checkpoint by what this batch contains.
    pub fn advance(&mut self, grown: &Grown) {
        let after = self.after(grown);
        let checkpoint = &mut self.checkpoint;
        checkpoint.retired.retain(|template| !grown.chores.retired.contains(template));
        (checkpoint.lsn, checkpoint.within) = after;
        if let Some(last) = grown.changes.last {
            checkpoint.last = Some(last);
        }
        checkpoint.clearing.take_if(|begin| begin.commit.0 < checkpoint.lsn.0);
    }

    /// The next batch removes keys ahead of the position, because of a TRUNCATE of this transaction or an earlier one. A
    /// previous session may have done so for a later one.
    pub fn clears_for(&mut self, truncated_by: Option<Begin>) {
        let known = self.checkpoint.clearing;
        self.checkpoint.clearing = known.into_iter().chain(truncated_by).max_by_key(|begin| begin.commit);
    }

    pub fn counts_evicted(&mut self, keys: u64) {
        self.checkpoint.evicted = keys;
    }

    /// Returns the checkpoint that goes with `out`, and adds the entries of the tables that changed.
    pub fn seal(
        &mut self,
        out: &mut Batch,
        tables: &mut Tables,
        confirmed: Option<ConfirmedLsn>,
        turn: &mut Turn,
    ) -> Vec<u8> {
        self.checkpoint.seq += 1;
        if let Spread::Slots { .. } = self.spread {
            self.checkpoint.floor = self.checkpoint.floor.max(confirmed.map(ConfirmedLsn::end));
            // It costs a call to say so, so it is taken back when nothing is written.
            self.checkpoint.lists_in_doubt = out.changes_lists() || self.checkpoint.lists_in_doubt && !out.is_empty();
        }
        let now_ms = self.redis_now_ms(turn.now);
        self.checkpoint.beat_ms = now_ms;
        self.checkpoint.healing = tables.hash_slots().healing();
        self.split_since_ms = self.checkpoint.within.map(|_| self.split_since_ms.unwrap_or(now_ms));
        for (name, mark) in tables.take_marks() {
            if self.checkpoint.tables.get(name) != Some(&mark) {
                turn.puts(out, &Command::Enter { table: name.to_owned(), entry: mark.to_json() });
                self.checkpoint.tables.insert(name.to_owned(), mark);
            }
        }
        self.checkpoint.to_json()
    }

    pub fn executed(&mut self, redis_time_ms: u64, now: Instant) {
        self.last_executed = now;
        self.executed_beside(redis_time_ms, now);
    }

    /// The same for a batch that does not say how far the stream has come: a heartbeat stays due.
    pub fn executed_beside(&mut self, redis_time_ms: u64, now: Instant) {
        self.redis_clock = (redis_time_ms, now);
        self.acknowledged = Acknowledged { lsn: self.checkpoint.lsn, seq: self.checkpoint.seq };
    }

    /// Everything that was sent has been acknowledged.
    pub fn all_done(&mut self) {
        self.done = self.left;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::change::CommitTime;
    use crate::lsn::{CommitLsn, Lsn};
    use crate::session::dead::DeadKeys;

    #[test]
    fn a_truncate_that_an_earlier_session_began_stays_expected_behind_those_before_it() {
        let head = r#"{"system_id":"7","timeline":1,"database":"shop","lsn":"0/64","state":"ready","epoch":1,"seq":1,
                       "beat_ms":0,"base":"0/1","clearing":{"commit":"0/C8","xid":9,"time_us":1},"entries":0}"#;
        let found = Checkpoint::head(head.as_bytes()).expect("the settled format");
        let (begun, now) = (found.clearing, Instant::now());
        let mut outbox = Outbox::new(
            OwnKeys::under("prefetchd:{s}:"),
            Limits::default(),
            (Spread::OneSlot, Places::default()),
            found,
            0,
            now,
        );
        let begin =
            |at| Some(Begin { xid: 8, commit: CommitLsn(Lsn::new(at).expect("not zero")), time: CommitTime(1) });
        for (truncated_by, expected) in [(None, begun), (begin(150), begun), (begin(250), begin(250))] {
            outbox.clears_for(truncated_by);
            assert_eq!(outbox.checkpoint().clearing, expected, "{truncated_by:?}");
        }
        for (through, expected) in [(None, begin(250)), (begin(250), begin(250)), (begin(251), None)] {
            let through = through.map(|begin| EndLsn(begin.commit.0));
            outbox.advance(&Grown { through, ..Grown::nothing() });
            assert_eq!(outbox.checkpoint().clearing, expected, "{through:?}");
        }
    }

    #[test]
    fn a_load_counts_from_the_first_part_of_a_split_transaction() {
        let head = r#"{"system_id":"7","timeline":1,"database":"shop","lsn":"0/64","state":"ready","epoch":1,"seq":1,
                       "beat_ms":0,"base":"0/1","entries":0}"#;
        let found = Checkpoint::head(head.as_bytes()).expect("the settled format");
        let began = Instant::now();
        let mut tables = Tables::new(&[], &found, DeadKeys::new(0, 0, 0), began);
        let own = OwnKeys::under("prefetchd:{s}:");
        let mut outbox = Outbox::new(own, Limits::default(), (Spread::OneSlot, Places::default()), found, 1_000, began);
        let begin = Begin { xid: 8, commit: CommitLsn(Lsn::new(150).expect("not zero")), time: CommitTime(1) };
        let part = |changes_done| Some(Within { begin, changes_done });
        for (at, within, load_starts_ms) in
            [(1, None, 1_001), (2, part(1), 1_002), (3, part(2), 1_002), (4, None, 1_004), (5, part(1), 1_005)]
        {
            let now = began + Duration::from_millis(at);
            let mut grown = Grown::nothing();
            grown.changes.within = Some(within);
            outbox.advance(&grown);
            let mut batch = outbox.new_batch();
            outbox.seal(&mut batch, &mut tables, None, &mut Turn::at(now));
            assert_eq!(outbox.load_starts_ms(now), load_starts_ms, "{at}");
        }
    }
}
