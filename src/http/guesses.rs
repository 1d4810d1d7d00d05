//! Requests with a wrong token are slowed down and logged. Neither costs more as their number grows.

use crate::code::Code;
use std::net::SocketAddr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::Semaphore;

/// Delay of the answer to a wrong token.
const SLOWED: Duration = Duration::from_secs(1);
/// At most this many connections at once are held for the delay. Others are answered and closed immediately.
const HELD: usize = 16;
const SAID_EVERY: Duration = Duration::from_secs(10);

pub(super) struct Guesses {
    held: Semaphore,
    told: Mutex<Told>,
}

#[derive(Default)]
struct Told {
    last: Option<Instant>,
    /// Wrong tokens since then that have not been logged.
    untold: u64,
}

impl Guesses {
    pub(super) fn new() -> Self {
        Self { held: Semaphore::new(HELD), told: Mutex::default() }
    }

    pub(super) async fn wrong(&self, peer: SocketAddr) {
        self.say(peer);
        if let Ok(_held) = self.held.try_acquire() {
            tokio::time::sleep(SLOWED).await;
        }
    }

    fn say(&self, peer: SocketAddr) {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if told.last.is_some_and(|last| last.elapsed() < SAID_EVERY) {
            told.untold += 1;
            return;
        }
        let before = std::mem::take(&mut told.untold);
        told.last = Some(Instant::now());
        let code = Code::Unauthorized.as_str();
        tracing::warn!(code, %peer, before, "an operation with a wrong admin token was refused, {before} others since the last such line");
    }
}
