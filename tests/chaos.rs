//! Random faults everywhere, with eight writers and readers that never stop: nothing is lost, goes backwards, is torn
//! or comes back, no list disagrees with its rows, and no change is announced twice or not at all.
//!
//! The suite includes a short run. `PREFETCHD_CHAOS_SECONDS=3600` or `scripts/chaos` runs a long one. The seed is
//! printed; it decides which faults come in which order, but not how fast the machine is.

use crate::harness::consumer::Consumer;
use crate::harness::proxy::Proxy;
use crate::harness::traffic::{STREAM, Traffic, Writers, seed};
use crate::harness::watcher::{HttpWatcher, Watcher};
use crate::harness::{Daemon, PATIENCE, Postgres, Redis, Settings, Stop, eventually, position};
use nix::sys::signal::Signal;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use serde_json::json;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};
use tokio::time::{sleep, timeout};

const TTL: Duration = Duration::from_secs(24 * 60 * 60);
const REST: Duration = Duration::from_millis(10);
const ROWS: u64 = 3_000;
const SECONDS: u64 = 15;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Fault {
    KillActive,
    KillStandby,
    FreezeActive,
    StopActive,
    EndWalsender,
    CutRedis,
    FreezeRedis,
    FillRedis,
    FlushRedis,
    RestartRedis,
    RollRedisBack,
    DropCheckpoint,
    DropSlot,
    CrashPostgres,
    RestartPostgres,
    DelayRedis,
    ThrottleRedis,
    SilenceRedis,
    CutInMidWrite,
    HoldTail,
    FailOverRedis,
    SilencePostgres,
    CutInMidStream,
    Refetch,
    Verify,
}

const FAULTS: &[Fault] = &[
    Fault::KillActive,
    Fault::KillStandby,
    Fault::FreezeActive,
    Fault::StopActive,
    Fault::EndWalsender,
    Fault::CutRedis,
    Fault::FreezeRedis,
    Fault::FillRedis,
    Fault::FlushRedis,
    Fault::RestartRedis,
    Fault::RollRedisBack,
    Fault::DropCheckpoint,
    Fault::DropSlot,
    Fault::CrashPostgres,
    Fault::RestartPostgres,
    Fault::DelayRedis,
    Fault::ThrottleRedis,
    Fault::SilenceRedis,
    Fault::CutInMidWrite,
    Fault::HoldTail,
    Fault::FailOverRedis,
    Fault::SilencePostgres,
    Fault::CutInMidStream,
    Fault::Refetch,
    Fault::Verify,
];

impl Fault {
    fn loses_what_redis_has(self) -> bool {
        matches!(self, Fault::FlushRedis | Fault::RestartRedis | Fault::RollRedisBack | Fault::FailOverRedis)
    }
}

struct Scene {
    postgres: Postgres,
    /// The daemons' path to Postgres.
    to_postgres: Proxy,
    /// The Redis in use.
    redis: Redis,
    /// For a failover; otherwise unused.
    spare: Redis,
    to_redis: Proxy,
    watcher_to_redis: Proxy,
    settings: Settings,
    /// Two, whatever happens to them.
    daemons: Vec<Daemon>,
    watcher: Watcher,
    http: HttpWatcher,
    /// Of the change stream of the Redis in use.
    consumer: Consumer,
    rng: StdRng,
}

impl Scene {
    async fn daemon(&self) -> Daemon {
        let daemon = Daemon::with(&self.settings).await;
        daemon.allow_warnings();
        daemon
    }

    /// Returns the index of the active daemon, as far as one is active.
    async fn active(&self) -> usize {
        for (place, daemon) in self.daemons.iter().enumerate() {
            if !matches!(daemon.status().await["state"].as_str(), Some("standby" | "connecting")) {
                return place;
            }
        }
        0
    }

    async fn replace(&mut self, place: usize, how: Signal) {
        let old = self.daemons.remove(place);
        old.signal(how);
        drop(old);
        let new = self.daemon().await;
        self.daemons.insert(place, new);
        self.http.ask(self.daemons.iter().map(Daemon::address).collect()).await;
    }

    /// Occasionally so long that sessions are given up and another daemon takes over.
    fn short_or_long(&mut self, short: Duration) -> Duration {
        if self.rng.random_bool(0.3) { Duration::from_secs(14) } else { short }
    }

    async fn strike(&mut self, fault: Fault) {
        let slot = self.postgres.slot();
        let holder = format!("FROM pg_replication_slots WHERE slot_name = '{slot}'");
        let short = Duration::from_millis(self.rng.random_range(200..4_000));
        if fault.loses_what_redis_has() {
            self.consumer.follow(&self.redis.url(), STREAM).await;
            // It reads the stream from its beginning afterwards, as far as there is one.
            self.consumer = Consumer::of_large_rows();
        }
        match fault {
            Fault::KillActive => {
                let active = self.active().await;
                self.replace(active, Signal::SIGKILL).await;
            }
            Fault::KillStandby => {
                let active = self.active().await;
                self.replace(1 - active, Signal::SIGKILL).await;
            }
            Fault::StopActive => {
                let active = self.active().await;
                self.replace(active, Signal::SIGTERM).await;
            }
            Fault::FreezeActive => {
                let active = self.active().await;
                let long = self.short_or_long(short);
                self.http.ask(vec![self.daemons[1 - active].address()]).await;
                self.daemons[active].signal(Signal::SIGSTOP);
                sleep(long).await;
                self.daemons[active].signal(Signal::SIGCONT);
                self.http.ask(self.daemons.iter().map(Daemon::address).collect()).await;
            }
            Fault::EndWalsender => {
                self.postgres.execute(&format!("SELECT pg_terminate_backend(active_pid) {holder}")).await;
            }
            Fault::CutRedis => self.redis.cut_writers().await,
            Fault::FreezeRedis => {
                self.redis.signal(Signal::SIGSTOP);
                sleep(short).await;
                self.redis.signal(Signal::SIGCONT);
            }
            Fault::FillRedis => {
                self.redis.command::<()>(&["CONFIG", "SET", "maxmemory", "1mb"]).await;
                sleep(short).await;
                self.redis.command::<()>(&["CONFIG", "SET", "maxmemory", "0"]).await;
            }
            Fault::FlushRedis => self.watcher.flush(&self.redis).await,
            Fault::RestartRedis => {
                let _eyes = self.watcher.blind().await;
                // It must not come back with what it saved earlier.
                let _ = std::fs::remove_file(self.redis.dir().join("dump.rdb"));
                self.redis.kill();
                self.redis.start_again();
            }
            Fault::RollRedisBack => {
                self.redis.command::<()>(&["SAVE"]).await;
                sleep(short).await;
                let _eyes = self.watcher.blind().await;
                self.redis.kill();
                self.redis.start_again();
            }
            Fault::DropCheckpoint => {
                self.redis.command::<i32>(&["DEL", &format!("prefetchd:{{{slot}}}:checkpoint")]).await;
            }
            Fault::DropSlot => self.postgres.drop_slot().await,
            Fault::CrashPostgres => self.postgres.restart(Stop::Immediate),
            Fault::RestartPostgres => self.postgres.restart(Stop::Fast),
            Fault::DelayRedis => {
                self.to_redis.delay(Duration::from_millis(self.rng.random_range(2..200)));
                sleep(short).await;
                self.to_redis.heal();
            }
            Fault::ThrottleRedis => {
                self.to_redis.throttle(Some(self.rng.random_range(5_000..200_000)));
                sleep(short).await;
                self.to_redis.heal();
            }
            Fault::SilenceRedis | Fault::SilencePostgres => {
                let long = self.short_or_long(short);
                let way = if fault == Fault::SilenceRedis { &self.to_redis } else { &self.to_postgres };
                way.black_hole();
                sleep(long).await;
                way.heal();
            }
            Fault::CutInMidWrite => {
                let bytes = self.rng.random_range(1..50_000);
                // Writers never stop, but a daemon may be unavailable.
                let _ = timeout(PATIENCE, self.to_redis.cut_in_mid_write(bytes)).await;
            }
            // What the old daemon has sent arrives after the new one has started.
            Fault::HoldTail => {
                self.to_redis.hold();
                sleep(short).await;
                let active = self.active().await;
                self.replace(active, Signal::SIGKILL).await;
                sleep(short).await;
                self.to_redis.release();
            }
            Fault::FailOverRedis => {
                let port = self.redis.port().to_string();
                self.spare.command::<()>(&["REPLICAOF", "127.0.0.1", &port]).await;
                let info = async || self.spare.command::<String>(&["INFO", "replication"]).await;
                eventually("the replica is there", info, |info| info.contains("master_link_status:up")).await;
                self.spare.command::<()>(&["REPLICAOF", "NO", "ONE"]).await;
                // The replica lags now.
                sleep(short).await;
                let _eyes = self.watcher.blind().await;
                self.to_redis.lead_to(self.spare.port());
                self.watcher_to_redis.lead_to(self.spare.port());
                std::mem::swap(&mut self.redis, &mut self.spare);
            }
            Fault::CutInMidStream => {
                let bytes = self.rng.random_range(1..200_000);
                let _ = timeout(PATIENCE, self.to_postgres.cut_in_mid_read(bytes)).await;
            }
            Fault::Refetch | Fault::Verify => {
                let operation = if fault == Fault::Refetch { "refetch" } else { "verify" };
                let active = self.active().await;
                // Whatever comes of it: the operation may be refused or interrupted.
                self.daemons[active].operate(operation, &json!({})).await;
            }
        }
    }

    async fn recovered(&self, writers: &Writers) {
        let before = writers.changes();
        eventually("writers go on", async || writers.changes(), |now| *now > before + 20).await;
        let lsn = self.postgres.position().await;
        let answers = async || {
            let mut states = Vec::new();
            for daemon in &self.daemons {
                let status = daemon.status().await;
                let applied = position(&status, "applied");
                states.push((daemon.get("/readyz").await.status, applied >= Some(lsn), status["state"].to_string()));
            }
            states
        };
        let deadline = Instant::now() + PATIENCE * 2;
        loop {
            let states = answers().await;
            if states.iter().all(|(ready, applied, _)| *ready == 200 && *applied) {
                return;
            }
            let logs = || self.daemons.iter().map(Daemon::log_text).collect::<Vec<_>>().join("\n----\n");
            assert!(Instant::now() < deadline, "it does not recover: {states:?}\n{}", logs());
            sleep(Duration::from_millis(20)).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_fails_nothing_is_lost_or_goes_backwards() {
    let seconds = std::env::var("PREFETCHD_CHAOS_SECONDS").map_or(SECONDS, |s| s.parse().unwrap());
    let seed = seed();
    let (postgres, redis, spare) = (Postgres::own(&[]), Redis::start(), Redis::start());
    let traffic = Traffic::create(&postgres, ROWS).await;
    let (to_postgres, to_redis) = (Proxy::to_postgres(&postgres).await, Proxy::to_redis(&redis).await);
    let settings = Traffic::settings_with_lists(&postgres, &redis);
    let settings = settings.text("postgres.url", &to_postgres.url()).text("redis.url", &to_redis.url());
    spare.daemon_user().grant(settings.redis_rules());
    let watcher_to_redis = Proxy::new(&redis.url(), redis.port()).await;
    let watcher = Watcher::at(watcher_to_redis.url(), &postgres.slot(), traffic, seed).await;
    let http = HttpWatcher::start(traffic, seed ^ 1);
    let (daemons, rng) = (Vec::new(), StdRng::seed_from_u64(seed));
    let mut scene = Scene {
        postgres,
        to_postgres,
        redis,
        spare,
        to_redis,
        watcher_to_redis,
        settings,
        daemons,
        watcher,
        http,
        consumer: Consumer::of_large_rows(),
        rng,
    };
    scene.watcher.reads_lists().await;
    scene.http.reads_lists().await;
    for _ in 0..2 {
        let daemon = scene.daemon().await;
        scene.daemons.push(daemon);
    }
    scene.http.ask(scene.daemons.iter().map(Daemon::address).collect()).await;
    let writers = traffic.write(&scene.postgres, seed, REST);
    scene.recovered(&writers).await;

    let until = Instant::now() + Duration::from_secs(seconds);
    let mut faults: BTreeMap<Fault, Vec<u128>> = BTreeMap::new();
    while Instant::now() < until {
        let fault = *FAULTS.choose(&mut scene.rng).unwrap();
        println!("{fault:?}");
        let began = Instant::now();
        scene.strike(fault).await;
        // Occasionally the next fault strikes before this one is over.
        let overlaps = scene.rng.random_bool(0.3);
        if overlaps {
            sleep(Duration::from_millis(scene.rng.random_range(0..800))).await;
        } else {
            scene.recovered(&writers).await;
        }
        faults.entry(fault).or_default().extend((!overlaps).then(|| began.elapsed().as_millis()));
        scene.watcher.check().await;
        scene.http.check().await;
    }
    scene.recovered(&writers).await;
    let changes = writers.stop().await;
    scene.recovered_without_writes().await;
    traffic.assert_equal(&scene.postgres, &scene.redis, TTL).await;
    traffic.assert_listed_and_told(&scene.postgres, &scene.redis, &mut scene.consumer).await;
    println!("{} announcements", scene.consumer.seen.len());
    println!("seed {seed}: {changes} changes in {seconds} s");
    for (fault, mut times) in faults {
        times.sort_unstable();
        let at = |percent: usize| times.get((times.len() * percent / 100).min(times.len().saturating_sub(1)));
        println!(
            "{fault:?}: {} alone, until all was well again {:?} ms p50, {:?} ms at most",
            times.len(),
            at(50),
            times.last()
        );
    }
    let Scene { watcher, http, .. } = scene;
    println!("over HTTP: {}", http.stop().await);
    watcher.stop().await;
}

impl Scene {
    async fn recovered_without_writes(&self) {
        let lsn = self.postgres.position().await;
        for daemon in &self.daemons {
            daemon.applied(lsn).await;
            daemon.ready().await;
        }
    }
}
