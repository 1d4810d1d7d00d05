//! Delays between attempts.

use std::time::Duration;

/// Short at first, never longer than `MAX`.
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
