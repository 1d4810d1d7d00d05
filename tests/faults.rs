//! Faults of Redis and the network in every phase of the daemon's work: nothing is lost, nothing wrong is served, and
//! it recovers without help.
//!
//! One test per fault, which strikes in every [`Phase`]. `--nocapture` shows how long recovery took.

use crate::harness::proxy::Proxy;
use crate::harness::scene::{Phase, Scene};
use crate::harness::watcher::{HttpWatcher, Watcher};
use crate::harness::{Daemon, Feature, Postgres, Redis, Settings, Stop, eventually, position};
use nix::sys::signal::Signal;
use prefetchd::lsn::Lsn;
use rand::Rng;
use serde_json::Value;
use std::fmt::Debug;
use std::time::Instant;
use tokio::task::{JoinHandle, block_in_place};

const ROWS: u64 = 2_000;
/// In bytes per second: so slow that a load takes seconds.
const SLOW: usize = 200_000;
/// In bytes per second: so slow that it cannot keep up with the writers.
const SLOWER: usize = 20_000;
/// Bytes of WAL left at a stop: more than a drain can write to such a Redis in time.
const BACKLOG: u64 = 500_000;

/// The exit code of a stop that could not write everything to Redis.
const NOT_DRAINED: i32 = 1;

/// Matches every connection of a daemon.
const DAEMONS: &str = "user=prefetchd";

/// A scene with an unreliable network between the daemon and Redis.
struct Stage {
    scene: Scene,
    proxy: Proxy,
    http: HttpWatcher,
    /// Servers that are no longer used: the settings were made for the first.
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

    /// Gives up draining sooner, for tests in which no drain succeeds.
    fn that_drains_briefly(mut self) -> Self {
        self.scene.settings = self.scene.settings.timing("drain=2s");
        self
    }

    async fn daemon(&self) -> Daemon {
        let daemon = self.scene.daemon().await;
        // It must warn about a fault. Errors are for what a person must fix.
        daemon.allow_warning(r#""level":"WARN""#);
        self.http.ask(vec![daemon.address()]).await;
        daemon
    }

    /// Returns a daemon in this phase, or one that will be once it is told to stop.
    async fn at(&mut self, phase: Phase) -> Daemon {
        match phase {
            Phase::Idle => self.scene.rest().await,
            Phase::Down => unreachable!("these faults strike a daemon"),
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

    /// It was told to stop with a backlog that cannot shrink until the proxy is healed.
    async fn begins_to_drain(&self, daemon: &Daemon) {
        self.proxy.throttle(Some(SLOWER));
        let in_hand = |s: &Value| Some(position(s, "received")?.bytes_since(position(s, "applied")?));
        daemon.status_when("behind", |s| in_hand(s) > Some(BACKLOG)).await;
        daemon.signal(Signal::SIGTERM);
        daemon.logged("stopping").await;
    }

    /// Everything that is written by now arrives without help; then all of it, once nothing writes.
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

/// Reads answer 503 at once, eventually with this code: no existing row is served, and no row is reported as
/// nonexistent.
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
    /// The label of the metric, and the reason of the last load.
    fn reason(self) -> (&'static str, &'static str) {
        match self {
            Loss::Flush | Loss::Empty | Loss::Checkpoint => ("redis_lost", "redis has no checkpoint"),
            Loss::OldDump | Loss::CutFile | Loss::LaggingReplica => ("redis_went_back", "redis went back to"),
        }
    }
}

/// The state with which Redis will come back.
enum Old {
    Nothing,
    /// The file, and its size at the time.
    File(std::path::PathBuf, u64),
    Replica(Box<Redis>),
}

impl Stage {
    /// Prepares the fault: an older state, and more that is confirmed since.
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
                let replica = redis.replica().await;
                // Users are not replicated.
                replica.daemon_user().grant(self.scene.settings.redis_rules());
                replica.command::<()>(&["REPLICAOF", "NO", "ONE"]).await;
                Old::Replica(Box::new(replica))
            }
        };
        let before = self.scene.postgres.position().await;
        if phase == Phase::Idle {
            self.scene.postgres.execute("UPDATE items SET body = 'newer' WHERE id = 1").await;
        }
        let confirmed = async || self.scene.postgres.confirmed().await;
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
                self.left.push(std::mem::replace(&mut self.scene.redis, *replica));
            }
        }
    }
}

/// The part that is being written.
fn append_only_file(redis: &Redis) -> std::path::PathBuf {
    let parts = std::fs::read_dir(redis.dir().join("appendonlydir"));
    let parts = parts.into_iter().flatten().map(|part| part.unwrap().path());
    // Before Redis 7 it is a single file.
    let newest = parts.filter(|part| part.to_string_lossy().contains(".incr.")).max();
    newest.unwrap_or_else(|| redis.dir().join("appendonly.aof"))
}

async fn is_found_out(loss: Loss) {
    let redis = if loss == Loss::CutFile { Redis::with(&["--appendonly", "yes"]) } else { Redis::start() };
    let mut stage = Stage::new(redis).await.that_drains_briefly();
    let (reason, says) = loss.reason();
    let heals = format!("prefetchd_heals_total{{reason={reason:?}}}");
    for phase in Phase::UP {
        let mut daemon = stage.at(phase).await;
        let old = stage.grows_old(loss, phase).await;
        let mut before = daemon.metrics().await[&heals];
        if phase == Phase::Drain {
            stage.begins_to_drain(&daemon).await;
        } else {
            // It heals slowly enough to be observed.
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
    /// What `waiting_for` says.
    fn says(self) -> &'static str {
        match self {
            Trouble::OutOfMemory => "OOM",
            // As a refused write reports it, or as a new connection finds it.
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
            // 6 ms for ten rows, and it answers in between.
            Trouble::Loading => {
                Redis::with(&["--key-load-delay", "600", "--loading-process-events-interval-bytes", "1024"])
            }
            _ => Redis::start(),
        }
    }

    /// Whether Redis still answers other clients.
    fn answers(self) -> bool {
        !matches!(self, Trouble::Frozen | Trouble::Busy)
    }
}

impl Stage {
    async fn troubled(&mut self, trouble: Trouble) -> Option<JoinHandle<()>> {
        let redis = &mut self.scene.redis;
        match trouble {
            Trouble::OutOfMemory => redis.command(&["CONFIG", "SET", "maxmemory", "1mb"]).await,
            // As a replica of a master that is unavailable, it keeps its data.
            Trouble::ReadOnly => redis.command(&["REPLICAOF", "127.0.0.1", "1"]).await,
            Trouble::CannotSave => {
                redis.command::<()>(&["CONFIG", "SET", "save", "3600 1000000"]).await;
                // The file cannot be created.
                std::fs::create_dir(redis.dir().join("dump.rdb")).unwrap();
                redis.command::<()>(&["BGSAVE"]).await;
                has_saved(redis, "err").await;
            }
            Trouble::Loading => {
                let mut connection = redis.connection().await;
                // It closes the connection instead of replying.
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
            Trouble::BlackHole => self.proxy.black_hole(),
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
                redis.command::<()>(&["CONFIG", "SET", "save", ""]).await;
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

/// Stalled for this reason, nothing confirmed that Redis does not have, and complete without a load as soon as it is
/// over.
async fn is_waited_out(trouble: Trouble) {
    let mut stage = Stage::new(trouble.redis()).await;
    if trouble != Trouble::Frozen {
        stage = stage.that_drains_briefly();
    }
    for phase in Phase::UP {
        let mut daemon = stage.at(phase).await;
        if trouble == Trouble::WrongPassword {
            daemon.allow_warning("cannot go on until this is mended");
        }
        let mut reads = daemon.status().await["primary_reads"].clone();
        if phase == Phase::Drain {
            stage.begins_to_drain(&daemon).await;
        }
        let script = stage.troubled(trouble).await;
        let bound = stage.scene.postgres.position().await;
        if phase == Phase::Idle {
            stage.scene.postgres.execute("UPDATE items SET body = 'in hand' WHERE id = 1").await;
        }
        // The slowness is not what is being tested now.
        stage.proxy.throttle(None);
        let since = match (phase, trouble) {
            // It is over before the drain gives up.
            (Phase::Drain, Trouble::Frozen) => {
                assert_eq!(daemon.status().await["state"], "stopping");
                stage.mended(trouble, script).await;
                assert_eq!(daemon.ended().await, Some(0));
                daemon = stage.daemon().await;
                Instant::now()
            }
            (Phase::Drain, _) => {
                assert_eq!(daemon.ended().await, Some(NOT_DRAINED), "what was in hand is not in redis");
                stage.mended(trouble, script).await;
                daemon = stage.daemon().await;
                Instant::now()
            }
            _ => {
                stage.is_stalled(&daemon, trouble, bound).await;
                let since = Instant::now();
                stage.mended(trouble, script).await;
                since
            }
        };
        stage.recovers(&daemon, trouble, phase, since).await;
        if phase == Phase::Drain {
            reads = 0.into();
        }
        if phase != Phase::Load {
            assert_eq!(daemon.status().await["primary_reads"], reads, "nothing was lost:\n{}", daemon.log_text());
        }
        assert_eq!(daemon.stop().await, Some(0));
    }
    stage.ends().await;
}

impl Stage {
    /// Redis has acknowledged nothing that was committed after `bound`.
    async fn is_stalled(&self, daemon: &Daemon, trouble: Trouble, bound: Lsn) {
        if trouble == Trouble::Loading {
            // It is over by now.
            assert!(daemon.said(trouble.says()) > 0, "{}", daemon.log_text());
            return;
        }
        let says = |s: &Value| s["waiting_for"].as_str().is_some_and(|what| what.contains(trouble.says()));
        daemon.status_when("stalled", |s| s["state"] == "stalled" && says(s)).await;
        assert_eq!(daemon.get("/readyz").await.status, 503);
        let confirmed = self.scene.postgres.confirmed().await;
        assert!(confirmed <= bound, "{confirmed} is confirmed, and redis has nothing after {bound}");
        if trouble.answers() {
            let checkpoint = self.scene.checkpoint().await.unwrap().lsn.0;
            assert!(confirmed <= checkpoint, "{confirmed} is confirmed, {checkpoint} is in redis");
        }
    }
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
    if Redis::lacks(Feature::LoadingInterval).await {
        return;
    }
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

// -------------------------------------------------------------------------------------- messages that arrive in part

#[derive(Debug, Clone, Copy)]
enum Part {
    /// Of a batch: nothing of it counts.
    Batch,
    /// Of an acknowledgement: the whole batch counts, but that is not known.
    Acknowledgement,
    /// Of a change, or of a COPY.
    Change,
}

/// The checkpoint shows how far the last session got: nothing is loaded, and nothing is applied twice.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_cut_in_mid_message_lose_nothing() {
    let mut stage = Stage::new(Redis::start()).await;
    let to_postgres = Proxy::to_postgres(&stage.scene.postgres).await;
    stage.scene.settings = stage.scene.settings.text("postgres.url", &to_postgres.url());
    for phase in [Phase::Stream, Phase::Load, Phase::Drain] {
        for part in [Part::Batch, Part::Acknowledgement, Part::Change] {
            let mut daemon = stage.at(phase).await;
            let mut reads = daemon.status().await["primary_reads"].clone();
            match phase {
                Phase::Drain => stage.begins_to_drain(&daemon).await,
                // So slow that a reader would notice if anything were written again.
                _ => stage.proxy.throttle(Some(SLOW / 2)),
            }
            let mut since = Instant::now();
            for _ in 0..if phase == Phase::Stream { 4 } else { 1 } {
                let before = stage.scene.checkpoint().await.unwrap().epoch;
                let bytes = match (part, phase) {
                    (Part::Batch, Phase::Drain) | (Part::Acknowledgement, _) => 1..200,
                    (Part::Batch, _) => 1..20_000,
                    (Part::Change, Phase::Drain) => 1..2_000,
                    (Part::Change, _) => 1..50_000,
                };
                let bytes = stage.scene.rng.random_range(bytes);
                match part {
                    Part::Batch => stage.proxy.cut_in_mid_write(bytes).await,
                    Part::Acknowledgement => stage.proxy.cut_in_mid_read(bytes).await,
                    Part::Change => to_postgres.cut_in_mid_read(bytes).await,
                }
                since = Instant::now();
                if phase == Phase::Drain {
                    stage.proxy.heal();
                    // What Postgres would have sent was not received.
                    let drained = if matches!(part, Part::Change) { 0 } else { NOT_DRAINED };
                    assert_eq!(daemon.ended().await, Some(drained));
                    since = Instant::now();
                    (daemon, reads) = (stage.daemon().await, 0.into());
                    break;
                }
                let epoch = async || stage.scene.checkpoint().await.unwrap().epoch;
                eventually("a new session", epoch, |epoch| *epoch > before).await;
            }
            stage.proxy.heal();
            stage.recovers(&daemon, part, phase, since).await;
            if phase != Phase::Load {
                assert_eq!(daemon.status().await["primary_reads"], reads, "{}", daemon.log_text());
            }
            assert_eq!(daemon.stop().await, Some(0));
        }
    }
    stage.ends().await;
}

/// What a dead daemon has sent finally arrives, while another one is working.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_late_tail_of_a_dead_daemon_writes_nothing() {
    let mut stage = Stage::new(Redis::start()).await;
    for phase in [Phase::Idle, Phase::Stream, Phase::Load] {
        let dead = stage.at(phase).await;
        let clients = stage.scene.redis.clients(DAEMONS).await;
        let held = stage.proxy.held_bytes();
        stage.proxy.hold();
        if phase == Phase::Idle {
            stage.scene.postgres.execute("UPDATE items SET body = 'by the dead' WHERE id = 1").await;
        }
        eventually("something is held", async || stage.proxy.held_bytes(), |now| *now > held + 200).await;
        dead.kill9();
        stage.proxy.throttle(None);
        let epoch = stage.scene.checkpoint().await.map_or(0, |c| c.epoch);
        // Not one that may log warnings.
        let next = stage.scene.daemon().await;
        stage.http.ask(vec![next.address()]).await;
        if phase == Phase::Idle {
            let sql = "UPDATE items SET body = 'by the next' WHERE id = 1";
            next.applied(stage.scene.postgres.execute(sql).await).await;
        }
        next.ready().await;
        let of_the_next = stage.scene.checkpoint().await.unwrap().epoch;
        assert!(of_the_next > epoch);
        stage.proxy.release();
        let since = Instant::now();
        eventually(
            "all of it has arrived",
            async || stage.scene.redis.clients(DAEMONS).await,
            |now| now.is_disjoint(&clients),
        )
        .await;
        stage.recovers(&next, "a late tail", phase, since).await;
        assert_eq!(stage.scene.checkpoint().await.unwrap().epoch, of_the_next, "{}", next.log_text());
        assert_eq!(next.stop().await, Some(0));
    }
    stage.ends().await;
}

// ------------------------------------------------------------------------------------------------- a slow Redis

/// In bytes, for the whole process, with any backlog, as docs/benchmarks.md says.
const MEMORY_BEHIND: u64 = 100 << 20;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_redis_costs_lag_and_not_memory() {
    let mut stage = Stage::new(Redis::start()).await;
    let daemon = stage.at(Phase::Stream).await;
    stage.proxy.throttle(Some(SLOW));
    for _ in 0..45 {
        let rows = "body = md5(random()::text) || repeat('x', 800)";
        stage.scene.update(rows).await;
    }
    let written = stage.scene.postgres.position().await.get() as f64;
    let at = |metrics: &std::collections::BTreeMap<String, f64>, point: &str| {
        metrics[&format!("prefetchd_lsn{{point={point:?}}}")]
    };
    let metrics = async || daemon.metrics().await;
    let known = eventually("it knows where the server is", metrics, |m| at(m, "server") >= written).await;
    let lag = known["prefetchd_replication_lag_bytes"];
    assert!(lag > 0.0 && at(&known, "applied") < written, "{known:?}");
    assert_eq!(lag, at(&known, "server") - at(&known, "applied"));
    let server = stage.scene.postgres.position().await.get() as f64;
    assert!(at(&known, "server") <= server);
    // Redis has that, and nothing more is reported as safe.
    let checkpoint = stage.scene.checkpoint().await.unwrap().lsn.0;
    assert!(at(&known, "applied") <= checkpoint.get() as f64);
    let confirmed = stage.scene.postgres.confirmed().await;
    assert!(confirmed <= stage.scene.checkpoint().await.unwrap().lsn.0);
    let age = known["prefetchd_replication_lag_seconds"];
    let older = async || daemon.metrics().await["prefetchd_replication_lag_seconds"];
    eventually("the oldest change gets older", older, |now| *now > age && *now > 1.0).await;
    let retained = async || daemon.metrics().await["prefetchd_slot_retained_bytes"];
    eventually("the slot keeps the rest", retained, |bytes| *bytes >= lag).await;
    let applied = position(&daemon.status().await, "applied");
    daemon.status_when("it goes on, slowly", |s| position(s, "applied") > applied).await;
    assert_eq!(daemon.said("redis has not answered"), 0, "it is slow, and not silent:\n{}", daemon.log_text());
    println!("{:.1} MB behind, {:.1} MB of memory", lag / 1e6, daemon.peak_memory_bytes() as f64 / 1e6);
    stage.proxy.heal();
    let since = Instant::now();
    stage.recovers(&daemon, "a slow Redis", Phase::Stream, since).await;
    let peak = daemon.peak_memory_bytes();
    println!("{:.1} MB of memory at most", peak as f64 / 1e6);
    assert!(peak < MEMORY_BEHIND, "{peak}");
    assert_eq!(daemon.stop().await, Some(0));
    stage.ends().await;
}

/// Keepalives are answered as long as there is hope. Then the connection to the walsender is closed, because it would
/// delay a shutdown of Postgres until everything is confirmed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_outlives_its_timeout_while_redis_hangs_and_is_let_go_at_last() {
    let (mut postgres, redis) = (Postgres::own(&[("wal_sender_timeout", "2s")]), Redis::start());
    let proxy = Proxy::to_redis(&redis).await;
    let settings = Settings::new(&postgres, &redis).text("redis.url", &proxy.url()).timing("let_go=4s");
    let daemon = Daemon::with(&settings).await;
    daemon.allow_warnings();
    daemon.ready().await;
    let walsender = async || postgres.value("SELECT active_pid FROM pg_replication_slots").await;
    let before = walsender().await;
    assert!(before.is_some());
    proxy.black_hole();
    let struck = Instant::now();
    let lsn = postgres.execute("UPDATE categories SET name = 'Drinks' WHERE id = 'cat-001'").await;
    let mut last = Instant::now();
    let gone = async || {
        let now = walsender().await;
        last = if now == before { Instant::now() } else { last };
        now
    };
    eventually("it is let go", gone, |now| *now != before).await;
    daemon.logged("redis has not answered").await;
    let by_postgres = daemon.metrics().await[r#"prefetchd_reconnects_total{peer="postgres"}"#];
    assert_eq!(by_postgres, 0.0, "Postgres has ended it:\n{}", daemon.log_text());
    println!("the walsender was let go {} ms after the blow", (last - struck).as_millis());
    let began = Instant::now();
    block_in_place(|| postgres.stop(Stop::Fast));
    println!("a fast shutdown took {} ms", began.elapsed().as_millis());
    postgres.start_again();
    proxy.heal();
    daemon.applied(lsn).await;
    assert_eq!(redis.hash("cache:category:cat-001").await["name"], "Drinks");
    daemon.ready().await;
    assert_eq!(daemon.status().await["primary_reads"], 1);
    assert_eq!(daemon.stop().await, Some(0));
}

// ------------------------------------------------------------------------------------------- somebody else's values

/// A change that leaves out a large column needs the old hash, and finds none.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_no_hash_where_a_row_belongs_is_replaced_when_the_row_changes() {
    let mut stage = Stage::new(Redis::start()).await;
    let daemon = stage.at(Phase::Idle).await;
    let redis = &stage.scene.redis;
    for (key, make) in
        [("t:item:50", &["SET", "t:item:50", "x"][..]), ("t:item:100", &["RPUSH", "t:item:100", "x"][..])]
    {
        redis.command::<()>(&["DEL", key]).await;
        redis.command::<()>(make).await;
        let id = key.rsplit(':').next().unwrap();
        assert_eq!(daemon.get(&format!("/v1/tables/items/{id}")).await.refusal(), (503, "healing".to_owned()));
    }
    for change in ["UPDATE items SET body = 'other' WHERE id IN (50, 100)", "DELETE FROM items WHERE id = 100"] {
        daemon.applied(stage.scene.postgres.execute(change).await).await;
        stage.recovers(&daemon, "a value of another type", Phase::Idle, Instant::now()).await;
        stage.scene.redis.command::<()>(&["DEL", "t:item:100"]).await;
        stage.scene.redis.command::<()>(&["SET", "t:item:100", "x"]).await;
    }
    // Its row is gone: only a verification looks there.
    stage.scene.redis.command::<()>(&["DEL", "t:item:100"]).await;
    assert_eq!(daemon.status().await["primary_reads"], 3);

    let key = stage.scene.checkpoint_key();
    daemon.allow_warning("cannot go on until this is mended");
    redis::pipe()
        .atomic()
        .cmd("DEL")
        .arg(&key)
        .cmd("HSET")
        .arg(&[&key, "not", "ours"])
        .exec_async(&mut stage.scene.redis.connection().await)
        .await
        .unwrap();
    let says = |s: &Value| s["waiting_for"].as_str().is_some_and(|w| w.contains(&key) && w.contains("hash"));
    daemon.status_when("stalled", |s| s["state"] == "stalled" && says(s)).await;
    reads_are_refused(&daemon, "healing").await;
    assert_eq!(stage.scene.redis.hash(&key).await["not"], "ours");
    stage.scene.redis.command::<()>(&["DEL", &key]).await;
    stage.recovers(&daemon, "a checkpoint of another type", Phase::Idle, Instant::now()).await;
    assert_eq!(daemon.stop().await, Some(0));
    stage.ends().await;
}
