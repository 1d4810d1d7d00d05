//! What processes use: CPU seconds and peak memory, from /proc.

use std::collections::BTreeMap;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

/// A backend that lives shorter than this is not noticed.
const EVERY: Duration = Duration::from_millis(20);
/// Linux's USER_HZ, the same on every system.
const TICKS_A_SECOND: f64 = 100.0;

/// The processes of the servers.
#[derive(Debug, Clone, Copy)]
pub struct Pids {
    pub postmaster: u32,
    pub redis: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Who {
    Daemon,
    Walsender,
    Backends,
    Redis,
}

impl Who {
    fn name(self) -> &'static str {
        match self {
            Who::Daemon => "prefetchd",
            Who::Walsender => "walsender",
            Who::Backends => "other backends",
            Who::Redis => "redis-server",
        }
    }
}

#[derive(Debug, Default, Clone, Copy)]
struct Used {
    cpu_seconds: f64,
    peak_bytes: u64,
}

/// The usage of one run.
#[derive(Debug, Default)]
pub struct Usage(BTreeMap<Who, Used>);

/// Observes from a thread of its own.
pub struct Watch {
    daemon: Arc<Mutex<Option<u32>>>,
    stop: mpsc::Sender<()>,
    looking: JoinHandle<Usage>,
}

impl Watch {
    pub fn begin(pids: Pids) -> Self {
        let daemon = Arc::new(Mutex::new(None));
        let (stop, stopped) = mpsc::channel();
        let its = daemon.clone();
        let looking = std::thread::spawn(move || {
            let mut first: BTreeMap<u32, f64> = BTreeMap::new();
            let mut seen: BTreeMap<u32, (Who, Used)> = BTreeMap::new();
            // Redis was running before; the daemon and the backends that serve it start at zero.
            first.insert(pids.redis, cpu_seconds(pids.redis).unwrap_or_default());
            for old in backends(pids.postmaster) {
                first.insert(old, cpu_seconds(old).unwrap_or_default());
            }
            loop {
                let over = matches!(stopped.recv_timeout(EVERY), Ok(()) | Err(RecvTimeoutError::Disconnected));
                let daemon: Option<u32> = *its.lock().unwrap_or_else(PoisonError::into_inner);
                let others = backends(pids.postmaster).into_iter().map(|pid| (pid, role(pid)));
                let ours = [(pids.redis, Who::Redis)].into_iter().chain(daemon.map(|pid| (pid, Who::Daemon)));
                for (pid, who) in ours.chain(others) {
                    let Some(cpu) = cpu_seconds(pid) else { continue };
                    let before = first.get(&pid).copied().unwrap_or_default();
                    // Postgres's shared buffers are attributed to no process.
                    let memory = match who {
                        Who::Walsender | Who::Backends => status_bytes(pid, "RssAnon:"),
                        Who::Daemon | Who::Redis => peak_memory_bytes(pid),
                    };
                    let (its, used) = seen.entry(pid).or_insert((who, Used::default()));
                    // A walsender is an ordinary backend at first.
                    *its = who;
                    used.cpu_seconds = cpu - before;
                    used.peak_bytes = used.peak_bytes.max(memory);
                }
                if over {
                    break;
                }
            }
            let mut usage = Usage::default();
            for (who, used) in seen.into_values() {
                let sum = usage.0.entry(who).or_default();
                sum.cpu_seconds += used.cpu_seconds;
                sum.peak_bytes = sum.peak_bytes.max(used.peak_bytes);
            }
            usage
        });
        Self { daemon, stop, looking }
    }

    /// To be called as soon as it runs.
    pub fn daemon_is(&self, pid: u32) {
        *self.daemon.lock().unwrap_or_else(PoisonError::into_inner) = Some(pid);
    }

    /// Returns what was used since the beginning. To be called while the daemon is still running.
    pub fn end(self) -> Usage {
        drop(self.stop);
        self.looking.join().unwrap_or_default()
    }
}

impl Usage {
    /// For several runs: the mean of the CPU seconds, the maximum of the memory.
    pub fn table(what: &str, runs: &[Usage]) -> String {
        let mut text = format!("| {what}, each process | CPU seconds a run | peak memory |\n|---|---|---|");
        for who in [Who::Daemon, Who::Walsender, Who::Backends, Who::Redis] {
            let of: Vec<Used> = runs.iter().filter_map(|run| run.0.get(&who).copied()).collect();
            let cpu: f64 = of.iter().map(|used| used.cpu_seconds).sum::<f64>() / runs.len().max(1) as f64;
            let peak = of.iter().map(|used| used.peak_bytes).max().unwrap_or_default();
            text += &format!("\n| {} | {cpu:.2} | {:.1} MB |", who.name(), peak as f64 / 1e6);
        }
        text
    }
}

fn backends(postmaster: u32) -> Vec<u32> {
    let children = std::fs::read_to_string(format!("/proc/{postmaster}/task/{postmaster}/children"));
    children.unwrap_or_default().split_whitespace().filter_map(|pid| pid.parse().ok()).collect()
}

fn role(pid: u32) -> Who {
    let title = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    if String::from_utf8_lossy(&title).contains("walsender") { Who::Walsender } else { Who::Backends }
}

/// Used since its start. `None` if there is no such process.
pub fn cpu_seconds(pid: u32) -> Option<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, which may contain anything, ends with the last parenthesis; utime and stime are fields 14 and 15.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let ticks = fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?;
    Some(ticks as f64 / TICKS_A_SECOND)
}

/// The most that it has had.
pub fn peak_memory_bytes(pid: u32) -> u64 {
    status_bytes(pid, "VmHWM:")
}

fn status_bytes(pid: u32, name: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    line.and_then(|l| l.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or_default() * 1024
}
