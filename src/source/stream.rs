//! The running stream: one task that reads, decodes, hands over deliveries, and keeps reporting to the server that it
//! is alive.
//!
//! It does not know what happens to what it delivers: [`Feedback`] says what to confirm. A consumer that takes nothing
//! for minutes holds up reading only, so that `wal_sender_timeout` does not end a session that merely waits. A mistake
//! here ends sessions under load, lets memory grow with the backlog, or makes Postgres discard changes that nobody has
//! received.
//!
//! A dead network is detected by the kernel (see [`super::connect`]), not by silence: a walsender that decodes a large
//! transaction of other tables is silent for minutes, but healthy.
//!
//! <https://www.postgresql.org/docs/current/protocol-replication.html#PROTOCOL-REPLICATION-STANDBY-STATUS-UPDATE>

use super::assemble::{AssembleError, Assembler};
use super::pace::{NAP, Pace};
use super::socket::{Reader, Writer};
use super::thread;
use super::wire::{self, CopyBoth, Frame, Inbound};
use super::{ServerError, SourceError};
use crate::change::{Delivery, POSTGRES_EPOCH_SECONDS};
use crate::lsn::{AppliedLsn, EndLsn, Lsn, ReceivedLsn};
use crate::progress::ledger::ConfirmedLsn;
use crate::schema::QualifiedName;
use bytes::{BufMut, BytesMut};
use postgres_protocol::message::backend::Message;
use postgres_protocol::message::frontend;
use std::collections::HashSet;
use std::io;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::io::AsyncWriteExt;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::task::AbortOnDropHandle;

/// A status update is sent at least this often.
const STATUS_INTERVAL: Duration = Duration::from_secs(1);
/// Feedback that changes faster than this is combined: a confirmation may make the server write the slot to disk.
const FEEDBACK_INTERVAL: Duration = Duration::from_millis(20);
/// After this long without a byte from the server, status updates request a reply.
const SILENCE: Duration = Duration::from_secs(10);
/// How long an orderly end waits for the server's CopyDone.
const GOODBYE: Duration = Duration::from_secs(1);
/// Bytes of the stream that may be queued for the consumer; a message larger than this is queued alone.
const QUEUE_BYTES: usize = 4 << 20;
/// Bulk reads that may be queued for the consumer.
const QUEUE_ITEMS: usize = 64;

/// What to report to the server. Only the latest value counts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Feedback {
    /// Reported as flushed: the slot advances to it. The reported value never decreases, even if this one does.
    pub confirmed: Option<ConfirmedLsn>,
    /// Reported as applied, which `pg_stat_replication.replay_lsn` shows.
    pub applied: Option<AppliedLsn>,
    /// When it increases, the server is asked for a keepalive immediately, which says how far it has read the WAL.
    pub pings: u64,
}

/// The result of one bulk read.
#[derive(Debug)]
pub struct Delivered {
    pub items: Vec<Delivery>,
    /// Bytes of the stream that make up `items`: rows and the frames around them. Rows are slices of shared read
    /// buffers, so this is also the memory that they keep alive: its sum over everything received, used or not, is
    /// exact to within one read buffer (256 KiB).
    pub bytes: usize,
    /// Released when this is dropped.
    _capacity: Option<OwnedSemaphorePermit>,
}

impl Delivered {
    pub fn new(items: Vec<Delivery>, bytes: usize) -> Self {
        Self { items, bytes, _capacity: None }
    }
}

/// The session's progress.
#[derive(Debug, Clone, Copy)]
pub struct Contact {
    /// When the server was last heard from.
    pub at: Instant,
    /// How far the server said it had read the WAL; not all of that has been delivered.
    pub server: Option<Lsn>,
    /// The last whole transaction or position that was read.
    pub received: Option<ReceivedLsn>,
}

/// A running session. Dropping it closes the socket immediately, without an orderly end.
pub struct Stream {
    /// Closed when the session ends; [`Stream::ended`] then returns the reason.
    pub deliveries: mpsc::Receiver<Delivered>,
    pub feedback: watch::Sender<Feedback>,
    pub contact: watch::Receiver<Contact>,
    pub backend_pid: i32,
    stop: Option<oneshot::Sender<Option<ConfirmedLsn>>>,
    task: AbortOnDropHandle<SourceError>,
}

impl Stream {
    /// Returns why `deliveries` was closed, after waiting for that if necessary. To be called once.
    pub async fn ended(&mut self) -> SourceError {
        match (&mut self.task).await {
            Ok(error) => error,
            Err(error) => SourceError::unexpected("streaming", format!("the task failed: {error}")),
        }
    }

    /// Ends the session in order: sends a last confirmation, and waits up to a second for the server's answer.
    pub async fn finish(mut self, last: Option<ConfirmedLsn>) {
        if let Some(stop) = self.stop.take()
            && stop.send(last).is_ok()
        {
            let _ = (&mut self.task).await;
        }
    }
}

/// Runs a session on its own thread. Rows of tables other than those `followed` are not delivered.
pub fn spawn(copy: CopyBoth, followed: HashSet<QualifiedName>) -> Stream {
    let (queue, deliveries) = mpsc::channel(QUEUE_ITEMS);
    let (feedback, told) = watch::channel(Feedback::default());
    let (heard, contact) = watch::channel(Contact { at: Instant::now(), server: None, received: None });
    let (stop, stopped) = oneshot::channel();
    let backend_pid = copy.backend_pid;
    let session = Position {
        slot: copy.slot,
        from: copy.from,
        written: copy.from,
        flushed: None,
        applied: None,
        received: None,
        assembler: Assembler::new(followed),
        heard,
        reply_wanted: false,
        usual_items: 0,
    };
    let ends = Ends { reader: copy.reader, writer: copy.writer, inbound: copy.inbound };
    let task = thread::spawn(run(session, ends, queue, told, stopped));
    Stream { deliveries, feedback, contact, backend_pid, stop: Some(stop), task }
}

struct Ends {
    reader: Reader,
    writer: Writer,
    inbound: Inbound,
}

/// The session's state without its sockets, so that reading, writing and waiting can proceed concurrently.
struct Position {
    slot: String,
    from: EndLsn,
    /// The furthest position heard of. Reported as written, which has no consequences.
    written: EndLsn,
    flushed: Option<ConfirmedLsn>,
    applied: Option<AppliedLsn>,
    received: Option<ReceivedLsn>,
    assembler: Assembler,
    heard: watch::Sender<Contact>,
    /// The server requested a status update.
    reply_wanted: bool,
    /// Items of the last full read, to size the next vector.
    usual_items: usize,
}

/// Status updates to be sent to the server.
struct Updates {
    /// One at a time: a server that reads slowly gets the newest, not all of them.
    outbound: BytesMut,
    pings: u64,
    /// The next one asks the server for a keepalive.
    asks: bool,
    next: Instant,
    last: Instant,
}

impl Updates {
    fn new() -> Self {
        let now = Instant::now();
        Self { outbound: BytesMut::new(), pings: 0, asks: false, next: now, last: now }
    }

    fn write_when_due(&mut self, session: &mut Position) {
        let now = Instant::now();
        if self.outbound.is_empty() && (session.reply_wanted || self.asks || now >= self.next) {
            let silent = now.duration_since(session.heard.borrow().at) > SILENCE;
            session.reply_wanted = false;
            session.status(std::mem::take(&mut self.asks) || silent, &mut self.outbound);
            (self.last, self.next) = (now, now + STATUS_INTERVAL);
        }
    }

    fn told(&mut self, feedback: Feedback, session: &mut Position) {
        self.asks |= feedback.pings != self.pings;
        self.pings = feedback.pings;
        session.applied = session.applied.max(feedback.applied);
        if feedback.confirmed > session.flushed {
            session.flushed = feedback.confirmed;
            self.next = self.next.min(self.last + FEEDBACK_INTERVAL);
        }
    }
}

/// What was read and is to be handed to the consumer. Nothing more is read until the queue has capacity for it.
struct Arrivals {
    queue: mpsc::Sender<Delivered>,
    capacity: Arc<Semaphore>,
    waiting: Option<Delivered>,
    /// The session has ended: reported once `waiting` is delivered.
    end: Option<SourceError>,
    /// The bytes already read may contain whole messages.
    unread: bool,
    pace: Pace,
    naps: bool,
    /// When the last read had been processed.
    ready: Instant,
}

impl Arrivals {
    fn new(queue: mpsc::Sender<Delivered>) -> Self {
        Self {
            queue,
            capacity: Arc::new(Semaphore::new(QUEUE_BYTES)),
            waiting: None,
            end: None,
            // What the server sent after CopyBothResponse may have been read already.
            unread: true,
            pace: Pace::default(),
            naps: false,
            ready: Instant::now(),
        }
    }

    fn reads(&self) -> bool {
        self.waiting.is_none() && self.end.is_none()
    }

    /// Returns why the session has ended, once everything before that has been delivered.
    fn take_frames(&mut self, session: &mut Position, inbound: &mut Inbound) -> Option<SourceError> {
        if std::mem::take(&mut self.unread) {
            (self.waiting, self.end) = session.take_frames(inbound);
        }
        if self.waiting.is_none() { self.end.take() } else { None }
    }

    fn nap(&mut self) {
        if self.waiting.is_none() && std::mem::take(&mut self.naps) {
            // Blocks the thread, not the task: the runtime's timer cannot wait for less than a millisecond.
            std::thread::sleep(NAP);
            self.ready = Instant::now();
        }
    }

    fn has_read(&mut self, bytes: usize) {
        self.unread = true;
        let read = Instant::now();
        self.naps = self.pace.nap_after(bytes, read - self.ready);
        self.ready = read;
    }

    /// Hands over `waiting` once there is capacity. If dropped before that, it has handed over nothing.
    async fn hand_over(&mut self) {
        let bytes = self.waiting.as_ref().map_or(0, |d| d.bytes).clamp(1, QUEUE_BYTES);
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        let Ok(capacity) = Arc::clone(&self.capacity).acquire_many_owned(bytes).await else { return };
        // The session is ended by the code that awaits the closing of the queue, not here.
        let Ok(slot) = self.queue.reserve().await else { return std::future::pending().await };
        if let Some(mut delivered) = self.waiting.take() {
            delivered._capacity = Some(capacity);
            slot.send(delivered);
            self.ready = Instant::now();
        }
    }
}

async fn run(
    mut session: Position,
    ends: Ends,
    queue: mpsc::Sender<Delivered>,
    mut feedback: watch::Receiver<Feedback>,
    mut stopped: oneshot::Receiver<Option<ConfirmedLsn>>,
) -> SourceError {
    let Ends { mut reader, mut writer, mut inbound } = ends;
    let (mut updates, mut arrivals) = (Updates::new(), Arrivals::new(queue.clone()));
    let mut feedback_open = true;
    let timer = sleep_until(updates.next);
    tokio::pin!(timer);
    loop {
        if let Some(end) = arrivals.take_frames(&mut session, &mut inbound) {
            return end;
        }
        updates.write_when_due(&mut session);
        if timer.deadline() != updates.next {
            timer.as_mut().reset(updates.next);
        }
        arrivals.nap();
        let (waits, reads) = (arrivals.waiting.is_some(), arrivals.reads());
        tokio::select! {
            biased;
            last = &mut stopped => {
                // The handle was dropped without `finish`: the task is about to be aborted.
                let Ok(last) = last else { return session.shut() };
                session.flushed = session.flushed.max(last);
                let goodbye = session.goodbye(&mut reader, &mut writer, &mut inbound, &mut updates.outbound);
                let _ = timeout(GOODBYE, goodbye).await;
                return session.shut();
            }
            () = queue.closed() => return session.shut(),
            written = write_out(&mut writer, &mut updates.outbound), if !updates.outbound.is_empty() => {
                if let Err(source) = written {
                    return session.lost(source);
                }
            }
            changed = feedback.changed(), if feedback_open => {
                feedback_open = changed.is_ok();
                updates.told(*feedback.borrow_and_update(), &mut session);
            }
            () = &mut timer => {}
            () = arrivals.hand_over(), if waits => {}
            read = inbound.read_from(&mut reader), if reads => match read {
                Ok(0) => return session.lost(io::ErrorKind::UnexpectedEof.into()),
                Ok(bytes) => arrivals.has_read(bytes),
                Err(source) => return session.lost(source),
            },
        }
    }
}

/// Cancelling it loses nothing: `outbound` keeps what has not been written.
async fn write_out(writer: &mut Writer, outbound: &mut BytesMut) -> io::Result<()> {
    writer.write_all_buf(outbound).await?;
    writer.flush().await
}

impl Position {
    /// Takes every whole message out of the bytes read. Messages that precede an end are delivered before it.
    fn take_frames(&mut self, inbound: &mut Inbound) -> (Option<Delivered>, Option<SourceError>) {
        let mut items = Vec::with_capacity(self.usual_items);
        let mut bytes = 0;
        let mut server = None;
        let end = loop {
            match inbound.next(|head| self.assembler.is_foreign(head)) {
                Ok(Some(Frame::Unwanted(head))) => {
                    if let Err(error) = self.assembler.pass_over(&head, &mut items) {
                        break Some(self.garbled(error));
                    }
                }
                Ok(Some(Frame::Data(frame))) => {
                    let length = frame.len();
                    let before = items.len();
                    match self.assembler.take(frame, &mut items) {
                        Ok(taken) => {
                            self.reply_wanted |= taken.reply_requested;
                            server = server.max(taken.server_end);
                            // A walsender starts reading the WAL far before the position where it starts sending, and
                            // reports that.
                            if matches!(items[before..], [Delivery::Position(end)] if end < self.from) {
                                items.truncate(before);
                            }
                            if items.len() > before {
                                bytes += length;
                            }
                        }
                        Err(error) => break Some(self.garbled(error)),
                    }
                }
                Ok(Some(frame)) => match self.other(frame) {
                    None => {}
                    end => break end,
                },
                Ok(None) => break None,
                Err(e) => break Some(wire::garbage(self.doing(), e)),
            }
        };
        let received = items.iter().rev().find_map(|item| match item {
            Delivery::Commit { end, .. } | Delivery::Position(end) => Some(ReceivedLsn(*end)),
            Delivery::Begin(_) | Delivery::Relation(_) | Delivery::Change(_) | Delivery::Mark(_) => None,
        });
        self.received = self.received.max(received);
        self.written = self.written.max(server.map_or(self.written, EndLsn));
        let received = self.received;
        self.heard.send_modify(|contact| {
            *contact = Contact { at: Instant::now(), server: contact.server.max(server), received };
        });
        self.usual_items = items.len();
        ((!items.is_empty()).then(|| Delivered::new(items, bytes)), end)
    }

    /// Handles a message other than CopyData; returns `Some` if it ends the session.
    fn other(&self, frame: Frame) -> Option<SourceError> {
        match frame {
            Frame::Other(Message::NoticeResponse(body)) => {
                wire::notice(ServerError::parse(body.fields()));
                None
            }
            Frame::Other(Message::ParameterStatus(_)) => None,
            Frame::Other(Message::ErrorResponse(body)) => Some(match ServerError::parse(body.fields()) {
                Ok(error) => {
                    SourceError::Stream { slot: self.slot.clone(), received: self.received.map(|r| r.0), error }
                }
                Err(e) => wire::garbage(self.doing(), e),
            }),
            // At a shutdown, a walsender that has sent everything sends this without a CopyDone.
            Frame::Other(Message::CommandComplete(_) | Message::CopyDone) => {
                Some(SourceError::Shutdown { slot: self.slot.clone() })
            }
            frame => Some(SourceError::unexpected(self.doing(), wire::name_of(&frame))),
        }
    }

    fn status(&self, ask: bool, out: &mut BytesMut) {
        let flushed = self.flushed.map_or(0, |lsn| lsn.end().0.get());
        // The ledger may hold back the confirmation of what is applied, never the other way round.
        let applied = self.applied.map_or(0, |lsn| lsn.0.0.get()).max(flushed);
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let micros = i64::try_from(since_epoch.as_micros()).unwrap_or(i64::MAX);
        // Tag, length, then the message: 1 + 3 × 8 + 8 + 1 bytes.
        out.put_u8(b'd');
        out.put_u32(4 + 34);
        out.put_u8(b'r');
        out.put_u64(self.written.0.get().max(applied));
        out.put_u64(flushed);
        out.put_u64(applied);
        out.put_i64(micros.saturating_sub(POSTGRES_EPOCH_SECONDS * 1_000_000));
        out.put_u8(u8::from(ask));
    }

    /// Sends a last status and CopyDone, and discards everything that arrives until the server's own CopyDone, which
    /// shows that it has processed the status.
    async fn goodbye(
        &self,
        reader: &mut Reader,
        writer: &mut Writer,
        inbound: &mut Inbound,
        outbound: &mut BytesMut,
    ) -> io::Result<()> {
        self.status(false, outbound);
        frontend::copy_done(outbound);
        // A server that is sending reads nothing until some of its output has been read.
        let (written, answered) = tokio::join!(write_out(writer, outbound), async {
            loop {
                match inbound.next(|_| true)? {
                    Some(Frame::Data(_) | Frame::Unwanted(_) | Frame::Other(Message::NoticeResponse(_))) => {}
                    Some(_) => return Ok(()),
                    None if inbound.read_from(reader).await? == 0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                    None => {}
                }
            }
        });
        written.and(answered)?;
        frontend::terminate(outbound);
        write_out(writer, outbound).await
    }

    fn garbled(&self, error: AssembleError) -> SourceError {
        SourceError::Garbled { slot: self.slot.clone(), received: self.received.map(|r| r.0), error }
    }

    fn doing(&self) -> String {
        format!("streaming slot {}", self.slot)
    }

    fn lost(&self, source: io::Error) -> SourceError {
        SourceError::Lost { doing: self.doing(), source }
    }

    /// The session is ended from this side: nobody asks for the reason.
    fn shut(&self) -> SourceError {
        self.lost(io::ErrorKind::ConnectionAborted.into())
    }
}
