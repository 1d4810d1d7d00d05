//! The integration tests: one program, so that one Postgres and one build serve them all.
//!
//! They start servers of their own, see [`harness`], and touch no other.

#![allow(clippy::unwrap_used, reason = "a test that panics is a test that fails")]

mod harness;

mod admin;
mod commands;
mod confirm;
mod demo;
mod http;
mod kill;
mod layers;
mod load;
mod packed;
mod reads;
mod redis_ways;
mod rows;
mod schema;
mod setup;
mod source;
mod source_tls;
mod stopping;
mod stream;
mod ttl;
