//! The members of lookups that a batch adds and removes: what it must read before, and what became of its rows.
//!
//! Costs nothing for tables without lookups. A mistake here lets a lookup and its rows disagree after a batch.

use super::in_flight::{AfterClearing, InFlight, Step};
use super::inspect::Bases;
use super::judge_chunk::JudgedPart;
use super::tables::Tables;
use super::turn::Turn;
use super::{Effect, Machine};
use crate::checkpoint::Place;
use crate::command::{Base, Command, EncodedMembers, Key};
use crate::lookups::changes::Changes;
use crate::lookups::questions::{Answers, Fits, Questions};
use crate::lookups::{ListKind, Lookups, Values};
use crate::plan::key_states::RowState;
use crate::resp::batch::Batch;
use crate::rules::{Rule, holds};
use crate::schema::TableId;
use std::collections::{BTreeMap, BTreeSet, HashMap};

/// What is read before a batch.
pub(super) enum Asked {
    /// Rows that it may write or remove.
    Rows(Vec<(TableId, Key)>),
    /// Lists that it may change.
    Lists(Vec<Key>),
}

/// What to write once that is known.
pub(super) enum Then {
    /// The batch in flight.
    Write(Bases),
    /// The removal of these keys.
    Clear(Vec<Key>, AfterClearing),
}

/// What Redis has before the batch in flight.
#[derive(Default)]
pub(super) struct Inspected {
    /// Of tables with lookups.
    rows: HashMap<Key, Option<Values>>,
    /// Keys of lists at which something else lies.
    other_type: BTreeSet<Key>,
}

/// What became of rows of tables with lookups. Those that are not mentioned were left as they were.
#[derive(Default)]
pub(super) struct Outcomes {
    rows: BTreeMap<Key, (TableId, Option<Values>)>,
    /// What became of others that are new.
    joined: Changes,
}

impl Outcomes {
    pub fn gone(&mut self, table: TableId, key: &Key, tables: &Tables) {
        if tables.get(table).lookups().is_some() {
            self.rows.insert(key.clone(), (table, None));
        }
    }

    /// For a key that may belong to no table.
    pub fn removed(&mut self, key: &Key, tables: &Tables) {
        if let Some(table) = tables.with_lookups(key) {
            self.rows.insert(key.clone(), (table, None));
        }
    }

    /// This command of the stream's changes is part of the batch. `kept`: the keys of the copies that it has made.
    pub fn wrote(&mut self, command: &Command, kept: &[Key], inspected: &Inspected, tables: &Tables) {
        let (Command::Put { key, .. }
        | Command::PutDocument { key, .. }
        | Command::Merge { key, .. }
        | Command::Delete { key }) = command
        else {
            return;
        };
        let Some(table) = tables.with_lookups(key) else { return };
        let of = tables.get(table).lookups().expect("it has lookups");
        let values = match command {
            Command::Put { layout, row, .. } => Some(of.values_of(layout, row)),
            Command::PutDocument { document, .. } => Some(of.values_in(document)),
            Command::Merge { key, base, layout, row } => {
                let base = match base {
                    Base::SameKey => key,
                    Base::Kept(slot) => &kept[*slot as usize],
                };
                Some(of.values_over(&inspected.base(base, of), layout, row))
            }
            _ => None,
        };
        self.rows.insert(key.clone(), (table, values));
    }

    /// These rows of a chunk are part of the batch, but not the commands for their memberships.
    pub fn loaded(&mut self, part: &JudgedPart, tables: &Tables) {
        if part.is_new {
            let Some(of) = tables.get(part.table).lookups() else { return };
            return part.written().for_each(|(key, values)| self.joined.new_row(of, key, values));
        }
        for (key, values) in part.written() {
            self.rows.insert(key.clone(), (part.table, Some(values.clone())));
        }
    }

    /// The row is correct, but may lack memberships that it should have.
    pub fn stays(&mut self, table: TableId, key: &Key, inspected: &Inspected) {
        if let Some(values) = inspected.row(key) {
            // Unless a change of the stream is written over it.
            self.rows.entry(key.clone()).or_insert_with(|| (table, Some(values.clone())));
        }
    }
}

impl Inspected {
    fn row(&self, key: &Key) -> Option<&Values> {
        self.rows.get(key)?.as_ref()
    }

    /// Returns the values of a row that others are written over. Without the key's columns it counts as no row, and has no
    /// memberships before.
    fn base(&self, key: &Key, of: &Lookups) -> Values {
        self.row(key).cloned().unwrap_or_else(|| of.no_values())
    }
}

impl Machine {
    /// Asks for what must be known of rows and lists, and then writes.
    pub(super) fn inspect(&mut self, then: Then, turn: &mut Turn) {
        if !self.tables.have_lookups() || !holds(Rule::MembersWithRows) {
            return self.write_inspected(then, turn);
        }
        let rows: Vec<(TableId, Key)> = match &then {
            Then::Clear(keys, _) => {
                let with_lookups = |key: &Key| Some((self.tables.with_lookups(key)?, key.clone()));
                keys.iter().filter_map(with_lookups).collect()
            }
            Then::Write(_) => self.rows_concerned(self.in_flight.as_ref().expect("a batch is in flight")),
        };
        if rows.is_empty() {
            return self.write_inspected(then, turn);
        }
        let question = |(table, key): &(TableId, Key)| {
            let of = self.tables.get(*table).lookups().expect("it has lookups");
            (key.clone(), of.fields().clone())
        };
        turn.does(Effect::Inspect(Questions::Rows(rows.iter().map(question).collect())));
        self.batch_in_flight().step = Step::Inspecting(Asked::Rows(rows), then);
    }

    /// Takes the answer to [`Effect::Inspect`].
    pub(super) fn inspected(&mut self, answers: Answers, turn: &mut Turn) {
        let in_flight = self.batch_in_flight();
        let (asked, then) = match std::mem::replace(&mut in_flight.step, Step::Executing) {
            Step::Inspecting(asked, then) => (asked, then),
            Step::Sweeping(table) => return self.swept(table, answers, turn),
            _ => panic!("nothing was inspected"),
        };
        match (asked, answers) {
            (Asked::Rows(rows), Answers::Rows(values)) => {
                assert_eq!(rows.len(), values.len(), "an answer for each row");
                let values = values.into_iter().map(Values::read);
                in_flight.inspected.rows = rows.into_iter().map(|(_, key)| key).zip(values).collect();
                self.ask_types_of_lists(then, turn);
            }
            (Asked::Lists(lists), Answers::Lists(fits)) => {
                assert_eq!(lists.len(), fits.len(), "an answer for each list");
                let other = lists.into_iter().zip(fits).filter(|(_, fits)| *fits == Fits::OtherType);
                in_flight.inspected.other_type = other.map(|(list, _)| list).collect();
                self.write_inspected(then, turn);
            }
            (Asked::Rows(_) | Asked::Lists(_), answers) => panic!("the answer to another question: {answers:?}"),
        }
    }

    /// A command that meets a key of another type would fail inside EXEC.
    fn ask_types_of_lists(&mut self, then: Then, turn: &mut Turn) {
        let lists = match holds(Rule::AskTypesOfLists) {
            true => self.lists_concerned(self.in_flight.as_ref().expect("a batch is in flight"), &then),
            false => BTreeMap::new(),
        };
        if lists.is_empty() {
            return self.write_inspected(then, turn);
        }
        let keys = lists.keys().cloned().collect();
        turn.does(Effect::Inspect(Questions::Lists(lists.into_iter().collect())));
        self.batch_in_flight().step = Step::Inspecting(Asked::Lists(keys), then);
    }

    fn write_inspected(&mut self, then: Then, turn: &mut Turn) {
        match then {
            Then::Write(bases) => self.write(&bases, turn),
            Then::Clear(keys, after) => self.write_clearing(keys, after, turn),
        }
    }

    /// The rows of tables with lookups that the batch may write or remove, and those that must stay.
    fn rows_concerned(&self, in_flight: &InFlight) -> Vec<(TableId, Key)> {
        let has_lookups = |table: TableId| self.tables.get(table).lookups().is_some();
        let mut rows: BTreeSet<(TableId, Key)> = BTreeSet::new();
        let touched = in_flight.changes().touched().filter(|(table, _)| has_lookups(*table));
        rows.extend(touched.map(|(table, key)| (table, key.clone())));
        let removed = in_flight.removed();
        rows.extend(removed.filter_map(|key| Some((self.tables.with_lookups(key)?, key.clone()))));
        if let Some(part) = in_flight.part().filter(|part| has_lookups(part.table)) {
            let written = part.written().map(|(key, _)| key).filter(|_| !part.is_new);
            let unwritable = part.unwritable.iter().map(|row| &row.key);
            let keys = written.chain(unwritable).chain(&part.deletes).chain(&part.must_exist);
            rows.extend(keys.map(|key| (part.table, key.clone())));
        }
        rows.into_iter().collect()
    }

    /// The lists that the batch may change: those of which the rows are members, and those of which they may become members.
    fn lists_concerned(&self, in_flight: &InFlight, then: &Then) -> BTreeMap<Key, ListKind> {
        let mut lists = BTreeMap::new();
        let mut add = |of: &Lookups, key: &Key, values: &Values| {
            let kind = |list: &Key| of.kind_at(list).expect("a membership is of one of the lookups");
            lists.extend(of.memberships(key, values).into_keys().map(|list| (list.clone(), kind(&list))));
        };
        let inspected = &in_flight.inspected;
        let lookups = |table: TableId| self.tables.get(table).lookups();
        for (key, values) in &inspected.rows {
            if let (Some(values), Some(table)) = (values, self.tables.with_lookups(key)) {
                add(lookups(table).expect("it has lookups"), key, values);
            }
        }
        if let Then::Clear(..) = then {
            return lists;
        }
        for (table, key, state) in in_flight.changes().rows() {
            let Some(of) = lookups(table) else { continue };
            match state {
                RowState::Full(layout, row) => add(of, key, &of.values_of(layout, row)),
                RowState::Over { base, layout, row } => {
                    add(of, key, &of.values_over(&inspected.base(base, of), layout, row));
                }
            }
        }
        if let Some(part) = in_flight.part().filter(|part| !part.is_new)
            && let Some(of) = lookups(part.table)
        {
            part.written().for_each(|(key, values)| add(of, key, values));
        }
        lists
    }

    /// Adds all rows of a part to their lists.
    pub(super) fn push_members(&mut self, of: TableId, members: &EncodedMembers, out: &mut Batch, turn: &mut Turn) {
        let ttl_ms = self.tables.get(of).spec.ttl_ms;
        let ttls = self.tables.list_ttls();
        ttls.expire(ttl_ms, turn.now);
        if let Err(too_large) = out.push_members(members, |list| ttls.lacks(list)) {
            turn.does(Effect::TooLarge(too_large));
        }
    }

    /// Adds and removes the members that follow from what became of the rows in a batch that ends at `place`.
    pub(super) fn write_members(
        &mut self,
        outcomes: Outcomes,
        inspected: &Inspected,
        place: Place,
        out: &mut Batch,
        turn: &mut Turn,
    ) {
        if !holds(Rule::MembersWithRows) {
            return;
        }
        let mut changes = outcomes.joined;
        for (key, (table, after)) in outcomes.rows.into_iter().filter(|(key, _)| !self.outbox.is_ahead(key, place)) {
            let of = self.tables.get(table).lookups().expect("only rows of such tables are recorded");
            changes.row(of, &key, inspected.row(&key), after.as_ref(), self.tables.knows(table));
        }
        // A list that the batch does not change in the end stays what it is.
        let other_type = inspected.other_type.iter().filter(|list| changes.concerns(list)).cloned().collect();
        for command in changes.into_commands(&other_type) {
            if let Command::Leave { key, .. } = &command {
                self.tables.list_ttls().shrinks(key);
            }
            turn.puts(out, &command);
        }
    }
}
