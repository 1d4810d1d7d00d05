//! Comparisons of the members of lookups with the rows in Redis, a step at a time, each in a batch of its own.
//!
//! Nothing else is written between what a step reads and what it writes. Between two steps, the stream has its turn.

use super::growing::Grown;
use super::in_flight::{InFlight, Step};
use super::table::Table;
use super::turn::Turn;
use super::{Effect, Machine};
use crate::command::{Command, Key};
use crate::lookups::questions::Answers;
use crate::lookups::sweep::{KEYS_A_SCAN, Next, Then};
use crate::resp::batch::EncodeError;
use crate::schema::TableId;
use std::time::Duration;

/// How long the stream waits for a step that looks for lists among all keys of Redis.
const A_SCAN: Duration = Duration::from_millis(10);

/// What came of the attempt to begin a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Swept {
    Nothing,
    Began,
    /// All members of a table have been compared.
    Ended,
}

impl Machine {
    /// Begins a step, or ends a comparison that has nothing left to read.
    pub(super) fn sweep(&mut self, turn: &mut Turn) -> Swept {
        let may_write = self.outbox.has_caught_up() && !self.draining && !self.desk.is_paused();
        if !may_write || !self.tables.have_lookups() {
            return Swept::Nothing;
        }
        // Where rows were lost, lists have the members that those gave, until they are loaded again.
        let is_healing = self.tables.is_healing();
        let is_next = |table: &Table| table.is_to_be_swept() && (!is_healing || table.load().is_some());
        let Some(table) = self.tables.ids(is_next).first().copied() else { return Swept::Nothing };
        let Some(sweep) = self.tables.get_mut(table).begin_sweep() else { return Swept::Nothing };
        match sweep.begin_step() {
            Next::End => {
                self.tables.get_mut(table).is_swept();
                return Swept::Ended;
            }
            Next::Scan(prefix, cursor) => {
                turn.does(Effect::Scan { prefix, cursor, limit: KEYS_A_SCAN, within: A_SCAN });
            }
            Next::Ask(questions) => turn.does(Effect::Inspect(questions)),
        }
        self.in_flight = Some(InFlight::sweeping(Grown::nothing(), table));
        Swept::Began
    }

    pub(super) fn scanned_for_sweep(&mut self, table: TableId, keys: Vec<Key>, next: u64, turn: &mut Turn) {
        match self.tables.get_mut(table).sweep() {
            None => self.in_flight = None,
            Some(sweep) => {
                sweep.scanned(keys, next);
                self.write_swept(table, Vec::new(), turn);
            }
        }
    }

    /// Takes the answer to a question of the comparison, which may have been given up since.
    pub(super) fn swept(&mut self, table: TableId, answers: Answers, turn: &mut Turn) {
        let Some(sweep) = self.tables.get_mut(table).sweep() else {
            self.in_flight = None;
            return;
        };
        match sweep.answered(answers) {
            Then::Ask(questions) => {
                self.batch_in_flight().step = Step::Sweeping(table);
                turn.does(Effect::Inspect(questions));
            }
            Then::Write(changes, other_type) => {
                let mends = self.tables.get(table).mends_members();
                let commands = if mends { changes.into_commands(&other_type) } else { Vec::new() };
                self.write_swept(table, commands, turn);
            }
        }
    }

    fn write_swept(&mut self, table: TableId, commands: Vec<Command>, turn: &mut Turn) {
        let in_flight = self.batch_in_flight();
        (in_flight.step, in_flight.mending) = (Step::Sweeping(table), commands.into());
        self.mend(turn);
    }

    /// Writes as much as one batch should hold. Each command brings one list closer to what it should be.
    fn mend(&mut self, turn: &mut Turn) {
        let (mut out, most) = (self.outbox.new_batch(), self.outbox.limits().stream_bytes());
        let mending = &mut self.batch_in_flight().mending;
        while let Some(command) = mending.pop_front() {
            match out.push(&command) {
                Ok(()) if out.weight() < most => {}
                Ok(()) => break,
                Err(EncodeError::Batch { .. }) if !out.is_empty() => {
                    mending.push_front(command);
                    break;
                }
                Err(too_large) => turn.does(Effect::TooLarge(too_large)),
            }
        }
        let checkpoint = self.outbox.seal(&mut out, &mut self.tables, self.feedback.confirmed(), turn);
        turn.does(Effect::Execute { batch: out, checkpoint, changes: 0 });
    }

    /// Redis has acknowledged it.
    pub(super) fn mended(&mut self, turn: &mut Turn) {
        match self.batch_in_flight().mending.is_empty() {
            true => self.in_flight = None,
            false => self.mend(turn),
        }
    }
}
