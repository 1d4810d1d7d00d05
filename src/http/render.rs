//! Rows as the JSON of an answer: hashes as objects of strings or, with `typed=true`, with types; documents as they are.

use super::refusal::Refusal;
use super::target::Target;
use crate::sink::reader::{Fields, StoredRow};
use crate::typed::json::{Json, write_row, write_string};
use crate::typed::row_type::RowType;
use serde::Serialize;
use serde::de::IgnoredAny;
use serde::ser::Serializer;
use std::collections::HashMap;
use utoipa::ToSchema;

/// The JSON of rows with types is at most this many times as long as they are in Redis, or [`SMALL_BYTES`], and the names of
/// all columns in each, which Redis may lack. Otherwise composite values with long names of attributes would take far more
/// memory than what is read at once.
const GROWTH: usize = 8;
const SMALL_BYTES: usize = 512 << 10;
/// `"":null,`
const NULL_BYTES: usize = 8;

/// Approximate size of rows in an answer. With types, a row has all columns, also those that Redis does not have.
pub(super) fn bytes<'a>(row_type: Option<&RowType>, rows: impl Iterator<Item = &'a StoredRow>) -> usize {
    let names = name_bytes(row_type);
    rows.map(|row| row.bytes() + names).sum()
}

fn name_bytes(row_type: Option<&RowType>) -> usize {
    row_type.iter().flat_map(|of| &of.0).map(|field| field.name.len() + NULL_BYTES).sum()
}

/// Returns one row; `bytes` is its size in Redis. Without `row_type`, the values of a hash are strings.
pub(super) fn one(row_type: Option<&RowType>, row: &StoredRow, bytes: usize) -> Result<Vec<u8>, Refusal> {
    match (row_type, row) {
        (None, StoredRow::Fields(fields)) => strings(&RowJson(fields)),
        _ => within(row_type, 1, bytes, |out| write(row_type, row, out)),
    }
}

/// Returns `{"rows": {"a": {...}, "b": null}}`, in the order requested; `bytes` is the size of all rows in Redis.
pub(super) fn several(
    row_type: Option<&RowType>,
    target: &Target<'_>,
    rows: &[Option<StoredRow>],
    bytes: usize,
) -> Result<Vec<u8>, Refusal> {
    let are_strings = row_type.is_none() && !rows.iter().flatten().any(|row| matches!(row, StoredRow::Document(_)));
    if are_strings {
        return strings(&Rows { rows: ByKey { target, rows } });
    }
    within(row_type, rows.len(), bytes, |out| {
        out.put(b"{\"rows\":{");
        for (at, (key, row)) in target.keys.iter().zip(rows).enumerate() {
            if at > 0 {
                out.put(b",");
            }
            write_string(target.short(key), out);
            out.put(b":");
            match row {
                Some(row) => write(row_type, row, out)?,
                None => out.put(b"null"),
            }
        }
        out.put(b"}}");
        Ok(())
    })
}

/// Returns `{"rows": [...], "total": 42, "next": "..."}`; `bytes` is the size of all rows in Redis.
pub(super) fn list(
    row_type: Option<&RowType>,
    rows: &[StoredRow],
    (total, next): (u64, Option<&str>),
    bytes: usize,
) -> Result<Vec<u8>, Refusal> {
    if row_type.is_none() && !rows.iter().any(|row| matches!(row, StoredRow::Document(_))) {
        return strings(&List { rows: InOrder(rows), total, next });
    }
    within(row_type, rows.len(), bytes, |out| {
        out.put(b"{\"rows\":[");
        for (at, row) in rows.iter().enumerate() {
            if at > 0 {
                out.put(b",");
            }
            write(row_type, row, out)?;
        }
        out.put(format!("],\"total\":{total},\"next\":").as_bytes());
        match next {
            Some(next) => write_string(next.as_bytes(), out),
            None => out.put(b"null"),
        }
        out.put(b"}");
        Ok(())
    })
}

/// Bytes that are not UTF-8 become U+FFFD.
fn within(
    row_type: Option<&RowType>,
    rows: usize,
    bytes: usize,
    write: impl FnOnce(&mut Json) -> Result<(), Refusal>,
) -> Result<Vec<u8>, Refusal> {
    let most_bytes = bytes.saturating_mul(GROWTH).max(SMALL_BYTES) + rows * name_bytes(row_type);
    let mut out = Json::new(most_bytes);
    write(&mut out)?;
    let text = out.finish().map(|text| match String::from_utf8(text) {
        Ok(text) => text,
        Err(other) => String::from_utf8_lossy(other.as_bytes()).into_owned(),
    });
    text.filter(|text| text.len() <= most_bytes).map(String::into_bytes).ok_or_else(|| {
        let what = format!("with types, this would have more than {} kB", most_bytes >> 10);
        Refusal::TooLarge(format!("{what}: ask for fewer rows at once, or without typed=true"))
    })
}

/// # Errors
/// If the document is none: something else was stored in place of a row.
fn write(row_type: Option<&RowType>, row: &StoredRow, out: &mut Json) -> Result<(), Refusal> {
    match (row, row_type) {
        (StoredRow::Document(document), _) => {
            if serde_json::from_slice::<IgnoredAny>(document).is_err() {
                return Err(Refusal::Healing(
                    "a key of the table holds something else than a JSON document".to_owned(),
                ));
            }
            out.put(document);
        }
        (StoredRow::Fields(fields), Some(row_type)) => {
            let values: HashMap<&[u8], &[u8]> = fields.iter().map(|(field, value)| (&field[..], &value[..])).collect();
            write_row(row_type, |name| values.get(name.as_bytes()).copied(), out);
        }
        (StoredRow::Fields(_), None) => unreachable!("all rows of an answer are written the same way"),
    }
    Ok(())
}

fn strings(value: &impl Serialize) -> Result<Vec<u8>, Refusal> {
    Ok(serde_json::to_vec(value).expect("the maps have string keys, and a Vec takes any bytes"))
}

/// A row as an object of strings, its fields in the order in which they are stored.
struct RowJson<'a>(&'a Fields);

impl Serialize for RowJson<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(f, v)| (String::from_utf8_lossy(f), String::from_utf8_lossy(v))))
    }
}

/// Rows of a list, in its order.
#[derive(Serialize, ToSchema)]
pub(super) struct List<'a> {
    #[schema(value_type = Vec<BTreeMap<String, serde_json::Value>>)]
    rows: InOrder<'a>,
    /// How many rows the list has.
    total: u64,
    /// Where the next rows begin, for `after`; null if there are none.
    next: Option<&'a str>,
}

struct InOrder<'a>(&'a [StoredRow]);

impl Serialize for InOrder<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.0.iter().map(|row| match row {
            StoredRow::Fields(fields) => RowJson(fields),
            StoredRow::Document(_) => unreachable!("documents are written as they are"),
        }))
    }
}

#[derive(Serialize, ToSchema)]
pub(super) struct Rows<'a> {
    #[schema(value_type = BTreeMap<String, Option<BTreeMap<String, serde_json::Value>>>)]
    rows: ByKey<'a>,
}

/// `{"a": {...}, "b": null}`, in the order requested.
struct ByKey<'a> {
    target: &'a Target<'a>,
    rows: &'a [Option<StoredRow>],
}

impl Serialize for ByKey<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let ByKey { target, rows } = self;
        let rows = target.keys.iter().zip(*rows);
        serializer.collect_map(rows.map(|(key, row)| {
            let row = match row {
                Some(StoredRow::Fields(fields)) => Some(RowJson(fields)),
                Some(StoredRow::Document(_)) | None => None,
            };
            (String::from_utf8_lossy(target.short(key)), row)
        }))
    }
}
