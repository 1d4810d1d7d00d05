//! What one MULTI/EXEC is to do, as bytes that are ready to be sent, and the sizes that Redis would not survive.
//!
//! A batch is a value of its own, so that the next can be encoded while one is in flight. It knows no connection.
//! A buffer over Redis's limits would not be refused with an error but cut the connection, again at each attempt:
//! therefore sizes are checked here, before anything is sent.

use super::packed::Packing;
use crate::change::Row;
use crate::command::{self, Command, EncodedRows, Key};
use crate::resp;
use crate::schema::Layout;
use bytes::{Bytes, BytesMut};

/// The largest things that the server takes, and whether it takes rows packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// `proto-max-bulk-len`: one key or value.
    pub value_bytes: usize,
    /// The largest batch, in [`command::weight`]: everything between MULTI and EXEC counts for
    /// `client-query-buffer-limit` (since Redis 7.2) and `maxmemory-clients` (since 7.0). A row of which this is not more becomes a dead letter.
    pub batch_bytes: usize,
    /// What batches are made up to, unless a single row takes more: `batch_bytes`, or less where Redis has less memory for
    /// clients at the moment.
    pub planned_bytes: usize,
    /// `None`: it takes no RESTORE of a row.
    pub packing: Option<Packing>,
}

/// The least that a batch is planned for: rows of any size are sent one by one below it.
pub const LEAST_PLANNED_BYTES: usize = 64 << 10;

impl Limits {
    pub fn new(value_bytes: usize, buffer_bytes: usize) -> Self {
        // The rest is for MULTI, EXEC and the checkpoint.
        let batch_bytes = buffer_bytes - buffer_bytes / 64;
        Limits { value_bytes, batch_bytes, planned_bytes: batch_bytes, packing: None }
    }

    /// All clients together may use `most`, of which others use `used` now; the client that uses most is disconnected
    /// first. A large argument counts twice while it is read, so one batch is given half.
    pub fn among_clients(self, most: usize, used: usize) -> Self {
        let batch_bytes = self.batch_bytes.min(most / 2);
        let planned_bytes = (most.saturating_sub(used) / 2).max(most / 16);
        Limits { batch_bytes, planned_bytes: self.planned_bytes.min(planned_bytes).min(batch_bytes), ..self }
    }

    /// Batches are made smaller, and what a row may take stays as it is.
    pub fn planned_for(self, bytes: usize) -> Self {
        Limits { planned_bytes: self.planned_bytes.min(bytes), ..self }
    }

    /// Of a batch, that much may be changes of the stream: it holds one transaction of this weight.
    pub fn stream_bytes(&self) -> usize {
        self.planned_bytes / 16 * 9
    }

    /// ... and that much rows of a load.
    pub fn rows_bytes(&self) -> usize {
        self.planned_bytes / 16 * 4
    }

    /// ... and that much keys of one kind: to be renewed, or orphans to be removed.
    pub fn keys_bytes(&self) -> usize {
        self.planned_bytes / 32
    }

    /// ... and that much keys that a TRUNCATE removes. The checkpoint has the rest.
    pub fn cleared_bytes(&self) -> usize {
        self.planned_bytes / 16
    }

    /// Of a single row; what else a batch must hold has the rest.
    fn row_bytes(&self) -> usize {
        self.batch_bytes - self.batch_bytes / 8
    }

    /// For rows that somebody wants to read again before they are written.
    pub fn unpacked(self) -> Self {
        Limits { packing: None, ..self }
    }

    pub(super) fn value(&self, key: &Key, field: &[u8], value: Option<&[u8]>) -> Result<(), TooLarge> {
        match value {
            Some(value) if value.len() > self.value_bytes => Err(TooLarge::Value {
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

/// Redis would cut the connection.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TooLarge {
    #[error(
        "field {field} of {key} has {bytes} bytes, and Redis takes {limit}: raise proto-max-bulk-len, or leave the \
         column out"
    )]
    Value { key: Key, field: String, bytes: usize, limit: usize },
    #[error(
        "{key} needs {bytes} bytes in one transaction, and Redis takes {limit} from one client: raise \
         client-query-buffer-limit and maxmemory-clients, or leave columns out"
    )]
    Row { key: Key, bytes: usize, limit: usize },
    /// It would fit into a batch of its own.
    #[error(
        "a batch of {bytes} bytes is more than Redis takes from one client ({limit}): lower cache.max_atomic_bytes, or \
         raise client-query-buffer-limit and maxmemory-clients"
    )]
    Batch { bytes: usize, limit: usize },
}

/// Hashes among which the keys of dead letters are distributed.
const DEAD_KEY_HASHES: u64 = 64;

/// The keys that are ours beside the rows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OwnKeys {
    prefix: String,
    checkpoint: Key,
    tables: Key,
    dead: Key,
    fence: Key,
}

impl OwnKeys {
    /// `prefix`: with its last `:`.
    pub fn under(prefix: &str) -> Self {
        let key = |name: &str| Key(Bytes::from(format!("{prefix}{name}")));
        OwnKeys {
            prefix: prefix.to_owned(),
            checkpoint: key("checkpoint"),
            tables: key("tables"),
            dead: key("dead"),
            fence: key("fence"),
        }
    }

    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    pub fn checkpoint(&self) -> &Key {
        &self.checkpoint
    }

    /// The hash of the tables' entries, by their names: the part of the checkpoint that seldom changes.
    pub fn tables(&self) -> &Key {
        &self.tables
    }

    /// The dead-letter stream.
    pub fn dead(&self) -> &Key {
        &self.dead
    }

    /// Written to find out how far replicas or the disk have come; holds nothing.
    pub fn fence(&self) -> &Key {
        &self.fence
    }

    /// The hash that records the row at `row_key` while it is a dead letter. One of several, so that reading one takes
    /// no longer than reading a row.
    pub fn dead_keys_of(&self, row_key: &Key) -> Key {
        // FNV-1a: what one version writes, every other must find.
        let hash = row_key.as_bytes().iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
        });
        self.dead_keys_at(hash % DEAD_KEY_HASHES)
    }

    /// All of these hashes.
    pub fn dead_keys(&self) -> impl Iterator<Item = Key> + use<'_> {
        (0..DEAD_KEY_HASHES).map(|at| self.dead_keys_at(at))
    }

    fn dead_keys_at(&self, at: u64) -> Key {
        Key(Bytes::from(format!("{}dead-keys:{at}", self.prefix)))
    }

    /// Where nothing ever lies.
    pub fn unused(&self) -> Key {
        Key(Bytes::from(format!("{}unused", self.prefix)))
    }

    /// Where [`Command::Keep`] puts a copy aside. Gone again by the end of its batch.
    pub fn kept(&self, slot: u32) -> Key {
        Key(Bytes::from(format!("{}tmp:{slot}", self.prefix)))
    }
}

/// Commands for one MULTI/EXEC, encoded. The checkpoint is not among them: the writer adds it.
#[derive(Debug, Clone)]
pub struct Batch {
    body: BytesMut,
    commands: usize,
    weight: usize,
    own: OwnKeys,
    limits: Limits,
}

impl Batch {
    pub fn new(own: OwnKeys, limits: Limits) -> Self {
        Batch { body: BytesMut::new(), commands: 0, weight: 0, own, limits }
    }

    /// Every entry of a checkpoint, in place of whatever is there.
    ///
    /// # Errors
    /// Where there are more than Redis takes at once.
    pub fn of_entries(
        own: &OwnKeys,
        limits: Limits,
        entries: impl IntoIterator<Item = (String, Vec<u8>)>,
    ) -> Result<Self, TooLarge> {
        let mut batch = Batch::new(own.clone(), limits);
        batch.push(&Command::Delete { key: own.tables().clone() })?;
        for (table, entry) in entries {
            batch.push(&Command::Enter { table, entry })?;
        }
        Ok(batch)
    }

    /// Where this fails, the batch is as it was before.
    pub fn push(&mut self, command: &Command) -> Result<(), TooLarge> {
        let start = self.body.len();
        let commands = resp::encode(&mut self.body, command, &self.own, &self.limits)?;
        let alone = command::weight(self.body.len() - start, commands, fields_of(command));
        let bytes = self.weight + alone;
        let (row_limit, limit) = (self.limits.row_bytes(), self.limits.batch_bytes);
        if alone > row_limit {
            self.body.truncate(start);
            return Err(TooLarge::Row { key: self.subject(command).clone(), bytes: alone, limit: row_limit });
        }
        if bytes > limit {
            self.body.truncate(start);
            return Err(TooLarge::Batch { bytes, limit });
        }
        self.weight = bytes;
        self.commands += commands;
        Ok(())
    }

    /// Takes over those rows whose key `keep` says yes to, and says how many. Where this fails, the batch is as it was
    /// before.
    pub fn push_rows(&mut self, rows: &EncodedRows, mut keep: impl FnMut(&Key) -> bool) -> Result<usize, TooLarge> {
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
            return Err(TooLarge::Batch { bytes, limit: self.limits.batch_bytes });
        }
        self.weight = bytes;
        self.commands += commands;
        Ok(kept)
    }

    /// What Redis counts for it, at most: see [`command::weight`].
    pub fn weight(&self) -> usize {
        self.weight
    }

    pub fn len_bytes(&self) -> usize {
        self.body.len()
    }

    /// Redis commands, not [`Command`]s.
    pub fn commands(&self) -> usize {
        self.commands
    }

    pub fn is_empty(&self) -> bool {
        self.commands == 0
    }

    /// Keeps the buffer.
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
            | Command::Merge { key, .. }
            | Command::Keep { key, .. }
            | Command::Delete { key }
            | Command::Renew { key, .. }
            | Command::Remember { key, .. }
            | Command::Forget { key } => key,
            Command::DeadLetter(_) => self.own.dead(),
            Command::Enter { .. } => self.own.tables(),
        }
    }
}

fn fields_of(command: &Command) -> usize {
    match command {
        Command::Put { layout, .. } | Command::Merge { layout, .. } => layout.fields.len(),
        Command::Keep { .. }
        | Command::Delete { .. }
        | Command::Renew { .. }
        | Command::DeadLetter(_)
        | Command::Remember { .. }
        | Command::Forget { .. }
        | Command::Enter { .. } => 0,
    }
}

/// Encodes the rows of a chunk, before and beside the writer.
#[derive(Debug)]
pub struct RowsEncoder {
    out: BytesMut,
    rows: Vec<(Key, usize)>,
    commands: Vec<u8>,
    fields: usize,
    weight: usize,
    limits: Limits,
}

impl RowsEncoder {
    pub fn new(limits: Limits) -> Self {
        let (rows, commands) = (Vec::new(), Vec::new());
        RowsEncoder { out: BytesMut::new(), rows, commands, fields: 0, weight: 0, limits }
    }

    /// Where this fails, the row is left out.
    pub fn push(&mut self, key: Key, layout: &Layout, row: &Row) -> Result<(), TooLarge> {
        let start = self.out.len();
        let commands = resp::put(&mut self.out, &key, layout, row, &self.limits)?;
        let bytes = command::weight(self.out.len() - start, commands, layout.fields.len());
        let limit = self.limits.row_bytes();
        if bytes > limit {
            self.out.truncate(start);
            return Err(TooLarge::Row { key, bytes, limit });
        }
        self.weight += bytes;
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

    pub fn finish(self) -> EncodedRows {
        EncodedRows { resp: self.out.freeze(), rows: self.rows, commands: self.commands, fields: self.fields }
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
            fields: 0,
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
        assert_eq!(batch.push_rows(&rows, |_| true), Err(TooLarge::Batch { bytes, limit }));
        assert!(batch.is_empty() && batch.len_bytes() == 0);
    }

    #[test]
    fn what_does_not_fit_leaves_the_batch_as_it_was() {
        let delete = |name: &str| Command::Delete { key: key(name) };
        let mut batch = batch(160);
        batch.push(&delete("a")).unwrap();
        let before = batch.body().to_vec();
        assert!(matches!(batch.push(&delete("b")), Err(TooLarge::Batch { limit: 160, .. })));
        assert!(matches!(batch.push(&delete(&"x".repeat(50))), Err(TooLarge::Row { limit: 140, .. })));
        assert_eq!((batch.body(), batch.commands()), (&before[..], 1));
        batch.clear();
        assert!(batch.is_empty());
    }
}
