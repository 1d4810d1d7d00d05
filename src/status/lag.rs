//! How long changes take from their commit in Postgres to Redis.

use std::collections::VecDeque;
use std::time::Duration;

#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct SyncLag {
    pub avg_ms: Option<f64>,
    pub p50_ms: Option<f64>,
    pub p99_ms: Option<f64>,
    pub count: u64,
}

/// The most recent sync lags, for [`SyncLag`]. Every change counts once, however many are in its transaction.
#[derive(Debug, Clone, Default)]
pub struct LagWindow {
    /// Microseconds, oldest first.
    lags: VecDeque<u64>,
    /// Since the start, including those that have left the window.
    total: u64,
}

impl LagWindow {
    pub const CAPACITY: usize = 1024;

    /// Records that `changes` changes arrived after `lag`.
    pub fn record(&mut self, lag: Duration, changes: usize) {
        let micros = u64::try_from(lag.as_micros()).unwrap_or(u64::MAX);
        self.total += changes as u64;
        let changes = changes.min(Self::CAPACITY);
        let excess = (self.lags.len() + changes).saturating_sub(Self::CAPACITY);
        self.lags.drain(..excess);
        self.lags.extend(std::iter::repeat_n(micros, changes));
    }

    /// Copies the window: call it once a second, not for every batch.
    pub fn summary(&self) -> SyncLag {
        let mut lags: Vec<u64> = self.lags.iter().copied().collect();
        let count = lags.len();
        // Nearest rank: the smallest lag that at least `percent` percent of them do not exceed.
        let mut percentile = |percent: usize| {
            let rank = (count * percent).div_ceil(100).checked_sub(1)?;
            Some(*lags.select_nth_unstable(rank).1 as f64 / 1e3)
        };
        let (p50_ms, p99_ms) = (percentile(50), percentile(99));
        let sum: u128 = self.lags.iter().map(|&l| u128::from(l)).sum();
        SyncLag {
            avg_ms: (count > 0).then(|| (sum as f64 / count as f64).round() / 1e3),
            p50_ms,
            p99_ms,
            count: self.total,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_window_shows_the_last_lags() {
        let mut window = LagWindow::default();
        assert_eq!(window.summary(), SyncLag::default());
        for ms in [3, 1, 2] {
            window.record(Duration::from_millis(ms), 1);
        }
        let lag = window.summary();
        assert_eq!((lag.avg_ms, lag.p50_ms, lag.p99_ms, lag.count), (Some(2.0), Some(2.0), Some(3.0), 3));
        window.record(Duration::from_millis(1), 97);
        let lag = window.summary();
        assert_eq!((lag.p50_ms, lag.p99_ms, lag.count), (Some(1.0), Some(2.0), 100));
    }

    #[test]
    fn the_window_forgets_what_is_older() {
        let mut window = LagWindow::default();
        window.record(Duration::from_secs(60), LagWindow::CAPACITY);
        window.record(Duration::from_micros(1500), LagWindow::CAPACITY - 1);
        assert_eq!(window.summary().p50_ms, Some(1.5));
        assert_eq!(window.summary().p99_ms, Some(1.5));
        assert_eq!(window.summary().count, 2_047);
        window.record(Duration::from_micros(700), 1_000_000);
        assert_eq!(
            window.summary(),
            SyncLag { avg_ms: Some(0.7), p50_ms: Some(0.7), p99_ms: Some(0.7), count: 1_002_047 }
        );
    }
}
