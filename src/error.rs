//! What an error means for the daemon.

use std::time::Duration;

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

/// Waiting times between attempts: short at first, never longer than `MAX`.
#[derive(Debug, Default)]
pub struct Backoff {
    failures: u32,
}

impl Backoff {
    const FIRST: Duration = Duration::from_millis(100);
    const MAX: Duration = Duration::from_secs(5);

    pub fn next_delay(&mut self) -> Duration {
        let delay = Self::FIRST.saturating_mul(1 << self.failures.min(10)).min(Self::MAX);
        self.failures += 1;
        delay
    }

    pub fn reset(&mut self) {
        self.failures = 0;
    }
}
