//! The batch that leaves: keys to clear are looked for, a chunk is compared, merge bases are looked at, then it is written
//! with the checkpoint that says so.

use super::*;
use crate::command::Base;

/// Records of dead letters of other tables that go with one batch.
const FORGOTTEN_A_BATCH: usize = 100;

impl Machine {
    pub(super) fn leaving(&mut self) -> &mut Leaving {
        self.leaving.as_mut().expect("a batch leaves")
    }

    pub(super) fn leave(&mut self, now: Instant, effects: &mut Vec<Effect>) {
        let moved = self.next.through.is_some_and(|t| t > self.checkpoint.lsn);
        let finished = self.finished_loads();
        let beat = now.saturating_duration_since(self.last_executed) >= BEAT;
        let urgent = moved && (self.position_wanted || self.draining);
        // In the middle of a split transaction a row of a chunk could show more of it than the stream has brought.
        let split = self.is_split();
        if let Some(removal) = self.removals.pop_front() {
            let clear = removal.keys.is_none().then_some(removal.table).into_iter().collect();
            self.leaving = Some(Leaving { clear, removal: Some(removal), ..Leaving::new(Next::default()) });
            return self.leave_on(now, effects);
        }
        let chunk_waits = !split && self.takes_ready();
        if !(self.next.has_work() || chunk_waits || !finished.is_empty() || beat || urgent || self.says_otherwise()) {
            return;
        }
        if self.goes_alone() {
            let next = Next::default();
            let chunk = self.take_front(&next.batch, effects);
            self.leaving = Some(Leaving { chunk, ..Leaving::new(next) });
            return self.leave_on(now, effects);
        }
        let next = self.take_next();
        self.left += 1;
        let chunk = if split { None } else { self.take_chunk(&next, effects) };
        let clear = next.batch.truncated().collect();
        self.leaving = Some(Leaving { chunk, clear, finished, ..Leaving::new(next) });
        self.leave_on(now, effects);
    }

    /// The batch that grows, but for what would make it too large: that stays for the next one.
    fn take_next(&mut self) -> Next {
        let mut next = std::mem::take(&mut self.next);
        if next.weight > self.limits.stream_bytes() {
            // A single large row has it for itself.
            self.next.renewal = next.renewal.take();
            self.next.orphans = std::mem::take(&mut next.orphans);
            self.next.retired = std::mem::take(&mut next.retired);
            return next;
        }
        if let Some(mut page) = next.renewal.take() {
            let keys = take_keys(&mut page.keys, &self.limits);
            if page.keys.is_empty() {
                next.renewal = Some(RenewalPage { keys, ..page });
            } else {
                next.renewing = Some((page.table, keys));
                self.next.renewal = Some(page);
            }
        }
        let orphans = take_keys(&mut next.orphans, &self.limits);
        self.next.orphans = std::mem::replace(&mut next.orphans, orphans);
        if !self.next.orphans.is_empty() {
            self.next.retired = std::mem::take(&mut next.retired);
        }
        next
    }

    /// A chunk part that is one large row does not go with changes of the stream, nor does any with a large row of those.
    pub(super) fn puts_off_chunk(&mut self, next: &Next) -> bool {
        let (left, limits) = (self.left, self.limits);
        let Some(ready) = self.ready.front_mut() else { return false };
        if next.weight <= limits.stream_bytes() && (next.weight == 0 || ready.weight() <= limits.rows_bytes()) {
            return false;
        }
        // Everything that was delivered before its mark is in the batch that leaves, or in Redis.
        (ready.behind, ready.alone) = (left, true);
        true
    }

    /// A chunk that was put off, as soon as Redis has what its snapshot saw.
    fn goes_alone(&self) -> bool {
        self.checkpoint.within.is_none() && self.takes_ready() && self.ready.front().is_some_and(|ready| ready.alone)
    }

    /// Readers go by the checkpoint: a table that is no longer what it says there is not left so until the next beat.
    fn says_otherwise(&self) -> bool {
        let differs = |t: &Table| {
            let written = self.checkpoint.tables.get(&t.spec.name);
            written.is_some_and(|mark| {
                mark.state != t.state
                    || mark.blocked.as_ref() != t.blocked()
                    || mark.more_dead_letters != self.dead.more(t.spec.id)
            })
        };
        self.tables.iter().any(differs)
    }

    /// The next step of the batch that leaves: look for keys to clear, look at merge bases, write.
    pub(super) fn leave_on(&mut self, now: Instant, effects: &mut Vec<Effect>) {
        let leaving = self.leaving();
        if let Some(table) = leaving.clear.front().copied() {
            return self.scan(table, 0, effects);
        }
        if let Some(taken) = &leaving.chunk
            && let Some(compares) = &taken.compares
            && !matches!(leaving.step, Step::Comparing)
        {
            let rows = taken.rows.clone().unwrap_or_default();
            let unwritable = taken.unwritable.iter().map(|row| &row.key);
            let keys = compares.keys.iter().chain(unwritable).cloned().collect();
            let wanted = Comparison { rows, left_out: taken.left_out.clone(), keys };
            leaving.step = Step::Comparing;
            effects.push(Effect::Compare(wanted));
            return;
        }
        let mut probes = leaving.next.batch.probes();
        probes.extend(leaving.removal.iter().flat_map(|r| r.keys.iter().flatten().cloned()));
        probes.extend(leaving.chunk.iter().flat_map(|c| c.must_exist.iter().cloned()));
        if probes.is_empty() {
            self.execute(&HashSet::new(), now, effects);
        } else {
            leaving.step = Step::Probing(probes.clone());
            effects.push(Effect::Probe(probes));
        }
    }

    /// Which keys of this table there are.
    fn scan(&mut self, table: TableId, cursor: u64, effects: &mut Vec<Effect>) {
        self.leaving().step = Step::Scanning(table);
        let prefix = Bytes::from(self.tables[table.index()].spec.key.literal.clone());
        effects.push(Effect::Scan { prefix, cursor, limit: self.clear_keys });
    }

    pub(super) fn probed(&mut self, found: &[Probe], now: Instant, effects: &mut Vec<Effect>) {
        let leaving = self.leaving.as_mut().expect("a batch leaves");
        let Step::Probing(keys) = &mut leaving.step else { panic!("nobody has asked for these keys") };
        assert_eq!(keys.len(), found.len(), "an answer for each key");
        let probed = std::mem::take(keys).into_iter().zip(found);
        if let Some(removal) = &mut leaving.removal {
            leaving.cleared = probed.filter(|(_, probe)| **probe != Probe::Absent).map(|(key, _)| key).collect();
            removal.deleted = leaving.cleared.len() as u64;
            let table = removal.table;
            if removal.deleted > 0 {
                self.keys_are_removed(table);
            }
            return self.clear(AfterClearing::Execute, now, effects);
        }
        let hashes = probed.filter(|(_, probe)| **probe == Probe::Hash).map(|(key, _)| key).collect();
        self.execute(&hashes, now, effects);
    }

    pub(super) fn scanned(&mut self, keys: Vec<Key>, next: u64, now: Instant, effects: &mut Vec<Effect>) {
        let leaving = self.leaving();
        let Step::Scanning(table) = leaving.step else { panic!("nobody has looked for keys") };
        let before = leaving.cleared.len();
        leaving.cleared.extend(keys);
        let found = (leaving.cleared.len() - before) as u64;
        if let Some(removal) = leaving.removal.as_mut().filter(|_| found > 0) {
            removal.deleted += found;
            self.keys_are_removed(table);
        }
        let clear_keys = self.clear_keys;
        let leaving = self.leaving();
        if next == 0 {
            leaving.clear.pop_front();
            return self.clear(AfterClearing::LeaveOn, now, effects);
        }
        leaving.step = Step::Clearing(AfterClearing::Scan(table, next));
        let keys = if leaving.cleared.len() >= clear_keys { self.some_to_clear() } else { Vec::new() };
        self.execute_clearing(keys, now, effects);
    }

    /// Removes keys in parts until those that are left fit into the batch.
    fn clear(&mut self, then: AfterClearing, now: Instant, effects: &mut Vec<Effect>) {
        let limits = self.limits;
        let leaving = self.leaving();
        let left = limits.stream_bytes().saturating_sub(leaving.next.weight);
        if weight_of_keys(&leaving.cleared) > left + limits.cleared_bytes() {
            leaving.step = Step::Clearing(then);
            let keys = self.some_to_clear();
            return self.execute_clearing(keys, now, effects);
        }
        match then {
            AfterClearing::Scan(table, cursor) => self.scan(table, cursor, effects),
            AfterClearing::LeaveOn => self.leave_on(now, effects),
            AfterClearing::Execute => self.execute(&HashSet::new(), now, effects),
        }
    }

    /// As many as one batch may remove.
    fn some_to_clear(&mut self) -> Vec<Key> {
        let limit = self.limits.stream_bytes();
        let leaving = self.leaving();
        let (mut keys, mut weight) = (Vec::new(), 0);
        while let Some(key) = leaving.cleared.pop_first() {
            weight += command::weight_of_key(&key);
            keys.push(key);
            if weight + command::weight_of_key(&keys[0]) > limit {
                break;
            }
        }
        keys
    }

    /// Removed in parts, the position held. A crash in between finds the TRUNCATE again.
    fn execute_clearing(&mut self, keys: Vec<Key>, now: Instant, effects: &mut Vec<Effect>) {
        let mut batch = RedisBatch::new(self.own.clone(), self.limits);
        for key in keys {
            put(&mut batch, &Command::Delete { key }, effects);
        }
        self.checkpoint.seq += 1;
        self.checkpoint.beat_ms = self.redis_now_ms(now);
        self.enter_tables(&mut batch, effects);
        effects.push(Effect::Execute { batch, checkpoint: self.checkpoint.to_json(), changes: 0 });
    }

    fn execute(&mut self, hashes: &HashSet<Key>, now: Instant, effects: &mut Vec<Effect>) {
        let mut leaving = self.leaving.take().expect("a batch leaves");
        let batch = std::mem::take(&mut leaving.next.batch);
        let mut forgotten = std::mem::take(&mut leaving.next.forgotten);
        self.next.forgotten.extend(forgotten.split_off(forgotten.len().min(FORGOTTEN_A_BATCH)));
        for table in batch.truncated() {
            self.tables[table.index()].pending.clear();
            forgotten.extend(self.dead.clear(table));
        }
        let any_pending = self.tables.iter().any(|t| !t.pending.is_empty());
        let settled: Vec<(TableId, Key)> = if any_pending { batch.settled().collect() } else { Vec::new() };
        let tables = &self.tables;
        // Merging needs a hash that is right: not one that waits to be read again, not one of another shape. A load of
        // which only such keys are left has all the others right: if changes to them made more of them, it would not end.
        let mergeable = |id: TableId| {
            let table = &tables[id.index()];
            let right = matches!(table.state, TableState::Loaded | TableState::Incomplete)
                || table.load.as_ref().is_some_and(|load| load.ended);
            right && matches!(&table.mapping, Some(Ok(m)) if table.written_as == Some(m.fingerprint))
        };
        let pending_already = |key: &Key| tables.iter().any(|t| t.pending.contains(key));
        let finished = batch.finish(mergeable, |key| hashes.contains(key) && !pending_already(key));

        let mut out = RedisBatch::new(self.own.clone(), self.limits);
        self.forget(&forgotten, &mut out, effects);
        let removed = std::mem::take(&mut leaving.cleared).into_iter().map(|key| Command::Delete { key });
        let orphans = std::mem::take(&mut leaving.next.orphans).into_iter().map(|key| Command::Delete { key });
        for command in removed.chain(orphans) {
            put(&mut out, &command, effects);
        }
        for command in &finished.commands {
            match out.push(command) {
                Ok(()) => {
                    if let Command::Put { key, .. } | Command::Merge { key, .. } | Command::Delete { key } = command {
                        self.not_dead(key, &mut out, effects);
                    }
                }
                Err(too_large) if matches!(command, Command::DeadLetter(_)) => {
                    self.put_letter_without_row(&too_large, command, &mut out, effects);
                }
                Err(too_large @ TooLarge::Batch { .. }) => effects.push(Effect::TooLarge(too_large)),
                Err(too_large @ (TooLarge::Value { .. } | TooLarge::Row { .. })) => {
                    self.refuse(command, &too_large, &mut leaving.next, &mut out, effects);
                }
            }
        }
        let pages = leaving.next.renewal.iter().map(|page| (page.table, &page.keys));
        for (table, keys) in pages.chain(leaving.next.renewing.iter().map(|(table, keys)| (*table, keys))) {
            let ttl_ms = self.tables[table.index()].spec.ttl_ms;
            for key in keys {
                put(&mut out, &Command::Renew { key: key.clone(), ttl_ms }, effects);
            }
        }
        let mut resolved_by_chunk: HashSet<Key> = HashSet::new();
        let mut missing = Vec::new();
        let mut again = Vec::new();
        if let Some(taken) = &mut leaving.chunk {
            again.extend(taken.compares.iter_mut().flat_map(|c| c.again.drain(..)));
            for key in taken.deletes.drain(..) {
                self.not_dead(&key, &mut out, effects);
                put(&mut out, &Command::Delete { key }, effects);
            }
            if let Some(rows) = taken.rows.take() {
                let written = out.push_rows(&rows, |key| !taken.left_out.contains(key));
                if let Err(too_large) = written {
                    effects.push(Effect::TooLarge(too_large));
                }
                let written = rows.rows.iter().map(|(key, _)| key).filter(|key| !taken.left_out.contains(*key));
                written.for_each(|key| self.not_dead(key, &mut out, effects));
            }
            let letter = if taken.compares.is_some() { Letter::IfNew } else { Letter::UnlessRecorded };
            for mut row in taken.unwritable.drain(..) {
                row.letter.lsn = self.checkpoint.lsn.to_string();
                self.is_dead(taken.table, row, letter, &mut leaving.next.applied, &mut out, effects);
            }
            resolved_by_chunk.extend(taken.resolved.drain(..));
            for key in taken.must_exist.drain(..) {
                if hashes.contains(&key) {
                    // The stream wrote it, perhaps in an earlier life: its TTL must reach as far as its neighbours'.
                    let ttl_ms = self.tables[taken.table.index()].spec.ttl_ms;
                    put(&mut out, &Command::Renew { key, ttl_ms }, effects);
                } else {
                    missing.push(key);
                }
            }
        }

        for (table, key) in settled {
            self.tables[table.index()].pending.remove(&key);
        }
        if let Some(table) = leaving.chunk.as_ref().map(|c| c.table) {
            let pending = &mut self.tables[table.index()].pending;
            resolved_by_chunk.iter().for_each(|key| {
                pending.remove(key);
            });
            self.pend(table, missing, now, effects);
            let of = leaving.chunk.as_ref().and_then(|c| c.of);
            let current = self.tables[table.index()].load.as_mut().filter(|load| Some(load.id) == of);
            if let Some(load) = current.filter(|_| !again.is_empty()) {
                load.again += again.len();
                let checks = Some(load.id);
                self.read_again(table, &again, checks);
            }
        }
        let mut by_table: BTreeMap<TableId, Vec<Key>> = BTreeMap::new();
        for (table, key) in finished.pending {
            if !resolved_by_chunk.contains(&key) {
                by_table.entry(table).or_default().push(key);
            }
        }
        for (table, keys) in by_table {
            self.pend(table, keys, now, effects);
        }

        self.write_checkpoint(&mut leaving, &mut out, now, effects);
        self.enter_tables(&mut out, effects);
        leaving.step = Step::Executing;
        let changes = leaving.next.changes;
        self.leaving = Some(leaving);
        effects.push(Effect::Execute { batch: out, checkpoint: self.checkpoint.to_json(), changes });
    }

    /// A row of the stream that Redis cannot hold.
    fn refuse(
        &mut self,
        command: &Command,
        why: &TooLarge,
        next: &mut Next,
        out: &mut RedisBatch,
        effects: &mut Vec<Effect>,
    ) {
        let (Command::Put { key, .. } | Command::Merge { key, .. }) = command else {
            panic!("only a row can be too large by itself");
        };
        let owner = self.tables.iter().find(|t| key.as_bytes().starts_with(t.spec.key.literal.as_bytes()));
        let table = owner.expect("a row belongs to a table");
        let id = table.spec.id;
        if let Command::Merge { base: Base::Kept(slot), .. } = command {
            // Nobody moves that copy into place.
            put(out, &Command::Delete { key: self.own.kept(*slot) }, effects);
        }
        let letter = next.large.remove(key).unwrap_or_else(|| DeadLetter {
            table: table.spec.name.clone(),
            key: key.0.clone(),
            lsn: self.received.to_string(),
            xid: next.last.as_ref().map_or(0, |last| last.xid),
            reason: String::new(),
            row: Bytes::new(),
        });
        let letter = DeadLetter { reason: why.to_string(), ..letter };
        let row = Unwritable { key: key.clone(), code: "too_large", letter };
        self.is_dead(id, row, Letter::Always, &mut next.applied, out, effects);
    }

    /// The key and the reason matter more than the row, which Postgres has.
    pub(super) fn put_letter_without_row(
        &self,
        why: &TooLarge,
        letter: &Command,
        out: &mut RedisBatch,
        effects: &mut Vec<Effect>,
    ) {
        match letter {
            Command::DeadLetter(letter) if !letter.row.is_empty() => {
                put(out, &Command::DeadLetter(DeadLetter { row: Bytes::new(), ..letter.clone() }), effects);
            }
            _ => effects.push(Effect::TooLarge(why.clone())),
        }
    }

    /// Loads that are complete but for the checkpoint that says so.
    fn finished_loads(&self) -> Vec<TableId> {
        let whole = |t: &&Table| t.pending.is_empty() && t.load.as_ref().is_some_and(|l| l.ended && l.again == 0);
        self.tables.iter().filter(whole).map(|t| t.spec.id).collect()
    }

    fn write_checkpoint(
        &mut self,
        leaving: &mut Leaving,
        out: &mut RedisBatch,
        now: Instant,
        effects: &mut Vec<Effect>,
    ) {
        for id in std::mem::take(&mut leaving.finished) {
            let table = &mut self.tables[id.index()];
            if !table.pending.is_empty() {
                continue;
            }
            let Some(load) = table.load.take_if(|l| l.ended && l.again == 0) else { continue };
            table.not_compared = None;
            let marks = &mut self.checkpoint.tables;
            match load.purpose {
                Purpose::Fill => {
                    table.broken = None;
                    table.fit = (table.base, table.base);
                    table.state = TableState::Loaded;
                    table.catalog = load.catalog;
                    table.removed = load.removed;
                    let mark = TableMark {
                        template: table.spec.key.to_string(),
                        fingerprint: table.written_as.unwrap_or(0),
                        catalog: load.catalog,
                        state: TableState::Loaded,
                        ttl_until_ms: Some(load.renewed_until_ms.max(load.started_redis_ms + table.spec.ttl_ms)),
                        as_of: None,
                        removed: load.removed,
                        compared_ms: Some(load.started_redis_ms),
                        verified_ms: marks.get(&table.spec.name).and_then(|mark| mark.verified_ms),
                        blocked: None,
                        dead_letters: 0,
                        more_dead_letters: false,
                    };
                    marks.insert(table.spec.name.clone(), mark);
                }
                Purpose::Compare(repair) => {
                    let is_right = repair == Repair::Mend || load.tally.drift() == 0;
                    let is_refetch = self.operation.as_ref().is_some_and(|o| o.what == Heavy::Refetch);
                    if let Some(mark) = marks.get_mut(&table.spec.name) {
                        if is_right {
                            mark.compared_ms = Some(load.started_redis_ms);
                        }
                        if is_right && !is_refetch {
                            mark.verified_ms = Some(load.started_redis_ms);
                        }
                        if repair == Repair::Mend {
                            table.removed = load.removed;
                            table.catalog = load.catalog;
                            mark.catalog = load.catalog;
                        }
                    }
                }
            }
            if load.purpose != Purpose::Compare(Repair::OnlyCount) {
                let gone = self.dead.ended(id, load.id);
                self.forget(&gone, out, effects);
            }
            leaving.loaded.push((id, load));
        }
        for table in &mut self.tables {
            let settled = table.pending.is_empty() && table.load.is_none() && table.broken.is_none();
            table.as_of = table.as_of.filter(|_| !settled);
            match table.state {
                TableState::Incomplete if settled && !table.removed => table.state = TableState::Loaded,
                TableState::Loaded if table.removed => table.state = TableState::Incomplete,
                _ => {}
            }
            if let Some(mark) = self.checkpoint.tables.get_mut(&table.spec.name) {
                table.write_mark(mark);
                mark.as_of = table.as_of;
                mark.dead_letters = self.dead.count(table.spec.id);
                mark.more_dead_letters = self.dead.more(table.spec.id);
            }
        }
        if let Some(page) = leaving.next.renewal.as_ref().filter(|p| p.ends_round) {
            // Every key that was there was renewed, or written with a full TTL, since the round began. What had expired
            // by then stays gone: such a round promises nothing.
            let redis_now_ms = self.redis_now_ms(now);
            let table = &mut self.tables[page.table.index()];
            let since = table.renewing_since_ms.take().expect("a round that ends has begun");
            let reach = since + table.spec.ttl_ms;
            let mark = self.checkpoint.tables.get_mut(&table.spec.name).and_then(|m| m.ttl_until_ms.as_mut());
            // A comparison says nothing of the TTL of what it does not write.
            let filled = table.load.as_ref().filter(|l| l.purpose == Purpose::Fill);
            let of_load = filled.map(|l| (l.started_redis_ms + table.spec.ttl_ms).max(l.renewed_until_ms));
            if of_load.or(mark.as_deref().copied()).is_some_and(|until| until > redis_now_ms) {
                if let Some(load) = &mut table.load {
                    load.renewed_until_ms = load.renewed_until_ms.max(reach);
                }
                if let Some(until) = mark {
                    *until = reach.max(*until);
                }
            }
        }
        let settled = |t: &Table| t.load.is_none() && t.pending.is_empty();
        if self.tables.iter().all(settled) {
            self.record.set(Recording::Tables);
        }
        if self.tables.iter().all(|t| t.load.is_none()) {
            // The first load has ended: every later snapshot sees what the slot's saw.
            self.slot_snapshot = None;
            self.checkpoint.slot_snapshot = None;
        }
        let retired = &leaving.next.retired;
        self.checkpoint.retired.retain(|template| !retired.contains(template));
        if let Some(through) = leaving.next.through {
            self.checkpoint.lsn = self.checkpoint.lsn.max(through);
        }
        if let Some(within) = leaving.next.within {
            self.checkpoint.within = within;
        }
        if let Some(last) = leaving.next.last {
            self.checkpoint.last = Some(last);
        }
        self.checkpoint.seq += 1;
        self.checkpoint.beat_ms = self.redis_now_ms(now);
    }

    /// What the checkpoint says of a table goes along where it has changed.
    fn enter_tables(&mut self, out: &mut RedisBatch, effects: &mut Vec<Effect>) {
        for (table, mark) in &self.checkpoint.tables {
            if self.entered.get(table) != Some(mark) {
                put(out, &Command::Enter { table: table.clone(), entry: mark.to_json() }, effects);
                self.entered.insert(table.clone(), mark.clone());
            }
        }
    }

    pub(super) fn executed(&mut self, redis_time_ms: u64, now: Instant, effects: &mut Vec<Effect>) {
        self.redis_clock = (redis_time_ms, now);
        self.last_executed = now;
        self.acknowledged = Acknowledged { lsn: self.checkpoint.lsn, seq: self.checkpoint.seq };
        if let Some(Leaving { step: Step::Clearing(then), .. }) = self.leaving {
            return self.clear(then, now, effects);
        }
        let leaving = self.leaving.take().expect("a batch leaves");
        assert!(matches!(leaving.step, Step::Executing), "nothing was executed");
        self.done = self.left;
        let mut applied = leaving.next.applied;
        if let Some(taken) = leaving.chunk {
            let is_verified = self.operation.as_ref().is_some_and(|o| o.what != Heavy::Refetch);
            if taken.compares.is_none() || !is_verified {
                applied.count(taken.table).loaded += taken.row_count;
            }
            let table = &mut self.tables[taken.table.index()];
            if let Some(load) = table.load.as_mut().filter(|load| Some(load.id) == taken.of) {
                if let Some(broken) = table.broken.as_mut().filter(|_| load.purpose == Purpose::Fill) {
                    broken.is_mending = true;
                }
                load.tally.rows += if taken.of_load { taken.row_count } else { 0 };
                load.tally.add(&taken.compares.map(|c| c.found).unwrap_or_default());
            }
            if taken.last_part {
                self.settle_read(!taken.of_load);
                effects.push(Effect::Order(LoadOrder::Verdict(taken.chunk, Verdict::Written)));
            }
        }
        if let Some(page) = leaving.next.renewal {
            applied.renewed += page.keys.len() as u64;
            effects.push(Effect::Renewed(page.table));
        }
        applied.renewed += leaving.next.renewing.map_or(0, |(_, keys)| keys.len() as u64);
        for (table, load) in leaving.loaded {
            match load.purpose {
                Purpose::Fill => {
                    let (rows, started, because) = (load.tally.rows, load.started, load.because);
                    effects.push(Effect::TableLoaded { table, rows, started, because });
                }
                Purpose::Compare(_) => self.table_compared(table, &load, now, effects),
            }
        }
        if let Some(removal) = leaving.removal {
            effects.push(Effect::Answer(removal.ask, Ok(Answer::Deleted(removal.deleted))));
        }
        if self.safe_when == SafeWhen::Acknowledged {
            self.is_safe(AppliedLsn(self.checkpoint.lsn));
        }
        self.position_wanted &= self.checkpoint.lsn < self.received;
        self.freshness.arrived(self.acknowledged.lsn.0);
        effects.push(Effect::Applied(Box::new(applied)));
        self.look_for_expired(redis_time_ms, now, effects);
    }

    pub(super) fn is_safe(&mut self, lsn: AppliedLsn) {
        self.safe = self.safe.max(Some(lsn));
        self.ledger.applied(lsn);
    }

    /// A daemon that was frozen, or could not renew, finds keys gone that no change took away.
    fn look_for_expired(&mut self, redis_time_ms: u64, now: Instant, effects: &mut Vec<Effect>) {
        let reach = |t: &Table| self.checkpoint.tables.get(&t.spec.name).and_then(|mark| mark.ttl_until_ms);
        let expired =
            |t: &&Table| t.load.is_none() && t.broken.is_none() && reach(t).is_some_and(|until| until <= redis_time_ms);
        let expired: Vec<TableId> = self.tables.iter().filter(expired).map(|t| t.spec.id).collect();
        for table in expired {
            let because = Reason::heals(Heal::Expired, "rows may have expired while nothing renewed them");
            self.begin_load(table, because, Trust::Incomplete, now, effects);
        }
    }
}
