//! RESP2, both ways: commands straight from row cells into one buffer, and a scanner for what comes back.
//!
//! The only module that knows RESP. It knows no socket: the scanner is told bytes and says "token", "need more" or
//! "no reply at all", and never panics. An error reply that it overlooked would let a batch count as applied.
//!
//! <https://redis.io/docs/latest/develop/reference/protocol-spec/>

use super::batch::{Limits, OwnKeys, TooLarge};
use super::packed;
use super::reply::ErrorReply;
use crate::change::{Cell, PartialRow, Row};
use crate::command::{Base, Command, DeadLetter, Key};
use crate::schema::{Layout, NullRule};
use bytes::{Bytes, BytesMut};
use std::ops::ControlFlow;

/// The head of a command with `n` arguments, its name among them.
pub fn header(out: &mut BytesMut, n: usize) {
    line(out, b'*', n);
}

pub fn bulk(out: &mut BytesMut, bytes: &[u8]) {
    line(out, b'$', bytes.len());
    out.extend_from_slice(bytes);
    out.extend_from_slice(b"\r\n");
}

fn line(out: &mut BytesMut, kind: u8, n: usize) {
    out.extend_from_slice(&[kind]);
    out.extend_from_slice(itoa::Buffer::new().format(n).as_bytes());
    out.extend_from_slice(b"\r\n");
}

pub fn bulk_number(out: &mut BytesMut, n: u64) {
    bulk(out, itoa::Buffer::new().format(n).as_bytes());
}

/// A command of few arguments.
pub fn command(out: &mut BytesMut, args: &[&[u8]]) {
    header(out, args.len());
    for arg in args {
        bulk(out, arg);
    }
}

/// Of a [`put`] that is not one RESTORE.
const COMMANDS_PER_PUT: usize = 3;

const DEL: &[u8] = b"*2\r\n$3\r\nDEL\r\n";
const PEXPIRE: &[u8] = b"*3\r\n$7\r\nPEXPIRE\r\n";
const HSET: &[u8] = b"$4\r\nHSET\r\n";
const HDEL: &[u8] = b"$4\r\nHDEL\r\n";

fn del(out: &mut BytesMut, key: &Key) {
    out.extend_from_slice(DEL);
    bulk(out, key.as_bytes());
}

fn pexpire(out: &mut BytesMut, key: &Key, ttl_ms: u64) {
    out.extend_from_slice(PEXPIRE);
    bulk(out, key.as_bytes());
    bulk_number(out, ttl_ms);
}

/// Writes a row: one RESTORE where the server and the row's size allow it, else DEL, HSET, PEXPIRE. Returns the number of
/// commands; nothing is written where it fails.
///
/// DEL comes first so that nothing of an older hash stays, and no HSET can meet another type inside EXEC.
pub fn put(out: &mut BytesMut, key: &Key, layout: &Layout, row: &Row, limits: &Limits) -> Result<usize, TooLarge> {
    if limits.packing.is_some_and(|packing| packed::put(out, key, layout, row, &packing)) {
        return Ok(1);
    }
    let mut values = Cursor::new(row.cells());
    // No cell is longer than its row.
    if row.len_bytes() > limits.value_bytes {
        for field in &layout.fields {
            limits.value(key, &field.name, values.at(field.cell).flatten())?;
        }
    }
    let fields = match layout.null {
        NullRule::Empty => layout.fields.len(),
        NullRule::Omit => layout.fields.iter().filter(|f| values.at(f.cell).flatten().is_some()).count(),
    };
    if fields == 0 {
        // Redis has no empty hash, and an HSET without fields is an error. Cannot happen: the key's columns are fields.
        for _ in 0..COMMANDS_PER_PUT {
            del(out, key);
        }
        return Ok(COMMANDS_PER_PUT);
    }
    del(out, key);
    header(out, 2 + 2 * fields);
    out.extend_from_slice(HSET);
    bulk(out, key.as_bytes());
    for field in &layout.fields {
        let value = match (values.at(field.cell).flatten(), layout.null) {
            (Some(text), _) => field.render.value(text),
            (None, NullRule::Empty) => b"",
            (None, NullRule::Omit) => continue,
        };
        bulk(out, &field.name);
        bulk(out, value);
    }
    pexpire(out, key, layout.ttl_ms);
    Ok(COMMANDS_PER_PUT)
}

/// The fields and values that one [`put`] of three commands leaves behind, in its order.
pub fn fields_of(put: &[u8]) -> Vec<(&[u8], &[u8])> {
    let mut rest = put;
    let mut next = || {
        let (token, len) = token(rest).ok()??;
        rest = &rest[len..];
        Some(token)
    };
    let mut fields = Vec::new();
    while let Some(Token::Array(n)) = next() {
        let arguments: Vec<&[u8]> = (0..n)
            .map_while(|_| match next() {
                Some(Token::Bulk(bytes)) => Some(bytes),
                _ => None,
            })
            .collect();
        if let [b"HSET", _key, pairs @ ..] = &arguments[..] {
            fields = pairs.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect();
        }
    }
    fields
}

/// Writes a command; returns how many replies it will get. Nothing is written where it fails.
pub fn encode(out: &mut BytesMut, command_: &Command, own: &OwnKeys, limits: &Limits) -> Result<usize, TooLarge> {
    match command_ {
        Command::Put { key, layout, row } => put(out, key, layout, row, limits),
        Command::Merge { key, base, layout, row } => merge(out, key, *base, layout, row, own, limits),
        Command::Keep { key, slot } => {
            command(out, &[b"COPY", key.as_bytes(), own.kept(*slot).as_bytes(), b"REPLACE"]);
            Ok(1)
        }
        Command::Delete { key } => {
            del(out, key);
            Ok(1)
        }
        Command::Renew { key, ttl_ms } => {
            pexpire(out, key, *ttl_ms);
            Ok(1)
        }
        Command::DeadLetter(letter) => dead_letter(out, letter, own, limits),
        Command::Remember { key, dead } => {
            command(out, &[b"HSET", own.dead_keys_of(key).as_bytes(), key.as_bytes(), &dead.to_json()]);
            Ok(1)
        }
        Command::Forget { key } => {
            command(out, &[b"HDEL", own.dead_keys_of(key).as_bytes(), key.as_bytes()]);
            Ok(1)
        }
        Command::Enter { table, entry } => {
            command(out, &[b"HSET", own.tables().as_bytes(), table.as_bytes(), entry]);
            Ok(1)
        }
    }
}

fn merge(
    out: &mut BytesMut,
    key: &Key,
    base: Base,
    layout: &Layout,
    row: &PartialRow,
    own: &OwnKeys,
    limits: &Limits,
) -> Result<usize, TooLarge> {
    let mut values = Cursor::new(row.cells());
    let (mut set, mut removed) = (0, 0);
    for field in &layout.fields {
        match (values.at(field.cell).unwrap_or(Cell::Null), layout.null) {
            (Cell::Unchanged, _) => {}
            (Cell::Null, NullRule::Omit) => removed += 1,
            (Cell::Null, NullRule::Empty) => set += 1,
            (Cell::Text(text), _) => {
                limits.value(key, &field.name, Some(text))?;
                set += 1;
            }
        }
    }
    let mut commands = 1;
    if let Base::Kept(slot) = base {
        command(out, &[b"RENAME", own.kept(slot).as_bytes(), key.as_bytes()]);
        commands += 1;
    }
    if set > 0 {
        header(out, 2 + 2 * set);
        out.extend_from_slice(HSET);
        bulk(out, key.as_bytes());
        for field in &layout.fields {
            let value = match (values.at(field.cell).unwrap_or(Cell::Null), layout.null) {
                (Cell::Text(text), _) => field.render.value(text),
                (Cell::Null, NullRule::Empty) => b"",
                (Cell::Null, NullRule::Omit) | (Cell::Unchanged, _) => continue,
            };
            bulk(out, &field.name);
            bulk(out, value);
        }
        commands += 1;
    }
    if removed > 0 {
        header(out, 2 + removed);
        out.extend_from_slice(HDEL);
        bulk(out, key.as_bytes());
        for field in &layout.fields {
            if layout.null == NullRule::Omit && values.at(field.cell).unwrap_or(Cell::Null) == Cell::Null {
                bulk(out, &field.name);
            }
        }
        commands += 1;
    }
    pexpire(out, key, layout.ttl_ms);
    Ok(commands)
}

/// Entries that the dead-letter stream keeps, about: `~` lets Redis trim whole nodes.
const DEAD_LETTERS: &[u8] = b"10000";

fn dead_letter(out: &mut BytesMut, letter: &DeadLetter, own: &OwnKeys, limits: &Limits) -> Result<usize, TooLarge> {
    let xid = itoa::Buffer::new().format(letter.xid).to_owned();
    let fields: [(&[u8], &[u8]); 6] = [
        (b"table", letter.table.as_bytes()),
        (b"key", &letter.key),
        (b"lsn", letter.lsn.as_bytes()),
        (b"xid", xid.as_bytes()),
        (b"reason", letter.reason.as_bytes()),
        (b"row", &letter.row),
    ];
    let key = own.dead();
    for (name, value) in fields {
        limits.value(key, name, Some(value))?;
    }
    header(out, 6 + 2 * fields.len());
    for arg in [b"XADD", key.as_bytes(), b"MAXLEN", b"~", DEAD_LETTERS, b"*"] {
        bulk(out, arg);
    }
    for (name, value) in fields {
        bulk(out, name);
        bulk(out, value);
    }
    Ok(1)
}

/// Cells by their place. Going forwards, as layouts mostly do, it walks the row once.
pub(super) struct Cursor<I> {
    start: I,
    at: I,
    next: usize,
}

impl<I: Iterator + Clone> Cursor<I> {
    pub fn new(cells: I) -> Self {
        Cursor { at: cells.clone(), start: cells, next: 0 }
    }

    #[inline]
    pub fn at(&mut self, cell: usize) -> Option<I::Item> {
        if cell < self.next {
            self.at = self.start.clone();
            self.next = 0;
        }
        let skip = cell - self.next;
        self.next = cell + 1;
        self.at.nth(skip)
    }
}

/// The name and the first argument of command number `index` in a buffer that this module wrote.
pub fn command_at(requests: &[u8], index: usize) -> Option<(Bytes, Option<Bytes>)> {
    let mut rest = requests;
    let mut next = || -> Option<Token<'_>> {
        let (token, len) = token(rest).ok()??;
        rest = &rest[len..];
        Some(token)
    };
    let mut args = |take: u64| -> Option<(Bytes, Option<Bytes>)> {
        let Token::Array(n) = next()? else { return None };
        let mut first = [None, None];
        for i in 0..n {
            let Token::Bulk(arg) = next()? else { return None };
            if i < take {
                first[usize::try_from(i).ok()?] = Some(Bytes::copy_from_slice(arg));
            }
        }
        let [name, key] = first;
        Some((name.unwrap_or_default(), key))
    };
    for _ in 0..index {
        args(0)?;
    }
    args(2)
}

/// The arguments of all commands in `requests`, without the commands' names: what a server may repeat in an error.
pub fn arguments(requests: &[u8]) -> Vec<&[u8]> {
    let (mut rest, mut arguments, mut is_name) = (requests, Vec::new(), false);
    while let Ok(Some((token, len))) = token(rest) {
        rest = &rest[len..];
        match token {
            Token::Array(_) => is_name = true,
            Token::Bulk(_) if is_name => is_name = false,
            Token::Bulk(argument) => arguments.push(argument),
            Token::Status(_) | Token::Error(_) | Token::Integer(_) | Token::Nil => {}
        }
    }
    arguments
}

/// Command number `index` in a buffer that this module wrote; empty where there is none.
pub fn request_at(requests: &[u8], index: usize) -> &[u8] {
    let (mut rest, mut at) = (requests, 0);
    let mut start = None;
    while let Ok(Some((token, len))) = token(rest) {
        if matches!(token, Token::Array(_)) {
            match start {
                Some(start) => return &requests[start..requests.len() - rest.len()],
                None if at == index => start = Some(requests.len() - rest.len()),
                None => {}
            }
            at += 1;
        }
        rest = &rest[len..];
    }
    start.map_or(&[], |start| &requests[start..])
}

/// The smallest piece of a reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Token<'a> {
    Status(&'a [u8]),
    Error(&'a [u8]),
    Integer(i64),
    Bulk(&'a [u8]),
    /// A missing value, or where an array should be, EXEC's refusal.
    Nil,
    /// That many replies follow, as elements.
    Array(u64),
}

/// The stream of replies makes no sense any more; the connection is of no use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    #[error("unknown type byte {0:#04x}")]
    Type(u8),
    #[error("a line without its end, or with a bare line feed")]
    Line,
    #[error("a number that is none")]
    Number,
    #[error("a length out of range")]
    Length,
    #[error("a value without its line end")]
    BulkEnd,
    #[error("arrays nested too deep")]
    Depth,
    #[error("a reply of more than {0} bytes")]
    TooLong(usize),
    #[error("a reply that does not belong to its command")]
    OutOfPlace,
}

/// Longer status and error lines are not taken for lines.
pub(super) const MAX_LINE_BYTES: usize = 64 << 10;
/// Nothing that we ask for is anywhere near that long.
const MAX_BULK_BYTES: i64 = 1 << 30;
pub(super) const MAX_DEPTH: usize = 32;
/// What a reply, or an element of one, takes in memory beside its own bytes.
pub(super) const ELEMENT_BYTES: usize = 64;

/// The first token of `input` and its length; `None`: need more.
#[inline]
pub fn token(input: &[u8]) -> Result<Option<(Token<'_>, usize)>, Malformed> {
    let Some((&kind, rest)) = input.split_first() else { return Ok(None) };
    if !matches!(kind, b'+' | b'-' | b':' | b'$' | b'*') {
        return Err(Malformed::Type(kind));
    }
    let Some(feed) = memchr::memchr(b'\n', rest) else {
        return if rest.len() > MAX_LINE_BYTES { Err(Malformed::Line) } else { Ok(None) };
    };
    let Some((text, b"\r")) = feed.checked_sub(1).map(|cr| rest[..feed].split_at(cr)) else {
        return Err(Malformed::Line);
    };
    let head = 1 + feed + 1;
    let token = match kind {
        b'+' => Token::Status(text),
        b'-' => Token::Error(text),
        b':' => Token::Integer(number(text)?),
        b'$' => match number(text)? {
            -1 => Token::Nil,
            len @ 0..=MAX_BULK_BYTES => {
                let len = usize::try_from(len).map_err(|_| Malformed::Length)?;
                return match (input.get(head..head + len), input.get(head + len..head + len + 2)) {
                    (Some(value), Some(b"\r\n")) => Ok(Some((Token::Bulk(value), head + len + 2))),
                    (Some(_), Some(_)) => Err(Malformed::BulkEnd),
                    _ => Ok(None),
                };
            }
            _ => return Err(Malformed::Length),
        },
        _ => match number(text)? {
            -1 => Token::Nil,
            n => Token::Array(u64::try_from(n).map_err(|_| Malformed::Length)?),
        },
    };
    Ok(Some((token, head)))
}

pub(super) fn number(text: &[u8]) -> Result<i64, Malformed> {
    let digits = text.strip_prefix(b"-").unwrap_or(text);
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return Err(Malformed::Number);
    }
    std::str::from_utf8(text).ok().and_then(|t| t.parse().ok()).ok_or(Malformed::Number)
}

/// A whole reply.
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
    /// For messages: the kind, and of the value only what cannot be row data.
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

/// Puts a known number of replies together. How large they may be is for whoever reads them to say.
#[derive(Debug)]
pub struct Replies {
    wanted: usize,
    done: Vec<Reply>,
    /// Arrays that are open, outermost first: elements so far, and how many are to come.
    open: Vec<(Vec<Reply>, u64)>,
}

impl Replies {
    pub fn new(wanted: usize) -> Self {
        Replies { wanted, done: Vec::with_capacity(wanted), open: Vec::new() }
    }

    /// `Break` with the last one.
    pub fn take(&mut self, token: Token<'_>) -> Result<ControlFlow<()>, Malformed> {
        let mut reply = match token {
            Token::Status(text) => Reply::Status(Bytes::copy_from_slice(text)),
            Token::Error(text) => Reply::Error(error_reply(text)),
            Token::Integer(n) => Reply::Integer(n),
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
        self.done.push(reply);
        Ok(if self.done.len() == self.wanted { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
    }

    pub fn into_vec(self) -> Vec<Reply> {
        self.done
    }
}

/// Watches the replies to `MULTI, commands…, EXEC` go by, and whatever follows. Memory stays flat: of hundreds of
/// thousands of replies only the first that is wrong is kept.
#[derive(Debug)]
pub struct Transaction {
    commands: usize,
    stage: Stage,
    /// The first command that was not queued, and why.
    not_queued: Option<(Place, ErrorReply)>,
    outcome: Option<Outcome>,
    trailing: Replies,
}

#[derive(Debug)]
enum Stage {
    Multi,
    /// The number of the command whose QUEUED comes next.
    Queued(usize),
    Exec,
    Inside(ExecArray),
    Trailing,
}

/// What became of a transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    Applied,
    /// EXEC returned nil: a watched key was touched.
    Discarded,
    /// EXEC did nothing.
    Refused {
        at: Place,
        reply: ErrorReply,
    },
    /// EXEC did all but the command of this number, and perhaps later ones.
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
    /// `trailing`: replies that follow EXEC's; at least one.
    pub fn new(commands: usize, trailing: usize) -> Self {
        Transaction { commands, stage: Stage::Multi, not_queued: None, outcome: None, trailing: Replies::new(trailing) }
    }

    /// `Break` with the last token.
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
            // Without MULTI, say: the command was carried out at once.
            _ => return Err(Malformed::OutOfPlace),
        }
        self.stage = if next < self.commands { Stage::Queued(next) } else { Stage::Exec };
        Ok(())
    }

    fn exec(&mut self, token: Token<'_>) -> Result<(), Malformed> {
        let outcome = match token {
            Token::Nil => Outcome::Discarded,
            Token::Error(text) => {
                // The first command that was not queued knows the reason; EXEC only says that there was one.
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

    /// The first command that Redis refused to queue, where EXEC has not been answered yet: nothing was applied, and
    /// nothing will be.
    pub fn not_queued(&self) -> Option<(usize, ErrorReply)> {
        match &self.not_queued {
            Some((Place::Command(n), reply)) => Some((*n, reply.clone())),
            // Without MULTI, commands are not queued but carried out.
            Some((Place::Multi | Place::Exec, _)) | None => None,
        }
    }

    /// `None` before EXEC has been answered.
    pub fn finish(self) -> Option<(Outcome, Vec<Reply>)> {
        self.outcome.map(|outcome| (outcome, self.trailing.into_vec()))
    }
}

/// EXEC's array on its way past.
#[derive(Debug)]
struct ExecArray {
    /// For each open array, outermost first, how many elements are still to come: never 0.
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

/// A MATCH pattern for keys that begin with `prefix`, whatever characters that has.
pub fn glob_of_prefix(prefix: &[u8]) -> Vec<u8> {
    let mut pattern = Vec::with_capacity(prefix.len() + 8);
    for &byte in prefix {
        if matches!(byte, b'*' | b'?' | b'[' | b']' | b'\\' | b'^' | b'-') {
            pattern.push(b'\\');
        }
        pattern.push(byte);
    }
    pattern.push(b'*');
    pattern
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::change::{NewRow, RowBuilder};
    use crate::schema::{Field, Render};
    use proptest::prelude::*;
    use std::sync::Arc;

    fn key(text: &str) -> Key {
        Key(Bytes::copy_from_slice(text.as_bytes()))
    }

    fn layout(null: NullRule, fields: &[(usize, &str, Render)]) -> Layout {
        let field = |&(cell, name, render): &(usize, &str, Render)| Field {
            cell,
            name: Bytes::copy_from_slice(name.as_bytes()),
            render,
        };
        Layout { fields: fields.iter().map(field).collect(), null, cells: 3, ttl_ms: 60_000 }
    }

    fn row(cells: &[Option<&str>]) -> Row {
        let mut row = RowBuilder::with_capacity(0);
        cells.iter().for_each(|cell| row.cell(cell.map(str::as_bytes)));
        row.row()
    }

    fn partial(cells: &[Cell<'_>]) -> PartialRow {
        let mut tuple = vec![0, u8::try_from(cells.len()).unwrap()];
        for cell in cells {
            match cell {
                Cell::Null => tuple.push(b'n'),
                Cell::Unchanged => tuple.push(b'u'),
                Cell::Text(text) => {
                    tuple.push(b't');
                    tuple.extend_from_slice(&u32::try_from(text.len()).unwrap().to_be_bytes());
                    tuple.extend_from_slice(text);
                }
            }
        }
        match NewRow::take(&mut Bytes::from(tuple)).unwrap() {
            NewRow::Partial(row) => row,
            NewRow::Full(_) => panic!("a cell must be unchanged"),
        }
    }

    /// Commands as words, read by an independent reader.
    fn words(mut resp: &[u8]) -> Vec<String> {
        let mut commands = Vec::new();
        while !resp.is_empty() {
            let mut next = |kind: u8| {
                let end = resp.iter().position(|&b| b == b'\r').unwrap();
                assert_eq!((resp[0], &resp[end..end + 2]), (kind, &b"\r\n"[..]));
                let n: usize = std::str::from_utf8(&resp[1..end]).unwrap().parse().unwrap();
                resp = &resp[end + 2..];
                if kind == b'*' {
                    return (n, String::new());
                }
                let word = String::from_utf8(resp[..n].to_vec()).unwrap();
                assert_eq!(&resp[n..n + 2], b"\r\n");
                resp = &resp[n + 2..];
                (n, word)
            };
            let (args, _) = next(b'*');
            commands.push((0..args).map(|_| next(b'$').1).collect::<Vec<_>>().join(" "));
        }
        commands
    }

    fn encoded(command: &Command) -> Vec<String> {
        let mut out = BytesMut::new();
        let replies = encode(&mut out, command, &OwnKeys::under("prefetchd:{s}:"), &Limits::default()).unwrap();
        let commands = words(&out);
        assert_eq!(replies, commands.len(), "{commands:?}");
        for (i, text) in commands.iter().enumerate() {
            let (name, _) = command_at(&out, i).unwrap();
            assert_eq!(name, text.split(' ').next().unwrap());
        }
        assert_eq!(command_at(&out, commands.len()), None);
        commands
    }

    const AS_IS: Render = Render::AsIs;

    #[test]
    fn a_row_replaces_all_of_the_hash() {
        let cells = [Some("1"), None, Some("t")];
        let put = |null, fields: &[(usize, &str, Render)]| {
            encoded(&Command::Put { key: key("k:1"), layout: Arc::new(layout(null, fields)), row: row(&cells) })
        };
        let fields = [(0, "id", AS_IS), (1, "name", AS_IS), (2, "on", Render::Boolean)];
        assert_eq!(put(NullRule::Empty, &fields), ["DEL k:1", "HSET k:1 id 1 name  on true", "PEXPIRE k:1 60000"]);
        assert_eq!(put(NullRule::Omit, &fields), ["DEL k:1", "HSET k:1 id 1 on true", "PEXPIRE k:1 60000"]);
        let backwards = [(2, "on", AS_IS), (0, "id", AS_IS), (0, "again", AS_IS)];
        assert_eq!(put(NullRule::Omit, &backwards)[1], "HSET k:1 on t id 1 again 1");
        assert_eq!(put(NullRule::Omit, &[(1, "name", AS_IS)]), ["DEL k:1"; 3], "never an HSET without fields");
    }

    #[test]
    fn a_merge_leaves_unchanged_cells_alone() {
        let fields = [(0, "id", AS_IS), (1, "name", AS_IS), (2, "on", Render::Boolean)];
        let merge = |base, null, cells: &[Cell<'_>]| {
            let layout = Arc::new(layout(null, &fields));
            encoded(&Command::Merge { key: key("k:1"), base, layout, row: partial(cells) })
        };
        let cells = [Cell::Text(b"1"), Cell::Null, Cell::Unchanged];
        assert_eq!(merge(Base::SameKey, NullRule::Empty, &cells), ["HSET k:1 id 1 name ", "PEXPIRE k:1 60000"]);
        assert_eq!(
            merge(Base::Kept(7), NullRule::Omit, &cells),
            ["RENAME prefetchd:{s}:tmp:7 k:1", "HSET k:1 id 1", "HDEL k:1 name", "PEXPIRE k:1 60000"]
        );
        let untouched = [Cell::Unchanged, Cell::Unchanged, Cell::Unchanged];
        assert_eq!(merge(Base::SameKey, NullRule::Omit, &untouched), ["PEXPIRE k:1 60000"]);
    }

    #[test]
    fn every_other_command_is_one_command() {
        assert_eq!(encoded(&Command::Keep { key: key("k"), slot: 3 }), ["COPY k prefetchd:{s}:tmp:3 REPLACE"]);
        assert_eq!(encoded(&Command::Delete { key: key("k") }), ["DEL k"]);
        assert_eq!(encoded(&Command::Renew { key: key("k"), ttl_ms: 5 }), ["PEXPIRE k 5"]);
        let letter = DeadLetter {
            table: "t".to_owned(),
            key: Bytes::from_static(b"k"),
            lsn: "0/1".to_owned(),
            xid: 9,
            reason: "r".to_owned(),
            row: Bytes::new(),
        };
        assert_eq!(
            encoded(&Command::DeadLetter(letter)),
            ["XADD prefetchd:{s}:dead MAXLEN ~ 10000 * table t key k lsn 0/1 xid 9 reason r row "]
        );
    }

    #[test]
    fn a_value_over_the_limit_writes_nothing() {
        let limits = Limits { value_bytes: 10, ..Limits::default() };
        let layout = layout(NullRule::Empty, &[(0, "a", AS_IS), (1, "b", AS_IS)]);
        let mut out = BytesMut::new();
        let fits = row(&[Some("0123456789"), Some("0123456789")]);
        put(&mut out, &key("k"), &layout, &fits, &limits).unwrap();
        out.clear();
        let error = put(&mut out, &key("k"), &layout, &row(&[Some(""), Some("01234567890")]), &limits).unwrap_err();
        assert_eq!(error, TooLarge::Value { key: key("k"), field: "b".to_owned(), bytes: 11, limit: 10 });
        let layout = Arc::new(layout);
        let row = partial(&[Cell::Text(b"01234567890"), Cell::Unchanged]);
        let merge = Command::Merge { key: key("k"), base: Base::Kept(0), layout, row };
        assert!(encode(&mut out, &merge, &OwnKeys::under("p:"), &limits).is_err());
        assert!(out.is_empty());
    }

    #[test]
    fn a_prefix_is_matched_literally() {
        assert_eq!(glob_of_prefix(b"a[b]*?\\^-:"), b"a\\[b\\]\\*\\?\\\\\\^\\-:*");
    }

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

    /// What a transaction of two commands, followed by one reply, makes of these bytes.
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
