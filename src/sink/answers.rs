//! What the replies to the writers' requests mean: values, or why there are none.

use super::replies::Reply;
use super::{Class, Request, SinkError, Stored};
use crate::command::Key;
use crate::format::Format;
use crate::lookups::questions::{Answers, Fits, Held, Page, Questions};
use crate::lookups::{Fields, ListKind, Score};
use crate::resp;
use crate::resp::batch::OwnKeys;
use crate::session::inspect::{Comparison, Differences, Inspection, Probe};
use bytes::{Bytes, BytesMut};
use std::sync::Arc;

const SCAN_COUNT: &[u8] = b"1000";
const MEMBERS_COUNT: &[u8] = b"500";

pub(super) fn exactly<const N: usize>(command: &'static str, replies: Vec<Reply>) -> Result<[Reply; N], SinkError> {
    replies.try_into().map_err(|other| unexpected(command, &Reply::Array(other)))
}

pub(super) fn unexpected(command: &'static str, got: &Reply) -> SinkError {
    SinkError::Unexpected { command, got: got.describe() }
}

/// Returns the error for an unexpected reply.
pub(super) fn refusal(request: Request, command: &'static str, reply: Reply) -> SinkError {
    match reply {
        Reply::Error(reply) => SinkError::Refused { request, reply },
        other => unexpected(command, &other),
    }
}

pub(super) fn accepted(command: &'static str, reply: Reply) -> Result<(), SinkError> {
    match reply {
        Reply::Status(text) if text == "OK" => Ok(()),
        other => Err(refusal(Request::new(command), command, other)),
    }
}

/// Returns `None` if the user's ACL or the provider denies the command. Providers word that in their own ways, so any
/// permanent refusal counts.
pub(super) fn permitted(command: &'static str, reply: Reply) -> Result<Option<Reply>, SinkError> {
    match reply {
        Reply::Error(reply) => match reply.class() {
            Class::Away | Class::Login | Class::Elsewhere | Class::CrossSlot => {
                Err(SinkError::Refused { request: Request::new(command), reply })
            }
            Class::Denied | Class::Other | Class::Full | Class::ReadOnly | Class::WrongType => Ok(None),
        },
        other => Ok(Some(other)),
    }
}

/// Writes the request for one page of the keys that begin with `prefix`.
pub(super) fn scan_request(out: &mut BytesMut, prefix: &[u8], cursor: u64) {
    let cursor = cursor.to_string();
    resp::command(out, &[b"SCAN", cursor.as_bytes(), b"MATCH", &resp::glob_of_prefix(prefix), b"COUNT", SCAN_COUNT]);
}

/// Parses SCAN's answer: the next cursor, and the keys that begin with `prefix`.
pub(super) fn scanned(prefix: &[u8], reply: Reply) -> Result<(u64, Vec<Key>), SinkError> {
    let page = match reply {
        Reply::Array(items) => <[Reply; 2]>::try_from(items).map_err(Reply::Array),
        other => Err(other),
    };
    let (cursor, keys) = match page {
        Ok([Reply::Bulk(cursor), Reply::Array(keys)]) => (cursor, keys),
        Ok(other) => return Err(unexpected("SCAN", &Reply::Array(other.into()))),
        Err(other) => return Err(refusal(Request::new("SCAN"), "SCAN", other)),
    };
    let Some(next) = std::str::from_utf8(&cursor).ok().and_then(|c| c.parse().ok()) else {
        return Err(unexpected("SCAN", &Reply::Bulk(cursor)));
    };
    let keys = keys
        .into_iter()
        .filter_map(|key| match key {
            Reply::Bulk(key) => key.starts_with(prefix).then_some(Ok(Key(key))),
            other => Some(Err(unexpected("SCAN", &other))),
        })
        .collect::<Result<_, _>>()?;
    Ok((next, keys))
}

/// Writes the request for one of these questions about lookups.
pub(super) fn inspect_request(out: &mut BytesMut, questions: &Questions, at: usize) {
    match questions {
        Questions::Rows(rows) => {
            let (key, fields) = &rows[at];
            match fields.format {
                Format::Hash => {
                    resp::header(out, 2 + fields.names.len());
                    resp::bulk(out, b"HMGET");
                    resp::bulk(out, key.as_bytes());
                    fields.names.iter().for_each(|name| resp::bulk(out, name));
                }
                Format::Json | Format::RedisJson => {
                    resp::command(out, &[fields.format.read_command().as_bytes(), key.as_bytes()]);
                }
            }
        }
        Questions::Lists(lists) => {
            let (key, kind) = &lists[at];
            resp::command(out, &[of_kind(*kind, "SCARD", "ZCARD").as_bytes(), key.as_bytes()]);
        }
        Questions::Members(lists) => {
            let (key, kind, cursor) = &lists[at];
            let (command, cursor) = (of_kind(*kind, "SSCAN", "ZSCAN"), cursor.to_string());
            let words = [command.as_bytes(), key.as_bytes(), cursor.as_bytes(), b"COUNT", MEMBERS_COUNT];
            resp::command(out, &words);
        }
        Questions::Held(members) => {
            let (key, kind, member) = &members[at];
            let command = of_kind(*kind, "SISMEMBER", "ZSCORE");
            resp::command(out, &[command.as_bytes(), key.as_bytes(), member]);
        }
    }
}

fn of_kind(kind: ListKind, set: &'static str, sorted_set: &'static str) -> &'static str {
    match kind {
        ListKind::Set => set,
        ListKind::SortedSet => sorted_set,
    }
}

/// Parses the answers to [`inspect_request`].
pub(super) fn inspected(questions: &Questions, replies: Vec<Reply>) -> Result<Answers, SinkError> {
    let replies = replies.into_iter();
    Ok(match questions {
        Questions::Rows(rows) => {
            let row = |((key, fields), reply): (&(Key, Arc<Fields>), Reply)| match (fields.format, reply) {
                (Format::Hash, Reply::Array(values)) if values.len() == fields.names.len() => {
                    values.into_iter().map(|value| value_of(Request::of("HMGET", key), value)).collect()
                }
                (Format::Json | Format::RedisJson, Reply::Bulk(document)) => Ok(fields.in_document(&document)),
                (Format::Json | Format::RedisJson, Reply::Nil) => Ok(vec![None; fields.names.len()]),
                // Not a row.
                (_, reply) if is_other_type(&reply) => Ok(vec![None; fields.names.len()]),
                (format, reply) => {
                    let command = if format == Format::Hash { "HMGET" } else { format.read_command() };
                    Err(refusal(Request::of(command, key), command, reply))
                }
            };
            Answers::Rows(rows.iter().zip(replies).map(row).collect::<Result<_, _>>()?)
        }
        Questions::Lists(lists) => {
            let list = |((key, kind), reply): (&(Key, ListKind), Reply)| match reply {
                Reply::Integer(_) => Ok(Fits::Yes),
                reply if is_other_type(&reply) => Ok(Fits::OtherType),
                reply => {
                    let command = of_kind(*kind, "SCARD", "ZCARD");
                    Err(refusal(Request::of(command, key), command, reply))
                }
            };
            Answers::Lists(lists.iter().zip(replies).map(list).collect::<Result<_, _>>()?)
        }
        Questions::Members(lists) => {
            let page = |((key, kind, _), reply): (&(Key, ListKind, u64), Reply)| match reply {
                reply if is_other_type(&reply) => Ok(Page::OtherType),
                reply => members_of(key, *kind, reply),
            };
            Answers::Members(lists.iter().zip(replies).map(page).collect::<Result<_, _>>()?)
        }
        Questions::Held(members) => {
            let held = |((key, kind, _), reply): (&(Key, ListKind, Bytes), Reply)| match (kind, reply) {
                (ListKind::Set, Reply::Integer(1)) => Ok(Held::Yes(None)),
                (ListKind::Set, Reply::Integer(0)) | (ListKind::SortedSet, Reply::Nil) => Ok(Held::No),
                (ListKind::SortedSet, Reply::Bulk(score)) => {
                    score_of("ZSCORE", &score).map(|score| Held::Yes(Some(score)))
                }
                (_, reply) if is_other_type(&reply) => Ok(Held::OtherType),
                (_, reply) => {
                    let command = of_kind(*kind, "SISMEMBER", "ZSCORE");
                    Err(refusal(Request::of(command, key), command, reply))
                }
            };
            Answers::Held(members.iter().zip(replies).map(held).collect::<Result<_, _>>()?)
        }
    })
}

fn is_other_type(reply: &Reply) -> bool {
    matches!(reply, Reply::Error(reply) if reply.class() == Class::WrongType)
}

fn score_of(command: &'static str, score: &Bytes) -> Result<Score, SinkError> {
    Score::read(score).ok_or_else(|| unexpected(command, &Reply::Bulk(score.clone())))
}

/// Parses the answer to SSCAN or ZSCAN.
fn members_of(key: &Key, kind: ListKind, reply: Reply) -> Result<Page, SinkError> {
    let command = of_kind(kind, "SSCAN", "ZSCAN");
    let Reply::Array(mut page) = reply else { return Err(refusal(Request::of(command, key), command, reply)) };
    let (Some(Reply::Array(items)), Some(Reply::Bulk(cursor)), true) = (page.pop(), page.pop(), page.is_empty()) else {
        return Err(unexpected(command, &Reply::Nil));
    };
    let next = std::str::from_utf8(&cursor).ok().and_then(|cursor| cursor.parse().ok());
    let next = next.ok_or_else(|| unexpected(command, &Reply::Bulk(cursor)))?;
    let member = |items: &[Reply]| match items {
        [Reply::Bulk(member)] => Ok((member.clone(), None)),
        [Reply::Bulk(member), Reply::Bulk(score)] => Ok((member.clone(), Some(score_of(command, score)?))),
        _ => Err(unexpected(command, &Reply::Array(items.to_vec()))),
    };
    let width = match kind {
        ListKind::Set => 1,
        ListKind::SortedSet => 2,
    };
    Ok(Page::Members(items.chunks(width).map(member).collect::<Result<_, _>>()?, next))
}

/// Parses TYPE's answer.
pub(super) fn probe_of(key: &Key, reply: Reply) -> Result<Probe, SinkError> {
    Ok(match type_of(key, reply)?.as_ref() {
        b"hash" => Probe::Hash,
        b"string" => Probe::String,
        b"ReJSON-RL" => Probe::RedisJson,
        b"none" => Probe::Absent,
        _ => Probe::OtherType,
    })
}

/// Bytes of a reply besides its value.
const AROUND_A_VALUE: usize = 32 + resp::ELEMENT_BYTES;

/// Parses STRLEN's answers for documents that are to be patched. Returns what is known of them, the places of those to be
/// read, and how many bytes the answers to GET may have.
pub(super) fn lengths_of(
    asked: &Inspection,
    replies: Vec<Reply>,
) -> Result<(Vec<Probe>, Vec<usize>, usize), SinkError> {
    let (mut probes, mut wanted) = (Vec::with_capacity(replies.len()), Vec::new());
    let mut room = asked.most_bytes;
    for (at, (key, reply)) in asked.documents.iter().zip(replies).enumerate() {
        probes.push(match reply {
            Reply::Integer(0) => Probe::Absent,
            Reply::Integer(length) => {
                if let Some(left) = usize::try_from(length).ok().and_then(|length| room.checked_sub(length)) {
                    room = left;
                    wanted.push(at);
                }
                Probe::Unread
            }
            Reply::Error(reply) if reply.class() == Class::WrongType => Probe::OtherType,
            // Where the command is denied, rows are read from Postgres again.
            other => match permitted("STRLEN", other)? {
                None => Probe::Unread,
                Some(other) => return Err(refusal(Request::of("STRLEN", key), "STRLEN", other)),
            },
        });
    }
    let bytes = asked.most_bytes + wanted.len() * AROUND_A_VALUE;
    Ok((probes, wanted, bytes))
}

/// Parses GET's answer for a document that is to be patched.
pub(super) fn document_of(key: &Key, reply: Reply) -> Result<Probe, SinkError> {
    match reply {
        Reply::Bulk(document) => Ok(Probe::Document(document)),
        Reply::Nil => Ok(Probe::Absent),
        Reply::Error(reply) if reply.class() == Class::WrongType => Ok(Probe::OtherType),
        other => Err(refusal(Request::of("GET", key), "GET", other)),
    }
}

pub(super) fn value_of(request: Request, reply: Reply) -> Result<Option<Bytes>, SinkError> {
    match reply {
        Reply::Bulk(bytes) => Ok(Some(bytes)),
        Reply::Nil => Ok(None),
        other => Err(refusal(request, "GET", other)),
    }
}

/// Returns whether HGETALL's answer is the row that these commands write. Redis returns the fields of a large hash in
/// an order of its own.
pub(super) fn is_this_row(items: &[Reply], put: &[u8]) -> bool {
    let bytes = |reply: &Reply| match reply {
        Reply::Bulk(bytes) => Some(bytes.clone()),
        _ => None,
    };
    let found: Option<Vec<(Bytes, Bytes)>> =
        items.chunks(2).map(|pair| Some((bytes(pair.first()?)?, bytes(pair.get(1)?)?))).collect();
    let Some(mut found) = found else { return false };
    let mut wanted = resp::fields_of(put);
    let same = |found: &[(Bytes, Bytes)], wanted: &[(&[u8], &[u8])]| {
        found.len() == wanted.len() && found.iter().zip(wanted).all(|(f, w)| (&f.0[..], &f.1[..]) == *w)
    };
    same(&found, &wanted) || {
        found.sort();
        wanted.sort();
        same(&found, &wanted)
    }
}

/// `asked` has the keys with their expected rows, which were read; then TYPE was asked for the other keys. `None` is the
/// reply that a row as expected gives.
pub(super) fn differences(
    wanted: &Comparison,
    asked: &[(&Key, &[u8])],
    replies: Vec<Option<Reply>>,
) -> Result<Differences, SinkError> {
    let command = wanted.format.read_command();
    let mut differences = Differences::default();
    let mut replies = replies.into_iter();
    for ((key, row), reply) in asked.iter().zip(&mut replies) {
        let Some(reply) = reply else { continue };
        let is_right = match (wanted.format, reply) {
            (Format::Hash, Reply::Array(items)) if items.is_empty() => None,
            (Format::Hash, Reply::Array(items)) => Some(is_this_row(&items, row)),
            (Format::Json | Format::RedisJson, Reply::Nil) => None,
            (Format::Json, Reply::Bulk(document)) => Some(Some(&document[..]) == resp::document_of(row)),
            (Format::RedisJson, Reply::Bulk(document)) => Some(resp::sets_document(row, &document)),
            (_, Reply::Error(reply)) if reply.class() == Class::WrongType => Some(false),
            (_, other) => return Err(refusal(Request::of(command, key), command, other)),
        };
        match is_right {
            None => _ = differences.missing.insert((*key).clone()),
            Some(false) => _ = differences.stale.insert((*key).clone()),
            Some(true) => {}
        }
    }
    for (key, reply) in wanted.keys.iter().zip(replies.flatten()) {
        if type_of(key, reply)? != "none" {
            differences.present.insert(key.clone());
        }
    }
    Ok(differences)
}

pub(super) fn type_of(key: &Key, reply: Reply) -> Result<Bytes, SinkError> {
    match reply {
        Reply::Status(name) => Ok(name),
        other => Err(refusal(Request::of("TYPE", key), "TYPE", other)),
    }
}

/// Parses HGETALL's answer into fields and values.
pub(super) fn pairs_of(key: &Key, reply: Reply) -> Result<Vec<(Bytes, Bytes)>, SinkError> {
    let Reply::Array(items) = reply else { return Err(refusal(Request::of("HGETALL", key), "HGETALL", reply)) };
    let pair = |pair: &[Reply]| match pair {
        [Reply::Bulk(field), Reply::Bulk(value)] => Ok((field.clone(), value.clone())),
        _ => Err(unexpected("HGETALL", &Reply::Array(items.clone()))),
    };
    items.chunks(2).map(pair).collect()
}

/// Reads both parts of the checkpoint from the answers to TYPE, GET, TYPE and HGETALL.
pub(super) fn stored(
    own: &OwnKeys,
    checkpoint_type: Reply,
    head: Reply,
    tables_type: Reply,
    entries: Reply,
) -> Result<Option<Stored>, SinkError> {
    let (checkpoint, tables) = (own.checkpoint(), own.tables());
    foreign(checkpoint, checkpoint_type, "string")?;
    let head = value_of(Request::of("GET", checkpoint), head)?;
    foreign(tables, tables_type, "hash")?;
    let entries = pairs_of(tables, entries)?;
    Ok(head.map(|head| Stored { head, entries }))
}

pub(super) fn foreign(key: &Key, reply: Reply, wanted: &'static str) -> Result<(), SinkError> {
    let found = type_of(key, reply)?;
    if found == "none" || found == wanted {
        return Ok(());
    }
    Err(SinkError::ForeignKey { key: key.clone(), found: String::from_utf8_lossy(&found).into_owned(), wanted })
}

/// Parses TIME's answer into milliseconds since the Unix epoch.
pub(super) fn time_of(reply: Reply) -> Result<u64, SinkError> {
    let number = |reply: &Reply| match reply {
        Reply::Bulk(text) => std::str::from_utf8(text).ok().and_then(|t| t.parse::<u64>().ok()),
        _ => None,
    };
    if let Reply::Array(parts) = &reply
        && let [seconds, micros] = parts.as_slice()
        && let (Some(seconds), Some(micros)) = (number(seconds), number(micros))
    {
        return Ok(seconds.saturating_mul(1000).saturating_add(micros / 1000));
    }
    Err(refusal(Request::new("TIME"), "TIME", reply))
}
