//! The configuration is read again while the daemon runs: what is new is loaded, what is gone is removed, and nobody who
//! reads or writes the other tables notices.

use crate::harness::scene::Scene;
use crate::harness::watcher::HttpWatcher;
use crate::harness::{Daemon, Postgres, Redis, Settings, eventually, run_program};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

const ROWS: u64 = 2_000;

/// Reads the configuration again. Returns the answer.
async fn reload(daemon: &Daemon, settings: &Settings) -> Value {
    daemon.reconfigure(settings);
    let answer = daemon.operate("reload", &json!({})).await;
    assert_eq!(answer.status, 200, "{answer:?}");
    answer.json()
}

async fn refused(daemon: &Daemon, settings: &Settings) -> String {
    daemon.reconfigure(settings);
    let answer = daemon.operate("reload", &json!({})).await;
    assert_eq!(answer.refusal(), (422, "invalid_configuration".to_owned()), "{answer:?}");
    answer.json()["message"].as_str().unwrap().to_owned()
}

fn names(status: &Value) -> Vec<&str> {
    status["tables"].as_array().unwrap().iter().map(|table| table["name"].as_str().unwrap()).collect()
}

async fn whole(daemon: &Daemon) -> Value {
    let is_whole = |status: &Value| status["tables"].as_array().unwrap().iter().all(|table| table["loaded"] == true);
    daemon.status_when("every table is loaded", |status| status["state"] == "streaming" && is_whole(status)).await
}

/// Tables are added, changed and removed under load, with readers of Redis and of HTTP that see every loss, and every row
/// that goes backwards or is torn.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tables_come_change_and_go_while_the_others_are_followed_and_read() {
    let scene = Scene::busy(Postgres::shared(), ROWS).await;
    scene
        .postgres
        .execute(
            "CREATE TABLE extra (id int PRIMARY KEY, kind text); INSERT INTO extra SELECT n, n % 3 FROM generate_series(1, 50) n;
             GRANT SELECT ON extra TO prefetchd; ALTER PUBLICATION prefetchd ADD TABLE extra",
        )
        .await;
    let daemon = scene.daemon().await;
    let http = HttpWatcher::start(scene.traffic, 1);
    daemon.ready().await;
    http.ask(vec![daemon.address()]).await;
    let loads =
        |metrics: &std::collections::BTreeMap<String, f64>| metrics["prefetchd_rows_loaded_total{table=\"items\"}"];
    let refusals = async || {
        let mut refused = 0;
        for code in ["loading", "healing", "stale", "redis_unavailable", "stopping"] {
            refused += http.refused(code).await;
        }
        refused
    };
    let before = (loads(&daemon.metrics().await), refusals().await);
    let base = scene.settings.clone();
    let with = |extra: &str| base.clone().tables(&format!("{}\n{extra}", base.tables_toml()));
    let extra = |key: &str, rest: &str| {
        format!("[[tables]]\nname = \"extra\"\ntable = \"public.extra\"\nkey = \"{key}\"\n{rest}")
    };
    let keys = async |pattern: &str| {
        let keys: Vec<String> = scene.redis.command(&["KEYS", pattern]).await;
        keys.len()
    };

    // Added.
    let answer = reload(&daemon, &with(&extra("x:{id}", ""))).await;
    assert_eq!(answer, json!({"added": ["extra"], "removed": [], "changed": [], "restart_required": []}));
    scene.more_is_written(100).await;
    whole(&daemon).await;
    assert_eq!(keys("x:*").await, 50);
    assert_eq!(daemon.get("/v1/tables/extra/7").await.json()["kind"], "1");
    // Changed: another TTL, then a lookup, then other keys.
    let answer = reload(&daemon, &with(&extra("x:{id}", "ttl = \"1h\"\n"))).await;
    assert_eq!(answer["changed"], json!(["extra"]));
    scene.more_is_written(100).await;
    whole(&daemon).await;
    let lookup = "[[tables.lookups]]\nname = \"by_kind\"\nkey = \"x-by-kind:{kind}\"\n";
    reload(&daemon, &with(&extra("x:{id}", lookup))).await;
    whole(&daemon).await;
    let listed = async || daemon.get("/v1/lookups/extra/by_kind/1").await;
    let answer = eventually("the lists are there", listed, |answer| answer.status == 200).await;
    assert_eq!(answer.json()["total"], 17, "{answer:?}");
    daemon.reconfigure(&with(&extra("y:{id}", "")));
    daemon.signal(Signal::SIGHUP);
    daemon.logged("the configuration was read again: changed extra").await;
    whole(&daemon).await;
    let left = async || (keys("x:*").await, keys("x-by-kind:*").await, keys("y:*").await);
    eventually("its keys are those of the new template", left, |left| *left == (0, 0, 50)).await;
    // Removed, and a setting with it.
    let answer = reload(&daemon, &base.clone().text("cache.max_staleness", "31s")).await;
    assert_eq!(answer["removed"], json!(["extra"]));
    scene.more_is_written(100).await;
    let status = whole(&daemon).await;
    assert!(!names(&status).contains(&"extra"), "{status}");
    eventually("its keys are gone", async || keys("y:*").await, |left| *left == 0).await;
    assert_eq!(daemon.get("/v1/tables/extra/7").await.refusal(), (404, "unknown_table".to_owned()));
    let metrics = daemon.metrics().await;
    assert!(!metrics.keys().any(|series| series.contains("table=\"extra\"")), "{metrics:?}");

    assert_eq!((loads(&metrics), refusals().await), before, "the others were not loaded again, nor refused");
    let history = daemon.get("/v1/history").await.body;
    assert!(history.contains("reloaded: added extra") && history.contains("reloaded: removed extra"), "{history}");
    http.stop().await;
    scene.ends(daemon).await;
}

#[tokio::test]
async fn a_configuration_that_cannot_work_changes_nothing() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let settings = Settings::new(&postgres, &redis);
    let daemon = Daemon::with(&settings).await;
    daemon.allow_warning("is refused, the old one stays");
    daemon.ready().await;
    let before = daemon.status().await;
    let categories = settings.tables_toml().to_owned();
    let with = |toml: &str| settings.clone().tables(&format!("{categories}\n{toml}"));
    for (what, reason) in [
        ("[[tables]]\nname = \"nothing\"\ntable = \"public.nothing\"\nkey = \"n:{id}\"\n", "public.nothing"),
        ("[[tables]]\nname = \"again\"\ntable = \"public.categories\"\nkey = \"cache:{id}\"\n", "already table"),
        ("[[tables]]\nname = \"again\"\nkey = \"a:{id}\"\n", "table"),
        ("[nonsense", "TOML"),
    ] {
        let message = refused(&daemon, &with(what)).await;
        assert!(message.contains(reason), "{message}");
    }
    let ran = run_program(&settings, &["reload", "--url", &format!("http://{}", daemon.address())]).await;
    assert!(ran.code == Some(1) && ran.stderr.contains("TOML"), "{}", ran.stderr);
    let answer = reload(&daemon, &settings.clone().text("postgres.slot", "other").text("log.level", "debug")).await;
    assert_eq!(answer["restart_required"], json!(["postgres.slot", "log.level"]), "{answer}");
    assert_eq!(reload(&daemon, &settings).await["restart_required"], json!([]));
    let status = daemon.status().await;
    assert_eq!((names(&status), &status["source"]), (names(&before), &before["source"]));
    assert_eq!(daemon.get("/v1/tables/categories/cat-001").await.status, 200);
}

#[tokio::test]
async fn a_standby_reloads_as_well() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    postgres
        .execute(
            "CREATE TABLE beside (id int PRIMARY KEY); INSERT INTO beside VALUES (1);
             GRANT SELECT ON beside TO prefetchd; ALTER PUBLICATION prefetchd ADD TABLE beside",
        )
        .await;
    let settings = Settings::new(&postgres, &redis);
    let daemon = Daemon::with(&settings).await;
    // If the standby takes over while this one begins again, Redis refuses the latter.
    daemon.allow_warning("the checkpoint had changed: another writer");
    daemon.ready().await;
    let standby = Daemon::with(&settings).await;
    standby.status_when("it stands by", |status| status["state"] == "standby").await;
    let beside = "[[tables]]\nname = \"beside\"\ntable = \"public.beside\"\nkey = \"beside:{id}\"\n";
    let both = settings.clone().tables(&format!("{}\n{beside}", settings.tables_toml()));
    for daemon in [&daemon, &standby] {
        assert_eq!(reload(daemon, &both).await["added"], json!(["beside"]));
    }
    let row = async || standby.get("/v1/tables/beside/1").await.status;
    eventually("the standby shows the new table", row, |status| *status == 200).await;
    // It may have taken over while the other one was between two sessions.
    let states = async || (daemon.status().await["state"].clone(), standby.status().await["state"].clone());
    let one_works =
        |(a, b): &(Value, Value)| (a == "standby") != (b == "standby") && (a == "streaming" || b == "streaming");
    let (state, _) = eventually("one works, and the other stands by", states, one_works).await;
    let (active, other) = if state == "standby" { (standby, daemon) } else { (daemon, standby) };
    assert_eq!(active.stop().await, Some(0));
    whole(&other).await;
}

#[tokio::test]
async fn a_reload_is_no_stop_and_ends_no_pause() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let settings = Settings::new(&postgres, &redis);
    let daemon = Daemon::with(&settings).await;
    daemon.ready().await;
    let address = daemon.address();
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let looking = tokio::spawn(async move {
        let (mut looks, mut stopped) = (Vec::new(), stopped);
        while stopped.try_recv().is_err() {
            let answer = crate::harness::request(address, "GET", "/readyz").await.unwrap();
            looks.push((answer.status, answer.body));
        }
        looks
    });
    for limit in ["31s", "32s", "33s"] {
        reload(&daemon, &settings.clone().text("cache.max_staleness", limit)).await;
        let lsn = postgres.execute("UPDATE categories SET display_order = 9 WHERE id = 'cat-005'").await;
        daemon.applied(lsn).await;
    }
    stop.send(()).unwrap();
    let looks = looking.await.unwrap();
    assert!(looks.len() > 3 && looks.iter().all(|(status, _)| *status == 200), "{looks:?}");

    assert_eq!(daemon.operate("pause", &json!({})).await.status, 200);
    reload(&daemon, &settings).await;
    daemon.status_when("the next session runs", |status| status["state"] != "connecting").await;
    let lsn = postgres.execute("UPDATE categories SET name = 'Paused' WHERE id = 'cat-005'").await;
    let status = daemon.status_when("it knows of the change", |status| status["lag"]["bytes"].as_u64() > Some(0)).await;
    assert_eq!(status["paused"], true, "{status}");
    assert_ne!(redis.hash("cache:category:cat-005").await["name"], "Paused");
    assert_eq!(daemon.operate("resume", &json!({})).await.status, 200);
    daemon.applied(lsn).await;
    assert_eq!(redis.hash("cache:category:cat-005").await["name"], "Paused");
}
