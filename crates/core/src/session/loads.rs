//! Loads: their chunks are judged by what the stream has brought, and go with a batch.

use super::*;
use crate::progress::visibility::Known;

/// Names, position and table of a dead letter.
const LETTER_BYTES: usize = 512;
const LETTER_FIELDS: usize = 6;

pub(super) fn weight_of_letter(letter: &DeadLetter) -> usize {
    let bytes = letter.key.len() + letter.reason.len() + letter.row.len();
    command::weight(bytes + LETTER_BYTES, 1, LETTER_FIELDS)
}

/// Whether it is the chunk's last part.
fn is_last(chunk: &Chunk, part: usize) -> bool {
    !matches!(&chunk.content, Content::Rows(parts) if part + 1 < parts.len())
}

impl Ready {
    /// Of its next part.
    pub(super) fn weight(&self) -> usize {
        let rows = match &self.chunk.content {
            Content::Rows(parts) => parts.get(self.part).map_or(0, EncodedRows::weight),
            Content::Keys { found, .. } => found.weight(),
            Content::Orphans { .. } => 0,
        };
        let letters = self.chunk.unwritable.iter().map(|row| weight_of_letter(&row.letter)).sum::<usize>();
        rows + if is_last(&self.chunk, self.part) { letters } else { 0 }
    }
}

impl Machine {
    pub(super) fn begin_load(
        &mut self,
        id: TableId,
        because: Reason,
        trust: Trust,
        now: Instant,
        effects: &mut Vec<Effect>,
    ) {
        let table = &mut self.tables[id.index()];
        if trust == Trust::Incomplete {
            if matches!(table.state, TableState::Loaded | TableState::Incomplete) {
                // What is there goes on being right while it is read again.
                table.state = TableState::Loading;
            }
            table.written_as = None;
        }
        self.no_longer_compared(id, &because.text, now, effects);
        self.walk(id, Purpose::Fill, because, now, effects);
    }

    /// Reads a table as a whole.
    pub(super) fn walk(
        &mut self,
        id: TableId,
        purpose: Purpose,
        because: Reason,
        now: Instant,
        effects: &mut Vec<Effect>,
    ) {
        let redis_now_ms = self.redis_now_ms(now);
        let load = LoadId(self.next_load);
        self.next_load += 1;
        if self.is_split() {
            // Snapshots may not see the transaction that is being applied in parts, nor its rows that were recorded.
            self.dead.keep(id, self.since());
        }
        self.record.set(Recording::Keys);
        let delivered = self.received.max(self.apply_above);
        let table = &mut self.tables[id.index()];
        // What was delivered by now may be in Redis in another shape, or not at all: a chunk must have seen all of it.
        table.base = table.base.max(delivered);
        table.load = Some(Load {
            id: load,
            purpose,
            because: because.clone(),
            started: now,
            started_redis_ms: redis_now_ms,
            renewed_until_ms: 0,
            tally: Tally::default(),
            estimated_rows: 0,
            catalog: None,
            again: 0,
            removed: false,
            ended: false,
        });
        effects.push(Effect::Order(LoadOrder::Table { table: id, load, purpose, because }));
        self.give_up_chunks(id, effects);
    }

    /// Whose keys they were nobody knows. Not while tables are loaded, and then after a pause that grows: a Redis that is
    /// too small evicts again what a load brings back.
    pub(super) fn evicted(&mut self, keys: u64, now: Instant, effects: &mut Vec<Effect>) {
        let before = self.checkpoint.evicted;
        if keys == before || self.tables.iter().any(|t| t.load.is_some()) {
            return;
        }
        let followed: Vec<TableId> = self.tables.iter().filter(|t| t.broken.is_none()).map(|t| t.spec.id).collect();
        // A Redis that has started again counts from nothing. What was evicted before, and waits for a load, waits on.
        if keys == 0 && !followed.iter().any(|table| self.tables[table.index()].removed) {
            self.checkpoint.evicted = keys;
            return;
        }
        if now < self.evictions.load_from {
            followed.into_iter().for_each(|table| self.keys_are_removed(table));
            return;
        }
        self.checkpoint.evicted = keys;
        self.evictions.loads(now);
        for table in followed {
            let because = Reason::heals(Heal::Evicted, "redis has evicted keys");
            self.begin_load(table, because, Trust::Incomplete, now, effects);
        }
    }

    /// Chunks of a load that was given up are not written.
    pub(super) fn give_up_chunks(&mut self, id: TableId, effects: &mut Vec<Effect>) {
        let current = self.tables[id.index()].load.as_ref().map(|l| l.id);
        self.give_up(|c| c.table == id && c.load.is_some() && c.load != current, effects);
    }

    fn give_up(&mut self, stale: impl Fn(&Chunk) -> bool, effects: &mut Vec<Effect>) {
        let given_up = (self.waiting.values().chain(self.ready.iter().map(|r| &r.chunk))).filter(|c| stale(c));
        // In an order of their own: the same inputs have the same effects.
        let given_up: BTreeSet<ChunkId> = given_up.map(|c| c.id).collect();
        effects.extend(given_up.into_iter().map(|id| Effect::Order(LoadOrder::Verdict(id, Verdict::GivenUp))));
        self.waiting.retain(|_, c| !stale(c));
        self.ready.retain(|r| !stale(&r.chunk));
    }

    pub(super) fn load_says(&mut self, message: FromLoad, now: Instant, effects: &mut Vec<Effect>) {
        match message {
            FromLoad::Began { table, load, fingerprint, catalog, estimated_rows, booleans } => {
                let known = self.booleans.len();
                self.booleans.extend(booleans);
                if self.booleans.len() > known {
                    self.bind_again();
                }
                let id = table;
                // Chunks of an earlier beginning of the same load, which the loader has forgotten.
                self.give_up(|c| c.load == Some(load), effects);
                let table = &mut self.tables[id.index()];
                if let Some(current) = table.load.as_mut().filter(|l| l.id == load) {
                    // It may begin again by itself: what was read before counts for nothing.
                    current.tally = Tally::default();
                    current.estimated_rows = estimated_rows;
                    current.catalog = Some(catalog);
                    if current.purpose != Purpose::Fill {
                        if table.written_as != Some(fingerprint) {
                            let because = Reason::heals(Heal::Schema, "its columns changed");
                            self.begin_load(id, because, Trust::Incomplete, now, effects);
                        }
                    } else if table.written_as.replace(fingerprint) != Some(fingerprint)
                        && table.state == TableState::Loaded
                    {
                        table.state = TableState::Loading;
                    }
                }
            }
            FromLoad::Chunk(chunk) => {
                let current = self.tables[chunk.table.index()].load.as_ref().map(|l| l.id);
                if chunk.load.is_some() && chunk.load != current {
                    effects.push(Effect::Order(LoadOrder::Verdict(chunk.id, Verdict::GivenUp)));
                } else if let Some(at) = self.marks.iter().position(|m| *m == chunk.nonce) {
                    self.marks.remove(at);
                    self.is_ready(chunk);
                } else {
                    self.waiting.insert(chunk.nonce, chunk);
                }
            }
            FromLoad::Ended { table, load } => {
                if let Some(l) = self.tables[table.index()].load.as_mut().filter(|l| l.id == load) {
                    assert!(!l.ended, "a load ends once");
                    l.ended = true;
                }
            }
            FromLoad::KeysNotRead => self.settle_read(true),
            FromLoad::NotCompared { table, load, why } => self.not_compared(table, load, &why, now, effects),
            FromLoad::Blocked { table, why } => self.breaks(table, why, now, effects),
            FromLoad::DeadLetter { table, code, mut letter } => {
                letter.lsn = self.checkpoint.lsn.to_string();
                self.next.applied.dead_letters.push((table, code));
                self.next.applied.count(table).keyless += 1;
                self.next.weight += weight_of_letter(&letter);
                self.next.batch.dead_letter(letter);
            }
            FromLoad::Retired { template } => self.next.retired.push(template),
            FromLoad::Orphans { keys } => self.next.orphans.extend(keys),
        }
    }

    /// Hands keys that must be read again to the loader, a bounded number at a time.
    pub(super) fn order_reads(&mut self, effects: &mut Vec<Effect>) {
        while self.reads_out < KEY_READS_OUT {
            let Some(keys) = self.reads.pop_front() else { return };
            self.reads_out += 1;
            effects.push(Effect::Order(LoadOrder::Keys(keys)));
        }
    }

    /// These keys must be read again before they may be trusted.
    pub(super) fn pend(&mut self, id: TableId, keys: Vec<Key>, now: Instant, effects: &mut Vec<Effect>) {
        let table = &mut self.tables[id.index()];
        let new: Vec<Key> = keys.into_iter().filter(|k| table.pending.insert(k.clone())).collect();
        if new.is_empty() {
            return;
        }
        self.record.set(Recording::Keys);
        // The batch that left them behind is not in the checkpoint yet.
        table.as_of = table.as_of.or(Some(self.checkpoint.lsn));
        if table.pending.len() > PENDING_KEYS {
            // What made them pending was delivered by now, and the load's chunks must have seen all of that.
            table.pending.clear();
            let text = format!("over {PENDING_KEYS} rows have to be read again");
            self.begin_load(id, Reason::heals(Heal::Interrupted, text), Trust::Incomplete, now, effects);
            return;
        }
        if table.state == TableState::Loaded {
            table.state = TableState::Incomplete;
        }
        self.read_again(id, &new, None);
    }

    pub(super) fn read_again(&mut self, table: TableId, keys: &[Key], checks: Option<LoadId>) {
        for some in keys.chunks(KEYS_A_READ) {
            let mut rest = some.to_vec();
            while !rest.is_empty() {
                let keys = take_keys(&mut rest, &self.limits);
                self.reads.push_back(KeysToRead { table, keys, checks });
            }
        }
    }

    /// The comparison that this chunk belongs to, where it belongs to one that goes on.
    fn comparison(&self, chunk: &Chunk) -> Option<(LoadId, Repair)> {
        let load = self.tables[chunk.table.index()].load.as_ref()?;
        let of = match chunk.content {
            Content::Keys { checks, .. } => checks,
            Content::Rows(_) | Content::Orphans { .. } => chunk.load,
        };
        match load.purpose {
            Purpose::Compare(repair) if of == Some(load.id) => Some((load.id, repair)),
            Purpose::Compare(_) | Purpose::Fill => None,
        }
    }

    pub(super) fn is_ready(&mut self, chunk: Chunk) {
        let on_its_way = self.left + u64::from(self.next.has_changes());
        let behind = self.comparison(&chunk).map_or(0, |_| on_its_way);
        self.ready.push_back(Ready { chunk, part: 0, behind, alone: false });
    }

    pub(super) fn takes_ready(&self) -> bool {
        self.ready.front().is_some_and(|r| r.behind <= self.done)
    }

    /// The next chunk part that may be written with the batch that leaves.
    pub(super) fn take_chunk(&mut self, next: &Next, effects: &mut Vec<Effect>) -> Option<Taken> {
        while self.takes_ready() && !self.puts_off_chunk(next) {
            if let Some(taken) = self.take_front(&next.batch, effects) {
                return Some(taken);
            }
        }
        None
    }

    /// The next part of the first chunk; `None` where none of it is to be written.
    pub(super) fn take_front(&mut self, batch: &Batch, effects: &mut Vec<Effect>) -> Option<Taken> {
        let Ready { mut chunk, part, behind, .. } = self.ready.pop_front()?;
        let table = &self.tables[chunk.table.index()];
        let known = match self.record.judge(chunk.table, &chunk.snapshot, table.base) {
            Judged::Known(known) if !self.misses_slot_snapshot(&chunk.snapshot) => known,
            Judged::Known(_) | Judged::ReadAgain(_) => {
                self.verdict(&chunk, Verdict::ReadAgain, effects);
                return None;
            }
        };
        let comparison = self.comparison(&chunk);
        let mut taken = Taken {
            chunk: chunk.id,
            table: chunk.table,
            rows: None,
            left_out: HashSet::new(),
            deletes: Vec::new(),
            resolved: Vec::new(),
            unwritable: Vec::new(),
            must_exist: Vec::new(),
            row_count: 0,
            of: chunk.load.or(comparison.map(|(load, _)| load)),
            of_load: chunk.load.is_some(),
            last_part: true,
            compares: None,
        };
        let mut compares = comparison.map(|(_, repair)| Compares {
            repair,
            keys: Vec::new(),
            about: About::LeftToTheStream,
            found: Tally::default(),
            again: Vec::new(),
        });
        // Nobody mends them here, and they are known not to be right.
        let skips_pending = matches!(&compares, Some(c) if c.repair == Repair::OnlyCount);
        let unwritable = if is_last(&chunk, part) { std::mem::take(&mut chunk.unwritable) } else { Vec::new() };
        self.judge_unwritable(&chunk, unwritable, &known, batch, &mut taken, compares.as_mut());
        match &chunk.content {
            Content::Rows(parts) => {
                let Some(rows) = parts.get(part) else {
                    self.verdict(&chunk, Verdict::Written, effects);
                    return None;
                };
                taken.last_part = part + 1 == parts.len();
                taken.row_count = rows.rows.len() as u64;
                for (key, _) in &rows.rows {
                    let pending = table.pending.contains(key);
                    if known.contains(key) {
                        taken.left_out.insert(key.clone());
                        if !pending && !batch.settles(key) && !self.dead.contains(key) {
                            let left_to_the_stream = compares.as_mut().map_or(&mut taken.must_exist, |c| &mut c.keys);
                            left_to_the_stream.push(key.clone());
                        }
                    } else if pending && skips_pending {
                        taken.left_out.insert(key.clone());
                    } else if pending {
                        taken.resolved.push(key.clone());
                    }
                }
                taken.rows = Some(rows.clone());
            }
            Content::Keys { asked, found, unread, checks: None } => {
                // A key that waits for its row is never left to the stream: read again until a snapshot sees all.
                let (again, right): (Vec<Key>, Vec<Key>) =
                    (asked.iter().filter(|k| table.pending.contains(*k)).cloned()).partition(|k| known.contains(k));
                let unwritable = taken.unwritable.iter().map(|row| &row.key);
                let there: HashSet<&Key> = found.rows.iter().map(|(k, _)| k).chain(unwritable).collect();
                taken.deletes = right.iter().filter(|k| !there.contains(k)).cloned().collect();
                taken.left_out = found.rows.iter().map(|(k, _)| k).filter(|k| !right.contains(k)).cloned().collect();
                taken.rows = Some(found.clone());
                taken.resolved = right;
                let unread: Vec<Key> = unread.iter().filter(|k| table.pending.contains(*k)).cloned().collect();
                self.read_again(chunk.table, &again, None);
                self.read_again(chunk.table, &unread, None);
            }
            Content::Keys { asked, found, unread, checks } => {
                let Some(compares) = &mut compares else {
                    self.verdict(&chunk, Verdict::GivenUp, effects);
                    return None;
                };
                // One that is pending is seen to anyway.
                let settled = |k: &Key| table.pending.contains(k) || batch.settles(k) || self.dead.contains(k);
                let open = |k: &&Key| known.contains(k) && !settled(k);
                compares.keys.extend(asked.iter().filter(open).cloned());
                let left_out = |k: &Key| known.contains(k) || table.pending.contains(k);
                taken.left_out = asked.iter().filter(|k| left_out(k)).cloned().collect();
                taken.rows = Some(found.clone());
                let table = &mut self.tables[chunk.table.index()];
                if let Some(load) = &mut table.load {
                    assert!(load.again >= asked.len(), "keys are read again because they were counted");
                    load.again -= asked.len();
                }
                self.read_again(chunk.table, unread, *checks);
            }
            Content::Orphans { asked, exist } => {
                let gone = |k: &&Key| !exist.contains(*k) && !known.contains(k) && !table.pending.contains(*k);
                let gone: Vec<Key> = asked.iter().filter(gone).cloned().collect();
                match &mut compares {
                    Some(compares) => (compares.keys, compares.about) = (gone, About::Orphans),
                    None => taken.deletes = gone,
                }
            }
        }
        taken.compares = compares;
        if !taken.last_part {
            self.ready.push_front(Ready { chunk, part: part + 1, behind, alone: false });
        }
        Some(taken)
    }

    /// As the other rows: what the stream knows better is left to it.
    fn judge_unwritable(
        &self,
        chunk: &Chunk,
        unwritable: Vec<Unwritable>,
        known: &Known<'_>,
        batch: &Batch,
        taken: &mut Taken,
        compares: Option<&mut Compares>,
    ) {
        let table = &self.tables[chunk.table.index()];
        let only_resolves = matches!(&chunk.content, Content::Keys { checks: None, .. });
        let skips_pending = compares.as_ref().is_some_and(|c| c.repair == Repair::OnlyCount);
        let mut left_to_the_stream = Vec::new();
        for row in unwritable {
            let pending = table.pending.contains(&row.key);
            if known.contains(&row.key) {
                let is_there = pending || batch.settles(&row.key) || self.dead.contains(&row.key);
                if !is_there && matches!(chunk.content, Content::Rows(_)) {
                    left_to_the_stream.push(row.key);
                }
            } else if pending || !only_resolves {
                if pending && skips_pending {
                    continue;
                }
                if pending {
                    taken.resolved.push(row.key.clone());
                }
                taken.unwritable.push(row);
            }
        }
        match compares {
            Some(compares) => compares.keys.extend(left_to_the_stream),
            None => taken.must_exist.extend(left_to_the_stream),
        }
    }

    fn verdict(&mut self, chunk: &Chunk, verdict: Verdict, effects: &mut Vec<Effect>) {
        if let (Content::Keys { asked, unread, checks, .. }, Verdict::ReadAgain) = (&chunk.content, verdict) {
            self.read_again(chunk.table, asked, *checks);
            self.read_again(chunk.table, unread, *checks);
        }
        self.settle_read(chunk.load.is_none());
        effects.push(Effect::Order(LoadOrder::Verdict(chunk.id, verdict)));
    }

    /// Ordered, and neither judged nor given up.
    #[cfg(test)]
    pub fn key_reads_out(&self) -> usize {
        self.reads_out
    }

    pub(super) fn settle_read(&mut self, was_read_of_keys: bool) {
        if was_read_of_keys {
            assert!(self.reads_out > 0, "a read of keys was ordered");
            self.reads_out -= 1;
        }
    }

    /// A new slot leaves out commits that ordinary snapshots may not see yet: a chunk must see what the slot's own
    /// snapshot saw.
    fn misses_slot_snapshot(&self, snapshot: &Snapshot) -> bool {
        self.slot_snapshot.as_ref().is_some_and(|slot| !snapshot.sees_all_that(slot))
    }
}
