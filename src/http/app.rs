//! What every route may use: what the rest of the daemon provides to HTTP, and HTTP's own state.

use super::connection::HttpLimits;
use super::guesses::Guesses;
use super::list::TableLists;
use super::memo::Memo;
use super::names::Names;
use super::places::{Batches, Places};
use crate::admin::Asked;
use crate::checkpoint::{Checkpoint, TableMark};
use crate::demo::DemoRequest;
use crate::history::History;
use crate::metrics::Metrics;
use crate::reload::Wanted;
use crate::schema::TableSpec;
use crate::sightings::Sightings;
use crate::sink::any_reader::AnyReader;
use crate::status::{ChangeEvent, Moment, ReadCounts, Status, TableStatus};
use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Notify, broadcast, mpsc, watch};
use tokio_util::sync::CancellationToken;

/// What the rest of the daemon provides to its HTTP side.
#[derive(Clone)]
pub struct HttpContext {
    pub status: watch::Receiver<Arc<Status>>,
    pub reader: AnyReader,
    pub sightings: Arc<Sightings>,
    /// In configuration order, like the tables in the status and the metrics.
    pub tables: Arc<[TableSpec]>,
    pub metrics: Arc<Metrics>,
    pub history: Arc<History>,
    pub events: broadcast::Sender<ChangeEvent>,
    /// Notified while a read waits for a position, so that Postgres is asked for its current one.
    pub position_wanted: Arc<Notify>,
    pub max_staleness: Duration,
    pub ask: mpsc::Sender<Asked>,
    /// `None` if the configuration cannot be read again.
    pub reload: Option<mpsc::Sender<Wanted>>,
    /// These, and those of earlier configurations.
    pub all_tables: Arc<[TableSpec]>,
    /// Tables that the last reload has changed, and the newest epoch at that time: what the checkpoints of that epoch say of
    /// them is about other rows.
    pub changed: Arc<(Vec<String>, u64)>,
    pub admin_token: AdminToken,
    pub names: Names,
    pub page: Page,
}

/// What the caller of an operation must present.
#[derive(Clone)]
pub enum AdminToken {
    /// From http.admin_token_file: its holder may call from anywhere.
    Configured(Arc<str>),
    /// Generated for this run and this machine: requests through a proxy or under another name are refused.
    Made(Arc<str>),
    /// Operations are disabled; the text says why, and what to do.
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
    /// Performs the actions of a demo's page.
    pub demo: Option<mpsc::Sender<DemoRequest>>,
}

/// What every route may use.
pub(super) struct App {
    pub(super) context: HttpContext,
    pub(super) held: Arc<Held>,
    /// The head of the checkpoint, as it was read last.
    pub(super) heads: Memo<Checkpoint>,
    /// The entry of each table, as it was read last.
    pub(super) marks: Box<[Memo<TableMark>]>,
    /// The lookups of each table.
    pub(super) lists: Box<[Option<TableLists>]>,
    pub(super) stop: CancellationToken,
    /// Another context has taken the place of this one, or the daemon stops.
    pub(super) replaced: CancellationToken,
}

/// What outlives a reload.
pub(super) struct Held {
    pub(super) limits: HttpLimits,
    pub(super) guesses: Guesses,
    pub(super) places: Places,
    /// Separate connections for reads of several rows, so that reads of one row do not wait behind them.
    pub(super) batches: Batches,
}

impl Deref for App {
    type Target = Held;

    fn deref(&self) -> &Held {
        &self.held
    }
}

impl App {
    pub(super) fn status(&self) -> Arc<Status> {
        Arc::clone(&self.context.status.borrow())
    }

    pub(super) fn status_json(&self) -> String {
        let status = self.status();
        // Right after a reload, the tables of the status may still be those before it.
        let counts = |(place, table): (usize, &TableStatus)| self.context.metrics.read_counts_of(place, &table.name);
        let counts: Vec<ReadCounts> = status.tables.iter().enumerate().map(counts).collect();
        status.to_json(&counts, Moment::now(), self.context.max_staleness)
    }
}
