//! The last 15 minutes, as the daemon remembers them.

use super::app::App;
use super::refusal::Misdirected;
use crate::history::HistoryReport;
use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use std::sync::Arc;

/// The last 15 minutes: a figure a second, and what happened, with its cause.
#[utoipa::path(get, path = "/v1/history", tag = "health", responses(
    (status = 200, description = "What is not known is null.", body = HistoryReport),
    Misdirected,
))]
pub(super) async fn history(State(app): State<Arc<App>>) -> Response {
    Json(app.context.history.report()).into_response()
}
