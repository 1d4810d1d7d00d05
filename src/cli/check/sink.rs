//! The findings about Redis.

use super::{Clock, Failure, Findings, Level, level, size};
use crate::bridge::context::{own_keys, prefixes};
use crate::checkpoint::Checkpoint;
use crate::code::Code;
use crate::config::Config;
use crate::resp::batch::{Limits, OwnKeys};
use crate::sink::any_reader::AnyReader;
use crate::sink::any_syncer::AnySyncer;
use crate::sink::any_writer::AnyWriter;
use crate::sink::connect::Address;
use crate::sink::durability::Durability;
use crate::sink::server::{ServerInfo, Software};
use crate::sink::survey::{self, Keeping, MasterSeen, Survey};
use crate::sink::topology::Topology;
use crate::sink::{Class, SinkError};
use crate::words::counted;
use futures_util::future::join_all;
use std::collections::BTreeMap;

/// How many pages of SCAN are searched for other programs' keys. A sample, not a count.
const PAGES_LOOKED_AT: usize = 200;

/// What the checks of Postgres need to know about Redis.
pub(super) struct Seen {
    pub checkpoint: Option<Checkpoint>,
    pub server: ServerInfo,
    pub clock: Option<Clock>,
}

/// Returns `None` if Redis cannot be used.
pub(super) async fn look(config: &Config, findings: &mut Findings) -> Result<Option<Seen>, Failure> {
    let target = &config.redis.target;
    let own = own_keys(config);
    let (writer, armed) = match AnyWriter::connect(target, &own, config.lanes()).await {
        Ok(connected) => connected,
        Err(error) => {
            // The check that tries every right reports which one is missing, and how to grant it.
            let about_rights = match &error {
                SinkError::Refused { reply, .. } => reply.class() == Class::Denied,
                SinkError::Unavailable { .. } | SinkError::Forbidden { .. } => true,
                _ => false,
            };
            if about_rights && rights(config, &own, findings).await? {
                return Ok(None);
            }
            // The error is about one node, and others may have problems, too.
            if config.lanes().is_some() && masters(config, findings).await?.is_none() {
                return Ok(None);
            }
            let level = match &error {
                // Waiting does not turn a replica into a master, except during a failover.
                SinkError::Replica { .. } => Level::Fail,
                other => level(other.disposition()),
            };
            findings.problem(level, error.code(), &format!("redis: {error}"))?;
            return Ok(None);
        }
    };
    let software = writer.server().software.as_ref().map_or("of unknown version".to_owned(), Software::to_string);
    findings.ok(format!("redis: {target} answers, {software}"))?;
    cluster(config, findings).await?;
    for lost in writer.lost() {
        findings.warn(Code::RedisReduced, format!("redis: {lost}"))?;
    }
    rights(config, &own, findings).await?;
    let (keeping, clock) = keeping_and_clock(config, findings).await?;
    durability(config, &own, findings).await?;
    match config.lanes() {
        Some(_) => several(&masters(config, findings).await?.unwrap_or_default(), findings)?,
        None => {
            if let Some(text) = keeping.as_ref().and_then(keeps) {
                findings.ok(format!("redis: {text}"))?;
            }
            eviction("redis", writer.server(), findings)?;
        }
    }
    batches(writer.server(), config.cache.max_atomic_bytes, findings)?;
    let checkpoint = match armed.checkpoint.map(|stored| Checkpoint::read(&stored.head, &stored.entries)) {
        Some(Ok(checkpoint)) => {
            let (lsn, epoch) = (checkpoint.lsn, checkpoint.epoch);
            findings.ok(format!("redis: a checkpoint of slot {} at {lsn}, epoch {epoch}", config.postgres.slot))?;
            Some(checkpoint)
        }
        Some(Err(error)) => {
            findings.warn(Code::CheckpointUnreadable, format!("redis: {error}: every table will be loaded again"))?;
            None
        }
        None => {
            findings.ok("redis: no checkpoint yet: the first start loads every table")?;
            foreign_keys(config, &own, findings).await?;
            None
        }
    };
    Ok(Some(Seen { checkpoint, server: writer.server().clone(), clock }))
}

fn failed(error: &SinkError, findings: &mut Findings) -> Result<(), Failure> {
    findings.problem(level(error.disposition()), error.code(), &format!("redis: {error}"))
}

/// If Redis is a cluster, checks it as a whole. The node that matters has answered.
async fn cluster(config: &Config, findings: &mut Findings) -> Result<(), Failure> {
    let target = &config.redis.target;
    let Address::Cluster(cluster) = &target.address else { return Ok(()) };
    let topology = match Topology::discover(target).await {
        Ok(topology) => topology,
        Err(error) => return failed(&error, findings),
    };
    if !topology.is_up() {
        return findings.fail(
            Code::RedisClusterDown,
            "redis: the cluster is down (cluster_state:fail): redis-cli --cluster check says why",
        );
    }
    let (masters, home) = (counted(topology.nodes().len(), "master"), cluster.home);
    match topology.master_of(home) {
        Some(_) if config.lanes().is_some() => {
            findings.ok(format!("redis: cluster of {masters}; rows are in the hash slots of their keys"))?;
        }
        Some(node) => {
            let at = &node.at;
            findings.ok(format!("redis: cluster of {masters}; all keys are in hash slot {home}, now at {at}"))?;
        }
        None => {
            let text = format!("redis: no node serves hash slot {home}, in which all keys are");
            findings.fail(Code::RedisClusterDown, text)?;
        }
    }
    match topology.uncovered() {
        0 => Ok(()),
        slots => {
            let level = if config.lanes().is_some() { Level::Fail } else { Level::Warn };
            let (slots, are) = (counted(u64::from(slots), "hash slot"), if slots == 1 { "is" } else { "are" });
            let text = format!("redis: {slots} {are} served by no node: CLUSTER ADDSLOTS");
            findings.problem(level, Code::RedisClusterDown, &text)
        }
    }
}

/// Returns whether any right is missing, which is printed.
async fn rights(config: &Config, own: &OwnKeys, findings: &mut Findings) -> Result<bool, Failure> {
    let target = &config.redis.target;
    let prefixes = prefixes(config);
    let durability = config.redis.durability;
    let tried = match survey::try_all(target, own, &prefixes, durability, config.lanes()).await {
        Ok(tried) => tried,
        Err(error) => {
            failed(&error, findings)?;
            return Ok(true);
        }
    };
    let faults = tried.faults(target);
    for fault in &faults {
        findings.fail(fault.code(), format!("redis: {fault}"))?;
    }
    if let Some(reply) = &tried.untested.first {
        let commands = tried.untested.commands.join(", ").to_uppercase();
        let text = format!("redis: {commands} could not be tested ({reply}): run check again later");
        findings.warn(Code::RedisBusy, text)?;
    }
    let user = target.user.as_deref().unwrap_or("default");
    match (faults.is_empty(), tried.untested.first.is_none()) {
        (true, true) => findings.ok(format!("redis: user {user} has every right that is needed"))?,
        (true, false) => findings.ok(format!("redis: user {user} has every right that could be tested"))?,
        (false, _) => {}
    }
    Ok(!faults.is_empty())
}

/// What each master of a cluster reports, by its address.
type Masters = Vec<(String, MasterSeen)>;

/// Returns `None` if one of the masters cannot be used. Each of those is named.
async fn masters(config: &Config, findings: &mut Findings) -> Result<Option<Masters>, Failure> {
    let target = &config.redis.target;
    // If there is none, this was said already.
    let Ok(topology) = Topology::discover(target).await else { return Ok(Some(Vec::new())) };
    let asked = topology.nodes().iter().map(|node| Survey::of_master(target, node));
    let (mut seen, mut all) = (Vec::new(), true);
    for (node, answer) in topology.nodes().iter().zip(join_all(asked).await) {
        match answer {
            Ok(master) => seen.push((node.at.to_string(), master)),
            Err(error) => {
                let text = format!("redis: master {}: {error}", node.at);
                findings.problem(level(error.disposition()), error.code(), &text)?;
                all = false;
            }
        }
    }
    Ok(all.then_some(seen))
}

/// Checks masters that share the rows.
fn several(masters: &Masters, findings: &mut Findings) -> Result<(), Failure> {
    let on = |which: &dyn Fn(&MasterSeen) -> bool| {
        let those = masters.iter().filter(|(_, master)| which(master)).map(|(at, _)| at.as_str());
        those.collect::<Vec<_>>().join(", ")
    };
    findings.ok(format!("redis: every master answers: {}", on(&|_| true)))?;
    for (at, master) in masters {
        eviction(&format!("redis {at}"), &master.server, findings)?;
    }
    let limits = alike(masters, |master| match master.server.maxmemory_bytes? {
        0 => Some("no limit".to_owned()),
        bytes => Some(size(bytes)),
    });
    if limits.len() > 1 {
        let text = listed(&limits);
        findings.warn(Code::RedisMastersDiffer, format!(
            "redis: maxmemory differs: {text}. Rows are spread as evenly as hash slots, so the smallest is full first"
        ))?;
    }
    let kept = alike(masters, |master| on_disk(&master.keeping));
    match kept.len() {
        0 => {}
        1 => kept.keys().try_for_each(|text| findings.ok(format!("redis: every master {text}")))?,
        _ => {
            let text = format!("redis: the masters differ in what is left after a restart: {}", listed(&kept));
            findings.warn(Code::RedisMastersDiffer, text)?;
        }
    }
    let alone = on(&|master| master.keeping.replicas == Some(0));
    if !alone.is_empty() {
        let unread = match masters.iter().any(|(_, master)| master.requires_all == Some(true)) {
            true => ", and no key on any node can be read (cluster-require-full-coverage yes)",
            false => "",
        };
        findings.warn(
            Code::RedisNoReplica,
            format!(
                "redis: no replica of {alone}: while such a master is away, nothing is written to any node{unread}"
            ),
        )?;
    }
    Ok(())
}

/// The masters of which the same is true, by what it is.
fn alike(masters: &Masters, of: impl Fn(&MasterSeen) -> Option<String>) -> BTreeMap<String, Vec<&str>> {
    let mut alike: BTreeMap<String, Vec<&str>> = BTreeMap::new();
    for (at, master) in masters {
        if let Some(text) = of(master) {
            alike.entry(text).or_default().push(at);
        }
    }
    alike
}

fn listed(alike: &BTreeMap<String, Vec<&str>>) -> String {
    let texts = alike.iter().map(|(text, at)| format!("{}: {text}", at.join(", ")));
    texts.collect::<Vec<_>>().join("; ")
}

/// Returns `None` for what Redis does not tell.
async fn keeping_and_clock(
    config: &Config,
    findings: &mut Findings,
) -> Result<(Option<Keeping>, Option<Clock>), Failure> {
    let looked = async {
        let mut survey = Survey::connect(&config.redis.target).await?;
        let time = async { Ok::<_, SinkError>(survey.time_ms().await?.and_then(|ms| i64::try_from(ms).ok())) };
        let clock = Clock::ask(time).await?;
        Ok::<_, SinkError>((survey.keeping().await?, clock))
    };
    match looked.await {
        Ok((keeping, clock)) => Ok((Some(keeping), clock)),
        Err(error) => {
            failed(&error, findings)?;
            Ok((None, None))
        }
    }
}

/// Describes whether the rows survive a restart of Redis, or its loss.
fn keeps(keeping: &Keeping) -> Option<String> {
    let replicas = match keeping.replicas {
        Some(0) => ", no replica".to_owned(),
        Some(count) => format!(", replicas: {count}"),
        None => String::new(),
    };
    Some(on_disk(keeping)? + &replicas)
}

/// Describes whether the rows survive a restart of Redis.
fn on_disk(keeping: &Keeping) -> Option<String> {
    Some(match (&keeping.save, keeping.append_only) {
        (_, Some(true)) => "has an append-only file".to_owned(),
        (Some(save), Some(false)) if save.is_empty() => {
            "keeps nothing over a restart (every table is loaded then)".to_owned()
        }
        (Some(save), Some(false)) => format!("saves dumps (save {save}): after a restart, newer changes are loaded"),
        (_, None) | (None, Some(false)) => return None,
    })
}

/// Checks whether Redis can provide the configured durability.
async fn durability(config: &Config, own: &OwnKeys, findings: &mut Findings) -> Result<(), Failure> {
    let wanted = config.redis.durability;
    if wanted == Durability::Memory {
        return Ok(());
    }
    match AnySyncer::try_out(&config.redis.target, own, wanted, config.lanes()).await {
        Ok(None) => findings.ok(format!("redis: provides redis.durability = \"{wanted}\"")),
        Ok(Some(why)) => findings.warn(Code::RedisDurability, format!(
            "redis: redis.durability = \"{wanted}\": {why}: while that is so, prefetchd is stalled and Postgres keeps the WAL"
        )),
        // Reported together with the other rights.
        Err(SinkError::Refused { reply, .. }) if reply.class() == Class::Denied => Ok(()),
        Err(error) => failed(&error, findings),
    }
}

/// With a cache that evicts keys, a missing row cannot be told from an evicted one. `redis` names the server.
fn eviction(redis: &str, server: &ServerInfo, findings: &mut Findings) -> Result<(), Failure> {
    match (server.maxmemory_bytes, server.maxmemory_policy.as_deref()) {
        (Some(0), _) => findings.ok(format!("{redis}: no maxmemory, so nothing is evicted"))?,
        (Some(limit), Some("noeviction")) if server.room_bytes == Some(0) => {
            let used = size(server.used_memory_bytes.unwrap_or_default());
            findings.fail(Code::RedisFull, format!(
                "{redis}: it uses {used}, maxmemory is {}, and it refuses every write: CONFIG SET maxmemory {}mb (and the same in \
                 redis.conf), or remove keys",
                size(limit),
                crate::bridge::room::megabytes_for(server.used_memory_bytes.unwrap_or_default())
            ))?;
        }
        (Some(limit), Some("noeviction")) => {
            let used = server.used_memory_bytes.unwrap_or_default();
            let text = format!("{} of maxmemory {} used, noeviction", size(used), size(limit));
            findings.ok(format!("{redis}: {text}"))?;
        }
        (Some(limit), Some(policy)) => findings.fail(Code::RedisEvicts, format!(
            "{redis}: with maxmemory {} and {policy} it evicts keys of rows: CONFIG SET maxmemory-policy noeviction",
            size(limit)
        ))?,
        (Some(_), None) | (None, _) => {
            findings.warn(Code::RedisEvicts, format!(
                "{redis}: it does not report maxmemory and maxmemory-policy: make sure that the policy is noeviction"
            ))?;
        }
    }
    match server.evicted_keys {
        Some(evicted) if evicted > 0 => {
            let evicted = counted(evicted, "key");
            let text = format!("{redis}: it has evicted {evicted} since its start: give it more memory");
            findings.warn(Code::RedisEvicts, text)
        }
        _ => Ok(()),
    }
}

/// Checks whether one client may send a transaction of the largest size that should be atomic.
fn batches(server: &ServerInfo, atomic_bytes: usize, findings: &mut Findings) -> Result<(), Failure> {
    let wanted = size(atomic_bytes as u64);
    let whole = |limits: Limits| limits.stream_bytes();
    let text = |fact: String, whole: usize| {
        format!(
            "redis: {fact}: transactions that take more than {} as commands become visible in parts, though \
             cache.max_atomic_bytes is {wanted}",
            size(whole as u64)
        )
    };
    if let Some(buffer) = server.query_buffer_bytes {
        let takes = whole(Limits::new(usize::MAX, buffer));
        if takes < atomic_bytes {
            let enough = (atomic_bytes * 2).max(1 << 30);
            let fact = format!("client-query-buffer-limit is {}", size(buffer as u64));
            let text = text(fact, takes);
            let text = format!("{text}: CONFIG SET client-query-buffer-limit {enough}, or lower the latter");
            findings.warn(Code::RedisLimits, text)?;
        }
    }
    if let Some(most) = server.clients.most_bytes {
        let used = server.clients.used_bytes.unwrap_or_default();
        let takes = whole(Limits::new(usize::MAX, usize::MAX).among_clients(most, used));
        if takes < atomic_bytes {
            let fact = format!("maxmemory-clients lets all clients together use {}", size(most as u64));
            let text = text(fact, takes);
            findings.warn(
                Code::RedisLimits,
                format!("{text}: CONFIG SET maxmemory-clients 0, which removes the limit, or lower the latter"),
            )?;
        }
    }
    Ok(())
}

/// Warns about keys under a table's prefix before the first start, which will remove them as orphans.
async fn foreign_keys(config: &Config, own: &OwnKeys, findings: &mut Findings) -> Result<(), Failure> {
    let reader = AnyReader::connect_lazy(&config.redis.target, own, config.lanes());
    let areas = config.tables.iter().flat_map(|table| table.areas().into_iter().map(move |area| (table, area)));
    for (table, area) in areas {
        let (mut cursor, mut found) = (0, 0);
        for _ in 0..PAGES_LOOKED_AT {
            match reader.scan_page(area.prefix().as_bytes(), cursor).await {
                Ok((next, keys)) => {
                    cursor = next;
                    found += keys.iter().filter(|key| area.has(key)).count();
                }
                // Reported together with the other rights.
                Err(SinkError::Refused { reply, .. }) if reply.class() == Class::Denied => return Ok(()),
                Err(error) => return failed(&error, findings),
            }
            if cursor == 0 {
                break;
            }
        }
        if found > 0 {
            let (at_least, begin) = if found == 1 { ("1 key", "begins") } else { (&*format!("{found} keys"), "begin") };
            let text = format!(
                "redis: {at_least} or more {begin} with {:?} already, and those that are not rows of {}, or lookups of them, \
                 will be removed: choose another literal for `key` if they are needed",
                area.prefix(),
                table.table
            );
            let (kind, prefix) = ("keys under a prefix".to_owned(), format!("{:?}", area.prefix()));
            findings.alike(Level::Warn, Code::PrefixInUse, kind, &prefix, &text)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn eviction_is_a_failure_only_where_it_can_happen() {
        for (maxmemory, policy, failed) in [
            (Some(0), Some("allkeys-lru"), 0),
            (Some(1 << 20), Some("noeviction"), 0),
            (Some(1 << 20), Some("allkeys-lru"), 1),
            (Some(1 << 20), Some("volatile-ttl"), 1),
            (None, None, 0),
        ] {
            let server = ServerInfo {
                maxmemory_bytes: maxmemory,
                maxmemory_policy: policy.map(str::to_owned),
                ..ServerInfo::default()
            };
            let mut findings = Findings::default();
            eviction("redis", &server, &mut findings).expect("nothing is printed");
            assert_eq!(findings.count(Level::Fail), failed, "{maxmemory:?} {policy:?}");
        }
    }
}
