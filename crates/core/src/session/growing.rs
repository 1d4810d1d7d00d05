//! The batch that grows while another one is in flight: changes of the stream, and maintenance work that goes with
//! them.

use super::Applied;
use super::chunk_queue::weight_of_letter;
use super::load_messages::RenewalPage;
use super::take_keys;
use crate::change::{Begin, Change, CommitTime};
use crate::checkpoint::{LastTransaction, Within};
use crate::command::{DeadLetter, Key, Op};
use crate::lsn::EndLsn;
use crate::plan::key::Poison;
use crate::plan::key_states::{self, KeyStates};
use crate::plan::mapping::Mapping;
use crate::resp::batch::Limits;
use crate::schema::TableId;
use bytes::Bytes;
use std::collections::HashMap;
use std::sync::Arc;

/// A growing batch stops taking changes at this many bytes of the stream, because rows are slices of read buffers and
/// keep those alive.
const BATCH_BYTES: usize = 4 << 20;
/// How many records of dead letters one batch removes, besides those of truncated tables.
const FORGOTTEN_A_BATCH: usize = 100;

pub(super) struct Growing {
    changes: Changes,
    chores: Chores,
    /// Everything before it is in Redis or in this batch.
    through: Option<EndLsn>,
    applied: Applied,
    /// A change larger than this may be too large for Redis, so its dead letter is prepared.
    letter_from_bytes: usize,
    /// Whether changes are announced.
    announces: bool,
}

/// Changes of the stream.
#[derive(Default)]
pub(super) struct Changes {
    pub batch: KeyStates,
    /// Set if the batch changes the position within a split transaction: `Some` in the middle of one, `None` at its
    /// end.
    pub within: Option<Option<Within>>,
    /// The last transaction with a TRUNCATE.
    pub truncated_by: Option<Begin>,
    pub last: Option<LastTransaction>,
    pub count: u64,
    bytes: usize,
    /// An upper bound of what changes and dead letters add to the batch. See
    /// [`command::weight`](crate::command::weight).
    pub weight: usize,
    /// Rows that may be too large for Redis, with their dead letters.
    pub large: HashMap<Key, DeadLetter>,
}

/// Maintenance work that goes with the changes.
#[derive(Default)]
pub(super) struct Chores {
    pub renewal: Option<RenewalPage>,
    /// Keys of a page of renewals that takes several batches, except for the page's last ones.
    pub renewing: Option<(TableId, Vec<Key>)>,
    pub orphans: Vec<Key>,
    pub retired: Vec<String>,
    /// Records of dead letters to remove.
    pub forgotten: Vec<Key>,
}

impl Chores {
    fn is_empty(&self) -> bool {
        self.renewal.is_none() && self.orphans.is_empty() && self.retired.is_empty() && self.forgotten.is_empty()
    }

    /// Takes records of dead letters to remove, and nothing else.
    fn take_forgotten(&mut self) -> Self {
        let rest = self.forgotten.split_off(self.forgotten.len().min(FORGOTTEN_A_BATCH));
        Chores { forgotten: std::mem::replace(&mut self.forgotten, rest), ..Chores::default() }
    }

    /// Takes what fits into one batch, and leaves the rest.
    fn take(&mut self, limits: &Limits) -> Self {
        let mut taken = self.take_forgotten();
        if let Some(mut page) = self.renewal.take() {
            let keys = take_keys(&mut page.keys, limits);
            if page.keys.is_empty() {
                taken.renewal = Some(RenewalPage { keys, ..page });
            } else {
                taken.renewing = Some((page.table, keys));
                self.renewal = Some(page);
            }
        }
        taken.orphans = take_keys(&mut self.orphans, limits);
        if self.orphans.is_empty() {
            taken.retired = std::mem::take(&mut self.retired);
        }
        taken
    }
}

/// A batch that has stopped growing.
pub(super) struct Grown {
    pub changes: Changes,
    pub chores: Chores,
    pub through: Option<EndLsn>,
    pub applied: Applied,
}

impl Grown {
    /// A batch without changes of the stream.
    pub fn nothing() -> Self {
        let (changes, chores, applied) = (Changes::default(), Chores::default(), Applied::default());
        Grown { changes, chores, through: None, applied }
    }
}

impl Growing {
    /// `announces`: whether there is a change stream.
    pub fn new(limits: &Limits, announces: bool) -> Self {
        Growing {
            changes: Changes::default(),
            chores: Chores::default(),
            through: None,
            applied: Applied::default(),
            letter_from_bytes: limits.value_bytes.min(limits.batch_bytes / 4),
            announces,
        }
    }

    pub fn announces(&self) -> bool {
        self.announces
    }

    // ---- from the stream --------------------------------------------------------------------------------------------

    /// Whether changes of this weight fit. A single change always does: Redis accepts it, or it becomes a dead letter.
    pub fn fits(&self, weight: usize, limits: &Limits) -> bool {
        self.changes.weight == 0 || self.changes.weight + weight <= limits.stream_bytes()
    }

    /// Adds the weight of changes that are planned next.
    pub fn weighs(&mut self, weight: usize) {
        self.changes.weight += weight;
    }

    /// Adds the size of the buffers that the deliveries keep alive.
    pub fn keeps_bytes(&mut self, bytes: usize) {
        self.changes.bytes += bytes;
    }

    pub fn truncate(&mut self, table: TableId, begin: Begin) {
        self.changes.count += 1;
        self.changes.truncated_by = Some(begin);
        self.is_of(begin);
        self.changes.batch.truncate(table);
        self.applied.count(table).truncates += 1;
        self.applied.event(table, Op::Truncate, Key(Bytes::new()), begin.time);
    }

    fn is_of(&mut self, begin: Begin) {
        if self.announces {
            self.changes.batch.announces(begin);
        }
    }

    /// Adds a change of a row.
    ///
    /// # Errors
    /// If the row has no key. It is then a dead letter.
    pub fn row(
        &mut self,
        mapping: &Arc<Mapping>,
        change: &Change,
        begin: &Begin,
        name: &str,
    ) -> Result<key_states::Applied, Poison> {
        let table = mapping.table;
        // Everything that a dead letter says about a change, except the reason.
        let letter = |key| DeadLetter {
            table: name.to_owned(),
            key,
            lsn: begin.commit.to_string(),
            xid: begin.xid,
            reason: String::new(),
            row: mapping.row_json(change),
        };
        let is_delete = matches!(change, Change::Delete { .. });
        self.changes.count += 1;
        self.is_of(*begin);
        let applied = match self.changes.batch.apply(mapping, change) {
            Ok(applied) => applied,
            Err(poison) => {
                self.applied.dead_letters.push((table, poison.code()));
                self.applied.count(table).keyless += 1;
                self.changes.batch.dead_letter(DeadLetter { reason: poison.to_string(), ..letter(Bytes::new()) });
                return Err(poison);
            }
        };
        let counts = self.applied.count(table);
        let (op, count) = match is_delete {
            true => (Op::Delete, &mut counts.deletes),
            false => (Op::Upsert, &mut counts.upserts),
        };
        *count += 1;
        self.applied.event(table, op, applied.key.clone(), begin.time);
        if !is_delete && change.len_bytes() > self.letter_from_bytes {
            // Whether Redis accepts it is known only when the batch is written.
            self.changes.large.insert(applied.key.clone(), letter(applied.key.0.clone()));
        }
        Ok(applied)
    }

    /// Everything before `at` is in Redis or in this batch, so the next checkpoint may say so.
    pub fn reaches(&mut self, at: EndLsn) {
        self.through = self.through.max(Some(at));
    }

    /// The batch ends within a transaction over the atomic limits (`Some`), or completes one.
    pub fn is_within(&mut self, within: Option<Within>) {
        self.changes.within = Some(within);
    }

    /// Adds a complete transaction that changes something in Redis.
    pub fn applies(&mut self, transaction: LastTransaction) {
        self.passes(transaction);
        self.applied.transactions += 1;
        self.applied.commits.push(transaction.time);
    }

    /// Adds a complete transaction that Postgres must redeliver after a restart. If it does not, Postgres was rewound.
    pub fn passes(&mut self, transaction: LastTransaction) {
        self.changes.last = Some(transaction);
    }

    // ---- beside the stream ------------------------------------------------------------------------------------------

    pub fn renews(&mut self, page: RenewalPage) {
        self.chores.renewal = Some(page);
    }

    pub fn removes_orphans(&mut self, keys: Vec<Key>) {
        self.chores.orphans.extend(keys);
    }

    /// No key of this template is left.
    pub fn retires(&mut self, template: String) {
        self.chores.retired.push(template);
    }

    /// Adds records of dead letters to remove.
    pub fn forgets(&mut self, keys: Vec<Key>) {
        self.chores.forgotten.extend(keys);
    }

    /// Adds the dead letter of a row without a key that a load has read.
    pub fn dead_letter(&mut self, table: TableId, code: &'static str, letter: DeadLetter) {
        self.applied.dead_letters.push((table, code));
        self.applied.count(table).keyless += 1;
        self.changes.weight += weight_of_letter(&letter);
        self.changes.batch.dead_letter(letter);
    }

    // ---- what it has ------------------------------------------------------------------------------------------------

    pub fn count(&self) -> u64 {
        self.changes.count
    }

    /// Whether more changes may be added while another batch is in flight, up to this many.
    pub fn takes_more(&self, most: u64) -> bool {
        self.changes.count < most && self.changes.bytes < BATCH_BYTES
    }

    /// Whether a chunk may be taken: chunks add dead letters and orphans.
    pub fn takes_chunks(&self, limits: &Limits) -> bool {
        self.changes.weight <= limits.stream_bytes() && self.chores.orphans.is_empty()
    }

    pub fn takes_renewals(&self) -> bool {
        self.chores.renewal.is_none()
    }

    pub fn has_work(&self) -> bool {
        self.has_changes() || !self.chores.is_empty()
    }

    /// Whether the stream has added anything. A read adds dead letters, which count as no changes.
    pub fn has_changes(&self) -> bool {
        self.changes.count > 0 || self.changes.within.is_some() || self.changes.batch.has_dead_letters()
    }

    pub fn through(&self) -> Option<EndLsn> {
        self.through
    }

    pub fn within(&self) -> Option<Option<Within>> {
        self.changes.within
    }

    pub fn oldest_commit(&self) -> Option<CommitTime> {
        self.applied.commits.first().copied()
    }

    /// Takes the whole batch, except for maintenance work that would make it too large. That stays for the next one.
    pub fn take(&mut self, limits: &Limits) -> Grown {
        let changes = std::mem::take(&mut self.changes);
        // A single large row has a batch of its own.
        let has_room = changes.weight <= limits.stream_bytes();
        let chores = match has_room {
            true => self.chores.take(limits),
            false => self.chores.take_forgotten(),
        };
        Grown { changes, chores, through: self.through.take(), applied: std::mem::take(&mut self.applied) }
    }
}
