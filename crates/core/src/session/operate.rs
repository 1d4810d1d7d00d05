//! What an operator requests: comparisons of all rows, removal of keys, pausing. Scheduled comparisons are started
//! here, too.

use super::load_messages::{LoadId, LoadOrder, Purpose};
use super::operation::{AskId, Heavy, Running};
use super::table::{Load, Table};
use super::turn::Turn;
use super::{Effect, Machine};
use crate::admin::{Answer, Operation, Refusal, Repair, Scope};
use crate::command::Key;
use crate::lsn::EndLsn;
use crate::reason::Reason;
use crate::schema::TableId;
use std::collections::{BTreeSet, VecDeque};
use std::time::Duration;

/// The pause after a scheduled comparison that could not be made, unless the next one is due earlier.
const COMPARISON_RETRY: Duration = Duration::from_secs(300);

pub(super) struct Desk {
    /// The refetch or verification in progress.
    operation: Option<Running>,
    removals: VecDeque<Removal>,
    paused: bool,
    /// Requests to pause that are still to be answered.
    pausing: Vec<AskId>,
    verify_every_ms: Option<u64>,
}

/// Keys that an operator removes.
pub(super) struct Removal {
    pub ask: AskId,
    pub table: TableId,
    /// `None` for all keys of the table.
    pub keys: Option<Vec<Key>>,
    pub deleted: u64,
}

impl Desk {
    pub fn new(paused: bool, verify_every: Option<Duration>) -> Self {
        let verify_every_ms = verify_every.map(|d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX / 2));
        Desk { operation: None, removals: VecDeque::new(), paused, pausing: Vec::new(), verify_every_ms }
    }

    pub fn is_paused(&self) -> bool {
        self.paused
    }

    pub fn next_removal(&mut self) -> Option<Removal> {
        self.removals.pop_front()
    }

    pub fn what(&self) -> Option<Heavy> {
        self.operation.as_ref().map(|operation| operation.what)
    }

    pub fn is_verifying(&self) -> bool {
        self.what().is_some_and(|what| what != Heavy::Refetch)
    }

    /// Answers the requests to pause: everything that was delivered has been written.
    pub fn pause_is_reached(&mut self, turn: &mut Turn) {
        self.pausing.drain(..).for_each(|ask| turn.answers(ask, Ok(Answer::Paused)));
    }

    /// `lsn` is the position that Redis has reached.
    fn end_operation(&mut self, lsn: EndLsn, turn: &mut Turn) {
        let Some(operation) = self.operation.take_if(|operation| operation.is_over()) else { return };
        let elapsed = turn.now.saturating_duration_since(operation.started);
        if operation.is_whole() {
            turn.does(Effect::Compared { what: operation.what, tally: operation.tally, elapsed });
        }
        if let Some((ask, answer)) = operation.answer(lsn, elapsed) {
            turn.answers(ask, answer);
        }
    }
}

impl Machine {
    pub(super) fn asked(&mut self, ask: AskId, operation: Operation, turn: &mut Turn) {
        if self.draining {
            return turn.answers(ask, Err(Refusal::NotNow("prefetchd is stopping".to_owned())));
        }
        let (scope, what) = match operation {
            Operation::Pause => {
                self.desk.paused = true;
                return self.desk.pausing.push(ask);
            }
            Operation::Resume => {
                self.desk.paused = false;
                return turn.answers(ask, Ok(Answer::Resumed));
            }
            Operation::Invalidate(table, keys) => {
                return self.desk.removals.push_back(Removal { ask, table, keys: Some(keys), deleted: 0 });
            }
            Operation::Clear(table) => {
                return self.desk.removals.push_back(Removal { ask, table, keys: None, deleted: 0 });
            }
            Operation::Skip(_) => {
                let text = "the stream is not stuck: there is nothing to skip";
                return turn.answers(ask, Err(Refusal::Pointless(text.to_owned())));
            }
            Operation::Refetch(scope) => (scope, Heavy::Refetch),
            Operation::Verify(scope, repair) => (scope, Heavy::Verify(repair)),
        };
        let is_concerned = |table: &Table| scope == Scope::All || scope == Scope::Table(table.id());
        match self.may_compare(is_concerned) {
            Ok(()) => self.compare(Some(ask), what, self.tables.ids(is_concerned).into_iter().collect(), turn),
            Err(refusal) => turn.answers(ask, Err(refusal)),
        }
    }

    /// Only one heavy operation runs at a time, whoever started it.
    fn may_compare(&self, is_concerned: impl Fn(&Table) -> bool) -> Result<(), Refusal> {
        if self.desk.paused {
            return Err(Refusal::Paused);
        }
        if let Some(what) = self.desk.what() {
            return Err(Refusal::Busy(format!("a {what} is under way")));
        }
        if let Some(table) = self.tables.iter().find(|table| table.load().is_some()) {
            return Err(Refusal::Busy(format!("table {} is being loaded", table.spec.name)));
        }
        for table in self.tables.iter().filter(|table| is_concerned(table)) {
            if table.is_to_be_swept() {
                return Err(Refusal::Busy(format!("the lookups of table {} are being made", table.spec.name)));
            }
            if let Some(why) = table.broken_because() {
                return Err(Refusal::NotNow(format!("table {} is blocked, because {why}", table.spec.name)));
            }
        }
        Ok(())
    }

    fn compare(&mut self, ask: Option<AskId>, what: Heavy, tables: BTreeSet<TableId>, turn: &mut Turn) {
        self.desk.operation = Some(Running::new(ask, what, tables.clone(), turn.now));
        for table in tables {
            self.read_whole(table, Purpose::Compare(what.repair()), Reason::ordinary(what.to_string()), turn);
        }
    }

    /// Starts a comparison of every table that has not been compared for the configured time.
    pub(super) fn verify_when_due(&mut self, turn: &mut Turn) {
        let Some(every_ms) = self.desk.verify_every_ms else { return };
        if self.draining || self.desk.paused || self.desk.operation.is_some() || self.tables.is_any_read() {
            return;
        }
        // Members that are still missing are no drift.
        if self.tables.any(Table::is_to_be_swept) {
            return;
        }
        let redis_now_ms = self.outbox.redis_now_ms(turn.now);
        let retry = COMPARISON_RETRY.min(Duration::from_millis(every_ms));
        let due = self.tables.ids(|table| table.is_to_be_verified(every_ms, retry, redis_now_ms, turn.now));
        if !due.is_empty() {
            self.compare(None, Heavy::Verify(Repair::Mend), due.into_iter().collect(), turn);
        }
    }

    /// A comparison that cannot be made proves nothing about the table, which stays as it is.
    pub(super) fn not_compared(&mut self, id: TableId, load: LoadId, why: &str, turn: &mut Turn) {
        if !self.tables.get_mut(id).cannot_be_compared(load, turn.now) {
            // Another load has replaced it.
            return;
        }
        turn.orders(LoadOrder::Abandon(id, load));
        self.give_up_chunks(id, turn);
        self.key_reads.forget_comparison(load);
        let operation = self.desk.operation.as_mut().expect("a comparison was requested");
        turn.does(Effect::TableNotCompared { table: id, what: operation.what, why: why.to_owned() });
        operation.impossible(id, self.tables.name(id), why);
        self.desk.end_operation(self.outbox.acknowledged().lsn, turn);
    }

    pub(super) fn table_compared(&mut self, table: TableId, load: &Load, turn: &mut Turn) {
        // The table's load may have begun while the last batch of its comparison was in flight. The request has then
        // been answered accordingly.
        let Some(operation) = &mut self.desk.operation else { return };
        let (what, tally, started) = (operation.what, load.tally, load.started);
        turn.does(Effect::TableCompared { table, what, tally, started });
        operation.ended(table, &tally);
        self.desk.end_operation(self.outbox.acknowledged().lsn, turn);
    }

    /// The table is being loaded now, or cannot be followed.
    pub(super) fn no_longer_compared(&mut self, table: TableId, why: &str, turn: &mut Turn) {
        if let Some(operation) = &mut self.desk.operation {
            operation.lost(table, self.tables.name(table), why);
            self.desk.end_operation(self.outbox.acknowledged().lsn, turn);
        }
    }
}
