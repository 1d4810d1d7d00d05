//! The real program, with a configuration of its own.

use super::redis::DaemonUser;
use super::{Answer, Cluster, PATIENCE, POLL, Postgres, Redis, eventually, post, request};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use prefetchd::cli::servers::on_path;
use prefetchd::code::Code;
use prefetchd::lsn::Lsn;
use prefetchd::plan::key::parse_template;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

const CATEGORIES: &str = r#"
[[tables]]
name = "categories"
table = "public.categories"
key = "cache:category:{id}"
"#;

const RUNTIME_DIRECTORY: &str = "RUNTIME_DIRECTORY";
/// Debug builds read it: see `src/timing.rs`.
const TIMING: &str = "PREFETCHD_TEST_TIMING";
/// Intervals that are shorter in every test.
const SHORT: &str = "catalog=1s setup_retry=1s";

/// What the configuration contains in addition to every test's settings.
#[derive(Clone)]
pub struct Settings {
    program: PathBuf,
    values: BTreeMap<String, String>,
    tables: String,
    args: Vec<String>,
    env: Vec<(String, String)>,
    /// For the configuration file. It is Redis's own directory, which is removed even if the test program is killed.
    dir: PathBuf,
    /// One for each server that the daemon may log in to.
    redis_users: Vec<DaemonUser>,
}

/// What `migrations/redis.acl` says is needed for lookups.
const LOOKUP_COMMANDS: [&str; 14] = [
    "+hmget",
    "+sadd",
    "+srem",
    "+scard",
    "+sismember",
    "+sscan",
    "+smembers",
    "+zadd",
    "+zrem",
    "+zcard",
    "+zscore",
    "+zscan",
    "+zrange",
    "+zrevrange",
];

impl Settings {
    /// Settings for a daemon between these two servers, for the table of `migrations/`, with the role and the Redis
    /// user of `migrations/`.
    pub fn new(postgres: &Postgres, redis: &Redis) -> Self {
        let (args, tables, dir) = (vec!["run".to_owned()], CATEGORIES.to_owned(), redis.dir());
        // Where the daemon leaves its token, and where the commands look for it.
        let runtime_directory = (RUNTIME_DIRECTORY.to_owned(), dir.join("run").to_str().unwrap().to_owned());
        let env = vec![runtime_directory, (TIMING.to_owned(), SHORT.to_owned())];
        let (program, values) = (env!("CARGO_BIN_EXE_prefetchd").into(), BTreeMap::new());
        Self { program, values, tables, args, env, dir, redis_users: vec![redis.daemon_user()] }
            .text("postgres.url", &postgres.url("prefetchd"))
            .text("postgres.slot", &postgres.slot())
            .text("redis.url", &redis.daemon_url())
            .text("http.listen", "127.0.0.1:0")
            .text("log.format", "json")
    }

    /// The same for a cluster.
    pub fn on_cluster(postgres: &Postgres, cluster: &Cluster) -> Self {
        let settings = Self::new(postgres, cluster.node(0)).text("redis.url", &cluster.daemon_url());
        Self { redis_users: cluster.nodes().iter().map(Redis::daemon_user).collect(), ..settings }
    }

    /// Runs another build of the daemon.
    #[must_use]
    pub fn program(self, program: &Path) -> Self {
        Self { program: program.to_owned(), ..self }
    }

    /// Sets a key of the configuration to a string.
    #[must_use]
    pub fn text(self, key: &str, value: &str) -> Self {
        self.set(key, &Value::from(value).to_string())
    }

    /// Sets a key to a value in TOML's notation.
    #[must_use]
    pub fn set(mut self, key: &str, toml: &str) -> Self {
        self.values.insert(key.to_owned(), toml.to_owned());
        self
    }

    /// Replaces the `[[tables]]` of `categories`.
    #[must_use]
    pub fn tables(mut self, toml: &str) -> Self {
        toml.clone_into(&mut self.tables);
        self
    }

    /// The `[[tables]]`.
    pub fn tables_toml(&self) -> &str {
        &self.tables
    }

    /// Adds an argument after `run`.
    #[must_use]
    pub fn arg(mut self, arg: &str) -> Self {
        self.args.push(arg.to_owned());
        self
    }

    #[must_use]
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.env.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Shortens timeouts that this test would have to wait for, such as `drain=1s`, in addition to those that are short
    /// in every test.
    #[must_use]
    pub fn timing(self, shorter: &str) -> Self {
        self.env(TIMING, &format!("{SHORT} {shorter}"))
    }

    /// Uses the timeouts of a release build.
    #[must_use]
    pub fn real_timing(self) -> Self {
        self.env(TIMING, "")
    }

    fn toml(&self) -> String {
        let mut toml = String::new();
        for (key, value) in &self.values {
            writeln!(toml, "{key} = {value}").unwrap();
        }
        toml + &self.tables
    }

    /// Returns the Redis rights that these settings need in addition to `migrations/redis.acl`, according to the
    /// instructions in it.
    pub fn redis_rules(&self) -> Vec<String> {
        let value = |key: &str| self.values.get(key).and_then(|toml| serde_json::from_str::<String>(toml).ok());
        let durability = value("redis.durability").unwrap_or_default();
        let url = value("redis.url").unwrap_or_default();
        let cluster = ["+cluster|slots", "+cluster|info"].into_iter().filter(|_| url.contains("+cluster://"));
        let slot = value("postgres.slot").unwrap_or_default();
        let is_one_slot = table_keys(&self.tables).iter().all(|key| key.contains(&format!("{{{{{slot}}}}}")));
        let lanes = [format!("~prefetchd:{{*}}:{slot}:*"), "+evalsha".to_owned(), "+script|load".to_owned()];
        let lanes = lanes.into_iter().filter(|_| url.contains("+cluster://") && !is_one_slot);
        let wait = [("replicas", "+wait"), ("aof", "+waitaof")].into_iter().find(|(of, _)| durability.starts_with(of));
        let is_json = ["format = 'json'", "format = \"json\""].iter().any(|line| self.tables.contains(line));
        let strlen = is_json.then_some("+strlen");
        let documents =
            ["+json.set", "+json.get", "+json.del"].into_iter().filter(|_| self.tables.contains("'redisjson'"));
        let literal = |key: String| match parse_template(&key) {
            Ok(template) => template.literal,
            Err(_) => key.split('{').next().unwrap().to_owned(),
        };
        let literals = table_keys(&self.tables).into_iter().map(literal);
        let own = value("postgres.slot").map(|slot| format!("prefetchd:{{{slot}}}:"));
        let prefixes = literals.chain(own).filter(|prefix| !prefix.is_empty());
        let stream = value("changes.stream").filter(|key| !key.is_empty()).map(|key| format!("~{key}"));
        let lookups = LOOKUP_COMMANDS.iter().filter(|_| self.tables.contains("[[tables.lookups]]"));
        let commands = wait
            .map(|(_, command)| command)
            .into_iter()
            .chain(strlen)
            .chain(documents)
            .chain(cluster)
            .chain(lookups.copied());
        let commands = commands.map(str::to_owned);
        prefixes.map(|prefix| pattern(&prefix)).chain(stream).chain(commands).chain(lanes).collect()
    }

    /// Creates the daemon's user on this server, too, with the rights that these settings need.
    pub fn are_for(&mut self, node: &Redis) {
        node.daemon_user().grant(self.redis_rules());
        self.redis_users.push(node.daemon_user());
    }

    /// Writes these settings to a configuration file, which exists until it is dropped. From here on, Redis lets the
    /// daemon use its keys.
    pub fn file(&self) -> tempfile::NamedTempFile {
        let rules = self.redis_rules();
        self.redis_users.iter().for_each(|user| user.grant(rules.clone()));
        let config = tempfile::Builder::new().suffix(".toml").tempfile_in(&self.dir).unwrap();
        std::fs::write(config.path(), self.toml()).unwrap();
        config
    }

    pub fn environment(&self) -> impl Iterator<Item = (&str, &str)> {
        self.env.iter().map(|(name, value)| (name.as_str(), value.as_str()))
    }
}

/// Returns the key templates in `[[tables]]`, as far as they can be parsed: some tests write invalid TOML.
fn table_keys(toml: &str) -> Vec<String> {
    let is_key = |line: &&str| line.split('=').next().is_some_and(|name| name.trim() == "key");
    let values = toml.lines().filter(is_key).filter_map(|line| line.split_once('=')).map(|(_, value)| value.trim());
    values
        .map(|value| match value.strip_prefix('\'') {
            Some(literal) => literal.trim_end_matches('\'').to_owned(),
            None => serde_json::from_str(value).unwrap_or_else(|_| panic!("a key as JSON writes it: {value}")),
        })
        .collect()
}

/// Returns an ACL pattern for every key with this prefix.
fn pattern(prefix: &str) -> String {
    let escape = |c: char| match c {
        '*' | '?' | '[' | '\\' => format!("\\{c}"),
        // A pattern cannot contain white space.
        c if c.is_whitespace() => "?".to_owned(),
        c => c.to_string(),
    };
    format!("~{}*", prefix.chars().map(escape).collect::<String>())
}

/// What the daemon has logged, and which warnings are allowed.
#[derive(Default)]
struct Log {
    lines: Vec<Value>,
    /// The log is complete.
    ended: bool,
    allowed: Vec<String>,
}

impl Log {
    fn text(&self) -> String {
        self.lines.iter().fold(String::new(), |text, line| text + &line.to_string() + "\n")
    }

    /// Returns the lines that a person would have to look at, and those that are not log lines, such as a panic's.
    fn unexpected(&self) -> Vec<String> {
        // Verdicts only sum up what is logged with its own cause.
        let bad = |line: &&Value| {
            !matches!(line["level"].as_str(), Some("INFO" | "DEBUG" | "TRACE")) && line["verdict"].is_null()
        };
        let is_allowed = |line: &&Value| {
            let (text, code) = (line.to_string(), line["code"].as_str());
            // What a person may look up.
            let has_code = line["level"].is_null() || code.and_then(Code::of).is_some();
            has_code && self.allowed.iter().any(|allowed| text.contains(allowed))
        };
        self.lines.iter().filter(bad).filter(|line| !is_allowed(line)).map(ToString::to_string).collect()
    }
}

/// A test that fails while holding the lock still shows the log.
fn lock(log: &Mutex<Log>) -> MutexGuard<'_, Log> {
    log.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Returns a position of the status: `received`, `applied`, `confirmed` or `server`.
pub fn position(status: &Value, which: &str) -> Option<Lsn> {
    status["lsn"][which].as_str().and_then(|text| text.parse().ok())
}

pub struct Daemon {
    child: Child,
    address: SocketAddr,
    /// The file of the token that the daemon creates if none is configured.
    token_file: PathBuf,
    log: Arc<Mutex<Log>>,
    reader: Option<JoinHandle<()>>,
    config: tempfile::NamedTempFile,
}

impl Daemon {
    /// Starts it with every test's settings, and returns once it listens.
    pub async fn start(postgres: &Postgres, redis: &Redis) -> Self {
        Self::with(&Settings::new(postgres, redis)).await
    }

    /// Returns once it listens.
    pub async fn with(settings: &Settings) -> Self {
        let mut daemon = Self::spawn(settings);
        let line = daemon.logged("listening on").await;
        daemon.address = line["listen"].as_str().and_then(|text| text.parse().ok()).unwrap_or_else(|| panic!("{line}"));
        daemon.token_file.push(format!("{}.token", daemon.address.port()));
        daemon
    }

    /// Runs a daemon that rejects its settings. Returns the exit code and all output.
    pub fn refused(settings: &Settings) -> (Option<i32>, String) {
        let mut daemon = Self::spawn(settings);
        daemon.allow_warnings();
        let status = daemon.wait();
        (status.code(), daemon.log_text())
    }

    fn spawn(settings: &Settings) -> Self {
        let config = settings.file();
        // With setpriv, if installed, daemons are killed together with the test program.
        let mut command = match on_path(&["setpriv"]) {
            Some(setpriv) => {
                let mut command = Command::new(setpriv);
                command.args(["--pdeathsig", "KILL"]).arg(&settings.program);
                command
            }
            None => Command::new(&settings.program),
        };
        command.args(&settings.args).arg("--config").arg(config.path());
        let ours = std::env::vars_os().map(|(name, _)| name);
        for name in
            ours.filter(|name| ["PREFETCHD__", "PG"].iter().any(|ours| name.to_string_lossy().starts_with(ours)))
        {
            command.env_remove(name);
        }
        command.envs(settings.environment());
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let log = Arc::new(Mutex::new(Log::default()));
        let (stderr, into) = (child.stderr.take().unwrap(), Arc::clone(&log));
        let reader = std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines() {
                let line = line.unwrap();
                lock(&into).lines.push(serde_json::from_str(&line).unwrap_or(Value::String(line)));
            }
            lock(&into).ended = true;
        });
        let address = SocketAddr::from(([127, 0, 0, 1], 0));
        let directory = settings.environment().filter(|(name, _)| *name == RUNTIME_DIRECTORY).last();
        let token_file = directory.map_or("", |(_, path)| path).into();
        Self { child, address, token_file, log, reader: Some(reader), config }
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Writes other settings to its configuration file. From here on, Redis lets it use their keys.
    pub fn reconfigure(&self, settings: &Settings) {
        let rules = settings.redis_rules();
        settings.redis_users.iter().for_each(|user| user.grant(rules.clone()));
        std::fs::write(self.config.path(), settings.toml()).unwrap();
    }

    pub fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.child.id()).unwrap())
    }

    // -------------------------------------------------------------------------------------------- its log

    fn log(&self) -> MutexGuard<'_, Log> {
        lock(&self.log)
    }

    /// Returns every line so far, as JSON.
    pub fn log_text(&self) -> String {
        self.log().text()
    }

    /// Returns how many lines contain this text.
    pub fn said(&self, text: &str) -> usize {
        self.log().lines.iter().filter(|line| line.to_string().contains(text)).count()
    }

    /// Loads everything again, repeatedly, until something ends it. Returns once that has begun.
    pub async fn refetches(&self) {
        let (address, token) = (self.address(), self.authorization());
        tokio::spawn(async move {
            let headers = ["Content-Type: application/json", &token];
            let refetch = || post(address, "/v1/admin/refetch", &headers, "{}");
            while refetch().await.is_ok_and(|answer| answer.status == 200) {}
        });
        self.status_when("loading", |status| status["operation"] == "refetch").await;
    }

    /// Waits for the first line that contains this text.
    pub async fn logged(&self, text: &str) -> Value {
        let deadline = Instant::now() + PATIENCE;
        loop {
            {
                let log = self.log();
                if let Some(line) = log.lines.iter().find(|line| line.to_string().contains(text)) {
                    return line.clone();
                }
                assert!(!log.ended, "ended without saying {text:?}:\n{}", log.text());
                assert!(Instant::now() < deadline, "never said {text:?}:\n{}", log.text());
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// This test causes trouble, so WARN and ERROR lines do not fail it.
    pub fn allow_warnings(&self) {
        self.allow_warning("");
    }

    /// WARN and ERROR lines that contain this text do not fail the test.
    pub fn allow_warning(&self, text: &str) {
        self.log().allowed.push(text.to_owned());
    }

    // -------------------------------------------------------------------------------------------- its responses

    pub async fn get(&self, target: &str) -> Answer {
        self.request("GET", target).await
    }

    pub async fn request(&self, method: &str, target: &str) -> Answer {
        request(self.address, method, target)
            .await
            .unwrap_or_else(|error| panic!("{method} {target}: {error}\n{}", self.log_text()))
    }

    /// Requests an admin operation, such as `pause` or `refetch`.
    pub async fn operate(&self, operation: &str, body: &Value) -> Answer {
        let target = format!("/v1/admin/{operation}");
        let headers = ["Content-Type: application/json", &self.authorization()];
        let answer = post(self.address, &target, &headers, &body.to_string()).await;
        answer.unwrap_or_else(|error| panic!("{operation}: {error}\n{}", self.log_text()))
    }

    pub fn token_file(&self) -> &Path {
        &self.token_file
    }

    pub fn token(&self) -> String {
        std::fs::read_to_string(&self.token_file).unwrap_or_else(|error| panic!("{error}\n{}", self.log_text()))
    }

    /// Returns the header line with its token.
    pub fn authorization(&self) -> String {
        format!("Authorization: Bearer {}", self.token())
    }

    pub async fn status(&self) -> Value {
        self.get("/v1/status").await.json()
    }

    /// Returns the value of each series, for example 1 for `prefetchd_state{state="streaming"}`.
    pub async fn metrics(&self) -> BTreeMap<String, f64> {
        let text = self.get("/metrics").await.body;
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        lines.filter_map(|line| line.rsplit_once(' ')).map(|(s, v)| (s.to_owned(), v.parse().unwrap())).collect()
    }

    /// Polls the status until it is as wanted, and returns it.
    pub async fn status_when(&self, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let status = self.status().await;
            if wanted(&status) {
                return status;
            }
            assert!(Instant::now() < deadline, "never {what}; last: {status}\n{}", self.log_text());
            tokio::time::sleep(POLL).await;
        }
    }

    /// Waits until `/readyz` answers 200.
    pub async fn ready(&self) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let answer = self.get("/readyz").await;
            if answer.status == 200 {
                return;
            }
            assert!(Instant::now() < deadline, "never ready: {}\n{}", answer.body, self.log_text());
            tokio::time::sleep(POLL).await;
        }
    }

    /// Waits until everything before `lsn` is applied. Does not count as a read.
    pub async fn applied(&self, lsn: Lsn) {
        self.status_when(&format!("applied {lsn}"), |status| position(status, "applied") >= Some(lsn)).await;
    }

    /// Returns the most memory that it has ever used, in bytes.
    pub fn peak_memory_bytes(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
    }

    // -------------------------------------------------------------------------------------------- its end

    pub fn signal(&self, signal: Signal) {
        if signal == Signal::SIGSTOP {
            self.allow_warning("this process did not run for");
        }
        kill(self.pid(), signal).unwrap();
    }

    /// Stops it after draining. Returns the exit code, and asserts that nothing unexpected was logged.
    pub async fn stop(self) -> Option<i32> {
        self.signal(Signal::SIGTERM);
        self.ended().await
    }

    /// Waits for a daemon that was told to stop. Returns the exit code, and asserts that nothing unexpected was logged.
    pub async fn ended(mut self) -> Option<i32> {
        let ended = eventually("the daemon ends", async || self.child.try_wait().unwrap(), Option::is_some).await;
        self.read_to_the_end();
        self.check();
        ended.and_then(|status| status.code())
    }

    /// Kills it, as in a crash, and asserts that nothing unexpected was logged before.
    pub fn kill9(mut self) {
        self.child.kill().unwrap();
        self.wait();
        self.check();
    }

    fn wait(&mut self) -> ExitStatus {
        let status = self.child.wait().unwrap();
        self.read_to_the_end();
        status
    }

    fn read_to_the_end(&mut self) {
        if let Some(reader) = self.reader.take() {
            reader.join().unwrap();
        }
    }

    fn check(&self) {
        let log = self.log();
        let unexpected = log.unexpected();
        assert!(
            unexpected.is_empty(),
            "unexpected in the log:\n{}\n\nall of it:\n{}",
            unexpected.join("\n"),
            log.text()
        );
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
            if std::thread::panicking() {
                eprintln!("the daemon's log:\n{}", self.log_text());
            } else {
                self.check();
            }
        }
    }
}
