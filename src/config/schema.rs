//! The JSON Schema of the configuration, for editors and for checks before a deployment.
//!
//! It is made of the same table of settings as the parser, and of the comments in config/prefetchd.toml. A mistake here
//! marks a correct file as wrong, or a wrong one as correct: tests hold it against everything that the parser's tests
//! accept or reject. It knows forms only; whether a file exists or two prefixes overlap is for `prefetchd check`.

use super::{Kind, LOOKUP_KEYS, SECTIONS, SETTINGS, TABLE_KEYS};
use crate::format::Format;
use serde_json::{Map, Value, json};
use std::collections::HashMap;

/// The file with every key, which explains them.
const EXAMPLE: &str = include_str!("../../config/prefetchd.toml");
/// `64MB`, `1.5 GiB`, `5000`.
const SIZE: &str = r"^[0-9]+(\.[0-9]+)?\s*([kKmMgGtTpPeE]?[iI]?[bB]?)$";
/// `500ms`, `1h 30m`, `0`.
const TIME: &str = r"^(\s*[0-9]+(\.[0-9]+)?\s*[A-Za-zµ]+)+\s*$|^0$";
/// A name in URLs.
const URL_NAME: &str = "^[A-Za-z0-9_][A-Za-z0-9_.-]*$";

/// Returns the schema of a configuration file.
pub fn schema() -> Value {
    let explained = explanations(EXAMPLE);
    let mut sections = Map::new();
    for section in SECTIONS {
        let own = SETTINGS.iter().filter_map(|setting @ (key, ..)| Some((key.strip_prefix(section)?, setting)));
        let own = own.filter_map(|(rest, setting)| Some((rest.strip_prefix('.')?, setting)));
        let properties = own.map(|(name, (key, kind, default))| {
            let mut property = form(key, *kind);
            property["description"] = explained.get(*key).cloned().unwrap_or_default().into();
            property["default"] = value(*kind, default);
            (name.to_owned(), property)
        });
        sections.insert(section.to_owned(), object(properties.collect(), &[]));
    }
    let mut tables = json!({"type": "array", "minItems": 1, "description": "One section for each table."});
    tables["items"] = table(&explained);
    sections.insert("tables".to_owned(), tables);
    let mut schema = object(sections, &["tables"]);
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema".into();
    schema["title"] = "prefetchd.toml".into();
    schema["description"] = "The configuration of prefetchd.".into();
    schema
}

fn table(explained: &HashMap<String, String>) -> Value {
    let formats = [Format::Hash, Format::Json, Format::RedisJson].map(Format::as_str);
    let properties = TABLE_KEYS.map(|key| {
        let mut property = match key {
            "name" => json!({"type": "string", "pattern": URL_NAME}),
            "table" | "key" => json!({"type": "string", "minLength": 1}),
            "columns" => json!({"type": "array", "items": {"type": "string"}, "default": []}),
            "rename" => json!({"type": "object", "additionalProperties": {"type": "string"}, "default": {}}),
            "ttl" => json!({"type": "string", "pattern": format!("{TIME}|^$"), "default": ""}),
            "format" => json!({"enum": formats, "default": Format::default().as_str()}),
            "lookups" => json!({"type": "array", "items": lookup(), "default": []}),
            other => unreachable!("{other} is a key of [[tables]] without a form"),
        };
        property["description"] = explained.get(&format!("tables.{key}")).cloned().unwrap_or_default().into();
        (key.to_owned(), property)
    });
    object(properties.into_iter().collect(), &["name", "table", "key"])
}

fn lookup() -> Value {
    let properties = LOOKUP_KEYS.map(|key| {
        let property = match key {
            "name" => json!({"type": "string", "pattern": URL_NAME, "description": "The name in URLs."}),
            "key" => json!({
                "type": "string",
                "minLength": 1,
                "description": "A literal that ends in \":\", then columns in braces separated by \":\", or a literal alone."
            }),
            "order" => json!({
                "type": "string",
                "default": "",
                "description": "The column by which the rows of a sorted set are ordered. Empty = the lists are sets."
            }),
            other => unreachable!("{other} is a key of [[tables.lookups]] without a form"),
        };
        (key.to_owned(), property)
    });
    object(properties.into_iter().collect(), &["name", "key"])
}

fn object(properties: Map<String, Value>, required: &[&str]) -> Value {
    json!({"type": "object", "additionalProperties": false, "properties": properties, "required": required})
}

/// Returns the form of a setting. Numbers and flags may also be written as strings.
fn form(key: &str, kind: Kind) -> Value {
    match (key, kind) {
        ("postgres.slot", _) => json!({"type": "string", "pattern": "^[a-z0-9_]{1,63}$"}),
        ("postgres.publication", _) => json!({"type": "string", "minLength": 1, "maxLength": 63}),
        ("redis.packed", _) => json!({"enum": ["auto", "off"]}),
        ("redis.durability", _) => json!({"type": "string", "pattern": "^(memory|aof|replicas:0*[1-9][0-9]*)$"}),
        ("cache.null", _) => json!({"enum": ["empty", "omit"]}),
        ("cache.load_rate", _) => json!({"type": ["string", "integer"], "pattern": format!("{SIZE}|^$"), "minimum": 1}),
        ("http.listen", _) => json!({"type": "string", "pattern": ":[0-9]{1,5}$"}),
        ("log.format", _) => json!({"enum": ["text", "json"]}),
        (_, Kind::Text | Kind::PostgresUrl) => json!({"type": "string"}),
        (_, Kind::RedisUrl) => json!({"type": "string", "pattern": "^(rediss?([+](sentinel|cluster))?|unix)://"}),
        (_, Kind::Flag) => json!({"enum": [true, false, "true", "false"]}),
        (_, Kind::Names) => json!({"type": "array", "items": {"type": "string", "pattern": "^[^,]*$"}}),
        (_, Kind::Command) => json!({"type": "array", "items": {"type": "string"}}),
        (_, Kind::Count) => {
            json!({"type": ["integer", "string"], "minimum": 1, "pattern": "^[+]?[0-9]*[1-9][0-9]*$"})
        }
        (_, Kind::Size) => json!({"type": ["string", "integer"], "pattern": SIZE, "minimum": 1}),
        (_, Kind::Time) => json!({"type": "string", "pattern": TIME}),
    }
}

/// Returns a default as a file has it.
fn value(kind: Kind, default: &str) -> Value {
    match kind {
        Kind::Flag => json!(default == "true"),
        Kind::Count => json!(default.parse::<u64>().unwrap_or_default()),
        Kind::Names | Kind::Command => json!([]),
        Kind::Text | Kind::PostgresUrl | Kind::RedisUrl | Kind::Size | Kind::Time => json!(default),
    }
}

/// Returns the comment above each key of the example, by the key's full name. A key right below another one shares its
/// comment.
fn explanations(example: &str) -> HashMap<String, String> {
    let (mut explained, mut section, mut comment) = (HashMap::new(), "", Vec::new());
    let mut ended = false;
    for line in example.lines() {
        if let Some(text) = line.strip_prefix('#') {
            if std::mem::take(&mut ended) {
                comment.clear();
            }
            comment.push(text.strip_prefix(' ').unwrap_or(text));
            continue;
        }
        ended = true;
        if let Some((key, _)) = line.split_once(" = ") {
            explained.insert(format!("{section}.{key}"), comment.join("\n"));
        } else if line.starts_with('[') {
            section = line.trim_matches(['[', ']']);
        }
    }
    explained
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use config::{FileFormat, Source};

    fn json(text: &str) -> Value {
        let values = config::File::from_str(text, FileFormat::Toml).collect().expect("TOML");
        let json = values.into_iter().map(|(key, value)| (key, value.try_deserialize::<Value>().expect("JSON")));
        Value::Object(json.collect())
    }

    pub fn accepts(text: &str) -> bool {
        jsonschema::is_valid(&schema(), &json(text))
    }

    #[test]
    fn the_commented_file_is_valid_and_every_key_is_explained() {
        let validator = jsonschema::validator_for(&schema()).expect("a schema");
        let example = json(EXAMPLE);
        let problems: Vec<String> = validator.iter_errors(&example).map(|error| error.to_string()).collect();
        assert_eq!(problems, [""; 0]);
        for (section, keys) in example.as_object().expect("sections") {
            let (schema, keys) = match section.as_str() {
                "tables" => (&schema()["properties"]["tables"]["items"], &keys[0]),
                _ => (&schema()["properties"][section], keys),
            };
            for key in keys.as_object().expect("keys").keys() {
                let explained = schema["properties"][key]["description"].as_str();
                assert!(explained.is_some_and(|text| text.len() > 10), "{section}.{key}: {explained:?}");
            }
        }
    }

    #[test]
    fn defaults_are_valid() {
        let schema = schema();
        for (key, _, _) in SETTINGS {
            let (section, name) = key.split_once('.').expect("a section");
            let property = &schema["properties"][section]["properties"][name];
            assert!(jsonschema::is_valid(property, &property["default"]), "{key}: {property}");
        }
    }
}
