//! The status page, and what belongs to it. It comes out of the binary: nothing is fetched from elsewhere, and the
//! browser is told to allow nothing else.
//!
//! The page learns everything from the routes that anybody may use. Names, keys and values in it were chosen by others:
//! its scripts put them in as text.

use super::{App, demo};
use axum::Router;
use axum::http::header::{CONTENT_SECURITY_POLICY, CONTENT_TYPE, REFERRER_POLICY};
use axum::response::IntoResponse;
use axum::routing::{MethodRouter, get};
use std::sync::Arc;

const PAGE: &str = include_str!("page/page.html");
/// Where the demo's part goes.
const DEMO_GOES_HERE: &str = "<!-- demo -->\n";

const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// None at all where the page is turned off.
pub(super) fn routes(app: &Arc<App>) -> Router<Arc<App>> {
    if !app.context.page {
        return Router::new();
    }
    let has_demo = app.context.demo.is_some();
    let page: Arc<str> = PAGE.replacen(DEMO_GOES_HERE, if has_demo { demo::PART } else { "" }, 1).into();
    let router = Router::new()
        .route("/", file("text/html; charset=utf-8", page))
        .route("/page/page.css", file("text/css; charset=utf-8", include_str!("page/page.css").into()))
        .route("/page/page.js", file("text/javascript; charset=utf-8", include_str!("page/page.js").into()));
    if has_demo { router.merge(demo::scripts()) } else { router }
}

pub(super) fn file(kind: &'static str, text: Arc<str>) -> MethodRouter<Arc<App>> {
    get(async move || {
        let headers = [(CONTENT_TYPE, kind), (CONTENT_SECURITY_POLICY, POLICY), (REFERRER_POLICY, "no-referrer")];
        (headers, text.to_string()).into_response()
    })
}
