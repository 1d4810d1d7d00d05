//! Assembles tokens into replies, and judges the replies to a transaction.
//!
//! It knows no sockets and never panics. If it overlooked an error reply, a batch would count as applied without being
//! so.

use super::reply::ErrorReply;
use crate::resp::{MAX_DEPTH, Malformed, Token};
use bytes::Bytes;
use std::ops::ControlFlow;

/// A complete reply.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    Status(Bytes),
    Error(ErrorReply),
    Integer(i64),
    Bulk(Bytes),
    Nil,
    Array(Vec<Reply>),
}

impl Reply {
    /// Describes the reply for a message: its kind, and its value only if that cannot contain row data.
    pub fn describe(&self) -> String {
        match self {
            Reply::Status(text) if text.iter().all(u8::is_ascii_uppercase) => {
                format!("the status {}", text.escape_ascii())
            }
            // It may repeat what was sent.
            Reply::Status(text) => format!("a status of {} bytes", text.len()),
            Reply::Error(reply) => format!("the error {reply}"),
            Reply::Integer(n) => format!("the number {n}"),
            Reply::Bulk(bytes) => format!("a value of {} bytes", bytes.len()),
            Reply::Nil => "nothing".to_owned(),
            Reply::Array(items) => format!("an array of {}", items.len()),
        }
    }
}

fn error_reply(text: &[u8]) -> ErrorReply {
    ErrorReply::received(text)
}

/// Assembles a known number of replies. Limiting their size is up to the caller.
#[derive(Debug)]
pub struct Replies {
    wanted: usize,
    /// `None`: the bytes that were expected.
    done: Vec<Option<Reply>>,
    /// The open arrays, outermost first: the elements so far, and how many remain.
    open: Vec<(Vec<Reply>, u64)>,
}

impl Replies {
    pub fn new(wanted: usize) -> Self {
        Replies { wanted, done: Vec::with_capacity(wanted), open: Vec::new() }
    }

    /// Returns `Break` with the last token.
    pub fn take(&mut self, token: Token<'_>) -> Result<ControlFlow<()>, Malformed> {
        let mut reply = match token {
            Token::Status(text) => Reply::Status(Bytes::copy_from_slice(text)),
            Token::Error(text) => Reply::Error(error_reply(text)),
            Token::Integer(n) => Reply::Integer(n),
            // What every call of the script answers.
            Token::Bulk(b"ok") => Reply::Bulk(Bytes::from_static(b"ok")),
            Token::Bulk(bytes) => Reply::Bulk(Bytes::copy_from_slice(bytes)),
            Token::Nil => Reply::Nil,
            Token::Array(0) => Reply::Array(Vec::new()),
            Token::Array(n) => {
                if self.open.len() == MAX_DEPTH {
                    return Err(Malformed::Depth);
                }
                self.open.push((Vec::new(), n));
                return Ok(ControlFlow::Continue(()));
            }
        };
        while let Some((mut items, left)) = self.open.pop() {
            items.push(reply);
            if left > 1 {
                self.open.push((items, left - 1));
                return Ok(ControlFlow::Continue(()));
            }
            reply = Reply::Array(items);
        }
        Ok(self.is_done(Some(reply)))
    }

    /// Returns the index of the reply that begins here; `None` in the middle of one.
    pub fn begins(&self) -> Option<usize> {
        self.open.is_empty().then_some(self.done.len())
    }

    /// The reply that begins here was recognized by its bytes.
    pub fn is_as_expected(&mut self) -> ControlFlow<()> {
        self.is_done(None)
    }

    fn is_done(&mut self, reply: Option<Reply>) -> ControlFlow<()> {
        self.done.push(reply);
        if self.done.len() == self.wanted { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }

    /// Returns all replies but those that were expected.
    pub fn into_vec(self) -> Vec<Reply> {
        self.done.into_iter().flatten().collect()
    }

    /// Returns all replies. `None`: as expected.
    pub fn into_differing(self) -> Vec<Option<Reply>> {
        self.done
    }
}

/// Follows the replies to `MULTI, commands…, EXEC` and to whatever comes after. Memory use is constant: out of hundreds
/// of thousands of replies, only the first wrong one is kept.
#[derive(Debug)]
pub struct Transaction {
    commands: usize,
    stage: Stage,
    /// The first command that was not queued, with the reason.
    not_queued: Option<(Place, ErrorReply)>,
    outcome: Option<Outcome>,
    trailing: Replies,
}

#[derive(Debug)]
enum Stage {
    Multi,
    /// The index of the command whose QUEUED is expected next.
    Queued(usize),
    Exec,
    Inside(ExecArray),
    Trailing,
}

/// The outcome of a transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    Applied,
    /// EXEC returned nil: a watched key was touched.
    Discarded,
    /// EXEC applied nothing.
    Refused {
        at: Place,
        reply: ErrorReply,
    },
    /// EXEC applied everything except the command at this index, and perhaps later ones.
    Torn {
        at: usize,
        reply: ErrorReply,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    Multi,
    /// Counted from 0.
    Command(usize),
    Exec,
}

impl Transaction {
    /// `trailing` is the number of replies after EXEC's; at least one.
    pub fn new(commands: usize, trailing: usize) -> Self {
        Transaction { commands, stage: Stage::Multi, not_queued: None, outcome: None, trailing: Replies::new(trailing) }
    }

    /// Returns `Break` with the last token.
    #[inline]
    pub fn take(&mut self, token: Token<'_>) -> Result<ControlFlow<()>, Malformed> {
        match &mut self.stage {
            Stage::Multi => self.prepared(Place::Multi, b"OK", 0, token)?,
            &mut Stage::Queued(n) => self.prepared(Place::Command(n), b"QUEUED", n + 1, token)?,
            Stage::Exec => self.exec(token)?,
            Stage::Inside(array) => {
                if array.take(token, self.commands)? == ControlFlow::Break(()) {
                    let outcome = match array.failed.take() {
                        None => Outcome::Applied,
                        Some((at, reply)) => Outcome::Torn { at, reply },
                    };
                    self.conclude(outcome);
                }
            }
            Stage::Trailing => return self.trailing.take(token),
        }
        Ok(ControlFlow::Continue(()))
    }

    fn prepared(&mut self, place: Place, wanted: &[u8], next: usize, token: Token<'_>) -> Result<(), Malformed> {
        match token {
            Token::Status(text) if text == wanted => {}
            Token::Error(text) => {
                self.not_queued.get_or_insert_with(|| (place, error_reply(text)));
            }
            // The command was executed at once, for example because MULTI failed.
            _ => return Err(Malformed::OutOfPlace),
        }
        self.stage = if next < self.commands { Stage::Queued(next) } else { Stage::Exec };
        Ok(())
    }

    fn exec(&mut self, token: Token<'_>) -> Result<(), Malformed> {
        let outcome = match token {
            Token::Nil => Outcome::Discarded,
            Token::Error(text) => {
                // The first command that was not queued has the reason; EXEC only says that there was one.
                let (at, reply) = self.not_queued.take().unwrap_or_else(|| (Place::Exec, error_reply(text)));
                Outcome::Refused { at, reply }
            }
            Token::Array(n) if usize::try_from(n) == Ok(self.commands) && self.not_queued.is_none() => {
                if n > 0 {
                    self.stage = Stage::Inside(ExecArray { open: vec![n], failed: None });
                    return Ok(());
                }
                Outcome::Applied
            }
            Token::Array(_) | Token::Status(_) | Token::Integer(_) | Token::Bulk(_) => {
                return Err(Malformed::OutOfPlace);
            }
        };
        self.conclude(outcome);
        Ok(())
    }

    fn conclude(&mut self, outcome: Outcome) {
        self.outcome = Some(outcome);
        self.stage = Stage::Trailing;
    }

    /// Returns the first command that Redis refused to queue, if EXEC has not been answered yet. Nothing was applied
    /// then, and nothing will be.
    pub fn not_queued(&self) -> Option<(usize, ErrorReply)> {
        match &self.not_queued {
            Some((Place::Command(n), reply)) => Some((*n, reply.clone())),
            // Without MULTI, commands are executed instead of queued.
            Some((Place::Multi | Place::Exec, _)) | None => None,
        }
    }

    /// Returns `None` before EXEC has been answered.
    pub fn finish(self) -> Option<(Outcome, Vec<Reply>)> {
        self.outcome.map(|outcome| (outcome, self.trailing.into_vec()))
    }
}

/// Follows the elements of EXEC's array.
#[derive(Debug)]
struct ExecArray {
    /// The remaining elements of each open array, outermost first; never 0.
    open: Vec<u64>,
    failed: Option<(usize, ErrorReply)>,
}

impl ExecArray {
    #[inline]
    fn take(&mut self, token: Token<'_>, commands: usize) -> Result<ControlFlow<()>, Malformed> {
        match token {
            Token::Array(n) if n > 0 => {
                if self.open.len() == MAX_DEPTH {
                    return Err(Malformed::Depth);
                }
                self.open.push(n);
                return Ok(ControlFlow::Continue(()));
            }
            Token::Error(text) => {
                if self.failed.is_none() {
                    let left = self.open.first().map_or(0, |&left| usize::try_from(left).unwrap_or(usize::MAX));
                    self.failed = Some((commands.saturating_sub(left), error_reply(text)));
                }
            }
            Token::Status(_) | Token::Integer(_) | Token::Bulk(_) | Token::Nil | Token::Array(_) => {}
        }
        while let Some(left) = self.open.last_mut() {
            *left = left.saturating_sub(1);
            if *left > 0 {
                return Ok(ControlFlow::Continue(()));
            }
            self.open.pop();
        }
        Ok(ControlFlow::Break(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resp::{MAX_LINE_BYTES, token};
    use proptest::prelude::*;

    fn write_reply(out: &mut Vec<u8>, reply: &Reply) {
        match reply {
            Reply::Status(text) => out.extend_from_slice(&[b"+", &text[..], b"\r\n"].concat()),
            Reply::Error(text) => out.extend_from_slice(format!("-{text}\r\n").as_bytes()),
            Reply::Integer(n) => out.extend_from_slice(format!(":{n}\r\n").as_bytes()),
            Reply::Bulk(bytes) => {
                out.extend_from_slice(format!("${}\r\n", bytes.len()).as_bytes());
                out.extend_from_slice(&[&bytes[..], b"\r\n"].concat());
            }
            Reply::Nil => out.extend_from_slice(b"$-1\r\n"),
            Reply::Array(items) => {
                out.extend_from_slice(format!("*{}\r\n", items.len()).as_bytes());
                items.iter().for_each(|item| write_reply(out, item));
            }
        }
    }

    /// Feeds `bytes` in pieces, as a socket would.
    fn feed(
        bytes: &[u8],
        piece: usize,
        mut take: impl FnMut(Token<'_>) -> Result<ControlFlow<()>, Malformed>,
    ) -> Result<ControlFlow<()>, Malformed> {
        let (mut at, mut end) = (0, 0);
        while end < bytes.len() {
            end = (end + piece).min(bytes.len());
            while let Some((token, len)) = token(&bytes[at..end])? {
                at += len;
                if take(token)?.is_break() {
                    return Ok(ControlFlow::Break(()));
                }
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    fn any_reply() -> impl Strategy<Value = Reply> {
        let leaf = prop_oneof![
            "[A-Za-z ]{0,20}".prop_map(|s| Reply::Status(s.into())),
            "[A-Z]{2,9} [a-z ]{0,20}".prop_map(|s| Reply::Error(ErrorReply::received(s.as_bytes()))),
            any::<i64>().prop_map(Reply::Integer),
            proptest::collection::vec(any::<u8>(), 0..40).prop_map(|b| Reply::Bulk(b.into())),
            Just(Reply::Nil),
        ];
        leaf.prop_recursive(4, 40, 6, |inner| proptest::collection::vec(inner, 0..6).prop_map(Reply::Array))
    }

    fn has_error(reply: &Reply) -> bool {
        match reply {
            Reply::Error(_) => true,
            Reply::Array(items) => items.iter().any(has_error),
            Reply::Status(_) | Reply::Integer(_) | Reply::Bulk(_) | Reply::Nil => false,
        }
    }

    proptest! {
        #[test]
        fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), piece in 1usize..50) {
            let mut replies = Replies::new(3);
            let _ = feed(&bytes, piece, |token| replies.take(token));
            let mut transaction = Transaction::new(2, 1);
            let _ = feed(&bytes, piece, |token| transaction.take(token));
        }

        #[test]
        fn likely_bytes_never_panic(bytes in "[-+:$*0-9\r\n]{0,60}", piece in 1usize..9) {
            let mut replies = Replies::new(3);
            let _ = feed(bytes.as_bytes(), piece, |token| replies.take(token));
            let all = format!("+OK\r\n+QUEUED\r\n*1\r\n{bytes}");
            let mut transaction = Transaction::new(1, 1);
            let _ = feed(all.as_bytes(), piece, |token| transaction.take(token));
        }

        #[test]
        fn replies_are_read_as_they_were_written(wanted in proptest::collection::vec(any_reply(), 1..5), piece in 1usize..50) {
            let mut bytes = Vec::new();
            wanted.iter().for_each(|reply| write_reply(&mut bytes, reply));
            let mut replies = Replies::new(wanted.len());
            prop_assert_eq!(feed(&bytes, piece, |token| replies.take(token)), Ok(ControlFlow::Break(())));
            prop_assert_eq!(replies.into_vec(), wanted);
        }

        #[test]
        fn every_prefix_needs_more(reply in any_reply(), cut in any::<prop::sample::Index>()) {
            let mut bytes = Vec::new();
            write_reply(&mut bytes, &reply);
            let mut replies = Replies::new(1);
            let prefix = &bytes[..cut.index(bytes.len())];
            prop_assert_eq!(feed(prefix, prefix.len().max(1), |t| replies.take(t)), Ok(ControlFlow::Continue(())));
        }

        #[test]
        fn no_error_inside_exec_is_overlooked(
            items in proptest::collection::vec(any_reply(), 1..8), piece in 1usize..50,
        ) {
            let mut bytes = b"+OK\r\n".to_vec();
            items.iter().for_each(|_| bytes.extend_from_slice(b"+QUEUED\r\n"));
            write_reply(&mut bytes, &Reply::Array(items.clone()));
            bytes.extend_from_slice(b"+OK\r\n");
            let mut transaction = Transaction::new(items.len(), 1);
            prop_assert_eq!(feed(&bytes, piece, |token| transaction.take(token)), Ok(ControlFlow::Break(())));
            let (outcome, _) = transaction.finish().unwrap();
            match (items.iter().position(has_error), outcome) {
                (None, Outcome::Applied) => {}
                (Some(first), Outcome::Torn { at, .. }) => prop_assert_eq!(at, first),
                other => prop_assert!(false, "{:?}", other),
            }
        }
    }

    /// Returns what these bytes mean as replies to a transaction of two commands, followed by one more reply.
    fn outcome(bytes: &str) -> Result<Option<Outcome>, Malformed> {
        let mut transaction = Transaction::new(2, 1);
        let _ = feed(bytes.as_bytes(), bytes.len(), |token| transaction.take(token))?;
        Ok(transaction.finish().map(|(outcome, _)| outcome))
    }

    #[test]
    fn only_a_whole_transaction_counts_as_applied() {
        const QUEUED: &str = "+OK\r\n+QUEUED\r\n+QUEUED\r\n";
        let refused = |at, text: &str| Outcome::Refused { at, reply: ErrorReply::received(text.as_bytes()) };
        let all = |rest: &str| outcome(&format!("{QUEUED}{rest}+OK\r\n")).unwrap().unwrap();
        assert_eq!(all("*2\r\n:1\r\n+OK\r\n"), Outcome::Applied);
        assert_eq!(all("*-1\r\n"), Outcome::Discarded);
        assert_eq!(all("-LOADING x\r\n"), refused(Place::Exec, "LOADING x"));
        assert_eq!(
            all("*2\r\n*2\r\n:1\r\n-ERR deep\r\n+OK\r\n"),
            Outcome::Torn { at: 0, reply: ErrorReply::received(b"ERR deep") }
        );
        assert_eq!(
            outcome("+OK\r\n+QUEUED\r\n-OOM no\r\n-EXECABORT x\r\n+OK\r\n").unwrap().unwrap(),
            refused(Place::Command(1), "OOM no")
        );
        for strange in ["*1\r\n:1\r\n", "*3\r\n:1\r\n:1\r\n:1\r\n", "+OK\r\n", ":1\r\n", "$1\r\na\r\n", "*0\r\n"] {
            assert_eq!(outcome(&format!("{QUEUED}{strange}")), Err(Malformed::OutOfPlace), "{strange}");
        }
        assert_eq!(outcome("-NOPERM multi\r\n:1\r\n"), Err(Malformed::OutOfPlace), "carried out, not queued");
        assert_eq!(outcome("+OK\r\n+OK\r\n"), Err(Malformed::OutOfPlace));
        assert_eq!(outcome(&format!("{QUEUED}*2\r\n:1\r\n+OK\r\n")), Ok(Some(Outcome::Applied)));
        assert_eq!(outcome(&format!("{QUEUED}*2\r\n:1\r\n")), Ok(None));
    }

    #[test]
    fn lengths_are_not_believed() {
        for bytes in
            ["$-2\r\n", "*-2\r\n", "$99999999999\r\n", "*99999999999999999999\r\n", "$1\r\nabc", ":\r\n", ":+1\r\n"]
        {
            assert!(token(bytes.as_bytes()).is_err(), "{bytes}");
        }
        for bytes in ["%1\r\n", "x", "+a\n", "\r\n"] {
            assert!(token(bytes.as_bytes()).is_err(), "{bytes}");
        }
        assert!(token(&[b'+'; MAX_LINE_BYTES + 2]).is_err());
        let mut replies = Replies::new(1);
        let nested = "*1\r\n".repeat(MAX_DEPTH + 1);
        assert_eq!(feed(nested.as_bytes(), 7, |token| replies.take(token)), Err(Malformed::Depth));
        let mut huge = Replies::new(1);
        assert_eq!(feed(b"*4000000000\r\n", 100, |token| huge.take(token)), Ok(ControlFlow::Continue(())));
    }
}
