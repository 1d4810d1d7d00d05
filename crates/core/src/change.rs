//! Rows and changes as they leave the source. Nothing here knows TOAST, sockets or Redis.
//!
//! A row keeps the bytes that Postgres sent, in the layout of pgoutput's TupleData, and is read in place. The stream
//! passes on reference-counted slices of its read buffer; a load writes the same layout from COPY's text.
//! <https://www.postgresql.org/docs/current/protocol-logicalrep-message-formats.html>

use crate::lsn::{CommitLsn, EndLsn};
use crate::schema::{Oid, Relation};
use bytes::{BufMut, Bytes, BytesMut};
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

const NULL: u8 = b'n';
const TEXT: u8 = b't';
const UNCHANGED: u8 = b'u';

/// One cell of a [`PartialRow`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cell<'a> {
    Null,
    Text(&'a [u8]),
    /// A large value that the UPDATE did not change, so Postgres did not send it.
    Unchanged,
}

/// A row of which every cell is known.
#[derive(Clone, PartialEq, Eq)]
pub struct Row(Bytes);

/// A row in which some cells are unchanged from the previous version of the row.
#[derive(Clone, PartialEq, Eq)]
pub struct PartialRow(Bytes);

/// A tuple that is not valid TupleData.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MalformedRow {
    #[error("a tuple ended in the middle of cell {cell}")]
    Truncated { cell: usize },
    #[error("cell {cell} of a tuple has the unknown kind {kind:#04x}")]
    UnknownKind { cell: usize, kind: u8 },
}

/// The new row of a change: complete, or with unchanged cells left out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NewRow {
    Full(Row),
    Partial(PartialRow),
}

impl NewRow {
    /// Takes one TupleData from the front of `input` and leaves the rest there.
    ///
    /// # Errors
    /// If the tuple is truncated or contains a cell of an unknown kind.
    pub fn take(input: &mut Bytes) -> Result<Self, MalformedRow> {
        let truncated = |cell| MalformedRow::Truncated { cell };
        let count = match input.get(..2) {
            Some(&[hi, lo]) => usize::from(u16::from_be_bytes([hi, lo])),
            _ => return Err(truncated(0)),
        };
        let (mut at, mut partial) = (2, false);
        for cell in 0..count {
            match input.get(at) {
                None => return Err(truncated(cell)),
                Some(&NULL) => at += 1,
                Some(&UNCHANGED) => {
                    at += 1;
                    partial = true;
                }
                Some(&TEXT) => match input.get(at + 1..at + 5) {
                    Some(&[a, b, c, d]) => {
                        let end = at + 5 + u32::from_be_bytes([a, b, c, d]) as usize;
                        if end > input.len() {
                            return Err(truncated(cell));
                        }
                        at = end;
                    }
                    _ => return Err(truncated(cell)),
                },
                Some(&kind) => return Err(MalformedRow::UnknownKind { cell, kind }),
            }
        }
        let row = input.split_to(at);
        Ok(if partial { NewRow::Partial(PartialRow(row)) } else { NewRow::Full(Row(row)) })
    }
}

/// Iterates over cells that [`NewRow::take`] or [`RowBuilder`] wrote, whose lengths are therefore valid.
#[derive(Clone)]
pub struct Cells<'a> {
    rest: &'a [u8],
    left: usize,
}

impl<'a> Cells<'a> {
    fn of(tuple: &'a Bytes) -> Self {
        Cells { rest: &tuple[2..], left: usize::from(u16::from_be_bytes([tuple[0], tuple[1]])) }
    }
}

impl<'a> Iterator for Cells<'a> {
    type Item = Cell<'a>;

    #[inline]
    fn next(&mut self) -> Option<Cell<'a>> {
        self.left = self.left.checked_sub(1)?;
        let (&kind, rest) = self.rest.split_first()?;
        match kind {
            NULL => {
                self.rest = rest;
                Some(Cell::Null)
            }
            UNCHANGED => {
                self.rest = rest;
                Some(Cell::Unchanged)
            }
            _ => {
                let (len, rest) = rest.split_first_chunk::<4>()?;
                let (text, rest) = rest.split_at_checked(u32::from_be_bytes(*len) as usize)?;
                self.rest = rest;
                Some(Cell::Text(text))
            }
        }
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left, Some(self.left))
    }
}

impl ExactSizeIterator for Cells<'_> {}

impl Row {
    /// The cells in order; `None` is NULL.
    pub fn cells(&self) -> impl ExactSizeIterator<Item = Option<&[u8]>> + Clone {
        Cells::of(&self.0).map(|cell| match cell {
            Cell::Text(text) => Some(text),
            Cell::Null | Cell::Unchanged => None,
        })
    }

    /// The cell at `index`; `None` if it is NULL or beyond the end.
    pub fn cell(&self, index: usize) -> Option<&[u8]> {
        self.cells().nth(index).flatten()
    }

    pub fn len_bytes(&self) -> usize {
        self.0.len()
    }
}

impl PartialRow {
    pub fn cells(&self) -> Cells<'_> {
        Cells::of(&self.0)
    }

    pub fn cell(&self, index: usize) -> Cell<'_> {
        self.cells().nth(index).unwrap_or(Cell::Null)
    }

    pub fn len_bytes(&self) -> usize {
        self.0.len()
    }

    /// Fills the unchanged cells from `earlier`, the previous version of the same row.
    pub fn completed_from(&self, earlier: &Row) -> Row {
        let mut out = RowBuilder::with_capacity(self.0.len() + earlier.0.len());
        for (cell, before) in self.cells().zip(earlier.cells()) {
            match cell {
                Cell::Text(text) => out.text(text),
                Cell::Null => out.null(),
                Cell::Unchanged => out.cell(before),
            }
        }
        out.row()
    }

    /// Fills the unchanged cells from `earlier`, which may itself leave some of them out.
    pub fn over(&self, earlier: &PartialRow) -> PartialRow {
        let mut out = RowBuilder::with_capacity(self.0.len() + earlier.0.len());
        for (cell, before) in self.cells().zip(earlier.cells()) {
            match if cell == Cell::Unchanged { before } else { cell } {
                Cell::Text(text) => out.text(text),
                Cell::Null => out.null(),
                Cell::Unchanged => out.unchanged(),
            }
        }
        PartialRow(out.finish())
    }

    /// Fills the unchanged cells that `known` has. NULL in `known` means "not known", because an old key holds the
    /// identity's columns only.
    pub fn filled_from_key(&self, known: &Row) -> NewRow {
        let mut out = RowBuilder::with_capacity(self.0.len() + known.0.len());
        let mut partial = false;
        for (cell, before) in self.cells().zip(known.cells()) {
            match (cell, before) {
                (Cell::Text(text), _) | (Cell::Unchanged, Some(text)) => out.text(text),
                (Cell::Null, _) => out.null(),
                (Cell::Unchanged, None) => {
                    out.unchanged();
                    partial = true;
                }
            }
        }
        let tuple = out.finish();
        if partial { NewRow::Partial(PartialRow(tuple)) } else { NewRow::Full(Row(tuple)) }
    }
}

impl fmt::Debug for Row {
    /// Shows the shape only: values must not appear in logs.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Row({} cells, {} bytes)", self.cells().len(), self.0.len())
    }
}

impl fmt::Debug for PartialRow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PartialRow({} cells, {} bytes)", self.cells().len(), self.0.len())
    }
}

/// Builds a row cell by cell.
pub struct RowBuilder {
    out: BytesMut,
    cells: u16,
}

impl RowBuilder {
    pub fn with_capacity(bytes: usize) -> Self {
        let mut out = BytesMut::with_capacity(bytes + 2);
        out.put_u16(0);
        Self { out, cells: 0 }
    }

    pub fn null(&mut self) {
        self.out.put_u8(NULL);
        self.cells += 1;
    }

    pub fn text(&mut self, text: &[u8]) {
        self.text_with(|out| out.put_slice(text));
    }

    /// `None` is NULL.
    pub fn cell(&mut self, value: Option<&[u8]>) {
        match value {
            Some(text) => self.text(text),
            None => self.null(),
        }
    }

    /// Appends a text cell that `write` produces, for unescaping in place.
    ///
    /// # Panics
    /// If the cell is 4 GB or larger; Postgres has no values over 1 GB.
    pub fn text_with(&mut self, write: impl FnOnce(&mut BytesMut)) {
        self.out.put_u8(TEXT);
        let at = self.out.len();
        self.out.put_u32(0);
        write(&mut self.out);
        let len = u32::try_from(self.out.len() - at - 4).expect("Postgres sends no value over 1 GB");
        self.out[at..at + 4].copy_from_slice(&len.to_be_bytes());
        self.cells += 1;
    }

    fn unchanged(&mut self) {
        self.out.put_u8(UNCHANGED);
        self.cells += 1;
    }

    fn finish(mut self) -> Bytes {
        self.out[..2].copy_from_slice(&self.cells.to_be_bytes());
        self.out.freeze()
    }

    pub fn row(self) -> Row {
        Row(self.finish())
    }
}

/// The old row of an UPDATE or DELETE, as far as the replica identity lets Postgres send it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OldRow {
    /// The identity's columns; every other cell is NULL.
    Key(Row),
    /// All columns (`REPLICA IDENTITY FULL`).
    Full(Row),
}

impl OldRow {
    pub fn row(&self) -> &Row {
        match self {
            OldRow::Key(row) | OldRow::Full(row) => row,
        }
    }
}

/// One change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    Insert {
        relation: Oid,
        new: Row,
    },
    /// `old` is set if the key columns changed, if the identity is FULL, or if the key contains large values.
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
    },
    /// A row of a table that is not configured: counted, but not kept.
    Foreign {
        /// Size of the buffers in which it arrived.
        bytes: usize,
    },
}

impl Change {
    /// Bytes of row data that the change keeps in memory, including what shares its buffers.
    pub fn len_bytes(&self) -> usize {
        match self {
            Change::Insert { new, .. } => new.len_bytes(),
            Change::Update { old, new, .. } => {
                old.as_ref().map_or(0, |o| o.row().len_bytes())
                    + match new {
                        NewRow::Full(row) => row.len_bytes(),
                        NewRow::Partial(row) => row.len_bytes(),
                    }
            }
            Change::Delete { old, .. } => old.row().len_bytes(),
            Change::Truncate { relations } => relations.len() * size_of::<Oid>(),
            Change::Foreign { bytes } => *bytes,
        }
    }
}

/// When a transaction committed according to Postgres's clock, in microseconds since the Unix epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct CommitTime(pub i64);

/// Seconds between the Unix epoch and Postgres's, 2000-01-01.
pub const POSTGRES_EPOCH_SECONDS: i64 = 946_684_800;

impl CommitTime {
    pub fn from_postgres_micros(micros: i64) -> Self {
        CommitTime(micros.saturating_add(POSTGRES_EPOCH_SECONDS * 1_000_000))
    }

    /// The time since the commit; zero if the two clocks disagree about the order.
    pub fn age(self, now: SystemTime) -> Duration {
        let now = now.duration_since(UNIX_EPOCH).unwrap_or_default();
        now.saturating_sub(Duration::from_micros(u64::try_from(self.0).unwrap_or(0)))
    }
}

/// The header of a transaction. Protocol version 1 sends complete transactions one after the other. Version 2 would
/// open streamed transactions with the same header, and [`Delivery::Change`] would then name its transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Begin {
    /// The low 32 bits of the transaction ID.
    pub xid: u32,
    pub commit: CommitLsn,
    pub time: CommitTime,
}

/// The 128-bit random number that identifies a watermark.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Nonce(pub [u8; 16]);

impl fmt::Debug for Nonce {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

/// What the stream delivers, in WAL order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Delivery {
    Begin(Begin),
    /// A table's description from here on. It precedes the table's first change and follows every change of its
    /// columns. Sent inside a transaction.
    Relation(Arc<Relation>),
    Change(Change),
    /// A watermark of this daemon: every transaction that the chunk's snapshot saw has been delivered.
    Mark(Nonce),
    Commit {
        commit: CommitLsn,
        end: EndLsn,
    },
    /// Sent between transactions: everything before this position has been delivered.
    Position(EndLsn),
}

#[cfg(test)]
impl PartialRow {
    pub fn of(cells: &[Cell<'_>]) -> Self {
        let mut b = RowBuilder::with_capacity(0);
        for cell in cells {
            match cell {
                Cell::Null => b.null(),
                Cell::Text(t) => b.text(t),
                Cell::Unchanged => b.unchanged(),
            }
        }
        PartialRow(b.finish())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(cells: &[Option<&str>]) -> Row {
        let mut b = RowBuilder::with_capacity(0);
        for cell in cells {
            b.cell(cell.map(str::as_bytes));
        }
        b.row()
    }

    #[test]
    fn a_tuple_is_taken_whole_or_not_at_all() {
        let mut wire = BytesMut::new();
        wire.put_slice(&row(&[Some("a"), None, Some("")]).0);
        let whole = wire.clone().freeze();
        for cut in 0..whole.len() {
            assert!(NewRow::take(&mut whole.slice(..cut)).is_err(), "{cut}");
        }
        wire.put_slice(b"rest");
        let mut input = wire.freeze();
        let NewRow::Full(taken) = NewRow::take(&mut input).expect("well-formed") else { panic!("no cell is missing") };
        assert_eq!(taken.cells().collect::<Vec<_>>(), [Some(&b"a"[..]), None, Some(b"")]);
        assert_eq!(&input[..], b"rest");
    }

    #[test]
    fn an_unchanged_cell_comes_from_the_earlier_version() {
        let p = PartialRow::of(&[Cell::Text(b"k"), Cell::Unchanged, Cell::Null, Cell::Unchanged]);
        assert_eq!(
            p.completed_from(&row(&[Some("x"), Some("big"), Some("y"), None])),
            row(&[Some("k"), Some("big"), None, None])
        );
        let q = PartialRow::of(&[Cell::Text(b"k"), Cell::Text(b"old"), Cell::Text(b"z"), Cell::Unchanged]);
        assert_eq!(p.over(&q), PartialRow::of(&[Cell::Text(b"k"), Cell::Text(b"old"), Cell::Null, Cell::Unchanged]));
    }

    #[test]
    fn an_old_key_fills_what_it_knows_and_no_more() {
        let p = PartialRow::of(&[Cell::Unchanged, Cell::Unchanged]);
        assert_eq!(
            p.filled_from_key(&row(&[Some("k"), None])),
            NewRow::Partial(PartialRow::of(&[Cell::Text(b"k"), Cell::Unchanged]))
        );
        assert_eq!(p.filled_from_key(&row(&[Some("k"), Some("v")])), NewRow::Full(row(&[Some("k"), Some("v")])));
    }
}
