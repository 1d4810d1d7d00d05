//! Reads rows together with the checkpoint that they belong to. If the checkpoint reads the same before and after the
//! rows, nothing was written in between, because every batch writes a checkpoint that differs from all others.
//!
//! MULTI would also work, but a Redis that is out of memory refuses even reads inside MULTI.
//!
//! It writes nothing and knows nothing about Postgres. Rows that are read one by one go [together](super::together). All other
//! calls share one connection, which is opened by the first of them and again after it broke; the call that finds it broken
//! retries once. No call takes longer than
//! [`READ_TIMEOUT`]. A row read apart from its checkpoint could be reported as newer than it is, and an error mistaken
//! for a missing row would become a wrong "no such row".

use super::bounds::{Allowance, BATCH_BYTES, ROWS_BYTES};
use super::connect::{self, Address, Connection, RedisTarget};
use super::together::{Together, Unanswered};
use super::{Class, ErrorReply, Request, SinkError, Stored, error_reply, failed, server};
use crate::command::{DeadKey, Key};
use crate::format::Format;
use crate::lsn::EndLsn;
use crate::nodes::Usage;
use crate::resp;
use crate::resp::batch::OwnKeys;
use bytes::Bytes;
use redis::aio::MultiplexedConnection;
use redis::{Cmd, FromRedisValue, Pipeline, RedisError, Value};
use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};
use tokio::sync::{Mutex, Semaphore};
use tokio::time::timeout;

pub const READ_TIMEOUT: Duration = Duration::from_secs(2);

/// After a failed attempt to connect, reads fail at once for this long instead of all trying again.
pub(super) const RETRY_PAUSE: Duration = Duration::from_millis(100);
/// A connection that has been idle for this long may have been dropped silently, as load balancers do.
pub(super) const IDLE: Duration = Duration::from_secs(10);
/// How many rows are read alone at once.
const ALONE: usize = 64;
const SCAN_COUNT: usize = 1000;
/// Redis executes a request as a whole, so a batch hardly ever comes in between; twice is suspicious.
pub(super) const ATTEMPTS: u32 = 5;

/// Identifies a server and its start: `run_id` of INFO, if reported.
pub type RunId = Option<Arc<str>>;

/// The connection for reads, shared by all clones.
#[derive(Clone)]
pub struct Reader(Arc<Shared>);

struct Shared {
    target: RedisTarget,
    own: OwnKeys,
    /// `None` if several calls share the connection at a time.
    allowance: Option<Allowance>,
    line: Mutex<Line>,
    /// Started by the first read of a row.
    together: OnceLock<Together>,
    /// Rows that are read alone may be large.
    alone: Semaphore,
}

struct Line {
    /// Numbers the connections, so that a call that finds one broken does not close the next.
    number: u64,
    state: LineState,
    /// When it was opened, or last answered.
    answered: Instant,
}

enum LineState {
    /// Not needed yet, or broken.
    Closed,
    Open(Connection, RunId),
    Failed {
        why: String,
        at: Instant,
    },
}

/// Rows of one table, and the checkpoint of their moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Read {
    /// The head of the checkpoint.
    pub checkpoint: Option<Bytes>,
    /// The table's entry in the checkpoint.
    pub entry: Option<Bytes>,
    pub server: RunId,
    /// Redis TIME, in milliseconds since the Unix epoch.
    pub redis_time_ms: u64,
    /// In the order of the keys.
    pub rows: Rows,
    pub moments: Moments,
    /// They are at least as new as this, and as the checkpoint's position. `None` if nothing but the checkpoint tells.
    pub marked: Option<EndLsn>,
    /// Keys may be missing: their hash slots have moved to another node of a cluster, and have not been read again.
    pub may_lack_keys: bool,
    /// Of a row that is read alone. `None` if the key does not exist or never expires.
    pub ttl_ms: Vec<Option<u64>>,
    /// How long Redis took, including the network round trip.
    pub redis: Duration,
}

/// Whether rows show whole transactions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moments {
    One,
    /// They lie in several hash slots of a cluster. One may show a transaction that another does not show yet.
    Several,
}

/// A row as it lies in Redis.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoredRow {
    /// In the order in which Redis returned them.
    Fields(Fields),
    Document(Bytes),
}

impl StoredRow {
    /// Approximate size.
    pub fn bytes(&self) -> usize {
        match self {
            StoredRow::Fields(fields) => fields.iter().map(|(field, value)| field.len() + value.len()).sum(),
            StoredRow::Document(document) => document.len(),
        }
    }
}

pub type Fields = Vec<(Bytes, Bytes)>;

/// In the order of their keys.
type Rows = Vec<Option<StoredRow>>;

/// What [`Reader::rows_between`] returns.
pub(super) struct Between {
    pub before: Vec<Option<Bytes>>,
    pub rows: Rows,
    pub ttl_ms: Vec<Option<u64>>,
    /// Replies to other commands, errors at their places.
    pub beside: Vec<Value>,
    pub after: Vec<Option<Bytes>>,
}

impl Reader {
    /// Opens no connection yet.
    pub fn connect_lazy(target: &RedisTarget, own: &OwnKeys) -> Reader {
        Reader::with(target.clone(), own.clone(), None)
    }

    /// The same Redis over a separate connection, for reading several rows. Takes one call at a time. A call whose
    /// replies exceed [`BATCH_BYTES`] fails with [`SinkError::Excess`].
    pub fn for_batches(&self) -> Reader {
        Reader::with(self.0.target.clone(), self.0.own.clone(), Some(Allowance::new(BATCH_BYTES)))
    }

    fn with(target: RedisTarget, own: OwnKeys, allowance: Option<Allowance>) -> Reader {
        let line = Mutex::new(Line { number: 0, state: LineState::Closed, answered: Instant::now() });
        Reader(Arc::new(Shared {
            target,
            own,
            allowance,
            line,
            together: OnceLock::new(),
            alone: Semaphore::new(ALONE),
        }))
    }

    /// Returns the rows at `keys`, the head of the checkpoint and the entry of `table`, all as of one moment.
    ///
    /// A key of another type than rows of this format have fails the whole read with [`SinkError::Refused`] and the key,
    /// since it is neither a row nor proof that there is none.
    pub async fn rows(&self, table: &str, format: Format, keys: &[Key]) -> Result<Read, SinkError> {
        Ok(self.rows_and_dead(table, (format, keys), &[]).await?.0)
    }

    pub(super) fn silent(&self) -> SinkError {
        SinkError::TimedOut { redis: self.0.target.to_string(), after: READ_TIMEOUT }
    }

    pub(super) fn without_secret(&self, error: SinkError) -> SinkError {
        match error {
            SinkError::Refused { request, reply } => {
                SinkError::Refused { request, reply: reply.without(&[], self.0.target.password.to_hide().as_deref()) }
            }
            other => other,
        }
    }

    /// Like [`Self::rows`], with the records of those `suspects` that are dead letters, as of the same moment.
    pub async fn rows_and_dead(
        &self,
        table: &str,
        rows: (Format, &[Key]),
        suspects: &[Key],
    ) -> Result<(Read, Vec<Option<DeadKey>>), SinkError> {
        let own = &self.0.own;
        let hashes: Vec<Key> =
            suspects.iter().map(|key| own.dead_keys_of(key)).collect::<BTreeSet<_>>().into_iter().collect();
        let ask: Vec<Cmd> = hashes.iter().map(|key| redis::cmd("HGETALL").arg(key.as_bytes()).take()).collect();
        for _ in 0..ATTEMPTS {
            let attempt = match (rows, suspects) {
                ((format, [key]), []) if self.0.allowance.is_none() => self.together(table, format, key).await,
                _ => self.attempt(table, rows, &ask).await,
            };
            let (read, records) = attempt.map_err(|error| self.without_secret(error))?;
            if read.moments == Moments::Several {
                continue;
            }
            let records = hashes.iter().zip(records).map(|(key, record)| fields(key, record));
            let records = records.collect::<Result<Vec<_>, _>>().map_err(|error| self.without_secret(error))?;
            let dead = |key: &Key| {
                let at = hashes.binary_search(&own.dead_keys_of(key)).ok()?;
                let (_, json) = records.get(at)?.iter().find(|(of, _)| *of == key.0)?;
                Some(DeadKey::from_json(json))
            };
            return Ok((read, suspects.iter().map(dead).collect()));
        }
        Err(restless())
    }

    /// Like [`Self::attempt`] for one row.
    async fn together(&self, table: &str, format: Format, key: &Key) -> Result<(Read, Vec<Value>), SinkError> {
        let began = Instant::now();
        let start = || Together::start(self.0.target.clone(), self.0.own.clone());
        match self.0.together.get_or_init(start).read(table, format, key).await {
            Ok(read) => Ok((read, Vec::new())),
            Err(Unanswered::Silent) => Err(self.silent()),
            Err(Unanswered::ReadAlone) => {
                let left = READ_TIMEOUT.saturating_sub(began.elapsed());
                let alone = async {
                    let _place = self.0.alone.acquire().await.expect("the semaphore is never closed");
                    self.attempt(table, (format, std::slice::from_ref(key)), &[]).await
                };
                timeout(left, alone).await.unwrap_or_else(|_| Err(self.silent()))
            }
        }
    }

    /// Returns the rows at `keys` with the checkpoint that preceded them, and the replies to the commands `beside`. All of it
    /// is of one moment if the checkpoint that followed is the same: see [`Read::moments`].
    pub(super) async fn attempt(
        &self,
        table: &str,
        (format, keys): (Format, &[Key]),
        beside: &[Cmd],
    ) -> Result<(Read, Vec<Value>), SinkError> {
        let begun = Instant::now();
        let (head, tables) = (self.0.own.checkpoint(), self.0.own.tables());
        let mut pipe = Pipeline::with_capacity(5 + keys.len() + beside.len());
        // Returns errors as values, each at its command's place.
        pipe.ignore_errors();
        pipe.cmd("GET").arg(head.as_bytes()).cmd("HGET").arg(tables.as_bytes()).arg(table);
        ask_rows(&mut pipe, format, keys);
        beside.iter().for_each(|command| _ = pipe.add_command(command.clone()));
        pipe.cmd("TIME").cmd("GET").arg(head.as_bytes());
        let (reply, server) = self.bounded("GET", &pipe).await?;
        let items = match reply {
            Value::Array(items) if items.len() == pipe.len() => items,
            other => return Err(unexpected_value("GET", &other)),
        };
        let mut items = items.into_iter();
        let mut next = || items.next().unwrap_or(Value::Nil);
        let checkpoint = optional(Request::of("GET", head), "GET", next())?;
        let entry = optional(Request::of("HGET", tables), "HGET", next())?;
        let (rows, ttl_ms) = rows_and_ttl(format, keys, &mut next)?;
        let replies = beside.iter().map(|_| next()).collect();
        let redis_time_ms = millis(next())?;
        let moments = match checkpoint == optional(Request::of("GET", head), "GET", next())? {
            true => Moments::One,
            false => Moments::Several,
        };
        let read = Read {
            checkpoint,
            entry,
            server,
            redis_time_ms,
            rows,
            moments,
            marked: None,
            may_lack_keys: false,
            ttl_ms,
            redis: begun.elapsed(),
        };
        Ok((read, replies))
    }

    /// Returns the replies to these commands, errors at their places.
    pub(super) async fn replies(&self, command: &'static str, commands: &[Cmd]) -> Result<Vec<Value>, SinkError> {
        let mut pipe = Pipeline::with_capacity(commands.len());
        pipe.ignore_errors();
        commands.iter().for_each(|command| _ = pipe.add_command(command.clone()));
        match self.bounded(command, &pipe).await? {
            (Value::Array(items), _) if items.len() == commands.len() => Ok(items),
            (other, _) => Err(unexpected_value(command, &other)),
        }
    }

    /// Returns the rows at `keys` with their TTL in milliseconds, the replies to the commands `beside`, and the strings at
    /// `values` from before and after all that.
    pub(super) async fn rows_between(
        &self,
        values: &[Key],
        (format, keys): (Format, &[Key]),
        beside: &[Cmd],
    ) -> Result<Between, SinkError> {
        let mut pipe = Pipeline::with_capacity(2 * values.len() + 1 + keys.len() + beside.len());
        pipe.ignore_errors();
        let get_all = |pipe: &mut Pipeline| values.iter().for_each(|key| _ = pipe.cmd("GET").arg(key.as_bytes()));
        get_all(&mut pipe);
        ask_rows(&mut pipe, format, keys);
        beside.iter().for_each(|command| _ = pipe.add_command(command.clone()));
        get_all(&mut pipe);
        let (reply, _) = self.bounded("GET", &pipe).await?;
        let items = match reply {
            Value::Array(items) if items.len() == pipe.len() => items,
            other => return Err(unexpected_value("GET", &other)),
        };
        let mut items = items.into_iter();
        let mut next = || items.next().unwrap_or(Value::Nil);
        let mut between = || {
            let before = strings(values, &mut next)?;
            let (rows, ttl_ms) = rows_and_ttl(format, keys, &mut next)?;
            let beside = beside.iter().map(|_| next()).collect();
            Ok(Between { before, rows, ttl_ms, beside, after: strings(values, &mut next)? })
        };
        between().map_err(|error| self.without_secret(error))
    }

    /// Returns the strings at `keys`.
    pub(super) async fn values(&self, keys: &[Key]) -> Result<Vec<Option<Bytes>>, SinkError> {
        let mut pipe = Pipeline::with_capacity(keys.len());
        pipe.ignore_errors();
        keys.iter().for_each(|key| _ = pipe.cmd("GET").arg(key.as_bytes()));
        let (reply, _) = self.bounded("GET", &pipe).await?;
        match reply {
            Value::Array(items) if items.len() == keys.len() => {
                let mut items = items.into_iter();
                let found = strings(keys, || items.next().unwrap_or(Value::Nil));
                found.map_err(|error| self.without_secret(error))
            }
            other => Err(unexpected_value("GET", &other)),
        }
    }

    /// Returns the checkpoint with the entries of all tables.
    pub async fn checkpoint(&self) -> Result<(Option<Stored>, RunId), SinkError> {
        let (head, tables) = (self.0.own.checkpoint(), self.0.own.tables());
        for _ in 0..ATTEMPTS {
            let mut pipe = Pipeline::new();
            pipe.ignore_errors().cmd("GET").arg(head.as_bytes()).cmd("HGETALL").arg(tables.as_bytes());
            pipe.cmd("GET").arg(head.as_bytes());
            let (reply, server) = self.bounded("GET", &pipe).await?;
            let [before, entries, after] = match reply {
                Value::Array(items) => {
                    <[Value; 3]>::try_from(items).map_err(|items| unexpected_value("GET", &Value::Array(items)))?
                }
                other => return Err(unexpected_value("GET", &other)),
            };
            let before = optional(Request::of("GET", head), "GET", before)?;
            let entries = fields(tables, entries)?;
            if before == optional(Request::of("GET", head), "GET", after)? {
                return Ok((before.map(|head| Stored { head, entries }), server));
            }
        }
        Err(restless())
    }

    /// Returns how many keys Redis has evicted since it started; `None` if it does not report that.
    pub async fn evicted_keys(&self) -> Result<Option<u64>, SinkError> {
        let usage = self.usage(&self.0.own.unused()).await;
        if let Some(home) = self.0.target.home() {
            self.0.target.reports(home, &usage);
        }
        Ok(usage?.evicted_keys)
    }

    /// Returns what the server reports of its memory. `unused` is a key that never exists, in a hash slot that the server should have.
    pub(super) async fn usage(&self, unused: &Key) -> Result<Usage, SinkError> {
        let mut pipe = Pipeline::new();
        pipe.ignore_errors();
        // Before Redis 7.0, INFO takes one section.
        pipe.cmd("INFO").arg("memory").cmd("INFO").arg("stats").cmd("GET").arg(unused.as_bytes());
        let ((memory, stats, _), _) = self.bounded::<(Value, Value, Value)>("INFO", &pipe).await?;
        let text = |reply: Value| match reply {
            error @ Value::ServerError(_) => Err(self.without_secret(failure(Request::new("INFO"), "INFO", error))),
            other => redis::from_redis_value_ref::<String>(&other).map_err(|_| unexpected_value("INFO", &other)),
        };
        Ok(server::usage_in(&(text(memory)? + &text(stats)?)))
    }

    /// Returns one page of the keys that begin with `prefix`. Begin with cursor 0, and continue with the returned one
    /// until it is 0. A key may be returned twice.
    pub async fn scan_page(&self, prefix: &[u8], cursor: u64) -> Result<(u64, Vec<Key>), SinkError> {
        self.scan(prefix, cursor, &self.0.own.unused()).await
    }

    /// `unused` is a key that never exists, in a hash slot that the server should have.
    pub(super) async fn scan(&self, prefix: &[u8], cursor: u64, unused: &Key) -> Result<(u64, Vec<Key>), SinkError> {
        let mut pipe = Pipeline::new();
        pipe.ignore_errors();
        pipe.cmd("SCAN").arg(cursor).arg("MATCH").arg(resp::glob_of_prefix(prefix)).arg("COUNT").arg(SCAN_COUNT);
        // SCAN does not tell that a hash slot is moving to another node of a cluster, or has moved. GET does, if the key
        // does not exist.
        pipe.cmd("GET").arg(unused.as_bytes());
        let ((page, moved), _) = self.bounded::<(Value, Value)>("SCAN", &pipe).await?;
        let asked = match (page, moved) {
            (page @ Value::ServerError(_), _) => Err(failure(Request::new("SCAN"), "SCAN", page)),
            (page, Value::Nil) => redis::from_redis_value_ref(&page).map_err(|_| unexpected_value("SCAN", &page)),
            (_, other) => Err(failure(Request::of("GET", unused), "GET", other)),
        };
        let (next, keys): (u64, Vec<Vec<u8>>) = asked.map_err(|error| self.without_secret(error))?;
        Ok((next, keys.into_iter().filter(|key| key.starts_with(prefix)).map(|key| Key(key.into())).collect()))
    }

    /// Retries once, on a new connection, if the open one turns out to be dead (a load balancer may have dropped it) or to
    /// lead to a node of a cluster that no longer serves the keys.
    async fn bounded<T: FromRedisValue>(
        &self,
        command: &'static str,
        question: &Pipeline,
    ) -> Result<(T, RunId), SinkError> {
        let began = Instant::now();
        let answered = match self.once(command, question, began).await {
            Err(Failed { why, of: LineAge::Old }) if is_about_the_line(&why) && began.elapsed() < READ_TIMEOUT => {
                self.once(command, question, began).await
            }
            answered => answered,
        };
        let (reply, server) = answered.map_err(|failed| failed.why)?;
        match redis::from_redis_value_ref(&reply) {
            Ok(answer) => Ok((answer, server)),
            Err(_) => Err(unexpected_value(command, &reply)),
        }
    }

    async fn once(&self, command: &'static str, question: &Pipeline, began: Instant) -> Result<(Value, RunId), Failed> {
        let shared = &self.0;
        let silent = || self.silent();
        let left = || READ_TIMEOUT.saturating_sub(began.elapsed());
        if let Some(allowance) = &shared.allowance {
            allowance.renew();
        }
        let opened = timeout(left(), shared.line()).await.unwrap_or_else(|_| Err(silent()));
        let Opened { number, mut link, server, age, idle } = opened.map_err(|why| Failed { why, of: LineAge::New })?;
        // A connection that has been idle for a while may be dead without notice.
        let patience = if idle >= IDLE { left() / 2 } else { left() };
        let answered = timeout(patience, question.query_async(&mut link)).await;
        let why = match answered {
            Ok(Ok(answer)) => match elsewhere(&shared.target, &answer) {
                Some(reply) => SinkError::Refused { request: Request::new(command), reply },
                None => {
                    shared.answered(number).await;
                    return Ok((answer, server));
                }
            },
            Ok(Err(error)) => match shared.allowance.as_ref().filter(|allowance| allowance.is_spent()) {
                Some(allowance) => SinkError::Excess { most: allowance.most() },
                None => failed(&shared.target, command, &[], &error),
            },
            Err(_) => silent(),
        };
        match &why {
            // Not at once, if a new connection leads there as well.
            SinkError::Refused { reply, .. } if reply.class() == Class::Elsewhere => match age {
                LineAge::Old => shared.hang_up(number, None).await,
                LineAge::New => shared.give_up(number, &why).await,
            },
            SinkError::Refused { .. } => {}
            // If other calls get answers, only this one fails, and the connection stays.
            SinkError::TimedOut { .. } => shared.hang_up(number, Some(began)).await,
            _ => shared.hang_up(number, None).await,
        }
        Err(Failed { why, of: age })
    }
}

/// A call that failed, and the connection that it used.
struct Failed {
    why: SinkError,
    of: LineAge,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum LineAge {
    /// Opened for this call.
    New,
    /// Used by earlier calls.
    Old,
}

/// The connection for one call.
struct Opened {
    number: u64,
    link: MultiplexedConnection,
    server: RunId,
    age: LineAge,
    /// The time since it last answered.
    idle: Duration,
}

impl fmt::Debug for Reader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Reader({})", self.0.target)
    }
}

impl Shared {
    /// Returns the open connection, or opens one. Calls that arrive meanwhile wait for it.
    async fn line(&self) -> Result<Opened, SinkError> {
        let mut line = self.line.lock().await;
        match &line.state {
            LineState::Open(connection, server) => {
                return Ok(Opened {
                    number: line.number,
                    link: connection.link.clone(),
                    server: server.clone(),
                    age: LineAge::Old,
                    idle: line.answered.elapsed(),
                });
            }
            LineState::Failed { why, at } if at.elapsed() < RETRY_PAUSE => {
                let error = io::Error::other(why.clone());
                return Err(SinkError::Unreachable { redis: self.target.to_string(), error });
            }
            LineState::Failed { .. } | LineState::Closed => {}
        }
        line.number += 1;
        match self.open().await {
            Ok((connection, server)) => {
                let link = connection.link.clone();
                line.state = LineState::Open(connection, server.clone());
                line.answered = Instant::now();
                Ok(Opened { number: line.number, link, server, age: LineAge::New, idle: Duration::ZERO })
            }
            Err(error) => {
                line.state = LineState::Failed { why: error.to_string(), at: Instant::now() };
                Err(error)
            }
        }
    }

    async fn open(&self) -> Result<(Connection, RunId), SinkError> {
        let stream = connect::open(&self.target).await?;
        let opened = Connection::within(self.allowance.clone(), stream, self.target.login().await?, ROWS_BYTES).await;
        let mut connection = opened.map_err(|error| error.at(&self.target))?;
        // If INFO is denied, continue without it.
        let info: Result<String, RedisError> = redis::cmd("INFO").query_async(&mut connection.link).await;
        let server = run_id(&self.target, info.as_deref().ok())?;
        Ok((connection, server))
    }

    async fn answered(&self, number: u64) {
        let mut line = self.line.lock().await;
        if line.number == number {
            line.answered = Instant::now();
        }
    }

    /// Closes the connection, and opens no other for [`RETRY_PAUSE`].
    async fn give_up(&self, number: u64, why: &SinkError) {
        let mut line = self.line.lock().await;
        if line.number == number {
            line.state = LineState::Failed { why: why.to_string(), at: Instant::now() };
        }
    }

    /// Closes the connection, unless it has answered since then.
    async fn hang_up(&self, number: u64, unless_answered_since: Option<Instant>) {
        let mut line = self.line.lock().await;
        let works = unless_answered_since.is_some_and(|since| line.answered > since);
        if line.number == number && !works {
            line.state = LineState::Closed;
        }
    }
}

/// Finds the run ID in what INFO says, if it says anything.
///
/// # Errors
/// If the server is a replica where a master is meant.
pub(super) fn run_id(target: &RedisTarget, info: Option<&str>) -> Result<RunId, SinkError> {
    let value = |name: &str| info?.lines().find_map(|line| line.strip_prefix(name));
    // The Sentinels, or the nodes of a cluster, may not know yet that the server is no longer the master.
    if value("role:").is_some_and(|role| role.trim() == "slave") {
        let redis = target.to_string();
        match &target.address {
            Address::Sentinel(_) => return Err(SinkError::Replica { redis, master: None }),
            Address::Cluster(cluster) => return Err(SinkError::Demoted { redis, lane: cluster.home }),
            Address::Tcp(_) | Address::Unix(_) => {}
        }
    }
    Ok(value("run_id:").map(|id| id.trim().into()))
}

/// Whether another connection may help.
fn is_about_the_line(why: &SinkError) -> bool {
    match why {
        SinkError::Lost { .. } | SinkError::TimedOut { .. } => true,
        SinkError::Refused { reply, .. } => reply.class() == Class::Elsewhere,
        _ => false,
    }
}

/// Returns the reply that says that the node does not serve a key, if there is one.
fn elsewhere(target: &RedisTarget, answer: &Value) -> Option<ErrorReply> {
    let Value::Array(items) = answer else { return None };
    items.iter().find_map(|item| match item {
        Value::ServerError(error) => {
            Some(error_reply(target, &[], error)).filter(|reply| reply.class() == Class::Elsewhere)
        }
        _ => None,
    })
}

pub(super) fn restless() -> SinkError {
    let got = format!("a checkpoint that changed during the read, {ATTEMPTS} times");
    SinkError::Unexpected { command: "GET", got }
}

/// Asks for each row, and for the TTL of one that is read alone.
fn ask_rows(pipe: &mut Pipeline, format: Format, keys: &[Key]) {
    for key in keys {
        pipe.cmd(format.read_command()).arg(key.as_bytes());
    }
    if let [key] = keys {
        pipe.cmd("PTTL").arg(key.as_bytes());
    }
}

/// Parses the answers to [`ask_rows`].
fn rows_and_ttl(
    format: Format,
    keys: &[Key],
    mut next: impl FnMut() -> Value,
) -> Result<(Rows, Vec<Option<u64>>), SinkError> {
    let mut rows = Vec::with_capacity(keys.len());
    for key in keys {
        rows.push(match format {
            // Redis has no empty hashes.
            Format::Hash => Some(fields(key, next())?).filter(|fields| !fields.is_empty()).map(StoredRow::Fields),
            Format::Json | Format::RedisJson => {
                let command = format.read_command();
                optional(Request::of(command, key), command, next())?.map(StoredRow::Document)
            }
        });
    }
    let mut ttl_ms = vec![None; keys.len()];
    if let [key] = keys {
        ttl_ms[0] = match next() {
            // Negative: no key, or no TTL.
            Value::Int(ms) => u64::try_from(ms).ok(),
            other => return Err(failure(Request::of("PTTL", key), "PTTL", other)),
        };
    }
    Ok((rows, ttl_ms))
}

/// Parses the answers to GET of each key.
fn strings(keys: &[Key], mut next: impl FnMut() -> Value) -> Result<Vec<Option<Bytes>>, SinkError> {
    keys.iter().map(|key| optional(Request::of("GET", key), "GET", next())).collect()
}

/// Parses HGETALL's answer; empty if the hash does not exist.
fn fields(key: &Key, reply: Value) -> Result<Fields, SinkError> {
    let items = match reply {
        Value::Array(items) => items,
        other => return Err(failure(Request::of("HGETALL", key), "HGETALL", other)),
    };
    let mut fields = Vec::with_capacity(items.len() / 2);
    let mut items = items.into_iter();
    while let Some(name) = items.next() {
        match (name, items.next()) {
            (Value::BulkString(name), Some(Value::BulkString(value))) => fields.push((name.into(), value.into())),
            (other, _) => return Err(unexpected_value("HGETALL", &other)),
        }
    }
    Ok(fields)
}

/// Parses TIME's answer, which is in seconds and microseconds.
fn millis(reply: Value) -> Result<u64, SinkError> {
    match redis::from_redis_value_ref::<(u64, u64)>(&reply) {
        Ok((seconds, micros)) => Ok(seconds.saturating_mul(1000).saturating_add(micros / 1000)),
        Err(_) => Err(failure(Request::new("TIME"), "TIME", reply)),
    }
}

fn optional(request: Request, command: &'static str, reply: Value) -> Result<Option<Bytes>, SinkError> {
    match reply {
        Value::BulkString(bytes) => Ok(Some(bytes.into())),
        Value::Nil => Ok(None),
        other => Err(failure(request, command, other)),
    }
}

pub(super) fn failure(request: Request, command: &'static str, reply: Value) -> SinkError {
    match reply {
        Value::ServerError(error) => {
            let line = format!("{} {}", error.code(), error.details().unwrap_or_default());
            SinkError::Refused { request, reply: ErrorReply::received(line.as_bytes()) }
        }
        other => unexpected_value(command, &other),
    }
}

pub(super) fn unexpected_value(command: &'static str, got: &Value) -> SinkError {
    match got {
        Value::Nil => unexpected(command, "nothing"),
        Value::Array(items) => unexpected(command, format!("an array of {}", items.len())),
        Value::BulkString(bytes) => unexpected(command, format!("a value of {} bytes", bytes.len())),
        _ => unexpected(command, "a reply of another kind"),
    }
}

pub(super) fn unexpected(command: &'static str, got: impl Into<String>) -> SinkError {
    SinkError::Unexpected { command, got: got.into() }
}
