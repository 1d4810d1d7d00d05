//! What every request passes before and after its route, and which route it takes.

use super::app::App;
use super::connection::{ClientAddress, Serve};
use super::refusal::Refusal;
use super::target::{LOOKUPS, TABLES};
use super::{admin, demo, describe, events, history, list, log, names, ops, page, read};
use axum::Router;
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::header::{CACHE_CONTROL, CONTENT_LENGTH, HOST, X_CONTENT_TYPE_OPTIONS};
use axum::http::{HeaderMap, HeaderValue, Method};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use hyper::body::Incoming;
use hyper::service::Service;
use hyper_util::service::TowerToHyperService;
use std::convert::Infallible;
use std::sync::Arc;

/// All routes of one configuration.
#[derive(Clone)]
pub(super) struct Site {
    app: Arc<App>,
    routes: TowerToHyperService<Router>,
}

impl Site {
    pub(super) fn new(app: Arc<App>) -> Self {
        Self { routes: TowerToHyperService::new(router(Arc::clone(&app))), app }
    }

    /// Reads of rows, which are most requests, do without the router: its layers cost more than the read.
    async fn route(self, peer: ClientAddress, mut request: hyper::Request<Incoming>) -> Result<Response, Refusal> {
        names::one_host(request.version(), request.headers())?;
        let limit_bytes = self.app.limits.body_bytes;
        if body_bytes(request.headers()).is_some_and(|bytes| bytes > limit_bytes) {
            // The body is not read, so the connection cannot be reused.
            return Err(Refusal::BodyTooLarge { limit_bytes });
        }
        let is_of = |route: &str| request.uri().path().strip_prefix(route).is_some_and(|rest| !rest.is_empty());
        if request.method() == Method::GET && (is_of(TABLES) || is_of(LOOKUPS)) {
            let _place = self.app.places.request()?;
            self.app.is_known_name(&request)?;
            return Ok(match is_of(TABLES) {
                true => read::table(&self.app, peer, request.uri()).await,
                false => list::list(&self.app, peer, request.uri()).await,
            });
        }
        request.extensions_mut().insert(peer);
        let Ok(response): Result<_, Infallible> = self.routes.call(request).await;
        Ok(response)
    }
}

impl Serve for Site {
    /// The headers of every answer: caches must not keep it, and browsers must not guess its type.
    async fn answer(self, peer: ClientAddress, request: hyper::Request<Incoming>) -> Response {
        let mut response = self.route(peer, request).await.unwrap_or_else(IntoResponse::into_response);
        let headers = response.headers_mut();
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
        response
    }
}

fn router(app: Arc<App>) -> Router {
    let reads = Router::new()
        .route("/v1/status", get(ops::status))
        .route("/v1/events", get(events::events))
        .route("/v1/history", get(history::history))
        // GET does not come here. HEAD does, and what is not allowed.
        .route("/v1/tables/{*key}", get(read::head))
        .route("/v1/lookups/{*value}", get(list::head))
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
        .with_state(app)
}

impl App {
    /// On a loopback address, routes that show rows, or say which exist, answer only under a known name. On other addresses
    /// any name is accepted.
    fn is_known_name<B>(&self, request: &axum::http::Request<B>) -> Result<(), Refusal> {
        let names = &self.context.names;
        let host = request.headers().get(HOST);
        let is_known = || {
            host.is_none_or(|host| host.to_str().is_ok_and(|host| names.has(host)))
                && request.uri().authority().is_none_or(|authority| names.has(authority.as_str()))
        };
        if !names.are_of_loopback() || is_known() {
            return Ok(());
        }
        Err(Refusal::ForeignHost(host.map(|host| host.as_bytes().escape_ascii().to_string()).unwrap_or_default()))
    }
}

async fn known_name(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    match app.is_known_name(&request) {
        Ok(()) => next.run(request).await,
        Err(refusal) => refusal.into_response(),
    }
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
