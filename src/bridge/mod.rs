//! The only layer that knows both ends.
//!
//! [`mod@supervise`] runs one session after the other: a session begins ([`bootstrap`]), runs ([`apply`]) until something
//! ends it, and the next one begins through the resume table. Within a session, [`crate::session`] decides and the other
//! modules perform: [`load`] reads chunks, [`renew`] renews TTLs. It must not know SQL text, wire bytes or HTTP.
//!
//! A loss ends the session. After FLUSHALL, for example, the writer's EXEC is discarded because the checkpoint that it
//! watches is gone ([`crate::sink::writer`]); the supervisor begins the next session, which finds no checkpoint, and the
//! resume table decides what to load ([`crate::progress::resume`]).

pub mod apply;
mod beside;
pub mod bootstrap;
mod capacity;
pub mod catalog;
pub mod connections;
pub mod context;
pub mod durable;
pub mod evictions;
pub mod load;
mod load_rate;
pub mod lookup_columns;
mod observers;
mod prerequisites;
pub mod regenerate;
pub mod renew;
pub mod room;
mod sampler;
pub mod standby;
pub mod supervise;
pub mod walk;
mod writing;

use crate::code::Code;
use crate::error::Disposition;
use crate::sink::SinkError;
use crate::source::SourceError;
use std::time::Duration;

/// Why a session ended or could not begin.
#[derive(Debug, thiserror::Error)]
pub enum BridgeError {
    #[error("postgres: {0}")]
    Source(#[from] SourceError),
    #[error("redis: {0}")]
    Sink(#[from] SinkError),
    /// A setting does not match the servers.
    #[error("{1}")]
    Setup(Code, String),
    /// A different Postgres than the checkpoint's.
    #[error("{0}")]
    Refused(String),
    /// Redis or Postgres is not in the state in which we left it.
    #[error("{1}")]
    Reload(Code, String),
    #[error("{0}")]
    NoRoom(String),
    #[error("redis has not answered for {} s", .0.as_secs())]
    RedisSilent(Duration),
    #[error("postgres has not answered for {} s", .0.as_secs())]
    PostgresSilent(Duration),
    #[error("the replication stream ended")]
    StreamEnded,
    #[error("{1}")]
    Waiting(Code, String),
    #[error("the session has ended")]
    SessionOver,
    /// What had been received when the daemon was stopped.
    #[error("stopped before everything in hand was in redis, and it will come again: {0}")]
    NotDrained(String),
    #[error("cannot listen on {address}: {error}")]
    Listen { address: std::net::SocketAddr, error: std::io::Error },
    #[error("internal error: {0}")]
    Internal(&'static str),
}

impl BridgeError {
    pub fn code(&self) -> Code {
        match self {
            BridgeError::Source(error) => error.code(),
            BridgeError::Sink(error) => error.code(),
            BridgeError::Setup(code, _) | BridgeError::Reload(code, _) | BridgeError::Waiting(code, _) => *code,
            BridgeError::Refused(_) => Code::OtherPostgres,
            BridgeError::NoRoom(_) => Code::RedisTooSmall,
            BridgeError::RedisSilent(_) => Code::RedisUnreachable,
            BridgeError::PostgresSilent(_) => Code::PostgresUnreachable,
            BridgeError::StreamEnded | BridgeError::SessionOver => Code::PostgresConnectionLost,
            BridgeError::NotDrained(_) => Code::NotDrained,
            BridgeError::Listen { .. } => Code::ListenAddress,
            BridgeError::Internal(_) => Code::Internal,
        }
    }

    pub fn disposition(&self) -> Disposition {
        match self {
            BridgeError::Source(error) => error.disposition(),
            BridgeError::Sink(error) => error.disposition(),
            BridgeError::Setup(..) | BridgeError::Refused(_) => Disposition::Stop,
            BridgeError::Reload(..) => Disposition::Reload,
            // Somebody may raise maxmemory at any time, or rows may be deleted.
            BridgeError::NoRoom(_)
            | BridgeError::RedisSilent(_)
            | BridgeError::PostgresSilent(_)
            | BridgeError::StreamEnded
            | BridgeError::Waiting(..)
            | BridgeError::SessionOver
            | BridgeError::NotDrained(_)
            | BridgeError::Listen { .. }
            | BridgeError::Internal(_) => Disposition::Retry,
        }
    }
}
