//! How a first load grows with rows, tables, partitions, the size of values and the number of columns. Only one of them
//! differs within a series.
//!
//! With PLOT=file it also draws the series: plot.rs.

use super::figures::{median, rates};
use super::plot::{self, Chart};
use super::processes::{cpu_seconds, peak_memory_bytes};
use super::world::{Outcome, Way, World};
use super::{machine, number, say};
use std::fmt::Write;
use std::time::{Duration, Instant};

/// In all series but that of rows.
const ROWS: u64 = 100_000;
/// All values of the series of values: a thousand bytes for each of those rows, at most.
const BYTES_A_ROW: u64 = 1_000;
/// The same of columns: all rows together have twenty times as many fields as there are rows.
const FIELDS_A_ROW: u64 = 20;

/// About 100 bytes a row, as in the other parts.
const COLUMNS: &str = "id bigint PRIMARY KEY, name text NOT NULL, category text NOT NULL, price numeric(10,2) NOT NULL, \
                       stock integer NOT NULL, active boolean NOT NULL, updated_at timestamptz NOT NULL";
const VALUES: &str = "n, 'Item number ' || n, 'category-' || n % 97, n % 100000 / 100.0, n % 1000, n % 2 = 0, \
                      timestamptz '2024-01-01 00:00Z' + n * interval '1 second'";

struct Series {
    title: &'static str,
    cases: Vec<Case>,
}

struct Case {
    /// Of what grows.
    count: u64,
    rows: u64,
    tables: u64,
    /// Makes the tables `t1`, `t2`…, and fills them.
    sql: String,
}

/// What one load has used.
struct Load {
    time: Duration,
    daemon_cpu: f64,
    redis_cpu: f64,
    peak_bytes: u64,
}

pub fn growth() -> Outcome<()> {
    let (rows, rounds) = (number("ROWS", ROWS)?, usize::try_from(number("ROUNDS", 3)?)?.max(1));
    let world = World::start(0)?;
    println!("{}", machine(&world)?);
    let mut charts = Vec::new();
    for series in all_series(rows) {
        println!("\n### First load, growing {}\n", series.title);
        println!(
            "| {} | rows in all | prefetchd, rows/s | prefetchd, µs of CPU a row | Redis, µs of CPU a row | prefetchd, peak memory |\n\
             |---|---|---|---|---|---|",
            series.title
        );
        let mut chart = Chart { title: series.title, points: Vec::new() };
        for case in &series.cases {
            let loads = case.measure(&world, rounds)?;
            let times: Vec<Duration> = loads.iter().map(|load| load.time).collect();
            let peak = loads.iter().map(|load| load.peak_bytes).max().unwrap_or_default() as f64 / 1e6;
            let micros =
                |of: fn(&Load) -> f64| loads.iter().map(of).sum::<f64>() / loads.len() as f64 / case.rows as f64 * 1e6;
            let (daemon, redis) = (micros(|load| load.daemon_cpu), micros(|load| load.redis_cpu));
            let rates = rates(case.rows, &times);
            println!("| {} | {} | {rates} | {daemon:.1} | {redis:.1} | {peak:.1} MB |", case.count, case.rows);
            chart.points.push((case.count as f64, case.rows as f64 / median(&times).as_secs_f64() / 1000.0, peak));
        }
        charts.push(chart);
    }
    if let Some(file) = std::env::var_os("PLOT") {
        std::fs::write(file, plot::svg(&charts))?;
    }
    Ok(())
}

impl Case {
    fn measure(&self, world: &World, rounds: usize) -> Outcome<Vec<Load>> {
        world.drop_slot("prefetchd")?;
        world.sql(&format!(
            "SET client_min_messages = warning; DROP PUBLICATION IF EXISTS prefetchd; DROP SCHEMA public CASCADE; \
             CREATE SCHEMA public; {}; \
             CREATE PUBLICATION prefetchd FOR ALL TABLES WITH (publish_via_partition_root = true); \
             VACUUM ANALYZE; CHECKPOINT",
            self.sql
        ))?;
        let mut configuration = String::new();
        for table in 1..=self.tables {
            writeln!(
                configuration,
                "[[tables]]\nname = \"t{table}\"\ntable = \"public.t{table}\"\nkey = \"bench:t{table}:{{id}}\""
            )?;
        }
        (1..=rounds).map(|_| self.load(world, &configuration)).collect()
    }

    fn load(&self, world: &World, configuration: &str) -> Outcome<Load> {
        world.drop_slot("prefetchd")?;
        world.flush()?;
        let redis = world.pids().redis;
        let before = cpu_seconds(redis).unwrap_or_default();
        let started = Instant::now();
        let daemon = world.daemon_of(Way::Unix, &world.redis_url(Way::Unix), configuration)?;
        world.wait_for_loads(usize::try_from(self.tables)?)?;
        let load = Load {
            time: started.elapsed(),
            daemon_cpu: cpu_seconds(daemon.pid).unwrap_or_default(),
            redis_cpu: cpu_seconds(redis).unwrap_or_default() - before,
            peak_bytes: peak_memory_bytes(daemon.pid),
        };
        world.has_rows(self.rows)?;
        daemon.stop()?;
        say(&format!("growth, {}, {} rows: {:.2?}", self.count, self.rows, load.time));
        Ok(load)
    }
}

fn all_series(rows: u64) -> [Series; 5] {
    let is_large = std::env::var("SIZE").is_ok_and(|size| size == "large");
    let mut times = vec![1, 3, 10, 30];
    times.extend(is_large.then_some(50));
    let of = |title, cases: Vec<Case>| Series { title, cases };
    [
        of("rows", times.into_iter().map(|times| of_rows(rows * times)).collect()),
        of("tables", [1, 100, 300].map(|tables| of_tables(tables, rows)).into()),
        of("partitions", [1, 10, 100, 1_000].map(|partitions| of_partitions(partitions, rows)).into()),
        of("bytes a value", [10, 100, 1_000, 10_000, 100_000].map(|bytes| of_bytes(bytes, rows)).into()),
        of("columns", [5, 20, 50, 100, 200].map(|columns| of_columns(columns, rows)).into()),
    ]
}

fn of_rows(rows: u64) -> Case {
    let sql = format!("CREATE TABLE t1 ({COLUMNS}); INSERT INTO t1 SELECT {VALUES} FROM generate_series(1, {rows}) n");
    Case { count: rows, rows, tables: 1, sql }
}

fn of_tables(tables: u64, rows: u64) -> Case {
    let each = (rows / tables).max(1);
    let create = |table| {
        format!(
            "CREATE TABLE t{table} ({COLUMNS}); \
             INSERT INTO t{table} SELECT {VALUES} FROM generate_series(1, {each}) n;"
        )
    };
    Case { count: tables, rows: each * tables, tables, sql: (1..=tables).map(create).collect() }
}

fn of_partitions(partitions: u64, rows: u64) -> Case {
    let each = (rows / partitions).max(1);
    let rows = each * partitions;
    let create = |partition| {
        let (from, to) = (partition * each + 1, (partition + 1) * each + 1);
        format!("CREATE TABLE p{partition} PARTITION OF t1 FOR VALUES FROM ({from}) TO ({to});")
    };
    let sql = format!(
        "CREATE TABLE t1 ({COLUMNS}) PARTITION BY RANGE (id); {} \
         INSERT INTO t1 SELECT {VALUES} FROM generate_series(1, {rows}) n",
        (0..partitions).map(create).collect::<String>()
    );
    Case { count: partitions, rows, tables: 1, sql }
}

fn of_bytes(bytes: u64, rows: u64) -> Case {
    let rows = (rows * BYTES_A_ROW / bytes).clamp(1, rows);
    // Not compressed, so that Postgres reads as many bytes as it sends.
    let sql = format!(
        "CREATE TABLE t1 (id bigint PRIMARY KEY, value text NOT NULL); \
         ALTER TABLE t1 ALTER value SET STORAGE EXTERNAL; \
         INSERT INTO t1 SELECT n, left(repeat(md5(n::text), {bytes} / 32 + 1), {bytes}) FROM generate_series(1, {rows}) n"
    );
    Case { count: bytes, rows, tables: 1, sql }
}

/// The key is one of the columns.
fn of_columns(columns: u64, rows: u64) -> Case {
    let rows = (rows * FIELDS_A_ROW / columns).clamp(1, rows);
    let names: String = (2..=columns).map(|column| format!(", c{column} integer NOT NULL")).collect();
    let values: String = (2..=columns).map(|column| format!(", n + {column}")).collect();
    let sql = format!(
        "CREATE TABLE t1 (id bigint PRIMARY KEY{names}); \
         INSERT INTO t1 SELECT n{values} FROM generate_series(1, {rows}) n"
    );
    Case { count: columns, rows, tables: 1, sql }
}
