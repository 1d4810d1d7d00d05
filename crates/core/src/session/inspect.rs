//! Questions to Redis that a batch asks before it is written, and their answers.

use crate::command::{EncodedRows, Key};
use std::collections::HashSet;

/// What lies at a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Probe {
    Hash,
    Absent,
    OtherType,
}

/// What is to be compared with Redis.
#[derive(Debug, Clone, Default)]
pub struct Comparison {
    pub rows: EncodedRows,
    /// Rows of these keys are not looked at.
    pub left_out: HashSet<Key>,
    /// Keys of which only matters whether there is anything.
    pub keys: Vec<Key>,
}

/// How Redis differs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Differences {
    /// Rows without a key.
    pub missing: HashSet<Key>,
    /// Rows whose key holds something else.
    pub stale: HashSet<Key>,
    /// Those of [`Comparison::keys`] that are there.
    pub present: HashSet<Key>,
}
