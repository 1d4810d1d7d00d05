//! Takes keys of rows, and values that Postgres repeats, out of text that leaves the machine.
//!
//! Messages name the key at which a command failed, as `Redis refused HSET cache:category:cat-001: OOM ...`. A key ends
//! anywhere, because a value may contain any character, so everything behind a table's prefix goes. A mistake here gives
//! somebody else's data to whoever reads a report.

use crate::plan::key::Area;
use crate::schema::TableSpec;
use serde_json::Value;

/// What takes the place of a key.
const LEFT_OUT: &str = "… (left out)";
/// Errors about a value may repeat it. <https://www.postgresql.org/docs/current/errcodes-appendix.html>
const ABOUT_A_VALUE: &str = "(SQLSTATE 22";
/// Lists of keys in the status.
const LISTS_OF_KEYS: [&str; 1] = ["dead_letter_keys"];

/// What the keys of all rows and lists begin with.
#[derive(Debug, Clone, Default)]
pub struct RowKeys {
    prefixes: Vec<String>,
}

impl RowKeys {
    pub fn of(tables: &[TableSpec]) -> Self {
        let areas = tables.iter().flat_map(TableSpec::areas);
        let prefixes = areas.filter_map(|area| match area {
            Area::Prefix(prefix) => Some(prefix),
            // Without a value in it.
            Area::One(_) => None,
        });
        // As a key is displayed.
        let both = prefixes.flat_map(|prefix| [prefix.as_bytes().escape_ascii().to_string(), prefix]);
        Self { prefixes: both.collect() }
    }

    /// One piece of text, such as a message, without keys and values.
    pub fn hidden(&self, text: &str) -> String {
        let text = value_hidden(text);
        let ends = self.prefixes.iter().filter_map(|prefix| Some(text.find(prefix.as_str())? + prefix.len()));
        match ends.min() {
            Some(end) => format!("{}{LEFT_OUT}", &text[..end]),
            None => text,
        }
    }

    /// All texts of a document, and no list of keys.
    pub fn hide_in(&self, json: &mut Value) {
        match json {
            Value::String(text) => *text = self.hidden(text),
            Value::Array(items) => items.iter_mut().for_each(|item| self.hide_in(item)),
            Value::Object(fields) => {
                fields.retain(|name, _| !LISTS_OF_KEYS.contains(&name.as_str()));
                fields.values_mut().for_each(|value| self.hide_in(value));
            }
            Value::Null | Value::Bool(_) | Value::Number(_) => {}
        }
    }
}

/// A message without the value that Postgres refuses.
pub fn value_hidden(text: &str) -> String {
    match text.find(ABOUT_A_VALUE) {
        Some(at) => format!("a message about a value was left out {}", &text[at..]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn keys() -> RowKeys {
        RowKeys { prefixes: ["cache:category:", "caché:", r"cach\xc3\xa9:"].map(str::to_owned).to_vec() }
    }

    #[test]
    fn nothing_behind_a_prefix_is_left() {
        for (text, hidden) in [
            ("Redis refused HSET cache:category:a b: OOM x", "Redis refused HSET cache:category:… (left out)"),
            ("cache:category:a, cache:category:b", "cache:category:… (left out)"),
            (r"GET cach\xc3\xa9:a", r"GET cach\xc3\xa9:… (left out)"),
            ("GET caché:a", "GET caché:… (left out)"),
            ("loaded 5 rows of categories", "loaded 5 rows of categories"),
            (
                "bad input: \"secret\" (SQLSTATE 22P02): hint",
                "a message about a value was left out (SQLSTATE 22P02): hint",
            ),
        ] {
            assert_eq!(keys().hidden(text), hidden);
        }
    }

    #[test]
    fn a_document_keeps_its_shape_without_lists_of_keys() {
        let mut status =
            json!({"dead_letter_keys": [{"key": "x"}], "n": 1, "tables": [{"because": "cache:category:x"}]});
        keys().hide_in(&mut status);
        assert_eq!(status, json!({"n": 1, "tables": [{"because": "cache:category:… (left out)"}]}));
    }
}
