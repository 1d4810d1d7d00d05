//! The nodes of a Redis Cluster that have keys of this daemon.

use super::state::Status;
use crate::checkpoint::{Place, TableState};
use crate::lanes::Lane;
use crate::lanes::book::Share;
use crate::nodes::{NodeSeen, Nodes};

/// Where the keys are.
#[derive(Debug, Clone)]
pub struct Keys {
    pub nodes: Nodes,
    /// Set if all of them are in this hash slot.
    pub only: Option<Lane>,
}

impl Status {
    /// The masters that have keys, or may get some. None if Redis is not a cluster.
    pub fn nodes(&self) -> Vec<NodeSeen> {
        let Some(keys) = &self.keys else { return Vec::new() };
        let mut nodes = keys.nodes.seen();
        if let Some(lane) = keys.only {
            nodes.retain(|node| node.serves(lane));
            nodes.iter_mut().for_each(|node| node.share = self.only_share());
        }
        nodes
    }

    /// A hash slot that has all keys is where everything is.
    fn only_share(&self) -> Option<Share> {
        let least = Place::between(self.applied?);
        let healing = usize::from(self.tables.iter().any(|table| table.state == Some(TableState::Healing)));
        Some(Share { lanes: 1, healing, least: Some(least) })
    }
}
