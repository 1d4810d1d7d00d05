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

pub use slot::{Lane, hash_tag};
