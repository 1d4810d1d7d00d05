//! Redis as others run it: commands renamed or refused in other words, clusters, Valkey, and servers that repeat in an
//! error what they were sent.

use crate::harness::provider::Provider;
use crate::harness::{Daemon, Postgres, Ran, Redis, Settings, eventually, run_program};
use prefetchd::lanes::Lane;
use std::collections::BTreeMap;

const FIRST: &str = "cache:category:cat-001";
const PASSWORD: &str = "hunter2-of-zebras";

fn error(text: &str) -> Option<String> {
    Some(format!("-{text}\r\n"))
}

fn bulk(text: &str) -> Option<String> {
    Some(format!("${}\r\n{text}\r\n", text.len()))
}

fn is(words: &[String], command: &str) -> bool {
    words.first().is_some_and(|word| word.eq_ignore_ascii_case(command))
}

/// A Redis with these lines in its redis.conf, and its default user for the daemon, because an ACL cannot name a
/// renamed command.
struct Configured {
    redis: Redis,
}

impl Configured {
    fn with(lines: &str) -> Self {
        Self { redis: Redis::configured(lines, &[]) }
    }

    fn without(command: &str) -> Self {
        Self::with(&format!("rename-command {command} \"\"\n"))
    }

    fn settings(&self, postgres: &Postgres) -> Settings {
        Settings::new(postgres, &self.redis).text("redis.url", &self.redis.url())
    }
}

/// Asserts that `check` prints a line that begins with `level` and contains every one of these.
#[track_caller]
fn has_line(ran: &Ran, level: &str, parts: &[&str]) {
    let found = ran.stdout.lines().any(|line| line.starts_with(level) && parts.iter().all(|part| line.contains(part)));
    assert!(found, "no line {level:?} with {parts:?} in {ran:?}");
}

/// Both `check` and `run` reject it with these words, and nothing is created.
async fn refused_by_both(postgres: &Postgres, settings: &Settings, parts: &[&str]) {
    let ran = run_program(settings, &["check", "--all"]).await;
    has_line(&ran, "fail", parts);
    assert_eq!(ran.code, Some(78), "{ran:?}");
    let about_rights = parts.iter().any(|part| part.starts_with("does not accept") || part.starts_with("may not"));
    assert!(!(about_rights && ran.stdout.contains("every right")), "{ran:?}");
    let (code, said) = Daemon::refused(settings);
    assert_eq!(code, Some(78), "{said}");
    assert!(parts.iter().all(|part| said.contains(part)), "{parts:?} in {said}");
    let slot = format!("SELECT slot_name::text FROM pg_replication_slots WHERE slot_name = '{}'", postgres.slot());
    assert_eq!(postgres.value(&slot).await, None, "no slot was made");
}

/// Loads, and follows a change.
async fn works(postgres: &Postgres, redis: &Redis, settings: &Settings) -> Daemon {
    let daemon = Daemon::with(settings).await;
    daemon.ready().await;
    let lsn = postgres.execute("UPDATE categories SET name = 'Drinks' WHERE id = 'cat-001'").await;
    daemon.applied(lsn).await;
    assert_eq!(redis.hash(FIRST).await["name"], "Drinks");
    daemon
}

// ------------------------------------------------------------------------------------------------- what can be missing

/// Commands that the daemon does without, and what it says about each.
const OPTIONAL: [(&str, &str); 4] = [
    ("CONFIG", "CONFIG GET is denied"),
    ("CLIENT", "SETNAME"),
    ("INFO", "INFO is denied"),
    ("RESTORE", "RESTORE is denied"),
];

#[tokio::test]
async fn a_command_that_is_not_needed_may_be_refused_in_any_words() {
    for wording in [
        "ERR Command is not available: '%'",
        "ERR command '%' not support for normal user",
        "ERR unknown subcommand '%'. Try % HELP.",
        "DISABLED this plan has no %",
        "befehl nicht erlaubt",
    ] {
        let (postgres, redis) = (Postgres::shared(), Redis::start());
        let provider = Provider::before(&redis, move |words| {
            let optional = OPTIONAL.iter().find(|(command, _)| is(words, command))?;
            error(&wording.replace('%', &optional.0.to_lowercase()))
        })
        .await;
        let settings = Settings::new(&postgres, &redis).text("redis.url", &provider.url());
        let ran = run_program(&settings, &["check"]).await;
        assert_eq!(ran.code, Some(0), "{wording}: {ran:?}");
        let daemon = works(&postgres, &redis, &settings).await;
        for (_, lost) in OPTIONAL {
            has_line(&ran, "warn", &["redis:", lost]);
            assert_eq!(daemon.said(lost), 1, "{wording}: {}", daemon.log_text());
        }
        assert_eq!(daemon.stop().await, Some(0));
    }
}

#[tokio::test]
async fn a_command_that_is_not_needed_may_be_renamed() {
    let postgres = Postgres::shared();
    let server =
        Configured::with("rename-command CONFIG \"\"\nrename-command RESTORE \"\"\nrename-command CLIENT \"\"\n");
    works(&postgres, &server.redis, &server.settings(&postgres)).await;
}

#[tokio::test]
async fn a_state_that_passes_is_waited_for() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let loading = |words: &[String]| is(words, "INFO").then(|| error("LOADING Redis is loading the dataset")).flatten();
    let provider = Provider::before(&redis, loading).await;
    let daemon = Daemon::with(&Settings::new(&postgres, &redis).text("redis.url", &provider.url())).await;
    daemon.allow_warnings();
    daemon.logged("LOADING").await;
    provider.answers(|_| None);
    daemon.ready().await;
    assert_eq!(daemon.said("INFO is denied"), 0, "{}", daemon.log_text());
}

#[tokio::test]
async fn a_needed_command_that_is_unknown_is_named_before_it_is_missed() {
    let postgres = Postgres::shared();
    for command in ["COPY", "XADD", "HDEL", "PTTL", "HSET", "SCAN", "TIME", "WATCH", "MULTI", "EXEC", "HGETALL"] {
        let server = Configured::without(command);
        let parts = [&format!("does not accept {command} "), "undo rename-command"];
        refused_by_both(&postgres, &server.settings(&postgres), &parts.map(|part| part as &str)).await;
    }
    let server = Configured::with("rename-command COPY \"\"\nrename-command RENAME \"\"\n");
    refused_by_both(&postgres, &server.settings(&postgres), &["does not accept COPY, RENAME "]).await;
}

#[tokio::test]
async fn what_could_not_be_tested_is_not_called_good() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let full = |words: &[String]| is(words, "HSET").then(|| error("OOM command not allowed")).flatten();
    let provider = Provider::before(&redis, full).await;
    let ran =
        run_program(&Settings::new(&postgres, &redis).text("redis.url", &provider.url()), &["check", "--all"]).await;
    has_line(&ran, "warn", &["HSET could not be tested (OOM command not allowed)"]);
    assert!(!ran.stdout.contains("every right that is needed"), "{ran:?}");
}

#[tokio::test]
async fn a_passing_refusal_of_a_proxy_is_waited_for() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    for (command, refusal) in
        [("MULTI", "THROTTLED try again later"), ("EXEC", "UPSTREAM no healthy host"), ("TYPE", "no upstream host")]
    {
        let provider =
            Provider::before(&redis, move |words| is(words, command).then(|| error(refusal)).flatten()).await;
        let settings = Settings::new(&postgres, &redis).text("redis.url", &provider.url());
        let ran = run_program(&settings, &["check", "--all"]).await;
        assert_ne!(ran.code, Some(78), "{command} {refusal}: {ran:?}");
        assert!(!ran.stdout.contains("every right that is needed"), "{command} {refusal}: {ran:?}");
        assert_eq!(redis.keys("*prefetchd-check").await, [""; 0], "{command} {refusal}: nothing was carried out");
        let daemon = Daemon::with(&settings).await;
        daemon.allow_warnings();
        daemon.logged(refusal).await;
        provider.answers(|_| None);
        daemon.ready().await;
        assert_eq!(daemon.stop().await, Some(0), "{command} {refusal}");
        redis.command::<()>(&["FLUSHALL"]).await;
    }
}

#[tokio::test]
async fn a_database_that_the_user_may_not_select_is_a_missing_right() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let settings = Settings::new(&postgres, &redis).text("redis.url", &redis.daemon_url().replace("/0", "/3"));
    refused_by_both(&postgres, &settings, &["may not run select", "ACL SETUSER prefetchd +select"]).await;
    redis.command::<()>(&["ACL", "SETUSER", "prefetchd", "+select"]).await;
    let ran = run_program(&settings, &["check"]).await;
    assert_eq!(ran.code, Some(0), "the remedy is one: {ran:?}");
}

// ------------------------------------------------------------------------------------------------------------- clusters

#[tokio::test]
async fn a_cluster_is_refused_before_anything_is_made() {
    let postgres = Postgres::shared();
    let redis = Redis::with(&["--cluster-enabled", "yes"]);
    let settings = Settings::new(&postgres, &redis);
    // If INFO is denied, the keys reveal it.
    let denied = async |denied: &str| redis.command::<()>(&["ACL", "SETUSER", "prefetchd", denied]).await;
    let remedy = ["is a node of a cluster", "redis+cluster://"];
    refused_by_both(&postgres, &settings, &remedy).await;
    denied("-info").await;
    refused_by_both(&postgres, &settings, &remedy).await;
    denied("+info").await;
    let slots: Vec<String> = (0..16384).map(|slot| slot.to_string()).collect();
    let slots: Vec<&str> = ["CLUSTER", "ADDSLOTS"].into_iter().chain(slots.iter().map(String::as_str)).collect();
    redis.command::<()>(&slots).await;
    refused_by_both(&postgres, &settings, &remedy).await;
    let info = async || redis.command::<String>(&["CLUSTER", "INFO"]).await;
    eventually("it serves its slots", info, |info| info.contains("cluster_state:ok")).await;
    denied("-info").await;
    let template = format!("{{{{{}}}}}:cache:category:{{id}}", postgres.slot());
    refused_by_both(&postgres, &settings, &["refuses transactions over several hash slots", &template]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_word_for_cluster_mode_is_known() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    for mode in ["server_mode:cluster", "redis_mode:cluster", "cluster_enabled:1"] {
        let info = move |words: &[String]| {
            is(words, "INFO").then(|| bulk(&format!("redis_version:7.2.4\r\nrole:master\r\n{mode}\r\n"))).flatten()
        };
        let provider = Provider::before(&redis, info).await;
        let settings = Settings::new(&postgres, &redis).text("redis.url", &provider.url());
        refused_by_both(&postgres, &settings, &["is a node of a cluster", "redis+cluster://"]).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_endpoint_that_refuses_transactions_over_slots_is_refused() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    for (refusal, said) in [
        ("CROSSSLOT Keys in request don't hash to the same slot", "several hash slots"),
        ("ERR a transaction must stay on one shard", "does not accept EXEC"),
    ] {
        // It checks the keys of a whole transaction when it is to be executed.
        let keys = std::sync::Mutex::new(0);
        let wording = move |words: &[String]| {
            let mut keys = keys.lock().unwrap();
            match words[0].as_str() {
                "MULTI" => *keys = 0,
                "TYPE" => *keys += 1,
                "EXEC" if *keys > 1 => return error(refusal),
                _ => {}
            }
            None
        };
        let provider = Provider::before(&redis, wording).await;
        let settings = Settings::new(&postgres, &redis).text("redis.url", &provider.url());
        refused_by_both(&postgres, &settings, &[said]).await;
    }
}

/// As a proxy before a cluster does that shows its clients a single server.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_endpoint_that_refuses_keys_of_several_slots_is_used_with_one_hash_tag() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let slots = std::sync::Mutex::new(Vec::new());
    let wording = move |words: &[String]| {
        let mut slots = slots.lock().unwrap();
        match words[0].as_str() {
            "MULTI" => slots.clear(),
            "WATCH" | "COPY" | "RENAME" => {
                slots.extend(words[1..3.min(words.len())].iter().map(|key| Lane::of(key.as_bytes())))
            }
            "SET" | "DEL" | "HSET" | "RESTORE" | "TYPE" => slots.push(Lane::of(words[1].as_bytes())),
            _ => return None,
        }
        slots.dedup();
        match slots.len() {
            0 | 1 => None,
            _ => error("CROSSSLOT Keys in request don't hash to the same slot"),
        }
    };
    let provider = Provider::before(&redis, wording).await;
    let settings = Settings::new(&postgres, &redis).text("redis.url", &provider.url());
    let template = format!("{{{{{}}}}}:cache:category:{{id}}", postgres.slot());
    refused_by_both(&postgres, &settings, &["refuses transactions over several hash slots", &template]).await;

    let table = format!("[[tables]]\nname = \"categories\"\ntable = \"public.categories\"\nkey = \"{template}\"\n");
    let daemon = Daemon::with(&settings.tables(&table)).await;
    daemon.ready().await;
    let lsn = postgres.execute("UPDATE categories SET name = 'Drinks' WHERE id = 'cat-001'").await;
    daemon.applied(lsn).await;
    let key = format!("{{{}}}:cache:category:cat-001", postgres.slot());
    assert_eq!(redis.hash(&key).await["name"], "Drinks");
    assert_eq!(daemon.stop().await, Some(0));
}

#[tokio::test]
async fn valkey_is_called_valkey() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let info = |words: &[String]| {
        let valkey = "redis_version:7.2.4\r\nvalkey_version:9.1.2\r\nserver_mode:standalone\r\nrole:master\r\n";
        is(words, "INFO").then(|| bulk(valkey)).flatten()
    };
    let provider = Provider::before(&redis, info).await;
    let settings = Settings::new(&postgres, &redis).text("redis.url", &provider.url());
    let ran = run_program(&settings, &["check", "--all"]).await;
    has_line(&ran, "ok", &["redis:", "answers, Valkey 9.1.2"]);
    let daemon = works(&postgres, &redis, &settings).await;
    assert_eq!(daemon.said("is Valkey 9.1.2"), 1, "{}", daemon.log_text());
    let ran = run_program(&Settings::new(&postgres, &redis), &["check", "--all"]).await;
    let version: String = redis.command(&["INFO", "server"]).await;
    let valkey = version.contains("valkey_version:");
    has_line(&ran, "ok", &["redis:", if valkey { "answers, Valkey " } else { "answers, Redis " }]);
}

// ------------------------------------------------------------------------------------------------------- what is echoed

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_password_that_the_server_repeats_is_not_shown() {
    let postgres = Postgres::shared();
    let server = Configured::without("AUTH");
    let url = server.redis.bare_url().replace("redis://", &format!("redis://:{PASSWORD}@"));
    hides(&server.settings(&postgres).text("redis.url", &url), &["AUTH: "]).await;

    let redis = Redis::start();
    for refusal in [
        "ERR no such command: AUTH %",
        "ERR bad request [AUTH prefetchd %] at byte 3",
        "WRONGPASS \"%\" is no password",
        "% IS WRONG",
        "ERR auth=(%)",
    ] {
        let refusal = move |words: &[String]| {
            is(words, "AUTH").then(|| error(&refusal.replace('%', words.last().unwrap()))).flatten()
        };
        let provider = Provider::before(&redis, refusal).await;
        let url = format!("redis://prefetchd:{PASSWORD}@127.0.0.1:{}/0", provider.port());
        hides(&Settings::new(&postgres, &redis).text("redis.url", &url), &["redis.password_file"]).await;
    }
}

/// `check` and `run` say this, and no part of the password.
async fn hides(settings: &Settings, parts: &[&str]) {
    let ran = run_program(settings, &["check"]).await;
    assert_eq!(ran.code, Some(78), "{ran:?}");
    let (code, said) = Daemon::refused(settings);
    assert_eq!(code, Some(78), "{said}");
    for said in [ran.said(), said] {
        assert!(parts.iter().all(|part| said.contains(part)), "{parts:?} in {said}");
        assert!(!said.contains("hunter2") && !said.contains("zebra"), "{said}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_password_that_a_sentinel_repeats_is_not_shown() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let refusal = |words: &[String]| {
        let sentinel = is(words, "AUTH") || is(words, "SENTINEL");
        sentinel.then(|| error(&format!("ERR cannot do {}", words.join(" ")))).flatten()
    };
    let sentinel = Provider::before(&redis, refusal).await;
    let url =
        format!("redis+sentinel://prefetchd@127.0.0.1:{}/mymaster/0?sentinel_password={PASSWORD}", sentinel.port());
    let settings = Settings::new(&postgres, &redis).text("redis.url", &url);
    hides(&settings, &["AUTH: ERR cannot do AUTH"]).await;
}

#[tokio::test]
async fn values_of_a_row_that_the_server_repeats_are_not_shown() {
    let secret = "a very secret name of a category, far too long to be packed into one RESTORE by anybody";
    for refusal in
        ["ERR unknown command `HSET`, with args beginning with: %", "ERR cannot do %", "BROKEN % is what I got"]
    {
        let (postgres, redis) = (Postgres::shared(), Redis::start());
        let provider = Provider::before(&redis, |_| None).await;
        let settings = Settings::new(&postgres, &redis).text("redis.url", &provider.url());
        let daemon = works(&postgres, &redis, &settings).await;
        daemon.allow_warnings();
        provider.answers(move |words| {
            let row = words.iter().any(|word| word.contains("secret"));
            row.then(|| error(&refusal.replace('%', &words.join(" ")))).flatten()
        });
        postgres.execute(&format!("UPDATE categories SET name = '{secret}' WHERE id = 'cat-001'")).await;
        let status = daemon.status_when("stalled", |status| status["state"] == "stalled").await;
        let waiting_for = status["waiting_for"].as_str().unwrap().to_owned();
        assert!(waiting_for.contains("Redis refused HSET"), "{status}");
        let mut surfaces = BTreeMap::from([("log", daemon.log_text()), ("status", status.to_string())]);
        for path in ["/readyz", "/v1/history", "/v1/tables/categories/cat-999"] {
            surfaces.insert(path, daemon.get(path).await.body);
        }
        for (surface, text) in surfaces {
            assert!(!text.contains("secret") && !text.contains("anybody"), "{surface}: {text}");
        }
        provider.answers(|_| None);
        daemon.ready().await;
        assert_eq!(redis.hash(FIRST).await["name"], secret);
    }
}

// ----------------------------------------------------------------------------------------------------------- durability

#[tokio::test]
async fn a_file_that_is_never_fsynced_is_refused() {
    let (postgres, redis) = (Postgres::shared(), Redis::with(&["--appendonly", "yes", "--appendfsync", "no"]));
    let settings = Settings::new(&postgres, &redis).text("redis.durability", "aof");
    refused_by_both(&postgres, &settings, &["appendfsync is no", "CONFIG SET appendfsync always"]).await;
}

#[tokio::test]
async fn a_server_without_wait_is_refused_before_anything_is_made() {
    let postgres = Postgres::shared();
    let server = Configured::without("WAIT");
    let _replica = server.redis.replica().await;
    let settings = server.settings(&postgres).text("redis.durability", "replicas:1");
    refused_by_both(&postgres, &settings, &["it does not accept WAIT", "another redis.durability"]).await;
}

#[tokio::test]
async fn the_reason_of_a_refused_fence_is_told() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let _replica = redis.replica().await;
    let provider = Provider::before(&redis, |_| None).await;
    let settings =
        Settings::new(&postgres, &redis).text("redis.url", &provider.url()).text("redis.durability", "replicas:1");
    let daemon = works(&postgres, &redis, &settings).await;
    daemon.allow_warnings();
    provider.answers(|words| {
        let fence = words.len() > 1 && words[1].ends_with(":fence");
        fence.then(|| error("NOREPLICAS Not enough good replicas to write.")).flatten()
    });
    postgres.execute("UPDATE categories SET name = 'Tea' WHERE id = 'cat-001'").await;
    let status = daemon.status_when("stalled", |status| status["state"] == "stalled").await;
    assert!(status["waiting_for"].as_str().unwrap().contains("NOREPLICAS Not enough good replicas"), "{status}");
    provider.answers(|_| None);
    daemon.ready().await;
}
