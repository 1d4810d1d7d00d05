//! Decides when to pause before the next read.
//!
//! A walsender sends each message separately, and a reader that reads at once is woken up for each of them. With a
//! backlog, both sides then spend most of their time switching context. A reader that lets a few messages accumulate
//! avoids that. It must not pause while little arrives, because a commit should not wait for the next one.
//!
//! It knows no sockets and no clock.

use std::time::Duration;

/// Shorter than the time that fills the socket buffer (about 200 small messages for a Unix socket), so the server never
/// has to wait.
pub const NAP: Duration = Duration::from_micros(150);
/// A read that completes within this time after the previous one did not wait for data.
const AT_ONCE: Duration = Duration::from_micros(200);
/// A read of this size is efficient.
const ENOUGH_BYTES: usize = 32 << 10;
/// This many small reads in a row are a backlog. A single commit of a few rows arrives in fewer.
const BACKLOG_READS: u32 = 16;

/// The recent reads of one stream.
#[derive(Debug, Default)]
pub struct Pace {
    /// Number of small reads in a row that did not wait.
    small: u32,
}

impl Pace {
    /// Records a read of so many bytes after such a wait, not counting pauses. Returns whether to pause before the next
    /// one.
    pub fn nap_after(&mut self, bytes: usize, waited: Duration) -> bool {
        if bytes >= ENOUGH_BYTES || waited > AT_ONCE {
            // Halved rather than reset: a server that was not scheduled for a moment still has its backlog.
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
