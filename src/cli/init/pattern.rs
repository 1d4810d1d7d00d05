//! Patterns of table names, as on the command line: `products`, `shop.*`, `"My Schema".users`.
//!
//! As in psql, `*` and `?` stand for any characters and for one, letters are folded to lower case, and quotes keep what
//! is between them as it is. Without a schema, a pattern means the schema public.

use crate::schema::QualifiedName;
use std::cmp::Reverse;
use std::str::FromStr;

/// How many close names an error shows.
const CLOSE_NAMES: usize = 3;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Pattern {
    /// As it was given.
    pub text: String,
    schema: Vec<Piece>,
    table: Vec<Piece>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Piece {
    Character(char),
    /// `?`
    One,
    /// `*`
    Any,
}

impl FromStr for Pattern {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (mut parts, mut part, mut quoted) = (Vec::new(), Vec::new(), false);
        let mut characters = text.trim().chars().peekable();
        while let Some(c) = characters.next() {
            match c {
                '"' if quoted && characters.next_if_eq(&'"').is_some() => part.push(Piece::Character('"')),
                '"' => quoted = !quoted,
                c if quoted => part.push(Piece::Character(c)),
                '.' => parts.push(std::mem::take(&mut part)),
                '*' => part.push(Piece::Any),
                '?' => part.push(Piece::One),
                c => part.push(Piece::Character(c.to_ascii_lowercase())),
            }
        }
        parts.push(part);
        if quoted || parts.iter().any(Vec::is_empty) {
            return Err("write schema.table, where * and ? are wildcards, or '\"Schema\".\"Table\"'".to_owned());
        }
        let public = || "public".chars().map(Piece::Character).collect();
        match <[_; 2]>::try_from(parts).or_else(|parts| <[_; 1]>::try_from(parts).map(|[table]| [public(), table])) {
            Ok([schema, table]) => Ok(Self { text: text.trim().to_owned(), schema, table }),
            Err(_) => Err("a name has one dot at most: quote those that belong to a name".to_owned()),
        }
    }
}

impl Pattern {
    pub fn matches(&self, name: &QualifiedName) -> bool {
        fits(&self.schema, &name.schema) && fits(&self.table, &name.table)
    }

    /// Returns the names that are most like it.
    pub fn close<'n>(&self, names: impl Iterator<Item = &'n QualifiedName>) -> Vec<String> {
        let wanted = self.text.trim_matches('*');
        let likeness = |name: &QualifiedName| {
            let alone = strsim::jaro_winkler(wanted, &name.table);
            alone.max(strsim::jaro_winkler(wanted, &format!("{}.{}", name.schema, name.table)))
        };
        let mut close: Vec<(f64, String)> = names.map(|name| (likeness(name), name.to_string())).collect();
        close.sort_by(|(a, _), (b, _)| Reverse(a).partial_cmp(&Reverse(b)).unwrap_or(std::cmp::Ordering::Equal));
        close.into_iter().take(CLOSE_NAMES).map(|(_, name)| name).collect()
    }
}

/// Whether the pieces stand for the whole name.
fn fits(pieces: &[Piece], name: &str) -> bool {
    // The ends, in pieces, of all ways to read the name up to here.
    let mut reached = vec![false; pieces.len() + 1];
    reached[0] = true;
    let skip_any = |reached: &mut Vec<bool>| {
        for (at, piece) in pieces.iter().enumerate() {
            reached[at + 1] |= reached[at] && *piece == Piece::Any;
        }
    };
    skip_any(&mut reached);
    for c in name.chars() {
        let mut next = vec![false; pieces.len() + 1];
        for (at, piece) in pieces.iter().enumerate().filter(|(at, _)| reached[*at]) {
            match piece {
                Piece::Character(wanted) => next[at + 1] |= *wanted == c,
                Piece::One => next[at + 1] = true,
                Piece::Any => next[at] = true,
            }
        }
        skip_any(&mut next);
        reached = next;
    }
    reached[pieces.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(schema: &str, table: &str) -> QualifiedName {
        QualifiedName { schema: schema.to_owned(), table: table.to_owned() }
    }

    #[test]
    fn patterns_match_as_in_psql() {
        for (pattern, schema, table, matches) in [
            ("products", "public", "products", true),
            ("Products", "public", "products", true),
            ("products", "shop", "products", false),
            ("products", "public", "products2", false),
            ("shop.*", "shop", "anything \"at\" all", true),
            ("shop.*", "shop2", "a", false),
            ("*.*", "a", "b", true),
            ("*", "a", "b", false),
            ("*.order_?", "x", "order_1", true),
            ("*.order_?", "x", "order_12", false),
            ("a*b*c", "public", "a-b-b-c", true),
            ("a*b*c", "public", "a-c-b", false),
            ("\"My Schema\".users", "My Schema", "users", true),
            ("\"a.b\".\"c\"\"d*\"", "a.b", "c\"d*", true),
            ("\"a.b\".\"c\"\"d*\"", "a.b", "c\"dx", false),
        ] {
            let parsed: Pattern = pattern.parse().unwrap_or_else(|error| panic!("{pattern}: {error}"));
            assert_eq!(parsed.matches(&name(schema, table)), matches, "{pattern} {schema}.{table}");
        }
        for pattern in ["", ".", "a.", ".a", "a.b.c", "\"a", "\"\""] {
            assert!(pattern.parse::<Pattern>().is_err(), "{pattern}");
        }
    }

    #[test]
    fn close_names_are_found_with_and_without_their_schema() {
        let names = [name("shop", "products"), name("public", "users"), name("public", "orders"), name("a", "b")];
        for (pattern, close) in
            [("product", "shop.products"), ("shop.product*", "shop.products"), ("user", "public.users")]
        {
            assert_eq!(
                pattern.parse::<Pattern>().map(|p| p.close(names.iter())).unwrap_or_default()[0],
                close,
                "{pattern}"
            );
        }
    }
}
