//! A database with [`Traffic`], a Redis, writers and a watcher. Daemons start and stop, and faults strike.

use super::traffic::{Traffic, Writers, seed};
use super::watcher::Watcher;
use super::{Daemon, Postgres, Redis, Settings, eventually};
use nix::sys::signal::Signal;
use prefetchd::checkpoint::Checkpoint;
use rand::SeedableRng;
use rand::rngs::StdRng;
use std::collections::BTreeMap;
use std::time::Duration;

pub const TTL: Duration = Duration::from_secs(24 * 60 * 60);
/// How long each writer rests after a transaction.
const REST: Duration = Duration::from_millis(8);
const LOADS_AGAIN: &str = "loading every table again";
const LOOKS_AGAIN: &str = "finding out what to do";

/// What the daemon is doing when a fault strikes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Nothing writes.
    Idle,
    /// Eight sessions write.
    Stream,
    /// Eight sessions write while tables are loaded.
    Load,
    /// Eight sessions write, and the daemon was told to stop while it lags.
    Drain,
    /// No daemon is running.
    Down,
}

impl Phase {
    pub const ALL: [Self; 5] = [Self::Idle, Self::Stream, Self::Load, Self::Drain, Self::Down];
    /// The phases with a daemon.
    pub const UP: [Self; 4] = [Self::Idle, Self::Stream, Self::Load, Self::Drain];
}

pub struct Scene {
    pub postgres: Postgres,
    pub redis: Redis,
    pub settings: Settings,
    pub traffic: Traffic,
    pub watcher: Watcher,
    pub rng: StdRng,
    seed: u64,
    writers: Option<Writers>,
    /// Whether Redis is frozen.
    frozen: bool,
}

/// Returns the key of the tables' entries for a checkpoint's key.
pub fn tables_key(checkpoint: &str) -> String {
    checkpoint.replace(":checkpoint", ":tables")
}

impl Scene {
    /// Starts without writers.
    pub async fn quiet(postgres: Postgres, redis: Redis, rows: u64) -> Self {
        let seed = seed();
        let traffic = Traffic::create(&postgres, rows).await;
        let settings = Traffic::settings(&postgres, &redis);
        let watcher = Watcher::start(&redis, &postgres.slot(), traffic, seed).await;
        let rng = StdRng::seed_from_u64(seed);
        Self { postgres, redis, settings, traffic, watcher, rng, seed, writers: None, frozen: false }
    }

    /// Starts with eight writers.
    pub async fn busy(postgres: Postgres, rows: u64) -> Self {
        let mut scene = Self::quiet(postgres, Redis::start(), rows).await;
        scene.write();
        scene
    }

    pub fn write(&mut self) {
        let start = || self.traffic.write(&self.postgres, self.seed, REST);
        self.writers.get_or_insert_with(start);
    }

    /// Stops the writers, and waits until every transaction has ended.
    pub async fn rest(&mut self) {
        if let Some(writers) = self.writers.take() {
            writers.stop().await;
        }
    }

    /// Waits until so many more rows were changed.
    pub async fn more_is_written(&self, rows: u64) {
        let writers = self.writers.as_ref().unwrap();
        let before = writers.changes();
        eventually("more is written", async || writers.changes(), |now| *now > before + rows).await;
    }

    pub async fn daemon(&self) -> Daemon {
        let daemon = Daemon::with(&self.settings).await;
        daemon.allow_warning(LOADS_AGAIN);
        daemon.allow_warning(LOOKS_AGAIN);
        daemon
    }

    pub fn checkpoint_key(&self) -> String {
        format!("prefetchd:{{{}}}:checkpoint", self.postgres.slot())
    }

    /// Returns the checkpoint with every table's entry, as of one moment.
    pub async fn checkpoint(&self) -> Option<Checkpoint> {
        let key = self.checkpoint_key();
        loop {
            let head: Option<Vec<u8>> = self.redis.command(&["GET", &key]).await;
            let entries: BTreeMap<Vec<u8>, Vec<u8>> = self.redis.command(&["HGETALL", &tables_key(&key)]).await;
            if head == self.redis.command::<Option<Vec<u8>>>(&["GET", &key]).await {
                let entries: Vec<_> = entries.into_iter().map(|(name, entry)| (name.into(), entry.into())).collect();
                return head.map(|head| Checkpoint::read(&head, &entries).unwrap());
            }
        }
    }

    /// Changes rows of `items` without deadlocking with the writers.
    pub async fn update(&self, what: &str) {
        let lock = "LOCK TABLE items IN SHARE ROW EXCLUSIVE MODE";
        self.postgres.execute(&format!("{lock}; UPDATE items SET {what}")).await;
    }

    pub fn freeze(&mut self) {
        self.redis.signal(Signal::SIGSTOP);
        self.frozen = true;
    }

    pub fn thaw(&mut self) {
        if std::mem::take(&mut self.frozen) {
            self.redis.signal(Signal::SIGCONT);
        }
    }

    /// Stops the writers, and asserts that everything is as it must be.
    pub async fn is_whole(&mut self, daemon: &Daemon) {
        self.rest().await;
        daemon.ready().await;
        daemon.applied(self.postgres.position().await).await;
        self.traffic.assert_equal(&self.postgres, &self.redis, TTL).await;
        self.watcher.check().await;
    }

    /// The same, then ends the scene.
    pub async fn ends(mut self, daemon: Daemon) {
        self.is_whole(&daemon).await;
        self.watcher.stop().await;
        assert_eq!(daemon.stop().await, Some(0));
    }
}
