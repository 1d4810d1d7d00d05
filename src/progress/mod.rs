//! Pure: what may be confirmed, where to go on, what a snapshot has seen.
pub mod ledger;
pub mod resume;
pub mod visibility;
