//! Servers that are not up yet, stop and come back, and the daemon's own end.

use crate::harness::proxy::Proxy;
use crate::harness::{Daemon, Postgres, Redis, Settings, Stop, eventually, position};
use nix::sys::signal::Signal;
use prefetchd::lsn::Lsn;
use serde_json::Value;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const FIRST: &str = "cache:category:cat-001";

fn waits_for(what: &'static str) -> impl Fn(&Value) -> bool {
    move |status| {
        status["state"] == "connecting" && status["waiting_for"].as_str().is_some_and(|waiting| waiting.contains(what))
    }
}

/// Waits for several more attempts.
async fn tries_again(daemon: &Daemon) {
    let now = daemon.status().await["uptime_seconds"].as_f64().unwrap();
    daemon.status_when("later", |status| status["uptime_seconds"].as_f64() > Some(now + 1.5)).await;
}

#[tokio::test]
async fn it_waits_for_servers_that_are_not_up_and_says_so_once() {
    let (mut postgres, mut redis) = (Postgres::own(&[]), Redis::start());
    postgres.stop(Stop::Fast);
    redis.stop();
    let daemon = Daemon::start(&postgres, &redis).await;
    daemon.status_when("waiting for postgres", waits_for("postgres")).await;
    assert_eq!(daemon.get("/healthz").await.status, 200);
    let ready = daemon.get("/readyz").await;
    assert_eq!(ready.status, 503);
    assert!(ready.body.contains("waiting for"), "{ready:?}");
    let read = daemon.get("/v1/tables/categories/cat-001").await;
    assert_eq!(read.refusal(), (503, "redis_unavailable".to_owned()));
    tries_again(&daemon).await;
    assert_eq!(daemon.said("waiting_for"), 1, "{}", daemon.log_text());

    postgres.start_again();
    daemon.status_when("waiting for redis", waits_for("redis")).await;
    tries_again(&daemon).await;
    // Postgres may have refused once more while starting.
    assert!(daemon.said("waiting_for") <= 3, "{}", daemon.log_text());
    let slots = postgres.value("SELECT count(*) FROM pg_replication_slots").await;
    assert_eq!(slots.as_deref(), Some("0"), "nothing is held in Postgres while Redis is away");

    redis.start_again();
    daemon.ready().await;
    assert_eq!(redis.keys("cache:*").await.len(), 5);
    assert_eq!(daemon.stop().await, Some(0));
}

#[tokio::test]
async fn a_daemon_that_waits_can_be_stopped() {
    let (postgres, mut redis) = (Postgres::shared(), Redis::start());
    redis.stop();
    let daemon = Daemon::start(&postgres, &redis).await;
    daemon.status_when("waiting for redis", waits_for("redis")).await;
    assert_eq!(daemon.stop().await, Some(0));
}

#[tokio::test]
async fn what_was_applied_is_confirmed_when_it_stops() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let settings = Settings::new(&postgres, &redis);
    for n in 0..4 {
        let daemon = Daemon::with(&settings).await;
        daemon.ready().await;
        let lsn = postgres.execute(&format!("UPDATE categories SET display_order = {n} WHERE id = 'cat-001'")).await;
        daemon.applied(lsn).await;
        let began = Instant::now();
        assert_eq!(daemon.stop().await, Some(0));
        assert!(began.elapsed() < Duration::from_secs(30), "a few seconds, on a machine however slow");
        assert!(postgres.confirmed().await >= lsn, "run {n}");
    }
}

/// While the last snapshot is awaited, another heartbeat may be due.
#[tokio::test]
async fn a_postgres_that_answers_slowly_makes_no_stop_an_undrained_one() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let proxy = Proxy::to_postgres(&postgres).await;
    let settings = Settings::new(&postgres, &redis).text("postgres.url", &proxy.url());
    for n in 0..8 {
        proxy.heal();
        let daemon = Daemon::with(&settings).await;
        daemon.ready().await;
        proxy.delay(Duration::from_millis(180));
        tokio::time::sleep(Duration::from_millis(150 * n)).await;
        assert_eq!(daemon.stop().await, Some(0), "run {n}");
    }
}

#[tokio::test]
async fn a_stop_under_load_loses_nothing() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let settings = Settings::new(&postgres, &redis);
    let daemon = Daemon::with(&settings).await;
    daemon.ready().await;
    let client = postgres.client().await;
    let enough = Arc::new(AtomicBool::new(false));
    let end = Arc::clone(&enough);
    let writing = tokio::spawn(async move {
        for n in 0.. {
            if end.load(Ordering::Relaxed) {
                break;
            }
            let sql = format!(
                "INSERT INTO categories VALUES ('n-{}', 'n{n}', {n})
                     ON CONFLICT (id) DO UPDATE SET display_order = EXCLUDED.display_order, name = EXCLUDED.name",
                n % 100
            );
            client.batch_execute(&sql).await.unwrap();
        }
    });
    // Stopped and started during that.
    let mut daemon = daemon;
    for _ in 0..3 {
        daemon.status_when("busy", |status| status["sync_events_applied"].as_u64() > Some(50)).await;
        let received: Lsn = daemon.status().await["lsn"]["received"].as_str().unwrap().parse().unwrap();
        assert_eq!(daemon.stop().await, Some(0));
        let key = format!("prefetchd:{{{}}}:checkpoint", postgres.slot());
        let checkpoint: Value = serde_json::from_str(&redis.command::<String>(&["GET", &key]).await).unwrap();
        let applied: Lsn = checkpoint["lsn"].as_str().unwrap().parse().unwrap();
        assert!(applied >= received, "{applied} is in redis, {received} was received before the stop");
        assert!(postgres.confirmed().await <= applied);
        daemon = Daemon::with(&settings).await;
    }
    enough.store(true, Ordering::Relaxed);
    writing.await.unwrap();
    daemon.applied(postgres.position().await).await;
    assert_eq!(daemon.status().await["primary_reads"], 0);
    let rows = postgres.client().await.query("SELECT id, name FROM categories", &[]).await.unwrap();
    assert_eq!(redis.keys("cache:*").await.len(), rows.len());
    for row in rows {
        let (id, name): (String, String) = (row.get(0), row.get(1));
        assert_eq!(redis.hash(&format!("cache:category:{id}")).await["name"], name, "{id}");
    }
}

#[tokio::test]
async fn a_second_signal_ends_it_at_once() {
    for first in [Signal::SIGTERM, Signal::SIGINT] {
        let (postgres, redis) = (Postgres::shared(), Redis::start());
        let settings = Settings::new(&postgres, &redis);
        let daemon = Daemon::with(&settings).await;
        daemon.allow_warnings();
        daemon.ready().await;
        // Something that cannot be written to Redis: the drain waits for it.
        redis.signal(Signal::SIGSTOP);
        let lsn = postgres.execute("UPDATE categories SET name = 'Drinks' WHERE id = 'cat-001'").await;
        daemon.status_when("received", |status| position(status, "received") >= Some(lsn)).await;
        daemon.signal(first);
        daemon.logged("stopping").await;
        assert_eq!(daemon.stop().await, Some(1), "not what a drained stop says");
        // What was in flight may still arrive: Redis reads it when it resumes, and is complete then.
        redis.signal(Signal::SIGCONT);
        let daemon = Daemon::with(&settings).await;
        daemon.applied(lsn).await;
        assert_eq!(redis.hash(FIRST).await["name"], "Drinks");
        assert_eq!(daemon.status().await["primary_reads"], 0);
    }
}

#[tokio::test]
async fn a_stop_that_could_not_bring_all_into_redis_says_so_and_loses_nothing() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let settings = Settings::new(&postgres, &redis);
    let daemon = Daemon::with(&settings).await;
    daemon.allow_warning("stopped before everything in hand was in redis");
    daemon.ready().await;
    redis.signal(Signal::SIGSTOP);
    let lsn = postgres.execute("UPDATE categories SET name = 'Drinks' WHERE id = 'cat-001'").await;
    daemon.status_when("received", |status| position(status, "received") >= Some(lsn)).await;
    assert_eq!(daemon.stop().await, Some(1), "0 means drained");
    assert!(postgres.confirmed().await < lsn);
    redis.signal(Signal::SIGCONT);
    let daemon = Daemon::with(&settings).await;
    daemon.applied(lsn).await;
    assert_eq!(redis.hash(FIRST).await["name"], "Drinks");
    assert_eq!(daemon.status().await["primary_reads"], 0);
}

#[tokio::test]
async fn a_stop_in_the_middle_of_a_load_is_taken_up_again() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    postgres.execute("INSERT INTO categories SELECT 'n-' || n, 'n', n FROM generate_series(1, 20000) n").await;
    let settings = Settings::new(&postgres, &redis);
    let daemon = Daemon::with(&settings).await;
    daemon.status_when("loading", |status| status["state"] == "loading").await;
    assert_eq!(daemon.stop().await, Some(0));
    let daemon = Daemon::with(&settings).await;
    let answer = daemon.get("/v1/tables/categories/n-20000").await;
    assert_ne!(answer.status, 404, "{answer:?}");
    daemon.ready().await;
    assert_eq!(redis.keys("cache:*").await.len(), 20005);
    assert_eq!(daemon.status().await["primary_reads"], 1);
}

#[tokio::test]
async fn postgres_may_restart_in_any_way() {
    let (mut postgres, redis) = (Postgres::own(&[]), Redis::start());
    let daemon = Daemon::start(&postgres, &redis).await;
    daemon.ready().await;
    for (n, how) in [Some(Stop::Fast), Some(Stop::Immediate), None, Some(Stop::Fast)].into_iter().enumerate() {
        let lsn = postgres.execute(&format!("UPDATE categories SET name = 'before {n}' WHERE id = 'cat-001'")).await;
        match how {
            Some(how) => postgres.stop(how),
            None => postgres.kill(),
        }
        daemon.status_when("waiting for postgres", waits_for("postgres")).await;
        postgres.start_again();
        daemon.applied(lsn).await;
        assert_eq!(redis.hash(FIRST).await["name"], format!("before {n}"));
        let lsn = postgres.execute(&format!("UPDATE categories SET name = 'after {n}' WHERE id = 'cat-001'")).await;
        daemon.applied(lsn).await;
        daemon.ready().await;
        assert_eq!(redis.hash(FIRST).await["name"], format!("after {n}"));
    }
    assert_eq!(daemon.status().await["primary_reads"], 1, "a restart is no loss");
    assert!(daemon.metrics().await[r#"prefetchd_reconnects_total{peer="postgres"}"#] >= 4.0);
    assert_eq!(daemon.stop().await, Some(0));
}

#[tokio::test]
async fn connections_that_postgres_ends_are_made_again() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let daemon = Daemon::start(&postgres, &redis).await;
    daemon.ready().await;
    let reconnects = async || daemon.metrics().await[r#"prefetchd_reconnects_total{peer="postgres"}"#];
    for (kind, new_sessions) in [("walsender", 1.0), ("client backend", 0.0)] {
        let before = reconnects().await;
        let of = format!(
            "FROM pg_stat_activity WHERE datname = current_database() AND application_name LIKE 'prefetchd%'
                AND backend_type = '{kind}'"
        );
        let pids = format!("SELECT string_agg(pid::text, ',') {of}");
        let old = postgres.value(&pids).await.unwrap();
        postgres.execute(&format!("SELECT pg_terminate_backend(pid) {of}")).await;
        let others = format!("SELECT count(*) {of} AND pid NOT IN ({old})");
        eventually("there is another", async || postgres.value(&others).await, |n| n.as_deref() != Some("0")).await;
        let lsn = postgres.execute(&format!("UPDATE categories SET name = '{kind}' WHERE id = 'cat-001'")).await;
        daemon.applied(lsn).await;
        assert_eq!(redis.hash(FIRST).await["name"], kind);
        daemon.ready().await;
        // Only the stream's own connection matters to the session.
        assert_eq!(reconnects().await, before + new_sessions, "{kind}\n{}", daemon.log_text());
    }
    assert_eq!(daemon.status().await["primary_reads"], 1);
}

#[tokio::test]
async fn redis_may_restart_with_what_it_had_or_with_nothing() {
    for (args, loads) in [(&["--appendonly", "yes", "--appendfsync", "always"][..], 1), (&[][..], 2)] {
        let (postgres, mut redis) = (Postgres::shared(), Redis::with(args));
        let daemon = Daemon::start(&postgres, &redis).await;
        daemon.allow_warnings();
        daemon.ready().await;
        redis.stop();
        daemon.status_when("stalled", |status| status["state"] == "stalled").await;
        let lsn = postgres
            .execute("UPDATE categories SET name = 'Drinks' WHERE id = 'cat-001'; DELETE FROM categories WHERE id = 'cat-002'")
            .await;
        redis.start_again();
        daemon.ready().await;
        daemon.applied(lsn).await;
        assert_eq!(redis.keys("cache:*").await.len(), 4);
        assert_eq!(redis.hash(FIRST).await["name"], "Drinks");
        assert_eq!(daemon.status().await["primary_reads"], loads, "{args:?}");
        assert!(daemon.metrics().await[r#"prefetchd_reconnects_total{peer="redis"}"#] >= 1.0);
        assert_eq!(daemon.stop().await, Some(0));
    }
}
