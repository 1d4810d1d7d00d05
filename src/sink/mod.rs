//! Redis: the one writer, and the readers.
pub mod connect;
pub mod reader;
pub mod resp;
pub mod writer;

#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct SinkError(pub String);
