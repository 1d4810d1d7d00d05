//! `POST /v1/admin/log`: the log's last lines, without keys of rows, for `prefetchd support`.
//!
//! Not a GET, and only with the token: the log names servers and tables.

use super::admin::{Body, guard, parse};
use super::app::App;
use super::refusal::{NotAllowed, Refusal};
use crate::row_keys::RowKeys;
use crate::telemetry;
use axum::extract::State;
use axum::middleware::from_fn_with_state;
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use axum::{Json, Router};
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use utoipa::ToSchema;

pub(super) fn routes(app: &Arc<App>) -> Router<Arc<App>> {
    Router::new().route("/v1/admin/log", post(log)).route_layer(from_fn_with_state(Arc::clone(app), guard))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Nothing {}

#[derive(Serialize, ToSchema)]
struct LastLines {
    /// Oldest first, at most 1,000 of 256 kB together. Where a key of a row stood, the rest is left out.
    lines: Vec<String>,
    /// How many came before them.
    forgotten: u64,
}

/// The log's last lines, without keys of rows.
#[utoipa::path(post, path = "/v1/admin/log", tag = "operations", security(("token" = [])), responses(
    (status = 200, description = "Since the start, as `log.level` lets them pass.", body = LastLines),
    NotAllowed,
))]
pub(super) async fn log(State(app): State<Arc<App>>, body: Body) -> Result<Response, Refusal> {
    let Nothing {} = parse(&body)?;
    let keys = RowKeys::of(&app.context.all_tables);
    let (lines, forgotten) = telemetry::last_lines(|text| keys.hidden(text));
    Ok(Json(LastLines { lines, forgotten }).into_response())
}
