//! What can become of Redis and of the network, whatever the daemon is at: nothing is lost, nothing wrong is served, and
//! it recovers without help.
//!
//! A test a fault, which strikes in every [`Phase`]. `--nocapture` shows how long recovery took.

use crate::harness::proxy::{Cut, Proxy, Way};
use crate::harness::scene::Scene;
use crate::harness::watcher::{HttpWatcher, Watcher};
use crate::harness::{Daemon, Postgres, Redis, eventually};
use nix::sys::signal::Signal;
use prefetchd::lsn::Lsn;
use serde_json::Value;
use std::fmt::Debug;
use std::time::{Duration, Instant};
use tokio::task::{JoinHandle, block_in_place};

const ROWS: u64 = 3_000;
/// So fast, in bytes a second, that a load lasts for seconds.
const SLOW: usize = 300_000;
/// So fast that the writers are faster.
const SLOWER: usize = 20_000;

/// The exit code of a stop that did not bring everything in hand to Redis.
const NOT_DRAINED: i32 = 0;

/// What the daemon is at when a fault strikes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Nobody writes.
    Idle,
    /// Eight sessions write.
    Stream,
    /// They write, and every table is being loaded.
    Load,
    /// They write, and the daemon was told to stop while it is behind.
    Drain,
}

const PHASES: [Phase; 4] = [Phase::Idle, Phase::Stream, Phase::Load, Phase::Drain];

/// A scene with a bad network between the daemon and Redis.
struct Stage {
    scene: Scene,
    proxy: Proxy,
    http: HttpWatcher,
    /// Servers that were left: the settings were made for the first.
    left: Vec<Redis>,
}

impl Stage {
    async fn new(redis: Redis) -> Self {
        let mut scene = Scene::quiet(Postgres::shared(), redis, ROWS).await;
        let proxy = Proxy::to_redis(&scene.redis).await;
        scene.settings = scene.settings.text("redis.url", &proxy.url());
        let http = HttpWatcher::start(scene.traffic, 1);
        Self { scene, proxy, http, left: Vec::new() }
    }

    async fn daemon(&self) -> Daemon {
        let daemon = self.scene.daemon().await;
        // Of a fault it must warn. An error is for what a person must mend.
        daemon.allow_warning(r#""level":"WARN""#);
        self.http.ask(vec![daemon.address()]).await;
        daemon
    }

    /// A daemon that is at this, or will be when it is told to stop.
    async fn at(&mut self, phase: Phase) -> Daemon {
        match phase {
            Phase::Idle => self.scene.rest().await,
            Phase::Stream | Phase::Drain => self.scene.write(),
            Phase::Load => {
                self.scene.write();
                self.scene.watcher.flush(&self.scene.redis).await;
                self.proxy.throttle(Some(SLOW));
            }
        }
        let daemon = self.daemon().await;
        if phase == Phase::Load {
            let some = |s: &Value| s["tables"][0]["prefetched"].as_u64() > Some(0) && s["tables"][0]["loaded"] == false;
            daemon.status_when("some rows are loaded", some).await;
            return daemon;
        }
        daemon.ready().await;
        daemon.applied(self.scene.postgres.position().await).await;
        daemon
    }

    /// Told to stop with a backlog, which does not get smaller until the proxy is healed.
    async fn begins_to_drain(&self, daemon: &Daemon) {
        self.proxy.throttle(Some(SLOWER));
        let lsn = self.scene.postgres.position().await;
        let behind = |s: &Value| position(s, "received") > Some(lsn) && position(s, "applied") < Some(lsn);
        daemon.status_when("behind", behind).await;
        daemon.signal(Signal::SIGTERM);
        daemon.logged("stopping").await;
    }

    /// Everything that is written by now, without help; then all of it, when nobody writes.
    async fn recovers(&mut self, daemon: &Daemon, what: impl Debug, phase: Phase, since: Instant) {
        daemon.applied(self.scene.postgres.position().await).await;
        daemon.ready().await;
        println!("{what:?}, {phase:?}: recovered {} ms after it ended", since.elapsed().as_millis());
        self.scene.is_whole(daemon).await;
        self.http.check().await;
    }

    async fn ends(self) {
        println!("over HTTP: {}", self.http.stop().await);
        self.scene.watcher.stop().await;
    }
}

fn position(status: &Value, which: &str) -> Option<Lsn> {
    status["lsn"][which].as_str().and_then(|lsn| lsn.parse().ok())
}

/// 503, at once and with this code at last: a row that is there is not served, and one that is not is not called missing.
async fn reads_are_refused(daemon: &Daemon, code: &str) {
    for target in ["/v1/tables/items/1", "/v1/tables/items/999999999"] {
        let refused = async || daemon.get(target).await.refusal();
        eventually(target, refused, |(status, seen)| {
            assert_eq!(*status, 503, "{target}: {seen}");
            seen == code
        })
        .await;
    }
}

// ------------------------------------------------------------------------------------------ Redis loses something

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Loss {
    Flush,
    Empty,
    OldDump,
    CutFile,
    LaggingReplica,
    Checkpoint,
}

impl Loss {
    /// As the metric names it, and as the last load does.
    fn reason(self) -> (&'static str, &'static str) {
        match self {
            Loss::Flush | Loss::Empty | Loss::Checkpoint => ("redis_lost", "redis has no checkpoint"),
            Loss::OldDump | Loss::CutFile | Loss::LaggingReplica => ("redis_went_back", "redis went back to"),
        }
    }
}

/// What Redis will come back with.
enum Old {
    Nothing,
    /// The file, and how much of it there was.
    File(std::path::PathBuf, u64),
    Replica(Redis),
}

impl Stage {
    /// Before the blow: an older state, and more that is confirmed since.
    async fn grows_old(&mut self, loss: Loss, phase: Phase) -> Old {
        let redis = &self.scene.redis;
        let old = match loss {
            Loss::Flush | Loss::Empty | Loss::Checkpoint => return Old::Nothing,
            Loss::OldDump => {
                redis.command::<()>(&["SAVE"]).await;
                Old::Nothing
            }
            Loss::CutFile => {
                let file = append_only_file(redis);
                let bytes = file.metadata().unwrap().len();
                Old::File(file, bytes)
            }
            Loss::LaggingReplica => {
                let replica = Redis::with(&["--replicaof", &format!("127.0.0.1 {}", redis.port())]);
                // Users are not replicated.
                replica.daemon_user().grant(self.scene.settings.redis_rules());
                let info = async || redis.command::<String>(&["INFO", "replication"]).await;
                eventually("the replica is connected", info, |info| info.contains("state=online")).await;
                replica.command::<()>(&["REPLICAOF", "NO", "ONE"]).await;
                Old::Replica(replica)
            }
        };
        let before = self.scene.postgres.position().await;
        if phase == Phase::Idle {
            self.scene.postgres.execute("UPDATE items SET body = 'newer' WHERE id = 1").await;
        }
        let confirmed = async || self.scene.confirmed().await;
        eventually("newer changes are confirmed", confirmed, |at| *at > before).await;
        old
    }

    async fn loses(&mut self, loss: Loss, old: Old) {
        let _eyes = match loss {
            Loss::Flush => return self.scene.watcher.flush(&self.scene.redis).await,
            Loss::Checkpoint => {
                return self.scene.redis.command(&["DEL", &self.scene.checkpoint_key()]).await;
            }
            Loss::Empty | Loss::OldDump | Loss::CutFile | Loss::LaggingReplica => self.scene.watcher.blind().await,
        };
        if loss == Loss::Empty {
            let _ = std::fs::remove_file(self.scene.redis.dir().join("dump.rdb"));
        }
        self.scene.redis.kill();
        match old {
            Old::Nothing => self.scene.redis.start_again(),
            Old::File(file, bytes) => {
                // In the middle of a command.
                std::fs::File::options().write(true).open(file).unwrap().set_len(bytes + 9).unwrap();
                self.scene.redis.start_again();
            }
            Old::Replica(replica) => {
                self.proxy.lead_to(replica.port());
                let slot = self.scene.postgres.slot();
                self.scene.watcher = Watcher::start(&replica, &slot, self.scene.traffic, 2).await;
                self.left.push(std::mem::replace(&mut self.scene.redis, replica));
            }
        }
    }
}

/// The part that is being written to.
fn append_only_file(redis: &Redis) -> std::path::PathBuf {
    let parts = std::fs::read_dir(redis.dir().join("appendonlydir"));
    let parts = parts.into_iter().flatten().map(|part| part.unwrap().path());
    // Before Redis 7 it is one file.
    let newest = parts.filter(|part| part.to_string_lossy().contains(".incr.")).max();
    newest.unwrap_or_else(|| redis.dir().join("appendonly.aof"))
}

async fn is_found_out(loss: Loss) {
    let redis = if loss == Loss::CutFile { Redis::with(&["--appendonly", "yes"]) } else { Redis::start() };
    let mut stage = Stage::new(redis).await;
    let (reason, says) = loss.reason();
    let heals = format!("prefetchd_heals_total{{reason={reason:?}}}");
    for phase in PHASES {
        let mut daemon = stage.at(phase).await;
        let old = stage.grows_old(loss, phase).await;
        let mut before = daemon.metrics().await[&heals];
        if phase == Phase::Drain {
            stage.begins_to_drain(&daemon).await;
        } else {
            // It heals slowly enough to be looked at.
            stage.proxy.throttle(Some(SLOW));
        }
        stage.loses(loss, old).await;
        let mut since = Instant::now();
        if phase == Phase::Drain {
            assert_eq!(daemon.ended().await, Some(NOT_DRAINED), "what was in hand is not in redis");
            stage.proxy.throttle(Some(SLOW));
            since = Instant::now();
            (daemon, before) = (stage.daemon().await, 0.0);
        }
        let healed = async || daemon.metrics().await[&heals];
        eventually("it finds out", healed, |now| *now > before).await;
        println!("{loss:?}, {phase:?}: found out after {} ms", since.elapsed().as_millis());
        let healing = |s: &Value| s["state"] == "healing" && s["tables"][0]["loaded"] == false;
        daemon.status_when("healing", healing).await;
        assert_eq!(daemon.get("/readyz").await.status, 503);
        reads_are_refused(&daemon, "healing").await;
        stage.proxy.heal();
        stage.recovers(&daemon, loss, phase, since).await;
        daemon.logged(says).await;
        let status = daemon.status().await;
        assert!(status["last_load"]["reason"].as_str().unwrap().starts_with(says), "{status}");
        assert_eq!(daemon.stop().await, Some(0));
    }
    stage.ends().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flushed_redis_is_found_out() {
    is_found_out(Loss::Flush).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redis_that_comes_back_empty_is_found_out() {
    is_found_out(Loss::Empty).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redis_that_comes_back_with_an_older_dump_is_found_out() {
    is_found_out(Loss::OldDump).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redis_that_comes_back_with_a_cut_file_is_found_out() {
    is_found_out(Loss::CutFile).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failover_to_a_replica_that_lagged_is_found_out() {
    is_found_out(Loss::LaggingReplica).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_checkpoint_is_found_out() {
    is_found_out(Loss::Checkpoint).await;
}

// --------------------------------------------------------------------------------------- Redis refuses, or hangs

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Trouble {
    OutOfMemory,
    ReadOnly,
    CannotSave,
    Loading,
    Busy,
    WrongPassword,
    Frozen,
    BlackHole,
}

impl Trouble {
    /// As `waiting_for` does.
    fn says(self) -> &'static str {
        match self {
            Trouble::OutOfMemory => "OOM",
            // As it refuses a write, or as a new connection finds it.
            Trouble::ReadOnly => "point redis.url at",
            Trouble::CannotSave => "MISCONF",
            Trouble::Loading => "LOADING",
            Trouble::Busy => "BUSY",
            Trouble::WrongPassword => "WRONGPASS",
            Trouble::Frozen | Trouble::BlackHole => "redis does not answer",
        }
    }

    fn redis(self) -> Redis {
        match self {
            // Six thousandths of a second for ten rows, and it answers in between.
            Trouble::Loading => {
                Redis::with(&["--key-load-delay", "600", "--loading-process-events-interval-bytes", "1024"])
            }
            _ => Redis::start(),
        }
    }

    /// Whether Redis still answers others.
    fn answers(self) -> bool {
        !matches!(self, Trouble::Frozen | Trouble::Busy)
    }
}

impl Stage {
    async fn troubled(&mut self, trouble: Trouble) -> Option<JoinHandle<()>> {
        let redis = &mut self.scene.redis;
        match trouble {
            Trouble::OutOfMemory => redis.command(&["CONFIG", "SET", "maxmemory", "1mb"]).await,
            // Of a master that is away: it keeps what it has.
            Trouble::ReadOnly => redis.command(&["REPLICAOF", "127.0.0.1", "1"]).await,
            Trouble::CannotSave => {
                redis.command::<()>(&["CONFIG", "SET", "save", "3600 1000000"]).await;
                std::fs::create_dir(redis.dir().join("dump.rdb")).unwrap();
                redis.command::<()>(&["BGSAVE"]).await;
                has_saved(redis, "err").await;
            }
            Trouble::Loading => {
                let mut connection = redis.connection().await;
                // It hangs up instead of an answer.
                let _ = redis::cmd("SHUTDOWN").arg("SAVE").exec_async(&mut connection).await;
                redis.stop();
                block_in_place(|| redis.start_again());
            }
            Trouble::Busy => {
                redis.command::<()>(&["CONFIG", "SET", "lua-time-limit", "50"]).await;
                let mut connection = redis.connection().await;
                return Some(tokio::spawn(async move {
                    let ended = redis::cmd("EVAL").arg("while true do end").arg(0).exec_async(&mut connection).await;
                    assert!(ended.unwrap_err().to_string().contains("killed"));
                }));
            }
            Trouble::WrongPassword => {
                redis.command::<()>(&["ACL", "SETUSER", "prefetchd", "resetpass", ">another"]).await;
                redis.command::<i32>(&["CLIENT", "KILL", "USER", "prefetchd"]).await;
            }
            Trouble::Frozen => redis.signal(Signal::SIGSTOP),
            Trouble::BlackHole => {
                self.proxy.silence(Way::ToServer);
                self.proxy.silence(Way::ToClient);
            }
        }
        None
    }

    async fn mended(&mut self, trouble: Trouble, script: Option<JoinHandle<()>>) {
        let redis = &self.scene.redis;
        match trouble {
            Trouble::OutOfMemory => redis.command(&["CONFIG", "SET", "maxmemory", "0"]).await,
            Trouble::ReadOnly => redis.command(&["REPLICAOF", "NO", "ONE"]).await,
            Trouble::CannotSave => {
                std::fs::remove_dir(redis.dir().join("dump.rdb")).unwrap();
                redis.command::<()>(&["BGSAVE"]).await;
                has_saved(redis, "ok").await;
                std::fs::remove_file(redis.dir().join("dump.rdb")).unwrap();
            }
            Trouble::Loading => {}
            Trouble::Busy => {
                redis.command::<()>(&["SCRIPT", "KILL"]).await;
                script.unwrap().await.unwrap();
            }
            Trouble::WrongPassword => {
                let login = redis.login();
                let password = format!(">{}", login.split(':').nth(1).unwrap());
                redis.command(&["ACL", "SETUSER", "prefetchd", "resetpass", &password]).await
            }
            Trouble::Frozen => redis.signal(Signal::SIGCONT),
            Trouble::BlackHole => {}
        }
        self.proxy.heal();
    }
}

async fn has_saved(redis: &Redis, how: &str) {
    let info = async || redis.command::<String>(&["INFO", "persistence"]).await;
    let status = format!("rdb_last_bgsave_status:{how}");
    let done = |info: &String| info.contains("rdb_bgsave_in_progress:0") && info.contains(&status);
    eventually("it has tried to save", info, done).await;
}

/// Stalled for this reason, nothing confirmed that is not in Redis, and whole without a load as soon as that is over.
async fn is_waited_out(trouble: Trouble) {
    let mut stage = Stage::new(trouble.redis()).await;
    for phase in PHASES {
        let mut daemon = stage.at(phase).await;
        if trouble == Trouble::WrongPassword {
            daemon.allow_warning("cannot go on until this is mended");
        }
        if phase == Phase::Drain {
            stage.begins_to_drain(&daemon).await;
        }
        let script = stage.troubled(trouble).await;
        let bound = stage.scene.postgres.position().await;
        if phase == Phase::Idle {
            stage.scene.postgres.execute("UPDATE items SET body = 'in hand' WHERE id = 1").await;
        }
        // It is not the slowness that it meets now.
        stage.proxy.throttle(None);
        let mut reads = daemon.status().await["primary_reads"].as_u64().unwrap();
        let mut since = Instant::now();
        if phase == Phase::Drain {
            // What ends within the patience of the drain is waited for, and nothing else.
            let code = if trouble == Trouble::Frozen {
                let stopping = daemon.status().await;
                assert_eq!(stopping["state"], "stopping");
                stage.mended(trouble, script).await;
                assert_eq!(daemon.ended().await, Some(0));
                since = Instant::now();
                None
            } else {
                let code = daemon.ended().await;
                stage.mended(trouble, script).await;
                code
            };
            assert!(code.is_none_or(|code| code == NOT_DRAINED), "{code:?}");
            since = Instant::now();
            (daemon, reads) = (stage.daemon().await, 0);
        } else {
            if trouble == Trouble::Loading {
                // It was over before this line.
                assert!(daemon.said(trouble.says()) > 0, "{}", daemon.log_text());
            } else {
                let says = |s: &Value| s["waiting_for"].as_str().is_some_and(|w| w.contains(trouble.says()));
                daemon.status_when("stalled", |s| s["state"] == "stalled" && says(s)).await;
                assert_eq!(daemon.get("/readyz").await.status, 503);
                let confirmed = stage.scene.confirmed().await;
                assert!(confirmed <= bound, "{confirmed} is confirmed, and redis has nothing after {bound}");
                if trouble.answers() {
                    let checkpoint = stage.scene.checkpoint().await.map(|c| c.lsn.0);
                    assert!(checkpoint.is_none_or(|lsn| confirmed <= lsn), "{confirmed} is confirmed, {checkpoint:?}");
                }
                since = Instant::now();
                stage.mended(trouble, script).await;
            }
        }
        stage.recovers(&daemon, trouble, phase, since).await;
        if phase != Phase::Load {
            assert_eq!(daemon.status().await["primary_reads"], reads, "nothing was lost:\n{}", daemon.log_text());
        }
        assert_eq!(daemon.stop().await, Some(0));
    }
    stage.ends().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redis_without_memory_is_waited_out() {
    is_waited_out(Trouble::OutOfMemory).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redis_that_became_a_replica_is_waited_out() {
    is_waited_out(Trouble::ReadOnly).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redis_that_cannot_save_is_waited_out() {
    is_waited_out(Trouble::CannotSave).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redis_that_reads_its_file_is_waited_out() {
    is_waited_out(Trouble::Loading).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redis_that_runs_a_script_without_end_is_waited_out() {
    is_waited_out(Trouble::Busy).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_password_that_was_changed_is_waited_out() {
    is_waited_out(Trouble::WrongPassword).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_redis_is_waited_out() {
    is_waited_out(Trouble::Frozen).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_network_that_swallows_everything_is_waited_out() {
    is_waited_out(Trouble::BlackHole).await;
}
