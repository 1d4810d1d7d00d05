//! `prefetchd demo`: runs the daemon on a throwaway Postgres and Redis, or Redis Cluster, and prints commands to try it
//! with.
//!
//! The daemon and its settings are the same as elsewhere; only the servers, and the table that `migrations/` creates,
//! belong to the demo. It does not start, stop or remove servers that the user provided: there it applies the
//! migrations as far as the role may, and leaves table, role, publication, slot and keys in place.

mod desk;

use crate::bridge::BridgeError;
use crate::bridge::context::own_keys;
use crate::checkpoint::TableState;
use crate::cli::page;
use crate::cli::servers::{self, Cluster, Place, Postgres, Redis, ServerError};
use crate::code::Code;
use crate::config::{Config, ConfigError};
use crate::daemon::{self, Daemon};
use crate::error::Disposition;
use crate::progress::resume::Adopt;
use crate::sink::any_reader::AnyReader;
use crate::source::SourceError;
use crate::source::connect;
use crate::source::target::{PostgresTarget, TargetError};
use crate::status::{ChangeEvent, State, Status};
use crate::terminal::printable;
use desk::{DemoDesk, DemoRedis};
use std::collections::HashMap;
use std::fmt;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::oneshot;
use tokio::time::Instant;
use tokio_postgres::error::SqlState;
use tokio_util::sync::CancellationToken;

/// In the order of their application.
const MIGRATIONS: [(&str, &str); 4] = [
    ("001_categories.sql", include_str!("../../../migrations/001_categories.sql")),
    ("002_role.sql", include_str!("../../../migrations/002_role.sql")),
    ("003_publication.sql", include_str!("../../../migrations/003_publication.sql")),
    ("004_promotions.sql", include_str!("../../../migrations/004_promotions.sql")),
];
const DATABASE: &str = "shop";
/// Has the rights that `migrations/002_role.sql` grants, and no others.
const ROLE: &str = "prefetchd";
/// Further changes within a second are counted instead of printed.
const LINES_PER_SECOND: u64 = 100;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Port of the demo's page on 127.0.0.1; 0 for any free port
    #[arg(long, value_name = "N", default_value_t = 8787)]
    port: u16,
    /// Start a Redis Cluster instead of one Redis: three masters and three replicas (Redis 7.0 or later)
    ///
    /// Its nodes talk to each other without a password, so other users of this machine could join them.
    #[arg(long, conflicts_with = "redis_url")]
    cluster: bool,
    /// Keep the directory of the throwaway servers
    #[arg(long)]
    keep: bool,
    /// Use this Postgres (wal_level=logical) instead of a throwaway one; migrations/ are applied, nothing is removed
    #[arg(long, value_name = "URL")]
    postgres_url: Option<String>,
    /// Use this Redis instead of a throwaway one
    #[arg(long, value_name = "URL")]
    redis_url: Option<String>,
}

#[derive(Debug, thiserror::Error)]
pub enum DemoError {
    #[error(
        "port {0} is taken: stop the program that uses it, or choose another port with --port (0 for any free port)"
    )]
    PortTaken(u16),
    #[error(transparent)]
    Server(#[from] ServerError),
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Postgres(#[from] SourceError),
    #[error("migrations/{file}: {error}")]
    Migration { file: &'static str, error: String },
    #[error(transparent)]
    Daemon(#[from] BridgeError),
    #[error("a task ended unexpectedly: {0}")]
    Task(#[from] tokio::task::JoinError),
}

impl DemoError {
    pub fn code(&self) -> Code {
        match self {
            DemoError::PortTaken(_) => Code::ListenAddress,
            DemoError::Server(error) => error.code(),
            DemoError::Config(error) => error.code,
            DemoError::Postgres(error) => error.code(),
            DemoError::Daemon(error) => error.code(),
            DemoError::Migration { .. } => Code::DemoServers,
            DemoError::Task(_) => Code::Internal,
        }
    }

    pub fn disposition(&self) -> Disposition {
        match self {
            DemoError::Config(_) => Disposition::Stop,
            DemoError::Postgres(error) => error.disposition(),
            DemoError::Daemon(error) => error.disposition(),
            DemoError::PortTaken(_) | DemoError::Server(_) | DemoError::Migration { .. } | DemoError::Task(_) => {
                Disposition::Retry
            }
        }
    }
}

/// Runs until `stop`, and leaves nothing behind.
///
/// # Errors
/// If a server cannot be started, the port is taken, or the daemon fails.
pub async fn run(args: Args, stop: CancellationToken) -> Result<(), DemoError> {
    let Args { port, cluster, keep, postgres_url, redis_url } = args;
    // Found out before the servers are started.
    if TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_err() {
        return Err(DemoError::PortTaken(port));
    }
    let own_postgres = postgres_url.is_none();
    let own_redis = match (&redis_url, cluster) {
        (Some(_), _) => RedisKind::Given,
        (None, false) => RedisKind::One,
        (None, true) => RedisKind::Cluster,
    };
    let owns_servers = own_postgres || own_redis != RedisKind::Given;
    if owns_servers {
        say("starting throwaway servers ...");
    }
    let place = Place::new("prefetchd-demo-")?;
    let place = if keep && owns_servers { place.kept() } else { place };
    let servers = tokio::task::spawn_blocking(move || Servers::start(place, own_postgres, own_redis)).await??;

    let urls = Urls {
        postgres: postgres_url.or_else(|| servers.postgres.as_ref().map(|p| p.url(ROLE, DATABASE))).unwrap_or_default(),
        redis: redis_url.or_else(|| servers.redis_url()).unwrap_or_default(),
    };
    let first = config(&urls, port, DemoTables::One)?;
    let writer = tokio::select! {
        prepared = prepare(&servers, &first) => prepared?,
        () = stop.cancelled() => return Ok(()),
    };
    let config = config(&urls, port, writer.tables)?;
    let reader = AnyReader::connect_lazy(&config.redis.target, &own_keys(&config), config.lanes());

    // A Redis that the user provided may have the checkpoint of the last demo's throwaway Postgres.
    let adopt = if own_postgres { Adopt::Accept } else { Adopt::Refuse };
    let (started, daemon) = oneshot::channel();
    let (ask, asked) = desk::channel();
    let daemon_runs = daemon::run(config, adopt, stop, Some(ask), None, |daemon| {
        let _ = started.send(daemon);
    });
    let shown = async {
        if let Ok(daemon) = daemon.await {
            let desk = DemoDesk {
                daemon: daemon.clone(),
                postgres: writer.target,
                reader,
                redis: servers.redis.clone(),
                has_promotions: writer.tables == DemoTables::Two,
                psql: update_line(&servers, &urls),
                reshard: ClusterLines::of(&servers).map(|lines| lines.reshard),
                under_way: Arc::default(),
            };
            tokio::join!(show(daemon, &servers, &urls), desk::serve(desk, asked));
        }
        std::future::pending::<()>().await;
    };
    tokio::select! {
        ended = daemon_runs => ended?,
        () = shown => {}
    }
    if !own_postgres {
        say("");
        say("Its slot stays in your Postgres and retains WAL until a daemon resumes from it, or until you run:");
        let psql = servers::callable(&["psql"]);
        say(&format!(
            "  {} {} -c \"SELECT pg_drop_replication_slot('prefetchd')\"",
            psql.display(),
            quoted(&urls.postgres)
        ));
    }
    if keep && owns_servers {
        say("");
        say(&format!("kept {}", servers.place.path().display()));
    }
    Ok(())
}

/// A closed stdout must not end the demo.
fn say(line: &str) {
    let _ = super::print(&(printable(line) + "\n"));
}

// ------------------------------------------------------------------------------------------------ the servers

/// Which Redis the demo uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum RedisKind {
    Given,
    One,
    Cluster,
}

impl DemoRedis {
    fn start(place: &Place, kind: RedisKind) -> Result<Self, ServerError> {
        Ok(match kind {
            RedisKind::Given => DemoRedis::Given,
            RedisKind::One => DemoRedis::One(Arc::new(Mutex::new(Redis::start_new(place, "redis", "", &[])?))),
            RedisKind::Cluster => DemoRedis::Cluster(Arc::new(Mutex::new(Cluster::start_new(place, 1)?))),
        })
    }
}

/// Dropped in this order, the directory last.
struct Servers {
    postgres: Option<Postgres>,
    redis: DemoRedis,
    place: Place,
}

impl Servers {
    fn start(place: Place, postgres: bool, redis: RedisKind) -> Result<Self, ServerError> {
        let redis = DemoRedis::start(&place, redis)?;
        // The recommended setting, so that the page has a limit to show.
        let settings = [("max_slot_wal_keep_size", "1GB")];
        let postgres = if postgres { Some(Postgres::start_new(&place, &settings)?) } else { None };
        Ok(Self { postgres, redis, place })
    }

    fn own_any(&self) -> bool {
        self.postgres.is_some() || !matches!(self.redis, DemoRedis::Given)
    }

    fn redis_url(&self) -> Option<String> {
        match &self.redis {
            DemoRedis::Given => None,
            DemoRedis::One(redis) => Some(locked(redis).socket_url()),
            DemoRedis::Cluster(cluster) => Some(locked(cluster).url()),
        }
    }
}

fn locked<S>(server: &Mutex<S>) -> MutexGuard<'_, S> {
    server.lock().unwrap_or_else(PoisonError::into_inner)
}

/// As the daemon gets them.
struct Urls {
    postgres: String,
    redis: String,
}

/// The tables to follow: that of migration 001 and, if possible, that of migration 004.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum DemoTables {
    One,
    Two,
}

const PROMOTIONS: &str = r#"
        [[tables]]
        name = "promotions"
        table = "public.promotions"
        key = "cache:promotion:{id}"
"#;

/// Not on a cluster, where the rows of the demo lie in all hash slots.
const LOOKUPS: &str = r#"
        [[tables.lookups]]
        name = "by_parent"
        key = "cache:categories-by-parent:{parent_id}"
        order = "display_order"
        [[tables.lookups]]
        name = "all"
        key = "cache:categories-all"
        order = "display_order"
"#;

fn config(urls: &Urls, port: u16, tables: DemoTables) -> Result<Config, ConfigError> {
    let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    // A JSON string is also a TOML string.
    let [postgres, redis] = [&urls.postgres, &urls.redis].map(|url| serde_json::Value::from(url.as_str()).to_string());
    let text = format!(
        r#"
        [postgres]
        url = {postgres}
        [redis]
        url = {redis}
        [http]
        listen = "{listen}"
        [[tables]]
        name = "categories"
        table = "public.categories"
        key = "cache:category:{{id}}"
        {LOOKUPS}{}"#,
        if tables == DemoTables::Two { PROMOTIONS } else { "" }
    );
    // If a Postgres that the user provided needs a password, it may come from where libpq looks for it. No other
    // variable counts: the servers of a configuration in the environment are not meant.
    let env = ["PGPASSWORD", "PGPASSFILE", "HOME"];
    let env: HashMap<_, _> =
        env.iter().filter_map(|&name| Some((name.to_owned(), std::env::var(name).ok()?))).collect();
    Config::parse(&text, "the demo's configuration", &env)
}

/// A role that may write, and the tables that exist.
struct Prepared {
    target: PostgresTarget,
    tables: DemoTables,
}

async fn prepare(servers: &Servers, config: &Config) -> Result<Prepared, DemoError> {
    let Some(postgres) = &servers.postgres else {
        let target = config.postgres.target.clone();
        let tables = migrate(&target, May::LackRights).await?;
        return Ok(Prepared { target, tables });
    };
    let superuser = |database| PostgresTarget::parse(&postgres.url("postgres", database), &HashMap::new());
    let unexpected = |error: TargetError| DemoError::Migration { file: "", error: error.to_string() };
    let client = connect::connect(&superuser("postgres").map_err(unexpected)?, "prefetchd_demo").await?;
    let create = format!("CREATE DATABASE {DATABASE}");
    client.batch_execute(&create).await.map_err(|error| failed("", &error))?;
    let target = superuser(DATABASE).map_err(unexpected)?;
    let tables = migrate(&target, May::LackNothing).await?;
    // The role of migration 002 has no password yet.
    let password = format!("ALTER ROLE {ROLE} PASSWORD '{}'", servers::postgres_password());
    client.batch_execute(&password).await.map_err(|error| failed("", &error))?;
    Ok(Prepared { target, tables })
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum May {
    /// The role may lack the rights for a migration that somebody else has already applied.
    LackRights,
    LackNothing,
}

async fn migrate(target: &PostgresTarget, may: May) -> Result<DemoTables, DemoError> {
    let client = connect::connect(target, "prefetchd_demo").await?;
    for (file, sql) in MIGRATIONS {
        // Our sessions use pg_catalog only.
        match client.batch_execute(&format!("SET search_path = public;\n{sql}")).await {
            Ok(()) => {}
            Err(error) if may == May::LackRights && error.code() == Some(&SqlState::INSUFFICIENT_PRIVILEGE) => {
                say(&format!("not applied: {}", failed(file, &error)));
            }
            Err(error) => return Err(failed(file, &error)),
        }
    }
    // Without the rights for it, the demo continues without its second table.
    let published = "SELECT FROM pg_catalog.pg_publication_tables
                     WHERE pubname = 'prefetchd' AND schemaname = 'public' AND tablename = 'promotions'";
    let found = client.client.query_opt(published, &[]).await.map_err(|error| failed("", &error))?;
    Ok(if found.is_some() { DemoTables::Two } else { DemoTables::One })
}

fn failed(file: &'static str, error: &tokio_postgres::Error) -> DemoError {
    let error = error.as_db_error().map_or_else(|| error.to_string(), |db| db.message().to_owned());
    DemoError::Migration { file, error }
}

// ------------------------------------------------------------------------------------------------ what is printed

async fn show(daemon: Daemon, servers: &Servers, urls: &Urls) {
    // Subscribes before waiting, so that no event is missed.
    let mut events = daemon.events.subscribe();
    let mut status = daemon.status.clone();
    let ready = |s: &std::sync::Arc<Status>| {
        s.state == State::Streaming && s.tables.iter().all(|t| t.state == Some(TableState::Loaded))
    };
    let mut said = None;
    loop {
        let waiting_for = {
            let now = status.borrow_and_update();
            if ready(&now) {
                break;
            }
            now.waiting_for.clone()
        };
        if waiting_for != said {
            if let Some(what) = &waiting_for {
                say(&format!("waiting: {what}"));
            }
            said = waiting_for;
        }
        if status.changed().await.is_err() {
            return;
        }
    }
    lines_to_try(&daemon, servers, urls).lines().for_each(say);
    let mut second = Instant::now();
    let (mut printed, mut more) = (0, 0);
    loop {
        let next_second = second + Duration::from_secs(1);
        tokio::select! {
            event = events.recv() => match event {
                Ok(event) if printed < LINES_PER_SECOND || Instant::now() >= next_second => {
                    if Instant::now() >= next_second {
                        say_more(&mut more);
                        (second, printed) = (Instant::now(), 0);
                    }
                    printed += 1;
                    say(&line(&event));
                }
                Ok(_) => more += 1,
                Err(RecvError::Lagged(missed)) => more += missed,
                Err(RecvError::Closed) => return,
            },
            () = tokio::time::sleep_until(next_second), if more > 0 => {
                say_more(&mut more);
                (second, printed) = (Instant::now(), 0);
            }
        }
    }
}

fn say_more(more: &mut u64) {
    if *more > 0 {
        say(&format!("... and {more} more"));
        *more = 0;
    }
}

fn line(event: &ChangeEvent) -> String {
    let at = jiff::Timestamp::try_from(event.at).unwrap_or_default();
    let at = at.to_zoned(jiff::tz::TimeZone::system()).strftime("%H:%M:%S.%3f");
    let lag = event.lag.as_secs_f64() * 1000.0;
    format!("{at}  {}  {:<8}  {}  {lag:.1} ms", event.table, event.op.as_str(), event.key)
}

/// The password is not put on the command line, which every user of this machine can read.
fn psql_line(servers: &Servers, urls: &Urls) -> String {
    let psql = servers::callable(&["psql"]);
    let psql = psql.display();
    match &servers.postgres {
        None => format!("{psql} {}", quoted(&urls.postgres)),
        Some(postgres) => format!(
            "PGPASSWORD=$(cat {}) {psql} postgres://postgres@127.0.0.1:{}/{DATABASE}",
            quoted(&postgres.password_file().display().to_string()),
            postgres.port()
        ),
    }
}

/// redis-cli with the options for the demo's Redis; for a cluster, it follows redirections.
fn redis_line(servers: &Servers, urls: &Urls) -> String {
    let cli = redis_cli();
    match &servers.redis {
        DemoRedis::Given => match urls.redis.split_once("unix://") {
            Some((_, path)) => format!("{cli} -s {}", quoted(path)),
            None => match first_node(&urls.redis) {
                Some(node) => format!("{cli} -c -u {}", quoted(&node)),
                None => format!("{cli} -u {}", quoted(&urls.redis)),
            },
        },
        DemoRedis::One(redis) => {
            let redis = locked(redis);
            let socket = quoted(&redis.socket().display().to_string());
            format!("{} -s {socket}", with_password(redis.password_file()))
        }
        DemoRedis::Cluster(cluster) => {
            let cluster = locked(cluster);
            format!("{} -c -p {}", with_password(cluster.password_file()), cluster.port(0))
        }
    }
}

fn redis_cli() -> impl fmt::Display {
    servers::callable(&["redis-cli", "valkey-cli"]).display().to_string()
}

fn with_password(file: &Path) -> String {
    format!("REDISCLI_AUTH=$(cat {}) {}", quoted(&file.display().to_string()), redis_cli())
}

/// The first node of a cluster's URL, as redis-cli takes it. `None` if it is not the URL of a cluster.
fn first_node(url: &str) -> Option<String> {
    let (scheme, rest) = url.split_once("+cluster://")?;
    let authority = rest.split(['/', '?']).next().unwrap_or_default();
    let nodes = authority.rsplit_once('@').map_or(authority, |(_, nodes)| nodes);
    let others = nodes.find(',').map_or("", |comma| &nodes[comma..]);
    let one = authority.strip_suffix(others).unwrap_or(authority);
    Some(format!("{}://{one}", scheme.replace("valkey", "redis")))
}

fn update_line(servers: &Servers, urls: &Urls) -> String {
    // A password in a URL that the user provided must not appear on the page.
    let psql = if servers.postgres.is_some() { psql_line(servers, urls) } else { "psql".to_owned() };
    format!(r#"{psql} -c "UPDATE categories SET name = 'Hot drinks' WHERE id = 'cat-001'""#)
}

/// What there is to try with the demo's own cluster.
struct ClusterLines {
    /// Moves hash slots from the master of cat-001, that of cat-002 among them.
    reshard: String,
    /// Swaps the master of cat-001 and its replica.
    failover: String,
    check: String,
}

/// The master of cat-001 in the beginning: see [`Cluster`].
const RESHARD_FROM: usize = 1;
const RESHARD_TO: usize = 2;
const SLOTS_MOVED: u16 = 2000;

impl ClusterLines {
    fn of(servers: &Servers) -> Option<Self> {
        let DemoRedis::Cluster(cluster) = &servers.redis else { return None };
        let cluster = locked(cluster);
        let cli = with_password(cluster.password_file());
        let at = format!("127.0.0.1:{}", cluster.port(0));
        let [from, to] = [RESHARD_FROM, RESHARD_TO].map(|node| cluster.id(node));
        let slots = format!("--cluster-from {from} --cluster-to {to} --cluster-slots {SLOTS_MOVED} --cluster-yes");
        let replica = cluster.port(Cluster::replica_of(RESHARD_FROM));
        Some(Self {
            reshard: format!("{cli} --cluster reshard {at} {slots}"),
            failover: format!("{cli} -p {replica} CLUSTER FAILOVER"),
            check: format!("{cli} --cluster check {at}"),
        })
    }
}

fn lines_to_try(daemon: &Daemon, servers: &Servers, urls: &Urls) -> String {
    let base = format!("http://{}", daemon.listen);
    let page = daemon.admin_token.expose().map_or_else(|| base.clone(), |token| page::address(&base, token));
    let psql = psql_line(servers, urls);
    let redis = redis_line(servers, urls);
    let cluster = ClusterLines::of(servers).map_or_else(String::new, |ClusterLines { reshard, failover, check }| {
        format!(
            r#"
Move hash slots to another master (that of cat-002 is among them), let a replica take over, and see who has what:
  {reshard}
  {failover}
  {check}
"#
        )
    });
    let last = if servers.own_any() {
        "Ctrl-C stops the daemon and its throwaway servers."
    } else {
        "Ctrl-C stops the daemon."
    };
    format!(
        r#"
Categories are in Redis, and follow every commit. Open {page} in a browser: there it can be watched, changed and broken.

Read a row, from Redis or over HTTP:
  {redis} HGETALL cache:category:cat-001
  curl -i {base}/v1/tables/categories/cat-001

Change it in Postgres, and read it again:
  {psql} -c "UPDATE categories SET name = 'Hot drinks' WHERE id = 'cat-001'"
  {psql} -c "INSERT INTO categories VALUES ('cat-006', 'Snacks', 6, true, NULL)"
  {psql} -c "DELETE FROM categories WHERE id = 'cat-006'"

List all categories, or the children of one, in their order; give one another parent, and both lists change at once:
  curl {base}/v1/lookups/categories/all
  curl {base}/v1/lookups/categories/by_parent/cat-001
  {redis} ZRANGE cache:categories-by-parent:cat-001 0 -1
  {psql} -c "UPDATE categories SET parent_id = 'cat-001' WHERE id = 'cat-002'"
{cluster}
How it is doing:
  curl {base}/v1/status

{last} Changes that arrive (time, table, operation, key, from commit to Redis):"#
    )
}

/// Quotes a word for a shell.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:@%+,=".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lanes::Lane;

    #[test]
    fn words_go_through_a_shell_unchanged() {
        for (word, as_written) in [
            ("postgres://postgres@127.0.0.1:20000/shop", "postgres://postgres@127.0.0.1:20000/shop"),
            ("postgres:///shop?host=/tmp", "'postgres:///shop?host=/tmp'"),
            ("host=/a b user=o'x", r"'host=/a b user=o'\''x'"),
            ("", "''"),
        ] {
            assert_eq!(quoted(word), as_written);
        }
    }

    #[test]
    fn redis_cli_is_told_one_node_of_a_cluster() {
        for (url, node) in [
            ("redis+cluster://user:p@127.0.0.1:7000,127.0.0.1:7001", Some("redis://user:p@127.0.0.1:7000")),
            ("valkeys+cluster://:a,b@[::1]:7000,h/0?insecure=1", Some("rediss://:a,b@[::1]:7000")),
            ("rediss+cluster://h", Some("rediss://h")),
            ("redis://h:6379", None),
        ] {
            assert_eq!(first_node(url).as_deref(), node, "{url}");
        }
    }

    #[test]
    fn the_slots_that_move_have_a_row_and_leave_the_master_of_the_first() {
        // Those of the second of three masters.
        let moved = 5461..5461 + SLOTS_MOVED;
        assert!(moved.contains(&Lane::of(b"cache:category:cat-002").number()));
        assert!((moved.end..10_922).contains(&Lane::of(b"cache:category:cat-001").number()));
    }

    #[test]
    fn the_configuration_is_good() {
        let urls = Urls {
            postgres: "postgres://prefetchd@127.0.0.1:20000/shop".to_owned(),
            redis: "redis://127.0.0.1:20001/0".to_owned(),
        };
        let config = config(&urls, 0, DemoTables::Two).unwrap();
        assert_eq!(config.tables.len(), 2);
        assert_eq!(config.tables[0].key.to_string(), "cache:category:{id}");
        assert_eq!(config.tables[0].lookups.len(), 2);
        assert_eq!(config.http.listen, "127.0.0.1:0".parse().unwrap());
    }
}
