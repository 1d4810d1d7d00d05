//! Performs the errands of [`crate::loader`]: looks tables up in the catalog, reads chunks of them, each under its own
//! snapshot and followed by a watermark, and scans the keys in Redis.
//!
//! The loader decides what is read and when, and what follows from an answer. Nothing here writes to Redis.

use super::connections::Connections;
use super::load_rate::LoadRate;
use super::{BridgeError, lookup_columns, walk};
use crate::change::{Nonce, Row};
use crate::checkpoint::Blocked;
use crate::command::{DeadLetter, EncodedRows, Key, Unwritable};
use crate::loader::range::{Range, Sizes};
use crate::loader::{
    Again, Asks, Brought, CONNECTION_PATIENCE, Cause, Errand, Got, Heard, Keyless, Loadable, Loader, LookedUp,
    Measures, Reading, Task, Unread, VisitId,
};
use crate::plan::key;
use crate::plan::mapping::{self, Mapping};
use crate::progress::visibility::Snapshot;
use crate::remedy::Sql;
use crate::resp::batch::{Encoding, Limits, Members, RowsEncoder};
use crate::schema::{KeyTemplate, Oid, TableId, TableSpec};
use crate::session::load_messages::{Content, Floor, Floors, FromLoad, KeysToRead, LoadOrder};
use crate::sink::SinkError;
use crate::sink::any_reader::AnyReader;
use crate::source::SourceError;
use crate::source::connect::PostgresClient;
use crate::source::snapshot::{self, Asked, CatalogTable, Part, ReadRange, ReadRows, Wanted};
use crate::typed::known::KnownTypes;
use crate::typed::row_type::{EncodedRowType, RowType};
use bytes::Bytes;
use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::sleep_until;

/// A chunk of large rows ends early, because a chunk is held in memory as a whole.
const BYTES_A_CHUNK: usize = 2 << 20;

/// How much is read at once, and written to Redis in one step.
#[derive(Clone)]
pub struct Pieces {
    measures: Measures,
    part: PartSize,
}

/// A part ends when it has as many rows, or bytes.
#[derive(Clone, Copy)]
struct PartSize {
    rows: usize,
    bytes: usize,
}

impl PartSize {
    const UNLIMITED: Self = PartSize { rows: usize::MAX, bytes: usize::MAX };
}

impl Pieces {
    /// Small enough that changes from the stream never wait long behind them.
    pub fn of_one_transaction() -> Self {
        Pieces { measures: Measures::default(), part: PartSize { rows: 1_000, bytes: 512 << 10 } }
    }

    /// Each hash slot costs a call, whether it gets one row or several. So more rows are written at once, and fewer chunks
    /// are held.
    pub fn of_hash_slots() -> Self {
        let measures = Measures { pages_a_chunk: 128, chunks_out: 3, members: Members::Unknown, ..Measures::default() };
        Pieces { measures, part: PartSize { rows: 16_000, bytes: 4 << 20 } }
    }
}

/// Orders that are passed to the loader at once, so that the tables to be loaded are looked up together.
const ORDERS_AT_ONCE: usize = 1_000;

/// What is needed to perform the loader's errands.
#[derive(Clone)]
pub struct Means {
    pub connections: Connections,
    pub publication: String,
    pub specs: Arc<[TableSpec]>,
    pub known: KnownTables,
    pub reader: AnyReader,
    pub floors: Floors,
    pub pieces: Pieces,
    pub rate: LoadRate,
}

/// The OIDs of the tables that were found under their names in this run of the daemon. A table that has been renamed
/// since is found by its OID.
pub type KnownTables = Arc<Mutex<HashMap<TableId, Oid>>>;

/// A table as it was looked up, and how its rows are written.
#[derive(Clone)]
pub(super) struct Shape {
    pub catalog: Arc<CatalogTable>,
    pub mapping: Arc<Mapping>,
}

/// Runs until the session ends. Returns only errors.
///
/// `retired`: templates of earlier configurations, whose keys are removed.
pub async fn run(
    means: Means,
    limits: Limits,
    retired: Vec<String>,
    mut orders_taken: mpsc::UnboundedReceiver<LoadOrder>,
    out: mpsc::Sender<FromLoad>,
) -> Result<(), BridgeError> {
    let mut loader = Loader::new(means.specs.clone(), limits, means.pieces.measures.clone(), retired);
    let mut errands: JoinSet<Result<Heard<Shape>, BridgeError>> = JoinSet::new();
    let mut todo = loader.start(Instant::now());
    loop {
        for errand in todo {
            match errand {
                Errand::Say(message) => {
                    if let FromLoad::Retired { template } = &*message {
                        tracing::info!(
                            template,
                            "removed the keys of a table or template that is no longer configured"
                        );
                    }
                    out.send(*message).await.map_err(|_| BridgeError::SessionOver)?;
                }
                Errand::BeginsAgain { table, because } => {
                    let table = &means.spec(table).name;
                    match because {
                        Again::Changed => tracing::info!(table, "table changed while loading, reading it again"),
                        Again::Rewritten => {
                            tracing::info!(table, "table was rewritten while loading, reading it again")
                        }
                    }
                }
                errand => _ = errands.spawn(means.clone().run(errand)),
            }
        }
        if loader.is_idle() {
            means.connections.keep_one();
        }
        let (mut orders, wakes_at) = (Vec::new(), loader.wakes_at());
        let heard = tokio::select! {
            count = orders_taken.recv_many(&mut orders, ORDERS_AT_ONCE) => match count {
                0 => return Ok(()),
                _ => Heard::Ordered(orders),
            },
            Some(heard) = errands.join_next() => {
                heard.map_err(|_| BridgeError::Internal("an errand of the loader ended in mid-air"))??
            }
            () = sleep_until(wakes_at.unwrap_or_else(Instant::now).into()), if wakes_at.is_some() => Heard::Woke,
        };
        let now = Instant::now();
        if let Some(until) = means.rate.rests_until(now) {
            loader.rests_until(until);
        }
        todo = loader.hears(heard, now);
    }
}

impl Means {
    fn spec(&self, table: TableId) -> &TableSpec {
        &self.specs[table.index()]
    }

    async fn run(self, errand: Errand<Shape>) -> Result<Heard<Shape>, BridgeError> {
        match errand {
            Errand::LookUp { tables, sizes, asks } => self.look_up(&tables, sizes, asks).await,
            Errand::FindEmpty { tables, asks } => self.find_empty(&tables, asks).await,
            Errand::Scan { prefix, cursor, enough, asks } => {
                match walk::pages(&self.reader, &prefix, cursor, enough).await {
                    Err(refused) => refused_for(asks, refused),
                    Ok((next, keys)) => Ok(Heard::Scanned { next, keys }),
                }
            }
            Errand::Visit { visit, asks, parts } => self.visit(visit, asks, &parts).await,
            Errand::Say(_) | Errand::BeginsAgain { .. } => unreachable!("it is said at once"),
        }
    }

    async fn take(&self, asks: Asks) -> Result<PostgresClient, BridgeError> {
        match asks {
            Asks::Load => self.connections.take().await,
            Asks::Comparison => self.connections.take_within(CONNECTION_PATIENCE).await,
        }
    }

    /// # Errors
    /// If a lookup for a load failed and a retry would fail as well.
    async fn look_up(&self, tables: &[TableId], sizes: Sizes, asks: Asks) -> Result<Heard<Shape>, BridgeError> {
        let client = match self.take(asks).await {
            Err(BridgeError::Source(error)) if asks == Asks::Comparison && error.is_about_the_query() => {
                return Ok(Heard::NotLookedUp(unread(&error)));
            }
            client => client?,
        };
        let specs: Vec<&TableSpec> = tables.iter().map(|table| self.spec(*table)).collect();
        match look_up(&client, &specs, &self.publication, sizes, &self.known).await {
            Ok(tables) => {
                self.connections.give_back(client);
                Ok(Heard::LookedUp(tables))
            }
            Err(error) if !error.is_about_the_query() => {
                self.connections.failed(&error);
                Ok(Heard::NotLookedUp(unread(&error)))
            }
            Err(error) => {
                self.connections.give_back(client);
                match asks {
                    Asks::Comparison => {}
                    Asks::Load if error.is_transient_query_failure() => self.connections.failed(&error),
                    Asks::Load => return Err(error.into()),
                }
                Ok(Heard::NotLookedUp(unread(&error)))
            }
        }
    }

    async fn find_empty(&self, tables: &[TableId], asks: Asks) -> Result<Heard<Shape>, BridgeError> {
        let prefixes: Vec<&str> = tables.iter().flat_map(|table| self.spec(*table).literals()).collect();
        let is_empty =
            |table: &TableId, empty: &HashSet<&str>| self.spec(*table).literals().all(|of| empty.contains(of));
        match walk::empty(&self.reader, &prefixes).await {
            Err(refused) => refused_for(asks, refused),
            Ok(empty) => Ok(Heard::Empty(tables.iter().copied().filter(|table| is_empty(table, &empty)).collect())),
        }
    }

    /// Reads one chunk, or several of small tables: their rows under one snapshot, then a watermark for each.
    async fn visit(&self, visit: VisitId, asks: Asks, parts: &[Reading<Shape>]) -> Result<Heard<Shape>, BridgeError> {
        let client = match self.take(asks).await {
            Ok(client) => client,
            Err(BridgeError::Source(error)) if error.is_about_the_query() => {
                return Ok(Heard::NotVisited(visit, unread(&error)));
            }
            Err(error) => return Err(error),
        };
        let before = client.received();
        let got = match parts {
            [one] => self.read_alone(&client, one).await.map(|got| vec![got]),
            several => self.read_together(&client, several).await,
        };
        self.rate.spend(client.received() - before, Instant::now());
        // The state of a lost connection is unknown, so it is not returned to the pool.
        if got.as_ref().err().is_none_or(SourceError::is_about_the_query) {
            self.connections.give_back(client);
        }
        match got {
            Ok(got) => {
                self.connections.worked();
                Ok(Heard::Visited(visit, got))
            }
            Err(error) => {
                let passes = matches!(cause_of(&error), Cause::Query | Cause::Connection);
                if passes && !(asks == Asks::Comparison && error.is_about_the_query()) {
                    self.connections.failed(&error);
                }
                Ok(Heard::NotVisited(visit, unread(&error)))
            }
        }
    }

    async fn read_alone(
        &self,
        client: &PostgresClient,
        Reading { table, task, encoding, described }: &Reading<Shape>,
    ) -> Result<Got, SourceError> {
        // Registered before the snapshot is taken, so that transactions which the snapshot may miss stay recorded from
        // here on.
        let floor = self.floors.open();
        let spec = self.spec(*table);
        let brought = match task {
            Task::Range(range) => {
                return self.read_range(client, described, spec, range, *encoding, floor).await;
            }
            Task::Orphans(keys) => read_existing(client, described, &spec.key, keys, floor).await?,
            Task::Keys(keys) => read_keys(client, described, spec, keys, *encoding, floor).await?,
        };
        Ok(Got::Brought(Box::new(brought)))
    }

    async fn read_range(
        &self,
        client: &PostgresClient,
        shape: &Shape,
        spec: &TableSpec,
        range: &Range,
        encoding: Encoding,
        floor: Floor,
    ) -> Result<Got, SourceError> {
        let mut rows = Encoder::new(spec, &shape.mapping, encoding, self.pieces.part);
        let most = self.rate.bytes_a_chunk(BYTES_A_CHUNK);
        let mut range = range.clone();
        // If the chunk holds less than the range, the server should not send rows that are then thrown away.
        if most < BYTES_A_CHUNK && range.at_most_rows.is_none() {
            range.at_most_rows = shape.catalog.estimated.rows_in(most);
        }
        let part = Part { table: &shape.catalog, range: &range };
        match snapshot::read_range(client, part, most, |row| rows.push(&row)).await? {
            ReadRange::Rows(read) => Ok(Got::Brought(Box::new(rows.brought(read, mark(client).await?, floor)?))),
            ReadRange::Gone => Ok(Got::Gone),
        }
    }

    /// Reads ranges of several tables. What did not fit beside the others is read alone.
    async fn read_together(
        &self,
        client: &PostgresClient,
        several: &[Reading<Shape>],
    ) -> Result<Vec<Got>, SourceError> {
        let (mut parts, mut encoders) = (Vec::new(), Vec::new());
        for Reading { table, task, encoding, described } in several {
            let Task::Range(range) = task else { unreachable!("only ranges are read together") };
            parts.push(Part { table: &described.catalog, range });
            let encoder = Encoder::new(self.spec(*table), &described.mapping, *encoding, self.pieces.part);
            encoders.push((encoder, self.floors.open()));
        }
        let on_row = |place: usize, row: Row| encoders[place].0.push(&row);
        let read = snapshot::read_ranges(client, &parts, self.rate.bytes_a_chunk(BYTES_A_CHUNK), on_row).await?;
        let mut nonces = marks(client, read.len()).await?.into_iter();
        let mut read = read.into_iter();
        let mut got = Vec::with_capacity(several.len());
        for (rows, floor) in encoders {
            got.push(match (read.next(), nonces.next()) {
                (Some(ReadRange::Rows(read)), Some(nonce)) => Got::Brought(Box::new(rows.brought(read, nonce, floor)?)),
                (Some(_), _) => Got::Gone,
                (None, _) => Got::Crowded,
            });
        }
        Ok(got)
    }
}

/// A failed comparison affects only whoever requested it, so the session continues.
fn refused_for(asks: Asks, error: SinkError) -> Result<Heard<Shape>, BridgeError> {
    match error {
        refused @ SinkError::Refused { .. } if asks == Asks::Comparison => {
            Ok(Heard::Refused { why: refused.to_string() })
        }
        error => Err(error.into()),
    }
}

fn unread(error: &SourceError) -> Unread {
    Unread { cause: cause_of(error), text: error.to_string(), why: blocked_by(error) }
}

fn cause_of(error: &SourceError) -> Cause {
    match error {
        error if error.is_about_a_lock() => Cause::Lock,
        error if error.is_about_the_table() => Cause::Table,
        error if error.is_about_the_query() => Cause::Query,
        _ => Cause::Connection,
    }
}

/// Returns why a table cannot be read.
pub(super) fn blocked_by(error: &SourceError) -> Blocked {
    let (because, remedy) = error.fact_and_remedy();
    Blocked { because, remedy }
}

/// Returns the tables as the catalog describes them now, in the order of `specs`.
pub(super) async fn look_up(
    client: &PostgresClient,
    specs: &[&TableSpec],
    publication: &str,
    sizes: Sizes,
    known: &KnownTables,
) -> Result<Vec<LookedUp<Shape>>, SourceError> {
    let asked: Vec<Asked<'_>> = specs.iter().map(|spec| Asked { name: &spec.table, chosen: &spec.columns }).collect();
    let described = snapshot::describe_all(&client.client, &asked, publication, sizes).await?;
    let booleans = snapshot::boolean_types(&client.client).await?;
    let mut out = Vec::with_capacity(specs.len());
    for (spec, described) in specs.iter().zip(described) {
        out.push(match described {
            Ok(Some(catalog)) => {
                known.lock().unwrap_or_else(PoisonError::into_inner).insert(spec.id, catalog.oid);
                let known_types = catalog.known_types(spec.format, &booleans);
                match bind(spec, catalog, publication, &known_types) {
                    Ok(shape) => LookedUp::Loadable(loadable(shape, known_types)),
                    Err(why) => LookedUp::Blocked(why),
                }
            }
            Ok(None) => {
                let oid = known.lock().unwrap_or_else(PoisonError::into_inner).get(&spec.id).copied();
                LookedUp::Blocked(missing(client, spec, oid).await?)
            }
            Err(error) if error.is_about_a_lock() => LookedUp::Locked(blocked_by(&error)),
            Err(error) => LookedUp::Blocked(blocked_by(&error)),
        });
    }
    Ok(out)
}

/// Returns what its columns become in JSON.
fn types(Shape { catalog, mapping }: &Shape) -> EncodedRowType {
    RowType::of(&mapping.layout, |cell| catalog.columns[cell].json.clone()).encode()
}

fn loadable(shape: Shape, known_types: KnownTypes) -> Loadable<Shape> {
    Loadable {
        fingerprint: shape.mapping.fingerprint,
        catalog: shape.catalog.mark(),
        types: types(&shape),
        estimated_rows: shape.catalog.estimated.rows,
        known_types,
        extent: shape.catalog.extent(),
        composition: shape.catalog.composition(),
        described: shape,
    }
}

/// Returns how the rows of a table are written, or why they cannot be.
fn bind(spec: &TableSpec, catalog: CatalogTable, publication: &str, types: &KnownTypes) -> Result<Shape, Blocked> {
    if !catalog.published.is_listed {
        return Err(Blocked {
            because: format!("table {} is not in publication {publication}", spec.table),
            remedy: Sql::AddTable { publication, table: &spec.table }.to_string(),
        });
    }
    mapping::check_identity(spec, catalog.identity, &catalog.identity_columns, &catalog.relation())
        .map_err(|why| Blocked::from_message(&why.to_string()))?;
    let bound = Mapping::bind(spec, &catalog.relation(), types);
    match bound.and_then(|mapping| lookup_columns::check(spec, &catalog).map(|()| mapping)) {
        Ok(mapping) => Ok(Shape { catalog: Arc::new(catalog), mapping: Arc::new(mapping) }),
        Err(error) => Err(Blocked::from_message(&error.knowing(&catalog.generated).to_string())),
    }
}

/// No table has this name. The OID under which it was known may have another name now.
async fn missing(client: &PostgresClient, spec: &TableSpec, oid: Option<Oid>) -> Result<Blocked, SourceError> {
    let (table, name) = (&spec.table, &spec.name);
    let now = match oid {
        Some(oid) => snapshot::name_of(&client.client, oid).await?,
        None => None,
    };
    Ok(match (now, oid) {
        (Some(now), _) => Blocked {
            because: format!("table {table} is called {now} now"),
            remedy: format!(
                "write table = \"{now}\" for {name} in the configuration, then prefetchd reload; or take its name back: {}",
                Sql::Move { from: &now, to: table }
            ),
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

async fn read_keys(
    client: &PostgresClient,
    shape: &Shape,
    spec: &TableSpec,
    KeysToRead { keys, checks, .. }: &KeysToRead,
    encoding: Encoding,
    floor: Floor,
) -> Result<Brought, SourceError> {
    let mut rows = Encoder::new(spec, &shape.mapping, encoding, PartSize::UNLIMITED);
    let template = &spec.key;
    // Rows that do not fit into the same batch are left for another read.
    let mut unread: HashSet<Key> = HashSet::new();
    let values: Vec<Vec<Bytes>> = keys.iter().filter_map(|k| key::decode(template, k)).collect();
    let snapshot = snapshot::read_keys(client, &shape.catalog, &template.columns, &values, Wanted::WholeRows, |row| {
        if rows.fits(&row) {
            return rows.push(&row);
        }
        unread.extend(shape.mapping.key.encode(&row));
    })
    .await?;
    let nonce = mark(client).await?;
    let Encoded { mut parts, unwritable, keyless } = rows.finish();
    let (unread, asked) = keys.iter().cloned().partition(|key| unread.contains(key));
    let (found, mapped_as) = (parts.pop().unwrap_or_default(), shape.mapping.fingerprint);
    let content = Content::Keys { asked, found, unread, checks: *checks, mapped_as };
    let snapshot = parsed(&snapshot)?;
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
    let snapshot = snapshot::read_keys(client, &shape.catalog, &template.columns, &values, Wanted::KeysOnly, |row| {
        exist.insert(shape.mapping.key.encode_key_row(&row));
    })
    .await?;
    let nonce = mark(client).await?;
    let content = Content::Orphans { asked: keys.to_vec(), exist };
    let (unwritable, keyless) = (Vec::new(), Vec::new());
    let snapshot = parsed(&snapshot)?;
    Ok(Brought { snapshot, filenode: None, content, rest: None, unwritable, keyless, nonce, floor })
}

fn parsed(snapshot: &str) -> Result<Snapshot, SourceError> {
    snapshot.parse().map_err(|_| SourceError::unexpected("reading rows", format!("a malformed snapshot: {snapshot}")))
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

/// Encodes rows as RESP here, so that the writer does not have to.
struct Encoder<'a> {
    spec: &'a TableSpec,
    mapping: &'a Mapping,
    encoding: Encoding,
    parts: Vec<EncodedRows>,
    part: RowsEncoder,
    size: PartSize,
    unwritable: Vec<Unwritable>,
    keyless: Vec<Keyless>,
}

struct Encoded {
    /// Contains at least one part if there is anything to report about any row.
    parts: Vec<EncodedRows>,
    unwritable: Vec<Unwritable>,
    keyless: Vec<Keyless>,
}

impl<'a> Encoder<'a> {
    fn new(spec: &'a TableSpec, mapping: &'a Mapping, encoding: Encoding, size: PartSize) -> Self {
        let (part, parts) = (RowsEncoder::new(encoding, mapping.lookups.clone()), Vec::new());
        let (unwritable, keyless) = (Vec::new(), Vec::new());
        Encoder { spec, mapping, encoding, parts, part, size, unwritable, keyless }
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
        if let Err(why) = self.part.push(key.clone(), &self.mapping.layout, row) {
            let letter = self.letter(key.0.clone(), why.to_string(), row);
            return self.unwritable.push(Unwritable { key, code: why.code(), letter });
        }
        if self.part.rows() >= self.size.rows || self.part.len_bytes() >= self.size.bytes {
            self.cut();
        }
    }

    /// Returns whether the current part has capacity for this row. A large row becomes a part of its own.
    fn fits(&self, row: &Row) -> bool {
        let weight = self.part.weight() + self.mapping.weight_of_row(row);
        self.part.rows() == 0 || weight <= self.encoding.limits.rows_bytes()
    }

    /// The transaction that wrote the row is unknown here, and only the writer knows the position.
    fn letter(&self, key: Bytes, reason: String, row: &Row) -> DeadLetter {
        let (table, lsn, row) = (self.spec.name.clone(), String::new(), self.mapping.full_row_json(row));
        DeadLetter { table, key, lsn, xid: 0, reason, row }
    }

    fn cut(&mut self) {
        if self.part.rows() > 0 {
            self.parts.push(self.part.take());
        }
    }

    fn brought(self, read: ReadRows, nonce: Nonce, floor: Floor) -> Result<Brought, SourceError> {
        let Encoded { parts, unwritable, keyless } = self.finish();
        let ReadRows { snapshot, filenode, rest, .. } = read;
        let (snapshot, content) = (parsed(&snapshot)?, Content::Rows(parts));
        Ok(Brought { snapshot, filenode: Some(filenode), content, rest, unwritable, keyless, nonce, floor })
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
