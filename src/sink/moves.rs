//! Hash slots that are on their way to another node, key by key.
//!
//! SCAN may find a key of such a slot on neither of the nodes, and the topology does not show it. What shows it is a
//! request about a key that does not exist: the master redirects it.

use super::{ErrorReply, SinkError};
use crate::lanes::Lane;
use std::time::{Duration, Instant};

/// The delay before it is asked again whether a hash slot is still moving.
const PAUSE: Duration = Duration::from_millis(100);
/// How long a move may take. Longer than a failover takes with the default `cluster-node-timeout` of 15 s.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);

/// Connections to all masters.
pub(super) trait Masters {
    /// Returns one of these hash slots whose master redirects requests about keys that it does not have.
    async fn on_the_move(&mut self, lanes: &[Lane]) -> Result<Option<(Lane, ErrorReply)>, SinkError>;

    /// Learns which master has which hash slots now.
    async fn rediscover(&mut self) -> Result<(), SinkError>;

    /// Shows what is waited for: what the master of this hash slot has replied.
    fn shows(&mut self, lane: Lane, reply: &ErrorReply) -> Result<(), SinkError>;

    /// Which cluster it is, for messages.
    fn redis(&self) -> String;
}

/// Whether one of these hash slots was on the move. Waits until it no longer is.
pub(super) async fn ended(masters: &mut impl Masters, lanes: &[Lane]) -> Result<bool, SinkError> {
    let Some((lane, _)) = masters.on_the_move(lanes).await? else { return Ok(false) };
    let began = Instant::now();
    while let Some((lane, reply)) = masters.on_the_move(&[lane]).await? {
        masters.shows(lane, &reply)?;
        if began.elapsed() > PATIENCE {
            return Err(SinkError::OnTheMove { redis: masters.redis(), lane, after: PATIENCE, reply });
        }
        tokio::time::sleep(PAUSE).await;
        masters.rediscover().await?;
    }
    Ok(true)
}
