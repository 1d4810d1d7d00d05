//! A daemon: the real machine, resume table and takeover. This module plays the asynchronous code around them, in small
//! steps, so that anything can happen between two of them.

use super::loader::Errands;
use super::postgres::{self, Extra, Postgres, RowId, TABLES, Values, end_lsn, lsn};
use super::redis::{Answer, CHECKPOINT, ENTRIES, Request};
use super::starting::{Memory, Starting, Stepped};
use super::writer::Writer;
use super::{Outside, Violation};
use crate::admin::{Answer as Answered, Operation, Refusal, Repair, Scope, Tally};
use crate::change::Delivery;
use crate::checkpoint::Place;
use crate::command::{DeadKey, DeadLetter, EncodedRows, Key, Unwritable};
use crate::format::Format;
use crate::lanes::book::{Book, Places};
use crate::lookups::Lookups;
use crate::lsn::AppliedLsn;
use crate::plan::key;
use crate::plan::mapping::Mapping;
use crate::progress::resume::ConfiguredTable;
use crate::progress::visibility::Snapshot;
use crate::resp::batch::{Encoding, Limits, Members, OwnKeys, RowsEncoder};
use crate::schema::{CatalogMark, LookupSpec, NullRule, TableId, TableSpec};
use crate::session::load_messages::{CatalogSeen, Floors, FromLoad, LoadOrder, RenewalPage};
use crate::session::operation::AskId;
use crate::session::takeover::Taken;
use crate::session::{Effect, Input, Machine, SafeWhen, Spread, Start};
use crate::typed::known::KnownTypes;
use crate::typed::row_type::{ColumnType, EncodedRowType, JsonType, RowType};
use bytes::Bytes;
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Instant;

const TTL_MS: u64 = 24 * 3_600_000;

/// All columns are texts.
pub fn known_types() -> KnownTypes {
    KnownTypes { in_json: [(postgres::TEXT, Ok(JsonType::String))].into(), ..KnownTypes::default() }
}

/// The configuration, which is the same for every daemon.
pub struct Setting {
    pub specs: Arc<[TableSpec]>,
    /// The mappings of each table, without the extra column and with it.
    mappings: Vec<[Arc<Mapping>; 2]>,
    pub own: OwnKeys,
    pub limits: Limits,
    pub safe_when: SafeWhen,
}

impl Setting {
    /// `limits`: the limits of Redis. `tags`: the hash tags of the tables' keys.
    #[cfg(test)]
    pub fn new(
        limits: Limits,
        safe_when: SafeWhen,
        tags: [Option<&str>; TABLES as usize],
        formats: [Format; TABLES as usize],
    ) -> Self {
        Self::with_lookups(limits, safe_when, tags, formats, &[])
    }

    /// `lookups`: the template and the order column of each lookup of each table. Each template follows the table's name.
    pub fn with_lookups(
        limits: Limits,
        safe_when: SafeWhen,
        tags: [Option<&str>; TABLES as usize],
        formats: [Format; TABLES as usize],
        lookups: &[(&str, Option<&str>)],
    ) -> Self {
        let lookup = |table: u16, key: &str, order: Option<&str>| LookupSpec {
            name: key.to_owned(),
            key: key::parse_lookup(&format!("{}{key}", postgres::name(table).table)).expect("a template"),
            order: order.map(str::to_owned),
        };
        let spec = |table: u16| {
            let name = postgres::name(table);
            let tag = tags[usize::from(table)].map_or(String::new(), |tag| format!("{{{{{tag}}}}}:"));
            TableSpec {
                id: TableId(table),
                name: name.table.clone(),
                key: key::parse_template(&format!("{}:{tag}{{id}}", name.table)).expect("a template"),
                table: name,
                columns: Vec::new(),
                rename: Vec::new(),
                null: NullRule::Empty,
                ttl_ms: TTL_MS,
                format: formats[usize::from(table)],
                lookups: lookups.iter().map(|(key, order)| lookup(table, key, *order)).collect(),
            }
        };
        let specs: Arc<[TableSpec]> = (0..TABLES).map(spec).collect();
        let bind = |spec: &TableSpec, columns| {
            let relation = postgres::relation(spec.id.0, columns);
            Arc::new(Mapping::bind(spec, &relation, &known_types()).expect("it fits"))
        };
        let mappings = specs.iter().map(|spec| [0, 1].map(|columns| bind(spec, columns))).collect();
        let own = OwnKeys::under("prefetchd:{s}:");
        assert_eq!((own.checkpoint().as_bytes(), own.tables().as_bytes()), (CHECKPOINT, ENTRIES));
        Setting { specs, mappings, own, limits, safe_when }
    }

    /// Returns the lookups of each table that has any.
    pub fn lookups(&self) -> BTreeMap<u16, Arc<Lookups>> {
        self.specs.iter().filter_map(|spec| Some((spec.id.0, Lookups::of(spec)?))).collect()
    }

    /// Returns the tables as the catalog describes them. Nothing is known of a table that cannot be followed.
    pub fn configured(&self, postgres: &Postgres) -> Vec<ConfiguredTable> {
        let configured = |spec: &TableSpec| {
            let (fingerprint, catalog) = match postgres.unfit[spec.id.index()] {
                true => (0, CatalogMark { shape: 0, storage: 0 }),
                false => (self.mapping_now(spec.id, postgres).fingerprint, postgres.mark(spec.id.0)),
            };
            ConfiguredTable { name: spec.name.clone(), template: spec.key.to_string(), fingerprint, catalog }
        };
        self.specs.iter().map(configured).collect()
    }

    pub fn mapping(&self, table: TableId, columns: u64) -> &Mapping {
        &self.mappings[table.index()][usize::from(postgres::has_extra(columns))]
    }

    /// Returns what the columns become in JSON.
    pub fn types(&self, table: TableId, columns: u64) -> EncodedRowType {
        let text = |_| ColumnType { json_type: JsonType::String, may_be_null: true, inexact: None };
        RowType::of(&self.mapping(table, columns).layout, text).encode()
    }

    fn mapping_now(&self, table: TableId, postgres: &Postgres) -> &Mapping {
        self.mapping(table, postgres.columns[table.index()])
    }

    pub fn start(
        &self,
        taken: Taken,
        (spread, places): (Spread, Places),
        dead: Vec<Key>,
        redis_time_ms: u64,
        now: Instant,
    ) -> Start {
        let Taken { from, checkpoint, load, lost } = taken;
        Start {
            spread,
            places,
            specs: self.specs.clone(),
            checkpoint,
            redis_time_ms,
            from,
            load,
            lost,
            types: known_types(),
            own: self.own.clone(),
            limits: self.limits,
            dead_keys: dead.into_iter().map(|key| (key, DeadKey::from_json(b""))).collect(),
            most_dead_keys: 100,
            safe_when: self.safe_when,
            atomic_changes: postgres::ATOMIC as u64,
            atomic_bytes: usize::MAX,
            clear_keys: usize::MAX,
            wal_segment_bytes: 16 << 20,
            verify_every: None,
            paused: false,
            now,
        }
    }

    pub fn catalog(&self, table: TableId, postgres: &Postgres) -> CatalogSeen {
        CatalogSeen::Table {
            fingerprint: self.mapping_now(table, postgres).fingerprint,
            mark: postgres.mark(table.0),
            composition: postgres.composition(table.0),
            types: self.types(table, postgres.columns[table.index()]),
            written_by: postgres.written_by(table.0),
        }
    }

    #[cfg(test)]
    pub fn began(&self, table: TableId, load: crate::session::load_messages::LoadId, postgres: &Postgres) -> FromLoad {
        FromLoad::Began {
            table,
            load,
            fingerprint: self.mapping_now(table, postgres).fingerprint,
            catalog: postgres.mark(table.0),
            composition: postgres.composition(table.0),
            types: self.types(table, postgres.columns[table.index()]),
            estimated_rows: 3,
            known_types: known_types(),
            is_empty: false,
        }
    }

    /// Returns the key of each row.
    pub fn keys(&self) -> BTreeMap<RowId, Key> {
        let rows = (0..TABLES).flat_map(|table| (0..postgres::IDS).map(move |id| RowId { table, id }));
        rows.map(|row| (row, self.key(row))).collect()
    }

    pub fn key(&self, row: RowId) -> Key {
        key::from_segments(&self.specs[usize::from(row.table)].key.literal, &[Bytes::from(row.id.to_string())])
    }

    /// Returns how many rows are written to Redis in one step.
    pub fn rows_a_part(&self) -> usize {
        if self.limits.planned_bytes == self.limits.batch_bytes { 2 } else { 4 }
    }

    pub fn encoded(
        &self,
        rows: &[(RowId, Values, Extra)],
        columns: u64,
        members: Members,
    ) -> (EncodedRows, Vec<Unwritable>) {
        let of_table = rows.first().map(|(row, ..)| self.mapping(TableId(row.table), columns));
        let lookups = of_table.and_then(|mapping| mapping.lookups.clone());
        let (mut out, mut unwritable) =
            (RowsEncoder::new(Encoding { limits: self.limits, members }, lookups), Vec::new());
        for (row, values, extra) in rows {
            let layout = &self.mapping(TableId(row.table), columns).layout;
            let key = self.key(*row);
            if out.push(key.clone(), layout, &postgres::full(*row, *values, *extra)).is_err() {
                let table = postgres::name(row.table).table;
                let (lsn, reason, row) = (String::new(), String::new(), Bytes::new());
                let letter = DeadLetter { table, key: key.0.clone(), lsn, xid: 0, reason, row };
                unwritable.push(Unwritable { key, code: "too_large", letter });
            }
        }
        (out.finish(), unwritable)
    }
}

/// A process. A crash loses its memory.
pub struct Daemon {
    number: usize,
    /// A frozen daemon does nothing, but keeps its connections.
    pub frozen: bool,
    memory: Memory,
    life: Life,
}

enum Life {
    Idle,
    Starting(Box<Starting>),
    Working(Box<Session>),
}

impl Daemon {
    pub fn new(number: usize) -> Self {
        Daemon { number, frozen: false, memory: Memory::default(), life: Life::Idle }
    }

    pub fn session_mut(&mut self) -> Option<&mut Session> {
        match &mut self.life {
            Life::Working(session) => Some(session),
            _ => None,
        }
    }

    pub fn session(&self) -> Option<&Session> {
        match &self.life {
            Life::Working(session) => Some(session),
            _ => None,
        }
    }

    pub fn writer(&self) -> Option<usize> {
        match &self.life {
            Life::Idle => None,
            Life::Starting(starting) => Some(starting.connection()),
            Life::Working(session) => Some(session.writer.connection),
        }
    }

    /// Breaks the stream or, while the daemon is starting, every connection to Postgres.
    pub fn lose_postgres(&mut self, world: &mut Outside) {
        match &mut self.life {
            Life::Working(session) => session.lost_postgres = true,
            Life::Idle => {}
            Life::Starting(_) => self.rest(world),
        }
    }

    pub fn crash(&mut self, world: &mut Outside) {
        self.rest(world);
        (self.memory, self.frozen) = (Memory::default(), false);
    }

    /// Ends whatever the daemon was doing.
    fn rest(&mut self, world: &mut Outside) {
        if let Some(writer) = self.writer() {
            world.redis.cut(writer, &mut world.rng);
        }
        world.postgres.drop_temporary_slot(self.number as u64);
        if let (Life::Working(session), Some(slot)) = (&self.life, &mut world.postgres.slot)
            && slot.active == Some(session.token)
            // Postgres may take a while to notice that the connection is gone.
            && world.rng.percent(70)
        {
            slot.active = None;
        }
        self.life = Life::Idle;
    }

    pub fn step(&mut self, world: &mut Outside, setting: &Setting) -> Result<(), Violation> {
        if self.frozen {
            return Ok(());
        }
        let number = self.number;
        let Life::Working(session) = &mut self.life else { return self.begin(world, setting) };
        let ended = session.step(world, setting)?;
        session.notice(world)?;
        if let Some(why) = ended {
            self.memory.went_back = session.went_back.take().or(self.memory.went_back.take());
            world.say(|_| format!("daemon {number}: session ended, {why}"));
            self.rest(world);
        }
        Ok(())
    }

    fn begin(&mut self, world: &mut Outside, setting: &Setting) -> Result<(), Violation> {
        if self.writer().is_some_and(|writer| world.redis.is_cut(writer)) {
            self.rest(world);
            return Ok(());
        }
        let number = self.number;
        self.life = match std::mem::replace(&mut self.life, Life::Idle) {
            Life::Idle => match Starting::connect(number, world, setting)? {
                None => Life::Idle,
                Some(starting) => {
                    world.say(|_| format!("daemon {number}: {}", starting.describe()));
                    Life::Starting(starting)
                }
            },
            Life::Starting(starting) => {
                let (was, connection) = (starting.place(), starting.connection());
                match starting.step(&mut self.memory, world, setting)? {
                    Stepped::GivesUp => self.idle(world, connection),
                    Stepped::Ready { writer, spread, places, dead, taken } => {
                        let start = setting.start(*taken, (spread, places), dead, world.redis.time_ms, world.now());
                        self.start(world, setting, *writer, start)?
                    }
                    Stepped::Goes(starting) => {
                        if starting.place() != was {
                            world.say(|_| format!("daemon {number}: {}", starting.describe()));
                        }
                        Life::Starting(starting)
                    }
                }
            }
            working @ Life::Working(_) => working,
        };
        Ok(())
    }

    fn idle(&self, world: &mut Outside, connection: usize) -> Life {
        world.redis.cut(connection, &mut world.rng);
        world.postgres.drop_temporary_slot(self.number as u64);
        Life::Idle
    }

    /// Performs START_REPLICATION and starts the machine.
    fn start(&self, world: &mut Outside, setting: &Setting, writer: Writer, start: Start) -> Result<Life, Violation> {
        let from = start.from;
        let token = world.next_number();
        match &mut world.postgres.slot {
            Some(slot) if slot.active.is_none() && !slot.is_lost => slot.active = Some(token),
            Some(_) | None => return Ok(self.idle(world, writer.connection)),
        }
        // The server silently moves the start position forward.
        let streams_from = from.0.get().max(world.postgres.slot.map_or(0, |s| s.confirmed));
        // When the stream reaches the beginning of its commit record, it is not known yet whether a partly applied
        // transaction is redelivered.
        let parts = [start.checkpoint.within.map(|within| within.begin), start.checkpoint.clearing];
        let until = parts.iter().flatten().map(|begin| begin.commit.0.get() + 1).max();
        let ahead = match start.spread {
            Spread::Slots { ahead: Some(Place { at, done }), .. } => at.get() + u64::from(done > 0),
            Spread::Slots { ahead: None, .. } | Spread::OneSlot => 0,
        };
        let covered_until = until.unwrap_or(start.checkpoint.lsn.0.get()).max(ahead);
        let clear_keys = if world.postgres.clears_in_parts { 1 } else { start.clear_keys };
        let most_dead_keys = world.postgres.most_dead_keys;
        let safe_when = start.safe_when;
        let retired = start.checkpoint.retired.clone();
        let (machine, effects) = Machine::start(Start { clear_keys, most_dead_keys, ..start });
        let mut session = Session {
            token,
            writer,
            machine,
            floors: Floors::default(),
            loader: Errands::new(retired, world, setting),
            safe_when,
            from: streams_from,
            read_until: 0,
            delivered: VecDeque::new(),
            told: [None; TABLES as usize],
            in_flight: false,
            reads_out: 0,
            sample: None,
            renewing: vec![(0, None); usize::from(TABLES)],
            round_began: vec![world.now(); usize::from(TABLES)],
            page_out: false,
            lost_postgres: false,
            covered_until,
            went_back: None,
            confirmed: 0,
            asking: BTreeMap::new(),
            asks: 0,
            paused: false,
            verified: None,
        };
        world.say(|_| format!("daemon {}: works, session {token}", self.number));
        world.log.saw(&safe_when);
        session.perform(effects, world)?;
        Ok(Life::Working(Box::new(session)))
    }
}

/// Stands in for `bridge::apply`, the loop that drives the machine.
pub struct Session {
    token: u64,
    writer: Writer,
    machine: Machine,
    floors: Floors,
    loader: Errands,
    /// Where the walsender begins to send.
    from: u64,
    /// How far the walsender has read.
    read_until: u64,
    /// Sent, but not yet received by the machine.
    delivered: VecDeque<Delivery>,
    told: [Option<u64>; TABLES as usize],
    in_flight: bool,
    safe_when: SafeWhen,
    /// The number of key reads that were ordered and have been neither judged nor given up.
    reads_out: usize,
    sample: Option<(String, u64)>,
    /// Where the renewal of each table's keys continues: in which area, and after which key.
    renewing: Vec<(usize, Option<Key>)>,
    round_began: Vec<Instant>,
    /// A page of renewals was handed to the machine and is not written yet.
    page_out: bool,
    lost_postgres: bool,
    /// Once the stream has reached this position, everything that Redis has any part of has been redelivered.
    covered_until: u64,
    went_back: Option<String>,
    confirmed: u64,
    /// The operators' requests that are not answered yet.
    asking: BTreeMap<u64, Operation>,
    asks: u64,
    paused: bool,
    /// What the last completed verification found and repaired.
    pub verified: Option<Tally>,
}

#[derive(Clone, Copy)]
enum Step {
    Land,
    Deliver,
    Load,
    LoaderSteps,
    Sample,
    Tick,
    PositionWanted,
    Renew,
    FeedBack,
    Ask,
    LookAtCatalog,
    LookAtEvictions,
    Sync,
}

/// Why a session ended.
type Ended = Option<String>;

impl Session {
    /// Returns whether everything that Postgres has is in Redis, and confirmed.
    pub fn has_everything(&self, world: &Outside) -> bool {
        let last = world.postgres.last_record();
        self.machine.applied().0.0.get() >= last
            && self.machine.confirmed().is_some_and(|c| c.end().0.get() >= last)
            && !self.in_flight
            && self.loader.is_idle()
    }

    pub fn holds(&self, active: Option<u64>) -> bool {
        active == Some(self.token)
    }

    pub fn holds_the_slot(&self, world: &Outside) -> bool {
        world.postgres.slot.is_some_and(|slot| slot.active == Some(self.token))
    }

    /// Checks what must have been noticed. Once everything between the slot's position and Redis's position has been
    /// redelivered, the daemon must know whether Postgres still has the same history.
    fn notice(&self, world: &mut Outside) -> Result<(), Violation> {
        // Otherwise the machine waits for these reads forever, and eventually orders no more.
        if self.loader.is_idle() && self.reads_out > 0 {
            return Err(format!("{} reads of keys were ordered, and nobody makes them", self.reads_out));
        }
        let came_by = self.machine.observe().received.0.get().max(self.from) >= self.covered_until;
        let is_cut = self.lost_postgres || world.redis.is_cut(self.writer.connection);
        // A table that is being loaded may be new, so redelivered changes to it prove nothing before the load has
        // ended.
        let may_know = came_by && !is_cut && !self.writer.was_overtaken(world);
        if world.observer.adrift && may_know && self.went_back.is_none() && world.is_loaded()? {
            world.observer.noticed(&world.redis, &world.postgres)?;
        }
        Ok(())
    }

    /// Performs one of the steps that are possible at the moment.
    fn step(&mut self, world: &mut Outside, setting: &Setting) -> Result<Ended, Violation> {
        use Step::{
            Ask, Deliver, FeedBack, Land, Load, LoaderSteps, LookAtCatalog, LookAtEvictions, PositionWanted, Renew,
            Sample, Sync, Tick,
        };
        let mut can: Vec<(Step, u64)> = vec![
            (Sample, 8),
            (Tick, 5),
            (PositionWanted, 1),
            (FeedBack, 5),
            (Ask, 2),
            (LookAtCatalog, 6),
            (LookAtEvictions, 1),
        ];
        if self.safe_when == SafeWhen::Told && !world.redis.is_cluster() {
            can.push((Sync, 8));
        }
        if world.redis.is_cut(self.writer.connection) || self.writer.has_answer(world) {
            can.push((Land, 40));
        }
        if self.machine.takes_deliveries() {
            can.push((Deliver, 25));
        }
        if self.machine.takes_chunks() && self.loader.has_said() {
            can.push((Load, 20));
        }
        if self.machine.takes_renewals() && !self.page_out {
            can.push((Renew, 1));
        }
        if self.loader.can_step(world) {
            can.push((LoaderSteps, 45));
        }
        let mut dice = world.rng.below(can.iter().map(|(_, weight)| weight).sum());
        let chosen = can.into_iter().find(|(_, weight)| {
            let is_it = dice < *weight;
            dice = dice.saturating_sub(*weight);
            is_it
        });
        match chosen.map_or(Tick, |(step, _)| step) {
            Land => self.land(world),
            Deliver => self.deliver(world),
            Load => match self.loader.takes_said() {
                Some(message) => self.tell(Input::Load(message), world),
                None => Ok(None),
            },
            LoaderSteps if self.lost_postgres => Ok(Some("the loader lost Postgres".to_owned())),
            LoaderSteps => {
                self.loader.step(&self.floors, world, setting);
                Ok(None)
            }
            Sample => self.sample(world),
            Tick => self.tell(Input::Tick, world),
            PositionWanted => self.tell(Input::PositionWanted, world),
            Renew => self.renew(world, setting),
            Ask => self.ask_something(world, setting),
            LookAtCatalog => self.look_at_catalog(world, setting),
            LookAtEvictions => self.tell(Input::Evicted(world.redis.evicted_keys()), world),
            Sync => self.sync(world),
            FeedBack => {
                self.feed_back(world)?;
                Ok(None)
            }
        }
    }

    fn feed_back(&mut self, world: &mut Outside) -> Result<(), Violation> {
        let Some(confirmed) = self.machine.confirmed() else { return Ok(()) };
        let at = confirmed.end().0.get();
        if at < self.confirmed {
            return Err("what is confirmed fell".to_owned());
        }
        self.confirmed = at;
        if self.holds_the_slot(world) && !self.lost_postgres {
            let listed = self.writer.book().into_iter().flat_map(Book::listed);
            world.observer.confirm(at, self.safe_when, &world.postgres, listed)?;
            world.postgres.confirm(self.token, at, &mut world.rng);
        }
        Ok(())
    }

    fn look_at_catalog(&mut self, world: &mut Outside, setting: &Setting) -> Result<Ended, Violation> {
        if self.lost_postgres {
            return Ok(None);
        }
        let table = TableId(world.rng.below(u64::from(TABLES)) as u16);
        let seen = match world.postgres.unfit[table.index()] {
            true => CatalogSeen::Unfit(postgres::unfit()),
            false => setting.catalog(table, &world.postgres),
        };
        self.tell(Input::Catalog(table, seen), world)
    }

    /// Performs WAIT and then reads the checkpoint.
    fn sync(&mut self, world: &mut Outside) -> Result<Ended, Violation> {
        match world.redis.checkpoint()? {
            Some(checkpoint) if checkpoint.epoch == self.machine.observe().epoch => {
                if world.rng.percent(30) {
                    return Ok(None);
                }
                world.replicate()?;
                self.tell(Input::Durable(AppliedLsn(checkpoint.lsn)), world)
            }
            Some(_) | None => Ok(Some("another checkpoint lies in redis".to_owned())),
        }
    }

    /// Makes a request as an operator might.
    fn ask_something(&mut self, world: &mut Outside, setting: &Setting) -> Result<Ended, Violation> {
        if !world.operated {
            return Ok(None);
        }
        let table = TableId(world.rng.below(u64::from(TABLES)) as u16);
        let scope = *world.rng.pick(&[Scope::All, Scope::Table(table)]);
        let operation = match world.rng.below(if world.removes { 20 } else { 14 }) {
            0..5 => Operation::Verify(scope, Repair::OnlyCount),
            5..8 => Operation::Verify(scope, Repair::Mend),
            8..11 => Operation::Refetch(scope),
            11 => Operation::Pause,
            12..14 => Operation::Resume,
            14..17 => {
                let ids = [1, 2, 3].map(|id| setting.key(RowId { table: table.0, id }));
                Operation::Invalidate(table, ids[..=world.rng.below(3) as usize].to_vec())
            }
            _ => Operation::Clear(table),
        };
        self.ask(operation, world)
    }

    pub fn ask(&mut self, operation: Operation, world: &mut Outside) -> Result<Ended, Violation> {
        self.asks += 1;
        let number = self.asks;
        world.say(|_| format!("  session {}: somebody asks {operation:?}", self.token));
        match operation {
            Operation::Invalidate(..) | Operation::Clear(_) => world.tampered = true,
            Operation::Pause => self.paused = true,
            Operation::Resume => self.paused = false,
            _ => {}
        }
        self.asking.insert(number, operation.clone());
        self.tell(Input::Asked(AskId(number), operation), world)
    }

    pub fn is_paused(&self) -> bool {
        self.paused
    }

    pub fn is_asked(&self) -> bool {
        !self.asking.is_empty()
    }

    fn answered(
        &mut self,
        number: u64,
        answer: Result<Answered, Refusal>,
        world: &mut Outside,
    ) -> Result<(), Violation> {
        world.say(|_| format!("  answered: {answer:?}"));
        let operation = self.asking.remove(&number).ok_or("an answer that nobody waits for")?;
        match (operation, answer) {
            (Operation::Verify(..), Ok(Answered::Verified { tally, .. })) => {
                world.verified += 1;
                self.verified = Some(tally);
                if is_inexplicable(tally, world) {
                    return Err(format!("drift that nobody made: {tally:?}"));
                }
            }
            (Operation::Refetch(_), Ok(Answered::Refetched { tally, .. })) => {
                if is_inexplicable(tally, world) {
                    return Err(format!("drift that nobody made: {tally:?}"));
                }
            }
            (Operation::Pause, Ok(Answered::Paused)) | (Operation::Resume, Ok(Answered::Resumed)) => {}
            (Operation::Invalidate(..) | Operation::Clear(_), Ok(Answered::Deleted(_))) => {}
            (Operation::Refetch(_) | Operation::Verify(..), Err(_)) => {}
            (operation, answer) => return Err(format!("{operation:?} was answered {answer:?}")),
        }
        Ok(())
    }

    fn tell(&mut self, input: Input, world: &mut Outside) -> Result<Ended, Violation> {
        world.log.input(&input);
        if matches!(input, Input::Load(FromLoad::KeysNotRead)) {
            self.reads_out -= 1;
        }
        let effects = self.machine.step(input, world.now());
        self.perform(effects, world)
    }

    fn perform(&mut self, effects: Vec<Effect>, world: &mut Outside) -> Result<Ended, Violation> {
        for effect in effects {
            world.log.effect(&effect);
            let request = match effect {
                Effect::Probe(inspection) => Request::Probe(inspection),
                Effect::Inspect(questions) => {
                    world.log.coverage.saw(&questions);
                    self.leaves()?;
                    self.writer.inspects(questions, world);
                    continue;
                }
                Effect::Scan { prefix, cursor, limit: _, within: _ } => Request::Scan { prefix, cursor },
                Effect::Compare(wanted) => Request::Compare(wanted),
                Effect::Execute { batch, checkpoint, changes: _ } => {
                    self.leaves()?;
                    self.writer.execute(&batch, &checkpoint, world);
                    continue;
                }
                Effect::Order(order) => {
                    world.say(|_| format!("  orders {order:?}"));
                    match &order {
                        LoadOrder::Keys(_) => self.reads_out += 1,
                        LoadOrder::Verdict(chunk, _) if self.loader.was_of_keys(*chunk) => self.reads_out -= 1,
                        LoadOrder::Table { .. } | LoadOrder::Verdict(..) | LoadOrder::Abandon(..) => {}
                    }
                    self.loader.orders(order);
                    continue;
                }
                Effect::Renewed(_) => {
                    self.page_out = false;
                    continue;
                }
                Effect::Applied(applied) => {
                    world.dead_letters += applied.dead_letters.len() as u64;
                    continue;
                }
                Effect::TableLoaded { table, .. } => {
                    world.say(|_| format!("  loaded {table:?}"));
                    world.loads += 1;
                    continue;
                }
                Effect::TableCompared { .. }
                | Effect::Differs { .. }
                | Effect::TableNotCompared { .. }
                | Effect::Compared { .. } => continue,
                Effect::Answer(AskId(number), answer) => {
                    self.answered(number, answer, world)?;
                    continue;
                }
                Effect::TableBlocked { .. } => continue,
                Effect::Settled(lanes) => {
                    self.writer.settles(&lanes);
                    continue;
                }
                Effect::TooLarge(too_large) => return Err(format!("failed: {too_large}")),
                Effect::WentBack { because } if world.observer.other_history => {
                    self.went_back = Some(because);
                    return Ok(Some("postgres went back".to_owned()));
                }
                Effect::WentBack { because } => return Err(format!("went back: {because}")),
            };
            self.leaves()?;
            self.writer.asks(request, world);
        }
        Ok(None)
    }

    fn leaves(&mut self) -> Result<(), Violation> {
        match std::mem::replace(&mut self.in_flight, true) {
            true => Err("two operations of the writer at once".to_owned()),
            false => Ok(()),
        }
    }

    /// Passes the writer's answer to the machine.
    fn land(&mut self, world: &mut Outside) -> Result<Ended, Violation> {
        if world.redis.is_cut(self.writer.connection) {
            return Ok(Some("the writer lost Redis".to_owned()));
        }
        let Some(answer) = self.writer.take_answer(world) else { return Ok(None) };
        self.in_flight = false;
        let input = match answer {
            Answer::Compared(_) if fails(world, 4) => Input::NotCompared("it is denied".to_owned()),
            Answer::Probed(probes) => Input::Probed(probes),
            Answer::Inspected(answers) => Input::Inspected(answers),
            Answer::Compared(differences) => Input::Compared(differences),
            Answer::Scanned { keys, next } => Input::Scanned { keys, next },
            // The GET after EXEC is answered together with it, so nothing can happen in between.
            Answer::Executed { found: _ } => return self.executed(world),
            Answer::Discarded => return Ok(Some("a batch was discarded".to_owned())),
            Answer::Called(call, called) => {
                return Ok(Some(format!("a call to {:?} was answered {called:?}", call.lane)));
            }
        };
        self.tell(input, world)
    }

    fn executed(&mut self, world: &mut Outside) -> Result<Ended, Violation> {
        let moved = self.writer.take_moved();
        if !moved.is_empty() {
            world.say(|_| format!("  session {}: have moved: {moved:?}", self.token));
            if let Some(ended) = self.tell(Input::Moved(moved), world)? {
                return Ok(Some(ended));
            }
        }
        let ended = self.tell(Input::Executed { redis_time_ms: world.redis.time_ms }, world)?;
        // Where there are lanes, the checkpoint may be ahead of some.
        match self.writer.book().and_then(Book::safe) {
            Some(safe) if ended.is_none() => self.tell(Input::Durable(AppliedLsn(safe)), world),
            _ => Ok(ended),
        }
    }

    /// Delivers what the walsender sends.
    fn deliver(&mut self, world: &mut Outside) -> Result<Ended, Violation> {
        if self.lost_postgres || !self.holds_the_slot(world) {
            // What was received before is still processed for a while.
            if self.delivered.is_empty() || world.rng.percent(20) {
                return Ok(Some("the stream ended".to_owned()));
            }
        }
        if !self.machine.takes_deliveries() {
            return Ok(None);
        }
        let mut wanted = *world.rng.pick(&[1, 2, 5, 20]);
        let mut items = Vec::new();
        while wanted > 0 {
            if self.delivered.is_empty() && !self.read_wal(world) {
                break;
            }
            items.extend(self.delivered.pop_front());
            wanted -= 1;
        }
        if items.is_empty() {
            return Ok(None);
        }
        world.say(|_| {
            let heads: Vec<String> = items.iter().map(brief).collect();
            format!("  delivers to {}: {}", self.token, heads.join(" "))
        });
        self.tell(Input::Delivered { items, bytes: 100 }, world)
    }

    fn read_wal(&mut self, world: &mut Outside) -> bool {
        if self.lost_postgres || !self.holds_the_slot(world) {
            return false;
        }
        let next = world.postgres.wal.iter().find(|r| r.start >= self.read_until && r.end <= world.postgres.flushed);
        let Some(record) = next.copied() else {
            // Sends a keepalive occasionally.
            let at = self.read_until.max(self.from);
            if self.read_until >= self.from && world.rng.percent(30) {
                self.delivered.push_back(Delivery::Position(end_lsn(at)));
                return true;
            }
            return false;
        };
        self.read_until = record.end;
        if let Some(transaction) = record.transaction.filter(|_| record.start >= self.from) {
            self.delivered.extend(world.postgres.deliveries(transaction, &mut self.told));
        }
        if record.end >= self.from && world.rng.percent(20) {
            self.delivered.push_back(Delivery::Position(end_lsn(record.end)));
        }
        true
    }

    /// The query that runs once a second: sent in one step, answered in another.
    fn sample(&mut self, world: &mut Outside) -> Result<Ended, Violation> {
        if self.lost_postgres {
            return Ok(Some("the sample lost Postgres".to_owned()));
        }
        let Some((text, flushed)) = self.sample.take() else {
            self.sample = Some((world.postgres.snapshot(), world.postgres.flushed));
            return Ok(None);
        };
        let snapshot: Snapshot = text.parse().map_err(|_| "a malformed snapshot".to_owned())?;
        if let Some(floors) = self.floors.raise(&snapshot) {
            self.machine.prune(&snapshot, &floors);
        }
        self.tell(Input::Sampled { snapshot, flushed: lsn(flushed) }, world)
    }

    fn renew(&mut self, world: &mut Outside, setting: &Setting) -> Result<Ended, Violation> {
        let table = world.rng.below(u64::from(TABLES)) as usize;
        let spec = &setting.specs[table];
        let (area, after) = self.renewing[table].clone();
        let areas = spec.areas();
        let (mut keys, next) = world.redis.scan_page(areas[area].prefix(), after.as_ref());
        keys.retain(|key| areas[area].has(key));
        self.page_out = true;
        let now = world.now();
        let round_began = if (area, &after) == (0, &None) { now } else { self.round_began[table] };
        self.round_began[table] = round_began;
        let ends_round = next.is_none() && area + 1 == areas.len();
        let page = RenewalPage { table: spec.id, keys, round_began, ends_round };
        self.renewing[table] = match next {
            Some(next) => (area, Some(next)),
            None => ((area + 1) % areas.len(), None),
        };
        self.tell(Input::Renew(page), world)
    }
}

fn brief(item: &Delivery) -> String {
    match item {
        Delivery::Begin(begin) => format!("begin(xid {}, {})", begin.xid, begin.commit),
        Delivery::Relation(_) => "relation".to_owned(),
        Delivery::Change(change) => format!("{change:?}").split(' ').next().unwrap_or_default().to_owned(),
        Delivery::Mark(nonce) => format!("mark({})", nonce.0[0]),
        Delivery::Commit { end, .. } => format!("commit({end})"),
        Delivery::Position(at) => format!("position({at})"),
    }
}

/// Returns whether more rows differ than can be explained.
fn is_inexplicable(tally: Tally, world: &Outside) -> bool {
    // Rows of a partition that was attached are missing until somebody looks at the catalog.
    let missing = tally.missing.saturating_sub(world.postgres.attached_rows);
    missing + tally.stale + tally.orphaned + tally.lookups > 0 && !world.tampered && !world.postgres.has_readded()
}

/// Returns whether a comparison fails this time.
pub fn fails(world: &mut Outside, percent: u64) -> bool {
    world.operated && world.rng.percent(percent)
}
