//! Redis Cluster: nodes, slots that move at once or key by key, replicas that lag, and the script that compares a mark
//! and writes. A lane is a hash slot; the record has a slot of its own.

use crate::postgres::{Bits, Change, KEYS, Key, LANES, PARENTS, Position, Row, TABLES, keys_of};
use crate::rng::Rng;
use std::fmt;

pub const NODES: usize = 3;
/// The record's place, after those of the lanes.
pub const RECORD: usize = LANES;
pub const PLACES: usize = LANES + 1;
/// The `home` of a lane that was written on a new node and has not been compared there.
pub const NOWHERE: usize = NODES;
/// How far a replica or a dump may lag, in writes to its node.
const PAST: usize = 16;

/// What a lane says about itself.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Mark {
    pub at: Position,
    /// New with every write.
    pub nonce: u32,
    /// The writer's epoch.
    pub epoch: u32,
    /// The greatest confirmed position that the writer knew.
    pub floor: usize,
    /// The epoch of the load that the lane holds; 0 if the lane is healing.
    pub whole: u32,
    /// The epoch in which the lane's lookups were last compared with the rows.
    pub swept: u32,
    /// The node on which it was last known to be complete.
    pub home: usize,
    /// The position at which `was` was last added to.
    pub was: Position,
}

impl fmt::Debug for Mark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Mark { at, nonce, epoch, floor, whole, swept, home, was } = self;
        write!(f, "{at:?} #{nonce} epoch {epoch} floor {floor} whole {whole} swept {swept} home {home} was {was:?}")
    }
}

/// A row as stored in Redis, and the shape (mapping) with which it was written.
pub type Stored = (Row, u32);

#[derive(Debug, Clone, Copy, Default)]
pub struct Lane {
    pub mark: Option<Mark>,
    pub rows: [Option<Stored>; KEYS],
    /// The members of each lookup key.
    pub lookups: [Bits; PARENTS],
    /// Parents that rows had before they were overwritten. Here they are stored with the mark, and move with it.
    pub was: [Bits; KEYS],
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Table {
    /// The epoch in which its current load began: a lane holds the table if its `whole` is not less.
    pub since: u32,
    pub shape: u32,
    pub loaded: bool,
}

impl fmt::Debug for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "shape {} since {}{}", self.shape, self.since, if self.loaded { " loaded" } else { "" })
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Record {
    pub nonce: u32,
    pub epoch: u32,
    /// All lanes hold everything before it.
    pub through: Position,
    pub floor: usize,
    pub listed: Bits,
    /// The epoch of the sweep that a lane's lookups need.
    pub sweep: u32,
    pub tables: [Table; TABLES],
}

impl fmt::Debug for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Record { nonce, epoch, through, floor, listed, sweep, tables } = self;
        write!(f, "through {through:?} #{nonce} epoch {epoch} floor {floor} listed {listed:b} sweep {sweep} {tables:?}")
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// A change of the stream, and the shape in which it is written.
    Change(Change, u32),
    /// A row of a load: the lane is made equal to it.
    Load(Key, Option<Stored>),
    Member(usize, Key, bool),
    /// Removes all members of the table with lookups.
    ClearMembers,
    Was(Key, Bits),
    ForgetWas,
}

#[derive(Debug, Clone)]
pub enum Write {
    Lane(Mark, Vec<Op>),
    Record(Record),
}

#[derive(Debug, Clone)]
pub struct Call {
    pub place: usize,
    /// The node to which it is sent.
    pub node: usize,
    /// The nonce that the mark must have.
    pub expected: Option<u32>,
    pub write: Write,
    pub daemon: usize,
    pub session: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reply {
    Done,
    /// Done, but a partial update found no row: the script has written a mark that says that the lane is healing.
    Failed,
    Refused,
    /// TRYAGAIN or ASK: some or all keys of the call have moved. Nothing was done.
    Wait,
    Moved(usize),
}

#[derive(Debug, Clone, Copy, Default)]
struct Node {
    lanes: [Lane; LANES],
    record: Option<Record>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Item {
    Mark,
    Row(Key),
    Lookup(usize),
}

impl Lane {
    fn has(&self, item: Item) -> bool {
        match item {
            Item::Mark => self.mark.is_some(),
            Item::Row(key) => self.rows[key].is_some(),
            Item::Lookup(parent) => self.lookups[parent] != 0,
        }
    }

    pub fn is_empty(&self) -> bool {
        self.items().is_empty()
    }

    fn items(&self) -> Vec<Item> {
        let all = std::iter::once(Item::Mark).chain((0..KEYS).map(Item::Row)).chain((0..PARENTS).map(Item::Lookup));
        all.filter(|item| self.has(*item)).collect()
    }

    /// MIGRATE … REPLACE of one key.
    fn take(&mut self, from: &mut Lane, item: Item) {
        match item {
            Item::Mark => {
                self.mark = from.mark.take();
                self.was = std::mem::take(&mut from.was);
            }
            Item::Row(key) => self.rows[key] = from.rows[key].take(),
            Item::Lookup(parent) => self.lookups[parent] = std::mem::take(&mut from.lookups[parent]),
        }
    }

    /// Returns `false` if there is nothing to merge with.
    fn write(&mut self, op: Op) -> bool {
        match op {
            Op::Change(Change::Patch(key, small, parent), _) => {
                let Some((row, _)) = &mut self.rows[key] else { return false };
                (row.small, row.parent) = (small, parent);
            }
            Op::Change(Change::Put(key, row), shape) => self.rows[key] = Some((row, shape)),
            Op::Change(Change::Delete(key), _) => self.rows[key] = None,
            Op::Change(Change::Truncate(table), _) => keys_of(table).for_each(|key| self.rows[key] = None),
            Op::Load(key, row) => self.rows[key] = row,
            Op::Member(parent, key, true) => self.lookups[parent] |= 1 << key,
            Op::Member(parent, key, false) => self.lookups[parent] &= !(1 << key),
            Op::ClearMembers => self.lookups = [0; PARENTS],
            Op::Was(key, parents) => self.was[key] |= parents,
            Op::ForgetWas => self.was = [0; KEYS],
        }
        true
    }
}

impl Op {
    /// Returns the existing keys that a script with this operation declares.
    fn items(self) -> Vec<Item> {
        match self {
            Op::Change(Change::Truncate(table), _) => keys_of(table).map(Item::Row).collect(),
            Op::Change(Change::Put(key, _) | Change::Patch(key, ..) | Change::Delete(key), _) | Op::Load(key, _) => {
                vec![Item::Row(key)]
            }
            Op::Member(parent, ..) => vec![Item::Lookup(parent)],
            Op::ClearMembers => (0..PARENTS).map(Item::Lookup).collect(),
            Op::Was(..) | Op::ForgetWas => vec![Item::Mark],
        }
    }
}

#[derive(Default)]
pub struct Cluster {
    nodes: [Node; NODES],
    past: [Vec<Node>; NODES],
    pub owner: [usize; PLACES],
    pub migrating: [Option<usize>; LANES],
    /// Lanes that lost a node while their slot moved, or whose slot returned to a node that had kept old keys: their
    /// contents need not be what the mark says, and the lane is not at home.
    pub tainted: Bits,
}

impl Cluster {
    pub fn new(rng: &mut Rng) -> Self {
        let mut cluster = Cluster::default();
        cluster.owner.iter_mut().for_each(|owner| *owner = rng.below(NODES));
        cluster.past.iter_mut().for_each(|past| past.push(Node::default()));
        cluster
    }

    pub fn record(&self) -> Option<&Record> {
        self.nodes[self.owner[RECORD]].record.as_ref()
    }

    /// A lane as clients see it: keys that are not at the source are read at the destination.
    pub fn lane(&self, lane: usize) -> Lane {
        let mut seen = self.nodes[self.owner[lane]].lanes[lane];
        if let Some(to) = self.migrating[lane] {
            let (source, mut other) = (seen, self.nodes[to].lanes[lane]);
            for item in other.items().into_iter().filter(|item| !source.has(*item)) {
                seen.take(&mut other, item);
            }
        }
        seen
    }

    /// Whether clients are told that a lane may be incomplete: they are redirected to another node than its mark names.
    pub fn is_away(&self, lane: usize) -> bool {
        self.migrating[lane].is_some() || self.lane(lane).mark.is_some_and(|mark| mark.home != self.owner[lane])
    }

    fn remember(&mut self, node: usize) {
        let now = self.nodes[node];
        let past = &mut self.past[node];
        if past.len() == PAST {
            past.remove(0);
        }
        past.push(now);
    }

    /// Executes one script call.
    pub fn serve(&mut self, call: &Call, cas: bool) -> Reply {
        let owner = self.owner[call.place];
        if owner != call.node {
            return Reply::Moved(owner);
        }
        let mut reply = Reply::Done;
        match &call.write {
            Write::Record(record) => {
                let have = &mut self.nodes[owner].record;
                if cas && have.as_ref().map(|record| record.nonce) != call.expected {
                    return Reply::Refused;
                }
                *have = Some(*record);
            }
            Write::Lane(mark, ops) => {
                let seen = self.lane(call.place);
                let lane = &mut self.nodes[owner].lanes[call.place];
                if self.migrating[call.place].is_some() {
                    let cleared = |op: &Op| matches!(op, Op::ClearMembers | Op::Change(Change::Truncate(_), _));
                    let mut items = ops.iter().flat_map(|op| {
                        let all = op.items().into_iter();
                        all.filter(|item| !cleared(op) || seen.has(*item)).collect::<Vec<_>>()
                    });
                    if !lane.has(Item::Mark) || items.any(|item| !lane.has(item)) {
                        return Reply::Wait;
                    }
                }
                if cas && lane.mark.map(|mark| mark.nonce) != call.expected {
                    return Reply::Refused;
                }
                // The other operations are executed all the same.
                let written = ops.iter().filter(|op| !lane.write(**op)).count() == 0;
                lane.mark = Some(if written { *mark } else { Mark { whole: 0, swept: 0, ..*mark } });
                reply = if written { Reply::Done } else { Reply::Failed };
            }
        }
        self.remember(owner);
        reply
    }

    /// Moves the next key of a slot that migrates key by key; after the last one the slot changes its owner.
    pub fn migrate(&mut self, rng: &mut Rng, lane: usize) -> Option<String> {
        let to = self.migrating[lane]?;
        let from = self.owner[lane];
        let mut source = self.nodes[from].lanes[lane];
        let items = source.items();
        let done = if items.is_empty() {
            self.owner[lane] = to;
            self.migrating[lane] = None;
            format!("lane {lane} has moved to node {to}")
        } else {
            let item = items[rng.below(items.len())];
            self.nodes[to].lanes[lane].take(&mut source, item);
            self.nodes[from].lanes[lane] = source;
            format!("lane {lane}: {item:?} moves to node {to}")
        };
        self.remember(from);
        self.remember(to);
        Some(done)
    }

    pub fn start_migration(&mut self, rng: &mut Rng) -> Option<String> {
        let (lane, to) = (rng.below(LANES), rng.below(NODES));
        if self.migrating[lane].is_some() || to == self.owner[lane] || !self.may_move(lane) {
            return None;
        }
        self.migrating[lane] = Some(to);
        if !self.nodes[to].lanes[lane].items().is_empty() {
            // An old dump had keys of a slot that was elsewhere. An old mark among them can only be overwritten.
            self.nodes[to].lanes[lane].mark = None;
            self.tainted |= 1 << lane;
        }
        Some(format!("lane {lane} begins to move to node {to}, key by key"))
    }

    /// A slot does not move again before a daemon has written to it on its present node: otherwise it could return
    /// home, and nobody would know that it was away.
    fn may_move(&self, lane: usize) -> bool {
        let mark = self.lane(lane).mark;
        !self.is_tainted(lane) && mark.is_none_or(|mark| mark.home == self.owner[lane] || mark.home == NOWHERE)
    }

    /// Moves a slot as a whole: atomically, or while nobody watches.
    pub fn move_slot(&mut self, rng: &mut Rng) -> Option<String> {
        let (place, to) = (rng.below(PLACES), rng.below(NODES));
        let from = self.owner[place];
        if to == from || (place < LANES && (self.migrating[place].is_some() || !self.may_move(place))) {
            return None;
        }
        self.owner[place] = to;
        if place == RECORD {
            self.nodes[to].record = self.nodes[from].record.take();
        } else {
            self.nodes[to].lanes[place] = std::mem::take(&mut self.nodes[from].lanes[place]);
        }
        self.remember(from);
        self.remember(to);
        Some(format!("slot {place} moved from node {from} to {to}"))
    }

    /// Empties a node, restarts it from an old dump, or fails it over to a replica that lagged: everything on it is
    /// rewound together.
    pub fn lose(&mut self, rng: &mut Rng, node: usize, emptied: bool) -> String {
        self.nodes[node] = match emptied {
            true => Node::default(),
            false => self.past[node][rng.below(self.past[node].len())],
        };
        self.past[node] = vec![self.nodes[node]];
        for lane in 0..LANES {
            let here = self.owner[lane] == node || self.migrating[lane] == Some(node);
            let away = self.nodes[node].lanes[lane].mark.is_some_and(|mark| mark.home != node);
            if here && (self.migrating[lane].is_some() || away) {
                self.tainted |= 1 << lane;
            }
            if self.owner[lane] != node && self.migrating[lane] != Some(node) {
                self.nodes[node].lanes[lane].mark = None;
            }
        }
        if self.owner[RECORD] != node {
            self.nodes[node].record = None;
        }
        format!("node {node} {}", if emptied { "was emptied" } else { "went back" })
    }

    pub fn places_of(&self, node: usize) -> Bits {
        (0..PLACES).filter(|place| self.owner[*place] == node).fold(0, |bits, place| bits | 1 << place)
    }

    /// Lanes without a mark: anything else in them is of an unknown time.
    pub fn without_mark(&self) -> Bits {
        (0..LANES).filter(|lane| self.lane(*lane).mark.is_none()).fold(0, |bits, lane| bits | 1 << lane)
    }

    pub fn is_tainted(&self, lane: usize) -> bool {
        self.tainted & (1 << lane) != 0
    }

    /// A lane that is home again, or that says that it is healing, can be trusted again.
    pub fn settle(&mut self) {
        for lane in 0..LANES {
            if self.is_tainted(lane) && !self.is_away(lane) {
                self.tainted &= !(1 << lane);
            }
        }
    }
}
