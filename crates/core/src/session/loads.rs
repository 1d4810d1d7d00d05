//! Loads: why one begins, what the loader reports, and rows that are read again.

use super::load_messages::{CatalogSeen, Chunk, Content, FromLoad, LoadId, LoadOrder, Only, Purpose, Verdict};
use super::table::{Found, Load, Look, PENDING_KEYS, Table, Trust};
use super::turn::Turn;
use super::{Effect, Machine};
use crate::checkpoint::Blocked;
use crate::command::Key;
use crate::progress::visibility::Recording;
use crate::reason::{Heal, Reason};
use crate::rules::{Rule, holds};
use crate::schema::{CatalogMark, Oid, TableId};
use std::sync::Arc;

impl Machine {
    pub(super) fn begin_load(&mut self, id: TableId, because: Reason, trust: Trust, turn: &mut Turn) {
        if trust == Trust::Incomplete {
            self.tables.get_mut(id).mistrust();
        }
        self.no_longer_compared(id, &because.text, turn);
        self.read_whole(id, Purpose::Fill, because, turn);
    }

    /// Loads only the partitions that were attached: their rows are missing, and nothing else is wrong.
    fn load_attached(&mut self, id: TableId, only: Arc<[Oid]>, mark: CatalogMark, turn: &mut Turn) {
        self.tables.get_mut(id).is_incomplete();
        let because = Reason::heals(Heal::Schema, "a partition was attached");
        self.read(id, Purpose::Fill, Only::Leaves(only, mark), because, turn);
    }

    /// Whether whatever is delivered from now on is written to every hash slot that it concerns.
    fn has_caught_up(&self) -> bool {
        self.outbox.has_caught_up() && !self.is_split()
    }

    /// Begins loads anew that did not begin when all had caught up. They would miss what was left out in hash slots that have
    /// lost something, where rows then could not be merged, and would wait to be read again for as long as they change.
    fn begin_anew(&mut self, turn: &mut Turn) {
        let is_early = |load: &Load| load.purpose == Purpose::Fill && !load.has_caught_up;
        for table in self.tables.ids(|table| table.load().is_some_and(is_early)) {
            // It is counted already.
            let because = self.tables.get(table).load().map(|load| load.because.text.clone());
            self.begin_load(table, Reason::ordinary(because.unwrap_or_default()), Trust::Incomplete, turn);
        }
    }

    /// Loads what lies in hash slots that have lost something, or have moved.
    pub(super) fn read_hash_slots(&mut self, turn: &mut Turn) {
        if !self.has_caught_up() || self.draining {
            return;
        }
        if self.tables.hash_slots().healing() > 0 {
            self.begin_anew(turn);
        }
        let Some((only, because, tables)) = self.tables.hash_slots_to_read(turn.now) else { return };
        for id in tables.into_iter().filter(|id| self.tables.get(*id).stands()).collect::<Vec<_>>() {
            self.read(id, Purpose::Fill, only.clone(), because.clone(), turn);
        }
    }

    /// Reads a table in full.
    pub(super) fn read_whole(&mut self, id: TableId, purpose: Purpose, because: Reason, turn: &mut Turn) {
        self.read(id, purpose, Only::All, because, turn);
    }

    fn read(&mut self, id: TableId, purpose: Purpose, only: Only, because: Reason, turn: &mut Turn) {
        let load = self.tables.new_load();
        if self.is_split() {
            // Snapshots may not see the transaction that is being applied in parts, nor its rows that were recorded.
            self.tables.keep_dead(id);
        }
        self.intake.records(Recording::Keys);
        let started_ms = self.outbox.load_starts_ms(turn.now);
        let read = (only.clone(), self.has_caught_up());
        let began = Load::new(load, purpose, read, because.clone(), turn.now, started_ms);
        self.tables.get_mut(id).begin(began, self.intake.delivered_or_covered());
        turn.orders(LoadOrder::Table { table: id, load, purpose, only, because });
        self.give_up_chunks(id, turn);
    }

    // ---- why a load begins ------------------------------------------------------------------------------------------

    /// Compares the catalog with the table, because the stream does not announce every change.
    pub(super) fn catalog_says(&mut self, id: TableId, seen: CatalogSeen, turn: &mut Turn) {
        if !holds(Rule::LoadChangedCatalog) {
            return;
        }
        let at = self.outbox.checkpoint().lsn;
        match self.tables.get_mut(id).sees_catalog(seen, at) {
            Look::AsBefore => {}
            Look::Breaks(why) => self.breaks(id, why, turn),
            Look::Attached(leaves, mark) => self.load_attached(id, leaves, mark, turn),
            Look::Loads(text, trust) => self.begin_load(id, Reason::heals(Heal::Schema, text), trust, turn),
        }
    }

    /// A row arrived with columns that differ from those of the hashes: the whole table is read again.
    pub(super) fn follows_shape(&mut self, table: TableId, fingerprint: u64, turn: &mut Turn) {
        // True for nearly every change, so this check must be cheap.
        if self.tables.get(table).is_written_as(fingerprint) {
            return;
        }
        self.tables.get_mut(table).gets_rows_of(fingerprint);
        if self.tables.get_mut(table).is_reread_for(fingerprint) {
            self.has_another_shape(table, "its columns changed", turn);
        }
    }

    fn has_another_shape(&mut self, table: TableId, text: &str, turn: &mut Turn) {
        self.begin_load(table, Reason::heals(Heal::Schema, text), Trust::Incomplete, turn);
    }

    /// A table that cannot be followed does not count as complete; the other tables are not affected.
    pub(super) fn breaks(&mut self, id: TableId, why: Blocked, turn: &mut Turn) {
        let load = self.tables.get(id).load().map(|load| load.id);
        let lacks_rows = self.tables.hash_slots().give_up(id);
        if self.tables.get_mut(id).breaks(why.clone(), lacks_rows, turn.now) {
            turn.does(Effect::TableBlocked { table: id, why: why.clone() });
        }
        if let Some(load) = load {
            turn.orders(LoadOrder::Abandon(id, load));
            self.give_up_chunks(id, turn);
        }
        self.key_reads.forget_table(id);
        self.announces_no_rows_of(id);
        self.no_longer_compared(id, &why.to_string(), turn);
    }

    pub(super) fn retry_broken(&mut self, turn: &mut Turn) {
        for table in self.tables.ids(|table| table.is_tried_again(turn.now)) {
            // Counted when it broke, not with every attempt.
            let because = Reason::ordinary("another try, as it could not be followed");
            self.begin_load(table, because, Trust::Incomplete, turn);
        }
    }

    /// Redis does not report which keys it evicted, so every table is reloaded: not while any table is being read, and
    /// not before the pause since the previous reload is over.
    pub(super) fn evicted(&mut self, keys: u64, turn: &mut Turn) {
        if keys == self.outbox.checkpoint().evicted || self.tables.is_any_read() {
            return;
        }
        let followed = self.tables.ids(|table| !table.is_broken());
        // A restarted Redis counts from zero. Keys that were evicted earlier and wait for a load keep waiting.
        if keys == 0 && !followed.iter().any(|table| self.tables.get(*table).has_removed_keys()) {
            return self.outbox.counts_evicted(keys);
        }
        if !self.tables.may_load_evicted(turn.now) {
            return followed.into_iter().for_each(|table| self.tables.get_mut(table).keys_are_removed());
        }
        self.outbox.counts_evicted(keys);
        for table in followed {
            let because = Reason::heals(Heal::Evicted, "redis has evicted keys");
            self.begin_load(table, because, Trust::Incomplete, turn);
        }
    }

    pub(super) fn look_for_expired(&mut self, redis_time_ms: u64, turn: &mut Turn) {
        for table in self.tables.ids(|table| holds(Rule::LoadExpired) && table.may_have_expired(redis_time_ms)) {
            let because = Reason::heals(Heal::Expired, "rows may have expired while nothing renewed them");
            self.begin_load(table, because, Trust::Incomplete, turn);
        }
    }

    // ---- what the loader reports ------------------------------------------------------------------------------------

    pub(super) fn load_says(&mut self, message: FromLoad, turn: &mut Turn) {
        match message {
            FromLoad::Began {
                table,
                load,
                fingerprint,
                catalog,
                composition,
                types,
                estimated_rows,
                known_types,
                is_empty,
            } => {
                self.intake.learn_types(known_types);
                // Drops the chunks of an earlier attempt of the same load; the loader no longer tracks them.
                self.give_up(|chunk| chunk.load == Some(load), turn);
                // Hash slots may lose something, or get something from an earlier session, in the middle of a load.
                let is_empty = is_empty && self.outbox.is_one_transaction();
                let found = Found { catalog, composition, types, is_empty };
                if let Err(text) = self.tables.get_mut(table).looked_up(load, fingerprint, found, estimated_rows) {
                    self.has_another_shape(table, text, turn);
                }
            }
            FromLoad::Chunk(chunk) => {
                let current = self.tables.get(chunk.table).load().map(|load| load.id);
                if chunk.load.is_some() && chunk.load != current {
                    turn.orders(LoadOrder::Verdict(chunk.id, Verdict::GivenUp));
                    return;
                }
                if let Content::Keys { mapped_as, .. } = chunk.content {
                    self.tables.get_mut(chunk.table).gets_rows_of(mapped_as);
                }
                if let Some(chunk) = self.chunks.arrived(chunk) {
                    self.is_ready(chunk);
                }
            }
            FromLoad::Ended { table, load } => self.tables.get_mut(table).everything_is_read(load),
            FromLoad::KeysNotRead => self.key_reads.settle(),
            FromLoad::NotCompared { table, load, why } => self.not_compared(table, load, &why, turn),
            FromLoad::Blocked { table, why } => self.breaks(table, why, turn),
            FromLoad::DeadLetter { table, code, mut letter } => {
                letter.lsn = self.outbox.checkpoint().lsn.to_string();
                self.growing.dead_letter(table, code, letter);
            }
            FromLoad::Retired { template } => self.growing.retires(template),
            FromLoad::Orphans { mut keys } => {
                // The change stream may lie where a table's rows did.
                keys.retain(|key| self.outbox.own().changes().is_none_or(|stream| stream.key != *key));
                self.growing.removes_orphans(keys);
            }
        }
    }

    /// This chunk's watermark has been delivered.
    pub(super) fn is_ready(&mut self, chunk: Chunk) {
        self.tables.get_mut(chunk.table).delivers_watermark(chunk.load);
        let on_its_way = self.outbox.left() + u64::from(self.growing.has_changes());
        let behind = self.comparison_of(&chunk).map_or(0, |_| on_its_way);
        self.chunks.is_ready(chunk, behind);
    }

    /// Drops the chunks of a load that was given up.
    pub(super) fn give_up_chunks(&mut self, id: TableId, turn: &mut Turn) {
        let current = self.tables.get(id).load().map(|load| load.id);
        self.give_up(|chunk| chunk.table == id && chunk.load.is_some() && chunk.load != current, turn);
    }

    fn give_up(&mut self, stale: impl Fn(&Chunk) -> bool, turn: &mut Turn) {
        for chunk in self.chunks.give_up(stale) {
            turn.orders(LoadOrder::Verdict(chunk, Verdict::GivenUp));
        }
    }

    // ---- rows that are read again -----------------------------------------------------------------------------------

    /// Marks these keys as pending: they must be read again before they can be trusted.
    pub(super) fn pend(&mut self, id: TableId, keys: Vec<Key>, turn: &mut Turn) {
        // The batch that made them pending is not in the checkpoint yet.
        let at = self.outbox.checkpoint().lsn;
        let table: &mut Table = self.tables.get_mut(id);
        let new = table.pend(keys, at);
        if new.is_empty() {
            return;
        }
        self.intake.records(Recording::Keys);
        if table.gives_up_pending() {
            // Whatever made them pending has been delivered by now, so the load's chunks must have seen all of it.
            self.announces_no_rows_of(id);
            let text = format!("over {PENDING_KEYS} rows have to be read again");
            return self.begin_load(id, Reason::heals(Heal::Interrupted, text), Trust::Incomplete, turn);
        }
        table.is_incomplete();
        self.reads_again(id, &new, None);
    }

    /// Called when no hash slot is ahead any more. See [`Machine::doubts_dead`].
    pub(super) fn read_dead_again(&mut self, turn: &mut Turn) {
        if std::mem::take(&mut self.doubts_dead) {
            for id in self.tables.ids(Table::stands) {
                self.pend(id, self.tables.dead_of(id), turn);
            }
        }
    }

    /// With `checks`, the keys are compared for this load; otherwise they are pending.
    pub(super) fn reads_again(&mut self, table: TableId, keys: &[Key], checks: Option<LoadId>) {
        let limits = *self.outbox.limits();
        // Their announcements weigh more than the keys.
        let limits = if self.announces() { limits.planned_for(limits.planned_bytes / 2) } else { limits };
        self.key_reads.add(table, keys, checks, &limits);
    }
}
