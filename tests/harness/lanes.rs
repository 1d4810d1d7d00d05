//! A database with [`Traffic`], a Redis Cluster with rows in all hash slots, daemons, and readers that never stop.

use super::traffic::{BINS, Traffic, Writers};
use super::watcher::HttpWatcher;
use super::watcher::lanes::LanesWatcher;
use super::{Cluster, Daemon, PATIENCE, Postgres, Settings, eventually, position};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::time::{Duration, Instant};
use tokio::time::sleep;

const TTL: Duration = Duration::from_secs(24 * 60 * 60);
/// How long each writer rests after a transaction.
const REST: Duration = Duration::from_millis(20);
const ROWS: u64 = 1_000;

pub struct LaneScene {
    pub postgres: Postgres,
    pub cluster: Cluster,
    pub settings: Settings,
    pub traffic: Traffic,
    pub daemons: Vec<Daemon>,
    pub watcher: LanesWatcher,
    /// One for each table.
    pub http: Vec<HttpWatcher>,
    pub rng: StdRng,
}

/// Sessions that write until they are stopped.
pub struct Load(Vec<Writers>);

impl Load {
    pub fn changes(&self) -> u64 {
        self.0.iter().map(Writers::changes).sum()
    }

    /// Waits until so many more rows were changed.
    pub async fn more(&self, rows: u64) {
        let before = self.changes();
        eventually("more is written", async || self.changes(), |now| *now > before + rows).await;
    }

    pub async fn stop(self) -> u64 {
        let mut changes = 0;
        for writers in self.0 {
            changes += writers.stop().await;
        }
        changes
    }
}

impl LaneScene {
    /// Starts without writers, with so many daemons, the first of which has loaded everything.
    pub async fn with(postgres: Postgres, cluster: Cluster, daemons: usize, seed: u64) -> Self {
        let traffic = Traffic::create_with_bins(&postgres, ROWS).await;
        let settings = Traffic::settings_on_cluster(&postgres, &cluster);
        let watcher = LanesWatcher::start(&cluster, traffic, seed).await;
        let tables = ["items"].into_iter().chain(BINS.map(|(table, _)| table));
        let http = tables.zip(1..).map(|(table, n)| HttpWatcher::of(table, traffic, seed ^ n)).collect();
        let rng = StdRng::seed_from_u64(seed);
        let mut scene = Self { postgres, cluster, settings, traffic, daemons: Vec::new(), watcher, http, rng };
        for _ in 0..daemons {
            let daemon = scene.daemon().await;
            scene.daemons.push(daemon);
            scene.settled().await;
        }
        // The first of them reads items.
        scene.http[0].reads_lists().await;
        scene.ask_all().await;
        scene
    }

    pub async fn daemon(&self) -> Daemon {
        let daemon = Daemon::with(&self.settings).await;
        daemon.allow_warnings();
        daemon
    }

    /// Has readers ask all daemons.
    pub async fn ask_all(&self) {
        self.ask(&self.daemons.iter().collect::<Vec<_>>()).await;
    }

    /// Has readers ask these daemons.
    pub async fn ask(&self, daemons: &[&Daemon]) {
        for http in &self.http {
            http.ask(daemons.iter().map(|daemon| daemon.address()).collect()).await;
        }
    }

    /// How many reads over HTTP were refused with this code.
    pub async fn refused(&self, code: &str) -> u64 {
        let mut refused = 0;
        for http in &self.http {
            refused += http.refused(code).await;
        }
        refused
    }

    /// Starts eight sessions that write to all hash slots, and one whose changes are large or empty a table.
    pub fn write(&mut self) -> Load {
        let seed = self.rng.random();
        Load(vec![self.traffic.write(&self.postgres, seed, REST), self.traffic.write_bins(&self.postgres, seed, REST)])
    }

    /// Starts eight sessions that write to all hash slots, and no TRUNCATE.
    pub fn write_rows(&mut self) -> Load {
        let seed = self.rng.random();
        Load(vec![self.traffic.write(&self.postgres, seed, REST)])
    }

    /// The same, and no row gets another key.
    pub fn write_in_place(&mut self) -> Load {
        let seed = self.rng.random();
        Load(vec![self.traffic.write_in_place(&self.postgres, seed, REST)])
    }

    /// Returns the index of the active daemon, as far as one is active.
    pub async fn active(&self) -> usize {
        for (place, daemon) in self.daemons.iter().enumerate() {
            if !matches!(daemon.status().await["state"].as_str(), Some("standby" | "connecting")) {
                return place;
            }
        }
        0
    }

    /// Waits until the writers go on, and all daemons are ready and have what is written by now.
    pub async fn recovered(&self, load: &Load) {
        load.more(20).await;
        self.settled().await;
    }

    /// Waits until all daemons are ready and have what is written by now.
    pub async fn settled(&self) {
        let lsn = self.postgres.position().await;
        let deadline = Instant::now() + PATIENCE * 2;
        loop {
            let mut states = Vec::new();
            for daemon in &self.daemons {
                let status = daemon.status().await;
                let applied = position(&status, "applied");
                states.push((daemon.get("/readyz").await.status, applied >= Some(lsn), status["state"].to_string()));
            }
            if states.iter().all(|(ready, applied, _)| *ready == 200 && *applied) {
                return;
            }
            assert!(Instant::now() < deadline, "it does not recover: {states:?}");
            sleep(Duration::from_millis(20)).await;
        }
    }

    /// Waits, while nothing writes, until the cluster has what Postgres has, and nothing else.
    pub async fn is_equal(&self) {
        let deadline = Instant::now() + PATIENCE * 2;
        loop {
            let mut wrong = self.traffic.wrong_on(&self.postgres, &self.cluster, TTL).await;
            if wrong.as_ref().is_some_and(Vec::is_empty) {
                wrong = self.traffic.wrong_lists_on(&self.postgres, &self.cluster).await;
                if wrong.as_ref().is_some_and(Vec::is_empty) {
                    return;
                }
            }
            let wrong = wrong.map(|wrong| (wrong.len(), wrong.into_iter().take(20).collect::<Vec<_>>()));
            assert!(Instant::now() < deadline, "never equal: {wrong:#?}");
            sleep(Duration::from_millis(100)).await;
        }
    }

    /// Asserts that readers have seen nothing wrong.
    pub async fn check(&self) {
        self.watcher.check().await;
        for http in &self.http {
            http.check().await;
        }
    }

    /// Stops the writers, and asserts that everything is as it must be.
    pub async fn is_whole(&self, load: Load) -> u64 {
        let changes = load.stop().await;
        self.settled().await;
        self.is_equal().await;
        self.traffic.assert_told_on(&self.postgres, &self.cluster).await;
        self.watcher.all_is_whole().await;
        self.check().await;
        changes
    }

    /// Stops the readers, and the daemons.
    pub async fn stop(self) {
        for http in self.http {
            println!("over HTTP: {}", http.stop().await);
        }
        self.watcher.stop().await;
        for daemon in self.daemons {
            assert_eq!(daemon.stop().await, Some(0));
        }
    }
}
