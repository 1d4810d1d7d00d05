//! A session of a daemon: from a takeover to the first mark that is not the expected one. It knows only what it has
//! read, what was delivered to it and what was acknowledged.

use crate::cluster::{Call, Lane, Mark, NOWHERE, Op, PLACES, RECORD, Record, Reply, Table, Write};
use crate::load::Need;
use crate::postgres::{Bits, Change, KEYS, Key, LANES, PARENTS, Position, TABLES, lane_of, lookup_lane, table_of};
use crate::rules::Rule;
use crate::world::Env;

/// A transaction with more changes may be delivered in parts.
const ATOMIC: usize = 2;
/// While a lane is up to date, one write in this many refreshes its mark.
const REFRESH: usize = 10;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tag {
    Stream,
    Part(usize),
    Sweep,
    Finish,
    Record,
    /// The record of a load, which begins once it is acknowledged.
    BadNews,
}

#[derive(Debug, Clone)]
pub struct Session {
    pub daemon: usize,
    pub id: u32,
    pub epoch: u32,
    pub from: Position,
    pub at: Position,
    /// The delivered changes, each with the position after it.
    pub log: Vec<(Position, Change)>,
    /// As acknowledged.
    pub marks: [Option<Mark>; LANES],
    /// In flight: at most one write to each place, with its nonce.
    pub out: [Option<(Tag, u32)>; PLACES],
    pub route: [usize; PLACES],
    /// As acknowledged; `plan` is what it is to become.
    pub record: Record,
    pub plan: Record,
    pub needs: [Option<Need>; LANES],
    pub floor: usize,
    pub ended: bool,
}

/// Whether a change concerns a lane's rows.
fn concerns(lane: usize, change: Change) -> bool {
    (0..KEYS).any(|key| lane_of(key) == lane && change.touches(key))
}

/// Returns the position of a logical message written for this: it is new, whatever Redis has lost of earlier epochs.
fn new_epoch(env: &mut Env, seen: u32) -> u32 {
    let message = env.pg.watermark() as u32;
    if env.rules.on(Rule::NewEpoch) { message.max(seen + 1) } else { seen + 1 }
}

fn in_lookup(key: Key) -> bool {
    table_of(key) == 0
}

impl Session {
    /// Takes over: judges by the record and the marks that were read, and raises the epoch by compare-and-set.
    pub fn begin(env: &mut Env, daemon: usize, marks: [Option<Mark>; LANES]) -> Option<Session> {
        let old = env.cluster.record().copied();
        let all = || marks.iter().flatten();
        let confirmed = env.pg.confirmed;
        let mut floor = confirmed;
        if env.rules.on(Rule::Floor) {
            floor = floor.max(all().map(|mark| mark.floor).max().unwrap_or(0)).max(old.map_or(0, |old| old.floor));
        }
        let seen = all().map(|mark| mark.epoch).max().unwrap_or(0).max(old.map_or(0, |old| old.epoch));
        let epoch = if env.rules.on(Rule::Epoch) { new_epoch(env, seen) } else { seen.max(1) };
        let first = old.is_none() && all().next().is_none();
        let distrust = first || (env.rules.on(Rule::Record) && old.is_none_or(|old| old.through.0 < floor));
        let present = (0..LANES).filter(|lane| marks[*lane].is_some()).fold(0, |bits, lane| bits | 1 << lane);
        let tables = std::array::from_fn(|table| {
            let shape = env.shape[table];
            match old.map(|old| old.tables[table]) {
                Some(table) if !distrust && table.shape == shape => table,
                None if !distrust => Table { since: 1, shape, loaded: true },
                _ => Table { since: epoch, shape, loaded: false },
            }
        });
        let swept = all().map(|mark| mark.whole).max().unwrap_or(0).max(old.map_or(0, |old| old.sweep));
        let plan = Record {
            nonce: env.id(),
            epoch,
            through: old.filter(|_| !distrust).map_or(Position(0, 0), |old| old.through).max(Position(floor, 0)),
            floor,
            listed: present | old.map_or(0, |old| old.listed),
            sweep: if env.rules.on(Rule::Swept) { swept } else { 0 },
            tables,
        };
        let mut session = Session {
            daemon,
            id: env.id(),
            epoch,
            from: Position(confirmed, 0),
            at: Position(confirmed, 0),
            log: Vec::new(),
            marks,
            out: [None; PLACES],
            route: env.cluster.owner,
            record: plan,
            plan,
            needs: Default::default(),
            floor,
            ended: false,
        };
        session.judge(env);
        session.take_over(env, old)
    }

    /// Decides which lanes have to be loaded, and why.
    fn judge(&mut self, env: &Env) {
        for lane in 0..LANES {
            let mark = self.marks[lane];
            let listed = self.plan.listed & (1 << lane) != 0;
            let lost = env.rules.on(Rule::Lost) && mark.map_or(listed, |mark| mark.at.0 < self.floor);
            let whole = |table: &Table| match mark {
                Some(mark) if env.rules.on(Rule::Whole) => mark.whole >= table.since,
                Some(mark) => mark.whole > 0 && table.loaded,
                None => table.loaded,
            };
            let tables = (0..TABLES).filter(|t| lost || !whole(&self.plan.tables[*t])).fold(0, |bits, t| bits | 1 << t);
            if tables != 0 {
                self.needs[lane] = Some(Need::load(tables, lost || mark.is_some_and(|mark| mark.whole == 0)));
            }
            if self.is_away(env, lane) {
                self.needs[lane].get_or_insert_with(|| Need::load(0, false)).begin_again(3, 0);
            }
        }
        if self.needs.iter().any(Option::is_some) {
            self.plan.sweep = self.epoch;
        }
    }

    /// Whether a lane was found on another node than the one where it was last known to be complete. If a node was lost
    /// while the slot moved, rows and mark need not belong together.
    fn is_away(&self, env: &Env, lane: usize) -> bool {
        env.rules.on(Rule::Moved) && self.marks[lane].is_some_and(|mark| mark.home != self.route[lane])
    }

    fn take_over(mut self, env: &mut Env, old: Option<Record>) -> Option<Session> {
        self.record = self.plan;
        if let (Some(old), false) = (old, env.rules.on(Rule::BadNewsFirst)) {
            (self.record.tables, self.record.sweep) = (old.tables, old.sweep);
        }
        if let (Some(old), false) = (old, env.rules.on(Rule::Epoch)) {
            self.record = old;
            return Some(self);
        }
        let call = self.call(RECORD, old.map(|old| old.nonce), Write::Record(self.record));
        env.say(|| format!("daemon {}: takeover {:?}, needs {}", self.daemon, self.record, self.needed()));
        (env.serve(&call) == Reply::Done).then_some(self)
    }

    fn needed(&self) -> String {
        let needs = self.needs.iter().enumerate().filter_map(|(lane, need)| Some((lane, need.as_ref()?)));
        let words = needs.map(|(lane, need)| match (need.lost, need.is_comparison()) {
            (true, _) => format!("lane {lane} (lost)"),
            (_, true) => format!("lane {lane} (moved)"),
            _ => format!("lane {lane}"),
        });
        words.collect::<Vec<_>>().join(", ")
    }

    fn call(&self, place: usize, expected: Option<u32>, write: Write) -> Call {
        Call { place, node: self.route[place], expected, write, daemon: self.daemon, session: self.id }
    }

    pub fn send(&mut self, env: &mut Env, place: usize, tag: Tag, write: Write) {
        let (nonce, expected) = match &write {
            Write::Lane(mark, _) => (mark.nonce, self.marks[place].map(|mark| mark.nonce)),
            Write::Record(record) => (record.nonce, Some(self.record.nonce)),
        };
        self.out[place] = Some((tag, nonce));
        let call = self.call(place, expected, write);
        env.late.push(call);
    }

    pub fn deliver(&mut self, env: &mut Env) {
        let Some(changes) = env.pg.wal.get(self.at.0) else { return };
        let (entry, done) = (self.at.0, self.at.1);
        let mut upto = changes.len();
        if upto > ATOMIC && done + 1 < upto && !env.rng.one_in(3) {
            upto = done + 1 + env.rng.below(upto - done - 1);
        }
        self.log.extend((done..upto).map(|n| (Position(entry, n + 1), changes[n])));
        self.at = if upto == changes.len() { Position(entry + 1, 0) } else { Position(entry, upto) };
    }

    /// Sends the next write to a lane: changes of the stream, a flag, or a refreshed mark.
    pub fn write(&mut self, env: &mut Env, lane: usize) {
        if self.out[lane].is_some() {
            return;
        }
        let mark = self.marks[lane];
        let lost = self.needs[lane].as_ref().is_some_and(|need| need.lost);
        let flag = lost && mark.is_none_or(|mark| mark.whole != 0) && env.rules.on(Rule::Flag);
        if !lost && self.waits_for_flags(env) {
            return;
        }
        let mut ops = self.stream_ops(env, lane);
        let force = self.needs[lane].as_ref().is_some_and(|need| need.wants_mark);
        if self.ended || (mark.is_none() && ops.is_empty() && !flag && !force) {
            return;
        }
        if mark.is_some_and(|mark| mark.at >= self.at) && !flag && !env.rng.one_in(REFRESH) {
            return;
        }
        if self.needs[lane].is_none() && self.has_leftovers(env, lane) {
            self.needs[lane] = Some(Need::load(3, true));
            return self.raise_epoch(env);
        }
        if !self.listed(env, lane) {
            return;
        }
        let mut next = self.next_mark(env, lane);
        next.at = next.at.max(self.at);
        if !env.rules.on(Rule::Within) {
            next.at.1 = 0;
        }
        if flag {
            (next.whole, next.swept, next.home) = (0, 0, self.route[lane]);
        }
        if ops.iter().any(|op| matches!(op, Op::Was(..))) {
            next.was = next.at;
        } else if next.was <= Position(self.floor, 0) {
            ops.push(Op::ForgetWas);
        }
        self.send(env, lane, Tag::Stream, Write::Lane(next, ops));
    }

    /// Whether a lane without a mark has keys: from a time that neither the record nor the mark remembers.
    pub fn has_leftovers(&self, env: &Env, lane: usize) -> bool {
        env.rules.on(Rule::Look) && self.marks[lane].is_none() && !env.cluster.lane(lane).is_empty()
    }

    /// What is loaded or compared from now on needs a sweep of its own.
    fn raise_epoch(&mut self, env: &mut Env) {
        self.epoch = new_epoch(env, self.epoch);
        (self.plan.epoch, self.plan.sweep) = (self.epoch, self.epoch);
    }

    /// Until a lost lane's own mark says so, no lookup may be computed from its rows: their old values are not those
    /// that the lookup has, and nothing would compare it later.
    fn waits_for_flags(&self, env: &Env) -> bool {
        let unflagged = |lane: usize| {
            let lost = self.needs[lane].as_ref().is_some_and(|need| need.lost);
            lost && self.marks[lane].is_some_and(|mark| mark.whole != 0)
        };
        env.rules.on(Rule::FlagsFirst) && env.rules.on(Rule::Flag) && (0..LANES).any(unflagged)
    }

    /// Returns the mark of a next write that moves nothing and clears nothing.
    pub fn next_mark(&self, env: &mut Env, lane: usize) -> Mark {
        let (nonce, epoch, floor) = (env.id(), self.record.epoch, self.floor);
        match self.marks[lane] {
            Some(mark) if mark.home != self.route[lane] => {
                let home = if env.rules.on(Rule::Moved) { NOWHERE } else { self.route[lane] };
                Mark { nonce, epoch, floor, home, ..mark }
            }
            Some(mark) => Mark { nonce, epoch, floor, ..mark },
            None => {
                let since = self.plan.tables.iter().map(|table| table.since).max().unwrap_or(0);
                let flagged = self.needs[lane].is_some() && env.rules.on(Rule::Flag);
                let (at, was) = (self.from, Position(0, 0));
                let (whole, swept) = (if flagged { 0 } else { since }, if flagged { 0 } else { self.plan.sweep });
                Mark { at, nonce, epoch, floor, whole, swept, home: self.route[lane], was }
            }
        }
    }

    /// Returns the changes of the stream for a lane that are beyond its mark.
    fn stream_ops(&mut self, env: &Env, lane: usize) -> Vec<Op> {
        let after = self.marks[lane].map_or(self.from, |mark| mark.at);
        let after = if env.rules.on(Rule::Skip) { after } else { Position(0, 0) };
        let changes: Vec<Change> = self.log.iter().filter(|(at, _)| *at > after).map(|(_, change)| *change).collect();
        let mut ops = self.lookup_ops(env, lane, &changes);
        ops.extend(self.was_ops(env, lane, &changes));
        for change in changes.into_iter().filter(|change| concerns(lane, *change)) {
            let need = self.needs[lane].as_mut();
            let table = match change {
                Change::Put(key, _) | Change::Delete(key) => {
                    need.into_iter().for_each(|need| need.good |= 1 << key);
                    table_of(key)
                }
                // Without a row that is known to be correct there is nothing to merge into: the row is read again.
                Change::Patch(key, ..) if need.as_ref().is_some_and(|need| !need.knows(key)) => {
                    if env.rules.on(Rule::Pending) {
                        continue;
                    }
                    table_of(key)
                }
                Change::Patch(key, ..) => table_of(key),
                Change::Truncate(table) => {
                    let keys = crate::postgres::keys_of(table);
                    need.into_iter().for_each(|need| keys.clone().for_each(|key| need.good |= 1 << key));
                    table
                }
            };
            ops.push(Op::Change(change, self.plan.tables[table].shape));
        }
        ops
    }

    /// Returns a row's lane as stored in Redis, if its mark is a known one; otherwise the session ends.
    pub fn read(&mut self, env: &Env, lane: usize) -> Lane {
        let seen = env.cluster.lane(lane);
        let nonce = seen.mark.map(|mark| mark.nonce);
        let sent = self.out[lane].map(|(_, nonce)| nonce);
        if nonce != self.marks[lane].map(|mark| mark.nonce) && (sent.is_none() || nonce != sent) {
            self.ended = true;
        }
        seen
    }

    /// Returns every parent that a row may have had in any lane's lookups: in Redis, before that, and in what was
    /// delivered.
    fn parents(&mut self, env: &Env, key: Key) -> Bits {
        let row = self.read(env, lane_of(key));
        let mut parents = 0;
        if env.rules.on(Rule::ReadBack) {
            parents |= row.rows[key].map_or(0, |(row, _)| 1 << row.parent);
        }
        if env.rules.on(Rule::Was) {
            parents |= row.was[key];
        }
        let images = self.log.iter().filter(|(_, change)| change.touches(key));
        images.filter_map(|(_, change)| change.parent()).fold(parents, |bits, parent| bits | 1 << parent)
    }

    fn lookup_ops(&mut self, env: &Env, lane: usize, changes: &[Change]) -> Vec<Op> {
        let mut ops = Vec::new();
        if changes.contains(&Change::Truncate(0)) {
            ops.push(Op::ClearMembers);
        }
        for key in (0..KEYS).filter(|key| in_lookup(*key)) {
            let Some(last) = changes.iter().rev().find(|change| change.touches(key)) else { continue };
            let parents = self.parents(env, key);
            for parent in (0..PARENTS).filter(|parent| lookup_lane(*parent) == lane) {
                if parents & (1 << parent) != 0 {
                    ops.push(Op::Member(parent, key, last.parent() == Some(parent)));
                }
            }
        }
        let removes_only = |op: &Op| matches!(op, Op::Member(_, _, false) | Op::ClearMembers);
        if self.marks[lane].is_none() && ops.iter().all(removes_only) {
            ops.clear();
        }
        ops
    }

    fn was_ops(&mut self, env: &Env, lane: usize, changes: &[Change]) -> Vec<Op> {
        let keys = (0..KEYS).filter(|key| in_lookup(*key) && lane_of(*key) == lane);
        let mut ops = Vec::new();
        for key in keys {
            let images = changes.iter().filter(|change| change.touches(key));
            let Some(last) = images.clone().next_back() else { continue };
            let old = self.read(env, lane).rows[key].map_or(0, |(row, _)| 1 << row.parent);
            let was = images.filter_map(|change| change.parent()).fold(old, |bits, parent| bits | 1 << parent);
            if was & !last.parent().map_or(0, |parent| 1 << parent) != 0 {
                ops.push(Op::Was(key, was));
            }
        }
        ops
    }

    fn listed(&mut self, env: &mut Env, lane: usize) -> bool {
        if self.record.listed & (1 << lane) != 0 || !env.rules.on(Rule::List) {
            return true;
        }
        self.plan.listed |= 1 << lane;
        self.write_record(env);
        false
    }

    /// Returns the position before which all lanes hold everything.
    fn through(&self, env: &Env) -> Position {
        if !env.rules.on(Rule::Through) {
            return self.at;
        }
        let held = |lane: usize| {
            let mark = self.marks[lane];
            let after = mark.map_or(self.from, |mark| mark.at);
            let waits = |change: Change| {
                let adds = change.parent().is_some_and(|parent| lookup_lane(parent) == lane);
                let any = mark.is_some() && (0..PARENTS).any(|parent| lookup_lane(parent) == lane);
                let of_lookup = (0..KEYS).any(|key| in_lookup(key) && change.touches(key));
                concerns(lane, change) || (of_lookup && (adds || any))
            };
            match self.log.iter().any(|(at, change)| *at > after && waits(*change)) {
                true => after,
                false => self.at,
            }
        };
        (0..LANES).map(held).min().unwrap_or_default().max(self.record.through)
    }

    pub fn write_record(&mut self, env: &mut Env) {
        if self.out[RECORD].is_some() {
            return;
        }
        let early = !env.rules.on(Rule::GoodNewsLast);
        for table in 0..TABLES {
            let needed = self.needs.iter().flatten().any(|need| need.covers(table) && !need.is_comparison());
            self.plan.tables[table].loaded |= !needed || early;
        }
        let (nonce, floor, through) = (env.id(), self.floor, self.through(env));
        self.plan = Record { nonce, floor, through, ..self.plan };
        self.send(env, RECORD, Tag::Record, Write::Record(self.plan));
    }

    /// If the catalog shows another shape of a table, the record gets this bad news before anything acts on it.
    pub fn look_at_catalog(&mut self, env: &mut Env) {
        let Some(table) = (0..TABLES).find(|table| env.shape[*table] != self.plan.tables[*table].shape) else { return };
        if self.out[RECORD].is_some() {
            return;
        }
        let epoch = new_epoch(env, self.epoch);
        let mut next = Record { nonce: env.id(), epoch, sweep: epoch, floor: self.floor, ..self.plan };
        next.through = self.record.through;
        next.tables[table] = Table { since: epoch, shape: env.shape[table], loaded: false };
        if env.rules.on(Rule::BadNewsFirst) {
            self.send(env, RECORD, Tag::BadNews, Write::Record(next));
        } else {
            self.load_table(next);
        }
    }

    /// Begins a load of the tables whose `since` is the epoch of the new record.
    fn load_table(&mut self, next: Record) {
        let tables = (0..TABLES).filter(|t| next.tables[*t].since == next.epoch).fold(0, |bits, t| bits | 1 << t);
        (self.epoch, self.plan) = (next.epoch, next);
        for need in &mut self.needs {
            need.get_or_insert_with(|| Need::load(0, false)).begin_again(tables, tables);
        }
    }

    pub fn confirm(&mut self, env: &mut Env) {
        let marks = (0..LANES).filter(|lane| self.record.listed & (1 << lane) != 0);
        let oldest = marks.map(|lane| self.marks[lane].map_or(self.from.0, |mark| mark.at.0)).min();
        let mut upto = self.at.0;
        if env.rules.on(Rule::Confirm) {
            upto = upto.min(oldest.unwrap_or(upto)).min(self.record.through.0);
        }
        if env.rules.on(Rule::ConfirmVisible) {
            upto = upto.min(env.pg.invisible.first().copied().unwrap_or(upto));
        }
        if upto > env.pg.confirmed {
            env.pg.confirmed = upto;
            self.floor = self.floor.max(upto);
            env.say(|| format!("daemon {}: confirmed {upto}", self.daemon));
        }
    }

    pub fn answer(&mut self, env: &mut Env, call: &Call, reply: Reply) {
        let place = call.place;
        let Some((tag, _)) = self.out[place].take() else { return };
        match (reply, &call.write) {
            (Reply::Refused | Reply::Failed, _) => self.ended = true,
            (Reply::Moved(node), _) if self.route[place] != node => {
                self.route[place] = node;
                if place < LANES {
                    self.not_written(place, tag);
                    if self.is_away(env, place) || self.needs[place].is_some() {
                        self.needs[place].get_or_insert_with(|| Need::load(0, false)).begin_again(3, 0);
                        self.raise_epoch(env);
                    }
                }
            }
            (Reply::Done, Write::Record(record)) => {
                self.record = *record;
                if tag == Tag::BadNews {
                    let listed = self.plan.listed;
                    self.load_table(*record);
                    self.plan.listed |= listed;
                }
            }
            (Reply::Done, Write::Lane(mark, _)) => {
                self.marks[place] = Some(*mark);
                self.written(place, tag);
            }
            (Reply::Wait | Reply::Moved(_), _) => self.not_written(place, tag),
        }
    }
}
