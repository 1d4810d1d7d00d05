//! How the rows of a table lie in Redis. Whatever depends on it asks here, or matches on [`Format`] or [`Form`].
//!
//! | | hash | JSON | RedisJSON |
//! |---|---|---|---|
//! | Redis type ([`Probe::is_row`](crate::session::inspect::Probe::is_row)) | hash | string | `ReJSON-RL` |
//! | a row is written | as RESTORE, or DEL, HSET and PEXPIRE ([`resp::put`](crate::resp::put)) | as SET with PX | as DEL, JSON.SET and PEXPIRE |
//! | an UPDATE without large values | HSET on the hash, under WATCH | the document is read, patched here, and written whole ([`patch`](crate::typed::document::patch)) | JSON.SET of its members, under WATCH |
//! | a row is read | HGETALL | GET | JSON.GET |
//! | it is right (`sink::answers`) | if the fields are, in any order | if the bytes are | if the document means the same ([`is_same`](crate::typed::redisjson::is_same)) |
//! | lookups see ([`Fields`](crate::lookups::Fields)) | the values, by HMGET | what a reader of the document sees, by GET | refused |
//! | over HTTP (`http::render`) | an object of strings, or typed ([`write_row`](crate::typed::json::write_row)) | as it is | as it is |
//!
//! Every way of writing a row replaces a key of any type, so a command inside EXEC never meets a key of another type.

use crate::typed::row_type::JsonType;

/// The `format` of a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Format {
    #[default]
    Hash,
    /// A string: what `row_to_json` gives.
    Json,
    /// A document of the module RedisJSON that means the same.
    RedisJson,
}

impl Format {
    /// Returns its name in the configuration.
    pub fn as_str(self) -> &'static str {
        match self {
            Format::Hash => "hash",
            Format::Json => "json",
            Format::RedisJson => "redisjson",
        }
    }

    /// Returns the command that reads a row.
    pub fn read_command(self) -> &'static str {
        match self {
            Format::Hash => "HGETALL",
            Format::Json => "GET",
            Format::RedisJson => "JSON.GET",
        }
    }
}

/// The [`Format`] of rows of one shape, with what it needs to write them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Form {
    Hash,
    /// The types of the fields, in their order.
    Json(Vec<JsonType>),
    RedisJson(Vec<JsonType>),
}

impl Form {
    pub fn format(&self) -> Format {
        match self {
            Form::Hash => Format::Hash,
            Form::Json(_) => Format::Json,
            Form::RedisJson(_) => Format::RedisJson,
        }
    }

    /// Returns the types of a document's fields.
    pub fn json_types(&self) -> Option<&[JsonType]> {
        match self {
            Form::Hash => None,
            Form::Json(types) | Form::RedisJson(types) => Some(types),
        }
    }
}
