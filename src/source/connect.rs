//! Ordinary connections, and the session settings that every connection shares.
//!
//! Knows logins; not what is asked afterwards. When it is wrong, loads and the stream show the same value as different
//! text (`DateStyle` of a role, say).

use super::answer::{Cells, query};
use super::bounds::Guarded;
use super::socket::{self, AsItIs, Peer, Socket};
use super::target::{PostgresTarget, SessionAttrs};
use super::{Closed, ServerError, SourceError, chain, into_io};
use std::io;
use std::time::Duration;
use tokio::io::AsyncReadExt;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_postgres::config::{SslMode, SslNegotiation};
use tokio_postgres::{Client, Config};

/// What every session sets, whatever the server, the database or the role would have: COPY and the stream must write
/// one value with the same bytes.
///
/// They are the last of the session's `options`, so that none of the user's own can change them.
pub const SESSION_OPTIONS: &[(&str, &str)] = &[
    ("DateStyle", "ISO"),
    ("IntervalStyle", "postgres"),
    ("TimeZone", "UTC"),
    ("extra_float_digits", "1"),
    ("bytea_output", "hex"),
    ("lc_monetary", "C"),
    // Decides how `regclass` and its like are written. Unless it is named, pg_temp comes first.
    ("search_path", "pg_catalog, pg_temp"),
    ("quote_all_identifiers", "off"),
    ("client_encoding", "UTF8"),
    ("standard_conforming_strings", "on"),
    // A policy that hides rows from a load and not from the stream must fail loudly.
    ("row_security", "off"),
    // With it the planner calls functions in a table's CHECK constraints, which are its owner's.
    ("constraint_exclusion", "off"),
    // The daemon bounds its waiting itself: a role's limits would end loads of large tables, and idle sessions.
    ("statement_timeout", "0"),
    ("lock_timeout", "0"),
    ("idle_in_transaction_session_timeout", "0"),
    ("idle_session_timeout", "0"),
];

/// The remedy where the session is not what its login asked for, or cannot be.
pub(super) const POOLER: &str = "a pooler stands between: connect to Postgres itself";

/// Set where the server knows them: an unknown name in `options` would end the login.
const NEWER_SETTINGS: &[(&str, &str)] = &[
    // Since Postgres 17.
    ("transaction_timeout", "0"),
    // Since 17, and 16.4, 15.8, 14.13: what stands in the place of a table, and runs functions of its owner.
    ("restrict_nonsystem_relation_kind", "view, foreign-table"),
];

/// What every new session is asked, as one statement: a walsender of Postgres 14 takes no more at once. Also makes
/// [`NEWER_SETTINGS`].
pub(super) fn session_sql() -> String {
    let settings: Vec<String> =
        SESSION_OPTIONS.iter().map(|(name, _)| format!("pg_catalog.current_setting('{name}', true)")).collect();
    let newer: Vec<String> = NEWER_SETTINGS.iter().map(|(name, value)| format!("('{name}', '{value}')")).collect();
    format!(
        "SELECT {}, pg_catalog.pg_postmaster_start_time(),
                (SELECT pg_catalog.count(pg_catalog.set_config(s.name, newer.value, false))
                   FROM (VALUES {}) newer(name, value)
                   JOIN pg_catalog.pg_settings s ON s.name OPERATOR(pg_catalog.=) newer.name)",
        settings.join(", "),
        newer.join(", ")
    )
}

/// Holds the answer to [`session_sql`] against [`SESSION_OPTIONS`], and gives the time when the server started: it tells
/// one server from another. A pooler may drop `options` (`ignore_startup_parameters` of PgBouncer), and then the values of
/// this session and of another would be written differently.
pub(super) fn check_session(at: &str, answer: &[Option<&str>]) -> Result<String, SourceError> {
    for ((name, pinned), value) in SESSION_OPTIONS.iter().zip(answer) {
        let value = value.unwrap_or_default();
        // The order of day, month and year follows, which does not matter for the ISO style.
        let is = if *name == "DateStyle" { value.split(',').next().unwrap_or_default() } else { value };
        if is != *pinned {
            let fact = format!("gave the session {name} = '{value}' where the login asked for '{pinned}'");
            return Err(SourceError::Login { at: at.to_owned(), fact, remedy: POOLER });
        }
    }
    let started = answer.get(SESSION_OPTIONS.len()).copied().flatten();
    started.map(str::to_owned).ok_or_else(|| SourceError::unexpected("preparing a session", "no time of start"))
}

/// How long a cancel request may take, for its socket and for the rest, each.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(5);

/// An ordinary connection. Dropping it closes the socket, whatever it was doing.
pub struct PostgresClient {
    pub client: Client,
    /// When its server started: the same for every session of one server, until that restarts.
    pub server_started: String,
    target: PostgresTarget,
    peer: Peer,
    task: JoinHandle<()>,
}

/// What became of the request to stop a running statement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum CancelRequest {
    NotSent,
    /// The server has dealt with it: what is sent from now on it cannot hit.
    Handled,
    /// It may hit whatever comes next.
    Unanswered,
}

impl PostgresClient {
    async fn prepare(&mut self, at: &str, wanted: SessionAttrs) -> Result<(), SourceError> {
        let doing = "preparing a session";
        if wanted != SessionAttrs::Any {
            let results = query(&self.client, doing, SessionAttrs::QUESTION).await?;
            let row = results.iter().flatten().next().ok_or_else(|| SourceError::unexpected(doing, "no answer"))?;
            let row = Cells { doing, row };
            wanted.suits(row.optional(0)?, row.optional(1)?).map_err(|why| unsuited(at, why))?;
        }
        let results = query(&self.client, doing, &session_sql()).await?;
        let row = results.iter().flatten().next().ok_or_else(|| SourceError::unexpected(doing, "no answer"))?;
        let row = Cells { doing, row };
        let answer = (0..=SESSION_OPTIONS.len()).map(|i| row.optional(i)).collect::<Result<Vec<_>, _>>()?;
        self.server_started = check_session(at, &answer)?;
        Ok(())
    }

    pub fn place(&self) -> Place {
        let (server_started, target, peer) = (self.server_started.clone(), self.target.clone(), self.peer.clone());
        Place { server_started, target, peer }
    }

    /// Asks the server to stop the running statement, on a connection of its own, as the protocol has it.
    ///
    /// Waits until the server closes that connection. It signals the session twice (the process and its process group),
    /// and may take its time between the two, so even a statement that failed as cancelled does not mean that nothing is
    /// on its way any more.
    ///
    /// <https://www.postgresql.org/docs/current/protocol-flow.html#PROTOCOL-FLOW-CANCELING-REQUESTS>
    pub(super) async fn cancel(&self) -> CancelRequest {
        let opened = timeout(CANCEL_TIMEOUT, socket::again(&self.target, &self.peer)).await;
        let Ok(Ok(mut socket)) = opened else { return CancelRequest::NotSent };
        let handled = async {
            self.client.cancel_token().cancel_query_raw(&mut socket, AsItIs).await.ok()?;
            // The server has nothing to say.
            (socket.read(&mut [0]).await.ok()? == 0).then_some(())
        };
        match timeout(CANCEL_TIMEOUT, handled).await {
            Ok(Some(())) => CancelRequest::Handled,
            Ok(None) | Err(_) => CancelRequest::Unanswered,
        }
    }
}

impl Drop for PostgresClient {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl std::ops::Deref for PostgresClient {
    type Target = Client;

    fn deref(&self) -> &Client {
        &self.client
    }
}

/// Where an ordinary connection is, so that others can be made there.
#[derive(Clone)]
pub struct Place {
    pub server_started: String,
    target: PostgresTarget,
    peer: Peer,
}

/// Opens an ordinary connection with [`SESSION_OPTIONS`], to the first server that will do.
pub async fn connect(target: &PostgresTarget, application_name: &str) -> Result<PostgresClient, SourceError> {
    open(target, None, application_name).await
}

/// As [`connect`], with the server of another connection. It may have restarted since.
pub async fn connect_beside(place: &Place, application_name: &str) -> Result<PostgresClient, SourceError> {
    open(&place.target, Some(&place.peer), application_name).await
}

async fn open(
    target: &PostgresTarget,
    beside: Option<&Peer>,
    application_name: &str,
) -> Result<PostgresClient, SourceError> {
    let mut login = Config::new();
    login
        .user(&target.user)
        .dbname(&target.database)
        .options(target.options())
        .application_name(application_name)
        .channel_binding(target.channel_binding)
        // As `AsItIs` wants it.
        .ssl_mode(SslMode::Require)
        .ssl_negotiation(SslNegotiation::Direct);
    if let Some(password) = target.password.read()? {
        login.password(password);
    }
    let login = &login;
    let log_in = |socket: Socket, at: String, wanted| async move {
        let peer = socket.peer.clone();
        let connected = login.connect_raw(Guarded::new(socket), AsItIs).await;
        let (client, connection) = connected.map_err(|error| login_error(&at, error))?;
        let task = tokio::spawn(async move {
            if let Err(error) = connection.await {
                // Whoever is waiting for an answer gets an error of its own.
                tracing::debug!(error = chain(&error), "connection to postgres ended");
            }
        });
        let mut client = PostgresClient { client, server_started: String::new(), target: target.clone(), peer, task };
        client.prepare(&at, wanted).await?;
        Ok(client)
    };
    match beside {
        Some(peer) => socket::beside(target, peer, log_in).await,
        None => socket::first(target, log_in).await,
    }
}

/// It may be another server after the next failover.
pub(super) fn unsuited(at: &str, why: &'static str) -> SourceError {
    SourceError::Unreachable { at: at.to_owned(), source: io::Error::new(io::ErrorKind::PermissionDenied, why) }
}

/// A refusal of our own: what the server wants, and what to do about it.
pub(super) type Refusal = (&'static str, &'static str);
/// Asked for a password and having none is not the server's error, and so has no code.
pub(super) const NO_PASSWORD: Refusal =
    ("asks for a password, and none is configured", "put it into postgres.url or postgres.password_file");
pub(super) const UNBOUND: Refusal = (
    "does not bind the login to the TLS connection, which channel_binding=require asks for",
    "use TLS, and scram-sha-256 in pg_hba.conf for this role, or remove channel_binding=require",
);

pub(super) fn refused_by_us(at: &str, (fact, remedy): Refusal) -> SourceError {
    SourceError::Login { at: at.to_owned(), fact: fact.to_owned(), remedy }
}

/// The server's refusal of a login.
pub(super) fn login_refused(at: &str, error: ServerError) -> SourceError {
    let at = at.to_owned();
    match error.code.as_str() {
        // protocol_violation: Postgres itself finds none in our startup message. PgBouncer and its like do, where they
        // cannot pass on a parameter of it.
        "08P01" => {
            let fact = format!("refused the login ({}, SQLSTATE {})", error.message, error.code);
            SourceError::Login { at, fact, remedy: POOLER }
        }
        _ => SourceError::Refused { at, error },
    }
}

fn login_error(at: &str, error: tokio_postgres::Error) -> SourceError {
    if let Some(db) = error.as_db_error() {
        return login_refused(at, ServerError::from(db));
    }
    let at = at.to_owned();
    // The words of the library, not of the server: they are English wherever the server is.
    let what = chain(&error);
    if what.contains("password missing") {
        return refused_by_us(&at, NO_PASSWORD);
    }
    if what.contains("did not use channel binding") {
        return refused_by_us(&at, UNBOUND);
    }
    if what.contains("unsupported") {
        let remedy = "use scram-sha-256, md5, password or trust in pg_hba.conf";
        return SourceError::Login { at, fact: format!("wants another login ({what})"), remedy };
    }
    match into_io(error) {
        Ok(source) => SourceError::Unreachable { at, source },
        Err(Closed::Yes) => SourceError::Unreachable { at, source: io::ErrorKind::ConnectionAborted.into() },
        Err(Closed::No) => SourceError::Unexpected { doing: format!("logging in to {at}"), what },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_with_another_setting_than_asked_for_is_refused() {
        let good: Vec<Option<&str>> =
            SESSION_OPTIONS.iter().map(|(_, value)| Some(*value)).chain([Some("then")]).collect();
        assert_eq!(check_session("h", &good).unwrap(), "then");
        for index in 0..SESSION_OPTIONS.len() {
            for other in [Some("other"), Some(""), None] {
                let mut bad = good.clone();
                bad[index] = other;
                let error = check_session("h", &bad).unwrap_err();
                assert_eq!(error.disposition(), crate::error::Disposition::Stop);
                let text = error.to_string();
                assert!(text.contains(SESSION_OPTIONS[index].0) && text.ends_with(POOLER), "{text}");
            }
        }
        let style = SESSION_OPTIONS.iter().position(|(name, _)| *name == "DateStyle").unwrap();
        for (value, good_style) in [("ISO, DMY", true), ("ISO, YMD", true), ("German, DMY", false), ("ISOX", false)] {
            let mut answer = good.clone();
            answer[style] = Some(value);
            assert_eq!(check_session("h", &answer).is_ok(), good_style, "{value}");
        }
    }
}
