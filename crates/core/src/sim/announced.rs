//! A consumer of the change stream, and what it must be told.
//!
//! It lies in Redis in place of the stream, so that it forgets what Redis loses. Under each key of a row: what was announced
//! last, and its number. Under a table's name: the number of what was announced of the whole table.

use super::postgres::{RowId, Values};
use super::redis::{self, Redis};
use super::store::Hash;
use crate::checkpoint::{Checkpoint, TableMark, TableState};
use crate::command::Key;
use crate::lsn::Lsn;
use crate::resp::batch::ChangeStream;
use bytes::Bytes;
use std::collections::{BTreeMap, BTreeSet};

pub const CHANGES: &[u8] = b"prefetchd-changes";

/// The number of entries so far.
const COUNT: &[u8] = b"#";
/// Before the key of a row: the LSN of its last entry.
const LAST: &[u8] = b"@";
/// The key of a row of which an earlier change was announced after a later one.
const DISORDER: &[u8] = b"!";
/// The LSN of a change of a row that was announced twice.
const TWICE: &[u8] = b"=";

pub fn stream() -> ChangeStream {
    ChangeStream { key: Key(Bytes::from_static(CHANGES)), max_len: 1000 }
}

/// What a consumer is told by an entry with these arguments. `None` if they are not those of an entry.
pub fn tell(known: &mut Hash, arguments: &[Bytes]) -> Option<()> {
    let [max_len, about, _, any, fields @ ..] = arguments else { return None };
    if (&max_len[..], &about[..], &any[..]) != (b"MAXLEN", b"~", b"*") || !fields.len().is_multiple_of(2) {
        return None;
    }
    let field = |name: &[u8]| fields.chunks(2).find(|pair| pair[0] == name).map(|pair| &pair[1]);
    let (op, table) = (field(b"op")?, field(b"table")?);
    let count = number(known.get(COUNT)) + 1;
    known.insert(Bytes::from_static(COUNT), count.to_string().into());
    let entry = |what: &[u8]| Bytes::from([what, b" ", count.to_string().as_bytes()].concat());
    match (&op[..], field(b"key")) {
        (b"upsert" | b"delete", Some(key)) => {
            let lsn = field(b"lsn")?;
            field(b"xid").and(field(b"time"))?;
            let last = known.insert(Bytes::from([LAST, key].concat()), lsn.clone());
            if last.as_ref().and_then(lsn_of) > lsn_of(lsn) {
                known.insert(Bytes::from_static(DISORDER), key.clone());
            } else if last.as_ref() == Some(lsn) {
                known.insert(Bytes::from_static(TWICE), lsn.clone());
            }
            known.insert(key.clone(), entry(op));
        }
        (b"truncate" | b"loaded", None) => {
            let prefix = [table, &b":"[..]].concat();
            known.retain(|key, _| !key.starts_with(&prefix));
            known.insert(table.clone(), entry(op));
        }
        _ => return None,
    }
    Some(())
}

fn lsn_of(text: &Bytes) -> Option<Lsn> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

fn number(text: Option<&Bytes>) -> u64 {
    let digits = text.and_then(|text| text.rsplit(|b| *b == b' ').next());
    digits.and_then(|digits| std::str::from_utf8(digits).ok()?.parse().ok()).unwrap_or(0)
}

/// Changes of a row are announced in the order of their commits, and none twice. `is_split`: whether a transaction is
/// applied in parts, which may change a row several times.
pub fn is_in_order(redis: &Redis, is_split: impl Fn(u64) -> bool) -> Result<(), String> {
    let Some(known) = redis.announced() else { return Ok(()) };
    if let Some(key) = known.get(DISORDER) {
        return Err(format!("a change of {key:?} was announced after a later one"));
    }
    match known.get(TWICE).and_then(lsn_of).filter(|lsn| !is_split(lsn.get())) {
        Some(lsn) => Err(format!("a change was announced twice, at {lsn}")),
        None => Ok(()),
    }
}

/// What was announced since there were `before` entries can be read. `place`: what the lane of a row has reached.
pub fn can_be_read(redis: &Redis, before: u64, place: impl Fn(RowId) -> u64) -> Result<(), String> {
    let Some(known) = redis.announced() else { return Ok(()) };
    for (key, told) in known {
        let Some(row) = redis::row_of(key).filter(|_| number(Some(told)) > before) else { continue };
        let lsn = known.get(&[LAST, key].concat()[..]).and_then(lsn_of);
        if lsn.is_some_and(|lsn| place(row) < lsn.get()) {
            return Err(format!("a change of {row:?} was announced before it was written"));
        }
    }
    Ok(())
}

/// The number of entries in the stream.
pub fn count(redis: &Redis) -> u64 {
    redis.announced().map_or(0, |known| number(known.get(COUNT)))
}

/// Somebody who follows the stream, mostly a little behind, and remembers what it was told of each row when Redis has lost that.
#[derive(Default)]
pub struct Follower {
    there: BTreeMap<Bytes, bool>,
    /// The number of the last entry that it has read.
    last: u64,
}

impl Follower {
    /// It may read, or not.
    pub fn looks(&mut self, redis: &Redis) {
        if count(redis).is_multiple_of(3) {
            self.reads(redis);
        }
    }

    /// The stream may have lost entries.
    pub fn lost(&mut self, redis: &Redis) {
        self.last = self.last.min(count(redis));
    }

    fn reads(&mut self, redis: &Redis) {
        let Some(known) = redis.announced() else { return };
        let is_new = |told: &Bytes| number(Some(told)) > self.last;
        for table in known.iter().filter(|(key, told)| !key.contains(&b':') && is_new(told)).map(|(table, _)| table) {
            let prefix = [table, &b":"[..]].concat();
            self.there.retain(|key, _| !key.starts_with(&prefix));
        }
        let rows = known.iter().filter(|(key, told)| redis::row_of(key).is_some() && is_new(told));
        self.there.extend(rows.map(|(key, told)| (key.clone(), told.starts_with(b"upsert"))));
        self.last = count(redis);
    }

    /// Once it has read everything, it knows which rows are there, of those that it was told of.
    pub fn check(&mut self, batch: &Batch<'_>, is_drift: impl Fn(RowId) -> bool) -> Result<(), String> {
        self.reads(batch.redis);
        for (key, there) in &self.there {
            let row = redis::row_of(key).expect("only those are remembered");
            let is_there = batch.rows.get(&row).is_some_and(|values| *values != Values::DEAD);
            if *there != is_there && !batch.may_change(row) && !is_drift(row) && batch.is_settled(row) {
                return Err(format!("{row:?} is {:?}, and a follower was told another", batch.rows.get(&row)));
            }
        }
        Ok(())
    }
}

/// What was announced by a batch.
pub struct Batch<'a> {
    pub redis: &'a Redis,
    pub checkpoint: &'a Checkpoint,
    /// The rows' keys, on a cluster.
    pub keys: &'a BTreeMap<RowId, Key>,
    /// The number of entries before the batch.
    pub before: u64,
    pub was: &'a BTreeMap<RowId, Values>,
    pub rows: &'a BTreeMap<RowId, Values>,
}

impl Batch<'_> {
    fn mark(&self, row: RowId) -> Option<&TableMark> {
        self.checkpoint.tables.get(&super::postgres::name(row.table).table)
    }

    /// Whether the row may change without being announced.
    fn may_change(&self, row: RowId) -> bool {
        let mark = self.mark(row);
        // What a TRUNCATE or an operator removes, a batch at a time.
        let is_cleared = self.checkpoint.clearing.is_some() || mark.is_none_or(|mark| mark.removed);
        let is_there = self.rows.get(&row).is_some_and(|values| *values != Values::DEAD);
        mark.is_none_or(|mark| mark.changed_beside) || is_cleared && !is_there
    }

    /// Whether its table is loaded. Rows may have expired while no daemon renewed them, and the load that this takes has
    /// changed nothing yet.
    fn is_settled(&self, row: RowId) -> bool {
        let lasts = |mark: &TableMark| mark.ttl_until_ms.is_none_or(|until| until > self.redis.time_ms);
        self.mark(row).is_some_and(|mark| mark.state == TableState::Loaded && lasts(mark))
    }

    /// Every row that the batch has changed was announced, and what a consumer knows of a row is so. `is_drift`: whether
    /// somebody else may have removed the row.
    pub fn check(&self, is_drift: impl Fn(RowId) -> bool) -> Result<(), String> {
        let Some(known) = self.redis.announced() else { return Ok(()) };
        let is_there = |rows: &BTreeMap<RowId, Values>, row| rows.get(&row).is_some_and(|v| *v != Values::DEAD);
        let told = known.keys().filter_map(|key| redis::row_of(key));
        let rows: BTreeSet<RowId> = self.was.keys().chain(self.rows.keys()).copied().chain(told).collect();
        for row in rows {
            let table = super::postgres::name(row.table).table;
            let key = self.keys.get(&row).map_or_else(|| format!("{table}:{}", row.id).into(), |key| key.0.clone());
            let is_new = |field: &[u8]| number(known.get(field)) > self.before;
            let has_changed = is_there(self.was, row) != is_there(self.rows, row)
                || is_there(self.rows, row) && self.was.get(&row) != self.rows.get(&row);
            let is_told = is_new(&key) || is_new(table.as_bytes());
            let may_change = self.may_change(row);
            if has_changed && !is_told && !may_change && !is_drift(row) {
                return Err(format!("{row:?} changed to {:?}, and nobody was told", self.rows.get(&row)));
            }
            if !self.is_settled(row) {
                continue;
            }
            let told = known.get(&key).map(|told| told.starts_with(b"upsert"));
            if told.is_some_and(|there| there != is_there(self.rows, row)) && !may_change && !is_drift(row) {
                return Err(format!("{row:?} is {:?}, and a consumer was told another", self.rows.get(&row)));
            }
        }
        Ok(())
    }
}
