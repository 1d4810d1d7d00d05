//! The messages between the loader and those that work for it.

use super::range::{Extent, Range, Sizes};
use crate::change::Nonce;
use crate::checkpoint::Blocked;
use crate::command::{DeadLetter, Key, Unwritable};
use crate::progress::visibility::Snapshot;
use crate::resp::batch::Encoding;
use crate::schema::{CatalogMark, Composition, Oid, TableId};
use crate::session::load_messages::{Content, Floor, FromLoad, KeysToRead, LoadOrder, Purpose};
use crate::typed::known::KnownTypes;
use crate::typed::row_type::EncodedRowType;
use std::collections::HashSet;

/// Identifies a visit to Postgres, which reads one chunk or several small ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct VisitId(pub u64);

/// Who needs the answer: a load waits for as long as it takes, a comparison is given up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asks {
    Load,
    Comparison,
}

impl From<Purpose> for Asks {
    fn from(purpose: Purpose) -> Self {
        match purpose {
            Purpose::Fill => Asks::Load,
            Purpose::Compare(_) => Asks::Comparison,
        }
    }
}

/// An input of the loader.
#[derive(Debug)]
pub enum Heard<T> {
    /// Orders of the session, in order.
    Ordered(Vec<LoadOrder>),
    /// The answer to [`Errand::LookUp`], for each table in order.
    LookedUp(Vec<LookedUp<T>>),
    /// The lookup failed.
    NotLookedUp(Unread),
    /// The answer to [`Errand::FindEmpty`].
    Empty(HashSet<TableId>),
    /// The answer to [`Errand::Scan`]: the next cursor, which is 0 at the end.
    Scanned { next: u64, keys: Vec<Key> },
    /// Redis refuses what a comparison asks of it.
    Refused { why: String },
    /// What a visit returned, for each of its parts in order.
    Visited(VisitId, Vec<Got>),
    /// The visit failed.
    NotVisited(VisitId, Unread),
    /// The time returned by [`super::Loader::wakes_at`] has come.
    Woke,
}

/// What the loader wants done. At most one `LookUp`, `FindEmpty` or `Scan` is outstanding at a time.
#[derive(Debug)]
pub enum Errand<T> {
    /// Read these tables from the catalog.
    LookUp {
        tables: Vec<TableId>,
        sizes: Sizes,
        asks: Asks,
    },
    /// Find out which tables have no key in Redis under their prefixes: neither rows nor lists.
    FindEmpty {
        tables: Vec<TableId>,
        asks: Asks,
    },
    /// Read keys under a prefix in Redis, from this cursor on: slightly more than `enough`, unless fewer are left.
    Scan {
        prefix: String,
        cursor: u64,
        enough: usize,
        asks: Asks,
    },
    /// Read rows under one snapshot, then emit a watermark for each part.
    Visit {
        visit: VisitId,
        asks: Asks,
        parts: Vec<Reading<T>>,
    },
    Say(Box<FromLoad>),
    /// For the log.
    BeginsAgain {
        table: TableId,
        because: Again,
    },
}

/// Why a load starts over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Again {
    /// The table differs from what was looked up.
    Changed,
    /// Its rows were moved without a message in the stream (VACUUM FULL, CLUSTER), so it is unknown what was covered.
    Rewritten,
}

/// What a visit reads of one table.
#[derive(Debug)]
pub struct Reading<T> {
    pub table: TableId,
    pub task: Task,
    pub encoding: Encoding,
    /// The table as it was looked up.
    pub described: T,
}

#[derive(Debug, Clone)]
pub enum Task {
    Range(Range),
    /// Find out which of these keys have a row.
    Orphans(Vec<Key>),
    Keys(KeysToRead),
}

/// What the catalog says about a table.
#[derive(Debug)]
pub enum LookedUp<T> {
    Loadable(Loadable<T>),
    /// The table cannot be followed.
    Blocked(Blocked),
    /// Another session has it locked.
    Locked(Blocked),
}

/// A table that can be loaded. `described` is for the code that reads it.
#[derive(Debug, Clone)]
pub struct Loadable<T> {
    pub fingerprint: u64,
    pub catalog: CatalogMark,
    pub types: EncodedRowType,
    pub estimated_rows: u64,
    pub known_types: KnownTypes,
    pub extent: Extent,
    /// Its leaves are in the order of `extent`.
    pub composition: Composition,
    pub described: T,
}

/// The result of one part of a visit.
#[derive(Debug)]
pub enum Got {
    Brought(Box<Brought>),
    /// The table differs from what was looked up.
    Gone,
    /// It did not fit next to the other parts.
    Crowded,
}

#[derive(Debug)]
pub struct Brought {
    pub snapshot: Snapshot,
    /// The file of the leaf that was read.
    pub filenode: Option<Oid>,
    pub content: Content,
    /// What the limit on bytes left unread.
    pub rest: Option<Range>,
    pub unwritable: Vec<Unwritable>,
    pub keyless: Vec<Keyless>,
    pub nonce: Nonce,
    pub floor: Floor,
}

/// A row without a key.
#[derive(Debug)]
pub struct Keyless {
    pub code: &'static str,
    pub letter: DeadLetter,
}

/// Why Postgres did not answer.
#[derive(Debug, Clone)]
pub struct Unread {
    pub cause: Cause,
    pub text: String,
    /// The same, as a reason why a table cannot be read.
    pub why: Blocked,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// Another session had the table locked for too long.
    Lock,
    /// The table cannot be read as it is.
    Table,
    /// The server could not answer this time.
    Query,
    /// There was no connection, or it was lost.
    Connection,
}
