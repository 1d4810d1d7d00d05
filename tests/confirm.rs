//! What is confirmed to Postgres: everything that Redis has, and nothing else.

use crate::harness::{Daemon, Postgres, Redis, Settings, Stop, eventually};
use nix::sys::signal::Signal;
use prefetchd::lsn::Lsn;
use serde_json::Value;
use std::time::Duration;

const FIRST: &str = "cache:category:cat-001";

async fn confirms(postgres: &Postgres, lsn: Lsn) {
    eventually(&format!("{lsn} is confirmed"), async || postgres.confirmed().await, |at| *at >= lsn).await;
}

#[tokio::test]
async fn what_redis_has_not_acknowledged_is_not_confirmed() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let daemon = Daemon::start(&postgres, &redis).await;
    daemon.allow_warning("stalled");
    daemon.ready().await;
    redis.signal(Signal::SIGSTOP);
    let before = postgres.position().await;
    let lsn = postgres.execute("UPDATE categories SET name = 'Drinks' WHERE id = 'cat-001'").await;
    let stalled = daemon.status_when("stalled", |status| status["state"] == "stalled").await;
    assert!(stalled["waiting_for"].as_str().unwrap().contains("redis"), "{stalled}");
    let received = stalled["lsn"]["received"].as_str().unwrap().parse::<Lsn>().unwrap();
    assert!(received >= lsn, "{stalled}");
    // Meanwhile it has answered keepalives, which must not have confirmed what was only received.
    assert!(postgres.confirmed().await < lsn);
    assert!(postgres.confirmed().await <= before);
    assert_eq!(daemon.get("/readyz").await.status, 503);
    redis.signal(Signal::SIGCONT);
    daemon.applied(lsn).await;
    assert_eq!(redis.hash(FIRST).await["name"], "Drinks");
    confirms(&postgres, lsn).await;
    daemon.ready().await;
    assert_eq!(daemon.status().await["primary_reads"], 1, "a stall is no loss");
}

#[tokio::test]
async fn a_redis_that_is_frozen_for_long_holds_up_no_shutdown_of_postgres() {
    let (mut postgres, redis) = (Postgres::own(&[]), Redis::start());
    let daemon = Daemon::start(&postgres, &redis).await;
    daemon.allow_warnings();
    daemon.ready().await;
    redis.signal(Signal::SIGSTOP);
    let lsn = postgres.execute("UPDATE categories SET name = 'Drinks' WHERE id = 'cat-001'").await;
    // A walsender that waits for a confirmation delays a shutdown; one without a client does not.
    daemon.logged("redis has not answered").await;
    let postgres = tokio::task::spawn_blocking(move || {
        postgres.restart(Stop::Fast);
        postgres
    });
    let postgres = tokio::time::timeout(Duration::from_secs(60), postgres).await.expect("postgres stops").unwrap();
    assert!(postgres.confirmed().await < lsn);
    redis.signal(Signal::SIGCONT);
    daemon.applied(lsn).await;
    assert_eq!(redis.hash(FIRST).await["name"], "Drinks");
    confirms(&postgres, lsn).await;
    daemon.ready().await;
}

#[tokio::test]
async fn a_slot_that_fills_up_is_told_of_before_it_is_lost() {
    let (postgres, mut redis) = (Postgres::own(&[("max_slot_wal_keep_size", "160MB")]), Redis::start());
    let daemon = Daemon::start(&postgres, &redis).await;
    let near = "more than half of max_slot_wal_keep_size = 167.8 MB";
    daemon.allow_warning(near);
    daemon.allow_warning("stalled");
    daemon.allow_warning("redis has no checkpoint");
    daemon.ready().await;
    assert_eq!(daemon.said(near), 0);
    redis.stop();
    daemon.status_when("stalled", |status| status["state"] == "stalled").await;
    postgres
        .execute("SELECT count(pg_logical_emit_message(false, 'of another', repeat('x', 1000000))) FROM generate_series(1, 100)")
        .await;
    // While Redis is unavailable, which is when it fills up.
    daemon.logged(near).await;
    let metrics = daemon.metrics().await;
    let (kept, limit) = (metrics["prefetchd_slot_retained_bytes"], metrics["prefetchd_slot_limit_bytes"]);
    assert!(kept > limit / 2.0 && limit == f64::from(160 << 20), "{kept} of {limit}");
    assert_eq!(daemon.status().await["slot"]["retained_bytes"], kept as u64);
    redis.start_again();
    let free = |status: &Value| status["slot"]["retained_bytes"].as_u64() < Some(40 << 20);
    daemon.status_when("what was kept is let go", free).await;
    assert_eq!(daemon.said(near), 1, "{}", daemon.log_text());
    daemon.ready().await;
}

#[tokio::test]
async fn an_idle_database_lets_go_of_its_wal_and_a_restart_reads_nothing() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let settings = Settings::new(&postgres, &redis);
    let daemon = Daemon::with(&settings).await;
    daemon.ready().await;
    assert_eq!(daemon.status().await["primary_reads"], 1);
    // Nothing of it is published, so nothing of it is sent.
    let lsn = postgres.execute("CREATE TABLE busy (n int); INSERT INTO busy SELECT generate_series(1, 10000)").await;
    confirms(&postgres, lsn).await;
    assert_eq!(daemon.stop().await, Some(0));

    let lsn = postgres.execute("INSERT INTO busy SELECT generate_series(1, 10000)").await;
    let scans = async || {
        let sql = "SELECT seq_scan + coalesce(idx_scan, 0) FROM pg_stat_user_tables WHERE relname = 'categories'";
        postgres.value(sql).await.unwrap()
    };
    // The statistics of a session that has ended are complete.
    let scans_before = scans().await;
    let epoch = epoch(&postgres, &redis).await;
    let daemon = Daemon::with(&settings).await;
    daemon.ready().await;
    daemon.applied(lsn).await;
    confirms(&postgres, lsn).await;
    let status = daemon.status().await;
    assert_eq!(status["primary_reads"], 0, "{status}");
    assert_eq!(status["prefetched"], 0, "{status}");
    assert_eq!(status["tables"][0]["loaded"], true, "{status}");
    assert_eq!(daemon.said("nothing to load"), 1, "{}", daemon.log_text());
    assert_eq!(daemon.metrics().await["prefetchd_primary_reads_total"], 0.0);
    assert_eq!(daemon.get("/v1/tables/categories/no-such-row").await.refusal().0, 404, "loaded and fresh");
    assert_eq!(daemon.stop().await, Some(0));
    assert_eq!(scans().await, scans_before);
    assert!(self::epoch(&postgres, &redis).await > epoch);
}

async fn epoch(postgres: &Postgres, redis: &Redis) -> u64 {
    let key = format!("prefetchd:{{{}}}:checkpoint", postgres.slot());
    let checkpoint: String = redis.command(&["GET", &key]).await;
    serde_json::from_str::<serde_json::Value>(&checkpoint).unwrap()["epoch"].as_u64().unwrap()
}

#[tokio::test]
async fn a_restart_takes_up_what_was_committed_meanwhile_and_reads_no_table() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let settings = Settings::new(&postgres, &redis);
    let daemon = Daemon::with(&settings).await;
    daemon.ready().await;
    daemon.kill9();
    let lsn = postgres
        .execute(
            "UPDATE categories SET name = 'Drinks' WHERE id = 'cat-001'; DELETE FROM categories WHERE id = 'cat-002'",
        )
        .await;
    let daemon = Daemon::with(&settings).await;
    daemon.applied(lsn).await;
    daemon.ready().await;
    assert_eq!(redis.hash(FIRST).await["name"], "Drinks");
    assert!(redis.hash("cache:category:cat-002").await.is_empty());
    assert_eq!(daemon.status().await["primary_reads"], 0);
    assert_eq!(daemon.metrics().await[r#"prefetchd_changes_applied_total{op="upsert",table="categories"}"#], 1.0);
    confirms(&postgres, lsn).await;
}

/// The last position is confirmed only after a moment, and after a crash of Postgres even less is: changes are
/// redelivered.
#[tokio::test]
async fn what_comes_again_changes_nothing() {
    let (mut postgres, redis) = (Postgres::own(&[]), Redis::start());
    let settings = Settings::new(&postgres, &redis);
    let daemon = Daemon::with(&settings).await;
    daemon.ready().await;
    let lsn = postgres
        .execute("INSERT INTO categories VALUES ('a', 'one'); UPDATE categories SET id = 'b' WHERE id = 'a'")
        .await;
    daemon.applied(lsn).await;
    daemon.kill9();
    postgres.kill();
    postgres.start_again();
    let daemon = Daemon::with(&settings).await;
    let lsn = postgres.execute("UPDATE categories SET name = 'two' WHERE id = 'b'").await;
    daemon.applied(lsn).await;
    assert_eq!(redis.hash("cache:category:b").await["name"], "two");
    assert!(redis.hash("cache:category:a").await.is_empty());
    assert_eq!(daemon.status().await["primary_reads"], 0);
    assert_eq!(daemon.metrics().await[r#"prefetchd_changes_applied_total{op="upsert",table="categories"}"#], 1.0);
    daemon.ready().await;
}
