//! Reads, health, metrics, events and the status page over HTTP.
//!
//! Rows come from Redis and from nowhere else: this layer must not know Postgres, nor write anything; what an operator
//! asks for is handed on. What a read may
//! promise comes from the checkpoint that was read in the same MULTI; the status only adds how old the contact with
//! Postgres is. Wrong here means: a 404 for a row that exists, or an old row called new.

mod admin;
mod connection;
mod demo;
mod describe;
mod events;
mod guesses;
mod names;
mod ops;
mod page;
mod places;
mod read;
pub mod refusal;
pub mod target;

pub use connection::Limits;
pub use names::Names;

use crate::admin::Asked;
use crate::demo as demonstration;
use crate::metrics::Metrics;
use crate::schema::TableSpec;
use crate::sightings::Sightings;
use crate::sink::reader::Reader;
use crate::status::{ChangeEvent, Status};
use axum::Router;
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::header::{CACHE_CONTROL, CONTENT_LENGTH, X_CONTENT_TYPE_OPTIONS};
use axum::http::{HeaderMap, HeaderValue};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use guesses::Guesses;
use places::{Batches, Places};
use refusal::Refusal;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::{Notify, broadcast, mpsc, watch};
use tokio_util::sync::CancellationToken;

/// What the rest of the daemon lends to its HTTP side.
#[derive(Clone)]
pub struct Context {
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
    /// Whether there is a status page.
    pub page: bool,
    /// Who acts for the page of the demo.
    pub demo: Option<mpsc::Sender<demonstration::Asked>>,
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

/// Serves until `stop`; returns when requests in flight have ended, 2 s later at most.
pub async fn serve(listener: TcpListener, context: Context, stop: CancellationToken) {
    serve_within(Limits::default(), listener, context, stop).await;
}

/// [`serve`] with other limits.
pub async fn serve_within(limits: Limits, listener: TcpListener, context: Context, stop: CancellationToken) {
    let (places, batches) = (Places::new(&limits), Batches::new(&context.reader));
    let app = Arc::new(App { context, guesses: Guesses::new(), places, batches, stop: stop.clone(), limits });
    connection::serve(listener, router(Arc::clone(&app)), &app.limits, &stop).await;
}

/// What every route may use.
struct App {
    context: Context,
    limits: Limits,
    guesses: Guesses,
    places: Places,
    /// Connections of their own for reads of several rows: those of one do not wait behind them.
    batches: Batches,
    stop: CancellationToken,
}

impl App {
    fn status(&self) -> Arc<Status> {
        Arc::clone(&self.context.status.borrow())
    }
}

fn router(app: Arc<App>) -> Router {
    let reads = Router::new()
        .route("/v1/status", get(ops::status))
        .route("/v1/events", get(events::events))
        .route("/v1/tables/{*key}", get(read::table))
        .route("/openapi.json", get(describe::openapi))
        .merge(page::routes(&app))
        .route_layer(from_fn_with_state(Arc::clone(&app), names::known_name));
    let work = reads.merge(admin::routes(&app)).merge(demo::routes(&app));
    Router::new()
        // For those who watch, under whatever name and however much is in hand; no row is in them.
        .route("/healthz", get(ops::healthz))
        .route("/readyz", get(ops::readyz))
        .route("/metrics", get(ops::metrics))
        .merge(work.route_layer(from_fn_with_state(Arc::clone(&app), in_hand)))
        .fallback(async || Refusal::UnknownRoute)
        .method_not_allowed_fallback(async || Refusal::MethodNotAllowed)
        .layer(DefaultBodyLimit::max(usize::try_from(app.limits.body_bytes).unwrap_or(usize::MAX)))
        .layer(from_fn_with_state(Arc::clone(&app), guard))
        .with_state(app)
}

/// What holds for every request: one `Host`, no large body, nothing that a cache may keep or a browser take
/// for something else.
async fn guard(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let limit_bytes = app.limits.body_bytes;
    let mut response = if let Err(refusal) = names::one_host(request.version(), request.headers()) {
        refusal.into_response()
    } else if body_bytes(request.headers()).is_some_and(|bytes| bytes > limit_bytes) {
        // The body is not read: nothing else can come over this connection.
        Refusal::BodyTooLarge { limit_bytes }.into_response()
    } else {
        next.run(request).await
    };
    let headers = response.headers_mut();
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

/// A request has a place while it is in hand.
async fn in_hand(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    match app.places.request() {
        Ok(_place) => next.run(request).await,
        Err(refusal) => refusal.into_response(),
    }
}

fn body_bytes(headers: &HeaderMap) -> Option<u64> {
    headers.get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}
