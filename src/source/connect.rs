//! Where Postgres is, and the session settings that every connection to it shares.
//!
//! Knows connection strings, hosts and sockets; not what is asked over them. When it is wrong, loads and the stream show
//! the same value as different text (`DateStyle` of a role, say), or a password ends up in a log.

use super::{Closed, ServerError, SourceError, chain, into_io, wire};
use std::fmt;
use std::io;
use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;
use tokio::io::AsyncReadExt;
use tokio::task::JoinHandle;
use tokio_postgres::config::{ChannelBinding, Host, SslMode};
use tokio_postgres::{Client, Config, NoTls};

/// What every session sets, whatever the server, the database or the role would have: COPY and the stream must write
/// one value with the same bytes.
///
/// They are the last of the session's `options`, so that none of the user's own can change them.
pub const SESSION_OPTIONS: &[(&str, &str)] = &[
    ("DateStyle", "ISO"),
    ("IntervalStyle", "postgres"),
    ("TimeZone", "UTC"),
    ("extra_float_digits", "1"),
    ("bytea_output", "hex"),
    ("lc_monetary", "C"),
    // Decides how `regclass` and its like are written.
    ("search_path", "pg_catalog"),
    ("quote_all_identifiers", "off"),
    ("client_encoding", "UTF8"),
    ("standard_conforming_strings", "on"),
    // A policy that hides rows from a load and not from the stream must fail loudly.
    ("row_security", "off"),
    // The daemon bounds its waiting itself: a role's limits would end loads of large tables, and idle sessions.
    ("statement_timeout", "0"),
    ("lock_timeout", "0"),
    ("idle_in_transaction_session_timeout", "0"),
    ("idle_session_timeout", "0"),
];

/// For the socket and for the whole of the login, each, where the connection string says nothing.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long sent bytes may stay unacknowledged by the other kernel before the connection counts as dead. A busy server
/// acknowledges.
const TCP_USER_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a cancel request may take, for its socket and for the rest, each.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(5);
const KEEPALIVE_IDLE: Duration = Duration::from_secs(10);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
const KEEPALIVE_RETRIES: u32 = 3;

/// A Postgres server (or several, of which one will do), a database and a role.
#[derive(Clone)]
pub struct PostgresTarget {
    pub config: Config,
}

/// What is wrong with a connection string. Never quotes a value of it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TargetError {
    #[error(
        "{what}: expected postgres://user@host:5432/database, or host=… port=… user=… dbname=… (special characters of a URL percent-encoded, @ as %40)"
    )]
    Malformed { what: String },
    #[error("sslmode={mode} is not supported yet: use sslmode=disable, or a tunnel")]
    EncryptionUnsupported { mode: String },
    #[error("{option} is not supported yet: remove it, or set sslmode=disable")]
    CertificatesUnsupported { option: String },
    #[error("sslmode={mode} does not exist: use disable, allow, prefer, require, verify-ca or verify-full")]
    UnknownMode { mode: String },
    #[error("channel_binding=require needs an encrypted connection, which is not supported yet: remove it")]
    ChannelBinding,
    #[error("no user in the connection string, and none for uid {uid} on this machine: add one")]
    NoUser { uid: u32 },
}

/// Parameters of libpq that decide nothing here.
const IGNORED: &[&str] =
    &["gssencmode", "gssdelegation", "gsslib", "krbsrvname", "fallback_application_name", "client_encoding"];

impl PostgresTarget {
    /// Reads a libpq URL or `key=value` list. What it leaves out is filled in as libpq would: the user of the operating
    /// system, a database of the user's name, the local socket.
    pub fn parse(url: &str) -> Result<Self, TargetError> {
        let (rest, options) = split_options(url.trim())?;
        refuse_encryption(&options)?;
        let mut config: Config = rest.parse().map_err(|e| TargetError::Malformed { what: chain(&e) })?;
        config.ssl_mode(SslMode::Disable);
        if config.get_channel_binding() == ChannelBinding::Require {
            return Err(TargetError::ChannelBinding);
        }
        if config.get_hosts().iter().any(|h| matches!(h, Host::Tcp(name) if name.contains(['@', ':']))) {
            // Not shown: an unescaped @ in a password makes the rest of the password look like a host.
            return Err(TargetError::Malformed { what: "the host contains '@' or ':'".to_owned() });
        }
        let (hosts, addresses, ports) =
            (config.get_hosts().len(), config.get_hostaddrs().len(), config.get_ports().len());
        if hosts > 0 && addresses > 0 && hosts != addresses {
            let what = format!("{hosts} hosts, but {addresses} addresses in hostaddr");
            return Err(TargetError::Malformed { what });
        }
        if ports > 1 && ports != hosts.max(addresses) {
            return Err(TargetError::Malformed { what: format!("{} hosts, but {ports} ports", hosts.max(addresses)) });
        }
        if hosts == 0 && addresses == 0 {
            let socket = "/var/run/postgresql";
            config.host(if Path::new(socket).is_dir() { socket } else { "localhost" });
        }
        if config.get_user().is_none() {
            let uid = nix::unistd::geteuid();
            let user = nix::unistd::User::from_uid(uid).ok().flatten();
            config.user(user.ok_or(TargetError::NoUser { uid: uid.as_raw() })?.name);
        }
        if config.get_dbname().is_none() {
            let user = config.get_user().unwrap_or_default().to_owned();
            config.dbname(user);
        }
        if config.get_connect_timeout().is_none() {
            config.connect_timeout(CONNECT_TIMEOUT);
        }
        if config.get_tcp_user_timeout().is_none() {
            config.tcp_user_timeout(TCP_USER_TIMEOUT);
        }
        if config.get_keepalives_interval().is_none() {
            config.keepalives_idle(KEEPALIVE_IDLE.min(config.get_keepalives_idle()));
            config.keepalives_interval(KEEPALIVE_INTERVAL);
            config.keepalives_retries(KEEPALIVE_RETRIES);
        }
        Ok(Self { config })
    }

    /// `host:port/database`, for messages; several hosts separated by commas.
    pub fn describe(&self) -> String {
        let hosts: Vec<String> = self.endpoints().iter().map(Endpoint::to_string).collect();
        format!("{}/{}", hosts.join(","), self.config.get_dbname().unwrap_or_default())
    }

    /// The servers to try, in this order.
    pub(super) fn endpoints(&self) -> Vec<Endpoint> {
        let (hosts, addresses, ports) = (self.config.get_hosts(), self.config.get_hostaddrs(), self.config.get_ports());
        (0..hosts.len().max(addresses.len()))
            .filter_map(|i| {
                let address = match (addresses.get(i), hosts.get(i)) {
                    (Some(ip), _) => Address::Ip(*ip),
                    (None, Some(Host::Tcp(name))) => Address::Name(name.clone()),
                    (None, Some(Host::Unix(directory))) => Address::Socket(directory.clone()),
                    (None, None) => return None,
                };
                let port = ports.get(i).or(ports.first()).copied().unwrap_or(5432);
                Some(Endpoint { address, port })
            })
            .collect()
    }

    /// The user's own `options`, then [`SESSION_OPTIONS`]: of two settings the later one holds.
    pub(super) fn options(&self) -> String {
        let pinned = SESSION_OPTIONS.iter().map(|(name, value)| format!("-c {name}={value}"));
        self.config.get_options().map(str::to_owned).into_iter().chain(pinned).collect::<Vec<_>>().join(" ")
    }

    pub(super) fn timeout(&self) -> Duration {
        self.config.get_connect_timeout().copied().unwrap_or(CONNECT_TIMEOUT)
    }
}

impl fmt::Debug for PostgresTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PostgresTarget({} as {})", self.describe(), self.config.get_user().unwrap_or_default())
    }
}

/// One server of a target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Endpoint {
    pub address: Address,
    pub port: u16,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Address {
    Ip(IpAddr),
    Name(String),
    /// The directory of a unix socket.
    Socket(std::path::PathBuf),
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.address {
            Address::Ip(IpAddr::V6(ip)) => write!(f, "[{ip}]:{}", self.port),
            Address::Ip(IpAddr::V4(ip)) => write!(f, "{ip}:{}", self.port),
            Address::Name(name) => write!(f, "{name}:{}", self.port),
            Address::Socket(directory) => write!(f, "{}:{}", directory.display(), self.port),
        }
    }
}

/// The one place that decides about encryption: so far, against it.
fn refuse_encryption(options: &[(String, String)]) -> Result<(), TargetError> {
    let mode = options.iter().rev().find(|(name, _)| name == "sslmode").map(|(_, mode)| mode.as_str());
    match mode {
        Some("disable") => return Ok(()),
        None | Some("allow" | "prefer") => {}
        Some(mode @ ("require" | "verify-ca" | "verify-full")) => {
            return Err(TargetError::EncryptionUnsupported { mode: mode.to_owned() });
        }
        Some(mode) => return Err(TargetError::UnknownMode { mode: mode.to_owned() }),
    }
    match options.iter().find(|(name, _)| matches!(name.as_str(), "sslrootcert" | "sslcert" | "sslkey")) {
        Some((option, _)) => Err(TargetError::CertificatesUnsupported { option: option.clone() }),
        None => Ok(()),
    }
}

/// Whether tokio-postgres, which knows no `verify-ca` and no `sslrootcert`, gets to see an option.
fn is_ours(name: &str) -> bool {
    name.starts_with("ssl") || IGNORED.contains(&name)
}

/// The connection string without the options that are read here, and those.
fn split_options(text: &str) -> Result<(String, Vec<(String, String)>), TargetError> {
    if let Some((scheme, rest)) = text.split_once("://") {
        if !matches!(scheme, "postgres" | "postgresql") {
            return Err(TargetError::Malformed { what: "not a postgres:// URL".to_owned() });
        }
        return Ok(split_url(text, text.len() - rest.len()));
    }
    split_pairs(text)
}

fn split_url(url: &str, authority: usize) -> (String, Vec<(String, String)>) {
    // A password may contain a question mark; credentials end at the first @.
    let behind_credentials = url[authority..].find('@').map_or(authority, |at| authority + at);
    let Some(query) = url[behind_credentials..].find('?').map(|at| behind_credentials + at) else {
        return (url.to_owned(), Vec::new());
    };
    let decode = |s: &str| percent_encoding::percent_decode_str(s).decode_utf8_lossy().into_owned();
    let (mut kept, mut ours) = (Vec::new(), Vec::new());
    for pair in url[query + 1..].split('&').filter(|pair| !pair.is_empty()) {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        let name = decode(name);
        if is_ours(&name) { ours.push((name, decode(value))) } else { kept.push(pair) }
    }
    let rest = if kept.is_empty() { url[..query].to_owned() } else { format!("{}?{}", &url[..query], kept.join("&")) };
    (rest, ours)
}

/// `name = value` or `name = 'va\'lue'`, separated by blanks.
/// <https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-CONNSTRING-KEYWORD-VALUE>
fn split_pairs(text: &str) -> Result<(String, Vec<(String, String)>), TargetError> {
    let malformed = |what: &str| TargetError::Malformed { what: what.to_owned() };
    let (mut kept, mut ours) = (String::new(), Vec::new());
    let mut rest = text.trim_start();
    while !rest.is_empty() {
        let whole = rest;
        let (name, value) = rest.split_once('=').ok_or_else(|| malformed("a word without '='"))?;
        let name = name.trim_end();
        if name.is_empty() || !name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_') {
            // Not shown: it may be the second word of a password.
            return Err(malformed("a word without '=' before an option (values with blanks go into single quotes)"));
        }
        let value = value.trim_start();
        let quoted = value.starts_with('\'');
        let mut end = None;
        let mut decoded = String::new();
        let mut characters = value.char_indices().skip(usize::from(quoted));
        while let Some((at, c)) = characters.next() {
            match c {
                '\\' => decoded.extend(characters.next().map(|(_, escaped)| escaped)),
                '\'' if quoted => {
                    end = Some(at + 1);
                    break;
                }
                c if !quoted && c.is_whitespace() => {
                    end = Some(at);
                    break;
                }
                c => decoded.push(c),
            }
        }
        let end = match end {
            Some(end) => end,
            None if quoted => return Err(malformed("a quote is not closed")),
            None => value.len(),
        };
        rest = value[end..].trim_start();
        if is_ours(name) {
            ours.push((name.to_owned(), decoded));
        } else {
            kept.push_str(&whole[..whole.len() - value.len() + end]);
            kept.push(' ');
        }
    }
    Ok((kept, ours))
}

/// An ordinary connection. Dropping it closes the socket, whatever it was doing.
pub struct PostgresClient {
    pub client: Client,
    target: PostgresTarget,
    task: JoinHandle<()>,
}

/// What became of the request to stop a running statement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum CancelRequest {
    NotSent,
    /// The server has dealt with it: what is sent from now on it cannot hit.
    Handled,
    /// It may hit whatever comes next.
    Unanswered,
}

impl PostgresClient {
    /// Asks the server to stop the running statement, on a connection of its own, as the protocol has it.
    ///
    /// Waits until the server closes that connection. It signals the session twice (the process and its process group),
    /// and may take its time between the two, so even a statement that failed as cancelled does not mean that nothing is
    /// on its way any more.
    ///
    /// <https://www.postgresql.org/docs/current/protocol-flow.html#PROTOCOL-FLOW-CANCELING-REQUESTS>
    pub(super) async fn cancel(&self) -> CancelRequest {
        let token = self.client.cancel_token();
        let mut outcome = CancelRequest::NotSent;
        // Which of several servers this session is on is not known. The others do not know the key that the request names.
        for endpoint in self.target.endpoints() {
            let opened = tokio::time::timeout(CANCEL_TIMEOUT, wire::open(&self.target, &endpoint)).await;
            let Ok(Ok((reader, writer))) = opened else { continue };
            let mut socket = tokio::io::join(reader, writer);
            let handled = async {
                token.cancel_query_raw(&mut socket, NoTls).await.ok()?;
                // The server has nothing to say.
                (socket.read(&mut [0]).await.ok()? == 0).then_some(())
            };
            match tokio::time::timeout(CANCEL_TIMEOUT, handled).await {
                Ok(Some(())) if outcome == CancelRequest::NotSent => outcome = CancelRequest::Handled,
                Ok(Some(())) => {}
                Ok(None) | Err(_) => outcome = CancelRequest::Unanswered,
            }
        }
        outcome
    }
}

impl Drop for PostgresClient {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl std::ops::Deref for PostgresClient {
    type Target = Client;

    fn deref(&self) -> &Client {
        &self.client
    }
}

/// Opens an ordinary connection with [`SESSION_OPTIONS`]. Gives up after the target's connect timeout.
pub async fn connect(target: &PostgresTarget, application_name: &str) -> Result<PostgresClient, SourceError> {
    let mut config = target.config.clone();
    config.application_name(application_name).options(target.options());
    // tokio-postgres applies the timeout to the socket alone: a server that accepts and says nothing needs this one.
    let limit = target.timeout().saturating_mul(u32::try_from(target.endpoints().len().max(1)).unwrap_or(u32::MAX));
    let (client, connection) = match tokio::time::timeout(limit, config.connect(NoTls)).await {
        Ok(connected) => connected.map_err(|error| login_error(target, error))?,
        Err(_) => return Err(SourceError::Silent { at: target.describe(), after: limit }),
    };
    let task = tokio::spawn(async move {
        if let Err(error) = connection.await {
            // Whoever is waiting for an answer gets an error of its own.
            tracing::debug!(error = chain(&error), "connection to postgres ended");
        }
    });
    let client = PostgresClient { client, target: target.clone(), task };
    // Only from Postgres 17 on: unknown names in `options` would end the login.
    let lift =
        "SELECT pg_catalog.set_config(name, '0', false) FROM pg_catalog.pg_settings WHERE name = 'transaction_timeout'";
    client.simple_query(lift).await.map_err(|e| SourceError::query("preparing a session", e))?;
    Ok(client)
}

/// Asked for a password and having none is not the server's error, and so has no code.
pub(super) const NO_PASSWORD: (&str, &str) =
    ("asks for a password, and none is configured", "put it into postgres.url or postgres.password_file");

fn login_error(target: &PostgresTarget, error: tokio_postgres::Error) -> SourceError {
    let at = target.describe();
    if let Some(db) = error.as_db_error() {
        return SourceError::Refused { at, error: ServerError::from(db) };
    }
    let what = chain(&error);
    if what.contains("password missing") {
        return SourceError::Login { at, fact: NO_PASSWORD.0.to_owned(), remedy: NO_PASSWORD.1 };
    }
    if what.contains("unsupported") {
        let remedy = "use scram-sha-256, md5, password or trust in pg_hba.conf";
        return SourceError::Login { at, fact: format!("wants another login ({what})"), remedy };
    }
    match into_io(error) {
        Ok(source) => SourceError::Unreachable { at, source },
        Err(Closed::Yes) => SourceError::Unreachable { at, source: io::ErrorKind::ConnectionAborted.into() },
        Err(Closed::No) => SourceError::Unexpected { doing: format!("logging in to {at}"), what },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(text: &str) -> PostgresTarget {
        PostgresTarget::parse(text).unwrap_or_else(|e| panic!("{text}: {e}"))
    }

    fn refused(text: &str) -> String {
        PostgresTarget::parse(text).expect_err(text).to_string()
    }

    #[test]
    fn both_forms_name_the_same_server() {
        let url = target("postgres://me:pw%40x@db.example:6000/shop?application_name=a%20b&sslmode=disable");
        let pairs = target(r"host = db.example port=6000 user=me password='pw@x' dbname=shop sslmode = 'disable'");
        for t in [&url, &pairs] {
            assert_eq!(t.describe(), "db.example:6000/shop");
            assert_eq!(t.config.get_user(), Some("me"));
            assert_eq!(t.config.get_password(), Some(&b"pw@x"[..]));
        }
        assert_eq!(url.config.get_application_name(), Some("a b"));
        assert_eq!(target("postgres://a@h1,h2:7/x").describe(), "h1:5432,h2:7/x");
        assert_eq!(target("host=/run/pg user=a dbname='a b'").describe(), "/run/pg:5432/a b");
        assert_eq!(target("postgres://a@%2Frun%2Fpg:7/x").describe(), "/run/pg:7/x");
        assert_eq!(target("postgres://a:b?sslmode=x@h/x").config.get_password(), Some(&b"b?sslmode=x"[..]));
        assert_eq!(target(r"host=h user=a password='a\'b\\c'").config.get_password(), Some(&br"a'b\c"[..]));
        assert_eq!(target("postgres://a@h/").describe(), "h:5432/a", "the database has the user's name");
        assert_eq!(target("hostaddr=::1 user=a").describe(), "[::1]:5432/a");
    }

    #[test]
    fn no_form_of_it_shows_a_password() {
        let t = target("postgres://me:hunter2@h/shop");
        for shown in [t.describe(), format!("{t:?}"), format!("{:?}", t.config)] {
            assert!(!shown.contains("hunter2"), "{shown}");
        }
        for text in [
            "postgres://me:hun@hunter2@h/shop",
            "host=h user=me password=x hunter2",
            "host=h password=x hunter2 user=me",
            "host=h password='hunter2",
            "mysql://me:hunter2@h/x",
            "postgres://me:hunter2@h:port/x",
        ] {
            assert!(!refused(text).contains("hunter2"), "{}", refused(text));
        }
    }

    #[test]
    fn encryption_is_refused_by_name_until_it_is_there() {
        for mode in ["require", "verify-ca", "verify-full"] {
            assert!(refused(&format!("postgres://a@h/x?sslmode={mode}")).contains("not supported yet"));
            assert!(refused(&format!("host=h user=a sslmode={mode}")).contains(mode));
        }
        for mode in ["disable", "allow", "prefer"] {
            assert_eq!(target(&format!("postgres://a@h/x?sslmode={mode}&gssencmode=disable")).describe(), "h:5432/x");
        }
        assert!(refused("postgres://a@h/x?sslmode=on").contains("does not exist"));
        assert!(refused("postgres://a@h/x?sslrootcert=/ca.pem").contains("sslrootcert"));
        assert_eq!(target("postgres://a@h/x?sslrootcert=/ca.pem&sslmode=disable").describe(), "h:5432/x");
        assert!(refused("postgres://a@h/x?channel_binding=require").contains("channel_binding"));
    }

    #[test]
    fn an_unknown_option_is_named() {
        assert!(refused("postgres://a@h/x?hots=1").contains("hots"));
        assert!(refused("host=h user=a prot=1").contains("prot"));
        assert!(refused("postgres://a@h1,h2/x?port=1").contains("ports"));
    }

    #[test]
    fn the_users_options_come_first_and_ours_hold() {
        let t = target("postgres://a@h/x?options=-c%20TimeZone%3DEurope/Berlin%20-c%20work_mem%3D1MB");
        let options = t.options();
        assert!(options.starts_with("-c TimeZone=Europe/Berlin -c work_mem=1MB -c DateStyle=ISO "), "{options}");
        assert!(options.contains("-c TimeZone=UTC"));
    }
}
