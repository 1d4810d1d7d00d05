//! Supervises: runs one session after the other, and reports each obstacle once.

use super::apply;
use super::bootstrap::{self, Session};
use super::context::{Context, feed_watchdog};
use super::{BridgeError, Disposition};
use crate::admin::{Answer, Asked, Operation, Refusal};
use crate::code::Code;
use crate::error::Backoff;
use crate::history::Kind;
use crate::lsn::Lsn;
use crate::metrics::Peer;
use crate::status::{Level, State};
use std::collections::HashSet;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// A session that lasted this long shows that the earlier problem is solved.
const SETTLED: Duration = Duration::from_secs(3);
/// How often a change that Postgres cannot send is retried: somebody may have fixed it.
const STUCK_RETRY: Duration = Duration::from_secs(30);

/// Returns once the daemon is stopped.
///
/// # Errors
/// At the start, one that retrying cannot fix ([`Disposition::Stop`]); at the stop, [`BridgeError::NotDrained`].
pub async fn supervise(ctx: &Context, asked: &mut mpsc::Receiver<Asked>) -> Result<(), BridgeError> {
    let mut attempts = Attempts { ever_began: ctx.has_begun(), ..Attempts::default() };
    loop {
        let began = tokio::select! {
            () = ctx.stop.cancelled() => return Ok(()),
            began = alive(ctx, asked, bootstrap::begin(ctx)) => began,
        };
        let error = match began {
            Ok(session) => match attempts.work(ctx, session, asked).await? {
                None => return Ok(()),
                Some(error) => error,
            },
            Err(error) => error,
        };
        let delay = attempts.failed(ctx, error)?;
        tokio::select! {
            () = ctx.stop.cancelled() => return Ok(()),
            () = alive(ctx, asked, until_wanted(ctx, delay)) => {}
        }
    }
}

/// The history of the attempts so far.
#[derive(Default)]
struct Attempts {
    backoff: Backoff,
    /// Separate: a server that returns after a long outage is asked what it has lost without that delay.
    reloads: Backoff,
    ever_began: bool,
    said: HashSet<String>,
}

impl Attempts {
    /// Runs the session. `None`: the daemon was stopped, and everything received is in Redis.
    async fn work(
        &mut self,
        ctx: &Context,
        session: Session,
        asked: &mut mpsc::Receiver<Asked>,
    ) -> Result<Option<BridgeError>, BridgeError> {
        self.ever_began = true;
        let worked_from = Instant::now();
        match apply::work(ctx, session, asked).await {
            Ok(()) => Ok(None),
            Err(error @ BridgeError::NotDrained(_)) => Err(error),
            Err(error) if ctx.stop.is_cancelled() => Err(BridgeError::NotDrained(error.to_string())),
            Err(error) => {
                // A session that fails at once has not solved anything.
                if worked_from.elapsed() > SETTLED {
                    self.backoff.reset();
                    self.reloads.reset();
                    self.said.clear();
                }
                // Counted once for each lost connection, however many attempts the next one takes.
                if error.disposition() == Disposition::Retry {
                    ctx.metrics.reconnected(peer_of(&error));
                }
                Ok(Some(error))
            }
        }
    }

    /// Reports the failure. Returns how long to wait before the next attempt.
    fn failed(&mut self, ctx: &Context, error: BridgeError) -> Result<Duration, BridgeError> {
        // A standby has started successfully, too.
        self.ever_began |= ctx.state() == State::Standby;
        ctx.learn_from(&error);
        let delay = match error.disposition() {
            Disposition::Reload => self.reloads.next_delay(),
            Disposition::Retry | Disposition::Stop => self.backoff.next_delay(),
        };
        ctx.update(|status| status.beside_stream = None);
        // Once the change is to be skipped, further failures have other causes.
        let memory = ctx.memory();
        if let Some(at) = memory.stuck_at().filter(|_| !memory.skip) {
            self.is_stuck(ctx, at, &error);
            return Ok(STUCK_RETRY);
        }
        let (code, text) = (error.code(), error.to_string());
        match error.disposition() {
            Disposition::Stop if !self.ever_began => return Err(error),
            Disposition::Stop => {
                if self.said.insert(text.clone()) {
                    tracing::error!(code = code.as_str(), error = text, "cannot go on until this is mended");
                }
                ctx.set_state(State::Stalled, Some(code), Some(text));
                return Ok(ctx.timing.setup_retry);
            }
            Disposition::Reload => {
                tracing::warn!(
                    code = code.as_str(),
                    because = text,
                    "what redis or postgres holds has changed, finding out what to do"
                );
                ctx.history.happened(Level::Warning, Kind::Interrupted, None, text.clone());
                ctx.set_state(State::Healing, Some(code), Some(text));
                // What Redis has is unknown until the next attempt reads it. Until then this daemon is not ready, and does
                // not report rows as missing.
                ctx.update(|status| {
                    status.fresh_as_of = None;
                    status.tables.iter_mut().for_each(|table| (table.state, table.blocked) = (None, None));
                });
            }
            Disposition::Retry => {
                let state = match (&error, peer_of(&error), self.ever_began) {
                    (BridgeError::NoRoom(_), _, _) | (_, Peer::Redis, true) => State::Stalled,
                    (_, Peer::Redis | Peer::Postgres, _) => State::Connecting,
                };
                ctx.set_state(state, Some(code), Some(text));
            }
        }
        Ok(delay)
    }

    fn is_stuck(&mut self, ctx: &Context, at: Lsn, error: &BridgeError) {
        let text = format!(
            "postgres cannot send the change at {at}, and nothing after it, until that can be sent or is skipped with \
             prefetchd skip {at}, which loads every table again: {error}"
        );
        if self.said.insert(text.clone()) {
            tracing::error!(code = Code::StreamStuck.as_str(), error = text, "the stream is stuck");
        }
        ctx.set_state(State::Stalled, Some(Code::StreamStuck), Some(text));
    }
}

fn peer_of(error: &BridgeError) -> Peer {
    match error {
        BridgeError::Sink(_) | BridgeError::NoRoom(_) | BridgeError::RedisSilent(_) => Peer::Redis,
        _ => Peer::Postgres,
    }
}

/// Feeds the watchdog and answers operators while `work` waits for a server: systemd must not restart the daemon because
/// of that.
async fn alive<T>(ctx: &Context, asked: &mut mpsc::Receiver<Asked>, work: impl Future<Output = T>) -> T {
    let mut feed = tokio::time::interval(Duration::from_secs(1));
    tokio::pin!(work);
    loop {
        tokio::select! {
            done = &mut work => return done,
            _ = feed.tick() => feed_watchdog(),
            Some(Asked { operation, answer }) = asked.recv() => {
                // The requester may be gone.
                let _ = answer.send(without_a_session(ctx, &operation));
            }
        }
    }
}

/// Waits before the next attempt. An operator who skips a change ends the wait.
async fn until_wanted(ctx: &Context, delay: Duration) {
    tokio::select! {
        () = tokio::time::sleep(delay) => {}
        () = ctx.skip_wanted() => {}
    }
}

fn without_a_session(ctx: &Context, operation: &Operation) -> Result<Answer, Refusal> {
    match operation {
        // Nothing is being applied, and the next session starts paused.
        Operation::Pause if ctx.state() != State::Standby => {
            ctx.set_paused(true);
            Ok(Answer::Paused)
        }
        Operation::Resume => {
            ctx.set_paused(false);
            Ok(Answer::Resumed)
        }
        Operation::Skip(at) => ctx.skip(*at),
        _ => {
            let waiting = ctx.waiting_for().map_or(String::new(), |what| format!(", waiting for {what}"));
            Err(Refusal::NotNow(format!("the stream does not run: {}{waiting}", ctx.state().as_str())))
        }
    }
}
