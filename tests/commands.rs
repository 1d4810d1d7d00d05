//! The commands other than `run`, in a shell.

use crate::harness::{Daemon, Postgres, Redis, Running, Settings, run_program};
use prefetchd::lsn::Lsn;
use serde_json::Value;
use std::collections::BTreeMap;

async fn daemon_with_settings() -> (Postgres, Redis, Settings, Daemon) {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let settings = Settings::new(&postgres, &redis);
    let daemon = Daemon::with(&settings).await;
    daemon.ready().await;
    (postgres, redis, settings, daemon)
}

#[tokio::test]
async fn status_is_for_people_and_for_programs() {
    let (postgres, _redis, settings, daemon) = daemon_with_settings().await;
    // From http.listen, if it contains a port.
    let here = settings.text("http.listen", &daemon.address().to_string());
    let ran = run_program(&here, &["status"]).await;
    assert_eq!(ran.code, Some(0), "{ran:?}");
    for part in ["streaming", "ready", "categories", "public.categories", postgres.database(), &postgres.slot()] {
        assert!(ran.stdout.contains(part), "{part}: {}", ran.stdout);
    }
    let ran = run_program(&here, &["status", "--json"]).await;
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let status: Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!((&status["state"], &status["tables"][0]["prefetched"]), (&"streaming".into(), &5.into()));
    let url = format!("http://{}", daemon.address());
    let other = Redis::start();
    let elsewhere = Settings::new(&postgres, &other).text("http.listen", "127.0.0.1:1");
    assert_eq!(run_program(&elsewhere, &["status", "--url", &url]).await.code, Some(0));
    let ran = run_program(&elsewhere, &["status"]).await;
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert!(ran.stderr.contains("127.0.0.1:1"), "{ran:?}");
    assert_eq!(daemon.stop().await, Some(0));
    assert_eq!(run_program(&here, &["status", "--json"]).await.code, Some(1));
}

#[tokio::test]
async fn status_of_a_daemon_that_is_not_ready_is_shown_and_is_1() {
    let (postgres, mut redis) = (Postgres::shared(), Redis::start());
    redis.stop();
    let settings = Settings::new(&postgres, &redis);
    let daemon = Daemon::with(&settings).await;
    daemon.status_when("waits", |status| status["waiting_for"].is_string()).await;
    let url = format!("http://{}", daemon.address());
    let ran = run_program(&settings, &["status", "--url", &url]).await;
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert!(ran.stdout.contains("NOT READY") && ran.stdout.contains("connecting"), "{ran:?}");
    // The health check of the image: a restart would not help.
    assert_eq!(run_program(&settings, &["status", "--live", "--url", &url]).await.code, Some(0));
    let ran = run_program(&settings, &["status", "--live", "--url", "http://127.0.0.1:1"]).await;
    assert_eq!(ran.code, Some(1), "{ran:?}");
}

#[tokio::test]
async fn tail_shows_one_line_a_change() {
    let (postgres, _redis, settings, daemon) = daemon_with_settings().await;
    let url = format!("http://{}", daemon.address());
    let mut tail = Running::start(&settings, &["tail", "--table", "categories", "--url", &url]);
    let mut line = Box::pin(tail.line());
    let line = loop {
        let lsn: Lsn = postgres.execute("UPDATE categories SET name = 'x' WHERE id = 'cat-001'").await;
        daemon.applied(lsn).await;
        if let Ok(line) = tokio::time::timeout(std::time::Duration::from_millis(50), &mut line).await {
            break line;
        }
    };
    let words: Vec<&str> = line.split_whitespace().collect();
    assert_eq!(words[1..4], ["categories", "upsert", "cache:category:cat-001"], "{line}");
    assert!(words[4].parse::<f64>().is_ok() && words[5] == "ms", "{line}");
    let ran = run_program(&settings, &["tail", "--table", "nothing", "--url", &url]).await;
    assert_eq!(ran.code, Some(1), "{ran:?}");
}

#[tokio::test]
async fn tail_ends_at_once_where_no_daemon_is() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let settings = Settings::new(&postgres, &redis).text("http.listen", "127.0.0.1:1");
    let ran = run_program(&settings, &["tail"]).await;
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert!(ran.stderr.contains("http://127.0.0.1:1 does not answer"), "{ran:?}");
    assert!(ran.stderr.contains("start the daemon, or say where it is with --url"), "{ran:?}");
}

#[tokio::test]
async fn tail_goes_on_when_the_daemon_comes_back() {
    let (postgres, redis, settings, daemon) = daemon_with_settings().await;
    let (address, url) = (daemon.address().to_string(), format!("http://{}", daemon.address()));
    let mut tail = Running::start(&settings, &["tail", "--json", "--url", &url]);
    let change = async |daemon: &Daemon, tail: &mut Running| {
        let mut line = Box::pin(tail.line());
        loop {
            let lsn: Lsn = postgres.execute("UPDATE categories SET name = 'x' WHERE id = 'cat-001'").await;
            daemon.applied(lsn).await;
            if let Ok(line) = tokio::time::timeout(std::time::Duration::from_millis(50), &mut line).await {
                return line;
            }
        }
    };
    let line: Value = serde_json::from_str(&change(&daemon, &mut tail).await).unwrap();
    assert_eq!((&line["op"], &line["key"]), (&"upsert".into(), &"cache:category:cat-001".into()));
    assert_eq!(daemon.stop().await, Some(0));
    assert!(tail.complaint().await.contains("ended the stream; trying again"));
    let daemon = Daemon::with(&Settings::new(&postgres, &redis).text("http.listen", &address)).await;
    daemon.ready().await;
    let mut said = tail.complaint().await;
    while said.contains("does not answer") {
        said = tail.complaint().await;
    }
    assert!(said.contains("answers again"), "{said}");
    change(&daemon, &mut tail).await;
}

#[tokio::test]
async fn config_shows_what_holds_and_no_secret() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let secret = "s3cr3t-p4ss";
    let settings = Settings::new(&postgres, &redis)
        .text("postgres.url", &format!("postgres://u:{secret}@h/db?sslmode=disable&password={secret}"))
        .env("PREFETCHD__REDIS__URL", &format!("redis://me:{secret}@r:7/3"))
        .env("PREFETCHD__CACHE__TTL", "90m");
    let ran = run_program(&settings, &["config"]).await;
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert!(!ran.said().contains(secret), "{ran:?}");
    for part in ["url = \"postgres://u:***@h/db", "url = \"redis://me:***@r:7/3\"", "ttl = \"90m\"", "null = \"empty\""]
    {
        assert!(ran.stdout.contains(part), "{part}: {}", ran.stdout);
    }
}

#[tokio::test]
async fn the_schema_needs_no_configuration() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    // Not even a good one.
    let settings = Settings::new(&postgres, &redis).text("cache.ttl", "for ever");
    let ran = run_program(&settings, &["config", "--schema"]).await;
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let schema: Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(schema["properties"]["cache"]["properties"]["ttl"]["default"], "24h");
}

#[tokio::test]
async fn shells_and_man_know_every_command() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let settings = Settings::new(&postgres, &redis);
    for shell in ["bash", "zsh", "fish"] {
        let ran = run_program(&settings, &["completions", shell]).await;
        assert_eq!(ran.code, Some(0), "{ran:?}");
        assert!(ran.stdout.contains("teardown") && ran.stdout.contains("adopt"), "{shell}: {}", ran.stdout);
        if shell == "bash" {
            let file = tempfile::NamedTempFile::new().unwrap();
            std::fs::write(&file, &ran.stdout).unwrap();
            assert!(std::process::Command::new("bash").arg("-n").arg(file.path()).status().unwrap().success());
        }
    }
    assert_eq!(run_program(&settings, &["completions", "basic"]).await.code, Some(2));
    let dir = tempfile::tempdir().unwrap();
    let written = async |dir: &str| run_program(&settings, &["man-pages", dir]).await;
    let ran = written(dir.path().to_str().unwrap()).await;
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let page = |name: &str| std::fs::read_to_string(dir.path().join(name)).unwrap();
    assert!(page("prefetchd.1").contains("prefetchd\\-teardown(1)"), "{}", page("prefetchd.1"));
    assert!(page("prefetchd-teardown.1").contains("keys"));
    assert_eq!(written("/nonexistent").await.code, Some(1));
}

#[tokio::test]
async fn check_of_a_good_setup_ends_well_and_changes_nothing() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let settings = Settings::new(&postgres, &redis);
    let ran = run_program(&settings, &["check"]).await;
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert!(
        ran.stdout.lines().all(|line| ["ok  ", "warn", "ready: "].iter().any(|word| line.starts_with(word))),
        "{}",
        ran.stdout
    );
    assert_eq!(redis.keys("*").await, [""; 0]);
    let sql = format!("SELECT count(*) FROM pg_replication_slots WHERE slot_name = '{}'", postgres.slot());
    assert_eq!(postgres.value(&sql).await.as_deref(), Some("0"));

    // Next to a running daemon, which does not notice.
    let daemon = Daemon::with(&settings).await;
    daemon.ready().await;
    for _ in 0..3 {
        let ran = run_program(&settings, &["check"]).await;
        assert_eq!(ran.code, Some(0), "{ran:?}");
    }
    let lsn = postgres.execute("UPDATE categories SET name = 'x' WHERE id = 'cat-001'").await;
    daemon.applied(lsn).await;
    let metrics: BTreeMap<String, f64> = daemon.metrics().await;
    assert_eq!(metrics[r#"prefetchd_reconnects_total{peer="redis"}"#], 0.0);
    assert_eq!(metrics[r#"prefetchd_reconnects_total{peer="postgres"}"#], 0.0);
    assert_eq!(daemon.stop().await, Some(0));
}

#[tokio::test]
async fn check_tells_a_server_that_is_away_from_one_that_is_wrong() {
    let (postgres, mut redis) =
        (Postgres::shared(), Redis::with(&["--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru"]));
    let settings = Settings::new(&postgres, &redis);
    let ran = run_program(&settings, &["check"]).await;
    assert_eq!(ran.code, Some(78), "{ran:?}");
    assert!(ran.stdout.contains("CONFIG SET maxmemory-policy noeviction"), "{ran:?}");
    redis.stop();
    let ran = run_program(&settings, &["check"]).await;
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert!(ran.stdout.contains("fail  redis:"), "{ran:?}");
    let nowhere = Settings::new(&postgres, &redis).text("postgres.url", "postgres://prefetchd@127.0.0.1:1/shop");
    let ran = run_program(&nowhere, &["check"]).await;
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert!(ran.stdout.contains("fail  postgres:"), "{ran:?}");
}

#[tokio::test]
async fn a_wrong_command_line_is_2() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let settings = Settings::new(&postgres, &redis);
    for args in [&["nonsense"][..], &["run", "--nonsense"], &["status", "too", "much"], &["tail", "--table"]] {
        let ran = run_program(&settings, args).await;
        assert_eq!(ran.code, Some(2), "{args:?}: {ran:?}");
        assert!(ran.stdout.is_empty() && ran.stderr.contains("--help"), "{ran:?}");
    }
    for args in [&["--help"][..], &["run", "--help"], &["--version"]] {
        let ran = run_program(&settings, args).await;
        assert!(ran.code == Some(0) && !ran.stdout.is_empty(), "{args:?}: {ran:?}");
    }
}

#[tokio::test]
async fn what_a_failed_command_says_can_be_looked_up() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let settings = Settings::new(&postgres, &redis).text("http.listen", "127.0.0.1:1");
    for (args, code) in [
        (&["status"][..], "daemon-unreachable"),
        (&["pause"], "daemon-unreachable"),
        (&["init", "--postgres", "x", "--redis", "y"], "init-tables"),
    ] {
        let ran = run_program(&settings, args).await;
        assert!(ran.stderr.ends_with(&format!("\n  more: prefetchd explain {code}\n")), "{args:?}: {ran:?}");
        let explained = run_program(&settings, &["explain", code]).await;
        assert!(explained.code == Some(0) && explained.stdout.starts_with(&format!("## {code}\n")), "{explained:?}");
        assert!(explained.stdout.contains("**Remedy.**"), "{explained:?}");
    }
    let all = run_program(&settings, &["explain"]).await;
    assert!(all.code == Some(0) && all.stdout.lines().any(|line| line == "wal-level"), "{all:?}");
    let unknown = run_program(&settings, &["explain", "wal_levl"]).await;
    assert!(unknown.code == Some(2) && unknown.stderr.contains("did you mean wal-level?"), "{unknown:?}");
    let invalid = run_program(&settings.set("cache.ttl", "5"), &["check"]).await;
    assert!(invalid.code == Some(78) && invalid.stdout.ends_with("  #config-value\n"), "{invalid:?}");
}

/// What the daemon refuses has the code of its answer.
#[tokio::test]
async fn a_refused_operation_can_be_looked_up() {
    let (_postgres, _redis, settings, daemon) = daemon_with_settings().await;
    let url = format!("http://{}", daemon.address());
    let ran = run_program(&settings, &["skip", "0/1", "--url", &url]).await;
    assert!(ran.code == Some(1) && ran.stderr.contains("more: prefetchd explain nothing_to_skip"), "{ran:?}");
}
