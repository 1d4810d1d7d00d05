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
        let masters: Vec<&str> = masters.collect();
        for master in &masters {
            // A replica may be given to another master.
            let others = masters.iter().filter(|other| *other != master);
            let taken: Vec<String> = others.filter_map(|other| of.get(*other).cloned()).collect();
            let is_free = |shard: &&String| !taken.contains(*shard);
            let followers = || replicas.iter().filter(|(_, of)| of == master).map(|(id, _)| id);
            let known = of.get(*master).or_else(|| followers().filter_map(|id| of.get(id)).find(is_free));
            // The least of them, so that it does not matter which of them is the master when the daemon starts.
            let least = || followers().filter(is_free).map(String::as_str).chain([*master]).min().map(str::to_owned);
            let shard = known.cloned().or_else(least).expect("there is the master");
            for id in followers().map(String::as_str).chain([*master]) {
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

    #[test]
    fn a_master_that_is_given_a_replica_of_another_is_elsewhere() {
        let shards = Shards::default();
        let home = learned(&shards, "b", Some("a"));
        let replicas = BTreeMap::from([("a".to_owned(), "c".to_owned())]);
        shards.learn(["b", "c"].into_iter(), &replicas);
        assert_eq!(shards.home("b"), home);
        assert_ne!(shards.home("c"), home);
    }
}
