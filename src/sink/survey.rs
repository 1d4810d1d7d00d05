//! Finds out what the user may not do, what the server does not offer, and how it is configured, before anything is
//! created.
//!
//! It must change nothing. Commands are only queued: Redis refuses to queue a command that it does not know or that the
//! user's ACL denies. Then the connection is closed instead of sending EXEC. A mistake here lets a missing right go
//! unnoticed until a batch needs it. Only code words decide; the text of a `NOPERM` merely shapes the advice.

use super::bounds::REPLY_BYTES;
use super::connect::{self, Address, CONNECT_TIMEOUT, Connection, HostPort, RedisTarget, Stream};
use super::durability::Durability;
use super::missing_rights::Missing;
use super::server::{self, ServerInfo, value_in};
use super::topology::{Node, Topology};
use super::{Class, ErrorReply, Request, SinkError, error_reply, failed};
use crate::lanes::tags::{every_mark, unused_key};
use crate::lanes::{Lane, hash_tag};
use crate::resp::batch::OwnKeys;
use futures_util::future::{join_all, try_join_all};
use redis::{Cmd, Pipeline, RedisError, Value};
use std::collections::{BTreeMap, HashSet};
use std::fmt::Write as _;
use tokio::time::timeout;

/// The result of trying every command.
#[derive(Debug, Default)]
pub struct Tried {
    pub missing: Missing,
    /// Refused with a plain `ERR` and not by an ACL: unknown, renamed, or not offered by the provider.
    unavailable: Refused,
    /// Refused for a temporary reason, so that nothing is known about the right.
    pub untested: Refused,
}

/// Commands, and the reply to the first of them.
#[derive(Debug, Default)]
pub struct Refused {
    pub commands: Vec<&'static str>,
    pub first: Option<ErrorReply>,
}

impl Refused {
    fn add(&mut self, command: &'static str, reply: ErrorReply) {
        if !self.commands.contains(&command) {
            self.commands.push(command);
        }
        self.first.get_or_insert(reply);
    }
}

impl Tried {
    /// Adds what was tried on one node of a cluster.
    fn add(&mut self, node: String, of_node: Tried) {
        self.missing.add(node, of_node.missing);
        for (into, from) in [(&mut self.unavailable, of_node.unavailable), (&mut self.untested, of_node.untested)] {
            if let Some(reply) = from.first {
                from.commands.into_iter().for_each(|command| into.add(command, reply.clone()));
            }
        }
    }

    /// Returns the problems that retrying cannot solve.
    pub fn faults(&self, target: &RedisTarget) -> Vec<SinkError> {
        let mut faults = Vec::new();
        if let Some(reply) = &self.unavailable.first {
            let (redis, commands) = (target.to_string(), self.unavailable.commands.clone());
            faults.push(SinkError::Unavailable { redis, commands, reply: reply.clone() });
        }
        if !self.missing.is_empty() {
            faults.push(SinkError::Forbidden { user: target.acl_user().to_owned(), missing: self.missing.clone() });
        }
        faults
    }
}

/// Tries everything that the daemon will do. `lanes`: the name of the replication slot, if the rows lie in several hash
/// slots of a cluster; every master is then tried, with a key of each prefix.
///
/// # Errors
/// See [`Survey::try_everything`].
pub async fn try_all(
    target: &RedisTarget,
    own: &OwnKeys,
    prefixes: &Prefixes,
    durability: Durability,
    lanes: Option<&str>,
) -> Result<Tried, SinkError> {
    let survey = Survey::connect(target).await?;
    let Some(slot) = lanes else { return survey.try_everything(own, prefixes, durability).await };
    let mut tried = survey.try_everything(&own.clone().announcing(None), &Prefixes::default(), durability).await?;
    let topology = Topology::discover(target).await?;
    let of_nodes = topology.nodes().iter().map(async |node| {
        let keys = keys_on(node, prefixes, own);
        let tried = Survey::connect_to(target, &node.at).await?.try_lanes(&keys, slot).await?;
        Ok::<_, SinkError>((node.at.to_string(), tried))
    });
    for (node, of_node) in try_join_all(of_nodes).await? {
        tried.add(node, of_node);
    }
    if tried.missing.on.len() == topology.nodes().len() {
        tried.missing.on.clear();
    }
    Ok(tried)
}

/// A key on which commands are tried.
struct TriedKey {
    key: String,
    /// What it begins with, or the key itself.
    area: String,
    commands: Vec<(&'static str, &'static [&'static str])>,
}

/// Returns a key of each prefix that lies on this node and that no row has, and the change stream if it lies there. A prefix
/// with a hash tag may have none there.
fn keys_on(node: &Node, prefixes: &Prefixes, own: &OwnKeys) -> Vec<TriedKey> {
    /// More than enough for a node with one in a thousand of the hash slots.
    const ATTEMPTS: usize = 20_000;
    let serves = |key: &String| node.serves(Lane::of(key.as_bytes()));
    let on_node = |prefix: &String| match prefix.ends_with(':') {
        true => (0..ATTEMPTS).map(|n| format!("{}{n}", no_row(prefix))).find(serves),
        false => Some(no_row(prefix)).filter(serves),
    };
    let tried = |area: &String, commands: Vec<_>| Some(TriedKey { key: on_node(area)?, area: area.clone(), commands });
    let of_lookups: &[_] = if prefixes.lists.is_empty() { &[] } else { &[ON_ROW_OF_LOOKUPS] };
    let on_rows = || [&ON_ROWS[..], of_lookups].concat();
    let on_lists = || [&ON_KEYS[..], &ON_LISTS].concat();
    let rows = prefixes.rows.iter().filter_map(|area| tried(area, on_rows()));
    let lists = prefixes.lists.iter().filter_map(|area| tried(area, on_lists()));
    let stream = own.changes().map(|stream| String::from_utf8_lossy(stream.key.as_bytes()).into_owned());
    let stream = stream.filter(serves);
    let stream = stream.map(|key| TriedKey { area: key.clone(), key, commands: ON_STREAM.to_vec() });
    rows.chain(lists).chain(stream).collect()
}

/// Checks, before anything is created, that everything the daemon needs is allowed and offered. `lanes` as for
/// [`try_all`].
///
/// # Errors
/// [`SinkError::Unavailable`] and [`SinkError::Forbidden`] name what is missing.
pub async fn require(
    target: &RedisTarget,
    own: &OwnKeys,
    prefixes: &Prefixes,
    durability: Durability,
    lanes: Option<&str>,
) -> Result<(), SinkError> {
    let tried = try_all(target, own, prefixes, durability, lanes).await?;
    tried.faults(target).into_iter().next().map_or(Ok(()), Err)
}

/// What a master of a cluster reports of itself.
#[derive(Debug, Clone)]
pub struct MasterSeen {
    pub server: ServerInfo,
    pub keeping: Keeping,
    /// `cluster-require-full-coverage`. `None` if it does not report that.
    pub requires_all: Option<bool>,
}

/// How the server persists its data. `None` if it does not report a setting.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Keeping {
    /// `save`: when it writes a dump; empty for never.
    pub save: Option<String>,
    pub append_only: Option<bool>,
    pub replicas: Option<u32>,
}

impl Keeping {
    fn of(settings: &BTreeMap<String, String>, info: &str) -> Self {
        let value = |name: &str| value_in(info, name);
        Keeping {
            save: settings.get("save").cloned(),
            append_only: value("aof_enabled").map(|enabled| enabled == "1"),
            replicas: value("connected_slaves").and_then(|count| count.parse().ok()),
        }
    }
}

/// What a report of a problem needs to know of a server: sections of INFO that name no key, and settings.
const REPORTED_SECTIONS: [&str; 5] = ["server", "memory", "persistence", "replication", "stats"];
const REPORTED_SETTINGS: [&str; 6] = [
    "maxmemory",
    "maxmemory-policy",
    "appendonly",
    "client-output-buffer-limit",
    "client-query-buffer-limit",
    "proto-max-bulk-len",
];

/// Describes each server, by its address: of a cluster, every master. Instead of what is denied, it says so.
pub async fn report(target: &RedisTarget) -> Result<Vec<(String, Result<String, SinkError>)>, SinkError> {
    let Address::Cluster(_) = &target.address else {
        let survey = Survey::connect(target).await?;
        return Ok(vec![(target.to_string(), survey.report().await)]);
    };
    let topology = Topology::discover(target).await?;
    let of_nodes = topology.nodes().iter().map(async |node| {
        let report = async { Survey::connect_to(target, &node.at).await?.report().await };
        (node.at.to_string(), report.await)
    });
    Ok(join_all(of_nodes).await)
}

pub struct Survey {
    target: RedisTarget,
    connection: Connection,
}

/// A command to try and, if it is about one key, the area in which the key lies.
struct Trial {
    command: &'static str,
    area: Option<usize>,
    cmd: Cmd,
}

impl Survey {
    pub async fn connect(target: &RedisTarget) -> Result<Self, SinkError> {
        Self::over(target, connect::open(target)).await
    }

    /// Asks a master of a cluster about itself.
    pub async fn of_master(target: &RedisTarget, node: &Node) -> Result<MasterSeen, SinkError> {
        let mut survey = Self::connect_to(target, &node.at).await?;
        let (settings, info) = survey.reported().await?;
        let server = server::server_of(&info, &target.at(&node.at), node.lane())?;
        let requires_all = settings.get("cluster-require-full-coverage").map(|value| value == "yes");
        Ok(MasterSeen { server, keeping: Keeping::of(&settings, &info), requires_all })
    }

    /// Connects to one node of a cluster.
    async fn connect_to(target: &RedisTarget, node: &HostPort) -> Result<Self, SinkError> {
        let here = target.at(node);
        let survey = Self::over(&here, connect::open_at(target, node)).await?;
        // As one of a cluster, it may redirect.
        Ok(Survey { target: target.clone(), ..survey })
    }

    async fn over(
        target: &RedisTarget,
        opened: impl Future<Output = Result<Stream, SinkError>>,
    ) -> Result<Self, SinkError> {
        let login = target.login().await?;
        let connected = async {
            let stream = opened.await?;
            Connection::over(stream, login, REPLY_BYTES).await.map_err(|error| error.at(target))
        };
        let connection = timeout(CONNECT_TIMEOUT, connected).await.map_err(|_| silent(target))??;
        Ok(Survey { target: target.clone(), connection })
    }

    /// Returns Redis's time in milliseconds since the Unix epoch; `None` if TIME is not available.
    pub async fn time_ms(&mut self) -> Result<Option<u64>, SinkError> {
        let replies = self.ask([redis::cmd("TIME")].into_iter()).await?;
        let time = replies.first().and_then(|reply| redis::from_redis_value_ref::<(u64, u64)>(reply).ok());
        Ok(time.map(|(seconds, micros)| seconds.saturating_mul(1000).saturating_add(micros / 1000)))
    }

    /// Returns what it reports of itself: nothing if INFO is denied.
    ///
    /// # Errors
    /// If it is a replica, a node of a cluster, or too old.
    pub async fn server(&mut self) -> Result<ServerInfo, SinkError> {
        let (_, info) = self.reported().await?;
        server::server_of(&info, &self.target, None)
    }

    pub async fn keeping(&mut self) -> Result<Keeping, SinkError> {
        let (settings, info) = self.reported().await?;
        Ok(Keeping::of(&settings, &info))
    }

    async fn report(mut self) -> Result<String, SinkError> {
        let info = REPORTED_SECTIONS.map(|section| redis::cmd("INFO").arg(section).to_owned());
        // Before Redis 7.0, CONFIG GET takes one setting.
        let settings = REPORTED_SETTINGS.map(|name| redis::cmd("CONFIG").arg("GET").arg(name).to_owned());
        let asked: Vec<Cmd> = info.into_iter().chain(settings).collect();
        let replies = self.ask(asked.iter().cloned()).await?;
        let names = REPORTED_SECTIONS.iter().map(|name| ("INFO", name));
        let names = names.chain(REPORTED_SETTINGS.iter().map(|name| ("CONFIG GET", name)));
        let mut out = String::new();
        for (((command, name), sent), reply) in names.zip(&asked).zip(replies) {
            let _ = match reply {
                Value::ServerError(error) => {
                    let reply = error_reply(&self.target, &sent.get_packed_command(), &error);
                    writeln!(out, "{command} {name}: refused, {reply}")
                }
                reply if command == "INFO" => {
                    writeln!(out, "{}", redis::from_redis_value::<String>(reply).unwrap_or_default().trim_end())
                }
                reply => {
                    let settings: BTreeMap<String, String> = redis::from_redis_value(reply).unwrap_or_default();
                    writeln!(out, "{name} = {}", settings.get(*name).map_or("-", String::as_str))
                }
            };
        }
        Ok(out)
    }

    /// Returns some settings and INFO, both empty if they are denied.
    ///
    /// # Errors
    /// If the server wants a password that it was not given.
    async fn reported(&mut self) -> Result<(BTreeMap<String, String>, String), SinkError> {
        // Before Redis 7.0, CONFIG GET takes one setting.
        let setting = |name: &str| redis::cmd("CONFIG").arg("GET").arg(name).to_owned();
        let asked = [setting("save"), setting("cluster-require-full-coverage"), redis::cmd("INFO")];
        let replies = self.ask(asked.into_iter()).await?;
        let [save, coverage, info] = <[Value; 3]>::try_from(replies).unwrap_or([Value::Nil, Value::Nil, Value::Nil]);
        if let Value::ServerError(error) = &info {
            let reply = error_reply(&self.target, &redis::cmd("INFO").get_packed_command(), error);
            if reply.class() == Class::Login {
                return Err(SinkError::Refused { request: Request::new("INFO"), reply });
            }
        }
        let settings = [save, coverage].into_iter();
        let settings = settings.filter_map(|reply| redis::from_redis_value::<BTreeMap<String, String>>(reply).ok());
        Ok((settings.flatten().collect(), redis::from_redis_value(info).unwrap_or_default()))
    }

    /// Tries what the daemon will do with its own keys and with keys that begin with `prefixes`. Consumes the
    /// connection, which discards everything that was queued.
    ///
    /// # Errors
    /// If the server is unavailable, is a cluster that the URL does not call one, refuses transactions over several hash
    /// slots, or refuses every command in the same way, which says nothing about any of them.
    pub async fn try_everything(
        mut self,
        own: &OwnKeys,
        prefixes: &Prefixes,
        durability: Durability,
    ) -> Result<Tried, SinkError> {
        let Prefixes { rows, documents, lists } = prefixes;
        let prefixes: Vec<&str> =
            std::iter::once(own.prefix()).chain(rows.iter().chain(lists).map(String::as_str)).collect();
        let stream = own.changes().map(|stream| String::from_utf8_lossy(stream.key.as_bytes()));
        let areas: Vec<&str> = prefixes.iter().copied().chain(stream.as_deref()).collect();
        let (mut tried, [of_type, of_entry]) = (Tried::default(), ON_STREAM);
        // A real but read-only transaction over all areas, because some proxies refuse it only at EXEC.
        let mut first: Vec<Trial> = prefixes.iter().enumerate().map(|(n, area)| trial(n, area, "watch", &[])).collect();
        first.push(Trial { command: "multi", area: None, cmd: redis::cmd("MULTI") });
        first.extend(prefixes.iter().enumerate().map(|(n, area)| trial(n, area, "type", &[])));
        first.extend(stream.iter().map(|key| on_key(prefixes.len(), key, of_type.0, of_type.1)));
        first.push(Trial { command: "exec", area: None, cmd: redis::cmd("EXEC") });
        let replies = self.ask(first.iter().map(|trial| trial.cmd.clone())).await?;
        let began = replies.get(prefixes.len()) == Some(&Value::Okay);
        let ended = matches!(replies.last(), Some(Value::Array(_)));
        if !began {
            // EXEC fails in any case then.
            first.pop();
            self.note(&mut tried, &first, &replies, &areas)?;
            tried.missing.only_begun = !tried.missing.is_empty();
            return Ok(tried);
        }
        self.note(&mut tried, &first, &replies, &areas)?;
        if !ended {
            self = Self::connect(&self.target).await?;
        }
        let mut trials = vec![Trial { command: "multi", area: None, cmd: redis::cmd("MULTI") }];
        let mut replies = self.ask([redis::cmd("MULTI")].into_iter()).await?;
        if replies.first() != Some(&Value::Okay) {
            // If MULTI was refused, the following commands would be executed.
            self.note(&mut tried, &trials, &replies, &areas)?;
            return Ok(tried);
        }
        let lists = prefixes.len() - lists.len();
        trials.extend(every_command(own, prefixes.split_at(lists), durability));
        let of_documents = prefixes.iter().enumerate().filter(|(_, area)| documents.iter().any(|of| of == *area));
        for (n, area) in of_documents {
            trials.extend(ON_DOCUMENTS.iter().map(|(command, further)| trial(n, area, command, further)));
        }
        trials.extend(stream.iter().map(|key| on_key(prefixes.len(), key, of_entry.0, of_entry.1)));
        replies.extend(self.ask(trials.iter().skip(1).map(|trial| trial.cmd.clone())).await?);
        self.note(&mut tried, &trials, &replies, &areas)?;
        Ok(tried)
    }

    /// Tries what is done with these keys, and with the marks of their hash slots. Consumes the connection, which discards
    /// everything that was queued.
    async fn try_lanes(mut self, keys: &[TriedKey], slot: &str) -> Result<Tried, SinkError> {
        let mut tried = Tried::default();
        let all = |command, cmd| Trial { command, area: None, cmd };
        let begins = [all("multi", redis::cmd("MULTI"))];
        let replies = self.ask(begins.iter().map(|trial| trial.cmd.clone())).await?;
        if replies.first() != Some(&Value::Okay) {
            // The following commands would be executed.
            self.note(&mut tried, &begins, &replies, &[])?;
            tried.missing.only_begun = !tried.missing.is_empty();
            return Ok(tried);
        }
        let mut load = redis::cmd("SCRIPT");
        load.arg("LOAD").arg("return 0");
        let (mut trials, mut areas) = (vec![all("script|load", load)], Vec::new());
        for TriedKey { key, area, commands } in keys {
            let mark = unused_key(Lane::of(key.as_bytes()), slot);
            let marks = String::from_utf8_lossy(mark.as_bytes()).trim_end_matches("unused").to_owned();
            let mut call = redis::cmd("EVALSHA");
            call.arg("0".repeat(40)).arg(2).arg(mark.as_bytes()).arg(key);
            trials.push(all("evalsha", call));
            let on_mark = [("get", &[][..]), ("set", &["1"])];
            trials.extend(commands.iter().map(|(command, further)| on_key(areas.len(), key, command, further)));
            trials.extend(on_mark.map(|(command, further)| trial(areas.len() + 1, &marks, command, further)));
            areas.extend([area.clone(), marks]);
        }
        let replies = self.ask(trials.iter().map(|trial| trial.cmd.clone())).await?;
        self.note(&mut tried, &trials, &replies, &areas.iter().map(String::as_str).collect::<Vec<_>>())?;
        // Of some hash slots, where those of all are needed.
        let of_some: Vec<String> = areas.iter().skip(1).step_by(2).map(|marks| pattern_of(marks)).collect();
        let patterns = std::mem::take(&mut tried.missing.patterns);
        for pattern in patterns {
            tried.missing.pattern(if of_some.contains(&pattern) { every_mark(slot) } else { pattern });
        }
        Ok(tried)
    }

    fn note(&self, tried: &mut Tried, trials: &[Trial], replies: &[Value], areas: &[&str]) -> Result<(), SinkError> {
        let (mut plain, mut unknown, mut asked) = (Vec::new(), Vec::new(), 0);
        let taken = trials.iter().zip(replies).filter(|(_, reply)| !matches!(reply, Value::ServerError(_)));
        let usable: HashSet<usize> = taken.filter_map(|(trial, _)| trial.area).collect();
        for (Trial { command, area, cmd }, reply) in trials.iter().zip(replies) {
            asked += 1;
            let Value::ServerError(error) = reply else { continue };
            let reply = error_reply(&self.target, &cmd.get_packed_command(), error);
            match reply.class() {
                Class::CrossSlot => {
                    let tag = areas.first().and_then(|own| hash_tag(own.as_bytes())).unwrap_or_default();
                    let tag = String::from_utf8_lossy(tag).into_owned();
                    return Err(SinkError::CrossSlot { redis: self.target.to_string(), reply, tag });
                }
                Class::Away | Class::Login | Class::Elsewhere => {
                    let refused = SinkError::Refused { request: Request::new(&command.to_uppercase()), reply };
                    return Err(refused.of_a_cluster(&self.target));
                }
                Class::Denied => {
                    let area = area.map(|n| (areas[n], usable.contains(&n)));
                    note_denied(&mut tried.missing, command, area, error.details());
                }
                // Reported when waiting, with what can be used instead.
                Class::Other if matches!(*command, "wait" | "waitaof") => {}
                Class::Other if reply.is_plain() => plain.push((*command, reply)),
                // A transaction that was already bound to fail.
                Class::Other if reply.is_discarded() => {}
                Class::Other => unknown.push((*command, reply)),
                Class::Full | Class::ReadOnly | Class::WrongType => tried.untested.add(command, reply),
            }
        }
        let all_alike = plain.len() + unknown.len() == asked;
        if let Some((command, reply)) = plain.first().or(unknown.first()).filter(|_| all_alike) {
            return Err(SinkError::Refused { request: Request::new(&command.to_uppercase()), reply: reply.clone() });
        }
        plain.into_iter().for_each(|(command, reply)| tried.unavailable.add(command, reply));
        unknown.into_iter().for_each(|(command, reply)| tried.untested.add(command, reply));
        Ok(())
    }

    /// Returns errors as values, each at its command's place.
    async fn ask(&mut self, commands: impl Iterator<Item = Cmd>) -> Result<Vec<Value>, SinkError> {
        let mut pipe = Pipeline::new();
        pipe.ignore_errors();
        for command in commands {
            pipe.add_command(command);
        }
        let asked = pipe.query_async(&mut self.connection.link);
        let answered: Result<Vec<Value>, RedisError> =
            timeout(CONNECT_TIMEOUT, asked).await.map_err(|_| silent(&self.target))?;
        answered.map_err(|error| failed(&self.target, "MULTI", &[], &error))
    }
}

/// Tries a command on a key of the area that no row has.
fn trial(n: usize, area: &str, command: &'static str, further: &[&str]) -> Trial {
    on_key(n, &no_row(area), command, further)
}

/// Tries a command on a key of the area.
fn on_key(n: usize, key: &str, command: &'static str, further: &[&str]) -> Trial {
    let mut cmd = redis::cmd(&command.to_uppercase());
    cmd.arg(key).arg(further);
    Trial { command, area: Some(n), cmd }
}

/// What is done with rows, and the arguments after the key.
const ON_ROWS: [(&str, &[&str]); 7] = [
    ("type", &[]),
    ("del", &[]),
    ("hset", &["a", "b"]),
    ("hdel", &["a"]),
    ("pexpire", &["1"]),
    ("hgetall", &[]),
    ("pttl", &[]),
];

/// What is done with rows that have lookups, too.
const ON_ROW_OF_LOOKUPS: (&str, &[&str]) = ("hmget", &["a"]);

const ON_STREAM: [(&str, &[&str]); 2] = [("type", &[]), ("xadd", &["*", "a", "b"])];

/// What is done with RedisJSON documents, apart from what is done with rows as well.
const ON_DOCUMENTS: [(&str, &[&str]); 3] = [("json.set", &["$", "1"]), ("json.get", &[]), ("json.del", &["$"])];

/// What is done with sets and sorted sets, apart from what is done with rows as well.
const ON_LISTS: [(&str, &[&str]); 13] = [
    ("sadd", &["a"]),
    ("srem", &["a"]),
    ("scard", &[]),
    ("sismember", &["a"]),
    ("sscan", &["0"]),
    ("smembers", &[]),
    ("zadd", &["1", "a"]),
    ("zrem", &["a"]),
    ("zcard", &[]),
    ("zscore", &["a"]),
    ("zscan", &["0"]),
    ("zrange", &["0", "0"]),
    ("zrevrange", &["0", "0"]),
];
const ON_KEYS: [(&str, &[&str]); 3] = [("type", &[]), ("del", &[]), ("pexpire", &["1"])];

/// What keys begin with.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Prefixes {
    pub rows: Vec<String>,
    /// Those of `rows` that are RedisJSON documents.
    pub documents: Vec<String>,
    /// Those of lookups; one without columns has only one key.
    pub lists: Vec<String>,
}

/// A key with this prefix that no row has. One that does not end in `:` is the only key of a lookup.
fn no_row(prefix: &str) -> String {
    if prefix.ends_with(':') { format!("{prefix}prefetchd-check") } else { prefix.to_owned() }
}

/// Every command that the writer, the readers and the durability check send, except for those that may be denied.
fn every_command(own: &OwnKeys, (areas, lists): (&[&str], &[&str]), durability: Durability) -> Vec<Trial> {
    let mut trials = Vec::new();
    let all = |command, cmd| Trial { command, area: None, cmd };
    // The first area holds prefetchd's own keys.
    for (command, further) in [
        ("get", &[][..]),
        ("set", &["1"]),
        ("del", &[]),
        ("type", &[]),
        ("xadd", &["*", "a", "b"]),
        // The entries of tables, and the records of dead letters.
        ("hset", &["a", "b"]),
        ("hdel", &["a"]),
        ("hgetall", &[]),
        ("hget", &["a"]),
    ] {
        trials.push(trial(0, areas[0], command, further));
    }
    for (n, area) in areas.iter().enumerate().skip(1) {
        for (command, further) in ON_ROWS {
            trials.push(trial(n, area, command, further));
        }
        let kept = own.kept(0);
        let mut copy = redis::cmd("COPY");
        copy.arg(format!("{area}prefetchd-check")).arg(kept.as_bytes()).arg("REPLACE");
        let mut rename = redis::cmd("RENAME");
        rename.arg(kept.as_bytes()).arg(format!("{area}prefetchd-check"));
        trials.extend([all("copy", copy), all("rename", rename)]);
        if !lists.is_empty() {
            trials.push(trial(n, area, ON_ROW_OF_LOOKUPS.0, ON_ROW_OF_LOOKUPS.1));
        }
    }
    for (n, area) in lists.iter().enumerate() {
        let on_list = ON_KEYS.iter().chain(&ON_LISTS);
        trials.extend(on_list.map(|(command, further)| trial(areas.len() + n, area, command, further)));
    }
    let mut scan = redis::cmd("SCAN");
    scan.arg(0);
    trials.extend([all("scan", scan), all("time", redis::cmd("TIME"))]);
    match durability {
        Durability::Memory => {}
        Durability::Replicas(n) => {
            let mut wait = redis::cmd("WAIT");
            wait.arg(n).arg(1);
            trials.push(all("wait", wait));
        }
        Durability::Aof => {
            let mut wait = redis::cmd("WAITAOF");
            wait.arg(1).arg(0).arg(1);
            trials.push(all("waitaof", wait));
        }
    }
    trials
}

/// Redis checks the command before the keys. Since 6.2 it says "to run the 'del' command", "to access one of the keys
/// used as arguments" or "to access a key". If the text is different, advise both. Also advise both if another command
/// may use the same keys: then a selector allows this command for other keys only, or the keys are read-only.
fn note_denied(missing: &mut Missing, command: &'static str, area: Option<(&str, bool)>, text: Option<&str>) {
    let says = |words: &str| text.is_some_and(|text| text.contains(words));
    match area {
        Some((area, usable)) => {
            if !says("to run") {
                missing.pattern(pattern_of(area));
            }
            if !says("to access") || usable {
                missing.command(command);
            }
        }
        // A command with two keys, each of which is also tried alone.
        None if says("to access") => {}
        None => missing.command(command),
    }
}

/// Returns an ACL key pattern for everything that begins with `prefix`, or for one key that is none. A pattern cannot contain white space, so `?`
/// stands in for it.
fn pattern_of(prefix: &str) -> String {
    let mut pattern = String::with_capacity(prefix.len() + 1);
    for c in prefix.chars() {
        match c {
            '*' | '?' | '[' | '\\' => pattern.extend(['\\', c]),
            // Nor can a quote be quoted within quotes.
            c if c.is_whitespace() || c == '\'' => pattern.push('?'),
            c => pattern.push(c),
        }
    }
    if prefix.ends_with(':') {
        pattern.push('*');
    }
    pattern
}

fn silent(target: &RedisTarget) -> SinkError {
    SinkError::TimedOut { redis: target.to_string(), after: CONNECT_TIMEOUT }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_comes_with_the_command_that_gives_it() {
        let all =
            Missing { commands: vec!["copy", "rename"], patterns: vec!["item:*".to_owned()], ..Missing::default() };
        assert_eq!(all.to_string(), "may not run copy, rename and may not use keys like item:*");
        assert_eq!(all.remedy("p"), "ACL SETUSER p '~item:*' +copy +rename");
        let begun = Missing { only_begun: true, ..Missing::of_command("multi") };
        assert!(begun.remedy("p").contains("check again"));
    }

    #[test]
    fn a_pattern_means_the_prefix_and_nothing_else() {
        assert_eq!(pattern_of("cache:my-table:"), "cache:my-table:*");
        assert_eq!(pattern_of("a *[t]?\\:"), "a?\\*\\[t]\\?\\\\:*");
        assert_eq!(pattern_of("prefetchd:{s}:"), "prefetchd:{s}:*");
    }
}
