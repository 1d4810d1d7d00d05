//! What every route may use: what the rest of the daemon lends to HTTP, and what HTTP keeps for itself.

use super::connection::HttpLimits;
use super::guesses::Guesses;
use super::names::Names;
use super::places::{Batches, Places};
use crate::admin::Asked;
use crate::demo::DemoRequest;
use crate::metrics::Metrics;
use crate::schema::TableSpec;
use crate::sightings::Sightings;
use crate::sink::reader::Reader;
use crate::status::{ChangeEvent, Moment, Status};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Notify, broadcast, mpsc, watch};
use tokio_util::sync::CancellationToken;

/// What the rest of the daemon lends to its HTTP side.
#[derive(Clone)]
pub struct HttpContext {
    pub status: watch::Receiver<Arc<Status>>,
    pub reader: Reader,
    pub sightings: Arc<Sightings>,
    /// In the order of the configuration; the same tables as the status and the metrics have.
    pub tables: Arc<[TableSpec]>,
    pub metrics: Arc<Metrics>,
    pub events: broadcast::Sender<ChangeEvent>,
    /// Notified while a read waits for a position: ask Postgres for its own now.
    pub position_wanted: Arc<Notify>,
    pub max_staleness: Duration,
    pub ask: mpsc::Sender<Asked>,
    pub admin_token: AdminToken,
    pub names: Names,
    pub page: Page,
}

/// What whoever asks for an operation has to show.
#[derive(Clone)]
pub enum AdminToken {
    /// Of http.admin_token_file: who has it may ask from anywhere.
    Configured(Arc<str>),
    /// Made for this run and this machine: no proxy may stand between, nor another name be used.
    Made(Arc<str>),
    /// Nobody may ask; why, and what to do.
    None(Arc<str>),
}

impl AdminToken {
    pub fn expose(&self) -> Option<&str> {
        match self {
            AdminToken::Configured(token) | AdminToken::Made(token) => Some(token),
            AdminToken::None(_) => None,
        }
    }
}

/// The status page.
#[derive(Clone)]
pub struct Page {
    pub is_shown: bool,
    /// Who acts for the page of a demo.
    pub demo: Option<mpsc::Sender<DemoRequest>>,
}

/// What every route may use.
pub(super) struct App {
    pub(super) context: HttpContext,
    pub(super) limits: HttpLimits,
    pub(super) guesses: Guesses,
    pub(super) places: Places,
    /// Connections of their own for reads of several rows, so that reads of one row do not wait behind them.
    pub(super) batches: Batches,
    pub(super) stop: CancellationToken,
}

impl App {
    pub(super) fn status(&self) -> Arc<Status> {
        Arc::clone(&self.context.status.borrow())
    }

    pub(super) fn status_json(&self) -> String {
        self.status().to_json(&self.context.metrics.read_counts(), Moment::now(), self.context.max_staleness)
    }
}
