//! RESP2 in both directions: encodes row cells directly into one buffer, and scans replies.
//!
//! The only module that knows RESP. It knows no sockets: the scanner takes bytes and returns a token, "need more" or an
//! error, and never panics. If it overlooked an error reply, a batch would count as applied without being so.
//!
//! <https://redis.io/docs/latest/develop/reference/protocol-spec/>

use crate::change::{Cell, PartialRow, Row};
use crate::command::{Announcement, Base, Command, DeadLetter, Key};
use crate::format::{Form, Format};
use crate::lookups::{ListKind, Score};
use crate::schema::{Layout, NullRule};
use crate::typed::json::{Json, write_nullable};
use crate::typed::row_type::JsonType;
use crate::typed::{document, redisjson};
use batch::{ChangeStream, EncodeError, Limits, OwnKeys};
use bytes::{Bytes, BytesMut};

pub mod batch;
pub mod packed;

/// Writes the header of a command with `n` arguments, including its name.
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

/// Writes a command with few arguments.
pub fn command(out: &mut BytesMut, args: &[&[u8]]) {
    header(out, args.len());
    for arg in args {
        bulk(out, arg);
    }
}

/// For a [`put`] that is not a single RESTORE.
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

/// Writes a row, replacing a key of any type. Returns the number of commands.
///
/// # Errors
/// If a value is over the limit, or not one that its type can have. Nothing is written then.
pub fn put(out: &mut BytesMut, key: &Key, layout: &Layout, row: &Row, limits: &Limits) -> Result<usize, EncodeError> {
    match &layout.form {
        Form::Hash => put_hash(out, key, layout, row, limits),
        Form::Json(types) | Form::RedisJson(types) => put_json(out, key, layout, types, row, limits),
    }
}

/// Writes a hash: as one RESTORE if the server and the row's size allow it, otherwise as DEL, HSET and PEXPIRE.
///
/// DEL comes first so that no field of an older hash survives, and so that HSET cannot fail inside EXEC on a key of
/// another type.
fn put_hash(out: &mut BytesMut, key: &Key, layout: &Layout, row: &Row, limits: &Limits) -> Result<usize, EncodeError> {
    if limits.packing.is_some_and(|packing| packed::put(out, key, layout, row, &packing)) {
        return Ok(1);
    }
    let mut values = Cursor::new(row.cells());
    // No cell is longer than its row, so the cells need a check only if the row is over the limit.
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
        // Redis has no empty hashes, and HSET without fields is an error. Unreachable: the key's columns are always
        // fields.
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

fn put_json(
    out: &mut BytesMut,
    key: &Key,
    layout: &Layout,
    types: &[JsonType],
    row: &Row,
    limits: &Limits,
) -> Result<usize, EncodeError> {
    // A longer one is refused, so its end need not be kept.
    let mut json = Json::new(limits.value_bytes);
    document::write(layout, types, row, &mut json);
    let document = written(key, json, limits)?;
    if layout.form.format() == Format::Json {
        return Ok(set(out, key, &document, layout.ttl_ms));
    }
    held(key, redisjson::refusal(&document))?;
    del(out, key);
    command(out, &[b"JSON.SET", key.as_bytes(), b"$", &document]);
    pexpire(out, key, layout.ttl_ms);
    Ok(COMMANDS_PER_PUT)
}

/// Returns what was written, unless a value does not fit its type, or all of it is over the limit.
fn written(key: &Key, json: Json, limits: &Limits) -> Result<Vec<u8>, EncodeError> {
    let (bytes, limit) = (json.length(), limits.value_bytes);
    if json.has_misfit() {
        return Err(EncodeError::Unrepresentable { key: key.clone() });
    }
    json.finish().ok_or_else(|| EncodeError::Document { key: key.clone(), bytes, limit })
}

/// A command that RedisJSON refuses would fail inside EXEC.
fn held(key: &Key, refusal: Option<String>) -> Result<(), EncodeError> {
    refusal.map_or(Ok(()), |why| Err(EncodeError::NotHeld { key: key.clone(), why }))
}

/// Writes a document. SET replaces a key of any type.
fn set(out: &mut BytesMut, key: &Key, document: &[u8], ttl_ms: u64) -> usize {
    header(out, 5);
    bulk(out, b"SET");
    bulk(out, key.as_bytes());
    bulk(out, document);
    bulk(out, b"PX");
    bulk_number(out, ttl_ms);
    1
}

/// Returns the document that a [`put`] sets.
pub fn document_of(put: &[u8]) -> Option<&[u8]> {
    let mut rest = put;
    let mut next = || {
        let (token, len) = token(rest).ok()??;
        rest = &rest[len..];
        Some(token)
    };
    match [next()?, next()?, next()?, next()?] {
        [Token::Array(_), Token::Bulk(b"SET"), Token::Bulk(_), Token::Bulk(document)] => Some(document),
        // After DEL and its key.
        [_, _, _, Token::Array(_)] => match [next()?, next()?, next()?, next()?] {
            [Token::Bulk(b"JSON.SET"), Token::Bulk(_), Token::Bulk(_), Token::Bulk(document)] => Some(document),
            _ => None,
        },
        _ => None,
    }
}

/// Whether `found` is what RedisJSON prints of the document that a [`put`] sets.
pub fn sets_document(put: &[u8], found: &[u8]) -> bool {
    document_of(put).is_some_and(|written| redisjson::is_same(written, found))
}

/// Returns the fields and values, in order, that a [`put`] of three commands sets.
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

/// What HGETALL replies about a hash whose fields are in the order in which they were written. Any other order is another
/// reply about the same hash.
#[derive(Debug, Clone, Copy)]
pub struct HashReply<'a> {
    /// Of fields and values together.
    elements: u64,
    body: &'a [u8],
}

/// How bytes begin that were compared with a reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Begins {
    /// With the reply, which has this length.
    Whole(usize),
    /// With a part of the reply, and there are no more bytes.
    Unfinished,
    Another,
}

/// A longer reply is not waited for as a whole: each read would compare it from its beginning.
const LONGEST_COMPARED: usize = 1 << 20;

impl HashReply<'_> {
    pub fn begins(&self, bytes: &[u8]) -> Begins {
        let (head, len) = match token(bytes) {
            Ok(Some(head)) => head,
            Ok(None) if bytes.len() <= MAX_LINE_BYTES => return Begins::Unfinished,
            Ok(None) | Err(_) => return Begins::Another,
        };
        let rest = &bytes[len..];
        match head {
            Token::Array(elements) if elements == self.elements => match rest.get(..self.body.len()) {
                Some(body) if body == self.body => Begins::Whole(len + body.len()),
                None if self.body.len() <= LONGEST_COMPARED && self.body.starts_with(rest) => Begins::Unfinished,
                Some(_) | None => Begins::Another,
            },
            _ => Begins::Another,
        }
    }
}

/// Returns what HGETALL replies about the hash that a [`put`] of three commands writes at `key`. The arguments of HSET are
/// the elements of that reply.
pub fn hash_of<'a>(put: &'a [u8], key: &Key) -> Option<HashReply<'a>> {
    let key = bulk_len(key.as_bytes().len());
    let hset = put.strip_prefix(DEL)?.get(key..)?;
    let (Token::Array(arguments), len) = token(hset).ok()?? else { return None };
    let pairs = hset[len..].strip_prefix(HSET)?.get(key..)?;
    let ttl = pairs.strip_suffix(b"\r\n")?.iter().rev().take_while(|byte| byte.is_ascii_digit()).count();
    let end = pairs.len().checked_sub(PEXPIRE.len() + key + bulk_len(ttl))?;
    let (body, pexpire) = pairs.split_at(end);
    pexpire.starts_with(PEXPIRE).then(|| HashReply { elements: arguments.saturating_sub(2), body })
}

/// How many bytes [`bulk`] writes.
fn bulk_len(bytes: usize) -> usize {
    1 + itoa::Buffer::new().format(bytes).len() + 2 + bytes + 2
}

/// Writes a command and returns how many replies it will get.
///
/// # Errors
/// As [`put`].
pub fn encode(out: &mut BytesMut, command_: &Command, own: &OwnKeys, limits: &Limits) -> Result<usize, EncodeError> {
    match command_ {
        Command::Put { key, layout, row } => put(out, key, layout, row, limits),
        Command::PutDocument { key, document, ttl_ms } => {
            let (bytes, limit) = (document.len(), limits.value_bytes);
            if bytes > limit {
                return Err(EncodeError::Document { key: key.clone(), bytes, limit });
            }
            Ok(set(out, key, document, *ttl_ms))
        }
        Command::Merge { key, base, layout, row } => match layout.form.json_types() {
            None => merge(out, key, *base, layout, row, own, limits),
            Some(types) => merge_document(out, key, *base, (layout, types), row, own, limits),
        },
        Command::Keep { key, slot } => {
            command(out, &[b"COPY", key.as_bytes(), own.kept(*slot).as_bytes(), b"REPLACE"]);
            Ok(1)
        }
        Command::Delete { key } => {
            del(out, key);
            Ok(1)
        }
        Command::Join { key, members, ttl_ms } => {
            join(out, key, members);
            pexpire(out, key, *ttl_ms);
            Ok(2)
        }
        Command::Leave { key, kind, members } => {
            header(out, 2 + members.len());
            bulk(
                out,
                match kind {
                    ListKind::Set => b"SREM",
                    ListKind::SortedSet => b"ZREM",
                },
            );
            bulk(out, key.as_bytes());
            members.iter().for_each(|member| bulk(out, member));
            Ok(1)
        }
        Command::Renew { key, ttl_ms } => {
            pexpire(out, key, *ttl_ms);
            Ok(1)
        }
        Command::DeadLetter(letter) => dead_letter(out, letter, own, limits),
        Command::Announce(announcement) => {
            announce(out, announcement, own.changes().expect("announced to a stream"));
            Ok(1)
        }
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

fn join(out: &mut BytesMut, key: &Key, members: &[(Bytes, Option<Score>)]) {
    let scores = members.iter().filter(|(_, score)| score.is_some()).count();
    header(out, 2 + members.len() + scores);
    bulk(out, if scores > 0 { b"ZADD" } else { b"SADD" });
    bulk(out, key.as_bytes());
    for (member, score) in members {
        if let Some(score) = score {
            bulk(out, score.to_string().as_bytes());
        }
        bulk(out, member);
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
) -> Result<usize, EncodeError> {
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
    let mut commands = 1 + rename_kept(out, key, base, own);
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

/// Puts the copy that was kept of a row, if it is one, at this key. Returns the number of commands.
fn rename_kept(out: &mut BytesMut, key: &Key, base: Base, own: &OwnKeys) -> usize {
    match base {
        Base::SameKey => 0,
        Base::Kept(slot) => {
            command(out, &[b"RENAME", own.kept(slot).as_bytes(), key.as_bytes()]);
            1
        }
    }
}

/// Sets the known members of a RedisJSON document.
fn merge_document(
    out: &mut BytesMut,
    key: &Key,
    base: Base,
    (layout, types): (&Layout, &[JsonType]),
    row: &PartialRow,
    own: &OwnKeys,
    limits: &Limits,
) -> Result<usize, EncodeError> {
    let (start, mut values) = (out.len(), Cursor::new(row.cells()));
    let mut commands = 1 + rename_kept(out, key, base, own);
    for (field, json_type) in layout.fields.iter().zip(types) {
        let text = match (values.at(field.cell).unwrap_or(Cell::Null), layout.null) {
            (Cell::Unchanged, _) => continue,
            (Cell::Text(text), _) => Some(text),
            (Cell::Null, _) => None,
        };
        let path = redisjson::path(&field.name).expect("otherwise rows are not merged");
        commands += 1;
        if text.is_none() && layout.null == NullRule::Omit {
            command(out, &[b"JSON.DEL", key.as_bytes(), &path]);
            continue;
        }
        let mut json = Json::new(limits.value_bytes);
        write_nullable(json_type, text, &mut json);
        let value = written(key, json, limits);
        match value.and_then(|value| held(key, redisjson::refusal_of_member(&value)).map(|()| value)) {
            Ok(value) => command(out, &[b"JSON.SET", key.as_bytes(), &path, &value]),
            Err(error) => {
                out.truncate(start);
                return Err(error);
            }
        }
    }
    pexpire(out, key, layout.ttl_ms);
    Ok(commands)
}

/// The approximate length of the dead-letter stream: with `~`, Redis trims whole nodes only.
const DEAD_LETTERS: &[u8] = b"10000";

fn dead_letter(out: &mut BytesMut, letter: &DeadLetter, own: &OwnKeys, limits: &Limits) -> Result<usize, EncodeError> {
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

fn announce(out: &mut BytesMut, announcement: &Announcement, ChangeStream { key, max_len }: &ChangeStream) {
    let Announcement { op, table, key: row, by } = announcement;
    let by = by.map(|by| [by.commit.to_string(), by.xid.to_string(), by.time.0.to_string()]);
    let mut fields: Vec<(&str, &[u8])> = vec![("op", op.as_str().as_bytes()), ("table", table.as_bytes())];
    if !row.is_empty() {
        fields.push(("key", row));
    }
    if let Some([lsn, xid, time]) = &by {
        fields.extend([("lsn", lsn.as_bytes()), ("xid", xid.as_bytes()), ("time", time.as_bytes())]);
    }
    header(out, 6 + 2 * fields.len());
    let max_len = itoa::Buffer::new().format(*max_len).to_owned();
    for arg in [b"XADD", key.as_bytes(), b"MAXLEN", b"~", max_len.as_bytes(), b"*"] {
        bulk(out, arg);
    }
    for (name, value) in fields {
        bulk(out, name.as_bytes());
        bulk(out, value);
    }
}

/// Accesses cells by index. Ascending access, which is what most layouts need, walks the row once.
pub(crate) struct Cursor<I> {
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

/// Returns the name and the first argument of the command at `index` in a buffer that this module wrote.
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

/// Returns the arguments of all commands in `requests` without the commands' names: what a server may quote in an
/// error.
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

/// Returns the bytes of the command at `index` in a buffer that this module wrote; empty if there is none.
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

/// The smallest unit of a reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Token<'a> {
    Status(&'a [u8]),
    Error(&'a [u8]),
    Integer(i64),
    Bulk(&'a [u8]),
    /// A missing value; in place of an array, EXEC's refusal.
    Nil,
    /// The header of an array: so many elements follow.
    Array(u64),
}

/// The reply is not valid RESP. The connection can no longer be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    #[error("unknown type byte {0:#04x}")]
    Type(u8),
    #[error("a line without CRLF at its end, or with a bare line feed")]
    Line,
    #[error("a malformed number")]
    Number,
    #[error("a length out of range")]
    Length,
    #[error("a value without CRLF at its end")]
    BulkEnd,
    #[error("arrays nested too deeply")]
    Depth,
    #[error("a reply of more than {0} bytes")]
    TooLong(usize),
    #[error("a reply that does not belong to its command")]
    OutOfPlace,
}

/// Longer status and error lines are rejected.
pub const MAX_LINE_BYTES: usize = 64 << 10;
/// Longer values are rejected; nothing that prefetchd requests comes close.
const MAX_BULK_BYTES: i64 = 1 << 30;
pub const MAX_DEPTH: usize = 32;
/// Bytes of memory that a reply, or an element of one, takes besides its content.
pub const ELEMENT_BYTES: usize = 64;

/// Returns the first token of `input` and its length in bytes, or `None` if more input is needed.
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

pub fn number(text: &[u8]) -> Result<i64, Malformed> {
    let digits = text.strip_prefix(b"-").unwrap_or(text);
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return Err(Malformed::Number);
    }
    std::str::from_utf8(text).ok().and_then(|t| t.parse().ok()).ok_or(Malformed::Number)
}

/// Returns a MATCH pattern for the keys that begin with `prefix`, with special characters escaped.
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
    use crate::change::RowBuilder;
    use crate::schema::{Field, Render};
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
        Layout { fields: fields.iter().map(field).collect(), null, cells: 3, ttl_ms: 60_000, form: Form::Hash }
    }

    fn row(cells: &[Option<&str>]) -> Row {
        let mut row = RowBuilder::with_capacity(0);
        cells.iter().for_each(|cell| row.cell(cell.map(str::as_bytes)));
        row.row()
    }

    fn partial(cells: &[Cell<'_>]) -> PartialRow {
        assert!(cells.contains(&Cell::Unchanged), "a cell must be unchanged");
        PartialRow::of(cells)
    }

    /// Splits commands into words, with a parser of its own.
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
    fn the_reply_about_a_row_is_known_byte_by_byte() {
        let fields = [(0, "id", AS_IS), (1, "name", AS_IS), (2, "on", Render::Boolean)];
        for (null, cells, reply) in [
            (NullRule::Empty, [Some("1"), None, Some("t")], &[&b"id"[..], b"1", b"name", b"", b"on", b"true"][..]),
            (NullRule::Omit, [Some("1"), None, Some("t")], &[b"id", b"1", b"on", b"true"]),
            (
                NullRule::Omit,
                [Some("1"), Some("*3\r\n$7\r\nPEXPIRE\r\n"), None],
                &[b"id", b"1", b"name", b"*3\r\n$7\r\nPEXPIRE\r\n"],
            ),
        ] {
            let (mut written, mut same) = (BytesMut::new(), BytesMut::new());
            put(&mut written, &key("k:1"), &layout(null, &fields), &row(&cells), &Limits::default()).unwrap();
            command(&mut same, reply);
            let expected = hash_of(&written, &key("k:1")).unwrap();
            assert_eq!(expected.begins(&same), Begins::Whole(same.len()));
            assert_eq!(expected.begins(&[&same[..], b"*0\r\n"].concat()), Begins::Whole(same.len()));
            for end in 0..same.len() {
                assert_eq!(expected.begins(&same[..end]), Begins::Unfinished, "{end}");
                let mut other = same.to_vec();
                other[end] ^= 1;
                assert_ne!(expected.begins(&other), Begins::Whole(same.len()), "{end}");
            }
            assert!(hash_of(&written, &key("k:22")).is_none());
            for end in 0..written.len() {
                let cut = hash_of(&written[..end], &key("k:1"));
                assert!(cut.is_none_or(|cut| cut.begins(&same) == Begins::Another), "{end}");
            }
        }
        let mut reversed = BytesMut::new();
        command(&mut reversed, &[b"on", b"true", b"id", b"1"]);
        let mut written = BytesMut::new();
        let cells = [Some("1"), None, Some("t")];
        put(&mut written, &key("k:1"), &layout(NullRule::Omit, &fields), &row(&cells), &Limits::default()).unwrap();
        assert_eq!(hash_of(&written, &key("k:1")).unwrap().begins(&reversed), Begins::Another);
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
        assert_eq!(error, EncodeError::Value { key: key("k"), field: "b".to_owned(), bytes: 11, limit: 10 });
        let layout = Arc::new(layout);
        let row = partial(&[Cell::Text(b"01234567890"), Cell::Unchanged]);
        let merge = Command::Merge { key: key("k"), base: Base::Kept(0), layout, row };
        assert!(encode(&mut out, &merge, &OwnKeys::under("p:"), &limits).is_err());
        assert!(out.is_empty());
    }

    #[test]
    fn a_document_is_one_command() {
        let types = vec![JsonType::Number, JsonType::Boolean];
        let fields = [(0, "id", AS_IS), (2, "on", Render::Boolean)];
        let layout = Arc::new(Layout { form: Form::Json(types), ..layout(NullRule::Empty, &fields) });
        let row_of = |cells: &[Option<&str>]| {
            let mut out = BytesMut::new();
            let limits = Limits { value_bytes: 20, ..Limits::default() };
            let put = put(&mut out, &key("k:1"), &layout, &row(cells), &limits);
            assert!(put.is_ok() || out.is_empty());
            put.map(|replies| (replies, words(&out), document_of(&out).expect("a document").to_vec()))
        };
        let document = r#"{"id":1,"on":true}"#;
        let set = format!("SET k:1 {document} PX 60000");
        assert_eq!(row_of(&[Some("1"), None, Some("t")]), Ok((1, vec![set.clone()], document.into())));
        let too_long = EncodeError::Document { key: key("k:1"), bytes: 21, limit: 20 };
        assert_eq!(row_of(&[Some("1234"), None, Some("t")]), Err(too_long.clone()));
        assert_eq!(row_of(&[Some("1"), None, Some("?")]), Err(EncodeError::Unrepresentable { key: key("k:1") }));
        let patched = |document: &'static [u8]| {
            let document = Bytes::from_static(document);
            Command::PutDocument { key: key("k:1"), document, ttl_ms: 60_000 }
        };
        assert_eq!(encoded(&patched(document.as_bytes())), [set]);
        let limits = Limits { value_bytes: 20, ..Limits::default() };
        let mut out = BytesMut::new();
        let refused = encode(&mut out, &patched(&[b'x'; 21]), &OwnKeys::under("p:"), &limits);
        assert_eq!((refused, out.len()), (Err(too_long), 0));
    }

    #[test]
    fn a_prefix_is_matched_literally() {
        assert_eq!(glob_of_prefix(b"a[b]*?\\^-:"), b"a\\[b\\]\\*\\?\\\\\\^\\-:*");
    }
}
