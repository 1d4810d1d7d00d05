//! What the page of `prefetchd demo` may ask for, and what it is answered. Data, no I/O: HTTP asks, the demo answers.

use serde_json::{Map, Value};
use tokio::sync::oneshot;

/// Actions that may wait for their turn. More are refused as busy.
pub const ASKED_HELD: usize = 16;

/// One action on its way to the demo.
#[derive(Debug)]
pub struct Asked {
    /// As in the path: `update`, `flushall`.
    pub action: String,
    pub with: Map<String, Value>,
    pub answer: oneshot::Sender<Result<Value, Refusal>>,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("the demo has no action {0:?}")]
    Unknown(String),
    #[error("{0}")]
    Wrong(String),
    #[error("{0} is still under way: wait for its end")]
    Busy(String),
    /// A server that was given is not the demo's to break.
    #[error("{0}")]
    NotOurs(String),
    /// By Postgres or Redis, in their words.
    #[error("{0}")]
    Refused(String),
}
