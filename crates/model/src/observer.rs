//! What readers were promised, checked after everything that changes the contents of Redis.

use crate::cluster::{Cluster, Lane, Mark, NODES, RECORD, Record};
use crate::postgres::{
    Bits, KEYS, Key, LANES, PARENTS, Position, Postgres, Rows, TABLES, keys_of, lane_of, lookup_lane, table_of,
};

#[derive(Default)]
pub struct Observer {
    /// The newest load of each table that any record has begun, and its shape.
    since: [u32; TABLES],
    shape: [u32; TABLES],
    /// The position of each lane's last mark, and the furthest that it ever had.
    last: [Option<Position>; LANES],
    furthest: [Option<Position>; LANES],
    /// The newest state of each lane and key from which the daemon's HTTP has answered: it remembers that, and returns
    /// 503 for a lane that is behind it.
    answered: ([(Position, u32); LANES], [u32; KEYS]),
    /// The newest state of each key that a reader may have seen, as a version of `Row::small`.
    newest: [u32; KEYS],
    /// Lanes whose rows and mark were lost separately, while their slot moved. Until they are whole they may hold
    /// anything.
    dark: Bits,
    /// Where this Redis begins: what precedes it arrives through loads only.
    start: usize,
    through: Position,
    violation: Option<String>,
}

impl Observer {
    pub fn new(start: usize) -> Self {
        Observer { start, ..Observer::default() }
    }

    pub fn verdict(&self) -> Result<(), String> {
        self.violation.clone().map_or(Ok(()), Err)
    }

    fn must(&mut self, holds: bool, text: impl FnOnce() -> String) {
        if !holds && self.violation.is_none() {
            self.violation = Some(text());
        }
    }

    /// The node of these places lost data by itself: what was seen there need not hold any more.
    pub fn lost(&mut self, places: Bits, tainted: Bits) {
        self.dark |= tainted;
        let places = places | tainted;
        for lane in (0..LANES).filter(|lane| places & (1 << lane) != 0) {
            self.last[lane] = None;
            (0..KEYS).filter(|key| lane_of(*key) == lane).for_each(|key| self.newest[key] = 0);
        }
    }

    pub fn recorded(&mut self, record: &Record) {
        for (table, entry) in record.tables.iter().enumerate() {
            if entry.since > self.since[table] {
                (self.since[table], self.shape[table]) = (entry.since, entry.shape);
            }
        }
    }

    /// Whether the daemon's HTTP would answer: not if the record or the mark says that the lane is not whole. A mark of
    /// a later epoch than the record's reveals that the record was rewound.
    fn serves(record: Option<&Record>, mark: &Mark, table: usize) -> bool {
        record.is_some_and(|record| mark.epoch <= record.epoch && mark.whole >= record.tables[table].since)
    }

    pub fn check(&mut self, cluster: &Cluster, pg: &Postgres) {
        let lanes: [Lane; LANES] = std::array::from_fn(|lane| cluster.lane(lane));
        let record = cluster.record();
        let sweep = lanes.iter().filter_map(|lane| lane.mark).map(|mark| mark.whole).max().unwrap_or(0);
        for (n, lane) in lanes.iter().enumerate() {
            let Some(mark) = lane.mark else {
                let seen = self.last[n];
                self.must(seen.is_none(), || format!("the mark of lane {n} is gone: {seen:?}"));
                continue;
            };
            let last = self.last[n].replace(mark.at);
            self.must(last.is_none_or(|last| last <= mark.at), || {
                format!("lane {n} went back from {last:?}: {mark:?}")
            });
            self.furthest[n] = self.furthest[n].max(Some(mark.at));
            if cluster.is_tainted(n) {
                self.must(cluster.is_away(n), || format!("lane {n} is at home, and not what its mark says"));
                continue;
            }
            if mark.whole > 0 {
                self.dark &= !(1 << n);
            }
            let state = pg.state(mark.at);
            for table in 0..TABLES {
                let trusted = mark.whole > 0 && mark.whole >= self.since[table];
                let served = record.filter(|_| Self::serves(record, &mark, table));
                if let Some(shape) = served.map(|r| r.tables[table].shape).or(trusted.then_some(self.shape[table])) {
                    self.rows(n, (table, shape), lane, &mark, &state);
                }
            }
            let served = Self::serves(record, &mark, 0) && record.is_some_and(|record| mark.swept >= record.sweep);
            let (at, swept) = self.answered.0[n];
            let remembered = mark.at >= at && mark.swept >= swept && !cluster.is_away(n);
            if (mark.whole >= self.since[0].max(1) && mark.swept >= sweep) || (served && remembered) {
                self.lookups(cluster, n, &lanes, &mark, &state);
            }
            self.never_backwards(n, lane, &mark);
            if !cluster.is_away(n) {
                self.answer(n, lane, &mark, record);
            }
        }
        if let Some(record) = record.filter(|record| record.through != self.through) {
            self.through = record.through;
            self.holds(cluster, pg, "the record's `through`", record.through);
        }
    }

    /// A lane without a flag holds exactly the state at its mark's position.
    fn rows(&mut self, n: usize, (table, shape): (usize, u32), lane: &Lane, mark: &Mark, state: &Rows) {
        for key in keys_of(table).filter(|key| lane_of(*key) == n) {
            let have = lane.rows[key];
            let same = have.map(|(row, _)| row) == state[key] && have.is_none_or(|(_, written)| written == shape);
            self.must(same, || {
                format!("lane {n} key {key} of shape {shape}: {have:?} instead of {:?}, {mark:?}", state[key])
            });
        }
    }

    /// A row is a member of the lookups that its values give, as of the lookup's own mark.
    fn lookups(&mut self, cluster: &Cluster, n: usize, lanes: &[Lane; LANES], mark: &Mark, state: &Rows) {
        for key in keys_of(0) {
            let home = lane_of(key);
            let trusted = lanes[home].mark.is_some_and(|mark| mark.whole >= self.since[0].max(1));
            for parent in (0..PARENTS).filter(|parent| lookup_lane(*parent) == n) {
                let member = lanes[n].lookups[parent] & (1 << key) != 0;
                let wanted = state[key].is_some_and(|row| row.parent == parent);
                // What a healing lane held before is unknown: members may linger, but none may be missing.
                let excused = cluster.is_tainted(home) || (!trusted && member);
                self.must(member == wanted || excused, || {
                    format!("lookup {parent} in lane {n}: key {key} is a member: {member}, {mark:?}, {:?}", state[key])
                });
            }
        }
    }

    /// No key returns to an older version, flagged or not, nor after its row was deleted.
    fn never_backwards(&mut self, n: usize, lane: &Lane, mark: &Mark) {
        for key in (0..KEYS).filter(|key| lane_of(*key) == n) {
            let whole = mark.whole > 0 && mark.whole >= self.since[table_of(key)];
            let version = lane.rows[key].map(|(row, _)| row.small);
            let newest = self.newest[key];
            let dark = self.dark & (1 << n) != 0;
            self.must(dark || version.is_none_or(|version| version >= newest), || {
                format!("key {key} went back from {newest} to {version:?}, {mark:?}")
            });
            let absent = if whole { mark.at.version() } else { 0 };
            self.newest[key] = if dark { 0 } else { newest.max(version.unwrap_or(absent)) };
        }
    }

    /// HTTP's answers never go backwards, whatever was lost.
    fn answer(&mut self, n: usize, lane: &Lane, mark: &Mark, record: Option<&Record>) {
        let (at, versions) = &mut self.answered;
        if mark.at < at[n].0 || mark.swept < at[n].1 {
            return;
        }
        at[n] = (mark.at, mark.swept);
        let served = |key: &Key| lane_of(*key) == n && Self::serves(record, mark, table_of(*key));
        let mut older = None;
        for key in (0..KEYS).filter(served) {
            let version = lane.rows[key].map_or(mark.at.version(), |(row, _)| row.small);
            older = older.or((version < versions[key]).then_some(key));
            versions[key] = version;
        }
        self.must(older.is_none(), || format!("an answer for key {older:?} is older than one before it, {mark:?}"));
    }

    /// All lanes that have lost nothing hold everything before `upto`.
    fn holds(&mut self, cluster: &Cluster, pg: &Postgres, what: &str, upto: Position) {
        for lane in 0..LANES {
            let mark = cluster.lane(lane).mark.map(|mark| mark.at);
            if mark < self.furthest[lane] {
                continue;
            }
            let after = mark.unwrap_or(Position(self.start, 0));
            let missing = (after.0..upto.0).find(|entry| {
                let done = if *entry == after.0 { after.1 } else { 0 };
                let mut keys = (0..KEYS).filter(|key| lane_of(*key) == lane);
                keys.any(|key| pg.wal[*entry][done..].iter().any(|change| change.touches(key)))
            });
            self.must(missing.is_none(), || format!("{what} {upto:?} passes {missing:?} in lane {lane}, {mark:?}"));
        }
    }

    pub fn confirmed(&mut self, cluster: &Cluster, pg: &Postgres) {
        self.holds(cluster, pg, "confirmed", Position(pg.confirmed, 0));
    }

    /// Every lane holds every row and nothing else, and so does every lookup; and the marks and the record say so.
    pub fn is_whole(&self, cluster: &Cluster, pg: &Postgres, shape: &[u32; TABLES]) -> bool {
        let state = pg.state(Position(pg.end(), 0));
        let lanes: [Lane; LANES] = std::array::from_fn(|lane| cluster.lane(lane));
        let Some(record) = cluster.record() else { return false };
        let known = |key: Key| {
            let lane = &lanes[lane_of(key)];
            let row = lane.rows[key];
            row.map(|(row, _)| row) == state[key] && row.is_none_or(|(_, have)| have == shape[table_of(key)])
        };
        let member = |parent: usize, key: Key| {
            let member = lanes[lookup_lane(parent)].lookups[parent] & (1 << key) != 0;
            member == (table_of(key) == 0 && state[key].is_some_and(|row| row.parent == parent))
        };
        let served = |lane: &Lane| lane.mark.is_none_or(|m| (0..TABLES).all(|t| Self::serves(Some(record), &m, t)));
        let lookups_served = lanes.iter().flat_map(|lane| lane.mark).all(|mark| mark.swept >= record.sweep);
        cluster.tainted == 0
            && (0..LANES).all(|lane| !cluster.is_away(lane))
            && record.tables.iter().all(|table| table.loaded)
            && lanes.iter().all(served)
            && lookups_served
            && (0..KEYS).all(known)
            && (0..PARENTS).all(|parent| (0..KEYS).all(|key| member(parent, key)))
            && cluster.owner[RECORD] < NODES
    }
}
