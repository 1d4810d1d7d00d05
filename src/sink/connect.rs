//! Parses a Redis URL and opens a socket to the server: over TCP, TLS or a Unix socket, directly or by asking Sentinels
//! or the nodes of a cluster for the master.
//!
//! Knows no commands except those of the login, and SENTINEL. The password appears in no Debug or Display output and in
//! no error; a URL that cannot be parsed is never quoted.

use super::bounds::{Allowance, REPLY_BYTES, ReplyBounds};
use super::missing_rights::Missing;
use super::shards::Shards;
use super::topology::{Node, Topology};
use super::{Class, ErrorReply, Request, SinkError, failed};
use crate::bounded::Bounded;
use crate::code::Code;
use crate::lanes::Lane;
use crate::lanes::reading::Seen;
use crate::nodes::{Nodes, Usage};
use crate::password::Password;
use crate::tls::{Identity, Roots, TlsError, TlsSettings, Verify};
use percent_encoding::percent_decode_str;
use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Cmd, Pipeline, ProtocolVersion, RedisConnectionInfo, RedisError, Value};
#[cfg(target_os = "linux")]
use socket2::SockRef;
use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::net::IpAddr;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::pki_types::ServerName;

pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// A Sentinel that does not answer must not prevent the others from being asked.
const SENTINEL_TIMEOUT: Duration = Duration::from_secs(1);

/// Enough to keep a fast link busy, and small enough to drain within seconds on a slow one.
#[cfg(target_os = "linux")]
const NOT_SENT_BYTES: u32 = 256 << 10;

const DEFAULT_PORT: u16 = 6379;
const DEFAULT_SENTINEL_PORT: u16 = 26379;

/// A Redis server, a database on it, and the credentials.
#[derive(Clone, PartialEq, Eq)]
pub struct RedisTarget {
    pub address: Address,
    /// Applies to Redis and to its Sentinels, if there are any.
    pub tls: Option<TlsSettings>,
    pub db: u32,
    pub user: Option<String>,
    pub password: Password,
    /// Whether small rows may be written as RESTORE: see [`crate::resp::packed`].
    pub packs: bool,
}

#[derive(Clone, PartialEq, Eq)]
pub enum Address {
    Tcp(HostPort),
    Unix(PathBuf),
    /// The server that the Sentinels currently report as the master.
    Sentinel(Sentinels),
    /// The node that is currently the master of prefetchd's own hash slot.
    Cluster(Cluster),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostPort {
    pub host: String,
    pub port: u16,
}

#[derive(Clone, PartialEq, Eq)]
pub struct Sentinels {
    pub at: Vec<HostPort>,
    pub master: String,
    pub user: Option<String>,
    pub password: Password,
}

#[derive(Clone, PartialEq, Eq)]
pub struct Cluster {
    /// Some of its nodes. At least one.
    pub at: Vec<HostPort>,
    /// Where to reach nodes whose announced address is not reachable from here: announced and reachable address.
    pub map: Vec<(HostPort, HostPort)>,
    /// The hash slot of prefetchd's own keys. A URL does not tell it: see [`RedisTarget::at_home`].
    pub home: Lane,
    pub(super) known: KnownNodes,
}

/// Masters that the cluster has named, shared by all clones of a target. The nodes of the URL may all be gone one day.
/// They are no part of what a target is.
#[derive(Clone, Default)]
pub(super) struct KnownNodes {
    at: Arc<Mutex<Vec<HostPort>>>,
    seen: Nodes,
    pub shards: Shards,
    /// What has been written to lanes, or shown of them.
    lanes: Arc<Mutex<Seen>>,
}

/// More than enough to find one that is up; all of them are asked at once.
const KNOWN_NODES: usize = 8;

impl KnownNodes {
    /// `replicas`: which master each of them follows, by id.
    pub fn learn(&self, nodes: &[Node], replicas: &BTreeMap<String, String>) {
        self.shards.learn(nodes.iter().map(|node| node.id.as_str()), replicas);
        let at = nodes.iter().map(|node| node.at.clone()).take(KNOWN_NODES).collect();
        *self.at.lock().unwrap_or_else(PoisonError::into_inner) = at;
        self.seen.discovered(nodes.iter().map(|node| (node.at.to_string(), node.slots.clone())));
    }
}

impl PartialEq for KnownNodes {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for KnownNodes {}

impl Cluster {
    /// Returns the nodes to ask: those of the URL, and some that it has named since.
    pub(super) fn to_ask(&self) -> Vec<HostPort> {
        let known = self.known.at.lock().unwrap_or_else(PoisonError::into_inner);
        let further = known.iter().filter(|node| !self.at.contains(node));
        self.at.iter().chain(further).cloned().collect()
    }

    /// Where to reach the node that the cluster announces at this address.
    pub(super) fn reachable(&self, announced: &HostPort) -> HostPort {
        let mapped = self.map.iter().find(|(from, _)| from == announced);
        mapped.map_or(announced, |(_, to)| to).clone()
    }
}

/// Why a URL cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TargetError {
    #[error(
        "redis.url must begin with redis://, redis+sentinel:// or redis+cluster://, or with rediss in place of redis \
         (TLS), or with unix://"
    )]
    Scheme,
    #[error(
        "redis.url is not a URL like redis://user:password@host:6379/0, unix:///path/to/socket?db=0, \
         redis+sentinel://host:26379,other:26379/mymaster/0 or redis+cluster://host:6379,other:6379"
    )]
    Malformed,
    #[error("redis.url: the database {0:?} is not a number")]
    Database(String),
    #[error("redis.url: a cluster has only database 0, not {0:?}: leave the database out")]
    ClusterDatabase(String),
    #[error("redis.url: map {0:?} is not two addresses: write map=announced:port=reachable:port")]
    Map(String),
    #[error("redis.url: unknown parameter {0:?}")]
    Parameter(String),
    #[error("redis.url: {0:?} applies to TLS only: begin the URL with rediss instead of redis, or remove it")]
    NotEncrypted(String),
    #[error("redis.url: set both cert and key, or neither")]
    HalfIdentity,
    #[error("redis.url: user and password must be UTF-8")]
    Encoding,
    #[error("redis.url: {0}")]
    Tls(#[from] TlsError),
}

impl TargetError {
    pub fn code(&self) -> Code {
        match self {
            TargetError::Tls(_) => Code::TlsFiles,
            TargetError::Scheme
            | TargetError::Malformed
            | TargetError::Database(_)
            | TargetError::ClusterDatabase(_)
            | TargetError::Map(_)
            | TargetError::Parameter(_)
            | TargetError::NotEncrypted(_)
            | TargetError::HalfIdentity
            | TargetError::Encoding => Code::ConnectionUrl,
        }
    }
}

impl RedisTarget {
    /// Whether TLS is used to another machine without verifying its certificate.
    pub fn is_unverified(&self) -> bool {
        self.is_elsewhere() && self.tls.as_ref().is_some_and(|tls| tls.verify == Verify::Nothing)
    }

    pub fn sends_password_in_clear(&self) -> bool {
        let sentinel = matches!(&self.address, Address::Sentinel(at) if at.password != Password::None);
        self.tls.is_none() && self.is_elsewhere() && (sentinel || self.password != Password::None)
    }

    fn is_elsewhere(&self) -> bool {
        let elsewhere = |at: &HostPort| {
            let address = at.host.trim_matches(['[', ']']).parse::<IpAddr>();
            !address.map_or(at.host == "localhost", |address| address.is_loopback())
        };
        match &self.address {
            Address::Unix(_) => false,
            Address::Tcp(at) => elsewhere(at),
            Address::Sentinel(Sentinels { at, .. }) | Address::Cluster(Cluster { at, .. }) => at.iter().any(elsewhere),
        }
    }

    /// Parses a URL, and reads the certificates that it names.
    pub fn parse(url: &str) -> Result<Self, TargetError> {
        let (scheme, _) = url.split_once("://").ok_or(TargetError::Scheme)?;
        let target = match scheme {
            "redis" | "valkey" | "rediss" | "valkeys" => Self::parse_tcp(url),
            "redis+sentinel" | "valkey+sentinel" | "rediss+sentinel" | "valkeys+sentinel" => Self::parse_sentinel(url),
            "redis+cluster" | "valkey+cluster" | "rediss+cluster" | "valkeys+cluster" => Self::parse_cluster(url),
            "unix" | "redis+unix" | "valkey+unix" => Self::parse_unix(url),
            _ => Err(TargetError::Scheme),
        }?;
        if let Some(tls) = &target.tls {
            tls.client_config()?;
        }
        Ok(target)
    }

    fn parse_tcp(url: &str) -> Result<Self, TargetError> {
        let encrypted = is_encrypted(url);
        let url = redis::parse_redis_url(url).ok_or(TargetError::Malformed)?;
        // A URL has brackets around an IPv6 address; the resolver expects none.
        let host = url.host_str().map(|h| h.trim_start_matches('[').trim_end_matches(']')).unwrap_or_default();
        if host.is_empty() {
            return Err(TargetError::Malformed);
        }
        let mut query = Query::default();
        for (name, value) in url.query_pairs() {
            query.take(&name, &value)?;
        }
        let user = decoded(url.username())?;
        query.maps_nothing()?;
        Ok(RedisTarget {
            address: Address::Tcp(HostPort { host: decoded(host)?, port: url.port().unwrap_or(DEFAULT_PORT) }),
            tls: query.tls(encrypted)?,
            db: database(url.path().trim_matches('/'))?,
            user: (!user.is_empty()).then_some(user),
            password: url.password().map(decoded).transpose()?.map_or(Password::None, Password::Literal),
            packs: true,
        })
    }

    /// Parses `redis+sentinel://[user:password@]host[:port][,host[:port]...]/master[/db]`.
    fn parse_sentinel(url: &str) -> Result<Self, TargetError> {
        let Several { encrypted, user, password, at, path, mut query } = Several::parse(url, DEFAULT_SENTINEL_PORT)?;
        let (master, db) = path.split_once('/').unwrap_or((path, ""));
        if master.is_empty() {
            return Err(TargetError::Malformed);
        }
        query.maps_nothing()?;
        let sentinels = Sentinels {
            at,
            master: decoded(master)?,
            user: query.sentinel_user.take(),
            password: query.sentinel_password.take().into(),
        };
        Ok(RedisTarget {
            address: Address::Sentinel(sentinels),
            tls: query.tls(encrypted)?,
            db: database(db)?,
            user,
            password,
            packs: true,
        })
    }

    /// Parses `redis+cluster://[user:password@]host[:port][,host[:port]...]`.
    fn parse_cluster(url: &str) -> Result<Self, TargetError> {
        let Several { encrypted, user, password, at, path, mut query } = Several::parse(url, DEFAULT_PORT)?;
        if !matches!(path, "" | "0") {
            return Err(TargetError::ClusterDatabase(path.to_owned()));
        }
        let map = std::mem::take(&mut query.map).iter().map(|pair| mapped(pair)).collect::<Result<_, _>>()?;
        let address = Address::Cluster(Cluster { at, map, home: Lane::of(b""), known: KnownNodes::default() });
        Ok(RedisTarget { address, tls: query.tls(encrypted)?, db: 0, user, password, packs: true })
    }

    fn parse_unix(url: &str) -> Result<Self, TargetError> {
        let url = redis::parse_redis_url(url).ok_or(TargetError::Malformed)?;
        let path = decoded(url.path())?;
        if url.host_str().is_some_and(|h| !h.is_empty()) || !path.starts_with('/') || path.ends_with('/') {
            return Err(TargetError::Malformed);
        }
        let mut target = RedisTarget {
            address: Address::Unix(path.into()),
            tls: None,
            db: 0,
            user: None,
            password: Password::None,
            packs: true,
        };
        for (name, value) in url.query_pairs() {
            match &*name {
                "db" => target.db = database(&value)?,
                "user" => target.user = Some(value.into_owned()),
                "pass" | "password" => target.password = Password::Literal(value.into_owned()),
                _ => return Err(TargetError::Parameter(name.into_owned())),
            }
        }
        Ok(target)
    }

    /// If this is a cluster: connections lead to the master of this hash slot.
    #[must_use]
    pub fn at_home(mut self, home: Lane) -> Self {
        if let Address::Cluster(cluster) = &mut self.address {
            cluster.home = home;
        }
        self
    }

    /// What is known of the masters, if this is a cluster.
    pub fn nodes(&self) -> Option<&Nodes> {
        match &self.address {
            Address::Cluster(cluster) => Some(&cluster.known.seen),
            Address::Tcp(_) | Address::Unix(_) | Address::Sentinel(_) => None,
        }
    }

    /// What readers of this process may rely on, if this is a cluster.
    pub(super) fn lanes_seen(&self) -> Arc<Mutex<Seen>> {
        match &self.address {
            Address::Cluster(cluster) => Arc::clone(&cluster.known.lanes),
            Address::Tcp(_) | Address::Unix(_) | Address::Sentinel(_) => Arc::default(),
        }
    }

    /// If this is a cluster: the hash slot of prefetchd's own keys.
    pub fn home(&self) -> Option<Lane> {
        match &self.address {
            Address::Cluster(cluster) => Some(cluster.home),
            Address::Tcp(_) | Address::Unix(_) | Address::Sentinel(_) => None,
        }
    }

    /// If this is a cluster: shows what the master of this hash slot has answered to INFO.
    pub(super) fn reports(&self, lane: Lane, usage: &Result<Usage, SinkError>) {
        let usage = match usage {
            Ok(usage) => Ok(*usage),
            // It answers, and keeps that to itself.
            Err(SinkError::Refused { reply, .. }) if reply.class() == Class::Denied => Ok(Usage::default()),
            // Another node has the hash slot.
            Err(SinkError::Refused { .. }) => return,
            Err(error) => Err(error.to_string()),
        };
        let Some(nodes) = self.nodes() else { return };
        if let Some(node) = nodes.seen().iter().find(|node| node.serves(lane)) {
            nodes.reports(&node.at, usage);
        }
    }

    /// One node of a cluster, with the same login.
    pub(super) fn at(&self, node: &HostPort) -> Self {
        RedisTarget { address: Address::Tcp(node.clone()), ..self.clone() }
    }

    /// The same with the passwords read, for the connections of one moment, whose time limits do not cover a command that
    /// prints a password.
    pub(super) async fn with_password(&self) -> Result<Self, SinkError> {
        let mut target = self.clone();
        target.password = self.password.read_for_login().await?.into();
        if let Address::Sentinel(sentinels) = &mut target.address {
            sentinels.password = sentinels.password.read_for_login().await?.into();
        }
        Ok(target)
    }

    /// As [`Self::with_password`], but one that a command has printed within `age` will do.
    pub(super) async fn with_password_of(&self, age: Duration) -> Result<Self, SinkError> {
        Ok(RedisTarget { password: self.password.read_again_after(age).await?.into(), ..self.clone() })
    }

    /// Returns the arguments of AUTH, with the password read again. A user without a password is one that the server
    /// accepts with any.
    pub(super) async fn credentials(&self) -> Result<Option<(Option<&str>, String)>, SinkError> {
        let password = self.password.read_for_login().await?;
        match (&self.user, password) {
            (None, None) => Ok(None),
            (user, password) => Ok(Some((user.as_deref(), password.unwrap_or_default()))),
        }
    }

    /// Returns the login, with the password read again.
    pub(super) async fn login(&self) -> Result<Login<'_>, SinkError> {
        Ok(Login { credentials: self.credentials().await?, db: self.db })
    }

    /// The user's name for ACL SETUSER.
    pub(super) fn acl_user(&self) -> &str {
        self.user.as_deref().unwrap_or("default")
    }
}

/// The credentials, and the database to select.
pub(super) struct Login<'a> {
    credentials: Option<(Option<&'a str>, String)>,
    db: u32,
}

impl Login<'_> {
    /// Returns the commands, each with its name in errors. Every server that keeps the connection open answers the last
    /// one, so an error before that is about a command, not about the connection.
    fn commands(&self) -> Vec<(&'static str, Cmd)> {
        let mut commands = Vec::new();
        let cmd = |words: &[&str]| redis::cmd(words[0]).arg(&words[1..]).to_owned();
        match &self.credentials {
            None => {}
            Some((None, password)) => commands.push(("AUTH", cmd(&["AUTH", password]))),
            Some((Some(user), password)) => commands.push(("AUTH", cmd(&["AUTH", user, password]))),
        }
        if self.db != 0 {
            commands.push(("SELECT", cmd(&["SELECT", &self.db.to_string()])));
        }
        for (name, value) in [("LIB-NAME", "prefetchd"), ("LIB-VER", env!("CARGO_PKG_VERSION"))] {
            commands.push((OPTIONAL, cmd(&["CLIENT", "SETINFO", name, value])));
        }
        commands.push((OPTIONAL, cmd(&["TIME"])));
        commands
    }
}

/// A command whose refusal is ignored.
const OPTIONAL: &str = "";

/// Why the login failed.
pub(super) enum NotLoggedIn {
    Link(RedisError),
    Refused { command: &'static str, reply: ErrorReply },
}

impl NotLoggedIn {
    pub fn at(self, target: &RedisTarget) -> SinkError {
        match self {
            NotLoggedIn::Link(error) => failed(target, "AUTH", &[], &error),
            NotLoggedIn::Refused { command, reply } => refused_login(target, command, reply),
        }
    }
}

impl fmt::Display for NotLoggedIn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NotLoggedIn::Link(error) => f.write_str(error.category()),
            NotLoggedIn::Refused { command, reply } => write!(f, "{command}: {reply}"),
        }
    }
}

pub(super) fn refused_login(target: &RedisTarget, command: &'static str, reply: ErrorReply) -> SinkError {
    match (command, reply.class()) {
        ("SELECT", Class::Denied) => {
            SinkError::Forbidden { user: target.acl_user().to_owned(), missing: Missing::of_command("select") }
        }
        _ => SinkError::Refused { request: Request::new(command), reply },
    }
}

/// The parameters of a URL. They have the names of redis-cli's options.
#[derive(Default)]
struct Query {
    cacert: Option<PathBuf>,
    cert: Option<PathBuf>,
    key: Option<PathBuf>,
    insecure: bool,
    sentinel_user: Option<String>,
    sentinel_password: Option<String>,
    /// For a cluster only.
    map: Vec<String>,
    /// The last parameter that applies to TLS only.
    about_tls: Option<String>,
}

impl Query {
    fn take(&mut self, name: &str, value: &str) -> Result<(), TargetError> {
        match name {
            "cacert" => self.cacert = Some(value.into()),
            "cert" => self.cert = Some(value.into()),
            "key" => self.key = Some(value.into()),
            "insecure" => self.insecure = !matches!(value, "false" | "0"),
            "sentinel_user" => self.sentinel_user = Some(value.to_owned()),
            "sentinel_password" => self.sentinel_password = Some(value.to_owned()),
            "map" => self.map.push(value.to_owned()),
            _ => return Err(TargetError::Parameter(name.to_owned())),
        }
        if !name.starts_with("sentinel") && name != "map" {
            self.about_tls = Some(name.to_owned());
        }
        Ok(())
    }

    fn maps_nothing(&self) -> Result<(), TargetError> {
        if self.map.is_empty() { Ok(()) } else { Err(TargetError::Parameter("map".to_owned())) }
    }

    fn tls(self, encrypted: bool) -> Result<Option<TlsSettings>, TargetError> {
        if !encrypted {
            return self.about_tls.map_or(Ok(None), |name| Err(TargetError::NotEncrypted(name)));
        }
        let identity = match (self.cert, self.key) {
            (Some(certificate), Some(key)) => Some(Identity { certificate, key }),
            (None, None) => None,
            (Some(_), None) | (None, Some(_)) => return Err(TargetError::HalfIdentity),
        };
        let verify = if self.insecure { Verify::Nothing } else { Verify::ChainAndHost };
        Ok(Some(TlsSettings { verify, roots: self.cacert.map_or(Roots::System, Roots::File), identity }))
    }
}

/// A URL that is not a valid one because it may have several hosts.
struct Several<'a> {
    encrypted: bool,
    user: Option<String>,
    password: Password,
    at: Vec<HostPort>,
    /// Without its outer slashes.
    path: &'a str,
    query: Query,
}

impl<'a> Several<'a> {
    fn parse(url: &'a str, default_port: u16) -> Result<Self, TargetError> {
        let (scheme, rest) = url.split_once("://").ok_or(TargetError::Malformed)?;
        let (rest, parameters) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        let (credentials, hosts) = authority.rsplit_once('@').unwrap_or(("", authority));
        let (user, password) = match credentials.split_once(':') {
            Some((user, password)) => (decoded(user)?, Password::Literal(decoded(password)?)),
            None => (decoded(credentials)?, Password::None),
        };
        let mut query = Query::default();
        for pair in parameters.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            query.take(&decoded(name)?, &decoded(value)?)?;
        }
        Ok(Several {
            encrypted: is_encrypted(scheme),
            user: (!user.is_empty()).then_some(user),
            password,
            at: hosts.split(',').map(|text| host_port(text, default_port)).collect::<Result<_, _>>()?,
            path: path.trim_end_matches('/'),
            query,
        })
    }
}

/// Takes a scheme, or a URL that begins with it.
fn is_encrypted(scheme: &str) -> bool {
    scheme.starts_with("rediss") || scheme.starts_with("valkeys")
}

fn database(text: &str) -> Result<u32, TargetError> {
    match text {
        "" => Ok(0),
        text => text.parse().map_err(|_| TargetError::Database(text.to_owned())),
    }
}

fn host_port(text: &str, default_port: u16) -> Result<HostPort, TargetError> {
    let (host, port) = match text.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((host, port)) => (host, port.strip_prefix(':')),
        None => text.split_once(':').map_or((text, None), |(host, port)| (host, Some(port))),
    };
    let port = port.map_or(Ok(default_port), |p| p.parse().map_err(|_| TargetError::Malformed))?;
    if host.is_empty() { Err(TargetError::Malformed) } else { Ok(HostPort { host: decoded(host)?, port }) }
}

/// Parses `announced:port=reachable:port`.
fn mapped(text: &str) -> Result<(HostPort, HostPort), TargetError> {
    let wrong = || TargetError::Map(text.to_owned());
    let (from, to) = text.split_once('=').ok_or_else(wrong)?;
    let at = |text: &str| host_port(text, DEFAULT_PORT).map_err(|_| wrong());
    Ok((at(from)?, at(to)?))
}

fn decoded(text: &str) -> Result<String, TargetError> {
    percent_decode_str(text).decode_utf8().map(|t| t.into_owned()).map_err(|_| TargetError::Encoding)
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            HostPort { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            HostPort { host, port } => write!(f, "{host}:{port}"),
        }
    }
}

impl fmt::Display for RedisTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.address {
            Address::Tcp(at) => write!(f, "{at}/{}", self.db),
            Address::Unix(path) if self.db == 0 => write!(f, "{}", path.display()),
            Address::Unix(path) => write!(f, "{}?db={}", path.display(), self.db),
            Address::Sentinel(sentinels) => {
                write!(f, "{}/{} (sentinels {})", sentinels.master, self.db, joined(&sentinels.at))
            }
            Address::Cluster(cluster) => write!(f, "{} (cluster)", joined(&cluster.at)),
        }
    }
}

fn joined(at: &[HostPort]) -> String {
    at.iter().map(HostPort::to_string).collect::<Vec<_>>().join(",")
}

impl fmt::Debug for RedisTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A connected socket on which nothing has been sent yet.
pub(super) enum Stream {
    Tcp(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
    Unix(UnixStream),
}

/// Both directions of a socket, because a batch is written while its replies are read.
pub(super) struct Socket {
    pub read: Box<dyn AsyncRead + Send + Unpin>,
    pub write: Box<dyn AsyncWrite + Send + Unpin>,
}

impl From<Stream> for Socket {
    fn from(stream: Stream) -> Self {
        match stream {
            Stream::Tcp(stream) => {
                let (read, write) = stream.into_split();
                Socket { read: Box::new(read), write: Box::new(write) }
            }
            Stream::Unix(stream) => {
                let (read, write) = stream.into_split();
                Socket { read: Box::new(read), write: Box::new(write) }
            }
            Stream::Tls(stream) => {
                let (read, write) = tokio::io::split(stream);
                Socket { read: Box::new(read), write: Box::new(write) }
            }
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Tcp(stream) => Pin::new(stream).poll_read(cx, buf),
            Stream::Tls(stream) => Pin::new(stream).poll_read(cx, buf),
            Stream::Unix(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Stream::Tcp(stream) => Pin::new(stream).poll_write(cx, buf),
            Stream::Tls(stream) => Pin::new(stream).poll_write(cx, buf),
            Stream::Unix(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Tcp(stream) => Pin::new(stream).poll_flush(cx),
            Stream::Tls(stream) => Pin::new(stream).poll_flush(cx),
            Stream::Unix(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
            Stream::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
            Stream::Unix(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

/// Has no time limit of its own: the caller's covers what follows as well.
pub(super) async fn open(target: &RedisTarget) -> Result<Stream, SinkError> {
    match &target.address {
        Address::Tcp(at) => open_at(target, at).await,
        Address::Unix(path) => {
            let stream = UnixStream::connect(path).await;
            Ok(Stream::Unix(stream.map_err(|error| SinkError::Unreachable { redis: target.to_string(), error })?))
        }
        Address::Sentinel(sentinels) => open_at(target, &master_of(sentinels, target).await?).await,
        Address::Cluster(cluster) => {
            let topology = Topology::discover(target).await?;
            let unserved = || SinkError::Unserved { redis: target.to_string(), lane: cluster.home };
            open_at(target, &topology.master_of(cluster.home).ok_or_else(unserved)?.at).await
        }
    }
}

/// Opens a socket to one server of those that `target` names or leads to.
pub(super) async fn open_at(target: &RedisTarget, at: &HostPort) -> Result<Stream, SinkError> {
    let unreachable = |error: io::Error| SinkError::Unreachable { redis: at.to_string(), error };
    let stream = TcpStream::connect((at.host.as_str(), at.port)).await.map_err(unreachable)?;
    // A batch is one write; Nagle's algorithm would only delay it.
    stream.set_nodelay(true).map_err(unreachable)?;
    // Limits what the kernel buffers, because bytes that it has accepted but not sent count as moved: see
    // `link::Moved`. A kernel without this option takes a slow link for a dead one sooner.
    #[cfg(target_os = "linux")]
    let _ = SockRef::from(&stream).set_tcp_notsent_lowat(NOT_SENT_BYTES);
    let Some(tls) = &target.tls else { return Ok(Stream::Tcp(stream)) };
    let config = tls.client_config().map_err(|error| SinkError::Client(error.to_string()))?;
    let refused = |error: io::Error| SinkError::Tls { redis: at.to_string(), error };
    let name = ServerName::try_from(at.host.clone()).map_err(|error| refused(io::Error::other(error)))?;
    let stream = TlsConnector::from(config).connect(name, stream).await.map_err(refused)?;
    Ok(Stream::Tls(Box::new(stream)))
}

/// Asks the Sentinels one after the other, as the guide for Sentinel clients says.
/// <https://redis.io/docs/latest/develop/reference/sentinel-clients/>
async fn master_of(sentinels: &Sentinels, target: &RedisTarget) -> Result<HostPort, SinkError> {
    let mut said: Vec<String> = Vec::new();
    // For all of them, because each has little time.
    let password = sentinels.password.read_for_login().await?;
    let (mut refused, mut answered) = (0, 0);
    for at in &sentinels.at {
        match timeout(SENTINEL_TIMEOUT, ask_sentinel(at, sentinels, password.as_deref(), target)).await {
            Ok(Ok(Some(master))) => return Ok(master),
            Ok(Ok(None)) => {
                answered += 1;
                said.push(format!("{at} knows no master {:?}", sentinels.master));
            }
            Ok(Err(NotAsked::Refused(why))) => {
                refused += 1;
                said.push(format!("{at}: {why}"));
            }
            Ok(Err(NotAsked::Away(why))) => said.push(format!("{at}: {why}")),
            Err(_) => said.push(format!("{at} did not answer within {SENTINEL_TIMEOUT:?}")),
        }
    }
    let said = said.join("; ");
    // Those that are away would hardly accept what the others refuse.
    match (refused, answered) {
        (1.., 0) => Err(SinkError::SentinelLogin { said }),
        _ => Err(SinkError::NoMaster { master: sentinels.master.clone(), said }),
    }
}

/// Why a Sentinel could not be asked for the master.
enum NotAsked {
    /// It refuses the login.
    Refused(String),
    Away(String),
}

async fn ask_sentinel(
    at: &HostPort,
    sentinels: &Sentinels,
    password: Option<&str>,
    target: &RedisTarget,
) -> Result<Option<HostPort>, NotAsked> {
    let stream = open_at(target, at).await.map_err(|error| NotAsked::Away(error.to_string()))?;
    let credentials = match (&sentinels.user, password) {
        (None, None) => None,
        (user, password) => Some((user.as_deref(), password.unwrap_or_default().to_owned())),
    };
    let login = Login { credentials, db: 0 };
    let connected = Connection::over(stream, login, REPLY_BYTES).await;
    let mut connection = connected.map_err(|error| match error {
        NotLoggedIn::Refused { .. } => NotAsked::Refused(error.to_string()),
        NotLoggedIn::Link(_) => NotAsked::Away(error.to_string()),
    })?;
    let mut question = redis::cmd("SENTINEL");
    question.arg("GET-MASTER-ADDR-BY-NAME").arg(&sentinels.master);
    let answered: Result<Option<(String, u16)>, RedisError> = question.query_async(&mut connection.link).await;
    let answer = answered.map_err(|error| match error.code() {
        Some(code) => {
            let line = format!("{code} {}", error.detail().unwrap_or_default());
            let reply = ErrorReply::received(line.as_bytes()).without(&question.get_packed_command(), password);
            match reply.class() {
                Class::Login => NotAsked::Refused(reply.to_string()),
                _ => NotAsked::Away(reply.to_string()),
            }
        }
        None => NotAsked::Away(error.category().to_owned()),
    })?;
    Ok(answer.map(|(host, port)| HostPort { host, port }))
}

/// A connection of the redis crate over one of our sockets. Dropping it closes the socket.
pub(super) struct Connection {
    pub link: MultiplexedConnection,
    driver: JoinHandle<()>,
}

impl Connection {
    /// Logs in. Each later reply may have `most` bytes.
    pub async fn over(stream: Stream, login: Login<'_>, most: usize) -> Result<Self, NotLoggedIn> {
        Self::within(None, stream, login, most).await
    }

    /// Like [`Self::over`], and limits the replies in total if there is an allowance.
    pub(super) async fn within(
        allowance: Option<Allowance>,
        stream: Stream,
        login: Login<'_>,
        most: usize,
    ) -> Result<Self, NotLoggedIn> {
        let commands = login.commands();
        let stream = Bounded::new(stream, ReplyBounds::new(commands.len(), most).within(allowance));
        let mut connection = Self::unknown(stream).await.map_err(NotLoggedIn::Link)?;
        let mut pipe = Pipeline::new();
        // Returns errors as values, each at its command's place. The crate's own login rewords them.
        pipe.ignore_errors();
        for (_, command) in &commands {
            pipe.add_command(command.clone());
        }
        let answered: Result<Vec<Value>, RedisError> = pipe.query_async(&mut connection.link).await;
        let replies = answered.map_err(NotLoggedIn::Link)?;
        for ((command, sent), reply) in commands.iter().zip(replies) {
            if let (Value::ServerError(error), false) = (reply, *command == OPTIONAL) {
                let line = format!("{} {}", error.code(), error.details().unwrap_or_default());
                let reply = ErrorReply::received(line.as_bytes()).without(&sent.get_packed_command(), None);
                return Err(NotLoggedIn::Refused { command, reply });
            }
        }
        Ok(connection)
    }

    /// A connection that is not logged in yet.
    async fn unknown(stream: Bounded<Stream, ReplyBounds>) -> redis::RedisResult<Self> {
        let info = RedisConnectionInfo::default().set_protocol(ProtocolVersion::RESP2).set_skip_set_lib_name();
        // The callers limit the time of each call themselves.
        let config = AsyncConnectionConfig::new().set_response_timeout(None).set_connection_timeout(None);
        let (link, driver) = MultiplexedConnection::new_with_config(&info, stream, config).await?;
        Ok(Connection { link, driver: tokio::spawn(driver) })
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp(host: &str, port: u16, db: u32, user: Option<&str>, password: Option<&str>) -> RedisTarget {
        RedisTarget {
            address: Address::Tcp(HostPort { host: host.to_owned(), port }),
            tls: None,
            db,
            user: user.map(str::to_owned),
            password: password.map_or(Password::None, |text| Password::Literal(text.to_owned())),
            packs: true,
        }
    }

    #[test]
    fn only_another_machine_must_be_verified_and_is_sent_no_password_in_clear() {
        for (url, unverified, clear) in [
            ("redis://:x@r.example/0", false, true),
            ("redis://r.example/0", false, false),
            ("redis://:x@127.0.0.1/0", false, false),
            ("redis://:x@[::1]/0", false, false),
            ("redis://:x@localhost/0", false, false),
            ("unix:///run/redis.sock?pass=x", false, false),
            ("redis+sentinel://127.0.0.1,r.example/m/0?sentinel_password=x", false, true),
            ("rediss://:x@r.example/0?insecure", true, false),
            ("rediss://:x@127.0.0.1/0?insecure", false, false),
        ] {
            let target = RedisTarget::parse(url).unwrap();
            assert_eq!((target.is_unverified(), target.sends_password_in_clear()), (unverified, clear), "{url}");
        }
    }

    #[test]
    fn reads_every_part_of_a_url() {
        for (url, wanted) in [
            ("redis://localhost", tcp("localhost", 6379, 0, None, None)),
            ("redis://127.0.0.1:7000/", tcp("127.0.0.1", 7000, 0, None, None)),
            ("redis://[::1]:7000/3", tcp("::1", 7000, 3, None, None)),
            ("redis://:00123@h/1", tcp("h", 6379, 1, None, Some("00123"))),
            ("redis://u:p%40%3A%2F@h", tcp("h", 6379, 0, Some("u"), Some("p@:/"))),
            ("redis://u@h", tcp("h", 6379, 0, Some("u"), None)),
        ] {
            assert_eq!(RedisTarget::parse(url), Ok(wanted), "{url}");
        }
        let unix = |path: &str, db, user: Option<&str>, password: Option<&str>| RedisTarget {
            address: Address::Unix(path.into()),
            ..tcp("", 0, db, user, password)
        };
        for (url, wanted) in [
            ("unix:///run/redis.sock", unix("/run/redis.sock", 0, None, None)),
            ("redis+unix:///a%20b/s?db=2&user=u&pass=p%26", unix("/a b/s", 2, Some("u"), Some("p&"))),
        ] {
            assert_eq!(RedisTarget::parse(url), Ok(wanted), "{url}");
        }
    }

    #[test]
    fn refuses_what_it_cannot_use() {
        for url in [
            "",
            "localhost:6379",
            "http://localhost",
            "redis://",
            "redis:///0",
            "redis://h/x",
            "redis://h/-1",
            "redis://h:99999",
            "redis://h?db=1",
            "unix://relative",
            "unix://host/path",
            "unix:///",
            "unix:///s?db=x",
            "unix:///s?timeout=1",
        ] {
            assert!(RedisTarget::parse(url).is_err(), "{url}");
        }
    }

    #[test]
    fn reads_sentinels() {
        let read = |url: &str| RedisTarget::parse(url).unwrap();
        let target = read("redis+sentinel://u:p%3A@a,b:2,[::1]:3/my%20master/4?sentinel_password=s");
        let Address::Sentinel(sentinels) = &target.address else { panic!("not sentinels") };
        let at: Vec<String> = sentinels.at.iter().map(HostPort::to_string).collect();
        assert_eq!((at.join(" "), sentinels.master.as_str()), ("a:26379 b:2 [::1]:3".to_owned(), "my master"));
        assert!(sentinels.password == Password::Literal("s".to_owned()));
        assert_eq!((target.user.as_deref(), target.db), (Some("u"), 4));
        assert!(target.password == Password::Literal("p:".to_owned()));
        assert_eq!((read("redis+sentinel://a/m").db, target.tls), (0, None));
        assert!(read("rediss+sentinel://a/m?insecure").tls.is_some());
        for url in ["redis+sentinel://a", "redis+sentinel:///m", "redis+sentinel://a/m/x", "redis+sentinel://a:x/m"] {
            assert!(RedisTarget::parse(url).is_err(), "{url}");
        }
    }

    #[test]
    fn reads_clusters() {
        let target = RedisTarget::parse("redis+cluster://u:p%3A@a,b:2,[::1]:3/0?map=10.0.0.1:6379=b:2&map=c=[::1]:3");
        let target = target.unwrap().at_home(Lane::of(b"x"));
        let Address::Cluster(cluster) = &target.address else { panic!("not a cluster") };
        assert_eq!((joined(&cluster.at), cluster.home), ("a:6379,b:2,[::1]:3".to_owned(), Lane::of(b"x")));
        assert!(target.user.as_deref() == Some("u") && target.password == Password::Literal("p:".to_owned()));
        let reachable = |host: &str, port| cluster.reachable(&HostPort { host: host.to_owned(), port }).to_string();
        assert_eq!([reachable("10.0.0.1", 6379), reachable("c", 6379)], ["b:2", "[::1]:3"]);
        assert_eq!(reachable("10.0.0.1", 6380), "10.0.0.1:6380");
        assert_eq!(format!("{target:?}"), "a:6379,b:2,[::1]:3 (cluster)");
        assert!(RedisTarget::parse("valkeys+cluster://a?insecure").unwrap().tls.is_some());
        for url in [
            "redis+cluster://",
            "redis+cluster://a/1",
            "redis+cluster://a,",
            "redis+cluster://a?map=b",
            "redis+cluster://a?map=b:x=c",
            "redis+cluster://a?db=0",
            "redis://a?map=b=c",
            "redis+sentinel://a/m?map=b=c",
        ] {
            assert!(RedisTarget::parse(url).is_err(), "{url}");
        }
    }

    #[test]
    fn only_an_encrypted_scheme_takes_certificates() {
        let tls = |url: &str| RedisTarget::parse(url).map(|target| target.tls);
        assert_eq!(tls("redis://h"), Ok(None));
        let system = TlsSettings { verify: Verify::ChainAndHost, roots: Roots::System, identity: None };
        let nothing = TlsSettings { verify: Verify::Nothing, ..system.clone() };
        assert_eq!(tls("rediss://h?insecure"), Ok(Some(nothing)));
        assert_eq!(tls("redis://h?cacert=/a"), Err(TargetError::NotEncrypted("cacert".to_owned())));
        assert_eq!(tls("rediss://h?cert=/a"), Err(TargetError::HalfIdentity));
        let missing = tls("rediss://h?cacert=/does/not/exist").unwrap_err().to_string();
        assert!(missing.contains("/does/not/exist"), "{missing}");
    }

    #[test]
    fn shows_no_secret() {
        let target = RedisTarget::parse("redis://u:hunter2@h/4").unwrap();
        assert_eq!(format!("{target} {target:?}"), "h:6379/4 h:6379/4");
        let error = RedisTarget::parse("redis://u:hunter2@h:port").unwrap_err();
        assert!(!format!("{error} {error:?}").contains("hunter2"));
    }
}
