//! `GET /openapi.json`: the description of every route, for programs. A test asks for each route and each status that is
//! described here, and finds no other.
//!
//! The attributes stand with the handlers. Here is what several share, and what is in the bodies.

use super::{App, admin, demo, events, ops};
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use std::collections::BTreeMap;
use std::sync::Arc;
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa::{IntoResponses, Modify, OpenApi, ToSchema};

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
        events::events,
        row,
        rows,
        admin::pause,
        admin::resume,
        admin::refetch,
        admin::verify,
        admin::invalidate,
        admin::clear,
        admin::skip,
        demo::action,
        openapi,
        page,
        page_css,
        page_js,
        demo_js
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
        let of_the_demo = path.starts_with("/demo/") || path == "/page/demo.js";
        (of_the_page && !app.context.page) || (of_the_demo && app.context.demo.is_none())
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
        (status = 200, description = "The row.", body = BTreeMap<String, String>, headers(
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

/// Several rows of one moment.
#[utoipa::path(get, path = "/v1/tables/{name}", tag = "rows",
    params(
        ("name" = String, Path, description = "The table, as the configuration calls it."),
        ("key" = Vec<String>, Query, description = "A key as in Redis, without the prefix. Once for each row, at most 100."),
        Asking,
    ),
    responses(
        (status = 200, description = "By key; null is a row that does not exist, for certain.", body = Rows, headers(
            ("Prefetchd-LSN" = String, description = "The answer is at least as new as this."),
            ("Age" = u64, description = "Seconds since the last contact with Postgres."),
            ("Server-Timing" = String, description = "How long Redis took: `redis;dur=0.3`, in milliseconds."))),
        (status = 404, description = "`unknown_table`", body = Problem),
        ReadRefused, Misdirected,
    ))]
#[allow(dead_code, reason = "one handler serves both")]
fn rows() {}

/// The status page.
#[utoipa::path(get, path = "/", tag = "page",
    responses((status = 200, description = "HTML.", body = String, content_type = "text/html"), Misdirected))]
#[allow(dead_code, reason = "a file")]
fn page() {}

/// Of the status page.
#[utoipa::path(get, path = "/page/page.css", tag = "page",
    responses((status = 200, description = "A style sheet.", body = String, content_type = "text/css"), Misdirected))]
#[allow(dead_code, reason = "a file")]
fn page_css() {}

/// Of the status page.
#[utoipa::path(get, path = "/page/page.js", tag = "page",
    responses((status = 200, description = "A script.", body = String, content_type = "text/javascript"), Misdirected))]
#[allow(dead_code, reason = "a file")]
fn page_js() {}

/// Of the status page of a demo.
#[utoipa::path(get, path = "/page/demo.js", tag = "page",
    responses((status = 200, description = "A script.", body = String, content_type = "text/javascript"), Misdirected))]
#[allow(dead_code, reason = "a file")]
fn demo_js() {}

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
}

// ------------------------------------------------------------------------------------------------ what several answer

/// Every answer that is not the thing asked for.
#[derive(ToSchema)]
#[allow(dead_code, reason = "a description")]
pub(super) struct Problem {
    /// For programs: `not_found`, `busy`.
    error: String,
    /// For people.
    message: String,
}

#[derive(IntoResponses)]
#[allow(dead_code, reason = "a description")]
enum ReadRefused {
    /// `bad_request`: the message says what is wrong. `too_large`: several rows have more than 32 MB together; ask for fewer.
    #[response(status = 400)]
    Bad(#[to_schema] Problem),
    /// `loading`, `incomplete`, `stale`, `healing`, `redis_unavailable`, `stopping`: it may exist. An incident. `blocked`: the
    /// table cannot be followed until a person has done what the message says. `dead_letter`: the row exists, and
    /// Redis cannot hold it.
    #[response(status = 503)]
    Unsure(#[to_schema] Problem),
    /// `lagging`: `min_lsn` was not reached in time.
    #[response(status = 504)]
    Late(#[to_schema] Problem),
}

#[derive(IntoResponses)]
#[allow(dead_code, reason = "a description")]
pub(super) enum Misdirected {
    /// `foreign_host`: on a loopback address, under a name that http.hosts does not list.
    #[response(status = 421)]
    ForeignHost(#[to_schema] Problem),
}

#[derive(IntoResponses)]
#[allow(dead_code, reason = "a description")]
pub(super) enum OperationRefused {
    /// `bad_request`: the message says what is wrong.
    #[response(status = 400)]
    Bad(#[to_schema] Problem),
    /// `unauthorized`: without the token, or with another.
    #[response(status = 401)]
    NoToken(#[to_schema] Problem),
    /// `foreign_origin`. `admin_disabled`: with the token that `run` made, through a proxy or under a foreign `Host`; or
    /// there is none.
    #[response(status = 403)]
    Forbidden(#[to_schema] Problem),
    /// `busy`: another one is under way. `paused`. `nothing_to_skip`. In a demo: `given_server`, `refused`.
    #[response(status = 409)]
    NotNow(#[to_schema] Problem),
    /// `request_timeout`: the body did not come in time.
    #[response(status = 408)]
    Slow(#[to_schema] Problem),
    /// `body_too_large`
    #[response(status = 413)]
    Large(#[to_schema] Problem),
    /// `unsupported_media_type`: JSON only.
    #[response(status = 415)]
    NotJson(#[to_schema] Problem),
    /// `unavailable`, `interrupted`, `stopping`. `not_compared`: a comparison that cannot be made, with the reason; the table
    /// stays as it is.
    #[response(status = 503)]
    Unavailable(#[to_schema] Problem),
}

#[derive(IntoResponses)]
#[allow(dead_code, reason = "a description")]
pub(super) enum UnknownTable {
    /// `unknown_table`
    #[response(status = 404)]
    Unknown(#[to_schema] Problem),
}

// ------------------------------------------------------------------------------------------------ bodies

macro_rules! bodies {
    ($($(#[$of:meta])* $name:ident { $($(#[$about:meta])* $field:ident: $kind:ty,)* })*) => {$(
        $(#[$of])*
        #[derive(ToSchema)]
        #[allow(dead_code, reason = "a description")]
        pub(super) struct $name { $($(#[$about])* $field: $kind,)* }
    )*};
}

bodies! {
    Ready { ready: bool, reasons: Vec<String>, }
    Rows { rows: BTreeMap<String, Option<BTreeMap<String, String>>>, }
    OneTable { table: Option<String>, }
    ToVerify { table: Option<String>, repair: Option<bool>, }
    ToInvalidate {
        table: String,
        /// As in Redis, without the prefix.
        keys: Vec<String>,
    }
    ToClear {
        table: String,
        /// The same name again.
        confirm: String,
    }
    ToSkip {
        /// Of the transaction, as the log names it.
        lsn: String,
    }
    Paused { paused: bool, }
    Refetched {
        /// Rows read.
        loaded: u64,
        repaired: u64,
        /// Keys without a row.
        removed: u64,
        elapsed_ms: u64,
    }
    Verified {
        rows: u64, keys: u64, missing: u64, stale: u64, orphaned: u64,
        /// Of all three kinds.
        repaired: u64,
        /// Where the answer is exact.
        lsn: String,
        elapsed_ms: u64,
    }
    Deleted { deleted: u64, }
    Skipped {
        skipped: bool,
    }
    Status {
        version: String,
        /// `connecting`, `standby`, `loading`, `catching_up`, `streaming`, `healing`, `stalled`, `stopping`
        state: String,
        verdict: Verdict,
        waiting_for: Option<String>,
        paused: bool,
        ready: bool,
        not_ready_because: Vec<String>,
        /// The refetch or verify under way.
        operation: Option<String>,
        uptime_seconds: f64,
        source: Source,
        lsn: Positions,
        lag: Lag,
        slot: Slot,
        tables: Vec<Table>,
        hits: u64,
        misses: u64,
        /// Null before the first read.
        hit_rate_pct: Option<f64>,
        prefetched: u64,
        sync_events_applied: u64,
        sync_lag_ms: SyncLag,
        /// Tables read from Postgres, one for each load or verify of a table. Never by a reader.
        primary_reads: u64,
        /// Rows that Postgres has and Redis cannot hold; of those without a key, all since the start.
        dead_letters: u64,
        /// At most 20 of them. A standby lists none.
        dead_letter_keys: Vec<DeadLetter>,
        last_load: Option<LastLoad>,
        last_verify: Option<LastVerify>,
    }
    /// How it is, and what to do: the sentence that the page shows.
    Verdict {
        /// `good`, `warning`, `bad`
        level: String,
        text: String,
        remedy: String,
    }
    Source {
        system_id: Option<String>, timeline: Option<u32>, database: Option<String>, slot: Option<String>,
        publication: Option<String>,
    }
    Positions { received: Option<String>, applied: Option<String>, confirmed: Option<String>, server: Option<String>, }
    Lag { bytes: Option<u64>, seconds: Option<f64>, }
    /// WAL that Postgres keeps for the slot. No limit, or one that is not known, is null.
    Slot { retained_bytes: Option<u64>, limit_bytes: Option<u64>, }
    Table {
        name: String, table: String, loaded: bool,
        /// `loading`, `healing`, `incomplete`, `loaded`, `blocked`: the last one needs a person
        state: Option<String>,
        /// Why it is blocked, or why it is loaded while it is.
        because: Option<String>,
        /// What a person is to do where it is blocked.
        remedy: Option<String>,
        loading: Option<Progress>,
        prefetched: u64, upserts: u64, deletes: u64, truncates: u64, hits: u64, misses: u64,
        /// As of the last load or verify in this life.
        rows: Option<u64>,
        compared_at: Option<String>,
        verified_at: Option<String>,
        /// Why the last comparison could not be made, until one succeeds. The table is served as before.
        not_compared: Option<String>,
        /// When a verify last ended in this life, whatever it found.
        checked_at: Option<String>,
        /// Keys that it found to differ, and that nobody has repaired.
        drift: u64,
        /// Rows that Postgres has and Redis cannot hold.
        dead_letters: u64,
        /// There may be more of them than are known: every missing row is 503 `dead_letter`.
        more_dead_letters: bool,
    }
    DeadLetter {
        table: String,
        /// As in Redis.
        key: String,
        reason: String,
        lsn: String,
    }
    Progress { rows: u64, estimated: u64, }
    SyncLag { avg: Option<f64>, p50: Option<f64>, p99: Option<f64>, count: u64, }
    LastLoad { rows: u64, elapsed_ms: u64, lsn: String, reason: String, }
    LastVerify {
        at: Option<String>, rows: Option<u64>, keys: Option<u64>, missing: Option<u64>, stale: Option<u64>,
        orphaned: Option<u64>, repaired: Option<u64>, elapsed_ms: Option<u64>, lsn: Option<String>,
    }
}
