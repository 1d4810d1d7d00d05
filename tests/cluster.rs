//! Redis Cluster.

use crate::harness::{Cluster, Redis};
use prefetchd::lanes::Lane;
use prefetchd::sink::SinkError;
use prefetchd::sink::connect::RedisTarget;
use prefetchd::sink::topology::Topology;

fn target(url: &str) -> RedisTarget {
    RedisTarget::parse(url).unwrap()
}

/// What the other tests here rely on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slots_move_and_replicas_take_over_in_the_cluster_of_the_tests() {
    let mut cluster = Cluster::with_replicas().await;
    let lane = Lane::of(b"{tag}");
    let (first, other) = (cluster.master_of(lane).await, (cluster.master_of(lane).await + 1) % 3);
    cluster.node(first).command::<()>(&["HSET", "{tag}a", "f", "1"]).await;
    cluster.node(first).command::<()>(&["HSET", "{tag}b", "f", "2"]).await;
    cluster.move_slot(lane, other).await;
    assert_eq!(cluster.master_of(lane).await, other);
    assert_eq!((&cluster.hash("{tag}a").await["f"][..], &cluster.hash("{tag}b").await["f"][..]), ("1", "2"));

    cluster.fail_over_to(other + 3).await;
    assert_eq!(cluster.master_of(lane).await, other + 3);
    assert_eq!(cluster.keys("{tag}*").await, ["{tag}a", "{tag}b"]);
    cluster.replicates(other).await;
    cluster.kill(other + 3);
    cluster.take_over(other).await;
    assert_eq!(cluster.hash("{tag}b").await["f"], "2");
    cluster.start_again(other + 3);
    cluster.replicates(other + 3).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_masters_of_all_slots_are_discovered() {
    let mut cluster = Cluster::with_replicas().await;
    let target = target(&cluster.daemon_url());
    // What the harness does when a configuration is written.
    cluster.nodes().iter().for_each(|node| node.daemon_user().grant(["+cluster|slots".to_owned()]));
    let (slot, lane) = (Lane::of(b"a"), Lane::of(b"{tag}"));
    let moved_to = (cluster.master_of(lane).await + 1) % 3;
    cluster.move_slot(lane, moved_to).await;
    // A seed that does not answer must not matter.
    let master = cluster.master_of(slot).await;
    let replica = master + 3;
    cluster.kill(master);
    cluster.take_over(replica).await;
    let topology = Topology::discover(&target).await.unwrap();
    for (lane, index) in [(slot, replica), (lane, cluster.master_of(lane).await)] {
        let node = topology.master_of(lane).unwrap();
        assert_eq!((&*node.id, node.at.port), (cluster.id(index), cluster.node(index).port()), "{topology:?}");
    }
    assert_eq!((topology.nodes().len(), topology.uncovered()), (3, 0), "{topology:?}");
}

#[tokio::test]
async fn a_node_that_the_others_have_lost_is_not_believed() {
    let (lost, cluster) = (Redis::with(&["--cluster-enabled", "yes"]), Cluster::start().await);
    // It serves all slots, as it believes, in a cluster that is not up.
    lost.command::<()>(&["CLUSTER", "ADDSLOTSRANGE", "0", "16382"]).await;
    for node in cluster.nodes().iter().chain([&lost]) {
        node.daemon_user().grant(["+cluster|slots".to_owned(), "+cluster|info".to_owned()]);
    }
    let alone = format!("redis+cluster://{}@127.0.0.1:{}", lost.login(), lost.port());
    let both = cluster.daemon_url().replace('@', &format!("@127.0.0.1:{},", lost.port()));
    let topology = Topology::discover(&target(&both)).await.unwrap();
    assert_eq!((topology.nodes().len(), topology.is_up()), (3, true), "{topology:?}");
    let topology = Topology::discover(&target(&alone)).await.unwrap();
    assert_eq!((topology.nodes().len(), topology.is_up(), topology.uncovered()), (1, false, 1), "{topology:?}");
}

#[tokio::test]
async fn what_is_no_cluster_is_said() {
    let redis = Redis::start();
    let error = async |url: &str| Topology::discover(&target(url)).await.unwrap_err();
    let at = format!("{}@127.0.0.1:{}", redis.login(), redis.port());
    let denied = error(&format!("redis+cluster://{at}")).await;
    assert!(denied.to_string().contains("ACL SETUSER prefetchd '+cluster|slots'"), "{denied}");
    redis.daemon_user().grant(["+cluster|slots".to_owned()]);
    let single = error(&format!("redis+cluster://{at}")).await;
    assert!(matches!(single, SinkError::NotACluster { .. }), "{single}");
    let nobody = error("redis+cluster://127.0.0.1:1,127.0.0.1:2").await;
    assert!(
        matches!(&nobody, SinkError::NoTopology { said } if said.contains(":1:") && said.contains(":2:")),
        "{nobody}"
    );
}
