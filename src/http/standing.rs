//! What may be said about what was read: the pure half of every read. When in doubt it returns 503, because a wrong 404
//! makes an application believe that a row is gone.

use super::memo::Memo;
use super::refusal::Refusal;
use crate::checkpoint::{Checkpoint, TableMark, TableState};
use crate::lsn::EndLsn;
use crate::schema::TableSpec;
use crate::sightings::{Doubt, Version};
use crate::sink::reader::{Read, RunId};
use crate::status::{Moment, Status};
use crate::typed::row_type::{EncodedRowType, RowType};
use std::sync::Arc;
use std::time::Duration;

pub(super) const NO_CHECKPOINT: &str = "Redis holds something else as checkpoint";

pub(super) fn healing(what: &str) -> Refusal {
    Refusal::Healing(format!("{what}: the tables are being compared with Postgres again"))
}

/// Returns the head of the checkpoint, unless Redis may have lost data. `judge` knows what was seen before.
pub(super) fn trusted(
    read: &Read,
    heads: &Memo<Checkpoint>,
    status: &Status,
    judge: impl FnOnce(&RunId, Option<Version>) -> Result<(), Doubt>,
) -> Result<Arc<Checkpoint>, Refusal> {
    if status.has_only_started() && status.waiting_for.is_none() {
        // Redis may have been rewound while no daemon watched. If Postgres is unavailable, the contents are served
        // anyway, because nothing better is known.
        return Err(healing("this daemon has only just started"));
    }
    let checkpoint = read.checkpoint.as_deref().map(|head| heads.parse(head, Checkpoint::head)).transpose();
    let checkpoint = checkpoint.map_err(|_| healing(NO_CHECKPOINT))?;
    judge(&read.server, checkpoint.as_ref().map(|c| (c.epoch, c.seq))).map_err(|doubt| healing(doubt.as_str()))?;
    let checkpoint = checkpoint.ok_or_else(|| healing(Doubt::Lost.as_str()))?;
    if status.confirmed.is_some_and(|confirmed| checkpoint.lsn < confirmed) {
        return Err(healing("Redis lacks what Postgres was told it has"));
    }
    if status.source.as_ref().is_some_and(|source| source.system_id != checkpoint.system_id) {
        return Err(healing("Redis holds the rows of another Postgres"));
    }
    Ok(checkpoint)
}

/// What an answer says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Claim {
    /// These rows are there.
    Rows,
    /// These rows of Redis, and no others, are in a list. They may be as old as rows may be.
    WholeList,
    /// There is no such row.
    Absence,
}

/// Everything that decides what may be said about a table's rows.
pub(super) struct Standing<'a> {
    pub table: &'a TableSpec,
    pub checkpoint: Arc<Checkpoint>,
    /// What is said of the table; nothing where its keys are not those of the checkpoint's time.
    pub mark: Option<Arc<TableMark>>,
    pub status: &'a Status,
    pub now: Moment,
    /// Redis's clock, milliseconds since the Unix epoch. By it the heartbeat of a frozen daemon is old.
    pub redis_time_ms: u64,
    /// See [`Read::may_lack_keys`].
    pub may_lack_keys: bool,
    pub max_staleness: Duration,
    pub max_age: Option<Duration>,
}

impl Standing<'_> {
    /// Time since the last contact with Postgres.
    pub fn age(&self) -> Option<Duration> {
        self.status.last_contact.map(|at| self.now.instant.saturating_duration_since(at))
    }

    /// Whether that may be said.
    pub fn allows(&self, claim: Claim) -> Result<(), Refusal> {
        let mark = self.mark.as_ref();
        let state = mark.map_or(TableState::Loading, |mark| mark.state);
        let name = &self.table.name;
        let load = || self.status.load_of(name, self.now);
        let healing = || {
            let load = load().unwrap_or_else(|| format!("{name} is being compared with Postgres after a loss."));
            Err(Refusal::Healing(format!("{load} Try again")))
        };
        // Existing rows of a blocked table are still served, unless the reader limits their age.
        if claim == Claim::Absence || state == TableState::Healing || self.max_age.is_some() {
            self.is_followed()?;
        }
        if state == TableState::Healing {
            return healing();
        }
        if let Some(max_age) = self.max_age
            && self.age().is_none_or(|age| age > max_age)
        {
            return Err(self.stale("the last contact with Postgres", self.age(), max_age));
        }
        if claim == Claim::Rows {
            return Ok(());
        }
        match state {
            TableState::Healing => healing(),
            TableState::Loading => {
                let load = load().unwrap_or_else(|| format!("Loading {name}."));
                Err(Refusal::Loading(format!("{load} The row may not have come yet: try again")))
            }
            TableState::Incomplete => Err(Refusal::Incomplete(name.clone())),
            TableState::Loaded if mark.is_some_and(|mark| self.may_have_expired(mark)) => {
                Err(Refusal::Healing(format!("keys of {name} may have expired while nothing renewed them")))
            }
            TableState::Loaded if self.may_lack_keys => {
                let what = "the hash slot of this key has moved to another node, and is being read again";
                Err(Refusal::Healing(what.to_owned()))
            }
            // Rows that Redis cannot hold are members of nothing, and rows are shown however old they are.
            TableState::Loaded if claim == Claim::WholeList => Ok(()),
            TableState::Loaded if !self.status.is_fresh(self.now, self.max_staleness) => {
                let behind = self.status.fresh_as_of.map(|at| self.now.instant.saturating_duration_since(at));
                Err(self.stale("Redis was last known to be current", behind, self.max_staleness))
            }
            TableState::Loaded if mark.is_some_and(|mark| mark.more_dead_letters) => {
                Err(Refusal::MoreDeadLetters(name.clone()))
            }
            TableState::Loaded => Ok(()),
        }
    }

    pub fn is_followed(&self) -> Result<(), Refusal> {
        match self.mark.as_ref().and_then(|mark| mark.blocked.as_ref()) {
            None => Ok(()),
            Some(why) => Err(Refusal::Blocked(format!("table {} is blocked: {why}", self.table.name))),
        }
    }

    /// Returns what the columns become in JSON, the same for all rows.
    pub fn row_type(&self) -> Result<RowType, Refusal> {
        let types = self.mark.as_ref().and_then(|mark| mark.types.as_ref());
        types.and_then(EncodedRowType::decode).ok_or_else(|| Refusal::TypesUnknown(self.table.name.clone()))
    }

    pub fn has_dead_letters(&self) -> bool {
        self.mark.as_ref().is_some_and(|mark| mark.dead_letters > 0)
    }

    /// Every row is at least as new as this, including pending ones. `marked`: see [`Read::marked`].
    pub fn as_of(&self, marked: Option<EndLsn>) -> EndLsn {
        let waiting = self.mark.as_ref().and_then(|mark| mark.as_of);
        let lsn = self.checkpoint.lsn.max(marked.unwrap_or(self.checkpoint.lsn));
        waiting.map_or(lsn, |as_of| as_of.min(lsn))
    }

    fn may_have_expired(&self, mark: &TableMark) -> bool {
        mark.ttl_until_ms.is_some_and(|until| self.redis_time_ms >= until)
    }

    fn stale(&self, what: &str, age: Option<Duration>, limit: Duration) -> Refusal {
        let verdict = self.status.verdict(self.now, self.max_staleness).text;
        let limit = humantime::format_duration(limit);
        Refusal::Stale(match age {
            Some(age) => format!("{what} {:.1} s ago, which is more than {limit}. {verdict}", age.as_secs_f64()),
            None => format!("{what} is not known yet, and should be within {limit}. {verdict}"),
        })
    }
}
