//! Divides the commands of a batch among the lanes of their keys, and the record.

use super::Lane;
use super::script::Part;
use crate::lsn::Lsn;
use crate::resp::batch::OwnKeys;
use crate::resp::{Token, token};
use bytes::Bytes;
use std::collections::BTreeMap;

/// The commands of a batch.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Split {
    pub lanes: BTreeMap<Lane, Part>,
    /// For each lane that is ahead, how long the rows that were to be written to it are to live.
    pub renewals: BTreeMap<Lane, Part>,
    /// Whether all entries are replaced.
    pub replaces_entries: bool,
    /// The tables' entries by name.
    pub entries: BTreeMap<Bytes, Bytes>,
    /// Records of dead letters that are written or removed, in order.
    pub dead: Vec<Dead>,
}

/// A record of a dead letter. All of them lie in the hash slot of the record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dead {
    /// The hash that it is in.
    pub hash: Bytes,
    /// The key of the row.
    pub row: Bytes,
    /// `None`: it is removed.
    pub set: Option<Bytes>,
}

/// `body` is what [`Batch`](crate::resp::batch::Batch) has encoded.
///
/// A command of a merge gets the prefix `?`: it needs a hash, and must not create one.
pub fn split(body: &[u8], own: &OwnKeys) -> Split {
    split_after(BTreeMap::new(), body, own, None, |_| false)
}

/// As [`split`]. `first` are commands that lanes get before those of the batch. `announced`: the change stream has the entries
/// of transactions that commit before that. Unlike states, they must not be written again.
pub fn split_after(
    first: BTreeMap<Lane, Part>,
    body: &[u8],
    own: &OwnKeys,
    announced: Option<Lsn>,
    is_ahead: impl Fn(Lane) -> bool,
) -> Split {
    let mut split = Split { lanes: first, ..Split::default() };
    let (mut rest, mut arguments) = (body, Vec::new());
    // The key that the command before has deleted.
    let mut deleted: &[u8] = &[];
    while !rest.is_empty() {
        rest = command(rest, &mut arguments);
        let [name, key, ..] = arguments[..] else { panic!("a command has a name and a key") };
        let after_key = &arguments[2..];
        if !key.starts_with(own.prefix().as_bytes()) {
            debug_assert!(!matches!(name, b"RENAME" | b"COPY"), "a row and its copy are in different hash slots");
            let lane = Lane::of(key);
            let is_entry = || own.changes().is_some_and(|stream| stream.key.as_bytes() == key);
            if name == b"XADD" && is_entry() && commits_at(after_key).is_some_and(|lsn| Some(lsn) < announced) {
                continue;
            }
            if matches!(name, b"SADD" | b"ZADD" | b"SREM" | b"ZREM") && is_ahead(lane) {
                // What is only removed must be seen to be that.
                continue;
            }
            if let (b"RESTORE" | b"PEXPIRE", [ttl, ..]) | (b"SET", [_, b"PX", ttl]) = (name, after_key)
                && is_ahead(lane)
            {
                split.renewals.entry(lane).or_default().push(b"PEXPIRE", key, [*ttl].into_iter());
            }
            let part = split.lanes.entry(lane).or_default();
            match (name, after_key) {
                (b"RESTORE", [ttl, payload, b"REPLACE"]) => part.restore(key, ttl, payload),
                (b"HSET" | b"HDEL", _) if deleted != key => {
                    part.push(&[b"?", name].concat(), key, after_key.iter().copied());
                }
                _ => part.push(name, key, after_key.iter().copied()),
            }
        } else if !split.takes_own(name, key, after_key, own) {
            split.lanes.entry(Lane::of(key)).or_default().push(name, key, after_key.iter().copied());
        }
        deleted = if name == b"DEL" { key } else { &[] };
    }
    split
}

impl Split {
    /// Takes a command for the record; returns `false` if it is not.
    fn takes_own(&mut self, name: &[u8], key: &[u8], arguments: &[&[u8]], own: &OwnKeys) -> bool {
        if key == own.tables().as_bytes() {
            match (name, arguments) {
                (b"DEL", []) => {
                    self.replaces_entries = true;
                    self.entries.clear();
                }
                (b"HSET", [table, entry]) => {
                    self.entries.insert(Bytes::copy_from_slice(table), Bytes::copy_from_slice(entry));
                }
                _ => panic!("entries are replaced or set"),
            }
            return true;
        }
        let set = match (name, arguments) {
            (b"HSET", [_, record]) => Some(Bytes::copy_from_slice(record)),
            (b"HDEL", [_]) => None,
            _ => return false,
        };
        let [hash, row] = [key, arguments[0]].map(Bytes::copy_from_slice);
        self.dead.push(Dead { hash, row, set });
        true
    }
}

/// Returns where the transaction commits that an entry of the change stream is about.
fn commits_at(entry: &[&[u8]]) -> Option<Lsn> {
    let fields = &entry[entry.iter().position(|argument| *argument == b"*")? + 1..];
    let lsn = fields.chunks(2).find(|field| field[0] == b"lsn")?.get(1)?;
    std::str::from_utf8(lsn).ok()?.parse().ok()
}

/// Reads the first command into `arguments`, its name included, and returns what follows.
fn command<'a>(body: &'a [u8], arguments: &mut Vec<&'a [u8]>) -> &'a [u8] {
    let mut rest = body;
    let mut next = || {
        let (token, len) = token(rest).ok().flatten().expect("a batch is well-formed");
        rest = &rest[len..];
        token
    };
    arguments.clear();
    let Token::Array(count) = next() else { panic!("a batch consists of commands") };
    for _ in 0..count {
        let Token::Bulk(argument) = next() else { panic!("a command consists of strings") };
        arguments.push(argument);
    }
    rest
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::{Command, DeadKey, DeadLetter, Key};
    use crate::lanes::script::Call;
    use crate::resp;
    use crate::resp::batch::{Batch, Limits};
    use bytes::BytesMut;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn own() -> OwnKeys {
        OwnKeys::under("prefetchd:{s}:")
    }

    fn body(commands: &[&str]) -> BytesMut {
        let mut out = BytesMut::new();
        for command in commands {
            let words: Vec<&[u8]> = command.split(' ').map(str::as_bytes).collect();
            resp::command(&mut out, &words);
        }
        out
    }

    fn words(part: &Part) -> Vec<Vec<Bytes>> {
        let none = Bytes::new;
        let mark = Key(Bytes::from_static(b"the mark"));
        let keys = std::iter::once(mark).chain(part.keys.iter().cloned()).collect();
        let commands = part.commands.clone();
        Call { lane: None, keys, expected: none(), new: none(), if_failed: none(), commands }.words()
    }

    fn commands(part: &Part) -> Vec<String> {
        words(part).iter().map(|words| String::from_utf8_lossy(&words.join(&b' ')).into_owned()).collect()
    }

    fn lane(key: &str) -> Lane {
        Lane::of(key.as_bytes())
    }

    #[test]
    fn commands_go_to_the_lanes_of_their_keys_in_order() {
        let body = body(&["DEL a", "HSET a f 1", "PEXPIRE a 9", "RESTORE b 9 x REPLACE", "HSET a f 2", "DEL a"]);
        let split = split(&body, &own());
        assert_eq!(split.lanes.len(), 2);
        let of_a = commands(&split.lanes[&lane("a")]);
        assert_eq!(of_a, ["DEL a", "HSET a f 1", "PEXPIRE a 9", "?HSET a f 2", "DEL a"]);
        assert_eq!(commands(&split.lanes[&lane("b")]), ["RESTORE b 9 x REPLACE"]);
        assert!(split.entries.is_empty() && split.dead.is_empty() && !split.replaces_entries);
    }

    #[test]
    fn what_lanes_have_that_are_ahead_is_renewed() {
        let body = body(&[
            "DEL a",
            "HSET a f 1",
            "PEXPIRE a 9",
            "RESTORE b 8 x REPLACE",
            "DEL c",
            "RESTORE d 7 x REPLACE",
            "SET e x PX 6",
        ]);
        let split = split_after(BTreeMap::new(), &body, &own(), None, |at| at != lane("d"));
        let renewed: Vec<_> = split.renewals.values().flat_map(commands).collect();
        assert_eq!(split.renewals.keys().copied().collect::<BTreeSet<_>>(), BTreeSet::from(["a", "b", "e"].map(lane)));
        assert_eq!(
            renewed.into_iter().collect::<BTreeSet<_>>(),
            ["PEXPIRE a 9", "PEXPIRE b 8", "PEXPIRE e 6"].map(str::to_owned).into()
        );
        assert_eq!(split.lanes.len(), 5);
    }

    /// So that it can be seen whether a lane loses keys, and nothing else.
    #[test]
    fn members_are_left_out_where_lanes_are_ahead() {
        let body =
            body(&["DEL a", "SREM a-list 1", "ZREM b-list 1", "SADD c-list 1", "PEXPIRE c-list 9", "ZADD d-list 2 1"]);
        let split =
            split_after(BTreeMap::new(), &body, &own(), None, |at| at != lane("d-list") && at != lane("b-list"));
        let found: BTreeSet<String> = split.lanes.values().flat_map(commands).collect();
        assert_eq!(found, ["DEL a", "PEXPIRE c-list 9", "ZADD d-list 2 1", "ZREM b-list 1"].map(str::to_owned).into());
        assert!(split.lanes[&lane("a")].commands.only_delete());
    }

    #[test]
    fn what_was_announced_is_not_announced_again() {
        let entry = |lsn: &str| format!("XADD changes MAXLEN ~ 9 * op delete table t key a lsn {lsn} xid 1 time 2");
        let entries = [entry("0/50"), entry("0/60"), "XADD changes MAXLEN ~ 9 * op loaded table t".to_owned()];
        let body = body(&entries.each_ref().map(String::as_str));
        let own = own().announcing(Some(crate::resp::batch::ChangeStream::at("changes", 9)));
        let split = split_after(BTreeMap::new(), &body, &own, Lsn::new(0x60), |_| false);
        assert_eq!(commands(&split.lanes[&lane("changes")]), entries[1..]);
    }

    #[test]
    fn a_merge_needs_a_hash_and_a_row_does_not() {
        let body = body(&["HSET a f 1", "HDEL a g", "PEXPIRE a 9", "DEL b", "HSET {b} f 1", "DEL c", "HDEL c f"]);
        let split = split(&body, &own());
        assert_eq!(commands(&split.lanes[&lane("a")]), ["?HSET a f 1", "?HDEL a g", "PEXPIRE a 9"]);
        assert_eq!(commands(&split.lanes[&lane("b")]), ["DEL b", "?HSET {b} f 1"], "another key was deleted");
        assert_eq!(commands(&split.lanes[&lane("c")]), ["DEL c", "HDEL c f"]);
    }

    #[test]
    fn entries_and_records_of_dead_letters_belong_to_the_record() {
        let mut batch = Batch::new(own(), Limits::default());
        let enter = |table: &str, entry: &str| Command::Enter { table: table.to_owned(), entry: entry.into() };
        let row = Key(Bytes::from_static(b"k"));
        let dead = DeadKey { table: "t".to_owned(), reason: "r".to_owned(), lsn: "0/1".to_owned() };
        let letter = DeadLetter {
            table: "t".to_owned(),
            key: row.0.clone(),
            lsn: "0/1".to_owned(),
            xid: 7,
            reason: "r".to_owned(),
            row: Bytes::new(),
        };
        for command in [
            enter("gone", "1"),
            Command::Delete { key: own().tables().clone() },
            enter("t", "2"),
            enter("t", "3"),
            Command::Remember { key: row.clone(), dead: dead.clone() },
            Command::Forget { key: row.clone() },
            Command::DeadLetter(letter),
        ] {
            batch.push(&command).unwrap();
        }
        let split = split(batch.body(), &own());
        assert!(split.replaces_entries);
        assert_eq!(split.entries, BTreeMap::from([("t".into(), "3".into())]));
        let hash = own().dead_keys_of(&row).0;
        let written = Dead { hash: hash.clone(), row: row.0.clone(), set: Some(dead.to_json().into()) };
        assert_eq!(split.dead, [written, Dead { hash, row: row.0, set: None }]);
        let letters = &split.lanes[&Lane::of(own().dead().as_bytes())];
        assert_eq!(split.lanes.len(), 1);
        assert!(commands(letters)[0].starts_with("XADD prefetchd:{s}:dead MAXLEN ~ 10000 * table t key k"));
    }

    proptest! {
        /// Nothing is lost, added, or put into another order within a key.
        #[test]
        fn every_command_is_in_one_lane(
            of in prop::collection::vec((0..3_usize, 0..40_u8, prop::collection::vec(any::<u8>(), 0..20)), 0..60)
        ) {
            let mut body = BytesMut::new();
            let mut wanted: BTreeMap<Lane, Vec<Vec<Bytes>>> = BTreeMap::new();
            for (name, key, argument) in &of {
                let (name, key) = ([&b"RESTORE"[..], b"DEL", b"PEXPIRE"][*name], format!("key:{key}"));
                let words = [name, key.as_bytes(), argument];
                resp::command(&mut body, &words);
                wanted.entry(Lane::of(key.as_bytes())).or_default().push(words.map(Bytes::copy_from_slice).into());
            }
            let split = split(&body, &own());
            for (lane, part) in &split.lanes {
                prop_assert!(part.keys.iter().all(|key| Lane::of(key.as_bytes()) == *lane));
            }
            let found: BTreeMap<_, _> = split.lanes.iter().map(|(lane, part)| (*lane, words(part))).collect();
            prop_assert_eq!(found, wanted);
        }
    }
}
