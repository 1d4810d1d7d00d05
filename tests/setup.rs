//! Problems that retrying cannot solve: exit code 78, with the object, the problem and a remedy, and never a password.
//! Problems that waiting can solve are waited for.

use crate::harness::{Daemon, Postgres, Ran, Redis, Settings, eventually, psql, run_program, skipped};
use prefetchd::cli::servers::{postgres_password, redis_password};
use std::io::Write;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::net::TcpListener;

/// In URLs of these tests, next to the right password.
const SECRET: &str = "s3cr3t-p4ss";

/// Creates a role that no other test uses, because roles belong to the whole server.
fn role(postgres: &Postgres, attributes: &str) -> String {
    static ROLES: AtomicUsize = AtomicUsize::new(1);
    let role = format!("role_{}", ROLES.fetch_add(1, Ordering::Relaxed));
    psql(&postgres.url("postgres"), &format!("CREATE ROLE {role} LOGIN {attributes}"));
    role
}

fn settings(postgres: &Postgres, redis: &Redis) -> Settings {
    Settings::new(postgres, redis)
}

fn keeps_secrets(ran: &Ran) {
    assert!(
        ![SECRET, postgres_password(), redis_password()].iter().any(|secret| ran.said().contains(secret)),
        "{ran:?}"
    );
}

/// It exits with 78 and prints all of this, on one line that is not a debug print.
async fn refuses(settings: &Settings, parts: &[&str]) {
    let ran = run_program(settings, &["run"]).await;
    assert_eq!(ran.code, Some(78), "{parts:?}: {ran:?}");
    for part in parts {
        assert!(ran.stderr.contains(part), "{part:?} is missing in {}", ran.stderr);
    }
    for debris in ["panicked", "Some(", "Error {", "DbError"] {
        assert!(!ran.stderr.contains(debris), "{debris:?} in {}", ran.stderr);
    }
    keeps_secrets(&ran);
}

/// `check` says the same before anything is started: with a line `fail`, and the exit code.
async fn check_fails(settings: &Settings, parts: &[&str]) {
    let ran = run_program(settings, &["check"]).await;
    assert_eq!(ran.code, Some(78), "{parts:?}: {ran:?}");
    let failures: Vec<&str> = ran.stdout.lines().filter(|line| line.starts_with("fail")).collect();
    assert!(!failures.is_empty(), "{ran:?}");
    for part in parts {
        assert!(ran.stdout.contains(part), "{part:?} is missing in {}", ran.stdout);
    }
    keeps_secrets(&ran);
}

/// The daemon does not start, and `check` says so beforehand.
async fn refuses_and_check_fails(settings: &Settings, parts: &[&str]) {
    refuses(settings, parts).await;
    check_fails(settings, parts).await;
}

fn categories(key: &str, more: &str) -> String {
    format!("[[tables]]\nname = 'categories'\ntable = 'public.categories'\nkey = '{key}'\n{more}\n")
}

const GOOD_KEY: &str = "cache:category:{id}";

#[tokio::test]
async fn settings_that_make_no_sense_are_named() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let good = || settings(&postgres, &redis);
    refuses_and_check_fails(&good().text("cache.tttl", "1h"), &["cache.tttl", "did you mean cache.ttl"]).await;
    refuses(&good().text("chache.ttl", "1h"), &["chache.ttl", "cache.ttl"]).await;
    let variable = good().env("PREFETCHD__CACHE__MAX_STALENES", "30s");
    refuses(&variable, &["PREFETCHD__CACHE__MAX_STALENES", "PREFETCHD__CACHE__MAX_STALENESS"]).await;
    for time in ["5 parsecs", "24", "-1s", "", "0s"] {
        refuses(&good().text("cache.ttl", time), &["cache.ttl"]).await;
    }
    let bad_url = format!("postgres://prefetchd:{SECRET}@[::1/shop");
    refuses_and_check_fails(&good().text("postgres.url", &bad_url), &["postgres.url"]).await;
    for bad in ["http", "redis:/", "redis://h:x"] {
        let bad = format!("{bad}{SECRET}");
        refuses(&good().text("redis.url", &bad), &["redis.url"]).await;
    }
    refuses(&good().text("http.listen", "localhost"), &["http.listen"]).await;
    refuses(&good().text("postgres.slot", "Not-A-Slot"), &["postgres.slot"]).await;
    refuses(&good().text("postgres.password_file", "/nowhere/at/all"), &["postgres.password_file", "/nowhere"]).await;
    refuses(&good().tables(""), &["[[tables]]"]).await;
    refuses(&good().tables("[[tables]]\nname = 'x"), &["TOML"]).await;

    for (key, more, parts) in [
        ("category-{id}", "", &["category-{id}", "\":\""][..]),
        ("{id}", "", &["{id}"]),
        ("cache:category:", "", &["cache:category:"]),
        ("prefetchd:x:{id}", "", &["prefetchd:"]),
        (GOOD_KEY, "colunms = ['id']", &["colunms", "columns"]),
        (GOOD_KEY, "columns = ['name']", &["columns", "id"]),
        (GOOD_KEY, "rename = { name = 'id' }", &["rename", "id"]),
        (GOOD_KEY, "ttl = '5 parsecs'", &["ttl"]),
    ] {
        refuses(&good().tables(&categories(key, more)), parts).await;
    }
    let twice = |name: &str, key: &str| {
        categories(GOOD_KEY, "") + &format!("[[tables]]\nname = '{name}'\ntable = 'public.items'\nkey = '{key}'\n")
    };
    for key in ["cache:category:{id}", "cache:category:sub:{id}", "cache:{id}"] {
        refuses(&good().tables(&twice("items", key)), &["items", "categories"]).await;
    }
    refuses(&good().tables(&twice("categories", "x:{id}")), &["categories"]).await;
    assert_eq!(redis.keys("*").await, [""; 0]);
}

#[tokio::test]
async fn tables_that_cannot_be_followed_are_named() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let good = || settings(&postgres, &redis);
    let table = |name: &str, key: &str| {
        good().tables(&format!("[[tables]]\nname = 'items'\ntable = 'public.{name}'\nkey = '{key}'\n"))
    };
    postgres
        .execute(
            "CREATE TABLE unlisted (id int PRIMARY KEY);
             CREATE TABLE no_identity (id int); CREATE TABLE nothing (id int PRIMARY KEY);
             ALTER TABLE nothing REPLICA IDENTITY NOTHING;
             CREATE TABLE late (id int PRIMARY KEY DEFERRABLE);
             CREATE TABLE wide (a int, b int, v int, PRIMARY KEY (a, b));
             CREATE UNLOGGED TABLE unlogged (id int PRIMARY KEY);
             CREATE VIEW seen AS SELECT * FROM wide;
             CREATE TABLE hidden (id int PRIMARY KEY);
             GRANT SELECT ON unlisted, no_identity, nothing, late, wide, unlogged, seen TO prefetchd;
             ALTER PUBLICATION prefetchd ADD TABLE no_identity, nothing, late, wide, hidden",
        )
        .await;
    postgres
        .execute(
            "CREATE TABLE made (a int, g int GENERATED ALWAYS AS (a * 2) STORED PRIMARY KEY);
             GRANT SELECT ON made TO prefetchd; ALTER PUBLICATION prefetchd ADD TABLE made",
        )
        .await;
    refuses_and_check_fails(&table("made", "i:{g}"), &["of table public.made", "`key`", "is generated"]).await;
    refuses_and_check_fails(&table("nowhere", "i:{id}"), &["public.nowhere", "does not exist", "create it"]).await;
    refuses_and_check_fails(&good().tables(&categories(GOOD_KEY, "columns = ['id', 'nmae']")), &["nmae"]).await;
    refuses_and_check_fails(&good().tables(&categories(GOOD_KEY, "rename = { nmae = 'x' }")), &["nmae"]).await;
    refuses_and_check_fails(&good().tables(&categories("c:{nmae}", "")), &["nmae"]).await;
    refuses_and_check_fails(&good().tables(&categories("c:{name}", "")), &["name", "id"]).await;
    for key in ["i:{a}", "i:{a}:{v}", "i:{a}:{b}:{v}"] {
        refuses(&table("wide", key), &["public.wide", "identified by (a, b)"]).await;
    }
    for name in ["no_identity", "nothing", "late"] {
        let remedy = "REPLICA IDENTITY";
        refuses_and_check_fails(&table(name, "i:{id}"), &[&format!("public.{name}"), remedy]).await;
    }
    refuses(&table("unlogged", "i:{id}"), &["public.unlogged", "unlogged", "SET LOGGED"]).await;
    refuses(&table("seen", "i:{a}:{b}"), &["public.seen", "view"]).await;
    let add = "ALTER PUBLICATION prefetchd ADD TABLE public.unlisted";
    refuses_and_check_fails(&table("unlisted", "i:{id}"), &["public.unlisted", "is not in publication prefetchd", add])
        .await;
    refuses_and_check_fails(&table("hidden", "i:{id}"), &["public.hidden", "GRANT SELECT ON", "prefetchd"]).await;
    let slots = format!("SELECT count(*) FROM pg_replication_slots WHERE database = '{}'", postgres.database());
    assert_eq!(postgres.value(&slots).await.as_deref(), Some("0"), "none of it made a slot");
    assert_eq!(redis.keys("*").await, [""; 0]);
}

#[tokio::test]
async fn publications_and_slots_that_do_not_fit_are_named() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let good = || settings(&postgres, &redis);
    postgres.execute("ALTER PUBLICATION prefetchd SET (publish = 'insert, update')").await;
    let parts = ["publication prefetchd", "delete", "truncate", "ALTER PUBLICATION prefetchd SET (publish ="];
    refuses_and_check_fails(&good(), &parts).await;
    postgres.execute("ALTER PUBLICATION prefetchd SET (publish = 'insert, update, delete, truncate')").await;

    let never = good().set("postgres.create", "false");
    refuses_and_check_fails(&never, &["pg_create_logical_replication_slot", &postgres.slot(), "postgres.create"]).await;
    let other = good().set("postgres.create", "false").text("postgres.publication", "other");
    refuses_and_check_fails(&other, &["publication other", "CREATE PUBLICATION other", "postgres.create"]).await;
    // It may be created, but not by this role.
    refuses(
        &good().text("postgres.publication", "other"),
        &["publication other", "permission denied", "as the owner: CREATE PUBLICATION"],
    )
    .await;

    let (slot, elsewhere) = (postgres.slot(), Postgres::shared());
    for (sql, at) in [
        (format!("SELECT pg_create_logical_replication_slot('{slot}', 'test_decoding')"), &postgres),
        (format!("SELECT pg_create_physical_replication_slot('{slot}')"), &postgres),
        (format!("SELECT pg_create_logical_replication_slot('{slot}', 'pgoutput')"), &elsewhere),
    ] {
        at.execute(&sql).await;
        refuses_and_check_fails(&good(), &[&slot]).await;
        at.execute(&format!("SELECT pg_drop_replication_slot('{slot}')")).await;
    }
    assert_eq!(redis.keys("*").await, [""; 0]);
}

#[tokio::test]
async fn roles_without_the_right_are_told_which() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let with = |role: &str| settings(&postgres, &redis).text("postgres.url", &postgres.url(role));
    let no_replication = role(&postgres, "");
    psql(&postgres.url("postgres"), &format!("GRANT SELECT ON categories TO {no_replication}"));
    refuses_and_check_fails(&with(&no_replication), &["REPLICATION"]).await;
    let no_select = role(&postgres, "REPLICATION");
    refuses_and_check_fails(&with(&no_select), &["public.categories", "GRANT SELECT ON", &no_select]).await;
    psql(&postgres.url("postgres"), &format!("GRANT SELECT (id, name) ON categories TO {no_select}"));
    refuses_and_check_fails(&with(&no_select), &["public.categories", "GRANT SELECT ON"]).await;
    let policies = role(&postgres, "REPLICATION");
    psql(
        &postgres.url("postgres"),
        &format!("GRANT SELECT ON categories TO {policies}; ALTER TABLE categories ENABLE ROW LEVEL SECURITY"),
    );
    refuses_and_check_fails(&with(&policies), &["public.categories", "policies", "BYPASSRLS"]).await;
    refuses_and_check_fails(&with("nobody_at_all"), &["nobody_at_all"]).await;
    let database = postgres.url("prefetchd").replace(postgres.database(), "no_such_database");
    let elsewhere = settings(&postgres, &redis).text("postgres.url", &database);
    refuses_and_check_fails(&elsewhere, &["no_such_database", "postgres.url"]).await;
}

#[tokio::test]
async fn a_server_without_logical_decoding_is_refused() {
    let (postgres, redis) = (Postgres::own(&[("wal_level", "replica")]), Redis::start());
    let parts = ["wal_level = replica", "ALTER SYSTEM SET wal_level = logical", "restart"];
    refuses_and_check_fails(&settings(&postgres, &redis), &parts).await;
}

#[tokio::test]
async fn commits_are_never_made_to_wait_for_us() {
    let names = [("synchronous_standby_names", "*"), ("synchronous_commit", "local")];
    let (postgres, redis) = (Postgres::own(&names), Redis::start());
    refuses_and_check_fails(&settings(&postgres, &redis), &["synchronous_standby_names"]).await;
}

#[tokio::test]
async fn a_password_that_is_refused_at_the_start_ends_it_and_later_does_not() {
    let (postgres, redis) = (Postgres::own(&[]), Redis::start());
    psql(&postgres.url("postgres"), "ALTER ROLE prefetchd PASSWORD 'right'");
    let bare = postgres.bare_url("prefetchd");
    let bare_settings = || settings(&postgres, &redis).text("postgres.url", &bare);
    let with = |password: &str| {
        let url = bare.replace('@', &format!(":{password}@"));
        Settings::new(&postgres, &redis).text("postgres.url", &url)
    };
    refuses_and_check_fails(&with(SECRET), &["password", "prefetchd"]).await;
    refuses(&bare_settings(), &["password"]).await;
    // From elsewhere than the URL.
    let from_env = bare_settings().env("PGPASSWORD", SECRET);
    refuses(&from_env, &["password"]).await;
    let mut file = tempfile::NamedTempFile::new().unwrap();
    writeln!(file, "right").unwrap();
    let from_file = bare_settings().text("postgres.password_file", file.path().to_str().unwrap());
    let daemon = Daemon::with(&from_file).await;
    daemon.ready().await;
    daemon.allow_warnings();

    // Changed while it runs: it continues as long as it has its connections, then keeps retrying.
    psql(&postgres.url("postgres"), &format!("ALTER ROLE prefetchd PASSWORD '{SECRET}'"));
    psql(
        &postgres.url("postgres"),
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'prefetchd'",
    );
    let refused =
        |status: &serde_json::Value| status["waiting_for"].as_str().is_some_and(|waiting| waiting.contains("password"));
    let status = daemon.status_when("refused", refused).await;
    assert_eq!(status["state"], "stalled", "{status}");
    assert_eq!(daemon.get("/readyz").await.status, 503);
    assert_eq!(daemon.get("/v1/tables/categories/cat-001").await.status, 200);
    daemon.logged("ERROR").await;
    assert_eq!(daemon.said("ERROR"), 1, "{}", daemon.log_text());
    psql(&postgres.url("postgres"), "ALTER ROLE prefetchd PASSWORD 'right'");
    daemon.ready().await;
    assert_eq!(daemon.status().await["primary_reads"], 1);
    assert!(!daemon.log_text().contains(SECRET) && !daemon.log_text().contains("right"), "{}", daemon.log_text());
}

#[tokio::test]
async fn a_redis_that_refuses_the_password_is_refused() {
    let postgres = Postgres::shared();
    let redis = Redis::start();
    let with = |password: &str| {
        let url = redis.bare_url().replace("redis://", &format!("redis://:{password}@"));
        settings(&postgres, &redis).text("redis.url", &url)
    };
    refuses_and_check_fails(&with(SECRET), &["redis", "password"]).await;
    // The user can log in, but has no right to this slot's keys.
    redis.command::<()>(&["ACL", "SETUSER", "keyless", "on", &format!(">{SECRET}"), "+@all"]).await;
    let keyless = redis.bare_url().replace("://", &format!("://keyless:{SECRET}@"));
    refuses(
        &settings(&postgres, &redis).text("redis.url", &keyless),
        &["redis", "NOPERM", "prefetchd check names the rights"],
    )
    .await;
    let daemon = Daemon::with(&with(redis_password())).await;
    daemon.ready().await;
    let ran = run_program(&with(redis_password()), &["config"]).await;
    assert!(ran.code == Some(0) && ran.stdout.contains("***"), "{ran:?}");
    keeps_secrets(&ran);
}

#[tokio::test]
async fn another_databases_checkpoint_is_adopted_on_request_only() {
    let (one, two, redis) = (Postgres::shared(), Postgres::shared(), Redis::start());
    let slot = one.slot();
    let daemon = Daemon::with(&Settings::new(&one, &redis)).await;
    daemon.ready().await;
    assert_eq!(daemon.stop().await, Some(0));
    one.execute(&format!("SELECT pg_drop_replication_slot('{slot}')")).await;
    two.execute(
        "UPDATE categories SET name = 'of the other' WHERE id = 'cat-001'; DELETE FROM categories WHERE id = 'cat-002'",
    )
    .await;

    let other = || settings(&two, &redis).text("postgres.slot", &slot);
    let parts = [one.database(), two.database(), "--adopt"];
    refuses_and_check_fails(&other(), &parts).await;
    assert_eq!(redis.hash("cache:category:cat-001").await["name"], "Beverages", "it was left alone");
    let daemon = Daemon::with(&other().arg("--adopt")).await;
    daemon.allow_warnings();
    daemon.ready().await;
    assert_eq!(redis.keys("cache:*").await.len(), 4);
    assert_eq!(redis.hash("cache:category:cat-001").await["name"], "of the other");
    assert_eq!(daemon.stop().await, Some(0));
    // From now on it belongs to this daemon.
    let daemon = Daemon::with(&other()).await;
    daemon.ready().await;
    assert_eq!(daemon.status().await["primary_reads"], 0);
}

#[tokio::test]
async fn what_is_missing_and_may_be_made_is_made() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let owner = role(&postgres, "REPLICATION");
    psql(
        &postgres.url("postgres"),
        &format!(
            "DROP PUBLICATION prefetchd; GRANT CREATE ON DATABASE {} TO {owner};
             CREATE TABLE items (id int PRIMARY KEY); INSERT INTO items VALUES (1);
             ALTER TABLE items OWNER TO {owner}; ALTER TABLE categories OWNER TO {owner}",
            postgres.database()
        ),
    );
    let with = |tables: &str| settings(&postgres, &redis).text("postgres.url", &postgres.url(&owner)).tables(tables);
    let ran = run_program(&with(&categories(GOOD_KEY, "")), &["check"]).await;
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let daemon = Daemon::with(&with(&categories(GOOD_KEY, ""))).await;
    daemon.ready().await;
    assert_eq!(daemon.stop().await, Some(0));
    // A table is added to the publication that the daemon created.
    let items = categories(GOOD_KEY, "") + "[[tables]]\nname = 'items'\ntable = 'public.items'\nkey = 'item:{id}'";
    let daemon = Daemon::with(&with(&items)).await;
    daemon.ready().await;
    let lsn =
        postgres.execute("INSERT INTO items VALUES (2); UPDATE categories SET name = 'x' WHERE id = 'cat-001'").await;
    daemon.applied(lsn).await;
    assert_eq!(redis.keys("item:*").await, ["item:1", "item:2"]);
    assert_eq!(redis.hash("cache:category:cat-001").await["name"], "x");
    assert_eq!(daemon.status().await["primary_reads"], 1);
}

#[tokio::test]
async fn a_transaction_in_the_way_of_the_slot_is_named_by_its_pid() {
    let (postgres, redis) = (Postgres::own(&[]), Redis::start());
    let client = postgres.client().await;
    client.batch_execute("BEGIN; UPDATE categories SET name = 'uncommitted' WHERE id = 'cat-001'").await.unwrap();
    let pid: i32 = client.query_one("SELECT pg_backend_pid()", &[]).await.unwrap().get(0);
    let daemon = Daemon::start(&postgres, &redis).await;
    let named = |status: &serde_json::Value| {
        status["waiting_for"].as_str().is_some_and(|waiting| waiting.contains(&pid.to_string()))
    };
    let status = daemon.status_when("the pid is named", named).await;
    assert_eq!(status["state"], "connecting", "{status}");
    assert!(daemon.logged("slot creation waits").await.to_string().contains(&pid.to_string()));
    let ready = daemon.get("/readyz").await;
    assert!(ready.status == 503 && ready.body.contains(&pid.to_string()), "{ready:?}");
    client.batch_execute("COMMIT").await.unwrap();
    daemon.ready().await;
    assert_eq!(redis.hash("cache:category:cat-001").await["name"], "uncommitted");
    assert_eq!(daemon.said("slot creation waits"), 1, "{}", daemon.log_text());
}

#[tokio::test]
async fn a_prepared_transaction_in_the_way_is_named_by_its_gid() {
    let (postgres, redis) = (Postgres::own(&[("max_prepared_transactions", "2")]), Redis::start());
    postgres
        .execute("BEGIN; UPDATE categories SET name = 'prepared' WHERE id = 'cat-001'; PREPARE TRANSACTION 'the-gid'")
        .await;
    let daemon = Daemon::start(&postgres, &redis).await;
    let named = |status: &serde_json::Value| status["waiting_for"].as_str().is_some_and(|w| w.contains("the-gid"));
    daemon.status_when("the gid is named", named).await;
    postgres.execute("COMMIT PREPARED 'the-gid'").await;
    daemon.ready().await;
    assert_eq!(redis.hash("cache:category:cat-001").await["name"], "prepared");
}

#[tokio::test]
async fn a_daemon_that_waits_for_its_slot_can_be_stopped() {
    let (postgres, redis) = (Postgres::own(&[]), Redis::start());
    let client = postgres.client().await;
    client.batch_execute("BEGIN; UPDATE categories SET name = 'uncommitted' WHERE id = 'cat-001'").await.unwrap();
    let daemon = Daemon::start(&postgres, &redis).await;
    daemon.logged("slot creation waits").await;
    assert_eq!(daemon.stop().await, Some(0));
    client.batch_execute("COMMIT").await.unwrap();
    // The unfinished slot is dropped, and the next start creates its own.
    let daemon = Daemon::start(&postgres, &redis).await;
    daemon.ready().await;
    let slots = postgres.value("SELECT count(*) FROM pg_replication_slots").await;
    assert_eq!(slots.as_deref(), Some("1"));
}

#[tokio::test]
async fn a_port_that_is_taken_is_a_failure_at_work() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let ran = run_program(&settings(&postgres, &redis).text("http.listen", &address), &["run"]).await;
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert!(ran.stderr.contains(&address), "{ran:?}");
    keeps_secrets(&ran);
}

/// What breaks later stops that table only, and is fixed without a restart.
#[tokio::test]
async fn a_table_that_is_dropped_later_stops_no_other() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    postgres
        .execute(
            "CREATE TABLE items (id int PRIMARY KEY, v text); INSERT INTO items VALUES (1, 'a');
             GRANT SELECT ON items TO prefetchd; ALTER PUBLICATION prefetchd ADD TABLE items",
        )
        .await;
    let items = categories(GOOD_KEY, "") + "[[tables]]\nname = 'items'\ntable = 'public.items'\nkey = 'item:{id}'";
    let daemon = Daemon::with(&settings(&postgres, &redis).real_timing().tables(&items)).await;
    daemon.allow_warnings();
    daemon.ready().await;
    postgres.execute("DROP TABLE items").await;
    let lsn = postgres.execute("UPDATE categories SET name = 'x' WHERE id = 'cat-001'").await;
    daemon.applied(lsn).await;
    assert_eq!(redis.hash("cache:category:cat-001").await["name"], "x");
    // Within the 15 s in which schema changes must be noticed.
    let answer = eventually("it shows", async || daemon.get("/readyz").await, |answer| answer.status == 503).await;
    assert!(answer.body.contains("items") && !answer.body.contains("categories"), "{answer:?}");
    assert_eq!(daemon.get("/v1/tables/categories/cat-001").await.status, 200);
    postgres
        .execute(
            "CREATE TABLE items (id int PRIMARY KEY, v text); INSERT INTO items VALUES (2, 'b');
             GRANT SELECT ON items TO prefetchd; ALTER PUBLICATION prefetchd ADD TABLE items",
        )
        .await;
    daemon.ready().await;
    assert_eq!(redis.keys("item:*").await, ["item:2"]);
}

/// Since Postgres 17.
#[tokio::test]
async fn a_failover_slot_is_made_where_one_is_asked_for() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let version = postgres.value("SHOW server_version_num").await.unwrap().parse::<u32>().unwrap();
    if version < 170_000 {
        skipped(format_args!("Postgres {} has no failover slots", version / 10_000));
        return;
    }
    let daemon = Daemon::with(&Settings::new(&postgres, &redis).set("postgres.failover", "true")).await;
    daemon.ready().await;
    let sql = format!("SELECT failover FROM pg_replication_slots WHERE slot_name = '{}'", postgres.slot());
    assert_eq!(postgres.value(&sql).await.as_deref(), Some("t"));
    let lsn = postgres.execute("UPDATE categories SET name = 'Drinks' WHERE id = 'cat-001'").await;
    daemon.applied(lsn).await;
    assert_eq!(redis.hash("cache:category:cat-001").await["name"], "Drinks");
}

/// Since Postgres 18.
#[tokio::test]
async fn a_slot_that_idled_for_too_long_is_made_anew() {
    let (postgres, redis) = (Postgres::own(&[]), Redis::start());
    let version = postgres.value("SHOW server_version_num").await.unwrap().parse::<u32>().unwrap();
    if version < 180_000 {
        skipped(format_args!("Postgres {} lets slots idle", version / 10_000));
        return;
    }
    let settings = Settings::new(&postgres, &redis);
    let daemon = Daemon::with(&settings).await;
    daemon.ready().await;
    assert_eq!(daemon.stop().await, Some(0));
    postgres.execute("ALTER SYSTEM SET idle_replication_slot_timeout = '1s'").await;
    postgres.execute("SELECT pg_reload_conf()").await;
    let reason = async || {
        postgres.execute("UPDATE categories SET name = 'unheard of' WHERE id = 'cat-001'").await;
        postgres.execute("CHECKPOINT").await;
        postgres.value("SELECT invalidation_reason FROM pg_replication_slots").await
    };
    eventually("given up", reason, |reason| reason.as_deref() == Some("idle_timeout")).await;
    let daemon = Daemon::with(&settings).await;
    daemon.allow_warning("loading every table again");
    daemon.ready().await;
    assert!(daemon.status().await.to_string().contains("nobody read it for longer than idle_replication_slot_timeout"));
    assert_eq!(redis.hash("cache:category:cat-001").await["name"], "unheard of");
    assert_eq!(daemon.metrics().await[r#"prefetchd_heals_total{reason="slot_lost"}"#], 1.0);
}
