//! What a server reports of itself, its limits, and which commands it denies.

use super::answers::{pairs_of, permitted, unexpected};
use super::connect::RedisTarget;
use super::link::Link;
use super::replies::Reply;
use super::{Class, SinkError};
use crate::command::Key;
use crate::lanes::Lane;
use crate::nodes::Usage;
use crate::resp;
use crate::resp::batch::Limits;
use crate::resp::packed::{self, Packing};
use bytes::BytesMut;
use std::collections::BTreeMap;
use std::fmt;

/// The name shown by `CLIENT LIST`.
const CLIENT_NAME: &[u8] = b"prefetchd";

/// What INFO and CONFIG reported. `None` for what the server does not report.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ServerInfo {
    pub software: Option<Software>,
    /// Changes with every start of the server.
    pub run_id: Option<String>,
    /// Changes with every promotion of the server.
    pub replication_id: Option<String>,
    pub used_memory_bytes: Option<u64>,
    /// 0 for no limit.
    pub maxmemory_bytes: Option<u64>,
    pub maxmemory_policy: Option<String>,
    /// How much more memory it may use before it refuses writes; `None` if there is no limit or it is not reported.
    pub room_bytes: Option<u64>,
    pub evicted_keys: Option<u64>,
    /// `client-query-buffer-limit`.
    pub query_buffer_bytes: Option<usize>,
    pub clients: ClientsMemory,
    pub limits: Limits,
    pub lost: Vec<Lost>,
}

impl ServerInfo {
    pub(super) fn usage(&self) -> Usage {
        let ServerInfo { used_memory_bytes, maxmemory_bytes, evicted_keys, .. } = *self;
        Usage { used_memory_bytes, maxmemory_bytes, evicted_keys }
    }
}

/// What changes when a server is started again, or promoted: it may then lack what it had acknowledged. The run ID, and
/// the replication ID.
pub type Life = (Option<String>, Option<String>);

/// Of masters, by the node's ID.
pub type Lives = BTreeMap<String, Life>;

pub(super) fn life_in(info: &str) -> Life {
    let value = |name: &str| value_in(info, name).map(str::to_owned);
    (value("run_id"), value("master_replid"))
}

/// The memory of all clients together. `None`: the server does not report it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ClientsMemory {
    /// From `maxmemory-clients`; `None` also if there is no limit.
    pub most_bytes: Option<usize>,
    pub used_bytes: Option<usize>,
    /// How many clients were disconnected since the server started because they used too much memory.
    pub disconnected: Option<u64>,
}

/// The server software according to itself. Valkey also reports the Redis version that it is compatible with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Software {
    Redis(String),
    Valkey(String),
}

impl Software {
    pub(super) fn of(info: &str) -> Option<Self> {
        let valkey = value_in(info, "valkey_version").map(|version| Software::Valkey(version.to_owned()));
        valkey.or_else(|| value_in(info, "redis_version").map(|version| Software::Redis(version.to_owned())))
    }

    /// Returns the major and minor version.
    fn version(&self) -> Option<(u32, u32)> {
        let (Software::Redis(version) | Software::Valkey(version)) = self;
        let mut parts = version.split('.').map_while(|part| part.parse::<u32>().ok());
        Some((parts.next()?, parts.next()?))
    }

    /// Whether it lacks COPY, which is new in 6.2. Valkey begins at 7.2.
    fn is_too_old(&self) -> bool {
        self.version().is_some_and(|version| version < (6, 2))
    }

    /// Whether it replicates what a script has written instead of the script, and its RESTORE accepts listpacks. An
    /// unknown version may.
    pub fn is_seven(&self) -> bool {
        self.version().is_none_or(|version| version >= (7, 0))
    }
}

impl fmt::Display for Software {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Software::Redis(version) => write!(f, "Redis {version}"),
            Software::Valkey(version) => write!(f, "Valkey {version}"),
        }
    }
}

/// Returns a value from INFO's answer.
pub(super) fn value_in<'a>(info: &'a str, name: &str) -> Option<&'a str> {
    info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim)
}

/// Redis reports `redis_mode`, Valkey `server_mode`, and both `cluster_enabled`.
pub(super) fn is_cluster(info: &str) -> bool {
    let says = |name: &str, value: &str| value_in(info, name).is_some_and(|said| said == value);
    says("redis_mode", "cluster") || says("server_mode", "cluster") || says("cluster_enabled", "1")
}

/// A command that an ACL or a provider denies, and that prefetchd can do without.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lost {
    ClientName,
    Info,
    Config,
    Restore,
}

impl fmt::Display for Lost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Lost::ClientName => "CLIENT SETNAME is denied: CLIENT LIST does not show prefetchd by name",
            Lost::Info => "INFO is denied: a replica, cluster mode, an old version and evictions go unnoticed",
            Lost::Config => "CONFIG GET is denied: the server's size limits are taken to be the default ones",
            Lost::Restore => "RESTORE is denied: a row takes three commands instead of one, which is slower",
        })
    }
}

/// Checks what may be denied, and whether this is a server that accepts writes at all.
/// `unused`: a key that never exists, and whose slot the server has; `serves`: a hash slot of which it is expected to be the
/// master, as a node of a cluster.
pub(super) async fn inspect(link: &mut Link, unused: &Key, serves: Option<Lane>) -> Result<ServerInfo, SinkError> {
    let mut out = BytesMut::new();
    resp::command(&mut out, &[b"CLIENT", b"SETNAME", CLIENT_NAME]);
    resp::command(&mut out, &[b"INFO"]);
    resp::command(&mut out, &[b"CONFIG", b"GET", b"proto-max-bulk-len"]);
    resp::command(&mut out, &[b"CONFIG", b"GET", b"client-query-buffer-limit"]);
    resp::command(&mut out, &[b"CONFIG", b"GET", b"maxmemory-clients"]);
    resp::command(&mut out, &[b"CONFIG", b"GET", b"hash-max-listpack-entries"]);
    resp::command(&mut out, &[b"CONFIG", b"GET", b"hash-max-listpack-value"]);
    match link.target().packs {
        true => packed::probe(&mut out, unused),
        false => resp::command(&mut out, &[b"TYPE", unused.as_bytes()]),
    }
    let replies: [Reply; 8] = link.ask_exactly(&out, "INFO").await?;
    let [name, info, value_limit, buffer_limit, clients_limit, packed_fields, packed_value, restore] = replies;

    let mut lost = Vec::new();
    if permitted("CLIENT SETNAME", name)?.is_none() {
        lost.push(Lost::ClientName);
    }
    let mut server = match permitted("INFO", info)? {
        Some(Reply::Bulk(text)) => server_of(&String::from_utf8_lossy(&text), link.target(), serves)?,
        Some(other) => return Err(unexpected("INFO", &other)),
        None => {
            lost.push(Lost::Info);
            ServerInfo::default()
        }
    };
    let value_limit = permitted("CONFIG GET", value_limit)?;
    let buffer_limit = permitted("CONFIG GET", buffer_limit)?;
    match (value_limit.as_ref().and_then(setting), buffer_limit.as_ref().and_then(setting)) {
        (Some(value), Some(buffer)) => {
            server.query_buffer_bytes = Some(buffer);
            server.limits = Limits::new(value, buffer);
        }
        _ => lost.push(Lost::Config),
    }
    // Since 7.0.
    server.clients.most_bytes =
        text_of_setting(&clients_limit).and_then(|text| clients_bytes(text, server.maxmemory_bytes));
    if let Some(most) = server.clients.most_bytes {
        server.limits = server.limits.among_clients(most, server.clients.used_bytes.unwrap_or_default());
    }
    match restore {
        _ if !link.target().packs => {}
        Reply::Status(text) if text == "OK" => {
            server.limits.packing = Some(Packing::new(setting(&packed_fields), setting(&packed_value)));
        }
        // The reply to a payload that the server is too old for is the same as that to a command that it does not
        // offer.
        Reply::Error(reply)
            if reply.class() == Class::Denied
                || reply.class() == Class::Other && server.software.as_ref().is_none_or(Software::is_seven) =>
        {
            lost.push(Lost::Restore);
        }
        // It accepts no writes now, and will say so again.
        _ => {}
    }
    server.lost = lost;
    Ok(server)
}

/// How long the row of [`reads_back`] lasts if it is not removed.
const SAMPLE_TTL_MS: u64 = 10_000;

/// Whether a row that is written as RESTORE is read as it was meant. A server that takes no writes now, or does not have the
/// hash slot any more, proves nothing. `key` must not be in use; it is gone afterwards.
pub(super) async fn reads_back(link: &mut Link, key: &Key, packing: &Packing) -> Result<bool, SinkError> {
    let mut out = BytesMut::new();
    let mut written = packed::sample(&mut out, key, packing, SAMPLE_TTL_MS);
    resp::command(&mut out, &[b"HGETALL", key.as_bytes()]);
    resp::command(&mut out, &[b"DEL", key.as_bytes()]);
    let [restored, read, _]: [Reply; 3] = link.ask_exactly(&out, "HGETALL").await?;
    if let Reply::Error(reply) = restored {
        return Ok(!matches!(reply.class(), Class::Other | Class::Denied));
    }
    let Ok(mut read) = pairs_of(key, read) else { return Ok(true) };
    // A server that keeps it as a hash table has an order of its own.
    written.sort();
    read.sort();
    Ok(read == written)
}

/// Reads INFO. `serves` as for [`inspect`].
pub(super) fn server_of(info: &str, target: &RedisTarget, serves: Option<Lane>) -> Result<ServerInfo, SinkError> {
    let value = |name: &str| value_in(info, name).map(str::to_owned);
    let number = |name: &str| value_in(info, name).and_then(|v| v.parse::<u64>().ok());
    let redis = || target.to_string();
    let is_replica = value("role").is_some_and(|role| role == "slave");
    if let Some(lane) = serves.filter(|_| is_replica) {
        return Err(SinkError::Demoted { redis: redis(), lane });
    }
    if serves.is_none() && is_cluster(info) {
        return Err(SinkError::Cluster { redis: redis() });
    }
    if is_replica {
        let master = value("master_host").zip(value("master_port")).map(|(host, port)| format!("{host}:{port}"));
        return Err(SinkError::Replica { redis: redis(), master });
    }
    let software = Software::of(info);
    if let Some(software) = software.as_ref().filter(|software| software.is_too_old()) {
        return Err(SinkError::TooOld { redis: redis(), software: software.clone() });
    }
    let Usage { used_memory_bytes, maxmemory_bytes, evicted_keys } = usage_in(info);
    Ok(ServerInfo {
        software,
        run_id: value("run_id"),
        replication_id: value("master_replid"),
        used_memory_bytes,
        maxmemory_bytes,
        maxmemory_policy: value("maxmemory_policy"),
        room_bytes: room_in(info),
        evicted_keys,
        clients: ClientsMemory {
            most_bytes: None,
            used_bytes: number("mem_clients_normal").and_then(|bytes| usize::try_from(bytes).ok()),
            // Both are new in 7.0, but the second is not in every such version.
            disconnected: number("evicted_clients")
                .map(|evicted| evicted + number("client_query_buffer_limit_disconnections").unwrap_or_default()),
        },
        ..ServerInfo::default()
    })
}

/// Returns the value from `CONFIG GET`'s answer for one setting.
fn setting(reply: &Reply) -> Option<usize> {
    text_of_setting(reply)?.parse().ok()
}

fn text_of_setting(reply: &Reply) -> Option<&str> {
    match reply {
        Reply::Array(items) => match items.as_slice() {
            [_, Reply::Bulk(value)] => std::str::from_utf8(value).ok(),
            _ => None,
        },
        _ => None,
    }
}

/// Reads INFO's sections `memory` and `stats`.
pub(super) fn usage_in(info: &str) -> Usage {
    let number = |name: &str| value_in(info, name).and_then(|value| value.parse().ok());
    Usage {
        used_memory_bytes: number("used_memory"),
        maxmemory_bytes: number("maxmemory"),
        evicted_keys: number("evicted_keys"),
    }
}

/// Redis does not count its buffers for replicas and for the append-only file.
fn room_in(info: &str) -> Option<u64> {
    let number = |name: &str| value_in(info, name).and_then(|value| value.parse::<u64>().ok());
    let limit = number("maxmemory").filter(|limit| *limit > 0)?;
    let counted = number("used_memory")?.saturating_sub(number("mem_not_counted_for_evict").unwrap_or_default());
    Some(limit.saturating_sub(counted))
}

/// Returns the limit of `maxmemory-clients` in bytes. The setting is a number of bytes or a percentage of `maxmemory`.
/// `None` if there is no limit.
fn clients_bytes(setting: &str, maxmemory: Option<u64>) -> Option<usize> {
    /// Redis accepts no lower limit.
    const LEAST: u64 = 128 << 10;
    let bytes = match setting.strip_suffix('%') {
        Some(percent) => maxmemory?.checked_mul(percent.parse().ok()?)? / 100,
        None => setting.parse().ok()?,
    };
    (bytes > 0).then(|| usize::try_from(bytes.max(LEAST)).unwrap_or(usize::MAX))
}
