//! The slot or the publication is dropped or invalidated, in every phase of the daemon's work.

use crate::harness::scene::{Phase, Scene};
use crate::harness::trial::{Then, Trial};
use crate::harness::{Daemon, Postgres, Redis, Settings, eventually};

async fn count(postgres: &Postgres, what: &str) -> String {
    postgres.value(&format!("SELECT count(*) FROM pg_replication_slots WHERE {what}")).await.unwrap()
}

/// Postgres removes WAL that the slot needs.
async fn invalidate_slot(postgres: &Postgres) {
    postgres.execute("ALTER SYSTEM SET max_slot_wal_keep_size = '1MB'").await;
    postgres.execute("SELECT pg_reload_conf()").await;
    let lost = async || {
        postgres.execute("CREATE TABLE IF NOT EXISTS other (n int); INSERT INTO other VALUES (1)").await;
        postgres.execute("SELECT pg_switch_wal()").await;
        postgres.execute("CHECKPOINT").await;
        count(postgres, "wal_status = 'lost'").await
    };
    eventually("it is lost", lost, |lost| lost != "0").await;
    postgres.execute("ALTER SYSTEM RESET max_slot_wal_keep_size").await;
    postgres.execute("SELECT pg_reload_conf()").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_that_is_dropped_is_made_anew_whatever_was_being_done() {
    let mut trial = Trial::new(Postgres::own(&[])).await;
    let then = Then::Loads { because: "the replication slot is gone", heals: "slot_lost" };
    for phase in Phase::ALL {
        let blow = async |scene: &mut Scene| scene.postgres.drop_slot().await;
        trial.strike("slot dropped", phase, then, blow).await;
    }
    trial.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_that_kept_too_much_is_made_anew_whatever_was_being_done() {
    let mut trial = Trial::new(Postgres::own(&[])).await;
    let then = Then::Loads { because: "Postgres removed WAL that it needs", heals: "slot_lost" };
    for phase in Phase::ALL {
        let blow = async |scene: &mut Scene| {
            // Keeps the slot where it is, if there is a daemon.
            scene.freeze();
            scene.update("body = 'held up' WHERE id <= 100").await;
            invalidate_slot(&scene.postgres).await;
            scene.thaw();
        };
        trial.strike("slot invalidated, redis frozen", phase, then, blow).await;
    }
    trial.end().await;
}

/// What was written before it was created again can never be decoded.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_publication_that_was_gone_for_a_moment_takes_a_new_slot_whatever_was_being_done() {
    let mut trial = Trial::new(Postgres::own(&[])).await;
    let then = match trial.scene.postgres.version_num().await < 180_000 {
        true => Then::Loads { because: "the publication was missing", heals: "slot_lost" },
        // The stream goes on without an error, and without the changes.
        false => Then::Loads { because: "its partitions, row filter or types changed", heals: "schema" },
    };
    for phase in Phase::ALL {
        let blow = async |scene: &mut Scene| {
            scene.postgres.execute("DROP PUBLICATION prefetchd").await;
            scene.update("body = 'unheard of' WHERE id <= 1000").await;
            scene.postgres.execute("CREATE PUBLICATION prefetchd FOR TABLE items, lefts, rights").await;
        };
        trial.strike("publication dropped and made", phase, then, blow).await;
    }
    trial.end().await;
}

#[tokio::test]
async fn where_it_may_not_make_a_slot_it_says_who_must() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let slot = postgres.slot();
    let make = format!("SELECT pg_create_logical_replication_slot('{slot}', 'pgoutput')");
    let settings = Settings::new(&postgres, &redis).set("postgres.create", "false");
    let (code, said) = Daemon::refused(&settings);
    assert_eq!(code, Some(78), "{said}");
    assert!(said.contains(&make) && said.contains("postgres.create"), "{said}");

    postgres.execute(&make).await;
    let daemon = Daemon::with(&settings).await;
    daemon.allow_warnings();
    daemon.ready().await;
    postgres.drop_slot().await;
    let waits = |status: &serde_json::Value| status["waiting_for"].as_str().is_some_and(|what| what.contains(&make));
    let status = daemon.status_when("it says what is missing", waits).await;
    assert_eq!(status["state"], "stalled", "{status}");
    assert_eq!(daemon.get("/readyz").await.status, 503);
    assert_eq!(daemon.get("/v1/tables/categories/cat-001").await.status, 200, "an outage");
    daemon.logged("cannot go on until this is mended").await;
    assert_eq!(daemon.said("ERROR"), 1, "{}", daemon.log_text());
    postgres.execute("UPDATE categories SET name = 'unheard of' WHERE id = 'cat-001'").await;
    postgres.execute(&make).await;
    daemon.ready().await;
    assert_eq!(redis.hash("cache:category:cat-001").await["name"], "unheard of");

    // Once more while no daemon runs.
    assert_eq!(daemon.stop().await, Some(0));
    postgres.drop_slot().await;
    let (code, said) = Daemon::refused(&settings);
    assert_eq!(code, Some(78), "{said}");
    assert!(said.contains("the replication slot is gone") && said.contains(&make), "{said}");
}
