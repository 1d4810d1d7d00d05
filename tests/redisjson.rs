//! Tables whose format is RedisJSON, on a server that has the module: the document at a key means what `row_to_json` gives,
//! whatever happens to the row.

use crate::harness::{Daemon, Postgres, Redis, Settings, eventually, run_program, skipped};
use serde_json::{Value, json};
use std::collections::BTreeMap;

const TABLE: &str = "[[tables]]\nname = 't'\ntable = 'public.t'\nkey = 't:{id}'\nformat = 'redisjson'\n";

/// A value of 8 kB that stays out of line, so that an UPDATE of another column leaves it out.
const CREATE: &str = r#"
    CREATE TABLE t (id int PRIMARY KEY, n numeric(6,2), "größe ]" double precision, tags text[], at timestamptz, j jsonb, v text);
    ALTER TABLE t ALTER v SET STORAGE EXTERNAL;
    INSERT INTO t SELECT i, i + 0.5, i / 3.0::float8, ARRAY['a', i::text, NULL], '2026-01-02 03:04:05+00', jsonb_build_object('big', 2::numeric ^ 70, 'list', ARRAY[1, 2]),
                         repeat('"\ü' || i, 2000) FROM generate_series(1, 6) i"#;

fn with_module() -> Option<Redis> {
    Redis::module("rejson.so").map(|module| Redis::with(&["--loadmodule", &module]))
}

async fn prepare(postgres: &Postgres, sql: &str) {
    postgres.execute(&format!("{sql}; GRANT SELECT ON t TO prefetchd; ALTER PUBLICATION prefetchd ADD TABLE t")).await;
}

/// Returns the documents in Redis, by key, as a client parses them.
async fn found(redis: &Redis) -> BTreeMap<String, Value> {
    let mut found = BTreeMap::new();
    for key in redis.keys("t:*").await {
        assert_eq!(redis.command::<String>(&["TYPE", &key]).await, "ReJSON-RL");
        assert!(redis.pttl(&key).await > 0, "{key} has no TTL");
        let document: String = redis.command(&["JSON.GET", &key]).await;
        found.insert(key, serde_json::from_str(&document).unwrap());
    }
    found
}

/// Returns the documents that Postgres gives.
async fn wanted(postgres: &Postgres, document: &str) -> BTreeMap<String, Value> {
    let sql = format!("SELECT json_object_agg('t:' || id, {document})::text FROM t");
    postgres.value(&sql).await.map(|all| serde_json::from_str(&all).unwrap()).unwrap_or_default()
}

async fn is_whole(postgres: &Postgres, redis: &Redis, daemon: &Daemon, document: &str, what: &str) {
    daemon.applied(postgres.position().await).await;
    daemon.ready().await;
    assert_eq!(found(redis).await, wanted(postgres, document).await, "{what}");
}

#[tokio::test]
async fn documents_follow_their_rows_through_every_change() {
    for (null, document) in [("empty", "row_to_json(t)"), ("omit", "json_strip_nulls(row_to_json(t))")] {
        let Some(redis) = with_module() else { return skipped("this server comes without RedisJSON") };
        let postgres = Postgres::shared();
        // Nulls inside arrays stay.
        prepare(&postgres, &CREATE.replace(", NULL]", if null == "omit" { "]" } else { ", NULL]" })).await;
        let daemon = Daemon::with(&Settings::new(&postgres, &redis).text("cache.null", null).tables(TABLE)).await;
        daemon.ready().await;
        is_whole(&postgres, &redis, &daemon, document, "the load").await;
        for sql in [
            "INSERT INTO t VALUES (7, -1, 'Infinity', '{}', '-infinity', '[]', 'x'), (8, NULL, NULL, NULL, NULL, NULL, NULL)",
            // The large value is not sent.
            "UPDATE t SET n = n + 0.25, \"größe ]\" = 1e-7, at = NULL, tags = NULL WHERE id < 3",
            "UPDATE t SET at = now(), tags = '{\"q\\\"\"}' WHERE id < 3",
            "UPDATE t SET v = 'short' WHERE id = 3",
            // Another key, with the large value taken from the old one.
            "UPDATE t SET id = 20 WHERE id = 2; UPDATE t SET n = 7 WHERE id = 20",
            "BEGIN; UPDATE t SET id = 30 WHERE id = 4; UPDATE t SET id = 4 WHERE id = 5; UPDATE t SET id = 5 WHERE id = 30; COMMIT",
            "BEGIN; DELETE FROM t WHERE id = 6; INSERT INTO t (id, n) VALUES (6, 6); UPDATE t SET n = 9 WHERE id = 6; COMMIT",
            "DELETE FROM t WHERE id = 20",
            "BEGIN; TRUNCATE t; INSERT INTO t (id, n, v) VALUES (1, 1, repeat('x', 9000)); UPDATE t SET n = 2; COMMIT",
        ] {
            postgres.execute(sql).await;
            is_whole(&postgres, &redis, &daemon, document, sql).await;
            // A TRUNCATE is a new file, after which the table is compared.
            let is_new_file = sql.contains("TRUNCATE");
            assert!(is_new_file || daemon.status().await["primary_reads"] == 1, "{sql}: rows were read again");
        }
        assert_eq!(daemon.stop().await, Some(0));
    }
}

#[tokio::test]
async fn a_merge_takes_the_members_that_were_not_sent_from_redis() {
    let Some(redis) = with_module() else { return skipped("this server comes without RedisJSON") };
    let postgres = Postgres::shared();
    prepare(&postgres, CREATE).await;
    let daemon = Daemon::with(&Settings::new(&postgres, &redis).tables(TABLE)).await;
    daemon.ready().await;
    redis.command::<()>(&["JSON.SET", "t:1", "$.v", r#""somebody else's""#]).await;
    daemon.applied(postgres.execute("UPDATE t SET n = 3 WHERE id = 1").await).await;
    let document: Value = serde_json::from_str(&redis.command::<String>(&["JSON.GET", "t:1"]).await).unwrap();
    assert_eq!((&document["n"], &document["v"]), (&json!(3.0), &json!("somebody else's")));
    // A comparison finds that, a key of another type, one that is missing and one that is too many.
    redis.command::<()>(&["SET", "t:2", "{}"]).await;
    redis.command::<()>(&["DEL", "t:3"]).await;
    redis.command::<()>(&["JSON.SET", "t:99", "$", "{}"]).await;
    daemon.allow_warning(" of t: 6 rows");
    let compared = daemon.operate("verify", &json!({"repair": true})).await.json();
    let counts = ["stale", "missing", "orphaned", "repaired"].map(|kind| compared[kind].as_u64());
    assert_eq!(counts, [Some(2), Some(1), Some(1), Some(4)], "{compared}");
    is_whole(&postgres, &redis, &daemon, "row_to_json(t)", "a repair").await;
    let again = daemon.operate("verify", &json!({})).await.json();
    assert_eq!((&again["stale"], &again["rows"]), (&json!(0), &json!(6)), "{again}");
    assert_eq!(daemon.stop().await, Some(0));
}

/// What the module cannot parse would fail inside a transaction.
#[tokio::test]
async fn a_document_that_the_module_cannot_hold_is_a_dead_letter() {
    let Some(redis) = with_module() else { return skipped("this server comes without RedisJSON") };
    let postgres = Postgres::shared();
    let sql = r#"CREATE TABLE t (id int PRIMARY KEY, j json, v text);
                 ALTER TABLE t ALTER v SET STORAGE EXTERNAL;
                 INSERT INTO t VALUES (1, '1e999', 'x'), (2, '{"a": "\ud800"}', 'y'), (3, '"fits"', repeat('z', 9000))"#;
    prepare(&postgres, sql).await;
    let daemon = Daemon::with(&Settings::new(&postgres, &redis).tables(TABLE)).await;
    daemon.allow_warning("cannot be in redis");
    daemon.ready().await;
    assert_eq!(redis.keys("t:*").await, ["t:3"]);
    daemon.applied(postgres.execute("UPDATE t SET j = '[1e999]' WHERE id = 3").await).await;
    let refusal = async || daemon.get("/v1/tables/t/3").await.refusal();
    eventually("a dead letter", refusal, |refusal| *refusal == (503, "dead_letter".to_owned())).await;
    assert_eq!(redis.keys("t:*").await, [""; 0]);
    let stream = format!("prefetchd:{{{}}}:dead", postgres.slot());
    let letters: Vec<(String, BTreeMap<String, String>)> = redis.command(&["XRANGE", &stream, "-", "+"]).await;
    let reason = &letters.iter().find(|(_, letter)| letter["key"] == "t:3").unwrap().1["reason"];
    assert!(reason.starts_with("RedisJSON cannot hold the document at t:3 (number out of range"), "{reason}");
    postgres.execute("UPDATE t SET j = 'true'").await;
    is_whole(&postgres, &redis, &daemon, "row_to_json(t)", "they fit").await;
    assert_eq!(daemon.status().await["dead_letters"], 0);
    assert_eq!(daemon.stop().await, Some(0));
}

#[tokio::test]
async fn documents_are_read_over_http_and_replace_other_formats() {
    let Some(redis) = with_module() else { return skipped("this server comes without RedisJSON") };
    let postgres = Postgres::shared();
    prepare(&postgres, CREATE).await;
    for format in ["hash", "redisjson", "json", "redisjson", "hash"] {
        let table = TABLE.replace("'redisjson'", &format!("'{format}'"));
        let daemon = Daemon::with(&Settings::new(&postgres, &redis).tables(&table)).await;
        daemon.ready().await;
        let kind = redis.command::<String>(&["TYPE", "t:1"]).await;
        assert_eq!(
            kind,
            if format == "redisjson" { "ReJSON-RL" } else { ["hash", "string"][usize::from(format == "json")] }
        );
        if format == "redisjson" {
            is_whole(&postgres, &redis, &daemon, "row_to_json(t)", "another format").await;
            let one = daemon.get("/v1/tables/t/1").await;
            let row = postgres.value("SELECT row_to_json(t) FROM t WHERE id = 1").await.unwrap();
            assert_eq!((one.status, one.json()), (200, serde_json::from_str(&row).unwrap()));
            let several = daemon.get("/v1/tables/t?key=1&key=77&typed=true").await.json();
            assert_eq!((&several["rows"]["1"], &several["rows"]["77"]), (&one.json(), &Value::Null));
            assert_eq!(daemon.get("/v1/tables/t/77").await.refusal(), (404, "not_found".to_owned()));
            redis.command::<()>(&["SET", "t:4", "{}"]).await;
            assert_eq!(daemon.get("/v1/tables/t/4").await.refusal(), (503, "healing".to_owned()));
        }
        assert_eq!(daemon.stop().await, Some(0));
    }
}

#[tokio::test]
async fn a_server_without_the_module_is_refused_with_a_remedy() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    prepare(&postgres, "CREATE TABLE t (id int PRIMARY KEY)").await;
    if redis.command::<Vec<redis::Value>>(&["COMMAND", "INFO", "JSON.GET"]).await != [redis::Value::Nil] {
        return skipped("this server has RedisJSON");
    }
    let settings = Settings::new(&postgres, &redis).tables(TABLE);
    for command in ["run", "check"] {
        let ran = run_program(&settings, &[command]).await;
        assert_eq!(ran.code, Some(78), "{ran:?}");
        for part in ["JSON.SET", "load the module RedisJSON", "write format = "] {
            assert!(ran.said().contains(part), "{part:?} is missing in {ran:?}");
        }
    }
    let lookups = format!("{TABLE}[[tables.lookups]]\nname = 'all'\nkey = 'all'\n");
    let ran = run_program(&Settings::new(&postgres, &redis).tables(&lookups), &["check"]).await;
    assert_eq!(ran.code, Some(78), "{ran:?}");
    assert!(ran.said().contains("RediSearch"), "{ran:?}");
    let cluster = Settings::new(&postgres, &redis).tables(TABLE).text("redis.url", "redis+cluster://127.0.0.1:1");
    let ran = run_program(&cluster, &["check"]).await;
    assert_eq!(ran.code, Some(78), "{ran:?}");
    assert!(ran.said().contains("one hash slot"), "{ran:?}");
}
