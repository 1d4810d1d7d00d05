//! The apply machine: what arrives goes in, what is to be done comes out. Pure: no I/O, no async, no clock of its own.
//!
//! Everything that is written to Redis passes through here, in one order. While one batch is on its way, the next one
//! grows from whatever arrives; a batch is sent as soon as the writer is free. Any failure of the batch on its way ends
//! the session, and the next session starts from the checkpoint in Redis: nothing here is ever undone.
//!
//! It must not know SQL, wire bytes or HTTP. Wrong here means: torn rows, rows that go backwards, changes confirmed that
//! Redis does not have.

use super::chunk::{
    CatalogSeen, Chunk, ChunkId, Content, FromLoad, KeysToRead, LoadId, LoadOrder, Purpose, RenewalPage, Verdict,
};
use super::operation::{AskId, Heavy, Running};
use crate::admin::{Answer, Operation, Refusal, Repair, Scope, Tally};
use crate::change::{Begin, Change, CommitTime, Delivery, Nonce};
use crate::checkpoint::{Checkpoint, LastTransaction, TableMark, TableState, Within};
use crate::command::{Command, DeadLetter, Key};
use crate::lsn::{AppliedLsn, ConfirmedLsn, EndLsn, Lsn};
use crate::plan::batch::Batch;
use crate::plan::mapping::Mapping;
use crate::progress::ledger::Ledger;
use crate::progress::resume::{CameBy, LastTransactionWatch};
use crate::progress::visibility::{Judged, Record, Recording, Snapshot};
use crate::reason::{Heal, Reason};
use crate::schema::{CatalogMark, Oid, Relation, TableId, TableSpec};
use crate::sink::batch::{Batch as RedisBatch, Limits, OwnKeys, TooLarge};
use crate::sink::writer::{Comparison, Differences, Probe};
use crate::status::Op;
use bytes::Bytes;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

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
/// Positions of the server whose arrival in Redis is waited for.
const SAMPLES_HELD: usize = 64;
/// Marks that came by before their chunk did. Foreign ones are among them and are forgotten first.
const MARKS_HELD: usize = 1_024;
/// Reads of single keys under way at once.
const KEY_READS_OUT: usize = 2;
/// How long a table that cannot be followed is left alone.
const BROKEN_RETRY: Duration = Duration::from_secs(10);
/// Keys that a TRUNCATE removes in one step.
pub const CLEAR_KEYS: usize = 10_000;

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
    /// Keys that lie under the prefix of [`Effect::Scan`]; `more` where it stopped at its limit.
    Scanned {
        keys: Vec<Key>,
        more: bool,
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
    /// The answer to [`Effect::Compare`].
    Compared(Differences),
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
    /// Which keys lie under this prefix? At most `limit`.
    Scan {
        prefix: Bytes,
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
    /// Every table that an operation was about is done.
    Compared {
        what: Heavy,
        tally: Tally,
        elapsed: Duration,
    },
    Answer(AskId, Result<Answer, Refusal>),
    /// Say it once: this table cannot be followed as it is.
    TableBroken {
        table: TableId,
        why: String,
    },
    /// It cannot go on with these settings.
    Fail {
        why: String,
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
    /// The last transaction that must come by again.
    pub expect: Option<LastTransaction>,
    pub booleans: HashSet<Oid>,
    /// What the slot's exported snapshot saw, until the first load has ended.
    pub slot_snapshot: Option<Snapshot>,
    pub own: OwnKeys,
    pub limits: Limits,
    pub safe_when: SafeWhen,
    pub atomic_changes: u64,
    pub atomic_bytes: usize,
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
    mapping: Option<Result<Arc<Mapping>, String>>,
    relation: Option<Arc<Relation>>,
    /// When it was last found that it cannot be followed.
    broken: Option<Instant>,
    /// The shape for which it was last read again: never twice in a row for the same.
    reread_for: Option<u64>,
    /// The mapping that its hashes have, once loaded, or that the load under way writes.
    written_as: Option<u64>,
    /// What the catalog said when the last load began.
    catalog: Option<CatalogMark>,
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
        self.removed && self.pending.is_empty()
    }

    fn seen(&self) -> TableSeen {
        let progress = |l: &Load| (l.tally.rows, l.estimated_rows.max(l.tally.rows));
        TableSeen { state: self.state, load_progress: self.load.as_ref().map(progress) }
    }

    fn bind(&mut self, booleans: &HashSet<Oid>, relation: Arc<Relation>) {
        let bound = Mapping::bind(&self.spec, &relation, booleans);
        self.mapping = Some(bound.map(Arc::new).map_err(|why| why.to_string()));
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
    /// Over the atomic limits: applied in parts.
    split: bool,
    touched: bool,
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
    applied: Applied,
    /// Rows that Redis may not take, and what to say of them then.
    large: HashMap<Key, DeadLetter>,
    renewal: Option<RenewalPage>,
    orphans: Vec<Key>,
    retired: Vec<String>,
}

impl Next {
    fn has_work(&self) -> bool {
        self.changes > 0
            || self.renewal.is_some()
            || self.within.is_some()
            || !self.batch.is_empty()
            || !self.orphans.is_empty()
            || !self.retired.is_empty()
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
    cleared: Vec<Key>,
    /// Loads that may be complete with this batch, and those that are.
    finished: Vec<TableId>,
    loaded: Vec<(TableId, Load)>,
    /// It is this and nothing else.
    removal: Option<Removal>,
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
    /// A part of a truncation over the limit is on its way; look again.
    ClearingPart(TableId),
    Probing(Vec<Key>),
    Executing,
}

/// A part of a chunk that goes with the batch.
struct Taken {
    chunk: ChunkId,
    table: TableId,
    rows: Option<crate::command::EncodedRows>,
    /// Keys that the stream knows better: not written.
    left_out: HashSet<Key>,
    deletes: Vec<Key>,
    /// Keys that are right after this batch.
    resolved: Vec<Key>,
    /// Keys left to the stream, which must therefore exist.
    must_exist: Vec<Key>,
    row_count: u64,
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
}

pub struct Machine {
    tables: Vec<Table>,
    by_oid: HashMap<Oid, TableId>,
    booleans: HashSet<Oid>,
    /// As last sent; while a batch is on its way, Redis may still have the one before.
    checkpoint: Checkpoint,
    acknowledged: Acknowledged,
    slot_snapshot: Option<Snapshot>,
    record: Record,
    ledger: Ledger,
    watch: LastTransactionWatch,
    apply_above: EndLsn,
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
    samples: VecDeque<(Lsn, Instant)>,
    fresh_as_of: Option<Instant>,
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
    paused: bool,
    /// Who waits for the pause.
    pausing: Vec<AskId>,
}

#[derive(Debug, Clone, Copy)]
pub struct TableSeen {
    pub state: TableState,
    /// Rows written by the load under way, and how many there may be.
    pub load_progress: Option<(u64, u64)>,
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
                    broken: None,
                    reread_for: None,
                    written_as: mark.map(|m| m.fingerprint),
                    catalog: mark.and_then(|m| m.catalog),
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
            watch: LastTransactionWatch::new(start.expect, start.from),
            apply_above: start.checkpoint.lsn,
            open: None,
            next: Next::default(),
            leaving: None,
            waiting: HashMap::new(),
            marks: VecDeque::new(),
            ready: VecDeque::new(),
            next_load: 1,
            reads: VecDeque::new(),
            reads_out: 0,
            samples: VecDeque::new(),
            fresh_as_of: None,
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
            atomic_bytes: start.atomic_bytes,
            wal_segment_bytes: start.wal_segment_bytes,
            draining: false,
            left: 0,
            done: 0,
            verify_every_ms: start.verify_every.map(|d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX / 2)),
            operation: None,
            removals: VecDeque::new(),
            paused: start.paused,
            pausing: Vec::new(),
            checkpoint: start.checkpoint,
        };
        let mut effects = Vec::new();
        for (table, because) in start.load {
            machine.begin_load(table, because, Trust::Incomplete, start.now, &mut effects);
        }
        (machine, effects)
    }

    pub fn step(&mut self, input: Input, now: Instant) -> Vec<Effect> {
        let mut effects = Vec::new();
        match input {
            Input::Delivered { items, bytes } => {
                let before = self.next.changes;
                for item in items {
                    self.deliver(item, now, &mut effects);
                }
                if self.next.changes > before {
                    self.next.bytes += bytes;
                }
            }
            Input::Load(message) => self.load_says(message, now, &mut effects),
            Input::Renew(page) => {
                let began_ms = self.redis_time_ms(page.round_began);
                self.tables[page.table.index()].renewing_since_ms.get_or_insert(began_ms);
                self.next.renewal = Some(page);
            }
            Input::Probed(found) => self.probed(&found, now, &mut effects),
            Input::Scanned { keys, more } => self.scanned(keys, more, now, &mut effects),
            Input::Executed { redis_time_ms } => self.executed(redis_time_ms, now, &mut effects),
            Input::Sampled { snapshot, flushed } => self.sampled(&snapshot, flushed, now),
            Input::Catalog(table, seen) => self.catalog_says(table, seen, now, &mut effects),
            Input::Durable(lsn) => self.is_safe(lsn),
            Input::PositionWanted => {
                self.position_wanted = true;
                self.pings += 1;
            }
            Input::Compared(differences) => self.compared(&differences, now, &mut effects),
            Input::Asked(ask, operation) => self.asked(ask, operation, now, &mut effects),
            Input::Tick => {
                self.retry_broken(now, &mut effects);
                self.verify_when_due(now, &mut effects);
            }
        }
        if self.leaving.is_none() {
            self.leave(now, &mut effects);
        }
        self.order_reads(&mut effects);
        if self.leaving.is_none() && !self.next.has_changes() && self.ready.is_empty() {
            effects.extend(self.pausing.drain(..).map(|ask| Effect::Answer(ask, Ok(Answer::Paused))));
        }
        effects
    }

    /// May the loop hand over more of the stream? Otherwise it stays in its channel, and then in Postgres.
    pub fn takes_deliveries(&self) -> bool {
        let has_room = self.next.changes < BATCH_CHANGES && self.next.bytes < BATCH_BYTES;
        !self.draining && !self.paused && (has_room || self.leaving.is_none())
    }

    pub fn takes_chunks(&self) -> bool {
        !self.draining && self.waiting.len() + self.ready.len() < CHUNKS_HELD
    }

    pub fn takes_renewals(&self) -> bool {
        !self.draining && self.next.renewal.is_none()
    }

    /// Takes nothing more; what is in hand goes out.
    pub fn drain(&mut self) {
        self.draining = true;
        // A transaction that has not come in whole is not in hand: it comes again.
        self.open = None;
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
        self.fresh_as_of
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
        let of = |t: &Table| self.checkpoint.tables.get(&t.spec.name).and_then(|mark| mark.verified_ms);
        self.tables.iter().map(of).min().flatten()
    }

    pub fn observe(&self) -> Observed {
        let oldest = |applied: &Applied| applied.commits.first().copied();
        Observed {
            received: self.received,
            applied: self.acknowledged.lsn,
            confirmed: self.confirmed(),
            server: self.server,
            fresh_as_of: self.fresh_as_of,
            oldest_unapplied: (self.leaving.as_ref().and_then(|l| oldest(&l.next.applied)))
                .or_else(|| oldest(&self.next.applied))
                .or_else(|| self.open.as_ref().filter(|o| !o.covered && o.touched).map(|o| o.begin.time)),
            epoch: self.checkpoint.epoch,
            seq: self.acknowledged.seq,
            tables: self.tables.iter().map(Table::seen).collect(),
            operation: self.operation.as_ref().map(|o| o.what),
            executing: self.leaving.is_some(),
        }
    }

    // ---- the stream -----------------------------------------------------------------------------------------------

    fn deliver(&mut self, item: Delivery, now: Instant, effects: &mut Vec<Effect>) {
        match item {
            Delivery::Begin(begin) => {
                self.ledger.begin(begin);
                self.record.begin(begin.xid);
                let skip = match self.checkpoint.within {
                    Some(within) if within.commit == begin.commit => within.changes_done,
                    _ => 0,
                };
                self.open = Some(Open {
                    begin,
                    // A position of the server may lie inside the commit record: whatever began to commit before it counts
                    // as covered, here and in the record.
                    covered: begin.commit.0 < self.apply_above.0,
                    skip,
                    delivered: 0,
                    changes: Vec::new(),
                    bytes: 0,
                    split: skip > 0,
                    touched: false,
                });
            }
            Delivery::Relation(relation) => self.relation(relation),
            Delivery::Change(change) => self.change(change, now, effects),
            Delivery::Mark(nonce) => match self.waiting.remove(&nonce) {
                Some(chunk) => self.is_ready(chunk),
                None => {
                    self.marks.push_back(nonce);
                    if self.marks.len() > MARKS_HELD {
                        self.marks.pop_front();
                    }
                }
            },
            Delivery::Commit { end, .. } => self.commit(end, effects),
            Delivery::Position(at) => {
                self.received = self.received.max(at);
                self.ledger.delivered(at);
                self.reached(at);
                let answer = self.watch.reached(at);
                went_back(answer, effects);
            }
        }
    }

    /// The next checkpoint may say so: everything before `at` is in Redis or in the growing batch.
    fn reached(&mut self, at: EndLsn) {
        self.next.through = self.next.through.max(Some(at));
    }

    /// Nothing is loaded because of it before a change comes in that shape: a replay begins with shapes of the past.
    fn relation(&mut self, relation: Arc<Relation>) {
        let Some(table) = self.tables.iter_mut().find(|t| t.spec.table == relation.name) else {
            self.by_oid.remove(&relation.oid);
            return;
        };
        let id = table.spec.id;
        // A table dropped and made again has a new oid under the old name.
        self.by_oid.retain(|_, other| *other != id);
        self.by_oid.insert(relation.oid, id);
        table.bind(&self.booleans, relation);
    }

    /// More types turned out to be boolean.
    fn bind_again(&mut self) {
        for table in &mut self.tables {
            if let Some(relation) = table.relation.take() {
                table.bind(&self.booleans, relation);
            }
        }
    }

    /// The mapping for a change of this relation, where it is one of ours and can be followed.
    fn mapping(&self, oid: Oid) -> Option<&Result<Arc<Mapping>, String>> {
        self.tables[self.by_oid.get(&oid)?.index()].mapping.as_ref()
    }

    fn change(&mut self, change: Change, now: Instant, effects: &mut Vec<Effect>) {
        let Some(mut open) = self.open.take() else { return };
        open.delivered += 1;
        // Those of tables that nobody asked for too: they lie in the same buffers.
        open.bytes += change.len_bytes() + CHANGE_BYTES;
        let applies = !open.covered && open.delivered > open.skip;
        match change {
            Change::Truncate { relations } => {
                for table in relations.iter().filter_map(|oid| self.by_oid.get(oid)).copied() {
                    if applies {
                        open.changes.push(Queued::Truncate(table));
                        open.touched = true;
                    } else {
                        self.record.touch_table(table);
                    }
                }
            }
            Change::Insert { relation, .. } | Change::Update { relation, .. } | Change::Delete { relation, .. } => {
                match self.mapping(relation).cloned() {
                    Some(Ok(mapping)) if applies => {
                        self.follows_shape(&mapping, now, effects);
                        open.changes.push(Queued::Row(mapping, change));
                        open.touched = true;
                    }
                    Some(Ok(mapping)) => touch(&mut self.record, &mapping, &change),
                    Some(Err(why)) if applies => self.breaks(self.by_oid[&relation], why, now, effects),
                    Some(Err(_)) | None => {}
                }
            }
        }
        open.split |= applies && (open.delivered > self.atomic_changes || open.bytes > self.atomic_bytes);
        let part =
            (applies && open.split).then_some(Within { commit: open.begin.commit, changes_done: open.delivered });
        self.open = Some(open);
        if part.is_some() {
            self.plan_open();
            self.next.within = Some(part);
        }
    }

    /// A row in another shape than the hashes have: the whole table is read again.
    fn follows_shape(&mut self, mapping: &Mapping, now: Instant, effects: &mut Vec<Effect>) {
        let table = &self.tables[mapping.table.index()];
        let as_written = table.written_as == Some(mapping.fingerprint);
        let not_looked_up_yet = table.load.is_some() && table.written_as.is_none();
        if !as_written && !not_looked_up_yet && table.reread_for != Some(mapping.fingerprint) {
            self.tables[mapping.table.index()].reread_for = Some(mapping.fingerprint);
            self.begin_load(
                mapping.table,
                Reason::heals(Heal::Schema, "its columns changed"),
                Trust::Incomplete,
                now,
                effects,
            );
        }
    }

    /// A table that cannot be followed is not served as whole, and the others go on.
    fn breaks(&mut self, id: TableId, why: String, now: Instant, effects: &mut Vec<Effect>) {
        let table = &mut self.tables[id.index()];
        table.state = TableState::Healing;
        table.written_as = None;
        table.load = None;
        if table.broken.replace(now).is_none() {
            effects.push(Effect::TableBroken { table: id, why: why.clone() });
        }
        self.no_longer_compared(id, &why, now, effects);
    }

    fn commit(&mut self, end: EndLsn, effects: &mut Vec<Effect>) {
        let Some(open) = self.open.as_ref() else { return };
        let (begin, covered, split) = (open.begin, open.covered, open.split);
        let began_earlier = open.skip > 0;
        if !covered {
            self.plan_open();
        }
        let touched = self.open.take().is_some_and(|o| o.touched);
        // Covered transactions judge as "at or below base", even one whose commit record straddles it. So does one that
        // an earlier session began to apply: some of its rows may have waited to be read again there, which nobody knows
        // any more.
        self.record.end(if covered || began_earlier { end.min(self.apply_above) } else { end });
        self.ledger.delivered(end);
        self.received = self.received.max(end);
        let answer = self.watch.transaction(end, &begin);
        went_back(answer, effects);
        if covered {
            return;
        }
        self.reached(end);
        if split {
            self.next.within = Some(None);
        }
        if touched {
            self.next.last = Some(LastTransaction { end, xid: begin.xid, time: begin.time });
            self.next.applied.transactions += 1;
            self.next.applied.commits.push(begin.time);
        }
    }

    /// What has come in of the open transaction goes into the growing batch.
    fn plan_open(&mut self) {
        let Some(open) = self.open.as_mut() else { return };
        let begin = open.begin;
        open.bytes = 0;
        for queued in std::mem::take(&mut open.changes) {
            self.next.changes += 1;
            match queued {
                Queued::Truncate(table) => {
                    self.record.touch_table(table);
                    self.next.batch.truncate(table);
                    self.next.applied.count(table).truncates += 1;
                    self.next.applied.event(table, Op::Truncate, Key(Bytes::new()), begin.time);
                }
                Queued::Row(mapping, change) => self.plan_row(&mapping, &change, &begin),
            }
        }
    }

    fn plan_row(&mut self, mapping: &Arc<Mapping>, change: &Change, begin: &Begin) {
        let table = mapping.table;
        match self.next.batch.apply(mapping, change) {
            Ok(applied) => {
                let op = if matches!(change, Change::Delete { .. }) { Op::Delete } else { Op::Upsert };
                match op {
                    Op::Delete => self.next.applied.count(table).deletes += 1,
                    Op::Upsert | Op::Truncate => self.next.applied.count(table).upserts += 1,
                }
                self.next.applied.event(table, op, applied.key.clone(), begin.time);
                if !matches!(change, Change::Delete { .. }) && change.len_bytes() > self.letter_from_bytes {
                    // Whether Redis takes it is known only when the batch is written.
                    let letter = self.letter(mapping, change, begin, applied.key.0.clone());
                    self.next.large.insert(applied.key.clone(), letter);
                }
                self.record.touch(table, applied.key);
                if let Some(old) = applied.also {
                    self.record.touch(table, old);
                }
            }
            Err(poison) => {
                let reason = poison.to_string();
                let letter = DeadLetter { reason, ..self.letter(mapping, change, begin, Bytes::new()) };
                self.next.applied.dead_letters.push((table, poison.code()));
                self.next.batch.dead_letter(letter);
            }
        }
    }

    /// What can be told of a change, but for the reason.
    fn letter(&self, mapping: &Mapping, change: &Change, begin: &Begin, key: Bytes) -> DeadLetter {
        DeadLetter {
            table: self.tables[mapping.table.index()].spec.name.clone(),
            key,
            lsn: begin.commit.to_string(),
            xid: begin.xid,
            reason: String::new(),
            row: mapping.row_json(change),
        }
    }

    fn retry_broken(&mut self, now: Instant, effects: &mut Vec<Effect>) {
        let due = |t: &&Table| t.broken.is_some_and(|at| now.saturating_duration_since(at) >= BROKEN_RETRY);
        let due: Vec<TableId> = self.tables.iter().filter(due).map(|t| t.spec.id).collect();
        for table in due {
            // Counted when it broke, not with every attempt.
            let because = Reason::ordinary("it could not be followed before");
            self.begin_load(table, because, Trust::Incomplete, now, effects);
        }
    }

    /// The stream does not announce everything.
    fn catalog_says(&mut self, id: TableId, seen: CatalogSeen, now: Instant, effects: &mut Vec<Effect>) {
        let table = &self.tables[id.index()];
        if table.load.is_some() || table.broken.is_some() {
            // The load looks for itself, and what is broken is looked at again anyway.
            return;
        }
        let (fingerprint, mark) = match seen {
            CatalogSeen::Table { fingerprint, mark } => (fingerprint, mark),
            CatalogSeen::Unfit(why) => return self.breaks(id, why, now, effects),
        };
        let (text, trust) = match table.catalog {
            _ if table.written_as != Some(fingerprint) => ("its columns changed", Trust::Incomplete),
            Some(before) if before == mark => return,
            Some(before) if before.shape == mark.shape => ("its rows were written anew", Trust::Stands),
            Some(_) | None => {
                ("its partitions, row filter or types changed, or it is another table", Trust::Incomplete)
            }
        };
        self.begin_load(id, Reason::heals(Heal::Schema, text), trust, now, effects);
    }

    // ---- loads ----------------------------------------------------------------------------------------------------

    fn begin_load(&mut self, id: TableId, because: Reason, trust: Trust, now: Instant, effects: &mut Vec<Effect>) {
        let table = &mut self.tables[id.index()];
        if trust == Trust::Incomplete {
            if matches!(table.state, TableState::Loaded | TableState::Incomplete) {
                // What is there goes on being right while it is read again.
                table.state = TableState::Loading;
            }
            table.written_as = None;
        }
        table.broken = None;
        self.no_longer_compared(id, &because.text, now, effects);
        self.walk(id, Purpose::Fill, because, now, effects);
    }

    /// Reads a table as a whole.
    fn walk(&mut self, id: TableId, purpose: Purpose, because: Reason, now: Instant, effects: &mut Vec<Effect>) {
        let redis_now_ms = self.redis_now_ms(now);
        let load = LoadId(self.next_load);
        self.next_load += 1;
        self.record.set(Recording::Keys);
        let delivered = self.received.max(self.apply_above);
        let table = &mut self.tables[id.index()];
        // What was delivered by now may be in Redis in another shape, or not at all: a chunk must have seen all of it.
        table.base = table.base.max(delivered);
        table.load = Some(Load {
            id: load,
            purpose,
            because: because.clone(),
            started: now,
            started_redis_ms: redis_now_ms,
            renewed_until_ms: 0,
            tally: Tally::default(),
            estimated_rows: 0,
            catalog: None,
            again: 0,
            removed: false,
            ended: false,
        });
        effects.push(Effect::Order(LoadOrder::Table { table: id, load, purpose, because }));
        self.give_up_chunks(id, effects);
    }

    /// Chunks of a load that was given up are not written.
    fn give_up_chunks(&mut self, id: TableId, effects: &mut Vec<Effect>) {
        let current = self.tables[id.index()].load.as_ref().map(|l| l.id);
        let stale = |c: &Chunk| c.table == id && c.load.is_some() && c.load != current;
        let given_up = (self.waiting.values().chain(self.ready.iter().map(|r| &r.chunk))).filter(|c| stale(c));
        // In an order of their own: the same inputs have the same effects.
        let given_up: BTreeSet<ChunkId> = given_up.map(|c| c.id).collect();
        effects.extend(given_up.into_iter().map(|id| Effect::Order(LoadOrder::Verdict(id, Verdict::GivenUp))));
        self.waiting.retain(|_, c| !stale(c));
        self.ready.retain(|r| !stale(&r.chunk));
    }

    fn load_says(&mut self, message: FromLoad, now: Instant, effects: &mut Vec<Effect>) {
        match message {
            FromLoad::Began { table, load, fingerprint, catalog, estimated_rows, booleans } => {
                let known = self.booleans.len();
                self.booleans.extend(booleans);
                if self.booleans.len() > known {
                    self.bind_again();
                }
                let id = table;
                let table = &mut self.tables[id.index()];
                if let Some(current) = table.load.as_mut().filter(|l| l.id == load) {
                    current.estimated_rows = estimated_rows;
                    current.catalog = Some(catalog);
                    if current.purpose != Purpose::Fill {
                        if table.written_as != Some(fingerprint) {
                            let because = Reason::heals(Heal::Schema, "its columns changed");
                            self.begin_load(id, because, Trust::Incomplete, now, effects);
                        }
                    } else if table.written_as.replace(fingerprint) != Some(fingerprint)
                        && table.state == TableState::Loaded
                    {
                        table.state = TableState::Loading;
                    }
                }
            }
            FromLoad::Chunk(chunk) => {
                let current = self.tables[chunk.table.index()].load.as_ref().map(|l| l.id);
                if chunk.load.is_some() && chunk.load != current {
                    effects.push(Effect::Order(LoadOrder::Verdict(chunk.id, Verdict::GivenUp)));
                } else if let Some(at) = self.marks.iter().position(|m| *m == chunk.nonce) {
                    self.marks.remove(at);
                    self.is_ready(chunk);
                } else {
                    self.waiting.insert(chunk.nonce, chunk);
                }
            }
            FromLoad::Ended { table, load } => {
                if let Some(l) = self.tables[table.index()].load.as_mut().filter(|l| l.id == load) {
                    l.ended = true;
                }
            }
            FromLoad::Broken { table, why } => self.breaks(table, why, now, effects),
            FromLoad::DeadLetter { table, code, mut letter } => {
                letter.lsn = self.checkpoint.lsn.to_string();
                self.next.applied.dead_letters.push((table, code));
                self.next.batch.dead_letter(letter);
            }
            FromLoad::Retired { template } => self.next.retired.push(template),
            FromLoad::Orphans { keys } => self.next.orphans.extend(keys),
        }
    }

    /// Hands keys that must be read again to the loader, a bounded number at a time.
    fn order_reads(&mut self, effects: &mut Vec<Effect>) {
        while self.reads_out < KEY_READS_OUT {
            let Some(keys) = self.reads.pop_front() else { return };
            self.reads_out += 1;
            effects.push(Effect::Order(LoadOrder::Keys(keys)));
        }
    }

    /// These keys must be read again before they may be trusted.
    fn pend(&mut self, id: TableId, keys: Vec<Key>, now: Instant, effects: &mut Vec<Effect>) {
        let table = &mut self.tables[id.index()];
        let new: Vec<Key> = keys.into_iter().filter(|k| table.pending.insert(k.clone())).collect();
        if new.is_empty() {
            return;
        }
        self.record.set(Recording::Keys);
        // The batch that left them behind is not in the checkpoint yet.
        table.as_of = table.as_of.or(Some(self.checkpoint.lsn));
        if table.pending.len() > PENDING_KEYS {
            // What made them pending was delivered by now, and the load's chunks must have seen all of that.
            table.pending.clear();
            let text = format!("over {PENDING_KEYS} rows have to be read again");
            self.begin_load(id, Reason::heals(Heal::Interrupted, text), Trust::Incomplete, now, effects);
            return;
        }
        if table.state == TableState::Loaded {
            table.state = TableState::Incomplete;
        }
        self.read_again(id, &new, None);
    }

    fn read_again(&mut self, table: TableId, keys: &[Key], checks: Option<LoadId>) {
        let some = keys.chunks(KEYS_A_READ).map(|some| KeysToRead { table, keys: some.to_vec(), checks });
        self.reads.extend(some);
    }

    /// The comparison that this chunk belongs to, where it belongs to one that goes on.
    fn comparison(&self, chunk: &Chunk) -> Option<(LoadId, Repair)> {
        let load = self.tables[chunk.table.index()].load.as_ref()?;
        let of = match chunk.content {
            Content::Keys { checks, .. } => checks,
            Content::Rows(_) | Content::Orphans { .. } => chunk.load,
        };
        match load.purpose {
            Purpose::Compare(repair) if of == Some(load.id) => Some((load.id, repair)),
            Purpose::Compare(_) | Purpose::Fill => None,
        }
    }

    fn is_ready(&mut self, chunk: Chunk) {
        let on_its_way = self.left + u64::from(self.next.has_changes());
        let behind = self.comparison(&chunk).map_or(0, |_| on_its_way);
        self.ready.push_back(Ready { chunk, part: 0, behind });
    }

    fn takes_ready(&self) -> bool {
        self.ready.front().is_some_and(|r| r.behind <= self.done)
    }

    /// The next chunk part that may be written with the batch that leaves.
    fn take_chunk(&mut self, batch: &Batch, effects: &mut Vec<Effect>) -> Option<Taken> {
        while self.takes_ready() {
            let Ready { chunk, part, behind } = self.ready.pop_front()?;
            let table = &self.tables[chunk.table.index()];
            let known = match self.record.judge(chunk.table, &chunk.snapshot, table.base) {
                Judged::Known(known) if !self.misses_slot_snapshot(&chunk.snapshot) => known,
                Judged::Known(_) | Judged::ReadAgain(_) => {
                    self.verdict(&chunk, Verdict::ReadAgain, effects);
                    continue;
                }
            };
            let comparison = self.comparison(&chunk);
            let mut taken = Taken {
                chunk: chunk.id,
                table: chunk.table,
                rows: None,
                left_out: HashSet::new(),
                deletes: Vec::new(),
                resolved: Vec::new(),
                must_exist: Vec::new(),
                row_count: 0,
                of_load: chunk.load.is_some(),
                last_part: true,
                compares: None,
            };
            let mut compares = comparison.map(|(_, repair)| Compares {
                repair,
                keys: Vec::new(),
                about: About::LeftToTheStream,
                found: Tally::default(),
                again: Vec::new(),
            });
            // Nobody mends them here, and they are known not to be right.
            let skips_pending = matches!(&compares, Some(c) if c.repair == Repair::OnlyCount);
            match &chunk.content {
                Content::Rows(parts) => {
                    let Some(rows) = parts.get(part) else {
                        self.verdict(&chunk, Verdict::Written, effects);
                        continue;
                    };
                    taken.last_part = part + 1 == parts.len();
                    taken.row_count = rows.rows.len() as u64;
                    for (key, _) in &rows.rows {
                        let pending = table.pending.contains(key);
                        if known.contains(key) {
                            taken.left_out.insert(key.clone());
                            if !pending && !batch.settles(key) {
                                let left_to_the_stream =
                                    compares.as_mut().map_or(&mut taken.must_exist, |c| &mut c.keys);
                                left_to_the_stream.push(key.clone());
                            }
                        } else if pending && skips_pending {
                            taken.left_out.insert(key.clone());
                        } else if pending {
                            taken.resolved.push(key.clone());
                        }
                    }
                    taken.rows = Some(rows.clone());
                }
                Content::Keys { asked, found, checks: None } => {
                    // A key that waits for its row is never left to the stream: read again until a snapshot sees all.
                    let (again, right): (Vec<Key>, Vec<Key>) =
                        (asked.iter().filter(|k| table.pending.contains(*k)).cloned()).partition(|k| known.contains(k));
                    let there: HashSet<&Key> = found.rows.iter().map(|(k, _)| k).collect();
                    taken.deletes = right.iter().filter(|k| !there.contains(k)).cloned().collect();
                    taken.left_out =
                        found.rows.iter().map(|(k, _)| k).filter(|k| !right.contains(k)).cloned().collect();
                    taken.rows = Some(found.clone());
                    taken.resolved = right;
                    self.read_again(chunk.table, &again, None);
                }
                Content::Keys { asked, found, checks: Some(_) } => {
                    let Some(compares) = &mut compares else {
                        self.verdict(&chunk, Verdict::GivenUp, effects);
                        continue;
                    };
                    // One that is pending is seen to anyway.
                    let open = |k: &&Key| known.contains(k) && !table.pending.contains(k) && !batch.settles(k);
                    compares.keys = asked.iter().filter(open).cloned().collect();
                    let left_out = |k: &Key| known.contains(k) || table.pending.contains(k);
                    taken.left_out = asked.iter().filter(|k| left_out(k)).cloned().collect();
                    taken.rows = Some(found.clone());
                    let table = &mut self.tables[chunk.table.index()];
                    if let Some(load) = &mut table.load {
                        load.again = load.again.saturating_sub(asked.len());
                    }
                }
                Content::Orphans { asked, exist } => {
                    let gone = |k: &&Key| !exist.contains(*k) && !known.contains(k) && !table.pending.contains(*k);
                    let gone: Vec<Key> = asked.iter().filter(gone).cloned().collect();
                    match &mut compares {
                        Some(compares) => (compares.keys, compares.about) = (gone, About::Orphans),
                        None => taken.deletes = gone,
                    }
                }
            }
            taken.compares = compares;
            if !taken.last_part {
                self.ready.push_front(Ready { chunk, part: part + 1, behind });
            }
            return Some(taken);
        }
        None
    }

    fn verdict(&mut self, chunk: &Chunk, verdict: Verdict, effects: &mut Vec<Effect>) {
        if let (Content::Keys { asked, checks, .. }, Verdict::ReadAgain) = (&chunk.content, verdict) {
            self.read_again(chunk.table, asked, *checks);
        }
        self.settle_read(chunk.load.is_none());
        effects.push(Effect::Order(LoadOrder::Verdict(chunk.id, verdict)));
    }

    fn settle_read(&mut self, was_read_of_keys: bool) {
        self.reads_out = self.reads_out.saturating_sub(usize::from(was_read_of_keys));
    }

    /// A new slot leaves out commits that ordinary snapshots may not see yet: a chunk must see what the slot's own
    /// snapshot saw.
    fn misses_slot_snapshot(&self, snapshot: &Snapshot) -> bool {
        self.slot_snapshot.as_ref().is_some_and(|slot| !snapshot.sees_all_that(slot))
    }

    // ---- the batch that leaves --------------------------------------------------------------------------------------

    fn leave(&mut self, now: Instant, effects: &mut Vec<Effect>) {
        let moved = self.next.through.is_some_and(|t| t > self.checkpoint.lsn);
        let finished = self.finished_loads();
        let beat = now.saturating_duration_since(self.last_executed) >= BEAT;
        let urgent = moved && (self.position_wanted || self.draining);
        // In the middle of a split transaction a row of a chunk could show more of it than the stream has brought.
        let split = self.next.within.unwrap_or(self.checkpoint.within).is_some();
        if let Some(removal) = self.removals.pop_front() {
            let clear = if removal.keys.is_none() { VecDeque::from([removal.table]) } else { VecDeque::new() };
            self.leaving = Some(Leaving {
                next: Next::default(),
                chunk: None,
                step: Step::Executing,
                clear,
                cleared: Vec::new(),
                finished: Vec::new(),
                loaded: Vec::new(),
                removal: Some(removal),
            });
            return self.leave_on(now, effects);
        }
        let chunk_waits = !split && self.takes_ready();
        if !(self.next.has_work() || chunk_waits || !finished.is_empty() || beat || urgent || self.says_otherwise()) {
            return;
        }
        let next = std::mem::take(&mut self.next);
        self.left += 1;
        let chunk = if split { None } else { self.take_chunk(&next.batch, effects) };
        let clear: VecDeque<TableId> = next.batch.truncated().collect();
        self.leaving = Some(Leaving {
            next,
            chunk,
            step: Step::Executing,
            clear,
            cleared: Vec::new(),
            finished,
            loaded: Vec::new(),
            removal: None,
        });
        self.leave_on(now, effects);
    }

    /// Readers go by the checkpoint: a table that is no longer what it says there is not left so until the next beat.
    fn says_otherwise(&self) -> bool {
        let written = |t: &Table| self.checkpoint.tables.get(&t.spec.name).map(|mark| mark.state);
        self.tables.iter().any(|t| written(t).is_some_and(|state| state != t.state))
    }

    /// The next step of the batch that leaves: look for keys to clear, look at merge bases, write.
    fn leave_on(&mut self, now: Instant, effects: &mut Vec<Effect>) {
        let Some(leaving) = self.leaving.as_mut() else { return };
        if let Some(table) = leaving.clear.front() {
            leaving.step = Step::Scanning(*table);
            let prefix = Bytes::from(self.tables[table.index()].spec.key.literal.clone());
            effects.push(Effect::Scan { prefix, limit: CLEAR_KEYS });
            return;
        }
        if let Some(taken) = &leaving.chunk
            && let Some(compares) = &taken.compares
            && !matches!(leaving.step, Step::Comparing)
        {
            let rows = taken.rows.clone().unwrap_or_default();
            let wanted = Comparison { rows, left_out: taken.left_out.clone(), keys: compares.keys.clone() };
            leaving.step = Step::Comparing;
            effects.push(Effect::Compare(wanted));
            return;
        }
        let mut probes = leaving.next.batch.probes();
        probes.extend(leaving.removal.iter().flat_map(|r| r.keys.iter().flatten().cloned()));
        probes.extend(leaving.chunk.iter().flat_map(|c| c.must_exist.iter().cloned()));
        if probes.is_empty() {
            self.execute(&HashSet::new(), now, effects);
        } else {
            leaving.step = Step::Probing(probes.clone());
            effects.push(Effect::Probe(probes));
        }
    }

    fn probed(&mut self, found: &[Probe], now: Instant, effects: &mut Vec<Effect>) {
        let Some(leaving) = self.leaving.as_mut() else { return };
        let Step::Probing(keys) = &mut leaving.step else { return };
        let probed = std::mem::take(keys).into_iter().zip(found);
        if let Some(removal) = &mut leaving.removal {
            leaving.cleared = probed.filter(|(_, probe)| **probe != Probe::Absent).map(|(key, _)| key).collect();
            removal.deleted = leaving.cleared.len() as u64;
            let table = removal.table;
            if removal.deleted > 0 {
                self.keys_are_removed(table);
            }
            return self.execute(&HashSet::new(), now, effects);
        }
        let hashes = probed;
        let hashes = hashes.filter(|(_, probe)| **probe == Probe::Hash).map(|(key, _)| key).collect();
        self.execute(&hashes, now, effects);
    }

    fn scanned(&mut self, keys: Vec<Key>, more: bool, now: Instant, effects: &mut Vec<Effect>) {
        let Some(leaving) = self.leaving.as_mut() else { return };
        let Step::Scanning(table) = leaving.step else { return };
        // SCAN may show a key twice.
        let keys: BTreeSet<Key> = keys.into_iter().collect();
        if let Some(removal) = leaving.removal.as_mut().filter(|_| !keys.is_empty()) {
            removal.deleted += keys.len() as u64;
            self.keys_are_removed(table);
        }
        let Some(leaving) = self.leaving.as_mut() else { return };
        if more {
            // Over the limit: removed in parts, the position held. A crash in between finds the TRUNCATE again.
            leaving.step = Step::ClearingPart(table);
            let mut batch = RedisBatch::new(self.own.clone(), self.limits);
            for key in keys {
                put(&mut batch, &Command::Delete { key }, effects);
            }
            self.checkpoint.seq += 1;
            self.checkpoint.beat_ms = self.redis_now_ms(now);
            effects.push(Effect::Execute { batch, checkpoint: self.checkpoint.to_json(), changes: 0 });
        } else {
            leaving.cleared.extend(keys);
            leaving.clear.pop_front();
            self.leave_on(now, effects);
        }
    }

    fn execute(&mut self, hashes: &HashSet<Key>, now: Instant, effects: &mut Vec<Effect>) {
        let Some(mut leaving) = self.leaving.take() else { return };
        let batch = std::mem::take(&mut leaving.next.batch);
        for table in batch.truncated() {
            self.tables[table.index()].pending.clear();
        }
        let any_pending = self.tables.iter().any(|t| !t.pending.is_empty());
        let settled: Vec<(TableId, Key)> = if any_pending { batch.settled().collect() } else { Vec::new() };
        let tables = &self.tables;
        // Merging needs a hash that is right: not one that waits to be read again, not one of another shape. A load of
        // which only such keys are left has all the others right: if changes to them made more of them, it would not end.
        let mergeable = |id: TableId| {
            let table = &tables[id.index()];
            let right = matches!(table.state, TableState::Loaded | TableState::Incomplete)
                || table.load.as_ref().is_some_and(|load| load.ended);
            right && matches!(&table.mapping, Some(Ok(m)) if table.written_as == Some(m.fingerprint))
        };
        let pending_already = |key: &Key| tables.iter().any(|t| t.pending.contains(key));
        let finished = batch.finish(mergeable, |key| hashes.contains(key) && !pending_already(key));

        let mut out = RedisBatch::new(self.own.clone(), self.limits);
        let removed = leaving.cleared.drain(..).map(|key| Command::Delete { key });
        let orphans = std::mem::take(&mut leaving.next.orphans).into_iter().map(|key| Command::Delete { key });
        for command in removed.chain(orphans) {
            put(&mut out, &command, effects);
        }
        for command in &finished.commands {
            match out.push(command) {
                Ok(()) => {}
                Err(TooLarge::Batch { .. }) => {
                    effects.push(Effect::Fail { why: "a batch is over redis's limits".to_owned() })
                }
                Err(too_large @ (TooLarge::Value { .. } | TooLarge::Row { .. })) => {
                    self.refuse(command, &too_large, &mut leaving.next, &mut out, effects);
                }
            }
        }
        if let Some(page) = &leaving.next.renewal {
            let ttl_ms = self.tables[page.table.index()].spec.ttl_ms;
            for key in &page.keys {
                put(&mut out, &Command::Renew { key: key.clone(), ttl_ms }, effects);
            }
        }
        let mut resolved_by_chunk: HashSet<Key> = HashSet::new();
        let mut missing = Vec::new();
        let mut again = Vec::new();
        if let Some(taken) = &mut leaving.chunk {
            again.extend(taken.compares.iter_mut().flat_map(|c| c.again.drain(..)));
            for key in taken.deletes.drain(..) {
                put(&mut out, &Command::Delete { key }, effects);
            }
            if let Some(rows) = taken.rows.take() {
                let written = out.push_rows(&rows, |key| !taken.left_out.contains(key));
                if let Err(too_large) = written {
                    effects.push(Effect::Fail { why: too_large.to_string() });
                }
            }
            resolved_by_chunk.extend(taken.resolved.drain(..));
            for key in taken.must_exist.drain(..) {
                if hashes.contains(&key) {
                    // The stream wrote it, perhaps in an earlier life: its TTL must reach as far as its neighbours'.
                    let ttl_ms = self.tables[taken.table.index()].spec.ttl_ms;
                    put(&mut out, &Command::Renew { key, ttl_ms }, effects);
                } else {
                    missing.push(key);
                }
            }
        }

        for (table, key) in settled {
            self.tables[table.index()].pending.remove(&key);
        }
        if let Some(table) = leaving.chunk.as_ref().map(|c| c.table) {
            let pending = &mut self.tables[table.index()].pending;
            resolved_by_chunk.iter().for_each(|key| {
                pending.remove(key);
            });
            self.pend(table, missing, now, effects);
            if let Some(load) = self.tables[table.index()].load.as_mut().filter(|_| !again.is_empty()) {
                load.again += again.len();
                let checks = Some(load.id);
                self.read_again(table, &again, checks);
            }
        }
        let mut by_table: BTreeMap<TableId, Vec<Key>> = BTreeMap::new();
        for (table, key) in finished.pending {
            if !resolved_by_chunk.contains(&key) {
                by_table.entry(table).or_default().push(key);
            }
        }
        for (table, keys) in by_table {
            self.pend(table, keys, now, effects);
        }

        self.write_checkpoint(&mut leaving, now);
        leaving.step = Step::Executing;
        let changes = leaving.next.changes;
        self.leaving = Some(leaving);
        effects.push(Effect::Execute { batch: out, checkpoint: self.checkpoint.to_json(), changes });
    }

    /// A row that Redis cannot hold: a dead letter, and no old version left in its place.
    fn refuse(
        &self,
        command: &Command,
        why: &TooLarge,
        next: &mut Next,
        out: &mut RedisBatch,
        effects: &mut Vec<Effect>,
    ) {
        let (Command::Put { key, .. } | Command::Merge { key, .. }) = command else { return };
        let owner = self.tables.iter().find(|t| key.as_bytes().starts_with(t.spec.key.literal.as_bytes()));
        let Some(table) = owner else { return };
        next.applied.dead_letters.push((table.spec.id, "too_large"));
        let letter = next.large.remove(key).unwrap_or_else(|| DeadLetter {
            table: table.spec.name.clone(),
            key: key.0.clone(),
            lsn: self.received.to_string(),
            xid: next.last.as_ref().map_or(0, |last| last.xid),
            reason: String::new(),
            row: Bytes::new(),
        });
        put(out, &Command::Delete { key: key.clone() }, effects);
        put(out, &Command::DeadLetter(DeadLetter { reason: why.to_string(), ..letter }), effects);
    }

    /// Loads that are complete but for the checkpoint that says so.
    fn finished_loads(&self) -> Vec<TableId> {
        let whole = |t: &&Table| t.pending.is_empty() && t.load.as_ref().is_some_and(|l| l.ended && l.again == 0);
        self.tables.iter().filter(whole).map(|t| t.spec.id).collect()
    }

    fn write_checkpoint(&mut self, leaving: &mut Leaving, now: Instant) {
        for id in std::mem::take(&mut leaving.finished) {
            let table = &mut self.tables[id.index()];
            if !table.pending.is_empty() {
                continue;
            }
            let Some(load) = table.load.take_if(|l| l.ended && l.again == 0) else { continue };
            let marks = &mut self.checkpoint.tables;
            match load.purpose {
                Purpose::Fill => {
                    table.state = TableState::Loaded;
                    table.catalog = load.catalog;
                    table.removed = load.removed;
                    let mark = TableMark {
                        template: table.spec.key.to_string(),
                        fingerprint: table.written_as.unwrap_or(0),
                        catalog: load.catalog,
                        state: TableState::Loaded,
                        ttl_until_ms: Some(load.renewed_until_ms.max(load.started_redis_ms + table.spec.ttl_ms)),
                        as_of: None,
                        removed: load.removed,
                        compared_ms: Some(load.started_redis_ms),
                        verified_ms: marks.get(&table.spec.name).and_then(|mark| mark.verified_ms),
                    };
                    marks.insert(table.spec.name.clone(), mark);
                }
                Purpose::Compare(repair) => {
                    let is_right = repair == Repair::Mend || load.tally.drift() == 0;
                    let is_refetch = self.operation.as_ref().is_some_and(|o| o.what == Heavy::Refetch);
                    if let Some(mark) = marks.get_mut(&table.spec.name) {
                        if is_right {
                            mark.compared_ms = Some(load.started_redis_ms);
                        }
                        if is_right && !is_refetch {
                            mark.verified_ms = Some(load.started_redis_ms);
                        }
                        if repair == Repair::Mend {
                            table.removed = load.removed;
                            table.catalog = load.catalog;
                            mark.catalog = load.catalog;
                        }
                    }
                }
            }
            leaving.loaded.push((id, load));
        }
        for table in &mut self.tables {
            let settled = table.pending.is_empty() && table.load.is_none();
            table.as_of = table.as_of.filter(|_| !settled);
            match table.state {
                TableState::Incomplete if settled && !table.removed => table.state = TableState::Loaded,
                TableState::Loaded if table.removed => table.state = TableState::Incomplete,
                _ => {}
            }
            if let Some(mark) = self.checkpoint.tables.get_mut(&table.spec.name) {
                (mark.state, mark.removed) = (table.state, table.is_removed());
                mark.as_of = table.as_of;
            }
        }
        if let Some(page) = leaving.next.renewal.as_ref().filter(|p| p.ends_round) {
            // Every key that was there was renewed, or written with a full TTL, since the round began. What had expired
            // by then stays gone: such a round promises nothing.
            let redis_now_ms = self.redis_now_ms(now);
            let table = &mut self.tables[page.table.index()];
            let reach = table.renewing_since_ms.take().map(|since| since + table.spec.ttl_ms);
            let mark = self.checkpoint.tables.get_mut(&table.spec.name).and_then(|m| m.ttl_until_ms.as_mut());
            let of_load = table.load.as_ref().map(|l| (l.started_redis_ms + table.spec.ttl_ms).max(l.renewed_until_ms));
            if of_load.or(mark.as_deref().copied()).is_some_and(|until| until > redis_now_ms) {
                if let (Some(load), Some(reach)) = (&mut table.load, reach) {
                    load.renewed_until_ms = load.renewed_until_ms.max(reach);
                }
                if let (Some(until), Some(reach)) = (mark, reach) {
                    *until = reach.max(*until);
                }
            }
        }
        let settled = |t: &Table| t.load.is_none() && t.pending.is_empty();
        if self.tables.iter().all(settled) {
            self.record.set(Recording::Tables);
        }
        if self.tables.iter().all(|t| t.load.is_none()) {
            // The first load has ended: every later snapshot sees what the slot's saw.
            self.slot_snapshot = None;
            self.checkpoint.slot_snapshot = None;
        }
        let retired = &leaving.next.retired;
        self.checkpoint.retired.retain(|template| !retired.contains(template));
        if let Some(through) = leaving.next.through {
            self.checkpoint.lsn = self.checkpoint.lsn.max(through);
        }
        if let Some(within) = leaving.next.within {
            self.checkpoint.within = within;
        }
        if let Some(last) = leaving.next.last {
            self.checkpoint.last = Some(last);
        }
        self.checkpoint.seq += 1;
        self.checkpoint.beat_ms = self.redis_now_ms(now);
    }

    fn executed(&mut self, redis_time_ms: u64, now: Instant, effects: &mut Vec<Effect>) {
        self.redis_clock = (redis_time_ms, now);
        self.last_executed = now;
        self.acknowledged = Acknowledged { lsn: self.checkpoint.lsn, seq: self.checkpoint.seq };
        let Some(leaving) = self.leaving.as_mut() else { return };
        if let Step::ClearingPart(table) = leaving.step {
            leaving.step = Step::Scanning(table);
            let prefix = Bytes::from(self.tables[table.index()].spec.key.literal.clone());
            effects.push(Effect::Scan { prefix, limit: CLEAR_KEYS });
            return;
        }
        let Some(leaving) = self.leaving.take() else { return };
        self.done = self.left;
        let mut applied = leaving.next.applied;
        if let Some(taken) = leaving.chunk {
            let is_verified = self.operation.as_ref().is_some_and(|o| o.what != Heavy::Refetch);
            if taken.compares.is_none() || !is_verified {
                applied.count(taken.table).loaded += taken.row_count;
            }
            let checks = taken.of_load || taken.compares.is_some();
            if let Some(load) = self.tables[taken.table.index()].load.as_mut().filter(|_| checks) {
                load.tally.rows += if taken.of_load { taken.row_count } else { 0 };
                load.tally.add(&taken.compares.map(|c| c.found).unwrap_or_default());
            }
            if taken.last_part {
                self.settle_read(!taken.of_load);
                effects.push(Effect::Order(LoadOrder::Verdict(taken.chunk, Verdict::Written)));
            }
        }
        if let Some(page) = leaving.next.renewal {
            applied.renewed += page.keys.len() as u64;
        }
        for (table, load) in leaving.loaded {
            match load.purpose {
                Purpose::Fill => {
                    let (rows, started, because) = (load.tally.rows, load.started, load.because);
                    effects.push(Effect::TableLoaded { table, rows, started, because });
                }
                Purpose::Compare(_) => self.table_compared(table, &load, now, effects),
            }
        }
        if let Some(removal) = leaving.removal {
            effects.push(Effect::Answer(removal.ask, Ok(Answer::Deleted(removal.deleted))));
        }
        if self.safe_when == SafeWhen::Acknowledged {
            self.is_safe(AppliedLsn(self.checkpoint.lsn));
        }
        self.position_wanted &= self.checkpoint.lsn < self.received;
        self.freshen();
        effects.push(Effect::Applied(Box::new(applied)));
        self.look_for_expired(redis_time_ms, now, effects);
    }

    fn is_safe(&mut self, lsn: AppliedLsn) {
        self.safe = self.safe.max(Some(lsn));
        self.ledger.applied(lsn);
    }

    /// A daemon that was frozen, or could not renew, finds keys gone that no change took away.
    fn look_for_expired(&mut self, redis_time_ms: u64, now: Instant, effects: &mut Vec<Effect>) {
        let reach = |t: &Table| self.checkpoint.tables.get(&t.spec.name).and_then(|mark| mark.ttl_until_ms);
        let expired =
            |t: &&Table| t.load.is_none() && t.broken.is_none() && reach(t).is_some_and(|until| until <= redis_time_ms);
        let expired: Vec<TableId> = self.tables.iter().filter(expired).map(|t| t.spec.id).collect();
        for table in expired {
            let because = Reason::heals(Heal::Expired, "rows may have expired while nothing renewed them");
            self.begin_load(table, because, Trust::Incomplete, now, effects);
        }
    }

    // ---- what an operator asks ---------------------------------------------------------------------------------------

    fn asked(&mut self, ask: AskId, operation: Operation, now: Instant, effects: &mut Vec<Effect>) {
        if self.draining {
            return effects.push(Effect::Answer(ask, Err(Refusal::NotNow("prefetchd is stopping".to_owned()))));
        }
        let (scope, what) = match operation {
            Operation::Pause => {
                self.paused = true;
                return self.pausing.push(ask);
            }
            Operation::Resume => {
                self.paused = false;
                return effects.push(Effect::Answer(ask, Ok(Answer::Resumed)));
            }
            Operation::Invalidate(table, keys) => {
                let removal = Removal { ask, table, keys: Some(keys), deleted: 0 };
                return self.removals.push_back(removal);
            }
            Operation::Clear(table) => {
                return self.removals.push_back(Removal { ask, table, keys: None, deleted: 0 });
            }
            Operation::Skip(_) => {
                let text = "the stream goes on: there is nothing to be skipped";
                return effects.push(Effect::Answer(ask, Err(Refusal::Pointless(text.to_owned()))));
            }
            Operation::Refetch(scope) => (scope, Heavy::Refetch),
            Operation::Verify(scope, repair) => (scope, Heavy::Verify(repair)),
        };
        if let Err(refusal) = self.may_compare(scope) {
            return effects.push(Effect::Answer(ask, Err(refusal)));
        }
        let tables = self.tables.iter().map(|t| t.spec.id);
        let tables: BTreeSet<TableId> = tables.filter(|t| scope == Scope::All || scope == Scope::Table(*t)).collect();
        self.compare(Some(ask), what, tables, now, effects);
    }

    /// One heavy operation at a time, whoever began it.
    fn may_compare(&self, scope: Scope) -> Result<(), Refusal> {
        if self.paused {
            return Err(Refusal::Paused);
        }
        if let Some(operation) = &self.operation {
            return Err(Refusal::Busy(format!("a {} is under way", operation.what)));
        }
        if let Some(table) = self.tables.iter().find(|t| t.load.is_some()) {
            return Err(Refusal::Busy(format!("table {} is being loaded", table.spec.name)));
        }
        let concerned = |t: &&Table| scope == Scope::All || scope == Scope::Table(t.spec.id);
        match self.tables.iter().filter(concerned).find(|t| t.broken.is_some()) {
            Some(table) => Err(Refusal::NotNow(format!("table {} cannot be followed as it is", table.spec.name))),
            None => Ok(()),
        }
    }

    fn compare(
        &mut self,
        ask: Option<AskId>,
        what: Heavy,
        tables: BTreeSet<TableId>,
        now: Instant,
        effects: &mut Vec<Effect>,
    ) {
        self.operation = Some(Running::new(ask, what, tables.clone(), now));
        for table in tables {
            self.walk(table, Purpose::Compare(what.repair()), Reason::ordinary(what.to_string()), now, effects);
        }
    }

    /// Every table that nobody has compared for so long.
    fn verify_when_due(&mut self, now: Instant, effects: &mut Vec<Effect>) {
        let Some(every_ms) = self.verify_every_ms else { return };
        if self.draining || self.may_compare(Scope::All).is_err() {
            return;
        }
        let redis_now_ms = self.redis_now_ms(now);
        let compared_ms = |t: &Table| self.checkpoint.tables.get(&t.spec.name).and_then(|m| m.compared_ms);
        let due = |t: &&Table| compared_ms(t).unwrap_or(0).saturating_add(every_ms) <= redis_now_ms;
        let due: BTreeSet<TableId> = self.tables.iter().filter(due).map(|t| t.spec.id).collect();
        if !due.is_empty() {
            self.compare(None, Heavy::Verify(Repair::Mend), due, now, effects);
        }
    }

    /// What lies in Redis beside a part of a chunk.
    fn compared(&mut self, differences: &Differences, now: Instant, effects: &mut Vec<Effect>) {
        let Some(taken) = self.leaving.as_mut().and_then(|l| l.chunk.as_mut()) else { return };
        let Some(compares) = &mut taken.compares else { return };
        let Differences { missing, stale, present } = differences;
        (compares.found.missing, compares.found.stale) = (missing.len() as u64, stale.len() as u64);
        match compares.about {
            About::LeftToTheStream => {
                compares.again = compares.keys.iter().filter(|k| !present.contains(*k)).cloned().collect();
            }
            About::Orphans => {
                compares.found.orphaned = present.len() as u64;
                taken.deletes = compares.keys.iter().filter(|k| present.contains(*k)).cloned().collect();
            }
        }
        match compares.repair {
            Repair::Mend => compares.found.repaired = compares.found.drift(),
            Repair::OnlyCount => taken.deletes.clear(),
        }
        let writes = compares.repair == Repair::Mend && !(missing.is_empty() && stale.is_empty());
        match taken.rows.take().filter(|_| writes) {
            Some(rows) => {
                let same = rows.rows.iter().map(|(k, _)| k).filter(|k| !missing.contains(*k) && !stale.contains(*k));
                taken.left_out.extend(same.cloned());
                taken.rows = Some(rows);
            }
            None => taken.rows = None,
        }
        self.leave_on(now, effects);
    }

    fn table_compared(&mut self, table: TableId, load: &Load, now: Instant, effects: &mut Vec<Effect>) {
        let Some(operation) = &mut self.operation else { return };
        let (what, tally, started) = (operation.what, load.tally, load.started);
        effects.push(Effect::TableCompared { table, what, tally, started });
        operation.ended(table, &tally);
        self.end_operation(now, effects);
    }

    /// It is loaded now, or cannot be followed.
    fn no_longer_compared(&mut self, table: TableId, why: &str, now: Instant, effects: &mut Vec<Effect>) {
        let Some(operation) = &mut self.operation else { return };
        operation.lost(table, &self.tables[table.index()].spec.name, why);
        self.end_operation(now, effects);
    }

    fn end_operation(&mut self, now: Instant, effects: &mut Vec<Effect>) {
        let Some(operation) = self.operation.take_if(|o| o.is_over()) else { return };
        let elapsed = now.saturating_duration_since(operation.started);
        let lsn = self.acknowledged.lsn;
        if operation.is_whole() {
            effects.push(Effect::Compared { what: operation.what, tally: operation.tally, elapsed });
        }
        if let Some((ask, answer)) = operation.answer(lsn, elapsed) {
            effects.push(Effect::Answer(ask, answer));
        }
    }

    /// Until the table is read as a whole again, "not there" means nothing.
    fn keys_are_removed(&mut self, id: TableId) {
        let table = &mut self.tables[id.index()];
        table.removed = true;
        if let Some(load) = &mut table.load {
            load.removed = true;
        }
        if table.state == TableState::Loaded {
            table.state = TableState::Incomplete;
        }
        if let Some(mark) = self.checkpoint.tables.get_mut(&table.spec.name) {
            (mark.state, mark.removed) = (table.state, table.is_removed());
        }
    }

    // ---- samples of the server -------------------------------------------------------------------------------------

    fn sampled(&mut self, snapshot: &Snapshot, flushed: Lsn, now: Instant) {
        self.ledger.seen(snapshot);
        self.server = Some(flushed);
        let flushed = flushed.before_page_header(self.wal_segment_bytes);
        if self.samples.len() >= SAMPLES_HELD {
            self.samples.remove(SAMPLES_HELD / 2);
        }
        self.samples.push_back((flushed, now));
        if self.received.0 < flushed {
            self.pings += 1;
        }
        self.freshen();
    }

    fn freshen(&mut self) {
        while let Some((lsn, at)) = self.samples.front().copied() {
            if lsn > self.acknowledged.lsn.0 {
                break;
            }
            self.fresh_as_of = Some(at);
            self.samples.pop_front();
        }
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
        effects.push(Effect::Fail { why: too_large.to_string() });
    }
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
