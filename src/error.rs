//! What an error means for the daemon.

pub use prefetchd_core::backoff::Backoff;

/// Every layer's errors say which of these they are, by an exhaustive match.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Disposition {
    /// A server is away or busy. Wait, and go through the resume table again.
    Retry,
    /// What we know of Redis or the stream no longer holds: go through the resume table at once.
    Reload,
    /// Retrying cannot help; a person must change something. Exit 78 at the start.
    Stop,
}
