//! Encodes a row's columns as its Redis key, and decodes keys.
//!
//! A mistake here makes two rows share a key, or makes readers look for a row under the wrong key. The encoding is part
//! of the public contract: a single column is used as it is; with several, `%` and `:` inside a value are
//! percent-encoded.

use crate::change::{Cell, PartialRow, Row};
use crate::command::Key;
use crate::schema::{KeyTemplate, LookupColumn, LookupTemplate, Render, TableSpec};
use bytes::{BufMut, Bytes, BytesMut};

/// The prefix of prefetchd's own keys, which no table may use.
pub const OWN_PREFIX: &str = "prefetchd:";

/// An invalid key template.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    #[error(
        "key {0:?} has no column: write a literal that ends in \":\", then columns, as in \"cache:category:{{id}}\""
    )]
    NoColumn(String),
    #[error(
        "key {0:?} has no literal before its first column: begin it with one that ends in \":\", as in \"cache:category:{{id}}\""
    )]
    NoLiteral(String),
    #[error("the literal of key {0:?} does not end in \":\": write \":\" before the first column")]
    NoColon(String),
    #[error(
        "key {0:?} is malformed: write each column in braces after the literal, separated by one \":\", as in \
         \"{{a}}:{{b}}\", and braces of the literal twice"
    )]
    Malformed(String),
    #[error("key {template:?} names column {column:?} twice: name each once")]
    Twice { template: String, column: String },
    #[error("key {0:?} begins with \"prefetchd:\", which belongs to prefetchd itself: choose another literal")]
    Reserved(String),
    #[error("key {0:?} is empty: begin it with a literal, as in \"cache:categories-by-parent:{{parent_id}}\"")]
    Empty(String),
    #[error("key {0:?} takes the elements of two arrays: write \"[]\" after one column only")]
    TwoArrays(String),
}

/// Parses a template such as `cache:category:{id}`. `{{` and `}}` in the literal stand for one brace each.
///
/// # Errors
///
/// If it is not a literal that ends in `:`, followed by columns in braces separated by `:`.
pub fn parse_template(text: &str) -> Result<KeyTemplate, TemplateError> {
    let (literal, rest) = split_literal(text).ok_or_else(|| TemplateError::Malformed(text.to_owned()))?;
    if rest.is_empty() {
        return Err(TemplateError::NoColumn(text.to_owned()));
    }
    match literal.as_str() {
        "" => return Err(TemplateError::NoLiteral(text.to_owned())),
        l if !l.ends_with(':') => return Err(TemplateError::NoColon(text.to_owned())),
        l if l.starts_with(OWN_PREFIX) => return Err(TemplateError::Reserved(text.to_owned())),
        _ => {}
    }
    let columns = parse_columns(text, rest)?;
    Ok(KeyTemplate { literal, columns })
}

/// Parses the key of a lookup: a template like that of a table's key, of which a column may be an array's elements, as in
/// `cache:by-tag:{tags[]}`; or a literal alone.
///
/// # Errors
/// As [`parse_template`], except that columns may be missing.
pub fn parse_lookup(text: &str) -> Result<LookupTemplate, TemplateError> {
    let (literal, rest) = split_literal(text).ok_or_else(|| TemplateError::Malformed(text.to_owned()))?;
    match literal.as_str() {
        "" if rest.is_empty() => return Err(TemplateError::Empty(text.to_owned())),
        "" => return Err(TemplateError::NoLiteral(text.to_owned())),
        l if !rest.is_empty() && !l.ends_with(':') => return Err(TemplateError::NoColon(text.to_owned())),
        l if l.starts_with(OWN_PREFIX) => return Err(TemplateError::Reserved(text.to_owned())),
        _ => {}
    }
    let columns = if rest.is_empty() { Vec::new() } else { parse_columns(text, rest)? };
    let column = |name: String| match name.strip_suffix("[]") {
        Some(name) => LookupColumn { name: name.to_owned(), each_element: true },
        None => LookupColumn { name, each_element: false },
    };
    let columns: Vec<LookupColumn> = columns.into_iter().map(column).collect();
    if columns.iter().filter(|column| column.each_element).count() > 1 {
        return Err(TemplateError::TwoArrays(text.to_owned()));
    }
    if let Some(twice) = columns.iter().enumerate().find(|(i, a)| columns[..*i].iter().any(|b| b.name == a.name)) {
        return Err(TemplateError::Twice { template: text.to_owned(), column: twice.1.name.clone() });
    }
    Ok(LookupTemplate { literal, columns })
}

/// Parses what follows the literal: columns in braces, separated by `:`.
fn parse_columns(text: &str, mut rest: &str) -> Result<Vec<String>, TemplateError> {
    let mut columns: Vec<String> = Vec::new();
    loop {
        let column =
            rest.strip_prefix('{').and_then(|r| r.split_once('}')).filter(|(c, _)| !c.is_empty() && !c.contains('{'));
        let Some((column, after)) = column else { return Err(TemplateError::Malformed(text.to_owned())) };
        if columns.iter().any(|c| c == column) {
            return Err(TemplateError::Twice { template: text.to_owned(), column: column.to_owned() });
        }
        columns.push(column.to_owned());
        if after.is_empty() {
            return Ok(columns);
        }
        rest = after.strip_prefix(':').ok_or_else(|| TemplateError::Malformed(text.to_owned()))?;
    }
}

impl TableSpec {
    /// Returns the areas of its keys: that of the rows, then those of the lookups.
    pub fn areas(&self) -> Vec<Area> {
        let lookups = self.lookups.iter().map(|lookup| Area::of_lookup(&lookup.key));
        [Area::Prefix(self.key.literal.clone())].into_iter().chain(lookups).collect()
    }
}

/// The keys that a template, of a table or of a lookup, can produce.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Area {
    Prefix(String),
    /// The key of a lookup without columns.
    One(String),
}

impl Area {
    /// Returns the area of a template of any configuration. `None` if no version writes keys with it.
    pub fn of(template: &str) -> Option<Self> {
        let of_table = parse_template(template).map(|template| Area::Prefix(template.literal));
        of_table.ok().or_else(|| parse_lookup(template).ok().map(|template| Area::of_lookup(&template)))
    }

    pub fn of_lookup(template: &LookupTemplate) -> Self {
        match template.columns.is_empty() {
            true => Area::One(template.literal.clone()),
            false => Area::Prefix(template.literal.clone()),
        }
    }

    /// Returns the text that all its keys begin with.
    pub fn prefix(&self) -> &str {
        match self {
            Area::Prefix(prefix) => prefix,
            Area::One(key) => key,
        }
    }

    pub fn has(&self, key: &Key) -> bool {
        match self {
            Area::Prefix(prefix) => key.as_bytes().starts_with(prefix.as_bytes()),
            Area::One(one) => key.as_bytes() == one.as_bytes(),
        }
    }
}

/// Splits a template before its first column, and replaces the literal's doubled braces. `None` if a `}` is single.
fn split_literal(text: &str) -> Option<(String, &str)> {
    let (mut literal, mut rest) = (String::new(), text);
    while let Some(at) = rest.find(['{', '}']) {
        let (plain, brace) = rest.split_at(at);
        literal.push_str(plain);
        rest = match brace.as_bytes() {
            [b'{', b'{', ..] | [b'}', b'}', ..] => &brace[2..],
            [b'{', ..] => return Some((literal, brace)),
            _ => return None,
        };
        literal.push_str(&brace[..1]);
    }
    literal.push_str(rest);
    Some((literal, ""))
}

/// Returns whether a key of one template could begin with the literal of the other.
pub fn collides(a: &KeyTemplate, b: &KeyTemplate) -> bool {
    a.literal.starts_with(&b.literal) || b.literal.starts_with(&a.literal)
}

/// Returns the key of a row or a list: a template's literal with these values of its columns, in their order. For readers.
pub fn from_segments(literal: &str, segments: &[Bytes]) -> Key {
    encode(literal.as_bytes(), segments.iter().map(|s| &s[..]))
}

/// Returns the column values of a key in the template's order, or `None` if no row can have this key.
pub fn decode(template: &KeyTemplate, key: &Key) -> Option<Vec<Bytes>> {
    let rest = key.0.strip_prefix(template.literal.as_bytes())?;
    if template.columns.len() == 1 {
        return Some(vec![key.0.slice_ref(rest)]);
    }
    let values = rest.split(|b| *b == b':').map(unescape).collect::<Option<Vec<_>>>()?;
    (values.len() == template.columns.len()).then_some(values)
}

pub(crate) fn encode<'a>(literal: &[u8], values: impl ExactSizeIterator<Item = &'a [u8]> + Clone) -> Key {
    let several = values.len() > 1;
    let len: usize = values.clone().map(|v| v.len() + 1).sum();
    let mut out = BytesMut::with_capacity(literal.len() + len);
    out.put_slice(literal);
    for (i, value) in values.enumerate() {
        if i > 0 {
            out.put_u8(b':');
        }
        if several { escape(value, &mut out) } else { out.put_slice(value) }
    }
    Key(out.freeze())
}

fn escape(value: &[u8], out: &mut BytesMut) {
    for &byte in value {
        match byte {
            b'%' => out.put_slice(b"%25"),
            b':' => out.put_slice(b"%3A"),
            other => out.put_u8(other),
        }
    }
}

/// Returns `None` for an escape sequence that [`escape`] never writes.
fn unescape(value: &[u8]) -> Option<Bytes> {
    let mut out = BytesMut::with_capacity(value.len());
    let mut rest = value;
    while let Some((&byte, after)) = rest.split_first() {
        rest = match (byte, after) {
            (b'%', [b'2', b'5', after @ ..]) => {
                out.put_u8(b'%');
                after
            }
            (b'%', [b'3', b'A', after @ ..]) => {
                out.put_u8(b':');
                after
            }
            (b'%', _) => return None,
            (other, after) => {
                out.put_u8(other);
                after
            }
        };
    }
    Some(out.freeze())
}

/// Why a row has no key and so cannot become a hash.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Poison {
    #[error("key column {column} is NULL")]
    NullKey { column: String },
    #[error("key column {column} was not sent")]
    KeyNotSent { column: String },
}

impl Poison {
    /// Whether the row has a key that Postgres did not send.
    pub fn has_unknown_key(&self) -> bool {
        matches!(self, Poison::KeyNotSent { .. })
    }

    /// The code for the metrics.
    pub fn code(&self) -> &'static str {
        match self {
            Poison::NullKey { .. } => "null_key",
            Poison::KeyNotSent { .. } => "key_not_sent",
        }
    }
}

/// Encodes the keys of rows of one shape.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyEncoder {
    literal: Bytes,
    /// For each of the template's columns: the cell's index in the row, the column's name, and how its value is
    /// written.
    cells: Vec<(usize, String, Render)>,
}

impl KeyEncoder {
    pub(super) fn new(literal: &str, cells: Vec<(usize, String, Render)>) -> Self {
        Self { literal: Bytes::copy_from_slice(literal.as_bytes()), cells }
    }

    /// Returns the key of a row. Only the key's columns need to be known.
    pub fn encode(&self, row: &Row) -> Result<Key, Poison> {
        self.of(|cell| row.cell(cell).map_or(Cell::Null, Cell::Text))
    }

    /// Returns the key of a row that consists of the key's columns only, in the template's order.
    pub fn encode_key_row(&self, row: &Row) -> Key {
        let values =
            row.cells().zip(&self.cells).map(|(value, (_, _, render))| render.value(value.unwrap_or_default()));
        encode(&self.literal, values.collect::<Vec<_>>().into_iter())
    }

    /// An upper bound for the length in bytes of the key of a row with these cells.
    pub(super) fn len_at_most<'r>(&self, cell: impl Fn(usize) -> Cell<'r>) -> usize {
        // In a composite key, `%` and `:` take three bytes each.
        let longest = if self.cells.len() > 1 { 3 } else { 1 };
        let value = |(index, _, render): &(usize, String, Render)| match cell(*index) {
            Cell::Text(text) => 1 + render.value(text).len() * longest,
            Cell::Null | Cell::Unchanged => 0,
        };
        self.literal.len() + self.cells.iter().map(value).sum::<usize>()
    }

    pub fn encode_partial(&self, row: &PartialRow) -> Result<Key, Poison> {
        self.of(|cell| row.cell(cell))
    }

    fn of<'r>(&self, cell: impl Fn(usize) -> Cell<'r>) -> Result<Key, Poison> {
        let value = |(index, column, render): &(usize, String, Render)| match cell(*index) {
            Cell::Text(text) => Ok(render.value(text)),
            Cell::Null => Err(Poison::NullKey { column: column.clone() }),
            Cell::Unchanged => Err(Poison::KeyNotSent { column: column.clone() }),
        };
        if let [only] = &self.cells[..] {
            return Ok(encode(&self.literal, std::iter::once(value(only)?)));
        }
        let values = self.cells.iter().map(value).collect::<Result<Vec<_>, _>>()?;
        Ok(encode(&self.literal, values.into_iter()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::change::RowBuilder;
    use proptest::prelude::*;

    #[test]
    fn reads_templates() {
        let t = parse_template("cache:category:{id}").expect("the example");
        assert_eq!((t.literal.as_str(), t.columns.as_slice()), ("cache:category:", &["id".to_owned()][..]));
        let t = parse_template("x:{a}:{B c}").expect("two columns");
        assert_eq!(t.columns, ["a", "B c"]);
        assert_eq!(t.to_string(), "x:{a}:{B c}");
        for (text, literal) in [("c:{{tag}}:{id}", "c:{tag}:"), ("{{{{}}:{id}", "{{}:"), ("}}{{:{id}", "}{:")] {
            let t = parse_template(text).expect("doubled braces");
            assert_eq!((t.literal.as_str(), t.columns.as_slice()), (literal, &["id".to_owned()][..]));
            assert_eq!(t.to_string(), text);
        }
    }

    #[test]
    fn refuses_what_is_no_template() {
        use TemplateError as E;
        let s = str::to_owned;
        for (text, error) in [
            ("", E::NoColumn(s(""))),
            ("cache:", E::NoColumn(s("cache:"))),
            ("{id}", E::NoLiteral(s("{id}"))),
            ("cache{id}", E::NoColon(s("cache{id}"))),
            ("c:{}", E::Malformed(s("c:{}"))),
            ("c:{id", E::Malformed(s("c:{id"))),
            ("c:{id}x", E::Malformed(s("c:{id}x"))),
            ("c:{id}:", E::Malformed(s("c:{id}:"))),
            ("c:{a}{b}", E::Malformed(s("c:{a}{b}"))),
            ("c:{a}-{b}", E::Malformed(s("c:{a}-{b}"))),
            ("c}:{a}", E::Malformed(s("c}:{a}"))),
            ("c:{{a}}", E::NoColumn(s("c:{{a}}"))),
            ("c:{{{a}", E::NoColon(s("c:{{{a}"))),
            ("c:{{a}:{b}", E::Malformed(s("c:{{a}:{b}"))),
            ("c:{a}}:{b}", E::Malformed(s("c:{a}}:{b}"))),
            ("c:{a}:{a}", E::Twice { template: s("c:{a}:{a}"), column: s("a") }),
            ("prefetchd:{id}", E::Reserved(s("prefetchd:{id}"))),
        ] {
            assert_eq!(parse_template(text), Err(error), "{text:?}");
        }
    }

    #[test]
    fn one_literal_may_not_begin_another() {
        let t = |s| parse_template(s).expect("a template");
        assert!(collides(&t("a:{x}"), &t("a:b:{x}")));
        assert!(collides(&t("a:b:{x}"), &t("a:{y}")));
        assert!(!collides(&t("a:b:{x}"), &t("a:c:{x}")));
    }

    fn key(s: &str) -> Key {
        Key(Bytes::copy_from_slice(s.as_bytes()))
    }

    #[test]
    fn one_column_goes_as_it_is_and_several_are_kept_apart() {
        let one = parse_template("c:{id}").expect("a template");
        let two = parse_template("c:{a}:{b}").expect("a template");
        let segments = |s: &[&'static str]| s.iter().map(|s| Bytes::from_static(s.as_bytes())).collect::<Vec<_>>();
        assert_eq!(from_segments(&one.literal, &segments(&["a:b%c"])), key("c:a:b%c"));
        assert_eq!(from_segments(&two.literal, &segments(&["a:b", "100%"])), key("c:a%3Ab:100%25"));
        assert_eq!(decode(&two, &key("c:a%3Ab:100%25")), Some(segments(&["a:b", "100%"])));
        for no_row in ["c:a", "c:a:b:c", "c:%:b", "c:%3a:b", "c:%20:b", "d:a:b"] {
            assert_eq!(decode(&two, &key(no_row)), None, "{no_row}");
        }
    }

    proptest! {
        #[test]
        fn the_way_back_gives_the_same_values(values in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..6), 1..4)) {
            let columns = (0..values.len()).map(|i| format!("c{i}")).collect();
            let template = KeyTemplate { literal: "p:".to_owned(), columns };
            let values: Vec<Bytes> = values.into_iter().map(Bytes::from).collect();
            prop_assert_eq!(decode(&template, &from_segments(&template.literal, &values)), Some(values));
        }

        #[test]
        fn a_key_that_can_be_decoded_is_the_one_its_values_give(rest in "[a-c%:253A]{0,12}") {
            let template = KeyTemplate { literal: "p:".to_owned(), columns: vec!["a".to_owned(), "b".to_owned()] };
            let key = key(&format!("p:{rest}"));
            if let Some(values) = decode(&template, &key) {
                prop_assert_eq!(from_segments(&template.literal, &values), key);
            }
        }
    }

    #[test]
    fn a_row_without_its_key_is_named() {
        let encoder = KeyEncoder::new("c:", vec![(1, "id".to_owned(), Render::AsIs)]);
        let mut row = RowBuilder::with_capacity(8);
        row.text(b"x");
        row.null();
        let poison = encoder.encode(&row.row()).expect_err("its key is NULL");
        assert_eq!(poison, Poison::NullKey { column: "id".to_owned() });
        assert_eq!((poison.code(), poison.has_unknown_key()), ("null_key", false));
        let not_sent = Poison::KeyNotSent { column: "id".to_owned() };
        assert_eq!((not_sent.code(), not_sent.has_unknown_key()), ("key_not_sent", true));
    }

    #[test]
    fn no_key_is_longer_than_its_bound() {
        let cells = ["a", "b"].map(|name| name.to_owned());
        for columns in 1..=2 {
            let cells = (0..).zip(&cells).take(columns).map(|(i, name)| (i, name.clone(), Render::AsIs)).collect();
            let encoder = KeyEncoder::new("c:", cells);
            for text in ["", "plain", "%%::"] {
                let mut row = RowBuilder::with_capacity(8);
                (0..2).for_each(|_| row.text(text.as_bytes()));
                let row = row.row();
                let key = encoder.encode(&row).expect("it has its key");
                let most = encoder.len_at_most(|cell| row.cell(cell).map_or(Cell::Null, Cell::Text));
                assert!(
                    key.0.len() <= most && most <= 2 + 3 * (key.0.len() + 1),
                    "{text:?}: {} of {most}",
                    key.0.len()
                );
            }
        }
    }

    #[test]
    fn the_key_of_a_lookup_is_a_literal_and_perhaps_columns() {
        let columns = |text: &str| {
            let template = parse_lookup(text).expect("a template");
            assert_eq!(template.to_string(), text);
            template.columns.into_iter().map(|column| (column.name, column.each_element)).collect::<Vec<_>>()
        };
        assert_eq!(columns("cache:by-parent:{parent_id}"), [("parent_id".to_owned(), false)]);
        assert_eq!(columns("t:{tags[]}:{a}"), [("tags".to_owned(), true), ("a".to_owned(), false)]);
        assert_eq!(columns("cache:all"), []);
        assert_eq!(columns("{{x}}:all"), []);
        for (text, says) in [
            ("", "is empty"),
            ("{a}", "no literal"),
            ("by{a}", "does not end in"),
            ("prefetchd:all", "belongs to prefetchd"),
            ("t:{a}{b}", "malformed"),
            ("t:{a}:", "malformed"),
            ("t:{a}:{a}", "twice"),
            ("t:{a}:{a[]}", "twice"),
            ("t:{a[]}:{b[]}", "two arrays"),
        ] {
            let error = parse_lookup(text).expect_err(text).to_string();
            assert!(error.contains(says), "{text}: {error}");
        }
    }

    #[test]
    fn a_lookup_without_columns_has_one_key() {
        let has = |template: &str, key: &'static str| {
            Area::of(template).expect("a template").has(&Key(Bytes::from_static(key.as_bytes())))
        };
        assert!(
            has("cache:all", "cache:all") && !has("cache:all", "cache:allergens") && !has("cache:all", "cache:all:1")
        );
        assert!(has("t:{id}", "t:1") && has("t:{tags[]}", "t:") && !has("t:{id}", "u:1"));
        assert_eq!(Area::of(""), None, "it would have every key");
    }
}
