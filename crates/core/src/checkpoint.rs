//! The checkpoint: what is stored in Redis with the data, written in the same MULTI/EXEC, and from which a daemon
//! resumes whatever has happened.
//!
//! It has two parts. The head is a small string that every batch writes. What it says about each table is an entry in a
//! separate hash, written in the same MULTI/EXEC but only when it changes, so that neither a batch nor a read becomes
//! more expensive with more tables. The head contains the number of entries that belong to it.
//!
//! The format is stable: fields may be added, but none may change its meaning. Readers ignore fields that they do not
//! know.

use crate::change::{Begin, CommitTime};
use crate::lsn::{CommitLsn, EndLsn, Lsn};
use crate::schema::CatalogMark;
use crate::typed::row_type::EncodedRowType;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checkpoint {
    pub system_id: String,
    pub timeline: u32,
    pub database: String,
    /// Redis has everything before it, for every table that is `loaded`. Before there is a slot, the server's position.
    pub lsn: EndLsn,
    /// Increases with every start and takeover.
    pub epoch: u64,
    /// Increases with every batch, so that no two checkpoints are ever equal.
    pub seq: u64,
    /// Set while a transaction over the atomic limits is partly applied. `lsn` is then the end of the transaction
    /// before it.
    pub within: Option<Within>,
    /// Set while Redis lacks keys that a TRUNCATE of this transaction removes, although `lsn` has not reached it. It must
    /// be redelivered; if it is not, Postgres was rewound.
    pub clearing: Option<Begin>,
    /// The last applied transaction that changed anything or contained a watermark. If it ends beyond what the slot has
    /// confirmed, it must be redelivered; if it is not, Postgres was rewound.
    pub last: Option<LastTransaction>,
    /// When this was written: Redis TIME, in milliseconds since the Unix epoch.
    pub beat_ms: u64,
    /// From here on, this Redis has every change of the stream.
    pub base: EndLsn,
    /// What Postgres had been told to be safe when this was written. Only where each hash slot is written by itself: a slot
    /// that has not reached it has lost something.
    pub floor: Option<EndLsn>,
    /// The stamp of the last load that ended, where each hash slot is written by itself; 0 for none. A slot whose mark has an
    /// earlier one lacks rows.
    pub whole: u64,
    /// How many hash slots have lost something that is being loaded again, where each is written by itself. What the
    /// tables' entries say does not hold for the rows in those.
    pub healing: u16,
    /// Where each hash slot is written by itself: lists of lookups may disagree with rows if this is the last that the session
    /// writes, because both are being written.
    pub lists_in_doubt: bool,
    /// Redis's count of evicted keys when this was written, or when the tables were last loaded because of evictions.
    pub evicted: u64,
    /// The publication that prefetchd created and may therefore alter and drop.
    pub made_publication: Option<String>,
    /// Key templates of earlier configurations, of which Redis may still have keys.
    pub retired: Vec<String>,
    /// By the table's name in the configuration.
    pub tables: BTreeMap<String, TableMark>,
}

/// How much of a transaction over the atomic limits has been applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Within {
    /// Not only its position: after a rewind of Postgres, another transaction may have the same one.
    pub begin: Begin,
    /// The number of its changes that Redis has, counted as delivered, whatever table they belong to.
    pub changes_done: u64,
}

/// How far something has come in the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place {
    /// Everything that commits before it is there: the end of a transaction, or the start of a commit record.
    pub at: Lsn,
    /// So many changes of the transaction that commits at `at` are there as well, counted as delivered; 0 between
    /// transactions.
    pub done: u64,
}

impl Place {
    pub const fn between(at: EndLsn) -> Self {
        Place { at: at.0, done: 0 }
    }

    /// Everything up to `lsn`, and so much of the next transaction.
    pub fn of(lsn: EndLsn, within: Option<Within>) -> Self {
        match within {
            Some(within) => Place { at: within.begin.commit.0, done: within.changes_done },
            None => Place::between(lsn),
        }
    }

    /// Whether something at this place already has a batch that takes the checkpoint from `before` to `after`: it is ahead of
    /// that, or it came there before the checkpoint did. Keys that it then removed for a TRUNCATE must not come back.
    pub fn has_batch(self, before: Option<Place>, after: Place) -> bool {
        self > after || self == after && before < Some(after)
    }

    /// The highest position that may be confirmed, or resumed from, with everything up to here applied. A transaction of
    /// which a part is there is then delivered again.
    pub const fn end(self) -> EndLsn {
        EndLsn(self.at)
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.done {
            0 => self.at.fmt(f),
            done => write!(f, "{}+{done}", self.at),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LastTransaction {
    pub end: EndLsn,
    pub xid: u32,
    pub time: CommitTime,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TableMark {
    /// The key template as configured. Keys of an earlier one are orphans.
    pub template: String,
    /// The fingerprint of the mapping with which the hashes were written. Changes when a load with a new mapping ends.
    pub fingerprint: u64,
    /// What the catalog said when the table was last read in full. `None` before the first load has ended.
    pub catalog: Option<CatalogMark>,
    /// What the columns become in JSON. `None` while that is unknown, or hashes may still have columns of other types.
    pub types: Option<EncodedRowType>,
    pub state: TableState,
    /// Every row's TTL lasts at least until then: Redis TIME, in milliseconds since the Unix epoch. `None` before the
    /// first load has ended.
    pub ttl_until_ms: Option<u64>,
    /// Set if rows are pending, which are then as old as this position; `None` if all are as new as the checkpoint.
    pub as_of: Option<EndLsn>,
    /// An operator removed keys, which stay missing until the table is loaded or verified in full.
    pub removed: bool,
    /// When every row was last compared or loaded, and found or made correct: Redis TIME at the beginning, in
    /// milliseconds since the Unix epoch.
    pub compared_ms: Option<u64>,
    /// The same for verifications only.
    pub verified_ms: Option<u64>,
    /// Set if the table cannot be followed. `state` says what to expect of the existing rows, which are as of `as_of`.
    pub blocked: Option<Blocked>,
    /// The number of rows that Postgres has and Redis cannot hold, whose keys are recorded next to the checkpoint.
    pub dead_letters: u64,
    /// There may be more of them, whose keys are not recorded. Until the table has been loaded or repaired in full, a
    /// missing key proves nothing.
    pub more_dead_letters: bool,
    /// A load or a repair has changed rows, and the change stream does not say so yet.
    pub changed_beside: bool,
    /// The key templates of its lookups. Keys of earlier ones are orphans.
    pub lookups: BTreeSet<String>,
    /// The fingerprint of the lookups whose lists are complete. `None` if they are not, or there are none.
    pub lookups_as: Option<u64>,
}

/// Why a table cannot be followed until a person changes something.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Blocked {
    pub because: String,
    /// What that person should do.
    pub remedy: String,
}

impl Blocked {
    /// Splits a message of the form that errors have here: the problem, a colon, the remedy.
    pub fn from_message(message: &str) -> Self {
        let (because, remedy) = message.split_once(": ").unwrap_or((message, ""));
        Blocked { because: because.to_owned(), remedy: remedy.to_owned() }
    }
}

impl fmt::Display for Blocked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.remedy.is_empty() {
            true => f.write_str(&self.because),
            false => write!(f, "{}: {}", self.because, self.remedy),
        }
    }
}

/// What readers may expect of a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TableState {
    /// Complete: a missing key is a row that does not exist.
    Loaded,
    /// Being loaded. Existing keys are correct; a missing key proves nothing.
    Loading,
    /// Redis or Postgres has lost something: existing keys may be outdated.
    Healing,
    /// Some keys are pending. Existing keys are correct.
    Incomplete,
}

impl TableState {
    /// The more a state promises, the greater. Only after `Incomplete` may a daemon go without a load.
    fn promises(self) -> u8 {
        match self {
            TableState::Healing => 0,
            TableState::Loading => 1,
            TableState::Incomplete => 2,
            TableState::Loaded => 3,
        }
    }

    /// Whether a table in this state is as complete as its entry says, and may be kept by the next daemon.
    pub fn is_established(self) -> bool {
        matches!(self, TableState::Loaded | TableState::Incomplete)
    }
}

/// The replication slot, as `pg_replication_slots` shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SlotState {
    Absent,
    /// Postgres has removed WAL that the slot needs, or has invalidated it for another reason. It can only be dropped.
    Invalidated {
        reason: String,
    },
    Ready {
        /// `confirmed_flush_lsn`, where the stream starts.
        confirmed: EndLsn,
        /// The PID of the walsender that uses it.
        active_pid: Option<i32>,
    },
}

/// The checkpoint in Redis cannot be read by this version.
#[derive(Debug, thiserror::Error)]
pub enum BadCheckpoint {
    #[error("malformed checkpoint: {0}")]
    Malformed(#[from] serde_json::Error),
    #[error("the checkpoint has {expected} tables, and entries of {found} are there")]
    Entries { expected: usize, found: usize },
    #[error("the entries of the checkpoint's tables are those of another one")]
    OtherEntries,
}

/// The field beside the entries that says to which head they belong, on a cluster: see
/// [`Extra::entered`](crate::lanes::record::Extra::entered). No table has this name.
pub const ENTERED: &[u8] = b"";

impl Checkpoint {
    /// Returns the head.
    pub fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(&json::Checkpoint::from(self)).expect("strings and numbers have a JSON form")
    }

    /// Returns the entry of each table.
    pub fn entries(&self) -> impl Iterator<Item = (String, Vec<u8>)> {
        self.tables.iter().map(|(name, mark)| (name.clone(), mark.to_json()))
    }

    /// Reads the head only, without the tables.
    ///
    /// # Errors
    /// If it is not JSON of the stable format. Unknown fields are ignored.
    pub fn head(json: &[u8]) -> Result<Self, BadCheckpoint> {
        Ok(serde_json::from_slice::<json::Checkpoint>(json)?.into())
    }

    /// Reads both parts. `entries` are by table name.
    ///
    /// # Errors
    /// As [`Self::head`], and if there are too few or too many entries, or they belong to another head: then nothing is known
    /// about any table.
    pub fn read(head: &[u8], entries: &[(Bytes, Bytes)]) -> Result<Self, BadCheckpoint> {
        let head: json::Checkpoint = serde_json::from_slice(head)?;
        let of_tables = || entries.iter().filter(|(name, _)| name != ENTERED);
        let (expected, found) = (head.entries, of_tables().count());
        if expected != found {
            return Err(BadCheckpoint::Entries { expected, found });
        }
        let belong_to = entries.iter().find(|(name, _)| name == ENTERED).map(|(_, write)| &write[..]);
        if belong_to != head.entered.as_deref().map(str::as_bytes) {
            return Err(BadCheckpoint::OtherEntries);
        }
        let mut checkpoint = Self::from(head);
        for (name, entry) in of_tables() {
            let name = String::from_utf8_lossy(name).into_owned();
            checkpoint.tables.insert(name, TableMark::from_json(entry)?);
        }
        Ok(checkpoint)
    }

    /// Returns this head with another stamp and another floor.
    ///
    /// # Errors
    /// As [`Self::head`].
    pub fn with_stamp(head: &[u8], whole: u64, floor: Option<EndLsn>) -> Result<Vec<u8>, BadCheckpoint> {
        let mut head: json::Checkpoint = serde_json::from_slice(head)?;
        head.whole = whole;
        head.floor = floor.map(|lsn| lsn.to_string());
        Ok(serde_json::to_vec(&head)?)
    }

    pub fn place(&self) -> Place {
        Place::of(self.lsn, self.within)
    }

    pub fn made(&self, publication: &str) -> bool {
        self.made_publication.as_deref() == Some(publication)
    }

    /// When a verification of every table last succeeded: Redis TIME, in milliseconds since the Unix epoch.
    pub fn verified_ms(&self) -> Option<u64> {
        self.tables.values().map(|mark| mark.verified_ms).min().flatten()
    }

    /// Whether a first start wrote it, and nothing has been written to Redis since.
    pub fn is_blank(&self) -> bool {
        let is_untouched = self.within.is_none() && self.clearing.is_none() && self.last.is_none();
        let is_untouched = is_untouched && self.lsn == self.base;
        is_untouched && self.tables.values().all(|table| table.state == TableState::Loading)
    }

    /// The overall state, for people and scripts that look at the key.
    fn state(&self) -> &'static str {
        let any = |state| self.tables.values().any(|t| t.state == state && t.blocked.is_none());
        match () {
            () if self.healing > 0 || any(TableState::Healing) => "healing",
            () if any(TableState::Loading) => "loading",
            () if any(TableState::Incomplete) => "incomplete",
            () if self.tables.values().any(|t| t.blocked.is_some()) => "blocked",
            () => "ready",
        }
    }
}

impl TableMark {
    /// A table that no load has read. Rows left over from an earlier time may be arbitrarily old.
    pub fn unread(template: String, fingerprint: u64, state: TableState) -> Self {
        TableMark {
            template,
            fingerprint,
            catalog: None,
            types: None,
            state,
            ttl_until_ms: None,
            as_of: Some(EndLsn(Lsn::FIRST)),
            removed: false,
            compared_ms: None,
            verified_ms: None,
            blocked: None,
            dead_letters: 0,
            more_dead_letters: false,
            changed_beside: true,
            lookups: BTreeSet::new(),
            lookups_as: None,
        }
    }

    /// Returns an entry that is correct while Redis may hold the rows that `old` describes, those that `new` describes,
    /// or some of either: it promises only what both promise.
    pub fn worse(old: &Self, new: &Self) -> Self {
        let is_same_shape = (&old.template, old.fingerprint) == (&new.template, new.fingerprint);
        TableMark {
            // Rows of two shapes are rows of none. Without what the catalog said, the table is loaded again.
            template: old.template.clone(),
            fingerprint: old.fingerprint,
            catalog: old.catalog.filter(|_| is_same_shape && old.catalog == new.catalog),
            types: old.types.clone().filter(|_| is_same_shape && old.types == new.types),
            state: if old.state.promises() < new.state.promises() { old.state } else { new.state },
            ttl_until_ms: old.ttl_until_ms.min(new.ttl_until_ms),
            as_of: match (old.as_of, new.as_of) {
                (Some(old), Some(new)) => Some(old.min(new)),
                (old, new) => old.or(new),
            },
            removed: old.removed || new.removed,
            compared_ms: old.compared_ms.min(new.compared_ms),
            verified_ms: old.verified_ms.min(new.verified_ms),
            blocked: new.blocked.as_ref().or(old.blocked.as_ref()).cloned(),
            dead_letters: old.dead_letters.max(new.dead_letters),
            more_dead_letters: old.more_dead_letters || new.more_dead_letters,
            changed_beside: old.changed_beside || new.changed_beside,
            lookups: old.lookups.union(&new.lookups).cloned().collect(),
            lookups_as: old.lookups_as.filter(|_| old.lookups_as == new.lookups_as),
        }
    }

    /// Returns the state of the table together with its lookups, which have this fingerprint: their lists may still have to be
    /// made.
    pub fn state_with(&self, lookups: Option<u64>) -> TableState {
        match self.state {
            TableState::Loaded if lookups.is_some() && self.lookups_as != lookups => TableState::Loading,
            state => state,
        }
    }

    /// Whether `self` tells a reader, or the next daemon, to rely on something that `old` does not.
    pub fn promises_more_than(&self, old: &Self) -> bool {
        // Where there may be keys is no promise.
        let worse = TableMark { lookups: self.lookups.clone(), ..Self::worse(old, self) };
        match self.state {
            TableState::Loaded | TableState::Incomplete => worse != *self,
            // The rest describes a table that is complete.
            TableState::Loading | TableState::Healing => (worse.state, worse.as_of) != (self.state, self.as_of),
        }
    }

    /// Returns the entry.
    pub fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(&json::Table::from(self)).expect("strings and numbers have a JSON form")
    }

    /// # Errors
    /// As [`Checkpoint::head`].
    pub fn from_json(entry: &[u8]) -> Result<Self, BadCheckpoint> {
        Ok(serde_json::from_slice::<json::Table>(entry)?.into())
    }
}

/// The format. It is short, because every batch writes the head and every read reads it: usual values are left out.
mod json {
    use super::{
        BTreeMap, BTreeSet, Begin, CommitLsn, CommitTime, Deserialize, EncodedRowType, EndLsn, Lsn, Serialize,
        TableState,
    };
    use serde::Deserializer;

    #[derive(Serialize, Deserialize)]
    pub struct Checkpoint {
        system_id: String,
        timeline: u32,
        database: String,
        #[serde(with = "lsn")]
        lsn: Lsn,
        state: String,
        epoch: u64,
        seq: u64,
        beat_ms: u64,
        #[serde(with = "lsn")]
        base: Lsn,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        within: Option<Within>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        clearing: Option<Transaction>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        last: Option<Last>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub(super) floor: Option<String>,
        #[serde(default, skip_serializing_if = "is_zero")]
        pub(super) whole: u64,
        #[serde(default, skip_serializing_if = "no_lanes")]
        healing: u16,
        #[serde(default, skip_serializing_if = "is_not")]
        lists_in_doubt: bool,
        #[serde(default, skip_serializing_if = "is_zero")]
        evicted: u64,
        #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "name_or_flag")]
        made_publication: Option<String>,
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        retired: Vec<String>,
        /// How many tables have an entry.
        pub(super) entries: usize,
        /// Written by [`Extra`](crate::lanes::record::Extra).
        #[serde(default, skip_serializing)]
        pub(super) entered: Option<String>,
    }

    /// It used to be `true`. It is unknown which publication that was, so it is not treated as prefetchd's.
    fn name_or_flag<'de, D: Deserializer<'de>>(d: D) -> Result<Option<String>, D::Error> {
        Ok(serde_json::Value::deserialize(d)?.as_str().map(str::to_owned))
    }

    fn is_zero(n: &u64) -> bool {
        *n == 0
    }

    fn is_not(flag: &bool) -> bool {
        !flag
    }

    fn no_lanes(n: &u16) -> bool {
        *n == 0
    }

    #[derive(Serialize, Deserialize)]
    struct Within {
        #[serde(flatten)]
        transaction: Transaction,
        changes_done: u64,
    }

    #[derive(Serialize, Deserialize)]
    struct Transaction {
        #[serde(with = "lsn")]
        commit: Lsn,
        /// Used to be missing. No transaction has 0, so such a one counts as not redelivered.
        #[serde(default)]
        xid: u32,
        #[serde(default)]
        time_us: i64,
    }

    impl From<Begin> for Transaction {
        fn from(begin: Begin) -> Self {
            Transaction { commit: begin.commit.0, xid: begin.xid, time_us: begin.time.0 }
        }
    }

    impl From<Transaction> for Begin {
        fn from(t: Transaction) -> Self {
            Begin { commit: CommitLsn(t.commit), xid: t.xid, time: CommitTime(t.time_us) }
        }
    }

    #[derive(Serialize, Deserialize)]
    struct Last {
        #[serde(with = "lsn")]
        end: Lsn,
        xid: u32,
        time_us: i64,
    }

    #[derive(Serialize, Deserialize)]
    pub struct Table {
        template: String,
        /// Hexadecimal, because not every JSON parser keeps 64 bits.
        #[serde(with = "hex")]
        fingerprint: u64,
        state: State,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        catalog: Option<String>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        ttl_until_ms: Option<u64>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        as_of: Option<String>,
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        removed: bool,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        compared_ms: Option<u64>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        verified_ms: Option<u64>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        blocked: Option<Blocked>,
        #[serde(default, skip_serializing_if = "is_zero")]
        dead_letters: u64,
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        more_dead_letters: bool,
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        changed_beside: bool,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        types: Option<String>,
        #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
        lookups: BTreeSet<String>,
        /// Hexadecimal, as the other fingerprint.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        lookups_as: Option<String>,
    }

    #[derive(Serialize, Deserialize)]
    struct Blocked {
        because: String,
        remedy: String,
    }

    #[derive(Serialize, Deserialize)]
    #[serde(rename_all = "lowercase")]
    enum State {
        Loaded,
        Loading,
        Healing,
        Incomplete,
    }

    impl From<&super::Checkpoint> for Checkpoint {
        fn from(c: &super::Checkpoint) -> Self {
            Checkpoint {
                system_id: c.system_id.clone(),
                timeline: c.timeline,
                database: c.database.clone(),
                lsn: c.lsn.0,
                state: c.state().to_owned(),
                epoch: c.epoch,
                seq: c.seq,
                beat_ms: c.beat_ms,
                base: c.base.0,
                within: c.within.map(|w| Within { transaction: w.begin.into(), changes_done: w.changes_done }),
                clearing: c.clearing.map(Transaction::from),
                last: c.last.map(|l| Last { end: l.end.0, xid: l.xid, time_us: l.time.0 }),
                floor: c.floor.map(|lsn| lsn.to_string()),
                whole: c.whole,
                healing: c.healing,
                lists_in_doubt: c.lists_in_doubt,
                evicted: c.evicted,
                made_publication: c.made_publication.clone(),
                retired: c.retired.clone(),
                entries: c.tables.len(),
                entered: None,
            }
        }
    }

    impl From<&super::TableMark> for Table {
        fn from(mark: &super::TableMark) -> Self {
            Table {
                template: mark.template.clone(),
                fingerprint: mark.fingerprint,
                state: match mark.state {
                    TableState::Loaded => State::Loaded,
                    TableState::Loading => State::Loading,
                    TableState::Healing => State::Healing,
                    TableState::Incomplete => State::Incomplete,
                },
                catalog: mark.catalog.map(|c| c.to_string()),
                types: mark.types.as_ref().map(|types| types.0.to_string()),
                ttl_until_ms: mark.ttl_until_ms,
                as_of: mark.as_of.map(|lsn| lsn.to_string()),
                removed: mark.removed,
                compared_ms: mark.compared_ms,
                verified_ms: mark.verified_ms,
                blocked: mark.blocked.clone().map(|b| Blocked { because: b.because, remedy: b.remedy }),
                dead_letters: mark.dead_letters,
                more_dead_letters: mark.more_dead_letters,
                changed_beside: mark.changed_beside,
                lookups: mark.lookups.clone(),
                lookups_as: mark.lookups_as.map(|fingerprint| format!("{fingerprint:016x}")),
            }
        }
    }

    impl From<Table> for super::TableMark {
        fn from(t: Table) -> Self {
            super::TableMark {
                template: t.template,
                fingerprint: t.fingerprint,
                state: match t.state {
                    State::Loaded => TableState::Loaded,
                    State::Loading => TableState::Loading,
                    State::Healing => TableState::Healing,
                    State::Incomplete => TableState::Incomplete,
                },
                // A value that cannot be parsed never matches.
                catalog: t.catalog.and_then(|c| c.parse().ok()),
                types: t.types.map(|types| EncodedRowType(types.into())),
                ttl_until_ms: t.ttl_until_ms,
                // A value that cannot be parsed means as old as possible.
                as_of: t.as_of.map(|lsn| EndLsn(lsn.parse().unwrap_or(Lsn::FIRST))),
                removed: t.removed,
                compared_ms: t.compared_ms,
                verified_ms: t.verified_ms,
                blocked: t.blocked.map(|b| super::Blocked { because: b.because, remedy: b.remedy }),
                dead_letters: t.dead_letters,
                more_dead_letters: t.more_dead_letters,
                changed_beside: t.changed_beside,
                lookups: t.lookups,
                // A value that cannot be parsed never matches.
                lookups_as: t.lookups_as.and_then(|fingerprint| u64::from_str_radix(&fingerprint, 16).ok()),
            }
        }
    }

    impl From<Checkpoint> for super::Checkpoint {
        fn from(c: Checkpoint) -> Self {
            super::Checkpoint {
                system_id: c.system_id,
                timeline: c.timeline,
                database: c.database,
                lsn: EndLsn(c.lsn),
                epoch: c.epoch,
                seq: c.seq,
                within: c.within.map(|w| super::Within { begin: w.transaction.into(), changes_done: w.changes_done }),
                clearing: c.clearing.map(Begin::from),
                last: c.last.map(|l| super::LastTransaction {
                    end: EndLsn(l.end),
                    xid: l.xid,
                    time: CommitTime(l.time_us),
                }),
                beat_ms: c.beat_ms,
                base: EndLsn(c.base),
                floor: c.floor.and_then(|lsn| lsn.parse().ok()).map(EndLsn),
                whole: c.whole,
                healing: c.healing,
                lists_in_doubt: c.lists_in_doubt,
                evicted: c.evicted,
                made_publication: c.made_publication,
                retired: c.retired,
                tables: BTreeMap::new(),
            }
        }
    }

    mod lsn {
        use super::Lsn;
        use serde::{Deserialize, Deserializer, Serializer, de::Error};

        pub fn serialize<S: Serializer>(lsn: &Lsn, s: S) -> Result<S::Ok, S::Error> {
            s.collect_str(lsn)
        }

        pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Lsn, D::Error> {
            String::deserialize(d)?.parse().map_err(D::Error::custom)
        }
    }

    mod hex {
        use serde::{Deserialize, Deserializer, Serializer, de::Error};

        pub fn serialize<S: Serializer>(n: &u64, s: S) -> Result<S::Ok, S::Error> {
            s.collect_str(&format_args!("{n:016x}"))
        }

        pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<u64, D::Error> {
            u64::from_str_radix(&String::deserialize(d)?, 16).map_err(D::Error::custom)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn lsns() -> impl Strategy<Value = Lsn> {
        (1..=u64::MAX).prop_map(|n| Lsn::new(n).expect("not zero"))
    }

    fn marks() -> impl Strategy<Value = TableMark> {
        use TableState::{Healing, Incomplete, Loaded, Loading};
        let states = prop::sample::select(vec![Loaded, Loading, Healing, Incomplete]);
        let catalog =
            any::<Option<(u64, u64)>>().prop_map(|c| c.map(|(shape, storage)| CatalogMark { shape, storage }));
        let times = any::<(Option<u64>, Option<u64>, Option<u64>)>();
        let missing = (prop::option::of(lsns()), any::<(bool, u64, bool, bool)>());
        let blocked = prop::option::of((".{1,20}", ".{0,20}"));
        let types = prop::option::of(prop::sample::select(vec!["2:idn", "1:!s"]));
        let lookups = (prop::collection::btree_set(".{1,20}", 0..3), any::<Option<u64>>());
        (".{1,20}", any::<u64>(), (catalog, types), states, times, missing, (blocked, lookups)).prop_map(
            |(template, fingerprint, (catalog, types), state, times, missing, (blocked, lookups))| {
                let (as_of, (removed, dead_letters, more_dead_letters, changed_beside)) = missing;
                let (ttl_until_ms, compared_ms, verified_ms) = times;
                TableMark {
                    template,
                    fingerprint,
                    catalog,
                    types: types.map(|types| EncodedRowType(types.into())),
                    state,
                    ttl_until_ms,
                    as_of: as_of.map(EndLsn),
                    removed,
                    compared_ms,
                    verified_ms,
                    blocked: blocked.map(|(because, remedy)| Blocked { because, remedy }),
                    dead_letters,
                    more_dead_letters,
                    changed_beside,
                    lookups: lookups.0,
                    lookups_as: lookups.1,
                }
            },
        )
    }

    fn checkpoints() -> impl Strategy<Value = Checkpoint> {
        let place = ("[0-9]{19}", any::<u32>(), ".{0,12}", lsns(), lsns());
        let numbers = (any::<u64>(), any::<u64>(), any::<u64>(), any::<u64>());
        let begins = || {
            let parts = (lsns(), any::<u32>(), any::<i64>());
            parts.prop_map(|(at, xid, time)| Begin { commit: CommitLsn(at), xid, time: CommitTime(time) })
        };
        let within = prop::option::of((begins(), any::<u64>()));
        let begun = (within, prop::option::of(begins()), prop::option::of(lsns()));
        let last = prop::option::of((lsns(), any::<u32>(), any::<i64>()));
        let texts = (prop::collection::vec(".{1,20}", 0..3), prop::option::of(".{1,9}"));
        let tables = prop::collection::btree_map("[a-z]{1,9}", marks(), 0..4);
        (place, numbers, begun, last, texts, tables).prop_map(|(place, numbers, begun, last, texts, tables)| {
            Checkpoint {
                system_id: place.0,
                timeline: place.1,
                database: place.2,
                lsn: EndLsn(place.3),
                epoch: numbers.0,
                seq: numbers.1,
                within: begun.0.map(|(begin, changes_done)| Within { begin, changes_done }),
                clearing: begun.1,
                floor: begun.2.map(EndLsn),
                whole: numbers.0 / 3,
                healing: u16::from(numbers.0 % 2 == 0),
                lists_in_doubt: numbers.0 % 3 == 0,
                last: last.map(|(end, xid, time)| LastTransaction { end: EndLsn(end), xid, time: CommitTime(time) }),
                beat_ms: numbers.2,
                base: EndLsn(place.4),
                evicted: numbers.3,
                made_publication: texts.1,
                retired: texts.0,
                tables,
            }
        })
    }

    proptest! {
        #[test]
        fn reads_what_it_wrote(checkpoint in checkpoints()) {
            let entries = entries(&checkpoint);
            let read = Checkpoint::read(&checkpoint.to_json(), &entries).expect("it was written by us");
            prop_assert_eq!(&read, &checkpoint);
            let (whole, floor) = (checkpoint.whole + 1, Some(checkpoint.base));
            let stamped = Checkpoint::with_stamp(&checkpoint.to_json(), whole, floor).expect("it was written by us");
            prop_assert_eq!(stamped, Checkpoint { whole, floor, ..checkpoint.clone() }.to_json());
            let head = Checkpoint { tables: BTreeMap::new(), ..checkpoint };
            prop_assert_eq!(Checkpoint::head(&head.to_json()).expect("it was written by us"), head);
        }

        #[test]
        fn the_worse_of_two_entries_promises_no_more_than_either(one in marks(), other in marks()) {
            let other = TableMark { template: one.template.clone(), ..other };
            for (old, new) in [(&one, &other), (&other, &one)] {
                let worse = TableMark::worse(old, new);
                prop_assert!(!worse.promises_more_than(old), "{worse:?}");
                // The shape stays the old one, and the table is loaded.
                let shape = (new.fingerprint, new.catalog);
                let of_new = TableMark { fingerprint: shape.0, catalog: shape.1, ..worse.clone() };
                prop_assert!(!of_new.promises_more_than(new), "{worse:?}");
                prop_assert!(worse.fingerprint == new.fingerprint || worse.catalog.is_none());
                prop_assert!(worse.types.is_none() || worse.types == new.types);
                prop_assert_eq!(&TableMark::worse(old, &worse), &worse, "said before, it is no news");
                prop_assert_eq!(&TableMark::worse(&worse, new), &worse);
            }
            prop_assert_eq!(&TableMark::worse(&one, &one), &one);
            prop_assert!(!one.promises_more_than(&one));
        }

        #[test]
        fn garbage_is_an_error_and_no_panic(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            prop_assert!(Checkpoint::head(&bytes).is_err() && TableMark::from_json(&bytes).is_err());
        }
    }

    fn entries(checkpoint: &Checkpoint) -> Vec<(Bytes, Bytes)> {
        checkpoint.entries().map(|(name, entry)| (name.into(), entry.into())).collect()
    }

    /// The stable format, literally: what an earlier version has written must stay readable.
    const HEAD: &str = r#"{"system_id":"7301234567890123456","timeline":1,"database":"shop","lsn":"0/1A2B3C","state":"healing","epoch":3,"seq":17,"beat_ms":1767225600000,"base":"0/1A0000","within":{"commit":"0/1A2B40","xid":742,"time_us":1767225599500000,"changes_done":20000},"clearing":{"commit":"0/1A2C00","xid":743,"time_us":1767225599600000},"last":{"end":"0/1A2B3C","xid":741,"time_us":1767225599000000},"floor":"0/1A2A00","whole":1767225590000,"healing":5,"lists_in_doubt":true,"evicted":7,"made_publication":"prefetchd","retired":["old:{id}"],"entries":1}"#;
    const ENTRY: &str = r#"{"template":"cache:category:{id}","fingerprint":"00000000000000ff","state":"incomplete","catalog":"00000000000000aa:0000000000000bbb","ttl_until_ms":1767312000000,"as_of":"0/1A2B00","removed":true,"compared_ms":1767225500000,"verified_ms":1767225400000,"blocked":{"because":"a fact","remedy":"a remedy"},"dead_letters":2,"more_dead_letters":true,"changed_beside":true,"types":"2:idn4:name!s"}"#;

    fn written() -> Vec<(Bytes, Bytes)> {
        vec![("categories".into(), ENTRY.into())]
    }

    #[test]
    fn the_format_is_settled() {
        let read = Checkpoint::read(HEAD.as_bytes(), &written()).expect("the settled format");
        assert_eq!(String::from_utf8(read.to_json()).expect("JSON is text"), HEAD);
        assert_eq!(entries(&read), written());
        assert_eq!(read.tables["categories"].fingerprint, 255);
        assert_eq!(read.tables["categories"].blocked, Some(Blocked::from_message("a fact: a remedy")));
    }

    #[test]
    fn the_worse_of_two_entries_is_so_in_every_respect() {
        let good: TableMark = TableMark {
            state: TableState::Loaded,
            as_of: None,
            removed: false,
            blocked: None,
            dead_letters: 0,
            more_dead_letters: false,
            changed_beside: false,
            lookups_as: Some(1),
            ..TableMark::from_json(ENTRY.as_bytes()).expect("the settled format")
        };
        let blocked = Some(Blocked::from_message("a fact: a remedy"));
        type Worsen = fn(&mut TableMark);
        let changes: [Worsen; 14] = [
            |m| m.state = TableState::Incomplete,
            |m| m.state = TableState::Loading,
            |m| m.state = TableState::Healing,
            |m| m.catalog = None,
            |m| m.types = None,
            |m| m.ttl_until_ms = m.ttl_until_ms.map(|ms| ms - 1),
            |m| m.ttl_until_ms = None,
            |m| m.as_of = Some(EndLsn(Lsn::FIRST)),
            |m| m.removed = true,
            |m| m.verified_ms = None,
            |m| m.dead_letters = 1,
            |m| m.more_dead_letters = true,
            |m| m.changed_beside = true,
            |m| m.lookups_as = None,
        ];
        for (at, change) in changes.into_iter().enumerate() {
            let mut bad = good.clone();
            change(&mut bad);
            assert_eq!(TableMark::worse(&good, &bad), bad, "{at}");
            assert_eq!(TableMark::worse(&bad, &good), bad, "{at}");
            assert!(good.promises_more_than(&bad), "{at}");
            assert!(!bad.promises_more_than(&good), "{at}");
        }
        let bad = TableMark { blocked, ..good.clone() };
        assert_eq!(TableMark::worse(&bad, &good), bad);
        let reshaped = TableMark { fingerprint: 1, ..good.clone() };
        assert_eq!(TableMark::worse(&good, &reshaped), TableMark { catalog: None, types: None, ..good });
    }

    #[test]
    fn without_all_its_entries_it_says_nothing() {
        for entries in [vec![], [written(), vec![("other".into(), ENTRY.into())]].concat()] {
            let error = Checkpoint::read(HEAD.as_bytes(), &entries).expect_err("not those that belong to it");
            assert!(
                matches!(error, BadCheckpoint::Entries { expected: 1, found } if found == entries.len()),
                "{error}"
            );
        }
    }

    #[test]
    fn what_was_written_before_the_publication_had_a_name_is_readable() {
        let earlier = HEAD.replace(r#""made_publication":"prefetchd""#, r#""made_publication":true"#);
        let read = Checkpoint::head(earlier.as_bytes()).expect("still readable");
        assert_eq!(read.made_publication, None, "it is not known which");
        assert_eq!(read.seq, 17);
    }

    #[test]
    fn a_split_transaction_that_was_known_by_its_position_alone_is_none_that_is_redelivered() {
        let earlier = HEAD.replace(r#""xid":742,"time_us":1767225599500000,"#, "");
        let within = Checkpoint::head(earlier.as_bytes()).expect("still readable").within.expect("it was split");
        assert_eq!((within.begin.commit.0.to_string(), within.begin.xid), ("0/1A2B40".to_owned(), 0));
    }

    #[test]
    fn a_field_of_a_later_version_is_ignored() {
        let later = |json: &str| Bytes::from(json.replacen('{', r#"{"later":[1],"#, 1));
        let entries = vec![("categories".into(), later(ENTRY))];
        assert_eq!(
            Checkpoint::read(&later(HEAD), &entries).expect("still readable"),
            Checkpoint::read(HEAD.as_bytes(), &written()).expect("the settled format")
        );
    }
}
