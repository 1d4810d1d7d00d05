//! How much one client may send to Redis and keep there: larger transactions, loads and renewals are split, and none
//! stalls.

use crate::harness::{Daemon, Feature, Postgres, Redis, Settings, eventually, run_program};
use serde_json::json;

const TABLE: &str = "CREATE TABLE t (id text PRIMARY KEY, n int, v text);
    GRANT SELECT ON t TO prefetchd; ALTER PUBLICATION prefetchd ADD TABLE t";
const TABLES: &str = "[[tables]]\nname = 't'\ntable = 'public.t'\nkey = 't:{id}'";
/// 2,500 rows of 2 kB.
const ROWS: &str = "INSERT INTO t SELECT i, i, repeat(md5(i::text), 62) FROM generate_series(1, 2500) i";
/// The lowest value that Redis accepts. Since 7.2, what is queued between MULTI and EXEC counts, too.
const SMALL_BUFFER: &[&str] = &["CONFIG", "SET", "client-query-buffer-limit", "1mb"];

async fn set(redis: &Redis, name: &str, value: &str) {
    redis.command::<()>(&["CONFIG", "SET", name, value]).await;
}

async fn small_buffer(redis: &Redis) {
    redis.command::<()>(SMALL_BUFFER).await;
}

async fn count(redis: &Redis) -> usize {
    redis.keys("t:*").await.len()
}

/// Returns a number from INFO.
async fn info(redis: &Redis, name: &str) -> u64 {
    let text = redis.command::<String>(&["INFO"]).await;
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')?.trim().parse().ok()).unwrap()
}

/// Asserts that every row equals Postgres's.
async fn is_exact(daemon: &Daemon, postgres: &Postgres) {
    daemon.applied(postgres.position().await).await;
    let found = daemon.operate("verify", &json!({"repair": false})).await.json();
    let drift = ["missing", "stale", "orphaned"].map(|kind| found[kind].as_u64());
    assert_eq!(drift, [Some(0); 3], "{found}");
}

#[tokio::test]
async fn a_transaction_over_the_query_buffer_goes_in_parts() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    small_buffer(&redis).await;
    postgres.execute(TABLE).await;
    let daemon = Daemon::with(&Settings::new(&postgres, &redis).tables(TABLES)).await;
    daemon.ready().await;
    postgres.execute(ROWS).await;
    is_exact(&daemon, &postgres).await;
    assert_eq!(count(&redis).await, 2500);
    for sql in [
        "UPDATE t SET v = upper(v)",
        // The large value stays the same, also under another key.
        "UPDATE t SET n = n + 1",
        "UPDATE t SET id = 'moved-' || id",
        "BEGIN; UPDATE t SET v = lower(v) WHERE n < 2000; DELETE FROM t WHERE n > 2200; \
         INSERT INTO t SELECT 'new' || i, i, repeat('x', 700) FROM generate_series(1, 900) i; COMMIT",
        "TRUNCATE t",
    ] {
        postgres.execute(sql).await;
        is_exact(&daemon, &postgres).await;
    }
    assert_eq!(count(&redis).await, 0);
    assert_eq!(daemon.metrics().await[r#"prefetchd_reconnects_total{peer="redis"}"#], 0.0);
}

#[tokio::test]
async fn many_transactions_at_once_are_not_put_into_one_batch_over_the_limit() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    small_buffer(&redis).await;
    // Field names make commands much larger than what Postgres sends.
    let names: Vec<String> = (0..40).map(|n| format!("a_column_with_a_rather_long_name_{n:02}")).collect();
    let columns: String = names.iter().map(|name| format!(", {name} int DEFAULT 1")).collect();
    let sql = format!(
        "CREATE TABLE t (id int PRIMARY KEY{columns}); GRANT SELECT ON t TO prefetchd; \
         ALTER PUBLICATION prefetchd ADD TABLE t"
    );
    postgres.execute(&sql).await;
    // Otherwise such a row is one small command.
    redis.command::<()>(&["ACL", "SETUSER", "prefetchd", "-restore"]).await;
    let daemon = Daemon::with(&Settings::new(&postgres, &redis).tables(TABLES)).await;
    daemon.ready().await;
    daemon.operate("pause", &json!({})).await;
    for n in 0..12 {
        postgres.execute(&format!("INSERT INTO t (id) SELECT {n} * 1000 + i FROM generate_series(1, 250) i")).await;
    }
    daemon.operate("resume", &json!({})).await;
    is_exact(&daemon, &postgres).await;
    assert_eq!(count(&redis).await, 3000);
    assert_eq!(daemon.metrics().await[r#"prefetchd_reconnects_total{peer="redis"}"#], 0.0);
}

#[tokio::test]
async fn a_transaction_over_what_all_clients_may_use_goes_in_parts() {
    if Redis::lacks(Feature::MaxmemoryClients).await {
        return;
    }
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    set(&redis, "maxmemory", "256mb").await;
    set(&redis, "maxmemory-clients", "5%").await;
    postgres.execute(TABLE).await;
    let daemon = Daemon::with(&Settings::new(&postgres, &redis).tables(TABLES)).await;
    daemon.ready().await;
    postgres.execute("INSERT INTO t SELECT i, i, repeat(md5(i::text), 62) FROM generate_series(1, 9000) i").await;
    is_exact(&daemon, &postgres).await;
    assert_eq!((count(&redis).await, info(&redis, "evicted_clients").await), (9000, 0));
    // A row larger than the usual parts is sent alone.
    postgres.execute("UPDATE t SET v = repeat(md5(random()::text), 100000) WHERE id = '1'").await;
    is_exact(&daemon, &postgres).await;
    assert_eq!(redis.hash("t:1").await["v"].len(), 3_200_000);
    daemon.operate("refetch", &json!({"table": "t"})).await;
    is_exact(&daemon, &postgres).await;
    assert_eq!(info(&redis, "evicted_clients").await, 0);
}

#[tokio::test]
async fn a_limit_that_is_lowered_while_the_daemon_runs_is_read_again() {
    if Redis::lacks(Feature::MaxmemoryClients).await {
        return;
    }
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    postgres.execute(TABLE).await;
    let daemon = Daemon::with(&Settings::new(&postgres, &redis).tables(TABLES)).await;
    daemon.allow_warning("stalled");
    daemon.ready().await;
    set(&redis, "maxmemory-clients", "4mb").await;
    postgres.execute(ROWS).await;
    is_exact(&daemon, &postgres).await;
    assert_eq!(count(&redis).await, 2500);
    assert_eq!(info(&redis, "evicted_clients").await, 1);
}

#[tokio::test]
async fn a_limit_that_redis_does_not_tell_is_learned() {
    if Redis::lacks(Feature::MaxmemoryClients).await {
        return;
    }
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    set(&redis, "maxmemory-clients", "2mb").await;
    redis.command::<()>(&["ACL", "SETUSER", "prefetchd", "-config"]).await;
    postgres.execute(TABLE).await;
    let daemon = Daemon::with(&Settings::new(&postgres, &redis).tables(TABLES)).await;
    daemon.allow_warning("stalled");
    daemon.allow_warning("batches are smaller");
    daemon.ready().await;
    daemon.logged("CONFIG GET is denied").await;
    postgres.execute(ROWS).await;
    is_exact(&daemon, &postgres).await;
    assert_eq!(count(&redis).await, 2500);
    let line = daemon.logged("batches are smaller").await;
    assert!(line["message"].as_str().unwrap().contains("become visible in parts"), "{line}");
}

#[tokio::test]
async fn a_transaction_that_redis_has_no_memory_to_queue_goes_in_parts() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    postgres.execute(TABLE).await;
    let daemon = Daemon::with(&Settings::new(&postgres, &redis).tables(TABLES)).await;
    daemon.allow_warning("stalled");
    daemon.allow_warning("batches are smaller");
    daemon.ready().await;
    postgres.execute("INSERT INTO t SELECT i, i, repeat(md5(i::text), 62) FROM generate_series(1, 9000) i").await;
    is_exact(&daemon, &postgres).await;
    // Enough for what is there, but not for as much again.
    let limit = info(&redis, "used_memory").await + (8 << 20);
    set(&redis, "maxmemory", &limit.to_string()).await;
    postgres.execute("UPDATE t SET v = upper(v)").await;
    is_exact(&daemon, &postgres).await;
    assert_eq!(count(&redis).await, 9000);
}

#[tokio::test]
async fn a_redis_that_is_full_teaches_no_smaller_batches() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    postgres.execute(TABLE).await;
    postgres.execute(ROWS).await;
    let daemon = Daemon::with(&Settings::new(&postgres, &redis).tables(TABLES)).await;
    daemon.allow_warnings();
    daemon.ready().await;
    set(&redis, "maxmemory", "1mb").await;
    postgres.execute("UPDATE t SET v = upper(v)").await;
    daemon.logged("OOM").await;
    tokio::time::sleep(std::time::Duration::from_secs(2)).await;
    set(&redis, "maxmemory", "0").await;
    is_exact(&daemon, &postgres).await;
    assert_eq!(daemon.said("batches are smaller"), 0, "{}", daemon.log_text());
}

#[tokio::test]
async fn rows_up_to_the_limit_are_rows_and_those_over_it_are_dead_letters() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    small_buffer(&redis).await;
    postgres.execute(TABLE).await;
    postgres
        .execute(
            "INSERT INTO t SELECT i, i, repeat('x', 100000 * i) FROM generate_series(1, 12) i; \
             INSERT INTO t SELECT 'small' || i, i, '' FROM generate_series(1, 500) i",
        )
        .await;
    let daemon = Daemon::with(&Settings::new(&postgres, &redis).tables(TABLES)).await;
    daemon.allow_warning("of t cannot be in redis");
    daemon.ready().await;
    let there = async || {
        let mut large = redis.keys("t:*").await;
        large.retain(|key| !key.contains("small"));
        large
    };
    let fit: Vec<String> = (1..=9).map(|n| format!("t:{n}")).collect();
    assert_eq!(there().await, fit);
    // By the stream, in one transaction with much else in it.
    postgres.execute("UPDATE t SET n = n + 1, v = replace(v, 'x', 'y')").await;
    daemon.applied(postgres.position().await).await;
    assert_eq!(there().await, fit);
    assert_eq!(redis.hash("t:9").await["n"], "10");
    assert_eq!(daemon.metrics().await[r#"prefetchd_reconnects_total{peer="redis"}"#], 0.0);
}

#[tokio::test]
async fn keys_alone_over_the_limit_are_loaded_renewed_and_removed_in_parts() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    small_buffer(&redis).await;
    postgres.execute(TABLE).await;
    postgres.execute("INSERT INTO t SELECT repeat('k', 900) || i, i, '' FROM generate_series(1, 3000) i").await;
    let tables = format!("{TABLES}\nttl = '30s'");
    let daemon = Daemon::with(&Settings::new(&postgres, &redis).tables(&tables)).await;
    daemon.ready().await;
    assert_eq!(count(&redis).await, 3000);
    let renewed = async || daemon.metrics().await["prefetchd_ttl_renewals_total"];
    eventually("every key is renewed twice", renewed, |count| *count >= 6000.0).await;
    assert_eq!(count(&redis).await, 3000);
    // What Postgres does not have is removed: by a load, and then by an operator.
    let cleared = daemon.operate("clear", &json!({"table": "t", "confirm": "t"})).await.json();
    assert_eq!(cleared["deleted"], 3000, "{cleared}");
    assert_eq!(daemon.operate("refetch", &json!({"table": "t"})).await.status, 200);
    for page in 0..3 {
        let keys = (1..=1000).map(|i| format!("t:stray{}{}", "k".repeat(900), page * 1000 + i));
        let words: Vec<String> = keys.flat_map(|key| [key, "x".to_owned()]).collect();
        let words: Vec<&str> = std::iter::once("MSET").chain(words.iter().map(String::as_str)).collect();
        redis.command::<()>(&words).await;
    }
    assert_eq!(daemon.operate("refetch", &json!({"table": "t"})).await.status, 200);
    assert_eq!(count(&redis).await, 3000);
    postgres.execute("TRUNCATE t").await;
    is_exact(&daemon, &postgres).await;
    assert_eq!(count(&redis).await, 0);
    assert_eq!(daemon.metrics().await[r#"prefetchd_reconnects_total{peer="redis"}"#], 0.0);
}

#[tokio::test]
async fn check_says_from_which_size_transactions_are_not_whole_and_its_remedy_works() {
    if Redis::lacks(Feature::MaxmemoryClients).await {
        return;
    }
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let settings = Settings::new(&postgres, &redis);
    let warned = async || {
        let ran = run_program(&settings, &["check"]).await;
        assert_eq!(ran.code, Some(0), "{ran:?}");
        let about = |line: &&str| line.starts_with("warn") && line.contains("become visible in parts");
        ran.stdout.lines().filter(about).map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(warned().await, [""; 0]);
    small_buffer(&redis).await;
    set(&redis, "maxmemory", "256mb").await;
    set(&redis, "maxmemory-clients", "5%").await;
    let lines = warned().await;
    assert_eq!(lines.len(), 2, "{lines:?}");
    for (line, setting) in lines.iter().zip(["client-query-buffer-limit", "maxmemory-clients"]) {
        assert!(line.contains(setting) && line.contains("cache.max_atomic_bytes"), "{line}");
        let remedy = line.split("CONFIG SET ").nth(1).unwrap();
        let words: Vec<&str> = remedy.split([',', ' ']).take(2).collect();
        redis.command::<()>(&[&["CONFIG", "SET"], &words[..]].concat()).await;
    }
    assert_eq!(warned().await, [""; 0]);
}
