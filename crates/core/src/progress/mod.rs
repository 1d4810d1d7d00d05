//! Decides what may be confirmed, where to resume, and what a snapshot has seen. Pure: no async, no I/O, no clock, no
//! log.

pub mod freshness;
pub mod ledger;
pub mod redelivery;
pub mod resume;
pub mod visibility;
