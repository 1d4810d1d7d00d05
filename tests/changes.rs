//! The change stream: an entry for each key that a batch changes, in commit order, and none twice, whatever fails. A consumer
//! that starts over when it is told to knows what Redis has.

use crate::harness::consumer::{Consumer, Entry};
use crate::harness::{Cluster, Daemon, Postgres, Redis, Settings, Stop, eventually, run_program};
use prefetchd::lsn::Lsn;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::json;
use std::time::Duration;
use tokio::time::sleep;

const STREAM: &str = "changes";

async fn entries(redis: &Redis) -> Vec<Entry> {
    let entries: Vec<(String, Entry)> = redis.command(&["XRANGE", STREAM, "-", "+"]).await;
    entries.into_iter().map(|(_, fields)| fields).collect()
}

/// Takes what was announced since the last call: operation, table and key.
async fn news(redis: &Redis) -> Vec<String> {
    let entries = entries(redis).await;
    redis.command::<i64>(&["XTRIM", STREAM, "MAXLEN", "0"]).await;
    let text = |entry: &Entry| {
        let key = entry.get("key").map_or(String::new(), |key| format!(" {key}"));
        format!("{} {}{key}", entry["op"], entry["table"])
    };
    entries.iter().map(text).collect()
}

fn announcing(postgres: &Postgres, redis: &Redis) -> Settings {
    Settings::new(postgres, redis).text("changes.stream", STREAM)
}

#[tokio::test]
async fn each_key_that_a_transaction_changes_is_announced_in_the_order_of_its_last_change() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let daemon = Daemon::with(&announcing(&postgres, &redis)).await;
    daemon.ready().await;
    assert_eq!(news(&redis).await, ["loaded categories"]);
    let lsn = postgres
        .execute(
            "BEGIN; INSERT INTO categories (id, name) VALUES ('a', 'A'), ('b', 'B'), ('c', 'C');
             UPDATE categories SET name = 'AA' WHERE id = 'a';
             UPDATE categories SET id = 'd' WHERE id = 'b'; DELETE FROM categories WHERE id = 'c'; COMMIT",
        )
        .await;
    daemon.applied(lsn).await;
    let found = entries(&redis).await;
    let told: Vec<_> = found.iter().map(|entry| (entry["op"].as_str(), entry["key"].as_str())).collect();
    let key = |id: &str| format!("cache:category:{id}");
    let wanted = [("upsert", key("a")), ("delete", key("b")), ("upsert", key("d")), ("delete", key("c"))];
    assert_eq!(told, wanted.iter().map(|(op, key)| (*op, key.as_str())).collect::<Vec<_>>());
    let xid: u64 = found[0]["xid"].parse().unwrap();
    let micros: i64 = found[0]["time"].parse().unwrap();
    let now: f64 = postgres.value("SELECT extract(epoch FROM now())").await.unwrap().parse().unwrap();
    assert!((now - micros as f64 / 1e6).abs() < 60.0 && xid > 0, "{found:?}");
    for entry in &found {
        assert_eq!(
            (&entry["xid"], &entry["time"], &entry["lsn"]),
            (&found[0]["xid"], &found[0]["time"], &found[0]["lsn"])
        );
        assert!(entry["lsn"].parse::<Lsn>().unwrap() < lsn, "{entry:?}");
        assert_eq!(entry.len(), 6, "{entry:?}");
    }
    redis.command::<i64>(&["XTRIM", STREAM, "MAXLEN", "0"]).await;
    let lsn = postgres
        .execute(
            "BEGIN; INSERT INTO categories (id, name) VALUES ('e', 'E'); TRUNCATE categories;
             INSERT INTO categories (id, name) VALUES ('f', 'F'); COMMIT",
        )
        .await;
    daemon.applied(lsn).await;
    let told = news(&redis).await;
    // Its rows were written anew, which the stream of Postgres does not explain.
    assert_eq!(told[..2], ["truncate categories", "upsert categories cache:category:f"], "{told:?}");
    assert_eq!(daemon.stop().await, Some(0));
}

#[tokio::test]
async fn what_is_changed_beside_the_stream_of_postgres_is_announced_as_loaded() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let settings = announcing(&postgres, &redis);
    let daemon = Daemon::with(&settings).await;
    daemon.ready().await;
    assert_eq!(news(&redis).await, ["loaded categories"]);
    assert_eq!(daemon.stop().await, Some(0));

    // Nothing is loaded.
    let daemon = Daemon::with(&settings).await;
    daemon.ready().await;
    let verify = json!({"repair": true});
    // Of what was repaired.
    daemon.allow_warnings();
    assert_eq!(daemon.operate("verify", &verify).await.status, 200);
    assert_eq!(news(&redis).await, Vec::<String>::new(), "nothing has changed");

    redis.command::<()>(&["DEL", "cache:category:cat-001"]).await;
    redis.command::<()>(&["HSET", "cache:category:nobody", "id", "nobody"]).await;
    assert_eq!(daemon.operate("verify", &json!({"repair": false})).await.status, 200);
    assert_eq!(news(&redis).await, Vec::<String>::new(), "nothing was repaired");
    assert_eq!(daemon.operate("verify", &verify).await.status, 200);
    assert_eq!(news(&redis).await, ["loaded categories"], "a row and an orphan");
    assert_eq!(daemon.operate("verify", &verify).await.status, 200);
    assert_eq!(news(&redis).await, Vec::<String>::new());

    assert_eq!(daemon.operate("refetch", &json!({})).await.status, 200);
    let told = news(&redis).await;
    assert!(told.iter().all(|told| told == "loaded categories") && told.len() <= 1, "{told:?}");
    assert_eq!(daemon.stop().await, Some(0));
}

/// Its large value is not sent with the update, and not in Redis either.
#[tokio::test]
async fn a_row_that_must_be_read_again_is_announced_when_it_is_written() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    postgres
        .execute(
            "CREATE TABLE t (id int PRIMARY KEY, small text, large text);
             ALTER TABLE t ALTER large SET STORAGE EXTERNAL; INSERT INTO t VALUES (1, 'a', repeat('x', 5000));
             GRANT SELECT ON t TO prefetchd; ALTER PUBLICATION prefetchd ADD TABLE t",
        )
        .await;
    let table = "[[tables]]\nname = 't'\ntable = 'public.t'\nkey = 't:{id}'\n";
    let daemon = Daemon::with(&announcing(&postgres, &redis).tables(table)).await;
    daemon.ready().await;
    news(&redis).await;
    redis.command::<()>(&["DEL", "t:1"]).await;
    postgres.execute("UPDATE t SET small = 'b' WHERE id = 1").await;
    eventually("it is read again", async || redis.hash("t:1").await, |row| !row.is_empty()).await;
    assert_eq!(redis.hash("t:1").await["small"], "b");
    let told = entries(&redis).await;
    assert_eq!(news(&redis).await, ["upsert t t:1"]);
    assert!(told[0].contains_key("lsn"), "{told:?}");
    assert_eq!(daemon.stop().await, Some(0));
}

#[tokio::test]
async fn the_stream_is_bounded() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let daemon = Daemon::with(&announcing(&postgres, &redis).set("changes.max_len", "500")).await;
    daemon.ready().await;
    let lsn = postgres
        .execute("INSERT INTO categories (id, name) SELECT 'n-' || n, 'n' FROM generate_series(1, 3000) AS n")
        .await;
    daemon.applied(lsn).await;
    let length: u64 = redis.command(&["XLEN", STREAM]).await;
    assert!((500..1000).contains(&length), "{length}");
    assert_eq!(redis.command::<i64>(&["TTL", STREAM]).await, -1);
    assert_eq!(daemon.stop().await, Some(0));
}

#[tokio::test]
async fn a_key_of_another_type_is_refused_and_teardown_removes_the_stream() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let settings = announcing(&postgres, &redis);
    redis.command::<()>(&["SET", STREAM, "x"]).await;
    let (code, said) = Daemon::refused(&settings);
    assert_eq!(code, Some(78), "{said}");
    assert!(said.contains("changes") && said.contains("string") && said.contains("stream"), "{said}");
    redis.command::<()>(&["DEL", STREAM]).await;
    let daemon = Daemon::with(&settings).await;
    daemon.ready().await;
    assert_eq!(daemon.stop().await, Some(0));
    assert_eq!(redis.command::<String>(&["TYPE", STREAM]).await, "stream");
    let ran = run_program(&settings, &["teardown", "--keys"]).await;
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert_eq!(redis.keys("*").await, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_a_cluster_it_lies_in_the_slot_of_all_rows_if_they_share_one() {
    let (postgres, cluster) = (Postgres::shared(), Cluster::start().await);
    let slot = postgres.slot();
    let settings = || Settings::on_cluster(&postgres, &cluster);
    let key = format!("cache:{{{{{slot}}}}}:category:{{id}}");
    let table = format!("[[tables]]\nname = \"categories\"\ntable = \"public.categories\"\nkey = \"{key}\"\n");
    let (code, said) = Daemon::refused(&settings().tables(&table).text("changes.stream", STREAM));
    assert_eq!(code, Some(78), "{said}");
    assert!(said.contains("another hash slot"), "{said}");
    let stream = format!("changes:{{{slot}}}");
    let daemon = Daemon::with(&settings().tables(&table).text("changes.stream", &stream)).await;
    daemon.ready().await;
    let lsn = postgres.execute("UPDATE categories SET name = 'x' WHERE id = 'cat-001'").await;
    daemon.applied(lsn).await;
    let home = cluster.node(cluster.master_of(prefetchd::lanes::Lane::of(stream.as_bytes())).await);
    let told: Vec<(String, Entry)> = home.command(&["XRANGE", &stream, "-", "+"]).await;
    let ops: Vec<&str> = told.iter().map(|(_, entry)| entry["op"].as_str()).collect();
    assert_eq!(ops, ["loaded", "upsert"]);
    assert_eq!(daemon.stop().await, Some(0));
}

/// Kills the daemon, its connections and Postgres at random under writes. Every transaction changes a key once, so none may be
/// announced twice, and the last announcement of each key is about its last change.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_fails_each_change_is_announced_once() {
    const KEYS: u64 = 40;
    let seed = rand::random();
    println!("seed {seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let (mut postgres, redis) = (Postgres::own(&[]), Redis::start());
    postgres
        .execute(
            "CREATE TABLE t (id int PRIMARY KEY, version int NOT NULL); GRANT SELECT ON t TO prefetchd;
             INSERT INTO t SELECT n, 0 FROM generate_series(0, 39) AS n; ALTER PUBLICATION prefetchd ADD TABLE t",
        )
        .await;
    let table = "[[tables]]\nname = 't'\ntable = 'public.t'\nkey = 't:{id}'\n";
    let settings = announcing(&postgres, &redis).tables(table);
    let mut daemon = Daemon::with(&settings).await;
    daemon.ready().await;
    for round in 0..8 {
        for _ in 0..random.random_range(5..60) {
            let (id, other) = (random.random_range(0..KEYS), random.random_range(0..KEYS));
            let sql = match random.random_range(0..4) {
                0 => format!("DELETE FROM t WHERE id = {id}"),
                1 => format!("INSERT INTO t VALUES ({id}, 1) ON CONFLICT (id) DO UPDATE SET version = t.version + 1"),
                _ => format!("UPDATE t SET version = version + 1 WHERE id IN ({id}, {other})"),
            };
            postgres.execute(&sql).await;
        }
        daemon.allow_warnings();
        match round % 4 {
            0 => {
                daemon.kill9();
                daemon = Daemon::with(&settings).await;
            }
            1 => redis.cut_writers().await,
            2 => postgres.restart(Stop::Immediate),
            _ => sleep(Duration::from_millis(random.random_range(0..30))).await,
        }
    }
    let lsn = postgres.position().await;
    daemon.ready().await;
    daemon.applied(lsn).await;
    let mut consumer = Consumer::default();
    consumer.follow(&redis.url(), STREAM).await;
    assert!(consumer.loaded.contains_key("t"));
    assert!(consumer.seen.len() > 40, "{} changes", consumer.seen.len());
    for (key, entry) in &consumer.last["t"] {
        let row = redis.hash(key).await;
        assert_eq!(entry["op"] == "upsert", !row.is_empty(), "{entry:?} {row:?}");
        let id = &key[2..];
        let xmin = postgres.value(&format!("SELECT xmin FROM t WHERE id = {id}")).await;
        if let Some(xmin) = xmin {
            assert_eq!(entry["xid"], xmin, "{entry:?}: its last change was not announced");
        }
    }
    assert_eq!(daemon.stop().await, Some(0));
}
