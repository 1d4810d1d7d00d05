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
