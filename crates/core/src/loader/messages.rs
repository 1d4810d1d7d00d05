//! What the loader and whoever works for it say to each other.

use super::range::{Extent, Range, Sizes};
use crate::change::Nonce;
use crate::checkpoint::Blocked;
use crate::command::{DeadLetter, Key, Unwritable};
use crate::progress::visibility::Snapshot;
use crate::resp::batch::Limits;
use crate::schema::{CatalogMark, Oid, TableId};
use crate::session::chunk::{Content, Floor, FromLoad, KeysToRead, LoadOrder, Purpose};
use std::collections::HashSet;

/// One visit to Postgres: a chunk, or several small ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct VisitId(pub u64);

/// Who wants to know: a load waits for as long as it takes, a comparison is given up.
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

/// What the loader hears.
#[derive(Debug)]
pub enum Heard<T> {
    /// From the session, in its order.
    Ordered(Vec<LoadOrder>),
    /// The answer to [`Errand::LookUp`], for each table in their order.
    LookedUp(Vec<LookedUp<T>>),
    /// ... and there is none.
    NotLookedUp(Unread),
    /// The answer to [`Errand::FindEmpty`].
    Empty(HashSet<TableId>),
    /// The answer to [`Errand::Scan`]: the next cursor, 0 at the end.
    Scanned { next: u64, keys: Vec<Key> },
    /// Redis refuses what was asked of it for a comparison.
    Refused { why: String },
    /// What a visit brought, for each of its parts in their order.
    Visited(VisitId, Vec<Got>),
    /// ... and it brought nothing.
    NotVisited(VisitId, Unread),
    /// It is as late as [`super::Loader::wakes_at`] said.
    Woke,
}

/// What the loader wants done. One of `LookUp`, `FindEmpty` and `Scan` is out at a time.
#[derive(Debug)]
pub enum Errand<T> {
    /// Tables as the catalog has them now.
    LookUp {
        tables: Vec<TableId>,
        sizes: Sizes,
        asks: Asks,
    },
    /// Under which tables' prefixes no key lies in Redis.
    FindEmpty {
        tables: Vec<TableId>,
        asks: Asks,
    },
    /// Keys under a prefix in Redis, from this cursor on: a few more than `enough` of them, unless fewer are left.
    Scan {
        prefix: String,
        cursor: u64,
        enough: usize,
        asks: Asks,
    },
    /// Rows under one snapshot, then a mark for each part.
    Visit {
        visit: VisitId,
        asks: Asks,
        parts: Vec<Reading<T>>,
    },
    Say(Box<FromLoad>),
    /// For whoever reads the log.
    BeginsAgain {
        table: TableId,
        because: Again,
    },
}

/// Why a load begins again by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Again {
    /// The table is another than was looked up.
    Changed,
    /// Its rows lie elsewhere, without a word in the stream (VACUUM FULL, CLUSTER): what was covered is not known.
    Rewritten,
}

/// What is read of one table during a visit.
#[derive(Debug)]
pub struct Reading<T> {
    pub table: TableId,
    pub task: Task,
    /// Within which its rows are encoded.
    pub limits: Limits,
    /// As the table was looked up.
    pub described: T,
}

#[derive(Debug, Clone)]
pub enum Task {
    Range(Range),
    /// Which of these keys have a row.
    Orphans(Vec<Key>),
    Keys(KeysToRead),
}

/// What a look at the catalog found of a table.
#[derive(Debug)]
pub enum LookedUp<T> {
    Loadable(Loadable<T>),
    /// It cannot be followed.
    Blocked(Blocked),
    /// Somebody has it locked.
    Locked(Blocked),
}

/// A table that can be loaded. `described` is for whoever reads it.
#[derive(Debug, Clone)]
pub struct Loadable<T> {
    pub fingerprint: u64,
    pub catalog: CatalogMark,
    pub estimated_rows: u64,
    pub booleans: HashSet<Oid>,
    pub extent: Extent,
    pub described: T,
}

/// What became of one part of a visit.
#[derive(Debug)]
pub enum Got {
    Brought(Box<Brought>),
    /// The table is another than was looked up.
    Gone,
    /// It did not fit beside the others.
    Crowded,
}

#[derive(Debug)]
pub struct Brought {
    pub snapshot: Snapshot,
    /// Of the leaf that was read.
    pub filenode: Option<Oid>,
    pub content: Content,
    /// What the limit of bytes left over.
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
    /// Somebody else had the table locked for too long.
    Lock,
    /// It cannot be read as it is.
    Table,
    /// The server could not answer this time.
    Query,
    /// There was none, or it was lost.
    Connection,
}
