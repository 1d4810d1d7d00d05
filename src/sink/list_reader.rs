//! Reads the rows of a list, some of them at a time, in their order and all as of one moment.
//!
//! Which rows are wanted is known only once the list has been read, so a request reads the list and the rows that it had
//! when it was last read. If the list has the same ones still, list and rows are of one moment; otherwise it is repeated.
//! Nothing is watched or locked, and no script runs.

use super::reader::{Moments, READ_TIMEOUT, Read, Reader, StoredRow, failure, unexpected, unexpected_value};
use super::{Request, SinkError};
use crate::command::Key;
use crate::format::Format;
use crate::lookups::{ListKind, Lookups, Score};
use bytes::Bytes;
use redis::{Cmd, Value};
use std::cmp::Ordering;
use std::collections::{BTreeSet, HashMap};
use std::time::Instant;
use tokio::time::timeout;

/// An attempt fails if another row has come into the slice since the last one, a fraction of a millisecond ago.
const ATTEMPTS: u32 = 20;
/// Where list and rows lie apart: reads of the same elements, each of which tries to be of one moment.
const TRIES_APART: u32 = 2;
/// A set has no order, so that all its members are read and sorted. Larger ones would block Redis for too long.
const MOST_MEMBERS_OF_A_SET: u64 = 10_000;
/// Elements that one step of a search looks at.
const PROBES: u64 = 64;

/// Part of a list.
#[derive(Debug, Clone, Copy)]
pub struct Slice<'a> {
    pub lookups: &'a Lookups,
    pub list: &'a Key,
    pub kind: ListKind,
    pub direction: Direction,
    /// It begins behind this element, or with the first one.
    pub after: Option<&'a Place>,
    /// At most this many elements; not 0.
    pub limit: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Direction {
    /// By score, then by name. A set: by name.
    #[default]
    Ascending,
    Descending,
}

/// The place of an element in a list, which need not be there any more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// How many elements lay before it and up to it, when it was read.
    pub rank: u64,
    pub element: Element,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Element {
    /// `None` in a set.
    pub score: Option<Score>,
    pub member: Bytes,
}

/// Rows of a list, of one moment.
#[derive(Debug)]
pub struct ListRead {
    /// With the rows, in the order of the list. `None` is a member without a row.
    pub read: Read,
    /// How many elements the list has, without those that are left out here.
    pub total: u64,
    /// Where the slice ended, if more follow.
    pub next: Option<Place>,
}

/// What reads a list and its rows.
pub(super) trait ListReader {
    /// The one that answers for the connections: to Redis, or to the node that has the record.
    fn reader(&self) -> &Reader;

    /// Returns the rows at `keys`, and the replies to `commands` about the list, with the checkpoint. All of it is of one moment
    /// unless [`Read::moments`] says otherwise.
    async fn read_list(
        &self,
        table: &str,
        rows: (Format, &[Key]),
        list: &Key,
        commands: &[Cmd],
    ) -> Result<(Read, Vec<Value>), SinkError>;

    /// Returns the replies to commands about the list, errors at their places.
    async fn ask_list(&self, list: &Key, command: &'static str, commands: &[Cmd]) -> Result<Vec<Value>, SinkError>;

    /// Whether list and rows may lie in different hash slots, which are written one by one. Rows then decide what belongs to
    /// the list.
    const ARE_APART: bool;
}

/// Returns the slice's rows, with the head of the checkpoint and the entry of `table`.
///
/// # Errors
/// [`SinkError::LargeSet`] if a set is too large to be sorted, [`SinkError::Restless`] if other rows come into the slice
/// all the time. After [`SinkError::TimedOut`], a reply may still arrive on this connection.
pub(super) async fn read<R: ListReader>(
    reader: &R,
    table: &str,
    format: Format,
    slice: &Slice<'_>,
) -> Result<ListRead, SinkError> {
    let listed = timeout(READ_TIMEOUT, read_in_time(reader, table, format, slice)).await;
    let listed = listed.unwrap_or_else(|_| Err(reader.reader().silent()));
    listed.map_err(|error| reader.reader().without_secret(error))
}

async fn read_in_time<R: ListReader>(
    reader: &R,
    table: &str,
    format: Format,
    slice: &Slice<'_>,
) -> Result<ListRead, SinkError> {
    let began = Instant::now();
    if slice.kind == ListKind::Set && size(reader, slice).await? > MOST_MEMBERS_OF_A_SET {
        return Err(SinkError::LargeSet { key: slice.list.clone(), most: MOST_MEMBERS_OF_A_SET });
    }
    let mut guess: Vec<Element> = Vec::new();
    let mut start = slice.after.map_or(0, |place| place.rank);
    let mut tries = 0;
    for _ in 0..ATTEMPTS {
        let keys: Vec<Key> = guess.iter().map(|element| slice.lookups.row(&element.member)).collect();
        let (mut read, replies) = reader.read_list(table, (format, &keys), slice.list, &slice.commands(start)).await?;
        let found = match slice.found(start, replies) {
            // Something was written between two commands.
            Err(_) if read.moments == Moments::Several => continue,
            found => found?,
        };
        let Some(Found { elements, mut total, more }) = found else {
            start = search(reader, slice).await?;
            continue;
        };
        let guessed: HashMap<&Bytes, usize> =
            guess.iter().zip(0..).map(|(element, at)| (&element.member, at)).collect();
        let places: Option<Vec<usize>> = elements.iter().map(|element| guessed.get(&element.member).copied()).collect();
        let Some(places) = places.filter(|_| read.moments == Moments::One || R::ARE_APART) else {
            guess = elements;
            continue;
        };
        (read.rows, read.ttl_ms) = places.iter().map(|at| (read.rows[*at].take(), read.ttl_ms[*at])).unzip();
        read.redis = began.elapsed();
        if R::ARE_APART {
            total = total.saturating_sub(slice.leave_out_others(&elements, &mut read));
            tries += 1;
            if read.moments == Moments::Several && tries < TRIES_APART {
                continue;
            }
        }
        let rank = start.saturating_add(elements.len() as u64);
        let last = elements.into_iter().next_back().filter(|_| more);
        return Ok(ListRead { read, total, next: last.map(|element| Place { rank, element }) });
    }
    Err(SinkError::Restless { key: slice.list.clone() })
}

/// Returns how many elements lie before the slice.
async fn search(reader: &impl ListReader, slice: &Slice<'_>) -> Result<u64, SinkError> {
    let Some(Place { element: after, .. }) = slice.after else { return Ok(0) };
    let (mut low, mut high) = (0, size(reader, slice).await?);
    while low < high {
        let step = (high - low).div_ceil(PROBES);
        let ranks: Vec<u64> = (low..high).step_by(usize::try_from(step).unwrap_or(usize::MAX)).collect();
        let asked: Vec<Cmd> = ranks.iter().map(|rank| slice.range(*rank, *rank)).collect();
        for (rank, reply) in ranks.iter().zip(reader.ask_list(slice.list, slice.range_command(), &asked).await?) {
            match slice.elements(reply)?.first() {
                Some(element) if !slice.is_behind(element, after) => low = rank + 1,
                Some(_) | None => {
                    high = *rank;
                    break;
                }
            }
        }
    }
    Ok(low)
}

async fn size(reader: &impl ListReader, slice: &Slice<'_>) -> Result<u64, SinkError> {
    let reply = reader.ask_list(slice.list, slice.size_command(), &[slice.size()]).await?.pop();
    slice.size_in(reply.unwrap_or(Value::Nil))
}

impl ListReader for Reader {
    const ARE_APART: bool = false;

    fn reader(&self) -> &Reader {
        self
    }

    async fn read_list(
        &self,
        table: &str,
        rows: (Format, &[Key]),
        _: &Key,
        commands: &[Cmd],
    ) -> Result<(Read, Vec<Value>), SinkError> {
        self.attempt(table, rows, commands).await
    }

    async fn ask_list(&self, _: &Key, command: &'static str, commands: &[Cmd]) -> Result<Vec<Value>, SinkError> {
        self.replies(command, commands).await
    }
}

struct Found {
    elements: Vec<Element>,
    total: u64,
    /// Whether further elements follow.
    more: bool,
}

impl Slice<'_> {
    /// Asks for the elements from this rank on, with the one before it.
    fn commands(&self, start: u64) -> Vec<Cmd> {
        match self.kind {
            ListKind::SortedSet => {
                vec![self.size(), self.range(start.saturating_sub(1), start.saturating_add(self.limit as u64) - 1)]
            }
            ListKind::Set => vec![redis::cmd("SMEMBERS").arg(self.list.as_bytes()).take()],
        }
    }

    /// Parses the replies to [`Self::commands`]. `None` if the slice does not begin at that rank.
    fn found(&self, start: u64, replies: Vec<Value>) -> Result<Option<Found>, SinkError> {
        let mut replies = replies.into_iter();
        let first = replies.next().unwrap_or(Value::Nil);
        match self.kind {
            ListKind::SortedSet => {
                let total = self.size_in(first)?;
                let mut elements = self.elements(replies.next().unwrap_or(Value::Nil))?;
                let before = (start > 0 && !elements.is_empty()).then(|| elements.remove(0));
                let begins = match (self.after.map(|place| &place.element), before) {
                    (None, _) => start == 0,
                    (Some(_), None) if start > 0 => false,
                    (Some(after), before) => {
                        before.is_none_or(|before| !self.is_behind(&before, after))
                            && elements.first().is_none_or(|first| self.is_behind(first, after))
                    }
                };
                let more = start.saturating_add(elements.len() as u64) < total;
                if begins && more && elements.len() < self.limit {
                    return Err(unexpected(self.range_command(), "too few elements"));
                }
                Ok(begins.then_some(Found { elements, total, more }))
            }
            ListKind::Set => {
                let members = self.all_members(first)?;
                let total = members.len() as u64;
                let element = |member: Bytes| Element { score: None, member };
                let is_wanted = |element: &Element| self.after.is_none_or(|at| self.is_behind(element, &at.element));
                let mut elements: Vec<Element> = members.into_iter().map(element).filter(is_wanted).collect();
                if self.direction == Direction::Descending {
                    elements.reverse();
                }
                let more = elements.len() > self.limit;
                elements.truncate(self.limit);
                Ok(Some(Found { elements, total, more }))
            }
        }
    }

    /// Takes rows out that have another value now: they are members of other lists, which lie elsewhere and may have been
    /// written later. What was read is then of several moments, and rows that are gone are taken out, too. Returns how many.
    fn leave_out_others(&self, elements: &[Element], read: &mut Read) -> u64 {
        let belongs = |element: &Element, row: &StoredRow| {
            let values = match row {
                StoredRow::Document(document) => self.lookups.values_in(document),
                StoredRow::Fields(fields) => self.lookups.values_among(fields),
            };
            let row = self.lookups.row(&element.member);
            self.lookups.membership(&row, &values, self.list) == Some(element.score)
        };
        let (rows, ttl_ms) = (std::mem::take(&mut read.rows), std::mem::take(&mut read.ttl_ms));
        let others =
            |(element, row): (&Element, &Option<StoredRow>)| row.as_ref().is_some_and(|row| !belongs(element, row));
        let others: Vec<bool> = elements.iter().zip(&rows).map(others).collect();
        if others.contains(&true) {
            read.moments = Moments::Several;
        }
        let before = rows.len();
        for ((row, ttl_ms), is_other) in rows.into_iter().zip(ttl_ms).zip(others) {
            // Where nothing is on its way, a row that is gone was removed by somebody.
            if !is_other && (row.is_some() || read.moments == Moments::One) {
                read.rows.push(row);
                read.ttl_ms.push(ttl_ms);
            }
        }
        (before - read.rows.len()) as u64
    }

    fn size(&self) -> Cmd {
        redis::cmd(self.size_command()).arg(self.list.as_bytes()).take()
    }

    fn size_command(&self) -> &'static str {
        match self.kind {
            ListKind::SortedSet => "ZCARD",
            ListKind::Set => "SCARD",
        }
    }

    fn size_in(&self, reply: Value) -> Result<u64, SinkError> {
        let command = self.size_command();
        match reply {
            Value::Int(size) => u64::try_from(size).map_err(|_| unexpected(command, "a negative number")),
            other => Err(failure(Request::of(command, self.list), command, other)),
        }
    }

    /// Asks for the elements of a sorted set from one rank to another, with their scores.
    fn range(&self, first: u64, last: u64) -> Cmd {
        redis::cmd(self.range_command()).arg(self.list.as_bytes()).arg(first).arg(last).arg("WITHSCORES").take()
    }

    fn range_command(&self) -> &'static str {
        match self.direction {
            Direction::Ascending => "ZRANGE",
            // Older versions of Redis have no ZRANGE ... REV.
            Direction::Descending => "ZREVRANGE",
        }
    }

    fn elements(&self, reply: Value) -> Result<Vec<Element>, SinkError> {
        let command = self.range_command();
        let items = match reply {
            Value::Array(items) => items,
            other => return Err(failure(Request::of(command, self.list), command, other)),
        };
        let mut elements = Vec::with_capacity(items.len() / 2);
        let mut items = items.into_iter();
        while let Some(member) = items.next() {
            match (member, items.next()) {
                (Value::BulkString(member), Some(Value::BulkString(score))) => {
                    let score = Score::read(&score).ok_or_else(|| unexpected(command, "a score that is no number"))?;
                    elements.push(Element { score: Some(score), member: member.into() });
                }
                (other, _) => return Err(unexpected_value(command, &other)),
            }
        }
        Ok(elements)
    }

    fn all_members(&self, reply: Value) -> Result<BTreeSet<Bytes>, SinkError> {
        let Value::Array(members) = reply else {
            return Err(failure(Request::of("SMEMBERS", self.list), "SMEMBERS", reply));
        };
        let member = |member: Value| match member {
            Value::BulkString(member) => Ok(member.into()),
            other => Err(unexpected_value("SMEMBERS", &other)),
        };
        members.into_iter().map(member).collect()
    }

    /// Whether `element` comes later than `other` in this direction.
    fn is_behind(&self, element: &Element, other: &Element) -> bool {
        let by_score = element.score.partial_cmp(&other.score).expect("scores are never NaN");
        let order = by_score.then_with(|| element.member.cmp(&other.member));
        match self.direction {
            Direction::Ascending => order == Ordering::Greater,
            Direction::Descending => order == Ordering::Less,
        }
    }
}
