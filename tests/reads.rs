//! Reads over HTTP: from Redis only, and never a wrong "no such row".

use crate::harness::{Answer, Daemon, PATIENCE, Postgres, Redis, Settings, Stop, eventually};
use nix::sys::signal::Signal;
use prefetchd::lsn::Lsn;
use serde_json::{Value, json};
use std::time::Instant;
use tokio_postgres::Client;

const SEGMENT_BYTES: u64 = 16 << 20;
const FIRST: &str = "/v1/tables/categories/cat-001";
const NOBODY: &str = "/v1/tables/categories/nobody";

fn refused(status: u16, code: &str) -> (u16, String) {
    (status, code.to_owned())
}

/// Reads an existing row until it is served. Meanwhile no response may call it nonexistent.
async fn is_served_again(daemon: &Daemon, target: &str) -> Answer {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let answer = daemon.get(target).await;
        match answer.status {
            200 => return answer,
            503 => {}
            _ => panic!("{answer:?}\n{}", daemon.log_text()),
        }
        assert!(Instant::now() < deadline, "{answer:?}\n{}", daemon.log_text());
    }
}

async fn number(client: &Client, sql: &str) -> i64 {
    client.query_one(sql, &[]).await.unwrap().get(0)
}

#[tokio::test]
async fn no_read_touches_postgres() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let daemon = Daemon::start(&postgres, &redis).await;
    daemon.ready().await;
    let client = postgres.client().await;
    let sessions = "SELECT sessions FROM pg_stat_database WHERE datname = current_database()";
    let ours = "SELECT string_agg(pid || ' ' || backend_type, ', ' ORDER BY pid) FROM pg_stat_activity
                 WHERE datname = current_database() AND application_name LIKE 'prefetchd%'";
    let backends = async || client.query_one(ours, &[]).await.unwrap().get::<_, Option<String>>(0);
    // A loader's connection may still be closing.
    let (before, opened) = (backends().await, number(&client, sessions).await);
    for n in 0..100 {
        for target in [FIRST, NOBODY, "/v1/tables/categories?key=cat-002&key=nobody", "/v1/status", "/readyz"] {
            let answer = daemon.get(target).await;
            assert_eq!(answer.status, if target == NOBODY { 404 } else { 200 }, "{n}: {answer:?}");
        }
    }
    let lsn = postgres.position().await;
    let answer = daemon.get(&format!("{FIRST}?min_lsn={lsn}&wait=30s")).await;
    assert_eq!(answer.status, 200, "{answer:?}");
    assert_eq!(backends().await, before);
    let status = daemon.status().await;
    assert_eq!(status["primary_reads"], 1);
    assert_eq!((&status["hits"], &status["misses"]), (&json!(201), &json!(200)));
    assert_eq!(status["hit_rate_pct"].as_f64().unwrap().round(), 50.0);
    // The connection that asked for the position is ours.
    assert!(number(&client, sessions).await <= opened + 1);
}

#[tokio::test]
async fn reads_go_on_without_postgres() {
    let (mut postgres, redis) = (Postgres::own(&[]), Redis::start());
    let daemon = Daemon::with(&Settings::new(&postgres, &redis).text("cache.max_staleness", "2s")).await;
    daemon.allow_warnings();
    daemon.ready().await;
    assert_eq!(daemon.get(&format!("{FIRST}?max_age=30s")).await.status, 200);
    assert_eq!(daemon.get(NOBODY).await.refusal(), refused(404, "not_found"));
    let loaded = daemon.get(FIRST).await.json();
    postgres.stop(Stop::Fast);

    // As long as contact is recent enough, a missing row is known not to exist.
    let stale = eventually("stale", async || daemon.get(NOBODY).await, |answer| answer.status != 404).await;
    assert_eq!(stale.refusal(), refused(503, "stale"));
    // A server that shuts down keeps the stream for a while after it has stopped answering others.
    let age = |answer: &Answer| answer.header("Age").unwrap().parse::<u64>().unwrap();
    let answer = eventually("the contact is old", async || daemon.get(FIRST).await, |answer| age(answer) >= 2).await;
    assert_eq!((answer.status, answer.json()), (200, loaded));
    assert!(answer.header("Prefetchd-LSN").is_some());
    assert_eq!(daemon.get(&format!("{FIRST}?max_age=1s")).await.refusal(), refused(503, "stale"));
    assert_eq!(daemon.get(&format!("{FIRST}?max_age=1h")).await.status, 200);
    let batch = daemon.get("/v1/tables/categories?key=cat-001&key=cat-002").await;
    assert_eq!((batch.status, &batch.json()["rows"]["cat-002"]["name"]), (200, &json!("Bakery")));
    assert_eq!(daemon.get("/v1/tables/categories?key=cat-001&key=nobody").await.refusal(), refused(503, "stale"));
    let answer = daemon.get(&format!("{FIRST}?min_lsn=FFFFFFFF/0&wait=100ms")).await;
    assert_eq!(answer.refusal(), refused(504, "lagging"));

    let answer = eventually(
        "out of touch",
        async || daemon.get("/readyz").await,
        |answer| answer.body.contains("no contact with Postgres"),
    )
    .await;
    assert_eq!((answer.status, &answer.json()["ready"]), (503, &json!(false)));
    assert!(answer.json()["reasons"].to_string().contains("the stream does not run"), "{answer:?}");
    assert_eq!(daemon.get("/healthz").await.status, 200);
    let status = daemon.status().await;
    assert!(status["lag"]["seconds"].as_f64().unwrap() > 2.0, "{status}");
    assert!(status["waiting_for"].is_string(), "{status}");

    postgres.start_again();
    daemon.ready().await;
    assert_eq!(daemon.get(NOBODY).await.refusal(), refused(404, "not_found"));
    assert_eq!(daemon.status().await["primary_reads"], 1);
}

#[tokio::test]
async fn a_read_can_wait_for_what_the_reader_has_written() {
    let (postgres, redis) = (Postgres::own(&[]), Redis::start());
    let daemon = Daemon::start(&postgres, &redis).await;
    daemon.ready().await;
    let client = postgres.client().await;
    let position =
        async || -> String { client.query_one("SELECT pg_current_wal_insert_lsn()::text", &[]).await.unwrap().get(0) };
    for n in 0..20 {
        let sql = format!("UPDATE categories SET name = 'n{n}' WHERE id = 'cat-001'");
        client.batch_execute(&sql).await.unwrap();
        let lsn = position().await;
        let answer = daemon.get(&format!("{FIRST}?min_lsn={lsn}&wait=30s")).await;
        assert_eq!((answer.status, &answer.json()["name"]), (200, &json!(format!("n{n}"))), "{answer:?}");
        let read = answer.header("Prefetchd-LSN").unwrap().parse::<Lsn>().unwrap();
        assert!(read >= lsn.parse().unwrap(), "{read} {lsn}");
    }
    // Nothing that is published changes any more, and positions fall before and after page and segment headers.
    for sql in [
        "SELECT 1",
        "CREATE TABLE noise (n int)",
        "SELECT pg_switch_wal()",
        "SELECT pg_switch_wal()",
        "INSERT INTO noise SELECT generate_series(1, 2000); SELECT pg_switch_wal()",
        "CHECKPOINT",
        "SELECT pg_logical_emit_message(false, 'noise', repeat('x', 8000))",
        "BEGIN; INSERT INTO noise VALUES (1); ROLLBACK",
    ] {
        client.batch_execute(sql).await.unwrap();
        let lsn = position().await;
        for target in [FIRST, "/v1/tables/categories?key=cat-001"] {
            let mark = if target.contains('?') { '&' } else { '?' };
            let answer = daemon.get(&format!("{target}{mark}min_lsn={lsn}&wait=30s")).await;
            assert_eq!(answer.status, 200, "{sql}: {answer:?}");
        }
        let missing = daemon.get(&format!("{NOBODY}?min_lsn={lsn}")).await;
        assert_eq!(missing.refusal(), refused(404, "not_found"), "{sql}");
        assert!(missing.header("Prefetchd-LSN").is_some());
    }
    // In a new segment the position is after a header that is not a change. It counts as reached at the boundary, and
    // not only when something else is written. (The server itself writes occasionally, hence several attempts.)
    let mut at_the_boundary = 0;
    for _ in 0..5 {
        client
            .batch_execute("SELECT pg_logical_emit_message(false, 'noise', 'x'); SELECT pg_switch_wal()")
            .await
            .unwrap();
        let lsn: Lsn = position().await.parse().unwrap();
        let answer = daemon.get(&format!("{FIRST}?min_lsn={lsn}&wait=30s")).await;
        assert_eq!(answer.status, 200, "{answer:?}");
        assert!(answer.header("Prefetchd-LSN").unwrap().parse::<Lsn>().unwrap() >= lsn, "{lsn} {answer:?}");
        at_the_boundary += usize::from(lsn.before_page_header(SEGMENT_BYTES) < lsn);
    }
    assert!(at_the_boundary > 0);
    let asked = Instant::now();
    let answer = daemon.get(&format!("{FIRST}?min_lsn=FFFFFFFF/FFFFFFFF&wait=300ms")).await;
    assert_eq!(answer.refusal(), refused(504, "lagging"));
    assert!(asked.elapsed().as_millis() >= 300);
}

const ITEMS: &str = "
    CREATE TABLE items (id int PRIMARY KEY, v text); INSERT INTO items SELECT n, 'v' FROM generate_series(1, 20000) n;
    GRANT SELECT ON items TO prefetchd; ALTER PUBLICATION prefetchd ADD TABLE items";
const WITH_ITEMS: &str = "
    [[tables]]\nname = 'categories'\ntable = 'public.categories'\nkey = 'cache:category:{id}'
    [[tables]]\nname = 'items'\ntable = 'public.items'\nkey = 'item:{id}'";

/// Redis answers reads, and delays writes.
async fn pause_writes(redis: &Redis) {
    redis.command::<()>(&["CLIENT", "PAUSE", "60000", "WRITE"]).await;
}

async fn go_on(redis: &Redis) {
    redis.command::<()>(&["CLIENT", "UNPAUSE"]).await;
}

#[tokio::test]
async fn a_new_table_is_loading_until_it_is_whole_and_the_others_are_served() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let settings = || Settings::new(&postgres, &redis);
    let daemon = Daemon::with(&settings()).await;
    daemon.ready().await;
    assert_eq!(daemon.stop().await, Some(0));
    postgres.execute(ITEMS).await;
    let daemon = Daemon::with(&settings().tables(WITH_ITEMS)).await;
    daemon.allow_warning("stalled");
    daemon.status_when("loading", |status| status["state"] == "loading").await;
    pause_writes(&redis).await;
    for target in ["/v1/tables/items/20000", "/v1/tables/items?key=20000", "/v1/tables/items/70000"] {
        assert_eq!(daemon.get(target).await.refusal(), refused(503, "loading"), "{target}");
    }
    assert_eq!(daemon.get(FIRST).await.status, 200);
    let answer = daemon.get("/readyz").await;
    assert_eq!(answer.status, 503);
    assert!(answer.body.contains("table items is loading"), "{answer:?}");
    assert!(!answer.body.contains("table categories"), "{answer:?}");
    go_on(&redis).await;
    // The stream is applied during the load.
    let lsn = postgres.execute("UPDATE categories SET name = 'Drinks' WHERE id = 'cat-001'").await;
    let answer = daemon.get(&format!("{FIRST}?min_lsn={lsn}&wait=30s")).await;
    assert_eq!(answer.json()["name"], "Drinks");
    is_served_again(&daemon, "/v1/tables/items/20000").await;
    daemon.ready().await;
    assert_eq!(daemon.get("/v1/tables/items/70000").await.refusal(), refused(404, "not_found"));
    let status = daemon.status().await;
    assert_eq!((&status["primary_reads"], &status["last_load"]["rows"]), (&json!(1), &json!(20000)), "{status}");
    assert_eq!(redis.command::<i64>(&["DBSIZE"]).await, 20007);
}

#[tokio::test]
async fn what_a_flushed_redis_lost_is_healed_and_never_called_missing() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    postgres.execute(ITEMS).await;
    let daemon = Daemon::with(&Settings::new(&postgres, &redis).tables(WITH_ITEMS)).await;
    daemon.allow_warnings();
    daemon.ready().await;
    redis.flush().await;
    pause_writes(&redis).await;
    let targets = [FIRST, NOBODY, "/v1/tables/categories?key=cat-001", "/v1/tables/items/20000"];
    for target in targets {
        assert_eq!(daemon.get(target).await.refusal(), refused(503, "healing"), "{target}");
    }
    go_on(&redis).await;
    let healing = |status: &Value| status["tables"].as_array().unwrap().iter().any(|t| t["state"] == "healing");
    let status = daemon.status_when("healing", |status| status["state"] == "healing" && healing(status)).await;
    pause_writes(&redis).await;
    assert!(status["tables"].as_array().unwrap().iter().any(|t| t["loaded"] == false), "{status}");
    // Existing rows may be from before, so not even those are served.
    for target in ["/v1/tables/items/1", "/v1/tables/items/20000", "/v1/tables/items/70000"] {
        assert_eq!(daemon.get(target).await.refusal(), refused(503, "healing"), "{target}");
    }
    assert_eq!(daemon.get("/readyz").await.status, 503);
    go_on(&redis).await;
    is_served_again(&daemon, "/v1/tables/items/20000").await;
    is_served_again(&daemon, FIRST).await;
    daemon.ready().await;
    assert_eq!(daemon.get(NOBODY).await.refusal(), refused(404, "not_found"));
    assert_eq!(redis.command::<i64>(&["DBSIZE"]).await, 20007);
    assert_eq!(daemon.status().await["primary_reads"], 4);

    // As fast as it can.
    for _ in 0..3 {
        redis.flush().await;
        is_served_again(&daemon, "/v1/tables/categories/cat-005").await;
        daemon.ready().await;
    }
}

#[tokio::test]
async fn a_redis_that_is_away_is_not_a_missing_row() {
    let (postgres, mut redis) = (Postgres::shared(), Redis::start());
    let daemon = Daemon::start(&postgres, &redis).await;
    daemon.allow_warnings();
    daemon.ready().await;
    redis.kill();
    for target in [FIRST, NOBODY, "/v1/tables/categories?key=cat-001"] {
        assert_eq!(daemon.get(target).await.refusal(), refused(503, "redis_unavailable"), "{target}");
    }
    daemon.status_when("stalled", |status| status["state"] == "stalled").await;
    assert_eq!(daemon.get("/readyz").await.status, 503);
    let errors = daemon.metrics().await[r#"prefetchd_reads_total{result="error",table="categories"}"#];
    assert_eq!(errors, 3.0);
    redis.start_again();
    is_served_again(&daemon, FIRST).await;
    daemon.ready().await;
    assert_eq!(daemon.get(NOBODY).await.refusal(), refused(404, "not_found"));
}

#[tokio::test]
async fn a_frozen_redis_is_answered_for_in_time() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let daemon = Daemon::start(&postgres, &redis).await;
    daemon.allow_warnings();
    daemon.ready().await;
    redis.signal(Signal::SIGSTOP);
    assert_eq!(daemon.get(FIRST).await.refusal(), refused(503, "redis_unavailable"));
    redis.signal(Signal::SIGCONT);
    is_served_again(&daemon, FIRST).await;
    daemon.ready().await;
}

#[tokio::test]
async fn a_table_taken_out_of_the_configuration_takes_its_keys_along() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    postgres
        .execute(
            "CREATE TABLE items (id int PRIMARY KEY); INSERT INTO items SELECT generate_series(1, 2500);
             GRANT SELECT ON items TO prefetchd; ALTER PUBLICATION prefetchd ADD TABLE items",
        )
        .await;
    let table = |key: &str| format!("[[tables]]\nname = 'categories'\ntable = 'public.categories'\nkey = '{key}'\n");
    let items = "[[tables]]\nname = 'items'\ntable = 'public.items'\nkey = 'cache:item[s]:{id}'\n";
    let with = |tables: &str| Settings::new(&postgres, &redis).tables(tables);
    let daemon = Daemon::with(&with(&(table("cache:category:{id}") + items))).await;
    daemon.ready().await;
    assert_eq!(daemon.stop().await, Some(0));
    assert_eq!(redis.command::<i64>(&["DBSIZE"]).await, 2507);
    // These keys belong to neither of them.
    for key in ["cache:items:1", "cache:item", "cache:categories:cat-001"] {
        redis.command::<()>(&["SET", key, "not ours"]).await;
    }

    let daemon = Daemon::with(&with(&table("cache:category:{id}"))).await;
    daemon.logged("removed the keys").await;
    daemon.ready().await;
    eventually("the keys go", async || redis.command::<i64>(&["DBSIZE"]).await, |keys| *keys == 10).await;
    assert_eq!(daemon.status().await["primary_reads"], 0, "that is no reason to read the other");
    assert_eq!(daemon.get("/v1/tables/items/1").await.refusal(), refused(404, "unknown_table"));
    assert_eq!(daemon.stop().await, Some(0));

    // Another template: the old keys are removed, the new ones written, and meanwhile no row is called nonexistent.
    let daemon = Daemon::with(&with(&table("categories:by-id:{id}"))).await;
    is_served_again(&daemon, FIRST).await;
    daemon.ready().await;
    eventually("the old keys go", async || redis.keys("cache:category:*").await, Vec::is_empty).await;
    assert_eq!(redis.keys("categories:by-id:*").await.len(), 5);
    assert_eq!(redis.command::<i64>(&["DBSIZE"]).await, 10);
    assert_eq!(daemon.status().await["primary_reads"], 1);
    assert_eq!(daemon.stop().await, Some(0));

    // Other columns under the same template: no old field lingers.
    let narrow = table("categories:by-id:{id}") + "columns = ['id', 'name']\nrename = { name = 'title' }\n";
    let daemon = Daemon::with(&with(&narrow)).await;
    daemon.ready().await;
    assert_eq!(daemon.status().await["primary_reads"], 1);
    let expected: Value = json!({"id": "cat-001", "title": "Beverages"});
    assert_eq!(daemon.get(FIRST).await.json(), expected);
    assert_eq!(daemon.stop().await, Some(0));
}

#[tokio::test]
async fn what_lies_under_a_prefix_and_is_no_row_goes_with_the_load() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    redis.command::<()>(&["SET", "cache:category:cat-001", "a string where a row belongs"]).await;
    redis.command::<()>(&["HSET", "cache:category:cat-002", "stale", "field"]).await;
    redis.command::<()>(&["RPUSH", "cache:category:ghost", "x"]).await;
    redis.command::<()>(&["SET", "cache:categories", "not ours"]).await;
    redis.command::<()>(&["SET", "prefetchd:{other}:checkpoint", "another's"]).await;
    let daemon = Daemon::start(&postgres, &redis).await;
    daemon.ready().await;
    assert_eq!(redis.keys("cache:category:*").await.len(), 5);
    assert_eq!(redis.hash("cache:category:cat-001").await["name"], "Beverages");
    assert!(!redis.hash("cache:category:cat-002").await.contains_key("stale"));
    assert_eq!(redis.command::<String>(&["GET", "cache:categories"]).await, "not ours");
    assert_eq!(redis.command::<String>(&["GET", "prefetchd:{other}:checkpoint"]).await, "another's");
}

#[tokio::test]
async fn a_read_that_finds_its_connection_dead_is_tried_on_a_new_one() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let daemon = Daemon::start(&postgres, &redis).await;
    daemon.ready().await;
    for _ in 0..10 {
        assert_eq!(daemon.get(FIRST).await.status, 200);
        let clients: String = redis.command(&["CLIENT", "LIST"]).await;
        let readers =
            clients.lines().filter(|line| line.contains("user=prefetchd") && !line.contains("name=prefetchd"));
        let ids: Vec<&str> = readers.filter_map(|line| line.strip_prefix("id=")?.split(' ').next()).collect();
        assert!(!ids.is_empty(), "{clients}");
        for id in ids {
            redis.command::<i64>(&["CLIENT", "KILL", "ID", id]).await;
        }
        let answer = daemon.get(FIRST).await;
        assert_eq!(answer.status, 200, "{answer:?}");
    }
    assert_eq!(daemon.metrics().await[r#"prefetchd_reads_total{result="error",table="categories"}"#], 0.0);
}

/// A row that is too large to be read together with others is read alone, and so are those that wait with it.
#[tokio::test]
async fn a_large_row_comes_whole_and_keeps_no_other_from_its_reader() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let daemon = Daemon::start(&postgres, &redis).await;
    daemon.ready().await;
    let lsn = postgres.execute("UPDATE categories SET name = repeat('wide', 2000000) WHERE id = 'cat-001'").await;
    daemon.applied(lsn).await;
    let (large, small) = ("/v1/tables/categories/cat-001", "/v1/tables/categories/cat-002");
    for _ in 0..3 {
        let answers =
            futures_util::future::join_all((0..8).map(|n| daemon.get(if n % 4 == 0 { large } else { small }))).await;
        for (n, answer) in answers.iter().enumerate() {
            assert_eq!(answer.status, 200, "{n}: {:.300}", answer.body);
            let name = answer.json()["name"].as_str().unwrap().to_owned();
            assert!(if n % 4 == 0 { name.len() == 8_000_000 } else { name == "Bakery" }, "{n}: {name:.40}");
        }
    }
    let lsn = postgres.execute("UPDATE categories SET name = 'slim' WHERE id = 'cat-001'").await;
    let answer = daemon.get(&format!("{large}?min_lsn={lsn}&wait=30s")).await;
    assert_eq!((answer.status, &answer.json()["name"]), (200, &json!("slim")));
}
