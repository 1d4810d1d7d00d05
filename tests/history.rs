//! The last 15 minutes are remembered: what happened, with its cause, and a figure a second, also for whoever comes later.

use crate::harness::{Daemon, Postgres, Redis, eventually};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

async fn history(daemon: &Daemon) -> Value {
    let answer = daemon.get("/v1/history").await;
    assert_eq!(answer.status, 200, "{answer:?}");
    answer.json()
}

async fn action(daemon: &Daemon) -> Value {
    daemon.status().await["verdict"]["action"].clone()
}

/// Waits until the history has such an event, and returns it.
async fn happened(daemon: &Daemon, kind: &str, contains: &str) -> Value {
    let find = |history: &Value| {
        let events = history["events"].as_array().unwrap().clone();
        events.into_iter().find(|e| e["kind"] == kind && e["text"].as_str().unwrap().contains(contains))
    };
    let seen = eventually(&format!("{kind}: {contains}"), async || history(daemon).await, |h| find(h).is_some()).await;
    find(&seen).unwrap()
}

/// Whoever reads the history afterwards must not take Postgres for the cause.
#[tokio::test]
async fn a_process_that_stood_still_says_so() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let daemon = Daemon::start(&postgres, &redis).await;
    daemon.ready().await;
    daemon.signal(Signal::SIGSTOP);
    tokio::time::sleep(std::time::Duration::from_secs(8)).await;
    daemon.signal(Signal::SIGCONT);
    let stood = happened(&daemon, "interrupted", "this process did not run for ").await;
    assert_eq!(stood["level"], "warning", "{stood}");
    daemon.ready().await;
}

#[tokio::test]
async fn what_happened_is_remembered_with_its_cause() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let daemon = Daemon::start(&postgres, &redis).await;
    daemon.allow_warnings();
    daemon.ready().await;
    happened(&daemon, "started", "prefetchd").await;
    let loaded = happened(&daemon, "loaded", "first start").await;
    assert_eq!((&loaded["level"], &loaded["table"]), (&json!("good"), &json!("categories")), "{loaded}");
    assert!(loaded["text"].as_str().unwrap().starts_with("loaded categories in "), "{loaded}");
    assert!(loaded["time"].as_str().unwrap().ends_with('Z'), "{loaded}");

    redis.flush().await;
    let healed = happened(&daemon, "healed", "healed categories in ").await;
    assert!(healed["text"].as_str().unwrap().contains("5 rows: "), "{healed}");
    daemon.ready().await;

    daemon.operate("pause", &json!({})).await;
    daemon.operate("resume", &json!({})).await;
    daemon.operate("invalidate", &json!({"table": "categories", "keys": ["cat-001"]})).await;
    daemon.operate("refetch", &json!({})).await;
    redis.command::<i32>(&["HSET", "cache:category:cat-001", "name", "Wrong"]).await;
    assert_eq!(action(&daemon).await, Value::Null);
    daemon.operate("verify", &json!({})).await;
    happened(&daemon, "operator", "paused").await;
    happened(&daemon, "operator", "invalidated keys of categories, 1 keys removed").await;
    let drift = happened(&daemon, "drift", "1 stale").await;
    assert_eq!(drift["level"], "warning");
    assert_eq!(action(&daemon).await, "repair");
    daemon.operate("verify", &json!({"repair": true})).await;
    happened(&daemon, "verified", "1 differ, 1 repaired").await;
    daemon.logged("differs from Postgres: cache:category:cat-001 is stale").await;
    let verdict = daemon.status().await["verdict"].clone();
    assert_eq!(verdict["level"], "good", "{verdict}");
    assert!(verdict["text"].as_str().unwrap().contains("The last verify repaired 1 difference."), "{verdict}");

    postgres.execute("ALTER TABLE categories RENAME TO elsewhere").await;
    let blocked = happened(&daemon, "blocked", "categories cannot be followed: ").await;
    assert_eq!(blocked["level"], "bad");
    postgres.execute("ALTER TABLE elsewhere RENAME TO categories").await;
    let times =
        history(&daemon).await["events"].as_array().unwrap().iter().map(|e| e["time"].clone()).collect::<Vec<_>>();
    assert!(times.is_sorted_by_key(|time| time.as_str().map(str::to_owned)), "{times:?}");
}

#[tokio::test]
async fn a_figure_a_second_is_remembered() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let daemon = Daemon::start(&postgres, &redis).await;
    daemon.ready().await;
    for n in 0..5 {
        postgres.execute(&format!("UPDATE categories SET display_order = {n} WHERE id = 'cat-005'")).await;
    }
    daemon.get("/v1/tables/categories/cat-001").await;
    daemon.get("/v1/tables/categories/nobody").await;
    let counted = |history: &Value| history["last_minute"]["changes"] == 5 && history["last_minute"]["reads"] == 2;
    let seen = eventually("all is counted", async || history(&daemon).await, counted).await;
    let minute = &seen["last_minute"];
    assert_eq!((&minute["hits"], &minute["misses"], &minute["errors"]), (&json!(1), &json!(1), &json!(0)), "{seen}");
    let lag = |name: &str| minute["sync_lag_ms"][name].as_f64().unwrap();
    assert!(0.0 < lag("p50") && lag("p50") <= lag("p99") && lag("p99") <= lag("max"), "{seen}");
    let seconds = seen["seconds"].as_object().unwrap();
    let of = |name: &str| seconds[name].as_array().unwrap().clone();
    assert!(seconds.values().all(|figures| figures.as_array().unwrap().len() == of("changes").len()), "{seen}");
    assert_eq!(of("changes").iter().filter_map(Value::as_u64).sum::<u64>(), 5);
    assert!(of("lag_p99_ms").iter().any(Value::is_number), "{seen}");
    assert_eq!(seen["last_15_minutes"]["changes"], 5);
}

#[tokio::test]
async fn the_event_stream_begins_with_the_history() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let daemon = Daemon::start(&postgres, &redis).await;
    daemon.ready().await;
    happened(&daemon, "loaded", "first start").await;
    let mut stream = TcpStream::connect(daemon.address()).await.unwrap();
    stream.write_all(b"GET /v1/events HTTP/1.1\r\nHost: localhost\r\n\r\n").await.unwrap();
    let mut lines = BufReader::new(stream).lines();
    let mut next = async || loop {
        let line = lines.next_line().await.unwrap().expect("the stream goes on");
        if let Some(name) = line.strip_prefix("event: ") {
            let data = lines.next_line().await.unwrap().expect("its data");
            return (name.to_owned(), serde_json::from_str::<Value>(data.strip_prefix("data: ").unwrap()).unwrap());
        }
    };
    let (name, first) = next().await;
    assert!(name == "history" && first["events"].as_array().unwrap().len() > 1, "{name}: {first}");
    let second = loop {
        if let (name, data) = next().await
            && name == "second"
        {
            break data;
        }
    };
    assert!(second["at"].as_u64() >= first["from"].as_u64() && second["last_minute"]["seconds"].as_u64() > Some(0));
    daemon.operate("pause", &json!({})).await;
    loop {
        if let (name, data) = next().await
            && name == "happened"
            && data["text"] == "paused: changes wait in postgres"
        {
            break;
        }
    }
}
