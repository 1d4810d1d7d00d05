//! `init` on real servers: what it writes is applied as it says, and `check` finds nothing to fix.

use crate::harness::{Cluster, Feature, Postgres, Ran, Redis, run_configured, skipped};
use nix::unistd::geteuid;
use prefetchd::cli::servers::{self, on_path, postgres_password, redis_password};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use tempfile::TempDir;

/// Runs `init` as the superuser of both servers.
async fn init(postgres: &Postgres, redis: &str, dir: &Path, args: &[&str]) -> Ran {
    init_as("postgres", postgres, redis, dir, args).await
}

async fn init_as(role: &str, postgres: &Postgres, redis: &str, dir: &Path, args: &[&str]) -> Ran {
    let (url, dir) = (postgres.url(role), dir.to_str().unwrap());
    let servers = ["init", "--postgres", &url, "--redis", redis, "--out", dir];
    run_configured(Path::new("/nonexistent"), &[], &[&servers[..], args].concat()).await
}

fn text(dir: &TempDir, name: &str) -> String {
    std::fs::read_to_string(dir.path().join(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// Runs a line that was printed, as an administrator.
#[track_caller]
fn shell(line: &str) -> Output {
    let psql = servers::callable(&["psql"]);
    let path = std::env::var("PATH").unwrap();
    let path = psql.parent().map_or_else(|| path.clone(), |dir| format!("{}:{path}", dir.display()));
    let mut shell = Command::new("sh");
    shell.args(["-c", line]).stdin(Stdio::null()).env("PATH", path);
    let output = shell.env("PGPASSWORD", postgres_password()).env("REDISCLI_AUTH", redis_password()).output().unwrap();
    let said = String::from_utf8_lossy(&[&output.stdout[..], &output.stderr].concat()).into_owned();
    assert!(output.status.success() && !said.contains("ERR"), "{line}: {said}");
    output
}

/// Does what `init` said: passwords, SQL, ACL.
#[track_caller]
fn apply(postgres: &Postgres, dir: &TempDir, said: &str) {
    for name in ["postgres", "redis"] {
        let file = dir.path().join(format!("{name}.password"));
        let mut private = std::fs::OpenOptions::new();
        let mut file = private.write(true).create_new(true).mode(0o600).open(file).unwrap();
        std::io::Write::write_all(&mut file, format!("of prefetchd in {name}\n").as_bytes()).unwrap();
    }
    let line = |begins: &str| {
        let line = said.lines().map(str::trim).find(|line| line.starts_with(begins));
        line.unwrap_or_else(|| panic!("no line that begins with {begins}:\n{said}"))
    };
    // \password asks on a terminal. Beside another prefetchd, the role may have its password already.
    let is_second = said.contains("write its present password");
    let psql = line("psql ");
    let (psql, asks) = psql.split_once(" -c ").unwrap_or((psql, ""));
    assert_eq!(asks, if is_second { "" } else { "'\\password prefetchd'" });
    shell(psql);
    let password = "ALTER ROLE prefetchd PASSWORD 'of prefetchd in postgres'";
    crate::harness::psql(&postgres.url("postgres"), password);
    shell(line("test -s "));
    assert!(line("prefetchd -c ").ends_with("prefetchd.toml check"));
}

async fn assert_passes_check(dir: &TempDir, said: &str) {
    let config = dir.path().join("prefetchd.toml");
    let checked = run_configured(&config, &[("PREFETCHD__HTTP__LISTEN", "127.0.0.1:0")], &["check", "--all"]).await;
    assert_eq!(checked.code, Some(0), "{checked:?}\n{said}\n{}", text(dir, "postgres.sql"));
    assert!(checked.stdout.lines().last().unwrap().starts_with("ready: "), "{checked:?}");
    if geteuid().is_root() {
        return;
    }
    // Neither the passwords nor the users give rise to a warning.
    assert!(!checked.stdout.contains("password"), "{checked:?}");
}

/// Asserts that no file, and nothing that was printed, contains a password.
fn assert_no_password(dir: &TempDir, said: &str) {
    for text in [text(dir, "prefetchd.toml"), text(dir, "postgres.sql"), text(dir, "redis.acl"), said.to_owned()] {
        for password in [postgres_password(), redis_password()] {
            assert!(!text.contains(password), "{text}");
        }
    }
}

/// A server on which nobody has heard of prefetchd.
async fn untouched_postgres() -> Postgres {
    let postgres = Postgres::own(&[]);
    postgres.execute("DROP PUBLICATION prefetchd; DROP OWNED BY prefetchd; DROP ROLE prefetchd").await;
    postgres.execute("ALTER SYSTEM SET max_slot_wal_keep_size = '1GB'").await;
    postgres
}

const HOSTILE: &str = r#"
    CREATE SCHEMA "My Schema"; CREATE SCHEMA shop; CREATE SCHEMA "order";
    CREATE TABLE "My Schema"."us""er;s" ("first name" text, "naïve: ""x""" int, "select" text,
                                         PRIMARY KEY ("naïve: ""x""", "first name"));
    INSERT INTO "My Schema"."us""er;s" VALUES ('a', 1, 'b');
    CREATE TABLE "My Schema"."a
; CREATE TABLE public.injected (); --" (id int PRIMARY KEY);
    CREATE TABLE "My Schema"."no key
; CREATE TABLE public.injected (); --" (id int);
    CREATE TABLE shop.orders (id bigint PRIMARY KEY, note text); INSERT INTO shop.orders SELECT n, 'x' FROM generate_series(1, 1000) n;
    CREATE TABLE orders (id uuid PRIMARY KEY);
    CREATE TABLE "order"."table" (id int PRIMARY KEY);
    CREATE TABLE shop.parts (region text, id int, PRIMARY KEY (region, id)) PARTITION BY LIST (region);
    CREATE TABLE shop.parts_eu PARTITION OF shop.parts FOR VALUES IN ('eu');
    CREATE TABLE shop.parts_us PARTITION OF shop.parts FOR VALUES IN ('us');
    INSERT INTO shop.parts VALUES ('eu', 1), ('us', 1);
    CREATE TABLE shop.log (at timestamptz, what text);
    CREATE TABLE shop.named (name text NOT NULL, UNIQUE (name));
    CREATE TABLE shop.nothing (id int PRIMARY KEY); ALTER TABLE shop.nothing REPLICA IDENTITY NOTHING;
    CREATE TABLE shop."braces{}" ("{id}" int PRIMARY KEY);
    CREATE TABLE shop.secret (id int PRIMARY KEY, owner text); ALTER TABLE shop.secret ENABLE ROW LEVEL SECURITY;
    CREATE VIEW shop.seen AS SELECT * FROM shop.orders;
    CREATE UNLOGGED TABLE shop.fleeting (id int PRIMARY KEY);
    REVOKE CONNECT ON DATABASE shop FROM PUBLIC;
"#;

#[tokio::test]
async fn what_it_writes_passes_check() {
    let (postgres, redis, dir) = (untouched_postgres().await, Redis::start(), tempfile::tempdir().unwrap());
    postgres.execute(HOSTILE).await;
    let ran = init(&postgres, &redis.url(), dir.path(), &["--table", "*.*"]).await;
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert_no_password(&dir, &ran.said());
    let (toml, sql) = (text(&dir, "prefetchd.toml"), text(&dir, "postgres.sql"));
    let names: Vec<&str> = toml.lines().filter_map(|line| line.strip_prefix("name = ")).collect();
    let expected = [
        "\"My_Schema.a___CREATE_TABLE_public_injected_____--\"",
        "\"My_Schema.us_er_s\"",
        "\"order.table\"",
        "\"categories\"",
        "\"public.orders\"",
        "\"shop.orders\"",
        "\"shop.parts\"",
        "\"shop.secret\"",
    ];
    assert_eq!(names, expected, "{toml}");
    assert!(toml.contains("key = \"cache:shop.parts:{region}:{id}\""), "{toml}");
    for (table, remedy) in [
        ("log", "-- ALTER TABLE shop.log ADD PRIMARY KEY (…);"),
        ("named", "-- ALTER TABLE shop.named ALTER name SET NOT NULL; CREATE UNIQUE INDEX"),
        ("nothing", "-- ALTER TABLE shop.nothing REPLICA IDENTITY DEFAULT;"),
        ("braces", "-- shop.\"braces{}\" is left out"),
    ] {
        assert!(sql.contains(remedy), "{table}: {sql}");
        assert!(ran.stdout.contains(&remedy[3..15]), "{table}: {ran:?}");
    }
    assert!(
        sql.contains("GRANT SELECT ON shop.parts_eu TO prefetchd;") && !sql.contains("ONLY shop.parts_eu"),
        "{sql}"
    );
    assert!(!toml.contains("parts_eu") && !toml.contains("fleeting") && !toml.contains("seen"), "{toml}{sql}");
    assert!(ran.stdout.contains("rows of about"), "{ran:?}");
    // The password files are not there yet.
    let config = dir.path().join("prefetchd.toml");
    assert_eq!(run_configured(&config, &[], &["check"]).await.code, Some(78));

    apply(&postgres, &dir, &ran.stdout);
    assert_passes_check(&dir, &ran.stdout).await;
    let injected = postgres.value("SELECT count(*) FROM pg_class WHERE relname = 'injected'").await;
    assert_eq!(injected.as_deref(), Some("0"));

    // A second one, beside the first: only the publication's name is taken.
    let second = tempfile::tempdir().unwrap();
    let ran = init(&postgres, &redis.url(), second.path(), &["--table", "orders", "--table", "shop.p*"]).await;
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert!(ran.stdout.contains("prefetchd_2"), "{ran:?}");
    assert!(text(&second, "prefetchd.toml").contains("publication = \"prefetchd_2\""));
    assert!(text(&second, "prefetchd.toml").contains("key = \"cache_2:shop.parts:{region}:{id}\""));
    assert!(text(&second, "redis.acl").contains("\nuser prefetchd_2 on "));
    apply(&postgres, &second, &ran.stdout);
    assert_passes_check(&second, &ran.stdout).await;
    assert_passes_check(&dir, "the first one is as it was").await;
}

#[tokio::test]
async fn on_a_cluster_every_node_gets_the_user() {
    let cluster = Cluster::with_replicas().await;
    if !cluster.node(0).has(Feature::Lanes).await {
        return skipped("Redis 6 has no keys in several hash slots");
    }
    let (postgres, dir) = (untouched_postgres().await, tempfile::tempdir().unwrap());
    let url = format!("redis+cluster://:{}@{}", redis_password(), cluster.addresses());
    let ran = init(&postgres, &url, dir.path(), &["--table", "categories"]).await;
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert_no_password(&dir, &ran.said());
    apply(&postgres, &dir, &ran.stdout);
    for node in cluster.nodes() {
        let users: Vec<String> = node.command(&["ACL", "USERS"]).await;
        assert!(users.contains(&"prefetchd".to_owned()), "{users:?}");
    }
    assert_passes_check(&dir, &ran.stdout).await;
}

#[tokio::test]
async fn a_role_without_rights_is_enough() {
    let (postgres, redis, dir) = (untouched_postgres().await, Redis::start(), tempfile::tempdir().unwrap());
    postgres.execute("CREATE ROLE stranger LOGIN; REVOKE ALL ON SCHEMA public FROM PUBLIC").await;
    let ran = init_as("stranger", &postgres, &redis.url(), dir.path(), &["--table", "*"]).await;
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert_no_password(&dir, &ran.said());
    assert!(text(&dir, "prefetchd.toml").contains("public.categories: of unknown size"));
    // As whoever may.
    let said = ran.stdout.replace("user=stranger", "user=postgres");
    apply(&postgres, &dir, &said);
    assert_passes_check(&dir, &said).await;
}

#[tokio::test]
async fn a_database_other_than_0_and_a_socket_are_written_as_they_are() {
    let (postgres, redis, dir) = (untouched_postgres().await, Redis::start(), tempfile::tempdir().unwrap());
    let url = format!("unix://{}?db=3&pass={}", redis.socket().display(), redis_password());
    let ran = init(&postgres, &url, dir.path(), &["--table", "categories"]).await;
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert_no_password(&dir, &ran.said());
    assert!(text(&dir, "redis.acl").contains("+select"));
    apply(&postgres, &dir, &ran.stdout);
    assert_passes_check(&dir, &ran.stdout).await;

    // On Amazon RDS, nobody may set the attribute.
    postgres.execute("CREATE ROLE rds_replication").await;
    let managed = tempfile::tempdir().unwrap();
    let ran = init(&postgres, &url, managed.path(), &["--table", "categories"]).await;
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let sql = text(&managed, "postgres.sql");
    assert!(sql.contains("\nGRANT rds_replication TO prefetchd;\n") && !sql.contains("ALTER ROLE"), "{sql}");
}

#[tokio::test]
async fn what_cannot_be_written_is_1_and_leaves_nothing() {
    let (postgres, redis, dir) = (Postgres::shared(), Redis::start(), tempfile::tempdir().unwrap());
    postgres
        .execute("CREATE SCHEMA shop; CREATE TABLE shop.products (id int PRIMARY KEY); CREATE TABLE log (a int);")
        .await;
    postgres.execute("CREATE VIEW shop.seen AS SELECT 1").await;
    for (args, parts) in [
        (&[][..], ["no terminal", "--table"]),
        (&["--table", "product"], ["no table of database", "did you mean shop.products"]),
        (&["--table", "categories", "--table", "shop.produkt*"], ["matches shop.produkt*", "shop.products"]),
        (&["--table", "shop.seen"], ["shop.seen is a view", "can be followed"]),
        (&["--table", "log"], ["no primary key", "ALTER TABLE public.log ADD PRIMARY KEY"]),
    ] {
        let ran = init(&postgres, &redis.url(), dir.path(), args).await;
        assert_eq!(ran.code, Some(1), "{args:?}: {ran:?}");
        assert!(parts.iter().all(|part| ran.stderr.contains(part)), "{args:?}: {ran:?}");
    }
    for table in ["a.b.c", "\"x"] {
        assert_eq!(init(&postgres, &redis.url(), dir.path(), &["--table", table]).await.code, Some(2));
    }
    for (postgres, redis) in [
        ("postgres://postgres@127.0.0.1:1/shop".to_owned(), redis.url()),
        (postgres.bare_url("postgres"), redis.url()),
        (postgres.url("postgres"), "redis://127.0.0.1:1".to_owned()),
        (postgres.url("postgres"), "http://127.0.0.1:1".to_owned()),
    ] {
        let out = dir.path().to_str().unwrap();
        let args = ["init", "--postgres", &postgres, "--redis", &redis, "--table", "categories", "--out", out];
        let ran = run_configured(Path::new("/nonexistent"), &[], &args).await;
        assert_eq!(ran.code, Some(1), "{ran:?}");
        assert!(!ran.said().contains(postgres_password()), "{ran:?}");
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);

    // Each of the files protects the others.
    for name in ["prefetchd.toml", "postgres.sql", "redis.acl"] {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(name), "mine").unwrap();
        let ran = init(&postgres, &redis.url(), dir.path(), &["--table", "categories"]).await;
        assert_eq!(ran.code, Some(1), "{ran:?}");
        assert!(ran.stderr.contains(name) && ran.stderr.contains("nothing is overwritten"), "{ran:?}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        assert_eq!(text(&dir, name), "mine");
    }
    assert_eq!(redis.keys("*").await, [""; 0]);
}

#[tokio::test]
async fn on_a_terminal_it_asks_which_tables() {
    let (postgres, redis, dir) = (Postgres::shared(), Redis::start(), tempfile::tempdir().unwrap());
    if on_path(&["script"]).is_none() {
        return skipped("script is not installed");
    }
    postgres.execute("CREATE TABLE log (a int)").await;
    let program = env!("CARGO_BIN_EXE_prefetchd");
    let line = format!(
        "{program} init --postgres '{}' --redis '{}' --out {}",
        postgres.url("postgres"),
        redis.url(),
        dir.path().display()
    );
    let mut asked = Command::new("script");
    asked.args(["-qec", &line, "/dev/null"]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut asked = asked.spawn().unwrap();
    std::io::Write::write_all(&mut asked.stdin.take().unwrap(), b"17\n1\n").unwrap();
    let output = tokio::task::spawn_blocking(move || asked.wait_with_output().unwrap()).await.unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{said}");
    for part in ["public.categories", "public.log", "none: it is left out", "17 is none of these numbers", "1 table in"]
    {
        assert!(said.contains(part), "{part}: {said}");
    }
    assert!(text(&dir, "prefetchd.toml").contains("name = \"categories\""));
}
