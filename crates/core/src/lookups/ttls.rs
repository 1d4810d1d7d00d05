//! The lists to which loads have given a TTL lately. Each part of it adds members to many of the same lists, and to give a list
//! its TTL costs Redis as much as to add a member.
//!
//! A list that somebody has removed meanwhile, or that has expired while the daemon was frozen for hours in the middle of a
//! load, is made again without one, until it is renewed; after a freeze, the table is loaded again at once.

use crate::command::Key;
use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::{Duration, Instant};

/// More are given their TTL again and again: these take 2 MB at most.
const MOST: usize = 100_000;

#[derive(Debug, Default)]
pub struct ListTtls {
    given: HashSet<ListHash>,
    since: Option<Instant>,
}

/// Stands for the key of a list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ListHash(u64);

impl ListHash {
    pub fn of(list: &Key) -> Self {
        let mut hasher = DefaultHasher::new();
        list.hash(&mut hasher);
        ListHash(hasher.finish())
    }
}

impl ListTtls {
    /// Called before lists of a table with this TTL get theirs. Without a renewal, it would run out in a long load.
    pub fn expire(&mut self, ttl_ms: u64, now: Instant) {
        let least = Duration::from_millis(ttl_ms / 4);
        if self.since.is_none_or(|since| now.saturating_duration_since(since) > least) {
            self.given.clear();
            self.since = Some(now);
        }
    }

    /// Whether this list must be given its TTL.
    pub fn lacks(&mut self, list: ListHash) -> bool {
        match self.given.len() < MOST {
            true => self.given.insert(list),
            false => !self.given.contains(&list),
        }
    }

    /// The list has fewer members now. Without any, Redis removes it together with its TTL.
    pub fn shrinks(&mut self, list: &Key) {
        if !self.given.is_empty() {
            self.given.remove(&ListHash::of(list));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;

    #[test]
    fn a_list_gets_its_ttl_once_in_a_while() {
        let key = |text: &'static str| Key(Bytes::from_static(text.as_bytes()));
        let (a, b) = (ListHash::of(&key("a")), ListHash::of(&key("b")));
        let (mut ttls, start) = (ListTtls::default(), Instant::now());
        ttls.expire(1000, start);
        assert!(ttls.lacks(a) && ttls.lacks(b) && !ttls.lacks(a));
        ttls.shrinks(&key("a"));
        assert!(ttls.lacks(a) && !ttls.lacks(b));
        ttls.expire(1000, start + Duration::from_millis(250));
        assert!(!ttls.lacks(a));
        ttls.expire(1000, start + Duration::from_millis(251));
        assert!(ttls.lacks(a));
    }
}
