//! A socket on which nothing passes that is over its bounds: for libraries that buffer whatever a server claims.
//!
//! It knows no protocol: what passes is told to [`Bounds`], which follow the messages of one. When this is wrong, whoever
//! answers in place of a server can end the daemon.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// What a server may make us hold in memory, by the protocol that it speaks.
pub trait Bounds {
    /// Follows bytes on their way past, however the messages in them are cut.
    ///
    /// # Errors
    /// They are over the bounds: nothing more may be read.
    fn pass(&mut self, bytes: &[u8]) -> io::Result<()>;
}

pub struct Bounded<S, B> {
    socket: S,
    bounds: B,
}

impl<S, B: Bounds> Bounded<S, B> {
    pub fn new(socket: S, bounds: B) -> Self {
        Self { socket, bounds }
    }

    pub fn socket(&self) -> &S {
        &self.socket
    }
}

impl<S: AsyncRead + Unpin, B: Bounds + Unpin> AsyncRead for Bounded<S, B> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.socket).poll_read(cx, buf))?;
        Poll::Ready(self.bounds.pass(&buf.filled()[before..]))
    }
}

impl<S: AsyncWrite + Unpin, B: Bounds + Unpin> AsyncWrite for Bounded<S, B> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}
