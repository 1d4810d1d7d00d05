//! Lookups and the change stream over the hash slots of a cluster: lists lie in other slots than their rows, on other nodes,
//! and agree with them after everything that can happen to either.

use crate::harness::consumer::{Consumer, Entry};
use crate::harness::{Cluster, Daemon, Feature, Postgres, Settings, eventually, run_program};
use prefetchd::lanes::Lane;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::sleep;

const ROWS: u32 = 600;
const PARENTS: u32 = 20;

const TABLE: &str = r#"
[[tables]]
name = "items"
table = "public.items"
key = "item:{id}"

[[tables.lookups]]
name = "by_parent"
key = "items-by-parent:{parent}"
order = "place"

[[tables.lookups]]
name = "all"
key = "items-all"

[[tables.lookups]]
name = "by_tag"
key = "items-by-tag:{tags[]}"
"#;
const STREAM: &str = "changes";

type Lists = BTreeMap<String, BTreeMap<String, Option<f64>>>;
/// With their IDs.
type Entries = Vec<(String, Entry)>;

fn table(format: &str) -> String {
    TABLE.replace("key = \"item:{id}\"", &format!("key = \"item:{{id}}\"\nformat = \"{format}\""))
}

struct Scene {
    postgres: Arc<Postgres>,
    cluster: Cluster,
    settings: Settings,
}

impl Scene {
    /// `None` on versions of Redis that cannot have rows in all hash slots.
    async fn on(cluster: Cluster, format: &str) -> Option<Self> {
        if !cluster.node(0).has(Feature::Lanes).await {
            return None;
        }
        let postgres = Arc::new(Postgres::shared());
        let sql = format!(
            "CREATE TABLE items (id int PRIMARY KEY, parent text, place int, tags text[], note text);
             GRANT SELECT ON items TO prefetchd; ALTER PUBLICATION prefetchd ADD TABLE items;
             ALTER TABLE items ALTER note SET STORAGE EXTERNAL;
             INSERT INTO items SELECT n, 'p' || n % {PARENTS}, n, ARRAY['all', 't' || n % 7],
                                      CASE WHEN n % 50 = 0 THEN repeat(n::text, 3000) END
               FROM generate_series(1, {ROWS}) n"
        );
        postgres.execute(&sql).await;
        let settings = Settings::on_cluster(&postgres, &cluster).tables(&table(format)).text("changes.stream", STREAM);
        Some(Self { postgres, cluster, settings })
    }

    async fn daemon(&self) -> Daemon {
        let daemon = Daemon::with(&self.settings).await;
        daemon.ready().await;
        daemon
    }

    async fn follows(&self, daemon: &Daemon, sql: &str) {
        let lsn = self.postgres.execute(sql).await;
        daemon.applied(lsn).await;
    }

    /// Returns the lists in Redis.
    async fn found(&self) -> Lists {
        let mut lists = Lists::new();
        for key in self.cluster.keys("items-*").await {
            let node = self.cluster.server_of(&key).await;
            let members: BTreeMap<String, Option<f64>> = match &*node.command::<String>(&["TYPE", &key]).await {
                "zset" => {
                    let scored: Vec<(String, f64)> = node.command(&["ZRANGE", &key, "0", "-1", "WITHSCORES"]).await;
                    scored.into_iter().map(|(member, score)| (member, Some(score))).collect()
                }
                "set" => {
                    node.command::<BTreeSet<String>>(&["SMEMBERS", &key]).await.into_iter().map(|m| (m, None)).collect()
                }
                other => panic!("{key} is a {other}"),
            };
            assert!(node.pttl(&key).await > 0, "{key}");
            lists.insert(key, members);
        }
        lists
    }

    /// Returns the lists that the rows in Postgres give.
    async fn given(&self) -> Lists {
        let sql = "WITH lists(list, member, score) AS (
                       SELECT 'items-by-parent:' || coalesce(parent, ''), id, coalesce(place, 0) FROM items
                        UNION ALL SELECT 'items-all', id, NULL FROM items
                        UNION ALL SELECT DISTINCT 'items-by-tag:' || tag, id, NULL::int
                                    FROM items CROSS JOIN LATERAL unnest(tags) tag)
                   SELECT coalesce(json_object_agg(list, members), '{}')
                     FROM (SELECT list, json_object_agg(member, score) AS members FROM lists GROUP BY list) l";
        serde_json::from_str(&self.postgres.value(sql).await.unwrap()).unwrap()
    }

    /// Lists are as the rows in Postgres give them, as soon as nothing is compared any more.
    async fn agree(&self, what: &str) {
        let given = self.given().await;
        let differs = async || {
            let found = self.found().await;
            let keys: BTreeSet<&String> = found.keys().chain(given.keys()).collect();
            keys.into_iter().find(|key| found.get(*key) != given.get(*key)).cloned()
        };
        let differing = eventually(what, differs, Option::is_none);
        if tokio::time::timeout(Duration::from_secs(60), differing).await.is_err() {
            assert_eq!(self.found().await, given, "{what}");
        }
    }

    async fn list(&self, daemon: &Daemon, target: &str) -> (Value, Option<String>) {
        let answer = daemon.get(&format!("/v1/lookups/items/{target}")).await;
        assert_eq!(answer.status, 200, "{target}: {answer:?}");
        let consistent = answer.header("prefetchd-consistent").map(str::to_owned);
        (answer.json(), consistent)
    }

    /// Returns what has been announced, in order.
    async fn entries(&self) -> Entries {
        self.cluster.server_of(STREAM).await.command(&["XRANGE", STREAM, "-", "+"]).await
    }

    /// The last announcement of each row since the table was last loaded is about what Redis has; none came twice, and
    /// they came in the order of the commits.
    async fn was_announced(&self) {
        let mut consumer = Consumer::of_large_rows();
        self.entries().await.into_iter().for_each(|(_, entry)| consumer.takes(entry));
        assert!(consumer.loaded.contains_key("items"));
        for (key, entry) in consumer.last.get("items").into_iter().flatten() {
            let is_there: bool = self.cluster.server_of(key).await.command(&["EXISTS", key]).await;
            assert_eq!(entry["op"] == "upsert", is_there, "{entry:?}");
            let id = key.split_once(':').unwrap().1;
            if let Some(xmin) = self.postgres.value(&format!("SELECT xmin FROM items WHERE id = {id}")).await {
                assert_eq!(entry["xid"], xmin, "{entry:?}: its last change was not announced");
            }
        }
    }
}

fn ids(list: &Value) -> Vec<String> {
    let id = |row: &Value| row["id"].as_str().map_or_else(|| row["id"].to_string(), str::to_owned);
    list["rows"].as_array().unwrap().iter().map(id).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lists_follow_rows_of_other_hash_slots() {
    follow_rows("hash").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lists_follow_documents_of_other_hash_slots() {
    follow_rows("json").await;
}

async fn follow_rows(format: &str) {
    let Some(scene) = Scene::on(Cluster::start().await, format).await else { return };
    let ran = run_program(&scene.settings, &["check"]).await;
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let daemon = scene.daemon().await;
    scene.agree("the load").await;
    for sql in [
        "INSERT INTO items VALUES (1001, 'p1', -5, '{all,new}'), (1002, NULL, 7, NULL)",
        "UPDATE items SET parent = 'p2' WHERE parent = 'p1' AND id < 300",
        "UPDATE items SET place = -place WHERE id % 3 = 0",
        // Without its large value.
        "UPDATE items SET parent = 'large', tags = array_append(tags, 'large') WHERE id % 50 = 0",
        "UPDATE items SET id = id + 5000 WHERE id % 10 = 1",
        "BEGIN; UPDATE items SET id = -1 WHERE id = 2; UPDATE items SET id = 2 WHERE id = 3;
         UPDATE items SET id = 3 WHERE id = -1; COMMIT",
        "DELETE FROM items WHERE id % 5 = 4",
        "UPDATE items SET tags = '{}' WHERE id % 4 = 0",
    ] {
        scene.follows(&daemon, sql).await;
        scene.agree(sql).await;
    }
    let (list, consistent) = scene.list(&daemon, "by_parent/p2?limit=3").await;
    assert_eq!(consistent, None, "nothing is written");
    let sql = "SELECT string_agg(id::text, ',' ORDER BY place, id::text COLLATE \"C\") FROM items WHERE parent = 'p2'";
    let wanted = scene.postgres.value(sql).await.unwrap();
    let wanted: Vec<&str> = wanted.split(',').collect();
    assert_eq!(
        (ids(&list), list["total"].as_u64()),
        (wanted[..3].iter().map(|id| (*id).to_owned()).collect(), Some(wanted.len() as u64))
    );
    let (mut all, mut after) = (Vec::new(), String::new());
    loop {
        let (page, _) = scene.list(&daemon, &format!("by_parent/p2?limit=7{after}")).await;
        all.extend(ids(&page));
        let Some(next) = page["next"].as_str() else { break };
        after = format!("&after={next}");
    }
    assert_eq!(all, wanted);
    let (list, _) = scene.list(&daemon, "by_parent/nobody").await;
    assert_eq!(list, json!({"rows": [], "total": 0, "next": null}));

    daemon.allow_warnings();
    let list = "items-by-parent:p2";
    let node = scene.cluster.server_of(list).await;
    node.command::<()>(&["ZADD", list, "1", "999999"]).await;
    node.command::<()>(&["ZREM", list, wanted[0]]).await;
    let verified = daemon.operate("verify", &json!({"repair": true})).await;
    assert_eq!((verified.status, verified.json()["lookups"].as_u64()), (200, Some(2)), "{verified:?}");
    scene.agree("a repair").await;

    scene.follows(&daemon, "BEGIN; TRUNCATE items; INSERT INTO items VALUES (1, 'p', 1, '{all}'); COMMIT").await;
    scene.agree("TRUNCATE").await;
    scene.was_announced().await;
    assert_eq!(daemon.stop().await, Some(0));
    // With other lookups, lists are made from what lies in Redis.
    let tables = table(format).replace("items-all", "items-every");
    let settings = Settings::on_cluster(&scene.postgres, &scene.cluster).tables(&tables);
    let daemon = Daemon::with(&settings).await;
    daemon.ready().await;
    eventually("the list is made", async || scene.found().await.contains_key("items-every"), |made| *made).await;
    eventually("the old one is gone", async || scene.found().await.contains_key("items-all"), |there| !there).await;
    assert_eq!(daemon.stop().await, Some(0));
    let ran = run_program(&settings, &["teardown", "--keys"]).await;
    assert_eq!(ran.code, Some(0), "{ran:?}");
    // The stream belongs to the configuration before.
    assert_eq!(scene.cluster.keys("*").await, [STREAM]);
}

/// What is left of a round that was not finished is found and mended, without a load.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lists_are_compared_after_a_daemon_that_was_killed_in_mid_round() {
    let Some(scene) = Scene::on(Cluster::start().await, "hash").await else { return };
    for round in 0..6_u64 {
        let daemon = scene.daemon().await;
        daemon.allow_warnings();
        let update = format!(
            "UPDATE items SET parent = 'p' || (id + {round}) % {PARENTS}, place = place + 1, tags = ARRAY['r{round}']"
        );
        let (_, ()) = tokio::join!(scene.postgres.execute(&update), async {
            sleep(Duration::from_millis(7 * round)).await;
            daemon.kill9();
        });
    }
    let daemon = scene.daemon().await;
    scene.follows(&daemon, "UPDATE items SET parent = 'last' WHERE id = 1").await;
    scene.agree("a daemon that was killed").await;
    scene.was_announced().await;
    assert_eq!(daemon.said("loading every table again"), 0, "{}", daemon.log_text());
    assert_eq!(daemon.stop().await, Some(0));
    // After a stop in good order, nothing is in doubt.
    let head = scene.cluster.server_of(&format!("prefetchd:{{{}}}:checkpoint", scene.postgres.slot())).await;
    let head: String = head.command(&["GET", &format!("prefetchd:{{{}}}:checkpoint", scene.postgres.slot())]).await;
    assert!(!head.contains("lists_in_doubt"), "{head}");
}

/// Rows that the others have are members of the lists that it has lost, and it has rows of theirs.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lists_of_a_node_that_lost_everything_are_made_again() {
    let Some(scene) = Scene::on(Cluster::start().await, "hash").await else { return };
    let daemon = scene.daemon().await;
    daemon.allow_warnings();
    let record = Lane::of(format!("prefetchd:{{{}}}:", scene.postgres.slot()).as_bytes());
    let record = scene.cluster.master_of(record).await;
    for lost in (0..3).filter(|node| *node != record) {
        scene.cluster.node(lost).command::<()>(&["FLUSHALL"]).await;
        scene.follows(&daemon, "UPDATE items SET parent = 'p' || (id + 3) % 20 WHERE id % 2 = 0").await;
        daemon.ready().await;
        scene.agree("a node was emptied").await;
        scene.was_announced().await;
        // What is served is whole.
        let count = scene.postgres.value("SELECT count(*) FROM items WHERE parent = 'p3'").await.unwrap();
        let list = async || daemon.get("/v1/lookups/items/by_parent/p3?limit=1000").await;
        let list = eventually("it is served", list, |answer| answer.status == 200).await;
        assert_eq!(ids(&list.json()).len().to_string(), count);
    }
    assert_eq!(daemon.said("loading every table again"), 0, "{}", daemon.log_text());
    assert_eq!(daemon.stop().await, Some(0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lists_move_with_their_hash_slots_while_they_change() {
    let Some(scene) = Scene::on(Cluster::start().await, "hash").await else { return };
    let daemon = scene.daemon().await;
    daemon.allow_warnings();
    for key in ["items-all", "items-by-parent:p1", STREAM, "item:1"] {
        let lane = Lane::of(key.as_bytes());
        let to = (scene.cluster.master_of(lane).await + 1) % 3;
        scene.cluster.move_slot(lane, to).await;
        scene.follows(&daemon, "UPDATE items SET parent = 'p' || (id + 1) % 20, place = place + 1").await;
        scene
            .follows(&daemon, &format!("DELETE FROM items WHERE id = (SELECT max(id) FROM items WHERE id < {ROWS})"))
            .await;
        scene.agree(key).await;
        let list = async || daemon.get("/v1/lookups/items/by_parent/p1").await;
        // Until what has moved is read again, rows may be missing.
        let list = eventually("it is served", list, |answer| answer.status == 200).await;
        assert!(!ids(&list.json()).is_empty());
    }
    scene.was_announced().await;
    assert_eq!(daemon.stop().await, Some(0));
}

/// Whoever reads a list gets rows that have its value, each once; and all of them, where the answer does not say otherwise.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_list_that_is_read_under_writes_has_the_rows_of_its_value() {
    let Some(scene) = Scene::on(Cluster::start().await, "hash").await else { return };
    let daemon = scene.daemon().await;
    // All of these rows have the same parent and place at any time, and there are 40 or 50 of them.
    scene.follows(&daemon, "UPDATE items SET parent = '0', place = 0 WHERE id <= 50").await;
    let writes = scene.postgres.repeat(|round| {
        let parent = round % 2;
        let others = match round % 4 {
            0 | 1 => "DELETE FROM items WHERE id BETWEEN 41 AND 50".to_owned(),
            _ => format!(
                "INSERT INTO items SELECT n, '{parent}', {round}, '{{all}}' FROM generate_series(41, 50) n
                 ON CONFLICT (id) DO NOTHING"
            ),
        };
        let update = format!("UPDATE items SET parent = '{parent}', place = {round} WHERE id <= 50");
        format!("BEGIN; {update}; {others}; COMMIT")
    });
    let (mut whole, mut torn) = (0, 0);
    while whole < 100 {
        let parent = ((whole + torn) % 2).to_string();
        let limit = [100, 45][(whole + torn) % 3 % 2];
        let (list, consistent) = scene.list(&daemon, &format!("by_parent/{parent}?limit={limit}")).await;
        let rows = list["rows"].as_array().unwrap();
        let found: BTreeSet<&str> = rows.iter().map(|row| row["id"].as_str().unwrap()).collect();
        assert_eq!(found.len(), rows.len(), "{list}");
        assert!(rows.iter().all(|row| row["parent"] == parent), "{list}");
        match consistent.as_deref() {
            None if rows.is_empty() => assert_eq!(list["total"], 0),
            None => {
                let total = list["total"].as_u64().unwrap() as usize;
                assert!([40, 50].contains(&total) && rows.len() == total.min(limit), "half a transaction: {list}");
                let places: BTreeSet<&str> = rows.iter().map(|row| row["place"].as_str().unwrap()).collect();
                assert_eq!(places.len(), 1, "{list}");
                whole += 1;
            }
            Some("false") => torn += 1,
            other => panic!("{other:?}"),
        }
    }
    let rounds = writes.stop().await;
    println!("{rounds} transactions, {whole} answers of one moment, {torn} of several");
    assert!(rounds > 10, "{rounds} transactions");
    scene.agree("the writes").await;

    // Somebody else has added a row that has another value, and removed the key of one that belongs there.
    let key = "items-by-parent:p5";
    scene.cluster.server_of(key).await.command::<()>(&["ZADD", key, "1", "66"]).await;
    let (list, consistent) = scene.list(&daemon, "by_parent/p5?limit=100").await;
    let count = scene.postgres.value("SELECT count(*) FROM items WHERE parent = 'p5'").await.unwrap();
    assert_eq!(consistent.as_deref(), Some("false"));
    assert_eq!((list["total"].to_string(), ids(&list).len().to_string()), (count.clone(), count));
    scene.cluster.server_of("item:105").await.command::<()>(&["DEL", "item:105"]).await;
    let answer = daemon.get("/v1/lookups/items/by_parent/p5?limit=100").await;
    assert_ne!(answer.header("prefetchd-consistent"), None, "one row has another value: {answer:?}");
    scene.cluster.server_of(key).await.command::<()>(&["ZREM", key, "66"]).await;
    let answer = daemon.get("/v1/lookups/items/by_parent/p5?limit=100").await;
    assert_eq!(answer.refusal(), (503, "healing".to_owned()), "a row is missing, and nothing is on its way");
    daemon.allow_warnings();
    assert_eq!(daemon.stop().await, Some(0));
}

/// Whatever a daemon may have left half written, and says so.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lists_in_doubt_are_compared_with_all_rows() {
    let Some(scene) = Scene::on(Cluster::start().await, "hash").await else { return };
    let daemon = scene.daemon().await;
    assert_eq!(daemon.stop().await, Some(0));
    let list = "items-by-parent:p1";
    let node = scene.cluster.server_of(list).await;
    node.command::<()>(&["ZREM", list, "1", "21"]).await;
    node.command::<()>(&["ZADD", list, "7", "2"]).await;
    let daemon = scene.daemon().await;
    assert_ne!(scene.found().await, scene.given().await, "nothing says that they differ");
    assert_eq!(daemon.stop().await, Some(0));
    let record = format!("prefetchd:{{{}}}:checkpoint", scene.postgres.slot());
    let node = scene.cluster.server_of(&record).await;
    let head: String = node.command(&["GET", &record]).await;
    node.command::<()>(&["SET", &record, &head.replacen('{', "{\"lists_in_doubt\":true,", 1)]).await;
    let daemon = scene.daemon().await;
    scene.agree("lists that were in doubt").await;
    let served = async || daemon.get("/v1/lookups/items/by_parent/p1").await.status;
    eventually("they are served", served, |status| *status == 200).await;
    assert_eq!(daemon.stop().await, Some(0));
}

/// An entry comes after what it is about, wherever that lies.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_announced_can_be_read() {
    let Some(scene) = Scene::on(Cluster::start().await, "hash").await else { return };
    scene.postgres.execute("CREATE TABLE rounds (round int, xid text)").await;
    let daemon = scene.daemon().await;
    let home = scene.cluster.server_of(STREAM).await;
    let told = eventually("the load is told", async || scene.entries().await, |told| !told.is_empty()).await;
    let mut last = told.last().unwrap().0.clone();
    let writes = scene.postgres.repeat(|round| {
        format!(
            "BEGIN; UPDATE items SET place = {round} WHERE id <= 40;
             INSERT INTO rounds VALUES ({round}, pg_current_xact_id()); COMMIT"
        )
    });
    let mut found: Vec<(String, i32)> = Vec::new();
    while found.len() < 2_000 {
        let read: Option<Vec<(String, Entries)>> =
            home.command(&["XREAD", "COUNT", "40", "BLOCK", "2000", "STREAMS", STREAM, &last]).await;
        for (id, entry) in read.into_iter().flatten().flat_map(|(_, entries)| entries) {
            last = id;
            let row = scene.cluster.hash(&entry["key"]).await;
            found.push((entry["xid"].clone(), row["place"].parse().unwrap()));
        }
    }
    writes.stop().await;
    let rounds = scene.postgres.value("SELECT json_object_agg(xid, round)::text FROM rounds").await.unwrap();
    let rounds: BTreeMap<String, i32> = serde_json::from_str(&rounds).unwrap();
    for (xid, place) in found {
        assert!(place >= rounds[&xid], "round {} was announced when the row was of round {place}", rounds[&xid]);
    }
    assert_eq!(daemon.stop().await, Some(0));
}
