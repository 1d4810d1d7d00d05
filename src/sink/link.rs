//! One connection to a Redis server: logs in, sends requests, and reads as many replies as were asked for.
//!
//! It knows no keys and no guards. A reply left unread here would be taken for the answer to the next request.

use super::SinkError;
use super::answers::{accepted, exactly};
use super::bounds::{LOGIN_BYTES, REPLY_BYTES};
use super::connect::{self, RedisTarget, Socket, Stream};
use super::replies::{Replies, Reply};
use crate::resp::{self, Begins, ELEMENT_BYTES, HashReply, Token};
use bytes::{Buf, Bytes, BytesMut};
use std::io;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

const READ_BYTES: usize = 64 << 10;
/// How many error replies to a request keep their text. Each is searched for what it repeats of the request.
const SEARCHED: usize = 8;
/// How long to wait for an error reply after Redis has stopped reading.
const LAST_WORDS: Duration = Duration::from_secs(1);

pub(super) const TIME: &[u8] = b"*1\r\n$4\r\nTIME\r\n";

/// A connection. A call that is dropped before it completes leaves replies unread: the connection is then of no use.
pub(super) struct Link {
    target: RedisTarget,
    socket: Socket,
    received: BytesMut,
    moved: Moved,
}

/// Counts bytes that were sent to or received from Redis. Distinguishes a slow Redis from one that does not respond
/// while a call is in progress.
#[derive(Debug, Clone, Default)]
pub struct Moved(Arc<AtomicU64>);

impl Moved {
    pub fn bytes(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    fn add(&self, bytes: usize) {
        self.0.fetch_add(bytes as u64, Ordering::Relaxed);
    }
}

impl Link {
    /// Logs in.
    pub async fn over(stream: Stream, target: &RedisTarget, moved: Moved) -> Result<Self, SinkError> {
        let mut link = Link { target: target.clone(), socket: stream.into(), received: BytesMut::new(), moved };
        link.introduce().await?;
        Ok(link)
    }

    pub fn target(&self) -> &RedisTarget {
        &self.target
    }

    pub fn moved(&self) -> &Moved {
        &self.moved
    }

    async fn introduce(&mut self) -> Result<(), SinkError> {
        let (mut out, mut names) = (BytesMut::new(), Vec::new());
        match self.target.credentials().await? {
            None => {}
            Some((user, password)) => {
                match user {
                    Some(user) => resp::command(&mut out, &[b"AUTH", user.as_bytes(), password.as_bytes()]),
                    None => resp::command(&mut out, &[b"AUTH", password.as_bytes()]),
                }
                names.push("AUTH");
            }
        }
        if self.target.db != 0 {
            resp::command(&mut out, &[b"SELECT", self.target.db.to_string().as_bytes()]);
            names.push("SELECT");
        }
        if names.is_empty() {
            return Ok(());
        }
        // A server with too many clients answers once and closes the connection, in which case this gets no reply.
        out.extend_from_slice(TIME);
        let replies = self.ask_within(LOGIN_BYTES, &out, names.len() + 1).await?;
        for (command, reply) in names.into_iter().zip(replies) {
            accepted(command, reply).map_err(|error| match error {
                SinkError::Refused { reply, .. } => connect::refused_login(&self.target, command, reply),
                other => other,
            })?;
        }
        Ok(())
    }

    pub async fn ask(&mut self, request: &[u8], replies: usize) -> Result<Vec<Reply>, SinkError> {
        self.ask_within(REPLY_BYTES, request, replies).await
    }

    pub async fn ask_within(&mut self, most: usize, request: &[u8], replies: usize) -> Result<Vec<Reply>, SinkError> {
        self.ask_each(most, [request], replies, |_| request).await
    }

    /// As [`Self::ask_within`]. Each piece of the request is made when the one before has been written. `request` returns
    /// what the reply with this index answers.
    pub async fn ask_each<R: AsRef<[u8]>>(
        &mut self,
        most: usize,
        pieces: impl IntoIterator<Item = impl Buf>,
        replies: usize,
        request: impl Fn(usize) -> R,
    ) -> Result<Vec<Reply>, SinkError> {
        let replies = self.ask_differing(most, pieces, replies, |_| None, request).await?;
        Ok(replies.into_iter().flatten().collect())
    }

    /// As [`Self::ask_each`], but returns `None` for each reply that has the bytes which are `expected` of the reply with
    /// its index. Nothing is made of those.
    pub async fn ask_differing<'e, R: AsRef<[u8]>>(
        &mut self,
        most: usize,
        pieces: impl IntoIterator<Item = impl Buf>,
        replies: usize,
        expected: impl Fn(usize) -> Option<HashReply<'e>>,
        request: impl Fn(usize) -> R,
    ) -> Result<Vec<Option<Reply>>, SinkError> {
        let mut wanted = Replies::new(replies);
        let take = |bytes: &[u8]| {
            if let Some(expected) = wanted.begins().and_then(&expected) {
                match expected.begins(bytes) {
                    Begins::Whole(len) => return Ok(Some(Taken { len, flow: wanted.is_as_expected() })),
                    Begins::Unfinished => return Ok(None),
                    Begins::Another => {}
                }
            }
            take_token(bytes, |token| wanted.take(token))
        };
        let answered = self.exchange_bytes(pieces, most, take).await;
        let hidden = self.target.password.to_hide();
        let secret = hidden.as_deref();
        let mut searched = 0;
        let shown = |(at, reply)| match reply {
            Some(Reply::Error(reply)) if searched < SEARCHED => {
                searched += 1;
                Some(Reply::Error(reply.without(request(at).as_ref(), secret)))
            }
            Some(Reply::Error(reply)) => Some(Reply::Error(reply.without_text())),
            other => other,
        };
        let mut replies = wanted.into_differing().into_iter().enumerate().map(shown);
        match answered {
            Ok(()) => Ok(replies.collect()),
            // It gave the reason before it closed the connection: too many clients, protected mode.
            Err(lost @ SinkError::Lost { .. }) => match replies.next() {
                Some(Some(Reply::Error(reply))) => Err(SinkError::HungUp { redis: self.target.to_string(), reply }),
                _ => Err(lost),
            },
            Err(other) => Err(other),
        }
    }

    pub async fn ask_exactly<const N: usize>(
        &mut self,
        request: &[u8],
        command: &'static str,
    ) -> Result<[Reply; N], SinkError> {
        exactly(command, self.ask(request, N).await?)
    }

    /// Returns the bytes of all replies to a request that is small enough for Redis to read as a whole. They may have `most`
    /// bytes.
    pub async fn fetch(&mut self, request: &[u8], replies: usize, most: usize) -> Result<Bytes, SinkError> {
        let lost = |error| SinkError::Lost { redis: self.target.to_string(), error };
        self.socket.write.write_all(request).await.map_err(lost)?;
        self.socket.write.flush().await.map_err(lost)?;
        self.moved.add(request.len());
        // How many elements are still to come, inside arrays or not.
        let (mut at, mut left, mut room) = (0, replies as u64, most);
        loop {
            while let Some((token, len)) = resp::token(&self.received[at..])? {
                room = room.checked_sub(len + ELEMENT_BYTES).ok_or(resp::Malformed::TooLong(most))?;
                at += len;
                left -= 1;
                if let Token::Array(items) = token {
                    left = left.checked_add(items).ok_or(resp::Malformed::TooLong(most))?;
                }
                if left == 0 && at == self.received.len() {
                    return Ok(self.received.split().freeze());
                }
                // Whatever follows would be taken for the answer to the next request.
                if left == 0 {
                    return Err(resp::Malformed::OutOfPlace.into());
                }
            }
            if self.received.len() - at > room {
                return Err(resp::Malformed::TooLong(most).into());
            }
            fill(&mut self.socket.read, &mut self.received, &self.moved).await.map_err(lost)?;
        }
    }

    /// Writes a request while reading replies until `take` breaks, because Redis stops reading when its replies are not
    /// read. The replies together may have `most` bytes, including what each element takes in memory.
    pub async fn exchange(
        &mut self,
        pieces: impl IntoIterator<Item = impl Buf>,
        most: usize,
        mut take: impl FnMut(Token<'_>) -> Result<ControlFlow<()>, resp::Malformed>,
    ) -> Result<(), SinkError> {
        self.exchange_bytes(pieces, most, |bytes| take_token(bytes, &mut take)).await
    }

    /// `take` takes one element, or a whole reply; `None` if there are too few bytes.
    async fn exchange_bytes(
        &mut self,
        pieces: impl IntoIterator<Item = impl Buf>,
        most: usize,
        mut take: impl FnMut(&[u8]) -> Result<Option<Taken>, resp::Malformed>,
    ) -> Result<(), SinkError> {
        let redis = || self.target.to_string();
        let (socket_read, socket_write, received) = (&mut self.socket.read, &mut self.socket.write, &mut self.received);
        let moved = &self.moved;
        let write = async {
            for mut piece in pieces {
                while piece.has_remaining() {
                    match socket_write.write_buf(&mut piece).await? {
                        0 => return Err(io::ErrorKind::WriteZero.into()),
                        bytes => moved.add(bytes),
                    }
                }
            }
            socket_write.flush().await
        };
        let read = async {
            let mut room = most;
            loop {
                let mut at = 0;
                while let Some(Taken { len, flow }) = take(&received[at..])? {
                    room = room.checked_sub(len + ELEMENT_BYTES).ok_or(resp::Malformed::TooLong(most))?;
                    at += len;
                    if flow.is_break() {
                        received.advance(at);
                        return Ok(());
                    }
                }
                received.advance(at);
                if received.len() > room {
                    return Err(resp::Malformed::TooLong(most).into());
                }
                fill(socket_read, received, moved).await.map_err(|error| SinkError::Lost { redis: redis(), error })?;
            }
        };
        tokio::pin!(read);
        let written = tokio::select! {
            biased;
            done = &mut read => return done,
            written = write => written,
        };
        match written {
            Ok(()) => read.await,
            Err(error) => {
                // It may have given a reason before it closed the connection, which `take` has then seen.
                let _ = timeout(LAST_WORDS, read).await;
                Err(SinkError::Lost { redis: redis(), error })
            }
        }
    }
}

struct Taken {
    len: usize,
    flow: ControlFlow<()>,
}

fn take_token(
    bytes: &[u8],
    take: impl FnOnce(Token<'_>) -> Result<ControlFlow<()>, resp::Malformed>,
) -> Result<Option<Taken>, resp::Malformed> {
    let Some((token, len)) = resp::token(bytes)? else { return Ok(None) };
    Ok(Some(Taken { len, flow: take(token)? }))
}

/// Waits for more bytes.
async fn fill(socket: &mut (impl AsyncRead + Unpin), received: &mut BytesMut, moved: &Moved) -> io::Result<()> {
    received.reserve(READ_BYTES);
    match socket.read_buf(received).await? {
        0 => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "Redis closed the connection")),
        bytes => {
            moved.add(bytes);
            Ok(())
        }
    }
}
