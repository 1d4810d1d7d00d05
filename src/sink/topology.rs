//! Which node of a Redis Cluster is the master of which hash slots, as one of its nodes reports it.
//!
//! Asks with CLUSTER SLOTS: unlike CLUSTER SHARDS it is in every version, lists masters that serve slots and no others,
//! and names the port and the host that the cluster wants its clients to use, TLS included. The answer may be out of
//! date. That does no harm, because a node refuses commands on slots that it does not serve; whoever gets such a refusal
//! discovers the topology anew.
//!
//! <https://redis.io/docs/latest/commands/cluster-slots/>

use super::bounds::REPLY_BYTES;
use super::connect::{self, Address, Cluster, Connection, HostPort, RedisTarget};
use super::missing_rights::Missing;
use super::server::value_in;
use super::{Class, Request, SinkError, error_reply, failed};
use crate::error::Disposition;
use crate::lanes::Lane;
use crate::lanes::mark::Home;
use crate::password::Password;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use redis::{Cmd, Pipeline, RedisError, Value};
use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::time::Duration;
use tokio::time::timeout;

/// A node that does not answer within this time counts as dead.
const NODE_TIMEOUT: Duration = Duration::from_secs(1);
/// Nodes are asked up to ten times a second, which is too often to run a password command each time.
const PASSWORD_AGE: Duration = Duration::from_secs(10);

/// The masters of a cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Topology {
    /// In the order of their first slots.
    nodes: Vec<Node>,
    /// What the node that was asked thinks of the cluster: `cluster_state`. True if it does not tell.
    is_up: bool,
}

/// A master that serves slots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// 40 hexadecimal digits, the same for as long as the node belongs to the cluster.
    pub id: String,
    /// What marks say of its lanes.
    pub home: Option<Home>,
    /// Where to reach it: as the cluster announces it, or as the URL maps that.
    pub at: HostPort,
    /// In ascending order, none empty.
    pub slots: Vec<RangeInclusive<u16>>,
}

impl Node {
    /// Whether a connection to the other leads here.
    pub(super) fn is_where(&self, other: &Node) -> bool {
        (&self.id, &self.at) == (&other.id, &other.at)
    }

    /// The first of its hash slots.
    pub fn lane(&self) -> Option<Lane> {
        Lane::new(*self.slots.first()?.start())
    }

    pub fn serves(&self, lane: Lane) -> bool {
        self.slots.iter().any(|range| range.contains(&lane.number()))
    }
}

impl Topology {
    /// Asks all nodes that the URL names, and some that they have named before, at once, because a read does not wait for
    /// one dead node after the other. The first answer counts that covers all hash slots of a cluster that is up: a node
    /// that the others have lost, or forgotten, may answer as well. If there is no such answer, the first one counts.
    ///
    /// # Errors
    /// If no node answers, or `redis.url` does not name a cluster.
    pub async fn discover(target: &RedisTarget) -> Result<Self, SinkError> {
        match Self::discover_with(&target.with_password_of(PASSWORD_AGE).await?).await {
            // The password may have changed since.
            Err(SinkError::Refused { reply, .. })
                if reply.class() == Class::Login && matches!(target.password, Password::Command(_)) =>
            {
                Self::discover_with(&target.with_password().await?).await
            }
            answer => answer,
        }
    }

    async fn discover_with(target: &RedisTarget) -> Result<Self, SinkError> {
        let Address::Cluster(cluster) = &target.address else {
            return Err(SinkError::NotACluster { redis: target.to_string() });
        };
        let (mut fallback, mut errors) = (None, Vec::new());
        let nodes = cluster.to_ask();
        let mut answers: FuturesUnordered<_> = nodes.iter().map(|at| ask_in_time(at, cluster, target)).collect();
        while let Some(answer) = answers.next().await {
            match answer {
                Ok(topology) if topology.is_whole() => return Ok(topology),
                Ok(topology) => drop(fallback.get_or_insert(topology)),
                Err(error) => errors.push(error),
            }
        }
        fallback.ok_or_else(|| no_answer(errors))
    }

    /// The master that serves this hash slot. `None` if no node does.
    pub fn master_of(&self, lane: Lane) -> Option<&Node> {
        self.nodes.iter().find(|node| node.serves(lane))
    }

    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    fn is_whole(&self) -> bool {
        self.is_up && self.uncovered() == 0
    }

    /// Whether the node that was asked considers the cluster usable.
    pub fn is_up(&self) -> bool {
        self.is_up
    }

    /// How many hash slots no node serves.
    pub fn uncovered(&self) -> u16 {
        let covered = self.nodes.iter().flat_map(|node| &node.slots).map(|range| range.end() - range.start() + 1);
        Lane::ALL.saturating_sub(covered.sum())
    }
}

/// An error that a person must fix says more than that another node is unreachable.
fn no_answer(mut errors: Vec<SinkError>) -> SinkError {
    match errors.iter().position(|error| error.disposition() == Disposition::Stop) {
        Some(at) => errors.swap_remove(at),
        None => {
            let said: Vec<String> = errors.iter().map(SinkError::to_string).collect();
            SinkError::NoTopology { said: said.join("; ") }
        }
    }
}

async fn ask_in_time(at: &HostPort, cluster: &Cluster, target: &RedisTarget) -> Result<Topology, SinkError> {
    match timeout(NODE_TIMEOUT, ask(at, cluster, target)).await {
        Ok(answer) => answer,
        Err(_) => Err(SinkError::TimedOut { redis: at.to_string(), after: NODE_TIMEOUT }),
    }
}

async fn ask(at: &HostPort, cluster: &Cluster, target: &RedisTarget) -> Result<Topology, SinkError> {
    let stream = connect::open_at(target, at).await?;
    // Errors name the node.
    let here = target.at(at);
    let connected = Connection::over(stream, target.login().await?, REPLY_BYTES).await;
    let mut connection = connected.map_err(|error| error.at(&here))?;
    let slots = cluster_command("SLOTS");
    let mut pipe = Pipeline::new();
    pipe.ignore_errors().add_command(slots.clone()).add_command(cluster_command("INFO"));
    let answered: Result<(Value, Value), RedisError> = pipe.query_async(&mut connection.link).await;
    let (ranges, info) = answered.map_err(|error| failed(&here, "CLUSTER SLOTS", &[], &error))?;
    if let Value::ServerError(error) = &ranges {
        let reply = error_reply(&here, &slots.get_packed_command(), error);
        return Err(match reply.class() {
            Class::Denied => SinkError::Forbidden {
                user: target.acl_user().to_owned(),
                missing: Missing::of_command("cluster|slots"),
            },
            // `ERR This instance has cluster support disabled`, or an unknown command.
            Class::Other if reply.is_plain() => SinkError::NotACluster { redis: at.to_string() },
            _ => SinkError::Refused { request: Request::new("CLUSTER SLOTS"), reply },
        });
    }
    let unexpected = || SinkError::Unexpected { command: "CLUSTER SLOTS", got: "something else".to_owned() };
    let (mut nodes, replicas) = nodes_of(&ranges, at).ok_or_else(unexpected)?;
    for node in &mut nodes {
        node.at = cluster.reachable(&node.at);
    }
    let info: Option<String> = redis::from_redis_value(info).ok();
    let is_up = info.is_none_or(|info| value_in(&info, "cluster_state").is_none_or(|state| state == "ok"));
    let mut topology = Topology { nodes, is_up };
    if topology.is_whole() {
        cluster.known.learn(&topology.nodes, &replicas);
    }
    topology.nodes.iter_mut().for_each(|node| node.home = cluster.known.shards.home(&node.id));
    Ok(topology)
}

fn cluster_command(subcommand: &str) -> Cmd {
    redis::cmd("CLUSTER").arg(subcommand).to_owned()
}

/// Parses the reply: for each range of slots its first, its last, the master and the replicas. `asked` is the node
/// that sent it. Returns the masters, and which of them each replica follows.
fn nodes_of(reply: &Value, asked: &HostPort) -> Option<(Vec<Node>, BTreeMap<String, String>)> {
    let Value::Array(ranges) = reply else { return None };
    let (mut nodes, mut replicas): (BTreeMap<String, Node>, _) = (BTreeMap::new(), BTreeMap::new());
    for range in ranges {
        let Value::Array(items) = range else { return None };
        let [Value::Int(first), Value::Int(last), master, following @ ..] = &items[..] else { return None };
        let lane = |number: &i64| u16::try_from(*number).ok().and_then(Lane::new);
        let (first, last) = (lane(first)?, lane(last)?);
        if first > last {
            return None;
        }
        let (id, at) = node_of(master, asked)?;
        for replica in following.iter().filter_map(|replica| node_of(replica, asked)) {
            replicas.insert(replica.0, id.clone());
        }
        let node = nodes.entry(id.clone()).or_insert(Node { id, home: None, at, slots: Vec::new() });
        node.slots.push(first.number()..=last.number());
    }
    let mut nodes: Vec<Node> = nodes.into_values().collect();
    for node in &mut nodes {
        node.slots.sort_by_key(|range| *range.start());
    }
    nodes.sort_by_key(|node| node.slots.first().map(|range| *range.start()));
    Some((nodes, replicas))
}

/// Returns the id and the announced address.
fn node_of(described: &Value, asked: &HostPort) -> Option<(String, HostPort)> {
    let Value::Array(items) = described else { return None };
    let (endpoint, port, id, further) = match &items[..] {
        [endpoint, Value::Int(port), id] => (endpoint, port, id, None),
        [endpoint, Value::Int(port), id, further, ..] => (endpoint, port, id, Some(further)),
        _ => return None,
    };
    let text = |value: &Value| redis::from_redis_value_ref::<String>(value).ok().filter(|text| !text.is_empty());
    let host = match text(endpoint).as_deref() {
        // The cluster prefers host names, and this node has none.
        Some("?") => further
            .and_then(|further| redis::from_redis_value_ref::<BTreeMap<String, String>>(further).ok())
            .and_then(|mut further| further.remove("ip"))
            .filter(|ip| !ip.is_empty()),
        Some(host) => Some(host.to_owned()),
        // It does not know its address, or keeps it to itself. Then it is where it was asked.
        None => None,
    };
    let host = host.unwrap_or_else(|| asked.host.clone());
    Some((text(id)?, HostPort { host, port: u16::try_from(*port).ok()? }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bulk(text: &str) -> Value {
        Value::BulkString(text.as_bytes().to_vec())
    }

    fn range(first: i64, last: i64, endpoint: Value, id: &str, further: Option<&[&str]>) -> Value {
        let mut master = vec![endpoint, Value::Int(7000), bulk(id)];
        master.extend(further.map(|words| Value::Array(words.iter().map(|word| bulk(word)).collect())));
        let replica = Value::Array(vec![bulk("10.0.0.9"), Value::Int(7000), bulk("replica")]);
        Value::Array(vec![Value::Int(first), Value::Int(last), Value::Array(master), replica])
    }

    fn parsed(ranges: Vec<Value>) -> Option<Topology> {
        let asked = HostPort { host: "seed.example".to_owned(), port: 6379 };
        nodes_of(&Value::Array(ranges), &asked).map(|(nodes, _)| Topology { nodes, is_up: true })
    }

    #[test]
    fn every_slot_has_the_master_that_the_reply_names_first() {
        let topology = parsed(vec![
            range(5000, 16_383, bulk("10.0.0.2"), "b", None),
            range(1001, 4999, bulk("10.0.0.1"), "a", Some(&[])),
            range(0, 999, bulk("10.0.0.1"), "a", Some(&[])),
        ])
        .unwrap();
        let master = |slot| topology.master_of(Lane::new(slot).unwrap()).map(|node| node.id.as_str());
        let found = [0, 999, 1000, 1001, 4999, 5000, 16_383].map(master);
        assert_eq!(found, [Some("a"), Some("a"), None, Some("a"), Some("a"), Some("b"), Some("b")]);
        assert_eq!(topology.uncovered(), 1);
        assert_eq!(topology.nodes()[0].slots, [0..=999, 1001..=4999]);
    }

    /// The replies of Redis 6.2 and 7.0 with each `cluster-preferred-endpoint-type`.
    #[test]
    fn a_node_is_where_the_cluster_announces_it() {
        for (endpoint, further, host) in [
            (bulk("10.0.0.1"), None, "10.0.0.1"),
            (bulk("10.0.0.1"), Some(&["hostname", "a.example"][..]), "10.0.0.1"),
            (bulk("a.example"), Some(&["ip", "10.0.0.1"]), "a.example"),
            (bulk("?"), Some(&["ip", "10.0.0.1"]), "10.0.0.1"),
            (bulk("?"), Some(&["ip", ""]), "seed.example"),
            (bulk(""), Some(&[]), "seed.example"),
            (Value::Nil, Some(&["ip", "10.0.0.1", "hostname", "a.example"]), "seed.example"),
        ] {
            let topology = parsed(vec![range(0, 16_383, endpoint.clone(), "a", further)]).unwrap();
            let at = &topology.nodes()[0].at;
            assert_eq!((at.host.as_str(), at.port), (host, 7000), "{endpoint:?} {further:?}");
        }
    }

    #[test]
    fn a_reply_of_another_form_is_none() {
        for ranges in [
            vec![Value::Int(1)],
            vec![Value::Array(vec![Value::Int(0), Value::Int(1)])],
            vec![range(0, 16_384, bulk("h"), "a", None)],
            vec![range(2, 1, bulk("h"), "a", None)],
            vec![range(-1, 1, bulk("h"), "a", None)],
            vec![range(0, 1, bulk("h"), "", None)],
        ] {
            assert_eq!(parsed(ranges.clone()), None, "{ranges:?}");
        }
        assert_eq!(parsed(Vec::new()).unwrap().uncovered(), Lane::ALL);
    }
}
