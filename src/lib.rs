//! prefetchd keeps a Redis copy of chosen Postgres tables: loaded before the first read, corrected after every commit,
//! read without ever touching Postgres.
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
//! Every decision is made in the crate `prefetchd-core`, which has no I/O: what a change becomes, what may be confirmed,
//! where to resume, what a snapshot has seen. Its modules are known here by their own names.
//!
//! # The way of a change
//!
//! 1. [`source::stream`] reads the replication connection in bulk; [`source::pgoutput`] decodes, [`source::assemble`]
//!    puts in order, and [`change::Delivery`] items arrive in a bounded channel.
//! 2. [`bridge::apply`] hands them to the [`session`], which buffers the open transaction and, at its commit, adds it
//!    to the growing [`plan::key_states::KeyStates`]: one state a key, whatever happened to it.
//! 3. As soon as the writer is free, the batch leaves as one `MULTI … EXEC` that carries the [`checkpoint::Checkpoint`].
//! 4. When Redis has acknowledged it, [`progress::ledger`] may confirm, and the stream tells Postgres.
//!
//! # The way of a loaded row
//!
//! The [`loader`] decides which chunk is read next, or again; [`bridge::load`] reads it under a snapshot, emits a mark into
//! the WAL, and hands the chunk over. When the stream has delivered the mark, [`progress::visibility`] says which of its
//! rows the stream knows better; the others are written. Healing and a changed schema go the same way: [`bridge::catalog`]
//! looks for changes that the stream does not announce, and [`progress::resume`] says after any loss what has to be loaded,
//! which [`session::takeover`] puts into the first checkpoint of a session. What has to be done before the stream starts, and
//! in which order, [`session::startup`] says.
//!
//! # Layers
//!
//! Imports run downwards only, and a test holds that:
//! the core → {[`source`] | [`sink`]} → [`bridge`] → [`daemon`], which starts everything → [`cli`] and `main`. What a layer never knows: `source` Redis and keys;
//! `source::pgoutput` sockets and clocks; `sink` tables, slots and pgoutput; `bridge` SQL text, wire bytes and HTTP;
//! [`http`] Postgres, and any write.
//!
//! # Invariants
//!
//! - One task writes to Redis, and every write carries the checkpoint under WATCH: a second writer is refused by Redis.
//! - At most one EXEC is unacknowledged.
//! - A row is written only when it is not older than what the stream has brought.
//! - [`progress::ledger::ConfirmedLsn`] is made by the ledger alone, and only of what Redis has acknowledged and snapshots
//!   see.
//! - No read request ever causes a query to Postgres: there is no path from [`http`] to [`source`].

// What is shown leaves through [`terminal`].
#![cfg_attr(not(test), deny(clippy::print_stdout, clippy::print_stderr))]

pub use prefetchd_core::{
    change, checkpoint, command, fingerprint, loader, lsn, plan, progress, reason, remedy, resp, schema, session,
};

pub mod admin;
pub mod bridge;
pub mod cli;
pub mod config;
pub mod daemon;
pub mod demo;
pub mod error;
pub mod http;
pub mod metrics;
pub mod password;
pub mod sightings;
pub mod sink;
pub mod source;
pub mod status;
pub mod telemetry;
pub mod terminal;
pub mod timing;
pub mod tls;
pub mod token;
