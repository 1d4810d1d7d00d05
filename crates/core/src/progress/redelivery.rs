//! Checks whether Postgres still has the history that was applied, by comparing what the slot redelivers with the
//! checkpoint.
//!
//! If the last applied transaction is not redelivered, Postgres has lost it, and Redis holds changes that Postgres does
//! not have. If a transaction is redelivered that Redis should already have but never received, Postgres has a
//! different history. A mistake here goes unnoticed until somebody compares rows.

use crate::change::Begin;
use crate::checkpoint::{Checkpoint, LastTransaction, Place};
use crate::lsn::{EndLsn, Lsn};
use crate::rules::{Rule, holds};
use std::collections::VecDeque;
use std::fmt;
use std::ops::Range;

/// What must be redelivered, and what must not be.
#[derive(Debug)]
pub struct Redelivery {
    expect: Option<LastTransaction>,
    /// Transactions of which Redis has a part, in commit order: at most a split one, and one that truncates.
    parts: VecDeque<Begin>,
    /// The last transaction of which a hash slot that is ahead of the checkpoint has anything.
    ahead: Option<Ahead>,
    /// Nothing that commits from here on has ever been applied to what the checkpoint covers.
    nothing_from: EndLsn,
    /// Nothing that commits between these positions has ever been applied to hash slots that are ahead of it.
    nothing_ahead: Range<Lsn>,
}

/// A transaction, by where it ends or, if only a part of it is there, by where its commit record begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ahead {
    pub place: Place,
    pub xid: u32,
}

impl Ahead {
    fn is_part(&self) -> bool {
        self.place.done > 0
    }

    /// Whether it must have been delivered, or begun, once everything before `at` has been. A commit record may begin where
    /// the one before it ends.
    fn is_behind(&self, at: EndLsn) -> bool {
        self.place.at < at.0 || !self.is_part() && self.place.at == at.0
    }
}

#[derive(Debug, PartialEq, Eq)]
pub enum Redelivered {
    AsExpected,
    WentBack { because: String },
}

impl Redelivery {
    /// `checkpoint`: where the session begins. `from`: where the stream begins. `ahead`: the last transaction of which a hash
    /// slot has anything; `until`: how far one is.
    pub fn new(checkpoint: &Checkpoint, ahead: Option<Ahead>, until: Option<Place>, from: EndLsn) -> Self {
        let Checkpoint { last, within, clearing, base, .. } = checkpoint;
        let within = within.map(|within| within.begin).filter(|_| holds(Rule::ExpectPartialTransaction));
        let clearing = clearing.filter(|_| holds(Rule::ExpectTruncate));
        // What comes after a split transaction may truncate in the batch that completes it.
        let mut parts: VecDeque<Begin> = within.into_iter().chain(clearing).collect();
        parts.make_contiguous().sort_by_key(|begin| begin.commit);
        let nothing_from = last.map_or(*base, |last| last.end.max(*base));
        // If a part of it is there, nothing is known of what is between.
        let known = ahead.map_or(nothing_from.0, |ahead| ahead.place.at.max(nothing_from.0));
        let until = until.filter(|until| until.done == 0).map_or(known, |until| until.at.max(known));
        Redelivery {
            expect: last.filter(|last| last.end > from && holds(Rule::ExpectLastTransaction)),
            parts,
            ahead: ahead
                .filter(|_| holds(Rule::ExpectWhatLanesHave))
                .filter(|ahead| ahead.place.at > from.0 || ahead.is_part() && ahead.place.at == from.0),
            nothing_from,
            nothing_ahead: known..until,
        }
    }

    /// Called when the first part of a transaction is delivered. Transactions arrive in commit order.
    pub fn begins(&mut self, begin: &Begin) -> Redelivered {
        while let Some(part) = self.next_part(|part| part.commit <= begin.commit) {
            if part != *begin {
                return lost_part(&part);
            }
        }
        match self.ahead.take_if(|ahead| ahead.is_part() && ahead.place.at <= begin.commit.0) {
            Some(ahead) if (ahead.place.at, ahead.xid) != (begin.commit.0, begin.xid) => lost_ahead(&ahead),
            Some(_) | None => Redelivered::AsExpected,
        }
    }

    /// Takes the first of the parts, if the stream has come so far.
    fn next_part(&mut self, has_come: impl FnOnce(&Begin) -> bool) -> Option<Begin> {
        self.parts.front().is_some_and(has_come).then(|| self.parts.pop_front())?
    }

    /// Called when a whole transaction has been delivered.
    pub fn transaction(&mut self, end: EndLsn, begin: &Begin) -> Redelivered {
        // Commits do not overlap.
        if let Some(part) = self.next_part(|part| part.commit.0 < end.0) {
            return lost_part(&part);
        }
        if let Some(ahead) = self.ahead.take_if(|ahead| ahead.is_behind(end))
            && (ahead.is_part() || (ahead.place.at, ahead.xid) != (end.0, begin.xid))
        {
            return lost_ahead(&ahead);
        }
        match self.expect.take_if(|last| last.end <= end) {
            Some(last) if last.end == end && last.xid == begin.xid && last.time == begin.time => {
                Redelivered::AsExpected
            }
            Some(last) => lost(&last),
            None => Redelivered::AsExpected,
        }
    }

    /// Called when a whole transaction has been delivered that changes followed tables and is covered by the
    /// checkpoint.
    pub fn covered(&self, begin: &Begin) -> Redelivered {
        if begin.commit.0 < self.nothing_from.0 || !holds(Rule::ExpectNothingNew) {
            return Redelivered::AsExpected;
        }
        went_back(format_args!("transaction {} (at {}) was not there before", begin.xid, begin.commit))
    }

    /// Called when a whole transaction has been delivered that changes followed tables and is not covered by the checkpoint.
    pub fn applied(&self, begin: &Begin) -> Redelivered {
        if !self.nothing_ahead.contains(&begin.commit.0) || !holds(Rule::ExpectNothingNewInLanes) {
            return Redelivered::AsExpected;
        }
        went_back(format_args!(
            "transaction {} (at {}) was not there before, and hash slots of redis are beyond it",
            begin.xid, begin.commit
        ))
    }

    /// Called when everything before `at` has been delivered.
    pub fn reached(&mut self, at: EndLsn) -> Redelivered {
        if let Some(part) = self.next_part(|part| part.commit.0 < at.0) {
            return lost_part(&part);
        }
        if let Some(ahead) = self.ahead.take_if(|ahead| ahead.is_behind(at)) {
            return lost_ahead(&ahead);
        }
        self.expect.take_if(|last| last.end <= at).map_or(Redelivered::AsExpected, |last| lost(&last))
    }
}

fn lost_part(Begin { xid, commit, .. }: &Begin) -> Redelivered {
    went_back(format_args!("transaction {xid} (at {commit}), a part of which is in redis, was not redelivered"))
}

fn lost_ahead(Ahead { place, xid }: &Ahead) -> Redelivered {
    went_back(format_args!("transaction {xid} (at {place}), which a hash slot of redis has, was not redelivered"))
}

fn lost(last: &LastTransaction) -> Redelivered {
    went_back(format_args!("transaction {} (until {}) was not redelivered", last.xid, last.end))
}

fn went_back(what: fmt::Arguments<'_>) -> Redelivered {
    Redelivered::WentBack { because: format!("postgres went back: {what}") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::change::CommitTime;
    use crate::checkpoint::Within;
    use crate::lsn::CommitLsn;

    fn end(n: u64) -> EndLsn {
        EndLsn(Lsn::new(n).expect("not zero"))
    }

    fn checkpoint() -> Checkpoint {
        let head = r#"{"system_id":"7","timeline":1,"database":"shop","lsn":"0/64","state":"ready","epoch":1,"seq":1,
                       "beat_ms":0,"base":"0/1","entries":0}"#;
        Checkpoint::head(head.as_bytes()).expect("the settled format")
    }

    #[test]
    fn the_last_transaction_must_be_redelivered() {
        let last = LastTransaction { end: end(100), xid: 7, time: CommitTime(3) };
        let begin = |xid, time| Begin { xid, commit: CommitLsn(end(90).0), time: CommitTime(time) };
        let new = |from| Redelivery::new(&Checkpoint { last: Some(last), ..checkpoint() }, None, None, from);
        let watch = || new(end(50));
        let is_expected = |answer| answer == Redelivered::AsExpected;

        let mut w = watch();
        assert!(is_expected(w.transaction(end(80), &begin(6, 1))));
        assert!(is_expected(w.reached(end(99))));
        assert!(is_expected(w.transaction(end(100), &begin(7, 3))));
        assert!(is_expected(w.reached(end(500))), "it was redelivered");

        assert!(!is_expected(watch().transaction(end(100), &begin(8, 3))), "another one ends there");
        assert!(!is_expected(watch().transaction(end(100), &begin(7, 4))), "another one with its id");
        assert!(!is_expected(watch().transaction(end(101), &begin(7, 3))), "passed over");
        assert!(!is_expected(watch().reached(end(100))), "passed over");
        assert!(is_expected(new(end(100)).reached(end(500))), "confirmed before");
    }

    #[test]
    fn nothing_new_is_redelivered_before_the_place_of_a_hash_slot() {
        let begin = |at| Begin { xid: 8, commit: CommitLsn(end(at).0), time: CommitTime(0) };
        let is_new = |last: u64, until: Option<Place>, at| {
            let ahead = Ahead { place: Place::between(end(last)), xid: 7 };
            let watch = Redelivery::new(&checkpoint(), Some(ahead), until, end(50));
            watch.applied(&begin(at)) != Redelivered::AsExpected
        };
        let until = Some(Place::between(end(140)));
        assert_eq!([99, 100, 139, 140].map(|at| is_new(100, until, at)), [false, true, true, false]);
        assert!(!is_new(100, None, 120), "no slot is ahead");
        assert!(!is_new(140, until, 140), "the last one ends there");
        assert!(!is_new(100, Some(Place { at: end(140).0, done: 2 }), 120), "what came before a part is not known");
    }

    #[test]
    fn what_a_hash_slot_has_ahead_of_the_checkpoint_must_be_redelivered() {
        let begin = |xid, at| Begin { xid, commit: CommitLsn(end(at).0), time: CommitTime(0) };
        let watch = |at, done| {
            let ahead = Ahead { place: Place { at: end(at).0, done }, xid: 7 };
            Redelivery::new(&checkpoint(), Some(ahead), None, end(50))
        };
        let is_expected = |answer| answer == Redelivered::AsExpected;

        let mut whole = watch(100, 0);
        assert!(is_expected(whole.transaction(end(80), &begin(6, 70))));
        assert!(is_expected(whole.begins(&begin(7, 90))));
        assert!(is_expected(whole.transaction(end(100), &begin(7, 90))));
        assert!(is_expected(whole.reached(end(500))), "it was redelivered");
        assert!(!is_expected(watch(100, 0).transaction(end(100), &begin(8, 90))), "another one ends there");
        assert!(!is_expected(watch(100, 0).transaction(end(101), &begin(7, 90))), "passed over");
        assert!(!is_expected(watch(100, 0).reached(end(100))), "passed over");
        assert!(is_expected(watch(50, 0).reached(end(500))), "confirmed before");

        let mut part = watch(90, 3);
        assert!(is_expected(part.begins(&begin(6, 70))));
        assert!(is_expected(part.transaction(end(90), &begin(6, 70))), "the next one begins where it ends");
        assert!(is_expected(part.reached(end(90))));
        assert!(is_expected(part.begins(&begin(7, 90))));
        assert!(is_expected(part.transaction(end(100), &begin(7, 90))));
        assert!(!is_expected(watch(90, 3).begins(&begin(8, 90))), "another one commits there");
        assert!(!is_expected(watch(90, 3).begins(&begin(7, 91))), "passed over");
        assert!(!is_expected(watch(90, 3).reached(end(91))), "passed over");
    }

    #[test]
    fn a_transaction_of_which_a_part_was_applied_must_be_redelivered() {
        let begin = |at| Begin { xid: 8, commit: CommitLsn(end(at).0), time: CommitTime(9) };
        let within = Within { begin: begin(150), changes_done: 3 };
        let split = Checkpoint { within: Some(within), ..checkpoint() };
        for checkpoint in [split, Checkpoint { clearing: Some(begin(150)), ..checkpoint() }] {
            is_awaited(begin, &|| Redelivery::new(&checkpoint, None, None, end(50)));
        }
    }

    /// 150 is redelivered, or not.
    fn is_awaited(begin: impl Fn(u64) -> Begin, watch: &dyn Fn() -> Redelivery) {
        let mut w = watch();
        assert_eq!(w.begins(&begin(90)), Redelivered::AsExpected);
        assert_eq!(w.transaction(end(150), &begin(90)), Redelivered::AsExpected, "the next one begins where it ends");
        assert_eq!(w.reached(end(150)), Redelivered::AsExpected, "nothing that begins there has come");
        assert_eq!(w.begins(&begin(150)), Redelivered::AsExpected);
        assert_eq!(w.begins(&begin(170)), Redelivered::AsExpected, "it was redelivered");
        assert_eq!(w.reached(end(500)), Redelivered::AsExpected, "it was redelivered");
        assert_ne!(watch().begins(&begin(151)), Redelivered::AsExpected, "passed over");
        assert_ne!(watch().begins(&Begin { xid: 7, ..begin(150) }), Redelivered::AsExpected, "another one");
        assert_ne!(
            watch().begins(&Begin { time: CommitTime(8), ..begin(150) }),
            Redelivered::AsExpected,
            "another one"
        );
        assert_ne!(watch().transaction(end(160), &begin(150)), Redelivered::AsExpected, "its beginning was not seen");
        assert_ne!(watch().reached(end(151)), Redelivered::AsExpected, "passed over");
    }

    #[test]
    fn a_split_transaction_may_be_followed_by_one_that_truncates() {
        let begin = |at| Begin { xid: 8, commit: CommitLsn(end(at).0), time: CommitTime(9) };
        let watch = |clearing| {
            let within = Some(Within { begin: begin(150), changes_done: 3 });
            Redelivery::new(
                &Checkpoint { within, clearing: Some(begin(clearing)), ..checkpoint() },
                None,
                None,
                end(50),
            )
        };
        let mut w = watch(170);
        assert_eq!(w.begins(&begin(150)), Redelivered::AsExpected);
        assert_eq!(w.transaction(end(160), &begin(150)), Redelivered::AsExpected);
        assert_eq!(w.reached(end(170)), Redelivered::AsExpected);
        assert_ne!(w.reached(end(171)), Redelivered::AsExpected, "only the first was redelivered");
        let mut w = watch(150);
        assert_eq!(w.begins(&begin(150)), Redelivered::AsExpected);
        assert_eq!(w.reached(end(171)), Redelivered::AsExpected, "it truncates itself");
    }

    #[test]
    fn nothing_is_redelivered_that_was_never_applied() {
        let last = LastTransaction { end: end(60), xid: 7, time: CommitTime(3) };
        let begin = |at| Begin { xid: 8, commit: CommitLsn(end(at).0), time: CommitTime(9) };
        for (last, base, known) in [(Some(last), 1, 59), (Some(last), 80, 79), (None, 80, 79)] {
            let checkpoint = Checkpoint { last, base: end(base), ..checkpoint() };
            // Confirmed long ago, so nothing is expected.
            let watch = Redelivery::new(&checkpoint, None, None, end(60));
            assert_eq!(watch.covered(&begin(known)), Redelivered::AsExpected, "{checkpoint:?}");
            let Redelivered::WentBack { because } = watch.covered(&begin(known + 1)) else { panic!("{checkpoint:?}") };
            assert!(because.contains("transaction 8"), "{because}");
        }
    }
}
