//! How the rows of a table lie in Redis. Whatever depends on it asks here, or matches on [`Format`] or [`Form`].
//!
//! | | hash | JSON |
//! |---|---|---|
//! | Redis type ([`Probe::is_row`](crate::session::inspect::Probe::is_row)) | hash | string |
//! | a row is written | as RESTORE, or DEL, HSET and PEXPIRE ([`resp::put`](crate::resp::put)) | as SET with PX |
//! | an UPDATE without large values | HSET on the hash, under WATCH | the document is read, patched here, and written whole ([`patch`](crate::typed::document::patch)) |
//! | a row is read | HGETALL | GET |
//! | it is right (`sink::answers`) | if the fields are, in any order | if the bytes are |
//! | lookups see ([`Fields`](crate::lookups::Fields)) | the values, by HMGET | what a reader of the document sees, by GET |
//! | over HTTP (`http::render`) | an object of strings, or typed ([`write_row`](crate::typed::json::write_row)) | as it is |
//!
//! Both ways of writing a row replace a key of any type, so a command inside EXEC never meets a key of another type.

use crate::typed::row_type::JsonType;

/// The `format` of a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Format {
    #[default]
    Hash,
    /// A string: what `row_to_json` gives.
    Json,
}

impl Format {
    /// Returns its name in the configuration.
    pub fn as_str(self) -> &'static str {
        match self {
            Format::Hash => "hash",
            Format::Json => "json",
        }
    }

    /// Returns the command that reads a row.
    pub fn read_command(self) -> &'static str {
        match self {
            Format::Hash => "HGETALL",
            Format::Json => "GET",
        }
    }
}

/// The [`Format`] of rows of one shape, with what it needs to write them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Form {
    Hash,
    /// The types of the fields, in their order.
    Json(Vec<JsonType>),
}

impl Form {
    pub fn format(&self) -> Format {
        match self {
            Form::Hash => Format::Hash,
            Form::Json(_) => Format::Json,
        }
    }
}
