//! Reads of rows: what is in Redis. What may be said about it is decided by [`standing`](super::standing).
//!
//! One request returns the checkpoint and the rows, so that position, table state and rows belong together.

use super::app::App;
use super::connection::ClientAddress;
use super::places::{self, Permit};
use super::refusal::Refusal;
use super::render;
use super::standing::{self, Claim, Standing};
use super::target::{Asking, RowsAsked, Target, Values};
use crate::checkpoint::TableMark;
use crate::command::Key;
use crate::format::Format;
use crate::lsn::{EndLsn, Lsn};
use crate::metrics::ReadResult;
use crate::sightings::Before;
use crate::sink::reader::{Moments, Read, RunId, StoredRow};
use crate::sink::{Class, SinkError};
use crate::status::{Moment, Status};
use crate::typed::row_type::RowType;
use axum::Extension;
use axum::extract::State;
use axum::http::header::{AGE, CONTENT_TYPE};
use axum::http::{HeaderName, HeaderValue, Uri};
use axum::response::{IntoResponse, Response};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::runtime::{Handle, RuntimeFlavor};
use tokio::sync::watch;
use tokio::task::block_in_place;
use tokio::time::MissedTickBehavior;

/// `false` where rows of one answer may be of several moments; otherwise it is not there.
const PREFETCHD_CONSISTENT: HeaderName = HeaderName::from_static("prefetchd-consistent");
const PREFETCHD_LSN: HeaderName = HeaderName::from_static("prefetchd-lsn");
const PREFETCHD_TTL_MS: HeaderName = HeaderName::from_static("prefetchd-ttl-ms");
const SERVER_TIMING: HeaderName = HeaderName::from_static("server-timing");

/// How often Postgres is asked for its position while a read waits: on an idle database nothing else would report it.
const ASK_EVERY: Duration = Duration::from_millis(100);
/// How long a read may still wait once the daemon stops: what has been received is still being applied.
const WAIT_AT_STOP: Duration = Duration::from_secs(1);

/// `GET /v1/tables/{name}/{key...}` and `GET /v1/tables/{name}?key=…`.
pub(super) async fn table(app: &App, peer: ClientAddress, uri: &Uri) -> Response {
    match Target::parse(uri, &app.context.tables) {
        Ok(target) => app.answer(peer, &target).await,
        Err(refusal) => refusal.into_response(),
    }
}

/// `HEAD` of the same.
pub(super) async fn head(State(app): State<Arc<App>>, Extension(peer): Extension<ClientAddress>, uri: Uri) -> Response {
    table(&app, peer, &uri).await
}

/// Rows about which a promise can be made; `None` is a row that does not exist.
pub(super) struct FoundRows {
    rows: Vec<Option<StoredRow>>,
    /// Set if the values of hashes are written with types.
    row_type: Option<RowType>,
    ttl_ms: Vec<Option<u64>>,
    origin: Origin,
    /// Held because the rows stay in memory until the answer is built.
    _place: Permit,
}

/// Where an answer comes from: its headers.
pub(super) struct Origin {
    pub moments: Moments,
    pub lsn: EndLsn,
    /// Time since the last contact with Postgres, if there was one.
    pub age: Option<Duration>,
    pub redis: Duration,
}

/// A read that may have to wait until Redis has reached a position.
pub(super) trait Question: Sync {
    type Found: Send;

    fn asking(&self) -> &Asking<'_>;

    /// How many rows are not known to be there or not if it is refused.
    fn rows(&self) -> usize;

    /// How many rows were found, and how many are known not to be there.
    fn hits_and_misses(&self, found: &Self::Found) -> (usize, usize);

    /// Approximate size of the answer.
    fn bytes(&self, found: &Self::Found) -> usize;

    fn response(&self, found: Self::Found, place: Option<Permit>) -> Response;

    /// Reads once. `status`: from before the read.
    fn attempt(&self, app: &App, status: &Status)
    -> impl Future<Output = Result<Attempt<Self::Found>, Refusal>> + Send;
}

impl Question for Target<'_> {
    type Found = FoundRows;

    fn asking(&self) -> &Asking<'_> {
        &self.asking
    }

    fn rows(&self) -> usize {
        self.keys.len()
    }

    fn hits_and_misses(&self, found: &FoundRows) -> (usize, usize) {
        let hits = found.rows.iter().flatten().count();
        (hits, self.keys.len() - hits)
    }

    fn bytes(&self, found: &FoundRows) -> usize {
        render::bytes(found.row_type.as_ref(), found.rows.iter().flatten())
    }

    fn response(&self, found: FoundRows, place: Option<Permit>) -> Response {
        found.into_response(self, place)
    }

    async fn attempt(&self, app: &App, status: &Status) -> Result<Attempt<FoundRows>, Refusal> {
        if let Some(attempt) = app.read_rows(self, &[], status).await? {
            return Ok(attempt);
        }
        let attempt = app.read_rows(self, &self.keys, status).await?;
        Ok(attempt.expect("no row is missing that was not looked for among the dead letters"))
    }
}

impl App {
    pub(super) async fn answer<Q: Question>(&self, peer: ClientAddress, question: &Q) -> Response {
        let started = Instant::now();
        let answered = match self.reach(peer, question, started).await {
            Ok(found) => self.places.answer(question.bytes(&found)).await.map(|place| (found, place)),
            Err(refusal) => Err(refusal),
        };
        let (metrics, table) = (&self.context.metrics, question.asking().table.id);
        metrics.observe_read(started.elapsed());
        match answered {
            Ok((found, place)) => {
                let (hits, misses) = question.hits_and_misses(&found);
                metrics.read(table, ReadResult::Hit, hits as u64);
                metrics.read(table, ReadResult::Miss, misses as u64);
                question.response(found, place)
            }
            Err(refusal) => {
                metrics.read(table, ReadResult::Error, question.rows() as u64);
                refusal.into_response()
            }
        }
    }

    /// Asks until Redis has reached the position that is asked for.
    async fn reach<Q: Question>(
        &self,
        peer: ClientAddress,
        question: &Q,
        started: Instant,
    ) -> Result<Q::Found, Refusal> {
        let asking = question.asking();
        let mut latest = self.context.status.clone();
        loop {
            // Taken before the read: a checkpoint older than this status means that Redis was rewound.
            let status = Arc::clone(&latest.borrow_and_update());
            let missing = match asking.min_lsn {
                // Known to be behind: Redis need not be asked. If nothing is known yet, it must be; and hash slots of a
                // cluster may be ahead of what is applied to all of them.
                Some(min) if !self.context.reader.has_lanes() && is_behind(&status, min) => min,
                _ => match question.attempt(self, &status).await? {
                    Attempt::Found(found) => return Ok(found),
                    Attempt::Behind(min) => min,
                },
            };
            let _waits = self.places.waiting(peer)?;
            self.wait_until_applied(missing, &mut latest, started + asking.wait).await.map_err(
                |ended| match ended {
                    WaitEnded::Stopping => Refusal::Stopping,
                    WaitEnded::TooLate => Refusal::Lagging {
                        applied: latest.borrow().applied.map_or_else(|| "nothing".to_owned(), |lsn| lsn.to_string()),
                        wanted: missing.to_string(),
                        waited: humantime::format_duration(asking.wait).to_string(),
                    },
                },
            )?;
        }
    }

    /// `suspects`: keys to look up among the dead letters. Returns `None` if there are none, but
    /// a missing row may be a dead letter.
    async fn read_rows(
        &self,
        target: &Target<'_>,
        suspects: &[Key],
        status: &Status,
    ) -> Result<Option<Attempt<FoundRows>>, Refusal> {
        let (table, keys) = (target.asking.table, &target.keys[..]);
        let place = self.places.read(keys.len()).await?;
        let before = self.context.sightings.before();
        let asked = (table.format, keys);
        let read = if keys.len() > 1 {
            let mut lent = self.batches.lend();
            let read = lent.reader.rows_and_dead(&table.name, asked, suspects).await;
            lent.has_answered = true;
            read
        } else {
            self.context.reader.rows_and_dead(&table.name, asked, suspects).await
        };
        let (read, dead) = read.map_err(unreadable)?;
        let (standing, lsn) = match self.stand(&target.asking, &read, before, status)? {
            Attempt::Found(stand) => stand,
            Attempt::Behind(min) => return Ok(Some(Attempt::Behind(min))),
        };
        let complete = read.rows.iter().all(Option::is_some);
        standing.allows(if complete { Claim::Rows } else { Claim::Absence })?;
        if !complete && standing.has_dead_letters() {
            if suspects.is_empty() {
                return Ok(None);
            }
            let missing = suspects.iter().zip(&read.rows).zip(dead).filter(|((_, row), _)| row.is_none());
            for ((key, _), dead) in missing {
                if let Some(dead) = dead {
                    let (table, key) = (table.name.clone(), target.short(key).escape_ascii().to_string());
                    return Err(Refusal::DeadLetter { table, key, reason: dead.reason });
                }
            }
        }
        let row_type = match (table.format, target.asking.values) {
            (Format::Hash, Values::Typed) if read.rows.iter().any(Option::is_some) => Some(standing.row_type()?),
            (Format::Hash, Values::Typed | Values::Strings) | (Format::Json | Format::RedisJson, _) => None,
        };
        let age = standing.age();
        let Read { rows, moments, ttl_ms, redis, .. } = read;
        let origin = Origin { moments, lsn, age, redis };
        Ok(Some(Attempt::Found(FoundRows { rows, row_type, ttl_ms, origin, _place: place })))
    }

    /// Returns what may be said about what was read, and the position that all of it has at least. `before`: from before the
    /// read.
    pub(super) fn stand<'a>(
        &self,
        asking: &Asking<'a>,
        read: &Read,
        before: Before,
        status: &'a Status,
    ) -> Result<Attempt<(Standing<'a>, EndLsn)>, Refusal> {
        let judge = |server: &RunId, found| self.context.sightings.judge(before, server, found, status.awaits_redis());
        let checkpoint = standing::trusted(read, &self.heads, status, judge)?;
        let marks = &self.marks[asking.table.id.index()];
        let mark = read.entry.as_deref().map(|entry| marks.parse(entry, TableMark::from_json)).transpose();
        let mark = mark.map_err(|_| standing::healing(standing::NO_CHECKPOINT))?;
        let (changed, epoch) = &*self.context.changed;
        // A standby may be told after the daemon that works.
        let is_before_reload = checkpoint.epoch <= *epoch
            && status.state != crate::status::State::Standby
            && changed.contains(&asking.table.name);
        let standing = Standing {
            table: asking.table,
            checkpoint,
            // Under another template its keys are elsewhere.
            mark: mark.filter(|mark| mark.template == asking.table.key.to_string()).filter(|_| !is_before_reload),
            status,
            now: Moment::now(),
            redis_time_ms: read.redis_time_ms,
            may_lack_keys: read.may_lack_keys,
            max_staleness: self.context.max_staleness,
            max_age: asking.max_age,
        };
        let mut lsn = standing.as_of(read.marked);
        if let Some(min) = asking.min_lsn {
            if lsn.0 < floor(min, status) {
                // Waiting does not help a table that is not followed.
                standing.is_followed()?;
                return Ok(Attempt::Behind(min));
            }
            // The header then reaches what was asked for: no transaction lies between a page's boundary and the end of
            // its header.
            lsn = lsn.max(EndLsn(min));
        }
        Ok(Attempt::Found((standing, lsn)))
    }

    /// Waits until a status newer than the one last seen says that `min` is applied.
    async fn wait_until_applied(
        &self,
        min: Lsn,
        latest: &mut watch::Receiver<Arc<Status>>,
        deadline: Instant,
    ) -> Result<(), WaitEnded> {
        let late = tokio::time::sleep_until(deadline.into());
        let stopped = async {
            self.stop.cancelled().await;
            tokio::time::sleep(WAIT_AT_STOP).await;
        };
        tokio::pin!(late, stopped);
        let mut ask = tokio::time::interval(ASK_EVERY);
        ask.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                changed = latest.changed() => {
                    changed.map_err(|_| WaitEnded::Stopping)?;
                    if has_applied(&latest.borrow_and_update(), min) {
                        return Ok(());
                    }
                }
                _ = ask.tick() => self.context.position_wanted.notify_one(),
                () = &mut late => return Err(WaitEnded::TooLate),
                () = &mut stopped => return Err(WaitEnded::Stopping),
            }
        }
    }
}

pub(super) enum Attempt<T> {
    Found(T),
    /// Redis has not reached the position that the read asked for.
    Behind(Lsn),
}

/// Why a wait ended before its position was reached.
enum WaitEnded {
    TooLate,
    Stopping,
}

fn is_behind(status: &Status, min: Lsn) -> bool {
    status.applied.is_some() && !has_applied(status, min)
}

fn has_applied(status: &Status, min: Lsn) -> bool {
    status.applied.is_some_and(|applied| applied.0 >= floor(min, status))
}

/// Returns `min` as a position that the stream can reach. Before the first contact with Postgres it is returned
/// unchanged, which can only make the read wait too long.
fn floor(min: Lsn, status: &Status) -> Lsn {
    status.source.as_ref().map_or(min, |source| min.before_page_header(source.wal_segment_bytes))
}

pub(super) fn unreadable(error: SinkError) -> Refusal {
    match &error {
        SinkError::Excess { .. } => Refusal::TooLarge(format!("{error}: ask for fewer at once")),
        SinkError::LargeSet { .. } => Refusal::TooLarge(error.to_string()),
        SinkError::Restless { .. } => Refusal::Overloaded(error.to_string()),
        // Redis is available, but something else was stored in place of a row or the checkpoint.
        SinkError::Refused { reply, .. } if reply.class() == Class::WrongType => Refusal::Healing(error.to_string()),
        _ => Refusal::RedisUnavailable(error.to_string()),
    }
}

impl FoundRows {
    fn into_response(self, target: &Target<'_>, place: Option<Permit>) -> Response {
        let (bytes, mut ttl_ms) = (self.rows.iter().flatten().map(StoredRow::bytes).sum(), None);
        let mut response = match (&target.wanted, self.rows.first()) {
            (RowsAsked::One, Some(Some(row))) => {
                ttl_ms = self.ttl_ms.first().copied().flatten();
                json(|| render::one(self.row_type.as_ref(), row, bytes), place)
            }
            (RowsAsked::One, _) => {
                let key =
                    target.keys.first().map(|key| target.short(key).escape_ascii().to_string()).unwrap_or_default();
                Refusal::NotFound { table: target.asking.table.name.clone(), key }.into_response()
            }
            (RowsAsked::Many, _) => json(|| render::several(self.row_type.as_ref(), target, &self.rows, bytes), place),
        };
        self.origin.is_told_by(&mut response);
        if let Some(ttl_ms) = ttl_ms {
            response.headers_mut().insert(PREFETCHD_TTL_MS, ttl_ms.into());
        }
        response
    }
}

impl Origin {
    pub(super) fn is_told_by(&self, response: &mut Response) {
        let headers = response.headers_mut();
        let mut set = |name: HeaderName, value: String| {
            headers.insert(name, HeaderValue::try_from(value).expect("digits and ASCII letters make a header"));
        };
        set(PREFETCHD_LSN, self.lsn.to_string());
        match self.moments {
            Moments::One => {}
            Moments::Several => set(PREFETCHD_CONSISTENT, "false".to_owned()),
        }
        set(SERVER_TIMING, format!("redis;dur={:.2}", self.redis.as_secs_f64() * 1e3));
        if let Some(age) = self.age {
            set(AGE, age.as_secs().to_string());
        }
    }
}

/// Holds `place` until the answer is read.
pub(super) fn json(write: impl FnOnce() -> Result<Vec<u8>, Refusal>, place: Option<Permit>) -> Response {
    // Serializing a large answer takes long: this thread's other tasks move to another thread meanwhile.
    let body = match place {
        Some(_) if Handle::current().runtime_flavor() == RuntimeFlavor::MultiThread => block_in_place(write),
        Some(_) | None => write(),
    };
    match body {
        Ok(body) => ([(CONTENT_TYPE, "application/json")], places::held(body, place)).into_response(),
        Err(refusal) => refusal.into_response(),
    }
}
