//! The admin operations of a running daemon, as commands.

use super::client::Client;
use super::{Failure, print, printable};
use crate::code::Code;
use crate::words::counted;
use clap::Args;
use serde_json::{Value, json};
use std::path::Path;

#[derive(Debug, Args)]
pub(super) struct Daemon {
    /// Address of the daemon [default: from http.listen]
    #[arg(long, value_name = "URL")]
    url: Option<String>,
}

#[derive(Debug, Args)]
pub(super) struct RefetchArgs {
    /// Only this table, by its name in the configuration
    #[arg(long, value_name = "NAME")]
    table: Option<String>,
    #[command(flatten)]
    daemon: Daemon,
}

#[derive(Debug, Args)]
pub(super) struct VerifyArgs {
    /// Repair the differences
    #[arg(long)]
    repair: bool,
    #[command(flatten)]
    what: RefetchArgs,
}

#[derive(Debug, Args)]
pub(super) struct InvalidateArgs {
    /// Name of the table in the configuration
    table: String,
    /// Keys as in Redis, without the table's prefix
    #[arg(required = true, value_name = "KEY")]
    keys: Vec<String>,
    #[command(flatten)]
    daemon: Daemon,
}

#[derive(Debug, Args)]
pub(super) struct ClearArgs {
    /// Name of the table in the configuration
    table: String,
    #[command(flatten)]
    daemon: Daemon,
}

#[derive(Debug, Args)]
pub(super) struct SkipArgs {
    /// LSN of the transaction that cannot be decoded, as the daemon reports it
    lsn: String,
    #[command(flatten)]
    daemon: Daemon,
}

pub(super) fn pause(file: Option<&Path>, daemon: &Daemon) -> Result<(), Failure> {
    ask(file, daemon, "pause", &json!({}))?;
    print("paused: nothing is applied, changes wait in postgres\n")
}

pub(super) fn resume(file: Option<&Path>, daemon: &Daemon) -> Result<(), Failure> {
    ask(file, daemon, "resume", &json!({}))?;
    print("resumed\n")
}

pub(super) fn reload(file: Option<&Path>, daemon: &Daemon) -> Result<(), Failure> {
    let done = ask(file, daemon, "reload", &json!({}))?;
    let mut lines = String::new();
    for (name, what) in [
        ("added", "added"),
        ("removed", "removed"),
        ("changed", "changed"),
        ("restart_required", "takes effect only with a restart"),
    ] {
        for of in done[name].as_array().into_iter().flatten() {
            lines += &format!("{what}: {}\n", printable(of.as_str().unwrap_or_default()));
        }
    }
    print(if lines.is_empty() { "no table has changed\n" } else { &lines })
}

pub(super) fn refetch(file: Option<&Path>, args: &RefetchArgs) -> Result<(), Failure> {
    let done = ask(file, &args.daemon, "refetch", &of_table(args))?;
    let [loaded, repaired, removed, ms] =
        ["loaded", "repaired", "removed", "elapsed_ms"].map(|name| number(&done, name));
    let (loaded, removed) = (counted(loaded, "row"), counted(removed, "orphan"));
    print(&format!("{loaded} loaded in {ms} ms: {repaired} repaired, {removed} removed\n"))
}

pub(super) fn verify(file: Option<&Path>, args: &VerifyArgs) -> Result<(), Failure> {
    let mut body = of_table(&args.what);
    body["repair"] = args.repair.into();
    let done = ask(file, &args.what.daemon, "verify", &body)?;
    let found = ["missing", "stale", "orphaned", "lookups"].map(|name| number(&done, name));
    let [rows, keys, repaired] = ["rows", "keys", "repaired"].map(|name| number(&done, name));
    let [missing, stale, orphaned, members] = found;
    let members = if members > 0 { format!(", {} of lookups", counted(members, "member")) } else { String::new() };
    let lsn = done["lsn"].as_str().unwrap_or("-");
    let mended = if args.repair { format!(", {repaired} repaired") } else { String::new() };
    print(&format!(
        "{}, {} at {}: {missing} missing, {stale} stale, {orphaned} orphaned{members}{mended}\n",
        counted(rows, "row"),
        counted(keys, "key"),
        printable(lsn)
    ))?;
    let left = found.iter().sum::<u64>() - repaired;
    match left {
        0 => Ok(()),
        1 => Err(Failure::work(Code::Drift, "1 key differs: repair it with --repair")),
        left => Err(Failure::work(Code::Drift, format!("{left} keys differ: repair them with --repair"))),
    }
}

pub(super) fn invalidate(file: Option<&Path>, args: &InvalidateArgs) -> Result<(), Failure> {
    deleted(&ask(file, &args.daemon, "invalidate", &json!({"table": args.table, "keys": args.keys}))?, &args.table)
}

pub(super) fn clear(file: Option<&Path>, args: &ClearArgs) -> Result<(), Failure> {
    deleted(&ask(file, &args.daemon, "clear", &json!({"table": args.table, "confirm": args.table}))?, &args.table)
}

pub(super) fn skip(file: Option<&Path>, args: &SkipArgs) -> Result<(), Failure> {
    ask(file, &args.daemon, "skip", &json!({"lsn": args.lsn}))?;
    print("skipped: a new slot is created, and every table is loaded again\n")
}

fn deleted(done: &Value, table: &str) -> Result<(), Failure> {
    let n = number(done, "deleted");
    let then = if n > 0 {
        let it = if n == 1 { "it" } else { "them" };
        format!("; prefetchd refetch --table {} brings {it} back", printable(table))
    } else {
        String::new()
    };
    print(&format!("{} removed from the cache{then}\n", counted(n, "key")))
}

fn of_table(args: &RefetchArgs) -> Value {
    args.table.as_ref().map_or(json!({}), |table| json!({"table": table}))
}

fn number(answer: &Value, name: &str) -> u64 {
    answer[name].as_u64().unwrap_or(0)
}

fn ask(file: Option<&Path>, daemon: &Daemon, operation: &str, body: &Value) -> Result<Value, Failure> {
    let client = Client::new(file, daemon.url.as_deref())?;
    Ok(client.post(&format!("/v1/admin/{operation}"), body)?)
}
