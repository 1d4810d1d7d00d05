//! What RedisJSON makes of a document: it parses it, and prints it when it is read. Integers of 64 bits stay, any other number
//! becomes a double; of members with the same name, the last one stays, and so does the order.
//!
//! Tried with RedisJSON 2.8. A document that it cannot parse would fail a command inside EXEC, so [`refusal`] must know.

use serde_json::{Number, Value};

/// Returns why RedisJSON does not take a document or a value; `None` if it does.
pub fn refusal(json: &[u8]) -> Option<String> {
    match serde_json::from_slice::<Value>(json) {
        Ok(value) => holds_no_double(&value).then(|| "it has a number that no double can be".to_owned()),
        Err(error) => Some(error.to_string()),
    }
}

/// Whether a number is out of range. Usually the parser says so.
fn holds_no_double(value: &Value) -> bool {
    match value {
        Value::Number(number) => !number.as_f64().is_some_and(f64::is_finite),
        Value::Array(elements) => elements.iter().any(holds_no_double),
        Value::Object(members) => members.values().any(holds_no_double),
        Value::Null | Value::Bool(_) | Value::String(_) => false,
    }
}

/// Whether `found` is what RedisJSON prints of `written`, but for the order of members.
pub fn is_same(written: &[u8], found: &[u8]) -> bool {
    match (serde_json::from_slice(written), serde_json::from_slice(found)) {
        (Ok(written), Ok(found)) => are_equal(&written, &found),
        _ => false,
    }
}

fn are_equal(one: &Value, other: &Value) -> bool {
    match (one, other) {
        (Value::Number(one), Value::Number(other)) => are_equal_numbers(one, other),
        (Value::Array(one), Value::Array(other)) => {
            one.len() == other.len() && one.iter().zip(other).all(|(one, other)| are_equal(one, other))
        }
        (Value::Object(one), Value::Object(other)) => {
            let is_in_other = |(name, value)| other.get(name).is_some_and(|found| are_equal(value, found));
            one.len() == other.len() && one.iter().all(is_in_other)
        }
        (one, other) => one == other,
    }
}

fn are_equal_numbers(one: &Number, other: &Number) -> bool {
    /// Parsers of decimals may miss the nearest double by one.
    const NEARLY: f64 = 4.0 * f64::EPSILON;
    if let (Some(one), Some(other)) = (one.as_i64(), other.as_i64()) {
        return one == other;
    }
    if let (Some(one), Some(other)) = (one.as_u64(), other.as_u64()) {
        return one == other;
    }
    let (Some(one), Some(other)) = (one.as_f64(), other.as_f64()) else { return false };
    (one - other).abs() <= NEARLY * one.abs().max(other.abs())
}

/// Returns the path of a member of the document. `None` for a name that paths have no notation for: RedisJSON takes
/// backslashes in quoted names as they are.
pub fn path(name: &[u8]) -> Option<Vec<u8>> {
    let is_plain = std::str::from_utf8(name).is_ok() && !name.iter().any(|byte| matches!(byte, b'"' | b'\\' | b'\''));
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
    }

    #[test]
    fn what_the_module_cannot_parse_is_known_before() {
        let deep = format!("{}{}", "[".repeat(200), "]".repeat(200));
        for json in [r#"{"a":"\ud800"}"#, r#"{"a":1e999}"#, &deep, "{", "\"\u{1}\""] {
            assert!(refusal(json.as_bytes()).is_some(), "{json}");
        }
        assert!(refusal(b"\"\xff\"").is_some());
        for json in [r#"{"a":"\ud83d\ude00"}"#, "1e300", "-0.0", "null", r#""x""#] {
            assert_eq!(refusal(json.as_bytes()), None, "{json}");
        }
    }

    #[test]
    fn a_name_with_quotes_has_no_path() {
        assert_eq!(path("größe]".as_bytes()).as_deref(), Some("$[\"größe]\"]".as_bytes()));
        for name in ["a\"b", "a\\b", "a'b"] {
            assert_eq!(path(name.as_bytes()), None);
        }
    }
}
