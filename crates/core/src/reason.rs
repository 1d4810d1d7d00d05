//! Why a table is loaded: a text for people and, if the load repairs a loss, a label for the metrics.

use std::fmt;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reason {
    /// Shown in logs and in the status.
    pub text: String,
    /// Set if the load was triggered by a loss or a change rather than requested.
    pub heals: Option<Heal>,
}

impl Reason {
    /// A routine load: the first start, a new table, or an operator's request.
    pub fn ordinary(text: impl Into<String>) -> Self {
        Reason { text: text.into(), heals: None }
    }

    pub fn heals(what: Heal, text: impl Into<String>) -> Self {
        Reason { text: text.into(), heals: Some(what) }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// The loss or change that a load repairs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Heal {
    /// The checkpoint is gone, for example after FLUSHALL or a restart with an empty Redis.
    RedisLost,
    /// The checkpoint is older than the last one written: an old RDB file was restored, or Sentinel promoted a replica
    /// that lagged.
    RedisWentBack,
    /// The server's WAL is not the one that was applied: a backup was restored, or a standby that lagged was promoted.
    PostgresWentBack,
    /// The slot or the publication was dropped, or the slot was invalidated.
    SlotLost,
    /// Keys may have expired while nothing renewed them.
    Expired,
    /// The table's columns or its key template changed.
    Schema,
    /// A load or a repair was cut short, or rows were still waiting to be read again.
    Interrupted,
    /// Redis evicted keys.
    Evicted,
    /// An operator skipped a change that Postgres could not send.
    Skipped,
}

impl Heal {
    pub const ALL: [Heal; 9] = [
        Heal::RedisLost,
        Heal::RedisWentBack,
        Heal::PostgresWentBack,
        Heal::SlotLost,
        Heal::Expired,
        Heal::Schema,
        Heal::Interrupted,
        Heal::Evicted,
        Heal::Skipped,
    ];

    pub fn as_str(self) -> &'static str {
        match self {
            Heal::RedisLost => "redis_lost",
            Heal::RedisWentBack => "redis_went_back",
            Heal::PostgresWentBack => "postgres_went_back",
            Heal::SlotLost => "slot_lost",
            Heal::Expired => "expired",
            Heal::Schema => "schema",
            Heal::Interrupted => "interrupted",
            Heal::Evicted => "evicted",
            Heal::Skipped => "skipped",
        }
    }
}
