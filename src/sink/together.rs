//! Reads of one row: those that wait at the same moment go to Redis as one request, between two reads of the same
//! checkpoint. A busy daemon then asks for the checkpoint once for many rows, and a quiet one waits for nobody.
//!
//! It knows only the ordinary case: small rows, and replies that are no errors. In any other, the [reader](super::reader) reads
//! the row alone, over a connection of its own, and reports the error. If this gave a row to the wrong waiting read, an
//! application would take one row for another.

use super::SinkError;
use super::connect::{self, RedisTarget};
use super::link::{Link, Moved, TIME};
use super::reader::{Fields, IDLE, Moments, READ_TIMEOUT, RETRY_PAUSE, Read, RunId, StoredRow, run_id};
use super::replies::Reply;
use crate::command::Key;
use crate::format::Format;
use crate::resp::batch::OwnKeys;
use crate::resp::{self, Malformed, Token};
use bytes::{Bytes, BytesMut};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

/// Limit for a request. Redis reads 16 kB at a time (`PROTO_IOBUF_LEN` in its server.h), and executes what it has read before
/// anything else: a larger request would let other writers in between.
const REQUEST_BYTES: usize = 12 << 10;
/// Limit for the replies to one request, whose memory is held as long as one of its rows is. Larger rows are read alone.
const REPLIES_BYTES: usize = 4 << 20;
/// For how long the rows of a table are read alone after one was too large, or took too long: others must not wait for it.
const ALONE: Duration = Duration::from_secs(10);
/// How many reads wait in the queue. Others wait for a place in it.
const QUEUE: usize = 256;
const INFO: &[u8] = b"*1\r\n$4\r\nINFO\r\n";

/// The queue of reads. Dropping it ends the task that answers them.
pub(super) struct Together {
    asks: mpsc::Sender<Ask>,
    alone: Arc<Alone>,
}

/// The tables whose rows are read alone, and since when.
#[derive(Default)]
struct Alone(Mutex<HashMap<Box<str>, Instant>>);

impl Alone {
    fn has(&self, table: &str) -> bool {
        self.lock().get(table).is_some_and(|since| since.elapsed() < ALONE)
    }

    /// At most one entry for each table.
    fn add<'a>(&self, tables: impl Iterator<Item = &'a str>) {
        let mut alone = self.lock();
        tables.for_each(|table| _ = alone.insert(table.into(), Instant::now()));
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Box<str>, Instant>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Ask {
    table: Box<str>,
    format: Format,
    key: Key,
    answer: oneshot::Sender<Result<Read, Unanswered>>,
}

/// Why a read was not answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unanswered {
    /// Redis has not answered in time.
    Silent,
    /// The row must be read alone.
    ReadAlone,
}

impl Together {
    /// Spawns the task.
    pub fn start(target: RedisTarget, own: OwnKeys) -> Self {
        let (asks, queue) = mpsc::channel(QUEUE);
        let alone = Arc::new(Alone::default());
        tokio::spawn(Exchanges { target, own, alone: Arc::clone(&alone), line: None, failed: None }.run(queue));
        Self { asks, alone }
    }

    /// Returns a row, the head of the checkpoint and the entry of `table`, all as of one moment if [`Read::moments`] says so.
    pub async fn read(&self, table: &str, format: Format, key: &Key) -> Result<Read, Unanswered> {
        if self.alone.has(table) {
            return Err(Unanswered::ReadAlone);
        }
        let (answer, answered) = oneshot::channel();
        let ask = Ask { table: table.into(), format, key: key.clone(), answer };
        let asked = async {
            self.asks.send(ask).await.map_err(|_| Unanswered::ReadAlone)?;
            answered.await.unwrap_or(Err(Unanswered::ReadAlone))
        };
        timeout(READ_TIMEOUT, asked).await.unwrap_or(Err(Unanswered::Silent))
    }
}

/// The task: one exchange with Redis at a time, while further reads gather.
struct Exchanges {
    target: RedisTarget,
    own: OwnKeys,
    alone: Arc<Alone>,
    line: Option<Line>,
    /// When no connection could be opened, or one was of no use.
    failed: Option<Instant>,
}

struct Line {
    link: Link,
    server: RunId,
    answered: Instant,
}

impl Exchanges {
    async fn run(mut self, mut queue: mpsc::Receiver<Ask>) {
        let mut waiting = Vec::with_capacity(QUEUE);
        while !waiting.is_empty() || queue.recv_many(&mut waiting, QUEUE).await > 0 {
            // Whoever does not wait any longer must not keep others waiting.
            waiting.retain(|ask| !ask.answer.is_closed());
            if waiting.is_empty() {
                continue;
            }
            let request = Request::of(&self.own, &waiting);
            let answered = self.exchange(&request).await;
            let asks = &waiting[..request.asks];
            let found = match answered {
                Ok(answer) => answer.take_apart(asks).ok_or(NoAnswer::Other),
                Err(why) => Err(why),
            };
            if matches!(found, Err(NoAnswer::Silent | NoAnswer::TooLarge)) {
                self.alone.add(asks.iter().map(|ask| &*ask.table));
            }
            // Redis may refuse to show the checkpoint for a while: a new connection for each read would not help.
            if found.is_err() {
                (self.line, self.failed) = (None, Some(Instant::now()));
            }
            let asks = waiting.drain(..request.asks);
            match found {
                Ok(found) => asks.zip(found).for_each(|(ask, found)| _ = ask.answer.send(found)),
                Err(NoAnswer::Silent) => asks.for_each(|ask| _ = ask.answer.send(Err(Unanswered::Silent))),
                Err(NoAnswer::TooLarge | NoAnswer::Other) => {
                    asks.for_each(|ask| _ = ask.answer.send(Err(Unanswered::ReadAlone)));
                }
            }
        }
    }

    /// Retries once, on a new connection, if the open one turns out to be dead.
    async fn exchange(&mut self, request: &Request) -> Result<Answer, NoAnswer> {
        let began = Instant::now();
        let left = || READ_TIMEOUT.saturating_sub(began.elapsed());
        loop {
            let (mut line, patience) = match self.line.take() {
                // A connection that has been idle for a while may be dead without notice.
                Some(line) if line.answered.elapsed() >= IDLE => (line, Some(left() / 2)),
                Some(line) => (line, None),
                None if self.failed.is_some_and(|at| at.elapsed() < RETRY_PAUSE) => return Err(NoAnswer::Other),
                None => match timeout(left(), Line::open(&self.target)).await {
                    Ok(Ok(line)) => (line, None),
                    Ok(Err(_)) => return Err(NoAnswer::Other),
                    Err(_) => return Err(NoAnswer::Silent),
                },
            };
            let is_old = line.answered < began;
            let asked = Instant::now();
            let fetch = line.link.fetch(&request.bytes, request.replies, REPLIES_BYTES);
            match timeout(patience.unwrap_or_else(left), fetch).await {
                Ok(Ok(raw)) => {
                    line.answered = Instant::now();
                    let (replies, server) = (Replies { raw, at: 0 }, line.server.clone());
                    self.line = Some(line);
                    return Ok(Answer { replies, server, took: asked.elapsed() });
                }
                Ok(Err(SinkError::Lost { .. })) if is_old => {}
                Err(_) if patience.is_some() => {}
                Ok(Err(SinkError::Malformed(Malformed::TooLong(_)))) => return Err(NoAnswer::TooLarge),
                Ok(Err(_)) => return Err(NoAnswer::Other),
                Err(_) => return Err(NoAnswer::Silent),
            }
        }
    }
}

/// Why an exchange has no answer.
enum NoAnswer {
    Silent,
    /// The replies exceed [`REPLIES_BYTES`].
    TooLarge,
    Other,
}

impl Line {
    async fn open(target: &RedisTarget) -> Result<Self, SinkError> {
        let stream = connect::open(target).await?;
        let mut link = Link::over(stream, target, Moved::default()).await?;
        let [info] = link.ask_exactly::<1>(INFO, "INFO").await?;
        // If INFO is denied, continue without it.
        let info = match &info {
            Reply::Bulk(text) => str::from_utf8(text).ok(),
            _ => None,
        };
        let server = run_id(target, info)?;
        Ok(Self { link, server, answered: Instant::now() })
    }
}

/// One request for the rows of several reads.
struct Request {
    bytes: BytesMut,
    /// How many reads it is for, the first of those that wait.
    asks: usize,
    replies: usize,
}

impl Request {
    fn of(own: &OwnKeys, waiting: &[Ask]) -> Self {
        let mut bytes = BytesMut::with_capacity(REQUEST_BYTES);
        let head = own.checkpoint().as_bytes();
        resp::command(&mut bytes, &[b"GET", head]);
        let mut tables: Vec<&str> = Vec::new();
        let (mut asks, mut replies) = (0, 3);
        for ask in waiting {
            let (table, key) = (&*ask.table, ask.key.as_bytes());
            if asks > 0 && bytes.len() + table.len() + 2 * key.len() > REQUEST_BYTES {
                break;
            }
            if !tables.contains(&table) {
                tables.push(table);
                resp::command(&mut bytes, &[b"HGET", own.tables().as_bytes(), table.as_bytes()]);
                replies += 1;
            }
            resp::command(&mut bytes, &[ask.format.read_command().as_bytes(), key]);
            resp::command(&mut bytes, &[b"PTTL", key]);
            (asks, replies) = (asks + 1, replies + 2);
        }
        bytes.extend_from_slice(TIME);
        resp::command(&mut bytes, &[b"GET", head]);
        Self { bytes, asks, replies }
    }
}

/// The replies to a [`Request`].
struct Answer {
    replies: Replies,
    server: RunId,
    took: Duration,
}

impl Answer {
    /// Returns what each read gets; `None` if the replies are not about a checkpoint.
    fn take_apart(mut self, asks: &[Ask]) -> Option<Vec<Result<Read, Unanswered>>> {
        let replies = &mut self.replies;
        let checkpoint = replies.value()?;
        let mut entries: Vec<(&str, Option<Bytes>)> = Vec::new();
        let mut rows = Vec::with_capacity(asks.len());
        for ask in asks {
            let entry = match entries.iter().find(|(table, _)| *table == &*ask.table) {
                Some((_, entry)) => entry.clone(),
                None => {
                    let entry = replies.value()?;
                    entries.push((&ask.table, entry.clone()));
                    entry
                }
            };
            rows.push((entry, replies.row(ask.format)?, replies.ttl()?));
        }
        let redis_time_ms = replies.time()?;
        let moments = if replies.value()? == checkpoint { Moments::One } else { Moments::Several };
        let read = |(entry, row, ttl_ms): (Option<Bytes>, Result<_, Unanswered>, Result<_, Unanswered>)| {
            Ok(Read {
                checkpoint: checkpoint.clone(),
                entry,
                server: self.server.clone(),
                redis_time_ms,
                rows: vec![row?],
                moments,
                marked: None,
                may_lack_keys: false,
                ttl_ms: vec![ttl_ms?],
                redis: self.took,
            })
        };
        Some(rows.into_iter().map(read).collect())
    }
}

/// Complete replies, taken apart without copying them. Everything returns `None` where something else comes.
struct Replies {
    raw: Bytes,
    at: usize,
}

impl Replies {
    fn next(&mut self) -> Option<Token<'_>> {
        let (token, len) = resp::token(&self.raw[self.at..]).ok()??;
        self.at += len;
        Some(token)
    }

    fn bytes(&mut self) -> Option<Bytes> {
        let (token, len) = resp::token(&self.raw[self.at..]).ok()??;
        let Token::Bulk(bytes) = token else { return None };
        let bytes = self.raw.slice_ref(bytes);
        self.at += len;
        Some(bytes)
    }

    /// A string, if it exists.
    fn value(&mut self) -> Option<Option<Bytes>> {
        match resp::token(&self.raw[self.at..]).ok()?? {
            (Token::Nil, len) => {
                self.at += len;
                Some(None)
            }
            _ => self.bytes().map(Some),
        }
    }

    /// A row, if it exists. An error in its place concerns this row only.
    fn row(&mut self, format: Format) -> Option<Result<Option<StoredRow>, Unanswered>> {
        if self.is_refused() {
            return Some(Err(Unanswered::ReadAlone));
        }
        match format {
            Format::Hash => {
                let Token::Array(items) = self.next()? else { return None };
                let mut fields = Fields::with_capacity(usize::try_from(items / 2).ok()?.min(self.raw.len()));
                for _ in 0..items / 2 {
                    fields.push((self.bytes()?, self.bytes()?));
                }
                // Redis has no empty hashes.
                Some(Ok(Some(fields).filter(|fields| !fields.is_empty()).map(StoredRow::Fields)))
            }
            Format::Json | Format::RedisJson => Some(Ok(self.value()?.map(StoredRow::Document))),
        }
    }

    /// In milliseconds; `None` inside where the key does not exist or never expires.
    fn ttl(&mut self) -> Option<Result<Option<u64>, Unanswered>> {
        if self.is_refused() {
            return Some(Err(Unanswered::ReadAlone));
        }
        match self.next()? {
            Token::Integer(ms) => Some(Ok(u64::try_from(ms).ok())),
            _ => None,
        }
    }

    /// What TIME answers, as milliseconds since the Unix epoch.
    fn time(&mut self) -> Option<u64> {
        let Token::Array(2) = self.next()? else { return None };
        let mut number = || str::from_utf8(&self.bytes()?).ok()?.parse::<u64>().ok();
        Some(number()?.saturating_mul(1000).saturating_add(number()? / 1000))
    }

    /// Whether an error came in place of a reply, which is passed over.
    fn is_refused(&mut self) -> bool {
        let before = self.at;
        let is_error = matches!(self.next(), Some(Token::Error(_)));
        if !is_error {
            self.at = before;
        }
        is_error
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(table: &str, format: Format, key: &str) -> Ask {
        let (answer, _) = oneshot::channel();
        Ask { table: table.into(), format, key: Key(Bytes::from(key.to_owned())), answer }
    }

    fn answer(replies: &str) -> Answer {
        let replies = Replies { raw: Bytes::from(replies.to_owned()), at: 0 };
        Answer { replies, server: None, took: Duration::ZERO }
    }

    fn asks() -> Vec<Ask> {
        let (hash, json) = (Format::Hash, Format::Json);
        [("a", hash, "a:1"), ("b", json, "b:1"), ("a", hash, "a:2"), ("a", hash, "a:3"), ("b", json, "b:2")]
            .map(|(table, format, key)| ask(table, format, key))
            .into()
    }

    const REPLIES: &str = "$4\r\nhead\r\n\
        $2\r\nof\r\n*2\r\n$1\r\nx\r\n$1\r\n1\r\n:100\r\n\
        $-1\r\n$2\r\n{}\r\n:-1\r\n\
        -WRONGTYPE other\r\n:7\r\n\
        *0\r\n:-2\r\n\
        $-1\r\n:-2\r\n\
        *2\r\n$2\r\n12\r\n$4\r\n5000\r\n";

    #[test]
    fn each_read_gets_its_own_row() {
        let request = Request::of(&OwnKeys::under("s"), &asks());
        let commands = request.bytes.iter().filter(|byte| **byte == b'*').count();
        assert_eq!((request.asks, request.replies, commands), (5, 15, 15));
        let found = answer(&format!("{REPLIES}$4\r\nhead\r\n")).take_apart(&asks()).unwrap();
        let row =
            |at: usize| found[at].as_ref().map(|read| (read.entry.as_deref(), read.rows[0].clone(), read.ttl_ms[0]));
        let fields = StoredRow::Fields(vec![("x".into(), "1".into())]);
        assert_eq!(row(0), Ok((Some(&b"of"[..]), Some(fields), Some(100))));
        assert_eq!(row(1), Ok((None, Some(StoredRow::Document("{}".into())), None)));
        assert_eq!(row(2), Err(&Unanswered::ReadAlone));
        assert_eq!(row(3), Ok((Some(&b"of"[..]), None, None)));
        assert_eq!(row(4), Ok((None, None, None)));
        let read = found[0].as_ref().unwrap();
        assert_eq!((read.moments, read.redis_time_ms), (Moments::One, 12_005));
    }

    #[test]
    fn a_checkpoint_that_changes_meanwhile_is_told() {
        let found = answer(&format!("{REPLIES}$4\r\nnext\r\n")).take_apart(&asks()).unwrap();
        assert_eq!(found[0].as_ref().unwrap().moments, Moments::Several);
    }

    #[test]
    fn without_a_checkpoint_nobody_gets_anything() {
        let replies = format!("{REPLIES}$4\r\nhead\r\n");
        for end in 0..replies.len() {
            assert!(answer(&replies[..end]).take_apart(&asks()).is_none(), "{end}");
        }
        assert!(answer(&replies.replacen("$4\r\nhead", "-LOADING x", 1)).take_apart(&asks()).is_none());
        assert!(answer(&replies.replacen("*0", ":0", 1)).take_apart(&asks()).is_none());
    }

    #[test]
    fn a_request_is_small_enough_to_be_executed_at_once() {
        let asks: Vec<Ask> = (0..64).map(|n| ask("a", Format::Hash, &format!("{n:0500}"))).collect();
        let request = Request::of(&OwnKeys::under("s"), &asks);
        assert!(request.asks > 5 && request.asks < 20 && request.bytes.len() < 16 << 10, "{}", request.asks);
        let large = [ask("a", Format::Hash, &"k".repeat(20_000)), ask("a", Format::Hash, "b")];
        assert_eq!(Request::of(&OwnKeys::under("s"), &large).asks, 1);
    }
}
