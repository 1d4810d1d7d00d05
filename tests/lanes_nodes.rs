//! What the nodes of a cluster say of themselves and of their hash slots, and what follows for daemons with rows in all of
//! them.

use crate::harness::{Cluster, Redis, eventually};
use crate::lanes::Scattered;
use prefetchd::command::Key;
use prefetchd::lanes::Lane;
use prefetchd::resp::batch::OwnKeys;
use prefetchd::sink::connect::RedisTarget;
use prefetchd::sink::lane_reader::LaneReader;
use std::collections::BTreeSet;
use std::time::Duration;
use tokio::time::timeout;

const EVICTED: &str = r#"prefetchd_heals_total{reason="evicted"}"#;

/// Lists all keys of rows, as a verification does.
async fn listed(reader: &LaneReader) -> BTreeSet<String> {
    let (mut keys, mut cursor) = (BTreeSet::new(), 0);
    loop {
        let (next, page): (u64, Vec<Key>) = reader.scan_page(b"item:", cursor).await.unwrap();
        keys.extend(page.into_iter().map(|key| key.to_string()));
        cursor = next;
        if cursor == 0 {
            return keys;
        }
    }
}

/// While a slot is moved key by key, SCAN may find a key on neither node, and the topology stays as it was.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_are_listed_when_no_slot_moves() {
    let scene = Scattered::on(Cluster::start().await).await;
    assert_eq!(scene.daemon().await.stop().await, Some(0));
    let slot = scene.postgres.slot();
    let target = RedisTarget::parse(&scene.cluster.daemon_url()).unwrap();
    let reader = LaneReader::connect_lazy(&target, &OwnKeys::under(&format!("prefetchd:{{{slot}}}:")), &slot);
    let all = listed(&reader).await;
    let lane = Lane::of(b"item:1");
    let to = (scene.cluster.master_of(lane).await + 1) % 3;
    scene.cluster.begin_move(lane, to).await;
    scene.cluster.move_keys(lane, to, "1").await;
    let early = timeout(Duration::from_secs(3), listed(&reader)).await;
    assert!(early.is_err(), "listed while keys were moving: {} of {}", early.unwrap().len(), all.len());
    while scene.cluster.move_keys(lane, to, "100").await > 0 {}
    scene.cluster.end_move(lane, to).await;
    assert_eq!(listed(&reader).await, all);
}

/// Longer than the daemon waits for a slot before it says so.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "half a minute, in which nothing but a timeout happens"]
async fn a_slot_that_moves_for_long_is_named() {
    let scene = Scattered::on(Cluster::start().await).await;
    let daemon = scene.daemon().await;
    daemon.allow_warnings();
    let lane = Lane::of(b"item:1");
    let to = (scene.cluster.master_of(lane).await + 1) % 3;
    scene.cluster.begin_move(lane, to).await;
    scene.cluster.move_keys(lane, to, "1").await;
    scene.postgres.execute("UPDATE items SET name = 'moved' WHERE id = 1").await;
    let slot = format!("hash slot {lane}");
    let waiting = |status: &serde_json::Value| status["waiting_for"].as_str().is_some_and(|what| what.contains(&slot));
    daemon.status_when("waiting for the slot", waiting).await;
    while scene.cluster.move_keys(lane, to, "100").await > 0 {}
    scene.cluster.end_move(lane, to).await;
    scene.follows(&daemon, "UPDATE items SET name = 'again' WHERE id = 1").await;
    daemon.ready().await;
    scene.is_whole().await;
    assert_eq!(daemon.said("loading every table again"), 0, "{}", daemon.log_text());
    assert_eq!(daemon.stop().await, Some(0));
}

/// As where the answer about the topology is older than a failover.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_was_taken_for_a_master_is_not_written_to() {
    let mut scene = Scattered::on(Cluster::with_replicas().await).await;
    let (proxies, url) = scene.cluster.through_proxies().await;
    scene.settings = scene.settings.text("redis.url", &url);
    let daemon = scene.daemon().await;
    daemon.allow_warnings();
    proxies[0].lead_to(scene.cluster.node(3).port());
    scene.postgres.execute("UPDATE items SET name = 'new'").await;
    let demoted = |status: &serde_json::Value| {
        status["waiting_for"].as_str().is_some_and(|what| what.contains("names as the master of hash slot"))
    };
    daemon.status_when("waiting for a master", demoted).await;
    proxies[0].lead_to(scene.cluster.node(0).port());
    scene.follows(&daemon, "UPDATE items SET name = 'newer' WHERE id = 1").await;
    daemon.ready().await;
    scene.is_whole().await;
    assert_eq!(daemon.said("loading every table again"), 0, "{}", daemon.log_text());
    assert_eq!(daemon.stop().await, Some(0));
}

/// Makes a master evict some rows, as one without memory does. `key` belongs to it.
async fn evict(node: &Redis, key: &str) {
    node.command::<()>(&["CONFIG", "SET", "maxmemory-policy", "volatile-random"]).await;
    let rows = async || node.keys("item:*").await.len();
    let all = rows().await;
    let fewer = async || {
        let info: String = node.command(&["INFO", "memory"]).await;
        let used = info.lines().find_map(|line| line.strip_prefix("used_memory:")?.trim().parse::<u64>().ok()).unwrap();
        let mut limited = redis::pipe();
        limited.cmd("CONFIG").arg(&["SET", "maxmemory"]).arg(used - 100_000);
        // Redis evicts when something is written.
        limited.cmd("SET").arg(&[key, "x"]).cmd("CONFIG").arg(&["SET", "maxmemory", "0"]).cmd("DEL").arg(key);
        limited.exec_async(&mut node.connection().await).await.unwrap();
        rows().await
    };
    eventually("some are evicted", fewer, |rows| *rows < all).await;
}

/// A replica that took over counts from zero, and its old master knows nothing of it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_that_a_new_master_evicts_are_brought_back() {
    let scene = Scattered::on(Cluster::with_replicas().await).await;
    let daemon = scene.daemon().await;
    daemon.allow_warnings();
    let key = format!("item:{}", scene.id_on(0, 1).await);
    scene.cluster.fail_over_to(3).await;
    scene.cluster.replicates(0).await;
    scene.follows(&daemon, "UPDATE items SET name = 'new' WHERE id = 1").await;
    evict(scene.cluster.node(3), &format!("other:{{{key}}}")).await;
    let heals = async || daemon.metrics().await[EVICTED];
    eventually("it is noticed", heals, |heals| *heals > 0.0).await;
    daemon.ready().await;
    let missing = async || scene.cluster.keys("item:*").await.len();
    eventually("everything is there again", missing, |rows| *rows == 3_000).await;
    scene.is_whole().await;
    assert_eq!(daemon.stop().await, Some(0));
}
