//! Works one session: selects what comes next, tells the machine, and does what it says.
//!
//! All decisions are the machine's. This loop owns the clock, the channels and the writer, of which at most one
//! operation is under way.

use super::bootstrap::Session;
use super::connections::Connections;
use super::context::{Context, feed_watchdog};
use super::durable::{self, Durable};
use super::load::{self, Means};
use super::{BridgeError, catalog, evictions, renew};
use crate::admin::{Answer, Asked, Operation, Refusal, Tally};
use crate::checkpoint::TableState;
use crate::command::Op;
use crate::config::Create;
use crate::error::Disposition;
use crate::lsn::EndLsn;
use crate::metrics::Drift;
use crate::progress::visibility::Snapshot;
use crate::reason::Heal;
use crate::resp::batch::Batch;
use crate::schema::TableId;
use crate::session::chunk::{Floors, LoadOrder, Purpose};
use crate::session::inspect::{Differences, Probe};
use crate::session::operation::{AskId, Heavy};
use crate::session::{Applied, Effect, HEARTBEAT, Input, Machine, Observed};
use crate::sink::SinkError;
use crate::sink::writer::{Moved, Writer};
use crate::source::connect::PostgresClient;
use crate::source::limits::{self, Opens};
use crate::source::snapshot::{self, Sample};
use crate::source::stream::{Contact, Feedback, Stream};
use crate::status::{ChangeEvent, DEAD_LETTERS_SHOWN, DeadLetterSeen, LastLoad, LastVerify, State};
use std::collections::{BTreeMap, HashMap};
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::task::JoinSet;

/// The machine's clock: beats are due once a second, and stalls are noticed.
const TICK: Duration = Duration::from_millis(200);
const SAMPLE_INTERVAL: Duration = Duration::from_secs(1);
/// Postgres answers a trivial query within this, or the connection counts as lost.
const SAMPLE_PATIENCE: Duration = Duration::from_secs(10);
/// Without a sample, and without a word from the stream for so long, Postgres counts as away. An idle stream asks for a
/// word after ten seconds.
const AWAY_AFTER: Duration = Duration::from_secs(12);
/// Redis counts as stalled after this long without a byte taken or sent.
const STALLED_AFTER: Duration = Duration::from_secs(2);
/// A large batch may take longer: a second more for each of these.
const BYTES_A_SECOND: usize = 8 << 20;
/// Chunks between the loader and the machine.
const CHUNKS_IN_CHANNEL: usize = 2;
/// The summary of the lags costs a copy of them.
const LAGS_SHOWN_EVERY: Duration = Duration::from_millis(5);
/// Streaming, as opposed to catching up: what is in Redis was right this long ago.
const CAUGHT_UP: Duration = Duration::from_secs(5);

/// One operation of the writer; it brings the writer back.
type Flight = Pin<Box<dyn Future<Output = (Writer, Landed)> + Send>>;

enum Landed {
    Executed(Result<u64, SinkError>),
    Probed(Result<Vec<Probe>, SinkError>),
    Scanned(Result<(Vec<crate::command::Key>, u64), SinkError>),
    Compared(Result<Differences, SinkError>),
}

/// Works until the stop (`Ok`) or until something ends the session.
pub async fn work(ctx: &Context, session: Session, asked: &mut mpsc::Receiver<Asked>) -> Result<(), BridgeError> {
    let Session { start, writer, syncer, mut stream, client, retired, walsender_pid } = session;
    ctx.set_walsender(walsender_pid);
    let (limits, moved) = (start.limits, writer.moved());
    let floors = Floors::default();
    let (orders, orders_taken) = mpsc::unbounded_channel();
    let (chunks_out, mut from_load) = mpsc::channel(CHUNKS_IN_CHANNEL);
    let (pages_out, mut pages) = mpsc::channel(1);
    let (samples_out, mut samples) = mpsc::channel(1);
    let mut tasks: JoinSet<Result<(), BridgeError>> = JoinSet::new();
    let connections = Connections::new(client.endpoint(), ctx.application_name.clone());
    let means = Means {
        connections: connections.clone(),
        publication: ctx.config.postgres.publication.clone(),
        specs: ctx.specs.clone(),
        known: ctx.known.clone(),
        reader: ctx.reader.clone(),
        floors: floors.clone(),
    };
    tasks.spawn(load::run(means, limits, retired, orders_taken, chunks_out));
    for spec in ctx.specs.iter() {
        tasks.spawn(renew::run(spec.clone(), ctx.reader.clone(), pages_out.clone()));
    }
    let (looks_out, mut looks) = mpsc::channel(1);
    let settings = &ctx.config.postgres;
    let name = &settings.publication;
    let publishing = match start.checkpoint.made(name) && settings.create == Create::WhereMissing {
        true => {
            catalog::Publishing::Ours(name.clone(), settings.reader.as_ref().map(|_| Box::new(settings.target.clone())))
        }
        false => catalog::Publishing::Theirs(name.clone()),
    };
    tasks.spawn(catalog::run(
        ctx.timing.catalog,
        connections.clone(),
        publishing,
        ctx.specs.clone(),
        ctx.known.clone(),
        ctx.said.clone(),
        looks_out,
    ));
    let (evictions_out, mut evictions) = mpsc::channel(1);
    tasks.spawn(evictions::run(ctx.reader.clone(), evictions_out));
    let sample_now = Arc::new(Notify::new());
    let sampler = Sampler {
        connections: connections.clone(),
        slot: ctx.config.postgres.slot.clone(),
        application_name: ctx.application_name.clone(),
        opens: if ctx.config.postgres.reader.is_some() { Opens::Reading } else { Opens::Everything },
        contact: stream.contact.clone(),
        now: sample_now.clone(),
        out: samples_out,
    };
    tasks.spawn(sampler.run(client));

    let (acknowledged, acknowledged_seen) = watch::channel(start.checkpoint.lsn);
    let (durables_out, mut durables) = mpsc::channel(1);
    if let Some(syncer) = syncer {
        tasks.spawn(durable::run(syncer, start.checkpoint.epoch, acknowledged_seen, durables_out));
    }

    let (machine, effects) = Machine::start(start);
    let mut work = Work {
        ctx,
        machine,
        floors,
        connections,
        orders,
        writer: Some(writer),
        flight: None,
        flight_began: Instant::now(),
        moved_at: (moved.bytes(), Instant::now()),
        moved,
        flight_patience: ctx.timing.let_go,
        flight_changes: 0,
        flight_weight: 0,
        lags_shown: Instant::now(),
        stream_feedback: Feedback::default(),
        sampled_at: None,
        acknowledged,
        not_durable: None,
        load_began: None,
        asking: HashMap::new(),
        asks: 0,
        renewing: HashMap::new(),
    };
    work.perform(effects)?;
    work.publish(&stream);
    let mut tick = tokio::time::interval(TICK);
    let mut drain_until: Option<Instant> = None;
    loop {
        let draining = drain_until.is_some();
        tokio::select! {
            biased;
            landed = landing(&mut work.flight) => {
                work.landed(landed)?;
                work.publish_positions(&stream);
            }
            () = ctx.stop.cancelled(), if !draining => {
                ctx.set_state(State::Stopping, None);
                work.machine.drain();
                drain_until = Some(Instant::now() + ctx.timing.drain);
                work.step(Input::Tick)?;
            }
            Some(ended) = tasks.join_next(), if !draining => {
                ended.map_err(|_| BridgeError::Internal("a task of the session ended in mid-air"))??;
                return Err(BridgeError::SessionOver);
            }
            Some(sample) = samples.recv() => work.sampled(&sample)?,
            Some((table, seen)) = looks.recv(), if !draining => work.step(Input::Catalog(table, seen))?,
            Some(evicted) = evictions.recv(), if !draining => work.step(Input::Evicted(evicted))?,
            Some(answer) = durables.recv() => work.durable(answer)?,
            _ = tick.tick() => {
                work.check_patience()?;
                work.try_larger_batches();
                work.step(Input::Tick)?;
                work.publish(&stream);
                feed_watchdog();
            }
            Some(asked) = asked.recv() => work.asked(asked)?,
            () = ctx.position_wanted.notified() => work.step(Input::PositionWanted)?,
            Some((page, written)) = pages.recv(), if work.machine.takes_renewals() && (work.is_healthy() || ctx.is_paused()) => {
                work.renewing.insert(page.table, written);
                work.step(Input::Renew(page))?;
            }
            Some(message) = from_load.recv(), if work.machine.takes_chunks() => work.step(Input::Load(message))?,
            delivered = stream.deliveries.recv(), if work.machine.takes_deliveries() => match delivered {
                Some(delivered) => {
                    let (items, bytes) = (delivered.items, delivered.bytes);
                    work.step(Input::Delivered { items, bytes })?;
                }
                None => return Err(stream.ended().await.into()),
            },
        }
        work.feed_back(&stream);
        if let Some(until) = drain_until {
            let in_time = Instant::now() < until;
            // Afterwards a beat may be on its way again, which brings nothing.
            let drained = work.machine.is_drained();
            if drained || !in_time {
                sample_now.notify_one();
                let _ = tokio::time::timeout(SAMPLE_INTERVAL, work.last_sample(&mut samples)).await;
                stream.finish(work.machine.confirmed()).await;
                if !drained {
                    let why = format!("redis did not take it within {} s", ctx.timing.drain.as_secs_f64());
                    return Err(BridgeError::NotDrained(why));
                }
                return Ok(());
            }
        }
    }
}

/// The writer's operation, where there is one.
async fn landing(flight: &mut Option<Flight>) -> (Writer, Landed) {
    match flight {
        Some(flying) => {
            let landed = flying.await;
            *flight = None;
            landed
        }
        None => std::future::pending().await,
    }
}

struct Work<'a> {
    ctx: &'a Context,
    machine: Machine,
    floors: Floors,
    connections: Connections,
    orders: mpsc::UnboundedSender<LoadOrder>,
    /// At home while nothing is under way.
    writer: Option<Writer>,
    flight: Option<Flight>,
    flight_began: Instant,
    moved: Moved,
    /// How much had moved, and when that was last seen to have become more.
    moved_at: (u64, Instant),
    flight_patience: Duration,
    flight_changes: u64,
    flight_weight: usize,
    lags_shown: Instant,
    stream_feedback: Feedback,
    /// How far Redis is, for whoever asks whether that is safe.
    acknowledged: watch::Sender<EndLsn>,
    /// What keeps it from being safe.
    not_durable: Option<String>,
    /// When Postgres last answered the once-a-second question.
    sampled_at: Option<Instant>,
    /// When the load that ended last had begun.
    load_began: Option<Instant>,
    /// Operators who wait for an answer. When the session ends they are told by the channel's end.
    asking: HashMap<AskId, oneshot::Sender<Result<Answer, Refusal>>>,
    asks: u64,
    /// Who waits for the renewal of a page.
    renewing: HashMap<TableId, oneshot::Sender<()>>,
}

impl Work<'_> {
    fn step(&mut self, input: Input) -> Result<(), BridgeError> {
        let effects = self.machine.step(input, Instant::now());
        self.perform(effects)
    }

    fn perform(&mut self, effects: Vec<Effect>) -> Result<(), BridgeError> {
        for effect in effects {
            match effect {
                Effect::Probe(keys) => self.fly(|mut writer| {
                    Box::pin(async move {
                        let probed = writer.probe(&keys).await;
                        (writer, Landed::Probed(probed))
                    })
                })?,
                Effect::Scan { prefix, cursor, limit } => self.fly(|mut writer| {
                    Box::pin(async move {
                        let scanned = scan(&mut writer, &prefix, cursor, limit).await;
                        (writer, Landed::Scanned(scanned))
                    })
                })?,
                Effect::Compare(wanted) => {
                    let bytes = wanted.rows.resp.len();
                    self.fly(|mut writer| {
                        Box::pin(async move {
                            let compared = writer.compare(&wanted).await;
                            (writer, Landed::Compared(compared))
                        })
                    })?;
                    self.flight_patience += Duration::from_secs((bytes / BYTES_A_SECOND) as u64);
                }
                Effect::Execute { batch, checkpoint, changes } => self.execute(batch, checkpoint, changes)?,
                Effect::Order(order) => {
                    if let LoadOrder::Table { table, purpose, because, .. } = &order {
                        let name = &self.ctx.specs[table.index()].name;
                        let doing = match purpose {
                            Purpose::Fill => "loading",
                            Purpose::Compare(_) => "comparing",
                        };
                        tracing::info!(table = name, reason = %because, "{doing} {name}: {because}");
                        if because.heals == Some(Heal::Evicted) {
                            tracing::warn!(
                                table = name,
                                "redis evicts keys, and rows of {name} with them: CONFIG SET maxmemory-policy noeviction, \
                                 and give it more memory"
                            );
                        }
                        if let Some(what) = because.heals {
                            self.ctx.metrics.healed(what);
                        }
                        self.ctx.metrics.primary_read();
                        self.ctx.update(|status| status.primary_reads += 1);
                    }
                    // The loader's own error says more than a closed channel, and ends the session.
                    let _ = self.orders.send(order);
                }
                Effect::Applied(applied) => self.applied(&applied),
                Effect::Renewed(table) => {
                    let written = self.renewing.remove(&table).expect("a page that was renewed had been handed over");
                    // The session's tasks may have ended already.
                    let _ = written.send(());
                }
                Effect::TableLoaded { table, rows, started, because } => {
                    let elapsed = started.elapsed();
                    let lsn = self.machine.applied().0;
                    let name = &self.ctx.specs[table.index()].name;
                    tracing::info!(
                        table = name,
                        rows,
                        elapsed_ms = elapsed.as_millis() as u64,
                        %lsn,
                        reason = %because,
                        "loaded {rows} rows of {name} in {} ms, streaming from {lsn}",
                        elapsed.as_millis()
                    );
                    self.ctx.metrics.load_duration(elapsed);
                    self.ctx.metrics.keys(table, rows);
                    let together = self.load_began.replace(started) == Some(started);
                    self.ctx.update(|status| {
                        let table = &mut status.tables[table.index()];
                        (table.rows, table.not_compared, table.drift) = (Some(rows), None, 0);
                        // Of tables whose loads began together, all rows.
                        let others = status.last_load.as_ref().filter(|_| together).map_or(0, |last| last.rows);
                        let rows = rows + others;
                        status.last_load = Some(LastLoad { rows, elapsed, lsn, reason: because.text });
                    });
                }
                Effect::TableCompared { table, what, tally, started } => {
                    let elapsed = started.elapsed();
                    let name = &self.ctx.specs[table.index()].name;
                    let Tally { rows, missing, stale, orphaned, repaired } = tally;
                    let text = format!(
                        "{what} of {name}: {rows} rows, {missing} missing, {stale} stale, {orphaned} orphaned, \
                         {repaired} repaired, in {} ms",
                        elapsed.as_millis()
                    );
                    // Drift that nobody made on purpose is worth a look.
                    if tally.drift() > 0 && what != Heavy::Refetch {
                        tracing::warn!(table = name, rows, missing, stale, orphaned, repaired, "{text}");
                    } else {
                        tracing::info!(table = name, rows, missing, stale, orphaned, repaired, "{text}");
                    }
                    self.ctx.metrics.load_duration(elapsed);
                    self.ctx.metrics.keys(table, rows);
                    self.ctx.update(|status| {
                        let table = &mut status.tables[table.index()];
                        (table.rows, table.not_compared) = (Some(rows), None);
                        table.drift = tally.drift().saturating_sub(repaired);
                        if what != Heavy::Refetch {
                            table.checked_at = Some(SystemTime::now());
                        }
                    });
                    if what != Heavy::Refetch {
                        self.ctx.metrics.drift(table, Drift::Missing, missing);
                        self.ctx.metrics.drift(table, Drift::Stale, stale);
                        self.ctx.metrics.drift(table, Drift::Orphaned, orphaned);
                    }
                }
                Effect::TableNotCompared { table, what, why } => self.not_compared(table, what, why),
                Effect::Compared { what, tally, elapsed } => {
                    let lsn = self.machine.applied().0;
                    self.ctx.update(|status| match what {
                        Heavy::Refetch => {
                            let reason = what.as_str().to_owned();
                            status.last_load = Some(LastLoad { rows: tally.rows, elapsed, lsn, reason });
                        }
                        Heavy::Verify(_) => {
                            status.last_verify = Some(LastVerify { at: SystemTime::now(), tally, elapsed, lsn });
                        }
                    });
                }
                Effect::Answer(ask, answer) => {
                    if let Some(asking) = self.asking.remove(&ask) {
                        // Whoever asked may have gone.
                        let _ = asking.send(answer);
                    }
                }
                Effect::TableBlocked { table, why } => {
                    self.ctx.metrics.healed(Heal::Schema);
                    let name = &self.ctx.specs[table.index()].name;
                    tracing::error!(
                        table = name,
                        %why,
                        "table cannot be followed until this is mended; the others go on"
                    );
                }
                Effect::TooLarge(too_large) => {
                    let limits = self.machine.limits();
                    self.ctx.remember(|memory| memory.capacity.misplanned(limits, Instant::now()));
                    return Err(SinkError::from(too_large).into());
                }
                Effect::WentBack { because } => {
                    self.ctx.remember(|memory| memory.went_back = Some(because.clone()));
                    return Err(BridgeError::Reload(because));
                }
            }
        }
        Ok(())
    }

    fn not_compared(&self, table: TableId, what: Heavy, why: String) {
        let name = &self.ctx.specs[table.index()].name;
        let is_news = self.ctx.table(table).not_compared.as_ref() != Some(&why);
        if is_news {
            tracing::warn!(table = name, why, "{what} of {name} was given up, the table stays as it is");
        } else {
            tracing::debug!(table = name, why, "{what} of {name} was given up again");
        }
        self.ctx.update(|status| status.tables[table.index()].not_compared = Some(why));
    }

    fn fly(&mut self, operation: impl FnOnce(Writer) -> Flight) -> Result<(), BridgeError> {
        let writer = self.writer.take().ok_or(BridgeError::Internal("two operations of the writer at once"))?;
        self.flight_began = Instant::now();
        self.moved_at.1 = self.flight_began;
        self.flight_patience = self.ctx.timing.let_go;
        self.flight = Some(operation(writer));
        Ok(())
    }

    fn execute(&mut self, batch: Batch, checkpoint: Vec<u8>, changes: u64) -> Result<(), BridgeError> {
        let bytes = batch.len_bytes();
        (self.flight_changes, self.flight_weight) = (changes, batch.weight());
        self.fly(|mut writer| {
            Box::pin(async move {
                let executed = writer.execute(&batch, &checkpoint).await;
                (writer, Landed::Executed(executed.map(|e| e.redis_time_ms)))
            })
        })?;
        self.flight_patience += Duration::from_secs((bytes / BYTES_A_SECOND) as u64);
        Ok(())
    }

    fn asked(&mut self, Asked { operation, answer }: Asked) -> Result<(), BridgeError> {
        match operation {
            Operation::Pause => self.ctx.set_paused(true),
            Operation::Resume => self.ctx.set_paused(false),
            // Between two attempts: this session will come to the same place.
            Operation::Skip(at) if self.ctx.memory().stuck_at() == Some(at) => {
                // Whoever asked may have gone.
                let _ = answer.send(self.ctx.skip(at));
                return Err(BridgeError::Waiting(format!("the change at {at} is skipped")));
            }
            _ => {}
        }
        let ask = AskId(self.asks);
        self.asks += 1;
        self.asking.insert(ask, answer);
        self.step(Input::Asked(ask, operation))
    }

    fn landed(&mut self, (writer, landed): (Writer, Landed)) -> Result<(), BridgeError> {
        self.writer = Some(writer);
        let input = match landed {
            Landed::Executed(executed) => {
                let redis_time_ms = self.learn(executed)?;
                self.ctx.metrics.redis_batch(self.flight_began.elapsed(), self.flight_changes);
                Input::Executed { redis_time_ms }
            }
            Landed::Probed(found) => Input::Probed(found?),
            // Redis answers, and refuses this alone: the stream does not need it.
            Landed::Compared(Err(refused @ SinkError::Refused { .. })) => Input::NotCompared(refused.to_string()),
            Landed::Compared(differences) => Input::Compared(differences?),
            Landed::Scanned(scanned) => {
                let (keys, next) = scanned?;
                Input::Scanned { keys, next }
            }
        };
        self.step(input)
    }

    /// Whether Redis takes batches of this size.
    fn learn(&self, executed: Result<u64, SinkError>) -> Result<u64, SinkError> {
        let (weight, Some(writer)) = (self.flight_weight, &self.writer) else { return executed };
        self.ctx.remember(|memory| match executed {
            Ok(time) => {
                memory.capacity.batch_taken(weight);
                Ok(time)
            }
            Err(error) => Err(memory.capacity.batch_failed(error, weight, writer.server())),
        })
    }

    fn durable(&mut self, answer: Durable) -> Result<(), BridgeError> {
        match answer {
            Durable::Safe(lsn) => {
                self.not_durable = None;
                self.step(Input::Durable(lsn))
            }
            Durable::NotYet(why) => {
                self.not_durable = Some(why);
                Ok(())
            }
        }
    }

    /// How long Redis has been silent, as far as it was asked anything: a large batch on a slow link is no silence.
    fn silence(&self) -> Duration {
        self.flight.as_ref().map_or(Duration::ZERO, |_| self.moved_at.1.elapsed())
    }

    fn check_patience(&mut self) -> Result<(), BridgeError> {
        let moved = self.moved.bytes();
        if moved != self.moved_at.0 {
            self.moved_at = (moved, Instant::now());
        }
        let waiting = self.silence();
        if waiting > self.flight_patience {
            return Err(BridgeError::RedisSilent(waiting));
        }
        Ok(())
    }

    /// What was learned from a batch that failed long ago may not hold any more.
    fn try_larger_batches(&mut self) {
        if let Some(limits) = self.writer.as_ref().map(Writer::limits)
            && self.ctx.remember(|memory| memory.capacity.forgets(Instant::now()))
        {
            self.machine.plan_for(limits);
        }
    }

    fn sampled(&mut self, sample: &Sample) -> Result<(), BridgeError> {
        let snapshot: Snapshot =
            sample.snapshot.parse().map_err(|_| BridgeError::Internal("postgres sent a malformed snapshot"))?;
        if let Some(floors) = self.floors.raise(&snapshot) {
            self.machine.prune(&snapshot, &floors);
        }
        self.ctx.slot_keeps(sample);
        self.sampled_at = Some(Instant::now());
        self.step(Input::Sampled { snapshot, flushed: sample.flushed })
    }

    /// At the stop: what was applied last can be confirmed only when a snapshot has seen it.
    async fn last_sample(&mut self, samples: &mut mpsc::Receiver<Sample>) {
        if let Some(sample) = samples.recv().await {
            let _ = self.sampled(&sample);
        }
    }

    fn applied(&mut self, applied: &Applied) {
        let (ctx, metrics) = (self.ctx, &self.ctx.metrics);
        let now = SystemTime::now();
        metrics.transactions_applied(applied.transactions);
        metrics.ttl_renewals(applied.renewed);
        ctx.record_lags(applied.commits.iter().map(|time| time.age(now)));
        for (index, counts) in applied.counts.iter().enumerate() {
            let table = ctx.specs[index].id;
            metrics.changes_applied(table, Op::Upsert, counts.upserts);
            metrics.changes_applied(table, Op::Delete, counts.deletes);
            metrics.changes_applied(table, Op::Truncate, counts.truncates);
            metrics.rows_loaded(table, counts.loaded);
        }
        let mut letters: BTreeMap<(TableId, &str), u64> = BTreeMap::new();
        for (table, reason) in &applied.dead_letters {
            metrics.dead_letter(*table, reason);
            *letters.entry((*table, reason)).or_default() += 1;
        }
        for ((table, reason), rows) in letters {
            let (table, dead) = (&ctx.specs[table.index()].name, ctx.own.dead().to_string());
            tracing::error!(table, reason, rows, "{rows} rows of {table} cannot be in redis, see XRANGE '{dead}' - +");
        }
        // At once where little happens: whoever has seen a change finds its lag. A flood is summed up with the next tick.
        let shows_lags = !applied.commits.is_empty() && self.lags_shown.elapsed() >= LAGS_SHOWN_EVERY;
        let sync_lag = shows_lags.then(|| ctx.sync_lag());
        if shows_lags {
            self.lags_shown = Instant::now();
        }
        ctx.update(|status| {
            status.sync_lag = sync_lag.unwrap_or(status.sync_lag);
            for (table, counts) in status.tables.iter_mut().zip(&applied.counts) {
                table.upserts += counts.upserts;
                table.deletes += counts.deletes;
                table.truncates += counts.truncates;
                table.prefetched += counts.loaded;
                table.keyless += counts.keyless;
            }
        });
        if ctx.events.receiver_count() > 0 {
            for (table, op, key, commit) in &applied.events {
                // Nobody may be listening any more.
                let _ = ctx.events.send(ChangeEvent {
                    at: now,
                    table: ctx.specs[table.index()].name.as_str().into(),
                    op: *op,
                    key: String::from_utf8_lossy(key.as_bytes()).into_owned(),
                    lag: commit.age(now),
                });
            }
        }
    }

    fn is_healthy(&self) -> bool {
        self.machine.fresh_as_of().is_some_and(|at| at.elapsed() <= self.ctx.config.cache.max_staleness)
    }

    fn feed_back(&mut self, stream: &Stream) {
        let feedback = Feedback {
            confirmed: self.machine.confirmed(),
            applied: Some(self.machine.applied()),
            pings: self.machine.pings(),
        };
        let acknowledged = self.machine.applied().0;
        self.acknowledged.send_if_modified(|lsn| std::mem::replace(lsn, acknowledged) != acknowledged);
        if feedback != self.stream_feedback {
            self.stream_feedback = feedback;
            stream.feedback.send_replace(feedback);
        }
    }

    fn publish(&self, stream: &Stream) {
        if self.ctx.memory().undecodable.is_some_and(|u| self.machine.applied().0.0 > u.before) {
            self.ctx.remember(|memory| memory.undecodable = None);
        }
        self.publish_positions(stream);
        let observed = self.machine.observe();
        let sync_lag = self.ctx.sync_lag();
        let dead = self.machine.dead_keys(DEAD_LETTERS_SHOWN).into_iter().map(|(key, dead)| DeadLetterSeen {
            table: dead.table,
            key: String::from_utf8_lossy(key.as_bytes()).into_owned(),
            reason: dead.reason,
            lsn: dead.lsn,
        });
        let dead = dead.collect();
        self.ctx.update(|status| {
            status.sync_lag = sync_lag;
            status.dead_letter_keys = dead;
            for (table, seen) in status.tables.iter_mut().zip(&observed.tables) {
                table.load_progress = seen.load_progress;
                table.compared_at = seen.compared_ms.map(redis_time);
                table.verified_at = seen.verified_ms.map(redis_time);
            }
        });
    }

    /// After every batch: whoever waits for a position is woken by this.
    fn publish_positions(&self, stream: &Stream) {
        let observed = self.machine.observe();
        let stalled = self.silence() > STALLED_AFTER;
        let beside_stream = self.connections.trouble();
        let (state, waiting_for) = match state_of(&observed) {
            _ if self.ctx.stop.is_cancelled() => (State::Stopping, None),
            _ if stalled => (State::Stalled, Some("redis does not answer".to_owned())),
            _ if self.not_durable.is_some() => (State::Stalled, self.not_durable.clone()),
            // The stream goes on, and something beside it waits.
            state => (state, beside_stream.clone()),
        };
        // Before the tables: whoever is told that all is loaded must not find the state to be `loading` still.
        self.ctx.set_state(state, waiting_for);
        self.ctx.sightings.wrote((observed.epoch, observed.seq));
        self.ctx.update(|status| {
            status.beside_stream = beside_stream;
            status.received = Some(observed.received);
            status.applied = Some(observed.applied);
            status.confirmed = observed.confirmed.map(|c| c.end());
            status.server = observed.server;
            // On an idle database the stream says nothing for long, and the sample is what keeps in touch.
            status.last_contact = Some(stream.contact.borrow().at.into_std()).max(self.sampled_at);
            status.fresh_as_of = observed.fresh_as_of;
            status.oldest_unapplied = observed
                .oldest_unapplied
                .map(|t| UNIX_EPOCH + Duration::from_micros(u64::try_from(t.0).unwrap_or_default()));
            status.operation = observed.operation.map(Heavy::as_str);
            status.verified_at = self.machine.verified_ms().map(redis_time);
            status.epoch = observed.epoch;
            status.seq = observed.seq;
            for (table, seen) in status.tables.iter_mut().zip(observed.tables) {
                (table.state, table.blocked) = (Some(seen.state), seen.blocked);
                (table.because, table.removed) = (seen.because, seen.removed);
                (table.dead_letters, table.more_dead_letters) = (seen.dead_letters, seen.more_dead_letters);
            }
        });
    }
}

fn redis_time(ms: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_millis(ms)
}

fn state_of(observed: &Observed) -> State {
    // A table that waits for a person is no work under way.
    let any = |state| observed.tables.iter().any(|t| t.state == state && t.blocked.is_none());
    if any(TableState::Healing) {
        State::Healing
    } else if any(TableState::Loading) {
        State::Loading
    } else if observed.fresh_as_of.is_some_and(|at| at.elapsed() < CAUGHT_UP) {
        State::Streaming
    } else {
        State::CatchingUp
    }
}

/// Keys under a prefix and the next cursor: it goes over every key that Redis has, whoever's they are, and stops in between
/// for a beat.
async fn scan(
    writer: &mut Writer,
    prefix: &[u8],
    mut cursor: u64,
    limit: usize,
) -> Result<(Vec<crate::command::Key>, u64), SinkError> {
    let (mut keys, began) = (Vec::new(), Instant::now());
    loop {
        let page;
        (cursor, page) = writer.scan_page(prefix, cursor).await?;
        keys.extend(page);
        if cursor == 0 || keys.len() >= limit || began.elapsed() >= HEARTBEAT {
            return Ok((keys, cursor));
        }
    }
}

/// Once a second: what Postgres has, and what an ordinary snapshot sees of it.
struct Sampler {
    connections: Connections,
    slot: String,
    application_name: String,
    opens: Opens,
    /// The stream's.
    contact: watch::Receiver<Contact>,
    now: Arc<Notify>,
    out: mpsc::Sender<Sample>,
}

impl Sampler {
    /// Works until the session ends. Keeps its connection, and gets another where it is lost.
    async fn run(self, client: PostgresClient) -> Result<(), BridgeError> {
        let mut interval = tokio::time::interval(SAMPLE_INTERVAL);
        interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut connected = Some(client);
        loop {
            tokio::select! {
                _ = interval.tick() => {}
                () = self.now.notified() => {}
            }
            let client = match connected.take() {
                Some(client) => client,
                None => self.reconnect().await?,
            };
            let sample = snapshot::sample(&client.client, &self.slot);
            match tokio::time::timeout(SAMPLE_PATIENCE, sample).await {
                Ok(Ok(sample)) => {
                    if self.connections.asks_for_the_limit() {
                        self.explain_limit(&client).await;
                    }
                    connected = Some(client);
                    self.out.send(sample).await.map_err(|_| BridgeError::SessionOver)?;
                }
                // Something is missing that the next connection will not find either.
                Ok(Err(error)) if error.is_about_the_query() && error.disposition() != Disposition::Retry => {
                    return Err(error.into());
                }
                Ok(Err(error)) => self.connections.failed(&error),
                Err(_) => tracing::debug!("postgres does not answer the sampler, which looks for another connection"),
            }
        }
    }

    async fn reconnect(&self) -> Result<PostgresClient, BridgeError> {
        tokio::select! {
            client = self.connections.take() => client,
            () = self.away() => Err(BridgeError::PostgresSilent(AWAY_AFTER)),
        }
    }

    /// Returns when Postgres has neither said anything on the stream nor refused a connection for too long; or when nobody
    /// has answered a new connection for as long, whatever the stream says: a server that shuts down behind a load balancer
    /// keeps the stream until everything is confirmed, and nothing is confirmed without samples.
    async fn away(&self) {
        let began = Instant::now();
        loop {
            let now = Instant::now();
            let heard = Some(self.contact.borrow().at.into_std()).max(self.connections.refused_at());
            let is_silent = heard.is_none_or(|heard| heard + AWAY_AFTER <= now);
            let unanswered = self.connections.unanswered_since();
            if is_silent || unanswered.is_some_and(|since| since.max(began) + AWAY_AFTER <= now) {
                return;
            }
            tokio::time::sleep(SAMPLE_INTERVAL).await;
        }
    }

    async fn explain_limit(&self, client: &PostgresClient) {
        let limits = tokio::time::timeout(
            SAMPLE_PATIENCE,
            limits::connection_limits(client, &self.application_name, self.opens),
        );
        if let Ok(Ok(limits)) = limits.await {
            self.connections.explain(&limits.advice());
        }
    }
}
