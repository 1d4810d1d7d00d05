//! Loads: which parts a lane still needs, chunks judged by visibility, the sweep over lookups, and the final write.

use crate::cluster::{Mark, Op, Write};
use crate::postgres::{
    Bits, IDS, KEYS, Key, LANES, PARENTS, Position, Snapshot, TABLES, keys_of, lane_of, lookup_lane, table_of,
};
use crate::rules::Rule;
use crate::session::{Session, Tag};
use crate::world::Env;

/// Chunks in each table.
const CHUNKS: usize = 2;

#[derive(Debug, Clone, Default)]
pub enum Part {
    #[default]
    Unread,
    Read(Box<Snapshot>, usize),
    /// In flight, and whether it contains all its rows.
    Written(bool),
    Done,
}

/// Why a lane is loaded, and how far.
#[derive(Debug, Clone)]
pub struct Need {
    tables: Bits,
    /// Those whose rows are not trusted. The others are compared, since the lane has moved.
    doubted: Bits,
    /// The lane itself has lost data.
    pub lost: bool,
    /// Rows that this session has written in full, or read.
    pub good: Bits,
    /// There are rows for a lane that has no mark yet.
    pub wants_mark: bool,
    parts: [Part; TABLES * CHUNKS],
}

impl Need {
    pub fn load(tables: Bits, lost: bool) -> Self {
        Need { tables, doubted: tables, lost, good: 0, wants_mark: false, parts: Default::default() }
    }

    /// Whether the lane has moved, and is trusted while it is compared.
    pub fn is_comparison(&self) -> bool {
        self.doubted == 0
    }

    /// Whether there is a row into which a partial update of this key can be merged.
    pub fn knows(&self, key: Key) -> bool {
        (self.good | !self.doubted_keys()) & (1 << key) != 0
    }

    fn doubted_keys(&self) -> Bits {
        (0..KEYS).filter(|key| self.doubted & (1 << table_of(*key)) != 0).fold(0, |bits, key| bits | 1 << key)
    }

    pub fn covers(&self, table: usize) -> bool {
        self.tables & (1 << table) != 0
    }

    /// Loads these tables as well, from the beginning.
    pub fn begin_again(&mut self, tables: Bits, doubted: Bits) {
        self.tables |= tables;
        self.doubted |= doubted;
        for table in (0..TABLES).filter(|table| tables & (1 << table) != 0) {
            keys_of(table).for_each(|key| self.good &= !(1 << key));
            self.parts[table * CHUNKS..][..CHUNKS].fill(Part::Unread);
        }
    }

    fn has_all_parts(&self) -> bool {
        let mut needed = (0..TABLES * CHUNKS).filter(|part| self.covers(part / CHUNKS));
        needed.all(|part| matches!(self.parts[part], Part::Done))
    }
}

fn keys_of_chunk(chunk: usize) -> std::ops::Range<Key> {
    let keys = keys_of(chunk / CHUNKS);
    let half = keys.start + IDS / 2;
    if chunk.is_multiple_of(CHUNKS) { keys.start..half } else { half..keys.end }
}

impl Session {
    /// Performs the next step of a lane's load.
    pub fn load(&mut self, env: &mut Env, lane: usize) {
        if self.needs[lane].as_ref().is_some_and(Need::has_all_parts) {
            return self.finish(env, lane);
        }
        let chunk = env.rng.below(TABLES * CHUNKS);
        let Some(need) = self.needs[lane].as_mut().filter(|need| need.covers(chunk / CHUNKS)) else { return };
        match &need.parts[chunk] {
            Part::Unread => {
                // First the snapshot, then the watermark: once the watermark is delivered, so is everything that the
                // snapshot sees.
                let snapshot = Box::new(env.pg.snapshot());
                need.parts[chunk] = Part::Read(snapshot, env.pg.watermark());
            }
            Part::Read(snapshot, watermark) => {
                let (snapshot, watermark) = (snapshot.clone(), *watermark);
                self.write_part(env, lane, chunk, &snapshot, Position(watermark, 0));
            }
            Part::Written(_) | Part::Done => {}
        }
    }

    /// Whether a delivered change up to `at` touched the key and is not seen by the snapshot.
    fn superseded(&self, env: &Env, snapshot: &Snapshot, key: Key, at: Position) -> bool {
        let unseen = |entry: usize| match env.rules.on(Rule::Visibility) {
            true => !snapshot.sees(entry),
            false => entry >= snapshot.end(),
        };
        let mut changes = self.log.iter().filter(|(behind, change)| *behind <= at && change.touches(key));
        env.rules.on(Rule::Window) && changes.any(|(behind, _)| unseen(behind.0))
    }

    fn write_part(&mut self, env: &mut Env, lane: usize, chunk: usize, snapshot: &Snapshot, watermark: Position) {
        let mark = self.marks[lane];
        if self.out[lane].is_some() || self.at < watermark || mark.is_some_and(|mark| mark.at < watermark) {
            return;
        }
        let at = mark.map_or(self.at, |mark| mark.at);
        let shape = self.plan.tables[chunk / CHUNKS].shape;
        let (mut ops, mut all, mut loaded) = (Vec::new(), true, 0);
        for key in keys_of_chunk(chunk) {
            let (here, row) = (lane_of(key) == lane, snapshot.rows[key]);
            if self.superseded(env, snapshot, key, at) {
                let good = self.needs[lane].as_ref().is_some_and(|need| need.good & (1 << key) != 0);
                all &= !here || good || !env.rules.on(Rule::Pending);
                continue;
            }
            if here && (row.is_some() || mark.is_some()) {
                ops.push(Op::Load(key, row.map(|row| (row, shape))));
                loaded |= 1 << key;
            }
            let parent = row.map(|row| row.parent).filter(|parent| lookup_lane(*parent) == lane);
            if let Some(parent) = parent.filter(|_| table_of(key) == 0) {
                ops.push(Op::Member(parent, key, true));
            }
        }
        let leftovers = self.has_leftovers(env, lane);
        let Some(need) = self.needs[lane].as_mut() else { return };
        let flagged = mark.is_some_and(|mark| mark.whole == 0) || !env.rules.on(Rule::Flag) || !need.lost;
        if mark.is_none() && !need.lost {
            let nothing = ops.is_empty() && !leftovers;
            need.wants_mark |= !nothing;
            need.parts[chunk] = if nothing && all { Part::Done } else { Part::Unread };
        } else if mark.is_some() && flagged {
            need.good |= loaded;
            need.parts[chunk] = Part::Written(all);
            let next = self.next_mark(env, lane);
            self.send(env, lane, Tag::Part(chunk), Write::Lane(next, ops));
        }
    }

    /// Compares the members of a lane's lookups with their rows in Redis, once all loaded rows are written.
    pub fn sweep(&mut self, env: &mut Env, lane: usize) {
        let Some(mark) = self.marks[lane].filter(|_| self.out[lane].is_none()) else { return };
        let ready = self.needs.iter().flatten().all(|need| !need.covers(0) || need.has_all_parts());
        if mark.swept >= self.plan.sweep || !ready {
            return;
        }
        let seen = self.read(env, lane);
        let mut ops = Vec::new();
        for (parent, key) in (0..PARENTS).flat_map(|parent| (0..KEYS).map(move |key| (parent, key))) {
            if lookup_lane(parent) != lane || seen.lookups[parent] & (1 << key) == 0 {
                continue;
            }
            let home = lane_of(key);
            // ASK or MOVED: a missing row may have been lost on the way, and its lane will be compared.
            let on_the_way = env.cluster.migrating[home].is_some() || env.cluster.owner[home] != self.route[home];
            if on_the_way && env.rules.on(Rule::SweepLater) {
                return;
            }
            let row = self.read(env, home);
            let row_at = row.mark.map_or(self.from, |mark| mark.at);
            let at = row_at.min(mark.at);
            // What an earlier session wrote beyond this session's stream cannot be compared yet.
            let busy = self.out[home].is_some() || row_at.max(mark.at) > self.at;
            if busy || self.log.iter().any(|(behind, change)| *behind > at && change.touches(key)) {
                return;
            }
            if row.rows[key].is_none_or(|(row, _)| row.parent != parent) && env.rules.on(Rule::Sweep) {
                ops.push(Op::Member(parent, key, false));
            }
        }
        if !self.ended {
            let swept = mark.swept.max(self.plan.sweep);
            let next = Mark { swept, ..self.next_mark(env, lane) };
            self.send(env, lane, Tag::Sweep, Write::Lane(next, ops));
        }
    }

    fn finish(&mut self, env: &mut Env, lane: usize) {
        if self.out[lane].is_some() {
            return;
        }
        if self.marks[lane].is_none() {
            self.needs[lane] = None;
            return;
        }
        // Readers of this lane's rows as whole may rely on every lookup, in whatever lane it is.
        let swept = self.marks.iter().flatten().all(|mark| mark.swept >= self.plan.sweep);
        if !swept || (self.record.sweep < self.plan.sweep && env.rules.on(Rule::BadNewsFirst)) {
            return;
        }
        let next = Mark { whole: self.epoch, home: self.route[lane], ..self.next_mark(env, lane) };
        self.send(env, lane, Tag::Finish, Write::Lane(next, Vec::new()));
    }

    /// A lane's write was acknowledged.
    pub fn written(&mut self, lane: usize, tag: Tag) {
        let Some(need) = &mut self.needs[lane] else { return };
        match tag {
            Tag::Part(chunk) => {
                if let Part::Written(all) = need.parts[chunk] {
                    need.parts[chunk] = if all { Part::Done } else { Part::Unread };
                }
            }
            Tag::Finish if need.has_all_parts() => self.needs[lane] = None,
            Tag::Stream | Tag::Sweep | Tag::Finish | Tag::Record | Tag::BadNews => {}
        }
    }

    /// A lane's write was refused as a whole; its mark is unchanged.
    pub fn not_written(&mut self, lane: usize, tag: Tag) {
        if let (Tag::Part(chunk), true) = (tag, lane < LANES)
            && let Some(need) = &mut self.needs[lane]
            && let Part::Written(_) = need.parts[chunk]
        {
            need.parts[chunk] = Part::Unread;
        }
    }
}
