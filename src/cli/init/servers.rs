//! The two servers as the command line names them: connected to as the user who runs `init`, and written down for
//! prefetchd, without passwords.

use super::draft::{Layout, ROLE};
use crate::cli::Failure;
use crate::code::Code;
use crate::config::Config;
use crate::password::Password;
use crate::remedy::{Conninfo, Shell, Toml};
use crate::sink::SinkError;
use crate::sink::connect::{Address, RedisTarget};
use crate::sink::server::ServerInfo;
use crate::sink::survey::Survey;
use crate::sink::topology::Topology;
use crate::source::target::{Host, PostgresTarget, TargetServer};
use crate::tls::Roots;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use std::collections::HashMap;

/// What a configuration in the making is called in errors.
const COMMAND_LINE: &str = "the command line";

/// The settings with these servers and these `[[tables]]`, as they will be written, except for passwords.
///
/// # Errors
/// What is wrong with one of the URLs.
pub(super) fn settings(
    postgres: &str,
    redis: &str,
    name: &str,
    tables: &str,
    env: &HashMap<String, String>,
) -> Result<Config, Failure> {
    let (postgres, redis, name) = (Toml(postgres), Toml(redis), Toml(name));
    let text =
        format!("[postgres]\nurl = {postgres}\nslot = {name}\npublication = {name}\n[redis]\nurl = {redis}\n{tables}");
    Config::parse(&text, COMMAND_LINE, env).map_err(|error| Failure::work(error.code, error.to_string()))
}

/// The variables of psql. Settings in the environment are for a daemon, and not for what is written here.
pub(super) fn environment() -> HashMap<String, String> {
    let pairs =
        std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
    pairs.filter(|(name, _)| !name.to_ascii_uppercase().starts_with("PREFETCHD__")).collect()
}

/// Postgres, as the configuration will name it.
#[derive(Debug)]
pub(super) struct PostgresSide {
    /// For the role prefetchd.
    pub url: String,
    /// Words for psql, as the user who runs `init`.
    pub psql: String,
    /// Whether the login here took a password.
    pub has_password: bool,
}

impl PostgresSide {
    /// `given`: as on the command line.
    ///
    /// # Errors
    /// None, if `target` was parsed from it.
    pub async fn of(given: &str, target: &PostgresTarget, env: &HashMap<String, String>) -> Result<Self, Failure> {
        let wrong = |code, error: &dyn std::fmt::Display| Failure::work(code, format!("--postgres: {error}"));
        let further = PostgresTarget::further_options(given, env).map_err(|error| wrong(error.code(), &error))?;
        let password = target.password.read_for_login().await;
        let password = password.map_err(|error| wrong(Code::SecretUnavailable, &error))?;
        let psql = conninfo(target, &target.user, &further);
        Ok(Self {
            url: url(target, &further),
            psql: Shell(&["psql", &psql]).to_string(),
            has_password: password.is_some(),
        })
    }
}

/// A URL, unless one of the servers is a directory.
fn url(target: &PostgresTarget, further: &[(String, String)]) -> String {
    if target.servers.iter().any(|server| matches!(server.host, Host::Socket(_))) {
        return conninfo(target, ROLE, further);
    }
    let encoded = |text: &str| utf8_percent_encode(text, NON_ALPHANUMERIC).to_string();
    let plain = |text: &str| match text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.' | '/'))
    {
        true => text.to_owned(),
        false => encoded(text),
    };
    let hosts = target.servers.iter().map(TargetServer::to_string).collect::<Vec<_>>().join(",");
    let options = further.iter().map(|(name, value)| format!("{name}={}", plain(value))).collect::<Vec<_>>().join("&");
    let question = if options.is_empty() { "" } else { "?" };
    let database = plain(&target.database).replace('/', "%2F");
    format!("postgres://{ROLE}@{hosts}/{database}{question}{options}")
}

fn conninfo(target: &PostgresTarget, user: &str, further: &[(String, String)]) -> String {
    let host = |server: &TargetServer| match &server.host {
        Host::Socket(directory) => directory.display().to_string(),
        Host::Tcp { name, .. } => name.clone(),
    };
    let list = |of: &dyn Fn(&TargetServer) -> String| target.servers.iter().map(of).collect::<Vec<_>>().join(",");
    let (hosts, ports) = (list(&host), list(&|server| server.port.to_string()));
    let known = [("host", hosts.as_str()), ("port", &ports), ("user", user), ("dbname", &target.database)];
    let further = further.iter().map(|(name, value)| (name.as_str(), value.as_str()));
    Conninfo(&known.into_iter().chain(further).collect::<Vec<_>>()).to_string()
}

/// How many servers there are, and who says which of them to use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Single,
    Sentinel,
    Cluster,
}

/// Redis, as the configuration will name it, and what it reports.
#[derive(Debug)]
pub(super) struct RedisSide {
    /// For `user`.
    pub url: String,
    /// Words for redis-cli, as the user who runs `init`.
    pub redis_cli: String,
    /// Whether the Sentinels take a password.
    pub has_sentinel_password: bool,
    pub layout: Layout,
    pub kind: Kind,
    pub db: u32,
    /// Of all masters together. `None` if there is no limit, or none is reported.
    pub maxmemory_bytes: Option<u64>,
    /// `maxmemory-policy`, if it evicts keys.
    pub evicts: Option<String>,
}

impl RedisSide {
    pub async fn look(given: &str, target: &RedisTarget, user: &str) -> Result<Self, SinkError> {
        let kind = match &target.address {
            Address::Cluster(_) => Kind::Cluster,
            Address::Sentinel(_) => Kind::Sentinel,
            Address::Tcp(_) | Address::Unix(_) => Kind::Single,
        };
        let seen = match kind {
            Kind::Cluster => {
                let topology = Topology::discover(target).await?;
                let mut seen = Vec::new();
                for node in topology.nodes() {
                    seen.push(Survey::of_master(target, node).await?.server);
                }
                seen
            }
            Kind::Single | Kind::Sentinel => vec![Survey::connect(target).await?.server().await?],
        };
        let is_old = |server: &ServerInfo| server.software.as_ref().is_some_and(|software| !software.is_seven());
        let layout = match kind == Kind::Cluster && seen.iter().any(is_old) {
            true => Layout::OneHashSlot,
            false => Layout::Anywhere,
        };
        let limits: Option<Vec<u64>> =
            seen.iter().map(|server| server.maxmemory_bytes.filter(|bytes| *bytes > 0)).collect();
        let evicts = seen.iter().find_map(|server| {
            let policy = server.maxmemory_policy.clone().filter(|policy| policy != "noeviction")?;
            server.maxmemory_bytes.is_some_and(|bytes| bytes > 0).then_some(policy)
        });
        let has_sentinel_password =
            matches!(&target.address, Address::Sentinel(sentinels) if sentinels.password != Password::None);
        Ok(Self {
            url: without_password(given, user),
            redis_cli: redis_cli(target),
            has_sentinel_password,
            layout,
            kind,
            db: target.db,
            maxmemory_bytes: limits.map(|limits| limits.iter().sum()),
            evicts,
        })
    }
}

/// Replaces the credentials of a URL that [`RedisTarget::parse`] has accepted.
fn without_password(url: &str, user: &str) -> String {
    let (scheme, rest) = url.split_once("://").unwrap_or(("redis", url));
    let authority = &rest[..rest.find(['/', '?', '#']).unwrap_or(rest.len())];
    let rest = authority.rfind('@').map_or(rest, |at| &rest[at + 1..]);
    let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
    let is_secret = |pair: &&str| {
        let name = pair.split('=').next().unwrap_or_default();
        let decoded = percent_encoding::percent_decode_str(name).decode_utf8_lossy();
        matches!(&*decoded, "user" | "pass" | "password" | "sentinel_password")
    };
    let mut query: Vec<String> =
        query.split('&').filter(|pair| !pair.is_empty() && !is_secret(pair)).map(str::to_owned).collect();
    let is_socket = scheme.ends_with("unix");
    if is_socket {
        query.push(format!("user={user}"));
    }
    let credentials = if is_socket { String::new() } else { format!("{user}@") };
    let question = if query.is_empty() { "" } else { "?" };
    format!("{scheme}://{credentials}{path}{question}{}", query.join("&"))
}

/// Returns a redis-cli that gets the words of one command after it: on a cluster, for all nodes.
fn redis_cli(target: &RedisTarget) -> String {
    let mut words: Vec<String> = Vec::new();
    match &target.address {
        Address::Tcp(at) => words.extend(["-h".into(), at.host.clone(), "-p".into(), at.port.to_string()]),
        Address::Unix(path) => words.extend(["-s".into(), path.display().to_string()]),
        // Its users are not those of the Sentinels.
        Address::Sentinel(_) => words.extend(["-h", "MASTER", "-p", "6379"].map(str::to_owned)),
        Address::Cluster(_) => {}
    }
    words.extend(target.user.iter().flat_map(|user| ["--user".to_owned(), user.clone()]));
    if let Some(tls) = &target.tls {
        words.push("--tls".to_owned());
        if let Roots::File(file) = &tls.roots {
            words.extend(["--cacert".to_owned(), file.display().to_string()]);
        }
    }
    if let Address::Cluster(cluster) = &target.address {
        let at = cluster.at.first().map(|at| format!("{}:{}", at.host, at.port)).unwrap_or_default();
        words.extend(["--cluster".to_owned(), "call".to_owned(), at]);
    }
    let words: Vec<&str> = std::iter::once("redis-cli").chain(words.iter().map(String::as_str)).collect();
    Shell(&words).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_of_redis_lose_their_credentials_only() {
        for (given, written) in [
            ("redis://h:1/2", "redis://u@h:1/2"),
            ("redis://:secret@h", "redis://u@h"),
            ("rediss://admin:se@cret@h/0?cacert=/ca.crt", "rediss://u@h/0?cacert=/ca.crt"),
            ("unix:///s?db=1&pass=secret", "unix:///s?db=1&user=u"),
            (
                "redis+sentinel://a:b@h,g:2/m/1?sentinel_user=s&sentinel%5Fpassword=secret",
                "redis+sentinel://u@h,g:2/m/1?sentinel_user=s",
            ),
            ("redis+cluster://a:secret@h:1,g:2", "redis+cluster://u@h:1,g:2"),
        ] {
            assert_eq!(without_password(given, "u"), written);
        }
    }

    #[tokio::test]
    async fn urls_of_postgres_keep_all_but_the_login() {
        for (given, written, psql) in [
            ("postgres://me:secret@h/d", "postgres://prefetchd@h:5432/d", "psql 'host=h port=5432 user=me dbname=d'"),
            (
                "postgres://me:secret@h:1,g:2/My%20d?sslmode=require&password=x",
                "postgres://prefetchd@h:1,g:2/My%20d?sslmode=require",
                r"psql 'host=h,g port=1,2 user=me dbname='\''My d'\'' sslmode=require'",
            ),
            (
                "host=/tmp user=me password='a b'",
                "host=/tmp port=5432 user=prefetchd dbname=me",
                "psql 'host=/tmp port=5432 user=me dbname=me'",
            ),
        ] {
            let env = HashMap::new();
            let target = PostgresTarget::parse(given, &env).expect("a good URL");
            let side = PostgresSide::of(given, &target, &env).await.expect("the same");
            assert_eq!((side.url.as_str(), side.psql.as_str(), side.has_password), (written, psql, true));
            assert_eq!(PostgresTarget::parse(&side.url, &env).expect("it is read again").describe(), target.describe());
        }
    }
}
