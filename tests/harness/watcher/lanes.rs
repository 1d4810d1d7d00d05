//! Watches a cluster. Its keys are read from their masters, one by one: nothing there makes several of them one read, and
//! nothing that prefetchd promises concerns several of them.
//!
//! A node may lose something by itself. Rows of its hash slots may then be older or missing until they are whole again,
//! but never torn, and afterwards they must not be older than they ever were.

use super::{Eyes, HALF, ITEM, ITEMS_A_LOOK, PAIRS_A_LOOK, REST, Watcher};
use crate::harness::cluster::owners_in;
use crate::harness::traffic::{BIN_IDS, BINS, PAIRS, Traffic, patient};
use crate::harness::{Cluster, POLL, Redis};
use prefetchd::lanes::Lane;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use redis::aio::MultiplexedConnection;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::Mutex;
use tokio::time::timeout;

/// How long a node may take before it is asked again. It may be frozen, or be sending a file to its replica.
const ANSWER: Duration = Duration::from_secs(2);

pub struct LanesWatcher {
    watcher: Watcher,
    lost: Arc<Mutex<BTreeSet<Lane>>>,
    nodes: Nodes,
}

/// The nodes, by index. More may join.
type Nodes = Arc<std::sync::Mutex<Vec<Node>>>;

struct Node {
    url: String,
    port: u16,
    id: String,
}

/// A key as it is to be watched.
struct Watched {
    key: String,
    fields: &'static [&'static str],
    /// Never deleted.
    stays: bool,
}

/// Paths to the nodes, by index.
struct Ways {
    nodes: Nodes,
    open: HashMap<usize, MultiplexedConnection>,
    /// The master of each hash slot. Changes only to what all nodes that answer agree on: a node that does not know yet
    /// that it has been replaced would show what was.
    owners: Vec<usize>,
}

impl LanesWatcher {
    pub async fn start(cluster: &Cluster, traffic: Traffic, seed: u64) -> Self {
        let eyes = Eyes {
            has_lists: false,
            traffic,
            checkpoint: String::new(),
            seen: HashMap::new(),
            may_go_back: false,
            rows: 0,
            whole_pairs: 0,
            violations: Vec::new(),
        };
        let nodes = Nodes::default();
        let mut ways = Ways {
            nodes: Arc::clone(&nodes),
            open: HashMap::new(),
            owners: cluster.owners().await.expect("nothing moves yet"),
        };
        meet(&nodes, cluster);
        let (eyes, stop) = (Arc::new(Mutex::new(eyes)), Arc::new(AtomicBool::new(false)));
        let lost = Arc::new(Mutex::new(BTreeSet::new()));
        let (watching, stopped, tolerated) = (Arc::clone(&eyes), Arc::clone(&stop), Arc::clone(&lost));
        let task = tokio::spawn(async move {
            let mut rng = StdRng::seed_from_u64(seed);
            while !stopped.load(Ordering::Relaxed) {
                let watched = watched(traffic, &mut rng);
                // What is lost meanwhile must not be expected of this look.
                let lost = tolerated.lock().await;
                let found = ways.read(&watched).await;
                let mut eyes = watching.lock().await;
                for (watched, found) in watched.iter().zip(&found) {
                    if let Some((row, pttl)) = found {
                        eyes.lane_row(watched, row, *pttl, lost.contains(&Lane::of(watched.key.as_bytes())));
                    }
                }
                drop((lost, eyes));
                if found.iter().any(Option::is_none) {
                    ways.ask_for_owners().await;
                    tokio::time::sleep(POLL).await;
                }
                tokio::time::sleep(REST).await;
            }
        });
        Self { watcher: Watcher { eyes, stop, task }, lost, nodes }
    }

    /// Nodes have joined the cluster.
    pub fn meets(&self, cluster: &Cluster) {
        meet(&self.nodes, cluster);
    }

    /// From here on, a node may lose what it has in these hash slots.
    pub async fn may_lose(&self, lanes: impl IntoIterator<Item = Lane>) {
        self.lost.lock().await.extend(lanes);
    }

    /// From here on, everything is expected that was seen before anything was lost.
    pub async fn all_is_whole(&self) {
        self.lost.lock().await.clear();
    }

    pub async fn check(&self) {
        self.watcher.check().await;
    }

    pub async fn stop(self) {
        self.watcher.stop().await;
    }
}

fn meet(nodes: &Nodes, cluster: &Cluster) {
    let node = |(node, id): (&Redis, &String)| Node { url: node.url(), port: node.port(), id: id.clone() };
    *nodes.lock().unwrap() = cluster.nodes().iter().zip(cluster.ids()).map(node).collect();
}

fn watched(traffic: Traffic, rng: &mut StdRng) -> Vec<Watched> {
    let mut watched = Vec::new();
    for _ in 0..ITEMS_A_LOOK {
        let id = traffic.any(rng);
        watched.push(Watched { key: Traffic::item_key(id), fields: ITEM, stays: traffic.stays(id) });
    }
    for (_, literal) in BINS {
        for _ in 0..ITEMS_A_LOOK / 4 {
            let id = rng.random_range(1..=BIN_IDS);
            watched.push(Watched { key: format!("{literal}{id}"), fields: ITEM, stays: false });
        }
    }
    for _ in 0..PAIRS_A_LOOK {
        let keys = Traffic::pair_keys(rng.random_range(1..=PAIRS));
        watched.extend(keys.map(|key| Watched { key, fields: HALF, stays: true }));
    }
    watched
}

impl Eyes {
    fn lane_row(&mut self, watched: &Watched, row: &super::Hash, pttl: i64, is_lost: bool) {
        let Watched { key, fields, stays } = watched;
        if !row.is_empty() && pttl == -1 {
            self.violation(format!("forever: {key} has no TTL"));
        }
        if !is_lost {
            self.row(key.clone(), fields, row, stays.then_some(false));
            return;
        }
        // It must be whole, and what was seen before the loss is not forgotten.
        let before = self.seen.remove(key);
        self.row(key.clone(), fields, row, None);
        match before {
            Some(before) => _ = self.seen.insert(key.clone(), before),
            None => _ = self.seen.remove(key),
        }
    }
}

impl Ways {
    /// Returns each hash and its TTL, or `None` where the answer could not be had.
    async fn read(&mut self, watched: &[Watched]) -> Vec<Option<(super::Hash, i64)>> {
        let mut by_owner: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        for (at, watched) in watched.iter().enumerate() {
            let lane = Lane::of(watched.key.as_bytes());
            by_owner.entry(self.owners[usize::from(lane.number())]).or_default().push(at);
        }
        let mut found = vec![None; watched.len()];
        for (owner, places) in by_owner {
            let keys: Vec<&str> = places.iter().map(|at| watched[*at].key.as_str()).collect();
            let Some(answers) = self.ask(owner, &keys, false).await else { continue };
            for (at, answer) in places.into_iter().zip(answers) {
                found[at] = match answer {
                    Answer::Row(row, pttl) => Some((row, pttl)),
                    Answer::Ask(port) => self.ask_port(port, &watched[at].key).await,
                    Answer::None => None,
                };
            }
        }
        found
    }

    /// The key is on its way to that node.
    async fn ask_port(&mut self, port: u16, key: &str) -> Option<(super::Hash, i64)> {
        let node = self.nodes.lock().unwrap().iter().position(|known| known.port == port)?;
        match self.ask(node, &[key], true).await?.pop()? {
            Answer::Row(row, pttl) => Some((row, pttl)),
            Answer::Ask(_) | Answer::None => None,
        }
    }

    async fn ask(&mut self, node: usize, keys: &[&str], asking: bool) -> Option<Vec<Answer>> {
        let mut pipe = redis::pipe();
        pipe.ignore_errors();
        for key in keys {
            for command in ["HGETALL", "PTTL"] {
                if asking {
                    pipe.cmd("ASKING").ignore();
                }
                pipe.cmd(command).arg(key);
            }
        }
        let answers: Vec<redis::Value> = self.query(node, &pipe).await?;
        let answer = |of_it: &[redis::Value]| match of_it {
            [redis::Value::ServerError(error), _] if error.code() == "ASK" => {
                let port = error.details().and_then(|text| text.rsplit(':').next()?.parse().ok());
                port.map_or(Answer::None, Answer::Ask)
            }
            [redis::Value::ServerError(_), _] => Answer::None,
            [row, pttl] => {
                // The key may have been moved away between the two.
                let pttl = redis::from_redis_value_ref(pttl).unwrap_or(-2);
                Answer::Row(redis::from_redis_value_ref(row).unwrap(), pttl)
            }
            _ => unreachable!("two answers for each key"),
        };
        Some(answers.chunks(2).map(answer).collect())
    }

    async fn ask_for_owners(&mut self) {
        let mut agreed = None;
        let ids: Vec<String> = self.nodes.lock().unwrap().iter().map(|node| node.id.clone()).collect();
        for node in 0..ids.len() {
            let mut pipe = redis::pipe();
            pipe.cmd("CLUSTER").arg("SLOTS");
            // One that is dead has no say.
            let Some(mut answers) = self.query::<Vec<Vec<redis::Value>>>(node, &pipe).await else { continue };
            let owners = owners_in(answers.remove(0), &ids);
            if owners.is_none() || *agreed.get_or_insert_with(|| owners.clone()) != owners {
                return;
            }
        }
        if let Some(Some(owners)) = agreed {
            self.owners = owners;
        }
    }

    async fn query<T: redis::FromRedisValue>(&mut self, node: usize, pipe: &redis::Pipeline) -> Option<T> {
        let mut connection = match self.open.remove(&node) {
            Some(open) => open,
            None => {
                let url = self.nodes.lock().unwrap()[node].url.clone();
                timeout(ANSWER, patient(&url)).await.ok()?.ok()?
            }
        };
        let answers = timeout(ANSWER, pipe.query_async(&mut connection)).await.ok()?.ok()?;
        self.open.insert(node, connection);
        Some(answers)
    }
}

enum Answer {
    Row(super::Hash, i64),
    /// The node at this port may have it.
    Ask(u16),
    None,
}
