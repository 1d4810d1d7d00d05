//! Passwords that change while daemons run: with the new password in a file, or printed by a program, everything continues
//! without help.

use crate::harness::scene::Scene;
use crate::harness::watcher::HttpWatcher;
use crate::harness::{Cluster, Daemon, Postgres, Redis, Settings, psql, run_program};
use prefetchd::cli::servers::redis_password;
use serde_json::{Value, json};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

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

/// Without a password in the URL, whose user has this one.
fn redis_settings(postgres: &Postgres, redis: &Redis) -> (Settings, String, String) {
    let login = redis.login();
    let (user, password) = login.split_once(':').unwrap();
    let url = redis.bare_url().replace("redis://", &format!("redis://{user}@"));
    (Settings::new(postgres, redis).text("redis.url", &url), user.to_owned(), password.to_owned())
}

async fn set_redis_password(redis: &Redis, user: &str, password: &str) {
    redis.command::<()>(&["ACL", "SETUSER", user, "resetpass", &format!(">{password}")]).await;
    redis.command::<i64>(&["CLIENT", "KILL", "USER", user]).await;
}

async fn survive_in_redis(settings: &Settings, postgres: &Postgres, redis: &Redis, user: &str, file: &Path) {
    let first = Daemon::with(settings).await;
    first.ready().await;
    let second = Daemon::with(settings).await;
    second.status_when("standby", |status| status["state"] == "standby").await;
    let both = [&first, &second];
    both.iter().for_each(|daemon| daemon.allow_warnings());
    assert_eq!(second.get(ROW).await.status, 200);

    set_redis_password(redis, user, "two").await;
    first.status_when("refused", stalled_by("WRONGPASS")).await;
    assert_eq!([first.get(ROW).await.status, second.get(ROW).await.status], [503; 2]);
    replace(file, "two\n");
    for daemon in both {
        daemon.ready().await;
        assert_eq!(daemon.get(ROW).await.status, 200);
    }

    // The file first: only connections that are opened anew notice.
    replace(file, "three");
    set_redis_password(redis, user, "three").await;
    let lsn = postgres.execute("UPDATE categories SET name = 'rotated' WHERE id = 'cat-001'").await;
    for daemon in both {
        let answer = daemon.get(&format!("{ROW}?min_lsn={lsn}&wait=30s")).await;
        assert_eq!((answer.status, &answer.json()["name"]), (200, &json!("rotated")), "{answer:?}");
    }
    assert_eq!(first.status().await["primary_reads"], 1);
}

#[tokio::test]
async fn the_password_file_of_redis_is_read_for_every_connection() {
    let (postgres, redis, dir) = (Postgres::shared(), Redis::start(), tempfile::tempdir().unwrap());
    let file = dir.path().join("password");
    let (settings, user, password) = redis_settings(&postgres, &redis);
    replace(&file, &password);
    let settings = settings.text("redis.password_file", file.to_str().unwrap());
    survive_in_redis(&settings, &postgres, &redis, &user, &file).await;
}

/// A file whose name a shell would not leave as it is.
fn unwieldy(dir: &Path) -> PathBuf {
    dir.join("it's $HOME; `id` > \"x\" & *")
}

/// A command that prints a file, in TOML.
fn prints(file: &Path) -> String {
    Value::from(vec!["cat", file.to_str().unwrap()]).to_string()
}

#[tokio::test]
async fn the_password_command_of_postgres_runs_for_every_connection() {
    let postgres = guarded();
    let (redis, dir) = (Redis::start(), tempfile::tempdir().unwrap());
    let file = unwieldy(dir.path());
    replace(&file, "one\n");
    let settings = settings(&postgres, &redis).set("postgres.password_command", &prints(&file));
    survive(&settings, &postgres, &file, |password| format!("{password}\nand more\n")).await;
    // The other commands use it, too.
    let ran = run_program(&settings, &["config"]).await;
    let line = format!("password_command = [\"cat\", {}]", Value::from(file.to_str().unwrap()));
    assert!(ran.code == Some(0) && ran.stdout.lines().any(|shown| shown == line), "{line} in {ran:?}");
    let ran = run_program(&settings, &["check"]).await;
    assert!(ran.code == Some(0) && !ran.said().contains("three"), "{ran:?}");
    let ran = run_program(&settings, &["teardown"]).await;
    assert!(ran.code == Some(0) && !ran.said().contains("three"), "{ran:?}");
}

#[tokio::test]
async fn the_password_command_of_redis_runs_for_every_connection() {
    let (postgres, redis, dir) = (Postgres::shared(), Redis::start(), tempfile::tempdir().unwrap());
    let file = unwieldy(dir.path());
    let (settings, user, password) = redis_settings(&postgres, &redis);
    replace(&file, &password);
    let settings = settings.set("redis.password_command", &prints(&file));
    survive_in_redis(&settings, &postgres, &redis, &user, &file).await;
    for command in ["check", "teardown"] {
        let ran = run_program(&settings, &[command]).await;
        assert!(ran.code == Some(0) && !ran.said().contains("three"), "{ran:?}");
    }
}

/// Both passwords change several times under load, each time in another order. Readers of Redis and of both daemons see
/// nothing lost, backward, torn or missing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn passwords_are_rotated_while_rows_are_written_and_read() {
    let mut scene = Scene::quiet(guarded(), Redis::start(), 2_000).await;
    let dir = tempfile::tempdir().unwrap();
    let (of_postgres, of_redis) = (dir.path().join("postgres"), dir.path().join("redis"));
    let (with_user, user, password) = redis_settings(&scene.postgres, &scene.redis);
    replace(&of_postgres, "one");
    replace(&of_redis, &password);
    scene.settings = with_user
        .tables(scene.settings.tables_toml())
        .text("postgres.url", &scene.postgres.bare_url("prefetchd"))
        .set("postgres.password_command", &prints(&of_postgres))
        .set("redis.password_command", &prints(&of_redis));
    scene.write();
    let daemons = [scene.daemon().await, scene.daemon().await];
    let http = HttpWatcher::start(scene.traffic, 1);
    for daemon in &daemons {
        daemon.allow_warnings();
        daemon.ready().await;
    }
    http.ask(daemons.iter().map(Daemon::address).collect()).await;
    let all_is_well = async || {
        scene.more_is_written(100).await;
        let position = scene.postgres.position().await;
        for daemon in &daemons {
            daemon.applied(position).await;
            daemon.ready().await;
        }
    };
    for round in 0..4 {
        let password = format!("round {round}");
        let in_postgres =
            || psql(&scene.postgres.url("postgres"), &format!("ALTER ROLE prefetchd PASSWORD '{password}'"));
        let server_first = round % 2 == 0;
        if server_first {
            in_postgres();
            end_connections(&scene.postgres);
            scene.more_is_written(100).await;
            replace(&of_postgres, &password);
        } else {
            replace(&of_postgres, &password);
            in_postgres();
            end_connections(&scene.postgres);
        }
        all_is_well().await;

        if server_first {
            set_redis_password(&scene.redis, &user, &password).await;
            scene.more_is_written(100).await;
            replace(&of_redis, &password);
        } else {
            // The old one is good until everybody has the new one.
            scene.redis.command::<()>(&["ACL", "SETUSER", &user, &format!(">{password}")]).await;
            replace(&of_redis, &password);
            scene.redis.command::<i64>(&["CLIENT", "KILL", "USER", &user]).await;
            all_is_well().await;
            set_redis_password(&scene.redis, &user, &password).await;
        }
        all_is_well().await;
    }
    let loads = daemons[0].metrics().await["prefetchd_rows_loaded_total{table=\"items\"}"]
        + daemons[1].metrics().await["prefetchd_rows_loaded_total{table=\"items\"}"];
    assert!(loads <= 2_000.0, "loaded once: {loads}");
    http.stop().await;
    let [first, second] = daemons;
    assert_eq!(second.stop().await, Some(0));
    scene.ends(first).await;
}

#[tokio::test]
async fn the_nodes_of_a_cluster_take_what_the_password_command_prints() {
    let (postgres, cluster, dir) = (Postgres::shared(), Cluster::start().await, tempfile::tempdir().unwrap());
    let file = dir.path().join("password");
    let login = cluster.node(0).login();
    let (user, password) = login.split_once(':').unwrap();
    replace(&file, password);
    let settings = Settings::on_cluster(&postgres, &cluster)
        .text("redis.url", &format!("redis+cluster://{user}@{}", cluster.addresses()))
        .set("redis.password_command", &prints(&file));
    let daemon = Daemon::with(&settings).await;
    daemon.ready().await;
    daemon.allow_warnings();
    for (number, password) in ["two", "three"].into_iter().enumerate() {
        replace(&file, password);
        for node in cluster.nodes() {
            set_redis_password(node, user, password).await;
        }
        let name = format!("rotated {number}");
        let lsn = postgres.execute(&format!("UPDATE categories SET name = '{name}' WHERE id = 'cat-001'")).await;
        daemon.ready().await;
        let answer = daemon.get(&format!("{ROW}?min_lsn={lsn}&wait=30s")).await;
        assert_eq!((answer.status, &answer.json()["name"]), (200, &json!(name)), "{answer:?}");
    }
    assert!(!["\"two\"", "\"three\""].iter().any(|word| daemon.log_text().contains(word)));
    let ran = run_program(&settings, &["check"]).await;
    assert!(ran.code == Some(0) && !ran.said().contains("three"), "{ran:?}");
}

#[tokio::test]
async fn sentinels_take_what_their_password_command_prints() {
    let (postgres, redis, dir) = (Postgres::shared(), Redis::start(), tempfile::tempdir().unwrap());
    let sentinel = Redis::configured(
        &format!(
            "sentinel monitor mymaster 127.0.0.1 {} 1\nsentinel down-after-milliseconds mymaster 60000",
            redis.port()
        ),
        &["--sentinel"],
    );
    let (of_redis, of_sentinel) = (dir.path().join("redis"), dir.path().join("sentinel"));
    let (settings, user, password) = redis_settings(&postgres, &redis);
    replace(&of_redis, &password);
    replace(&of_sentinel, redis_password());
    let settings = settings
        .text("redis.url", &format!("redis+sentinel://{user}@127.0.0.1:{}/mymaster/0", sentinel.port()))
        .set("redis.password_command", &prints(&of_redis))
        .set("redis.sentinel_password_command", &prints(&of_sentinel));
    let daemon = Daemon::with(&settings).await;
    daemon.ready().await;
    daemon.allow_warnings();
    // The Sentinel's first: its new password is not there yet.
    sentinel.command::<()>(&["ACL", "SETUSER", "default", "resetpass", ">four"]).await;
    redis.command::<i64>(&["CLIENT", "KILL", "USER", &user]).await;
    daemon.status_when("refused by the sentinel", stalled_by("WRONGPASS")).await;
    replace(&of_sentinel, "four");
    daemon.ready().await;
    replace(&of_redis, "two");
    set_redis_password(&redis, &user, "two").await;
    let lsn = postgres.execute("UPDATE categories SET name = 'rotated' WHERE id = 'cat-001'").await;
    daemon.applied(lsn).await;
    assert!(!["\"two\"", "four"].iter().any(|word| daemon.log_text().contains(word)), "{}", daemon.log_text());
}

#[tokio::test]
async fn a_password_command_that_fails_or_hangs_ends_no_daemon_and_shows_no_password() {
    let postgres = guarded();
    psql(&postgres.url("postgres"), "ALTER ROLE prefetchd PASSWORD 'hunter2'");
    let (redis, dir) = (Redis::start(), tempfile::tempdir().unwrap());
    let script = dir.path().join("script");
    replace(&script, "echo hunter2");
    let command = Value::from(vec!["/bin/sh", script.to_str().unwrap()]).to_string();
    let settings = settings(&postgres, &redis).set("postgres.password_command", &command);
    let daemon = Daemon::with(&settings).await;
    daemon.ready().await;
    daemon.allow_warnings();
    for (broken, said) in [
        ("echo hunter2; echo 'no service for hunter2' >&2; exit 7", "failed (exit status: 7, no service for …)"),
        ("echo; echo hunter2", "printed no password"),
        ("yes hunter2", "printed more than 64 kB"),
        ("echo hunter2; sleep 60", "did not end within 10s"),
    ] {
        replace(&script, broken);
        end_connections(&postgres);
        let status = daemon.status_when(said, stalled_by(said)).await;
        assert!(status["waiting_for"].as_str().unwrap().contains("postgres.password_command (/bin/sh)"), "{status}");
        assert_eq!(daemon.get(ROW).await.status, 200, "what is there is served");
        if broken.ends_with("exit 7") {
            let ran = run_program(&settings, &["check"]).await;
            assert!(ran.code == Some(1) && ran.stdout.contains(said) && !ran.said().contains("hunter"), "{ran:?}");
        }
        replace(&script, "echo hunter2");
        daemon.ready().await;
    }
    assert!(!daemon.log_text().contains("hunter"), "{}", daemon.log_text());
}

#[tokio::test]
async fn a_password_command_that_is_not_there_is_an_error_at_startup() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let (settings, ..) = redis_settings(&postgres, &redis);
    let settings = settings.set("redis.password_command", "[\"/no/such/program\", \"--token\"]");
    let (code, said) = Daemon::refused(&settings);
    assert!(
        code == Some(78) && said.contains("redis.password_command") && said.contains("/no/such"),
        "{code:?} {said}"
    );
    let ran = run_program(&settings, &["check"]).await;
    assert!(ran.code == Some(78) && ran.said().contains("/no/such/program cannot be started"), "{ran:?}");
}
