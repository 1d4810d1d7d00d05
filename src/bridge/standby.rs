//! Waits while another daemon holds the slot. Reads are answered meanwhile, from the same Redis and by the same checkpoint,
//! as fresh as the active daemon keeps it.
//!
//! The active daemon is considered dead when the slot is free, and hanging when its checkpoint does not change although Redis
//! answers. Then its walsender is terminated, which frees the slot. If it wakes up, Redis refuses its writes.

use super::BridgeError;
use super::context::Context;
use crate::checkpoint::{Checkpoint, SlotState};
use crate::code::Code;
use crate::lookups::Lookups;
use crate::progress::freshness::Freshness;
use crate::source::connect::PostgresClient;
use crate::source::slot::{self, ServerFacts};
use crate::source::snapshot;
use crate::status::State;
use std::time::{Duration, Instant, UNIX_EPOCH};

/// How often the slot and the active daemon's checkpoint are checked.
const INTERVAL: Duration = Duration::from_millis(500);

/// Whether another daemon was active.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Waited {
    NotAtAll,
    ForAnother,
}

/// Returns once no other process holds the slot.
pub async fn wait(ctx: &Context, client: &PostgresClient, facts: &ServerFacts) -> Result<Waited, BridgeError> {
    let slot_name = &ctx.config.postgres.slot;
    let mut waited = Waited::NotAtAll;
    let mut other = Other::default();
    loop {
        match slot::slot_state(&client.client, slot_name).await? {
            SlotState::Ready { active_pid: Some(pid), .. } if ctx.was_our_walsender(pid) => {
                // The previous session's connection: Postgres has not noticed yet that it is gone.
                slot::terminate_walsender(&client.client, pid, &ctx.application_name).await?;
            }
            SlotState::Ready { active_pid: Some(pid), .. } => {
                if waited == Waited::NotAtAll {
                    waited = Waited::ForAnother;
                    other.system_id = slot::system_identifier(&client.client).await?;
                }
                ctx.set_state(
                    State::Standby,
                    None,
                    Some(format!("another daemon holds the slot (its Postgres backend has pid {pid})")),
                );
                other.look(ctx, client, facts).await?;
                if other.hangs(Instant::now(), ctx.timing.hangs)
                    && slot::terminate_walsender(&client.client, pid, &ctx.application_name).await?
                {
                    let code = Code::DaemonHangs.as_str();
                    tracing::warn!(
                        code,
                        pid,
                        "the daemon that holds the slot hangs: its walsender was ended, taking over"
                    );
                    other.beat = None;
                }
            }
            SlotState::Ready { active_pid: None, .. } | SlotState::Absent | SlotState::Invalidated { .. } => {
                return Ok(waited);
            }
        }
        tokio::select! {
            () = tokio::time::sleep(INTERVAL) => {}
            // A reader is waiting for a position.
            () = ctx.position_wanted.notified(), if waited == Waited::ForAnother => {}
        }
    }
}

/// What is known of the active daemon.
#[derive(Default)]
struct Other {
    /// The system identifier of the server that we are connected to.
    system_id: Option<String>,
    /// Epoch and sequence number of its newest checkpoint, and when that was first seen.
    beat: Option<(u64, u64, Instant)>,
    freshness: Freshness,
}

impl Other {
    async fn look(&mut self, ctx: &Context, client: &PostgresClient, facts: &ServerFacts) -> Result<(), BridgeError> {
        let asked = Instant::now();
        let sample = snapshot::sample(&client.client, &ctx.config.postgres.slot).await?;
        self.freshness.sampled(sample.flushed.before_page_header(facts.wal_segment_bytes), asked);
        // While Redis does not answer, nothing is known of the active daemon, and it is not considered hanging.
        let before = ctx.sightings.before();
        let found = ctx.reader.checkpoint().await.ok();
        let confirmed = sample.slot.as_ref().and_then(|slot| slot.confirmed);
        let checkpoint = found.and_then(|(stored, server)| {
            let read = stored.map(|stored| Checkpoint::read(&stored.head, &stored.entries));
            let checkpoint = read.transpose().ok()?;
            ctx.sightings.judge(before, &server, checkpoint.as_ref().map(|c| (c.epoch, c.seq)), false).ok()?;
            // A checkpoint below the confirmed position is not the active daemon's: Redis was rewound, or is another one.
            checkpoint.filter(|c| confirmed.is_none_or(|confirmed| c.lsn >= confirmed))
        });
        self.seen(checkpoint.as_ref(), Instant::now());
        ctx.slot_keeps(&sample);
        ctx.update(|status| {
            status.server = Some(sample.flushed);
            status.last_contact = Some(asked);
            status.confirmed = confirmed;
            status.fresh_as_of = self.freshness.as_of();
            status.applied = checkpoint.as_ref().map(|c| c.lsn);
            status.verified_at = None;
            if let Some(checkpoint) = &checkpoint {
                (status.epoch, status.seq) = (checkpoint.epoch, checkpoint.seq);
                status.healing_slots = checkpoint.healing;
                let system_id = self.system_id.as_ref().unwrap_or(&checkpoint.system_id).clone();
                let database = checkpoint.database.clone();
                status.source = Some(ctx.source(system_id, checkpoint.timeline, database, facts));
                status.verified_at = checkpoint.verified_ms().map(|ms| UNIX_EPOCH + Duration::from_millis(ms));
            }
            for (spec, table) in ctx.specs.iter().zip(&mut status.tables) {
                // With another template the keys are under other names.
                let mark = checkpoint.as_ref().and_then(|c| c.tables.get(&spec.name));
                let mark = mark.filter(|mark| mark.template == spec.key.to_string());
                table.state = mark.map(|mark| mark.state_with(Lookups::fingerprint_of(spec)));
                table.blocked = mark.and_then(|mark| mark.blocked.clone());
                table.removed = mark.is_some_and(|mark| mark.removed);
                table.dead_letters = mark.map_or(0, |mark| mark.dead_letters);
                table.more_dead_letters = mark.is_some_and(|mark| mark.more_dead_letters);
            }
        });
        Ok(())
    }

    fn seen(&mut self, checkpoint: Option<&Checkpoint>, now: Instant) {
        let Some(checkpoint) = checkpoint else {
            self.beat = None;
            return;
        };
        self.freshness.arrived(checkpoint.lsn.0);
        match self.beat {
            Some((epoch, seq, _)) if (epoch, seq) == (checkpoint.epoch, checkpoint.seq) => {}
            _ => self.beat = Some((checkpoint.epoch, checkpoint.seq, now)),
        }
    }

    fn hangs(&self, now: Instant, after: Duration) -> bool {
        self.beat.is_some_and(|(_, _, since)| now.saturating_duration_since(since) >= after)
    }
}
