//! Turns pgoutput's messages into the sequence that the rest of the daemon relies on: transactions that begin and end,
//! and rows whose shape is known.
//!
//! Pure: bytes in, deliveries out. It must not know sockets, the configuration or Redis. It completes rows as far as
//! the stream itself allows (from a full old row, from an old key) and drops what is not needed: origins, type names,
//! other programs' messages, the rows of tables that are not followed. Anybody who may write to the database decides
//! how much of that there is, so none of it is kept, and large messages are not even read: [`Assembler::is_foreign`]. A
//! mistake here counts a change into the wrong transaction, or puts a row's cells into the wrong columns.
//!
//! One assembler serves one session: a new session describes all relations again.

use crate::change::{Begin, Change, Delivery, NewRow, Nonce, OldRow};
use crate::error::Disposition;
use crate::lsn::{CommitLsn, EndLsn, Lsn};
use crate::schema::{Oid, QualifiedName, Relation};
use crate::source::pgoutput::{self, CopyData, DecodeError, Message, Subject};
use bytes::Bytes;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;

/// The prefix of this daemon's own logical messages. Anybody may write messages with any prefix.
pub const MARK_PREFIX: &str = "prefetchd";

/// Maximum number of tables that are not followed; only their oids are kept. If a server describes more in one session,
/// as it does where tables are created and dropped all the time, a new session is begun.
const MOST_OTHERS: usize = 1 << 18;

/// What a frame said besides its deliveries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heard {
    /// The server wants a status update now, and ends the session if none arrives.
    pub reply_requested: bool,
    /// How far the server says that it has read the WAL; not all of that has been delivered.
    pub server_end: Option<Lsn>,
}

/// The stream violates protocol 1. A new session may not.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AssembleError {
    #[error(transparent)]
    Decode(#[from] DecodeError),
    #[error("transaction {second} began inside transaction {first}, which has not ended")]
    BeganTwice { first: u32, second: u32 },
    #[error("a {what} came outside of a transaction")]
    OutsideTransaction { what: &'static str },
    #[error("transaction {xid} announced its commit at {begun} and committed at {committed}")]
    OtherCommit { xid: u32, begun: CommitLsn, committed: CommitLsn },
    #[error("a change concerns relation {oid}, which the server has not described")]
    UnknownRelation { oid: Oid },
    #[error("the session has described {MOST_OTHERS} tables that nobody follows")]
    TooManyRelations,
    #[error("a row of {name} has {found} values for {expected} columns")]
    CellCount { name: QualifiedName, expected: usize, found: usize },
}

impl AssembleError {
    pub fn disposition(&self) -> Disposition {
        match self {
            AssembleError::Decode(_)
            | AssembleError::BeganTwice { .. }
            | AssembleError::OutsideTransaction { .. }
            | AssembleError::OtherCommit { .. }
            | AssembleError::UnknownRelation { .. }
            | AssembleError::TooManyRelations
            | AssembleError::CellCount { .. } => Disposition::Retry,
        }
    }
}

/// The state to keep from one frame to the next.
#[derive(Debug)]
pub struct Assembler {
    followed: HashSet<QualifiedName>,
    open: Option<Begin>,
    /// Followed tables, one for each name.
    relations: HashMap<Oid, Arc<Relation>>,
    /// Described tables that are not followed.
    others: HashSet<Oid>,
}

impl Assembler {
    /// Rows of other tables than those `followed` are delivered as [`Change::Foreign`].
    pub fn new(followed: HashSet<QualifiedName>) -> Self {
        Self { followed, open: None, relations: HashMap::new(), others: HashSet::new() }
    }

    /// Decides by the first bytes of a CopyData that is larger than any watermark: whether it is another program's
    /// message, or a row of a table that is not followed. The rest need not be read then, and [`Self::pass_over`] takes
    /// what was.
    pub fn is_foreign(&self, head: &[u8]) -> bool {
        match pgoutput::subject(head) {
            Some(Subject::Logical) => true,
            Some(Subject::Row(oid)) => self.others.contains(&oid),
            None => false,
        }
    }

    /// Takes the first bytes of a CopyData for which [`Self::is_foreign`] is true.
    pub fn pass_over(&mut self, head: &[u8], out: &mut Vec<Delivery>) -> Result<(), AssembleError> {
        if let Some(Subject::Row(_)) = pgoutput::subject(head) {
            self.inside("row")?;
            out.push(Delivery::Change(Change::Foreign { bytes: 0 }));
        }
        Ok(())
    }

    /// Takes the contents of one CopyData, and appends the resulting deliveries to `out`. An error appends nothing and
    /// changes nothing; the session cannot continue, but earlier deliveries remain valid.
    pub fn take(&mut self, frame: Bytes, out: &mut Vec<Delivery>) -> Result<Heard, AssembleError> {
        match pgoutput::frame(frame)? {
            CopyData::XLogData { server_end, payload, .. } => {
                let length = payload.len();
                self.message(pgoutput::message(payload)?, length, out)?;
                Ok(Heard { reply_requested: false, server_end })
            }
            CopyData::Keepalive { server_end, reply_requested, .. } => {
                // In mid-transaction the walsender has long since read its commit.
                if let (Some(end), None) = (server_end, self.open) {
                    out.push(Delivery::Position(EndLsn(end)));
                }
                Ok(Heard { reply_requested, server_end })
            }
        }
    }

    fn message(&mut self, message: Message, length: usize, out: &mut Vec<Delivery>) -> Result<(), AssembleError> {
        match message {
            Message::Begin(begin) => {
                if let Some(open) = self.open {
                    return Err(AssembleError::BeganTwice { first: open.xid, second: begin.xid });
                }
                self.open = Some(begin);
                out.push(Delivery::Begin(begin));
            }
            Message::Commit { commit, end, time: _ } => {
                let Some(begin) = self.open else {
                    return Err(AssembleError::OutsideTransaction { what: "commit" });
                };
                if begin.commit != commit {
                    return Err(AssembleError::OtherCommit { xid: begin.xid, begun: begin.commit, committed: commit });
                }
                self.open = None;
                out.push(Delivery::Commit { commit, end });
            }
            Message::Relation(relation) => self.relation(relation, out)?,
            Message::Insert { relation, .. } | Message::Update { relation, .. } | Message::Delete { relation, .. }
                if self.others.contains(&relation) =>
            {
                self.inside("row")?;
                out.push(Delivery::Change(Change::Foreign { bytes: length }));
            }
            Message::Insert { relation, new } => {
                self.inside("row")?;
                self.counted(relation, cells_of(&new))?;
                out.push(Delivery::Change(match new {
                    NewRow::Full(new) => Change::Insert { relation, new },
                    // An UPDATE that left a large value unchanged moved the row into the publication's filter: for a
                    // consumer, this is an update of a row that it does not have.
                    NewRow::Partial(_) => Change::Update { relation, old: None, new },
                }));
            }
            Message::Update { relation, old, new } => {
                self.inside("row")?;
                self.counted(relation, cells_of(&new))?;
                if let Some(old) = &old {
                    self.counted(relation, old.row().cells().len())?;
                }
                let new = completed(new, old.as_ref());
                out.push(Delivery::Change(Change::Update { relation, old, new }));
            }
            Message::Delete { relation, old } => {
                self.inside("row")?;
                self.counted(relation, old.row().cells().len())?;
                out.push(Delivery::Change(Change::Delete { relation, old }));
            }
            Message::Truncate { relations, options: _ } => {
                self.inside("truncate")?;
                if let Some(&oid) = relations.iter().find(|oid| !self.is_known(oid)) {
                    return Err(AssembleError::UnknownRelation { oid });
                }
                out.push(Delivery::Change(Change::Truncate { relations }));
            }
            // A non-transactional message is sent as soon as it is decoded: between transactions.
            Message::Logical { transactional: _, lsn: _, prefix, content } => {
                if let (true, Ok(nonce)) = (prefix == MARK_PREFIX.as_bytes(), <[u8; 16]>::try_from(&content[..])) {
                    out.push(Delivery::Mark(Nonce(nonce)));
                }
            }
            Message::Origin { .. } | Message::Type { .. } => {}
        }
        Ok(())
    }

    fn relation(&mut self, relation: Relation, out: &mut Vec<Delivery>) -> Result<(), AssembleError> {
        self.inside("relation")?;
        let oid = relation.oid;
        // The walsender repeats the description after every invalidation of its cache, for example by ANALYZE.
        if self.relations.get(&oid).is_some_and(|known| **known == relation) {
            return Ok(());
        }
        let relation = Arc::new(relation);
        let before = self.relations.remove(&oid);
        if self.followed.contains(&relation.name) {
            // A table that was dropped and created again has a new oid under the old name.
            let namesakes = self.relations.extract_if(|_, other| other.name == relation.name);
            self.others.extend(namesakes.map(|(oid, _)| oid));
            self.others.remove(&oid);
            self.relations.insert(oid, relation.clone());
        } else {
            if self.others.len() >= MOST_OTHERS {
                return Err(AssembleError::TooManyRelations);
            }
            self.others.insert(oid);
            if before.is_none() {
                return Ok(());
            }
        }
        out.push(Delivery::Relation(relation));
        Ok(())
    }

    fn is_known(&self, oid: &Oid) -> bool {
        self.relations.contains_key(oid) || self.others.contains(oid)
    }

    fn inside(&self, what: &'static str) -> Result<(), AssembleError> {
        match self.open {
            Some(_) => Ok(()),
            None => Err(AssembleError::OutsideTransaction { what }),
        }
    }

    fn counted(&self, oid: Oid, found: usize) -> Result<(), AssembleError> {
        match self.relations.get(&oid) {
            None => Err(AssembleError::UnknownRelation { oid }),
            Some(relation) if relation.columns.len() != found => {
                Err(AssembleError::CellCount { name: relation.name.clone(), expected: relation.columns.len(), found })
            }
            Some(_) => Ok(()),
        }
    }
}

fn cells_of(row: &NewRow) -> usize {
    match row {
        NewRow::Full(row) => row.cells().len(),
        NewRow::Partial(row) => row.cells().len(),
    }
}

/// Returns the new row, with what it omits taken from the old one: under REPLICA IDENTITY FULL everything, otherwise at
/// least a large value in a key column.
fn completed(new: NewRow, old: Option<&OldRow>) -> NewRow {
    match (new, old) {
        (NewRow::Partial(new), Some(OldRow::Full(old))) => NewRow::Full(new.completed_from(old)),
        (NewRow::Partial(new), Some(OldRow::Key(old))) => new.filled_from_key(old),
        (new @ NewRow::Full(_), _) | (new @ NewRow::Partial(_), None) => new,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::change::{Cell, CommitTime};
    use crate::source::pgoutput::captured;
    use bytes::{BufMut, BytesMut};
    use proptest::prelude::*;

    fn data(payload: &[u8]) -> Bytes {
        let mut out = BytesMut::from(&b"w"[..]);
        out.put_bytes(0, 24);
        out.put_slice(payload);
        out.freeze()
    }

    fn keepalive(end: u64) -> Bytes {
        let mut out = BytesMut::from(&b"k"[..]);
        out.put_u64(end);
        out.put_u64(0);
        out.put_u8(0);
        out.freeze()
    }

    fn begin(xid: u32, commit: u64) -> Bytes {
        let mut out = BytesMut::from(&b"B"[..]);
        out.put_u64(commit);
        out.put_u64(0);
        out.put_u32(xid);
        data(&out)
    }

    fn commit(commit: u64, end: u64) -> Bytes {
        let mut out = BytesMut::from(&b"C\0"[..]);
        out.put_u64(commit);
        out.put_u64(end);
        out.put_u64(0);
        data(&out)
    }

    /// Relation `oid` with text columns `a`, `b`, …
    fn relation(oid: u32, columns: u8) -> Bytes {
        relation_named("t", oid, columns)
    }

    fn relation_named(table: &str, oid: u32, columns: u8) -> Bytes {
        let mut out = BytesMut::from(&b"R"[..]);
        out.put_u32(oid);
        out.put_slice(format!("public\0{table}\0d").as_bytes());
        out.put_u16(columns.into());
        for column in 0..columns {
            out.put_slice(&[u8::from(column == 0), b'a' + column, 0]);
            out.put_u32(25);
            out.put_i32(-1);
        }
        data(&out)
    }

    fn insert(oid: u32, tuple: &[u8]) -> Bytes {
        data(&[b"I", &oid.to_be_bytes()[..], b"N", tuple].concat())
    }

    fn mark(prefix: &str, content: &[u8], flags: u8) -> Bytes {
        let mut out = BytesMut::from(&b"M"[..]);
        out.put_u8(flags);
        out.put_u64(77);
        out.put_slice(prefix.as_bytes());
        out.put_u8(0);
        out.put_u32(u32::try_from(content.len()).expect("short"));
        out.put_slice(content);
        data(&out)
    }

    fn named(schema: &str, table: &str) -> QualifiedName {
        QualifiedName { schema: schema.to_owned(), table: table.to_owned() }
    }

    /// Follows the tables of these tests and of the captured bytes.
    fn following() -> Assembler {
        let names = [("public", "t"), ("Sch é", "Ta\"ble"), ("public", "full_"), ("public", "m"), ("public", "filt")];
        Assembler::new(names.map(|(schema, table)| named(schema, table)).into())
    }

    fn run(frames: impl IntoIterator<Item = Bytes>) -> Result<Vec<Delivery>, AssembleError> {
        let (mut assembler, mut out) = (following(), Vec::new());
        for frame in frames {
            assembler.take(frame, &mut out)?;
        }
        Ok(out)
    }

    fn end(n: u64) -> EndLsn {
        EndLsn(Lsn::new(n).expect("not zero"))
    }

    fn begun(xid: u32, n: u64) -> Delivery {
        Delivery::Begin(Begin { xid, commit: CommitLsn(end(n).0), time: CommitTime::from_postgres_micros(0) })
    }

    fn committed(at: u64, n: u64) -> Delivery {
        Delivery::Commit { commit: CommitLsn(end(at).0), end: end(n) }
    }

    fn described(delivery: &Delivery) -> (Oid, usize) {
        let Delivery::Relation(relation) = delivery else { panic!("{delivery:?}") };
        (relation.oid, relation.columns.len())
    }

    const ONE: &[u8] = b"\0\x01t\0\0\0\x01x";

    #[test]
    fn delivers_what_postgres_sent() {
        let out = run(captured::messages().iter().map(|m| data(m))).expect("Postgres sent it");
        let count = |f: fn(&Delivery) -> bool| out.iter().filter(|d| f(d)).count();
        assert_eq!(count(|d| matches!(d, Delivery::Begin(_))), 13);
        assert_eq!(count(|d| matches!(d, Delivery::Commit { .. })), 13);
        // "Sch é"."Ta""ble", full_, m and filt; m again after the TRUNCATE gave it another file, but just the same.
        assert_eq!(count(|d| matches!(d, Delivery::Relation(_))), 4);
        let marks: Vec<_> = out.iter().filter(|d| matches!(d, Delivery::Mark(_))).collect();
        assert_eq!(marks, [&Delivery::Mark(Nonce(std::array::from_fn(|i| i as u8)))]);
        let truncated = Delivery::Change(Change::Truncate { relations: vec![0x4021, 0x400d] });
        assert!(out.contains(&truncated));
    }

    #[test]
    fn a_full_old_row_completes_the_new_one() {
        let out = run(captured::messages().iter().map(|m| data(m))).expect("Postgres sent it");
        let full: Vec<_> = out
            .iter()
            .filter_map(|d| match d {
                Delivery::Change(Change::Update { old: Some(OldRow::Full(_)), new, .. }) => Some(new),
                _ => None,
            })
            .collect();
        let [NewRow::Full(new)] = full[..] else { panic!("{full:?}") };
        assert_eq!(new.cells().collect::<Vec<_>>(), [Some(&b"4"[..]), Some("y".repeat(3000).as_bytes())]);
    }

    #[test]
    fn an_old_key_tells_a_large_key_that_did_not_change() {
        let update = b"U\0\0\0\x01K\0\x02t\0\0\0\x03keynN\0\x02uu";
        let out = run([begin(5, 9), relation(1, 2), data(update)]).expect("well-formed");
        let Delivery::Change(Change::Update { new: NewRow::Partial(new), .. }) = &out[2] else { panic!("{out:?}") };
        assert_eq!(new.cells().collect::<Vec<_>>(), [Cell::Text(b"key"), Cell::Unchanged]);
    }

    #[test]
    fn a_row_that_came_into_the_filter_incomplete_is_an_update() {
        let out = run([begin(5, 9), relation(1, 2), insert(1, b"\0\x02t\0\0\0\x01xu")]).expect("well-formed");
        let Delivery::Change(Change::Update { relation: 1, old: None, new: NewRow::Partial(_) }) = &out[2] else {
            panic!("{out:?}")
        };
    }

    #[test]
    fn a_relation_is_told_when_it_differs_from_the_last() {
        let out = run([
            begin(5, 9),
            relation(1, 1),
            relation(1, 1),
            relation_named("m", 2, 1),
            commit(9, 10),
            begin(6, 19),
            relation(1, 1),
            relation(1, 2),
            relation(1, 1),
        ])
        .expect("well-formed");
        assert_eq!(out.iter().skip(1).take(2).map(described).collect::<Vec<_>>(), [(1, 1), (2, 1)]);
        assert_eq!(out.iter().skip(5).map(described).collect::<Vec<_>>(), [(1, 2), (1, 1)]);
    }

    #[test]
    fn a_table_that_nobody_follows_is_counted_and_not_kept() {
        let foreign = |bytes| Delivery::Change(Change::Foreign { bytes });
        let mut assembler = following();
        let mut out = Vec::new();
        let frames = [begin(5, 9), relation_named("x", 3, 1), relation(1, 1), insert(3, ONE), insert(1, ONE)];
        for frame in frames.into_iter().chain([data(b"T\0\0\0\x01\0\0\0\0\x03")]) {
            assembler.take(frame, &mut out).expect("well-formed");
        }
        assert_eq!((out.len(), described(&out[1]), &out[2]), (5, (1, 1), &foreign(14)));
        assert_eq!(out[4], Delivery::Change(Change::Truncate { relations: vec![3] }));
        assert_eq!((assembler.relations.len(), assembler.others.len()), (1, 1));
    }

    #[test]
    fn a_table_of_another_name_is_told_and_followed_no_longer() {
        let out = run([
            begin(5, 9),
            relation(1, 1),
            relation_named("x", 1, 1),
            insert(1, ONE),
            relation(1, 1),
            // Created again: what still arrives of the old one is ignored.
            relation(2, 1),
            insert(1, ONE),
            insert(2, ONE),
        ])
        .expect("well-formed");
        assert_eq!([1, 2, 4, 5].map(|i| described(&out[i]).0), [1, 1, 1, 2]);
        let is_foreign = |i: usize| matches!(out[i], Delivery::Change(Change::Foreign { .. }));
        assert_eq!([3, 6, 7].map(is_foreign), [true, true, false]);
    }

    #[test]
    fn tables_made_and_dropped_without_end_cost_bounded_memory() {
        let (mut assembler, mut out) = (following(), Vec::new());
        assembler.take(begin(5, 9), &mut out).expect("well-formed");
        for oid in 0..2 * u32::try_from(MOST_OTHERS).expect("few") {
            if let Err(error) = assembler.take(relation_named("x", oid, 0), &mut out) {
                assert_eq!((error, oid as usize), (AssembleError::TooManyRelations, MOST_OTHERS));
                break;
            }
        }
        assert!(assembler.relations.is_empty() && out.len() == 1);
        // Nor does a table with a followed name.
        for oid in 0..100 {
            assembler.take(relation(oid, 1), &mut out).expect("well-formed");
            assert_eq!(assembler.relations.len(), 1);
        }
    }

    #[test]
    fn of_a_large_frame_only_what_concerns_somebody_is_read() {
        let mut assembler = following();
        let mut out = Vec::new();
        for frame in [begin(5, 9), relation(1, 1), relation_named("x", 2, 1)] {
            assembler.take(frame, &mut out).expect("well-formed");
        }
        let before = out.len();
        let head = |frame: Bytes| frame.slice(..frame.len().min(40));
        for (frame, is_foreign) in [
            (mark("outbox", &[0; 100], 1), true),
            // A watermark is shorter than any frame for which this is asked.
            (mark(MARK_PREFIX, &[0; 100], 0), true),
            (insert(2, ONE), true),
            (data(b"U\0\0\0\x02N\0\x01t\0\0\0\x01x"), true),
            (insert(1, ONE), false),
            (relation(1, 9), false),
            (data(b"I\0\0"), false),
            (data(b""), false),
            (keepalive(7), false),
        ] {
            assert_eq!(assembler.is_foreign(&head(frame.clone())), is_foreign, "{frame:?}");
        }
        for frame in [mark("outbox", &[0; 100], 1), insert(2, ONE)] {
            assembler.pass_over(&head(frame), &mut out).expect("inside");
        }
        assert_eq!(out[before..], [Delivery::Change(Change::Foreign { bytes: 0 })]);
        assert!(following().pass_over(&head(insert(2, ONE)), &mut out).is_err());
    }

    #[test]
    fn a_keepalive_is_a_position_between_transactions_only() {
        let out =
            run([keepalive(3), begin(5, 9), keepalive(8), keepalive(30), commit(9, 10), keepalive(31), keepalive(0)])
                .expect("well-formed");
        assert_eq!(out, [Delivery::Position(end(3)), begun(5, 9), committed(9, 10), Delivery::Position(end(31))]);
    }

    #[test]
    fn tells_what_the_server_asks_and_where_it_is() {
        let mut assembler = following();
        let frame = Bytes::from_static(b"k\0\0\0\0\0\0\0\x05\0\0\0\0\0\0\0\0\x01");
        let taken = assembler.take(frame, &mut Vec::new());
        assert_eq!(taken, Ok(Heard { reply_requested: true, server_end: Lsn::new(5) }));
        let taken = assembler.take(begin(1, 9), &mut Vec::new());
        assert_eq!(taken, Ok(Heard { reply_requested: false, server_end: None }));
    }

    #[test]
    fn only_our_own_messages_are_marks() {
        let nonce = [7; 16];
        let out = run([
            mark(MARK_PREFIX, &nonce, 0),
            begin(5, 9),
            mark(MARK_PREFIX, &nonce, 1),
            mark("other", &nonce, 1),
            mark(MARK_PREFIX, &nonce[..15], 1),
            mark(MARK_PREFIX, b"", 1),
            commit(9, 10),
        ])
        .expect("well-formed");
        let ours = Delivery::Mark(Nonce(nonce));
        assert_eq!(out, [ours.clone(), begun(5, 9), ours, committed(9, 10)]);
    }

    #[test]
    fn refuses_what_is_out_of_order() {
        let outside = |what| AssembleError::OutsideTransaction { what };
        assert_eq!(run([begin(5, 9), begin(6, 19)]), Err(AssembleError::BeganTwice { first: 5, second: 6 }));
        assert_eq!(run([commit(9, 10)]), Err(outside("commit")));
        assert_eq!(run([relation(1, 1)]), Err(outside("relation")));
        let described = || [begin(5, 9), relation(1, 1), commit(9, 10)].into_iter();
        assert_eq!(run(described().chain([insert(1, ONE)])), Err(outside("row")));
        let truncate = data(b"T\0\0\0\x01\0\0\0\0\x01");
        assert_eq!(run(described().chain([truncate])), Err(outside("truncate")));
        let (begun, committed) = (CommitLsn(end(9).0), CommitLsn(end(8).0));
        assert_eq!(run([begin(5, 9), commit(8, 10)]), Err(AssembleError::OtherCommit { xid: 5, begun, committed }));
    }

    #[test]
    fn refuses_rows_of_another_shape() {
        let (begin, two) = (|| begin(5, 9), || relation(1, 2));
        let name = QualifiedName { schema: "public".into(), table: "t".into() };
        let miscounted = Err(AssembleError::CellCount { name, expected: 2, found: 1 });
        assert_eq!(run([begin(), insert(1, ONE)]), Err(AssembleError::UnknownRelation { oid: 1 }));
        assert_eq!(run([begin(), data(b"T\0\0\0\x01\0\0\0\0\x01")]), Err(AssembleError::UnknownRelation { oid: 1 }));
        assert_eq!(run([begin(), two(), insert(1, ONE)]), miscounted);
        assert_eq!(run([begin(), two(), data(b"U\0\0\0\x01N\0\x01n")]), miscounted);
        assert_eq!(run([begin(), two(), data(b"U\0\0\0\x01K\0\x01nN\0\x02nn")]), miscounted);
        assert_eq!(run([begin(), two(), data(b"D\0\0\0\x01O\0\x01n")]), miscounted);
    }

    fn any_frame() -> impl Strategy<Value = Bytes> {
        let lsn = 0..6_u64;
        prop_oneof![
            lsn.clone().prop_map(keepalive),
            (1..3_u32, 1..6_u64).prop_map(|(xid, at)| begin(xid, at)),
            (1..6_u64, 1..6_u64).prop_map(|(at, end)| commit(at, end)),
            (1..3_u32, 0..3_u8).prop_map(|(oid, columns)| relation(oid, columns)),
            (1..3_u32).prop_map(|oid| insert(oid, ONE)),
            any::<bool>().prop_map(|own| mark(if own { MARK_PREFIX } else { "x" }, &[1; 16], 1)),
            proptest::collection::vec(any::<u8>(), 0..30).prop_map(Bytes::from),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 1024, ..ProptestConfig::default() })]

        /// Whatever the input, deliveries are well-formed: all later stages rely on this.
        #[test]
        fn delivers_only_well_formed_transactions(frames in proptest::collection::vec(any_frame(), 0..40)) {
            let (mut assembler, mut out) = (following(), Vec::new());
            for frame in frames {
                let _ = assembler.take(frame, &mut out);
            }
            let (mut open, mut shapes) = (None, HashMap::new());
            for delivery in out {
                match delivery {
                    Delivery::Begin(begin) => open = Some(begin.commit),
                    Delivery::Commit { commit, .. } => prop_assert_eq!(open.take(), Some(commit)),
                    Delivery::Position(_) => prop_assert_eq!(open, None),
                    Delivery::Relation(relation) => {
                        prop_assert!(open.is_some());
                        shapes.insert(relation.oid, relation.columns.len());
                    }
                    Delivery::Change(Change::Insert { relation, new }) => {
                        prop_assert!(open.is_some());
                        prop_assert_eq!(shapes.get(&relation), Some(&new.cells().len()));
                    }
                    Delivery::Change(Change::Foreign { .. }) => prop_assert!(open.is_some()),
                    Delivery::Change(other) => prop_assert!(false, "{:?}", other),
                    Delivery::Mark(_) => {}
                }
            }
        }
    }
}
