//! Reads, health, metrics, events and the status page over HTTP.
//!
//! Rows come from Redis only: this layer must not know Postgres, nor write anything; operations are passed on. What a
//! read may promise follows from the checkpoint that is read in the same MULTI; the status only adds how old the last
//! contact with Postgres is. A mistake here returns 404 for a row that exists, or presents an old row as current.

mod admin;
mod app;
mod connection;
mod cursor;
mod demo;
mod describe;
mod events;
mod file;
mod guesses;
mod history;
mod list;
mod log;
mod names;
mod ops;
mod page;
mod places;
mod read;
pub mod refusal;
mod render;
mod standing;
pub mod target;

pub use app::{AdminToken, HttpContext, Page};
pub use connection::HttpLimits;
pub use names::Names;

use app::{App, Held};
use axum::Router;
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::header::{CACHE_CONTROL, CONTENT_LENGTH, HOST, X_CONTENT_TYPE_OPTIONS};
use axum::http::{HeaderMap, HeaderValue};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use guesses::Guesses;
use list::TableLists;
use places::{Batches, Places};
use refusal::Refusal;
use std::sync::Arc;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Serves until `stop`; returns when requests in flight have ended, at most 2 s later. A new context is used by every
/// request after it; event streams end, and begin anew with it.
pub async fn serve(listener: TcpListener, contexts: watch::Receiver<HttpContext>, stop: CancellationToken) {
    serve_within(HttpLimits::default(), listener, contexts, stop).await;
}

/// [`serve`] with other limits.
pub async fn serve_within(
    limits: HttpLimits,
    listener: TcpListener,
    mut contexts: watch::Receiver<HttpContext>,
    stop: CancellationToken,
) {
    let context = contexts.borrow_and_update().clone();
    let held = Arc::new(Held {
        places: Places::new(&limits),
        guesses: Guesses::new(),
        batches: Batches::new(&context.reader),
        limits: limits.clone(),
    });
    let generation = |context: HttpContext, replaced: CancellationToken| {
        let lists = context.tables.iter().map(TableLists::of).collect();
        router(Arc::new(App { context, held: held.clone(), lists, stop: stop.clone(), replaced }))
    };
    let mut replaced = stop.child_token();
    let (routers, current) = watch::channel(generation(context, replaced.clone()));
    let follow = async {
        while contexts.changed().await.is_ok() {
            let before = std::mem::replace(&mut replaced, stop.child_token());
            let _before = routers.send_replace(generation(contexts.borrow_and_update().clone(), replaced.clone()));
            before.cancel();
        }
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = connection::serve(listener, current, &limits, &stop) => {}
        () = follow => {}
    }
}

fn router(app: Arc<App>) -> Router {
    let reads = Router::new()
        .route("/v1/status", get(ops::status))
        .route("/v1/events", get(events::events))
        .route("/v1/history", get(history::history))
        .route("/v1/tables/{*key}", get(read::table))
        .route("/v1/lookups/{*value}", get(list::list))
        .route("/openapi.json", get(describe::openapi))
        .merge(page::routes(&app))
        .route_layer(from_fn_with_state(Arc::clone(&app), known_name));
    let work = reads.merge(admin::routes(&app)).merge(log::routes(&app)).merge(demo::routes(&app));
    Router::new()
        // For monitoring, under any host name and under any load; they contain no rows.
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

/// Checks of every request: one `Host`, no large body. The headers of every answer: caches must not keep it, and
/// browsers must not guess its type.
async fn guard(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let limit_bytes = app.limits.body_bytes;
    let mut response = if let Err(refusal) = names::one_host(request.version(), request.headers()) {
        refusal.into_response()
    } else if body_bytes(request.headers()).is_some_and(|bytes| bytes > limit_bytes) {
        // The body is not read, so the connection cannot be reused.
        Refusal::BodyTooLarge { limit_bytes }.into_response()
    } else {
        next.run(request).await
    };
    let headers = response.headers_mut();
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

/// On a loopback address, routes that show rows, or say which exist, answer only under a known name. On other addresses
/// any name is accepted.
async fn known_name(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let names = &app.context.names;
    let host = request.headers().get(HOST);
    let is_known = host.is_none_or(|host| host.to_str().is_ok_and(|host| names.has(host)))
        && request.uri().authority().is_none_or(|authority| names.has(authority.as_str()));
    if is_known || !names.are_of_loopback() {
        return next.run(request).await;
    }
    Refusal::ForeignHost(host.map(|host| host.as_bytes().escape_ascii().to_string()).unwrap_or_default())
        .into_response()
}

/// Each request holds a place while it is in flight.
async fn in_hand(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    match app.places.request() {
        Ok(_place) => next.run(request).await,
        Err(refusal) => refusal.into_response(),
    }
}

fn body_bytes(headers: &HeaderMap) -> Option<u64> {
    headers.get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}
