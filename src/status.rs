//! What the daemon knows of itself: one value, written by the bridge, read by everybody else through a watch channel.
//!
//! Nothing here is more than a copy. What a read may promise comes from the checkpoint that is read with it.

use crate::checkpoint::TableState;
use crate::lsn::{EndLsn, Lsn};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

/// What the daemon is doing. One at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum State {
    Connecting,
    Standby,
    Loading,
    CatchingUp,
    Streaming,
    Healing,
    Stalled,
    Stopping,
}

impl State {
    pub const ALL: [State; 8] = [
        State::Connecting,
        State::Standby,
        State::Loading,
        State::CatchingUp,
        State::Streaming,
        State::Healing,
        State::Stalled,
        State::Stopping,
    ];

    pub fn as_str(self) -> &'static str {
        match self {
            State::Connecting => "connecting",
            State::Standby => "standby",
            State::Loading => "loading",
            State::CatchingUp => "catching_up",
            State::Streaming => "streaming",
            State::Healing => "healing",
            State::Stalled => "stalled",
            State::Stopping => "stopping",
        }
    }
}

#[derive(Debug, Clone)]
pub struct Status {
    pub state: State,
    /// Why it does not go on: a server that is not up, a pid that blocks slot creation, what Redis refuses.
    pub waiting_for: Option<String>,
    pub paused: bool,
    pub started: Instant,
    /// Known after the first contact with Postgres.
    pub source: Option<Source>,
    pub received: Option<EndLsn>,
    pub applied: Option<EndLsn>,
    pub confirmed: Option<EndLsn>,
    /// The server's flushed position, by the last sample.
    pub server: Option<Lsn>,
    /// When Postgres last said anything at all.
    pub last_contact: Option<Instant>,
    /// When the newest sample whose position is applied was taken: what is in Redis was right then.
    pub fresh_as_of: Option<Instant>,
    /// Commit time of the oldest transaction that is received and not applied.
    pub oldest_unapplied: Option<SystemTime>,
    /// The checkpoint as this daemon last wrote or (as a standby) read it. Reads compare theirs with it.
    pub epoch: u64,
    pub seq: u64,
    /// In the order of the configuration.
    pub tables: Vec<TableStatus>,
    pub sync_lag: SyncLag,
    pub dead_letters: u64,
    pub primary_reads: u64,
    pub last_load: Option<LastLoad>,
    pub slot_retained_bytes: Option<u64>,
    pub slot_limit_bytes: Option<u64>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    pub system_id: String,
    pub timeline: u32,
    pub database: String,
    pub slot: String,
    pub publication: String,
    pub wal_segment_bytes: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TableStatus {
    pub name: Arc<str>,
    /// `schema.table`
    pub table: Arc<str>,
    /// `None` before the checkpoint was read.
    pub state: Option<TableState>,
    /// Rows written by loads.
    pub prefetched: u64,
    pub upserts: u64,
    pub deletes: u64,
    pub truncates: u64,
    /// Rows read so far by a load that is under way, and how many there may be.
    pub load_progress: Option<(u64, u64)>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct SyncLag {
    pub avg_ms: Option<f64>,
    pub p50_ms: Option<f64>,
    pub p99_ms: Option<f64>,
    pub count: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LastLoad {
    pub rows: u64,
    pub elapsed: Duration,
    pub lsn: EndLsn,
    pub reason: String,
}

/// One applied change, for `tail` and the event stream: no values.
#[derive(Debug, Clone, PartialEq)]
pub struct ChangeEvent {
    pub at: SystemTime,
    pub table: Arc<str>,
    pub op: Op,
    /// Redis key, lossily as text. Empty for a TRUNCATE.
    pub key: String,
    /// Commit in Postgres to acknowledged by Redis.
    pub lag: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Op {
    Upsert,
    Delete,
    Truncate,
}

impl Op {
    pub fn as_str(self) -> &'static str {
        match self {
            Op::Upsert => "upsert",
            Op::Delete => "delete",
            Op::Truncate => "truncate",
        }
    }
}
