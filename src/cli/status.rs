//! `prefetchd status`: what a running daemon says of itself, for people or as it is.

use super::client::Client;
use super::{Failure, aligned, print, printable};
use crate::telemetry::has_colours;
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
    /// Where the daemon is [default: from http.listen]
    #[arg(long, value_name = "URL")]
    url: Option<String>,
}

pub(super) fn run(file: Option<&Path>, args: &StatusArgs) -> Result<(), Failure> {
    let client = Client::new(file, args.url.as_deref())?;
    let (status, text) = client.json("/v1/status", &[200]).map_err(Failure::work)?;
    let (ready, _) = client.json("/readyz", &[200, 503]).map_err(Failure::work)?;
    let is_ready = ready["ready"] == Value::Bool(true);
    if args.json {
        print(&format!("{}\n", text.trim_end()))?;
    } else {
        print(&report(&client.base, &status, &ready, has_colours(&io::stdout())))?;
    }
    if is_ready { Ok(()) } else { Err(Failure { code: 1, message: None }) }
}

/// Anything that is missing shows as `-`: the daemon may be of another version.
fn report(base: &str, status: &Value, ready: &Value, colours: bool) -> String {
    let at = |path: &str| text(status.pointer(path));
    let mut out = String::new();
    let is_ready = match (ready["ready"] == Value::Bool(true), colours) {
        (true, false) => "ready",
        (false, false) => "NOT READY",
        (true, true) => "\u{1b}[32mready\u{1b}[0m",
        (false, true) => "\u{1b}[31mNOT READY\u{1b}[0m",
    };
    let paused = if status["paused"] == Value::Bool(true) { ", paused" } else { "" };
    let doing = status["operation"].as_str().map_or(String::new(), |what| format!(", {} under way", printable(what)));
    let up = status["uptime_seconds"].as_f64().and_then(|s| Duration::try_from_secs_f64(s.floor()).ok());
    let up = up.map_or("-".to_owned(), |up| humantime::format_duration(up).to_string());
    let _ =
        writeln!(out, "prefetchd {} at {base}: {}{paused}{doing}, {is_ready}, up {up}", at("/version"), at("/state"));
    if let Some(verdict) = status["verdict"]["text"].as_str() {
        let _ = writeln!(out, "\n{}", printable(verdict));
        for remedy in status["verdict"]["remedy"].as_str().unwrap_or_default().lines() {
            let _ = writeln!(out, "{}", printable(remedy));
        }
        let _ = writeln!(out);
    }
    for reason in ready["reasons"].as_array().into_iter().flatten() {
        let _ = writeln!(out, "  {}", text(Some(reason)));
    }
    let waiting = at("/waiting_for");
    if waiting != "-" && !ready["reasons"].to_string().contains(&waiting) {
        let _ = writeln!(out, "  waiting for {waiting}");
    }
    let _ = writeln!(
        out,
        "\nsource     {} (system {}, timeline {}), slot {}, publication {}",
        at("/source/database"),
        at("/source/system_id"),
        at("/source/timeline"),
        at("/source/slot"),
        at("/source/publication")
    );
    let _ = writeln!(
        out,
        "lsn        applied {}, confirmed {}, received {}, server {}",
        at("/lsn/applied"),
        at("/lsn/confirmed"),
        at("/lsn/received"),
        at("/lsn/server")
    );
    let _ = writeln!(out, "lag        {} bytes, {} s", at("/lag/bytes"), rounded(status.pointer("/lag/seconds")));
    let size =
        |path: &str| status.pointer(path).and_then(Value::as_u64).map(|bytes| bytesize::ByteSize(bytes).display().si());
    let kept = size("/slot/retained_bytes").map_or("-".to_owned(), |bytes| bytes.to_string());
    let limit = size("/slot/limit_bytes").map_or("without limit".to_owned(), |bytes| format!("of {bytes}"));
    let _ = writeln!(out, "slot       keeps {kept} of WAL, {limit}");
    let _ = writeln!(
        out,
        "sync       {} changes; commit to Redis: {} ms on average, {} ms p50, {} ms p99 of {}",
        at("/sync_events_applied"),
        rounded(status.pointer("/sync_lag_ms/avg")),
        rounded(status.pointer("/sync_lag_ms/p50")),
        rounded(status.pointer("/sync_lag_ms/p99")),
        at("/sync_lag_ms/count")
    );
    let _ = writeln!(
        out,
        "reads      {} hits, {} misses, hit rate {} %",
        at("/hits"),
        at("/misses"),
        rounded(status.pointer("/hit_rate_pct"))
    );
    let _ = writeln!(out, "postgres   {} tables read, {} dead letters", at("/primary_reads"), at("/dead_letters"));
    if status["last_load"].is_object() {
        let _ = writeln!(
            out,
            "last load  {} rows in {} ms at {}: {}",
            at("/last_load/rows"),
            at("/last_load/elapsed_ms"),
            at("/last_load/lsn"),
            at("/last_load/reason")
        );
    }
    let _ = match &status["last_verify"] {
        Value::Null => writeln!(out, "verified   never"),
        // Of an earlier life only the time is known.
        last if last["rows"].is_null() => writeln!(out, "verified   {}", at("/last_verify/at")),
        _ => writeln!(
            out,
            "verified   {}: {} rows, {} missing, {} stale, {} orphaned, {} repaired",
            at("/last_verify/at"),
            at("/last_verify/rows"),
            at("/last_verify/missing"),
            at("/last_verify/stale"),
            at("/last_verify/orphaned"),
            at("/last_verify/repaired")
        ),
    };
    let head = ["NAME", "TABLE", "STATE", "ROWS", "PREFETCHED", "UPSERTS", "DELETES", "TRUNCATES", "HITS", "MISSES"];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    for table in status["tables"].as_array().into_iter().flatten() {
        let state = match (&table["state"], &table["loaded"]) {
            (Value::String(state), _) if table["loading"].is_object() => {
                let rows = |name: &str| text(table["loading"].get(name));
                format!("{} {} of {}", printable(state), rows("rows"), rows("estimated"))
            }
            (Value::String(state), _) => printable(state),
            (_, Value::Bool(true)) => "loaded".to_owned(),
            _ => "-".to_owned(),
        };
        let cell = |name: &str| text(table.get(name));
        rows.push(vec![
            cell("name"),
            cell("table"),
            state,
            cell("rows"),
            cell("prefetched"),
            cell("upserts"),
            cell("deletes"),
            cell("truncates"),
            cell("hits"),
            cell("misses"),
        ]);
    }
    let _ = write!(out, "\n{}", aligned(&rows));
    out + &dead_letters(status)
}

/// Rows that Postgres has and Redis cannot hold, as far as they are listed.
fn dead_letters(status: &Value) -> String {
    let listed: Vec<&Value> = status["dead_letter_keys"].as_array().into_iter().flatten().collect();
    let tables = || status["tables"].as_array().into_iter().flatten();
    let mut out = String::new();
    if !listed.is_empty() {
        let mut rows = vec![["DEAD LETTER", "TABLE", "REASON", "LSN"].map(str::to_owned).to_vec()];
        rows.extend(
            listed.iter().map(|dead| ["key", "table", "reason", "lsn"].map(|name| text(dead.get(name))).to_vec()),
        );
        let _ = write!(out, "\n{}", aligned(&rows));
        let known: u64 = tables().filter_map(|table| table["dead_letters"].as_u64()).sum();
        let more = known.saturating_sub(listed.len() as u64);
        if more > 0 {
            let _ = writeln!(out, "and {more} more");
        }
        if let Value::String(slot) = &status["source"]["slot"] {
            let _ = writeln!(out, "details: redis-cli XRANGE 'prefetchd:{{{}}}:dead' - +", printable(slot));
        }
    }
    for table in tables().filter(|table| table["more_dead_letters"] == Value::Bool(true)) {
        let _ = writeln!(
            out,
            "{} has more dead letters than are kept track of: missing rows are 503",
            text(table.get("name"))
        );
    }
    out
}

fn text(value: Option<&Value>) -> String {
    match value {
        None | Some(Value::Null) => "-".to_owned(),
        Some(Value::String(text)) => printable(text),
        Some(other) => other.to_string(),
    }
}

fn rounded(value: Option<&Value>) -> String {
    value.and_then(Value::as_f64).map_or("-".to_owned(), |number| format!("{number:.1}"))
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
            "lag": {"bytes": 0, "seconds": 0.0}, "hits": 10,
            "operation": "verify", "slot": {"retained_bytes": 1_500_000, "limit_bytes": 2_000_000_000},
            "last_verify": {"at": "2026-01-31T12:34:56.789Z", "rows": 5, "missing": 1},
            "tables": [{"name": "categories", "table": "public.categories", "loaded": true, "prefetched": 5},
                       {"name": "b", "state": "loading", "loading": {"rows": 3, "estimated": 9}}],
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
            "shop (system 7",
            "categories  public.categories  loaded",
        ] {
            assert!(report.contains(part), "{part}: {report}");
        }
        super::report("http://h", &Value::Null, &Value::Null, false);
    }
}
