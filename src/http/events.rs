//! Server-sent events: the last 15 minutes, then the status and the newest figures once a second, what happens, and changes
//! as they are applied, without their values.
//!
//! The rate is limited here: [`CHANGES_PER_SECOND`] changes a second are sent, the rest are only counted. A client that
//! does not keep up loses events (which are counted too), and never slows the daemon down.
//! <https://html.spec.whatwg.org/multipage/server-sent-events.html>

use super::app::App;
use super::connection::ClientAddress;
use super::places::Share;
use super::refusal::{Misdirected, Problem, Refusal};
use crate::history::{EventReport, News};
use crate::status::ChangeEvent;
use axum::Extension;
use axum::extract::State;
use axum::http::Uri;
use axum::response::sse::{Event, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use serde::Serialize;
use serde_json::json;
use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::broadcast::{self, error::RecvError};
use tokio::time::{Interval, MissedTickBehavior};

const CHANGES_PER_SECOND: u64 = 100;

/// Server-sent events: `history` first, then `status` and `second` once a second, `happened` for each event of the history,
/// `change` for each applied change, `more` for those that were too many.
#[utoipa::path(get, path = "/v1/events", tag = "health", responses(
    (status = 200, description = "`history` is as /v1/history, `status` as /v1/status; `second` has `at`, the figures of the second \
     that has just ended, and the spans; `happened` an event of the history; `change` time, table, op, key, lag_ms; `more` a count.",
     body = String, content_type = "text/event-stream"),
    (status = 400, description = "`bad_request`: it takes no parameters.", body = Problem),
    (status = 503, description = "`too_many_streams`", body = Problem),
    Misdirected,
))]
pub(super) async fn events(
    State(app): State<Arc<App>>,
    Extension(peer): Extension<ClientAddress>,
    uri: Uri,
) -> Result<Response, Refusal> {
    if uri.query().is_some_and(|q| !q.is_empty()) {
        return Err(Refusal::BadRequest("the event stream takes no parameters".to_owned()));
    }
    let place = app.places.stream(peer)?;
    let mut second = tokio::time::interval(Duration::from_secs(1));
    second.set_missed_tick_behavior(MissedTickBehavior::Delay);
    // Before the history, so that nothing is missed between them.
    let news = app.context.history.listen();
    let feed = Feed {
        changes: app.context.events.subscribe(),
        news,
        second,
        shown: 0,
        more: 0,
        ready: VecDeque::from([named("history", &app.context.history.report())]),
        app,
        _place: place,
    };
    Ok(Sse::new(stream::unfold(feed, Feed::next)).into_response())
}

/// One client's stream.
struct Feed {
    app: Arc<App>,
    changes: broadcast::Receiver<ChangeEvent>,
    news: broadcast::Receiver<News>,
    second: Interval,
    /// Changes sent in this second.
    shown: u64,
    /// Changes not sent in this second.
    more: u64,
    ready: VecDeque<Event>,
    _place: Share,
}

impl Feed {
    async fn next(mut self) -> Option<(Result<Event, Infallible>, Self)> {
        let replaced = self.app.replaced.clone();
        let event = replaced.run_until_cancelled(self.event()).await??;
        Some((Ok(event), self))
    }

    /// Returns `None` when nothing more will be applied.
    async fn event(&mut self) -> Option<Event> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Some(event);
            }
            tokio::select! {
                // The tick first: a flood of changes must not delay the report of how many were omitted.
                biased;
                _ = self.second.tick() => self.end_second(),
                news = self.news.recv() => match news {
                    Ok(News::Second) => self.ready.push_back(named("second", &self.app.context.history.last_second())),
                    Ok(News::Happened(happened)) => {
                        self.ready.push_back(named("happened", &EventReport::from(&*happened)));
                    }
                    // All of it again.
                    Err(RecvError::Lagged(_)) => {
                        self.ready.push_back(named("history", &self.app.context.history.report()));
                    }
                    Err(RecvError::Closed) => return None,
                },
                change = self.changes.recv() => match change {
                    Ok(change) if self.shown < CHANGES_PER_SECOND => {
                        self.shown += 1;
                        self.ready.push_back(shown(&change));
                    }
                    Ok(_) => self.more += 1,
                    Err(RecvError::Lagged(lost)) => self.more += lost,
                    Err(RecvError::Closed) => return None,
                },
            }
        }
    }

    fn end_second(&mut self) {
        if self.more > 0 {
            self.ready.push_back(Event::default().event("more").data(json!({"more": self.more}).to_string()));
        }
        (self.shown, self.more) = (0, 0);
        self.ready.push_back(Event::default().event("status").data(self.app.status_json()));
    }
}

fn named(name: &str, what: &impl Serialize) -> Event {
    let data = serde_json::to_string(what).expect("it has string keys, and a String takes any text");
    Event::default().event(name).data(data)
}

fn shown(change: &ChangeEvent) -> Event {
    // UTC, with milliseconds; null for a time outside the years that RFC 3339 can represent.
    let time = jiff::Timestamp::try_from(change.at).ok().map(|t| format!("{t:.3}"));
    let lag_ms = (change.lag.as_secs_f64() * 1e6).round() / 1e3;
    let data = json!({
        "time": time,
        "table": &*change.table,
        "op": change.op.as_str(),
        "key": change.key,
        "lag_ms": lag_ms,
    });
    Event::default().event("change").data(data.to_string())
}
