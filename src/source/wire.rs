//! The replication connection: startup, login, simple queries, and the switch to CopyBoth.
//!
//! The only module that knows the messages of the frontend/backend protocol; it does not know what a slot is for or what
//! is inside a CopyData. `postgres-protocol` builds and parses the messages, except CopyBothResponse, which its parser
//! takes for garbage: that one is peeked at. When this is wrong, no session comes about, or a hostile or broken server
//! makes the daemon hang, panic or run out of memory.
//!
//! <https://www.postgresql.org/docs/current/protocol-flow.html>
//! <https://www.postgresql.org/docs/current/protocol-replication.html>

use super::connect::{
    NO_PASSWORD, POOLER, UNBOUND, check_session, login_refused, refused_by_us, session_sql, unsuited,
};
use super::socket::{self, Reader, Socket, Writer};
use super::target::{ChannelBinding, PostgresTarget, SessionAttrs};
use super::{ServerError, SourceError};
use crate::lsn::EndLsn;
use crate::remedy::Sql;
use bytes::{Buf, BufMut, Bytes, BytesMut};
use fallible_iterator::FallibleIterator;
use postgres_protocol::authentication::md5_hash;
use postgres_protocol::authentication::sasl::{self, SCRAM_SHA_256, SCRAM_SHA_256_PLUS, ScramSha256};
use postgres_protocol::escape::{escape_identifier, escape_literal};
use postgres_protocol::message::backend::{AuthenticationSaslBody, COPY_DATA_TAG, Header, Message};
use postgres_protocol::message::frontend;
use std::io;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// CopyBothResponse, which `postgres-protocol` does not know.
const COPY_BOTH_TAG: u8 = b'W';
/// Tag and length of every message.
const HEADER_BYTES: usize = 5;

/// One buffer is filled by bulk reads and shared by the frames in it, so a frame that is kept keeps at most this much
/// memory alive (or itself, where it is larger: see [`Inbound::make_room`]).
const BUFFER_BYTES: usize = 256 << 10;
/// The least room that a read is given: what is left of a buffer below this is not used.
const LEAST_READ_BYTES: usize = 64 << 10;
/// A larger frame grows its buffer in steps no smaller than this, and only as its bytes arrive: a length is only a claim.
const LEAST_GROWTH_BYTES: usize = 1 << 20;

/// The longest message taken while logging in and for an answer to a query.
const QUERY_FRAME_LIMIT: usize = 16 << 20;
/// Postgres builds a message in a buffer of at most 1 GB (`MaxAllocSize`); the headers around it are small.
const STREAM_FRAME_LIMIT: usize = (1 << 30) + (1 << 20);

/// One message from the server.
pub(super) enum Frame {
    /// What CopyData holds.
    Data(Bytes),
    CopyBoth,
    Other(Message),
}

/// Bytes on their way in, cut into messages without copying them.
pub(super) struct Inbound {
    buffer: BytesMut,
    limit: usize,
    /// Bytes that the frame at the front still lacks, where its length is known.
    lacking: Option<usize>,
}

impl Inbound {
    pub fn with_limit(limit: usize) -> Self {
        Self { buffer: BytesMut::with_capacity(BUFFER_BYTES), limit, lacking: None }
    }

    /// The next whole message; `None` until more has been read.
    #[inline]
    pub fn next(&mut self) -> io::Result<Option<Frame>> {
        let Some(header) = Header::parse(&self.buffer)? else {
            self.lacking = None;
            return Ok(None);
        };
        // The length counts itself and not the tag; the parser has refused anything below 4.
        let length = usize::try_from(header.len()).unwrap_or(0) + 1;
        if length > self.limit {
            let message = format!("a message of type {:#04x} claims {length} bytes", header.tag());
            return Err(io::Error::new(io::ErrorKind::InvalidData, message));
        }
        if self.buffer.len() < length {
            self.lacking = Some(length - self.buffer.len());
            return Ok(None);
        }
        self.lacking = None;
        match header.tag() {
            COPY_DATA_TAG => {
                let mut frame = self.buffer.split_to(length);
                if length > BUFFER_BYTES {
                    // Growing leaves room behind it, which the next frames are not to use. It was read to its exact end.
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

    /// Reads once, as much as there is and fits. 0 is the end. Cancelling it loses nothing.
    pub async fn read_from(&mut self, reader: &mut Reader) -> io::Result<usize> {
        let most = self.make_room();
        reader.read_buf(&mut (&mut self.buffer).limit(most)).await
    }

    /// Makes room for a read, and says how much of it to use.
    ///
    /// A frame over the buffer's size gets a buffer of its own, and is read to its exact end: nothing behind it shares
    /// that memory, so that a small row never keeps a large neighbour alive.
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

/// A session in logical replication mode, which also takes plain SQL. Dropping it closes the socket.
///
/// Dropping a future of it in mid-query leaves the answer unread: the connection is then good for nothing but dropping.
pub struct ReplicationConnection {
    reader: Reader,
    writer: Writer,
    inbound: Inbound,
    /// Which of the target's servers it is.
    at: String,
    backend_pid: i32,
    server_started: String,
}

impl ReplicationConnection {
    /// Opens a session with `replication=database` and the settings of every other connection, to the first server that
    /// will do.
    pub async fn connect(target: &PostgresTarget, application_name: &str) -> Result<Self, SourceError> {
        let log_in = |socket: Socket, at, wanted| async move {
            let end_point = socket.end_point();
            let (reader, writer) = socket.split();
            let inbound = Inbound::with_limit(QUERY_FRAME_LIMIT);
            let mut connection = Self { reader, writer, inbound, at, backend_pid: 0, server_started: String::new() };
            let logged_in = connection.log_in(target, application_name, end_point).await;
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

    /// When its server started, as [`super::connect::PostgresClient::server_started`].
    pub fn server_started(&self) -> &str {
        &self.server_started
    }

    /// Sends one replication command, and gathers the rows of its answer.
    pub async fn command(&mut self, command: &str) -> Result<Vec<Vec<Option<String>>>, SourceError> {
        self.query(command).await.map_err(|error| match error {
            // An ordinary session takes the command for SQL: somebody has dropped `replication=database`.
            SourceError::Failed { error, .. } if error.code == "42601" => {
                let fact = format!("does not know the command {} (SQLSTATE {})", shortened(command), error.code);
                SourceError::Login { at: self.at.clone(), fact, remedy: POOLER }
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

    /// Sends one statement, SQL or replication command, and gathers the rows of its answer as text. Bytes that are not
    /// UTF-8 become U+FFFD.
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
                frame => return Err(SourceError::unexpected(doing(), name(&frame))),
            }
        }
        match failed {
            Some(error) => Err(SourceError::Failed { doing: doing(), error }),
            None => Ok(rows),
        }
    }

    /// Starts the stream of `slot` at `from`, with protocol 1 and logical messages.
    ///
    /// The caller has checked `from`: below the slot's confirmed position the server moves it up without a word; beyond
    /// its own position it accepts it, and later commits vanish.
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
            frame => return Err(SourceError::unexpected(doing(), name(&frame))),
        }
        self.inbound.limit = STREAM_FRAME_LIMIT;
        Ok(CopyBoth {
            reader: self.reader,
            writer: self.writer,
            inbound: self.inbound,
            slot: slot.to_owned(),
            from,
            backend_pid: self.backend_pid,
        })
    }

    /// The process that holds the slot, after a statement that failed because of it. `None` where that is not known.
    async fn holder(&mut self, slot: &str) -> Option<i32> {
        while !matches!(self.receive(String::new).await.ok()?, Frame::Other(Message::ReadyForQuery(_))) {}
        let literal = escape_literal(slot);
        let sql = format!(
            "SELECT active_pid FROM pg_catalog.pg_replication_slots WHERE slot_name = {literal}::pg_catalog.name"
        );
        let rows = self.query(&sql).await.ok()?;
        rows.first()?.first()?.as_deref()?.parse().ok()
    }

    /// `end_point`: what the login can be bound to. The same decisions as tokio-postgres makes for ordinary connections.
    async fn log_in(
        &mut self,
        target: &PostgresTarget,
        application_name: &str,
        end_point: Option<Vec<u8>>,
    ) -> Result<(), SourceError> {
        let at = self.at.clone();
        let doing = || format!("logging in to {at}");
        let login = |fact: String, remedy| SourceError::Login { at: at.clone(), fact, remedy };
        let user = target.user.as_str();
        let options = target.options();
        let parameters = [
            ("user", user),
            ("database", &target.database),
            ("replication", "database"),
            ("application_name", application_name),
            ("client_encoding", "UTF8"),
            ("options", &options),
        ];
        self.send(|out| frontend::startup_message(parameters, out), doing).await?;
        let found = target.password.read()?;
        let password = || found.as_deref().map(str::as_bytes).ok_or_else(|| refused_by_us(&at, NO_PASSWORD));
        // Whoever stands between could pass on anything else.
        let unbound = || match target.channel_binding {
            ChannelBinding::Require => Err(refused_by_us(&at, UNBOUND)),
            _ => Ok(()),
        };
        let mut scram: Option<(ScramSha256, Bound)> = None;
        let mut bound = Bound::No;
        loop {
            let message = match self.receive(doing).await? {
                Frame::Other(message) => message,
                frame => return Err(SourceError::unexpected(doing(), name(&frame))),
            };
            match message {
                Message::AuthenticationOk if bound == Bound::No => unbound()?,
                Message::AuthenticationOk | Message::ParameterStatus(_) => {}
                Message::AuthenticationCleartextPassword => {
                    unbound()?;
                    let password = password()?;
                    self.send(|out| frontend::password_message(password, out), doing).await?;
                }
                Message::AuthenticationMd5Password(body) => {
                    unbound()?;
                    let hash = md5_hash(user.as_bytes(), password()?, body.salt());
                    self.send(|out| frontend::password_message(hash.as_bytes(), out), doing).await?;
                }
                Message::AuthenticationSasl(body) => {
                    let offers = offers(&body).map_err(|e| garbage(doing(), e))?;
                    let end_point = end_point.clone().filter(|_| target.channel_binding != ChannelBinding::Disable);
                    let (binding, mechanism, bound) = match (offers, end_point) {
                        (Offers { plus: true, .. }, Some(hash)) => {
                            (sasl::ChannelBinding::tls_server_end_point(hash), SCRAM_SHA_256_PLUS, Bound::Yes)
                        }
                        // Says that we could have: a server that offered it knows then that somebody took the offer away.
                        (Offers { plus: false, plain: true }, Some(_)) => {
                            (sasl::ChannelBinding::unrequested(), SCRAM_SHA_256, Bound::No)
                        }
                        (Offers { plain: true, .. }, None) => {
                            (sasl::ChannelBinding::unsupported(), SCRAM_SHA_256, Bound::No)
                        }
                        (Offers { plain: false, .. }, _) => {
                            let fact = "offers no SASL mechanism known here".to_owned();
                            return Err(login(fact, "use scram-sha-256 in pg_hba.conf"));
                        }
                    };
                    if bound == Bound::No {
                        unbound()?;
                    }
                    let started = ScramSha256::new(password()?, binding);
                    let initial =
                        |out: &mut BytesMut| frontend::sasl_initial_response(mechanism, started.message(), out);
                    self.send(initial, doing).await?;
                    scram = Some((started, bound));
                }
                Message::AuthenticationSaslContinue(body) => {
                    // Taken out: a second one would meet a finished exchange, whose `message` panics.
                    let Some((mut exchange, binds)) = scram.take() else {
                        return Err(SourceError::unexpected(doing(), "a SASL challenge out of turn"));
                    };
                    exchange.update(body.data()).map_err(|e| garbage(doing(), e))?;
                    self.send(|out| frontend::sasl_response(exchange.message(), out), doing).await?;
                    match self.receive(doing).await? {
                        // The server shows that it knows the password too.
                        Frame::Other(Message::AuthenticationSaslFinal(body)) => {
                            exchange.finish(body.data()).map_err(|e| garbage(doing(), e))?;
                            bound = binds;
                        }
                        Frame::Other(Message::ErrorResponse(body)) => return Err(refused(&at, &body)),
                        frame => return Err(SourceError::unexpected(doing(), name(&frame))),
                    }
                }
                Message::AuthenticationKerberosV5
                | Message::AuthenticationGss
                | Message::AuthenticationSspi
                | Message::AuthenticationScmCredential => {
                    let fact = "wants Kerberos, GSSAPI or SSPI, which are not supported".to_owned();
                    return Err(login(fact, "use scram-sha-256 in pg_hba.conf for this role"));
                }
                Message::BackendKeyData(body) => self.backend_pid = body.process_id(),
                Message::ReadyForQuery(_) => return Ok(()),
                Message::ErrorResponse(body) => return Err(refused(&at, &body)),
                other => return Err(SourceError::unexpected(doing(), name(&Frame::Other(other)))),
            }
        }
    }

    async fn send(
        &mut self,
        message: impl FnOnce(&mut BytesMut) -> io::Result<()>,
        doing: impl Fn() -> String,
    ) -> Result<(), SourceError> {
        let mut out = BytesMut::new();
        message(&mut out)
            .map_err(|e| SourceError::unsuitable(format!("{} failed: {e}", doing()), "remove the NUL byte"))?;
        let sent = async {
            self.writer.write_all(&out).await?;
            self.writer.flush().await
        };
        sent.await.map_err(|source| SourceError::Lost { doing: doing(), source })
    }

    /// The next message that is not a notice.
    async fn receive(&mut self, doing: impl Fn() -> String) -> Result<Frame, SourceError> {
        loop {
            match self.inbound.next().map_err(|e| garbage(doing(), e))? {
                Some(Frame::Other(Message::NoticeResponse(body))) => notice(ServerError::parse(body.fields())),
                Some(Frame::Other(Message::ParameterStatus(_))) if self.backend_pid != 0 => {}
                Some(frame) => return Ok(frame),
                None => {
                    let read = self.inbound.read_from(&mut self.reader).await;
                    let lost = match read {
                        Ok(0) => io::ErrorKind::UnexpectedEof.into(),
                        Ok(_) => continue,
                        Err(e) => e,
                    };
                    return Err(SourceError::Lost { doing: doing(), source: lost });
                }
            }
        }
    }
}

/// A session that streams: what is read are CopyData messages, what is written are status updates.
pub struct CopyBoth {
    pub(super) reader: Reader,
    pub(super) writer: Writer,
    pub(super) inbound: Inbound,
    pub(super) slot: String,
    pub(super) from: EndLsn,
    pub(super) backend_pid: i32,
}

/// A literal of the replication grammar, which has no escapes but the doubled quote.
pub(super) fn command_literal(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

/// Whether a login holds for this TLS connection alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Bound {
    Yes,
    No,
}

/// Which kinds of SCRAM-SHA-256 a server offers: bound to the channel, and not.
#[derive(Debug, Clone, Copy, Default)]
struct Offers {
    plus: bool,
    plain: bool,
}

fn offers(body: &AuthenticationSaslBody) -> io::Result<Offers> {
    let mut offers = Offers::default();
    let mut mechanisms = body.mechanisms();
    while let Some(mechanism) = mechanisms.next()? {
        offers.plus |= mechanism == SCRAM_SHA_256_PLUS;
        offers.plain |= mechanism == SCRAM_SHA_256;
    }
    Ok(offers)
}

fn texts(row: &postgres_protocol::message::backend::DataRowBody) -> io::Result<Vec<Option<String>>> {
    row.ranges().map(|range| Ok(range.map(|r| String::from_utf8_lossy(&row.buffer()[r]).into_owned()))).collect()
}

fn refused(at: &str, body: &postgres_protocol::message::backend::ErrorResponseBody) -> SourceError {
    match ServerError::parse(body.fields()) {
        Ok(error) => login_refused(at, error),
        Err(e) => garbage(format!("logging in to {at}"), e),
    }
}

pub(super) fn garbage(doing: String, error: io::Error) -> SourceError {
    SourceError::Unexpected { doing, what: error.to_string() }
}

pub(super) fn notice(notice: io::Result<ServerError>) {
    if let Ok(notice) = notice {
        tracing::debug!(code = notice.code, "postgres says: {}", notice.message);
    }
}

/// A command without its literals' tails: enough to recognise it.
fn shortened(sql: &str) -> String {
    const MOST: usize = 80;
    let line = sql.split_whitespace().collect::<Vec<_>>().join(" ");
    match line.char_indices().nth(MOST) {
        Some((at, _)) => format!("{}…", &line[..at]),
        None => line,
    }
}

pub(super) fn name(frame: &Frame) -> String {
    let name = match frame {
        Frame::Data(_) => "CopyData",
        Frame::CopyBoth => "CopyBothResponse",
        Frame::Other(message) => match message {
            Message::CommandComplete(_) => "CommandComplete",
            Message::CopyInResponse(_) => "CopyInResponse",
            Message::CopyOutResponse(_) => "CopyOutResponse",
            Message::CopyDone => "CopyDone",
            Message::DataRow(_) => "DataRow",
            Message::ReadyForQuery(_) => "ReadyForQuery",
            Message::AuthenticationSaslFinal(_) => "AuthenticationSASLFinal",
            _ => "another message",
        },
    };
    format!("{name} out of turn")
}

/// An ordinary connection of the same role came first: this one lacks what is special about it.
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

    /// Feeds `wire` in pieces of `piece` bytes, as a slow socket would.
    async fn frames(wire: &[u8], piece: usize, limit: usize) -> io::Result<(Vec<Bytes>, Inbound)> {
        let (mut far, near) = tokio::io::duplex(piece.max(1));
        let wire = wire.to_vec();
        let writing = tokio::spawn(async move { far.write_all(&wire).await });
        let mut reader: Reader = Box::new(near);
        let mut inbound = Inbound::with_limit(limit);
        let mut taken = Vec::new();
        loop {
            while let Some(frame) = inbound.next()? {
                if let Frame::Data(bytes) = frame {
                    taken.push(bytes);
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
            let (taken, _) = frames(&wire, piece, STREAM_FRAME_LIMIT).await.unwrap();
            assert!(taken.iter().zip(&bodies).all(|(a, b)| a == b) && taken.len() == bodies.len(), "{piece}");
        }
    }

    #[tokio::test]
    async fn a_small_frame_never_keeps_a_large_neighbour_alive() {
        let small = message(b'd', b"small");
        let mut wire = small.clone();
        wire.extend(message(b'd', &vec![1; 8 << 20]));
        wire.extend(&small);
        let (taken, _) = frames(&wire, 1 << 24, STREAM_FRAME_LIMIT).await.unwrap();
        let [before, large, after] = &taken[..] else { panic!("three frames") };
        assert_eq!((before.len(), large.len(), after.len()), (5, 8 << 20, 5));
        // The only way to see what shares a Bytes' memory.
        assert!(large.is_unique(), "the frames around it have memory of their own");
    }

    #[tokio::test]
    async fn a_claimed_gigabyte_costs_nothing_before_it_arrives() {
        let mut wire = vec![b'd'];
        wire.extend_from_slice(&(1u32 << 30).to_be_bytes());
        wire.extend_from_slice(&[0; 1000]);
        let (taken, inbound) = frames(&wire, 100, STREAM_FRAME_LIMIT).await.unwrap();
        assert!(taken.is_empty());
        assert!(inbound.buffer.capacity() <= 4 << 20, "{}", inbound.buffer.capacity());
        let over = frames(&wire, 100, QUERY_FRAME_LIMIT).await;
        assert!(over.err().is_some_and(|e| e.to_string().contains("claims")));
    }

    #[tokio::test]
    async fn many_small_frames_share_few_buffers() {
        let wire: Vec<u8> = (0..20_000).flat_map(|_| message(b'd', &[5; 95])).collect();
        let (taken, _) = frames(&wire, 1 << 22, STREAM_FRAME_LIMIT).await.unwrap();
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
            let mut inbound = Inbound::with_limit(QUERY_FRAME_LIMIT);
            inbound.buffer.extend_from_slice(&bytes);
            while let Ok(Some(frame)) = inbound.next() {
                match frame {
                    Frame::Other(Message::ErrorResponse(body)) => { let _ = ServerError::parse(body.fields()); }
                    Frame::Other(Message::DataRow(row)) => { let _ = texts(&row); }
                    Frame::Other(Message::AuthenticationSasl(body)) => { let _ = offers(&body); }
                    _ => {}
                }
            }
            inbound.make_room();
        }

        /// The messages that the server may send, with bodies that it would not.
        #[test]
        fn garbled_messages_never_panic(tag in proptest::sample::select(b"RESTDKNZC".to_vec()), body in proptest::collection::vec(any::<u8>(), 0..60)) {
            let mut inbound = Inbound::with_limit(QUERY_FRAME_LIMIT);
            inbound.buffer.extend_from_slice(&message(tag, &body));
            match inbound.next() {
                Ok(Some(Frame::Other(Message::ErrorResponse(body)))) => { let _ = ServerError::parse(body.fields()); }
                Ok(Some(Frame::Other(Message::DataRow(row)))) => { let _ = texts(&row); }
                Ok(Some(Frame::Other(Message::AuthenticationSasl(body)))) => { let _ = offers(&body); }
                _ => {}
            }
        }
    }

    #[test]
    fn a_literal_of_the_replication_grammar_has_no_backslash_escapes() {
        assert_eq!(command_literal(&escape_identifier(r#"a'b"c\d"#)), r#"'"a''b""c\d"'"#);
    }
}
