//! What is to become of a Redis key: the words between the plan and the writer.

use crate::change::{PartialRow, Row};
use crate::schema::Layout;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::sync::Arc;

/// A whole Redis key, prefix included.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key(pub Bytes);

impl Key {
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0.escape_ascii())
    }
}

/// One step of a batch. Steps of a batch happen at once, and in this order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// The hash becomes exactly this row, with a full TTL.
    Put {
        key: Key,
        layout: Arc<Layout>,
        row: Row,
    },
    /// The hash at `key` becomes the one that lay at `base` when the batch began, with the known cells of `row` written
    /// over it, and a full TTL. Only after [`Command::Keep`] where `base` is another key, and only for a base that
    /// was seen to be a hash under WATCH.
    Merge {
        key: Key,
        base: Base,
        layout: Arc<Layout>,
        row: PartialRow,
    },
    /// Puts a copy of the hash at `key` aside, as number `slot`, before anything in the batch changes it.
    Keep {
        key: Key,
        slot: u32,
    },
    Delete {
        key: Key,
    },
    /// A full TTL for whatever lies there; nothing where nothing does.
    Renew {
        key: Key,
        ttl_ms: u64,
    },
    /// An entry in the dead-letter stream.
    DeadLetter(DeadLetter),
    /// Records that the row at `key` is a dead letter, so that nobody is told that it does not exist.
    Remember {
        key: Key,
        dead: DeadKey,
    },
    /// Removes that record. Nothing happens where there is none.
    Forget {
        key: Key,
    },
    /// The table's entry of the checkpoint, which lies in a hash beside it.
    Enter {
        table: String,
        entry: Vec<u8>,
    },
}

/// Where a [`Command::Merge`] finds the cells that it does not have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Base {
    /// In the hash at the same key.
    SameKey,
    /// In the copy that [`Command::Keep`] put aside under this number.
    Kept(u32),
}

/// Something that cannot become a row, for the dead-letter stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeadLetter {
    pub table: String,
    /// As far as there is one.
    pub key: Bytes,
    pub lsn: String,
    pub xid: u32,
    pub reason: String,
    /// The row as JSON; empty where it cannot be had.
    pub row: Bytes,
}

/// What is recorded of a row that Postgres has and Redis cannot hold, under the row's key, for as long as that is so.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeadKey {
    /// The table's name in the configuration.
    pub table: String,
    /// A code, as in the metrics.
    pub reason: String,
    /// Of the transaction that wrote the row; where a load found it, the position that was applied by then.
    pub lsn: String,
}

impl DeadKey {
    pub fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("strings have a JSON form")
    }

    /// A record that cannot be read is one all the same.
    pub fn from_json(bytes: &[u8]) -> Self {
        serde_json::from_slice(bytes).unwrap_or_else(|_| DeadKey {
            table: String::new(),
            reason: "unknown".to_owned(),
            lsn: String::new(),
        })
    }
}

/// A row that a load has read and that Redis cannot hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unwritable {
    pub key: Key,
    /// Of [`DeadKey::reason`].
    pub code: &'static str,
    pub letter: DeadLetter,
}

/// Rows of one chunk of a load, encoded for Redis before the writer sees them.
#[derive(Debug, Clone, Default)]
pub struct EncodedRows {
    /// The RESP of all rows, one after the other.
    pub resp: Bytes,
    /// Each row's key, and where its RESP ends (exclusive).
    pub rows: Vec<(Key, usize)>,
    /// Redis commands, and so replies, for each row.
    pub commands: Vec<u8>,
    /// Fields of a row, at most.
    pub fields: usize,
}

impl EncodedRows {
    pub fn weight(&self) -> usize {
        let commands = self.commands.iter().map(|commands| usize::from(*commands)).sum();
        weight(self.resp.len(), commands, self.fields * self.rows.len())
    }
}

/// What Redis keeps for a queued command beside its arguments: an entry of the transaction, whose table grows by doubling,
/// a pointer for each argument, and the replies.
const COMMAND_WEIGHT: usize = 96;
/// A pointer takes 8 bytes, and an argument's head in RESP at least 6: for a field's name and its value.
const FIELD_WEIGHT: usize = 4;

/// At most what Redis counts for a client that has queued these commands between MULTI and EXEC, for
/// `client-query-buffer-limit` and `maxmemory-clients`. `resp_bytes`: what is sent. (`getClientMemoryUsage` and
/// `queueMultiCommand` in networking.c and multi.c of Redis 7 and 8.)
pub fn weight(resp_bytes: usize, commands: usize, fields: usize) -> usize {
    resp_bytes + commands * COMMAND_WEIGHT + fields * FIELD_WEIGHT
}

/// Of a command with one key and little else: DEL or PEXPIRE.
pub fn weight_of_key(key: &Key) -> usize {
    weight(KEY_COMMAND_BYTES + key.as_bytes().len(), 1, 0)
}

/// `*3 $7 PEXPIRE $n key $19 milliseconds`, with line ends.
const KEY_COMMAND_BYTES: usize = 64;

/// What a change does, as it is counted and shown.
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
