//! A refetch or a verification that is under way: which tables are still to come, and what was found so far. Pure.

use crate::admin::{Answer, Refusal, Repair, Tally};
use crate::lsn::EndLsn;
use crate::schema::TableId;
use std::collections::BTreeSet;
use std::fmt;
use std::time::{Duration, Instant};

/// Who waits for an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct AskId(pub u64);

/// Operations of which there is one at a time. Each compares every row.
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
    /// `None` where nobody asked.
    ask: Option<AskId>,
    pub what: Heavy,
    pub started: Instant,
    pub tally: Tally,
    left: BTreeSet<TableId>,
    /// Why it will not get to its end.
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

    /// Something else has to be done with this table. The others are seen to first.
    pub fn lost(&mut self, table: TableId, name: &str, why: &str) {
        if self.left.remove(&table) {
            let text = format!("the {} of table {name} was given up, since {why}", self.what);
            self.lost = Some(Refusal::Interrupted(text));
        }
    }

    /// This table cannot be compared. The others are seen to first.
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

    /// `at`: where Redis is.
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
