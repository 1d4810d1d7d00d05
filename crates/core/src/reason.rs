//! Why a table is loaded: for people, and where something was lost, for metrics.

use std::fmt;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reason {
    /// What logs and the status show.
    pub text: String,
    /// Set where something was lost or changed without anybody asking for a load.
    pub heals: Option<Heal>,
}

impl Reason {
    /// All in a day's work: a first start, a new table, somebody asked.
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

/// What a load makes good.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Heal {
    /// The checkpoint is gone: FLUSHALL, an empty Redis.
    RedisLost,
    /// The checkpoint is older than it was: an old RDB file, a failover to a replica that lagged.
    RedisWentBack,
    /// The server's history is not the one that was applied: restored, or failed over to a standby that lagged.
    PostgresWentBack,
    /// The slot or the publication vanished, or the slot was invalidated.
    SlotLost,
    /// Keys may have expired while nothing renewed them.
    Expired,
    /// The table's shape or key template changed.
    Schema,
    /// A load or a repair did not come to its end, or rows were waiting to be read again.
    Interrupted,
    /// Redis removed keys to make room.
    Evicted,
    /// An operator went past a change that Postgres could not send.
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
