//! What is specific to Redis Cluster: lanes. A lane is a hash slot that holds, or held, keys of prefetchd.

pub mod book;
pub mod mark;
mod news;
pub mod reading;
pub mod record;
mod refresh;
pub mod script;
mod slot;
pub mod split;
pub mod tags;
#[cfg(test)]
mod world;

use crate::resp::batch::OwnKeys;
use std::collections::BTreeSet;
use std::sync::Arc;

pub use slot::{Lane, hash_tag};

/// Lanes that have lost something, while nothing is wrong with the others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lost {
    pub lanes: Arc<BTreeSet<Lane>>,
    pub because: String,
}

impl Lost {
    pub fn count(&self) -> u16 {
        count(&self.lanes)
    }
}

/// The lane of the change stream, if there is one.
pub fn lane_of_stream(own: &OwnKeys) -> Option<Lane> {
    own.changes().map(|stream| Lane::of(stream.key.as_bytes()))
}

/// How many lanes these are.
pub fn count(lanes: &BTreeSet<Lane>) -> u16 {
    u16::try_from(lanes.len()).expect("there are no more than hash slots")
}
