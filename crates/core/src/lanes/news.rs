//! What a batch changes in the record: what must be said before the lanes act on it, and what only afterwards.

use super::split::Split;
use crate::checkpoint::{Checkpoint, TableMark, TableState};
use bytes::Bytes;
use std::collections::BTreeMap;
use std::sync::Arc;

pub(super) type Tables = BTreeMap<String, TableMark>;

/// How a batch changes the record.
#[derive(Default)]
pub(super) struct News {
    /// The entries to write after the lanes.
    pub entries: Tables,
    /// The entries to write before them: those that may otherwise promise too much meanwhile.
    pub worse: Tables,
    /// Some promise is taken back.
    pub is_bad: bool,
    /// Something is promised that was not, and for which every lane must vouch.
    pub is_good: bool,
}

impl News {
    /// `old` and `tables` are what the record says. Small improvements are added to `withheld`, and written once
    /// `is_due` or together with others.
    pub fn of(
        split: &Split,
        next: &Checkpoint,
        old: Option<&Checkpoint>,
        tables: &Tables,
        withheld: &mut Tables,
        is_due: bool,
    ) -> Self {
        let entry = |(name, entry): (&Bytes, &Bytes)| {
            let name = String::from_utf8_lossy(name).into_owned();
            (name, TableMark::from_json(entry).expect("this process has encoded it"))
        };
        let mut entries: Tables = split.entries.iter().map(entry).collect();
        if split.replaces_entries {
            withheld.clear();
        }
        withheld.retain(|name, _| !entries.contains_key(name));
        let mut news = News {
            // A record of a dead letter explains why a key is missing.
            is_bad: split.dead.iter().any(|dead| dead.set.is_some()),
            // There may be keys of a retired template again.
            is_good: old.is_some_and(|old| old.retired.iter().any(|template| !next.retired.contains(template))),
            ..News::default()
        };
        news.is_good |= entries.iter().any(|(name, new)| match tables.get(name) {
            None => new.state.is_established(),
            Some(old) => new.promises_more_than(old) && !is_small(old, new),
        });
        if is_due || news.is_good {
            entries.append(withheld);
            news.is_good |=
                entries.iter().any(|(name, new)| tables.get(name).is_some_and(|old| new.promises_more_than(old)));
        }
        for (name, new) in entries {
            let Some(old) = tables.get(&name) else {
                if new.state == TableState::Healing {
                    // Without an entry, rows are shown as new as the record.
                    news.is_bad = true;
                    news.worse.insert(name.clone(), new.clone());
                }
                news.entries.insert(name, new);
                continue;
            };
            let worse = TableMark::worse(old, &new);
            if worse != *old {
                news.is_bad = true;
                news.worse.insert(name.clone(), worse.clone());
            }
            if !news.is_good && new.promises_more_than(old) {
                withheld.insert(name.clone(), new);
                news.entries.insert(name, worse);
            } else {
                news.entries.insert(name, new);
            }
        }
        news
    }

    /// What the record's entries are after the batch.
    pub fn tables_after(&self, before: &Arc<Tables>, replaces_entries: bool) -> Arc<Tables> {
        if self.entries.is_empty() && !replaces_entries {
            return before.clone();
        }
        let mut tables = if replaces_entries { Tables::new() } else { (**before).clone() };
        tables.extend(self.entries.clone());
        Arc::new(tables)
    }
}

/// Whether the record may go without this improvement for a while: nobody waits for it.
fn is_small(old: &TableMark, new: &TableMark) -> bool {
    let awaited =
        |mark: &TableMark| (mark.state, mark.blocked.is_some(), mark.more_dead_letters, mark.removed, mark.lookups_as);
    let is_same_shape = (&old.template, old.fingerprint) == (&new.template, new.fingerprint);
    awaited(old) == awaited(new) && is_same_shape && old.catalog == new.catalog
}
