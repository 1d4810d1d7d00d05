//! Redis Cluster that grows, shrinks and moves its hash slots, with its operators' own tools, while eight sessions write and
//! readers never stop: nothing is lost, goes backwards, is torn or comes back, and nothing is loaded again.

use crate::harness::lanes::LaneScene;
use crate::harness::traffic::{Traffic, seed};
use crate::harness::{Cluster, Feature, Postgres, Redis};
use prefetchd::lanes::Lane;
use std::time::Instant;

/// So many that rows and marks are among them.
const SOME: u16 = 150;

async fn scene() -> LaneScene {
    LaneScene::with(Postgres::shared(), Cluster::start().await, 2, seed()).await
}

/// The readers have seen nothing wrong, and the daemons have loaded nothing again.
async fn ends(scene: LaneScene) {
    for daemon in &scene.daemons {
        assert_eq!(daemon.said("loading every table again"), 0, "{}", daemon.log_text());
    }
    scene.stop().await;
}

impl LaneScene {
    /// Adds a master, and returns its index.
    async fn grow(&mut self) -> usize {
        let index = self.cluster.join().await;
        self.settings.are_for(self.cluster.node(index));
        self.watcher.meets(&self.cluster);
        index
    }

    /// Of the items that are never deleted, some have keys on this node.
    async fn has_items_on(&self, node: usize) {
        let lanes = self.cluster.lanes_of(node).await;
        let lane = |id: u64| Lane::of(Traffic::item_key(id).as_bytes());
        let here = (1..=self.traffic.rows).filter(|id| self.traffic.stays(*id) && lanes.contains(&lane(*id))).count();
        assert!(here > 0, "no row lies on node {node}");
    }
}

#[ignore = "minutes: two masters join and leave"]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_masters_become_five_and_three_again() {
    let mut scene = scene().await;
    let load = scene.write();
    let new = [scene.grow().await, scene.grow().await];
    for (new, old) in new.into_iter().zip([0, 1]) {
        scene.cluster.reshard(SOME, old, new).await;
        scene.has_items_on(new).await;
    }
    load.more(100).await;
    for (new, old) in new.into_iter().zip([2, 0]) {
        scene.cluster.reshard(SOME, new, old).await;
        scene.cluster.leave(new).await;
    }
    scene.is_whole(load).await;
    ends(scene).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "minutes: moves two fifths of all hash slots, key by key, and back"]
async fn a_cluster_is_rebalanced_over_five_masters_and_back() {
    let mut scene = scene().await;
    let load = scene.write();
    let new = [scene.grow().await, scene.grow().await];
    let began = Instant::now();
    scene.cluster.rebalance(&[]).await;
    println!("rebalanced over five masters in {} s", began.elapsed().as_secs());
    load.more(100).await;
    let began = Instant::now();
    scene.cluster.rebalance(&new.map(|index| (index, 0))).await;
    println!("and over three in {} s", began.elapsed().as_secs());
    for index in new {
        scene.cluster.leave(index).await;
    }
    scene.is_whole(load).await;
    ends(scene).await;
}

/// The same slots, so that each comes back to a node that has had it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slots_are_resharded_back_and_forth_key_by_key() {
    let mut scene = scene().await;
    let load = scene.write();
    for _ in 0..2 {
        scene.cluster.reshard(SOME, 0, 1).await;
        scene.cluster.reshard(SOME, 1, 0).await;
    }
    // All rows of a table are in one slot, which takes longer to move.
    let crowd = Lane::of(b"{crowd}");
    for _ in 0..2 {
        let to = (scene.cluster.master_of(crowd).await + 1) % 3;
        scene.cluster.move_slot(crowd, to).await;
    }
    scene.is_whole(load).await;
    ends(scene).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slots_are_resharded_back_and_forth_atomically() {
    if Redis::lacks(Feature::AtomicMove).await {
        return;
    }
    let mut scene = scene().await;
    let load = scene.write();
    let crowd = Lane::of(b"{crowd}");
    for round in 0..4 {
        let (first, last) = (Lane::new(0).unwrap(), Lane::new(SOME).unwrap());
        scene.cluster.move_slots_at_once(first, last, (round + 1) % 2).await;
        let to = (scene.cluster.master_of(crowd).await + 1) % 3;
        scene.cluster.move_slot_at_once(crowd, to).await;
    }
    scene.is_whole(load).await;
    ends(scene).await;
}
