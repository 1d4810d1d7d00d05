//! Stands in for `bridge::load`: performs the errands of the real loader in small steps. Locks are held for too long,
//! connections are lost, and tables change between any two of these steps.

use super::Outside;
use super::daemon::{Setting, fails, known_types};
use super::postgres::{self, Extra, PAGES, RowId, Values};
use crate::change::Nonce;
use crate::checkpoint::Blocked;
use crate::command::{Key, Unwritable};
use crate::loader::range::{Extent, KeyBound, Range, Span, Tid, TidBound};
use crate::loader::{
    self, Asks, Brought, Cause, Got, Loadable, LookedUp as CoreLookedUp, Measures, Reading, Task, Unread, VisitId,
};
use crate::progress::visibility::Snapshot;
use crate::resp::batch::Members;
use crate::schema::TableId;
use crate::session::load_messages::{ChunkId, Content, Floor, Floors, FromLoad, KeysToRead, LoadOrder};
use std::collections::{BTreeSet, VecDeque};

const CHUNKS_IN_CHANNEL: usize = 2;

/// The description of a table as it was looked up.
#[derive(Debug, Clone, Copy)]
pub struct Described {
    /// See [`super::Postgres::columns`].
    columns: u64,
    shape: u64,
}

pub type Heard = loader::Heard<Described>;
pub type Errand = loader::Errand<Described>;
pub type LookedUp = CoreLookedUp<Described>;

pub struct Errands {
    loader: loader::Loader<Described>,
    orders: VecDeque<LoadOrder>,
    /// The outstanding request of the loader, apart from visits.
    asked: Option<Errand>,
    visits: Vec<Visit>,
    /// Messages that the session has not received yet. While there are too many of them, the loader receives nothing.
    said: VecDeque<FromLoad>,
    /// Where scans continue: a cursor is an index into this list, starting at 1.
    cursors: Vec<Key>,
    /// Chunks of single keys that are not judged yet.
    of_keys: BTreeSet<ChunkId>,
}

#[derive(Clone, Copy)]
enum Step {
    Visit(usize),
    Answer,
    Orders,
    Wake,
}

struct Visit {
    id: VisitId,
    asks: Asks,
    parts: Vec<Reading<Described>>,
    stage: Stage,
}

enum Stage {
    SetsOut,
    /// The floors make the session keep a record of what the snapshot may miss.
    Reads(Vec<Floor>),
    Marks(Vec<Got>),
    Returns(Vec<Got>),
    Failed(Cause),
}

impl Errands {
    pub fn new(retired: Vec<String>, world: &mut Outside, setting: &Setting) -> Self {
        let measures = Measures {
            pages_a_chunk: *world.rng.pick(&[2, 3, 64]),
            keys_a_question: *world.rng.pick(&[2, 4]),
            readers: 2,
            chunks_out: *world.rng.pick(&[3, 5]),
            together: *world.rng.pick(&[1, 3]),
            keys_remembered: *world.rng.pick(&[0, 3, 1_000]),
            members: Members::Encoded,
        };
        let mut errands = Errands {
            loader: loader::Loader::new(setting.specs.clone(), setting.limits, measures, retired),
            orders: VecDeque::new(),
            asked: None,
            visits: Vec::new(),
            said: VecDeque::new(),
            cursors: Vec::new(),
            of_keys: BTreeSet::new(),
        };
        let todo = errands.loader.start(world.now());
        errands.set_out(todo, world);
        errands
    }

    /// Returns whether no read is in progress and no message is in transit.
    pub fn is_idle(&self) -> bool {
        self.loader.is_idle() && self.orders.is_empty() && self.said.is_empty() && self.of_keys.is_empty()
    }

    pub fn orders(&mut self, order: LoadOrder) {
        self.orders.push_back(order);
    }

    /// Returns whether this chunk consists of single keys. May be called only once, when the chunk is judged.
    pub fn was_of_keys(&mut self, chunk: ChunkId) -> bool {
        self.of_keys.remove(&chunk)
    }

    pub fn has_said(&self) -> bool {
        !self.said.is_empty()
    }

    pub fn takes_said(&mut self) -> Option<FromLoad> {
        self.said.pop_front()
    }

    pub fn can_step(&self, world: &Outside) -> bool {
        let hears = self.asked.is_some() || !self.orders.is_empty() || self.wakes(world);
        !self.visits.is_empty() || (hears && self.may_hear())
    }

    fn may_hear(&self) -> bool {
        self.said.len() < CHUNKS_IN_CHANNEL
    }

    fn wakes(&self, world: &Outside) -> bool {
        self.loader.wakes_at().is_some_and(|at| at <= world.now())
    }

    pub fn step(&mut self, floors: &Floors, world: &mut Outside, setting: &Setting) {
        let mut can: Vec<Step> = (0..self.visits.len()).map(Step::Visit).collect();
        if self.may_hear() {
            can.extend(self.asked.is_some().then_some(Step::Answer));
            can.extend((!self.orders.is_empty()).then_some(Step::Orders));
            can.extend(self.wakes(world).then_some(Step::Wake));
        }
        match *world.rng.pick(&can) {
            Step::Visit(which) => self.visit(which, floors, world, setting),
            Step::Answer => {
                let Some(asked) = self.asked.take() else { return };
                let answer = self.answer(&asked, world, setting);
                self.hears(answer, world);
            }
            Step::Orders => {
                let some = self.orders.len().min(1 + world.rng.below(3) as usize);
                let orders = self.orders.drain(..some).collect();
                self.hears(Heard::Ordered(orders), world);
            }
            Step::Wake => self.hears(Heard::Woke, world),
        }
    }

    fn hears(&mut self, heard: Heard, world: &mut Outside) {
        world.log.coverage.saw(&heard);
        match &heard {
            Heard::LookedUp(tables) => tables.iter().for_each(|table| world.log.coverage.saw(table)),
            Heard::Visited(_, got) => got.iter().for_each(|got| world.log.coverage.saw(got)),
            Heard::NotVisited(_, unread) => world.log.coverage.saw(&unread.cause),
            _ => {}
        }
        let todo = self.loader.hears(heard, world.now());
        self.set_out(todo, world);
    }

    fn set_out(&mut self, errands: Vec<Errand>, world: &mut Outside) {
        for errand in errands {
            world.log.coverage.saw(&errand);
            match errand {
                Errand::Say(message) => {
                    if let FromLoad::Chunk(chunk) = &*message {
                        world.say(|_| format!("  chunk {:?} of {:?} under {}", chunk.id, chunk.table, chunk.snapshot));
                        if chunk.load.is_none() {
                            self.of_keys.insert(chunk.id);
                        }
                    }
                    self.said.push_back(*message);
                }
                Errand::BeginsAgain { table, because } => {
                    world.log.saw(&because);
                    world.say(|_| format!("  {table:?} begins again: {because:?}"));
                }
                Errand::Visit { visit: id, parts, asks } => {
                    let spans = parts.iter().filter_map(|part| match &part.task {
                        Task::Range(range) => Some(&range.span),
                        Task::Orphans(_) | Task::Keys(_) => None,
                    });
                    spans.for_each(|span| world.log.coverage.saw(span));
                    world.say(|_| format!("  visit {id:?}: {:?}", parts.iter().map(brief).collect::<Vec<_>>()));
                    self.visits.push(Visit { id, asks, parts, stage: Stage::SetsOut });
                }
                question @ (Errand::LookUp { .. } | Errand::FindEmpty { .. } | Errand::Scan { .. }) => {
                    assert!(self.asked.replace(question).is_none(), "one question at a time");
                }
            }
        }
    }

    // ---- questions --------------------------------------------------------------------------------------------------

    fn answer(&mut self, asked: &Errand, world: &mut Outside, setting: &Setting) -> Heard {
        match asked {
            Errand::LookUp { tables, asks, .. } => {
                if let Some(cause) = trouble(*asks, world) {
                    return Heard::NotLookedUp(unread(cause));
                }
                Heard::LookedUp(tables.iter().map(|table| look_up(*table, world, setting)).collect())
            }
            Errand::FindEmpty { asks, .. } | Errand::Scan { asks, .. }
                if *asks == Asks::Comparison && fails(world, 4) =>
            {
                Heard::Refused { why: "it is not allowed".to_owned() }
            }
            Errand::FindEmpty { tables, .. } => {
                let is_empty = |table: &&TableId| {
                    let mut literals = setting.specs[table.index()].literals();
                    literals.all(|literal| world.redis.scan_page(literal, None).0.is_empty())
                };
                Heard::Empty(tables.iter().filter(is_empty).copied().collect())
            }
            Errand::Scan { prefix, cursor, enough, .. } => self.scan(prefix, *cursor, *enough, world),
            Errand::Visit { .. } | Errand::Say(_) | Errand::BeginsAgain { .. } => unreachable!("it is not a question"),
        }
    }

    fn scan(&mut self, prefix: &str, cursor: u64, enough: usize, world: &Outside) -> Heard {
        let mut after = cursor.checked_sub(1).map(|at| self.cursors[at as usize].clone());
        let mut keys = Vec::new();
        loop {
            let (more, next) = world.redis.scan_page(prefix, after.as_ref());
            keys.extend(more);
            after = next;
            if after.is_none() || keys.len() >= enough {
                break;
            }
        }
        self.cursors.extend(after.clone());
        let next = after.map_or(0, |_| self.cursors.len() as u64);
        Heard::Scanned { next, keys }
    }

    // ---- visits -----------------------------------------------------------------------------------------------------

    /// Advances a visit by one stage: the snapshot and the rows, then the watermarks, then the report to the loader.
    fn visit(&mut self, which: usize, floors: &Floors, world: &mut Outside, setting: &Setting) {
        let returns = matches!(self.visits[which].stage, Stage::Returns(_) | Stage::Failed(_));
        if returns && !self.may_hear() {
            return;
        }
        let Visit { id, asks, parts, stage } = self.visits.swap_remove(which);
        let stage = match stage {
            Stage::SetsOut => Stage::Reads(parts.iter().map(|_| floors.open()).collect()),
            Stage::Reads(floors) => match trouble(asks, world) {
                Some(cause) => Stage::Failed(cause),
                None => read(&parts, floors, world, setting),
            },
            Stage::Marks(mut got) => {
                got.iter_mut().for_each(|got| mark(got, world));
                Stage::Returns(got)
            }
            Stage::Returns(got) => return self.hears(Heard::Visited(id, got), world),
            Stage::Failed(cause) => {
                world.say(|_| format!("  visit {id:?} failed: {cause:?}"));
                return self.hears(Heard::NotVisited(id, unread(cause)), world);
            }
        };
        self.visits.push(Visit { id, asks, parts, stage });
    }
}

fn brief(part: &Reading<Described>) -> String {
    format!("{:?} {:?}", part.table, part.task)
}

fn unread(cause: Cause) -> Unread {
    let why = match cause {
        Cause::Table => postgres::unfit(),
        _ => Blocked { because: format!("{cause:?}"), remedy: String::new() },
    };
    Unread { cause, text: why.to_string(), why }
}

/// Returns a failure now and then: the connection is lost, or the server cannot answer, in which case a comparison is
/// given up.
fn trouble(asks: Asks, world: &mut Outside) -> Option<Cause> {
    match world.rng.below(50) {
        0 => Some(Cause::Connection),
        1 if asks == Asks::Load || world.operated => Some(Cause::Query),
        _ => None,
    }
}

fn look_up(table: TableId, world: &mut Outside, setting: &Setting) -> LookedUp {
    let postgres = &world.postgres;
    if postgres.unfit[table.index()] {
        return LookedUp::Blocked(postgres::unfit());
    }
    if !postgres.is_readable(table.0) && world.rng.percent(30) {
        return LookedUp::Locked(unread(Cause::Lock).why);
    }
    let (columns, catalog) = (postgres.columns[table.index()], postgres.mark(table.0));
    let composition = postgres.composition(table.0);
    let leaves = composition.leaves.len();
    let extent = match world.rng.percent(20) {
        true => Extent::Leaves(leaves),
        false => Extent::Pages((0..leaves).map(|_| *world.rng.pick(&[0, 1, PAGES, PAGES])).collect()),
    };
    LookedUp::Loadable(Loadable {
        fingerprint: setting.mapping(table, columns).fingerprint,
        catalog,
        types: setting.types(table, columns),
        estimated_rows: 3,
        known_types: known_types(),
        extent,
        composition,
        described: Described { columns, shape: catalog.shape },
    })
}

/// Writes a watermark for one part of a visit.
fn mark(got: &mut Got, world: &mut Outside) {
    let Got::Brought(brought) = got else { return };
    let mut nonce = [0; 16];
    nonce[..8].copy_from_slice(&world.next_number().to_le_bytes());
    brought.nonce = Nonce(nonce);
    world.postgres.emit_mark(brought.nonce, &mut world.rng);
}

/// Reads all parts under one snapshot.
fn read(parts: &[Reading<Described>], floors: Vec<Floor>, world: &mut Outside, setting: &Setting) -> Stage {
    let is_there = |part: &Reading<Described>| {
        let (now, then) = (world.postgres.columns[part.table.index()], part.described.columns);
        let is_dropped = postgres::has_extra(then) && !postgres::has_extra(now);
        !world.postgres.unfit[part.table.index()] && !is_dropped
    };
    if !parts.iter().all(is_there) {
        return Stage::Failed(Cause::Table);
    }
    // A read of one table waits for a while if another transaction is truncating the table. A read of several tables
    // does not wait.
    if !parts.iter().all(|part| world.postgres.is_readable(part.table.0)) {
        return match parts.len() > 1 || world.rng.percent(10) {
            true => Stage::Failed(Cause::Lock),
            false => Stage::Reads(floors),
        };
    }
    let snapshot: Snapshot = world.postgres.snapshot().parse().expect("a snapshot");
    let mut got = Vec::new();
    let mut is_full = false;
    for (place, (part, floor)) in parts.iter().zip(floors).enumerate() {
        is_full |= place > 0 && world.rng.percent(15);
        got.push(match is_full {
            true => Got::Crowded,
            false => read_part(part, snapshot.clone(), floor, world, setting),
        });
    }
    Stage::Marks(got)
}

fn read_part(
    Reading { table, task, encoding, described }: &Reading<Described>,
    snapshot: Snapshot,
    floor: Floor,
    world: &mut Outside,
    setting: &Setting,
) -> Got {
    let changed = world.postgres.mark(table.0).shape != described.shape;
    if matches!(task, Task::Range(_)) && changed && world.rng.percent(70) {
        return Got::Gone;
    }
    let columns = described.columns;
    let asks = |extra: Extra| if postgres::has_extra(columns) { extra } else { Extra::NoColumn };
    let rows = world.postgres.rows(table.0).into_iter();
    let rows: Vec<_> = rows.map(|(row, values, extra, tid)| (row, values, asks(extra), tid)).collect();
    let mut unwritable = Vec::new();
    let (mut filenode, mut rest) = (None, None);
    let content = match task {
        Task::Range(range) => {
            filenode = Some(world.postgres.filenode(table.0, range.leaf));
            let limit = *world.rng.pick(&[usize::MAX, usize::MAX, usize::MAX, 1, 2]);
            let (rows, left) = of_range(&rows, range, limit);
            rest = left;
            let parts = rows.chunks(setting.rows_a_part());
            Content::Rows(
                parts.map(|rows| encoded(rows, columns, encoding.members, &mut unwritable, setting)).collect(),
            )
        }
        Task::Orphans(keys) => {
            let exist = rows.iter().map(|(row, ..)| setting.key(*row)).filter(|key| keys.contains(key)).collect();
            Content::Orphans { asked: keys.clone(), exist }
        }
        Task::Keys(KeysToRead { keys, checks, .. }) => {
            let found = rows.iter().filter(|(row, ..)| keys.contains(&setting.key(*row)));
            let mut found: Vec<Found> = found.map(|(row, values, extra, _)| (*row, *values, *extra)).collect();
            // Rows that do not fit into the same batch are left for another read.
            let left = if found.len() > 1 && world.rng.percent(15) { found.pop() } else { None };
            let left = left.map(|(row, ..)| setting.key(row));
            let (unread, asked) = keys.iter().cloned().partition(|key| Some(key) == left.as_ref());
            let found = encoded(&found, columns, encoding.members, &mut unwritable, setting);
            let mapped_as = setting.mapping(*table, columns).fingerprint;
            Content::Keys { asked, found, unread, checks: *checks, mapped_as }
        }
    };
    let (keyless, nonce) = (Vec::new(), Nonce([0; 16]));
    Got::Brought(Box::new(Brought { snapshot, filenode, content, rest, unwritable, keyless, nonce, floor }))
}

type Found = (RowId, Values, Extra);

fn encoded(
    rows: &[Found],
    columns: u64,
    members: Members,
    unwritable: &mut Vec<Unwritable>,
    setting: &Setting,
) -> crate::command::EncodedRows {
    let (encoded, not_taken) = setting.encoded(rows, columns, members);
    unwritable.extend(not_taken);
    encoded
}

/// Returns the rows of a range in order, and the rest of the range if the limits were reached.
fn of_range(rows: &[(RowId, Values, Extra, Tid)], range: &Range, limit: usize) -> (Vec<Found>, Option<Range>) {
    let is_inside = |(row, _, _, tid): &&(RowId, Values, Extra, Tid)| {
        let number = |bound: &KeyBound| bound.0[0].parse::<u64>().expect("an id");
        postgres::leaf_of(*row) == range.leaf
            && match &range.span {
                Span::Places { from, to } => {
                    let begins = match from {
                        TidBound::Page(page) => tid.block >= *page,
                        TidBound::Behind(other) => tid > other,
                    };
                    begins && to.is_none_or(|to| tid.block < to)
                }
                Span::Keys { after, through } => {
                    after.as_ref().is_none_or(|after| row.id > number(after))
                        && through.as_ref().is_none_or(|through| row.id <= number(through))
                }
            }
    };
    let mut inside: Vec<_> = rows.iter().filter(is_inside).collect();
    match range.span {
        Span::Places { .. } => inside.sort_by_key(|(.., tid)| *tid),
        Span::Keys { .. } => inside.sort_by_key(|(row, ..)| row.id),
    }
    let all = inside.len();
    inside.truncate(limit.min(range.at_most_rows.map_or(usize::MAX, |most| most.get() as usize)));
    let rest = inside.last().filter(|_| inside.len() < all).map(|(row, _, _, tid)| {
        let span = match &range.span {
            Span::Places { to, .. } => Span::Places { from: TidBound::Behind(*tid), to: *to },
            Span::Keys { through, .. } => {
                Span::Keys { after: Some(KeyBound(vec![row.id.to_string()])), through: through.clone() }
            }
        };
        Range { leaf: range.leaf, span, at_most_rows: range.at_most_rows }
    });
    (inside.into_iter().map(|(row, values, extra, _)| (*row, *values, *extra)).collect(), rest)
}
