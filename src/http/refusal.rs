//! Every answer other than the requested one: its status, a code for programs, a message for people.
//!
//! A 404 with the code `not_found` is a promise ("no such row"), so nothing else may use that code: for a route that
//! does not exist it is `unknown_route`.

use crate::code::Code;
use axum::Json;
use axum::http::header::{CONNECTION, WWW_AUTHENTICATE};
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::{IntoResponses, ToSchema};

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("{0}")]
    BadRequest(String),
    /// More rows, or larger ones, than one answer may contain.
    #[error("{0}")]
    TooLarge(String),
    #[error(
        "{0:?} is no name of this daemon: ask under the address that it listens on, or add the name to http.hosts of its \
         configuration"
    )]
    ForeignHost(String),
    #[error("there is nothing at this path: GET /openapi.json says what there is")]
    UnknownRoute,
    #[error("no table {0:?} is configured")]
    UnknownTable(String),
    #[error("table {table:?} has no lookup {lookup:?}")]
    UnknownLookup { table: String, lookup: String },
    #[error("this path does not take this method")]
    MethodNotAllowed,
    #[error("the body is larger than {limit_bytes} bytes")]
    BodyTooLarge { limit_bytes: u64 },
    /// The only promise here: the row does not exist.
    #[error("{table} has no row {key}")]
    NotFound { table: String, key: String },
    #[error("{0}")]
    Loading(String),
    #[error("the lists of {0} are still being made, and the row may not be in them yet: try again")]
    ListsIncomplete(String),
    #[error(
        "what {0}'s columns become in JSON is not known yet, because it is still being loaded, or its columns have changed: \
         try again, or read it without typed=true"
    )]
    TypesUnknown(String),
    #[error("{0}")]
    Stale(String),
    #[error("Redis cannot be read: {0}")]
    RedisUnavailable(String),
    #[error("{0}")]
    Healing(String),
    /// An operator has to act.
    #[error("{0}")]
    Blocked(String),
    #[error("keys of {0} were removed and have not been loaded again: refetch it")]
    Incomplete(String),
    #[error(
        "Postgres has row {key} of {table}, and Redis cannot hold it ({reason}): read it from Postgres; `prefetchd status` \
         lists the dead letters"
    )]
    DeadLetter { table: String, key: String, reason: String },
    #[error(
        "{0} has more dead letters than are kept track of, and the row may be one: read it from Postgres; once the \
         cause is mended, refetch {0}"
    )]
    MoreDeadLetters(String),
    #[error(
        "{0} has dead letters, which belong in lists that nobody knows: read the rows from Postgres; once the cause is mended, \
         refetch {0}"
    )]
    UnlistedDeadLetters(String),
    #[error(
        "{applied} is applied, {wanted} is not, after {waited}: ask again with a longer wait (at most 30s), or take the row as it is by \
         asking without min_lsn"
    )]
    Lagging { applied: String, wanted: String, waited: String },
    /// All capacity is taken; this request is refused instead of being queued.
    #[error("{0}")]
    Overloaded(String),
    #[error("the body did not come in time")]
    SlowBody,
    #[error("too many event streams are open")]
    TooManyStreams,
    #[error("the daemon is stopping")]
    Stopping,
    #[error("this takes a JSON body: Content-Type: application/json")]
    NotJson,
    #[error("a page from elsewhere may not ask for this")]
    ForeignOrigin,
    #[error("{0}")]
    AdminDisabled(String),
    #[error(
        "this needs the admin token (Authorization: Bearer ...): that of http.admin_token_file, else the one in the file that the log \
         names at the start; `prefetchd page` prints the page's address with it"
    )]
    Unauthorized,
    #[error("this is not the admin token: `prefetchd page` prints the page's address with it")]
    WrongToken,
    /// Only one heavy operation runs at a time.
    #[error("{0}")]
    Busy(String),
    #[error("{0}")]
    Paused(String),
    #[error("{0}")]
    NotNow(String),
    #[error("{0}")]
    Interrupted(String),
    #[error("{0}")]
    NotCompared(String),
    #[error("{0}")]
    Pointless(String),
    /// The old one stays.
    #[error("{0}")]
    InvalidConfiguration(String),
    /// Demo only: it does not break a server that the user provided.
    #[error("{0}")]
    NotOurs(String),
    /// Demo only: Postgres or Redis refused.
    #[error("{0}")]
    Refused(String),
}

impl Refusal {
    fn status_and_code(&self) -> (StatusCode, Code) {
        match self {
            Refusal::BadRequest(_) => (StatusCode::BAD_REQUEST, Code::BadRequest),
            Refusal::TooLarge(_) => (StatusCode::BAD_REQUEST, Code::TooLarge),
            Refusal::ForeignHost(_) => (StatusCode::MISDIRECTED_REQUEST, Code::ForeignHost),
            Refusal::UnknownRoute => (StatusCode::NOT_FOUND, Code::UnknownRoute),
            Refusal::UnknownTable(_) => (StatusCode::NOT_FOUND, Code::UnknownTable),
            Refusal::UnknownLookup { .. } => (StatusCode::NOT_FOUND, Code::UnknownLookup),
            Refusal::MethodNotAllowed => (StatusCode::METHOD_NOT_ALLOWED, Code::MethodNotAllowed),
            Refusal::BodyTooLarge { .. } => (StatusCode::PAYLOAD_TOO_LARGE, Code::BodyTooLarge),
            Refusal::NotFound { .. } => (StatusCode::NOT_FOUND, Code::NotFound),
            Refusal::Loading(_) | Refusal::ListsIncomplete(_) | Refusal::TypesUnknown(_) => {
                (StatusCode::SERVICE_UNAVAILABLE, Code::Loading)
            }
            Refusal::Stale(_) => (StatusCode::SERVICE_UNAVAILABLE, Code::Stale),
            Refusal::RedisUnavailable(_) => (StatusCode::SERVICE_UNAVAILABLE, Code::RedisUnavailable),
            Refusal::Healing(_) => (StatusCode::SERVICE_UNAVAILABLE, Code::Healing),
            Refusal::Blocked(_) => (StatusCode::SERVICE_UNAVAILABLE, Code::Blocked),
            Refusal::Incomplete(_) => (StatusCode::SERVICE_UNAVAILABLE, Code::Incomplete),
            Refusal::DeadLetter { .. } | Refusal::MoreDeadLetters(_) | Refusal::UnlistedDeadLetters(_) => {
                (StatusCode::SERVICE_UNAVAILABLE, Code::DeadLetter)
            }
            Refusal::Lagging { .. } => (StatusCode::GATEWAY_TIMEOUT, Code::Lagging),
            Refusal::Overloaded(_) => (StatusCode::SERVICE_UNAVAILABLE, Code::Overloaded),
            Refusal::SlowBody => (StatusCode::REQUEST_TIMEOUT, Code::RequestTimeout),
            Refusal::TooManyStreams => (StatusCode::SERVICE_UNAVAILABLE, Code::TooManyStreams),
            Refusal::Stopping => (StatusCode::SERVICE_UNAVAILABLE, Code::Stopping),
            Refusal::NotJson => (StatusCode::UNSUPPORTED_MEDIA_TYPE, Code::UnsupportedMediaType),
            Refusal::ForeignOrigin => (StatusCode::FORBIDDEN, Code::ForeignOrigin),
            Refusal::AdminDisabled(_) => (StatusCode::FORBIDDEN, Code::AdminDisabled),
            Refusal::Unauthorized | Refusal::WrongToken => (StatusCode::UNAUTHORIZED, Code::Unauthorized),
            Refusal::Busy(_) => (StatusCode::CONFLICT, Code::Busy),
            Refusal::Paused(_) => (StatusCode::CONFLICT, Code::Paused),
            Refusal::NotNow(_) => (StatusCode::SERVICE_UNAVAILABLE, Code::Unavailable),
            Refusal::Interrupted(_) => (StatusCode::SERVICE_UNAVAILABLE, Code::Interrupted),
            Refusal::NotCompared(_) => (StatusCode::SERVICE_UNAVAILABLE, Code::NotCompared),
            Refusal::InvalidConfiguration(_) => (StatusCode::UNPROCESSABLE_ENTITY, Code::InvalidConfiguration),
            Refusal::Pointless(_) => (StatusCode::CONFLICT, Code::NothingToSkip),
            Refusal::NotOurs(_) => (StatusCode::CONFLICT, Code::GivenServer),
            Refusal::Refused(_) => (StatusCode::CONFLICT, Code::Refused),
        }
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let (status, code) = self.status_and_code();
        let mut response = (status, Json(Problem { error: code.as_str(), message: self.to_string() })).into_response();
        // The rest of such a request is not awaited, and another guess needs another connection.
        if matches!(
            self,
            Refusal::Overloaded(_) | Refusal::SlowBody | Refusal::BodyTooLarge { .. } | Refusal::WrongToken
        ) {
            response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        }
        if status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

/// Every answer that is not the thing asked for.
#[derive(Serialize, ToSchema)]
pub(super) struct Problem {
    /// For programs: `not_found`, `busy`.
    error: &'static str,
    /// For people.
    message: String,
}

// ------------------------------------------------------------------------------------------------ which routes say no, and how

#[derive(IntoResponses)]
#[allow(dead_code, reason = "a description")]
pub(super) enum ReadRefused {
    /// `bad_request`: the message says what is wrong. `too_large`: several rows have more than 32 MB together, or
    /// rows become much longer with `typed=true`; ask for fewer. Or a list without an order has over 10,000 rows.
    #[response(status = 400)]
    Bad(#[to_schema] Problem),
    /// `loading`, `incomplete`, `stale`, `healing`, `redis_unavailable`, `stopping`: it may exist. An incident. With
    /// `typed=true` also `loading` if it exists, and the types of its columns are not known yet. `blocked`: the
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

/// What an operation may answer beside [`NotAllowed`].
#[derive(IntoResponses)]
#[allow(dead_code, reason = "a description")]
pub(super) enum OperationRefused {
    /// `busy`: another one is under way. `paused`. `nothing_to_skip`. In a demo: `given_server`, `refused`.
    #[response(status = 409)]
    NotNow(#[to_schema] Problem),
    /// `unavailable`, `interrupted`, `stopping`. `not_compared`: a comparison that cannot be made, with the reason; the table
    /// stays as it is.
    #[response(status = 503)]
    Unavailable(#[to_schema] Problem),
}

/// Of every operation: who may ask, and how.
#[derive(IntoResponses)]
#[allow(dead_code, reason = "a description")]
pub(super) enum NotAllowed {
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
    /// `request_timeout`: the body did not come in time.
    #[response(status = 408)]
    Slow(#[to_schema] Problem),
    /// `body_too_large`
    #[response(status = 413)]
    Large(#[to_schema] Problem),
    /// `unsupported_media_type`: JSON only.
    #[response(status = 415)]
    NotJson(#[to_schema] Problem),
}

#[derive(IntoResponses)]
#[allow(dead_code, reason = "a description")]
pub(super) enum UnknownTable {
    /// `unknown_table`
    #[response(status = 404)]
    Unknown(#[to_schema] Problem),
}
