//! An operator's request, which HTTP passes to the bridge to answer.

pub use prefetchd_core::admin::*;
use tokio::sync::oneshot;

/// How many operations may wait. Further ones are refused as `busy`.
pub const ASKED_HELD: usize = 16;

/// One request for the daemon.
#[derive(Debug)]
pub struct Asked {
    pub operation: Operation,
    pub answer: oneshot::Sender<Result<Answer, Refusal>>,
}
