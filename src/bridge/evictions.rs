//! Watches whether Redis removes keys by itself: it counts them, and says nothing else.
//!
//! With any policy but `noeviction` a full Redis does, and spares the checkpoint, so that nothing else shows it. Where INFO
//! is denied nobody can tell.

use super::BridgeError;
use crate::sink::reader::Reader;
use std::time::Duration;
use tokio::sync::mpsc;

const INTERVAL: Duration = Duration::from_secs(1);

/// Works until the session ends. Sends the count whenever it was asked for.
pub async fn run(reader: Reader, out: mpsc::Sender<u64>) -> Result<(), BridgeError> {
    loop {
        tokio::time::sleep(INTERVAL).await;
        // A Redis that does not answer is the writer's matter.
        if let Ok(Some(evicted)) = reader.evicted_keys().await {
            out.send(evicted).await.map_err(|_| BridgeError::SessionOver)?;
        }
    }
}
