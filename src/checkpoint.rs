//! The checkpoint: what lies in Redis beside the data, written in the same MULTI/EXEC, and what can be told from it
//! after anything at all has happened.
//!
//! The format is settled: fields may be added, none may change its meaning. Readers ignore what they do not know.

use crate::change::CommitTime;
use crate::lsn::{CommitLsn, EndLsn};
use std::collections::BTreeMap;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checkpoint {
    pub system_id: String,
    pub timeline: u32,
    pub database: String,
    /// Everything before it is in Redis, for every table that is `loaded`. While the slot is still being made, the
    /// server's position just before.
    pub lsn: EndLsn,
    /// Rises with every start and takeover.
    pub epoch: u64,
    /// Rises with every batch, so that no two checkpoints are ever equal.
    pub seq: u64,
    /// The slot is being created: whether it exists is not known, and its exported snapshot was not kept.
    pub creating_slot: bool,
    /// A transaction over the atomic limits is half applied; `lsn` is the end of the one before.
    pub within: Option<Within>,
    /// The last applied transaction that changed anything. It must come by again where it ends beyond what the slot has
    /// confirmed; if it does not, Postgres went back.
    pub last: Option<LastTransaction>,
    /// When this was written: Redis TIME, milliseconds since the Unix epoch.
    pub beat_ms: u64,
    /// From here on this Redis has every change of the stream.
    pub base: EndLsn,
    /// What the slot's exported snapshot saw (`xmin:xmax:xip,…`), until the first load has ended.
    pub slot_snapshot: Option<String>,
    /// The publication was made by prefetchd, which may therefore change and drop it.
    pub made_publication: bool,
    /// By the table's name in the configuration.
    pub tables: BTreeMap<String, TableMark>,
}

/// How far a transaction over the atomic limits has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Within {
    pub commit: CommitLsn,
    /// Changes of it that are in Redis, counted as delivered, whatever table they belong to.
    pub changes_done: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LastTransaction {
    pub end: EndLsn,
    pub xid: u32,
    pub time: CommitTime,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TableMark {
    /// The key template, as written: keys of an earlier one are orphans.
    pub template: String,
    /// Of the mapping that the hashes were written with. Changes when a load under a new mapping has ended.
    pub fingerprint: u64,
    pub state: TableState,
    /// Every row's TTL reaches at least until then: Redis TIME, milliseconds since the Unix epoch. `None` before the
    /// first load has ended.
    pub ttl_until_ms: Option<u64>,
}

/// What a reader may think of a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TableState {
    /// Whole: a missing key is a row that does not exist.
    Loaded,
    /// Being filled. What is there is right, what is not there means nothing.
    Loading,
    /// Redis or Postgres lost something: what is there may be old.
    Healing,
    /// Some keys are waiting to be read again. What is there is right.
    Incomplete,
}

/// The replication slot, as `pg_replication_slots` shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SlotState {
    Absent,
    /// Postgres removed WAL that it needs, or gave it up for another reason. It can only be dropped.
    Invalidated {
        reason: String,
    },
    Ready {
        /// `confirmed_flush_lsn`: where the stream starts.
        confirmed: EndLsn,
        /// The walsender that holds it.
        active_pid: Option<i32>,
    },
}
