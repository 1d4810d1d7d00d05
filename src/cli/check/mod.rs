//! `prefetchd check`: finds out whether the daemon could run with this configuration and these servers, one line per
//! finding.
//!
//! It uses the daemon's own connections, queries and rules, and changes nothing, so it may run next to a running
//! daemon. If a server cannot be reached, checks that depend on it are skipped.

mod exposure;
mod sink;
mod source;

use super::client::Client;
use super::{EX_CONFIG, Failure, print, printable, runtime};
use crate::config::Config;
use crate::error::Disposition;
use crate::source::SourceError;
use crate::terminal;
use std::io::ErrorKind;
use std::net::TcpListener;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// A larger difference between clocks is reported.
const APART: Duration = Duration::from_secs(1);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Level {
    Ok,
    Warn,
    Fail,
    /// Shown as `fail`, but waiting may help.
    Unreachable,
}

/// Counts the findings. Each is printed as soon as it is known.
#[derive(Debug, Default)]
struct Findings {
    warned: usize,
    failed: usize,
    unreachable: usize,
}

impl Findings {
    fn say(&mut self, level: Level, text: &str) -> Result<(), Failure> {
        let word = match level {
            Level::Ok => "ok  ",
            Level::Warn => "warn",
            Level::Fail | Level::Unreachable => "fail",
        };
        match level {
            Level::Ok => {}
            Level::Warn => self.warned += 1,
            Level::Fail => self.failed += 1,
            Level::Unreachable => self.unreachable += 1,
        }
        print(&format!("{word}  {}\n", printable(text)))
    }

    fn ok(&mut self, text: impl AsRef<str>) -> Result<(), Failure> {
        self.say(Level::Ok, text.as_ref())
    }

    fn warn(&mut self, text: impl AsRef<str>) -> Result<(), Failure> {
        self.say(Level::Warn, text.as_ref())
    }

    fn fail(&mut self, text: impl AsRef<str>) -> Result<(), Failure> {
        self.say(Level::Fail, text.as_ref())
    }

    /// Returns `None` for an error, which is printed.
    fn of_postgres<T>(&mut self, result: Result<T, SourceError>) -> Result<Option<T>, Failure> {
        match result {
            Ok(value) => Ok(Some(value)),
            Err(error) => {
                self.say(level(error.disposition()), &format!("postgres: {error}"))?;
                Ok(None)
            }
        }
    }

    /// Prints the summary, and returns the exit code.
    fn end(&self) -> Result<(), Failure> {
        let of = |count: usize, one: &str| format!("{count} {one}{}", if count == 1 { "" } else { "s" });
        let warned = if self.warned == 0 { String::new() } else { format!(", {}", of(self.warned, "warning")) };
        match (self.failed, self.unreachable) {
            (0, 0) => print(&format!("ready: no problems found{warned}\n")),
            (0, away) => {
                print(&format!("unknown: {} not reachable{warned}\n", of(away, "server")))?;
                Err(Failure { code: 1, message: None })
            }
            (failed, away) => {
                let away = if away == 0 { String::new() } else { format!(", {} not reachable", of(away, "server")) };
                print(&format!("not ready: {} must be fixed{away}{warned}\n", of(failed, "problem")))?;
                Err(Failure { code: EX_CONFIG, message: None })
            }
        }
    }
}

fn level(disposition: Disposition) -> Level {
    match disposition {
        Disposition::Stop => Level::Fail,
        Disposition::Retry | Disposition::Reload => Level::Unreachable,
    }
}

pub(super) fn run(file: Option<&Path>) -> Result<(), Failure> {
    let mut findings = Findings::default();
    let config = match Config::load(file) {
        Ok(config) => config,
        Err(error) => {
            // Its line breaks are kept, because it may show how to begin a file.
            print(&format!("fail  configuration: {}\n", terminal::message(&error.to_string())))?;
            return Err(Failure { code: EX_CONFIG, message: None });
        }
    };
    let names: Vec<&str> = config.tables.iter().map(|t| t.name.as_str()).collect();
    findings.ok(format!("configuration: valid, tables {}", names.join(", ")))?;
    for warning in &config.warnings {
        findings.warn(format!("configuration: {warning}"))?;
    }
    listen(&config, &mut findings)?;
    exposure::look(&config, &mut findings)?;
    let runtime = runtime()?;
    runtime.block_on(async {
        let redis = sink::look(&config, &mut findings).await?;
        source::look(&config, redis.as_ref(), &mut findings).await
    })?;
    findings.end()
}

fn listen(config: &Config, findings: &mut Findings) -> Result<(), Failure> {
    let listen = config.http.listen;
    let free = match TcpListener::bind(listen) {
        Ok(_) => true,
        Err(error) if error.kind() == ErrorKind::AddrInUse && listen.port() != 0 => false,
        Err(error) => {
            return findings.fail(format!("http: cannot listen on {listen}: {error}; choose another http.listen"));
        }
    };
    if !free {
        match who_listens(config)? {
            Listening::Same => {
                findings.ok(format!("http: a prefetchd with slot {} listens on {listen}", config.postgres.slot))?;
            }
            Listening::Starting => findings.warn(format!(
                "http: a prefetchd that has not reached postgres yet listens on {listen}: make sure that it is the one with slot {}",
                config.postgres.slot
            ))?,
            Listening::Other(who) => findings.fail(format!(
                "http: {listen} is taken by {who}: choose another http.listen, or stop that program"
            ))?,
        }
    }
    if free && listen.ip().is_loopback() {
        return findings.ok(format!("http: listens on {listen}, reachable from this machine only"));
    }
    if listen.ip().is_loopback() {
        return Ok(());
    }
    findings.warn(format!(
        "http: {listen} can be reached from other machines, and reads need no token: \
         put a proxy or firewall in front, or listen on 127.0.0.1"
    ))
}

/// What already listens on the configured address.
enum Listening {
    /// A prefetchd with the configured slot.
    Same,
    /// A prefetchd that does not report its slot yet.
    Starting,
    Other(&'static str),
}

fn who_listens(config: &Config) -> Result<Listening, Failure> {
    let Ok((status, _)) = Client::of_a_stranger(config.http.listen)?.json("/v1/status", &[200]) else {
        return Ok(Listening::Other("another program"));
    };
    Ok(match status["source"]["slot"].as_str() {
        Some(slot) if slot == config.postgres.slot.as_str() => Listening::Same,
        Some(_) => Listening::Other("a prefetchd with another slot"),
        None if status["state"].is_string() && status["tables"].is_array() => Listening::Starting,
        None => Listening::Other("another program"),
    })
}

/// A server's clock, compared with this machine's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Clock {
    ahead_ms: i64,
    /// The time that the request took, which is the uncertainty of `ahead_ms`.
    within_ms: i64,
}

impl Clock {
    /// Asks for the time in milliseconds since the Unix epoch.
    async fn ask<E>(ask: impl Future<Output = Result<Option<i64>, E>>) -> Result<Option<Self>, E> {
        let before = now_ms();
        let there = ask.await?;
        let after = now_ms();
        Ok(there.map(|there| Self { ahead_ms: there - (before + after) / 2, within_ms: (after - before + 1) / 2 }))
    }

    /// Whether the clocks certainly differ by more than [`APART`].
    fn is_apart(self, other: Clock) -> bool {
        let apart = self.ahead_ms.abs_diff(other.ahead_ms);
        apart > APART.as_millis() as u64 + (self.within_ms + other.within_ms).unsigned_abs()
    }
}

/// This machine's clock.
const HERE: Clock = Clock { ahead_ms: 0, within_ms: 0 };

fn now_ms() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(now.as_millis()).unwrap_or(i64::MAX)
}

/// Compares the clocks of this machine, of Postgres and of Redis, as far as they are known.
fn clocks(postgres: Option<Clock>, redis: Option<Clock>, findings: &mut Findings) -> Result<(), Failure> {
    let known = [("postgres", postgres), ("redis", redis)];
    let known: Vec<(&str, Clock)> = known.into_iter().filter_map(|(name, clock)| Some((name, clock?))).collect();
    if known.is_empty() {
        return Ok(());
    }
    let text = |(name, clock): &(&str, Clock)| format!("{name} {:+.1} s", clock.ahead_ms as f64 / 1000.0);
    let list = known.iter().map(text).collect::<Vec<_>>().join(", ");
    let apart = |(_, clock): &(&str, Clock)| clock.is_apart(HERE);
    let from_each_other = matches!(known[..], [(_, a), (_, b)] if a.is_apart(b));
    match known.iter().any(apart) || from_each_other {
        false => findings.ok(format!("clocks: agree with this machine's ({list})")),
        true => findings.warn(format!(
            "clocks: {list} compared with this machine's: the measured sync lag is wrong by that much; synchronize them with NTP"
        )),
    }
}

fn size(bytes: u64) -> String {
    crate::bridge::room::size(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(findings: &[Level]) -> Option<u8> {
        let mut all = Findings::default();
        for level in findings {
            all.say(*level, "a finding").expect("stdout is there");
        }
        all.end().err().map(|failure| failure.code)
    }

    #[test]
    fn what_a_person_must_mend_comes_before_what_may_pass() {
        for (findings, code) in [
            (&[][..], None),
            (&[Level::Ok, Level::Warn], None),
            (&[Level::Ok, Level::Unreachable], Some(1)),
            (&[Level::Fail, Level::Ok], Some(78)),
            (&[Level::Fail, Level::Unreachable], Some(78)),
        ] {
            assert_eq!(after(findings), code, "{findings:?}");
        }
    }

    #[test]
    fn clocks_are_apart_only_for_certain() {
        let clock = |ahead_ms, within_ms| Some(Clock { ahead_ms, within_ms });
        for (postgres, redis, warned) in [
            (clock(3, 1), clock(-3, 1), 0),
            (clock(1_500, 600), None, 0),
            (clock(1_500, 400), None, 1),
            (clock(0, 0), clock(-1_500, 1), 1),
            (clock(700, 1), clock(-700, 1), 1),
            (None, None, 0),
        ] {
            let mut findings = Findings::default();
            clocks(postgres, redis, &mut findings).expect("stdout is there");
            assert_eq!(findings.warned, warned, "{postgres:?} {redis:?}");
        }
    }
}
