//! A refetch or verification in progress: which tables remain, and what was found so far. Pure.

use crate::admin::{Answer, Refusal, Repair, Tally};
use crate::lsn::EndLsn;
use crate::schema::TableId;
use std::collections::BTreeSet;
use std::fmt;
use std::time::{Duration, Instant};

/// Identifies a request that waits for an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct AskId(pub u64);

/// Operations that compare every row. Only one runs at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Heavy {
    Refetch,
    Verify(Repair),
}

impl Heavy {
    pub fn repair(self) -> Repair {
        match self {
            Heavy::Refetch => Repair::Mend,
            Heavy::Verify(repair) => repair,
        }
    }

    pub fn as_str(self) -> &'static str {
        match self {
            Heavy::Refetch => "refetch",
            Heavy::Verify(Repair::Mend) => "verify with repair",
            Heavy::Verify(Repair::OnlyCount) => "verify",
        }
    }
}

impl fmt::Display for Heavy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

pub struct Running {
    /// `None` for a scheduled operation.
    ask: Option<AskId>,
    pub what: Heavy,
    pub started: Instant,
    pub tally: Tally,
    left: BTreeSet<TableId>,
    /// Why it cannot be completed.
    lost: Option<Refusal>,
}

impl Running {
    pub fn new(ask: Option<AskId>, what: Heavy, tables: BTreeSet<TableId>, now: Instant) -> Self {
        Running { ask, what, started: now, tally: Tally::default(), left: tables, lost: None }
    }

    pub fn ended(&mut self, table: TableId, found: &Tally) {
        self.left.remove(&table);
        self.tally.add(found);
    }

    /// The table has to be loaded instead. The other tables are completed first.
    pub fn lost(&mut self, table: TableId, name: &str, why: &str) {
        if self.left.remove(&table) {
            let text = format!("the {} of table {name} was given up, because {why}", self.what);
            self.lost = Some(Refusal::Interrupted(text));
        }
    }

    /// The table cannot be compared. The other tables are completed first.
    pub fn impossible(&mut self, table: TableId, name: &str, why: &str) {
        if self.left.remove(&table) {
            let text = format!("the {} of table {name} was given up, and the table stays as it is: {why}", self.what);
            self.lost = Some(Refusal::NotCompared(text));
        }
    }

    pub fn is_over(&self) -> bool {
        self.left.is_empty()
    }

    pub fn is_whole(&self) -> bool {
        self.lost.is_none()
    }

    /// `at` is the position that Redis has reached.
    pub fn answer(self, at: EndLsn, elapsed: Duration) -> Option<(AskId, Result<Answer, Refusal>)> {
        let tally = self.tally;
        let answer = match (self.lost, self.what) {
            (Some(refusal), _) => Err(refusal),
            (None, Heavy::Refetch) => Ok(Answer::Refetched { tally, elapsed }),
            (None, Heavy::Verify(_)) => Ok(Answer::Verified { tally, lsn: at, elapsed }),
        };
        Some((self.ask?, answer))
    }
}
