//! `redis.durability = "aof"`: a change is confirmed to Postgres only once Redis has it on disk.
//!
//! Skipped on a server without WAITAOF. With `appendfsync everysec`, Redis before 8 and Valkey answer WAITAOF up to a
//! second before the fsync; there, tests that would notice use `always` only.

use crate::harness::scene::Scene;
use crate::harness::traffic::loaded;
use crate::harness::{Daemon, Feature, Postgres, Redis, Settings, eventually};
use prefetchd::lsn::Lsn;
use serde_json::Value;
use std::fs::File;
use std::path::PathBuf;
use std::time::{Duration, Instant};

const FIRST: &str = "cache:category:cat-001";
const WAITS: &str = "redis has not fsynced its append-only file yet";

fn redis(appendfsync: &str) -> Redis {
    Redis::with(&["--appendonly", "yes", "--appendfsync", appendfsync])
}

fn settings(postgres: &Postgres, redis: &Redis) -> Settings {
    Settings::new(postgres, redis).text("redis.durability", "aof")
}

/// The values of appendfsync with which WAITAOF answers only after the fsync.
pub async fn exact_policies() -> Vec<&'static str> {
    if Redis::lacks(Feature::WaitAof).await {
        return Vec::new();
    }
    if Redis::lacks(Feature::WaitAofEverysec).await {
        return vec!["always"];
    }
    vec!["everysec", "always"]
}

/// Prevents fsyncs from now on, although the file is written: Redis saves a dump meanwhile, which takes several
/// seconds.
pub async fn hold_fsync(redis: &Redis) {
    redis.command::<()>(&["CONFIG", "SET", "no-appendfsync-on-rewrite", "yes"]).await;
    redis.command::<()>(&["CONFIG", "SET", "rdb-key-save-delay", "2000000"]).await;
    redis.command::<()>(&["BGSAVE"]).await;
}

pub async fn release_fsync(redis: &Redis) {
    redis.command::<()>(&["CONFIG", "SET", "no-appendfsync-on-rewrite", "no"]).await;
}

/// The part of the append-only file that is being written.
fn file(redis: &Redis) -> PathBuf {
    let parts = std::fs::read_dir(redis.dir().join("appendonlydir")).unwrap().map(|part| part.unwrap().path());
    parts.filter(|part| part.to_string_lossy().contains(".incr.")).max().unwrap()
}

async fn confirms(postgres: &Postgres, lsn: Lsn) {
    eventually(&format!("{lsn} is confirmed"), async || postgres.confirmed().await, |at| *at >= lsn).await;
}

async fn rename(postgres: &Postgres, name: &str) -> Lsn {
    postgres.execute(&format!("UPDATE categories SET name = '{name}' WHERE id = 'cat-001'")).await
}

#[tokio::test]
async fn a_change_is_confirmed_only_when_it_is_on_disk() {
    for policy in exact_policies().await {
        let (postgres, redis) = (Postgres::shared(), redis(policy));
        let daemon = Daemon::with(&settings(&postgres, &redis)).await;
        daemon.allow_warning("stalled");
        daemon.ready().await;

        hold_fsync(&redis).await;
        let lsn = rename(&postgres, "Drinks").await;
        daemon.applied(lsn).await;
        assert_eq!(redis.hash(FIRST).await["name"], "Drinks", "readers need not wait");
        let stalled = daemon.status_when("stalled", |status| status["state"] == "stalled").await;
        assert!(stalled["waiting_for"].as_str().unwrap().contains(WAITS), "{policy}: {stalled}");
        assert_eq!(daemon.get("/readyz").await.status, 503);
        assert!(postgres.confirmed().await < lsn, "{policy}");

        release_fsync(&redis).await;
        confirms(&postgres, lsn).await;
        daemon.ready().await;
        // Stopping confirms what was applied, here too.
        let lsn = rename(&postgres, "Beverages").await;
        daemon.applied(lsn).await;
        assert_eq!(daemon.stop().await, Some(0));
        assert!(postgres.confirmed().await >= lsn, "{policy}");
    }
}

/// The machine of Redis crashes, so only what was fsynced is left of the file. Postgres still has the rest.
#[tokio::test]
async fn what_a_crash_takes_from_the_file_is_sent_again() {
    for policy in exact_policies().await {
        let (postgres, mut redis) = (Postgres::shared(), redis(policy));
        let daemon = Daemon::with(&settings(&postgres, &redis)).await;
        daemon.allow_warnings();
        daemon.ready().await;

        hold_fsync(&redis).await;
        let fsynced_at_most = file(&redis).metadata().unwrap().len();
        let lsn = rename(&postgres, "Drinks").await;
        daemon.applied(lsn).await;
        daemon.status_when("stalled", |status| status["state"] == "stalled").await;
        redis.kill();
        File::options().write(true).open(file(&redis)).unwrap().set_len(fsynced_at_most).unwrap();
        redis.start_again();
        assert_eq!(redis.hash(FIRST).await["name"], "Beverages", "{policy}: the crash took it");

        let found = async || redis.hash(FIRST).await["name"].clone();
        eventually("it is sent again", found, |name| name == "Drinks").await;
        confirms(&postgres, lsn).await;
        daemon.ready().await;
        assert_eq!(daemon.status().await["primary_reads"], 1, "{policy}: nothing is loaded again");
        assert_eq!(daemon.stop().await, Some(0));
    }
}

/// Redis crashes, but not its machine: everything written to the file is kept, fsynced or not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crash_of_redis_loses_nothing_that_postgres_was_told_is_safe() {
    if Redis::lacks(Feature::WaitAof).await {
        return;
    }
    for policy in ["everysec", "always"] {
        let mut scene = Scene::quiet(Postgres::shared(), redis(policy), 500).await;
        scene.settings = scene.settings.text("redis.durability", "aof");
        let daemon = scene.daemon().await;
        daemon.allow_warning("stalled");
        loaded(&daemon).await;
        scene.write();
        for _ in 0..4 {
            scene.more_is_written(200).await;
            let confirmed = scene.postgres.confirmed().await;
            eventually("more is confirmed", async || scene.postgres.confirmed().await, |at| *at > confirmed).await;
            let _eyes = scene.watcher.blind().await;
            scene.redis.kill();
            // Redis cannot write now, so nothing more is confirmed.
            let confirmed = scene.postgres.confirmed().await;
            scene.redis.start_again();
            let kept = scene.checkpoint().await.unwrap().lsn.0;
            assert!(kept >= confirmed, "{policy}: redis has {kept}, postgres was told {confirmed}");
        }
        let loads = daemon.status().await["primary_reads"].as_u64();
        scene.is_whole(&daemon).await;
        assert_eq!(daemon.status().await["primary_reads"].as_u64(), loads);
        assert_eq!(daemon.said("loading "), 3, "once for each table, at the start:\n{}", daemon.log_text());
        scene.ends(daemon).await;
    }
}

#[tokio::test]
async fn an_fsync_every_second_is_no_stall() {
    if Redis::lacks(Feature::WaitAof).await {
        return;
    }
    let (postgres, redis) = (Postgres::shared(), redis("everysec"));
    let daemon = Daemon::with(&settings(&postgres, &redis)).await;
    daemon.ready().await;
    let until = Instant::now() + Duration::from_secs(8);
    for n in 0.. {
        let lsn = rename(&postgres, &format!("name {n}")).await;
        daemon.applied(lsn).await;
        let status = daemon.status().await;
        assert_eq!(status["state"], "streaming", "{status}\n{}", daemon.log_text());
        if Instant::now() > until {
            break;
        }
    }
    assert_eq!(daemon.stop().await, Some(0));
}

#[tokio::test]
async fn a_file_that_is_turned_off_is_named_until_it_is_on_again() {
    if Redis::lacks(Feature::WaitAof).await {
        return;
    }
    let (postgres, redis) = (Postgres::shared(), redis("always"));
    let daemon = Daemon::with(&settings(&postgres, &redis)).await;
    daemon.allow_warnings();
    daemon.ready().await;
    redis.command::<()>(&["CONFIG", "SET", "appendonly", "no"]).await;
    let lsn = rename(&postgres, "Drinks").await;
    let names_it =
        |status: &Value| status["waiting_for"].as_str().is_some_and(|what| what.contains("append-only file is off"));
    daemon.status_when("it says so", names_it).await;
    assert!(postgres.confirmed().await < lsn);
    redis.command::<()>(&["CONFIG", "SET", "appendonly", "yes"]).await;
    confirms(&postgres, lsn).await;
    daemon.ready().await;
    assert_eq!(redis.hash(FIRST).await["name"], "Drinks");
    assert_eq!(daemon.status().await["primary_reads"], 1);
    assert_eq!(daemon.stop().await, Some(0));
}
