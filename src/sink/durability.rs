//! Waits until what Redis has acknowledged is also on its replicas, or on its disk.
//!
//! Uses a connection of its own, so that the writer never waits. It writes a small key, which follows everything before
//! it in Redis's one stream of writes, and WAIT or WAITAOF reports when that has arrived. The checkpoint is read in the
//! same transaction, so it says what is safe on this very server; after a failover, that may be less than the writer
//! wrote. A mistake here makes Postgres discard a change that a failover of Redis then loses.
//!
//! <https://redis.io/docs/latest/commands/wait/>, <https://redis.io/docs/latest/commands/waitaof/>

use super::bounds::REPLY_BYTES;
use super::connect::{self, CONNECT_TIMEOUT, Connection, HostPort, RedisTarget, Stream};
use super::server::{Life, life_in, value_in};
use super::{Class, Request, SinkError, error_reply, failed};
use crate::command::Key;
use crate::resp::batch::OwnKeys;
use crate::words::counted;
use bytes::Bytes;
use redis::{Cmd, Pipeline, RedisError, ServerError, Value};
use std::fmt;
use std::time::Duration;
use tokio::time::timeout;

/// When a change counts as safe, so that Postgres may discard it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// Redis has acknowledged it.
    Memory,
    /// This many replicas have acknowledged it, too.
    Replicas(u32),
    /// It is fsynced to the append-only file.
    Aof,
}

impl Durability {
    /// How long Redis waits before it reports how far it got. If it takes longer, the connection has stalled.
    fn patience(self) -> Duration {
        match self {
            // With the default `appendfsync everysec`, Redis starts an fsync one second after the previous one.
            Durability::Aof => Duration::from_secs(3),
            Durability::Replicas(_) | Durability::Memory => Duration::from_secs(1),
        }
    }

    /// Returns the command that asks how far the writes have come.
    fn wait(self) -> Cmd {
        let millis = self.patience().as_millis() as u64;
        match self {
            Durability::Aof => redis::cmd("WAITAOF").arg(1).arg(0).arg(millis).to_owned(),
            Durability::Replicas(n) => redis::cmd("WAIT").arg(n).arg(millis).to_owned(),
            Durability::Memory => redis::cmd("WAIT").arg(0).arg(millis).to_owned(),
        }
    }
}

impl fmt::Display for Durability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Durability::Memory => f.write_str("memory"),
            Durability::Replicas(n) => write!(f, "replicas:{n}"),
            Durability::Aof => f.write_str("aof"),
        }
    }
}

/// How long a fence stays that expires by itself.
const FENCE_MS: u32 = 60_000;

const NO_FSYNC: &str = "appendfsync is no, so it is never known what is on disk";

/// The answer to one request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Synced {
    /// Everything up to this checkpoint is safe.
    Safe(Bytes),
    /// Not everything is safe yet, with the reason.
    NotYet(String),
}

pub struct Syncer {
    target: RedisTarget,
    own: OwnKeys,
    level: Durability,
    connection: Connection,
}

impl Syncer {
    /// # Errors
    /// [`SinkError::NotDurable`] if the server cannot provide this level at all.
    pub async fn connect(target: &RedisTarget, own: &OwnKeys, level: Durability) -> Result<Self, SinkError> {
        let mut syncer = Self::open(target, own, level).await?;
        syncer.require().await?;
        Ok(syncer)
    }

    /// # Errors
    /// [`SinkError::NotDurable`] if the server cannot provide the level at all. That it does not yet is reported later.
    pub(super) async fn require(&mut self) -> Result<(), SinkError> {
        self.tries().await.map(drop)
    }

    /// Tries it without writing anything. Returns `None` if it works now, otherwise what it would have to wait for.
    ///
    /// # Errors
    /// As [`Self::connect`].
    pub async fn try_out(target: &RedisTarget, own: &OwnKeys, level: Durability) -> Result<Option<String>, SinkError> {
        Self::open(target, own, level).await?.tries().await
    }

    /// See [`Self::try_out`].
    pub(super) async fn tries(&mut self) -> Result<Option<String>, SinkError> {
        self.look_at_the_server().await?;
        Ok(self.wait_once().await?.err())
    }

    /// Waits without writing first.
    async fn wait_once(&mut self) -> Result<Result<(), String>, SinkError> {
        // A pipeline returns errors as values.
        let mut pipe = Pipeline::new();
        pipe.ignore_errors().add_command(self.level.wait());
        let asked = pipe.query_async(&mut self.connection.link);
        let waited = timeout(self.level.patience() + CONNECT_TIMEOUT, asked).await;
        let waited: Result<(Value,), RedisError> = waited.map_err(|_| silent(&self.target))?;
        let (waited,) = waited.map_err(|error| failed(&self.target, "WAIT", &[], &error))?;
        self.reached(waited).await
    }

    async fn open(target: &RedisTarget, own: &OwnKeys, level: Durability) -> Result<Self, SinkError> {
        Self::over(target.clone(), own, level, connect::open(target)).await
    }

    /// Connects to one node of a cluster.
    pub(super) async fn open_at(
        target: &RedisTarget,
        own: &OwnKeys,
        level: Durability,
        at: &HostPort,
    ) -> Result<Self, SinkError> {
        Self::over(target.at(at), own, level, connect::open_at(target, at)).await
    }

    async fn over(
        target: RedisTarget,
        own: &OwnKeys,
        level: Durability,
        opened: impl Future<Output = Result<Stream, SinkError>>,
    ) -> Result<Self, SinkError> {
        let login = target.login().await?;
        let connected = async {
            let stream = opened.await?;
            Connection::over(stream, login, REPLY_BYTES).await.map_err(|error| error.at(&target))
        };
        let connection = timeout(CONNECT_TIMEOUT, connected).await.map_err(|_| silent(&target))??;
        Ok(Syncer { target, own: own.clone(), level, connection })
    }

    /// Checks what the server reports about itself. If it reports nothing, waiting will show whether it works.
    async fn look_at_the_server(&mut self) -> Result<(), SinkError> {
        let level = self.level;
        match level {
            Durability::Memory => Ok(()),
            Durability::Replicas(wanted) => {
                let connected = self.info("replication", "connected_slaves").await;
                match connected.and_then(|count| count.parse::<u32>().ok()) {
                    Some(connected) if connected < wanted => {
                        let are = if connected == 1 { "is" } else { "are" };
                        let fact = format!("{} {are} connected", counted(connected, "replica"));
                        Err(self.cannot(fact, "connect replicas, or ask for fewer in redis.durability"))
                    }
                    Some(_) | None => Ok(()),
                }
            }
            Durability::Aof if self.never_fsyncs().await => {
                Err(self.cannot(NO_FSYNC, "CONFIG SET appendfsync always, or another redis.durability"))
            }
            Durability::Aof => Ok(()),
        }
    }

    async fn info(&mut self, section: &str, field: &str) -> Option<String> {
        let mut info = redis::cmd("INFO");
        let asked = info.arg(section).query_async::<String>(&mut self.connection.link);
        let info = timeout(CONNECT_TIMEOUT, asked).await.ok()?.ok()?;
        value_in(&info, field).map(str::to_owned)
    }

    /// Whether `appendfsync` is `no`, in which case WAITAOF would wait forever. Returns `false` if CONFIG is denied.
    async fn never_fsyncs(&mut self) -> bool {
        let mut config = redis::cmd("CONFIG");
        let asked = config.arg("GET").arg("appendfsync").query_async::<Vec<String>>(&mut self.connection.link);
        matches!(timeout(CONNECT_TIMEOUT, asked).await, Ok(Ok(setting)) if setting.last().is_some_and(|v| v == "no"))
    }

    fn cannot(&self, fact: impl Into<String>, remedy: &'static str) -> SinkError {
        SinkError::NotDurable { redis: self.target.to_string(), wanted: self.level, fact: fact.into(), remedy }
    }

    /// Returns how much is safe by now. If that is not everything, waits for up to one second, or three for the file.
    pub async fn sync(&mut self) -> Result<Synced, SinkError> {
        let (fence, checkpoint) = (self.own.fence().clone(), self.own.checkpoint().clone());
        let mut pipe = Pipeline::new();
        // Not the crate's own MULTI: if a command is refused, that one keeps only EXECABORT, which has no reason.
        pipe.ignore_errors().cmd("MULTI");
        pipe.cmd("SET").arg(fence.as_bytes()).arg(1).cmd("GET").arg(checkpoint.as_bytes()).cmd("EXEC");
        pipe.add_command(self.level.wait());
        let asked = pipe.query_async::<Vec<Value>>(&mut self.connection.link);
        let answered =
            timeout(self.level.patience() + CONNECT_TIMEOUT, asked).await.map_err(|_| silent(&self.target))?;
        let replies = answered.map_err(|error| failed(&self.target, "SET", &[], &error))?;
        let Ok([multi, set, get, exec, waited]) = <[Value; 5]>::try_from(replies) else {
            return Err(SinkError::Unexpected { command: "EXEC", got: "the wrong number of replies".to_owned() });
        };
        let requests =
            [Request::new("MULTI"), Request::of("SET", &fence), Request::of("GET", &checkpoint), Request::new("EXEC")];
        // The first refused command has the reason. Check it before EXEC, and before waiting for nothing.
        for (request, reply) in requests.into_iter().zip([&multi, &set, &get, &exec]) {
            self.accepted(request, reply)?;
        }
        // Also if there is no checkpoint yet, so that a server that cannot provide the level says so at the start.
        let reached = self.reached(waited).await?;
        let checkpoint = match exec {
            Value::Array(items) => match <[Value; 2]>::try_from(items) {
                Ok([Value::Okay, Value::BulkString(checkpoint)]) => checkpoint,
                Ok([Value::Okay, Value::Nil]) => return Ok(Synced::NotYet("redis has no checkpoint".to_owned())),
                Ok([set, get]) => {
                    self.accepted(Request::of("SET", &fence), &set)?;
                    self.accepted(Request::of("GET", &checkpoint), &get)?;
                    return Err(SinkError::Unexpected { command: "EXEC", got: "other replies".to_owned() });
                }
                Err(_) => {
                    return Err(SinkError::Unexpected { command: "EXEC", got: "other replies".to_owned() });
                }
            },
            _ => {
                return Err(SinkError::Unexpected { command: "EXEC", got: "something other than an array".to_owned() });
            }
        };
        match reached {
            Ok(()) => Ok(Synced::Safe(checkpoint.into())),
            Err(why) => Ok(Synced::NotYet(self.explained(why).await)),
        }
    }

    async fn explained(&mut self, why: String) -> String {
        // It may have been set after the start, or CONFIG may have been denied then.
        if self.level == Durability::Aof && self.never_fsyncs().await {
            return format!("redis never fsyncs: {NO_FSYNC}");
        }
        why
    }

    /// Writes `fence`, which expires by itself, and waits until everything before it is safe; the inner error says why it
    /// is not. Also returns the life of the server that has it.
    pub(super) async fn waits_behind(&mut self, fence: &Key) -> Result<(Result<(), String>, Life), SinkError> {
        let mut pipe = Pipeline::new();
        pipe.ignore_errors().cmd("SET").arg(fence.as_bytes()).arg(1).arg("PX").arg(FENCE_MS);
        pipe.add_command(self.level.wait()).cmd("INFO");
        let asked = pipe.query_async::<(Value, Value, Value)>(&mut self.connection.link);
        let answered =
            timeout(self.level.patience() + CONNECT_TIMEOUT, asked).await.map_err(|_| silent(&self.target))?;
        let (set, waited, info) = answered.map_err(|error| failed(&self.target, "SET", &[], &error))?;
        // INFO may be denied.
        let life = redis::from_redis_value::<String>(info).map_or_else(|_| Life::default(), |info| life_in(&info));
        match self.accepted(Request::of("SET", fence), &set) {
            Err(SinkError::Refused { reply, .. }) if matches!(reply.class(), Class::Elsewhere | Class::Away) => {
                return Ok((Err(reply.to_string()), life));
            }
            done => done?,
        }
        Ok(match self.reached(waited).await? {
            Ok(()) => (Ok(()), life),
            Err(why) => (Err(self.explained(why).await), life),
        })
    }

    fn accepted(&self, request: Request, reply: &Value) -> Result<(), SinkError> {
        match reply {
            Value::ServerError(error) => {
                Err(SinkError::Refused { request, reply: error_reply(&self.target, &[], error) })
            }
            _ => Ok(()),
        }
    }

    /// Interprets the answer to [`Durability::wait`]. The inner error says why not everything is safe.
    async fn reached(&mut self, waited: Value) -> Result<Result<(), String>, SinkError> {
        Ok(match (self.level, waited) {
            (_, Value::ServerError(error)) => return Err(self.cannot_wait(&error).await),
            (Durability::Aof, Value::Array(counts)) => match counts.first() {
                Some(Value::Int(1..)) => Ok(()),
                _ => Err("redis has not fsynced its append-only file yet".to_owned()),
            },
            (Durability::Replicas(n), Value::Int(acknowledged)) if acknowledged < i64::from(n) => {
                Err(format!("{acknowledged} of {n} replicas have acknowledged"))
            }
            (Durability::Replicas(_) | Durability::Memory, Value::Int(_)) => Ok(()),
            (_, _) => return Err(SinkError::Unexpected { command: "WAIT", got: "a reply of another kind".to_owned() }),
        })
    }

    /// A plain `ERR` has no code word for the reason, so the server's version and settings must tell.
    async fn cannot_wait(&mut self, error: &ServerError) -> SinkError {
        let reply = error_reply(&self.target, &[], error);
        let level = self.level;
        match level {
            _ if !reply.is_plain() => {
                let command = if level == Durability::Aof { "WAITAOF" } else { "WAIT" };
                SinkError::Refused { request: Request::new(command), reply }
            }
            Durability::Aof if self.info("server", "redis_version").await.is_some_and(|v| before_waitaof(&v)) => {
                self.cannot("it is older than WAITAOF", "use Redis 7.2 or later, or another redis.durability")
            }
            Durability::Aof if self.info("persistence", "aof_enabled").await.is_some_and(|on| on == "0") => {
                self.cannot("its append-only file is off", "CONFIG SET appendonly yes, or another redis.durability")
            }
            Durability::Aof => self.cannot(
                format!("it does not accept WAITAOF ({reply})"),
                "use Redis 7.2 or later, or another redis.durability",
            ),
            Durability::Replicas(_) | Durability::Memory => self.cannot(
                format!("it does not accept WAIT ({reply})"),
                "use a server that does, or another redis.durability",
            ),
        }
    }
}

/// Valkey reports 7.2 here, too.
fn before_waitaof(version: &str) -> bool {
    let mut parts = version.split('.').map_while(|part| part.parse::<u32>().ok());
    matches!((parts.next(), parts.next()), (Some(major), Some(minor)) if (major, minor) < (7, 2))
}

fn silent(target: &RedisTarget) -> SinkError {
    SinkError::TimedOut { redis: target.to_string(), after: CONNECT_TIMEOUT }
}
