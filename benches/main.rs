//! Compares prefetchd with the fastest hand-made pipelines on the same servers, alternating within one run: on a shared
//! machine only the ratios are meaningful. `scripts/bench` builds and runs it; it starts its own Postgres and Redis and
//! removes them. docs/benchmarks.md explains the numbers.
//!
//! It measures what is in Redis, seen over a connection of its own; the daemon is not asked.

mod debezium;
mod figures;
mod growth;
mod http;
mod latency;
mod layouts;
mod plot;
mod processes;
mod reads;
mod whole;
mod world;

use figures::{median, rate, rates, seconds};
use processes::{Usage, Watch};
use std::time::{Duration, Instant};
use world::{Outcome, Way, World};

/// Sizes, from the environment.
struct Sizes {
    rows: u64,
    changes: u64,
    /// Changes of the one large transaction: all rows, unless `CHANGES` says less.
    transaction: u64,
    rounds: usize,
    seconds: u64,
}

impl Sizes {
    /// `rows` and `changes` are the defaults.
    fn read(rows: u64, changes: u64) -> Outcome<Self> {
        let rounds = usize::try_from(number("ROUNDS", 3)?)?.max(1);
        let changes = number("CHANGES", changes)?.max(1);
        // Each change must concern a different row, so that nothing is gained by merging several.
        let rows = number("ROWS", rows)?.max(changes);
        Ok(Self {
            rows,
            changes,
            transaction: number("CHANGES", rows)?.max(1),
            rounds,
            seconds: number("SECONDS_OF_LATENCY", 20)?,
        })
    }

    fn say(&self) {
        say(&format!("{} rows, {} changes, {} rounds", self.rows, self.changes, self.rounds));
    }
}

/// From the environment.
fn number(name: &str, default: u64) -> Outcome<u64> {
    match std::env::var(name) {
        Ok(text) => Ok(text.parse().map_err(|_| format!("{name}={text} is not a number"))?),
        Err(_) => Ok(default),
    }
}

type Part = fn(&World, &Sizes) -> Outcome<()>;

/// The parts on one Redis, in their order.
const PARTS: [(&str, Part); 7] = [
    ("load", load),
    ("backlog", backlog),
    ("transaction", whole::transaction),
    ("latency", latency::latency),
    ("waits", latency::waits),
    ("heal", whole::heal),
    ("reads", reads),
];
type Apart = fn() -> Outcome<()>;

/// Parts with servers of their own, which run only if `ONLY` names them.
const APART: [(&str, Apart); 5] = [
    ("start", whole::start),
    ("growth", growth::growth),
    ("debezium", debezium::debezium),
    ("cluster", || layouts::compare(&layouts::ON_CLUSTER, &Sizes::read(300_000, 200_000)?)),
    ("lists", || layouts::compare(&layouts::ROWS_ASKED_FOR, &Sizes::read(300_000, 200_000)?)),
];

fn main() -> Outcome<()> {
    // Cargo passes --bench.
    let only = std::env::var("ONLY").unwrap_or_default();
    let only: Vec<&str> = only.split(',').filter(|name| !name.is_empty()).collect();
    let is_known =
        |name: &&str| PARTS.iter().any(|(part, _)| part == name) || APART.iter().any(|(part, _)| part == name);
    if let Some(unknown) = only.iter().find(|name| !is_known(name)) {
        return Err(format!("ONLY names {unknown}, and there is no such part").into());
    }
    is_quiet()?;
    let parts: Vec<_> = PARTS.iter().filter(|(name, _)| only.is_empty() || only.contains(name)).collect();
    if !parts.is_empty() {
        let sizes = Sizes::read(1_000_000, 500_000)?;
        sizes.say();
        let world = World::new(sizes.rows)?;
        println!("{}", machine(&world)?);
        parts.into_iter().try_for_each(|(_, part)| part(&world, &sizes))?;
    }
    APART.iter().filter(|(name, _)| only.contains(name)).try_for_each(|(_, part)| part())
}

/// # Errors
/// If something else uses this machine, unless BUSY=1: what is measured then is that.
fn is_quiet() -> Outcome<()> {
    const LOOKING: Duration = Duration::from_secs(3);
    const MOST: f64 = 0.1;
    // Of all processors together: user, nice, system, idle, iowait, irq, softirq, steal.
    let times = || -> Outcome<Vec<f64>> {
        let stat = std::fs::read_to_string("/proc/stat")?;
        let line = stat.lines().next().unwrap_or_default();
        Ok(line.split_whitespace().skip(1).take(8).map(str::parse).collect::<Result<_, _>>()?)
    };
    let before = times()?;
    std::thread::sleep(LOOKING);
    let used: Vec<f64> = times()?.iter().zip(&before).map(|(after, before)| after - before).collect();
    let (all, idle) = (used.iter().sum::<f64>(), used[3] + used[4]);
    let busy = 1.0 - idle / all.max(1.0);
    if busy > MOST && std::env::var_os("BUSY").is_none() {
        let busy = busy * 100.0;
        return Err(format!("this machine is busy with something else ({busy:.0} %): stop that, or set BUSY=1").into());
    }
    Ok(())
}

fn say(what: &str) {
    eprintln!("{what}");
}

fn machine(world: &World) -> Outcome<String> {
    let read = |file: &str| std::fs::read_to_string(file).unwrap_or_default();
    let field = |text: &str, name: &str| {
        let line = text.lines().find(|line| line.starts_with(name));
        line.and_then(|line| line.split_once(':')).map_or_else(String::new, |(_, value)| value.trim().to_owned())
    };
    let cpus = std::thread::available_parallelism()?;
    Ok(format!(
        "{cpus} x {cpu}, {memory} of memory, Linux {kernel}; PostgreSQL {postgres}, Redis {redis}; load average before: {load}",
        cpu = field(&read("/proc/cpuinfo"), "model name"),
        memory = field(&read("/proc/meminfo"), "MemTotal"),
        kernel = read("/proc/sys/kernel/osrelease").trim(),
        postgres = world.sql("SHOW server_version")?,
        redis = world.redis_info("redis_version")?,
        load = read("/proc/loadavg").split(' ').take(3).collect::<Vec<_>>().join(" "),
    ))
}

fn reads(world: &World, sizes: &Sizes) -> Outcome<()> {
    reads::reads(world, sizes.rows, sizes.rounds, sizes.seconds.div_ceil(4))
}

// ---------------------------------------------------------------------------------------------------------------- load

fn load(world: &World, sizes: &Sizes) -> Outcome<()> {
    println!("\n### Loading {} rows\n", sizes.rows);
    println!("| Redis | prefetchd, rows/s | psql, mawk, redis-cli, rows/s | ratio |\n|---|---|---|---|");
    let (mut usages, mut first, mut verified) = (Vec::new(), Duration::ZERO, Vec::new());
    for before in ["empty", "full"] {
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for round in 1..=sizes.rounds {
            if before == "empty" {
                world.flush()?;
            }
            theirs.push(world.load_by_hand()?);
            world.is_full()?;
            if before == "empty" {
                world.flush()?;
            }
            world.forget_slot_and_checkpoint()?;
            let watch = Watch::begin(world.pids());
            let started = Instant::now();
            let daemon = world.daemon(Way::Unix)?;
            watch.daemon_is(daemon.pid);
            world.wait_for_load()?;
            ours.push(started.elapsed());
            world.is_full()?;
            usages.push(watch.end());
            if before == "empty" {
                let started = Instant::now();
                world.cli("verify")?;
                verified.push(started.elapsed());
            }
            daemon.stop()?;
            say(&format!("load, {before}, round {round}: {:.2?} beside {:.2?}", ours[round - 1], theirs[round - 1]));
        }
        if before == "empty" {
            first = median(&ours);
        }
        let ratio = rate(sizes.rows, median(&ours)) / rate(sizes.rows, median(&theirs));
        println!("| {before} | {} | {} | {ratio:.2} |", rates(sizes.rows, &ours), rates(sizes.rows, &theirs));
    }
    println!("\n{}", Usage::table("load", &usages));
    println!("\n### Verifying {} rows: prefetchd verify, until it ends\n", sizes.rows);
    println!("| time | rows/s | beside the first load's time |\n|---|---|---|");
    let ratio = median(&verified).as_secs_f64() / first.as_secs_f64();
    println!("| {} | {} | {ratio:.2} |", seconds(&verified), rates(sizes.rows, &verified));
    Ok(())
}

// ------------------------------------------------------------------------------------------------------------- backlog

fn backlog(world: &World, sizes: &Sizes) -> Outcome<()> {
    println!("\n### Draining a backlog of {} updates\n", sizes.changes);
    println!(
        "| changes a transaction | over | prefetchd, changes/s | pg_recvlogical alone | beside redis-cli | ratio to that |\n\
         |---|---|---|---|---|---|"
    );
    world.write_commands(sizes.changes)?;
    let mut usages = Vec::new();
    let mut per: Vec<u64> = [1, 10, 1_000, sizes.changes].into_iter().filter(|per| *per <= sizes.changes).collect();
    per.dedup();
    for per in per {
        let prepared = world.prepare_backlog(sizes.changes, per)?;
        for way in [Way::Unix, Way::Tcp] {
            let (mut ours, mut alone, mut fair) = (Vec::new(), Vec::new(), Vec::new());
            for round in 1..=sizes.rounds {
                alone.push(world.receive(way, &prepared, false)?);
                fair.push(world.receive(way, &prepared, true)?);
                world.restore(&prepared)?;
                let watch = Watch::begin(world.pids());
                let started = Instant::now();
                let daemon = world.daemon(way)?;
                watch.daemon_is(daemon.pid);
                world.wait_for_mark(&prepared)?;
                ours.push(started.elapsed());
                usages.push(watch.end());
                daemon.stop()?;
                let (a, b, c) = (ours[round - 1], alone[round - 1], fair[round - 1]);
                say(&format!("{per} a transaction, {way}, round {round}: {a:.2?} beside {b:.2?} alone, {c:.2?} fair"));
            }
            let ratio = rate(sizes.changes, median(&ours)) / rate(sizes.changes, median(&fair));
            let [a, b, c] = [&ours, &alone, &fair].map(|times| rates(sizes.changes, times));
            println!("| {per} | {way} | {a} | {b} | {c} | {ratio:.2} |");
        }
    }
    println!("\n{}", Usage::table("backlog", &usages));
    Ok(())
}
