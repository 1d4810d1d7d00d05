//! The commands that `check`, `run` and `teardown` suggest work when pasted, whatever the names of the objects.

use crate::harness::{Daemon, Postgres, Ran, Redis, Settings, psql, run_program};
use prefetchd::cli::servers::{callable, postgres_password, redis_password};
use prefetchd::code::Code;
use prefetchd::remedy::Sql;
use std::process::Command;

const DATABASE: &str = "Shöp \"1\"";
const ROLE: &str = "O'Brien \"x\"";
const PUBLICATION: &str = "Pub-1";
/// How statements begin.
const BEGINNINGS: [&str; 8] = [
    "ALTER SYSTEM ",
    "ALTER PUBLICATION ",
    "ALTER TABLE ",
    "ALTER ROLE ",
    "CREATE PUBLICATION ",
    "DROP PUBLICATION ",
    "GRANT ",
    "SELECT pg_",
];

/// Returns the statements in a line: from the beginning of the first to the last semicolon.
fn statements(line: &str) -> Option<&str> {
    let begin = BEGINNINGS.iter().filter_map(|beginning| line.find(beginning)).min()?;
    let end = line.rfind(';').unwrap_or_else(|| panic!("a statement without an end: {line}"));
    Some(&line[begin..=end])
}

fn encoded(text: &str) -> String {
    text.bytes()
        .map(|b| if b.is_ascii_alphanumeric() { char::from(b).to_string() } else { format!("%{b:02X}") })
        .collect()
}

struct Scene {
    postgres: Postgres,
    redis: Redis,
    /// As superuser, in the database of that name.
    url: String,
}

impl Scene {
    fn new() -> Self {
        let (postgres, redis) = (Postgres::own(&[]), Redis::start());
        psql(&postgres.url("postgres"), "CREATE DATABASE \"Shöp \"\"1\"\"\"");
        let url =
            format!("postgres://postgres:{}@127.0.0.1:{}/{}", postgres_password(), postgres.port(), encoded(DATABASE));
        psql(
            &url,
            r#"CREATE ROLE "O'Brien ""x""" LOGIN; CREATE SCHEMA "My Schema";
             CREATE TABLE "My Schema"."User" ("Id" int NOT NULL, "a b" text, "order" text DEFAULT 'o', UNIQUE ("Id"));
             INSERT INTO "My Schema"."User" VALUES (1, 'x');
             ALTER TABLE "My Schema"."User" REPLICA IDENTITY NOTHING;
             ALTER TABLE "My Schema"."User" ENABLE ROW LEVEL SECURITY;
             CREATE TABLE "My Schema"."Whole 2" ("Id" int, "K" int, PRIMARY KEY ("Id", "K")) PARTITION BY RANGE ("Id");
             CREATE TABLE "My Schema"."Part 'p'" PARTITION OF "My Schema"."Whole 2" FOR VALUES FROM (0) TO (100);
             INSERT INTO "My Schema"."Whole 2" VALUES (1, 2);
             ALTER TABLE "My Schema"."Part 'p'" REPLICA IDENTITY NOTHING"#,
        );
        Self { postgres, redis, url }
    }

    fn settings(&self) -> Settings {
        let login = format!("{}:{}", encoded(ROLE), postgres_password());
        let role = format!("postgres://{login}@127.0.0.1:{}/{}", self.postgres.port(), encoded(DATABASE));
        Settings::new(&self.postgres, &self.redis)
            .text("postgres.url", &role)
            .text("postgres.publication", PUBLICATION)
            .set("postgres.create", "false")
            .text("log.format", "text")
            .tables(
                r#"
[[tables]]
name = "users"
table = "\"My Schema\".\"User\""
key = "it's \"us\" *:{Id}"
columns = ["Id", "a b"]
[[tables]]
name = "whole"
table = "\"My Schema\".\"Whole 2\""
key = "whole:{Id}:{K}"
"#,
            )
    }

    async fn check(&self) -> Ran {
        run_program(&self.settings(), &["check"]).await
    }

    /// Pastes what the failures suggest, until there are none.
    async fn paste_until_good(&self) -> Vec<String> {
        let mut pasted: Vec<String> = Vec::new();
        for _ in 0..20 {
            let checked = self.check().await;
            if checked.code == Some(0) {
                return pasted;
            }
            let failures = checked.stdout.lines().filter(|line| line.starts_with("fail"));
            let mut new = 0;
            for line in failures {
                let statements = statements(line).unwrap_or_else(|| panic!("no statement in {line}"));
                assert!(!pasted.iter().any(|old| old == statements), "it was pasted, and did not help: {line}");
                psql(&self.url, statements);
                pasted.push(statements.to_owned());
                new += 1;
            }
            assert!(new > 0, "{checked:?}");
        }
        panic!("there is always another failure: {pasted:?}");
    }

    /// The same problem is reported by `run`, too, with a statement that can be pasted.
    async fn run_says(&self, fault: &str) -> String {
        let ran = run_program(&self.settings(), &["run"]).await;
        assert_eq!(ran.code, Some(78), "{fault}: {ran:?}");
        let line = ran.stderr.lines().last().unwrap_or_default();
        statements(line).unwrap_or_else(|| panic!("{fault}: no statement in {ran:?}")).to_owned()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_statement_runs_when_it_is_pasted() {
    let scene = Scene::new();
    // From nothing to a working setup, following the suggestions only.
    let pasted = scene.paste_until_good().await.join("\n");
    for part in [
        "REPLICATION;",
        "GRANT USAGE ON SCHEMA \"My Schema\"",
        "GRANT SELECT (\"Id\", \"a b\") ON",
        "GRANT SELECT ON \"My Schema\".\"Whole 2\"",
        "BYPASSRLS;",
        "REPLICA IDENTITY DEFAULT;",
        "USING INDEX",
        "CREATE PUBLICATION \"Pub-1\"",
        "SELECT pg_create_logical_replication_slot(",
    ] {
        assert!(pasted.contains(part), "{part} in\n{pasted}");
    }
    let daemon = Daemon::with(&scene.settings().text("log.format", "json")).await;
    // The slot existed before the checkpoint.
    daemon.allow_warning("loading every table again");
    daemon.ready().await;
    assert_eq!(scene.redis.keys("*:1*").await, ["it's \"us\" *:1", "whole:1:2"]);
    assert_eq!(daemon.status().await["tables"][0]["table"], "\"My Schema\".\"User\"");
    assert_eq!(daemon.stop().await, Some(0));

    // One problem at a time: the statements from `run` can be executed, and those from `check` solve it.
    let table = "\"My Schema\".\"User\"";
    for (fault, sql) in [
        ("operations", "ALTER PUBLICATION \"Pub-1\" SET (publish = 'insert')".to_owned()),
        ("one of its tables", format!("ALTER PUBLICATION \"Pub-1\" DROP TABLE {table}")),
        ("no right", format!("REVOKE ALL ON {table} FROM \"O'Brien \"\"x\"\"\"")),
        ("no right to the schema", "REVOKE ALL ON SCHEMA \"My Schema\" FROM \"O'Brien \"\"x\"\"\"".to_owned()),
        ("policies", "ALTER ROLE \"O'Brien \"\"x\"\"\" NOBYPASSRLS".to_owned()),
        ("no stream", "ALTER ROLE \"O'Brien \"\"x\"\"\" NOREPLICATION".to_owned()),
        ("no identity", format!("ALTER TABLE {table} REPLICA IDENTITY NOTHING")),
        (
            "another identity",
            format!(
                "ALTER TABLE {table} REPLICA IDENTITY NOTHING; DROP INDEX \"My Schema\".\"User_identity\";
            ALTER TABLE {table} ADD PRIMARY KEY (\"Id\", \"order\"), REPLICA IDENTITY DEFAULT"
            ),
        ),
        ("its partitions", "ALTER PUBLICATION \"Pub-1\" SET (publish_via_partition_root = false)".to_owned()),
        ("not in the WAL", format!("ALTER PUBLICATION \"Pub-1\" DROP TABLE {table}; ALTER TABLE {table} SET UNLOGGED")),
        ("a partition", "ALTER TABLE \"My Schema\".\"Part 'p'\" REPLICA IDENTITY NOTHING".to_owned()),
        ("no publication", "DROP PUBLICATION \"Pub-1\"".to_owned()),
        ("no slot", "SELECT pg_drop_replication_slot('slot_shop')".to_owned()),
    ] {
        psql(&scene.url, &sql);
        let said = scene.run_says(fault).await;
        let pasted = scene.paste_until_good().await;
        assert!(pasted.contains(&said), "{fault}: run says {said}, and check {pasted:?}");
    }
    // Those that do not solve the problem on their own.
    psql(&scene.url, "DROP PUBLICATION \"Pub-1\"");
    psql(&scene.url, "UPDATE \"My Schema\".\"User\" SET \"a b\" = 'y'");
    let publication = "CREATE PUBLICATION \"Pub-1\" FOR TABLE \"My Schema\".\"User\", \"My Schema\".\"Whole 2\"
                       WITH (publish_via_partition_root = true)";
    psql(&scene.url, publication);
    let younger = scene.check().await;
    assert!(younger.stdout.contains("SELECT pg_drop_replication_slot("), "{younger:?}");
    scene.paste_until_good().await;
    let warned = scene.check().await;
    for line in warned.stdout.lines().filter(|line| line.starts_with("warn")) {
        if let Some(statements) = statements(line) {
            psql(&scene.url, statements);
        }
    }
    assert!(warned.stdout.contains("ALTER SYSTEM SET max_slot_wal_keep_size = '50GB';"), "{warned:?}");

    psql(&scene.url, &Sql::WalLevelLogical.to_string());
    let torn_down = run_program(&scene.settings(), &["teardown"]).await;
    let line = torn_down.stdout.lines().find(|line| line.contains("DROP PUBLICATION")).unwrap();
    psql(&scene.url, statements(line).unwrap());
}

/// The connection string for the socket, as a line of configuration.
#[tokio::test]
async fn a_line_of_the_configuration_can_be_pasted() {
    let scene = Scene::new();
    scene.paste_until_good().await;
    psql(&scene.url, "GRANT pg_read_all_settings TO \"O'Brien \"\"x\"\"\"");
    let checked = scene.check().await;
    let (_, line) = checked.stdout.split_once("postgres.url = ").unwrap_or_else(|| panic!("{checked:?}"));
    let line = line.lines().next().unwrap();
    // The line contains no password.
    let settings = scene.settings().set("postgres.url", line).env("PGPASSWORD", postgres_password());
    let through_it = run_program(&settings, &["check"]).await;
    assert_eq!(through_it.code, Some(0), "{line}: {through_it:?}");
    assert!(!through_it.stdout.contains("reached over TCP"), "{through_it:?}");
}

#[tokio::test]
async fn a_command_for_redis_can_be_pasted() {
    let scene = Scene::new();
    scene.paste_until_good().await;
    let settings = scene.settings();
    let user = ["ACL", "SETUSER", "prefetchd"];
    // Grants what its tables need, which is then revoked.
    drop(settings.file());
    scene.redis.command::<()>(&[&user[..], &["resetkeys", "-copy"]].concat()).await;
    let checked = run_program(&settings, &["check"]).await;
    assert_eq!(checked.code, Some(78), "{checked:?}");
    let (_, command) = checked.stdout.split_once("ACL SETUSER").unwrap_or_else(|| panic!("{checked:?}"));
    let (command, _) = command.split_once("  #redis-acl\n").unwrap();
    let command = format!("ACL SETUSER{command}\n");
    let mut cli = Command::new(callable(&["redis-cli", "valkey-cli"]))
        .args(["-p", &scene.redis.port().to_string()])
        .env("REDISCLI_AUTH", redis_password())
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    std::io::Write::write_all(&mut cli.stdin.take().unwrap(), command.as_bytes()).unwrap();
    let said = String::from_utf8(cli.wait_with_output().unwrap().stdout).unwrap();
    assert_eq!(said.trim(), "OK", "{command}");
    assert_eq!(run_program(&settings, &["check"]).await.code, Some(0), "{command}");
}

/// Those of the sections that `check` and the log lead to.
#[test]
fn the_statements_of_the_documented_errors_run() {
    let postgres = Postgres::own(&[]);
    let url = postgres.url("postgres");
    let version: u32 = psql(&url, "SHOW server_version_num").parse().unwrap();
    let mut ran = 0;
    for code in Code::ALL {
        let section = code.section().unwrap();
        let blocks = section.split("```sql\n").skip(1).map(|block| block.split("```").next().unwrap());
        for sql in blocks {
            // What each of them may take for granted, and nothing that it makes.
            let mut before = "DROP PUBLICATION IF EXISTS prefetchd; DROP TABLE IF EXISTS products;
                SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots;
                CREATE TABLE products (id int NOT NULL);"
                .to_owned();
            for role in ["prefetchd", "cache_reader"] {
                let drop = format!("DROP OWNED BY {role}; DROP ROLE {role}");
                before += &format!(
                    "DO $$ BEGIN IF EXISTS (SELECT FROM pg_roles WHERE rolname = '{role}') THEN {drop}; END IF; END $$;"
                );
                if !sql.contains(&format!("CREATE ROLE {role}")) {
                    before += &format!("CREATE ROLE {role};");
                }
            }
            if !sql.contains("CREATE PUBLICATION") {
                before += "CREATE PUBLICATION prefetchd;";
            }
            psql(&url, &before);
            if sql.contains("pg_drop_replication_slot") {
                psql(&url, "SELECT pg_create_logical_replication_slot('prefetchd', 'pgoutput')");
            }
            let runs = |line: &&str| match line.split_once("-- ") {
                Some((_, "to 16")) => version < 170_000,
                Some((_, "from 17")) => version >= 170_000,
                _ => !line.contains("publish_generated_columns") || version >= 180_000,
            };
            let kept = sql.lines().filter(runs).map(|line| line.split("-- ").next().unwrap_or_default());
            // As psql sends them: some cannot run in a transaction. A body in dollar quotes is the only statement of its block.
            let kept = kept.collect::<Vec<_>>().join("\n");
            let statements = match kept.contains("$$") {
                true => vec![&*kept],
                false => kept.split_inclusive(';').filter(|one| one.trim() != "").collect(),
            };
            statements.into_iter().for_each(|statement| _ = psql(&url, statement));
            // With standbys that are not there, no commit ends.
            psql(&url, "ALTER SYSTEM RESET ALL");
            psql(&url, "SELECT pg_reload_conf()");
            ran += 1;
        }
    }
    assert!(ran > 25, "{ran}");
}
