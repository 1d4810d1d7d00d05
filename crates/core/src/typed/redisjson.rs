//! What RedisJSON makes of a document: it parses it, and prints it when it is read. Integers of 64 bits stay, any other number
//! becomes a double; of members with the same name, the last one stays, and so does the order.
//!
//! Tried with RedisJSON 2.8. A document that it cannot parse would fail a command inside EXEC, so [`refusal`] must know.

use super::document::{Elements, members};
use bytes::Bytes;
use serde::de::{Deserialize, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use std::collections::BTreeMap;
use std::fmt;

/// Returns why RedisJSON does not take a document; `None` if it does.
pub fn refusal(document: &[u8]) -> Option<String> {
    serde_json::from_slice::<Parsed>(document).err().map(|error| error.to_string())
}

/// The same for the value of one of its members, which lies one level deeper.
pub fn refusal_of_member(value: &[u8]) -> Option<String> {
    refusal(&[b"[", value, b"]"].concat())
}

/// JSON that was parsed as RedisJSON does it, and of which nothing is kept.
struct Parsed;

impl<'de> Deserialize<'de> for Parsed {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Parsed)
    }
}

impl<'de> Visitor<'de> for Parsed {
    type Value = Parsed;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_unit<E: Error>(self) -> Result<Parsed, E> {
        Ok(Parsed)
    }

    fn visit_bool<E: Error>(self, _: bool) -> Result<Parsed, E> {
        Ok(Parsed)
    }

    fn visit_i64<E: Error>(self, _: i64) -> Result<Parsed, E> {
        Ok(Parsed)
    }

    fn visit_u64<E: Error>(self, _: u64) -> Result<Parsed, E> {
        Ok(Parsed)
    }

    fn visit_f64<E: Error>(self, _: f64) -> Result<Parsed, E> {
        Ok(Parsed)
    }

    fn visit_str<E: Error>(self, _: &str) -> Result<Parsed, E> {
        Ok(Parsed)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<Parsed, A::Error> {
        while elements.next_element::<Parsed>()?.is_some() {}
        Ok(Parsed)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<Parsed, A::Error> {
        while members.next_entry::<Parsed, Parsed>()?.is_some() {}
        Ok(Parsed)
    }
}

/// Whether `found` is what RedisJSON prints of `written`, but for the order of members. Neither is parsed as a whole: a tree
/// would take many times the memory of its text.
pub fn is_same(written: &[u8], found: &[u8]) -> bool {
    /// More than any document has that is written.
    const DEEPEST: usize = 128;
    is_same_value(written, found, DEEPEST)
}

fn is_same_value(written: &[u8], found: &[u8], deepest: usize) -> bool {
    let (written, found) = (written.trim_ascii(), found.trim_ascii());
    let Some(deepest) = deepest.checked_sub(1) else { return false };
    match (written.first(), found.first()) {
        (Some(b'['), Some(b'[')) => {
            let (mut written, mut found) = (Elements::of(written), Elements::of(found));
            loop {
                match (written.next(), found.next()) {
                    (None, None) => return true,
                    (Some(Some(one)), Some(Some(other))) if is_same_value(one, other, deepest) => {}
                    _ => return false,
                }
            }
        }
        (Some(b'{'), Some(b'{')) => match (by_name(written), by_name(found)) {
            (Some(written), Some(found)) => {
                let is_in_found = |(name, value): (&Bytes, &&[u8])| {
                    found.get(name).is_some_and(|found| is_same_value(value, found, deepest))
                };
                written.len() == found.len() && written.iter().all(is_in_found)
            }
            _ => false,
        },
        (Some(b'"'), Some(b'"')) => match (text(written), text(found)) {
            (Some(written), Some(found)) => written == found,
            _ => false,
        },
        _ => written == found || is_same_number(written, found).unwrap_or(false),
    }
}

/// Of members with the same name, the last one counts.
fn by_name(object: &[u8]) -> Option<BTreeMap<Bytes, &[u8]>> {
    let (mut all, mut are_names) = (BTreeMap::new(), true);
    members(object, |name, value| match text(name) {
        Some(name) => _ = all.insert(name, value),
        None => are_names = false,
    })?;
    are_names.then_some(all)
}

fn text(string: &[u8]) -> Option<Bytes> {
    serde_json::from_slice(string).ok()
}

/// `None` if they are not numbers.
fn is_same_number(written: &[u8], found: &[u8]) -> Option<bool> {
    /// The module's parser may miss the nearest double by one, when it is written and when it is read back from a file.
    const NEARLY: f64 = 2.0 * f64::EPSILON;
    let number = |text: &[u8]| {
        let begins = text.first().is_some_and(|first| first.is_ascii_digit() || *first == b'-');
        std::str::from_utf8(text).ok().filter(|_| begins).map(str::to_owned)
    };
    let (written, found) = (number(written)?, number(found)?);
    if let (Ok(written), Ok(found)) = (written.parse::<i128>(), found.parse::<i128>()) {
        return Some(written == found);
    }
    let (written, found): (f64, f64) = (written.parse().ok()?, found.parse().ok()?);
    Some((written - found).abs() <= NEARLY * written.abs().max(found.abs()))
}

/// Returns the path of a member of the document. `None` for a name that paths have no notation for: RedisJSON takes
/// backslashes in quoted names as they are, and skips spaces before the name.
pub fn path(name: &[u8]) -> Option<Vec<u8>> {
    let is_plain = std::str::from_utf8(name).is_ok()
        && !name.is_empty()
        && !name[0].is_ascii_whitespace()
        && !name.iter().any(|byte| matches!(byte, b'"' | b'\\' | b'\''));
    is_plain.then(|| [&b"$[\""[..], name, b"\"]"].concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_printed_is_the_same() {
        // As RedisJSON 2.8 printed what was written.
        for (written, found) in [
            (r#"{"n":1.50,"f":1e30,"t":0.0000001}"#, r#"{"n":1.5,"f":1e30,"t":1e-7}"#),
            (r#"{"big":12345678901234567890123}"#, r#"{"big":1.2345678901234568e22}"#),
            (
                r#"{"i":9007199254740993,"u":18446744073709551615}"#,
                r#"{"i":9007199254740993,"u":18446744073709551615}"#,
            ),
            (r#"{"o":{"b":1,"a":2,"b":3}}"#, r#"{"o":{"b":3,"a":2}}"#),
            (r#"{"s":"\u00e9\u0001\/\"", "j": [ 1 ]}"#, r#"{"s":"é\u0001/\"","j":[1]}"#),
            (r#"{"a":1,"b":null}"#, r#"{"b":null,"a":1}"#),
            (r#"{"z":-0.0}"#, r#"{"z":-0.0}"#),
        ] {
            assert!(is_same(written.as_bytes(), found.as_bytes()), "{written} {found}");
        }
    }

    #[test]
    fn other_documents_are_not_the_same() {
        let document = r#"{"a":1,"b":"x","c":[1,2]}"#;
        for found in [
            "",
            "1",
            r#"{"a":1,"b":"x"}"#,
            r#"{"a":2,"b":"x","c":[1,2]}"#,
            r#"{"a":"1","b":"x","c":[1,2]}"#,
            r#"{"a":1.0000001,"b":"x","c":[1,2]}"#,
            r#"{"a":1,"b":"x","c":[2,1]}"#,
            r#"{"a":1,"b":"x","c":[1,2],"d":null}"#,
        ] {
            assert!(!is_same(document.as_bytes(), found.as_bytes()), "{found}");
        }
        assert!(!is_same(br#"{"i":9007199254740993}"#, br#"{"i":9007199254740992}"#));
        for (written, found) in
            [("[1]", "[1"), ("[1,2]", "[1,2,3]"), ("{", "{"), ("[]", "{}"), ("\"1\"", "1"), ("true", "false")]
        {
            assert!(!is_same(written.as_bytes(), found.as_bytes()) || written == found, "{written} {found}");
        }
        // As a module that parses more exactly prints it.
        assert!(is_same(b"0.1234567890123456789", b"0.12345678901234568"));
    }

    #[test]
    fn what_the_module_cannot_parse_is_known_before() {
        let deep = format!("{}{}", "[".repeat(200), "]".repeat(200));
        for json in [r#"{"a":"\ud800"}"#, r#"{"a":1e999}"#, &deep, "{", "\"\u{1}\""] {
            assert!(refusal(json.as_bytes()).is_some(), "{json}");
        }
        assert!(refusal(b"\"\xff\"").is_some());
        // A member lies one level deeper than the whole.
        let nested = |depth: usize| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
        assert_eq!([127, 128].map(|depth| refusal(nested(depth).as_bytes()).is_some()), [false, true]);
        assert_eq!([126, 127].map(|depth| refusal_of_member(nested(depth).as_bytes()).is_some()), [false, true]);
        for json in [r#"{"a":"\ud83d\ude00"}"#, "1e300", "-0.0", "null", r#""x""#] {
            assert_eq!(refusal(json.as_bytes()), None, "{json}");
        }
    }

    #[test]
    fn a_name_with_quotes_has_no_path() {
        assert_eq!(path("größe]".as_bytes()).as_deref(), Some("$[\"größe]\"]".as_bytes()));
        for name in ["a\"b", "a\\b", "a'b", " a", ""] {
            assert_eq!(path(name.as_bytes()), None);
        }
    }
}
