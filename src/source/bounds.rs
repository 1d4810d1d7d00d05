//! Limits how much memory a server can make this process allocate: the length of its messages, by type and state of the
//! login, and the total of those that are kept.
//!
//! It knows the message types of the frontend/backend protocol, but nothing about their contents. The replication
//! session checks each message before reading it; [`MessageBounds`] does so for the sockets of tokio-postgres, which buffers
//! whatever a server announces. If the limits are too high, whatever answers in place of Postgres can exhaust the
//! daemon's memory; if they are too low, large answers of Postgres itself are refused.
//!
//! <https://www.postgresql.org/docs/current/protocol-message-formats.html>

use crate::bounded::{Bounded, Bounds};
use postgres_protocol::message::backend::{
    AUTHENTICATION_TAG, COPY_DATA_TAG, DATA_ROW_TAG, Header, PARAMETER_STATUS_TAG, READY_FOR_QUERY_TAG,
};
use std::io;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_postgres::tls::{ChannelBinding, TlsStream};

/// Type and length of a message.
pub(super) const HEADER_BYTES: usize = 5;

/// The limit during the login is that of libpq:
/// <https://git.postgresql.org/gitweb/?p=postgresql.git;a=blob;f=src/interfaces/libpq/fe-connect.c>
const AUTHENTICATION_BYTES: usize = 2_000;
const LOGIN_MESSAGE_BYTES: usize = 30_000;
/// Limit for a whole login, in which Postgres reports about 20 parameters.
const LOGIN_BYTES: usize = 1 << 20;
/// Errors may be long, because they quote values.
const MESSAGE_BYTES: usize = 16 << 20;
/// Postgres builds a message in a buffer of at most 1 GB (`MaxAllocSize`), and adds small headers.
const DATA_BYTES: usize = (1 << 30) + (1 << 20);
/// Limit for all rows of an answer that is kept as a whole. Such answers come from catalogs, never from user tables.
const ANSWER_BYTES: usize = 32 << 20;
/// Bytes of memory that a row takes besides its values.
const ROW_BYTES: usize = 128;
/// Limit for all parameters reported after the login, which happens when the server's configuration changes.
const PARAMETER_BYTES: usize = 1 << 20;

/// What one session has received so far.
#[derive(Debug, Default)]
pub(super) struct SessionBounds {
    logged_in: bool,
    login: usize,
    answer: usize,
    parameters: usize,
}

impl SessionBounds {
    /// Checks whether a message of this type and length, including its header, may be read.
    #[inline]
    pub fn check(&self, tag: u8, length: usize) -> io::Result<()> {
        let (most, held) = match tag {
            AUTHENTICATION_TAG => (AUTHENTICATION_BYTES, 0),
            _ if !self.logged_in && length > LOGIN_MESSAGE_BYTES => (LOGIN_MESSAGE_BYTES, 0),
            _ if !self.logged_in => (LOGIN_BYTES, self.login),
            COPY_DATA_TAG => (DATA_BYTES, 0),
            DATA_ROW_TAG => (ANSWER_BYTES, self.answer),
            PARAMETER_STATUS_TAG => (PARAMETER_BYTES, self.parameters),
            _ => (MESSAGE_BYTES, 0),
        };
        if length <= most.saturating_sub(held) {
            return Ok(());
        }
        let more = if held > 0 { format!(" after {held} others") } else { String::new() };
        let message = format!("a message of type {:?} claims {length} bytes{more}", char::from(tag));
        Err(io::Error::new(io::ErrorKind::InvalidData, message))
    }

    /// Counts a message that passed [`Self::check`].
    #[inline]
    pub fn took(&mut self, tag: u8, length: usize) {
        match tag {
            READY_FOR_QUERY_TAG => (self.logged_in, self.answer) = (true, 0),
            _ if !self.logged_in => self.login += length,
            DATA_ROW_TAG => self.answer += length + ROW_BYTES,
            PARAMETER_STATUS_TAG => self.parameters += length,
            _ => {}
        }
    }
}

/// Returns the total length of a message, including its header.
#[inline]
pub(super) fn length_of(header: Header) -> usize {
    // The length covers itself but not the type byte; the parser has rejected values below 4.
    usize::try_from(header.len()).unwrap_or(0) + 1
}

/// Follows the messages of a session on their way past, and holds them to its [`SessionBounds`].
#[derive(Debug, Default)]
pub(super) struct MessageBounds {
    session: SessionBounds,
    /// What has arrived of the next message's header.
    header: Vec<u8>,
    /// Remaining bytes of the last message.
    left: usize,
}

impl Bounds for MessageBounds {
    fn pass(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        loop {
            let body = self.left.min(bytes.len());
            self.left -= body;
            bytes = &bytes[body..];
            if bytes.is_empty() {
                return Ok(());
            }
            let head = (HEADER_BYTES - self.header.len()).min(bytes.len());
            self.header.extend_from_slice(&bytes[..head]);
            bytes = &bytes[head..];
            let Some(header) = Header::parse(&self.header)? else { return Ok(()) };
            let length = length_of(header);
            self.session.check(header.tag(), length)?;
            self.session.took(header.tag(), length);
            self.header.clear();
            self.left = length - HEADER_BYTES;
        }
    }
}

impl<S: TlsStream + AsyncRead + AsyncWrite + Unpin> TlsStream for Bounded<S, MessageBounds> {
    fn channel_binding(&self) -> ChannelBinding {
        self.socket().channel_binding()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Passes messages by type and length, each in pieces, and returns the error if one was refused.
    fn refused(messages: &[(u8, usize)]) -> Option<String> {
        let mut bounds = MessageBounds::default();
        for &(tag, length) in messages {
            let mut message = vec![tag];
            message.extend_from_slice(&u32::try_from(length - 1).unwrap().to_be_bytes());
            for byte in message {
                if let Err(error) = bounds.pass(&[byte]) {
                    return Some(error.to_string());
                }
            }
            // Skips its body without allocating it.
            bounds.left = 0;
        }
        None
    }

    #[test]
    fn a_login_is_short_and_only_data_is_long() {
        let ready = (b'Z', 6);
        let gigabyte = 1 << 30;
        for (messages, passes) in [
            (vec![(b'R', 2_000)], true),
            (vec![(b'R', 2_001)], false),
            (vec![(b'E', 30_000)], true),
            (vec![(b'E', 30_001)], false),
            (vec![(b'd', 30_001)], false),
            (vec![(b'S', 20_000); 52], true),
            (vec![(b'S', 20_000); 53], false),
            (vec![ready, (b'E', 1 << 20)], true),
            (vec![ready, (b'E', gigabyte)], false),
            (vec![ready, (b'd', gigabyte), (b'd', gigabyte)], true),
            (vec![ready, (b'd', (1 << 31) - 1)], false),
            (vec![ready, (b'D', 20 << 20)], true),
            (vec![ready, (b'D', 20 << 20), ready, (b'D', 20 << 20)], true),
            (vec![ready, (b'D', 20 << 20), (b'D', 20 << 20)], false),
            ([vec![ready], vec![(b'D', 7); 300_000]].concat(), false),
            ([vec![ready], vec![(b'S', 20_000); 53]].concat(), false),
        ] {
            assert_eq!(refused(&messages).is_none(), passes, "{:?} of {}", messages.last(), messages.len());
        }
        let claim = refused(&[(b'R', gigabyte)]);
        assert_eq!(claim.as_deref(), Some("a message of type 'R' claims 1073741824 bytes"));
    }

    #[test]
    fn a_length_below_its_own_is_refused() {
        assert!(MessageBounds::default().pass(b"R\0\0\0\x03").is_err());
    }
}
