//! Faults of one node of a cluster with rows in all hash slots, in every phase of the daemon's work: nothing is lost, nothing
//! wrong is served, and it recovers without help.
//!
//! One test for each fault. `--nocapture` shows how long recovery took.

use crate::harness::lanes::{LaneScene, Load};
use crate::harness::proxy::Proxy;
use crate::harness::scene::Phase;
use crate::harness::traffic::{Traffic, seed};
use crate::harness::{Cluster, Daemon, Postgres, Redis, eventually, position};
use nix::sys::signal::Signal;
use prefetchd::lanes::Lane;
use prefetchd::lanes::tags::mark_key;
use serde_json::{Value, json};
use std::time::Instant;
use tokio::task::{JoinHandle, block_in_place};

const MASTERS: usize = 3;
/// In bytes per second, for each connection: so slow that a load takes seconds.
const SLOW: usize = 300_000;
/// In bytes per second: so slow that it cannot keep up with the writers.
const SLOWER: usize = 10_000;
/// Bytes of WAL left at a stop: more than a drain can write in time.
const BACKLOG: u64 = 200_000;
/// Within a batch, and within the replies to it.
const IN_MID_BATCH: usize = 3_000;
const IN_MID_REPLIES: usize = 700;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    Flushed,
    BackEmpty,
    BackWithOldDump,
    LaggingReplica,
    RecordDeleted,
    MarkDeleted,
    FailedOver,
    ForcedOver,
    TakenOver,
    /// Frozen until its replica was elected. Then it wakes.
    Elected,
    /// Separated from the other nodes and its replica, but not from the daemon.
    Partitioned,
    Uncovered,
    OutOfMemory,
    CannotSave,
    Busy,
    WrongPassword,
    Frozen,
    CutOff,
    CutInMidWrite,
    CutInMidRead,
    ScriptsFlushed,
    NoHash,
    /// The daemon is killed, and what it sent last arrives when another one works.
    LateBytes,
    /// The daemon sleeps until another one works.
    FrozenWriter,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Then {
    /// Nothing is loaded again.
    Resumes,
    /// Something is, and readers are told.
    Heals,
    /// The node may have lost its last changes. If these are sent again, nothing is loaded.
    Either,
}

impl Fault {
    fn then(self) -> Then {
        match self {
            Fault::Flushed
            | Fault::BackEmpty
            | Fault::BackWithOldDump
            | Fault::LaggingReplica
            | Fault::RecordDeleted
            | Fault::MarkDeleted => Then::Heals,
            Fault::ForcedOver | Fault::TakenOver | Fault::Elected | Fault::Partitioned | Fault::NoHash => Then::Either,
            _ => Then::Resumes,
        }
    }

    fn phases(self) -> &'static [Phase] {
        match self {
            // Something must be written. What is sent at a stop is so slow that nothing of it may arrive before the end.
            Fault::CutInMidWrite | Fault::CutInMidRead => &[Phase::Stream, Phase::Load],
            // A daemon of its own is part of it.
            Fault::LateBytes | Fault::FrozenWriter => &[Phase::Idle, Phase::Stream, Phase::Load],
            Fault::NoHash => &[Phase::Idle],
            Fault::OutOfMemory
            | Fault::CannotSave
            | Fault::Busy
            | Fault::WrongPassword
            | Fault::Frozen
            | Fault::CutOff
            | Fault::ScriptsFlushed => &Phase::UP,
            _ => &Phase::ALL,
        }
    }

    fn has_replicas(self) -> bool {
        matches!(
            self,
            Fault::LaggingReplica | Fault::FailedOver | Fault::ForcedOver | Fault::TakenOver | Fault::Elected
        )
    }

    /// What `waiting_for` says until the fault is over.
    fn says(self) -> Option<&'static str> {
        Some(match self {
            Fault::OutOfMemory => "OOM",
            Fault::CannotSave => "MISCONF",
            Fault::Busy => "BUSY",
            Fault::WrongPassword => "WRONGPASS",
            Fault::Frozen | Fault::CutOff => "does not answer",
            Fault::Uncovered => "CLUSTERDOWN",
            _ => return None,
        })
    }
}

/// Where a fault strikes.
#[derive(Debug, Clone, Copy)]
struct Victim {
    master: usize,
    /// If there are replicas.
    replica: usize,
}

struct Trial {
    fault: Fault,
    /// With one daemon, except for a moment.
    scene: LaneScene,
    /// Between the daemon and each node.
    proxies: Vec<Proxy>,
}

impl Trial {
    async fn of(fault: Fault) -> Self {
        let cluster = match fault {
            Fault::Partitioned => Cluster::that_can_be_partitioned().await,
            _ if fault.has_replicas() => Cluster::with_replicas().await,
            _ => Cluster::start().await,
        };
        let (proxies, url) = cluster.through_proxies().await;
        let mut scene = LaneScene::with(Postgres::shared(), cluster, 0, seed()).await;
        scene.settings = scene.settings.text("redis.url", &url).timing("drain=2s");
        let mut trial = Self { fault, scene, proxies };
        trial.begin().await;
        trial.scene.settled().await;
        trial
    }

    async fn begin(&mut self) {
        let daemon = self.scene.daemon().await;
        self.scene.daemons.push(daemon);
        self.scene.ask_all().await;
    }

    fn daemon(&self) -> &Daemon {
        self.scene.daemons.first().unwrap()
    }

    fn throttle(&self, bytes_per_second: Option<usize>) {
        self.proxies.iter().for_each(|proxy| proxy.throttle(bytes_per_second));
    }

    /// How often something that was lost has been loaded again.
    async fn heals(&self) -> f64 {
        let metrics = self.daemon().metrics().await;
        ["redis_lost", "redis_went_back"]
            .map(|why| metrics[&format!("prefetchd_heals_total{{reason={why:?}}}")])
            .iter()
            .sum()
    }

    /// In some phases the node with the record.
    async fn victim(&self, phase: Phase) -> Victim {
        let record = format!("{{{}}}", self.scene.postgres.slot());
        let key = match phase {
            Phase::Stream | Phase::Drain => record,
            Phase::Idle | Phase::Load | Phase::Down => Traffic::item_key(phase as u64 + 1),
        };
        let master = self.scene.cluster.master_of(Lane::of(key.as_bytes())).await;
        let replica = (master + MASTERS) % (2 * MASTERS);
        if replica < self.scene.cluster.nodes().len() {
            self.scene.cluster.replicates(replica).await;
        }
        Victim { master, replica }
    }

    /// Lets the fault strike, waits until everything is well again, and checks all promises.
    async fn strike(&mut self, phase: Phase) {
        let victim = self.victim(phase).await;
        self.prepare(victim).await;
        let load = match phase {
            Phase::Idle => None,
            _ => Some(self.scene.write_rows()),
        };
        if let Some(load) = &load {
            load.more(100).await;
        }
        match phase {
            Phase::Idle | Phase::Stream => {}
            Phase::Load => self.refetches().await,
            Phase::Drain => self.begins_to_drain().await,
            Phase::Down => {
                self.scene.ask(&[]).await;
                assert_eq!(self.scene.daemons.remove(0).stop().await, Some(0));
            }
        }
        let (mut before, refused) = match phase {
            Phase::Down => (0.0, 0),
            _ => (self.heals().await, self.scene.refused("healing").await),
        };
        let then = self.fault.then();
        if then == Then::Heals && phase != Phase::Drain {
            // It heals slowly enough to be observed.
            self.throttle(Some(SLOW));
        }
        let script = self.blow(victim).await;
        if matches!(phase, Phase::Idle | Phase::Stream | Phase::Load) {
            self.is_noticed(phase, then).await;
        }
        let mut struck = Instant::now();
        let mut code = None;
        if phase == Phase::Drain {
            self.scene.ask(&[]).await;
            code = self.scene.daemons.remove(0).ended().await;
            self.throttle((then == Then::Heals).then_some(SLOW));
            before = 0.0;
        }
        self.mend(victim, script).await;
        if self.scene.daemons.is_empty() {
            struck = Instant::now();
            self.begin().await;
        }
        if then == Then::Heals {
            self.heals_visibly(before, refused).await;
        }
        self.throttle(None);
        self.is_whole(load).await;
        println!("{:?} | {phase:?} | whole after {} ms | exit {code:?}", self.fault, struck.elapsed().as_millis());
        match then {
            Then::Resumes => assert!(self.heals().await <= before, "{}", self.daemon().log_text()),
            Then::Either => println!("healed: {}", self.heals().await > before),
            Then::Heals => {}
        }
    }

    /// Once nobody writes: on a busy machine it may not keep up with the writers.
    async fn is_whole(&mut self, load: Option<Load>) {
        let load = load.unwrap_or_else(|| self.scene.write_rows());
        self.scene.is_whole(load).await;
    }

    async fn heals_visibly(&self, before: f64, refused: u64) {
        eventually("it finds out", async || self.heals().await, |heals| *heals > before).await;
        if !matches!(self.fault, Fault::RecordDeleted | Fault::MarkDeleted) {
            let told = async || self.scene.refused("healing").await;
            eventually("readers are told", told, |told| *told > refused).await;
        }
    }

    /// Loads, again and again, until the fault ends it.
    async fn refetches(&self) {
        self.throttle(Some(SLOW));
        self.daemon().refetches().await;
    }

    /// It is told to stop with changes that cannot be written in time.
    async fn begins_to_drain(&self) {
        self.throttle(Some(SLOWER));
        let in_hand = |s: &Value| Some(position(s, "received")?.bytes_since(position(s, "applied")?));
        self.daemon().status_when("behind", |s| in_hand(s) > Some(BACKLOG)).await;
        self.daemon().signal(Signal::SIGTERM);
        self.daemon().logged("stopping").await;
    }

    /// The daemon has met the fault.
    async fn is_noticed(&self, phase: Phase, then: Then) {
        if phase == Phase::Idle && then != Then::Heals {
            // Otherwise there would be nothing to write.
            self.scene.postgres.execute("UPDATE items SET body = 'in hand' WHERE id % 10 = 1").await;
        }
        if let Some(says) = self.fault.says() {
            let is_said = |s: &Value| s["waiting_for"].as_str().is_some_and(|what| what.contains(says));
            self.daemon().status_when("waiting", is_said).await;
            assert_eq!(self.daemon().get("/readyz").await.status, 503);
        }
    }

    async fn end(self) {
        self.scene.stop().await;
    }
}

// ------------------------------------------------------------------------------------------------------------ the blows

impl Trial {
    fn node(&self, index: usize) -> &Redis {
        self.scene.cluster.node(index)
    }

    /// What must have been so for a while, with all that is confirmed since.
    async fn prepare(&mut self, victim: Victim) {
        match self.fault {
            Fault::BackWithOldDump => self.node(victim.master).command::<()>(&["SAVE"]).await,
            Fault::LaggingReplica | Fault::Partitioned => {
                self.scene.cluster.lags(victim.replica, victim.master).await;
            }
            _ => return,
        }
        if self.fault != Fault::Partitioned {
            // Every hash slot is written since.
            let at = self.scene.postgres.execute("UPDATE items SET body = 'newer' WHERE id % 3 = 1").await;
            self.daemon().operate("refetch", &json!({})).await;
            eventually("it is confirmed", async || self.scene.postgres.confirmed().await, |now| *now >= at).await;
        }
    }

    async fn may_lose(&self, master: usize) {
        self.scene.watcher.may_lose(self.scene.cluster.lanes_of(master).await).await;
    }

    /// Kills a node, and starts it again with what is in its directory.
    async fn restarts(&mut self, index: usize) {
        self.scene.cluster.kill(index);
        block_in_place(|| self.scene.cluster.start_again(index));
    }

    async fn blow(&mut self, Victim { master, replica }: Victim) -> Option<JoinHandle<()>> {
        match self.fault {
            Fault::Flushed => {
                self.may_lose(master).await;
                self.node(master).flush().await;
            }
            Fault::BackEmpty => {
                self.may_lose(master).await;
                self.restarts(master).await;
            }
            Fault::BackWithOldDump => {
                self.may_lose(master).await;
                self.restarts(master).await;
                std::fs::remove_file(self.node(master).dir().join("dump.rdb")).unwrap();
            }
            Fault::LaggingReplica | Fault::TakenOver | Fault::ForcedOver => {
                self.may_lose(master).await;
                self.scene.cluster.kill(master);
                match self.fault {
                    Fault::ForcedOver => self.scene.cluster.force_over_to(replica).await,
                    _ => self.scene.cluster.take_over(replica).await,
                }
            }
            Fault::FailedOver => self.scene.cluster.fail_over_to(replica).await,
            Fault::Elected => {
                self.may_lose(master).await;
                self.node(master).signal(Signal::SIGSTOP);
                self.scene.cluster.is_elected(replica).await;
                self.node(master).signal(Signal::SIGCONT);
            }
            Fault::Partitioned => {
                self.may_lose(master).await;
                self.scene.cluster.isolate(master);
                self.scene.cluster.is_elected(replica).await;
                self.scene.cluster.reunite();
            }
            Fault::RecordDeleted => {
                let key = format!("prefetchd:{{{}}}:checkpoint", self.scene.postgres.slot());
                self.scene.cluster.server_of(&key).await.command::<()>(&["DEL", &key]).await;
            }
            Fault::MarkDeleted => {
                let key = mark_key(self.lane(), &self.scene.postgres.slot()).to_string();
                self.scene.cluster.server_of(&key).await.command::<()>(&["DEL", &key]).await;
            }
            Fault::Uncovered => self.scene.cluster.uncover(self.lane()).await,
            Fault::LateBytes => self.dies_while_its_bytes_are_held().await,
            Fault::FrozenWriter => self.sleeps_until_another_works().await,
            Fault::CutInMidWrite => self.proxies[master].cut_in_mid_write(IN_MID_BATCH).await,
            Fault::CutInMidRead => self.proxies[master].cut_in_mid_read(IN_MID_REPLIES).await,
            Fault::CutOff => self.proxies[master].black_hole(),
            Fault::NoHash => {
                let key = Traffic::item_key(1);
                let server = self.scene.cluster.server_of(&key).await;
                self.scene.watcher.may_lose([Lane::of(key.as_bytes())]).await;
                server.command::<()>(&["DEL", &key]).await;
                server.command::<()>(&["SET", &key, "text", "EX", "1000"]).await;
            }
            _ => return trouble(self.fault, self.node(master)).await,
        }
        None
    }

    /// Ends what a fault has left behind.
    async fn mend(&mut self, Victim { master, replica }: Victim, script: Option<JoinHandle<()>>) {
        match self.fault {
            Fault::LaggingReplica | Fault::TakenOver | Fault::ForcedOver => {
                block_in_place(|| self.scene.cluster.start_again(master));
                self.scene.cluster.follows(replica).await;
                self.scene.cluster.replicates(master).await;
            }
            Fault::FailedOver | Fault::Elected => self.scene.cluster.replicates(master).await,
            Fault::Partitioned => {
                self.scene.cluster.follows(replica).await;
                self.scene.cluster.replicates(master).await;
            }
            Fault::Uncovered => self.scene.cluster.cover(self.lane(), self.owner().await).await,
            Fault::CutOff => self.proxies[master].heal(),
            _ => mended(self.fault, self.node(master), script).await,
        }
    }

    /// The hash slot of a row that is never deleted.
    fn lane(&self) -> Lane {
        Lane::of(Traffic::item_key(1).as_bytes())
    }

    /// Where its key still is, although nobody serves it.
    async fn owner(&self) -> usize {
        let slot = self.lane().to_string();
        for (index, node) in self.scene.cluster.nodes().iter().enumerate() {
            if node.command::<u64>(&["CLUSTER", "COUNTKEYSINSLOT", &slot]).await > 0 {
                return index;
            }
        }
        0
    }

    async fn dies_while_its_bytes_are_held(&mut self) {
        self.proxies.iter().for_each(Proxy::hold);
        let held = async || self.proxies.iter().map(Proxy::held_bytes).sum::<usize>();
        let before = held().await;
        eventually("something is on its way", held, |bytes| *bytes > before).await;
        self.scene.ask(&[]).await;
        self.scene.daemons.remove(0).kill9();
        self.begin().await;
        self.throttle(None);
        self.scene.settled().await;
        self.proxies.iter().for_each(Proxy::release);
    }

    async fn sleeps_until_another_works(&mut self) {
        let (slot, other) = (self.scene.postgres.slot(), self.scene.daemon().await);
        self.scene.ask(&[&other]).await;
        self.daemon().signal(Signal::SIGSTOP);
        let end =
            format!("SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = '{slot}'");
        self.scene.postgres.execute(&end).await;
        other.status_when("at work", |status| status["state"] == "streaming").await;
        self.daemon().signal(Signal::SIGCONT);
        self.scene.ask(&[self.daemon(), &other]).await;
        self.daemon().status_when("standing by", |status| status["state"] == "standby").await;
        assert_eq!(self.scene.daemons.remove(0).stop().await, Some(0));
        self.scene.daemons.push(other);
        self.scene.ask_all().await;
    }
}

async fn trouble(fault: Fault, node: &Redis) -> Option<JoinHandle<()>> {
    match fault {
        Fault::OutOfMemory => node.command(&["CONFIG", "SET", "maxmemory", "1mb"]).await,
        Fault::CannotSave => {
            node.command::<()>(&["CONFIG", "SET", "save", "3600 1000000"]).await;
            // The file cannot be created.
            std::fs::create_dir(node.dir().join("dump.rdb")).unwrap();
            node.command::<()>(&["BGSAVE"]).await;
            has_saved(node, "err").await;
        }
        Fault::Busy => {
            node.command::<()>(&["CONFIG", "SET", "lua-time-limit", "50"]).await;
            let mut connection = node.connection().await;
            return Some(tokio::spawn(async move {
                let ended = redis::cmd("EVAL").arg("while true do end").arg(0).exec_async(&mut connection).await;
                assert!(ended.unwrap_err().to_string().contains("killed"));
            }));
        }
        Fault::WrongPassword => {
            node.command::<()>(&["ACL", "SETUSER", "prefetchd", "resetpass", ">another"]).await;
            node.command::<i32>(&["CLIENT", "KILL", "USER", "prefetchd"]).await;
        }
        Fault::Frozen => node.signal(Signal::SIGSTOP),
        Fault::ScriptsFlushed => node.command(&["SCRIPT", "FLUSH"]).await,
        other => unreachable!("{other:?} is more than a node's own trouble"),
    }
    None
}

async fn mended(fault: Fault, node: &Redis, script: Option<JoinHandle<()>>) {
    match fault {
        Fault::OutOfMemory => node.command(&["CONFIG", "SET", "maxmemory", "0"]).await,
        Fault::CannotSave => {
            std::fs::remove_dir(node.dir().join("dump.rdb")).unwrap();
            node.command::<()>(&["BGSAVE"]).await;
            has_saved(node, "ok").await;
            node.command::<()>(&["CONFIG", "SET", "save", ""]).await;
            std::fs::remove_file(node.dir().join("dump.rdb")).unwrap();
        }
        Fault::Busy => {
            node.command::<()>(&["SCRIPT", "KILL"]).await;
            script.unwrap().await.unwrap();
        }
        Fault::WrongPassword => {
            let login = node.login();
            let password = format!(">{}", login.split(':').nth(1).unwrap());
            node.command(&["ACL", "SETUSER", "prefetchd", "resetpass", &password]).await
        }
        Fault::Frozen => node.signal(Signal::SIGCONT),
        _ => {}
    }
}

async fn has_saved(node: &Redis, how: &str) {
    let info = async || node.command::<String>(&["INFO", "persistence"]).await;
    let status = format!("rdb_last_bgsave_status:{how}");
    let done = |info: &String| info.contains("rdb_bgsave_in_progress:0") && info.contains(&status);
    eventually("it has tried to save", info, done).await;
}

async fn is_survived(fault: Fault) {
    let mut trial = Trial::of(fault).await;
    for phase in fault.phases() {
        trial.strike(*phase).await;
    }
    trial.end().await;
}

macro_rules! trials {
    ($($name:ident: $fault:ident;)*) => {$(
        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        #[ignore = "up to a minute each: docs/faults.md"]
        async fn $name() {
            is_survived(Fault::$fault).await;
        }
    )*};
}

trials! {
    a_node_that_was_emptied: Flushed;
    a_node_that_comes_back_empty: BackEmpty;
    a_node_that_comes_back_with_an_older_dump: BackWithOldDump;
    a_failover_to_a_replica_that_lagged: LaggingReplica;
    a_lost_record: RecordDeleted;
    a_lost_mark: MarkDeleted;
    a_graceful_failover: FailedOver;
    a_forced_failover: ForcedOver;
    a_takeover_by_a_replica: TakenOver;
    a_frozen_master_that_was_replaced: Elected;
    a_master_that_is_cut_off_from_the_others_and_still_written_to: Partitioned;
    a_slot_that_nobody_serves_for_a_while: Uncovered;
    a_node_without_memory: OutOfMemory;
    a_node_that_cannot_save: CannotSave;
    a_node_that_runs_a_script_without_end: Busy;
    a_password_that_was_changed_on_one_node: WrongPassword;
    a_frozen_node: Frozen;
    a_node_that_is_cut_off: CutOff;
    a_cut_in_the_middle_of_a_batch_to_one_node: CutInMidWrite;
    a_cut_in_the_middle_of_the_replies_of_one_node: CutInMidRead;
    a_node_whose_scripts_were_flushed: ScriptsFlushed;
    something_that_is_no_hash: NoHash;
    the_last_bytes_of_a_daemon_that_was_killed: LateBytes;
    a_frozen_daemon_that_wakes_after_another_has_begun: FrozenWriter;
}
