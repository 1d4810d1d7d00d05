//! Reads rows together with the checkpoint that they belong to, in one MULTI/EXEC each.
//!
//! It writes nothing and knows nothing of Postgres. It shares one connection, opened with the first read and again when
//! it broke, and no call takes longer than [`READ_TIMEOUT`]. A row that was read apart from its checkpoint could be
//! called newer than it is, and an error inside EXEC taken for a missing row would become a wrong "no such row".

use super::connect::{Address, RedisTarget};
use super::{ErrorReply, Request, SinkError, resp};
use crate::command::Key;
use bytes::Bytes;
use redis::aio::{ConnectionManager, ConnectionManagerConfig};
use redis::{
    Client, ConnectionAddr, FromRedisValue, IntoConnectionInfo, Pipeline, ProtocolVersion, RedisConnectionInfo,
    RedisError, Value,
};
use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::time::timeout;

pub const READ_TIMEOUT: Duration = Duration::from_secs(2);

/// Between fresh starts of a connection that the manager would never give up by itself.
const RENEWAL_PAUSE: Duration = Duration::from_millis(500);
const SCAN_COUNT: usize = 1000;

/// The connection for reads, shared by all clones.
#[derive(Clone)]
pub struct Reader(Arc<Shared>);

struct Shared {
    redis: String,
    checkpoint: Key,
    client: Client,
    link: Mutex<Link>,
}

struct Link {
    manager: ConnectionManager,
    renewed: Instant,
}

/// Rows as they were at one moment, and the checkpoint of that moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Read {
    pub checkpoint: Option<Bytes>,
    /// In the order of the keys; fields in the order that Redis gives them.
    pub rows: Vec<Option<Vec<(Bytes, Bytes)>>>,
    /// `None`: there is no such key, or it never expires.
    pub ttl_ms: Vec<Option<u64>>,
    /// How long Redis took, the way there and back included.
    pub redis: Duration,
}

impl Reader {
    /// Contacts nobody yet. Has to be called inside a tokio runtime.
    pub fn connect_lazy(target: &RedisTarget, checkpoint: &Key) -> Result<Reader, SinkError> {
        let client_error = |error: RedisError| SinkError::Client(error.to_string());
        let mut settings = RedisConnectionInfo::default()
            .set_db(i64::from(target.db))
            .set_protocol(ProtocolVersion::RESP2)
            .set_lib_name("prefetchd", env!("CARGO_PKG_VERSION"));
        if let Some((user, password)) = target.credentials() {
            settings = settings.set_password(password);
            if let Some(user) = user {
                settings = settings.set_username(user);
            }
        }
        let address = match &target.address {
            Address::Tcp { host, port } => ConnectionAddr::Tcp(host.clone(), *port),
            Address::Unix(path) => ConnectionAddr::Unix(path.clone()),
        };
        let info = address.into_connection_info().map_err(client_error)?.set_redis_settings(settings);
        let client = Client::open(info).map_err(client_error)?;
        let link = Mutex::new(Link { manager: manager(&client).map_err(client_error)?, renewed: Instant::now() });
        Ok(Reader(Arc::new(Shared { redis: target.to_string(), checkpoint: checkpoint.clone(), client, link })))
    }

    /// The hashes at `keys`, and the checkpoint, all of one moment.
    ///
    /// A key that is no hash fails the whole read, as [`SinkError::Refused`] with that key: it is neither a row nor the
    /// absence of one.
    pub async fn rows(&self, keys: &[Key]) -> Result<Read, SinkError> {
        let mut pipe = Pipeline::with_capacity(1 + 2 * keys.len());
        // An error inside EXEC comes as a value, with its place.
        pipe.atomic().ignore_errors();
        pipe.cmd("GET").arg(self.0.checkpoint.as_bytes());
        for key in keys {
            pipe.cmd("HGETALL").arg(key.as_bytes()).cmd("PTTL").arg(key.as_bytes());
        }
        let begun = Instant::now();
        let reply: Value = self.bounded("EXEC", async |link| pipe.query_async(link).await).await?;
        let redis = begun.elapsed();

        let items = match reply {
            Value::Array(items) if items.len() == 1 + 2 * keys.len() => items,
            other => return Err(unexpected("EXEC", &other)),
        };
        let mut items = items.into_iter();
        let checkpoint = optional(Request::of("GET", &self.0.checkpoint), "GET", items.next().unwrap_or(Value::Nil))?;
        let (mut rows, mut ttl_ms) = (Vec::with_capacity(keys.len()), Vec::with_capacity(keys.len()));
        for key in keys {
            let (hash, ttl) = (items.next().unwrap_or(Value::Nil), items.next().unwrap_or(Value::Nil));
            rows.push(fields(key, hash)?);
            ttl_ms.push(match ttl {
                // Negative: no key, or no TTL.
                Value::Int(ms) => u64::try_from(ms).ok(),
                other => return Err(failure(Request::of("PTTL", key), "PTTL", other)),
            });
        }
        Ok(Read { checkpoint, rows, ttl_ms, redis })
    }

    pub async fn checkpoint(&self) -> Result<Option<Bytes>, SinkError> {
        let command = redis::cmd("GET").arg(self.0.checkpoint.as_bytes()).to_owned();
        let reply: Value = self.bounded("GET", async |link| command.query_async(link).await).await?;
        optional(Request::of("GET", &self.0.checkpoint), "GET", reply)
    }

    /// One page of the keys that begin with `prefix`: begin with cursor 0, go on with the one returned until that is 0.
    /// A key may come twice.
    pub async fn scan_page(&self, prefix: &[u8], cursor: u64) -> Result<(u64, Vec<Key>), SinkError> {
        let command = redis::cmd("SCAN")
            .arg(cursor)
            .arg("MATCH")
            .arg(resp::glob_of_prefix(prefix))
            .arg("COUNT")
            .arg(SCAN_COUNT)
            .to_owned();
        let (next, keys): (u64, Vec<Vec<u8>>) =
            self.bounded("SCAN", async |link| command.query_async(link).await).await?;
        Ok((next, keys.into_iter().filter(|key| key.starts_with(prefix)).map(|key| Key(key.into())).collect()))
    }

    async fn bounded<T: FromRedisValue>(
        &self,
        command: &'static str,
        call: impl AsyncFnOnce(&mut ConnectionManager) -> Result<T, RedisError>,
    ) -> Result<T, SinkError> {
        let mut link = self.0.lock().manager.clone();
        match timeout(READ_TIMEOUT, call(&mut link)).await {
            Ok(Ok(reply)) => Ok(reply),
            Ok(Err(error)) => {
                if !error.is_connection_dropped() {
                    self.0.renew();
                }
                Err(self.0.error(command, &error))
            }
            Err(_) => {
                self.0.renew();
                Err(SinkError::TimedOut { redis: self.0.redis.clone(), after: READ_TIMEOUT })
            }
        }
    }
}

impl fmt::Debug for Reader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Reader({})", self.0.redis)
    }
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, Link> {
        // Nothing panics while it is held, and a manager is whole at any time.
        self.link.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The manager opens a connection again when it broke, but keeps one that hangs, and a refused password for ever.
    fn renew(&self) {
        let mut link = self.lock();
        if link.renewed.elapsed() < RENEWAL_PAUSE {
            return;
        }
        if let Ok(manager) = manager(&self.client) {
            *link = Link { manager, renewed: Instant::now() };
        }
    }

    fn error(&self, command: &'static str, error: &RedisError) -> SinkError {
        let redis = self.redis.clone();
        if error.is_connection_refusal() {
            return SinkError::Unreachable { redis, error: io::Error::other(error.to_string()) };
        }
        if error.is_timeout() {
            return SinkError::TimedOut { redis, after: READ_TIMEOUT };
        }
        if error.is_io_error() || error.kind() == redis::ErrorKind::Parse {
            return SinkError::Lost { redis, error: io::Error::other(error.to_string()) };
        }
        let text = match (error.code(), error.kind()) {
            (Some(code), _) => format!("{code} {}", error.detail().unwrap_or_default()),
            (None, redis::ErrorKind::AuthenticationFailed) => format!("WRONGPASS {error}"),
            (None, _) => error.to_string(),
        };
        SinkError::Refused { request: Request::new(command), reply: ErrorReply(text) }
    }
}

/// Tries to connect once for each read that finds no connection: whoever reads wants an answer now.
fn manager(client: &Client) -> Result<ConnectionManager, RedisError> {
    let config = ConnectionManagerConfig::new()
        .set_number_of_retries(0)
        .set_connection_timeout(Some(READ_TIMEOUT))
        .set_response_timeout(Some(READ_TIMEOUT));
    ConnectionManager::new_lazy_with_config(client.clone(), config)
}

/// `None` for a hash that is not there.
fn fields(key: &Key, reply: Value) -> Result<Option<Vec<(Bytes, Bytes)>>, SinkError> {
    let items = match reply {
        Value::Array(items) => items,
        other => return Err(failure(Request::of("HGETALL", key), "HGETALL", other)),
    };
    let mut fields = Vec::with_capacity(items.len() / 2);
    let mut items = items.into_iter();
    while let Some(name) = items.next() {
        match (name, items.next()) {
            (Value::BulkString(name), Some(Value::BulkString(value))) => fields.push((name.into(), value.into())),
            (other, _) => return Err(unexpected("HGETALL", &other)),
        }
    }
    // Redis has no empty hash.
    Ok((!fields.is_empty()).then_some(fields))
}

fn optional(request: Request, command: &'static str, reply: Value) -> Result<Option<Bytes>, SinkError> {
    match reply {
        Value::BulkString(bytes) => Ok(Some(bytes.into())),
        Value::Nil => Ok(None),
        other => Err(failure(request, command, other)),
    }
}

fn failure(request: Request, command: &'static str, reply: Value) -> SinkError {
    match reply {
        Value::ServerError(error) => {
            let reply = ErrorReply(format!("{} {}", error.code(), error.details().unwrap_or_default()));
            SinkError::Refused { request, reply }
        }
        other => unexpected(command, &other),
    }
}

fn unexpected(command: &'static str, got: &Value) -> SinkError {
    let got = match got {
        Value::Nil => "nothing".to_owned(),
        Value::Array(items) => format!("an array of {}", items.len()),
        Value::BulkString(bytes) => format!("a value of {} bytes", bytes.len()),
        _ => "a reply of another kind".to_owned(),
    };
    SinkError::Unexpected { command, got }
}
