//! Operations for people: who may ask, what was asked, and the answer. The bridge carries the operation out.
//!
//! The caller must present the token. A connection from this machine proves nothing, since a proxy makes every client
//! look local. A foreign page in the operator's browser must not be able to call these routes either, so requests must
//! be JSON and must not carry a foreign `Origin`.
//! <https://fetch.spec.whatwg.org/#origin-header>

use super::app::{AdminToken, App};
use super::connection::ClientAddress;
use super::refusal::{NotAllowed, OperationRefused, Problem, Refusal, UnknownTable};
use super::target;
use crate::admin::{self, Answer, Asked, Operation, Repair, Scope, Tally};
use crate::history::Kind;
use crate::lsn::Lsn;
use crate::metrics::AdminRefused;
use crate::reload::Changes;
use crate::schema::{TableId, TableSpec};
use crate::status::Level;
use axum::Router;
use axum::body::Bytes;
use axum::extract::{FromRequest, Request, State};
use axum::http::header::{AUTHORIZATION, CONTENT_TYPE, HOST, ORIGIN};
use axum::http::{HeaderMap, HeaderName};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use axum::{Json, http::StatusCode};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::Duration;
use subtle::ConstantTimeEq;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::oneshot;
use tokio::time::timeout;
use utoipa::ToSchema;

/// Headers that a proxy adds, besides `X-Forwarded-…`.
const FORWARDING: [&str; 3] = ["forwarded", "via", "x-real-ip"];
const SEC_FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");

pub(super) fn routes(app: &Arc<App>) -> Router<Arc<App>> {
    Router::new()
        .route("/v1/admin/pause", post(pause))
        .route("/v1/admin/resume", post(resume))
        .route("/v1/admin/refetch", post(refetch))
        .route("/v1/admin/verify", post(verify))
        .route("/v1/admin/invalidate", post(invalidate))
        .route("/v1/admin/clear", post(clear))
        .route("/v1/admin/skip", post(skip))
        .route("/v1/admin/reload", post(reload))
        .route_layer(from_fn_with_state(Arc::clone(app), guard))
}

/// Rejects unauthorized callers before any other part of the request is read.
pub(super) async fn guard(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let Err(refusal) = app.may_operate(request.headers()) else { return next.run(request).await };
    match refusal {
        Refusal::Unauthorized => app.context.metrics.admin_refused(AdminRefused::Missing),
        Refusal::WrongToken => {
            app.context.metrics.admin_refused(AdminRefused::Wrong);
            let ClientAddress(peer) = request.extensions().get().copied().expect("every connection has a peer");
            app.guesses.wrong(peer).await;
        }
        _ => {}
    }
    refusal.into_response()
}

impl App {
    fn may_operate(&self, headers: &HeaderMap) -> Result<(), Refusal> {
        not_from_elsewhere(headers)?;
        match &self.context.admin_token {
            AdminToken::Configured(token) => has_token(headers, token.as_bytes())?,
            AdminToken::Made(token) => {
                self.is_direct(headers)?;
                has_token(headers, token.as_bytes())?;
            }
            AdminToken::None(why) => return Err(Refusal::AdminDisabled(why.to_string())),
        }
        let is_json = text(headers, &CONTENT_TYPE).is_some_and(|value| {
            value.split(';').next().is_some_and(|kind| kind.trim().eq_ignore_ascii_case("application/json"))
        });
        if is_json { Ok(()) } else { Err(Refusal::NotJson) }
    }

    /// Rejects requests that came through a proxy or under a host name that somebody else chose.
    fn is_direct(&self, headers: &HeaderMap) -> Result<(), Refusal> {
        let refuse = |what: &str| {
            Err(Refusal::AdminDisabled(format!("{what}: that takes a token of your own, in http.admin_token_file")))
        };
        let forwards =
            |name: &&HeaderName| FORWARDING.contains(&name.as_str()) || name.as_str().starts_with("x-forwarded-");
        if let Some(name) = headers.keys().find(forwards) {
            return refuse(&format!("the request came through a proxy ({name})"));
        }
        if !text(headers, &HOST).is_some_and(|host| self.context.names.has(host)) {
            return refuse("the Host header is no name of this daemon");
        }
        Ok(())
    }

    /// Passes the operation to the bridge and waits for the answer, however long it takes. If the client disconnects,
    /// only the waiting ends.
    async fn operate(&self, operation: Operation) -> Result<Answer, Refusal> {
        let (answer, answered) = oneshot::channel();
        let what = self.told(&operation);
        self.context.ask.try_send(Asked { operation, answer }).map_err(|error| match error {
            TrySendError::Full(_) => Refusal::Busy("too many operations wait for their turn: try again".to_owned()),
            TrySendError::Closed(_) if self.stop.is_cancelled() => Refusal::Stopping,
            TrySendError::Closed(_) => {
                Refusal::Interrupted("the configuration was read again meanwhile: ask again".to_owned())
            }
        })?;
        match answered.await {
            Ok(Ok(answer)) => {
                if let Some((table, text)) = what {
                    let removed = match &answer {
                        Answer::Deleted(deleted) => format!(", {deleted} keys removed"),
                        _ => String::new(),
                    };
                    let text = format!("{text}{removed}");
                    self.context.history.happened(Level::Warning, Kind::Operator, table, text);
                }
                Ok(answer)
            }
            Ok(answer) => answer.map_err(|refused| {
                let why = refused.to_string();
                match refused {
                    admin::Refusal::Busy(_) => Refusal::Busy(why),
                    admin::Refusal::Paused => Refusal::Paused(why),
                    admin::Refusal::NotNow(_) => Refusal::NotNow(why),
                    admin::Refusal::Interrupted(_) => Refusal::Interrupted(why),
                    admin::Refusal::NotCompared(_) => Refusal::NotCompared(why),
                    admin::Refusal::Pointless(_) => Refusal::Pointless(why),
                }
            }),
            Err(_) if self.stop.is_cancelled() => Err(Refusal::Stopping),
            Err(_) => {
                let status = self.status();
                let why = status.waiting_for.as_deref().unwrap_or("the stream had to begin again");
                Err(Refusal::Interrupted(format!("it was not finished, since {why}: ask again")))
            }
        }
    }

    /// What the history says of an operation that changes something and does not speak for itself.
    fn told(&self, operation: &Operation) -> Option<(Option<&str>, String)> {
        let name = |table: &TableId| &*self.context.tables[table.index()].name;
        match operation {
            Operation::Invalidate(table, _) => {
                Some((Some(name(table)), format!("invalidated keys of {}", name(table))))
            }
            Operation::Clear(table) => Some((Some(name(table)), format!("cleared {}", name(table)))),
            Operation::Skip(lsn) => Some((None, format!("skipped the change at {lsn}, every table is loaded again"))),
            Operation::Pause | Operation::Resume | Operation::Refetch(_) | Operation::Verify(..) => None,
        }
    }

    fn table(&self, name: &str) -> Result<&TableSpec, Refusal> {
        let found = self.context.tables.iter().find(|t| t.name == name);
        found.ok_or_else(|| Refusal::UnknownTable(name.to_owned()))
    }

    fn scope(&self, table: Option<&str>) -> Result<Scope, Refusal> {
        table.map_or(Ok(Scope::All), |name| Ok(Scope::Table(self.table(name)?.id)))
    }
}

fn text<'h>(headers: &'h HeaderMap, name: &HeaderName) -> Option<&'h str> {
    headers.get(name)?.to_str().ok()
}

/// Browsers name the origin of a page's request. A request without such a header does not come from a page.
fn not_from_elsewhere(headers: &HeaderMap) -> Result<(), Refusal> {
    let own = text(headers, &HOST);
    let is_own = |origin: &str| {
        let authority = origin.strip_prefix("http://").or_else(|| origin.strip_prefix("https://"));
        authority.is_some() && authority == own
    };
    let origin_is_fine = match headers.get(ORIGIN) {
        None => true,
        Some(origin) => origin.to_str().is_ok_and(is_own),
    };
    // `none`: the user typed the address.
    let site_is_fine = headers.get(SEC_FETCH_SITE).is_none_or(|site| site == "same-origin" || site == "none");
    if origin_is_fine && site_is_fine { Ok(()) } else { Err(Refusal::ForeignOrigin) }
}

fn has_token(headers: &HeaderMap, token: &[u8]) -> Result<(), Refusal> {
    let value = headers.get(AUTHORIZATION).map(|v| v.as_bytes()).unwrap_or_default();
    let given = match value.split_at_checked(b"Bearer ".len()) {
        Some((scheme, given)) if scheme.eq_ignore_ascii_case(b"Bearer ") => given,
        _ => return Err(Refusal::Unauthorized),
    };
    if given.ct_eq(token).into() { Ok(()) } else { Err(Refusal::WrongToken) }
}

/// A request's body, received within the time limit.
pub(super) struct Body(Bytes);

impl FromRequest<Arc<App>> for Body {
    type Rejection = Refusal;

    async fn from_request(request: Request, app: &Arc<App>) -> Result<Self, Refusal> {
        match timeout(app.limits.body_timeout, Bytes::from_request(request, app)).await {
            Err(_) => Err(Refusal::SlowBody),
            Ok(Ok(body)) => Ok(Self(body)),
            Ok(Err(rejection)) => Err(match rejection.status() {
                StatusCode::PAYLOAD_TOO_LARGE => Refusal::BodyTooLarge { limit_bytes: app.limits.body_bytes },
                _ => Refusal::BadRequest(rejection.body_text()),
            }),
        }
    }
}

/// An empty body counts as `{}`.
pub(super) fn parse<T: DeserializeOwned>(Body(body): &Body) -> Result<T, Refusal> {
    let body = if body.is_empty() { &b"{}"[..] } else { body };
    // serde would also accept an array for a struct.
    let object: serde_json::Result<serde_json::Map<_, _>> = serde_json::from_slice(body);
    let parsed = object.and_then(|object| T::deserialize(serde_json::Value::Object(object)));
    parsed.map_err(|error| Refusal::BadRequest(format!("the body is not what it should be: {error}")))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Nothing {}

#[derive(Deserialize, ToSchema)]
#[schema(as = OneTable)]
#[serde(deny_unknown_fields)]
struct Refetch {
    table: Option<String>,
}

#[derive(Deserialize, ToSchema)]
#[schema(as = ToVerify)]
#[serde(deny_unknown_fields)]
struct Verify {
    table: Option<String>,
    #[serde(default)]
    repair: bool,
}

#[derive(Deserialize, ToSchema)]
#[schema(as = ToInvalidate)]
#[serde(deny_unknown_fields)]
struct Invalidate {
    table: String,
    /// As in Redis, without the prefix.
    keys: Vec<String>,
}

#[derive(Deserialize, ToSchema)]
#[schema(as = ToClear)]
#[serde(deny_unknown_fields)]
struct Clear {
    table: String,
    /// The same name again.
    #[schema(value_type = String)]
    confirm: Option<String>,
}

#[derive(Deserialize, ToSchema)]
#[schema(as = ToSkip)]
#[serde(deny_unknown_fields)]
struct Skip {
    /// Of the transaction, as the log names it.
    lsn: String,
}

/// Apply nothing more, until resume or a restart. Answers when that is so.
#[utoipa::path(post, path = "/v1/admin/pause", tag = "operations", security(("token" = [])), responses(
    (status = 200, description = "Done.", body = Paused),
    NotAllowed, OperationRefused,
))]
pub(super) async fn pause(State(app): State<Arc<App>>, body: Body) -> Result<Response, Refusal> {
    let Nothing {} = parse(&body)?;
    Ok(shown(app.operate(Operation::Pause).await?))
}

/// Go on after a pause.
#[utoipa::path(post, path = "/v1/admin/resume", tag = "operations", security(("token" = [])), responses(
    (status = 200, description = "Done.", body = Paused),
    NotAllowed, OperationRefused,
))]
pub(super) async fn resume(State(app): State<Arc<App>>, body: Body) -> Result<Response, Refusal> {
    let Nothing {} = parse(&body)?;
    Ok(shown(app.operate(Operation::Resume).await?))
}

/// Load again from Postgres while the stream goes on; no live key goes missing. Without a table: all.
#[utoipa::path(post, path = "/v1/admin/refetch", tag = "operations", request_body = Refetch, security(("token" = [])), responses(
    (status = 200, description = "Done.", body = Refetched),
    NotAllowed, OperationRefused, UnknownTable,
))]
pub(super) async fn refetch(State(app): State<Arc<App>>, body: Body) -> Result<Response, Refusal> {
    let Refetch { table } = parse(&body)?;
    let scope = app.scope(table.as_deref())?;
    Ok(shown(app.operate(Operation::Refetch(scope)).await?))
}

/// Compare every row with the cache, exactly, and mend what differs where asked.
#[utoipa::path(post, path = "/v1/admin/verify", tag = "operations", request_body = Verify, security(("token" = [])), responses(
    (status = 200, description = "Done.", body = Verified),
    NotAllowed, OperationRefused, UnknownTable,
))]
pub(super) async fn verify(State(app): State<Arc<App>>, body: Body) -> Result<Response, Refusal> {
    let Verify { table, repair } = parse(&body)?;
    let scope = app.scope(table.as_deref())?;
    let repair = if repair { Repair::Mend } else { Repair::OnlyCount };
    Ok(shown(app.operate(Operation::Verify(scope, repair)).await?))
}

/// Remove rows from the cache, to practise: they are missed until the next refetch.
#[utoipa::path(post, path = "/v1/admin/invalidate", tag = "operations", request_body = Invalidate, security(("token" = [])), responses(
    (status = 200, description = "Done.", body = Deleted),
    NotAllowed, OperationRefused, UnknownTable,
))]
pub(super) async fn invalidate(State(app): State<Arc<App>>, body: Body) -> Result<Response, Refusal> {
    let Invalidate { table, keys } = parse(&body)?;
    let table = app.table(&table)?;
    let mut whole =
        keys.into_iter().map(|key| target::whole_key(table, key.as_bytes())).collect::<Result<Vec<_>, _>>()?;
    whole.sort();
    whole.dedup();
    Ok(shown(app.operate(Operation::Invalidate(table.id, whole)).await?))
}

/// Remove every row of a table from the cache, to practise.
#[utoipa::path(post, path = "/v1/admin/clear", tag = "operations", request_body = Clear, security(("token" = [])), responses(
    (status = 200, description = "Done.", body = Deleted),
    NotAllowed, OperationRefused, UnknownTable,
))]
pub(super) async fn clear(State(app): State<Arc<App>>, body: Body) -> Result<Response, Refusal> {
    let Clear { table, confirm } = parse(&body)?;
    let id: TableId = app.table(&table)?.id;
    if confirm.as_deref() != Some(&table) {
        let text =
            format!("this removes every key of {table} from the cache: repeat its name, \"confirm\": \"{table}\"");
        return Err(Refusal::BadRequest(text));
    }
    Ok(shown(app.operate(Operation::Clear(id)).await?))
}

/// Go past a transaction that Postgres cannot send, then load every table.
#[utoipa::path(post, path = "/v1/admin/skip", tag = "operations", request_body = Skip, security(("token" = [])), responses(
    (status = 200, description = "Done.", body = Skipped),
    NotAllowed, OperationRefused,
))]
pub(super) async fn skip(State(app): State<Arc<App>>, body: Body) -> Result<Response, Refusal> {
    let Skip { lsn } = parse(&body)?;
    let lsn: Lsn = lsn.parse().map_err(|_| Refusal::BadRequest(format!("{lsn:?} is no LSN like 0/1A2B3C")))?;
    Ok(shown(app.operate(Operation::Skip(lsn)).await?))
}

/// Read the configuration again: tables that are new or changed are loaded, others go on, removed ones go with their keys.
#[utoipa::path(post, path = "/v1/admin/reload", tag = "operations", security(("token" = [])), responses(
    (status = 200, description = "What has changed. Settings that need a restart stay as they are.", body = Reloaded),
    (status = 422, description = "`invalid_configuration`: it is refused, and nothing has changed.", body = Problem),
    NotAllowed, OperationRefused,
))]
pub(super) async fn reload(State(app): State<Arc<App>>, body: Body) -> Result<Response, Refusal> {
    let Nothing {} = parse(&body)?;
    let (answer, answered) = oneshot::channel();
    let Some(reload) = &app.context.reload else {
        return Err(Refusal::NotNow("this daemon has no configuration file that it could read again".to_owned()));
    };
    reload.try_send(Some(answer)).map_err(|error| match error {
        TrySendError::Full(_) => Refusal::Busy("too many reloads wait for their turn: try again".to_owned()),
        TrySendError::Closed(_) => Refusal::Stopping,
    })?;
    match answered.await {
        Ok(Ok(Changes { added, removed, changed, restart_required, .. })) => {
            Ok(Json(Reloaded { added, removed, changed, restart_required }).into_response())
        }
        Ok(Err(refused)) => Err(Refusal::InvalidConfiguration(refused.reasons.join("; "))),
        Err(_) => Err(Refusal::Stopping),
    }
}

#[derive(Serialize, ToSchema)]
struct Reloaded {
    /// Tables by name.
    added: Vec<String>,
    removed: Vec<String>,
    changed: Vec<String>,
    /// Settings that differ, and take effect when the daemon is started again.
    restart_required: Vec<String>,
}

#[derive(Serialize, ToSchema)]
struct Paused {
    paused: bool,
}

#[derive(Serialize, ToSchema)]
struct Refetched {
    /// Rows read.
    loaded: u64,
    repaired: u64,
    /// Keys without a row.
    removed: u64,
    elapsed_ms: u64,
}

#[derive(Serialize, ToSchema)]
struct Verified {
    rows: u64,
    keys: u64,
    missing: u64,
    stale: u64,
    orphaned: u64,
    /// Members of lookups that are missing, too many, or have another score. Left out if there are none.
    #[serde(skip_serializing_if = "Option::is_none")]
    lookups: Option<u64>,
    /// Of all kinds.
    repaired: u64,
    /// Where the answer is exact.
    lsn: String,
    elapsed_ms: u64,
}

#[derive(Serialize, ToSchema)]
struct Deleted {
    deleted: u64,
}

#[derive(Serialize, ToSchema)]
struct Skipped {
    skipped: bool,
}

fn shown(answer: Answer) -> Response {
    match answer {
        Answer::Paused => Json(Paused { paused: true }).into_response(),
        Answer::Resumed => Json(Paused { paused: false }).into_response(),
        Answer::Refetched { tally, elapsed } => Json(Refetched {
            loaded: tally.rows,
            repaired: tally.missing + tally.stale + tally.lookups,
            removed: tally.orphaned,
            elapsed_ms: millis(elapsed),
        })
        .into_response(),
        Answer::Verified { tally, lsn, elapsed } => {
            let Tally { rows, missing, stale, orphaned, lookups, repaired } = tally;
            let lookups = Some(lookups).filter(|members| *members > 0);
            let (keys, lsn, elapsed_ms) = (tally.keys(), lsn.to_string(), millis(elapsed));
            Json(Verified { rows, keys, missing, stale, orphaned, lookups, repaired, lsn, elapsed_ms }).into_response()
        }
        Answer::Deleted(deleted) => Json(Deleted { deleted }).into_response(),
        Answer::Skipped => Json(Skipped { skipped: true }).into_response(),
    }
}

fn millis(d: Duration) -> u64 {
    u64::try_from(d.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_of_somebody_else_may_not_ask() {
        let allowed = |pairs: &[(HeaderName, &str)]| {
            let headers = pairs.iter().map(|(n, v)| (n.clone(), v.parse().expect("a header's value"))).collect();
            not_from_elsewhere(&headers).is_ok()
        };
        let host = (HOST, "127.0.0.1:8787");
        assert!(allowed(&[]));
        assert!(allowed(&[host.clone(), (ORIGIN, "http://127.0.0.1:8787")]));
        assert!(allowed(&[host.clone(), (SEC_FETCH_SITE, "same-origin")]));
        for foreign in
            ["null", "", "http://evil.example", "http://127.0.0.1:8788", "http://127.0.0.1:8787.evil.example"]
        {
            assert!(!allowed(&[host.clone(), (ORIGIN, foreign)]), "{foreign}");
        }
        for site in ["cross-site", "same-site"] {
            assert!(!allowed(&[host.clone(), (SEC_FETCH_SITE, site)]), "{site}");
        }
    }

    #[test]
    fn the_token_is_compared_as_a_whole() {
        let given = |value: &str| {
            let headers = [(AUTHORIZATION, value.parse().expect("a header's value"))].into_iter().collect();
            has_token(&headers, b"secret").is_ok()
        };
        assert!(given("Bearer secret") && given("bearer secret"));
        for wrong in ["Bearer secre", "Bearer secrets", "Bearer ", "Bearer", "Basic secret", "secret", ""] {
            assert!(!given(wrong), "{wrong}");
        }
    }
}
