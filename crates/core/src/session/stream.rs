//! What the stream delivers: transactions are buffered until their commit, then planned into the batch that grows.

use super::*;
use crate::plan::key::Poison;

impl Machine {
    /// In their order; what does not fit into the batch that grows waits until that has left.
    pub(super) fn deliver_what_fits(&mut self, now: Instant, effects: &mut Vec<Effect>) {
        while let Some(item) = self.undelivered.pop_front() {
            if !self.makes_room_for(&item) {
                self.undelivered.push_front(item);
                return;
            }
            self.deliver(item, now, effects);
        }
    }

    /// Whether the batch that grows can take this. A transaction that becomes too large with it is split before it.
    fn makes_room_for(&mut self, item: &Delivery) -> bool {
        let Some(open) = self.open.as_ref().filter(|open| !open.covered) else { return true };
        let change = match item {
            Delivery::Change(change) => change,
            Delivery::Commit { .. } => return self.fits(open.weight),
            Delivery::Begin(_) | Delivery::Relation(_) | Delivery::Mark(_) | Delivery::Position(_) => return true,
        };
        if open.delivered < open.skip {
            return true;
        }
        let weight = self.weight_of(change);
        let bytes = open.bytes + change.len_bytes() + CHANGE_BYTES;
        let is_over = open.delivered >= self.atomic_changes
            || bytes > self.atomic_bytes
            || open.weight + weight > self.limits.stream_bytes();
        if !open.split && is_over && open.delivered > 0 {
            if !self.fits(open.weight) {
                return false;
            }
            self.split_open();
        }
        let split = is_over || self.open.as_ref().is_some_and(|open| open.split);
        !split || self.fits(weight)
    }

    /// A single change goes alone, whatever it weighs: it is a dead letter, or Redis takes it.
    fn fits(&self, weight: usize) -> bool {
        self.next.weight == 0 || self.next.weight + weight <= self.limits.stream_bytes()
    }

    fn weight_of(&self, change: &Change) -> usize {
        match change {
            Change::Insert { relation, .. } | Change::Update { relation, .. } | Change::Delete { relation, .. } => {
                match self.mapping(*relation) {
                    Some(Ok(mapping)) => mapping.weight_of(change),
                    Some(Err(_)) | None => 0,
                }
            }
            // The keys are looked for, and counted, when the batch leaves.
            Change::Truncate { .. } | Change::Foreign { .. } => 0,
        }
    }

    /// What has come in of the transaction is applied, and the rest as it comes.
    fn split_open(&mut self) {
        let open = self.open.as_mut().expect("a transaction is open");
        open.split = true;
        let part = Within { commit: open.begin.commit, changes_done: open.delivered };
        self.plan_open();
        self.next.within = Some(Some(part));
    }

    fn deliver(&mut self, item: Delivery, now: Instant, effects: &mut Vec<Effect>) {
        match item {
            Delivery::Begin(begin) => {
                assert!(self.open.is_none(), "one transaction at a time");
                self.ledger.begin(begin);
                self.record.begin(begin.xid);
                let answer = self.watch.begins(&begin);
                went_back(answer, effects);
                let skip = match self.checkpoint.within {
                    Some(within) if within.commit == begin.commit => within.changes_done,
                    _ => 0,
                };
                self.open = Some(Open {
                    begin,
                    // A position of the server may lie inside the commit record: whatever began to commit before it counts
                    // as covered, here and in the record.
                    covered: begin.commit.0 < self.apply_above.0,
                    skip,
                    delivered: 0,
                    changes: Vec::new(),
                    bytes: 0,
                    weight: 0,
                    split: skip > 0,
                    emptied: BTreeSet::new(),
                    touched: false,
                    marked: false,
                });
            }
            Delivery::Relation(relation) => self.relation(relation),
            Delivery::Change(change) => self.change(change, now, effects),
            Delivery::Mark(nonce) => {
                if let Some(open) = &mut self.open {
                    open.marked = true;
                }
                match self.waiting.remove(&nonce) {
                    Some(chunk) => self.is_ready(chunk),
                    None => {
                        self.marks.push_back(nonce);
                        if self.marks.len() > MARKS_HELD {
                            self.marks.pop_front();
                        }
                    }
                }
            }
            Delivery::Commit { end, .. } => self.commit(end, effects),
            Delivery::Position(at) => {
                self.received = self.received.max(at);
                self.ledger.delivered(at);
                self.reached(at);
                let answer = self.watch.reached(at);
                went_back(answer, effects);
            }
        }
    }

    /// The next checkpoint may say so: everything before `at` is in Redis or in the growing batch.
    fn reached(&mut self, at: EndLsn) {
        self.next.through = self.next.through.max(Some(at));
    }

    /// Nothing is loaded because of it before a change comes in that shape: a replay begins with shapes of the past.
    fn relation(&mut self, relation: Arc<Relation>) {
        let Some(table) = self.tables.iter_mut().find(|t| t.spec.table == relation.name) else {
            self.by_oid.remove(&relation.oid);
            return;
        };
        let id = table.spec.id;
        // A table dropped and made again has a new oid under the old name.
        self.by_oid.retain(|_, other| *other != id);
        self.by_oid.insert(relation.oid, id);
        table.bind(&self.booleans, relation);
    }

    /// More types turned out to be boolean.
    pub(super) fn bind_again(&mut self) {
        for table in &mut self.tables {
            if let Some(relation) = table.relation.take() {
                table.bind(&self.booleans, relation);
            }
        }
    }

    /// The checkpoint speaks for it: one that is being loaded, or cannot be, may be new, or may not have been followed
    /// before.
    fn stands(&self, table: TableId) -> bool {
        let table = &self.tables[table.index()];
        table.load.is_none() && table.broken.is_none()
    }

    /// The mapping for a change of this relation, where it is one of ours and can be followed.
    fn mapping(&self, oid: Oid) -> Option<&Result<Arc<Mapping>, Blocked>> {
        self.tables[self.by_oid.get(&oid)?.index()].mapping.as_ref()
    }

    fn change(&mut self, change: Change, now: Instant, effects: &mut Vec<Effect>) {
        let weight = self.weight_of(&change);
        let mut open = self.open.take().expect("a change belongs to a transaction");
        open.delivered += 1;
        // Those of tables that nobody asked for too: they lie in the same buffers.
        open.bytes += change.len_bytes() + CHANGE_BYTES;
        let applies = !open.covered && open.delivered > open.skip;
        open.weight += if applies { weight } else { 0 };
        match change {
            Change::Foreign { .. } => {}
            Change::Truncate { relations } => {
                for table in relations.iter().filter_map(|oid| self.by_oid.get(oid)).copied() {
                    open.emptied.insert(table);
                    open.touched |= !open.covered || self.stands(table);
                    if applies {
                        open.changes.push(Queued::Truncate(table));
                    } else {
                        self.record.touch_table(table);
                    }
                }
            }
            Change::Insert { relation, .. } | Change::Update { relation, .. } | Change::Delete { relation, .. } => {
                if let Some(table) = self.by_oid.get(&relation) {
                    open.emptied.remove(table);
                }
                match self.mapping(relation).cloned() {
                    Some(Ok(mapping)) if applies => {
                        self.follows_shape(&mapping, now, effects);
                        open.changes.push(Queued::Row(mapping, change));
                        open.touched = true;
                    }
                    Some(Ok(mapping)) => {
                        open.touched |= !open.covered || self.stands(mapping.table);
                        touch(&mut self.record, &mapping, &change);
                    }
                    Some(Err(why)) if applies => self.breaks(self.by_oid[&relation], why, now, effects),
                    Some(Err(_)) | None => {}
                }
            }
        }
        open.split |= applies && (open.delivered > self.atomic_changes || open.bytes > self.atomic_bytes);
        let part =
            (applies && open.split).then_some(Within { commit: open.begin.commit, changes_done: open.delivered });
        self.open = Some(open);
        if part.is_some() {
            self.plan_open();
            self.next.within = Some(part);
        }
    }

    /// A row in another shape than the hashes have: the whole table is read again.
    fn follows_shape(&mut self, mapping: &Mapping, now: Instant, effects: &mut Vec<Effect>) {
        let table = &self.tables[mapping.table.index()];
        let as_written = table.written_as == Some(mapping.fingerprint);
        let not_looked_up_yet = table.load.is_some() && table.written_as.is_none();
        if !as_written && !not_looked_up_yet && table.reread_for != Some(mapping.fingerprint) {
            self.tables[mapping.table.index()].reread_for = Some(mapping.fingerprint);
            self.begin_load(
                mapping.table,
                Reason::heals(Heal::Schema, "its columns changed"),
                Trust::Incomplete,
                now,
                effects,
            );
        }
    }

    /// A table that cannot be followed is not served as whole, and the others go on. Rows that are there stay as they were:
    /// where they were right, they are right as of the last time that it was seen to be fit.
    pub(super) fn breaks(&mut self, id: TableId, why: Blocked, now: Instant, effects: &mut Vec<Effect>) {
        let table = &mut self.tables[id.index()];
        if table.state != TableState::Healing {
            table.state = TableState::Incomplete;
            table.as_of = table.as_of.or(Some(table.fit.0));
        }
        table.written_as = None;
        table.load = None;
        // Whatever they wait for, the next load brings it.
        table.pending.clear();
        let before = table.broken.replace(Broken { why: why.clone(), at: now, is_mending: false });
        if before.is_none_or(|before| before.why != why) {
            effects.push(Effect::TableBlocked { table: id, why: why.clone() });
        }
        self.reads.retain(|read| read.table != id);
        self.no_longer_compared(id, &why.to_string(), now, effects);
    }

    fn commit(&mut self, end: EndLsn, effects: &mut Vec<Effect>) {
        let open = self.open.as_ref().expect("a transaction that ends has begun");
        let (begin, covered, split, marked) = (open.begin, open.covered, open.split, open.marked);
        let began_earlier = open.skip > 0;
        if !covered {
            self.plan_open();
        }
        let Open { touched, emptied, .. } = self.open.take().expect("a transaction that ends has begun");
        for table in emptied {
            self.tables[table.index()].emptied_by = Some(begin.xid);
        }
        // Covered transactions judge as "at or below base", even one whose commit record straddles it. So does one that
        // an earlier session began to apply: some of its rows may have waited to be read again there, which nobody knows
        // any more.
        self.record.end(if covered || began_earlier { end.min(self.apply_above) } else { end });
        self.ledger.delivered(end);
        self.received = self.received.max(end);
        let answer = self.watch.transaction(end, &begin);
        went_back(answer, effects);
        if covered {
            if touched {
                went_back(self.watch.covered(&begin), effects);
            }
            return;
        }
        self.reached(end);
        if split {
            self.next.within = Some(None);
        }
        if touched || marked {
            // What loads have read has to come by again as well.
            self.next.last = Some(LastTransaction { end, xid: begin.xid, time: begin.time });
        }
        if touched {
            self.next.applied.transactions += 1;
            self.next.applied.commits.push(begin.time);
        }
    }

    /// What has come in of the open transaction goes into the growing batch.
    fn plan_open(&mut self) {
        let open = self.open.as_mut().expect("a transaction is open");
        let begin = open.begin;
        open.bytes = 0;
        self.next.weight += std::mem::take(&mut open.weight);
        for queued in std::mem::take(&mut open.changes) {
            self.next.changes += 1;
            match queued {
                Queued::Truncate(table) => {
                    self.record.touch_table(table);
                    self.next.batch.truncate(table);
                    self.next.applied.count(table).truncates += 1;
                    self.next.applied.event(table, Op::Truncate, Key(Bytes::new()), begin.time);
                }
                Queued::Row(mapping, change) => self.plan_row(&mapping, &change, &begin),
            }
        }
    }

    fn plan_row(&mut self, mapping: &Arc<Mapping>, change: &Change, begin: &Begin) {
        let table = mapping.table;
        match self.next.batch.apply(mapping, change) {
            Ok(applied) => {
                let op = if matches!(change, Change::Delete { .. }) { Op::Delete } else { Op::Upsert };
                match op {
                    Op::Delete => self.next.applied.count(table).deletes += 1,
                    Op::Upsert | Op::Truncate => self.next.applied.count(table).upserts += 1,
                }
                self.next.applied.event(table, op, applied.key.clone(), begin.time);
                if !matches!(change, Change::Delete { .. }) && change.len_bytes() > self.letter_from_bytes {
                    // Whether Redis takes it is known only when the batch is written.
                    let letter = self.letter(mapping, change, begin, applied.key.0.clone());
                    self.next.large.insert(applied.key.clone(), letter);
                }
                self.record.touch(table, applied.key);
                if let Some(old) = applied.also {
                    self.record.touch(table, old);
                }
            }
            Err(poison) => {
                let reason = poison.to_string();
                let letter = DeadLetter { reason, ..self.letter(mapping, change, begin, Bytes::new()) };
                if matches!(poison, Poison::KeyNotSent { .. }) {
                    // It has a key all the same, which is not known.
                    let since = self.since();
                    self.dead.miss(table, since);
                }
                self.next.applied.dead_letters.push((table, poison.code()));
                self.next.applied.count(table).keyless += 1;
                self.next.batch.dead_letter(letter);
            }
        }
    }

    /// What can be told of a change, but for the reason.
    fn letter(&self, mapping: &Mapping, change: &Change, begin: &Begin, key: Bytes) -> DeadLetter {
        DeadLetter {
            table: self.tables[mapping.table.index()].spec.name.clone(),
            key,
            lsn: begin.commit.to_string(),
            xid: begin.xid,
            reason: String::new(),
            row: mapping.row_json(change),
        }
    }

    pub(super) fn retry_broken(&mut self, now: Instant, effects: &mut Vec<Effect>) {
        let due = |t: &&Table| {
            t.load.is_none() && t.broken.as_ref().is_some_and(|b| now.saturating_duration_since(b.at) >= BROKEN_RETRY)
        };
        let due: Vec<TableId> = self.tables.iter().filter(due).map(|t| t.spec.id).collect();
        for table in due {
            // Counted when it broke, not with every attempt.
            let because = Reason::ordinary("it could not be followed before");
            self.begin_load(table, because, Trust::Incomplete, now, effects);
        }
    }

    /// The stream does not announce everything.
    pub(super) fn catalog_says(&mut self, id: TableId, seen: CatalogSeen, now: Instant, effects: &mut Vec<Effect>) {
        let table = &mut self.tables[id.index()];
        if table.load.is_some() || table.broken.is_some() {
            // The load looks for itself, and what is broken is looked at again anyway.
            return;
        }
        let (fingerprint, mark, written_by) = match seen {
            CatalogSeen::Table { fingerprint, mark, written_by } => (fingerprint, mark, written_by),
            CatalogSeen::Unfit(why) => return self.breaks(id, why, now, effects),
        };
        let (text, trust) = match table.catalog {
            _ if table.written_as != Some(fingerprint) => ("its columns changed", Trust::Incomplete),
            Some(before) if before == mark => {
                table.fit = (table.fit.1, self.checkpoint.lsn);
                return;
            }
            Some(before) if before.shape == mark.shape && written_by.is_some() && written_by == table.emptied_by => {
                // The files are those of a TRUNCATE, which the stream has brought.
                table.fit = (table.fit.1, self.checkpoint.lsn);
                return self.takes_files(id, mark);
            }
            Some(before) if before.shape == mark.shape => ("its rows were written anew", Trust::Stands),
            Some(_) | None => {
                ("its partitions, row filter or types changed, or it is another table", Trust::Incomplete)
            }
        };
        self.begin_load(id, Reason::heals(Heal::Schema, text), trust, now, effects);
    }

    fn takes_files(&mut self, id: TableId, mark: CatalogMark) {
        let table = &mut self.tables[id.index()];
        table.catalog = Some(mark);
        if let Some(written) = self.checkpoint.tables.get_mut(&table.spec.name) {
            written.catalog = Some(mark);
        }
    }
}
