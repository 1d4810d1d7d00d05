//! What a batch appends to the change stream: an entry for each key that it changes, in the order of the last changes.
//! Entries and checkpoint are written together, so a change that is delivered again is not announced again.
//!
//! A row that could not be written yet is announced when it has been read again. What a load or a repair changes is not
//! announced row by row: its end tells consumers to start over.

use super::Machine;
use super::judge_chunk::JudgedPart;
use super::table::Table;
use super::turn::Turn;
use crate::change::Begin;
use crate::command::{Announced, Announcement, Command, Key};
use crate::plan::order::{Changed, Order};
use crate::resp::batch::{Batch, OwnKeys};
use crate::rules::{Rule, holds};
use crate::schema::TableId;
use bytes::Bytes;
use std::collections::{BTreeSet, HashMap};

/// What an entry weighs besides the stream's key, the table's name and the row's key: the names of the command and its
/// fields, the longest numbers, and what Redis keeps for each argument.
const ENTRY_WEIGHT: usize = 640;

/// Returns what one entry weighs without the row's key; `None` if changes are not announced.
pub(super) fn weight_of_announcement(own: &OwnKeys, longest_name: usize) -> Option<usize> {
    own.changes().map(|stream| ENTRY_WEIGHT + stream.key.as_bytes().len() + longest_name)
}

/// Rows that must be read again, and the transactions that changed them. All of them are pending.
#[derive(Default)]
pub(super) struct Unannounced(HashMap<Key, (TableId, Begin)>);

impl Machine {
    pub(super) fn announces(&self) -> bool {
        self.growing.announces()
    }

    /// Announces what the stream has changed. `became`: what the batch makes of its keys; the others must be read again.
    pub(super) fn announce_changes(
        &mut self,
        order: Order,
        became: &HashMap<Key, Announced>,
        out: &mut Batch,
        turn: &mut Turn,
    ) {
        for Changed { table, key, by } in order.into_changed() {
            let Some(key) = key else {
                self.unannounced.0.retain(|_, (of, _)| *of != table);
                self.announce(table, Announced::Truncate, Bytes::new(), Some(by), out, turn);
                continue;
            };
            match became.get(&key) {
                Some(op) => {
                    self.unannounced.0.remove(&key);
                    self.announce(table, *op, key.0, Some(by), out, turn);
                }
                // An earlier session may have announced it when it had read the row again.
                None if !self.outbox.has_caught_up() && holds(Rule::AnnounceRereadOnce) => {
                    self.tables.get_mut(table).changes_beside();
                }
                None => {
                    self.unannounced.0.insert(key, (table, by));
                }
            }
        }
    }

    /// Announces rows of the stream that had to be read again, or remembers that a load changes something. To be called
    /// before `part` is written, whose rows are those that are written.
    pub(super) fn announce_part(&mut self, part: &JudgedPart, out: &mut Batch, turn: &mut Turn) {
        let writes = |key: &&Key| part.writes(key);
        let rows = || part.rows.iter().flat_map(|rows| rows.rows.iter().map(|(key, _)| key)).filter(writes);
        let was_owed: Vec<(&Key, TableId, Begin)> = part
            .resolved
            .iter()
            .filter_map(|key| self.unannounced.0.remove(key).map(|(of, by)| (key, of, by)))
            .collect();
        if part.of_load || part.compares.is_some() {
            let displaces = part.compares.as_ref().is_none_or(|compares| compares.found.repaired > 0);
            let removes = !part.deletes.is_empty() || displaces && !part.unwritable.is_empty();
            if removes || !was_owed.is_empty() || rows().next().is_some() {
                self.tables.get_mut(part.table).changes_beside();
            }
            return;
        }
        let written: BTreeSet<&Key> = if was_owed.is_empty() { BTreeSet::new() } else { rows().collect() };
        for (key, table, by) in was_owed {
            let op = if written.contains(key) { Announced::Upsert } else { Announced::Delete };
            self.announce(table, op, key.0.clone(), Some(by), out, turn);
        }
    }

    /// Rows of this table are no longer read again one by one, because a load brings them.
    pub(super) fn announces_no_rows_of(&mut self, table: TableId) {
        if self.announces() {
            self.unannounced.0.retain(|_, (of, _)| *of != table);
            self.tables.get_mut(table).changes_beside();
        }
    }

    /// Announces tables that loads and repairs have changed, once nothing is loaded, compared or read again any more.
    pub(super) fn announce_loaded(&mut self, out: &mut Batch, turn: &mut Turn) {
        // A hash slot that is ahead takes nothing of the batch, so the entry would be lost.
        if self.announces() && self.outbox.has_caught_up() {
            let is_one = self.outbox.is_one_transaction();
            let is_over = |table: &Table| table.load().is_none() && (is_one || !table.has_pending());
            for table in self.tables.ids(|table| is_over(table) && table.has_changed_beside()) {
                self.tables.get_mut(table).tells_of_changes_beside();
                self.announce(table, Announced::Loaded, Bytes::new(), None, out, turn);
            }
        }
    }

    fn announce(&self, table: TableId, op: Announced, key: Bytes, by: Option<Begin>, out: &mut Batch, turn: &mut Turn) {
        let table = self.tables.name(table).to_owned();
        turn.puts(out, &Command::Announce(Announcement { op, table, key, by }));
    }
}
