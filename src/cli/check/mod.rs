//! `prefetchd check`: finds out whether the daemon could run with this configuration and these servers, one line per
//! finding. What is good is only counted, unless `--all` is given; problems come last.
//!
//! It uses the daemon's own connections, queries and rules, and changes nothing, so it may run next to a running
//! daemon. If a server cannot be reached, checks that depend on it are skipped.

mod exposure;
#[cfg(target_os = "linux")]
mod holder;
mod sink;
mod source;

use super::client::Client;
use super::{EX_CONFIG, Failure, print, printable, runtime, say};
use crate::code::Code;
use crate::config::{Config, Warning};
use crate::error::Disposition;
use crate::schema::TableSpec;
use crate::source::SourceError;
use crate::terminal;
use crate::words::counted;
use clap::Args;
use std::collections::HashSet;
use std::fmt::Write as _;
use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// A larger difference between clocks is reported.
const APART: Duration = Duration::from_secs(1);

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Level {
    Ok,
    Warn,
    Fail,
    /// Shown as `fail`, but waiting may help.
    Unreachable,
}

#[derive(Debug)]
struct Finding {
    level: Level,
    /// Of every problem, and of nothing that is good.
    code: Option<Code>,
    /// One line.
    text: String,
    alike: Option<Alike>,
}

/// What makes findings about several objects one line.
#[derive(Debug)]
struct Alike {
    /// Equal if only the objects' names differ.
    kind: String,
    /// Of this object.
    name: String,
}

/// Up to this many findings that are alike have a line each, with a remedy that can be pasted.
const ALIKE_SHOWN: usize = 3;
/// Of more than that, so many further objects are named.
const NAMES_SHOWN: usize = 3;

/// Which findings are printed one by one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Detail {
    /// At the end; what is good is only counted.
    #[default]
    Problems,
    /// Each as soon as it is known. Problems are repeated at the end.
    Everything,
}

/// What has been found so far.
#[derive(Debug, Default)]
struct Findings {
    detail: Detail,
    all: Vec<Finding>,
}

impl Findings {
    fn of(detail: Detail) -> Self {
        Self { detail, all: Vec::new() }
    }

    fn add(&mut self, finding: Finding) -> Result<(), Failure> {
        let printed = match self.detail {
            Detail::Everything => print(&format!("{}\n", finding.line(""))),
            Detail::Problems => Ok(()),
        };
        self.all.push(finding);
        printed
    }

    fn ok(&mut self, text: impl AsRef<str>) -> Result<(), Failure> {
        self.add(Finding { level: Level::Ok, code: None, text: printable(text.as_ref()), alike: None })
    }

    fn problem(&mut self, level: Level, code: Code, text: &str) -> Result<(), Failure> {
        self.add(Finding { level, code: Some(code), text: printable(text), alike: None })
    }

    fn warn(&mut self, code: Code, text: impl AsRef<str>) -> Result<(), Failure> {
        self.problem(Level::Warn, code, text.as_ref())
    }

    fn fail(&mut self, code: Code, text: impl AsRef<str>) -> Result<(), Failure> {
        self.problem(Level::Fail, code, text.as_ref())
    }

    /// A finding that other objects may have as well. `kind` says what it is without the object's name.
    fn alike(&mut self, level: Level, code: Code, kind: String, name: &str, text: &str) -> Result<(), Failure> {
        let alike = Alike { kind, name: printable(name) };
        self.add(Finding { level, code: Some(code), text: printable(text), alike: Some(alike) })
    }

    fn of_table(&mut self, level: Level, code: Code, spec: &TableSpec, text: &str) -> Result<(), Failure> {
        let kind = text.replace(&spec.table.to_string(), "");
        self.alike(level, code, kind, &spec.name, &format!("table {}: {text}", spec.name))
    }

    /// Returns `None` for an error, which is a finding.
    fn of_postgres<T>(&mut self, result: Result<T, SourceError>) -> Result<Option<T>, Failure> {
        match result {
            Ok(value) => Ok(Some(value)),
            Err(error) => {
                self.problem(level(error.disposition()), error.code(), &format!("postgres: {error}"))?;
                Ok(None)
            }
        }
    }

    fn count(&self, level: Level) -> usize {
        self.all.iter().filter(|finding| finding.level == level).count()
    }

    /// The findings of these levels, in the order in which they were made. Of those that are alike, only a few.
    fn lines(&self, levels: &[Level]) -> String {
        let mut out = String::new();
        let mut told: HashSet<(Level, &str)> = HashSet::new();
        for finding in self.all.iter().filter(|finding| levels.contains(&finding.level)) {
            let Finding { level, alike, .. } = finding;
            let kind = alike.as_ref().map(|alike| alike.kind.as_str());
            let same = |other: &&Finding| {
                other.level == *level && other.alike.as_ref().map(|alike| alike.kind.as_str()) == kind
            };
            let others: Vec<&Finding> = match kind {
                Some(_) => self.all.iter().filter(same).skip(1).collect(),
                None => Vec::new(),
            };
            let further = match kind {
                Some(kind) if others.len() >= ALIKE_SHOWN => {
                    if !told.insert((*level, kind)) {
                        continue;
                    }
                    let names = others.iter().filter_map(|other| Some(other.alike.as_ref()?.name.as_str()));
                    let names = names.take(NAMES_SHOWN).collect::<Vec<_>>().join(", ");
                    let rest = if others.len() > NAMES_SHOWN { ", …" } else { "" };
                    format!("; the same for {} more: {names}{rest} (--all shows each)", others.len())
                }
                _ => String::new(),
            };
            let _ = writeln!(out, "{}", finding.line(&further));
        }
        out
    }

    /// What has not been printed yet: what is good as one line, the problems, the worst last, and the summary.
    fn report(&self) -> String {
        let mut out = match (self.detail, self.count(Level::Ok)) {
            (Detail::Problems, passed @ 1..) => {
                let them = if passed == 1 { "it" } else { "them" };
                format!("ok    {} passed (--all shows {them})\n", counted(passed, "check"))
            }
            _ => String::new(),
        };
        let problems = self.lines(&[Level::Warn]) + &self.lines(&[Level::Unreachable, Level::Fail]);
        if self.detail == Detail::Everything && !problems.is_empty() {
            out += "\n";
        }
        out + &problems + &self.summary() + "\n"
    }

    fn summary(&self) -> String {
        let warned = match self.count(Level::Warn) {
            0 => String::new(),
            warned => format!(", {}", counted(warned, "warning")),
        };
        match (self.count(Level::Fail), self.count(Level::Unreachable)) {
            (0, 0) => format!("ready: no problems found{warned}"),
            (0, away) => format!("unknown: {} not reachable{warned}", counted(away, "server")),
            (failed, away) => {
                let away =
                    if away == 0 { String::new() } else { format!(", {} not reachable", counted(away, "server")) };
                format!("not ready: {} must be fixed{away}{warned}", counted(failed, "problem"))
            }
        }
    }

    /// The exit code, where it is not 0.
    fn outcome(&self) -> Result<(), Failure> {
        match (self.count(Level::Fail), self.count(Level::Unreachable)) {
            (0, 0) => Ok(()),
            (0, _) => Err(Failure::silent(1)),
            (_, _) => Err(Failure::silent(EX_CONFIG)),
        }
    }
}

impl Finding {
    /// As one line. `further`: other objects of which it is true.
    fn line(&self, further: &str) -> String {
        let Finding { level, code, text, .. } = self;
        let word = match level {
            Level::Ok => "ok  ",
            Level::Warn => "warn",
            Level::Fail | Level::Unreachable => "fail",
        };
        format!("{word}  {text}{further}{}", code.map_or(String::new(), mark))
    }
}

/// The end of a line, which in TOML and in a shell is a comment: what is to be pasted often stands before it.
fn mark(code: Code) -> String {
    format!("  #{}", code.as_str())
}

/// Not among the findings, which programs may read.
fn say_where_sections_are() {
    say("prefetchd explain CODE says more about each #code, as docs/errors.md does");
}

fn level(disposition: Disposition) -> Level {
    match disposition {
        Disposition::Stop => Level::Fail,
        Disposition::Retry | Disposition::Reload => Level::Unreachable,
    }
}

#[derive(Debug, Args)]
pub(super) struct CheckArgs {
    /// Print every finding, also what is good
    #[arg(long)]
    all: bool,
}

pub(super) fn run(file: Option<&Path>, args: &CheckArgs) -> Result<(), Failure> {
    let config = match Config::load(file) {
        Ok(config) => config,
        Err(error) => {
            // Its line breaks are kept, because it may show how to begin a file.
            let text = terminal::message(&error.to_string());
            print(&format!("fail  configuration: {text}{}\n", mark(error.code)))?;
            say_where_sections_are();
            return Err(Failure::silent(EX_CONFIG));
        }
    };
    let mut findings = Findings::of(if args.all { Detail::Everything } else { Detail::Problems });
    runtime()?.block_on(look(&config, &mut findings))?;
    print(&findings.report())?;
    if findings.all.iter().any(|finding| finding.code.is_some()) {
        say_where_sections_are();
    }
    findings.outcome()
}

async fn look(config: &Config, findings: &mut Findings) -> Result<(), Failure> {
    let names: Vec<&str> = config.tables.iter().map(|t| t.name.as_str()).collect();
    findings.ok(format!("configuration: valid, tables {}", first_of(&names)))?;
    for Warning { code, text } in &config.warnings {
        findings.warn(*code, format!("configuration: {text}"))?;
    }
    listen(config, findings)?;
    exposure::look(config, findings)?;
    let redis = sink::look(config, findings).await?;
    source::look(config, redis.as_ref(), findings).await
}

/// Every finding and the summary, for a report.
pub(super) async fn everything(config: &Config) -> String {
    let mut findings = Findings::default();
    // Only printing fails, and nothing is printed.
    let _ = look(config, &mut findings).await;
    let lines = findings.all.iter().map(|finding| finding.line("") + "\n");
    lines.collect::<String>() + &findings.summary() + "\n"
}

/// More names than these make no line that can be read.
const NAMES_IN_A_LINE: usize = 20;

fn first_of(names: &[&str]) -> String {
    let shown = names.iter().take(NAMES_IN_A_LINE).copied().collect::<Vec<_>>().join(", ");
    match names.len().saturating_sub(NAMES_IN_A_LINE) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

fn listen(config: &Config, findings: &mut Findings) -> Result<(), Failure> {
    let listen = config.http.listen;
    let free = match TcpListener::bind(listen) {
        Ok(_) => true,
        Err(error) if error.kind() == ErrorKind::AddrInUse && listen.port() != 0 => false,
        Err(error) => {
            return findings.fail(
                Code::ListenAddress,
                format!("http: cannot listen on {listen}: {error}; choose another http.listen"),
            );
        }
    };
    if !free {
        match who_listens(config)? {
            Listening::Same => {
                findings.ok(format!("http: a prefetchd with slot {} listens on {listen}", config.postgres.slot))?;
            }
            Listening::Silent => findings.warn(Code::ListenerUnclear, format!(
                "http: a prefetchd that does not tell its slot now listens on {listen}: run check again later, and make sure \
                 that it is the one with slot {}",
                config.postgres.slot
            ))?,
            Listening::Starting => findings.warn(Code::ListenerUnclear, format!(
                "http: a prefetchd that has not reached postgres yet listens on {listen}: make sure that it is the one with slot {}",
                config.postgres.slot
            ))?,
            Listening::Other(who) => {
                let text = format!("http: {listen} is taken by {}", taken(who, listen));
                findings.fail(Code::ListenAddress, text)?;
            }
        }
    }
    if free && listen.ip().is_loopback() {
        return findings.ok(format!("http: listens on {listen}, reachable from this machine only"));
    }
    if listen.ip().is_loopback() {
        return Ok(());
    }
    findings.warn(
        Code::HttpExposed,
        format!(
            "http: {listen} can be reached from other machines, and reads need no token: \
         put a proxy or firewall in front, or listen on 127.0.0.1"
        ),
    )
}

const STRANGER: &str = "another program";

/// Says who holds a port, and what to do. `who`: what it answers like.
fn taken(who: &str, listen: SocketAddr) -> String {
    let remedy = "choose another http.listen, or stop that program";
    #[cfg(target_os = "linux")]
    if let Some(holder::Holder { pid, name, is_frozen }) = holder::of(listen) {
        return match (name.as_str(), is_frozen) {
            ("prefetchd", true) => {
                format!("a prefetchd that is frozen (pid {pid}, state T): kill -CONT {pid}, or restart it")
            }
            ("prefetchd", false) if who == STRANGER => {
                format!("a prefetchd that does not answer (pid {pid}): restart it, or choose another http.listen")
            }
            (_, _) => format!("{who} ({name}, pid {pid}): {remedy}"),
        };
    }
    #[cfg(not(target_os = "linux"))]
    let _ = listen;
    format!("{who}: {remedy}")
}

/// What already listens on the configured address.
enum Listening {
    /// A prefetchd with the configured slot.
    Same,
    /// A prefetchd that does not report its slot yet.
    Starting,
    /// Alive, but too busy to report its status, or stopping.
    Silent,
    Other(&'static str),
}

fn who_listens(config: &Config) -> Result<Listening, Failure> {
    let client = Client::of_a_stranger(config.http.listen)?;
    let Ok((status, _)) = client.json("/v1/status", &[200, 503]) else {
        return Ok(Listening::Other(STRANGER));
    };
    // Its health is told under any load, as opposed to its status.
    let is_alive = || client.json("/healthz", &[200]).is_ok_and(|(health, _)| health["status"] == "ok");
    if status["error"].is_string() && is_alive() {
        return Ok(Listening::Silent);
    }
    Ok(match status["source"]["slot"].as_str() {
        Some(slot) if slot == config.postgres.slot.as_str() => Listening::Same,
        Some(_) => Listening::Other("a prefetchd with another slot"),
        None if status["state"].is_string() && status["tables"].is_array() => Listening::Starting,
        None => Listening::Other(STRANGER),
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
        true => findings.warn(Code::ClocksDiffer, format!(
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
            all.problem(*level, Code::Internal, "a finding").expect("nothing is printed");
        }
        all.outcome().err().map(|failure| failure.exit)
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
    fn what_is_good_is_counted_and_the_worst_comes_last() {
        let mut findings = Findings::default();
        findings.fail(Code::WalLevel, "a").expect("nothing is printed");
        findings.ok("b").expect("nothing is printed");
        findings.warn(Code::SqlAscii, "c").expect("nothing is printed");
        findings.ok("d").expect("nothing is printed");
        let report = "ok    2 checks passed (--all shows them)\nwarn  c  #sql-ascii\nfail  a  #wal-level\n\
                      not ready: 1 problem must be fixed, 1 warning\n";
        assert_eq!(findings.report(), report);
        let mut one = Findings::default();
        one.ok("a").expect("nothing is printed");
        assert_eq!(one.report(), "ok    1 check passed (--all shows it)\nready: no problems found\n");
    }

    #[test]
    fn findings_that_are_alike_become_one_line() {
        let report = |tables: usize| {
            let mut findings = Findings::default();
            for n in 1..=tables {
                let text = format!("table t{n}: no key in t{n}");
                let (name, kind) = (format!("t{n}"), "no key".to_owned());
                findings.alike(Level::Fail, Code::TableIdentity, kind, &name, &text).expect("nothing is printed");
            }
            let (code, kind) = (Code::TableHeirs, "no key".to_owned());
            findings.alike(Level::Warn, code, kind, "x", "table x: other").expect("nothing is printed");
            findings.report()
        };
        for few in 0..=ALIKE_SHOWN {
            assert_eq!(report(few).matches("fail  table t").count(), few);
        }
        assert!(report(4).contains(
            "fail  table t1: no key in t1; the same for 3 more: t2, t3, t4 (--all shows each)  #table-identity\n"
        ));
        let many = report(300);
        assert!(many.contains(
            "fail  table t1: no key in t1; the same for 299 more: t2, t3, t4, … (--all shows each)  #table-identity\n"
        ));
        assert!(
            many.contains("warn  table x: other  #table-heirs\n")
                && many.ends_with("300 problems must be fixed, 1 warning\n")
        );
        assert_eq!(many.lines().count(), 3, "{many}");
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
            clocks(postgres, redis, &mut findings).expect("nothing is printed");
            assert_eq!(findings.count(Level::Warn), warned, "{postgres:?} {redis:?}");
        }
    }
}
