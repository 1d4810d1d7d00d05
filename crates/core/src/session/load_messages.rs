//! The messages between the loader and the session.

use crate::admin::Repair;
use crate::change::Nonce;
use crate::checkpoint::Blocked;
use crate::command::{DeadLetter, EncodedRows, Key, Unwritable};
use crate::lanes::Lane;
use crate::progress::visibility::Snapshot;
use crate::reason::Reason;
use crate::schema::{CatalogMark, Composition, Oid, TableId};
use crate::typed::known::KnownTypes;
use crate::typed::row_type::EncodedRowType;
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

/// Identifies a load of a table. A load that the session orders anew gets another ID.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LoadId(pub u64);

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChunkId(pub u64);

/// Some rows, read under one snapshot and followed by a watermark in the WAL.
#[derive(Debug)]
pub struct Chunk {
    pub id: ChunkId,
    pub table: TableId,
    /// `None` if single keys were read again.
    pub load: Option<LoadId>,
    pub nonce: Nonce,
    pub snapshot: Snapshot,
    pub content: Content,
    /// Rows of the chunk that Redis cannot hold. They are judged and written like the others.
    pub unwritable: Vec<Unwritable>,
    /// Held until the chunk is written or dropped.
    pub floor: Floor,
}

#[derive(Debug)]
pub enum Content {
    /// All rows of a range, in parts that are written one at a time.
    Rows(Vec<EncodedRows>),
    /// The rows of the keys in `asked`, as far as they exist. `unread` were requested as well, but did not fit into the
    /// same batch. With `checks`, the keys are compared for this load; otherwise they are pending. `mapped_as`: the
    /// fingerprint of the rows' mapping, which the stream may not have told yet.
    Keys { asked: Vec<Key>, found: EncodedRows, unread: Vec<Key>, checks: Option<LoadId>, mapped_as: u64 },
    /// Which of these keys, found in Redis, have a row.
    Orphans { asked: Vec<Key>, exist: HashSet<Key> },
}

/// The result of checking the catalog.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CatalogSeen {
    Table {
        fingerprint: u64,
        mark: CatalogMark,
        composition: Composition,
        types: EncodedRowType,
        /// The transaction that created the table's present files, if known.
        written_by: Option<u32>,
    },
    /// The table cannot be followed as it is.
    Unfit(Blocked),
}

/// From the loader to the session, in order.
#[derive(Debug)]
pub enum FromLoad {
    /// The catalog was read. The rows will have this mapping.
    Began {
        table: TableId,
        load: LoadId,
        fingerprint: u64,
        catalog: CatalogMark,
        composition: Composition,
        types: EncodedRowType,
        estimated_rows: u64,
        known_types: KnownTypes,
        /// Before this session wrote any of the table's keys, Redis had none: neither rows nor lists.
        is_empty: bool,
    },
    Chunk(Chunk),
    /// Every chunk has been written, and the orphans are removed.
    Ended {
        table: TableId,
        load: LoadId,
    },
    /// Single keys could not be read again, and no further attempt is made.
    KeysNotRead,
    /// The table cannot be loaded as it is.
    Blocked {
        table: TableId,
        why: Blocked,
    },
    /// The comparison cannot be made, which proves nothing about the table.
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
    /// Keys under the prefix of a template that is no longer configured, which no present template can produce.
    Orphans {
        keys: Vec<Key>,
    },
    /// No key of this template is left.
    Retired {
        template: String,
    },
}

/// What a load does with the rows that it reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Writes every row.
    Fill,
    /// Compares the rows with Redis, and writes at most those that differ.
    Compare(Repair),
}

/// Which rows of its table a load concerns.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Only {
    All,
    /// Those of these leaves, which were attached to a table that now has this mark. No orphans are removed.
    Leaves(Arc<[Oid]>, CatalogMark),
    /// Those whose keys lie in these hash slots. The others are read as well, and left out.
    HashSlots(Arc<BTreeSet<Lane>>),
}

impl Only {
    pub fn has_leaf(&self, leaf: Oid) -> bool {
        match self {
            Only::Leaves(leaves, _) => leaves.contains(&leaf),
            Only::All | Only::HashSlots(_) => true,
        }
    }

    pub fn has_key(&self, key: &Key) -> bool {
        match self {
            Only::HashSlots(lanes) => lanes.contains(&Lane::of(key.as_bytes())),
            Only::All | Only::Leaves(..) => true,
        }
    }
}

/// Single rows to read again.
#[derive(Debug, Clone)]
pub struct KeysToRead {
    pub table: TableId,
    pub keys: Vec<Key>,
    /// Set if they are compared for this load; otherwise they are pending.
    pub checks: Option<LoadId>,
}

/// From the session to the loader.
#[derive(Debug)]
pub enum LoadOrder {
    Table {
        table: TableId,
        load: LoadId,
        purpose: Purpose,
        only: Only,
        because: Reason,
    },
    Keys(KeysToRead),
    Verdict(ChunkId, Verdict),
    /// Nothing that this load reads is needed any more.
    Abandon(TableId, LoadId),
}

/// The outcome of a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Redis has it.
    Written,
    /// Its snapshot missed something.
    ReadAgain,
    /// Its load was given up.
    GivenUp,
}

/// Keys whose TTL must be renewed. Once Redis has acknowledged the page, `Effect::Renewed` asks for the next one.
#[derive(Debug)]
pub struct RenewalPage {
    pub table: TableId,
    pub keys: Vec<Key>,
    /// When the round over the whole table began. Keys that none of its pages contain were written after that.
    pub round_began: Instant,
    /// Set for the last page of the round.
    pub ends_round: bool,
}

/// Lower bounds of the snapshots of all reads in progress: the record keeps whatever one of them may not see.
///
/// A read registers before it takes its snapshot, so that its floor is never above its snapshot.
#[derive(Debug, Clone, Default)]
pub struct Floors(Arc<Mutex<OpenReads>>);

#[derive(Debug, Default)]
struct OpenReads {
    newest: Option<Snapshot>,
    open: BTreeMap<u64, Option<Snapshot>>,
    next: u64,
}

/// A registered read. Dropping it allows the record to forget what only this read needed.
#[derive(Debug)]
pub struct Floor {
    floors: Floors,
    id: u64,
}

impl Floors {
    /// Must be called before the read's snapshot is taken.
    pub fn open(&self) -> Floor {
        let mut reads = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (id, newest) = (reads.next, reads.newest.clone());
        reads.next += 1;
        reads.open.insert(id, newest);
        Floor { floors: self.clone(), id }
    }

    /// New reads begin at `newest` from now on. Returns the lower bounds of the open ones, or `None` if one of them
    /// began before anything was known, in which case nothing may be forgotten.
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
