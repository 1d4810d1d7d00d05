//! A Redis Cluster of a test's own: real servers on loopback ports.

use super::proxy::{Barred, Proxy};
use super::{Feature, Redis, eventually};
use prefetchd::cli::servers::{self, BUS_OFFSET};
use prefetchd::lanes::Lane;
use std::cell::Cell;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::ops::{Range, RangeInclusive};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// How long a node may be silent before the others consider it failed. Longer than a busy machine lets a server wait.
const NODE_TIMEOUT_MS: &str = "5000";
/// How many keys MIGRATE moves at a time.
const KEYS_A_PAGE: &str = "100";

/// Masters, and the replicas of each. Nodes are known by their index: first the masters, then the first replica of each
/// master, and so on, then those that joined later. Roles may change; indexes do not.
pub struct Cluster {
    nodes: Vec<Redis>,
    ids: Vec<String>,
    /// The paths of the other nodes to each node, if these can be cut.
    buses: Vec<Proxy>,
}

impl Cluster {
    /// Three masters.
    pub async fn start() -> Self {
        Self::with(3, 0, &[]).await
    }

    /// Three masters with one replica each: node 3 replicates node 0, and so on.
    pub async fn with_replicas() -> Self {
        Self::with(3, 1, &[]).await
    }

    /// Starts it with additional arguments for each server, and returns once every node can be used.
    pub async fn with(masters: usize, replicas: usize, args: &[&str]) -> Self {
        Self::of((0..masters * (1 + replicas)).map(|_| Self::server(args)).collect(), masters).await
    }

    fn server(args: &[&str]) -> Redis {
        let ours = ["--cluster-enabled", "yes", "--cluster-node-timeout", NODE_TIMEOUT_MS];
        // A replica may take over even if it has not heard from its master for long.
        Redis::with(&[&ours[..], &["--cluster-replica-validity-factor", "0"], args].concat())
    }

    /// Three masters with one replica each, which [`Self::isolate`] can separate. Each node connects to the others from
    /// an address of its own, so that the paths to them can tell who comes.
    pub async fn that_can_be_partitioned() -> Self {
        let has_source = Redis::start().has(Feature::SourceAddress).await;
        let (mut nodes, mut buses) = (Vec::new(), Vec::new());
        for index in 0..6 {
            // It leads nowhere until the node has a port.
            let bus = Proxy::new("redis://127.0.0.1:1", 1).await;
            let (source, port) = (Self::source(index).to_string(), bus.port().to_string());
            let at = ["--cluster-announce-ip", "127.0.0.1", "--cluster-announce-bus-port", &port];
            let from = ["--bind", &source, "127.0.0.1", "--bind-source-addr", &source];
            // Before Redis 7, it connects from the first address that it listens on.
            let node = Self::server(&[&at[..], &from[..if has_source { 5 } else { 3 }]].concat());
            bus.lead_to(node.port() + BUS_OFFSET);
            nodes.push(node);
            buses.push(bus);
        }
        Self::connected(nodes, buses, 3).await
    }

    /// The address from which a node connects to others.
    fn source(index: usize) -> IpAddr {
        IpAddr::from([127, 0, 1, u8::try_from(index + 1).unwrap()])
    }

    /// Makes a cluster of servers in cluster mode that know no other node.
    pub async fn of(nodes: Vec<Redis>, masters: usize) -> Self {
        Self::connected(nodes, Vec::new(), masters).await
    }

    async fn connected(nodes: Vec<Redis>, buses: Vec<Proxy>, masters: usize) -> Self {
        let mut ids = Vec::new();
        for (index, node) in nodes.iter().enumerate() {
            ids.push(node.command(&["CLUSTER", "MYID"]).await);
            // So that the masters do not have to agree on them first.
            node.command::<()>(&["CLUSTER", "SET-CONFIG-EPOCH", &(index + 1).to_string()]).await;
        }
        let cluster = Self { nodes, ids, buses };
        for index in 0..masters {
            let share = |index: usize| u16::try_from(index * usize::from(Lane::ALL) / masters).unwrap();
            Self::serve(&cluster.nodes[index], share(index)..share(index + 1)).await;
        }
        for (index, node) in cluster.nodes.iter().enumerate().skip(1) {
            let setting = async |name: &str| node.command::<Vec<String>>(&["CONFIG", "GET", name]).await.pop();
            let encrypted = setting("tls-cluster").await.is_some_and(|value| value == "yes");
            let port = setting(if encrypted { "tls-port" } else { "port" }).await.unwrap();
            let bus = cluster.buses.get(index).map(|bus| bus.port().to_string());
            let at = ["CLUSTER", "MEET", "127.0.0.1", &port].into_iter().chain(bus.as_deref());
            cluster.nodes[0].command::<()>(&at.collect::<Vec<_>>()).await;
        }
        cluster.agrees().await;
        for index in masters..cluster.nodes.len() {
            let master = &cluster.ids[index % masters];
            cluster.nodes[index].command::<()>(&["CLUSTER", "REPLICATE", master]).await;
        }
        for index in masters..cluster.nodes.len() {
            cluster.replicates(index).await;
        }
        cluster.agrees().await;
        cluster.know_replicas(cluster.nodes.len() - masters).await;
        cluster
    }

    /// Waits until each of the nodes knows so many replicas, so that it tells them to a daemon.
    async fn know_replicas(&self, count: usize) {
        for (_, node) in self.members() {
            let slots = async || node.command::<Vec<Vec<redis::Value>>>(&["CLUSTER", "SLOTS"]).await;
            // A range of slots: the first, the last, the master, and the replicas.
            let replicas = |slots: &Vec<Vec<redis::Value>>| slots.iter().map(|range| range.len() - 3).sum::<usize>();
            eventually("the replicas are known", slots, |slots| replicas(slots) >= count).await;
        }
    }

    /// Gives these hash slots to a node.
    pub async fn serve(node: &Redis, slots: Range<u16>) {
        let slots: Vec<String> = slots.map(|slot| slot.to_string()).collect();
        let words = ["CLUSTER", "ADDSLOTS"].into_iter().chain(slots.iter().map(String::as_str));
        node.command::<()>(&words.collect::<Vec<_>>()).await;
    }

    /// Waits until each of the nodes knows all of them and considers the cluster usable.
    async fn agrees(&self) {
        let known = format!("cluster_known_nodes:{}\r", self.members().count());
        for (_, node) in self.members() {
            let info = async || node.command::<String>(&["CLUSTER", "INFO"]).await;
            let agrees = |info: &String| info.contains("cluster_state:ok") && info.contains(&known);
            eventually("the nodes know each other", info, agrees).await;
        }
    }

    /// The nodes that run, with their indexes.
    fn members(&self) -> impl Iterator<Item = (usize, &Redis)> {
        self.nodes.iter().enumerate().filter(|(_, node)| node.is_up())
    }

    /// Waits until this node is a replica that has synchronized.
    pub async fn replicates(&self, index: usize) {
        let info = async || self.nodes[index].command::<String>(&["INFO", "replication"]).await;
        eventually("the replica is synchronized", info, |info| info.contains("master_link_status:up")).await;
    }

    /// The value for `redis.url`, which names every node.
    pub fn daemon_url(&self) -> String {
        format!("redis+cluster://{}@{}", self.nodes[0].login(), self.addresses())
    }

    /// An unreliable network between a daemon and each of the nodes, and the value for `redis.url` with which it uses that.
    pub async fn through_proxies(&self) -> (Vec<Proxy>, String) {
        let (mut proxies, mut mapped) = (Vec::new(), Vec::new());
        let mut url = self.daemon_url();
        for node in &self.nodes {
            let (port, proxy) = (node.port(), Proxy::new(&url, node.port()).await);
            url = proxy.url();
            mapped.push(format!("map=127.0.0.1:{port}=127.0.0.1:{}", proxy.port()));
            proxies.push(proxy);
        }
        (proxies, format!("{url}?{}", mapped.join("&")))
    }

    /// The addresses of all nodes, separated by commas.
    pub fn addresses(&self) -> String {
        let at: Vec<String> = self.nodes.iter().map(|node| format!("127.0.0.1:{}", node.port())).collect();
        at.join(",")
    }

    pub fn nodes(&self) -> &[Redis] {
        &self.nodes
    }

    pub fn node(&self, index: usize) -> &Redis {
        &self.nodes[index]
    }

    pub fn node_mut(&mut self, index: usize) -> &mut Redis {
        &mut self.nodes[index]
    }

    pub fn id(&self, index: usize) -> &str {
        &self.ids[index]
    }

    /// Returns the index of the node that considers itself the master of this hash slot. Panics if none does.
    pub async fn master_of(&self, lane: Lane) -> usize {
        let masters = async || {
            let mut masters = Vec::new();
            for index in 0..self.nodes.len() {
                if self.serves(index, lane).await {
                    masters.push(index);
                }
            }
            masters
        };
        eventually("one node serves the slot", masters, |masters| masters.len() == 1).await[0]
    }

    /// Whether a running node considers itself the master of this hash slot.
    async fn serves(&self, index: usize, lane: Lane) -> bool {
        let node = &self.nodes[index];
        node.is_up() && self.owner_at(node, lane).await.as_deref() == Some(&self.ids[index])
    }

    /// Returns the id of the node that is the master of this hash slot according to `node`.
    async fn owner_at(&self, node: &Redis, lane: Lane) -> Option<String> {
        let ranges = masters_in(node.command(&["CLUSTER", "SLOTS"]).await);
        ranges.into_iter().find_map(|(slots, id)| slots.contains(&lane.number()).then_some(id))
    }

    /// Returns the index of the master of each hash slot, unless the nodes disagree.
    pub async fn owners(&self) -> Option<Vec<usize>> {
        let mut agreed = None;
        for (_, node) in self.members() {
            let owners = owners_in(node.command(&["CLUSTER", "SLOTS"]).await, &self.ids)?;
            if *agreed.get_or_insert_with(|| owners.clone()) != owners {
                return None;
            }
        }
        agreed
    }

    /// The ids of all nodes, by index.
    pub fn ids(&self) -> &[String] {
        &self.ids
    }

    /// The master of a key's hash slot.
    pub async fn server_of(&self, key: &str) -> &Redis {
        &self.nodes[self.master_of(Lane::of(key.as_bytes())).await]
    }

    /// Returns a row as it is in Redis; empty if there is none.
    pub async fn hash(&self, key: &str) -> BTreeMap<String, String> {
        self.server_of(key).await.hash(key).await
    }

    /// Returns the keys on all masters.
    pub async fn keys(&self, pattern: &str) -> Vec<String> {
        let mut keys = Vec::new();
        for (_, node) in self.members() {
            let role: Vec<redis::Value> = node.command(&["ROLE"]).await;
            if redis::from_redis_value_ref::<String>(&role[0]).unwrap() == "master" {
                keys.extend(node.keys(pattern).await);
            }
        }
        keys.sort();
        keys
    }

    /// Waits until the nodes agree, and returns the hash slots of this master.
    pub async fn lanes_of(&self, master: usize) -> Vec<Lane> {
        let owners = self.agreed().await;
        Lane::every().filter(|lane| owners[usize::from(lane.number())] == master).collect()
    }

    /// Waits until the nodes agree on the master of each hash slot, and returns their indexes.
    pub async fn agreed(&self) -> Vec<usize> {
        let owners = async || self.owners().await;
        eventually("the nodes agree", owners, Option::is_some).await.unwrap()
    }

    // -------------------------------------------------------------------------------------------------- its operators

    /// Runs `redis-cli --cluster`, as its operators do, on all nodes, once they agree. `words`: a command, and what follows
    /// the address of a node.
    async fn operate(&self, command: &str, words: &[&str]) {
        self.agreed().await;
        let at = self.members().next().map(|(_, node)| format!("127.0.0.1:{}", node.port())).unwrap();
        let mut cli = Command::new(servers::callable(&["redis-cli", "valkey-cli"]));
        cli.args(["--cluster", command]);
        match command {
            "add-node" => cli.args(words).arg(at),
            _ => cli.arg(at).args(words),
        };
        cli.env("REDISCLI_AUTH", servers::redis_password()).stdin(Stdio::null());
        let ran = tokio::task::spawn_blocking(move || cli.output()).await.unwrap().unwrap();
        let said = String::from_utf8_lossy(&ran.stdout);
        assert!(ran.status.success(), "{command} {words:?}: {said}\n{}", String::from_utf8_lossy(&ran.stderr));
    }

    /// Adds a master without hash slots, and returns its index.
    pub async fn join(&mut self) -> usize {
        // Otherwise it becomes a replica as soon as its last hash slot has moved, and `redis-cli` cannot go on.
        let node = Self::server(&["--cluster-allow-replica-migration", "no"]);
        self.operate("add-node", &[&format!("127.0.0.1:{}", node.port())]).await;
        self.ids.push(node.command(&["CLUSTER", "MYID"]).await);
        self.nodes.push(node);
        self.agrees().await;
        self.nodes.len() - 1
    }

    /// Removes a master without hash slots from the cluster, and stops it.
    pub async fn leave(&mut self, index: usize) {
        let id = self.ids[index].clone();
        self.operate("del-node", &[&id]).await;
        self.nodes[index].kill();
        self.agrees().await;
    }

    /// Moves hash slots with their keys, one key after the other.
    pub async fn reshard(&self, slots: u16, from: usize, to: usize) {
        let (count, from, to) = (slots.to_string(), &self.ids[from], &self.ids[to]);
        let words = ["--cluster-from", from, "--cluster-to", to, "--cluster-slots", &count, "--cluster-yes"];
        self.operate("reshard", &words).await;
        self.agreed().await;
    }

    /// Gives each master a share of all hash slots in proportion to these weights.
    pub async fn rebalance(&self, weights: &[(usize, u8)]) {
        let weights: Vec<String> =
            weights.iter().map(|(index, weight)| format!("{}={weight}", self.ids[*index])).collect();
        let mut words = vec!["--cluster-use-empty-masters", "--cluster-threshold", "1"];
        if !weights.is_empty() {
            words.push("--cluster-weight");
            words.extend(weights.iter().map(String::as_str));
        }
        self.operate("rebalance", &words).await;
        self.agreed().await;
    }

    // ------------------------------------------------------------------------------------------------ slots that move

    /// Moves a hash slot with its keys.
    pub async fn move_slot(&self, lane: Lane, to: usize) {
        self.begin_move(lane, to).await;
        while self.move_keys(lane, to, KEYS_A_PAGE).await > 0 {}
        self.end_move(lane, to).await;
    }

    /// Moves a hash slot atomically.
    pub async fn move_slot_at_once(&self, lane: Lane, to: usize) {
        self.move_slots_at_once(lane, lane, to).await;
    }

    /// Moves hash slots of one master atomically.
    pub async fn move_slots_at_once(&self, first: Lane, last: Lane, to: usize) {
        let (from, slots) = (self.master_of(first).await, [first, last].map(|lane| lane.to_string()));
        let words = ["CLUSTER", "MIGRATESLOTS", "SLOTSRANGE", &slots[0], &slots[1], "NODE", &self.ids[to]];
        self.nodes[from].command::<()>(&words).await;
        for lane in [first, last] {
            self.all_know(lane, to).await;
        }
    }

    /// Has nobody serve a hash slot. Its keys stay where they are.
    pub async fn uncover(&self, lane: Lane) {
        for (_, node) in self.members() {
            node.command::<()>(&["CLUSTER", "DELSLOTS", &lane.to_string()]).await;
        }
        self.state("fail").await;
    }

    /// Has this master serve a hash slot that nobody serves.
    pub async fn cover(&self, lane: Lane, master: usize) {
        self.nodes[master].command::<()>(&["CLUSTER", "ADDSLOTS", &lane.to_string()]).await;
        self.all_know(lane, master).await;
        self.state("ok").await;
    }

    /// Waits until all nodes consider the cluster to be in this state.
    async fn state(&self, state: &str) {
        for (_, node) in self.members() {
            let info = async || node.command::<String>(&["CLUSTER", "INFO"]).await;
            let is_so = |info: &String| info.contains(&format!("cluster_state:{state}\r"));
            eventually("the cluster is in this state", info, is_so).await;
        }
    }

    /// From now on, keys of the slot can be moved. The old master redirects with ASK to the new one for those that it
    /// does not have.
    pub async fn begin_move(&self, lane: Lane, to: usize) {
        let (from, slot) = (self.master_of(lane).await, lane.to_string());
        self.nodes[to].command::<()>(&["CLUSTER", "SETSLOT", &slot, "IMPORTING", &self.ids[from]]).await;
        self.nodes[from].command::<()>(&["CLUSTER", "SETSLOT", &slot, "MIGRATING", &self.ids[to]]).await;
    }

    /// Moves at most so many keys of a slot that is being moved, and returns how many.
    pub async fn move_keys(&self, lane: Lane, to: usize, count: &str) -> usize {
        let from = &self.nodes[self.master_of(lane).await];
        let keys: Vec<String> = from.command(&["CLUSTER", "GETKEYSINSLOT", &lane.to_string(), count]).await;
        if !keys.is_empty() {
            let (port, password) = (self.nodes[to].port().to_string(), servers::redis_password());
            let words = ["MIGRATE", "127.0.0.1", &port, "", "0", "10000", "AUTH", password, "KEYS"];
            let words = words.into_iter().chain(keys.iter().map(String::as_str));
            from.command::<()>(&words.collect::<Vec<_>>()).await;
        }
        keys.len()
    }

    /// Makes `to` the master of the slot, once all keys have been moved, and waits until all nodes know.
    pub async fn end_move(&self, lane: Lane, to: usize) {
        let (from, slot) = (self.master_of(lane).await, lane.to_string());
        // The new owner first: <https://redis.io/docs/latest/commands/cluster-setslot/>
        for index in [to, from] {
            self.nodes[index].command::<()>(&["CLUSTER", "SETSLOT", &slot, "NODE", &self.ids[to]]).await;
        }
        self.all_know(lane, to).await;
    }

    /// Waits until all nodes know the master of a slot.
    async fn all_know(&self, lane: Lane, to: usize) {
        for (_, node) in self.members() {
            let owner = async || self.owner_at(node, lane).await;
            eventually("every node knows the new master", owner, |owner| owner.as_deref() == Some(&self.ids[to])).await;
        }
    }

    // -------------------------------------------------------------------------------------------------------- failures

    /// Has a replica take over from its master, which is running, without losing anything. The old master becomes its
    /// replica.
    pub async fn fail_over_to(&self, replica: usize) {
        self.takes_over(replica, &["CLUSTER", "FAILOVER"]).await;
    }

    /// Has a replica take over from its master without asking anybody, although the master may be dead, or may have
    /// acknowledged more.
    pub async fn take_over(&self, replica: usize) {
        self.takes_over(replica, &["CLUSTER", "FAILOVER", "TAKEOVER"]).await;
    }

    /// Has a replica take over from its master if the other masters agree, although its master may be dead, or may have
    /// acknowledged more.
    pub async fn force_over_to(&self, replica: usize) {
        self.takes_over(replica, &["CLUSTER", "FAILOVER", "FORCE"]).await;
    }

    /// Waits until the others have replaced a master by this replica, of their own accord.
    pub async fn is_elected(&self, replica: usize) {
        let info = async || self.nodes[replica].command::<String>(&["INFO", "replication"]).await;
        eventually("the replica is elected", info, |info| info.contains("role:master")).await;
    }

    /// Separates a node from all others, but not from its clients.
    pub fn isolate(&self, index: usize) {
        for (other, bus) in self.buses.iter().enumerate() {
            bus.bar(if other == index { Barred::Everybody } else { Barred::One(Self::source(index)) });
        }
    }

    /// Ends that.
    pub fn reunite(&self) {
        self.buses.iter().for_each(|bus| bus.bar(Barred::Nobody));
    }

    async fn takes_over(&self, replica: usize, command: &[&str]) {
        let node = &self.nodes[replica];
        let asked = Cell::new(None);
        let info = async || {
            // A replica gives up after five seconds.
            if asked.get().is_none_or(|at: Instant| at.elapsed() > Duration::from_secs(6)) {
                asked.set(Some(Instant::now()));
                // It may just have become the master.
                let _ = redis::cmd(command[0]).arg(&command[1..]).exec_async(&mut node.connection().await).await;
            }
            node.command::<String>(&["INFO", "replication"]).await
        };
        eventually("the replica takes over", info, |info| info.contains("role:master")).await;
        for (_, other) in self.members() {
            let slots = async || other.command::<String>(&["CLUSTER", "NODES"]).await;
            let knows = |nodes: &String| {
                let line = nodes.lines().find(|line| line.starts_with(&self.ids[replica])).unwrap_or_default();
                line.contains("master") && line.split(' ').count() > 8
            };
            eventually("every node knows the new master", slots, knows).await;
        }
    }

    /// Cuts a replica off from its master, so that it will lack what is written from now on.
    pub async fn lags(&self, replica: usize, master: usize) {
        self.nodes[replica].command::<()>(&["CONFIG", "SET", "masterauth", "not-the-password"]).await;
        self.nodes[master].command::<()>(&["CLIENT", "KILL", "TYPE", "slave"]).await;
        let info = async || self.nodes[replica].command::<String>(&["INFO", "replication"]).await;
        eventually("the replica is cut off", info, |info| info.contains("master_link_status:down")).await;
    }

    /// Kills a node, which loses everything that it had in memory.
    pub fn kill(&mut self, index: usize) {
        self.nodes[index].kill();
    }

    /// Ends that.
    pub async fn follows(&self, replica: usize) {
        self.nodes[replica].command::<()>(&["CONFIG", "SET", "masterauth", servers::redis_password()]).await;
    }

    /// Starts a node again. Its place in the cluster is in its directory.
    pub fn start_again(&mut self, index: usize) {
        self.nodes[index].start_again();
    }
}

/// Takes the answer to CLUSTER SLOTS apart: ranges of hash slots, and the id of the master of each.
fn masters_in(answer: Vec<redis::Value>) -> Vec<(RangeInclusive<u16>, String)> {
    let range = |range: redis::Value| {
        let redis::Value::Array(parts) = range else { panic!("{range:?}") };
        let [first, last, redis::Value::Array(master), ..] = &parts[..] else { panic!("{parts:?}") };
        let number = |value: &redis::Value| redis::from_redis_value_ref::<u16>(value).unwrap();
        (number(first)..=number(last), redis::from_redis_value_ref::<String>(&master[2]).unwrap())
    };
    answer.into_iter().map(range).collect()
}

/// Returns the place in `ids` of the master of each hash slot, if all have one.
pub fn owners_in(answer: Vec<redis::Value>, ids: &[String]) -> Option<Vec<usize>> {
    let mut owners = vec![None; usize::from(Lane::ALL)];
    for (slots, id) in masters_in(answer) {
        let owner = ids.iter().position(|known| *known == id);
        slots.for_each(|slot| owners[usize::from(slot)] = owner);
    }
    owners.into_iter().collect()
}
