//! Servers and daemons of the tests' own.
//!
//! - [`Postgres::shared`]: a database of its own on the run's one server, with `migrations/` applied. [`Postgres::own`]:
//!   a whole server, to be stopped, killed and frozen.
//! - [`Redis::start`]: a server of its own.
//! - [`Daemon::start`], or [`Daemon::with`] for other settings: the real program. A WARN or ERROR line that was not
//!   allowed fails the test.
//! - [`traffic`] and [`watcher`]: tables whose rows tell when they are torn or old, sessions that write to them, and a
//!   reader that never stops looking.
//! - [`scene::Scene`]: all of it, for faults to strike. [`trial::Trial`]: what a fault does to a daemon in each phase of its
//!   work.
//! - [`provider::Provider`]: a Redis that refuses some commands in words of its own.
//! - [`proxy::Proxy`]: a bad network between a daemon and one of its servers.
//!
//! Everything goes when it is dropped, and when the test program is killed. Nothing waits for a time: a wait is for an
//! LSN, a status or a line of the log, and one that takes longer than [`PATIENCE`] fails with the daemon's log.

#![allow(dead_code, reason = "a tool box: what one test needs today, another needed yesterday")]

mod answer;
pub mod browser;
mod daemon;
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
pub use daemon::{Daemon, Settings, position};
pub use postgres::{Postgres, psql};
pub use prefetchd::cli::servers::Stop;
pub use program::{Ran, Running, run_program};

use std::fmt::{Debug, Display};
use std::io::Write;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// What takes longer, on a machine however slow, will not happen.
pub const PATIENCE: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(10);

static SKIPPED: AtomicU32 = AtomicU32::new(0);

/// Says that this test, or a part of it, cannot run here, and why. The test runner counts it as passed and hides what a
/// passed test prints, so this is written past it, and counted. scripts/test-matrix reports these lines.
pub fn skipped(reason: impl Display) {
    let count = SKIPPED.fetch_add(1, Ordering::Relaxed) + 1;
    let thread = std::thread::current();
    let test = thread.name().unwrap_or("a test");
    // One write, so that concurrent lines do not mix. Without a stderr there is nobody to tell.
    let _ = std::io::stderr().write_all(format!("skipped {count}: {test}: {reason}\n").as_bytes());
}

/// Asks until the answer is as wanted, and gives it. Panics with the last answer when patience ends.
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

/// The same, for what is asked asynchronously.
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
