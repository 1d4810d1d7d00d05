//! Random schedules of the book against nodes that go back, daemons that die in mid-round, and writes that arrive late.
//!
//! After every write an observer reads Redis as a reader would, and compares what the record and the marks promise with
//! what Postgres had at the marks' places. After the last fault everything must become complete.
//!
//! Three nodes have six lanes of a few keys each. Loads are simple: a chunk is exact at the place of its round. More
//! seeds: `LANES_SEEDS=4000 LANES_FROM=60 cargo test -p prefetchd-core lanes::world`.

use super::book::{Book, Loss, Round, Survey};
use super::mark::Mark;
use super::record::{Bitmap, Extra};
use super::script::Call;
use super::{Lane, tags};
use crate::change::{Begin, CommitTime, NewRow, RowBuilder};
use crate::checkpoint::{Checkpoint, LastTransaction, Place, TableMark, TableState, Within};
use crate::command::{Base, Command, Key};
use crate::format::Form;
use crate::lsn::{CommitLsn, EndLsn, Lsn};
use crate::resp::batch::{Batch, Limits, OwnKeys};
use crate::schema::{CatalogMark, Field, Layout, NullRule, Render};
use crate::sim;
use crate::sim::store::{Called, Store};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

const NODES: usize = 3;
/// The hash tags of the lanes. The record lies in the first.
const TAGS: [&str; 6] = ["s", "a", "b", "c", "d", "e"];
const KEYS: usize = 15;
/// The writes that a node may lose.
const MEMORY: usize = 40;

struct Rng(sim::Rng);

impl Rng {
    fn below(&mut self, n: usize) -> usize {
        usize::try_from(self.0.below(n as u64)).expect("small")
    }

    fn percent(&mut self, n: usize) -> bool {
        self.below(100) < n
    }
}

fn own() -> OwnKeys {
    OwnKeys::under("prefetchd:{s}:")
}

fn lsn(n: u64) -> Lsn {
    Lsn::new(n).expect("not zero")
}

fn end(n: u64) -> EndLsn {
    EndLsn(lsn(n))
}

fn key(n: usize) -> Key {
    Key(format!("{{{}}}:{n}", TAGS[n % TAGS.len()]).into())
}

fn lane_of(n: usize) -> Lane {
    Lane::of(key(n).as_bytes())
}

fn node_of(lane: Lane) -> usize {
    TAGS.iter().position(|tag| Lane::of(tag.as_bytes()) == lane).expect("a lane of this world") % NODES
}

// ---- Postgres -------------------------------------------------------------------------------------------------------

/// Two cells. Each value occurs once, and later ones are greater.
type Values = (u64, u64);
type Rows = [Option<Values>; KEYS];

#[derive(Clone, Copy)]
enum Change {
    Full(usize, Values),
    First(usize, u64),
    Second(usize, u64),
    Delete(usize),
    Truncate,
}

struct Transaction {
    begin: Begin,
    end: EndLsn,
    changes: Vec<Change>,
    /// The rows before it.
    before: Rows,
}

impl Change {
    fn apply(self, rows: &mut Rows) {
        match self {
            Change::Full(key, values) => rows[key] = Some(values),
            Change::First(key, value) => rows[key].as_mut().expect("a row").0 = value,
            Change::Second(key, value) => rows[key].as_mut().expect("a row").1 = value,
            Change::Delete(key) => rows[key] = None,
            Change::Truncate => *rows = Rows::default(),
        }
    }
}

#[derive(Default)]
struct Postgres {
    transactions: Vec<Transaction>,
    rows: Rows,
    values: u64,
    /// What was confirmed; it may go back to an earlier one when the server restarts.
    confirmed: Vec<EndLsn>,
}

impl Postgres {
    fn confirmed(&self) -> EndLsn {
        self.confirmed.last().copied().unwrap_or(end(1))
    }

    fn flushed(&self) -> EndLsn {
        end(100 * self.transactions.len() as u64 + 95)
    }

    fn commits(&mut self, rng: &mut Rng) {
        let before = self.rows;
        let mut changes = Vec::new();
        for _ in 0..=rng.below(5) {
            let key = rng.below(KEYS);
            self.values += 1;
            let value = self.values;
            let change = match (self.rows[key], rng.below(20)) {
                (_, 0) => Change::Truncate,
                (Some(_), 1..=4) => Change::Delete(key),
                (Some(_), 5..=9) => Change::First(key, value),
                (Some(_), 10..=14) => Change::Second(key, value),
                _ => Change::Full(key, (value, value)),
            };
            change.apply(&mut self.rows);
            changes.push(change);
        }
        let at = 100 * (self.transactions.len() as u64 + 1);
        let xid = 700 + u32::try_from(self.transactions.len()).expect("few");
        let begin = Begin { xid, commit: CommitLsn(lsn(at + 50)), time: CommitTime(1) };
        self.transactions.push(Transaction { begin, end: end(at + 80), changes, before });
    }

    fn rows_at(&self, place: Place) -> Rows {
        let next = self.transactions.partition_point(|t| t.begin.commit.0 < place.at);
        let Some(next) = self.transactions.get(next) else { return self.rows };
        let mut rows = next.before;
        if next.begin.commit.0 == place.at {
            let done = usize::try_from(place.done).expect("few");
            next.changes[..done].iter().for_each(|change| change.apply(&mut rows));
        }
        rows
    }

    fn truncates_after(&self, place: Place) -> bool {
        let after = self.transactions.iter().filter(|t| t.begin.commit.0 >= place.at);
        after.flat_map(|t| &t.changes).any(|change| matches!(change, Change::Truncate))
    }

    /// Every version of a row from one place to another.
    fn versions(&self, key: usize, from: EndLsn, to: Place) -> BTreeSet<Option<Values>> {
        let mut versions = BTreeSet::from([self.rows_at(Place::between(from))[key], self.rows_at(to)[key]]);
        let first = self.transactions.partition_point(|t| t.begin.commit.0 < from.0);
        for transaction in &self.transactions[first..] {
            if transaction.begin.commit.0 > to.at {
                break;
            }
            for done in 0..=transaction.changes.len() as u64 {
                let place = Place { at: transaction.begin.commit.0, done };
                if (Place::between(from)..=to).contains(&place) {
                    versions.insert(self.rows_at(place)[key]);
                }
            }
        }
        versions
    }
}

// ---- Redis ----------------------------------------------------------------------------------------------------------

#[derive(Default)]
struct Redis {
    store: Store,
    /// What each node had before its last writes.
    past: [VecDeque<Store>; NODES],
}

impl Redis {
    fn row(&self, n: usize) -> Option<Values> {
        let fields = self.store.hash(key(n).as_bytes())?;
        let cell = |name: &[u8]| std::str::from_utf8(&fields[name]).expect("digits").parse().expect("a number");
        Some((cell(b"a"), cell(b"b")))
    }

    fn does(&mut self, call: &Call) -> Called {
        let node = node_of(Lane::of(call.keys[0].as_bytes()));
        let before = self.store.part(|lane, _| node_of(lane) == node);
        let called = self.store.call(call, 0);
        if !matches!(called, Called::Other(_)) {
            self.past[node].push_back(before);
            if self.past[node].len() > MEMORY {
                self.past[node].pop_front();
            }
        }
        called
    }

    fn goes_back(&mut self, node: usize, writes: usize) {
        for _ in 0..writes {
            let Some(before) = self.past[node].pop_back() else { return };
            self.store.replace(|lane, _| node_of(lane) == node, &before);
        }
    }

    fn survey(&self) -> Survey {
        let own = own();
        let mark = |tag: &&str| {
            let lane = Lane::of(tag.as_bytes());
            Some((lane, self.store.text(tags::mark_key(lane, "s").as_bytes())?.clone()))
        };
        Survey {
            head: self.store.text(own.checkpoint().as_bytes()).cloned(),
            entries: self.store.hash(own.tables().as_bytes()).cloned().unwrap_or_default().into_iter().collect(),
            lanes: self.store.text(own.lanes().as_bytes()).cloned(),
            marks: TAGS.iter().filter_map(mark).collect(),
        }
    }
}

// ---- a daemon -------------------------------------------------------------------------------------------------------

struct Daemon {
    book: Book,
    checkpoint: Checkpoint,
    /// The next transaction, and how many of its changes are done.
    next: (usize, u64),
    /// Lanes may be ahead up to here.
    ahead: Option<Place>,
    pending: BTreeSet<usize>,
    /// Lanes of which some rows may still be missing or old.
    lost: BTreeSet<Lane>,
    /// Keys that a load has still to write.
    load: Option<BTreeSet<usize>>,
}

/// The session has ended.
struct Ended;

fn layout() -> Arc<Layout> {
    let field = |(cell, name): (usize, &'static str)| Field { cell, name: name.into(), render: Render::AsIs };
    let fields = ["a", "b"].into_iter().enumerate().map(field).collect();
    Arc::new(Layout { fields, null: NullRule::Empty, cells: 2, ttl_ms: 9, form: Form::Hash })
}

fn put(n: usize, (first, second): Values) -> Command {
    let mut row = RowBuilder::with_capacity(0);
    [first, second].iter().for_each(|value| row.cell(Some(value.to_string().as_bytes())));
    Command::Put { key: key(n), layout: layout(), row: row.row() }
}

fn merge(n: usize, cells: [Option<u64>; 2]) -> Command {
    let mut tuple = vec![0, 2];
    for cell in cells {
        match cell {
            None => tuple.push(b'u'),
            Some(value) => {
                let text = value.to_string();
                tuple.push(b't');
                tuple.extend_from_slice(&u32::try_from(text.len()).expect("short").to_be_bytes());
                tuple.extend_from_slice(text.as_bytes());
            }
        }
    }
    let Ok(NewRow::Partial(row)) = NewRow::take(&mut tuple.into()) else { panic!("a cell is unchanged") };
    Command::Merge { key: key(n), base: Base::SameKey, layout: layout(), row }
}

fn correct(n: usize, rows: &Rows) -> Command {
    rows[n].map_or_else(|| Command::Delete { key: key(n) }, |values| put(n, values))
}

fn fresh(state: TableState) -> TableMark {
    TableMark::unread("t".to_owned(), 1, state)
}

/// What a batch leaves at a key.
enum State {
    Absent,
    Full(Values),
    Over([Option<u64>; 2]),
}

impl Daemon {
    fn table(&mut self) -> &mut TableMark {
        self.checkpoint.tables.get_mut("t").expect("the table")
    }

    fn has_caught_up(&self) -> bool {
        self.ahead <= Some(self.checkpoint.place())
    }

    /// The batch's changes, and the position behind them.
    fn delivers(&mut self, world: &mut World) -> Vec<Change> {
        let mut changes = Vec::new();
        let Postgres { transactions, .. } = &world.postgres;
        for _ in 0..=world.rng.below(3) {
            let (at, done) = self.next;
            let Some(transaction) = transactions.get(at) else { break };
            let rest = &transaction.changes[usize::try_from(done).expect("few")..];
            if rest.len() > 1 && world.rng.percent(25) {
                let part = 1 + world.rng.below(rest.len() - 1);
                changes.extend_from_slice(&rest[..part]);
                self.next = (at, done + part as u64);
                break;
            }
            changes.extend_from_slice(rest);
            self.next = (at + 1, 0);
        }
        changes
    }

    /// Moves the checkpoint to where the deliveries have come.
    fn advances(&mut self, postgres: &Postgres) {
        let (at, done) = self.next;
        let checkpoint = &mut self.checkpoint;
        if let Some(last) = at.checked_sub(1).map(|last| &postgres.transactions[last]) {
            checkpoint.lsn = checkpoint.lsn.max(last.end);
            if last.end == checkpoint.lsn {
                let Transaction { begin, end, .. } = last;
                checkpoint.last = Some(LastTransaction { end: *end, xid: begin.xid, time: begin.time });
            }
        }
        checkpoint.within = (done > 0).then(|| Within { begin: postgres.transactions[at].begin, changes_done: done });
        checkpoint.clearing.take_if(|begin| begin.commit.0 < checkpoint.lsn.0);
    }

    fn streams(&mut self, world: &mut World) -> Result<(), Ended> {
        let from = self.next;
        let changes = self.delivers(world);
        if changes.iter().any(|change| matches!(change, Change::Truncate)) {
            self.clears(from, world)?;
        }
        let (mut states, mut commands) = (BTreeMap::new(), Vec::new());
        for change in changes {
            match change {
                Change::Truncate => {
                    states.clear();
                    self.pending.clear();
                    let there = (0..KEYS).filter(|n| world.redis.row(*n).is_some());
                    commands = there.map(|n| Command::Delete { key: key(n) }).collect();
                }
                Change::Full(n, values) => _ = states.insert(n, State::Full(values)),
                Change::Delete(n) => _ = states.insert(n, State::Absent),
                Change::First(n, value) => over(&mut states, n, [Some(value), None]),
                Change::Second(n, value) => over(&mut states, n, [None, Some(value)]),
            }
        }
        let merges = self.table().state.is_established();
        let as_of = self.checkpoint.lsn;
        for (n, state) in states {
            match state {
                State::Absent => commands.push(Command::Delete { key: key(n) }),
                State::Full(values) => commands.push(put(n, values)),
                State::Over([Some(first), Some(second)]) => commands.push(put(n, (first, second))),
                State::Over(cells) if merges && !self.is_wrong(n) && world.redis.row(n).is_some() => {
                    // Now and then a row cannot be merged: it was at another key, or is too large.
                    if world.rng.percent(75) {
                        commands.push(merge(n, cells));
                    } else {
                        self.pending.insert(n);
                    }
                    continue;
                }
                State::Over(_) => {
                    self.pending.insert(n);
                    continue;
                }
            }
            self.pending.remove(&n);
        }
        self.advances(&world.postgres);
        self.writes(&commands, as_of, world)
    }

    /// Whether the row at this key may be another one than the stream has left.
    fn is_wrong(&self, n: usize) -> bool {
        self.pending.contains(&n) || self.lost.contains(&lane_of(n))
    }

    /// Removes some keys of a truncated table ahead of the position.
    fn clears(&mut self, from: (usize, u64), world: &mut World) -> Result<(), Ended> {
        let mut through = self.next.0;
        if self.next.1 > 0 {
            through += 1;
        }
        let truncates = |t: &&Transaction| t.changes.iter().any(|change| matches!(change, Change::Truncate));
        let last = world.postgres.transactions[from.0..through].iter().rfind(truncates).map(|t| t.begin);
        while world.rng.percent(40) {
            let there: Vec<usize> = (0..KEYS).filter(|n| world.redis.row(*n).is_some()).collect();
            let some: Vec<usize> = there.into_iter().filter(|_| world.rng.percent(50)).collect();
            if some.is_empty() {
                break;
            }
            let known = self.checkpoint.clearing;
            self.checkpoint.clearing = known.into_iter().chain(last).max_by_key(|begin| begin.commit);
            let commands: Vec<Command> = some.into_iter().map(|n| Command::Delete { key: key(n) }).collect();
            self.writes(&commands, self.checkpoint.lsn, world)?;
        }
        Ok(())
    }

    /// Reads some keys, which a load or an earlier batch has left, and writes them.
    fn reads(&mut self, world: &mut World) -> Result<(), Ended> {
        let wanted: BTreeSet<usize> = self.load.iter().flatten().chain(&self.pending).copied().collect();
        let some: Vec<usize> = wanted.into_iter().filter(|_| world.rng.percent(50)).collect();
        let rows = world.postgres.rows_at(self.checkpoint.place());
        for n in &some {
            self.pending.remove(n);
            self.load.iter_mut().for_each(|load| _ = load.remove(n));
        }
        let commands: Vec<Command> = some.into_iter().map(|n| correct(n, &rows)).collect();
        self.writes(&commands, self.checkpoint.lsn, world)
    }

    fn idles(&mut self, world: &mut World) -> Result<(), Ended> {
        if self.checkpoint.within.is_none() && self.next.0 == world.postgres.transactions.len() {
            self.checkpoint.lsn = world.postgres.flushed();
        }
        if world.rng.percent(20) && self.table().state == TableState::Loaded {
            self.table().ttl_until_ms = Some(world.ms());
        }
        self.writes(&[], self.checkpoint.lsn, world)
    }

    /// Writes a batch. Rows that are pending from now on are as of `as_of`.
    fn writes(&mut self, commands: &[Command], as_of: EndLsn, world: &mut World) -> Result<(), Ended> {
        let is_settled = self.pending.is_empty();
        let is_loaded = self.load.as_ref().is_some_and(BTreeSet::is_empty) && is_settled;
        let written = self.table().clone();
        let table = self.table();
        match table.state {
            _ if is_loaded => {
                *table = TableMark {
                    state: TableState::Loaded,
                    as_of: None,
                    catalog: Some(CatalogMark { shape: 1, storage: 1 }),
                    ..table.clone()
                };
            }
            TableState::Loaded if !is_settled => table.state = TableState::Incomplete,
            TableState::Incomplete if is_settled => (table.state, table.as_of) = (TableState::Loaded, None),
            _ => {}
        }
        if !is_settled && table.as_of.is_none() {
            table.as_of = Some(as_of);
        }
        let entry = (*table != written).then(|| table.to_json());
        if is_loaded {
            (self.load, self.checkpoint.healing) = (None, 0);
            self.lost.clear();
        }
        let entry = entry.map(|entry| Command::Enter { table: "t".to_owned(), entry });
        let commands: Vec<Command> = commands.iter().cloned().chain(entry).collect();
        self.rounds(&commands, world)
    }

    fn rounds(&mut self, commands: &[Command], world: &mut World) -> Result<(), Ended> {
        let mut batch = Batch::new(own(), Limits::default());
        commands.iter().for_each(|command| batch.push(command).expect("small"));
        self.checkpoint.seq += 1;
        self.checkpoint.beat_ms = world.ms();
        self.checkpoint.floor = self.checkpoint.floor.max(Some(world.postgres.confirmed()));
        let Round { before, calls, last, after } =
            self.book.plan(&batch, &self.checkpoint.to_json(), world.now, |_| None);
        assert_eq!(last, None, "nothing is announced");
        self.sends(before.into_iter().collect(), world)?;
        self.sends(calls, world)?;
        self.sends(vec![after], world)
    }

    /// Sends calls that may be done in any order, and waits for all of them.
    fn sends(&mut self, mut calls: Vec<Call>, world: &mut World) -> Result<(), Ended> {
        let dies = world.faults && world.rng.percent(2);
        while !calls.is_empty() {
            let call = calls.swap_remove(world.rng.below(calls.len()));
            if dies && world.rng.percent(40) {
                if world.rng.percent(60) {
                    world.late.push(call);
                }
                continue;
            }
            world.may_lose();
            let answer = world.does(&call);
            if answer != Called::Done {
                // The others are on their way.
                world.late.append(&mut calls);
                return Err(Ended);
            }
            if !dies {
                if world.rng.percent(5) && !call.only_reads() {
                    assert_eq!(world.does(&call), Called::Other(call.new.clone()), "sent again, it was done");
                }
                self.book.acknowledged(&call);
            }
        }
        if dies { Err(Ended) } else { Ok(()) }
    }

    fn confirms(&self, world: &mut World) {
        let Some(safe) = self.book.safe() else { return };
        let delivered = self.checkpoint.lsn;
        let confirmed = world.postgres.confirmed().max(safe.min(delivered));
        world.postgres.confirmed.push(confirmed);
        // Redis may have lost it, but had it.
        for (lane, at) in &world.written {
            assert!(safe <= at.end() || !self.book.listed().any(|listed| listed == *lane), "{safe} is beyond {at}");
        }
    }
}

fn over(states: &mut BTreeMap<usize, State>, n: usize, cells: [Option<u64>; 2]) {
    match states.entry(n).or_insert(State::Over([None, None])) {
        State::Absent => panic!("no row"),
        State::Full(values) => *values = (cells[0].unwrap_or(values.0), cells[1].unwrap_or(values.1)),
        State::Over(known) => *known = [cells[0].or(known[0]), cells[1].or(known[1])],
    }
}

// ---- the world ------------------------------------------------------------------------------------------------------

#[derive(Debug, Default, Clone, Copy)]
struct Counts {
    takeovers: usize,
    losses: usize,
    healed: usize,
    ahead: usize,
    promises: usize,
}

struct World {
    rng: Rng,
    now: Instant,
    start: Instant,
    postgres: Postgres,
    redis: Redis,
    /// Calls of sessions that have ended.
    late: Vec<Call>,
    faults: bool,
    /// The place of each lane's mark.
    reached: BTreeMap<Lane, Place>,
    /// The greatest that it ever was.
    written: BTreeMap<Lane, Place>,
    /// The newest value, or removal, that was seen of each key.
    seen: [u64; KEYS],
    /// Keys were removed ahead of the position.
    was_cleared: bool,
    counts: Counts,
}

impl World {
    fn new(seed: u64) -> Self {
        let now = Instant::now();
        World {
            rng: Rng(sim::Rng(seed)),
            now,
            start: now,
            postgres: Postgres::default(),
            redis: Redis::default(),
            late: Vec::new(),
            faults: true,
            reached: BTreeMap::new(),
            written: BTreeMap::new(),
            seen: [0; KEYS],
            was_cleared: false,
            counts: Counts::default(),
        }
    }

    fn ms(&self) -> u64 {
        u64::try_from(self.now.duration_since(self.start).as_millis()).expect("not long") + 1_000
    }

    fn does(&mut self, call: &Call) -> Called {
        let answer = self.redis.does(call);
        if let (Some(lane), Called::Done) = (call.lane, &answer) {
            let place = Mark::read(&call.new).expect("a mark").place;
            let written = self.written.entry(lane).or_insert(place);
            *written = place.max(*written);
            let before = self.reached.insert(lane, place);
            assert!(before <= Some(place), "lane {lane} falls to {place}");
        }
        self.observes();
        answer
    }

    fn forgets(&mut self, which: impl Fn(usize) -> bool) {
        (0..KEYS).filter(|n| which(*n)).for_each(|n| self.seen[n] = 0);
    }

    fn may_lose(&mut self) {
        if !self.faults {
            return;
        }
        if self.rng.below(150) == 0 {
            let node = self.rng.below(NODES);
            let writes = if self.rng.percent(10) { MEMORY } else { 1 + self.rng.below(8) };
            self.redis.goes_back(node, writes);
            self.forgets(|n| node_of(lane_of(n)) == node);
            let marks = self.redis.survey().marks;
            let places = marks.iter().map(|(lane, mark)| (*lane, Mark::read(mark).expect("a mark").place));
            self.reached = places.collect();
            self.observes();
        }
        if self.rng.percent(10) && !self.late.is_empty() {
            let call = self.late.swap_remove(self.rng.below(self.late.len()));
            self.does(&call);
        }
    }

    /// Reads everything as a reader would.
    fn observes(&mut self) {
        let survey = self.redis.survey();
        let head = survey.head.clone().unwrap_or_default();
        let extra = Extra::of(&head);
        let bitmap = Bitmap::new(survey.lanes.as_deref());
        for n in 0..KEYS {
            if let Some(values) = self.redis.row(n) {
                let version = values.0.max(values.1);
                assert!(version >= self.seen[n], "{} went back to {version} from {}", key(n), self.seen[n]);
                self.seen[n] = version;
            }
        }
        let Ok(checkpoint) = Checkpoint::read(&head, &survey.entries) else { return };
        let Some(table) = checkpoint.tables.get("t") else { return };
        for n in 0..KEYS {
            let lane = lane_of(n);
            let place = match survey.marks.get(&lane).map(|mark| Mark::read(mark).expect("a mark")) {
                Some(mark) => {
                    let is_below = checkpoint.floor.is_some_and(|floor| mark.place.end() < floor);
                    if mark.epoch > extra.news || mark.whole < extra.whole || is_below {
                        continue;
                    }
                    mark.place
                }
                None if bitmap.lists(lane) => continue,
                None => checkpoint.place(),
            };
            // Of a lane that went back to before a TRUNCATE, some rows may be gone already.
            self.was_cleared |= checkpoint.clearing.is_some();
            let is_cleared = self.was_cleared && self.postgres.truncates_after(place);
            self.judges(n, place, table, is_cleared);
        }
    }

    fn judges(&mut self, n: usize, place: Place, table: &TableMark, may_be_cleared: bool) {
        let (found, wanted) = (self.redis.row(n), self.postgres.rows_at(place)[n]);
        let is_cleared = may_be_cleared && found.is_none();
        match table.state {
            TableState::Healing => {}
            TableState::Loaded => {
                assert!(table.as_of.is_none());
                assert!(found == wanted || is_cleared, "{} is {found:?}, not {wanted:?} at {place}", key(n));
                self.counts.promises += 1;
            }
            TableState::Loading | TableState::Incomplete if found.is_none() => {}
            TableState::Loading | TableState::Incomplete => {
                let from = table.as_of.unwrap_or(place.end()).min(place.end());
                let versions = self.postgres.versions(n, from, place);
                assert!(versions.contains(&found), "{} is {found:?} at {place}, not one of {versions:?}", key(n));
            }
        }
    }

    fn takes_over(&mut self) -> Result<Daemon, Ended> {
        self.counts.takeovers += 1;
        let survey = self.redis.survey();
        let mut book = Book::new(own(), "s", &survey, self.rng.0.next(), self.now);
        let (confirmed, flushed) = (self.postgres.confirmed(), self.postgres.flushed());
        let judged = book.judge(confirmed, flushed);
        let found = Checkpoint::read(survey.head.as_deref().unwrap_or_default(), &survey.entries).ok();
        let mut ahead = None;
        let loss = judged.loss();
        let mut lost = BTreeSet::new();
        let (checkpoint, load) = match found.filter(|_| !matches!(loss, Some(Loss::Everything(_)))) {
            Some(mut found) => {
                if let Some(Loss::Some(of)) = &loss {
                    self.counts.healed += 1;
                    book.heal(&judged.lost);
                    lost.clone_from(&of.lanes);
                }
                found.healing = u16::try_from(lost.len()).expect("few lanes");
                ahead = judged.greatest;
                self.counts.ahead += usize::from(judged.least < judged.greatest);
                if let Some(least) = judged.least.filter(|least| *least < found.place()) {
                    found.lsn = least.end().max(found.base).min(found.lsn);
                    found.within = None;
                }
                let table = found.tables.get_mut("t").expect("the table");
                let loads = table.state != TableState::Loaded;
                if loads {
                    let state = if table.state == TableState::Healing { table.state } else { TableState::Loading };
                    *table = TableMark { as_of: table.as_of, ..fresh(state) };
                }
                found.epoch += 1;
                (found, loads)
            }
            None => {
                self.counts.losses += 1;
                book.disown();
                let head = r#"{"system_id":"7","timeline":1,"database":"shop","lsn":"0/1","state":"ready","epoch":1,
                               "seq":1,"beat_ms":1000,"base":"0/1","entries":0}"#;
                let head = Checkpoint::head(head.as_bytes()).expect("the settled format");
                let tables = BTreeMap::from([("t".to_owned(), fresh(TableState::Healing))]);
                (Checkpoint { lsn: flushed, base: flushed, tables, ..head }, true)
            }
        };
        let transactions = &self.postgres.transactions;
        let next = transactions.iter().position(|t| t.begin.commit.0 >= checkpoint.lsn.0).unwrap_or(transactions.len());
        let next = (next, checkpoint.within.map_or(0, |within| within.changes_done));
        let is_read = |n: &usize| load || lost.contains(&lane_of(*n));
        let load = (load || !lost.is_empty()).then(|| (0..KEYS).filter(is_read).collect());
        let entry = checkpoint.tables["t"].to_json();
        let mut daemon = Daemon { book, checkpoint, next, ahead, pending: BTreeSet::new(), lost, load };
        let entries = [Command::Delete { key: own().tables().clone() }, Command::Enter { table: "t".into(), entry }];
        daemon.rounds(&entries, self)?;
        Ok(daemon)
    }

    fn runs(&mut self, steps: usize) -> Option<Daemon> {
        let mut daemon: Option<Daemon> = None;
        for _ in 0..steps {
            self.now += Duration::from_millis(1 + self.rng.below(2_000) as u64);
            if self.faults && self.rng.percent(50) {
                self.postgres.commits(&mut self.rng);
            }
            if self.faults && self.rng.percent(2) && daemon.is_none() {
                // It restarts.
                let keeps = self.postgres.confirmed.len().saturating_sub(self.rng.below(4));
                self.postgres.confirmed.truncate(keeps);
            }
            self.may_lose();
            let Some(mut running) = daemon.take() else {
                daemon = self.takes_over().ok();
                continue;
            };
            let is_between = running.checkpoint.within.is_none();
            let reads = is_between && running.has_caught_up();
            let done = match self.rng.below(10) {
                0..=2 if reads => running.reads(self),
                3..=4 if is_between => running.idles(self),
                _ => running.streams(self),
            };
            if self.rng.percent(50) {
                running.confirms(self);
            }
            let is_frozen = self.faults && self.rng.percent(3);
            daemon = done.ok().filter(|()| !is_frozen).map(|()| running);
        }
        daemon
    }

    fn settles(&mut self) {
        self.faults = false;
        for call in std::mem::take(&mut self.late) {
            self.does(&call);
        }
        let daemon = self.runs(150).expect("nothing goes wrong");
        assert_eq!(daemon.checkpoint.tables["t"].state, TableState::Loaded);
        let last = self.postgres.transactions.last().expect("some").end;
        assert!(daemon.book.safe() >= Some(last), "{:?}", daemon.book.safe());
        let rows: Vec<Option<Values>> = (0..KEYS).map(|n| self.redis.row(n)).collect();
        assert_eq!(rows, self.postgres.rows);
        let survey = self.redis.survey();
        let book = Book::new(own(), "s", &survey, 1, self.now);
        let judged = book.judge(self.postgres.confirmed(), self.postgres.flushed());
        assert_eq!(judged.loss(), None);
    }
}

fn run(seed: u64) -> Counts {
    let mut world = World::new(seed);
    world.runs(120);
    world.settles();
    world.counts
}

#[test]
fn what_the_record_promises_is_true_whatever_fails() {
    let number = |name| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let (from, seeds) = (number("LANES_FROM").unwrap_or(0), number("LANES_SEEDS").unwrap_or(60));
    let mut sum = Counts::default();
    for seed in from..from + seeds {
        let counts = std::panic::catch_unwind(|| run(seed)).unwrap_or_else(|_| panic!("seed {seed}"));
        sum.takeovers += counts.takeovers;
        sum.losses += counts.losses;
        sum.healed += counts.healed;
        sum.ahead += counts.ahead;
        sum.promises += counts.promises;
    }
    println!("{sum:?}");
    assert!(sum.losses > 0 && sum.healed > 0 && sum.ahead > 0 && sum.promises > 0, "{sum:?}");
    assert!(sum.takeovers > sum.losses + sum.healed, "{sum:?}");
}
