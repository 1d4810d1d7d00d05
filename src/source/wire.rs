//! The replication connection: startup, login, simple queries, and the switch to CopyBoth.
//!
//! The only module that knows the messages of the frontend/backend protocol. It does not know what a slot is for, or
//! what CopyData contains. `postgres-protocol` builds and parses the messages except CopyBothResponse, which its parser
//! rejects, so that one is recognized beforehand. A mistake here prevents sessions, or lets a hostile or broken server
//! make the daemon hang, panic or run out of memory.
//!
//! <https://www.postgresql.org/docs/current/protocol-flow.html>
//! <https://www.postgresql.org/docs/current/protocol-replication.html>

use super::bounds::{HEADER_BYTES, SessionBounds, length_of};
use super::connect::unsuited;
use super::login::{Credentials, Login, Step};
use super::settings::{POOLER, check_session, session_sql};
use super::socket::{self, Reader, Socket, Writer};
use super::target::{PostgresTarget, SessionAttrs};
use super::thread;
use super::{ServerError, SourceError};
use crate::code::Code;
use crate::lsn::EndLsn;
use crate::remedy::Sql;
use bytes::{Buf, BufMut, Bytes, BytesMut};
use fallible_iterator::FallibleIterator;
use postgres_protocol::escape::{escape_identifier, escape_literal};
use postgres_protocol::message::backend::{COPY_DATA_TAG, Header, Message};
use postgres_protocol::message::frontend;
use std::io;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::JoinError;

/// CopyBothResponse, which `postgres-protocol` does not know.
const COPY_BOTH_TAG: u8 = b'W';

/// The size of a buffer, which bulk reads fill and the frames in it share. A frame that is kept keeps at most this much
/// memory alive, or only itself if it is larger: see [`Inbound::make_room`].
const BUFFER_BYTES: usize = 256 << 10;
/// The least space for a read. If a buffer has less left, that is not used.
const LEAST_READ_BYTES: usize = 64 << 10;
/// A larger frame grows its buffer in steps of at least this size, and only as its bytes arrive, because a length is
/// only a claim.
const LEAST_GROWTH_BYTES: usize = 1 << 20;
/// How much of a CopyData that exceeds the buffer is examined before the rest is read.
const HEAD_BYTES: usize = 64;

/// One message from the server.
pub(super) enum Frame {
    /// The contents of a CopyData.
    Data(Bytes),
    /// The first [`HEAD_BYTES`] of a CopyData that is not needed. The rest is discarded as it arrives.
    Unwanted([u8; HEAD_BYTES]),
    CopyBoth,
    Other(Message),
}

/// Incoming bytes, split into messages without copying.
#[derive(Default)]
pub(super) struct Inbound {
    buffer: BytesMut,
    bounds: SessionBounds,
    /// Bytes that the first frame still lacks, if its length is known.
    lacking: Option<usize>,
    /// Remaining bytes of an unwanted frame.
    unwanted: usize,
}

impl Inbound {
    /// Returns the next complete message, or `None` if more must be read.
    ///
    /// `is_unwanted` is called with the first bytes of a CopyData that exceeds the buffer, and returns whether to
    /// discard the rest.
    /// thrown away.
    #[inline]
    pub fn next(&mut self, is_unwanted: impl Fn(&[u8; HEAD_BYTES]) -> bool) -> io::Result<Option<Frame>> {
        self.lacking = None;
        let thrown_away = self.unwanted.min(self.buffer.len());
        self.buffer.advance(thrown_away);
        self.unwanted -= thrown_away;
        let Some(header) = Header::parse(&self.buffer)? else { return Ok(None) };
        let length = length_of(header);
        self.bounds.check(header.tag(), length)?;
        if self.buffer.len() < length {
            if header.tag() == COPY_DATA_TAG
                && length > BUFFER_BYTES
                && let Some(head) = self.buffer[HEADER_BYTES..].first_chunk().copied()
                && is_unwanted(&head)
            {
                self.bounds.took(header.tag(), length);
                self.unwanted = length - self.buffer.len();
                self.buffer.clear();
                return Ok(Some(Frame::Unwanted(head)));
            }
            self.lacking = Some(length - self.buffer.len());
            return Ok(None);
        }
        self.bounds.took(header.tag(), length);
        match header.tag() {
            COPY_DATA_TAG => {
                let mut frame = self.buffer.split_to(length);
                if length > BUFFER_BYTES {
                    // Growing leaves spare capacity, which the next frames must not use. It was read to its exact end.
                    self.buffer = BytesMut::from(&self.buffer[..]);
                }
                frame.advance(HEADER_BYTES);
                Ok(Some(Frame::Data(frame.freeze())))
            }
            COPY_BOTH_TAG => {
                self.buffer.advance(length);
                Ok(Some(Frame::CopyBoth))
            }
            _ => Ok(Message::parse(&mut self.buffer)?.map(Frame::Other)),
        }
    }

    /// Reads once, as much as is available and fits. Returns 0 at the end. Cancelling it loses nothing.
    pub async fn read_from(&mut self, reader: &mut Reader) -> io::Result<usize> {
        let most = self.make_room();
        reader.read_buf(&mut (&mut self.buffer).limit(most)).await
    }

    /// Makes space for a read, and returns how much of it to use.
    ///
    /// A frame larger than the buffer size gets a buffer of its own and is read to its exact end: nothing that follows
    /// shares its memory, so a small row never keeps a large neighbour alive.
    fn make_room(&mut self) -> usize {
        let held = self.buffer.len();
        match self.lacking {
            Some(lacking) if held + lacking > BUFFER_BYTES => {
                let room = self.buffer.capacity() - held;
                if room < lacking.min(LEAST_READ_BYTES) {
                    self.buffer.reserve(lacking.min(held.max(LEAST_GROWTH_BYTES)));
                }
                lacking
            }
            Some(_) | None => {
                let room = self.buffer.capacity() - held;
                let wanted = LEAST_READ_BYTES.max(self.lacking.unwrap_or(0)).min(BUFFER_BYTES - held.min(BUFFER_BYTES));
                if room < wanted && !self.buffer.try_reclaim(BUFFER_BYTES - held) {
                    let mut fresh = BytesMut::with_capacity(BUFFER_BYTES);
                    fresh.extend_from_slice(&self.buffer);
                    self.buffer = fresh;
                }
                usize::MAX
            }
        }
    }
}

/// A session in logical replication mode, which also accepts plain SQL. Dropping it closes the socket.
///
/// Dropping a future during a query leaves the answer unread. The connection can then only be dropped.
pub struct ReplicationConnection {
    reader: Reader,
    writer: Writer,
    inbound: Inbound,
    /// The server's name, for messages.
    at: String,
    backend_pid: i32,
    server_started: String,
}

impl ReplicationConnection {
    /// Opens a session with `replication=database` and the settings of every other connection, with the first suitable
    /// server.
    pub async fn connect(target: &PostgresTarget, application_name: &str) -> Result<Self, SourceError> {
        // Before the time limit of a login begins, and here, because a program that prints it must end with this runtime.
        let password = target.password.read_for_login().await?;
        let (target, application_name) = (target.clone(), application_name.to_owned());
        let connecting =
            thread::spawn(async move { Self::connect_here(&target, password.as_deref(), &application_name).await });
        let failed = |error: JoinError| SourceError::unexpected("connecting", format!("the task failed: {error}"));
        connecting.await.map_err(failed)?
    }

    async fn connect_here(
        target: &PostgresTarget,
        password: Option<&str>,
        application_name: &str,
    ) -> Result<Self, SourceError> {
        let log_in = |socket: Socket, at, wanted| async move {
            let end_point = socket.end_point();
            let (reader, writer) = socket.split();
            let inbound = Inbound::default();
            let mut connection = Self { reader, writer, inbound, at, backend_pid: 0, server_started: String::new() };
            let logged_in = connection.log_in(target, password.map(str::to_owned), application_name, end_point).await;
            logged_in.map_err(|error| without_replication(error, &target.user))?;
            connection.prepare(wanted).await?;
            Ok(connection)
        };
        socket::first(target, log_in).await
    }

    async fn prepare(&mut self, wanted: SessionAttrs) -> Result<(), SourceError> {
        if wanted != SessionAttrs::Any {
            let rows = self.query(SessionAttrs::QUESTION).await?;
            let cell = |i: usize| rows.first().and_then(|row| row.get(i)?.as_deref());
            wanted.suits(cell(0), cell(1)).map_err(|why| unsuited(&self.at, why))?;
        }
        let rows = self.query(&session_sql()).await?;
        let answer: Vec<Option<&str>> = rows.iter().flatten().map(|cell| cell.as_deref()).collect();
        self.server_started = check_session(&self.at, &answer)?;
        Ok(())
    }

    /// When its server started, as in [`super::connect::PostgresClient::server_started`].
    pub fn server_started(&self) -> &str {
        &self.server_started
    }

    /// Sends one replication command, and returns the rows of its answer.
    pub async fn command(&mut self, command: &str) -> Result<Vec<Vec<Option<String>>>, SourceError> {
        self.query(command).await.map_err(|error| match error {
            // An ordinary session parses the command as SQL: something has removed `replication=database`.
            SourceError::Failed { error, .. } if error.code == "42601" => {
                let fact = format!("does not know the command {} (SQLSTATE {})", shortened(command), error.code);
                SourceError::Login { code: Code::PostgresPooler, at: self.at.clone(), fact, remedy: POOLER }
            }
            other => other,
        })
    }

    /// The walsender's process id.
    pub fn backend_pid(&self) -> i32 {
        self.backend_pid
    }

    /// `server_version_num`: 150013 for 15.13.
    pub async fn server_version(&mut self) -> Result<u32, SourceError> {
        let version = self.show("server_version_num").await?;
        version.parse().map_err(|_| SourceError::unexpected("asking for the version", format!("{version:?}")))
    }

    async fn show(&mut self, name: &'static str) -> Result<String, SourceError> {
        let rows = self.query(&format!("SHOW {name}")).await?;
        let value = rows.into_iter().flatten().next().flatten();
        value.ok_or_else(|| SourceError::unexpected(format!("asking for {name}"), "no value"))
    }

    /// Sends one statement, SQL or a replication command, and returns the rows of its answer as text. Bytes that are
    /// not UTF-8 become U+FFFD.
    pub async fn query(&mut self, sql: &str) -> Result<Vec<Vec<Option<String>>>, SourceError> {
        let doing = || format!("running {}", shortened(sql));
        self.send(|out| frontend::query(sql, out), doing).await?;
        let mut rows = Vec::new();
        let mut failed = None;
        loop {
            match self.receive(doing).await? {
                Frame::Other(Message::DataRow(row)) => rows.push(texts(&row).map_err(|e| garbage(doing(), e))?),
                Frame::Other(Message::ErrorResponse(body)) => {
                    failed = Some(ServerError::parse(body.fields()).map_err(|e| garbage(doing(), e))?);
                }
                Frame::Other(Message::ReadyForQuery(_)) => break,
                Frame::Other(
                    Message::RowDescription(_) | Message::CommandComplete(_) | Message::EmptyQueryResponse,
                ) => {}
                frame => return Err(SourceError::unexpected(doing(), name_of(&frame))),
            }
        }
        match failed {
            Some(error) => Err(SourceError::Failed { doing: doing(), error }),
            None => Ok(rows),
        }
    }

    /// Starts the stream of `slot` at `from`, with protocol version 1 and logical messages.
    ///
    /// The caller has checked `from`. If it precedes the slot's confirmed position, the server silently starts at that
    /// position instead; if it is beyond the server's own position, the server accepts it, and later commits are lost.
    pub async fn start(mut self, slot: &str, publication: &str, from: EndLsn) -> Result<CopyBoth, SourceError> {
        let command = format!(
            "START_REPLICATION SLOT {} LOGICAL {from} (proto_version '1', publication_names {}, messages 'true')",
            escape_identifier(slot),
            command_literal(&escape_identifier(publication)),
        );
        let doing = || format!("starting the stream of slot {slot} at {from}");
        self.send(|out| frontend::query(&command, out), doing).await?;
        match self.receive(doing).await? {
            Frame::CopyBoth => {}
            Frame::Other(Message::ErrorResponse(body)) => {
                let error = ServerError::parse(body.fields()).map_err(|e| garbage(doing(), e))?;
                return Err(match error.code.as_str() {
                    "55006" => SourceError::SlotInUse { pid: self.holder(slot).await, slot: slot.to_owned() },
                    _ => SourceError::Stream { slot: slot.to_owned(), received: None, error },
                });
            }
            frame => return Err(SourceError::unexpected(doing(), name_of(&frame))),
        }
        Ok(CopyBoth {
            reader: self.reader,
            writer: self.writer,
            inbound: self.inbound,
            slot: slot.to_owned(),
            from,
            backend_pid: self.backend_pid,
        })
    }

    /// Returns the process that uses the slot, after a statement that failed because of it, if known.
    async fn holder(&mut self, slot: &str) -> Option<i32> {
        while !matches!(self.receive(String::new).await.ok()?, Frame::Other(Message::ReadyForQuery(_))) {}
        let literal = escape_literal(slot);
        let sql = format!(
            "SELECT active_pid FROM pg_catalog.pg_replication_slots WHERE slot_name = {literal}::pg_catalog.name"
        );
        let rows = self.query(&sql).await.ok()?;
        rows.first()?.first()?.as_deref()?.parse().ok()
    }

    /// `end_point` is the data for channel binding.
    async fn log_in(
        &mut self,
        target: &PostgresTarget,
        password: Option<String>,
        application_name: &str,
        end_point: Option<Vec<u8>>,
    ) -> Result<(), SourceError> {
        let at = self.at.clone();
        let doing = || format!("logging in to {at}");
        let options = target.options();
        let parameters = [
            ("user", target.user.as_str()),
            ("database", &target.database),
            ("replication", "database"),
            ("application_name", application_name),
            ("client_encoding", "UTF8"),
            ("options", &options),
        ];
        self.send(|out| frontend::startup_message(parameters, out), doing).await?;
        let credentials =
            Credentials { user: target.user.clone(), password, channel_binding: target.channel_binding, end_point };
        let mut login = Login::new(at.clone(), credentials);
        loop {
            let message = match self.frame(doing).await? {
                Frame::Other(message) => message,
                frame => return Err(SourceError::unexpected(doing(), name_of(&frame))),
            };
            match login.take(message)? {
                Step::Wait => {}
                Step::Send(answer) => self.write(&answer, doing).await?,
                Step::LoggedIn { backend_pid } => {
                    self.backend_pid = backend_pid;
                    return Ok(());
                }
            }
        }
    }

    async fn send(
        &mut self,
        message: impl FnOnce(&mut BytesMut) -> io::Result<()>,
        doing: impl Fn() -> String,
    ) -> Result<(), SourceError> {
        let mut out = BytesMut::new();
        message(&mut out).map_err(|e| unsendable(doing(), e))?;
        self.write(&out, doing).await
    }

    async fn write(&mut self, bytes: &[u8], doing: impl Fn() -> String) -> Result<(), SourceError> {
        let sent = async {
            self.writer.write_all(bytes).await?;
            self.writer.flush().await
        };
        sent.await.map_err(|source| SourceError::Lost { doing: doing(), source })
    }

    /// Returns the next message that answers something.
    async fn receive(&mut self, doing: impl Fn() -> String) -> Result<Frame, SourceError> {
        loop {
            match self.frame(&doing).await? {
                Frame::Other(Message::NoticeResponse(body)) => notice(ServerError::parse(body.fields())),
                Frame::Other(Message::ParameterStatus(_)) => {}
                frame => return Ok(frame),
            }
        }
    }

    async fn frame(&mut self, doing: impl Fn() -> String) -> Result<Frame, SourceError> {
        loop {
            if let Some(frame) = self.inbound.next(|_| false).map_err(|e| garbage(doing(), e))? {
                return Ok(frame);
            }
            let source = match self.inbound.read_from(&mut self.reader).await {
                Ok(0) => io::ErrorKind::UnexpectedEof.into(),
                Ok(_) => continue,
                Err(e) => e,
            };
            return Err(SourceError::Lost { doing: doing(), source });
        }
    }
}

/// A streaming session: it reads CopyData messages and writes status updates.
pub struct CopyBoth {
    pub(super) reader: Reader,
    pub(super) writer: Writer,
    pub(super) inbound: Inbound,
    pub(super) slot: String,
    pub(super) from: EndLsn,
    pub(super) backend_pid: i32,
}

/// Quotes a literal for the replication grammar, whose only escape is the doubled quote.
pub(super) fn command_literal(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

fn texts(row: &postgres_protocol::message::backend::DataRowBody) -> io::Result<Vec<Option<String>>> {
    row.ranges().map(|range| Ok(range.map(|r| String::from_utf8_lossy(&row.buffer()[r]).into_owned()))).collect()
}

/// A message that we cannot build, which only a NUL byte can cause.
pub(super) fn unsendable(doing: String, error: io::Error) -> SourceError {
    SourceError::unsuitable(Code::ConfigValue, format!("{doing} failed: {error}"), "remove the NUL byte")
}

pub(super) fn garbage(doing: String, error: io::Error) -> SourceError {
    SourceError::Unexpected { doing, what: error.to_string() }
}

pub(super) fn notice(notice: io::Result<ServerError>) {
    if let Ok(notice) = notice {
        tracing::debug!(code = notice.code, "postgres says: {}", notice.message);
    }
}

/// Returns a command with its literals shortened, but still recognizable.
fn shortened(sql: &str) -> String {
    const MOST: usize = 80;
    let line = sql.split_whitespace().collect::<Vec<_>>().join(" ");
    match line.char_indices().nth(MOST) {
        Some((at, _)) => format!("{}…", &line[..at]),
        None => line,
    }
}

pub(super) fn name_of(frame: &Frame) -> String {
    match frame {
        Frame::Data(_) | Frame::Unwanted(_) => "CopyData out of turn".to_owned(),
        Frame::CopyBoth => "CopyBothResponse out of turn".to_owned(),
        Frame::Other(message) => name(message),
    }
}

pub(super) fn name(message: &Message) -> String {
    let name = match message {
        Message::AuthenticationOk => "AuthenticationOk",
        Message::AuthenticationCleartextPassword => "AuthenticationCleartextPassword",
        Message::AuthenticationMd5Password(_) => "AuthenticationMD5Password",
        Message::AuthenticationSasl(_) => "AuthenticationSASL",
        Message::AuthenticationSaslContinue(_) => "AuthenticationSASLContinue",
        Message::AuthenticationSaslFinal(_) => "AuthenticationSASLFinal",
        Message::BackendKeyData(_) => "BackendKeyData",
        Message::CommandComplete(_) => "CommandComplete",
        Message::CopyInResponse(_) => "CopyInResponse",
        Message::CopyOutResponse(_) => "CopyOutResponse",
        Message::CopyDone => "CopyDone",
        Message::DataRow(_) => "DataRow",
        Message::NoticeResponse(_) => "NoticeResponse",
        Message::ParameterStatus(_) => "ParameterStatus",
        Message::ReadyForQuery(_) => "ReadyForQuery",
        _ => "another message",
    };
    format!("{name} out of turn")
}

/// An ordinary connection of the same role succeeded before, so this one fails because of replication.
fn without_replication(error: SourceError, role: &str) -> SourceError {
    match error {
        SourceError::Refused { at, error } if error.code == "42501" && error.hint.is_none() => {
            let hint = Some(format!("a stream takes the role's REPLICATION attribute: {}", Sql::Replication { role }));
            SourceError::Refused { at, error: ServerError { hint, ..error } }
        }
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn message(tag: u8, body: &[u8]) -> Vec<u8> {
        let mut out = vec![tag];
        out.extend_from_slice(&u32::try_from(body.len() + 4).unwrap().to_be_bytes());
        out.extend_from_slice(body);
        out
    }

    fn logged_in() -> Inbound {
        let mut inbound = Inbound::default();
        inbound.bounds.took(b'Z', 6);
        inbound
    }

    /// Feeds `wire` in pieces of `piece` bytes, as a slow socket would.
    async fn frames(wire: &[u8], piece: usize) -> io::Result<(Vec<Bytes>, Inbound)> {
        let (mut far, near) = tokio::io::duplex(piece.max(1));
        let wire = wire.to_vec();
        let writing = tokio::spawn(async move { far.write_all(&wire).await });
        let mut reader: Reader = Box::new(near);
        let mut inbound = logged_in();
        let mut taken = Vec::new();
        loop {
            while let Some(frame) = inbound.next(|head| head[0] == b'!')? {
                match frame {
                    Frame::Data(bytes) => taken.push(bytes),
                    Frame::Unwanted(head) => taken.push(Bytes::copy_from_slice(&head)),
                    Frame::CopyBoth | Frame::Other(_) => {}
                }
            }
            if inbound.read_from(&mut reader).await? == 0 {
                let _ = writing.await;
                return Ok((taken, inbound));
            }
        }
    }

    #[tokio::test]
    async fn frames_come_out_as_they_went_in_however_they_are_cut() {
        let bodies: Vec<Vec<u8>> = [0usize, 1, 4, 70_000, 3, BUFFER_BYTES - 5, BUFFER_BYTES, 3 << 20, 0, 9]
            .iter()
            .map(|n| vec![7; *n])
            .collect();
        let wire: Vec<u8> = bodies.iter().flat_map(|b| message(b'd', b)).collect();
        for piece in [1009, 4096, 100_000, 1 << 22] {
            let (taken, _) = frames(&wire, piece).await.unwrap();
            assert!(taken.iter().zip(&bodies).all(|(a, b)| a == b) && taken.len() == bodies.len(), "{piece}");
        }
    }

    #[tokio::test]
    async fn a_small_frame_never_keeps_a_large_neighbour_alive() {
        let small = message(b'd', b"small");
        let mut wire = small.clone();
        wire.extend(message(b'd', &vec![1; 8 << 20]));
        wire.extend(&small);
        let (taken, _) = frames(&wire, 1 << 24).await.unwrap();
        let [before, large, after] = &taken[..] else { panic!("three frames") };
        assert_eq!((before.len(), large.len(), after.len()), (5, 8 << 20, 5));
        // The only way to find out what shares a Bytes' memory.
        assert!(large.is_unique(), "the frames around it have memory of their own");
    }

    #[tokio::test]
    async fn a_claimed_gigabyte_costs_nothing_before_it_arrives() {
        let mut wire = vec![b'd'];
        wire.extend_from_slice(&(1u32 << 30).to_be_bytes());
        wire.extend_from_slice(&[0; 1000]);
        let (taken, inbound) = frames(&wire, 100).await.unwrap();
        assert!(taken.is_empty());
        assert!(inbound.buffer.capacity() <= 4 << 20, "{}", inbound.buffer.capacity());
        wire[1..5].copy_from_slice(&(2u32 << 30).wrapping_sub(1).to_be_bytes());
        let over = frames(&wire, 100).await;
        assert!(over.err().is_some_and(|e| e.to_string().contains("claims")));
    }

    #[tokio::test]
    async fn what_nobody_wants_is_never_held() {
        let unwanted = [b"!".to_vec(), vec![1; 40 << 20]].concat();
        let wire = [message(b'd', b"before"), message(b'd', &unwanted), message(b'd', b"after")].concat();
        for piece in [100, 4096, 1 << 20] {
            let (taken, inbound) = frames(&wire, piece).await.unwrap();
            assert_eq!((&taken[0][..], &taken[2][..]), (&b"before"[..], &b"after"[..]));
            assert_eq!(taken[1][..], unwanted[..HEAD_BYTES]);
            assert!(inbound.buffer.capacity() <= BUFFER_BYTES, "{}", inbound.buffer.capacity());
        }
        // A frame that fits into the buffer is read like any other.
        let small = [b"!".to_vec(), vec![1; BUFFER_BYTES / 2]].concat();
        let (taken, _) = frames(&message(b'd', &small), 4096).await.unwrap();
        assert_eq!(taken, [small]);
    }

    #[tokio::test]
    async fn many_small_frames_share_few_buffers() {
        let wire: Vec<u8> = (0..20_000).flat_map(|_| message(b'd', &[5; 95])).collect();
        let (taken, _) = frames(&wire, 1 << 22).await.unwrap();
        assert_eq!(taken.len(), 20_000);
        let mut breaks = 0;
        for pair in taken.windows(2) {
            let adjacent = pair[0].as_ptr() as usize + pair[0].len() + HEADER_BYTES == pair[1].as_ptr() as usize;
            breaks += usize::from(!adjacent);
        }
        assert!(breaks <= 2_000_000 / (BUFFER_BYTES - LEAST_READ_BYTES) + 2, "{breaks} buffers");
    }

    proptest! {
        #[test]
        fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let mut inbound = logged_in();
            inbound.buffer.extend_from_slice(&bytes);
            while let Ok(Some(frame)) = inbound.next(|_| true) {
                match frame {
                    Frame::Other(Message::ErrorResponse(body)) => { let _ = ServerError::parse(body.fields()); }
                    Frame::Other(Message::DataRow(row)) => { let _ = texts(&row); }
                    _ => {}
                }
            }
            inbound.make_room();
        }

        /// Messages that the server may send, with bodies that it would not.
        #[test]
        fn garbled_messages_never_panic(tag in proptest::sample::select(b"RESTDKNZC".to_vec()), body in proptest::collection::vec(any::<u8>(), 0..60)) {
            let mut inbound = logged_in();
            inbound.buffer.extend_from_slice(&message(tag, &body));
            match inbound.next(|_| true) {
                Ok(Some(Frame::Other(Message::ErrorResponse(body)))) => { let _ = ServerError::parse(body.fields()); }
                Ok(Some(Frame::Other(Message::DataRow(row)))) => { let _ = texts(&row); }
                _ => {}
            }
        }
    }

    #[test]
    fn a_literal_of_the_replication_grammar_has_no_backslash_escapes() {
        assert_eq!(command_literal(&escape_identifier(r#"a'b"c\d"#)), r#"'"a''b""c\d"'"#);
    }
}
