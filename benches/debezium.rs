//! Beside Debezium's engine, with debezium/DebeziumToRedis.java behind it: both load the same table, follow the same
//! commits, and drain a backlog of as many.
//!
//! The engine is reached over loopback TCP, and reaches both servers so: Java has no other way to Postgres. So does
//! prefetchd here.

use super::figures::Sorted;
use super::latency::{Writers, until_in_redis};
use super::processes::{cpu_seconds, peak_memory_bytes};
use super::world::{Daemon, Outcome, Way, World};
use super::{Sizes, machine, say};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const COMMITS_A_SECOND: u64 = 100;

#[derive(Clone, Copy)]
enum Who {
    Prefetchd,
    Debezium,
}

/// A running one of them.
enum Running {
    Prefetchd(Daemon),
    Debezium(Engine),
}

/// Since the start of the process, which for a JVM is most of a small load.
#[derive(Clone, Copy, PartialEq, PartialOrd)]
struct Progress {
    first: Duration,
    all: Duration,
    cpu_seconds: f64,
}

struct Figures {
    load: Progress,
    latency: Sorted,
    backlog: Progress,
    peak_bytes: u64,
}

pub fn debezium() -> Outcome<()> {
    let sizes = Sizes::read(1_000_000, 100_000)?;
    println!("\n### Beside Debezium\n");
    if std::env::var_os("DEBEZIUM_CLASSES").is_none() {
        println!("Skipped: scripts/bench debezium installs it, where there are a JDK and Python.");
        return Ok(());
    }
    sizes.say();
    let world = World::new(sizes.rows)?;
    println!("{}\n", machine(&world)?);
    println!(
        "| | load of {} rows: the first after | all after | CPU seconds | from commit to visible at {COMMITS_A_SECOND}/s, p50 | \
         p99 | backlog of {} changes: the first after | all after | CPU seconds | peak memory |\n\
         |---|---|---|---|---|---|---|---|---|---|",
        sizes.rows, sizes.changes
    );
    for (name, who) in [("prefetchd", Who::Prefetchd), ("Debezium's engine", Who::Debezium)] {
        let mut rounds = (1..=sizes.rounds).map(|_| measure(&world, &sizes, who)).collect::<Outcome<Vec<_>>>()?;
        let [load, backlog] = [|figures: &Figures| figures.load, |figures: &Figures| figures.backlog].map(|of| {
            rounds.sort_by_key(|figures| of(figures).all);
            let Progress { first, all, cpu_seconds } = of(&rounds[rounds.len() / 2]);
            format!("{:.2} s | {:.2} s | {cpu_seconds:.2}", first.as_secs_f64(), all.as_secs_f64())
        });
        rounds.sort_by(|a, b| a.latency.ms(0.5).total_cmp(&b.latency.ms(0.5)));
        let latency = &rounds[rounds.len() / 2].latency;
        let peak = rounds.iter().map(|figures| figures.peak_bytes).max().unwrap_or_default() as f64 / 1e6;
        let (p50, p99) = (latency.ms(0.5), latency.ms(0.99));
        println!("| {name} | {load} | {p50:.2} ms | {p99:.2} ms | {backlog} | {peak:.0} MB |");
    }
    Ok(())
}

fn measure(world: &World, sizes: &Sizes, who: Who) -> Outcome<Figures> {
    world.flush()?;
    for slot in ["prefetchd", "debezium"] {
        world.drop_slot(slot)?;
    }
    // Without offsets it begins anew.
    let _ = std::fs::remove_file(offsets(world));
    world.sql("VACUUM items; CHECKPOINT")?;

    let started = Instant::now();
    let running = who.start(world)?;
    world.wait_for("the first row", || world.has_any_row())?;
    let first = started.elapsed();
    world.wait_for("the load", || Ok(world.is_full().is_ok()))?;
    if let Who::Prefetchd = who {
        world.wait_for_load()?;
    }
    let load = Progress { first, all: started.elapsed(), cpu_seconds: running.cpu_seconds() };
    world.wait_until_idle()?;

    let mut writers = Writers::new(world, COMMITS_A_SECOND)?;
    let time = Duration::from_secs(sizes.seconds);
    let latency = Sorted::new(until_in_redis(&mut writers, time, world.observer(Way::Tcp)?)?);
    let peak = running.peak_bytes();
    running.stop()?;

    world.sql(&format!("SET synchronous_commit = off; CALL backlog({}, 1)", sizes.changes))?;
    let mark = world.change_mark()?;
    let started = Instant::now();
    let running = who.start(world)?;
    world.wait_until_current(1)?;
    let first = started.elapsed();
    world.wait_for_mark_of(mark)?;
    let backlog = Progress { first, all: started.elapsed(), cpu_seconds: running.cpu_seconds() };
    let peak_bytes = peak.max(running.peak_bytes());
    running.stop()?;
    say(&format!("loaded after {:.2?}, drained after {:.2?}", load.all, backlog.all));
    Ok(Figures { load, latency, backlog, peak_bytes })
}

impl Who {
    fn start(self, world: &World) -> Outcome<Running> {
        Ok(match self {
            Who::Prefetchd => Running::Prefetchd(world.daemon(Way::Tcp)?),
            Who::Debezium => Running::Debezium(Engine::start(world)?),
        })
    }
}

impl Running {
    fn pid(&self) -> u32 {
        match self {
            Running::Prefetchd(daemon) => daemon.pid,
            Running::Debezium(engine) => engine.0.id(),
        }
    }

    fn cpu_seconds(&self) -> f64 {
        cpu_seconds(self.pid()).unwrap_or_default()
    }

    fn peak_bytes(&self) -> u64 {
        peak_memory_bytes(self.pid())
    }

    fn stop(self) -> Outcome<()> {
        match self {
            Running::Prefetchd(daemon) => daemon.stop(),
            // Waits until it has written its offsets.
            Running::Debezium(engine) => engine.stop(),
        }
    }
}

fn offsets(world: &World) -> PathBuf {
    world.file("offsets")
}

struct Engine(Child);

impl Engine {
    fn start(world: &World) -> Outcome<Self> {
        let classes = std::env::var("DEBEZIUM_CLASSES")?;
        let child = Command::new("java")
            .args(["-Xmx512m", "-cp", &classes, "DebeziumToRedis"])
            .args(world.addresses())
            .arg(offsets(world))
            .stdin(Stdio::null())
            .stdout(std::fs::File::create(world.file("debezium.log"))?)
            .stderr(Stdio::null())
            .spawn()?;
        Ok(Self(child))
    }

    fn stop(mut self) -> Outcome<()> {
        kill(Pid::from_raw(i32::try_from(self.0.id())?), Signal::SIGTERM)?;
        self.0.wait()?;
        Ok(())
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
