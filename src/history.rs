//! The last 15 minutes: figures for each second, and what happened, so that whoever opens the page after an incident
//! sees it.
//!
//! It only records. Everything is bounded: seconds, events, and what is kept of each.

mod lags;
mod report;

pub(crate) use report::{EventReport, HistoryReport};

use crate::status::{Level, Moment, ReadCounts, Status};
use crate::words::counted;
use lags::{Counting, Lags, Percentiles, percentiles};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::sync::broadcast;

/// How many seconds are kept.
pub const SECONDS: usize = 15 * 60;
/// How many events are kept, whatever their age: after a quiet night the last incident is still there.
pub const EVENTS: usize = 200;
/// Loads for the same reason that end within this time are one event.
const TOGETHER: Duration = Duration::from_secs(2);
/// What a listener may be behind before it misses something.
const NEWS_HELD: usize = 256;

pub struct History {
    inner: Mutex<Inner>,
    news: broadcast::Sender<News>,
}

/// What is sent to listeners.
#[derive(Debug, Clone)]
pub enum News {
    /// A second is over.
    Second,
    Happened(Arc<Happened>),
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Happened {
    pub at: SystemTime,
    pub level: Level,
    pub kind: Kind,
    pub table: Option<String>,
    /// A sentence with the cause. No values of rows.
    pub text: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Started,
    Loaded,
    /// Loaded again after a loss.
    Healed,
    /// Loaded again because the table changed.
    Schema,
    Verified,
    Drift,
    NotCompared,
    Blocked,
    DeadLetter,
    /// A server is away, refuses, or has lost something.
    Interrupted,
    Reconnected,
    /// Standing by, or no longer.
    Role,
    /// What an operator did.
    Operator,
    /// Postgres keeps much WAL for the slot.
    Slot,
}

impl Kind {
    pub fn as_str(self) -> &'static str {
        match self {
            Kind::Started => "started",
            Kind::Loaded => "loaded",
            Kind::Healed => "healed",
            Kind::Schema => "schema",
            Kind::Verified => "verified",
            Kind::Drift => "drift",
            Kind::NotCompared => "not_compared",
            Kind::Blocked => "blocked",
            Kind::DeadLetter => "dead_letter",
            Kind::Interrupted => "interrupted",
            Kind::Reconnected => "reconnected",
            Kind::Role => "role",
            Kind::Operator => "operator",
            Kind::Slot => "slot",
        }
    }
}

/// A load that has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Load {
    pub kind: Kind,
    pub table: String,
    pub rows: u64,
    pub elapsed: Duration,
    pub because: String,
}

/// The counts of all tables since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Totals {
    pub reads: ReadCounts,
    /// Reads that were answered with 503 or 504.
    pub errors: u64,
}

struct Inner {
    /// Oldest first. `None`: the daemon did not run, or was frozen.
    seconds: VecDeque<Option<Second>>,
    /// When the newest of them ended.
    ended: Option<(Instant, SystemTime)>,
    /// Of the second in progress.
    lags: Counting,
    changes: u64,
    totals: Totals,
    happened: VecDeque<Arc<Happened>>,
    /// Not yet told, because others may belong to them.
    loads: Option<Loads>,
    interrupted: Option<Instant>,
}

struct Second {
    changes: u64,
    lags: Lags,
    /// Of these.
    of: Percentiles,
    lag_seconds: Option<f64>,
    lag_bytes: Option<u64>,
    reads: ReadCounts,
    errors: u64,
}

/// Loads that are one event.
struct Loads {
    first: Load,
    tables: u64,
    at: SystemTime,
    until: Instant,
}

impl Default for History {
    fn default() -> Self {
        let inner = Inner {
            seconds: VecDeque::new(),
            ended: None,
            lags: Counting::new(),
            changes: 0,
            totals: Totals::default(),
            happened: VecDeque::new(),
            loads: None,
            interrupted: None,
        };
        History { inner: Mutex::new(inner), news: broadcast::Sender::new(NEWS_HELD) }
    }
}

impl History {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn listen(&self) -> broadcast::Receiver<News> {
        self.news.subscribe()
    }

    // ---- what happens -----------------------------------------------------------------------------------------------

    pub fn happened(&self, level: Level, kind: Kind, table: Option<&str>, text: impl Into<String>) {
        let (table, text) = (table.map(str::to_owned), text.into());
        self.records(&mut self.inner(), Happened { at: SystemTime::now(), level, kind, table, text });
    }

    /// A load has ended. It is told within a second, together with others of a kind.
    pub fn loaded(&self, load: Load, now: Instant) {
        let mut inner = self.inner();
        match &mut inner.loads {
            Some(Loads { first, tables, until, .. }) if first.goes_with(&load) && now < *until => {
                first.rows += load.rows;
                first.elapsed = first.elapsed.max(load.elapsed);
                *tables += u64::from(first.table != load.table);
            }
            _ => {
                self.tell_loads(&mut inner);
                inner.loads = Some(Loads { first: load, tables: 1, at: SystemTime::now(), until: now + TOGETHER });
            }
        }
    }

    /// The daemon cannot go on for now.
    pub fn interrupted(&self, level: Level, text: &str, now: Instant) {
        self.inner().interrupted.get_or_insert(now);
        self.happened(level, Kind::Interrupted, None, text);
    }

    /// The daemon goes on, if it could not before.
    pub fn goes_on(&self, now: Instant) {
        let since = self.inner().interrupted.take();
        if let Some(since) = since {
            let seconds = now.saturating_duration_since(since).as_secs_f64();
            self.happened(Level::Good, Kind::Reconnected, None, format!("works again, after {seconds:.1} s"));
        }
    }

    fn records(&self, inner: &mut Inner, happened: Happened) {
        self.tell_loads(inner);
        self.tell(inner, happened);
    }

    fn tell_loads(&self, inner: &mut Inner) {
        if let Some(loads) = inner.loads.take() {
            self.tell(inner, loads.into());
        }
    }

    fn tell(&self, inner: &mut Inner, happened: Happened) {
        let happened = Arc::new(happened);
        if inner.happened.len() == EVENTS {
            inner.happened.pop_front();
        }
        inner.happened.push_back(happened.clone());
        // There may be no listeners.
        let _ = self.news.send(News::Happened(happened));
    }

    // ---- seconds ----------------------------------------------------------------------------------------------------

    /// These changes were applied, each after this lag.
    pub fn applied(&self, changes: u64, lags: impl Iterator<Item = Duration>) {
        let mut inner = self.inner();
        inner.changes += changes;
        lags.for_each(|lag| inner.lags.add(lag));
    }

    /// A second is over.
    pub fn second(&self, status: &Status, totals: Totals, now: Moment) {
        let mut inner = self.inner();
        let before =
            inner.ended.map(|(at, _)| now.instant.saturating_duration_since(at).as_secs_f64().round() as usize);
        for _ in 1..before.unwrap_or(1).min(SECONDS) {
            inner.push(None);
        }
        let ReadCounts { hits, misses } = inner.totals.reads;
        let lags = inner.lags.take();
        let second = Second {
            changes: std::mem::take(&mut inner.changes),
            of: percentiles(std::iter::once(&lags)),
            lags,
            lag_seconds: status.lag_seconds(now),
            lag_bytes: status.lag_bytes(),
            reads: ReadCounts {
                hits: totals.reads.hits.saturating_sub(hits),
                misses: totals.reads.misses.saturating_sub(misses),
            },
            errors: totals.errors.saturating_sub(inner.totals.errors),
        };
        inner.push(Some(second));
        (inner.totals, inner.ended) = (totals, Some((now.instant, now.wall)));
        self.tell_loads(&mut inner);
        let _ = self.news.send(News::Second);
    }
}

impl Inner {
    fn push(&mut self, second: Option<Second>) {
        if self.seconds.len() == SECONDS {
            self.seconds.pop_front();
        }
        self.seconds.push_back(second);
    }

    /// The Unix second in which the newest second ended.
    fn newest(&self) -> Option<u64> {
        let (_, wall) = self.ended?;
        wall.duration_since(UNIX_EPOCH).ok().map(|since| since.as_secs())
    }
}

impl Load {
    fn goes_with(&self, other: &Load) -> bool {
        self.kind == other.kind && self.because == other.because
    }
}

impl From<Loads> for Happened {
    fn from(Loads { first, tables, at, .. }: Loads) -> Self {
        let Load { kind, table, rows, elapsed, because } = first;
        let verb = match kind {
            Kind::Healed => "healed",
            _ => "loaded",
        };
        let what = if tables == 1 { table.clone() } else { format!("{tables} tables") };
        let rows = counted(rows, "row");
        let text = format!("{verb} {what} in {} ms, {rows}: {because}", elapsed.as_millis());
        Happened { at, level: Level::Good, kind, table: (tables == 1).then_some(table), text }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(table: &str, because: &str) -> Load {
        let (kind, because) = (Kind::Loaded, because.to_owned());
        Load { kind, table: table.to_owned(), rows: 2, elapsed: Duration::from_millis(12), because }
    }

    fn texts(history: &History) -> Vec<String> {
        history.inner().happened.iter().map(|happened| happened.text.clone()).collect()
    }

    fn second(history: &History, now: Instant, hits: u64) {
        let totals = Totals { reads: ReadCounts { hits, misses: 0 }, errors: 0 };
        history.second(
            &Status::starting(&[]),
            totals,
            Moment { instant: now, wall: UNIX_EPOCH + Duration::from_secs(9) },
        );
    }

    #[test]
    fn loads_of_a_kind_are_one_event() {
        let (history, now) = (History::default(), Instant::now());
        for table in ["a", "b", "c"] {
            history.loaded(load(table, "first start"), now);
        }
        assert_eq!(texts(&history), [""; 0]);
        history.loaded(load("a", "redis has no checkpoint"), now);
        history.happened(Level::Good, Kind::Operator, None, "paused");
        history.loaded(load("a", "first start"), now);
        history.loaded(load("a", "first start"), now + TOGETHER);
        second(&history, now, 0);
        let one = "loaded a in 12 ms, 2 rows: first start";
        let healed = "loaded a in 12 ms, 2 rows: redis has no checkpoint";
        assert_eq!(texts(&history), ["loaded 3 tables in 12 ms, 6 rows: first start", healed, "paused", one, one]);
    }

    #[test]
    fn seconds_and_events_are_bounded() {
        let (history, now) = (History::default(), Instant::now());
        for n in 0..(SECONDS + 10) as u64 {
            second(&history, now + Duration::from_secs(n), 3 * n);
            history.happened(Level::Good, Kind::Operator, None, n.to_string());
        }
        let report = history.report();
        assert_eq!((report.seconds.reads.len(), report.events.len()), (SECONDS, EVENTS));
        assert!(report.seconds.reads.iter().all(|reads| *reads == Some(3)));
        assert_eq!(report.events.last().map(|event| &*event.text), Some("909"));
        assert_eq!((report.last_minute.reads, report.last_15_minutes.reads), (180, 2700));
    }

    #[test]
    fn what_was_not_seen_is_not_known() {
        let (history, now) = (History::default(), Instant::now());
        second(&history, now, 1);
        history.applied(2, [Duration::from_millis(1); 2].into_iter());
        second(&history, now + Duration::from_secs(4), 2);
        let report = history.report();
        assert_eq!(report.seconds.reads, [Some(1), None, None, None, Some(1)]);
        assert_eq!(report.seconds.changes, [Some(0), None, None, None, Some(2)]);
        assert_eq!((report.from, report.last_minute.seconds), (5, 2));
        second(&history, now + Duration::from_secs(100_000), 2);
        assert_eq!(history.report().seconds.reads.iter().flatten().count(), 1);
    }
}
