//! Several daemons with one slot: one is active, the others serve reads just as well, and one of them takes over.

use crate::harness::{Daemon, Postgres, Redis, Settings, eventually};
use nix::sys::signal::Signal;
use serde_json::json;
use std::time::Instant;

const FIRST: &str = "cache:category:cat-001";
const ROW: &str = "/v1/tables/categories/cat-001";
const NOBODY: &str = "/v1/tables/categories/nobody";

async fn is_standby(daemon: &Daemon) {
    daemon.status_when("standby", |status| status["state"] == "standby").await;
}

async fn rename(postgres: &Postgres, name: &str) -> prefetchd::lsn::Lsn {
    postgres.execute(&format!("UPDATE categories SET name = '{name}' WHERE id = 'cat-001'")).await
}

#[tokio::test]
async fn a_standby_answers_as_the_active_one_does() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let settings = Settings::new(&postgres, &redis);
    let first = Daemon::with(&settings).await;
    first.ready().await;
    let second = Daemon::with(&settings).await;
    is_standby(&second).await;
    second.ready().await;
    let status = second.status().await;
    assert!(status["waiting_for"].as_str().unwrap().contains("pid"), "{status}");
    assert_eq!((&status["tables"][0]["loaded"], &status["primary_reads"]), (&json!(true), &json!(0)));
    for n in 0..20 {
        let lsn = rename(&postgres, &format!("version {n}")).await;
        // The position after the commit, as an application asks for it.
        let answer = second.get(&format!("{ROW}?min_lsn={lsn}&wait=30s")).await;
        assert_eq!((answer.status, &answer.json()["name"]), (200, &json!(format!("version {n}"))), "{answer:?}");
        assert!(answer.header("prefetchd-lsn").unwrap().parse::<prefetchd::lsn::Lsn>().unwrap() >= lsn);
        assert_eq!(answer.header("age"), Some("0"));
    }
    let idle = postgres.position().await;
    assert_eq!(second.get(&format!("{NOBODY}?min_lsn={idle}&wait=30s")).await.refusal(), (404, "not_found".to_owned()));
    let answer = second.operate("refetch", &json!({})).await;
    assert_eq!(answer.refusal(), (503, "unavailable".to_owned()));
    assert!(answer.body.contains("standby"), "{answer:?}");
    assert_eq!(second.operate("pause", &json!({})).await.status, 503);

    // What the active daemon says about its tables applies here, too.
    first.operate("invalidate", &json!({"table": "categories", "keys": ["cat-001"]})).await;
    assert_eq!(second.get(ROW).await.refusal(), (503, "incomplete".to_owned()));
    first.operate("refetch", &json!({})).await;
    assert_eq!(second.get(ROW).await.status, 200);
    assert_eq!(second.stop().await, Some(0));
    assert_eq!(first.stop().await, Some(0));
}

#[tokio::test]
async fn a_standby_takes_over_when_the_active_one_is_gone() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let settings = Settings::new(&postgres, &redis);
    let mut active = Daemon::with(&settings).await;
    active.ready().await;
    for n in 0..3 {
        let standby = Daemon::with(&settings).await;
        is_standby(&standby).await;
        active.kill9();
        let killed = Instant::now();
        let lsn = rename(&postgres, &format!("after kill {n}")).await;
        standby.applied(lsn).await;
        println!("a change after kill -9 was applied {} ms later", killed.elapsed().as_millis());
        assert_eq!(redis.hash(FIRST).await["name"], format!("after kill {n}"));
        assert_eq!(standby.status().await["primary_reads"], 0, "nothing is loaded again");
        standby.ready().await;
        active = standby;
    }
    assert_eq!(active.stop().await, Some(0));
}

#[tokio::test]
async fn a_standby_takes_over_from_one_that_hangs_and_the_other_notices_when_it_wakes_up() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let settings = Settings::new(&postgres, &redis).timing("hangs=5s");
    let first = Daemon::with(&settings).await;
    first.ready().await;
    let second = Daemon::with(&settings).await;
    is_standby(&second).await;
    second.allow_warning("the daemon that holds the slot hangs");
    first.allow_warnings();
    first.signal(Signal::SIGSTOP);
    let stopped = Instant::now();
    let lsn = rename(&postgres, "by the second").await;
    second.applied(lsn).await;
    println!("a change after SIGSTOP was applied {} ms later", stopped.elapsed().as_millis());
    first.signal(Signal::SIGCONT);
    is_standby(&first).await;
    let epoch = |text: String| serde_json::from_str::<serde_json::Value>(&text).unwrap()["epoch"].as_u64().unwrap();
    let key = format!("prefetchd:{{{}}}:checkpoint", postgres.slot());
    let before = epoch(redis.command::<String>(&["GET", &key]).await);
    let lsn = rename(&postgres, "once more").await;
    second.applied(lsn).await;
    assert_eq!(redis.hash(FIRST).await["name"], "once more");
    first.ready().await;
    assert_eq!(epoch(redis.command::<String>(&["GET", &key]).await), before, "nobody took over again");
    assert_eq!(first.get(ROW).await.json()["name"], "once more");
}

#[tokio::test]
async fn of_daemons_that_start_at_once_one_works() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let settings = Settings::new(&postgres, &redis);
    let (a, b, c) = tokio::join!(Daemon::with(&settings), Daemon::with(&settings), Daemon::with(&settings));
    let all = [a, b, c];
    all.iter().for_each(Daemon::allow_warnings);
    for daemon in &all {
        daemon.ready().await;
    }
    let works = async || {
        let mut states = Vec::new();
        for daemon in &all {
            states.push(daemon.status().await["state"].as_str().unwrap().to_owned());
        }
        states.sort();
        states
    };
    eventually("one works", works, |states| *states == ["standby", "standby", "streaming"]).await;
    let lsn = rename(&postgres, "by one").await;
    for daemon in &all {
        let answer = daemon.get(&format!("{ROW}?min_lsn={lsn}&wait=30s")).await;
        assert_eq!(answer.json()["name"], "by one");
    }
}

/// A slot that another program reads is left alone, whatever Redis has.
#[tokio::test]
async fn a_stranger_on_the_slot_is_not_ended() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let settings = Settings::new(&postgres, &redis).timing("hangs=3s");
    let daemon = Daemon::with(&settings).await;
    daemon.ready().await;
    assert_eq!(daemon.stop().await, Some(0));
    let client = postgres.client().await;
    let mut stranger = std::process::Command::new("pg_recvlogical")
        .env("PGPASSWORD", prefetchd::cli::servers::postgres_password())
        .args(["-d", &postgres.bare_url("prefetchd"), "--slot", &postgres.slot(), "--start", "-f", "/dev/null"])
        .args(["-o", "proto_version=1", "-o", "publication_names=prefetchd"])
        .spawn()
        .unwrap();
    let held = format!("SELECT active_pid FROM pg_replication_slots WHERE slot_name = '{}'", postgres.slot());
    let holder = async || client.query_one(&held, &[]).await.unwrap().get::<_, Option<i32>>(0);
    let pid = eventually("held", holder, Option::is_some).await;
    let daemon = Daemon::with(&settings).await;
    // The other program consumes what Redis does not get.
    daemon.allow_warning("loading every table again");
    is_standby(&daemon).await;
    // The time after which a daemon of ours counts as hung.
    let until = Instant::now() + std::time::Duration::from_secs(5);
    eventually("time passes", async || Instant::now(), |now| *now > until).await;
    assert_eq!(holder().await, pid);
    stranger.kill().unwrap();
    stranger.wait().unwrap();
    daemon.status_when("streams", |status| status["state"] == "streaming").await;
}
