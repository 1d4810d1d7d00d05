//! What the loader and the apply machine say to each other.

use crate::admin::Repair;
use crate::change::Nonce;
use crate::checkpoint::Blocked;
use crate::command::{DeadLetter, EncodedRows, Key, Unwritable};
use crate::progress::visibility::Snapshot;
use crate::reason::Reason;
use crate::schema::{CatalogMark, Oid, TableId};
use std::collections::{BTreeMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

/// One load of one table; a load that begins anew has another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct LoadId(pub u64);

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChunkId(pub u64);

/// Some rows, read under one snapshot and followed by a mark in the WAL.
#[derive(Debug)]
pub struct Chunk {
    pub id: ChunkId,
    pub table: TableId,
    /// `None` where single keys were read again.
    pub load: Option<LoadId>,
    pub nonce: Nonce,
    pub snapshot: Snapshot,
    pub content: Content,
    /// Rows among those read that Redis cannot hold. Judged and written as the others are.
    pub unwritable: Vec<Unwritable>,
    /// Held until the chunk is written or dropped.
    pub floor: Floor,
}

#[derive(Debug)]
pub enum Content {
    /// All rows of a range, in parts that are written one at a time.
    Rows(Vec<EncodedRows>),
    /// The rows of the keys `asked`, as far as there are any. `unread`: asked for as well, but too much for one batch.
    /// `checks`: they are compared for this load, and not pending.
    Keys { asked: Vec<Key>, found: EncodedRows, unread: Vec<Key>, checks: Option<LoadId> },
    /// Which of these keys, found in Redis, have a row.
    Orphans { asked: Vec<Key>, exist: HashSet<Key> },
}

/// What a look at the catalog found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CatalogSeen {
    Table {
        fingerprint: u64,
        mark: CatalogMark,
        /// The transaction that made the files of the table what they are, where that is known.
        written_by: Option<u32>,
    },
    /// It cannot be followed as it is.
    Unfit(Blocked),
}

/// From the loader to the machine, in order.
#[derive(Debug)]
pub enum FromLoad {
    /// The table was looked up; its rows will come in this shape.
    Began {
        table: TableId,
        load: LoadId,
        fingerprint: u64,
        catalog: CatalogMark,
        estimated_rows: u64,
        booleans: HashSet<Oid>,
    },
    Chunk(Chunk),
    /// Every chunk of it was written, the orphans are gone.
    Ended {
        table: TableId,
        load: LoadId,
    },
    /// Single keys could not be read again, and are not asked for any more.
    KeysNotRead,
    /// It cannot be loaded as things are.
    Blocked {
        table: TableId,
        why: Blocked,
    },
    /// This comparison cannot be made. Nothing follows from that for the table.
    NotCompared {
        table: TableId,
        load: LoadId,
        why: String,
    },
    /// A row without a key.
    DeadLetter {
        table: TableId,
        code: &'static str,
        letter: DeadLetter,
    },
    /// Keys under the prefix of a template that no table has any more, and that no present one can produce.
    Orphans {
        keys: Vec<Key>,
    },
    /// No key of this template is left.
    Retired {
        template: String,
    },
}

/// What a load does with the rows that it brings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Writes every one.
    Fill,
    /// Looks at what is there, and writes only what differs, if that.
    Compare(Repair),
}

/// Single rows that are to be read again.
#[derive(Debug, Clone)]
pub struct KeysToRead {
    pub table: TableId,
    pub keys: Vec<Key>,
    /// For this comparison; else because they are pending.
    pub checks: Option<LoadId>,
}

/// From the machine to the loader.
#[derive(Debug)]
pub enum LoadOrder {
    Table {
        table: TableId,
        load: LoadId,
        purpose: Purpose,
        because: Reason,
    },
    Keys(KeysToRead),
    Verdict(ChunkId, Verdict),
    /// Nothing of this load is wanted any more.
    Abandon(TableId, LoadId),
}

/// What became of a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Redis has it.
    Written,
    /// Its snapshot missed something.
    ReadAgain,
    /// Its load was given up.
    GivenUp,
}

/// Keys whose TTL is to be renewed. `Effect::Renewed`, once Redis has acknowledged, asks for the next.
#[derive(Debug)]
pub struct RenewalPage {
    pub table: TableId,
    pub keys: Vec<Key>,
    /// When the round over the whole table began: what its pages do not name was written since.
    pub round_began: Instant,
    /// The last page of the round.
    pub ends_round: bool,
}

/// What the snapshots of all reads under way have seen at least: the record keeps whatever one of them may miss.
///
/// A read registers before it takes its snapshot, and so gets a floor that its snapshot cannot fall below.
#[derive(Debug, Clone, Default)]
pub struct Floors(Arc<Mutex<OpenReads>>);

#[derive(Debug, Default)]
struct OpenReads {
    newest: Option<Snapshot>,
    open: BTreeMap<u64, Option<Snapshot>>,
    next: u64,
}

/// One registered read. Dropping it lets the record forget.
#[derive(Debug)]
pub struct Floor {
    floors: Floors,
    id: u64,
}

impl Floors {
    /// To be called before the read's snapshot is taken.
    pub fn open(&self) -> Floor {
        let mut reads = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (id, newest) = (reads.next, reads.newest.clone());
        reads.next += 1;
        reads.open.insert(id, newest);
        Floor { floors: self.clone(), id }
    }

    /// From now on reads begin at `newest`. What the open ones have seen at least; `None` where one of them began
    /// before anything was known, so that nothing may be forgotten.
    pub fn raise(&self, newest: &Snapshot) -> Option<Vec<Snapshot>> {
        let mut reads = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        reads.newest = Some(newest.clone());
        reads.open.values().cloned().collect()
    }
}

impl Drop for Floor {
    fn drop(&mut self) {
        self.floors.0.lock().unwrap_or_else(PoisonError::into_inner).open.remove(&self.id);
    }
}
