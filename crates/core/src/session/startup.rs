//! Startup: the steps between the resume table's decision and START_REPLICATION, as a state machine. Pure.
//!
//! [`Startup`] requests one thing at a time and is told when it is done. The daemon and the simulation run the same
//! machine, because the order is what matters:
//!
//! 1. A checkpoint that vouches for nothing is written before the slot changes. Otherwise the old checkpoint would be
//!    compared with the position of the new slot.
//! 2. A new slot is made as a temporary slot, and gets its name only once ordinary snapshots see everything that it
//!    leaves out. A slot that has its name is therefore complete, whatever Redis remembers.
//! 3. The checkpoint of the takeover is acknowledged before the stream starts: from then on an older writer is refused.
//!
//! The process may die between any two steps. What it leaves behind on both servers is a row of the resume table.

use super::takeover::{Taken, Takeover};
use crate::checkpoint::Checkpoint;
use crate::lsn::EndLsn;
use crate::progress::resume::ResumeDecision;
use crate::progress::visibility::Snapshot;
use crate::reason::Reason;
use crate::rules::{Rule, holds};
use crate::schema::TableId;

/// What is to be done next. Everything but [`Request::Stream`] is answered by the [`Done`] of the same line.
#[derive(Debug)]
pub enum Request {
    /// Write this checkpoint, which vouches for nothing: [`Done::Written`].
    Disown(Box<Checkpoint>),
    /// [`Done::Dropped`].
    DropSlot,
    /// Make a temporary slot and read its exported snapshot: [`Done::Created`].
    CreateTemporarySlot,
    /// Take an ordinary snapshot. Requested again until it sees enough: [`Done::Snapshot`].
    TakeSnapshot,
    /// Copy the temporary slot under the slot's name, and drop it: [`Done::Named`].
    NameSlot,
    /// Write the checkpoint with which this daemon becomes the writer: [`Done::Written`].
    TakeOver(Box<Checkpoint>),
    /// Start the stream. There is no answer: the session begins.
    Stream(Box<Taken>),
}

#[derive(Debug)]
pub enum Done {
    /// Redis has acknowledged the checkpoint.
    Written,
    Dropped,
    /// `left_out`: the exported snapshot. It sees every transaction that the slot will not send.
    Created {
        left_out: Snapshot,
    },
    Snapshot(Snapshot),
    /// The slot's position.
    Named {
        confirmed: EndLsn,
    },
}

#[derive(Debug)]
pub struct Startup {
    phase: Phase,
}

#[derive(Debug)]
enum Phase {
    Disowning(NewSlot),
    Dropping(NewSlot),
    Creating(NewSlot),
    AwaitingVisibility { new: NewSlot, left_out: Snapshot },
    Naming(NewSlot),
    TakingOver(Taken),
    Over,
}

#[derive(Debug)]
struct NewSlot {
    drop_old: bool,
    /// The checkpoint that vouches for nothing.
    disowned: Checkpoint,
    load: Vec<(TableId, Reason)>,
}

impl Startup {
    /// # Errors
    /// If the resume table refuses, with its reason.
    pub fn begin(takeover: &Takeover<'_>, decision: ResumeDecision) -> Result<(Self, Request), String> {
        let taken = match decision {
            ResumeDecision::Refuse { because } => return Err(because),
            ResumeDecision::NewSlot { drop_old, because } => {
                let (disowned, load) = (takeover.disowned(&because), takeover.all(&because));
                let request = Request::Disown(Box::new(disowned.clone()));
                return Ok((Startup { phase: Phase::Disowning(NewSlot { drop_old, disowned, load }) }, request));
            }
            ResumeDecision::Deliver { from, base, because } => takeover.anew(from, base, &because),
            ResumeDecision::Stream { from, load } => takeover.resumed(from, load),
        };
        let (phase, request) = take_over(taken);
        Ok((Startup { phase }, request))
    }

    /// # Panics
    /// If `done` does not answer the last request.
    pub fn step(&mut self, done: Done) -> Request {
        let (phase, request) = match (std::mem::replace(&mut self.phase, Phase::Over), done) {
            (Phase::Disowning(new), Done::Written) if new.drop_old => (Phase::Dropping(new), Request::DropSlot),
            (Phase::Disowning(new), Done::Written) | (Phase::Dropping(new), Done::Dropped) => {
                (Phase::Creating(new), Request::CreateTemporarySlot)
            }
            (Phase::Creating(new), Done::Created { left_out }) => {
                (Phase::AwaitingVisibility { new, left_out }, Request::TakeSnapshot)
            }
            // A load that began earlier would miss what the slot leaves out, for good. With synchronous replication that
            // becomes visible only once a standby has it.
            (Phase::AwaitingVisibility { new, left_out }, Done::Snapshot(ordinary)) => {
                match ordinary.sees_all_that(&left_out) || !holds(Rule::NameSlotWhenVisible) {
                    true => (Phase::Naming(new), Request::NameSlot),
                    false => (Phase::AwaitingVisibility { new, left_out }, Request::TakeSnapshot),
                }
            }
            (Phase::Naming(NewSlot { disowned, load, .. }), Done::Named { confirmed }) => {
                let seq = disowned.seq + 1;
                let checkpoint = Checkpoint { lsn: confirmed, base: confirmed, seq, ..disowned };
                take_over(Taken { from: confirmed, checkpoint, load, lost: None })
            }
            (Phase::TakingOver(taken), Done::Written) => (Phase::Over, Request::Stream(Box::new(taken))),
            (phase, done) => panic!("{done:?} does not answer {phase:?}"),
        };
        self.phase = phase;
        request
    }
}

fn take_over(taken: Taken) -> (Phase, Request) {
    let request = Request::TakeOver(Box::new(taken.checkpoint.clone()));
    (Phase::TakingOver(taken), request)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::SlotState;
    use crate::lsn::Lsn;
    use crate::progress::resume::{self, Facts};

    fn end(n: u64) -> EndLsn {
        EndLsn(Lsn::new(n).expect("not zero"))
    }

    fn snapshot(text: &str) -> Snapshot {
        text.parse().expect("a snapshot")
    }

    /// Redis has everything up to 100.
    fn begun(slot: &SlotState) -> (Startup, Request) {
        let found = r#"{"system_id":"7","timeline":1,"database":"shop","lsn":"0/64","state":"ready","epoch":3,"seq":5,
                        "beat_ms":0,"base":"0/1","last":{"end":"0/64","xid":9,"time_us":1},"entries":0}"#;
        let found = Checkpoint::head(found.as_bytes()).expect("the settled format");
        let facts = Facts::fitting(Some(&found), slot, &[]);
        let takeover = Takeover { facts: &facts, specs: &[], epoch_seen: 0, made_publication: None, evicted: None };
        Startup::begin(&takeover, resume::decide(&facts)).expect("the same server")
    }

    #[test]
    fn a_slot_gets_its_name_when_every_snapshot_sees_what_it_leaves_out() {
        let (mut startup, request) = begun(&SlotState::Invalidated { reason: "wal_removed".to_owned() });
        let Request::Disown(disowned) = request else { panic!("{request:?}") };
        assert_eq!((disowned.lsn, disowned.base, disowned.last), (end(200), end(200), None));
        assert!(matches!(startup.step(Done::Written), Request::DropSlot));
        assert!(matches!(startup.step(Done::Dropped), Request::CreateTemporarySlot));
        // 11 has committed in the WAL, and waits for a synchronous standby.
        let left_out = snapshot("12:12:");
        assert!(matches!(startup.step(Done::Created { left_out }), Request::TakeSnapshot));
        for _ in 0..3 {
            assert!(matches!(startup.step(Done::Snapshot(snapshot("11:12:11"))), Request::TakeSnapshot));
        }
        assert!(matches!(startup.step(Done::Snapshot(snapshot("12:12:"))), Request::NameSlot));
        let request = startup.step(Done::Named { confirmed: end(300) });
        let Request::TakeOver(checkpoint) = request else { panic!("{request:?}") };
        assert_eq!((checkpoint.lsn, checkpoint.base, checkpoint.seq), (end(300), end(300), disowned.seq + 1));
        assert_eq!(checkpoint.epoch, disowned.epoch);
        let request = startup.step(Done::Written);
        let Request::Stream(taken) = request else { panic!("{request:?}") };
        assert_eq!((taken.from, taken.checkpoint), (end(300), *checkpoint));
    }

    #[test]
    fn a_slot_that_can_be_used_is_left_alone() {
        let (mut startup, request) = begun(&SlotState::Ready { confirmed: end(90), active_pid: None });
        let Request::TakeOver(checkpoint) = request else { panic!("{request:?}") };
        assert_eq!((checkpoint.lsn, checkpoint.epoch, checkpoint.seq), (end(100), 4, 6));
        assert!(matches!(startup.step(Done::Written), Request::Stream(taken) if taken.from == end(90)));
    }

    #[test]
    #[should_panic(expected = "does not answer")]
    fn an_answer_that_was_not_requested_is_a_bug() {
        let (mut startup, _) = begun(&SlotState::Absent);
        startup.step(Done::Dropped);
    }
}
