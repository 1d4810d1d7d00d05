//! Waits until what Redis has acknowledged is also on its replicas, or on its disk.
//!
//! On a connection of its own, so that the writer never waits: a small write of its own goes behind everything before it
//! in Redis's one stream of writes, and WAIT or WAITAOF says when that has arrived. The checkpoint is read with it, on the
//! same server, and so says what is safe there: after a failover in between, that may be less than the writer wrote.
//! Wrong here means: Postgres forgets a change that a failover of Redis then loses.
//! <https://redis.io/docs/latest/commands/wait/>, <https://redis.io/docs/latest/commands/waitaof/>

use super::batch::OwnKeys;
use super::connect::{self, CONNECT_TIMEOUT, Connection, RedisTarget};
use super::{ErrorReply, Request, SinkError, failed};
use bytes::Bytes;
use redis::{Cmd, Pipeline, RedisError, Value};
use std::fmt;
use std::time::Duration;
use tokio::time::timeout;

/// When a change counts as safe, so that Postgres may forget it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// Redis acknowledged it.
    Memory,
    /// So many replicas acknowledged it, too.
    Replicas(u32),
    /// It is fsynced to the append-only file.
    Aof,
}

impl Durability {
    /// How long Redis waits before it answers how far it got. What takes longer is a stall.
    fn patience(self) -> Duration {
        match self {
            // By default (`appendfsync everysec`) Redis begins an fsync a second after the previous one.
            Durability::Aof => Duration::from_secs(3),
            Durability::Replicas(_) | Durability::Memory => Duration::from_secs(1),
        }
    }

    /// Asks how far what was written has come.
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

/// What one question found out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Synced {
    /// Everything up to this checkpoint is safe.
    Safe(Bytes),
    /// Not yet; why.
    NotYet(String),
}

pub struct Syncer {
    target: RedisTarget,
    own: OwnKeys,
    level: Durability,
    connection: Connection,
}

impl Syncer {
    /// `None` where nothing has to be waited for.
    ///
    /// # Errors
    /// [`SinkError::NotDurable`] where the server cannot do it at all.
    pub async fn connect(target: &RedisTarget, own: &OwnKeys, level: Durability) -> Result<Option<Self>, SinkError> {
        if level == Durability::Memory {
            return Ok(None);
        }
        let mut syncer = Self::open(target, own, level).await?;
        syncer.look_at_the_server().await?;
        if level == Durability::Aof {
            syncer.sync().await?;
        }
        Ok(Some(syncer))
    }

    /// Tries without writing anything: `None` where it works now, else what it would have to wait for.
    ///
    /// # Errors
    /// As those of [`Self::connect`].
    pub async fn try_out(target: &RedisTarget, own: &OwnKeys, level: Durability) -> Result<Option<String>, SinkError> {
        let mut syncer = Self::open(target, own, level).await?;
        syncer.look_at_the_server().await?;
        let waited =
            timeout(level.patience() + CONNECT_TIMEOUT, syncer.level.wait().query_async(&mut syncer.connection.link))
                .await;
        let waited: Result<Value, RedisError> = waited.map_err(|_| silent(target))?;
        Ok(syncer.reached(waited)?.err())
    }

    async fn open(target: &RedisTarget, own: &OwnKeys, level: Durability) -> Result<Self, SinkError> {
        let connected = async {
            let stream = connect::open(target).await?;
            Connection::over(stream, &target.login()).await.map_err(|error| failed(target, "AUTH", &error))
        };
        let connection = timeout(CONNECT_TIMEOUT, connected).await.map_err(|_| silent(target))??;
        Ok(Syncer { target: target.clone(), own: own.clone(), level, connection })
    }

    async fn look_at_the_server(&mut self) -> Result<(), SinkError> {
        let Durability::Replicas(wanted) = self.level else { return Ok(()) };
        let mut info = redis::cmd("INFO");
        let info: Result<String, RedisError> = info.arg("replication").query_async(&mut self.connection.link).await;
        let connected = info.ok().and_then(|info| {
            info.lines().find_map(|line| line.strip_prefix("connected_slaves:")?.trim().parse::<u32>().ok())
        });
        match connected {
            Some(connected) if connected < wanted => Err(self.cannot(
                format!("{connected} replicas are connected"),
                "connect replicas, or ask for fewer in redis.durability",
            )),
            Some(_) | None => Ok(()),
        }
    }

    fn cannot(&self, fact: impl Into<String>, remedy: &'static str) -> SinkError {
        SinkError::NotDurable { redis: self.target.to_string(), wanted: self.level, fact: fact.into(), remedy }
    }

    /// How much is safe by now. Where that is not yet everything, it waits for a second, or three for the file.
    pub async fn sync(&mut self) -> Result<Synced, SinkError> {
        let mut fence = Pipeline::new();
        fence.atomic().ignore_errors();
        fence.cmd("SET").arg(self.own.fence().as_bytes()).arg(1).cmd("GET").arg(self.own.checkpoint().as_bytes());
        let wait = self.level.wait();
        let link = &mut self.connection.link;
        let asked = async { Ok::<_, RedisError>((fence.query_async(link).await?, wait.query_async(link).await)) };
        let answered =
            timeout(self.level.patience() + CONNECT_TIMEOUT, asked).await.map_err(|_| silent(&self.target))?;
        let (fenced, waited): (Value, Result<Value, RedisError>) =
            answered.map_err(|error| failed(&self.target, "SET", &error))?;
        let reached = self.reached(waited)?;
        let checkpoint = match fenced {
            Value::Array(items) => match <[Value; 2]>::try_from(items) {
                Ok([Value::Okay, Value::BulkString(checkpoint)]) => checkpoint,
                Ok([Value::Okay, Value::Nil]) => return Ok(Synced::NotYet("redis has no checkpoint".to_owned())),
                Ok([Value::ServerError(error), _] | [_, Value::ServerError(error)]) => {
                    let reply = ErrorReply(format!("{} {}", error.code(), error.details().unwrap_or_default()));
                    return Err(SinkError::Refused { request: Request::of("SET", self.own.fence()), reply });
                }
                Ok(_) | Err(_) => {
                    return Err(SinkError::Unexpected { command: "EXEC", got: "other replies".to_owned() });
                }
            },
            _ => return Err(SinkError::Unexpected { command: "EXEC", got: "no array".to_owned() }),
        };
        Ok(reached.map_or_else(Synced::NotYet, |()| Synced::Safe(checkpoint.into())))
    }

    /// What the answer to [`Durability::wait`] means: where not everything is safe, why.
    fn reached(&self, waited: Result<Value, RedisError>) -> Result<Result<(), String>, SinkError> {
        Ok(match (self.level, waited) {
            (_, Err(error)) => return Err(self.cannot_wait(&error)),
            (Durability::Aof, Ok(Value::Array(counts))) => match counts.first() {
                Some(Value::Int(1..)) => Ok(()),
                _ => Err("redis has not fsynced its append-only file yet".to_owned()),
            },
            (Durability::Replicas(n), Ok(Value::Int(acknowledged))) if acknowledged < i64::from(n) => {
                Err(format!("{acknowledged} of {n} replicas have acknowledged"))
            }
            (Durability::Replicas(_) | Durability::Memory, Ok(Value::Int(_))) => Ok(()),
            (_, Ok(_)) => return Err(SinkError::Unexpected { command: "WAIT", got: "another kind".to_owned() }),
        })
    }

    fn cannot_wait(&self, error: &RedisError) -> SinkError {
        let text = error.to_string().to_lowercase();
        if text.contains("unknown command") {
            return self.cannot("it knows no WAITAOF", "use Redis 7.2 or later, or another redis.durability");
        }
        if text.contains("appendonly is disabled") {
            return self
                .cannot("its append-only file is off", "CONFIG SET appendonly yes, or another redis.durability");
        }
        failed(&self.target, "WAIT", error)
    }
}

fn silent(target: &RedisTarget) -> SinkError {
    SinkError::TimedOut { redis: target.to_string(), after: CONNECT_TIMEOUT }
}
