//! A daemon that has no session yet. It gathers what is known of both servers, and the real resume table and
//! [`Startup`] decide what follows. Each step performs one request, so that anything can happen between two of them.

use super::daemon::Setting;
use super::postgres::{end_lsn, lsn};
use super::redis::Answer;
use super::writer::{Surveying, Writer};
use super::{Outside, Violation};
use crate::checkpoint::{Checkpoint, SlotState};
use crate::command::Key;
use crate::lanes::book::{Judged, Loss, Places};
use crate::lsn::EndLsn;
use crate::progress::resume::{self, Adopt, ConfiguredTable, Facts, HashSlots, ResumeDecision};
use crate::resp::batch::Batch;
use crate::session::Spread;
use crate::session::startup::{Done, Request, Startup};
use crate::session::takeover::{Taken, Takeover};
use bytes::Bytes;
use std::mem::discriminant;

const SYSTEM_ID: &str = "7";
const DATABASE: &str = "shop";

/// What a process remembers. A crash loses it.
#[derive(Default)]
pub struct Memory {
    /// A session has begun before. From then on, a table that cannot be followed affects only itself.
    pub has_begun: bool,
    pub epoch_seen: u64,
    /// Why Postgres is known to have a different history from that of the checkpoint.
    pub went_back: Option<String>,
}

pub struct Starting {
    number: usize,
    writer: Writer,
    spread: Spread,
    /// See [`Judged::places`].
    places: Places,
    /// See [`Observer::surveys`](super::observer::Observer::surveys).
    began: u64,
    /// The checkpoint as found, which has been watched since it was read.
    found: Option<Checkpoint>,
    dead: Vec<Key>,
    redis_time_ms: u64,
    evicted: u64,
    progress: Progress,
}

enum Progress {
    /// Only on a cluster.
    Surveying(Surveying),
    Connected,
    Identified {
        flushed: u64,
        tables: Vec<ConfiguredTable>,
    },
    Taking {
        startup: Box<Startup>,
        request: Request,
        is_sent: bool,
    },
}

pub enum Stepped {
    Goes(Box<Starting>),
    /// The process gives up, and its connections end.
    GivesUp,
    /// The stream can be started.
    Ready {
        writer: Box<Writer>,
        spread: Spread,
        places: Places,
        dead: Vec<Key>,
        taken: Box<Taken>,
    },
}

/// A new server, and an empty Redis.
pub fn facts<'a>(slot: &'a SlotState, tables: &'a [ConfiguredTable]) -> Facts<'a> {
    Facts {
        checkpoint: None,
        slot,
        replace_slot: None,
        system_id: SYSTEM_ID,
        database: DATABASE,
        timeline: 1,
        checkpoint_timeline_ended: None,
        flushed: end_lsn(1),
        went_back: None,
        adopt: Adopt::Refuse,
        hash_slots: HashSlots::default(),
        redis_time_ms: 1_000,
        tables,
        added: &[],
    }
}

impl Starting {
    /// Returns `None` while another session holds the slot.
    pub fn connect(number: usize, world: &mut Outside, setting: &Setting) -> Result<Option<Box<Self>>, Violation> {
        if world.postgres.slot.is_some_and(|slot| slot.active.is_some()) {
            return Ok(None);
        }
        if !world.redis.has_record() {
            return Ok(None);
        }
        let (connection, found, dead) = world.redis.connect()?;
        let (redis_time_ms, evicted) = (world.redis.time_ms, world.redis.evicted_keys());
        let progress = match world.redis.is_cluster() {
            true => Progress::Surveying(Surveying::begin(world)),
            false => Progress::Connected,
        };
        let (writer, spread, began) = (Writer::of_one(connection, setting), Spread::OneSlot, world.observer.surveys());
        let places = Places::default();
        Ok(Some(Box::new(Starting {
            number,
            writer,
            spread,
            places,
            began,
            found,
            dead,
            redis_time_ms,
            evicted,
            progress,
        })))
    }

    pub fn connection(&self) -> usize {
        self.writer.connection
    }

    pub fn step(
        mut self: Box<Self>,
        memory: &mut Memory,
        world: &mut Outside,
        setting: &Setting,
    ) -> Result<Stepped, Violation> {
        self.progress = match std::mem::replace(&mut self.progress, Progress::Connected) {
            Progress::Surveying(surveying) => match surveying.step(world) {
                None => return Ok(Stepped::GivesUp),
                Some(Err(surveying)) => Progress::Surveying(surveying),
                Some(Ok(survey)) => {
                    self.writer = Writer::of_lanes(self.writer.connection, &survey, world, setting);
                    Progress::Connected
                }
            },
            // The real daemon reports what the operator must do, and exits.
            Progress::Connected if !memory.has_begun && world.postgres.unfit.contains(&true) => {
                return Ok(Stepped::GivesUp);
            }
            Progress::Connected => {
                Progress::Identified { flushed: world.postgres.flushed, tables: setting.configured(&world.postgres) }
            }
            Progress::Identified { flushed, tables } => {
                let (startup, request) = self.decide(memory, world, setting, flushed, &tables)?;
                requested(world, Box::new(startup), request)
            }
            Progress::Taking { request: Request::Stream(taken), .. } => {
                (memory.epoch_seen, memory.went_back, memory.has_begun) = (taken.checkpoint.epoch, None, true);
                let Starting { writer, spread, places, began, dead, .. } = *self;
                world.observer.judged(began);
                return Ok(Stepped::Ready { writer: Box::new(writer), spread, places, dead, taken });
            }
            Progress::Taking { mut startup, request, is_sent: true } => match self.writer.take_answer(world) {
                None => Progress::Taking { startup, request, is_sent: true },
                Some(Answer::Executed { found }) if found == written(&request) => {
                    let request = startup.step(Done::Written);
                    requested(world, startup, request)
                }
                Some(_) => return Ok(Stepped::GivesUp),
            },
            Progress::Taking { mut startup, request, is_sent: false } => {
                match self.perform(&request, world, setting)? {
                    Performed::Sent => Progress::Taking { startup, request, is_sent: true },
                    Performed::NotYet => Progress::Taking { startup, request, is_sent: false },
                    Performed::Done(done) => {
                        let request = startup.step(done);
                        requested(world, startup, request)
                    }
                    Performed::Failed => return Ok(Stepped::GivesUp),
                }
            }
        };
        Ok(Stepped::Goes(self))
    }

    fn decide(
        &mut self,
        memory: &Memory,
        world: &mut Outside,
        setting: &Setting,
        flushed: u64,
        tables: &[ConfiguredTable],
    ) -> Result<(Startup, Request), Violation> {
        let slot = match world.postgres.slot {
            None => SlotState::Absent,
            Some(slot) if slot.is_lost => SlotState::Invalidated { reason: "wal_removed".to_owned() },
            Some(slot) => SlotState::Ready { confirmed: end_lsn(slot.confirmed), active_pid: None },
        };
        let found = self.found.as_ref();
        let ended = found.and_then(|c| world.postgres.ended(c.timeline)).map(lsn);
        let judged = match &slot {
            SlotState::Ready { confirmed, .. } => {
                let flushed = end_lsn(flushed);
                self.writer.judge(*confirmed, ended.map_or(flushed, |end| flushed.min(EndLsn(end))))
            }
            SlotState::Absent | SlotState::Invalidated { .. } => None,
        };
        let loss = judged.as_ref().and_then(Judged::loss);
        let hash_slots = HashSlots::of(judged.as_ref(), loss.as_ref());
        if let Some(judged) = &judged {
            world.log.saw(&Judgement::of(judged));
        }
        let facts = Facts {
            checkpoint: found,
            timeline: world.postgres.timeline,
            checkpoint_timeline_ended: ended,
            flushed: end_lsn(flushed),
            hash_slots,
            went_back: memory.went_back.as_deref(),
            redis_time_ms: self.redis_time_ms,
            ..facts(&slot, tables)
        };
        let decision = resume::decide(&facts);
        world.log.saw(&decision);
        world.say(|_| format!("daemon {}: decides {decision:?}", self.number));
        let takeover = Takeover {
            facts: &facts,
            specs: &setting.specs,
            epoch_seen: memory.epoch_seen,
            made_publication: Some("prefetchd"),
            evicted: Some(self.evicted),
        };
        let streams_on = matches!(decision, ResumeDecision::Stream { .. });
        let begun = Startup::begin(&takeover, decision).map_err(|because| format!("refused: {because}"))?;
        match judged.as_ref().filter(|_| streams_on) {
            None => self.writer.disown(),
            Some(judged) => self.writer.heal(&judged.lost),
        }
        if world.redis.is_cluster() {
            let judged = judged.filter(|_| streams_on).unwrap_or_default();
            self.spread = Spread::Slots { ahead: judged.greatest, last: judged.last };
            self.places = judged.places.clone();
        }
        Ok(begun)
    }

    fn perform(&mut self, request: &Request, world: &mut Outside, setting: &Setting) -> Result<Performed, Violation> {
        let by = self.number as u64;
        let snapshot = |text: &str| text.parse().map_err(|_| format!("{text} is no snapshot"));
        Ok(match request {
            Request::Disown(checkpoint) | Request::TakeOver(checkpoint) => {
                // With all its entries.
                let batch = Batch::of_entries(&setting.own, setting.limits, checkpoint.entries()).expect("few tables");
                self.writer.execute(&batch, &checkpoint.to_json(), world);
                Performed::Sent
            }
            // A slot cannot be dropped while a session holds it.
            Request::DropSlot if world.postgres.slot.is_some_and(|slot| slot.active.is_some()) => Performed::Failed,
            Request::DropSlot => {
                world.postgres.slot = None;
                Performed::Done(Done::Dropped)
            }
            Request::CreateTemporarySlot => match world.postgres.create_temporary_slot(by, &mut world.rng) {
                None => Performed::NotYet,
                Some(left_out) => Performed::Done(Done::Created { left_out: snapshot(&left_out)? }),
            },
            Request::TakeSnapshot => Performed::Done(Done::Snapshot(snapshot(&world.postgres.snapshot())?)),
            Request::NameSlot => match world.postgres.name_slot(by) {
                Ok(at) => Performed::Done(Done::Named { confirmed: end_lsn(at) }),
                // Another daemon was faster.
                Err(()) => Performed::Failed,
            },
            Request::Stream(_) => Performed::NotYet,
        })
    }

    pub fn describe(&self) -> String {
        match &self.progress {
            Progress::Surveying(_) => "surveys the nodes".to_owned(),
            Progress::Connected => {
                let found = self.found.as_ref().map(|c| (c.epoch, c.seq, c.lsn, c.within));
                format!("connected, found {found:?}")
            }
            Progress::Identified { flushed, .. } => format!("identified, flushed {flushed:x}"),
            Progress::Taking { request, is_sent, .. } => format!("{request:?}, sent: {is_sent}"),
        }
    }

    /// Returns a value that changes whenever startup makes progress.
    pub fn place(&self) -> impl PartialEq + use<> {
        let request = match &self.progress {
            Progress::Taking { request, is_sent, .. } => Some((discriminant(request), *is_sent)),
            Progress::Surveying(_) | Progress::Connected | Progress::Identified { .. } => None,
        };
        (discriminant(&self.progress), request)
    }
}

fn requested(world: &mut Outside, startup: Box<Startup>, request: Request) -> Progress {
    world.log.saw(&request);
    Progress::Taking { startup, request, is_sent: false }
}

/// What the lanes were found to be in.
#[derive(Debug)]
pub enum Judgement {
    Even,
    /// Some are ahead of others.
    Uneven,
    RecordLost,
    /// One or more have lost something, and are healed alone.
    LanesLost,
    /// All have.
    AllLost,
}

impl Judgement {
    fn of(judged: &Judged) -> Self {
        match judged.lost.len() {
            _ if judged.record.is_some() => Judgement::RecordLost,
            0 if judged.least < judged.greatest => Judgement::Uneven,
            0 => Judgement::Even,
            _ if matches!(judged.loss(), Some(Loss::Everything(_))) => Judgement::AllLost,
            _ => Judgement::LanesLost,
        }
    }
}

enum Performed {
    Done(Done),
    /// The write is on its way to Redis.
    Sent,
    NotYet,
    Failed,
}

/// Returns what the GET after EXEC returns if Redis executed the last write.
fn written(request: &Request) -> Option<Bytes> {
    match request {
        Request::Disown(checkpoint) | Request::TakeOver(checkpoint) => Some(checkpoint.to_json().into()),
        _ => None,
    }
}
