//! Any path and query names rows of a table, by keys under its literal, or a list of a lookup, or is refused.

#![no_main]

use axum::http::Uri;
use libfuzzer_sys::fuzz_target;
use prefetchd::format::Format;
use prefetchd::http::target::{ListTarget, Target};
use prefetchd::plan::key::parse_lookup;
use prefetchd::schema::{KeyTemplate, LookupSpec, NullRule, QualifiedName, TableId, TableSpec};
use std::sync::LazyLock;

static TABLES: LazyLock<Vec<TableSpec>> = LazyLock::new(|| {
    let spec = |id, name: &str, columns: &[&str]| TableSpec {
        id: TableId(id),
        name: name.to_owned(),
        table: QualifiedName { schema: "public".to_owned(), table: name.to_owned() },
        key: KeyTemplate { literal: format!("{name}:"), columns: columns.iter().map(|c| (*c).to_owned()).collect() },
        columns: Vec::new(),
        rename: Vec::new(),
        null: NullRule::Empty,
        ttl_ms: 1000,
        format: Format::Hash,
        lookups: Vec::new(),
    };
    let lookup = |name: &str, key: &str, order: Option<&str>| LookupSpec {
        name: name.to_owned(),
        key: parse_lookup(key).expect("a template"),
        order: order.map(str::to_owned),
    };
    let lookups = vec![lookup("all", "all", Some("at")), lookup("by", "by:{id}:{at}", None)];
    vec![spec(0, "a", &["id"]), TableSpec { lookups, ..spec(1, "b", &["id", "at"]) }]
});

fuzz_target!(|data: &[u8]| {
    let Ok(uri) = Uri::try_from(data) else { return };
    if let Ok(Target { asking, keys, .. }) = Target::parse(&uri, &TABLES) {
        assert!(!keys.is_empty() && keys.len() <= 100);
        assert!(keys.iter().all(|key| key.as_bytes().starts_with(asking.table.key.literal.as_bytes())));
    }
    if let Ok(ListTarget { asking, lookup, list, limit, .. }) = ListTarget::parse(&uri, &TABLES) {
        assert!((1..=1000).contains(&limit));
        assert!(list.as_bytes().starts_with(asking.table.lookups[lookup].key.literal.as_bytes()));
    }
});
