//! One session with Postgres and Redis, as a state machine: inputs go in, effects come out. Pure: no I/O, no async, no
//! clock.
//!
//! Everything that is written to Redis passes through here, in one order. While one batch is in flight, the next one
//! grows from whatever arrives; it is sent as soon as the writer is free. If the batch in flight fails, the session
//! ends, and the next session starts from the checkpoint in Redis: nothing here is ever undone.
//!
//! Each part owns its state, which no other file writes:
//!
//! - [`intake`]: the open transaction, the stream's descriptions of the tables ([`shapes`]), and the record of
//!   transactions that snapshots may not see.
//! - [`tables`]: one [`table::Table`] for each: what readers may rely on, its load, its pending keys. Also [`dead`],
//!   the rows that Redis cannot hold.
//! - [`chunk_queue`] and [`key_reads`]: what the loader has read, and which keys it is to read again.
//! - [`hash_slots`]: those whose rows are read again.
//! - [`announce`]: what the change stream is still to be told.
//! - [`growing`]: the growing batch. [`in_flight`]: the batch in flight. [`outbox`]: the checkpoint.
//! - [`members`]: the members of lookups that change with a batch. [`sweeping`] compares all of them with the rows.
//! - [`feedback`]: what is reported to Postgres and to readers. [`operate`]: what an operator has requested.
//!
//! Before there is a session, [`startup`] says what has to be done, and [`takeover`] what its first checkpoint says.
//! A delivery passes through them in [`deliver`], a chunk in [`loads`] and [`judge_chunk`].
//!
//! It must not know SQL, wire bytes or HTTP. A mistake here tears rows, overwrites rows with older versions, or
//! confirms changes that Redis does not have.

mod announce;
mod chunk_queue;
mod dead;
mod deliver;
mod feedback;
mod growing;
mod hash_slots;
mod in_flight;
pub mod inspect;
mod intake;
mod judge_chunk;
mod key_reads;
pub mod load_messages;
mod loads;
mod members;
mod operate;
pub mod operation;
mod outbox;
mod shapes;
pub mod startup;
mod sweeping;
mod table;
mod tables;
pub mod takeover;
mod turn;

use crate::admin::{Answer, DriftKind, Operation, Refusal, Tally};
use crate::change::{CommitTime, Delivery};
use crate::checkpoint::{Blocked, Checkpoint};
use crate::command::{self, DeadKey, Key, Op};
use crate::lanes::book::Places;
use crate::lanes::{Lane, Lost, lane_of_stream};
use crate::lookups::questions::{Answers, Questions};
use crate::lsn::{AppliedLsn, EndLsn, Lsn};
use crate::progress::ledger::ConfirmedLsn;
use crate::progress::visibility::{Recording, Snapshot};
use crate::reason::Reason;
use crate::resp::batch::{Batch, EncodeError, Limits, OwnKeys};
use crate::schema::{TableId, TableSpec};
use crate::typed::known::KnownTypes;
use announce::{Unannounced, weight_of_announcement};
use bytes::Bytes;
use chunk_queue::Chunks;
use dead::DeadKeys;
use feedback::Feedback;
use growing::Growing;
use in_flight::InFlight;
use inspect::{Comparison, Differences, Inspection, Probe};
use intake::Intake;
use key_reads::KeyReads;
use load_messages::{CatalogSeen, FromLoad, LoadOrder, RenewalPage};
use operate::Desk;
use operation::{AskId, Heavy};
use outbox::Outbox;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};
use table::{Table, Trust};
use tables::Tables;
use turn::Turn;

pub use dead::DEAD_KEYS;
pub use feedback::SafeWhen;
pub use outbox::{HEARTBEAT, Spread};
pub use tables::TableSeen;

/// The most events that one batch keeps for listeners, who see at most 100 a second.
const EVENTS_A_BATCH: usize = 256;

/// An input of the machine.
#[derive(Debug)]
pub enum Input {
    /// `bytes` is the memory that the items may keep alive.
    Delivered {
        items: Vec<Delivery>,
        bytes: usize,
    },
    Load(FromLoad),
    Renew(RenewalPage),
    /// The answers to [`Effect::Probe`], in the same order.
    Probed(Vec<Probe>),
    /// The answer to [`Effect::Inspect`].
    Inspected(Answers),
    /// Keys under the prefix of [`Effect::Scan`], and the cursor to continue from, which is 0 at the end.
    Scanned {
        keys: Vec<Key>,
        next: u64,
    },
    /// Redis has acknowledged [`Effect::Execute`].
    Executed {
        redis_time_ms: u64,
    },
    Sampled {
        snapshot: Snapshot,
        flushed: Lsn,
    },
    Catalog(TableId, CatalogSeen),
    /// The number of keys that Redis has evicted since it started.
    Evicted(u64),
    /// The answer to [`Effect::Compare`].
    Compared(Differences),
    /// The other answer to [`Effect::Compare`]: Redis refuses to return the values.
    NotCompared(String),
    /// An operator's request, to be answered by [`Effect::Answer`].
    Asked(AskId, Operation),
    /// Everything up to this position is as durable in Redis as the configuration asks for.
    Durable(AppliedLsn),
    /// A reader waits for a position: request one from the server, and write it to the checkpoint at once.
    PositionWanted,
    /// These hash slots have moved to another node. Answered by [`Effect::Settled`] once all their rows were read again.
    Moved(BTreeSet<Lane>),
    Tick,
}

/// How many keys that differ are named, of each comparison of a table.
pub const NAMED: usize = 10;

/// An effect that the daemon must perform. At most one `Probe`, `Inspect`, `Scan`, `Compare` or `Execute` is outstanding at a
/// time; each answers with an input.
#[derive(Debug)]
pub enum Effect {
    /// Asks what these keys hold. Those whose type was asked stay watched until the next [`Effect::Execute`].
    Probe(Inspection),
    /// Asks what rows and lists hold. Nothing of it is watched.
    Inspect(Questions),
    /// Asks for about `limit` keys under this prefix, from this cursor on, or for those that are found within this time.
    Scan {
        prefix: Bytes,
        cursor: u64,
        limit: usize,
        within: Duration,
    },
    /// Asks how the values at these keys differ from those given.
    Compare(Comparison),
    Execute {
        batch: Batch,
        checkpoint: Vec<u8>,
        changes: u64,
    },
    Order(LoadOrder),
    Applied(Box<Applied>),
    /// Every key on this page of the table has been renewed: the next page may come.
    Renewed(TableId),
    TableLoaded {
        table: TableId,
        rows: u64,
        /// Not only a part of the table was read.
        is_whole: bool,
        started: Instant,
        because: Reason,
    },
    /// The result of a comparison that has ended.
    TableCompared {
        table: TableId,
        what: Heavy,
        tally: Tally,
        started: Instant,
    },
    /// These keys differ from Postgres. Only the first [`NAMED`] of a comparison are named.
    Differs {
        table: TableId,
        keys: Vec<(DriftKind, Key)>,
    },
    /// A comparison was given up. The table stays as it is.
    TableNotCompared {
        table: TableId,
        what: Heavy,
        why: String,
    },
    /// An operation has compared all of its tables.
    Compared {
        what: Heavy,
        tally: Tally,
        elapsed: Duration,
    },
    Answer(AskId, Result<Answer, Refusal>),
    /// Whatever these hash slots, which had moved, may have lacked was written. Comes before any [`Effect::Execute`].
    Settled(BTreeSet<Lane>),
    /// A batch was planned that is larger than Redis accepts.
    TooLarge(EncodeError),
    /// Report, once, that this table cannot be followed as it is.
    TableBlocked {
        table: TableId,
        why: Blocked,
    },
    /// Postgres has lost changes that Redis has. Restart the session, and pass this on to the resume table.
    WentBack {
        because: String,
    },
}

/// What one acknowledged batch contained, for metrics, status and listeners.
#[derive(Debug, Default)]
pub struct Applied {
    /// Indexed by table.
    pub counts: Vec<Counts>,
    /// Commit times of the transactions that changed anything in Redis.
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
    /// Rows that have no key.
    pub keyless: u64,
}

/// What a session starts with, assembled by the bootstrap from the resume table's decision.
pub struct Start {
    pub specs: Arc<[TableSpec]>,
    /// The checkpoint that the takeover wrote and Redis acknowledged.
    pub checkpoint: Checkpoint,
    pub redis_time_ms: u64,
    /// Where the stream begins: the slot's confirmed position.
    pub from: EndLsn,
    /// Tables to load, with the reason.
    pub load: Vec<(TableId, Reason)>,
    /// Hash slots into which the other tables are loaded.
    pub lost: Option<Lost>,
    pub types: KnownTypes,
    pub own: OwnKeys,
    pub limits: Limits,
    pub spread: Spread,
    /// The places of hash slots that are written one by one. See [`Judged::places`](crate::lanes::book::Judged::places).
    pub places: Places,
    pub safe_when: SafeWhen,
    pub atomic_changes: u64,
    pub atomic_bytes: usize,
    /// The rows that are recorded in Redis as dead letters.
    pub dead_keys: Vec<(Key, DeadKey)>,
    /// How many of them are kept at most.
    pub most_dead_keys: usize,
    /// How many keys a TRUNCATE removes in one batch. With more keys than that, readers see it happen in parts.
    pub clear_keys: usize,
    pub wal_segment_bytes: u64,
    /// How often all rows are compared; `None` for never.
    pub verify_every: Option<Duration>,
    /// An operator has paused applying.
    pub paused: bool,
    pub now: Instant,
}

pub struct Machine {
    intake: Intake,
    tables: Tables,
    chunks: Chunks,
    key_reads: KeyReads,
    growing: Growing,
    in_flight: Option<InFlight>,
    outbox: Outbox,
    feedback: Feedback,
    desk: Desk,
    unannounced: Unannounced,
    /// How many keys a TRUNCATE removes in one batch.
    clear_keys: usize,
    /// A hash slot was ahead of the checkpoint when the session began. An earlier session may have owed it the removal of a
    /// record of a dead letter, and nobody else knows.
    doubts_dead: bool,
    /// The last batch was a step of a comparison of members: now it is the stream's turn.
    has_swept: bool,
    draining: bool,
}

/// What the daemon may observe of the machine, for the status and the metrics.
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
    /// How many hash slots have lost something that is being loaded again.
    pub healing: u16,
    pub operation: Option<Heavy>,
    pub executing: bool,
}

impl Machine {
    /// Returns the machine, and the loads to begin.
    pub fn start(start: Start) -> (Self, Vec<Effect>) {
        let Start { checkpoint, limits, from, now, .. } = start;
        let recording = if start.load.is_empty() { Recording::Tables } else { Recording::Keys };
        let atomic = (start.atomic_changes, start.atomic_bytes);
        let stream_went_back = start
            .lost
            .as_ref()
            .zip(lane_of_stream(&start.own))
            .is_some_and(|(lost, stream)| lost.lanes.contains(&stream));
        let longest_name = start.specs.iter().map(|spec| spec.name.len()).max().unwrap_or(0);
        let dead = DeadKeys::new(start.specs.len(), start.most_dead_keys, limits.batch_bytes / 32);
        let mut tables = Tables::new(&start.specs, &checkpoint, dead, now);
        let mut growing = Growing::new(&limits, start.own.changes().is_some());
        if let Some(lost) = start.lost {
            tables.lose(lost);
        }
        growing.forgets(tables.restore_dead_keys(start.dead_keys, &checkpoint));
        let mut machine = Machine {
            intake: Intake::new(
                start.specs,
                start.types,
                &checkpoint,
                (from, start.spread.ahead()),
                recording,
                atomic,
                weight_of_announcement(&start.own, longest_name),
            ),
            tables,
            chunks: Chunks::default(),
            key_reads: KeyReads::default(),
            growing,
            in_flight: None,
            feedback: Feedback::new(from, checkpoint.lsn, start.safe_when, start.wal_segment_bytes),
            outbox: Outbox::new(start.own, limits, (start.spread, start.places), checkpoint, start.redis_time_ms, now),
            desk: Desk::new(start.paused, start.verify_every),
            unannounced: Unannounced::default(),
            clear_keys: start.clear_keys,
            doubts_dead: false,
            has_swept: false,
            draining: false,
        };
        machine.doubts_dead = !machine.outbox.has_caught_up();
        if stream_went_back {
            machine.tables.change_beside();
        }
        let mut turn = Turn::at(now);
        for (table, because) in start.load {
            machine.begin_load(table, because, Trust::Incomplete, &mut turn);
        }
        machine.read_hash_slots(&mut turn);
        (machine, turn.into_effects())
    }

    /// Performs one step and returns its effects.
    ///
    /// # Panics
    /// If the input is impossible: a delivery that [`Self::takes_deliveries`] or a similar method does not admit, or an
    /// answer to a question that was not asked. That is a bug, and nothing may be written after it. The next start
    /// resumes from the checkpoint.
    pub fn step(&mut self, input: Input, now: Instant) -> Vec<Effect> {
        let mut turn = Turn::at(now);
        self.take(input, &mut turn);
        if self.in_flight.is_none() {
            self.start_batch(&mut turn);
            self.deliver_what_fits(&mut turn);
        }
        self.key_reads.order(&mut turn);
        // A chunk that waits for the rest of a split transaction keeps waiting while applying is paused.
        let has_changes = self.growing.has_changes() || self.intake.holds_back();
        if self.in_flight.is_none() && !has_changes && (self.is_split() || !self.chunks.is_any_ready()) {
            self.desk.pause_is_reached(&mut turn);
        }
        debug_assert!(self.is_sound(), "the state is inconsistent");
        turn.into_effects()
    }

    fn take(&mut self, input: Input, turn: &mut Turn) {
        match input {
            Input::Delivered { items, bytes } => {
                assert!(self.takes_deliveries(), "deliveries arrive only while they are taken");
                let before = self.growing.count();
                self.intake.hold(items);
                self.deliver_what_fits(turn);
                if self.growing.count() > before || self.intake.holds_back() {
                    self.growing.keeps_bytes(bytes);
                }
            }
            Input::Load(message) => {
                assert!(self.takes_chunks(), "chunks arrive only while they are taken");
                self.load_says(message, turn);
            }
            Input::Renew(page) => {
                assert!(self.takes_renewals(), "one page of renewals at a time");
                let began_ms = self.outbox.redis_time_ms(page.round_began);
                self.tables.get_mut(page.table).renewal_begins(began_ms);
                self.growing.renews(page);
            }
            Input::Probed(found) => self.probed(found, turn),
            Input::Inspected(answers) => self.inspected(answers, turn),
            Input::Scanned { keys, next } => self.scanned(keys, next, turn),
            Input::Executed { redis_time_ms } => self.executed(redis_time_ms, turn),
            Input::Sampled { snapshot, flushed } => {
                let (received, applied) = (self.intake.received(), self.outbox.acknowledged().lsn);
                self.feedback.sampled(&snapshot, flushed, received, applied, turn.now);
            }
            Input::Catalog(table, seen) => self.catalog_says(table, seen, turn),
            Input::Evicted(keys) => self.evicted(keys, turn),
            Input::Durable(lsn) => self.feedback.is_safe(lsn),
            Input::Moved(lanes) => self.tables.hash_slots().move_away(lanes, turn.now),
            Input::PositionWanted => self.feedback.wants_position(),
            Input::Compared(differences) => self.compared(&differences, turn),
            Input::NotCompared(why) => self.part_not_compared(&why, turn),
            Input::Asked(ask, operation) => self.asked(ask, operation, turn),
            Input::Tick => {
                self.retry_broken(turn);
                self.read_hash_slots(turn);
                self.verify_when_due(turn);
            }
        }
    }

    /// Checks the invariants that hold after every step.
    fn is_sound(&self) -> bool {
        let reads_go_on = !self.key_reads.is_empty() || self.draining;
        let is_asked_for = self.desk.what().is_some() || !self.tables.any(Table::is_compared);
        self.tables.iter().all(|table| table.is_sound(reads_go_on)) && is_asked_for && self.key_reads.is_sound()
    }

    /// Whether more of the stream may be handed over. Otherwise it waits in its channel, and then in Postgres.
    pub fn takes_deliveries(&self) -> bool {
        let has_room = self.growing.takes_more(self.outbox.most_changes()) || self.in_flight.is_none();
        !self.draining && !self.desk.is_paused() && !self.intake.holds_back() && has_room
    }

    /// Whether a transaction over the atomic limits is partly in Redis, or will be with the growing batch.
    fn is_split(&self) -> bool {
        self.growing.within().unwrap_or(self.outbox.checkpoint().within).is_some()
    }

    pub fn takes_chunks(&self) -> bool {
        let has_room = self.growing.takes_chunks(self.outbox.limits()) && self.chunks.has_room();
        !self.draining && !self.desk.is_paused() && has_room && self.outbox.has_caught_up()
    }

    pub fn takes_renewals(&self) -> bool {
        !self.draining && self.outbox.has_caught_up() && self.growing.takes_renewals()
    }

    pub fn limits(&self) -> Limits {
        *self.outbox.limits()
    }

    /// Takes effect with the next batch.
    pub fn plan_for(&mut self, limits: Limits) {
        self.outbox.plans_for(limits);
    }

    /// Stops taking input, and writes what was taken.
    pub fn drain(&mut self) {
        self.draining = true;
        self.intake.drain();
        self.chunks.clear();
    }

    /// Whether nothing is left to write and nothing is in flight.
    pub fn is_drained(&self) -> bool {
        let lsn = self.outbox.acknowledged().lsn;
        let is_in = self.growing.through().is_none_or(|through| through <= lsn);
        // Hash slots that no batch concerned are behind, and lack nothing. They are waited for in the stream only.
        let is_safe = || !self.outbox.is_one_transaction() || self.feedback.has_safe(lsn);
        let is_agreed = !self.outbox.checkpoint().lists_in_doubt;
        self.in_flight.is_none() && !self.growing.has_work() && is_in && is_agreed && is_safe()
    }

    pub fn confirmed(&self) -> Option<ConfirmedLsn> {
        self.feedback.confirmed()
    }

    /// Redis has everything before it.
    pub fn applied(&self) -> AppliedLsn {
        AppliedLsn(self.outbox.acknowledged().lsn)
    }

    pub fn fresh_as_of(&self) -> Option<Instant> {
        self.feedback.fresh_as_of()
    }

    pub fn pings(&self) -> u64 {
        self.feedback.pings()
    }

    /// Drops records of transactions that every snapshot sees. `floors` has one snapshot for each read in progress, no
    /// newer than the one it reads under.
    pub fn prune(&mut self, newest: &Snapshot, floors: &[Snapshot]) {
        self.intake.prune(newest, floors);
    }

    /// When a verification of all tables last succeeded, in this run of the daemon or an earlier one, by Redis TIME.
    pub fn verified_ms(&self) -> Option<u64> {
        self.outbox.checkpoint().verified_ms()
    }

    /// Returns the first `most` of the rows that Redis cannot hold, for people.
    pub fn dead_keys(&self, most: usize) -> Vec<(Key, DeadKey)> {
        self.tables.dead_keys(most)
    }

    pub fn observe(&self) -> Observed {
        let acknowledged = self.outbox.acknowledged();
        let oldest = self.in_flight.as_ref().and_then(InFlight::oldest_commit).or_else(|| self.growing.oldest_commit());
        Observed {
            received: self.intake.received(),
            applied: acknowledged.lsn,
            confirmed: self.confirmed(),
            server: self.feedback.server(),
            fresh_as_of: self.fresh_as_of(),
            oldest_unapplied: oldest.or_else(|| self.intake.open().map(|begin| begin.time)),
            epoch: self.outbox.checkpoint().epoch,
            seq: acknowledged.seq,
            tables: self.tables.seen(),
            healing: self.outbox.checkpoint().healing,
            operation: self.desk.what(),
            executing: self.in_flight.is_some(),
        }
    }
}

/// Takes keys from the front: as many of one kind as a batch may hold, and at least one.
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
