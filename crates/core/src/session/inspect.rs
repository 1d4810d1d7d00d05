//! Questions that a batch asks Redis before it is written, and their answers.

use crate::command::{EncodedRows, Key};
use std::collections::HashSet;

/// What a key holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Probe {
    Hash,
    Absent,
    OtherType,
}

/// What to compare with Redis.
#[derive(Debug, Clone, Default)]
pub struct Comparison {
    pub rows: EncodedRows,
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
