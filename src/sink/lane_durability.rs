//! Waits until what every master of a cluster has acknowledged is also on its replicas, or on its disk.
//!
//! What was acknowledged before is safe once all masters have answered, as long as each is the process that it was before
//! the marks were read, and has been a master all the time. One that is new, was started again or was promoted may lack
//! what was acknowledged: the session then ends, and the next one reads all marks. A mistake here makes Postgres discard
//! a change that a failover then loses.

use super::SinkError;
use super::connect::RedisTarget;
use super::durability::{Durability, Syncer};
use super::server::{Life, Lives};
use super::topology::{Node, Topology};
use crate::lanes::tags::fence_key;
use crate::resp::batch::OwnKeys;
use futures_util::future::try_join_all;
use std::collections::BTreeMap;
use std::time::Duration;
use tokio::time::{Instant, sleep_until};

/// The delay before the masters are asked again.
const REST: Duration = Duration::from_millis(100);

/// What the masters say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reached {
    /// Everything that was acknowledged before they were asked is safe.
    Everything,
    /// Not everything is safe yet, with the reason.
    NotYet(String),
    /// A master may lack what was acknowledged, with the reason.
    Replaced(String),
}

/// A connection to each master.
pub struct LaneSyncer {
    target: RedisTarget,
    /// The name of the replication slot.
    slot: String,
    /// By the node's ID.
    masters: BTreeMap<String, Master>,
    asked: Option<Instant>,
}

struct Master {
    syncer: Syncer,
    /// Before its marks were read.
    life: Life,
}

impl Master {
    async fn reached(&mut self, node: &Node, slot: &str) -> Result<Reached, SinkError> {
        let lane = node.lane().expect("a master of the topology has slots");
        let (reached, life) = self.syncer.waits_behind(&fence_key(lane, slot)).await?;
        Ok(match reached {
            _ if life != self.life => Reached::Replaced(format!("redis at {} was started again, or promoted", node.at)),
            Ok(()) => Reached::Everything,
            Err(why) => Reached::NotYet(format!("redis at {}: {why}", node.at)),
        })
    }
}

impl LaneSyncer {
    /// `lives`: of the masters, from before their marks were read. `slot`: the name of the replication slot.
    ///
    /// # Errors
    /// [`SinkError::NotDurable`] if a master cannot provide this level at all.
    pub async fn connect(
        target: &RedisTarget,
        own: &OwnKeys,
        slot: &str,
        level: Durability,
        lives: &Lives,
    ) -> Result<Self, SinkError> {
        let topology = Topology::discover(target).await?;
        let known = topology.nodes().iter().filter_map(|node| Some((node, lives.get(&node.id)?.clone())));
        let connect = async |(node, life): (&Node, Life)| {
            let mut syncer = Syncer::open_at(target, own, level, &node.at).await?;
            syncer.require().await?;
            Ok::<_, SinkError>((node.id.clone(), Master { syncer, life }))
        };
        let masters = try_join_all(known.map(connect)).await?.into_iter().collect();
        Ok(LaneSyncer { target: target.clone(), slot: slot.to_owned(), masters, asked: None })
    }

    /// Returns how much is safe by now. If that is not everything, waits for up to one second, or three for the file.
    pub async fn sync(&mut self) -> Result<Reached, SinkError> {
        if let Some(asked) = self.asked {
            sleep_until(asked + REST).await;
        }
        self.asked = Some(Instant::now());
        let topology = Topology::discover(&self.target).await?;
        if topology.uncovered() > 0 {
            return Ok(Reached::NotYet(format!("{} hash slots are served by no node", topology.uncovered())));
        }
        if let Some(new) = topology.nodes().iter().find(|node| !self.masters.contains_key(&node.id)) {
            return Ok(Reached::Replaced(format!("redis at {} is a master now", new.at)));
        }
        // Hash slots that have moved to another of these masters came with their marks and rows.
        let node_of = |id: &String| topology.nodes().iter().find(|node| node.id == *id);
        let masters = self.masters.iter_mut().filter_map(|(id, master)| Some((master, node_of(id)?)));
        let asked = masters.map(|(master, node)| master.reached(node, &self.slot));
        let reached = try_join_all(asked).await?;
        // What concerns the session comes before what passes.
        let is_replaced = |reached: &Reached| matches!(reached, Reached::Replaced(_));
        let worst = reached.iter().find(|reached| is_replaced(reached));
        let worst = worst.or_else(|| reached.iter().find(|reached| **reached != Reached::Everything));
        Ok(worst.cloned().unwrap_or(Reached::Everything))
    }
}

/// Tries every master without writing anything. Returns `None` if it works now, otherwise what it would have to wait for.
///
/// # Errors
/// As [`LaneSyncer::connect`].
pub async fn try_out(target: &RedisTarget, own: &OwnKeys, level: Durability) -> Result<Option<String>, SinkError> {
    for node in Topology::discover(target).await?.nodes() {
        let mut syncer = Syncer::open_at(target, own, level, &node.at).await?;
        if let Some(why) = syncer.tries().await? {
            return Ok(Some(format!("redis at {}: {why}", node.at)));
        }
    }
    Ok(None)
}
