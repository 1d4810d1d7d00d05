//! Asks repeatedly how much of what Redis has acknowledged is safe, if the configuration asks for more than memory.
//!
//! It only asks; the ledger decides from the answers what may be confirmed. Not used if memory is enough.

use super::BridgeError;
use crate::checkpoint::Checkpoint;
use crate::lsn::{AppliedLsn, EndLsn};
use crate::sink::durability::{Synced, Syncer};
use std::time::Duration;
use tokio::sync::{mpsc, watch};

/// The delay between two requests while replicas or the disk are behind.
const PAUSE: Duration = Duration::from_millis(500);

/// The meaning of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Durable {
    Safe(AppliedLsn),
    /// What it is waiting for, for the status.
    NotYet(String),
}

/// Runs until the session ends. `acknowledged` is the position that Redis has acknowledged, `epoch` is this writer's.
pub async fn run(
    mut syncer: Syncer,
    epoch: u64,
    mut acknowledged: watch::Receiver<EndLsn>,
    out: mpsc::Sender<Durable>,
) -> Result<(), BridgeError> {
    let mut safe: Option<EndLsn> = None;
    loop {
        acknowledged.wait_for(|lsn| safe.is_none_or(|safe| safe < *lsn)).await.map_err(|_| BridgeError::SessionOver)?;
        let answer = match syncer.sync().await? {
            Synced::Safe(checkpoint) => match Checkpoint::head(&checkpoint) {
                Ok(found) if found.epoch == epoch => {
                    safe = Some(found.lsn);
                    Durable::Safe(AppliedLsn(found.lsn))
                }
                Ok(_) | Err(_) => return Err(BridgeError::Reload("another checkpoint lies in redis".to_owned())),
            },
            Synced::NotYet(why) => Durable::NotYet(why),
        };
        let again = matches!(answer, Durable::NotYet(_));
        out.send(answer).await.map_err(|_| BridgeError::SessionOver)?;
        if again {
            tokio::time::sleep(PAUSE).await;
        }
    }
}
