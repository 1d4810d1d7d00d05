//! Postgres: takes its changes in, and reads its tables.
//!
//! There are two kinds of connections, on the same kind of socket ([`socket`], opened as [`target`] says): ordinary
//! ones through `tokio-postgres` ([`connect`], [`slot`], [`snapshot`]), and the replication session on
//! `postgres-protocol` ([`login`], [`wire`], [`stream`]), whose bytes [`pgoutput`] decodes and [`assemble`] turns into
//! transactions.
//!
//! Nothing here knows about Redis, cache keys or what has been applied. It delivers what Postgres sends, tells Postgres
//! which position is confirmed, and reports what is wrong. A mistake here loses changes without any error.

mod answer;
pub mod assemble;
mod bounds;
pub mod candidates;
pub mod connect;
pub mod limits;
pub mod login;
pub mod new_slot;
mod pace;
pub mod pgoutput;
pub mod roles;
pub mod settings;
pub mod slot;
pub mod snapshot;
mod socket;
pub mod stream;
pub mod survey;
pub mod target;
mod thread;
pub mod wire;

use crate::code::Code;
use crate::error::Disposition;
use crate::lsn::{EndLsn, Lsn};
use crate::password::PasswordError;
use fallible_iterator::FallibleIterator;
use postgres_protocol::message::backend::ErrorFields;
use std::error::Error;
use std::fmt;
use std::io;
use std::time::Duration;

/// Why a request to Postgres failed.
///
/// `doing` completes "while …" and names the object: `reading table public.orders`.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    #[error("cannot reach Postgres at {at}: {source}")]
    Unreachable { at: String, source: io::Error },
    #[error("Postgres at {at} did not answer within {} s", after.as_secs_f32())]
    Silent { at: String, after: Duration },
    #[error("Postgres at {at} refused the connection: {error}")]
    Refused { at: String, error: ServerError },
    #[error("Postgres at {at} {fact}: {remedy}")]
    Login { code: Code, at: String, fact: String, remedy: &'static str },
    #[error("lost the connection to Postgres while {doing}: {source}")]
    Lost { doing: String, source: io::Error },
    #[error("Postgres failed while {doing}: {error}")]
    Failed { doing: String, error: ServerError },
    /// The server ended the replication session with an error. If `received` stays the same, Postgres cannot send the
    /// change that follows it.
    #[error("Postgres ended the stream of slot {slot} (received up to {}): {error}", known(received))]
    Stream { slot: String, received: Option<EndLsn>, error: ServerError },
    #[error("the stream of slot {slot} is malformed (received up to {}): {error}", known(received))]
    Garbled { slot: String, received: Option<EndLsn>, error: assemble::AssembleError },
    /// The server is shutting down.
    #[error("Postgres ended the stream of slot {slot}: it is shutting down")]
    Shutdown { slot: String },
    #[error("Postgres sent something unexpected while {doing}: {what}")]
    Unexpected { doing: String, what: String },
    /// Used by another walsender, or still being created by one.
    #[error(
        "replication slot {slot} is in use by {}: stop whatever else reads it, or wait until it has ended",
        holder(pid)
    )]
    SlotInUse { slot: String, pid: Option<i32> },
    /// An object cannot be used as it is, and a person must change it.
    #[error("{fact}: {remedy}")]
    Unsuitable { code: Code, fact: String, remedy: String },
    /// Reading the table would run code of its owner as the role that replicates. Not [`Self::Unsuitable`], because a
    /// table's owner must not be able to prevent the daemon from starting.
    #[error("{fact}: {remedy}")]
    OwnersCode { fact: String, remedy: String },
    /// The password is read before each login.
    #[error(transparent)]
    Password(#[from] PasswordError),
}

fn known(lsn: &Option<EndLsn>) -> String {
    lsn.map_or_else(|| "nothing".to_owned(), |lsn| lsn.to_string())
}

fn holder(pid: &Option<i32>) -> String {
    pid.map_or_else(|| "another session".to_owned(), |pid| format!("pid {pid}"))
}

impl SourceError {
    /// An error of an ordinary connection after it was opened.
    pub fn query(doing: impl Into<String>, error: tokio_postgres::Error) -> Self {
        let doing = doing.into();
        if let Some(db) = error.as_db_error() {
            return SourceError::Failed { doing, error: ServerError::from(db) };
        }
        let what = chain(&error);
        match into_io(error) {
            Ok(source) => SourceError::Lost { doing, source },
            Err(Closed::Yes) => SourceError::Lost { doing, source: io::ErrorKind::ConnectionAborted.into() },
            Err(Closed::No) => SourceError::Unexpected { doing, what },
        }
    }

    pub fn unexpected(doing: impl Into<String>, what: impl Into<String>) -> Self {
        SourceError::Unexpected { doing: doing.into(), what: what.into() }
    }

    /// Returns the problem, and what a person can do about it.
    pub fn fact_and_remedy(&self) -> (String, String) {
        match self {
            SourceError::Unsuitable { fact, remedy, .. } | SourceError::OwnersCode { fact, remedy } => {
                (fact.clone(), remedy.clone())
            }
            SourceError::Failed { doing, error } => {
                let remedy = error.hint.as_deref().or_else(|| error.remedy());
                let remedy = remedy.unwrap_or("fix what it names; it is tried again every 10 s").to_owned();
                (format!("Postgres failed while {doing}: {} (SQLSTATE {})", error.message, error.code), remedy)
            }
            other => (other.to_string(), String::new()),
        }
    }

    pub fn unsuitable(code: Code, fact: impl Into<String>, remedy: impl Into<String>) -> Self {
        SourceError::Unsuitable { code, fact: fact.into(), remedy: remedy.into() }
    }

    /// Returns the server's error, if it sent one.
    pub fn server(&self) -> Option<&ServerError> {
        match self {
            SourceError::Refused { error, .. }
            | SourceError::Failed { error, .. }
            | SourceError::Stream { error, .. } => Some(error),
            SourceError::Unreachable { .. }
            | SourceError::Silent { .. }
            | SourceError::Login { .. }
            | SourceError::Lost { .. }
            | SourceError::Garbled { .. }
            | SourceError::Shutdown { .. }
            | SourceError::Unexpected { .. }
            | SourceError::SlotInUse { .. }
            | SourceError::Unsuitable { .. }
            | SourceError::OwnersCode { .. }
            | SourceError::Password(_) => None,
        }
    }

    /// Whether a failure to read a table concerns that table only, so that others can still be read.
    pub fn is_about_the_table(&self) -> bool {
        match self {
            SourceError::Unsuitable { .. } | SourceError::OwnersCode { .. } => true,
            SourceError::Failed { error, .. } => match error.code.as_str() {
                // Another session's lock on it was held for too long.
                "55P03" => true,
                // A value that cannot be sent, a missing name or right, a size limit, corruption.
                _ => matches!(error.class(), "22" | "3F" | "42" | "54" | "XX"),
            },
            SourceError::Unreachable { .. }
            | SourceError::Silent { .. }
            | SourceError::Refused { .. }
            | SourceError::Login { .. }
            | SourceError::Lost { .. }
            | SourceError::Stream { .. }
            | SourceError::Garbled { .. }
            | SourceError::Shutdown { .. }
            | SourceError::Unexpected { .. }
            | SourceError::SlotInUse { .. }
            | SourceError::Password(_) => false,
        }
    }

    /// Whether the server rejected just this query and continues to serve the connection.
    pub fn is_about_the_query(&self) -> bool {
        match self {
            SourceError::Unsuitable { .. } | SourceError::OwnersCode { .. } | SourceError::Unexpected { .. } => true,
            // Shut down or terminated, by an administrator or a timeout: the connection ends.
            SourceError::Failed { error, .. } => {
                let ends = matches!(&*error.code, "25P03" | "25P04" | "57P01" | "57P02" | "57P03" | "57P04" | "57P05");
                error.class() != "08" && !ends
            }
            SourceError::Unreachable { .. }
            | SourceError::Silent { .. }
            | SourceError::Refused { .. }
            | SourceError::Login { .. }
            | SourceError::Lost { .. }
            | SourceError::Stream { .. }
            | SourceError::Garbled { .. }
            | SourceError::Shutdown { .. }
            | SourceError::Password(_)
            | SourceError::SlotInUse { .. } => false,
        }
    }

    /// Whether the server could not answer the query this time, through no fault of any object: cancelled, out of
    /// memory or disk space, a deadlock.
    pub fn is_transient_query_failure(&self) -> bool {
        matches!(self, SourceError::Failed { .. })
            && self.is_about_the_query()
            && !self.is_about_the_table()
            && self.disposition() == Disposition::Retry
    }

    /// Whether another session has held a lock on the table for too long.
    pub fn is_about_a_lock(&self) -> bool {
        matches!(self, SourceError::Failed { error, .. } if error.code == "55P03")
    }

    /// Whether the stream ended because an object does not exist at its position. Usually that is a publication younger
    /// than the position, which [`slot::publication_may_be_younger`] finds out. The message says which object, but in
    /// the server's language.
    pub fn is_undefined_in_stream(&self) -> bool {
        matches!(self, SourceError::Stream { error, .. } if error.code == "42704")
    }

    /// Returns what the stream had delivered when it ended with this error.
    pub fn received(&self) -> Option<EndLsn> {
        match self {
            SourceError::Stream { received, .. } => *received,
            _ => None,
        }
    }

    /// Returns where decoding a change failed. If it fails at the same position twice, Postgres cannot send that
    /// change.
    pub fn undecodable(&self) -> Option<Lsn> {
        match self {
            SourceError::Stream { error, .. } => error.decoding_at,
            _ => None,
        }
    }

    pub fn code(&self) -> Code {
        match self {
            SourceError::Unreachable { .. } | SourceError::Silent { .. } => Code::PostgresUnreachable,
            SourceError::Lost { .. } | SourceError::Shutdown { .. } => Code::PostgresConnectionLost,
            SourceError::Login { code, .. } | SourceError::Unsuitable { code, .. } => *code,
            SourceError::Stream { error, .. } if error.decoding_at.is_some() => Code::StreamStuck,
            SourceError::Stream { .. } if self.is_undefined_in_stream() => Code::SlotTooOld,
            // What these mean of a slot, they do not mean of a query: a file of a table, an object in another state, disk
            // space for sorting.
            SourceError::Failed { error, .. } if matches!(&*error.code, "53400" | "55000" | "58P01") => {
                Code::PostgresError
            }
            SourceError::Refused { error, .. }
            | SourceError::Failed { error, .. }
            | SourceError::Stream { error, .. } => error.cause(),
            SourceError::Garbled { .. } | SourceError::Unexpected { .. } => Code::PostgresProtocol,
            SourceError::SlotInUse { .. } => Code::SlotInUse,
            SourceError::OwnersCode { .. } => Code::TableOwnersCode,
            SourceError::Password(_) => Code::SecretUnavailable,
        }
    }

    pub fn disposition(&self) -> Disposition {
        match self {
            SourceError::Refused { error, .. } | SourceError::Failed { error, .. } => error.disposition(),
            // The session's own objects are missing or invalid: the slot, the publication, or a WAL segment. The resume
            // table decides what to do.
            SourceError::Stream { error, .. } => match error.disposition() {
                Disposition::Stop => Disposition::Reload,
                other => other,
            },
            SourceError::Garbled { error, .. } => error.disposition(),
            SourceError::Login { .. } | SourceError::Unsuitable { .. } | SourceError::OwnersCode { .. } => {
                Disposition::Stop
            }
            SourceError::Unreachable { .. }
            | SourceError::Silent { .. }
            | SourceError::Lost { .. }
            | SourceError::Shutdown { .. }
            | SourceError::Unexpected { .. }
            // The file existed at startup, so it may just be being replaced.
            | SourceError::Password(_)
            | SourceError::SlotInUse { .. } => Disposition::Retry,
        }
    }
}

/// An ErrorResponse: <https://www.postgresql.org/docs/current/protocol-error-fields.html>
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerError {
    /// SQLSTATE, five characters: <https://www.postgresql.org/docs/current/errcodes-appendix.html>
    pub code: String,
    pub message: String,
    pub detail: Option<String>,
    pub hint: Option<String>,
    /// The position of the change being decoded, from the context: `associated LSN 0/1A2B3C`.
    pub decoding_at: Option<Lsn>,
}

impl ServerError {
    /// Returns `None` if the message is not an error response. Reporting that is up to the caller.
    fn parse(mut fields: ErrorFields<'_>) -> io::Result<Self> {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let (mut code, mut message, mut detail, mut hint, mut decoding_at) = (None, None, None, None, None);
        while let Some(field) = fields.next()? {
            let value = field.value_bytes();
            match field.type_() {
                b'C' => code = Some(text(value)),
                b'M' => message = Some(text(value)),
                b'D' => detail = Some(text(value)),
                b'H' => hint = Some(text(value)),
                b'W' => decoding_at = associated_lsn(&text(value)),
                _ => {}
            }
        }
        Ok(ServerError {
            code: code.unwrap_or_else(|| "XX000".to_owned()),
            message: message.unwrap_or_else(|| "an error without a message".to_owned()),
            detail,
            hint,
            decoding_at,
        })
    }

    fn class(&self) -> &str {
        self.code.get(..2).unwrap_or("")
    }

    fn disposition(&self) -> Disposition {
        match self.code.as_str() {
            // A missing role, database, right, table, slot or publication; a feature that this server lacks; no free
            // slot.
            "28P01" | "28000" | "3D000" | "42501" | "42P01" | "42704" | "0A000" | "53400" => Disposition::Stop,
            // A column, type or schema that existed a moment ago: somebody is changing the table.
            "42703" | "3F000" => Disposition::Reload,
            // The slot's WAL is gone, it was invalidated, or it is not what it was: check the slot again.
            "55000" | "58P01" => Disposition::Reload,
            // Unavailable, starting, stopping, full, locked, a standby, corrupted: it passes, or fails again.
            _ => Disposition::Retry,
        }
    }

    fn cause(&self) -> Code {
        match self.code.as_str() {
            "3D000" => Code::PostgresDatabase,
            "42501" => Code::PostgresRights,
            "53300" => Code::PostgresConnections,
            "53400" => Code::SlotsExhausted,
            "55P03" => Code::PostgresLocked,
            "42P01" => Code::TableMissing,
            // The WAL segment was removed, or the slot invalidated.
            "55000" | "58P01" => Code::SlotLost,
            "57P03" => Code::PostgresUnreachable,
            "57P01" | "57P02" | "57P04" | "57P05" => Code::PostgresConnectionLost,
            _ if self.class() == "28" => Code::PostgresLogin,
            _ => Code::PostgresError,
        }
    }

    fn remedy(&self) -> Option<&'static str> {
        Some(match self.code.as_str() {
            "28P01" => {
                "check user and password, in postgres.reader_url or in postgres.url and postgres.password_file or \
                 postgres.password_command"
            }
            "28000" => {
                "let this role in from here (pg_hba.conf, by the name of the database; LOGIN), or show the certificate \
                 that it wants (sslcert, sslkey)"
            }
            "3D000" => "correct the database in postgres.url (or postgres.reader_url), or create it",
            "42501" => "grant the role what it lacks",
            "53300" => {
                "raise the limit that was reached (that of the role, of the database, max_connections or max_wal_senders), \
                 or end other sessions"
            }
            "42P01" => "correct the name in the configuration, or create the table",
            "55P03" => "end the session that holds a lock on the table, see pg_locks",
            _ => return None,
        })
    }

    /// Details name roles and files in these cases. Otherwise they quote row values, which must not appear in logs.
    fn detail_without_rows(&self) -> Option<&str> {
        matches!(self.class(), "28" | "3D" | "42" | "53" | "55" | "57" | "58").then_some(self.detail.as_deref()?)
    }
}

impl From<&tokio_postgres::error::DbError> for ServerError {
    fn from(db: &tokio_postgres::error::DbError) -> Self {
        ServerError {
            code: db.code().code().to_owned(),
            message: db.message().to_owned(),
            detail: db.detail().map(str::to_owned),
            hint: db.hint().map(str::to_owned),
            decoding_at: db.where_().and_then(associated_lsn),
        }
    }
}

impl fmt::Display for ServerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (SQLSTATE {})", self.message, self.code)?;
        if let Some(detail) = self.detail_without_rows() {
            write!(f, "; {detail}")?;
        }
        match (&self.hint, self.remedy()) {
            (Some(hint), _) => write!(f, ": {hint}"),
            (None, Some(remedy)) => write!(f, ": {remedy}"),
            (None, None) => Ok(()),
        }
    }
}

/// Parses `slot "s", output plugin "pgoutput", in the change callback, associated LSN 0/1A2B3C`, in any language of the
/// words.
/// <https://git.postgresql.org/gitweb/?p=postgresql.git;a=blob;f=src/backend/replication/logical/logical.c>
fn associated_lsn(context: &str) -> Option<Lsn> {
    let line = context.lines().rfind(|line| line.contains("pgoutput"))?;
    line.rsplit(|c: char| !c.is_ascii_hexdigit() && c != '/').find(|word| word.contains('/'))?.parse().ok()
}

enum Closed {
    Yes,
    No,
}

/// Returns the I/O error inside, if it is one.
fn into_io(error: tokio_postgres::Error) -> Result<io::Error, Closed> {
    let closed = if error.is_closed() { Closed::Yes } else { Closed::No };
    match error.into_source().map(|cause| cause.downcast::<io::Error>()) {
        Some(Ok(io)) => Ok(*io),
        Some(Err(_)) | None => Err(closed),
    }
}

/// Formats an error with its causes on one line.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(code: &str) -> ServerError {
        ServerError {
            code: code.to_owned(),
            message: "no".to_owned(),
            detail: Some("d".to_owned()),
            hint: None,
            decoding_at: None,
        }
    }

    #[test]
    fn what_passes_is_retried_and_what_a_person_must_change_is_not() {
        for (code, expected) in [
            ("57P03", Disposition::Retry),
            ("57P01", Disposition::Retry),
            ("53300", Disposition::Retry),
            ("55006", Disposition::Retry),
            ("55P03", Disposition::Retry),
            ("25006", Disposition::Retry),
            ("XX000", Disposition::Retry),
            ("", Disposition::Retry),
            ("28P01", Disposition::Stop),
            ("28000", Disposition::Stop),
            ("3D000", Disposition::Stop),
            ("42501", Disposition::Stop),
            ("42P01", Disposition::Stop),
            ("55000", Disposition::Reload),
        ] {
            let refused = SourceError::Refused { at: "h".to_owned(), error: error(code) };
            assert_eq!(refused.disposition(), expected, "{code}");
        }
    }

    #[test]
    fn only_what_failed_through_no_fault_of_an_object_is_a_transient_failure() {
        for (code, expected) in [
            ("57014", true),
            ("53200", true),
            ("53100", true),
            ("40001", true),
            ("40P01", true),
            ("57P01", false),
            ("42501", false),
            ("55P03", false),
            ("22P02", false),
            ("55000", false),
        ] {
            let failed = SourceError::Failed { doing: "reading".to_owned(), error: error(code) };
            assert_eq!(failed.is_transient_query_failure(), expected, "{code}");
        }
        assert!(!SourceError::unexpected("looking", "it is there no longer").is_transient_query_failure());
    }

    #[test]
    fn a_missing_publication_in_mid_stream_is_a_matter_of_the_resume_table() {
        let error = SourceError::Stream { slot: "s".to_owned(), received: None, error: error("42704") };
        assert_eq!(error.disposition(), Disposition::Reload);
    }

    #[test]
    fn the_context_says_where_decoding_failed() {
        for (context, lsn) in [
            (
                r#"slot "s", output plugin "pgoutput", in the change callback, associated LSN 0/1A2B3C"#,
                Some("0/1A2B3C"),
            ),
            ("x\nslot \"a/b\", output plugin \"pgoutput\", in the commit callback, associated LSN FF/0", Some("FF/0")),
            (
                r#"Slot »s«, Ausgabe-Plugin »pgoutput«, im Callback change, zugehörige LSN 16/B374D848"#,
                Some("16/B374D848"),
            ),
            (r#"slot "s", output plugin "pgoutput", in the startup callback"#, None),
            ("COPY t, line 1: associated LSN 0/1", None),
            ("", None),
        ] {
            assert_eq!(associated_lsn(context).map(|lsn| lsn.to_string()).as_deref(), lsn, "{context}");
        }
    }

    #[test]
    fn details_of_bad_values_stay_out_of_messages() {
        assert_eq!(error("22P02").to_string(), "no (SQLSTATE 22P02)");
        assert_eq!(error("57P03").to_string(), "no (SQLSTATE 57P03); d");
        assert!(error("28P01").to_string().ends_with("postgres.password_command"));
    }
}
