//! What is specific to Redis Cluster: lanes. A lane is a hash slot that holds, or held, keys of prefetchd.

mod slot;

pub use slot::Lane;
