//! Changes that cannot become a row, and one that Postgres itself cannot send.

use crate::harness::{Daemon, Postgres, Redis, Settings, eventually, psql, run_program};
use serde_json::{Value, json};

async fn stuck_at(daemon: &Daemon) -> String {
    let is_stuck = |status: &Value| {
        status["state"] == "stalled"
            && status["waiting_for"].to_string().contains("postgres cannot send the change at ")
    };
    let status = daemon.status_when("stuck", is_stuck).await;
    let text = status["waiting_for"].as_str().unwrap().to_owned();
    let at = text.split("prefetchd skip ").nth(1).unwrap().split(',').next().unwrap().to_owned();
    assert!(text.contains("invalid byte sequence"), "{text}");
    at
}

#[tokio::test]
async fn a_change_that_postgres_cannot_send_is_named_and_skipped_on_an_operators_word() {
    let (server, redis) = (Postgres::own(&[]), Redis::start());
    let postgres = server.beside_in("SQL_ASCII");
    let (url, settings) = (postgres.url("postgres"), Settings::new(&postgres, &redis));
    let daemon = Daemon::with(&settings).await;
    daemon.ready().await;
    daemon.allow_warnings();
    psql(&url, "INSERT INTO categories VALUES ('cat-006', 'Fine', 6, false, NULL)");
    daemon.status_when("applied", |status| status["sync_events_applied"] == 1).await;
    // In a transaction that stays open while others commit behind it: Redis is then beyond the change, and not past it.
    let (bad, connection) = tokio_postgres::connect(&url, tokio_postgres::NoTls).await.unwrap();
    tokio::spawn(connection);
    bad.batch_execute(r"BEGIN; INSERT INTO categories VALUES ('bad', E'\xff', 7, false, NULL)").await.unwrap();
    psql(&url, "UPDATE categories SET display_order = 7 WHERE id = 'cat-006'");
    daemon.status_when("applied", |status| status["sync_events_applied"] == 2).await;
    bad.batch_execute("COMMIT").await.unwrap();
    let at = stuck_at(&daemon).await;
    daemon.logged("the stream is stuck").await;
    // What lies behind it waits, also the end of the row that was the trouble.
    psql(&url, "DELETE FROM categories WHERE id = 'bad'; UPDATE categories SET name = 'Later' WHERE id = 'cat-006'");
    let wrong = daemon.operate("skip", &json!({"lsn": "0/1"})).await;
    assert_eq!(wrong.refusal(), (409, "nothing_to_skip".to_owned()));
    assert!(wrong.body.contains(&at), "{wrong:?}");
    assert_eq!(redis.hash("cache:category:cat-006").await["name"], "Fine");

    let ran = run_program(&settings, &["skip", &at, "--url", &format!("http://{}", daemon.address())]).await;
    assert_eq!(ran.code, Some(0), "{ran:?}");
    daemon.ready().await;
    assert_eq!(redis.keys("cache:*").await.len(), 6);
    assert_eq!(redis.hash("cache:category:cat-006").await["name"], "Later");
    assert_eq!(daemon.metrics().await[r#"prefetchd_heals_total{reason="skipped"}"#], 1.0);
    psql(&url, "UPDATE categories SET name = 'Goes on' WHERE id = 'cat-006'");
    daemon.status_when("applied", |status| status["sync_events_applied"] == 3).await;
    assert_eq!(redis.hash("cache:category:cat-006").await["name"], "Goes on");
    let again = daemon.operate("skip", &json!({"lsn": at})).await;
    assert_eq!(again.refusal(), (409, "nothing_to_skip".to_owned()));
}

type Letter = std::collections::BTreeMap<String, String>;

async fn letters(redis: &Redis, postgres: &Postgres) -> Vec<Letter> {
    let stream = format!("prefetchd:{{{}}}:dead", postgres.slot());
    let entries: Vec<(String, Letter)> = redis.command(&["XRANGE", &stream, "-", "+"]).await;
    entries.into_iter().map(|(_, letter)| letter).collect()
}

fn is_lsn(text: &str) -> bool {
    text.parse::<prefetchd::lsn::Lsn>().is_ok()
}

const LARGE: &str = "CREATE TABLE t (id int PRIMARY KEY, small text, v text);
    INSERT INTO t VALUES (1, 'ü', 'fits'), (2, 'loaded', repeat('x', 1500000));
    GRANT SELECT ON t TO prefetchd; ALTER PUBLICATION prefetchd ADD TABLE t";

#[tokio::test]
async fn a_value_over_the_limit_of_redis_is_a_dead_letter_and_stops_nothing_else() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    redis.command::<()>(&["CONFIG", "SET", "proto-max-bulk-len", "1mb"]).await;
    postgres.execute(LARGE).await;
    let tables = "[[tables]]\nname = 't'\ntable = 'public.t'\nkey = 't:{id}'";
    let daemon = Daemon::with(&Settings::new(&postgres, &redis).tables(tables)).await;
    daemon.allow_warning("rows of t cannot be in redis");
    daemon.ready().await;
    daemon.logged("1 rows of t cannot be in redis").await;
    let loaded = letters(&redis, &postgres).await;
    assert_eq!(loaded.len(), 1, "{loaded:?}");
    let letter = &loaded[0];
    assert_eq!((letter["table"].as_str(), letter["key"].as_str(), letter["xid"].as_str()), ("t", "t:2", "0"));
    assert!(is_lsn(&letter["lsn"]) && letter["reason"].contains("1500000"), "{letter:?}");
    let row: Value = serde_json::from_str(&letter["row"]).unwrap();
    assert_eq!((&row["id"], &row["small"]), (&json!("2"), &json!("loaded")));
    assert!(row["v"].as_str().unwrap().ends_with("xxx… (1500000 bytes)") && letter["row"].len() < 10_000);

    // By the stream: the whole transaction but that row, and the older version of it goes.
    let client = postgres.client().await;
    client
        .batch_execute("BEGIN; UPDATE t SET v = repeat('y', 2000000) WHERE id = 1; INSERT INTO t VALUES (3, 'too', '')")
        .await
        .unwrap();
    let xid = client.query_one("SELECT pg_current_xact_id()::text", &[]).await.unwrap().get::<_, String>(0);
    client.batch_execute("COMMIT").await.unwrap();
    daemon.applied(postgres.position().await).await;
    assert_eq!(redis.keys("t:*").await, ["t:3"]);
    let letter = letters(&redis, &postgres).await.pop().unwrap();
    assert_eq!((letter["key"].as_str(), &letter["xid"]), ("t:1", &xid));
    assert!(is_lsn(&letter["lsn"]) && letter["reason"].contains("2000000"), "{letter:?}");
    let row: Value = serde_json::from_str(&letter["row"]).unwrap();
    assert!(row["small"] == "ü" && row["v"].as_str().unwrap().starts_with("yyyy"), "{row:.300}");
    assert_eq!(daemon.metrics().await[r#"prefetchd_dead_letters_total{reason="too_large",table="t"}"#], 2.0);

    // To compare finds them, and does not count them again.
    let found = daemon.operate("verify", &json!({"repair": true})).await.json();
    assert_eq!((&found["missing"], &found["orphaned"], &found["rows"]), (&json!(0), &json!(0), &json!(1)), "{found}");
    assert_eq!(daemon.status().await["dead_letters"], 2);
    // Once it fits, it is a row as any other.
    let lsn = postgres.execute("UPDATE t SET v = 'small again' WHERE id < 3").await;
    daemon.applied(lsn).await;
    assert_eq!(redis.keys("t:*").await, ["t:1", "t:2", "t:3"]);
    assert_eq!(redis.hash("t:1").await["small"], "ü");
    daemon.ready().await;
}

/// A replica identity index asks for NOT NULL; but for a moment, another table may stand in its place.
#[tokio::test]
async fn a_row_without_a_key_is_a_dead_letter_by_both_ways() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    postgres
        .execute(
            "CREATE TABLE t (id int PRIMARY KEY, code text, v text);
             ALTER TABLE t ADD CONSTRAINT u UNIQUE (code); ALTER TABLE t ALTER code SET NOT NULL;
             ALTER TABLE t REPLICA IDENTITY USING INDEX u;
             INSERT INTO t VALUES (1, 'a', 'one');
             GRANT SELECT ON t TO prefetchd; ALTER PUBLICATION prefetchd ADD TABLE t;
             SET allow_system_table_mods = on;
             UPDATE pg_attribute SET attnotnull = false WHERE attrelid = 't'::regclass AND attname = 'code';
             INSERT INTO t VALUES (2, NULL, 'loaded')",
        )
        .await;
    let tables = "[[tables]]\nname = 't'\ntable = 'public.t'\nkey = 't:{code}'";
    let daemon = Daemon::with(&Settings::new(&postgres, &redis).tables(tables)).await;
    daemon.allow_warning("rows of t cannot be in redis");
    daemon.ready().await;
    let loaded = eventually("a letter", async || letters(&redis, &postgres).await, |all| all.len() == 1).await;
    assert_eq!((loaded[0]["key"].as_str(), loaded[0]["reason"].as_str()), ("", "key column code is NULL"));
    assert!(is_lsn(&loaded[0]["lsn"]), "{loaded:?}");
    assert_eq!(
        serde_json::from_str::<Value>(&loaded[0]["row"]).unwrap(),
        json!({"id": "2", "code": null, "v": "loaded"})
    );
    let lsn = postgres.execute("INSERT INTO t VALUES (3, NULL, 'streamed'), (4, '', 'an empty key is a key')").await;
    daemon.applied(lsn).await;
    let letter = letters(&redis, &postgres).await.pop().unwrap();
    assert_eq!(serde_json::from_str::<Value>(&letter["row"]).unwrap()["v"], "streamed");
    assert!(is_lsn(&letter["lsn"]) && letter["xid"].parse::<u32>().unwrap() > 0, "{letter:?}");
    assert_eq!(redis.keys("t:*").await, ["t:", "t:a"]);
    assert_eq!(daemon.metrics().await[r#"prefetchd_dead_letters_total{reason="null_key",table="t"}"#], 2.0);
}
