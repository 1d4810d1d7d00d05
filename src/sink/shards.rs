//! Which nodes are, or were, master and replica of the same hash slots. A replica that takes over has what its master had, or
//! the marks tell that it has not; a node to which slots are moved may lack some of their keys.

use crate::lanes::mark::Home;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// Nodes, by id. Shared by all clones, because a master that has died is not in any later answer of the cluster.
#[derive(Debug, Clone, Default)]
pub(super) struct Shards {
    /// The node that stands for all of its shard.
    of: Arc<Mutex<BTreeMap<String, String>>>,
}

impl Shards {
    /// `replicas`: which master each of them follows.
    pub fn learn<'a>(&self, masters: impl Iterator<Item = &'a str>, replicas: &BTreeMap<String, String>) {
        let mut of = self.of.lock().unwrap_or_else(PoisonError::into_inner);
        for master in masters {
            let followers = || replicas.iter().filter(|(_, of)| *of == master).map(|(id, _)| id.as_str());
            let known = of.get(master).or_else(|| followers().find_map(|id| of.get(id)));
            // The least of them, so that it does not matter which of them is the master when the daemon starts.
            let least = || followers().chain([master]).min().expect("there is the master").to_owned();
            let shard = known.cloned().unwrap_or_else(least);
            for id in followers().chain([master]) {
                of.insert(id.to_owned(), shard.clone());
            }
        }
    }

    /// What marks say of the lanes of this master.
    pub fn home(&self, master: &str) -> Option<Home> {
        let of = self.of.lock().unwrap_or_else(PoisonError::into_inner);
        Home::of(of.get(master).map_or(master, String::as_str))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn learned(shards: &Shards, master: &str, replica: Option<&str>) -> Option<Home> {
        let replicas = replica.map(|replica| (replica.to_owned(), master.to_owned())).into_iter().collect();
        shards.learn([master].into_iter(), &replicas);
        shards.home(master)
    }

    #[test]
    fn a_replica_that_takes_over_is_at_home() {
        let shards = Shards::default();
        let home = learned(&shards, "b", Some("a"));
        assert_eq!(shards.home("a"), home);
        assert_ne!(shards.home("c"), home);
        // The old master is gone, and there is a new replica, which takes over later.
        assert_eq!(learned(&shards, "a", None), home);
        assert_eq!(learned(&shards, "a", Some("c")), home);
        assert_eq!(learned(&shards, "c", None), home);
        assert_eq!(learned(&Shards::default(), "a", Some("b")), home, "a daemon that starts later");
    }
}
