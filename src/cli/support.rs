//! `prefetchd support`: writes an archive to attach to a report of a problem.
//!
//! It contains no secrets, no values of rows and no keys of rows: whoever gets it may not be allowed to see the data. What
//! cannot be had is named in the archive instead, because a report is needed most when a server is away.

use super::client::Client;
use super::{Failure, check, print, printable, runtime};
use crate::bridge::context::application_name;
use crate::code::Code;
use crate::config::Config;
use crate::row_keys::{RowKeys, value_hidden};
use crate::sink::survey as redis_survey;
use crate::source::{connect, survey as postgres_survey};
use clap::Args;
use flate2::Compression;
use flate2::write::GzEncoder;
use jiff::Timestamp;
use serde_json::{Value, json};
use std::fmt::{Display, Write as _};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::time::timeout;

/// How long a server may take to answer everything, and `check` to end.
const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Debug, Args)]
pub(super) struct SupportArgs {
    /// The archive to write [default: prefetchd-support-YYYYmmdd-HHMMSS.tar.gz in the current directory]
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Address of the daemon [default: from http.listen]
    #[arg(long, value_name = "URL")]
    url: Option<String>,
}

pub(super) fn run(file: Option<&Path>, args: &SupportArgs) -> Result<(), Failure> {
    let now = Timestamp::now();
    let name = format!("prefetchd-support-{}", now.strftime("%Y%m%d-%H%M%S"));
    let out = args.out.clone().unwrap_or_else(|| PathBuf::from(format!("{name}.tar.gz")));
    let archive = Archive::create(&out)?;

    let mut report = Report::default();
    let _ = writeln!(report.versions, "prefetchd {} (this program)", env!("CARGO_PKG_VERSION"));
    let config = report.config(file);
    report.daemon(config.as_ref(), file, args.url.as_deref());
    if let Some(config) = &config {
        runtime()?.block_on(report.servers(config));
    }
    archive.write(&name, report.files(now), now)?;
    print(&report.told(&out))
}

/// What goes into the archive.
#[derive(Default)]
struct Report {
    versions: String,
    /// Name and contents.
    files: Vec<(&'static str, String)>,
    /// What could not be had, and why.
    left_out: Vec<String>,
}

impl Report {
    fn add(&mut self, name: &'static str, contents: Result<String, impl Display>) {
        match contents {
            Ok(text) => self.files.push((name, text)),
            Err(why) => self.left_out.push(format!("{name}: {why}")),
        }
    }

    fn config(&mut self, file: Option<&Path>) -> Option<Config> {
        let loaded = Config::load(file).map_err(|error| error.to_string());
        self.add("config.toml", loaded.as_ref().map(|config| config.to_toml()).map_err(Clone::clone));
        if loaded.is_err() {
            self.left_out.push("check.txt, postgres.txt, redis.txt: there is no valid configuration".to_owned());
        }
        loaded.ok()
    }

    /// What the daemon tells, without a lock on anything that it needs for its work.
    fn daemon(&mut self, config: Option<&Config>, file: Option<&Path>, url: Option<&str>) {
        const ALL: &str = "status.json, readyz.json, history.json, metrics.txt, log.txt";
        let client = match Client::new(file, url) {
            Ok(client) => client,
            Err(failure) => {
                return self
                    .left_out
                    .push(format!("{ALL}: {}", failure.said.map(|said| said.message).unwrap_or_default()));
            }
        };
        let status = match client.json("/v1/status", &[200]) {
            Ok((status, _)) => status,
            Err(why) => return self.left_out.push(format!("{ALL}: {why}")),
        };
        let version = status["version"].as_str().unwrap_or("of unknown version");
        let _ = writeln!(self.versions, "prefetchd {version} (the daemon at {})", client.base);
        self.add("log.txt", client.post_quickly("/v1/admin/log", &json!({})).map(|log| log_text(&log)));
        let metrics = client.get("/metrics").and_then(|mut answer| client.text("/metrics", &mut answer));
        self.add("metrics.txt", metrics);

        // Their messages may name keys, whose prefixes only the daemon's own configuration tells.
        let keys = match (config, status["source"]["slot"].as_str()) {
            (Some(config), Some(slot)) if slot != config.postgres.slot.as_str() => {
                Err(format!("the daemon at {} has slot {slot}, not that of the configuration", client.base))
            }
            (Some(config), _) => Ok(RowKeys::of(&config.tables)),
            (None, _) => Err("without a configuration it is not known what keys of rows begin with".to_owned()),
        };
        let keys = match keys {
            Ok(keys) => keys,
            Err(why) => return self.left_out.push(format!("status.json, readyz.json, history.json: {why}")),
        };
        let hidden = |mut json: Value| {
            keys.hide_in(&mut json);
            format!("{json:#}\n")
        };
        self.add("readyz.json", client.json("/readyz", &[200, 503]).map(|(ready, _)| hidden(ready)));
        self.add("history.json", client.json("/v1/history", &[200]).map(|(history, _)| hidden(history)));
        self.add("status.json", Ok::<_, String>(hidden(status)));
    }

    async fn servers(&mut self, config: &Config) {
        let silent = || format!("no answer within {} s", PATIENCE.as_secs());
        let checked = timeout(PATIENCE, check::everything(config)).await;
        let hide = |text: String| text.lines().map(|line| value_hidden(line) + "\n").collect();
        self.add("check.txt", checked.map(hide).map_err(|_| silent()));
        let (postgres, redis) = (timeout(PATIENCE, postgres(config)).await, timeout(PATIENCE, redis(config)).await);
        if let Ok(Ok((version, _))) = &postgres {
            let _ = writeln!(self.versions, "{version}");
        }
        let postgres = postgres.unwrap_or_else(|_| Err(silent())).map(|(_, text)| text);
        self.add("postgres.txt", postgres.map_err(|why| value_hidden(&why)));
        let redis = redis.unwrap_or_else(|_| Err(silent()));
        for line in redis.iter().flat_map(|text| text.lines()) {
            if ["redis_version:", "valkey_version:"].iter().any(|name| line.starts_with(name)) {
                let _ = writeln!(self.versions, "{line}");
            }
        }
        self.add("redis.txt", redis);
    }

    /// All files. The first says what there is.
    fn files(&self, now: Timestamp) -> Vec<(&'static str, String)> {
        let mut readme =
            format!("What `prefetchd support` found at {now:.0}. No values and no keys of rows, no secrets.\n");
        self.files.iter().for_each(|(name, _)| _ = writeln!(readme, "  {name}"));
        if !self.left_out.is_empty() {
            readme.push_str("\nNot to be had:\n");
            self.left_out.iter().for_each(|what| _ = writeln!(readme, "  {}", printable(what)));
        }
        let own = [("README.txt", readme), ("versions.txt", self.versions.clone())];
        own.into_iter().chain(self.files.iter().cloned()).collect()
    }

    fn told(&self, out: &Path) -> String {
        let mut text = format!("{}: look through it before you pass it on\n", printable(&out.display().to_string()));
        self.left_out.iter().for_each(|what| _ = writeln!(text, "left out: {}", printable(what)));
        text
    }
}

fn log_text(log: &Value) -> String {
    let mut text = match log["forgotten"].as_u64() {
        Some(0) | None => String::new(),
        Some(forgotten) => format!("({forgotten} earlier lines are not kept)\n"),
    };
    let lines = log["lines"].as_array().into_iter().flatten().filter_map(Value::as_str);
    lines.for_each(|line| _ = writeln!(text, "{line}"));
    text
}

/// Returns the version, and everything.
async fn postgres(config: &Config) -> Result<(String, String), String> {
    let settings = &config.postgres;
    let asked = async {
        let client = connect::connect(&settings.target, &application_name(&settings.slot)).await?;
        postgres_survey::report(&client, &settings.slot, &settings.publication).await
    };
    let found = asked.await.map_err(|error| error.to_string())?;
    let mut text = format!("{}\n\n{}\n", found.version, found.settings.join("\n"));
    let slot = found.slot.as_deref().unwrap_or("does not exist");
    let _ = write!(text, "\nslot {}: {slot}\npublication {}:\n", settings.slot, settings.publication);
    found.published_tables.iter().for_each(|table| _ = writeln!(text, "  {table}"));
    Ok((found.version, text))
}

async fn redis(config: &Config) -> Result<String, String> {
    let servers = redis_survey::report(&config.redis.target).await.map_err(|error| error.to_string())?;
    let mut text = String::new();
    for (at, report) in servers {
        let report = report.unwrap_or_else(|error| format!("{error}\n"));
        let _ = writeln!(text, "{at}\n{}", report.replace('\r', ""));
    }
    Ok(text)
}

/// A file that appears under its name only when it is complete, and replaces none.
struct Archive {
    file: tempfile::NamedTempFile,
    out: PathBuf,
}

impl Archive {
    /// Only its owner may read it, as tempfile makes it.
    fn create(out: &Path) -> Result<Self, Failure> {
        let failed = |error: io::Error| Self::failed(out, &error);
        if out.symlink_metadata().is_ok() {
            return Err(failed(io::ErrorKind::AlreadyExists.into()));
        }
        let directory = out.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let file = tempfile::Builder::new().prefix(".prefetchd-support-").tempfile_in(directory).map_err(failed)?;
        Ok(Self { file, out: out.to_owned() })
    }

    fn failed(out: &Path, error: &io::Error) -> Failure {
        let why = match error.kind() {
            io::ErrorKind::AlreadyExists => "it exists, and nothing is overwritten: choose another --out".to_owned(),
            _ => format!("{error}: choose a directory that you may write to, with --out"),
        };
        let code = match error.kind() {
            io::ErrorKind::AlreadyExists => Code::FileExists,
            _ => Code::CannotWrite,
        };
        Failure::work(code, format!("cannot write {}: {why}", out.display()))
    }

    fn write(self, name: &str, files: Vec<(&'static str, String)>, now: Timestamp) -> Result<(), Failure> {
        let Self { mut file, out } = self;
        let mut write = || {
            let mut tar = tar::Builder::new(GzEncoder::new(file.as_file_mut(), Compression::default()));
            for (file, contents) in &files {
                let mut header = tar::Header::new_gnu();
                header.set_mode(0o600);
                header.set_size(contents.len() as u64);
                header.set_mtime(u64::try_from(now.as_second()).unwrap_or_default());
                tar.append_data(&mut header, format!("{name}/{file}"), contents.as_bytes())?;
            }
            tar.into_inner()?.finish()?.flush()
        };
        write().map_err(|error| Self::failed(&out, &error))?;
        file.persist_noclobber(&out).map_err(|error| Self::failed(&out, &error.error))?;
        Ok(())
    }
}
