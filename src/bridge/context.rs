//! What all sessions of one daemon share: configuration, status, metrics, and what one session tells the next.
//!
//! It must not start or end a session, nor know who does.

use super::BridgeError;
use super::capacity::Learned;
use super::load::KnownTables;
use super::load_rate::LoadRate;
use super::room::size;
use crate::admin::{Answer, Refusal};
use crate::code::Code;
use crate::config::{Config, Create};
use crate::history::{History, Kind};
use crate::lsn::{EndLsn, Lsn};
use crate::metrics::Metrics;
use crate::progress::resume::Adopt;
use crate::remedy::Sql;
use crate::resp::batch::{Limits, OwnKeys};
use crate::schema::{TableId, TableSpec};
use crate::sightings::Sightings;
use crate::sink::any_reader::AnyReader;
use crate::sink::server::ServerInfo;
use crate::sink::survey::Prefixes;
use crate::source::slot::ServerFacts;
use crate::source::snapshot::{Sample, SlotSample};
use crate::status::{ChangeEvent, Keys, LagWindow, Level, Source, State, Status, SyncLag, TableStatus};
use crate::timing::Timing;
use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{Notify, broadcast, watch};
use tokio_util::sync::CancellationToken;

/// How many change events are kept for a slow listener before it is only told how many it missed.
const EVENTS_HELD: usize = 4_096;

/// What all sessions of one daemon share.
pub struct Context {
    pub config: Config,
    pub timing: Timing,
    pub adopt: Adopt,
    pub specs: Arc<[TableSpec]>,
    pub application_name: String,
    pub own: OwnKeys,
    pub metrics: Arc<Metrics>,
    pub history: Arc<History>,
    pub events: broadcast::Sender<ChangeEvent>,
    pub position_wanted: Arc<Notify>,
    pub reader: AnyReader,
    pub sightings: Arc<Sightings>,
    pub stop: CancellationToken,
    /// The highest epoch that this process has written.
    pub epoch: AtomicU64,
    pub lags: Mutex<LagWindow>,
    pub known: KnownTables,
    pub load_rate: LoadRate,
    /// The same for all that follow each other.
    status: Arc<watch::Sender<Arc<Status>>>,
    walsender_pid: AtomicI32,
    pub said: Arc<Said>,
    /// Whether it was reported that the slot retains more than half of what it may.
    slot_warned: AtomicBool,
    paused: Arc<AtomicBool>,
    /// Another context takes the place of this one.
    replaced: AtomicBool,
    /// Its first session goes on where that of the context before has ended.
    goes_on: AtomicBool,
    memory: Mutex<Memory>,
    /// Notified when [`Memory::skip`] is set.
    skip_wanted: Notify,
}

/// What has been logged, and is not logged again while the process runs.
#[derive(Debug, Default)]
pub struct Said(Mutex<HashSet<String>>);

impl Said {
    fn for_the_first_time(&self, what: &str) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(what.to_owned())
    }

    /// Warns of rows of this table that are not cached, once for each table.
    pub fn left_out(&self, table: &str, warning: &str) {
        if self.for_the_first_time(&format!("left out of {table}")) {
            tracing::warn!(code = Code::TableHeirs.as_str(), table, "{warning}");
        }
    }
}

/// What one session tells the next, and the checkpoint does not say.
#[derive(Debug, Clone, Default)]
pub struct Memory {
    /// Why Postgres is known to have been rewound, until the checkpoint takes account of it.
    pub went_back: Option<String>,
    /// Decoding failed because an object does not exist at the slot's position: the publication, if it is younger.
    pub undefined_in_stream: bool,
    /// Where decoding last failed.
    pub undecodable: Option<Undecodable>,
    /// An operator wants to skip that change.
    pub skip: bool,
    /// How large a batch Redis accepts, as learned from failures.
    pub capacity: Learned,
}

/// A change that Postgres could not send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Undecodable {
    /// The position of the change itself: its transaction commits somewhere after it.
    pub at: Lsn,
    /// Everything before this may have been delivered: that Redis has it says nothing about the change.
    pub before: Lsn,
    /// How often in a row.
    pub times: u32,
}

impl Memory {
    /// Set if decoding failed at the same position again: it will not succeed by itself.
    pub fn stuck_at(&self) -> Option<Lsn> {
        self.undecodable.filter(|u| u.times > 1).map(|u| u.at)
    }
}

impl Context {
    /// Also returns a receiver of its status.
    pub fn new(config: Config, adopt: Adopt, stop: CancellationToken) -> (Self, watch::Receiver<Arc<Status>>) {
        let specs: Arc<[TableSpec]> = config.tables.clone().into();
        let only = if config.lanes().is_none() { config.redis.target.home() } else { None };
        let keys = config.redis.target.nodes().map(|nodes| Keys { nodes: nodes.clone(), only });
        let (status, seen) =
            watch::channel(Arc::new(Status { keys, load_rate: config.cache.load_rate, ..Status::starting(&specs) }));
        let own = own_keys(&config);
        let ctx = Context {
            timing: Timing::of_this_build(),
            adopt,
            application_name: application_name(&config.postgres.slot),
            metrics: Arc::new(Metrics::new(&specs)),
            history: Arc::default(),
            events: broadcast::Sender::new(EVENTS_HELD),
            position_wanted: Arc::new(Notify::new()),
            reader: AnyReader::connect_lazy(&config.redis.target, &own, config.lanes()),
            sightings: Arc::default(),
            stop,
            epoch: AtomicU64::new(0),
            lags: Mutex::new(LagWindow::default()),
            known: KnownTables::default(),
            load_rate: LoadRate::new(config.cache.load_rate, Instant::now()),
            walsender_pid: AtomicI32::new(0),
            said: Arc::default(),
            slot_warned: AtomicBool::new(false),
            paused: Arc::default(),
            replaced: AtomicBool::new(false),
            goes_on: AtomicBool::new(false),
            memory: Mutex::default(),
            skip_wanted: Notify::new(),
            status: Arc::new(status),
            own,
            specs,
            config,
        };
        (ctx, seen)
    }

    /// What the next session begins with, whose configuration has the same servers: it knows what this one knows.
    pub fn next(&self, config: Config, stop: CancellationToken) -> Self {
        let specs: Arc<[TableSpec]> = config.tables.clone().into();
        Context {
            timing: self.timing,
            adopt: self.adopt,
            application_name: self.application_name.clone(),
            metrics: self.metrics.clone(),
            history: self.history.clone(),
            events: self.events.clone(),
            position_wanted: self.position_wanted.clone(),
            reader: self.reader.clone(),
            sightings: self.sightings.clone(),
            stop,
            epoch: AtomicU64::new(self.epoch.load(Ordering::Relaxed)),
            lags: Mutex::new(self.lags.lock().unwrap_or_else(PoisonError::into_inner).clone()),
            known: KnownTables::default(),
            walsender_pid: AtomicI32::new(self.walsender_pid.load(Ordering::Relaxed)),
            said: self.said.clone(),
            load_rate: LoadRate::new(config.cache.load_rate, Instant::now()),
            slot_warned: AtomicBool::new(self.slot_warned.load(Ordering::Relaxed)),
            paused: self.paused.clone(),
            replaced: AtomicBool::new(false),
            goes_on: AtomicBool::new(true),
            memory: Mutex::new(self.memory()),
            skip_wanted: Notify::new(),
            status: self.status.clone(),
            own: self.own.clone(),
            specs,
            config,
        }
    }

    /// Takes over from the context before this one, whose session has ended: what it has learned since [`Self::next`], and
    /// the status, whose tables are those of its session.
    pub fn follows(&self, before: &Context) {
        self.epoch.fetch_max(before.epoch.load(Ordering::Relaxed), Ordering::Relaxed);
        self.set_walsender(before.walsender_pid.load(Ordering::Relaxed));
        self.remember(|memory| *memory = before.memory());
        let is_gone = |spec: &&TableSpec| !self.specs.iter().any(|of| of.name == spec.name);
        before.specs.iter().filter(is_gone).for_each(|spec| self.metrics.forget(&spec.name));
        self.update(|status| {
            *status = status.for_tables(&before.specs, &self.specs);
            status.load_rate = self.config.cache.load_rate;
        });
    }

    /// Another receiver of its status.
    pub fn watch_status(&self) -> watch::Receiver<Arc<Status>> {
        self.status.subscribe()
    }

    /// Changes the published status.
    pub fn update(&self, change: impl FnOnce(&mut Status)) {
        self.status.send_modify(|status| change(Arc::make_mut(status)));
    }

    /// Logs a change of state, and nothing if it stays the same. `code`: of the problem that it waits for the end of.
    pub fn set_state(&self, state: State, code: Option<Code>, waiting_for: Option<String>) {
        let (before, waited_for) = {
            let status = self.status.borrow();
            (status.state, status.waiting_for.clone())
        };
        if before == state && waited_for == waiting_for {
            return;
        }
        match &waiting_for {
            Some(what) if state == State::Stalled => {
                tracing::warn!(code = code.map(Code::as_str), state = state.as_str(), waiting_for = what, "stalled")
            }
            Some(what) => tracing::info!(state = state.as_str(), waiting_for = what, "waiting"),
            None if before != state => tracing::info!(state = state.as_str(), "state changed"),
            None => {}
        }
        self.tells_of(state, before, waiting_for.as_deref());
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Status(waiting_for.as_deref().unwrap_or(state.as_str()))]);
        self.update(|status| {
            (status.state, status.waiting_for, status.waiting_code) = (state, waiting_for, code);
        });
    }

    /// Records what a change of state means to people.
    fn tells_of(&self, state: State, before: State, waiting_for: Option<&str>) {
        let now = Instant::now();
        match (state, waiting_for) {
            (State::Stalled, Some(what)) => self.history.interrupted(Level::Bad, &format!("stalled: {what}"), now),
            (State::Connecting, Some(what)) => {
                self.history.interrupted(Level::Bad, &format!("not connected: {what}"), now);
            }
            // While it finds out what was lost, no session runs.
            (State::Stalled | State::Connecting | State::Stopping, _) | (State::Healing, Some(_)) => {}
            (State::Standby, holder) if before != State::Standby => {
                self.history.goes_on(now);
                let holder = holder.map_or(String::new(), |holder| format!(": {holder}"));
                self.history.happened(Level::Good, Kind::Role, None, format!("stands by{holder}"));
            }
            _ => self.history.goes_on(now),
        }
        if before == State::Standby && !matches!(state, State::Standby | State::Stopping) {
            self.history.happened(Level::Good, Kind::Role, None, "no longer stands by");
        }
    }

    /// Whether the daemon stops, as opposed to going on with another context.
    pub fn is_stopping(&self) -> bool {
        self.stop.is_cancelled() && !self.replaced.load(Ordering::Relaxed)
    }

    /// Ends the session, so that the next one begins with another context.
    pub fn is_replaced(&self) {
        self.replaced.store(true, Ordering::Relaxed);
        self.stop.cancel();
    }

    pub fn is_paused(&self) -> bool {
        self.paused.load(Ordering::Relaxed)
    }

    pub fn set_paused(&self, paused: bool) {
        if self.paused.swap(paused, Ordering::Relaxed) != paused {
            let text = if paused { "paused: changes wait in postgres" } else { "resumed" };
            tracing::info!("{text}");
            self.history.happened(if paused { Level::Warning } else { Level::Good }, Kind::Operator, None, text);
        }
        self.update(|status| status.paused = paused);
    }

    /// Whether this process has had a session before.
    pub fn has_begun(&self) -> bool {
        self.epoch.load(Ordering::Relaxed) > 0
    }

    /// The table's status.
    pub fn table(&self, table: TableId) -> TableStatus {
        self.status.borrow().tables[table.index()].clone()
    }

    /// Whether this session goes on where that of the context before has ended. Asked once.
    pub fn goes_on(&self) -> bool {
        self.goes_on.swap(false, Ordering::Relaxed)
    }

    /// The position that Redis is known to have.
    pub fn has_applied(&self) -> Option<EndLsn> {
        self.status.borrow().applied
    }

    pub fn state(&self) -> State {
        self.status.borrow().state
    }

    pub fn waiting_for(&self) -> Option<String> {
        self.status.borrow().waiting_for.clone()
    }

    /// Publishes how much WAL the slot retains, and warns while there is time.
    pub fn slot_keeps(&self, sample: &Sample) {
        let Some(SlotSample { retained_bytes, .. }) = sample.slot else { return };
        self.update(|status| status.slot_retained_bytes = Some(retained_bytes));
        let Some(limit) = self.status.borrow().slot_limit_bytes else { return };
        let warns = retained_bytes > limit / 2;
        if self.slot_warned.swap(warns, Ordering::Relaxed) || !warns {
            return;
        }
        let (slot, kept, limit) = (&self.config.postgres.slot, size(retained_bytes), size(limit));
        let text = format!(
            "slot {slot} keeps {kept} of WAL, more than half of max_slot_wal_keep_size = {limit}: beyond that postgres gives \
             the slot up, and every table is loaded again. Find out what prefetchd waits for, or raise the limit"
        );
        tracing::warn!(code = Code::SlotNearLimit.as_str(), retained_bytes, "{text}");
        self.history.happened(Level::Bad, Kind::Slot, None, text);
    }

    /// Logs this the first time only.
    pub fn say_once(&self, what: &str) {
        if self.said.for_the_first_time(what) {
            tracing::info!("{what}");
        }
    }

    pub fn memory(&self) -> Memory {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub fn remember<T>(&self, change: impl FnOnce(&mut Memory) -> T) -> T {
        change(&mut self.memory.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The limits of batches on a new connection to this server.
    pub fn plan_for(&self, server: &ServerInfo) -> Limits {
        let (limits, said) = self.remember(|memory| memory.capacity.limits(server, Instant::now()));
        if let Some(text) = said {
            tracing::warn!(code = Code::RedisLimits.as_str(), "{text}");
        }
        limits
    }

    /// Lets the next session create a new slot, beyond the change that cannot be decoded, and load every table.
    pub fn skip(&self, at: Lsn) -> Result<Answer, Refusal> {
        match self.memory().stuck_at() {
            Some(stuck) if stuck == at && self.config.postgres.create == Create::Never => {
                let slot = &self.config.postgres.slot;
                Err(Refusal::NotNow(format!(
                    "going past {at} takes a new slot, and postgres.create is false: {}",
                    Sql::RecreateSlot { slot }
                )))
            }
            Some(stuck) if stuck == at => {
                self.remember(|memory| memory.skip = true);
                // Ends the wait before the next attempt, but not an attempt in progress.
                self.skip_wanted.notify_waiters();
                Ok(Answer::Skipped)
            }
            Some(stuck) => Err(Refusal::Pointless(format!("the stream is stuck at {stuck}, not at {at}"))),
            None => Err(Refusal::Pointless("the stream is not stuck: there is nothing to skip".to_owned())),
        }
    }

    /// What is followed, as the status shows it.
    pub fn source(&self, system_id: String, timeline: u32, database: String, facts: &ServerFacts) -> Source {
        let settings = &self.config.postgres;
        let (slot, publication) = (settings.slot.clone(), settings.publication.clone());
        Source { system_id, timeline, database, slot, publication, wal_segment_bytes: facts.wal_segment_bytes }
    }

    pub fn set_walsender(&self, pid: i32) {
        self.walsender_pid.store(pid, Ordering::Relaxed);
    }

    pub fn was_our_walsender(&self, pid: i32) -> bool {
        self.walsender_pid.load(Ordering::Relaxed) == pid
    }

    /// Returns when an operator wants to skip a change.
    pub async fn skip_wanted(&self) {
        self.skip_wanted.notified().await;
    }

    /// Remembers what a failure tells about the stream.
    pub fn learn_from(&self, error: &BridgeError) {
        let BridgeError::Source(error) = error else { return };
        self.remember(|memory| {
            memory.undefined_in_stream |= error.is_undefined_in_stream();
            if let Some(at) = error.undecodable() {
                let last = memory.undecodable.filter(|last| last.at == at);
                let before = last.map_or(at, |last| last.before).max(error.received().map_or(at, |end| end.0));
                memory.undecodable = Some(Undecodable { at, before, times: last.map_or(1, |last| last.times + 1) });
            }
        });
    }

    /// Copies the lags of the last thousand commits.
    pub fn sync_lag(&self) -> SyncLag {
        self.lags.lock().unwrap_or_else(PoisonError::into_inner).summary()
    }

    /// These changes were applied, each after this lag.
    pub fn applied(&self, changes: u64, lags: impl Iterator<Item = Duration>) {
        let mut window = self.lags.lock().unwrap_or_else(PoisonError::into_inner);
        let lags = lags.inspect(|lag| {
            self.metrics.observe_sync_lag(*lag);
            window.record(*lag, 1);
        });
        self.history.applied(changes, lags);
    }
}

/// Tells systemd that the daemon is alive, if it asked for that (`WatchdogSec=`).
pub fn feed_watchdog() {
    // Fails without systemd.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Watchdog]);
}

/// `application_name` of the daemon's connections to Postgres.
pub fn application_name(slot: &str) -> String {
    format!("prefetchd_{slot}")
}

/// prefetchd's own keys in Redis.
pub fn own_keys(config: &Config) -> OwnKeys {
    OwnKeys::under(&own_prefix(&config.postgres.slot)).announcing(config.changes.clone())
}

/// What the keys begin with that rows and lists have.
pub fn prefixes(config: &Config) -> Prefixes {
    Prefixes { rows: config.key_prefixes(), documents: config.document_prefixes(), lists: config.lookup_prefixes() }
}

/// The prefix of prefetchd's own keys in Redis.
pub fn own_prefix(slot: &str) -> String {
    format!("prefetchd:{{{slot}}}:")
}
