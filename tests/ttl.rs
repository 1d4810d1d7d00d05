//! The TTL as a safety net: keys outlive every quiet period while the daemon works, but not the daemon.

use crate::harness::{Daemon, PATIENCE, Postgres, Redis, Settings, eventually};
use nix::sys::signal::Signal;
use std::time::{Duration, Instant};

const TTL: Duration = Duration::from_secs(3);

async fn ttl_of_three_seconds() -> (Postgres, Redis, Settings) {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let settings = Settings::new(&postgres, &redis).text("cache.ttl", "3s");
    (postgres, redis, settings)
}

#[tokio::test]
async fn rows_that_never_change_never_expire() {
    let (postgres, redis, settings) = ttl_of_three_seconds().await;
    // Enough keys for several pages, in two tables with different TTLs.
    postgres
        .execute(
            "CREATE TABLE many (id int PRIMARY KEY); INSERT INTO many SELECT generate_series(1, 3000);
             GRANT SELECT ON many TO prefetchd; ALTER PUBLICATION prefetchd ADD TABLE many",
        )
        .await;
    let tables = "
        [[tables]]\nname = 'categories'\ntable = 'public.categories'\nkey = 'cache:category:{id}'
        [[tables]]\nname = 'many'\ntable = 'public.many'\nkey = 'many:{id}'\nttl = '4s'";
    let daemon = Daemon::with(&settings.tables(tables)).await;
    daemon.ready().await;
    let began = Instant::now();
    let mut youngest = i64::MAX;
    while began.elapsed() < TTL * 4 {
        let keys: u64 = redis.command(&["DBSIZE"]).await;
        assert_eq!(keys, 3007, "after {:?}", began.elapsed());
        for (key, ttl) in [("cache:category:cat-001", 3000), ("many:1", 4000), ("many:2999", 4000)] {
            let left = redis.pttl(key).await;
            assert!(0 < left && left <= ttl, "{key}: {left} ms");
            youngest = youngest.min(left);
        }
        // Rows that change keep theirs, too.
        postgres.execute("UPDATE many SET id = id WHERE id = 1").await;
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(youngest < 3000, "nothing was ever older than new");
    assert!(daemon.metrics().await["prefetchd_ttl_renewals_total"] > 3005.0);
    assert_eq!(daemon.status().await["primary_reads"], 2, "renewing reads no table");
    let answer = daemon.get("/v1/tables/categories/cat-001").await;
    let left: i64 = answer.header("Prefetchd-TTL-Ms").unwrap().parse().unwrap();
    assert!(0 < left && left <= 3000);
    daemon.ready().await;
}

#[tokio::test]
async fn keys_of_a_daemon_that_is_gone_expire_and_the_next_one_loads_them() {
    let (_postgres, redis, settings) = ttl_of_three_seconds().await;
    let daemon = Daemon::with(&settings).await;
    daemon.ready().await;
    assert_eq!(daemon.stop().await, Some(0));
    assert_eq!(redis.keys("cache:*").await.len(), 5);
    eventually("they expire", async || redis.keys("cache:*").await, Vec::is_empty).await;
    let daemon = Daemon::with(&settings).await;
    // At no moment does a response say that the rows do not exist.
    let deadline = Instant::now() + PATIENCE;
    loop {
        let answer = daemon.get("/v1/tables/categories/cat-001").await;
        match answer.status {
            200 => break,
            503 => {}
            _ => panic!("{answer:?}"),
        }
        assert!(Instant::now() < deadline, "{answer:?}");
    }
    daemon.ready().await;
    assert_eq!(redis.keys("cache:*").await.len(), 5);
    assert_eq!(daemon.status().await["primary_reads"], 1);
    assert!(daemon.status().await["last_load"]["reason"].as_str().unwrap().contains("expired"));
}

#[tokio::test]
async fn a_frozen_daemon_finds_out_that_keys_expired() {
    let (_postgres, redis, settings) = ttl_of_three_seconds().await;
    let daemon = Daemon::with(&settings).await;
    daemon.allow_warnings();
    daemon.ready().await;
    daemon.signal(Signal::SIGSTOP);
    eventually("they expire", async || redis.keys("cache:*").await, Vec::is_empty).await;
    daemon.signal(Signal::SIGCONT);
    let deadline = Instant::now() + PATIENCE;
    loop {
        let answer = daemon.get("/v1/tables/categories/cat-001").await;
        match answer.status {
            200 => break,
            503 => {}
            _ => panic!("{answer:?}"),
        }
        assert!(Instant::now() < deadline, "{answer:?}\n{}", daemon.log_text());
    }
    daemon.ready().await;
    assert_eq!(redis.keys("cache:*").await.len(), 5);
    assert_eq!(daemon.status().await["primary_reads"], 2);
    assert_eq!(daemon.metrics().await[r#"prefetchd_heals_total{reason="expired"}"#], 1.0);
}

#[tokio::test]
async fn while_postgres_is_away_keys_expire_and_come_back_with_it() {
    let (mut postgres, redis) = (Postgres::own(&[]), Redis::start());
    let settings = Settings::new(&postgres, &redis).text("cache.ttl", "3s").text("cache.max_staleness", "1s");
    let daemon = Daemon::with(&settings).await;
    daemon.allow_warnings();
    daemon.ready().await;
    postgres.kill();
    eventually("they expire", async || redis.keys("cache:*").await, Vec::is_empty).await;
    let (status, code) = daemon.get("/v1/tables/categories/cat-001").await.refusal();
    assert!(status == 503 && ["healing", "stale"].contains(&code.as_str()), "{status} {code}");
    postgres.start_again();
    daemon.ready().await;
    assert_eq!(redis.keys("cache:*").await.len(), 5);
}

/// With any policy other than `noeviction`, a full Redis evicts rows but spares the checkpoint, so nothing else reveals
/// it.
#[tokio::test]
async fn keys_that_redis_evicts_are_noticed_and_brought_back() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    postgres
        .execute("INSERT INTO categories SELECT 'more-' || n, repeat('x', 60), n, false, NULL FROM generate_series(1, 3000) n")
        .await;
    let settings = Settings::new(&postgres, &redis);
    let daemon = Daemon::with(&settings).await;
    daemon.ready().await;
    let used = async || {
        let info: String = redis.command(&["INFO", "memory"]).await;
        info.lines().find_map(|line| line.strip_prefix("used_memory:")?.trim().parse::<u64>().ok()).unwrap()
    };
    let evict = async || {
        redis.command::<()>(&["CONFIG", "SET", "maxmemory-policy", "volatile-random"]).await;
        let rows = async || {
            let mut limited = redis::pipe();
            limited.cmd("CONFIG").arg(&["SET", "maxmemory"]).arg(used().await - 100_000);
            // Redis evicts when something is written. Sent together, so that the daemon's next load finds no limit any
            // more.
            limited.cmd("SET").arg(&["other", "x"]).cmd("CONFIG").arg(&["SET", "maxmemory", "0"]);
            limited.exec_async(&mut redis.connection().await).await.unwrap();
            redis.keys("cache:category:*").await.len()
        };
        // Memory of clients may have been freed meanwhile.
        eventually("some are evicted", rows, |rows| *rows < 3_005).await;
    };
    daemon.allow_warning("redis evicts keys");
    evict().await;
    let heals = async || daemon.metrics().await[r#"prefetchd_heals_total{reason="evicted"}"#];
    eventually("noticed", heals, |heals| *heals == 1.0).await;
    daemon.ready().await;
    assert_eq!(redis.keys("cache:category:*").await.len(), 3_005);

    // Again at once: it is not loaded over and over, and no evicted row is called nonexistent.
    evict().await;
    daemon.status_when("noticed", |status| status["tables"][0]["loaded"] == false).await;
    let loads = daemon.status().await["primary_reads"].clone();
    let answer = async || daemon.get("/v1/tables/categories/nobody").await.refusal();
    eventually("readers are told", answer, |answer| *answer == (503, "incomplete".to_owned())).await;
    evict().await;
    assert_eq!(daemon.status().await["primary_reads"], loads);
    eventually("after a pause", heals, |heals| *heals == 2.0).await;
    daemon.ready().await;
    assert_eq!(redis.keys("cache:category:*").await.len(), 3_005);

    // Again at once, with Redis counting from zero, as after a restart.
    evict().await;
    daemon.status_when("noticed", |status| status["tables"][0]["loaded"] == false).await;
    eventually("readers are told", answer, |answer| *answer == (503, "incomplete".to_owned())).await;
    redis.command::<()>(&["CONFIG", "RESETSTAT"]).await;
    eventually("after a pause, all the same", heals, |heals| *heals == 3.0).await;
    daemon.ready().await;
    assert_eq!(redis.keys("cache:category:*").await.len(), 3_005);
    assert_eq!(daemon.stop().await, Some(0));

    // Once more while no daemon runs.
    evict().await;
    let daemon = Daemon::with(&settings).await;
    daemon.allow_warning("redis evicts keys");
    daemon.logged("redis evicts keys").await;
    daemon.ready().await;
    assert_eq!(redis.keys("cache:category:*").await.len(), 3_005);
}
