//! Rows written as one RESTORE compared with the same rows written by DEL, HSET and PEXPIRE: nobody may see a
//! difference.

use crate::harness::proxy::Proxy;
use crate::harness::{Daemon, Feature, Postgres, Redis, Settings};
use bytes::Bytes;
use prefetchd::change::{Row, RowBuilder};
use prefetchd::command::{Command, Key};
use prefetchd::format::Form;
use prefetchd::resp::batch::{Batch, OwnKeys};
use prefetchd::schema::{Field, Layout, NullRule, Render};
use prefetchd::sink::connect::RedisTarget;
use prefetchd::sink::writer::Writer;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use redis::FromRedisValue;
use redis::aio::MultiplexedConnection;
use std::sync::Arc;

const TTL_MS: u64 = 3_600_000;

fn layout(names: &[String], null: NullRule) -> Arc<Layout> {
    let field = |(cell, name): (usize, &String)| Field { cell, name: Bytes::from(name.clone()), render: Render::AsIs };
    let fields: Vec<Field> = names.iter().enumerate().map(field).collect();
    Arc::new(Layout { cells: fields.len(), fields, null, ttl_ms: TTL_MS, form: Form::Hash })
}

fn row(cells: &[Option<Vec<u8>>]) -> Row {
    let mut row = RowBuilder::with_capacity(0);
    cells.iter().for_each(|cell| row.cell(cell.as_deref()));
    row.row()
}

/// Numbers at every limit of an encoding, texts that look like numbers, lengths at every limit, and bytes of all kinds.
fn hostile() -> Vec<Vec<u8>> {
    let mut values: Vec<Vec<u8>> = Vec::new();
    for power in [0, 6, 7, 8, 11, 12, 13, 15, 16, 22, 23, 24, 30, 31, 32, 47, 62, 63, 64] {
        for near in -2..=2i128 {
            for n in [(1i128 << power) + near, -(1i128 << power) + near] {
                values.push(n.to_string().into_bytes());
            }
        }
    }
    for text in
        ["", "0", "-0", "00", "01", "+1", "-", "1 ", " 1", "1.0", "1e3", "-01", "1_0", "٣", "true", "\\N", "NULL"]
    {
        values.push(text.as_bytes().to_vec());
    }
    for length in [1, 2, 61, 62, 63, 64, 65, 126, 127, 128, 129, 255, 256, 4094, 4095, 4096, 5000, 70_000] {
        values.push(vec![b'x'; length]);
        values.push(vec![b'9'; length]);
    }
    values.push(b"\r\n$3\r\nfoo\r\n".to_vec());
    values.push((0..=255).collect());
    values.push(vec![0, 0xff, 0xfe, 0xc0]);
    values
}

async fn ask<T: FromRedisValue>(link: &MultiplexedConnection, words: &[&str]) -> T {
    redis::cmd(words[0]).arg(&words[1..]).query_async(&mut link.clone()).await.unwrap()
}

async fn compare(redis: &Redis, expects_packing: bool) {
    let own = OwnKeys::under("prefetchd:{packed}:");
    let (mut writer, _) = Writer::connect(&RedisTarget::parse(&redis.url()).unwrap(), &own).await.unwrap();
    let limits = writer.limits();
    assert_eq!(limits.packing.is_some(), expects_packing);
    let (hostile, mut random) = (hostile(), StdRng::seed_from_u64(7));
    let mut rows: Vec<(Arc<Layout>, Row)> = Vec::new();
    let two = ["id".to_owned(), "1".to_owned()];
    for value in &hostile {
        rows.push((layout(&two, NullRule::Empty), row(&[Some(b"7".to_vec()), Some(value.clone())])));
    }
    for n in 0..600 {
        let columns = if n % 50 == 0 { random.random_range(100..600) } else { random.random_range(1..20) };
        let long = if n % 7 == 0 { 64 } else { 1 };
        let names: Vec<String> =
            (0..columns).map(|c| format!("{}{c}", "n".repeat(random.random_range(0..=long)))).collect();
        let mut cells: Vec<Option<Vec<u8>>> = vec![Some(n.to_string().into_bytes())];
        for _ in 1..columns {
            let value = &hostile[random.random_range(0..hostile.len())];
            let fits = value.len() <= 64 || n % 3 == 0;
            cells.push((fits && random.random_range(0..5) > 0).then(|| value.clone()));
        }
        let null = if n % 2 == 0 { NullRule::Empty } else { NullRule::Omit };
        rows.push((layout(&names, null), row(&cells)));
    }

    // The size of a libc allocation depends on what was freed before.
    let exact = !redis.command::<String>(&["INFO", "memory"]).await.contains("mem_allocator:libc");
    let link = redis.connection().await;
    // The same over an existing key, of whatever type.
    for round in 0..2 {
        let mut packed = Batch::new(own.clone(), limits);
        let mut plain = Batch::new(own.clone(), limits.unpacked());
        for (n, (layout, row)) in rows.iter().enumerate() {
            let put = |key: String| Command::Put { key: Key(key.into()), layout: layout.clone(), row: row.clone() };
            packed.push(&put(format!("a:{n}"))).unwrap();
            plain.push(&put(format!("b:{n}"))).unwrap();
        }
        assert_eq!(packed.commands() < plain.commands() / 2, expects_packing);
        writer.execute(&packed, format!("packed {round}").as_bytes()).await.unwrap();
        writer.execute(&plain, format!("plain {round}").as_bytes()).await.unwrap();
        for n in 0..rows.len() {
            let (a, b) = (format!("a:{n}"), format!("b:{n}"));
            let all = async |key: &str| ask::<Vec<Vec<u8>>>(&link, &["HGETALL", key]).await;
            let (mut one, mut other) = (all(&a).await, all(&b).await);
            let encoding = async |key: &str| ask::<String>(&link, &["OBJECT", "ENCODING", key]).await;
            let kept = encoding(&a).await;
            assert_eq!(kept, encoding(&b).await, "{n}");
            if kept == "hashtable" {
                // In an order of its own.
                let sorted = |pairs: &mut Vec<Vec<u8>>| {
                    let mut of: Vec<Vec<Vec<u8>>> = pairs.chunks(2).map(<[_]>::to_vec).collect();
                    of.sort();
                    *pairs = of.concat();
                };
                sorted(&mut one);
                sorted(&mut other);
            } else if exact {
                let memory = async |key: &str| ask::<u64>(&link, &["MEMORY", "USAGE", key]).await;
                assert_eq!(memory(&a).await, memory(&b).await, "{n}");
            }
            assert_eq!(one, other, "{n}");
            let left = ask::<i64>(&link, &["PTTL", &a]).await;
            assert!(left > 0 && left <= i64::try_from(TTL_MS).unwrap(), "{left}");
        }
        for n in 0..rows.len() {
            ask::<()>(&link, &["SET", &format!("a:{n}"), "of another kind"]).await;
        }
    }
}

#[tokio::test]
async fn a_packed_row_is_the_row() {
    // Redis then checks every entry, and refuses what it would not have written itself.
    let redis = Redis::with(&["--sanitize-dump-payload", "yes"]);
    compare(&redis, redis.has(Feature::Listpack).await).await;
}

#[tokio::test]
async fn a_packed_row_is_the_row_up_to_the_limits_of_another_server() {
    if Redis::lacks(Feature::Listpack).await {
        return;
    }
    let redis = Redis::with(&["--sanitize-dump-payload", "yes"]);
    redis.command::<()>(&["CONFIG", "SET", "hash-max-listpack-value", "100000"]).await;
    redis.command::<()>(&["CONFIG", "SET", "hash-max-listpack-entries", "500"]).await;
    compare(&redis, true).await;
}

#[tokio::test]
async fn a_user_without_restore_writes_rows_in_three_commands() {
    let redis = Redis::start();
    redis.command::<()>(&["ACL", "SETUSER", "default", "-restore"]).await;
    compare(&redis, false).await;
    let own = OwnKeys::under("prefetchd:{packed}:");
    let (writer, _) = Writer::connect(&RedisTarget::parse(&redis.url()).unwrap(), &own).await.unwrap();
    assert!(writer.lost().iter().any(|lost| lost.to_string().contains("RESTORE")));
    // The probe left nothing behind.
    assert!(redis.keys("prefetchd:*").await.iter().all(|key| key.ends_with("checkpoint")));
}

/// Rows arrive. Returns by how many RESTOREs.
async fn rows_are_written(settings: Settings, postgres: &Postgres, redis: &Redis) -> (Daemon, u64) {
    postgres
        .execute("CREATE TABLE t (id int PRIMARY KEY, name text); INSERT INTO t VALUES (1, 'one'), (2, 'two')")
        .await;
    postgres.execute("GRANT SELECT ON t TO prefetchd; ALTER PUBLICATION prefetchd ADD TABLE t").await;
    redis.command::<String>(&["CONFIG", "RESETSTAT"]).await;
    let settings = settings.tables("[[tables]]\nname = 't'\ntable = 'public.t'\nkey = 't:{id}'");
    let daemon = Daemon::with(&settings).await;
    daemon.ready().await;
    let lsn = postgres.execute("UPDATE t SET name = 'zwei' WHERE id = 2").await;
    daemon.applied(lsn).await;
    assert_eq!(redis.hash("t:1").await["name"], "one");
    assert_eq!(redis.hash("t:2").await["name"], "zwei");
    assert!(redis.keys("prefetchd:*sample*").await.is_empty());
    let stats = redis.command::<String>(&["INFO", "commandstats"]).await;
    let calls = stats.lines().find_map(|line| line.strip_prefix("cmdstat_restore:calls="));
    let calls = calls.and_then(|line| line.split(',').next()?.parse().ok());
    (daemon, calls.unwrap_or(0))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_are_packed_only_if_that_is_configured_and_gives_back_what_was_written() {
    if Redis::lacks(Feature::Listpack).await {
        return;
    }
    let wrongly = "does not give back a row";
    for (packed, heard, is_packed) in [("auto", true, true), ("auto", false, false), ("off", false, false)] {
        let (postgres, redis) = (Postgres::shared(), Redis::start());
        let proxy = Proxy::to_redis(&redis).await;
        if !heard {
            proxy.mishear("-8388608", "-8388609");
        }
        let settings = Settings::new(&postgres, &redis).text("redis.url", &proxy.url()).text("redis.packed", packed);
        let (daemon, restores) = rows_are_written(settings, &postgres, &redis).await;
        assert_eq!(daemon.said(wrongly), usize::from(packed == "auto" && !heard), "{packed}, {heard}");
        // The question whether it would be accepted, and the row that is read back.
        match (packed, is_packed) {
            ("off", _) => assert_eq!(restores, 0),
            (_, false) => assert_eq!(restores, 2),
            (_, true) => assert!(restores >= 5, "{restores}"),
        }
        daemon.allow_warnings();
        assert_eq!(daemon.stop().await, Some(0));
    }
}
