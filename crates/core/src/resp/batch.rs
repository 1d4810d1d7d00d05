//! The commands of one MULTI/EXEC, encoded and ready to send, and the size limits that Redis imposes.
//!
//! A batch is a value of its own, so that the next one can be encoded while one is in flight. It knows no connection.
//! Redis does not answer a batch over its limits with an error; it closes the connection, and would do so again at
//! every attempt. Sizes are therefore checked here, before anything is sent.

use super::packed::Packing;
use crate::change::Row;
use crate::command::{self, Command, EncodedList, EncodedMembers, EncodedRows, Key};
use crate::lookups::changes::Changes;
use crate::lookups::ttls::ListHash;
use crate::lookups::{Lookups, Values};
use crate::resp;
use crate::schema::Layout;
use bytes::{Bytes, BytesMut};
use std::collections::BTreeSet;
use std::sync::Arc;

/// The size limits of the server, and whether it accepts packed rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// `proto-max-bulk-len`: the limit for one key or value.
    pub value_bytes: usize,
    /// The limit for one batch, in [`command::weight`]: everything between MULTI and EXEC counts towards
    /// `client-query-buffer-limit` (since Redis 7.2) and `maxmemory-clients` (since 7.0). A row that weighs more than
    /// seven eighths of it becomes a dead letter.
    pub batch_bytes: usize,
    /// The size up to which batches are filled, unless a single row needs more: `batch_bytes`, or less while Redis has
    /// little memory for clients.
    pub planned_bytes: usize,
    /// `None` if the server does not accept rows as RESTORE.
    pub packing: Option<Packing>,
}

/// The lowest value of [`Limits::planned_bytes`]: below it, rows of any size would be sent one at a time.
pub const LEAST_PLANNED_BYTES: usize = 64 << 10;

impl Limits {
    pub fn new(value_bytes: usize, buffer_bytes: usize) -> Self {
        // The remainder is for MULTI, EXEC and the checkpoint.
        let batch_bytes = buffer_bytes - buffer_bytes / 64;
        Limits { value_bytes, batch_bytes, planned_bytes: batch_bytes, packing: None }
    }

    /// All clients together may use `most` bytes, and others use `used` now; Redis disconnects the largest client
    /// first. A large argument counts twice while it is read, so a batch gets half of `most`.
    pub fn among_clients(self, most: usize, used: usize) -> Self {
        let batch_bytes = self.batch_bytes.min(most / 2);
        let planned_bytes = (most.saturating_sub(used) / 2).max(most / 16);
        Limits { batch_bytes, planned_bytes: self.planned_bytes.min(planned_bytes).min(batch_bytes), ..self }
    }

    /// Returns limits that two servers accept.
    #[must_use]
    pub fn lowest(self, other: Limits) -> Self {
        Limits {
            value_bytes: self.value_bytes.min(other.value_bytes),
            batch_bytes: self.batch_bytes.min(other.batch_bytes),
            planned_bytes: self.planned_bytes.min(other.planned_bytes),
            packing: self.packing.zip(other.packing).map(|(a, b)| a.lowest(b)),
        }
    }

    /// Makes batches smaller without changing how large a row may be.
    pub fn planned_for(self, bytes: usize) -> Self {
        Limits { planned_bytes: self.planned_bytes.min(bytes), ..self }
    }

    /// Share of a batch for changes of the stream. A transaction of this weight fits into one batch.
    pub fn stream_bytes(&self) -> usize {
        self.planned_bytes / 16 * 9
    }

    /// Share of a batch for rows of a load.
    pub fn rows_bytes(&self) -> usize {
        self.planned_bytes / 16 * 4
    }

    /// Share of a batch for keys of one kind: keys to renew, or orphans to remove.
    pub fn keys_bytes(&self) -> usize {
        self.planned_bytes / 32
    }

    /// Share of a batch for keys that a TRUNCATE removes. The checkpoint gets what is left.
    pub fn cleared_bytes(&self) -> usize {
        self.planned_bytes / 16
    }

    /// The limit for a single row; what else a batch must hold gets the rest.
    fn row_bytes(&self) -> usize {
        self.batch_bytes - self.batch_bytes / 8
    }

    /// For rows that are decoded again before they are written.
    pub fn unpacked(self) -> Self {
        Limits { packing: None, ..self }
    }

    pub(super) fn value(&self, key: &Key, field: &[u8], value: Option<&[u8]>) -> Result<(), EncodeError> {
        match value {
            Some(value) if value.len() > self.value_bytes => Err(EncodeError::Value {
                key: key.clone(),
                field: String::from_utf8_lossy(field).into_owned(),
                bytes: value.len(),
                limit: self.value_bytes,
            }),
            _ => Ok(()),
        }
    }
}

impl Default for Limits {
    /// Redis's own defaults: 512 MB and 1 GB.
    fn default() -> Self {
        Limits::new(512 << 20, 1 << 30)
    }
}

/// Why something is not written. Redis would close the connection if it were too large.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EncodeError {
    #[error("a value of {key} is not one that its column's type can have, so the row cannot be written as JSON")]
    Unrepresentable { key: Key },
    #[error(
        "RedisJSON cannot hold the document at {key} ({why}): write format = \"json\" for its table, or leave the column out"
    )]
    NotHeld { key: Key, why: String },
    #[error(
        "the document at {key} has {bytes} bytes, and Redis accepts {limit}: raise proto-max-bulk-len, or leave columns out"
    )]
    Document { key: Key, bytes: usize, limit: usize },
    #[error(
        "field {field} of {key} has {bytes} bytes, and Redis accepts {limit}: raise proto-max-bulk-len, or leave the \
         column out"
    )]
    Value { key: Key, field: String, bytes: usize, limit: usize },
    #[error(
        "{key} needs {bytes} bytes in one transaction, and Redis accepts {limit} from one client: raise \
         client-query-buffer-limit and maxmemory-clients, or leave columns out"
    )]
    Row { key: Key, bytes: usize, limit: usize },
    /// The command would fit into an empty batch.
    #[error(
        "a batch of {bytes} bytes is more than Redis accepts from one client ({limit}): lower cache.max_atomic_bytes, or \
         raise client-query-buffer-limit and maxmemory-clients"
    )]
    Batch { bytes: usize, limit: usize },
}

impl EncodeError {
    /// Returns the reason of a dead letter: a code, the same as in the metrics.
    pub fn code(&self) -> &'static str {
        match self {
            EncodeError::Unrepresentable { .. } => "unrepresentable",
            EncodeError::NotHeld { .. } => "unparsable",
            EncodeError::Document { .. }
            | EncodeError::Value { .. }
            | EncodeError::Row { .. }
            | EncodeError::Batch { .. } => "too_large",
        }
    }
}

/// The number of hashes over which the keys of dead letters are distributed.
const DEAD_KEY_HASHES: u64 = 64;

/// The stream that gets an entry for every change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChangeStream {
    pub key: Key,
    /// About how many entries it keeps.
    pub max_len: u64,
}

impl ChangeStream {
    pub fn at(key: &str, max_len: u64) -> Self {
        ChangeStream { key: Key(Bytes::copy_from_slice(key.as_bytes())), max_len }
    }
}

/// prefetchd's own keys, besides those of the rows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OwnKeys {
    prefix: String,
    checkpoint: Key,
    tables: Key,
    dead: Key,
    fence: Key,
    /// Boxed because most daemons announce nothing.
    changes: Option<Box<ChangeStream>>,
}

impl OwnKeys {
    /// `prefix` includes its final `:`.
    pub fn under(prefix: &str) -> Self {
        let key = |name: &str| Key(Bytes::from(format!("{prefix}{name}")));
        OwnKeys {
            prefix: prefix.to_owned(),
            checkpoint: key("checkpoint"),
            tables: key("tables"),
            dead: key("dead"),
            fence: key("fence"),
            changes: None,
        }
    }

    /// Changes are announced in this stream.
    #[must_use]
    pub fn announcing(self, changes: Option<ChangeStream>) -> Self {
        OwnKeys { changes: changes.map(Box::new), ..self }
    }

    /// Where changes are announced, if they are.
    pub fn changes(&self) -> Option<&ChangeStream> {
        self.changes.as_deref()
    }

    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    pub fn checkpoint(&self) -> &Key {
        &self.checkpoint
    }

    /// The hash that holds the tables' entries by table name: the part of the checkpoint that changes rarely.
    pub fn tables(&self) -> &Key {
        &self.tables
    }

    /// The dead-letter stream.
    pub fn dead(&self) -> &Key {
        &self.dead
    }

    /// Written to find out how far replicas or the disk have caught up; its value does not matter.
    pub fn fence(&self) -> &Key {
        &self.fence
    }

    /// The hash that records the row at `row_key` while it is a dead letter. There are several such hashes, so that
    /// reading one takes no longer than reading a row.
    pub fn dead_keys_of(&self, row_key: &Key) -> Key {
        // FNV-1a, because every version must find what another has written.
        let hash = row_key.as_bytes().iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
        });
        self.dead_keys_at(hash % DEAD_KEY_HASHES)
    }

    /// All of these hashes' keys.
    pub fn dead_keys(&self) -> impl Iterator<Item = Key> + use<'_> {
        (0..DEAD_KEY_HASHES).map(|at| self.dead_keys_at(at))
    }

    fn dead_keys_at(&self, at: u64) -> Key {
        Key(Bytes::from(format!("{}dead-keys:{at}", self.prefix)))
    }

    /// On a cluster: the bitmap of the hash slots that have been written.
    pub fn lanes(&self) -> Key {
        Key(Bytes::from(format!("{}lanes", self.prefix)))
    }

    /// A key that never exists.
    pub fn unused(&self) -> Key {
        Key(Bytes::from(format!("{}unused", self.prefix)))
    }

    /// A row that is written to find out whether it is read as it was meant, and removed.
    pub fn sample(&self) -> Key {
        Key(Bytes::from(format!("{}sample", self.prefix)))
    }

    /// Where [`Command::Keep`] puts its copy. Gone again at the end of the batch.
    pub fn kept(&self, slot: u32) -> Key {
        Key(Bytes::from(format!("{}tmp:{slot}", self.prefix)))
    }
}

/// The encoded commands of one MULTI/EXEC, without the checkpoint, which the writer adds.
#[derive(Debug, Clone)]
pub struct Batch {
    body: BytesMut,
    commands: usize,
    weight: usize,
    /// Whether members are added to lists or removed from them.
    changes_lists: bool,
    own: OwnKeys,
    limits: Limits,
}

impl Batch {
    pub fn new(own: OwnKeys, limits: Limits) -> Self {
        Batch { body: BytesMut::new(), commands: 0, weight: 0, changes_lists: false, own, limits }
    }

    /// Replaces all entries of the checkpoint.
    ///
    /// # Errors
    /// If they are larger than one batch may be.
    pub fn of_entries(
        own: &OwnKeys,
        limits: Limits,
        entries: impl IntoIterator<Item = (String, Vec<u8>)>,
    ) -> Result<Self, EncodeError> {
        let mut batch = Batch::new(own.clone(), limits);
        batch.push(&Command::Delete { key: own.tables().clone() })?;
        for (table, entry) in entries {
            batch.push(&Command::Enter { table, entry })?;
        }
        Ok(batch)
    }

    /// Appends a command.
    ///
    /// # Errors
    /// If the command or the batch would be too large. The batch is then unchanged.
    pub fn push(&mut self, command: &Command) -> Result<(), EncodeError> {
        let start = self.body.len();
        let commands = resp::encode(&mut self.body, command, &self.own, &self.limits)?;
        let alone = command::weight(self.body.len() - start, commands, fields_of(command));
        let bytes = self.weight + alone;
        let (row_limit, limit) = (self.limits.row_bytes(), self.limits.batch_bytes);
        if alone > row_limit {
            self.body.truncate(start);
            return Err(EncodeError::Row { key: self.subject(command).clone(), bytes: alone, limit: row_limit });
        }
        if bytes > limit {
            self.body.truncate(start);
            return Err(EncodeError::Batch { bytes, limit });
        }
        self.weight = bytes;
        self.commands += commands;
        self.changes_lists |= matches!(command, Command::Join { .. } | Command::Leave { .. });
        Ok(())
    }

    /// Appends those rows whose key `keep` accepts, and returns how many.
    ///
    /// # Errors
    /// If the batch would be too large. It is then unchanged.
    pub fn push_rows(&mut self, rows: &EncodedRows, mut keep: impl FnMut(&Key) -> bool) -> Result<usize, EncodeError> {
        let before = self.body.len();
        let (mut kept, mut commands, mut run, mut start) = (0, 0, 0..0, 0);
        for ((key, end), of_row) in rows.rows.iter().zip(&rows.commands) {
            if keep(key) {
                kept += 1;
                commands += usize::from(*of_row);
                if run.end != start {
                    self.body.extend_from_slice(&rows.resp[run]);
                    run = start..*end;
                }
                run.end = *end;
            }
            start = *end;
        }
        self.body.extend_from_slice(&rows.resp[run]);
        let bytes = self.weight + command::weight(self.body.len() - before, commands, kept * rows.fields);
        if bytes > self.limits.batch_bytes {
            self.body.truncate(before);
            return Err(EncodeError::Batch { bytes, limit: self.limits.batch_bytes });
        }
        self.weight = bytes;
        self.commands += commands;
        Ok(kept)
    }

    /// Appends what adds rows to their lists. A list gets its TTL if it `lacks` one.
    ///
    /// # Errors
    /// If the batch would be too large. It is then unchanged.
    pub fn push_members(
        &mut self,
        EncodedMembers { resp, lists, members }: &EncodedMembers,
        mut lacks: impl FnMut(ListHash) -> bool,
    ) -> Result<(), EncodeError> {
        // Two commands for each list.
        let bytes = self.weight + command::weight(resp.len(), 2 * lists.len(), *members);
        let limit = self.limits.batch_bytes;
        if bytes > limit {
            return Err(EncodeError::Batch { bytes, limit });
        }
        let mut start = 0;
        for EncodedList { list, added, end } in lists {
            let (until, commands) = if lacks(*list) { (*end, 2) } else { (*added, 1) };
            self.body.extend_from_slice(&resp[start..until]);
            self.commands += commands;
            start = *end;
        }
        self.weight = bytes;
        self.changes_lists |= !lists.is_empty();
        Ok(())
    }

    /// An upper bound in bytes of what Redis counts for it. See [`command::weight`].
    pub fn weight(&self) -> usize {
        self.weight
    }

    pub fn len_bytes(&self) -> usize {
        self.body.len()
    }

    /// The number of Redis commands, not of [`Command`]s.
    pub fn commands(&self) -> usize {
        self.commands
    }

    pub fn is_empty(&self) -> bool {
        self.commands == 0
    }

    /// Whether members are added to lists, or removed from them.
    pub fn changes_lists(&self) -> bool {
        self.changes_lists
    }

    /// Empties the batch but keeps its buffer.
    pub fn clear(&mut self) {
        self.body.clear();
        self.commands = 0;
        self.weight = 0;
    }

    pub fn body(&self) -> &[u8] {
        &self.body
    }

    fn subject<'a>(&'a self, command: &'a Command) -> &'a Key {
        match command {
            Command::Put { key, .. }
            | Command::PutDocument { key, .. }
            | Command::Merge { key, .. }
            | Command::Keep { key, .. }
            | Command::Delete { key }
            | Command::Join { key, .. }
            | Command::Leave { key, .. }
            | Command::Renew { key, .. }
            | Command::Remember { key, .. }
            | Command::Forget { key } => key,
            Command::DeadLetter(_) => self.own.dead(),
            Command::Announce(_) => &self.own.changes().expect("announced to a stream").key,
            Command::Enter { .. } => self.own.tables(),
        }
    }
}

fn fields_of(command: &Command) -> usize {
    /// Half of the arguments.
    const OF_ANNOUNCEMENT: usize = 9;
    match command {
        Command::Announce(_) => OF_ANNOUNCEMENT,
        Command::Put { layout, .. } | Command::Merge { layout, .. } => layout.fields.len(),
        // Members are single arguments, and so are scores.
        Command::Join { members, .. } => members.len(),
        Command::Leave { members, .. } => members.len(),
        Command::PutDocument { .. }
        | Command::Keep { .. }
        | Command::Delete { .. }
        | Command::Renew { .. }
        | Command::DeadLetter(_)
        | Command::Remember { .. }
        | Command::Forget { .. }
        | Command::Enter { .. } => 0,
    }
}

/// Encodes the rows of a chunk, ahead of the writer and concurrently with it.
#[derive(Debug)]
pub struct RowsEncoder {
    out: BytesMut,
    rows: Vec<(Key, usize)>,
    commands: Vec<u8>,
    fields: usize,
    weight: usize,
    encoding: Encoding,
    lookups: Option<Arc<Lookups>>,
    values: Vec<Values>,
    members_weight: usize,
}

/// How rows are encoded.
#[derive(Debug, Clone, Copy)]
pub struct Encoding {
    pub limits: Limits,
    pub members: Members,
}

/// Whether rows bring the commands for their memberships.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Members {
    /// Redis has no rows of the table.
    Encoded,
    /// They depend on what Redis has.
    Unknown,
}

impl RowsEncoder {
    /// `lookups`: those of the table.
    pub fn new(encoding: Encoding, lookups: Option<Arc<Lookups>>) -> Self {
        RowsEncoder {
            out: BytesMut::new(),
            rows: Vec::new(),
            commands: Vec::new(),
            fields: 0,
            weight: 0,
            encoding,
            lookups,
            values: Vec::new(),
            members_weight: 0,
        }
    }

    /// Appends a row.
    ///
    /// # Errors
    /// If Redis cannot hold the row. It is then left out.
    pub fn push(&mut self, key: Key, layout: &Layout, row: &Row) -> Result<(), EncodeError> {
        let start = self.out.len();
        let commands = resp::put(&mut self.out, &key, layout, row, &self.encoding.limits)?;
        let bytes = command::weight(self.out.len() - start, commands, layout.fields.len());
        let limit = self.encoding.limits.row_bytes();
        if bytes > limit {
            self.out.truncate(start);
            return Err(EncodeError::Row { key, bytes, limit });
        }
        self.weight += bytes;
        if let Some(lookups) = &self.lookups {
            let values = lookups.values_of(layout, row);
            // The row that was there may have had as many memberships.
            let members_weight = 2 * lookups.weight_of(&key, &values);
            self.weight += members_weight;
            self.members_weight += members_weight;
            self.values.push(values);
        }
        self.fields = self.fields.max(layout.fields.len());
        self.rows.push((key, self.out.len()));
        // At most three.
        self.commands.push(u8::try_from(commands).unwrap_or(u8::MAX));
        Ok(())
    }

    pub fn len_bytes(&self) -> usize {
        self.out.len()
    }

    pub fn weight(&self) -> usize {
        self.weight
    }

    pub fn rows(&self) -> usize {
        self.rows.len()
    }

    /// Returns the rows so far, and continues with none.
    pub fn take(&mut self) -> EncodedRows {
        let next = RowsEncoder::new(self.encoding, self.lookups.clone());
        std::mem::replace(self, next).finish()
    }

    pub fn finish(self) -> EncodedRows {
        let members = self.encoded_members();
        let RowsEncoder { out, rows, commands, fields, values, members_weight, .. } = self;
        EncodedRows { resp: out.freeze(), rows, commands, fields, values, members_weight, members }
    }

    fn encoded_members(&self) -> Option<Box<EncodedMembers>> {
        let lookups = self.lookups.as_ref().filter(|_| self.encoding.members == Members::Encoded)?;
        let mut changes = Changes::default();
        for ((row, _), values) in self.rows.iter().zip(&self.values) {
            changes.new_row(lookups, row, values);
        }
        let (mut out, mut lists, mut members) = (BytesMut::new(), Vec::new(), 0);
        for command in changes.into_commands(&BTreeSet::new()) {
            let Command::Join { key, members: some, ttl_ms } = command else { unreachable!("new rows leave no list") };
            members += some.len();
            resp::join(&mut out, &key, &some);
            let added = out.len();
            resp::pexpire(&mut out, &key, ttl_ms);
            lists.push(EncodedList { list: ListHash::of(&key), added, end: out.len() });
        }
        Some(Box::new(EncodedMembers { resp: out.freeze(), lists, members }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(text: &str) -> Key {
        Key(Bytes::copy_from_slice(text.as_bytes()))
    }

    fn batch(batch_bytes: usize) -> Batch {
        let limits = Limits { value_bytes: 100, batch_bytes, planned_bytes: batch_bytes, packing: None };
        Batch::new(OwnKeys::under("p:"), limits)
    }

    #[test]
    fn takes_over_the_rows_that_are_wanted() {
        let rows = EncodedRows {
            resp: Bytes::from_static(b"aabbbcdd"),
            rows: vec![(key("a"), 2), (key("b"), 5), (key("c"), 6), (key("d"), 8)],
            commands: vec![3, 1, 3, 1],
            ..EncodedRows::default()
        };
        for (wanted, bytes) in [
            ("abcd", "aabbbcdd"),
            ("", ""),
            ("a", "aa"),
            ("d", "dd"),
            ("ad", "aadd"),
            ("bc", "bbbc"),
            ("bd", "bbbdd"),
            ("acd", "aacdd"),
        ] {
            let mut batch = batch(10_000);
            let kept = batch.push_rows(&rows, |key| wanted.contains(std::str::from_utf8(key.as_bytes()).unwrap()));
            assert_eq!(kept, Ok(wanted.len()), "{wanted}");
            let commands = wanted.chars().map(|c| if matches!(c, 'a' | 'c') { 3 } else { 1 }).sum();
            assert_eq!((batch.body(), batch.commands()), (bytes.as_bytes(), commands), "{wanted}");
        }
        let mut batch = batch(rows.weight() - 1);
        let (bytes, limit) = (rows.weight(), rows.weight() - 1);
        assert_eq!(batch.push_rows(&rows, |_| true), Err(EncodeError::Batch { bytes, limit }));
        assert!(batch.is_empty() && batch.len_bytes() == 0);
    }

    #[test]
    fn what_does_not_fit_leaves_the_batch_as_it_was() {
        let delete = |name: &str| Command::Delete { key: key(name) };
        let mut batch = batch(160);
        batch.push(&delete("a")).unwrap();
        let before = batch.body().to_vec();
        assert!(matches!(batch.push(&delete("b")), Err(EncodeError::Batch { limit: 160, .. })));
        assert!(matches!(batch.push(&delete(&"x".repeat(50))), Err(EncodeError::Row { limit: 140, .. })));
        assert_eq!((batch.body(), batch.commands()), (&before[..], 1));
        batch.clear();
        assert!(batch.is_empty());
    }
}
