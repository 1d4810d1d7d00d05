//! `support`: an archive that contains what explains a problem, and nothing that belongs to anybody else.

use crate::harness::{Daemon, Postgres, Ran, Redis, Settings, run_program};
use flate2::read::GzDecoder;
use prefetchd::cli::servers::{postgres_password, redis_password};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

const T: &str = "[[tables]]\nname = 't'\ntable = 'public.t'\nkey = 't:{id}'";

/// The files of an archive, without the directory that they are all in.
fn unpacked(archive: &Path) -> BTreeMap<String, String> {
    let mut tar = tar::Archive::new(GzDecoder::new(std::fs::File::open(archive).unwrap()));
    let mut files = BTreeMap::new();
    for entry in tar.entries().unwrap() {
        let mut entry = entry.unwrap();
        let path = entry.path().unwrap().into_owned();
        assert!(path.parent().unwrap().to_str().unwrap().starts_with("prefetchd-support-"), "{path:?}");
        let mut text = String::new();
        entry.read_to_string(&mut text).unwrap();
        files.insert(path.file_name().unwrap().to_str().unwrap().to_owned(), text);
    }
    files
}

async fn support(settings: &Settings, out: &Path, further: &[&str]) -> Ran {
    let ran = run_program(settings, &[&["support", "--out", out.to_str().unwrap()], further].concat()).await;
    println!("$ prefetchd support\n{}", ran.said());
    ran
}

fn out(redis: &Redis) -> PathBuf {
    redis.dir().join("report.tar.gz")
}

#[tokio::test]
async fn what_explains_a_problem_is_there_and_nothing_of_anybody_else() {
    const TOKEN: &str = "a-t0ken-of-some-length";
    const VALUE: &str = "v4lue-of-somebody";
    const KEY: &str = "k3y-of-somebody";
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let write = |name: &str, text: &str| {
        let path = redis.dir().join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    postgres
        .execute(&format!(
            "CREATE TABLE t (id text PRIMARY KEY, v text); GRANT SELECT ON t TO prefetchd;
             ALTER PUBLICATION prefetchd ADD TABLE t; INSERT INTO t VALUES ('{KEY}', '{VALUE}'), ('{KEY}-large',
             '{VALUE}' || repeat('x', 2000000))"
        ))
        .await;
    redis.command::<()>(&["CONFIG", "SET", "proto-max-bulk-len", "1mb"]).await;
    let settings = Settings::new(&postgres, &redis)
        .tables(T)
        .text("postgres.url", &postgres.bare_url("prefetchd"))
        .text("postgres.password_file", &write("password", postgres_password()))
        .text("redis.url", &redis.daemon_url())
        .text("http.admin_token_file", &write("token", TOKEN))
        .text("log.level", "debug");
    let daemon = Daemon::with(&settings).await;
    daemon.allow_warnings();
    daemon.ready().await;
    let listed = |status: &Value| !status["dead_letter_keys"].as_array().unwrap().is_empty();
    let status = daemon.status_when("a dead letter is listed", listed).await;
    assert!(status.to_string().contains(KEY), "{status}");
    // A message that names a key.
    redis.command::<()>(&["CONFIG", "SET", "maxmemory", "1mb"]).await;
    postgres.execute(&format!("UPDATE t SET v = '{VALUE}-2' WHERE id = '{KEY}'")).await;
    let named = |status: &Value| status["waiting_for"].as_str().is_some_and(|what| what.contains(KEY));
    daemon.status_when("a key is named", named).await;
    assert!(daemon.log_text().contains(KEY));

    let at = ["--url", &format!("http://{}", daemon.address())];
    let ran = support(&settings, &out(&redis), &at).await;
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert_eq!(std::fs::metadata(out(&redis)).unwrap().permissions().mode() & 0o777, 0o600);
    let files = unpacked(&out(&redis));
    for (file, text) in &files {
        for secret in [postgres_password(), redis_password(), TOKEN, VALUE, KEY] {
            assert!(!text.contains(secret) && !ran.said().contains(secret), "{secret} in {file}:\n{text}");
        }
    }
    for (file, parts) in [
        ("README.txt", &["status.json", "No values and no keys of rows"][..]),
        ("versions.txt", &["prefetchd ", "(the daemon at ", "PostgreSQL ", "_version:"]),
        ("config.toml", &["slot = ", ":***@", "[[tables]]"]),
        ("check.txt", &["ok    configuration", "not ready: ", "maxmemory"]),
        (
            "postgres.txt",
            &["PostgreSQL ", "wal_level = logical", "max_slot_wal_keep_size = ", "\"slot_type\"", "public.t"],
        ),
        ("redis.txt", &["_version:", "used_memory:", "connected_slaves:", "proto-max-bulk-len = 1048576"]),
        ("status.json", &["\"state\": \"stalled\"", "\"dead_letters\": 1", "t:… (left out)"]),
        ("readyz.json", &["\"ready\": false"]),
        ("metrics.txt", &["prefetchd_ready 0"]),
        ("log.txt", &["listening on http://", "loaded ", "t:… (left out)"]),
    ] {
        let text = files.get(file).unwrap_or_else(|| panic!("{file} is missing: {ran:?}"));
        parts.iter().for_each(|part| assert!(text.contains(part), "{part:?} is missing in {file}:\n{text}"));
    }
    assert!(!files["status.json"].contains("dead_letter_keys"), "{}", files["status.json"]);

    // Without the token the daemon gives no log, and another daemon's status is of no use.
    let refused = daemon.request("POST", "/v1/admin/log").await;
    assert_eq!(refused.status, 401);
    let other = settings.text("postgres.slot", "another_slot");
    let path = redis.dir().join("other.tar.gz");
    let ran = support(&other, &path, &at).await;
    assert!(ran.code == Some(0) && ran.stdout.contains("not that of the configuration"), "{ran:?}");
    assert!(!unpacked(&path).contains_key("status.json"));
}

#[tokio::test]
async fn without_servers_and_without_a_daemon_there_is_an_archive_too() {
    let (postgres, mut redis) = (Postgres::shared(), Redis::start());
    redis.stop();
    let away = Settings::new(&postgres, &redis)
        .text("postgres.url", "postgres://prefetchd@127.0.0.1:1/shop")
        .text("http.listen", "127.0.0.1:1");
    let ran = support(&away, &out(&redis), &[]).await;
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let files = unpacked(&out(&redis));
    let readme = &files["README.txt"];
    for part in [
        "Not to be had",
        "postgres.txt: cannot reach Postgres",
        "redis.txt: cannot reach Redis",
        "log.txt: http://127.0.0.1:1",
    ] {
        assert!(readme.contains(part), "{part}: {readme}");
    }
    assert!(files["check.txt"].contains("unknown: 2 servers not reachable"), "{}", files["check.txt"]);
    assert!(files.contains_key("config.toml") && !files.contains_key("status.json"));

    let before = std::fs::read(out(&redis)).unwrap();
    let ran = support(&away, &out(&redis), &[]).await;
    assert!(ran.code == Some(1) && ran.stderr.contains("nothing is overwritten"), "{ran:?}");
    assert_eq!(std::fs::read(out(&redis)).unwrap(), before);
    let ran = support(&away, Path::new("/nonexistent/a.tar.gz"), &[]).await;
    assert!(ran.code == Some(1) && ran.stderr.contains("cannot write /nonexistent/a.tar.gz"), "{ran:?}");

    let broken = Settings::new(&postgres, &redis).text("redis.url", "nonsense://");
    let path = redis.dir().join("broken.tar.gz");
    let ran = support(&broken, &path, &[]).await;
    assert!(ran.code == Some(0) && ran.stdout.contains("there is no valid configuration"), "{ran:?}");
    assert!(!unpacked(&path).contains_key("config.toml"));
}

#[tokio::test]
async fn the_log_is_given_to_operators_only_and_holds_what_was_said() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let daemon = Daemon::with(&Settings::new(&postgres, &redis)).await;
    daemon.ready().await;
    let answer = daemon.operate("log", &json!({})).await;
    assert_eq!(answer.status, 200, "{answer:?}");
    let log = answer.json();
    let said = |text: &str| log["lines"].as_array().unwrap().iter().any(|line| line.as_str().unwrap().contains(text));
    assert!(said("listening on http://") && said("loaded 5 rows of categories in "), "{log}");
    assert_eq!(log["forgotten"], 0);
    assert_eq!(daemon.operate("log", &json!({"lines": 5})).await.status, 400);
}
