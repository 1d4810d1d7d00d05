//! Postgres fails over, is restored, or is another one: whatever the daemon was at, it finds out by itself, says so, and
//! Redis follows the history that Postgres has now.

use crate::harness::scene::{Phase, Scene, Stage, Then};
use crate::harness::{Postgres, Stop};

/// A standby that has everything takes over: with a fast stop, Postgres sends it all before it ends.
async fn fail_over(stage: &mut Stage, standby: &mut Postgres) {
    stage.stop_postgres(Stop::Fast);
    standby.promote().await;
    stage.postgres.change_places(standby);
}

/// Before Postgres 17 a standby has no slot.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failover_without_the_slot_loads_everything() {
    let mut scene = Scene::new(Postgres::own(&[])).await;
    let then = Then::Loads { because: "the replication slot is gone", heals: "slot_lost" };
    for phase in [Phase::Idle, Phase::Stream, Phase::Load, Phase::Drain, Phase::Down] {
        let mut standby = scene.stage.postgres.twin().without_slots();
        standby.follow(&scene.stage.postgres).await;
        let blow = async |stage: &mut Stage| fail_over(stage, &mut standby).await;
        scene.strike("failover, no slot", phase, then, blow).await;
    }
    scene.end().await;
}

/// Its slot is where it was when the standby was made, and everything since is in its WAL.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failover_to_a_copy_that_has_the_slot_and_everything_loads_nothing() {
    let mut scene = Scene::new(Postgres::own(&[])).await;
    for phase in [Phase::Stream, Phase::Load, Phase::Drain, Phase::Down] {
        let mut standby = scene.stage.postgres.twin();
        standby.follow(&scene.stage.postgres).await;
        let blow = async |stage: &mut Stage| fail_over(stage, &mut standby).await;
        scene.strike("failover, with the slot", phase, Then::Resumes, blow).await;
    }
    scene.end().await;
}

/// Redis has rows that Postgres has no longer: they go.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failover_to_a_standby_that_lags_loads_everything() {
    let mut scene = Scene::new(Postgres::own(&[])).await;
    scene.postgres_may_go_back().await;
    let then = Then::Loads { because: "postgres went back: timeline", heals: "postgres_went_back" };
    for phase in [Phase::Idle, Phase::Stream, Phase::Load, Phase::Drain, Phase::Down] {
        let mut standby = scene.stage.postgres.twin();
        standby.follow(&scene.stage.postgres).await;
        standby.stop(Stop::Immediate);
        let lost = "UPDATE items SET body = 'lost' WHERE id <= 2000; INSERT INTO items (id) VALUES (1000000)";
        scene.stage.postgres.execute(lost).await;
        let blow = async |stage: &mut Stage| {
            stage.stop_postgres(Stop::Immediate);
            standby.start_again();
            standby.promote().await;
            // As a new primary does, and it may come to where Redis was.
            standby.execute("UPDATE items SET body = 'after' WHERE id BETWEEN 1000 AND 5000").await;
            stage.postgres.change_places(&mut standby);
        };
        scene.strike("failover, lagging", phase, then, blow).await;
    }
    scene.end().await;
}

/// The same timeline, and less of it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_older_state_of_the_same_server_loads_everything() {
    let mut scene = Scene::new(Postgres::own(&[])).await;
    scene.postgres_may_go_back().await;
    // Writers may have brought it to where Redis is before anybody looks.
    let then = Then::Loads { because: "postgres went back", heals: "postgres_went_back" };
    for phase in [Phase::Idle, Phase::Stream, Phase::Load, Phase::Drain, Phase::Down] {
        let mut older = scene.stage.postgres.twin();
        scene.stage.postgres.execute("UPDATE items SET body = 'lost' WHERE id <= 5000").await;
        let blow = async |stage: &mut Stage| {
            stage.stop_postgres(Stop::Fast);
            stage.postgres.change_places(&mut older);
        };
        scene.strike("restored, behind redis", phase, then, blow).await;
    }
    scene.end().await;
}

/// The server's position says nothing then: the slot's changes do.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_older_state_that_has_written_on_loads_everything() {
    let mut scene = Scene::new(Postgres::own(&[])).await;
    scene.postgres_may_go_back().await;
    let published = "UPDATE items SET body = 'lost' WHERE id <= 3000";
    // Whatever else moves the position: Redis was told of nothing, and the new history has changes there.
    let other = "CREATE TABLE IF NOT EXISTS other (n int); INSERT INTO other SELECT generate_series(1, 20000)";
    let of_ours = "did not come by again";
    for (lost, phase, because) in [
        (published, Phase::Idle, of_ours),
        (other, Phase::Idle, "was not there before"),
        (published, Phase::Down, of_ours),
    ] {
        let then = Then::Loads { because, heals: "postgres_went_back" };
        let mut older = scene.stage.postgres.twin();
        let at = scene.stage.postgres.execute(lost).await;
        scene.daemon().applied(at).await;
        let blow = async |stage: &mut Stage| {
            stage.stop_postgres(Stop::Fast);
            older.start_again();
            older.execute("UPDATE items SET body = 'after' WHERE id <= 100").await;
            older.execute(&format!("{other}; {other}; {other}")).await;
            stage.postgres.change_places(&mut older);
        };
        scene.strike("restored, beyond redis", phase, then, blow).await;
    }
    scene.end().await;
}

/// There and back again: the old primary joins as a standby, with the slot that it had.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_failover_after_the_other_also_while_the_daemon_is_down() {
    let mut scene = Scene::new(Postgres::own(&[])).await;
    let mut other = scene.stage.postgres.twin();
    for phase in [Phase::Stream, Phase::Down, Phase::Stream] {
        other.follow(&scene.stage.postgres).await;
        let blow = async |stage: &mut Stage| {
            fail_over(stage, &mut other).await;
            // Before anybody gets to look.
            other.follow(&stage.postgres).await;
            fail_over(stage, &mut other).await;
        };
        scene.strike("two failovers", phase, Then::Resumes, blow).await;
        other.follow(&scene.stage.postgres).await;
        let blow = async |stage: &mut Stage| fail_over(stage, &mut other).await;
        scene.strike("and one back", phase, Then::Resumes, blow).await;
    }
    scene.end().await;
}
