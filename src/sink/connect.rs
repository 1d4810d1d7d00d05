//! Where Redis is, from a URL, and a socket to it.
//!
//! Knows nothing of commands. The password stands in no Debug, Display or error: a URL that cannot be parsed is never
//! quoted back.

use super::SinkError;
use percent_encoding::percent_decode_str;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};

pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

const DEFAULT_PORT: u16 = 6379;

/// A Redis server, one of its databases, and who we are there.
#[derive(Clone, PartialEq, Eq)]
pub struct RedisTarget {
    pub address: Address,
    pub db: u32,
    pub user: Option<String>,
    pub password: Option<String>,
}

#[derive(Clone, PartialEq, Eq)]
pub enum Address {
    Tcp { host: String, port: u16 },
    Unix(PathBuf),
}

/// Why a URL names no Redis that can be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TargetError {
    #[error("redis.url: {scheme}:// ({what}) is not supported yet: use redis:// or unix://")]
    NotYet { scheme: &'static str, what: &'static str },
    #[error("redis.url must begin with redis:// or unix://")]
    Scheme,
    #[error("redis.url is not a URL like redis://user:password@host:6379/0 or unix:///path/to/socket?db=0")]
    Malformed,
    #[error("redis.url: the database {0:?} is not a number")]
    Database(String),
    #[error("redis.url: unknown parameter {0:?}")]
    Parameter(String),
    #[error("redis.url: user and password must be UTF-8")]
    Encoding,
}

impl RedisTarget {
    pub fn parse(url: &str) -> Result<Self, TargetError> {
        let (scheme, _) = url.split_once("://").ok_or(TargetError::Scheme)?;
        match scheme {
            "redis" | "valkey" => Self::parse_tcp(url),
            "unix" | "redis+unix" | "valkey+unix" => Self::parse_unix(url),
            "rediss" | "valkeys" => Err(TargetError::NotYet { scheme: "rediss", what: "TLS" }),
            "redis+sentinel" => Err(TargetError::NotYet { scheme: "redis+sentinel", what: "Sentinel" }),
            _ => Err(TargetError::Scheme),
        }
    }

    fn parse_tcp(url: &str) -> Result<Self, TargetError> {
        let url = redis::parse_redis_url(url).ok_or(TargetError::Malformed)?;
        // An IPv6 address has brackets in a URL and none in the resolver.
        let host = url.host_str().map(|h| h.trim_start_matches('[').trim_end_matches(']')).unwrap_or_default();
        if host.is_empty() {
            return Err(TargetError::Malformed);
        }
        if let Some((name, _)) = url.query_pairs().next() {
            return Err(TargetError::Parameter(name.into_owned()));
        }
        let db = match url.path().trim_matches('/') {
            "" => 0,
            text => text.parse().map_err(|_| TargetError::Database(text.to_owned()))?,
        };
        let user = decoded(url.username())?;
        Ok(RedisTarget {
            address: Address::Tcp { host: decoded(host)?, port: url.port().unwrap_or(DEFAULT_PORT) },
            db,
            user: (!user.is_empty()).then_some(user),
            password: url.password().map(decoded).transpose()?,
        })
    }

    fn parse_unix(url: &str) -> Result<Self, TargetError> {
        let url = redis::parse_redis_url(url).ok_or(TargetError::Malformed)?;
        let path = decoded(url.path())?;
        if url.host_str().is_some_and(|h| !h.is_empty()) || !path.starts_with('/') || path.ends_with('/') {
            return Err(TargetError::Malformed);
        }
        let mut target = RedisTarget { address: Address::Unix(path.into()), db: 0, user: None, password: None };
        for (name, value) in url.query_pairs() {
            match &*name {
                "db" => target.db = value.parse().map_err(|_| TargetError::Database(value.into_owned()))?,
                "user" => target.user = Some(value.into_owned()),
                "pass" | "password" => target.password = Some(value.into_owned()),
                _ => return Err(TargetError::Parameter(name.into_owned())),
            }
        }
        Ok(target)
    }

    /// The arguments of AUTH. A user without a password is one that the server lets in with any.
    pub(super) fn credentials(&self) -> Option<(Option<&str>, &str)> {
        match (&self.user, &self.password) {
            (None, None) => None,
            (user, password) => Some((user.as_deref(), password.as_deref().unwrap_or_default())),
        }
    }
}

fn decoded(text: &str) -> Result<String, TargetError> {
    percent_decode_str(text).decode_utf8().map(|t| t.into_owned()).map_err(|_| TargetError::Encoding)
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Tcp { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Address::Tcp { host, port } => write!(f, "{host}:{port}"),
            Address::Unix(path) => write!(f, "{}", path.display()),
        }
    }
}

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for RedisTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.address {
            Address::Tcp { .. } => write!(f, "{}/{}", self.address, self.db),
            Address::Unix(_) if self.db == 0 => write!(f, "{}", self.address),
            Address::Unix(_) => write!(f, "{}?db={}", self.address, self.db),
        }
    }
}

impl fmt::Debug for RedisTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The two directions of a socket: a batch is written while its replies are read.
pub(super) struct Socket {
    pub read: Box<dyn AsyncRead + Send + Unpin>,
    pub write: Box<dyn AsyncWrite + Send + Unpin>,
}

/// Not bounded in time: the caller's timeout covers what follows as well.
pub(super) async fn open(target: &RedisTarget) -> Result<Socket, SinkError> {
    let unreachable = |error: io::Error| SinkError::Unreachable { redis: target.to_string(), error };
    match &target.address {
        Address::Tcp { host, port } => {
            let stream = TcpStream::connect((host.as_str(), *port)).await.map_err(unreachable)?;
            // A batch is one write; waiting for more would only delay it.
            stream.set_nodelay(true).map_err(unreachable)?;
            let (read, write) = stream.into_split();
            Ok(Socket { read: Box::new(read), write: Box::new(write) })
        }
        Address::Unix(path) => {
            let stream = UnixStream::connect(path).await.map_err(unreachable)?;
            let (read, write) = stream.into_split();
            Ok(Socket { read: Box::new(read), write: Box::new(write) })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp(host: &str, port: u16, db: u32, user: Option<&str>, password: Option<&str>) -> RedisTarget {
        RedisTarget {
            address: Address::Tcp { host: host.to_owned(), port },
            db,
            user: user.map(str::to_owned),
            password: password.map(str::to_owned),
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
        assert!(matches!(RedisTarget::parse("rediss://h"), Err(TargetError::NotYet { what: "TLS", .. })));
        let sentinel = RedisTarget::parse("redis+sentinel://a:1,b:2/mymaster/0");
        assert!(matches!(sentinel, Err(TargetError::NotYet { what: "Sentinel", .. })));
    }

    #[test]
    fn shows_no_secret() {
        let target = RedisTarget::parse("redis://u:hunter2@h/4").unwrap();
        assert_eq!(format!("{target} {target:?}"), "h:6379/4 h:6379/4");
        let error = RedisTarget::parse("redis://u:hunter2@h:port").unwrap_err();
        assert!(!format!("{error} {error:?}").contains("hunter2"));
    }
}
