//! Remembers the keys of the rows that a load has read and written. A key in Redis that is among them is no orphan, so
//! Postgres need not be asked about it: had its row been deleted since, the stream would say so. Rows that leave a table
//! without a message in the stream (DETACH PARTITION, TRUNCATE of a partition) change the catalog, which has the table
//! loaded again.
//!
//! Only rows of chunks that were judged good count. A chunk that must be read again may have seen rows that were deleted
//! before the place where the stream begins.
//!
//! A key is remembered as a hash of 64 bits, keyed at random: that one of a million keys hides an orphan has a probability
//! of 1 in 10^13, and the next comparison hashes them differently.

use crate::command::Key;
use std::collections::HashSet;
use std::hash::{BuildHasher, RandomState};

#[derive(Default)]
pub(super) struct ReadKeys {
    hasher: RandomState,
    hashes: HashSet<u64>,
}

impl ReadKeys {
    pub fn len(&self) -> usize {
        self.hashes.len()
    }

    /// Returns what [`Self::add`] takes.
    pub fn hashes<'k>(&self, keys: impl Iterator<Item = &'k Key>) -> Vec<u64> {
        keys.map(|key| self.hasher.hash_one(key.as_bytes())).collect()
    }

    /// Remembers at most `room` of these keys.
    pub fn add(&mut self, hashes: Vec<u64>, room: usize) {
        self.hashes.extend(hashes.into_iter().take(room));
    }

    pub fn has(&self, key: &Key) -> bool {
        self.hashes.contains(&self.hasher.hash_one(key.as_bytes()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(n: usize) -> Key {
        Key(format!("cache:item:{n}").into())
    }

    #[test]
    fn has_what_was_added_up_to_its_limit() {
        let mut read = ReadKeys::default();
        let keys: Vec<Key> = (0..100).map(key).collect();
        read.add(read.hashes(keys[..50].iter()), 1_000);
        assert!(read.has(&keys[49]) && !read.has(&keys[50]));
        read.add(read.hashes(keys[50..].iter()), 25);
        assert_eq!(read.len(), 75);
        assert!(keys[..75].iter().all(|key| read.has(key)));
        assert!(!keys[75..].iter().any(|key| read.has(key)));
    }
}
