//! Comparisons that cannot be made are given up with a reason, and change nothing. If a load lacks something that it
//! needs, the reason says so.

use crate::harness::{Answer, Daemon, Postgres, Redis, Settings, eventually, run_program};
use serde_json::{Value, json};

const ROW: &str = "/v1/tables/categories/cat-001";
const NONE: &str = "/v1/tables/categories/nobody";
const FIRST: &str = "cache:category:cat-001";
const REVOKE: &str = "REVOKE EXECUTE ON FUNCTION pg_logical_emit_message(boolean, text, text),
                      pg_logical_emit_message(boolean, text, bytea) FROM PUBLIC";

/// Returns the first statement in the text that begins like this, as a person would copy it: up to the end of the
/// sentence.
fn statement<'a>(text: &'a str, begin: &str) -> &'a str {
    let from = text.find(begin).unwrap_or_else(|| panic!("no {begin} in {text}"));
    let end = text[from..].find(['"', '\n', ';']).map_or(text.len(), |end| from + end);
    &text[from..end]
}

async fn given_up(daemon: &Daemon, operation: &str, body: Value, why: &str) -> Answer {
    let answer = daemon.operate(operation, &body).await;
    assert_eq!(answer.refusal(), (503, "not_compared".to_owned()), "{answer:?}");
    let message = answer.json()["message"].as_str().unwrap().to_owned();
    assert!(message.contains(why) && message.contains("stays as it is"), "{message}");
    answer
}

/// Loaded, fresh and followed, as if nothing had been requested.
async fn is_untouched(daemon: &Daemon, postgres: &Postgres, redis: &Redis, name: &str) {
    assert_eq!(daemon.get(ROW).await.status, 200);
    let lsn = postgres.execute(&format!("UPDATE categories SET name = '{name}' WHERE id = 'cat-001'")).await;
    daemon.applied(lsn).await;
    assert_eq!(redis.hash(FIRST).await["name"], name);
    assert_eq!(daemon.get(NONE).await.refusal(), (404, "not_found".to_owned()));
    assert_eq!(daemon.get("/readyz").await.status, 200);
    let status = daemon.status().await;
    assert_eq!((&status["state"], &status["tables"][0]["loaded"]), (&json!("streaming"), &json!(true)), "{status}");
}

#[tokio::test]
async fn check_and_start_name_the_right_to_mark_the_wal() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let settings = Settings::new(&postgres, &redis);
    postgres.execute(REVOKE).await;
    let checked = run_program(&settings, &["check"]).await;
    assert_eq!(checked.code, Some(78), "{checked:?}");
    let grant = statement(&checked.stdout, "GRANT EXECUTE ON FUNCTION pg_logical_emit_message").to_owned();
    let (code, said) = Daemon::refused(&settings);
    assert_eq!(code, Some(78), "{said}");
    assert!(said.contains(&grant), "{said}");
    assert_eq!(
        postgres.value("SELECT count(*) FROM pg_replication_slots WHERE database = current_database()").await.unwrap(),
        "0"
    );
    postgres.execute(&grant).await;
    assert_eq!(run_program(&settings, &["check"]).await.code, Some(0));
    let daemon = Daemon::with(&settings).await;
    daemon.ready().await;
}

#[tokio::test]
async fn a_comparison_that_lacks_a_right_changes_nothing_and_names_the_right() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let settings = Settings::new(&postgres, &redis);
    let daemon = Daemon::with(&settings).await;
    daemon.ready().await;
    assert_eq!(daemon.operate("verify", &json!({})).await.status, 200);
    let last = daemon.status().await["last_verify"].clone();
    daemon.allow_warning("was given up, the table stays as it is");

    postgres.execute(REVOKE).await;
    let grant = "GRANT EXECUTE ON FUNCTION pg_logical_emit_message";
    for (operation, body) in [("verify", json!({})), ("verify", json!({"repair": true})), ("refetch", json!({}))] {
        given_up(&daemon, operation, body, grant).await;
        is_untouched(&daemon, &postgres, &redis, operation).await;
        let status = daemon.status().await;
        assert!(status["tables"][0]["not_compared"].as_str().unwrap().contains(grant), "{status}");
        assert_eq!((&status["last_verify"], &status["operation"]), (&last, &Value::Null));
    }
    assert_eq!(daemon.said("was given up, the table stays"), 1, "once for the same reason");
    let ran = run_program(&settings, &["verify", "--url", &format!("http://{}", daemon.address())]).await;
    assert_eq!(ran.code, Some(1), "{ran:?}");
    postgres.execute(statement(&ran.stderr, grant)).await;
    assert_eq!(daemon.operate("verify", &json!({})).await.status, 200);
    assert_eq!(daemon.status().await["tables"][0]["not_compared"], Value::Null);

    postgres.execute("REVOKE SELECT ON categories FROM prefetchd").await;
    // A table that may not be read is blocked as soon as that is noticed.
    daemon.allow_warning("table cannot be followed until this is mended");
    let answer = daemon.operate("verify", &json!({})).await;
    assert!(answer.status == 503 && answer.body.contains("GRANT SELECT ON"), "{answer:?}");
    assert_eq!(daemon.stop().await, Some(0));
}

#[tokio::test]
async fn a_comparison_that_is_cancelled_or_kept_out_by_a_lock_changes_nothing() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let daemon = Daemon::start(&postgres, &redis).await;
    daemon.ready().await;
    daemon.allow_warning("was given up, the table stays as it is");
    let holder = postgres.client().await;
    holder.batch_execute("BEGIN; LOCK TABLE categories IN ACCESS EXCLUSIVE MODE").await.unwrap();
    let cancel = format!(
        "SELECT count(pg_cancel_backend(pid)) FROM pg_stat_activity
          WHERE application_name = 'prefetchd_{}' AND wait_event_type = 'Lock'",
        postgres.slot()
    );
    let (refused, ()) =
        tokio::join!(given_up(&daemon, "verify", json!({}), "canceling statement due to user request"), async {
            eventually("it waits for the lock", async || postgres.value(&cancel).await.unwrap(), |n| n != "0").await;
        });
    drop(refused);
    // Nothing cancels the other session, but the wait is limited.
    given_up(&daemon, "verify", json!({}), "lock timeout").await;
    holder.batch_execute("COMMIT").await.unwrap();
    is_untouched(&daemon, &postgres, &redis, "Again").await;
    assert_eq!(daemon.operate("verify", &json!({})).await.status, 200);
    assert_eq!(daemon.said("a session began"), 0);
    let reconnects = daemon.metrics().await[r#"prefetchd_reconnects_total{peer="postgres"}"#];
    assert_eq!(reconnects, 0.0, "the stream went on");
}

#[tokio::test]
async fn a_comparison_that_redis_refuses_changes_nothing() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let daemon = Daemon::start(&postgres, &redis).await;
    daemon.ready().await;
    daemon.allow_warning("was given up, the table stays as it is");
    for denied in ["hgetall", "scan"] {
        redis.command::<()>(&["ACL", "SETUSER", "prefetchd", &format!("-{denied}")]).await;
        given_up(&daemon, "verify", json!({"repair": true}), &denied.to_uppercase()).await;
        redis.command::<()>(&["ACL", "SETUSER", "prefetchd", &format!("+{denied}")]).await;
        is_untouched(&daemon, &postgres, &redis, denied).await;
    }
    assert_eq!(daemon.operate("verify", &json!({})).await.status, 200);
    let metrics = daemon.metrics().await;
    assert_eq!(metrics[r#"prefetchd_reconnects_total{peer="redis"}"#], 0.0, "the stream went on");
}

#[tokio::test]
async fn a_background_verification_that_cannot_be_made_leaves_readers_alone_and_is_made_later() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let daemon = Daemon::with(&Settings::new(&postgres, &redis).text("cache.verify_every", "1s")).await;
    daemon.ready().await;
    daemon.allow_warning("verify with repair of categories was given up");
    postgres.execute(REVOKE).await;
    daemon.logged("verify with repair of categories was given up").await;
    let reads = daemon.status().await["primary_reads"].as_u64().unwrap();
    daemon.status_when("tried again", |status| status["primary_reads"].as_u64().unwrap() >= reads + 2).await;
    is_untouched(&daemon, &postgres, &redis, "Again").await;
    let before = daemon.status().await["last_verify"].clone();
    postgres.execute("GRANT EXECUTE ON FUNCTION pg_logical_emit_message(boolean, text, bytea) TO prefetchd").await;
    daemon.status_when("verified", |status| status["last_verify"] != before).await;
    assert_eq!(daemon.said("was given up, the table stays"), 1);
}

/// Keys that an operator removed wait for a comparison. They keep waiting, and the existing rows are served.
#[tokio::test]
async fn removed_keys_stay_missing_where_they_cannot_be_fetched_again() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let daemon = Daemon::start(&postgres, &redis).await;
    daemon.ready().await;
    daemon.allow_warning("was given up, the table stays as it is");
    postgres.execute(REVOKE).await;
    daemon.operate("invalidate", &json!({"table": "categories", "keys": ["cat-002"]})).await;
    given_up(&daemon, "refetch", json!({}), "GRANT EXECUTE").await;
    assert_eq!(daemon.get(ROW).await.status, 200);
    assert_eq!(daemon.get("/v1/tables/categories/cat-002").await.refusal(), (503, "incomplete".to_owned()));
    postgres.execute("GRANT EXECUTE ON FUNCTION pg_logical_emit_message(boolean, text, bytea) TO prefetchd").await;
    assert_eq!(daemon.operate("refetch", &json!({})).await.json()["repaired"], 1);
    assert_eq!(daemon.get("/v1/tables/categories/cat-002").await.status, 200);
}
