//! The connections to Postgres besides the stream's own: opened when a load, the catalog watcher or the sampler needs
//! one, and kept for the next.
//!
//! It must not know what they are used for. The stream does not depend on any of them: if one cannot be opened, this
//! keeps trying until it can or until another user returns one. A mistake here lets a connection limit end the stream,
//! or reads rows from a different server than the stream's.

use super::BridgeError;
use crate::code::Code;
use crate::error::{Backoff, Disposition};
use crate::source::SourceError;
use crate::source::connect::{self, Endpoint, PostgresClient};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::Notify;

/// Shorter problems are not reported.
const WORTH_A_WORD: Duration = Duration::from_secs(2);
const WARN_AGAIN: Duration = Duration::from_secs(600);

/// Postgres is starting up, shutting down or recovering. Since the stream is running, it is shutting down.
const CANNOT_CONNECT_NOW: &str = "57P03";

#[derive(Clone)]
pub struct Connections(Arc<Shared>);

struct Shared {
    /// The stream's server. Otherwise another of several hosts might answer, with older rows or a misleading error.
    endpoint: Endpoint,
    application_name: String,
    state: Mutex<Held>,
    returned: Notify,
}

#[derive(Default)]
struct Held {
    idle: Vec<PostgresClient>,
    trouble: Option<Trouble>,
    /// When a server last refused a connection, which proves that it is running.
    refused_at: Option<Instant>,
    unanswered_since: Option<Instant>,
    pace: Backoff,
    not_before: Option<Instant>,
    warned_at: Option<Instant>,
}

struct Trouble {
    since: Instant,
    text: String,
    /// Whether a connection limit was reached, and which one, if known.
    limit: Reached,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reached {
    No,
    Unexplained,
    Explained,
}

impl Held {
    /// A load with fewer connections than it would like reaches the limit repeatedly.
    fn may_warn(&mut self) -> bool {
        let now = Instant::now();
        let may = self.warned_at.is_none_or(|at| now.saturating_duration_since(at) >= WARN_AGAIN);
        if may {
            self.warned_at = Some(now);
        }
        may
    }
}

impl Connections {
    pub fn new(endpoint: Endpoint, application_name: String) -> Self {
        let (state, returned) = (Mutex::default(), Notify::new());
        Self(Arc::new(Shared { endpoint, application_name, state, returned }))
    }

    pub fn application_name(&self) -> &str {
        &self.0.application_name
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Like [`Self::take`], but waits no longer than `patience`.
    pub async fn take_within(&self, patience: Duration) -> Result<PostgresClient, BridgeError> {
        tokio::time::timeout(patience, self.take()).await.unwrap_or_else(|_| {
            let why = self.held().trouble.as_ref().map_or_else(String::new, |trouble| format!(" ({})", trouble.text));
            let fact = format!("no connection to postgres was free for {} s{why}", patience.as_secs());
            Err(SourceError::unsuitable(Code::PostgresConnections, fact, "ask again once one can be made").into())
        })
    }

    /// Returns an idle connection or a new one. Waits as long as neither is available.
    ///
    /// # Errors
    /// If a different server answers than the stream's, or if the server is shutting down. The session has to begin
    /// again then.
    pub async fn take(&self) -> Result<PostgresClient, BridgeError> {
        loop {
            if let Some(client) = self.idle() {
                return Ok(client);
            }
            // All that wait share one pace, because each refused login is a line in the server's log.
            let not_before = self.held().not_before.filter(|at| *at > Instant::now());
            if let Some(at) = not_before {
                tokio::select! {
                    () = self.0.returned.notified() => {}
                    () = tokio::time::sleep_until(at.into()) => {}
                }
                continue;
            }
            let connected = tokio::select! {
                biased;
                () = self.0.returned.notified() => continue,
                connected = connect::connect_beside(&self.0.endpoint, &self.0.application_name) => connected,
            };
            match connected {
                Ok(client) if client.server_started == self.0.endpoint.server_started => {
                    self.held().pace.reset();
                    self.worked();
                    return Ok(client);
                }
                Ok(_) => {
                    let text = "postgres has restarted, or another server has taken its place";
                    return Err(BridgeError::Waiting(Code::PostgresRestarted, text.to_owned()));
                }
                // It accepts no connections any more and waits for the stream to end, and without samples nothing is
                // confirmed to it.
                Err(error) if error.server().is_some_and(|server| server.code == CANNOT_CONNECT_NOW) => {
                    return Err(error.into());
                }
                Err(error) => {
                    self.failed(&error);
                    let mut held = self.held();
                    held.not_before = Some(Instant::now() + held.pace.next_delay());
                }
            }
        }
    }

    /// To be called between two transactions only.
    pub fn give_back(&self, client: PostgresClient) {
        self.held().idle.push(client);
        self.0.returned.notify_one();
    }

    /// Closes all idle connections but one, because others may need them.
    pub fn keep_one(&self) {
        self.held().idle.truncate(1);
    }

    fn idle(&self) -> Option<PostgresClient> {
        let mut held = self.held();
        while let Some(client) = held.idle.pop() {
            // Closed meanwhile by the server or by the network.
            if !client.is_closed() {
                return Some(client);
            }
        }
        None
    }

    /// Something was read, or a connection was opened.
    pub fn worked(&self) {
        let mut held = self.held();
        (held.trouble, held.unanswered_since) = (None, None);
    }

    /// A connection could not be opened or was lost, or a query failed that will be retried.
    pub fn failed(&self, error: &SourceError) {
        let code = error.server().map(|server| server.code.as_str());
        let mut held = self.held();
        if code.is_some() {
            held.refused_at = Some(Instant::now());
        }
        held.unanswered_since = match error {
            SourceError::Unreachable { .. } | SourceError::Lost { .. } => {
                held.unanswered_since.or(Some(Instant::now()))
            }
            _ => None,
        };
        let reached = if code == Some("53300") { Reached::Unexplained } else { Reached::No };
        let fresh = || Trouble { since: Instant::now(), text: String::new(), limit: Reached::No };
        let trouble = held.trouble.get_or_insert_with(fresh);
        if reached == Reached::Unexplained && trouble.limit == Reached::Explained {
            return;
        }
        if error.is_about_the_query() {
            (trouble.text, trouble.limit) = (format!("a query outside the stream: {error}"), reached);
            tracing::debug!(%error, "a query outside the stream failed, trying again");
            return;
        }
        (trouble.text, trouble.limit) = (of_a_connection(error), reached);
        // A temporary problem appears in the status if it lasts.
        if error.disposition() == Disposition::Stop && held.may_warn() {
            let code = error.code().as_str();
            tracing::warn!(code, %error, "no further connection to postgres can be made, trying again; the stream goes on");
        } else {
            tracing::debug!(%error, "a connection to postgres failed, trying again");
        }
    }

    /// Whether a limit was reached, so that whoever has a connection may find out which.
    pub fn asks_for_the_limit(&self) -> bool {
        self.held().trouble.as_ref().is_some_and(|trouble| trouble.limit == Reached::Unexplained)
    }

    pub fn explain(&self, limit: &str) {
        let mut held = self.held();
        let Some(trouble) = held.trouble.as_mut() else { return };
        (trouble.text, trouble.limit) = (of_a_connection(limit), Reached::Explained);
        if held.may_warn() {
            let code = Code::PostgresConnections.as_str();
            tracing::warn!(code, "no further connection to postgres can be made, the stream goes on: {limit}");
        }
    }

    /// What loads and others are waiting for, if it has lasted for a while.
    pub fn trouble(&self) -> Option<String> {
        let held = self.held();
        let trouble = held.trouble.as_ref().filter(|trouble| trouble.since.elapsed() >= WORTH_A_WORD);
        trouble.map(|trouble| trouble.text.clone())
    }

    /// Since when no server has answered at all, not even with a refusal.
    pub fn unanswered_since(&self) -> Option<Instant> {
        self.held().unanswered_since
    }

    pub fn refused_at(&self) -> Option<Instant> {
        self.held().refused_at
    }
}

fn of_a_connection(why: impl std::fmt::Display) -> String {
    format!("a further connection to postgres: {why}")
}
