//! Turns changes of rows into commands for Redis keys. Pure: no async, no I/O, no clock, no log.

pub mod key;
pub mod key_states;
pub mod mapping;
pub mod order;
