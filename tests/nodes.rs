//! What operators see of the nodes of a Redis Cluster: in the status, in the metrics, and in what the daemon says it waits
//! for.

use crate::harness::browser::Browser;
use crate::harness::{Cluster, Daemon, Postgres, Settings, run_program};
use nix::sys::signal::Signal;
use prefetchd::lanes::Lane;
use serde_json::Value;
use std::collections::BTreeSet;

const ROWS: u32 = 500;

/// A database with some rows, and a cluster for them.
struct Scene {
    postgres: Postgres,
    cluster: Cluster,
    settings: Settings,
}

impl Scene {
    async fn on(cluster: Cluster, key: impl Fn(&str) -> String) -> Self {
        let postgres = Postgres::shared();
        postgres.execute("CREATE TABLE items (id int PRIMARY KEY, name text NOT NULL)").await;
        postgres.execute("GRANT SELECT ON items TO prefetchd; ALTER PUBLICATION prefetchd ADD TABLE items").await;
        postgres.execute(&format!("INSERT INTO items SELECT i, 'name' FROM generate_series(1, {ROWS}) i")).await;
        let key = key(&postgres.slot());
        let tables = format!("[[tables]]\nname = \"items\"\ntable = \"public.items\"\nkey = \"{key}\"\n");
        let settings = Settings::on_cluster(&postgres, &cluster).tables(&tables);
        Self { postgres, cluster, settings }
    }

    async fn scattered(cluster: Cluster) -> Self {
        Self::on(cluster, |_| "item:{id}".to_owned()).await
    }

    async fn daemon(&self) -> Daemon {
        let daemon = Daemon::with(&self.settings).await;
        daemon.ready().await;
        daemon
    }

    fn at(&self, node: usize) -> String {
        format!("127.0.0.1:{}", self.cluster.node(node).port())
    }
}

/// The hash slots of all rows.
fn lanes() -> BTreeSet<Lane> {
    (1..=ROWS).map(|id| Lane::of(format!("item:{id}").as_bytes())).collect()
}

/// What the status says of this node.
fn node<'a>(status: &'a Value, at: &str) -> &'a Value {
    let nodes = status["nodes"].as_array().unwrap();
    nodes.iter().find(|node| node["node"] == at).unwrap_or(&Value::Null)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_master_is_shown_with_what_it_has() {
    let scene = Scene::scattered(Cluster::with_replicas().await).await;
    let daemon = scene.daemon().await;
    let lsn = scene.postgres.execute("UPDATE items SET name = 'new' WHERE id = 1").await;
    daemon.applied(lsn).await;
    let knows = |status: &Value| {
        let nodes = status["nodes"].as_array().unwrap();
        nodes.len() == 3
            && nodes.iter().map(|node| node["lanes"].as_u64().unwrap_or(0)).sum::<u64>() == lanes().len() as u64
    };
    let status = daemon.status_when("knows its nodes", knows).await;
    for at in (0..3).map(|index| scene.at(index)) {
        let node = node(&status, &at);
        assert!(node["hash_slots"].as_u64().unwrap() > 5000, "{node}");
        assert!(node["lanes"].as_u64().unwrap() > 50, "{node}");
        assert_eq!(
            (&node["healing"], &node["up"], &node["trouble"]),
            (&0.into(), &true.into(), &Value::Null),
            "{node}"
        );
        assert!(node["lsn"].is_string() && node["behind_bytes"].is_u64(), "{node}");
        assert!(node["used_memory_bytes"].as_u64() > Some(500_000), "{node}");
        assert_eq!((&node["max_memory_bytes"], &node["evicted_keys"]), (&0.into(), &0.into()), "{node}");
        assert!(node["answered_seconds_ago"].as_f64().unwrap() < 3.0, "{node}");
    }
    assert!(status["waiting_for"].is_null(), "{status}");

    let metrics = daemon.metrics().await;
    for at in (0..3).map(|index| scene.at(index)) {
        let of = |name: &str| metrics[&format!("prefetchd_redis_node_{name}{{node=\"{at}\"}}")];
        assert_eq!((of("up"), of("healing_lanes"), of("max_memory_bytes")), (1.0, 0.0, 0.0));
        assert!(of("lanes") > 50.0 && of("hash_slots") > 5000.0 && of("lsn") > 0.0 && of("used_memory_bytes") > 5e5);
    }
    let ran = run_program(&scene.settings, &["status", "--url", &format!("http://{}", daemon.address())]).await;
    assert!(ran.stdout.contains("HASH SLOTS") && ran.stdout.contains(&scene.at(2)), "{ran:?}");

    if let Some(browser) = Browser::start().await {
        browser.open(daemon.address()).await;
        browser.shows("#nodes td[data-label=State]", "up").await;
        let shown = browser.text("#nodes").await.unwrap();
        assert!((0..3).all(|index| shown.contains(&scene.at(index))), "{shown}");
        browser.console_is_empty().await;
    }

    // A replica takes the place of its master.
    daemon.allow_warnings();
    scene.cluster.fail_over_to(3).await;
    let takes_over = |status: &Value| {
        node(status, &scene.at(0)).is_null() && node(status, &scene.at(3))["lanes"].as_u64() > Some(50)
    };
    daemon.status_when("shows the new master", takes_over).await;
    let gone = format!("prefetchd_redis_node_up{{node=\"{}\"}}", scene.at(0));
    assert!(!daemon.metrics().await.contains_key(&gone));
    assert_eq!(daemon.stop().await, Some(0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hash_slot_that_is_on_the_move_is_named() {
    let scene = Scene::scattered(Cluster::start().await).await;
    let daemon = scene.daemon().await;
    daemon.allow_warnings();
    let lane = Lane::of(b"item:1");
    let from = scene.cluster.master_of(lane).await;
    let to = (from + 1) % 3;
    scene.cluster.begin_move(lane, to).await;
    while scene.cluster.move_keys(lane, to, "100").await > 0 {}
    let lsn = scene.postgres.execute("UPDATE items SET name = 'moved' WHERE id = 1").await;
    let status = daemon.status_when("waiting", |status| !status["waiting_for"].is_null()).await;
    let moving = format!("hash slot {lane} is moving from {} to {}", scene.at(from), scene.at(to));
    assert_eq!(status["waiting_for"], format!("redis: {moving}"), "{status}");
    assert_eq!(status["state"], "stalled");
    assert!(status["verdict"]["text"].as_str().unwrap().contains(&moving), "{status}");
    let source = node(&status, &scene.at(from));
    assert_eq!((&source["up"], source["trouble"].as_str()), (&true.into(), Some(&*moving)), "{source}");
    let slots = |status: &Value, at: usize| node(status, &scene.at(at))["hash_slots"].as_u64().unwrap();
    let before = slots(&status, to);
    scene.cluster.end_move(lane, to).await;
    daemon.applied(lsn).await;
    let goes_on = |status: &Value| status["waiting_for"].is_null() && slots(status, to) == before + 1;
    let status = daemon.status_when("going on", goes_on).await;
    assert!(status["nodes"].as_array().unwrap().iter().all(|node| node["trouble"].is_null()), "{status}");
    assert_eq!(daemon.stop().await, Some(0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_does_not_answer_is_named() {
    let mut scene = Scene::scattered(Cluster::start().await).await;
    let daemon = scene.daemon().await;
    daemon.allow_warnings();
    let at = scene.at(1);
    scene.cluster.node(1).signal(Signal::SIGSTOP);
    let waits = |status: &Value| status["waiting_for"] == format!("redis: {at} does not answer");
    let status = daemon.status_when("waiting for the frozen node", waits).await;
    let trouble = node(&status, &at)["trouble"].as_str().unwrap();
    assert!(trouble.contains("answer"), "{trouble}");
    scene.cluster.node(1).signal(Signal::SIGCONT);
    let goes_on = |status: &Value| status["waiting_for"].is_null() && node(status, &at)["trouble"].is_null();
    daemon.status_when("going on", goes_on).await;

    scene.cluster.kill(1);
    let waits = |status: &Value| {
        let names_it = |text: &Value| text.as_str().is_some_and(|text| text.contains(&at));
        names_it(&status["waiting_for"]) && names_it(&node(status, &at)["trouble"])
    };
    let status = daemon.status_when("waiting for the node that is gone", waits).await;
    assert_eq!(node(&status, &at)["up"], false, "{status}");
    assert_eq!(node(&status, &scene.at(0))["up"], true, "{status}");
    assert_eq!(daemon.metrics().await[&format!("prefetchd_redis_node_up{{node=\"{at}\"}}")], 0.0);
    scene.cluster.start_again(1);
    let is_back = |status: &Value| status["ready"] == true && node(status, &at)["up"] == true;
    daemon.status_when("whole again", is_back).await;
    assert_eq!(daemon.stop().await, Some(0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_one_hash_slot_its_master_is_shown() {
    let scene = Scene::on(Cluster::start().await, |slot| format!("cache:{{{{{slot}}}}}:item:{{id}}")).await;
    let daemon = scene.daemon().await;
    daemon.allow_warnings();
    let lane = Lane::of(scene.postgres.slot().as_bytes());
    let from = scene.cluster.master_of(lane).await;
    let only = |status: &Value, at: usize| {
        let nodes = status["nodes"].as_array().unwrap();
        let node = nodes.first().unwrap_or(&Value::Null);
        nodes.len() == 1
            && node["node"] == scene.at(at)
            && (node["lanes"].as_u64(), node["healing"].as_u64(), node["up"].as_bool())
                == (Some(1), Some(0), Some(true))
            && node["lsn"] == status["lsn"]["applied"]
            && node["used_memory_bytes"].is_u64()
    };
    daemon.status_when("shows one master", |status| only(status, from)).await;
    let to = (from + 1) % 3;
    scene.cluster.move_slot(lane, to).await;
    let lsn = scene.postgres.execute("UPDATE items SET name = 'moved' WHERE id = 1").await;
    daemon.applied(lsn).await;
    daemon.status_when("shows the other master", |status| only(status, to)).await;
    assert_eq!(daemon.stop().await, Some(0));
}

// --------------------------------------------------------------------------------------------------------------- check

/// Runs `check`, and returns what it prints.
async fn check(scene: &Scene, code: i32) -> String {
    let ran = run_program(&scene.settings, &["check", "--all"]).await;
    assert_eq!(ran.code, Some(code), "{ran:?}");
    ran.stdout
}

/// Asserts that there is a line that begins with `level` and contains all of these parts.
#[track_caller]
fn has_line(output: &str, level: &str, parts: &[&str]) {
    let found = output.lines().any(|line| line.starts_with(level) && parts.iter().all(|part| line.contains(part)));
    assert!(found, "no line {level:?} with {parts:?} in\n{output}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn check_looks_at_every_master() {
    let mut scene = Scene::scattered(Cluster::start().await).await;
    let at = [0, 1, 2].map(|index| scene.at(index));
    let output = check(&scene, 0).await;
    let all = at.join(", ");
    has_line(&output, "ok", &["every master answers", &all]);
    has_line(&output, "ok", &["user prefetchd has every right that is needed"]);
    has_line(&output, "ok", &["every master keeps nothing over a restart"]);
    has_line(&output, "warn", &["no replica of", &all, "cluster-require-full-coverage yes"]);

    let set = async |node: usize, name: &str, value: &str| {
        scene.cluster.node(node).command::<()>(&["CONFIG", "SET", name, value]).await;
    };
    set(1, "maxmemory", "100mb").await;
    set(1, "maxmemory-policy", "allkeys-lru").await;
    let output = check(&scene, 78).await;
    has_line(&output, "fail", &[&at[1], "evicts keys of rows", "CONFIG SET maxmemory-policy noeviction"]);
    set(1, "maxmemory-policy", "noeviction").await;
    set(2, "save", "900 1").await;
    set(0, "cluster-require-full-coverage", "no").await;
    set(1, "cluster-require-full-coverage", "no").await;
    set(2, "cluster-require-full-coverage", "no").await;
    let output = check(&scene, 0).await;
    has_line(&output, "ok", &[&at[1], "of maxmemory 104.9 MB used, noeviction"]);
    has_line(&output, "warn", &["maxmemory differs", &format!("{}: 104.9 MB", at[1]), "no limit"]);
    has_line(&output, "warn", &["differ in what is left after a restart", &format!("{}: saves dumps", at[2])]);
    assert!(!output.contains("cluster-require-full-coverage"), "{output}");

    // Each node has users of its own.
    let user = async |rule: &str| {
        scene.cluster.node(1).command::<()>(&["ACL", "SETUSER", "prefetchd", rule]).await;
    };
    for right in ["evalsha", "script|load", "hgetall"] {
        user(&format!("-{right}")).await;
        let parts = [&format!("may not run {right} on {}:", at[1]), "ACL SETUSER prefetchd", &format!("+{right}")];
        has_line(&check(&scene, 78).await, "fail", &parts);
        user(&format!("+{right}")).await;
    }
    // Without MULTI, what is tried would be done.
    user("-multi").await;
    has_line(&check(&scene, 78).await, "fail", &["may not run multi on", &at[1]]);
    user("+multi").await;
    assert_eq!(scene.cluster.keys("*").await, [""; 0], "it changed nothing");

    scene.cluster.kill(1);
    scene.cluster.kill(2);
    let output = check(&scene, 1).await;
    for at in &at[1..] {
        has_line(&output, "fail", &["redis: master", at, "Connection refused"]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn masters_with_replicas_are_good() {
    let scene = Scene::scattered(Cluster::with_replicas().await).await;
    let output = check(&scene, 0).await;
    assert!(!output.contains("no replica"), "{output}");
}
