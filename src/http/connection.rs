//! Connections: how many, how large, how long, and how they end.
//!
//! Everything a stranger can make us hold is bounded here: connections, the bytes and the time of a request's head,
//! idle time, and the time for which a peer may take none of its answer. It must not know what is served.

use axum::Router;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio::time::Sleep;
use tokio_util::sync::CancellationToken;

/// What one client may take.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Beyond it, connections wait in the kernel's queue.
    pub connections: usize,
    /// Open event streams; each holds a connection for good.
    pub streams: usize,
    /// Request line and headers: a hundred keys of some length must fit.
    pub head_bytes: usize,
    pub headers: usize,
    pub body_bytes: u64,
    /// For a request's head to arrive, and so also for an idle connection.
    pub head_timeout: Duration,
    /// A peer that takes no byte of its answer for so long is cut off.
    pub write_timeout: Duration,
    /// For requests in flight, at the stop.
    pub drain: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 1024,
            streams: 64,
            head_bytes: 64 << 10,
            headers: 64,
            body_bytes: 64 << 10,
            head_timeout: Duration::from_secs(30),
            write_timeout: Duration::from_secs(30),
            drain: Duration::from_secs(2),
        }
    }
}

/// Who is at the other end: goes with every request.
#[derive(Debug, Clone, Copy)]
pub(super) struct Peer(pub SocketAddr);

/// Serves until `stop`, then lets requests in flight finish, for [`Limits::drain`] at most.
pub(super) async fn serve(listener: TcpListener, router: Router, limits: &Limits, stop: &CancellationToken) {
    let slots = Arc::new(Semaphore::new(limits.connections));
    let graceful = GracefulShutdown::new();
    let mut connections = JoinSet::new();
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(limits.head_timeout)
        .max_header_size(limits.head_bytes)
        .max_buf_size(limits.head_bytes)
        .max_headers(limits.headers);

    while let Some((stream, peer, slot)) = accept(&listener, &slots, stop).await {
        while connections.try_join_next().is_some() {}
        let io = TokioIo::new(WriteDeadline { stream, limit: limits.write_timeout, blocked: None });
        let service = TowerToHyperService::new(router.clone());
        let service = service_fn(move |mut request: hyper::Request<Incoming>| {
            request.extensions_mut().insert(Peer(peer));
            service.call(request)
        });
        let connection = http.serve_connection(io, service);
        let connection = graceful.watch(connection);
        connections.spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "connection ended");
            }
            drop(slot);
        });
    }
    drop(listener);
    if tokio::time::timeout(limits.drain, graceful.shutdown()).await.is_err() {
        tracing::debug!("requests were cut off at the stop");
    }
    connections.shutdown().await;
}

/// `None` at the stop.
async fn accept(
    listener: &TcpListener,
    slots: &Arc<Semaphore>,
    stop: &CancellationToken,
) -> Option<(TcpStream, SocketAddr, OwnedSemaphorePermit)> {
    stop.run_until_cancelled(async {
        let slot = Arc::clone(slots).acquire_owned().await.expect("the semaphore is never closed");
        loop {
            match listener.accept().await {
                Ok((stream, peer)) => {
                    // Answers are small and written whole; without it some would wait for the peer's delayed ACK.
                    let _ = stream.set_nodelay(true);
                    return (stream, peer, slot);
                }
                // A connection that was reset while it waited, or no file descriptor left: neither ends the server.
                Err(error) => {
                    tracing::debug!(%error, "a connection could not be accepted");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
        }
    })
    .await
}

/// A stream whose writes fail once the peer has taken nothing for `limit`.
struct WriteDeadline {
    stream: TcpStream,
    limit: Duration,
    /// Runs while a write waits.
    blocked: Option<Pin<Box<Sleep>>>,
}

impl WriteDeadline {
    fn bounded(&mut self, cx: &mut Context<'_>, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if written.is_ready() {
            self.blocked = None;
            return written;
        }
        let limit = self.limit;
        let blocked = self.blocked.get_or_insert_with(|| Box::pin(tokio::time::sleep(limit)));
        ready!(blocked.as_mut().poll(cx));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl AsyncRead for WriteDeadline {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for WriteDeadline {
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

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
