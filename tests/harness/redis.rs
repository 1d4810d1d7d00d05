//! A Redis of a test's own.

use super::PATIENCE;
use nix::sys::signal::Signal;
use prefetchd::cli::servers;
use redis::FromRedisValue;
use std::collections::BTreeMap;
use std::path::PathBuf;

pub struct Redis {
    server: servers::Redis,
    _place: servers::Place,
}

impl Redis {
    pub fn start() -> Self {
        Self::with(&[])
    }

    /// With further words of its command line, as `--appendonly yes`. Without, it keeps nothing when it ends.
    pub fn with(args: &[&str]) -> Self {
        let place = servers::Place::new("prefetchd-test-").unwrap();
        let server = servers::Redis::start_new(&place, "redis", args).unwrap_or_else(|error| panic!("{error}"));
        Self { server, _place: place }
    }

    pub fn url(&self) -> String {
        self.server.url()
    }

    pub fn unix_url(&self) -> String {
        format!("unix://{}", self.server.socket().display())
    }

    /// Where its files are.
    pub fn dir(&self) -> PathBuf {
        self.server.socket().parent().unwrap().to_owned()
    }

    pub fn port(&self) -> u16 {
        self.server.port()
    }

    pub async fn connection(&self) -> redis::aio::MultiplexedConnection {
        let client = redis::Client::open(self.url()).unwrap();
        // Half a second by default, which a busy machine takes for many keys.
        let config = redis::AsyncConnectionConfig::new().set_response_timeout(Some(PATIENCE));
        client.get_multiplexed_async_connection_with_config(&config).await.unwrap()
    }

    /// One command, given as words.
    pub async fn command<T: FromRedisValue>(&self, words: &[&str]) -> T {
        let (name, args) = words.split_first().unwrap();
        redis::cmd(name).arg(args).query_async(&mut self.connection().await).await.unwrap()
    }

    /// A row as it lies there; empty where there is none.
    pub async fn hash(&self, key: &str) -> BTreeMap<String, String> {
        self.command(&["HGETALL", key]).await
    }

    pub async fn keys(&self, pattern: &str) -> Vec<String> {
        let mut keys: Vec<String> = self.command(&["KEYS", pattern]).await;
        keys.sort();
        keys
    }

    /// Milliseconds; negative where there is no key or no TTL.
    pub async fn pttl(&self, key: &str) -> i64 {
        self.command(&["PTTL", key]).await
    }

    pub async fn flush(&self) {
        self.command::<()>(&["FLUSHALL"]).await;
    }

    pub fn signal(&self, signal: Signal) {
        self.server.signal(signal);
    }

    /// In order: it saves, where it was told to.
    pub fn stop(&mut self) {
        self.server.signal(Signal::SIGTERM);
        self.server.wait().unwrap();
    }

    pub fn kill(&mut self) {
        self.server.signal(Signal::SIGKILL);
        self.server.wait().unwrap();
    }

    /// Again, on the same port.
    pub fn start_again(&mut self) {
        self.server.start().unwrap_or_else(|error| panic!("{error}"));
    }
}
