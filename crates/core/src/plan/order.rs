//! The order in which a batch changes keys, for the change stream: each key where it was changed last, and by which
//! transaction.

use crate::change::Begin;
use crate::command::Key;
use crate::schema::TableId;
use std::collections::{BTreeMap, HashMap};

#[derive(Debug, Default)]
pub struct Order {
    by: Option<Begin>,
    /// By place. Places are never used twice, so the order is that of the last changes.
    changed: BTreeMap<usize, Changed>,
    places: HashMap<Key, usize>,
    next: usize,
}

/// A key, or a table, and the transaction that changed it last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Changed {
    pub table: TableId,
    /// `None`: the table was truncated.
    pub key: Option<Key>,
    pub by: Begin,
}

impl Order {
    /// What changes until the next call is changed by this transaction.
    pub fn follows(&mut self, by: Begin) {
        self.by = Some(by);
    }

    pub fn changes(&mut self, table: TableId, key: &Key) {
        if let Some(before) = self.places.insert(key.clone(), self.next) {
            self.changed.remove(&before);
        }
        self.push(table, Some(key.clone()));
    }

    /// The table is empty, whatever was changed before.
    pub fn truncates(&mut self, table: TableId) {
        self.changed.retain(|_, changed| changed.table != table);
        self.places.retain(|_, place| self.changed.contains_key(place));
        self.push(table, None);
    }

    fn push(&mut self, table: TableId, key: Option<Key>) {
        let by = self.by.expect("a change belongs to a transaction");
        self.changed.insert(self.next, Changed { table, key, by });
        self.next += 1;
    }

    /// In the order of the last changes, which is that of their commits.
    pub fn into_changed(self) -> impl Iterator<Item = Changed> {
        self.changed.into_values()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::change::CommitTime;
    use crate::lsn::{CommitLsn, Lsn};

    fn by(xid: u32) -> Begin {
        let commit = CommitLsn(Lsn::new(u64::from(xid)).expect("not zero"));
        Begin { xid, commit, time: CommitTime(0) }
    }

    fn key(name: &str) -> Key {
        Key(bytes::Bytes::copy_from_slice(name.as_bytes()))
    }

    #[test]
    fn a_key_stands_where_it_was_changed_last() {
        let (mut order, [a, b]) = (Order::default(), [TableId(0), TableId(1)]);
        order.follows(by(1));
        order.changes(a, &key("a:1"));
        order.changes(b, &key("b:1"));
        order.changes(a, &key("a:2"));
        order.follows(by(2));
        order.truncates(b);
        order.changes(a, &key("a:1"));
        order.changes(b, &key("b:1"));
        let found: Vec<_> = order.into_changed().map(|c| (c.key.map(|key| key.to_string()), c.by.xid)).collect();
        let wanted = [(Some("a:2"), 1), (None, 2), (Some("a:1"), 2), (Some("b:1"), 2)];
        assert_eq!(found, wanted.map(|(key, xid)| (key.map(str::to_owned), xid)));
    }
}
