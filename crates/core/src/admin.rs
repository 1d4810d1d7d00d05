//! The requests that an operator can make of a running daemon, and their answers. Data only: HTTP asks, the bridge
//! answers.

use crate::command::Key;
use crate::lsn::{EndLsn, Lsn};
use crate::schema::TableId;
use std::time::Duration;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Operation {
    /// Once this is answered, nothing more is applied until [`Operation::Resume`] or a restart.
    Pause,
    Resume,
    /// Compares every row with Postgres and corrects what differs. No row disappears meanwhile.
    Refetch(Scope),
    Verify(Scope, Repair),
    /// Removes these keys (complete Redis keys) from the cache. They stay missing until the table is loaded again.
    Invalidate(TableId, Vec<Key>),
    /// Removes all keys of a table.
    Clear(TableId),
    /// Skips the transaction that cannot be decoded, then loads every table.
    Skip(Lsn),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    All,
    Table(TableId),
}

/// What to do with a difference between Redis and Postgres.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Repair {
    Mend,
    OnlyCount,
}

/// What a comparison of tables found.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tally {
    /// Rows in Postgres.
    pub rows: u64,
    /// Rows without a key in Redis.
    pub missing: u64,
    /// Keys whose value differs from their row.
    pub stale: u64,
    /// Keys without a row.
    pub orphaned: u64,
    /// Members of lookups that are missing, too many, or have another score than their row gives.
    pub lookups: u64,
    /// How many differences of all four kinds were repaired.
    pub repaired: u64,
}

/// How a key differs from Postgres.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DriftKind {
    Missing,
    Stale,
    Orphaned,
}

impl DriftKind {
    pub fn as_str(self) -> &'static str {
        match self {
            DriftKind::Missing => "missing",
            DriftKind::Stale => "stale",
            DriftKind::Orphaned => "orphaned",
        }
    }
}

impl Tally {
    /// Keys under the tables' prefixes, as they were before any repair.
    pub fn keys(&self) -> u64 {
        (self.rows + self.orphaned).saturating_sub(self.missing)
    }

    pub fn drift(&self) -> u64 {
        self.missing + self.stale + self.orphaned + self.lookups
    }

    pub fn add(&mut self, other: &Tally) {
        self.rows += other.rows;
        self.missing += other.missing;
        self.stale += other.stale;
        self.orphaned += other.orphaned;
        self.lookups += other.lookups;
        self.repaired += other.repaired;
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    Paused,
    Resumed,
    Refetched {
        tally: Tally,
        elapsed: Duration,
    },
    /// Exact at `lsn`.
    Verified {
        tally: Tally,
        lsn: EndLsn,
        elapsed: Duration,
    },
    Deleted(u64),
    /// The slot was created again, past the change, and every table is loaded.
    Skipped,
}

/// Why an operation was refused or could not be completed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("{0}: wait for its end")]
    Busy(String),
    #[error("applying is paused: resume first")]
    Paused,
    #[error("{0}")]
    NotNow(String),
    /// The operation began but was cut short. Repairs that were made stay.
    #[error("{0}: ask again")]
    Interrupted(String),
    /// The table cannot be compared, and is left as it is. Repairs that were made stay.
    #[error("{0}")]
    NotCompared(String),
    /// There is nothing for the operation to do.
    #[error("{0}")]
    Pointless(String),
}
