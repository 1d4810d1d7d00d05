//! Asks repeatedly how much of what Redis has acknowledged is safe, if the configuration asks for more than memory.
//!
//! It only asks; the ledger decides from the answers what may be confirmed. Not used if memory is enough.

use super::BridgeError;
use crate::checkpoint::Checkpoint;
use crate::code::Code;
use crate::lsn::{AppliedLsn, EndLsn};
use crate::sink::any_syncer::AnySyncer;
use crate::sink::durability::{Synced, Syncer};
use crate::sink::lane_durability::Reached;
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

/// Runs until the session ends. `acknowledged` is the position that Redis has acknowledged everywhere, if it is known;
/// `epoch` is this writer's.
pub async fn run(
    mut syncer: AnySyncer,
    epoch: u64,
    mut acknowledged: watch::Receiver<Option<EndLsn>>,
    out: mpsc::Sender<Durable>,
) -> Result<(), BridgeError> {
    let mut safe: Option<EndLsn> = None;
    loop {
        let asked = *acknowledged.wait_for(|lsn| safe < *lsn).await.map_err(|_| BridgeError::SessionOver)?;
        let asked = asked.expect("it is more than nothing");
        let answer = match &mut syncer {
            AnySyncer::One(syncer) => on_one(syncer, epoch).await?,
            AnySyncer::Lanes(syncer) => match syncer.sync().await? {
                Reached::Everything => Durable::Safe(AppliedLsn(asked)),
                Reached::NotYet(why) => Durable::NotYet(why),
                Reached::Replaced(why) => return Err(BridgeError::Reload(Code::CheckpointChanged, why)),
            },
        };
        if let Durable::Safe(AppliedLsn(lsn)) = answer {
            safe = Some(lsn);
        }
        let again = matches!(answer, Durable::NotYet(_));
        out.send(answer).await.map_err(|_| BridgeError::SessionOver)?;
        if again {
            tokio::time::sleep(PAUSE).await;
        }
    }
}

async fn on_one(syncer: &mut Syncer, epoch: u64) -> Result<Durable, BridgeError> {
    match syncer.sync().await? {
        Synced::Safe(checkpoint) => match Checkpoint::head(&checkpoint) {
            Ok(found) if found.epoch == epoch => Ok(Durable::Safe(AppliedLsn(found.lsn))),
            Ok(_) | Err(_) => {
                let text = "another checkpoint lies in redis";
                Err(BridgeError::Reload(Code::CheckpointChanged, text.to_owned()))
            }
        },
        Synced::NotYet(why) => Ok(Durable::NotYet(why)),
    }
}
