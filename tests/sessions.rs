//! Sessions that are not what their login asked for, and servers that speak another language.

use crate::harness::pooler::Pooler;
use crate::harness::{Daemon, Postgres, Redis, Settings, psql, run_program};
use prefetchd::lsn::EndLsn;
use prefetchd::source::target::PostgresTarget;
use prefetchd::source::wire::ReplicationConnection;
use std::collections::HashMap;

/// Both end with 78 and say all of this in one line.
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

/// As its error message in default settings leads people to configure it: the loads would then write other text than the
/// stream.
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
    // The ordinary sessions are as they must be, and the replication session is an ordinary one.
    let pinned = prefetchd::source::connect::SESSION_OPTIONS.iter();
    let set: Vec<String> = pinned.map(|(name, value)| format!("ALTER ROLE prefetchd SET {name} = '{value}'")).collect();
    let own = Postgres::own(&[]);
    psql(&own.url("postgres"), &set.join(";"));
    let Some(pooler) = Pooler::start(&own, "ignore_startup_parameters = options, replication").await else { return };
    let settings = Settings::new(&own, &redis).text("postgres.url", pooler.url());
    names_the_pooler(&settings, &["IDENTIFY_SYSTEM"]).await;
    assert_eq!(redis.keys("*").await, [""; 0], "nothing was made");
    let slots = format!("SELECT count(*) FROM pg_replication_slots WHERE slot_name = '{}'", postgres.slot());
    assert_eq!(postgres.value(&slots).await.as_deref(), Some("0"));
}

/// Whether the servers of this machine can speak German.
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

/// The pid is the catalog's: the message has it in the middle of a sentence in some languages.
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
