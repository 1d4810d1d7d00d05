//! The one way to load: reads chunks of tables from Postgres, each under a snapshot of its own and followed by a mark,
//! and hands them to the apply machine, which judges them. Also reads single keys again and looks for orphans.
//!
//! It never writes to Redis, and knows nothing of what the stream has brought. A chunk that the machine refuses is read
//! again. Wrong here means: rows that no chunk covers, or a table called loaded before all of it is.

use super::connections::Connections;
use super::{BridgeError, walk};
use crate::change::{Nonce, Row};
use crate::checkpoint::Blocked;
use crate::command::{self, DeadLetter, EncodedRows, Key, Unwritable};
use crate::error::Backoff;
use crate::plan::key;
use crate::plan::mapping::{self, Mapping};
use crate::progress::visibility::Snapshot;
use crate::remedy::Sql;
use crate::resp::batch::{Limits, RowsEncoder};
use crate::schema::{KeyTemplate, Oid, TableId, TableSpec};
use crate::session::chunk::{
    Chunk, ChunkId, Content, Floor, Floors, FromLoad, KeysToRead, LoadId, LoadOrder, Purpose, Verdict,
};
use crate::sink::SinkError;
use crate::sink::reader::Reader;
use crate::source::SourceError;
use crate::source::connect::PostgresClient;
use crate::source::snapshot::{self, Asked, CatalogTable, Part, Range, ReadRange, ReadRows, Sizes, Wanted};
use bytes::Bytes;
use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{sleep, sleep_until};

/// Pages a chunk: about half a megabyte of table, a few thousand small rows.
const PAGES_A_CHUNK: u32 = 64;
/// A chunk of large rows ends earlier: it lies in memory as a whole.
const BYTES_A_CHUNK: usize = 2 << 20;
/// Rows written to Redis in one step, so that a change of the stream never waits long behind them.
const ROWS_A_PART: usize = 1_000;
const BYTES_A_PART: usize = 512 << 10;
/// Keys about which Postgres is asked at once whether they have a row: each question has a mark of its own in the WAL.
const KEYS_A_QUESTION: usize = 4_000;
/// Connections to Postgres that read.
const READERS: usize = 2;
/// How long lock timeouts may go on before a comparison is given up. A load waits as long as it takes.
const COMPARISON_LOCK_PATIENCE: Duration = Duration::from_secs(10);
/// How long a comparison may find no connection, or lose each that it gets.
const COMPARISON_CONNECTION_PATIENCE: Duration = Duration::from_secs(30);
/// Chunks read and not yet judged: keeps both servers busy, and bounds memory.
const CHUNKS_OUT: usize = 5;
/// Small tables, or partitions, that are read together, as one chunk of a large table is.
const TOGETHER: usize = 32;
/// Orders that are taken at once: tables that are to be loaded are looked up together.
const ORDERS_AT_ONCE: usize = 1_000;

pub struct Loader {
    pub connections: Connections,
    pub publication: String,
    pub specs: Arc<[TableSpec]>,
    pub known: KnownTables,
    pub reader: Reader,
    pub floors: Floors,
    pub limits: Limits,
    pub orders: mpsc::UnboundedReceiver<LoadOrder>,
    pub out: mpsc::Sender<FromLoad>,
    /// Templates of earlier configurations, whose keys go.
    pub retired: Vec<String>,
}

/// The oids of tables that were found under their names, in this life: one that was renamed since is found by it.
pub type KnownTables = Arc<Mutex<HashMap<TableId, Oid>>>;

/// A table as it was looked up, and how its rows become hashes.
#[derive(Clone)]
pub(super) struct Shape {
    pub catalog: Arc<CatalogTable>,
    pub mapping: Arc<Mapping>,
    booleans: HashSet<Oid>,
}

struct Active {
    id: LoadId,
    purpose: Purpose,
    /// Rises where the load begins again by itself: what was read before counts for nothing then.
    attempt: u64,
    shape: Shape,
    /// Where each leaf's rows lay when the first of them were read.
    filenodes: HashMap<usize, Oid>,
    /// It was in the way of others that were read with it, or they in its way.
    reads_alone: bool,
    todo: VecDeque<Task>,
    /// Read or being read, and not written.
    out: usize,
    sweep: Sweep,
}

enum Sweep {
    NotYet,
    At(u64),
    Done,
}

#[derive(Clone)]
enum Task {
    Range(Range),
    Orphans(Vec<Key>),
}

/// A row without a key.
struct Keyless {
    code: &'static str,
    letter: DeadLetter,
}

enum Job {
    Load { table: TableId, load: LoadId, attempt: u64, task: Task },
    Keys(KeysToRead),
}

/// A job and what it takes.
struct Assignment {
    job: Job,
    shape: Shape,
    spec: TableSpec,
    limits: Limits,
}

/// Who wants to know a table: a load waits for as long as it takes, a comparison is given up.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Asks {
    Load,
    Comparison,
}

impl From<Purpose> for Asks {
    fn from(purpose: Purpose) -> Self {
        match purpose {
            Purpose::Fill => Asks::Load,
            Purpose::Compare(_) => Asks::Comparison,
        }
    }
}

/// What a reader brings back.
struct Read {
    job: Job,
    /// How many chunks the same read brought.
    together: usize,
    result: Result<Brought, Unread>,
}

enum Unread {
    Failed(SourceError),
    /// The table is another than was looked up.
    Gone,
    /// It was to be read with others, and is read alone then.
    Together,
}

/// A chunk that the machine has.
struct Judged {
    job: Job,
    /// Told once the rest is written, since some are read again.
    keyless: Vec<Keyless>,
    /// As in [`Read::together`].
    together: usize,
}

struct Brought {
    snapshot: String,
    /// Of the leaf that was read.
    filenode: Option<Oid>,
    content: Content,
    rest: Option<Range>,
    unwritable: Vec<Unwritable>,
    keyless: Vec<Keyless>,
    nonce: Nonce,
    floor: Floor,
}

struct Work {
    loads: HashMap<TableId, Active>,
    keys: VecDeque<KeysToRead>,
    reading: JoinSet<Result<Vec<Read>, BridgeError>>,
    /// How many of them read single keys again.
    reading_keys: usize,
    judged: HashMap<ChunkId, Judged>,
    /// After a read that failed for no reason of its own: when the next one may begin.
    resume_at: Option<Instant>,
    backoff: Backoff,
    /// Since when somebody's lock, or lost connections, have kept a table from being read.
    unread_since: HashMap<TableId, Instant>,
    /// Tables of which a load began in this session.
    begun: HashSet<TableId>,
    next_chunk: u64,
    next_attempt: u64,
}

impl Loader {
    /// Works until the session ends; returns only errors.
    pub async fn run(mut self) -> Result<(), BridgeError> {
        let mut work = Work {
            loads: HashMap::new(),
            keys: VecDeque::new(),
            reading: JoinSet::new(),
            reading_keys: 0,
            judged: HashMap::new(),
            resume_at: None,
            backoff: Backoff::default(),
            unread_since: HashMap::new(),
            begun: HashSet::new(),
            next_chunk: 1,
            next_attempt: 1,
        };
        self.sweep_retired().await?;
        let mut orders = Vec::new();
        loop {
            self.dispatch(&mut work).await?;
            if work.is_idle() {
                self.connections.keep_one();
            }
            let pause = work.resume_at;
            tokio::select! {
                count = self.orders.recv_many(&mut orders, ORDERS_AT_ONCE) => match count {
                    0 => return Ok(()),
                    _ => self.obey(orders.drain(..), &mut work).await?,
                },
                Some(reads) = work.reading.join_next() => {
                    for read in reads.map_err(|_| BridgeError::Internal("a reading task ended in mid-air"))?? {
                        self.took(read, &mut work).await?;
                    }
                }
                () = sleep_until(pause.unwrap_or_else(Instant::now).into()), if pause.is_some() => work.resume_at = None,
            }
        }
    }

    fn spec(&self, table: TableId) -> &TableSpec {
        &self.specs[table.index()]
    }

    async fn say(&self, message: FromLoad) -> Result<(), BridgeError> {
        self.out.send(message).await.map_err(|_| BridgeError::SessionOver)
    }

    /// Tables as they are now, or why they cannot be followed, in their order. Where the connection is lost, they are asked
    /// for on another. For a load they are asked for again where the server could not answer this time, or somebody has one
    /// locked.
    async fn look_up(
        &self,
        tables: &[TableId],
        sizes: Sizes,
        asks: Asks,
    ) -> Result<Vec<Result<Shape, Blocked>>, BridgeError> {
        let mut backoff = Backoff::default();
        let began = Instant::now();
        let specs: Vec<&TableSpec> = tables.iter().map(|table| self.spec(*table)).collect();
        let none_of_them = |error: &SourceError| Ok(tables.iter().map(|_| Err(blocked_by(error))).collect());
        loop {
            let client = match take(&self.connections, asks).await {
                Err(BridgeError::Source(error)) if asks == Asks::Comparison && error.is_about_the_query() => {
                    return none_of_them(&error);
                }
                client => client?,
            };
            match look_up(&client, &specs, &self.publication, sizes, &self.known).await {
                Ok(found) => {
                    self.connections.give_back(client);
                    let locked = found.iter().find_map(LookedUp::locked);
                    let Some(error) = locked.filter(|_| asks == Asks::Load) else {
                        return Ok(found.into_iter().map(LookedUp::settled).collect());
                    };
                    self.connections.failed(error);
                }
                Err(error) if !error.is_about_the_query() => {
                    self.connections.failed(&error);
                    if asks == Asks::Comparison && began.elapsed() >= COMPARISON_CONNECTION_PATIENCE {
                        return none_of_them(&error);
                    }
                }
                Err(error) => {
                    self.connections.give_back(client);
                    match asks {
                        Asks::Comparison => return none_of_them(&error),
                        Asks::Load if error.is_transient_query_failure() => self.connections.failed(&error),
                        Asks::Load => return Err(error.into()),
                    }
                }
            }
            sleep(backoff.next_delay()).await;
        }
    }

    /// In their order, but for loads of several tables that follow upon each other: those begin together.
    async fn obey(&mut self, orders: impl Iterator<Item = LoadOrder>, work: &mut Work) -> Result<(), BridgeError> {
        let mut begins: Vec<(TableId, LoadId, Purpose)> = Vec::new();
        for order in orders {
            if let LoadOrder::Table { table, load, purpose, .. } = order {
                let fits = |(other, _, first): &(TableId, LoadId, Purpose)| {
                    *other != table && Asks::from(*first) == Asks::from(purpose)
                };
                if !begins.iter().all(fits) {
                    self.begin(std::mem::take(&mut begins), work).await?;
                }
                begins.push((table, load, purpose));
                continue;
            }
            self.begin(std::mem::take(&mut begins), work).await?;
            match order {
                LoadOrder::Table { .. } => {}
                LoadOrder::Keys(keys) => work.keys.push_back(keys),
                LoadOrder::Verdict(chunk, verdict) => self.judged(chunk, verdict, work).await?,
                LoadOrder::Abandon(table, load) => self.abandon(table, load, work).await?,
            }
        }
        self.begin(begins, work).await
    }

    /// The machine counts the reads of keys that it has ordered: it is told of those that nobody will make.
    async fn abandon(&self, table: TableId, load: LoadId, work: &mut Work) -> Result<(), BridgeError> {
        for _ in 0..work.abandon(table, load) {
            self.say(FromLoad::KeysNotRead).await?;
        }
        Ok(())
    }

    /// Loads of different tables, of one kind.
    async fn begin(&mut self, begins: Vec<(TableId, LoadId, Purpose)>, work: &mut Work) -> Result<(), BridgeError> {
        let Some((_, _, purpose)) = begins.first() else { return Ok(()) };
        let asks = Asks::from(*purpose);
        let tables: Vec<TableId> = begins.iter().map(|(table, ..)| *table).collect();
        for table in &tables {
            work.loads.remove(table);
            work.unread_since.remove(table);
        }
        let looked_up = self.look_up(&tables, Sizes::Measured, asks).await?;
        // Where nothing of a table lay in Redis before the session's first load of it began, all that lies there later was
        // written by this session, and is what the stream says: none of it is an orphan. What an earlier load wrote may be
        // one: rows can leave a table without a word in the stream.
        let mut first: Vec<&str> = Vec::new();
        for (table, looked_up) in tables.iter().zip(&looked_up) {
            if looked_up.is_ok() && work.begun.insert(*table) {
                first.push(&self.specs[table.index()].key.literal);
            }
        }
        let empty = match walk::empty(&self.reader, &first).await {
            Err(refused @ SinkError::Refused { .. }) if asks == Asks::Comparison => {
                for (table, load, _) in begins {
                    self.not_compared(table, load, refused.to_string(), work).await?;
                }
                return Ok(());
            }
            empty => empty?.into_iter().map(str::to_owned).collect::<HashSet<_>>(),
        };
        for ((table, load, purpose), looked_up) in begins.into_iter().zip(looked_up) {
            let shape = match looked_up {
                Err(why) if purpose != Purpose::Fill => {
                    self.not_compared(table, load, why.to_string(), work).await?;
                    continue;
                }
                Err(why) => {
                    self.say(FromLoad::Blocked { table, why }).await?;
                    continue;
                }
                Ok(shape) => shape,
            };
            self.say(FromLoad::Began {
                table,
                load,
                fingerprint: shape.mapping.fingerprint,
                catalog: shape.catalog.mark(),
                estimated_rows: shape.catalog.estimated_rows,
                booleans: shape.booleans.clone(),
            })
            .await?;
            let todo = snapshot::ranges(&shape.catalog, PAGES_A_CHUNK).into_iter().map(Task::Range).collect();
            let attempt = work.next_attempt;
            work.next_attempt += 1;
            let sweep = if empty.contains(&*self.spec(table).key.literal) { Sweep::Done } else { Sweep::NotYet };
            let (filenodes, reads_alone, out) = (HashMap::new(), false, 0);
            let active = Active { id: load, purpose, attempt, shape, filenodes, reads_alone, todo, out, sweep };
            work.loads.insert(table, active);
            self.advance(table, work).await?;
        }
        Ok(())
    }

    async fn not_compared(
        &self,
        table: TableId,
        load: LoadId,
        why: String,
        work: &mut Work,
    ) -> Result<(), BridgeError> {
        self.abandon(table, load, work).await?;
        self.say(FromLoad::NotCompared { table, load, why }).await
    }

    /// Gives idle readers something to do.
    async fn dispatch(&mut self, work: &mut Work) -> Result<(), BridgeError> {
        while work.resume_at.is_none() && work.reading.len() < READERS && work.has_room() {
            let load_waits = work.loads.values().any(|a| !a.todo.is_empty());
            // One reader is left to a load: keys that keep changing must not keep it from its end.
            let keys = if load_waits && work.reading_keys > 0 { None } else { work.keys.pop_front() };
            let (assignments, asks) = if let Some(keys) = keys {
                let table = keys.table;
                let asks = keys.checks.map_or(Asks::Load, |_| Asks::Comparison);
                let known = work.loads.get(&table).map(|active| active.shape.clone());
                let looked_up = match known {
                    Some(shape) => Some(Ok(shape)),
                    None => self.look_up(&[table], Sizes::Remembered, asks).await?.pop(),
                };
                let shape = match (looked_up.expect("an answer for each table"), keys.checks) {
                    (Ok(shape), _) => shape,
                    (Err(why), Some(load)) => {
                        self.not_compared(table, load, why.to_string(), work).await?;
                        self.say(FromLoad::KeysNotRead).await?;
                        continue;
                    }
                    (Err(why), None) => {
                        self.say(FromLoad::Blocked { table, why }).await?;
                        self.say(FromLoad::KeysNotRead).await?;
                        continue;
                    }
                };
                work.reading_keys += 1;
                (vec![self.assignment(Job::Keys(keys), shape, asks)], asks)
            } else {
                let Some((asks, jobs)) = work.next_jobs() else { return Ok(()) };
                (jobs.into_iter().map(|(job, shape)| self.assignment(job, shape, asks)).collect(), asks)
            };
            work.reading.spawn(read(self.connections.clone(), asks, assignments, self.floors.clone()));
        }
        Ok(())
    }

    fn assignment(&self, job: Job, shape: Shape, asks: Asks) -> Assignment {
        let spec = self.spec(shape.mapping.table).clone();
        // A row that is to be compared is read again from its commands, and so is a single one.
        let packs = matches!(job, Job::Load { .. }) && asks == Asks::Load;
        let limits = if packs { self.limits } else { self.limits.unpacked() };
        Assignment { job, shape, spec, limits }
    }

    /// A chunk is here: hand it over, its mark is in the WAL.
    async fn took(&mut self, read: Read, work: &mut Work) -> Result<(), BridgeError> {
        let Read { mut job, together, result } = read;
        let (table, load, attempt) = match &job {
            Job::Load { table, load, attempt, .. } => (*table, Some(*load), Some(*attempt)),
            Job::Keys(KeysToRead { table, .. }) => {
                work.reading_keys -= 1;
                (*table, None, None)
            }
        };
        if attempt.is_some() && work.loads.get(&table).map(|a| a.attempt) != attempt {
            return Ok(());
        }
        // Nobody needs it but whoever asked: no reason to give up the table, or the session.
        let comparison = match &job {
            Job::Load { load, .. } => work.loads.get(&table).filter(|a| a.purpose != Purpose::Fill).map(|_| *load),
            Job::Keys(KeysToRead { checks, .. }) => *checks,
        };
        let brought = match result {
            Ok(brought) => {
                work.unread_since.remove(&table);
                work.backoff.reset();
                self.connections.worked();
                brought
            }
            Err(Unread::Gone) => {
                // What was covered is not known.
                let Some(active) = work.loads.get(&table) else { return Ok(()) };
                tracing::info!(table = self.spec(table).name, "table changed while loading, reading it again");
                let begin = (table, active.id, active.purpose);
                return self.begin(vec![begin], work).await;
            }
            Err(Unread::Together) => {
                if let Some(active) = work.loads.get_mut(&table) {
                    active.reads_alone = true;
                }
                work.again(table, job);
                return Ok(());
            }
            Err(Unread::Failed(error)) if comparison.is_some() && work.gives_up_on(table, &error) => {
                if let Some(load) = comparison {
                    self.not_compared(table, load, error.to_string(), work).await?;
                }
                return match job {
                    Job::Keys(_) => self.say(FromLoad::KeysNotRead).await,
                    Job::Load { .. } => Ok(()),
                };
            }
            // Nothing is wrong with the table: somebody else has it for a while.
            Err(Unread::Failed(error)) if error.is_about_a_lock() => {
                work.again(table, job);
                return Ok(());
            }
            Err(Unread::Failed(error)) if error.is_about_the_table() => {
                work.loads.remove(&table);
                self.say(FromLoad::Blocked { table, why: blocked_by(&error) }).await?;
                return match job {
                    Job::Keys(_) => self.say(FromLoad::KeysNotRead).await,
                    Job::Load { .. } => Ok(()),
                };
            }
            // The connection was lost, or the server could not do it this time. The stream goes on; should the server be away
            // altogether, it is the stream that notices.
            Err(Unread::Failed(error)) => {
                self.connections.failed(&error);
                work.resume_at = Some(Instant::now() + work.backoff.next_delay());
                work.again(table, job);
                return Ok(());
            }
        };
        if let (Job::Load { task: Task::Range(range), .. }, Some(active)) = (&mut job, work.loads.get_mut(&table)) {
            if let Some(filenode) = brought.filenode
                && *active.filenodes.entry(range.leaf).or_insert(filenode) != filenode
            {
                // Rows moved without a word in the stream (VACUUM FULL, CLUSTER): what was covered is not known.
                tracing::info!(table = self.spec(table).name, "table was rewritten while loading, reading it again");
                let begin = (table, active.id, active.purpose);
                return self.begin(vec![begin], work).await;
            }
            if let Some(rest) = &brought.rest {
                range.without(rest);
                active.todo.push_back(Task::Range(rest.clone()));
            }
        }
        let snapshot: Snapshot =
            brought.snapshot.parse().map_err(|_| BridgeError::Internal("Postgres sent a malformed snapshot"))?;
        let compares = load.is_some() && comparison.is_some();
        // A comparison finds the same ones again and again.
        let keyless = if compares { Vec::new() } else { brought.keyless };
        let id = ChunkId(work.next_chunk);
        work.next_chunk += 1;
        work.judged.insert(id, Judged { job, keyless, together });
        let Brought { nonce, content, unwritable, floor, .. } = brought;
        let chunk = Chunk { id, table, load, nonce, snapshot, content, unwritable, floor };
        self.say(FromLoad::Chunk(chunk)).await
    }

    async fn judged(&mut self, chunk: ChunkId, verdict: Verdict, work: &mut Work) -> Result<(), BridgeError> {
        let Some(Judged { job, keyless, .. }) = work.judged.remove(&chunk) else { return Ok(()) };
        if verdict == Verdict::Written {
            let table = match &job {
                Job::Load { table, .. } | Job::Keys(KeysToRead { table, .. }) => *table,
            };
            for Keyless { code, letter } in keyless {
                self.say(FromLoad::DeadLetter { table, code, letter }).await?;
            }
        }
        let Job::Load { table, attempt, task, .. } = job else { return Ok(()) };
        let Some(active) = work.loads.get_mut(&table).filter(|a| a.attempt == attempt) else { return Ok(()) };
        active.out -= 1;
        if verdict == Verdict::ReadAgain {
            active.todo.push_back(task);
        }
        self.advance(table, work).await
    }

    /// The next phase of a load: rows, then orphans, then the end.
    async fn advance(&mut self, table: TableId, work: &mut Work) -> Result<(), BridgeError> {
        while let Some(active) = work.loads.get_mut(&table) {
            let under_way = active.todo.len() + active.out;
            let cursor = match active.sweep {
                Sweep::NotYet if under_way == 0 => 0,
                Sweep::At(cursor) if under_way < CHUNKS_OUT => cursor,
                Sweep::Done if under_way == 0 => {
                    let load = active.id;
                    work.loads.remove(&table);
                    return self.say(FromLoad::Ended { table, load }).await;
                }
                Sweep::NotYet | Sweep::At(_) | Sweep::Done => return Ok(()),
            };
            let prefix = &self.spec(table).key.literal;
            let (next, keys) = match walk::pages(&self.reader, prefix, cursor, KEYS_A_QUESTION).await {
                Err(refused @ SinkError::Refused { .. }) if active.purpose != Purpose::Fill => {
                    let load = active.id;
                    return self.not_compared(table, load, refused.to_string(), work).await;
                }
                pages => pages?,
            };
            active.sweep = if next == 0 { Sweep::Done } else { Sweep::At(next) };
            let limit = self.limits.rows_bytes();
            let mut weight = 0;
            // Those that have no row are removed in one batch.
            let parts = keys.chunk_by(|key, _| {
                weight += command::weight_of_key(key);
                let fits = weight <= limit / 2;
                weight = if fits { weight } else { 0 };
                fits
            });
            active.todo.extend(parts.map(|keys| Task::Orphans(keys.to_vec())));
        }
        Ok(())
    }

    /// Keys of templates that are no longer configured go, unless a present template could have made them.
    async fn sweep_retired(&mut self) -> Result<(), BridgeError> {
        for template in std::mem::take(&mut self.retired) {
            let Ok(old) = key::parse_template(&template) else { continue };
            let mut cursor = 0;
            loop {
                let (next, keys) = walk::page(&self.reader, &old.literal, cursor).await?;
                let ours = |k: &Key| self.specs.iter().any(|spec| key::decode(&spec.key, k).is_some());
                let orphans: Vec<Key> = keys.into_iter().filter(|k| !ours(k)).collect();
                if !orphans.is_empty() {
                    self.say(FromLoad::Orphans { keys: orphans }).await?;
                }
                cursor = next;
                if cursor == 0 {
                    break;
                }
            }
            tracing::info!(template, "removed the keys of a table or template that is no longer configured");
            self.say(FromLoad::Retired { template }).await?;
        }
        Ok(())
    }
}

impl Work {
    fn is_idle(&self) -> bool {
        self.loads.is_empty() && self.keys.is_empty() && self.reading.is_empty()
    }

    /// Whether one more read may be made. A small chunk that was read together with others weighs as little.
    fn has_room(&self) -> bool {
        let judged = self.judged.values().map(|judged| TOGETHER.div_ceil(judged.together)).sum::<usize>();
        judged + TOGETHER * self.reading.len() <= TOGETHER * (CHUNKS_OUT - 1)
    }

    /// The next chunk of some load; with it small ones of other tables or partitions, as long as all of them are no more than
    /// one chunk of a large table.
    fn next_jobs(&mut self) -> Option<(Asks, Vec<(Job, Shape)>)> {
        let (mut jobs, mut asks, mut pages) = (Vec::new(), None, 0);
        for (table, active) in &mut self.loads {
            if asks.is_some_and(|asks| asks != Asks::from(active.purpose)) {
                continue;
            }
            while jobs.len() < TOGETHER {
                let together = match active.todo.front() {
                    None => break,
                    Some(Task::Range(range)) if !active.reads_alone => range.pages(&active.shape.catalog),
                    Some(Task::Range(_) | Task::Orphans(_)) => None,
                };
                let fits = together.is_some_and(|more| pages + more <= PAGES_A_CHUNK);
                if !fits && !jobs.is_empty() {
                    break;
                }
                let task = active.todo.pop_front().expect("there is one");
                active.out += 1;
                asks = Some(active.purpose.into());
                let job = Job::Load { table: *table, load: active.id, attempt: active.attempt, task };
                jobs.push((job, active.shape.clone()));
                if !fits {
                    return Some((active.purpose.into(), jobs));
                }
                pages += together.unwrap_or(0);
            }
        }
        Some((asks?, jobs))
    }

    /// What was not read is read by whoever is free next.
    fn again(&mut self, table: TableId, job: Job) {
        match job {
            Job::Keys(keys) => self.keys.push_back(keys),
            Job::Load { task, .. } => {
                if let Some(active) = self.loads.get_mut(&table) {
                    active.out -= 1;
                    active.todo.push_back(task);
                }
            }
        }
    }

    /// How many reads of keys it leaves undone.
    fn abandon(&mut self, table: TableId, load: LoadId) -> usize {
        if self.loads.get(&table).is_some_and(|active| active.id == load) {
            self.loads.remove(&table);
        }
        self.unread_since.remove(&table);
        let before = self.keys.len();
        self.keys.retain(|keys| keys.checks != Some(load));
        before - self.keys.len()
    }

    /// Whether a comparison that failed like this is given up.
    fn gives_up_on(&mut self, table: TableId, error: &SourceError) -> bool {
        let patience = match error.is_about_the_query() {
            true if error.is_about_a_lock() => COMPARISON_LOCK_PATIENCE,
            true => return true,
            false => COMPARISON_CONNECTION_PATIENCE,
        };
        self.unread_since.entry(table).or_insert_with(Instant::now).elapsed() >= patience
    }
}

/// Why a table cannot be read.
pub(super) fn blocked_by(error: &SourceError) -> Blocked {
    let (because, remedy) = error.fact_and_remedy();
    Blocked { because, remedy }
}

/// What a look at the catalog found of a table.
pub(super) enum LookedUp {
    Shape(Shape),
    /// It cannot be followed.
    Blocked(Blocked),
    /// Somebody has it locked.
    Locked(SourceError),
}

impl LookedUp {
    fn locked(&self) -> Option<&SourceError> {
        match self {
            LookedUp::Locked(error) => Some(error),
            LookedUp::Shape(_) | LookedUp::Blocked(_) => None,
        }
    }

    fn settled(self) -> Result<Shape, Blocked> {
        match self {
            LookedUp::Shape(shape) => Ok(shape),
            LookedUp::Blocked(why) => Err(why),
            LookedUp::Locked(error) => Err(blocked_by(&error)),
        }
    }
}

/// Tables as the catalog has them now, in their order.
pub(super) async fn look_up(
    client: &PostgresClient,
    specs: &[&TableSpec],
    publication: &str,
    sizes: Sizes,
    known: &KnownTables,
) -> Result<Vec<LookedUp>, SourceError> {
    let asked: Vec<Asked<'_>> = specs.iter().map(|spec| Asked { name: &spec.table, chosen: &spec.columns }).collect();
    let described = snapshot::describe_all(&client.client, &asked, publication, sizes).await?;
    let booleans = snapshot::boolean_types(&client.client).await?;
    let mut out = Vec::with_capacity(specs.len());
    for (spec, described) in specs.iter().zip(described) {
        out.push(match described {
            Ok(Some(catalog)) => {
                known.lock().unwrap_or_else(PoisonError::into_inner).insert(spec.id, catalog.oid);
                match bind(spec, catalog, publication, &booleans) {
                    Ok(shape) => LookedUp::Shape(shape),
                    Err(why) => LookedUp::Blocked(why),
                }
            }
            Ok(None) => {
                let oid = known.lock().unwrap_or_else(PoisonError::into_inner).get(&spec.id).copied();
                LookedUp::Blocked(missing(client, spec, oid).await?)
            }
            Err(error) if error.is_about_a_lock() => LookedUp::Locked(error),
            Err(error) => LookedUp::Blocked(blocked_by(&error)),
        });
    }
    Ok(out)
}

/// How the rows of a table become hashes, or why they cannot.
fn bind(spec: &TableSpec, catalog: CatalogTable, publication: &str, booleans: &HashSet<Oid>) -> Result<Shape, Blocked> {
    if !catalog.published {
        return Err(Blocked {
            because: format!("table {} is not in publication {publication}", spec.table),
            remedy: Sql::AddTable { publication, table: &spec.table }.to_string(),
        });
    }
    mapping::check_identity(spec, catalog.identity, &catalog.identity_columns, &catalog.relation())
        .map_err(|why| Blocked::from_message(&why.to_string()))?;
    match Mapping::bind(spec, &catalog.relation(), booleans) {
        Ok(mapping) => Ok(Shape { catalog: Arc::new(catalog), mapping: Arc::new(mapping), booleans: booleans.clone() }),
        Err(error) => Err(Blocked::from_message(&error.knowing(&catalog.generated).to_string())),
    }
}

/// Nothing has the name of the table. Its oid may have another one now.
async fn missing(client: &PostgresClient, spec: &TableSpec, oid: Option<Oid>) -> Result<Blocked, SourceError> {
    let (table, name) = (&spec.table, &spec.name);
    let now = match oid {
        Some(oid) => snapshot::name_of(&client.client, oid).await?,
        None => None,
    };
    Ok(match (now, oid) {
        (Some(now), _) => Blocked {
            because: format!("table {table} is called {now} now"),
            remedy: format!("{} or configure {now} instead", Sql::Move { from: &now, to: table }),
        },
        (None, Some(_)) => Blocked {
            because: format!("table {table} was dropped"),
            remedy: format!("create it again, or take {name} out of the configuration"),
        },
        (None, None) => Blocked {
            because: format!("table {table} does not exist"),
            remedy: format!("create it, or correct `table` of {name} in the configuration"),
        },
    })
}

async fn take(connections: &Connections, asks: Asks) -> Result<PostgresClient, BridgeError> {
    match asks {
        Asks::Load => connections.take().await,
        Asks::Comparison => connections.take_within(COMPARISON_CONNECTION_PATIENCE).await,
    }
}

/// One chunk, or several of small tables: their rows under one snapshot, then a mark for each.
async fn read(
    connections: Connections,
    asks: Asks,
    assignments: Vec<Assignment>,
    floors: Floors,
) -> Result<Vec<Read>, BridgeError> {
    let client = match take(&connections, asks).await {
        Ok(client) => client,
        Err(BridgeError::Source(error)) if error.is_about_the_query() => return Ok(failed(assignments, error)),
        Err(error) => return Err(error),
    };
    let results = match &assignments[..] {
        [one] => read_alone(&client, one, floors.open()).await.map(|result| vec![result]),
        several => read_together(&client, several, &floors).await,
    };
    // One that is lost is in a state that nobody knows.
    if results.as_ref().err().is_none_or(SourceError::is_about_the_query) {
        connections.give_back(client);
    }
    let results = match results {
        Ok(results) => results,
        Err(error) => return Ok(failed(assignments, error)),
    };
    let together = results.iter().filter(|result| result.is_ok()).count();
    let reads = assignments.into_iter().zip(results);
    Ok(reads.map(|(Assignment { job, .. }, result)| Read { job, together, result }).collect())
}

/// What failed may have done so because of one of several: they are read alone then.
fn failed(assignments: Vec<Assignment>, error: SourceError) -> Vec<Read> {
    let told = assignments.len() == 1 || !error.is_about_the_query();
    let mut told = told.then_some(error);
    let mut read = |Assignment { job, .. }| {
        let result = Err(told.take().map_or(Unread::Together, Unread::Failed));
        Read { job, together: 0, result }
    };
    assignments.into_iter().map(&mut read).collect()
}

async fn read_alone(
    client: &PostgresClient,
    one: &Assignment,
    // Registered before the snapshot is taken: what it may miss stays on record from here on.
    floor: Floor,
) -> Result<Result<Brought, Unread>, SourceError> {
    let Assignment { job, shape, spec, limits } = one;
    match job {
        Job::Load { task: Task::Range(range), .. } => read_range(client, shape, spec, range, *limits, floor).await,
        Job::Load { task: Task::Orphans(keys), .. } => {
            read_existing(client, shape, &spec.key, keys, floor).await.map(Ok)
        }
        Job::Keys(keys) => read_keys(client, shape, spec, keys, *limits, floor).await.map(Ok),
    }
}

async fn read_range(
    client: &PostgresClient,
    shape: &Shape,
    spec: &TableSpec,
    range: &Range,
    limits: Limits,
    floor: Floor,
) -> Result<Result<Brought, Unread>, SourceError> {
    let mut rows = Encoder::new(spec, &shape.mapping, limits, ROWS_A_PART);
    let part = Part { table: &shape.catalog, range };
    match snapshot::read_range(client, part, BYTES_A_CHUNK, |row| rows.push(&row)).await? {
        ReadRange::Rows(read) => Ok(Ok(rows.brought(read, mark(client).await?, floor))),
        ReadRange::Gone => Ok(Err(Unread::Gone)),
    }
}

/// Ranges of several tables. What did not fit beside the others is read alone.
async fn read_together(
    client: &PostgresClient,
    several: &[Assignment],
    floors: &Floors,
) -> Result<Vec<Result<Brought, Unread>>, SourceError> {
    let (mut parts, mut encoders) = (Vec::new(), Vec::new());
    for Assignment { job, shape, spec, limits } in several {
        let Job::Load { task: Task::Range(range), .. } = job else { unreachable!("only ranges are read together") };
        parts.push(Part { table: &shape.catalog, range });
        encoders.push((Encoder::new(spec, &shape.mapping, *limits, ROWS_A_PART), floors.open()));
    }
    let read = snapshot::read_ranges(client, &parts, BYTES_A_CHUNK, |place, row| encoders[place].0.push(&row)).await?;
    let mut nonces = marks(client, read.len()).await?.into_iter();
    let mut read = read.into_iter();
    let brought = encoders.into_iter().map(|(rows, floor)| match (read.next(), nonces.next()) {
        (Some(ReadRange::Rows(read)), Some(nonce)) => Ok(rows.brought(read, nonce, floor)),
        (Some(_), _) => Err(Unread::Gone),
        (None, _) => Err(Unread::Together),
    });
    Ok(brought.collect())
}

async fn read_keys(
    client: &PostgresClient,
    shape: &Shape,
    spec: &TableSpec,
    KeysToRead { keys, checks, .. }: &KeysToRead,
    limits: Limits,
    floor: Floor,
) -> Result<Brought, SourceError> {
    let mut rows = Encoder::new(spec, &shape.mapping, limits, usize::MAX);
    let template = &spec.key;
    // What does not fit into one batch beside them is left for another read.
    let mut unread: HashSet<Key> = HashSet::new();
    let values: Vec<Vec<Bytes>> = keys.iter().filter_map(|k| key::decode(template, k)).collect();
    let snapshot =
        snapshot::read_keys(&client.client, &shape.catalog, &template.columns, &values, Wanted::WholeRows, |row| {
            if rows.fits(&row) {
                return rows.push(&row);
            }
            unread.extend(shape.mapping.key.encode(&row));
        })
        .await?;
    let nonce = mark(client).await?;
    let Encoded { mut parts, unwritable, keyless } = rows.finish();
    let (unread, asked) = keys.iter().cloned().partition(|key| unread.contains(key));
    let content = Content::Keys { asked, found: parts.pop().unwrap_or_default(), unread, checks: *checks };
    Ok(Brought { snapshot, filenode: None, content, rest: None, unwritable, keyless, nonce, floor })
}

async fn read_existing(
    client: &PostgresClient,
    shape: &Shape,
    template: &KeyTemplate,
    keys: &[Key],
    floor: Floor,
) -> Result<Brought, SourceError> {
    let values: Vec<Vec<Bytes>> = keys.iter().filter_map(|k| key::decode(template, k)).collect();
    let mut exist = HashSet::with_capacity(values.len());
    let snapshot =
        snapshot::read_keys(&client.client, &shape.catalog, &template.columns, &values, Wanted::KeysOnly, |row| {
            exist.insert(shape.mapping.key.encode_key_row(&row));
        })
        .await?;
    let nonce = mark(client).await?;
    let content = Content::Orphans { asked: keys.to_vec(), exist };
    let (unwritable, keyless) = (Vec::new(), Vec::new());
    Ok(Brought { snapshot, filenode: None, content, rest: None, unwritable, keyless, nonce, floor })
}

async fn mark(client: &PostgresClient) -> Result<Nonce, SourceError> {
    Ok(marks(client, 1).await?.remove(0))
}

async fn marks(client: &PostgresClient, count: usize) -> Result<Vec<Nonce>, SourceError> {
    let mut nonces = vec![Nonce([0; 16]); count];
    for Nonce(bytes) in &mut nonces {
        getrandom::fill(bytes).map_err(|e| SourceError::unexpected("making a mark", e.to_string()))?;
    }
    snapshot::emit_marks(&client.client, &nonces).await?;
    Ok(nonces)
}

/// Rows become RESP here, beside the writer and not in it.
struct Encoder<'a> {
    spec: &'a TableSpec,
    mapping: &'a Mapping,
    limits: Limits,
    parts: Vec<EncodedRows>,
    part: RowsEncoder,
    rows_a_part: usize,
    unwritable: Vec<Unwritable>,
    keyless: Vec<Keyless>,
}

struct Encoded {
    /// At least one where there is anything to be said of a row.
    parts: Vec<EncodedRows>,
    unwritable: Vec<Unwritable>,
    keyless: Vec<Keyless>,
}

impl<'a> Encoder<'a> {
    fn new(spec: &'a TableSpec, mapping: &'a Mapping, limits: Limits, rows_a_part: usize) -> Self {
        let (part, parts) = (RowsEncoder::new(limits), Vec::new());
        let (unwritable, keyless) = (Vec::new(), Vec::new());
        Encoder { spec, mapping, limits, parts, part, rows_a_part, unwritable, keyless }
    }

    fn push(&mut self, row: &Row) {
        let key = match self.mapping.key.encode(row) {
            Ok(key) => key,
            Err(poison) => {
                let letter = self.letter(Bytes::new(), poison.to_string(), row);
                return self.keyless.push(Keyless { code: poison.code(), letter });
            }
        };
        if !self.fits(row) {
            self.cut();
        }
        if let Err(too_large) = self.part.push(key.clone(), &self.mapping.layout, row) {
            let letter = self.letter(key.0.clone(), too_large.to_string(), row);
            return self.unwritable.push(Unwritable { key, code: "too_large", letter });
        }
        if self.part.rows() >= self.rows_a_part
            || (self.rows_a_part < usize::MAX && self.part.len_bytes() >= BYTES_A_PART)
        {
            self.cut();
        }
    }

    /// Whether the part that is being made has capacity for this row: a large one is a part of its own.
    fn fits(&self, row: &Row) -> bool {
        let weight = self.part.weight() + self.mapping.weight_of_row(row);
        self.part.rows() == 0 || weight <= self.limits.rows_bytes()
    }

    /// The transaction that wrote the row is not known here, and the position is the writer's to know.
    fn letter(&self, key: Bytes, reason: String, row: &Row) -> DeadLetter {
        let (table, lsn, row) = (self.spec.name.clone(), String::new(), self.mapping.full_row_json(row));
        DeadLetter { table, key, lsn, xid: 0, reason, row }
    }

    fn cut(&mut self) {
        if self.part.rows() > 0 {
            self.parts.push(std::mem::replace(&mut self.part, RowsEncoder::new(self.limits)).finish());
        }
    }

    fn brought(self, read: ReadRows, nonce: Nonce, floor: Floor) -> Brought {
        let Encoded { parts, unwritable, keyless } = self.finish();
        let ReadRows { snapshot, filenode, rest, .. } = read;
        let content = Content::Rows(parts);
        Brought { snapshot, filenode: Some(filenode), content, rest, unwritable, keyless, nonce, floor }
    }

    fn finish(mut self) -> Encoded {
        self.cut();
        let Encoder { mut parts, unwritable, keyless, .. } = self;
        if parts.is_empty() && !unwritable.is_empty() {
            parts.push(EncodedRows::default());
        }
        Encoded { parts, unwritable, keyless }
    }
}
