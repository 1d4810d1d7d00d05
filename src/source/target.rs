//! Which Postgres servers are meant, and how to connect to them: from a connection string and, for what it omits, from
//! the variables and files that libpq reads too.
//!
//! It knows texts and file names, and opens no connection. A mistake here connects the daemon as another user, or
//! elsewhere, than psql with the same string, sends a password in the clear, or writes it to a log.
//!
//! <https://www.postgresql.org/docs/current/libpq-connect.html>
//! <https://www.postgresql.org/docs/current/libpq-envars.html>

use super::settings::SESSION_OPTIONS;
use crate::code::Code;
use crate::password::Password;
use crate::tls::{Identity, Roots, TlsError, TlsSettings, Verify};
use socket2::TcpKeepalive;
use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;
pub use tokio_postgres::config::ChannelBinding;

/// For the socket and for the whole login, each, unless the connection string says otherwise.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long sent bytes may stay unacknowledged by the peer's kernel before the connection counts as dead. A busy server
/// still acknowledges.
const TCP_USER_TIMEOUT: Duration = Duration::from_secs(30);
const KEEPALIVE_IDLE: Duration = Duration::from_secs(10);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
const KEEPALIVE_RETRIES: u32 = 3;
const DEFAULT_PORT: u16 = 5432;
/// Where Debian's packages put the socket.
const DEFAULT_SOCKET: &str = "/var/run/postgresql";

/// The option for which each variable is a default. Passwords are looked up elsewhere: their own files take precedence.
const VARIABLES: &[(&str, &str)] = &[
    ("PGHOST", "host"),
    ("PGHOSTADDR", "hostaddr"),
    ("PGPORT", "port"),
    ("PGUSER", "user"),
    ("PGDATABASE", "dbname"),
    ("PGOPTIONS", "options"),
    ("PGCONNECT_TIMEOUT", "connect_timeout"),
    ("PGTARGETSESSIONATTRS", "target_session_attrs"),
    ("PGCHANNELBINDING", "channel_binding"),
    ("PGREQUIREAUTH", "require_auth"),
    ("PGREQUIREPEER", "requirepeer"),
    ("PGGSSENCMODE", "gssencmode"),
    ("PGSSLMODE", "sslmode"),
    ("PGSSLNEGOTIATION", "sslnegotiation"),
    ("PGSSLROOTCERT", "sslrootcert"),
    ("PGSSLCERT", "sslcert"),
    ("PGSSLKEY", "sslkey"),
    ("PGSSLCERTMODE", "sslcertmode"),
    ("PGSSLCRL", "sslcrl"),
    ("PGSSLCRLDIR", "sslcrldir"),
    ("PGSSLMINPROTOCOLVERSION", "ssl_min_protocol_version"),
    ("PGSSLMAXPROTOCOLVERSION", "ssl_max_protocol_version"),
];
/// Options of libpq that have no effect here.
const IGNORED: &[&str] = &[
    "application_name",
    "client_encoding",
    "fallback_application_name",
    "gssdelegation",
    "gsslib",
    "krbsrvname",
    "load_balance_hosts",
    "sslcompression",
    "sslsni",
];
/// Options of libpq that cannot be honoured here; most of them forbid something, so that ignoring them would be unsafe.
const UNSUPPORTED: &[&str] = &[
    "gssencmode",
    "passfile",
    "require_auth",
    "requirepeer",
    "service",
    "ssl_max_protocol_version",
    "ssl_min_protocol_version",
    "sslcertmode",
    "sslcrl",
    "sslcrldir",
    "sslpassword",
];
/// Values of these that only ask for what happens anyway: GSSAPI is never used, TLS is 1.2 or newer.
const HARMLESS: &[(&str, &[&str])] = &[
    ("gssencmode", &["disable", "prefer"]),
    ("sslcertmode", &["allow"]),
    ("ssl_min_protocol_version", &["TLSv1", "TLSv1.1", "TLSv1.2"]),
    ("ssl_max_protocol_version", &["TLSv1.3"]),
];

/// A Postgres server (or several, any of which is acceptable), a database and a role.
#[derive(Clone)]
pub struct PostgresTarget {
    /// At least one, in the order in which they are tried.
    pub servers: Vec<TargetServer>,
    pub user: String,
    pub password: Password,
    pub database: String,
    /// The user's own `options`, without [`SESSION_OPTIONS`].
    options: Option<String>,
    pub(super) tls: Tls,
    pub(super) channel_binding: ChannelBinding,
    pub(super) wanted: SessionAttrs,
    /// For the socket to one address, and again for everything up to the end of the login.
    pub(super) connect_timeout: Duration,
    pub(super) tcp_user_timeout: Duration,
    pub(super) keepalive: Option<TcpKeepalive>,
}

/// One server of a target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TargetServer {
    pub host: Host,
    pub port: u16,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Host {
    /// The directory of a Unix socket.
    Socket(PathBuf),
    Tcp {
        /// The name that its certificate must show: a host name or an IP address.
        name: String,
        /// Its address; `None`: the name is resolved.
        address: Option<IpAddr>,
    },
}

/// `target_session_attrs`: which of several servers is acceptable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SessionAttrs {
    Any,
    ReadWrite,
    ReadOnly,
    Primary,
    Standby,
    PreferStandby,
}

/// `sslmode`, weakest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum SslMode {
    Disable,
    /// Treated like `Prefer`.
    Allow,
    Prefer,
    Require,
    VerifyCa,
    VerifyFull,
}

/// What `sslmode` and related options ask for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Tls {
    pub mode: SslMode,
    /// Never `None` from `verify-ca` on.
    pub roots: Option<Roots>,
    pub identity: Option<Identity>,
    pub negotiation: Negotiation,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Negotiation {
    /// The server is asked whether it has TLS.
    Asked,
    /// TLS from the first byte (Postgres 17, and proxies).
    Direct,
}

/// How to connect to one server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Encryption {
    Never,
    IfOffered(TlsSettings),
    Required(TlsSettings),
}

/// What is wrong with a connection string. Never quotes a value that may be secret.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TargetError {
    #[error(
        "{what}: expected postgres://user@host:5432/database, or host=… port=… user=… dbname=… (special characters of a URL percent-encoded, @ as %40)"
    )]
    Malformed { what: String },
    #[error("unknown option {option}: correct or remove it")]
    Unknown { option: String },
    #[error("{option} is not supported: remove it")]
    Unsupported { option: String },
    #[error("{option}={value} does not exist: use {choices}")]
    Choice { option: String, value: String, choices: String },
    #[error("{option} is no number: correct it")]
    Number { option: String },
    #[error(
        "sslmode=verify-ca needs the certificate of the CA: name its file with sslrootcert, or use sslmode=verify-full"
    )]
    NoRoots,
    #[error(
        "sslrootcert=system trusts everybody who can get a certificate for any host: use sslmode=verify-full with it"
    )]
    WeakRoots,
    #[error("sslnegotiation=direct needs sslmode=require, verify-ca or verify-full: set one of them")]
    WeakDirect,
    #[error("sslcert and sslkey belong together: give both or none")]
    HalfIdentity,
    #[error("{0}")]
    Tls(#[from] TlsError),
    #[error("no user in the connection string, and none for uid {uid} on this machine: add one")]
    NoUser { uid: u32 },
}

impl TargetError {
    pub fn code(&self) -> Code {
        match self {
            TargetError::Tls(_) => Code::TlsFiles,
            TargetError::Malformed { .. }
            | TargetError::Unknown { .. }
            | TargetError::Unsupported { .. }
            | TargetError::Choice { .. }
            | TargetError::Number { .. }
            | TargetError::NoRoots
            | TargetError::WeakRoots
            | TargetError::WeakDirect
            | TargetError::HalfIdentity
            | TargetError::NoUser { .. } => Code::ConnectionUrl,
        }
    }
}

impl PostgresTarget {
    /// Parses a libpq URL or `key=value` list, and reads the certificates that it names. What it omits is filled in as
    /// libpq would: from `env`, from files in `~/.postgresql`, and finally with the operating system's user, a database
    /// of the user's name, and the local socket. Passwords in `env` are not read.
    ///
    /// Stricter than libpq in one point: without TLS it connects to other machines only if `sslmode=disable` is given.
    pub fn parse(text: &str, env: &HashMap<String, String>) -> Result<Self, TargetError> {
        let mut options = Options::read(text.trim())?;
        options.fill_in(env);
        options.refuse()?;
        let tls = Tls::read(&mut options, env)?;
        let servers = servers(&mut options)?;
        let user = match options.value("user") {
            Some(user) => user,
            None => {
                let uid = nix::unistd::geteuid();
                let user = nix::unistd::User::from_uid(uid).ok().flatten();
                user.ok_or(TargetError::NoUser { uid: uid.as_raw() })?.name
            }
        };
        let seconds = |number: Option<u32>| number.map(|n| Duration::from_secs(n.into()));
        let target = Self {
            servers,
            password: options.value("password").map_or(Password::None, Password::Literal),
            database: options.value("dbname").unwrap_or_else(|| user.clone()),
            user,
            options: options.value("options"),
            tls,
            channel_binding: options.choice("channel_binding", CHANNEL_BINDINGS)?.unwrap_or(ChannelBinding::Prefer),
            wanted: options.choice("target_session_attrs", SESSION_ATTRS)?.unwrap_or(SessionAttrs::Any),
            connect_timeout: seconds(options.number("connect_timeout")?).unwrap_or(CONNECT_TIMEOUT),
            tcp_user_timeout: options
                .number("tcp_user_timeout")?
                .map_or(TCP_USER_TIMEOUT, |ms| Duration::from_millis(ms.into())),
            keepalive: keepalive(&mut options)?,
        };
        match options.0.into_keys().next() {
            Some(option) => Err(TargetError::Unknown { option }),
            None => Ok(target),
        }
    }

    /// Returns the options of a connection string and of `env`, other than those that say who logs in, and where: a
    /// string for another role has them, too.
    ///
    /// # Errors
    /// As [`PostgresTarget::parse`].
    pub fn further_options(text: &str, env: &HashMap<String, String>) -> Result<Vec<(String, String)>, TargetError> {
        let mut options = Options::read(text.trim())?;
        options.fill_in(env);
        options.refuse()?;
        for name in ["user", "password", "host", "port", "dbname"] {
            options.value(name);
        }
        Ok(options.0.into_iter().map(|(name, given)| (name, given.value)).collect())
    }

    /// Whether [`PostgresTarget::parse`] reads `variable`.
    pub fn reads(variable: &str) -> bool {
        VARIABLES.iter().any(|(name, _)| *name == variable)
    }

    /// The key file of the client certificate.
    pub fn key_file(&self) -> Option<&Path> {
        self.tls.identity.as_ref().map(|identity| identity.key.as_path())
    }

    /// `host:port/database`, for messages; several hosts separated by commas.
    pub fn describe(&self) -> String {
        let hosts: Vec<String> = self.servers.iter().map(TargetServer::to_string).collect();
        format!("{}/{}", hosts.join(","), self.database)
    }

    /// Whether a server on another machine is accepted without verifying its certificate.
    pub fn is_unverified(&self) -> bool {
        let elsewhere = |server: &TargetServer| match &server.host {
            Host::Socket(_) => false,
            Host::Tcp { name, address } => !is_here(name, *address),
        };
        let verified = self.tls.mode != SslMode::Disable && self.tls.settings().verify != Verify::Nothing;
        !verified && self.servers.iter().any(elsewhere)
    }

    /// The port, if the only server is this machine, over TCP.
    pub fn loopback_port(&self) -> Option<u16> {
        match self.servers.as_slice() {
            [TargetServer { host: Host::Tcp { name, address }, port }] => is_here(name, *address).then_some(*port),
            _ => None,
        }
    }

    /// The same database and role, through the socket in `directory`.
    pub fn through_socket(&self, directory: &Path, port: u16) -> Self {
        let servers = vec![TargetServer { host: Host::Socket(directory.to_owned()), port }];
        Self { servers, ..self.clone() }
    }

    /// The user's own `options`, followed by [`SESSION_OPTIONS`]: of two settings the later one wins.
    pub(super) fn options(&self) -> String {
        let pinned = SESSION_OPTIONS.iter().map(|(name, value)| format!("-c {name}={}", value.replace(' ', "\\ ")));
        self.options.iter().cloned().chain(pinned).collect::<Vec<_>>().join(" ")
    }
}

fn is_here(name: &str, address: Option<IpAddr>) -> bool {
    let address = address.or_else(|| name.parse().ok());
    address.map_or(name == "localhost", |address| address.is_loopback())
}

impl fmt::Debug for PostgresTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PostgresTarget({} as {})", self.describe(), self.user)
    }
}

impl fmt::Display for TargetServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.host {
            Host::Socket(directory) => write!(f, "{}:{}", directory.display(), self.port),
            Host::Tcp { name, .. } if name.contains(':') => write!(f, "[{name}]:{}", self.port),
            Host::Tcp { name, .. } => write!(f, "{name}:{}", self.port),
        }
    }
}

impl SessionAttrs {
    /// The query to run in a session, unless any server is acceptable. Its answer goes to [`SessionAttrs::suits`].
    pub const QUESTION: &str = "SELECT pg_is_in_recovery(), current_setting('transaction_read_only')";

    /// What to look for, in this order; every round tries all servers.
    pub fn rounds(self) -> &'static [SessionAttrs] {
        match self {
            SessionAttrs::Any => &[SessionAttrs::Any],
            SessionAttrs::ReadWrite => &[SessionAttrs::ReadWrite],
            SessionAttrs::ReadOnly => &[SessionAttrs::ReadOnly],
            SessionAttrs::Primary => &[SessionAttrs::Primary],
            SessionAttrs::Standby => &[SessionAttrs::Standby],
            SessionAttrs::PreferStandby => &[SessionAttrs::Standby, SessionAttrs::Any],
        }
    }

    /// Checks the answer to the query; the error says what the server is instead.
    pub fn suits(self, in_recovery: Option<&str>, read_only: Option<&str>) -> Result<(), &'static str> {
        let (in_recovery, read_only) = (in_recovery == Some("t"), read_only == Some("on"));
        match self {
            SessionAttrs::ReadWrite if read_only => Err("it is read-only, and target_session_attrs=read-write"),
            SessionAttrs::ReadOnly if !read_only => Err("it allows writes, and target_session_attrs=read-only"),
            SessionAttrs::Primary if in_recovery => Err("it is a standby, and target_session_attrs=primary"),
            SessionAttrs::Standby if !in_recovery => Err("it is no standby, and target_session_attrs asks for one"),
            _ => Ok(()),
        }
    }
}

impl Tls {
    fn read(options: &mut Options, env: &HashMap<String, String>) -> Result<Self, TargetError> {
        let home = env.get("HOME").filter(|home| !home.is_empty()).map(|home| Path::new(home).join(".postgresql"));
        let usual = |name: &str| home.as_ref().map(|home| home.join(name));
        let there = |name: &str| usual(name).filter(|path| path.exists());
        let named: [Option<String>; 3] = ["sslrootcert", "sslcert", "sslkey"].map(|name| options.value(name));
        let any_named = named.iter().any(Option::is_some);
        let [roots, certificate, key] = named;
        let roots = match roots.as_deref() {
            Some("system") => Some(Roots::System),
            Some(path) => Some(Roots::File(path.into())),
            None => there("root.crt").map(Roots::File),
        };
        let usual_mode = if roots == Some(Roots::System) { SslMode::VerifyFull } else { SslMode::Prefer };
        let mode = options.choice("sslmode", SSL_MODES)?.unwrap_or(usual_mode);
        let roots = match (mode, roots) {
            (SslMode::VerifyFull, None) => Some(Roots::System),
            (SslMode::VerifyCa, None) => return Err(TargetError::NoRoots),
            (SslMode::Allow | SslMode::Prefer | SslMode::Require | SslMode::VerifyCa, Some(Roots::System)) => {
                return Err(TargetError::WeakRoots);
            }
            (_, roots) => roots,
        };
        let certificate = certificate.map(PathBuf::from).or_else(|| there("postgresql.crt"));
        let key = key.map(PathBuf::from);
        let identity = match (certificate, key.is_some()) {
            (Some(certificate), _) => {
                let key = key.or_else(|| usual("postgresql.key")).ok_or(TargetError::HalfIdentity)?;
                Some(Identity { certificate, key })
            }
            (None, true) => return Err(TargetError::HalfIdentity),
            (None, false) => None,
        };
        let negotiation = options.choice("sslnegotiation", NEGOTIATIONS)?.unwrap_or(Negotiation::Asked);
        if negotiation == Negotiation::Direct && mode < SslMode::Require {
            return Err(TargetError::WeakDirect);
        }
        let tls = Self { mode, roots, identity, negotiation };
        // Files that were not named are read only when they are needed, which may be never.
        if mode >= SslMode::Require || (any_named && mode != SslMode::Disable) {
            tls.settings().client_config()?;
        }
        Ok(tls)
    }

    /// The only code that decides about encryption.
    pub fn encryption(&self, peer: IpAddr) -> Encryption {
        match self.mode {
            SslMode::Disable => Encryption::Never,
            // Plaintext to this machine is acceptable, so no certificate could improve on it.
            SslMode::Allow | SslMode::Prefer if peer.to_canonical().is_loopback() => {
                Encryption::IfOffered(TlsSettings { verify: Verify::Nothing, ..self.settings() })
            }
            _ => Encryption::Required(self.settings()),
        }
    }

    /// For a server that must use TLS.
    fn settings(&self) -> TlsSettings {
        let verify = match (self.mode, &self.roots) {
            (SslMode::VerifyFull, _) => Verify::ChainAndHost,
            // As in libpq: if there is a root certificate, it is used.
            (SslMode::VerifyCa, _) | (_, Some(_)) => Verify::Chain,
            (_, None) => Verify::Nothing,
        };
        let roots = self.roots.clone().unwrap_or(Roots::System);
        TlsSettings { verify, roots, identity: self.identity.clone() }
    }
}

const SSL_MODES: &[(&str, SslMode)] = &[
    ("disable", SslMode::Disable),
    ("allow", SslMode::Allow),
    ("prefer", SslMode::Prefer),
    ("require", SslMode::Require),
    ("verify-ca", SslMode::VerifyCa),
    ("verify-full", SslMode::VerifyFull),
];
const NEGOTIATIONS: &[(&str, Negotiation)] = &[("postgres", Negotiation::Asked), ("direct", Negotiation::Direct)];
const CHANNEL_BINDINGS: &[(&str, ChannelBinding)] =
    &[("disable", ChannelBinding::Disable), ("prefer", ChannelBinding::Prefer), ("require", ChannelBinding::Require)];
const SESSION_ATTRS: &[(&str, SessionAttrs)] = &[
    ("any", SessionAttrs::Any),
    ("read-write", SessionAttrs::ReadWrite),
    ("read-only", SessionAttrs::ReadOnly),
    ("primary", SessionAttrs::Primary),
    ("standby", SessionAttrs::Standby),
    ("prefer-standby", SessionAttrs::PreferStandby),
];

impl fmt::Display for SslMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(SSL_MODES.iter().find(|(_, mode)| mode == self).map_or("", |(name, _)| name))
    }
}

fn malformed(what: impl Into<String>) -> TargetError {
    TargetError::Malformed { what: what.into() }
}

fn servers(options: &mut Options) -> Result<Vec<TargetServer>, TargetError> {
    let mut list = |name| options.value(name).map(|text| text.split(',').map(str::to_owned).collect::<Vec<_>>());
    let (hosts, addresses, ports) = (list("host"), list("hostaddr"), list("port"));
    let count = hosts.as_ref().or(addresses.as_ref()).map_or(1, Vec::len);
    for (what, list) in [("addresses in hostaddr", &addresses), ("ports", &ports)] {
        match list.as_ref().map_or(1, Vec::len) {
            1 if what == "ports" => {}
            n if n == count || list.is_none() => {}
            n => return Err(malformed(format!("{count} hosts, but {n} {what}"))),
        }
    }
    let at =
        |list: &Option<Vec<String>>, i: usize| list.as_ref().and_then(|l| l.get(i)).filter(|t| !t.is_empty()).cloned();
    (0..count)
        .map(|i| {
            let host = host(at(&hosts, i), at(&addresses, i))?;
            let port = match at(&ports, i.min(ports.as_ref().map_or(0, |p| p.len() - 1))) {
                Some(port) => port.parse().map_err(|_| TargetError::Number { option: "port".to_owned() })?,
                None => DEFAULT_PORT,
            };
            Ok(TargetServer { host, port })
        })
        .collect()
}

fn host(name: Option<String>, address: Option<String>) -> Result<Host, TargetError> {
    let address: Option<IpAddr> = match address {
        Some(address) => Some(address.parse().map_err(|_| malformed("an address in hostaddr is no IP address"))?),
        None => None,
    };
    Ok(match (name, address) {
        (Some(name), None) if name.starts_with('/') => Host::Socket(name.into()),
        (Some(name), _) if name.contains(['@', ':', '/']) && name.parse::<IpAddr>().is_err() => {
            // Not quoted: an unescaped @ in a password makes the rest of the password look like a host.
            return Err(malformed("the host contains '@', ':' or '/'"));
        }
        (Some(name), address) => Host::Tcp { name, address },
        (None, Some(address)) => Host::Tcp { name: address.to_string(), address: Some(address) },
        (None, None) if Path::new(DEFAULT_SOCKET).is_dir() => Host::Socket(DEFAULT_SOCKET.into()),
        (None, None) => Host::Tcp { name: "localhost".to_owned(), address: None },
    })
}

fn keepalive(options: &mut Options) -> Result<Option<TcpKeepalive>, TargetError> {
    let on = options.value("keepalives").is_none_or(|value| value != "0");
    let seconds = |number: Option<u32>, default| number.map_or(default, |n| Duration::from_secs(n.into()));
    let keepalive = TcpKeepalive::new()
        .with_time(seconds(options.number("keepalives_idle")?, KEEPALIVE_IDLE))
        .with_interval(seconds(options.number("keepalives_interval")?, KEEPALIVE_INTERVAL))
        .with_retries(options.number("keepalives_count")?.unwrap_or(KEEPALIVE_RETRIES));
    Ok(on.then_some(keepalive))
}

/// The options given, by their name in a connection string. An empty one counts as not given.
struct Options(BTreeMap<String, Given>);

struct Given {
    value: String,
    /// The name under which it was given: `sslmode`, or `PGSSLMODE`.
    said_by: String,
}

impl Options {
    /// If a name occurs twice, the last one wins.
    fn read(text: &str) -> Result<Self, TargetError> {
        let pairs = match text.split_once("://") {
            Some(("postgres" | "postgresql", rest)) => url(rest)?,
            // A quoted password may contain anything.
            Some((scheme, _)) if !scheme.contains('=') => return Err(malformed("not a postgres:// URL")),
            _ => pairs(text)?,
        };
        let given = |(name, value): (String, String)| (name.clone(), Given { value, said_by: name });
        Ok(Self(pairs.into_iter().filter(|(_, value)| !value.is_empty()).map(given).collect()))
    }

    fn fill_in(&mut self, env: &HashMap<String, String>) {
        for &(variable, option) in VARIABLES {
            if let Some(value) = env.get(variable).filter(|value| !value.is_empty()) {
                let given = || Given { value: value.clone(), said_by: variable.to_owned() };
                self.0.entry(option.to_owned()).or_insert_with(given);
            }
        }
    }

    fn refuse(&mut self) -> Result<(), TargetError> {
        for name in IGNORED {
            self.0.remove(*name);
        }
        for name in UNSUPPORTED {
            let Some(given) = self.0.remove(*name) else { continue };
            let harmless = HARMLESS.iter().find(|(option, _)| option == name).map_or(&[][..], |(_, values)| values);
            if !harmless.contains(&given.value.as_str()) {
                return Err(TargetError::Unsupported { option: given.said_by });
            }
        }
        Ok(())
    }

    fn value(&mut self, name: &str) -> Option<String> {
        self.0.remove(name).map(|given| given.value)
    }

    /// Returns `None` for 0 and less as well, which stand for the default.
    fn number(&mut self, name: &str) -> Result<Option<u32>, TargetError> {
        let Some(Given { value, said_by }) = self.0.remove(name) else { return Ok(None) };
        let number: i64 = value.trim().parse().map_err(|_| TargetError::Number { option: said_by })?;
        Ok(u32::try_from(number.min(u32::MAX.into())).ok().filter(|n| *n > 0))
    }

    fn choice<T: Copy>(&mut self, name: &str, choices: &[(&str, T)]) -> Result<Option<T>, TargetError> {
        let Some(Given { value, said_by: option }) = self.0.remove(name) else { return Ok(None) };
        match choices.iter().find(|(name, _)| *name == value) {
            Some((_, choice)) => Ok(Some(*choice)),
            None => {
                let choices = choices.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ");
                Err(TargetError::Choice { option, value, choices })
            }
        }
    }
}

/// Parses what follows `postgres://`.
fn url(rest: &str) -> Result<Vec<(String, String)>, TargetError> {
    let decode = |text: &str| match percent_encoding::percent_decode_str(text).decode_utf8() {
        Ok(text) if text.contains('\0') => Err(malformed("a NUL byte")),
        Ok(text) => Ok(text.into_owned()),
        Err(_) => Err(malformed("bytes that are not UTF-8")),
    };
    // A password may contain a slash or a question mark; credentials end at the first @.
    let (credentials, rest) = rest.split_once('@').unwrap_or(("", rest));
    let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (authority, database) = rest.split_once('/').unwrap_or((rest, ""));
    let (user, password) = credentials.split_once(':').unwrap_or((credentials, ""));
    let (mut hosts, mut ports) = (Vec::new(), Vec::new());
    for server in authority.split(',') {
        let (host, port) = match server.strip_prefix('[') {
            None => server.split_once(':').unwrap_or((server, "")),
            Some(rest) => match rest.split_once(']') {
                Some((host, "")) => (host, ""),
                Some((host, port)) if port.starts_with(':') => (host, &port[1..]),
                _ => return Err(malformed("a '[' without its ']'")),
            },
        };
        hosts.push(decode(host)?);
        ports.push(decode(port)?);
    }
    // In a URL with several hosts and no port, all of them have the default port, as in libpq.
    let mut given = vec![
        ("user".to_owned(), decode(user)?),
        ("password".to_owned(), decode(password)?),
        ("host".to_owned(), hosts.join(",")),
        ("port".to_owned(), ports.join(",")),
        ("dbname".to_owned(), decode(database)?),
    ];
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (name, value) = pair.split_once('=').ok_or_else(|| malformed("an option without '='"))?;
        let (name, value) = (decode(name)?, decode(value)?);
        given.push(match (name.as_str(), value.as_str()) {
            // JDBC's spelling.
            ("ssl", "true") => ("sslmode".to_owned(), "require".to_owned()),
            _ => (name, value),
        });
    }
    Ok(given)
}

/// Parses `name = value` or `name = 'va\'lue'`, separated by blanks.
/// <https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-CONNSTRING-KEYWORD-VALUE>
fn pairs(text: &str) -> Result<Vec<(String, String)>, TargetError> {
    if text.contains('\0') {
        return Err(malformed("a NUL byte"));
    }
    let mut given = Vec::new();
    let mut rest = text.trim_start();
    while !rest.is_empty() {
        let (name, value) = rest.split_once('=').ok_or_else(|| malformed("a word without '='"))?;
        let name = name.trim_end();
        if name.is_empty() || !name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_') {
            // Not quoted: it may be the second word of a password.
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
        given.push((name.to_owned(), decoded));
        rest = value[end..].trim_start();
    }
    Ok(given)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    const NOWHERE: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));

    fn env(variables: &[(&str, &str)]) -> HashMap<String, String> {
        variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    fn target(text: &str) -> PostgresTarget {
        PostgresTarget::parse(text, &HashMap::new()).unwrap_or_else(|e| panic!("{text}: {e}"))
    }

    fn refused(text: &str) -> String {
        PostgresTarget::parse(text, &HashMap::new()).expect_err(text).to_string()
    }

    fn literal(target: &PostgresTarget) -> Option<&str> {
        match &target.password {
            Password::Literal(password) => Some(password),
            Password::None | Password::File(_) | Password::PgPass(_) | Password::Command(_) => None,
        }
    }

    #[test]
    fn both_forms_name_the_same_server() {
        let url = target("postgres://me:pw%40x@db.example:6000/shop?application_name=a%20b&sslmode=disable");
        let pairs = target(r"host = db.example port=6000 user=me password='pw@x' dbname=shop sslmode = 'disable'");
        for t in [&url, &pairs] {
            assert_eq!(t.describe(), "db.example:6000/shop");
            assert_eq!((t.user.as_str(), literal(t)), ("me", Some("pw@x")));
        }
        for (text, shown) in [
            ("postgres://a@h1,h2:7/x", "h1:5432,h2:7/x"),
            ("postgres://a@h1,h2/x?port=7", "h1:7,h2:7/x"),
            ("postgres://a@h/x?port=7", "h:7/x"),
            ("host=h1,h2 port=,7 user=a", "h1:5432,h2:7/a"),
            ("host=/run/pg user=a dbname='a b'", "/run/pg:5432/a b"),
            ("postgres://a@%2Frun%2Fpg:7/x", "/run/pg:7/x"),
            ("postgres:///x?host=/run/pg&user=a", "/run/pg:5432/x"),
            ("postgres://a@h/", "h:5432/a"),
            ("postgres://a@[::1]:7/x", "[::1]:7/x"),
            ("hostaddr=::1 user=a", "[::1]:5432/a"),
            ("host=db.example hostaddr=127.0.0.1 user=a", "db.example:5432/a"),
        ] {
            assert_eq!(target(text).describe(), shown, "{text}");
        }
        assert_eq!(literal(&target("postgres://a:b?sslmode=x/y@h/x")), Some("b?sslmode=x/y"));
        assert_eq!(literal(&target(r"host=h user=a password='a\'b\\c'")), Some(r"a'b\c"));
        assert_eq!(literal(&target("host=h user=a password='postgres://'")), Some("postgres://"));
        assert_eq!(target("postgres://a@h/x?tcp_user_timeout=1500").tcp_user_timeout, Duration::from_millis(1500));
        assert_eq!(target("postgres://a@h/x?connect_timeout=0").connect_timeout, CONNECT_TIMEOUT);
        assert!(target("postgres://a@h/x?keepalives=0").keepalive.is_none());
    }

    #[test]
    fn no_form_of_it_shows_a_password() {
        let t = target("postgres://me:hunter2@h/shop");
        for shown in [t.describe(), format!("{t:?}")] {
            assert!(!shown.contains("hunter2"), "{shown}");
        }
        for text in [
            "postgres://me:hun@hunter2@h/shop",
            "host=h user=me password=x hunter2",
            "host=h password=x hunter2 user=me",
            "host=h password='hunter2",
            "mysql://me:hunter2@h/x",
            "postgres://me:hunter2@h:port/x",
            "postgres://me@h:hunter2",
            "postgres://me:hunter2@h/x?hunter2",
            "postgres://me:hunter2%ff@h/x",
            "postgres://h/x?user=me&password=hunter2&port=hunter2",
            "host=me:hunter2@h",
            "hostaddr=hunter2",
        ] {
            assert!(!refused(text).contains("hunter2"), "{}", refused(text));
        }
    }

    #[test]
    fn variables_stand_in_for_what_is_left_out() {
        let all = env(&[
            ("PGHOST", "env.example"),
            ("PGPORT", "7"),
            ("PGUSER", "env"),
            ("PGDATABASE", "envdb"),
            ("PGPASSWORD", "looked up elsewhere"),
            ("PGAPPNAME", "ignored"),
            ("PGOPTIONS", "-c work_mem=1MB"),
            ("PGCONNECT_TIMEOUT", "3"),
            ("PGTARGETSESSIONATTRS", "primary"),
            ("PGCHANNELBINDING", "require"),
            ("PGSSLMODE", "require"),
        ]);
        let parse = |text| PostgresTarget::parse(text, &all).unwrap();
        for text in ["postgres://", ""] {
            let t = parse(text);
            assert_eq!((t.describe().as_str(), t.user.as_str()), ("env.example:7/envdb", "env"));
            assert_eq!((literal(&t), t.options.as_deref()), (None, Some("-c work_mem=1MB")));
            assert_eq!((t.connect_timeout, t.wanted), (Duration::from_secs(3), SessionAttrs::Primary));
            assert_eq!((t.channel_binding, t.tls.mode), (ChannelBinding::Require, SslMode::Require));
        }
        let t = parse("postgres://me@h:8/db?connect_timeout=4&sslmode=disable&channel_binding=disable");
        assert_eq!((t.describe().as_str(), t.user.as_str()), ("h:8/db", "me"));
        assert_eq!((t.channel_binding, t.tls.mode), (ChannelBinding::Disable, SslMode::Disable));
        assert_eq!(parse("postgres://me@h/db").describe(), "h:7/db", "each by itself");
        assert_eq!(parse("postgres://me@h,g/db").describe(), "h:5432,g:5432/db", "a list is a list");
        let addresses = env(&[("PGHOSTADDR", "192.0.2.1"), ("PGUSER", "")]);
        let t = PostgresTarget::parse("postgres://me@h/db", &addresses).unwrap();
        assert_eq!(t.servers[0].host, Host::Tcp { name: "h".to_owned(), address: Some(NOWHERE) });
        for (variable, value) in [("PGSSLMODE", "on"), ("PGSSLCRL", "/crl.pem"), ("PGREQUIREAUTH", "scram-sha-256")] {
            let error = PostgresTarget::parse("postgres://me@h/db", &env(&[(variable, value)])).unwrap_err();
            assert!(error.to_string().starts_with(variable), "{error}");
        }
        let harmless = env(&[("PGGSSENCMODE", "prefer"), ("PGSSLMINPROTOCOLVERSION", "TLSv1.2")]);
        PostgresTarget::parse("postgres://me@h/db", &harmless).unwrap();
    }

    #[test]
    fn plaintext_leaves_this_machine_only_where_it_is_told_to() {
        for (mode, here, elsewhere) in [
            ("", "if offered, Nothing", "required, Nothing"),
            ("allow", "if offered, Nothing", "required, Nothing"),
            ("prefer", "if offered, Nothing", "required, Nothing"),
            ("require", "required, Nothing", "required, Nothing"),
            ("verify-full", "required, ChainAndHost", "required, ChainAndHost"),
            ("disable", "never", "never"),
        ] {
            let tls = target(&format!(
                "postgres://a@h/x?{}",
                if mode.is_empty() { "".to_owned() } else { format!("sslmode={mode}") }
            ))
            .tls;
            let shown = |ip: &str| match tls.encryption(ip.parse().unwrap()) {
                Encryption::Never => "never".to_owned(),
                Encryption::IfOffered(settings) => format!("if offered, {:?}", settings.verify),
                Encryption::Required(settings) => format!("required, {:?}", settings.verify),
            };
            for ip in ["127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1"] {
                assert_eq!(shown(ip), here, "{mode} {ip}");
            }
            for ip in ["192.0.2.1", "10.0.0.1", "::ffff:10.0.0.1", "fe80::1", "0.0.0.0"] {
                assert_eq!(shown(ip), elsewhere, "{mode} {ip}");
            }
        }
    }

    #[test]
    fn only_another_machine_must_be_verified() {
        for (url, unverified) in [
            ("postgres://me@db.example/x", true),
            ("postgres://me@db.example/x?sslmode=prefer", true),
            ("postgres://me@db.example/x?sslmode=require", true),
            ("postgres://me@db.example/x?sslmode=disable", true),
            ("postgres://me@db.example/x?sslmode=verify-full", false),
            ("postgres://me@127.0.0.1,db.example/x", true),
            ("postgres://me@db.example/x?hostaddr=127.0.0.1", false),
            ("postgres://me@localhost/x", false),
            ("postgres://me@[::1]/x", false),
            ("host=/run user=me", false),
        ] {
            assert_eq!(target(url).is_unverified(), unverified, "{url}");
        }
    }

    fn home(files: &[&str]) -> tempfile::TempDir {
        let home = tempfile::tempdir().unwrap();
        std::fs::create_dir(home.path().join(".postgresql")).unwrap();
        for file in files {
            // Not read until it is needed.
            std::fs::write(home.path().join(".postgresql").join(file), "").unwrap();
        }
        home
    }

    #[test]
    fn certificates_are_looked_for_where_libpq_does() {
        let at = |home: &tempfile::TempDir, text: &str| {
            let env = env(&[("HOME", home.path().to_str().unwrap())]);
            PostgresTarget::parse(text, &env).map(|t| t.tls).map_err(|error| error.to_string())
        };
        let (none, all) = (home(&[]), home(&["root.crt", "postgresql.crt", "postgresql.key"]));
        let file = |name: &str| all.path().join(".postgresql").join(name);
        let tls = at(&none, "postgres://a@h/x").unwrap();
        assert_eq!((&tls.roots, &tls.identity), (&None, &None));
        let tls = at(&all, "postgres://a@h/x").unwrap();
        assert_eq!(tls.roots, Some(Roots::File(file("root.crt"))));
        let ours = Identity { certificate: file("postgresql.crt"), key: file("postgresql.key") };
        assert_eq!(tls.identity, Some(ours));
        let Encryption::Required(settings) = tls.encryption(NOWHERE) else { panic!("{tls:?}") };
        assert_eq!(settings.verify, Verify::Chain, "who keeps a root certificate wants it used");
        for mode in ["require", "verify-ca", "verify-full"] {
            let error = at(&all, &format!("postgres://a@h/x?sslmode={mode}")).unwrap_err();
            assert!(error.contains("root.crt") && error.contains("no certificate"), "{error}");
        }
        assert!(at(&none, "postgres://a@h/x?sslmode=verify-ca").unwrap_err().contains("sslrootcert"));
        assert_eq!(at(&none, "postgres://a@h/x?sslmode=verify-full").unwrap().roots, Some(Roots::System));
    }

    #[test]
    fn options_that_contradict_each_other_are_refused() {
        assert_eq!(target("postgres://a@h/x?sslrootcert=system").tls.mode, SslMode::VerifyFull);
        for (text, part) in [
            ("postgres://a@h/x?sslrootcert=system&sslmode=require", "verify-full"),
            ("postgres://a@h/x?sslmode=on", "sslmode=on does not exist: use disable, "),
            ("postgres://a@h/x?sslmode=require&sslrootcert=/nonexistent/ca.pem", "/nonexistent/ca.pem"),
            ("postgres://a@h/x?sslrootcert=/nonexistent/ca.pem", "/nonexistent/ca.pem"),
            ("postgres://a@h/x?sslcert=/c.pem", "sslcert and sslkey"),
            ("postgres://a@h/x?sslkey=/c.pem", "sslcert and sslkey"),
            ("postgres://a@h/x?sslnegotiation=direct", "sslmode=require"),
            ("postgres://a@h/x?channel_binding=yes", "prefer"),
            ("postgres://a@h/x?target_session_attrs=master", "primary"),
            ("postgres://a@h/x?gssencmode=require", "gssencmode is not supported"),
            ("postgres://a@h/x?sslcrl=/crl.pem", "sslcrl is not supported"),
            ("postgres://a@h/x?service=s", "service is not supported"),
            ("postgres://a@h/x?hots=1", "hots"),
            ("host=h user=a prot=1", "prot"),
            ("postgres://a@h1,h2/x?port=1,2,3", "2 hosts, but 3 ports"),
            ("host=h1,h2 hostaddr=127.0.0.1 user=a", "addresses"),
            ("host=h port=x", "port is no number"),
            ("host=h connect_timeout=1s", "connect_timeout is no number"),
            ("host=a/b user=a", "the host contains"),
        ] {
            assert!(refused(text).contains(part), "{text}: {}", refused(text));
        }
        assert_eq!(target("postgres://a@h/x?sslrootcert=/ca.pem&sslmode=disable").describe(), "h:5432/x");
        assert_eq!(target("postgres://a@h/x?ssl=true&gssencmode=disable").tls.mode, SslMode::Require);
        assert_eq!(
            target("postgres://a@h/x?sslmode=require&sslnegotiation=direct").tls.negotiation,
            Negotiation::Direct
        );
    }

    #[test]
    fn the_users_options_come_first_and_ours_hold() {
        let t = target("postgres://a@h/x?options=-c%20TimeZone%3DEurope/Berlin%20-c%20work_mem%3D1MB");
        let options = t.options();
        assert!(options.starts_with("-c TimeZone=Europe/Berlin -c work_mem=1MB -c DateStyle=ISO "), "{options}");
        assert!(options.contains("-c TimeZone=UTC"));
    }

    #[test]
    fn a_server_is_what_was_asked_for_or_says_what_it_is() {
        let (standby, primary, frozen) = ((Some("t"), Some("on")), (Some("f"), Some("off")), (Some("f"), Some("on")));
        for (attrs, suited) in [
            (SessionAttrs::Any, [true, true, true]),
            (SessionAttrs::ReadWrite, [false, true, false]),
            (SessionAttrs::ReadOnly, [true, false, true]),
            (SessionAttrs::Primary, [false, true, true]),
            (SessionAttrs::Standby, [true, false, false]),
        ] {
            let suits =
                [standby, primary, frozen].map(|(recovery, read_only)| attrs.suits(recovery, read_only).is_ok());
            assert_eq!(suits, suited, "{attrs:?}");
        }
    }
}
