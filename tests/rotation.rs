//! Passwords that change while daemons run: with the new password in a file, everything continues without help.

use crate::harness::{Daemon, Postgres, Redis, Settings, psql};
use serde_json::{Value, json};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

const ROW: &str = "/v1/tables/categories/cat-001";

fn stalled_by<'a>(word: &'a str) -> impl Fn(&Value) -> bool + 'a {
    move |status| status["waiting_for"].as_str().is_some_and(|waiting| waiting.contains(word))
}

/// A Postgres in which the password of the daemon's role is `one`.
fn guarded() -> Postgres {
    let postgres = Postgres::own(&[]);
    psql(&postgres.url("postgres"), "ALTER ROLE prefetchd PASSWORD 'one'");
    postgres
}

/// Without a password in the URL.
fn settings(postgres: &Postgres, redis: &Redis) -> Settings {
    Settings::new(postgres, redis).text("postgres.url", &postgres.bare_url("prefetchd"))
}

fn end_connections(postgres: &Postgres) {
    let sql = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'prefetchd'";
    psql(&postgres.url("postgres"), sql);
}

/// As tools for secret rotation do: the file is replaced, not overwritten.
fn replace(file: &Path, text: &str) {
    let new = file.with_extension("new");
    std::fs::write(&new, text).unwrap();
    std::fs::set_permissions(&new, std::fs::Permissions::from_mode(0o600)).unwrap();
    std::fs::rename(new, file).unwrap();
}

/// One active daemon and one standby, while first the password in Postgres and then the one in the file changes.
async fn survive(settings: &Settings, postgres: &Postgres, file: &Path, line: impl Fn(&str) -> String) {
    let first = Daemon::with(settings).await;
    first.ready().await;
    let second = Daemon::with(settings).await;
    second.status_when("standby", |status| status["state"] == "standby").await;
    let both = [&first, &second];
    both.iter().for_each(|daemon| daemon.allow_warnings());

    // The server first: the old password is rejected.
    psql(&postgres.url("postgres"), "ALTER ROLE prefetchd PASSWORD 'two'");
    end_connections(postgres);
    for daemon in both {
        daemon.status_when("refused", stalled_by("password")).await;
        assert_eq!(daemon.get(ROW).await.status, 200, "what is there is served");
    }
    replace(file, &line("two"));
    for daemon in both {
        daemon.ready().await;
    }
    // The file first.
    replace(file, &line("three"));
    psql(&postgres.url("postgres"), "ALTER ROLE prefetchd PASSWORD 'three'");
    end_connections(postgres);
    let lsn = postgres.execute("UPDATE categories SET name = 'rotated' WHERE id = 'cat-001'").await;
    for daemon in both {
        let answer = daemon.get(&format!("{ROW}?min_lsn={lsn}&wait=30s")).await;
        assert_eq!((answer.status, &answer.json()["name"]), (200, &json!("rotated")), "{answer:?}");
    }
    for daemon in both {
        daemon.ready().await;
        let log = daemon.log_text();
        assert!(!["one", "two", "three"].iter().any(|word| log.contains(&format!("\"{word}\""))), "{log}");
    }
}

#[tokio::test]
async fn the_password_file_of_postgres_is_read_for_every_connection() {
    let postgres = guarded();
    let (redis, dir) = (Redis::start(), tempfile::tempdir().unwrap());
    let file = dir.path().join("password");
    replace(&file, "one\n");
    let settings = settings(&postgres, &redis).text("postgres.password_file", file.to_str().unwrap());
    survive(&settings, &postgres, &file, |password| format!("{password}\n")).await;
}

#[tokio::test]
async fn the_password_file_of_libpq_is_read_for_every_connection() {
    let postgres = guarded();
    let (redis, dir) = (Redis::start(), tempfile::tempdir().unwrap());
    let file = dir.path().join("pgpass");
    replace(&file, "*:*:*:prefetchd:one\n");
    let settings = settings(&postgres, &redis).env("PGPASSFILE", file.to_str().unwrap());
    survive(&settings, &postgres, &file, |password| format!("*:*:*:prefetchd:{password}\n")).await;
}

#[tokio::test]
async fn a_password_file_that_is_gone_for_a_while_ends_no_daemon() {
    let postgres = guarded();
    let (redis, dir) = (Redis::start(), tempfile::tempdir().unwrap());
    let file = dir.path().join("password");
    replace(&file, "one");
    let settings = settings(&postgres, &redis).text("postgres.password_file", file.to_str().unwrap());
    let daemon = Daemon::with(&settings).await;
    daemon.ready().await;
    daemon.allow_warnings();
    std::fs::remove_file(&file).unwrap();
    end_connections(&postgres);
    let status = daemon.status_when("without the file", stalled_by("cannot be read")).await;
    assert!(status["waiting_for"].as_str().unwrap().contains(file.to_str().unwrap()), "{status}");
    replace(&file, "one");
    daemon.ready().await;
    std::fs::remove_file(&file).unwrap();
    // At startup it is an error.
    let (code, said) = Daemon::refused(&settings);
    assert!(code == Some(78) && said.contains("postgres.password_file"), "{code:?} {said}");
}

#[tokio::test]
async fn the_password_file_of_redis_is_read_for_every_connection() {
    let (postgres, redis, dir) = (Postgres::shared(), Redis::start(), tempfile::tempdir().unwrap());
    let file = dir.path().join("password");
    let login = redis.login();
    let (user, password) = login.split_once(':').unwrap();
    replace(&file, password);
    let url = redis.bare_url().replace("redis://", &format!("redis://{user}@"));
    let settings =
        Settings::new(&postgres, &redis).text("redis.url", &url).text("redis.password_file", file.to_str().unwrap());
    let first = Daemon::with(&settings).await;
    first.ready().await;
    let second = Daemon::with(&settings).await;
    second.status_when("standby", |status| status["state"] == "standby").await;
    let both = [&first, &second];
    both.iter().for_each(|daemon| daemon.allow_warnings());
    assert_eq!(second.get(ROW).await.status, 200);

    redis.command::<()>(&["ACL", "SETUSER", user, "resetpass", ">two"]).await;
    redis.command::<i64>(&["CLIENT", "KILL", "USER", user]).await;
    first.status_when("refused", stalled_by("WRONGPASS")).await;
    assert_eq!([first.get(ROW).await.status, second.get(ROW).await.status], [503; 2]);
    replace(&file, "two\n");
    for daemon in both {
        daemon.ready().await;
        assert_eq!(daemon.get(ROW).await.status, 200);
    }

    // The file first: only connections that are opened anew notice.
    replace(&file, "three");
    redis.command::<()>(&["ACL", "SETUSER", user, "resetpass", ">three"]).await;
    redis.command::<i64>(&["CLIENT", "KILL", "USER", user]).await;
    let lsn = postgres.execute("UPDATE categories SET name = 'rotated' WHERE id = 'cat-001'").await;
    for daemon in both {
        let answer = daemon.get(&format!("{ROW}?min_lsn={lsn}&wait=30s")).await;
        assert_eq!((answer.status, &answer.json()["name"]), (200, &json!("rotated")), "{answer:?}");
    }
    assert_eq!(first.status().await["primary_reads"], 1);
}
