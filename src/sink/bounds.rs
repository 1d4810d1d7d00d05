//! Limits how much memory a server's replies can make this process allocate.
//!
//! The writer counts what it reads itself. [`ReplyBounds`] are for the sockets of the redis crate, which buffers whatever a
//! server sends and allocates an array's announced length at once. It knows no commands. If the limits are too high,
//! whatever answers in place of Redis can exhaust the daemon's memory; if they are too low, large rows cannot be read.

use crate::bounded::Bounds;
use crate::resp::{ELEMENT_BYTES, MAX_DEPTH, MAX_LINE_BYTES, Malformed, number};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Limit for all replies to a login together.
pub(super) const LOGIN_BYTES: usize = 64 << 10;
/// Limit for a reply without rows. Pages of keys and checkpoints are the largest.
pub(super) const REPLY_BYTES: usize = 64 << 20;
/// Limit for a reply with one row. Redis accepts values of up to 512 MB unless `proto-max-bulk-len` was raised.
pub(super) const ROWS_BYTES: usize = 1 << 30;
/// Limit for all replies to a read of several rows together.
pub(super) const BATCH_BYTES: usize = 32 << 20;

/// Limits the replies to one request in total, on a connection that carries one request at a time.
#[derive(Debug, Clone)]
pub(super) struct Allowance {
    most: usize,
    left: Arc<AtomicUsize>,
}

impl Allowance {
    pub fn new(most: usize) -> Self {
        Self { most, left: Arc::new(AtomicUsize::new(most)) }
    }

    pub fn most(&self) -> usize {
        self.most
    }

    /// To be called before each request.
    pub fn renew(&self) {
        self.left.store(self.most, Ordering::Relaxed);
    }

    /// Whether the replies exceeded the limit and were cut off.
    pub fn is_spent(&self) -> bool {
        self.left.load(Ordering::Relaxed) == 0
    }

    fn spend(&self, bytes: usize) -> Result<(), Malformed> {
        let left = self.left.load(Ordering::Relaxed).saturating_sub(bytes);
        self.left.store(left, Ordering::Relaxed);
        if left == 0 { Err(Malformed::TooLong(self.most)) } else { Ok(()) }
    }
}

/// Counts replies as they pass.
#[derive(Debug)]
pub struct ReplyBounds {
    /// How many replies to the login are still expected.
    login: usize,
    most: usize,
    /// Bytes counted of the current reply, or of the whole login.
    taken: usize,
    /// Remaining elements of each open array, outermost first; never 0.
    open: Vec<u64>,
    line: Vec<u8>,
    /// Remaining bytes of a value, including its CRLF.
    value: usize,
    allowance: Option<Allowance>,
}

impl ReplyBounds {
    /// The first `login` replies belong to the login; each later one may have `most` bytes.
    pub fn new(login: usize, most: usize) -> Self {
        Self { login, most, taken: 0, open: Vec::new(), line: Vec::new(), value: 0, allowance: None }
    }

    /// In addition, all replies together must fit into `allowance`.
    pub(super) fn within(self, allowance: Option<Allowance>) -> Self {
        Self { allowance, ..self }
    }

    /// # Errors
    /// If the replies exceed the limits or are not valid RESP2. Nothing more may be read then.
    pub fn follow(&mut self, mut bytes: &[u8]) -> Result<(), Malformed> {
        if let Some(allowance) = &self.allowance {
            allowance.spend(bytes.len())?;
        }
        while !bytes.is_empty() {
            if self.value > 0 {
                let here = self.value.min(bytes.len());
                self.value -= here;
                bytes = &bytes[here..];
                if self.value == 0 {
                    self.element();
                }
                continue;
            }
            let end = memchr::memchr(b'\n', bytes).map(|feed| feed + 1);
            let (here, rest) = bytes.split_at(end.unwrap_or(bytes.len()));
            if self.line.len() + here.len() > MAX_LINE_BYTES {
                return Err(Malformed::Line);
            }
            self.line.extend_from_slice(here);
            bytes = rest;
            if end.is_some() {
                let line = std::mem::take(&mut self.line);
                self.line(&line)?;
                self.line = line;
                self.line.clear();
            }
        }
        Ok(())
    }

    fn line(&mut self, line: &[u8]) -> Result<(), Malformed> {
        let (Some((kind, text)), Some(b"\r\n")) = (line.split_first(), line.last_chunk()) else {
            return Err(Malformed::Line);
        };
        let text = text.strip_suffix(b"\r\n").unwrap_or_default();
        let length = || match number(text)? {
            -1 => Ok(None),
            n => usize::try_from(n).map(Some).map_err(|_| Malformed::Length),
        };
        self.take(line.len() + ELEMENT_BYTES)?;
        match kind {
            b'+' | b'-' | b':' => self.element(),
            b'$' => match length()? {
                Some(length) => {
                    self.take(length)?;
                    self.value = length + b"\r\n".len();
                }
                None => self.element(),
            },
            b'*' => match length()? {
                Some(0) | None => self.element(),
                Some(length) => {
                    if self.open.len() == MAX_DEPTH {
                        return Err(Malformed::Depth);
                    }
                    // Each element is counted again when it arrives.
                    let room = (self.most() - self.taken) / ELEMENT_BYTES;
                    if length > room {
                        return Err(Malformed::TooLong(self.most()));
                    }
                    self.open.push(length as u64);
                }
            },
            other => return Err(Malformed::Type(*other)),
        }
        Ok(())
    }

    fn most(&self) -> usize {
        if self.login > 0 { LOGIN_BYTES } else { self.most }
    }

    fn take(&mut self, bytes: usize) -> Result<(), Malformed> {
        let most = self.most();
        if bytes > most - self.taken {
            return Err(Malformed::TooLong(most));
        }
        self.taken += bytes;
        Ok(())
    }

    /// An element is complete, which may also complete the arrays that contain it.
    fn element(&mut self) {
        while let Some(left) = self.open.last_mut() {
            *left -= 1;
            if *left > 0 {
                return;
            }
            self.open.pop();
        }
        self.login = self.login.saturating_sub(1);
        if self.login == 0 {
            self.taken = 0;
        }
    }
}

impl Bounds for ReplyBounds {
    fn pass(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.follow(bytes).map_err(|why| io::Error::new(io::ErrorKind::InvalidData, why))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns whether these replies pass, regardless of how they are split into reads.
    fn pass(bounds: impl Fn() -> ReplyBounds, replies: &str) -> Result<(), Malformed> {
        let mut whole = bounds();
        let passed = whole.follow(replies.as_bytes());
        let mut cut = bounds();
        assert_eq!(replies.as_bytes().chunks(1).try_for_each(|byte| cut.follow(byte)), passed, "{replies:?}");
        passed
    }

    #[test]
    fn replies_within_their_bounds_pass() {
        let bounds = || ReplyBounds::new(0, 1000);
        let row = "*4\r\n$1\r\na\r\n$-1\r\n*2\r\n:1\r\n$0\r\n\r\n*0\r\n";
        for replies in ["", "+OK\r\n", "*-1\r\n", "-ERR no\r\n", "$3\r\n\r\n\n\r\n", row, &row.repeat(100)] {
            assert_eq!(pass(bounds, replies), Ok(()), "{replies:?}");
        }
    }

    #[test]
    fn what_would_take_too_much_is_refused_at_its_head() {
        let bounds = || ReplyBounds::new(0, 1000);
        let too_long = Err(Malformed::TooLong(1000));
        assert_eq!(pass(bounds, "$1000\r\n"), too_long);
        assert_eq!(pass(bounds, "*1000\r\n"), too_long);
        assert_eq!(pass(bounds, "*99999999999999\r\n"), too_long);
        assert_eq!(pass(bounds, "*3\r\n$400\r\n"), Ok(()));
        assert_eq!(pass(bounds, &format!("*3\r\n$400\r\n{}\r\n$400\r\n", "x".repeat(400))), too_long);
        assert_eq!(pass(bounds, &"*1\r\n".repeat(100)), too_long);
        assert_eq!(pass(|| ReplyBounds::new(0, 1 << 20), &"*1\r\n".repeat(MAX_DEPTH + 1)), Err(Malformed::Depth));
        assert_eq!(pass(|| ReplyBounds::new(0, 1 << 30), &"+".repeat(MAX_LINE_BYTES + 1)), Err(Malformed::Line));
        assert_eq!(pass(bounds, "%1\r\n"), Err(Malformed::Type(b'%')));
        assert_eq!(pass(bounds, "+a\n"), Err(Malformed::Line));
        assert_eq!(pass(bounds, "\n"), Err(Malformed::Line));
        assert_eq!(pass(bounds, "$x\r\n"), Err(Malformed::Number));
        assert_eq!(pass(bounds, "$-2\r\n"), Err(Malformed::Length));
    }

    #[test]
    fn an_allowance_is_for_all_replies_to_one_question() {
        let allowance = Allowance::new(100);
        let mut bounds = ReplyBounds::new(0, ROWS_BYTES).within(Some(allowance.clone()));
        let reply = format!("$40\r\n{}\r\n", "x".repeat(40));
        for _ in 0..3 {
            allowance.renew();
            assert_eq!(bounds.follow(reply.repeat(2).as_bytes()), Ok(()));
            assert!(!allowance.is_spent());
        }
        assert_eq!(bounds.follow(reply.as_bytes()), Err(Malformed::TooLong(100)));
        assert!(allowance.is_spent());
    }

    #[test]
    fn a_login_is_short_as_a_whole() {
        let long = format!("+{}\r\n", "x".repeat(LOGIN_BYTES / 2));
        let bounds = || ReplyBounds::new(2, ROWS_BYTES);
        assert_eq!(pass(bounds, &format!("{long}+OK\r\n{long}{long}$100000000\r\n")), Ok(()));
        assert_eq!(pass(bounds, &long.repeat(2)), Err(Malformed::TooLong(LOGIN_BYTES)));
        assert_eq!(pass(bounds, "+OK\r\n$100000\r\n"), Err(Malformed::TooLong(LOGIN_BYTES)));
    }
}
