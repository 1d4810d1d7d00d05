//! Readers that answer for rows of a cluster as HTTP does: they read the record, the row with the mark of its lane, and the
//! record again, and remember what they have read. Stands in for `sink::lane_reader` and `http::read`.
//!
//! Whatever happens to the nodes, an answer is a row, or that there is none, only where that is true; anything else is
//! answered with 503.

use super::observer::Observer;
use super::postgres::{self, Postgres, RowId, Values};
use super::redis::{Redis, SLOT};
use super::{Outside, Violation};
use crate::checkpoint::{Checkpoint, TableMark, TableState};
use crate::lanes::Lane;
use crate::lanes::mark::Home;
use crate::lanes::reading::{Around, Listing, Seen, Shown, healing};
use crate::lanes::tags::mark_key;
use bytes::Bytes;
use std::collections::BTreeMap;

/// What a reader is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Told {
    Row(Values),
    NotFound,
    /// 503: the hash slot of the row, or of the record, is moving, and a key is not where it was.
    OnTheMove,
    /// 503: there is no record, or it went back.
    NoRecord,
    /// 503: the lane has lost something that the record says is there, or that was shown.
    InDoubt,
    /// 503: the table is healing.
    Healing,
    /// 503: the row is not there, and may exist.
    Incomplete,
    /// 503: Redis cannot hold the row.
    DeadLetter,
}

#[derive(Default)]
pub struct Reader {
    seen: Seen,
    /// The newest record that was read: epoch and number.
    newest: (u64, u64),
    /// The last answer about each row.
    last: BTreeMap<RowId, Last>,
    reading: Option<Reading>,
}

/// The place of an answer in the row's history; what the record's epoch was, and when the lane had last lost something.
#[derive(Clone, Copy)]
struct Last {
    place: usize,
    epoch: u64,
    lost: Option<u64>,
}

struct Reading {
    row: RowId,
    /// Once the lane was found to have no mark. It is older than the row then.
    listed: Option<Option<Bytes>>,
    stage: Stage,
}

enum Stage {
    Begins,
    Listed,
    Lane(Record),
    Again(Record, Found),
}

struct Record {
    head: Option<Bytes>,
    entry: Option<Bytes>,
    is_dead: bool,
}

struct Found {
    /// What had been shown of the lane before.
    shown: Option<Shown>,
    mark: Option<Bytes>,
    /// The node that has it.
    home: Option<Home>,
    values: Option<Values>,
    /// When the lane had last lost something.
    lost: Option<u64>,
    /// Whether somebody had removed the row's key.
    may_be_drift: bool,
}

impl Record {
    fn read(row: RowId, redis: &Redis) -> Self {
        let (head, entries, _) = redis.record();
        let name = postgres::name(row.table).table;
        let entry = entries.into_iter().find(|(table, _)| *table == name.as_bytes()).map(|(_, entry)| entry);
        Record { head, entry, is_dead: redis.is_dead(row) }
    }

    fn listing(&self, listed: Option<&[u8]>) -> Listing {
        Listing::new(self.head.as_deref().unwrap_or_default(), listed)
    }
}

impl Reader {
    /// Reads a part of what it needs for its answer.
    pub fn step(&mut self, world: &mut Outside) -> Result<(), Violation> {
        let rows = world.postgres.history.len() as u64;
        let Some(Reading { row, mut listed, stage }) = self.reading.take() else {
            let which = world.rng.below(rows) as usize;
            let row = *world.postgres.history.keys().nth(which).ok_or("no rows")?;
            self.reading = Some(Reading { row, listed: None, stage: Stage::Begins });
            return Ok(());
        };
        let lane = world.observer.lane(row);
        if self.is_redirected(row, lane, &stage, world) {
            match world.rng.percent(80) {
                true => self.reading = Some(Reading { row, listed, stage }),
                false => world.log.saw(&Told::OnTheMove),
            }
            return Ok(());
        }
        let stage = match stage {
            Stage::Begins => Stage::Lane(Record::read(row, &world.redis)),
            Stage::Listed => {
                listed = Some(world.redis.record().2);
                Stage::Begins
            }
            Stage::Lane(before) => {
                let (shown, mark) = (self.seen.of(lane), world.redis.mark(lane).cloned());
                let (values, lost) = (world.redis.row(row)?, world.observer.lost_last(lane));
                let home = Some(world.redis.home_of(lane));
                let may_be_drift = world.observer.may_be_drift(row);
                match mark.is_none() && listed.is_none() {
                    true => Stage::Listed,
                    false => Stage::Again(before, Found { shown, mark, home, values, lost, may_be_drift }),
                }
            }
            Stage::Again(before, found) => {
                let after = Record::read(row, &world.redis);
                let listing = before.listing(listed.as_ref().and_then(Option::as_deref));
                if before.entry == after.entry && listing.stamps() == after.listing(None).stamps() {
                    let is_dead = before.is_dead || after.is_dead;
                    let told = self.judge(lane, &before, &listing, &found, is_dead, world.redis.time_ms);
                    world.log.saw(&told);
                    return self.is_true(row, told, &before, &found, &world.observer, &world.postgres);
                }
                Stage::Begins
            }
        };
        self.reading = Some(Reading { row, listed, stage });
        Ok(())
    }

    /// Whether a node answers with a redirection. It is asked again for a while.
    fn is_redirected(&self, row: RowId, lane: Lane, stage: &Stage, world: &Outside) -> bool {
        let redirects = |key: &[u8]| world.redis.redirects([key]).is_some();
        match stage {
            Stage::Begins | Stage::Listed | Stage::Again(..) => !world.redis.has_record(),
            Stage::Lane(_) => {
                redirects(mark_key(lane, SLOT).as_bytes()) || redirects(world.observer.key(row).as_bytes())
            }
        }
    }

    fn judge(
        &mut self,
        lane: Lane,
        record: &Record,
        listing: &Listing,
        found: &Found,
        is_dead: bool,
        now_ms: u64,
    ) -> Told {
        let Some(Ok(checkpoint)) = record.head.as_deref().map(Checkpoint::head) else { return Told::NoRecord };
        let version = (checkpoint.epoch, checkpoint.seq);
        if version < self.newest {
            return Told::NoRecord;
        }
        // The mark and the row are read together.
        let marks = Around { before: found.mark.clone(), after: found.mark.clone() };
        let held = listing.judge(lane, &marks, found.shown);
        let in_doubt = held.is_err();
        let may_lack_keys = held.as_ref().is_ok_and(|held| held.may_lack_keys(found.home));
        if let Ok(held) = held {
            self.seen.shows(listing, lane, &held);
        }
        self.newest = version;
        let Some(entry) = &record.entry else {
            return found.values.filter(|_| !in_doubt).map_or(Told::Incomplete, Told::Row);
        };
        let entry = if in_doubt { healing(entry) } else { entry.clone() };
        let mark = TableMark::from_json(&entry).expect("a table's entry");
        match (mark.state, found.values) {
            (TableState::Healing, _) if in_doubt => Told::InDoubt,
            (TableState::Healing, _) => Told::Healing,
            (_, Some(values)) => Told::Row(values),
            _ if mark.blocked.is_some() || mark.more_dead_letters => Told::Incomplete,
            (TableState::Loading | TableState::Incomplete, None) => Told::Incomplete,
            (TableState::Loaded, None) if mark.ttl_until_ms.is_some_and(|until| now_ms >= until) => Told::Incomplete,
            (TableState::Loaded, None) if may_lack_keys => Told::Incomplete,
            (TableState::Loaded, None) if mark.dead_letters > 0 && is_dead => Told::DeadLetter,
            (TableState::Loaded, None) => Told::NotFound,
        }
    }

    /// Checks the answer against what Postgres has had, and against what was answered before.
    fn is_true(
        &mut self,
        row: RowId,
        told: Told,
        record: &Record,
        found: &Found,
        observer: &Observer,
        postgres: &Postgres,
    ) -> Result<(), Violation> {
        let shown = match told {
            Told::Row(values) => Some(values),
            Told::NotFound => None,
            _ => return Ok(()),
        };
        let head = record.head.as_deref().unwrap_or_default();
        let checkpoint = Checkpoint::head(head).map_err(|error| error.to_string())?;
        if observer.adrift || observer.other_history {
            // Postgres went back, and its history with it.
            self.last.clear();
            return Ok(());
        }
        if observer.is_doubted(observer.lane(row)) {
            // Until it is read again, it may be missing or old, and nothing shows that.
            return Ok(());
        }
        let versions = &postgres.history[&row];
        let as_of = record.entry.as_deref().and_then(|entry| TableMark::from_json(entry).ok()?.as_of);
        let promised = as_of.map_or(checkpoint.lsn, |as_of| as_of.min(checkpoint.lsn)).0.get();
        // Until somebody has taken over since, it shows only to those who have read that lane before.
        let is_known = found.lost.is_none_or(|at| at < observer.judged_at());
        let at_least = if is_known { versions.iter().rposition(|v| v.end <= promised).unwrap_or(0) } else { 0 };
        let before = self.last.get(&row).filter(|last| last.epoch == checkpoint.epoch || last.lost == found.lost);
        let from = before.map_or(at_least, |last| last.place.max(at_least));
        let place = (from..versions.len()).find(|place| versions[*place].values == shown);
        if shown.is_none() && (found.may_be_drift || observer.may_be_drift(row)) {
            return Ok(());
        }
        match place {
            Some(place) => {
                _ = self.last.insert(row, Last { place, epoch: checkpoint.epoch, lost: found.lost });
                Ok(())
            }
            None => Err(format!(
                "a reader was told {told:?} of {row:?} at {promised:x}, should be from {from} on ({at_least} promised) of \
                 {versions:?}"
            )),
        }
    }

    /// Reads all rows at once. Returns the first that is not answered.
    pub fn misses(&mut self, world: &mut Outside) -> Result<Option<RowId>, Violation> {
        let rows: Vec<RowId> = world.postgres.history.keys().copied().collect();
        for row in rows {
            let lane = world.observer.lane(row);
            let record = Record::read(row, &world.redis);
            let listed = world.redis.record().2;
            let (shown, mark) = (self.seen.of(lane), world.redis.mark(lane).cloned());
            let home = Some(world.redis.home_of(lane));
            let found = Found { shown, mark, home, values: world.redis.row(row)?, lost: None, may_be_drift: false };
            let told = self.judge(
                lane,
                &record,
                &record.listing(listed.as_deref()),
                &found,
                record.is_dead,
                world.redis.time_ms,
            );
            match (world.postgres.truth().get(&row), told) {
                (Some(values), Told::Row(told)) if *values == told => {}
                (Some(&Values::DEAD), Told::DeadLetter | Told::Incomplete) | (None, Told::NotFound) => {}
                // Not all dead letters are recorded.
                (None, Told::Incomplete) => {}
                (None, Told::InDoubt | Told::Healing) if world.redis.is_left_behind(lane) => {}
                _ => return Ok(Some(row)),
            }
        }
        Ok(None)
    }
}
