//! Parses a row request's raw path and query. Pure, and works on bytes, since a key may contain any.
//!
//! The path is split before it is decoded, so that `%2F` stays within its segment; axum's own extractors decode first,
//! and reject what is not UTF-8. Unknown parameters are refused: a misspelt `min_lsn` would silently promise less than
//! was asked for.

use super::cursor;
use super::refusal::Refusal;
use crate::command::Key;
use crate::lsn::Lsn;
use crate::plan::key;
use crate::schema::TableSpec;
use crate::sink::list_reader::{Direction, Place};
use axum::http::Uri;
use bytes::Bytes;
use std::time::Duration;

/// Every path below it names a table.
pub(super) const TABLES: &str = "/v1/tables/";
/// Every path below it names a table and one of its lookups.
pub(super) const LOOKUPS: &str = "/v1/lookups/";
const MAX_KEYS: usize = 100;
const DEFAULT_LIMIT: usize = 100;
const MAX_LIMIT: usize = 1000;
const DEFAULT_WAIT: Duration = Duration::from_secs(1);
const MAX_WAIT: Duration = Duration::from_secs(30);

/// What every read may ask for.
#[derive(Debug)]
pub struct Asking<'a> {
    pub table: &'a TableSpec,
    /// As given, not normalised: normalising needs the server's WAL segment size.
    pub min_lsn: Option<Lsn>,
    /// How long to wait for it.
    pub wait: Duration,
    pub max_age: Option<Duration>,
    pub values: Values,
}

/// A read of rows by their keys.
#[derive(Debug)]
pub struct Target<'a> {
    pub asking: Asking<'a>,
    pub wanted: RowsAsked,
    /// At least one, none twice.
    pub keys: Vec<Key>,
}

/// A read of the rows of a list.
#[derive(Debug)]
pub struct ListTarget<'a> {
    pub asking: Asking<'a>,
    /// The place of the lookup among those of its table.
    pub lookup: usize,
    pub list: Key,
    pub direction: Direction,
    pub after: Option<Place>,
    pub limit: usize,
}

/// How values are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Values {
    /// As strings, as they lie in Redis.
    #[default]
    Strings,
    /// As `row_to_json` writes them.
    Typed,
}

#[derive(Debug)]
pub enum RowsAsked {
    One,
    Many,
}

impl<'a> Target<'a> {
    pub fn parse(uri: &Uri, tables: &'a [TableSpec]) -> Result<Self, Refusal> {
        let (table, segments) = below(TABLES, uri, tables)?;
        let mut query = Query::parse(uri.query().unwrap_or_default(), &["key"])?;

        let (wanted, keys) = if segments.is_empty() {
            (RowsAsked::Many, many(table, std::mem::take(&mut query.keys))?)
        } else {
            (RowsAsked::One, vec![one(table, &segments)?])
        };
        if !query.keys.is_empty() {
            return Err(bad("key= asks for several rows: it does not go with a key in the path"));
        }
        Ok(Self { asking: query.asking(table), wanted, keys })
    }

    /// Returns the key without the table's prefix, as a batch read takes it.
    pub(super) fn short<'k>(&self, key: &'k Key) -> &'k [u8] {
        key.as_bytes().get(self.asking.table.key.literal.len()..).unwrap_or_default()
    }
}

impl<'a> ListTarget<'a> {
    pub fn parse(uri: &Uri, tables: &'a [TableSpec]) -> Result<Self, Refusal> {
        let (table, mut segments) = below(LOOKUPS, uri, tables)?;
        if segments.is_empty() {
            return Err(bad(format!("which lookup? {LOOKUPS}{}/LOOKUP/VALUE", table.name)));
        }
        let name = segments.remove(0);
        let lookup = table.lookups.iter().position(|lookup| lookup.name.as_bytes() == name);
        let unknown = || Refusal::UnknownLookup {
            table: table.name.clone(),
            lookup: String::from_utf8_lossy(&name).into_owned(),
        };
        let lookup = lookup.ok_or_else(unknown)?;
        let spec = &table.lookups[lookup];
        let columns = &spec.key.columns;
        if segments.len() != columns.len() {
            let names: Vec<&str> = columns.iter().map(|column| &*column.name).collect();
            return Err(bad(format!(
                "the lists of {} have {} values ({}), one path segment each, not {}: a / inside a value is written %2F",
                spec.name,
                columns.len(),
                names.join("/"),
                segments.len()
            )));
        }
        let query = Query::parse(uri.query().unwrap_or_default(), &["limit", "after", "order"])?;
        let after = query.after.as_deref().map(|text| {
            let place = cursor::read(text, spec.order.is_some());
            place.ok_or_else(|| bad("after= takes what an answer for this lookup has as next, unchanged"))
        });
        Ok(Self {
            after: after.transpose()?,
            lookup,
            list: key::from_segments(&spec.key.literal, &segments),
            direction: query.direction,
            limit: query.limit.unwrap_or(DEFAULT_LIMIT),
            asking: query.asking(table),
        })
    }
}

/// Returns the table that a path names, and the segments that follow.
fn below<'a>(route: &str, uri: &Uri, tables: &'a [TableSpec]) -> Result<(&'a TableSpec, Vec<Bytes>), Refusal> {
    let mut segments = uri.path().strip_prefix(route).ok_or(Refusal::UnknownRoute)?.split('/');
    let name = decode(segments.next().unwrap_or_default(), Plus::Literal)?;
    let table = tables
        .iter()
        .find(|t| t.name.as_bytes() == name)
        .ok_or_else(|| Refusal::UnknownTable(String::from_utf8_lossy(&name).into_owned()))?;
    let segments = segments.map(|s| decode(s, Plus::Literal).map(Bytes::from)).collect::<Result<_, _>>()?;
    Ok((table, segments))
}

fn one(table: &TableSpec, segments: &[Bytes]) -> Result<Key, Refusal> {
    let columns = &table.key.columns;
    if segments.len() != columns.len() {
        return Err(bad(format!(
            "the key of {} is {} ({} path segments), not {}: a / inside a value is written %2F",
            table.name,
            columns.join("/"),
            columns.len(),
            segments.len()
        )));
    }
    possible(table, key::from_segments(&table.key.literal, segments))
}

fn many(table: &TableSpec, keys: Vec<Vec<u8>>) -> Result<Vec<Key>, Refusal> {
    if keys.is_empty() {
        return Err(bad(format!("which rows? {TABLES}{}/KEY, or ?key=A&key=B", table.name)));
    }
    if keys.len() > MAX_KEYS {
        return Err(bad(format!("{} keys: at most {MAX_KEYS} at once", keys.len())));
    }
    // Duplicates are removed: a key that is named a hundred times is read and answered once.
    let mut wanted = Vec::with_capacity(keys.len());
    for short in keys {
        let key = whole_key(table, &short)?;
        if !wanted.contains(&key) {
            wanted.push(key);
        }
    }
    Ok(wanted)
}

/// Returns the Redis key of a row from its key without the prefix.
pub(super) fn whole_key(table: &TableSpec, short: &[u8]) -> Result<Key, Refusal> {
    possible(table, Key([table.key.literal.as_bytes(), short].concat().into()))
}

/// Refuses keys that no row can have: they would otherwise look like rows that do not exist.
fn possible(table: &TableSpec, key: Key) -> Result<Key, Refusal> {
    match key::decode(&table.key, &key) {
        Some(_) => Ok(key),
        None => Err(bad(format!("{key} is no key of {}: expected {}", table.name, table.key))),
    }
}

#[derive(Default)]
struct Query {
    keys: Vec<Vec<u8>>,
    min_lsn: Option<Lsn>,
    wait: Option<Duration>,
    max_age: Option<Duration>,
    values: Values,
    limit: Option<usize>,
    after: Option<String>,
    direction: Direction,
}

/// What every read takes.
const PARAMETERS: [&str; 4] = ["min_lsn", "wait", "max_age", "typed"];

impl Query {
    /// `further`: what this route takes besides [`PARAMETERS`].
    fn parse(raw: &str, further: &[&str]) -> Result<Self, Refusal> {
        let mut query = Self::default();
        let mut seen: Vec<Vec<u8>> = Vec::new();
        for pair in raw.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let (name, value) = (decode(name, Plus::Space)?, decode(value, Plus::Space)?);
            let mut known = further.iter().chain(&PARAMETERS);
            if !known.clone().any(|known| known.as_bytes() == name) {
                let (last, others) = (PARAMETERS[3], known.clone().count() - 1);
                let others = known.by_ref().take(others).copied().collect::<Vec<_>>().join(", ");
                let name = String::from_utf8_lossy(&name);
                return Err(bad(format!("unknown parameter {name:?}: there are {others} and {last}")));
            }
            if name == b"key" {
                query.keys.push(value);
                continue;
            }
            let text = String::from_utf8_lossy(&value);
            match name.as_slice() {
                b"min_lsn" => query.min_lsn = min_lsn(&text)?,
                b"wait" => match duration("wait", &text)? {
                    wait if wait > MAX_WAIT => {
                        return Err(bad(format!("wait={text}: at most {}s", MAX_WAIT.as_secs())));
                    }
                    wait => query.wait = Some(wait),
                },
                b"typed" => query.values = typed(&text)?,
                b"max_age" => query.max_age = Some(duration("max_age", &text)?),
                b"limit" => query.limit = Some(limit(&text)?),
                b"after" => query.after = Some(text.into_owned()),
                b"order" => query.direction = direction(&text)?,
                other => unreachable!("{other:?} is a known parameter"),
            }
            if seen.contains(&name) {
                return Err(bad(format!("{} is given twice", String::from_utf8_lossy(&name))));
            }
            seen.push(name);
        }
        Ok(query)
    }

    fn asking(self, table: &TableSpec) -> Asking<'_> {
        let Query { min_lsn, wait, max_age, values, .. } = self;
        Asking { table, min_lsn, wait: wait.unwrap_or(DEFAULT_WAIT), max_age, values }
    }
}

/// `0/0` is well formed and asks for nothing.
fn min_lsn(text: &str) -> Result<Option<Lsn>, Refusal> {
    match text.parse() {
        Ok(lsn) => Ok(Some(lsn)),
        Err(_) if is_zero(text) => Ok(None),
        Err(_) => Err(bad(format!("min_lsn={text}: expected X/X, 1 to 8 hexadecimal digits each"))),
    }
}

fn is_zero(text: &str) -> bool {
    let zeros = |half: &str| (1..=8).contains(&half.len()) && half.bytes().all(|b| b == b'0');
    text.split_once('/').is_some_and(|(hi, lo)| zeros(hi) && zeros(lo))
}

fn typed(text: &str) -> Result<Values, Refusal> {
    match text {
        "true" => Ok(Values::Typed),
        "false" => Ok(Values::Strings),
        _ => Err(bad(format!("typed={text}: expected true or false"))),
    }
}

fn limit(text: &str) -> Result<usize, Refusal> {
    let limit = text.parse().ok().filter(|limit| (1..=MAX_LIMIT).contains(limit));
    limit.ok_or_else(|| bad(format!("limit={text}: expected a number from 1 to {MAX_LIMIT}")))
}

fn direction(text: &str) -> Result<Direction, Refusal> {
    match text {
        "asc" => Ok(Direction::Ascending),
        "desc" => Ok(Direction::Descending),
        _ => Err(bad(format!("order={text}: expected asc or desc"))),
    }
}

fn duration(name: &str, text: &str) -> Result<Duration, Refusal> {
    humantime::parse_duration(text).map_err(|e| bad(format!("{name}={text}: {e}; expected 500ms, 1s, 2m")))
}

/// How `+` is decoded: as a space in a query (as forms and `URLSearchParams` write it), as itself in a path.
#[derive(Clone, Copy)]
enum Plus {
    Literal,
    Space,
}

/// Percent-decodes, and refuses a `%` that does not begin an escape.
fn decode(raw: &str, plus: Plus) -> Result<Vec<u8>, Refusal> {
    let mut out = Vec::with_capacity(raw.len());
    let mut rest = raw.as_bytes();
    while let Some((&byte, tail)) = rest.split_first() {
        rest = tail;
        out.push(match (byte, plus) {
            (b'%', _) => {
                let digit = |at: usize| tail.get(at).and_then(|&b| char::from(b).to_digit(16));
                let (Some(hi), Some(lo)) = (digit(0), digit(1)) else {
                    return Err(bad(format!("{raw:?} holds a % that begins no escape: a % is written %25")));
                };
                rest = tail.get(2..).unwrap_or_default();
                u8::try_from(hi * 16 + lo).expect("two hexadecimal digits make a byte")
            }
            (b'+', Plus::Space) => b' ',
            (other, _) => other,
        });
    }
    Ok(out)
}

fn bad(message: impl Into<String>) -> Refusal {
    Refusal::BadRequest(message.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_byte_comes_back_from_its_escape(bytes in proptest::collection::vec(any::<u8>(), 0..40)) {
            let escaped: String = bytes.iter().map(|b| format!("%{b:02X}")).collect();
            prop_assert_eq!(decode(&escaped, Plus::Literal), Ok(bytes.clone()));
            prop_assert_eq!(decode(&escaped.to_lowercase(), Plus::Space), Ok(bytes));
        }

        #[test]
        fn no_text_breaks_the_parser(text in ".{0,60}") {
            let _ = decode(&text, Plus::Space);
            let _ = Query::parse(&text, &["limit", "after", "order"]);
        }
    }

    #[test]
    fn zero_asks_for_nothing_and_nothing_else_is_zero() {
        assert_eq!(min_lsn("0/0"), Ok(None));
        assert_eq!(min_lsn("00000000/0"), Ok(None));
        for text in ["0", "0/", "/0", "0/000000000", "0/0/0", "-0/0"] {
            assert!(min_lsn(text).is_err(), "{text}");
        }
    }
}
