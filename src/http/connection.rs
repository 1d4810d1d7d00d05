//! Connections: how many, how large, how long, and how they end.
//!
//! Every resource that an untrusted client can hold is bounded here: connections, the size and duration of a request's
//! head, idle time, and the time that a peer may take to read its answer. When all connections are in use, the one that
//! has been idle longest is closed, so that a client that tries to starve others loses its own connections. This module
//! must not know what is served.

use axum::http::header::CONTENT_TYPE;
use axum::response::Response;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use nix::errno::Errno;
use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Sleep;
use tokio_util::sync::CancellationToken;

/// A peer that reads less than this of its answer within [`HttpLimits::write_timeout`] is too slow: 130 kB a second.
const PACE_BYTES: usize = 4 << 20;

/// Limits on what clients may use.
#[derive(Debug, Clone)]
pub struct HttpLimits {
    /// When it is reached, the connection that has been idle longest is closed. Together with the daemon's other
    /// descriptors it stays below 1,024, the usual limit on a process's open files.
    pub connections: usize,
    /// Requests in flight at once, except those for health and metrics. Together with the streams they are fewer than
    /// the connections, so that health and metrics are always answered.
    pub requests: usize,
    /// Of those, requests that wait for a position: fewer, so that a client that occupies all of them does not keep
    /// others from reading. No address except this machine's gets more than half of them.
    pub waiting: usize,
    /// Open event streams; each occupies a connection until it ends. Addresses share them as they share `waiting`.
    pub streams: usize,
    /// Request line and headers: a read of a hundred keys of moderate length must fit.
    pub head_bytes: usize,
    pub headers: usize,
    pub body_bytes: u64,
    /// Large answers that their peers have not read yet, in total.
    pub answer_bytes: usize,
    /// For a request's head to arrive, and therefore also the idle timeout.
    pub head_timeout: Duration,
    pub body_timeout: Duration,
    /// A peer that reads almost nothing of its answer for this long is disconnected.
    pub write_timeout: Duration,
    /// For requests in flight when the server stops.
    pub drain: Duration,
}

impl Default for HttpLimits {
    fn default() -> Self {
        Self {
            connections: 900,
            requests: 700,
            waiting: 350,
            streams: 64,
            head_bytes: 64 << 10,
            headers: 64,
            body_bytes: 64 << 10,
            answer_bytes: 64 << 20,
            head_timeout: Duration::from_secs(30),
            body_timeout: Duration::from_secs(30),
            write_timeout: Duration::from_secs(30),
            drain: Duration::from_secs(2),
        }
    }
}

/// The peer's address, attached to every request.
#[derive(Debug, Clone, Copy)]
pub(super) struct ClientAddress(pub SocketAddr);

/// What is served.
pub(super) trait Serve: Clone + Send + Sync + 'static {
    fn answer(self, peer: ClientAddress, request: hyper::Request<Incoming>) -> impl Future<Output = Response> + Send;
}

/// Serves until `stop`, then lets requests in flight finish, for at most [`HttpLimits::drain`]. Each request goes to the
/// newest site.
pub(super) async fn serve(
    listener: TcpListener,
    sites: watch::Receiver<impl Serve>,
    limits: &HttpLimits,
    stop: &CancellationToken,
) {
    let open = Arc::new(OpenConnections::default());
    let graceful = GracefulShutdown::new();
    let mut connections = JoinSet::new();
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(limits.head_timeout)
        .max_header_size(limits.head_bytes)
        .max_buf_size(limits.head_bytes)
        .max_headers(limits.headers);

    while let Some((stream, peer)) = stop.run_until_cancelled(accept(&listener, &open, limits)).await {
        while connections.try_join_next().is_some() {}
        let line = open.add();
        let sites = sites.clone();
        let of_service = Arc::clone(&line);
        let service = service_fn(move |request: hyper::Request<Incoming>| {
            of_service.now(Doing::Working);
            let (site, line) = (sites.borrow().clone(), Arc::clone(&of_service));
            async move {
                let answer = site.answer(ClientAddress(peer), request).await;
                if !is_endless(&answer) {
                    line.now(Doing::Answering);
                }
                Ok::<_, std::convert::Infallible>(answer)
            }
        });
        let io = Paced { stream, line: Arc::clone(&line), limit: limits.write_timeout, blocked: None, taken: 0 };
        let connection = graceful.watch(http.serve_connection(TokioIo::new(io), service));
        let open = Arc::clone(&open);
        connections.spawn(async move {
            tokio::select! {
                ended = connection => {
                    if let Err(error) = ended {
                        tracing::debug!(%error, "connection ended");
                    }
                }
                () = line.cut.cancelled() => tracing::debug!(%peer, "connection closed to make room"),
            }
            open.remove(&line);
        });
    }
    drop(listener);
    if tokio::time::timeout(limits.drain, graceful.shutdown()).await.is_err() {
        tracing::debug!("requests were cut off at the stop");
    }
    connections.shutdown().await;
}

/// Accepts a connection, after closing an idle one if there is no capacity left.
async fn accept(listener: &TcpListener, open: &OpenConnections, limits: &HttpLimits) -> (TcpStream, SocketAddr) {
    loop {
        match listener.accept().await {
            // Every open connection has a request in flight: the new one is dropped, and its client may try again.
            Ok(_) if open.is_full(limits.connections) && !open.shed() => {}
            Ok((stream, peer)) => {
                // Answers are small and written whole; with Nagle's algorithm some would wait for the peer's delayed
                // ACK.
                let _ = stream.set_nodelay(true);
                return (stream, peer);
            }
            // Neither a connection that was reset while queued nor a lack of file descriptors ends the server.
            Err(error) => {
                tracing::debug!(%error, "a connection could not be accepted");
                if [Errno::EMFILE, Errno::ENFILE].iter().any(|&full| error.raw_os_error() == Some(full as i32)) {
                    open.shed();
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

fn is_endless(answer: &Response) -> bool {
    answer.headers().get(CONTENT_TYPE).is_some_and(|kind| kind == "text/event-stream")
}

// ------------------------------------------------------------------------------------------------ which one is closed

/// The connections that are open.
#[derive(Default)]
struct OpenConnections(Mutex<Lines>);

#[derive(Default)]
struct Lines {
    last: u64,
    all: HashMap<u64, Arc<OpenConnection>>,
}

struct OpenConnection {
    number: u64,
    /// What it is doing, and since when.
    doing: Mutex<(Doing, Instant)>,
    cut: CancellationToken,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Doing {
    /// For a request, or the rest of its head.
    Waiting,
    /// For its peer to read the rest of an answer.
    Answering,
    /// On a request in flight, or on an open stream.
    Working,
}

impl OpenConnection {
    fn now(&self, doing: Doing) {
        *self.doing.lock().unwrap_or_else(PoisonError::into_inner) = (doing, Instant::now());
    }

    fn doing(&self) -> (Doing, Instant) {
        *self.doing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl OpenConnections {
    fn lines(&self) -> MutexGuard<'_, Lines> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self) -> Arc<OpenConnection> {
        let mut lines = self.lines();
        lines.last += 1;
        let (number, doing) = (lines.last, Mutex::new((Doing::Waiting, Instant::now())));
        let line = Arc::new(OpenConnection { number, doing, cut: CancellationToken::new() });
        lines.all.insert(number, Arc::clone(&line));
        line
    }

    fn remove(&self, line: &OpenConnection) {
        self.lines().all.remove(&line.number);
    }

    fn is_full(&self, limit: usize) -> bool {
        self.lines().all.len() >= limit
    }

    /// Closes the connection that has waited longest for a request; if there is none, the one whose peer has left its
    /// answer unread longest. Returns `false` if all are working.
    fn shed(&self) -> bool {
        let mut lines = self.lines();
        let idle = lines.all.values().map(|line| (line.doing(), line.number));
        let oldest = idle.filter(|((doing, _), _)| *doing != Doing::Working).min();
        let line = oldest.and_then(|(_, number)| lines.all.remove(&number));
        line.inspect(|line| line.cut.cancel()).is_some()
    }
}

// ------------------------------------------------------------------------------------------------ slow peers

/// A stream whose writes fail once the peer has read less than [`PACE_BYTES`] within `limit`.
struct Paced {
    stream: TcpStream,
    line: Arc<OpenConnection>,
    limit: Duration,
    /// Runs while a write is blocked.
    blocked: Option<Pin<Box<Sleep>>>,
    /// Bytes taken since it started.
    taken: usize,
}

impl Paced {
    fn bounded(&mut self, cx: &mut Context<'_>, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if let Poll::Ready(written) = written {
            self.taken += *written.as_ref().unwrap_or(&0);
            if self.taken >= PACE_BYTES {
                self.on_pace();
            }
            return Poll::Ready(written);
        }
        let limit = self.limit;
        let blocked = self.blocked.get_or_insert_with(|| Box::pin(tokio::time::sleep(limit)));
        ready!(blocked.as_mut().poll(cx));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }

    fn on_pace(&mut self) {
        (self.blocked, self.taken) = (None, 0);
    }
}

impl AsyncRead for Paced {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Paced {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.bounded(cx, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.bounded(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    /// Called once everything is written.
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.on_pace();
        if self.line.doing().0 == Doing::Answering {
            self.line.now(Doing::Waiting);
        }
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
