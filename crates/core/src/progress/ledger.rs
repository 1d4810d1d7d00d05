//! Decides what may be confirmed to Postgres. Only this file can create a [`ConfirmedLsn`].
//!
//! A position is confirmed when four things hold for everything before it: this session has delivered it, Redis has
//! acknowledged it with a checkpoint at or beyond it, every ordinary snapshot sees it, and no transaction is open
//! across it. Visibility keeps later loads exact: whatever precedes the slot's position is visible to their snapshots,
//! even after a restart.
//!
//! A mistake here lets Postgres discard changes that Redis does not have.

use super::visibility::Snapshot;
use crate::change::Begin;
use crate::lsn::{AppliedLsn, CommitLsn, EndLsn};
use crate::rules::{Rule, holds};
use std::collections::VecDeque;
use std::fmt;

/// How many delivered transactions may wait to be seen by a snapshot. Snapshots arrive once a second and usually see
/// most of them. Beyond this limit, the newest are combined and count as seen once all of them are.
const UNSEEN_HELD: usize = 100_000;

#[derive(Debug)]
pub struct Ledger {
    delivered: EndLsn,
    applied: Option<AppliedLsn>,
    /// In commit order.
    unseen: VecDeque<Unseen>,
    newest: Option<Snapshot>,
    confirmed: Option<ConfirmedLsn>,
}

/// Consecutive transactions that no snapshot is known to see.
#[derive(Debug)]
struct Unseen {
    /// The start of the first one's commit record: confirming up to here sends it again.
    commit: CommitLsn,
    xids: Vec<u32>,
}

impl Ledger {
    /// `from` is where the stream begins; everything before it was confirmed earlier.
    pub fn new(from: EndLsn) -> Self {
        Ledger { delivered: from, applied: None, unseen: VecDeque::new(), newest: None, confirmed: None }
    }

    pub fn begin(&mut self, begin: Begin) {
        if self.newest.as_ref().is_some_and(|s| s.sees(begin.xid)) {
            return;
        }
        let full = self.unseen.len() >= UNSEEN_HELD;
        match self.unseen.back_mut().filter(|_| full) {
            Some(last) => last.xids.push(begin.xid),
            None => self.unseen.push_back(Unseen { commit: begin.commit, xids: vec![begin.xid] }),
        }
    }

    /// The stream has delivered everything before `at`, which is the end of a transaction or a position between two.
    pub fn delivered(&mut self, at: EndLsn) {
        self.delivered = self.delivered.max(at);
        self.confirm();
    }

    /// Redis has acknowledged a checkpoint at this position.
    pub fn applied(&mut self, applied: AppliedLsn) {
        self.applied = self.applied.max(Some(applied));
        self.confirm();
    }

    /// Takes a snapshot that is newer than all before it.
    pub fn seen(&mut self, snapshot: &Snapshot) {
        self.unseen.retain(|t| !t.xids.iter().all(|xid| snapshot.sees(*xid)));
        self.newest = Some(snapshot.clone());
        self.confirm();
    }

    /// Never decreases.
    pub fn confirmed(&self) -> Option<ConfirmedLsn> {
        self.confirmed
    }

    fn confirm(&mut self) {
        let Some(AppliedLsn(applied)) = self.applied else { return };
        let unseen = self.unseen.front().map(|Unseen { commit: CommitLsn(lsn), .. }| EndLsn(*lsn));
        let unseen = unseen.filter(|_| holds(Rule::ConfirmOnlyVisible));
        let applied = if holds(Rule::ConfirmOnlyApplied) { applied } else { self.delivered };
        let delivered = if holds(Rule::ConfirmOnlyDelivered) { self.delivered } else { applied };
        let safe = unseen.into_iter().fold(applied.min(delivered), EndLsn::min);
        self.confirmed = self.confirmed.max(Some(ConfirmedLsn(safe)));
    }
}

/// Redis safely has everything before it, so Postgres may discard the WAL. Only the ledger can create one.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConfirmedLsn(EndLsn);

impl ConfirmedLsn {
    pub fn end(self) -> EndLsn {
        self.0
    }
}

impl fmt::Display for ConfirmedLsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl fmt::Debug for ConfirmedLsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::change::CommitTime;
    use crate::lsn::Lsn;
    use proptest::prelude::*;

    fn lsn(n: u64) -> Lsn {
        Lsn::new(n).expect("not zero")
    }

    fn end(n: u64) -> EndLsn {
        EndLsn(lsn(n))
    }

    fn begin(xid: u32, commit: u64) -> Begin {
        Begin { xid, commit: CommitLsn(lsn(commit)), time: CommitTime(0) }
    }

    fn all_seen() -> Snapshot {
        "1000:1000:".parse().expect("a literal snapshot")
    }

    fn confirmed(ledger: &Ledger) -> u64 {
        ledger.confirmed().map_or(0, |c| c.end().0.get())
    }

    #[test]
    fn a_transaction_is_confirmed_by_its_end_once_it_is_in_redis() {
        let mut ledger = Ledger::new(end(10));
        ledger.seen(&all_seen());
        ledger.begin(begin(7, 20));
        ledger.delivered(end(25));
        assert_eq!(confirmed(&ledger), 0);
        ledger.applied(AppliedLsn(end(25)));
        assert_eq!(confirmed(&ledger), 25);
        let confirmed = ledger.confirmed().expect("just confirmed");
        assert_eq!(format!("{confirmed} {confirmed:?}"), "0/19 0/19", "as Postgres writes it");
    }

    #[test]
    fn an_idle_position_is_confirmed_only_when_the_checkpoint_has_it() {
        let mut ledger = Ledger::new(end(10));
        ledger.applied(AppliedLsn(end(10)));
        ledger.delivered(end(40));
        assert_eq!(confirmed(&ledger), 10);
        ledger.applied(AppliedLsn(end(40)));
        assert_eq!(confirmed(&ledger), 40);
    }

    #[test]
    fn what_no_snapshot_sees_is_not_passed() {
        let mut ledger = Ledger::new(end(10));
        ledger.seen(&"7:8:7".parse().expect("a snapshot"));
        ledger.begin(begin(7, 20));
        ledger.delivered(end(25));
        ledger.delivered(end(60));
        ledger.applied(AppliedLsn(end(60)));
        assert_eq!(confirmed(&ledger), 20, "resuming there sends it again");
        ledger.seen(&all_seen());
        assert_eq!(confirmed(&ledger), 60);
    }

    #[test]
    fn what_redis_had_before_is_confirmed_only_as_it_comes_by_again() {
        let mut ledger = Ledger::new(end(10));
        ledger.seen(&all_seen());
        ledger.applied(AppliedLsn(end(90)));
        assert_eq!(confirmed(&ledger), 10);
        ledger.begin(begin(7, 20));
        assert_eq!(confirmed(&ledger), 10);
        ledger.delivered(end(25));
        assert_eq!(confirmed(&ledger), 25);
    }

    #[test]
    fn its_memory_is_bounded() {
        let mut ledger = Ledger::new(end(1));
        for n in 0..UNSEEN_HELD as u32 + 10 {
            let at = u64::from(n) * 2 + 10;
            ledger.begin(begin(n + 3, at));
            ledger.delivered(end(at + 1));
        }
        assert_eq!(ledger.unseen.len(), UNSEEN_HELD);
        ledger.applied(AppliedLsn(end(u64::from(u32::MAX))));
        let xmax = UNSEEN_HELD + 12;
        ledger.seen(&format!("{xmax}:{xmax}:").parse().expect("a snapshot"));
        assert_eq!(ledger.unseen.len(), 1, "one of those taken together is not seen");
        ledger.seen(&format!("{0}:{0}:", xmax + 1).parse().expect("a snapshot"));
        assert!(ledger.unseen.is_empty());
    }

    /// An event that changes the ledger, in any order that a session may produce.
    #[derive(Debug, Clone)]
    enum Event {
        /// A transaction is delivered completely, or only its header.
        Begin,
        End,
        Keepalive,
        /// A checkpoint is acknowledged, up to some fraction of what was delivered.
        Applied(u8),
        /// So many delivered transactions become visible, counted from a random one on.
        Visible(u8, u8),
        Sample,
    }

    fn events() -> impl Strategy<Value = Vec<Event>> {
        let one = prop_oneof![
            3 => Just(Event::Begin),
            3 => Just(Event::End),
            2 => Just(Event::Keepalive),
            3 => any::<u8>().prop_map(Event::Applied),
            3 => any::<(u8, u8)>().prop_map(|(a, b)| Event::Visible(a, b)),
            3 => Just(Event::Sample),
        ];
        prop::collection::vec(one, 1..60)
    }

    struct Transaction {
        xid: u32,
        commit: u64,
        end: Option<u64>,
        visible: bool,
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(5_000))]

        #[test]
        fn never_falls_and_never_passes_what_is_not_safe(events in events()) {
            let mut ledger = Ledger::new(end(10));
            let (mut at, mut applied, mut sampled_before) = (10_u64, 0_u64, 0_u64);
            let mut ends = vec![10_u64];
            let mut transactions: Vec<Transaction> = Vec::new();
            for event in events {
                let is_open = transactions.last().is_some_and(|t| t.end.is_none());
                match event {
                    Event::Begin if !is_open => {
                        at += 5;
                        let xid = 100 + u32::try_from(transactions.len()).expect("few");
                        transactions.push(Transaction { xid, commit: at, end: None, visible: false });
                        ledger.begin(begin(xid, at));
                    }
                    Event::End if is_open => {
                        at += 3;
                        transactions.last_mut().expect("one is open").end = Some(at);
                        ends.push(at);
                        ledger.delivered(end(at));
                    }
                    Event::Keepalive if !is_open => {
                        at += 2;
                        ends.push(at);
                        ledger.delivered(end(at));
                    }
                    Event::Applied(part) => {
                        // Checkpoints are at ends of transactions or at positions between them.
                        let index = usize::from(part) * ends.len() / 256;
                        applied = applied.max(ends[index]);
                        ledger.applied(AppliedLsn(end(applied)));
                    }
                    Event::Visible(from, count) => {
                        let from = usize::from(from) * transactions.len() / 256;
                        transactions.iter_mut().skip(from).take(usize::from(count % 4)).for_each(|t| t.visible = true);
                    }
                    Event::Sample => {
                        let xmax = 100 + transactions.len();
                        let running: Vec<String> =
                            transactions.iter().filter(|t| !t.visible).map(|t| t.xid.to_string()).collect();
                        ledger.seen(&format!("50:{xmax}:{}", running.join(",")).parse().expect("a snapshot"));
                    }
                    Event::Begin | Event::End | Event::Keepalive => {}
                }
                let confirmed = confirmed(&ledger);
                prop_assert!(confirmed >= sampled_before, "it fell");
                sampled_before = confirmed;
                prop_assert!(confirmed <= applied.max(10), "it passed what redis has");
                prop_assert!(confirmed <= at, "it passed what was delivered");
                for t in &transactions {
                    prop_assert!(t.end.is_some() || confirmed <= t.commit, "it passed an open transaction");
                    prop_assert!(t.visible || confirmed <= t.commit, "it passed what no snapshot sees");
                    prop_assert!(t.end.is_none_or(|e| e <= applied) || confirmed <= t.commit, "it passed an unapplied one");
                }
            }
            // Once everything is applied and visible, everything is confirmed: being cautious is not enough.
            if transactions.last().is_some_and(|t| t.end.is_none()) {
                ledger.delivered(end(at + 3));
                at += 3;
            }
            ledger.seen(&all_seen());
            ledger.applied(AppliedLsn(end(at)));
            prop_assert_eq!(self::confirmed(&ledger), at);
        }
    }
}
