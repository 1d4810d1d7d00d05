//! Compares ways in which rows may lie in Redis: loads, the stream, reads over HTTP, memory, and what the daemon and Redis
//! use while nothing happens. Either a Redis Cluster of three masters with one Redis: on a cluster, prefetchd writes each hash
//! slot by itself, so the number of hash slots that have rows is what counts. Or hashes alone with lookups, and with JSON.
//!
//! Postgres is reached over its unix socket, and Redis over loopback TCP everywhere, because that is how the nodes of a
//! cluster announce themselves.

use super::http::Http;
use super::processes::{cpu_seconds, peak_memory_bytes};
use super::world::{CHECKPOINT, Daemon, Outcome, Way, World};
use super::{Sizes, machine, say};
use prefetchd::checkpoint::Checkpoint;
use prefetchd::cli::servers::Cluster;
use prefetchd::lanes::{Lane, tags};
use prefetchd::lsn::Lsn;
use rand::Rng;
use std::io;
use std::thread;
use std::time::{Duration, Instant};

/// Updates of a transaction of the stream.
const PER_COMMIT: u64 = 1_000;
const READING: Duration = Duration::from_secs(3);
const CONNECTIONS: usize = 16;
/// For the last reads to be over.
const PAUSE: Duration = Duration::from_secs(2);
const IDLE: Duration = Duration::from_secs(15);

#[derive(Clone, Copy)]
enum On {
    OneRedis,
    Cluster,
}

/// Where the rows lie.
pub struct Layout {
    name: &'static str,
    on: On,
    /// Of the rows' keys.
    template: &'static str,
    /// How many hash tags the IDs have, each of another hash slot. If the template has a hash tag of its own, theirs make
    /// no difference.
    tags: u16,
    /// The rest of the table's configuration.
    further: &'static str,
}

/// All are compared with the first.
pub const ON_CLUSTER: [Layout; 5] = [
    Layout::new("one Redis", On::OneRedis, "bench:item:{id}", Lane::ALL),
    Layout::new("cluster, 1 hash slot", On::Cluster, "bench:{{prefetchd}}:item:{id}", Lane::ALL),
    Layout::new("cluster, 100 hash slots", On::Cluster, "bench:item:{id}", 100),
    Layout::new("cluster, 1,000 hash slots", On::Cluster, "bench:item:{id}", 1_000),
    Layout::new("cluster, all 16,384 hash slots", On::Cluster, "bench:item:{id}", Lane::ALL),
];

/// The same. Each list has about [`ROWS_A_LIST`] rows, and each update of the stream changes a score.
pub const ROWS_ASKED_FOR: [Layout; 4] = [
    Layout::new("hashes", On::OneRedis, "bench:item:{id}", Lane::ALL),
    Layout::new("hashes, a sorted set", On::OneRedis, "bench:item:{id}", Lane::ALL).with(SORTED_SET),
    Layout::new("hashes, a set", On::OneRedis, "bench:item:{id}", Lane::ALL)
        .with("[[tables.lookups]]\nname = \"by_category\"\nkey = \"bench:by-category:{category}\"\n"),
    Layout::new("JSON", On::OneRedis, "bench:item:{id}", Lane::ALL).with("format = \"json\"\n"),
];

const SORTED_SET: &str =
    "[[tables.lookups]]\nname = \"by_category\"\nkey = \"bench:by-category:{category}\"\norder = \"stock\"\n";
const ROWS_A_LIST: u64 = 100;

impl Layout {
    const fn new(name: &'static str, on: On, template: &'static str, tags: u16) -> Self {
        Self { name, on, template, tags, further: "" }
    }

    const fn with(self, further: &'static str) -> Self {
        Self { further, ..self }
    }

    fn has_lists(&self) -> bool {
        self.further.contains("tables.lookups")
    }

    /// The hash tag of the row with this number. All masters have their share of the hash slots.
    fn tag(&self, number: u64) -> &'static str {
        let slot = number % u64::from(self.tags) * u64::from(Lane::ALL) / u64::from(self.tags);
        tags::tag(u16::try_from(slot).ok().and_then(Lane::new).expect("less than there are hash slots"))
    }

    /// Makes a new table, of about 100 bytes a row: the updates of a run before would make a difference. Row 0 is the
    /// marker.
    fn fill(&self, world: &World, rows: u64) -> Outcome<()> {
        let tags: Vec<&str> = (0..u64::from(self.tags)).map(|number| self.tag(number)).collect();
        let (tags, count, categories) = (tags.join(","), self.tags, categories(rows));
        world.sql(&format!(
            "SET client_min_messages = warning; DROP PUBLICATION IF EXISTS prefetchd; DROP TABLE IF EXISTS items; \
             CREATE TABLE items (id text PRIMARY KEY, number bigint NOT NULL UNIQUE, name text NOT NULL, \
             price numeric(10,2) NOT NULL, stock integer NOT NULL, active boolean NOT NULL, updated_at timestamptz NOT NULL, \
             category integer NOT NULL); \
             CREATE PUBLICATION prefetchd FOR TABLE items; \
             INSERT INTO items SELECT '{{' || tag || '}}:' || n, n, 'Item number ' || n, n % 100000 / 100.0, n % 1000, \
             n % 2 = 0, timestamptz '2024-01-01 00:00Z' + n * interval '1 second', n % {categories} \
             FROM generate_series(0, {rows}) n \
             JOIN unnest(string_to_array('{tags}', ',')) WITH ORDINALITY AS t (tag, k) ON k = 1 + n % {count} ORDER BY n; \
             VACUUM ANALYZE items; CHECKPOINT"
        ))?;
        Ok(())
    }
}

fn categories(rows: u64) -> u64 {
    (rows / ROWS_A_LIST).max(1)
}

/// One Redis, or the masters of a cluster.
struct Target {
    /// Of the daemon's configuration.
    url: String,
    servers: Vec<redis::Connection>,
    /// The server that has the checkpoint.
    home: usize,
    pids: Vec<u32>,
}

impl Target {
    fn one(world: &World) -> Outcome<Self> {
        let url = world.redis_url(Way::Tcp);
        Self::of(url.clone(), &[url], 0)
    }

    fn cluster(cluster: &Cluster) -> Outcome<Self> {
        Self::of(cluster.url(), &cluster.node_urls(), cluster.master_of(Lane::of(CHECKPOINT.as_bytes()))?)
    }

    fn of(url: String, servers: &[String], home: usize) -> Outcome<Self> {
        let connect = |url: &String| redis::Client::open(url.as_str())?.get_connection();
        let mut servers = servers.iter().map(connect).collect::<Result<Vec<_>, _>>()?;
        let pid = |server: &mut redis::Connection| -> Outcome<u32> {
            let info: redis::InfoDict = redis::cmd("INFO").query(server)?;
            Ok(info.get("process_id").ok_or("INFO has no process_id")?)
        };
        let pids = servers.iter_mut().map(pid).collect::<Outcome<_>>()?;
        Ok(Self { url, servers, home, pids })
    }

    fn flush(&mut self) -> Outcome<()> {
        self.servers.iter_mut().try_for_each(|server| redis::cmd("FLUSHALL").arg("SYNC").exec(server))?;
        Ok(())
    }

    /// # Errors
    /// Unless there is a key for each row.
    fn is_full(&mut self, rows: u64) -> Outcome<()> {
        let mut keys = 0;
        for server in &mut self.servers {
            keys += redis::Commands::scan_match::<_, Vec<u8>>(server, "bench:*")?.count() as u64;
        }
        // Row 0 is one more.
        if keys > rows { Ok(()) } else { Err(format!("{keys} keys in Redis, {} rows in Postgres", rows + 1).into()) }
    }

    /// Of all servers.
    fn used_memory(&mut self) -> Outcome<u64> {
        let used = |server: &mut redis::Connection| -> Outcome<u64> {
            let info: redis::InfoDict = redis::cmd("INFO").arg("memory").query(server)?;
            Ok(info.get("used_memory").ok_or("INFO has no used_memory")?)
        };
        self.servers.iter_mut().map(used).sum()
    }

    fn home(&mut self) -> &mut redis::Connection {
        &mut self.servers[self.home]
    }

    fn position(&mut self) -> Outcome<Lsn> {
        let head: Vec<u8> = redis::cmd("GET").arg(CHECKPOINT).query(self.home())?;
        Ok(Checkpoint::head(&head)?.lsn.0)
    }
}

/// CPU seconds since some moment: the daemon's, and all of Redis's.
struct Cpu {
    daemon: f64,
    redis: f64,
}

impl Cpu {
    /// Since the start of each process.
    fn of(daemon: Option<&Daemon>, target: &Target) -> Self {
        let of = |pid| cpu_seconds(pid).unwrap_or_default();
        Self { daemon: daemon.map_or(0.0, |daemon| of(daemon.pid)), redis: target.pids.iter().copied().map(of).sum() }
    }

    fn since(self, before: &Cpu) -> Self {
        Self { daemon: self.daemon - before.daemon, redis: self.redis - before.redis }
    }
}

/// What one run has shown.
struct Run {
    load: Duration,
    load_cpu: Cpu,
    /// How long Postgres has taken for the commits.
    commits: Duration,
    /// From the first update until all of them were in Redis.
    stream: Duration,
    stream_cpu: Cpu,
    /// The latencies over one connection, in ascending order.
    reads: Vec<Duration>,
    /// How many over several connections.
    reads_of_many: usize,
    /// Of lists, over one connection. Empty if there are none.
    lists: Vec<Duration>,
    idle_cpu: Cpu,
    peak_memory_bytes: u64,
    /// What the rows and lists take in Redis.
    redis_bytes: u64,
}

/// Prints the tables.
pub fn compare(layouts: &[Layout], sizes: &Sizes) -> Outcome<()> {
    sizes.say();
    let world = World::start(sizes.rows)?;
    let cluster = layouts.iter().any(|layout| matches!(layout.on, On::Cluster)).then(|| world.cluster()).transpose()?;
    let mut one = Target::one(&world)?;
    let mut several = cluster.as_ref().map(Target::cluster).transpose()?;
    println!("{}", machine(&world)?);
    let mut runs: Vec<Vec<Run>> = layouts.iter().map(|_| Vec::new()).collect();
    for round in 1..=sizes.rounds {
        for (layout, runs) in layouts.iter().zip(&mut runs) {
            let target = match layout.on {
                On::OneRedis => &mut one,
                On::Cluster => several.as_mut().expect("a layout on a cluster has one"),
            };
            let run = measure(&world, sizes, layout, target)?;
            say(&format!(
                "{}, round {round}: loaded in {:.2?}, streamed in {:.2?} (commits {:.2?}), {} reads",
                layout.name,
                run.load,
                run.stream,
                run.commits,
                run.reads.len()
            ));
            runs.push(run);
        }
    }
    print(layouts, sizes, &runs);
    Ok(())
}

fn measure(world: &World, sizes: &Sizes, layout: &Layout, target: &mut Target) -> Outcome<Run> {
    layout.fill(world, sizes.rows)?;
    world.drop_slot("prefetchd")?;
    target.flush()?;

    let memory = target.used_memory()?;
    let (before, started) = (Cpu::of(None, target), Instant::now());
    let daemon = world.daemon_on(Way::Unix, &target.url, layout.template, layout.further)?;
    world.wait_for_load_in(target.home())?;
    let load = started.elapsed();
    let load_cpu = Cpu::of(Some(&daemon), target).since(&before);
    target.is_full(sizes.rows)?;
    let redis_bytes = target.used_memory()?.saturating_sub(memory);

    let (before, started) = (Cpu::of(Some(&daemon), target), Instant::now());
    let written = update(world, sizes.changes)?;
    let commits = started.elapsed();
    world.wait_for("the stream", || Ok(target.position()? > written))?;
    let stream = started.elapsed();
    let stream_cpu = Cpu::of(Some(&daemon), target).since(&before);

    let reads = reads(&daemon, sizes.rows, layout, 1)?;
    let reads_of_many = self::reads(&daemon, sizes.rows, layout, CONNECTIONS)?.len();

    let lists = if layout.has_lists() { reads_of_lists(&daemon, sizes.rows)? } else { Vec::new() };

    thread::sleep(PAUSE);
    let before = Cpu::of(Some(&daemon), target);
    thread::sleep(IDLE);
    let idle_cpu = Cpu::of(Some(&daemon), target).since(&before);
    let peak_memory_bytes = peak_memory_bytes(daemon.pid);
    daemon.stop()?;
    Ok(Run {
        load,
        load_cpu,
        commits,
        stream,
        stream_cpu,
        reads,
        reads_of_many,
        lists,
        idle_cpu,
        peak_memory_bytes,
        redis_bytes,
    })
}

/// Changes so many rows. Whatever has reached more than the returned position has all of them.
fn update(world: &World, changes: u64) -> Outcome<Lsn> {
    let position = world.sql(&format!(
        "DO $$ BEGIN FOR done IN 0 .. {changes} - 1 BY {PER_COMMIT} LOOP \
         UPDATE items SET stock = stock + 1 WHERE number > done AND number <= least(done + {PER_COMMIT}, {changes}); \
         COMMIT; END LOOP; END $$; \
         SELECT pg_current_wal_insert_lsn(); \
         UPDATE items SET stock = stock + 1 WHERE number = 0"
    ))?;
    Ok(position.parse()?)
}

/// Reads all rows of random lists. Returns how long each read took, in ascending order.
fn reads_of_lists(daemon: &Daemon, rows: u64) -> Outcome<Vec<Duration>> {
    let until = Instant::now() + READING;
    let (mut client, mut times, mut random) = (Http::connect(daemon.http)?, Vec::new(), rand::rng());
    while Instant::now() < until {
        let category = random.random_range(1..categories(rows).max(2));
        let asked = Instant::now();
        client.get(&format!("/v1/lookups/items/by_category/{category}?limit={ROWS_A_LIST}"))?;
        times.push(asked.elapsed());
    }
    times.sort_unstable();
    Ok(times)
}

/// Reads random rows over so many connections. Returns how long each read took, in ascending order.
fn reads(daemon: &Daemon, rows: u64, layout: &Layout, connections: usize) -> Outcome<Vec<Duration>> {
    let until = Instant::now() + READING;
    let client = || -> io::Result<Vec<Duration>> {
        let (mut client, mut times, mut random) = (Http::connect(daemon.http)?, Vec::new(), rand::rng());
        while Instant::now() < until {
            let number = random.random_range(1..=rows);
            let path = format!("/v1/tables/items/%7B{}%7D:{number}", layout.tag(number));
            let asked = Instant::now();
            client.get(&path)?;
            times.push(asked.elapsed());
        }
        Ok(times)
    };
    let mut times = thread::scope(|scope| {
        let clients: Vec<_> = (0..connections).map(|_| scope.spawn(client)).collect();
        clients.into_iter().map(|client| client.join().expect("it does not panic")).collect::<io::Result<Vec<_>>>()
    })?
    .concat();
    times.sort_unstable();
    Ok(times)
}

// ------------------------------------------------------------------------------------------------------------- results

/// A column of a table: its name, the number, and how many of its decimals are shown.
type Column<'a> = (&'a str, &'a dyn Fn(&Run) -> f64, usize);

fn print(layouts: &[Layout], sizes: &Sizes, runs: &[Vec<Run>]) {
    let a_second = |count: u64, time: Duration| count as f64 / time.as_secs_f64();
    let ms = |times: &[Duration], part: f64| {
        let at = times.len().saturating_sub(1) as f64 * part;
        times.get(at as usize).map_or(f64::NAN, |time| time.as_secs_f64() * 1000.0)
    };
    let percent = |seconds: f64| seconds / IDLE.as_secs_f64() * 100.0;

    println!("\n### Loading {} rows into an empty Redis\n", sizes.rows);
    table(
        layouts,
        runs,
        &[
            ("rows/s", &|run| a_second(sizes.rows, run.load), 0),
            ("prefetchd, CPU seconds", &|run| run.load_cpu.daemon, 2),
            ("Redis, CPU seconds", &|run| run.load_cpu.redis, 2),
        ],
    );
    println!("\n### Following {} updates, {PER_COMMIT} a transaction\n", sizes.changes);
    table(
        layouts,
        runs,
        &[
            ("changes/s", &|run| a_second(sizes.changes, run.stream), 0),
            ("Postgres's commits alone, s", &|run| run.commits.as_secs_f64(), 2),
            ("until all are in Redis, s", &|run| run.stream.as_secs_f64(), 2),
            ("prefetchd, CPU seconds", &|run| run.stream_cpu.daemon, 2),
            ("Redis, CPU seconds", &|run| run.stream_cpu.redis, 2),
        ],
    );
    println!("\n### Reading single rows over HTTP\n");
    table(
        layouts,
        runs,
        &[
            ("one connection, reads/s", &|run| a_second(run.reads.len() as u64, READING), 0),
            ("p50, ms", &|run| ms(&run.reads, 0.5), 3),
            ("p99, ms", &|run| ms(&run.reads, 0.99), 3),
            (&format!("{CONNECTIONS} connections, reads/s"), &|run| a_second(run.reads_of_many as u64, READING), 0),
        ],
    );
    if layouts.iter().any(Layout::has_lists) {
        println!("\n### Reading lists of {ROWS_A_LIST} rows over HTTP, one connection\n");
        table(
            layouts,
            runs,
            &[
                ("rows/s", &|run| a_second(run.lists.len() as u64 * ROWS_A_LIST, READING), 0),
                ("p50, ms", &|run| ms(&run.lists, 0.5), 3),
                ("p99, ms", &|run| ms(&run.lists, 0.99), 3),
            ],
        );
    }
    println!("\n### Memory of Redis\n");
    let bytes_a_row = |run: &Run| run.redis_bytes as f64 / sizes.rows as f64;
    table(layouts, runs, &[("bytes a row", &bytes_a_row, 0)]);
    println!("\n### Doing nothing for {} s, in percent of one core\n", IDLE.as_secs());
    table(
        layouts,
        runs,
        &[
            ("prefetchd", &|run| percent(run.idle_cpu.daemon), 2),
            ("Redis, all servers", &|run| percent(run.idle_cpu.redis), 2),
            ("prefetchd, peak memory of the whole run, MB", &|run| run.peak_memory_bytes as f64 / 1e6, 1),
        ],
    );
}

/// A line for each layout. Medians over the rounds, and in parentheses their ratios to those of one Redis.
fn table(layouts: &[Layout], runs: &[Vec<Run>], columns: &[Column<'_>]) {
    println!("| |{}", columns.iter().map(|(name, ..)| format!(" {name} |")).collect::<String>());
    println!("|---|{}", "---|".repeat(columns.len()));
    let median = |runs: &[Run], number: &dyn Fn(&Run) -> f64| {
        let mut all: Vec<f64> = runs.iter().map(number).collect();
        all.sort_by(f64::total_cmp);
        all[all.len() / 2]
    };
    for (layout, of_layout) in layouts.iter().zip(runs) {
        print!("| {} |", layout.name);
        for (_, number, decimals) in columns {
            let (its, of_one) = (median(of_layout, number), median(&runs[0], number));
            print!(" {its:.decimals$} ({:.2}) |", its / of_one);
        }
        println!();
    }
}
