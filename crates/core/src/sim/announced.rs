//! A consumer of the change stream, and what it must be told.
//!
//! It lies in Redis in place of the stream, so that it forgets what Redis loses. Under each key of a row: what was announced
//! last, and its number. Under a table's name: the number of what was announced of the whole table.

use super::postgres::{RowId, Values};
use super::redis::{self, Redis};
use super::store::Hash;
use crate::checkpoint::{Checkpoint, TableMark, TableState};
use crate::command::Key;
use crate::resp::batch::ChangeStream;
use bytes::Bytes;
use std::collections::{BTreeMap, BTreeSet};

pub const CHANGES: &[u8] = b"prefetchd-changes";

/// The number of entries so far.
const COUNT: &[u8] = b"#";

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
            field(b"lsn").and(field(b"xid")).and(field(b"time"))?;
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

fn number(text: Option<&Bytes>) -> u64 {
    let digits = text.and_then(|text| text.rsplit(|b| *b == b' ').next());
    digits.and_then(|digits| std::str::from_utf8(digits).ok()?.parse().ok()).unwrap_or(0)
}

/// The number of entries in the stream.
pub fn count(redis: &Redis) -> u64 {
    redis.announced().map_or(0, |known| number(known.get(COUNT)))
}

/// What was announced by a batch.
pub struct Batch<'a> {
    pub redis: &'a Redis,
    pub checkpoint: &'a Checkpoint,
    /// The number of entries before the batch.
    pub before: u64,
    pub was: &'a BTreeMap<RowId, Values>,
    pub rows: &'a BTreeMap<RowId, Values>,
}

impl Batch<'_> {
    /// Every row that the batch has changed was announced, and what a consumer knows of a row is so. `is_drift`: whether
    /// somebody else may have removed the row.
    pub fn check(&self, is_drift: impl Fn(RowId) -> bool) -> Result<(), String> {
        let Some(known) = self.redis.announced() else { return Ok(()) };
        let is_there = |rows: &BTreeMap<RowId, Values>, row| rows.get(&row).is_some_and(|v| *v != Values::DEAD);
        let told = known.keys().filter_map(|key| redis::row_of(key));
        let rows: BTreeSet<RowId> = self.was.keys().chain(self.rows.keys()).copied().chain(told).collect();
        for row in rows {
            let table = super::postgres::name(row.table).table;
            let key = format!("{table}:{}", row.id);
            let mark = self.checkpoint.tables.get(&table);
            let is_new = |field: &[u8]| number(known.get(field)) > self.before;
            let has_changed = is_there(self.was, row) != is_there(self.rows, row)
                || is_there(self.rows, row) && self.was.get(&row) != self.rows.get(&row);
            let is_told = is_new(key.as_bytes()) || is_new(table.as_bytes());
            // What a TRUNCATE or an operator removes, a batch at a time.
            let is_cleared = self.checkpoint.clearing.is_some() || mark.is_none_or(|mark| mark.removed);
            let may_change = mark.is_none_or(|mark| mark.changed_beside) || is_cleared && !is_there(self.rows, row);
            if has_changed && !is_told && !may_change && !is_drift(row) {
                return Err(format!("{row:?} changed to {:?}, and nobody was told", self.rows.get(&row)));
            }
            // Rows may have expired while no daemon renewed them, and the load that this takes has changed nothing yet.
            let lasts = |mark: &TableMark| mark.ttl_until_ms.is_none_or(|until| until > self.redis.time_ms);
            if !mark.is_some_and(|mark| mark.state == TableState::Loaded && lasts(mark)) {
                continue;
            }
            let told = known.get(key.as_bytes()).map(|told| told.starts_with(b"upsert"));
            if told.is_some_and(|there| there != is_there(self.rows, row)) && !may_change && !is_drift(row) {
                return Err(format!("{row:?} is {:?}, and a consumer was told another", self.rows.get(&row)));
            }
        }
        Ok(())
    }
}
