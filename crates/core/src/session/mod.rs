//! The apply machine: what arrives goes in, what is to be done comes out. Pure: no I/O, no async, no clock of its own.
//!
//! Everything that is written to Redis passes through here, in one order. While one batch is on its way, the next one
//! grows from whatever arrives; a batch is sent as soon as the writer is free. Any failure of the batch on its way ends
//! the session, and the next session starts from the checkpoint in Redis: nothing here is ever undone.
//!
//! It must not know SQL, wire bytes or HTTP. Wrong here means: torn rows, rows that go backwards, changes confirmed that
//! Redis does not have.

pub mod chunk;
mod dead;
pub mod inspect;
mod leave;
mod loads;
mod operate;
pub mod operation;
mod stream;
pub mod takeover;

use crate::admin::{Answer, Operation, Refusal, Repair, Scope, Tally};
use crate::change::{Begin, Change, CommitTime, Delivery, Nonce};
use crate::checkpoint::{Blocked, Checkpoint, LastTransaction, TableMark, TableState, Within};
use crate::command::Op;
use crate::command::{self, Command, DeadKey, DeadLetter, EncodedRows, Key, Unwritable};
use crate::lsn::{AppliedLsn, EndLsn, Lsn};
use crate::plan::batch::Batch;
use crate::plan::key;
use crate::plan::mapping::Mapping;
use crate::progress::freshness::Freshness;
use crate::progress::ledger::{ConfirmedLsn, Ledger};
use crate::progress::resume::{CameBy, HistoryWatch};
use crate::progress::visibility::{Judged, Record, Recording, Snapshot};
use crate::reason::{Heal, Reason};
use crate::resp::batch::{Batch as RedisBatch, Limits, OwnKeys, TooLarge};
use crate::schema::{CatalogMark, Oid, Relation, TableId, TableSpec};
use crate::session::inspect::{Comparison, Differences, Probe};
use bytes::Bytes;
use chunk::{
    CatalogSeen, Chunk, ChunkId, Content, FromLoad, KeysToRead, LoadId, LoadOrder, Purpose, RenewalPage, Verdict,
};
use dead::{DeadKeys, Letter};
use operation::{AskId, Heavy, Running};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

pub use dead::DEAD_KEYS;

/// How often the checkpoint is written when nothing else writes it.
pub const BEAT: Duration = Duration::from_secs(1);
/// A growing batch takes no more from the stream beyond this many changes: long enough to use Redis well, short enough
/// that a commit does not wait for a backlog behind it.
const BATCH_CHANGES: u64 = 4_000;
/// ... or this many bytes of the stream: rows are slices of what was read, whatever else was read with them.
const BATCH_BYTES: usize = 4 << 20;
/// What a change weighs beside its row: its message's frame, and its place in memory.
const CHANGE_BYTES: usize = 128;
/// Chunks that may wait for their turn here; more stay in the loader's channel.
const CHUNKS_HELD: usize = 4;
/// Keys of one table that wait to be read again. Beyond it the table is loaded as a whole.
const PENDING_KEYS: usize = 20_000;
/// Keys read again in one query.
const KEYS_A_READ: usize = 500;
/// Events kept for listeners, a batch. They see at most 100 a second.
const EVENTS_A_BATCH: usize = 256;
/// Marks that came by before their chunk did. Foreign ones are among them and are forgotten first.
const MARKS_HELD: usize = 1_024;
/// Reads of single keys under way at once.
const KEY_READS_OUT: usize = 2;
/// From one load because of evictions to the next: at first, and at most.
const EVICTION_PAUSE: Duration = Duration::from_secs(10);
const EVICTION_PAUSE_LONGEST: Duration = Duration::from_secs(300);
/// After a comparison that nobody asked for and that could not be made, until the next one. Sooner where that is due.
const COMPARISON_RETRY: Duration = Duration::from_secs(300);
/// How long a table that cannot be followed is left alone.
const BROKEN_RETRY: Duration = Duration::from_secs(10);

/// What the machine may be told.
#[derive(Debug)]
pub enum Input {
    /// `bytes`: what the items may keep in memory.
    Delivered {
        items: Vec<Delivery>,
        bytes: usize,
    },
    Load(FromLoad),
    Renew(RenewalPage),
    /// The answers to [`Effect::Probe`], in its order.
    Probed(Vec<Probe>),
    /// Keys that lie under the prefix of [`Effect::Scan`], and the cursor to go on from: 0 at the end.
    Scanned {
        keys: Vec<Key>,
        next: u64,
    },
    /// Redis acknowledged [`Effect::Execute`].
    Executed {
        redis_time_ms: u64,
    },
    Sampled {
        snapshot: Snapshot,
        flushed: Lsn,
    },
    Catalog(TableId, CatalogSeen),
    /// So many keys has Redis removed by itself since it started.
    Evicted(u64),
    /// The answer to [`Effect::Compare`].
    Compared(Differences),
    /// The other answer: Redis refuses to show what is there.
    NotCompared(String),
    /// An operator asks, and is answered by [`Effect::Answer`].
    Asked(AskId, Operation),
    /// Everything up to here is as safe in Redis as was asked for.
    Durable(AppliedLsn),
    /// A reader waits for a position: ask for it, and write it down at once.
    PositionWanted,
    Tick,
}

/// What is to be done. At most one of `Probe`, `Scan`, `Compare`, `Execute` at a time: each answers with an input.
#[derive(Debug)]
pub enum Effect {
    /// Which of these keys are hashes? They stay watched until the next execution.
    Probe(Vec<Key>),
    /// Which keys lie under this prefix, from this cursor on? Some `limit`, and not for longer than a beat may wait.
    Scan {
        prefix: Bytes,
        cursor: u64,
        limit: usize,
    },
    /// What is there at these keys?
    Compare(Comparison),
    Execute {
        batch: RedisBatch,
        checkpoint: Vec<u8>,
        changes: u64,
    },
    Order(LoadOrder),
    Applied(Box<Applied>),
    /// Every key of the page of this table was renewed: the next one may come.
    Renewed(TableId),
    TableLoaded {
        table: TableId,
        rows: u64,
        started: Instant,
        because: Reason,
    },
    /// What a comparison found, which has ended.
    TableCompared {
        table: TableId,
        what: Heavy,
        tally: Tally,
        started: Instant,
    },
    /// A comparison was given up. The table stays as it is.
    TableNotCompared {
        table: TableId,
        what: Heavy,
        why: String,
    },
    /// Every table that an operation was about is done.
    Compared {
        what: Heavy,
        tally: Tally,
        elapsed: Duration,
    },
    Answer(AskId, Result<Answer, Refusal>),
    /// A batch was planned as larger than Redis takes.
    TooLarge(TooLarge),
    /// Say it once: this table cannot be followed as it is.
    TableBlocked {
        table: TableId,
        why: Blocked,
    },
    /// Postgres has lost what Redis has: through the resume table again, which is to know it.
    WentBack {
        because: String,
    },
}

/// What one acknowledged batch brought, for metrics, status and listeners.
#[derive(Debug, Default)]
pub struct Applied {
    /// By table.
    pub counts: Vec<Counts>,
    /// Commit times of the transactions that changed something here.
    pub commits: Vec<CommitTime>,
    pub transactions: u64,
    /// (table, operation, key, commit time); at most [`EVENTS_A_BATCH`].
    pub events: Vec<(TableId, Op, Key, CommitTime)>,
    pub dead_letters: Vec<(TableId, &'static str)>,
    pub renewed: u64,
}

#[derive(Debug, Default, Clone, Copy)]
pub struct Counts {
    pub upserts: u64,
    pub deletes: u64,
    pub truncates: u64,
    pub loaded: u64,
    /// Rows without a key.
    pub keyless: u64,
}

/// When a change in Redis is safe, so that Postgres may forget it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SafeWhen {
    /// As soon as Redis acknowledged it.
    Acknowledged,
    /// Once [`Input::Durable`] says so.
    Told,
}

/// What is known of a table's rows in Redis when a load begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Trust {
    /// Some may be missing, or have another shape: until the load has ended, "not there" means nothing.
    Incomplete,
    /// They are what the stream has brought: they stand while they are compared.
    Stands,
}

/// What a session starts with; made by bootstrap from the resume table's decision.
pub struct Start {
    pub specs: Arc<[TableSpec]>,
    /// The takeover's checkpoint, as acknowledged.
    pub checkpoint: Checkpoint,
    pub redis_time_ms: u64,
    /// Where the stream begins: the slot's confirmed position.
    pub from: EndLsn,
    /// Tables to load, and why.
    pub load: Vec<(TableId, Reason)>,
    pub booleans: HashSet<Oid>,
    /// What the slot's exported snapshot saw, until the first load has ended.
    pub slot_snapshot: Option<Snapshot>,
    pub own: OwnKeys,
    pub limits: Limits,
    pub safe_when: SafeWhen,
    pub atomic_changes: u64,
    pub atomic_bytes: usize,
    /// Rows that Redis has recorded as dead letters.
    pub dead_keys: Vec<(Key, DeadKey)>,
    /// Of those, the most that are kept.
    pub most_dead_keys: usize,
    /// Keys that a TRUNCATE removes at once. Where there are more, readers see it in parts.
    pub clear_keys: usize,
    pub wal_segment_bytes: u64,
    /// How often all rows are compared; `None` = never.
    pub verify_every: Option<Duration>,
    /// An operator wants nothing applied.
    pub paused: bool,
    pub now: Instant,
}

struct Table {
    spec: TableSpec,
    /// As the stream last described it, or why its rows cannot become hashes.
    mapping: Option<Result<Arc<Mapping>, Blocked>>,
    relation: Option<Arc<Relation>>,
    /// It was found that it cannot be followed, and no load has ended since.
    broken: Option<Broken>,
    /// Redis's position when the catalog was last seen to be as the table is followed, and the time before. What is
    /// before the latter is there.
    fit: (EndLsn, EndLsn),
    /// When it was last tried to compare it, where that could not be done.
    not_compared: Option<Instant>,
    /// The shape for which it was last read again: never twice in a row for the same.
    reread_for: Option<u64>,
    /// The mapping that its hashes have, once loaded, or that the load under way writes.
    written_as: Option<u64>,
    /// What the catalog said when the last load began.
    catalog: Option<CatalogMark>,
    /// The newest transaction that truncated it and wrote no row of it afterwards: the stream has brought every row that it
    /// has since.
    emptied_by: Option<u32>,
    state: TableState,
    load: Option<Load>,
    /// When its round of TTL renewals began, by Redis TIME.
    renewing_since_ms: Option<u64>,
    /// Keys that must be read again before they may be trusted.
    pending: HashSet<Key>,
    /// A chunk must have seen everything up to here.
    base: EndLsn,
    /// An operator removed keys, which are not loaded again yet.
    removed: bool,
    /// Rows that wait, or waited when a load began, are as old as this.
    as_of: Option<EndLsn>,
}

/// A table that cannot be followed is tried again now and then.
struct Broken {
    why: Blocked,
    /// When that was last found.
    at: Instant,
    /// A load reads its rows: it can be followed again, it seems.
    is_mending: bool,
}

struct Load {
    id: LoadId,
    purpose: Purpose,
    because: Reason,
    started: Instant,
    started_redis_ms: u64,
    /// What it wrote has a TTL that reaches until then, by the last whole round of renewals in it; 0 before.
    renewed_until_ms: u64,
    /// What it has read, and of a comparison how it differed.
    tally: Tally,
    estimated_rows: u64,
    catalog: Option<CatalogMark>,
    /// Keys that a comparison has to read again.
    again: usize,
    /// An operator removed keys since it began.
    removed: bool,
    /// Everything is read, the orphans are gone; only pending keys may be left.
    ended: bool,
}

impl Table {
    /// Nothing but keys that an operator removed is missing: with rows waiting to be read again, the next life has to
    /// load.
    fn is_removed(&self) -> bool {
        self.removed && self.pending.is_empty() && self.broken.is_none()
    }

    fn blocked(&self) -> Option<&Blocked> {
        self.broken.as_ref().filter(|broken| !broken.is_mending).map(|broken| &broken.why)
    }

    /// What the next checkpoint says of it.
    fn write_mark(&self, mark: &mut TableMark) {
        (mark.state, mark.removed) = (self.state, self.is_removed());
        mark.blocked = self.blocked().cloned();
    }

    fn seen(&self, checkpoint: &Checkpoint) -> TableSeen {
        let progress = |l: &Load| (l.tally.rows, l.estimated_rows.max(l.tally.rows));
        let mark = checkpoint.tables.get(&self.spec.name);
        TableSeen {
            state: self.state,
            load_progress: self.load.as_ref().map(progress),
            compared_ms: mark.and_then(|mark| mark.compared_ms),
            verified_ms: mark.and_then(|mark| mark.verified_ms),
            blocked: self.blocked().cloned(),
            because: self.load.as_ref().filter(|l| l.purpose == Purpose::Fill).map(|l| l.because.text.clone()),
            removed: self.removed,
            dead_letters: mark.map_or(0, |mark| mark.dead_letters),
            more_dead_letters: mark.is_some_and(|mark| mark.more_dead_letters),
        }
    }

    fn bind(&mut self, booleans: &HashSet<Oid>, relation: Arc<Relation>) {
        let bound = Mapping::bind(&self.spec, &relation, booleans);
        self.mapping = Some(bound.map(Arc::new).map_err(|why| Blocked::from_message(&why.to_string())));
        self.relation = Some(relation);
    }
}

/// A change whose table is known.
enum Queued {
    Row(Arc<Mapping>, Change),
    Truncate(TableId),
}

/// A transaction that is being delivered.
struct Open {
    begin: Begin,
    /// It lies below what the checkpoint covers: recorded, not applied.
    covered: bool,
    /// Changes of it that are in Redis already.
    skip: u64,
    delivered: u64,
    changes: Vec<Queued>,
    bytes: usize,
    /// What the changes add to a batch, at most: see [`command::weight`].
    weight: usize,
    /// Over the atomic limits: applied in parts.
    split: bool,
    /// Tables that it has truncated, and written no row of since.
    emptied: BTreeSet<TableId>,
    /// It changes what Redis has.
    touched: bool,
    /// It says that a chunk was read before it.
    marked: bool,
}

/// The batch that grows.
#[derive(Default)]
struct Next {
    batch: Batch,
    through: Option<EndLsn>,
    within: Option<Option<Within>>,
    last: Option<LastTransaction>,
    changes: u64,
    bytes: usize,
    /// What the stream and dead letters have put into it, at most: see [`command::weight`].
    weight: usize,
    applied: Applied,
    /// Rows that Redis may not take, and what to say of them then.
    large: HashMap<Key, DeadLetter>,
    renewal: Option<RenewalPage>,
    /// Keys of a page of renewals that did not fit into one batch, but for the last of them.
    renewing: Option<(TableId, Vec<Key>)>,
    orphans: Vec<Key>,
    retired: Vec<String>,
    /// Records of dead letters that concern nobody any more.
    forgotten: Vec<Key>,
}

impl Next {
    fn has_work(&self) -> bool {
        self.changes > 0
            || self.renewal.is_some()
            || self.within.is_some()
            || !self.batch.is_empty()
            || !self.orphans.is_empty()
            || !self.retired.is_empty()
            || !self.forgotten.is_empty()
    }

    /// Something that the stream brought.
    fn has_changes(&self) -> bool {
        self.changes > 0 || self.within.is_some() || !self.batch.is_empty()
    }
}

/// The batch that left `next` and is not acknowledged.
struct Leaving {
    next: Next,
    chunk: Option<Taken>,
    step: Step,
    /// Tables whose truncation still has to look for keys.
    clear: VecDeque<TableId>,
    /// SCAN may show a key twice.
    cleared: BTreeSet<Key>,
    /// Loads that may be complete with this batch, and those that are.
    finished: Vec<TableId>,
    loaded: Vec<(TableId, Load)>,
    /// It is this and nothing else.
    removal: Option<Removal>,
}

impl Leaving {
    fn new(next: Next) -> Self {
        let (clear, cleared, finished, loaded) = (VecDeque::new(), BTreeSet::new(), Vec::new(), Vec::new());
        Leaving { next, chunk: None, step: Step::Executing, clear, cleared, finished, loaded, removal: None }
    }
}

/// When tables of which Redis evicts rows may be loaded again.
struct Evictions {
    load_from: Instant,
    pause: Duration,
}

impl Evictions {
    fn loads(&mut self, now: Instant) {
        let was_quiet = now.saturating_duration_since(self.load_from) > EVICTION_PAUSE_LONGEST;
        self.pause = if was_quiet { EVICTION_PAUSE } else { (self.pause * 2).min(EVICTION_PAUSE_LONGEST) };
        self.load_from = now + self.pause;
    }
}

/// Keys that an operator takes away.
struct Removal {
    ask: AskId,
    table: TableId,
    /// `None` = all of the table's.
    keys: Option<Vec<Key>>,
    deleted: u64,
}

enum Step {
    Comparing,
    Scanning(TableId),
    /// A beat is on its way, and perhaps the removal of what was found so far.
    Clearing(AfterClearing),
    Probing(Vec<Key>),
    Executing,
}

/// What follows when no more keys were found than the batch itself has capacity for.
#[derive(Clone, Copy)]
enum AfterClearing {
    /// The search goes on from the cursor.
    Scan(TableId, u64),
    /// The next table, or the batch.
    LeaveOn,
    /// The batch; its keys are looked at.
    Execute,
}

/// A part of a chunk that goes with the batch.
struct Taken {
    chunk: ChunkId,
    table: TableId,
    rows: Option<EncodedRows>,
    /// Keys that the stream knows better: not written.
    left_out: HashSet<Key>,
    deletes: Vec<Key>,
    /// Keys that are right after this batch.
    resolved: Vec<Key>,
    /// Rows that Redis cannot hold.
    unwritable: Vec<Unwritable>,
    /// Keys left to the stream, which must therefore exist.
    must_exist: Vec<Key>,
    row_count: u64,
    /// The load or comparison that it belongs to.
    of: Option<LoadId>,
    of_load: bool,
    last_part: bool,
    /// It is compared first.
    compares: Option<Compares>,
}

/// How a part of a chunk is compared.
struct Compares {
    repair: Repair,
    /// Keys of which only matters whether they are there.
    keys: Vec<Key>,
    about: About,
    found: Tally,
    /// To be read again: it is not known what they should be.
    again: Vec<Key>,
}

/// What the keys beside the rows are.
#[derive(PartialEq, Eq)]
enum About {
    /// Keys that the stream knows better, and that must therefore be there, or be read again.
    LeftToTheStream,
    /// Keys without a row.
    Orphans,
}

/// A chunk whose mark has come by.
struct Ready {
    chunk: Chunk,
    /// The next part of it.
    part: usize,
    /// Batches that must have been acknowledged before: a comparison is about what Redis has, not about what is on its
    /// way.
    behind: u64,
    /// The next part is too large to go with changes of the stream. Once those that its snapshot saw are in Redis, which
    /// is `behind`, it goes before the next ones.
    alone: bool,
}

pub struct Machine {
    tables: Vec<Table>,
    by_oid: HashMap<Oid, TableId>,
    booleans: HashSet<Oid>,
    /// As last sent; while a batch is on its way, Redis may still have the one before.
    checkpoint: Checkpoint,
    /// The entries of it that were sent, or that lay there.
    entered: BTreeMap<String, TableMark>,
    acknowledged: Acknowledged,
    slot_snapshot: Option<Snapshot>,
    record: Record,
    ledger: Ledger,
    watch: HistoryWatch,
    apply_above: EndLsn,
    /// What came in and has to wait until the batch that grows has left.
    undelivered: VecDeque<Delivery>,
    open: Option<Open>,
    next: Next,
    leaving: Option<Leaving>,
    /// Chunks whose mark has not come by.
    waiting: HashMap<Nonce, Chunk>,
    marks: VecDeque<Nonce>,
    ready: VecDeque<Ready>,
    next_load: u64,
    /// Keys to be read again, not yet asked for.
    reads: VecDeque<KeysToRead>,
    reads_out: usize,
    freshness: Freshness,
    server: Option<Lsn>,
    received: EndLsn,
    /// Tells asked-for keepalives apart.
    pings: u64,
    position_wanted: bool,
    last_executed: Instant,
    redis_clock: (u64, Instant),
    own: OwnKeys,
    limits: Limits,
    /// A change of more bytes may be more than Redis takes.
    letter_from_bytes: usize,
    safe_when: SafeWhen,
    /// Up to here it is.
    safe: Option<AppliedLsn>,
    atomic_changes: u64,
    clear_keys: usize,
    atomic_bytes: usize,
    wal_segment_bytes: u64,
    draining: bool,
    /// Batches of the stream that have left, and of them those that are acknowledged.
    left: u64,
    done: u64,
    verify_every_ms: Option<u64>,
    /// The refetch or verification under way.
    operation: Option<Running>,
    removals: VecDeque<Removal>,
    evictions: Evictions,
    dead: DeadKeys,
    paused: bool,
    /// Who waits for the pause.
    pausing: Vec<AskId>,
}

#[derive(Debug, Clone)]
pub struct TableSeen {
    pub state: TableState,
    /// Rows written by the load under way, and how many there may be.
    pub load_progress: Option<(u64, u64)>,
    /// By Redis TIME, as the two of [`TableMark`].
    pub compared_ms: Option<u64>,
    pub verified_ms: Option<u64>,
    pub blocked: Option<Blocked>,
    /// Why it is loaded, while it is.
    pub because: Option<String>,
    /// Keys were removed, and are not loaded again yet.
    pub removed: bool,
    /// As the two of [`TableMark`].
    pub dead_letters: u64,
    pub more_dead_letters: bool,
}

/// What Redis is known to have.
#[derive(Clone, Copy)]
struct Acknowledged {
    lsn: EndLsn,
    seq: u64,
}

/// What others may see of the machine.
#[derive(Debug, Clone)]
pub struct Observed {
    pub received: EndLsn,
    pub applied: EndLsn,
    pub confirmed: Option<ConfirmedLsn>,
    pub server: Option<Lsn>,
    pub fresh_as_of: Option<Instant>,
    pub oldest_unapplied: Option<CommitTime>,
    pub epoch: u64,
    pub seq: u64,
    pub tables: Vec<TableSeen>,
    pub operation: Option<Heavy>,
    pub executing: bool,
}

impl Machine {
    /// The machine, and the loads that must begin.
    pub fn start(start: Start) -> (Self, Vec<Effect>) {
        let base = start.checkpoint.base;
        let tables = start
            .specs
            .iter()
            .map(|spec| {
                let mark = start.checkpoint.tables.get(&spec.name);
                Table {
                    spec: spec.clone(),
                    mapping: None,
                    relation: None,
                    broken: mark.and_then(|m| m.blocked.clone()).map(|why| Broken {
                        why,
                        at: start.now,
                        is_mending: false,
                    }),
                    fit: (start.checkpoint.lsn, start.checkpoint.lsn),
                    not_compared: None,
                    reread_for: None,
                    written_as: mark.map(|m| m.fingerprint),
                    catalog: mark.and_then(|m| m.catalog),
                    emptied_by: None,
                    state: mark.map_or(TableState::Loading, |m| m.state),
                    load: None,
                    renewing_since_ms: None,
                    pending: HashSet::new(),
                    base,
                    removed: mark.is_some_and(|m| m.removed),
                    as_of: mark.and_then(|m| m.as_of),
                }
            })
            .collect();
        let mut ledger = Ledger::new(start.from);
        let safe = (start.safe_when == SafeWhen::Acknowledged).then_some(AppliedLsn(start.checkpoint.lsn));
        safe.into_iter().for_each(|lsn| ledger.applied(lsn));
        let mut machine = Machine {
            tables,
            by_oid: HashMap::new(),
            booleans: start.booleans,
            record: Record::new(if start.load.is_empty() { Recording::Tables } else { Recording::Keys }),
            ledger,
            watch: HistoryWatch::new(&start.checkpoint, start.from),
            apply_above: start.checkpoint.lsn,
            undelivered: VecDeque::new(),
            open: None,
            next: Next::default(),
            leaving: None,
            waiting: HashMap::new(),
            marks: VecDeque::new(),
            ready: VecDeque::new(),
            next_load: 1,
            reads: VecDeque::new(),
            reads_out: 0,
            freshness: Freshness::default(),
            server: None,
            received: start.from,
            pings: 0,
            position_wanted: false,
            last_executed: start.now,
            redis_clock: (start.redis_time_ms, start.now),
            acknowledged: Acknowledged { lsn: start.checkpoint.lsn, seq: start.checkpoint.seq },
            slot_snapshot: start.slot_snapshot,
            own: start.own,
            letter_from_bytes: start.limits.value_bytes.min(start.limits.batch_bytes / 4),
            limits: start.limits,
            safe_when: start.safe_when,
            safe,
            atomic_changes: start.atomic_changes,
            clear_keys: start.clear_keys,
            atomic_bytes: start.atomic_bytes,
            wal_segment_bytes: start.wal_segment_bytes,
            draining: false,
            left: 0,
            done: 0,
            verify_every_ms: start.verify_every.map(|d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX / 2)),
            operation: None,
            removals: VecDeque::new(),
            evictions: Evictions { load_from: start.now, pause: EVICTION_PAUSE / 2 },
            dead: DeadKeys::new(start.specs.len(), start.most_dead_keys, start.limits.batch_bytes / 32),
            paused: start.paused,
            pausing: Vec::new(),
            entered: start.checkpoint.tables.clone(),
            checkpoint: start.checkpoint,
        };
        machine.restore_dead_keys(start.dead_keys);
        let mut effects = Vec::new();
        for (table, because) in start.load {
            machine.begin_load(table, because, Trust::Incomplete, start.now, &mut effects);
        }
        (machine, effects)
    }

    /// # Panics
    /// On an input that cannot come: one that was not asked for ([`Self::takes_deliveries`] and its like say what is), or
    /// the answer to a question that was not put. It stems from a fault of the program, and nothing may be written after
    /// it; the next start goes on from the checkpoint.
    pub fn step(&mut self, input: Input, now: Instant) -> Vec<Effect> {
        let mut effects = Vec::new();
        match input {
            Input::Delivered { items, bytes } => {
                assert!(self.takes_deliveries(), "deliveries come when they are taken");
                let before = self.next.changes;
                self.undelivered.extend(items);
                self.deliver_what_fits(now, &mut effects);
                if self.next.changes > before || !self.undelivered.is_empty() {
                    self.next.bytes += bytes;
                }
            }
            Input::Load(message) => {
                assert!(self.takes_chunks(), "chunks come when they are taken");
                self.load_says(message, now, &mut effects);
            }
            Input::Renew(page) => {
                assert!(self.takes_renewals(), "one page of renewals at a time");
                let began_ms = self.redis_time_ms(page.round_began);
                self.tables[page.table.index()].renewing_since_ms.get_or_insert(began_ms);
                self.next.renewal = Some(page);
            }
            Input::Probed(found) => self.probed(&found, now, &mut effects),
            Input::Scanned { keys, next } => self.scanned(keys, next, now, &mut effects),
            Input::Executed { redis_time_ms } => self.executed(redis_time_ms, now, &mut effects),
            Input::Sampled { snapshot, flushed } => self.sampled(&snapshot, flushed, now),
            Input::Catalog(table, seen) => self.catalog_says(table, seen, now, &mut effects),
            Input::Evicted(keys) => self.evicted(keys, now, &mut effects),
            Input::Durable(lsn) => self.is_safe(lsn),
            Input::PositionWanted => {
                self.position_wanted = true;
                self.pings += 1;
            }
            Input::Compared(differences) => self.compared(&differences, now, &mut effects),
            Input::NotCompared(why) => self.chunk_not_compared(&why, now, &mut effects),
            Input::Asked(ask, operation) => self.asked(ask, operation, now, &mut effects),
            Input::Tick => {
                self.retry_broken(now, &mut effects);
                self.verify_when_due(now, &mut effects);
            }
        }
        if self.leaving.is_none() {
            self.leave(now, &mut effects);
            self.deliver_what_fits(now, &mut effects);
        }
        self.order_reads(&mut effects);
        // A chunk that waits for the rest of a transaction waits until it is resumed.
        let has_changes = self.next.has_changes() || !self.undelivered.is_empty();
        if self.leaving.is_none() && !has_changes && (self.is_split() || self.ready.is_empty()) {
            effects.extend(self.pausing.drain(..).map(|ask| Effect::Answer(ask, Ok(Answer::Paused))));
        }
        debug_assert!(self.is_sound(), "the state contradicts itself");
        effects
    }

    /// What holds after every step.
    fn is_sound(&self) -> bool {
        let reads_go_on = self.reads_out + self.reads.len() > 0 || self.draining;
        let tables = self.tables.iter().all(|table| {
            let waits = table.pending.is_empty() || table.state != TableState::Loaded;
            let is_read = table.pending.is_empty() || reads_go_on || table.load.is_some();
            let is_followed = table.state != TableState::Loaded || table.blocked().is_none();
            waits && is_read && is_followed
        });
        let compares = |t: &Table| t.load.as_ref().is_some_and(|load| load.purpose != Purpose::Fill);
        let is_asked_for = self.operation.is_some() || !self.tables.iter().any(compares);
        tables && is_asked_for && self.reads_out <= KEY_READS_OUT
    }

    /// May the loop hand over more of the stream? Otherwise it stays in its channel, and then in Postgres.
    pub fn takes_deliveries(&self) -> bool {
        let has_room = self.next.changes < BATCH_CHANGES && self.next.bytes < BATCH_BYTES;
        let holds_back = !self.undelivered.is_empty();
        !self.draining && !self.paused && !holds_back && (has_room || self.leaving.is_none())
    }

    /// A transaction over the atomic limits is half in Redis, or will be with the growing batch.
    fn is_split(&self) -> bool {
        self.next.within.unwrap_or(self.checkpoint.within).is_some()
    }

    pub fn takes_chunks(&self) -> bool {
        // Dead letters and orphans come with them, and go into the batch that grows.
        let has_room = self.next.weight <= self.limits.stream_bytes() && self.next.orphans.is_empty();
        !self.draining && !self.paused && has_room && self.waiting.len() + self.ready.len() < CHUNKS_HELD
    }

    pub fn takes_renewals(&self) -> bool {
        !self.draining && self.next.renewal.is_none()
    }

    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// From the next batch on.
    pub fn plan_for(&mut self, limits: Limits) {
        self.limits.planned_bytes = limits.planned_bytes;
    }

    /// Takes nothing more; what is in hand goes out.
    pub fn drain(&mut self) {
        self.draining = true;
        // A transaction that has not come in whole is not in hand: it comes again.
        self.open = None;
        self.undelivered.clear();
        self.ready.clear();
        self.waiting.clear();
    }

    /// Nothing is in hand and nothing is on its way.
    pub fn is_drained(&self) -> bool {
        let is_safe = self.safe >= Some(AppliedLsn(self.acknowledged.lsn));
        let is_in = self.next.through.is_none_or(|t| t <= self.acknowledged.lsn);
        self.leaving.is_none() && !self.next.has_work() && is_in && is_safe
    }

    pub fn confirmed(&self) -> Option<ConfirmedLsn> {
        self.ledger.confirmed()
    }

    /// Redis has everything before it.
    pub fn applied(&self) -> AppliedLsn {
        AppliedLsn(self.acknowledged.lsn)
    }

    pub fn fresh_as_of(&self) -> Option<Instant> {
        self.freshness.as_of()
    }

    pub fn pings(&self) -> u64 {
        self.pings
    }

    pub fn redis_now_ms(&self, now: Instant) -> u64 {
        let (at, then) = self.redis_clock;
        at + u64::try_from(now.saturating_duration_since(then).as_millis()).unwrap_or(u64::MAX / 2)
    }

    /// What Redis's clock showed at `when`, or less.
    fn redis_time_ms(&self, when: Instant) -> u64 {
        let (at, then) = self.redis_clock;
        let before = then.saturating_duration_since(when).as_millis();
        match u64::try_from(before) {
            Ok(0) => self.redis_now_ms(when),
            Ok(before) => at.saturating_sub(before + 1),
            Err(_) => 0,
        }
    }

    /// Forgets what no snapshot can miss any more. `floors`: what each read under way has seen at least.
    pub fn prune(&mut self, newest: &Snapshot, floors: &[Snapshot]) {
        self.record.prune(newest, floors);
    }

    /// When the verification of every table last succeeded, in this life or an earlier one: by Redis TIME.
    pub fn verified_ms(&self) -> Option<u64> {
        self.checkpoint.verified_ms()
    }

    pub fn observe(&self) -> Observed {
        let oldest = |applied: &Applied| applied.commits.first().copied();
        Observed {
            received: self.received,
            applied: self.acknowledged.lsn,
            confirmed: self.confirmed(),
            server: self.server,
            fresh_as_of: self.fresh_as_of(),
            oldest_unapplied: (self.leaving.as_ref().and_then(|l| oldest(&l.next.applied)))
                .or_else(|| oldest(&self.next.applied))
                .or_else(|| self.open.as_ref().filter(|o| !o.covered && o.touched).map(|o| o.begin.time)),
            epoch: self.checkpoint.epoch,
            seq: self.acknowledged.seq,
            tables: self.tables.iter().map(|table| table.seen(&self.checkpoint)).collect(),
            operation: self.operation.as_ref().map(|o| o.what),
            executing: self.leaving.is_some(),
        }
    }

    // ---- samples of the server -------------------------------------------------------------------------------------

    fn sampled(&mut self, snapshot: &Snapshot, flushed: Lsn, now: Instant) {
        self.ledger.seen(snapshot);
        self.server = Some(flushed);
        let flushed = flushed.before_page_header(self.wal_segment_bytes);
        self.freshness.sampled(flushed, now);
        if self.received.0 < flushed {
            self.pings += 1;
        }
        self.freshness.arrived(self.acknowledged.lsn.0);
    }
}

fn went_back(answer: CameBy, effects: &mut Vec<Effect>) {
    if let CameBy::WentBack { because } = answer {
        effects.push(Effect::WentBack { because });
    }
}

/// A small command, for which there is always room.
fn put(batch: &mut RedisBatch, command: &Command, effects: &mut Vec<Effect>) {
    if let Err(too_large) = batch.push(command) {
        effects.push(Effect::TooLarge(too_large));
    }
}

/// Takes the first of these keys: as many as one batch may hold of a kind, and at least one.
fn take_keys(keys: &mut Vec<Key>, limits: &Limits) -> Vec<Key> {
    let mut weight = 0;
    let fits = keys.iter().take_while(|key| {
        weight += command::weight_of_key(key);
        weight <= limits.keys_bytes()
    });
    let rest = keys.split_off(fits.count().max(1).min(keys.len()));
    std::mem::replace(keys, rest)
}

fn weight_of_keys<'a>(keys: impl IntoIterator<Item = &'a Key>) -> usize {
    keys.into_iter().map(command::weight_of_key).sum()
}

/// The keys that a change touches, into the record.
fn touch(record: &mut Record, mapping: &Mapping, change: &Change) {
    for key in mapping.keys_of(change) {
        record.touch(mapping.table, key);
    }
}

impl Applied {
    fn count(&mut self, table: TableId) -> &mut Counts {
        let index = table.index();
        if self.counts.len() <= index {
            self.counts.resize(index + 1, Counts::default());
        }
        &mut self.counts[index]
    }

    fn event(&mut self, table: TableId, op: Op, key: Key, time: CommitTime) {
        if self.events.len() < EVENTS_A_BATCH {
            self.events.push((table, op, key, time));
        }
    }
}
