//! What an operator may ask of a running daemon, and what it answers. Data, no I/O: HTTP asks, the bridge answers.

use crate::command::Key;
use crate::lsn::{EndLsn, Lsn};
use crate::schema::TableId;
use std::time::Duration;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Operation {
    /// Nothing more is applied from when this is answered, until [`Operation::Resume`] or a restart.
    Pause,
    Resume,
    /// Every row is compared with Postgres and made right, none disappears meanwhile.
    Refetch(Scope),
    Verify(Scope, Repair),
    /// Removes these keys (whole Redis keys) from the cache, where they are missed until the table is loaded again.
    Invalidate(TableId, Vec<Key>),
    /// Removes all keys of a table.
    Clear(TableId),
    /// Go past the transaction at which decoding fails, then load every table.
    Skip(Lsn),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    All,
    Table(TableId),
}

/// What becomes of a difference that was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Repair {
    Mend,
    OnlyCount,
}

/// What a walk over tables found.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tally {
    /// Rows in Postgres.
    pub rows: u64,
    /// Rows without a key in Redis.
    pub missing: u64,
    /// Keys that show something else than their row.
    pub stale: u64,
    /// Keys without a row.
    pub orphaned: u64,
    /// How many of the three kinds were mended.
    pub repaired: u64,
}

impl Tally {
    /// Keys under the tables' prefixes, as they were found.
    pub fn keys(&self) -> u64 {
        (self.rows + self.orphaned).saturating_sub(self.missing)
    }

    pub fn drift(&self) -> u64 {
        self.missing + self.stale + self.orphaned
    }

    pub fn add(&mut self, other: &Tally) {
        self.rows += other.rows;
        self.missing += other.missing;
        self.stale += other.stale;
        self.orphaned += other.orphaned;
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
    /// A new slot is made, beyond the change, and every table loaded.
    Skipped,
}

/// Why an operation is not done.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("{0}: wait for its end")]
    Busy(String),
    #[error("applying is paused: resume first")]
    Paused,
    #[error("{0}")]
    NotNow(String),
    /// It began, and did not get to its end. What it had mended stays mended.
    #[error("{0}: ask again")]
    Interrupted(String),
    /// A comparison that cannot be made: the table stays as it is. What it had mended stays mended.
    #[error("{0}")]
    NotCompared(String),
    /// There is nothing of the kind to be done.
    #[error("{0}")]
    Pointless(String),
}
