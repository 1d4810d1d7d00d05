//! The connections to Postgres beside the stream's own: made when a load, the catalog's watcher or the sampler needs one,
//! and kept for the next.
//!
//! It must not know what they are used for. The stream does not depend on any of them: one that cannot be had is tried
//! again until it can, or until another user gives one back. Wrong here means: a connection limit ends the stream, or rows
//! are read from another server than the stream's.

use super::BridgeError;
use crate::error::{Backoff, Disposition};
use crate::source::SourceError;
use crate::source::connect::{self, Place, PostgresClient};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::Notify;

/// What passes sooner is not worth a word.
const WORTH_A_WORD: Duration = Duration::from_secs(2);
const WARN_AGAIN: Duration = Duration::from_secs(600);

/// Postgres is starting up, shutting down or recovering. Beside a stream that runs, it shuts down.
const CANNOT_CONNECT_NOW: &str = "57P03";

#[derive(Clone)]
pub struct Connections(Arc<Shared>);

struct Shared {
    /// The stream's server. Of several hosts another may answer, with older rows or a refusal that says nothing.
    place: Place,
    application_name: String,
    state: Mutex<Held>,
    returned: Notify,
}

#[derive(Default)]
struct Held {
    idle: Vec<PostgresClient>,
    trouble: Option<Trouble>,
    /// When a server last refused a connection: it is there.
    refused_at: Option<Instant>,
    unanswered_since: Option<Instant>,
    pace: Backoff,
    not_before: Option<Instant>,
    warned_at: Option<Instant>,
}

struct Trouble {
    since: Instant,
    text: String,
    /// A connection limit was reached, and which one is not known yet.
    limit: Reached,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reached {
    No,
    Unexplained,
    Explained,
}

impl Held {
    /// A load over fewer connections than it would like meets the limit again and again.
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
    pub fn new(place: Place, application_name: String) -> Self {
        let (state, returned) = (Mutex::default(), Notify::new());
        Self(Arc::new(Shared { place, application_name, state, returned }))
    }

    pub fn application_name(&self) -> &str {
        &self.0.application_name
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// As [`Self::take`], but waits no longer than that.
    pub async fn take_within(&self, patience: Duration) -> Result<PostgresClient, BridgeError> {
        tokio::time::timeout(patience, self.take()).await.unwrap_or_else(|_| {
            let why = self.held().trouble.as_ref().map_or_else(String::new, |trouble| format!(" ({})", trouble.text));
            let fact = format!("no connection to postgres was free for {} s{why}", patience.as_secs());
            Err(SourceError::unsuitable(fact, "ask again once one can be made").into())
        })
    }

    /// An idle connection, or a new one. Waits for as long as neither can be had.
    ///
    /// # Errors
    /// Where another server answers than the stream's, or the server shuts down: the session has to begin again.
    pub async fn take(&self) -> Result<PostgresClient, BridgeError> {
        loop {
            if let Some(client) = self.idle() {
                return Ok(client);
            }
            // All who wait share one pace: each refused login is a line in the server's log.
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
                connected = connect::connect_beside(&self.0.place, &self.0.application_name) => connected,
            };
            match connected {
                Ok(client) if client.server_started == self.0.place.server_started => {
                    self.held().pace.reset();
                    self.worked();
                    return Ok(client);
                }
                Ok(_) => {
                    let text = "postgres has restarted, or another server has taken its place";
                    return Err(BridgeError::Waiting(text.to_owned()));
                }
                // It lets nobody in any more, and waits for the stream to end: without samples nothing is confirmed to it.
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

    /// To be called only between two transactions.
    pub fn give_back(&self, client: PostgresClient) {
        self.held().idle.push(client);
        self.0.returned.notify_one();
    }

    /// Closes idle connections but one: somebody else may need them.
    pub fn keep_one(&self) {
        self.held().idle.truncate(1);
    }

    fn idle(&self) -> Option<PostgresClient> {
        let mut held = self.held();
        while let Some(client) = held.idle.pop() {
            // Ended meanwhile, by the server or by whatever stands between.
            if !client.is_closed() {
                return Some(client);
            }
        }
        None
    }

    /// Something was read, or a connection was made.
    pub fn worked(&self) {
        let mut held = self.held();
        (held.trouble, held.unanswered_since) = (None, None);
    }

    /// A connection could not be made, or was lost, or a query failed that is tried again.
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
            (trouble.text, trouble.limit) = (format!("a query beside the stream: {error}"), reached);
            tracing::debug!(%error, "a query beside the stream failed, trying again");
            return;
        }
        (trouble.text, trouble.limit) = (of_a_connection(error), reached);
        // What passes by itself shows in the status, should it last.
        if error.disposition() == Disposition::Stop && held.may_warn() {
            tracing::warn!(%error, "no further connection to postgres can be made, trying again; the stream goes on");
        } else {
            tracing::debug!(%error, "a connection to postgres failed, trying again");
        }
    }

    /// A limit was reached, and somebody who has a connection may find out which.
    pub fn asks_for_the_limit(&self) -> bool {
        self.held().trouble.as_ref().is_some_and(|trouble| trouble.limit == Reached::Unexplained)
    }

    pub fn explain(&self, limit: &str) {
        let mut held = self.held();
        let Some(trouble) = held.trouble.as_mut() else { return };
        (trouble.text, trouble.limit) = (of_a_connection(limit), Reached::Explained);
        if held.may_warn() {
            tracing::warn!("no further connection to postgres can be made, the stream goes on: {limit}");
        }
    }

    /// What loads and others wait for, where that has lasted.
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
    format!("a connection to postgres beside the stream's: {why}")
}
