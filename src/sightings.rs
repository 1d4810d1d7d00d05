//! The newest checkpoint that any reader of this process has seen. If Redis later returns an older one, Redis was
//! rewound.
//!
//! Everything that reads must share it, because whatever one reader saw may have been returned to a client.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// After a restart or a failover of Redis, its data is not served until a daemon has taken over and compared it with
/// what was confirmed to Postgres. If no daemon does so within this time, it is served nevertheless, as the best data
/// available.
const UNPROVEN: Duration = Duration::from_secs(5);

/// `epoch` and `seq` of a checkpoint, which increase with every write.
pub type Version = (u64, u64);

#[derive(Debug, Default)]
pub struct Sightings(Mutex<Seen>);

#[derive(Debug, Default)]
struct Seen {
    newest: Version,
    /// The last one that Redis has acknowledged to this process.
    own: Option<Version>,
    /// How often `newest` decreased.
    falls: u64,
    /// The epoch to which Redis was rewound; 0 if it lost everything. A daemon that took over since then has made the
    /// comparison.
    went_back_to: Option<u64>,
    /// The server's run ID.
    server: Option<Arc<str>>,
    /// The epoch with which the server came up. It is unproven until a daemon takes over with a higher one.
    unproven: Option<(u64, Instant)>,
    /// Whether this process has waited for Redis since it started.
    has_waited: bool,
}

/// What was known before a read began. Concurrent reads may end in any order.
#[derive(Debug, Clone, Copy)]
pub struct Before {
    newest: Version,
    falls: u64,
}

/// Why what was read must not be served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Doubt {
    Lost,
    WentBack,
    Unproven,
}

impl Doubt {
    pub fn as_str(self) -> &'static str {
        match self {
            Doubt::Lost => "Redis has no checkpoint",
            Doubt::WentBack => "Redis went back to an earlier checkpoint",
            Doubt::Unproven => "Redis was started again, or is another one",
        }
    }
}

impl Sightings {
    pub fn before(&self) -> Before {
        let seen = self.lock();
        Before { newest: seen.newest, falls: seen.falls }
    }

    /// Redis has acknowledged this version to this process.
    pub fn wrote(&self, version: Version) {
        let mut seen = self.lock();
        seen.own = Some(version);
        seen.newest = seen.newest.max(version);
    }

    pub fn newest(&self) -> Version {
        self.lock().newest
    }

    /// Checks what a read found on that server. `waits`: this process has just started, and waits for Redis.
    ///
    /// # Errors
    /// If Redis may have been rewound.
    pub fn judge(
        &self,
        before: Before,
        server: &Option<Arc<str>>,
        found: Option<Version>,
        waits: bool,
    ) -> Result<(), Doubt> {
        self.lock().judge(before, server.as_ref(), found, waits, Instant::now())
    }

    fn lock(&self) -> MutexGuard<'_, Seen> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Seen {
    fn judge(
        &mut self,
        before: Before,
        server: Option<&Arc<str>>,
        found: Option<Version>,
        waits: bool,
        now: Instant,
    ) -> Result<(), Doubt> {
        if waits && !self.has_waited {
            // It comes up now, with whatever it has kept.
            self.has_waited = true;
            self.unproven = Some((found.map_or(0, |(epoch, _)| epoch), now + UNPROVEN));
        }
        if let Some(server) = server
            && self.server.replace(Arc::clone(server)).is_some_and(|known| known != *server)
        {
            self.unproven = Some((self.newest.0, now + UNPROVEN));
        }
        let Some(found) = found else {
            self.went_back_to = Some(0);
            return Err(Doubt::Lost);
        };
        if self.falls == before.falls && found < before.newest {
            if self.went_back_to.is_none_or(|epoch| found.0 <= epoch) {
                self.went_back_to = self.went_back_to.max(Some(found.0));
                return Err(Doubt::WentBack);
            }
            (self.newest, self.falls) = (found, self.falls + 1);
        }
        let is_own = self.own == Some(found) && found >= self.newest;
        if self.unproven.is_some_and(|(epoch, until)| found.0 <= epoch && now < until) && !is_own {
            return Err(Doubt::Unproven);
        }
        (self.unproven, self.went_back_to) = (None, None);
        self.newest = self.newest.max(found);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Scene {
        seen: Sightings,
        now: Instant,
    }

    impl Scene {
        fn new() -> Self {
            Scene { seen: Sightings::default(), now: Instant::now() }
        }

        fn reads(&self, server: &str, found: Option<Version>) -> Result<(), Doubt> {
            let before = self.seen.before();
            self.seen.lock().judge(before, Some(&server.into()), found, false, self.now)
        }
    }

    #[test]
    fn what_is_older_than_another_seen_before_is_not_shown_until_somebody_has_taken_over() {
        let scene = Scene::new();
        assert_eq!(scene.reads("a", Some((7, 10))), Ok(()));
        assert_eq!(scene.reads("a", Some((7, 9))), Err(Doubt::WentBack));
        assert_eq!(scene.reads("a", Some((5, 99))), Err(Doubt::WentBack));
        assert_eq!(scene.reads("a", Some((6, 99))), Err(Doubt::WentBack), "it went back to another epoch before");
        assert_eq!(scene.reads("a", Some((7, 11))), Ok(()), "as new as what was seen");
        assert_eq!(scene.reads("a", Some((5, 99))), Err(Doubt::WentBack));
        // Written by a daemon that has never seen 7.
        assert_eq!(scene.reads("a", Some((6, 1))), Ok(()));
        assert_eq!(scene.reads("a", Some((6, 2))), Ok(()));
        assert_eq!(scene.reads("a", Some((6, 1))), Err(Doubt::WentBack));
    }

    #[test]
    fn what_was_lost_is_begun_again_with_any_epoch() {
        let scene = Scene::new();
        assert_eq!(scene.reads("a", Some((7, 10))), Ok(()));
        assert_eq!(scene.reads("a", None), Err(Doubt::Lost));
        assert_eq!(scene.reads("a", Some((2, 1))), Ok(()));
    }

    #[test]
    fn reads_end_in_any_order() {
        let scene = Scene::new();
        let early = scene.seen.before();
        assert_eq!(scene.reads("a", Some((7, 10))), Ok(()));
        let judge = |before, found| scene.seen.judge(before, &None, Some(found), false);
        assert_eq!(judge(early, (7, 9)), Ok(()), "asked for before");
        let before_the_fall = scene.seen.before();
        assert_eq!(scene.reads("a", None), Err(Doubt::Lost));
        assert_eq!(scene.reads("a", Some((2, 1))), Ok(()));
        assert_eq!(judge(before_the_fall, (2, 2)), Ok(()));
        assert_eq!(scene.seen.newest(), (2, 2));
    }

    #[test]
    fn what_comes_up_before_a_daemon_that_waits_for_it_is_shown_when_taken_over_or_after_a_while() {
        for epoch in [7, 8] {
            let mut scene = Scene::new();
            let waits = |scene: &Scene, found| {
                let before = scene.seen.before();
                scene.seen.lock().judge(before, None, Some(found), true, scene.now)
            };
            assert_eq!(waits(&scene, (7, 10)), Err(Doubt::Unproven));
            assert_eq!(waits(&scene, (7, 11)), Err(Doubt::Unproven));
            if epoch == 7 {
                scene.now += UNPROVEN;
            }
            assert_eq!(waits(&scene, (epoch, 12)), Ok(()));
            assert_eq!(waits(&scene, (epoch, 13)), Ok(()));
        }
    }

    #[test]
    fn another_server_is_shown_when_taken_over_or_after_a_while_or_where_it_has_what_was_written() {
        let mut scene = Scene::new();
        assert_eq!(scene.reads("a", Some((7, 10))), Ok(()));
        assert_eq!(scene.reads("b", Some((7, 10))), Err(Doubt::Unproven));
        assert_eq!(scene.reads("b", Some((7, 11))), Err(Doubt::Unproven));
        assert_eq!(scene.reads("b", Some((8, 1))), Ok(()));
        assert_eq!(scene.reads("c", Some((8, 1))), Err(Doubt::Unproven));
        scene.now += UNPROVEN;
        assert_eq!(scene.reads("c", Some((8, 1))), Ok(()));
        scene.seen.wrote((8, 2));
        assert_eq!(scene.reads("d", Some((8, 2))), Ok(()), "nobody has written more");
        assert_eq!(scene.reads("e", Some((8, 1))), Err(Doubt::WentBack));
    }
}
