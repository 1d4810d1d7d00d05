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
    let postgres = server.another_database_in("SQL_ASCII");
    let (url, settings) = (postgres.url("postgres"), Settings::new(&postgres, &redis));
    let daemon = Daemon::with(&settings).await;
    daemon.ready().await;
    daemon.allow_warnings();
    psql(&url, "INSERT INTO categories VALUES ('cat-006', 'Fine', 6, false, NULL)");
    daemon.status_when("applied", |status| status["sync_events_applied"] == 1).await;
    // In a transaction that stays open while others commit after it: Redis then has positions beyond the change, but
    // has not passed it.
    let (bad, connection) = tokio_postgres::connect(&url, tokio_postgres::NoTls).await.unwrap();
    tokio::spawn(connection);
    bad.batch_execute(r"BEGIN; INSERT INTO categories VALUES ('bad', E'\xff', 7, false, NULL)").await.unwrap();
    psql(&url, "UPDATE categories SET display_order = 7 WHERE id = 'cat-006'");
    daemon.status_when("applied", |status| status["sync_events_applied"] == 2).await;
    bad.batch_execute("COMMIT").await.unwrap();
    let at = stuck_at(&daemon).await;
    daemon.logged("the stream is stuck").await;
    // What follows it waits, including the deletion of the row that causes the problem.
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
    let tables = T;
    let daemon = Daemon::with(&Settings::new(&postgres, &redis).tables(tables)).await;
    daemon.allow_warning("of t cannot be in redis");
    daemon.ready().await;
    daemon.logged("1 row of t cannot be in redis").await;
    let loaded = letters(&redis, &postgres).await;
    assert_eq!(loaded.len(), 1, "{loaded:?}");
    let letter = &loaded[0];
    assert_eq!((letter["table"].as_str(), letter["key"].as_str(), letter["xid"].as_str()), ("t", "t:2", "0"));
    assert!(is_lsn(&letter["lsn"]) && letter["reason"].contains("1500000"), "{letter:?}");
    let row: Value = serde_json::from_str(&letter["row"]).unwrap();
    assert_eq!((&row["id"], &row["small"]), (&json!("2"), &json!("loaded")));
    assert!(row["v"].as_str().unwrap().ends_with("xxx… (1500000 bytes)") && letter["row"].len() < 10_000);

    // By the stream: the whole transaction except that row, whose older version is removed.
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

    // A comparison finds them but does not count them again.
    let found = daemon.operate("verify", &json!({"repair": true})).await.json();
    assert_eq!((&found["missing"], &found["orphaned"], &found["rows"]), (&json!(0), &json!(0), &json!(1)), "{found}");
    assert_eq!(daemon.status().await["dead_letters"], 2);
    // Once it fits, it is a row like any other.
    let lsn = postgres.execute("UPDATE t SET v = 'small again' WHERE id < 3").await;
    daemon.applied(lsn).await;
    assert_eq!(redis.keys("t:*").await, ["t:1", "t:2", "t:3"]);
    assert_eq!(redis.hash("t:1").await["small"], "ü");
    daemon.ready().await;
}

/// A replica identity index requires NOT NULL; but for a moment, another table may take its place.
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
    daemon.allow_warning("of t cannot be in redis");
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

const T: &str = "[[tables]]\nname = 't'\ntable = 'public.t'\nkey = 't:{id}'";

/// A Redis with a limit that the second row of [`LARGE`] exceeds.
async fn small_values() -> Redis {
    let redis = Redis::start();
    redis.command::<()>(&["CONFIG", "SET", "proto-max-bulk-len", "1mb"]).await;
    redis
}

async fn codes(daemon: &Daemon, ids: &[&str]) -> Vec<String> {
    let mut codes = Vec::new();
    for id in ids {
        let answer = daemon.get(&format!("/v1/tables/t/{id}")).await;
        codes.push(if answer.status == 200 { "row".to_owned() } else { answer.refusal().1 });
    }
    codes
}

async fn recorded(redis: &Redis) -> usize {
    redis.keys("prefetchd:*:dead-keys:*").await.len()
}

#[tokio::test]
async fn a_dead_letter_is_never_called_a_row_that_does_not_exist() {
    let (postgres, redis) = (Postgres::shared(), small_values().await);
    postgres.execute(LARGE).await;
    let settings = Settings::new(&postgres, &redis).tables(T);
    let daemon = Daemon::with(&settings).await;
    daemon.allow_warning("of t cannot be in redis");
    daemon.ready().await;
    assert_eq!(codes(&daemon, &["1", "2", "99"]).await, ["row", "dead_letter", "not_found"]);
    let lsn =
        postgres.execute("UPDATE t SET v = repeat('y', 2000000) WHERE id = 1; INSERT INTO t VALUES (3, '', '')").await;
    daemon.applied(lsn).await;
    assert_eq!(codes(&daemon, &["1", "2", "3", "99"]).await, ["dead_letter", "dead_letter", "row", "not_found"]);
    let refused = daemon.get("/v1/tables/t/1").await;
    assert_eq!(refused.status, 503);
    assert!(refused.body.contains("row 1 of t") && refused.body.contains("too_large"), "{refused:?}");
    // One of several rows is enough, wherever it is in the list.
    assert_eq!(daemon.get("/v1/tables/t?key=3&key=99&key=2").await.refusal(), (503, "dead_letter".to_owned()));
    let several = daemon.get("/v1/tables/t?key=3&key=99").await;
    assert_eq!((several.status, &several.json()["rows"]["99"]), (200, &Value::Null));

    let status = daemon.status_when("listed", |status| status["dead_letter_keys"].as_array().unwrap().len() == 2).await;
    assert_eq!((&status["dead_letters"], &status["tables"][0]["dead_letters"]), (&json!(2), &json!(2)));
    let listed = &status["dead_letter_keys"][0];
    assert_eq!(
        (&listed["key"], &listed["table"], &listed["reason"]),
        (&json!("t:1"), &json!("t"), &json!("too_large"))
    );
    assert!(is_lsn(listed["lsn"].as_str().unwrap()), "{listed}");
    let shown = run_program(&settings, &["status", "--url", &format!("http://{}", daemon.address())]).await;
    assert!(shown.stdout.contains("t:2") && shown.stdout.contains("too_large"), "{shown:?}");

    // The next run knows it, too, however this one ends.
    assert_eq!(daemon.stop().await, Some(0));
    let daemon = Daemon::with(&settings).await;
    daemon.ready().await;
    assert_eq!(codes(&daemon, &["1", "2", "3", "99"]).await, ["dead_letter", "dead_letter", "row", "not_found"]);
    assert_eq!(
        (&daemon.status().await["primary_reads"], &daemon.status().await["dead_letters"]),
        (&json!(0), &json!(2))
    );
    daemon.kill9();
    postgres.execute("INSERT INTO t VALUES (5, 'while nobody ran', repeat('z', 1200000))").await;
    let daemon = Daemon::with(&settings).await;
    daemon.allow_warning("of t cannot be in redis");
    daemon.ready().await;
    assert_eq!(
        codes(&daemon, &["1", "2", "5", "99"]).await,
        ["dead_letter", "dead_letter", "dead_letter", "not_found"]
    );

    redis.flush().await;
    daemon.allow_warnings();
    daemon.status_when("healed", |status| status["last_load"]["reason"] != Value::Null).await;
    daemon.ready().await;
    assert_eq!(codes(&daemon, &["1", "2", "3", "99"]).await, ["dead_letter", "dead_letter", "row", "not_found"]);

    // It becomes smaller, is deleted, or gets another key.
    let lsn = postgres.execute("UPDATE t SET v = 'small' WHERE id = 1; DELETE FROM t WHERE id = 2").await;
    daemon.applied(lsn).await;
    assert_eq!(codes(&daemon, &["1", "2"]).await, ["row", "not_found"]);
    let lsn = postgres.execute("UPDATE t SET id = 6 WHERE id = 5; UPDATE t SET id = 7 WHERE id = 3").await;
    daemon.applied(lsn).await;
    daemon.ready().await;
    assert_eq!(codes(&daemon, &["3", "5", "6", "7"]).await, ["not_found", "not_found", "dead_letter", "row"]);
    assert_eq!(daemon.status().await["dead_letters"], 1);
    // Its large value is not sent, so the row is read again.
    let lsn = postgres.execute("UPDATE t SET small = 'changed' WHERE id = 6").await;
    daemon.applied(lsn).await;
    daemon.ready().await;
    assert_eq!(codes(&daemon, &["6", "7"]).await, ["dead_letter", "row"]);
    // An operator removes keys: the row is still too large.
    daemon.operate("invalidate", &json!({"table": "t", "keys": ["6"]})).await;
    assert_eq!(codes(&daemon, &["6", "99"]).await, ["dead_letter", "not_found"]);

    let lsn = postgres.execute("INSERT INTO t VALUES (8, '', repeat('8', 1200000)); TRUNCATE t").await;
    daemon.applied(lsn).await;
    assert_eq!(codes(&daemon, &["1", "6", "8"]).await, ["not_found", "not_found", "not_found"]);
    assert_eq!((daemon.status().await["dead_letters"].clone(), recorded(&redis).await), (json!(0), 0));
    let lsn = postgres.execute("BEGIN; TRUNCATE t; INSERT INTO t VALUES (9, '', repeat('9', 1200000)); COMMIT").await;
    daemon.applied(lsn).await;
    assert_eq!(codes(&daemon, &["8", "9"]).await, ["not_found", "dead_letter"]);
    assert_eq!(daemon.stop().await, Some(0));
    let removed = run_program(&settings, &["teardown", "--keys"]).await;
    assert_eq!((removed.code, recorded(&redis).await), (Some(0), 0), "{removed:?}");
}

#[tokio::test]
async fn a_dead_letter_that_redis_takes_after_all_is_a_row_again() {
    let (postgres, redis) = (Postgres::shared(), small_values().await);
    postgres.execute(LARGE).await;
    let settings = Settings::new(&postgres, &redis).tables(T);
    let daemon = Daemon::with(&settings).await;
    daemon.allow_warning("of t cannot be in redis");
    daemon.ready().await;
    let lsn = postgres.execute("INSERT INTO t VALUES (3, '', repeat('3', 1200000))").await;
    daemon.applied(lsn).await;
    // Found again and again, but reported once.
    for _ in 0..2 {
        for (operation, body) in [("verify", json!({"repair": true})), ("refetch", json!({}))] {
            let found = daemon.operate(operation, &body).await;
            assert_eq!((found.status, &found.json()["repaired"]), (200, &json!(0)), "{found:?}");
            let found = daemon.operate("verify", &json!({})).await.json();
            assert_eq!((&found["missing"], &found["stale"], &found["orphaned"]), (&json!(0), &json!(0), &json!(0)));
        }
    }
    assert_eq!(codes(&daemon, &["2", "3", "99"]).await, ["dead_letter", "dead_letter", "not_found"]);
    assert_eq!(letters(&redis, &postgres).await.len(), 2);
    // Something else is written in its place, and the records are removed: drift, as for any row.
    redis.command::<()>(&["HSET", "t:2", "id", "2"]).await;
    for key in redis.keys("prefetchd:*:dead-keys:*").await {
        redis.command::<()>(&["DEL", &key]).await;
    }
    daemon.allow_warning("stale");
    let found = daemon.operate("verify", &json!({"repair": true})).await.json();
    assert_eq!((&found["missing"], &found["stale"], &found["repaired"]), (&json!(0), &json!(1), &json!(1)), "{found}");
    assert_eq!(codes(&daemon, &["2", "3", "99"]).await, ["dead_letter", "dead_letter", "not_found"]);

    redis.command::<()>(&["CONFIG", "SET", "proto-max-bulk-len", "512mb"]).await;
    assert_eq!(daemon.stop().await, Some(0));
    let daemon = Daemon::with(&settings).await;
    daemon.ready().await;
    assert_eq!(codes(&daemon, &["2", "3", "99"]).await, ["dead_letter", "dead_letter", "not_found"]);
    let lsn = postgres.execute("UPDATE t SET small = 'changed' WHERE id = 3").await;
    daemon.applied(lsn).await;
    daemon.ready().await;
    assert_eq!(codes(&daemon, &["2", "3"]).await, ["dead_letter", "row"]);
    let loaded = daemon.operate("refetch", &json!({"table": "t"})).await.json();
    assert_eq!(loaded["repaired"], 1, "{loaded}");
    assert_eq!(codes(&daemon, &["2", "3"]).await, ["row", "row"]);
    assert_eq!((daemon.status().await["dead_letters"].clone(), recorded(&redis).await), (json!(0), 0));
}

#[tokio::test]
async fn a_standby_knows_the_dead_letters_and_takes_them_over() {
    let (postgres, redis) = (Postgres::shared(), small_values().await);
    postgres.execute(LARGE).await;
    let settings = Settings::new(&postgres, &redis).tables(T);
    let active = Daemon::with(&settings).await;
    active.allow_warning("of t cannot be in redis");
    active.ready().await;
    let standby = Daemon::with(&settings).await;
    standby.status_when("standby", |status| status["state"] == "standby").await;
    standby.ready().await;
    let lsn = postgres.execute("INSERT INTO t VALUES (3, '', repeat('3', 1200000))").await;
    let answer = standby.get(&format!("/v1/tables/t/3?min_lsn={lsn}&wait=30s")).await;
    assert_eq!(answer.refusal(), (503, "dead_letter".to_owned()));
    assert_eq!(codes(&standby, &["1", "2", "99"]).await, ["row", "dead_letter", "not_found"]);
    standby.status_when("counted", |status| status["dead_letters"] == 2).await;
    active.kill9();
    standby.status_when("active", |status| status["state"] == "streaming").await;
    standby.ready().await;
    assert_eq!(codes(&standby, &["1", "2", "3", "99"]).await, ["row", "dead_letter", "dead_letter", "not_found"]);
}

/// Keys of 2.6 kB, of which a hundred fill the space for records.
#[tokio::test]
async fn beyond_the_dead_letters_that_are_kept_track_of_no_row_is_said_not_to_exist() {
    let (postgres, redis) = (Postgres::shared(), small_values().await);
    postgres
        .execute(
            "CREATE TABLE t (id text PRIMARY KEY, v text);
             INSERT INTO t SELECT lpad(n::text, 2600, 'k'), repeat('x', 1100000) FROM generate_series(1, 110) n;
             INSERT INTO t VALUES ('small', '');
             GRANT SELECT ON t TO prefetchd; ALTER PUBLICATION prefetchd ADD TABLE t",
        )
        .await;
    let settings = Settings::new(&postgres, &redis).tables(T);
    let daemon = Daemon::with(&settings).await;
    daemon.allow_warning("of t cannot be in redis");
    daemon.ready().await;
    assert_eq!(codes(&daemon, &["small", "nobody"]).await, ["row", "dead_letter"]);
    let status = daemon.status_when("counted", |status| status["tables"][0]["more_dead_letters"] == true).await;
    assert_eq!(status["dead_letters"], 100);
    assert_eq!(daemon.stop().await, Some(0));
    let daemon = Daemon::with(&settings).await;
    daemon.ready().await;
    assert_eq!(codes(&daemon, &["small", "nobody"]).await, ["row", "dead_letter"]);
    // It is unknown before a load which ones are left, and some are recorded only then.
    daemon.allow_warning("of t cannot be in redis");
    let lsn = postgres.execute("DELETE FROM t WHERE id LIKE 'k%' AND id NOT LIKE '%7'").await;
    daemon.applied(lsn).await;
    assert_eq!(codes(&daemon, &["small", "nobody"]).await, ["row", "dead_letter"]);
    assert_eq!(daemon.operate("refetch", &json!({})).await.status, 200);
    assert_eq!(codes(&daemon, &["small", "nobody"]).await, ["row", "not_found"]);
    let status = daemon.status_when("counted", |status| status["tables"][0]["more_dead_letters"] == false).await;
    assert_eq!(status["dead_letters"], 11);
}
