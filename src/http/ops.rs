//! Health, readiness, metrics and status: copies of what the daemon knows about itself, without I/O.

use super::app::App;
use super::refusal::Misdirected;
use crate::status::Moment;
use crate::status::{StatusReport, VerdictReport};
use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::json;
use std::sync::Arc;
use utoipa::ToSchema;

#[derive(Serialize, ToSchema)]
struct Ready<'a> {
    ready: bool,
    reasons: Vec<String>,
    /// As in the status: what is wrong besides, too.
    verdict: VerdictReport<'a>,
}

/// Whether the process works.
#[utoipa::path(get, path = "/healthz", tag = "health", responses((status = 200, description = "It does.")))]
pub(super) async fn healthz() -> Response {
    Json(json!({"status": "ok"})).into_response()
}

/// Whether to send readers here.
#[utoipa::path(get, path = "/readyz", tag = "health", responses(
    (status = 200, description = "Every table is loaded, the stream runs, lag and contact are within `max_staleness`.",
     body = Ready),
    (status = 503, description = "It is not so; the reasons say what is missing.", body = Ready),
))]
pub(super) async fn readyz(State(app): State<Arc<App>>) -> Response {
    let (status, now, max_staleness) = (app.status(), Moment::now(), app.context.max_staleness);
    let (reasons, verdict) = (status.readiness(now, max_staleness), status.verdict(now, max_staleness));
    let verdict = VerdictReport::of(&verdict);
    let code = if reasons.is_empty() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (code, Json(Ready { ready: reasons.is_empty(), reasons, verdict })).into_response()
}

/// For Prometheus.
#[utoipa::path(get, path = "/metrics", tag = "health", responses(
    (status = 200, description = "Prometheus text format.", body = String, content_type = "text/plain"),
))]
pub(super) async fn metrics(State(app): State<Arc<App>>) -> Response {
    let text = app.context.metrics.render(&app.status(), Moment::now(), app.context.max_staleness);
    ([(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response()
}

/// Everything the daemon knows of itself.
#[utoipa::path(get, path = "/v1/status", tag = "health", responses(
    (status = 200, description = "What is not known is null.", body = StatusReport),
    Misdirected,
))]
pub(super) async fn status(State(app): State<Arc<App>>) -> Response {
    ([(CONTENT_TYPE, "application/json")], app.status_json()).into_response()
}
