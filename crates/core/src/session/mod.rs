//! One session: what arrives goes in, what is to be done comes out. Pure: no I/O, no async, no clock of its own.
//!
//! Everything that is written to Redis passes through here, in one order. While one batch is on its way, the next one
//! grows from whatever arrives; a batch is sent as soon as the writer is free. Any failure of the batch on its way ends
//! the session, and the next session starts from the checkpoint in Redis: nothing here is ever undone.
//!
//! Each part owns its state, and no other file writes it:
//!
//! - [`intake`]: the open transaction, how the stream describes the tables ([`shapes`]), what snapshots may not have seen.
//! - [`tables`]: a [`table::Table`] for each: what readers may think of it, its load, its pending keys. And [`dead`]: rows
//!   that Redis cannot hold.
//! - [`chunks`] and [`key_reads`]: what the loader has brought, and what it is to read again.
//! - [`growing`]: the batch that grows. [`in_flight`]: the batch that leaves. [`outbox`]: the checkpoint.
//! - [`feedback`]: what Postgres may be told. [`operate`]: what an operator has asked for.
//!
//! [`deliver`] is the way of a delivery through them, [`loads`] and [`judge`] the way of a chunk.
//!
//! It must not know SQL, wire bytes or HTTP. Wrong here means: torn rows, rows that go backwards, changes confirmed that
//! Redis does not have.

pub mod chunk;
mod chunks;
mod dead;
mod deliver;
mod feedback;
mod growing;
mod in_flight;
pub mod inspect;
mod intake;
mod judge;
mod key_reads;
mod loads;
mod operate;
pub mod operation;
mod outbox;
mod shapes;
mod table;
mod tables;
pub mod takeover;
mod turn;

use crate::admin::{Answer, Operation, Refusal, Tally};
use crate::change::{CommitTime, Delivery};
use crate::checkpoint::{Blocked, Checkpoint};
use crate::command::{self, DeadKey, Key, Op};
use crate::lsn::{AppliedLsn, EndLsn, Lsn};
use crate::progress::ledger::ConfirmedLsn;
use crate::progress::visibility::{Recording, Snapshot};
use crate::reason::Reason;
use crate::resp::batch::{Batch, Limits, OwnKeys, TooLarge};
use crate::schema::{Oid, TableId, TableSpec};
use bytes::Bytes;
use chunk::{CatalogSeen, FromLoad, LoadOrder, RenewalPage};
use chunks::Chunks;
use dead::DeadKeys;
use feedback::Feedback;
use growing::Growing;
use in_flight::InFlight;
use inspect::{Comparison, Differences, Probe};
use intake::Intake;
use key_reads::KeyReads;
use operate::Desk;
use operation::{AskId, Heavy};
use outbox::Outbox;
use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};
use table::{Table, Trust};
use tables::Tables;
use turn::Turn;

pub use dead::DEAD_KEYS;
pub use feedback::SafeWhen;
pub use outbox::HEARTBEAT;
pub use tables::TableSeen;

/// Events kept for listeners, a batch. They see at most 100 a second.
const EVENTS_A_BATCH: usize = 256;

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
        batch: Batch,
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
    slot_snapshot: Option<Snapshot>,
    /// Keys that a TRUNCATE removes at once.
    clear_keys: usize,
    draining: bool,
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
        let Start { checkpoint, limits, from, now, .. } = start;
        let recording = if start.load.is_empty() { Recording::Tables } else { Recording::Keys };
        let atomic = (start.atomic_changes, start.atomic_bytes);
        let dead = DeadKeys::new(start.specs.len(), start.most_dead_keys, limits.batch_bytes / 32);
        let mut tables = Tables::new(&start.specs, &checkpoint, dead, now);
        let mut growing = Growing::new(&limits);
        growing.forgets(tables.restore_dead_keys(start.dead_keys, &checkpoint));
        let mut machine = Machine {
            intake: Intake::new(start.specs, start.booleans, &checkpoint, from, recording, atomic),
            tables,
            chunks: Chunks::default(),
            key_reads: KeyReads::default(),
            growing,
            in_flight: None,
            feedback: Feedback::new(from, checkpoint.lsn, start.safe_when, start.wal_segment_bytes),
            outbox: Outbox::new(start.own, limits, checkpoint, start.redis_time_ms, now),
            desk: Desk::new(start.paused, start.verify_every),
            slot_snapshot: start.slot_snapshot,
            clear_keys: start.clear_keys,
            draining: false,
        };
        let mut turn = Turn::at(now);
        for (table, because) in start.load {
            machine.begin_load(table, because, Trust::Incomplete, &mut turn);
        }
        (machine, turn.into_effects())
    }

    /// # Panics
    /// On an input that cannot come: one that was not asked for ([`Self::takes_deliveries`] and its like say what is), or
    /// the answer to a question that was not put. It stems from a fault of the program, and nothing may be written after
    /// it; the next start goes on from the checkpoint.
    pub fn step(&mut self, input: Input, now: Instant) -> Vec<Effect> {
        let mut turn = Turn::at(now);
        self.take(input, &mut turn);
        if self.in_flight.is_none() {
            self.start_batch(&mut turn);
            self.deliver_what_fits(&mut turn);
        }
        self.key_reads.order(&mut turn);
        // A chunk that waits for the rest of a transaction waits until it is resumed.
        let has_changes = self.growing.has_changes() || self.intake.holds_back();
        if self.in_flight.is_none() && !has_changes && (self.is_split() || !self.chunks.is_any_ready()) {
            self.desk.pause_is_reached(&mut turn);
        }
        debug_assert!(self.is_sound(), "the state contradicts itself");
        turn.into_effects()
    }

    fn take(&mut self, input: Input, turn: &mut Turn) {
        match input {
            Input::Delivered { items, bytes } => {
                assert!(self.takes_deliveries(), "deliveries come when they are taken");
                let before = self.growing.count();
                self.intake.hold(items);
                self.deliver_what_fits(turn);
                if self.growing.count() > before || self.intake.holds_back() {
                    self.growing.keeps_bytes(bytes);
                }
            }
            Input::Load(message) => {
                assert!(self.takes_chunks(), "chunks come when they are taken");
                self.load_says(message, turn);
            }
            Input::Renew(page) => {
                assert!(self.takes_renewals(), "one page of renewals at a time");
                let began_ms = self.outbox.redis_time_ms(page.round_began);
                self.tables.get_mut(page.table).renewal_begins(began_ms);
                self.growing.renews(page);
            }
            Input::Probed(found) => self.probed(&found, turn),
            Input::Scanned { keys, next } => self.scanned(keys, next, turn),
            Input::Executed { redis_time_ms } => self.executed(redis_time_ms, turn),
            Input::Sampled { snapshot, flushed } => {
                let (received, applied) = (self.intake.received(), self.outbox.acknowledged().lsn);
                self.feedback.sampled(&snapshot, flushed, received, applied, turn.now);
            }
            Input::Catalog(table, seen) => self.catalog_says(table, seen, turn),
            Input::Evicted(keys) => self.evicted(keys, turn),
            Input::Durable(lsn) => self.feedback.is_safe(lsn),
            Input::PositionWanted => self.feedback.wants_position(),
            Input::Compared(differences) => self.compared(&differences, turn),
            Input::NotCompared(why) => self.part_not_compared(&why, turn),
            Input::Asked(ask, operation) => self.asked(ask, operation, turn),
            Input::Tick => {
                self.retry_broken(turn);
                self.verify_when_due(turn);
            }
        }
    }

    /// What holds after every step.
    fn is_sound(&self) -> bool {
        let reads_go_on = !self.key_reads.is_empty() || self.draining;
        let is_asked_for = self.desk.what().is_some() || !self.tables.any(Table::is_compared);
        self.tables.iter().all(|table| table.is_sound(reads_go_on)) && is_asked_for && self.key_reads.is_sound()
    }

    /// May the loop hand over more of the stream? Otherwise it stays in its channel, and then in Postgres.
    pub fn takes_deliveries(&self) -> bool {
        let has_room = self.growing.takes_more() || self.in_flight.is_none();
        !self.draining && !self.desk.is_paused() && !self.intake.holds_back() && has_room
    }

    /// A transaction over the atomic limits is half in Redis, or will be with the growing batch.
    fn is_split(&self) -> bool {
        self.growing.within().unwrap_or(self.outbox.checkpoint().within).is_some()
    }

    pub fn takes_chunks(&self) -> bool {
        let has_room = self.growing.takes_chunks(self.outbox.limits()) && self.chunks.has_room();
        !self.draining && !self.desk.is_paused() && has_room
    }

    pub fn takes_renewals(&self) -> bool {
        !self.draining && self.growing.takes_renewals()
    }

    pub fn limits(&self) -> Limits {
        *self.outbox.limits()
    }

    /// From the next batch on.
    pub fn plan_for(&mut self, limits: Limits) {
        self.outbox.plans_for(limits);
    }

    /// Takes nothing more; what is in hand goes out.
    pub fn drain(&mut self) {
        self.draining = true;
        self.intake.drain();
        self.chunks.clear();
    }

    /// Nothing is in hand and nothing is on its way.
    pub fn is_drained(&self) -> bool {
        let lsn = self.outbox.acknowledged().lsn;
        let is_in = self.growing.through().is_none_or(|through| through <= lsn);
        self.in_flight.is_none() && !self.growing.has_work() && is_in && self.feedback.has_safe(lsn)
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

    /// Forgets what no snapshot can miss any more. `floors`: what each read under way has seen at least.
    pub fn prune(&mut self, newest: &Snapshot, floors: &[Snapshot]) {
        self.intake.prune(newest, floors);
    }

    /// When the verification of every table last succeeded, in this life or an earlier one: by Redis TIME.
    pub fn verified_ms(&self) -> Option<u64> {
        self.outbox.checkpoint().verified_ms()
    }

    /// The first rows that Redis cannot hold, for people.
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
            operation: self.desk.what(),
            executing: self.in_flight.is_some(),
        }
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
