//! Pure: what may be confirmed, where to go on, what a snapshot has seen. No async, no I/O, no clock, no log.

pub mod freshness;
pub mod ledger;
pub mod resume;
pub mod visibility;
