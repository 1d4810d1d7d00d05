//! `redis.durability` on a cluster with rows in all hash slots: nothing is confirmed to Postgres before every master has it on
//! its replicas, or on its disk.

use crate::aof::{exact_policies, hold_fsync, release_fsync};
use crate::harness::{Cluster, Daemon, Postgres, Settings, eventually, run_program};
use nix::sys::signal::Signal;
use prefetchd::lsn::Lsn;
use serde_json::Value;

const ROWS: u32 = 300;

struct Durable {
    postgres: Postgres,
    cluster: Cluster,
    settings: Settings,
}

impl Durable {
    async fn on(cluster: Cluster, durability: &str) -> Self {
        let postgres = Postgres::shared();
        let create = format!(
            "CREATE TABLE items (id int PRIMARY KEY, name text);
             INSERT INTO items SELECT i, 'first' FROM generate_series(1, {ROWS}) i;
             GRANT SELECT ON items TO prefetchd; ALTER PUBLICATION prefetchd ADD TABLE items"
        );
        postgres.execute(&create).await;
        let tables = "[[tables]]\nname = \"items\"\ntable = \"public.items\"\nkey = \"item:{id}\"\n";
        let settings = Settings::on_cluster(&postgres, &cluster).tables(tables);
        Self { postgres, cluster, settings: settings.text("redis.durability", durability) }
    }

    async fn daemon(&self) -> Daemon {
        let daemon = Daemon::with(&self.settings).await;
        daemon.allow_warnings();
        daemon.ready().await;
        daemon
    }

    /// Changes every row, so that every hash slot with rows has the returned position once it is applied.
    async fn renames(&self, name: &str) -> Lsn {
        self.postgres.execute(&format!("UPDATE items SET name = '{name}'")).await
    }

    /// Waits until Redis has this change, for which it need not be durable. Then the daemon says that it is not, and why.
    async fn stalls(&self, daemon: &Daemon, lsn: Lsn, node: usize, why: &str) {
        daemon.applied(lsn).await;
        let named = format!(":{}: {why}", self.cluster.node(node).port());
        let says = |status: &Value| {
            let waits = status["waiting_for"].as_str().is_some_and(|what| what.contains(why));
            status["state"] == "stalled" && waits
        };
        let stalled = daemon.status_when("stalled", says).await;
        assert!(stalled["waiting_for"].as_str().unwrap().contains(&named), "{named}: {stalled}");
        assert!(self.postgres.confirmed().await < lsn);
        assert_eq!(daemon.get("/readyz").await.status, 503);
    }

    async fn confirms(&self, lsn: Lsn) {
        let confirmed = async || self.postgres.confirmed().await;
        eventually(&format!("{lsn} is confirmed"), confirmed, |at| *at >= lsn).await;
    }

    /// Every row is read as having this name.
    async fn has(&self, daemon: &Daemon, name: &str) {
        let ids: Vec<u32> = (1..=ROWS).collect();
        for ids in ids.chunks(100) {
            let keys: Vec<String> = ids.iter().map(|id| format!("key={id}")).collect();
            let answer = daemon.get(&format!("/v1/tables/items?{}", keys.join("&"))).await;
            assert_eq!(answer.status, 200, "{answer:?}");
            let rows = answer.json()["rows"].as_object().unwrap().clone();
            assert!(rows.len() == ids.len() && rows.values().all(|row| row["name"] == name), "{answer:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_is_confirmed_only_when_a_replica_of_every_master_has_it() {
    let scene = Durable::on(Cluster::with_replicas().await, "replicas:1").await;
    let daemon = scene.daemon().await;
    let replica = scene.cluster.node(3 + 1);
    replica.signal(Signal::SIGSTOP);
    let lsn = scene.renames("second").await;
    scene.stalls(&daemon, lsn, 1, "0 of 1 replicas have acknowledged").await;
    scene.has(&daemon, "second").await;

    replica.signal(Signal::SIGCONT);
    scene.confirms(lsn).await;
    daemon.ready().await;
    assert_eq!(daemon.status().await["primary_reads"], 1);
    assert_eq!(daemon.stop().await, Some(0));
}

/// The replica that takes over lacks what was written last. Postgres still has it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_replica_lacks_that_takes_over_is_sent_again() {
    let mut scene = Durable::on(Cluster::with_replicas().await, "replicas:1").await;
    let daemon = scene.daemon().await;
    scene.cluster.lags(3 + 1, 1).await;
    let lsn = scene.renames("second").await;
    scene.stalls(&daemon, lsn, 1, "0 of 1 replicas have acknowledged").await;
    scene.cluster.kill(1);
    scene.cluster.take_over(3 + 1).await;
    // Nothing is written before the new master has a replica.
    scene.cluster.start_again(1);
    scene.cluster.replicates(1).await;
    scene.confirms(lsn).await;
    daemon.ready().await;
    scene.has(&daemon, "second").await;
    assert_eq!(daemon.said("loading every table again"), 0, "{}", daemon.log_text());
    assert_eq!(daemon.status().await["primary_reads"], 1);
    assert_eq!(daemon.stop().await, Some(0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_is_confirmed_only_when_every_master_has_it_on_disk() {
    for policy in exact_policies().await {
        let cluster = Cluster::with(3, 0, &["--appendonly", "yes", "--appendfsync", policy]).await;
        let scene = Durable::on(cluster, "aof").await;
        let daemon = scene.daemon().await;
        hold_fsync(scene.cluster.node(2)).await;
        let lsn = scene.renames("second").await;
        scene.stalls(&daemon, lsn, 2, "redis has not fsynced its append-only file yet").await;
        release_fsync(scene.cluster.node(2)).await;
        scene.confirms(lsn).await;
        daemon.ready().await;
        assert_eq!(daemon.stop().await, Some(0));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_master_that_cannot_give_it_is_named_before_anything_begins() {
    let scene = Durable::on(Cluster::start().await, "replicas:1").await;
    let ran = run_program(&scene.settings, &["check"]).await;
    assert_eq!(ran.code, Some(78), "{ran:?}");
    assert!(ran.stdout.contains("0 replicas are connected"), "{ran:?}");
    let (code, said) = Daemon::refused(&scene.settings);
    assert_eq!(code, Some(78), "{said}");
    assert!(said.contains("0 replicas are connected"), "{said}");
}
