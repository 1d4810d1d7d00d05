//! A small Redis that executes the requests that daemons really send, for several connections, any of which may be cut
//! at any time: a single server, with WATCH, or the nodes of a cluster, each with a part of the hash slots.

use super::Rng;
use super::announced::CHANGES;
use super::postgres::{Extra, RowId, TABLES, Values};
use super::store::{Called, Hash, Store, Value};
use crate::checkpoint::{BadCheckpoint, Checkpoint, ENTERED, Place, TableMark, TableState};
use crate::command::Key;
use crate::format::Format;
use crate::lanes::Lane;
use crate::lanes::mark::{Home, Mark};
use crate::lanes::reading::{Around, Listing};
use crate::lanes::record::{Bitmap, Extra as OfRecord, FIRST_WHOLE};
use crate::lanes::script::Call;
use crate::lanes::tags;
use crate::lookups::questions::{Answers, Questions};
use crate::lookups::{self, Lookups};
use crate::resp::{self, Token};
use crate::rules::{Rule, holds};
use crate::session::inspect::{Comparison, Differences, Inspection, Probe};
use bytes::Bytes;
use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::hash::{Hash as _, Hasher};
use std::sync::Arc;

/// Members of lists, with their scores.
pub type Members = BTreeMap<(RowId, Key), Option<lookups::Score>>;

#[derive(Debug)]
pub enum Request {
    Execute {
        body: Bytes,
        checkpoint: Bytes,
    },
    /// A part of a batch, for one lane; or the record.
    Call(Call),
    Probe(Inspection),
    /// `marks`: of the lanes of the keys, what they must be.
    Inspect {
        questions: Questions,
        marks: Vec<(Lane, Bytes)>,
    },
    Scan {
        prefix: Bytes,
        cursor: u64,
    },
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
    Called(Call, Called),
    Probed(Vec<Probe>),
    Inspected(Answers),
    Scanned {
        keys: Vec<Key>,
        next: u64,
    },
    Compared(Differences),
}

/// What came of a request.
#[derive(Debug)]
pub enum Served {
    /// Nothing was changed.
    Read,
    Wrote,
    /// Nothing was done: the hash slot is on its way to another node.
    Refused(Redirect),
    /// `is_late`: the connection had been cut before.
    Called {
        called: Called,
        is_late: bool,
    },
}

/// What the node that a hash slot is leaving answers if it does not have all keys of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Redirect {
    /// ASK: it has none of them.
    Ask,
    /// It has some of them.
    TryAgain,
}

/// A hash slot whose keys are moved one by one.
struct Move {
    to: usize,
    /// The keys that are there.
    moved: BTreeSet<Bytes>,
}

#[derive(Default)]
struct Connection {
    watched: BTreeSet<Bytes>,
    touched: bool,
    /// Sent but not executed yet. A request may still be executed after the connection was cut. On a cluster, they are
    /// on their way to different nodes.
    requests: VecDeque<Request>,
    answers: VecDeque<Answer>,
    cut: bool,
}

/// What a node had some time ago.
#[derive(Default, Clone)]
struct Copy {
    contents: Store,
    /// The lanes of which it had only a part, and when: the number of moves that had ended by then.
    parted: BTreeMap<Lane, u64>,
}

/// A server, or a master of a cluster.
#[derive(Default)]
struct Node {
    saved: Copy,
    /// The contents of the replica.
    replica: Copy,
    /// How many keys were evicted since the start.
    evicted_keys: u64,
}

pub struct Redis {
    now: Store,
    /// A single one is not a cluster.
    nodes: Vec<Node>,
    /// The nodes of the lanes.
    homes: BTreeMap<Lane, usize>,
    /// The lanes whose keys are moved one by one.
    moving: BTreeMap<Lane, Move>,
    /// Lanes that no daemon has found on the node to which they have moved. If such a lane moved back, nobody would notice.
    unnoticed: BTreeSet<Lane>,
    /// Lanes that a late call has written last.
    left_behind: BTreeSet<Lane>,
    /// How often a hash slot has moved to another node.
    pub moves: u64,
    /// Which of these moves was the last of each lane.
    moved_last: BTreeMap<Lane, u64>,
    connections: Vec<Connection>,
    pub time_ms: u64,
    /// Within one step, as for a daemon that was frozen.
    pub hours_passed: bool,
}

pub const CHECKPOINT: &[u8] = b"prefetchd:{s}:checkpoint";
pub const ENTRIES: &[u8] = b"prefetchd:{s}:tables";
pub const LISTED: &[u8] = b"prefetchd:{s}:lanes";
/// Under it lie prefetchd's own keys.
const OWN: &[u8] = b"prefetchd:";
const DEAD_KEYS: &[u8] = b"prefetchd:{s}:dead-keys:";
/// The name of the replication slot, in the keys of marks.
pub const SLOT: &str = "s";
/// The literal of the template of a table that used to be configured.
pub const OLD: &str = "old:";
/// The key of a lookup of that table.
pub const OLD_LIST: &str = "older";

impl Redis {
    pub fn new() -> Self {
        Redis {
            now: Store::default(),
            nodes: vec![Node::default()],
            homes: BTreeMap::new(),
            moving: BTreeMap::new(),
            unnoticed: BTreeSet::new(),
            left_behind: BTreeSet::new(),
            moves: 0,
            moved_last: BTreeMap::new(),
            connections: Vec::new(),
            time_ms: 1_767_225_600_000,
            hours_passed: false,
        }
    }

    /// A cluster of some nodes, with these lanes and that of the record, and of one more node that has just been added.
    pub fn cluster(lanes: impl IntoIterator<Item = Lane>, rng: &mut Rng) -> Self {
        let count = 2 + rng.below(3) as usize;
        let lanes = lanes.into_iter().chain([Lane::of(CHECKPOINT)]);
        let homes = lanes.map(|lane| (lane, rng.below(count as u64) as usize)).collect();
        Redis { nodes: (0..=count).map(|_| Node::default()).collect(), homes, ..Redis::new() }
    }

    pub fn is_cluster(&self) -> bool {
        self.nodes.len() > 1
    }

    /// Performs WATCH and GET on the checkpoint, and reads the keys of dead letters.
    pub fn connect(&mut self) -> Result<(usize, Option<Checkpoint>, Vec<Key>), String> {
        self.connections.push(Connection { watched: guarded(), ..Connection::default() });
        let mut dead: Vec<Key> = self.dead().map(|key| Key(key.clone())).collect();
        dead.sort();
        Ok((self.connections.len() - 1, self.checkpoint()?, dead))
    }

    fn dead(&self) -> impl Iterator<Item = &Bytes> {
        self.now.hashes(DEAD_KEYS).flat_map(|(_, rows, _)| rows.keys())
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
        let is_cluster = self.is_cluster();
        let connection = &mut self.connections[connection];
        connection.cut = true;
        connection.answers.clear();
        if is_cluster {
            connection.requests.retain(|_| rng.percent(50));
        } else if rng.percent(50) {
            connection.requests.clear();
        }
    }

    /// Returns the connections that have requests to execute.
    pub fn busy(&self) -> Vec<usize> {
        (0..self.connections.len()).filter(|c| !self.connections[*c].requests.is_empty()).collect()
    }

    /// Executes one request. The nodes of a cluster execute them in any order.
    pub fn serve(&mut self, of: usize, rng: &mut Rng) -> Result<Served, String> {
        let waiting = self.connections[of].requests.len() as u64;
        let which = if self.is_cluster() && waiting > 0 { rng.below(waiting) as usize } else { 0 };
        let Some(request) = self.connections[of].requests.remove(which) else {
            return Ok(Served::Read);
        };
        if let Some(redirect) = self.refuses(&request) {
            // The daemon sends it again, as long as it is connected.
            let connection = &mut self.connections[of];
            if !connection.cut {
                connection.requests.insert(which, request);
            }
            return Ok(Served::Refused(redirect));
        }
        let (answer, served) = match request {
            Request::Execute { body, checkpoint } => {
                let refused = std::mem::take(&mut self.connections[of].touched);
                self.connections[of].watched.clear();
                if !refused {
                    for command in commands(&body) {
                        self.perform(&command)?;
                    }
                    self.now.set(Bytes::from_static(CHECKPOINT), Value::Text(checkpoint));
                    self.touch(CHECKPOINT);
                }
                self.connections[of].watched = guarded();
                let found = self.now.text(CHECKPOINT).cloned();
                let answer = if refused { Answer::Discarded } else { Answer::Executed { found } };
                (answer, if refused { Served::Read } else { Served::Wrote })
            }
            Request::Call(call) => {
                let called = self.now.call(&call, self.time_ms);
                let (lane, is_late) = (Lane::of(call.keys[0].as_bytes()), self.connections[of].cut);
                match called {
                    Called::Done if is_late => _ = self.left_behind.insert(lane),
                    Called::Done => _ = self.left_behind.remove(&lane),
                    _ => {}
                }
                let served = Served::Called { called: called.clone(), is_late };
                (Answer::Called(call, called), served)
            }
            Request::Probe(inspection) => (Answer::Probed(self.probe(of, &inspection, rng)), Served::Read),
            Request::Inspect { marks, .. } if !self.are(&marks) => (Answer::Discarded, Served::Read),
            Request::Inspect { questions, .. } => {
                let page = 1 + rng.below(3) as usize;
                (Answer::Inspected(self.now.inspect(&questions, page)), Served::Read)
            }
            Request::Compare(wanted) => (Answer::Compared(self.compare(&wanted)), Served::Read),
            Request::Scan { prefix, cursor } => {
                let keys = self.keys(&prefix, None).map(|key| (place(&key), key)).filter(|(place, _)| *place >= cursor);
                let mut keys: Vec<(u64, Key)> = keys.collect();
                keys.sort();
                let stops = keys.len() > 1 && rng.percent(50);
                let rest = keys.split_off(if stops { keys.len() / 2 } else { keys.len() });
                let next = rest.first().map_or(0, |(place, _)| *place);
                (Answer::Scanned { keys: keys.into_iter().map(|(_, key)| key).collect(), next }, Served::Read)
            }
        };
        let connection = &mut self.connections[of];
        if !connection.cut {
            connection.answers.push_back(answer);
        }
        Ok(served)
    }

    /// Whether a hash slot that is moving keeps a request from being executed.
    fn refuses(&self, request: &Request) -> Option<Redirect> {
        match request {
            Request::Execute { .. } => None,
            Request::Call(call) => self.redirects(call.keys.iter().map(Key::as_bytes)),
            Request::Probe(inspection) => inspection.keys().find_map(|key| self.redirects([key.as_bytes()])),
            Request::Compare(wanted) => {
                let rows = wanted.rows.rows.iter().map(|(key, _)| key).filter(|key| !wanted.left_out.contains(*key));
                rows.chain(&wanted.keys).find_map(|key| self.redirects([key.as_bytes()]))
            }
            Request::Inspect { questions, .. } => questions.keys().find_map(|key| self.redirects([key.as_bytes()])),
            // What it finds is complete only if no slot is moving at its end.
            Request::Scan { .. } => (!self.moving.is_empty()).then_some(Redirect::Ask),
        }
    }

    /// What a node answers to a command about these keys, which have the same hash slot, if it does not execute it.
    pub fn redirects<'a>(&self, keys: impl IntoIterator<Item = &'a [u8]>) -> Option<Redirect> {
        let (mut any, mut all) = (false, true);
        for key in keys {
            let of = self.moving.get(&Lane::of(key))?;
            let is_here = self.now.get(key).is_some() && !of.moved.contains(key);
            (any, all) = (any || is_here, all && is_here);
        }
        match (any, all) {
            (_, true) => None,
            (true, false) => Some(Redirect::TryAgain),
            (false, false) => Some(Redirect::Ask),
        }
    }

    fn are(&self, marks: &[(Lane, Bytes)]) -> bool {
        marks.iter().all(|(lane, mark)| self.mark(*lane).map_or(&b""[..], |found| found) == mark)
    }

    fn probe(&mut self, of: usize, inspection: &Inspection, rng: &mut Rng) -> Vec<Probe> {
        self.connections[of].watched.extend(inspection.types.iter().map(|key| key.0.clone()));
        let type_of = |key: &Key| match self.now.get(key.as_bytes()) {
            Some(Value::Hash(_)) => Probe::Hash,
            Some(Value::Text(_)) => Probe::String,
            Some(Value::Set(_) | Value::SortedSet(_)) => Probe::OtherType,
            None => Probe::Absent,
        };
        let mut room = inspection.most_bytes;
        let mut document = |key: &Key| match self.now.get(key.as_bytes()) {
            Some(Value::Text(document)) => match room.checked_sub(document.len()) {
                Some(rest) if !rng.percent(5) => {
                    room = rest;
                    Probe::Document(document.clone())
                }
                Some(_) | None => Probe::Unread,
            },
            Some(_) | None => type_of(key),
        };
        let documents: Vec<Probe> = inspection.documents.iter().map(&mut document).collect();
        inspection.types.iter().map(type_of).chain(documents).collect()
    }

    fn compare(&self, wanted: &Comparison) -> Differences {
        let (mut differences, mut start) = (Differences::default(), 0);
        for (key, end) in &wanted.rows.rows {
            let row = &wanted.rows.resp[std::mem::replace(&mut start, *end)..*end];
            if wanted.left_out.contains(key) {
                continue;
            }
            let pairs = || resp::fields_of(row).into_iter();
            let should = match wanted.format {
                Format::Hash => Value::Hash(pairs().map(|(f, v)| (f.to_vec().into(), v.to_vec().into())).collect()),
                Format::Json => Value::Text(resp::document_of(row).expect("a document").to_vec().into()),
                Format::RedisJson => unreachable!("no table here has that format"),
            };
            match self.now.get(key.as_bytes()) {
                None => differences.missing.insert(key.clone()),
                Some(value) if *value != should => differences.stale.insert(key.clone()),
                Some(_) => continue,
            };
        }
        let is_there = |key: &&Key| self.now.get(key.as_bytes()).is_some();
        differences.present = wanted.keys.iter().filter(is_there).cloned().collect();
        differences
    }

    fn keys<'a>(&'a self, prefix: &'a [u8], after: Option<&'a Key>) -> impl Iterator<Item = Key> + 'a {
        let keys = self.now.keys_under(prefix);
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
        self.now.perform(command, self.time_ms)?;
        self.touch(&command[1]);
        if let [name, _, to] = command
            && &name[..] == b"RENAME"
        {
            self.touch(to);
        }
        Ok(())
    }

    /// Returns `None` if there is no checkpoint, or only a part of it.
    pub fn checkpoint(&self) -> Result<Option<Checkpoint>, String> {
        read_checkpoint(&self.now)
    }

    /// Returns the replica's checkpoint.
    pub fn replicated(&self) -> Result<Option<Checkpoint>, String> {
        read_checkpoint(&self.nodes[0].replica.contents)
    }

    /// Returns whether keys are left of a table that used to be configured.
    pub fn has_old_keys(&self) -> bool {
        self.now.hashes(OLD.as_bytes()).next().is_some() || self.now.get(OLD_LIST.as_bytes()).is_some()
    }

    /// Pretends that a daemon with one more table was running. Returns whether that was possible.
    pub fn had_another_table(&mut self) -> Result<bool, String> {
        let Some(mut checkpoint) = self.checkpoint()? else { return Ok(false) };
        let Some(mark) = checkpoint.tables.values().next().cloned() else { return Ok(false) };
        checkpoint.seq += 1;
        checkpoint.epoch += 1;
        let (template, lookups) = (format!("{OLD}{{id}}"), [OLD_LIST.to_owned()].into());
        checkpoint.tables.insert("old".to_owned(), TableMark { template, lookups, ..mark });
        let mut head = Bytes::from(checkpoint.to_json());
        if self.is_cluster() {
            // That daemon wrote nothing to any lane, and the lanes that it would have need no rows.
            let extra = self.now.text(CHECKPOINT).map(|head| OfRecord::of(head));
            head = extra.map_or(head.clone(), |extra| extra.add_to(&head).into());
        } else {
            for id in 0..3 {
                let hash = Hash::from([(Bytes::from_static(b"id"), Bytes::from(format!("{id}")))]);
                self.now.set(Bytes::from(format!("{OLD}{id}")), Value::Hash(hash));
            }
            self.now.set(Bytes::from_static(OLD_LIST.as_bytes()), Value::Set([Bytes::from_static(b"0")].into()));
            // Not a key of that lookup, which has no columns.
            self.now.set(Bytes::from(format!("{OLD_LIST}:0")), Value::Text(Bytes::new()));
        }
        self.another_writes(head, &checkpoint);
        Ok(true)
    }

    /// Pretends that a daemon with other lookups was running, or that somebody has changed lists while none was.
    pub fn had_other_lookups(&mut self, lookups: &BTreeMap<u16, Arc<Lookups>>, rng: &mut Rng) -> Result<(), String> {
        let Some(mut checkpoint) = self.checkpoint()? else { return Ok(()) };
        checkpoint.seq += 1;
        checkpoint.epoch += 1;
        if rng.percent(70) {
            checkpoint.tables.values_mut().for_each(|mark| mark.lookups_as = Some(1));
        }
        let mut head = Bytes::from(checkpoint.to_json());
        if self.is_cluster() {
            let extra = self.now.text(CHECKPOINT).map(|head| OfRecord::of(head));
            head = extra.map_or(head.clone(), |extra| extra.add_to(&head).into());
        }
        self.another_writes(head, &checkpoint);
        (0..1 + rng.below(3)).for_each(|_| self.spoils_lists(lookups, rng));
        Ok(())
    }

    fn another_writes(&mut self, head: Bytes, checkpoint: &Checkpoint) {
        self.now.set(Bytes::from_static(CHECKPOINT), Value::Text(head));
        let mut entries: Hash = checkpoint.entries().map(|(name, entry)| (name.into(), entry.into())).collect();
        let entered = self.now.hash(ENTRIES).and_then(|entries| entries.get_key_value(ENTERED));
        entries.extend(entered.map(|(name, write)| (name.clone(), write.clone())));
        self.now.set(Bytes::from_static(ENTRIES), Value::Hash(entries));
        self.touch(CHECKPOINT);
        self.touch(ENTRIES);
    }
}

fn home_of_node(node: usize) -> Home {
    Home::of(&format!("node{node}")).expect("letters and digits")
}

fn read_checkpoint(store: &Store) -> Result<Option<Checkpoint>, String> {
    let Some(head) = store.text(CHECKPOINT) else { return Ok(None) };
    let entries = store.hash(ENTRIES).cloned().unwrap_or_default().into_iter().collect::<Vec<_>>();
    match Checkpoint::read(head, &entries) {
        Ok(checkpoint) => Ok(Some(checkpoint)),
        Err(BadCheckpoint::Entries { .. } | BadCheckpoint::OtherEntries) => Ok(None),
        Err(error @ BadCheckpoint::Malformed(_)) => Err(error.to_string()),
    }
}

impl Redis {
    /// Returns the rows, or an error if a key does not contain a row.
    pub fn rows(&self) -> Result<BTreeMap<RowId, Values>, String> {
        let mut rows = BTreeMap::new();
        for (key, value, until_ms) in self.now.values(b"") {
            let is_own_text = matches!(value, Value::Text(_)) && key.starts_with(OWN);
            if is_own_text || [OLD.as_bytes(), DEAD_KEYS, ENTRIES, CHANGES].iter().any(|own| key.starts_with(own)) {
                continue;
            }
            let Some(row) = row_of(key) else {
                // Lists of lookups are looked at elsewhere, and whatever else lies there.
                if matches!(value, Value::Hash(_)) {
                    return Err(format!("a key of no table: {key:?}"));
                }
                continue;
            };
            let hash = fields_of(value).ok_or_else(|| format!("{row:?} is no document: {value:?}"))?;
            extra_of(row, &hash)?;
            let number = |field: &[u8]| hash.get(field).and_then(|v| std::str::from_utf8(v).ok()?.parse::<u64>().ok());
            match [b"id", &b"small"[..], b"large", b"huge"].map(number) {
                [Some(id), Some(small), Some(large), Some(huge)] if id == row.id => {
                    rows.insert(row, Values { small, large: [large, huge] });
                }
                _ => return Err(format!("torn row {row:?}: {hash:?}")),
            }
            if until_ms.is_none_or(|until| until <= self.time_ms) {
                return Err(format!("{row:?} has no TTL"));
            }
        }
        for key in self.dead() {
            let row = row_of(key).ok_or_else(|| format!("a dead letter of no table: {key:?}"))?;
            let values = rows.entry(row).or_insert(Values::DEAD);
            // On a cluster, the record and the lane of the row are written one after the other.
            if *values != Values::DEAD && !self.is_cluster() {
                return Err(format!("{row:?} is a dead letter, but shows {values:?}"));
            }
        }
        Ok(rows)
    }

    /// Returns what a consumer of the change stream knows. `None` if nothing was ever announced.
    pub fn announced(&self) -> Option<&Hash> {
        self.now.hash(CHANGES)
    }

    /// Returns what lies at the key of a row, whether or not it is recorded as a dead letter.
    pub fn row(&self, row: RowId) -> Result<Option<Values>, String> {
        Ok(self.rows()?.get(&row).copied().filter(|values| *values != Values::DEAD))
    }

    /// Returns whether the row is recorded as a dead letter.
    pub fn is_dead(&self, row: RowId) -> bool {
        self.dead().any(|key| row_of(key) == Some(row))
    }

    /// Returns the members of each list, and those that the rows give.
    pub fn members(&self, lookups: &BTreeMap<u16, Arc<Lookups>>) -> Result<(Members, Members), String> {
        let (mut found, mut given) = (Members::new(), Members::new());
        for (key, members, until_ms) in self.now.lists().filter(|(key, ..)| *key != OLD_LIST) {
            let list = Key(key.clone());
            let of = lookups.iter().find(|(_, of)| of.kind_at(&list).is_some());
            let (table, of) = of.ok_or_else(|| format!("a list of no lookup: {list}"))?;
            let is_loaded = || {
                let mark = self.checkpoint().ok().flatten()?.tables.get(&super::postgres::name(*table).table)?.state;
                Some(mark == TableState::Loaded)
            };
            // A list that has expired while a load was in its middle gets its TTL with the load that this brings about.
            let is_excused = self.hours_passed && until_ms.is_none() && is_loaded() != Some(true);
            if until_ms.is_none_or(|until| until <= self.time_ms) && !is_excused {
                return Err(format!("{list} has no TTL"));
            }
            for (member, score) in members {
                let row = row_of(of.row(&member).as_bytes()).ok_or_else(|| format!("{list} has {member:?}"))?;
                assert_eq!(row.table, *table);
                found.insert((row, list.clone()), score);
            }
        }
        for (row, key, ..) in self.row_values() {
            let Some(of) = lookups.get(&row.table) else { continue };
            let values = lookups::Values::read(self.now.values_of_row(key, of.fields()))
                .ok_or_else(|| format!("a row without a key: {row:?}"))?;
            let lists = of.memberships(&Key(key.clone()), &values);
            given.extend(lists.into_iter().map(|(list, score)| ((row, list), score)));
        }
        Ok((found, given))
    }

    /// Returns the tables of which keys may have expired while nothing renewed them.
    pub fn tables_that_may_have_expired(&self) -> Result<BTreeSet<u16>, String> {
        let Some(checkpoint) = self.checkpoint()?.filter(|_| self.hours_passed) else { return Ok(BTreeSet::new()) };
        let is_over = |table: &u16| {
            let mark = checkpoint.tables.get(&super::postgres::name(*table).table);
            mark.and_then(|mark| mark.ttl_until_ms).is_some_and(|until| until <= self.time_ms)
        };
        Ok((0..super::postgres::TABLES).filter(is_over).collect())
    }

    /// Returns the keys of lists at which something else lies.
    pub fn other_types(&self, lookups: &BTreeMap<u16, Arc<Lookups>>) -> BTreeSet<Key> {
        let kind = |list: &Key| lookups.values().find_map(|of| of.kind_at(list));
        let is_other = |list: &Key| kind(list).is_some_and(|kind| !self.now.fits(list.as_bytes(), kind));
        self.now.keys().map(|key| Key(key.clone())).filter(is_other).collect()
    }

    /// Returns when the first list of a table expires. `counts`: the rows by which lists count.
    pub fn shortest_life_of_lists(&self, of: &Lookups, counts: impl Fn(&RowId) -> bool) -> Option<u64> {
        let lists = self.now.lists().filter(|(key, ..)| of.kind_at(&Key((*key).clone())).is_some());
        let lists = lists.filter(|(_, members, _)| {
            members.keys().any(|member| row_of(of.row(member).as_bytes()).is_some_and(|row| counts(&row)))
        });
        lists.filter_map(|(.., until)| until).min()
    }

    fn spoils_lists(&mut self, lookups: &BTreeMap<u16, Arc<Lookups>>, rng: &mut Rng) {
        let lists: Vec<Bytes> = self.now.lists().map(|(key, ..)| key.clone()).collect();
        for of in lookups.values() {
            let area = of.area(rng.below(of.count() as u64) as usize).prefix().to_owned();
            let key = match rng.below(3) {
                0 if !lists.is_empty() => rng.pick(&lists).clone(),
                _ => Bytes::from(format!("{area}{}", rng.below(4))),
            };
            let key = if of.kind_at(&Key(key.clone())).is_some() { key } else { Bytes::from(area) };
            let member = Bytes::from(rng.below(5).to_string());
            match rng.below(4) {
                0 => _ = self.now.remove(&key),
                1 => self.now.set(key.clone(), Value::Set([member].into())),
                2 => self.now.set(key.clone(), Value::SortedSet([(member, lookups::Score::of(b"7"))].into())),
                _ => self.now.set(key.clone(), Value::Text(member)),
            }
            _ = self.now.perform(&[Bytes::from_static(b"PEXPIRE"), key, Bytes::from_static(b"86400000")], self.time_ms);
        }
    }

    fn row_values(&self) -> impl Iterator<Item = (RowId, &Bytes, &Value, u64)> {
        let values = self.now.values(b"");
        values.filter_map(|(key, value, until_ms)| Some((row_of(key)?, key, value, until_ms.unwrap_or(0))))
    }

    /// Returns the values of the column that is added and dropped.
    pub fn extras(&self) -> Result<BTreeMap<RowId, Extra>, String> {
        self.row_values()
            .map(|(row, _, value, _)| Ok((row, extra_of(row, &fields_of(value).unwrap_or_default())?)))
            .collect()
    }

    /// Returns when the row with the shortest remaining TTL expires, of those that count.
    pub fn shortest_life(&self, table: u16, counts: impl Fn(RowId) -> bool) -> Option<u64> {
        let of_table = self.row_values().filter(|(row, ..)| row.table == table && counts(*row));
        of_table.map(|(.., until)| until).min()
    }

    // ---- what may happen to it -------------------------------------------------------------------------------------

    /// All nodes save what they have.
    pub fn save(&mut self) {
        (0..self.nodes.len()).for_each(|node| self.nodes[node].saved = self.copy(node));
    }

    /// The replicas catch up with everything.
    pub fn replicate(&mut self) {
        (0..self.nodes.len()).for_each(|node| self.replicate_node(node));
    }

    pub fn replicate_node(&mut self, node: usize) {
        self.nodes[node].replica = self.copy(node);
    }

    fn copy(&self, node: usize) -> Copy {
        let parted = self.moving.iter().filter(|(_, of)| !of.moved.is_empty());
        let parted = parted.map(|(lane, _)| (*lane, self.moves)).collect();
        Copy { contents: self.contents(node), parted }
    }

    fn contents(&self, node: usize) -> Store {
        self.now.part(|lane, key| self.place_of(lane, key) == node)
    }

    /// The node on which a key of a lane lies.
    fn place_of(&self, lane: Lane, key: &[u8]) -> usize {
        let moving = self.moving.get(&lane).filter(|of| of.moved.contains(key));
        moving.map_or_else(|| self.home(lane), |of| of.to)
    }

    fn home(&self, lane: Lane) -> usize {
        self.homes.get(&lane).copied().unwrap_or(0)
    }

    /// A node restarts from the copy that was saved last. What it has of lanes that are elsewhere now is not used.
    pub fn roll_back(&mut self, node: usize, rng: &mut Rng) {
        let saved = self.nodes[node].saved.clone();
        self.begins_with(node, &saved, rng);
    }

    /// The replica of a node is promoted.
    pub fn fail_over(&mut self, node: usize, rng: &mut Rng) {
        let replica = self.nodes[node].replica.clone();
        self.begins_with(node, &replica, rng);
    }

    fn begins_with(&mut self, node: usize, copy: &Copy, rng: &mut Rng) {
        let (homes, moving) = (&self.homes, &self.moving);
        let is_here = |lane: Lane| homes.get(&lane).copied().unwrap_or(0) == node;
        let lies_here = |lane: Lane, key: &[u8]| match moving.get(&lane).filter(|of| of.moved.contains(key)) {
            Some(of) => of.to == node,
            None => is_here(lane),
        };
        self.now.replace(lies_here, &copy.contents);
        self.nodes[node].evicted_keys = 0;
        let is_cluster = self.nodes.len() > 1;
        for connection in &mut self.connections {
            if is_cluster {
                let goes_here = |request: &Request| match request {
                    Request::Call(call) => is_here(Lane::of(call.keys[0].as_bytes())),
                    _ => false,
                };
                let waited = connection.requests.len();
                connection.requests.retain(|request| !goes_here(request) || rng.percent(50));
                // What was not on its way to this node follows the slots to the new one, and nobody notices.
                if waited > connection.requests.len() || rng.percent(30) {
                    connection.cut = true;
                    connection.answers.clear();
                }
            } else {
                (connection.cut, connection.touched) = (true, true);
                connection.requests.clear();
                connection.answers.clear();
            }
        }
        self.forget_former_parts(node, copy);
    }

    /// Removes all keys of a node.
    pub fn flush(&mut self, node: usize) {
        // FLUSHALL touches only keys that exist, so a WATCH on a missing key does not notice it.
        let there: Vec<Bytes> = self.contents(node).keys().cloned().collect();
        for key in there {
            self.now.remove(&key);
            self.touch(&key);
        }
    }

    pub fn delete_checkpoint(&mut self) {
        if self.now.remove(CHECKPOINT).is_some() {
            self.touch(CHECKPOINT);
        }
    }

    pub fn delete_entries(&mut self) {
        if self.now.remove(ENTRIES).is_some() {
            self.touch(ENTRIES);
        }
    }

    /// Removes the keys that have expired.
    pub fn expire(&mut self) -> Vec<RowId> {
        let expired = self.now.expire(self.time_ms);
        expired.iter().for_each(|key| self.touch(key));
        // Keys in the copies expire when the copies are read; removing them now has the same effect.
        for node in &mut self.nodes {
            node.saved.contents.expire(self.time_ms);
            node.replica.contents.expire(self.time_ms);
        }
        expired.iter().filter_map(|key| row_of(key)).collect()
    }

    /// Removes the key of some row.
    pub fn remove_some(&mut self, rng: &mut Rng) -> Option<RowId> {
        let keys: Vec<Bytes> = self.row_values().map(|(_, key, ..)| key.clone()).collect();
        let key = (!keys.is_empty()).then(|| rng.pick(&keys).clone())?;
        self.now.remove(&key);
        self.touch(&key);
        row_of(&key)
    }

    /// Counts a key that was evicted.
    pub fn counts_evicted(&mut self) {
        self.nodes[0].evicted_keys += 1;
    }

    /// Returns how many keys all nodes have evicted since they started.
    pub fn evicted_keys(&self) -> u64 {
        self.nodes.iter().map(|node| node.evicted_keys).sum()
    }

    // ---- of a cluster -----------------------------------------------------------------------------------------------

    pub fn count_nodes(&self) -> usize {
        self.nodes.len()
    }

    /// Whether a lane, or a part of it, lies on this node.
    pub fn is_at(&self, lane: Lane, node: usize) -> bool {
        !self.is_cluster() || self.home(lane) == node || self.moving.get(&lane).is_some_and(|of| of.to == node)
    }

    /// What marks say of lanes on this lane's node.
    pub fn home_of(&self, lane: Lane) -> Home {
        home_of_node(self.home(lane))
    }

    /// What marks say of lanes where they are now.
    pub fn homes(&self) -> BTreeMap<Lane, Home> {
        self.homes.keys().map(|lane| (*lane, self.home_of(*lane))).collect()
    }

    /// For traces.
    pub fn where_lanes_are(&self) -> String {
        let moving = self.moving.iter().map(|(lane, of)| format!("{lane} moves to {}: {:?}", of.to, of.moved));
        format!("{:?} {:?}", self.homes, moving.collect::<Vec<_>>())
    }

    /// Returns some lane, and a node to which it could move.
    fn other_home(&self, rng: &mut Rng) -> (Lane, usize) {
        let lanes: Vec<Lane> = self.homes.keys().copied().collect();
        let lane = *rng.pick(&lanes);
        let other = rng.below(self.nodes.len() as u64 - 1) as usize;
        (lane, if other < self.home(lane) { other } else { other + 1 })
    }

    /// Moves a lane to another node, all at once. `may_lack`: whether a lane may have lost keys while it was moved.
    pub fn moves_lane(&mut self, may_lack: impl Fn(Lane) -> bool, rng: &mut Rng) {
        let (lane, to) = self.other_home(rng);
        let would_hide_a_loss = may_lack(lane) && self.unnoticed.contains(&lane);
        if !self.is_moving(lane) && !would_hide_a_loss {
            self.has_moved(lane, to);
        }
    }

    fn has_moved(&mut self, lane: Lane, to: usize) {
        self.homes.insert(lane, to);
        self.moves += 1;
        self.moved_last.insert(lane, self.moves);
        self.unnoticed.insert(lane);
    }

    /// A daemon has written a lane, knowing where it is.
    pub fn is_noticed(&mut self, lane: Lane) {
        self.unnoticed.remove(&lane);
    }

    /// Begins to move the keys of a lane to another node.
    pub fn begins_move(&mut self, rng: &mut Rng) {
        let (lane, to) = self.other_home(rng);
        if !self.is_moving(lane) && !self.unnoticed.contains(&lane) {
            self.moving.insert(lane, Move { to, moved: BTreeSet::new() });
        }
    }

    /// Moves one more key, or ends the move of a lane that has no more.
    pub fn goes_on_moving(&mut self, rng: &mut Rng) {
        let lanes: Vec<Lane> = self.moving.keys().copied().collect();
        if lanes.is_empty() {
            return;
        }
        let lane = *rng.pick(&lanes);
        let of = self.moving.get_mut(&lane).expect("it is moving");
        let left: Vec<&Bytes> = self.now.keys_of(lane).filter(|key| !of.moved.contains(*key)).collect();
        if left.is_empty() {
            return self.ends_move(lane);
        }
        of.moved.insert((*rng.pick(&left)).clone());
    }

    fn ends_move(&mut self, lane: Lane) {
        if let Some(of) = self.moving.remove(&lane) {
            self.has_moved(lane, of.to);
        }
    }

    /// The keys of a lane that were moved go back, and it stays where it was.
    pub fn gives_up_move(&mut self, may_lack: impl Fn(Lane) -> bool, rng: &mut Rng) {
        let lanes: Vec<Lane> = self.moving.keys().copied().filter(|lane| !may_lack(*lane)).collect();
        if !lanes.is_empty() {
            self.moving.remove(rng.pick(&lanes));
        }
    }

    /// Returns a node that has only a part of the keys of a lane. If there is none, a move begins.
    pub fn some_node_of_moves(&mut self, rng: &mut Rng) -> Option<usize> {
        if self.moving.is_empty() {
            self.begins_move(rng);
        }
        if self.moving.values().all(|of| of.moved.is_empty()) {
            self.goes_on_moving(rng);
        }
        let parted = self.moving.iter().filter(|(_, of)| !of.moved.is_empty());
        let nodes: Vec<usize> = parted.flat_map(|(lane, of)| [self.home(*lane), of.to]).collect();
        (!nodes.is_empty()).then(|| *rng.pick(&nodes))
    }

    /// This node is about to lose something. Returns the lanes of which it has only a part. Nothing tells that the record
    /// has lost a part of itself, so its move ends first.
    pub fn parts_at(&mut self, node: usize) -> Vec<Lane> {
        let record = self.home_of_record();
        if self.is_at(record, node) {
            self.ends_move(record);
        }
        let is_parted = |lane: &Lane| self.moving.get(lane).is_some_and(|of| !of.moved.is_empty());
        // A copy of the node may be from the middle of a move that has ended.
        let has_moved = |lane: &Lane| {
            let mark = self.mark(*lane).and_then(|mark| Mark::read(mark).ok());
            mark.is_some_and(|mark| mark.home != Some(self.home_of(*lane)))
        };
        let lanes = self.homes.keys().copied().filter(|lane| self.is_at(*lane, node));
        lanes.filter(|lane| is_parted(lane) || has_moved(lane)).collect()
    }

    /// These lanes are moving back to a node on which they were complete, of which a copy from that time has come back: with a
    /// mark that says so, and other keys from another node. By then, what was confirmed shows that it is old; confirmations
    /// are rarer here than moves.
    pub fn forget_former_lives(&mut self, parts: &[Lane]) {
        for lane in parts {
            let to = self.moving.get(lane).map(|of| home_of_node(of.to));
            let mark = self.mark(*lane).and_then(|mark| Mark::read(mark).ok());
            if to.is_some() && mark.is_some_and(|mark| mark.home == to) {
                self.now.remove(tags::mark_key(*lane, SLOT).as_bytes());
            }
        }
    }

    /// The same of lanes that have come back since: the copy is from the middle of the move that took them away.
    fn forget_former_parts(&mut self, node: usize, copy: &Copy) {
        for (lane, then) in &copy.parted {
            let has_come_back = self.moved_last.get(lane) > Some(then) && self.home(*lane) == node;
            let mark = self.mark(*lane).and_then(|mark| Mark::read(mark).ok());
            if has_come_back && mark.is_some_and(|mark| mark.home == Some(home_of_node(node))) {
                self.now.remove(tags::mark_key(*lane, SLOT).as_bytes());
            }
        }
    }

    pub fn is_moving(&self, lane: Lane) -> bool {
        self.moving.contains_key(&lane)
    }

    /// Whether the record can be read.
    pub fn has_record(&self) -> bool {
        let keys = [CHECKPOINT, ENTRIES, LISTED];
        keys.iter().all(|key| self.redirects([*key]).is_none())
    }

    /// Whether a lane's mark says that it is complete where it is.
    pub fn is_complete(&self, lane: Lane) -> bool {
        let mark = self.mark(lane).and_then(|mark| Mark::read(mark).ok());
        let whole = self.now.text(CHECKPOINT).map_or(FIRST_WHOLE, |head| OfRecord::of(head).whole);
        let is_here = |mark: &Mark| mark.home == Some(self.home_of(lane)) && mark.whole >= whole;
        !self.is_moving(lane) && mark.as_ref().is_some_and(is_here)
    }

    /// Whether all lanes with rows say that.
    pub fn are_complete(&self) -> bool {
        let is_complete =
            |lane: &Lane| self.mark(*lane).is_none() || self.is_complete(*lane) || self.is_left_behind(*lane);
        self.moving.is_empty() && self.homes.keys().all(is_complete)
    }

    /// Whether a lane is not listed and has a mark, which a late call of an ended session has made. Nobody vouches for it until
    /// it is written again, or until the next takeover.
    pub fn is_left_behind(&self, lane: Lane) -> bool {
        self.left_behind.contains(&lane) && self.mark(lane).is_some() && !self.is_listed(lane)
    }

    fn is_listed(&self, lane: Lane) -> bool {
        Bitmap::new(self.now.text(LISTED).map(|lanes| &lanes[..])).lists(lane)
    }

    pub fn lanes(&self) -> impl Iterator<Item = Lane> + use<'_> {
        self.homes.keys().copied()
    }

    /// The greatest place of any mark.
    pub fn furthest(&self) -> Place {
        let marks = self.homes.keys().filter_map(|lane| Mark::read(self.mark(*lane)?).ok());
        let first = Place { at: crate::lsn::Lsn::FIRST, done: 0 };
        marks.map(|mark| mark.place).max().unwrap_or(first)
    }

    /// The position in the mark of a lane.
    pub fn place_of_lane(&self, lane: Lane) -> u64 {
        let mark = self.mark(lane).and_then(|mark| Mark::read(mark).ok());
        mark.map_or(0, |mark| mark.place.at.get())
    }

    /// Removes the mark of some lane. One that is not listed yet, between its first write and the record's, could not be
    /// missed. Returns the lane.
    pub fn delete_mark(&mut self, rng: &mut Rng) -> Option<Lane> {
        let listed = Bitmap::new(self.now.text(LISTED).map(|lanes| &lanes[..]));
        let is_missed = |lane: &Lane| self.mark(*lane).is_some() && listed.lists(*lane);
        let lanes: Vec<Lane> = self.homes.keys().copied().filter(is_missed).collect();
        let lane = (!lanes.is_empty()).then(|| *rng.pick(&lanes))?;
        self.now.remove(tags::mark_key(lane, SLOT).as_bytes());
        Some(lane)
    }

    /// Returns the marks of all lanes, for people.
    pub fn shown_marks(&self) -> String {
        let lanes = self.homes.keys().filter_map(|lane| Some((*lane, self.mark(*lane)?)));
        lanes.map(|(lane, mark)| format!(" {lane}: {}", mark.escape_ascii())).collect()
    }

    /// Returns the marks on a node. `None` if it does not have one of them any more.
    pub fn marks_at(&self, node: usize) -> Option<BTreeMap<Lane, Bytes>> {
        let lanes = || self.homes.keys().filter(|lane| self.home(**lane) == node);
        let is_here = |lane: &Lane| self.redirects([tags::mark_key(*lane, SLOT).as_bytes()]).is_none();
        let marks = || lanes().filter_map(|lane| Some((*lane, self.mark(*lane)?.clone())));
        lanes().all(is_here).then(|| marks().collect())
    }

    pub fn home_of_record(&self) -> Lane {
        Lane::of(CHECKPOINT)
    }

    pub fn mark(&self, lane: Lane) -> Option<&Bytes> {
        self.now.text(tags::mark_key(lane, SLOT).as_bytes())
    }

    /// Returns the record: its head, the tables' entries, and the listed lanes.
    pub fn record(&self) -> (Option<Bytes>, Vec<(Bytes, Bytes)>, Option<Bytes>) {
        let entries = self.now.hash(ENTRIES).cloned().unwrap_or_default();
        (self.now.text(CHECKPOINT).cloned(), entries.into_iter().collect(), self.now.text(LISTED).cloned())
    }

    /// Returns what the lane of each row holds, of those lanes that have all that the record says.
    pub fn places(&self, checkpoint: &Checkpoint, rows: impl Iterator<Item = (RowId, Lane)>) -> BTreeMap<RowId, Place> {
        let head = self.now.text(CHECKPOINT).cloned().unwrap_or_default();
        let listing = Listing::new(&head, self.now.text(LISTED).map(|lanes| &lanes[..]));
        let place = |lane: Lane| {
            let mark = self.mark(lane);
            listing.judge(lane, &Around { before: mark.cloned(), after: mark.cloned() }, None).ok()?;
            Some(mark.map_or(checkpoint.place(), |mark| Mark::read(mark).expect("a mark").place))
        };
        let mut of_lanes: BTreeMap<Lane, Option<Place>> = BTreeMap::new();
        rows.filter_map(|(row, lane)| Some((row, (*of_lanes.entry(lane).or_insert_with(|| place(lane)))?))).collect()
    }
}

/// Returns the fields of a row as a hash has them, whatever its format is.
fn fields_of(value: &Value) -> Option<Cow<'_, Hash>> {
    match value {
        Value::Hash(hash) => Some(Cow::Borrowed(hash)),
        Value::Text(document) => {
            let fields: BTreeMap<String, Option<String>> = serde_json::from_slice(document).ok()?;
            let field = |(name, value): (String, Option<String>)| (name.into(), value.unwrap_or_default().into());
            Some(Cow::Owned(fields.into_iter().map(field).collect()))
        }
        Value::Set(_) | Value::SortedSet(_) => None,
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

pub fn row_of(key: &[u8]) -> Option<RowId> {
    let text = std::str::from_utf8(key).ok()?;
    // Between them there may be a hash tag.
    let (table, id) = (text.split_once(':')?.0, text.rsplit_once(':')?.1);
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
