//! Visits to Postgres: what each one reads, and what follows from its result.

use super::beginnings::LookUpOf;
use super::messages::{Again, Asks, Brought, Cause, Errand, Got, Reading, Task, Unread, VisitId};
use super::next_reads::{Job, Judged, next_jobs};
use super::one_load::Active;
use super::{Loader, asks_for, say};
use crate::resp::batch::{Encoding, Members};
use crate::session::load_messages::{Chunk, FromLoad, KeysToRead, LoadId, Purpose};
use std::time::Instant;

pub(super) struct Arrived {
    job: Job,
    /// How many chunks the same visit brought.
    together: usize,
    what: Found,
}

enum Found {
    Got(Got),
    Unread(Unread),
}

impl<T: Clone> Loader<T> {
    /// Starts a visit, or the lookup that must precede it. Returns `false` if no reader is free, or nothing needs to be
    /// read yet.
    pub(super) fn dispatch(&mut self, now: Instant, out: &mut Vec<Errand<T>>) -> bool {
        if !self.readers.has_room(&self.measures) {
            return false;
        }
        let load_waits = self.loads.values().any(Active::waits);
        if let Some(keys) = self.readers.next_keys(load_waits) {
            match self.loads.get(&keys.table).map(|active| active.table.described.clone()) {
                Some(described) => self.read_keys(keys, described, out),
                None => self.look_up(LookUpOf::Keys(keys), now, out),
            }
            return true;
        }
        if self.readers.rests() {
            return false;
        }
        let Some((asks, jobs)) = next_jobs(&mut self.loads, &self.measures) else { return false };
        self.set_out(asks, jobs, None, out);
        true
    }

    pub(super) fn read_keys(&mut self, keys: KeysToRead, described: T, out: &mut Vec<Errand<T>>) {
        let asks = asks_for(&keys);
        let job = Job { table: keys.table, attempt: None, task: Task::Keys(keys) };
        self.set_out(asks, vec![job], Some(described), out);
    }

    /// `described` is set for single keys, because their table may not be loading.
    fn set_out(&mut self, asks: Asks, jobs: Vec<Job>, described: Option<T>, out: &mut Vec<Errand<T>>) {
        let part = |Job { table, attempt, task }: &Job| {
            let of_load = || self.loads.get(table).expect("it is read for this load").table.described.clone();
            // Rows that are compared, and single rows, are needed as separate commands.
            let packs = attempt.is_some() && asks == Asks::Load;
            let limits = if packs { self.limits } else { self.limits.unpacked() };
            let members = match self.loads.get(table) {
                Some(load) if attempt.is_some() => load.members(&self.measures),
                _ => Members::Unknown,
            };
            let (table, task, described) = (*table, task.clone(), described.clone().unwrap_or_else(of_load));
            Reading { table, task, encoding: Encoding { limits, members }, described }
        };
        let parts = jobs.iter().map(part).collect();
        let visit = self.readers.sets_out(jobs);
        out.push(Errand::Visit { visit, asks, parts });
    }

    pub(super) fn visited(&mut self, visit: VisitId, got: Vec<Got>) {
        let together = got.iter().filter(|got| matches!(got, Got::Brought(_))).count();
        let jobs = self.readers.returned(visit);
        assert_eq!(jobs.len(), got.len(), "an answer for each part");
        let arrived = jobs.into_iter().zip(got).map(|(job, got)| Arrived { job, together, what: Found::Got(got) });
        self.inbox.arrived.extend(arrived);
    }

    /// If several parts failed together, any one of them may be the cause, so each is read alone.
    pub(super) fn not_visited(&mut self, visit: VisitId, unread: Unread) {
        let jobs = self.readers.returned(visit);
        let told = jobs.len() == 1 || unread.cause == Cause::Connection;
        let mut told = told.then_some(unread);
        let arrived = jobs.into_iter().map(|job| {
            let what = told.take().map_or(Found::Got(Got::Crowded), Found::Unread);
            Arrived { job, together: 0, what }
        });
        self.inbox.arrived.extend(arrived);
    }

    pub(super) fn took(&mut self, Arrived { job, together, what }: Arrived, now: Instant, out: &mut Vec<Errand<T>>) {
        let table = job.table;
        if job.attempt.is_some() && self.load_of(&job).is_none() {
            return;
        }
        match what {
            Found::Unread(unread) => self.unread(job, unread, now, out),
            Found::Got(Got::Brought(brought)) => self.brought(job, *brought, together, now, out),
            Found::Got(Got::Gone) => self.begin_again(table, Again::Changed, now, out),
            Found::Got(Got::Crowded) => {
                if let Some(active) = self.load_of(&job) {
                    active.reads_alone();
                }
                self.again(job);
            }
        }
    }

    /// Queues a job again that was not done.
    fn again(&mut self, job: Job) {
        match job {
            Job { task: Task::Keys(keys), .. } => self.readers.add_keys(keys),
            job => {
                if let Some(active) = self.load_of(&job) {
                    active.again(job.task);
                }
            }
        }
    }

    /// Returns the comparison that the job belongs to, if any.
    fn comparison(&self, job: &Job) -> Option<LoadId> {
        match &job.task {
            Task::Keys(keys) => keys.checks,
            Task::Range(_) | Task::Orphans(_) => {
                self.loads.get(&job.table).filter(|active| active.purpose != Purpose::Fill).map(|active| active.id)
            }
        }
    }

    fn unread(&mut self, job: Job, unread: Unread, now: Instant, out: &mut Vec<Errand<T>>) {
        let (table, is_of_keys) = (job.table, matches!(job.task, Task::Keys(_)));
        let comparison = self.comparison(&job);
        let given_up = comparison.filter(|_| self.patience.gives_up_on(table, unread.cause, now));
        match (given_up, unread.cause) {
            (Some(load), _) => self.not_compared(table, load, unread.text, out),
            (None, Cause::Table) => {
                self.loads.remove(&table);
                out.push(say(FromLoad::Blocked { table, why: unread.why }));
            }
            // The table itself is fine; another session has it locked for a while.
            (None, Cause::Lock) => {
                if let Some(active) = self.load_of(&job) {
                    active.was_locked = true;
                }
                return self.again(job);
            }
            // The connection was lost, or the server could not answer this time. The stream continues; if the server is
            // down altogether, the stream will notice.
            (None, Cause::Query | Cause::Connection) => {
                self.readers.pause(now);
                return self.again(job);
            }
        }
        if is_of_keys {
            out.push(say(FromLoad::KeysNotRead));
        }
    }

    /// Hands a chunk over to the session. Its watermark is already in the WAL.
    fn brought(&mut self, mut job: Job, mut brought: Brought, together: usize, now: Instant, out: &mut Vec<Errand<T>>) {
        let table = job.table;
        self.patience.forget(table);
        self.readers.worked();
        let compares = job.attempt.is_some() && self.comparison(&job).is_some();
        let load = self.load_of(&job).map(|active| active.id);
        if let (Task::Range(range), Some(active)) = (&mut job.task, self.loads.get_mut(&table)) {
            active.was_locked = false;
            if !active.lies_as_before(range, &brought) {
                return self.begin_again(table, Again::Rewritten, now, out);
            }
            if let Some(rest) = brought.rest.take() {
                active.leaves(range, rest);
            }
        }
        // Otherwise every comparison would report the same rows again.
        let keyless = if compares { Vec::new() } else { brought.keyless };
        let keys = self.load_of(&job).map_or_else(Vec::new, |active| active.keys_of(&brought.content));
        let id = self.readers.hands_over(Judged { job, keyless, keys, together });
        let Brought { snapshot, nonce, content, unwritable, floor, .. } = brought;
        out.push(say(FromLoad::Chunk(Chunk { id, table, load, nonce, snapshot, content, unwritable, floor })));
    }
}
