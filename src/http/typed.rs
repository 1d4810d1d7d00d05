//! Rows with types, as JSON: `typed=true`.

use super::read::Fields;
use super::refusal::Refusal;
use super::target::Target;
use crate::command::Key;
use crate::typed::json::{Json, write_row, write_string};
use crate::typed::row_type::RowType;
use std::collections::HashMap;

/// The JSON of rows is at most this many times as long as they are in Redis, or [`SMALL_BYTES`], and the names of all columns
/// in each, which Redis may lack. Otherwise composite values with long names of attributes would take far more memory than
/// what is read at once.
const GROWTH: usize = 8;
const SMALL_BYTES: usize = 512 << 10;
/// `"":null,`
const NULL_BYTES: usize = 8;

/// Returns one row; `bytes` is its size in Redis.
pub(super) fn one(row_type: &RowType, row: &Fields, bytes: usize) -> Result<Vec<u8>, Refusal> {
    within(row_type, 1, bytes, |out| write(row_type, row, out))
}

/// Returns `{"rows": {"a": {...}, "b": null}}`, in the order requested; `bytes` is the size of all rows in Redis.
pub(super) fn several(
    row_type: &RowType,
    target: &Target<'_>,
    rows: (&[Key], &[Option<Fields>]),
    bytes: usize,
) -> Result<Vec<u8>, Refusal> {
    within(row_type, rows.0.len(), bytes, |out| {
        out.put(b"{\"rows\":{");
        for (at, (key, row)) in rows.0.iter().zip(rows.1).enumerate() {
            if at > 0 {
                out.put(b",");
            }
            write_string(&String::from_utf8_lossy(target.short(key)), out);
            out.put(b":");
            match row {
                Some(row) => write(row_type, row, out),
                None => out.put(b"null"),
            }
        }
        out.put(b"}}");
    })
}

fn within(row_type: &RowType, rows: usize, bytes: usize, write: impl FnOnce(&mut Json)) -> Result<Vec<u8>, Refusal> {
    let names: usize = row_type.0.iter().map(|field| field.name.len() + NULL_BYTES).sum();
    let most_bytes = bytes.saturating_mul(GROWTH).max(SMALL_BYTES) + rows * names;
    let mut out = Json::new(most_bytes);
    write(&mut out);
    out.finish().ok_or_else(|| {
        let what = format!("with types, this would have more than {} kB", most_bytes >> 10);
        Refusal::TooLarge(format!("{what}: ask for fewer rows at once, or without typed=true"))
    })
}

fn write(row_type: &RowType, row: &Fields, out: &mut Json) {
    let values: HashMap<&[u8], &[u8]> = row.iter().map(|(field, value)| (&field[..], &value[..])).collect();
    write_row(row_type, |name| values.get(name.as_bytes()).copied(), out);
}
