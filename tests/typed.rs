//! Rows over HTTP with types (`typed=true`): which columns they have, what is NULL, and where the types come from when a
//! table changes or the daemon starts again. Values of every type are compared in [`crate::types`].

use crate::harness::{Answer, Daemon, Postgres, Redis, Settings, eventually};
use serde_json::{Value, json};

const TABLE: &str = "[[tables]]\nname = 't'\ntable = 'public.t'\nkey = 't:{id}'\n";

async fn prepare(postgres: &Postgres, sql: &str) {
    postgres.execute(&format!("{sql}; GRANT SELECT ON t TO prefetchd; ALTER PUBLICATION prefetchd ADD TABLE t")).await;
}

#[track_caller]
fn is_row(answer: &Answer, json: &str) {
    assert_eq!((answer.status, answer.body.as_str()), (200, json));
    assert_eq!(answer.header("content-type"), Some("application/json"));
}

/// Returns the table's entry in the checkpoint.
async fn entry(postgres: &Postgres, redis: &Redis) -> Value {
    let entry: String = redis.command(&["HGET", &format!("prefetchd:{{{}}}:tables", postgres.slot()), "t"]).await;
    serde_json::from_str(&entry).unwrap()
}

#[tokio::test]
async fn a_row_has_the_fields_of_its_columns_in_their_order() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    prepare(
        &postgres,
        "CREATE TABLE t (note text, price numeric(10,2) NOT NULL, region text, name text NOT NULL, hidden int, id int,
                         tags text[], PRIMARY KEY (region, id));
         INSERT INTO t VALUES ('', 1.50, 'a/b:c', '', 1, 7, '{x,NULL}'), (NULL, 0, 'eu', 'n', 2, 8, NULL)",
    )
    .await;
    let table = "[[tables]]\nname = 't'\ntable = 'public.t'\nkey = 't:{region}:{id}'
        columns = ['id', 'tags', 'region', 'note', 'name', 'price']\nrename = { price = 'the \"price\"' }";
    let whole = r#"{"note":null,"the \"price\"":1.50,"region":"a/b:c","name":"","id":7,"tags":["x",null]}"#;
    let nulls = r#"{"note":null,"the \"price\"":0.00,"region":"eu","name":"n","id":8,"tags":null}"#;
    for (null, whole) in [("empty", whole.to_owned()), ("omit", whole.replace("\"note\":null", "\"note\":\"\""))] {
        let settings = Settings::new(&postgres, &redis).text("cache.null", null).tables(table);
        let daemon = Daemon::with(&settings).await;
        daemon.ready().await;
        is_row(&daemon.get("/v1/tables/t/a%2Fb:c/7?typed=true").await, &whole);
        is_row(&daemon.get("/v1/tables/t/eu/8?typed=true").await, nulls);
        let several = daemon.get("/v1/tables/t?key=a/b%253Ac:7&key=eu:9&key=eu:8&typed=true").await;
        is_row(&several, &format!(r#"{{"rows":{{"a/b%3Ac:7":{whole},"eu:9":null,"eu:8":{nulls}}}}}"#));
        is_row(&daemon.get("/v1/tables/t?key=eu:9&typed=true").await, r#"{"rows":{"eu:9":null}}"#);
        assert_eq!(daemon.get("/v1/tables/t/eu/9?typed=true").await.refusal(), (404, "not_found".to_owned()));
        for strings in ["", "?typed=false"] {
            let row = daemon.get(&format!("/v1/tables/t/eu/8{strings}")).await.json();
            assert_eq!((&row["id"], &row["the \"price\""]), (&json!("8"), &json!("0.00")));
        }
        for wrong in ["typed=1", "typed=", "typed", "typed=TRUE", "typed=true&typed=true", "Typed=true"] {
            let refusal = daemon.get(&format!("/v1/tables/t/eu/8?{wrong}")).await.refusal();
            assert_eq!(refusal, (400, "bad_request".to_owned()), "{wrong}");
        }
        assert_eq!(daemon.stop().await, Some(0));
    }
}

/// Somebody else wrote to Redis: whatever lies there, the answer is JSON.
#[tokio::test]
async fn values_that_do_not_fit_their_types_are_strings() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    prepare(
        &postgres,
        "CREATE TABLE t (id int PRIMARY KEY, n int, b boolean, j jsonb, a int[], x text);
         INSERT INTO t VALUES (1, 1, true, '{}', '{1}', 'x')",
    )
    .await;
    let daemon = Daemon::with(&Settings::new(&postgres, &redis).tables(TABLE)).await;
    daemon.ready().await;
    is_row(&daemon.get("/v1/tables/t/1?typed=true").await, r#"{"id":1,"n":1,"b":true,"j":{},"a":[1],"x":"x"}"#);
    let _: i64 = redis.command(&["HSET", "t:1", "n", "01", "b", "yes", "j", "{", "a", "{1", "added", "1"]).await;
    let _: i64 = redis.command(&["HDEL", "t:1", "x"]).await;
    is_row(&daemon.get("/v1/tables/t/1?typed=true").await, r#"{"id":1,"n":"01","b":"yes","j":"{","a":"{1","x":null}"#);
}

const FIRST: &str = "/v1/tables/t/1?typed=true";
/// It is loaded last.
const LAST: &str = "/v1/tables/t/20000?typed=true";

/// While rows of both types are there, an answer is right or 503.
#[tokio::test]
async fn types_follow_a_table_that_changes() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    prepare(
        &postgres,
        "CREATE TYPE pair AS (a int, b int);
         CREATE TABLE t (id int PRIMARY KEY, v int, w text, p pair);
         INSERT INTO t SELECT id, 5, '', '(1,2)' FROM generate_series(1, 20000) id",
    )
    .await;
    let daemon = Daemon::with(&Settings::new(&postgres, &redis).tables(TABLE)).await;
    daemon.allow_warnings();
    daemon.ready().await;
    let rows = |json: &str| [1, 20_000].map(|id| format!("{{\"id\":{id},{json}}}"));
    let mut before = rows(r#""v":5,"w":null,"p":{"a":1,"b":2}"#);
    for (change, json) in [
        ("ALTER TABLE t RENAME v TO x", r#""x":5,"w":null,"p":{"a":1,"b":2}"#),
        // The stream announces this before the catalog is looked at.
        ("ALTER TABLE t ALTER x TYPE text; UPDATE t SET x = x WHERE id = 1", r#""x":"5","w":null,"p":{"a":1,"b":2}"#),
        ("ALTER TABLE t ALTER x TYPE bigint USING x::bigint", r#""x":5,"w":null,"p":{"a":1,"b":2}"#),
        ("ALTER TABLE t ALTER w SET NOT NULL", r#""x":5,"w":"","p":{"a":1,"b":2}"#),
        ("ALTER TABLE t ALTER w DROP NOT NULL", r#""x":5,"w":null,"p":{"a":1,"b":2}"#),
        ("ALTER TYPE pair RENAME ATTRIBUTE b TO c", r#""x":5,"w":null,"p":{"a":1,"c":2}"#),
        ("ALTER TYPE pair ADD ATTRIBUTE d int", r#""x":5,"w":null,"p":{"a":1,"c":2,"d":null}"#),
        ("ALTER TABLE t ADD y int DEFAULT 7", r#""x":5,"w":null,"p":{"a":1,"c":2,"d":null},"y":7"#),
        ("ALTER TABLE t DROP x, DROP p", r#""w":null,"y":7"#),
    ] {
        postgres.execute(change).await;
        let then = rows(json);
        let is_then = |answer: &Answer, at: usize| match answer.status {
            200 if answer.body == then[at] => true,
            200 => {
                assert_eq!(answer.body, before[at], "{change}");
                false
            }
            _ => {
                assert_eq!(answer.refusal(), (503, "loading".to_owned()), "{change}");
                false
            }
        };
        let told = async || [daemon.get(FIRST).await, daemon.get(LAST).await];
        eventually(change, told, |[first, last]| is_then(first, 0) & is_then(last, 1)).await;
        daemon.ready().await;
        before = then;
    }
}

#[tokio::test]
async fn a_daemon_that_only_resumes_knows_the_types() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    prepare(&postgres, "CREATE TABLE t (id int PRIMARY KEY, v boolean); INSERT INTO t VALUES (1, true)").await;
    let settings = Settings::new(&postgres, &redis).tables(TABLE);
    let daemon = Daemon::with(&settings).await;
    daemon.ready().await;
    assert_eq!(entry(&postgres, &redis).await["types"], "2:idn1:vb");
    assert_eq!(daemon.stop().await, Some(0));

    let daemon = Daemon::with(&settings).await;
    daemon.ready().await;
    is_row(&daemon.get("/v1/tables/t/1?typed=true").await, r#"{"id":1,"v":true}"#);
    assert_eq!(daemon.status().await["primary_reads"], 0);
    assert_eq!(daemon.stop().await, Some(0));

    // As a version without types writes it.
    let mut untyped = entry(&postgres, &redis).await;
    untyped.as_object_mut().unwrap().remove("types").unwrap();
    let key = format!("prefetchd:{{{}}}:tables", postgres.slot());
    let _: i64 = redis.command(&["HSET", &key, "t", &untyped.to_string()]).await;
    // Long enough to see what is answered before the catalog is looked at.
    let daemon = Daemon::with(&settings.timing("catalog=5s")).await;
    daemon.ready().await;
    assert_eq!(daemon.get("/v1/tables/t/1?typed=true").await.refusal(), (503, "loading".to_owned()));
    assert_eq!(daemon.get("/v1/tables/t?key=1&typed=true").await.refusal(), (503, "loading".to_owned()));
    assert_eq!(daemon.get("/v1/tables/t/1").await.json(), json!({"id": "1", "v": "true"}));
    assert_eq!(daemon.get("/v1/tables/t/2?typed=true").await.status, 404);
    let told = async || daemon.get("/v1/tables/t/1?typed=true").await;
    let answer = eventually("types", told, |answer| answer.status == 200).await;
    is_row(&answer, r#"{"id":1,"v":true}"#);
    assert_eq!(daemon.status().await["primary_reads"], 0, "nothing was loaded for them");
}
