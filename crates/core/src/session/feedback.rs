//! What the session reports: to Postgres the confirmed position, to readers how fresh Redis is.

use crate::change::Begin;
use crate::lsn::{AppliedLsn, EndLsn, Lsn};
use crate::progress::freshness::Freshness;
use crate::progress::ledger::{ConfirmedLsn, Ledger};
use crate::progress::visibility::Snapshot;
use std::time::Instant;

/// When a change counts as safe in Redis, so that Postgres may discard it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SafeWhen {
    /// As soon as Redis has acknowledged it.
    Acknowledged,
    /// When [`Input::Durable`](super::Input::Durable) reports it.
    Told,
}

pub(super) struct Feedback {
    ledger: Ledger,
    freshness: Freshness,
    safe_when: SafeWhen,
    /// Everything up to here is safe.
    safe: Option<AppliedLsn>,
    server: Option<Lsn>,
    wal_segment_bytes: u64,
    /// The number of keepalives requested so far, so that a new request can be told from an old one.
    pings: u64,
    position_wanted: bool,
}

impl Feedback {
    /// `from` is where the stream begins, `applied` what Redis already has.
    pub fn new(from: EndLsn, applied: EndLsn, safe_when: SafeWhen, wal_segment_bytes: u64) -> Self {
        let mut feedback = Feedback {
            ledger: Ledger::new(from),
            freshness: Freshness::default(),
            safe_when,
            safe: None,
            server: None,
            wal_segment_bytes,
            pings: 0,
            position_wanted: false,
        };
        feedback.is_safe_if_acknowledged(applied);
        feedback
    }

    pub fn begins(&mut self, begin: Begin) {
        self.ledger.begin(begin);
    }

    pub fn delivered(&mut self, at: EndLsn) {
        self.ledger.delivered(at);
    }

    /// Redis has acknowledged a checkpoint at this position. `received` is what the session has received.
    pub fn acknowledged(&mut self, applied: EndLsn, received: EndLsn) {
        self.is_safe_if_acknowledged(applied);
        self.position_wanted &= applied < received;
        self.freshness.arrived(applied.0);
    }

    fn is_safe_if_acknowledged(&mut self, applied: EndLsn) {
        if self.safe_when == SafeWhen::Acknowledged {
            self.is_safe(AppliedLsn(applied));
        }
    }

    pub fn is_safe(&mut self, lsn: AppliedLsn) {
        self.safe = self.safe.max(Some(lsn));
        self.ledger.applied(lsn);
    }

    pub fn has_safe(&self, lsn: EndLsn) -> bool {
        self.safe >= Some(AppliedLsn(lsn))
    }

    /// Takes a sample of the server's position. `received` and `applied` are the session's own.
    pub fn sampled(&mut self, snapshot: &Snapshot, flushed: Lsn, received: EndLsn, applied: EndLsn, now: Instant) {
        self.ledger.seen(snapshot);
        self.server = Some(flushed);
        let flushed = flushed.before_page_header(self.wal_segment_bytes);
        self.freshness.sampled(flushed, now);
        if received.0 < flushed {
            self.pings += 1;
        }
        self.freshness.arrived(applied.0);
    }

    /// A reader waits for a position: requests one from the server.
    pub fn wants_position(&mut self) {
        self.position_wanted = true;
        self.pings += 1;
    }

    pub fn position_is_wanted(&self) -> bool {
        self.position_wanted
    }

    pub fn confirmed(&self) -> Option<ConfirmedLsn> {
        self.ledger.confirmed()
    }

    pub fn fresh_as_of(&self) -> Option<Instant> {
        self.freshness.as_of()
    }

    pub fn server(&self) -> Option<Lsn> {
        self.server
    }

    pub fn pings(&self) -> u64 {
        self.pings
    }
}
