//! Random faults on a cluster with rows in all hash slots, with writers and readers that never stop: no key is lost, goes
//! backwards, is torn or comes back.
//!
//! The suite includes a short run. `PREFETCHD_CHAOS_SECONDS=3600` and the ignored test, or `scripts/chaos --cluster`, make
//! a long one. The seed is printed; it decides which faults come in which order, but not how fast the machine is.

use crate::harness::lanes::LaneScene;
use crate::harness::traffic::{BINS, Traffic, seed};
use crate::harness::{Cluster, Postgres, Stop, eventually};
use nix::sys::signal::Signal;
use prefetchd::lanes::Lane;
use rand::Rng;
use rand::seq::{IndexedRandom, SliceRandom};
use serde_json::json;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};
use tokio::time::sleep;

/// How long the long run takes unless it is told.
const SECONDS: u64 = 300;
/// Masters. As many replicas follow, in the same order.
const MASTERS: usize = 3;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Fault {
    KillActive,
    KillStandby,
    KillInLoad,
    /// Its place is taken while it sleeps; then it wakes and writes.
    FreezeActive,
    MoveSlots,
    FailOver,
    FlushMaster,
    /// What heals it dies.
    FlushMasterAndKillActive,
    KillMaster,
    /// The replica that takes over has not heard of the last changes.
    LoseTail,
    FreezeMaster,
    FlushScripts,
    CutConnections,
    CrashPostgres,
    RestartPostgres,
}

const FAULTS: &[Fault] = &[
    Fault::KillActive,
    Fault::KillStandby,
    Fault::KillInLoad,
    Fault::FreezeActive,
    Fault::MoveSlots,
    Fault::FailOver,
    Fault::FlushMaster,
    Fault::FlushMasterAndKillActive,
    Fault::KillMaster,
    Fault::LoseTail,
    Fault::FreezeMaster,
    Fault::FlushScripts,
    Fault::CutConnections,
    Fault::CrashPostgres,
    Fault::RestartPostgres,
];

impl LaneScene {
    /// On a Postgres that may be restarted, with two daemons, whatever happens to them.
    async fn start(seed: u64) -> Self {
        Self::with(Postgres::own(&[]), Cluster::with_replicas().await, 2, seed).await
    }

    async fn kill(&mut self, place: usize) {
        let old = self.daemons.remove(place);
        old.signal(Signal::SIGKILL);
        drop(old);
        let new = self.daemon().await;
        self.daemons.insert(place, new);
        self.ask_all().await;
    }

    fn moment(&mut self) -> Duration {
        Duration::from_millis(self.rng.random_range(0..1_000))
    }

    /// Returns a master and its replica, which is synchronized. They only ever change places with each other.
    async fn pair(&mut self) -> (usize, usize) {
        let lane = Lane::new(self.rng.random_range(0..Lane::ALL)).unwrap();
        let master = self.cluster.master_of(lane).await;
        let replica = (master + MASTERS) % (2 * MASTERS);
        self.cluster.replicates(replica).await;
        (master, replica)
    }

    async fn flush_a_master(&mut self) {
        let (master, _) = self.pair().await;
        self.watcher.may_lose(self.cluster.lanes_of(master).await).await;
        self.cluster.node(master).flush().await;
    }

    async fn strike(&mut self, fault: Fault) {
        let moment = self.moment();
        match fault {
            Fault::KillActive => {
                let active = self.active().await;
                self.kill(active).await;
            }
            Fault::KillStandby => {
                let active = self.active().await;
                self.kill(1 - active).await;
            }
            Fault::KillInLoad => {
                let active = self.active().await;
                self.daemons[active].operate("refetch", &json!({})).await;
                sleep(moment).await;
                self.kill(active).await;
            }
            Fault::FreezeActive => {
                let active = self.active().await;
                let (slot, other) = (self.postgres.slot(), &self.daemons[1 - active]);
                self.ask(&[other]).await;
                self.daemons[active].signal(Signal::SIGSTOP);
                // What it receives until its connection ends is what it writes when it wakes.
                sleep(moment / 2).await;
                let end = format!(
                    "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = '{slot}'"
                );
                self.postgres.execute(&end).await;
                let state = async || other.status().await["state"].as_str().unwrap_or_default().to_owned();
                eventually("the other takes over", state, |state| state == "streaming").await;
                sleep(moment).await;
                self.daemons[active].signal(Signal::SIGCONT);
                self.ask_all().await;
            }
            Fault::MoveSlots => self.move_slots().await,
            Fault::FailOver => {
                let (_, replica) = self.pair().await;
                self.cluster.fail_over_to(replica).await;
            }
            Fault::FlushMaster => self.flush_a_master().await,
            Fault::FlushMasterAndKillActive => {
                self.flush_a_master().await;
                sleep(moment * 3).await;
                let active = self.active().await;
                self.kill(active).await;
            }
            Fault::KillMaster | Fault::LoseTail => {
                let (master, replica) = self.pair().await;
                self.watcher.may_lose(self.cluster.lanes_of(master).await).await;
                if fault == Fault::LoseTail {
                    self.cluster.node(replica).signal(Signal::SIGSTOP);
                    sleep(moment * 2).await;
                }
                self.cluster.kill(master);
                if fault == Fault::LoseTail {
                    self.cluster.node(replica).signal(Signal::SIGCONT);
                }
                self.cluster.take_over(replica).await;
                self.cluster.start_again(master);
                self.cluster.replicates(master).await;
            }
            Fault::FreezeMaster => {
                let (master, _) = self.pair().await;
                self.cluster.node(master).signal(Signal::SIGSTOP);
                sleep(moment).await;
                self.cluster.node(master).signal(Signal::SIGCONT);
            }
            Fault::FlushScripts => {
                let (master, _) = self.pair().await;
                self.cluster.node(master).command::<()>(&["SCRIPT", "FLUSH"]).await;
            }
            Fault::CutConnections => {
                let (master, _) = self.pair().await;
                self.cluster.node(master).command::<i32>(&["CLIENT", "KILL", "USER", "prefetchd"]).await;
            }
            Fault::CrashPostgres => self.postgres.restart(Stop::Immediate),
            Fault::RestartPostgres => self.postgres.restart(Stop::Fast),
        }
    }

    /// Moves some hash slots to other masters, in small steps, so that daemons meet each of them.
    async fn move_slots(&mut self) {
        let crowd = Lane::of(format!("{}1", BINS[1].1).as_bytes());
        let mut lanes = vec![crowd];
        for _ in 0..4 {
            lanes.push(Lane::of(Traffic::item_key(self.traffic.any(&mut self.rng)).as_bytes()));
        }
        lanes.sort_unstable();
        lanes.dedup();
        lanes.shuffle(&mut self.rng);
        let owners = self.cluster.owners().await.unwrap();
        for lane in lanes {
            let from = owners[usize::from(lane.number())];
            let others: Vec<usize> = owners.iter().copied().filter(|owner| *owner != from).take(1).collect();
            let to = others[0];
            self.cluster.begin_move(lane, to).await;
            let page = self.rng.random_range(1..=50).to_string();
            while self.cluster.move_keys(lane, to, &page).await > 0 {
                sleep(Duration::from_millis(self.rng.random_range(0..40))).await;
            }
            self.cluster.end_move(lane, to).await;
        }
    }
}

/// What one fault after the other took.
#[derive(Default)]
struct Record {
    changes: u64,
    ms: BTreeMap<Fault, Vec<u128>>,
}

/// Has these faults strike, and waits until everything is equal again.
async fn survive(scene: &mut LaneScene, faults: &[Fault], record: &mut Record) {
    let load = scene.write();
    sleep(scene.moment()).await;
    println!("{faults:?}");
    let began = Instant::now();
    for fault in faults {
        scene.strike(*fault).await;
    }
    scene.recovered(&load).await;
    record.changes += scene.is_whole(load).await;
    if let [fault] = faults {
        record.ms.entry(*fault).or_default().push(began.elapsed().as_millis());
    }
}

async fn end(scene: LaneScene, seed: u64, record: Record) {
    println!("seed {seed}: {} changes", record.changes);
    for (fault, mut ms) in record.ms {
        ms.sort_unstable();
        println!(
            "{fault:?}: {} alone, until all was equal {} ms p50, {:?} at most",
            ms.len(),
            ms[ms.len() / 2],
            ms.last()
        );
    }
    scene.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_key_of_a_cluster_goes_backwards_or_is_lost() {
    let seed = seed();
    let (mut scene, mut record) = (LaneScene::start(seed).await, Record::default());
    let mut faults = [Fault::KillActive, Fault::FreezeActive, Fault::MoveSlots, Fault::FailOver, Fault::FlushScripts];
    faults.shuffle(&mut scene.rng);
    // What takes a load of all tables to mend comes together.
    survive(&mut scene, &faults[..2], &mut record).await;
    survive(&mut scene, &faults[2..], &mut record).await;
    survive(&mut scene, &[Fault::FlushMasterAndKillActive], &mut record).await;
    end(scene, seed, record).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "minutes: scripts/chaos --cluster"]
async fn whatever_fails_on_a_cluster_nothing_is_lost_or_goes_backwards() {
    let seconds = std::env::var("PREFETCHD_CHAOS_SECONDS").map_or(SECONDS, |s| s.parse().unwrap());
    let seed = seed();
    let (mut scene, mut record) = (LaneScene::start(seed).await, Record::default());
    let until = Instant::now() + Duration::from_secs(seconds);
    while Instant::now() < until {
        // Occasionally the next fault strikes before this one is over.
        let several = if scene.rng.random_bool(0.3) { 2 } else { 1 };
        let faults: Vec<Fault> = (0..several).map(|_| *FAULTS.choose(&mut scene.rng).unwrap()).collect();
        survive(&mut scene, &faults, &mut record).await;
    }
    end(scene, seed, record).await;
}
