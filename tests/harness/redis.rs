//! A Redis of a test's own.

use super::{PATIENCE, eventually, skipped};
use nix::sys::signal::Signal;
use prefetchd::cli::servers;
use redis::FromRedisValue;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

/// What the daemon may do and no more: the file for users.
const ACL: &str = include_str!("../../migrations/redis.acl");
const USER: &str = "prefetchd";
pub struct Redis {
    server: servers::Redis,
    daemon_user: DaemonUser,
    place: servers::Place,
}

/// Features that not every server has on which the tests run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Feature {
    /// Missing if the server was built without it.
    Tls,
    /// Redis 7.2 and later, and Valkey.
    WaitAof,
    /// Redis 8 and later: with `appendfsync everysec`, WAITAOF answers only after the fsync.
    WaitAofEverysec,
    /// Redis 7 and later: keys in several hash slots of a cluster.
    Lanes,
    /// Redis 7 and later: the encoding of small hashes.
    Listpack,
    /// Redis 7 and later: a limit for all clients together.
    MaxmemoryClients,
    /// Redis 7 and later: commands that a user may run on some keys only.
    Selectors,
    /// Redis 7 and later: it can be made to answer more often while it loads its file.
    LoadingInterval,
    /// Redis 7 and later: a node of a cluster announces a host name.
    AnnouncedHostname,
    /// Valkey 9: a hash slot moves to another node of a cluster atomically.
    AtomicMove,
    /// Redis 7 and later: the address from which a server connects to others can be set.
    SourceAddress,
}

/// The user of `migrations/redis.acl` on one server. The server's configuration creates it, so that it survives a
/// restart, and it gets key patterns as daemons with other tables and slots start.
#[derive(Clone)]
pub struct DaemonUser {
    file: PathBuf,
    socket: PathBuf,
    /// In addition to those in the file: key patterns, and commands that a setting needs.
    rules: Arc<Mutex<BTreeSet<String>>>,
}

impl DaemonUser {
    /// Grants these rules, now and after a restart. A rule that this version does not know is left out.
    pub fn grant(&self, rules: impl IntoIterator<Item = String>) {
        let url = format!("unix://{}?pass={}", self.socket.display(), servers::redis_password());
        let running = redis::Client::open(url).unwrap().get_connection();
        let mut running = running.ok();
        for rule in rules {
            // A right that a test has revoked meanwhile stays revoked.
            if self.rules.lock().unwrap().contains(&rule) {
                continue;
            }
            let taken = match &mut running {
                Some(server) => redis::cmd("ACL").arg(&["SETUSER", USER, &rule]).exec(server),
                None => Ok(()),
            };
            // Tests that use a password set it later, or change the server's users themselves.
            let unknown = taken.is_err_and(|error| error.to_string().contains("SETUSER"));
            if !unknown {
                self.rules.lock().unwrap().insert(rule);
            }
        }
        self.write();
    }

    fn write(&self) {
        let line = ACL.lines().find(|line| line.starts_with("user ")).unwrap();
        // The patterns in the file are the demo's; each daemon here has its own.
        let words = line.split(' ').filter(|word| !word.starts_with('~')).map(str::to_owned);
        let rules = self.rules.lock().unwrap();
        // The file sets no password.
        let words = words.chain([format!(">{}", servers::redis_password())]).chain(rules.iter().cloned());
        std::fs::write(&self.file, words.map(|word| quoted(&word)).collect::<Vec<_>>().join(" ") + "\n").unwrap();
    }
}

/// Quotes a word for redis.conf.
fn quoted(word: &str) -> String {
    format!("\"{}\"", word.replace('\\', "\\\\").replace('"', "\\\""))
}

impl Redis {
    pub fn start() -> Self {
        Self::with(&[])
    }

    /// Starts it with additional arguments, such as `--appendonly yes`. Without any, it keeps nothing when it stops.
    pub fn with(args: &[&str]) -> Self {
        Self::configured("", args)
    }

    /// Returns the file of a module that comes with the server, for `--loadmodule`.
    pub fn module(name: &str) -> Option<String> {
        let file = PathBuf::from(std::env::var_os("PREFETCHD_TEST_REDIS")?).join(name);
        file.exists().then(|| file.to_str().unwrap().to_owned())
    }

    /// Starts it with additional lines in its configuration file, too.
    pub fn configured(lines: &str, args: &[&str]) -> Self {
        let place = servers::Place::new("prefetchd-test-").unwrap();
        // Files with this name are removed together with the server, even if the test program is killed.
        let file = place.path().join("redis.users");
        let socket = place.path().join("redis/redis.sock");
        let daemon_user = DaemonUser { file: file.clone(), socket, rules: Arc::default() };
        daemon_user.write();
        let password = servers::redis_password();
        let config = match args.contains(&"--sentinel") {
            true => format!("{lines}\nsentinel auth-pass mymaster {password}\n"),
            // The master of a replica uses the same password.
            false => format!("masterauth {password}\ninclude {}\n{lines}\n", file.display()),
        };
        let server =
            servers::Redis::start_new(&place, "redis", &config, args).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(server.socket(), daemon_user.socket);
        Self { server, daemon_user, place }
    }

    /// Allows DEBUG, which servers since Redis 7 forbid by default.
    pub async fn with_debug() -> Self {
        let redis = Self::start();
        match redis.has_setting("enable-debug-command").await {
            false => redis,
            true => Self::with(&["--enable-debug-command", "yes"]),
        }
    }

    /// Starts a replica of this server, and returns once it has synchronized.
    pub async fn replica(&self) -> Self {
        // Redis 6.2 rejects the two words as one argument.
        let replica = Self::with(&["--replicaof", "127.0.0.1", &self.port().to_string()]);
        let both = async || {
            let ask = ["INFO", "replication"];
            (self.command::<String>(&ask).await, replica.command::<String>(&ask).await)
        };
        // The master may report `online` while the replica still loads what it was sent.
        let synchronized = |(master, replica): &(String, String)| {
            master.contains("state=online") && replica.contains("master_link_status:up")
        };
        eventually("the replica is synchronized", both, synchronized).await;
        replica
    }

    pub async fn has(&self, feature: Feature) -> bool {
        match feature {
            // Since Redis 8 the settings exist without it, too. A server with TLS support asks for a certificate.
            Feature::Tls => {
                let started = servers::Redis::start_new(&self.place, "tls", "", &["--tls-port", "1"]);
                started.is_err_and(|error| error.to_string().contains("No tls-cert-file configured"))
            }
            Feature::WaitAof => {
                let about: Vec<redis::Value> = self.command(&["COMMAND", "INFO", "WAITAOF"]).await;
                about.first().is_some_and(|about| *about != redis::Value::Nil)
            }
            Feature::WaitAofEverysec => {
                let version = self.version().await;
                let major = version.strip_prefix("Redis ").and_then(|version| version.split('.').next());
                major.is_some_and(|major| major.parse::<u32>().unwrap() >= 8)
            }
            Feature::Lanes | Feature::Listpack => self.has_setting("hash-max-listpack-value").await,
            Feature::Selectors | Feature::MaxmemoryClients => self.has_setting("maxmemory-clients").await,
            Feature::AnnouncedHostname => self.has_setting("cluster-announce-hostname").await,
            Feature::AtomicMove => {
                let about: Vec<redis::Value> = self.command(&["COMMAND", "INFO", "CLUSTER|MIGRATESLOTS"]).await;
                about.first().is_some_and(|about| *about != redis::Value::Nil)
            }
            Feature::SourceAddress => self.has_setting("bind-source-addr").await,
            Feature::LoadingInterval => self.has_setting("loading-process-events-interval-bytes").await,
        }
    }

    async fn has_setting(&self, name: &str) -> bool {
        !self.command::<Vec<String>>(&["CONFIG", "GET", name]).await.is_empty()
    }

    /// Whether the installed server lacks it. If so, the test reports that and ends.
    pub async fn lacks(feature: Feature) -> bool {
        let redis = Self::start();
        let has = redis.has(feature).await;
        if !has {
            skipped(format_args!("{} has no {feature:?}", redis.version().await));
        }
        !has
    }

    /// For example `Valkey 8.0.1`.
    pub async fn version(&self) -> String {
        let info: String = self.command(&["INFO", "server"]).await;
        let field = |name: &str| info.lines().find_map(|line| Some(line.strip_prefix(name)?.trim().to_owned()));
        match field("valkey_version:") {
            Some(version) => format!("Valkey {version}"),
            None => format!("Redis {}", field("redis_version:").unwrap()),
        }
    }

    /// The URL for the tests themselves, without limits.
    pub fn url(&self) -> String {
        self.server.url()
    }

    /// The URL without credentials.
    pub fn bare_url(&self) -> String {
        format!("redis://127.0.0.1:{}/0", self.port())
    }

    /// The URL for the daemon.
    pub fn daemon_url(&self) -> String {
        self.bare_url().replace("redis://", &format!("redis://{}@", self.login()))
    }

    /// The daemon's user and password, as in a URL.
    pub fn login(&self) -> String {
        format!("{USER}:{}", servers::redis_password())
    }

    pub fn daemon_user(&self) -> DaemonUser {
        self.daemon_user.clone()
    }

    pub fn socket(&self) -> PathBuf {
        self.server.socket()
    }

    /// The directory of its files.
    pub fn dir(&self) -> PathBuf {
        self.server.socket().parent().unwrap().to_owned()
    }

    pub fn port(&self) -> u16 {
        self.server.port()
    }

    pub async fn connection(&self) -> redis::aio::MultiplexedConnection {
        let client = redis::Client::open(self.url()).unwrap();
        // The defaults are a second and less, which a busy machine may need for many keys.
        let config = redis::AsyncConnectionConfig::new();
        let config = config.set_response_timeout(Some(PATIENCE)).set_connection_timeout(Some(PATIENCE));
        client.get_multiplexed_async_connection_with_config(&config).await.unwrap()
    }

    /// Executes one command, given as words.
    pub async fn command<T: FromRedisValue>(&self, words: &[&str]) -> T {
        let (name, args) = words.split_first().unwrap();
        redis::cmd(name).arg(args).query_async(&mut self.connection().await).await.unwrap()
    }

    /// Returns a row as it is in Redis; empty if there is none.
    pub async fn hash(&self, key: &str) -> BTreeMap<String, String> {
        self.command(&["HGETALL", key]).await
    }

    pub async fn keys(&self, pattern: &str) -> Vec<String> {
        let mut keys: Vec<String> = self.command(&["KEYS", pattern]).await;
        keys.sort();
        keys
    }

    /// In milliseconds; negative if there is no key or no TTL.
    pub async fn pttl(&self, key: &str) -> i64 {
        self.command(&["PTTL", key]).await
    }

    /// Returns the IDs of the connections whose description contains this, such as `name=prefetchd`.
    pub async fn clients(&self, what: &str) -> BTreeSet<String> {
        let list: String = self.command(&["CLIENT", "LIST"]).await;
        let of_it = list.lines().filter(|client| client.split(' ').any(|part| part == what));
        of_it.map(|client| client.split(' ').find_map(|part| part.strip_prefix("id=")).unwrap().to_owned()).collect()
    }

    /// Closes the connections on which daemons write.
    pub async fn cut_writers(&self) {
        for id in self.clients("name=prefetchd").await {
            // It may be closed already.
            self.command::<i32>(&["CLIENT", "KILL", "ID", &id]).await;
        }
    }

    pub async fn flush(&self) {
        self.command::<()>(&["FLUSHALL"]).await;
    }

    pub fn signal(&self, signal: Signal) {
        self.server.signal(signal);
    }

    /// Whether it was started, and neither stopped nor killed since.
    pub fn is_up(&self) -> bool {
        self.server.is_up()
    }

    /// Stops it in an orderly way: it saves, if it was configured to.
    pub fn stop(&mut self) {
        self.server.signal(Signal::SIGTERM);
        self.server.wait().unwrap();
    }

    pub fn kill(&mut self) {
        self.server.signal(Signal::SIGKILL);
        self.server.wait().unwrap();
    }

    /// Starts it again, on the same port.
    pub fn start_again(&mut self) {
        self.server.start().unwrap_or_else(|error| panic!("{error}"));
    }
}
