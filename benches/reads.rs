//! Reads over HTTP, beside webdis, which passes HGETALL on to Redis and promises nothing. wrk asks both for random rows.

use crate::processes::cpu_seconds;
use crate::world::{Outcome, Way, World};
use prefetchd::cli::servers;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

const CONNECTIONS: [u32; 3] = [1, 50, 500];

/// What wrk measured.
#[derive(Clone)]
struct Run {
    a_second: f64,
    p50: String,
    p99: String,
    /// Of the server, for one read.
    cpu_micros: f64,
}

pub fn reads(world: &World, rows: u64, rounds: usize, seconds: u64) -> Outcome<()> {
    println!("\n### Reads over HTTP\n");
    if servers::on_path(&["wrk"]).is_none() || servers::on_path(&["webdis"]).is_none() {
        println!("Skipped: wrk and webdis are not installed.");
        return Ok(());
    }
    let daemon = world.daemon(Way::Tcp)?;
    world.wait_for_load()?;
    world.wait_until_idle()?;
    let webdis = Webdis::start(world)?;
    println!(
        "| connections | prefetchd, reads/s | p50, p99 | µs of CPU a read | webdis HGETALL, reads/s | p50, p99 | µs of CPU | ratio |\n\
         |---|---|---|---|---|---|---|---|"
    );
    for connections in CONNECTIONS {
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            ours.push(wrk(world, daemon.http, "/v1/tables/items/", daemon.pid, (connections, rows, seconds))?);
            theirs.push(wrk(world, webdis.http, "/HGETALL/bench:item:", webdis.pid(), (connections, rows, seconds))?);
        }
        let (a, b) = (middle(ours), middle(theirs));
        let shown =
            |run: &Run| format!("{:.1} k | {}, {} | {:.0}", run.a_second / 1000.0, run.p50, run.p99, run.cpu_micros);
        println!("| {connections} | {} | {} | {:.2} |", shown(&a), shown(&b), a.a_second / b.a_second);
    }
    daemon.stop()
}

fn middle(mut runs: Vec<Run>) -> Run {
    runs.sort_by(|a, b| a.a_second.total_cmp(&b.a_second));
    runs[runs.len() / 2].clone()
}

fn wrk(
    world: &World,
    server: SocketAddr,
    path: &str,
    pid: u32,
    (connections, rows, seconds): (u32, u64, u64),
) -> Outcome<Run> {
    let script = world.file("wrk.lua");
    std::fs::write(
        &script,
        format!("request = function() return wrk.format(\"GET\", \"{path}\" .. math.random(1, {rows})) end\n"),
    )?;
    let before = cpu_seconds(pid).ok_or("the server has ended")?;
    let output = Command::new("wrk")
        .args(["-t1", "--latency", &format!("-c{connections}"), &format!("-d{seconds}s"), "-s"])
        .arg(&script)
        .arg(format!("http://{server}/"))
        .output()?;
    let used = cpu_seconds(pid).ok_or("the server has ended")? - before;
    let text = String::from_utf8(output.stdout)?;
    if let Some(line) = text.lines().find(|line| line.contains("Non-2xx")) {
        return Err(format!("{server}: {line}").into());
    }
    let field = |line: &str, at: usize| {
        let line = text.lines().find(|text| text.trim_start().starts_with(line) || text.contains(line));
        let word = line.and_then(|line| line.split_whitespace().nth(at));
        word.map(str::to_owned).ok_or_else(|| format!("wrk does not tell {line:?}:\n{text}"))
    };
    let reads: f64 = field("requests in", 0)?.parse()?;
    Ok(Run {
        a_second: field("Requests/sec:", 1)?.parse()?,
        p50: field("50%", 1)?,
        p99: field("99%", 1)?,
        cpu_micros: used * 1e6 / reads,
    })
}

struct Webdis {
    child: Child,
    http: SocketAddr,
}

impl Webdis {
    fn start(world: &World) -> Outcome<Self> {
        let http = SocketAddr::from((Ipv4Addr::LOCALHOST, servers::free_port()?));
        let config = serde_json::json!({
            "redis_host": "127.0.0.1", "redis_port": world.redis_port(), "redis_auth": servers::redis_password(),
            "http_host": "127.0.0.1", "http_port": http.port(), "threads": 2, "pool_size": 10, "daemonize": false,
            "websockets": false, "database": 0, "verbosity": 0, "logfile": "/dev/null",
            "acl": [{"enabled": ["HGETALL"]}],
        });
        let file: PathBuf = world.file("webdis.json");
        std::fs::write(&file, config.to_string())?;
        let child = Command::new("webdis").arg(&file).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        let webdis = Self { child, http };
        world.wait_for("webdis", || Ok(TcpStream::connect(http).is_ok()))?;
        Ok(webdis)
    }

    fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Webdis {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
