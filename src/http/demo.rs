//! `POST /demo/...`: passes on the actions of the demo's page, and serves the demo's part of that page. Authorization
//! is that of the operations. What an action does, and to which server, is unknown here. A daemon without a demo has
//! none of these routes.

use super::admin::{Body, guard, parse};
use super::app::App;
use super::refusal::{NotAllowed, OperationRefused, Problem, Refusal};
use crate::demo::{DemoRefusal, DemoRequest};
use axum::extract::{Path, State};
use axum::middleware::from_fn_with_state;
use axum::routing::post;
use axum::{Json, Router};
use serde_json::{Map, Value};
use std::sync::Arc;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::oneshot;

/// The demo's part of the page.
pub(super) const PART: &str = include_str!("page/demo.html");

/// Returns no routes unless the daemon runs under `prefetchd demo`.
pub(super) fn routes(app: &Arc<App>) -> Router<Arc<App>> {
    if app.context.page.demo.is_none() {
        return Router::new();
    }
    Router::new().route("/demo/{action}", post(action)).route_layer(from_fn_with_state(Arc::clone(app), guard))
}

/// The name and text of the script that [`PART`] loads.
pub(super) const SCRIPT: (&str, &str) = ("demo.js", include_str!("page/demo.js"));

/// Returns whether a route belongs to the demo.
pub(super) fn has(path: &str) -> bool {
    path.starts_with("/demo/")
}

/// Of a demo alone: rows to change, and what breaks the cache.
#[utoipa::path(post, path = "/demo/{action}", tag = "demo", security(("token" = [])),
    params(("action" = String, Path, description = "`state`, `add`, `update`, `delete`, `ghost`, `flushall`, `restart-redis`, \
        `fail-over`, `kill-replication`, `burst`, `two-tables` or `read-your-writes`")),
    request_body = serde_json::Value,
    responses(
        (status = 200, description = "Done, and how long it took.", body = serde_json::Value),
        NotAllowed, OperationRefused,
        (status = 404, description = "`unknown_route`: no such action.", body = Problem),
    ))]
pub(super) async fn action(
    State(app): State<Arc<App>>,
    Path(action): Path<String>,
    body: Body,
) -> Result<Json<Value>, Refusal> {
    let with: Map<String, Value> = parse(&body)?;
    let demo = app.context.page.demo.as_ref().ok_or(Refusal::UnknownRoute)?;
    let (answer, answered) = oneshot::channel();
    demo.try_send(DemoRequest { action, with, answer }).map_err(|error| match error {
        TrySendError::Full(_) => Refusal::Busy("too many actions wait for their turn: try again".to_owned()),
        TrySendError::Closed(_) => Refusal::Stopping,
    })?;
    let done = answered.await.map_err(|_| Refusal::Stopping)?;
    done.map(Json).map_err(|refused| {
        let why = refused.to_string();
        match refused {
            DemoRefusal::Unknown(_) => Refusal::UnknownRoute,
            DemoRefusal::Wrong(_) => Refusal::BadRequest(why),
            DemoRefusal::Busy(_) => Refusal::Busy(why),
            DemoRefusal::NotOurs(_) => Refusal::NotOurs(why),
            DemoRefusal::Refused(_) => Refusal::Refused(why),
        }
    })
}
