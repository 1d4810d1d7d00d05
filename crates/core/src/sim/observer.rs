//! An observer who knows the truth and checks the guarantees after every EXEC.

use super::announced;
use super::postgres::{Extra, Phase, Postgres, RowId, Transaction, Values, Version};
use super::redis::Redis;
use crate::checkpoint::{Checkpoint, Place, TableState};
use crate::command::Key;
use crate::lanes::Lane;
use crate::lookups::Lookups;
use crate::lsn::Lsn;
use crate::session::SafeWhen;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// The state from which Redis may restart.
#[derive(Clone, Copy)]
pub enum Copied {
    File,
    Replica,
}

/// How many of the newest transactions are checked for being visible all or nothing.
const LOOKED_BACK: usize = 8;

#[derive(Default)]
pub struct Observer {
    /// The latest version seen of each row, as an index into the row's history. No entry if Redis lost it.
    last: BTreeMap<RowId, usize>,
    was: BTreeMap<RowId, Values>,
    /// Rows whose keys somebody removed, and when. This is drift: it goes unnoticed until the row changes or is
    /// verified.
    evicted: BTreeMap<RowId, u64>,
    /// The rows among them that Redis evicted and counted.
    made_room: BTreeSet<RowId>,
    /// `evicted` as it was when Redis was copied.
    evicted_in: [BTreeMap<RowId, u64>; 2],
    /// The highest position that the replica has ever had.
    replicated: u64,
    /// The highest position that a checkpoint has ever had.
    applied: u64,
    /// The epoch and number of the newest checkpoint.
    newest: (u64, u64),
    /// The number of checks made, as proof that the observer does check.
    pub looked: u64,
    /// Whether an operator may remove keys; their table then does not count as loaded.
    operated: bool,
    /// Whether Postgres was rewound and no daemon can have noticed yet.
    pub adrift: bool,
    /// `adrift` as it was when Redis was copied.
    adrift_in: [bool; 2],
    /// Whether Postgres has ever been rewound.
    pub other_history: bool,
    /// The lane of each row. Empty where there is a single Redis.
    lanes: BTreeMap<RowId, Lane>,
    keys: BTreeMap<RowId, Key>,
    /// The highest position that each lane's mark has ever had.
    written: BTreeMap<Lane, u64>,
    /// When each lane last lost something; and when the last takeover began that has ended since.
    lost_last: BTreeMap<Lane, u64>,
    judged_at: u64,
    /// When anything was last lost.
    lost_at: u64,
    /// A node of these lanes has lost something while it had only a part of their keys. Their marks do not tell, so any row
    /// may be missing or old until all of them have been read again where they are, and newer than the mark until that has
    /// come as far as it had been.
    doubted: BTreeMap<Lane, u64>,
    /// Counts losses and takeovers.
    time: u64,
    /// How many entries the change stream had.
    announced: u64,
    /// On a cluster: the rows at the end of the last round, when nothing was on its way, and the entries of the stream.
    round: Option<(BTreeMap<RowId, Values>, u64)>,
    follower: announced::Follower,
    /// A node has lost something while it had only a part of the keys of a lane.
    was_parted: bool,
    /// The epoch and number of the last round that has ended.
    ended: (u64, u64),
    /// Of each table.
    lookups: BTreeMap<u16, Arc<Lookups>>,
    /// Rows of which somebody has changed a membership, or the row. They are drift until they agree again.
    excused: BTreeSet<RowId>,
}

/// What Redis vouches for: everything at or before `at`, and perhaps a part of the transaction that commits at `split`.
#[derive(Clone, Copy)]
struct Vouched {
    at: u64,
    split: Option<u64>,
}

impl Vouched {
    fn by_lane(place: Place) -> Self {
        Vouched { at: place.at.get(), split: (place.done > 0).then(|| place.at.get()) }
    }

    fn may_have(&self, version: &Version) -> bool {
        version.commit < self.at || Some(version.commit) == self.split
    }
}

fn place(versions: &[Version], values: Values) -> Option<usize> {
    versions.iter().position(|v| v.values == Some(values))
}

/// On a cluster, a dead letter is recorded before its lane is written, so that it says nothing about a key.
fn has_key(rows: &BTreeMap<RowId, Values>, row: RowId, on_cluster: bool) -> bool {
    rows.get(&row).is_some_and(|values| !on_cluster || *values != Values::DEAD)
}

/// Returns whether the table's entry says that not all of its dead letters are recorded.
pub fn hides(checkpoint: &Checkpoint, row: RowId) -> bool {
    checkpoint.tables.get(&super::postgres::name(row.table).table).is_some_and(|mark| mark.more_dead_letters)
}

impl Observer {
    /// `keys` of rows, on a cluster.
    pub fn new(operated: bool, keys: BTreeMap<RowId, Key>, lookups: BTreeMap<u16, Arc<Lookups>>) -> Self {
        let lanes = keys.iter().map(|(row, key)| (*row, Lane::of(key.as_bytes()))).collect();
        Observer { operated, lanes, keys, lookups, ..Observer::default() }
    }

    /// The contents of Redis were changed from outside: the guarantees hold from the present state on.
    pub fn lost(&mut self, redis: &Redis, postgres: &Postgres) -> Result<(), String> {
        self.lost_at(None, redis, postgres)
    }

    /// `node`: the only one that was changed.
    pub fn lost_at(&mut self, node: Option<usize>, redis: &Redis, postgres: &Postgres) -> Result<(), String> {
        self.lost_of(|lane| node.is_none_or(|node| redis.is_at(lane, node)), redis, postgres)
    }

    fn lost_of(&mut self, is_of: impl Fn(Lane) -> bool, redis: &Redis, postgres: &Postgres) -> Result<(), String> {
        // The next one may have a lower epoch. This one says nothing new.
        self.newest = redis.checkpoint()?.map_or((0, 0), |checkpoint| (checkpoint.epoch, checkpoint.seq + 1));
        self.announced = announced::count(redis);
        let of = &self.lanes;
        let is_at = |row: &RowId| of.get(row).is_none_or(|lane| is_of(*lane));
        self.last.retain(|row, _| !is_at(row));
        self.time += 1;
        self.lost_at = self.time;
        self.follower.lost(redis);
        self.round = None;
        let lanes = self.lanes.iter().filter(|(row, _)| is_at(row)).map(|(_, lane)| (*lane, self.time));
        self.lost_last.extend(lanes);
        let rows = redis.rows()?;
        // Where a lane went back and the record did not, that has dead letters that are newer than the keys.
        let on_cluster = self.is_on_cluster();
        let last = rows.iter().filter(|(row, _)| is_at(row) && has_key(&rows, **row, on_cluster));
        let last = last.map(|(row, values)| (*row, place(&postgres.history[row], *values)));
        self.last.extend(last.filter_map(|(row, place)| Some((row, place?))));
        self.was = rows;
        self.evicted.retain(|row, _| !self.was.contains_key(row));
        Ok(())
    }

    /// A node that has only a part of the keys of these lanes loses something.
    pub fn doubts(&mut self, lanes: Vec<Lane>) {
        self.was_parted |= !lanes.is_empty();
        let had_come_to = |lane| (lane, self.written.get(&lane).copied().unwrap_or(0));
        let doubted: Vec<_> = lanes.into_iter().map(had_come_to).collect();
        self.doubted.extend(doubted);
    }

    /// Whether any row of this lane may be missing or old.
    pub fn is_doubted(&self, lane: Lane) -> bool {
        self.doubted.contains_key(&lane)
    }

    fn is_row_doubted(&self, row: RowId) -> bool {
        !self.doubted.is_empty() && self.lanes.get(&row).is_some_and(|lane| self.is_doubted(*lane))
    }

    /// Lanes whose marks say that they are complete where they are: from now on, that holds for their rows.
    fn no_longer_doubts(&mut self, redis: &Redis, postgres: &Postgres) -> Result<(), String> {
        let doubted = std::mem::take(&mut self.doubted);
        let is_complete =
            |(lane, had_come_to): &(Lane, u64)| redis.is_complete(*lane) && redis.place_of_lane(*lane) >= *had_come_to;
        let (complete, doubted): (BTreeMap<Lane, u64>, _) = doubted.into_iter().partition(is_complete);
        self.doubted = doubted;
        if !complete.is_empty() {
            self.lost_of(|lane| complete.contains_key(&lane), redis, postgres)?;
        }
        Ok(())
    }

    /// The lane of a row on a cluster.
    pub fn lane(&self, row: RowId) -> Lane {
        self.lanes[&row]
    }

    pub fn key(&self, row: RowId) -> &Key {
        &self.keys[&row]
    }

    pub fn lost_last(&self, lane: Lane) -> Option<u64> {
        self.lost_last.get(&lane).copied()
    }

    /// A takeover begins to read. Returns when.
    pub fn surveys(&mut self) -> u64 {
        self.time += 1;
        self.time
    }

    /// The takeover that began then is acknowledged.
    pub fn judged(&mut self, began: u64) {
        self.judged_at = self.judged_at.max(began);
    }

    pub fn judged_at(&self) -> u64 {
        self.judged_at
    }

    /// Whether somebody has removed the key of a row, and it has not been seen since.
    pub fn may_be_drift(&self, row: RowId) -> bool {
        self.evicted.contains_key(&row)
    }

    fn is_on_cluster(&self) -> bool {
        !self.lanes.is_empty()
    }

    fn shows(&self, version: &Version, shown: Option<Values>, hides: bool) -> bool {
        version.values == shown
            || (hides && shown.is_none() && version.values == Some(Values::DEAD))
            // A dead letter is recorded before its lane is written, and forgotten after it. There is no key.
            || (self.is_on_cluster() && shown == Some(Values::DEAD) && version.values.is_none())
    }

    pub fn evicted(&mut self, row: RowId, postgres: &Postgres) {
        self.excused.insert(row);
        self.expired(row);
        self.evicted.insert(row, postgres.inserted);
    }

    /// Like [`Self::evicted`], but Redis counts the key.
    pub fn made_room(&mut self, row: RowId, postgres: &Postgres) {
        self.evicted(row, postgres);
        self.made_room.insert(row);
    }

    pub fn copied(&mut self, to: Copied, redis: &Redis) -> Result<(), String> {
        self.evicted_in[to as usize] = self.evicted.clone();
        self.adrift_in[to as usize] = self.adrift;
        if let (Copied::Replica, Some(checkpoint)) = (to, redis.checkpoint()?) {
            self.replicated = self.replicated.max(checkpoint.lsn.0.get());
        }
        Ok(())
    }

    /// Resets the counts, because Redis starts again from a copy. It may date from before Postgres was rewound.
    pub fn begins_again(&mut self, from: Copied) {
        self.adrift |= self.adrift_in[from as usize];
        let evicted = self.evicted_in[from as usize].clone();
        match self.is_on_cluster() {
            // That of one node. A key that was removed since is missing all the same.
            true => evicted.into_iter().for_each(|(row, at)| {
                let latest = self.evicted.entry(row).or_default();
                *latest = at.max(*latest);
            }),
            false => self.evicted = evicted,
        }
        self.made_room.clear();
    }

    pub fn expired(&mut self, row: RowId) {
        self.round = None;
        self.was.remove(&row);
        self.last.remove(&row);
    }

    /// Returns whether Redis evicted the row and reported it, so that it must be restored.
    pub fn must_be_back(&self, row: RowId) -> bool {
        self.made_room.contains(&row)
    }

    /// Returns whether the row is missing because somebody removed it, and it has not changed since.
    pub fn is_drift(&self, row: RowId, version: &Version) -> bool {
        let is_gone = !has_key(&self.was, row, self.is_on_cluster());
        is_gone && self.evicted.get(&row).is_some_and(|at| version.commit <= *at)
    }

    /// Postgres was rewound. Until a daemon can have noticed, the guarantees do not cover what Redis shows.
    pub fn set_back(&mut self, postgres: &Postgres) {
        (self.adrift, self.other_history) = (true, true);
        self.doubted.values_mut().for_each(|had_come_to| *had_come_to = 0);
        self.evicted.values_mut().for_each(|at| *at = postgres.flushed.min(*at));
    }

    /// A daemon must have noticed: the guarantees hold from the present state on.
    pub fn noticed(&mut self, redis: &Redis, postgres: &Postgres) -> Result<(), String> {
        self.adrift = false;
        self.lost(redis, postgres)?;
        // The checkpoint may have disappeared in the meantime.
        if redis.checkpoint()?.is_some() { self.look(redis, postgres) } else { Ok(()) }
    }

    /// Every row has the columns whose types the table's entry tells.
    fn types_are_right(&self, redis: &Redis, checkpoint: &Checkpoint) -> Result<(), String> {
        // On a cluster, a node may have lost its rows without the record.
        if self.is_on_cluster() {
            return Ok(());
        }
        for (row, extra) in redis.extras()? {
            let mark = checkpoint.tables.get(&super::postgres::name(row.table).table);
            let Some(types) = mark.and_then(|mark| mark.types.as_ref()) else { continue };
            let types = types.decode().ok_or("types that cannot be decoded")?;
            if types.0.iter().any(|field| field.name == "extra") != (extra != Extra::NoColumn) {
                return Err(format!("{row:?} has {extra:?}, and its table's entry says {types:?}"));
            }
        }
        Ok(())
    }

    /// What Redis has is not missing, whichever version it is.
    fn is_there(&mut self, rows: &BTreeMap<RowId, Values>) {
        let on_cluster = self.is_on_cluster();
        self.evicted.retain(|row, _| !has_key(rows, *row, on_cluster));
        self.made_room.retain(|row| !rows.contains_key(row));
    }

    pub fn lookups(&self) -> &BTreeMap<u16, Arc<Lookups>> {
        &self.lookups
    }

    /// Returns the memberships that differ from what the rows in Redis give, and how many those are at keys of another type.
    pub fn differing_members(&self, redis: &Redis) -> Result<BTreeSet<(RowId, Key)>, String> {
        let (found, given) = redis.members(&self.lookups)?;
        let all = found.keys().chain(given.keys());
        Ok(all.filter(|of| found.get(*of) != given.get(*of)).cloned().collect())
    }

    /// Somebody has changed Redis. `differed`: the memberships that differed before.
    pub fn excuses(&mut self, differed: &BTreeSet<(RowId, Key)>, redis: &Redis) -> Result<(), String> {
        let differing = self.differing_members(redis)?;
        self.excused.extend(differing.difference(differed).map(|(row, _)| *row));
        Ok(())
    }

    pub fn excuses_rows(&mut self, rows: impl Iterator<Item = RowId>) {
        self.excused.extend(rows);
    }

    /// A row is a member of exactly the lists that its hash gives.
    fn lookups_agree(&mut self, redis: &Redis) -> Result<(), String> {
        let differing = self.differing_members(redis)?;
        let of_made = self.tables_with_all_members(redis)?;
        let is_made = |row: &RowId| of_made.as_ref().is_none_or(|of| of.contains(&row.table));
        // A daemon that was frozen for longer than the TTL may have asked for rows before that, and adds members to lists
        // after it. Its table says that keys may have expired, and is loaded again.
        let may_have_expired = redis.tables_that_may_have_expired()?;
        let expired = differing.iter().map(|(row, _)| *row).filter(|row| may_have_expired.contains(&row.table));
        self.excused.extend(expired);
        // What is on its way may still disagree with what somebody has changed.
        self.excused.retain(|row| !is_made(row) || differing.iter().any(|(of, _)| of == row));
        let is_wrong = |row: &RowId| !self.excused.contains(row) && is_made(row);
        match differing.iter().find(|(row, _)| is_wrong(row)) {
            Some((row, list)) => Err(format!("{row:?} and its membership of {list} disagree")),
            None => Ok(()),
        }
    }

    /// On a cluster, the tables of which lists and rows agree: between two rounds, while nothing is lost. `None`: of all.
    fn tables_with_all_members(&self, redis: &Redis) -> Result<Option<BTreeSet<u16>>, String> {
        if !self.is_on_cluster() {
            return Ok(None);
        }
        let Some(checkpoint) = redis.checkpoint()?.filter(|checkpoint| !checkpoint.lists_in_doubt) else {
            return Ok(Some(BTreeSet::new()));
        };
        let is_made = |(table, of): (&u16, &Arc<Lookups>)| {
            let mark = checkpoint.tables.get(&super::postgres::name(*table).table);
            let is_made =
                mark.is_some_and(|mark| mark.state == TableState::Loaded && mark.lookups_as == Some(of.fingerprint()));
            is_made.then_some(*table)
        };
        match self.knows_of_all_losses(&checkpoint) {
            true => Ok(Some(self.lookups.iter().filter_map(is_made).collect())),
            false => Ok(Some(BTreeSet::new())),
        }
    }

    /// Whether whatever a cluster has lost was found out and mended.
    fn knows_of_all_losses(&self, checkpoint: &Checkpoint) -> bool {
        self.lost_at <= self.judged_at && checkpoint.healing == 0 && self.doubted.is_empty() && !self.adrift
    }

    /// After the last fault, lists and rows agree, apart from what somebody has changed.
    pub fn all_members_agree(&self, redis: &Redis) -> Result<(), String> {
        let differing = self.differing_members(redis)?;
        match differing.iter().find(|(row, _)| !self.excused.contains(row)) {
            Some((row, list)) => Err(format!("at the end, {row:?} and its membership of {list} disagree")),
            None => Ok(()),
        }
    }

    /// Checks the guarantees after a batch, or after a call.
    pub fn look(&mut self, redis: &Redis, postgres: &Postgres) -> Result<(), String> {
        self.lookups_agree(redis)?;
        let rows = redis.rows()?;
        let checkpoint = redis.checkpoint()?;
        self.no_longer_doubts(redis, postgres)?;
        self.is_there(&rows);
        for lane in redis.lanes() {
            let written = self.written.entry(lane).or_default();
            *written = redis.place_of_lane(lane).max(*written);
        }
        let Some(checkpoint) = checkpoint else {
            let none = self.is_on_cluster().then_some(()).ok_or("a batch without a checkpoint");
            self.was = rows;
            // Where it was lost, nothing is vouched for.
            return none.map_err(str::to_owned);
        };
        if self.adrift {
            self.announced = announced::count(redis);
            self.was = rows;
            // A record that was rolled back does not say what Redis has had.
            let version = (checkpoint.epoch, checkpoint.seq);
            if version >= self.newest {
                (self.newest, self.applied) = (version, checkpoint.lsn.0.get());
            }
            return Ok(());
        }
        let mut vouched = self.vouched(redis, postgres, &checkpoint);
        vouched.retain(|row, _| !self.is_row_doubted(*row));
        let is_partial = |table: u16| {
            let mark = checkpoint.tables.get(&super::postgres::name(table).table);
            mark.is_some_and(|mark| mark.state != TableState::Loaded)
        };
        let operated = self.operated;
        let round_ends = self.is_on_cluster() && self.round_ends(redis, &checkpoint);
        self.follower.looks(redis);
        let before = std::mem::replace(&mut self.announced, announced::count(redis));
        let (was, keys) = (&self.was, &self.keys);
        let batch = announced::Batch { redis, checkpoint: &checkpoint, keys, before, was, rows: &rows };
        // An operator may have removed it.
        let is_taken_away = |row: RowId| operated && is_partial(row.table) && !has_key(&rows, row, false);
        let is_drift = |row: RowId| self.evicted.contains_key(&row) || is_taken_away(row);
        // A part of a hash slot may be older than the other: its mark than the stream, for example.
        if !self.other_history && !self.was_parted {
            let of = |commit| postgres.transactions.iter().find(|t| t.commit == commit);
            let is_split = |commit| of(commit).is_none_or(|t| t.is_split(postgres.atomic, postgres.clears_in_parts));
            announced::is_in_order(redis, is_split)?;
        }
        if self.is_on_cluster() && self.knows_of_all_losses(&checkpoint) {
            announced::can_be_read(redis, before, |row| redis.place_of_lane(self.lanes[&row]))?;
        }
        if !self.is_on_cluster() {
            batch.check(is_drift)?;
        } else if round_ends {
            if let Some((was, before)) = &self.round {
                announced::Batch { before: *before, was, ..batch }.check(is_drift)?;
            }
            if !self.other_history {
                self.follower.check(&batch, is_drift)?;
            }
            self.round = Some((rows.clone(), self.announced));
        }
        for row in rows.keys().chain(self.was.keys()).copied().collect::<BTreeSet<_>>() {
            // An operator may have removed it, in which case the table's entry says so, or the record went back since.
            let has_key = has_key(&rows, row, self.is_on_cluster());
            // A lane that is ahead forgets a dead letter when the record has come as far, while the row is read again.
            let forgotten =
                self.is_on_cluster() && self.was.get(&row) == Some(&Values::DEAD) && !rows.contains_key(&row);
            let is_partial = is_partial(row.table) || !vouched.contains_key(&row);
            let taken_away = !has_key && is_partial && (operated || forgotten);
            if rows.get(&row) != self.was.get(&row) && !taken_away && !self.is_row_doubted(row) {
                // The record of a dead letter may have been lost since, as the lane's mark knows.
                let hides = hides(&checkpoint, row) || !vouched.contains_key(&row);
                self.changed(row, rows.get(&row).copied(), &postgres.history[&row], hides)?;
            }
        }
        self.was = rows;
        self.types_are_right(redis, &checkpoint)?;

        self.applied = self.applied.max(checkpoint.lsn.0.get());
        self.newest = self.newest.max((checkpoint.epoch, checkpoint.seq));
        self.lasts(redis, &checkpoint, |row| vouched.contains_key(&row))?;
        for (row, values) in self.was.iter().filter(|(row, _)| vouched.contains_key(row)) {
            let mark = checkpoint.tables.get(&super::postgres::name(row.table).table);
            if let Some(mark) = mark.filter(|mark| mark.state != TableState::Healing) {
                let as_of = mark.as_of.map_or(checkpoint.lsn, |as_of| as_of.min(checkpoint.lsn)).0.get();
                // Its node may have gone back, and no takeover has found out.
                let went_back = self.lanes.get(row).and_then(|lane| self.lost_last(*lane)) > Some(self.judged_at);
                let as_of = if went_back { as_of.min(vouched[row].at) } else { as_of };
                if self.other_history && as_of == Lsn::FIRST.get() {
                    // A daemon that lost both the slot and the checkpoint cannot know that Postgres was rewound.
                    continue;
                }
                let versions = &postgres.history[row];
                let at_least = versions.iter().rposition(|v| v.end <= as_of).unwrap_or(0);
                let last = versions.iter().rposition(|v| self.shows(v, Some(*values), false));
                if last.is_none_or(|place| place < at_least) {
                    return Err(format!("{row:?} shows {values:?}, older than the promised {as_of:x}: {versions:?}"));
                }
            }
        }
        let loaded = |row: RowId| {
            let mark = checkpoint.tables.get(&super::postgres::name(row.table).table);
            mark.is_some_and(|m| m.state == TableState::Loaded && m.ttl_until_ms.is_none_or(|at| at > redis.time_ms))
                && vouched.contains_key(&row)
        };
        let lanes: BTreeSet<Option<Lane>> = postgres.history.keys().map(|row| self.lanes.get(row).copied()).collect();
        for lane in lanes {
            self.is_whole(postgres, &checkpoint, |row| loaded(row) && self.lanes.get(&row).copied() == lane)?;
        }
        for (row, versions) in postgres.history.iter().filter(|(row, _)| loaded(**row)) {
            self.is_exact(&checkpoint, vouched[row], *row, versions, postgres.clears_in_parts)?;
        }
        Ok(())
    }

    /// Whether a round has just ended, all lanes are where the record is, and nothing is lost.
    fn round_ends(&mut self, redis: &Redis, checkpoint: &Checkpoint) -> bool {
        let ended = (checkpoint.epoch, checkpoint.seq);
        let has_ended = std::mem::replace(&mut self.ended, ended) != ended;
        has_ended && self.knows_of_all_losses(checkpoint) && redis.furthest() <= checkpoint.place()
    }

    /// Returns what Redis vouches for, of each row of which it vouches for anything.
    fn vouched(&self, redis: &Redis, postgres: &Postgres, checkpoint: &Checkpoint) -> BTreeMap<RowId, Vouched> {
        if self.is_on_cluster() {
            let places = redis.places(checkpoint, self.lanes.iter().map(|(row, lane)| (*row, *lane)));
            return places.into_iter().map(|(row, place)| (row, Vouched::by_lane(place))).collect();
        }
        let split = checkpoint.within.map(|w| w.begin.commit.0.get());
        let all = Vouched { at: checkpoint.lsn.0.get(), split };
        postgres.history.keys().map(|row| (*row, all)).collect()
    }

    /// No row expires earlier than promised.
    fn lasts(&self, redis: &Redis, checkpoint: &Checkpoint, counts: impl Fn(RowId) -> bool) -> Result<(), String> {
        for mark in checkpoint.tables.iter().enumerate() {
            let (table, (_, mark)) = (u16::try_from(mark.0).map_err(|e| e.to_string())?, mark.1);
            let (life, promised) = (redis.shortest_life(table, &counts), mark.ttl_until_ms);
            if let (Some(life), Some(promised), TableState::Loaded) = (life, promised, mark.state)
                && life < promised
            {
                return Err(format!("a row of table {table} expires at {life}, promised is {promised}"));
            }
            if let (Some(of), Some(promised), TableState::Loaded) = (self.lookups.get(&table), promised, mark.state)
                && mark.lookups_as == Some(of.fingerprint())
                && (!self.is_on_cluster() || self.knows_of_all_losses(checkpoint))
                && let Some(life) = redis.shortest_life_of_lists(of, |row| !self.excused.contains(row))
                && life < promised
            {
                return Err(format!("a list of table {table} expires at {life}, promised is {promised}"));
            }
        }
        Ok(())
    }

    /// Checks one row: never torn, never older than before, no version skipped, and a deleted row stays deleted.
    fn changed(&mut self, row: RowId, now: Option<Values>, versions: &[Version], hides: bool) -> Result<(), String> {
        let last = self.last.get(&row).copied();
        let place =
            match now {
                // Dead letters cannot be told apart from each other.
                Some(Values::DEAD) => (last.unwrap_or(0)..versions.len())
                    .find(|i| self.shows(&versions[*i], now, hides))
                    .ok_or_else(|| format!("{row:?} was recorded as a dead letter, but is none: {versions:?}"))?,
                Some(values) => {
                    let place = place(versions, values)
                        .ok_or_else(|| format!("torn row: {row:?} was never {values:?} {versions:?}"))?;
                    if let Some(last) = last.filter(|last| *last > place) {
                        let what = if versions[last].values.is_none() { "came back" } else { "went backwards" };
                        return Err(format!("{row:?} {what}: {:?} after {:?}", versions[place], versions[last]));
                    }
                    place
                }
                None => (last.unwrap_or(0)..versions.len())
                    .find(|i| self.shows(&versions[*i], None, hides))
                    .ok_or_else(|| format!("gap: {row:?} is gone, and was not deleted: {versions:?}"))?,
            };
        self.last.insert(row, place);
        Ok(())
    }

    /// Transactions up to the atomic limits are visible all or nothing in loaded tables.
    fn is_whole(
        &self,
        postgres: &Postgres,
        checkpoint: &Checkpoint,
        counts: impl Fn(RowId) -> bool,
    ) -> Result<(), String> {
        let transactions = postgres.wal.iter().rev().filter_map(|r| r.transaction).take(LOOKED_BACK);
        let transactions = transactions.map(|t| &postgres.transactions[t]);
        for transaction in transactions.filter(|t| !t.is_split(postgres.atomic, postgres.clears_in_parts)) {
            let (mut old, mut new) = (None, None);
            for (row, versions) in postgres.history.iter().filter(|(row, _)| counts(**row)) {
                let Some(made) = versions.iter().position(|v| v.commit == transaction.commit) else { continue };
                let shown = self.was.get(row).copied();
                if self.evicted.contains_key(row) || self.is_forgotten(*row, shown, versions, versions) {
                    continue;
                }
                let hides = hides(checkpoint, *row);
                let mut places = (0..versions.len()).filter(|i| self.shows(&versions[*i], shown, hides));
                let is_new = places.clone().all(|i| i >= made);
                let is_old = places.all(|i| i < made);
                new = new.or(is_new.then_some(*row));
                old = old.or(is_old.then_some(*row));
            }
            if let (Some(old), Some(new)) = (old, new) {
                return Err(format!("half a transaction: {new:?} shows {:?}, {old:?} does not", transaction.ops));
            }
        }
        Ok(())
    }

    /// A loaded table is exactly what Postgres had at the checkpoint's position, except that in the middle of a split
    /// transaction some of the transaction's changes may already be present.
    fn is_exact(
        &mut self,
        checkpoint: &Checkpoint,
        Vouched { at, split }: Vouched,
        row: RowId,
        versions: &[Version],
        clears_in_parts: bool,
    ) -> Result<(), String> {
        self.looked += 1;
        let hides = hides(checkpoint, row);
        let shown = self.was.get(&row).copied();
        let has_no_key = shown.is_none() || self.is_on_cluster() && shown == Some(Values::DEAD);
        // On a cluster, a dead letter is forgotten with the record: after its lane was written, or without that if there
        // is no key to be removed.
        let record = Some(Vouched::by_lane(checkpoint.place())).filter(|_| self.is_on_cluster());
        let least = record.filter(|_| shown == Some(Values::DEAD)).map_or(at, |record| at.min(record.at));
        let lane = Vouched { at, split };
        let most = record.filter(|_| shown.is_none()).unwrap_or(lane);
        // A position may be inside a commit record, in which case the states on both sides of it are correct.
        let from = versions.iter().rposition(|v| v.end <= least).unwrap_or(0);
        let until = versions.iter().rposition(|v| lane.may_have(v) || most.may_have(v)).unwrap_or(0);
        if versions[from..=until].iter().any(|v| self.shows(v, shown, hides)) || self.is_drift(row, &versions[from]) {
            return Ok(());
        }
        if clears_in_parts && has_no_key && versions[from..].iter().any(|v| v.truncated) {
            return Ok(());
        }
        if self.is_forgotten(row, shown, &versions[from..=until], &versions[from..]) {
            return Ok(());
        }
        Err(format!("not exact: {row:?} shows {shown:?} at {at:x}, should be one of {:?}", &versions[from..=until]))
    }

    /// Whether the record has forgotten a dead letter because it, and the row's lane, had come beyond that, and then the lane
    /// went back.
    fn is_forgotten(&self, row: RowId, shown: Option<Values>, versions: &[Version], all: &[Version]) -> bool {
        let is_dead = |version: &Version| version.values == Some(Values::DEAD);
        let went_back = self.lanes.get(&row).is_some_and(|lane| self.lost_last.contains_key(lane));
        let dead = all.iter().position(is_dead).unwrap_or(all.len());
        let beyond = |version: &Version| !is_dead(version) && version.end <= self.applied;
        let had_come_beyond = all.iter().skip(dead).any(beyond);
        shown.is_none() && went_back && versions.iter().any(is_dead) && had_come_beyond
    }

    /// Called when a session confirms a position to Postgres. Redis must have had everything before it, and every
    /// snapshot must see it. Transactions that committed before the slot was created are exempt.
    ///
    /// `listed`: the lanes that the session must have written.
    pub fn confirm(
        &self,
        at: u64,
        safe_when: SafeWhen,
        postgres: &Postgres,
        listed: impl Iterator<Item = Lane>,
    ) -> Result<(), String> {
        if let Some((lane, had)) = listed.map(|lane| (lane, self.written[&lane])).find(|(_, had)| at > *had) {
            return Err(format!("confirmed {at:x}, lane {lane} has had {had:x}"));
        }
        if safe_when == SafeWhen::Told && !self.is_on_cluster() && at > self.replicated {
            return Err(format!("confirmed {at:x}, the replica has had {:x}", self.replicated));
        }
        if at > self.applied {
            return Err(format!("confirmed {at:x}, redis has had {:x}", self.applied));
        }
        let born = postgres.slot.map_or(0, |slot| slot.born);
        let unseen = |t: &&Transaction| t.phase == Phase::Logged && t.end > born && t.commit < at;
        match postgres.transactions.iter().find(unseen) {
            Some(t) => Err(format!("confirmed {at:x} past a transaction at {:x} that no snapshot sees", t.commit)),
            None => Ok(()),
        }
    }
}
