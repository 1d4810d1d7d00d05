//! The keys of a small Redis, the commands of batches, and the script that writes a lane.

use crate::command::Key;
use crate::format::Format;
use crate::lanes::Lane;
use crate::lanes::script::Call;
use crate::lookups::questions::{Answers, Fits, Held, Page, Questions};
use crate::lookups::{Fields, ListKind, Score};
use crate::rules::{Rule, holds};
use crate::sim::announced::{self, CHANGES};
use bytes::Bytes;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;

pub type Hash = BTreeMap<Bytes, Bytes>;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value {
    Text(Bytes),
    Hash(Hash),
    Set(BTreeSet<Bytes>),
    SortedSet(BTreeMap<Bytes, Score>),
}

impl Value {
    /// `None` if it is neither a set nor a sorted set.
    pub fn members(&self) -> Option<BTreeMap<Bytes, Option<Score>>> {
        match self {
            Value::Set(set) => Some(set.iter().map(|member| (member.clone(), None)).collect()),
            Value::SortedSet(set) => Some(set.iter().map(|(member, score)| (member.clone(), Some(*score))).collect()),
            Value::Text(_) | Value::Hash(_) => None,
        }
    }

    fn fits(&self, kind: ListKind) -> bool {
        matches!((self, kind), (Value::Set(_), ListKind::Set) | (Value::SortedSet(_), ListKind::SortedSet))
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    lane: Lane,
    value: Value,
    /// When it expires, by Redis's clock; `None` for never.
    until_ms: Option<u64>,
}

/// What the script answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Called {
    Done,
    /// Another mark was found, and nothing was done.
    Other(Bytes),
    /// A command failed.
    Failed,
}

/// The keys of one server, or of all nodes of a cluster.
#[derive(Debug, Clone, Default)]
pub struct Store {
    keys: BTreeMap<Bytes, Entry>,
}

impl Store {
    pub fn get(&self, key: &[u8]) -> Option<&Value> {
        self.keys.get(key).map(|entry| &entry.value)
    }

    /// Returns `None` if there is no such string.
    pub fn text(&self, key: &[u8]) -> Option<&Bytes> {
        match self.get(key)? {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    /// Returns `None` if there is no such hash.
    pub fn hash(&self, key: &[u8]) -> Option<&Hash> {
        match self.get(key)? {
            Value::Hash(hash) => Some(hash),
            _ => None,
        }
    }

    /// Returns everything whose keys begin with `prefix`, and when it expires.
    pub fn values<'a>(&'a self, prefix: &'a [u8]) -> impl Iterator<Item = (&'a Bytes, &'a Value, Option<u64>)> {
        let from = self.keys.range::<[u8], _>((Bound::Included(prefix), Bound::Unbounded));
        from.take_while(move |(key, _)| key.starts_with(prefix)).map(|(key, entry)| (key, &entry.value, entry.until_ms))
    }

    /// Returns the hashes whose keys begin with `prefix`, and when they expire.
    pub fn hashes<'a>(&'a self, prefix: &'a [u8]) -> impl Iterator<Item = (&'a Bytes, &'a Hash, Option<u64>)> {
        self.values(prefix).filter_map(|(key, value, until_ms)| match value {
            Value::Hash(hash) => Some((key, hash, until_ms)),
            _ => None,
        })
    }

    pub fn keys_under<'a>(&'a self, prefix: &'a [u8]) -> impl Iterator<Item = &'a Bytes> {
        let from = self.keys.range::<[u8], _>((Bound::Included(prefix), Bound::Unbounded));
        from.map(|(key, _)| key).take_while(move |key| key.starts_with(prefix))
    }

    /// Returns the sets and sorted sets, with their members and scores, and when they expire.
    pub fn lists(&self) -> impl Iterator<Item = (&Bytes, BTreeMap<Bytes, Option<Score>>, Option<u64>)> {
        self.keys.iter().filter_map(|(key, entry)| Some((key, entry.value.members()?, entry.until_ms)))
    }

    pub fn keys(&self) -> impl Iterator<Item = &Bytes> {
        self.keys.keys()
    }

    pub fn keys_of(&self, lane: Lane) -> impl Iterator<Item = &Bytes> {
        self.keys.iter().filter(move |(_, entry)| entry.lane == lane).map(|(key, _)| key)
    }

    pub fn set(&mut self, key: Bytes, value: Value) {
        let lane = Lane::of(&key);
        self.keys.insert(key, Entry { lane, value, until_ms: None });
    }

    pub fn remove(&mut self, key: &[u8]) -> Option<Value> {
        self.keys.remove(key).map(|entry| entry.value)
    }

    /// Removes the keys that have expired, and returns them.
    pub fn expire(&mut self, now_ms: u64) -> Vec<Bytes> {
        let is_over = |entry: &Entry| entry.until_ms.is_some_and(|until| until <= now_ms);
        let expired: Vec<Bytes> =
            self.keys.iter().filter(|(_, entry)| is_over(entry)).map(|(key, _)| key.clone()).collect();
        expired.iter().for_each(|key| _ = self.keys.remove(key));
        expired
    }

    // ---- lookups ----------------------------------------------------------------------------------------------------

    /// Whether a list of this kind, or nothing, lies at a key.
    pub fn fits(&self, key: &[u8], kind: ListKind) -> bool {
        self.get(key).is_none_or(|value| value.fits(kind))
    }

    /// Returns the values of a row's fields.
    pub fn values_of_row(&self, row: &[u8], fields: &Fields) -> Vec<Option<Bytes>> {
        match (fields.format, self.get(row)) {
            (Format::Hash, Some(Value::Hash(hash))) => {
                fields.names.iter().map(|name| hash.get(name).cloned()).collect()
            }
            (Format::Json, Some(Value::Text(document))) => fields.in_document(document),
            _ => vec![None; fields.names.len()],
        }
    }

    /// `page`: how many members are returned at once.
    pub fn inspect(&self, questions: &Questions, page: usize) -> Answers {
        let list = |key: &[u8], kind: ListKind| match self.get(key) {
            None => Some(BTreeMap::new()),
            Some(value) => value.members().filter(|_| value.fits(kind)),
        };
        match questions {
            Questions::Rows(rows) => {
                Answers::Rows(rows.iter().map(|(key, fields)| self.values_of_row(key.as_bytes(), fields)).collect())
            }
            Questions::Lists(lists) => {
                let fits = |(key, kind): &(Key, ListKind)| match self.fits(key.as_bytes(), *kind) {
                    true => Fits::Yes,
                    false => Fits::OtherType,
                };
                Answers::Lists(lists.iter().map(fits).collect())
            }
            Questions::Members(lists) => {
                let members = |(key, kind, cursor): &(Key, ListKind, u64)| {
                    let Some(members) = list(key.as_bytes(), *kind) else { return Page::OtherType };
                    // The names of the rows are numbers, so that a cursor can say where to go on, whatever was removed.
                    let place =
                        |member: &Bytes| std::str::from_utf8(member).ok().and_then(|m| m.parse().ok()).unwrap_or(0);
                    let mut rest: Vec<_> =
                        members.into_iter().filter(|(member, _)| place(member) + 1 >= *cursor).collect();
                    rest.sort_by_key(|(member, _)| place(member));
                    let next = rest.get(page).map_or(0, |(member, _)| place(member) + 1);
                    rest.truncate(page);
                    Page::Members(rest, next)
                };
                Answers::Members(lists.iter().map(members).collect())
            }
            Questions::Held(members) => {
                let held = |(key, kind, member): &(Key, ListKind, Bytes)| match list(key.as_bytes(), *kind) {
                    Some(members) => members.get(member).map_or(Held::No, |score| Held::Yes(*score)),
                    None => Held::OtherType,
                };
                Answers::Held(members.iter().map(held).collect())
            }
        }
    }

    // ---- lanes ------------------------------------------------------------------------------------------------------

    /// Returns a copy of these keys.
    pub fn part(&self, is_in: impl Fn(Lane, &[u8]) -> bool) -> Store {
        let keys = self.keys.iter().filter(|(key, entry)| is_in(entry.lane, key));
        Store { keys: keys.map(|(key, entry)| (key.clone(), entry.clone())).collect() }
    }

    /// Replaces these keys by those of them that `by` has.
    pub fn replace(&mut self, is_in: impl Fn(Lane, &[u8]) -> bool, by: &Store) {
        self.keys.retain(|key, entry| !is_in(entry.lane, key));
        let keys = by.keys.iter().filter(|(key, entry)| is_in(entry.lane, key));
        self.keys.extend(keys.map(|(key, entry)| (key.clone(), entry.clone())));
    }

    // ---- commands ---------------------------------------------------------------------------------------------------

    /// Performs one command: its name, its key, and further arguments.
    ///
    /// # Errors
    /// If Redis would refuse it; nothing is done then.
    pub fn perform(&mut self, words: &[Bytes], now_ms: u64) -> Result<(), String> {
        let malformed = || format!("not a command of ours: {words:?}");
        let [name, key, arguments @ ..] = words else { return Err(malformed()) };
        match (&name[..], arguments) {
            (b"XADD", arguments) if &key[..] == CHANGES => {
                let known = self.keys.entry(key.clone()).or_insert_with(|| Entry {
                    lane: Lane::of(key),
                    value: Value::Hash(Hash::new()),
                    until_ms: None,
                });
                let Value::Hash(known) = &mut known.value else { return Err(format!("WRONGTYPE {key:?}")) };
                announced::tell(known, arguments).ok_or_else(malformed)?;
            }
            // Nothing reads the dead letters.
            (b"XADD", _) => {}
            (b"SET", [value]) => self.set(key.clone(), Value::Text(value.clone())),
            (b"SET", [value, px, ttl_ms]) if &px[..] == b"PX" => {
                self.set(key.clone(), Value::Text(value.clone()));
                self.perform(&[Bytes::from_static(b"PEXPIRE"), key.clone(), ttl_ms.clone()], now_ms)?;
            }
            (b"DEL", []) => _ = self.remove(key),
            (b"HSET", pairs) if !pairs.is_empty() && pairs.len().is_multiple_of(2) => {
                let Value::Hash(hash) = self.value(key, || Value::Hash(Hash::new())) else {
                    return Err(format!("WRONGTYPE {key:?}"));
                };
                hash.extend(pairs.chunks(2).map(|pair| (pair[0].clone(), pair[1].clone())));
            }
            (b"HDEL", [field]) => {
                if let Some(Entry { value: Value::Hash(hash), .. }) = self.keys.get_mut(key) {
                    hash.remove(field);
                    if hash.is_empty() {
                        self.keys.remove(key);
                    }
                }
            }
            (b"SADD", members) if !members.is_empty() => {
                let Value::Set(set) = self.value(key, || Value::Set(BTreeSet::new())) else {
                    return Err(format!("WRONGTYPE {key:?}"));
                };
                set.extend(members.iter().cloned());
            }
            (b"ZADD", pairs) if !pairs.is_empty() && pairs.len().is_multiple_of(2) => {
                let Value::SortedSet(set) = self.value(key, || Value::SortedSet(BTreeMap::new())) else {
                    return Err(format!("WRONGTYPE {key:?}"));
                };
                for pair in pairs.chunks(2) {
                    set.insert(pair[1].clone(), Score::read(&pair[0]).ok_or_else(malformed)?);
                }
            }
            (b"SREM" | b"ZREM", members) if !members.is_empty() => {
                let Some(entry) = self.keys.get_mut(key) else { return Ok(()) };
                let is_empty = match (&mut entry.value, &name[..]) {
                    (Value::Set(set), b"SREM") => {
                        members.iter().for_each(|member| _ = set.remove(member));
                        set.is_empty()
                    }
                    (Value::SortedSet(set), b"ZREM") => {
                        members.iter().for_each(|member| _ = set.remove(member));
                        set.is_empty()
                    }
                    _ => return Err(format!("WRONGTYPE {key:?}")),
                };
                if is_empty {
                    self.keys.remove(key);
                }
            }
            (b"PEXPIRE", [ttl_ms]) => {
                let ttl_ms: u64 =
                    std::str::from_utf8(ttl_ms).ok().and_then(|t| t.parse().ok()).ok_or_else(malformed)?;
                if let Some(entry) = self.keys.get_mut(key) {
                    entry.until_ms = Some(now_ms + ttl_ms);
                }
            }
            (b"COPY", [to, replace]) if &replace[..] == b"REPLACE" => {
                if let Some(entry) = self.keys.get(key).cloned() {
                    self.keys.insert(to.clone(), Entry { lane: Lane::of(to), ..entry });
                }
            }
            (b"RENAME", [to]) => {
                let entry = self.keys.remove(key).ok_or("an error inside EXEC: RENAME, no such key")?;
                self.keys.insert(to.clone(), Entry { lane: Lane::of(to), ..entry });
            }
            _ => return Err(malformed()),
        }
        Ok(())
    }

    /// Returns the value at a key, which is `new` if there is none.
    fn value(&mut self, key: &Bytes, new: impl Fn() -> Value) -> &mut Value {
        let new = || Entry { lane: Lane::of(key), value: new(), until_ms: None };
        &mut self.keys.entry(key.clone()).or_insert_with(new).value
    }

    /// Does what [`SCRIPT`](crate::lanes::script::SCRIPT) does.
    pub fn call(&mut self, call: &Call, now_ms: u64) -> Called {
        let mark = &call.keys[0];
        let lane = Lane::of(mark.as_bytes());
        assert!(call.keys.iter().all(|key| Lane::of(key.as_bytes()) == lane), "one slot");
        assert!(call.lane.is_none_or(|of| of == lane));
        let found = self.text(mark.as_bytes()).cloned().unwrap_or_default();
        if found != call.expected && holds(Rule::CompareMarks) {
            return Called::Other(found);
        }
        let words = call.words();
        let (questions, commands) = words.split_at(words.iter().take_while(|words| words[0].starts_with(b"=")).count());
        assert!(
            questions.is_empty() || call.if_failed.is_empty(),
            "an answer that was not expected leaves nothing done"
        );
        if !questions.iter().all(|words| self.finds(words)) {
            return Called::Failed;
        }
        // The others still run.
        let failed = commands.iter().filter(|words| !self.calls(words, now_ms)).count() > 0;
        let mark_after = match failed {
            false => &call.new,
            true if call.if_failed.is_empty() => &call.expected,
            true => &call.if_failed,
        };
        match mark_after.is_empty() {
            true => _ = self.remove(mark.as_bytes()),
            false => self.set(mark.0.clone(), Value::Text(mark_after.clone())),
        }
        if failed { Called::Failed } else { Called::Done }
    }

    /// Whether a command answers with its last argument.
    fn finds(&self, words: &[Bytes]) -> bool {
        let [name, key, field, expected] = words else { panic!("not a question of ours: {words:?}") };
        assert_eq!(&name[..], b"=HGET");
        self.hash(key).and_then(|hash| hash.get(field)) == Some(expected)
    }

    /// Performs a command of the script, and returns whether it succeeded.
    fn calls(&mut self, words: &[Bytes], now_ms: u64) -> bool {
        let Some(name) = words[0].strip_prefix(b"?") else {
            let done = self.perform(words, now_ms);
            let is_other_type = |error: &String| error.starts_with("WRONGTYPE");
            assert!(done.as_ref().err().is_none_or(is_other_type), "{done:?}");
            return done.is_ok();
        };
        if self.hash(&words[1]).is_none() {
            return false;
        }
        let mut plain = words.to_vec();
        plain[0] = Bytes::copy_from_slice(name);
        self.perform(&plain, now_ms).unwrap_or_else(|error| panic!("{error}"));
        true
    }
}
