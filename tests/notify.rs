//! What systemd is told, on a socket of the test's own.

use crate::harness::{Daemon, PATIENCE, Postgres, Redis, Settings};
use std::os::unix::net::UnixDatagram;
use std::time::Instant;

/// Takes the place of systemd.
struct Manager {
    socket: UnixDatagram,
    _dir: tempfile::TempDir,
}

impl Manager {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = UnixDatagram::bind(dir.path().join("notify")).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        Self { socket, _dir: dir }
    }

    fn of(&self, settings: Settings) -> Settings {
        let path = self.socket.local_addr().unwrap().as_pathname().unwrap().display().to_string();
        settings.env("NOTIFY_SOCKET", &path).env("WATCHDOG_USEC", "30000000")
    }

    /// Returns the lines up to the first that is as wanted.
    fn until(&self, wanted: &str) -> Vec<String> {
        let (mut lines, deadline) = (Vec::new(), Instant::now() + PATIENCE);
        while lines.last().is_none_or(|line: &String| !line.starts_with(wanted)) {
            assert!(Instant::now() < deadline, "never {wanted}: {lines:?}");
            let mut buffer = [0; 4096];
            let len = self.socket.recv(&mut buffer).unwrap_or_else(|error| panic!("never {wanted}: {error} {lines:?}"));
            lines.extend(String::from_utf8(buffer[..len].to_vec()).unwrap().lines().map(str::to_owned));
        }
        lines
    }

    /// Returns what has arrived and was not read yet.
    fn rest(&self) -> Vec<String> {
        self.socket.set_nonblocking(true).unwrap();
        let (mut lines, mut buffer) = (Vec::new(), [0; 4096]);
        while let Ok(len) = self.socket.recv(&mut buffer) {
            lines.extend(String::from_utf8(buffer[..len].to_vec()).unwrap().lines().map(str::to_owned));
        }
        self.socket.set_nonblocking(false).unwrap();
        lines
    }
}

fn count(lines: &[String], wanted: &str) -> usize {
    lines.iter().filter(|line| line.starts_with(wanted)).count()
}

#[tokio::test(flavor = "multi_thread")]
async fn systemd_hears_of_every_state_and_is_fed() {
    let (postgres, mut redis, manager) = (Postgres::shared(), Redis::start(), Manager::new());
    let daemon = Daemon::with(&manager.of(Settings::new(&postgres, &redis))).await;
    daemon.ready().await;
    let mut lines = manager.until("STATUS=streaming");
    assert_eq!(count(&lines, "READY=1"), 1, "{lines:?}");
    assert_eq!(daemon.get("/healthz").await.status, 200);
    // From the apply loop.
    lines.extend(manager.until("WATCHDOG=1"));
    lines.extend(manager.until("WATCHDOG=1"));

    // Also while it waits for a server, and the text says for which.
    daemon.allow_warnings();
    redis.stop();
    lines.extend(manager.until("STATUS=redis: "));
    lines.extend(manager.until("WATCHDOG=1"));
    lines.extend(manager.until("WATCHDOG=1"));
    redis.start_again();
    lines.extend(manager.until("STATUS=streaming"));
    assert_eq!(daemon.stop().await, Some(0));
    lines.extend(manager.until("STOPPING=1"));
    lines.extend(manager.rest());
    assert_eq!((count(&lines, "READY=1"), count(&lines, "STOPPING=1")), (1, 1), "{lines:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_counts_as_done_before_any_server_is_there() {
    let (postgres, mut redis, manager) = (Postgres::shared(), Redis::start(), Manager::new());
    redis.stop();
    let settings = Settings::new(&postgres, &redis).text("postgres.url", "postgres://prefetchd@127.0.0.1:1/shop");
    let daemon = Daemon::with(&manager.of(settings)).await;
    daemon.allow_warnings();
    manager.until("READY=1");
    manager.until("STATUS=postgres: cannot reach");
    manager.until("WATCHDOG=1");
    manager.until("WATCHDOG=1");
}

#[tokio::test]
async fn a_configuration_that_is_wrong_is_never_ready() {
    let (postgres, redis, manager) = (Postgres::shared(), Redis::start(), Manager::new());
    let settings = manager.of(Settings::new(&postgres, &redis).text("cache.tttl", "1h"));
    assert_eq!(Daemon::refused(&settings).0, Some(78));
    assert_eq!(manager.rest(), [""; 0]);
}
