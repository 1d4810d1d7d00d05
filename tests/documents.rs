//! The code blocks of the documents run as they stand there, on servers prepared as the documents say: SQL in Postgres,
//! commands in a shell, configurations through the parser, programs of readers against the daemon.
//!
//! What cannot run here is in [`NOT_RUN`], with the reason. Blocks of output, and pictures, have the language `text`.

use crate::harness::{Daemon, Postgres, Redis, Settings, psql, skipped};
use prefetchd::cli::servers::{callable, free_port, on_path, postgres_password};
use std::path::{Path, PathBuf};
use std::process::Command;

/// The document, how the block begins, and why it does not run here.
const NOT_RUN: &[(&str, &str, &str)] = &[
    ("README.md", "scripts/demo", "tests/demo.rs runs the demo"),
    ("README.md", "scripts/test", "runs these tests"),
    ("docs/first-table.md", "cargo build --release", "scripts/package and scripts/bench build for release"),
    ("docs/alerts.md", "systemctl status prefetchd", "needs systemd"),
    ("docs/alerts.md", "promtool check config", "needs a Prometheus that is configured, and Kubernetes"),
    ("docs/alerts.md", "kubectl get pods", "needs Kubernetes and systemd"),
    ("docs/alerts.md", "journalctl -u prefetchd -n 200", "needs systemd and Kubernetes"),
    ("docs/alerts.md", "journalctl -u prefetchd | grep -E", "needs systemd"),
    ("docs/alerts.md", "journalctl -u prefetchd | grep 'differs", "needs systemd"),
    ("docs/alerts.md", "redis-cli -h NODE", "names nodes of a cluster"),
    ("docs/benchmarks.md", "scripts/bench", "measures for minutes, on a quiet machine"),
    ("docs/comparison.md", "prefetchd demo", "tests/demo.rs runs the demo"),
    ("docs/errors.md", "ALTER PUBLICATION prefetchd SET (publish_generated_columns", "needs Postgres 18"),
    ("docs/errors.md", "openssl s_client -connect", "needs a Redis with TLS"),
    ("docs/errors.md", "openssl s_client -starttls", "needs a Postgres with TLS"),
    ("docs/errors.md", "prefetchd skip", "needs a change that Postgres cannot send: tests/poison.rs"),
    ("docs/errors.md", "redis-cli --cluster add-node", "needs a cluster"),
    ("docs/errors.md", "redis-cli --cluster call", "needs a cluster"),
    ("docs/errors.md", "redis-cli --cluster check", "needs a cluster that is broken"),
    ("docs/errors.md", "redis-cli --cluster fix", "needs a cluster that is broken"),
    ("docs/errors.md", "redis-cli ACL GETUSER", "needs a Redis with an ACL file"),
    ("docs/errors.md", "redis-cli -h HOST -p 26379", "needs Sentinels"),
    ("docs/errors.md", "sudo apt-get install", "installs packages on this machine"),
    ("docs/errors.md", "systemctl status prefetchd", "needs systemd"),
    ("docs/faults.md", "cargo test --test integration -- --nocapture faults::", "runs these tests"),
    ("docs/faults.md", "cargo test --test integration -- --nocapture --ignored", "takes an hour"),
    ("docs/install.md", "apt install", "installs a package on this machine"),
    ("docs/install.md", "cargo build --release --locked", "builds for release, as scripts/package does"),
    ("docs/install.md", "gpg --verify", "needs a release that is signed"),
    ("docs/install.md", "rust-audit-info", "needs that program, and a released binary"),
    ("docs/install.md", "scripts/release", "builds for release, and an image"),
    ("docs/install.md", "sha256sum", "needs the files of a release"),
    ("docs/install.md", "tar -xzf", "installs a service on this machine"),
    ("docs/managed.md", "aws elasticache create-user", "needs an account at Amazon"),
    ("docs/operating.md", "apt install ./target", "installs a package on this machine"),
    ("docs/operating.md", "cargo build --release --locked", "installs a service on this machine"),
    ("docs/operating.md", "kubectl -n shop create", "needs Kubernetes"),
    ("docs/operating.md", "location /v1/tables/ {", "needs nginx"),
    ("docs/operating.md", "location /v1/admin", "needs nginx"),
    ("docs/operating.md", "frontend prefetchd", "needs HAProxy"),
    ("docs/operating.md", "prefetchd skip", "needs a change that Postgres cannot send: tests/poison.rs"),
    ("docs/reading.md", "func product(", "needs Go and its module of Redis"),
    ("docs/reading.md", "static async Task", "needs .NET and its package of Redis"),
    ("docs/reading.md", "redis-cli JSON.GET", "needs the module RedisJSON: tests/redisjson.rs"),
];

/// Other keys, where a section is about a table in another format.
const KEYS: &[(&str, &str)] = &[("redis-cli GET cache:product:", "redis-cli GET json:product:")];

/// Blocks that contain these run while no daemon does.
const WITHOUT_DAEMON: &[&str] = &[
    "teardown",
    "pg_drop_replication_slot",
    "pg_create_logical_replication_slot",
    "check --all",
    "prefetchd -c shop.toml run",
    "prefetchd run --adopt",
];
/// And those with the tutorial's own configuration as if none ever had.
const OWN_CONFIGURATION: &str = "prefetchd -c shop.toml";

/// What is in the block, what runs before it, and what after it.
const PYTHON: &[(&str, &str, &str)] = &[
    ("def product(id, min_lsn=None):", "", "assert product(1)['id'] == '1' and product(0) is None"),
    ("p.get(\"prefetchd:{prefetchd}:checkpoint\")", "", "assert product(1)['id'] == '1' and product(0) is None"),
    ("def products(ids):", "", "assert product(0) is None and [row['id'] for row in products([1, 2])] == ['1', '2']"),
    (
        "def children(parent):",
        "import redis\nr = redis.Redis(decode_responses=True)",
        "assert [row['id'] for row in children('cat-001')] == ['cat-005', 'cat-006']",
    ),
    (
        "r.xgroup_create(",
        "import os\nrebuild_all = rebuild = remove = lambda *_: change()\nindex = lambda key, row: os._exit(0)",
        "",
    ),
    (
        "def follow():",
        "import redis, time\nr = redis.Redis(decode_responses=True)",
        "threading.Thread(target=follow, daemon=True).start()\nrow('cache:product:1')\ntime.sleep(1)\nchange()
while 'cache:product:1' in cached:\n    time.sleep(0.01)",
    ),
];
const CHANGE: &str = "import subprocess\ndef change():
    subprocess.run(['psql', '-Xqc', \"UPDATE products SET name = name || '!' WHERE id = 1\"], check=True)\n";

const SHOP: &str = "
    CREATE TABLE products (id bigint PRIMARY KEY, name text NOT NULL, price numeric(10,2), in_stock boolean, tags text[],
                           category_id int);
    INSERT INTO products SELECT n, 'Product ' || n, n + 0.5, true, '{a,b}', n % 10 FROM generate_series(1, 100) n;
    INSERT INTO categories VALUES ('cat-006', 'Juice', 15, false, 'cat-001');
    CREATE TABLE documents (LIKE products INCLUDING ALL);
    INSERT INTO documents SELECT * FROM products;
    CREATE SCHEMA s;
    CREATE TABLE s.prices (region text, sku int, price numeric, PRIMARY KEY (region, sku));
    CREATE SCHEMA shop;
    CREATE TABLE shop.orders (id int PRIMARY KEY);
    CREATE SCHEMA \"My Schema\";
    CREATE TABLE \"My Schema\".users (id int PRIMARY KEY);
    CREATE ROLE me LOGIN;
    CREATE ROLE cache_reader LOGIN;
    -- What prefetchd may read comes from another role, so that nothing keeps its own from being dropped.
    CREATE ROLE readers;
    REVOKE ALL ON categories FROM prefetchd;
    GRANT SELECT ON categories, products, documents TO readers;
    GRANT readers TO prefetchd;
    ALTER ROLE prefetchd PASSWORD 'choose-a-password';
    ALTER PUBLICATION prefetchd ADD TABLE products, documents";
const TABLES: &str = "
[[tables]]\nname = 'products'\ntable = 'public.products'\nkey = 'cache:product:{id}'
[[tables.lookups]]\nname = 'by_category'\nkey = 'cache:products-by-category:{category_id}'\norder = 'price'
[[tables]]\nname = 'documents'\ntable = 'public.documents'\nkey = 'json:product:{id}'\nformat = 'json'
[[tables]]\nname = 'categories'\ntable = 'public.categories'\nkey = 'cache:category:{id}'
[[tables.lookups]]\nname = 'by_parent'\nkey = 'cache:categories-by-parent:{parent_id}'\norder = 'display_order'
[[tables.lookups]]\nname = 'all'\nkey = 'cache:categories-all'\norder = 'display_order'\n";

/// Commands go to the servers of this test, and those that would never end are ended.
const PRELUDE: &str = r#"
set -euo pipefail
redis-cli() {
    case " $* " in
        *" --latency"*) timeout 2 "$REDIS_CLI" -p "$REDIS_PORT" "$@" || [ $? = 124 ] ;;
        *)
            local said
            said=$(command "$REDIS_CLI" -e -p "$REDIS_PORT" "$@")
            echo "$said"
            # What a document reads is there. Nothing here is a dead letter.
            case "$1 $2" in
                *":dead") ;;
                "GET "* | HGETALL* | HMGET* | Z* | SORT* | XRANGE*) [ -n "$said" ] || { echo "nothing: $*"; return 1; } ;;
            esac
            ;;
    esac
}
curl() { command curl --silent --show-error --fail-with-body "$@"; }
sudo() { "$@"; }
# Otherwise a command that still writes to it is ended by a signal, which here counts as a failure.
head() { command head "$@"; cat >/dev/null; }
prefetchd() {
    case " $* " in
        *" tail "*) timeout 2 prefetchd "$@" || [ $? = 124 ] ;;
        *" run "*)
            command prefetchd "$@" &
            until command prefetchd status >status 2>&1; do kill -0 $! || { cat status; return 1; }; sleep 0.1; done
            kill $!
            wait $!
            ;;
        *) command prefetchd "$@" ;;
    esac
}
"#;

#[derive(Debug)]
struct Block {
    file: String,
    line: usize,
    language: String,
    text: String,
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// The README and its like, and everything in docs/.
fn documents() -> Vec<String> {
    let mut documents: Vec<String> =
        ["README.md", "SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md"].map(str::to_owned).into();
    let mut folders = vec!["docs".to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(root().join(&folder)).unwrap().map(Result::unwrap) {
            let name = format!("{folder}/{}", entry.file_name().to_str().unwrap());
            match entry.file_type().unwrap().is_dir() {
                true => folders.push(name),
                false if name.ends_with(".md") => documents.push(name),
                false => {}
            }
        }
    }
    documents.sort();
    documents
}

fn blocks(file: &str) -> Vec<Block> {
    let text = std::fs::read_to_string(root().join(file)).unwrap();
    let (mut blocks, mut open) = (Vec::new(), None::<Block>);
    for (line, number) in text.lines().zip(1..) {
        match (line.trim_start().strip_prefix("```"), &mut open) {
            (Some(language), None) => {
                let (file, language) = (file.to_owned(), language.trim().to_owned());
                open = Some(Block { file, line: number, language, text: String::new() });
            }
            (Some(_), Some(_)) => blocks.extend(open.take()),
            (None, Some(block)) => block.text += &format!("{line}\n"),
            (None, None) => {}
        }
    }
    assert!(open.is_none(), "{open:?} has no end");
    blocks
}

impl Block {
    /// Whether this entry of [`NOT_RUN`] is about it.
    fn is(&self, (file, begins, _): &(&str, &str, &str)) -> bool {
        self.file == *file && self.text.starts_with(begins)
    }

    fn failure(&self, why: &str) -> String {
        format!("{}:{} does not run:\n{}\n{why}", self.file, self.line, self.text)
    }
}

#[test]
fn every_block_runs_or_is_known_not_to() {
    let all: Vec<Block> = documents().iter().flat_map(|file| blocks(file)).collect();
    for entry in NOT_RUN {
        let count = all.iter().filter(|block| block.is(entry)).count();
        assert_eq!(count, 1, "so many blocks for {entry:?}");
        println!("{}: {}: {}", entry.0, entry.1, entry.2);
    }
    let known = ["toml", "sql", "sh", "python", "js", "rust", "yaml", "text"];
    for block in all.iter().filter(|block| !NOT_RUN.iter().any(|entry| block.is(entry))) {
        assert!(known.contains(&block.language.as_str()), "{}:{}: {:?}", block.file, block.line, block.language);
        let changes_the_machine = ["apt install", "apt-get", "systemctl", "dpkg -i", "docker "];
        let installs = changes_the_machine.iter().find(|command| block.text.contains(**command));
        assert!(block.language != "sh" || installs.is_none(), "{}:{} runs {installs:?}", block.file, block.line);
    }
    println!("{} blocks, {} of which do not run here", all.len(), NOT_RUN.len());
}

/// What the documents take for granted.
struct Shop {
    postgres: Postgres,
    redis: Redis,
    settings: Settings,
    /// The working directory of commands.
    dir: tempfile::TempDir,
    listen: String,
    daemon: Option<Daemon>,
}

impl Shop {
    async fn open() -> Self {
        let (postgres, redis, dir) = (Postgres::own(&[]), Redis::start(), tempfile::tempdir().unwrap());
        postgres.execute(SHOP).await;
        // The documents name no password of theirs.
        redis.command::<()>(&["ACL", "SETUSER", "default", "nopass"]).await;
        let listen = format!("127.0.0.1:{}", free_port().unwrap());
        let url = format!("postgres://prefetchd:choose-a-password@127.0.0.1:{}/shop", postgres.port());
        let settings = Settings::new(&postgres, &redis)
            .text("postgres.url", &url)
            .text("postgres.slot", "prefetchd")
            .text("redis.url", &redis.bare_url())
            .text("http.listen", &listen)
            .text("changes.stream", "changes")
            .tables(TABLES);
        std::fs::create_dir(dir.path().join("config")).unwrap();
        std::fs::copy(settings.file().path(), dir.path().join("config/prefetchd.toml")).unwrap();
        std::fs::copy(settings.file().path(), dir.path().join("earlier.toml")).unwrap();
        let mut shop = Self { postgres, redis, settings, dir, listen, daemon: None };
        shop.starts().await;
        shop
    }

    async fn starts(&mut self) {
        let daemon = Daemon::with(&self.settings).await;
        // Blocks empty Redis, drop the slot and end connections.
        daemon.allow_warnings();
        daemon.ready().await;
        self.daemon = Some(daemon);
    }

    async fn stops(&mut self) {
        if let Some(daemon) = self.daemon.take() {
            daemon.stop().await;
        }
    }

    /// With the addresses and files of this test.
    fn adapted(&self, text: &str) -> String {
        let (postgres, redis) =
            (format!("127.0.0.1:{}", self.postgres.port()), format!("127.0.0.1:{}", self.redis.port()));
        let token = self.daemon.as_ref().map_or("", |daemon| daemon.token_file().to_str().unwrap()).to_owned();
        let file = |name, text: &str| self.file(name, text).to_str().unwrap().to_owned();
        let password = file("password", "choose-a-password");
        let admin_token = file("admin.token", "0123456789abcdef");
        let certificate = rcgen::generate_simple_self_signed(vec!["shop".to_owned()]).unwrap();
        let certificate = file("ca.pem", &certificate.cert.pem());
        // Programs are looked for, and not run.
        let program = env!("CARGO_BIN_EXE_prefetchd").to_owned();
        let names = [
            ("127.0.0.1:8787", &self.listen),
            ("127.0.0.1:5432", &postgres),
            ("db.internal", &postgres),
            ("127.0.0.1:6379", &redis),
            ("cache.internal", &redis),
            ("/run/prefetchd/8787.token", &token),
            ("/run/credentials/prefetchd.service/postgres", &password),
            ("/etc/prefetchd/token", &admin_token),
            ("/etc/prefetchd/ca.pem", &certificate),
            ("/etc/prefetchd/rds.pem", &certificate),
            ("/usr/bin/aws", &program),
            ("/usr/local/bin/elasticache-token", &program),
        ];
        let text = KEYS.iter().fold(text.to_owned(), |text, (from, to)| text.replace(from, to));
        names.iter().fold(text, |text, (from, to)| text.replace(from, to))
    }

    /// Runs a program in the directory of commands. Returns why it failed.
    fn run(&self, program: &str, args: &[&str]) -> Result<(), String> {
        let programs = Path::new(env!("CARGO_BIN_EXE_prefetchd")).parent().unwrap();
        let psql = callable(&["psql"]);
        let others = std::env::var("PATH").unwrap();
        let path = format!("{}:{}:{others}", programs.display(), psql.parent().unwrap_or(Path::new("")).display());
        let mut command = Command::new(program);
        command.args(args).current_dir(self.dir.path()).env("PATH", path);
        command.envs(self.settings.environment());
        command.envs([("PGHOST", "127.0.0.1"), ("PGUSER", "postgres"), ("PGDATABASE", "shop")]);
        command.env("PGPORT", self.postgres.port().to_string()).env("PGPASSWORD", postgres_password());
        command.env("REDIS_CLI", callable(&["redis-cli", "valkey-cli"]));
        command.env("REDIS_PORT", self.redis.port().to_string()).env("PREFETCHD__HTTP__LISTEN", &self.listen);
        command.env("TOKEN", self.daemon.as_ref().map_or(String::new(), Daemon::token));
        let output = command.output().map_err(|error| format!("{program}: {error}"))?;
        let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        if output.status.success() { Ok(()) } else { Err(format!("{}: {said}", output.status)) }
    }

    fn file(&self, name: &str, text: &str) -> PathBuf {
        let file = self.dir.path().join(name);
        std::fs::write(&file, text).unwrap();
        file
    }

    // ------------------------------------------------------------------------------------------ languages

    fn sh(&self, text: &str) -> Result<(), String> {
        self.run("timeout", &["60", "bash", "-c", &format!("{PRELUDE}\n{text}")])
    }

    /// In a transaction that is rolled back, after what the block creates was moved out of the way.
    fn sql(&self, text: &str) -> Result<(), String> {
        let created = |what: &str| {
            let after =
                text.lines().filter_map(|line| line.strip_prefix(&format!("CREATE {what} ")).map(str::to_owned));
            after.map(|rest| rest.split([' ', ';']).next().unwrap().to_owned()).collect::<Vec<_>>()
        };
        let mut before = String::new();
        for publication in created("PUBLICATION") {
            before += &format!("DROP PUBLICATION IF EXISTS {publication};\n");
        }
        for role in created("ROLE") {
            let count = format!("SELECT count(*) FROM pg_roles WHERE rolname = '{role}'");
            if psql(&self.postgres.url("postgres"), &count) == "1" {
                before += &format!("ALTER ROLE {role} RENAME TO {role}_before;\n");
            }
        }
        // What a block mends is broken first.
        for (mends, breaks) in [
            ("ADD PRIMARY KEY", "ALTER TABLE products DROP CONSTRAINT products_pkey;\n"),
            ("PUBLICATION prefetchd ADD TABLE products", "ALTER PUBLICATION prefetchd DROP TABLE products;\n"),
        ] {
            if text.contains(mends) {
                before += breaks;
            }
        }
        if text.contains("pg_create_logical_replication_slot") && !text.contains("pg_drop_replication_slot") {
            before += "SELECT pg_drop_replication_slot('prefetchd');\n";
        }
        let whole = match text.contains("ALTER SYSTEM") {
            true => format!("{text}\nALTER SYSTEM RESET ALL;\nSELECT pg_reload_conf();\n"),
            false => format!("BEGIN;\n{before}{text}\nROLLBACK;\n"),
        };
        let file = self.file("block.sql", &whole);
        self.run("psql", &["-Xq", "-v", "ON_ERROR_STOP=1", "-o", "/dev/null", "-f", file.to_str().unwrap()])
    }

    /// Completed to a whole configuration, through the parser.
    fn toml(&self, text: &str) -> Result<(), String> {
        // Each of several keys is that of another table.
        if text.lines().all(|line| line.starts_with("key = ")) && !text.is_empty() {
            return text.lines().try_for_each(|line| self.toml(&format!("[[tables]]\n{line}\n")));
        }
        let has_section = text.lines().any(|line| line.starts_with('['));
        let mut whole = if has_section { text.to_owned() } else { format!("[postgres]\n{text}") };
        if !whole.contains("[postgres]\nurl = ") {
            let url = "url = \"postgres://prefetchd@127.0.0.1/shop\"\n";
            whole = match whole.contains("[postgres]\n") {
                true => whole.replace("[postgres]\n", &format!("[postgres]\n{url}")),
                false => format!("[postgres]\n{url}\n{whole}"),
            };
        }
        if !whole.contains("[redis]") {
            whole = format!("[redis]\nurl = \"redis://127.0.0.1/0\"\n\n{whole}");
        }
        let table = "[[tables]]\nname = \"products\"\ntable = \"public.products\"\n";
        if !whole.contains("[[tables]]") {
            let key = "key = \"cache:product:{id}\"\n\n";
            whole = match whole.split_once("[[tables.lookups]]") {
                Some((before, lookup)) => format!("{before}{table}{key}[[tables.lookups]]{lookup}"),
                None => format!("{whole}\n{table}{key}"),
            };
        } else if !whole.contains("table = ") {
            whole = whole.replace("[[tables]]\n", table);
        }
        let file = self.file("block.toml", &whole);
        self.run("prefetchd", &["config", "-c", file.to_str().unwrap()]).map_err(|why| format!("{whole}\n{why}"))
    }

    fn python(&self, text: &str) -> Result<(), String> {
        let pythons: Vec<_> = on_path(&["python3"]).into_iter().chain([PathBuf::from("/usr/bin/python3")]).collect();
        let with = |module: &str| {
            let imports = format!("import {module}");
            pythons.iter().map(|python| python.to_str().unwrap()).find(|p| self.run(p, &["-c", &imports]).is_ok())
        };
        let with_redis = with("redis");
        let Some(python) = with_redis.or_else(|| with("json")) else {
            skipped("python3 is not installed");
            return Ok(());
        };
        let (_, before, after) =
            PYTHON.iter().find(|(part, ..)| text.contains(part)).ok_or("PYTHON does not say what to call")?;
        let whole = format!("{CHANGE}{before}\n{text}\n{after}\n");
        let whole = whole.replace("redis.Redis(", &format!("redis.Redis(port={}, ", self.redis.port()));
        let file = self.file("block.py", &whole);
        self.run(python, &["-m", "py_compile", file.to_str().unwrap()])?;
        if whole.contains("import redis") && with_redis.is_none() {
            skipped("the Python package redis is not installed: a block was only parsed");
            return Ok(());
        }
        self.run("timeout", &["30", python, file.to_str().unwrap()])
    }

    fn js(&self, text: &str) -> Result<(), String> {
        let Some(node) = on_path(&["node"]) else {
            skipped("node is not installed");
            return Ok(());
        };
        let file = self.file("block.mjs", text);
        self.run(node.to_str().unwrap(), &["--check", file.to_str().unwrap()])
    }

    async fn block(&mut self, block: &Block) -> Result<(), String> {
        let text = self.adapted(&block.text);
        let without_daemon = WITHOUT_DAEMON.iter().any(|part| block.text.contains(part));
        if without_daemon {
            self.stops().await;
        }
        if without_daemon && block.text.contains(OWN_CONFIGURATION) {
            self.sh("prefetchd teardown --keys")?;
            if block.text.contains("teardown") {
                self.sh(&format!("{OWN_CONFIGURATION} run"))?;
            }
        }
        if let Some(daemon) = &self.daemon {
            daemon.ready().await;
        }
        let ran = match block.language.as_str() {
            "sh" => self.sh(&text),
            "sql" => self.sql(&text),
            "toml" => self.toml(&text),
            "python" => self.python(&text),
            "js" => self.js(&text),
            "yaml" => serde_norway::from_str::<serde_json::Value>(&text).map(drop).map_err(|error| error.to_string()),
            "rust" => rust(&block.text),
            _ => Ok(()),
        };
        if without_daemon {
            self.starts().await;
        }
        ran
    }
}

async fn run(files: &[&str]) {
    let mut shop = Shop::open().await;
    let mut failures = Vec::new();
    for file in files {
        let runs = |block: &Block| !NOT_RUN.iter().any(|entry| block.is(entry));
        // Programs need what commands set up, which may come later in the document.
        let (programs, others): (Vec<_>, Vec<_>) =
            blocks(file).into_iter().filter(runs).partition(|b| b.language == "python");
        for block in others.iter().chain(&programs) {
            println!("{}:{}", block.file, block.line);
            if let Err(why) = shop.block(block).await {
                failures.push(block.failure(&why));
            }
        }
    }
    shop.stops().await;
    assert!(failures.is_empty(), "{}", failures.join("\n\n"));
}

const LONG: [&str; 5] = ["README.md", "docs/first-table.md", "docs/operating.md", "docs/reading.md", "docs/alerts.md"];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_readme_runs() {
    run(&["README.md"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_tutorial_runs() {
    run(&["docs/first-table.md"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_operating_says_runs() {
    run(&["docs/operating.md"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_reading_says_runs() {
    run(&["docs/reading.md"]).await;
    let redis = Redis::start();
    redis.command::<i32>(&["HSET", "cache:product:1", "name", "Product 1"]).await;
    let mut connection = redis.connection().await;
    assert_eq!(product(&mut connection, "1").await.unwrap().unwrap()["name"], "Product 1");
    assert_eq!(product(&mut connection, "2").await.unwrap(), None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_alerts_say_runs() {
    run(&["docs/alerts.md"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_other_documents_say_runs() {
    let documents = documents();
    run(&documents.iter().map(String::as_str).filter(|file| !LONG.contains(file)).collect::<Vec<_>>()).await;
}

/// Blocks in Rust stand in this file, where they are compiled.
fn rust(text: &str) -> Result<(), String> {
    let here = include_str!("documents.rs");
    if here.contains(text) { Ok(()) } else { Err("tests/documents.rs does not contain it".to_owned()) }
}

#[rustfmt::skip]
async fn product(
    redis: &mut redis::aio::MultiplexedConnection,
    id: &str,
) -> redis::RedisResult<Option<std::collections::HashMap<String, String>>> {
    let row: std::collections::HashMap<String, String> =
        redis::AsyncCommands::hgetall(redis, format!("cache:product:{id}")).await?;
    Ok((!row.is_empty()).then_some(row))
}
