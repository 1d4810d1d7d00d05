//! Asks Postgres once a second for its WAL position and for what an ordinary snapshot sees: from these the session
//! knows how fresh Redis is, and what may be confirmed.
//!
//! It only asks. A mistake here confirms nothing, or takes a Postgres that is gone for one that answers.

use super::BridgeError;
use super::connections::Connections;
use crate::error::Disposition;
use crate::source::connect::PostgresClient;
use crate::source::limits::{self, Opens};
use crate::source::snapshot::{self, Sample};
use crate::source::stream::Contact;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{Notify, mpsc, watch};

pub const SAMPLE_INTERVAL: Duration = Duration::from_secs(1);
/// If Postgres does not answer a trivial query within this, the connection counts as lost.
const SAMPLE_PATIENCE: Duration = Duration::from_secs(10);
/// Postgres counts as unavailable after this long without a sample and without a message of the stream. An idle stream
/// asks for a message after ten seconds.
const AWAY_AFTER: Duration = Duration::from_secs(12);

pub struct Sampler {
    pub connections: Connections,
    pub slot: String,
    pub opens: Opens,
    /// Of the stream.
    pub contact: watch::Receiver<Contact>,
    /// Notified when a sample is wanted immediately.
    pub now: Arc<Notify>,
    pub out: mpsc::Sender<Sample>,
}

impl Sampler {
    /// Runs until the session ends. Keeps its connection, and replaces it if it is lost.
    pub async fn run(self, client: PostgresClient) -> Result<(), BridgeError> {
        let mut interval = tokio::time::interval(SAMPLE_INTERVAL);
        interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut connected = Some(client);
        loop {
            tokio::select! {
                _ = interval.tick() => {}
                () = self.now.notified() => {}
            }
            let client = match connected.take() {
                Some(client) => client,
                None => self.reconnect().await?,
            };
            let sample = snapshot::sample(&client.client, &self.slot);
            match tokio::time::timeout(SAMPLE_PATIENCE, sample).await {
                Ok(Ok(sample)) => {
                    if self.connections.asks_for_the_limit() {
                        self.explain_limit(&client).await;
                    }
                    connected = Some(client);
                    self.out.send(sample).await.map_err(|_| BridgeError::SessionOver)?;
                }
                // Something is missing that another connection would not find either.
                Ok(Err(error)) if error.is_about_the_query() && error.disposition() != Disposition::Retry => {
                    return Err(error.into());
                }
                Ok(Err(error)) => self.connections.failed(&error),
                Err(_) => tracing::debug!("postgres does not answer the sampler, which looks for another connection"),
            }
        }
    }

    async fn reconnect(&self) -> Result<PostgresClient, BridgeError> {
        tokio::select! {
            client = self.connections.take() => client,
            () = self.away() => Err(BridgeError::PostgresSilent(AWAY_AFTER)),
        }
    }

    /// Returns when Postgres has neither sent anything on the stream nor refused a connection for too long; or when no
    /// new connection has been answered for as long, whatever the stream says: a server that shuts down behind a load
    /// balancer keeps the stream until everything is confirmed, and nothing is confirmed without samples.
    async fn away(&self) {
        let began = Instant::now();
        loop {
            let now = Instant::now();
            let heard = Some(self.contact.borrow().at.into_std()).max(self.connections.refused_at());
            let is_silent = heard.is_none_or(|heard| heard + AWAY_AFTER <= now);
            let unanswered = self.connections.unanswered_since();
            if is_silent || unanswered.is_some_and(|since| since.max(began) + AWAY_AFTER <= now) {
                return;
            }
            tokio::time::sleep(SAMPLE_INTERVAL).await;
        }
    }

    async fn explain_limit(&self, client: &PostgresClient) {
        let limits = tokio::time::timeout(
            SAMPLE_PATIENCE,
            limits::connection_limits(client, self.connections.application_name(), self.opens),
        );
        if let Ok(Ok(limits)) = limits.await {
            self.connections.explain(&limits.advice());
        }
    }
}
