//! Reads of rows: what is in Redis, and what may be said about it.
//!
//! One request returns the checkpoint and the rows, so that position, table state and rows belong together. The pure
//! half ([`Standing`]) decides; when in doubt it returns 503, because a wrong 404 makes an application believe that a
//! row is gone.

use super::app::App;
use super::connection::ClientAddress;
use super::places::{self, Permit};
use super::refusal::Refusal;
use super::render;
use super::target::{RowsAsked, Target, Values};
use crate::checkpoint::{Checkpoint, TableMark, TableState};
use crate::command::Key;
use crate::format::Format;
use crate::lsn::{EndLsn, Lsn};
use crate::metrics::ReadResult;
use crate::schema::TableSpec;
use crate::sightings::{Doubt, Version};
use crate::sink::reader::{Moments, Read, RunId, StoredRow};
use crate::sink::{Class, SinkError};
use crate::status::{Moment, Status};
use crate::typed::row_type::{EncodedRowType, RowType};
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
pub(super) async fn table(
    State(app): State<Arc<App>>,
    Extension(peer): Extension<ClientAddress>,
    uri: Uri,
) -> Response {
    let started = Instant::now();
    let (target, keys) = match Target::parse(&uri, &app.context.tables) {
        Ok(parsed) => parsed,
        Err(refusal) => return refusal.into_response(),
    };
    let answered = match app.read(peer, &target, &keys, started).await {
        Ok(found) => app.places.answer(found.bytes()).await.map(|place| (found, place)),
        Err(refusal) => Err(refusal),
    };
    let metrics = &app.context.metrics;
    metrics.observe_read(started.elapsed());
    match answered {
        Ok((found, place)) => {
            let hits = found.rows.iter().filter(|row| row.is_some()).count();
            metrics.read(target.table.id, ReadResult::Hit, hits as u64);
            metrics.read(target.table.id, ReadResult::Miss, (keys.len() - hits) as u64);
            found.into_response(&target, &keys, place)
        }
        Err(refusal) => {
            metrics.read(target.table.id, ReadResult::Error, keys.len() as u64);
            refusal.into_response()
        }
    }
}

/// Rows about which a promise can be made; `None` is a row that does not exist.
struct FoundRows {
    rows: Vec<Option<StoredRow>>,
    /// Set if the values of hashes are written with types.
    row_type: Option<RowType>,
    moments: Moments,
    ttl_ms: Vec<Option<u64>>,
    lsn: EndLsn,
    /// Time since the last contact with Postgres, if there was one.
    age: Option<Duration>,
    redis: Duration,
    /// Held because the rows stay in memory until the answer is built.
    _place: Permit,
}

impl App {
    async fn read(
        &self,
        peer: ClientAddress,
        target: &Target<'_>,
        keys: &[Key],
        started: Instant,
    ) -> Result<FoundRows, Refusal> {
        let mut latest = self.context.status.clone();
        loop {
            // Taken before the read: a checkpoint older than this status means that Redis was rewound.
            let status = Arc::clone(&latest.borrow_and_update());
            let missing = match target.min_lsn {
                // Known to be behind: Redis need not be asked. If nothing is known yet, it must be; and hash slots of a
                // cluster may be ahead of what is applied to all of them.
                Some(min) if !self.context.reader.has_lanes() && is_behind(&status, min) => min,
                _ => match self.attempt(target, keys, &status).await? {
                    Attempt::Found(found) => return Ok(found),
                    Attempt::Behind(min) => min,
                },
            };
            let _waits = self.places.waiting(peer)?;
            self.wait_until_applied(missing, &mut latest, started + target.wait).await.map_err(
                |ended| match ended {
                    WaitEnded::Stopping => Refusal::Stopping,
                    WaitEnded::TooLate => Refusal::Lagging {
                        applied: latest.borrow().applied.map_or_else(|| "nothing".to_owned(), |lsn| lsn.to_string()),
                        wanted: missing.to_string(),
                        waited: humantime::format_duration(target.wait).to_string(),
                    },
                },
            )?;
        }
    }

    async fn attempt(&self, target: &Target<'_>, keys: &[Key], status: &Status) -> Result<Attempt, Refusal> {
        if let Some(attempt) = self.attempt_with(target, keys, &[], status).await? {
            return Ok(attempt);
        }
        let attempt = self.attempt_with(target, keys, keys, status).await?;
        Ok(attempt.expect("no row is missing that was not looked for among the dead letters"))
    }

    /// `suspects`: keys to look up among the dead letters. Returns `None` if there are none, but
    /// a missing row may be a dead letter.
    async fn attempt_with(
        &self,
        target: &Target<'_>,
        keys: &[Key],
        suspects: &[Key],
        status: &Status,
    ) -> Result<Option<Attempt>, Refusal> {
        let place = self.places.read(keys.len()).await?;
        let before = self.context.sightings.before();
        let asked = (target.table.format, keys);
        let read = if keys.len() > 1 {
            let mut lent = self.batches.lend();
            let read = lent.reader.rows_and_dead(&target.table.name, asked, suspects).await;
            lent.has_answered = true;
            read
        } else {
            self.context.reader.rows_and_dead(&target.table.name, asked, suspects).await
        };
        let (read, dead) = read.map_err(unreadable)?;
        let judge = |server: &RunId, found| self.context.sightings.judge(before, server, found, status.awaits_redis());
        let checkpoint = trusted(&read, status, judge)?;
        let mark = read.entry.as_deref().map(TableMark::from_json).transpose().map_err(|_| healing(NO_CHECKPOINT))?;
        let standing = Standing {
            table: target.table,
            checkpoint: &checkpoint,
            // Under another template its keys are elsewhere.
            mark: mark.filter(|mark| mark.template == target.table.key.to_string()),
            status,
            now: Moment::now(),
            redis_time_ms: read.redis_time_ms,
            may_lack_keys: read.may_lack_keys,
            max_staleness: self.context.max_staleness,
            max_age: target.max_age,
        };
        let mut lsn = standing.as_of(read.marked);
        if let Some(min) = target.min_lsn {
            if lsn.0 < floor(min, status) {
                // Waiting does not help a table that is not followed.
                standing.is_followed()?;
                return Ok(Some(Attempt::Behind(min)));
            }
            // The header then reaches what was asked for: no transaction lies between a page's boundary and the end of
            // its header.
            lsn = lsn.max(EndLsn(min));
        }
        let complete = read.rows.iter().all(Option::is_some);
        standing.allows(complete)?;
        if !complete && standing.has_dead_letters() {
            if suspects.is_empty() {
                return Ok(None);
            }
            let missing = suspects.iter().zip(&read.rows).zip(dead).filter(|((_, row), _)| row.is_none());
            for ((key, _), dead) in missing {
                if let Some(dead) = dead {
                    let (table, key) = (target.table.name.clone(), target.short(key).escape_ascii().to_string());
                    return Err(Refusal::DeadLetter { table, key, reason: dead.reason });
                }
            }
        }
        let row_type = match (target.table.format, target.values) {
            (Format::Hash, Values::Typed) if read.rows.iter().any(Option::is_some) => Some(standing.row_type()?),
            (Format::Hash, Values::Typed | Values::Strings) | (Format::Json, _) => None,
        };
        let age = standing.age();
        let Read { rows, moments, ttl_ms, redis, .. } = read;
        Ok(Some(Attempt::Found(FoundRows { rows, row_type, moments, ttl_ms, lsn, age, redis, _place: place })))
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

enum Attempt {
    Found(FoundRows),
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

fn unreadable(error: SinkError) -> Refusal {
    match &error {
        // Redis is available, but something else was stored in place of a row or the checkpoint.
        SinkError::Excess { .. } => Refusal::TooLarge(format!("{error}: ask for fewer at once")),
        SinkError::Refused { reply, .. } if reply.class() == Class::WrongType => Refusal::Healing(error.to_string()),
        _ => Refusal::RedisUnavailable(error.to_string()),
    }
}

const NO_CHECKPOINT: &str = "Redis holds something else as checkpoint";

fn healing(what: &str) -> Refusal {
    Refusal::Healing(format!("{what}: the tables are being compared with Postgres again"))
}

/// Returns the head of the checkpoint, unless Redis may have lost data. `judge` knows what was seen before.
fn trusted(
    read: &Read,
    status: &Status,
    judge: impl FnOnce(&RunId, Option<Version>) -> Result<(), Doubt>,
) -> Result<Checkpoint, Refusal> {
    if status.has_only_started() && status.waiting_for.is_none() {
        // Redis may have been rewound while no daemon watched. If Postgres is unavailable, the contents are served
        // anyway, because nothing better is known.
        return Err(healing("this daemon has only just started"));
    }
    let checkpoint = read.checkpoint.as_deref().map(Checkpoint::head).transpose();
    let checkpoint = checkpoint.map_err(|_| healing(NO_CHECKPOINT))?;
    judge(&read.server, checkpoint.as_ref().map(|c| (c.epoch, c.seq))).map_err(|doubt| healing(doubt.as_str()))?;
    let checkpoint = checkpoint.ok_or_else(|| healing(Doubt::Lost.as_str()))?;
    if status.confirmed.is_some_and(|confirmed| checkpoint.lsn < confirmed) {
        return Err(healing("Redis lacks what Postgres was told it has"));
    }
    if status.source.as_ref().is_some_and(|source| source.system_id != checkpoint.system_id) {
        return Err(healing("Redis holds the rows of another Postgres"));
    }
    Ok(checkpoint)
}

/// Everything that decides what may be said about a table's rows.
struct Standing<'a> {
    table: &'a TableSpec,
    checkpoint: &'a Checkpoint,
    /// What is said of the table; nothing where its keys are not those of the checkpoint's time.
    mark: Option<TableMark>,
    status: &'a Status,
    now: Moment,
    /// Redis's clock, milliseconds since the Unix epoch. By it the heartbeat of a frozen daemon is old.
    redis_time_ms: u64,
    /// See [`Read::may_lack_keys`].
    may_lack_keys: bool,
    max_staleness: Duration,
    max_age: Option<Duration>,
}

impl Standing<'_> {
    /// Time since the last contact with Postgres.
    fn age(&self) -> Option<Duration> {
        self.status.last_contact.map(|at| self.now.instant.saturating_duration_since(at))
    }

    /// Whether the rows may be shown; `complete` if none is missing.
    fn allows(&self, complete: bool) -> Result<(), Refusal> {
        let mark = self.mark.as_ref();
        let state = mark.map_or(TableState::Loading, |mark| mark.state);
        let name = &self.table.name;
        let healing = || Err(Refusal::Healing(format!("{name} is being compared with Postgres after a loss")));
        // Existing rows of a blocked table are still served, unless the reader limits their age.
        if !complete || state == TableState::Healing || self.max_age.is_some() {
            self.is_followed()?;
        }
        if state == TableState::Healing {
            return healing();
        }
        if let Some(max_age) = self.max_age
            && self.age().is_none_or(|age| age > max_age)
        {
            return Err(self.stale("the last contact with Postgres", self.age(), max_age));
        }
        if complete {
            return Ok(());
        }
        match state {
            TableState::Healing => healing(),
            TableState::Loading => Err(Refusal::Loading(name.clone())),
            TableState::Incomplete => Err(Refusal::Incomplete(name.clone())),
            TableState::Loaded if mark.is_some_and(|mark| self.may_have_expired(mark)) => {
                Err(Refusal::Healing(format!("keys of {name} may have expired while nothing renewed them")))
            }
            TableState::Loaded if !self.status.is_fresh(self.now, self.max_staleness) => {
                let behind = self.status.fresh_as_of.map(|at| self.now.instant.saturating_duration_since(at));
                Err(self.stale("Redis was last known to be current", behind, self.max_staleness))
            }
            TableState::Loaded if self.may_lack_keys => {
                let what = "the hash slot of this key has moved to another node, and is being read again";
                Err(Refusal::Healing(what.to_owned()))
            }
            TableState::Loaded if mark.is_some_and(|mark| mark.more_dead_letters) => {
                Err(Refusal::MoreDeadLetters(name.clone()))
            }
            TableState::Loaded => Ok(()),
        }
    }

    fn is_followed(&self) -> Result<(), Refusal> {
        match self.mark.as_ref().and_then(|mark| mark.blocked.as_ref()) {
            None => Ok(()),
            Some(why) => Err(Refusal::Blocked(format!("table {} is blocked: {why}", self.table.name))),
        }
    }

    /// Returns what the columns become in JSON, the same for all rows.
    fn row_type(&self) -> Result<RowType, Refusal> {
        let types = self.mark.as_ref().and_then(|mark| mark.types.as_ref());
        types.and_then(EncodedRowType::decode).ok_or_else(|| Refusal::TypesUnknown(self.table.name.clone()))
    }

    fn has_dead_letters(&self) -> bool {
        self.mark.as_ref().is_some_and(|mark| mark.dead_letters > 0)
    }

    /// Every row is at least as new as this, including pending ones. `marked`: see [`Read::marked`].
    fn as_of(&self, marked: Option<EndLsn>) -> EndLsn {
        let waiting = self.mark.as_ref().and_then(|mark| mark.as_of);
        let lsn = self.checkpoint.lsn.max(marked.unwrap_or(self.checkpoint.lsn));
        waiting.map_or(lsn, |as_of| as_of.min(lsn))
    }

    fn may_have_expired(&self, mark: &TableMark) -> bool {
        mark.ttl_until_ms.is_some_and(|until| self.redis_time_ms >= until)
    }

    fn stale(&self, what: &str, age: Option<Duration>, limit: Duration) -> Refusal {
        let limit = humantime::format_duration(limit);
        Refusal::Stale(match age {
            Some(age) => format!("{what} {:.1} s ago, which is more than {limit}", age.as_secs_f64()),
            None => format!("{what} is not known yet, and should be within {limit}"),
        })
    }
}

impl FoundRows {
    /// Approximate size of the answer.
    fn bytes(&self) -> usize {
        let row = |row: &StoredRow| match row {
            StoredRow::Fields(fields) => fields.iter().map(|(field, value)| field.len() + value.len()).sum(),
            StoredRow::Document(document) => document.len(),
        };
        self.rows.iter().flatten().map(row).sum()
    }

    fn into_response(self, target: &Target<'_>, keys: &[Key], place: Option<Permit>) -> Response {
        let (bytes, mut ttl_ms) = (self.bytes(), None);
        let mut response = match (&target.wanted, self.rows.first()) {
            (RowsAsked::One, Some(Some(row))) => {
                ttl_ms = self.ttl_ms.first().copied().flatten();
                json(|| render::one(self.row_type.as_ref(), row, bytes), place)
            }
            (RowsAsked::One, _) => {
                let key = keys.first().map(|key| target.short(key).escape_ascii().to_string()).unwrap_or_default();
                Refusal::NotFound { table: target.table.name.clone(), key }.into_response()
            }
            (RowsAsked::Many, _) => {
                json(|| render::several(self.row_type.as_ref(), target, (keys, &self.rows), bytes), place)
            }
        };
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
        if let Some(ttl_ms) = ttl_ms {
            set(PREFETCHD_TTL_MS, ttl_ms.to_string());
        }
        response
    }
}

fn json(write: impl FnOnce() -> Result<Vec<u8>, Refusal>, place: Option<Permit>) -> Response {
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
