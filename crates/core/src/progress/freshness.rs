//! How old the state in Redis is: the time of the newest sample of the server's position that has been applied.
//!
//! Uses only this process's clock. Commit times come from Postgres's clock, which may be wrong.

use crate::lsn::Lsn;
use std::collections::VecDeque;
use std::time::Instant;

/// How many samples may wait to be applied. Beyond this limit, samples from the middle are dropped: the oldest tells
/// how far Redis is behind, the newest when it has caught up.
const SAMPLES_HELD: usize = 64;

#[derive(Debug, Default)]
pub struct Freshness {
    samples: VecDeque<(Lsn, Instant)>,
    as_of: Option<Instant>,
}

impl Freshness {
    /// Records that the server was at `position` at this time.
    pub fn sampled(&mut self, position: Lsn, at: Instant) {
        if self.samples.len() >= SAMPLES_HELD {
            self.samples.remove(SAMPLES_HELD / 2);
        }
        self.samples.push_back((position, at));
    }

    /// Redis has everything up to `applied`.
    pub fn arrived(&mut self, applied: Lsn) {
        while let Some((_, at)) = self.samples.front().copied().filter(|(position, _)| *position <= applied) {
            self.as_of = Some(at);
            self.samples.pop_front();
        }
    }

    pub fn as_of(&self) -> Option<Instant> {
        self.as_of
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn lsn(n: u64) -> Lsn {
        Lsn::new(n).expect("not zero")
    }

    #[test]
    fn what_has_arrived_was_right_when_it_was_sampled() {
        let (mut fresh, began) = (Freshness::default(), Instant::now());
        let at = |seconds| began + Duration::from_secs(seconds);
        fresh.arrived(lsn(10));
        assert_eq!(fresh.as_of(), None, "no sample was taken");
        for n in 1..=3 {
            fresh.sampled(lsn(10 * n), at(n));
        }
        fresh.arrived(lsn(9));
        assert_eq!(fresh.as_of(), None);
        fresh.arrived(lsn(20));
        assert_eq!(fresh.as_of(), Some(at(2)));
        fresh.arrived(lsn(5));
        assert_eq!(fresh.as_of(), Some(at(2)), "it does not fall");
    }

    #[test]
    fn a_long_wait_keeps_the_oldest_and_the_newest() {
        let (mut fresh, began) = (Freshness::default(), Instant::now());
        let at = |seconds| began + Duration::from_secs(seconds);
        (1..=1_000).for_each(|n| fresh.sampled(lsn(n), at(n)));
        assert_eq!(fresh.samples.len(), SAMPLES_HELD);
        fresh.arrived(lsn(1));
        assert_eq!(fresh.as_of(), Some(at(1)));
        fresh.arrived(lsn(1_000));
        assert_eq!(fresh.as_of(), Some(at(1_000)));
    }
}
