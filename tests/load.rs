//! Loads while writers work: in the end Redis equals Postgres, and meanwhile no reader ever saw anything that the
//! promises do not allow.

use crate::harness::traffic::{Traffic, loaded, seed};
use crate::harness::watcher::Watcher;
use crate::harness::{Daemon, Postgres, Redis, Settings};
use serde_json::json;
use std::fmt::Write;
use std::time::{Duration, Instant};

const TTL: Duration = Duration::from_secs(24 * 60 * 60);
const ROWS: u64 = 60_000;
/// The pause between a writer's transactions, because a debug build on a shared machine is slow.
const REST: Duration = Duration::from_millis(4);

/// `PREFETCHD_TEST_ROWS=1000000` and a release build prove what the name says.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_million_rows_load_while_eight_writers_run() {
    let rows = std::env::var("PREFETCHD_TEST_ROWS").map_or(ROWS, |rows| rows.parse().unwrap());
    let seed = seed();
    let (postgres, redis) = (Postgres::own(&[("max_wal_size", "4GB")]), Redis::start());
    let traffic = Traffic::create(&postgres, rows).await;
    strangers(&redis, rows).await;
    let watcher = Watcher::start(&redis, &postgres.slot(), traffic, seed).await;
    let writers = traffic.write(&postgres, seed, REST);

    let began = Instant::now();
    let daemon = Daemon::with(&Traffic::settings(&postgres, &redis)).await;
    loaded(&daemon).await;
    let (elapsed, during) = (began.elapsed(), writers.changes());

    let after = writers.stop().await - during;
    let written = Instant::now();
    daemon.applied(postgres.position().await).await;
    println!(
        "{rows} rows in {:.2} s, with {during} changes meanwhile ({:.0} a second); {after} more, applied {:.2} s after \
         the last; at most {} MB of memory",
        elapsed.as_secs_f64(),
        during as f64 / elapsed.as_secs_f64(),
        written.elapsed().as_secs_f64(),
        daemon.peak_memory_bytes() >> 20,
    );
    traffic.assert_equal(&postgres, &redis, TTL).await;
    watcher.stop().await;
    assert_eq!(redis.command::<i32>(&["EXISTS", "t:item", "t:items:1", "other"]).await, 3, "not under the prefix");
    assert_eq!(daemon.stop().await, Some(0));
}

/// Waits until each table has been loaded so many more times.
async fn loaded_again(daemon: &Daemon, times: usize) {
    let each = |_: &serde_json::Value| {
        ["items", "lefts", "rights"].iter().all(|table| daemon.said(&format!(" rows of {table} in ")) > times)
    };
    daemon.status_when("loaded again", each).await;
    loaded(daemon).await;
}

/// Adds keys under the prefix that no row has, and some next to it.
async fn strangers(redis: &Redis, rows: u64) {
    let mut pipe = redis::pipe();
    for id in 10 * rows..10 * rows + 500 {
        pipe.hset(Traffic::item_key(id), "id", id).ignore();
    }
    pipe.set("t:item:", "no id").set("t:item:not a number", 1).rpush("t:left:7:8", "a list");
    for beside in ["t:item", "t:items:1", "other"] {
        pipe.set(beside, "not ours");
    }
    pipe.exec_async(&mut redis.connection().await).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_checkpoint_heals_under_writers_without_a_gap() {
    let seed = seed();
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let traffic = Traffic::create(&postgres, 12_000).await;
    let daemon = Daemon::with(&Traffic::settings(&postgres, &redis)).await;
    daemon.allow_warning("finding out what to do");
    daemon.allow_warning("loading every table again");
    loaded(&daemon).await;
    let watcher = Watcher::start(&redis, &postgres.slot(), traffic, seed).await;
    let writers = traffic.write(&postgres, seed, REST);
    let checkpoint = format!("prefetchd:{{{}}}:checkpoint", postgres.slot());
    for times in 1..=3 {
        strangers(&redis, traffic.rows).await;
        redis.command::<()>(&["DEL", &checkpoint]).await;
        loaded_again(&daemon, times).await;
    }
    writers.stop().await;
    daemon.applied(postgres.position().await).await;
    traffic.assert_equal(&postgres, &redis, TTL).await;
    watcher.stop().await;
    assert_eq!(daemon.stop().await, Some(0));
}

/// A change that leaves out a large value cannot be merged before its row is loaded, so the row is read again. Rows
/// must not become pending as fast as they are read.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_load_ends_while_rows_with_large_values_change() {
    let seed = seed();
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let traffic = Traffic::create(&postgres, 2_000).await;
    postgres.execute("UPDATE items SET large = repeat(md5(id::text), 80)").await;
    let watcher = Watcher::start(&redis, &postgres.slot(), traffic, seed).await;
    let writers = traffic.touch(&postgres, seed);
    let daemon = Daemon::with(&Traffic::settings(&postgres, &redis)).await;
    // Eight writers without pauses leave little of a small machine to Redis.
    daemon.allow_warning("redis does not answer");
    daemon.ready().await;
    println!("loaded with {} changes meanwhile", writers.changes());
    writers.stop().await;
    daemon.applied(postgres.position().await).await;
    traffic.assert_equal(&postgres, &redis, TTL).await;
    watcher.stop().await;
    assert_eq!(daemon.stop().await, Some(0));
}

/// A key may be found in Redis, its row be gone when Postgres is asked, and exist again when the answer is used.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_no_orphan_any_more_stays() {
    let seed = seed();
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let traffic = Traffic::create(&postgres, 1_000).await;
    let daemon = Daemon::with(&Traffic::settings(&postgres, &redis)).await;
    daemon.allow_warning("finding out what to do");
    daemon.allow_warning("loading every table again");
    loaded(&daemon).await;
    let watcher = Watcher::start(&redis, &postgres.slot(), traffic, seed).await;
    let checkpoint = format!("prefetchd:{{{}}}:checkpoint", postgres.slot());
    for times in 1..=4 {
        let writers = traffic.churn(&postgres, seed ^ times as u64);
        redis.command::<()>(&["DEL", &checkpoint]).await;
        loaded_again(&daemon, times).await;
        writers.stop().await;
        daemon.applied(postgres.position().await).await;
        traffic.assert_equal(&postgres, &redis, TTL).await;
    }
    watcher.stop().await;
    assert_eq!(daemon.stop().await, Some(0));
}

/// Small tables are looked up, read and given watermarks together. A locked table waits alone.
#[tokio::test]
async fn a_locked_table_keeps_no_other_from_being_loaded() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let many = |what: &dyn Fn(usize) -> String| (0..50).map(what).collect::<String>();
    let tables = many(&|n| {
        format!(
            "CREATE TABLE many{n} (id int PRIMARY KEY, v text); GRANT SELECT ON many{n} TO prefetchd;
             INSERT INTO many{n} SELECT n, 'v{n}' FROM generate_series(1, {n}) n;
             ALTER PUBLICATION prefetchd ADD TABLE many{n};"
        )
    });
    postgres.execute(&tables).await;
    let configured =
        many(&|n| format!("[[tables]]\nname = 'many{n}'\ntable = 'public.many{n}'\nkey = 'many{n}:{{id}}'\n"));
    let daemon = Daemon::with(&Settings::new(&postgres, &redis).tables(&configured)).await;
    daemon.ready().await;
    let holder = postgres.client().await;
    holder.batch_execute("BEGIN; LOCK TABLE many30 IN ACCESS EXCLUSIVE MODE").await.unwrap();
    // On a busy machine it may be locked for longer than a comparison waits.
    daemon.allow_warning("was given up, the table stays as it is");
    let everything = json!({});
    let (_, ()) = tokio::join!(daemon.operate("refetch", &everything), async {
        let done = |n| daemon.said(&format!("refetch of many{n}:")) > 0;
        let all_but_one = |_: &serde_json::Value| (0..50).all(|n| done(n) == (n != 30));
        daemon.status_when("all but one", all_but_one).await;
        holder.batch_execute("COMMIT").await.unwrap();
    });
    for n in [0, 1, 30, 49] {
        assert_eq!(redis.keys(&format!("many{n}:*")).await.len(), n);
    }
    assert_eq!(daemon.stop().await, Some(0));
}

/// About 5 MB, as COPY sends them.
const BULK: &str = "INSERT INTO categories (id, name)
     SELECT n, string_agg(md5(n::text || m), '') FROM generate_series(1, 1000) n, generate_series(1, 150) m GROUP BY n";

#[tokio::test]
async fn a_load_rate_holds_for_loads_and_verifications_and_not_for_the_stream() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    postgres.execute(BULK).await;
    let least = Duration::from_secs_f64(1_000.0 * 150.0 * 32.0 / 500_000.0 * 0.7);
    let began = Instant::now();
    let daemon = Daemon::with(&Settings::new(&postgres, &redis).text("cache.load_rate", "500kB")).await;
    daemon.status_when("loading", |status| status["tables"][0]["loading"]["rows"].as_u64() > Some(0)).await;
    let lsn = postgres.execute("UPDATE categories SET name = 'Drinks' WHERE id = 'cat-001'").await;
    daemon.applied(lsn).await;
    assert_eq!(redis.hash("cache:category:cat-001").await["name"], "Drinks");
    let status = daemon.status().await;
    assert_eq!((&status["state"], &status["load_rate"]), (&json!("loading"), &json!({"bytes_a_second": 500_000})));
    daemon.ready().await;
    assert!(began.elapsed() >= least, "{:?} of {least:?}", began.elapsed());
    assert_eq!(redis.keys("cache:category:*").await.len(), 1_005);

    let began = Instant::now();
    let answer = daemon.operate("verify", &json!({})).await;
    assert!(answer.status == 200 && answer.json()["rows"] == 1_005, "{answer:?}");
    assert!(began.elapsed() >= least, "{:?} of {least:?}", began.elapsed());
    assert_eq!(daemon.stop().await, Some(0));
}

#[tokio::test]
async fn many_loads_are_one_line_and_one_load_is_too() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let (mut tables, mut sql) = (String::new(), String::new());
    for n in 1..=40 {
        writeln!(tables, "[[tables]]\nname = 't{n}'\ntable = 'public.t{n}'\nkey = 't{n}:{{id}}'").unwrap();
        write!(
            sql,
            "CREATE TABLE t{n} (id int PRIMARY KEY); GRANT SELECT ON t{n} TO prefetchd; INSERT INTO t{n} VALUES (1), (2);
             ALTER PUBLICATION prefetchd ADD TABLE t{n};"
        )
        .unwrap();
    }
    postgres.execute(&sql).await;
    let daemon = Daemon::with(&Settings::new(&postgres, &redis).tables(&tables)).await;
    daemon.ready().await;
    assert_eq!(daemon.said("loading 40 tables: first start"), 1, "{}", daemon.log_text());
    daemon.logged("streaming from ").await;
    // On a busy machine they may take longer than a line is held back.
    let log = daemon.log_text();
    assert!(daemon.said("streaming from ") < 10, "{log}");
    if daemon.said("streaming from ") == 1 {
        assert_eq!(daemon.said("loaded 40 tables, 80 rows, in "), 1, "{log}");
    }
    assert_eq!(daemon.said(" of t7 in "), 0, "{log}");

    postgres.execute("ALTER TABLE t7 ADD COLUMN v text DEFAULT 'x'").await;
    daemon.logged("loading t7: ").await;
    daemon.logged("loaded 2 rows of t7 in ").await;
    assert_eq!(daemon.stop().await, Some(0));
}
