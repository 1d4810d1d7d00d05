//! Tables whose format is JSON: the document at a key is what `row_to_json` gives, whatever happens to the row. Values of
//! every type are compared in [`crate::types`].

use crate::harness::{Answer, Cluster, Daemon, Feature, Postgres, Redis, Settings, eventually, skipped};
use serde_json::{Value, json};
use std::collections::BTreeMap;

const TABLE: &str = "[[tables]]\nname = 't'\ntable = 'public.t'\nkey = 't:{id}'\nformat = 'json'\n";

async fn prepare(postgres: &Postgres, sql: &str) {
    postgres.execute(&format!("{sql}; GRANT SELECT ON t TO prefetchd; ALTER PUBLICATION prefetchd ADD TABLE t")).await;
}

/// A daemon that has loaded `t`, which these statements create.
async fn following(sql: &str) -> (Postgres, Redis, Daemon) {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    prepare(&postgres, sql).await;
    let daemon = Daemon::with(&Settings::new(&postgres, &redis).tables(TABLE)).await;
    daemon.ready().await;
    (postgres, redis, daemon)
}

/// Returns the documents that Postgres gives, by key.
async fn wanted(postgres: &Postgres, document: &str) -> BTreeMap<String, String> {
    let sql = format!("SELECT json_object_agg('t:' || id, ({document})::text)::text FROM t");
    postgres.value(&sql).await.map(|all| serde_json::from_str(&all).unwrap()).unwrap_or_default()
}

async fn found(redis: &Redis) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    for key in redis.keys("t:*").await {
        let document = redis.command(&["GET", &key]).await;
        assert!(redis.pttl(&key).await > 0, "{key} has no TTL");
        found.insert(key, document);
    }
    found
}

/// Every row is there as Postgres gives it, and nothing else.
async fn is_whole(postgres: &Postgres, redis: &Redis, daemon: &Daemon) {
    daemon.applied(postgres.position().await).await;
    daemon.ready().await;
    assert_eq!(found(redis).await, wanted(postgres, "row_to_json(t)").await);
}

/// Values of 4 kB that stay out of line, so that an UPDATE of another column leaves them out. The JSON is such that printing
/// it again would change it.
const LARGE: &str = r#"
    CREATE TABLE t (id int PRIMARY KEY, n numeric(6,2), j json, v text, b boolean DEFAULT true);
    ALTER TABLE t ALTER j SET STORAGE EXTERNAL, ALTER v SET STORAGE EXTERNAL;
    CREATE FUNCTION large(i int) RETURNS json LANGUAGE sql IMMUTABLE AS
    $$ SELECT (' {"a" : 1e999, "a":"\ud800 }", "n": 1.10, "pad": "' || repeat(i::text, 4000) || '"} ')::json $$;
    INSERT INTO t SELECT i, i, large(i), repeat('"\' || i, 2000) FROM generate_series(1, 6) i"#;

#[tokio::test]
async fn a_row_is_the_document_of_its_columns_in_their_order() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    prepare(
        &postgres,
        "CREATE TABLE t (note text, price numeric(10,2) NOT NULL, region text, hidden int, id int, tags text[],
                         PRIMARY KEY (region, id));
         INSERT INTO t VALUES ('', 1.50, 'a/b:c', 1, 7, '{x,NULL}'), (NULL, 0, 'eu', 2, 8, NULL)",
    )
    .await;
    let table = "[[tables]]\nname = 't'\ntable = 'public.t'\nkey = 't:{region}:{id}'\nformat = 'json'
        columns = ['id', 'tags', 'region', 'note', 'price']\nrename = { price = 'the \"price\"' }";
    let one = r#"{"note":"","the \"price\"":1.50,"region":"a/b:c","id":7,"tags":["x",null]}"#;
    let nulls = r#"{"note":null,"the \"price\"":0.00,"region":"eu","id":8,"tags":null}"#;
    let without = r#"{"the \"price\"":0.00,"region":"eu","id":8}"#;
    for (null, other) in [("empty", nulls), ("omit", without)] {
        let settings = Settings::new(&postgres, &redis).text("cache.null", null).tables(table);
        let daemon = Daemon::with(&settings).await;
        daemon.ready().await;
        assert_eq!(redis.command::<String>(&["GET", "t:a/b%3Ac:7"]).await, one);
        assert_eq!(redis.command::<String>(&["GET", "t:eu:8"]).await, other);
        for query in ["", "?typed=true", "?typed=false"] {
            let answer = daemon.get(&format!("/v1/tables/t/a%2Fb:c/7{query}")).await;
            assert_eq!((answer.status, answer.body.as_str()), (200, one), "{query}");
            assert_eq!(answer.header("content-type"), Some("application/json"));
            let and = if query.is_empty() { query.to_owned() } else { query.replace('?', "&") };
            let several = daemon.get(&format!("/v1/tables/t?key=a/b%253Ac:7&key=eu:9&key=eu:8{and}")).await;
            let rows = format!(r#"{{"rows":{{"a/b%3Ac:7":{one},"eu:9":null,"eu:8":{other}}}}}"#);
            assert_eq!((several.status, several.body), (200, rows), "{query}");
        }
        assert_eq!(daemon.get("/v1/tables/t/eu/9").await.refusal(), (404, "not_found".to_owned()));
        assert_eq!(daemon.stop().await, Some(0));
    }
}

#[tokio::test]
async fn values_that_an_update_leaves_out_stay_as_they_stand() {
    let (postgres, redis, daemon) = following(LARGE).await;
    // The document in Redis is what is patched, not the row in Postgres read again.
    let document = r#"{"id":1,"n":1.00,"j":{"kept":[1e999,-0.0]},"v":"y","b":true}"#;
    let _: () = redis.command(&["SET", "t:1", document]).await;
    let lsn = postgres.execute("UPDATE t SET n = 3 WHERE id = 1").await;
    daemon.applied(lsn).await;
    let patched = document.replace("1.00", "3.00");
    assert_eq!(redis.command::<String>(&["GET", "t:1"]).await, patched);
    daemon.allow_warning("verify with repair of t: 6 rows");
    let compared = daemon.operate("verify", &json!({"repair": true})).await.json();
    assert_eq!((&compared["stale"], &compared["repaired"]), (&json!(1), &json!(1)), "{compared}");
    is_whole(&postgres, &redis, &daemon).await;
    for sql in [
        "UPDATE t SET n = n + 0.25, b = NULL WHERE id = 1",
        "UPDATE t SET v = 'short' WHERE id = 2",
        "UPDATE t SET id = 20 WHERE id = 2; UPDATE t SET n = 7 WHERE id = 20",
        "BEGIN; UPDATE t SET id = 30 WHERE id = 3; UPDATE t SET id = 3 WHERE id = 4; UPDATE t SET id = 4 WHERE id = 30; COMMIT",
        "BEGIN; UPDATE t SET n = 1 WHERE id = 5; UPDATE t SET v = NULL WHERE id = 5; UPDATE t SET b = false WHERE id = 5; COMMIT",
        "BEGIN; DELETE FROM t WHERE id = 6; INSERT INTO t VALUES (6, 6, large(7), 'new'); UPDATE t SET n = 9 WHERE id = 6; COMMIT",
        "DELETE FROM t WHERE id = 20",
        "BEGIN; TRUNCATE t; INSERT INTO t VALUES (1, 1, large(1), 'x'); UPDATE t SET n = 2; COMMIT",
    ] {
        postgres.execute(sql).await;
        is_whole(&postgres, &redis, &daemon).await;
    }
}

#[tokio::test]
async fn where_the_old_document_is_in_doubt_the_row_is_read_again() {
    let (postgres, redis, daemon) = following(LARGE).await;
    let doubtful: &[&[&str]] = &[
        &["DEL", "t:1"],
        &["SET", "t:1", "{}"],
        &["SET", "t:1", r#"{"id":1,"n":1.00,"v":"y","b":true}"#],
        &["SET", "t:1", r#"{"id":1,"n":1.00,"j":null,"v":"y","b":true}"#],
        &["SET", "t:1", "not a document"],
        &["SET", "t:1", ""],
    ];
    for (at, command) in doubtful.iter().enumerate() {
        let _: redis::Value = redis.command(command).await;
        postgres.execute(&format!("UPDATE t SET n = {at} WHERE id = 1")).await;
        is_whole(&postgres, &redis, &daemon).await;
    }
    let _: i64 = redis.command(&["DEL", "t:1"]).await;
    let _: i64 = redis.command(&["HSET", "t:1", "id", "1"]).await;
    postgres.execute("UPDATE t SET n = 9 WHERE id = 1").await;
    is_whole(&postgres, &redis, &daemon).await;
    // Where the command is denied that tells how long documents are.
    let _: () = redis.command(&["ACL", "SETUSER", "prefetchd", "-strlen"]).await;
    postgres.execute("UPDATE t SET n = 10").await;
    is_whole(&postgres, &redis, &daemon).await;
    assert_eq!(daemon.said("a session began"), 0, "the stream went on");
}

#[tokio::test]
async fn a_comparison_finds_documents_that_differ() {
    let (postgres, redis, daemon) = following(LARGE).await;
    daemon.allow_warnings();
    let document: String = redis.command(&["GET", "t:1"]).await;
    let _: () = redis.command(&["SET", "t:1", &format!("{document} ")]).await;
    let _: i64 = redis.command(&["DEL", "t:2", "t:3"]).await;
    let _: i64 = redis.command(&["HSET", "t:3", "id", "3"]).await;
    let _: () = redis.command(&["SET", "t:7", "{}"]).await;
    let counts =
        |found: &Value| ["rows", "missing", "stale", "orphaned", "repaired"].map(|of| found[of].as_u64().unwrap());
    assert_eq!(daemon.get("/v1/tables/t/3").await.refusal(), (503, "healing".to_owned()));
    let compared = daemon.operate("verify", &json!({})).await.json();
    assert_eq!(counts(&compared), [6, 1, 2, 1, 0], "{compared}");
    let compared = daemon.operate("verify", &json!({"repair": true})).await.json();
    assert_eq!(counts(&compared), [6, 1, 2, 1, 4], "{compared}");
    is_whole(&postgres, &redis, &daemon).await;
    let compared = daemon.operate("verify", &json!({})).await.json();
    assert_eq!(counts(&compared), [6, 0, 0, 0, 0], "{compared}");
    let _: () = redis.command(&["SET", "t:2", "{"]).await;
    assert_eq!(daemon.get("/v1/tables/t/2").await.refusal(), (503, "healing".to_owned()));
    assert_eq!(daemon.get("/v1/tables/t?key=1&key=2").await.refusal(), (503, "healing".to_owned()));
    let _: Value = daemon.operate("refetch", &json!({})).await.json();
    is_whole(&postgres, &redis, &daemon).await;
    let removed = daemon.operate("invalidate", &json!({"table": "t", "keys": ["1", "9"]})).await.json();
    assert_eq!(removed["deleted"], 1);
    assert_eq!(daemon.get("/v1/tables/t/1").await.refusal(), (503, "incomplete".to_owned()));
}

/// Of each format, rows are loaded, a key moves, and a large value is left out.
#[tokio::test]
async fn a_table_whose_format_was_changed_is_loaded_again() {
    let (postgres, redis, daemon) = following(LARGE).await;
    assert_eq!(daemon.stop().await, Some(0));
    let hash = TABLE.replace("json", "hash");
    for (table, kind) in [(&*hash, "hash"), (TABLE, "string"), (&*hash, "hash"), (TABLE, "string")] {
        let settings = Settings::new(&postgres, &redis).tables(table);
        // It arrives together with the load.
        postgres.execute("UPDATE t SET n = n + 1; UPDATE t SET id = 9 - id WHERE id IN (1, 8)").await;
        let daemon = Daemon::with(&settings).await;
        postgres.execute("UPDATE t SET n = n + 1 WHERE id = 4").await;
        daemon.applied(postgres.position().await).await;
        daemon.ready().await;
        postgres.execute("UPDATE t SET n = n + 1 WHERE id = 5").await;
        daemon.applied(postgres.position().await).await;
        daemon.ready().await;
        for key in redis.keys("t:*").await {
            assert_eq!(redis.command::<String>(&["TYPE", &key]).await, kind, "{key}");
        }
        let compared = daemon.operate("verify", &json!({})).await.json();
        let counted = ["rows", "missing", "stale", "orphaned"].map(|of| compared[of].as_u64().unwrap());
        assert_eq!(counted, [6, 0, 0, 0], "{compared}");
        if kind == "string" {
            is_whole(&postgres, &redis, &daemon).await;
        }
        assert_eq!(daemon.said("a session began"), 0, "no EXEC was torn");
        assert_eq!(daemon.stop().await, Some(0));
    }
}

#[tokio::test]
async fn documents_follow_a_table_that_changes() {
    let (postgres, redis, daemon) = following(
        "CREATE TYPE pair AS (a int, b int); CREATE DOMAIN short AS text CHECK (length(value) < 20);
         CREATE TABLE t (id int PRIMARY KEY, v int, p pair);
         INSERT INTO t SELECT id, 5, '(1,2)' FROM generate_series(1, 2000) id",
    )
    .await;
    daemon.allow_warnings();
    for change in [
        "ALTER TABLE t RENAME v TO x",
        "ALTER TABLE t ALTER x TYPE text; UPDATE t SET x = x WHERE id = 1",
        "ALTER TABLE t ALTER x TYPE bigint USING x::bigint; INSERT INTO t VALUES (2001, 7, NULL)",
        // Types that the session has not seen: such rows are read again.
        "ALTER TABLE t ADD y timestamptz DEFAULT '2024-01-02 03:04:05+00'; UPDATE t SET x = 8 WHERE id < 4",
        "ALTER TABLE t ADD z short[] DEFAULT '{a,NULL}'; INSERT INTO t (id) VALUES (2002); DELETE FROM t WHERE id = 7",
        "ALTER TABLE t ALTER x SET DEFAULT 1; UPDATE t SET x = 0 WHERE x IS NULL; ALTER TABLE t ALTER x SET NOT NULL",
        "ALTER TYPE pair RENAME ATTRIBUTE b TO c",
        "ALTER TYPE pair ADD ATTRIBUTE d boolean; UPDATE t SET p = '(1,2,t)' WHERE id = 5; INSERT INTO t VALUES (2003, 1, '(,,)')",
        "ALTER TYPE pair DROP ATTRIBUTE a; UPDATE t SET x = 9 WHERE id = 5",
        "ALTER TABLE t DROP x, DROP p",
    ] {
        postgres.execute(change).await;
        let wanted = wanted(&postgres, "row_to_json(t)").await;
        eventually(change, async || found(&redis).await, |found| *found == wanted).await;
        daemon.ready().await;
    }
    assert_eq!(daemon.status().await["dead_letters"], 0);
}

#[tokio::test]
async fn a_document_over_the_limit_of_redis_is_a_dead_letter() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    redis.command::<()>(&["CONFIG", "SET", "proto-max-bulk-len", "1mb"]).await;
    // No value is as long as the document. Of row 3 neither is the text of the row: quotes are escaped.
    prepare(
        &postgres,
        "CREATE TABLE t (id int PRIMARY KEY, n int, v text, w text);
         ALTER TABLE t ALTER v SET STORAGE EXTERNAL, ALTER w SET STORAGE EXTERNAL;
         INSERT INTO t VALUES (1, 1, 'fits', ''), (2, 1, repeat('x', 600000), repeat('y', 600000)),
                              (3, 1, repeat('\"', 600000), ''), (4, 1, repeat('z', 600000), '')",
    )
    .await;
    let daemon = Daemon::with(&Settings::new(&postgres, &redis).tables(TABLE)).await;
    daemon.allow_warning("of t cannot be in redis");
    daemon.ready().await;
    assert_eq!(redis.keys("t:*").await, ["t:1", "t:4"]);
    for (sql, keys) in [
        // By the stream, whole and patched.
        ("UPDATE t SET v = repeat('\"', 600000) WHERE id = 1", &["t:4"][..]),
        ("UPDATE t SET w = repeat('y', 600000) WHERE id = 4", &[]),
        ("UPDATE t SET n = 2 WHERE id = 4", &[]),
    ] {
        let lsn = postgres.execute(sql).await;
        daemon.applied(lsn).await;
        eventually(sql, async || redis.keys("t:*").await, |found| *found == keys).await;
    }
    for id in 1..=4 {
        let refusal = async || daemon.get(&format!("/v1/tables/t/{id}")).await.refusal();
        eventually("a dead letter", refusal, |refusal| *refusal == (503, "dead_letter".to_owned())).await;
    }
    let stream = format!("prefetchd:{{{}}}:dead", postgres.slot());
    let letters: Vec<(String, BTreeMap<String, String>)> = redis.command(&["XRANGE", &stream, "-", "+"]).await;
    let reason = &letters.iter().find(|(_, letter)| letter["key"] == "t:1").unwrap().1["reason"];
    assert!(reason.starts_with("the document at t:1 has 1200"), "{reason}");
    postgres.execute("UPDATE t SET v = 'small', w = 'again'").await;
    is_whole(&postgres, &redis, &daemon).await;
    assert_eq!(daemon.status().await["dead_letters"], 0);
}

#[tokio::test]
async fn what_only_a_cast_could_write_is_refused() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    prepare(
        &postgres,
        "CREATE TYPE mood AS ENUM ('ok'); CREATE TYPE pair AS (a int, m mood[]);
         CREATE FUNCTION in_json(mood) RETURNS json LANGUAGE sql IMMUTABLE AS $$ SELECT to_json(1) $$;
         CREATE CAST (mood AS json) WITH FUNCTION in_json(mood);
         CREATE TABLE t (id int PRIMARY KEY, v text, p pair)",
    )
    .await;
    let settings = Settings::new(&postgres, &redis).tables(TABLE);
    let (code, said) = Daemon::refused(&settings);
    let because = "column \\\"p\\\" of table public.t has a type with a cast to json of its own (public.mood)";
    assert_eq!(code, Some(78), "{said}");
    assert!(said.contains(because), "{said}");
    let without = Settings::new(&postgres, &redis).tables(&format!("{TABLE}columns = ['id', 'v']\n"));
    let daemon = Daemon::with(&without).await;
    daemon.ready().await;
    assert_eq!(daemon.stop().await, Some(0));
    // Later, the table alone is blocked.
    postgres.execute("ALTER TABLE t DROP p").await;
    let daemon = Daemon::with(&settings).await;
    daemon.ready().await;
    daemon.allow_warnings();
    postgres.execute("ALTER TABLE t ADD m mood; INSERT INTO t VALUES (1, 'v', 'ok')").await;
    let is_blocked = |status: &Value| status["tables"][0]["because"].to_string().contains("cast to json of its own");
    let status = daemon.status_when("blocked", is_blocked).await;
    assert!(status["tables"][0]["remedy"].to_string().contains("format = "), "{status}");
    postgres.execute("DROP CAST (mood AS json)").await;
    is_whole(&postgres, &redis, &daemon).await;
}

#[tokio::test]
async fn hstore_is_refused() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let there = "SELECT count(*) FROM pg_available_extensions WHERE name = 'hstore'";
    if postgres.value(there).await.as_deref() != Some("1") {
        return skipped("hstore is not installed (postgresql-contrib)");
    }
    prepare(&postgres, "CREATE EXTENSION hstore; CREATE TABLE t (id int PRIMARY KEY, h hstore)").await;
    let (code, said) = Daemon::refused(&Settings::new(&postgres, &redis).tables(TABLE));
    assert_eq!((code, said.contains("(public.hstore)")), (Some(78), true), "{said}");
}

/// Documents are patched where they lie; those whose key moves to another hash slot are read again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn documents_lie_in_all_hash_slots_of_a_cluster() {
    let cluster = Cluster::start().await;
    if !cluster.node(0).has(Feature::Lanes).await {
        return skipped("this server cannot write hash slots one by one");
    }
    let postgres = Postgres::shared();
    prepare(&postgres, &LARGE.replace("generate_series(1, 6)", "generate_series(1, 300)")).await;
    let daemon = Daemon::with(&Settings::on_cluster(&postgres, &cluster).tables(TABLE)).await;
    daemon.ready().await;
    for sql in [
        "SELECT 1",
        "UPDATE t SET n = n + 0.25 WHERE id <= 200",
        "UPDATE t SET id = id + 1000 WHERE id <= 50",
        "DELETE FROM t WHERE id > 250; INSERT INTO t SELECT i, 0, large(i), 'x' FROM generate_series(251, 255) i",
        "BEGIN; TRUNCATE t; INSERT INTO t VALUES (1, 1, large(1), 'x'); UPDATE t SET n = 2; COMMIT",
    ] {
        let lsn = postgres.execute(sql).await;
        daemon.applied(lsn).await;
        daemon.ready().await;
        let mut found = BTreeMap::new();
        for key in cluster.keys("t:*").await {
            let document: String = cluster.server_of(&key).await.command(&["GET", &key]).await;
            found.insert(key, document);
        }
        assert_eq!(found, wanted(&postgres, "row_to_json(t)").await, "{sql}");
    }
    let answer: Answer = daemon.get("/v1/tables/t/1").await;
    let row = postgres.value("SELECT row_to_json(t) FROM t WHERE id = 1").await;
    assert_eq!((answer.status, Some(answer.body)), (200, row));
    let several = daemon.get("/v1/tables/t?key=1&key=2").await;
    assert!(several.status == 200 && several.body.ends_with(r#","2":null}}"#), "{several:?}");
    // After a TRUNCATE, the table is read again.
    let verify = async || daemon.operate("verify", &json!({})).await;
    let compared = eventually("nothing else is under way", verify, |answer| answer.status == 200).await.json();
    assert_eq!((&compared["stale"], &compared["missing"]), (&json!(0), &json!(0)), "{compared}");
}
