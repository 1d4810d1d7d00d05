//! Rows as documents: what `row_to_json` gives for the columns of a table.
//!
//! A document is patched without being parsed: the values that an UPDATE leaves out are found in it and copied byte for
//! byte, because printing them again would lose duplicate names, lone surrogates and the digits of numbers. A mistake
//! here loses a large value, so a document that does not consist of exactly the expected fields is not patched.

use super::json::{Json, write_nullable, write_string};
use super::row_type::JsonType;
use crate::change::{Cell, PartialRow, Row};
use crate::resp::Cursor;
use crate::schema::{Field, Layout, NullRule};
use bytes::Bytes;
use serde::de::IgnoredAny;

/// Appends the document of a row. `types` are those of the layout's fields.
pub fn write(layout: &Layout, types: &[JsonType], row: &Row, out: &mut Json) {
    let mut values = Cursor::new(row.cells());
    let value = |field: &Field| values.at(field.cell).flatten().map_or(Cell::Null, Cell::Text);
    write_fields(layout, types, value, |_, _| unreachable!("every cell is known"), out);
}

/// Appends what is known of a document: the fields that an UPDATE leaves out have no value.
pub fn write_known(layout: &Layout, types: &[JsonType], row: &PartialRow, out: &mut Json) {
    let mut values = Cursor::new(row.cells());
    write_fields(layout, types, |field| values.at(field.cell).unwrap_or(Cell::Null), |_, _| (), out);
}

/// Appends the document `old` with the known cells of `row`. Returns `None` if that cannot be done with certainty: if
/// `old` is not the document of a row of this layout, or lacks a value that `row` leaves out.
pub fn patch(layout: &Layout, types: &[JsonType], old: &[u8], row: &PartialRow, out: &mut Json) -> Option<()> {
    let values = values_of(layout, old)?;
    let mut cells = Cursor::new(row.cells());
    let mut lacks = false;
    let unchanged = |at: usize, out: &mut Json| match values[at] {
        Some(value) if value != b"null" => out.put(value),
        // Postgres leaves out large values only.
        Some(_) | None => lacks = true,
    };
    write_fields(layout, types, |field| cells.at(field.cell).unwrap_or(Cell::Null), unchanged, out);
    (!lacks && !out.has_misfit()).then_some(())
}

/// `unchanged` appends the value of the field with this index.
fn write_fields<'r>(
    layout: &Layout,
    types: &[JsonType],
    mut value: impl FnMut(&Field) -> Cell<'r>,
    mut unchanged: impl FnMut(usize, &mut Json),
    out: &mut Json,
) {
    let mut separator = b"{";
    for (at, (field, json_type)) in layout.fields.iter().zip(types).enumerate() {
        let value = value(field);
        if value == Cell::Null && layout.null == NullRule::Omit {
            continue;
        }
        out.put(separator);
        separator = b",";
        write_string(&field.name, out);
        out.put(b":");
        match value {
            Cell::Text(text) => write_nullable(json_type, Some(text), out),
            Cell::Null => write_nullable(json_type, None, out),
            Cell::Unchanged => unchanged(at, out),
        }
    }
    if separator == b"{" {
        out.put(b"{");
    }
    out.put(b"}");
}

/// Returns the values in a document of this layout as they stand there, one for each field; `None` for a field that is
/// left out because it is NULL.
fn values_of<'d>(layout: &Layout, document: &'d [u8]) -> Option<Vec<Option<&'d [u8]>>> {
    let mut rest = document.strip_prefix(b"{")?.strip_suffix(b"}")?;
    let mut values = Vec::with_capacity(layout.fields.len());
    let mut is_first = true;
    for field in &layout.fields {
        let mut name = Json::new(usize::MAX);
        if !is_first {
            name.put(b",");
        }
        write_string(&field.name, &mut name);
        name.put(b":");
        match rest.strip_prefix(&name.finish()?[..]) {
            Some(after) => {
                let (value, after) = after.split_at(length_of_value(after)?);
                values.push(Some(value));
                (rest, is_first) = (after, false);
            }
            None if layout.null == NullRule::Omit => values.push(None),
            None => return None,
        }
    }
    rest.is_empty().then_some(values)
}

/// Returns the values of fields in a document as they stand there, in the order of `names`; `None` for a field that it does
/// not have. What is not a document has no fields.
pub fn values_by_name<'d>(document: &'d [u8], names: &[Bytes]) -> Vec<Option<&'d [u8]>> {
    let mut values = vec![None; names.len()];
    let quoted = names.iter().map(|name| {
        let mut quoted = Json::new(usize::MAX);
        write_string(name, &mut quoted);
        quoted.finish().unwrap_or_default()
    });
    let quoted: Vec<Vec<u8>> = quoted.collect();
    let is_whole = members(document, |name, value| {
        let of = quoted.iter().position(|quoted| quoted == name);
        of.into_iter().for_each(|at| values[at] = Some(value));
    });
    is_whole.map_or_else(|| vec![None; names.len()], |()| values)
}

/// Calls `each` with the name and the value of each member of an object, as they stand there. `None` if it is no object.
pub(super) fn members<'d>(object: &'d [u8], mut each: impl FnMut(&'d [u8], &'d [u8])) -> Option<()> {
    let mut rest = object.strip_prefix(b"{")?.strip_suffix(b"}")?.trim_ascii();
    while !rest.is_empty() {
        let name = rest.trim_ascii_start();
        let (name, after) = name.split_at(length_of_string(name)?);
        let after = after.trim_ascii_start().strip_prefix(b":")?;
        let (value, after) = after.split_at(length_of_value(after)?);
        each(name, value);
        rest = next(after)?;
    }
    Some(())
}

/// The elements of an array as they stand there; `None` in place of one where it is no array.
pub struct Elements<'d> {
    rest: Option<&'d [u8]>,
}

impl<'d> Elements<'d> {
    pub fn of(array: &'d [u8]) -> Self {
        let inside = array.strip_prefix(b"[").and_then(|rest| rest.strip_suffix(b"]"));
        Elements { rest: Some(inside.map_or(&b","[..], <[u8]>::trim_ascii)) }
    }

    fn split(rest: &'d [u8]) -> Option<(&'d [u8], &'d [u8])> {
        let (value, after) = rest.split_at(length_of_value(rest)?);
        Some((value.trim_ascii(), next(after)?))
    }
}

impl<'d> Iterator for Elements<'d> {
    type Item = Option<&'d [u8]>;

    fn next(&mut self) -> Option<Self::Item> {
        let rest = self.rest.take().filter(|rest| !rest.is_empty())?;
        let split = Self::split(rest);
        self.rest = split.map(|(_, rest)| rest);
        Some(split.map(|(value, _)| value))
    }
}

/// Skips the comma that something follows.
fn next(after: &[u8]) -> Option<&[u8]> {
    match after {
        [] => Some(after),
        [b',', more @ ..] if !more.is_empty() => Some(more),
        _ => None,
    }
}

fn length_of_string(text: &[u8]) -> Option<usize> {
    let mut at = text.starts_with(b"\"").then_some(1)?;
    loop {
        at += memchr::memchr2(b'"', b'\\', text.get(at..)?)?;
        match text[at] {
            b'"' => return Some(at + 1),
            _ => at += 2,
        }
    }
}

/// Returns the length of the JSON value at the beginning of `text`, with the whitespace around it, which values of type
/// `json` may have.
fn length_of_value(text: &[u8]) -> Option<usize> {
    let mut values = serde_json::Deserializer::from_slice(text).into_iter::<IgnoredAny>();
    values.next()?.ok()?;
    let end = values.byte_offset();
    let is_space = |byte: &&u8| matches!(byte, b' ' | b'\t' | b'\n' | b'\r');
    let end = end + text[end..].iter().take_while(is_space).count();
    text.get(end).is_none_or(|byte| *byte == b',').then_some(end)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::change::RowBuilder;
    use crate::format::Form;
    use crate::schema::Render;
    use crate::typed::row_type::tests::json_types;
    use proptest::prelude::*;

    fn layout(null: NullRule, names: &[&str], types: &[JsonType]) -> Layout {
        let field = |(cell, name): (usize, &&str)| Field {
            cell,
            name: Bytes::copy_from_slice(name.as_bytes()),
            render: Render::AsIs,
        };
        let fields: Vec<Field> = names.iter().enumerate().map(field).collect();
        Layout { cells: fields.len(), fields, null, ttl_ms: 1, form: Form::Json(types.to_vec()) }
    }

    fn row(cells: &[Option<&[u8]>]) -> Row {
        let mut builder = RowBuilder::with_capacity(64);
        cells.iter().for_each(|cell| builder.cell(*cell));
        builder.row()
    }

    /// `None`: the cell at this index is left out.
    fn partial(cells: &[Cell<'_>]) -> Option<PartialRow> {
        cells.contains(&Cell::Unchanged).then(|| PartialRow::of(cells))
    }

    fn text(write: impl FnOnce(&mut Json)) -> String {
        let mut out = Json::new(usize::MAX);
        write(&mut out);
        String::from_utf8(out.finish().expect("no limit")).expect("UTF-8")
    }

    fn patched(layout: &Layout, types: &[JsonType], old: &str, cells: &[Cell<'_>]) -> Option<String> {
        let mut out = Json::new(usize::MAX);
        patch(layout, types, old.as_bytes(), &partial(cells).expect("a cell is left out"), &mut out)?;
        Some(String::from_utf8(out.finish().expect("no limit")).expect("UTF-8"))
    }

    const TYPES: [JsonType; 3] = [JsonType::Number, JsonType::String, JsonType::Json];
    const NAMES: [&str; 3] = ["id", "a \"b\"", "j"];

    #[test]
    fn a_document_has_the_fields_of_its_row() {
        let cells = [Some(&b"7"[..]), None, Some(b" {\"x\" : 1e999} ")];
        let document = |null| text(|out| write(&layout(null, &NAMES, &TYPES), &TYPES, &row(&cells), out));
        assert_eq!(document(NullRule::Empty), r#"{"id":7,"a \"b\"":null,"j": {"x" : 1e999} }"#);
        assert_eq!(document(NullRule::Omit), r#"{"id":7,"j": {"x" : 1e999} }"#);
        assert_eq!(text(|out| write(&layout(NullRule::Omit, &NAMES, &TYPES), &TYPES, &row(&[None; 3]), out)), "{}");
    }

    #[test]
    fn bytes_that_are_not_utf_8_stay() {
        let mut out = Json::new(usize::MAX);
        let types = [JsonType::String, JsonType::Json];
        let cells = [Some(&b"\xff\"\xfe"[..]), Some(b"\"\xff\"")];
        write(&layout(NullRule::Empty, &["a", "b"], &types), &types, &row(&cells), &mut out);
        assert!(!out.has_misfit());
        assert_eq!(out.finish().expect("no limit"), b"{\"a\":\"\xff\\\"\xfe\",\"b\":\"\xff\"}");
    }

    #[test]
    fn values_that_an_update_leaves_out_are_copied_as_they_stand() {
        let layout = layout(NullRule::Empty, &NAMES, &TYPES);
        let large = r#" {"a,\"b\":" : [1e999, {"a":"}\ud800"}], "a,\"b\":":-0.10}	"#;
        let old = format!(r#"{{"id":7,"a \"b\"":"x\"}},","j":{large}}}"#);
        let new = patched(&layout, &TYPES, &old, &[Cell::Text(b"8"), Cell::Null, Cell::Unchanged]);
        assert_eq!(new.as_deref(), Some(&*format!(r#"{{"id":8,"a \"b\"":null,"j":{large}}}"#)));
        let new = patched(&layout, &TYPES, &old, &[Cell::Text(b"8"), Cell::Unchanged, Cell::Text(b"[]")]);
        assert_eq!(new.as_deref(), Some(r#"{"id":8,"a \"b\"":"x\"},","j":[]}"#));
    }

    #[test]
    fn a_field_that_was_null_and_left_out_comes_and_goes() {
        let layout = layout(NullRule::Omit, &NAMES, &TYPES);
        let new = patched(&layout, &TYPES, r#"{"id":7,"j":1}"#, &[Cell::Text(b"7"), Cell::Text(b"x"), Cell::Unchanged]);
        assert_eq!(new.as_deref(), Some(r#"{"id":7,"a \"b\"":"x","j":1}"#));
        let old = r#"{"id":7,"a \"b\"":"x","j":1}"#;
        let new = patched(&layout, &TYPES, old, &[Cell::Text(b"7"), Cell::Null, Cell::Unchanged]);
        assert_eq!(new.as_deref(), Some(r#"{"id":7,"j":1}"#));
    }

    #[test]
    fn a_document_of_other_fields_is_not_patched() {
        for null in [NullRule::Empty, NullRule::Omit] {
            let layout = layout(null, &NAMES, &TYPES);
            for old in [
                "",
                "{",
                "{}",
                "null",
                r#"{"id":7}"#,
                r#"{"id":7,"a \"b\"":"x"}"#,
                r#"{"id":7,"a \"b\"":"x","j":null}"#,
                r#"{"a \"b\"":"x","id":7,"j":1}"#,
                r#"{"id":7,"a \"b\"":"x","j":1,"k":2}"#,
                r#"{"id":7,"a \"b\"":"x","j":1,}"#,
                r#"{"id":7,,"a \"b\"":"x","j":1}"#,
                r#"{"id":7 "a \"b\"":"x","j":1}"#,
                r#"{"id":7,"a \"b\"":"x","j":1}}"#,
                r#"{"id":7,"a \"b\"":"x","j":1} "#,
                r#"{"id":7,"a \"b\"":"x","j":[1}"#,
                r#"{"id":7,"a \"b\"":"x,"j":1}"#,
                r#"{"id":7, "a \"b\"":"x","j":1}"#,
            ] {
                let cells = [Cell::Text(b"7"), Cell::Text(b"x"), Cell::Unchanged];
                assert_eq!(patched(&layout, &TYPES, old, &cells), None, "{old}");
            }
            let misfit = [Cell::Text(b"seven"), Cell::Text(b"x"), Cell::Unchanged];
            assert_eq!(patched(&layout, &TYPES, r#"{"id":7,"a \"b\"":"x","j":1}"#, &misfit), None);
        }
    }

    proptest! {
        /// Whatever the types and texts are, the patched document is that of the row.
        #[test]
        fn a_patched_document_is_that_of_the_row(
            fields in prop::collection::vec((".{0,4}", json_types()), 1..5),
            cells in prop::collection::vec((
                prop::option::of("[-0-9{}\\[\\](),;:\"\\\\ tfNUL]{0,12}|[0-9]{1,3}|\\{\\}|\\PC{0,8}"),
                prop::option::of("[0-9]{1,3}|\\{\\}|\\[1, 2\\]|\\PC{0,8}"),
                any::<bool>(),
            ), 5),
            null in prop::sample::select(vec![NullRule::Empty, NullRule::Omit]),
        ) {
            let names: Vec<String> = fields.iter().enumerate().map(|(at, (name, _))| format!("{name}{at}")).collect();
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            let types: Vec<JsonType> = fields.into_iter().map(|(_, json_type)| json_type).collect();
            let layout = layout(null, &names, &types);
            let cells = &cells[..names.len()];
            fn bytes(text: &Option<String>) -> Option<&[u8]> {
                text.as_deref().map(str::as_bytes)
            }
            let before: Vec<Option<&[u8]>> = cells.iter().map(|(before, ..)| bytes(before)).collect();
            let after: Vec<Option<&[u8]>> =
                cells.iter().map(|(before, after, stays)| bytes(if *stays { before } else { after })).collect();
            let sent: Vec<Cell<'_>> = cells.iter().zip(&after).map(|((_, _, stays), after)| match (stays, after) {
                (true, _) => Cell::Unchanged,
                (false, Some(text)) => Cell::Text(text),
                (false, None) => Cell::Null,
            }).collect();
            let Some(sent) = partial(&sent) else { return Ok(()) };
            let (old, new) = (text(|out| write(&layout, &types, &row(&before), out)),
                              text(|out| write(&layout, &types, &row(&after), out)));
            let mut out = Json::new(usize::MAX);
            match patch(&layout, &types, old.as_bytes(), &sent, &mut out) {
                Some(()) => prop_assert_eq!(String::from_utf8(out.finish().expect("no limit")).expect("UTF-8"), new),
                // NULL is never left out, nor a text of another type written.
                None => {
                    let lacks = cells.iter().any(|(before, _, stays)| {
                        *stays && before.as_deref().is_none_or(|text| text == "null")
                    });
                    prop_assert!(lacks || out.has_misfit());
                }
            }
        }
    }
}
