//! Decodes the bytes of a logical replication session: the frames inside CopyData, and pgoutput's protocol 1 inside
//! those.
//!
//! It must not know earlier messages: order, known relations and column counts belong to [`super::assemble`]. It is
//! total: every input yields a message or an error, never a panic, and a message is consumed completely or not at all.
//! A mistake here reads a field from its neighbour's bytes, and the cache then holds values that were never in
//! Postgres.
//!
//! Rows stay slices of the read buffer: Insert, Update and Delete are decoded without an allocation.
//!
//! <https://www.postgresql.org/docs/current/protocol-replication.html>
//! <https://www.postgresql.org/docs/current/protocol-logicalrep-message-formats.html>

use crate::change::{Begin, CommitTime, MalformedRow, NewRow, OldRow, Row};
use crate::lsn::{CommitLsn, EndLsn, Lsn};
use crate::schema::{Oid, QualifiedName, Relation, RelationColumn, ReplicaIdentity};
use bytes::{Buf, Bytes};
use std::str;

/// What one CopyData of the server contains.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CopyData {
    /// One pgoutput message. A position is `None` if the server does not report it: it does so only for the last write
    /// of a change.
    XLogData { start: Option<Lsn>, server_end: Option<Lsn>, sent_at: CommitTime, payload: Bytes },
    /// `server_end` is how far the walsender has read. Between transactions, everything before it has been delivered.
    Keepalive { server_end: Option<Lsn>, sent_at: CommitTime, reply_requested: bool },
}

/// One message of pgoutput's protocol 1.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    Begin(Begin),
    Commit {
        commit: CommitLsn,
        /// Where to resume: resuming at `commit` would redeliver the transaction.
        end: EndLsn,
        time: CommitTime,
    },
    /// The transaction was itself replicated, from `name`.
    Origin {
        commit: Option<Lsn>,
        name: Bytes,
    },
    Relation(Relation),
    Type {
        oid: Oid,
        schema: Bytes,
        name: Bytes,
    },
    /// `new` is partial if an UPDATE moved the row into a publication's filter: Postgres then sends an INSERT, without
    /// the large values that the UPDATE did not change (seen on 15.18, line 47 of testdata/pgoutput.txt).
    Insert {
        relation: Oid,
        new: NewRow,
    },
    Update {
        relation: Oid,
        old: Option<OldRow>,
        new: NewRow,
    },
    Delete {
        relation: Oid,
        old: OldRow,
    },
    Truncate {
        relations: Vec<Oid>,
        options: TruncateOptions,
    },
    /// `pg_logical_emit_message`, called by anybody.
    Logical {
        transactional: bool,
        lsn: Option<Lsn>,
        prefix: Bytes,
        content: Bytes,
    },
}

/// The subject of a pgoutput message, according to its first bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Subject {
    /// A row of this relation.
    Row(Oid),
    /// A logical message.
    Logical,
}

/// Returns the subject of the pgoutput message in a CopyData. `None`: something else, or more bytes are needed.
pub fn subject(frame: &[u8]) -> Option<Subject> {
    let (b'w', Some([kind, rest @ ..])) = (*frame.first()?, frame.get(XLOG_DATA_BYTES..)) else { return None };
    match kind {
        b'I' | b'U' | b'D' => Some(Subject::Row(Oid::from_be_bytes(*rest.first_chunk()?))),
        b'M' => Some(Subject::Logical),
        _ => None,
    }
}

/// What precedes the message in an XLogData: its tag, two positions and a time.
const XLOG_DATA_BYTES: usize = 1 + 3 * 8;

/// Upper bound of a Relation: at most 1,600 columns, with names of at most 63 bytes unless Postgres was compiled
/// otherwise.
const MOST_RELATION_BYTES: usize = 1 << 20;

/// The options of the TRUNCATE. Tables reached by CASCADE are already listed by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TruncateOptions {
    pub cascade: bool,
    pub restart_identity: bool,
}

/// The bytes are not a frame or message of protocol 1.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    #[error("the server sent {0} without a byte in it")]
    Empty(&'static str),
    #[error("a {0} message ended too early")]
    Truncated(&'static str),
    #[error("a {message} message was followed by {bytes} bytes that do not belong to it")]
    Trailing { message: &'static str, bytes: usize },
    #[error("a replication frame has the unknown tag {0:#04x}")]
    UnknownFrame(u8),
    #[error("a pgoutput message has the unknown tag {0:#04x}")]
    UnknownMessage(u8),
    #[error("a pgoutput message has the tag {tag:?} ({what}), which belongs to a newer protocol than the 1 asked for")]
    NewerProtocol { tag: char, what: &'static str },
    #[error("a {message} message has {field} {value:#04x}, which protocol 1 does not know")]
    UnknownValue { message: &'static str, field: &'static str, value: u8 },
    #[error("a {message} message of {bytes} bytes is longer than any that Postgres sends")]
    TooLong { message: &'static str, bytes: usize },
    #[error("a {message} message has a negative number of {of}")]
    NegativeCount { message: &'static str, of: &'static str },
    #[error("a {message} message has no position where protocol 1 always gives one")]
    NoPosition { message: &'static str },
    #[error("a {message} message names something {:?}, which is not UTF-8", bytes.escape_ascii().to_string())]
    NotUtf8 { message: &'static str, bytes: Bytes },
    #[error("the old row of a {message} message leaves a value out")]
    IncompleteOldRow { message: &'static str },
    #[error("a {message} message: {source}")]
    Row { message: &'static str, source: MalformedRow },
}

/// Decodes the contents of one CopyData.
pub fn frame(bytes: Bytes) -> Result<CopyData, DecodeError> {
    let Some(&tag) = bytes.first() else { return Err(DecodeError::Empty("a replication frame")) };
    match tag {
        b'w' => {
            let mut rest = FieldReader::after_tag("XLogData", bytes);
            let start = rest.lsn()?;
            let server_end = rest.lsn()?;
            let sent_at = rest.time()?;
            Ok(CopyData::XLogData { start, server_end, sent_at, payload: rest.rest })
        }
        b'k' => {
            let mut rest = FieldReader::after_tag("keepalive", bytes);
            let server_end = rest.lsn()?;
            let sent_at = rest.time()?;
            let reply_requested = rest.flag("the reply flag")?;
            rest.end(CopyData::Keepalive { server_end, sent_at, reply_requested })
        }
        other => Err(DecodeError::UnknownFrame(other)),
    }
}

/// Decodes one pgoutput message: the payload of an XLogData.
pub fn message(bytes: Bytes) -> Result<Message, DecodeError> {
    let Some(&tag) = bytes.first() else { return Err(DecodeError::Empty("a pgoutput message")) };
    match tag {
        b'B' => begin(FieldReader::after_tag("Begin", bytes)),
        b'C' => commit(FieldReader::after_tag("Commit", bytes)),
        b'O' => origin(FieldReader::after_tag("Origin", bytes)),
        b'R' => relation(FieldReader::after_tag("Relation", bytes)),
        b'Y' => type_(FieldReader::after_tag("Type", bytes)),
        b'I' => insert(FieldReader::after_tag("Insert", bytes)),
        b'U' => update(FieldReader::after_tag("Update", bytes)),
        b'D' => delete(FieldReader::after_tag("Delete", bytes)),
        b'T' => truncate(FieldReader::after_tag("Truncate", bytes)),
        b'M' => logical(FieldReader::after_tag("Message", bytes)),
        tag => Err(match newer(tag) {
            Some(what) => DecodeError::NewerProtocol { tag: char::from(tag), what },
            None => DecodeError::UnknownMessage(tag),
        }),
    }
}

/// Returns the name of a message that was introduced after protocol 1.
fn newer(tag: u8) -> Option<&'static str> {
    Some(match tag {
        b'S' => "Stream Start",
        b'E' => "Stream Stop",
        b'c' => "Stream Commit",
        b'A' => "Stream Abort",
        b'b' => "Begin Prepare",
        b'P' => "Prepare",
        b'K' => "Commit Prepared",
        b'r' => "Rollback Prepared",
        b'p' => "Stream Prepare",
        _ => return None,
    })
}

fn begin(mut rest: FieldReader) -> Result<Message, DecodeError> {
    let commit = CommitLsn(rest.position()?);
    let time = rest.time()?;
    let xid = rest.u32()?;
    rest.end(Message::Begin(Begin { xid, commit, time }))
}

fn commit(mut rest: FieldReader) -> Result<Message, DecodeError> {
    rest.no_flags()?;
    let commit = CommitLsn(rest.position()?);
    let end = EndLsn(rest.position()?);
    let time = rest.time()?;
    rest.end(Message::Commit { commit, end, time })
}

fn origin(mut rest: FieldReader) -> Result<Message, DecodeError> {
    let commit = rest.lsn()?;
    let name = rest.cstring()?;
    rest.end(Message::Origin { commit, name })
}

fn relation(mut rest: FieldReader) -> Result<Message, DecodeError> {
    if rest.rest.len() > MOST_RELATION_BYTES {
        return Err(DecodeError::TooLong { message: "Relation", bytes: rest.rest.len() });
    }
    let relation = rest.relation()?;
    rest.end(Message::Relation(relation))
}

fn type_(mut rest: FieldReader) -> Result<Message, DecodeError> {
    let oid = rest.u32()?;
    let schema = rest.cstring()?;
    let name = rest.cstring()?;
    rest.end(Message::Type { oid, schema, name })
}

fn insert(mut rest: FieldReader) -> Result<Message, DecodeError> {
    let relation = rest.u32()?;
    rest.new_tuple_follows()?;
    let new = rest.tuple()?;
    rest.end(Message::Insert { relation, new })
}

fn update(mut rest: FieldReader) -> Result<Message, DecodeError> {
    let relation = rest.u32()?;
    let old = match rest.rest.first() {
        Some(b'K' | b'O') => Some(rest.old_row()?),
        _ => None,
    };
    rest.new_tuple_follows()?;
    let new = rest.tuple()?;
    rest.end(Message::Update { relation, old, new })
}

fn delete(mut rest: FieldReader) -> Result<Message, DecodeError> {
    let relation = rest.u32()?;
    let old = rest.old_row()?;
    rest.end(Message::Delete { relation, old })
}

fn truncate(mut rest: FieldReader) -> Result<Message, DecodeError> {
    let count = rest.count32("relations")?;
    let options = rest.truncate_options()?;
    // Checked before the list is allocated: the count alone may claim 2^31.
    if rest.rest.len() / size_of::<Oid>() < count {
        return Err(rest.truncated());
    }
    let relations = (0..count).map(|_| rest.u32()).collect::<Result<_, _>>()?;
    rest.end(Message::Truncate { relations, options })
}

fn logical(mut rest: FieldReader) -> Result<Message, DecodeError> {
    let transactional = rest.flag("flags")?;
    let lsn = rest.lsn()?;
    let prefix = rest.cstring()?;
    let length = rest.count32("bytes")?;
    let content = rest.take(length)?;
    rest.end(Message::Logical { transactional, lsn, prefix, content })
}

/// Reads a message's fields one after the other. Integers are big-endian.
struct FieldReader {
    message: &'static str,
    rest: Bytes,
}

impl FieldReader {
    fn after_tag(message: &'static str, mut bytes: Bytes) -> Self {
        bytes.advance(1);
        FieldReader { message, rest: bytes }
    }

    fn truncated(&self) -> DecodeError {
        DecodeError::Truncated(self.message)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        let array = *self.rest.first_chunk::<N>().ok_or(DecodeError::Truncated(self.message))?;
        self.rest.advance(N);
        Ok(array)
    }

    fn u8(&mut self) -> Result<u8, DecodeError> {
        self.array::<1>().map(|[byte]| byte)
    }

    fn u32(&mut self) -> Result<u32, DecodeError> {
        self.array().map(u32::from_be_bytes)
    }

    fn i32(&mut self) -> Result<i32, DecodeError> {
        self.array().map(i32::from_be_bytes)
    }

    fn count16(&mut self, of: &'static str) -> Result<usize, DecodeError> {
        let count = i16::from_be_bytes(self.array()?);
        usize::try_from(count).map_err(|_| DecodeError::NegativeCount { message: self.message, of })
    }

    fn count32(&mut self, of: &'static str) -> Result<usize, DecodeError> {
        let count = self.i32()?;
        usize::try_from(count).map_err(|_| DecodeError::NegativeCount { message: self.message, of })
    }

    fn lsn(&mut self) -> Result<Option<Lsn>, DecodeError> {
        self.array().map(u64::from_be_bytes).map(Lsn::new)
    }

    fn position(&mut self) -> Result<Lsn, DecodeError> {
        self.lsn()?.ok_or(DecodeError::NoPosition { message: self.message })
    }

    fn time(&mut self) -> Result<CommitTime, DecodeError> {
        self.array().map(i64::from_be_bytes).map(CommitTime::from_postgres_micros)
    }

    fn unknown(&self, field: &'static str, value: u8) -> DecodeError {
        DecodeError::UnknownValue { message: self.message, field, value }
    }

    fn flag(&mut self, field: &'static str) -> Result<bool, DecodeError> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(self.unknown(field, other)),
        }
    }

    fn no_flags(&mut self) -> Result<(), DecodeError> {
        match self.u8()? {
            0 => Ok(()),
            other => Err(self.unknown("flags", other)),
        }
    }

    fn truncate_options(&mut self) -> Result<TruncateOptions, DecodeError> {
        match self.u8()? {
            bits @ 0..=3 => Ok(TruncateOptions { cascade: bits & 1 != 0, restart_identity: bits & 2 != 0 }),
            other => Err(self.unknown("options", other)),
        }
    }

    fn take(&mut self, length: usize) -> Result<Bytes, DecodeError> {
        if self.rest.len() < length {
            return Err(self.truncated());
        }
        Ok(self.rest.split_to(length))
    }

    /// Reads up to the next NUL, in any encoding.
    fn cstring(&mut self) -> Result<Bytes, DecodeError> {
        let length = memchr::memchr(0, &self.rest).ok_or(self.truncated())?;
        let text = self.rest.split_to(length);
        self.rest.advance(1);
        Ok(text)
    }

    /// An identifier: always UTF-8, since the session asks for that encoding.
    fn name(&mut self) -> Result<String, DecodeError> {
        let bytes = self.cstring()?;
        match str::from_utf8(&bytes) {
            Ok(name) => Ok(name.to_owned()),
            Err(_) => Err(DecodeError::NotUtf8 { message: self.message, bytes }),
        }
    }

    fn relation(&mut self) -> Result<Relation, DecodeError> {
        let oid = self.u32()?;
        let schema = match self.name()? {
            // How the protocol abbreviates it.
            none if none.is_empty() => "pg_catalog".to_owned(),
            schema => schema,
        };
        let table = self.name()?;
        let identity = match self.u8()? {
            b'd' => ReplicaIdentity::Default,
            b'n' => ReplicaIdentity::Nothing,
            b'f' => ReplicaIdentity::Full,
            b'i' => ReplicaIdentity::Index,
            other => return Err(self.unknown("the replica identity", other)),
        };
        let count = self.count16("columns")?;
        // An unchecked count must not set the capacity; tables have few columns, and Relation is rare.
        let mut columns = Vec::new();
        for _ in 0..count {
            let in_identity = match self.u8()? {
                0 => false,
                1 => true,
                other => return Err(self.unknown("column flags", other)),
            };
            let name = self.name()?;
            let type_oid = self.u32()?;
            let type_modifier = self.i32()?;
            columns.push(RelationColumn { name, type_oid, type_modifier, in_identity });
        }
        Ok(Relation { oid, name: QualifiedName { schema, table }, identity, columns })
    }

    fn new_tuple_follows(&mut self) -> Result<(), DecodeError> {
        match self.u8()? {
            b'N' => Ok(()),
            other => Err(self.unknown("the tuple kind", other)),
        }
    }

    fn tuple(&mut self) -> Result<NewRow, DecodeError> {
        NewRow::take(&mut self.rest).map_err(|source| DecodeError::Row { message: self.message, source })
    }

    fn old_row(&mut self) -> Result<OldRow, DecodeError> {
        let kind: fn(Row) -> OldRow = match self.u8()? {
            b'K' => OldRow::Key,
            b'O' => OldRow::Full,
            other => return Err(self.unknown("the tuple kind", other)),
        };
        match self.tuple()? {
            NewRow::Full(row) => Ok(kind(row)),
            NewRow::Partial(_) => Err(DecodeError::IncompleteOldRow { message: self.message }),
        }
    }

    fn end<T>(self, whole: T) -> Result<T, DecodeError> {
        match self.rest.len() {
            0 => Ok(whole),
            bytes => Err(DecodeError::Trailing { message: self.message, bytes }),
        }
    }
}

/// Real messages for tests: see testdata/pgoutput.txt.
#[cfg(test)]
pub(super) mod captured {
    use bytes::Bytes;

    /// Every message that Postgres sent, in order.
    pub fn messages() -> Vec<Bytes> {
        let lines = include_str!("testdata/pgoutput.txt").lines();
        lines.filter(|line| !line.is_empty() && !line.starts_with('#')).map(unhex).collect()
    }

    /// `00ff 78*3000 01`: bytes, or one byte many times.
    fn unhex(line: &str) -> Bytes {
        let byte = |at: &str| u8::from_str_radix(at, 16).expect("two hexadecimal digits");
        let mut out = Vec::new();
        for word in line.split_ascii_whitespace() {
            match word.split_once('*') {
                Some((one, times)) => out.extend(vec![byte(one); times.parse().expect("a count")]),
                None => out.extend((0..word.len()).step_by(2).map(|at| byte(&word[at..at + 2]))),
            }
        }
        out.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::change::Cell;
    use proptest::prelude::*;

    fn decoded() -> Vec<Message> {
        captured::messages().into_iter().map(|bytes| message(bytes).expect("Postgres sent it")).collect()
    }

    fn at(n: u64) -> Option<Lsn> {
        Lsn::new(n)
    }

    #[test]
    fn reads_a_transaction_as_postgres_sent_it() {
        let got = decoded();
        let commit = CommitLsn("0/153FBD0".parse().expect("an LSN"));
        let Message::Begin(begin) = &got[0] else { panic!("{:?}", got[0]) };
        assert_eq!((begin.xid, begin.commit), (737, commit));
        assert_eq!(got[1], Message::Type { oid: 0x4004, schema: "".into(), name: "bool".into() });
        let Message::Relation(relation) = &got[2] else { panic!("{:?}", got[2]) };
        assert_eq!(relation.name, QualifiedName { schema: "Sch é".into(), table: "Ta\"ble".into() });
        assert_eq!(relation.identity, ReplicaIdentity::Default);
        let columns: Vec<_> =
            relation.columns.iter().map(|c| (c.name.as_str(), c.type_oid, c.type_modifier, c.in_identity)).collect();
        assert_eq!(
            columns,
            [
                ("id", 23, -1, true),
                ("name", 25, -1, false),
                ("doc", 25, -1, false),
                ("ok", 0x4004, -1, false),
                ("n", 1700, 0xa0006, false)
            ]
        );
        let Message::Insert { relation: 0x4005, new: NewRow::Full(row) } = &got[3] else { panic!("{:?}", got[3]) };
        let big = "x".repeat(3000);
        assert_eq!(
            row.cells().collect::<Vec<_>>(),
            [Some(&b"1"[..]), Some(b"a\tb\\N"), Some(big.as_bytes()), Some(b"t"), Some(b"1.50")]
        );
        let Message::Insert { new: NewRow::Full(row), .. } = &got[4] else { panic!("{:?}", got[4]) };
        assert_eq!(row.cells().collect::<Vec<_>>(), [Some(&b"2"[..]), Some(b""), None, Some(b"f"), None]);
        let end = EndLsn("0/153FC00".parse().expect("an LSN"));
        assert_eq!(got[5], Message::Commit { commit, end, time: begin.time });
    }

    #[test]
    fn reads_old_rows_and_what_an_update_left_out() {
        let got = decoded();
        let updates: Vec<_> = got
            .iter()
            .filter_map(|m| match m {
                Message::Update { old, new, .. } => Some((old, new)),
                _ => None,
            })
            .collect();
        let (None, NewRow::Partial(new)) = updates[0] else { panic!("{:?}", updates[0]) };
        assert_eq!(
            new.cells().collect::<Vec<_>>(),
            [Cell::Text(b"1"), Cell::Text("ü".as_bytes()), Cell::Unchanged, Cell::Text(b"t"), Cell::Text(b"1.50")]
        );
        let (Some(OldRow::Key(old)), NewRow::Partial(new)) = updates[1] else { panic!("{:?}", updates[1]) };
        assert_eq!(old.cells().collect::<Vec<_>>(), [Some(&b"1"[..]), None, None, None, None]);
        assert_eq!(new.cell(0), Cell::Text(b"3"));
        let (Some(OldRow::Full(old)), NewRow::Partial(new)) = updates[2] else { panic!("{:?}", updates[2]) };
        assert_eq!(old.cell(1), Some("y".repeat(3000).as_bytes()));
        assert_eq!(new.cells().collect::<Vec<_>>(), [Cell::Text(b"4"), Cell::Unchanged]);

        let deletes: Vec<_> = got.iter().filter(|m| matches!(m, Message::Delete { .. })).collect();
        assert!(matches!(deletes[0], Message::Delete { relation: 0x4005, old: OldRow::Key(_) }), "{deletes:?}");
        assert!(matches!(deletes[1], Message::Delete { relation: 0x400d, old: OldRow::Full(_) }), "{deletes:?}");
    }

    #[test]
    fn reads_a_row_that_came_into_the_filter_without_its_large_value() {
        let partial: Vec<_> = decoded()
            .into_iter()
            .filter_map(|m| match m {
                Message::Insert { relation, new: NewRow::Partial(new) } => Some((relation, new)),
                _ => None,
            })
            .collect();
        let [(0x4014, new)] = &partial[..] else { panic!("{partial:?}") };
        assert_eq!(new.cells().collect::<Vec<_>>(), [Cell::Text(b"1"), Cell::Text(b"t"), Cell::Unchanged]);
    }

    #[test]
    fn reads_everything_else() {
        let got = decoded();
        let options = TruncateOptions { cascade: true, restart_identity: true };
        assert!(got.contains(&Message::Truncate { relations: vec![0x4021, 0x400d], options }));
        assert!(got.contains(&Message::Origin { commit: at(0x1234), name: "elsewhere".into() }));
        assert!(got.contains(&Message::Logical {
            transactional: true,
            lsn: at(0x154_2858),
            prefix: "prefetchd".into(),
            content: Bytes::from_iter(0..16),
        }));
        assert!(got.contains(&Message::Logical {
            transactional: false,
            lsn: at(0x154_28c8),
            prefix: "other".into(),
            content: "hello".into(),
        }));
        assert!(got.iter().any(|m| matches!(m, Message::Relation(r) if r.identity == ReplicaIdentity::Full)));
    }

    #[test]
    fn a_message_is_taken_whole_or_not_at_all() {
        for whole in captured::messages() {
            for cut in 0..whole.len() {
                let err = message(whole.slice(..cut)).expect_err("a part of a message");
                assert!(!matches!(err, DecodeError::Trailing { .. }), "{cut} of {whole:?}: {err}");
            }
            let longer = Bytes::from([&whole[..], &[0]].concat());
            let err = message(longer).expect_err("a message and a byte");
            assert!(matches!(err, DecodeError::Trailing { bytes: 1, .. }), "{whole:?}: {err}");
        }
    }

    #[test]
    fn frames_are_taken_whole_or_not_at_all() {
        let keepalive = Bytes::from_static(b"k\0\0\0\0\x01\x53\xfb\xd0\0\0\0\0\0\0\0\x07\x01");
        assert_eq!(
            frame(keepalive.clone()),
            Ok(CopyData::Keepalive {
                server_end: at(0x153_fbd0),
                sent_at: CommitTime::from_postgres_micros(7),
                reply_requested: true
            })
        );
        for cut in 0..keepalive.len() {
            frame(keepalive.slice(..cut)).expect_err("a part of a keepalive");
        }
        assert_eq!(
            frame([&keepalive[..], b"x"].concat().into()),
            Err(DecodeError::Trailing { message: "keepalive", bytes: 1 })
        );

        let data = Bytes::from_static(b"w\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0\x07payload");
        assert_eq!(
            frame(data.clone()),
            Ok(CopyData::XLogData {
                start: None,
                server_end: at(2),
                sent_at: CommitTime::from_postgres_micros(7),
                payload: "payload".into()
            })
        );
        for cut in 0..25 {
            frame(data.slice(..cut)).expect_err("a part of an XLogData header");
        }
        assert_eq!(frame(Bytes::from_static(b"z")), Err(DecodeError::UnknownFrame(b'z')));
    }

    #[test]
    fn says_what_it_does_not_understand() {
        let err = |bytes: &'static [u8]| message(Bytes::from_static(bytes)).expect_err("not protocol 1");
        assert_eq!(err(b""), DecodeError::Empty("a pgoutput message"));
        assert_eq!(err(b"?"), DecodeError::UnknownMessage(b'?'));
        assert!(err(b"S").to_string().contains("newer protocol"));
        assert_eq!(
            err(b"R\0\0\0\x01s\0t\xff\0dxx"),
            DecodeError::NotUtf8 { message: "Relation", bytes: Bytes::from_static(b"t\xff") }
        );
        assert_eq!(err(b"T\xff\xff\xff\xff\0"), DecodeError::NegativeCount { message: "Truncate", of: "relations" });
        assert_eq!(err(b"T\x7f\xff\xff\xff\0"), DecodeError::Truncated("Truncate"));
        assert_eq!(err(b"D\0\0\0\x01K\0\x01u"), DecodeError::IncompleteOldRow { message: "Delete" });
        assert_eq!(
            err(b"I\0\0\0\x01N\0\x01b\0\0\0\0"),
            DecodeError::Row { message: "Insert", source: MalformedRow::UnknownKind { cell: 0, kind: b'b' } }
        );
        assert_eq!(err(b"B\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x01"), DecodeError::NoPosition { message: "Begin" });
    }

    #[test]
    fn an_empty_schema_is_the_catalog() {
        let Ok(Message::Relation(relation)) = message(Bytes::from_static(b"R\0\0\0\x01\0t\0d\0\0")) else { panic!() };
        assert_eq!(relation.name.to_string(), "pg_catalog.t");
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 4096, ..ProptestConfig::default() })]

        #[test]
        fn never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..64), tag in "[BCORYIUDTMwk]") {
            let _ = message(bytes.clone().into());
            let _ = frame(bytes.clone().into());
            let tagged = Bytes::from([tag.as_bytes(), &bytes].concat());
            let _ = message(tagged.clone());
            let _ = frame(tagged);
        }

        /// Real messages with a few bytes changed reach deeper than noise does.
        #[test]
        fn never_panics_on_damaged_messages(
            which in any::<prop::sample::Index>(),
            damage in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        ) {
            let messages = captured::messages();
            let mut bytes = which.get(&messages).to_vec();
            for (at, value) in damage {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            if let Ok(Message::Insert { new: NewRow::Full(row), .. }) = message(bytes.into()) {
                prop_assert_eq!(row.cells().count(), row.cells().len());
            }
        }
    }
}
