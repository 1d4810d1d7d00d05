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

// Stand-in.
#[derive(Debug, thiserror::Error)]
#[error("bad checkpoint")]
pub struct BadCheckpoint;

impl Checkpoint {
    pub fn from_json(bytes: &[u8]) -> Result<Self, BadCheckpoint> {
        let v: serde_json::Value = serde_json::from_slice(bytes).map_err(|_| BadCheckpoint)?;
        let s = |k: &str| v[k].as_str().map(str::to_owned).ok_or(BadCheckpoint);
        let lsn = |k: &str| s(k)?.parse().map(EndLsn).map_err(|_| BadCheckpoint);
        let mut tables = BTreeMap::new();
        for (name, t) in v["tables"].as_object().ok_or(BadCheckpoint)? {
            let state = match t["state"].as_str() {
                Some("loaded") => TableState::Loaded,
                Some("loading") => TableState::Loading,
                Some("healing") => TableState::Healing,
                Some("incomplete") => TableState::Incomplete,
                _ => return Err(BadCheckpoint),
            };
            let template = t["template"].as_str().ok_or(BadCheckpoint)?.to_owned();
            let ttl_until_ms = t["ttl_until_ms"].as_u64();
            tables.insert(name.clone(), TableMark { template, fingerprint: 0, state, ttl_until_ms });
        }
        Ok(Self {
            system_id: s("system_id")?,
            timeline: 1,
            database: s("database")?,
            lsn: lsn("lsn")?,
            epoch: v["epoch"].as_u64().ok_or(BadCheckpoint)?,
            seq: v["seq"].as_u64().ok_or(BadCheckpoint)?,
            creating_slot: false,
            within: None,
            last: None,
            beat_ms: v["beat_ms"].as_u64().ok_or(BadCheckpoint)?,
            base: lsn("base")?,
            slot_snapshot: None,
            made_publication: false,
            tables,
        })
    }

    pub fn to_json(&self) -> Vec<u8> {
        let state = |s| match s {
            TableState::Loaded => "loaded",
            TableState::Loading => "loading",
            TableState::Healing => "healing",
            TableState::Incomplete => "incomplete",
        };
        let tables: serde_json::Map<String, serde_json::Value> = self
            .tables
            .iter()
            .map(|(n, t)| {
                (
                    n.clone(),
                    serde_json::json!({"template": t.template, "state": state(t.state), "ttl_until_ms": t.ttl_until_ms}),
                )
            })
            .collect();
        serde_json::json!({"system_id": self.system_id, "database": self.database, "lsn": self.lsn.to_string(),
            "epoch": self.epoch, "seq": self.seq, "beat_ms": self.beat_ms, "base": self.base.to_string(), "tables": tables})
        .to_string()
        .into_bytes()
    }
}
