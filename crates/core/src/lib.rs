//! What prefetchd decides, without doing any of it: no I/O, no threads, no log, no clock of its own. Inputs go in, effects
//! come out, and the daemon performs them.
//!
//! - The vocabulary: [`lsn`], [`schema`], [`change`], [`command`], [`checkpoint`], [`reason`], [`remedy`], [`admin`].
//! - [`plan`]: a change becomes commands. [`resp`]: commands become bytes, within Redis's limits.
//! - [`progress`]: what may be confirmed, where to resume, what a snapshot has seen.
//! - [`session`]: from the takeover of Redis to the last batch; every decision of a running daemon is made there.
//! - [`rules`]: the rules that all this hangs on, by name.
//! - `sim`: random schedules of all that, in a small world. Only for tests and the program `simulate`.

pub mod admin;
pub mod change;
pub mod checkpoint;
pub mod command;
pub mod fingerprint;
pub mod lsn;
pub mod plan;
pub mod progress;
pub mod reason;
pub mod remedy;
pub mod resp;
pub mod rules;
pub mod schema;
pub mod session;
#[cfg(any(test, feature = "sim"))]
pub mod sim;
