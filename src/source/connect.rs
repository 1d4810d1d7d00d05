//! Ordinary connections: the login, the check of the session, the cancel request, and what a failed login means.
//!
//! It knows logins, not the queries that follow. A mistake here runs a statement in a session with other settings than
//! intended, or on another server than the stream's.

use super::answer::{Cells, query};
use super::bounds::MessageBounds;
use super::settings::{POOLER, SESSION_OPTIONS, check_session, session_sql};
use super::socket::{self, AsItIs, Peer, Socket};
use super::target::{PostgresTarget, SessionAttrs};
use super::{Closed, ServerError, SourceError, chain, into_io};
use crate::bounded::Bounded;
use crate::code::Code;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::io::AsyncReadExt;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_postgres::config::{SslMode, SslNegotiation};
use tokio_postgres::{Client, Config};

/// How long a cancel request may take: for its socket, and again for the rest.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(5);

/// An ordinary connection. Dropping it closes the socket, whatever is running.
pub struct PostgresClient {
    pub client: Client,
    /// When its server started: the same for all sessions of one server until it restarts.
    pub server_started: String,
    target: PostgresTarget,
    peer: Peer,
    task: JoinHandle<()>,
    /// Bytes of COPY.
    received: AtomicU64,
}

/// The outcome of a request to cancel a running statement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum CancelRequest {
    NotSent,
    /// The server has processed it: it cannot hit a statement sent from now on.
    Handled,
    /// It may hit a later statement.
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

    /// Returns how many bytes of rows the server has sent, those that were thrown away included.
    pub fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    pub(super) fn receives(&self, bytes: usize) {
        self.received.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub fn endpoint(&self) -> Endpoint {
        let (server_started, target, peer) = (self.server_started.clone(), self.target.clone(), self.peer.clone());
        Endpoint { server_started, target, peer }
    }

    /// Asks the server to cancel the running statement, on a separate connection, as the protocol requires.
    ///
    /// Waits until the server closes that connection. The server signals the session twice (the process and its process
    /// group), possibly with a delay in between, so even a statement that failed as cancelled does not prove that no
    /// signal is on its way.
    ///
    /// <https://www.postgresql.org/docs/current/protocol-flow.html#PROTOCOL-FLOW-CANCELING-REQUESTS>
    pub(super) async fn cancel(&self) -> CancelRequest {
        let opened = timeout(CANCEL_TIMEOUT, socket::again(&self.target, &self.peer)).await;
        let Ok(Ok(mut socket)) = opened else { return CancelRequest::NotSent };
        let handled = async {
            self.client.cancel_token().cancel_query_raw(&mut socket, AsItIs).await.ok()?;
            // The server sends nothing; it only closes the connection.
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

/// Where an ordinary connection leads, so that others can be opened to the same server.
#[derive(Clone)]
pub struct Endpoint {
    pub server_started: String,
    target: PostgresTarget,
    peer: Peer,
}

/// Opens an ordinary connection with [`SESSION_OPTIONS`], to the first acceptable server.
pub async fn connect(target: &PostgresTarget, application_name: &str) -> Result<PostgresClient, SourceError> {
    open(target, None, application_name).await
}

/// Like [`connect`], to the server of another connection. It may have restarted since.
pub async fn connect_beside(endpoint: &Endpoint, application_name: &str) -> Result<PostgresClient, SourceError> {
    open(&endpoint.target, Some(&endpoint.peer), application_name).await
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
        // `AsItIs` requires it.
        .ssl_mode(SslMode::Require)
        .ssl_negotiation(SslNegotiation::Direct);
    if let Some(password) = target.password.read_for_login().await? {
        login.password(password);
    }
    let login = &login;
    let log_in = |socket: Socket, at: String, wanted| async move {
        let peer = socket.peer.clone();
        let connected = login.connect_raw(Bounded::new(socket, MessageBounds::default()), AsItIs).await;
        let (client, connection) = connected.map_err(|error| login_error(&at, error))?;
        let task = tokio::spawn(async move {
            if let Err(error) = connection.await {
                // Callers that wait for an answer get an error of their own.
                tracing::debug!(error = chain(&error), "connection to postgres ended");
            }
        });
        let (server_started, received, target) = (String::new(), AtomicU64::new(0), target.clone());
        let mut client = PostgresClient { client, server_started, target, peer, task, received };
        client.prepare(&at, wanted).await?;
        Ok(client)
    };
    match beside {
        Some(peer) => socket::beside(target, peer, log_in).await,
        None => socket::first(target, log_in).await,
    }
}

/// After the next failover another server may answer.
pub(super) fn unsuited(at: &str, why: &'static str) -> SourceError {
    SourceError::Unreachable { at: at.to_owned(), source: io::Error::new(io::ErrorKind::PermissionDenied, why) }
}

/// A login that was refused on this side: what the server wants, and what to do about it.
pub(super) type LoginRefusal = (&'static str, &'static str);
/// A server that asks for a password when there is none reports no error, so there is no code.
pub(super) const NO_PASSWORD: LoginRefusal =
    ("asks for a password, and none is configured", "set postgres.password_file or postgres.password_command");
pub(super) const UNBOUND: LoginRefusal = (
    "does not bind the login to the TLS connection, which channel_binding=require asks for",
    "use TLS, and scram-sha-256 in pg_hba.conf for this role, or remove channel_binding=require",
);

pub(super) fn refused_by_us(at: &str, (fact, remedy): LoginRefusal) -> SourceError {
    SourceError::Login { code: Code::PostgresLogin, at: at.to_owned(), fact: fact.to_owned(), remedy }
}

/// Returns the error for a login that the server refused.
pub(super) fn login_refused(at: &str, error: ServerError) -> SourceError {
    let at = at.to_owned();
    match error.code.as_str() {
        // protocol_violation: Postgres itself finds none in our startup message. Poolers such as PgBouncer report it if
        // they cannot pass on one of its parameters.
        "08P01" => {
            let fact = format!("refused the login ({}, SQLSTATE {})", error.message, error.code);
            SourceError::Login { code: Code::PostgresPooler, at, fact, remedy: POOLER }
        }
        _ => SourceError::Refused { at, error },
    }
}

fn login_error(at: &str, error: tokio_postgres::Error) -> SourceError {
    if let Some(db) = error.as_db_error() {
        return login_refused(at, ServerError::from(db));
    }
    let at = at.to_owned();
    // The library's words, not the server's: they are English whatever the server's language.
    let what = chain(&error);
    if what.contains("password missing") {
        return refused_by_us(&at, NO_PASSWORD);
    }
    if what.contains("did not use channel binding") {
        return refused_by_us(&at, UNBOUND);
    }
    if what.contains("unsupported") {
        let remedy = "use scram-sha-256, md5, password or trust in pg_hba.conf";
        let fact = format!("wants another login ({what})");
        return SourceError::Login { code: Code::PostgresLogin, at, fact, remedy };
    }
    match into_io(error) {
        Ok(source) => SourceError::Unreachable { at, source },
        Err(Closed::Yes) => SourceError::Unreachable { at, source: io::ErrorKind::ConnectionAborted.into() },
        Err(Closed::No) => SourceError::Unexpected { doing: format!("logging in to {at}"), what },
    }
}
