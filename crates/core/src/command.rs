//! What should happen to a Redis key: the vocabulary between the plan and the writer.

use crate::change::{Begin, PartialRow, Row};
use crate::lookups::ttls::ListHash;
use crate::lookups::{ListKind, Score, Values};
use crate::schema::Layout;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::sync::Arc;

/// A complete Redis key, prefix included.
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

/// One command of a batch. A batch is atomic, and its commands run in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Replaces whatever is at `key` with exactly this row, and sets the full TTL.
    Put {
        key: Key,
        layout: Arc<Layout>,
        row: Row,
    },
    /// Replaces whatever is at `key` with this document, and sets the full TTL.
    PutDocument {
        key: Key,
        document: Bytes,
        ttl_ms: u64,
    },
    /// Turns the hash at `key` into the hash that was at `base` when the batch began, overwritten with the known cells
    /// of `row`, and sets the full TTL. Allowed only if `base` was seen to be a hash under WATCH; if `base` is another
    /// key, [`Command::Keep`] must come first.
    Merge {
        key: Key,
        base: Base,
        layout: Arc<Layout>,
        row: PartialRow,
    },
    /// Copies the hash at `key` to temporary key number `slot`, before anything in the batch changes it.
    Keep {
        key: Key,
        slot: u32,
    },
    Delete {
        key: Key,
    },
    /// Adds members to the set at `key`, or to the sorted set if they have scores, and sets the full TTL.
    Join {
        key: Key,
        members: Vec<(Bytes, Option<Score>)>,
        ttl_ms: u64,
    },
    /// Removes members.
    Leave {
        key: Key,
        kind: ListKind,
        members: Vec<Bytes>,
    },
    /// Sets the full TTL if the key exists.
    Renew {
        key: Key,
        ttl_ms: u64,
    },
    /// Appends an entry to the dead-letter stream.
    DeadLetter(DeadLetter),
    /// Appends an entry to the change stream, which must be configured.
    Announce(Announcement),
    /// Records that the row at `key` is a dead letter, so that reads do not report it as nonexistent.
    Remember {
        key: Key,
        dead: DeadKey,
    },
    /// Removes that record, if there is one.
    Forget {
        key: Key,
    },
    /// Writes the table's entry of the checkpoint, which is kept in a hash of its own.
    Enter {
        table: String,
        entry: Vec<u8>,
    },
}

/// Where a [`Command::Merge`] takes the cells from that its row leaves out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Base {
    /// In the hash at the same key.
    SameKey,
    /// The copy that [`Command::Keep`] made under this number.
    Kept(u32),
}

/// A row that Redis cannot hold, for the dead-letter stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeadLetter {
    pub table: String,
    /// Empty if the row has no key.
    pub key: Bytes,
    pub lsn: String,
    pub xid: u32,
    pub reason: String,
    /// The row as JSON; empty if it is not available.
    pub row: Bytes,
}

/// An entry of the change stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Announcement {
    pub op: Announced,
    /// The table's name in the configuration.
    pub table: String,
    /// Empty if it is about the whole table.
    pub key: Bytes,
    /// The transaction that changed the row last. `None` for [`Announced::Loaded`].
    pub by: Option<Begin>,
}

/// What consumers of the change stream are told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Announced {
    Upsert,
    Delete,
    Truncate,
    /// A load or a repair has changed rows of the table. What a consumer knew of it may be wrong.
    Loaded,
}

impl Announced {
    pub fn as_str(self) -> &'static str {
        match self {
            Announced::Upsert => "upsert",
            Announced::Delete => "delete",
            Announced::Truncate => "truncate",
            Announced::Loaded => "loaded",
        }
    }
}

/// The record of a row that Postgres has and Redis cannot hold. It is kept under the row's key for as long as that is
/// so.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeadKey {
    /// The table's name in the configuration.
    pub table: String,
    /// A code, the same as in the metrics.
    pub reason: String,
    /// The LSN of the transaction that wrote the row or, if a load found the row, the position that was applied at that
    /// time.
    pub lsn: String,
}

impl DeadKey {
    pub fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("strings have a JSON form")
    }

    /// A record that cannot be parsed still counts as a record.
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
    /// The code for [`DeadKey::reason`].
    pub code: &'static str,
    pub letter: DeadLetter,
}

/// The rows of one chunk, encoded for Redis before they reach the writer.
#[derive(Debug, Clone, Default)]
pub struct EncodedRows {
    /// The RESP of all rows, one after the other.
    pub resp: Bytes,
    /// Each row's key, and the offset in `resp` where the row ends (exclusive).
    pub rows: Vec<(Key, usize)>,
    /// The number of Redis commands, and so of replies, of each row.
    pub commands: Vec<u8>,
    /// The most fields that any row has.
    pub fields: usize,
    /// What each row has of the fields of lookups; empty if the table has no lookups.
    pub values: Vec<Values>,
    /// An upper bound for the weight of the rows' memberships.
    pub members_weight: usize,
    /// Set if the table had no rows in Redis.
    pub members: Option<Box<EncodedMembers>>,
}

/// The commands that add all rows to their lists, for rows that Redis does not have.
#[derive(Debug, Clone, Default)]
pub struct EncodedMembers {
    /// The RESP of all commands: for each list, members are added, then it gets its TTL.
    pub resp: Bytes,
    pub lists: Vec<EncodedList>,
    /// How many are added, to all lists together.
    pub members: usize,
}

/// Where the commands for one list end, in [`EncodedMembers::resp`]. The next one's begin there.
#[derive(Debug, Clone, Copy)]
pub struct EncodedList {
    pub list: ListHash,
    pub added: usize,
    pub end: usize,
}

impl EncodedRows {
    pub fn weight(&self) -> usize {
        let commands = self.commands.iter().map(|commands| usize::from(*commands)).sum();
        weight(self.resp.len(), commands, self.fields * self.rows.len()) + self.members_weight
    }
}

/// Bytes that Redis keeps for a queued command besides its arguments: an entry of the transaction, whose table grows by
/// doubling, a pointer for each argument, and the replies.
const COMMAND_WEIGHT: usize = 96;
/// A pointer takes 8 bytes, and an argument's RESP header at least 6. Counted for a field's name and its value.
const FIELD_WEIGHT: usize = 4;

/// An upper bound in bytes of what Redis counts for a client that has queued these commands between MULTI and EXEC, for
/// `client-query-buffer-limit` and `maxmemory-clients`. `resp_bytes` is the size of the request. (See
/// `getClientMemoryUsage` in networking.c and `queueMultiCommand` in multi.c of Redis 7 and 8.)
pub fn weight(resp_bytes: usize, commands: usize, fields: usize) -> usize {
    resp_bytes + commands * COMMAND_WEIGHT + fields * FIELD_WEIGHT
}

/// The weight of a command with one key and little else, such as DEL or PEXPIRE.
pub fn weight_of_key(key: &Key) -> usize {
    weight(KEY_COMMAND_BYTES + key.as_bytes().len(), 1, 0)
}

/// The weight of a [`Command::PutDocument`].
pub fn weight_of_document(key: &Key, document_bytes: usize) -> usize {
    weight_of_key(key) + document_bytes
}

/// `*3 $7 PEXPIRE $n key $19 milliseconds`, with its line ends.
const KEY_COMMAND_BYTES: usize = 64;

/// The kind of a change, as counted and shown.
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
