//! Postgres fails over, is restored, or is replaced: in every phase of its work the daemon finds out, reports it, and
//! makes Redis follow the history that Postgres has now.

use crate::harness::scene::{Phase, Scene};
use crate::harness::trial::{Then, Trial};
use crate::harness::{Daemon, PATIENCE, Postgres, Redis, Settings, Stop, eventually, skipped};
use serde_json::Value;
use std::time::Instant;

/// During a drain, Redis resumes as soon as Postgres is gone.
fn stop(scene: &mut Scene, how: Stop) {
    scene.postgres.stop(how);
    scene.thaw();
}

/// Promotes a standby that has everything: with a fast stop, Postgres sends it all before it ends.
async fn fail_over(scene: &mut Scene, standby: &mut Postgres) {
    stop(scene, Stop::Fast);
    standby.promote().await;
    scene.postgres.change_places(standby);
}

/// Before Postgres 17, a standby has no slot.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failover_without_the_slot_loads_everything() {
    let mut trial = Trial::new(Postgres::own(&[])).await;
    let then = Then::Loads { because: "the replication slot is gone", heals: "slot_lost" };
    for phase in Phase::ALL {
        let mut standby = trial.scene.postgres.twin().without_slots();
        standby.follow(&trial.scene.postgres).await;
        let blow = async |scene: &mut Scene| fail_over(scene, &mut standby).await;
        trial.strike("failover, no slot", phase, then, blow).await;
    }
    trial.end().await;
}

/// Its slot is where it was when the standby was created, and its WAL contains everything since.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failover_to_a_copy_that_has_the_slot_and_everything_loads_nothing() {
    let mut trial = Trial::new(Postgres::own(&[])).await;
    for phase in [Phase::Stream, Phase::Load, Phase::Drain, Phase::Down] {
        let mut standby = trial.scene.postgres.twin();
        standby.follow(&trial.scene.postgres).await;
        let blow = async |scene: &mut Scene| fail_over(scene, &mut standby).await;
        trial.strike("failover, with the slot", phase, Then::Resumes, blow).await;
    }
    trial.end().await;
}

/// Redis has rows that Postgres no longer has. They are removed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failover_to_a_standby_that_lags_loads_everything() {
    let mut trial = Trial::new(Postgres::own(&[])).await;
    trial.postgres_may_go_back().await;
    let then = Then::Loads { because: "postgres went back: timeline", heals: "postgres_went_back" };
    for phase in Phase::ALL {
        let mut standby = trial.scene.postgres.twin();
        standby.follow(&trial.scene.postgres).await;
        standby.stop(Stop::Immediate);
        let lost = "UPDATE items SET body = 'lost' WHERE id <= 2000; INSERT INTO items (id) VALUES (1000000)";
        trial.scene.postgres.execute(lost).await;
        let blow = async |scene: &mut Scene| {
            stop(scene, Stop::Immediate);
            standby.start_again();
            standby.promote().await;
            // As a new primary receives writes, it may reach the position that Redis had.
            standby.execute("UPDATE items SET body = 'after' WHERE id BETWEEN 1000 AND 5000").await;
            scene.postgres.change_places(&mut standby);
        };
        trial.strike("failover, lagging", phase, then, blow).await;
    }
    trial.end().await;
}

/// The same timeline, but less of it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_older_state_of_the_same_server_loads_everything() {
    let mut trial = Trial::new(Postgres::own(&[])).await;
    trial.postgres_may_go_back().await;
    // Writers may have brought it to Redis's position before anything checks.
    let then = Then::Loads { because: "postgres went back", heals: "postgres_went_back" };
    for phase in Phase::ALL {
        let mut older = trial.scene.postgres.twin();
        trial.scene.update("body = 'lost' WHERE id <= 5000").await;
        let blow = async |scene: &mut Scene| {
            stop(scene, Stop::Fast);
            scene.postgres.change_places(&mut older);
        };
        trial.strike("restored, behind redis", phase, then, blow).await;
    }
    trial.end().await;
}

/// Then the server's position proves nothing, but the slot's changes do.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_older_state_that_has_written_on_loads_everything() {
    let mut trial = Trial::new(Postgres::own(&[])).await;
    trial.postgres_may_go_back().await;
    let published = "UPDATE items SET body = 'lost' WHERE id <= 3000";
    // Something else advances the position: Redis gets none of it, and the new history has changes there.
    let other = "CREATE TABLE IF NOT EXISTS other (n int); INSERT INTO other SELECT generate_series(1, 20000)";
    let of_ours = "was not redelivered";
    for (lost, loaded, phase, because) in [
        (published, false, Phase::Idle, of_ours),
        (other, false, Phase::Idle, "was not there before"),
        // What was lost came from a load.
        (published, true, Phase::Idle, of_ours),
        (published, false, Phase::Down, of_ours),
    ] {
        let then = Then::Loads { because, heals: "postgres_went_back" };
        let mut older = trial.scene.postgres.twin();
        let at = trial.scene.postgres.execute(lost).await;
        trial.daemon().applied(at).await;
        if loaded {
            trial.flush().await;
        }
        let blow = async |scene: &mut Scene| {
            stop(scene, Stop::Fast);
            older.start_again();
            older.execute("UPDATE items SET body = 'after' WHERE id <= 100").await;
            older.execute(&format!("{other}; {other}; {other}")).await;
            scene.postgres.change_places(&mut older);
        };
        trial.strike("restored, beyond redis", phase, then, blow).await;
    }
    trial.end().await;
}

/// There and back again: the old primary joins as a standby, with its old slot.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_failover_after_the_other_also_while_the_daemon_is_down() {
    let mut trial = Trial::new(Postgres::own(&[])).await;
    let mut other = trial.scene.postgres.twin();
    for phase in [Phase::Stream, Phase::Down, Phase::Stream] {
        other.follow(&trial.scene.postgres).await;
        let blow = async |scene: &mut Scene| {
            fail_over(scene, &mut other).await;
            // Before anything has a chance to check.
            other.follow(&scene.postgres).await;
            fail_over(scene, &mut other).await;
        };
        trial.strike("two failovers", phase, Then::Resumes, blow).await;
        other.follow(&trial.scene.postgres).await;
        let blow = async |scene: &mut Scene| fail_over(scene, &mut other).await;
        trial.strike("and one back", phase, Then::Resumes, blow).await;
    }
    trial.end().await;
}

/// Two servers at two addresses; the daemon looks for the writable one.
#[tokio::test]
async fn the_server_that_may_be_written_to_is_found_among_several() {
    let (mut one, redis) = (Postgres::own(&[]), Redis::start());
    let mut two = one.twin().without_slots();
    two.follow(&one).await;
    let both = format!("127.0.0.1:{},127.0.0.1:{}", two.port(), one.port());
    let url = one.url("prefetchd").replace(&format!("127.0.0.1:{}", one.port()), &both);
    let settings = Settings::new(&one, &redis).text("postgres.url", &format!("{url}?target_session_attrs=read-write"));
    let daemon = Daemon::with(&settings).await;
    daemon.allow_warning("loading every table again");
    daemon.ready().await;
    let lsn = one.execute("UPDATE categories SET name = 'before' WHERE id = 'cat-001'").await;
    daemon.applied(lsn).await;
    one.stop(Stop::Fast);
    // Neither is writable.
    daemon.status_when("it waits", |status| status["state"] == "connecting").await;
    assert_eq!(daemon.get("/v1/tables/categories/cat-001").await.json()["name"], "before");
    two.promote().await;
    let began = Instant::now();
    let lsn = two.execute("UPDATE categories SET name = 'after' WHERE id = 'cat-001'").await;
    daemon.applied(lsn).await;
    daemon.ready().await;
    println!("promoted at another address | {} ms", began.elapsed().as_millis());
    assert_eq!(redis.hash("cache:category:cat-001").await["name"], "after");
    let status = daemon.status().await;
    assert_eq!(status["source"]["timeline"], 2, "{status}");
    assert_eq!(status["last_load"]["reason"], "the replication slot is gone", "{status}");
    assert_eq!(daemon.stop().await, Some(0));
}

/// At the same address: nothing of it reaches Redis until an operator allows it.
#[tokio::test]
async fn another_server_at_the_same_address_is_not_followed_until_it_is_adopted() {
    let (mut one, mut other, redis) = (Postgres::own(&[]), Postgres::own(&[]), Redis::start());
    let settings = Settings::new(&one, &redis);
    let daemon = Daemon::with(&settings).await;
    daemon.allow_warnings();
    daemon.ready().await;
    other.execute("UPDATE categories SET name = 'of the other' WHERE id = 'cat-001'").await;
    one.change_places(&mut other);
    let waits = |status: &Value| status["waiting_for"].as_str().is_some_and(|what| what.contains("--adopt"));
    let status = daemon.status_when("it refuses", waits).await;
    assert_eq!(status["state"], "stalled", "{status}");
    daemon.logged("cannot go on until this is mended").await;
    assert_eq!(daemon.get("/readyz").await.status, 503);
    assert_eq!(daemon.get("/v1/tables/categories/cat-001").await.refusal(), (503, "healing".to_owned()));
    assert_eq!(redis.hash("cache:category:cat-001").await["name"], "Beverages");
    assert_eq!(one.value("SELECT count(*) FROM pg_replication_slots").await.as_deref(), Some("0"));
    daemon.stop().await;

    let (code, said) = Daemon::refused(&settings);
    assert_eq!(code, Some(78), "{said}");
    assert!(said.contains("another Postgres system") && said.contains("--adopt"), "{said}");
    let daemon = Daemon::with(&settings.arg("--adopt")).await;
    let began = Instant::now();
    daemon.ready().await;
    println!("another server, adopted | {} ms", began.elapsed().as_millis());
    assert_eq!(redis.hash("cache:category:cat-001").await["name"], "of the other");
    assert!(daemon.status().await["last_load"]["reason"].as_str().unwrap().contains("gone"));
    assert_eq!(daemon.stop().await, Some(0));
}

/// Nothing is lost, and the slot of a daemon that cannot confirm does not delay the shutdown.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn postgres_stops_promptly_and_comes_back_in_a_load_and_in_a_drain() {
    let mut trial = Trial::new(Postgres::own(&[])).await;
    for (how, phase, frozen) in [
        (Stop::Fast, Phase::Load, false),
        (Stop::Immediate, Phase::Load, false),
        (Stop::Fast, Phase::Load, true),
        (Stop::Immediate, Phase::Load, true),
        (Stop::Fast, Phase::Drain, false),
        (Stop::Immediate, Phase::Drain, false),
        (Stop::Fast, Phase::Drain, true),
        (Stop::Immediate, Phase::Drain, true),
    ] {
        let blow = async |scene: &mut Scene| {
            if frozen {
                scene.freeze();
                scene.update("body = 'held up' WHERE id <= 100").await;
            } else {
                scene.thaw();
            }
            let began = Instant::now();
            stop(scene, how);
            println!("{how:?} stop | {phase:?}, redis frozen {frozen} | it took {} ms", began.elapsed().as_millis());
            assert!(began.elapsed() < PATIENCE);
            scene.postgres.start_again();
        };
        let fault = format!("{how:?} stop, redis {}", if frozen { "frozen" } else { "up" });
        trial.strike(&fault, phase, Then::Resumes, blow).await;
    }
    trial.end().await;
}

/// Since Postgres 17, the standby keeps the slot, and nothing is sent that the standby does not have. Even a standby
/// that lags therefore has everything that Redis has, and what Postgres loses was never visible.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failover_slot_loads_nothing_and_shows_nothing_that_is_lost() {
    let postgres = Postgres::own(&[]);
    let version = postgres.value("SHOW server_version_num").await.unwrap().parse::<u32>().unwrap();
    if version < 170_000 {
        skipped(format_args!("Postgres {} has no failover slots", version / 10_000));
        return;
    }
    let mut trial = Trial::with(postgres, |settings| settings.set("postgres.failover", "true")).await;
    for phase in [Phase::Stream, Phase::Load, Phase::Drain, Phase::Down] {
        let mut standby = trial.scene.postgres.twin().without_slots();
        let primary = &trial.scene.postgres;
        primary.execute("SELECT pg_create_physical_replication_slot('twin')").await;
        primary.execute("ALTER SYSTEM SET synchronized_standby_slots = 'twin'").await;
        primary.execute("SELECT pg_reload_conf()").await;
        for (name, value) in
            [("primary_slot_name", "twin"), ("hot_standby_feedback", "on"), ("sync_replication_slots", "on")]
        {
            standby.set(name, value);
        }
        standby.follow(primary).await;
        let kept = async || {
            // The position must advance for that.
            primary.execute("SELECT pg_log_standby_snapshot()").await;
            standby.value("SELECT count(*) FROM pg_replication_slots WHERE synced AND NOT temporary").await
        };
        eventually("the standby keeps the slot", kept, |kept| kept.as_deref() == Some("1")).await;
        let blow = async |scene: &mut Scene| {
            standby.stop(Stop::Immediate);
            scene.update("body = 'lost' WHERE id <= 2000").await;
            stop(scene, Stop::Immediate);
            standby.start_again();
            standby.promote().await;
            scene.postgres.change_places(&mut standby);
        };
        trial.strike("failover slot, lagging", phase, Then::Resumes, blow).await;
    }
    trial.end().await;
}
