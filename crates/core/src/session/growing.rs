//! The batch that grows while another one is on its way: what the stream brings, and what is to be done beside it.

use super::Applied;
use super::chunk::RenewalPage;
use super::chunks::weight_of_letter;
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

/// A growing batch takes no more from the stream beyond this many changes: long enough to use Redis well, short enough
/// that a commit does not wait for a backlog behind it.
const BATCH_CHANGES: u64 = 4_000;
/// ... or this many bytes of the stream: rows are slices of what was read, whatever else was read with them.
const BATCH_BYTES: usize = 4 << 20;
/// Records of dead letters of other tables that go with one batch.
const FORGOTTEN_A_BATCH: usize = 100;

pub(super) struct Growing {
    changes: Changes,
    chores: Chores,
    /// Everything before it is in Redis, or in this batch.
    through: Option<EndLsn>,
    applied: Applied,
    /// A change of more bytes may be more than Redis takes.
    letter_from_bytes: usize,
}

/// What the stream brings.
#[derive(Default)]
pub(super) struct Changes {
    pub batch: KeyStates,
    /// Where it leaves a transaction over the atomic limits, if it changes that.
    pub within: Option<Option<Within>>,
    pub last: Option<LastTransaction>,
    pub count: u64,
    bytes: usize,
    /// What changes and dead letters have put into it, at most: see [`command::weight`](crate::command::weight).
    pub weight: usize,
    /// Rows that Redis may not take, and what to say of them then.
    pub large: HashMap<Key, DeadLetter>,
}

/// What is to be done beside it.
#[derive(Default)]
pub(super) struct Chores {
    pub renewal: Option<RenewalPage>,
    /// Keys of a page of renewals that did not fit into one batch, but for the last of them.
    pub renewing: Option<(TableId, Vec<Key>)>,
    pub orphans: Vec<Key>,
    pub retired: Vec<String>,
    /// Records of dead letters that concern nobody any more.
    pub forgotten: Vec<Key>,
}

impl Chores {
    fn is_empty(&self) -> bool {
        self.renewal.is_none() && self.orphans.is_empty() && self.retired.is_empty() && self.forgotten.is_empty()
    }

    /// Of the records that go, and nothing else.
    fn take_forgotten(&mut self) -> Self {
        let rest = self.forgotten.split_off(self.forgotten.len().min(FORGOTTEN_A_BATCH));
        Chores { forgotten: std::mem::replace(&mut self.forgotten, rest), ..Chores::default() }
    }

    /// What fits into one batch; the rest stays.
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

/// What has left it.
pub(super) struct Grown {
    pub changes: Changes,
    pub chores: Chores,
    pub through: Option<EndLsn>,
    pub applied: Applied,
}

impl Grown {
    /// A batch without anything from the stream.
    pub fn nothing() -> Self {
        let (changes, chores, applied) = (Changes::default(), Chores::default(), Applied::default());
        Grown { changes, chores, through: None, applied }
    }
}

impl Growing {
    pub fn new(limits: &Limits) -> Self {
        Growing {
            changes: Changes::default(),
            chores: Chores::default(),
            through: None,
            applied: Applied::default(),
            letter_from_bytes: limits.value_bytes.min(limits.batch_bytes / 4),
        }
    }

    // ---- from the stream --------------------------------------------------------------------------------------------

    /// A single change goes alone, whatever it weighs: it is a dead letter, or Redis takes it.
    pub fn fits(&self, weight: usize, limits: &Limits) -> bool {
        self.changes.weight == 0 || self.changes.weight + weight <= limits.stream_bytes()
    }

    /// Changes that are planned next weigh so much.
    pub fn weighs(&mut self, weight: usize) {
        self.changes.weight += weight;
    }

    /// What lies in the same buffers as the deliveries that were taken.
    pub fn keeps_bytes(&mut self, bytes: usize) {
        self.changes.bytes += bytes;
    }

    pub fn truncate(&mut self, table: TableId, time: CommitTime) {
        self.changes.count += 1;
        self.changes.batch.truncate(table);
        self.applied.count(table).truncates += 1;
        self.applied.event(table, Op::Truncate, Key(Bytes::new()), time);
    }

    /// # Errors
    /// Where it has no key: it is a dead letter then.
    pub fn row(
        &mut self,
        mapping: &Arc<Mapping>,
        change: &Change,
        begin: &Begin,
        name: &str,
    ) -> Result<key_states::Applied, Poison> {
        let table = mapping.table;
        // What can be told of a change, but for the reason.
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
            // Whether Redis takes it is known only when the batch is written.
            self.changes.large.insert(applied.key.clone(), letter(applied.key.0.clone()));
        }
        Ok(applied)
    }

    /// The next checkpoint may say so: everything before `at` is in Redis or in this batch.
    pub fn reaches(&mut self, at: EndLsn) {
        self.through = self.through.max(Some(at));
    }

    /// It leaves a transaction over the atomic limits in the middle (`Some`), or ends one.
    pub fn is_within(&mut self, within: Option<Within>) {
        self.changes.within = Some(within);
    }

    /// A whole transaction that changes what Redis has.
    pub fn applies(&mut self, transaction: LastTransaction) {
        self.passes(transaction);
        self.applied.transactions += 1;
        self.applied.commits.push(transaction.time);
    }

    /// A whole transaction that has to come by again should Postgres go on.
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

    /// Records of dead letters go.
    pub fn forgets(&mut self, keys: Vec<Key>) {
        self.chores.forgotten.extend(keys);
    }

    /// A load has read a row without a key.
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

    /// Whether more of the stream may be added while another batch is on its way.
    pub fn takes_more(&self) -> bool {
        self.changes.count < BATCH_CHANGES && self.changes.bytes < BATCH_BYTES
    }

    /// Dead letters and orphans come with chunks.
    pub fn takes_chunks(&self, limits: &Limits) -> bool {
        self.changes.weight <= limits.stream_bytes() && self.chores.orphans.is_empty()
    }

    pub fn takes_renewals(&self) -> bool {
        self.chores.renewal.is_none()
    }

    pub fn has_work(&self) -> bool {
        self.has_changes() || !self.chores.is_empty()
    }

    /// Something that the stream brought.
    pub fn has_changes(&self) -> bool {
        self.changes.count > 0 || self.changes.within.is_some() || !self.changes.batch.is_empty()
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

    /// All of it leaves, but for what would make the batch too large: that stays for the next one.
    pub fn take(&mut self, limits: &Limits) -> Grown {
        let changes = std::mem::take(&mut self.changes);
        // A single large row has it for itself.
        let has_room = changes.weight <= limits.stream_bytes();
        let chores = match has_room {
            true => self.chores.take(limits),
            false => self.chores.take_forgotten(),
        };
        Grown { changes, chores, through: self.through.take(), applied: std::mem::take(&mut self.applied) }
    }
}
