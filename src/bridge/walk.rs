//! Walks over the keys under a prefix, a page at a time, and waits out a Redis that does not answer: whether the session
//! goes on is for the writer's connection to say, not for a reader's.

use crate::command::Key;
use crate::error::Disposition;
use crate::sink::SinkError;
use crate::sink::reader::Reader;
use std::time::Duration;

const PAUSE: Duration = Duration::from_millis(500);

/// The next cursor (0 at the end) and the keys of one page.
pub async fn page(reader: &Reader, prefix: &str, cursor: u64) -> Result<(u64, Vec<Key>), SinkError> {
    loop {
        match reader.scan_page(prefix.as_bytes(), cursor).await {
            Err(error) if error.disposition() == Disposition::Retry => tokio::time::sleep(PAUSE).await,
            answered => return answered,
        }
    }
}

/// As [`page`], but goes on until there are so many keys, or no more.
pub async fn pages(reader: &Reader, prefix: &str, from: u64, enough: usize) -> Result<(u64, Vec<Key>), SinkError> {
    let (mut cursor, mut keys) = page(reader, prefix, from).await?;
    while cursor != 0 && keys.len() < enough {
        let (next, more) = page(reader, prefix, cursor).await?;
        keys.extend(more);
        cursor = next;
    }
    Ok((cursor, keys))
}

/// Whether no key at all lies under the prefix.
pub async fn is_empty(reader: &Reader, prefix: &str) -> Result<bool, SinkError> {
    let mut cursor = 0;
    loop {
        let (next, keys) = page(reader, prefix, cursor).await?;
        if !keys.is_empty() {
            return Ok(false);
        }
        if next == 0 {
            return Ok(true);
        }
        cursor = next;
    }
}
