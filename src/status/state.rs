//! What the daemon knows about itself, and what follows from it: whether it is ready, how far it lags, how stale Redis
//! is.

use super::lag::SyncLag;
use super::nodes::Keys;
use crate::admin::Tally;
use crate::checkpoint::{Blocked, TableState};
use crate::code::Code;
use crate::command::Op;
use crate::lsn::{EndLsn, Lsn};
use crate::schema::TableSpec;
use serde::Serialize;
use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};
use utoipa::ToSchema;

/// What the daemon is doing: exactly one state at a time.
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

/// One instant on both clocks: lags within this process use the first, commit times of Postgres the second.
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
    /// Why it does not proceed: a server that is down, a pid that blocks slot creation, a command that Redis refuses.
    pub waiting_for: Option<String>,
    /// Of what it waits for the end of, if that is a problem.
    pub waiting_code: Option<Code>,
    /// What fails while the stream runs. If nothing stops the stream itself, `waiting_for` says it too.
    pub beside_stream: Option<String>,
    pub paused: bool,
    pub started: Instant,
    /// Known after the first contact with Postgres.
    pub source: Option<Source>,
    pub received: Option<EndLsn>,
    pub applied: Option<EndLsn>,
    pub confirmed: Option<EndLsn>,
    /// The server's flushed position in the last sample.
    pub server: Option<Lsn>,
    /// When Postgres last sent anything at all.
    pub last_contact: Option<Instant>,
    /// When the newest sample whose position is applied was taken: Redis was current at that time.
    pub fresh_as_of: Option<Instant>,
    /// Commit time of the oldest transaction that is received but not applied.
    pub oldest_unapplied: Option<SystemTime>,
    /// The checkpoint as this daemon last wrote it or, as a standby, read it. Reads compare theirs with it.
    pub epoch: u64,
    pub seq: u64,
    /// How many hash slots have lost something that is being loaded again.
    pub healing_slots: u16,
    /// In configuration order.
    pub tables: Vec<TableStatus>,
    pub sync_lag: SyncLag,
    /// Some of the dead letters, at most [`DEAD_LETTERS_SHOWN`]. A standby does not know them.
    pub dead_letter_keys: Vec<DeadLetterSeen>,
    pub primary_reads: u64,
    pub last_load: Option<LastLoad>,
    /// In this run.
    pub last_verify: Option<LastVerify>,
    /// When the verification of all tables last succeeded, including earlier runs.
    pub verified_at: Option<SystemTime>,
    /// The refetch or verification in progress.
    pub operation: Option<&'static str>,
    pub slot_retained_bytes: Option<u64>,
    pub slot_limit_bytes: Option<u64>,
    /// Set if Redis is a cluster.
    pub keys: Option<Keys>,
    /// Bytes a second that loads, verifications and refetches may read, if that is limited.
    pub load_rate: Option<NonZeroU64>,
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
    /// `None` until the checkpoint has been read.
    pub state: Option<TableState>,
    /// Set if it cannot be followed until an operator has changed something.
    pub blocked: Option<Blocked>,
    /// Why it is being loaded, during a load.
    pub because: Option<String>,
    /// Keys were removed and have not been loaded again yet.
    pub removed: bool,
    /// Rows written by loads.
    pub prefetched: u64,
    pub upserts: u64,
    pub deletes: u64,
    pub truncates: u64,
    /// Rows read so far by the load in progress, and their estimated number.
    pub load_progress: Option<(u64, u64)>,
    pub load_began: Option<Instant>,
    /// Rows as of the last load or comparison in this run.
    pub rows: Option<u64>,
    /// When the last load or comparison that left it correct began, including earlier runs.
    pub compared_at: Option<SystemTime>,
    /// When the last verification that left it correct began, including earlier runs.
    pub verified_at: Option<SystemTime>,
    /// Why its last comparison could not be made, until one succeeds.
    pub not_compared: Option<String>,
    /// When a verification last ended in this run, with whatever result.
    pub checked_at: Option<SystemTime>,
    /// What was found to differ and has not been repaired, as far as this run knows.
    pub drift: Tally,
    /// Rows that Postgres has but Redis cannot hold.
    pub dead_letters: u64,
    /// There may be more dead letters than are known.
    pub more_dead_letters: bool,
    /// Dead letters without a key, in this run: such a row cannot be read, and its removal cannot be noticed.
    pub keyless: u64,
}

impl TableStatus {
    /// Returns `None` if the state is unknown.
    pub(super) fn state_name(&self) -> Option<&'static str> {
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

/// One applied change, for `tail` and the event stream, without its values.
#[derive(Debug, Clone, PartialEq)]
pub struct ChangeEvent {
    pub at: SystemTime,
    pub table: Arc<str>,
    pub op: Op,
    /// Redis key, converted to text lossily. Empty for a TRUNCATE.
    pub key: String,
    /// From the commit in Postgres to the acknowledgement by Redis.
    pub lag: Duration,
}

/// How long Postgres may be silent before the silence counts as lag: it is asked once a second.
const REPLY_INTERVAL: Duration = Duration::from_secs(2);

impl Status {
    /// Whether this process has neither taken over nor stood by yet.
    pub fn has_only_started(&self) -> bool {
        self.epoch == 0 && self.state == State::Connecting
    }

    /// Whether it has only started, and cannot take over because of Redis.
    pub fn awaits_redis(&self) -> bool {
        // As `BridgeError` says it.
        self.has_only_started() && self.waiting_for.as_deref().is_some_and(|what| what.starts_with("redis: "))
    }

    /// The status before anything is known.
    pub fn starting(tables: &[TableSpec]) -> Self {
        Self {
            state: State::Connecting,
            waiting_for: None,
            waiting_code: None,
            beside_stream: None,
            healing_slots: 0,
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
            keys: None,
            load_rate: None,
        }
    }

    /// The status of a daemon that goes on with other tables. What is the same is as it was.
    pub fn for_tables(&self, old: &[TableSpec], new: &[TableSpec]) -> Self {
        let table = |spec: &TableSpec| {
            let known = old.iter().position(|before| before.is_like(spec)).and_then(|place| self.tables.get(place));
            let state = self.tables.iter().any(|table| table.state.is_some()).then_some(TableState::Loading);
            known.cloned().unwrap_or_else(|| TableStatus { state, ..TableStatus::starting(spec) })
        };
        Status { tables: new.iter().map(table).collect(), ..self.clone() }
    }

    /// Returns the age of the oldest commit that is received but not applied, or the time since the last contact once
    /// that exceeds the reply interval; while paused, the time since everything was applied. `None` before the first
    /// contact. Returns 0 if the clock of Postgres is ahead of ours.
    pub fn lag_seconds(&self, now: Moment) -> Option<f64> {
        let unapplied = self.oldest_unapplied.map(|at| now.wall.duration_since(at).unwrap_or_default());
        // While paused, new changes are not received either.
        let known = if self.paused { self.fresh_as_of.min(self.last_contact) } else { self.last_contact };
        let silent = known.map(|at| match now.instant.saturating_duration_since(at) {
            silent if silent > REPLY_INTERVAL => silent,
            _ => Duration::ZERO,
        });
        unapplied.max(silent).map(|lag| lag.as_secs_f64())
    }

    /// Dead letters of all tables; those without a key since the start.
    pub(super) fn dead_letters(&self) -> u64 {
        self.tables.iter().map(|t| t.dead_letters + t.keyless).sum()
    }

    /// WAL between the server's position and the applied one.
    pub fn lag_bytes(&self) -> Option<u64> {
        Some(self.server?.bytes_since(self.applied?.0))
    }

    /// Whether a miss can be told from a row that has not arrived yet: the newest applied sample is recent enough.
    pub fn is_fresh(&self, now: Moment, max_staleness: Duration) -> bool {
        self.fresh_as_of.is_some_and(|at| now.instant.saturating_duration_since(at) <= max_staleness)
    }

    /// Returns the reasons not to send readers here; empty when ready.
    ///
    /// Lag is judged by [`Status::fresh_as_of`], on one clock, and not by commit times: if the clock of Postgres were a
    /// minute slow, every change would look late.
    pub fn readiness(&self, now: Moment, max_staleness: Duration) -> Vec<String> {
        let mut reasons = Vec::new();
        match self.state {
            // Loads and healing run beside the stream; the tables below say what can be promised meanwhile. A standby
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
                (None, Some(TableState::Healing)) if self.paused => {
                    reasons.push(format!("table {} was lost, and is loaded again once you resume: paused", table.name));
                }
                (None, state) => {
                    let state = table_state(state).unwrap_or("not known yet");
                    reasons.push(format!("table {} is {state}", table.name));
                }
            }
        }
        reasons.extend(self.staleness(now, max_staleness));
        reasons
    }

    /// In which respects the contents of Redis are older than allowed, or not known to be current.
    pub(super) fn staleness(&self, now: Moment, max_staleness: Duration) -> Vec<String> {
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
            load_began: None,
            rows: None,
            compared_at: None,
            verified_at: None,
            not_compared: None,
            checked_at: None,
            drift: Tally::default(),
            dead_letters: 0,
            more_dead_letters: false,
            keyless: 0,
        }
    }
}

fn table_state(state: Option<TableState>) -> Option<&'static str> {
    Some(match state? {
        TableState::Loaded => "loaded",
        TableState::Loading => "loading",
        TableState::Healing => "healing",
        TableState::Incomplete => "incomplete",
    })
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::format::Format;
    use crate::schema::{KeyTemplate, NullRule, QualifiedName, TableId};

    pub const LIMIT: Duration = Duration::from_secs(30);

    fn seconds(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    /// Returns a status and a moment at which it is ready; all its times are that moment.
    pub fn ready() -> (Status, Moment) {
        let spec = TableSpec {
            id: TableId(0),
            name: "categories".to_owned(),
            table: QualifiedName { schema: "public".to_owned(), table: "categories".to_owned() },
            key: KeyTemplate { literal: "cache:category:".to_owned(), columns: vec!["id".to_owned()] },
            columns: vec![],
            rename: vec![],
            null: NullRule::Empty,
            ttl_ms: 1000,
            format: Format::Hash,
            lookups: Vec::new(),
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

    pub fn after(now: Moment, d: Duration) -> Moment {
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
}
