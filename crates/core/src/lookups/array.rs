//! Reads the text of a Postgres array, as its output function writes it.
//!
//! <https://www.postgresql.org/docs/current/arrays.html#ARRAYS-IO>

use std::borrow::Cow;
use std::collections::BTreeSet;

/// Returns the distinct elements that are not NULL. `None` if it is not the text of an array with one dimension, or none.
/// The delimiter is a comma, as in arrays of every type but `box`.
pub(super) fn elements(text: &[u8]) -> Option<BTreeSet<Cow<'_, [u8]>>> {
    let mut rest = without_bounds(text)?.strip_prefix(b"{")?.strip_suffix(b"}")?;
    let mut elements = BTreeSet::new();
    while !rest.is_empty() {
        let after = match rest.strip_prefix(b"\"") {
            Some(quoted) => {
                let (element, after) = unquoted(quoted)?;
                elements.insert(element);
                after
            }
            None => {
                let end = memchr::memchr(b',', rest).unwrap_or(rest.len());
                let (element, after) = rest.split_at(end);
                // Braces are quoted in elements, so this is an array of arrays.
                if element.is_empty() || element.contains(&b'{') {
                    return None;
                }
                if element != b"NULL" {
                    elements.insert(Cow::Borrowed(element));
                }
                after
            }
        };
        rest = match after {
            [] => return Some(elements),
            // A comma is followed by an element.
            [b',', more @ ..] if !more.is_empty() => more,
            _ => return None,
        };
    }
    Some(elements)
}

/// Skips `[2:4]=`, the bounds of an array that does not begin at 1. `None` if there are several dimensions.
fn without_bounds(text: &[u8]) -> Option<&[u8]> {
    let Some(bounds) = text.strip_prefix(b"[") else { return Some(text) };
    let end = memchr::memchr(b']', bounds)?;
    bounds[end + 1..].strip_prefix(b"=")
}

/// Returns an element, whose opening quote was skipped, and what follows its closing quote.
fn unquoted(quoted: &[u8]) -> Option<(Cow<'_, [u8]>, &[u8])> {
    let end = memchr::memchr2(b'"', b'\\', quoted)?;
    if quoted[end] == b'"' {
        return Some((Cow::Borrowed(&quoted[..end]), &quoted[end + 1..]));
    }
    let (mut element, mut rest) = (quoted[..end].to_vec(), &quoted[end..]);
    loop {
        rest = match rest {
            [b'"', after @ ..] => return Some((Cow::Owned(element), after)),
            [b'\\', byte, after @ ..] | [byte, after @ ..] => {
                element.push(*byte);
                after
            }
            [] => return None,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Option<Vec<String>> {
        let read = elements(text.as_bytes())?;
        Some(read.iter().map(|element| String::from_utf8_lossy(element).into_owned()).collect())
    }

    #[test]
    fn each_element_counts_once_and_null_never() {
        for (text, expected) in [
            ("{}", &[][..]),
            ("{a}", &["a"]),
            ("{b,a,b,NULL}", &["a", "b"]),
            (r#"{"NULL","",null}"#, &["", "NULL", "null"]),
            (r#"{"a,b","c\"d","e\\f","{g}"}"#, &["a,b", "c\"d", "e\\f", "{g}"]),
            ("[0:1]={x,y}", &["x", "y"]),
            ("{1,2,3}", &["1", "2", "3"]),
        ] {
            assert_eq!(
                read(text).as_deref(),
                Some(&expected.iter().map(|e| (*e).to_owned()).collect::<Vec<_>>()[..]),
                "{text}"
            );
        }
    }

    #[test]
    fn several_dimensions_and_other_texts_have_no_elements() {
        for text in [
            "",
            "a",
            "{{a},{b}}",
            "[1:1][0:1]={{a,b}}",
            "{a",
            "a}",
            "{a,}",
            "{,a}",
            r#"{"a}"#,
            r#"{"a"b}"#,
            r#"{"a\"#,
            "[1:2",
        ] {
            assert_eq!(read(text), None, "{text}");
        }
    }
}
