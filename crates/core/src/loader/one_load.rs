//! The progress of one load or comparison: it reads all rows, then searches for orphans, then ends.

use super::beginnings::Beginning;
use super::messages::{Brought, Loadable, Task};
use super::range::{Range, ranges};
use super::read_keys::ReadKeys;
use super::{Measures, next_reads::Job};
use crate::command::{self, Key};
use crate::resp::batch::Members;
use crate::rules::{Rule, holds};
use crate::schema::{Oid, TableId};
use crate::session::load_messages::{Content, LoadId, Only, Purpose};
use std::collections::{BTreeMap, VecDeque};

pub(super) struct Active<T> {
    pub id: LoadId,
    pub purpose: Purpose,
    /// Increases each time the load starts over. Rows that an earlier attempt read no longer count.
    pub attempt: u64,
    pub table: Loadable<T>,
    pub only: Only,
    /// The filenode of each leaf when its first rows were read.
    filenodes: BTreeMap<usize, Oid>,
    /// Reading it together with other tables failed.
    reads_alone: bool,
    /// Somebody else had the table locked when it was last read.
    pub was_locked: bool,
    todo: VecDeque<Task>,
    /// The number of tasks whose rows are being read, or have been read and not written yet.
    out: usize,
    /// See [`FromLoad::Began`](crate::session::load_messages::FromLoad).
    is_empty: bool,
    read: ReadKeys,
    /// Keys that may be orphans, until there are enough to ask about.
    candidates: Vec<Key>,
    sweep: Sweep,
}

/// The scan of the keys in Redis for those that have no row.
enum Sweep {
    NotYet,
    At(u64),
    /// The next keys have been requested.
    Asked,
    Done,
}

/// What a load needs in order to continue.
pub(super) enum Next {
    /// Nothing for now: its chunks must be read and written first.
    Nothing,
    /// Keys from Redis, starting at this cursor.
    Keys(u64),
    End,
}

/// What can be read next.
#[derive(Clone, Copy)]
pub(super) enum Offer {
    Alone,
    /// A range of this many pages, which may be read together with other small ones.
    Pages(u32),
}

impl<T> Active<T> {
    /// `is_empty`: Redis has no keys of this table.
    pub fn new(begin: Beginning, attempt: u64, table: Loadable<T>, measures: &Measures, is_empty: bool) -> Self {
        let Beginning { load: id, purpose, only, .. } = begin;
        let is_read = |range: &Range| only.has_leaf(table.composition.leaves[range.leaf].oid);
        let ranges = ranges(&table.extent, measures.pages_a_chunk).into_iter().filter(is_read);
        let todo = ranges.map(Task::Range).collect();
        let sweep = if is_empty || matches!(only, Only::Leaves(..)) || !holds(Rule::RemoveOrphans) {
            Sweep::Done
        } else {
            Sweep::NotYet
        };
        Active {
            id,
            purpose,
            attempt,
            table,
            only,
            filenodes: BTreeMap::new(),
            reads_alone: false,
            was_locked: false,
            todo,
            out: 0,
            is_empty,
            read: ReadKeys::default(),
            candidates: Vec::new(),
            sweep,
        }
    }

    pub fn members(&self, measures: &Measures) -> Members {
        match self.is_empty {
            true => measures.members,
            false => Members::Unknown,
        }
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

    /// Puts back a task that was not read, or whose rows were not written.
    pub fn again(&mut self, task: Task) {
        self.out -= 1;
        self.todo.push_back(task);
    }

    pub fn reads_alone(&mut self) {
        self.reads_alone = true;
    }

    /// A chunk was written or given up.
    pub fn settled(&mut self) {
        self.out -= 1;
    }

    /// Returns whether the leaf still has the filenode that it had when its first rows were read.
    pub fn lies_as_before(&mut self, range: &Range, brought: &Brought) -> bool {
        let Some(now) = brought.filenode else { return true };
        let first = *self.filenodes.entry(range.leaf).or_insert(now);
        first == now || !holds(Rule::LoadAgainRewritten)
    }

    pub fn keys_remembered(&self) -> usize {
        self.read.len()
    }

    /// Returns the keys of these rows, for [`Self::has_written`].
    pub fn keys_of(&self, content: &Content) -> Vec<u64> {
        match (content, &self.sweep) {
            (Content::Rows(parts), Sweep::NotYet) => {
                let keys = parts.iter().flat_map(|rows| &rows.rows).map(|(key, _)| key);
                self.read.hashes(keys.filter(|key| self.only.has_key(key)))
            }
            _ => Vec::new(),
        }
    }

    /// Rows of a range were written, or are right. At most `room` are remembered.
    pub fn has_written(&mut self, keys: Vec<u64>, room: usize) {
        self.read.add(keys, room);
    }

    /// The chunk does not reach the end of its range. The rest becomes a task of its own.
    pub fn leaves(&mut self, range: &mut Range, rest: Range) {
        range.without(&rest);
        self.todo.push_back(Task::Range(rest));
    }

    /// `most_out`: how many chunks may be read ahead.
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

    /// `enough`: how many keys one question is about. `limit`: the maximum weight of the rows in a batch.
    pub fn found(&mut self, next: u64, keys: &[Key], enough: usize, limit: usize) {
        self.sweep = if next == 0 { Sweep::Done } else { Sweep::At(next) };
        let may_be_orphan = |key: &&Key| self.only.has_key(key) && !self.read.has(key);
        self.candidates.extend(keys.iter().filter(may_be_orphan).cloned());
        if next != 0 && self.candidates.len() < enough {
            return;
        }
        let (mut weight, mut number) = (0, 0);
        // The orphans among the keys of one task are removed in a single batch.
        let parts = self.candidates.chunk_by(|key, _| {
            weight += command::weight_of_key(key);
            number += 1;
            let fits = weight <= limit / 2 && number < enough;
            (weight, number) = if fits { (weight, number) } else { (0, 0) };
            fits
        });
        self.todo.extend(parts.map(|keys| Task::Orphans(keys.to_vec())));
        self.candidates.clear();
    }
}
