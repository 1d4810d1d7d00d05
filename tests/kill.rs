//! The daemon and both servers are killed under constant writes: whatever was in flight, Redis is correct in the end,
//! and no reader sees anything torn, older than before, or back from the dead.

use crate::harness::scene::Scene;
use crate::harness::traffic::loaded;
use crate::harness::{Postgres, Stop, eventually};
use nix::sys::signal::Signal;
use prefetchd::checkpoint::{Checkpoint, TableState};
use prefetchd::lsn::EndLsn;
use rand::Rng;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};
use tokio::time::{sleep, timeout};

/// What a daemon was doing when it was killed.
fn at_work(checkpoint: Option<&Checkpoint>) -> &'static str {
    let Some(checkpoint) = checkpoint else { return "no checkpoint" };
    let any = |state| checkpoint.tables.values().any(|t| t.state == state);
    match () {
        () if any(TableState::Loading) => "loading",
        () if any(TableState::Healing) => "healing",
        () if any(TableState::Incomplete) => "incomplete",
        () => "streaming",
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kill_9_at_any_moment_thirty_times() {
    let mut scene = Scene::busy(Postgres::shared(), 6_000).await;
    let mut killed: BTreeMap<&str, usize> = BTreeMap::new();
    for round in 0..30 {
        match round {
            // Lost while no daemon runs.
            10 | 16 => scene.watcher.flush(&scene.redis).await,
            13 => scene.redis.command(&["DEL", &scene.checkpoint_key()]).await,
            18 | 24 => scene.postgres.drop_slot().await,
            _ => {}
        }
        let short = scene.rng.random_bool(0.5);
        let life = Duration::from_millis(scene.rng.random_range(5..=if short { 300 } else { 1_500 }));
        let from = if round % 3 == 2 {
            // Starts from a complete copy.
            let daemon = scene.daemon().await;
            loaded(&daemon).await;
            match round {
                20 => scene.watcher.flush(&scene.redis).await,
                23 | 26 => scene.redis.command(&["DEL", &scene.checkpoint_key()]).await,
                _ => {}
            }
            sleep(life).await;
            daemon.kill9();
            "loaded"
        } else {
            let began = Instant::now();
            // A daemon that is not up by then is dropped, and thereby killed.
            if let Ok(daemon) = timeout(life, scene.daemon()).await {
                sleep(life.saturating_sub(began.elapsed())).await;
                daemon.kill9();
            }
            "its start"
        };
        let at = at_work(scene.checkpoint().await.as_ref());
        println!("round {round}: killed {life:?} after {from}; the checkpoint says: {at}");
        *killed.entry(at).or_default() += 1;
        scene.watcher.check().await;
    }
    println!("{killed:?}");
    let daemon = scene.daemon().await;
    loaded(&daemon).await;
    scene.ends(daemon).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kill_9_in_the_middle_of_a_load() {
    let scene = Scene::busy(Postgres::shared(), 12_000).await;
    let mut hits = 0;
    for round in 0..6 {
        if round == 3 {
            scene.watcher.flush(&scene.redis).await;
        }
        let daemon = scene.daemon().await;
        let begun = |s: &serde_json::Value| s["tables"][0]["prefetched"].as_u64() > Some(0);
        daemon.status_when("some rows are loaded", begun).await;
        daemon.kill9();
        hits += usize::from(matches!(at_work(scene.checkpoint().await.as_ref()), "loading" | "healing"));
        scene.watcher.check().await;
    }
    assert!(hits >= 3, "only {hits} of 6 were killed in mid-load");
    let daemon = scene.daemon().await;
    loaded(&daemon).await;
    scene.ends(daemon).await;
}

/// A transaction over the atomic limits is applied in parts, and no part twice: rows that it changes several times
/// would go back to an earlier state.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kill_9_in_the_middle_of_a_huge_transaction() {
    const ROWS: u64 = 4_000;
    const HITS: usize = 4;
    let mut scene = Scene::busy(Postgres::shared(), ROWS).await;
    scene.settings = scene.settings.set("cache.max_atomic_changes", "500");
    let mut daemon = scene.daemon().await;
    loaded(&daemon).await;
    let passes = "UPDATE items SET body = md5(random()::text) WHERE id < 1000;".repeat(32);
    let huge = format!("BEGIN; LOCK TABLE items IN SHARE ROW EXCLUSIVE MODE; {passes} COMMIT");
    let deadline = Instant::now() + Duration::from_secs(120);
    let mut hits = 0;
    while hits < HITS {
        assert!(Instant::now() < deadline, "only {hits} kills in the middle");
        let end = EndLsn(scene.postgres.execute(&huge).await);
        let in_the_middle = |c: &Checkpoint| c.within.is_some_and(|w| w.changes_done > 2_000);
        let seen = async || scene.checkpoint().await.unwrap();
        eventually("it is being applied", seen, |c| in_the_middle(c) || c.lsn >= end).await;
        daemon.kill9();
        let checkpoint = scene.checkpoint().await.unwrap();
        if let Some(within) = checkpoint.within {
            println!("killed when {} changes were applied", within.changes_done);
            hits += 1;
        }
        daemon = scene.daemon().await;
        daemon.applied(end.0).await;
        scene.watcher.check().await;
    }
    scene.ends(daemon).await;
}

/// The slot's confirmed position may be older afterwards. What is redelivered has no effect.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn postgres_crashes_in_mid_stream() {
    let mut scene = Scene::busy(Postgres::own(&[]), 4_000).await;
    let daemon = scene.daemon().await;
    loaded(&daemon).await;
    for _ in 0..3 {
        scene.more_is_written(500).await;
        scene.postgres.restart(Stop::Immediate);
        scene.watcher.check().await;
    }
    assert_eq!(daemon.said("loading "), 3, "once for each table, at the start:\n{}", daemon.log_text());
    scene.ends(daemon).await;
}

/// A walsender delays a shutdown until its client has confirmed everything.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn postgres_shuts_down_promptly_in_mid_stream() {
    let mut scene = Scene::busy(Postgres::own(&[]), 4_000).await;
    let daemon = scene.daemon().await;
    loaded(&daemon).await;
    for _ in 0..2 {
        scene.more_is_written(500).await;
        let began = Instant::now();
        scene.postgres.stop(Stop::Fast);
        let took = began.elapsed();
        println!("a fast shutdown took {took:?}");
        assert!(took < Duration::from_secs(10), "{took:?}\n{}", daemon.log_text());
        scene.postgres.start_again();
    }
    scene.ends(daemon).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn redis_cuts_the_connections_in_mid_write() {
    let scene = Scene::busy(Postgres::shared(), 4_000).await;
    let daemon = scene.daemon().await;
    daemon.allow_warning("stalled");
    loaded(&daemon).await;
    for _ in 0..4 {
        let before = scene.checkpoint().await.unwrap();
        eventually("it writes", async || scene.checkpoint().await.unwrap().seq, |seq| *seq > before.seq + 10).await;
        scene.redis.cut_writers().await;
        let epoch = async || scene.checkpoint().await.unwrap().epoch;
        eventually("a new session", epoch, |epoch| *epoch > before.epoch).await;
        scene.watcher.check().await;
    }
    scene.ends(daemon).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn redis_freezes_under_writes() {
    let scene = Scene::busy(Postgres::shared(), 4_000).await;
    let daemon = scene.daemon().await;
    daemon.allow_warning("stalled");
    loaded(&daemon).await;
    scene.redis.signal(Signal::SIGSTOP);
    // Not waiting for anything: this is the time during which it must work.
    sleep(Duration::from_secs(3)).await;
    scene.redis.signal(Signal::SIGCONT);
    scene.ends(daemon).await;
}
