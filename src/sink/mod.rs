//! Redis: the only writer, the readers, and the errors of both.
//!
//! Nothing here knows tables, slots or pgoutput: keys, rows and opaque checkpoints come in, acknowledgements go out. If
//! this layer took a reply on trust, the daemon would confirm changes to Postgres that Redis never got, and those rows
//! would stay wrong.

mod answers;
pub mod any_reader;
pub mod any_syncer;
pub mod any_writer;
pub mod bounds;
pub mod connect;
pub mod durability;
mod inspecting;
pub mod lane_durability;
pub mod lane_reader;
pub mod lanes;
pub mod link;
pub mod list_reader;
pub mod missing_rights;
mod moves;
pub mod reader;
pub mod replies;
mod reply;
pub mod server;
mod shards;
pub mod survey;
mod together;
pub mod topology;
pub mod writer;

use crate::code::Code;
use crate::command::Key;
use crate::error::Disposition;
use crate::lanes::Lane;
use crate::password::PasswordError;
use crate::resp::batch::EncodeError;
use bytes::Bytes;
pub use reply::{Class, ErrorReply, Redirect};
use std::fmt;
use std::io;
use std::time::Duration;
use tokio_rustls::rustls;

/// A checkpoint as stored in Redis: the string that every batch writes, and the entries in its hash, by field.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    pub head: Bytes,
    pub entries: Vec<(Bytes, Bytes)>,
}

/// Why Redis did not do what was requested, or did not confirm it.
#[derive(Debug, thiserror::Error)]
pub enum SinkError {
    #[error("cannot reach Redis at {redis}: {error}")]
    Unreachable { redis: String, error: io::Error },
    #[error("no encrypted connection to Redis at {redis}: {}", tls_failure(.error))]
    Tls { redis: String, error: io::Error },
    #[error("no Sentinel names a master {master:?}: {said}")]
    NoMaster { master: String, said: String },
    #[error("no Sentinel accepts the login: {said}; check sentinel_user and sentinel_password in redis.url")]
    SentinelLogin { said: String },
    #[error("no node of the Redis cluster in redis.url answers: {said}")]
    NoTopology { said: String },
    #[error("no node of the Redis cluster at {redis} serves hash slot {lane}: assign it to a node (CLUSTER ADDSLOTS)")]
    Unserved { redis: String, lane: Lane },
    #[error("no node of the Redis cluster at {redis} serves {lanes} of the hash slots: assign them (CLUSTER ADDSLOTS)")]
    Uncovered { redis: String, lanes: u16 },
    #[error(
        "Redis at {redis} has refused hash slot {lane} for {after:?} because it is on its way to another node ({reply}): \
         complete the move (redis-cli --cluster fix)"
    )]
    OnTheMove { redis: String, lane: Lane, after: Duration, reply: ErrorReply },
    /// The script found another mark, or head of the record, than this session has left.
    #[error(
        "{} in Redis {found}: another writer, or the node lost data",
        .lane.map_or_else(|| "the checkpoint".to_owned(), |lane| format!("the mark of hash slot {lane}"))
    )]
    Superseded { lane: Option<Lane>, found: Found },
    /// The script ran, and one of its commands failed. The mark says that something is missing.
    #[error(
        "Redis failed a write of {}: {reply}; it is loaded again",
        .lane.map_or_else(|| "the checkpoint".to_owned(), |lane| format!("hash slot {lane}"))
    )]
    Failed { lane: Option<Lane>, reply: ErrorReply },
    #[error("Redis at {redis} is not in cluster mode: use redis:// or rediss:// in redis.url")]
    NotACluster { redis: String },
    #[error("the connection to Redis at {redis} broke: {}", tls_failure(.error))]
    Lost { redis: String, error: io::Error },
    #[error("Redis at {redis} did not answer within {after:?}")]
    TimedOut { redis: String, after: Duration },
    /// Raised by the reader, not by Redis.
    #[error("the rows have more than {} MiB together", .most >> 20)]
    Excess { most: usize },
    /// Raised by the reader, not by Redis.
    #[error("{key} is a set of more than {most} members, which have no order: give the lookup an order column")]
    LargeSet { key: Key, most: u64 },
    /// Raised by the reader, not by Redis.
    #[error("the rows of {key} change faster than they can be read as of one moment: try again, or ask for fewer")]
    Restless { key: Key },
    #[error("Redis sent an invalid reply: {0}")]
    Malformed(#[from] crate::resp::Malformed),
    #[error("Redis answered {command} with {got}")]
    Unexpected { command: &'static str, got: String },
    /// If it was a batch, nothing of it was applied.
    #[error("Redis refused {request}: {reply}{}", request.remedy(reply))]
    Refused { request: Request, reply: ErrorReply },
    /// It gave a reason: too many clients, protected mode, or a proxy without a server behind it.
    #[error("Redis at {redis} closed the connection: {reply}")]
    HungUp { redis: String, reply: ErrorReply },
    #[error("Redis user {user} {missing}: {}", missing.remedy(.user))]
    Forbidden { user: String, missing: missing_rights::Missing },
    #[error("Redis at {redis} does not accept {} ({reply}), which prefetchd needs: {}", list(.commands), offered_by(.commands))]
    Unavailable { redis: String, commands: Vec<&'static str>, reply: ErrorReply },
    /// One command inside EXEC failed while the rest was applied.
    #[error("Redis failed {request} inside a transaction: {reply}; {checkpoint}")]
    Torn { request: Request, reply: ErrorReply, checkpoint: Withdrawal },
    /// EXEC returned nil: the checkpoint or a probed key was touched after WATCH.
    #[error("Redis discarded a batch because {0}")]
    Discarded(Touched),
    /// The batch was applied, but directly after it the checkpoint had another value.
    #[error("the checkpoint in Redis {found} right after it was written: another writer, or Redis lost data")]
    CheckpointDiffers { found: Found },
    /// An earlier batch failed or was given up before its replies were read.
    #[error("this connection to Redis guards nothing any more: connect again")]
    NotArmed,
    #[error(
        "Redis at {redis} is a node of a cluster: begin redis.url with redis+cluster:// instead of redis://, or with \
         rediss+cluster:// for TLS"
    )]
    Cluster { redis: String },
    #[error(
        "Redis at {redis} refuses transactions over several hash slots ({reply}): give all keys the same one, by a hash \
         tag in every table's key, such as \"{{{{{tag}}}}}:cache:category:{{id}}\""
    )]
    CrossSlot { redis: String, reply: ErrorReply, tag: String },
    #[error("Redis at {redis} is a replica{}: point redis.url at the master", of(.master))]
    Replica { redis: String, master: Option<String> },
    #[error(
        "the node that the Redis cluster at {redis} names as the master of hash slot {lane} is a replica: wait until the \
         nodes agree"
    )]
    Demoted { redis: String, lane: Lane },
    #[error("{redis} is {software}: Redis 6.2 or later, or Valkey, is needed")]
    TooOld { redis: String, software: server::Software },
    #[error(
        "{redis} is {software}, and keys in several hash slots of a cluster need Redis 7.0 or later, or Valkey: upgrade it, \
         or give all keys the same hash tag, such as \"{{{{{tag}}}}}:cache:category:{{id}}\""
    )]
    TooOldForLanes { redis: String, software: server::Software, tag: String },
    #[error(
        "the key {key} in Redis is a {found} and should be a {wanted}: another program uses it; remove or rename it"
    )]
    ForeignKey { key: Key, found: String, wanted: &'static str },
    #[error("Redis at {redis} cannot provide redis.durability = {wanted:?}: {fact}; {remedy}", wanted = wanted.to_string())]
    NotDurable { redis: String, wanted: durability::Durability, fact: String, remedy: &'static str },
    #[error(transparent)]
    TooLarge(#[from] EncodeError),
    #[error("the redis client cannot be set up: {0}")]
    Client(String),
    /// The password is read before each login.
    #[error(transparent)]
    Password(#[from] PasswordError),
}

impl SinkError {
    /// A node that does not serve a key's hash slot belongs to a cluster. If the URL does not say so, a person must.
    fn of_a_cluster(self, target: &connect::RedisTarget) -> Self {
        match (&self, &target.address) {
            (_, connect::Address::Cluster(_)) => self,
            (SinkError::Refused { reply, .. }, _) if reply.class() == Class::Elsewhere => {
                SinkError::Cluster { redis: target.to_string() }
            }
            _ => self,
        }
    }

    pub fn code(&self) -> Code {
        match self {
            SinkError::Lost { error, .. } if is_about_certificates(error) => Code::RedisTls,
            SinkError::Tls { .. } => Code::RedisTls,
            SinkError::Unreachable { .. }
            | SinkError::NoTopology { .. }
            | SinkError::Lost { .. }
            | SinkError::TimedOut { .. } => Code::RedisUnreachable,
            SinkError::NoMaster { .. } => Code::RedisSentinel,
            SinkError::SentinelLogin { .. } => Code::RedisLogin,
            SinkError::Unserved { .. } | SinkError::Uncovered { .. } => Code::RedisClusterDown,
            SinkError::OnTheMove { .. } | SinkError::Demoted { .. } => Code::RedisClusterChanging,
            SinkError::Cluster { .. } | SinkError::NotACluster { .. } => Code::RedisClusterUrl,
            SinkError::CrossSlot { .. } => Code::HashSlots,
            SinkError::Superseded { .. }
            | SinkError::CheckpointDiffers { .. }
            | SinkError::Discarded(_)
            | SinkError::Torn { .. }
            | SinkError::Failed { .. }
            | SinkError::NotArmed => Code::CheckpointChanged,
            // Raised by readers, whom HTTP answers.
            SinkError::Excess { .. } | SinkError::LargeSet { .. } => Code::TooLarge,
            SinkError::Restless { .. } => Code::Overloaded,
            SinkError::Malformed(_) | SinkError::Unexpected { .. } | SinkError::Client(_) => Code::RedisProtocol,
            SinkError::Refused { request, reply } => match reply.code_of_class() {
                Code::RedisError if request.command == "AUTH" => Code::RedisLogin,
                Code::RedisError if request.command == "SELECT" => Code::RedisDatabase,
                code => code,
            },
            SinkError::HungUp { reply, .. } => reply.code_of_class(),
            SinkError::Forbidden { .. } => Code::RedisAcl,
            SinkError::Unavailable { .. } => Code::RedisCommands,
            SinkError::Replica { .. } => Code::RedisReplica,
            SinkError::TooOld { .. } | SinkError::TooOldForLanes { .. } => Code::RedisVersion,
            SinkError::ForeignKey { .. } => Code::RedisKeyType,
            SinkError::NotDurable { .. } => Code::RedisDurability,
            SinkError::TooLarge(_) => Code::RedisLimits,
            SinkError::Password(_) => Code::SecretUnavailable,
        }
    }

    pub fn disposition(&self) -> Disposition {
        match self {
            // With TLS 1.3, a server rejects our certificate only after the handshake.
            SinkError::Tls { error, .. } | SinkError::Lost { error, .. } => {
                if is_about_certificates(error) {
                    Disposition::Stop
                } else {
                    Disposition::Retry
                }
            }
            SinkError::Unreachable { .. }
            | SinkError::NoMaster { .. }
            | SinkError::NoTopology { .. }
            | SinkError::Unserved { .. }
            | SinkError::Demoted { .. }
            | SinkError::Uncovered { .. }
            | SinkError::OnTheMove { .. }
            | SinkError::TimedOut { .. }
            | SinkError::Malformed(_)
            | SinkError::Unexpected { .. }
            | SinkError::NotArmed
            | SinkError::Excess { .. }
            | SinkError::LargeSet { .. }
            | SinkError::Restless { .. }
            | SinkError::Password(_)
            | SinkError::Replica { .. } => Disposition::Retry,
            SinkError::Torn { .. }
            | SinkError::Discarded(_)
            | SinkError::CheckpointDiffers { .. }
            | SinkError::Superseded { .. }
            | SinkError::Failed { .. } => Disposition::Reload,
            SinkError::Cluster { .. }
            | SinkError::CrossSlot { .. }
            | SinkError::NotACluster { .. }
            | SinkError::TooOld { .. }
            | SinkError::TooOldForLanes { .. }
            | SinkError::ForeignKey { .. }
            | SinkError::NotDurable { .. }
            | SinkError::TooLarge(_)
            | SinkError::SentinelLogin { .. }
            | SinkError::Client(_) => Disposition::Stop,
            SinkError::Forbidden { .. } | SinkError::Unavailable { .. } => Disposition::Stop,
            SinkError::HungUp { reply, .. } => match reply.class() {
                Class::Away | Class::Full | Class::ReadOnly | Class::Elsewhere | Class::Other => Disposition::Retry,
                Class::Denied | Class::Login | Class::WrongType | Class::CrossSlot => Disposition::Stop,
            },
            SinkError::Refused { request, reply } => match reply.class() {
                Class::Away | Class::Full | Class::ReadOnly | Class::Elsewhere => Disposition::Retry,
                Class::Denied | Class::Login | Class::WrongType | Class::CrossSlot => Disposition::Stop,
                // The same login, or the same database, would be refused again.
                Class::Other if request.is_login() => Disposition::Stop,
                Class::Other => Disposition::Retry,
            },
        }
    }
}

/// A command as it may appear in a log: without values.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    pub command: String,
    pub key: Option<Key>,
}

impl Request {
    pub fn new(command: &str) -> Self {
        Request { command: command.to_owned(), key: None }
    }

    pub fn of(command: &str, key: &Key) -> Self {
        Request { command: command.to_owned(), key: Some(key.clone()) }
    }

    fn is_login(&self) -> bool {
        matches!(self.command.as_str(), "AUTH" | "SELECT")
    }

    fn remedy(&self, reply: &ErrorReply) -> &'static str {
        match (self.command.as_str(), reply.class()) {
            ("AUTH", Class::Other) | (_, Class::Login) => {
                "; check user and password in redis.url, redis.password_file or redis.password_command"
            }
            ("SELECT", Class::Other) => "; use a database that the server has, or 0, in redis.url",
            (_, Class::Away | Class::Elsewhere | Class::Other) => "",
            (_, Class::Full) => "; free memory or raise maxmemory",
            (_, Class::ReadOnly) => "; point redis.url at a master that takes writes",
            (_, Class::Denied) => "; prefetchd check names the rights that the user lacks",
            (_, Class::WrongType) => "; another program uses this key: remove or rename it",
            (_, Class::CrossSlot) => "; give all keys the same hash tag, see docs/operating.md",
        }
    }
}

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.command)?;
        match &self.key {
            Some(key) => write!(f, " {key}"),
            None => Ok(()),
        }
    }
}

/// What is known about the reason for a nil EXEC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Touched {
    Checkpoint(Found),
    /// The checkpoint is unchanged, so a probed key was touched, or the same bytes were written again.
    Something,
}

impl fmt::Display for Touched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Touched::Checkpoint(found) => {
                write!(f, "the checkpoint {found}: another writer, or Redis lost data")
            }
            Touched::Something => {
                f.write_str("something else wrote to the checkpoint or to a row that the batch needs")
            }
        }
    }
}

/// What was found in place of our checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    Nothing,
    SomethingElse,
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Found::Nothing => "was gone",
            Found::SomethingElse => "had changed",
        })
    }
}

/// What became of a checkpoint that claims more than was applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Withdrawal {
    Withdrawn,
    NotWithdrawn,
}

impl fmt::Display for Withdrawal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Withdrawal::Withdrawn => {
                "the rest was applied, and the checkpoint was withdrawn so that everything is loaded again"
            }
            Withdrawal::NotWithdrawn => {
                "the rest was applied, and the checkpoint could not be withdrawn: refetch all tables"
            }
        })
    }
}

/// Converts an error of the redis crate. `request` is what was sent, as RESP.
fn failed(
    target: &connect::RedisTarget,
    command: &'static str,
    request: &[u8],
    error: &redis::RedisError,
) -> SinkError {
    let redis = target.to_string();
    if let Some(code) = error.code() {
        let line = format!("{code} {}", error.detail().unwrap_or_default());
        let reply = ErrorReply::received(line.as_bytes()).without(request, target.password.to_hide().as_deref());
        return SinkError::Refused { request: Request::new(command), reply };
    }
    if error.is_connection_refusal() {
        return SinkError::Unreachable { redis, error: io::Error::other(error.to_string()) };
    }
    if error.is_io_error() || error.is_connection_dropped() {
        return SinkError::Lost { redis, error: io::Error::other(error.to_string()) };
    }
    // Its other texts quote the reply.
    SinkError::Lost { redis, error: io::Error::other(error.category().to_owned()) }
}

/// Converts an error that the redis crate returned as a value.
fn error_reply(target: &connect::RedisTarget, request: &[u8], error: &redis::ServerError) -> ErrorReply {
    let line = format!("{} {}", error.code(), error.details().unwrap_or_default());
    ErrorReply::received(line.as_bytes()).without(request, target.password.to_hide().as_deref())
}

/// Returns what to do where a server does not offer these commands.
fn offered_by(commands: &[&'static str]) -> &'static str {
    match commands.iter().any(|command| command.starts_with("json.")) {
        true => "load the module RedisJSON, which Redis 8 has, or write format = \"json\" for the table",
        false => "undo rename-command in redis.conf, or use a server that accepts all of docs/operating.md's commands",
    }
}

/// Returns the commands in the form in which redis-cli shows them.
fn list(commands: &[&'static str]) -> String {
    commands.join(", ").to_uppercase()
}

/// Whether the two sides do not accept each other's certificates, which a person must fix.
fn is_about_certificates(error: &io::Error) -> bool {
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    inner.is_some_and(|e| matches!(e, rustls::Error::InvalidCertificate(_) | rustls::Error::AlertReceived(_)))
}

fn tls_failure(error: &io::Error) -> String {
    match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
        Some(rustls::Error::InvalidCertificate(_)) => format!(
            "{error}; pass the certificate of its CA with ?cacert=FILE, and write the host name as in the certificate"
        ),
        Some(rustls::Error::AlertReceived(_)) => {
            format!("it rejected the connection ({error}); pass a client certificate with ?cert=FILE&key=FILE")
        }
        Some(rustls::Error::InvalidMessage(_)) => format!("it does not speak TLS on this port ({error})"),
        _ => error.to_string(),
    }
}

fn of(master: &Option<String>) -> String {
    master.as_ref().map_or_else(String::new, |m| format!(" of {m}"))
}
