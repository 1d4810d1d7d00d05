//! The value of a field as a lookup sees it. Of a hash that is what lies there. Of a document it is the text of a string, any
//! other value as it stands there, and nothing for `null`: what a reader of the document sees is what keys are made of.

use super::{MOST_BYTES, array};
use crate::format::Format;
use crate::schema::{Layout, NullRule};
use crate::typed::document::{self, Elements};
use crate::typed::json::{self, Json};
use bytes::Bytes;
use std::borrow::Cow;
use std::collections::BTreeSet;

/// The most bytes of JSON that a field is looked at. It bounds what a composite value takes, whose text has no names.
const MOST_JSON: usize = 1 << 20;
/// In place of a longer one: it is no part of a key, no array and no number.
const TOO_LONG: Bytes = Bytes::from_static(&[b'?'; MOST_BYTES + 1]);

/// The fields that lookups use, and how they lie in Redis.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fields {
    pub format: Format,
    pub null: NullRule,
    /// The first is one of the key's columns, which every row has.
    pub names: Box<[Bytes]>,
}

impl Fields {
    /// Returns the values in a document, in the order of the names.
    pub fn in_document(&self, document: &[u8]) -> Vec<Option<Bytes>> {
        let values = document::values_by_name(document, &self.names).into_iter();
        values.map(|value| value.and_then(|value| self.of_json(value))).collect()
    }

    /// Returns the value that the field at a place of the layout has, for the text of its cell.
    pub fn of_cell(&self, layout: &Layout, place: usize, text: Option<&[u8]>) -> Option<Bytes> {
        match (text, layout.form.json_types()) {
            (None, _) => self.of_null(),
            (Some(text), None) => Some(Bytes::copy_from_slice(layout.fields[place].render.value(text))),
            (Some(text), Some(types)) => {
                let mut value = Json::new(MOST_JSON);
                // Without types, the table has no rows.
                json::write_nullable(types.get(place)?, Some(text), &mut value);
                value.finish().map_or(Some(TOO_LONG), |value| self.of_json(&value))
            }
        }
    }

    fn of_null(&self) -> Option<Bytes> {
        match self.null {
            NullRule::Empty => Some(Bytes::new()),
            NullRule::Omit => None,
        }
    }

    fn of_json(&self, value: &[u8]) -> Option<Bytes> {
        match value.trim_ascii() {
            b"null" => self.of_null(),
            value if value.len() > MOST_JSON => Some(TOO_LONG),
            value => Some(text(value).into_owned().into()),
        }
    }

    /// Returns the distinct elements that are not NULL. `None` if it is not an array with one dimension, or none.
    pub fn elements<'v>(&self, array: &'v [u8]) -> Option<BTreeSet<Cow<'v, [u8]>>> {
        match self.format {
            Format::Hash => array::elements(array),
            Format::Json | Format::RedisJson => {
                // What begins otherwise has no elements.
                let elements = Elements::of(array).filter(|element| *element != Some(b"null"));
                elements.map(|element| element.filter(|element| !element.starts_with(b"[")).map(text)).collect()
            }
        }
    }
}

fn text(value: &[u8]) -> Cow<'_, [u8]> {
    match value {
        // Bytes, because a string of a `json` column may contain lone surrogates, and other strings what is not UTF-8.
        [b'"', ..] => serde_json::from_slice(value).map_or(Cow::Borrowed(value), |text: Bytes| Cow::Owned(text.into())),
        _ => Cow::Borrowed(value),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(null: NullRule, names: &[&'static str]) -> Fields {
        let names = names.iter().map(|name| Bytes::from_static(name.as_bytes())).collect();
        Fields { format: Format::Json, null, names }
    }

    #[test]
    fn a_document_has_the_values_that_its_reader_sees() {
        let names = ["id", "s", "b", "n", "j", "none", "a \"b\""];
        let document = r#"{"id":7,"s":"x \"y\" \u0001/é","b":true,"n":null,"j": {"a" : [1,2]} ,"a \"b\"":"null"}"#;
        let of = |null| {
            let values = fields(null, &names).in_document(document.as_bytes());
            let text = |value: &Option<Bytes>| value.as_ref().map(|v| String::from_utf8(v.to_vec()).expect("UTF-8"));
            values.iter().map(text).collect::<Vec<_>>()
        };
        let shown = |n: Option<&str>| {
            let values =
                [Some("7"), Some("x \"y\" \u{1}/é"), Some("true"), n, Some(r#"{"a" : [1,2]}"#), None, Some("null")];
            values.iter().map(|value| value.map(str::to_owned)).collect::<Vec<_>>()
        };
        assert_eq!(of(NullRule::Empty), shown(Some("")));
        assert_eq!(of(NullRule::Omit), shown(None));
    }

    #[test]
    fn strings_need_not_be_utf_8() {
        let values = fields(NullRule::Empty, &["a", "b"]).in_document(b"{\"a\":\"\xff\\\"\",\"b\":\"\\ud800x\"}");
        assert_eq!(values, [Some(Bytes::from_static(b"\xff\"")), Some(Bytes::from_static(b"\xed\xa0\x80x"))]);
    }

    #[test]
    fn what_is_no_document_has_no_values() {
        let of = |document: &str| fields(NullRule::Empty, &["a"]).in_document(document.as_bytes());
        for document in [
            "",
            "1",
            "null",
            "[]",
            "{",
            "{}",
            r#"{"b":1}"#,
            r#"{"a":1"#,
            r#"{"a":}"#,
            r#"{"a"1}"#,
            r#"{"a":1,}"#,
            r#"{a:1}"#,
            r#"{"a\"#,
            r#"{"a":1}}"#,
        ] {
            assert_eq!(of(document), [None], "{document}");
        }
        assert_eq!(of(r#"{"b":{"a":2},"a":1}"#), [Some(Bytes::from_static(b"1"))]);
    }

    #[test]
    fn each_element_counts_once_and_null_never() {
        let of = |array: &str| {
            let fields = fields(NullRule::Empty, &[]);
            let elements = fields.elements(array.as_bytes())?;
            Some(elements.iter().map(|element| String::from_utf8_lossy(element).into_owned()).collect::<Vec<_>>())
        };
        for (array, elements) in [
            ("[]", &[][..]),
            (r#"["b","a","b",null,"null"]"#, &["a", "b", "null"]),
            (r#"["a,b","c\"d","[g]",""]"#, &["", "[g]", "a,b", "c\"d"]),
            ("[1,2.50,true]", &["1", "2.50", "true"]),
            (r#"[ {"a":[1]} ,7]"#, &["7", r#"{"a":[1]}"#]),
        ] {
            assert_eq!(
                of(array).as_deref(),
                Some(&elements.iter().map(|e| (*e).to_owned()).collect::<Vec<_>>()[..]),
                "{array}"
            );
        }
        for array in ["", "a", "[[1],[2]]", "[1", "1]", "[1,]", "[,1]", "[1 2]", "{}"] {
            assert_eq!(of(array), None, "{array}");
        }
    }
}
