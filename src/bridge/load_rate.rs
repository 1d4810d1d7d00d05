//! `cache.load_rate`: how much loads, verifications and refetches may read from Postgres a second, all together.
//!
//! Whatever was read is paid for afterwards, between two chunks and never within one, because a chunk holds a snapshot and
//! a lock. It must know neither tables nor connections. A mistake here makes loads burden Postgres, or never end.

use std::num::NonZeroU64;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// What was not read in the last second may be read now.
const BURST: Duration = Duration::from_secs(1);
/// Chunks of this part of a second, or less, so that loads burden Postgres evenly.
const CHUNKS_A_SECOND: u64 = 8;
/// A page of Postgres. Smaller chunks would cost more than they read.
const LEAST_BYTES_A_CHUNK: u64 = 8 << 10;

/// Shared by all sessions of a daemon.
#[derive(Clone, Default)]
pub struct LoadRate(Option<Arc<Limited>>);

struct Limited {
    bytes_a_second: NonZeroU64,
    /// When everything that was read will be paid for.
    paid: Mutex<Instant>,
}

impl LoadRate {
    pub fn new(bytes_a_second: Option<NonZeroU64>, now: Instant) -> Self {
        Self(bytes_a_second.map(|bytes_a_second| Arc::new(Limited { bytes_a_second, paid: Mutex::new(now) })))
    }

    /// Records what was read.
    pub fn spend(&self, bytes: u64, now: Instant) {
        let Some(limited) = &self.0 else { return };
        let cost = Duration::from_secs_f64(bytes as f64 / limited.bytes_a_second.get() as f64);
        let mut paid = limited.paid.lock().unwrap_or_else(PoisonError::into_inner);
        let earliest = now.checked_sub(BURST).unwrap_or(now);
        *paid = (*paid).max(earliest) + cost;
    }

    /// Returns when the next chunk may be read, if not now.
    pub fn rests_until(&self, now: Instant) -> Option<Instant> {
        let paid = *self.0.as_ref()?.paid.lock().unwrap_or_else(PoisonError::into_inner);
        Some(paid).filter(|paid| *paid > now)
    }

    /// Returns how much a chunk may have instead of `most`.
    pub fn bytes_a_chunk(&self, most: usize) -> usize {
        let Some(limited) = &self.0 else { return most };
        let share = (limited.bytes_a_second.get() / CHUNKS_A_SECOND).max(LEAST_BYTES_A_CHUNK);
        usize::try_from(share).map_or(most, |share| share.min(most))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limit(bytes_a_second: u64, now: Instant) -> LoadRate {
        LoadRate::new(NonZeroU64::new(bytes_a_second), now)
    }

    #[test]
    fn reads_no_more_than_the_rate_and_one_burst() {
        let began = Instant::now();
        for (chunk, rest_ms) in [(125_000, 0), (125_000, 40), (1, 0), (1_000, 3), (3_000_000, 700), (10, 9_000)] {
            let (rate, mut now, mut read) = (limit(1_000_000, began), began, 0);
            while now < began + Duration::from_secs(60) {
                now = rate.rests_until(now).unwrap_or(now + Duration::from_micros(10));
                // Before this chunk, all others were paid for.
                let most = (now - began).as_secs_f64() * 1e6 + 1e6;
                assert!(read as f64 <= most + 1.0, "{chunk}: {read} of {most}");
                rate.spend(chunk, now);
                read += chunk;
                now += Duration::from_millis(rest_ms);
            }
            let busy = 0.9 * 60e6;
            assert!(rest_ms > 200 || chunk < 100_000 || read as f64 > busy, "{chunk}: {read} is too little");
        }
    }

    #[test]
    fn a_row_that_is_larger_than_the_burst_is_read_and_paid_for() {
        let now = Instant::now();
        let rate = limit(10_000, now);
        assert_eq!(rate.rests_until(now), None);
        rate.spend(1_000_000, now);
        assert_eq!(rate.rests_until(now), Some(now + Duration::from_secs(100)));
        assert_eq!(rate.rests_until(now + Duration::from_secs(100)), None);
    }

    #[test]
    fn chunks_are_smaller_if_the_rate_is_low() {
        let now = Instant::now();
        let chunk = |rate| limit(rate, now).bytes_a_chunk(2 << 20);
        assert_eq!([chunk(10_000), chunk(800_000), chunk(1 << 40)], [8 << 10, 100_000, 2 << 20]);
        let free = LoadRate::default();
        free.spend(u64::MAX, now);
        assert_eq!((free.bytes_a_chunk(5), free.rests_until(now)), (5, None));
    }
}
