//! Supervises: listens, works one session after the other, and says once what it waits for.

use super::apply;
use super::bootstrap::{self, application_name, own_prefix};
use super::capacity::Learned;
use super::load::KnownTables;
use super::room::size;
use super::{BridgeError, Disposition};
use crate::admin::{ASKED_HELD, Answer, Asked, Operation, Refusal};
use crate::config::{Config, Create, Secret};
use crate::demo;
use crate::error::Backoff;
use crate::http::{self, AdminToken};
use crate::lsn::Lsn;
use crate::metrics::{Metrics, Peer};
use crate::progress::resume::Adopt;
use crate::remedy::Sql;
use crate::resp::batch::{Limits, OwnKeys};
use crate::schema::{TableId, TableSpec};
use crate::sightings::Sightings;
use crate::sink::reader::Reader;
use crate::sink::writer::ServerInfo;
use crate::source::slot::ServerFacts;
use crate::source::snapshot::{Sample, SlotSample};
use crate::status::{ChangeEvent, LagWindow, Source, State, Status, SyncLag, TableStatus};
use crate::timing::Timing;
use crate::token::Made;
use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::net::TcpListener;
use tokio::sync::{Notify, broadcast, mpsc, watch};
use tokio_util::sync::CancellationToken;

/// Changes that a slow listener may fall behind by before it is told only how many it missed.
const EVENTS_HELD: usize = 4_096;
/// After the stop, the HTTP side has this long to finish its answers.
const HTTP_PATIENCE: Duration = Duration::from_secs(2);
/// A session that lasted this long shows that what was wrong before it is mended.
const SETTLED: Duration = Duration::from_secs(3);
/// A change that Postgres cannot send is tried again this often: somebody may have mended it.
const STUCK_RETRY: Duration = Duration::from_secs(30);

/// A daemon that runs: what others in the same process may look at.
#[derive(Clone)]
pub struct Daemon {
    pub listen: SocketAddr,
    pub status: watch::Receiver<Arc<Status>>,
    pub events: broadcast::Sender<ChangeEvent>,
    /// Notified: Postgres is asked for its position now.
    pub position_wanted: Arc<Notify>,
    pub admin_token: AdminToken,
}

/// What every session of one daemon shares.
pub struct Context {
    pub config: Config,
    pub timing: Timing,
    pub adopt: Adopt,
    pub specs: Arc<[TableSpec]>,
    pub application_name: String,
    pub own: OwnKeys,
    pub metrics: Arc<Metrics>,
    pub events: broadcast::Sender<ChangeEvent>,
    pub position_wanted: Arc<Notify>,
    pub reader: Reader,
    pub sightings: Arc<Sightings>,
    pub stop: CancellationToken,
    /// The highest epoch this process has written.
    pub epoch: AtomicU64,
    pub lags: Mutex<LagWindow>,
    pub known: KnownTables,
    status: watch::Sender<Arc<Status>>,
    walsender_pid: AtomicI32,
    pub said: Arc<Said>,
    /// The slot keeps more than half of what it may.
    slot_warned: AtomicBool,
    paused: AtomicBool,
    memory: Mutex<Memory>,
    /// Notified when [`Memory::skip`] is set.
    skip_wanted: Notify,
}

/// What was said, and is not said again while the process lives.
#[derive(Debug, Default)]
pub struct Said(Mutex<HashSet<String>>);

impl Said {
    fn for_the_first_time(&self, what: &str) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(what.to_owned())
    }

    /// A warning of rows of this table that are not cached. Once a table: there may be more of them every day.
    pub fn left_out(&self, table: &str, warning: &str) {
        if self.for_the_first_time(&format!("left out of {table}")) {
            tracing::warn!(table, "{warning}");
        }
    }
}

/// What one session found out and the checkpoint does not say, for the next.
#[derive(Debug, Clone, Default)]
pub struct Memory {
    /// Why Postgres is known to have gone back, until the checkpoint says so.
    pub went_back: Option<String>,
    /// The stream met an object that does not exist at its position: the publication, where that is younger.
    pub undefined_in_stream: bool,
    /// Where decoding failed last.
    pub undecodable: Option<Undecodable>,
    /// An operator wants to go past that.
    pub skip: bool,
    /// What Redis takes at once, as batches that failed have shown.
    pub capacity: Learned,
}

/// A change that Postgres could not send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Undecodable {
    /// The change's own position: its transaction commits somewhere behind it.
    pub at: Lsn,
    /// What was delivered before it, at most. Redis being there says nothing yet.
    pub before: Lsn,
    /// In a row.
    pub times: u32,
}

impl Memory {
    /// Failed at the same place again: it will not pass by itself.
    pub fn stuck_at(&self) -> Option<Lsn> {
        self.undecodable.filter(|u| u.times > 1).map(|u| u.at)
    }
}

impl Context {
    /// Changes the status that everybody sees.
    pub fn update(&self, change: impl FnOnce(&mut Status)) {
        self.status.send_modify(|status| change(Arc::make_mut(status)));
    }

    /// One line for every change of state, none for staying in it.
    pub fn set_state(&self, state: State, waiting_for: Option<String>) {
        let (before, waited_for) = {
            let status = self.status.borrow();
            (status.state, status.waiting_for.clone())
        };
        if before == state && waited_for == waiting_for {
            return;
        }
        match &waiting_for {
            Some(what) if state == State::Stalled => {
                tracing::warn!(state = state.as_str(), waiting_for = what, "stalled")
            }
            Some(what) => tracing::info!(state = state.as_str(), waiting_for = what, "waiting"),
            None if before != state => tracing::info!(state = state.as_str(), "state changed"),
            None => {}
        }
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Status(waiting_for.as_deref().unwrap_or(state.as_str()))]);
        self.update(|status| {
            status.state = state;
            status.waiting_for = waiting_for;
        });
    }

    pub fn is_paused(&self) -> bool {
        self.paused.load(Ordering::Relaxed)
    }

    pub fn set_paused(&self, paused: bool) {
        if self.paused.swap(paused, Ordering::Relaxed) != paused {
            tracing::info!("{}", if paused { "paused: changes wait in postgres" } else { "resumed" });
        }
        self.update(|status| status.paused = paused);
    }

    /// Has this process worked a session before?
    pub fn has_begun(&self) -> bool {
        self.epoch.load(Ordering::Relaxed) > 0
    }

    /// As its status shows it.
    pub fn table(&self, table: TableId) -> TableStatus {
        self.status.borrow().tables[table.index()].clone()
    }

    pub fn state(&self) -> State {
        self.status.borrow().state
    }

    /// How much WAL the slot keeps for us. A word of warning while there is time.
    pub fn slot_keeps(&self, sample: &Sample) {
        let Some(SlotSample { retained_bytes, .. }) = sample.slot else { return };
        self.update(|status| status.slot_retained_bytes = Some(retained_bytes));
        let Some(limit) = self.status.borrow().slot_limit_bytes else { return };
        let warns = retained_bytes > limit / 2;
        if self.slot_warned.swap(warns, Ordering::Relaxed) || !warns {
            return;
        }
        let (slot, kept, limit) = (&self.config.postgres.slot, size(retained_bytes), size(limit));
        tracing::warn!(
            retained_bytes,
            "slot {slot} keeps {kept} of WAL, more than half of max_slot_wal_keep_size = {limit}: beyond that postgres gives \
             the slot up, and every table is loaded again. Find out what prefetchd waits for, or raise the limit"
        );
    }

    /// Worth a word at the first time only.
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

    /// What batches are planned for on a new connection to this server.
    pub fn plan_for(&self, server: &ServerInfo) -> Limits {
        let (limits, said) = self.remember(|memory| memory.capacity.limits(server, Instant::now()));
        if let Some(text) = said {
            tracing::warn!("{text}");
        }
        limits
    }

    /// The next session makes a new slot, beyond the change that cannot be decoded, and loads.
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
                // Whoever waits now; an attempt that is under way is not cut short.
                self.skip_wanted.notify_waiters();
                Ok(Answer::Skipped)
            }
            Some(stuck) => Err(Refusal::Pointless(format!("the stream is stuck at {stuck}, not at {at}"))),
            None => Err(Refusal::Pointless("the stream is not stuck: there is nothing to skip".to_owned())),
        }
    }

    /// What is followed, and from where.
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
}

/// Runs the daemon until `stop`, then drains. `started` is called once, when HTTP listens. `demo` is asked what the page
/// of a demo asks for.
///
/// # Errors
/// What retrying cannot fix at the start: [`Disposition::Stop`]; or a port that cannot be had.
pub async fn run(
    config: Config,
    adopt: Adopt,
    stop: CancellationToken,
    demo: Option<mpsc::Sender<demo::DemoRequest>>,
    started: impl FnOnce(Daemon),
) -> Result<(), BridgeError> {
    let specs: Arc<[TableSpec]> = config.tables.clone().into();
    let address = config.http.listen;
    let listener = TcpListener::bind(address).await.map_err(|error| BridgeError::Listen { address, error })?;
    let listen = listener.local_addr().map_err(|error| BridgeError::Listen { address, error })?;
    let (status, status_seen) = watch::channel(Arc::new(Status::starting(&specs)));
    let own = OwnKeys::under(&own_prefix(&config.postgres.slot));
    let ctx = Context {
        timing: Timing::of_this_build(),
        adopt,
        application_name: application_name(&config.postgres.slot),
        metrics: Arc::new(Metrics::new(&specs)),
        events: broadcast::Sender::new(EVENTS_HELD),
        position_wanted: Arc::new(Notify::new()),
        reader: Reader::connect_lazy(&config.redis.target, &own),
        sightings: Arc::default(),
        stop: stop.clone(),
        epoch: AtomicU64::new(0),
        lags: Mutex::new(LagWindow::default()),
        known: KnownTables::default(),
        walsender_pid: AtomicI32::new(0),
        said: Arc::default(),
        slot_warned: AtomicBool::new(false),
        paused: AtomicBool::new(false),
        memory: Mutex::default(),
        skip_wanted: Notify::new(),
        status,
        own,
        specs,
        config,
    };
    // Its file is there until the end, and before anybody is told where to ask.
    let (admin_token, _file) = admin_token(ctx.config.http.admin_token.as_ref(), listen);
    tracing::info!(
        listen = %listen,
        postgres = ctx.config.postgres.target.describe(),
        redis = %ctx.config.redis.target,
        slot = ctx.config.postgres.slot,
        "listening on http://{listen}"
    );
    let (ask, mut asked) = mpsc::channel(ASKED_HELD);
    let http_stop = CancellationToken::new();
    let serving = tokio::spawn(http::serve(
        listener,
        http::HttpContext {
            status: status_seen.clone(),
            reader: ctx.reader.clone(),
            sightings: ctx.sightings.clone(),
            tables: ctx.specs.clone(),
            metrics: ctx.metrics.clone(),
            events: ctx.events.clone(),
            position_wanted: ctx.position_wanted.clone(),
            max_staleness: ctx.config.cache.max_staleness,
            ask,
            admin_token: admin_token.clone(),
            names: http::Names::new(listen.ip(), &ctx.config.http.hosts),
            page: http::Page { is_shown: ctx.config.http.page, demo },
        },
        http_stop.clone(),
    ));
    started(Daemon {
        listen,
        status: status_seen,
        events: ctx.events.clone(),
        position_wanted: ctx.position_wanted.clone(),
        admin_token,
    });
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);

    let ended = supervise(&ctx, &mut asked).await;
    ctx.set_state(State::Stopping, None);
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    http_stop.cancel();
    // Nobody answers those any more.
    drop(asked);
    let _ = tokio::time::timeout(HTTP_PATIENCE, serving).await;
    if ended.is_ok() {
        tracing::info!("stopped");
    }
    ended
}

/// Where none is configured one is made, and lies in its file until that is dropped.
fn admin_token(configured: Option<&Secret>, listen: SocketAddr) -> (AdminToken, Option<Made>) {
    if let Some(token) = configured {
        return (AdminToken::Configured(token.expose().into()), None);
    }
    match Made::make(listen) {
        Ok(made) => {
            tracing::info!("administration takes the token in {}", made.path().display());
            (AdminToken::Made(made.token().into()), Some(made))
        }
        Err(why) => {
            let text = format!(
                "administration is refused, since there is no token for it: http.admin_token_file is not set, and none \
                 could be made ({why}): set it, or RUNTIME_DIRECTORY to a directory of prefetchd's own"
            );
            tracing::warn!("{text}");
            (AdminToken::None(text.into()), None)
        }
    }
}

async fn supervise(ctx: &Context, asked: &mut mpsc::Receiver<Asked>) -> Result<(), BridgeError> {
    let mut backoff = Backoff::default();
    // Of its own: a server that was away for long is back, and has something to say.
    let mut reloads = Backoff::default();
    let mut ever_began = false;
    let mut said: HashSet<String> = HashSet::new();
    loop {
        let began = tokio::select! {
            () = ctx.stop.cancelled() => return Ok(()),
            began = alive(ctx, asked, bootstrap::begin(ctx)) => began,
        };
        let error = match began {
            Ok(session) => {
                ever_began = true;
                let worked_from = Instant::now();
                match apply::work(ctx, session, asked).await {
                    Ok(()) => return Ok(()),
                    Err(error @ BridgeError::NotDrained(_)) => return Err(error),
                    Err(error) if ctx.stop.is_cancelled() => return Err(BridgeError::NotDrained(error.to_string())),
                    Err(error) => {
                        // One that fails at once has not mended anything.
                        if worked_from.elapsed() > SETTLED {
                            backoff.reset();
                            reloads.reset();
                            said.clear();
                        }
                        // Once for a connection that was lost, however often it takes to make another.
                        if error.disposition() == Disposition::Retry {
                            ctx.metrics.reconnected(peer_of(&error));
                        }
                        error
                    }
                }
            }
            Err(error) => error,
        };
        // One that stood by has had a good start, too.
        ever_began |= ctx.state() == State::Standby;
        ctx.learn_from(&error);
        let mut delay = match error.disposition() {
            Disposition::Reload => reloads.next_delay(),
            Disposition::Retry | Disposition::Stop => backoff.next_delay(),
        };
        let mut text = error.to_string();
        // Once it is to be skipped, an attempt fails for a reason of its own.
        let memory = ctx.memory();
        let stuck_at = memory.stuck_at().filter(|_| !memory.skip);
        if let Some(at) = stuck_at {
            text = format!(
                "postgres cannot send the change at {at}, and nothing after it, until that can be sent or is skipped with \
                 prefetchd skip {at}, which loads every table again: {text}"
            );
        }
        ctx.update(|status| status.beside_stream = None);
        match error.disposition() {
            _ if stuck_at.is_some() => {
                delay = STUCK_RETRY;
                if said.insert(text.clone()) {
                    tracing::error!(error = text, "the stream is stuck");
                }
                ctx.set_state(State::Stalled, Some(text));
            }
            Disposition::Stop if !ever_began => return Err(error),
            Disposition::Stop => {
                delay = ctx.timing.setup_retry;
                if said.insert(text.clone()) {
                    tracing::error!(error = text, "cannot go on until this is mended");
                }
                ctx.set_state(State::Stalled, Some(text));
            }
            Disposition::Reload => {
                tracing::warn!(because = text, "what redis or postgres holds has changed, finding out what to do");
                ctx.set_state(State::Healing, Some(text));
                // What Redis has is not known until it was looked at: nobody is told to read here meanwhile, nor that a
                // row is not there.
                ctx.update(|status| {
                    status.fresh_as_of = None;
                    status.tables.iter_mut().for_each(|table| (table.state, table.blocked) = (None, None));
                });
            }
            Disposition::Retry => {
                let state = match (&error, peer_of(&error), ever_began) {
                    (BridgeError::NoRoom(_), _, _) | (_, Peer::Redis, true) => State::Stalled,
                    (_, Peer::Redis | Peer::Postgres, _) => State::Connecting,
                };
                ctx.set_state(state, Some(text));
            }
        }
        tokio::select! {
            () = ctx.stop.cancelled() => return Ok(()),
            () = alive(ctx, asked, until_wanted(ctx, delay)) => {}
        }
    }
}

impl Context {
    fn learn_from(&self, error: &BridgeError) {
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
}

fn peer_of(error: &BridgeError) -> Peer {
    match error {
        BridgeError::Sink(_) | BridgeError::NoRoom(_) | BridgeError::RedisSilent(_) => Peer::Redis,
        _ => Peer::Postgres,
    }
}

/// Waiting for a server is no reason for systemd to restart the daemon: feeds its watchdog meanwhile. Nor for an operator
/// to wait for an answer.
async fn alive<T>(ctx: &Context, asked: &mut mpsc::Receiver<Asked>, work: impl Future<Output = T>) -> T {
    let mut feed = tokio::time::interval(Duration::from_secs(1));
    tokio::pin!(work);
    loop {
        tokio::select! {
            done = &mut work => return done,
            _ = feed.tick() => feed_watchdog(),
            Some(Asked { operation, answer }) = asked.recv() => {
                // Whoever asked may have gone.
                let _ = answer.send(without_a_session(ctx, &operation));
            }
        }
    }
}

/// The pause before the next session; an operator may cut it short.
async fn until_wanted(ctx: &Context, delay: Duration) {
    tokio::select! {
        () = tokio::time::sleep(delay) => {}
        () = ctx.skip_wanted.notified() => {}
    }
}

fn without_a_session(ctx: &Context, operation: &Operation) -> Result<Answer, Refusal> {
    match operation {
        // Nothing is applied now, and the next session will go by it.
        Operation::Pause if ctx.state() != State::Standby => {
            ctx.set_paused(true);
            Ok(Answer::Paused)
        }
        Operation::Resume => {
            ctx.set_paused(false);
            Ok(Answer::Resumed)
        }
        Operation::Skip(at) => ctx.skip(*at),
        _ => {
            let status = ctx.status.borrow();
            let waiting = status.waiting_for.as_ref().map_or(String::new(), |what| format!(", waiting for {what}"));
            Err(Refusal::NotNow(format!("the stream does not run: {}{waiting}", status.state.as_str())))
        }
    }
}

/// Tells systemd that the daemon goes on, where it asked for that (`WatchdogSec=`).
pub fn feed_watchdog() {
    // Without systemd there is nobody to tell.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Watchdog]);
}

impl Context {
    /// Costs a copy of the lags of the last thousand commits.
    pub fn sync_lag(&self) -> SyncLag {
        self.lags.lock().unwrap_or_else(PoisonError::into_inner).summary()
    }

    pub fn record_lags(&self, lags: impl Iterator<Item = Duration>) {
        let mut window = self.lags.lock().unwrap_or_else(PoisonError::into_inner);
        for lag in lags {
            self.metrics.observe_sync_lag(lag);
            window.record(lag, 1);
        }
    }
}
