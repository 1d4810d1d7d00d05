//! The one way to load: which rows are read when, under which circumstances again, and when a table has been read as a
//! whole. Also single keys that are read again, orphans, and keys of templates that nobody configures any more.
//!
//! Pure: [`Heard`] goes in, [`Errand`]s come out. It never sees a row's values, never writes, and knows nothing of what the
//! stream has brought: the session judges each chunk, and one that it refuses is read again. Wrong here means: rows that
//! no chunk covers, or a table called loaded before all of it is.

mod active;
mod messages;
mod patience;
pub mod range;
mod readers;
#[cfg(test)]
mod tests;

pub use messages::{
    Again, Asks, Brought, Cause, Errand, Got, Heard, Keyless, Loadable, LookedUp, Reading, Task, Unread, VisitId,
};
pub use patience::CONNECTION_PATIENCE;

use crate::backoff::Backoff;
use crate::checkpoint::Blocked;
use crate::command::Key;
use crate::plan::key;
use crate::resp::batch::Limits;
use crate::schema::{TableId, TableSpec};
use crate::session::chunk::{Chunk, ChunkId, FromLoad, KeysToRead, LoadId, LoadOrder, Purpose, Verdict};
use active::{Active, Next};
use patience::Patience;
use range::Sizes;
use readers::{Job, Judged, Readers, next_jobs};
use std::collections::{BTreeMap, BTreeSet, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Instant;

/// How much is read at once.
#[derive(Debug, Clone)]
pub struct Measures {
    /// About half a megabyte of table, a few thousand small rows.
    pub pages_a_chunk: u32,
    /// About which Postgres is asked at once whether they have a row: each question has a mark of its own in the WAL.
    pub keys_a_question: usize,
    /// Visits to Postgres under way, each over a connection of its own.
    pub readers: usize,
    /// Chunks read and not yet judged: keeps both servers busy, and bounds memory.
    pub chunks_out: usize,
    /// Small tables, or partitions, that are read together, as one chunk of a large table is.
    pub together: usize,
}

impl Default for Measures {
    fn default() -> Self {
        Measures { pages_a_chunk: 64, keys_a_question: 4_000, readers: 2, chunks_out: 5, together: 32 }
    }
}

/// `T`: what whoever reads needs to know of a table. It is handed back as it came.
pub struct Loader<T> {
    specs: Arc<[TableSpec]>,
    limits: Limits,
    measures: Measures,
    inbox: Inbox,
    asked: Option<Asked<T>>,
    loads: BTreeMap<TableId, Active<T>>,
    readers: Readers,
    patience: Patience,
    /// Tables of which a load began in this session.
    begun: BTreeSet<TableId>,
    last_attempt: u64,
}

/// What is to be worked on as soon as no answer is waited for.
struct Inbox {
    /// Templates of earlier configurations, whose keys go.
    retired: VecDeque<String>,
    /// Loads that may be able to go on.
    advancing: VecDeque<TableId>,
    arrived: VecDeque<Arrived>,
    orders: VecDeque<LoadOrder>,
}

struct Arrived {
    job: Job,
    /// How many chunks the same visit brought.
    together: usize,
    what: Found,
}

enum Found {
    Got(Got),
    Unread(Unread),
}

/// A load that is to begin.
#[derive(Debug, Clone, Copy)]
struct Beginning {
    table: TableId,
    load: LoadId,
    purpose: Purpose,
}

/// What is asked of somebody else. Nothing else is worked on before the answer is here: what is known of the tables stays
/// as it is meanwhile.
enum Asked<T> {
    LookUp(LookUp),
    Empty(Vec<(Beginning, Loadable<T>)>),
    Sweep(TableId),
    Retired(String),
}

struct LookUp {
    of: LookUpOf,
    since: Instant,
    backoff: Backoff,
    /// It has failed: when the next attempt may begin.
    again_at: Option<Instant>,
}

enum LookUpOf {
    /// Loads of different tables, of one kind.
    Beginnings(Vec<Beginning>, Asks),
    /// Nothing is known of their table.
    Keys(KeysToRead),
}

impl LookUp {
    fn errand<T>(&self) -> Errand<T> {
        let (tables, sizes, asks) = match &self.of {
            LookUpOf::Beginnings(begins, asks) => (begins.iter().map(|b| b.table).collect(), Sizes::Measured, *asks),
            LookUpOf::Keys(keys) => (vec![keys.table], Sizes::Remembered, asks_for(keys)),
        };
        Errand::LookUp { tables, sizes, asks }
    }

    fn asks(&self) -> Asks {
        match &self.of {
            LookUpOf::Beginnings(_, asks) => *asks,
            LookUpOf::Keys(keys) => asks_for(keys),
        }
    }
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
        let retired = retired.into_iter().filter(|template| key::parse_template(template).is_ok()).collect();
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

    /// Nothing is to be done before the next order, or verdict.
    pub fn is_idle(&self) -> bool {
        let Inbox { retired, advancing, arrived, orders } = &self.inbox;
        let nothing_waits = retired.is_empty() && advancing.is_empty() && arrived.is_empty() && orders.is_empty();
        nothing_waits && self.asked.is_none() && self.loads.is_empty() && self.readers.is_idle()
    }

    /// When it is to hear [`Heard::Woke`].
    pub fn wakes_at(&self) -> Option<Instant> {
        match &self.asked {
            None => self.readers.resumes_at(),
            Some(Asked::LookUp(look_up)) => look_up.again_at,
            Some(Asked::Empty(_) | Asked::Sweep(_) | Asked::Retired(_)) => None,
        }
    }

    /// To be called once before anything is heard.
    pub fn start(&mut self, now: Instant) -> Vec<Errand<T>> {
        let mut out = Vec::new();
        self.go_on(now, &mut out);
        out
    }

    /// What is to be done next, in this order.
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
            } else if let Some(table) = self.inbox.advancing.pop_front() {
                self.advance(table, out);
            } else if let Some(arrived) = self.inbox.arrived.pop_front() {
                self.took(arrived, now, out);
            } else if let Some(order) = self.inbox.orders.pop_front() {
                self.obey(order, now, out);
            } else if !self.dispatch(now, out) {
                return;
            }
        }
    }

    fn spec(&self, table: TableId) -> &TableSpec {
        &self.specs[table.index()]
    }

    /// The load whose attempt this is, unless it has begun again since.
    fn load_of(&mut self, job: &Job) -> Option<&mut Active<T>> {
        self.loads.get_mut(&job.table).filter(|active| Some(active.attempt) == job.attempt)
    }

    // ---- orders -------------------------------------------------------------------------------------------------------

    fn obey(&mut self, order: LoadOrder, now: Instant, out: &mut Vec<Errand<T>>) {
        match order {
            LoadOrder::Table { table, load, purpose, .. } => {
                let begins = self.with_those_behind(Beginning { table, load, purpose });
                self.begin(begins, now, out);
            }
            LoadOrder::Keys(keys) => self.readers.add_keys(keys),
            LoadOrder::Verdict(chunk, verdict) => self.judged(chunk, verdict, out),
            LoadOrder::Abandon(table, load) => self.abandon(table, load, out),
        }
    }

    /// Loads of several tables that follow upon each other begin together.
    fn with_those_behind(&mut self, first: Beginning) -> Vec<Beginning> {
        let mut begins = vec![first];
        while let Some(LoadOrder::Table { table, load, purpose, .. }) = self.inbox.orders.front() {
            let next = Beginning { table: *table, load: *load, purpose: *purpose };
            let of_a_kind = Asks::from(next.purpose) == Asks::from(first.purpose);
            if !of_a_kind || begins.iter().any(|begin| begin.table == next.table) {
                break;
            }
            begins.push(next);
            self.inbox.orders.pop_front();
        }
        begins
    }

    /// The session counts the reads of keys that it has ordered: it is told of those that nobody will make.
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
        let Judged { job, keyless, .. } = self.readers.judged(chunk);
        let table = job.table;
        if verdict == Verdict::Written {
            let letters =
                keyless.into_iter().map(|Keyless { code, letter }| FromLoad::DeadLetter { table, code, letter });
            out.extend(letters.map(say));
        }
        let Some(active) = self.load_of(&job) else { return };
        match verdict {
            Verdict::ReadAgain => active.again(job.task),
            Verdict::Written | Verdict::GivenUp => active.settled(),
        }
        self.inbox.advancing.push_back(table);
    }

    // ---- a load begins ------------------------------------------------------------------------------------------------

    fn begin(&mut self, begins: Vec<Beginning>, now: Instant, out: &mut Vec<Errand<T>>) {
        let Some(first) = begins.first() else { return };
        let asks = first.purpose.into();
        for Beginning { table, .. } in &begins {
            self.loads.remove(table);
            self.patience.forget(*table);
        }
        self.look_up(LookUpOf::Beginnings(begins, asks), now, out);
    }

    fn begin_again(&mut self, table: TableId, because: Again, now: Instant, out: &mut Vec<Errand<T>>) {
        let Some(Active { id: load, purpose, .. }) = self.loads.get(&table) else { return };
        let begin = Beginning { table, load: *load, purpose: *purpose };
        out.push(Errand::BeginsAgain { table, because });
        self.begin(vec![begin], now, out);
    }

    fn look_up(&mut self, of: LookUpOf, now: Instant, out: &mut Vec<Errand<T>>) {
        let look_up = LookUp { of, since: now, backoff: Backoff::default(), again_at: None };
        out.push(look_up.errand());
        self.asked = Some(Asked::LookUp(look_up));
    }

    /// Tables as they are now, or why they cannot be followed. For a load they are looked up again where somebody has one
    /// locked.
    fn looked_up(&mut self, tables: Vec<LookedUp<T>>, now: Instant, out: &mut Vec<Errand<T>>) {
        let Some(Asked::LookUp(look_up)) = self.asked.take() else { unreachable!("tables were looked up") };
        let is_locked = tables.iter().any(|table| matches!(table, LookedUp::Locked(_)));
        if is_locked && look_up.asks() == Asks::Load {
            return self.look_up_later(look_up, now);
        }
        self.knows(look_up.of, tables, out);
    }

    /// Where the connection was lost, they are asked for on another; where the server could not answer this time, again, if
    /// it is for a load.
    fn not_looked_up(&mut self, unread: &Unread, now: Instant, out: &mut Vec<Errand<T>>) {
        let Some(Asked::LookUp(look_up)) = self.asked.take() else { unreachable!("tables were looked up") };
        let is_over = unread.cause != Cause::Connection || Patience::is_over(unread.cause, look_up.since, now);
        if look_up.asks() == Asks::Comparison && is_over {
            let tables = match &look_up.of {
                LookUpOf::Beginnings(begins, _) => begins.len(),
                LookUpOf::Keys(_) => 1,
            };
            let blocked = (0..tables).map(|_| LookedUp::Blocked(unread.why.clone())).collect();
            return self.knows(look_up.of, blocked, out);
        }
        self.look_up_later(look_up, now);
    }

    fn look_up_later(&mut self, mut look_up: LookUp, now: Instant) {
        look_up.again_at = Some(now + look_up.backoff.next_delay());
        self.asked = Some(Asked::LookUp(look_up));
    }

    fn knows(&mut self, of: LookUpOf, tables: Vec<LookedUp<T>>, out: &mut Vec<Errand<T>>) {
        match of {
            LookUpOf::Beginnings(begins, asks) => self.begin_known(begins, asks, tables, out),
            LookUpOf::Keys(keys) => match tables.into_iter().next().expect("an answer for each table") {
                LookedUp::Loadable(table) => self.read_keys(keys, table.described, out),
                LookedUp::Blocked(why) | LookedUp::Locked(why) => {
                    self.cannot_read(keys.table, keys.checks, why, out);
                    out.push(say(FromLoad::KeysNotRead));
                }
            },
        }
    }

    fn begin_known(&mut self, begins: Vec<Beginning>, asks: Asks, tables: Vec<LookedUp<T>>, out: &mut Vec<Errand<T>>) {
        let mut known = Vec::with_capacity(begins.len());
        for (begin, looked_up) in begins.into_iter().zip(tables) {
            let Beginning { table, load, purpose } = begin;
            match looked_up {
                LookedUp::Loadable(loadable) => known.push((begin, loadable)),
                LookedUp::Blocked(why) | LookedUp::Locked(why) => {
                    let comparison = (purpose != Purpose::Fill).then_some(load);
                    self.cannot_read(table, comparison, why, out);
                }
            }
        }
        let first: Vec<TableId> =
            known.iter().map(|(begin, _)| begin.table).filter(|table| self.begun.insert(*table)).collect();
        if !first.is_empty() {
            out.push(Errand::FindEmpty { tables: first, asks });
            self.asked = Some(Asked::Empty(known));
            return;
        }
        self.begin_all(known, &HashSet::new(), out);
    }

    /// As things are.
    fn cannot_read(&mut self, table: TableId, comparison: Option<LoadId>, why: Blocked, out: &mut Vec<Errand<T>>) {
        match comparison {
            Some(load) => self.not_compared(table, load, why.to_string(), out),
            None => out.push(say(FromLoad::Blocked { table, why })),
        }
    }

    fn empty(&mut self, empty: &HashSet<TableId>, out: &mut Vec<Errand<T>>) {
        let Some(Asked::Empty(begins)) = self.asked.take() else { unreachable!("somebody looks for keys") };
        self.begin_all(begins, empty, out);
    }

    /// `empty`: where nothing of a table lay in Redis before the session's first load of it began, all that lies there later
    /// was written by this session, and is what the stream says: none of it is an orphan. What an earlier load wrote may be
    /// one: rows can leave a table without a word in the stream.
    fn begin_all(&mut self, begins: Vec<(Beginning, Loadable<T>)>, empty: &HashSet<TableId>, out: &mut Vec<Errand<T>>) {
        for (Beginning { table, load, purpose }, loadable) in begins {
            out.push(say(FromLoad::Began {
                table,
                load,
                fingerprint: loadable.fingerprint,
                catalog: loadable.catalog,
                estimated_rows: loadable.estimated_rows,
                booleans: loadable.booleans.clone(),
            }));
            self.last_attempt += 1;
            let is_empty = empty.contains(&table);
            let active = Active::new(load, purpose, self.last_attempt, loadable, &self.measures, is_empty);
            self.loads.insert(table, active);
            self.inbox.advancing.push_back(table);
        }
    }

    // ---- rows, then orphans, then the end -----------------------------------------------------------------------------

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
                active.found(next, &keys, self.limits.rows_bytes());
                self.inbox.advancing.push_back(table);
            }
            Some(Asked::Retired(template)) => self.found_retired(template, next, keys, out),
            Some(Asked::LookUp(_) | Asked::Empty(_)) | None => unreachable!("keys were asked for"),
        }
    }

    /// Nobody needs a comparison but whoever asked: no reason to give up the session.
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

    /// Keys of templates that are no longer configured go, unless a present template could have made them.
    fn sweep_retired(&mut self, template: String, cursor: u64, out: &mut Vec<Errand<T>>) {
        let prefix = key::parse_template(&template).expect("it was parsed before").literal;
        out.push(Errand::Scan { prefix, cursor, enough: 1, asks: Asks::Load });
        self.asked = Some(Asked::Retired(template));
    }

    fn found_retired(&mut self, template: String, next: u64, mut keys: Vec<Key>, out: &mut Vec<Errand<T>>) {
        keys.retain(|key| !self.specs.iter().any(|spec| key::decode(&spec.key, key).is_some()));
        if !keys.is_empty() {
            out.push(say(FromLoad::Orphans { keys }));
        }
        match next {
            0 => out.push(say(FromLoad::Retired { template })),
            cursor => self.sweep_retired(template, cursor, out),
        }
    }

    // ---- visits -------------------------------------------------------------------------------------------------------

    /// Gives an idle reader something to do. False where there is none, or nothing.
    fn dispatch(&mut self, now: Instant, out: &mut Vec<Errand<T>>) -> bool {
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
        let Some((asks, jobs)) = next_jobs(&mut self.loads, &self.measures) else { return false };
        self.set_out(asks, jobs, None, out);
        true
    }

    fn read_keys(&mut self, keys: KeysToRead, described: T, out: &mut Vec<Errand<T>>) {
        let asks = asks_for(&keys);
        let job = Job { table: keys.table, attempt: None, task: Task::Keys(keys) };
        self.set_out(asks, vec![job], Some(described), out);
    }

    /// `described`: of keys, whose table may not be loading.
    fn set_out(&mut self, asks: Asks, jobs: Vec<Job>, described: Option<T>, out: &mut Vec<Errand<T>>) {
        let part = |Job { table, attempt, task }: &Job| {
            let of_load = || self.loads.get(table).expect("it is read for this load").table.described.clone();
            // A row that is to be compared is read again from its commands, and so is a single one.
            let packs = attempt.is_some() && asks == Asks::Load;
            let limits = if packs { self.limits } else { self.limits.unpacked() };
            Reading { table: *table, task: task.clone(), limits, described: described.clone().unwrap_or_else(of_load) }
        };
        let parts = jobs.iter().map(part).collect();
        let visit = self.readers.sets_out(jobs);
        out.push(Errand::Visit { visit, asks, parts });
    }

    fn visited(&mut self, visit: VisitId, got: Vec<Got>) {
        let together = got.iter().filter(|got| matches!(got, Got::Brought(_))).count();
        let jobs = self.readers.returned(visit);
        assert_eq!(jobs.len(), got.len(), "an answer for each part");
        let arrived = jobs.into_iter().zip(got).map(|(job, got)| Arrived { job, together, what: Found::Got(got) });
        self.inbox.arrived.extend(arrived);
    }

    /// What failed may have done so because of one of several: they are read alone then.
    fn not_visited(&mut self, visit: VisitId, unread: Unread) {
        let jobs = self.readers.returned(visit);
        let told = jobs.len() == 1 || unread.cause == Cause::Connection;
        let mut told = told.then_some(unread);
        let arrived = jobs.into_iter().map(|job| {
            let what = told.take().map_or(Found::Got(Got::Crowded), Found::Unread);
            Arrived { job, together: 0, what }
        });
        self.inbox.arrived.extend(arrived);
    }

    fn took(&mut self, Arrived { job, together, what }: Arrived, now: Instant, out: &mut Vec<Errand<T>>) {
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

    /// What was not read is read by whoever is free next.
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

    /// The comparison that is read for.
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
            // Nothing is wrong with the table: somebody else has it for a while.
            (None, Cause::Lock) => return self.again(job),
            // The connection was lost, or the server could not do it this time. The stream goes on; should the server be
            // away altogether, it is the stream that notices.
            (None, Cause::Query | Cause::Connection) => {
                self.readers.pause(now);
                return self.again(job);
            }
        }
        if is_of_keys {
            out.push(say(FromLoad::KeysNotRead));
        }
    }

    /// A chunk is here: it is handed over, its mark is in the WAL.
    fn brought(&mut self, mut job: Job, mut brought: Brought, together: usize, now: Instant, out: &mut Vec<Errand<T>>) {
        let table = job.table;
        self.patience.forget(table);
        self.readers.worked();
        let compares = job.attempt.is_some() && self.comparison(&job).is_some();
        let load = self.load_of(&job).map(|active| active.id);
        if let (Task::Range(range), Some(active)) = (&mut job.task, self.loads.get_mut(&table)) {
            if !active.lies_as_before(range, &brought) {
                return self.begin_again(table, Again::Rewritten, now, out);
            }
            if let Some(rest) = brought.rest.take() {
                active.leaves(range, rest);
            }
        }
        // A comparison finds the same ones again and again.
        let keyless = if compares { Vec::new() } else { brought.keyless };
        let id = self.readers.hands_over(Judged { job, keyless, together });
        let Brought { snapshot, nonce, content, unwritable, floor, .. } = brought;
        out.push(say(FromLoad::Chunk(Chunk { id, table, load, nonce, snapshot, content, unwritable, floor })));
    }
}
