//! Writes a row as JSON, byte for byte as `row_to_json` does, from the texts of its values.
//!
//! The texts are those that lie in Redis: of the types' output functions, under the settings of the session that read
//! them (ISO dates, UTC). A text that its type cannot have is written as a string, and noted: whatever lies there, the
//! result is JSON. Bytes that are not UTF-8 are passed on. `json` and `jsonb` are checked and passed on as they are, because parsing and printing them again would lose
//! duplicate names, lone surrogates and the digits of numbers.
//!
//! `datum_to_json`, `array_dim_to_json`, `composite_to_json` and `escape_json` in json.c; `JsonEncodeDateTime`;
//! `array_out`; `record_out`

use super::Rest;
use super::row_type::{Attribute, Empty, FieldType, JsonType, RowType};
use serde::de::IgnoredAny;
use std::borrow::Cow;

/// The dimensions that an array may have: `MAXDIM`.
const DIMENSIONS: usize = 6;

/// JSON that is being written.
#[derive(Debug)]
pub struct Json {
    bytes: Vec<u8>,
    /// The length of all that was to be written.
    length: usize,
    most_bytes: usize,
    has_misfit: bool,
}

impl Json {
    /// `most_bytes`: a composite value may be many times as long as its text, because the names of attributes are not in it.
    pub fn new(most_bytes: usize) -> Self {
        Json { bytes: Vec::new(), length: 0, most_bytes, has_misfit: false }
    }

    /// Appends a part of what is written.
    pub fn put(&mut self, part: &[u8]) {
        self.length += part.len();
        // The rest is not kept: it may be far more.
        if self.length <= self.most_bytes {
            self.bytes.extend_from_slice(part);
        }
    }

    /// Its length, also of what was not kept.
    pub fn length(&self) -> usize {
        self.length
    }

    /// Whether a text was not one that its type can have.
    pub fn has_misfit(&self) -> bool {
        self.has_misfit
    }

    /// Returns `None` if it is too long.
    pub fn finish(self) -> Option<Vec<u8>> {
        (self.length <= self.most_bytes).then_some(self.bytes)
    }

    fn misfit(&mut self, text: &[u8]) {
        self.has_misfit = true;
        write_string(text, self);
    }
}

/// Appends a row. `value` returns the text of a field, and `None` for one that the hash does not have.
pub fn write_row<'v>(RowType(fields): &RowType, value: impl Fn(&str) -> Option<&'v [u8]>, out: &mut Json) {
    out.put(b"{");
    for (at, FieldType { name, json_type, empty }) in fields.iter().enumerate() {
        if at > 0 {
            out.put(b",");
        }
        write_string(name.as_bytes(), out);
        out.put(b":");
        let text = value(name).filter(|text| !(text.is_empty() && *empty == Empty::Null));
        write_nullable(json_type, text, out);
    }
    out.put(b"}");
}

/// Appends a value; `None` is NULL.
pub fn write_nullable(json_type: &JsonType, text: Option<&[u8]>, out: &mut Json) {
    match text {
        Some(text) => write_value(json_type, text, out),
        None => out.put(b"null"),
    }
}

/// Appends a string, as `escape_json`.
pub fn write_string(text: &[u8], out: &mut Json) {
    out.put(b"\"");
    let mut rest = text;
    while let Some(at) = rest.iter().position(|byte| matches!(byte, 0..0x20 | b'"' | b'\\')) {
        out.put(&rest[..at]);
        match rest[at] {
            b'"' => out.put(b"\\\""),
            b'\\' => out.put(b"\\\\"),
            b'\n' => out.put(b"\\n"),
            b'\r' => out.put(b"\\r"),
            b'\t' => out.put(b"\\t"),
            0x08 => out.put(b"\\b"),
            0x0c => out.put(b"\\f"),
            control => out.put(format!("\\u{control:04x}").as_bytes()),
        }
        rest = &rest[at + 1..];
    }
    out.put(rest);
    out.put(b"\"");
}

fn write_value(json_type: &JsonType, text: &[u8], out: &mut Json) {
    match (json_type, text) {
        (JsonType::String, text) => write_string(text, out),
        (JsonType::Number, number) if is_number(number) => out.put(number),
        (JsonType::Number, text @ (b"NaN" | b"Infinity" | b"-Infinity")) => write_string(text, out),
        // In a field it is a word; inside arrays and composites it is a letter.
        (JsonType::Boolean, b"t" | b"true") => out.put(b"true"),
        (JsonType::Boolean, b"f" | b"false") => out.put(b"false"),
        (JsonType::Json, json) if serde_json::from_slice::<IgnoredAny>(json).is_ok() => out.put(json),
        (JsonType::Timestamp, time) => write_time(time, b"", out),
        (JsonType::TimestampTz, time) => write_time(time, b":00", out),
        (JsonType::Array { delimiter, of }, array) => {
            or_string(array, out, |out| write_array(*delimiter, of, array, out));
        }
        (JsonType::Vector(of), vector) => {
            let items = vector.split(|byte| *byte == b' ').filter(|item| !item.is_empty());
            write_list(items, out, |item, out| write_value(of, item, out));
        }
        (JsonType::Composite(attributes), row) => or_string(row, out, |out| write_composite(attributes, row, out)),
        (JsonType::Number | JsonType::Boolean | JsonType::Json, text) => out.misfit(text),
    }
}

fn write_list<T>(items: impl Iterator<Item = T>, out: &mut Json, write: impl Fn(T, &mut Json)) {
    out.put(b"[");
    for (at, item) in items.enumerate() {
        if at > 0 {
            out.put(b",");
        }
        write(item, out);
    }
    out.put(b"]");
}

/// Appends what `write` does, or else `text` as a string.
fn or_string(text: &[u8], out: &mut Json, write: impl FnOnce(&mut Json) -> Option<()>) {
    let (kept, length) = (out.bytes.len(), out.length);
    if write(out).is_none() {
        out.bytes.truncate(kept);
        out.length = length;
        out.misfit(text);
    }
}

/// Appends a timestamp. `minutes` follow its zone, which is UTC; infinity has none.
fn write_time(time: &[u8], minutes: &[u8], out: &mut Json) {
    let (date_and_time, era) = match time.strip_suffix(b" BC") {
        Some(rest) => (rest, &b" BC"[..]),
        None => (time, &b""[..]),
    };
    let mut iso = date_and_time.to_vec();
    if let Some(space) = iso.iter().position(|byte| *byte == b' ') {
        iso[space] = b'T';
    }
    if iso.ends_with(b"+00") {
        iso.extend_from_slice(minutes);
    }
    iso.extend_from_slice(era);
    write_string(&iso, out);
}

fn is_number(text: &[u8]) -> bool {
    let digits = |text: &[u8]| text.iter().take_while(|byte| byte.is_ascii_digit()).count();
    let text = text.strip_prefix(b"-").unwrap_or(text);
    let whole = digits(text);
    if whole == 0 || (whole > 1 && text[0] == b'0') {
        return false;
    }
    let mut text = &text[whole..];
    if let Some(fraction) = text.strip_prefix(b".") {
        let places = digits(fraction);
        if places == 0 {
            return false;
        }
        text = &fraction[places..];
    }
    if let Some((b'e' | b'E', exponent)) = text.split_first() {
        let exponent = exponent.strip_prefix(b"-").or(exponent.strip_prefix(b"+")).unwrap_or(exponent);
        let places = digits(exponent);
        return places > 0 && places == exponent.len();
    }
    text.is_empty()
}

fn write_array(delimiter: u8, of: &JsonType, text: &[u8], out: &mut Json) -> Option<()> {
    let mut rest = Rest(text);
    // Lower bounds other than 1: `[0:1][2:3]={{…`. JSON arrays have none.
    if text.starts_with(b"[") {
        rest.until(|byte| byte == b'=')?;
        rest.skips(b'=');
    }
    write_dimension(delimiter, of, &mut rest, DIMENSIONS, out)?;
    rest.0.is_empty().then_some(())
}

/// `{1,"a b",NULL}`, or such ones between braces.
fn write_dimension(delimiter: u8, of: &JsonType, rest: &mut Rest<'_>, deepest: usize, out: &mut Json) -> Option<()> {
    let deeper = deepest.checked_sub(1)?;
    if !rest.skips(b'{') {
        return None;
    }
    out.put(b"[");
    if rest.skips(b'}') {
        out.put(b"]");
        return Some(());
    }
    loop {
        if rest.0.starts_with(b"{") {
            write_dimension(delimiter, of, rest, deeper, out)?;
        } else if rest.skips(b'"') {
            write_value(of, &quoted_element(rest)?, out);
        } else {
            match rest.until(|byte| byte == delimiter || byte == b'}')? {
                b"" => return None,
                b"NULL" => out.put(b"null"),
                element => write_value(of, element, out),
            }
        }
        if rest.skips(delimiter) {
            out.put(b",");
        } else {
            out.put(b"]");
            return rest.skips(b'}').then_some(());
        }
    }
}

/// Returns an element whose opening quote was skipped.
fn quoted_element(rest: &mut Rest<'_>) -> Option<Vec<u8>> {
    let mut element = Vec::new();
    loop {
        element.extend_from_slice(rest.until(|byte| matches!(byte, b'"' | b'\\'))?);
        if rest.skips(b'"') {
            return Some(element);
        }
        rest.skips(b'\\');
        element.push(rest.next()?);
    }
}

/// `(1,"a b",)`, where nothing is NULL.
fn write_composite(attributes: &[Attribute], text: &[u8], out: &mut Json) -> Option<()> {
    let mut rest = Rest(text);
    if !rest.skips(b'(') {
        return None;
    }
    out.put(b"{");
    for (at, Attribute { name, json_type }) in attributes.iter().enumerate() {
        if at > 0 {
            out.put(b",");
            if !rest.skips(b',') {
                return None;
            }
        }
        write_string(name.as_bytes(), out);
        out.put(b":");
        write_nullable(json_type, attribute(&mut rest)?.as_deref(), out);
    }
    out.put(b"}");
    (rest.skips(b')') && rest.0.is_empty()).then_some(())
}

/// Returns the text of an attribute, or `Some(None)` for NULL.
fn attribute<'a>(rest: &mut Rest<'a>) -> Option<Option<Cow<'a, [u8]>>> {
    if !rest.skips(b'"') {
        let text = rest.until(|byte| matches!(byte, b',' | b')'))?;
        return Some((!text.is_empty()).then_some(text.into()));
    }
    let mut text = Vec::new();
    loop {
        text.extend_from_slice(rest.until(|byte| matches!(byte, b'"' | b'\\'))?);
        // Both are doubled inside quotes.
        if rest.skips(b'\\') {
            text.push(b'\\');
            if !rest.skips(b'\\') {
                return None;
            }
        } else if rest.skips(b'"') && !rest.skips(b'"') {
            return Some(Some(text.into()));
        } else {
            text.push(b'"');
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::typed::row_type::EncodedRowType;
    use crate::typed::row_type::tests::row_types;
    use proptest::prelude::*;
    use std::collections::HashMap;

    /// A row of one field, `a`, of this encoded type.
    fn value(encoded: &str, text: impl AsRef<[u8]>) -> String {
        let row = EncodedRowType(format!("1:a{encoded}").into()).decode().expect("an encoded type");
        let mut out = Json::new(usize::MAX);
        write_row(&row, |name| (name == "a").then_some(text.as_ref()), &mut out);
        let row = String::from_utf8(out.finish().expect("no limit")).expect("JSON is text");
        assert!(serde_json::from_str::<IgnoredAny>(&row).is_ok(), "{row}");
        row.strip_prefix("{\"a\":").and_then(|row| row.strip_suffix('}')).expect("one field").to_owned()
    }

    /// As `row_to_json` of Postgres 15 writes them. A test with a server compares values of every built-in type.
    #[test]
    fn values_are_written_as_postgres_writes_them() {
        for (encoded, text, expected) in [
            ("n", "-0", "-0"),
            ("n", "1e+300", "1e+300"),
            ("n", "12345678901234567890123.4500", "12345678901234567890123.4500"),
            ("n", "NaN", "\"NaN\""),
            ("n", "-Infinity", "\"-Infinity\""),
            ("b", "true", "true"),
            ("b", "false", "false"),
            ("[,b", "{t,f,NULL}", "[true,false,null]"),
            ("j", r#"{"a" :  1e999, "a": "\ud800"}"#, r#"{"a" :  1e999, "a": "\ud800"}"#),
            ("j", "null", "null"),
            ("s", "a\tb\nc\r\u{8}\u{b}\u{c}\u{1f}\u{7f}\"\\/ü", r#""a\tb\nc\r\b\u000b\f\u001f"#),
            ("t", "2024-01-02 03:04:05.000001", "\"2024-01-02T03:04:05.000001\""),
            ("t", "0001-01-01 00:00:00 BC", "\"0001-01-01T00:00:00 BC\""),
            ("t", "infinity", "\"infinity\""),
            ("z", "2024-01-01 21:19:05+00", "\"2024-01-01T21:19:05+00:00\""),
            ("z", "0044-03-15 12:00:00+00 BC", "\"0044-03-15T12:00:00+00:00 BC\""),
            ("z", "-infinity", "\"-infinity\""),
            ("[,n", "{}", "[]"),
            ("[,n", "{{1,2},{3,NULL}}", "[[1,2],[3,null]]"),
            ("[,n", "[-1:0][5:5]={{1},{NaN}}", "[[1],[\"NaN\"]]"),
            ("[,s", r#"{a,"b \"q\"",NULL,"NULL","","\\"}"#, r#"["a","b \"q\"",null,"NULL","","\\"]"#),
            ("[;s", "{(1,1),(0,0);(3,3),(2,2)}", "[\"(1,1),(0,0)\",\"(3,3),(2,2)\"]"),
            ("[,[,s", r#"{"{a,\"b,c\"}",NULL}"#, r#"[["a","b,c"],null]"#),
            ("[,j", r#"{"{\"a\": [1, 2]}",NULL,"null"}"#, r#"[{"a": [1, 2]},null,null]"#),
            ("[,z", r#"{"2024-07-01 00:00:00+00"}"#, "[\"2024-07-01T00:00:00+00:00\"]"),
            ("vn", "1 2", "[1,2]"),
            ("!vs", "", "[]"),
            ("(1:an1:bs)", r#"(1,"x,y")"#, r#"{"a":1,"b":"x,y"}"#),
            ("(1:an1:bs)", "(,)", r#"{"a":null,"b":null}"#),
            ("(1:an1:bs)", r#"(2,"")"#, r#"{"a":2,"b":""}"#),
            ("(1:as)", r#"("a ""q"" \\ (b)")"#, r#"{"a":"a \"q\" \\ (b)"}"#),
            ("(1:a(1:bb1:c[,n))", r#"("(t,""{1,2}"")")"#, r#"{"a":{"b":true,"c":[1,2]}}"#),
            ("()", "()", "{}"),
            ("[,(1:an1:bs)", r#"{"(1,\"a b\")",NULL}"#, r#"[{"a":1,"b":"a b"},null]"#),
        ] {
            let written = value(encoded, text);
            match expected.starts_with("\"a\\tb") {
                true => assert!(written.starts_with(expected) && written.ends_with("\u{7f}\\\"\\\\/ü\""), "{written}"),
                false => assert_eq!(written, expected, "{encoded} {text}"),
            }
        }
    }

    #[test]
    fn bytes_that_are_not_utf_8_are_passed_on() {
        let mut out = Json::new(usize::MAX);
        write_string(b"a\xff\"\xfeb", &mut out);
        assert_eq!(out.finish().expect("no limit"), b"\"a\xff\\\"\xfeb\"");
    }

    #[test]
    fn what_a_type_cannot_have_becomes_a_string() {
        for (encoded, text) in [
            ("n", "01"),
            ("n", "1."),
            ("n", ".5"),
            ("n", "1e"),
            ("n", "+1"),
            ("n", "1 "),
            ("n", "0x1F"),
            ("b", "yes"),
            ("j", "{"),
            ("j", "1 2"),
            ("j", "'a'"),
            ("j", "\u{0}"),
            ("[,n", "1,2"),
            ("[,n", "{1,2"),
            ("[,n", "{1}}"),
            ("[,n", "{1,}"),
            ("[,n", "[0:1]"),
            ("[,s", "{\"a"),
            ("[,s", "{\"a\\"),
            ("[,s", "{{{{{{{1}}}}}}}"),
            ("(1:an)", "(1,2)"),
            ("(1:an1:bn)", "(1)"),
            ("(1:an)", "(1"),
            ("(1:as)", "(\"a"),
            ("(1:as)", "(\"a\\b\")"),
            ("(1:as)", "1"),
        ] {
            let string = serde_json::Value::from(text).to_string();
            assert_eq!(value(encoded, text), string, "{encoded} {text}");
        }
    }

    #[test]
    fn nothing_is_null_or_the_empty_string() {
        assert_eq!([value("s", ""), value("n", ""), value("!s", "")], ["null", "null", "\"\""]);
        let row = EncodedRowType("1:b!s1:an".into()).decode().expect("an encoded row");
        let mut out = Json::new(usize::MAX);
        write_row(&row, |name| (name == "a").then_some(b"1"), &mut out);
        assert_eq!(out.finish().expect("no limit"), br#"{"b":null,"a":1}"#, "in the order of the columns");
    }

    #[test]
    fn what_is_too_long_is_not_kept() {
        let row = EncodedRowType("1:a[,(4:longs1:bs)".into()).decode().expect("an encoded row");
        let expected = br#"{"a":[{"long":null,"b":null},{"long":null,"b":"x"}]}"#;
        for most_bytes in 0..=expected.len() {
            let mut out = Json::new(most_bytes);
            write_row(&row, |_| Some(br#"{"(,)","(,x)"}"#), &mut out);
            assert!(out.bytes.len() <= most_bytes && out.length() == expected.len());
            assert_eq!(out.finish().is_some(), most_bytes == expected.len(), "{most_bytes}");
        }
    }

    #[test]
    fn deep_json_is_passed_on() {
        let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
        assert_eq!(value("j", &deep), deep);
    }

    proptest! {
        #[test]
        fn whatever_lies_there_becomes_json(
            row in row_types(),
            texts in prop::collection::vec(
                prop_oneof!["[-0-9.eE{}\\[\\](),;:\"\\\\= tfNUL]{0,20}", "\\PC{0,10}", "[\0-\u{20}\u{7f}ü]{0,8}"], 5),
        ) {
            let of: HashMap<&str, &str> = row.0.iter().map(|f| f.name.as_str()).zip(texts.iter().map(String::as_str)).collect();
            let mut out = Json::new(usize::MAX);
            write_row(&row, |name| of.get(name).map(|text| text.as_bytes()), &mut out);
            let out = out.finish().expect("no limit");
            prop_assert!(serde_json::from_slice::<IgnoredAny>(&out).is_ok(), "{}", String::from_utf8_lossy(&out));
            prop_assert!(std::str::from_utf8(&out).is_ok());
        }
    }
}
