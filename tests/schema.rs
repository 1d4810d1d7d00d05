//! Changes of a table that the stream does not announce, and other events behind the daemon's back: it notices them
//! without help.

use crate::harness::{Daemon, Postgres, Redis, Settings, eventually};
use serde_json::Value;
use std::collections::BTreeMap;

const FIRST: &str = "cache:category:cat-001";

async fn becomes(redis: &Redis, key: &str, what: &str, wanted: impl Fn(&BTreeMap<String, String>) -> bool) {
    eventually(what, async || redis.hash(key).await, wanted).await;
}

#[tokio::test]
async fn columns_rewrites_and_names_are_followed_without_a_change_of_a_row() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let daemon = Daemon::start(&postgres, &redis).await;
    daemon.allow_warnings();
    daemon.ready().await;

    postgres.execute("ALTER TABLE categories ADD COLUMN season text DEFAULT 'all'").await;
    becomes(&redis, FIRST, "a column with a default", |row| row.get("season").is_some_and(|s| s == "all")).await;

    // Another column of the same name and type: the stream describes the table as before.
    postgres.execute("ALTER TABLE categories DROP COLUMN season, ADD COLUMN season text").await;
    becomes(&redis, FIRST, "a column in place of another", |row| {
        !row.is_empty() && row.get("season").is_none_or(|season| season != "all")
    })
    .await;

    postgres.execute("ALTER TABLE categories DROP COLUMN season").await;
    becomes(&redis, FIRST, "a dropped column", |row| !row.is_empty() && !row.contains_key("season")).await;

    postgres.execute("ALTER TABLE categories ALTER COLUMN name TYPE text USING upper(name)").await;
    becomes(&redis, FIRST, "a rewrite in place", |row| row["name"] == "BEVERAGES").await;
    daemon.ready().await;

    // Under another name, its changes belong to another table.
    postgres.execute("ALTER TABLE categories RENAME TO elsewhere").await;
    let gone = |status: &serde_json::Value| status["tables"][0]["loaded"] == false;
    daemon.status_when("the table is missed", gone).await;
    assert_eq!(daemon.get("/readyz").await.status, 503);
    postgres.execute("UPDATE elsewhere SET name = 'Tea' WHERE id = 'cat-001'").await;
    postgres.execute("ALTER TABLE elsewhere RENAME TO categories").await;
    becomes(&redis, FIRST, "what changed under the other name", |row| row["name"] == "Tea").await;
    daemon.ready().await;
    let heals = daemon.metrics().await[r#"prefetchd_heals_total{reason="schema"}"#];
    assert!(heals >= 4.0, "{heals}");
}

#[tokio::test]
async fn a_rewrite_while_the_daemon_was_away_is_noticed() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let settings = Settings::new(&postgres, &redis);
    let daemon = Daemon::with(&settings).await;
    daemon.ready().await;
    assert_eq!(daemon.stop().await, Some(0));
    postgres.execute("ALTER TABLE categories ALTER COLUMN name TYPE text USING upper(name)").await;
    let daemon = Daemon::with(&settings).await;
    becomes(&redis, FIRST, "the rewrite", |row| row["name"] == "BEVERAGES").await;
    daemon.ready().await;
}

#[tokio::test]
async fn partitions_and_enum_labels_are_followed() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    postgres
        .execute(
            "CREATE TYPE mood AS ENUM ('good', 'bad');
             CREATE TABLE parts (id int PRIMARY KEY, m mood) PARTITION BY RANGE (id);
             CREATE TABLE parts_1 PARTITION OF parts FOR VALUES FROM (1) TO (100);
             CREATE TABLE parts_2 (id int PRIMARY KEY, m mood);
             INSERT INTO parts SELECT id, 'good' FROM generate_series(1, 50) id;
             INSERT INTO parts_2 VALUES (100, 'bad');
             GRANT SELECT ON parts, parts_1, parts_2 TO prefetchd;
             ALTER PUBLICATION prefetchd ADD TABLE parts",
        )
        .await;
    let table = "[[tables]]\nname = \"parts\"\ntable = \"public.parts\"\nkey = \"part:{id}\"\n";
    let daemon = Daemon::with(&Settings::new(&postgres, &redis).tables(table)).await;
    daemon.ready().await;
    assert_eq!(redis.keys("part:*").await.len(), 50);
    let rows_loaded = async || daemon.metrics().await["prefetchd_rows_loaded_total{table=\"parts\"}"];
    let before = rows_loaded().await;

    postgres.execute("ALTER TABLE parts ATTACH PARTITION parts_2 FOR VALUES FROM (100) TO (200)").await;
    becomes(&redis, "part:100", "an attached partition", |row| row.get("m").is_some_and(|m| m == "bad")).await;
    daemon.ready().await;
    let read = rows_loaded().await - before;
    assert!((1.0..50.0).contains(&read), "only the new partition is read: {read} rows");
    postgres.execute("ALTER TYPE mood RENAME VALUE 'bad' TO 'sad'").await;
    becomes(&redis, "part:100", "a renamed label", |row| row["m"] == "sad").await;
    postgres
        .execute(
            "ALTER TABLE parts DETACH PARTITION parts_2;
             INSERT INTO parts_2 VALUES (101, 'sad');
             ALTER TABLE parts ATTACH PARTITION parts_2 FOR VALUES FROM (100) TO (200)",
        )
        .await;
    becomes(&redis, "part:101", "a row from while it was detached", |row| row.get("m").is_some_and(|m| m == "sad"))
        .await;
    daemon.ready().await;
    postgres.execute("ALTER TABLE parts DETACH PARTITION parts_2").await;
    eventually("a detached partition", async || redis.keys("part:*").await, |keys| keys.len() == 50).await;
    daemon.ready().await;
}

#[tokio::test]
async fn a_publication_that_was_made_anew_gets_a_new_slot() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let daemon = Daemon::start(&postgres, &redis).await;
    daemon.allow_warnings();
    daemon.ready().await;
    postgres.execute("DROP PUBLICATION prefetchd").await;
    postgres.execute("UPDATE categories SET name = 'Drinks' WHERE id = 'cat-001'").await;
    postgres
        .execute("CREATE PUBLICATION prefetchd FOR TABLE categories WITH (publish_via_partition_root = true)")
        .await;
    becomes(&redis, FIRST, "the change in between", |row| row["name"] == "Drinks").await;
    let lsn = postgres.execute("UPDATE categories SET name = 'Tea' WHERE id = 'cat-001'").await;
    daemon.applied(lsn).await;
    daemon.ready().await;
    assert_eq!(redis.hash(FIRST).await["name"], "Tea");
}

#[tokio::test]
async fn a_redis_without_memory_still_answers_reads() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let daemon = Daemon::start(&postgres, &redis).await;
    daemon.allow_warnings();
    daemon.ready().await;
    redis.command::<()>(&["CONFIG", "SET", "maxmemory", "1"]).await;
    let lsn = postgres.execute("UPDATE categories SET name = 'Drinks' WHERE id = 'cat-001'").await;
    let stalled = |status: &serde_json::Value| status["waiting_for"].as_str().is_some_and(|w| w.contains("OOM"));
    daemon.status_when("redis is full", stalled).await;
    let answer = daemon.get("/v1/tables/categories/cat-001").await;
    assert_eq!(answer.status, 200, "{:?}", answer.refusal());
    redis.command::<()>(&["CONFIG", "SET", "maxmemory", "0"]).await;
    daemon.applied(lsn).await;
    daemon.ready().await;
}

/// What happened in between was not sent, and nothing in the stream says so.
#[tokio::test]
async fn a_table_that_left_the_publication_for_a_moment_is_loaded_again() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let daemon = Daemon::start(&postgres, &redis).await;
    daemon.allow_warnings();
    daemon.ready().await;
    postgres
        .execute(
            "ALTER PUBLICATION prefetchd DROP TABLE categories; COMMIT;
             UPDATE categories SET name = 'Unheard' WHERE id = 'cat-001'; DELETE FROM categories WHERE id = 'cat-002'; COMMIT;
             ALTER PUBLICATION prefetchd ADD TABLE categories",
        )
        .await;
    becomes(&redis, FIRST, "the change in between", |row| row["name"] == "Unheard").await;
    eventually("the deletion too", async || redis.keys("cache:category:*").await, |keys| keys.len() == 4).await;
    daemon.ready().await;
}

/// What a publication does not publish is not sent, and nothing in the stream says so.
#[tokio::test]
async fn a_publication_that_kept_something_to_itself_is_loaded_again() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let daemon = Daemon::start(&postgres, &redis).await;
    daemon.allow_warnings();
    daemon.ready().await;
    let all = "ALTER PUBLICATION prefetchd SET (publish = 'insert, update, delete, truncate')";
    // For a moment only, so that nothing observes it.
    postgres
        .execute(&format!(
            "ALTER PUBLICATION prefetchd SET (publish = 'insert, update'); COMMIT;
             DELETE FROM categories WHERE id = 'cat-005'; COMMIT; {all}"
        ))
        .await;
    let keys = async || redis.keys("cache:category:*").await.len();
    eventually("the deletion arrives", keys, |keys| *keys == 4).await;
    daemon.ready().await;
    // Until somebody fixes it.
    postgres.execute("ALTER PUBLICATION prefetchd SET (publish = 'insert, update')").await;
    let refused =
        |s: &Value| s["waiting_for"].as_str().is_some_and(|w| w.contains("does not publish delete, truncate"));
    daemon.status_when("it says what is missing", |status| status["state"] == "stalled" && refused(status)).await;
    postgres.execute("DELETE FROM categories WHERE id = 'cat-004'").await;
    assert_eq!(daemon.get("/v1/tables/categories/no-such").await.status, 503, "it may be there by now");
    postgres.execute(all).await;
    eventually("the deletion arrives", keys, |keys| *keys == 3).await;
    daemon.ready().await;
}

/// A table whose columns use types in every way, and one whose types are excluded.
async fn composites(postgres: &Postgres) {
    postgres
        .execute(
            "CREATE TYPE label AS ENUM ('one', 'two');
             CREATE TYPE addr AS (a text, l label);
             CREATE TYPE inner_addr AS (a text);
             CREATE TYPE outer_addr AS (i inner_addr[], n int);
             CREATE DOMAIN home AS addr; CREATE DOMAIN homes AS addr[];
             CREATE TABLE part (a text);
             CREATE TYPE span AS RANGE (subtype = label);
             CREATE TABLE made (id int PRIMARY KEY, plain addr, list addr[], home home, homes homes, nested outer_addr,
                                part part, span span, spans span_multirange);
             INSERT INTO made VALUES (1, ROW('x', 'one'), ARRAY[ROW('x', 'one')::addr], ROW('x', 'one'),
                                      ARRAY[ROW('x', 'one')::addr], ROW(ARRAY[ROW('x')::inner_addr], 1), ROW('x'),
                                      '[one,two]', '{[one,two]}');
             CREATE TABLE half (id int PRIMARY KEY, v text, plain addr, part part);
             INSERT INTO half VALUES (1, 'v', ROW('x', 'one'), ROW('x'));
             GRANT SELECT ON made, half TO prefetchd;
             ALTER PUBLICATION prefetchd ADD TABLE made, half",
        )
        .await;
}

const COMPOSITES: &str = r#"
[[tables]]
name = "made"
table = "public.made"
key = "made:{id}"
[[tables]]
name = "half"
table = "public.half"
key = "half:{id}"
columns = ["id", "v"]
"#;

async fn row_of_made(postgres: &Postgres) -> BTreeMap<String, String> {
    let columns = ["id", "plain", "list", "home", "homes", "nested", "part", "span", "spans"];
    let mut row = BTreeMap::new();
    for column in columns {
        let value = postgres.value(&format!("SELECT {column}::text FROM made")).await;
        row.insert(column.to_owned(), value.unwrap());
    }
    row
}

#[tokio::test]
async fn what_types_are_made_of_is_followed_and_other_types_are_not() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    composites(&postgres).await;
    let settings = Settings::new(&postgres, &redis).tables(COMPOSITES);
    let mut daemon = Daemon::with(&settings).await;
    daemon.ready().await;
    assert_eq!(redis.hash("made:1").await, row_of_made(&postgres).await);
    let loads = |daemon: &Daemon, table: &str| {
        daemon.said(&format!(" of {table} in ")) + daemon.said(&format!("comparing {table}"))
    };
    for (at, change) in [
        "ALTER TYPE addr ADD ATTRIBUTE c text",
        "ALTER TYPE inner_addr ADD ATTRIBUTE c text",
        "ALTER TABLE part ADD COLUMN c text",
        "ALTER TYPE label RENAME VALUE 'two' TO 'three'",
        "ALTER TYPE addr DROP ATTRIBUTE a",
    ]
    .into_iter()
    .enumerate()
    {
        let before = row_of_made(&postgres).await;
        let (began, away) = (std::time::Instant::now(), at == 1 || at == 3);
        if away {
            assert_eq!(daemon.stop().await, Some(0));
            postgres.execute(change).await;
            daemon = Daemon::with(&settings).await;
        } else {
            postgres.execute(change).await;
        }
        let after = row_of_made(&postgres).await;
        assert_ne!(before, after, "{change}");
        becomes(&redis, "made:1", change, |row| *row == after).await;
        // A busy machine may be slower.
        assert!(began.elapsed().as_secs() < 30, "{change}: {:?}", began.elapsed());
        daemon.ready().await;
        assert_eq!(loads(&daemon, "half"), usize::from(at == 0), "{change} concerns no column of it that is cached");
    }

    // None of these is reached by a cached column.
    let before = (loads(&daemon, "made"), loads(&daemon, "half"));
    assert_eq!(before.1, 0, "its composite columns are not cached: {}", daemon.log_text());
    postgres
        .execute(
            "CREATE SCHEMA elsewhere; CREATE TYPE elsewhere.e AS ENUM ('a', 'b'); CREATE TYPE elsewhere.c AS (a int);
             CREATE TABLE elsewhere.t (e elsewhere.e, c elsewhere.c);
             ALTER TYPE elsewhere.e RENAME VALUE 'a' TO 'c'; ALTER TYPE elsewhere.c ADD ATTRIBUTE b int",
        )
        .await;
    // Two checks, a second apart.
    tokio::time::sleep(std::time::Duration::from_secs(3)).await;
    assert_eq!((loads(&daemon, "made"), loads(&daemon, "half")), before, "{}", daemon.log_text());
    assert_eq!(redis.hash("made:1").await, row_of_made(&postgres).await);
}

#[tokio::test]
async fn a_table_that_was_made_again_is_published_again_where_the_publication_is_ours() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let make = "CREATE TABLE again (id int PRIMARY KEY, v text); INSERT INTO again VALUES (1, 'x')";
    postgres.execute(make).await;
    let settings = Settings::new(&postgres, &redis)
        .text("postgres.url", &postgres.url("postgres"))
        .text("postgres.publication", "ours")
        .tables("[[tables]]\nname = \"again\"\ntable = \"public.again\"\nkey = \"again:{id}\"\n");
    let daemon = Daemon::with(&settings).await;
    daemon.allow_warnings();
    daemon.ready().await;
    postgres.execute("DROP TABLE again").await;
    daemon.status_when("it is missed", |status| status["tables"][0]["loaded"] == false).await;
    postgres.execute(make).await;
    postgres.execute("INSERT INTO again VALUES (2, 'y')").await;
    eventually("both rows", async || redis.keys("again:*").await, |keys| keys == &["again:1", "again:2"]).await;
    daemon.ready().await;
    let lsn = postgres.execute("INSERT INTO again VALUES (3, 'z'); DELETE FROM again WHERE id = 1").await;
    daemon.applied(lsn).await;
    assert_eq!(redis.keys("again:*").await, ["again:2", "again:3"]);
}

fn makes_the_slot(status: &Value) -> bool {
    let waits = status["waiting_for"].as_str().unwrap_or_default();
    waits.contains("the replication slot is being made") || waits.contains("slot creation waits")
}

#[tokio::test]
async fn a_first_start_that_waits_for_its_slot_is_loading() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let client = postgres.client().await;
    client.batch_execute("BEGIN; UPDATE categories SET name = 'x' WHERE id = 'cat-001'").await.unwrap();
    let settings = Settings::new(&postgres, &redis);
    for _ in 0..2 {
        let daemon = Daemon::with(&settings).await;
        // From the moment when it creates the slot: before that it cannot know what Redis has.
        daemon.status_when("it waits", makes_the_slot).await;
        let answer = daemon.get("/v1/tables/categories/cat-001").await;
        assert_eq!((answer.status, answer.json()["error"].as_str()), (503, Some("loading")), "{answer:?}");
        let ready = daemon.get("/readyz").await;
        assert!(ready.body.contains("categories is loading"), "{ready:?}");
        daemon.logged("slot creation waits for running transactions").await;
        let answer = daemon.get("/v1/tables/categories/cat-001").await;
        assert_eq!((answer.status, answer.json()["error"].as_str()), (503, Some("loading")), "{answer:?}");
        daemon.kill9();
    }
    let daemon = Daemon::with(&settings).await;
    client.batch_execute("COMMIT").await.unwrap();
    daemon.ready().await;
    assert_eq!(redis.hash(FIRST).await["name"], "x");
}

/// A truncated table has new files, as after VACUUM FULL; only the latter is followed by a load.
#[tokio::test]
async fn a_truncate_is_no_reason_to_read_the_table_again_and_what_comes_with_it_is() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    postgres
        .execute(
            "CREATE TABLE other (id int PRIMARY KEY); INSERT INTO other VALUES (1);
             CREATE TABLE parts (id int PRIMARY KEY, v text) PARTITION BY RANGE (id);
             CREATE TABLE parts_1 PARTITION OF parts FOR VALUES FROM (1) TO (100);
             CREATE TABLE parts_2 PARTITION OF parts FOR VALUES FROM (100) TO (200);
             INSERT INTO parts VALUES (1, 'a'), (100, 'b');
             GRANT SELECT ON other, parts, parts_1, parts_2 TO prefetchd;
             ALTER PUBLICATION prefetchd ADD TABLE other, parts",
        )
        .await;
    let table =
        |name: &str, of: &str| format!("[[tables]]\nname = '{name}'\ntable = 'public.{of}'\nkey = '{name}:{{id}}'\n");
    // Checked in this order, so what is seen of the last one comes after a check of the others.
    let tables = table("cat", "categories") + &table("part", "parts") + &table("other", "other");
    let daemon = Daemon::with(&Settings::new(&postgres, &redis).tables(&tables)).await;
    daemon.ready().await;
    let reads = async || daemon.status().await["primary_reads"].as_u64().unwrap();
    let loads = |name: &str| daemon.said(&format!("loading {name}: its rows were written anew"));
    let looked_at = async |times: usize| {
        postgres.execute("VACUUM FULL other").await;
        // Its load ends with a checkpoint, which contains what was seen of the others.
        let loaded = async || daemon.said("loaded 1 row of other");
        eventually("a look at the catalog", loaded, |count| *count == 1 + times).await;
    };
    assert_eq!(reads().await, 3);
    postgres.execute("TRUNCATE categories, parts").await;
    let lsn = postgres
        .execute("INSERT INTO categories VALUES ('new', 'n', 1, false, NULL); INSERT INTO parts VALUES (2, 'c')")
        .await;
    daemon.applied(lsn).await;
    looked_at(1).await;
    assert_eq!((loads("cat"), loads("part"), reads().await), (0, 0, 4), "only what was written anew");
    assert_eq!([redis.keys("cat:*").await, redis.keys("part:*").await], [["cat:new"], ["part:2"]]);

    // Rows that were rewritten, in the transaction that truncated or after it.
    for (n, sql) in [
        "BEGIN; TRUNCATE parts; INSERT INTO parts VALUES (3, 'd');
         ALTER TABLE parts ALTER v TYPE text USING upper(v); COMMIT",
        "TRUNCATE parts; COMMIT; INSERT INTO parts VALUES (3, 'e'); ALTER TABLE parts ALTER v TYPE text USING upper(v)",
    ]
    .into_iter()
    .enumerate()
    {
        postgres.execute(sql).await;
        let wanted = ["D", "E"][n];
        becomes(&redis, "part:3", "what was written anew", |row| row.get("v").is_some_and(|v| v == wanted)).await;
        daemon.ready().await;
    }
    // The next run begins with the files as they are now.
    let lsn = postgres.execute("TRUNCATE categories").await;
    daemon.applied(lsn).await;
    looked_at(2).await;
    assert_eq!(loads("cat"), 0);
    assert_eq!(daemon.stop().await, Some(0));
    let daemon = Daemon::with(&Settings::new(&postgres, &redis).tables(&tables)).await;
    daemon.ready().await;
    assert_eq!(daemon.status().await["primary_reads"], 0);
}
