//! Randomized schedules over the real apply machine, resume table, takeover, ledger and record, in a small world of a
//! Postgres, a Redis and daemons, where anything may happen between any two steps. A reader who knows the truth holds
//! every single batch to the promises.
//!
//! A schedule is its seed. `PREFETCHD_SIM_SEEDS=20000` runs more of them, `PREFETCHD_SIM_SEED=17` one, with a trace.

mod daemon;
mod direct;
mod observer;
mod postgres;
mod redis;

use crate::admin::{Operation, Repair, Scope};
use crate::checkpoint::{Checkpoint, TableState};
use crate::resp::batch::Limits;
use daemon::{Daemon, Setting};
use observer::Observer;
use postgres::{Postgres, RowId, Successor, VALUE_BYTES, Values};
use redis::Redis;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Schedules of an ordinary test run.
const SEEDS: u64 = 1_000;
const STEPS: &[usize] = &[200, 500, 1_000];
/// So many more let a load end, and a session go on from there.
const STEPS_UNTIL_WHOLE: usize = 2_000;
/// Without further faults everything is equal after so many.
const STEPS_TO_SETTLE: usize = 30_000;

type Violation = String;
type Rows = BTreeMap<RowId, Values>;

/// SplitMix64: the same schedule for the same seed, everywhere and for good.
pub struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    fn percent(&mut self, n: u64) -> bool {
        self.below(100) < n
    }

    fn pick<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.below(of.len() as u64) as usize]
    }
}

/// Everything but the daemons.
pub struct Outside {
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
    /// Operators ask for something now and then.
    operated: bool,
    /// ... and some of them remove keys.
    removes: bool,
    /// Somebody changed what lies in Redis.
    tampered: bool,
    /// A standby that follows no longer, or a backup.
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

    /// A known gap: where Redis loses the checkpoint while a slot is being made, and its maker crashes or another daemon
    /// finds the slot, nobody knows that it was never finished: a load could miss what had committed before the slot and
    /// is not visible yet.
    fn the_slot_is_orphaned(&mut self) {
        self.postgres.settle_visible(&mut self.rng);
    }

    fn is_loaded(&self) -> Result<bool, Violation> {
        let all = |c: &Checkpoint| c.tables.values().all(|m| m.state == TableState::Loaded);
        Ok(self.redis.checkpoint()?.is_some_and(|c| !c.creating_slot && all(&c)))
    }

    /// Redis carries out what one connection sent.
    fn serve(&mut self) -> Result<(), Violation> {
        let busy = self.redis.busy();
        if busy.is_empty() {
            return Ok(());
        }
        let connection = *self.rng.pick(&busy);
        if self.redis.serve(connection, &mut self.rng)? {
            self.say(|w| {
                format!("  redis: connection {connection} wrote {:?} {:?}", w.redis.rows(), w.redis.checkpoint())
            });
            self.observer.look(&self.redis, &self.postgres)?;
        }
        Ok(())
    }
}

#[derive(Debug, Clone, Copy)]
enum Fault {
    Crash,
    CutRedis,
    CutPostgres,
    RestartPostgres,
    Flush,
    Save,
    RollBack,
    DeleteCheckpoint,
    Evict,
    HoursPass,
    DropSlot,
    SecondDaemon,
    Freeze,
    Thaw,
    WalSenderTimeout,
    CopyPostgres,
    Promote,
    Restore,
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
    Fault::Evict,
    Fault::HoursPass,
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

struct World {
    outside: Outside,
    daemons: Vec<Daemon>,
    setting: Setting,
    /// What goes wrong in this schedule, and how often, in a thousand steps.
    faults: Vec<Fault>,
    fault_rate: u64,
    /// Steps that it has beside those of the others.
    longer: usize,
}

impl World {
    fn new(seed: u64, trace: bool) -> Self {
        let mut rng = Rng(seed);
        let (faults, longer) = match rng.below(5) {
            0 => (Vec::new(), 0),
            // A few kinds, often.
            1 => ((0..3).map(|_| *rng.pick(FAULTS)).collect(), 0),
            // What is whole is set back, and nothing else happens to it.
            2 => (vec![Fault::CopyPostgres, Fault::Promote, Fault::Restore], STEPS_UNTIL_WHOLE),
            _ => (FAULTS.to_vec(), 0),
        };
        let mut postgres = Postgres::new(&mut rng);
        let whole = Limits::new(VALUE_BYTES, 1 << 30);
        let planned_for = |bytes| whole.planned_for(bytes);
        let limits = match seed / 4 % 3 {
            0 => whole,
            // A batch has capacity for the largest transaction that is whole, and for little more.
            1 => {
                postgres.clears_in_parts = true;
                planned_for(16_000)
            }
            // ... or for a single change.
            _ => {
                (postgres.atomic, postgres.clears_in_parts) = (1, true);
                planned_for(500)
            }
        };
        let fault_rate = *rng.pick(&[5, 15, 30]);
        let outside = Outside {
            rng,
            postgres,
            redis: Redis::new(),
            observer: Observer::beside_an_operator(seed.is_multiple_of(4)),
            began: Instant::now(),
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
        World { outside, daemons: vec![Daemon::new(0)], setting: Setting::new(limits), faults, fault_rate, longer }
    }

    fn run(&mut self) -> Result<(), Violation> {
        for _ in 0..12 {
            self.outside.postgres.step(&mut self.outside.rng);
        }
        for _ in 0..*self.outside.rng.pick(STEPS) + self.longer {
            let wait = *self.outside.rng.pick(&[0, 1, 10, 100]);
            self.outside.pass(wait);
            match self.outside.rng.below(1000) {
                0..280 => self.outside.postgres.step(&mut self.outside.rng),
                280..740 => self.step_daemon()?,
                740..970 if self.outside.redis.busy().is_empty() => self.step_daemon()?,
                740..970 => self.outside.serve()?,
                n if n - 970 < self.fault_rate && !self.faults.is_empty() => self.fault()?,
                _ => {}
            }
        }
        self.settle()
    }

    fn step_daemon(&mut self) -> Result<(), Violation> {
        let which = self.outside.rng.below(self.daemons.len() as u64) as usize;
        let makes_one = |other: usize| other != which && self.daemons[other].is_making_a_slot();
        if (0..self.daemons.len()).any(makes_one) {
            self.outside.the_slot_is_orphaned();
        }
        self.daemons[which].step(&mut self.outside, &self.setting)
    }

    fn fault(&mut self) -> Result<(), Violation> {
        let fault = *self.outside.rng.pick(&self.faults);
        let which = self.outside.rng.below(self.daemons.len() as u64) as usize;
        let (daemon, world) = (&mut self.daemons[which], &mut self.outside);
        world.say(|_| format!("fault {fault:?} (daemon {which})"));
        if matches!(fault, Fault::Crash) && daemon.is_making_a_slot() {
            world.the_slot_is_orphaned();
        }
        world.tampered |=
            matches!(fault, Fault::Flush | Fault::RollBack | Fault::DeleteCheckpoint | Fault::Evict | Fault::HoursPass);
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
            Fault::Flush => {
                world.redis.flush();
                world.observer.lost(&world.redis, &world.postgres)?;
            }
            Fault::Save => {
                world.redis.save();
                world.observer.saved();
            }
            Fault::RollBack => {
                world.redis.roll_back();
                world.observer.rolled_back();
                world.observer.lost(&world.redis, &world.postgres)?;
            }
            Fault::DeleteCheckpoint => {
                if world.rng.percent(50) {
                    world.redis.delete_checkpoint();
                } else {
                    world.redis.delete_entries();
                }
                world.observer.lost(&world.redis, &world.postgres)?;
            }
            Fault::Evict => {
                if let Some(row) = world.redis.evict(&mut world.rng) {
                    world.observer.evicted(row, &world.postgres);
                }
            }
            Fault::HoursPass => {
                let hours = *world.rng.pick(&[1, 7, 25]);
                world.pass(hours * 3_600_000);
                world.redis.expire().into_iter().for_each(|row| world.observer.expired(row));
            }
            Fault::DropSlot => {
                if world.postgres.slot.is_some_and(|slot| slot.active.is_none()) {
                    world.postgres.slot = None;
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
            Fault::CopyPostgres => world.copy = Some(world.postgres.clone()),
            // Most often what is whole: there it must be noticed.
            Fault::Promote | Fault::Restore if !world.is_loaded()? && world.rng.percent(90) => {}
            Fault::Promote | Fault::Restore => {
                let how = if matches!(fault, Fault::Promote) { Successor::Promoted } else { Successor::Restored };
                // Without an older one it is one that has everything.
                let copy = world.copy.clone().unwrap_or_else(|| world.postgres.clone());
                world.postgres.set_back(copy, how, &mut world.rng);
                world.tampered = true;
                // Two losses at once, of which one hides the other.
                world.redis.save();
                world.observer.set_back(&world.postgres);
                world.observer.saved();
                self.daemons.iter_mut().for_each(|d| d.lose_postgres(world));
            }
            Fault::WalSenderTimeout => {
                if let Some(slot) = &mut world.postgres.slot {
                    slot.active = None;
                }
            }
        }
        Ok(())
    }

    /// No more faults: everything must become equal, and be confirmed.
    fn settle(&mut self) -> Result<(), Violation> {
        self.outside.say(|_| "settling".to_owned());
        self.daemons.iter_mut().for_each(|d| d.frozen = false);
        self.outside.postgres.settle(&mut self.outside.rng);
        for n in 0..STEPS_TO_SETTLE {
            let wait = *self.outside.rng.pick(&[0, 20, 200]);
            self.outside.pass(wait);
            if self.outside.rng.percent(75) {
                self.step_daemon()?
            } else {
                self.outside.serve()?
            }
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
        Err("it does not settle".to_owned())
    }

    /// What an operator began he has to end: a pause, and keys that he removed.
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

    /// A verification finds exactly what differs, and mends all of it.
    fn mend_drift(&mut self) -> Result<(), Violation> {
        let differ = {
            let (has, should) = self.has_and_should()?;
            self.outside.postgres.history.keys().filter(|row| has.get(row) != should.get(row)).count() as u64
        };
        for repair in [Repair::OnlyCount, Repair::Mend, Repair::OnlyCount] {
            let tally = self.verify(repair)?;
            let (found, mended) = match repair {
                Repair::OnlyCount if self.is_exactly_equal()? => (0, 0),
                Repair::OnlyCount => (differ, 0),
                Repair::Mend => (differ, differ),
            };
            if (tally.drift(), tally.repaired) != (found, mended) {
                return Err(format!("{differ} rows differed, and {repair:?} found {tally:?}"));
            }
        }
        if self.is_exactly_equal()? { Ok(()) } else { Err("not equal after a verification with repair".to_owned()) }
    }

    fn is_exactly_equal(&self) -> Result<bool, Violation> {
        let (has, should) = self.has_and_should()?;
        Ok(has == should)
    }

    /// Without dead letters where not all of them are recorded.
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
                // A connection that was lost long ago may be noticed only now.
                None => asked = false,
                // Of the time before.
                Some(session) if session.is_asked() => {}
                Some(session) if session.is_paused() => {
                    session.ask(Operation::Resume, &mut self.outside)?;
                }
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
        Ok(self.outside.is_loaded()?
            && checkpoint.within.is_none()
            && checkpoint.slot_snapshot.is_none()
            && self.outside.redis.busy().is_empty()
            && self.daemons.iter().any(has_everything))
    }

    fn is_equal(&self) -> Result<(), Violation> {
        let (has, should) = self.has_and_should()?;
        for row in self.outside.postgres.history.keys() {
            let last = self.outside.postgres.history[row].last().ok_or("a row without versions")?;
            let drift = self.outside.observer.is_drift(*row, last);
            if has.get(row) != should.get(row) && !drift {
                return Err(format!("not equal at the end: {row:?} {:?}, is {:?}", should.get(row), has.get(row)));
            }
        }
        Ok(())
    }
}

/// Names the seed where a panic ends it.
struct Named(u64);

impl Drop for Named {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("in the schedule of PREFETCHD_SIM_SEED={}", self.0);
        }
    }
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|n| n.parse().expect("a number"))
}

#[test]
fn every_schedule_keeps_the_promises() {
    if let Some(seed) = number("PREFETCHD_SIM_SEED") {
        let _named = Named(seed);
        World::new(seed, true).run().unwrap_or_else(|violation| panic!("{violation}"));
        return;
    }
    let seeds = number("PREFETCHD_SIM_SEEDS").unwrap_or(SEEDS);
    let (mut violations, mut loads, mut looked, mut verified, mut dead_letters) = (Vec::new(), 0, 0, 0, 0);
    for seed in 0..seeds {
        let _named = Named(seed);
        let mut world = World::new(seed, false);
        if let Err(violation) = world.run() {
            violations.push((seed, violation));
        }
        loads += world.outside.loads;
        looked += world.outside.observer.looked;
        verified += world.outside.verified;
        dead_letters += world.outside.dead_letters;
    }
    let shown: Vec<String> =
        violations.iter().take(20).map(|(seed, what)| format!("PREFETCHD_SIM_SEED={seed}: {what}")).collect();
    assert!(violations.is_empty(), "{} of {seeds} schedules:\n{}", violations.len(), shown.join("\n"));
    // A few may have less of one thing.
    assert!(
        seeds < SEEDS || loads > seeds / 2 && looked > seeds * 10 && verified > seeds * 3 && dead_letters > seeds,
        "it hardly gets anywhere: {loads} loads, {looked} rows looked at, {verified} verifications, {dead_letters} dead \
         letters"
    );
}
