//! Waits until what Redis has acknowledged is durable, on one server or on all masters of a cluster.

use super::SinkError;
use super::connect::RedisTarget;
use super::durability::{Durability, Syncer};
use super::lane_durability::{self, LaneSyncer};
use super::server::Lives;
use crate::resp::batch::OwnKeys;

/// Finds out what is durable: on one server, [`Syncer`]; on all masters of a cluster, [`LaneSyncer`].
pub enum AnySyncer {
    One(Syncer),
    Lanes(LaneSyncer),
}

impl AnySyncer {
    /// Returns `None` if there is nothing to wait for. `lanes`: see [`LaneSyncer::connect`], if the keys lie in several hash
    /// slots of a cluster.
    ///
    /// # Errors
    /// [`SinkError::NotDurable`] if a server cannot provide this level at all.
    pub async fn connect(
        target: &RedisTarget,
        own: &OwnKeys,
        level: Durability,
        lanes: Option<(&str, &Lives)>,
    ) -> Result<Option<Self>, SinkError> {
        Ok(match lanes {
            _ if level == Durability::Memory => None,
            None => Some(AnySyncer::One(Syncer::connect(target, own, level).await?)),
            Some((slot, lives)) => Some(AnySyncer::Lanes(LaneSyncer::connect(target, own, slot, level, lives).await?)),
        })
    }

    /// Tries it without writing anything. Returns `None` if it works now, otherwise what it would have to wait for.
    /// `lanes`: the name of the replication slot, if the keys lie in several hash slots of a cluster.
    ///
    /// # Errors
    /// As [`Self::connect`].
    pub async fn try_out(
        target: &RedisTarget,
        own: &OwnKeys,
        level: Durability,
        lanes: Option<&str>,
    ) -> Result<Option<String>, SinkError> {
        match lanes {
            None => Syncer::try_out(target, own, level).await,
            Some(_) => lane_durability::try_out(target, own, level).await,
        }
    }
}
