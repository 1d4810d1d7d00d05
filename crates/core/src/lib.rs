//! Every decision that prefetchd makes, without the means to carry any of them out: no I/O, no threads, no log, no
//! clock. Inputs go in, effects come out, and the daemon performs the effects.
//!
//! - The vocabulary: [`lsn`], [`schema`], [`change`], [`command`], [`checkpoint`], [`reason`], [`remedy`], [`admin`].
//! - [`mod@format`] says how a row lies in Redis: as a hash or as JSON.
//! - [`plan`] turns changes into commands, and [`resp`] turns commands into bytes, within Redis's limits.
//! - [`progress`] decides what may be confirmed, where to resume, and what a snapshot has seen.
//! - [`loader`] decides which rows are read when, and what follows from what a read brought.
//! - [`session`] runs from the takeover of Redis to the last batch and makes every other decision of a running daemon.
//! - [`lanes`] is what Redis Cluster needs in addition: hash slots, and what each of them holds.
//! - [`typed`] writes rows as JSON with types.
//! - [`rules`] names the rules that correctness depends on, so that the simulation can switch them off one at a time.
//! - `sim` runs random schedules of all of this in a small simulated world. Built for tests and the `simulate` program
//!   only.

pub mod admin;
pub mod backoff;
pub mod change;
pub mod checkpoint;
pub mod command;
pub mod fingerprint;
pub mod format;
pub mod lanes;
pub mod loader;
pub mod lookups;
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
pub mod typed;
