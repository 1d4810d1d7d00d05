//! What `check` asks of Redis beside what the daemon itself asks: what the user may not do, and how the server is set up.
//!
//! It must change nothing. A command is only queued, where Redis refuses what the user's ACL does not allow, and the
//! connection is closed instead of EXEC. Wrong here means: a right is missed only when a batch needs it.

use super::batch::OwnKeys;
use super::connect::{self, CONNECT_TIMEOUT, Connection, RedisTarget};
use super::durability::Durability;
use super::{SinkError, failed};
use redis::{Cmd, Pipeline, RedisError, Value};
use std::collections::BTreeMap;
use tokio::time::timeout;

/// What the user lacks, as ACL SETUSER takes it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Missing {
    pub commands: Vec<&'static str>,
    /// `cache:product:*`.
    pub patterns: Vec<String>,
    /// Without MULTI nothing can be tried: what else is missing is not known.
    pub only_begun: bool,
}

impl Missing {
    pub fn is_empty(&self) -> bool {
        self.commands.is_empty() && self.patterns.is_empty()
    }

    fn command(&mut self, name: &'static str) {
        if !self.commands.contains(&name) {
            self.commands.push(name);
        }
    }

    fn pattern(&mut self, pattern: String) {
        if !self.patterns.contains(&pattern) {
            self.patterns.push(pattern);
        }
    }
}

/// How the server keeps what it has. `None`: it does not tell.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Keeping {
    /// `save`: when it writes a dump; empty for never.
    pub save: Option<String>,
    pub append_only: Option<bool>,
    pub replicas: Option<u32>,
}

pub struct Survey {
    target: RedisTarget,
    connection: Connection,
}

/// A command and, where it is about one key, the area which that lies in.
struct Trial {
    command: &'static str,
    area: Option<usize>,
    cmd: Cmd,
}

impl Survey {
    pub async fn connect(target: &RedisTarget) -> Result<Self, SinkError> {
        let connected = async {
            let stream = connect::open(target).await?;
            Connection::over(stream, &target.login()).await.map_err(|error| failed(target, "AUTH", &error))
        };
        let connection = timeout(CONNECT_TIMEOUT, connected).await.map_err(|_| silent(target))??;
        Ok(Survey { target: target.clone(), connection })
    }

    /// Milliseconds since the Unix epoch, by Redis's clock; `None` where it does not tell.
    pub async fn time_ms(&mut self) -> Result<Option<u64>, SinkError> {
        let replies = self.ask([redis::cmd("TIME")].into_iter()).await?;
        let time = replies.first().and_then(|reply| redis::from_redis_value_ref::<(u64, u64)>(reply).ok());
        Ok(time.map(|(seconds, micros)| seconds.saturating_mul(1000).saturating_add(micros / 1000)))
    }

    pub async fn keeping(&mut self) -> Result<Keeping, SinkError> {
        let mut save = redis::cmd("CONFIG");
        save.arg("GET").arg("save");
        let replies = self.ask([save, redis::cmd("INFO")].into_iter()).await?;
        let [save, info] = <[Value; 2]>::try_from(replies).unwrap_or([Value::Nil, Value::Nil]);
        let save = redis::from_redis_value_ref::<BTreeMap<String, String>>(&save).ok();
        let info: String = redis::from_redis_value_ref(&info).unwrap_or_default();
        let value =
            |name: &str| info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim);
        Ok(Keeping {
            save: save.and_then(|mut settings| settings.remove("save")),
            append_only: value("aof_enabled").map(|enabled| enabled == "1"),
            replicas: value("connected_slaves").and_then(|count| count.parse().ok()),
        })
    }

    /// Tries what the daemon will do with its own keys and with those that begin with `prefixes`. Takes the connection:
    /// what is queued on it goes with it.
    pub async fn missing_rights(
        mut self,
        own: &OwnKeys,
        prefixes: &[String],
        durability: Durability,
    ) -> Result<Missing, SinkError> {
        let areas: Vec<&str> = std::iter::once(own.prefix()).chain(prefixes.iter().map(String::as_str)).collect();
        let mut missing = Missing::default();
        // Not queued, but carried out, or refused for want of MULTI: they have no effect behind it.
        let mut first = vec![Trial { command: "exec", area: None, cmd: redis::cmd("EXEC") }];
        first.extend(areas.iter().enumerate().map(|(n, area)| trial(n, area, "watch", &[])));
        first.push(Trial { command: "multi", area: None, cmd: redis::cmd("MULTI") });
        let replies = self.ask(first.iter().map(|trial| trial.cmd.clone())).await?;
        note(&mut missing, &first, &replies, &areas);
        if replies.last() != Some(&Value::Okay) {
            missing.only_begun = true;
            return Ok(missing);
        }
        let trials = trials(own, &areas, durability);
        let replies = self.ask(trials.iter().map(|trial| trial.cmd.clone())).await?;
        note(&mut missing, &trials, &replies, &areas);
        Ok(missing)
    }

    /// Errors come as values, each at its place.
    async fn ask(&mut self, commands: impl Iterator<Item = Cmd>) -> Result<Vec<Value>, SinkError> {
        let mut pipe = Pipeline::new();
        pipe.ignore_errors();
        for command in commands {
            pipe.add_command(command);
        }
        let asked = pipe.query_async(&mut self.connection.link);
        let answered: Result<Vec<Value>, RedisError> =
            timeout(CONNECT_TIMEOUT, asked).await.map_err(|_| silent(&self.target))?;
        answered.map_err(|error| failed(&self.target, "MULTI", &error))
    }
}

/// Of a key in the area that no row has.
fn trial(n: usize, area: &str, command: &'static str, further: &[&str]) -> Trial {
    let mut cmd = redis::cmd(&command.to_uppercase());
    cmd.arg(format!("{area}prefetchd-check")).arg(further);
    Trial { command, area: Some(n), cmd }
}

/// Everything that the writer, the readers and whoever waits for durability ever send, but for what may be denied.
fn trials(own: &OwnKeys, areas: &[&str], durability: Durability) -> Vec<Trial> {
    let mut trials = Vec::new();
    let all = |command, cmd| Trial { command, area: None, cmd };
    // The first area is prefetchd's own.
    for (command, further) in
        [("get", &[][..]), ("set", &["1"]), ("del", &[]), ("type", &[]), ("xadd", &["*", "a", "b"])]
    {
        trials.push(trial(0, areas[0], command, further));
    }
    for (n, area) in areas.iter().enumerate().skip(1) {
        for (command, further) in [
            ("type", &[][..]),
            ("del", &[]),
            ("hset", &["a", "b"]),
            ("hdel", &["a"]),
            ("pexpire", &["1"]),
            ("hgetall", &[]),
            ("pttl", &[]),
        ] {
            trials.push(trial(n, area, command, further));
        }
        let kept = own.kept(0);
        let mut copy = redis::cmd("COPY");
        copy.arg(format!("{area}prefetchd-check")).arg(kept.as_bytes()).arg("REPLACE");
        let mut rename = redis::cmd("RENAME");
        rename.arg(kept.as_bytes()).arg(format!("{area}prefetchd-check"));
        trials.extend([all("copy", copy), all("rename", rename)]);
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

fn note(missing: &mut Missing, trials: &[Trial], replies: &[Value], areas: &[&str]) {
    for (Trial { command, area, .. }, reply) in trials.iter().zip(replies) {
        let Value::ServerError(error) = reply else { continue };
        let details = error.details().unwrap_or_default();
        // EXEC: "EXECABORT Transaction discarded because of: NOPERM …".
        if error.code() != "NOPERM" && !details.contains("NOPERM") {
            continue;
        }
        // Redis looks at the command before it looks at the keys. The words since 6.2: "to run the 'del' command",
        // "to access one of the keys used as arguments", "to access a key".
        match (details.contains("to access"), area) {
            (false, _) => missing.command(command),
            (true, Some(n)) => missing.pattern(pattern_of(areas[*n])),
            // Of two keys, each of which is tried alone.
            (true, None) => {}
        }
    }
}

/// A key pattern of an ACL for everything that begins with `prefix`. It cannot hold white space: any character will do.
fn pattern_of(prefix: &str) -> String {
    let mut pattern = String::with_capacity(prefix.len() + 1);
    for c in prefix.chars() {
        match c {
            '*' | '?' | '[' | '\\' => pattern.extend(['\\', c]),
            c if c.is_whitespace() => pattern.push('?'),
            c => pattern.push(c),
        }
    }
    pattern.push('*');
    pattern
}

fn silent(target: &RedisTarget) -> SinkError {
    SinkError::TimedOut { redis: target.to_string(), after: CONNECT_TIMEOUT }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_means_the_prefix_and_nothing_else() {
        assert_eq!(pattern_of("cache:my-table:"), "cache:my-table:*");
        assert_eq!(pattern_of("a *[t]?\\:"), "a?\\*\\[t]\\?\\\\:*");
        assert_eq!(pattern_of("prefetchd:{s}:"), "prefetchd:{s}:*");
    }
}
