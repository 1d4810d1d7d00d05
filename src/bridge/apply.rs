//! Runs one session: selects the next input, passes it to the machine, and performs the effects that it returns.
//!
//! The machine makes all decisions. This loop owns the clock, the channels and the writer, of which at most one
//! operation is in progress.

use super::BridgeError;
use super::beside::{Beside, FromSession, Orders};
use super::bootstrap::Session;
use super::context::{Context, feed_watchdog};
use super::durable::Durable;
use super::observers::{Observers, Surroundings};
use super::sampler::SAMPLE_INTERVAL;
use super::writing::{Answered, WriterDone, Writing};
use crate::admin::{Answer, Asked, Operation, Refusal};
use crate::code::Code;
use crate::lsn::{AppliedLsn, EndLsn};
use crate::nodes::Nodes;
use crate::progress::visibility::Snapshot;
use crate::schema::TableId;
use crate::session::operation::AskId;
use crate::session::{Effect, Input, Machine};
use crate::sink::SinkError;
use crate::sink::any_writer::AnyWriter;
use crate::sink::writer::Executed;
use crate::source::snapshot::Sample;
use crate::source::stream::{Feedback, Stream};
use crate::status::State;
use std::collections::HashMap;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Interval;

/// The machine's clock: heartbeats are due once a second, and stalls must be noticed.
const TICK: Duration = Duration::from_millis(200);
/// Redis counts as stalled after this long without a byte written or read.
const STALLED_AFTER: Duration = Duration::from_secs(2);

/// Runs until the stop (`Ok`) or until something ends the session.
pub async fn work(ctx: &Context, session: Session, asked: &mut mpsc::Receiver<Asked>) -> Result<(), BridgeError> {
    let Session { start, writer, syncer, mut stream, client, retired, walsender_pid } = session;
    ctx.set_walsender(walsender_pid);
    let (limits, checkpoint, contact) = (start.limits, &start.checkpoint, stream.contact.clone());
    let (mut beside, orders) = Beside::start(ctx, FromSession { client, syncer, retired, limits, checkpoint, contact });
    let (machine, effects) = Machine::start(start);
    let mut work = Work {
        ctx,
        machine,
        acknowledged: match &writer {
            AnyWriter::One(_) => Acknowledged::WithCheckpoint,
            AnyWriter::Lanes(_) => Acknowledged::ByHashSlots(None),
        },
        writing: Writing::new(writer, ctx.timing.let_go),
        orders,
        observers: Observers::new(ctx),
        feedback: Feedback::default(),
        not_durable: None,
        sampled_at: None,
        operators: Operators::default(),
        renewing: HashMap::new(),
        drain_until: None,
    };
    work.perform(effects)?;
    work.observe_all(&stream);
    work.observers.publish();
    let mut tick = tokio::time::interval(TICK);
    loop {
        let turned = work.turn(&mut beside, &mut stream, asked, &mut tick).await;
        work.observers.publish();
        turned?;
        work.feed_back(&stream);
        if let Some(until) = work.drain_until
            && (work.machine.is_drained() || Instant::now() >= until)
        {
            return work.end(&mut beside.samples, stream).await;
        }
    }
}

struct Work<'a> {
    ctx: &'a Context,
    machine: Machine,
    writing: Writing,
    orders: Orders,
    observers: Observers<'a>,
    /// As last reported to the stream.
    feedback: Feedback,
    acknowledged: Acknowledged,
    /// What prevents applied changes from being durable.
    not_durable: Option<String>,
    /// When Postgres last answered the sampler.
    sampled_at: Option<Instant>,
    operators: Operators,
    /// Whom to tell that a page has been renewed.
    renewing: HashMap<TableId, oneshot::Sender<()>>,
    /// Set at the stop: what is pending is still written until then.
    drain_until: Option<Instant>,
}

/// What Redis has acknowledged.
#[derive(Debug, Clone, Copy)]
enum Acknowledged {
    WithCheckpoint,
    /// Each hash slot is written by itself. The checkpoint may be ahead of some, but not of this.
    ByHashSlots(Option<EndLsn>),
}

/// Operators who wait for an answer. If the session ends, their channels are closed.
#[derive(Default)]
struct Operators {
    waiting: HashMap<AskId, oneshot::Sender<Result<Answer, Refusal>>>,
    asks: u64,
}

impl Operators {
    fn add(&mut self, answer: oneshot::Sender<Result<Answer, Refusal>>) -> AskId {
        let ask = AskId(self.asks);
        self.asks += 1;
        self.waiting.insert(ask, answer);
        ask
    }

    fn answer(&mut self, ask: AskId, answer: Result<Answer, Refusal>) {
        if let Some(waiting) = self.waiting.remove(&ask) {
            // The caller may be gone.
            let _ = waiting.send(answer);
        }
    }
}

impl Work<'_> {
    /// Handles one input and the effects that follow from it.
    async fn turn(
        &mut self,
        beside: &mut Beside,
        stream: &mut Stream,
        asked: &mut mpsc::Receiver<Asked>,
        tick: &mut Interval,
    ) -> Result<(), BridgeError> {
        let draining = self.drain_until.is_some();
        tokio::select! {
            biased;
            finished = self.writing.finished() => {
                self.finished(finished)?;
                self.observe_positions(stream);
            }
            () = self.ctx.stop.cancelled(), if !draining => self.stop()?,
            Some(ended) = beside.tasks.join_next(), if !draining => {
                ended.map_err(|_| BridgeError::Internal("a task of the session ended in mid-air"))??;
                return Err(BridgeError::SessionOver);
            }
            Some(sample) = beside.samples.recv() => self.sampled(&sample)?,
            Some((table, seen)) = beside.catalog.recv(), if !draining => self.step(Input::Catalog(table, seen))?,
            Some(evicted) = beside.evictions.recv(), if !draining => self.step(Input::Evicted(evicted))?,
            Some(answer) = beside.durable.recv() => self.durable(answer)?,
            _ = tick.tick() => self.tick(stream)?,
            Some(asked) = asked.recv() => self.asked(asked)?,
            () = self.ctx.position_wanted.notified() => self.step(Input::PositionWanted)?,
            Some((page, written)) = beside.renewals.recv(), if self.renews() => {
                self.renewing.insert(page.table, written);
                self.step(Input::Renew(page))?;
            }
            Some(message) = beside.load.recv(), if self.machine.takes_chunks() => self.step(Input::Load(message))?,
            delivered = stream.deliveries.recv(), if self.machine.takes_deliveries() => match delivered {
                Some(delivered) => {
                    let (items, bytes) = (delivered.items, delivered.bytes);
                    self.step(Input::Delivered { items, bytes })?;
                }
                None => return Err(stream.ended().await.into()),
            },
        }
        Ok(())
    }

    fn step(&mut self, input: Input) -> Result<(), BridgeError> {
        let effects = self.machine.step(input, Instant::now());
        self.perform(effects)
    }

    fn perform(&mut self, effects: Vec<Effect>) -> Result<(), BridgeError> {
        for effect in effects {
            match effect {
                Effect::Probe(asked) => self.writing.probe(asked)?,
                Effect::Inspect(questions) => self.writing.inspect(questions)?,
                Effect::Scan { prefix, cursor, limit, within } => self.writing.scan(prefix, cursor, limit, within)?,
                Effect::Compare(wanted) => self.writing.compare(wanted)?,
                Effect::Execute { batch, checkpoint, changes } => self.writing.execute(batch, checkpoint, changes)?,
                Effect::Order(order) => {
                    self.observers.ordered(&order);
                    // If this fails, the loader's own error ends the session, and says more than a closed channel.
                    let _ = self.orders.load.send(order);
                }
                Effect::Applied(applied) => self.observers.applied(*applied),
                Effect::Renewed(table) => {
                    let written = self.renewing.remove(&table).expect("a page that was renewed had been handed over");
                    // The session's tasks may have ended already.
                    let _ = written.send(());
                }
                Effect::TableLoaded { table, rows, is_whole, started, because } => {
                    self.observers.loaded(table, (rows, is_whole), started, because, self.machine.applied().0);
                }
                Effect::TableCompared { table, what, tally, started } => {
                    self.observers.compared(table, what, tally, started);
                }
                Effect::Differs { table, keys } => self.observers.differs(table, &keys),
                Effect::TableNotCompared { table, what, why } => self.observers.not_compared(table, what, why),
                Effect::Compared { what, tally, elapsed } => {
                    self.observers.all_compared(what, tally, elapsed, self.machine.applied().0);
                }
                Effect::Answer(ask, answer) => {
                    // First, so that the caller finds the result in the status.
                    self.observers.publish();
                    self.operators.answer(ask, answer);
                }
                Effect::TableBlocked { table, why } => self.observers.blocked(table, &why),
                Effect::Settled(lanes) => self.writing.settles(&lanes)?,
                Effect::TooLarge(too_large) => {
                    let limits = self.machine.limits();
                    self.ctx.remember(|memory| memory.capacity.misplanned(limits, Instant::now()));
                    return Err(SinkError::from(too_large).into());
                }
                Effect::WentBack { because } => {
                    self.ctx.remember(|memory| memory.went_back = Some(because.clone()));
                    return Err(BridgeError::Reload(Code::LoadsAgain, because));
                }
            }
        }
        Ok(())
    }

    /// An operation of the writer has ended.
    fn finished(&mut self, WriterDone { done, took }: WriterDone) -> Result<(), BridgeError> {
        let input = match done {
            Answered::Executed { result, changes, weight } => {
                let Executed { redis_time_ms, safe } = self.learn(result, weight)?;
                self.ctx.metrics.redis_batch(took, changes);
                // Those of the takeover's batch, too.
                let moved = self.writing.take_moved();
                if !moved.is_empty() {
                    tracing::info!(hash_slots = moved.len(), "hash slots have moved to another node");
                    self.step(Input::Moved(moved))?;
                }
                self.step(Input::Executed { redis_time_ms })?;
                if let Acknowledged::ByHashSlots(reached) = &mut self.acknowledged {
                    *reached = safe;
                }
                return match (safe, &self.orders.acknowledged) {
                    (Some(safe), None) => self.step(Input::Durable(AppliedLsn(safe))),
                    // Reported once it is known to be durable.
                    (Some(_), Some(_)) | (None, _) => Ok(()),
                };
            }
            Answered::Probed(found) => Input::Probed(found?),
            Answered::Inspected(answers) => Input::Inspected(answers?),
            // Redis answers, and rejects only this: the stream does not need it.
            Answered::Compared(Err(refused @ SinkError::Refused { .. })) => Input::NotCompared(refused.to_string()),
            Answered::Compared(differences) => Input::Compared(differences?),
            Answered::Scanned(scanned) => {
                let (keys, next) = scanned?;
                Input::Scanned { keys, next }
            }
        };
        self.step(input)
    }

    /// Records whether Redis accepts batches of this weight.
    fn learn(&self, executed: Result<Executed, SinkError>, weight: usize) -> Result<Executed, SinkError> {
        let Some(server) = self.writing.server() else { return executed };
        self.ctx.remember(|memory| match executed {
            Ok(executed) => {
                memory.capacity.batch_taken(weight);
                Ok(executed)
            }
            Err(error) => Err(memory.capacity.batch_failed(error, weight, server)),
        })
    }

    fn tick(&mut self, stream: &Stream) -> Result<(), BridgeError> {
        self.writing.check_silence()?;
        // What was learned from a batch that failed long ago may no longer hold.
        if let Some(limits) = self.writing.limits()
            && self.ctx.remember(|memory| memory.capacity.forgets(Instant::now()))
        {
            self.machine.plan_for(limits);
        }
        self.step(Input::Tick)?;
        self.observe_all(stream);
        feed_watchdog();
        Ok(())
    }

    fn asked(&mut self, Asked { operation, answer }: Asked) -> Result<(), BridgeError> {
        match operation {
            Operation::Pause => self.ctx.set_paused(true),
            Operation::Resume => self.ctx.set_paused(false),
            // Between two attempts: this session will reach the same position.
            Operation::Skip(at) if self.ctx.memory().stuck_at() == Some(at) => {
                // The caller may be gone.
                let _ = answer.send(self.ctx.skip(at));
                return Err(BridgeError::Waiting(Code::StreamStuck, format!("the change at {at} is skipped")));
            }
            _ => {}
        }
        let ask = self.operators.add(answer);
        self.step(Input::Asked(ask, operation))
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

    fn sampled(&mut self, sample: &Sample) -> Result<(), BridgeError> {
        let snapshot: Snapshot =
            sample.snapshot.parse().map_err(|_| BridgeError::Internal("postgres sent a malformed snapshot"))?;
        if let Some(floors) = self.orders.floors.raise(&snapshot) {
            self.machine.prune(&snapshot, &floors);
        }
        self.ctx.slot_keeps(sample);
        self.sampled_at = Some(Instant::now());
        self.step(Input::Sampled { snapshot, flushed: sample.flushed })
    }

    /// If the sync is unhealthy, keys expire: that is the purpose of the TTL.
    fn renews(&self) -> bool {
        let is_healthy = || {
            let fresh_as_of = self.machine.fresh_as_of();
            fresh_as_of.is_some_and(|at| at.elapsed() <= self.ctx.config.cache.max_staleness)
        };
        self.machine.takes_renewals() && (is_healthy() || self.ctx.is_paused())
    }

    fn feed_back(&mut self, stream: &Stream) {
        let feedback = Feedback {
            confirmed: self.machine.confirmed(),
            applied: Some(self.machine.applied()),
            pings: self.machine.pings(),
        };
        if let Some(orders) = &self.orders.acknowledged {
            let acknowledged = match self.acknowledged {
                Acknowledged::WithCheckpoint => Some(self.machine.applied().0),
                Acknowledged::ByHashSlots(reached) => reached,
            };
            orders.send_if_modified(|lsn| std::mem::replace(lsn, acknowledged) != acknowledged);
        }
        if feedback != self.feedback {
            self.feedback = feedback;
            stream.feedback.send_replace(feedback);
        }
    }

    fn surroundings(&self, stream: &Stream) -> Surroundings {
        // On an idle database the stream is silent for long; the samples then show that Postgres is there.
        let heard = stream.contact.borrow().at.into_std();
        Surroundings {
            stalled: self.stalled(),
            not_durable: self.not_durable.clone(),
            beside_stream: self.orders.connections.trouble(),
            last_contact: self.sampled_at.map_or(heard, |at| at.max(heard)),
        }
    }

    fn stalled(&self) -> Option<String> {
        let nodes = self.ctx.config.redis.target.nodes();
        if let Some(refusal) = nodes.and_then(Nodes::refusal) {
            return Some(format!("redis: {refusal}"));
        }
        (self.writing.silence() > STALLED_AFTER).then(|| match &nodes.map(Nodes::silent).unwrap_or_default()[..] {
            [] => "redis does not answer".to_owned(),
            [node] => format!("redis: {node} does not answer"),
            nodes => format!("redis: {} do not answer", nodes.join(", ")),
        })
    }

    fn observe_positions(&mut self, stream: &Stream) {
        let surroundings = self.surroundings(stream);
        self.observers.positions(&self.machine, self.machine.observe(), surroundings);
    }

    fn observe_all(&mut self, stream: &Stream) {
        if self.ctx.memory().undecodable.is_some_and(|u| self.machine.applied().0.0 > u.before) {
            self.ctx.remember(|memory| memory.undecodable = None);
        }
        let surroundings = self.surroundings(stream);
        self.observers.all(&self.machine, surroundings);
    }

    fn stop(&mut self) -> Result<(), BridgeError> {
        if self.ctx.is_stopping() {
            self.ctx.set_state(State::Stopping, None, None);
        }
        self.machine.drain();
        self.drain_until = Some(Instant::now() + self.ctx.timing.drain);
        self.step(Input::Tick)
    }

    /// After the stop: confirms what was applied last, which requires a snapshot that has seen it.
    async fn end(mut self, samples: &mut mpsc::Receiver<Sample>, stream: Stream) -> Result<(), BridgeError> {
        // Afterwards a heartbeat may be in flight again, which adds nothing.
        let drained = self.machine.is_drained();
        self.orders.sample_now.notify_one();
        if let Ok(Some(sample)) = tokio::time::timeout(SAMPLE_INTERVAL, samples.recv()).await {
            let _ = self.sampled(&sample);
            self.observers.publish();
        }
        stream.finish(self.machine.confirmed()).await;
        if drained {
            return Ok(());
        }
        let why = format!("redis did not take it within {} s", self.ctx.timing.drain.as_secs_f64());
        Err(BridgeError::NotDrained(why))
    }
}
