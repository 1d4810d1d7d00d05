//! The only writer. It owns a socket, sends every batch as one MULTI/EXEC with the checkpoint, and holds the guard that
//! tells when Redis is no longer in the state that was written.
//!
//! It must not know what a checkpoint contains. Both parts of the checkpoint are always WATCHed, so EXEC fails once
//! anything has touched them, and the GET after EXEC must return what was SET. A reply left unread here, or a batch
//! sent on a connection whose guard is used up, could overwrite the rows of a newer writer, or write into a Redis that
//! has lost everything else.
//!
//! ```text
//! MULTI  commands…  SET checkpoint  EXEC  │  WATCH checkpoint tables  GET checkpoint  TIME
//! ```
//!
//! All of this is one write. At most one EXEC is unanswered, because the WATCH after a refused EXEC would guard the
//! next one.
//!
//! <https://redis.io/docs/latest/develop/using-commands/transactions/>

use super::answers::{
    accepted, differences, document_of, exactly, foreign, inspect_request, lengths_of, pairs_of, probe_of, refusal,
    scan_request, scanned, stored, time_of, unexpected, value_of,
};
use super::bounds::{REPLY_BYTES, ROWS_BYTES};
use super::connect::{self, Address, CONNECT_TIMEOUT, RedisTarget};
use super::inspecting::{self, Inspects};
use super::link::{Link, Moved, TIME};
use super::replies::{Outcome, Place, Reply, Transaction};
use super::server::{self, Lost, ServerInfo};
use super::{ErrorReply, Found, Request, SinkError, Stored, Touched, Withdrawal};
use crate::command::Key;
use crate::format::Format;
use crate::lookups::questions::{Answers, Questions};
use crate::lsn::EndLsn;
use crate::resp;
use crate::resp::batch::{Batch, EncodeError, Limits, OwnKeys};
use crate::session::inspect::{Comparison, Differences, Inspection, Probe};
use bytes::{Buf, Bytes, BytesMut};
use std::fmt;
use tokio::time::timeout;

/// Keys in one request of [`Writer::probe`].
const PROBE_PAGE: usize = 1000;

/// More than the replies to one command, `QUEUED` and its element of EXEC's array, unless that is an error.
const COMMAND_REPLY_BYTES: usize = 512;

const MULTI: &[u8] = b"*1\r\n$5\r\nMULTI\r\n";
const EXEC: &[u8] = b"*1\r\n$4\r\nEXEC\r\n";

/// The connection that writes.
///
/// A call that fails, or is dropped before it completes, leaves the writer unarmed: every later call returns
/// [`SinkError::NotArmed`], and a new connection is needed.
pub struct Writer {
    link: Link,
    own: OwnKeys,
    guard: Guard,
    server: ServerInfo,
}

#[derive(Debug)]
enum Guard {
    /// All replies have been read, and the checkpoint has been watched since before it was read with this value.
    Armed(Option<Bytes>),
    Spent,
}

/// What Redis had when the checkpoint began to be watched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Armed {
    pub checkpoint: Option<Stored>,
    pub redis_time_ms: u64,
    /// The rows recorded as dead letters: their keys and records.
    pub dead_keys: Vec<(Key, Bytes)>,
}

/// A batch whose every command Redis has acknowledged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Executed {
    pub redis_time_ms: u64,
    /// The position that every hash slot has reached, if they are written one by one.
    pub safe: Option<EndLsn>,
}

impl Writer {
    /// Connects and starts to watch the checkpoint, within [`CONNECT_TIMEOUT`].
    pub async fn connect(target: &RedisTarget, own: &OwnKeys) -> Result<(Writer, Armed), SinkError> {
        let target = &target.with_password().await?;
        match timeout(CONNECT_TIMEOUT, Self::connect_unbounded(target, own)).await {
            Ok(done) => done.map_err(|error| error.of_a_cluster(target)),
            Err(_) => Err(SinkError::TimedOut { redis: target.to_string(), after: CONNECT_TIMEOUT }),
        }
    }

    async fn connect_unbounded(target: &RedisTarget, own: &OwnKeys) -> Result<(Writer, Armed), SinkError> {
        let mut link = Link::over(connect::open(target).await?, target, Moved::default()).await?;
        let serves = match &target.address {
            Address::Cluster(cluster) => Some(cluster.home),
            Address::Tcp(_) | Address::Unix(_) | Address::Sentinel(_) => None,
        };
        let server = server::inspect(&mut link, &own.unused(), serves).await?;
        let mut writer = Writer { link, own: own.clone(), guard: Guard::Spent, server };
        let mut armed = writer.arm().await?;
        is_change_stream(&mut writer.link, own).await?;
        // Changing them also writes the checkpoint, which is watched by now.
        armed.dead_keys = read_dead_keys(&mut writer.link, own).await?;
        writer.guard = Guard::Armed(armed.checkpoint.as_ref().map(|stored| stored.head.clone()));
        Ok((writer, armed))
    }

    pub fn moved(&self) -> Moved {
        self.link.moved().clone()
    }

    async fn arm(&mut self) -> Result<Armed, SinkError> {
        let (checkpoint, tables) = (self.own.checkpoint().clone(), self.own.tables().clone());
        let dead = self.own.dead().clone();
        let mut out = BytesMut::new();
        // For a user without these commands, a batch would be executed command by command, without the guard.
        out.extend_from_slice(MULTI);
        out.extend_from_slice(EXEC);
        // An XADD inside EXEC must not meet a key of another type.
        resp::command(&mut out, &[b"TYPE", dead.as_bytes()]);
        self.watch(&mut out);
        resp::command(&mut out, &[b"TYPE", checkpoint.as_bytes()]);
        resp::command(&mut out, &[b"GET", checkpoint.as_bytes()]);
        resp::command(&mut out, &[b"TYPE", tables.as_bytes()]);
        resp::command(&mut out, &[b"HGETALL", tables.as_bytes()]);
        out.extend_from_slice(TIME);
        let replies: [Reply; 9] = self.link.ask_exactly(&out, "WATCH").await?;
        self.offers(["multi", "exec", "type", "watch", "type", "get", "type", "hgetall", "time"], &replies)?;
        let [multi, exec, dead_type, watch, checkpoint_type, head, tables_type, entries, time] = replies;
        accepted("MULTI", multi)?;
        match exec {
            Reply::Array(items) if items.is_empty() => {}
            other => return Err(refusal(Request::new("EXEC"), "EXEC", other)),
        }
        foreign(&dead, dead_type, "stream")?;
        accepted("WATCH", watch)?;
        let checkpoint = stored(&self.own, checkpoint_type, head, tables_type, entries)?;
        Ok(Armed { checkpoint, redis_time_ms: time_of(time)?, dead_keys: Vec::new() })
    }

    /// Watches both parts of the checkpoint.
    fn watch(&self, out: &mut BytesMut) {
        resp::command(out, &[b"WATCH", self.own.checkpoint().as_bytes(), self.own.tables().as_bytes()]);
    }

    /// # Errors
    /// [`SinkError::Unavailable`] if the server refuses some of these commands with a plain `ERR`, but not all: a proxy
    /// that has lost its server may refuse every command that way.
    fn offers<const N: usize>(&self, commands: [&'static str; N], replies: &[Reply; N]) -> Result<(), SinkError> {
        let plain = |reply: &Reply| match reply {
            Reply::Error(reply) if reply.is_plain() => Some(reply.clone()),
            _ => None,
        };
        let refused_at = |name: &str| {
            commands.iter().zip(replies).any(|(command, reply)| *command == name && matches!(reply, Reply::Error(_)))
        };
        let mut refused: Vec<(&'static str, ErrorReply)> =
            commands.into_iter().zip(replies).filter_map(|(command, reply)| Some((command, plain(reply)?))).collect();
        if refused.len() == N {
            return Ok(());
        }
        if refused_at("multi") {
            // EXEC without MULTI is an error anyway.
            refused.retain(|(command, _)| *command != "exec");
        } else if refused_at("exec") {
            // The following commands were sent inside MULTI.
            refused.retain(|(command, _)| *command == "exec");
        }
        match refused.first() {
            Some((_, reply)) => {
                let mut commands: Vec<_> = refused.iter().map(|(command, _)| *command).collect();
                commands.dedup();
                Err(SinkError::Unavailable { redis: self.link.target().to_string(), commands, reply: reply.clone() })
            }
            None => Ok(()),
        }
    }

    pub fn target(&self) -> &RedisTarget {
        self.link.target()
    }

    /// Returns what the server reported when the connection was opened.
    pub fn server(&self) -> &ServerInfo {
        &self.server
    }

    /// Returns the commands that the user's ACL denies and that prefetchd does without.
    pub fn lost(&self) -> &[Lost] {
        &self.server.lost
    }

    pub fn limits(&self) -> Limits {
        self.server.limits
    }

    /// Writes a row as RESTORE, reads it, and removes it. If that is not the row, rows are no longer written so. Returns
    /// whether they may be.
    pub async fn trusts_packing(&mut self) -> Result<bool, SinkError> {
        let Some(packing) = self.server.limits.packing else { return Ok(true) };
        let before = self.spend()?;
        let is_right = server::reads_back(&mut self.link, &self.own.sample(), &packing).await?;
        self.server.limits.packing = Some(packing).filter(|_| is_right);
        self.guard = Guard::Armed(before);
        Ok(is_right)
    }

    /// Executes `batch` and sets the checkpoint, atomically. An empty batch is a heartbeat.
    ///
    /// Has no timeout of its own, because Redis may take long over a large batch. Dropping the future is safe but
    /// leaves open whether the batch was applied; the checkpoint that the next connection reads tells.
    pub async fn execute(&mut self, batch: &Batch, checkpoint: &[u8]) -> Result<Executed, SinkError> {
        let before = self.spend()?;
        let limit = self.server.limits.batch_bytes;
        let bytes = batch.weight() + checkpoint.len();
        if bytes > limit {
            self.guard = Guard::Armed(before);
            return Err(EncodeError::Batch { bytes, limit }.into());
        }
        let key = self.own.checkpoint().clone();
        let mut tail = BytesMut::with_capacity(checkpoint.len() + 256);
        resp::command(&mut tail, &[b"SET", key.as_bytes(), checkpoint]);
        tail.extend_from_slice(EXEC);
        self.watch(&mut tail);
        resp::command(&mut tail, &[b"GET", key.as_bytes()]);
        tail.extend_from_slice(TIME);

        let mut transaction = Transaction::new(batch.commands() + 1, 3);
        let request = Buf::chain(MULTI, batch.body()).chain(&tail[..]);
        let most = REPLY_BYTES + batch.commands() * COMMAND_REPLY_BYTES;
        let answered = self.link.exchange([request], most, |token| transaction.take(token)).await;
        if let Err(error) = answered {
            return Err(match (error, transaction.not_queued()) {
                // Redis gave the reason before it closed the connection, and it never executes an incomplete
                // transaction.
                (SinkError::Lost { .. }, Some((n, reply))) => {
                    let at = Place::Command(n);
                    SinkError::Refused { request: self.request(batch, at), reply: self.shown(batch, &tail, at, reply) }
                }
                (error, _) => error,
            });
        }
        let (outcome, trailing) = transaction.finish().ok_or(resp::Malformed::OutOfPlace)?;
        let [watch, value, time] = exactly("EXEC", trailing)?;

        match outcome {
            Outcome::Applied => {}
            Outcome::Refused { at, reply } => {
                let reply = self.shown(batch, &tail, at, reply);
                return Err(SinkError::Refused { request: self.request(batch, at), reply });
            }
            Outcome::Discarded => {
                return Err(SinkError::Discarded(match value_of(Request::of("GET", &key), value)? {
                    now if now == before => Touched::Something,
                    None => Touched::Checkpoint(Found::Nothing),
                    Some(_) => Touched::Checkpoint(Found::SomethingElse),
                }));
            }
            Outcome::Torn { at, reply } => {
                let ours = matches!(&value, Reply::Bulk(bytes) if bytes == checkpoint);
                let withdrawal = if ours && watch == Reply::Status(Bytes::from_static(b"OK")) {
                    self.withdraw().await
                } else {
                    Withdrawal::NotWithdrawn
                };
                let at = Place::Command(at);
                let reply = self.shown(batch, &tail, at, reply);
                return Err(SinkError::Torn { request: self.request(batch, at), reply, checkpoint: withdrawal });
            }
        }
        accepted("WATCH", watch)?;
        match value_of(Request::of("GET", &key), value)? {
            Some(found) if found == checkpoint => {
                let redis_time_ms = time_of(time)?;
                self.guard = Guard::Armed(Some(found));
                Ok(Executed { redis_time_ms, safe: None })
            }
            Some(_) => Err(SinkError::CheckpointDiffers { found: Found::SomethingElse }),
            None => Err(SinkError::CheckpointDiffers { found: Found::Nothing }),
        }
    }

    /// Returns what these keys hold. Those whose type is asked are watched as well: until the next [`Self::execute`], a
    /// change to any of them makes it fail.
    pub async fn probe(&mut self, asked: &Inspection) -> Result<Vec<Probe>, SinkError> {
        let before = self.spend()?;
        let mut probes = Vec::with_capacity(asked.types.len() + asked.documents.len());
        let mut out = BytesMut::new();
        for page in asked.types.chunks(PROBE_PAGE) {
            out.clear();
            resp::header(&mut out, 1 + page.len());
            resp::bulk(&mut out, b"WATCH");
            page.iter().for_each(|key| resp::bulk(&mut out, key.as_bytes()));
            for key in page {
                resp::command(&mut out, &[b"TYPE", key.as_bytes()]);
            }
            let mut replies = self.link.ask(&out, 1 + page.len()).await?.into_iter();
            accepted("WATCH", replies.next().unwrap_or(Reply::Nil))?;
            for (reply, key) in replies.zip(page) {
                probes.push(probe_of(key, reply)?);
            }
        }
        let mut lengths = Vec::with_capacity(asked.documents.len());
        for page in asked.documents.chunks(PROBE_PAGE) {
            out.clear();
            page.iter().for_each(|key| resp::command(&mut out, &[b"STRLEN", key.as_bytes()]));
            lengths.extend(self.link.ask(&out, page.len()).await?);
        }
        let (mut documents, wanted, bytes) = lengths_of(asked, lengths)?;
        for page in wanted.chunks(PROBE_PAGE) {
            out.clear();
            page.iter().for_each(|at| resp::command(&mut out, &[b"GET", asked.documents[*at].as_bytes()]));
            let replies = self.link.ask_within(bytes, &out, page.len()).await?;
            for (at, reply) in page.iter().zip(replies) {
                documents[*at] = document_of(&asked.documents[*at], reply)?;
            }
        }
        probes.append(&mut documents);
        self.guard = Guard::Armed(before);
        Ok(probes)
    }

    /// See [`inspecting::inspect`]. Nothing of it is watched.
    pub async fn inspect(&mut self, questions: &Questions) -> Result<Answers, SinkError> {
        let before = self.spend()?;
        let answers = inspecting::inspect(self, questions).await?;
        self.guard = Guard::Armed(before);
        Ok(answers)
    }

    /// Compares rows with those in Redis: hashes field by field, documents byte by byte.
    pub async fn compare(&mut self, wanted: &Comparison) -> Result<Differences, SinkError> {
        let before = self.spend()?;
        let (mut out, asked) = (BytesMut::new(), wanted.asked());
        for (key, _) in &asked {
            resp::command(&mut out, &[wanted.format.read_command().as_bytes(), key.as_bytes()]);
        }
        for key in &wanted.keys {
            resp::command(&mut out, &[b"TYPE", key.as_bytes()]);
        }
        let number = asked.len() + wanted.keys.len();
        let is_hash = wanted.format == Format::Hash;
        let expected = |at: usize| {
            let (key, row) = asked.get(at).filter(|_| is_hash)?;
            resp::hash_of(row, key)
        };
        let replies = match number {
            0 => Vec::new(),
            _ => self.link.ask_differing(ROWS_BYTES, [&out[..]], number, expected, |_| &out).await?,
        };
        let differences = differences(wanted, &asked, replies);
        // All replies have arrived, and an error among them does not affect what is watched.
        if matches!(differences, Ok(_) | Err(SinkError::Refused { .. })) {
            self.guard = Guard::Armed(before);
        }
        differences
    }

    /// Returns one page of the keys that begin with `prefix`. Begin with cursor 0, and continue with the returned one
    /// until it is 0. A key may be returned twice, and one that is created or deleted meanwhile may be returned.
    /// Batches may be executed in between.
    pub async fn scan_page(&mut self, prefix: &[u8], cursor: u64) -> Result<(u64, Vec<Key>), SinkError> {
        let before = self.spend()?;
        let mut out = BytesMut::new();
        scan_request(&mut out, prefix, cursor);
        // SCAN does not tell that a hash slot is moving to another node of a cluster. GET does, if the key does not exist.
        let unused = self.own.unused();
        resp::command(&mut out, &[b"GET", unused.as_bytes()]);
        let [reply, moved]: [Reply; 2] = self.link.ask_exactly(&out, "SCAN").await?;
        let page = scanned(prefix, reply)?;
        value_of(Request::of("GET", &unused), moved)?;
        self.guard = Guard::Armed(before);
        Ok(page)
    }

    /// Removes `keys` and returns how many existed. Removes nothing if anything has touched the checkpoint since it was
    /// watched. For use while no daemon runs: it writes no checkpoint, and the checkpoint may be among the keys.
    pub async fn remove(&mut self, keys: &[Key]) -> Result<u64, SinkError> {
        let before = self.spend()?;
        let checkpoint = self.own.checkpoint().clone();
        let mut out = BytesMut::from(MULTI);
        resp::header(&mut out, 1 + keys.len());
        resp::bulk(&mut out, b"DEL");
        keys.iter().for_each(|key| resp::bulk(&mut out, key.as_bytes()));
        out.extend_from_slice(EXEC);
        self.watch(&mut out);
        resp::command(&mut out, &[b"GET", checkpoint.as_bytes()]);
        let replies: [Reply; 5] = self.link.ask_exactly(&out, "EXEC").await?;
        let [_, queued, exec, watch, value] = replies;
        if let Reply::Error(reply) = queued {
            return Err(SinkError::Refused { request: Request::new("DEL"), reply });
        }
        let removed = match exec {
            Reply::Array(items) => match items.as_slice() {
                [Reply::Integer(removed)] => u64::try_from(*removed).unwrap_or_default(),
                _ => return Err(unexpected("EXEC", &Reply::Array(items))),
            },
            Reply::Nil => return Err(SinkError::Discarded(Touched::Something)),
            other => return Err(refusal(Request::new("EXEC"), "EXEC", other)),
        };
        accepted("WATCH", watch)?;
        let left = before.filter(|_| !keys.contains(&checkpoint));
        match value_of(Request::of("GET", &checkpoint), value)? {
            found if found == left => {
                self.guard = Guard::Armed(left);
                Ok(removed)
            }
            None => Err(SinkError::CheckpointDiffers { found: Found::Nothing }),
            Some(_) => Err(SinkError::CheckpointDiffers { found: Found::SomethingElse }),
        }
    }

    /// From here until all replies have been read, nothing else may be sent.
    fn spend(&mut self) -> Result<Option<Bytes>, SinkError> {
        match std::mem::replace(&mut self.guard, Guard::Spent) {
            Guard::Armed(checkpoint) => Ok(checkpoint),
            Guard::Spent => Err(SinkError::NotArmed),
        }
    }

    /// Removes a checkpoint that claims more than was applied, unless something else has written it since.
    async fn withdraw(&mut self) -> Withdrawal {
        let mut out = BytesMut::new();
        out.extend_from_slice(MULTI);
        resp::command(&mut out, &[b"DEL", self.own.checkpoint().as_bytes()]);
        out.extend_from_slice(EXEC);
        match timeout(CONNECT_TIMEOUT, self.link.ask_exactly(&out, "EXEC")).await {
            Ok(Ok([_, _, Reply::Array(items)])) if items == [Reply::Integer(1)] => Withdrawal::Withdrawn,
            _ => Withdrawal::NotWithdrawn,
        }
    }

    fn request(&self, batch: &Batch, at: Place) -> Request {
        match at {
            Place::Multi => Request::new("MULTI"),
            Place::Exec => Request::new("EXEC"),
            Place::Command(n) if n == batch.commands() => Request::of("SET", self.own.checkpoint()),
            Place::Command(n) => match resp::command_at(batch.body(), n) {
                Some((name, key)) => {
                    Request { command: String::from_utf8_lossy(&name).into_owned(), key: key.map(Key) }
                }
                None => Request::new("a command"),
            },
        }
    }

    /// Returns as much of an error about a batch as may be shown.
    fn shown(&self, batch: &Batch, tail: &[u8], at: Place, reply: ErrorReply) -> ErrorReply {
        let request = match at {
            Place::Multi => &[],
            Place::Command(n) if n >= batch.commands() => tail,
            Place::Command(n) => resp::request_at(batch.body(), n),
            Place::Exec => batch.body(),
        };
        reply.without(request, self.link.target().password.to_hide().as_deref())
    }
}

impl Inspects for Writer {
    async fn ask_questions(&mut self, questions: &Questions) -> Result<Vec<Reply>, SinkError> {
        let mut out = BytesMut::new();
        (0..questions.count()).for_each(|at| inspect_request(&mut out, questions, at));
        self.link.ask_within(ROWS_BYTES, &out, questions.count()).await
    }

    async fn ask_lengths(&mut self, keys: &[&Key]) -> Result<Vec<Reply>, SinkError> {
        let mut out = BytesMut::new();
        keys.iter().for_each(|key| resp::command(&mut out, &[b"STRLEN", key.as_bytes()]));
        self.link.ask(&out, keys.len()).await
    }
}

impl fmt::Debug for Writer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Writer").field("target", self.link.target()).finish_non_exhaustive()
    }
}

/// What is announced in is a stream, or will be one.
///
/// # Errors
/// If it is a key of another type: an XADD inside EXEC must not meet one.
pub(super) async fn is_change_stream(link: &mut Link, own: &OwnKeys) -> Result<(), SinkError> {
    let Some(stream) = own.changes() else { return Ok(()) };
    let mut out = BytesMut::new();
    resp::command(&mut out, &[b"TYPE", stream.key.as_bytes()]);
    let [reply] = link.ask_exactly(&out, "TYPE").await?;
    foreign(&stream.key, reply, "stream")
}

/// Reads the records of dead letters.
pub(super) async fn read_dead_keys(link: &mut Link, own: &OwnKeys) -> Result<Vec<(Key, Bytes)>, SinkError> {
    let hashes: Vec<Key> = own.dead_keys().collect();
    let mut out = BytesMut::new();
    for key in &hashes {
        resp::command(&mut out, &[b"HGETALL", key.as_bytes()]);
    }
    // If this alone is refused, the command is not offered; if TIME is refused as well, the server may be
    // unavailable.
    out.extend_from_slice(TIME);
    let replies = link.ask_within(ROWS_BYTES, &out, hashes.len() + 1).await?;
    if let (Some(Reply::Error(reply)), Some(Reply::Array(_))) = (replies.first(), replies.last())
        && reply.is_plain()
    {
        let (redis, commands) = (link.target().to_string(), vec!["hgetall"]);
        return Err(SinkError::Unavailable { redis, commands, reply: reply.clone() });
    }
    let mut dead_keys = Vec::new();
    for (key, reply) in hashes.iter().zip(replies) {
        dead_keys.extend(pairs_of(key, reply)?.into_iter().map(|(row_key, json)| (Key(row_key), json)));
    }
    Ok(dead_keys)
}
