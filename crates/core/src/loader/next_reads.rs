//! Tracks the visits to Postgres and the chunks that are not judged yet. Both are limited in number.

use super::Measures;
use super::messages::{Asks, Keyless, Task, VisitId};
use super::one_load::{Active, Offer};
use crate::backoff::Backoff;
use crate::schema::TableId;
use crate::session::load_messages::{ChunkId, KeysToRead, LoadId};
use std::collections::{BTreeMap, VecDeque};
use std::time::Instant;

/// One part of a visit.
#[derive(Debug)]
pub(super) struct Job {
    pub table: TableId,
    /// The attempt of the load that it belongs to; `None` for single keys.
    pub attempt: Option<u64>,
    pub task: Task,
}

/// A chunk that was handed to the session.
pub(super) struct Judged {
    pub job: Job,
    /// Reported once the chunk is written, since it may have to be read again first.
    pub keyless: Vec<Keyless>,
    /// Remembered once the chunk is written. See [`Active::keys_of`].
    pub keys: Vec<u64>,
    /// How many chunks came from the same visit.
    pub together: usize,
}

#[derive(Default)]
pub(super) struct Readers {
    keys: VecDeque<KeysToRead>,
    visits: BTreeMap<VisitId, Vec<Job>>,
    judged: BTreeMap<ChunkId, Judged>,
    /// After a visit that failed for a temporary reason, when the next one may begin.
    resume_at: Option<Instant>,
    /// No chunk is read before then. Single keys are.
    rests_until: Option<Instant>,
    backoff: Backoff,
    last_visit: u64,
    last_chunk: u64,
}

impl Readers {
    pub fn is_idle(&self) -> bool {
        self.keys.is_empty() && self.visits.is_empty()
    }

    /// Returns whether another visit may start.
    pub fn has_room(&self, measures: &Measures) -> bool {
        self.resume_at.is_none()
            && self.visits.len() < measures.readers
            && self.weight(measures) <= measures.together * (measures.chunks_out - 1)
    }

    /// A chunk that was read together with others counts for its share of one chunk.
    fn weight(&self, measures: &Measures) -> usize {
        let judged = self.judged.values().map(|judged| measures.together.div_ceil(judged.together)).sum::<usize>();
        judged + measures.together * self.visits.len()
    }

    // ---- keys -------------------------------------------------------------------------------------------------------

    pub fn add_keys(&mut self, keys: KeysToRead) {
        self.keys.push_back(keys);
    }

    /// While a load is waiting, only one reader reads keys, so that keys which change all the time do not delay the
    /// load.
    pub fn next_keys(&mut self, load_waits: bool) -> Option<KeysToRead> {
        let reads_keys = self.visits.values().flatten().any(|job| matches!(job.task, Task::Keys(_)));
        if load_waits && reads_keys { None } else { self.keys.pop_front() }
    }

    /// Drops the key reads of a comparison and returns how many there were.
    pub fn forget_keys_of(&mut self, comparison: LoadId) -> usize {
        let before = self.keys.len();
        self.keys.retain(|keys| keys.checks != Some(comparison));
        before - self.keys.len()
    }

    // ---- visits -----------------------------------------------------------------------------------------------------

    pub fn sets_out(&mut self, jobs: Vec<Job>) -> VisitId {
        self.last_visit += 1;
        let visit = VisitId(self.last_visit);
        self.visits.insert(visit, jobs);
        visit
    }

    pub fn returned(&mut self, visit: VisitId) -> Vec<Job> {
        self.visits.remove(&visit).expect("a visit ends once")
    }

    pub fn pause(&mut self, now: Instant) {
        self.resume_at = Some(now + self.backoff.next_delay());
    }

    pub fn worked(&mut self) {
        self.backoff.reset();
    }

    pub fn rest_until(&mut self, at: Instant) {
        self.rests_until = Some(at);
    }

    pub fn rests(&self) -> bool {
        self.rests_until.is_some()
    }

    /// Returns when the next visit may begin, if not now.
    pub fn resumes_at(&self) -> Option<Instant> {
        self.resume_at.into_iter().chain(self.rests_until).min()
    }

    pub fn woke(&mut self, now: Instant) {
        self.resume_at = self.resume_at.filter(|at| *at > now);
        self.rests_until = self.rests_until.filter(|at| *at > now);
    }

    // ---- chunks -----------------------------------------------------------------------------------------------------

    pub fn hands_over(&mut self, judged: Judged) -> ChunkId {
        self.last_chunk += 1;
        let id = ChunkId(self.last_chunk);
        self.judged.insert(id, judged);
        id
    }

    pub fn judged(&mut self, chunk: ChunkId) -> Judged {
        self.judged.remove(&chunk).expect("a chunk is judged once")
    }
}

/// Returns the next chunk to read, or several small ones of different tables or partitions that together are no larger
/// than one chunk of a large table.
/// A table that was locked waits until no other one can be read, so that it does not keep all readers waiting for its lock.
pub(super) fn next_jobs<T>(loads: &mut BTreeMap<TableId, Active<T>>, measures: &Measures) -> Option<(Asks, Vec<Job>)> {
    let (mut jobs, mut asks, mut pages) = (Vec::new(), None, 0);
    let mut by_lock: Vec<_> = loads.iter_mut().collect();
    by_lock.sort_by_key(|(_, active)| active.was_locked);
    for (table, active) in by_lock {
        if active.was_locked && !jobs.is_empty() {
            break;
        }
        if asks.is_some_and(|asks| asks != Asks::from(active.purpose)) {
            continue;
        }
        while jobs.len() < measures.together {
            match active.offer() {
                None => break,
                Some(Offer::Pages(more)) if pages + more <= measures.pages_a_chunk => pages += more,
                Some(_) if !jobs.is_empty() => break,
                Some(_) => return Some((active.purpose.into(), vec![active.take(*table)])),
            }
            jobs.push(active.take(*table));
            asks = Some(active.purpose.into());
        }
    }
    asks.map(|asks| (asks, jobs))
}
