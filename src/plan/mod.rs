//! Pure: a change of a row becomes commands for Redis keys.
pub mod batch;
pub mod key;
pub mod mapping;
