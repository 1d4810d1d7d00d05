//! An operator's request on its way to the session: HTTP asks, the bridge answers.

pub use prefetchd_core::admin::*;
use tokio::sync::oneshot;

/// Operations that may wait for their turn. More are refused as `busy`.
pub const ASKED_HELD: usize = 16;

/// One operation on its way to the daemon.
#[derive(Debug)]
pub struct Asked {
    pub operation: Operation,
    pub answer: oneshot::Sender<Result<Answer, Refusal>>,
}
