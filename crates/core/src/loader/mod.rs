//! The only implementation of loads: decides which rows are read and when, which are read again, and when a table has
//! been read completely. Also covers single keys that are read again, orphans, and keys of templates that are no longer
//! configured.
//!
//! Pure: [`Heard`] goes in, [`Errand`]s come out. The loader never sees the values of a row, never writes, and does not
//! know what the stream has delivered: the session judges each chunk, and the loader reads a rejected one again. A
//! mistake here leaves rows that no chunk covers, or reports a table as loaded too early.

mod beginnings;
mod messages;
mod next_reads;
mod one_load;
mod patience;
pub mod range;
mod read_keys;
#[cfg(test)]
mod tests;
mod visits;

pub use messages::{
    Again, Asks, Brought, Cause, Errand, Got, Heard, Keyless, Loadable, LookedUp, Reading, Task, Unread, VisitId,
};
pub use patience::CONNECTION_PATIENCE;

use crate::command::Key;
use crate::plan::key::{self, Area};
use crate::resp::batch::{Limits, Members};
use crate::schema::{TableId, TableSpec};
use crate::session::load_messages::{ChunkId, FromLoad, KeysToRead, LoadId, LoadOrder, Verdict};
use beginnings::{Beginning, LookUp};
use next_reads::{Job, Judged, Readers};
use one_load::{Active, Next};
use patience::Patience;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Instant;
use visits::Arrived;

/// How much is read at once.
#[derive(Debug, Clone)]
pub struct Measures {
    /// About half a megabyte of the table, or a few thousand small rows.
    pub pages_a_chunk: u32,
    /// How many keys one query checks for rows. Each query is followed by its own watermark in the WAL.
    pub keys_a_question: usize,
    /// The maximum number of concurrent visits to Postgres, each on its own connection.
    pub readers: usize,
    /// The maximum number of chunks that are read but not yet judged: enough to keep both servers busy, while bounding
    /// memory.
    pub chunks_out: usize,
    /// How many small tables or partitions may be read together, as if they were one chunk of a large table.
    pub together: usize,
    /// How many keys of rows are remembered, by all loads together, until their orphans are found. Postgres is asked
    /// about the others.
    pub keys_remembered: usize,
    /// Whether the rows of a table that had none bring the commands for their memberships.
    pub members: Members,
}

impl Default for Measures {
    fn default() -> Self {
        Measures {
            pages_a_chunk: 64,
            keys_a_question: 4_000,
            readers: 2,
            chunks_out: 5,
            together: 32,
            // As many as fit into a hash table of 9 MB.
            keys_remembered: 7 << 17,
            members: Members::Encoded,
        }
    }
}

/// `T`: the description of a table that the code performing the reads needs. The loader passes it through unchanged.
pub struct Loader<T> {
    specs: Arc<[TableSpec]>,
    limits: Limits,
    measures: Measures,
    inbox: Inbox,
    asked: Option<Asked<T>>,
    loads: BTreeMap<TableId, Active<T>>,
    readers: Readers,
    patience: Patience,
    /// Tables of which this session has begun a load.
    begun: BTreeSet<TableId>,
    last_attempt: u64,
}

/// Work to be done as soon as no answer is outstanding.
struct Inbox {
    /// Templates of earlier configurations, whose keys are to be removed.
    retired: VecDeque<String>,
    /// Loads that may be able to continue.
    advancing: VecDeque<TableId>,
    arrived: VecDeque<Arrived>,
    orders: VecDeque<LoadOrder>,
}

/// The request whose answer is outstanding. The loader processes nothing else until the answer arrives, so what it
/// knows of the tables does not change in the meantime.
enum Asked<T> {
    LookUp(LookUp),
    Empty(Vec<(Beginning, Loadable<T>)>),
    Sweep(TableId),
    Retired(String),
}

fn area_of(template: &str) -> Area {
    Area::of(template).expect("it was parsed before")
}

fn say<T>(message: FromLoad) -> Errand<T> {
    Errand::Say(Box::new(message))
}

fn asks_for(keys: &KeysToRead) -> Asks {
    keys.checks.map_or(Asks::Load, |_| Asks::Comparison)
}

impl<T: Clone> Loader<T> {
    /// `retired`: templates of earlier configurations.
    pub fn new(specs: Arc<[TableSpec]>, limits: Limits, measures: Measures, retired: Vec<String>) -> Self {
        let retired = retired.into_iter().filter(|template| Area::of(template).is_some()).collect();
        let (advancing, arrived, orders) = (VecDeque::new(), VecDeque::new(), VecDeque::new());
        Loader {
            specs,
            limits,
            measures,
            inbox: Inbox { retired, advancing, arrived, orders },
            asked: None,
            loads: BTreeMap::new(),
            readers: Readers::default(),
            patience: Patience::default(),
            begun: BTreeSet::new(),
            last_attempt: 0,
        }
    }

    /// Returns whether there is nothing to do before the next order or verdict.
    pub fn is_idle(&self) -> bool {
        let Inbox { retired, advancing, arrived, orders } = &self.inbox;
        let nothing_waits = retired.is_empty() && advancing.is_empty() && arrived.is_empty() && orders.is_empty();
        nothing_waits && self.asked.is_none() && self.loads.is_empty() && self.readers.is_idle()
    }

    /// Returns when the loader must receive [`Heard::Woke`].
    pub fn wakes_at(&self) -> Option<Instant> {
        match &self.asked {
            None => self.readers.resumes_at(),
            Some(Asked::LookUp(look_up)) => look_up.again_at,
            Some(Asked::Empty(_) | Asked::Sweep(_) | Asked::Retired(_)) => None,
        }
    }

    /// Reads no chunk before then. Single keys, which the stream may be waiting for, are read as before. No reader is
    /// taken meanwhile, and Postgres holds nothing for it.
    pub fn rests_until(&mut self, at: Instant) {
        self.readers.rest_until(at);
    }

    /// Must be called once, before the first call of [`Self::hears`].
    pub fn start(&mut self, now: Instant) -> Vec<Errand<T>> {
        let mut out = Vec::new();
        self.go_on(now, &mut out);
        out
    }

    /// Returns what to do next, in this order.
    pub fn hears(&mut self, heard: Heard<T>, now: Instant) -> Vec<Errand<T>> {
        let mut out = Vec::new();
        match heard {
            Heard::Ordered(orders) => self.inbox.orders.extend(orders),
            Heard::LookedUp(tables) => self.looked_up(tables, now, &mut out),
            Heard::NotLookedUp(unread) => self.not_looked_up(&unread, now, &mut out),
            Heard::Empty(empty) => self.empty(&empty, &mut out),
            Heard::Scanned { next, keys } => self.scanned(next, keys, &mut out),
            Heard::Refused { why } => self.refused(&why, &mut out),
            Heard::Visited(visit, got) => self.visited(visit, got),
            Heard::NotVisited(visit, unread) => self.not_visited(visit, unread),
            Heard::Woke => self.woke(now, &mut out),
        }
        self.go_on(now, &mut out);
        out
    }

    fn woke(&mut self, now: Instant, out: &mut Vec<Errand<T>>) {
        self.readers.woke(now);
        if let Some(Asked::LookUp(look_up)) = &mut self.asked
            && look_up.again_at.take_if(|at| *at <= now).is_some()
        {
            out.push(look_up.errand());
        }
    }

    fn go_on(&mut self, now: Instant, out: &mut Vec<Errand<T>>) {
        while self.asked.is_none() {
            if let Some(template) = self.inbox.retired.pop_front() {
                self.sweep_retired(template, 0, out);
            } else if let Some(arrived) = self.inbox.arrived.pop_front() {
                self.took(arrived, now, out);
            } else if let Some(order) = self.inbox.orders.pop_front() {
                self.obey(order, now, out);
            } else if self.dispatch(now, out) {
                // There may be more.
            } else if let Some(table) = self.inbox.advancing.pop_front() {
                // Last, because it may ask for one page of keys after the other.
                self.advance(table, out);
            } else {
                return;
            }
        }
    }

    fn spec(&self, table: TableId) -> &TableSpec {
        &self.specs[table.index()]
    }

    /// Returns the load that the job belongs to, unless it has started over since.
    fn load_of(&mut self, job: &Job) -> Option<&mut Active<T>> {
        self.loads.get_mut(&job.table).filter(|active| Some(active.attempt) == job.attempt)
    }

    // ---- orders -----------------------------------------------------------------------------------------------------

    fn obey(&mut self, order: LoadOrder, now: Instant, out: &mut Vec<Errand<T>>) {
        match order {
            LoadOrder::Table { table, load, purpose, only, .. } => {
                let begins = self.with_those_behind(Beginning { table, load, purpose, only });
                self.begin(begins, now, out);
            }
            LoadOrder::Keys(keys) => self.readers.add_keys(keys),
            LoadOrder::Verdict(chunk, verdict) => self.judged(chunk, verdict, out),
            LoadOrder::Abandon(table, load) => self.abandon(table, load, out),
        }
    }

    /// The session counts the key reads that it has ordered, so it is told which of them will not take place.
    fn abandon(&mut self, table: TableId, load: LoadId, out: &mut Vec<Errand<T>>) {
        if self.loads.get(&table).is_some_and(|active| active.id == load) {
            self.loads.remove(&table);
        }
        self.patience.forget(table);
        for _ in 0..self.readers.forget_keys_of(load) {
            out.push(say(FromLoad::KeysNotRead));
        }
    }

    fn not_compared(&mut self, table: TableId, load: LoadId, why: String, out: &mut Vec<Errand<T>>) {
        self.abandon(table, load, out);
        out.push(say(FromLoad::NotCompared { table, load, why }));
    }

    fn judged(&mut self, chunk: ChunkId, verdict: Verdict, out: &mut Vec<Errand<T>>) {
        let Judged { job, keyless, keys, .. } = self.readers.judged(chunk);
        let table = job.table;
        if verdict == Verdict::Written {
            let letters =
                keyless.into_iter().map(|Keyless { code, letter }| FromLoad::DeadLetter { table, code, letter });
            out.extend(letters.map(say));
        }
        // Only a load that looks for orphans has any. With many tables, the sum over all loads costs something.
        let room = if keys.is_empty() { 0 } else { self.room_for_keys() };
        let Some(active) = self.load_of(&job) else { return };
        match verdict {
            Verdict::ReadAgain => active.again(job.task),
            Verdict::Written => {
                active.has_written(keys, room);
                active.settled();
            }
            Verdict::GivenUp => active.settled(),
        }
        self.inbox.advancing.push_back(table);
    }

    fn room_for_keys(&self) -> usize {
        let remembered: usize = self.loads.values().map(Active::keys_remembered).sum();
        self.measures.keys_remembered.saturating_sub(remembered)
    }

    // ---- rows, then orphans, then the end ---------------------------------------------------------------------------

    fn advance(&mut self, table: TableId, out: &mut Vec<Errand<T>>) {
        let Some(active) = self.loads.get_mut(&table) else { return };
        match active.next(self.measures.chunks_out) {
            Next::Nothing => {}
            Next::End => {
                let load = active.id;
                self.loads.remove(&table);
                out.push(say(FromLoad::Ended { table, load }));
            }
            Next::Keys(cursor) => {
                let asks = active.purpose.into();
                let (prefix, enough) = (self.spec(table).key.literal.clone(), self.measures.keys_a_question);
                out.push(Errand::Scan { prefix, cursor, enough, asks });
                self.asked = Some(Asked::Sweep(table));
            }
        }
    }

    fn scanned(&mut self, next: u64, keys: Vec<Key>, out: &mut Vec<Errand<T>>) {
        match self.asked.take() {
            Some(Asked::Sweep(table)) => {
                let active = self.loads.get_mut(&table).expect("it waits for its keys");
                active.found(next, &keys, self.measures.keys_a_question, self.limits.rows_bytes());
                self.inbox.advancing.push_back(table);
            }
            Some(Asked::Retired(template)) => self.found_retired(template, next, keys, out),
            Some(Asked::LookUp(_) | Asked::Empty(_)) | None => unreachable!("keys were asked for"),
        }
    }

    /// A failed comparison affects only whoever requested it, so the session continues.
    fn refused(&mut self, why: &str, out: &mut Vec<Errand<T>>) {
        match self.asked.take() {
            Some(Asked::Empty(begins)) => {
                for (Beginning { table, load, .. }, _) in begins {
                    self.not_compared(table, load, why.to_owned(), out);
                }
            }
            Some(Asked::Sweep(table)) => {
                let load = self.loads.get(&table).expect("it waits for its keys").id;
                self.not_compared(table, load, why.to_owned(), out);
            }
            Some(Asked::LookUp(_) | Asked::Retired(_)) | None => unreachable!("a comparison asked for keys"),
        }
    }

    /// Removes keys of templates that are no longer configured, unless a current template can produce them.
    fn sweep_retired(&mut self, template: String, cursor: u64, out: &mut Vec<Errand<T>>) {
        let prefix = area_of(&template).prefix().to_owned();
        out.push(Errand::Scan { prefix, cursor, enough: 1, asks: Asks::Load });
        self.asked = Some(Asked::Retired(template));
    }

    fn found_retired(&mut self, template: String, next: u64, mut keys: Vec<Key>, out: &mut Vec<Errand<T>>) {
        let area = area_of(&template);
        let is_of_table = |spec: &TableSpec, key: &Key| key::decode(&spec.key, key).is_some();
        let is_list = |spec: &TableSpec, key: &Key| spec.lookups.iter().any(|of| Area::of_lookup(&of.key).has(key));
        let is_current = |key: &Key| self.specs.iter().any(|spec| is_of_table(spec, key) || is_list(spec, key));
        keys.retain(|key| area.has(key) && !is_current(key));
        if !keys.is_empty() {
            out.push(say(FromLoad::Orphans { keys }));
        }
        match next {
            0 => out.push(say(FromLoad::Retired { template })),
            cursor => self.sweep_retired(template, cursor, out),
        }
    }
}
