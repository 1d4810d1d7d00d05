//! Sessions that are not what their login asked for, and servers that speak another language.

use crate::harness::pooler::Pooler;
use crate::harness::{Daemon, Postgres, Redis, Settings, Stop, eventually, post, psql, run_program};
use prefetchd::lsn::EndLsn;
use prefetchd::source::target::PostgresTarget;
use prefetchd::source::wire::ReplicationConnection;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::time::Duration;
use tokio_postgres::NoTls;

/// Both exit with 78 and print all of this on one line.
async fn names_the_pooler(settings: &Settings, parts: &[&str]) {
    for command in ["check", "run"] {
        let ran = run_program(settings, &[command]).await;
        assert_eq!(ran.code, Some(78), "{command}: {ran:?}");
        let names_it = |line: &str| line.contains("a pooler stands between: connect to Postgres itself");
        let said = ran.said();
        let line = said.lines().find(|line| names_it(line)).unwrap_or_else(|| panic!("{command}: {ran:?}"));
        for part in parts {
            assert!(line.contains(part), "{command}: {part:?} is missing in {line}");
        }
    }
}

/// As its error message in the default configuration suggests. Loads would then write different text than the stream.
#[tokio::test]
async fn a_pooler_is_recognised_and_named() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let name = postgres.database();
    postgres.execute(&format!("ALTER DATABASE {name} SET TimeZone = 'Europe/Berlin'")).await;
    let settings = |pooler: &Pooler| Settings::new(&postgres, &redis).text("postgres.url", pooler.url());
    let Some(pooler) = Pooler::start(&postgres, "").await else { return };
    names_the_pooler(&settings(&pooler), &["refused the login", "unsupported startup parameter", "08P01"]).await;
    for mode in ["session", "transaction"] {
        let ignoring = format!("pool_mode = {mode}\nignore_startup_parameters = options");
        let Some(pooler) = Pooler::start(&postgres, &ignoring).await else { return };
        names_the_pooler(&settings(&pooler), &["TimeZone = 'Europe/Berlin'", "'UTC'"]).await;
    }
    // The ordinary sessions are as required, but the replication session is an ordinary one.
    let pinned = prefetchd::source::settings::SESSION_OPTIONS.iter();
    let set =
        |(name, value): &(&str, &str)| format!("ALTER ROLE prefetchd SET {name} = '{}'", value.replace(", ", "', '"));
    let set: Vec<String> = pinned.map(set).collect();
    let own = Postgres::own(&[]);
    psql(&own.url("postgres"), &set.join(";"));
    let Some(pooler) = Pooler::start(&own, "ignore_startup_parameters = options, replication").await else { return };
    let settings = Settings::new(&own, &redis).text("postgres.url", pooler.url());
    names_the_pooler(&settings, &["IDENTIFY_SYSTEM"]).await;
    assert_eq!(redis.keys("*").await, [""; 0], "nothing was made");
    let slots = format!("SELECT count(*) FROM pg_replication_slots WHERE slot_name = '{}'", postgres.slot());
    assert_eq!(postgres.value(&slots).await.as_deref(), Some("0"));
}

/// Whether the servers of this machine have German messages.
fn speaks_german() -> bool {
    let known = std::process::Command::new("locale").arg("-a").output().map(|output| output.stdout).unwrap_or_default();
    let speaks = String::from_utf8_lossy(&known).lines().any(|name| name.eq_ignore_ascii_case("de_DE.utf8"));
    if !speaks {
        println!("skipped: there is no locale de_DE.UTF-8");
    }
    speaks
}

#[tokio::test]
async fn a_publication_made_again_is_followed_whatever_language_the_server_speaks() {
    if !speaks_german() {
        return;
    }
    let (postgres, redis) = (Postgres::own(&[("lc_messages", "de_DE.UTF-8")]), Redis::start());
    let settings = Settings::new(&postgres, &redis);
    let mut daemon = Daemon::with(&settings).await;
    for (id, restarts) in [("de-1", false), ("de-2", true)] {
        daemon.allow_warnings();
        daemon.ready().await;
        postgres.execute("DROP PUBLICATION prefetchd").await;
        postgres.execute(&format!("INSERT INTO categories VALUES ('{id}', 'Neu', 1, false, NULL)")).await;
        daemon.status_when("stalled", |status| status["state"] == "stalled").await;
        daemon.logged("Publikation »prefetchd« existiert nicht").await;
        let again = "CREATE PUBLICATION prefetchd FOR TABLE categories";
        if restarts {
            assert_eq!(daemon.stop().await, Some(0));
            postgres.execute(again).await;
            daemon = Daemon::with(&settings).await;
            daemon.allow_warnings();
            daemon.logged("Publikation »prefetchd« existiert nicht").await;
        } else {
            postgres.execute(again).await;
        }
        daemon.logged("slot created").await;
        daemon.ready().await;
        assert_eq!(redis.hash(&format!("cache:category:{id}")).await["name"], "Neu");
        let lsn = postgres.execute("UPDATE categories SET display_order = display_order + 1").await;
        daemon.applied(lsn).await;
    }
}

/// The PID is taken from the catalog, because some languages have it in the middle of the message.
#[tokio::test]
async fn who_holds_the_slot_is_known_whatever_language_the_server_speaks() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let daemon = Daemon::start(&postgres, &redis).await;
    daemon.ready().await;
    let target = PostgresTarget::parse(&postgres.url("prefetchd"), &HashMap::new()).unwrap();
    let second = ReplicationConnection::connect(&target, "second").await.unwrap();
    let from = EndLsn(postgres.confirmed().await);
    let Err(error) = second.start(&postgres.slot(), "prefetchd", from).await else { panic!("two readers of one slot") };
    let sql = format!("SELECT active_pid FROM pg_replication_slots WHERE slot_name = '{}'", postgres.slot());
    let pid = postgres.value(&sql).await.unwrap();
    assert!(error.to_string().contains(&format!("in use by pid {pid}")), "{error}");
}

/// About 200 pages, which two connections read concurrently.
async fn grown(postgres: &Postgres) {
    let rows = "SELECT 'n-' || n, repeat('x', 100), n, false, NULL FROM generate_series(1, 10000) n";
    postgres.execute(&format!("INSERT INTO categories {rows}")).await;
}

async fn walsender(postgres: &Postgres) -> Option<String> {
    postgres.value("SELECT active_pid FROM pg_replication_slots").await
}

/// Terminates every connection of the daemon except the stream's, and returns how many.
const END_HELPERS: &str = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
    WHERE usename = 'prefetchd' AND pid NOT IN (SELECT pid FROM pg_stat_replication)";

/// It has compared every row, and the stream never noticed anything.
async fn verifies(daemon: &Daemon, postgres: &Postgres, stream: &Option<String>) {
    let verified = daemon.operate("verify", &json!({"repair": false})).await;
    assert_eq!(verified.status, 200, "{verified:?}\n{}", daemon.log_text());
    let found = verified.json();
    assert_eq!((&found["rows"], &found["missing"], &found["stale"]), (&json!(10005), &json!(0), &json!(0)), "{found}");
    never_torn(daemon, postgres, stream).await;
}

async fn never_torn(daemon: &Daemon, postgres: &Postgres, stream: &Option<String>) {
    assert_eq!(walsender(postgres).await, *stream, "{}", daemon.log_text());
    assert_eq!(daemon.metrics().await[r#"prefetchd_reconnects_total{peer="postgres"}"#], 0.0);
}

#[tokio::test]
async fn a_connection_limit_or_a_lost_connection_beside_the_stream_ends_no_stream() {
    let (postgres, redis) = (Postgres::own(&[]), Redis::start());
    let daemon = Daemon::start(&postgres, &redis).await;
    daemon.allow_warning("no further connection to postgres");
    daemon.ready().await;
    grown(&postgres).await;
    daemon.applied(postgres.position().await).await;
    let stream = walsender(&postgres).await;
    // Idle ones are terminated, as a load balancer does.
    assert_ne!(postgres.value(END_HELPERS).await.as_deref(), Some("0"));
    verifies(&daemon, &postgres, &stream).await;
    // Enough for the stream, the sampler and one reader.
    postgres.execute("ALTER ROLE prefetchd CONNECTION LIMIT 3").await;
    verifies(&daemon, &postgres, &stream).await;
    assert_ne!(postgres.value(END_HELPERS).await.as_deref(), Some("0"));
    verifies(&daemon, &postgres, &stream).await;
    // Repeatedly while it reads.
    postgres.execute("ALTER ROLE prefetchd CONNECTION LIMIT -1").await;
    let url = postgres.url("postgres");
    let blows = tokio::spawn(async move {
        let (client, connection) = tokio_postgres::connect(&url, NoTls).await.unwrap();
        tokio::spawn(connection);
        let mut ended = 0;
        // A limited number, because on a busy machine a chunk may take longer than the pause.
        for _ in 0..5 {
            tokio::time::sleep(Duration::from_millis(500)).await;
            ended += client.query_one(END_HELPERS, &[]).await.unwrap().get::<_, i64>(0);
        }
        ended
    });
    verifies(&daemon, &postgres, &stream).await;
    assert!(blows.await.unwrap() > 0);
    daemon.ready().await;
    // What loads were working on is in the stream's state.
    let lsn = postgres.execute("UPDATE categories SET display_order = -1 WHERE id LIKE 'n-%'").await;
    daemon.applied(lsn).await;
    let refetched = daemon.operate("refetch", &json!({})).await.json();
    assert_eq!((&refetched["loaded"], &refetched["repaired"]), (&json!(10005), &json!(0)), "{refetched}");
    never_torn(&daemon, &postgres, &stream).await;
}

#[tokio::test]
async fn a_comparison_that_gets_no_connection_is_given_up() {
    let (postgres, redis) = (Postgres::own(&[]), Redis::start());
    let daemon = Daemon::start(&postgres, &redis).await;
    daemon.allow_warning("no further connection to postgres");
    daemon.allow_warning("was given up, the table stays as it is");
    daemon.ready().await;
    grown(&postgres).await;
    daemon.applied(postgres.position().await).await;
    let stream = walsender(&postgres).await;
    postgres.execute("ALTER ROLE prefetchd CONNECTION LIMIT 0").await;
    assert_ne!(postgres.value(END_HELPERS).await.as_deref(), Some("0"));
    let refused = daemon.operate("verify", &json!({})).await;
    assert_eq!(refused.refusal(), (503, "not_compared".to_owned()), "{refused:?}");
    assert!(refused.body.contains("no connection to postgres was free for 30 s"), "{refused:?}");
    postgres.execute("ALTER ROLE prefetchd CONNECTION LIMIT -1").await;
    verifies(&daemon, &postgres, &stream).await;
}

/// The first of two hosts is down at startup, and comes back as a different server.
#[tokio::test]
async fn connections_beside_the_stream_go_to_its_own_host() {
    let (postgres, mut other, redis) = (Postgres::own(&[]), Postgres::own(&[]), Redis::start());
    other.stop(Stop::Fast);
    let own = format!("127.0.0.1:{}", postgres.port());
    let url = postgres.url("prefetchd").replace(&own, &format!("127.0.0.1:{},{own}", other.port()));
    let daemon = Daemon::with(&Settings::new(&postgres, &redis).text("postgres.url", &url)).await;
    daemon.ready().await;
    grown(&postgres).await;
    daemon.applied(postgres.position().await).await;
    let stream = walsender(&postgres).await;
    other.start_again();
    assert_ne!(postgres.value(END_HELPERS).await.as_deref(), Some("0"));
    verifies(&daemon, &postgres, &stream).await;
}

#[tokio::test]
async fn a_server_without_a_free_connection_delays_a_verify_and_not_the_stream() {
    let (postgres, redis) = (Postgres::own(&[("max_connections", "20")]), Redis::start());
    let daemon = Daemon::start(&postgres, &redis).await;
    daemon.allow_warning("no further connection to postgres");
    daemon.ready().await;
    grown(&postgres).await;
    daemon.applied(postgres.position().await).await;
    let (stream, client) = (walsender(&postgres).await, postgres.client().await);
    // An application takes all connections, and the daemon keeps the stream's and the sampler's.
    let beside = "FROM pg_stat_activity WHERE application_name LIKE 'prefetchd_%' AND backend_type = 'client backend'
        AND query NOT LIKE '%pg_current_wal_flush_lsn%'";
    let mut taken = Vec::new();
    loop {
        client.query(&format!("SELECT pg_terminate_backend(pid) {beside}"), &[]).await.unwrap();
        while let Ok((client, connection)) = tokio_postgres::connect(&postgres.url("prefetchd"), NoTls).await {
            tokio::spawn(connection);
            taken.push(client);
        }
        let left = client.query_one(&format!("SELECT count(*) {beside}"), &[]).await.unwrap();
        // A connection that ends no longer counts, and can be reused a moment later.
        tokio::time::sleep(Duration::from_millis(300)).await;
        match tokio_postgres::connect(&postgres.url("prefetchd"), NoTls).await {
            Ok((client, connection)) => {
                tokio::spawn(connection);
                taken.push(client);
            }
            Err(_) if left.get::<_, i64>(0) == 0 => break,
            Err(_) => {}
        }
    }
    let (address, token) = (daemon.address(), daemon.authorization());
    let verify = tokio::spawn(async move {
        let headers = ["Content-Type: application/json", &token];
        post(address, "/v1/admin/verify", &headers, r#"{"repair": false}"#).await.unwrap()
    });
    let names_the_limit = |status: &Value| {
        status["waiting_for"].as_str().is_some_and(|waiting| waiting.contains("max_connections leaves"))
    };
    let status = daemon.status_when("the limit is named", names_the_limit).await;
    assert_eq!(status["verdict"]["level"], "warning", "{status}");
    assert!(status["verdict"]["text"].as_str().unwrap().contains("max_connections leaves"), "{status}");
    client.batch_execute("UPDATE categories SET name = 'Drinks' WHERE id = 'cat-001'").await.unwrap();
    eventually("applied", async || redis.hash("cache:category:cat-001").await["name"].clone(), |name| name == "Drinks")
        .await;
    assert_eq!(daemon.get("/readyz").await.status, 200);
    assert!(!verify.is_finished());
    let checked = run_program(&Settings::new(&postgres, &redis), &["check"]).await;
    assert_eq!(checked.code, Some(1), "{checked:?}");
    assert!(checked.stdout.contains("max_connections leaves 17 connections for this role"), "{checked:?}");
    drop(taken);
    let verified = verify.await.unwrap();
    assert_eq!((verified.status, &verified.json()["rows"]), (200, &json!(10005)), "{verified:?}");
    daemon.status_when("nothing is waited for", |status| status["waiting_for"].is_null()).await;
    never_torn(&daemon, &postgres, &stream).await;
}

/// Each remedy is the one that was printed.
#[tokio::test]
async fn limits_that_leave_too_few_connections_are_told_with_their_remedy() {
    let (postgres, redis) = (Postgres::own(&[]), Redis::start());
    let settings = Settings::new(&postgres, &redis);
    for (of, to) in [("ROLE prefetchd", "role prefetchd"), ("DATABASE shop", "database shop")] {
        for (limit, level, code) in [(2, "fail", 78), (4, "warn", 0)] {
            postgres.execute(&format!("ALTER {of} CONNECTION LIMIT {limit}")).await;
            let checked = run_program(&settings, &["check"]).await;
            assert_eq!(checked.code, Some(code), "{of} {limit}: {checked:?}");
            let fact = format!("the connection limit of {to} is {limit}");
            let line = checked.stdout.lines().find(|line| line.starts_with(level) && line.contains(&fact));
            let (_, remedy) = line.unwrap_or_else(|| panic!("{checked:?}")).rsplit_once(": ").unwrap();
            assert!(remedy.starts_with("ALTER "), "{remedy}");
            postgres.execute(&remedy[..=remedy.rfind(';').unwrap()]).await;
            let checked = run_program(&settings, &["check", "--all"]).await;
            assert!(checked.code == Some(0) && checked.stdout.contains("has enough free connections"), "{checked:?}");
        }
    }
}
