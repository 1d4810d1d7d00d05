//! Randomized schedules of the real session, resume table, takeover, ledger and record, in a small world with one
//! Postgres, one Redis or a cluster, and several daemons, in which anything may happen between any two steps. An observer
//! who knows the truth checks every batch against the guarantees.
//!
//! A schedule is determined by its seed. Each step draws its random numbers from the seed and the step's number, so a
//! failing schedule still fails in the same way when irrelevant steps are left out. The `simulate` program runs many
//! schedules, prints what they covered, and shrinks those that fail.

mod announced;
mod coverage;
mod daemon;
#[cfg(test)]
mod direct;
mod loader;
mod log;
mod observer;
mod postgres;
mod readers;
mod redis;
mod runner;
mod starting;
pub(crate) mod store;
mod writer;

pub use coverage::Coverage;
pub use runner::{Report, Times, caught, run, shrunk};

use crate::admin::{Operation, Repair, Scope};
use crate::checkpoint::{Checkpoint, TableState};
use crate::format::Format;
use crate::lanes::{Lane, lane_of_stream};
use crate::lookups::Lookups;
use crate::progress::resume::ConfiguredTable;
use crate::resp::batch::Limits;
use crate::session::SafeWhen;
use daemon::{Daemon, Setting};
use log::Log;
use observer::{Copied, Observer};
use postgres::{Postgres, RowId, Successor, VALUE_BYTES, Values};
use readers::Reader;
use redis::{Redis, Served};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};
use store::Called;

const STEPS: &[usize] = &[200, 500, 1_000];
/// Additional steps, in which a load can end and the session can continue from there.
const STEPS_UNTIL_WHOLE: usize = 2_000;
/// Within this many steps without faults, Redis must match Postgres.
const STEPS_TO_SETTLE: usize = 30_000;

/// Steps that the applications take before the first daemon starts.
const STEPS_BEFORE: usize = 12;
/// The step number from which random numbers are drawn after the faults have ended.
const SETTLING: u64 = u64::MAX;

type Violation = String;
type Rows = BTreeMap<RowId, Values>;

/// SplitMix64: the same seed gives the same schedule, on every machine and in every version.
pub(crate) struct Rng(pub(crate) u64);

impl Rng {
    /// The random numbers for one step of a schedule.
    fn of(seed: u64, step: u64) -> Self {
        let mut rng = Rng(seed);
        Rng(rng.next() ^ step.wrapping_mul(0xd134_2543_de82_ef95))
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    fn percent(&mut self, n: u64) -> bool {
        self.below(100) < n
    }

    fn pick_mut<'a, T>(&mut self, of: &'a mut [T]) -> &'a mut T {
        &mut of[self.below(of.len() as u64) as usize]
    }

    fn pick<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.below(of.len() as u64) as usize]
    }
}

/// Where the copy lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Servers {
    /// In a single Redis.
    One,
    /// In a cluster, in several hash slots.
    Cluster,
}

/// The hash tags of the tables' keys on a cluster. Without one, each row has a lane of its own. `s` is the record's.
const TAGS: &[[Option<&str>; 2]] =
    &[[None, None], [Some("x"), None], [Some("x"), Some("y")], [Some("x"), Some("x")], [None, Some("s")]];

/// One of them for each table.
const FORMATS: &[Format] = &[Format::Hash, Format::Hash, Format::Json];

/// The lookups of each table on a single Redis: the rest of the key's template, and the order.
const LOOKUPS: &[&[(&str, Option<&str>)]] = &[
    &[],
    &[("-by:{large}", Some("small")), ("-all", None)],
    &[],
    &[("-all", Some("huge")), ("-by:{huge}:{large}", None)],
];

/// The same on a cluster. All lists of a lookup lie in one hash slot, and some of them where rows of other tables do.
const LOOKUPS_ON_CLUSTER: &[&[(&str, Option<&str>)]] = &[
    &[],
    &[("-{{a}}by:{large}", Some("small")), ("-all", None)],
    &[("-all", Some("huge")), ("-{{x}}by:{huge}:{large}", None)],
    &[("-{{s}}by:{large}", None)],
];

/// A sequence of random events.
pub struct Schedule {
    pub servers: Servers,
    pub seed: u64,
    /// The steps to take; `None` for all.
    pub steps: Option<Vec<usize>>,
    /// Whether to print each step to stderr.
    pub traced: bool,
    /// Whether to write all that happens into a digest.
    pub digested: bool,
}

/// The result of a schedule.
pub struct Outcome {
    /// The guarantee that was violated, if any.
    pub violation: Option<String>,
    /// Steps until everything settled, or until a guarantee was violated.
    pub steps: usize,
    /// Steps from the last fault until Redis matched Postgres.
    pub steps_to_settle: usize,
    /// A digest of all inputs and effects of the sessions.
    pub digest: u64,
    pub coverage: Coverage,
    pub loads: u64,
    pub rows_looked_at: u64,
    pub verifications: u64,
    pub dead_letters: u64,
}

impl Schedule {
    pub fn of(servers: Servers, seed: u64) -> Self {
        Schedule { servers, seed, steps: None, traced: false, digested: true }
    }

    /// Runs the schedule once. A panic is a violation like any other.
    pub fn run(&self) -> Outcome {
        let mut world = World::new(self);
        let ran = catch_unwind(AssertUnwindSafe(|| world.run(self.steps.as_deref())));
        let violation = ran.unwrap_or_else(|payload| {
            let said = payload.downcast_ref::<String>().cloned();
            let said = said.or_else(|| payload.downcast_ref::<&str>().map(|&text| text.to_owned()));
            Err(LAST_PANIC.take().or(said).unwrap_or_default())
        });
        let World { outside, steps, steps_to_settle, .. } = world;
        Outcome {
            violation: violation.err(),
            steps,
            steps_to_settle,
            digest: outside.log.digest(),
            coverage: outside.log.coverage,
            loads: outside.loads,
            rows_looked_at: outside.observer.looked,
            verifications: outside.verified,
            dead_letters: outside.dead_letters,
        }
    }
}

thread_local! {
    static LAST_PANIC: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Suppresses the output of panics and keeps them, with their location, for [`Schedule::run`].
pub fn keep_panics() {
    std::panic::set_hook(Box::new(|panic| LAST_PANIC.set(Some(panic.to_string()))));
}

/// One instant for all schedules of a process, because instants appear in what is logged.
fn beginning() -> Instant {
    static BEGINNING: OnceLock<Instant> = OnceLock::new();
    *BEGINNING.get_or_init(Instant::now)
}

/// Everything except the daemons.
struct Outside {
    log: Log,
    rng: Rng,
    postgres: Postgres,
    redis: Redis,
    observer: Observer,
    began: Instant,
    ran_ms: u64,
    numbers: u64,
    loads: u64,
    dead_letters: u64,
    verified: u64,
    /// Whether operators make requests.
    operated: bool,
    /// Whether operators also remove keys.
    removes: bool,
    /// Whether somebody has changed the contents of Redis.
    tampered: bool,
    /// An older state of Postgres: a standby that no longer follows, or a backup.
    copy: Option<Postgres>,
    trace: bool,
}

impl Outside {
    fn now(&self) -> Instant {
        self.began + Duration::from_millis(self.ran_ms)
    }

    fn pass(&mut self, ms: u64) {
        self.ran_ms += ms;
        self.redis.time_ms += ms;
    }

    fn next_number(&mut self) -> u64 {
        self.numbers += 1;
        self.numbers
    }

    fn say(&self, what: impl Fn(&Self) -> String) {
        if self.trace {
            eprintln!("{}", what(self));
        }
    }

    fn is_loaded(&self) -> Result<bool, Violation> {
        let all = |c: &Checkpoint| c.healing == 0 && c.tables.values().all(|m| m.state == TableState::Loaded);
        Ok(self.redis.checkpoint()?.is_some_and(|c| all(&c)))
    }

    /// Whether some of the keys are removed that a TRUNCATE removes.
    fn is_clearing(&self) -> Result<bool, Violation> {
        Ok(self.redis.checkpoint()?.is_some_and(|checkpoint| checkpoint.clearing.is_some()))
    }

    /// The replica catches up.
    fn replicate(&mut self) -> Result<(), Violation> {
        self.redis.replicate();
        self.observer.copied(Copied::Replica, &self.redis)
    }

    fn replicate_some_node(&mut self) -> Result<(), Violation> {
        let node = self.rng.below(self.redis.count_nodes() as u64) as usize;
        self.redis.replicate_node(node);
        self.observer.copied(Copied::Replica, &self.redis)
    }

    /// Returns the nodes that something happens to at once: mostly one.
    fn some_nodes(&mut self) -> Vec<usize> {
        let all = self.redis.count_nodes();
        if all == 1 {
            return vec![0];
        }
        let first = self.rng.below(all as u64) as usize;
        match self.rng.below(20) {
            0 => (0..all).collect(),
            1..4 => vec![first, (first + 1) % all],
            _ => vec![first],
        }
    }

    /// A node loses all that it has, or goes back to what was saved or replicated.
    fn loses_at(&mut self, node: usize, how: Fault) -> Result<(), Violation> {
        let parts = self.redis.parts_at(node);
        self.observer.doubts(parts.clone());
        match how {
            Fault::Flush => self.redis.flush(node),
            Fault::RollBack => {
                self.redis.roll_back(node, &mut self.rng);
                self.observer.begins_again(Copied::File);
            }
            _ => {
                self.redis.fail_over(node, &mut self.rng);
                self.observer.begins_again(Copied::Replica);
            }
        }
        self.redis.forget_former_lives(&parts);
        self.say(|w| format!("  node {node}: {how:?}, leaves {:?}; {}", w.redis.rows(), w.redis.where_lanes_are()));
        self.observer.lost_at(Some(node), &self.redis, &self.postgres)
    }

    /// With `SafeWhen::Told`, whatever is confirmed must survive a failover, since the daemon resumes from it.
    fn nothing_confirmed_is_lost(&self) -> Result<(), Violation> {
        let Some(slot) = self.postgres.slot else { return Ok(()) };
        let is_there = self.redis.replicated()?.is_some_and(|replica| replica.lsn.0.get() >= slot.confirmed);
        // While the slot is where it was created, nothing has been confirmed yet.
        match is_there || slot.confirmed <= slot.born {
            true => Ok(()),
            false => Err(format!("{:x} is confirmed, and the replica does not have it", slot.confirmed)),
        }
    }

    /// Lets Redis execute what one connection has sent.
    fn serve(&mut self) -> Result<(), Violation> {
        let busy = self.redis.busy();
        if busy.is_empty() {
            return Ok(());
        }
        let connection = *self.rng.pick(&busy);
        let served = self.redis.serve(connection, &mut self.rng)?;
        if self.redis.is_cluster() {
            self.log.saw(&served);
        }
        if !matches!(served, Served::Read | Served::Refused(_) | Served::Called { called: Called::Other(_), .. }) {
            self.say(|w| {
                let (rows, checkpoint) = (w.redis.rows(), w.redis.checkpoint());
                format!("  redis: connection {connection} wrote {rows:?} {checkpoint:?}{}", w.redis.shown_marks())
            });
            self.observer.look(&self.redis, &self.postgres)?;
            if self.rng.percent(30) {
                match self.redis.is_cluster() {
                    true => self.replicate_some_node()?,
                    false => self.replicate()?,
                }
            }
            for mark in self.redis.checkpoint()?.iter().flat_map(|checkpoint| checkpoint.tables.values()) {
                self.log.coverage.saw(&mark.state);
            }
        }
        Ok(())
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    Crash,
    CutRedis,
    CutPostgres,
    RestartPostgres,
    Flush,
    Save,
    RollBack,
    DeleteCheckpoint,
    /// Redis evicts a key and counts it.
    Evict,
    /// Somebody removes a key.
    RemoveKey,
    FailOver,
    HoursPass,
    BreakTable,
    MendTable,
    ChangeShape,
    AttachPartition,
    /// A daemon with another configuration was running.
    Reconfigure,
    /// A daemon with other lookups was running, or somebody has changed lists.
    SpoilLists,
    DropSlot,
    SecondDaemon,
    Freeze,
    Thaw,
    WalSenderTimeout,
    CopyPostgres,
    Promote,
    Restore,
    /// A hash slot moves to another node, all at once.
    MoveSlot,
    /// The keys of a hash slot begin to move to another node, one by one.
    BeginMove,
    /// Those that have moved go back.
    GiveUpMove,
    /// A node that has only a part of the keys of a hash slot loses something.
    LosePart,
    /// Somebody removes the mark of a lane.
    DeleteMark,
}

const FAULTS: &[Fault] = &[
    Fault::Crash,
    Fault::Crash,
    Fault::CutRedis,
    Fault::CutRedis,
    Fault::CutPostgres,
    Fault::RestartPostgres,
    Fault::Flush,
    Fault::Save,
    Fault::Save,
    Fault::RollBack,
    Fault::DeleteCheckpoint,
    Fault::Evict,
    Fault::RemoveKey,
    Fault::RemoveKey,
    Fault::FailOver,
    Fault::FailOver,
    Fault::HoursPass,
    Fault::BreakTable,
    Fault::MendTable,
    Fault::MendTable,
    Fault::ChangeShape,
    Fault::AttachPartition,
    Fault::AttachPartition,
    Fault::AttachPartition,
    Fault::Reconfigure,
    Fault::SpoilLists,
    Fault::DropSlot,
    Fault::SecondDaemon,
    Fault::Freeze,
    Fault::Thaw,
    Fault::Thaw,
    Fault::WalSenderTimeout,
    Fault::CopyPostgres,
    Fault::CopyPostgres,
    Fault::Promote,
    Fault::Restore,
];

/// What happens to a cluster in addition.
const CLUSTER_FAULTS: &[Fault] = &[
    Fault::MoveSlot,
    Fault::MoveSlot,
    Fault::BeginMove,
    Fault::BeginMove,
    Fault::BeginMove,
    Fault::GiveUpMove,
    Fault::LosePart,
    Fault::LosePart,
    Fault::DeleteMark,
    Fault::Crash,
    Fault::CutRedis,
    Fault::Flush,
    Fault::RollBack,
    Fault::FailOver,
];

/// Hash slots move while everything is loaded, and nodes are lost meanwhile.
const FAULTS_OF_MOVES: &[Fault] = &[
    Fault::BeginMove,
    Fault::BeginMove,
    Fault::BeginMove,
    Fault::MoveSlot,
    Fault::GiveUpMove,
    Fault::LosePart,
    Fault::LosePart,
    Fault::LosePart,
    Fault::Save,
    Fault::Save,
    Fault::FailOver,
];

/// How likely it is that one more key moves in a step, where some are moving.
const MOVES_PERCENT: u64 = 3;

struct World {
    seed: u64,
    outside: Outside,
    daemons: Vec<Daemon>,
    /// On a cluster.
    readers: Vec<Reader>,
    setting: Setting,
    /// The faults of this schedule, and how many of them occur in a thousand steps.
    faults: Vec<Fault>,
    fault_rate: u64,
    /// The backup of Postgres lacks a TRUNCATE, and only that. It is mostly restored while Redis is removing the keys: on
    /// the same timeline, so that only what is redelivered can show it.
    lacks_truncate: bool,
    /// How many more steps this schedule has than others.
    longer: usize,
    steps: usize,
    steps_to_settle: usize,
}

impl World {
    fn new(schedule: &Schedule) -> Self {
        let Schedule { servers, seed, traced: trace, digested, .. } = *schedule;
        let mut rng = Rng(seed);
        let all = match servers {
            Servers::One => FAULTS.to_vec(),
            Servers::Cluster => [FAULTS, CLUSTER_FAULTS].concat(),
        };
        let (faults, longer) = match rng.below(6) {
            0 if servers == Servers::Cluster && seed.is_multiple_of(2) => (FAULTS_OF_MOVES.to_vec(), STEPS_UNTIL_WHOLE),
            0 => (Vec::new(), 0),
            // A few kinds of faults, each of them often.
            1 => ((0..3).map(|_| *rng.pick(&all)).collect(), 0),
            // Postgres is rewound while every table is loaded, and nothing else happens.
            2 if seed.is_multiple_of(2) => {
                (vec![Fault::CopyPostgres, Fault::Promote, Fault::Restore], STEPS_UNTIL_WHOLE)
            }
            2 => (vec![Fault::Restore], STEPS_UNTIL_WHOLE),
            // Partitions are attached to tables that are loaded.
            3 => (vec![Fault::AttachPartition, Fault::AttachPartition, Fault::CutRedis], STEPS_UNTIL_WHOLE),
            _ => (all, 0),
        };
        let lacks_truncate = faults == [Fault::Restore];
        let mut postgres = Postgres::new(&mut rng);
        if lacks_truncate {
            postgres.truncate_percent = 25;
        }
        let lookups = match servers {
            Servers::One => LOOKUPS[(seed / 3 % LOOKUPS.len() as u64) as usize],
            Servers::Cluster => LOOKUPS_ON_CLUSTER[(seed / 3 % LOOKUPS_ON_CLUSTER.len() as u64) as usize],
        };
        let whole = Limits::new(VALUE_BYTES, 1 << 30);
        let planned_for = |bytes| whole.planned_for(bytes);
        let limits = match seed / 4 % 3 {
            0 => whole,
            // A batch has capacity for the largest transaction that is applied atomically, and for little more.
            1 => {
                postgres.clears_in_parts = true;
                planned_for(if lookups.is_empty() { 16_000 } else { 60_000 })
            }
            // Or only for a single change.
            _ => {
                (postgres.atomic, postgres.clears_in_parts) = (1, true);
                planned_for(500)
            }
        };
        let fault_rate = if lacks_truncate { 30 } else { *rng.pick(&[5, 15, 30]) };
        let safe_when = *rng.pick(&[SafeWhen::Acknowledged, SafeWhen::Acknowledged, SafeWhen::Told]);
        let formats = [*rng.pick(FORMATS), *rng.pick(FORMATS)];
        let (setting, redis, keys) = match servers {
            Servers::One => {
                let mut setting = Setting::with_lookups(limits, safe_when, [None; 2], formats, lookups);
                if !seed.is_multiple_of(3) {
                    setting.own = setting.own.announcing(Some(announced::stream()));
                }
                (setting, Redis::new(), BTreeMap::new())
            }
            Servers::Cluster => {
                // The checkpoint may be ahead of a lane.
                let mut setting = Setting::with_lookups(limits, SafeWhen::Told, *rng.pick(TAGS), formats, lookups);
                let keys = setting.keys();
                let mut lanes: Vec<Lane> = keys.values().map(|key| Lane::of(key.as_bytes())).collect();
                for of in setting.lookups().values() {
                    lanes.extend((0..of.count()).map(|lookup| Lane::of(of.area(lookup).prefix().as_bytes())));
                }
                if !seed.is_multiple_of(3) {
                    setting.own = setting.own.announcing(Some(announced::stream()));
                }
                lanes.extend(lane_of_stream(&setting.own));
                let redis = Redis::cluster(lanes, &mut rng);
                (setting, redis, keys)
            }
        };
        let outside = Outside {
            log: Log::new(digested),
            rng,
            postgres,
            redis,
            observer: Observer::new(seed.is_multiple_of(4), keys, setting.lookups()),
            began: beginning(),
            ran_ms: 0,
            numbers: 0,
            loads: 0,
            dead_letters: 0,
            verified: 0,
            operated: seed.is_multiple_of(2),
            removes: seed.is_multiple_of(4),
            tampered: false,
            copy: None,
            trace,
        };
        World {
            seed,
            outside,
            daemons: vec![Daemon::new(0)],
            readers: (0..if servers == Servers::Cluster { 2 } else { 0 }).map(|_| Reader::default()).collect(),
            setting,
            faults,
            fault_rate,
            lacks_truncate,
            longer,
            steps: 0,
            steps_to_settle: 0,
        }
    }

    /// Runs the steps in `only`, in ascending order.
    fn run(&mut self, only: Option<&[usize]>) -> Result<(), Violation> {
        let last = STEPS_BEFORE + *self.outside.rng.pick(STEPS) + self.longer;
        for step in 0..last {
            if only.is_some_and(|only| only.binary_search(&step).is_err()) {
                continue;
            }
            self.outside.rng = Rng::of(self.seed, step as u64);
            self.steps = step + 1;
            self.step(step)?;
        }
        self.outside.rng = Rng::of(self.seed, SETTLING);
        self.settle()
    }

    fn step(&mut self, step: usize) -> Result<(), Violation> {
        if step < STEPS_BEFORE {
            self.outside.postgres.step(&mut self.outside.rng);
            return Ok(());
        }
        let wait = *self.outside.rng.pick(&[0, 1, 10, 100]);
        self.outside.pass(wait);
        match self.outside.rng.below(1000) {
            0..280 => {
                if self.lacks_truncate && self.outside.postgres.may_truncate_now() && !self.outside.is_clearing()? {
                    self.outside.copy = Some(self.outside.postgres.clone());
                }
                self.outside.postgres.step(&mut self.outside.rng);
            }
            280..740 => self.step_daemon()?,
            740..970 if self.outside.redis.busy().is_empty() => self.step_daemon()?,
            740..970 => self.outside.serve()?,
            n if n - 970 < self.fault_rate && !self.faults.is_empty() => self.fault()?,
            _ => {}
        }
        self.moves();
        self.read()
    }

    /// Hash slots that are moving go on.
    fn moves(&mut self) {
        let Outside { redis, rng, .. } = &mut self.outside;
        if redis.is_cluster() && rng.percent(MOVES_PERCENT) {
            redis.goes_on_moving(rng);
        }
    }

    /// Lets somebody read.
    fn read(&mut self) -> Result<(), Violation> {
        if self.readers.is_empty() || self.outside.rng.percent(50) {
            return Ok(());
        }
        let which = self.outside.rng.below(self.readers.len() as u64) as usize;
        self.readers[which].step(&mut self.outside)
    }

    fn step_daemon(&mut self) -> Result<(), Violation> {
        let which = self.outside.rng.below(self.daemons.len() as u64) as usize;
        self.daemons[which].step(&mut self.outside, &self.setting)
    }

    fn fault(&mut self) -> Result<(), Violation> {
        let fault = *self.outside.rng.pick(&self.faults);
        let which = self.outside.rng.below(self.daemons.len() as u64) as usize;
        let (daemon, world) = (&mut self.daemons[which], &mut self.outside);
        world.log.saw(&fault);
        world.say(|_| format!("fault {fault:?} (daemon {which})"));
        let told = self.setting.safe_when == SafeWhen::Told && !world.redis.is_cluster();
        let differed = world.observer.differing_members(&world.redis)?;
        if matches!(fault, Fault::FailOver) && told && !world.tampered {
            world.nothing_confirmed_is_lost()?;
        }
        world.tampered |= match fault {
            Fault::Flush | Fault::RollBack | Fault::DeleteCheckpoint | Fault::Evict | Fault::RemoveKey => true,
            Fault::HoursPass | Fault::LosePart | Fault::SpoilLists => true,
            Fault::FailOver => !told,
            Fault::DeleteMark => true,
            _ => false,
        };
        match fault {
            Fault::Crash => daemon.crash(world),
            Fault::CutRedis => {
                if let Some(writer) = daemon.writer() {
                    world.redis.cut(writer, &mut world.rng);
                }
            }
            Fault::CutPostgres => daemon.lose_postgres(world),
            Fault::RestartPostgres => {
                let crash = world.rng.percent(50);
                world.postgres.restart(crash, &mut world.rng);
                self.daemons.iter_mut().for_each(|d| d.lose_postgres(world));
            }
            Fault::Flush | Fault::RollBack | Fault::FailOver => {
                for node in world.some_nodes() {
                    world.loses_at(node, fault)?;
                }
            }
            Fault::LosePart => {
                if let Some(node) = world.redis.some_node_of_moves(&mut world.rng) {
                    let how = *world.rng.pick(&[Fault::Flush, Fault::RollBack, Fault::FailOver]);
                    world.loses_at(node, how)?;
                }
            }
            Fault::Save => {
                world.redis.save();
                world.observer.copied(Copied::File, &world.redis)?;
            }
            Fault::DeleteCheckpoint => {
                // A cluster does not watch the entries.
                if world.rng.percent(50) || world.redis.is_cluster() {
                    world.redis.delete_checkpoint();
                } else {
                    world.redis.delete_entries();
                }
                world.observer.lost(&world.redis, &world.postgres)?;
            }
            Fault::Evict => {
                if let Some(row) = world.redis.remove_some(&mut world.rng) {
                    world.redis.counts_evicted();
                    world.observer.made_room(row, &world.postgres);
                }
            }
            Fault::RemoveKey => {
                if let Some(row) = world.redis.remove_some(&mut world.rng) {
                    world.observer.evicted(row, &world.postgres);
                }
            }
            Fault::BreakTable => *world.rng.pick_mut(&mut world.postgres.unfit) = true,
            Fault::MendTable => *world.rng.pick_mut(&mut world.postgres.unfit) = false,
            Fault::ChangeShape => world.postgres.change_shape(&mut world.rng),
            Fault::AttachPartition => {
                let rows = world.redis.rows()?;
                for row in world.postgres.attach(|row| rows.contains_key(row), &mut world.rng) {
                    world.observer.made_room(row, &world.postgres);
                }
            }
            Fault::Reconfigure => {
                world.redis.had_another_table()?;
            }
            Fault::SpoilLists => {
                if !world.observer.lookups().is_empty() {
                    world.redis.had_other_lookups(world.observer.lookups(), &mut world.rng)?;
                }
            }
            Fault::HoursPass => {
                let hours = *world.rng.pick(&[1, 7, 25]);
                world.pass(hours * 3_600_000);
                world.redis.hours_passed = true;
                world.redis.expire().into_iter().for_each(|row| world.observer.expired(row));
            }
            Fault::DropSlot => {
                let invalidates = world.rng.percent(40);
                match &mut world.postgres.slot {
                    Some(slot) if slot.active.is_none() && invalidates => slot.is_lost = true,
                    Some(slot) if slot.active.is_none() => world.postgres.slot = None,
                    Some(_) | None => {}
                }
            }
            Fault::SecondDaemon => {
                let number = self.daemons.len();
                if number < 3 {
                    self.daemons.push(Daemon::new(number));
                }
            }
            Fault::Freeze => daemon.frozen = true,
            Fault::Thaw => self.daemons.iter_mut().for_each(|d| d.frozen = false),
            Fault::CopyPostgres => world.copy = Some(world.postgres.copy(&mut world.rng)),
            Fault::Promote | Fault::Restore
                if self.lacks_truncate && !world.is_clearing()? && world.rng.percent(95) => {}
            // Mostly while everything is loaded, because only then must the daemon notice.
            Fault::Promote | Fault::Restore if !world.is_loaded()? && world.rng.percent(90) => {}
            Fault::Promote | Fault::Restore => {
                let how = if matches!(fault, Fault::Promote) { Successor::Promoted } else { Successor::Restored };
                // If there is no older copy, take one of the present state.
                let copy = world.copy.clone().unwrap_or_else(|| world.postgres.clone());
                world.postgres.set_back(copy, how, &mut world.rng);
                world.tampered = true;
                // Two losses at once, one of which hides the other.
                world.redis.save();
                world.observer.set_back(&world.postgres);
                world.observer.copied(Copied::File, &world.redis)?;
                world.replicate()?;
                match self.lacks_truncate {
                    // Otherwise they would mostly have removed the other keys, too, before they noticed anything.
                    true => self.daemons.iter_mut().for_each(|d| d.crash(world)),
                    false => self.daemons.iter_mut().for_each(|d| d.lose_postgres(world)),
                }
            }
            Fault::MoveSlot => world.redis.moves_lane(|lane| world.observer.is_doubted(lane), &mut world.rng),
            Fault::BeginMove => world.redis.begins_move(&mut world.rng),
            Fault::GiveUpMove => world.redis.gives_up_move(|lane| world.observer.is_doubted(lane), &mut world.rng),
            // It is no longer known what the lane has, and all of it is applied again.
            Fault::DeleteMark => world.observer.doubts(world.redis.delete_mark(&mut world.rng).into_iter().collect()),
            Fault::WalSenderTimeout => {
                if let Some(slot) = &mut world.postgres.slot {
                    slot.active = None;
                }
            }
        }
        if matches!(fault, Fault::HoursPass) {
            // A list may have expired before its row is written, in the same round, or the other way round.
            world.observer.excuses_rows(differed.iter().map(|(row, _)| *row));
        }
        // What a node of a cluster has lost is mended, without anybody's help.
        let is_lost = matches!(fault, Fault::Flush | Fault::RollBack | Fault::FailOver | Fault::LosePart);
        if is_lost && world.redis.is_cluster() {
            return Ok(());
        }
        world.observer.excuses(&differed, &world.redis)
    }

    /// Ends the faults. Redis must come to match Postgres, and everything must be confirmed.
    fn settle(&mut self) -> Result<(), Violation> {
        self.outside.say(|_| "settling".to_owned());
        self.daemons.iter_mut().for_each(|d| d.frozen = false);
        self.outside.postgres.settle(&mut self.outside.rng);
        for n in 0..STEPS_TO_SETTLE {
            let wait = *self.outside.rng.pick(&[0, 20, 200]);
            self.outside.pass(wait);
            // Keys that are removed faster than they can be read again stay missing.
            self.outside.removes &= n < STEPS_TO_SETTLE / 3;
            if self.outside.rng.percent(75) {
                self.step_daemon()?
            } else {
                self.outside.serve()?
            }
            self.moves();
            self.read()?;
            self.steps_to_settle = n;
            if n % 20 == 0 {
                self.outside.postgres.settle_visible(&mut self.outside.rng);
                let holder = (self.outside.postgres.slot.as_mut()).filter(|s| s.active.is_some());
                if let Some(slot) = holder {
                    let lives = self.daemons.iter().filter_map(Daemon::session).any(|s| s.holds(slot.active));
                    slot.active = slot.active.filter(|_| lives);
                }
                if self.is_settled()? {
                    self.is_equal()?;
                    return self.mend_drift();
                }
                self.help()?;
            }
        }
        Err("it never settles".to_owned())
    }

    /// Ends what only an operator can end: a pause, and the absence of keys that an operator removed.
    fn help(&mut self) -> Result<(), Violation> {
        let Some(checkpoint) = self.outside.redis.checkpoint()? else { return Ok(()) };
        let removed = checkpoint.tables.values().any(|m| m.removed && m.state == TableState::Incomplete);
        let (daemons, world) = (&mut self.daemons, &mut self.outside);
        for session in daemons.iter_mut().filter_map(Daemon::session_mut) {
            if session.is_paused() {
                session.ask(Operation::Resume, world)?;
            } else if removed && !session.is_asked() {
                session.ask(Operation::Refetch(Scope::All), world)?;
            }
        }
        Ok(())
    }

    /// Checks that a verification finds exactly the rows that differ, and repairs all of them.
    fn mend_drift(&mut self) -> Result<(), Violation> {
        let differ = {
            let (has, should) = self.has_and_should()?;
            self.outside.postgres.history.keys().filter(|row| has.get(row) != should.get(row)).count() as u64
        };
        for repair in [Repair::OnlyCount, Repair::Mend, Repair::OnlyCount] {
            let members = self.count_differing_members()?;
            let tally = self.verify(repair)?;
            let (found, mended) = match repair {
                Repair::OnlyCount if self.is_exactly_equal()? => (0, 0),
                Repair::OnlyCount => (differ, 0),
                Repair::Mend => (differ, differ + tally.lookups),
            };
            if (tally.drift() - tally.lookups, tally.repaired) != (found, mended) {
                return Err(format!("{differ} rows differed, and {repair:?} found {tally:?}"));
            }
            // Where rows are written again, their memberships are, too.
            if tally.lookups > members || (tally.lookups < members && repair == Repair::OnlyCount) {
                return Err(format!("{members} members differed, and {repair:?} found {tally:?}"));
            }
        }
        if !self.is_exactly_equal()? || self.count_differing_members()? > 0 {
            return Err("not equal after a verification with repair".to_owned());
        }
        let misses = if self.readers.is_empty() { None } else { Reader::default().misses(&mut self.outside)? };
        misses.map_or(Ok(()), |row| Err(format!("a reader is not told what {row:?} is")))
    }

    /// Each key at which something else lies than a list counts, too.
    fn count_differing_members(&self) -> Result<u64, Violation> {
        let (observer, redis) = (&self.outside.observer, &self.outside.redis);
        let other_types = redis.other_types(observer.lookups());
        let (_, given) = redis.members(observer.lookups())?;
        let differing = observer.differing_members(redis)?.into_iter();
        // What lies there are no members.
        let differing = differing.filter(|of| !other_types.contains(&of.1) || given.contains_key(of));
        Ok((differing.count() + other_types.len()) as u64)
    }

    fn is_exactly_equal(&self) -> Result<bool, Violation> {
        let (has, should) = self.has_and_should()?;
        Ok(has == should)
    }

    /// Returns what Redis has and what it should have. Dead letters are left out if not all of them are recorded.
    fn has_and_should(&self) -> Result<(Rows, Rows), Violation> {
        let (mut has, mut should) = (self.outside.redis.rows()?, self.outside.postgres.truth());
        let checkpoint = self.outside.redis.checkpoint()?.ok_or("no checkpoint")?;
        for rows in [&mut has, &mut should] {
            rows.retain(|row, values| *values != Values::DEAD || !observer::hides(&checkpoint, *row));
        }
        Ok((has, should))
    }

    fn verify(&mut self, repair: Repair) -> Result<crate::admin::Tally, Violation> {
        self.outside.operated = false;
        let mut asked = false;
        for _ in 0..STEPS_TO_SETTLE {
            let holder = self.outside.postgres.slot.and_then(|slot| slot.active);
            let working = self.daemons.iter_mut().filter_map(Daemon::session_mut).find(|s| s.holds(holder));
            match working {
                // The daemon may only now notice that it lost its connection long ago.
                None => asked = false,
                // Perhaps while members were compared with rows.
                Some(session) if session.is_paused() => {
                    session.ask(Operation::Resume, &mut self.outside)?;
                }
                // It was asked before the connection was lost.
                Some(session) if session.is_asked() => {}
                Some(session) => {
                    if let Some(tally) = session.verified.take().filter(|_| asked) {
                        return Ok(tally);
                    }
                    asked = true;
                    session.ask(Operation::Verify(Scope::All, repair), &mut self.outside)?;
                }
            }
            let wait = *self.outside.rng.pick(&[0, 20, 200]);
            self.outside.pass(wait);
            self.outside.postgres.settle_visible(&mut self.outside.rng);
            self.step_daemon()?;
            self.outside.serve()?;
        }
        Err("a verification does not end".to_owned())
    }

    fn is_settled(&self) -> Result<bool, Violation> {
        let Some(checkpoint) = self.outside.redis.checkpoint()? else { return Ok(false) };
        let has_everything = |d: &Daemon| {
            d.session().is_some_and(|s| s.holds_the_slot(&self.outside) && s.has_everything(&self.outside))
        };
        let catalog = self.setting.configured(&self.outside.postgres);
        let follows = |table: &ConfiguredTable| {
            let mark = checkpoint.tables.get(&table.name);
            mark.is_some_and(|m| (m.catalog, m.fingerprint) == (Some(table.catalog), table.fingerprint))
        };
        let of_lookups = self.outside.observer.lookups();
        let has_members = |(table, of): (&u16, &Arc<Lookups>)| {
            let mark = checkpoint.tables.get(&postgres::name(*table).table);
            mark.is_some_and(|mark| mark.lookups_as == Some(of.fingerprint()))
        };
        Ok(self.outside.is_loaded()?
            && catalog.iter().all(follows)
            && of_lookups.iter().all(has_members)
            && checkpoint.evicted == self.outside.redis.evicted_keys()
            && checkpoint.retired.is_empty()
            && checkpoint.tables.values().all(|mark| !mark.changed_beside && mark.types.is_some())
            && checkpoint.within.is_none()
            && (!self.outside.redis.is_cluster() || self.outside.redis.are_complete())
            && self.outside.redis.busy().is_empty()
            && self.daemons.iter().any(has_everything))
    }

    fn is_equal(&self) -> Result<(), Violation> {
        if self.outside.redis.has_old_keys() && !self.outside.tampered {
            return Err("keys of a retired template are left".to_owned());
        }
        let extras = self.outside.postgres.extras();
        if let Some((row, extra)) =
            self.outside.redis.extras()?.iter().find(|(row, extra)| extras.get(row) != Some(*extra))
        {
            return Err(format!("a column more or less: {row:?} shows {extra:?}, should be {:?}", extras.get(row)));
        }
        self.outside.observer.all_members_agree(&self.outside.redis)?;
        if !self.outside.tampered && self.count_differing_members()? > 0 {
            return Err("members and rows disagree at the end".to_owned());
        }
        let (has, should) = self.has_and_should()?;
        for row in self.outside.postgres.history.keys() {
            let last = self.outside.postgres.history[row].last().ok_or("a row without versions")?;
            let observer = &self.outside.observer;
            let drift = observer.is_drift(*row, last) && !observer.must_be_back(*row);
            if has.get(row) != should.get(row) && !drift {
                return Err(format!("not equal at the end: {row:?} {:?}, is {:?}", should.get(row), has.get(row)));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The number of schedules in an ordinary test run. `simulate` runs more, and checks their coverage.
    const SEEDS: u64 = 100;

    #[test]
    fn every_schedule_keeps_the_promises() {
        for servers in [Servers::One, Servers::Cluster] {
            keep_the_promises(servers);
        }
    }

    fn keep_the_promises(servers: Servers) {
        let seeds = std::env::var("PREFETCHD_SIM_SEEDS").map_or(SEEDS, |n| n.parse().expect("a number"));
        let report = run(servers, 0..seeds, Times::Twice);
        let how = |(seed, violation): &(u64, String)| format!("{servers:?}, --from {seed} --seeds 1: {violation}");
        let shown: Vec<String> = report.failures.iter().take(20).map(how).collect();
        assert!(shown.is_empty(), "{} of {seeds} schedules:\n{}", report.failures.len(), shown.join("\n"));
        let Report { loads, rows_looked_at, verifications, dead_letters, .. } = report;
        assert!(
            // With only a few schedules, these numbers may not be reached.
            seeds < SEEDS
                || loads > seeds / 2
                    && rows_looked_at > seeds * 10
                    && verifications > seeds * 3
                    && dead_letters > seeds,
            "too little happens: {loads} loads, {rows_looked_at} rows looked at, {verifications} verifications, \
             {dead_letters} dead letters"
        );
    }
}
