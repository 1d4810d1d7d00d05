//! The requests that the page of `prefetchd demo` can make, and their answers. Data only: HTTP asks, the demo answers.

use serde_json::{Map, Value};
use tokio::sync::oneshot;

/// How many actions may wait. Further ones are refused as busy.
pub const ASKED_HELD: usize = 16;

/// One request for the demo.
#[derive(Debug)]
pub struct DemoRequest {
    /// As in the request's path: `update`, `flushall`.
    pub action: String,
    pub with: Map<String, Value>,
    pub answer: oneshot::Sender<Result<Value, DemoRefusal>>,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DemoRefusal {
    #[error("the demo has no action {0:?}")]
    Unknown(String),
    #[error("{0}")]
    Wrong(String),
    #[error("{0} is still under way: wait for its end")]
    Busy(String),
    /// The action would break a server that the user provided.
    #[error("{0}")]
    NotOurs(String),
    /// An error from Postgres or Redis, in their words.
    #[error("{0}")]
    Refused(String),
}
