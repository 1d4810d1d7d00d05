//! Changes from `psql` to Redis, through the real daemon and real servers.

use crate::harness::{Daemon, PATIENCE, Postgres, Redis, Running, Settings, eventually, psql};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::time::Instant;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

const FIRST: &str = "cache:category:cat-001";

/// A daemon that follows the table of `migrations/`.
async fn following() -> (Postgres, Redis, Daemon) {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let daemon = Daemon::start(&postgres, &redis).await;
    daemon.ready().await;
    (postgres, redis, daemon)
}

/// Sends statements as `psql` does, and waits until they are applied.
async fn apply(postgres: &Postgres, daemon: &Daemon, sql: &str) {
    psql(&postgres.url("postgres"), sql);
    daemon.applied(postgres.position().await).await;
}

/// As `redis-cli HGETALL` prints it: fields and values in stored order.
async fn hgetall(redis: &Redis, key: &str) -> Vec<String> {
    redis.command(&["HGETALL", key]).await
}

fn changes(metrics: &std::collections::BTreeMap<String, f64>, table: &str, op: &str) -> f64 {
    metrics[&format!("prefetchd_changes_applied_total{{op=\"{op}\",table=\"{table}\"}}")]
}

/// Returns the fields of a table's status.
fn table<'a>(status: &'a Value, name: &str) -> &'a Value {
    status["tables"].as_array().unwrap().iter().find(|table| table["name"] == name).unwrap()
}

#[tokio::test]
async fn what_psql_does_is_what_redis_cli_shows() {
    let (postgres, redis, daemon) = following().await;
    let loaded = ["id", "cat-001", "name", "Beverages", "display_order", "1", "featured", "true", "parent_id", ""];
    assert_eq!(hgetall(&redis, FIRST).await, loaded);
    let before = daemon.metrics().await["prefetchd_sync_lag_seconds_count"];

    apply(&postgres, &daemon, "INSERT INTO categories VALUES ('cat-006', 'Toys', NULL, NULL, 'cat-001')").await;
    let inserted = ["id", "cat-006", "name", "Toys", "display_order", "", "featured", "", "parent_id", "cat-001"];
    assert_eq!(hgetall(&redis, "cache:category:cat-006").await, inserted);

    apply(&postgres, &daemon, "UPDATE categories SET name = 'Drinks', featured = false WHERE id = 'cat-001'").await;
    let updated = ["id", "cat-001", "name", "Drinks", "display_order", "1", "featured", "false", "parent_id", ""];
    assert_eq!(hgetall(&redis, FIRST).await, updated);
    let answer = daemon.get("/v1/tables/categories/cat-001").await;
    assert_eq!(answer.status, 200);
    let row = json!({"id": "cat-001", "name": "Drinks", "display_order": "1", "featured": "false", "parent_id": ""});
    assert_eq!(answer.json(), row);

    apply(&postgres, &daemon, "DELETE FROM categories WHERE id = 'cat-006'").await;
    assert_eq!(redis.command::<i64>(&["EXISTS", "cache:category:cat-006"]).await, 0);
    assert_eq!(daemon.get("/v1/tables/categories/cat-006").await.refusal(), (404, "not_found".to_owned()));

    apply(&postgres, &daemon, "TRUNCATE categories").await;
    assert_eq!(redis.keys("cache:*").await, [""; 0]);
    assert_eq!(daemon.get("/v1/tables/categories/cat-001").await.refusal(), (404, "not_found".to_owned()));

    let metrics = daemon.metrics().await;
    assert_eq!(changes(&metrics, "categories", "upsert"), 2.0);
    assert_eq!(changes(&metrics, "categories", "delete"), 1.0);
    assert_eq!(changes(&metrics, "categories", "truncate"), 1.0);
    assert_eq!(metrics["prefetchd_transactions_applied_total"], 4.0);
    assert_eq!(metrics["prefetchd_sync_lag_seconds_count"] - before, 4.0);
    assert!(metrics["prefetchd_sync_lag_seconds_sum"] > 0.0);
    let status = daemon.status().await;
    assert_eq!(status["sync_events_applied"], 4);
    assert_eq!(status["sync_lag_ms"]["count"], 4, "a change that shows shows in the lags as well");
    assert!(status["sync_lag_ms"]["p99"].as_f64() >= status["sync_lag_ms"]["p50"].as_f64(), "{status}");
    let counted = table(&status, "categories");
    assert_eq!((&counted["upserts"], &counted["deletes"], &counted["truncates"]), (&json!(2), &json!(1), &json!(1)));
    assert_eq!((&counted["hits"], &counted["misses"]), (&json!(1), &json!(2)));
}

#[tokio::test]
async fn changes_are_told_as_events_and_by_tail() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let settings = Settings::new(&postgres, &redis);
    let daemon = Daemon::with(&settings).await;
    daemon.ready().await;

    let mut stream = TcpStream::connect(daemon.address()).await.unwrap();
    stream.write_all(b"GET /v1/events HTTP/1.1\r\nHost: localhost\r\n\r\n").await.unwrap();
    let mut events = BufReader::new(stream).lines();
    // From the first status on, both receive changes.
    while events.next_line().await.unwrap().unwrap() != "event: status" {}
    let url = format!("http://{}", daemon.address());
    let mut tail = Running::start(&settings, &["tail", "--json", "--url", &url]);
    let applied = |status: &Value| status["sync_events_applied"].as_u64().unwrap();
    // tail prints nothing before the first change, so a change is repeated until it appears.
    let mut line = Box::pin(tail.line());
    let first = loop {
        apply(&postgres, &daemon, "UPDATE categories SET display_order = 9 WHERE id = 'cat-005'").await;
        if let Ok(first) = tokio::time::timeout(std::time::Duration::from_millis(50), &mut line).await {
            break first;
        }
        assert!(applied(&daemon.status().await) < 1000, "tail shows nothing");
    };
    drop(line);
    assert_eq!(serde_json::from_str::<Value>(&first).unwrap()["key"], "cache:category:cat-005");

    apply(&postgres, &daemon, "INSERT INTO categories VALUES ('cat-006', 'Toys')").await;
    apply(&postgres, &daemon, "DELETE FROM categories WHERE id = 'cat-006'").await;
    apply(&postgres, &daemon, "TRUNCATE categories").await;
    let wanted = [("upsert", "cache:category:cat-006"), ("delete", "cache:category:cat-006"), ("truncate", "")];
    let mut told = Vec::new();
    while told.len() < wanted.len() {
        let line = events.next_line().await.unwrap().unwrap();
        let Some(change) = line.strip_prefix("data: ").and_then(|data| serde_json::from_str::<Value>(data).ok()) else {
            continue;
        };
        if change["op"].is_string() && change["key"] != "cache:category:cat-005" {
            told.push(change);
        }
    }
    let mut tailed = Vec::new();
    while tailed.len() < wanted.len() {
        let change: Value = serde_json::from_str(&tail.line().await).unwrap();
        if change["key"] != "cache:category:cat-005" {
            tailed.push(change);
        }
    }
    assert_eq!(told, tailed);
    for ((op, key), change) in wanted.iter().zip(&told) {
        assert_eq!(change["op"], *op, "{change}");
        assert_eq!(change["key"], *key, "{change}");
        assert_eq!(change["table"], "categories", "{change}");
        assert!(change["lag_ms"].as_f64().unwrap() >= 0.0, "{change}");
        let fields: BTreeSet<&str> = change.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(fields, ["key", "lag_ms", "op", "table", "time"].into(), "no values: {change}");
    }
}

#[tokio::test]
async fn keys_move_swap_and_are_made_anew_within_one_transaction() {
    let (postgres, redis, daemon) = following().await;
    apply(&postgres, &daemon, "UPDATE categories SET id = 'cat-200' WHERE id = 'cat-002'").await;
    assert_eq!(redis.command::<i64>(&["EXISTS", "cache:category:cat-002"]).await, 0);
    let moved = redis.hash("cache:category:cat-200").await;
    assert_eq!((moved["id"].as_str(), moved["name"].as_str()), ("cat-200", "Bakery"));

    apply(
        &postgres,
        &daemon,
        "BEGIN;
         UPDATE categories SET id = 'spare' WHERE id = 'cat-003';
         UPDATE categories SET id = 'cat-003' WHERE id = 'cat-004';
         UPDATE categories SET id = 'cat-004' WHERE id = 'spare';
         COMMIT",
    )
    .await;
    for (id, name) in [("cat-003", "Household"), ("cat-004", "Produce")] {
        let row = redis.hash(&format!("cache:category:{id}")).await;
        assert_eq!((row["id"].as_str(), row["name"].as_str()), (id, name));
    }
    assert_eq!(redis.command::<i64>(&["EXISTS", "cache:category:spare"]).await, 0);

    apply(
        &postgres,
        &daemon,
        "BEGIN;
         DELETE FROM categories WHERE id = 'cat-003';
         INSERT INTO categories VALUES ('cat-003', 'Again');
         DELETE FROM categories WHERE id = 'cat-004';
         UPDATE categories SET id = 'cat-004' WHERE id = 'cat-200';
         INSERT INTO categories VALUES ('cat-007', 'Never seen');
         UPDATE categories SET name = 'Never seen either' WHERE id = 'cat-007';
         DELETE FROM categories WHERE id = 'cat-007';
         SAVEPOINT s;
         INSERT INTO categories VALUES ('cat-008', 'Rolled back');
         UPDATE categories SET name = 'Rolled back' WHERE id = 'cat-001';
         DELETE FROM categories WHERE id = 'cat-005';
         ROLLBACK TO s;
         UPDATE categories SET display_order = 10 WHERE id = 'cat-001';
         COMMIT",
    )
    .await;
    let again = ["id", "cat-003", "name", "Again", "display_order", "", "featured", "", "parent_id", ""];
    assert_eq!(hgetall(&redis, "cache:category:cat-003").await, again);
    assert_eq!(redis.hash("cache:category:cat-004").await["name"], "Bakery");
    let first = redis.hash(FIRST).await;
    assert_eq!((first["name"].as_str(), first["display_order"].as_str()), ("Beverages", "10"));
    let keys = ["cat-001", "cat-003", "cat-004", "cat-005"].map(|id| format!("cache:category:{id}"));
    assert_eq!(redis.keys("cache:*").await, keys);
}

#[tokio::test]
async fn a_transaction_over_two_tables_appears_at_once() {
    const TRANSACTIONS: i32 = 40;
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    postgres
        .execute(
            "CREATE TABLE a (id int PRIMARY KEY, n int, v text DEFAULT repeat('x', 500)); CREATE TABLE b (LIKE a INCLUDING ALL);
             GRANT SELECT ON a, b TO prefetchd; ALTER PUBLICATION prefetchd ADD TABLE a, b;
             INSERT INTO a SELECT generate_series(1, 400), 0; INSERT INTO b SELECT generate_series(1, 400), 0",
        )
        .await;
    let tables = "
        [[tables]]\nname = 'a'\ntable = 'public.a'\nkey = 'a:{id}'
        [[tables]]\nname = 'b'\ntable = 'public.b'\nkey = 'b:{id}'";
    let daemon = Daemon::with(&Settings::new(&postgres, &redis).tables(tables)).await;
    daemon.ready().await;

    let client = postgres.client().await;
    let writing = tokio::spawn(async move {
        // Far more than arrives at once.
        for n in 1..=TRANSACTIONS {
            let sql = format!("BEGIN; UPDATE a SET n = {n}; UPDATE b SET n = {n}; COMMIT");
            client.batch_execute(&sql).await.unwrap();
        }
    });
    let mut connection = redis.connection().await;
    let mut seen = BTreeSet::new();
    let deadline = Instant::now() + PATIENCE;
    while seen.last() != Some(&TRANSACTIONS) {
        let mut all = redis::pipe();
        all.atomic();
        for key in ["a:1", "a:400", "b:1", "b:400"] {
            all.cmd("HGET").arg(key).arg("n");
        }
        let rows: Vec<i32> = all.query_async(&mut connection).await.unwrap();
        assert!(rows.iter().all(|n| *n == rows[0]), "one transaction, seen in part: {rows:?}");
        assert!(seen.last().is_none_or(|last| *last <= rows[0]), "{rows:?} after {seen:?}");
        seen.insert(rows[0]);
        assert!(Instant::now() < deadline, "{seen:?}");
    }
    writing.await.unwrap();
    daemon.applied(postgres.position().await).await;
    assert!(seen.len() > 2, "nothing was seen on the way: {seen:?}");
    // Readers see the last one a moment before the daemon has its acknowledgement.
    let counted = async || daemon.metrics().await["prefetchd_transactions_applied_total"];
    eventually("all are counted", counted, |n| *n >= f64::from(TRANSACTIONS)).await;
    assert_eq!(counted().await, f64::from(TRANSACTIONS));
}

#[tokio::test]
async fn one_truncate_may_empty_several_tables_and_fill_them_again() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    postgres
        .execute(
            "CREATE TABLE a (id int PRIMARY KEY); CREATE TABLE b (id int PRIMARY KEY, a int REFERENCES a);
             CREATE TABLE c (id int PRIMARY KEY);
             GRANT SELECT ON a, b, c TO prefetchd; ALTER PUBLICATION prefetchd ADD TABLE a, b, c;
             INSERT INTO a SELECT generate_series(1, 5); INSERT INTO b SELECT n, n FROM generate_series(1, 5) n;
             INSERT INTO c SELECT generate_series(1, 5)",
        )
        .await;
    // The name of one is a prefix of the other's: their keys must not be confused.
    let tables = "
        [[tables]]\nname = 'a'\ntable = 'public.a'\nkey = 'a:{id}'
        [[tables]]\nname = 'b'\ntable = 'public.b'\nkey = 'b*[x]:{id}'
        [[tables]]\nname = 'c'\ntable = 'public.c'\nkey = 'b?[x]:{id}'";
    let daemon = Daemon::with(&Settings::new(&postgres, &redis).tables(tables)).await;
    daemon.ready().await;
    redis.command::<()>(&["SET", "b-and-others:x:1", "not ours"]).await;
    apply(
        &postgres,
        &daemon,
        "BEGIN; INSERT INTO a VALUES (6); TRUNCATE a CASCADE; INSERT INTO a VALUES (3), (7); INSERT INTO b VALUES (7, 7);
         UPDATE a SET id = 8 WHERE id = 3; COMMIT",
    )
    .await;
    assert_eq!(redis.keys("a:*").await, ["a:7", "a:8"]);
    assert_eq!(redis.keys("b\\*\\[x\\]:*").await, ["b*[x]:7"]);
    assert_eq!(redis.keys("b\\?*").await.len(), 5);
    assert_eq!(redis.command::<String>(&["GET", "b-and-others:x:1"]).await, "not ours");
}

/// More keys than are removed at once, among many that belong to others: the scan is interrupted in between.
#[tokio::test]
async fn a_truncate_of_very_many_rows_takes_all_and_nothing_else() {
    let (postgres, redis) = (Postgres::shared(), Redis::with_debug().await);
    postgres.execute("INSERT INTO categories SELECT 'n-' || n, '', n FROM generate_series(1, 210000) n").await;
    redis.command::<()>(&["DEBUG", "POPULATE", "300000", "others", "1"]).await;
    let daemon = Daemon::start(&postgres, &redis).await;
    daemon.ready().await;
    assert_eq!(redis.command::<u64>(&["DBSIZE"]).await, 510_007);
    apply(&postgres, &daemon, "BEGIN; TRUNCATE categories; INSERT INTO categories VALUES ('n-7', 'again'); COMMIT")
        .await;
    assert_eq!(redis.keys("cache:category:*").await, ["cache:category:n-7"]);
    assert_eq!(redis.command::<u64>(&["DBSIZE"]).await, 300_003);
    daemon.ready().await;
}

#[tokio::test]
async fn a_transaction_over_the_atomic_limits_arrives_whole() {
    for (limit, value) in [("cache.max_atomic_changes", "10"), ("cache.max_atomic_bytes", "\"10KB\"")] {
        let (postgres, redis) = (Postgres::shared(), Redis::start());
        let daemon = Daemon::with(&Settings::new(&postgres, &redis).set(limit, value)).await;
        daemon.ready().await;
        apply(
            &postgres,
            &daemon,
            "BEGIN;
             INSERT INTO categories SELECT 'n-' || n, repeat('x', 50), n FROM generate_series(1, 3000) n;
             UPDATE categories SET display_order = display_order + 1 WHERE id LIKE 'n-%';
             DELETE FROM categories WHERE id LIKE 'n-1%';
             UPDATE categories SET name = 'last' WHERE id = 'cat-001';
             COMMIT",
        )
        .await;
        let left = postgres.value("SELECT count(*) FROM categories").await.unwrap();
        assert_eq!(redis.keys("cache:*").await.len().to_string(), left, "{limit}");
        assert_eq!(redis.hash("cache:category:n-2999").await["display_order"], "3000");
        assert_eq!(redis.hash(FIRST).await["name"], "last");
        // What follows is complete again.
        apply(&postgres, &daemon, "DELETE FROM categories WHERE id LIKE 'n-%'").await;
        assert_eq!(redis.keys("cache:*").await.len(), 5, "{limit}");
        let checkpoint: String =
            redis.command(&["GET", &format!("prefetchd:{{{}}}:checkpoint", postgres.slot())]).await;
        assert_eq!(serde_json::from_str::<Value>(&checkpoint).unwrap()["within"], Value::Null);
    }
}

const DOCUMENTS: &str = "
    CREATE TABLE documents (id text PRIMARY KEY, body text, n int);
    ALTER TABLE documents ALTER body SET STORAGE EXTERNAL;
    INSERT INTO documents SELECT 'd' || i, repeat(md5(i::text), 32768), 0 FROM generate_series(1, 4) i;
    GRANT SELECT ON documents TO prefetchd;
    ALTER PUBLICATION prefetchd ADD TABLE documents";
const DOCUMENTS_TABLE: &str = "[[tables]]\nname = 'documents'\ntable = 'public.documents'\nkey = 'doc:{id}'";

#[tokio::test]
async fn large_values_that_did_not_change_stay() {
    for identity in ["DEFAULT", "FULL"] {
        let (postgres, redis) = (Postgres::shared(), Redis::start());
        postgres.execute(&format!("{DOCUMENTS}; ALTER TABLE documents REPLICA IDENTITY {identity}")).await;
        let daemon = Daemon::with(&Settings::new(&postgres, &redis).tables(DOCUMENTS_TABLE)).await;
        daemon.ready().await;
        let body = redis.hash("doc:d1").await["body"].clone();
        assert_eq!(body.len(), 1 << 20);

        apply(&postgres, &daemon, "UPDATE documents SET n = 1 WHERE id = 'd1'").await;
        apply(&postgres, &daemon, "UPDATE documents SET id = 'e2', n = 2 WHERE id = 'd2'").await;
        // A swap of rows whose large values are in no message.
        apply(
            &postgres,
            &daemon,
            "BEGIN; UPDATE documents SET id = 'x' WHERE id = 'd3'; UPDATE documents SET id = 'd3' WHERE id = 'd4';
             UPDATE documents SET id = 'd4' WHERE id = 'x'; UPDATE documents SET n = 9 WHERE id = 'd4'; COMMIT",
        )
        .await;
        // A row that is inserted and moved within one transaction.
        apply(
            &postgres,
            &daemon,
            "BEGIN; INSERT INTO documents SELECT 'f', body, 5 FROM documents WHERE id = 'd1';
             UPDATE documents SET n = 6 WHERE id = 'f'; UPDATE documents SET id = 'g' WHERE id = 'f'; COMMIT",
        )
        .await;
        assert_eq!(
            redis.keys("doc:*").await,
            ["d1", "d3", "d4", "e2", "g"].map(|id| format!("doc:{id}")),
            "{identity}"
        );
        assert_eq!(redis.hash("doc:d1").await["body"], body);
        for id in ["d1", "d3", "d4", "e2", "g"] {
            let sql = format!("SELECT md5(body) || ' ' || n FROM documents WHERE id = '{id}'");
            let row = redis.hash(&format!("doc:{id}")).await;
            assert_eq!(row.len(), 3);
            let sum = format!("SELECT md5('{}')", row["body"]);
            let has = format!("{} {}", postgres.value(&sum).await.unwrap(), row["n"]);
            assert_eq!(Some(has), postgres.value(&sql).await, "{identity}: {id}");
        }
        assert_eq!(daemon.status().await["primary_reads"], 1, "nothing had to be read again");
    }
}

/// With FULL, the old row contains everything; with DEFAULT, only Postgres knows the rest.
#[tokio::test]
async fn a_partial_update_never_makes_a_partial_hash() {
    let (postgres, redis) = (Postgres::own(&[]), Redis::start());
    postgres.execute(DOCUMENTS).await;
    let daemon = Daemon::with(&Settings::new(&postgres, &redis).tables(DOCUMENTS_TABLE)).await;
    daemon.ready().await;
    redis.command::<()>(&["DEL", "doc:d1"]).await;

    // The change reaches the daemon before the row can be read for it.
    redis.signal(Signal::SIGSTOP);
    postgres.execute("UPDATE documents SET n = 1 WHERE id = 'd1'").await;
    let lock = postgres.client().await;
    lock.batch_execute("BEGIN; LOCK TABLE documents IN ACCESS EXCLUSIVE MODE").await.unwrap();
    redis.signal(Signal::SIGCONT);
    daemon.status_when("incomplete", |status| table(status, "documents")["state"] == "incomplete").await;
    let incomplete = (503, "incomplete".to_owned());
    eventually(
        "the checkpoint says so",
        async || daemon.get("/v1/tables/documents/d1").await,
        |answer| answer.status == 503 && answer.refusal() == incomplete,
    )
    .await;
    assert!(redis.hash("doc:d1").await.is_empty());
    assert_eq!(daemon.get("/v1/tables/documents/d2").await.status, 200);
    assert_eq!(daemon.get("/readyz").await.status, 503);
    lock.batch_execute("COMMIT").await.unwrap();

    let row = eventually("the row is back", async || redis.hash("doc:d1").await, |row| !row.is_empty()).await;
    assert_eq!((row["n"].as_str(), row["body"].len()), ("1", 1 << 20));
    daemon.ready().await;
    assert_eq!(daemon.get("/v1/tables/documents/d9").await.refusal().1, "not_found");
}

#[tokio::test]
async fn what_others_write_into_the_wal_is_passed_over() {
    let (postgres, redis, daemon) = following().await;
    apply(
        &postgres,
        &daemon,
        r"SELECT pg_logical_emit_message(false, 'somebody', 'hello');
          SELECT pg_logical_emit_message(true, '', decode('00ff00', 'hex'));
          SELECT pg_logical_emit_message(true, p, decode(repeat('41', n), 'hex'))
            FROM unnest(ARRAY['prefetchd', 'prefetchd:', 'prefetchd_mark']) p, generate_series(0, 40, 8) n;
          CREATE TABLE unrelated (id int PRIMARY KEY);
          INSERT INTO unrelated SELECT generate_series(1, 100);
          BEGIN; INSERT INTO unrelated VALUES (101); SELECT pg_logical_emit_message(true, 'somebody', 'in between');
          UPDATE categories SET name = 'One' WHERE id = 'cat-001'; COMMIT;",
    )
    .await;
    assert_eq!(redis.hash(FIRST).await["name"], "One");
    // Changes that come from another node have an Origin message.
    let origin = format!("node_{}", postgres.database());
    apply(
        &postgres,
        &daemon,
        &format!(
            "SELECT pg_replication_origin_create('{origin}'); SELECT pg_replication_origin_session_setup('{origin}');
             UPDATE categories SET name = 'Two' WHERE id = 'cat-001';
             SELECT pg_replication_origin_session_reset()"
        ),
    )
    .await;
    assert_eq!(redis.hash(FIRST).await["name"], "Two");
    let drop = format!("SELECT pg_replication_origin_drop('{origin}')");
    psql(&postgres.url("postgres"), &drop);
    assert_eq!(redis.keys("*").await.len(), 7, "five rows and both parts of the checkpoint");
}

#[tokio::test]
async fn a_burst_of_small_transactions_ends_as_postgres_has_it() {
    let (postgres, redis, daemon) = following().await;
    let client = postgres.client().await;
    for n in 0..400 {
        let id = n % 7;
        let sql = match n % 3 {
            0 => {
                format!("INSERT INTO categories VALUES ('b-{id}', 'n{n}') ON CONFLICT (id) DO UPDATE SET name = 'n{n}'")
            }
            1 => format!("UPDATE categories SET display_order = {n} WHERE id = 'b-{id}'"),
            _ => format!("DELETE FROM categories WHERE id = 'b-{id}'"),
        };
        client.batch_execute(&sql).await.unwrap();
    }
    daemon.applied(postgres.position().await).await;
    let rows = client
        .query(
            "SELECT id, name, coalesce(display_order::text, '') FROM categories WHERE id LIKE 'b-%' ORDER BY id",
            &[],
        )
        .await
        .unwrap();
    assert!(!rows.is_empty());
    let keys: Vec<String> = rows.iter().map(|row| format!("cache:category:{}", row.get::<_, String>(0))).collect();
    assert_eq!(redis.keys("cache:category:b-*").await, keys);
    for (key, row) in keys.iter().zip(&rows) {
        let hash = redis.hash(key).await;
        assert_eq!((&hash["name"], &hash["display_order"]), (&row.get(1), &row.get(2)), "{key}");
    }
}
