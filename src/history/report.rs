//! The history as JSON: the body of `GET /v1/history`, and the events of the stream.

use super::lags::percentiles;
use super::{Happened, History, Second};
use crate::status::rfc3339;
use serde::Serialize;
use utoipa::ToSchema;

/// The last 15 minutes.
#[derive(Serialize, ToSchema)]
#[schema(as = History)]
pub(crate) struct HistoryReport {
    /// The Unix second of the first element of each list.
    pub from: u64,
    pub seconds: SecondsReport,
    pub last_minute: SpanReport,
    pub last_15_minutes: SpanReport,
    /// The newest 200, oldest first, whatever their age.
    pub events: Vec<EventReport>,
}

/// A figure a second, oldest first, all of the same length. Null: not known, or none.
#[derive(Serialize, ToSchema, Default)]
#[schema(as = Seconds)]
pub(crate) struct SecondsReport {
    /// Applied to Redis.
    pub changes: Vec<Option<u64>>,
    /// From commit to Redis, of the changes of the second.
    pub lag_p50_ms: Vec<Option<f64>>,
    pub lag_p99_ms: Vec<Option<f64>>,
    pub lag_max_ms: Vec<Option<f64>>,
    /// As in the status.
    pub lag_seconds: Vec<Option<f64>>,
    pub lag_bytes: Vec<Option<u64>>,
    /// Rows asked for over HTTP, whether there or not.
    pub reads: Vec<Option<u64>>,
    /// Those that were answered with 503 or 504.
    pub errors: Vec<Option<u64>>,
}

/// Several seconds together.
#[derive(Serialize, ToSchema)]
#[schema(as = Span)]
pub(crate) struct SpanReport {
    /// How many are known: fewer after a start.
    pub seconds: usize,
    pub changes: u64,
    pub sync_lag_ms: PercentilesReport,
    pub reads: u64,
    pub hits: u64,
    pub misses: u64,
    pub errors: u64,
}

/// Of all changes of the span, exact to 2 %. Null if there were none.
#[derive(Serialize, ToSchema)]
#[schema(as = Percentiles)]
pub(crate) struct PercentilesReport {
    pub p50: Option<f64>,
    pub p99: Option<f64>,
    pub max: Option<f64>,
}

/// Something that happened.
#[derive(Serialize, ToSchema)]
#[schema(as = Event)]
pub(crate) struct EventReport {
    pub time: Option<String>,
    /// `good`, `warning`, `bad`
    pub level: &'static str,
    pub kind: &'static str,
    pub table: Option<String>,
    /// What, and why.
    pub text: String,
}

/// The second that has just ended, and the spans that end with it.
#[derive(Serialize)]
pub(crate) struct SecondReport {
    at: u64,
    changes: Option<u64>,
    lag_p50_ms: Option<f64>,
    lag_p99_ms: Option<f64>,
    lag_max_ms: Option<f64>,
    lag_seconds: Option<f64>,
    lag_bytes: Option<u64>,
    reads: Option<u64>,
    errors: Option<u64>,
    last_minute: SpanReport,
    last_15_minutes: SpanReport,
}

impl History {
    pub(crate) fn report(&self) -> HistoryReport {
        let inner = self.inner();
        let mut seconds = SecondsReport::default();
        inner.seconds.iter().for_each(|second| seconds.push(second.as_ref()));
        let newest = inner.newest().unwrap_or_default();
        let from = (newest + 1).saturating_sub(inner.seconds.len() as u64);
        let events = inner.happened.iter().map(|happened| EventReport::from(&**happened)).collect();
        HistoryReport {
            from,
            seconds,
            last_minute: inner.span(60),
            last_15_minutes: inner.span(super::SECONDS),
            events,
        }
    }

    pub(crate) fn last_second(&self) -> SecondReport {
        let inner = self.inner();
        let second = inner.seconds.back().and_then(Option::as_ref);
        let of = second.map(|second| second.of).unwrap_or_default();
        SecondReport {
            at: inner.newest().unwrap_or_default(),
            changes: second.map(|second| second.changes),
            lag_p50_ms: of.p50_ms,
            lag_p99_ms: of.p99_ms,
            lag_max_ms: of.max_ms,
            lag_seconds: second.and_then(|second| second.lag_seconds),
            lag_bytes: second.and_then(|second| second.lag_bytes),
            reads: second.map(Second::reads),
            errors: second.map(|second| second.errors),
            last_minute: inner.span(60),
            last_15_minutes: inner.span(super::SECONDS),
        }
    }
}

impl super::Inner {
    /// The newest so many seconds.
    fn span(&self, seconds: usize) -> SpanReport {
        let newest = || self.seconds.iter().rev().take(seconds).flatten();
        let sum = |of: fn(&Second) -> u64| newest().map(of).sum();
        let of = percentiles(newest().map(|second| &second.lags));
        SpanReport {
            seconds: newest().count(),
            changes: sum(|second| second.changes),
            sync_lag_ms: PercentilesReport { p50: of.p50_ms, p99: of.p99_ms, max: of.max_ms },
            reads: sum(Second::reads),
            hits: sum(|second| second.reads.hits),
            misses: sum(|second| second.reads.misses),
            errors: sum(|second| second.errors),
        }
    }
}

impl Second {
    fn reads(&self) -> u64 {
        self.reads.hits + self.reads.misses
    }
}

impl SecondsReport {
    fn push(&mut self, second: Option<&Second>) {
        let of = second.map(|second| second.of).unwrap_or_default();
        self.changes.push(second.map(|second| second.changes));
        self.lag_p50_ms.push(of.p50_ms);
        self.lag_p99_ms.push(of.p99_ms);
        self.lag_max_ms.push(of.max_ms);
        self.lag_seconds.push(second.and_then(|second| second.lag_seconds));
        self.lag_bytes.push(second.and_then(|second| second.lag_bytes));
        self.reads.push(second.map(Second::reads));
        self.errors.push(second.map(|second| second.errors));
    }
}

impl From<&Happened> for EventReport {
    fn from(happened: &Happened) -> Self {
        EventReport {
            time: rfc3339(happened.at),
            level: happened.level.as_str(),
            kind: happened.kind.as_str(),
            table: happened.table.clone(),
            text: happened.text.clone(),
        }
    }
}
