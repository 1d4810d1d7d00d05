//! What an error means to the daemon.

pub use prefetchd_core::backoff::Backoff;

/// Every layer's errors map to one of these in an exhaustive match.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Disposition {
    /// A server is unavailable or busy. Wait, then go through the resume table again.
    Retry,
    /// What is known about Redis or the stream no longer holds. Go through the resume table at once.
    Reload,
    /// Retrying cannot help: a person must change something. At startup, exit with 78.
    Stop,
}
