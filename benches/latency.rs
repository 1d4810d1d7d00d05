//! From the answer to COMMIT until the change is visible: in Redis, beside the moment in which a reader of pg_recvlogical's
//! output sees the same commit; and over HTTP, with a read that waits for the position of its own commit.

use super::figures::Sorted;
use super::http::Http;
use super::processes::{Usage, Watch};
use super::world::{Commits, Observer, Outcome, Way, World};
use super::{Sizes, say};
use memchr::memmem;
use std::collections::HashMap;
use std::io::Read;
use std::process::{Child, ChildStdout};
use std::sync::mpsc::{self, Receiver};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Commits a second. Loopback TCP differs by the cost of a message, which one rate shows.
const RATES: [(u64, Way); 5] =
    [(10, Way::Unix), (100, Way::Unix), (100, Way::Tcp), (1_000, Way::Unix), (5_000, Way::Unix)];
/// What one connection manages, with an fsync each, on a slow disk. Further ones share their fsyncs.
const OF_A_CONNECTION: u64 = 250;
/// The rows that change, one after the other: a multiple of the number of connections, so that each has rows of its own.
const ROWS: u64 = 1_000;
/// The first value. All have [`DIGITS`] digits, and each is larger than those before.
const FIRST: u64 = 1_000_000;
const DIGITS: usize = 7;
const PATIENCE: Duration = Duration::from_secs(30);
/// Of reads that wait for their commit.
const WAITS_A_SECOND: u64 = 100;

/// One that Postgres has answered.
pub struct Commit {
    id: u64,
    value: u64,
    at: Instant,
}

/// Commits at a rate, for a time.
pub struct Writers {
    pub rate: u64,
    connections: Vec<Commits>,
    next: u64,
    /// All commits, and the time that they have taken.
    done: (u64, Duration),
}

impl Writers {
    pub fn new(world: &World, rate: u64) -> Outcome<Self> {
        // Values of an earlier part are smaller.
        let next: u64 = world.sql(&format!("SELECT greatest({FIRST}, max(stock) + 1) FROM items"))?.parse()?;
        let connections = (0..rate.div_ceil(OF_A_CONNECTION)).map(|_| world.commits()).collect::<Outcome<_>>()?;
        Ok(Self { rate, connections, next, done: (0, Duration::ZERO) })
    }

    /// Ends after this time even if the connections do not keep up with the rate.
    pub fn run(&mut self, time: Duration, committed: &mpsc::Sender<Commit>) -> Outcome<()> {
        let (rate, first, count) = (self.rate, self.next, self.connections.len() as u64);
        let began = Instant::now();
        let write = |connection: &mut Commits, mut n: u64| -> Result<u64, String> {
            let mut done = 0;
            loop {
                let due = Duration::from_micros(n * 1_000_000 / rate);
                if due.max(began.elapsed()) >= time {
                    return Ok(done);
                }
                thread::sleep(due.saturating_sub(began.elapsed()));
                let (id, value) = (1 + n % ROWS, first + n);
                connection.set_stock(id, value).map_err(|error| error.to_string())?;
                committed.send(Commit { id, value, at: Instant::now() }).map_err(|error| error.to_string())?;
                (n, done) = (n + count, done + 1);
            }
        };
        let done = thread::scope(|scope| {
            let write = &write;
            let writers: Vec<_> =
                (0..).zip(&mut self.connections).map(|(n, one)| scope.spawn(move || write(one, n))).collect();
            writers.into_iter().map(|one| one.join().expect("it does not panic")).sum::<Result<u64, String>>()
        })?;
        self.done = (self.done.0 + done, self.done.1 + began.elapsed());
        self.next += rate * time.as_millis() as u64 / 1_000 + count;
        Ok(())
    }

    /// What they have managed, a second.
    fn managed(&self) -> f64 {
        self.done.0 as f64 / self.done.1.as_secs_f64()
    }
}

/// Whoever keeps Redis follows these commits. Returns how long each took until another connection saw it there.
pub fn until_in_redis(writers: &mut Writers, time: Duration, observer: Observer) -> Outcome<Vec<Duration>> {
    let (committed, seen) = mpsc::channel();
    let observing = thread::spawn(move || observe(observer, &seen));
    writers.run(time, &committed)?;
    drop(committed);
    Ok(observing.join().map_err(|_| "the observer panicked")??)
}

/// Polls all commits that are not yet there together, so that what is measured is not the polling.
fn observe(mut observer: Observer, commits: &Receiver<Commit>) -> Result<Vec<Duration>, String> {
    let (mut times, mut waiting) = (Vec::new(), Vec::new());
    loop {
        if waiting.is_empty() {
            let Ok(commit) = commits.recv() else { return Ok(times) };
            waiting.push(commit);
        }
        waiting.extend(commits.try_iter());
        let mut stocks = observer.stocks(waiting.iter().map(|commit| commit.id))?.into_iter();
        // A later commit of the same row has a larger value.
        waiting.retain(|commit| {
            let is_visible = stocks.next().flatten().is_some_and(|stock| stock >= commit.value);
            if is_visible {
                times.push(commit.at.elapsed());
            }
            !is_visible
        });
        if let Some(Commit { id, value, .. }) = waiting.iter().find(|commit| commit.at.elapsed() > PATIENCE) {
            return Err(format!("row {id} never became {value}"));
        }
    }
}

pub fn latency(world: &World, sizes: &Sizes) -> Outcome<()> {
    println!("\n### From commit to visible\n");
    println!(
        "| commits a second, connections | over | prefetchd, p50 | p99 | p99.9 | largest | \
         pg_recvlogical's line, p50 | p99 | p99.9 | largest | ratio of p50, p99 |\n|---|---|---|---|---|---|---|---|---|---|---|"
    );
    let mut usages = Vec::new();
    let slice = Duration::from_secs(sizes.seconds) / u32::try_from(sizes.rounds)?;
    for (rate, way) in RATES {
        let mut writers = Writers::new(world, rate)?;
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for _ in 0..sizes.rounds {
            theirs.extend(until_printed(world, way, &mut writers, slice)?);
            let watch = Watch::begin(world.pids());
            let daemon = world.daemon(way)?;
            watch.daemon_is(daemon.pid);
            world.wait_for_load()?;
            world.wait_until_idle()?;
            ours.extend(until_in_redis(&mut writers, slice, world.observer(way)?)?);
            usages.push(watch.end());
            daemon.stop()?;
        }
        say(&format!("latency at {rate}/s, {way}: {:.0}/s managed, {} seen", writers.managed(), ours.len()));
        let (ours, theirs) = (Sorted::new(ours), Sorted::new(theirs));
        let shown =
            |times: &Sorted| [0.5, 0.99, 0.999, 1.0].map(|part| format!("{:.2} ms", times.ms(part))).join(" | ");
        println!(
            "| {:.0}, {} | {way} | {} | {} | {:.2}, {:.2} |",
            writers.managed(),
            writers.connections.len(),
            shown(&ours),
            shown(&theirs),
            ours.ms(0.5) / theirs.ms(0.5),
            ours.ms(0.99) / theirs.ms(0.99),
        );
    }
    println!("\n{}", Usage::table(&format!("{} s of latency", slice.as_secs()), &usages));
    Ok(())
}

/// How long each commit took until a reader of pg_recvlogical's output saw it.
fn until_printed(world: &World, way: Way, writers: &mut Writers, time: Duration) -> Outcome<Vec<Duration>> {
    let mut printed = Printed::start(world, way)?;
    let (committed, commits) = mpsc::channel();
    writers.run(time, &committed)?;
    drop(committed);
    let commits: Vec<Commit> = commits.into_iter().collect();
    world.wait_until_sent(&mut world.commits()?)?;
    // What has been sent is in the pipe a moment later.
    thread::sleep(Duration::from_millis(200));
    let seen = printed.end()?;
    world.drop_slot("yardstick")?;
    let time_of = |commit: &Commit| {
        let at = seen.get(&commit.value).ok_or_else(|| format!("pg_recvlogical never printed {}", commit.value))?;
        Ok(at.saturating_duration_since(commit.at))
    };
    commits.iter().map(time_of).collect()
}

/// pg_recvlogical, which prints to a pipe, and its reader: when it saw each value.
struct Printed {
    receiver: Child,
    reading: Option<JoinHandle<HashMap<u64, Instant>>>,
}

impl Printed {
    fn start(world: &World, way: Way) -> Outcome<Self> {
        let mut receiver = world.receiver(way, "-")?;
        let output = receiver.stdout.take().ok_or("no pipe")?;
        let reading = Some(thread::spawn(move || read_values(output)));
        world.wait_until_sent(&mut world.commits()?)?;
        Ok(Self { receiver, reading })
    }

    fn end(&mut self) -> Outcome<HashMap<u64, Instant>> {
        self.receiver.kill()?;
        self.receiver.wait()?;
        let reading = self.reading.take().ok_or("it has ended before")?;
        Ok(reading.join().map_err(|_| "the reader panicked")?)
    }
}

impl Drop for Printed {
    fn drop(&mut self) {
        let _ = self.receiver.kill();
        let _ = self.receiver.wait();
    }
}

/// Until the end of the output.
fn read_values(mut output: ChildStdout) -> HashMap<u64, Instant> {
    // A column of pgoutput: 't', the length as four bytes, the text. No other column is as long.
    const COLUMN: [u8; 5] = [b't', 0, 0, 0, DIGITS as u8];
    let (mut seen, mut text, mut buffer) = (HashMap::new(), Vec::new(), vec![0; 1 << 16]);
    while let Ok(read @ 1..) = output.read(&mut buffer) {
        let now = Instant::now();
        text.extend_from_slice(&buffer[..read]);
        for at in memmem::find_iter(&text, &COLUMN) {
            let value = text.get(at + COLUMN.len()..).and_then(|rest| rest.get(..DIGITS));
            if let Some(value) = value.and_then(|value| std::str::from_utf8(value).ok()?.parse().ok()) {
                seen.entry(value).or_insert(now);
            }
        }
        // A value may be cut in two by the end of a read.
        text.drain(..text.len().saturating_sub(COLUMN.len() + DIGITS - 1));
    }
    seen
}

/// Reads of one's own writes: commit, take the position, read with `min_lsn`.
pub fn waits(world: &World, sizes: &Sizes) -> Outcome<()> {
    println!("\n### Reads that wait for their own commit, at {WAITS_A_SECOND} a second\n");
    let watch = Watch::begin(world.pids());
    let daemon = world.daemon(Way::Unix)?;
    watch.daemon_is(daemon.pid);
    world.wait_for_load()?;
    world.wait_until_idle()?;
    let (mut writer, mut http) = (world.commits()?, Http::connect(daemon.http)?);
    let (mut positions, mut waits, mut plain) = (Vec::new(), Vec::new(), Vec::new());
    let began = Instant::now();
    for n in 0..sizes.seconds * WAITS_A_SECOND {
        let due = began + Duration::from_micros(n * 1_000_000 / WAITS_A_SECOND);
        thread::sleep(due.saturating_duration_since(Instant::now()));
        let (id, value) = (1 + n % ROWS, FIRST + n);
        writer.set_stock(id, value)?;
        let committed = Instant::now();
        let position = writer.position()?;
        positions.push(committed.elapsed());
        let row = http.get(&format!("/v1/tables/items/{id}?min_lsn={position}&wait=10s"))?;
        waits.push(committed.elapsed());
        let row: serde_json::Value = serde_json::from_slice(&row)?;
        if row["stock"].as_str() != Some(value.to_string().as_str()) {
            return Err(format!("row {id} is older than its commit: {row}").into());
        }
        let asked = Instant::now();
        http.get(&format!("/v1/tables/items/{id}"))?;
        plain.push(asked.elapsed());
    }
    let usage = watch.end();
    daemon.stop()?;
    println!("| from | until | p50 | p99 | p99.9 | largest |\n|---|---|---|---|---|---|");
    for (span, times) in [
        ("COMMIT's answer | the position is known", positions),
        ("COMMIT's answer | the answer over HTTP", waits),
        ("the request for the same row without a position | its answer", plain),
    ] {
        let times = Sorted::new(times);
        let shown = [0.5, 0.99, 0.999, 1.0].map(|part| format!("{:.2} ms", times.ms(part))).join(" | ");
        println!("| {span} | {shown} |");
    }
    println!("\n{}", Usage::table(&format!("{} s of waiting reads", sizes.seconds), &[usage]));
    Ok(())
}
