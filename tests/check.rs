//! `check` with broken setups: one line names the object, the problem and the remedy, and the last line sums up.

use crate::harness::{Daemon, Feature, Postgres, Redis, Settings, eventually, psql, run_program};
use nix::sys::signal::Signal;
use nix::unistd::geteuid;
use prefetchd::cli::servers::{postgres_password, redis_password};
use prefetchd::code::Code;
use std::collections::BTreeSet;
use std::fmt::Write;

const ACL: &str = include_str!("../migrations/redis.acl");

/// Returns every finding. The last line must match the exit code.
async fn check(title: &str, settings: &Settings, code: i32) -> String {
    check_as(&["check", "--all"], title, settings, code).await
}

/// Returns the output without `--all`.
async fn check_briefly(title: &str, settings: &Settings, code: i32) -> String {
    check_as(&["check"], title, settings, code).await
}

async fn check_as(args: &[&str], title: &str, settings: &Settings, code: i32) -> String {
    let ran = run_program(settings, args).await;
    println!("$ prefetchd {}   # {title}\n{}", args.join(" "), ran.stdout);
    assert_eq!(ran.code, Some(code), "{title}: {ran:?}");
    let last = ran.stdout.lines().last().unwrap_or_default();
    let begins = match code {
        0 => "ready: ",
        1 => "unknown: ",
        _ => "not ready: ",
    };
    assert!(last.starts_with(begins), "{title}: {}", ran.stdout);
    assert_eq!(ran.stdout.lines().any(|line| line.starts_with("fail")), code != 0, "{title}: {}", ran.stdout);
    let problems = ran.stdout.lines().filter(|line| line.starts_with("fail") || line.starts_with("warn"));
    let mut any = false;
    for line in problems {
        let code = line.rsplit_once("  #").and_then(|(_, code)| Code::of(code));
        assert!(code.is_some(), "{title}: a line without a code: {line}");
        any = true;
    }
    let legend = "prefetchd explain CODE says more about each #code";
    assert_eq!(ran.stderr.contains(legend), any, "{title}: {}", ran.stderr);
    ran.stdout
}

/// The last line if there are no problems. Running the tests as root adds a warning.
fn good() -> &'static str {
    if geteuid().is_root() { "ready: no problems found, 1 warning" } else { "ready: no problems found" }
}

/// Asserts that there is a line that begins with `level` and contains all of these parts.
#[track_caller]
fn has_line(output: &str, level: &str, parts: &[&str]) {
    let found = output.lines().any(|line| line.starts_with(level) && parts.iter().all(|part| line.contains(part)));
    assert!(found, "no line {level:?} with {parts:?} in\n{output}");
}

async fn fails(title: &str, settings: &Settings, parts: &[&str]) {
    has_line(&check(title, settings, 78).await, "fail", parts);
}

async fn warns(title: &str, settings: &Settings, parts: &[&str]) {
    has_line(&check(title, settings, 0).await, "warn", parts);
}

async fn set_user(redis: &Redis, rules: &[&str]) {
    redis.command::<()>(&[&["ACL", "SETUSER", "prefetchd"], rules].concat()).await;
}

#[tokio::test]
async fn a_good_setup_is_called_good() {
    let (postgres, redis) = (Postgres::own(&[("max_slot_wal_keep_size", "1TB")]), Redis::start());
    let settings = Settings::new(&postgres, &redis);
    let output = check("a good set-up", &settings, 0).await;
    assert_eq!(output.lines().last(), Some(good()), "and no warning: {output}");
    for parts in [
        &["redis:", "user prefetchd has every right"][..],
        &["redis:", "keeps nothing over a restart", "no replica"],
        &["clocks:", "postgres", "redis"],
        &["memory:", "5 rows"],
        &["postgres:", "keeps up to", "may be stopped for"],
    ] {
        has_line(&output, "ok", parts);
    }
    assert_eq!(redis.keys("*").await, [""; 0], "it changed nothing");
}

#[tokio::test]
async fn an_address_that_is_taken_fails_but_by_the_daemon_itself() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let daemon = Daemon::start(&postgres, &redis).await;
    daemon.ready().await;
    let at = |address: &str| Settings::new(&postgres, &redis).text("http.listen", address);
    let here = daemon.address().to_string();
    let output = check("beside the daemon", &at(&here), 0).await;
    has_line(&output, "ok", &["http:", "a prefetchd with slot", &postgres.slot()]);
    let remedy = "choose another http.listen, or stop that program";
    let output = check("another slot", &at(&here).text("postgres.slot", "another_slot"), 78).await;
    has_line(&output, "fail", &["http:", "taken by a prefetchd with another slot", remedy]);

    let busy = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = busy.local_addr().unwrap().to_string();
    std::thread::spawn(move || busy.incoming().flatten().for_each(|connection| overloaded(&connection)));
    let output = check("a daemon that is too busy to tell", &at(&address), 0).await;
    has_line(&output, "warn", &["http:", "does not tell its slot now", &address, &postgres.slot()]);

    daemon.signal(Signal::SIGSTOP);
    let frozen = format!("taken by a prefetchd that is frozen (pid {0}, state T): kill -CONT {0}", daemon.pid());
    fails("a frozen daemon", &at(&here), &["http:", &here, &frozen]).await;
    let ran = run_program(&at(&here), &["status", "--url", &format!("http://{here}")]).await;
    assert!(ran.code == Some(1) && ran.said().contains("accepts connections but does not answer"), "{ran:?}");
    daemon.signal(Signal::SIGCONT);

    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    // Closes every connection.
    std::thread::spawn(move || taken.incoming().for_each(drop));
    fails("the address of another program", &at(&address), &["http:", &address, "taken by another program", remedy])
        .await;
}

/// Answers one request as a daemon does that has too many.
fn overloaded(mut connection: &std::net::TcpStream) {
    use std::io::{Read, Write};
    let mut request = [0; 1024];
    let length = connection.read(&mut request).unwrap_or_default();
    let (status, body) = match request[..length].starts_with(b"GET /healthz ") {
        true => ("200 OK", r#"{"status": "ok"}"#),
        false => ("503 Service Unavailable", r#"{"error": "overloaded", "message": "too many requests"}"#),
    };
    let head = format!("HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {}\r\n\r\n", body.len());
    let _ = connection.write_all((head + body).as_bytes());
}

#[tokio::test]
async fn every_right_of_the_redis_user_is_missed_by_name() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let settings = Settings::new(&postgres, &redis);
    check("before", &settings, 0).await;
    let line = ACL.lines().find(|line| line.starts_with("user ")).unwrap();
    let optional = [
        ("info", "INFO is denied"),
        ("config|get", "CONFIG GET is denied"),
        ("client|setname", "SETNAME"),
        ("restore", "RESTORE is denied"),
    ];
    let mut tried = 0;
    for command in line.split(' ').filter_map(|word| word.strip_prefix('+')) {
        let (name, _) = command.split_once('|').unwrap_or((command, ""));
        set_user(&redis, &[&format!("-{name}")]).await;
        match optional.iter().find(|(optional, _)| *optional == command) {
            Some((_, lost)) => warns(&format!("without {command}"), &settings, &["redis:", lost]).await,
            None => {
                let parts = [&format!("may not run {command}"), "ACL SETUSER prefetchd", &format!("+{command}")];
                fails(&format!("without {command}"), &settings, &parts).await;
            }
        }
        set_user(&redis, &[&format!("+{command}")]).await;
        tried += 1;
    }
    assert!(tried >= 20, "{line}");
    check("with all of them again", &settings, 0).await;
    assert_eq!(redis.keys("*").await, [""; 0], "nothing of what was tried was carried out");
}

/// The commands in the documentation grant the same rights as the file.
#[test]
fn the_documented_redis_user_is_the_one_that_is_tested() {
    let rights = |text: &str| -> BTreeSet<String> {
        let words = text.split_whitespace().map(|word| word.trim_matches('\''));
        words.filter(|word| word.starts_with('+')).map(str::to_owned).collect()
    };
    let tested = rights(ACL.lines().find(|line| line.starts_with("user ")).unwrap());
    for document in [include_str!("../docs/first-table.md"), include_str!("../docs/operating.md")] {
        let (_, command) = document.split_once("ACL SETUSER prefetchd reset").unwrap();
        assert_eq!(rights(command.split_once("```").unwrap().0), tested);
    }
}

#[tokio::test]
async fn a_prefix_that_the_redis_user_may_not_use_is_named() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let settings = Settings::new(&postgres, &redis);
    let own = format!("~prefetchd:{{{}}}:*", postgres.slot());
    check("before", &settings, 0).await;
    set_user(&redis, &["resetkeys", &own]).await;
    fails(
        "no right to the table's keys",
        &settings,
        &["keys like cache:category:*", "ACL SETUSER prefetchd '~cache:category:*'"],
    )
    .await;
    set_user(&redis, &["resetkeys", "~cache:category:*"]).await;
    fails("no right to prefetchd's own keys", &settings, &["ACL SETUSER prefetchd", &format!("'{own}'")]).await;
}

/// Since Redis 7.0 a selector may grant a command for some keys only. The records of dead letters need it, too.
#[tokio::test]
async fn a_command_that_the_redis_user_has_for_rows_only_is_named() {
    if Redis::lacks(Feature::Selectors).await {
        return;
    }
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let settings = Settings::new(&postgres, &redis);
    for command in ["hset", "hdel", "hgetall"] {
        set_user(&redis, &[&format!("-{command}"), &format!("(+{command} ~cache:category:*)")]).await;
        fails(command, &settings, &["ACL SETUSER prefetchd", &format!("+{command}")]).await;
        set_user(&redis, &["clearselectors", &format!("+{command}")]).await;
    }
    check("with all of them", &settings, 0).await;
}

/// 2,000 rows of about 5 kB each in Redis.
async fn wide_rows(postgres: &Postgres) {
    postgres
        .execute(
            "INSERT INTO categories (id, name)
             SELECT n, string_agg(md5(n::text || m), '') FROM generate_series(1, 2000) n, generate_series(1, 150) m
              GROUP BY n",
        )
        .await;
}

#[tokio::test]
async fn rows_that_have_no_room_are_told_beforehand_and_not_loaded() {
    let (postgres, redis) = (Postgres::shared(), Redis::with(&["--maxmemory", "5mb"]));
    wide_rows(&postgres).await;
    let settings = Settings::new(&postgres, &redis);
    fails(
        "rows that cannot fit",
        &settings,
        &["memory:", "maxmemory 5.2 MB", "2005 rows of about", "nothing is loaded", "raise maxmemory"],
    )
    .await;

    let daemon = Daemon::with(&settings).await;
    daemon.allow_warning("maxmemory");
    let status = daemon.status_when("stalled", |status| status["state"] == "stalled").await;
    assert!(status["waiting_for"].as_str().unwrap().contains("2005 rows of about"), "{status}");
    assert!(daemon.get("/readyz").await.body.contains("maxmemory"));
    let slots = format!("SELECT count(*) FROM pg_replication_slots WHERE slot_name = '{}'", postgres.slot());
    assert_eq!(postgres.value(&slots).await.as_deref(), Some("0"));
    assert_eq!(redis.keys("*").await, [""; 0], "nothing was written");
    // It checks repeatedly but warns only once.
    let asked = async || redis.command::<String>(&["INFO", "commandstats"]).await;
    let looks = |stats: &String| stats.contains("cmdstat_watch:calls=4");
    eventually("it looked four times", asked, looks).await;
    assert_eq!(daemon.said("maxmemory"), 1, "{}", daemon.log_text());

    redis.command::<()>(&["CONFIG", "SET", "maxmemory", "12800kb"]).await;
    daemon.ready().await;
    assert_eq!(redis.keys("cache:*").await.len(), 2005);
    assert_eq!(daemon.stop().await, Some(0));
    // With a checkpoint, the memory in use counts only once.
    warns("rows that nearly fill it", &settings, &["memory:", "maxmemory 13.1 MB", "a full redis stalls"]).await;
    redis.command::<()>(&["CONFIG", "SET", "maxmemory", "100mb"]).await;
    has_line(&check("rows that have room", &settings, 0).await, "ok", &["memory:", "2005 rows"]);
}

/// Statistics of a table that was much larger are not used: the rows are measured.
#[tokio::test]
async fn statistics_of_another_time_refuse_no_load() {
    let (postgres, redis) = (Postgres::shared(), Redis::with(&["--maxmemory", "5mb"]));
    postgres.execute("ALTER TABLE categories SET (autovacuum_enabled = off)").await;
    wide_rows(&postgres).await;
    postgres.execute("ANALYZE categories").await;
    postgres.execute("DELETE FROM categories WHERE length(name) > 100").await;
    let daemon = Daemon::start(&postgres, &redis).await;
    daemon.ready().await;
    assert_eq!(redis.keys("cache:*").await.len(), 5);
}

#[tokio::test]
async fn a_redis_that_forgets_by_itself_is_a_failure() {
    let postgres = Postgres::shared();
    let redis = Redis::with(&["--maxmemory", "100mb", "--maxmemory-policy", "volatile-lru"]);
    let settings = Settings::new(&postgres, &redis);
    fails("an eviction policy", &settings, &["volatile-lru", "CONFIG SET maxmemory-policy noeviction"]).await;
}

#[tokio::test]
async fn a_durability_that_cannot_be_had_is_told_beforehand() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let with = |durability: &str| Settings::new(&postgres, &redis).text("redis.durability", durability);
    fails("replicas:1 without a replica", &with("replicas:1"), &["0 replicas are connected", "ask for fewer"]).await;
    fails("aof without one", &with("aof"), &["cannot provide redis.durability = \"aof\""]).await;
    assert_eq!(redis.keys("*").await, [""; 0]);

    let replica = redis.replica().await;
    let output = check("replicas:1 with one", &with("replicas:1"), 0).await;
    has_line(&output, "ok", &["provides redis.durability = \"replicas:1\""]);
    has_line(&output, "ok", &["replicas: 1"]);
    fails("replicas:2 with one", &with("replicas:2"), &["1 replica is connected"]).await;
    // The redis.url of another daemon.
    let at_the_replica = Settings::new(&postgres, &replica);
    fails("a replica", &at_the_replica, &["is a replica of 127.0.0.1", "point redis.url at the master"]).await;
}

#[tokio::test]
async fn a_server_without_slots_or_senders_is_a_failure() {
    let postgres = Postgres::own(&[("max_replication_slots", "0"), ("max_wal_senders", "0")]);
    let redis = Redis::start();
    let settings = Settings::new(&postgres, &redis);
    let output = check("no slot and no sender left", &settings, 78).await;
    has_line(&output, "fail", &["slot slot_shop", "raise max_replication_slots"]);
    has_line(&output, "fail", &["raise max_wal_senders"]);
    has_line(&output, "not ready: 2 problems must be fixed", &[]);
    let postgres = Postgres::own(&[("max_replication_slots", "1")]);
    let output = check("one slot left", &Settings::new(&postgres, &redis), 78).await;
    has_line(&output, "fail", &["slot slot_shop", "1 free", "takes 2", "raise max_replication_slots"]);
}

#[tokio::test]
async fn settings_of_the_server_that_do_not_do_are_failures() {
    let redis = Redis::start();
    let names = [("synchronous_standby_names", "*"), ("synchronous_commit", "local"), ("wal_level", "replica")];
    let postgres = Postgres::own(&names);
    let settings = Settings::new(&postgres, &redis).set("postgres.create", "false").set("postgres.failover", "true");
    let output = check("a server for nothing of this", &settings, 78).await;
    has_line(&output, "fail", &["wal_level = replica", "ALTER SYSTEM SET wal_level = logical", "  #wal-level"]);
    has_line(
        &output,
        "fail",
        &["synchronous_standby_names = \"*\"", "name your standbys there", "  #synchronous-standby"],
    );
    has_line(&output, "fail", &["slot slot_shop: missing", "SELECT pg_create_logical_replication_slot('slot_shop'"]);
    let other = Settings::new(&postgres, &redis).set("postgres.create", "false").text("postgres.publication", "other");
    fails("no such publication", &other, &["publication other: missing", "CREATE PUBLICATION other"]).await;
}

#[tokio::test]
async fn what_lies_under_a_prefix_and_servers_that_are_away_are_told() {
    let (postgres, mut redis) = (Postgres::shared(), Redis::start());
    let settings = Settings::new(&postgres, &redis);
    redis.command::<()>(&["SET", "cache:category:of-somebody-else", "x"]).await;
    warns("somebody else's keys", &settings, &["1 key or more begins with \"cache:category:\" already"]).await;
    redis.stop();
    let away = settings.text("postgres.url", "postgres://prefetchd@127.0.0.1:1/shop");
    let output = check("neither server is up", &away, 1).await;
    has_line(&output, "fail", &["redis: cannot reach Redis"]);
    has_line(&output, "fail", &["postgres: cannot reach Postgres"]);
    has_line(&output, "unknown: 2 servers not reachable", &[]);
}

#[tokio::test]
async fn a_publication_that_is_younger_than_the_slot_is_noticed() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let slot = postgres.slot();
    let settings = || Settings::new(&postgres, &redis);
    let younger = ["its position precedes the creation of publication prefetchd"];
    postgres.execute("DROP PUBLICATION prefetchd").await;
    postgres.execute(&format!("SELECT pg_create_logical_replication_slot('{slot}', 'pgoutput')")).await;
    postgres.execute("UPDATE categories SET name = 'x' WHERE id = 'cat-001'").await;
    postgres.execute("CREATE PUBLICATION prefetchd FOR TABLE categories").await;
    warns("a publication younger than the slot", &settings(), &[younger[0], "loads every table"]).await;
    let never = settings().set("postgres.create", "false");
    fails("the same with create = false", &never, &[younger[0], "pg_drop_replication_slot"]).await;

    postgres.execute(&format!("SELECT pg_drop_replication_slot('{slot}')")).await;
    postgres.execute(&format!("SELECT pg_create_logical_replication_slot('{slot}', 'pgoutput')")).await;
    postgres.execute("ALTER PUBLICATION prefetchd SET (publish_via_partition_root = true)").await;
    postgres.execute("UPDATE categories SET name = 'y' WHERE id = 'cat-001'").await;
    let output = check("a publication that was only altered", &settings(), 0).await;
    assert!(!output.contains(younger[0]), "{output}");
}

#[tokio::test]
async fn a_slot_that_would_not_outlive_an_hour_is_a_warning() {
    let (postgres, redis) = (Postgres::own(&[("max_slot_wal_keep_size", "64MB")]), Redis::start());
    let settings = Settings::new(&postgres, &redis);
    postgres.execute("SELECT pg_stat_reset_shared('wal'); CREATE TABLE t AS SELECT generate_series(1, 200000)").await;
    let parts = ["keeps up to 67.1 MB", "may be stopped for", "MB/s", "ALTER SYSTEM SET max_slot_wal_keep_size = '"];
    // The statistics arrive a moment later.
    let wal = "SELECT wal_bytes > 1e7 FROM pg_stat_wal";
    eventually("counted", async || postgres.value(wal).await, |counted| counted.as_deref() == Some("t")).await;
    warns("much WAL, and little room for it", &settings, &parts).await;
    let unlimited = Postgres::shared();
    warns("no limit", &Settings::new(&unlimited, &redis), &["keeps WAL without limit", "max_slot_wal_keep_size"]).await;
}

#[tokio::test]
async fn what_a_slot_would_wait_for_is_named() {
    let postgres = Postgres::own(&[("max_prepared_transactions", "2")]);
    let redis = Redis::start();
    let settings = Settings::new(&postgres, &redis);
    let client = postgres.client().await;
    client.batch_execute("BEGIN; UPDATE categories SET name = 'x' WHERE id = 'cat-001'").await.unwrap();
    let pid: i32 = client.query_one("SELECT pg_backend_pid()", &[]).await.unwrap().get(0);
    postgres
        .execute("BEGIN; UPDATE categories SET name = 'x' WHERE id = 'cat-002'; PREPARE TRANSACTION 'the-gid'")
        .await;
    let parts =
        ["will wait until these transactions have ended", &format!("pid {pid}"), "prepared transaction 'the-gid'"];
    warns("open transactions", &settings, &parts).await;
    client.batch_execute("COMMIT").await.unwrap();
    postgres.execute("COMMIT PREPARED 'the-gid'").await;
    let output = check("none any more", &settings, 0).await;
    assert!(!output.contains("will wait until"), "{output}");
}

#[tokio::test]
async fn a_socket_that_would_be_faster_is_named_with_its_url() {
    let postgres = Postgres::own(&[("max_slot_wal_keep_size", "1TB")]);
    let redis = Redis::start();
    let settings = || Settings::new(&postgres, &redis);
    let output = check("the socket's directory is not to be known", &settings(), 0).await;
    assert!(!output.contains("twice as fast"), "{output}");
    psql(&postgres.url("postgres"), "GRANT pg_read_all_settings TO prefetchd");
    let output = check("it is known", &settings(), 0).await;
    has_line(&output, "warn", &["twice as fast", "postgres.url = \"host=/", "user=prefetchd dbname=shop"]);
    let url = output.split_once("postgres.url = \"").unwrap().1.split_once('"').unwrap().0;
    // It contains no password.
    let through_it = settings().text("postgres.url", &format!("{url} password={}", postgres_password()));
    let output = check("the URL that it named", &through_it, 0).await;
    assert_eq!(output.lines().last(), Some(good()), "{output}");
}

#[tokio::test]
async fn rights_in_postgres_and_publications_are_told_as_well() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let mut tables = String::new();
    for name in ["hidden", "partly", "ruled", "anonymous", "unlisted"] {
        writeln!(tables, "[[tables]]\nname = '{name}'\ntable = 'public.{name}'\nkey = '{name}:{{id}}'").unwrap();
    }
    postgres
        .execute(
            "CREATE TABLE hidden (id int PRIMARY KEY); CREATE TABLE partly (id int PRIMARY KEY, v text);
             CREATE TABLE ruled (id int PRIMARY KEY); ALTER TABLE ruled ENABLE ROW LEVEL SECURITY;
             CREATE TABLE anonymous (id int); CREATE TABLE unlisted (id int PRIMARY KEY);
             GRANT SELECT ON ruled, anonymous, unlisted TO prefetchd; GRANT SELECT (id) ON partly TO prefetchd;
             ALTER PUBLICATION prefetchd ADD TABLE hidden, partly, ruled, anonymous;
             ALTER PUBLICATION prefetchd SET (publish = 'insert, update')",
        )
        .await;
    let settings = Settings::new(&postgres, &redis).tables(&tables).text("http.listen", "0.0.0.0:0");
    let output = check("what a table can lack", &settings, 78).await;
    for parts in [
        &["public.hidden", "may not be read by role prefetchd", "GRANT SELECT ON"][..],
        &["public.partly", "may not be read by role prefetchd", "GRANT SELECT ON"],
        &["public.ruled", "BYPASSRLS"],
        &["public.anonymous", "REPLICA IDENTITY"],
        &["public.unlisted", "ALTER PUBLICATION prefetchd ADD TABLE public.unlisted"],
        &["publication prefetchd", "leaves out delete, truncate", "SET (publish = "],
    ] {
        has_line(&output, "fail", parts);
    }
    has_line(&output, "warn", &["http: 0.0.0.0:0", "reads need no token"]);
    has_line(&output, "not ready: 6 problems must be fixed", &[]);
}

/// Everything that can prevent tables from being followed, all at once: each is reported on one line, and none hides
/// another.
#[tokio::test]
async fn a_hostile_schema_is_told_a_line_for_each_problem() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    // Name, key, and what the line must contain.
    let problems: [(&str, &str, &[&str]); 14] = [
        ("nowhere", "{id}", &["does not exist", "create it"]),
        ("seen", "{id}", &["a view"]),
        ("kept", "{id}", &["materialized view"]),
        ("unlogged", "{id}", &["unlogged", "SET LOGGED"]),
        ("no_key", "{id}", &["no primary key", "REPLICA IDENTITY USING INDEX"]),
        ("nothing", "{id}", &["replica identity NOTHING", "REPLICA IDENTITY DEFAULT"]),
        ("late", "{id}", &["no primary key", "NOT NULL"]),
        ("wide", "{a}", &["identified by (a, b)"]),
        ("by_index", "{id}", &["identified by (code)"]),
        ("part", "{id}", &["is a partition of public.whole", "configure public.whole"]),
        ("hidden", "{id}", &["GRANT SELECT ON"]),
        ("ruled", "{id}", &["BYPASSRLS"]),
        ("unlisted", "{id}", &["is not in publication prefetchd", "ADD TABLE public.unlisted"]),
        ("misspelt", "{idd}", &["made of (idd)", "identified by (id)"]),
    ];
    let tables = problems.iter().fold(String::new(), |mut toml, (name, key, _)| {
        write!(toml, "[[tables]]\nname = '{name}'\ntable = 'public.{name}'\nkey = '{name}:{key}'\n").unwrap();
        toml
    });
    postgres
        .execute(
            "CREATE TABLE misspelt (id int PRIMARY KEY, v text); CREATE VIEW seen AS SELECT * FROM misspelt;
             CREATE MATERIALIZED VIEW kept AS SELECT * FROM misspelt; CREATE UNLOGGED TABLE unlogged (id int PRIMARY KEY);
             CREATE TABLE no_key (id int); CREATE TABLE nothing (id int PRIMARY KEY);
             ALTER TABLE nothing REPLICA IDENTITY NOTHING; CREATE TABLE late (id int PRIMARY KEY DEFERRABLE);
             CREATE TABLE wide (a int, b int, PRIMARY KEY (a, b));
             CREATE TABLE by_index (id int PRIMARY KEY, code text NOT NULL UNIQUE);
             ALTER TABLE by_index REPLICA IDENTITY USING INDEX by_index_code_key;
             CREATE TABLE whole (id int PRIMARY KEY) PARTITION BY RANGE (id);
             CREATE TABLE part PARTITION OF whole FOR VALUES FROM (0) TO (9);
             CREATE TABLE hidden (id int PRIMARY KEY); CREATE TABLE ruled (id int PRIMARY KEY);
             ALTER TABLE ruled ENABLE ROW LEVEL SECURITY; CREATE TABLE unlisted (id int PRIMARY KEY);
             GRANT SELECT ON ALL TABLES IN SCHEMA public TO prefetchd; REVOKE SELECT ON hidden FROM prefetchd;
             ALTER PUBLICATION prefetchd ADD TABLE no_key, nothing, late, wide, by_index, whole, hidden, ruled, misspelt",
        )
        .await;
    let output = check_briefly("a hostile schema", &Settings::new(&postgres, &redis).tables(&tables), 78).await;
    for (name, _, parts) in problems {
        let of_it: Vec<&str> = output
            .lines()
            .filter(|line| line.starts_with("fail") && line.contains(&format!("public.{name} ")))
            .collect();
        assert_eq!(of_it.len(), 1, "{name}: {of_it:?} in\n{output}");
        assert!(parts.iter().all(|part| of_it[0].contains(part)), "{name}: {parts:?} in {}", of_it[0]);
    }
    has_line(&output, "not ready: 14 problems must be fixed", &[]);
}

#[tokio::test]
async fn what_is_good_is_folded_and_problems_come_last() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let settings = Settings::new(&postgres, &redis);
    let output = check_briefly("a good set-up", &settings, 0).await;
    let lines: Vec<&str> = output.lines().collect();
    assert!(lines[0].starts_with("ok    ") && lines[0].ends_with(" checks passed (--all shows them)"), "{output}");
    assert!(lines[1..lines.len() - 1].iter().all(|line| line.starts_with("warn")), "{output}");
    has_line(&output, "warn", &["keeps WAL without limit"]);
    let passed = lines[0].split_whitespace().nth(1).unwrap();

    let all = check("the same", &settings, 0).await;
    assert_eq!(all.lines().filter(|line| line.starts_with("ok")).count().to_string(), passed, "{all}");
    // Once where it belongs, and once where it is seen.
    let (findings, problems) = all.split_once("\n\n").unwrap();
    assert!(findings.contains("keeps WAL without limit") && problems.contains("keeps WAL without limit"), "{all}");
    assert!(!problems.contains("\nok"), "{all}");
}

#[tokio::test]
async fn what_many_tables_lack_is_one_line() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let (mut tables, mut sql) = (String::new(), String::new());
    for n in 1..=50 {
        writeln!(tables, "[[tables]]\nname = 't{n}'\ntable = 'public.t{n}'\nkey = 't{n}:{{id}}'").unwrap();
        write!(sql, "CREATE TABLE t{n} (id int PRIMARY KEY); ALTER PUBLICATION prefetchd ADD TABLE t{n};").unwrap();
        redis.command::<()>(&["SET", &format!("t{n}:of-somebody-else"), "x"]).await;
    }
    postgres.execute(&sql).await;
    let settings = Settings::new(&postgres, &redis).tables(&tables);
    let output = check_briefly("50 tables that may not be read", &settings, 78).await;
    let fails: Vec<&str> = output.lines().filter(|line| line.starts_with("fail")).collect();
    assert_eq!(fails.len(), 1, "{output}");
    let parts = ["table t1: ", "GRANT SELECT ON", "; the same for 49 more: t2, t3, t4, … (--all shows each)"];
    has_line(&output, "fail", &parts);
    has_line(&output, "warn", &["1 key or more begins with \"t1:\"", "the same for 49 more: \"t2:\", \"t3:\""]);
    has_line(&output, "not ready: 50 problems must be fixed", &[]);
    let all = check("each of them", &settings, 78).await;
    has_line(&all, "fail", &["table t50: ", "GRANT SELECT ON", "public.t50"]);
}

#[tokio::test]
async fn a_redis_that_is_full_already_is_a_failure() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let settings = Settings::new(&postgres, &redis);
    let limit = async |limit: &str| redis.command::<()>(&["CONFIG", "SET", "maxmemory", limit]).await;
    limit("200kb").await;
    fails("more than it may", &settings, &["redis: it uses", "maxmemory is 204.8 kB", "CONFIG SET maxmemory "]).await;
    limit("100mb").await;
    has_line(&check("less than it may", &settings, 0).await, "ok", &["of maxmemory 104.9 MB used"]);
}

#[tokio::test]
async fn a_refused_password_is_78_everywhere() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let settings = || Settings::new(&postgres, &redis);
    // Answers AUTH as a Sentinel with a password does.
    let sentinel = format!("redis+sentinel://127.0.0.1:{}/mymaster/0?sentinel_password=wrong", redis.port());
    let nobody = format!("redis+sentinel://127.0.0.1:1,127.0.0.1:{}/mymaster/0?sentinel_password=wrong", redis.port());
    for (key, url, said) in [
        ("postgres.url", postgres.bare_url("prefetchd").replace("prefetchd@", "prefetchd:wrong@"), "28P01"),
        ("redis.url", redis.bare_url().replace("redis://", "redis://prefetchd:wrong@"), "WRONGPASS"),
        ("redis.url", sentinel, "no Sentinel accepts the login"),
        ("redis.url", nobody, "no Sentinel accepts the login"),
    ] {
        let refused = settings().text(key, &url);
        for command in ["run", "check", "teardown"] {
            let ran = run_program(&refused, &[command]).await;
            assert_eq!(ran.code, Some(78), "{command} {url}: {ran:?}");
            assert!(ran.said().contains(said) && !ran.said().contains("wrong"), "{command} {url}: {ran:?}");
        }
    }
    // That is no refusal.
    let nowhere = settings().text("redis.url", "redis+sentinel://127.0.0.1:1/mymaster/0?sentinel_password=wrong");
    for command in ["check", "teardown"] {
        assert_eq!(run_program(&nowhere, &[command]).await.code, Some(1), "{command}");
    }
}

#[tokio::test]
async fn what_is_given_away_is_warned_of() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let settings = || Settings::new(&postgres, &redis);
    let root = check("as whoever runs the tests", &settings(), 0).await.contains("process: this runs as root");
    assert_eq!(root, geteuid().is_root());

    let superuser = settings().text("postgres.url", &postgres.url("postgres"));
    warns("a superuser", &superuser, &["role postgres is a superuser", "002_role.sql"]).await;

    // Counts as another machine but is this one. Nothing listens there; findings about the configuration are printed
    // first.
    let away = |key: &str, url: &str| settings().text(key, url).text("postgres.publication", "none");
    for (key, url, parts) in [
        ("redis.url", "redis://:x@0.0.0.0:1/0", &["redis:", "0.0.0.0", "in clear", "rediss://"][..]),
        ("redis.url", "rediss://:x@0.0.0.0:1/0?insecure", &["redis:", "0.0.0.0", "insecure", "cacert"]),
        ("postgres.url", "postgres://me@0.0.0.0:1/x?connect_timeout=1", &["0.0.0.0", "sslmode=verify-full"]),
        ("postgres.url", "postgres://me@0.0.0.0:1/x?connect_timeout=1&sslmode=require", &["sslmode=verify-full"]),
    ] {
        let ran = run_program(&away(key, url), &["check"]).await;
        has_line(&ran.stdout, "warn", parts);
    }

    for (name, value) in [
        ("PGPASSWORD", postgres_password().to_owned()),
        ("PREFETCHD__POSTGRES__URL", postgres.url("prefetchd")),
        ("PREFETCHD__REDIS__URL", redis.daemon_url()),
    ] {
        let output = check(name, &settings().env(name, &value), 0).await;
        has_line(&output, "warn", &["environment:", name, "password_file"]);
        assert!(![postgres_password(), redis_password()].iter().any(|password| output.contains(password)), "{output}");
    }
}
