//! prefetchd keeps a Redis copy of Postgres tables.

pub mod bridge;
pub mod change;
pub mod checkpoint;
pub mod cli;
pub mod command;
pub mod config;
pub mod error;
pub mod http;
pub mod lsn;
pub mod metrics;
pub mod plan;
pub mod progress;
pub mod schema;
pub mod sink;
pub mod source;
pub mod status;
