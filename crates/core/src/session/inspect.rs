//! Questions that a batch asks Redis before it is written, and their answers.

use crate::command::{EncodedRows, Key};
use crate::format::Format;
use bytes::Bytes;
use std::collections::{HashMap, HashSet};

/// What a batch has to know about keys before it is written.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Inspection {
    /// Keys of which only the type matters. What they hold may not change until the batch is written.
    pub types: Vec<Key>,
    /// Documents that are patched. They are written whole, so it does not matter if they expire meanwhile.
    pub documents: Vec<Key>,
    /// All these documents together. Those that would exceed it are not read.
    pub most_bytes: usize,
}

impl Inspection {
    /// Returns the keys in the order of the answers.
    pub fn keys(&self) -> impl Iterator<Item = &Key> {
        self.types.iter().chain(&self.documents)
    }

    pub fn is_empty(&self) -> bool {
        self.types.is_empty() && self.documents.is_empty()
    }
}

/// What a key holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Probe {
    Hash,
    String,
    RedisJson,
    /// A string that was asked for.
    Document(Bytes),
    /// A string that was asked for, and is too long.
    Unread,
    Absent,
    OtherType,
}

impl Probe {
    /// Whether it is a row of this format.
    pub fn is_row(&self, format: Format) -> bool {
        match (self, format) {
            (Probe::Hash, of) => of == Format::Hash,
            (Probe::String | Probe::Document(_) | Probe::Unread, of) => of == Format::Json,
            (Probe::RedisJson, of) => of == Format::RedisJson,
            (Probe::Absent | Probe::OtherType, _) => false,
        }
    }
}

/// What was in Redis before a batch, as far as it was asked.
#[derive(Debug, Default)]
pub(super) struct Bases {
    /// Keys that hold a row of their table's format.
    pub rows: HashSet<Key>,
    pub documents: HashMap<Key, Bytes>,
}

/// What to compare with Redis.
#[derive(Debug, Clone, Default)]
pub struct Comparison {
    pub rows: EncodedRows,
    /// That of all these rows.
    pub format: Format,
    /// Keys whose rows are skipped.
    pub left_out: HashSet<Key>,
    /// Keys checked for existence only.
    pub keys: Vec<Key>,
}

impl Comparison {
    /// Returns the keys whose rows are compared, each with the RESP that would write its row.
    pub fn asked(&self) -> Vec<(&Key, &[u8])> {
        let (mut asked, mut start) = (Vec::new(), 0);
        for (key, end) in &self.rows.rows {
            if !self.left_out.contains(key) {
                asked.push((key, &self.rows.resp[start..*end]));
            }
            start = *end;
        }
        asked
    }
}

/// How Redis differs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Differences {
    /// Rows without a key.
    pub missing: HashSet<Key>,
    /// Rows whose key holds something else.
    pub stale: HashSet<Key>,
    /// Those of [`Comparison::keys`] that exist.
    pub present: HashSet<Key>,
}
