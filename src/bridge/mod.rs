//! The only layer that sees both ends.
//!
//! [`mod@supervise`] works one session after the other: it begins ([`bootstrap`]), is worked ([`apply`]) until something
//! ends it, and begins again through the resume table. Within a session, [`crate::session`] decides and the others
//! perform: [`load`] reads chunks, [`renew`] walks over the TTLs. It must not know SQL text, wire bytes or HTTP.

pub mod apply;
pub mod bootstrap;
mod capacity;
pub mod catalog;
pub mod connections;
pub mod context;
pub mod durable;
pub mod evictions;
pub mod load;
mod prerequisites;
pub mod renew;
pub mod room;
pub mod standby;
pub mod supervise;
pub mod walk;

use crate::error::Disposition;
use crate::sink::SinkError;
use crate::source::SourceError;
use std::time::Duration;

/// What ends a session, or keeps one from beginning.
#[derive(Debug, thiserror::Error)]
pub enum BridgeError {
    #[error("postgres: {0}")]
    Source(#[from] SourceError),
    #[error("redis: {0}")]
    Sink(#[from] SinkError),
    /// A setting and the servers do not fit.
    #[error("{0}")]
    Setup(String),
    /// Another Postgres than the checkpoint's.
    #[error("{0}")]
    Refused(String),
    /// What Redis or Postgres holds is not what we left there.
    #[error("{0}")]
    Reload(String),
    #[error("{0}")]
    NoRoom(String),
    #[error("redis has not answered for {} s", .0.as_secs())]
    RedisSilent(Duration),
    #[error("postgres has not answered for {} s", .0.as_secs())]
    PostgresSilent(Duration),
    #[error("the replication stream ended")]
    StreamEnded,
    #[error("{0}")]
    Waiting(String),
    #[error("the session is over")]
    SessionOver,
    /// What was in hand at the stop.
    #[error("stopped before everything in hand was in redis, and it will come again: {0}")]
    NotDrained(String),
    #[error("cannot listen on {address}: {error}")]
    Listen { address: std::net::SocketAddr, error: std::io::Error },
    #[error("internal error: {0}")]
    Internal(&'static str),
}

impl BridgeError {
    pub fn disposition(&self) -> Disposition {
        match self {
            BridgeError::Source(error) => error.disposition(),
            BridgeError::Sink(error) => error.disposition(),
            BridgeError::Setup(_) | BridgeError::Refused(_) => Disposition::Stop,
            BridgeError::Reload(_) => Disposition::Reload,
            // Somebody may raise maxmemory at any time, or the rows may become fewer.
            BridgeError::NoRoom(_)
            | BridgeError::RedisSilent(_)
            | BridgeError::PostgresSilent(_)
            | BridgeError::StreamEnded
            | BridgeError::Waiting(_)
            | BridgeError::SessionOver
            | BridgeError::NotDrained(_)
            | BridgeError::Listen { .. }
            | BridgeError::Internal(_) => Disposition::Retry,
        }
    }
}
