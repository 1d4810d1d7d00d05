//! What an operator asks for: comparisons of every row, removals, the pause.

use super::*;

impl Machine {
    pub(super) fn asked(&mut self, ask: AskId, operation: Operation, now: Instant, effects: &mut Vec<Effect>) {
        if self.draining {
            return effects.push(Effect::Answer(ask, Err(Refusal::NotNow("prefetchd is stopping".to_owned()))));
        }
        let (scope, what) = match operation {
            Operation::Pause => {
                self.paused = true;
                return self.pausing.push(ask);
            }
            Operation::Resume => {
                self.paused = false;
                return effects.push(Effect::Answer(ask, Ok(Answer::Resumed)));
            }
            Operation::Invalidate(table, keys) => {
                let removal = Removal { ask, table, keys: Some(keys), deleted: 0 };
                return self.removals.push_back(removal);
            }
            Operation::Clear(table) => {
                return self.removals.push_back(Removal { ask, table, keys: None, deleted: 0 });
            }
            Operation::Skip(_) => {
                let text = "the stream goes on: there is nothing to be skipped";
                return effects.push(Effect::Answer(ask, Err(Refusal::Pointless(text.to_owned()))));
            }
            Operation::Refetch(scope) => (scope, Heavy::Refetch),
            Operation::Verify(scope, repair) => (scope, Heavy::Verify(repair)),
        };
        if let Err(refusal) = self.may_compare(scope) {
            return effects.push(Effect::Answer(ask, Err(refusal)));
        }
        let tables = self.tables.iter().map(|t| t.spec.id);
        let tables: BTreeSet<TableId> = tables.filter(|t| scope == Scope::All || scope == Scope::Table(*t)).collect();
        self.compare(Some(ask), what, tables, now, effects);
    }

    /// One heavy operation at a time, whoever began it.
    fn may_compare(&self, scope: Scope) -> Result<(), Refusal> {
        if self.paused {
            return Err(Refusal::Paused);
        }
        if let Some(operation) = &self.operation {
            return Err(Refusal::Busy(format!("a {} is under way", operation.what)));
        }
        if let Some(table) = self.tables.iter().find(|t| t.load.is_some()) {
            return Err(Refusal::Busy(format!("table {} is being loaded", table.spec.name)));
        }
        let concerned = |t: &&Table| scope == Scope::All || scope == Scope::Table(t.spec.id);
        match self.tables.iter().filter(concerned).find(|t| t.broken.is_some()) {
            Some(Table { spec, broken: Some(broken), .. }) => {
                Err(Refusal::NotNow(format!("table {} is blocked, since {}", spec.name, broken.why)))
            }
            Some(_) | None => Ok(()),
        }
    }

    fn compare(
        &mut self,
        ask: Option<AskId>,
        what: Heavy,
        tables: BTreeSet<TableId>,
        now: Instant,
        effects: &mut Vec<Effect>,
    ) {
        self.operation = Some(Running::new(ask, what, tables.clone(), now));
        for table in tables {
            self.walk(table, Purpose::Compare(what.repair()), Reason::ordinary(what.to_string()), now, effects);
        }
    }

    /// Every table that nobody has compared for so long.
    pub(super) fn verify_when_due(&mut self, now: Instant, effects: &mut Vec<Effect>) {
        let Some(every_ms) = self.verify_every_ms else { return };
        if self.draining || self.paused || self.operation.is_some() || self.tables.iter().any(|t| t.load.is_some()) {
            return;
        }
        let redis_now_ms = self.redis_now_ms(now);
        let compared_ms = |t: &Table| self.checkpoint.tables.get(&t.spec.name).and_then(|m| m.compared_ms);
        let retry = COMPARISON_RETRY.min(Duration::from_millis(every_ms));
        let failed_lately = |t: &Table| t.not_compared.is_some_and(|at| now.saturating_duration_since(at) < retry);
        let due = |t: &&Table| {
            let is_due = compared_ms(t).unwrap_or(0).saturating_add(every_ms) <= redis_now_ms;
            is_due && t.broken.is_none() && !failed_lately(t)
        };
        let due: BTreeSet<TableId> = self.tables.iter().filter(due).map(|t| t.spec.id).collect();
        if !due.is_empty() {
            self.compare(None, Heavy::Verify(Repair::Mend), due, now, effects);
        }
    }

    /// What lies in Redis beside a part of a chunk.
    pub(super) fn compared(&mut self, differences: &Differences, now: Instant, effects: &mut Vec<Effect>) {
        let leaving = self.leaving();
        assert!(matches!(leaving.step, Step::Comparing), "nothing was compared");
        let taken = leaving.chunk.as_mut().expect("a chunk is compared");
        let compares = taken.compares.as_mut().expect("it is compared");
        let Differences { missing, stale, present } = differences;
        // Whatever lies at the key of a row that Redis cannot hold is not that row.
        let displaced = taken.unwritable.iter().filter(|row| present.contains(&row.key)).count();
        (compares.found.missing, compares.found.stale) = (missing.len() as u64, (stale.len() + displaced) as u64);
        match compares.about {
            About::LeftToTheStream => {
                compares.again = compares.keys.iter().filter(|k| !present.contains(*k)).cloned().collect();
            }
            About::Orphans => {
                compares.found.orphaned = present.len() as u64;
                taken.deletes = compares.keys.iter().filter(|k| present.contains(*k)).cloned().collect();
            }
        }
        match compares.repair {
            Repair::Mend => compares.found.repaired = compares.found.drift(),
            Repair::OnlyCount => {
                taken.deletes.clear();
                taken.unwritable.clear();
            }
        }
        let writes = compares.repair == Repair::Mend && !(missing.is_empty() && stale.is_empty());
        match taken.rows.take().filter(|_| writes) {
            Some(rows) => {
                let same = rows.rows.iter().map(|(k, _)| k).filter(|k| !missing.contains(*k) && !stale.contains(*k));
                taken.left_out.extend(same.cloned());
                taken.rows = Some(rows);
            }
            None => taken.rows = None,
        }
        self.leave_on(now, effects);
    }

    /// A comparison that cannot be made says nothing of the table: that stays as it is.
    pub(super) fn not_compared(
        &mut self,
        id: TableId,
        load: LoadId,
        why: &str,
        now: Instant,
        effects: &mut Vec<Effect>,
    ) {
        let table = &mut self.tables[id.index()];
        if table.load.take_if(|l| l.id == load && l.purpose != Purpose::Fill).is_none() {
            // It was overtaken by another load.
            return;
        }
        table.not_compared = Some(now);
        effects.push(Effect::Order(LoadOrder::Abandon(id, load)));
        self.give_up_chunks(id, effects);
        self.reads.retain(|read| read.checks != Some(load));
        let operation = self.operation.as_mut().expect("somebody has asked for a comparison");
        effects.push(Effect::TableNotCompared { table: id, what: operation.what, why: why.to_owned() });
        operation.impossible(id, &self.tables[id.index()].spec.name, why);
        self.end_operation(now, effects);
    }

    /// Redis refuses to show what lies beside a part of a chunk. The batch leaves without it.
    pub(super) fn chunk_not_compared(&mut self, why: &str, now: Instant, effects: &mut Vec<Effect>) {
        let leaving = self.leaving();
        assert!(matches!(leaving.step, Step::Comparing), "nothing was compared");
        let taken = leaving.chunk.take().expect("a chunk is compared");
        if taken.last_part {
            self.settle_read(!taken.of_load);
            effects.push(Effect::Order(LoadOrder::Verdict(taken.chunk, Verdict::GivenUp)));
        }
        if let Some(load) = taken.of {
            self.not_compared(taken.table, load, why, now, effects);
        }
        self.leave_on(now, effects);
    }

    pub(super) fn table_compared(&mut self, table: TableId, load: &Load, now: Instant, effects: &mut Vec<Effect>) {
        let operation = self.operation.as_mut().expect("somebody has asked for a comparison");
        let (what, tally, started) = (operation.what, load.tally, load.started);
        effects.push(Effect::TableCompared { table, what, tally, started });
        operation.ended(table, &tally);
        self.end_operation(now, effects);
    }

    /// It is loaded now, or cannot be followed.
    pub(super) fn no_longer_compared(&mut self, table: TableId, why: &str, now: Instant, effects: &mut Vec<Effect>) {
        let Some(operation) = &mut self.operation else { return };
        operation.lost(table, &self.tables[table.index()].spec.name, why);
        self.end_operation(now, effects);
    }

    fn end_operation(&mut self, now: Instant, effects: &mut Vec<Effect>) {
        let Some(operation) = self.operation.take_if(|o| o.is_over()) else { return };
        let elapsed = now.saturating_duration_since(operation.started);
        let lsn = self.acknowledged.lsn;
        if operation.is_whole() {
            effects.push(Effect::Compared { what: operation.what, tally: operation.tally, elapsed });
        }
        if let Some((ask, answer)) = operation.answer(lsn, elapsed) {
            effects.push(Effect::Answer(ask, answer));
        }
    }

    /// Until the table is read as a whole again, "not there" means nothing.
    pub(super) fn keys_are_removed(&mut self, id: TableId) {
        let table = &mut self.tables[id.index()];
        table.removed = true;
        if let Some(load) = &mut table.load {
            load.removed = true;
        }
        if table.state == TableState::Loaded {
            table.state = TableState::Incomplete;
        }
        if let Some(mark) = self.checkpoint.tables.get_mut(&table.spec.name) {
            table.write_mark(mark);
        }
    }
}
