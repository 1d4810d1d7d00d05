//! The script that writes a lane, on a real server. A single Redis will do: it does not care for hash slots.

use crate::harness::{Feature, Redis};
use bytes::{Bytes, BytesMut};
use prefetchd::change::RowBuilder;
use prefetchd::command::{Command, DeadLetter, Key};
use prefetchd::format::Form;
use prefetchd::lanes::Lane;
use prefetchd::lanes::script::{Call, Commands, SCRIPT};
use prefetchd::lanes::split::split;
use prefetchd::resp;
use prefetchd::resp::batch::{Batch, Limits, OwnKeys};
use prefetchd::resp::packed::Packing;
use prefetchd::schema::{Field, Layout, NullRule, Render};
use redis::aio::MultiplexedConnection;
use redis::{RedisError, Value};
use std::collections::BTreeMap;
use std::sync::Arc;

struct Server {
    redis: Redis,
    link: MultiplexedConnection,
    sha: String,
}

const MARK: &str = "prefetchd:{k}:s:mark";

impl Server {
    async fn with(args: &[&str]) -> Self {
        let redis = Redis::with(args);
        let sha = redis.command(&["SCRIPT", "LOAD", SCRIPT]).await;
        Server { link: redis.connection().await, redis, sha }
    }

    async fn does(&self, call: &Call) -> Result<Vec<String>, RedisError> {
        let mut request = BytesMut::new();
        call.write(&mut request, self.sha.as_bytes());
        let mut command = redis::cmd("EVALSHA");
        resp::arguments(&request).into_iter().for_each(|argument| _ = command.arg(argument));
        Ok(match command.query_async(&mut self.link.clone()).await? {
            Value::Array(items) => items.into_iter().map(|item| redis::from_redis_value(item).unwrap()).collect(),
            other => vec![redis::from_redis_value(other)?],
        })
    }

    async fn mark(&self) -> String {
        self.redis.command::<Option<String>>(&["GET", MARK]).await.unwrap_or_default()
    }
}

fn key(text: &str) -> Key {
    Key(Bytes::copy_from_slice(text.as_bytes()))
}

/// Writes these commands if the mark is `expected`.
fn call(expected: &str, new: &str, if_failed: &str, commands: &[&str]) -> Call {
    let mut body = BytesMut::new();
    for command in commands {
        let words: Vec<&[u8]> = command.split(' ').map(str::as_bytes).collect();
        resp::command(&mut body, &words);
    }
    of_body(expected, new, if_failed, &body)
}

fn of_body(expected: &str, new: &str, if_failed: &str, body: &[u8]) -> Call {
    let mut split = split(body, &OwnKeys::under("prefetchd:{s}:"));
    assert!(split.lanes.len() <= 1, "keys of one slot");
    let part = split.lanes.remove(&Lane::of(b"k")).unwrap_or_default();
    let [expected, new, if_failed] = [expected, new, if_failed].map(|text| Bytes::copy_from_slice(text.as_bytes()));
    let keys = std::iter::once(key(MARK)).chain(part.keys).collect();
    Call { lane: Some(Lane::of(b"k")), keys, expected, new, if_failed, commands: part.commands }
}

#[tokio::test]
async fn a_lane_is_written_only_in_the_state_that_was_expected() {
    let server = Server::with(&[]).await;
    let first = call("", "one", "", &["DEL {k}:1", "HSET {k}:1 f 1 g 2", "PEXPIRE {k}:1 60000"]);
    assert_eq!(server.does(&first).await.unwrap(), ["ok"]);
    assert_eq!(
        server.redis.hash("{k}:1").await,
        BTreeMap::from([("f", "1"), ("g", "2")].map(|(f, v)| (f.into(), v.into())))
    );
    assert!((1..=60_000).contains(&server.redis.pttl("{k}:1").await));
    assert_eq!(server.does(&first).await.unwrap(), ["mark", "one"], "sent again, it finds its own mark");
    let late = call("zero", "late", "", &["DEL {k}:1"]);
    assert_eq!(server.does(&late).await.unwrap(), ["mark", "one"]);
    assert_eq!(server.redis.hash("{k}:1").await.len(), 2, "nothing was done");
    assert_eq!(server.does(&call("one", "two", "", &["DEL {k}:1"])).await.unwrap(), ["ok"]);
    assert!(server.redis.keys("{k}:*").await.is_empty());
    server.redis.command::<i64>(&["DEL", MARK]).await;
    assert_eq!(server.does(&call("two", "three", "", &[])).await.unwrap(), ["mark", ""], "none was found");
    assert_eq!(server.does(&call("", "four", "", &[])).await.unwrap(), ["ok"]);
    assert_eq!(server.mark().await, "four");
}

#[tokio::test]
async fn a_command_that_fails_is_said_by_the_mark_and_keeps_no_other_from_running() {
    let server = Server::with(&[]).await;
    server.redis.command::<String>(&["SET", "{k}:text", "t"]).await;
    let commands =
        ["HSET {k}:none f 1", "HDEL {k}:none f", "DEL {k}:2", "HSET {k}:2 f 1", "HSET {k}:2 g 2", "HSET {k}:text f 1"];
    let reply = server.does(&call("", "new", "damaged", &commands)).await.unwrap();
    assert_eq!(reply[0], "failed");
    assert!(reply[1].starts_with("WRONGTYPE HSET needs a hash, and the key is none"), "{reply:?}");
    assert_eq!(server.mark().await, "damaged");
    assert_eq!(server.redis.keys("{k}:*").await.len(), 2, "a merge creates no row");
    assert_eq!(server.redis.hash("{k}:2").await.len(), 2, "a merge into a row that is there");
    // The record's call has no other value to set.
    for expected in ["damaged", ""] {
        let call = call(expected, "new", "", &["INCR {k}:text", "DEL {k}:2"]);
        let reply = server.does(&call).await.unwrap();
        assert!(reply[0] == "failed" && reply[1].contains("integer"), "{reply:?}");
        assert_eq!(server.mark().await, expected);
        server.redis.command::<i64>(&["DEL", MARK]).await;
    }
    server.redis.command::<i64>(&["HSET", MARK, "f", "1"]).await;
    let error = server.does(&call("", "new", "", &["DEL {k}:text"])).await.unwrap_err();
    assert!(error.to_string().contains("WRONGTYPE"), "{error}");
    assert_eq!(server.redis.command::<i64>(&["EXISTS", "{k}:text"]).await, 1, "nothing was done");
}

#[tokio::test]
async fn a_command_may_say_what_it_expects_to_find() {
    let server = Server::with(&[]).await;
    server.redis.command::<i64>(&["HSET", "{k}:h", "f", "1"]).await;
    let expects = |value: &str| {
        let mut commands = Commands::default();
        commands.push(b"=HGET", 2, [&b"f"[..], value.as_bytes()].into_iter());
        Call { commands, ..call("", "new", "", &["HGET {k}:h f"]) }
    };
    let reply = server.does(&expects("2")).await.unwrap();
    assert_eq!(reply, ["failed", "ERR {k}:h has been changed by somebody else"]);
    assert_eq!(server.mark().await, "");
    assert_eq!(server.does(&expects("1")).await.unwrap(), ["ok"]);
    server.redis.command::<i64>(&["DEL", MARK, "{k}:h"]).await;
    assert_eq!(server.does(&expects("1")).await.unwrap()[0], "failed", "it is gone");
    server.redis.command::<String>(&["SET", "{k}:h", "text"]).await;
    let reply = server.does(&expects("1")).await.unwrap();
    assert!(reply[0] == "failed" && reply[1].starts_with("WRONGTYPE"), "{reply:?}");
}

#[tokio::test]
async fn a_server_without_memory_does_nothing_of_a_call() {
    let server = Server::with(&["--maxmemory-policy", "noeviction"]).await;
    assert_eq!(server.does(&call("", "one", "", &["DEL {k}:1", "HSET {k}:1 f 1"])).await.unwrap(), ["ok"]);
    server.redis.command::<String>(&["CONFIG", "SET", "maxmemory", "1"]).await;
    let refused = call("one", "two", "damaged", &["DEL {k}:1", "HSET {k}:1 f 2"]);
    let error = server.does(&refused).await.unwrap_err();
    assert!(error.to_string().contains("OOM"), "{error}");
    server.redis.command::<String>(&["CONFIG", "SET", "maxmemory", "0"]).await;
    assert_eq!((server.mark().await, server.redis.hash("{k}:1").await.len()), ("one".to_owned(), 1));
    assert_eq!(server.does(&refused).await.unwrap(), ["ok"]);
}

#[tokio::test]
async fn rows_arrive_as_from_a_batch() {
    let server = Server::with(&[]).await;
    let columns = 1_600;
    let field = |cell| Field { cell, name: Bytes::from(format!("c{cell}")), render: Render::AsIs };
    let fields: Vec<Field> = (0..columns).map(field).collect();
    let layout = |count: usize| {
        let fields = fields[..count].to_vec();
        Arc::new(Layout { cells: columns, fields, null: NullRule::Empty, ttl_ms: 60_000, form: Form::Hash })
    };
    let mut row = RowBuilder::with_capacity(0);
    (0..columns).for_each(|n| row.cell(Some(format!("\r\n$3\r\n\0{n}").as_bytes())));
    let row = row.row();
    let mut limits = Limits::default();
    if server.redis.has(Feature::Listpack).await {
        limits.packing = Some(Packing::new(None, None));
    }
    let own = OwnKeys::under("prefetchd:{k}:");
    let mut batch = Batch::new(own.clone(), limits);
    let letter = DeadLetter {
        table: "t".to_owned(),
        key: Bytes::new(),
        lsn: "0/1".to_owned(),
        xid: 7,
        reason: "r".to_owned(),
        row: Bytes::new(),
    };
    for command in [
        Command::Put { key: key("{k}:small"), layout: layout(3), row: row.clone() },
        Command::Put { key: key("{k}:large"), layout: layout(columns), row: row.clone() },
        Command::Renew { key: key("{k}:absent"), ttl_ms: 5 },
        Command::DeadLetter(letter),
    ] {
        batch.push(&command).unwrap();
    }
    let call = of_body("", "new", "damaged", batch.body());
    assert_eq!(server.does(&call).await.unwrap(), ["ok"]);
    for (key, count) in [("{k}:small", 3), ("{k}:large", columns)] {
        let wanted = (0..count).map(|n| (format!("c{n}"), format!("\r\n$3\r\n\0{n}"))).collect();
        assert_eq!(server.redis.hash(key).await, wanted);
        assert!((1..=60_000).contains(&server.redis.pttl(key).await));
    }
    let letters: i64 = server.redis.command(&["XLEN", "prefetchd:{k}:dead"]).await;
    assert_eq!((letters, server.redis.keys("{k}:*").await.len()), (1, 2));
}

#[tokio::test]
async fn as_many_arguments_as_are_allowed_fit() {
    let server = Server::with(&[]).await;
    let values: Vec<String> = (0..7_000).map(|n| n.to_string()).collect();
    let mut commands = Commands::default();
    commands.push(b"HSET", 2, values.iter().map(String::as_bytes));
    let keys = vec![key(MARK), key("{k}:1")];
    let [expected, new, if_failed] = ["", "new", ""].map(|text| Bytes::from_static(text.as_bytes()));
    let call = Call { lane: Some(Lane::of(b"k")), keys, expected, new, if_failed, commands };
    assert_eq!(server.does(&call).await.unwrap(), ["ok"]);
    assert_eq!(server.redis.hash("{k}:1").await.len(), 3_500);
}
