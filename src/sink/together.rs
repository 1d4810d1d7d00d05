//! Reads of one row: those that wait at the same moment go to Redis as one request, between two reads of the same
//! checkpoint. A busy daemon then asks for the checkpoint once for many rows, and a quiet one waits for nobody.
//!
//! It knows only the ordinary case. Whatever else happens, except silence, it answers [`Apart`]: the [reader](super::reader)
//! then asks for that row alone, and finds the words for what is wrong. If it gave a row to the wrong waiting read, an
//! application would take one row for another.

use super::SinkError;
use super::bounds::ROWS_BYTES;
use super::connect::{self, RedisTarget};
use super::link::{Link, Moved, TIME};
use super::reader::{Fields, IDLE, Moments, READ_TIMEOUT, RETRY_PAUSE, Read, RunId, StoredRow, run_id};
use super::replies::Reply;
use crate::command::Key;
use crate::format::Format;
use crate::resp::batch::OwnKeys;
use crate::resp::{self, Token};
use bytes::{Bytes, BytesMut};
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

/// Limit for a request. Redis reads 16 kB at a time (`PROTO_IOBUF_LEN` in its server.h), and executes what it has read before
/// anything else: a larger request would let other writers in between.
const REQUEST_BYTES: usize = 12 << 10;
/// How many reads wait in the queue. Others wait for a place in it.
const QUEUE: usize = 64;
const INFO: &[u8] = b"*1\r\n$4\r\nINFO\r\n";

/// The queue of reads. Dropping it ends the task that answers them.
#[derive(Clone)]
pub(super) struct Together(mpsc::Sender<Ask>);

struct Ask {
    table: Box<str>,
    format: Format,
    key: Key,
    answer: oneshot::Sender<Result<Read, Apart>>,
}

/// Why a read was not answered here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Apart {
    /// Redis has not answered in time.
    Silent,
    /// Anything else. Ask for the row alone.
    Otherwise,
}

impl Together {
    /// Spawns the task.
    pub fn start(target: RedisTarget, own: OwnKeys) -> Self {
        let (asks, queue) = mpsc::channel(QUEUE);
        tokio::spawn(Exchanges { target, own, line: None, failed: None }.run(queue));
        Self(asks)
    }

    /// Returns a row, the head of the checkpoint and the entry of `table`, all as of one moment if [`Read::moments`] says so.
    pub async fn read(&self, table: &str, format: Format, key: &Key) -> Result<Read, Apart> {
        let (answer, answered) = oneshot::channel();
        let ask = Ask { table: table.into(), format, key: key.clone(), answer };
        let asked = async {
            self.0.send(ask).await.map_err(|_| Apart::Otherwise)?;
            answered.await.unwrap_or(Err(Apart::Otherwise))
        };
        timeout(READ_TIMEOUT, asked).await.unwrap_or(Err(Apart::Silent))
    }
}

/// The task: one exchange with Redis at a time, while further reads gather.
struct Exchanges {
    target: RedisTarget,
    own: OwnKeys,
    line: Option<Line>,
    /// When no connection could be opened.
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
            let request = Request::of(&self.own, &waiting);
            let answered = self.exchange(&request).await;
            let found = answered.map(|answer| answer.take_apart(&waiting[..request.asks]));
            let asks = waiting.drain(..request.asks);
            let apart = match found {
                Ok(Some(found)) => {
                    asks.zip(found).for_each(|(ask, found)| _ = ask.answer.send(found));
                    continue;
                }
                // The server does not have the checkpoint, or does not show it.
                Ok(None) => {
                    self.line = None;
                    Apart::Otherwise
                }
                Err(apart) => apart,
            };
            asks.for_each(|ask| _ = ask.answer.send(Err(apart)));
        }
    }

    /// Retries once, on a new connection, if the open one turns out to be dead.
    async fn exchange(&mut self, request: &Request) -> Result<Answer, Apart> {
        let began = Instant::now();
        let left = || READ_TIMEOUT.saturating_sub(began.elapsed());
        loop {
            let (mut line, patience) = match self.line.take() {
                // A connection that has been idle for a while may be dead without notice.
                Some(line) if line.answered.elapsed() >= IDLE => (line, Some(left() / 2)),
                Some(line) => (line, None),
                None => match timeout(left(), self.open()).await {
                    Ok(opened) => (opened?, None),
                    Err(_) => return Err(Apart::Silent),
                },
            };
            let is_old = line.answered < began;
            let asked = Instant::now();
            let fetched =
                timeout(patience.unwrap_or_else(left), line.link.fetch(&request.bytes, request.replies, ROWS_BYTES));
            match fetched.await {
                Ok(Ok(replies)) => {
                    line.answered = Instant::now();
                    let answer = Answer {
                        replies: Replies { raw: replies, at: 0 },
                        server: line.server.clone(),
                        took: asked.elapsed(),
                    };
                    self.line = Some(line);
                    return Ok(answer);
                }
                Ok(Err(SinkError::Lost { .. })) if is_old => {}
                Err(_) if patience.is_some() => {}
                Ok(Err(_)) => return Err(Apart::Otherwise),
                Err(_) => return Err(Apart::Silent),
            }
        }
    }

    async fn open(&mut self) -> Result<Line, Apart> {
        if self.failed.is_some_and(|at| at.elapsed() < RETRY_PAUSE) {
            return Err(Apart::Otherwise);
        }
        let opened = Line::open(&self.target).await;
        self.failed = opened.is_err().then(Instant::now);
        opened.map_err(|_| Apart::Otherwise)
    }
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
    fn take_apart(mut self, asks: &[Ask]) -> Option<Vec<Result<Read, Apart>>> {
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
        let read = |(entry, row, ttl_ms): (Option<Bytes>, Result<_, Apart>, Result<_, Apart>)| {
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

    /// A row, if it exists. Of another type, Redis says what it is: that is for the one who asks alone.
    fn row(&mut self, format: Format) -> Option<Result<Option<StoredRow>, Apart>> {
        if self.is_refused() {
            return Some(Err(Apart::Otherwise));
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
    fn ttl(&mut self) -> Option<Result<Option<u64>, Apart>> {
        if self.is_refused() {
            return Some(Err(Apart::Otherwise));
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
