//! The integration tests: one program, so that one Postgres and one build serve them all.
//!
//! They start servers of their own, see [`harness`], and touch no other.

#![allow(clippy::unwrap_used, reason = "a test that panics is a test that fails")]

mod harness;

mod confirm;
mod demo;
mod http;
mod layers;
mod reads;
mod rows;
mod source;
mod source_tls;
mod stream;
mod ttl;
