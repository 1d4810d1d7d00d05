//! A small Redis that executes the commands that batches really contain, with WATCH, for several connections, any of
//! which may be cut at any time.

use super::Rng;
use super::postgres::{Extra, RowId, TABLES, Values};
use crate::checkpoint::{BadCheckpoint, Checkpoint, TableMark};
use crate::command::Key;
use crate::resp::{self, Token};
use crate::rules::{Rule, holds};
use crate::session::inspect::{Comparison, Differences, Probe};
use bytes::Bytes;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::hash::{Hash as _, Hasher};

type Hash = BTreeMap<Bytes, Bytes>;

#[derive(Debug)]
pub enum Request {
    Execute { body: Bytes, checkpoint: Bytes },
    Probe(Vec<Key>),
    Scan { prefix: Bytes, cursor: u64 },
    Compare(Comparison),
}

#[derive(Debug)]
pub enum Answer {
    /// EXEC was executed; `GET` after it returned this.
    Executed {
        found: Option<Bytes>,
    },
    /// EXEC was refused because a watched key was touched.
    Discarded,
    Probed(Vec<Probe>),
    Scanned {
        keys: Vec<Key>,
        next: u64,
    },
    Compared(Differences),
}

#[derive(Default)]
struct Connection {
    watched: BTreeSet<Bytes>,
    touched: bool,
    /// Sent but not executed yet. A request may still be executed after the connection was cut.
    requests: VecDeque<Request>,
    answers: VecDeque<Answer>,
    cut: bool,
}

#[derive(Clone, Default)]
struct Contents {
    hashes: BTreeMap<Bytes, (Hash, u64)>,
    checkpoint: Option<Bytes>,
    /// The entries of the tables, by name.
    entries: BTreeMap<Bytes, Bytes>,
    /// The keys of rows that are recorded as dead letters.
    dead: BTreeSet<Bytes>,
}

pub struct Redis {
    now: Contents,
    saved: Contents,
    /// The contents of the replica.
    replica: Contents,
    /// How many keys were evicted since the start.
    pub evicted_keys: u64,
    connections: Vec<Connection>,
    pub time_ms: u64,
}

pub const CHECKPOINT: &[u8] = b"prefetchd:{s}:checkpoint";
pub const ENTRIES: &[u8] = b"prefetchd:{s}:tables";
const DEAD_LETTERS: &[u8] = b"prefetchd:{s}:dead";
const DEAD_KEYS: &[u8] = b"prefetchd:{s}:dead-keys:";
/// The literal of the template of a table that used to be configured.
pub const OLD: &str = "old:";

impl Redis {
    pub fn new() -> Self {
        Redis {
            now: Contents::default(),
            saved: Contents::default(),
            replica: Contents::default(),
            evicted_keys: 0,
            connections: Vec::new(),
            time_ms: 1_767_225_600_000,
        }
    }

    /// Performs WATCH and GET on the checkpoint, and reads the keys of dead letters.
    pub fn connect(&mut self) -> Result<(usize, Option<Checkpoint>, Vec<Key>), String> {
        self.connections.push(Connection { watched: guarded(), ..Connection::default() });
        let dead = self.now.dead.iter().map(|key| Key(key.clone())).collect();
        Ok((self.connections.len() - 1, self.checkpoint()?, dead))
    }

    pub fn send(&mut self, connection: usize, request: Request) {
        let connection = &mut self.connections[connection];
        if !connection.cut {
            connection.requests.push_back(request);
        }
    }

    pub fn take_answer(&mut self, connection: usize) -> Option<Answer> {
        self.connections[connection].answers.pop_front()
    }

    pub fn has_answer(&self, connection: usize) -> bool {
        !self.connections[connection].answers.is_empty()
    }

    pub fn is_cut(&self, connection: usize) -> bool {
        self.connections[connection].cut
    }

    /// Cuts a connection. What was sent may or may not still arrive.
    pub fn cut(&mut self, connection: usize, rng: &mut Rng) {
        let connection = &mut self.connections[connection];
        connection.cut = true;
        connection.answers.clear();
        if rng.percent(50) {
            connection.requests.clear();
        }
    }

    /// Returns the connections that have requests to execute.
    pub fn busy(&self) -> Vec<usize> {
        (0..self.connections.len()).filter(|c| !self.connections[*c].requests.is_empty()).collect()
    }

    /// Executes one request, and returns whether it changed anything.
    pub fn serve(&mut self, of: usize, rng: &mut Rng) -> Result<bool, String> {
        let Some(request) = self.connections[of].requests.pop_front() else { return Ok(false) };
        let (answer, changed) = match request {
            Request::Execute { body, checkpoint } => {
                let refused = std::mem::take(&mut self.connections[of].touched);
                self.connections[of].watched.clear();
                if !refused {
                    for command in commands(&body) {
                        self.perform(&command)?;
                    }
                    self.now.checkpoint = Some(checkpoint);
                    self.touch(CHECKPOINT);
                }
                self.connections[of].watched = guarded();
                let answer =
                    if refused { Answer::Discarded } else { Answer::Executed { found: self.now.checkpoint.clone() } };
                (answer, !refused)
            }
            Request::Probe(keys) => {
                let probes = keys.iter().map(|key| self.probe(of, key)).collect();
                (Answer::Probed(probes), false)
            }
            Request::Compare(wanted) => (Answer::Compared(self.compare(&wanted)), false),
            Request::Scan { prefix, cursor } => {
                let keys = self.keys(&prefix, None).map(|key| (place(&key), key)).filter(|(place, _)| *place >= cursor);
                let mut keys: Vec<(u64, Key)> = keys.collect();
                keys.sort();
                let stops = keys.len() > 1 && rng.percent(50);
                let rest = keys.split_off(if stops { keys.len() / 2 } else { keys.len() });
                let next = rest.first().map_or(0, |(place, _)| *place);
                (Answer::Scanned { keys: keys.into_iter().map(|(_, key)| key).collect(), next }, false)
            }
        };
        let connection = &mut self.connections[of];
        if !connection.cut {
            connection.answers.push_back(answer);
        }
        Ok(changed)
    }

    fn probe(&mut self, of: usize, key: &Key) -> Probe {
        self.connections[of].watched.insert(key.0.clone());
        if self.now.hashes.contains_key(key.as_bytes()) { Probe::Hash } else { Probe::Absent }
    }

    fn compare(&self, wanted: &Comparison) -> Differences {
        let (mut differences, mut start) = (Differences::default(), 0);
        for (key, end) in &wanted.rows.rows {
            let row = &wanted.rows.resp[std::mem::replace(&mut start, *end)..*end];
            if wanted.left_out.contains(key) {
                continue;
            }
            let should = resp::fields_of(row).into_iter().map(|(f, v)| (Bytes::copy_from_slice(f), v.to_vec().into()));
            match self.now.hashes.get(key.as_bytes()) {
                None => differences.missing.insert(key.clone()),
                Some((hash, _)) if *hash != should.collect::<Hash>() => differences.stale.insert(key.clone()),
                Some(_) => continue,
            };
        }
        let is_there = |key: &&Key| self.now.hashes.contains_key(key.as_bytes());
        differences.present = wanted.keys.iter().filter(is_there).cloned().collect();
        differences
    }

    fn keys<'a>(&'a self, prefix: &'a [u8], after: Option<&'a Key>) -> impl Iterator<Item = Key> + 'a {
        let keys = self.now.hashes.keys().filter(move |k| k.starts_with(prefix));
        keys.filter(move |k| after.is_none_or(|a| **k > a.0)).map(|k| Key(k.clone()))
    }

    /// Returns one page of SCAN, and where to continue.
    pub fn scan_page(&self, prefix: &str, after: Option<&Key>) -> (Vec<Key>, Option<Key>) {
        let page: Vec<Key> = self.keys(prefix.as_bytes(), after).take(2).collect();
        let next = page.last().filter(|_| page.len() == 2).cloned();
        (page, next)
    }

    fn touch(&mut self, key: &[u8]) {
        self.connections.iter_mut().filter(|c| c.watched.contains(key)).for_each(|c| c.touched = true);
    }

    fn perform(&mut self, command: &[Bytes]) -> Result<(), String> {
        let malformed = || format!("not a command of ours: {command:?}");
        let key = command.get(1).ok_or_else(malformed)?.clone();
        let hashes = &mut self.now.hashes;
        match (&command[0][..], &command[2..]) {
            (b"XADD", _) if key == DEAD_LETTERS => {}
            (b"HSET", [row, _]) if key.starts_with(DEAD_KEYS) => {
                self.now.dead.insert(row.clone());
            }
            (b"HDEL", [row]) if key.starts_with(DEAD_KEYS) => {
                self.now.dead.remove(row);
            }
            (b"HSET", [table, entry]) if key == ENTRIES => {
                self.now.entries.insert(table.clone(), entry.clone());
            }
            (b"DEL", []) if key == ENTRIES => self.now.entries.clear(),
            (b"DEL", []) => {
                hashes.remove(&key);
            }
            (b"HSET", pairs) if !pairs.is_empty() && pairs.len().is_multiple_of(2) => {
                // A hash has no TTL until PEXPIRE follows.
                let (hash, _) = hashes.entry(key.clone()).or_default();
                hash.extend(pairs.chunks(2).map(|pair| (pair[0].clone(), pair[1].clone())));
            }
            (b"PEXPIRE", [ttl_ms]) => {
                let ttl_ms: u64 =
                    std::str::from_utf8(ttl_ms).ok().and_then(|t| t.parse().ok()).ok_or_else(malformed)?;
                if let Some((_, until)) = hashes.get_mut(&key) {
                    *until = self.time_ms + ttl_ms;
                }
            }
            (b"COPY", [to, replace]) if &replace[..] == b"REPLACE" => {
                if let Some(hash) = hashes.get(&key).cloned() {
                    hashes.insert(to.clone(), hash);
                }
            }
            (b"RENAME", [to]) => {
                let hash = hashes.remove(&key).ok_or("an error inside EXEC: RENAME, no such key")?;
                hashes.insert(to.clone(), hash);
                self.touch(&command[2]);
            }
            _ => return Err(malformed()),
        }
        self.touch(&key);
        Ok(())
    }

    /// Returns `None` if there is no checkpoint, or only a part of it.
    pub fn checkpoint(&self) -> Result<Option<Checkpoint>, String> {
        self.now.read_checkpoint()
    }

    /// Returns the replica's checkpoint.
    pub fn replicated(&self) -> Result<Option<Checkpoint>, String> {
        self.replica.read_checkpoint()
    }

    /// Returns whether keys are left of a table that used to be configured.
    pub fn has_old_keys(&self) -> bool {
        self.now.hashes.keys().any(|key| key.starts_with(OLD.as_bytes()))
    }

    /// Pretends that a daemon with one more table was running. Returns whether that was possible.
    pub fn had_another_table(&mut self) -> Result<bool, String> {
        let Some(mut checkpoint) = self.checkpoint()? else { return Ok(false) };
        let Some(mark) = checkpoint.tables.values().next().cloned() else { return Ok(false) };
        checkpoint.seq += 1;
        checkpoint.epoch += 1;
        checkpoint.tables.insert("old".to_owned(), TableMark { template: format!("{OLD}{{id}}"), ..mark });
        self.now.checkpoint = Some(checkpoint.to_json().into());
        self.now.entries = checkpoint.entries().map(|(name, entry)| (name.into(), entry.into())).collect();
        for id in 0..3 {
            let hash = Hash::from([(Bytes::from_static(b"id"), Bytes::from(format!("{id}")))]);
            self.now.hashes.insert(Bytes::from(format!("{OLD}{id}")), (hash, u64::MAX));
        }
        self.touch(CHECKPOINT);
        self.touch(ENTRIES);
        Ok(true)
    }
}

impl Contents {
    fn read_checkpoint(&self) -> Result<Option<Checkpoint>, String> {
        let Some(head) = &self.checkpoint else { return Ok(None) };
        let entries: Vec<(Bytes, Bytes)> = self.entries.clone().into_iter().collect();
        match Checkpoint::read(head, &entries) {
            Ok(checkpoint) => Ok(Some(checkpoint)),
            Err(BadCheckpoint::Entries { .. }) => Ok(None),
            Err(error @ BadCheckpoint::Malformed(_)) => Err(error.to_string()),
        }
    }
}

impl Redis {
    /// Returns the rows, or an error if a key does not contain a row.
    pub fn rows(&self) -> Result<BTreeMap<RowId, Values>, String> {
        let mut rows = BTreeMap::new();
        for (key, (hash, until)) in self.now.hashes.iter().filter(|(key, _)| !key.starts_with(OLD.as_bytes())) {
            let row = row_of(key).ok_or_else(|| format!("a key of no table: {key:?}"))?;
            extra_of(row, hash)?;
            let number = |field: &[u8]| hash.get(field).and_then(|v| std::str::from_utf8(v).ok()?.parse::<u64>().ok());
            match [b"id", &b"small"[..], b"large", b"huge"].map(number) {
                [Some(id), Some(small), Some(large), Some(huge)] if id == row.id => {
                    rows.insert(row, Values { small, large: [large, huge] });
                }
                _ => return Err(format!("torn row {row:?}: {hash:?}")),
            }
            if *until <= self.time_ms {
                return Err(format!("{row:?} has no TTL"));
            }
        }
        for key in &self.now.dead {
            let row = row_of(key).ok_or_else(|| format!("a dead letter of no table: {key:?}"))?;
            if let Some(values) = rows.insert(row, Values::DEAD) {
                return Err(format!("{row:?} is a dead letter, but shows {values:?}"));
            }
        }
        Ok(rows)
    }

    /// Returns the values of the column that is added and dropped.
    pub fn extras(&self) -> Result<BTreeMap<RowId, Extra>, String> {
        let rows = self.now.hashes.iter().filter_map(|(key, (hash, _))| Some((row_of(key)?, hash)));
        rows.map(|(row, hash)| Ok((row, extra_of(row, hash)?))).collect()
    }

    /// Returns when the row with the shortest remaining TTL expires.
    pub fn shortest_life(&self, table: u16) -> Option<u64> {
        let of_table = |key: &Bytes| row_of(key).is_some_and(|row| row.table == table);
        self.now.hashes.iter().filter(|(key, _)| of_table(key)).map(|(_, (_, until))| *until).min()
    }

    // ---- what may happen to it -------------------------------------------------------------------------------------

    pub fn save(&mut self) {
        self.saved = self.now.clone();
    }

    /// The replica catches up with everything.
    pub fn replicate(&mut self) {
        self.replica = self.now.clone();
    }

    /// Restarts from the copy that was saved last.
    pub fn roll_back(&mut self) {
        self.now = self.saved.clone();
        self.starts();
    }

    /// The replica is promoted.
    pub fn fail_over(&mut self) {
        self.now = self.replica.clone();
        self.starts();
    }

    fn starts(&mut self) {
        self.evicted_keys = 0;
        for connection in &mut self.connections {
            (connection.cut, connection.touched) = (true, true);
            connection.requests.clear();
            connection.answers.clear();
        }
    }

    pub fn flush(&mut self) {
        // FLUSHALL touches only keys that exist, so a WATCH on a missing key does not notice it.
        let mut there: BTreeSet<Bytes> = self.now.hashes.keys().cloned().collect();
        there.extend(self.now.checkpoint.iter().map(|_| Bytes::from_static(CHECKPOINT)));
        there.extend(self.now.entries.first_key_value().map(|_| Bytes::from_static(ENTRIES)));
        there.iter().for_each(|key| self.touch(key));
        self.now = Contents::default();
    }

    pub fn delete_checkpoint(&mut self) {
        if self.now.checkpoint.take().is_some() {
            self.touch(CHECKPOINT);
        }
    }

    pub fn delete_entries(&mut self) {
        if !std::mem::take(&mut self.now.entries).is_empty() {
            self.touch(ENTRIES);
        }
    }

    /// Removes the keys that have expired.
    pub fn expire(&mut self) -> Vec<RowId> {
        let is_over = |(_, (_, until)): &(&Bytes, &(Hash, u64))| *until <= self.time_ms;
        let expired: Vec<Bytes> = self.now.hashes.iter().filter(is_over).map(|(key, _)| key.clone()).collect();
        for key in &expired {
            self.now.hashes.remove(key);
            self.touch(key);
        }
        // Keys in the copies expire when the copies are read; removing them now has the same effect.
        let now = self.time_ms;
        for copy in [&mut self.saved, &mut self.replica] {
            copy.hashes.retain(|_, (_, until)| *until > now);
        }
        expired.iter().filter_map(|key| row_of(key)).collect()
    }

    /// Removes the key of some row.
    pub fn remove_some(&mut self, rng: &mut Rng) -> Option<RowId> {
        let keys: Vec<Bytes> = self.now.hashes.keys().filter(|key| row_of(key).is_some()).cloned().collect();
        let key = (!keys.is_empty()).then(|| rng.pick(&keys).clone())?;
        self.now.hashes.remove(&key);
        self.touch(&key);
        row_of(&key)
    }
}

/// Accepts no value, NULL, or the value of this very version. Anything else means that two versions are mixed.
fn extra_of(row: RowId, hash: &Hash) -> Result<Extra, String> {
    match hash.get(&b"extra"[..]) {
        None if hash.len() == 4 => Ok(Extra::NoColumn),
        Some(value) if hash.len() == 5 && value.is_empty() => Ok(Extra::Null),
        Some(value) if hash.len() == 5 && hash.get(&b"small"[..]) == Some(value) => Ok(Extra::OfRow),
        Some(_) | None => Err(format!("torn row {row:?}: {hash:?}")),
    }
}

/// Returns the keys that the writer always watches.
fn guarded() -> BTreeSet<Bytes> {
    if !holds(Rule::WatchCheckpoint) {
        return BTreeSet::new();
    }
    BTreeSet::from([Bytes::from_static(CHECKPOINT), Bytes::from_static(ENTRIES)])
}

fn row_of(key: &[u8]) -> Option<RowId> {
    let (table, id) = std::str::from_utf8(key).ok()?.split_once(':')?;
    let table = (0..TABLES).find(|t| super::postgres::name(*t).table == table)?;
    Some(RowId { table, id: id.parse().ok()? })
}

/// Returns the commands of a batch, with their arguments.
fn commands(mut body: &[u8]) -> Vec<Vec<Bytes>> {
    let mut next = || {
        let (token, len) = resp::token(body).expect("RESP").filter(|_| !body.is_empty())?;
        body = &body[len..];
        Some(token)
    };
    let mut commands = Vec::new();
    while let Some(Token::Array(n)) = next() {
        let argument = |_| match next() {
            Some(Token::Bulk(bytes)) => Bytes::copy_from_slice(bytes),
            other => panic!("expected an argument: {other:?}"),
        };
        commands.push((0..n).map(argument).collect());
    }
    commands
}

/// Returns the position of a key in SCAN: arbitrary, but always the same. Never 0, which is where a scan begins.
fn place(key: &Key) -> u64 {
    let mut hasher = std::hash::DefaultHasher::new();
    key.0.hash(&mut hasher);
    hasher.finish().max(1)
}
