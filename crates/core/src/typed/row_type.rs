//! What `row_to_json` makes of each column of a table, and the short text in which the checkpoint keeps that.
//!
//! The text lists the fields in the order of the columns, each as the length of its name, a colon, the name, then `!` if
//! an empty value is the empty string (otherwise it is NULL), and its type:
//!
//! | type | |
//! |---|---|
//! | `n` `b` `j` `s` | number, boolean, JSON, and anything that becomes a string |
//! | `t` `z` | timestamp without and with time zone |
//! | `[`, a delimiter, a type | array |
//! | `v`, a type | oidvector, int2vector |
//! | `(`, attributes, `)` | composite type; each attribute as a field, without `!` |
//!
//! For example `2:idn4:name!s4:tags[,s`. The format is stable, as that of the checkpoint is.

use super::Rest;
use crate::schema::{Field, Layout, NullRule};
use std::fmt::Write;
use std::sync::Arc;

/// Deeper descriptions are not read: they cannot come from a table, and reading one must not exhaust the stack.
pub const DEEPEST: usize = 32;

/// How the text of a value becomes JSON.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum JsonType {
    /// Also what JSON has no form for: dates, UUIDs, ranges, enums.
    String,
    Number,
    Boolean,
    Timestamp,
    TimestampTz,
    /// `json` and `jsonb`.
    Json,
    Array {
        delimiter: u8,
        of: Box<JsonType>,
    },
    /// Written without braces, with spaces in between.
    Vector(Box<JsonType>),
    Composite(Vec<Attribute>),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attribute {
    pub name: String,
    pub json_type: JsonType,
}

/// What an empty value means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Empty {
    Null,
    Text,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FieldType {
    pub name: String,
    pub json_type: JsonType,
    pub empty: Empty,
}

/// The fields of a table's rows, in the order of its columns.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RowType(pub Vec<FieldType>);

/// A [`RowType`] as the checkpoint has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EncodedRowType(pub Arc<str>);

impl JsonType {
    /// Whether the empty text can be a value. Other types always print something.
    pub fn may_be_empty(&self) -> bool {
        matches!(self, JsonType::String | JsonType::Vector(_))
    }

    /// Returns its part of an [`EncodedRowType`].
    pub fn encoded(&self) -> String {
        let mut out = String::new();
        self.encode(&mut out);
        out
    }

    /// See [`RowType::is_like`].
    fn is_like(&self, other: &JsonType) -> bool {
        match (self, other) {
            (JsonType::Array { delimiter, of }, JsonType::Array { delimiter: other_delimiter, of: other }) => {
                delimiter == other_delimiter && of.is_like(other)
            }
            (JsonType::Vector(of), JsonType::Vector(other)) => of.is_like(other),
            (JsonType::Composite(attributes), JsonType::Composite(others)) => {
                let is_like = |(one, other): (&Attribute, &Attribute)| one.json_type.is_like(&other.json_type);
                attributes.len() == others.len() && attributes.iter().zip(others).all(is_like)
            }
            (one, other) => one == other,
        }
    }

    fn encode(&self, out: &mut String) {
        match self {
            JsonType::String => out.push('s'),
            JsonType::Number => out.push('n'),
            JsonType::Boolean => out.push('b'),
            JsonType::Timestamp => out.push('t'),
            JsonType::TimestampTz => out.push('z'),
            JsonType::Json => out.push('j'),
            JsonType::Array { delimiter, of } => {
                out.push('[');
                out.push(char::from(*delimiter));
                of.encode(out);
            }
            JsonType::Vector(of) => {
                out.push('v');
                of.encode(out);
            }
            JsonType::Composite(attributes) => {
                out.push('(');
                for Attribute { name, json_type } in attributes {
                    push_name(name, out);
                    json_type.encode(out);
                }
                out.push(')');
            }
        }
    }
}

fn push_name(name: &str, out: &mut String) {
    write!(out, "{}:{name}", name.len()).expect("a String takes any text");
}

/// What a column of a table becomes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ColumnType {
    pub json_type: JsonType,
    pub may_be_null: bool,
    /// Why `json_type` is not all of what `row_to_json` makes of it.
    pub inexact: Option<Inexact>,
}

/// Why what `row_to_json` makes of a type cannot be reproduced. A typed read then shows a string.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Inexact {
    /// This type has a cast to json of its own, which `row_to_json` calls.
    OwnCast(String),
    /// It consists of too many types.
    TooLarge,
}

impl RowType {
    /// `column`: the type of the column at a cell.
    pub fn of(layout: &Layout, column: impl Fn(usize) -> ColumnType) -> Self {
        let mut fields: Vec<&Field> = layout.fields.iter().collect();
        fields.sort_by_key(|field| field.cell);
        let field_type = |field: &Field| {
            let ColumnType { json_type, may_be_null, .. } = column(field.cell);
            let empty = match layout.null {
                // NULL is no field.
                NullRule::Omit => Empty::Text,
                NullRule::Empty if may_be_null || !json_type.may_be_empty() => Empty::Null,
                NullRule::Empty => Empty::Text,
            };
            FieldType { name: String::from_utf8_lossy(&field.name).into_owned(), json_type, empty }
        };
        RowType(fields.into_iter().map(field_type).collect())
    }

    pub fn encode(&self) -> EncodedRowType {
        let mut out = String::new();
        for FieldType { name, json_type, empty } in &self.0 {
            push_name(name, &mut out);
            match empty {
                Empty::Null => {}
                Empty::Text => out.push('!'),
            }
            json_type.encode(&mut out);
        }
        EncodedRowType(out.into())
    }

    /// Whether the texts of a row of one are those of a row of the other: neither the meaning of an empty value shows in
    /// them, nor the names of attributes.
    fn is_like(&self, other: &RowType) -> bool {
        let is_like =
            |(one, other): (&FieldType, &FieldType)| one.name == other.name && one.json_type.is_like(&other.json_type);
        self.0.len() == other.0.len() && self.0.iter().zip(&other.0).all(is_like)
    }
}

impl EncodedRowType {
    /// Returns `None` for a text of another format.
    pub fn decode(&self) -> Option<RowType> {
        let mut rest = Rest(self.0.as_bytes());
        let mut fields = Vec::new();
        while !rest.0.is_empty() {
            let name = rest.name()?;
            let empty = if rest.skips(b'!') { Empty::Text } else { Empty::Null };
            fields.push(FieldType { name, empty, json_type: rest.json_type(DEEPEST)? });
        }
        Some(RowType(fields))
    }

    /// See [`RowType::is_like`].
    pub fn is_like(&self, other: &EncodedRowType) -> bool {
        let decoded = || Some(self.decode()?.is_like(&other.decode()?));
        self == other || decoded().unwrap_or(false)
    }
}

impl Rest<'_> {
    fn name(&mut self) -> Option<String> {
        let length = std::str::from_utf8(self.until(|byte| byte == b':')?).ok()?.parse().ok()?;
        let (name, rest) = self.0[1..].split_at_checked(length)?;
        self.0 = rest;
        String::from_utf8(name.to_vec()).ok()
    }

    fn json_type(&mut self, deepest: usize) -> Option<JsonType> {
        let deeper = deepest.checked_sub(1)?;
        Some(match self.next()? {
            b's' => JsonType::String,
            b'n' => JsonType::Number,
            b'b' => JsonType::Boolean,
            b't' => JsonType::Timestamp,
            b'z' => JsonType::TimestampTz,
            b'j' => JsonType::Json,
            b'[' => {
                let delimiter = self.next().filter(u8::is_ascii)?;
                JsonType::Array { delimiter, of: Box::new(self.json_type(deeper)?) }
            }
            b'v' => JsonType::Vector(Box::new(self.json_type(deeper)?)),
            b'(' => {
                let mut attributes = Vec::new();
                while !self.skips(b')') {
                    attributes.push(Attribute { name: self.name()?, json_type: self.json_type(deeper)? });
                }
                JsonType::Composite(attributes)
            }
            _ => return None,
        })
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    pub fn json_types() -> impl Strategy<Value = JsonType> {
        use JsonType::{Boolean, Json, Number, String, Timestamp, TimestampTz};
        let simple = prop::sample::select(vec![String, Number, Boolean, Timestamp, TimestampTz, Json]);
        simple.prop_recursive(4, 20, 3, |inner| {
            let named = (".{0,5}", inner.clone()).prop_map(|(name, json_type)| Attribute { name, json_type });
            prop_oneof![
                (prop::sample::select(b",;!(".to_vec()), inner.clone())
                    .prop_map(|(delimiter, of)| JsonType::Array { delimiter, of: Box::new(of) }),
                inner.prop_map(|of| JsonType::Vector(Box::new(of))),
                prop::collection::vec(named, 0..3).prop_map(JsonType::Composite),
            ]
        })
    }

    pub fn row_types() -> impl Strategy<Value = RowType> {
        let empty = prop::sample::select(vec![Empty::Null, Empty::Text]);
        let field =
            (".{0,6}", json_types(), empty).prop_map(|(name, json_type, empty)| FieldType { name, json_type, empty });
        prop::collection::vec(field, 0..5).prop_map(RowType)
    }

    proptest! {
        #[test]
        fn reads_what_it_wrote(row in row_types()) {
            prop_assert_eq!(row.encode().decode(), Some(row));
        }

        #[test]
        fn garbage_is_no_panic(text in "[0-9:!nbjstzv()\\[,ü]{0,30}") {
            if let Some(row) = EncodedRowType(text.into()).decode() {
                prop_assert_eq!(row.encode().decode(), Some(row));
            }
        }
    }

    #[test]
    fn the_format_is_settled() {
        let settled = "2:idn4:name!s4:tags[,s3:box[;s6:moment(1:at1:bz)4:oldsvn2:ün1:dj";
        let encoded = EncodedRowType(settled.into());
        let row = encoded.decode().expect("the settled format");
        assert_eq!(row.encode(), encoded);
        let names: Vec<&str> = row.0.iter().map(|field| field.name.as_str()).collect();
        assert_eq!(names, ["id", "name", "tags", "box", "moment", "olds", "ü", "d"]);
        assert_eq!((row.0[0].empty, row.0[1].empty), (Empty::Null, Empty::Text));
    }

    #[test]
    fn rows_are_alike_if_their_texts_are() {
        let like = |one: &str, other: &str| EncodedRowType(one.into()).is_like(&EncodedRowType(other.into()));
        let row = "2:idn1:a[,(1:xs1:yvn)";
        for other in [row, "2:id!n1:a[,(1:xs1:yvn)", "2:idn1:a[,(3:news1:yvn)"] {
            assert!(like(row, other), "{other}");
        }
        for other in [
            "2:idn",
            "2:idn1:b[,(1:xs1:yvn)",
            "2:idn1:a[;(1:xs1:yvn)",
            "2:idn1:a[,(1:xn1:yvn)",
            "2:idn1:a[,(1:xs)",
            "2:idn1:a[,(1:xs1:yvs)",
            "1:a[,(1:xs1:yvn)2:idn",
            "?",
        ] {
            assert!(!like(row, other), "{other}");
        }
    }

    #[test]
    fn a_description_that_is_too_deep_is_refused() {
        let nested = |depth: usize| EncodedRowType(format!("1:a{}s", "[,".repeat(depth)).into()).decode();
        assert!(nested(DEEPEST - 1).is_some());
        assert!(nested(DEEPEST).is_none() && nested(1_000_000).is_none());
    }
}
