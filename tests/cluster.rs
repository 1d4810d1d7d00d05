//! Redis Cluster: discovery, and daemons whose keys all share one hash slot.

use crate::harness::{Cluster, Daemon, Feature, Postgres, Redis, Settings, eventually, run_program};
use prefetchd::command::Key;
use prefetchd::error::Disposition;
use prefetchd::lanes::Lane;
use prefetchd::resp::batch::OwnKeys;
use prefetchd::sink::SinkError;
use prefetchd::sink::connect::RedisTarget;
use prefetchd::sink::reader::Reader;
use prefetchd::sink::topology::Topology;
use prefetchd::sink::writer::Writer;
use std::collections::BTreeSet;
use std::net::TcpListener;

fn target(url: &str) -> RedisTarget {
    RedisTarget::parse(url).unwrap()
}

/// What the other tests here rely on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slots_move_and_replicas_take_over_in_the_cluster_of_the_tests() {
    let mut cluster = Cluster::with_replicas().await;
    let lane = Lane::of(b"{tag}");
    let (first, other) = (cluster.master_of(lane).await, (cluster.master_of(lane).await + 1) % 3);
    cluster.node(first).command::<()>(&["HSET", "{tag}a", "f", "1"]).await;
    cluster.node(first).command::<()>(&["HSET", "{tag}b", "f", "2"]).await;
    cluster.move_slot(lane, other).await;
    assert_eq!(cluster.master_of(lane).await, other);
    assert_eq!((&cluster.hash("{tag}a").await["f"][..], &cluster.hash("{tag}b").await["f"][..]), ("1", "2"));

    cluster.fail_over_to(other + 3).await;
    assert_eq!(cluster.master_of(lane).await, other + 3);
    assert_eq!(cluster.keys("{tag}*").await, ["{tag}a", "{tag}b"]);
    cluster.replicates(other).await;
    cluster.kill(other + 3);
    cluster.take_over(other).await;
    assert_eq!(cluster.hash("{tag}b").await["f"], "2");
    cluster.start_again(other + 3);
    cluster.replicates(other + 3).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_masters_of_all_slots_are_discovered() {
    let mut cluster = Cluster::with_replicas().await;
    let target = target(&cluster.daemon_url());
    // What the harness does when a configuration is written.
    cluster.nodes().iter().for_each(|node| node.daemon_user().grant(["+cluster|slots".to_owned()]));
    let (slot, lane) = (Lane::of(b"a"), Lane::of(b"{tag}"));
    let moved_to = (cluster.master_of(lane).await + 1) % 3;
    cluster.move_slot(lane, moved_to).await;
    // A seed that does not answer must not matter.
    let master = cluster.master_of(slot).await;
    let replica = master + 3;
    cluster.kill(master);
    cluster.take_over(replica).await;
    let topology = Topology::discover(&target).await.unwrap();
    for (lane, index) in [(slot, replica), (lane, cluster.master_of(lane).await)] {
        let node = topology.master_of(lane).unwrap();
        assert_eq!((&*node.id, node.at.port), (cluster.id(index), cluster.node(index).port()), "{topology:?}");
    }
    assert_eq!((topology.nodes().len(), topology.uncovered()), (3, 0), "{topology:?}");
}

#[tokio::test]
async fn a_node_that_the_others_have_lost_is_not_believed() {
    let (lost, cluster) = (Redis::with(&["--cluster-enabled", "yes"]), Cluster::start().await);
    // It serves all slots, as it believes, in a cluster that is not up.
    Cluster::serve(&lost, 0..Lane::ALL - 1).await;
    for node in cluster.nodes().iter().chain([&lost]) {
        node.daemon_user().grant(["+cluster|slots".to_owned(), "+cluster|info".to_owned()]);
    }
    let alone = format!("redis+cluster://{}@127.0.0.1:{}", lost.login(), lost.port());
    let both = cluster.daemon_url().replace('@', &format!("@127.0.0.1:{},", lost.port()));
    let topology = Topology::discover(&target(&both)).await.unwrap();
    assert_eq!((topology.nodes().len(), topology.is_up()), (3, true), "{topology:?}");
    let topology = Topology::discover(&target(&alone)).await.unwrap();
    assert_eq!((topology.nodes().len(), topology.is_up(), topology.uncovered()), (1, false, 1), "{topology:?}");
}

#[tokio::test]
async fn nodes_of_the_url_may_go_once_others_are_known() {
    let mut cluster = Cluster::start().await;
    cluster.nodes().iter().for_each(|node| node.daemon_user().grant(["+cluster|slots".to_owned()]));
    let target = target(&format!("redis+cluster://{}@127.0.0.1:{}", cluster.node(0).login(), cluster.node(0).port()));
    let topology = Topology::discover(&target).await.unwrap();
    assert_eq!((topology.nodes().len(), topology.is_up()), (3, true));
    cluster.kill(0);
    // What it says meanwhile does not matter, but that somebody answers.
    assert_eq!(Topology::discover(&target).await.unwrap().nodes().len(), 3);
}

#[tokio::test]
async fn what_is_no_cluster_is_said() {
    let redis = Redis::start();
    let error = async |url: &str| Topology::discover(&target(url)).await.unwrap_err();
    let at = format!("{}@127.0.0.1:{}", redis.login(), redis.port());
    let denied = error(&format!("redis+cluster://{at}")).await;
    assert!(denied.to_string().contains("ACL SETUSER prefetchd '+cluster|slots'"), "{denied}");
    redis.daemon_user().grant(["+cluster|slots".to_owned()]);
    let single = error(&format!("redis+cluster://{at}")).await;
    assert!(matches!(single, SinkError::NotACluster { .. }), "{single}");
    let nobody = error("redis+cluster://127.0.0.1:1,127.0.0.1:2").await;
    assert!(
        matches!(&nobody, SinkError::NoTopology { said } if said.contains(":1:") && said.contains(":2:")),
        "{nobody}"
    );
}

// ------------------------------------------------------------------------------------------------------------ one slot

/// A database, and a cluster for a daemon whose keys all have the hash tag of prefetchd's own.
struct OneSlot {
    postgres: Postgres,
    cluster: Cluster,
    /// What the keys of `categories` begin with.
    literal: String,
    lane: Lane,
    settings: Settings,
}

/// The template of `categories`, as TOML.
fn categories(key: &str) -> String {
    format!("[[tables]]\nname = \"categories\"\ntable = \"public.categories\"\nkey = \"{key}\"\n")
}

impl OneSlot {
    async fn on(cluster: Cluster) -> Self {
        let postgres = Postgres::shared();
        let slot = postgres.slot();
        let settings = Settings::on_cluster(&postgres, &cluster);
        let settings = settings.tables(&categories(&format!("cache:{{{{{slot}}}}}:category:{{id}}")));
        let (literal, lane) = (format!("cache:{{{slot}}}:category:"), Lane::of(slot.as_bytes()));
        Self { postgres, cluster, literal, lane, settings }
    }

    /// Starts a daemon that has loaded everything.
    async fn daemon(&self) -> Daemon {
        let daemon = Daemon::with(&self.settings).await;
        daemon.ready().await;
        daemon
    }

    /// Another node than the one that now serves the keys.
    async fn elsewhere(&self) -> usize {
        (self.cluster.master_of(self.lane).await + 1) % 3
    }

    async fn name(&self, id: &str) -> Option<String> {
        self.cluster.hash(&format!("{}{id}", self.literal)).await.remove("name")
    }

    /// Renames a category and waits until the daemon has applied that, and serves it.
    async fn follows(&self, daemon: &Daemon, name: &str) {
        let lsn = self.postgres.execute(&format!("UPDATE categories SET name = '{name}' WHERE id = 'cat-001'")).await;
        daemon.applied(lsn).await;
        assert_eq!(self.name("cat-001").await.as_deref(), Some(name));
        let answer = async || daemon.get("/v1/tables/categories/cat-001").await;
        let answer = eventually("it is served", answer, |answer| answer.status == 200).await;
        assert_eq!(answer.json()["name"], name);
    }

    /// All rows of the table are in Redis, and nothing else is.
    async fn is_whole(&self) {
        let ids = "SELECT string_agg(id, ' ' ORDER BY id COLLATE \"C\") FROM categories";
        let ids = self.postgres.value(ids).await.unwrap_or_default();
        let keys: Vec<String> = ids.split_whitespace().map(|id| format!("{}{id}", self.literal)).collect();
        assert_eq!(self.cluster.keys("cache:*").await, keys);
    }
}

/// Lines that say that rows are loaded again, which is needed only after a loss.
const RELOADS: &str = "loading every table again";

/// It went on by itself, and with what was there.
fn lost_nothing(daemon: &Daemon) {
    let said = [RELOADS, "\"level\":\"ERROR\""].map(|text| daemon.said(text));
    assert_eq!(said, [0, 0], "{}", daemon.log_text());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_of_one_slot_are_loaded_and_followed_on_a_cluster() {
    let scene = OneSlot::on(Cluster::start().await).await;
    let ran = run_program(&scene.settings, &["check", "--all"]).await;
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let home = format!("cluster of 3 masters; all keys are in hash slot {}", scene.lane);
    assert!(ran.stdout.contains(&home), "{ran:?}");

    let daemon = scene.daemon().await;
    scene.is_whole().await;
    scene.follows(&daemon, "Drinks").await;
    let lsn = scene.postgres.execute("INSERT INTO categories (id, name) VALUES ('cat-new', 'New')").await;
    daemon.applied(lsn).await;
    assert_eq!(scene.name("cat-new").await.as_deref(), Some("New"));
    let lsn = scene.postgres.execute("DELETE FROM categories WHERE id = 'cat-new'").await;
    daemon.applied(lsn).await;
    assert_eq!(daemon.get("/v1/tables/categories/cat-new").await.status, 404);
    scene.is_whole().await;
    let own = scene.cluster.keys("prefetchd:*").await;
    assert!(!own.is_empty() && own.iter().all(|key| Lane::of(key.as_bytes()) == scene.lane), "{own:?}");
    assert_eq!(daemon.stop().await, Some(0));

    let ran = run_program(&scene.settings, &["teardown", "--keys"]).await;
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert_eq!(scene.cluster.keys("*").await, [""; 0]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_that_has_moved_is_followed_to_its_new_node() {
    let scene = OneSlot::on(Cluster::start().await).await;
    let daemon = scene.daemon().await;
    daemon.allow_warnings();
    scene.cluster.move_slot(scene.lane, scene.elsewhere().await).await;
    scene.follows(&daemon, "Drinks").await;
    scene.is_whole().await;
    lost_nothing(&daemon);
    assert_eq!(daemon.stop().await, Some(0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_a_slot_moves_key_by_key_nothing_is_lost() {
    let scene = OneSlot::on(Cluster::start().await).await;
    let daemon = scene.daemon().await;
    daemon.allow_warnings();
    let to = scene.elsewhere().await;
    scene.cluster.begin_move(scene.lane, to).await;
    // As long as all keys are where they were, existing rows are written there.
    scene.follows(&daemon, "Tea").await;
    let moved = scene.cluster.move_keys(scene.lane, to, "6").await;
    assert_eq!(moved, 6);
    scene.postgres.execute("INSERT INTO categories (id, name) VALUES ('cat-new', 'New')").await;
    daemon.status_when("waiting", |status| !status["waiting_for"].is_null()).await;
    for id in ["cat-001", "cat-002", "cat-003", "cat-new"] {
        let read = daemon.get(&format!("/v1/tables/categories/{id}")).await;
        assert!(read.status == 503 || read.status == 200 && id != "cat-new", "{id}: {read:?}");
    }
    while scene.cluster.move_keys(scene.lane, to, "100").await > 0 {}
    scene.cluster.end_move(scene.lane, to).await;
    scene.follows(&daemon, "Drinks").await;
    assert_eq!(scene.name("cat-new").await.as_deref(), Some("New"));
    scene.is_whole().await;
    lost_nothing(&daemon);
    assert_eq!(daemon.stop().await, Some(0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failover_of_the_master_is_followed() {
    let mut scene = OneSlot::on(Cluster::with_replicas().await).await;
    let daemon = scene.daemon().await;
    daemon.allow_warnings();
    let first = scene.cluster.master_of(scene.lane).await;
    scene.cluster.fail_over_to(first + 3).await;
    scene.follows(&daemon, "Drinks").await;
    lost_nothing(&daemon);

    // This time it dies.
    scene.cluster.replicates(first).await;
    scene.cluster.kill(first + 3);
    scene.cluster.take_over(first).await;
    scene.follows(&daemon, "Beverages").await;
    scene.is_whole().await;
    assert_eq!(daemon.stop().await, Some(0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_that_has_moved_atomically_is_followed() {
    if Redis::lacks(Feature::AtomicMove).await {
        return;
    }
    let scene = OneSlot::on(Cluster::start().await).await;
    let daemon = scene.daemon().await;
    daemon.allow_warnings();
    for name in ["Drinks", "Beverages"] {
        scene.cluster.move_slot_at_once(scene.lane, scene.elsewhere().await).await;
        scene.follows(&daemon, name).await;
    }
    scene.is_whole().await;
    lost_nothing(&daemon);
    assert_eq!(daemon.stop().await, Some(0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failover_to_a_replica_that_lagged_loads_again() {
    let mut scene = OneSlot::on(Cluster::with_replicas().await).await;
    let daemon = scene.daemon().await;
    daemon.allow_warnings();
    let master = scene.cluster.master_of(scene.lane).await;
    scene.cluster.lags(master + 3, master).await;
    scene.follows(&daemon, "Drinks").await;
    let lsn = scene.postgres.execute("DELETE FROM categories WHERE id = 'cat-002'").await;
    daemon.applied(lsn).await;
    // Only then it is a loss.
    eventually("it is confirmed", async || scene.postgres.confirmed().await, |at| *at >= lsn).await;
    scene.cluster.kill(master);
    scene.cluster.take_over(master + 3).await;
    daemon.logged(RELOADS).await;
    daemon.ready().await;
    assert_eq!(scene.name("cat-001").await.as_deref(), Some("Drinks"));
    scene.is_whole().await;
    assert_eq!(daemon.stop().await, Some(0));
}

/// A node that accepts connections and never answers, as behind a broken network.
fn silent_node() -> (TcpListener, String) {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let at = listener.local_addr().unwrap().to_string();
    (listener, at)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn silent_nodes_do_not_keep_a_read_from_the_others() {
    let scene = OneSlot::on(Cluster::start().await).await;
    assert_eq!(scene.daemon().await.stop().await, Some(0));
    let (silent, at): (Vec<_>, Vec<_>) = (0..3).map(|_| silent_node()).unzip();
    let url = scene.cluster.daemon_url().replace('@', &format!("@{},", at.join(",")));
    let own = OwnKeys::under(&format!("prefetchd:{{{}}}:", scene.postgres.slot()));
    let reader = Reader::connect_lazy(&target(&url).at_home(scene.lane), &own);
    let (checkpoint, _) = reader.checkpoint().await.unwrap();
    assert!(checkpoint.is_some());
    drop(silent);
}

/// A scan that starts on a node which has lost keys, or the slot, must not be taken for all keys.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_page_of_keys_is_taken_from_a_slot_that_moves() {
    let scene = OneSlot::on(Cluster::start().await).await;
    assert_eq!(scene.daemon().await.stop().await, Some(0));
    let (to, prefix) = (scene.elsewhere().await, scene.literal.as_bytes());
    let own = OwnKeys::under(&format!("prefetchd:{{{}}}:", scene.postgres.slot()));
    let target = target(&scene.cluster.daemon_url()).at_home(scene.lane);
    let reader = Reader::connect_lazy(&target, &own);
    let (_, all) = reader.scan_page(prefix, 0).await.unwrap();
    let (mut writer, _) = Writer::connect(&target, &own).await.unwrap();

    scene.cluster.begin_move(scene.lane, to).await;
    scene.cluster.move_keys(scene.lane, to, "5").await;
    for refused in [reader.scan_page(prefix, 0).await.unwrap_err(), writer.scan_page(prefix, 0).await.unwrap_err()] {
        assert!(refused.to_string().contains("ASK"), "{refused}");
        assert_eq!(refused.disposition(), Disposition::Retry);
    }
    while scene.cluster.move_keys(scene.lane, to, "100").await > 0 {}
    scene.cluster.end_move(scene.lane, to).await;
    let (_, moved) = reader.scan_page(prefix, 0).await.unwrap();
    let sorted = |keys: Vec<Key>| keys.into_iter().map(|key| key.to_string()).collect::<BTreeSet<_>>();
    assert_eq!(sorted(moved), sorted(all));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_whose_announced_addresses_cannot_be_reached_are_mapped() {
    if Redis::lacks(Feature::AnnouncedHostname).await {
        return;
    }
    let announced = ["--cluster-announce-hostname", "redis.invalid", "--cluster-preferred-endpoint-type", "hostname"];
    let scene = OneSlot::on(Cluster::with(3, 0, &announced).await).await;
    let ports = scene.cluster.nodes().iter().map(Redis::port);
    let map: Vec<String> = ports.map(|port| format!("map=redis.invalid:{port}=127.0.0.1:{port}")).collect();
    let url = scene.cluster.daemon_url();
    let daemon = Daemon::with(&scene.settings).await;
    daemon.allow_warnings();
    let waiting = daemon.status_when("waiting", |status| !status["waiting_for"].is_null()).await;
    assert!(waiting["waiting_for"].as_str().unwrap().contains("redis.invalid"), "{waiting}");
    daemon.kill9();
    let settings = scene.settings.text("redis.url", &format!("{url}?{}", map.join("&")));
    let daemon = Daemon::with(&settings).await;
    daemon.ready().await;
    assert_eq!(daemon.stop().await, Some(0));
}

/// A daemon that writes one hash slot could not remove what lies in others.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_of_several_slots_are_removed_before_one_slot_is_used() {
    let scene = OneSlot::on(Cluster::start().await).await;
    let several = Settings::on_cluster(&scene.postgres, &scene.cluster);
    let daemon = Daemon::with(&several).await;
    daemon.ready().await;
    assert_eq!(daemon.stop().await, Some(0));
    let (code, said) = Daemon::refused(&scene.settings);
    assert_eq!(code, Some(78), "{said}");
    assert!(said.contains("cache:category:{id}") && said.contains("teardown --keys"), "{said}");
    let ran = run_program(&several, &["teardown", "--keys"]).await;
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let daemon = scene.daemon().await;
    scene.is_whole().await;
    assert_eq!(daemon.stop().await, Some(0));
}
