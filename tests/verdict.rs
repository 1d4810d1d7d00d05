//! What needs a person is reported everywhere, with reason and remedy; and nothing is called well that is not.

use crate::harness::{Daemon, Postgres, Redis, Settings, eventually, psql, run_program};
use prefetchd::lsn::Lsn;
use serde_json::{Value, json};

const ROW: &str = "/v1/tables/categories/cat-001";
const NONE: &str = "/v1/tables/categories/nobody";
const SECOND: &str = "[[tables]]\nname = \"beside\"\ntable = \"public.beside\"\nkey = \"beside:{id}\"\n";
const BOTH: &str = "[[tables]]\nname = \"categories\"\ntable = \"public.categories\"\nkey = \"cache:category:{id}\"\n";
const REVOKE: &str = "REVOKE EXECUTE ON FUNCTION pg_logical_emit_message(boolean, text, bytea) FROM PUBLIC";

/// Two tables, one of which stays in working order.
async fn two_tables(postgres: &Postgres, redis: &Redis) -> (Settings, Daemon) {
    postgres
        .execute(
            "CREATE TABLE beside (id int PRIMARY KEY); INSERT INTO beside VALUES (1);
             GRANT SELECT ON beside TO prefetchd; ALTER PUBLICATION prefetchd ADD TABLE beside",
        )
        .await;
    let settings = Settings::new(postgres, redis).tables(&format!("{BOTH}{SECOND}"));
    let daemon = Daemon::with(&settings).await;
    daemon.ready().await;
    (settings, daemon)
}

fn table(status: &Value) -> &Value {
    &status["tables"][0]
}

/// Waits until the status reports the table as blocked for this reason, and returns the remedy.
async fn blocked(daemon: &Daemon, because: &str) -> String {
    let status = daemon
        .status_when(&format!("blocked because {because}"), |status| {
            table(status)["state"] == "blocked" && table(status)["because"].as_str().unwrap().contains(because)
        })
        .await;
    let remedy = table(&status)["remedy"].as_str().unwrap().to_owned();
    assert_eq!(table(&status)["loaded"], false);
    assert_eq!(status["verdict"]["level"], "bad", "{status}");
    let text = status["verdict"]["text"].as_str().unwrap();
    assert!(text.contains("Table categories is blocked") && text.contains(because), "{status}");
    assert!(!text.contains("Healing"), "{status}");
    assert!(status["verdict"]["remedy"].as_str().unwrap().contains(&remedy), "{status}");
    let ready = daemon.get("/readyz").await;
    assert!(ready.status == 503 && ready.body.contains("table categories is blocked"), "{ready:?}");
    assert!(ready.json()["reasons"][0].as_str().unwrap().contains(&remedy), "{ready:?}");
    remedy
}

/// Reads of a blocked table say so if nothing can be promised.
async fn refuses(daemon: &Daemon, target: &str, because: &str) {
    let answer = daemon.get(target).await;
    assert_eq!(answer.refusal(), (503, "blocked".to_owned()), "{target}: {answer:?}");
    assert!(answer.json()["message"].as_str().unwrap().contains(because), "{answer:?}");
}

/// Without the text after the statement.
fn sql(remedy: &str) -> &str {
    let statements = &remedy[remedy.find("ALTER TABLE").unwrap_or_default()..];
    statements.split_once("; or").map_or(statements, |(statements, _)| statements)
}

async fn is_well(daemon: &Daemon) {
    daemon.ready().await;
    let status = daemon.status_when("all is well", |status| status["verdict"]["level"] == "good").await;
    assert!(status["verdict"]["text"].as_str().unwrap().starts_with("All is well"), "{status}");
    assert_eq!((&table(&status)["because"], &table(&status)["remedy"]), (&Value::Null, &Value::Null));
}

#[tokio::test]
async fn a_renamed_table_is_blocked_with_the_statement_that_undoes_it() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let (settings, daemon) = two_tables(&postgres, &redis).await;
    is_well(&daemon).await;
    daemon.allow_warning("table cannot be followed until this is mended");
    let before = postgres.position().await;
    postgres.execute(r#"CREATE SCHEMA "Attic 1"; ALTER TABLE categories SET SCHEMA "Attic 1""#).await;
    postgres.execute(r#"ALTER TABLE "Attic 1".categories RENAME TO "Old; one""#).await;
    let remedy = blocked(&daemon, "table public.categories is called ").await;

    let answer = daemon.get(ROW).await;
    assert_eq!(answer.status, 200, "what is there is served: {answer:?}");
    let lsn = answer.head.lines().find_map(|line| line.strip_prefix("prefetchd-lsn: ")).unwrap();
    assert!(lsn.trim().parse::<Lsn>().unwrap() <= before, "not newer than when the table had its name: {lsn}");
    refuses(&daemon, NONE, "is called ").await;
    refuses(&daemon, &format!("{ROW}?min_lsn={}", postgres.position().await), "is called ").await;
    refuses(&daemon, &format!("{ROW}?max_age=30s"), "is called ").await;
    assert_eq!(daemon.get("/v1/tables/beside/1").await.status, 200);
    assert_eq!(daemon.get("/v1/tables/beside/2").await.refusal(), (404, "not_found".to_owned()));
    let lsn = postgres.execute("INSERT INTO beside VALUES (2)").await;
    daemon.applied(lsn).await;
    assert_eq!(daemon.get("/v1/tables/beside/2").await.status, 200, "the others go on");
    assert_eq!(daemon.status().await["state"], "streaming");
    let refusal = daemon.operate("verify", &json!({})).await;
    assert!(refusal.body.contains("table categories is blocked, because"), "{refusal:?}");
    let ran = run_program(&settings, &["status", "--url", &format!("http://{}", daemon.address())]).await;
    assert_eq!(ran.code, Some(1));
    for part in ["Table categories is blocked: table public.categories is called", &remedy, "blocked"] {
        assert!(ran.stdout.contains(part), "{part}: {}", ran.stdout);
    }

    // Tried again, but reported once.
    let reads = daemon.status().await["primary_reads"].as_u64().unwrap();
    daemon.status_when("tried again", |status| status["primary_reads"].as_u64().unwrap() > reads).await;
    blocked(&daemon, "is called ").await;
    assert_eq!(daemon.said("table cannot be followed"), 1);
    psql(&postgres.url("postgres"), sql(&remedy));
    is_well(&daemon).await;
    assert_eq!(daemon.get(NONE).await.refusal(), (404, "not_found".to_owned()));
}

#[tokio::test]
async fn a_dropped_table_is_blocked_until_it_is_there_and_published() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let (_, daemon) = two_tables(&postgres, &redis).await;
    daemon.allow_warning("table cannot be followed until this is mended");
    postgres.execute("CREATE TABLE kept AS TABLE categories; DROP TABLE categories").await;
    assert!(blocked(&daemon, "table public.categories was dropped").await.starts_with("create it again"));
    refuses(&daemon, NONE, "was dropped").await;
    postgres
        .execute("CREATE TABLE categories (LIKE kept); ALTER TABLE categories ADD PRIMARY KEY (id); INSERT INTO categories TABLE kept")
        .await;
    // A missing right, an unpublished table: one after the other, each reported as what it is.
    let remedy = blocked(&daemon, "may not be read by role prefetchd").await;
    psql(&postgres.url("postgres"), &remedy);
    let remedy = blocked(&daemon, "is not in publication prefetchd").await;
    psql(&postgres.url("postgres"), &remedy);
    is_well(&daemon).await;
}

#[tokio::test]
async fn a_load_that_lacks_a_right_names_that_right() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let daemon = Daemon::start(&postgres, &redis).await;
    daemon.allow_warnings();
    daemon.ready().await;
    postgres.execute(REVOKE).await;
    redis.flush().await;
    let remedy = blocked(&daemon, "may not execute pg_logical_emit_message").await;
    // Nothing that Redis has now is known to be correct.
    refuses(&daemon, NONE, "may not execute").await;
    redis.command::<i32>(&["HSET", "cache:category:cat-001", "id", "cat-001"]).await;
    refuses(&daemon, ROW, "may not execute").await;
    psql(&postgres.url("postgres"), sql(&remedy));
    is_well(&daemon).await;
}

#[tokio::test]
async fn drift_that_nobody_repaired_is_remembered() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let daemon = Daemon::start(&postgres, &redis).await;
    daemon.allow_warning("verify");
    daemon.ready().await;
    redis.command::<i32>(&["HSET", "cache:category:ghost", "id", "ghost"]).await;
    redis.command::<i32>(&["HSET", "cache:category:cat-001", "name", "Wrong"]).await;
    for (mends, body) in [("verify", json!({"repair": true})), ("refetch", json!({"table": "categories"}))] {
        redis.command::<i32>(&["HSET", "cache:category:ghost", "id", "ghost"]).await;
        assert_eq!(daemon.operate("verify", &json!({})).await.status, 200);
        let status = daemon.status().await;
        assert_eq!(status["verdict"]["level"], "warning", "{status}");
        assert!(status["verdict"]["text"].as_str().unwrap().contains("A verify of categories found"), "{status}");
        assert!(table(&status)["drift"].as_u64() > Some(0) && table(&status)["checked_at"].is_string(), "{status}");
        assert_eq!(daemon.operate(mends, &body).await.status, 200);
        is_well(&daemon).await;
    }
}

#[tokio::test]
async fn a_pause_during_which_redis_lost_everything_says_so() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let daemon = Daemon::start(&postgres, &redis).await;
    daemon.allow_warnings();
    daemon.ready().await;
    daemon.operate("pause", &json!({})).await;
    let status = daemon.status().await;
    assert_eq!(status["verdict"]["level"], "warning", "{status}");
    redis.flush().await;
    let says = |status: &Value| {
        let text = status["verdict"]["text"].as_str().unwrap();
        status["verdict"]["level"] == "bad"
            && text.contains("Paused")
            && text.contains("lost what it had of categories")
    };
    let status = daemon.status_when("it says what is lost", says).await;
    assert!(status["verdict"]["remedy"].as_str().unwrap().contains("prefetchd resume"), "{status}");
    assert_eq!(daemon.get(ROW).await.status, 503);
    daemon.operate("resume", &json!({})).await;
    is_well(&daemon).await;
}

/// What the checkpoint tells another daemon.
#[tokio::test]
async fn a_standby_says_what_is_blocked_as_well() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let (settings, daemon) = two_tables(&postgres, &redis).await;
    let standby = Daemon::with(&settings).await;
    standby.ready().await;
    is_standing_by(&standby).await;
    daemon.allow_warning("table cannot be followed until this is mended");
    postgres.execute("ALTER TABLE categories RENAME TO elsewhere").await;
    let remedy = blocked(&daemon, "is called ").await;
    assert_eq!(blocked(&standby, "is called ").await, remedy);
    refuses(&standby, NONE, "is called ").await;
    psql(&postgres.url("postgres"), sql(&remedy));
    is_well(&daemon).await;
    is_standing_by(&standby).await;
}

async fn is_standing_by(daemon: &Daemon) {
    let verdict = async || daemon.status().await["verdict"].clone();
    let stands_by =
        |verdict: &Value| verdict["level"] == "good" && verdict["text"].as_str().unwrap().starts_with("Standing by");
    eventually("it stands by, and all is well", verdict, stands_by).await;
}
