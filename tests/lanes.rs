//! Redis Cluster with rows in all hash slots.

use crate::harness::{Cluster, Daemon, Feature, Postgres, Settings, eventually, run_program};
use prefetchd::lanes::Lane;
use std::collections::BTreeMap;

/// More rows than there are masters, and fewer than hash slots.
const ROWS: u32 = 3_000;

pub struct Scattered {
    pub postgres: Postgres,
    pub cluster: Cluster,
    pub settings: Settings,
}

impl Scattered {
    pub async fn on(cluster: Cluster) -> Self {
        let postgres = Postgres::shared();
        postgres.execute("CREATE TABLE items (id int PRIMARY KEY, name text NOT NULL, note text)").await;
        postgres.execute("GRANT SELECT ON items TO prefetchd; ALTER PUBLICATION prefetchd ADD TABLE items").await;
        let rows = format!("INSERT INTO items SELECT i, 'name ' || i FROM generate_series(1, {ROWS}) i");
        postgres.execute(&rows).await;
        let tables = "[[tables]]\nname = \"items\"\ntable = \"public.items\"\nkey = \"item:{id}\"\n";
        let settings = Settings::on_cluster(&postgres, &cluster).tables(tables);
        Self { postgres, cluster, settings }
    }

    pub async fn daemon(&self) -> Daemon {
        let daemon = Daemon::with(&self.settings).await;
        daemon.ready().await;
        daemon
    }

    /// Redis has what Postgres has, and nothing else.
    pub async fn is_whole(&self) {
        let wanted = self.postgres.value("SELECT json_object_agg('item:' || id, name)::text FROM items").await;
        let wanted: BTreeMap<String, String> = serde_json::from_str(&wanted.unwrap_or_default()).unwrap();
        let mut found = BTreeMap::new();
        for key in self.cluster.keys("item:*").await {
            let name = self.cluster.hash(&key).await.remove("name").unwrap_or_default();
            found.insert(key, name);
        }
        assert_eq!(found.len(), wanted.len());
        assert_eq!(found, wanted);
    }

    /// Applies this statement everywhere.
    pub async fn follows(&self, daemon: &Daemon, sql: &str) {
        let lsn = self.postgres.execute(sql).await;
        daemon.applied(lsn).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_are_loaded_and_followed_wherever_their_keys_hash() {
    let scene = Scattered::on(Cluster::start().await).await;
    if !scene.cluster.node(0).has(Feature::Lanes).await {
        let (code, said) = Daemon::refused(&scene.settings);
        assert_eq!(code, Some(78), "{said}");
        let remedy =
            format!("upgrade it, or give all keys the same hash tag, such as \\\"{{{{{}}}}}", scene.postgres.slot());
        assert!(said.contains("need Redis 7.0 or later") && said.contains(&remedy), "{said}");
        let ran = run_program(&scene.settings, &["check"]).await;
        assert_eq!(ran.code, Some(78), "{ran:?}");
        assert!(ran.stdout.contains("need Redis 7.0 or later"), "{ran:?}");
        return;
    }
    let daemon = scene.daemon().await;
    scene.is_whole().await;
    scene.follows(&daemon, "UPDATE items SET name = 'even' WHERE id % 2 = 0").await;
    scene.follows(&daemon, "DELETE FROM items WHERE id % 7 = 0").await;
    scene.follows(&daemon, "UPDATE items SET id = id + 10000 WHERE id < 50").await;
    scene.is_whole().await;
    let read = daemon.get("/v1/tables/items/10002").await;
    assert_eq!((read.status, read.json()["name"].as_str()), (200, Some("even")), "{read:?}");
    assert_eq!(daemon.get("/v1/tables/items/2").await.status, 404);
    let read = daemon.get("/v1/tables/items?key=50&key=51&key=56").await;
    assert_eq!(read.status, 200, "{read:?}");
    let read = daemon.get("/v1/tables/items?key=52&key=51&key=56&typed=true").await;
    let [even, odd] = ["even", "name 51"].map(|name| format!(r#""name":"{name}","note":null}}"#));
    assert_eq!(read.body, format!(r#"{{"rows":{{"52":{{"id":52,{even},"51":{{"id":51,{odd},"56":null}}}}"#));
    scene.follows(&daemon, "TRUNCATE items").await;
    assert_eq!(scene.cluster.keys("item:*").await, [""; 0]);
    assert_eq!(daemon.stop().await, Some(0));

    let ran = run_program(&scene.settings, &["teardown", "--keys"]).await;
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert_eq!(scene.cluster.keys("*").await, [""; 0]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn check_names_the_rights_that_a_cluster_needs() {
    let scene = Scattered::on(Cluster::start().await).await;
    let ran = run_program(&scene.settings, &["check", "--all"]).await;
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert!(ran.stdout.contains("cluster of 3 masters; rows are in the hash slots of their keys"), "{ran:?}");
    let slot = scene.postgres.slot();
    let everywhere = async |rules: &[&str]| {
        for node in scene.cluster.nodes() {
            node.command::<()>(&[&["ACL", "SETUSER", "prefetchd"], rules].concat()).await;
        }
    };
    let marks = format!("~prefetchd:{{*}}:{slot}:*");
    for (revoked, given, named) in [
        (&["-evalsha"][..], &["+evalsha"][..], "+evalsha".to_owned()),
        (&["-script|load"], &["+script|load"], "+script|load".to_owned()),
        (&["resetkeys", "~item:*", "~prefetchd:{*}:checkpoint"], &[&marks], format!("'{marks}'")),
    ] {
        let own = format!("~prefetchd:{{{slot}}}:*");
        everywhere(revoked).await;
        everywhere(&[&own]).await;
        let ran = run_program(&scene.settings, &["check"]).await;
        assert_eq!(ran.code, Some(78), "{ran:?}");
        assert!(ran.stdout.contains("ACL SETUSER prefetchd") && ran.stdout.contains(&named), "{named}: {ran:?}");
        let (code, said) = Daemon::refused(&scene.settings);
        assert_eq!(code, Some(78), "{said}");
        assert!(said.contains(&named), "{named}: {said}");
        everywhere(given).await;
    }
}

/// A value that an UPDATE leaves out stays, where the row stays at its key; a row that moves is read again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn large_values_that_an_update_leaves_out_are_kept() {
    let scene = Scattered::on(Cluster::start().await).await;
    scene.postgres.execute("ALTER TABLE items ALTER note SET STORAGE EXTERNAL").await;
    let large = "UPDATE items SET note = repeat(id::text, 3000) WHERE id < 100";
    let daemon = scene.daemon().await;
    scene.follows(&daemon, large).await;
    scene.follows(&daemon, "UPDATE items SET name = 'small' WHERE id < 100").await;
    scene.follows(&daemon, "UPDATE items SET id = id + 20000 WHERE id < 20").await;
    let wanted = async |id: u32| scene.postgres.value(&format!("SELECT note FROM items WHERE id = {id}")).await;
    for id in [20, 99, 20_001, 20_019] {
        let wanted = wanted(id).await.unwrap();
        let note = async || scene.cluster.hash(&format!("item:{id}")).await.remove("note");
        eventually("the large value is there", note, |note| note.as_deref() == Some(&*wanted)).await;
    }
    scene.is_whole().await;
    assert_eq!(daemon.stop().await, Some(0));
}

/// What lies on the other nodes is served meanwhile, and is not read again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_lost_everything_is_filled_again_and_the_others_go_on() {
    let scene = Scattered::on(Cluster::start().await).await;
    let daemon = scene.daemon().await;
    daemon.allow_warnings();
    let record =
        scene.cluster.master_of(Lane::of(format!("prefetchd:{{{}}}:", scene.postgres.slot()).as_bytes())).await;
    for lost in (0..3).filter(|node| *node != record) {
        let (of_lost, of_others) = (scene.id_on(lost, 1).await, scene.id_on(record, 1).await);
        let of_none = scene.id_on(record, ROWS + 1).await;
        // Nothing can be loaded while the table is locked.
        let blocker = scene.postgres.client().await;
        blocker.batch_execute("BEGIN; LOCK TABLE items IN ACCESS EXCLUSIVE MODE").await.expect("a lock");
        scene.cluster.node(lost).command::<()>(&["FLUSHALL"]).await;
        let read = async |id: u32| daemon.get(&format!("/v1/tables/items/{id}")).await;
        let verdict = async || daemon.status().await["verdict"]["text"].as_str().unwrap_or_default().to_owned();
        eventually("it heals", verdict, |text| text.starts_with("Healing ") && text.contains(" hash slots")).await;
        assert_eq!(daemon.status().await["state"], "healing");
        let missing = async || read(of_none).await.json()["error"].clone();
        eventually("the stream has caught up", missing, |error| *error == "not_found").await;
        for _ in 0..20 {
            let (lost, kept) = (read(of_lost).await, read(of_others).await);
            assert_eq!((lost.status, kept.status), (503, 200), "{lost:?} {kept:?}");
            assert_eq!(lost.json()["error"], "healing");
            let missing = read(of_none).await;
            assert_eq!(missing.status, 404, "{missing:?}");
        }
        blocker.batch_execute("COMMIT").await.expect("the lock is released");
        let missing = async || scene.cluster.keys("item:*").await.len();
        eventually("everything is there again", missing, |found| *found == ROWS as usize).await;
        daemon.ready().await;
        eventually("it is shown", async || read(of_lost).await.status, |status| *status == 200).await;
        scene.is_whole().await;
    }
    assert_eq!(daemon.said("loading every table again"), 0, "{}", daemon.log_text());
    // Without the record, nothing is known.
    scene.cluster.node(record).command::<()>(&["FLUSHALL"]).await;
    eventually("every table is loaded", async || daemon.said("loading every table again"), |times| *times > 0).await;
    daemon.ready().await;
    scene.is_whole().await;
    assert_eq!(daemon.stop().await, Some(0));
}

/// What heals a node dies, the node loses something again, and rows change meanwhile.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_healing_that_was_interrupted_goes_on() {
    let scene = Scattered::on(Cluster::start().await).await;
    scene.postgres.execute("ALTER TABLE items ALTER note SET STORAGE EXTERNAL").await;
    scene.postgres.execute("UPDATE items SET note = repeat(id::text, 3000) WHERE id % 100 = 0").await;
    for round in 0..4 {
        let daemon = scene.daemon().await;
        daemon.allow_warnings();
        let record = format!("prefetchd:{{{}}}:", scene.postgres.slot());
        let record = scene.cluster.master_of(Lane::of(record.as_bytes())).await;
        let lost = (record + 1 + round % 2) % 3;
        scene.postgres.execute(&format!("UPDATE items SET name = 'before {round} ' || id WHERE id % 3 = 0")).await;
        scene.cluster.node(lost).command::<()>(&["FLUSHALL"]).await;
        let healing = format!("UPDATE items SET name = 'healing {round} ' || id WHERE id % 2 = 0 OR id % 100 = 0");
        let (_, ()) = tokio::join!(scene.postgres.execute(&healing), async {
            tokio::time::sleep(std::time::Duration::from_millis(400 + 250 * round as u64)).await;
            daemon.kill9();
        });
        scene.postgres.execute(&format!("DELETE FROM items WHERE id % 50 = {}", 2 * round + 1)).await;
        if round == 3 {
            scene.cluster.node(lost).command::<()>(&["FLUSHALL"]).await;
        }
    }
    let daemon = scene.daemon().await;
    daemon.allow_warnings();
    scene.follows(&daemon, "UPDATE items SET name = name || '!' WHERE id = 2").await;
    daemon.status_when("healed", |status| status["state"] != "healing").await;
    scene.is_whole().await;
    assert_eq!(daemon.stop().await, Some(0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slots_that_move_are_followed() {
    let scene = Scattered::on(Cluster::start().await).await;
    let daemon = scene.daemon().await;
    daemon.allow_warnings();
    for id in [1, 2, 3, 4] {
        let lane = Lane::of(format!("item:{id}").as_bytes());
        let to = (scene.cluster.master_of(lane).await + 1) % 3;
        scene.cluster.move_slot(lane, to).await;
        scene.follows(&daemon, &format!("UPDATE items SET name = 'moved' WHERE id = {id}")).await;
        let read = daemon.get(&format!("/v1/tables/items/{id}")).await;
        assert_eq!((read.status, read.json()["name"].as_str()), (200, Some("moved")), "{read:?}");
    }
    scene.is_whole().await;
    assert_eq!(daemon.said("loading every table again"), 0, "{}", daemon.log_text());
    assert_eq!(daemon.stop().await, Some(0));
}

/// Its mark arrives, and one of its rows does not: the node that it comes from was lost on the way, or somebody has
/// helped.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_slot_has_lost_on_its_way_is_written_again() {
    let scene = Scattered::on(Cluster::start().await).await;
    let daemon = scene.daemon().await;
    daemon.allow_warnings();
    let mut by_lane: BTreeMap<Lane, Vec<u32>> = BTreeMap::new();
    for id in 1..=ROWS {
        by_lane.entry(Lane::of(format!("item:{id}").as_bytes())).or_default().push(id);
    }
    let (lane, ids) = by_lane.into_iter().find(|(_, ids)| ids.len() > 1).expect("more rows than hash slots have room");
    let from = scene.cluster.master_of(lane).await;
    let to = (from + 1) % 3;
    scene.cluster.begin_move(lane, to).await;
    scene.cluster.node(from).command::<()>(&["DEL", &format!("item:{}", ids[0])]).await;
    while scene.cluster.move_keys(lane, to, "100").await > 0 {}
    scene.cluster.end_move(lane, to).await;
    scene.follows(&daemon, &format!("UPDATE items SET name = 'moved' WHERE id = {}", ids[1])).await;
    let never = (ROWS + 1..).find(|id| Lane::of(format!("item:{id}").as_bytes()) == lane).unwrap();
    let [lost, kept, never] = [ids[0], ids[1], never].map(|id| format!("/v1/tables/items/{id}"));
    let missing = async || {
        assert_eq!(daemon.get(&kept).await.status, 200, "what has moved is served");
        let answer = daemon.get(&lost).await;
        assert!(answer.status == 200 || answer.refusal() == (503, "healing".to_owned()), "{answer:?}");
        scene.cluster.keys("item:*").await.len()
    };
    eventually("the row is there again", missing, |found| *found == ROWS as usize).await;
    eventually("what is missing does not exist", async || daemon.get(&never).await.status, |code| *code == 404).await;
    scene.is_whole().await;
    assert_eq!(daemon.stop().await, Some(0));
}

/// While a slot is moved key by key, SCAN may find a key on neither node.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_truncate_waits_for_a_slot_that_is_moving() {
    let scene = Scattered::on(Cluster::start().await).await;
    let daemon = scene.daemon().await;
    daemon.allow_warnings();
    let lane = Lane::of(b"item:1");
    let to = (scene.cluster.master_of(lane).await + 1) % 3;
    scene.cluster.begin_move(lane, to).await;
    let lsn = scene.postgres.execute("TRUNCATE items").await;
    let early = tokio::time::timeout(std::time::Duration::from_secs(3), daemon.applied(lsn)).await;
    assert!(early.is_err(), "it was applied although keys were moving");
    while scene.cluster.move_keys(lane, to, "100").await > 0 {}
    scene.cluster.end_move(lane, to).await;
    daemon.applied(lsn).await;
    assert_eq!(scene.cluster.keys("item:*").await, [""; 0]);
    assert_eq!(daemon.stop().await, Some(0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failover_is_followed() {
    let mut scene = Scattered::on(Cluster::with_replicas().await).await;
    let daemon = scene.daemon().await;
    daemon.allow_warnings();
    scene.cluster.fail_over_to(3).await;
    scene.follows(&daemon, "UPDATE items SET name = 'failed over' WHERE id % 3 = 0").await;
    scene.is_whole().await;

    // This time the master dies.
    scene.cluster.kill(4 - 3);
    scene.cluster.take_over(4).await;
    scene.follows(&daemon, "UPDATE items SET name = 'died' WHERE id % 5 = 0").await;
    daemon.ready().await;
    scene.is_whole().await;
    assert_eq!(daemon.said("have moved"), 0, "{}", daemon.log_text());
    assert_eq!(daemon.stop().await, Some(0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_daemon_that_is_killed_in_mid_round_loses_nothing() {
    let scene = Scattered::on(Cluster::start().await).await;
    for round in 0..5 {
        let daemon = scene.daemon().await;
        daemon.allow_warnings();
        let update = format!("UPDATE items SET name = 'round {round} ' || id");
        let (_, ()) = tokio::join!(scene.postgres.execute(&update), async {
            tokio::time::sleep(std::time::Duration::from_millis(20 * round)).await;
            daemon.kill9();
        });
    }
    let daemon = scene.daemon().await;
    scene.follows(&daemon, "UPDATE items SET name = name || '!' WHERE id = 1").await;
    scene.is_whole().await;
    assert_eq!(daemon.stop().await, Some(0));
}

/// The record of a cluster lies in several keys, and none of them is watched.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_record_of_which_a_part_is_removed_is_written_again() {
    let scene = Scattered::on(Cluster::start().await).await;
    let daemon = scene.daemon().await;
    daemon.allow_warnings();
    let own = format!("prefetchd:{{{}}}:", scene.postgres.slot());
    let (tables, lanes) = (&*format!("{own}tables"), &*format!("{own}lanes"));
    let owner = scene.cluster.node(scene.cluster.master_of(Lane::of(tables.as_bytes())).await);
    let listed = owner.command::<Vec<u8>>(&["GET", lanes]).await;
    assert_eq!(owner.command::<i64>(&["DEL", lanes]).await, 1);
    eventually(
        "the hash slots are listed again",
        async || owner.command::<Vec<u8>>(&["GET", lanes]).await,
        |now| *now == listed,
    )
    .await;
    let loads = async || daemon.status().await["primary_reads"].as_u64().unwrap();
    let before = loads().await;
    assert_eq!(owner.command::<i64>(&["DEL", tables]).await, 1);
    eventually("the table is loaded again", loads, |now| *now > before).await;
    daemon.ready().await;
    assert_eq!(owner.command::<i64>(&["HLEN", tables]).await, 2, "an entry, and whose it is");
    scene.is_whole().await;
    assert_eq!(daemon.stop().await, Some(0));
}

/// What Postgres deleted meanwhile is found among the keys of the nodes that lost nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_that_were_deleted_before_a_node_lost_everything_are_removed() {
    let scene = Scattered::on(Cluster::start().await).await;
    scene.daemon().await.kill9();
    scene.postgres.execute("DELETE FROM items WHERE id % 2 = 0").await;
    scene.cluster.node(1).command::<()>(&["FLUSHALL"]).await;
    let daemon = Daemon::with(&scene.settings).await;
    daemon.allow_warnings();
    // Before, it answers for the other one, as a standby does.
    daemon.status_when("at work", |status| status["state"] == "streaming").await;
    daemon.ready().await;
    scene.is_whole().await;
    assert_eq!(daemon.stop().await, Some(0));
}

impl Scattered {
    /// Returns the first ID from this one on whose key lies on this node.
    pub async fn id_on(&self, node: usize, from: u32) -> u32 {
        for id in from..from + ROWS {
            if self.cluster.master_of(Lane::of(format!("item:{id}").as_bytes())).await == node {
                return id;
            }
        }
        panic!("no row lies on node {node}");
    }
}
