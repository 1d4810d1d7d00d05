//! The members that a batch adds to lists and removes from them.

use super::{ListKind, Lookups, Memberships, Score, Values};
use crate::command::{Command, Key};
use bytes::Bytes;
use std::collections::{BTreeSet, HashMap};
use std::iter;

/// Members in one command, and bytes of their names: far less than any limit of Redis.
const MEMBERS_A_COMMAND: usize = 500;
const BYTES_A_COMMAND: usize = 64 << 10;

/// Whether members that a list should have already are added once more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Known {
    /// The row's memberships are those that its values gave before.
    Memberships,
    /// Some may be missing: a load or a sweep of the table is in progress.
    Nothing,
}

#[derive(Debug, Default)]
pub struct Changes {
    lists: HashMap<Key, List>,
}

#[derive(Debug)]
struct List {
    kind: ListKind,
    ttl_ms: u64,
    /// If a member comes twice, its last score counts, as in Redis.
    join: Vec<(Bytes, Option<Score>)>,
    leave: BTreeSet<Bytes>,
}

impl Changes {
    /// Whether the list at this key is changed.
    pub fn concerns(&self, list: &Key) -> bool {
        self.lists.contains_key(list)
    }

    /// The row at this key had the values `before`, and has `after`. `None` is no row.
    pub fn row(&mut self, of: &Lookups, row: &Key, before: Option<&Values>, after: Option<&Values>, known: Known) {
        if before == after && known == Known::Memberships {
            return;
        }
        let memberships = |values: Option<&Values>| values.map_or(Memberships::new(), |v| of.memberships(row, v));
        let (before, after) = (memberships(before), memberships(after));
        for list in before.keys().filter(|list| !after.contains_key(*list)) {
            self.leaves(of, list.clone(), of.member(row));
        }
        for (list, score) in after {
            if known == Known::Nothing || before.get(&list) != Some(&score) {
                self.joins(of, list, of.member(row), score);
            }
        }
    }

    /// The row at this key is new, or is as it was before.
    pub fn new_row(&mut self, of: &Lookups, row: &Key, values: &Values) {
        for (list, kind, score) in of.each_membership(row, values) {
            self.list(of, list, kind).join.push((of.member(row), score));
        }
    }

    pub fn joins(&mut self, of: &Lookups, list: Key, member: Bytes, score: Option<Score>) {
        let kind = kind(of, &list);
        self.list(of, list, kind).join.push((member, score));
    }

    pub fn leaves(&mut self, of: &Lookups, list: Key, member: Bytes) {
        let kind = kind(of, &list);
        self.list(of, list, kind).leave.insert(member);
    }

    fn list(&mut self, of: &Lookups, list: Key, kind: ListKind) -> &mut List {
        let new = || List { kind, ttl_ms: of.ttl_ms, join: Vec::new(), leave: BTreeSet::new() };
        self.lists.entry(list).or_insert_with(new)
    }

    /// Returns the commands. At the keys `other_type`, something lies that is no such list: it is removed first.
    pub fn into_commands(self, other_type: &BTreeSet<Key>) -> Vec<Command> {
        let mut commands: Vec<Command> = other_type.iter().map(|key| Command::Delete { key: key.clone() }).collect();
        let mut lists: Vec<(Key, List)> = self.lists.into_iter().collect();
        // So that the same changes produce the same bytes.
        lists.sort_unstable_by(|(a, _), (b, _)| a.cmp(b));
        for (key, List { kind, ttl_ms, join, leave }) in lists {
            if !other_type.contains(&key) {
                let some = in_parts(leave, Bytes::len).into_iter();
                commands.extend(some.map(|members| Command::Leave { key: key.clone(), kind, members }));
            }
            let some = in_parts(join, |(member, _)| member.len());
            let keys = iter::repeat_n(key, some.len());
            commands.extend(keys.zip(some).map(|(key, members)| Command::Join { key, members, ttl_ms }));
        }
        commands
    }
}

fn kind(of: &Lookups, list: &Key) -> ListKind {
    of.kind_at(list).expect("a membership is of one of the lookups")
}

/// Divides members so that each part fits into a command.
fn in_parts<T>(members: impl IntoIterator<Item = T>, len: impl Fn(&T) -> usize) -> Vec<Vec<T>> {
    let (mut parts, mut bytes) = (Vec::<Vec<T>>::new(), 0);
    for member in members {
        bytes += len(&member);
        match parts.last_mut().filter(|part| part.len() < MEMBERS_A_COMMAND && bytes <= BYTES_A_COMMAND) {
            Some(part) => part.push(member),
            None => {
                bytes = len(&member);
                parts.push(vec![member]);
            }
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::super::tests::spec;
    use super::*;
    use crate::schema::NullRule;

    fn key(text: &str) -> Key {
        Key(Bytes::copy_from_slice(text.as_bytes()))
    }

    fn values(cells: &[&str]) -> Option<Values> {
        Values::read(cells.iter().map(|cell| Some(Bytes::copy_from_slice(cell.as_bytes()))).collect())
    }

    fn shown(changes: Changes, other_type: &[&str]) -> Vec<String> {
        let commands = changes.into_commands(&other_type.iter().map(|text| key(text)).collect());
        let members =
            |members: &[Bytes]| members.iter().map(|m| m.escape_ascii().to_string()).collect::<Vec<_>>().join(",");
        let show = |command: &Command| match command {
            Command::Join { key, members, .. } => {
                let one = |(member, score): &(Bytes, Option<Score>)| {
                    format!("{}{}", member.escape_ascii(), score.map_or(String::new(), |score| format!("={score}")))
                };
                format!("{key} +{}", members.iter().map(one).collect::<Vec<_>>().join(","))
            }
            Command::Leave { key, members: gone, .. } => format!("{key} -{}", members(gone)),
            Command::Delete { key } => format!("{key} x"),
            other => panic!("{other:?}"),
        };
        commands.iter().map(show).collect()
    }

    #[test]
    fn only_what_differs_is_sent() {
        let of = Lookups::of(&spec("t:{id}", NullRule::Empty, &[("p:{parent_id}", Some("place")), ("all", None)]));
        let of = of.expect("lookups");
        let change = |before: Option<&[&str]>, after: Option<&[&str]>, known| {
            let mut changes = Changes::default();
            changes.row(&of, &key("t:1"), before.and_then(values).as_ref(), after.and_then(values).as_ref(), known);
            shown(changes, &[])
        };
        use Known::{Memberships, Nothing};
        let (a, same, moved, other) = (["1", "a", "7"], ["1", "a", "7"], ["1", "a", "8"], ["1", "b", "7"]);
        assert_eq!(change(None, Some(&a), Memberships), ["all +1", "p:a +1=7"]);
        assert_eq!(change(Some(&a), Some(&same), Memberships), [""; 0]);
        assert_eq!(change(Some(&a), Some(&same), Nothing), ["all +1", "p:a +1=7"]);
        assert_eq!(change(Some(&a), Some(&moved), Memberships), ["p:a +1=8"]);
        assert_eq!(change(Some(&a), Some(&other), Memberships), ["p:a -1", "p:b +1=7"]);
        assert_eq!(change(Some(&a), None, Memberships), ["all -1", "p:a -1"]);
        assert_eq!(change(None, None, Nothing), [""; 0]);
    }

    #[test]
    fn what_is_no_list_is_removed_first() {
        let of = Lookups::of(&spec("t:{id}", NullRule::Empty, &[("p:{parent_id}", None)])).expect("lookups");
        let mut changes = Changes::default();
        changes.row(&of, &key("t:1"), values(&["1", "a"]).as_ref(), values(&["1", "b"]).as_ref(), Known::Memberships);
        changes.row(&of, &key("t:2"), None, values(&["2", "b"]).as_ref(), Known::Memberships);
        assert_eq!(shown(changes, &["p:a", "p:b"]), ["p:a x", "p:b x", "p:b +1,2"]);
    }

    #[test]
    fn a_command_has_a_bounded_number_of_members() {
        let of = Lookups::of(&spec("t:{id}", NullRule::Empty, &[("all", None)])).expect("lookups");
        let mut changes = Changes::default();
        for n in 0..1200 {
            let row = key(&format!("t:{n}"));
            changes.row(&of, &row, None, values(&[&n.to_string()]).as_ref(), Known::Memberships);
        }
        assert_eq!(changes.into_commands(&BTreeSet::new()).len(), 3);
    }
}
