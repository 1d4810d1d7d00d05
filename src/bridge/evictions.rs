//! Watches the number of keys that Redis has evicted, which is the only trace that evictions leave.
//!
//! With any policy but `noeviction`, a full Redis evicts keys. The checkpoint is used constantly and therefore spared,
//! so nothing else reveals it. If INFO is denied, evictions cannot be noticed.

use super::BridgeError;
use crate::sink::any_reader::AnyReader;
use std::time::Duration;
use tokio::sync::mpsc;

const INTERVAL: Duration = Duration::from_secs(1);

/// Sends the count once a second, until the session ends.
pub async fn run(reader: AnyReader, out: mpsc::Sender<u64>) -> Result<(), BridgeError> {
    loop {
        tokio::time::sleep(INTERVAL).await;
        // A Redis that does not answer is handled by the writer.
        if let Ok(Some(evicted)) = reader.evicted_keys().await {
            out.send(evicted).await.map_err(|_| BridgeError::SessionOver)?;
        }
    }
}
