//! `teardown` removes what the daemon created, and nothing else.

use crate::harness::scene::tables_key;
use crate::harness::{Daemon, Postgres, Ran, Redis, Settings, eventually, run_program};
use nix::sys::signal::Signal;
use prefetchd::command::Key;
use prefetchd::resp::batch::OwnKeys;
use prefetchd::sink::connect::RedisTarget;
use prefetchd::sink::writer::Writer;
use serde_json::Value;

const FIRST: &str = "cache:category:cat-001";
/// Keys next to the daemon's prefixes.
const OTHERS: [&str; 5] =
    ["cache:category", "cache:categories:1", "cache:other:1", "prefetchd:{other}:checkpoint", "shop"];

struct Scene {
    postgres: Postgres,
    redis: Redis,
}

impl Scene {
    fn new() -> Self {
        Self { postgres: Postgres::shared(), redis: Redis::start() }
    }

    /// With the publication that `migrations/` created.
    fn settings(&self) -> Settings {
        Settings::new(&self.postgres, &self.redis)
    }

    /// With one that the daemon creates, as a role that may.
    fn makes_publication(&self) -> Settings {
        self.settings().text("postgres.url", &self.postgres.url("postgres")).text("postgres.publication", "made")
    }

    /// Runs a daemon, and stops it.
    async fn worked(&self, settings: &Settings) {
        let daemon = Daemon::with(settings).await;
        daemon.ready().await;
        assert_eq!(daemon.stop().await, Some(0));
    }

    async fn keys_of_others(&self) {
        for key in OTHERS {
            self.redis.command::<()>(&["SET", key, "theirs"]).await;
        }
    }

    async fn slots(&self) -> String {
        let sql = format!("SELECT count(*) FROM pg_replication_slots WHERE slot_name = '{}'", self.postgres.slot());
        self.postgres.value(&sql).await.unwrap()
    }

    async fn publications(&self) -> String {
        let sql = "SELECT coalesce(string_agg(pubname, ' ' ORDER BY pubname), '') FROM pg_publication";
        self.postgres.value(sql).await.unwrap()
    }

    fn checkpoint_key(&self) -> String {
        format!("prefetchd:{{{}}}:checkpoint", self.postgres.slot())
    }

    async fn checkpoint(&self) -> Option<Value> {
        let text: Option<String> = self.redis.command(&["GET", &self.checkpoint_key()]).await;
        text.map(|text| serde_json::from_str(&text).unwrap())
    }
}

async fn teardown(settings: &Settings, args: &[&str]) -> Ran {
    run_program(settings, &[&["teardown"], args].concat()).await
}

#[track_caller]
fn says(ran: &Ran, code: i32, parts: &[&str]) {
    assert_eq!(ran.code, Some(code), "{ran:?}");
    for part in parts {
        assert!(ran.said().contains(part), "{part:?} is missing in {}", ran.said());
    }
}

#[tokio::test]
async fn with_keys_everything_that_was_made_goes_and_nothing_else() {
    let scene = Scene::new();
    // More than one page of keys.
    let sql = "INSERT INTO categories SELECT 'x' || n, 'x' FROM generate_series(1, 5000) n";
    scene.postgres.execute(sql).await;
    let settings = scene.makes_publication();
    scene.worked(&settings).await;
    scene.keys_of_others().await;
    scene.redis.command::<()>(&["XADD", &scene.checkpoint_key().replace("checkpoint", "dead"), "*", "a", "b"]).await;
    assert_eq!(scene.publications().await, "made prefetchd");

    let ran = teardown(&settings, &["--keys"]).await;
    let slot = scene.postgres.slot();
    let dropped = format!("slot {slot}: dropped");
    says(&ran, 0, &[&dropped, "publication made: dropped", "keys cache:category:*: 5005 removed"]);
    assert_eq!((scene.slots().await, scene.publications().await), ("0".to_owned(), "prefetchd".to_owned()));
    let mut others = OTHERS.map(str::to_owned);
    others.sort();
    assert_eq!(scene.redis.keys("*").await, others);

    // Nothing is left, which is just as well.
    let ran = teardown(&settings, &["--keys"]).await;
    says(&ran, 0, &[&format!("slot {slot}: does not exist"), "publication made: does not exist", ": 0 removed"]);
    assert_eq!(scene.redis.keys("*").await, others);
    scene.worked(&settings).await;
    assert_eq!(scene.redis.hash(FIRST).await["name"], "Beverages");
}

#[tokio::test]
async fn without_keys_it_says_what_stays_and_that_it_is_not_to_be_relied_on() {
    let scene = Scene::new();
    let settings = scene.makes_publication();
    scene.worked(&settings).await;
    let before = scene.checkpoint().await.unwrap();
    assert_eq!((&before["state"], &before["made_publication"]), (&"ready".into(), &"made".into()));

    let ran = teardown(&settings, &[]).await;
    says(&ran, 0, &["keys cache:category:*: stay", &scene.checkpoint_key(), "teardown --keys"]);
    assert_eq!((scene.slots().await, scene.publications().await), ("0".to_owned(), "prefetchd".to_owned()));
    assert!(scene.redis.pttl(FIRST).await > 0);
    let after = scene.checkpoint().await.unwrap();
    let entry: String = scene.redis.command(&["HGET", &tables_key(&scene.checkpoint_key()), "categories"]).await;
    let entry: Value = serde_json::from_str(&entry).unwrap();
    assert_eq!((&after["state"], &entry["state"]), (&"healing".into(), &"healing".into()));
    assert!(after["epoch"].as_u64() > before["epoch"].as_u64());

    // What has the same name from now on was created by somebody else, and the slot does not make the old rows correct.
    scene.postgres.execute("UPDATE categories SET name = 'unheard of' WHERE id = 'cat-001'").await;
    scene.postgres.execute("CREATE PUBLICATION made FOR TABLE categories").await;
    let sql = format!("SELECT pg_create_logical_replication_slot('{}', 'pgoutput')", scene.postgres.slot());
    scene.postgres.execute(&sql).await;
    let daemon = Daemon::with(&settings).await;
    daemon.allow_warning("loading every table again");
    daemon.ready().await;
    assert_eq!(scene.redis.hash(FIRST).await["name"], "unheard of");
    assert_eq!(daemon.stop().await, Some(0));
    let ran = teardown(&settings, &["--keys"]).await;
    says(&ran, 0, &["publication made: stays", "DROP PUBLICATION made"]);
    assert_eq!(scene.publications().await, "made prefetchd");
    assert_eq!(scene.redis.keys("*").await, [""; 0]);
}

#[tokio::test]
async fn it_refuses_while_a_daemon_works_or_stands_by() {
    let scene = Scene::new();
    let settings = scene.settings();
    let works = Daemon::with(&settings).await;
    works.ready().await;
    let standby = Daemon::with(&settings).await;
    standby.status_when("a standby", |status| status["state"] == "standby").await;
    let sql = format!("SELECT active_pid FROM pg_replication_slots WHERE slot_name = '{}'", scene.postgres.slot());
    let pid = scene.postgres.value(&sql).await.unwrap();
    says(&teardown(&settings, &["--keys"]).await, 1, &[&pid, "stop every prefetchd", "nothing was removed"]);
    let lsn = scene.postgres.execute("UPDATE categories SET name = 'x' WHERE id = 'cat-001'").await;
    works.applied(lsn).await;
    assert_eq!(works.metrics().await[r#"prefetchd_reconnects_total{peer="redis"}"#], 0.0);
    standby.kill9();
    assert_eq!(works.stop().await, Some(0));

    // A frozen daemon whose slot was dropped: it wakes up and creates another.
    let frozen = Daemon::with(&settings).await;
    frozen.ready().await;
    frozen.signal(Signal::SIGSTOP);
    let terminate = format!("SELECT pg_terminate_backend(({sql}))");
    scene.postgres.execute(&terminate).await;
    eventually("no walsender", async || scene.postgres.value(&sql).await, Option::is_none).await;
    says(&teardown(&settings, &["--keys"]).await, 1, &["stop every prefetchd", "nothing was removed"]);
    assert_eq!(scene.slots().await, "1");
    assert!(scene.redis.pttl(FIRST).await > 0);
    frozen.kill9();
}

#[tokio::test]
async fn keys_of_tables_that_only_the_checkpoint_knows_go_too() {
    let scene = Scene::new();
    scene.postgres.execute("CREATE TABLE more (id int PRIMARY KEY); INSERT INTO more VALUES (1)").await;
    scene.postgres.execute("GRANT SELECT ON more TO prefetchd; ALTER PUBLICATION prefetchd ADD TABLE more").await;
    let two = "[[tables]]\nname = 'a'\ntable = 'public.categories'\nkey = 'a:{id}'\n
               [[tables]]\nname = 'b'\ntable = 'public.more'\nkey = 'b:[1]:{id}'";
    scene.worked(&scene.settings().tables(two)).await;
    scene.keys_of_others().await;
    assert_eq!(scene.redis.keys("[ab]:*").await.len(), 6);
    // One of an earlier configuration, and something that no prefetchd writes.
    let mut checkpoint = scene.checkpoint().await.unwrap();
    checkpoint["retired"] =
        serde_json::json!(["old:{id}", "{id}", "shop{", "prefetchd:{id}", "prefetchd:{other}:checkpoint"]);
    scene.redis.command::<()>(&["SET", &scene.checkpoint_key(), &checkpoint.to_string()]).await;
    scene.redis.command::<()>(&["SET", "old:1", "x"]).await;
    // The daemon's user may not touch what is no longer configured.
    let ran = teardown(&scene.settings().text("redis.url", &scene.redis.url()), &["--keys"]).await;
    says(
        &ran,
        0,
        &[
            "keys old:*: 1 removed",
            "keys a:*: 5 removed",
            "keys b:[1]:*: 1 removed",
            "keys cache:category:*: 0 removed",
        ],
    );
    let mut others = OTHERS.map(str::to_owned);
    others.sort();
    assert_eq!(scene.redis.keys("*").await, others);
    // Created by hand.
    says(&ran, 0, &["publication prefetchd: stays", "DROP PUBLICATION prefetchd"]);
    assert_eq!(scene.publications().await, "prefetchd");
}

#[tokio::test]
async fn the_checkpoint_of_another_postgres_is_refused() {
    let scene = Scene::new();
    let settings = scene.makes_publication();
    scene.worked(&settings).await;
    let mut other = scene.checkpoint().await.unwrap();
    other["system_id"] = "1".into();
    let other = other.to_string();
    scene.redis.command::<()>(&["SET", &scene.checkpoint_key(), &other]).await;
    let ran = teardown(&settings, &["--keys"]).await;
    says(&ran, 1, &["of system 1", "correct postgres.url or redis.url", "nothing was removed"]);
    assert_eq!((scene.slots().await, scene.publications().await), ("1".to_owned(), "made prefetchd".to_owned()));
    assert_eq!(scene.redis.command::<String>(&["GET", &scene.checkpoint_key()]).await, other);
    assert_eq!(scene.redis.keys("cache:category:*").await.len(), 5);
}

#[tokio::test]
async fn a_redis_that_is_gone_keeps_no_slot_alive() {
    let mut scene = Scene::new();
    let settings = scene.makes_publication();
    scene.worked(&settings).await;
    scene.redis.stop();
    let ran = teardown(&settings, &["--keys"]).await;
    says(&ran, 1, &["dropped", "publication made: stays", "cannot reach Redis", "run this again"]);
    assert_eq!((scene.slots().await, scene.publications().await), ("0".to_owned(), "made prefetchd".to_owned()));
    scene.redis.start_again();
    // Redis came back empty, so nothing says who created the publication.
    says(&teardown(&settings, &["--keys"]).await, 0, &["does not exist", "publication made: stays"]);
}

#[tokio::test]
async fn nothing_is_removed_once_somebody_else_writes_the_checkpoint() {
    let redis = Redis::start();
    let target = RedisTarget::parse(&redis.url()).unwrap();
    let own = OwnKeys::under("prefetchd:{s}:");
    let keys = ["a:1", "a:2"].map(|key| Key(key.into()));
    // Existing and not existing when WATCH began.
    for begin in [&["SET", "prefetchd:{s}:checkpoint", "1"][..], &["DEL", "prefetchd:{s}:checkpoint"]] {
        redis.command::<()>(begin).await;
        redis.command::<()>(&["MSET", "a:1", "x", "a:2", "x", "a:3", "x"]).await;
        let (mut writer, _) = Writer::connect(&target, &own).await.unwrap();
        assert_eq!(writer.remove(&keys[..1]).await.unwrap(), 1);
        redis.command::<()>(&["SET", "prefetchd:{s}:checkpoint", "2"]).await;
        writer.remove(&keys).await.unwrap_err();
        assert_eq!(redis.keys("a:*").await, ["a:2", "a:3"]);
        writer.remove(&keys).await.unwrap_err();
        let (mut writer, _) = Writer::connect(&target, &own).await.unwrap();
        assert_eq!(writer.remove(&[keys[1].clone(), own.checkpoint().clone()]).await.unwrap(), 2);
        assert_eq!(writer.remove(&keys).await.unwrap(), 0);
        assert_eq!(redis.keys("*").await, ["a:3"]);
    }
}
