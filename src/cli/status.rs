//! `prefetchd status`: shows the status of a running daemon, as text or as the daemon's own JSON.

use super::client::Client;
use super::{Failure, aligned, print, printable};
use crate::telemetry::has_colours;
use crate::words::counted;
use clap::Args;
use serde_json::Value;
use std::fmt::Write as _;
use std::io;
use std::path::Path;
use std::time::Duration;

#[derive(Debug, Args)]
pub(super) struct StatusArgs {
    /// Print the daemon's own JSON
    #[arg(long)]
    json: bool,
    /// Only ask whether the daemon works (/healthz), ready or not: for a liveness check
    #[arg(long, conflicts_with = "json")]
    live: bool,
    /// Where the daemon is [default: from http.listen]
    #[arg(long, value_name = "URL")]
    url: Option<String>,
}

pub(super) fn run(file: Option<&Path>, args: &StatusArgs) -> Result<(), Failure> {
    let client = Client::new(file, args.url.as_deref())?;
    if args.live {
        client.json("/healthz", &[200])?;
        return print(&format!("prefetchd at {} works\n", client.base));
    }
    let (status, text) = client.json("/v1/status", &[200])?;
    let (ready, _) = client.json("/readyz", &[200, 503])?;
    let is_ready = ready["ready"] == Value::Bool(true);
    if args.json {
        print(&format!("{}\n", text.trim_end()))?;
    } else {
        print(&report(&client.base, &status, &ready, has_colours(&io::stdout())))?;
    }
    if is_ready { Ok(()) } else { Err(Failure::silent(1)) }
}

fn report(base: &str, status: &Value, ready: &Value, colours: bool) -> String {
    let status = Shown(status);
    let mut out = heading(base, status, ready, colours);
    out += &verdict(status);
    out += &reasons(status, ready);
    out += &figures(status);
    out += &history(status);
    out += &nodes(status);
    out += &tables(status);
    out + &dead_letters(status)
}

/// What the daemon answered. A field that is missing shows as `-`: the daemon may be of another version.
#[derive(Clone, Copy)]
struct Shown<'a>(&'a Value);

impl<'a> Shown<'a> {
    fn at(self, path: &str) -> String {
        match self.0.pointer(path) {
            None | Some(Value::Null) => "-".to_owned(),
            Some(Value::String(text)) => printable(text),
            Some(other) => other.to_string(),
        }
    }

    /// A number with one decimal.
    fn rounded(self, path: &str) -> String {
        self.0.pointer(path).and_then(Value::as_f64).map_or("-".to_owned(), |number| format!("{number:.1}"))
    }

    /// `1 row`, `2 rows`, `- rows`.
    fn counted(self, path: &str, one: &str) -> String {
        match self.0.pointer(path).and_then(Value::as_u64) {
            Some(count) => counted(count, one),
            None => format!("- {one}s"),
        }
    }

    /// Whether it has read what Redis has. Before that, no count of it is known.
    fn is_known(self) -> bool {
        self.0.pointer("/lsn/applied").is_some_and(|lsn| !lsn.is_null())
    }

    fn bytes(self, path: &str) -> Option<String> {
        let bytes = self.0.pointer(path)?.as_u64()?;
        Some(bytesize::ByteSize(bytes).display().si().to_string())
    }

    fn is(self, path: &str) -> bool {
        self.0.pointer(path) == Some(&Value::Bool(true))
    }

    fn list(self, path: &str) -> impl Iterator<Item = Shown<'a>> {
        self.0.pointer(path).and_then(Value::as_array).into_iter().flatten().map(Shown)
    }

    fn row(self, fields: &[&str]) -> Vec<String> {
        fields.iter().map(|field| self.at(&format!("/{field}"))).collect()
    }
}

fn heading(base: &str, status: Shown<'_>, ready: &Value, colours: bool) -> String {
    let is_ready = match (ready["ready"] == Value::Bool(true), colours) {
        (true, false) => "ready",
        (false, false) => "NOT READY",
        (true, true) => "\u{1b}[32mready\u{1b}[0m",
        (false, true) => "\u{1b}[31mNOT READY\u{1b}[0m",
    };
    let paused = if status.is("/paused") { ", paused" } else { "" };
    let operation = status.0["operation"].as_str();
    let operation = operation.map_or(String::new(), |what| format!(", {} under way", printable(what)));
    let up = status.0["uptime_seconds"].as_f64().and_then(|s| Duration::try_from_secs_f64(s.floor()).ok());
    let up = up.map_or("-".to_owned(), |up| humantime::format_duration(up).to_string());
    let (version, state) = (status.at("/version"), status.at("/state"));
    format!("prefetchd {version} at {base}: {state}{paused}{operation}, {is_ready}, up {up}\n")
}

fn verdict(status: Shown<'_>) -> String {
    let verdict = &status.0["verdict"];
    let Some(text) = verdict["text"].as_str() else { return String::new() };
    let mut out = format!("\n{}\n", printable(text));
    for remedy in verdict["remedy"].as_str().unwrap_or_default().lines() {
        let _ = writeln!(out, "{}", printable(remedy));
    }
    if let Some(code) = verdict["code"].as_str() {
        let _ = writeln!(out, "more: prefetchd explain {}", printable(code));
    }
    out + "\n"
}

/// Why it is not ready, and what it waits for.
fn reasons(status: Shown<'_>, ready: &Value) -> String {
    let mut out = String::new();
    for reason in Shown(ready).list("/reasons") {
        let _ = writeln!(out, "  {}", reason.at(""));
    }
    let waiting = status.at("/waiting_for");
    if waiting != "-" && !ready["reasons"].to_string().contains(&waiting) {
        let _ = writeln!(out, "  waiting: {waiting}");
    }
    out
}

/// Where it stands, and what it has done since its start.
fn figures(status: Shown<'_>) -> String {
    let (at, rounded) = (|path: &str| status.at(path), |path: &str| status.rounded(path));
    let slot = match (status.bytes("/slot/retained_bytes"), status.bytes("/slot/limit_bytes")) {
        (None, _) => "-".to_owned(),
        (Some(kept), None) => format!("keeps {kept} of WAL, without limit"),
        (Some(kept), Some(limit)) => format!("keeps {kept} of WAL, of {limit}"),
    };
    let misses = if status.0["misses"] == 1 { "miss" } else { "misses" };
    // Before it has read them from Redis, those of an earlier run are not counted.
    let dead = if status.is_known() { status.counted("/dead_letters", "dead letter") } else { "- dead letters".into() };
    let rate = status.bytes("/load_rate/bytes_a_second");
    let rate = rate.map_or(String::new(), |rate| format!(" at up to {rate} a second"));
    let lines = [
        String::new(),
        format!(
            "source     {} (system {}, timeline {}), slot {}, publication {}",
            at("/source/database"),
            at("/source/system_id"),
            at("/source/timeline"),
            at("/source/slot"),
            at("/source/publication")
        ),
        format!(
            "lsn        applied {}, confirmed {}, received {}, server {}",
            at("/lsn/applied"),
            at("/lsn/confirmed"),
            at("/lsn/received"),
            at("/lsn/server")
        ),
        format!("lag        {}, {} s", status.counted("/lag/bytes", "byte"), rounded("/lag/seconds")),
        format!("slot       {slot}"),
        format!(
            "sync       {}; commit to Redis: {} ms on average, {} ms p50, {} ms p99 of {}",
            status.counted("/sync_events_applied", "change"),
            rounded("/sync_lag_ms/avg"),
            rounded("/sync_lag_ms/p50"),
            rounded("/sync_lag_ms/p99"),
            at("/sync_lag_ms/count")
        ),
        format!(
            "reads      {}, {} {misses}, hit rate {} %",
            status.counted("/hits", "hit"),
            at("/misses"),
            rounded("/hit_rate_pct")
        ),
        format!("postgres   {} read{rate}, {dead}", status.counted("/primary_reads", "table")),
    ];
    lines.join("\n") + "\n"
}

/// The last load and the last verification.
fn history(status: Shown<'_>) -> String {
    let mut out = String::new();
    let at = |path: &str| status.at(path);
    if status.0["last_load"].is_object() {
        let _ = writeln!(
            out,
            "last load  {} in {} ms at {}: {}",
            status.counted("/last_load/rows", "row"),
            at("/last_load/elapsed_ms"),
            at("/last_load/lsn"),
            at("/last_load/reason")
        );
    }
    let _ = match &status.0["last_verify"] {
        Value::Null => writeln!(out, "verified   {}", if status.is_known() { "never" } else { "-" }),
        // Of a verification before the daemon's last start only the time is known.
        last if last["rows"].is_null() => writeln!(out, "verified   {}", at("/last_verify/at")),
        last => writeln!(
            out,
            "verified   {}: {}, {} missing, {} stale, {} orphaned{}, {} repaired",
            at("/last_verify/at"),
            status.counted("/last_verify/rows", "row"),
            at("/last_verify/missing"),
            at("/last_verify/stale"),
            at("/last_verify/orphaned"),
            last["lookups"]
                .as_u64()
                .map_or(String::new(), |members| format!(", {} of lookups", counted(members, "member"))),
            at("/last_verify/repaired")
        ),
    };
    out
}

/// The masters of a Redis Cluster.
fn nodes(status: Shown<'_>) -> String {
    let head = ["NODE", "HASH SLOTS", "LANES", "HEALING", "LSN", "BEHIND", "MEMORY", "OF", "EVICTED", "ANSWERED"];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    let mut troubles = String::new();
    for node in status.list("/nodes") {
        let bytes = |path| node.bytes(path).unwrap_or("-".to_owned());
        let mut row = node.row(&["node", "hash_slots", "lanes", "healing", "lsn"]);
        let most = if node.0["max_memory_bytes"] == 0 { "no limit".to_owned() } else { bytes("/max_memory_bytes") };
        row.extend([bytes("/behind_bytes"), bytes("/used_memory_bytes"), most, node.at("/evicted_keys")]);
        row.push(node.0["answered_seconds_ago"].as_f64().map_or("-".to_owned(), |ago| format!("{ago:.1} s ago")));
        rows.push(row);
        if !node.0["trouble"].is_null() {
            let _ = writeln!(troubles, "{}: {}", node.at("/node"), node.at("/trouble"));
        }
    }
    if rows.len() == 1 { String::new() } else { format!("\n{}{troubles}", aligned(&rows)) }
}

fn tables(status: Shown<'_>) -> String {
    let head = ["NAME", "TABLE", "STATE", "ROWS", "PREFETCHED", "UPSERTS", "DELETES", "TRUNCATES", "HITS", "MISSES"];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    for table in status.list("/tables") {
        let mut row = table.row(&["name", "table"]);
        row.push(table_state(table));
        row.extend(table.row(&["rows", "prefetched", "upserts", "deletes", "truncates", "hits", "misses"]));
        rows.push(row);
    }
    format!("\n{}", aligned(&rows))
}

fn table_state(table: Shown<'_>) -> String {
    match &table.0["state"] {
        Value::String(state) if table.0["loading"].is_object() => {
            // Without statistics there is no estimate.
            let estimated = match table.0["loading"]["estimated"].as_u64() {
                Some(0) | None => "-".to_owned(),
                Some(estimated) => estimated.to_string(),
            };
            format!("{} {} of {estimated}", printable(state), table.at("/loading/rows"))
        }
        Value::String(state) => printable(state),
        _ if table.is("/loaded") => "loaded".to_owned(),
        _ => "-".to_owned(),
    }
}

/// Rows that Postgres has and Redis cannot hold, as far as the daemon lists them.
fn dead_letters(status: Shown<'_>) -> String {
    let mut out = String::new();
    let listed: Vec<_> = status.list("/dead_letter_keys").collect();
    if !listed.is_empty() {
        let mut rows = vec![["DEAD LETTER", "TABLE", "REASON", "LSN"].map(str::to_owned).to_vec()];
        rows.extend(listed.iter().map(|dead| dead.row(&["key", "table", "reason", "lsn"])));
        let _ = write!(out, "\n{}", aligned(&rows));
        let known: u64 = status.list("/tables").filter_map(|table| table.0["dead_letters"].as_u64()).sum();
        let more = known.saturating_sub(listed.len() as u64);
        if more > 0 {
            let _ = writeln!(out, "and {more} more");
        }
        if let Value::String(slot) = &status.0["source"]["slot"] {
            let _ = writeln!(out, "details: redis-cli XRANGE 'prefetchd:{{{}}}:dead' - +", printable(slot));
        }
    }
    for table in status.list("/tables").filter(|table| table.is("/more_dead_letters")) {
        let name = table.at("/name");
        let _ = writeln!(out, "{name} has more dead letters than are kept track of: missing rows are 503");
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn shows_whatever_a_daemon_answers() {
        let status = json!({
            "version": "0.1.0", "state": "streaming", "waiting_for": null, "paused": false, "uptime_seconds": 72.3,
            "source": {"system_id": "7", "timeline": 1, "database": "shop", "slot": "s", "publication": "p"},
            "lag": {"bytes": 0, "seconds": 0.0}, "hits": 10, "primary_reads": 2,
            "load_rate": {"bytes_a_second": 20_000_000},
            "operation": "verify", "slot": {"retained_bytes": 1_500_000, "limit_bytes": 2_000_000_000},
            "last_verify": {"at": "2026-01-31T12:34:56.789Z", "rows": 5, "missing": 1},
            "tables": [{"name": "categories", "table": "public.categories", "loaded": true, "prefetched": 5},
                       {"name": "b", "state": "loading", "loading": {"rows": 3, "estimated": 9}}],
            "nodes": [{"node": "127.0.0.1:7001", "hash_slots": 5461, "lanes": 12, "healing": 0, "lsn": "0/1A",
                       "behind_bytes": 0, "used_memory_bytes": 1_500_000, "max_memory_bytes": 0, "evicted_keys": 0,
                       "answered_seconds_ago": 0.25, "trouble": null},
                      {"node": "127.0.0.1:7002", "hash_slots": 10923, "trouble": "no answer for 7 s"}],
        });
        let not_ready = json!({"ready": false, "reasons": ["table x is loading"]});
        assert!(report("http://h", &status, &not_ready, true).contains("\u{1b}[31mNOT READY"));
        let report = report("http://h", &status, &not_ready, false);
        assert!(!report.contains('\u{1b}'));
        for part in [
            "streaming, verify under way, NOT READY, up 1m 12s",
            "slot       keeps 1.5 MB of WAL, of 2.0 GB",
            "verified   2026-01-31T12:34:56.789Z: 5 rows, 1 missing, -",
            "loading 3 of 9",
            "  table x is loading",
            "postgres   2 tables read at up to 20.0 MB a second, - dead letters",
            "shop (system 7",
            "categories  public.categories  loaded",
            "127.0.0.1:7001        5461  12     0        0/1A  0 B     1.5 MB  no limit  0        0.2 s ago",
            "\n127.0.0.1:7002: no answer for 7 s\n",
        ] {
            assert!(report.contains(part), "{part}: {report}");
        }
        super::report("http://h", &Value::Null, &Value::Null, false);
    }

    #[test]
    fn what_is_not_known_is_a_dash_and_one_is_singular() {
        let status = json!({
            "state": "connecting", "lsn": {"applied": null}, "slot": {"retained_bytes": null, "limit_bytes": null},
            "hits": 1, "misses": 1, "primary_reads": 1, "dead_letters": 0, "sync_events_applied": 1,
            "last_load": {"rows": 1, "elapsed_ms": 1, "lsn": "0/1A", "reason": "first start"}, "last_verify": null,
            "tables": [{"name": "b", "state": "loading", "loading": {"rows": 3, "estimated": 0}}],
        });
        let of = |status: &Value| report("http://h", status, &json!({"ready": false}), false);
        let text = of(&status);
        for part in [
            "slot       -\n",
            "verified   -\n",
            "1 table read, - dead letters\n",
            "lag        - bytes, - s\n",
            "1 hit, 1 miss, hit rate - %\n",
            "sync       1 change; ",
            "last load  1 row in",
            "loading 3 of -",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        let mut known = status.clone();
        (known["lsn"]["applied"], known["slot"]["retained_bytes"]) = ("0/1A".into(), 5.into());
        let text = of(&known);
        for part in ["verified   never\n", "1 table read, 0 dead letters\n", "keeps 5 B of WAL, without limit\n"] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }
}
