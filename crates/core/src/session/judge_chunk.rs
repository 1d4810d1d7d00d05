//! Decides which rows of a chunk are written: some are superseded by the stream, some are pending, and a comparison
//! writes only rows that differ.

use super::Machine;
use super::chunk_queue::Ready;
use super::inspect::{Comparison, Differences};
use super::load_messages::{Chunk, ChunkId, Content, LoadId, LoadOrder, Only, Purpose, Verdict};
use super::table::{Load, Table};
use super::tables::Tables;
use super::turn::Turn;
use crate::admin::{DriftKind, Repair, Tally};
use crate::command::{EncodedMembers, EncodedRows, Key, Unwritable};
use crate::format::Format;
use crate::lookups::Values;
use crate::plan::key_states::KeyStates;
use crate::progress::visibility::{Judged, Known};
use crate::schema::TableId;
use std::collections::HashSet;

/// A part of a chunk that is written with the batch.
pub(super) struct JudgedPart {
    pub chunk: ChunkId,
    pub table: TableId,
    pub rows: Option<EncodedRows>,
    /// The load concerns no other rows.
    only: Only,
    /// Whether Redis has the rows that are written as they are, or not at all.
    pub is_new: bool,
    /// Keys that are not written, because the stream has superseded them.
    pub left_out: HashSet<Key>,
    pub deletes: Vec<Key>,
    /// Keys that are correct after this batch.
    pub resolved: Vec<Key>,
    /// Rows that Redis cannot hold.
    pub unwritable: Vec<Unwritable>,
    /// Keys left to the stream, which must therefore exist.
    pub must_exist: Vec<Key>,
    pub row_count: u64,
    /// The load or comparison that it belongs to.
    pub of: Option<LoadId>,
    pub of_load: bool,
    pub last_part: bool,
    /// Set if it is compared first.
    pub compares: Option<Compares>,
}

/// How a part of a chunk is compared.
pub(super) struct Compares {
    repair: Repair,
    /// Keys checked for existence only.
    keys: Vec<Key>,
    about: About,
    pub found: Tally,
    /// Keys to read again, because their correct state is not known.
    pub again: Vec<Key>,
}

/// What the keys that are not rows are.
#[derive(Clone, Copy, PartialEq, Eq)]
enum About {
    /// Keys superseded by the stream, which must therefore exist or be read again.
    LeftToTheStream,
    /// Keys without a row.
    Orphans,
}

impl Compares {
    fn new(repair: Repair) -> Self {
        let (keys, again, found) = (Vec::new(), Vec::new(), Tally::default());
        Compares { repair, keys, about: About::LeftToTheStream, found, again }
    }
}

impl JudgedPart {
    fn new(chunk: &Chunk, only: Only, comparison: Option<(LoadId, Repair)>) -> Self {
        JudgedPart {
            chunk: chunk.id,
            table: chunk.table,
            rows: None,
            only,
            is_new: false,
            left_out: HashSet::new(),
            deletes: Vec::new(),
            resolved: Vec::new(),
            unwritable: Vec::new(),
            must_exist: Vec::new(),
            row_count: 0,
            of: chunk.load.or(comparison.map(|(load, _)| load)),
            of_load: chunk.load.is_some(),
            last_part: true,
            compares: comparison.map(|(_, repair)| Compares::new(repair)),
        }
    }

    /// Whether the row at this key is written.
    pub fn writes(&self, key: &Key) -> bool {
        self.only.has_key(key) && !self.left_out.contains(key)
    }

    /// The rows that are written, each with what it has of the fields of lookups. None if the table has no lookups.
    pub fn written(&self) -> impl Iterator<Item = (&Key, &Values)> {
        let rows = self.rows.iter().flat_map(|rows| rows.rows.iter().map(|(key, _)| key).zip(&rows.values));
        rows.filter(|(key, _)| self.writes(key))
    }

    /// The commands for the memberships of all rows that are written, if it has them.
    pub fn members(&self) -> Option<&EncodedMembers> {
        let has_all = self.is_new && self.left_out.is_empty();
        self.rows.as_ref().filter(|_| has_all)?.members.as_deref()
    }

    /// What to compare it with, if at all. `format`: that of its table.
    pub fn comparison(&self, format: Format) -> Option<Comparison> {
        let compares = self.compares.as_ref()?;
        let rows = self.rows.clone().unwrap_or_default();
        let unwritable = self.unwritable.iter().map(|row| &row.key);
        let keys = compares.keys.iter().chain(unwritable).cloned().collect();
        Some(Comparison { rows, format, left_out: self.left_out.clone(), keys })
    }

    /// Takes Redis's differences. At most the rows that differ are written.
    pub fn compared(&mut self, differences: &Differences) {
        let compares = self.compares.as_mut().expect("it is compared");
        let Differences { missing, stale, present } = differences;
        // Whatever is at the key of a row that Redis cannot hold, it is not that row.
        let displaced = self.unwritable.iter().filter(|row| present.contains(&row.key)).count();
        (compares.found.missing, compares.found.stale) = (missing.len() as u64, (stale.len() + displaced) as u64);
        match compares.about {
            About::LeftToTheStream => {
                compares.again = compares.keys.iter().filter(|k| !present.contains(*k)).cloned().collect();
            }
            About::Orphans => {
                compares.found.orphaned = present.len() as u64;
                self.deletes = compares.keys.iter().filter(|k| present.contains(*k)).cloned().collect();
            }
        }
        match compares.repair {
            Repair::Mend => compares.found.repaired = compares.found.drift(),
            Repair::OnlyCount => {
                self.deletes.clear();
                self.unwritable.clear();
            }
        }
        let writes = compares.repair == Repair::Mend && !(missing.is_empty() && stale.is_empty());
        self.rows = self.rows.take().filter(|_| writes);
        if let Some(rows) = &self.rows {
            let same = rows.rows.iter().map(|(k, _)| k).filter(|k| !missing.contains(*k) && !stale.contains(*k));
            self.left_out.extend(same.cloned());
        }
    }

    /// Returns the keys that differ, each with how. Only right after they were compared.
    pub fn differing<'a>(&'a self, differences: &'a Differences) -> impl Iterator<Item = (DriftKind, &'a Key)> {
        let about = self.compares.as_ref().map(|compares| compares.about);
        let orphaned = differences.present.iter().filter(move |_| about == Some(About::Orphans));
        let of = |kind: DriftKind| move |key: &'a Key| (kind, key);
        let missing = differences.missing.iter().map(of(DriftKind::Missing));
        missing.chain(differences.stale.iter().map(of(DriftKind::Stale))).chain(orphaned.map(of(DriftKind::Orphaned)))
    }

    /// Adds keys that are superseded by the stream and must therefore exist.
    fn leaves_to_the_stream(&mut self, keys: impl IntoIterator<Item = Key>) {
        match &mut self.compares {
            Some(compares) => compares.keys.extend(keys),
            None => self.must_exist.extend(keys),
        }
    }
}

/// Judges the rows of one chunk.
struct Judge<'a> {
    table: &'a Table,
    tables: &'a Tables,
    known: Known<'a>,
    /// The batch with which the rows are written.
    batch: &'a KeyStates,
}

impl Judge<'_> {
    fn is_known(&self, key: &Key) -> bool {
        self.known.contains(key)
    }

    /// Whether the key is taken care of anyway, or is correct after this batch.
    fn is_seen_to(&self, key: &Key) -> bool {
        self.table.is_pending(key) || self.batch.settles(key) || self.tables.is_dead(key)
    }

    /// Judges the rows of a range.
    fn rows(&self, rows: &EncodedRows, taken: &mut JudgedPart) {
        // Pending rows are known to be wrong and are read again anyway, so they do not count as drift.
        let skips_pending = taken.compares.is_some();
        let only = taken.only.clone();
        for key in rows.rows.iter().map(|(key, _)| key).filter(|key| only.has_key(key)) {
            taken.row_count += 1;
            if self.is_known(key) {
                taken.left_out.insert(key.clone());
                if !self.is_seen_to(key) {
                    taken.leaves_to_the_stream([key.clone()]);
                }
            } else if self.table.is_pending(key) {
                match skips_pending {
                    true => _ = taken.left_out.insert(key.clone()),
                    false => taken.resolved.push(key.clone()),
                }
            }
        }
        taken.rows = Some(rows.clone());
    }

    /// Judges pending rows. Returns those that must be read once more: a pending row is never left to the stream, but
    /// read until a snapshot sees everything.
    fn pending_keys(&self, asked: &[Key], found: &EncodedRows, taken: &mut JudgedPart) -> Vec<Key> {
        let pending = asked.iter().filter(|key| self.table.is_pending(key)).cloned();
        let (again, right): (Vec<Key>, Vec<Key>) = pending.partition(|key| self.is_known(key));
        let unwritable = taken.unwritable.iter().map(|row| &row.key);
        let there: HashSet<&Key> = found.rows.iter().map(|(k, _)| k).chain(unwritable).collect();
        taken.deletes = right.iter().filter(|k| !there.contains(k)).cloned().collect();
        taken.left_out = found.rows.iter().map(|(k, _)| k).filter(|k| !right.contains(k)).cloned().collect();
        taken.rows = Some(found.clone());
        taken.resolved = right;
        again
    }

    /// Judges rows that a comparison reads again.
    fn compared_keys(&self, asked: &[Key], found: &EncodedRows, taken: &mut JudgedPart) {
        let is_open = |key: &&Key| self.is_known(key) && !self.is_seen_to(key);
        taken.leaves_to_the_stream(asked.iter().filter(is_open).cloned());
        let asked: HashSet<&Key> = asked.iter().collect();
        // A row that was not asked for has a key that Postgres takes for another one: 1.0 for 1.
        let is_left_out = |key: &&Key| !asked.contains(key) || self.is_known(key) || self.table.is_pending(key);
        taken.left_out = found.rows.iter().map(|(key, _)| key).filter(is_left_out).cloned().collect();
        taken.rows = Some(found.clone());
    }

    /// Judges keys that were found in Redis, of which some have a row.
    fn orphans(&self, asked: &[Key], exist: &HashSet<Key>, taken: &mut JudgedPart) {
        let is_gone = |key: &&Key| !exist.contains(*key) && !self.is_known(key) && !self.table.is_pending(key);
        let gone = asked.iter().filter(is_gone).cloned().collect();
        match &mut taken.compares {
            Some(compares) => (compares.keys, compares.about) = (gone, About::Orphans),
            None => taken.deletes = gone,
        }
    }

    /// Like other rows, those superseded by the stream are left to it.
    fn unwritable(&self, unwritable: Vec<Unwritable>, content: &Content, taken: &mut JudgedPart) {
        let only_resolves = matches!(content, Content::Keys { checks: None, .. });
        let is_range = matches!(content, Content::Rows(_));
        let skips_pending = taken.compares.is_some();
        let only = taken.only.clone();
        for row in unwritable.into_iter().filter(|row| only.has_key(&row.key)) {
            let pending = self.table.is_pending(&row.key);
            if self.is_known(&row.key) {
                if is_range && !self.is_seen_to(&row.key) {
                    taken.leaves_to_the_stream([row.key]);
                }
            } else if pending && !skips_pending {
                taken.resolved.push(row.key.clone());
                taken.unwritable.push(row);
            } else if !pending && !only_resolves {
                taken.unwritable.push(row);
            }
        }
    }
}

impl Machine {
    /// Returns the comparison that this chunk belongs to, if that is still in progress.
    pub(super) fn comparison_of(&self, chunk: &Chunk) -> Option<(LoadId, Repair)> {
        let load = self.tables.get(chunk.table).load()?;
        let of = match chunk.content {
            Content::Keys { checks, .. } => checks,
            Content::Rows(_) | Content::Orphans { .. } => chunk.load,
        };
        match load.purpose {
            Purpose::Compare(repair) if of == Some(load.id) => Some((load.id, repair)),
            Purpose::Compare(_) | Purpose::Fill => None,
        }
    }

    /// Returns the next part of the first chunk, or `None` if none of it is to be written. `batch` is written with it.
    pub(super) fn take_part(&mut self, batch: &KeyStates, turn: &mut Turn) -> Option<JudgedPart> {
        let mut ready = self.chunks.take_ready()?;
        let is_last_part = ready.is_last_part();
        let Ready { chunk, part, .. } = &mut ready;
        let comparison = self.comparison_of(chunk);
        let table = self.tables.get(chunk.table);
        let known = match self.intake.judge(chunk.table, &chunk.snapshot, table.base()) {
            Judged::Known(known) => known,
            Judged::ReadAgain(_) => {
                self.verdict(chunk, Verdict::ReadAgain, turn);
                return None;
            }
        };
        let judge = Judge { table, tables: &self.tables, known, batch };
        let only = table.load().filter(|load| Some(load.id) == chunk.load).map_or(Only::All, |load| load.only.clone());
        let mut taken = JudgedPart::new(chunk, only, comparison);
        if is_last_part {
            let unwritable = std::mem::take(&mut chunk.unwritable);
            judge.unwritable(unwritable, &chunk.content, &mut taken);
        }
        match &chunk.content {
            Content::Rows(parts) => {
                let Some(rows) = parts.get(*part) else {
                    self.verdict(chunk, Verdict::Written, turn);
                    return None;
                };
                taken.last_part = is_last_part;
                judge.rows(rows, &mut taken);
                let of = table.load().filter(|load| Some(load.id) == chunk.load);
                // If a row waits to be read again, or this batch makes it wait, an older version of it is in Redis.
                let may_be_older =
                    !taken.resolved.is_empty() || batch.touches_any(rows.rows.iter().map(|(key, _)| key));
                taken.is_new = !may_be_older && of.is_some_and(Load::fills_nothing);
            }
            Content::Keys { asked, found, unread, checks: None, .. } => {
                let again = judge.pending_keys(asked, found, &mut taken);
                let unread: Vec<Key> = unread.iter().filter(|key| table.is_pending(key)).cloned().collect();
                self.reads_again(chunk.table, &again, None);
                self.reads_again(chunk.table, &unread, None);
            }
            Content::Keys { asked, found, unread, checks, .. } => {
                if comparison.is_none() {
                    self.verdict(chunk, Verdict::GivenUp, turn);
                    return None;
                }
                judge.compared_keys(asked, found, &mut taken);
                self.tables.get_mut(chunk.table).were_read_again(asked.len());
                self.reads_again(chunk.table, unread, *checks);
            }
            Content::Orphans { asked, exist } => judge.orphans(asked, exist, &mut taken),
        }
        if !taken.last_part {
            self.chunks.put_back(ready);
        }
        Some(taken)
    }

    /// Decides that nothing of this chunk is written with the batch.
    fn verdict(&mut self, chunk: &Chunk, verdict: Verdict, turn: &mut Turn) {
        if let (Content::Keys { asked, unread, checks, .. }, Verdict::ReadAgain) = (&chunk.content, verdict) {
            self.reads_again(chunk.table, asked, *checks);
            self.reads_again(chunk.table, unread, *checks);
        }
        if chunk.load.is_none() {
            self.key_reads.settle();
        }
        turn.orders(LoadOrder::Verdict(chunk.id, verdict));
    }
}
