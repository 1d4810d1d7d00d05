//! Serves one file of the status page. The browser is told to load nothing from other hosts.

use super::app::App;
use axum::http::header::{CONTENT_SECURITY_POLICY, CONTENT_TYPE, REFERRER_POLICY};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, get};
use std::sync::Arc;

const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

pub(super) fn file(kind: &'static str, text: Arc<str>) -> MethodRouter<Arc<App>> {
    get(async move || send(kind, &text))
}

pub(super) fn send(kind: &'static str, text: &str) -> Response {
    let headers = [(CONTENT_TYPE, kind), (CONTENT_SECURITY_POLICY, POLICY), (REFERRER_POLICY, "no-referrer")];
    (headers, text.to_owned()).into_response()
}
