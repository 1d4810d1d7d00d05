//! One load: rows, then orphans, then the end.

use super::beginnings::Beginning;
use super::messages::{Brought, Loadable, Task};
use super::range::{Range, ranges};
use super::{Measures, readers::Job};
use crate::command::{self, Key};
use crate::rules::{Rule, holds};
use crate::schema::{Oid, TableId};
use crate::session::chunk::{LoadId, Purpose};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

pub(super) struct Active<T> {
    pub id: LoadId,
    pub purpose: Purpose,
    /// Rises where the load begins again by itself: what was read before counts for nothing then.
    pub attempt: u64,
    pub table: Loadable<T>,
    /// The only leaves that are read, if not all of them.
    pub only: Option<Arc<[Oid]>>,
    /// Where each leaf's rows lay when the first of them were read.
    filenodes: BTreeMap<usize, Oid>,
    /// It was in the way of others that were read with it, or they in its way.
    reads_alone: bool,
    todo: VecDeque<Task>,
    /// Read or being read, and not written.
    out: usize,
    sweep: Sweep,
}

/// The walk over the keys in Redis, for those without a row.
enum Sweep {
    NotYet,
    At(u64),
    /// A page of keys is asked for.
    Asked,
    Done,
}

/// What a load needs in order to go on.
pub(super) enum Next {
    /// Its chunks have to be read and written.
    Nothing,
    /// Keys in Redis, from this cursor on.
    Keys(u64),
    End,
}

/// What can be read next.
#[derive(Clone, Copy)]
pub(super) enum Offer {
    Alone,
    /// With others, where all of them have few pages.
    Pages(u32),
}

impl<T> Active<T> {
    /// `is_empty`: no key of it lies in Redis.
    pub fn new(begin: Beginning, attempt: u64, table: Loadable<T>, measures: &Measures, is_empty: bool) -> Self {
        let Beginning { load: id, purpose, only, .. } = begin;
        let is_read =
            |range: &Range| only.as_ref().is_none_or(|only| only.contains(&table.composition.leaves[range.leaf].oid));
        let ranges = ranges(&table.extent, measures.pages_a_chunk).into_iter().filter(is_read);
        let todo = ranges.map(Task::Range).collect();
        let sweep = if is_empty || only.is_some() || !holds(Rule::RemoveOrphans) { Sweep::Done } else { Sweep::NotYet };
        let (filenodes, reads_alone, out) = (BTreeMap::new(), false, 0);
        Active { id, purpose, attempt, table, only, filenodes, reads_alone, todo, out, sweep }
    }

    pub fn waits(&self) -> bool {
        !self.todo.is_empty()
    }

    pub fn offer(&self) -> Option<Offer> {
        let pages = match self.todo.front()? {
            Task::Range(range) if !self.reads_alone => range.pages(&self.table.extent),
            Task::Range(_) | Task::Orphans(_) | Task::Keys(_) => None,
        };
        Some(pages.map_or(Offer::Alone, Offer::Pages))
    }

    pub fn take(&mut self, table: TableId) -> Job {
        let task = self.todo.pop_front().expect("a task was seen");
        self.out += 1;
        Job { table, attempt: Some(self.attempt), task }
    }

    /// What was not read, or not written, is read again.
    pub fn again(&mut self, task: Task) {
        self.out -= 1;
        self.todo.push_back(task);
    }

    pub fn reads_alone(&mut self) {
        self.reads_alone = true;
    }

    /// A chunk was written, or given up.
    pub fn settled(&mut self) {
        self.out -= 1;
    }

    /// Whether a chunk of a range lies where the others of its leaf do.
    pub fn lies_as_before(&mut self, range: &Range, brought: &Brought) -> bool {
        let Some(now) = brought.filenode else { return true };
        let first = *self.filenodes.entry(range.leaf).or_insert(now);
        first == now || !holds(Rule::LoadAgainRewritten)
    }

    /// A chunk came without its end, which is another one.
    pub fn leaves(&mut self, range: &mut Range, rest: Range) {
        range.without(&rest);
        self.todo.push_back(Task::Range(rest));
    }

    /// `most_out`: chunks that are read ahead.
    pub fn next(&mut self, most_out: usize) -> Next {
        let under_way = self.todo.len() + self.out;
        let cursor = match self.sweep {
            Sweep::NotYet if under_way == 0 => 0,
            Sweep::At(cursor) if under_way < most_out => cursor,
            Sweep::Done if under_way == 0 => return Next::End,
            Sweep::NotYet | Sweep::At(_) | Sweep::Asked | Sweep::Done => return Next::Nothing,
        };
        self.sweep = Sweep::Asked;
        Next::Keys(cursor)
    }

    /// `limit`: what rows of a batch may weigh.
    pub fn found(&mut self, next: u64, keys: &[Key], limit: usize) {
        self.sweep = if next == 0 { Sweep::Done } else { Sweep::At(next) };
        let mut weight = 0;
        // Those that have no row are removed in one batch.
        let parts = keys.chunk_by(|key, _| {
            weight += command::weight_of_key(key);
            let fits = weight <= limit / 2;
            weight = if fits { weight } else { 0 };
            fits
        });
        self.todo.extend(parts.map(|keys| Task::Orphans(keys.to_vec())));
    }
}
