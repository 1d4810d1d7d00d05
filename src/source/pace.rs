//! When to nap before the next read.
//!
//! A walsender sends each message by itself, and whoever reads at once is woken for each of them: under a backlog both
//! sides then do little but switch between each other. A reader that lets a few messages gather costs neither of them
//! that. It must not nap while little comes: a commit is not to wait for the next one.
//!
//! It knows no socket and no clock.

use std::time::Duration;

/// Shorter than what fills the buffer between the two (some 200 small messages in a unix socket), so that the server
/// never waits for it.
pub const NAP: Duration = Duration::from_micros(200);
/// A read that comes within this after the one before was not waited for.
const AT_ONCE: Duration = Duration::from_micros(200);
/// A read of this much is worth its while.
const ENOUGH_BYTES: usize = 32 << 10;
/// So many small reads at once are a backlog. A single commit of a few rows comes in fewer.
const BACKLOG_READS: u32 = 16;

/// The reads of one stream.
#[derive(Debug, Default)]
pub struct Pace {
    /// Small ones in a row that were there at once.
    small: u32,
}

impl Pace {
    /// A read brought so much, after so long a wait (naps do not count). Whether to nap before the next.
    pub fn nap_after(&mut self, bytes: usize, waited: Duration) -> bool {
        if bytes >= ENOUGH_BYTES || waited > AT_ONCE {
            // Half, not all: a server that was not given the processor for a moment still has its backlog.
            self.small /= 2;
        } else {
            self.small = (self.small + 1).min(2 * BACKLOG_READS);
        }
        self.small >= BACKLOG_READS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUICK: Duration = Duration::from_micros(20);
    const SLOW: Duration = Duration::from_millis(2);

    fn naps(pace: &mut Pace, reads: usize, bytes: usize, waited: Duration) -> usize {
        (0..reads).filter(|_| pace.nap_after(bytes, waited)).count()
    }

    #[test]
    fn a_backlog_of_small_reads_is_napped_through() {
        let mut pace = Pace::default();
        assert_eq!(naps(&mut pace, 100, 150, QUICK), 100 - 15);
    }

    #[test]
    fn a_commit_now_and_then_never_waits() {
        let mut pace = Pace::default();
        for _ in 0..100 {
            assert_eq!(naps(&mut pace, 1, 150, SLOW) + naps(&mut pace, 5, 150, QUICK), 0);
        }
    }

    #[test]
    fn the_end_of_a_backlog_ends_the_naps() {
        let mut pace = Pace::default();
        naps(&mut pace, 50, 150, QUICK);
        naps(&mut pace, 2, 150, SLOW);
        assert_eq!(naps(&mut pace, 1, 150, SLOW) + naps(&mut pace, 10, 150, QUICK), 0);
    }

    #[test]
    fn large_reads_need_no_nap() {
        assert_eq!(naps(&mut Pace::default(), 100, 64 << 10, QUICK), 0);
    }
}
