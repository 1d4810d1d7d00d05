//! `GET /openapi.json`: the description of every route, for programs. A test requests each route and each status that
//! is described here, and finds no others.
//!
//! The attributes stand next to the handlers; the bodies describe themselves. Only routes without a function of their
//! own are described here.

use super::app::App;
use super::refusal::{Misdirected, Problem, ReadRefused};
use super::render::{List, Rows};
use super::{admin, demo, events, history, log, ops, page};
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use std::sync::Arc;
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa::{Modify, OpenApi};

#[derive(OpenApi)]
#[openapi(
    info(
        title = "prefetchd",
        description = "A Redis copy of Postgres tables, kept right after every commit. A GET is answered from Redis, \
                       never from Postgres. A request without a Host, or with two, is 400. What is not here is 404 `unknown_route`, another method 405 \
                       `method_not_allowed`, and a body over 64 KiB 413 `body_too_large`. \
                       Where too much is under way: 503 `overloaded`, but never for health and metrics."
    ),
    paths(
        ops::healthz,
        ops::readyz,
        ops::metrics,
        ops::status,
        history::history,
        events::events,
        row,
        rows,
        list,
        admin::pause,
        admin::resume,
        admin::refetch,
        admin::verify,
        admin::invalidate,
        admin::clear,
        admin::skip,
        admin::reload,
        log::log,
        demo::action,
        openapi,
        page,
        page::part
    ),
    modifiers(&Token)
)]
struct Description;

struct Token;

impl Modify for Token {
    fn modify(&self, openapi: &mut utoipa::openapi::OpenApi) {
        let scheme = HttpBuilder::new()
            .scheme(HttpAuthScheme::Bearer)
            .description(Some(
                "That of http.admin_token_file, or else the one that `run` makes for its lifetime, in the file that the log names.",
            ))
            .build();
        openapi.components.get_or_insert_default().add_security_scheme("token", SecurityScheme::Http(scheme));
    }
}

/// This description.
#[utoipa::path(get, path = "/openapi.json", tag = "page", responses((status = 200, description = "OpenAPI 3.1."), Misdirected))]
pub(super) async fn openapi(State(app): State<Arc<App>>) -> Response {
    let mut description = Description::openapi();
    let absent = |path: &String| {
        let of_the_page = path == "/" || path.starts_with("/page/");
        (of_the_page && !app.context.page.is_shown) || (demo::has(path) && app.context.page.demo.is_none())
    };
    description.paths.paths.retain(|path, _| !absent(path));
    let json = description.to_json().expect("a description is made of strings and maps");
    ([(CONTENT_TYPE, "application/json")], json).into_response()
}

// ------------------------------------------------------------------------------------------------ routes without a function

/// One row, from Redis. A composite key takes one path segment a column.
#[utoipa::path(get, path = "/v1/tables/{name}/{key}", tag = "rows",
    params(
        ("name" = String, Path, description = "The table, as the configuration calls it."),
        ("key" = String, Path, description = "The key's columns, in the order of the template. A / inside a value is %2F."),
        Asking,
    ),
    responses(
        (status = 200, description = "The row: its fields are strings, with `typed=true`, or if they are documents, any values.",
         body = BTreeMap<String, serde_json::Value>, headers(
            ("Prefetchd-LSN" = String, description = "The answer, a 404 too, is at least as new as this."),
            ("Prefetchd-TTL-Ms" = u64, description = "Until the key expires, were it not renewed."),
            ("Age" = u64, description = "Seconds since the last contact with Postgres."),
            ("Server-Timing" = String, description = "How long Redis took: `redis;dur=0.3`, in milliseconds."))),
        (status = 404, description = "`not_found`: there is no such row, for certain. `unknown_table`: no such table.",
         body = Problem),
        ReadRefused, Misdirected,
    ))]
#[allow(dead_code, reason = "one handler serves both")]
fn row() {}

/// Several rows of one moment. On a cluster with rows in several hash slots, see `Prefetchd-Consistent`.
#[utoipa::path(get, path = "/v1/tables/{name}", tag = "rows",
    params(
        ("name" = String, Path, description = "The table, as the configuration calls it."),
        ("key" = Vec<String>, Query, description = "A key as in Redis, without the prefix. Once for each row, at most 100."),
        Asking,
    ),
    responses(
        (status = 200, description = "By key, each as a single read returns it; null is a row that does not exist, for certain.", body = Rows, headers(
            ("Prefetchd-LSN" = String, description = "The answer is at least as new as this."),
            ("Prefetchd-Consistent" = String, description = "`false`: of two rows that one transaction changed, one may be \
             from before it and the other from after it. Not there: all rows are of one moment."),
            ("Age" = u64, description = "Seconds since the last contact with Postgres."),
            ("Server-Timing" = String, description = "How long Redis took: `redis;dur=0.3`, in milliseconds."))),
        (status = 404, description = "`unknown_table`", body = Problem),
        ReadRefused, Misdirected,
    ))]
#[allow(dead_code, reason = "one handler serves both")]
fn rows() {}

/// The rows of a lookup's list, in its order, all of one moment unless `Prefetchd-Consistent` says otherwise. A set is ordered by
/// the names of its rows, bytewise.
///
/// Following `next` gives every row once that stays in the list at its place meanwhile. A row that moves may come twice, or not
/// at all; a row that was added may come or not.
#[utoipa::path(get, path = "/v1/lookups/{table}/{lookup}/{value}", tag = "rows",
    params(
        ("table" = String, Path, description = "The table, as the configuration calls it."),
        ("lookup" = String, Path, description = "The lookup, as the configuration calls it."),
        ("value" = String, Path, description = "The values of its key's columns, one path segment each; none for a list of all rows. \
         A / inside a value is %2F; NULL is an empty segment, but with `null = \"omit\"` it is in no list."),
        ("limit" = Option<u16>, Query, description = "At most this many rows: 1 to 1000; 100 without it."),
        ("after" = Option<String>, Query, description = "The `next` of an earlier answer."),
        ("order" = Option<String>, Query, description = "`asc`, as without it, or `desc`."),
        Asking,
    ),
    responses(
        (status = 200, description = "None only where there is no such row, for certain. Rows that Redis cannot hold (dead letters) \
         are not among others, and those that would be in too many lists are in none.", body = List, headers(
            ("Prefetchd-LSN" = String, description = "The answer is at least as new as this."),
            ("Age" = u64, description = "Seconds since the last contact with Postgres."),
            ("Prefetchd-Consistent" = String, description = "`false`: list and rows lie in several hash slots of a cluster, and were \
             not read as of one moment. Each row has the list's value; a row that has only just got it may be missing."),
            ("Server-Timing" = String, description = "How long Redis took: `redis;dur=0.3`, in milliseconds."))),
        (status = 404, description = "`unknown_table`, `unknown_lookup`", body = Problem),
        ReadRefused, Misdirected,
    ))]
#[allow(dead_code, reason = "its handler takes the path as it is")]
fn list() {}

/// The status page.
#[utoipa::path(get, path = "/", tag = "page",
    responses((status = 200, description = "HTML.", body = String, content_type = "text/html"), Misdirected))]
#[allow(dead_code, reason = "a file")]
fn page() {}

/// What every read may ask for besides its keys.
#[derive(utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
#[allow(dead_code, reason = "a description")]
struct Asking {
    /// Only once everything up to here is applied: `0/1A2B3C`, as `pg_current_wal_insert_lsn()` gives it after a commit.
    min_lsn: Option<String>,
    /// How long to wait for `min_lsn`: `500ms`, `1s` (as without it), at most `30s`.
    wait: Option<String>,
    /// 503 `stale` where the last contact with Postgres is older: `30s`.
    max_age: Option<String>,
    /// `true`: values as `row_to_json` of Postgres writes them (numbers, booleans, null, arrays, JSON), in the order of the
    /// columns. `false`, as without it: strings, as they lie in Redis.
    typed: Option<bool>,
}
