//! prefetchd keeps a Redis copy of chosen Postgres tables. Every row is loaded before the first read and updated after
//! every commit; reads never touch Postgres.
//!
//! ```text
//!             Postgres                                                       Redis
//!                │ START_REPLICATION (pgoutput)                                ▲
//!    source::wire ─ source::pgoutput ─ source::assemble ─┐                     │ MULTI rows… SET checkpoint EXEC
//!                                                        ├─► core::session ──► sink::writer
//!    source::snapshot (COPY of one chunk) ─ bridge::load ┘      │
//!                                                               ▼
//!                                                        status::Status
//!                                                               │
//!                                          http:: (reads Redis through sink::reader), metrics
//! ```
//!
//! Every decision is made in the crate `prefetchd-core`, which has no I/O: which commands a change becomes, what may be
//! confirmed, where to resume, what a snapshot has seen. Its modules are re-exported here under their own names.
//!
//! # The path of a change
//!
//! 1. [`source::stream`] reads the replication connection in bulk. [`source::pgoutput`] decodes, [`source::assemble`]
//!    assembles transactions, and the resulting [`change::Delivery`] items go into a bounded channel.
//! 2. [`bridge::apply`] passes them to the [`session`], which buffers the open transaction and, at its commit, adds it
//!    to the growing [`plan::key_states::KeyStates`]: one state for each key, however often it changed.
//! 3. As soon as the writer is free, the batch is sent as one `MULTI … EXEC` that includes the
//!    [`checkpoint::Checkpoint`].
//! 4. Once Redis has acknowledged it, [`progress::ledger`] may confirm it, and the stream reports that to Postgres.
//!
//! # The path of a loaded row
//!
//! The [`loader`] decides which chunk is read next, or again. [`bridge::load`] reads it under a snapshot, emits a
//! watermark into the WAL, and hands the chunk over. When the stream has delivered the watermark,
//! [`progress::visibility`] decides which of the chunk's rows are superseded by the stream; the others are written.
//! Repairs after a loss and changes of the schema use the same path: [`bridge::catalog`] detects changes that the stream
//! does not announce. After a loss, [`progress::resume`] decides what has to be loaded, and [`session::takeover`] writes
//! that into the first checkpoint of the new session. [`session::startup`] decides what must be done before the stream
//! starts, and in which order.
//!
//! # Layers
//!
//! Imports go downwards only, which a test enforces: the core → {[`source`] | [`sink`]} → [`bridge`] → [`daemon`], which
//! starts everything → [`cli`] and `main`. What a layer must not know: `source`: Redis and keys; `source::pgoutput`:
//! sockets and clocks; `sink`: tables, slots and pgoutput; `bridge`: SQL text, wire bytes and HTTP; [`http`]: Postgres,
//! and any write.
//!
//! # Invariants
//!
//! - One task writes to Redis, and every write includes the checkpoint under WATCH, so Redis refuses a second writer.
//! - At most one EXEC is unacknowledged.
//! - A row is never overwritten with an older version than the stream has delivered.
//! - Only the ledger can create a [`progress::ledger::ConfirmedLsn`], and only for what Redis has acknowledged and
//!   every snapshot sees.
//! - No read request ever causes a query to Postgres: [`http`] has no path to [`source`].

// All output goes through [`terminal`].
#![cfg_attr(not(test), deny(clippy::print_stdout, clippy::print_stderr))]

pub use prefetchd_core::{
    change, checkpoint, command, fingerprint, format, lanes, loader, lookups, lsn, plan, progress, reason, remedy,
    resp, schema, session, typed,
};

pub mod admin;
mod bounded;
pub mod bridge;
pub mod cli;
pub mod code;
pub mod config;
pub mod daemon;
pub mod demo;
pub mod error;
pub mod history;
pub mod http;
pub mod metrics;
pub mod nodes;
pub mod password;
pub mod reload;
pub mod row_keys;
pub mod sightings;
pub mod sink;
pub mod source;
pub mod status;
pub mod telemetry;
pub mod terminal;
pub mod timing;
pub mod tls;
pub mod token;
mod words;
