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
use crate::source::snapshot::{self, CatalogTable, Range, Sizes, Wanted};
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
    /// Where each leaf's rows lay when the load began.
    filenodes: Option<Vec<(Oid, Oid)>>,
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
    result: Result<Brought, SourceError>,
}

struct Brought {
    snapshot: String,
    filenodes: Vec<(Oid, Oid)>,
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
    reading: JoinSet<Result<Read, BridgeError>>,
    /// How many of them read single keys again.
    reading_keys: usize,
    /// Handed over, with the rows that have no key: those are told once the rest is written, since some are read again.
    judged: HashMap<ChunkId, (Job, Vec<Keyless>)>,
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
        loop {
            self.dispatch(&mut work).await?;
            if work.is_idle() {
                self.connections.keep_one();
            }
            let pause = work.resume_at;
            tokio::select! {
                order = self.orders.recv() => match order {
                    Some(order) => self.obey(order, &mut work).await?,
                    None => return Ok(()),
                },
                Some(read) = work.reading.join_next() => {
                    let read = read.map_err(|_| BridgeError::Internal("a reading task ended in mid-air"))??;
                    self.took(read, &mut work).await?;
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

    /// A table as it is now, or why it cannot be followed. Where the connection is lost, it is asked for on another.
    /// For a load it is asked again where the server could not answer this time, or somebody has the table locked whose
    /// size is not asked for.
    async fn look_up(&self, table: TableId, sizes: Sizes, asks: Asks) -> Result<Result<Shape, Blocked>, BridgeError> {
        let mut backoff = Backoff::default();
        let began = Instant::now();
        loop {
            let client = take(&self.connections, asks).await?;
            match look_up(&client, self.spec(table), &self.publication, sizes, &self.known).await {
                Err(BridgeError::Source(error)) if !error.is_about_the_query() => {
                    self.connections.failed(&error);
                    if asks == Asks::Comparison && began.elapsed() >= COMPARISON_CONNECTION_PATIENCE {
                        return Ok(Err(blocked_by(&error)));
                    }
                    sleep(backoff.next_delay()).await;
                }
                Err(BridgeError::Source(error))
                    if asks == Asks::Load
                        && (error.is_transient_query_failure()
                            || error.is_about_a_lock() && sizes == Sizes::Remembered) =>
                {
                    self.connections.failed(&error);
                    self.connections.give_back(client);
                    sleep(backoff.next_delay()).await;
                }
                answered => {
                    self.connections.give_back(client);
                    return answered;
                }
            }
        }
    }

    async fn obey(&mut self, order: LoadOrder, work: &mut Work) -> Result<(), BridgeError> {
        match order {
            LoadOrder::Table { table, load, purpose, .. } => self.begin(table, load, purpose, work).await,
            LoadOrder::Keys(keys) => {
                work.keys.push_back(keys);
                Ok(())
            }
            LoadOrder::Verdict(chunk, verdict) => self.judged(chunk, verdict, work).await,
            LoadOrder::Abandon(table, load) => self.abandon(table, load, work).await,
        }
    }

    /// The machine counts the reads of keys that it has ordered: it is told of those that nobody will make.
    async fn abandon(&self, table: TableId, load: LoadId, work: &mut Work) -> Result<(), BridgeError> {
        for _ in 0..work.abandon(table, load) {
            self.say(FromLoad::KeysNotRead).await?;
        }
        Ok(())
    }

    async fn begin(
        &mut self,
        table: TableId,
        load: LoadId,
        purpose: Purpose,
        work: &mut Work,
    ) -> Result<(), BridgeError> {
        work.loads.remove(&table);
        work.unread_since.remove(&table);
        let asks = purpose.into();
        let mut looked_up = self.look_up(table, Sizes::Measured, asks).await;
        if matches!(&looked_up, Err(BridgeError::Source(error)) if error.is_about_a_lock()) {
            // Its size is a matter of the chunks only, and those wait for the lock by themselves.
            looked_up = self.look_up(table, Sizes::Remembered, asks).await;
        }
        let looked_up = match looked_up {
            Err(BridgeError::Source(error)) if purpose != Purpose::Fill && error.is_about_the_query() => {
                Err(blocked_by(&error))
            }
            Err(BridgeError::Source(error)) if error.is_about_the_table() && !error.is_about_a_lock() => {
                Err(blocked_by(&error))
            }
            looked_up => looked_up?,
        };
        match looked_up {
            Err(why) if purpose != Purpose::Fill => self.not_compared(table, load, why.to_string(), work).await,
            Err(why) => self.say(FromLoad::Blocked { table, why }).await,
            Ok(shape) => {
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
                // Where nothing of it lay in Redis before the session's first load began, all that lies there later was
                // written by this session, and is what the stream says: none of it is an orphan. What an earlier load
                // wrote may be one: rows can leave a table without a word in the stream.
                let first = work.begun.insert(table);
                let empty = match first {
                    true => walk::is_empty(&self.reader, &self.spec(table).key.literal).await,
                    false => Ok(false),
                };
                let empty = match empty {
                    Err(refused @ SinkError::Refused { .. }) if purpose != Purpose::Fill => {
                        return self.not_compared(table, load, refused.to_string(), work).await;
                    }
                    empty => empty?,
                };
                let (out, sweep) = (0, if empty { Sweep::Done } else { Sweep::NotYet });
                let active = Active { id: load, purpose, attempt, shape, filenodes: None, todo, out, sweep };
                work.loads.insert(table, active);
                self.advance(table, work).await
            }
        }
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
        while work.resume_at.is_none()
            && work.reading.len() < READERS
            && work.reading.len() + work.judged.len() < CHUNKS_OUT
        {
            let load_waits = work.loads.values().any(|a| !a.todo.is_empty());
            // One reader is left to a load: keys that keep changing must not keep it from its end.
            let keys = if load_waits && work.reading_keys > 0 { None } else { work.keys.pop_front() };
            let (job, shape, asks) = if let Some(keys) = keys {
                let table = keys.table;
                let asks = keys.checks.map_or(Asks::Load, |_| Asks::Comparison);
                let known = work.loads.get(&table).map(|active| active.shape.clone());
                let shape = match known {
                    Some(shape) => shape,
                    None => {
                        let looked_up = match self.look_up(table, Sizes::Remembered, asks).await {
                            Err(BridgeError::Source(error)) if keys.checks.is_some() && error.is_about_the_query() => {
                                Err(blocked_by(&error))
                            }
                            Err(BridgeError::Source(error))
                                if error.is_about_the_table() && !error.is_about_a_lock() =>
                            {
                                Err(blocked_by(&error))
                            }
                            looked_up => looked_up?,
                        };
                        match (looked_up, keys.checks) {
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
                        }
                    }
                };
                work.reading_keys += 1;
                (Job::Keys(keys), shape, asks)
            } else if let Some((table, active)) = work.loads.iter_mut().find(|(_, a)| !a.todo.is_empty()) {
                let Some(task) = active.todo.pop_front() else { continue };
                active.out += 1;
                let job = Job::Load { table: *table, load: active.id, attempt: active.attempt, task };
                (job, active.shape.clone(), active.purpose.into())
            } else {
                return Ok(());
            };
            let spec = self.spec(shape.mapping.table).clone();
            // A row that is to be compared is read again from its commands, and so is a single one.
            let packs = matches!(job, Job::Load { .. }) && asks == Asks::Load;
            let limits = if packs { self.limits } else { self.limits.unpacked() };
            let (connections, floors) = (self.connections.clone(), self.floors.clone());
            work.reading.spawn(read(connections, job, asks, shape, spec, floors, limits));
        }
        Ok(())
    }

    /// A chunk is here: hand it over, its mark is in the WAL.
    async fn took(&mut self, read: Read, work: &mut Work) -> Result<(), BridgeError> {
        let Read { mut job, result } = read;
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
            Err(error) if comparison.is_some() && work.gives_up_on(table, &error) => {
                if let Some(load) = comparison {
                    self.not_compared(table, load, error.to_string(), work).await?;
                }
                return match job {
                    Job::Keys(_) => self.say(FromLoad::KeysNotRead).await,
                    Job::Load { .. } => Ok(()),
                };
            }
            // Nothing is wrong with the table: somebody else has it for a while.
            Err(error) if error.is_about_a_lock() => {
                work.again(table, job);
                return Ok(());
            }
            Err(error) if error.is_about_the_table() => {
                work.loads.remove(&table);
                self.say(FromLoad::Blocked { table, why: blocked_by(&error) }).await?;
                return match job {
                    Job::Keys(_) => self.say(FromLoad::KeysNotRead).await,
                    Job::Load { .. } => Ok(()),
                };
            }
            // The connection was lost, or the server could not do it this time. The stream goes on; should the server be away
            // altogether, it is the stream that notices.
            Err(error) => {
                self.connections.failed(&error);
                work.resume_at = Some(Instant::now() + work.backoff.next_delay());
                work.again(table, job);
                return Ok(());
            }
        };
        if let (Job::Load { task: Task::Range(_), .. }, Some(active)) = (&job, work.loads.get_mut(&table)) {
            match &active.filenodes {
                Some(at_first) if *at_first != brought.filenodes => {
                    // Rows moved without a word in the stream (VACUUM FULL, CLUSTER): what was covered is not known.
                    tracing::info!(
                        table = self.spec(table).name,
                        "table was rewritten while loading, reading it again"
                    );
                    let (load, purpose) = (active.id, active.purpose);
                    return self.begin(table, load, purpose, work).await;
                }
                Some(_) => {}
                None => active.filenodes = Some(brought.filenodes.clone()),
            }
            if let (Job::Load { task: Task::Range(range), .. }, Some(rest)) = (&mut job, &brought.rest) {
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
        work.judged.insert(id, (job, keyless));
        let Brought { nonce, content, unwritable, floor, .. } = brought;
        let chunk = Chunk { id, table, load, nonce, snapshot, content, unwritable, floor };
        self.say(FromLoad::Chunk(chunk)).await
    }

    async fn judged(&mut self, chunk: ChunkId, verdict: Verdict, work: &mut Work) -> Result<(), BridgeError> {
        let Some((job, keyless)) = work.judged.remove(&chunk) else { return Ok(()) };
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

/// A table as the catalog has it now, or why it cannot be followed.
pub(super) async fn look_up(
    client: &PostgresClient,
    spec: &TableSpec,
    publication: &str,
    sizes: Sizes,
    known: &KnownTables,
) -> Result<Result<Shape, Blocked>, BridgeError> {
    let Some(catalog) = snapshot::describe(&client.client, &spec.table, publication, &spec.columns, sizes).await?
    else {
        let oid = known.lock().unwrap_or_else(PoisonError::into_inner).get(&spec.id).copied();
        return Ok(Err(missing(client, spec, oid).await?));
    };
    known.lock().unwrap_or_else(PoisonError::into_inner).insert(spec.id, catalog.oid);
    if !catalog.published {
        return Ok(Err(Blocked {
            because: format!("table {} is not in publication {publication}", spec.table),
            remedy: Sql::AddTable { publication, table: &spec.table }.to_string(),
        }));
    }
    if let Err(why) = mapping::check_identity(spec, catalog.identity, &catalog.identity_columns, &catalog.relation()) {
        return Ok(Err(Blocked::from_message(&why.to_string())));
    }
    let booleans = snapshot::boolean_types(&client.client).await?;
    let bound = Mapping::bind(spec, &catalog.relation(), &booleans);
    Ok(match bound.map_err(|error| error.knowing(&catalog.generated)) {
        Ok(mapping) => Ok(Shape { catalog: Arc::new(catalog), mapping: Arc::new(mapping), booleans }),
        Err(why) => Err(Blocked::from_message(&why.to_string())),
    })
}

/// Nothing has the name of the table. Its oid may have another one now.
async fn missing(client: &PostgresClient, spec: &TableSpec, oid: Option<Oid>) -> Result<Blocked, BridgeError> {
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

/// One chunk: its rows under one snapshot, then its mark.
async fn read(
    connections: Connections,
    job: Job,
    asks: Asks,
    shape: Shape,
    spec: TableSpec,
    floors: Floors,
    limits: Limits,
) -> Result<Read, BridgeError> {
    let client = match take(&connections, asks).await {
        Ok(client) => client,
        Err(BridgeError::Source(error)) if error.is_about_the_query() => return Ok(Read { job, result: Err(error) }),
        Err(error) => return Err(error),
    };
    // Before the snapshot is taken: what it may miss stays on record from here on.
    let floor = floors.open();
    let result = match &job {
        Job::Load { task: Task::Range(range), .. } => read_range(&client, &shape, &spec, range, limits, floor).await,
        Job::Load { task: Task::Orphans(keys), .. } => read_existing(&client, &shape, &spec.key, keys, floor).await,
        Job::Keys(keys) => read_keys(&client, &shape, &spec, keys, limits, floor).await,
    };
    match &result {
        // It is lost, or in a state that nobody knows.
        Err(error) if !error.is_about_the_query() => drop(client),
        Ok(_) | Err(_) => connections.give_back(client),
    }
    Ok(Read { job, result })
}

async fn read_range(
    client: &PostgresClient,
    shape: &Shape,
    spec: &TableSpec,
    range: &Range,
    limits: Limits,
    floor: Floor,
) -> Result<Brought, SourceError> {
    let mut rows = Encoder::new(spec, &shape.mapping, limits, ROWS_A_PART);
    let read = snapshot::read_range(client, &shape.catalog, range, BYTES_A_CHUNK, |row| rows.push(&row)).await?;
    let nonce = mark(client).await?;
    let Encoded { parts, unwritable, keyless } = rows.finish();
    let (content, filenodes, rest) = (Content::Rows(parts), read.filenodes, read.rest);
    Ok(Brought { snapshot: read.snapshot, filenodes, content, rest, unwritable, keyless, nonce, floor })
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
    let read =
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
    let (filenodes, rest) = (Vec::new(), None);
    Ok(Brought { snapshot: read.snapshot, filenodes, content, rest, unwritable, keyless, nonce, floor })
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
    let read =
        snapshot::read_keys(&client.client, &shape.catalog, &template.columns, &values, Wanted::KeysOnly, |row| {
            exist.insert(shape.mapping.key.encode_key_row(&row));
        })
        .await?;
    let nonce = mark(client).await?;
    let content = Content::Orphans { asked: keys.to_vec(), exist };
    let (filenodes, rest, unwritable, keyless) = (Vec::new(), None, Vec::new(), Vec::new());
    Ok(Brought { snapshot: read.snapshot, filenodes, content, rest, unwritable, keyless, nonce, floor })
}

async fn mark(client: &PostgresClient) -> Result<Nonce, SourceError> {
    let mut nonce = [0; 16];
    getrandom::fill(&mut nonce).map_err(|e| SourceError::unexpected("making a mark", e.to_string()))?;
    snapshot::emit_mark(&client.client, Nonce(nonce)).await?;
    Ok(Nonce(nonce))
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

    fn finish(mut self) -> Encoded {
        self.cut();
        let Encoder { mut parts, unwritable, keyless, .. } = self;
        if parts.is_empty() && !unwritable.is_empty() {
            parts.push(EncodedRows::default());
        }
        Encoded { parts, unwritable, keyless }
    }
}
