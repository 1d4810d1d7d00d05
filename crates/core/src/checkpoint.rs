//! The checkpoint: what lies in Redis beside the data, written in the same MULTI/EXEC, and what can be told from it
//! after anything at all has happened.
//!
//! It has two parts. The head is a small string that every batch writes. What it says of each table is an entry in a hash
//! beside it, and is written in the same MULTI/EXEC only when it has changed: neither a batch nor a read costs more for
//! more tables. The head says how many entries belong to it.
//!
//! The format is settled: fields may be added, none may change its meaning. Readers ignore what they do not know.

use crate::change::CommitTime;
use crate::lsn::{CommitLsn, EndLsn, Lsn};
use crate::schema::CatalogMark;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checkpoint {
    pub system_id: String,
    pub timeline: u32,
    pub database: String,
    /// Everything before it is in Redis, for every table that is `loaded`. Before there is a slot, the server's position.
    pub lsn: EndLsn,
    /// Rises with every start and takeover.
    pub epoch: u64,
    /// Rises with every batch, so that no two checkpoints are ever equal.
    pub seq: u64,
    /// A transaction over the atomic limits is half applied; `lsn` is the end of the one before.
    pub within: Option<Within>,
    /// The last applied transaction that changed anything, or marked that a chunk had been read. It must come by again
    /// where it ends beyond what the slot has confirmed; if it does not, Postgres went back.
    pub last: Option<LastTransaction>,
    /// When this was written: Redis TIME, milliseconds since the Unix epoch.
    pub beat_ms: u64,
    /// From here on this Redis has every change of the stream.
    pub base: EndLsn,
    /// Keys that Redis had removed to make room when this was written, or when the tables were last loaded because of it.
    pub evicted: u64,
    /// The publication that was made by prefetchd, which may therefore change and drop it.
    pub made_publication: Option<String>,
    /// Key templates of earlier configurations, of which keys may still lie in Redis.
    pub retired: Vec<String>,
    /// By the table's name in the configuration.
    pub tables: BTreeMap<String, TableMark>,
}

/// How far a transaction over the atomic limits has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Within {
    pub commit: CommitLsn,
    /// Changes of it that are in Redis, counted as delivered, whatever table they belong to.
    pub changes_done: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LastTransaction {
    pub end: EndLsn,
    pub xid: u32,
    pub time: CommitTime,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TableMark {
    /// The key template, as written: keys of an earlier one are orphans.
    pub template: String,
    /// Of the mapping that the hashes were written with. Changes when a load under a new mapping has ended.
    pub fingerprint: u64,
    /// What the catalog said when it was last read as a whole. `None` before the first load has ended.
    pub catalog: Option<CatalogMark>,
    pub state: TableState,
    /// Every row's TTL reaches at least until then: Redis TIME, milliseconds since the Unix epoch. `None` before the
    /// first load has ended.
    pub ttl_until_ms: Option<u64>,
    /// Some rows wait to be read again, and are as old as this; `None` where all are as new as the checkpoint.
    pub as_of: Option<EndLsn>,
    /// An operator removed keys, which stay away until the table is loaded or verified as a whole.
    pub removed: bool,
    /// When every row was last compared or loaded, and found or made right: Redis TIME, milliseconds since the Unix
    /// epoch, at the beginning of that.
    pub compared_ms: Option<u64>,
    /// The same, of verifications alone.
    pub verified_ms: Option<u64>,
    /// It cannot be followed. `state` says what may be thought of the rows that are there, which are of `as_of`.
    pub blocked: Option<Blocked>,
    /// Rows that Postgres has and Redis cannot hold, and whose keys are recorded beside the checkpoint.
    pub dead_letters: u64,
    /// There may be more of them, whose keys are not recorded: until the table has been loaded or repaired as a whole, a
    /// missing key means nothing.
    pub more_dead_letters: bool,
}

/// Why a table cannot be followed until a person has changed something.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Blocked {
    pub because: String,
    /// What that person is to do.
    pub remedy: String,
}

impl Blocked {
    /// Of a message as errors here are written: the fact, a colon, the remedy.
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

/// What a reader may think of a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TableState {
    /// Whole: a missing key is a row that does not exist.
    Loaded,
    /// Being filled. What is there is right, what is not there means nothing.
    Loading,
    /// Redis or Postgres lost something: what is there may be old.
    Healing,
    /// Some keys are waiting to be read again. What is there is right.
    Incomplete,
}

/// The replication slot, as `pg_replication_slots` shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SlotState {
    Absent,
    /// Postgres removed WAL that it needs, or gave it up for another reason. It can only be dropped.
    Invalidated {
        reason: String,
    },
    Ready {
        /// `confirmed_flush_lsn`: where the stream starts.
        confirmed: EndLsn,
        /// The walsender that holds it.
        active_pid: Option<i32>,
    },
}

/// The checkpoint in Redis is not one that this version can read.
#[derive(Debug, thiserror::Error)]
pub enum BadCheckpoint {
    #[error("malformed checkpoint: {0}")]
    Malformed(#[from] serde_json::Error),
    #[error("the checkpoint has {expected} tables, and entries of {found} are there")]
    Entries { expected: usize, found: usize },
}

impl Checkpoint {
    /// The head.
    pub fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(&json::Checkpoint::from(self)).expect("strings and numbers have a JSON form")
    }

    /// The entry of each table.
    pub fn entries(&self) -> impl Iterator<Item = (String, Vec<u8>)> {
        self.tables.iter().map(|(name, mark)| (name.clone(), mark.to_json()))
    }

    /// The head alone, without a table.
    ///
    /// # Errors
    /// Where it is not JSON of the settled format. Fields that are not known are ignored.
    pub fn head(json: &[u8]) -> Result<Self, BadCheckpoint> {
        Ok(serde_json::from_slice::<json::Checkpoint>(json)?.into())
    }

    /// Both parts. `entries`: by the names of the tables.
    ///
    /// # Errors
    /// As [`Self::head`], and where some entry is missing, or is one too many: then nothing is known of any table.
    pub fn read(head: &[u8], entries: &[(Bytes, Bytes)]) -> Result<Self, BadCheckpoint> {
        let head: json::Checkpoint = serde_json::from_slice(head)?;
        let (expected, found) = (head.entries, entries.len());
        if expected != found {
            return Err(BadCheckpoint::Entries { expected, found });
        }
        let mut checkpoint = Self::from(head);
        for (name, entry) in entries {
            let name = String::from_utf8_lossy(name).into_owned();
            checkpoint.tables.insert(name, TableMark::from_json(entry)?);
        }
        Ok(checkpoint)
    }

    pub fn made(&self, publication: &str) -> bool {
        self.made_publication.as_deref() == Some(publication)
    }

    /// When the verification of every table last succeeded: Redis TIME, milliseconds since the Unix epoch.
    pub fn verified_ms(&self) -> Option<u64> {
        self.tables.values().map(|mark| mark.verified_ms).min().flatten()
    }

    /// Whether a first start wrote it, and nothing was put into Redis since.
    pub fn is_blank(&self) -> bool {
        let is_untouched = (self.within, self.last) == (None, None) && self.lsn == self.base;
        is_untouched && self.tables.values().all(|table| table.state == TableState::Loading)
    }

    /// The state of the whole, for people and scripts that look at the key.
    fn state(&self) -> &'static str {
        let any = |state| self.tables.values().any(|t| t.state == state && t.blocked.is_none());
        match () {
            () if any(TableState::Healing) => "healing",
            () if any(TableState::Loading) => "loading",
            () if any(TableState::Incomplete) => "incomplete",
            () if self.tables.values().any(|t| t.blocked.is_some()) => "blocked",
            () => "ready",
        }
    }
}

impl TableMark {
    /// The entry.
    pub fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(&json::Table::from(self)).expect("strings and numbers have a JSON form")
    }

    /// # Errors
    /// As [`Checkpoint::head`].
    pub fn from_json(entry: &[u8]) -> Result<Self, BadCheckpoint> {
        Ok(serde_json::from_slice::<json::Table>(entry)?.into())
    }
}

/// The format. Short, since every batch writes the head and every read reads it: what has its usual value is left out.
mod json {
    use super::{BTreeMap, CommitLsn, CommitTime, Deserialize, EndLsn, Lsn, Serialize, TableState};
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
        last: Option<Last>,
        #[serde(default, skip_serializing_if = "is_zero")]
        evicted: u64,
        #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "name_or_flag")]
        made_publication: Option<String>,
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        retired: Vec<String>,
        /// How many tables have an entry.
        pub(super) entries: usize,
    }

    /// It was `true` once. Which publication that was is not known: it is treated as somebody else's.
    fn name_or_flag<'de, D: Deserializer<'de>>(d: D) -> Result<Option<String>, D::Error> {
        Ok(serde_json::Value::deserialize(d)?.as_str().map(str::to_owned))
    }

    fn is_zero(n: &u64) -> bool {
        *n == 0
    }

    #[derive(Serialize, Deserialize)]
    struct Within {
        #[serde(with = "lsn")]
        commit: Lsn,
        changes_done: u64,
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
        /// Hexadecimal: not every JSON reader keeps 64 bits.
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
                within: c.within.map(|w| Within { commit: w.commit.0, changes_done: w.changes_done }),
                last: c.last.map(|l| Last { end: l.end.0, xid: l.xid, time_us: l.time.0 }),
                evicted: c.evicted,
                made_publication: c.made_publication.clone(),
                retired: c.retired.clone(),
                entries: c.tables.len(),
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
                ttl_until_ms: mark.ttl_until_ms,
                as_of: mark.as_of.map(|lsn| lsn.to_string()),
                removed: mark.removed,
                compared_ms: mark.compared_ms,
                verified_ms: mark.verified_ms,
                blocked: mark.blocked.clone().map(|b| Blocked { because: b.because, remedy: b.remedy }),
                dead_letters: mark.dead_letters,
                more_dead_letters: mark.more_dead_letters,
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
                // One that cannot be read is one that does not match.
                catalog: t.catalog.and_then(|c| c.parse().ok()),
                ttl_until_ms: t.ttl_until_ms,
                // One that cannot be read is as old as can be.
                as_of: t.as_of.map(|lsn| EndLsn(lsn.parse().unwrap_or(Lsn::FIRST))),
                removed: t.removed,
                compared_ms: t.compared_ms,
                verified_ms: t.verified_ms,
                blocked: t.blocked.map(|b| super::Blocked { because: b.because, remedy: b.remedy }),
                dead_letters: t.dead_letters,
                more_dead_letters: t.more_dead_letters,
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
                within: c.within.map(|w| super::Within { commit: CommitLsn(w.commit), changes_done: w.changes_done }),
                last: c.last.map(|l| super::LastTransaction {
                    end: EndLsn(l.end),
                    xid: l.xid,
                    time: CommitTime(l.time_us),
                }),
                beat_ms: c.beat_ms,
                base: EndLsn(c.base),
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
        let missing = (prop::option::of(lsns()), any::<(bool, u64, bool)>());
        let blocked = prop::option::of((".{1,20}", ".{0,20}"));
        (".{1,20}", any::<u64>(), catalog, states, times, missing, blocked).prop_map(
            |(template, fingerprint, catalog, state, times, missing, blocked)| {
                let (as_of, (removed, dead_letters, more_dead_letters)) = missing;
                let (ttl_until_ms, compared_ms, verified_ms) = times;
                TableMark {
                    template,
                    fingerprint,
                    catalog,
                    state,
                    ttl_until_ms,
                    as_of: as_of.map(EndLsn),
                    removed,
                    compared_ms,
                    verified_ms,
                    blocked: blocked.map(|(because, remedy)| Blocked { because, remedy }),
                    dead_letters,
                    more_dead_letters,
                }
            },
        )
    }

    fn checkpoints() -> impl Strategy<Value = Checkpoint> {
        let place = ("[0-9]{19}", any::<u32>(), ".{0,12}", lsns(), lsns());
        let numbers = (any::<u64>(), any::<u64>(), any::<u64>(), any::<u64>());
        let within = prop::option::of((lsns(), any::<u64>()));
        let last = prop::option::of((lsns(), any::<u32>(), any::<i64>()));
        let texts = (prop::collection::vec(".{1,20}", 0..3), prop::option::of(".{1,9}"));
        let tables = prop::collection::btree_map("[a-z]{1,9}", marks(), 0..4);
        (place, numbers, within, last, texts, tables).prop_map(|(place, numbers, within, last, texts, tables)| {
            Checkpoint {
                system_id: place.0,
                timeline: place.1,
                database: place.2,
                lsn: EndLsn(place.3),
                epoch: numbers.0,
                seq: numbers.1,
                within: within.map(|(commit, changes_done)| Within { commit: CommitLsn(commit), changes_done }),
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
            let head = Checkpoint { tables: BTreeMap::new(), ..checkpoint };
            prop_assert_eq!(Checkpoint::head(&head.to_json()).expect("it was written by us"), head);
        }

        #[test]
        fn garbage_is_an_error_and_no_panic(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            prop_assert!(Checkpoint::head(&bytes).is_err() && TableMark::from_json(&bytes).is_err());
        }
    }

    fn entries(checkpoint: &Checkpoint) -> Vec<(Bytes, Bytes)> {
        checkpoint.entries().map(|(name, entry)| (name.into(), entry.into())).collect()
    }

    /// The settled format, literally: what an earlier version wrote must stay readable.
    const HEAD: &str = r#"{"system_id":"7301234567890123456","timeline":1,"database":"shop","lsn":"0/1A2B3C","state":"blocked","epoch":3,"seq":17,"beat_ms":1767225600000,"base":"0/1A0000","within":{"commit":"0/1A2B40","changes_done":20000},"last":{"end":"0/1A2B3C","xid":741,"time_us":1767225599000000},"evicted":7,"made_publication":"prefetchd","retired":["old:{id}"],"entries":1}"#;
    const ENTRY: &str = r#"{"template":"cache:category:{id}","fingerprint":"00000000000000ff","state":"incomplete","catalog":"00000000000000aa:0000000000000bbb","ttl_until_ms":1767312000000,"as_of":"0/1A2B00","removed":true,"compared_ms":1767225500000,"verified_ms":1767225400000,"blocked":{"because":"a fact","remedy":"a remedy"},"dead_letters":2,"more_dead_letters":true}"#;

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
    fn a_field_of_a_later_version_is_ignored() {
        let later = |json: &str| Bytes::from(json.replacen('{', r#"{"later":[1],"#, 1));
        let entries = vec![("categories".into(), later(ENTRY))];
        assert_eq!(
            Checkpoint::read(&later(HEAD), &entries).expect("still readable"),
            Checkpoint::read(HEAD.as_bytes(), &written()).expect("the settled format")
        );
    }
}
