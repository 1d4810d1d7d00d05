//! How Prometheus sees `/metrics`: its linter has no complaints, and a real one scrapes it and evaluates the rules.
//! Skipped, with a message, if Prometheus is not installed.

use crate::harness::{Daemon, Postgres, Redis, eventually, request, skipped};
use prefetchd::cli::servers::on_path;
use serde_json::Value;
use std::io::Write;
use std::net::{SocketAddr, TcpListener};
use std::process::{Child, Command, Stdio};

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test]
async fn the_linter_has_nothing_to_say() {
    let Some(promtool) = on_path(&["promtool"]) else { return skipped("promtool is not installed") };
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let daemon = Daemon::start(&postgres, &redis).await;
    daemon.ready().await;
    let metrics = daemon.get("/metrics").await.body;
    let mut check = Command::new(promtool);
    check.args(["check", "metrics"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut check = check.spawn().unwrap();
    check.stdin.take().unwrap().write_all(metrics.as_bytes()).unwrap();
    let output = check.wait_with_output().unwrap();
    let said = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
    assert!(output.status.success() && said.trim().is_empty(), "{said}");
}

#[tokio::test]
async fn a_real_prometheus_scrapes_it_and_evaluates_the_alerts() {
    let Some(prometheus) = on_path(&["prometheus"]) else { return skipped("prometheus is not installed") };
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let daemon = Daemon::start(&postgres, &redis).await;
    daemon.ready().await;
    let own = concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/");
    let config = std::fs::read_to_string(format!("{own}prometheus.yml")).unwrap();
    let config = config.replace("prefetchd:8787", &daemon.address().to_string());
    let config = config.replace("rules.yml", &format!("{own}rules.yml")).replace("_interval: 5s", "_interval: 1s");
    let config = config.replace("_interval: 15s", "_interval: 1s");
    let dir = tempfile::tempdir_in(redis.dir()).unwrap();
    std::fs::write(dir.path().join("prometheus.yml"), config).unwrap();
    let address: SocketAddr = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let mut server = Command::new(prometheus);
    server.arg(format!("--config.file={}", dir.path().join("prometheus.yml").display()));
    server.arg(format!("--storage.tsdb.path={}", dir.path().join("data").display()));
    server.arg(format!("--web.listen-address={address}"));
    let _server = Killed(server.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap());

    let get = async |path: &str| {
        let answer = request(address, "GET", path).await.ok().filter(|answer| answer.status == 200)?;
        serde_json::from_str::<Value>(answer.body.lines().find(|line| line.starts_with('{'))?).ok()
    };
    let value = async |query: &str| {
        let found = get(&format!("/api/v1/query?query={query}")).await?;
        found["data"]["result"][0]["value"][1].as_str().map(str::to_owned)
    };
    eventually("it is ready", async || value("prefetchd_ready").await, |seen| seen.as_deref() == Some("1")).await;
    assert_eq!(value("prefetchd_rows_loaded_total").await.as_deref(), Some("5"));
    let rules = async || {
        let rules = get("/api/v1/rules").await?;
        let rules = rules["data"]["groups"][0]["rules"].as_array()?.clone();
        rules.iter().all(|rule| rule["health"] == "ok").then_some(rules.len())
    };
    assert!(eventually("the rules are evaluated", rules, Option::is_some).await.unwrap() >= 8);
}
