//! Pure: a change of a row becomes commands for Redis keys. No async, no I/O, no clock, no log.

pub mod key;
pub mod key_states;
pub mod mapping;
