//! Changes that cannot become a row, and one that Postgres itself cannot send.

use crate::harness::{Daemon, Postgres, Redis, Settings, psql, run_program};
use serde_json::{Value, json};

const MIGRATIONS: [&str; 3] = [
    include_str!("../migrations/001_categories.sql"),
    include_str!("../migrations/002_role.sql"),
    include_str!("../migrations/003_publication.sql"),
];

/// A database that takes any bytes, and what to say to the daemon about it.
fn any_bytes(postgres: &Postgres, redis: &Redis) -> (String, Settings) {
    psql(
        &postgres.url("postgres"),
        "CREATE DATABASE anybytes TEMPLATE template0 ENCODING 'SQL_ASCII' LC_COLLATE 'C' LC_CTYPE 'C'",
    );
    let there = |role: &str| postgres.url(role).replace(&format!("/{}", postgres.database()), "/anybytes");
    MIGRATIONS.iter().for_each(|migration| drop(psql(&there("postgres"), migration)));
    let settings = Settings::new(postgres, redis).text("postgres.url", &there("prefetchd"));
    (there("postgres"), settings)
}

async fn stuck_at(daemon: &Daemon) -> String {
    let is_stuck = |status: &Value| {
        status["state"] == "stalled"
            && status["waiting_for"].to_string().contains("postgres cannot send the change at ")
    };
    let status = daemon.status_when("stuck", is_stuck).await;
    let text = status["waiting_for"].as_str().unwrap().to_owned();
    let at = text.split("prefetchd skip ").nth(1).unwrap().split(',').next().unwrap().to_owned();
    assert!(text.contains("invalid byte sequence"), "{text}");
    at
}

#[tokio::test]
async fn a_change_that_postgres_cannot_send_is_named_and_skipped_on_an_operators_word() {
    let (postgres, redis) = (Postgres::own(&[]), Redis::start());
    let (url, settings) = any_bytes(&postgres, &redis);
    let daemon = Daemon::with(&settings).await;
    daemon.ready().await;
    daemon.allow_warnings();
    psql(&url, "INSERT INTO categories VALUES ('cat-006', 'Fine', 6, false, NULL)");
    daemon.status_when("applied", |status| status["sync_events_applied"] == 1).await;
    psql(&url, r"INSERT INTO categories VALUES ('bad', E'\xff', 7, false, NULL)");
    let at = stuck_at(&daemon).await;
    daemon.logged("the stream is stuck").await;
    // What lies behind it waits, also the end of the row that was the trouble.
    psql(&url, "DELETE FROM categories WHERE id = 'bad'; UPDATE categories SET name = 'Later' WHERE id = 'cat-006'");
    let wrong = daemon.operate("skip", &json!({"lsn": "0/1"})).await;
    assert_eq!(wrong.refusal(), (409, "nothing_to_skip".to_owned()));
    assert!(wrong.body.contains(&at), "{wrong:?}");
    assert_eq!(redis.hash("cache:category:cat-006").await["name"], "Fine");

    let ran = run_program(&settings, &["skip", &at, "--url", &format!("http://{}", daemon.address())]).await;
    assert_eq!(ran.code, Some(0), "{ran:?}");
    daemon.ready().await;
    assert_eq!(redis.keys("cache:*").await.len(), 6);
    assert_eq!(redis.hash("cache:category:cat-006").await["name"], "Later");
    assert_eq!(daemon.metrics().await[r#"prefetchd_heals_total{reason="skipped"}"#], 1.0);
    psql(&url, "UPDATE categories SET name = 'Goes on' WHERE id = 'cat-006'");
    daemon.status_when("applied", |status| status["sync_events_applied"] == 2).await;
    assert_eq!(redis.hash("cache:category:cat-006").await["name"], "Goes on");
    let again = daemon.operate("skip", &json!({"lsn": at})).await;
    assert_eq!(again.refusal(), (409, "nothing_to_skip".to_owned()));
}
