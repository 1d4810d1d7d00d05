//! What is to become of a Redis key: the words between the plan and the writer.

use crate::change::{PartialRow, Row};
use crate::schema::Layout;
use bytes::Bytes;
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
    DeadLetter(DeadLetter),
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

/// Rows of one chunk of a load, encoded for Redis before the writer sees them.
#[derive(Debug, Clone, Default)]
pub struct EncodedRows {
    /// The RESP of all rows, one after the other.
    pub resp: Bytes,
    /// Each row's key, and where its RESP ends (exclusive).
    pub rows: Vec<(Key, usize)>,
    /// Redis commands, and so replies, for each row.
    pub commands: Vec<u8>,
}
