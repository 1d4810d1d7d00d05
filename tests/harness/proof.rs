//! That the harness does what its tests rely on: a test that cannot fail is a defect.

use super::{Daemon, PATIENCE, Postgres, Redis, Settings, Stop, psql};
use nix::sys::signal::Signal;
use std::time::Instant;

const FIRST: &str = "cache:category:cat-001";

#[tokio::test]
async fn a_daemon_on_a_database_of_its_own_follows_and_stops() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let daemon = Daemon::start(&postgres, &redis).await;
    daemon.ready().await;
    assert_eq!(redis.keys("cache:*").await.len(), 5);
    let lsn = postgres.execute("UPDATE categories SET name = 'Drinks' WHERE id = 'cat-001'").await;
    daemon.applied(lsn).await;
    assert_eq!(redis.hash(FIRST).await["name"], "Drinks");
    let status = daemon.status().await;
    assert_eq!(status["prefetched"], 5);
    assert_eq!(status["source"]["database"], postgres.database());
    let metrics = daemon.metrics().await;
    assert_eq!(metrics[r#"prefetchd_changes_applied_total{op="upsert",table="categories"}"#], 1.0);
    assert!(daemon.peak_memory_bytes() > 1 << 20);
    assert_eq!(daemon.said("streaming from"), 1, "{}", daemon.log_text());
    assert_eq!(daemon.stop().await, Some(0));
}

#[tokio::test]
async fn databases_side_by_side_do_not_see_each_other() {
    let (one, two) = (Postgres::shared(), Postgres::shared());
    psql(&one.url("postgres"), "DELETE FROM categories WHERE id = 'cat-005'");
    assert_eq!(one.value("SELECT count(*) FROM categories").await.unwrap(), "4");
    assert_eq!(two.value("SELECT count(*) FROM categories").await.unwrap(), "5");
}

#[tokio::test]
async fn servers_stop_and_come_back_where_they_were() {
    let (mut postgres, mut redis) = (Postgres::own(&[]), Redis::with(&["--appendonly", "yes"]));
    postgres.execute("DELETE FROM categories WHERE id = 'cat-005'").await;
    for how in [Stop::Smart, Stop::Fast, Stop::Immediate] {
        postgres.restart(how);
    }
    postgres.kill();
    postgres.start_again();
    assert_eq!(postgres.value("SELECT count(*) FROM categories").await.unwrap(), "4");

    redis.command::<()>(&["SET", "a", "b"]).await;
    redis.stop();
    redis.start_again();
    redis.kill();
    redis.start_again();
    assert_eq!(redis.command::<String>(&["GET", "a"]).await, "b");
    redis.flush().await;
    assert_eq!(redis.keys("*").await, [""; 0]);
}

#[tokio::test]
async fn what_is_frozen_when_a_test_ends_ends_too() {
    let began = Instant::now();
    let (mut postgres, redis) = (Postgres::own(&[]), Redis::start());
    postgres.signal(Signal::SIGSTOP);
    redis.signal(Signal::SIGSTOP);
    drop((postgres, redis));
    assert!(began.elapsed() < PATIENCE);
}

/// A daemon that has said WARN, since its Redis is gone.
async fn troubled() -> (Postgres, Daemon) {
    let (postgres, mut redis) = (Postgres::shared(), Redis::start());
    let daemon = Daemon::start(&postgres, &redis).await;
    daemon.ready().await;
    redis.kill();
    daemon.logged("WARN").await;
    (postgres, daemon)
}

#[tokio::test]
#[should_panic(expected = "unexpected in the log")]
async fn an_unexpected_warning_fails_the_test() {
    let (_postgres, _daemon) = troubled().await;
}

#[tokio::test]
async fn a_warning_that_is_allowed_does_not() {
    let (_postgres, daemon) = troubled().await;
    daemon.allow_warnings();
    daemon.kill9();
}

#[tokio::test]
async fn a_refusal_comes_with_its_exit_code() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let (code, said) = Daemon::refused(&Settings::new(&postgres, &redis).text("cache.tttl", "1h"));
    assert_eq!(code, Some(78), "{said}");
    assert!(said.contains("cache.tttl"), "{said}");
}
