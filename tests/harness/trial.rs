//! A database, a Redis and a working daemon, struck by a fault in a phase of that work: what happens then, and how long
//! recovery takes.

use super::scene::{Phase, Scene};
use super::traffic::loaded;
use super::watcher::HttpWatcher;
use super::{Daemon, Postgres, Redis, Settings, position};
use nix::sys::signal::Signal;
use prefetchd::lsn::Lsn;
use serde_json::Value;
use std::time::Instant;

/// So many that a refetch is still running when the fault strikes.
const ROWS: u64 = 10_000;

/// How the daemon reacts.
#[derive(Debug, Clone, Copy)]
pub enum Then {
    /// It loads nothing that was not being loaded before.
    Resumes,
    /// It loads every table: `because` is in the log and the status, `heals` is the metric's label.
    Loads { because: &'static str, heals: &'static str },
}

pub struct Trial {
    pub scene: Scene,
    http: HttpWatcher,
    /// Always present, except for a moment.
    daemon: Option<Daemon>,
}

impl Trial {
    pub async fn new(postgres: Postgres) -> Self {
        Self::with(postgres, |settings| settings).await
    }

    /// With settings of its own.
    pub async fn with(postgres: Postgres, change: impl FnOnce(Settings) -> Settings) -> Self {
        let mut scene = Scene::quiet(postgres, Redis::start(), ROWS).await;
        scene.settings = change(scene.settings);
        let http = HttpWatcher::start(scene.traffic, 1);
        let mut trial = Self { scene, http, daemon: None };
        trial.begin().await;
        loaded(trial.daemon()).await;
        trial
    }

    /// From now on Postgres itself may lose something: rows may go backwards if readers are told.
    pub async fn postgres_may_go_back(&mut self) {
        self.scene.watcher.postgres_may_go_back(true).await;
        self.http.postgres_may_go_back(true).await;
    }

    async fn begin(&mut self) {
        let daemon = self.scene.daemon().await;
        daemon.allow_warnings();
        self.http.ask(vec![daemon.address()]).await;
        self.daemon = Some(daemon);
    }

    pub fn daemon(&self) -> &Daemon {
        self.daemon.as_ref().unwrap()
    }

    /// Empties Redis, which is then loaded again.
    pub async fn flush(&mut self) {
        self.scene.watcher.flush(&self.scene.redis).await;
        self.daemon().logged("redis has no checkpoint").await;
        self.settled().await;
    }

    /// Waits until Redis has what is committed now, and the daemon is ready.
    async fn settled(&self) {
        self.daemon().applied(self.scene.postgres.position().await).await;
        self.daemon().ready().await;
    }

    /// Lets a fault strike, waits until everything is well again, and checks all promises.
    pub async fn strike(&mut self, fault: &str, phase: Phase, then: Then, blow: impl AsyncFnOnce(&mut Scene)) {
        // The preparation of a fault may have restarted Postgres.
        self.settled().await;
        if phase != Phase::Idle {
            self.scene.write();
            self.scene.more_is_written(300).await;
        }
        let (before, mut in_hand) = (self.heals().await, None);
        let refused = self.http.refused("healing").await;
        match phase {
            Phase::Idle | Phase::Stream => {}
            // By a refetch.
            Phase::Load => {
                self.daemon().refetches().await;
            }
            // With changes that wait for a Redis which is frozen until Postgres is gone.
            Phase::Drain => {
                let at = self.scene.postgres.position().await;
                self.scene.freeze();
                let received = |status: &Value| position(status, "received") > Some(at);
                let status = self.daemon().status_when("something is in hand", received).await;
                in_hand = position(&status, "received");
                self.daemon().signal(Signal::SIGTERM);
                self.daemon().logged("stopping").await;
            }
            // The daemon is started again after the fault.
            Phase::Down => {
                self.http.ask(Vec::new()).await;
                assert_eq!(self.daemon.take().unwrap().stop().await, Some(0));
            }
        }
        blow(&mut self.scene).await;
        let struck = Instant::now();
        let mut code = None;
        if phase == Phase::Drain {
            self.scene.thaw();
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

        self.scene.is_whole(self.daemon.as_ref().unwrap()).await;
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

    /// Returns the position that Redis has, according to its checkpoint.
    async fn applied(&self) -> Option<Lsn> {
        self.scene.checkpoint().await.map(|checkpoint| checkpoint.lsn.0)
    }

    /// Returns which losses were repaired, and how often. Resuming a load does not count.
    async fn heals(&self) -> Vec<(String, f64)> {
        let metrics = self.daemon().metrics().await.into_iter();
        let heals = metrics.filter(|(name, times)| name.starts_with("prefetchd_heals_total") && *times > 0.0);
        heals.filter(|(name, _)| !name.contains("interrupted")).collect()
    }

    pub async fn end(self) {
        println!("over HTTP: {}", self.http.stop().await);
        self.scene.ends(self.daemon.unwrap()).await;
    }
}
