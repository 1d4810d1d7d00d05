//! Servers and daemons for tests.
//!
//! - [`Postgres::shared`]: a database of the test's own on the shared server, with `migrations/` applied.
//!   [`Postgres::own`]: a whole server that the test may stop, kill and freeze.
//! - [`Redis::start`]: a server of the test's own.
//! - [`Cluster::start`]: a Redis Cluster of the test's own.
//! - [`Daemon::start`], or [`Daemon::with`] for other settings: the real program. A WARN or ERROR line that was not
//!   allowed fails the test.
//! - [`traffic`] and [`watcher`]: tables whose rows show whether they are torn or old, sessions that write to them, and
//!   a reader that checks continuously.
//! - [`scene::Scene`]: all of these together, for tests of faults. [`trial::Trial`]: tries a fault in each phase of a
//!   daemon's work. [`lanes::LaneScene`]: a scene on a cluster.
//! - [`provider::Provider`]: a Redis that refuses some commands in its own words.
//! - [`proxy::Proxy`]: an unreliable network between a daemon and one of its servers.
//!
//! Everything is removed when it is dropped, and when the test program is killed. Tests do not wait for time to pass:
//! they wait for an LSN, a status or a log line, and a wait of more than [`PATIENCE`] fails with the daemon's log.

#![allow(dead_code, reason = "a tool box: what one test needs today, another needed yesterday")]

mod answer;
pub mod browser;
pub mod cluster;
pub mod consumer;
mod daemon;
pub mod lanes;
pub mod pooler;
mod postgres;
mod program;
mod proof;
pub mod provider;
pub mod proxy;
mod redis;
pub mod scene;
pub mod traffic;
pub mod trial;
pub mod watcher;

pub use self::redis::{Feature, Redis};
pub use answer::{Answer, post, request};
pub use cluster::Cluster;
pub use daemon::{Daemon, Settings, position};
pub use postgres::{Postgres, psql};
pub use prefetchd::cli::servers::Stop;
pub use program::{Ran, Running, run_configured, run_program};

use std::fmt::{Debug, Display};
use std::io::Write;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// What takes longer than this, even on a slow machine, will never happen.
pub const PATIENCE: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(10);

static SKIPPED: AtomicU32 = AtomicU32::new(0);

/// Reports that this test, or a part of it, cannot run here, and why. The test runner counts the test as passed and
/// hides its output, so this bypasses the runner's capture. scripts/test-matrix reports these lines.
pub fn skipped(reason: impl Display) {
    let count = SKIPPED.fetch_add(1, Ordering::Relaxed) + 1;
    let thread = std::thread::current();
    let test = thread.name().unwrap_or("a test");
    // One write, so that concurrent lines do not mix. Without stderr there is nobody to tell.
    let _ = std::io::stderr().write_all(format!("skipped {count}: {test}: {reason}\n").as_bytes());
}

/// Asks until the answer is as wanted, and returns it. Panics with the last answer after [`PATIENCE`].
#[track_caller]
pub fn eventually_blocking<T: Debug>(what: &str, mut ask: impl FnMut() -> T, wanted: impl Fn(&T) -> bool) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let answer = ask();
        if wanted(&answer) {
            return answer;
        }
        assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}; last seen: {answer:?}");
        std::thread::sleep(POLL);
    }
}

/// The same for an asynchronous request.
pub async fn eventually<T: Debug>(what: &str, mut ask: impl AsyncFnMut() -> T, wanted: impl Fn(&T) -> bool) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let answer = ask().await;
        if wanted(&answer) {
            return answer;
        }
        assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}; last seen: {answer:?}");
        tokio::time::sleep(POLL).await;
    }
}
