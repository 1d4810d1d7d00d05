//! Walks over the keys under a prefix, page by page, and waits while Redis does not answer. Whether the session
//! continues is decided by the writer's connection, not by a reader's.

use crate::command::Key;
use crate::error::Disposition;
use crate::sink::SinkError;
use crate::sink::any_reader::AnyReader;
use std::collections::HashSet;
use std::time::Duration;

const PAUSE: Duration = Duration::from_millis(500);

/// Returns the next cursor (0 at the end) and the keys of one page.
pub async fn page(reader: &AnyReader, prefix: &str, cursor: u64) -> Result<(u64, Vec<Key>), SinkError> {
    loop {
        match reader.scan_page(prefix.as_bytes(), cursor).await {
            Err(error) if error.disposition() == Disposition::Retry => tokio::time::sleep(PAUSE).await,
            answered => return answered,
        }
    }
}

/// Like [`page`], but continues until there are `enough` keys or no more.
pub async fn pages(reader: &AnyReader, prefix: &str, from: u64, enough: usize) -> Result<(u64, Vec<Key>), SinkError> {
    let (mut cursor, mut keys) = page(reader, prefix, from).await?;
    while cursor != 0 && keys.len() < enough {
        let (next, more) = page(reader, prefix, cursor).await?;
        keys.extend(more);
        cursor = next;
    }
    Ok((cursor, keys))
}

/// Returns those prefixes under which there are no keys at all, in one walk.
pub async fn empty<'p>(reader: &AnyReader, prefixes: &[&'p str]) -> Result<HashSet<&'p str>, SinkError> {
    let mut empty: HashSet<&str> = prefixes.iter().copied().collect();
    let common = common_prefix(prefixes);
    let mut cursor = 0;
    while !empty.is_empty() {
        let (next, keys) = page(reader, common, cursor).await?;
        empty.retain(|prefix| !keys.iter().any(|key| key.0.starts_with(prefix.as_bytes())));
        if next == 0 {
            break;
        }
        cursor = next;
    }
    Ok(empty)
}

fn common_prefix<'p>(texts: &[&'p str]) -> &'p str {
    let Some((first, others)) = texts.split_first() else { return "" };
    let mut ends = first.char_indices().map(|(at, c)| at + c.len_utf8()).rev();
    let end = ends.find(|end| others.iter().all(|other| other.starts_with(&first[..*end])));
    &first[..end.unwrap_or(0)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_is_common_to_all() {
        for (texts, common) in [
            (&["cache:a:", "cache:b:"][..], "cache:"),
            (&["a:", "b:"], ""),
            (&["ä:", "å:"], ""),
            (&["a:"], "a:"),
            (&["a:", "a:b:"], "a:"),
            (&[], ""),
        ] {
            assert_eq!(common_prefix(texts), common, "{texts:?}");
        }
    }
}
