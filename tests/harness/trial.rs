//! A database, a Redis and a daemon at work, struck by a fault in a phase of that work: what happens then, and how long
//! it takes until all is well again.

use super::traffic::{Traffic, Writers, loaded, seed};
use super::watcher::{HttpWatcher, Watcher};
use super::{Daemon, Postgres, Redis, Settings, Stop, eventually, post};
use nix::sys::signal::Signal;
use prefetchd::checkpoint::Checkpoint;
use prefetchd::lsn::Lsn;
use serde_json::Value;
use std::time::{Duration, Instant};

const TTL: Duration = Duration::from_secs(24 * 60 * 60);
const REST: Duration = Duration::from_millis(8);
/// So many that a refetch is still at work when the blow comes.
const ROWS: u64 = 10_000;

/// What the daemon is at when the blow comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Nobody writes.
    Idle,
    /// Eight writers.
    Stream,
    /// A refetch, beside eight writers.
    Load,
    /// It was told to stop while changes wait for a Redis that is frozen until Postgres is gone.
    Drain,
    /// There is none: it is started after the blow.
    Down,
}

/// What it makes of it.
#[derive(Debug, Clone, Copy)]
pub enum Then {
    /// Nothing is loaded that was not being loaded before.
    Resumes,
    /// Every table is loaded: `because` is in the log and the status, `heals` is the metric's label.
    Loads { because: &'static str, heals: &'static str },
}

/// What a fault has in its hands.
pub struct Stage {
    pub postgres: Postgres,
    pub redis: Redis,
    frozen: bool,
}

impl Stage {
    /// In a drain, Redis goes on as soon as Postgres is gone.
    pub fn stop_postgres(&mut self, how: Stop) {
        self.postgres.stop(how);
        self.thaw();
    }

    /// Changes rows of `items`, beside writers that would deadlock with it otherwise.
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
}

pub struct Trial {
    pub stage: Stage,
    pub settings: Settings,
    pub traffic: Traffic,
    writers: Option<Writers>,
    watcher: Watcher,
    http: HttpWatcher,
    /// There but for a moment.
    daemon: Option<Daemon>,
}

impl Trial {
    pub async fn new(postgres: Postgres) -> Self {
        Self::with(postgres, |settings| settings).await
    }

    /// With other settings than every test's.
    pub async fn with(postgres: Postgres, change: impl FnOnce(Settings) -> Settings) -> Self {
        let seed = seed();
        let redis = Redis::start();
        let traffic = Traffic::create(&postgres, ROWS).await;
        let settings = change(Traffic::settings(&postgres, &redis));
        let watcher = Watcher::start(&redis, &postgres.slot(), traffic, seed).await;
        let http = HttpWatcher::start(traffic, seed ^ 1);
        let stage = Stage { postgres, redis, frozen: false };
        let mut trial = Self { stage, settings, traffic, writers: None, watcher, http, daemon: None };
        trial.begin().await;
        loaded(trial.daemon()).await;
        trial
    }

    /// From now on Postgres itself may lose something: that may go back where readers are told.
    pub async fn postgres_may_go_back(&mut self) {
        self.watcher.postgres_may_go_back(true).await;
        self.http.postgres_may_go_back(true).await;
    }

    async fn begin(&mut self) {
        let daemon = Daemon::with(&self.settings).await;
        daemon.allow_warnings();
        self.http.ask(vec![daemon.address()]).await;
        self.daemon = Some(daemon);
    }

    pub fn daemon(&self) -> &Daemon {
        self.daemon.as_ref().unwrap()
    }

    async fn write(&mut self) {
        let writers = self.traffic.write(&self.stage.postgres, rand::random(), REST);
        eventually("they write", async || writers.changes(), |changes| *changes > 300).await;
        self.writers = Some(writers);
    }

    async fn quiet(&mut self) {
        if let Some(writers) = self.writers.take() {
            writers.stop().await;
        }
    }

    /// Redis loses everything, and gets it by a load.
    pub async fn flush(&mut self) {
        self.watcher.flush(&self.stage.redis).await;
        self.daemon().logged("redis has no checkpoint").await;
        self.settled().await;
    }

    /// It has what is committed now, and is ready.
    async fn settled(&self) {
        self.daemon().applied(self.stage.postgres.position().await).await;
        self.daemon().ready().await;
    }

    /// Strikes, waits until all is well again, and looks at everything that was promised.
    pub async fn strike(&mut self, fault: &str, phase: Phase, then: Then, blow: impl AsyncFnOnce(&mut Stage)) {
        // What prepares a fault may have restarted Postgres.
        self.settled().await;
        if phase != Phase::Idle {
            self.write().await;
        }
        let (before, mut in_hand) = (self.heals().await, None);
        let refused = self.http.refused("healing").await;
        match phase {
            Phase::Idle | Phase::Stream => {}
            Phase::Load => {
                let address = self.daemon().address();
                // Again and again, until the blow ends it.
                tokio::spawn(async move {
                    let refetch = || post(address, "/v1/admin/refetch", &["Content-Type: application/json"], "{}");
                    while refetch().await.is_ok_and(|answer| answer.status == 200) {}
                });
                self.daemon().status_when("loading", |status| status["operation"] == "refetch").await;
            }
            Phase::Drain => {
                let at = self.stage.postgres.position().await;
                self.stage.freeze();
                let received = |status: &Value| lsn(status, "received");
                let status = self.daemon().status_when("something is in hand", |s| received(s) > Some(at)).await;
                in_hand = received(&status);
                self.daemon().signal(Signal::SIGTERM);
                self.daemon().logged("stopping").await;
            }
            Phase::Down => {
                self.http.ask(Vec::new()).await;
                assert_eq!(self.daemon.take().unwrap().stop().await, Some(0));
            }
        }
        blow(&mut self.stage).await;
        let struck = Instant::now();
        let mut code = None;
        if phase == Phase::Drain {
            self.stage.thaw();
            self.http.ask(Vec::new()).await;
            code = self.daemon.take().unwrap().ended().await;
            assert!(code == Some(1) || code == Some(0) && self.applied().await >= in_hand, "{code:?}");
        }
        let new = self.daemon.is_none();
        if new {
            self.begin().await;
        }
        self.settled().await;
        let took = struck.elapsed();
        let status = self.daemon().status().await;
        let reason = status["last_load"]["reason"].as_str().unwrap_or_default().to_owned();
        println!("{fault} | {phase:?} | {then:?} | {} ms | exit {code:?} | {reason}", took.as_millis());

        self.quiet().await;
        self.settled().await;
        self.traffic.assert_equal(&self.stage.postgres, &self.stage.redis, TTL).await;
        self.watcher.check().await;
        self.http.check().await;
        let before = if new { Vec::new() } else { before };
        let healed: Vec<_> = self.heals().await.into_iter().filter(|heal| !before.contains(heal)).collect();
        match then {
            Then::Resumes => assert!(healed.is_empty(), "{healed:?}\n{}", self.daemon().log_text()),
            Then::Loads { because, heals } => {
                let log = self.daemon().log_text();
                assert!(healed.iter().any(|(what, _)| what.contains(heals)), "{healed:?}\n{log}");
                assert!(reason.contains(because), "{reason:?}\n{log}");
                assert!(log.contains(because) && log.contains("\"healing\""), "{log}");
                assert!(self.http.refused("healing").await > refused, "no reader was told\n{log}");
            }
        }
    }

    /// What Redis has, by its own account.
    async fn applied(&self) -> Option<Lsn> {
        let key = format!("prefetchd:{{{}}}:checkpoint", self.stage.postgres.slot());
        let json: Vec<u8> = self.stage.redis.command(&["GET", &key]).await;
        Some(Checkpoint::from_json(&json).unwrap().lsn.0)
    }

    /// What was lost and made good, and how often. A load that is taken up again is none of that.
    async fn heals(&self) -> Vec<(String, f64)> {
        let metrics = self.daemon().metrics().await.into_iter();
        let heals = metrics.filter(|(name, times)| name.starts_with("prefetchd_heals_total") && *times > 0.0);
        heals.filter(|(name, _)| !name.contains("interrupted")).collect()
    }

    pub async fn end(mut self) {
        self.quiet().await;
        println!("over HTTP: {}", self.http.stop().await);
        self.watcher.stop().await;
        assert_eq!(self.daemon.take().unwrap().stop().await, Some(0));
    }
}

fn lsn(status: &Value, which: &str) -> Option<Lsn> {
    status["lsn"][which].as_str().and_then(|text| text.parse().ok())
}
