//! A throwaway Redis Cluster: three masters and their replicas, formed without redis-cli.
//!
//! Other users of this machine are kept out less well than from a single server. The bus between the nodes has no
//! password, and clients send theirs in clear text to the ports that the nodes announce. At least no node gives up its
//! port while the cluster is used: to make a replica take over, its master is frozen instead of killed. A frozen process
//! also keeps its guard, which removes its directory, whatever happens to us meanwhile.

use super::{Place, Redis, START_PATIENCE, ServerError, io, redis_password, redis_program};
use crate::lanes::Lane;
use nix::sys::signal::Signal;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const MASTERS: u16 = 3;
/// How long a node may be silent before the others consider it failed. Longer than a busy machine lets a server wait,
/// and short enough to watch.
const NODE_TIMEOUT_MS: &str = "5000";
/// With this version came ADDSLOTSRANGE, and scripts over keys that are wherever they hash.
const LEAST_VERSION: (u32, u32) = (7, 0);
const POLL: Duration = Duration::from_millis(10);

/// Three masters, which share the hash slots equally, and as many replicas of each as were asked for. The password of all
/// is [`redis_password`].
///
/// A node is known by its index: in the beginning, 0 to 2 are the masters, in the order of their hash slots, and 3 to 5
/// their first replicas, in the same order, and so on. Roles may change; indexes do not.
#[derive(Debug)]
pub struct Cluster {
    nodes: Vec<Node>,
    /// Neither asked nor waited for.
    frozen: Option<usize>,
}

#[derive(Debug)]
struct Node {
    redis: Redis,
    /// 40 hexadecimal digits.
    id: String,
}

impl Cluster {
    /// Starts the servers, with so many replicas of each master, and returns once every node knows the others and accepts
    /// commands.
    ///
    /// # Errors
    /// If Redis is not installed, older than 7.0, or does not start.
    pub fn start_new(place: &Place, replicas: u16) -> Result<Self, ServerError> {
        new_enough(redis_program()?)?;
        // Replicas log in to their masters with it.
        let config = format!("masterauth {}\n", redis_password());
        let args = ["--cluster-enabled", "yes", "--cluster-node-timeout", NODE_TIMEOUT_MS];
        // By default a master waits five seconds for further replicas before it sends its data.
        let args = [&args[..], &["--repl-diskless-sync-delay", "0"]].concat();
        let mut nodes = Vec::new();
        for number in 1..=MASTERS * (1 + replicas) {
            let redis = Redis::start_new(place, &format!("redis-{number}"), &config, &args)?;
            let id = redis.ask(&["CLUSTER", "MYID"])?;
            nodes.push(Node { redis, id });
        }
        let cluster = Self { nodes, frozen: None };
        cluster.form()?;
        Ok(cluster)
    }

    fn form(&self) -> Result<(), ServerError> {
        let (masters, replicas) = self.nodes.split_at(usize::from(MASTERS));
        for (number, node) in (1..).zip(&self.nodes) {
            let number: u32 = number;
            // Otherwise the masters would have to agree on them first.
            node.redis.command(&["CLUSTER", "SET-CONFIG-EPOCH", &number.to_string()])?;
        }
        for (master, slots) in masters.iter().zip((0..MASTERS).map(share)) {
            let [first, last] = [slots.start, slots.end - 1].map(|slot| slot.to_string());
            master.redis.command(&["CLUSTER", "ADDSLOTSRANGE", &first, &last])?;
        }
        for node in &self.nodes[1..] {
            let port = node.redis.port().to_string();
            self.nodes[0].redis.command(&["CLUSTER", "MEET", "127.0.0.1", &port])?;
        }
        for (replica, master) in replicas.iter().zip(masters.iter().cycle()) {
            // Refused until the replica has heard of its master.
            until(&replica.redis, "a node of the cluster met no other", |redis| {
                Ok(redis.command(&["CLUSTER", "REPLICATE", &master.id]).is_ok())
            })?;
        }
        for node in &self.nodes {
            let known = format!("cluster_known_nodes:{}\r", self.nodes.len());
            until(&node.redis, "the cluster was not formed", |redis| {
                let info = redis.ask(&["CLUSTER", "INFO"])?;
                Ok(info.contains("cluster_state:ok") && info.contains(&known))
            })?;
        }
        replicas.iter().try_for_each(|replica| until(&replica.redis, "a replica was not synchronized", is_replica))
    }

    /// Returns the index of the master of this hash slot, as the first node that answers knows it.
    ///
    /// # Errors
    /// If no node answers, or none is the master.
    pub fn master_of(&self, lane: Lane) -> Result<usize, ServerError> {
        let to_ask = self.nodes.iter().enumerate().filter(|(index, _)| Some(*index) != self.frozen);
        let reply = to_ask.map(|(_, node)| node.redis.ask(&["CLUSTER", "NODES"])).find(Result::is_ok);
        let reply = reply.unwrap_or_else(|| Err(no_master(lane)))?;
        let id = master_in(&reply, lane).ok_or_else(|| no_master(lane))?;
        self.nodes.iter().position(|node| node.id == id).ok_or_else(|| no_master(lane))
    }

    /// Executes one command on a node: see [`Redis::command`].
    ///
    /// # Errors
    /// If it does not answer, or answers with an error.
    pub fn command(&self, node: usize, words: &[&str]) -> Result<(), ServerError> {
        self.nodes[node].redis.command(words)
    }

    /// Freezes a node: it keeps its connections and answers nobody.
    pub fn freeze(&mut self, node: usize) {
        self.nodes[node].redis.signal(Signal::SIGSTOP);
        self.frozen = Some(node);
    }

    /// Lets the frozen node go on.
    pub fn thaw(&mut self) {
        if let Some(node) = self.frozen.take() {
            self.nodes[node].redis.signal(Signal::SIGCONT);
        }
    }

    /// Whether a node is a replica that has synchronized.
    ///
    /// # Errors
    /// If it does not answer.
    pub fn is_replica(&self, node: usize) -> Result<bool, ServerError> {
        is_replica(&self.nodes[node].redis)
    }

    /// The URL of prefetchd's configuration, which names every node.
    pub fn url(&self) -> String {
        let at: Vec<String> = self.nodes.iter().map(|node| format!("127.0.0.1:{}", node.redis.port())).collect();
        format!("redis+cluster://:{}@{}", redis_password(), at.join(","))
    }

    /// The URL of each node, by itself.
    pub fn node_urls(&self) -> Vec<String> {
        self.nodes.iter().map(|node| node.redis.url()).collect()
    }

    pub fn port(&self, node: usize) -> u16 {
        self.nodes[node].redis.port()
    }

    /// The id of a node, as its cluster names it.
    pub fn id(&self, node: usize) -> &str {
        &self.nodes[node].id
    }

    /// The node that was the first replica of this master in the beginning.
    pub fn replica_of(master: usize) -> usize {
        master + usize::from(MASTERS)
    }

    /// A file that contains the password and nothing else.
    pub fn password_file(&self) -> &Path {
        self.nodes[0].redis.password_file()
    }
}

/// The hash slots of a master.
fn share(master: u16) -> Range<u16> {
    let begin = |master: u16| u16::try_from(u32::from(Lane::ALL) * u32::from(master) / u32::from(MASTERS));
    let begin = |master| begin(master).expect("no more than there are slots");
    begin(master)..begin(master + 1)
}

/// Checks the version before anything is started. One that the program does not tell may be new enough.
fn new_enough(program: PathBuf) -> Result<(), ServerError> {
    let said = Command::new(&program).arg("--version").stdin(Stdio::null()).output().map_err(io(program.display()))?;
    // `Redis server v=7.0.15 sha=…`, or Valkey, which begins at 7.2.
    let said = String::from_utf8_lossy(&said.stdout);
    let version = said.split_whitespace().find_map(|word| word.strip_prefix("v=")).unwrap_or_default();
    let mut parts = version.split('.').map_while(|part| part.parse().ok());
    match parts.next().zip(parts.next()) {
        Some(found) if found < LEAST_VERSION => {
            Err(ServerError::TooOldForACluster { program, version: version.to_owned() })
        }
        _ => Ok(()),
    }
}

fn is_replica(redis: &Redis) -> Result<bool, ServerError> {
    let info = redis.ask(&["INFO", "replication"])?;
    Ok(info.contains("role:slave") && info.contains("master_link_status:up"))
}

fn until(redis: &Redis, what: &str, ready: impl Fn(&Redis) -> Result<bool, ServerError>) -> Result<(), ServerError> {
    let deadline = Instant::now() + START_PATIENCE;
    while !ready(redis)? {
        if Instant::now() > deadline {
            return Err(ServerError::NotStarted { what: what.to_owned(), log: redis.room.log_end() });
        }
        std::thread::sleep(POLL);
    }
    Ok(())
}

fn no_master(lane: Lane) -> ServerError {
    io("asking the cluster")(std::io::Error::other(format!("no node is the master of hash slot {lane}")))
}

/// Returns the id of the master of a hash slot from the reply to CLUSTER NODES:
/// `ID HOST:PORT@PORT FLAGS MASTER PING PONG EPOCH LINK SLOTS...`.
///
/// <https://redis.io/docs/latest/commands/cluster-nodes/>
fn master_in(reply: &str, lane: Lane) -> Option<&str> {
    let serves = |slots: &str| {
        let (first, last) = slots.split_once('-').unwrap_or((slots, slots));
        // A slot that is moving is listed a second time, in brackets.
        let [first, last] = [first, last].map(|slot| slot.parse::<u16>().ok());
        first.zip(last).is_some_and(|(first, last)| (first..=last).contains(&lane.number()))
    };
    reply.lines().find_map(|line| {
        let words: Vec<&str> = line.split(' ').collect();
        let is_master = words.get(2)?.split(',').any(|flag| flag == "master");
        (is_master && words.iter().skip(8).any(|slots| serves(slots))).then(|| words[0])
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_masters_share_all_slots() {
        let shares: Vec<_> = (0..MASTERS).map(share).collect();
        assert_eq!(shares, [0..5461, 5461..10_922, 10_922..16_384]);
    }

    #[test]
    fn the_master_of_a_slot_is_found_in_what_a_node_says() {
        let reply = "\
            aa 127.0.0.1:20001@30001,host master - 0 1 7 connected 5461-7460 10922-16383\n\
            bb 127.0.0.1:20002@30002 slave aa 0 1 7 connected\n\
            cc 127.0.0.1:20003@30003 myself,master - 0 1 1 connected 0-5459 5460 [5460->-aa]\n\
            dd 127.0.0.1:20004@30004 master,fail - 0 1 2 disconnected\n";
        for (slot, master) in [(0, "cc"), (5460, "cc"), (5461, "aa"), (7460, "aa"), (12_000, "aa")] {
            assert_eq!(master_in(reply, Lane::new(slot).unwrap()), Some(master), "{slot}");
        }
        assert_eq!(master_in(reply, Lane::new(7461).unwrap()), None);
    }
}
