//! Rows as JSON with types, as Postgres's `row_to_json` writes them.
//!
//! [`row_type`] describes the columns of a table: small enough to lie next to the checkpoint, where readers find it without
//! asking Postgres. [`json`] writes a row from that description and from the texts that lie in Redis.

pub mod json;
pub mod row_type;
