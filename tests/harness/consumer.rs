//! A consumer of the change stream: checks that nothing is announced twice or in another order, and knows what was said last
//! about each key.

use super::traffic::patient;
use prefetchd::lsn::Lsn;
use std::collections::{BTreeMap, BTreeSet, HashMap};

pub type Entry = HashMap<String, String>;

/// Forgets a table when it is told to.
#[derive(Default)]
pub struct Consumer {
    /// The last entry about each key of each table.
    pub last: BTreeMap<String, BTreeMap<String, Entry>>,
    /// The last entry that says that a table was loaded.
    pub loaded: BTreeMap<String, Entry>,
    pub seen: BTreeSet<(Lsn, String)>,
    /// Rows with large values may have to be read again, and are then announced later than others.
    may_be_late: bool,
    newest: Option<Lsn>,
    newest_of: HashMap<String, Lsn>,
    /// The last entry that was read.
    id: Option<String>,
}

impl Consumer {
    pub fn of_large_rows() -> Self {
        Self { may_be_late: true, ..Self::default() }
    }

    /// Takes what has been announced since the last call.
    pub async fn follow(&mut self, url: &str, stream: &str) {
        let mut connection = patient(url).await.unwrap();
        loop {
            let after = self.id.as_ref().map_or("-".to_owned(), |id| format!("({id}"));
            let mut range = redis::cmd("XRANGE");
            range.arg(stream).arg(after).arg("+").arg("COUNT").arg(5_000);
            let entries: Vec<(String, Entry)> = range.query_async(&mut connection).await.unwrap();
            let Some((last, _)) = entries.last() else { return };
            self.id = Some(last.clone());
            entries.into_iter().for_each(|(_, entry)| self.takes(entry));
        }
    }

    pub fn takes(&mut self, entry: Entry) {
        let table = entry["table"].clone();
        let Some(lsn) = entry.get("lsn").map(|lsn| lsn.parse::<Lsn>().unwrap()) else {
            assert_eq!(entry["op"], "loaded");
            self.last.remove(&table);
            self.loaded.insert(table, entry);
            return;
        };
        let key = entry.get("key").cloned().unwrap_or_default();
        let before = self.newest_of.insert(key.clone(), lsn);
        let before = if self.may_be_late { before } else { self.newest };
        assert!(before <= Some(lsn), "announced in another order: {entry:?} after {before:?}");
        self.newest = self.newest.max(Some(lsn));
        assert!(self.seen.insert((lsn, format!("{table} {key}"))), "announced twice: {entry:?}");
        if entry["op"] == "truncate" {
            self.last.remove(&table);
        } else {
            self.last.entry(table).or_default().insert(key, entry);
        }
    }
}
