//! The status page and its files. They are compiled into the binary: nothing is fetched from other hosts, and the
//! browser is told to allow nothing else.
//!
//! The page uses only routes that are open to everybody. Names, keys and values in it are untrusted: its scripts insert
//! them as text.

use super::app::App;
use super::demo;
use super::file::file;
use axum::Router;
use std::sync::Arc;

const PAGE: &str = include_str!("page/page.html");
/// Where the demo's part is inserted.
const DEMO_GOES_HERE: &str = "<!-- demo -->\n";

/// Returns no routes if the page is disabled.
pub(super) fn routes(app: &Arc<App>) -> Router<Arc<App>> {
    if !app.context.page.is_shown {
        return Router::new();
    }
    let has_demo = app.context.page.demo.is_some();
    let page: Arc<str> = PAGE.replacen(DEMO_GOES_HERE, if has_demo { demo::PART } else { "" }, 1).into();
    let router = Router::new()
        .route("/", file("text/html; charset=utf-8", page))
        .route("/page/page.css", file("text/css; charset=utf-8", include_str!("page/page.css").into()))
        .route("/page/page.js", file("text/javascript; charset=utf-8", include_str!("page/page.js").into()));
    if has_demo { router.merge(demo::scripts()) } else { router }
}
