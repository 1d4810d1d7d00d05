//! Another version of the daemon takes over what this one left, and this one what it left: nothing is loaded again, and
//! readers notice nothing but that nobody answers for a moment. What docs/upgrading.md promises.
//!
//! scripts/test-upgrade builds an earlier version and runs the tests that need one.

use crate::harness::consumer::Consumer;
use crate::harness::lanes::LaneScene;
use crate::harness::scene::{Scene, TTL};
use crate::harness::traffic::{STREAM, Traffic, seed};
use crate::harness::watcher::HttpWatcher;
use crate::harness::{Cluster, Daemon, Feature, Postgres, Redis, Settings, psql, run_configured};
use prefetchd::checkpoint::TableMark;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::task::JoinHandle;

/// Written by [`an_earlier_version_is_captured`].
const EARLIER_STATE: &str = include_str!("earlier/state.json");
const EARLIER_NAMES: &str = include_str!("earlier/names.txt");
const ROWS: u64 = 2_000;
const NO_EARLIER: &str = "needs the program of an earlier version: scripts/test-upgrade";
const DOCUMENTS: &str =
    "[[tables]]\nname = 'categories'\ntable = 'public.categories'\nkey = 'cache:category:{id}'\nformat = 'json'
[[tables.lookups]]\nname = 'all'\nkey = 'cache:categories'\norder = 'display_order'\n";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Replaced {
    /// As systemd restarts a service.
    AfterStop,
    /// As at a crash.
    AfterKill,
    /// The new one stands by when the old one is stopped.
    ByStandby,
}

/// The program that PREFETCHD_EARLIER names, and this one, one after the other.
fn versions(settings: &Settings) -> [Settings; 2] {
    [settings.clone().program(earlier_program().as_ref()), settings.clone()]
}

fn earlier_program() -> std::ffi::OsString {
    std::env::var_os("PREFETCHD_EARLIER").expect(NO_EARLIER)
}

/// It goes on where another one was, without reading a table.
async fn resumed(daemon: &Daemon, what: &str) {
    daemon.ready().await;
    let status = daemon.status().await;
    assert_eq!(status["primary_reads"], 0, "{what}: a table was loaded again:\n{}", daemon.log_text());
    let states = status["tables"].as_array().unwrap().iter().map(|table| &table["state"]);
    assert!(states.clone().all(|state| state == "loaded"), "{what}: {:?}", states.collect::<Vec<_>>());
    let metrics = daemon.metrics().await;
    let loaded: Vec<_> = metrics.iter().filter(|(name, _)| name.starts_with("prefetchd_rows_loaded_total")).collect();
    assert!(loaded.iter().all(|(_, rows)| **rows == 0.0), "{what}: {loaded:?}");
}

/// What the entries of tables say of the shape of rows and lists. If it changes, they are made again.
async fn shapes(scene: &Scene) -> Vec<String> {
    let shape = |(table, mark): (&String, &TableMark)| {
        format!("{table} {:x} {:?} {:?} {:?}", mark.fingerprint, mark.catalog, mark.types, mark.lookups_as)
    };
    scene.checkpoint().await.unwrap().tables.iter().map(shape).collect()
}

/// Rows of `categories` change until it is stopped.
struct Documents {
    stop: Arc<AtomicBool>,
    changes: JoinHandle<u32>,
}

impl Documents {
    fn change(postgres: &Postgres) -> Self {
        let (stop, url) = (Arc::new(AtomicBool::new(false)), postgres.url("postgres"));
        let stopped = Arc::clone(&stop);
        let changes = tokio::task::spawn_blocking(move || {
            let mut n = 0;
            while !stopped.load(Ordering::Relaxed) {
                n += 1;
                let set = format!("display_order = {n}, featured = {n} % 2 = 0");
                psql(&url, &format!("UPDATE categories SET {set} WHERE id = 'cat-00{}'", 1 + n % 5));
            }
            n
        });
        Self { stop, changes }
    }

    async fn stop(mut self) -> u32 {
        self.stop.store(true, Ordering::Relaxed);
        (&mut self.changes).await.unwrap()
    }
}

impl Drop for Documents {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

async fn has_no_drift(daemon: &Daemon) {
    let answer = daemon.operate("verify", &json!({})).await;
    let found: Value = answer.json();
    let drift = ["missing", "stale", "orphaned"].map(|kind| found[kind].as_u64());
    assert_eq!(drift, [Some(0); 3], "{answer:?}\n{}", daemon.log_text());
}

const KINDS: &str = "
    CREATE TABLE kinds (id int, region text, amount numeric(8,2), ok boolean, at timestamptz, tags text[], doc jsonb, note text,
                        PRIMARY KEY (region, id));
    INSERT INTO kinds VALUES (1, 'a:b', 1.50, true, '2026-01-02 03:04:05.6+01', '{x,\"y z\"}', '{\"k\": [1.0, null]}', NULL),
                             (2, 'eu', NULL, false, NULL, NULL, NULL, ''), (3, 'eu', -7, NULL, 'infinity', '{x}', '\"é\"', 'ü%');
    CREATE TABLE kinds2 (LIKE kinds INCLUDING ALL);
    INSERT INTO kinds2 SELECT * FROM kinds;
    GRANT SELECT ON kinds, kinds2 TO prefetchd; ALTER PUBLICATION prefetchd ADD TABLE kinds, kinds2";
const KINDS_TABLES: &str = "
[[tables]]\nname = 'kinds'\ntable = 'public.kinds'\nkey = 'kind:{region}:{id}'\nrename = { note = 'remark' }\nttl = '2h'
[[tables.lookups]]\nname = 'by_tag'\nkey = 'kinds-by-tag:{tags[]}'\norder = 'at'
[[tables.lookups]]\nname = 'by_region'\nkey = 'kinds-of:{region}'
[[tables]]\nname = 'kinds_json'\ntable = 'public.kinds2'\nkey = 'json-kind:{region}:{id}'\nformat = 'json'
[[tables.lookups]]\nname = 'by_amount'\nkey = 'json-kinds-of:{ok}'\norder = 'amount'
";

/// Everything in Redis, the checkpoint included. The members of a sorted set are with their scores.
async fn contents(redis: &Redis) -> BTreeMap<String, Value> {
    let mut contents = BTreeMap::new();
    for key in redis.keys("*").await {
        let kind: String = redis.command(&["TYPE", &key]).await;
        let value = match kind.as_str() {
            "string" => json!(redis.command::<String>(&["GET", &key]).await),
            "hash" => json!(redis.hash(&key).await),
            "set" => json!(redis.command::<BTreeSet<String>>(&["SMEMBERS", &key]).await),
            "zset" => {
                json!(redis.command::<BTreeMap<String, String>>(&["ZRANGE", &key, "0", "-1", "WITHSCORES"]).await)
            }
            "stream" => continue,
            other => panic!("{key} is a {other}"),
        };
        contents.insert(key, json!({ kind: value }));
    }
    contents
}

async fn put(redis: &Redis, contents: &BTreeMap<String, Value>) {
    for (key, value) in contents {
        let (kind, value) = value.as_object().unwrap().iter().next().unwrap();
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        let mut words = vec![key.clone()];
        let command = match kind.as_str() {
            "string" => "SET",
            "hash" => "HSET",
            "set" => "SADD",
            _ => "ZADD",
        };
        match value {
            Value::Object(pairs) if kind == "zset" => {
                words.extend(pairs.iter().flat_map(|(m, score)| [text(score), m.clone()]))
            }
            Value::Object(pairs) => words.extend(pairs.iter().flat_map(|(field, value)| [field.clone(), text(value)])),
            Value::Array(members) => words.extend(members.iter().map(text)),
            value => words.push(text(value)),
        }
        let words: Vec<&str> = std::iter::once(command).chain(words.iter().map(String::as_str)).collect();
        redis.command::<redis::Value>(&words).await;
        if !key.starts_with("prefetchd:") {
            redis.command::<i32>(&["PEXPIRE", key, "7000000"]).await;
        }
    }
}

/// What depends on the server, and on the time. See [`earlier_state`].
const OF_HEAD: [&str; 9] = ["system_id", "timeline", "database", "lsn", "epoch", "seq", "beat_ms", "base", "last"];
const OF_ENTRY: [&str; 4] = ["fingerprint", "catalog", "ttl_until_ms", "compared_ms"];

/// Takes these fields from another object.
fn with_fields(earlier: &str, fields: &[&str], now: &str) -> String {
    let (mut earlier, now): (Value, Value) =
        (serde_json::from_str(earlier).unwrap(), serde_json::from_str(now).unwrap());
    for field in fields {
        if !earlier[field].is_null() {
            earlier[field] = now[field].clone();
        }
    }
    earlier.to_string()
}

/// As the baseline of scripts/test-upgrade has left it, with the positions, times and object identifiers of this server.
fn earlier_state(slot: &str, now: &BTreeMap<String, Value>) -> BTreeMap<String, Value> {
    let mut state: BTreeMap<String, Value> = serde_json::from_str(&EARLIER_STATE.replace("$slot", slot)).unwrap();
    let (head, tables) = (format!("prefetchd:{{{slot}}}:checkpoint"), format!("prefetchd:{{{slot}}}:tables"));
    let text = |state: &BTreeMap<String, Value>, key: &str, path: &str| {
        state[key].pointer(path).unwrap().as_str().unwrap().to_owned()
    };
    let merged = with_fields(&text(&state, &head, "/string"), &OF_HEAD, &text(now, &head, "/string"));
    state.insert(head, json!({ "string": merged }));
    for table in ["kinds", "kinds_json"] {
        let path = format!("/hash/{table}");
        let merged = with_fields(&text(&state, &tables, &path), &OF_ENTRY, &text(now, &tables, &path));
        *state.get_mut(&tables).unwrap().pointer_mut(&path).unwrap() = json!(merged);
    }
    state
}

async fn kinds() -> (Postgres, Redis, Settings) {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    postgres.execute(KINDS).await;
    let settings = Settings::new(&postgres, &redis).tables(KINDS_TABLES);
    (postgres, redis, settings)
}

/// Without an earlier program: with what one has left in Redis.
#[tokio::test]
async fn what_an_earlier_version_left_is_kept() {
    let (postgres, redis, settings) = kinds().await;
    let daemon = Daemon::with(&settings).await;
    daemon.ready().await;
    assert_eq!(daemon.stop().await, Some(0));
    let earlier = earlier_state(&postgres.slot(), &contents(&redis).await);
    redis.flush().await;
    put(&redis, &earlier).await;

    let daemon = Daemon::with(&settings).await;
    resumed(&daemon, "upgrade").await;
    let tables = format!("prefetchd:{{{}}}:tables", postgres.slot());
    let lists = |entries: &Value| {
        let of = |table: &str| {
            serde_json::from_str::<Value>(entries[table].as_str().unwrap()).unwrap()["lookups_as"].clone()
        };
        ["kinds", "kinds_json"].map(of)
    };
    let kept = lists(&json!(redis.hash(&tables).await));
    assert_eq!(kept, lists(&earlier[&tables]["hash"]), "lists were made again");
    let lsn = postgres.execute("UPDATE kinds SET tags = '{z}', amount = 3 WHERE id = 1").await;
    daemon.applied(lsn).await;
    has_no_drift(&daemon).await;
    let listed: Vec<String> = redis.command(&["ZRANGE", "kinds-by-tag:z", "0", "-1"]).await;
    assert_eq!(listed, ["a%3Ab:1"]);
    assert_eq!(daemon.stop().await, Some(0));
}

/// It is no reason to stop, nor to guess.
#[tokio::test]
async fn a_state_of_another_form_counts_as_lost() {
    let (postgres, redis, settings) = kinds().await;
    let daemon = Daemon::with(&settings).await;
    daemon.ready().await;
    assert_eq!(daemon.stop().await, Some(0));
    let before = redis.keys("*kind*").await;
    let checkpoint = format!("prefetchd:{{{}}}:checkpoint", postgres.slot());
    redis.command::<()>(&["SET", &checkpoint, r#"{"format":"another","lsn":"0/1"}"#]).await;

    let daemon = Daemon::with(&settings).await;
    daemon.allow_warning("the checkpoint in redis cannot be read, treated as lost");
    daemon.allow_warning("loading every table again");
    daemon.ready().await;
    assert_eq!(daemon.said("treated as lost"), 1, "{}", daemon.log_text());
    assert_eq!((redis.keys("*kind*").await, &daemon.status().await["primary_reads"]), (before, &json!(2)));
    has_no_drift(&daemon).await;
    assert_eq!(daemon.stop().await, Some(0));
}

/// The paths of all values in a response.
fn fields(of: &str, value: &Value, into: &mut BTreeSet<String>) {
    into.insert(of.to_owned());
    match value {
        Value::Object(members) => members.iter().for_each(|(name, value)| fields(&format!("{of}.{name}"), value, into)),
        Value::Array(members) => members.iter().for_each(|value| fields(&format!("{of}[]"), value, into)),
        _ => {}
    }
}

/// What scripts, dashboards and applications name: routes with their statuses, fields of the status, metrics with their labels,
/// commands with their options.
async fn names(program: &Path, daemon: &Daemon) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    fields("status", &daemon.status().await, &mut names);
    // As long as a table is being loaded.
    names.retain(|name| !name.contains(".loading."));
    let description = daemon.get("/openapi.json").await.json();
    // The page's files are its own.
    let routes = description["paths"].as_object().unwrap().iter().filter(|(route, _)| !route.starts_with("/page/"));
    for (route, methods) in routes {
        for (method, about) in methods.as_object().unwrap() {
            let statuses = about["responses"].as_object().into_iter().flatten().map(|(status, _)| status);
            names.extend(statuses.map(|status| format!("{method} {route} {status}")));
        }
    }
    for series in daemon.metrics().await.keys().filter(|series| series.starts_with("prefetchd_")) {
        let (name, labels) = series.split_once('{').unwrap_or((series, ""));
        let labels: Vec<_> =
            labels.split("\",").filter_map(|label| label.split_once('=')).map(|(name, _)| name).collect();
        names.insert(format!("{name} {}", labels.join(" ")));
    }
    let help = |args: &[&str]| {
        let output = std::process::Command::new(program).args(args).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    let first =
        |line: &str| line.strip_prefix("  ").and_then(|line| line.split(' ').next()).unwrap_or_default().to_owned();
    let text = help(&["--help"]);
    for command in text.lines().skip_while(|line| *line != "Commands:").skip(1).map(first).take_while(|c| !c.is_empty())
    {
        let text = help(&[&command, "--help"]);
        let options = text.split_whitespace().filter(|word| word.starts_with("--"));
        names.extend(
            options.map(|option| format!("{command} {}", option.trim_end_matches(|c: char| !c.is_ascii_alphabetic()))),
        );
        names.insert(command);
    }
    names
}

/// A configuration, and whatever reads the responses, metrics and commands of an earlier version, works with this one.
#[tokio::test]
async fn what_an_earlier_version_names_is_still_there() {
    let (_postgres, _redis, settings) = kinds().await;
    let daemon = Daemon::with(&settings).await;
    daemon.ready().await;
    let now = names(Path::new(env!("CARGO_BIN_EXE_prefetchd")), &daemon).await;
    let gone: Vec<_> = EARLIER_NAMES.lines().filter(|name| !now.contains(*name)).collect();
    assert!(gone.is_empty(), "{gone:#?}");
    // Every key, with its default.
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/earlier/prefetchd.toml");
    let ran = run_configured(&file, &[], &["config"]).await;
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert_eq!(daemon.stop().await, Some(0));
}

/// For a new baseline: `PREFETCHD_EARLIER=PROGRAM cargo test --test integration -- --ignored an_earlier_version_is_captured`,
/// and its config/prefetchd.toml.
#[tokio::test]
#[ignore = "writes tests/earlier"]
async fn an_earlier_version_is_captured() {
    let (postgres, redis, settings) = kinds().await;
    let [earlier, _] = versions(&settings);
    let daemon = Daemon::with(&earlier).await;
    daemon.ready().await;
    let names: Vec<String> = names(Path::new(&earlier_program()), &daemon).await.into_iter().collect();
    assert_eq!(daemon.stop().await, Some(0));
    let state = serde_json::to_string_pretty(&contents(&redis).await).unwrap().replace(&postgres.slot(), "$slot");
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/earlier");
    std::fs::write(folder.join("state.json"), state + "\n").unwrap();
    std::fs::write(folder.join("names.txt"), names.join("\n") + "\n").unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs the program of an earlier version: scripts/test-upgrade"]
async fn versions_replace_each_other_while_rows_are_written_and_read() {
    let mut scene = Scene::quiet(Postgres::shared(), Redis::start(), ROWS).await;
    let settings = Traffic::settings_with_lists(&scene.postgres, &scene.redis);
    let [earlier, this] = versions(&settings.clone().tables(&format!("{}{DOCUMENTS}", settings.tables_toml())));
    let http = HttpWatcher::start(scene.traffic, 1);
    let mut consumer = Consumer::of_large_rows();
    scene.settings = earlier.clone();
    let mut daemon = scene.daemon().await;
    daemon.ready().await;
    scene.watcher.reads_lists().await;
    http.reads_lists().await;
    http.ask(vec![daemon.address()]).await;
    scene.write();
    let documents = Documents::change(&scene.postgres);
    let shapes_before = shapes(&scene).await;

    for how in [Replaced::AfterStop, Replaced::ByStandby, Replaced::AfterKill] {
        for (next, what) in [(&this, "upgrade"), (&earlier, "downgrade")] {
            println!("{what} {how:?}");
            scene.more_is_written(200).await;
            scene.settings = next.clone();
            if how == Replaced::ByStandby {
                let standby = scene.daemon().await;
                standby.status_when("it stands by", |status| status["state"] == "standby").await;
                standby.ready().await;
                let before = http.all_refused().await;
                http.ask(vec![daemon.address(), standby.address()]).await;
                scene.more_is_written(200).await;
                http.ask(vec![standby.address()]).await;
                assert_eq!(std::mem::replace(&mut daemon, standby).stop().await, Some(0));
                resumed(&daemon, what).await;
                assert_eq!(http.all_refused().await, before, "{what}: readers noticed");
            } else {
                match how {
                    Replaced::AfterKill => daemon.kill9(),
                    _ => assert_eq!(daemon.stop().await, Some(0)),
                }
                scene.more_is_written(200).await;
                daemon = scene.daemon().await;
                http.ask(vec![daemon.address()]).await;
                resumed(&daemon, what).await;
            }
            daemon.applied(scene.postgres.position().await).await;
            assert_eq!(shapes(&scene).await, shapes_before, "{what}");
            consumer.follow(&scene.redis.url(), STREAM).await;
            scene.watcher.check().await;
            http.check().await;
        }
    }

    // And once more, for good.
    assert_eq!(daemon.stop().await, Some(0));
    scene.settings = this;
    let daemon = scene.daemon().await;
    http.ask(vec![daemon.address()]).await;
    resumed(&daemon, "upgrade").await;
    let changes = documents.stop().await;
    scene.rest().await;
    daemon.applied(scene.postgres.position().await).await;
    println!("over HTTP: {}; {changes} changes of documents", http.stop().await);
    scene.traffic.assert_equal(&scene.postgres, &scene.redis, TTL).await;
    scene.traffic.assert_listed_and_told(&scene.postgres, &scene.redis, &mut consumer).await;
    has_no_drift(&daemon).await;
    scene.ends(daemon).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs the program of an earlier version: scripts/test-upgrade"]
async fn versions_replace_each_other_on_a_cluster() {
    if Redis::lacks(Feature::Lanes).await {
        return;
    }
    let mut scene = LaneScene::with(Postgres::shared(), Cluster::start().await, 0, seed()).await;
    let [earlier, this] = versions(&scene.settings);
    scene.settings = earlier.clone();
    let daemon = scene.daemon().await;
    scene.daemons.push(daemon);
    scene.settled().await;
    scene.ask_all().await;
    let load = scene.write_in_place();
    let rounds = [
        (Replaced::AfterStop, &this),
        (Replaced::AfterKill, &earlier),
        (Replaced::AfterKill, &this),
        (Replaced::AfterStop, &earlier),
        (Replaced::ByStandby, &this),
    ];
    for (how, next) in rounds {
        println!("{how:?}");
        load.more(200).await;
        scene.settings = next.clone();
        if how == Replaced::ByStandby {
            let standby = scene.daemon().await;
            scene.daemons.push(standby);
            scene.settled().await;
        }
        let old = scene.daemons.remove(0);
        match how {
            Replaced::AfterKill => old.kill9(),
            _ => assert_eq!(old.stop().await, Some(0)),
        }
        if scene.daemons.is_empty() {
            let next = scene.daemon().await;
            scene.daemons.push(next);
        }
        scene.ask_all().await;
        scene.recovered(&load).await;
        resumed(&scene.daemons[0], &format!("{how:?}")).await;
        scene.check().await;
    }
    scene.is_whole(load).await;
    has_no_drift(&scene.daemons[0]).await;
    scene.stop().await;
}
