//! Waits until what Redis has acknowledged is also on its replicas, or on its disk.
//!
//! On a connection of its own, so that the writer never waits: a small write of its own goes behind everything before it
//! in Redis's one stream of writes, and WAIT or WAITAOF says when that has arrived. The checkpoint is read with it, on the
//! same server, and so says what is safe there: after a failover in between, that may be less than the writer wrote.
//! Wrong here means: Postgres forgets a change that a failover of Redis then loses.
//! <https://redis.io/docs/latest/commands/wait/>, <https://redis.io/docs/latest/commands/waitaof/>

use super::bounds::REPLY_BYTES;
use super::connect::{self, CONNECT_TIMEOUT, Connection, RedisTarget};
use super::writer::value_in;
use super::{Request, SinkError, error_reply, failed};
use crate::resp::batch::OwnKeys;
use bytes::Bytes;
use redis::{Cmd, Pipeline, RedisError, ServerError, Value};
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

const NO_FSYNC: &str = "appendfsync is no, so that nothing is ever known to be on its disk";

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
        match level {
            Durability::Memory => {}
            // A mere "not yet" is told later.
            Durability::Replicas(_) => drop(syncer.wait_once().await?),
            Durability::Aof => drop(syncer.sync().await?),
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
        Ok(syncer.wait_once().await?.err())
    }

    /// Without a write before it.
    async fn wait_once(&mut self) -> Result<Result<(), String>, SinkError> {
        // A pipeline gives an error as a value.
        let mut pipe = Pipeline::new();
        pipe.ignore_errors().add_command(self.level.wait());
        let asked = pipe.query_async(&mut self.connection.link);
        let waited = timeout(self.level.patience() + CONNECT_TIMEOUT, asked).await;
        let waited: Result<(Value,), RedisError> = waited.map_err(|_| silent(&self.target))?;
        let (waited,) = waited.map_err(|error| failed(&self.target, "WAIT", &[], &error))?;
        self.reached(waited).await
    }

    async fn open(target: &RedisTarget, own: &OwnKeys, level: Durability) -> Result<Self, SinkError> {
        let connected = async {
            let stream = connect::open(target).await?;
            Connection::over(stream, target.login()?, REPLY_BYTES).await.map_err(|error| error.at(target))
        };
        let connection = timeout(CONNECT_TIMEOUT, connected).await.map_err(|_| silent(target))??;
        Ok(Syncer { target: target.clone(), own: own.clone(), level, connection })
    }

    /// What the server says of itself beforehand; where it does not tell, waiting will show it.
    async fn look_at_the_server(&mut self) -> Result<(), SinkError> {
        let level = self.level;
        match level {
            Durability::Memory => Ok(()),
            Durability::Replicas(wanted) => {
                let connected = self.info("replication", "connected_slaves").await;
                match connected.and_then(|count| count.parse::<u32>().ok()) {
                    Some(connected) if connected < wanted => Err(self.cannot(
                        format!("{connected} replicas are connected"),
                        "connect replicas, or ask for fewer in redis.durability",
                    )),
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

    /// WAITAOF then waits for ever. `false` where CONFIG is denied.
    async fn never_fsyncs(&mut self) -> bool {
        let mut config = redis::cmd("CONFIG");
        let asked = config.arg("GET").arg("appendfsync").query_async::<Vec<String>>(&mut self.connection.link);
        matches!(timeout(CONNECT_TIMEOUT, asked).await, Ok(Ok(setting)) if setting.last().is_some_and(|v| v == "no"))
    }

    fn cannot(&self, fact: impl Into<String>, remedy: &'static str) -> SinkError {
        SinkError::NotDurable { redis: self.target.to_string(), wanted: self.level, fact: fact.into(), remedy }
    }

    /// How much is safe by now. Where that is not yet everything, it waits for a second, or three for the file.
    pub async fn sync(&mut self) -> Result<Synced, SinkError> {
        let (fence, checkpoint) = (self.own.fence().clone(), self.own.checkpoint().clone());
        let mut pipe = Pipeline::new();
        // Not the crate's own MULTI: of a refused command that keeps only EXECABORT, which has no reason.
        pipe.ignore_errors().cmd("MULTI");
        pipe.cmd("SET").arg(fence.as_bytes()).arg(1).cmd("GET").arg(checkpoint.as_bytes()).cmd("EXEC");
        pipe.add_command(self.level.wait());
        let asked = pipe.query_async::<Vec<Value>>(&mut self.connection.link);
        let answered =
            timeout(self.level.patience() + CONNECT_TIMEOUT, asked).await.map_err(|_| silent(&self.target))?;
        let replies = answered.map_err(|error| failed(&self.target, "SET", &[], &error))?;
        let Ok([multi, set, get, exec, waited]) = <[Value; 5]>::try_from(replies) else {
            return Err(SinkError::Unexpected { command: "EXEC", got: "another number of replies".to_owned() });
        };
        let requests =
            [Request::new("MULTI"), Request::of("SET", &fence), Request::of("GET", &checkpoint), Request::new("EXEC")];
        // The first one that is refused knows the reason, before EXEC does, and before a WAIT for nothing.
        for (request, reply) in requests.into_iter().zip([&multi, &set, &get, &exec]) {
            self.accepted(request, reply)?;
        }
        // Also where there is no checkpoint yet: a server that cannot do it says so at the start.
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
            _ => return Err(SinkError::Unexpected { command: "EXEC", got: "no array".to_owned() }),
        };
        match reached {
            Ok(()) => Ok(Synced::Safe(checkpoint.into())),
            // It may have been set after the start, or CONFIG been denied then.
            Err(_) if self.level == Durability::Aof && self.never_fsyncs().await => {
                Ok(Synced::NotYet(format!("redis never fsyncs: {NO_FSYNC}")))
            }
            Err(why) => Ok(Synced::NotYet(why)),
        }
    }

    fn accepted(&self, request: Request, reply: &Value) -> Result<(), SinkError> {
        match reply {
            Value::ServerError(error) => {
                Err(SinkError::Refused { request, reply: error_reply(&self.target, &[], error) })
            }
            _ => Ok(()),
        }
    }

    /// What the answer to [`Durability::wait`] means: where not everything is safe, why.
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
            (_, _) => return Err(SinkError::Unexpected { command: "WAIT", got: "another kind".to_owned() }),
        })
    }

    /// A plain refusal has no code word that says why: what the server says of itself does.
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

/// Valkey says 7.2 here, too.
fn before_waitaof(version: &str) -> bool {
    let mut parts = version.split('.').map_while(|part| part.parse::<u32>().ok());
    matches!((parts.next(), parts.next()), (Some(major), Some(minor)) if (major, minor) < (7, 2))
}

fn silent(target: &RedisTarget) -> SinkError {
    SinkError::TimedOut { redis: target.to_string(), after: CONNECT_TIMEOUT }
}
