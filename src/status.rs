//! What the daemon knows of itself: one value, written by the bridge, read by everybody else through a watch channel.
//!
//! Nothing here is more than a copy. What a read may promise comes from the checkpoint that is read with it.
//! Whether the daemon is ready, how far it lags, and the JSON of both are computed here, so that `/readyz`, `/metrics`,
//! the events and the page cannot disagree.

mod verdict;

use crate::admin::Tally;
use crate::checkpoint::{Blocked, TableState};
use crate::command::Op;
use crate::lsn::{EndLsn, Lsn};
use crate::schema::TableSpec;
use serde::Serialize;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};
use utoipa::ToSchema;

pub use verdict::{Level, Verdict};

/// What the daemon is doing. One at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum State {
    Connecting,
    Standby,
    Loading,
    CatchingUp,
    Streaming,
    Healing,
    Stalled,
    Stopping,
}

impl State {
    pub const ALL: [State; 8] = [
        State::Connecting,
        State::Standby,
        State::Loading,
        State::CatchingUp,
        State::Streaming,
        State::Healing,
        State::Stalled,
        State::Stopping,
    ];

    pub fn as_str(self) -> &'static str {
        match self {
            State::Connecting => "connecting",
            State::Standby => "standby",
            State::Loading => "loading",
            State::CatchingUp => "catching_up",
            State::Streaming => "streaming",
            State::Healing => "healing",
            State::Stalled => "stalled",
            State::Stopping => "stopping",
        }
    }
}

/// One moment on both clocks: lags within this process are measured on the first, commit times of Postgres on the second.
#[derive(Debug, Clone, Copy)]
pub struct Moment {
    pub instant: Instant,
    pub wall: SystemTime,
}

impl Moment {
    pub fn now() -> Self {
        Self { instant: Instant::now(), wall: SystemTime::now() }
    }
}

#[derive(Debug, Clone)]
pub struct Status {
    pub state: State,
    /// Why it does not go on: a server that is not up, a pid that blocks slot creation, what Redis refuses.
    pub waiting_for: Option<String>,
    /// While the stream runs: what fails beside it. Where nothing stops the stream itself, `waiting_for` says it too.
    pub beside_stream: Option<String>,
    pub paused: bool,
    pub started: Instant,
    /// Known after the first contact with Postgres.
    pub source: Option<Source>,
    pub received: Option<EndLsn>,
    pub applied: Option<EndLsn>,
    pub confirmed: Option<EndLsn>,
    /// The server's flushed position, by the last sample.
    pub server: Option<Lsn>,
    /// When Postgres last said anything at all.
    pub last_contact: Option<Instant>,
    /// When the newest sample whose position is applied was taken: what is in Redis was right then.
    pub fresh_as_of: Option<Instant>,
    /// Commit time of the oldest transaction that is received and not applied.
    pub oldest_unapplied: Option<SystemTime>,
    /// The checkpoint as this daemon last wrote or (as a standby) read it. Reads compare theirs with it.
    pub epoch: u64,
    pub seq: u64,
    /// In the order of the configuration.
    pub tables: Vec<TableStatus>,
    pub sync_lag: SyncLag,
    /// Some of the rows that Redis cannot hold, at most [`DEAD_LETTERS_SHOWN`]. A standby does not know them.
    pub dead_letter_keys: Vec<DeadLetterSeen>,
    pub primary_reads: u64,
    pub last_load: Option<LastLoad>,
    /// In this life.
    pub last_verify: Option<LastVerify>,
    /// When the verification of every table last succeeded, in an earlier life too.
    pub verified_at: Option<SystemTime>,
    /// The refetch or verification under way.
    pub operation: Option<&'static str>,
    pub slot_retained_bytes: Option<u64>,
    pub slot_limit_bytes: Option<u64>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    pub system_id: String,
    pub timeline: u32,
    pub database: String,
    pub slot: String,
    pub publication: String,
    pub wal_segment_bytes: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TableStatus {
    pub name: Arc<str>,
    /// `schema.table`
    pub table: Arc<str>,
    /// `None` before the checkpoint was read.
    pub state: Option<TableState>,
    /// It cannot be followed until a person has changed something.
    pub blocked: Option<Blocked>,
    /// Why it is loaded, while it is.
    pub because: Option<String>,
    /// Keys were removed, and are not loaded again yet.
    pub removed: bool,
    /// Rows written by loads.
    pub prefetched: u64,
    pub upserts: u64,
    pub deletes: u64,
    pub truncates: u64,
    /// Rows read so far by a load that is under way, and how many there may be.
    pub load_progress: Option<(u64, u64)>,
    /// Rows as of the last load or comparison, in this life.
    pub rows: Option<u64>,
    /// When a load or comparison that left it right last began, in an earlier life too.
    pub compared_at: Option<SystemTime>,
    /// When a verification that left it right last began, in an earlier life too.
    pub verified_at: Option<SystemTime>,
    /// Why the last comparison of it could not be made, until one succeeds.
    pub not_compared: Option<String>,
    /// When a verification last ended, whatever it found, in this life.
    pub checked_at: Option<SystemTime>,
    /// Keys that it found to differ and that nobody has repaired, as far as this life knows.
    pub drift: u64,
    /// Rows that Postgres has and Redis cannot hold.
    pub dead_letters: u64,
    /// There may be more of them.
    pub more_dead_letters: bool,
    /// Dead letters without a key, in this life: nobody can read such a row, and nobody can tell when it is gone.
    pub keyless: u64,
}

impl TableStatus {
    /// `None` where it is not known.
    fn state_name(&self) -> Option<&'static str> {
        if self.blocked.is_some() { Some("blocked") } else { table_state(self.state) }
    }
}

/// A row that Postgres has and Redis cannot hold: no values.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
#[schema(as = DeadLetter)]
pub struct DeadLetterSeen {
    pub table: String,
    /// As in Redis, as far as it is text.
    pub key: String,
    pub reason: String,
    pub lsn: String,
}

/// How many keys of dead letters the status lists.
pub const DEAD_LETTERS_SHOWN: usize = 20;

#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct SyncLag {
    pub avg_ms: Option<f64>,
    pub p50_ms: Option<f64>,
    pub p99_ms: Option<f64>,
    pub count: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LastLoad {
    pub rows: u64,
    pub elapsed: Duration,
    pub lsn: EndLsn,
    pub reason: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LastVerify {
    pub at: SystemTime,
    pub tally: Tally,
    pub elapsed: Duration,
    pub lsn: EndLsn,
}

/// Reads of one table since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ReadCounts {
    pub hits: u64,
    pub misses: u64,
}

/// One applied change, for `tail` and the event stream: no values.
#[derive(Debug, Clone, PartialEq)]
pub struct ChangeEvent {
    pub at: SystemTime,
    pub table: Arc<str>,
    pub op: Op,
    /// Redis key, lossily as text. Empty for a TRUNCATE.
    pub key: String,
    /// Commit in Postgres to acknowledged by Redis.
    pub lag: Duration,
}

/// How long Postgres may say nothing before that counts as lag: it is asked once a second.
const REPLY_INTERVAL: Duration = Duration::from_secs(2);

impl Status {
    /// Before anything is known.
    pub fn starting(tables: &[TableSpec]) -> Self {
        Self {
            state: State::Connecting,
            waiting_for: None,
            beside_stream: None,
            paused: false,
            started: Instant::now(),
            source: None,
            received: None,
            applied: None,
            confirmed: None,
            server: None,
            last_contact: None,
            fresh_as_of: None,
            oldest_unapplied: None,
            epoch: 0,
            seq: 0,
            tables: tables.iter().map(TableStatus::starting).collect(),
            sync_lag: SyncLag::default(),
            dead_letter_keys: Vec::new(),
            primary_reads: 0,
            last_load: None,
            last_verify: None,
            verified_at: None,
            operation: None,
            slot_retained_bytes: None,
            slot_limit_bytes: None,
        }
    }

    /// Age of the oldest commit received and not applied, or the time since the last contact once that is longer than
    /// the reply interval; while paused, the time since everything was applied. `None` before the first contact. A clock
    /// of Postgres that is ahead of ours gives 0.
    pub fn lag_seconds(&self, now: Moment) -> Option<f64> {
        let unapplied = self.oldest_unapplied.map(|at| now.wall.duration_since(at).unwrap_or_default());
        // What is not taken is not received either.
        let known = if self.paused { self.fresh_as_of.min(self.last_contact) } else { self.last_contact };
        let silent = known.map(|at| match now.instant.saturating_duration_since(at) {
            silent if silent > REPLY_INTERVAL => silent,
            _ => Duration::ZERO,
        });
        unapplied.max(silent).map(|lag| lag.as_secs_f64())
    }

    /// Of every table; of those without a key, all since the start.
    fn dead_letters(&self) -> u64 {
        self.tables.iter().map(|t| t.dead_letters + t.keyless).sum()
    }

    /// WAL between the server's position and what is applied.
    pub fn lag_bytes(&self) -> Option<u64> {
        Some(self.server?.bytes_since(self.applied?.0))
    }

    /// Whether a miss can be told from a row that has not arrived: the newest sample that is applied is recent enough.
    pub fn is_fresh(&self, now: Moment, max_staleness: Duration) -> bool {
        self.fresh_as_of.is_some_and(|at| now.instant.saturating_duration_since(at) <= max_staleness)
    }

    /// Why not to send readers here; empty when ready.
    ///
    /// Lag is judged by [`Status::fresh_as_of`], on one clock, and not by commit times: a Postgres whose clock is a
    /// minute behind would make every change look late.
    pub fn readiness(&self, now: Moment, max_staleness: Duration) -> Vec<String> {
        let mut reasons = Vec::new();
        match self.state {
            // Loads and healing go on beside the stream; the tables below say what they are worth meanwhile. A standby
            // shows the active daemon's tables and freshness.
            State::Standby | State::Loading | State::CatchingUp | State::Streaming | State::Healing => {}
            State::Connecting | State::Stalled | State::Stopping => reasons.push(match &self.waiting_for {
                Some(what) => format!("the stream does not run: {}, waiting for {what}", self.state.as_str()),
                None => format!("the stream does not run: {}", self.state.as_str()),
            }),
        }
        for table in &self.tables {
            match (&table.blocked, table.state) {
                (Some(why), _) => reasons.push(format!("table {} is blocked: {why}", table.name)),
                (None, Some(TableState::Loaded)) => {}
                (None, state) => {
                    let state = table_state(state).unwrap_or("not known yet");
                    reasons.push(format!("table {} is {state}", table.name));
                }
            }
        }
        reasons.extend(self.staleness(now, max_staleness));
        reasons
    }

    /// In which way what is in Redis is older than allowed, or not known to be current.
    fn staleness(&self, now: Moment, max_staleness: Duration) -> Vec<String> {
        let mut reasons = Vec::new();
        let limit = humantime::format_duration(max_staleness);
        match self.last_contact.map(|at| now.instant.saturating_duration_since(at)) {
            None => reasons.push("no contact with Postgres yet".to_owned()),
            Some(silent) if silent > max_staleness => {
                reasons.push(format!("no contact with Postgres for {} s, more than {limit}", silent.as_secs()));
            }
            Some(_) => {}
        }
        match self.fresh_as_of.map(|at| now.instant.saturating_duration_since(at)) {
            None => reasons.push("what Postgres has committed is not applied yet".to_owned()),
            Some(behind) if behind > max_staleness => {
                reasons.push(format!("Redis is {} s behind Postgres, more than {limit}", behind.as_secs()));
            }
            Some(_) => {}
        }
        reasons
    }

    /// The body of `GET /v1/status`. `reads` come in the order of the configuration, as the tables do.
    pub fn to_json(&self, reads: &[ReadCounts], now: Moment, max_staleness: Duration) -> String {
        let not_ready_because = self.readiness(now, max_staleness);
        let verdict = self.verdict(now, max_staleness);
        let (hits, misses) = reads.iter().fold((0, 0), |(h, m), r| (h + r.hits, m + r.misses));
        let tables: Vec<_> = self
            .tables
            .iter()
            .enumerate()
            .map(|(i, table)| {
                let reads = reads.get(i).copied().unwrap_or_default();
                TableReport {
                    name: &table.name,
                    table: &table.table,
                    loaded: table.state == Some(TableState::Loaded) && table.blocked.is_none(),
                    state: table.state_name(),
                    because: table.blocked.as_ref().map(|b| b.because.as_str()).or(table.because.as_deref()),
                    remedy: table.blocked.as_ref().map(|b| b.remedy.as_str()),
                    loading: table.load_progress.map(|(rows, estimated)| ProgressReport { rows, estimated }),
                    prefetched: table.prefetched,
                    upserts: table.upserts,
                    deletes: table.deletes,
                    truncates: table.truncates,
                    hits: reads.hits,
                    misses: reads.misses,
                    rows: table.rows,
                    compared_at: table.compared_at.and_then(rfc3339),
                    verified_at: table.verified_at.and_then(rfc3339),
                    not_compared: table.not_compared.as_deref(),
                    checked_at: table.checked_at.and_then(rfc3339),
                    drift: table.drift,
                    dead_letters: table.dead_letters + table.keyless,
                    more_dead_letters: table.more_dead_letters,
                }
            })
            .collect();
        let report = Report {
            version: env!("CARGO_PKG_VERSION"),
            state: self.state.as_str(),
            verdict: VerdictReport { level: verdict.level.as_str(), text: &verdict.text, remedy: &verdict.remedy },
            waiting_for: self.waiting_for.as_deref(),
            paused: self.paused,
            ready: not_ready_because.is_empty(),
            not_ready_because,
            operation: self.operation,
            uptime_seconds: millis(now.instant.saturating_duration_since(self.started)) / 1000.0,
            source: SourceReport {
                system_id: self.source.as_ref().map(|s| s.system_id.as_str()),
                timeline: self.source.as_ref().map(|s| s.timeline),
                database: self.source.as_ref().map(|s| s.database.as_str()),
                slot: self.source.as_ref().map(|s| s.slot.as_str()),
                publication: self.source.as_ref().map(|s| s.publication.as_str()),
            },
            lsn: LsnReport {
                received: self.received.map(|l| l.to_string()),
                applied: self.applied.map(|l| l.to_string()),
                confirmed: self.confirmed.map(|l| l.to_string()),
                server: self.server.map(|l| l.to_string()),
            },
            lag: LagReport { bytes: self.lag_bytes(), seconds: self.lag_seconds(now) },
            slot: SlotReport { retained_bytes: self.slot_retained_bytes, limit_bytes: self.slot_limit_bytes },
            hits,
            misses,
            hit_rate_pct: (hits + misses > 0).then(|| hits as f64 * 100.0 / (hits + misses) as f64),
            prefetched: self.tables.iter().map(|t| t.prefetched).sum(),
            sync_events_applied: self.tables.iter().map(|t| t.upserts + t.deletes + t.truncates).sum(),
            sync_lag_ms: SyncLagReport {
                avg: self.sync_lag.avg_ms,
                p50: self.sync_lag.p50_ms,
                p99: self.sync_lag.p99_ms,
                count: self.sync_lag.count,
            },
            primary_reads: self.primary_reads,
            dead_letters: self.dead_letters(),
            dead_letter_keys: &self.dead_letter_keys,
            last_load: self.last_load.as_ref().map(|load| LoadReport {
                rows: load.rows,
                elapsed_ms: u64::try_from(load.elapsed.as_millis()).unwrap_or(u64::MAX),
                lsn: load.lsn.to_string(),
                reason: &load.reason,
            }),
            last_verify: self.verify_report(),
            tables,
        };
        serde_json::to_string(&report).expect("the report has string keys, and a String takes any text")
    }
}

impl Status {
    fn verify_report(&self) -> Option<VerifyReport> {
        let report = |at, last: Option<&LastVerify>| VerifyReport {
            at,
            rows: last.map(|l| l.tally.rows),
            keys: last.map(|l| l.tally.keys()),
            missing: last.map(|l| l.tally.missing),
            stale: last.map(|l| l.tally.stale),
            orphaned: last.map(|l| l.tally.orphaned),
            repaired: last.map(|l| l.tally.repaired),
            elapsed_ms: last.map(|l| u64::try_from(l.elapsed.as_millis()).unwrap_or(u64::MAX)),
            lsn: last.map(|l| l.lsn.to_string()),
        };
        match (&self.last_verify, self.verified_at) {
            (Some(last), _) => Some(report(rfc3339(last.at), Some(last))),
            // Of an earlier life only the time is known.
            (None, Some(time)) => Some(report(rfc3339(time), None)),
            (None, None) => None,
        }
    }
}

impl TableStatus {
    fn starting(spec: &TableSpec) -> Self {
        Self {
            name: spec.name.as_str().into(),
            table: spec.table.to_string().into(),
            state: None,
            blocked: None,
            because: None,
            removed: false,
            prefetched: 0,
            upserts: 0,
            deletes: 0,
            truncates: 0,
            load_progress: None,
            rows: None,
            compared_at: None,
            verified_at: None,
            not_compared: None,
            checked_at: None,
            drift: 0,
            dead_letters: 0,
            more_dead_letters: false,
            keyless: 0,
        }
    }
}

/// In UTC, with milliseconds. Nothing for a time outside the years that can be written.
fn rfc3339(at: SystemTime) -> Option<String> {
    jiff::Timestamp::try_from(at).ok().map(|t| format!("{t:.3}"))
}

fn table_state(state: Option<TableState>) -> Option<&'static str> {
    Some(match state? {
        TableState::Loaded => "loaded",
        TableState::Loading => "loading",
        TableState::Healing => "healing",
        TableState::Incomplete => "incomplete",
    })
}

fn millis(d: Duration) -> f64 {
    (d.as_secs_f64() * 1e6).round() / 1e3
}

/// Everything the daemon knows of itself, in the order in which people read it.
#[derive(Serialize, ToSchema)]
#[schema(as = Status)]
pub(crate) struct Report<'a> {
    version: &'static str,
    /// `connecting`, `standby`, `loading`, `catching_up`, `streaming`, `healing`, `stalled`, `stopping`
    state: &'static str,
    verdict: VerdictReport<'a>,
    waiting_for: Option<&'a str>,
    paused: bool,
    /// As `/readyz` says it.
    ready: bool,
    not_ready_because: Vec<String>,
    /// The refetch or verify under way.
    operation: Option<&'static str>,
    uptime_seconds: f64,
    source: SourceReport<'a>,
    lsn: LsnReport,
    lag: LagReport,
    slot: SlotReport,
    tables: Vec<TableReport<'a>>,
    hits: u64,
    misses: u64,
    /// Null before the first read.
    hit_rate_pct: Option<f64>,
    prefetched: u64,
    sync_events_applied: u64,
    sync_lag_ms: SyncLagReport,
    /// Tables read from Postgres, one for each load or verify of a table. Never by a reader.
    primary_reads: u64,
    /// Rows that Postgres has and Redis cannot hold; of those without a key, all since the start.
    dead_letters: u64,
    /// At most 20 of them. A standby lists none.
    dead_letter_keys: &'a [DeadLetterSeen],
    last_load: Option<LoadReport<'a>>,
    last_verify: Option<VerifyReport>,
}

/// How it is, and what to do: the sentence that the page shows.
#[derive(Serialize, ToSchema)]
#[schema(as = Verdict)]
struct VerdictReport<'a> {
    /// `good`, `warning`, `bad`
    level: &'static str,
    text: &'a str,
    remedy: &'a str,
}

#[derive(Serialize, ToSchema)]
#[schema(as = Source)]
struct SourceReport<'a> {
    system_id: Option<&'a str>,
    timeline: Option<u32>,
    database: Option<&'a str>,
    slot: Option<&'a str>,
    publication: Option<&'a str>,
}

#[derive(Serialize, ToSchema)]
#[schema(as = Positions)]
struct LsnReport {
    received: Option<String>,
    applied: Option<String>,
    confirmed: Option<String>,
    server: Option<String>,
}

#[derive(Serialize, ToSchema)]
#[schema(as = Lag)]
struct LagReport {
    bytes: Option<u64>,
    seconds: Option<f64>,
}

/// WAL that Postgres keeps for the slot, and how much that may become before it gives the slot up.
#[derive(Serialize, ToSchema)]
#[schema(as = Slot)]
struct SlotReport {
    retained_bytes: Option<u64>,
    /// Null: without limit, or not known.
    limit_bytes: Option<u64>,
}

#[derive(Serialize, ToSchema)]
#[schema(as = Table)]
struct TableReport<'a> {
    name: &'a str,
    table: &'a str,
    loaded: bool,
    /// `loading`, `healing`, `incomplete`, `loaded`, `blocked`: the last one needs a person
    state: Option<&'static str>,
    /// Why it is blocked, or why it is loaded while it is.
    because: Option<&'a str>,
    /// What a person is to do where it is blocked.
    remedy: Option<&'a str>,
    /// Of a load that is under way.
    loading: Option<ProgressReport>,
    prefetched: u64,
    upserts: u64,
    deletes: u64,
    truncates: u64,
    hits: u64,
    misses: u64,
    /// As of the last load or verify in this life.
    rows: Option<u64>,
    compared_at: Option<String>,
    verified_at: Option<String>,
    /// Why the last comparison could not be made, until one succeeds. The table is served as before.
    not_compared: Option<&'a str>,
    /// When a verify last ended in this life, whatever it found.
    checked_at: Option<String>,
    /// Keys that it found to differ, and that nobody has repaired.
    drift: u64,
    /// Rows that Postgres has and Redis cannot hold.
    dead_letters: u64,
    /// There may be more of them than are known: every missing row is 503 `dead_letter`.
    more_dead_letters: bool,
}

#[derive(Serialize, ToSchema)]
#[schema(as = Progress)]
struct ProgressReport {
    rows: u64,
    estimated: u64,
}

#[derive(Serialize, ToSchema)]
#[schema(as = SyncLag)]
struct SyncLagReport {
    avg: Option<f64>,
    p50: Option<f64>,
    p99: Option<f64>,
    count: u64,
}

#[derive(Serialize, ToSchema)]
#[schema(as = LastLoad)]
struct LoadReport<'a> {
    rows: u64,
    elapsed_ms: u64,
    lsn: String,
    reason: &'a str,
}

#[derive(Serialize, ToSchema)]
#[schema(as = LastVerify)]
struct VerifyReport {
    at: Option<String>,
    rows: Option<u64>,
    keys: Option<u64>,
    missing: Option<u64>,
    stale: Option<u64>,
    orphaned: Option<u64>,
    repaired: Option<u64>,
    elapsed_ms: Option<u64>,
    lsn: Option<String>,
}

/// The last sync lags, for [`SyncLag`]. One change counts once, however many came in its transaction.
#[derive(Debug, Clone, Default)]
pub struct LagWindow {
    /// Microseconds, oldest first.
    lags: VecDeque<u64>,
    /// Since the start, beyond the window too.
    total: u64,
}

impl LagWindow {
    pub const CAPACITY: usize = 1024;

    /// `changes` changes arrived after `lag`.
    pub fn record(&mut self, lag: Duration, changes: usize) {
        let micros = u64::try_from(lag.as_micros()).unwrap_or(u64::MAX);
        self.total += changes as u64;
        let changes = changes.min(Self::CAPACITY);
        let excess = (self.lags.len() + changes).saturating_sub(Self::CAPACITY);
        self.lags.drain(..excess);
        self.lags.extend(std::iter::repeat_n(micros, changes));
    }

    /// Costs a copy of the window: for once a second, not for every batch.
    pub fn summary(&self) -> SyncLag {
        let mut lags: Vec<u64> = self.lags.iter().copied().collect();
        let count = lags.len();
        // Nearest rank: the smallest lag that at least `percent` of them do not exceed.
        let mut percentile = |percent: usize| {
            let rank = (count * percent).div_ceil(100).checked_sub(1)?;
            Some(*lags.select_nth_unstable(rank).1 as f64 / 1e3)
        };
        let (p50_ms, p99_ms) = (percentile(50), percentile(99));
        let sum: u128 = self.lags.iter().map(|&l| u128::from(l)).sum();
        SyncLag {
            avg_ms: (count > 0).then(|| (sum as f64 / count as f64).round() / 1e3),
            p50_ms,
            p99_ms,
            count: self.total,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schema::{KeyTemplate, NullRule, QualifiedName, TableId};

    const LIMIT: Duration = Duration::from_secs(30);

    fn lsn(s: &str) -> EndLsn {
        EndLsn(s.parse().expect("a literal LSN"))
    }

    fn seconds(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    /// A status that is ready at the moment returned with it, and all of whose times lie there.
    fn ready() -> (Status, Moment) {
        let spec = TableSpec {
            id: TableId(0),
            name: "categories".to_owned(),
            table: QualifiedName { schema: "public".to_owned(), table: "categories".to_owned() },
            key: KeyTemplate { literal: "cache:category:".to_owned(), columns: vec!["id".to_owned()] },
            columns: vec![],
            rename: vec![],
            null: NullRule::Empty,
            ttl_ms: 1000,
        };
        let mut status = Status::starting(&[spec]);
        let now = Moment::now();
        status.started = now.instant;
        status.state = State::Streaming;
        status.tables[0].state = Some(TableState::Loaded);
        status.last_contact = Some(now.instant);
        status.fresh_as_of = Some(now.instant);
        (status, now)
    }

    fn after(now: Moment, d: Duration) -> Moment {
        Moment { instant: now.instant + d, wall: now.wall + d }
    }

    #[test]
    fn ready_is_loaded_streaming_current_and_in_contact() {
        let (status, now) = ready();
        assert_eq!(status.readiness(now, LIMIT), [""; 0]);
        assert_eq!(status.readiness(after(now, LIMIT), LIMIT), [""; 0]);
        assert_eq!(
            status.readiness(after(now, seconds(31)), LIMIT),
            ["no contact with Postgres for 31 s, more than 30s", "Redis is 31 s behind Postgres, more than 30s"]
        );
    }

    #[test]
    fn everything_that_is_missing_is_named() {
        let (good, now) = ready();
        let reasons = |change: fn(&mut Status)| {
            let mut status = good.clone();
            change(&mut status);
            status.readiness(now, LIMIT)
        };
        assert_eq!(reasons(|s| s.tables[0].state = None), ["table categories is not known yet"]);
        assert_eq!(reasons(|s| s.tables[0].state = Some(TableState::Loading)), ["table categories is loading"]);
        assert_eq!(reasons(|s| s.tables[0].state = Some(TableState::Healing)), ["table categories is healing"]);
        assert_eq!(reasons(|s| s.tables[0].state = Some(TableState::Incomplete)), ["table categories is incomplete"]);
        assert_eq!(reasons(|s| s.last_contact = None), ["no contact with Postgres yet"]);
        assert_eq!(reasons(|s| s.fresh_as_of = None), ["what Postgres has committed is not applied yet"]);
        assert_eq!(reasons(|s| s.state = State::Stopping), ["the stream does not run: stopping"]);
        assert_eq!(
            reasons(|s| (s.state, s.waiting_for) = (State::Stalled, Some("OOM".to_owned()))),
            ["the stream does not run: stalled, waiting for OOM"]
        );
        for running in [State::Standby, State::Loading, State::CatchingUp, State::Healing] {
            let mut status = good.clone();
            status.state = running;
            assert_eq!(status.readiness(now, LIMIT), [""; 0], "{running:?}");
        }
    }

    #[test]
    fn lag_is_the_oldest_commit_or_the_silence_and_never_negative() {
        let (mut status, now) = ready();
        let lag = |status: &Status, now| status.lag_seconds(now);
        assert_eq!(lag(&status, now), Some(0.0));
        assert_eq!(lag(&status, after(now, seconds(2))), Some(0.0), "within the reply interval");
        assert_eq!(lag(&status, after(now, seconds(3))), Some(3.0));
        status.oldest_unapplied = Some(now.wall);
        assert_eq!(lag(&status, after(now, seconds(1))), Some(1.0));
        status.last_contact = Some(now.instant + seconds(5));
        assert_eq!(lag(&status, after(now, seconds(6))), Some(6.0));
        status.oldest_unapplied = Some(now.wall + seconds(3600));
        assert_eq!(lag(&status, after(now, seconds(6))), Some(0.0), "a clock that is ahead");
        (status.last_contact, status.oldest_unapplied) = (None, None);
        assert_eq!(lag(&status, now), None);
    }

    #[test]
    fn what_is_not_known_is_null() {
        let (mut status, now) = ready();
        (status.state, status.last_contact, status.tables[0].state) = (State::Connecting, None, None);
        let expected = format!(
            r#"{{"version":"{}","state":"connecting","verdict":{{"level":"warning","text":"Starting: connecting to Postgres and Redis.","remedy":"Wait. If it lasts, see that both servers run and can be reached."}},"waiting_for":null,"paused":false,"ready":false,"#,
            env!("CARGO_PKG_VERSION")
        ) + concat!(
            r#""not_ready_because":["the stream does not run: connecting","table categories is not known yet","#,
            r#""no contact with Postgres yet"],"operation":null,"uptime_seconds":0.0,"#,
            r#""source":{"system_id":null,"timeline":null,"database":null,"slot":null,"publication":null},"#,
            r#""lsn":{"received":null,"applied":null,"confirmed":null,"server":null},"#,
            r#""lag":{"bytes":null,"seconds":null},"slot":{"retained_bytes":null,"limit_bytes":null},"#,
            r#""tables":[{"name":"categories","table":"public.categories","loaded":false,"state":null,"#,
            r#""because":null,"remedy":null,"#,
            r#""loading":null,"prefetched":0,"upserts":0,"deletes":0,"truncates":0,"hits":0,"misses":0,"#,
            r#""rows":null,"compared_at":null,"verified_at":null,"not_compared":null,"#,
            r#""checked_at":null,"drift":0,"dead_letters":0,"more_dead_letters":false}],"#,
            r#""hits":0,"misses":0,"hit_rate_pct":null,"prefetched":0,"sync_events_applied":0,"#,
            r#""sync_lag_ms":{"avg":null,"p50":null,"p99":null,"count":0},"#,
            r#""primary_reads":0,"dead_letters":0,"dead_letter_keys":[],"last_load":null,"last_verify":null}"#
        );
        assert_eq!(status.to_json(&[], now, LIMIT), expected);
    }

    #[test]
    fn what_is_known_is_shown() {
        let (mut status, now) = ready();
        status.source = Some(Source {
            system_id: "7000".to_owned(),
            timeline: 2,
            database: "shop".to_owned(),
            slot: "s".to_owned(),
            publication: "p".to_owned(),
            wal_segment_bytes: 16 << 20,
        });
        (status.applied, status.server) = (Some(lsn("0/10")), Some(lsn("0/1A").0));
        let table = &mut status.tables[0];
        (table.prefetched, table.upserts, table.deletes, table.load_progress) = (5, 3, 1, Some((7, 9)));
        status.last_load = Some(LastLoad {
            rows: 5,
            elapsed: Duration::from_micros(12_700),
            lsn: lsn("0/1A"),
            reason: "first start".to_owned(),
        });
        let now = after(now, Duration::from_millis(12_345));
        (status.slot_retained_bytes, status.slot_limit_bytes) = (Some(100), Some(200));
        status.tables[0].rows = Some(4);
        let json = status.to_json(&[ReadCounts { hits: 3, misses: 1 }], now, LIMIT);
        let json: serde_json::Value = serde_json::from_str(&json).expect("JSON");
        for (pointer, value) in [
            ("/uptime_seconds", serde_json::json!(12.345)),
            ("/source/timeline", 2.into()),
            ("/lsn/applied", "0/10".into()),
            ("/lag/bytes", 10.into()),
            ("/slot", serde_json::json!({"retained_bytes": 100, "limit_bytes": 200})),
            ("/tables/0/rows", 4.into()),
            ("/tables/0/loaded", true.into()),
            ("/tables/0/state", "loaded".into()),
            ("/tables/0/loading", serde_json::json!({"rows": 7, "estimated": 9})),
            ("/tables/0/hits", 3.into()),
            ("/hit_rate_pct", serde_json::json!(75.0)),
            ("/prefetched", 5.into()),
            ("/sync_events_applied", 4.into()),
            ("/last_load", serde_json::json!({"rows": 5, "elapsed_ms": 12, "lsn": "0/1A", "reason": "first start"})),
        ] {
            assert_eq!(json.pointer(pointer), Some(&value), "{pointer}");
        }
    }

    #[test]
    fn the_window_shows_the_last_lags() {
        let mut window = LagWindow::default();
        assert_eq!(window.summary(), SyncLag::default());
        for ms in [3, 1, 2] {
            window.record(Duration::from_millis(ms), 1);
        }
        let lag = window.summary();
        assert_eq!((lag.avg_ms, lag.p50_ms, lag.p99_ms, lag.count), (Some(2.0), Some(2.0), Some(3.0), 3));
        window.record(Duration::from_millis(1), 97);
        let lag = window.summary();
        assert_eq!((lag.p50_ms, lag.p99_ms, lag.count), (Some(1.0), Some(2.0), 100));
    }

    #[test]
    fn the_window_forgets_what_is_older() {
        let mut window = LagWindow::default();
        window.record(seconds(60), LagWindow::CAPACITY);
        window.record(Duration::from_micros(1500), LagWindow::CAPACITY - 1);
        assert_eq!(window.summary().p50_ms, Some(1.5));
        assert_eq!(window.summary().p99_ms, Some(1.5));
        assert_eq!(window.summary().count, 2_047);
        window.record(Duration::from_micros(700), 1_000_000);
        assert_eq!(
            window.summary(),
            SyncLag { avg_ms: Some(0.7), p50_ms: Some(0.7), p99_ms: Some(0.7), count: 1_002_047 }
        );
    }
}
