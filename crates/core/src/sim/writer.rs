//! A daemon's writer: of a single Redis, where each batch is one request; or of a cluster, where the real [`Book`]
//! divides it into calls. Stands in for `sink::any_writer`.

use super::Outside;
use super::daemon::Setting;
use super::redis::{Answer, Request, SLOT};
use super::store::Called;
use crate::lanes::Lane;
use crate::lanes::book::{Book, Judged, Round, Survey, Why};
use crate::lanes::mark::{Home, Mark};
use crate::lanes::script::Call;
use crate::lanes::split::split;
use crate::lookups::questions::Questions;
use crate::lsn::EndLsn;
use crate::resp::batch::{Batch, OwnKeys};
use bytes::Bytes;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// How a batch is written.
#[derive(Debug)]
pub enum Planned {
    Plain,
    /// Some lane is ahead of it.
    LeavesOut,
    /// First the record.
    InThreeSteps,
    /// Lanes without changes are written, too.
    Refreshes,
}

pub struct Writer {
    pub connection: usize,
    own: OwnKeys,
    /// `None` where there is a single Redis.
    lanes: Option<Lanes>,
}

struct Lanes {
    book: Box<Book>,
    /// The steps of the round that are left. Each waits for all acknowledgements of the one before.
    steps: VecDeque<Vec<Call>>,
    /// Calls that are not acknowledged.
    waiting: usize,
    checkpoint: Bytes,
    /// Where the lanes were when that was last asked.
    homes: BTreeMap<Lane, Home>,
    /// The marks that the survey found.
    found: BTreeMap<Lane, Bytes>,
    session: u64,
}

/// Reads what a writer of a cluster must know, a node at a time.
pub struct Surveying {
    survey: Survey,
    nodes: Vec<usize>,
    /// See [`super::redis::Redis::moves`].
    moves: u64,
}

impl Surveying {
    /// Reads the record. A writer that is still alive then cannot end a round before the marks are read without being
    /// noticed.
    pub fn begin(world: &Outside) -> Self {
        let (head, entries, lanes) = world.redis.record();
        let survey = Survey { head, entries, lanes, marks: Default::default() };
        let nodes = (0..world.redis.count_nodes()).collect();
        Surveying { survey, nodes, moves: world.redis.moves }
    }

    /// Reads the marks of one node. Returns `None` if a slot has moved meanwhile, or is moving and its mark is not there: the
    /// node that had it says so.
    pub fn step(mut self, world: &mut Outside) -> Option<Result<Survey, Self>> {
        if self.moves != world.redis.moves {
            return None;
        }
        if self.nodes.is_empty() {
            return Some(Ok(self.survey));
        }
        let node = self.nodes.swap_remove(world.rng.below(self.nodes.len() as u64) as usize);
        self.survey.marks.extend(world.redis.marks_at(node)?);
        Some(Err(self))
    }
}

impl Writer {
    pub fn of_one(connection: usize, setting: &Setting) -> Self {
        Writer { connection, own: setting.own.clone(), lanes: None }
    }

    pub fn of_lanes(connection: usize, survey: &Survey, world: &mut Outside, setting: &Setting) -> Self {
        let session = world.next_number();
        let book = Box::new(Book::new(setting.own.clone(), SLOT, survey, session, world.now()));
        let (homes, found) = (world.redis.homes(), survey.marks.clone());
        let lanes = Lanes { book, steps: VecDeque::new(), waiting: 0, checkpoint: Bytes::new(), homes, found, session };
        Writer { connection, own: setting.own.clone(), lanes: Some(lanes) }
    }

    /// `None` where there are no lanes.
    pub fn book(&self) -> Option<&Book> {
        self.lanes.as_ref().map(|lanes| &*lanes.book)
    }

    /// Whether a session that has ended has written a lane since the survey. That is noticed when the lane is written, or
    /// refreshed.
    pub fn was_overtaken(&self, world: &Outside) -> bool {
        let Some(Lanes { homes, found, session, .. }) = &self.lanes else { return false };
        let is_another = |mark: &Bytes| Mark::read(mark).is_ok_and(|mark| mark.nonce.session != *session);
        homes.keys().any(|lane| {
            let mark = world.redis.mark(*lane).filter(|mark| is_another(mark));
            mark.is_some_and(|mark| found.get(lane) != Some(mark))
        })
    }

    pub fn judge(&self, confirmed: EndLsn, server: EndLsn) -> Option<Judged> {
        self.book().map(|book| book.judge(confirmed, server))
    }

    pub fn disown(&mut self) {
        if let Some(lanes) = &mut self.lanes {
            lanes.book.disown();
        }
    }

    pub fn heal(&mut self, lost: &BTreeMap<Lane, Why>) {
        if let Some(lanes) = &mut self.lanes {
            lanes.book.heal(lost);
        }
    }

    pub fn take_moved(&mut self) -> BTreeSet<Lane> {
        self.lanes.as_mut().map(|lanes| lanes.book.take_moved()).unwrap_or_default()
    }

    pub fn settles(&mut self, settled: &BTreeSet<Lane>) {
        if let Some(lanes) = &mut self.lanes {
            lanes.book.settles(settled);
        }
    }

    pub fn execute(&mut self, batch: &Batch, checkpoint: &[u8], world: &mut Outside) {
        let checkpoint = Bytes::copy_from_slice(checkpoint);
        let Some(lanes) = &mut self.lanes else {
            let body = Bytes::copy_from_slice(batch.body());
            return world.redis.send(self.connection, Request::Execute { body, checkpoint });
        };
        let concerns = split(batch.body(), &self.own).lanes;
        let Round { before, calls, last, after } =
            lanes.book.plan(batch, &checkpoint, world.now(), |lane| lanes.homes.get(&lane).copied());
        let is_written = |lane: &Lane| calls.iter().chain(&last).any(|call| call.lane == Some(*lane));
        world.log.saw(&match () {
            () if !concerns.keys().all(is_written) => Planned::LeavesOut,
            () if before.is_some() => Planned::InThreeSteps,
            () if calls.len() + last.iter().len() > concerns.len() => Planned::Refreshes,
            () => Planned::Plain,
        });
        lanes.steps = [before.into_iter().collect(), calls, last.into_iter().collect(), vec![after]].into();
        lanes.checkpoint = checkpoint;
        lanes.sends(self.connection, world);
    }

    /// Asks about rows and lists, and for the marks of their lanes.
    pub fn inspects(&self, questions: Questions, world: &mut Outside) {
        let lanes: BTreeSet<Lane> = questions.keys().map(|key| Lane::of(key.as_bytes())).collect();
        let expects =
            |book: &Book| lanes.iter().map(|lane| (*lane, Bytes::copy_from_slice(book.expects(*lane)))).collect();
        let marks = self.book().map_or_else(Vec::new, expects);
        self.asks(Request::Inspect { questions, marks }, world);
    }

    /// Sends a request that changes nothing.
    pub fn asks(&self, request: Request, world: &mut Outside) {
        world.redis.send(self.connection, request);
    }

    pub fn has_answer(&self, world: &Outside) -> bool {
        world.redis.has_answer(self.connection)
    }

    /// Returns the answer to the last request, once all of it has been answered.
    pub fn take_answer(&mut self, world: &mut Outside) -> Option<Answer> {
        let answer = world.redis.take_answer(self.connection)?;
        let (Some(lanes), Answer::Called(call, called)) = (&mut self.lanes, &answer) else { return Some(answer) };
        if *called != Called::Done {
            return Some(answer);
        }
        lanes.book.acknowledged(call);
        lanes.waiting -= 1;
        let lane = Lane::of(call.keys[0].as_bytes());
        match lanes.homes.get(&lane) == Some(&world.redis.home_of(lane)) {
            true => world.redis.is_noticed(lane),
            // It was redirected.
            false => lanes.homes = world.redis.homes(),
        }
        if lanes.waiting > 0 || lanes.sends(self.connection, world) {
            return None;
        }
        // The head has more fields, but nobody else can have written it.
        Some(Answer::Executed { found: Some(std::mem::take(&mut lanes.checkpoint)) })
    }
}

impl Lanes {
    /// Sends the calls of the next step that has any. Returns whether there was one.
    fn sends(&mut self, connection: usize, world: &mut Outside) -> bool {
        while self.waiting == 0 {
            let Some(calls) = self.steps.pop_front() else { return false };
            self.waiting = calls.len();
            calls.into_iter().for_each(|call| world.redis.send(connection, Request::Call(call)));
        }
        true
    }
}
