//! The status page and its files. They are compiled into the binary: nothing is fetched from other hosts, and the
//! browser is told to allow nothing else.
//!
//! The page uses only routes that are open to everybody. Names, keys and values in it are untrusted: its scripts insert
//! them as text.

use super::app::App;
use super::demo;
use super::file::{file, send};
use super::refusal::{Misdirected, Problem, Refusal};
use axum::Router;
use axum::extract::State;
use axum::http::Uri;
use axum::response::Response;
use axum::routing::get;
use std::sync::Arc;

const PAGE: &str = include_str!("page/page.html");
/// Where the demo's part is inserted.
const DEMO_GOES_HERE: &str = "<!-- demo -->\n";

/// What the page loads.
const FILES: &[(&str, &str)] = &[
    ("page.css", include_str!("page/page.css")),
    ("page.js", include_str!("page/page.js")),
    ("elements.js", include_str!("page/elements.js")),
    ("history.js", include_str!("page/history.js")),
    ("operations.js", include_str!("page/operations.js")),
    ("plots.js", include_str!("page/plots.js")),
    ("stream.js", include_str!("page/stream.js")),
    ("tables.js", include_str!("page/tables.js")),
    ("verdict.js", include_str!("page/verdict.js")),
    ("words.js", include_str!("page/words.js")),
];

/// Returns no routes if the page is disabled.
pub(super) fn routes(app: &Arc<App>) -> Router<Arc<App>> {
    if !app.context.page.is_shown {
        return Router::new();
    }
    let has_demo = app.context.page.demo.is_some();
    let page: Arc<str> = PAGE.replacen(DEMO_GOES_HERE, if has_demo { demo::PART } else { "" }, 1).into();
    Router::new().route("/", file("text/html; charset=utf-8", page)).route("/page/{file}", get(part))
}

/// A script or the style sheet of the status page.
#[utoipa::path(get, path = "/page/{file}", tag = "page", operation_id = "page_file",
    params(("file" = String, Path, description = "As the page names it.")),
    responses(
        (status = 200, description = "The file.", body = String, content_type = "text/javascript"),
        (status = 404, description = "`unknown_route`: no such file.", body = Problem),
        Misdirected,
    ))]
pub(super) async fn part(State(app): State<Arc<App>>, uri: Uri) -> Result<Response, Refusal> {
    let of_demo = app.context.page.demo.is_some().then_some(&demo::SCRIPT);
    let wanted = uri.path().strip_prefix("/page/");
    let found = FILES.iter().chain(of_demo).find(|(name, _)| wanted == Some(name));
    let (name, text) = found.ok_or(Refusal::UnknownRoute)?;
    let kind = if name.ends_with(".css") { "text/css; charset=utf-8" } else { "text/javascript; charset=utf-8" };
    Ok(send(kind, text))
}
