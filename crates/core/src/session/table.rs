//! The life of one table: what readers may think of it, what is read of it, and what keeps it from being followed.

use super::chunk::{CatalogSeen, LoadId, Purpose};
use super::tables::TableSeen;
use crate::admin::{Repair, Tally};
use crate::checkpoint::{Blocked, TableMark, TableState};
use crate::command::Key;
use crate::lsn::EndLsn;
use crate::reason::Reason;
use crate::schema::{CatalogMark, TableId, TableSpec};
use std::collections::HashSet;
use std::time::{Duration, Instant};

/// How long a table that cannot be followed is left alone.
const BROKEN_RETRY: Duration = Duration::from_secs(10);
/// Keys of one table that wait to be read again. Beyond it the table is loaded as a whole.
pub(super) const PENDING_KEYS: usize = 20_000;

/// What is known of a table's rows in Redis when a load begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Trust {
    /// Some may be missing, or have another shape: until the load has ended, "not there" means nothing.
    Incomplete,
    /// They are what the stream has brought: they stand while they are compared.
    Stands,
}

pub(super) struct Table {
    pub spec: TableSpec,
    state: TableState,
    life: Life,
    /// What the last load that ended has established, in this life or an earlier one.
    established: Option<Established>,
    shape: Shape,
    /// Keys that must be read again before they may be trusted.
    pending: HashSet<Key>,
    /// A chunk must have seen everything up to here.
    base: EndLsn,
    /// An operator removed keys, which are not loaded again yet.
    removed: bool,
    /// Rows that wait, or waited when a load began, are as old as this.
    as_of: Option<EndLsn>,
    /// When its round of TTL renewals began, by Redis TIME.
    renewing_since_ms: Option<u64>,
    /// When it was last tried to compare it, where that could not be done.
    not_compared: Option<Instant>,
}

enum Life {
    Followed,
    /// A load or a comparison is under way.
    Reading(Load),
    /// It was found that it cannot be followed. It is tried again now and then.
    Broken(Broken),
    /// It is being tried.
    Mending(Broken, Load),
}

struct Broken {
    why: Blocked,
    /// When that was last found.
    at: Instant,
    /// A load reads its rows: it can be followed again, it seems.
    is_mending: bool,
}

struct Established {
    template: String,
    fingerprint: u64,
    /// What the catalog said when the last load began.
    catalog: Option<CatalogMark>,
    ttl_until_ms: Option<u64>,
    compared_ms: Option<u64>,
    verified_ms: Option<u64>,
}

/// The columns, and what the catalog says.
struct Shape {
    /// The mapping that its hashes have, once loaded, or that the load under way writes.
    written_as: Option<u64>,
    /// The shape for which it was last read again: never twice in a row for the same.
    reread_for: Option<u64>,
    /// Redis's position when the catalog was last seen to be as the table is followed, and the time before. What is
    /// before the latter is there.
    fit: (EndLsn, EndLsn),
    /// The newest transaction that truncated it and wrote no row of it afterwards: the stream has brought every row that it
    /// has since.
    emptied_by: Option<u32>,
}

/// A load or a comparison under way.
pub(super) struct Load {
    pub id: LoadId,
    pub purpose: Purpose,
    pub because: Reason,
    pub started: Instant,
    /// By Redis TIME.
    started_ms: u64,
    /// What it wrote has a TTL that reaches until then, by the last whole round of renewals in it; 0 before.
    renewed_until_ms: u64,
    /// What it has read, and of a comparison how it differed.
    pub tally: Tally,
    estimated_rows: u64,
    catalog: Option<CatalogMark>,
    /// Keys that a comparison has to read again.
    again: usize,
    /// An operator removed keys since it began.
    removed: bool,
    /// Everything is read, the orphans are gone; only pending keys may be left.
    ended: bool,
}

impl Load {
    pub fn new(id: LoadId, purpose: Purpose, because: Reason, started: Instant, started_ms: u64) -> Self {
        Load {
            id,
            purpose,
            because,
            started,
            started_ms,
            renewed_until_ms: 0,
            tally: Tally::default(),
            estimated_rows: 0,
            catalog: None,
            again: 0,
            removed: false,
            ended: false,
        }
    }

    fn is_whole(&self) -> bool {
        self.ended && self.again == 0
    }
}

/// What a look at the catalog means.
pub(super) enum Look {
    AsBefore,
    Breaks(Blocked),
    Loads(&'static str, Trust),
}

impl Table {
    /// `mark`: what the checkpoint says of it, which stands at `at`.
    pub fn new(spec: TableSpec, mark: Option<&TableMark>, at: EndLsn, base: EndLsn, now: Instant) -> Self {
        let broken = mark.and_then(|m| m.blocked.clone()).map(|why| Broken { why, at: now, is_mending: false });
        Table {
            spec,
            state: mark.map_or(TableState::Loading, |m| m.state),
            life: broken.map_or(Life::Followed, Life::Broken),
            established: mark.map(|m| Established {
                template: m.template.clone(),
                fingerprint: m.fingerprint,
                catalog: m.catalog,
                ttl_until_ms: m.ttl_until_ms,
                compared_ms: m.compared_ms,
                verified_ms: m.verified_ms,
            }),
            shape: Shape { written_as: mark.map(|m| m.fingerprint), reread_for: None, fit: (at, at), emptied_by: None },
            pending: HashSet::new(),
            base,
            removed: mark.is_some_and(|m| m.removed),
            as_of: mark.and_then(|m| m.as_of),
            renewing_since_ms: None,
            not_compared: None,
        }
    }

    pub fn id(&self) -> TableId {
        self.spec.id
    }

    pub fn base(&self) -> EndLsn {
        self.base
    }

    pub fn load(&self) -> Option<&Load> {
        match &self.life {
            Life::Reading(load) | Life::Mending(_, load) => Some(load),
            Life::Followed | Life::Broken(_) => None,
        }
    }

    fn load_mut(&mut self) -> Option<&mut Load> {
        match &mut self.life {
            Life::Reading(load) | Life::Mending(_, load) => Some(load),
            Life::Followed | Life::Broken(_) => None,
        }
    }

    fn take_load(&mut self) -> Option<Load> {
        let (life, load) = match std::mem::replace(&mut self.life, Life::Followed) {
            Life::Reading(load) => (Life::Followed, Some(load)),
            Life::Mending(broken, load) => (Life::Broken(broken), Some(load)),
            life => (life, None),
        };
        self.life = life;
        load
    }

    fn broken(&self) -> Option<&Broken> {
        match &self.life {
            Life::Broken(broken) | Life::Mending(broken, _) => Some(broken),
            Life::Followed | Life::Reading(_) => None,
        }
    }

    pub fn is_broken(&self) -> bool {
        self.broken().is_some()
    }

    /// Why it cannot be followed, also while that is tried.
    pub fn broken_because(&self) -> Option<&Blocked> {
        self.broken().map(|broken| &broken.why)
    }

    /// Why it cannot be followed, as far as is known.
    pub fn blocked(&self) -> Option<&Blocked> {
        self.broken().filter(|broken| !broken.is_mending).map(|broken| &broken.why)
    }

    /// The checkpoint speaks for it: one that is being loaded, or cannot be, may be new, or may not have been followed
    /// before.
    pub fn stands(&self) -> bool {
        matches!(self.life, Life::Followed)
    }

    pub fn is_compared(&self) -> bool {
        self.load().is_some_and(|load| load.purpose != Purpose::Fill)
    }

    /// Nothing but keys that an operator removed is missing: with rows waiting to be read again, the next life has to
    /// load.
    fn is_removed(&self) -> bool {
        self.removed && self.pending.is_empty() && !self.is_broken()
    }

    pub fn has_removed_keys(&self) -> bool {
        self.removed
    }

    // ---- loads ------------------------------------------------------------------------------------------------------

    /// Some of its rows may be missing, or have another shape.
    pub fn mistrust(&mut self) {
        if matches!(self.state, TableState::Loaded | TableState::Incomplete) {
            // What is there goes on being right while it is read again.
            self.state = TableState::Loading;
        }
        self.shape.written_as = None;
    }

    /// `delivered`: what was delivered by now may be in Redis in another shape, or not at all. A chunk must have seen all
    /// of it.
    pub fn begin(&mut self, load: Load, delivered: EndLsn) {
        self.base = self.base.max(delivered);
        self.life = match std::mem::replace(&mut self.life, Life::Followed) {
            Life::Followed | Life::Reading(_) => Life::Reading(load),
            Life::Broken(broken) | Life::Mending(broken, _) => Life::Mending(broken, load),
        };
    }

    /// The load has looked the table up; it may begin again by itself, and what was read before counts for nothing then.
    /// Gives `false` where a comparison cannot go on, since the hashes have another shape.
    pub fn looked_up(&mut self, id: LoadId, fingerprint: u64, catalog: CatalogMark, estimated_rows: u64) -> bool {
        let Some(load) = self.load_mut().filter(|load| load.id == id) else { return true };
        (load.tally, load.estimated_rows, load.catalog) = (Tally::default(), estimated_rows, Some(catalog));
        if load.purpose != Purpose::Fill {
            return self.is_written_as(fingerprint);
        }
        if self.shape.written_as.replace(fingerprint) != Some(fingerprint) && self.state == TableState::Loaded {
            self.state = TableState::Loading;
        }
        true
    }

    pub fn everything_is_read(&mut self, id: LoadId) {
        if let Some(load) = self.load_mut().filter(|load| load.id == id) {
            assert!(!load.ended, "a load ends once");
            load.ended = true;
        }
    }

    /// Rows of the load `of` were written: `rows` of those that it reads, and what they differed in.
    pub fn wrote(&mut self, of: Option<LoadId>, rows: u64, found: &Tally) {
        let Some(load) = self.load_mut().filter(|load| Some(load.id) == of) else { return };
        load.tally.rows += rows;
        load.tally.add(found);
        if load.purpose == Purpose::Fill
            && let Life::Mending(broken, _) = &mut self.life
        {
            broken.is_mending = true;
        }
    }

    /// A comparison reads keys again; gives it.
    pub fn reads_again(&mut self, of: Option<LoadId>, keys: usize) -> Option<LoadId> {
        let load = self.load_mut().filter(|load| Some(load.id) == of && keys > 0)?;
        load.again += keys;
        Some(load.id)
    }

    pub fn were_read_again(&mut self, keys: usize) {
        if let Some(load) = self.load_mut() {
            assert!(load.again >= keys, "keys are read again because they were counted");
            load.again -= keys;
        }
    }

    /// Its load is complete but for the checkpoint that says so.
    pub fn is_whole(&self) -> bool {
        self.pending.is_empty() && self.load().is_some_and(Load::is_whole)
    }

    /// The next checkpoint says that its load has ended. `is_verification`: a comparison proves what is there.
    pub fn finish(&mut self, is_verification: bool) -> Option<Load> {
        let load = if self.is_whole() { self.take_load() } else { None }?;
        self.not_compared = None;
        match load.purpose {
            Purpose::Fill => {
                self.life = Life::Followed;
                self.shape.fit = (self.base, self.base);
                self.state = TableState::Loaded;
                self.removed = load.removed;
                self.established = Some(Established {
                    template: self.spec.key.to_string(),
                    fingerprint: self.shape.written_as.expect("a load that ended has looked the table up"),
                    catalog: load.catalog,
                    ttl_until_ms: Some(load.renewed_until_ms.max(load.started_ms + self.spec.ttl_ms)),
                    compared_ms: Some(load.started_ms),
                    verified_ms: self.established.as_ref().and_then(|before| before.verified_ms),
                });
            }
            Purpose::Compare(repair) => {
                let is_right = repair == Repair::Mend || load.tally.drift() == 0;
                let established = self.established.as_mut().expect("what is compared was loaded");
                if is_right {
                    established.compared_ms = Some(load.started_ms);
                }
                if is_right && is_verification {
                    established.verified_ms = Some(load.started_ms);
                }
                if repair == Repair::Mend {
                    established.catalog = load.catalog;
                    self.removed = load.removed;
                }
            }
        }
        Some(load)
    }

    /// A comparison that cannot be made says nothing of the table: that stays as it is. Gives `false` where it was
    /// overtaken by another load.
    pub fn cannot_be_compared(&mut self, id: LoadId, now: Instant) -> bool {
        let is_this = self.load().is_some_and(|load| load.id == id && load.purpose != Purpose::Fill);
        if is_this {
            self.take_load();
            self.not_compared = Some(now);
        }
        is_this
    }

    // ---- the catalog ------------------------------------------------------------------------------------------------

    /// The hashes have this shape, or get it by the load under way.
    pub fn is_written_as(&self, fingerprint: u64) -> bool {
        self.shape.written_as == Some(fingerprint)
    }

    /// Whether a row in this shape, another than the hashes have, makes it necessary to read the table again.
    pub fn is_reread_for(&mut self, fingerprint: u64) -> bool {
        let not_looked_up_yet = self.load().is_some() && self.shape.written_as.is_none();
        !not_looked_up_yet && self.shape.reread_for.replace(fingerprint) != Some(fingerprint)
    }

    /// It cannot be followed, and is not served as whole; rows that are there stay as they were. Where they were right, they
    /// are right as of the last time that it was seen to be fit. Gives `false` where that was known.
    pub fn breaks(&mut self, why: Blocked, now: Instant) -> bool {
        if self.state != TableState::Healing {
            self.state = TableState::Incomplete;
            self.as_of = self.as_of.or(Some(self.shape.fit.0));
        }
        self.shape.written_as = None;
        // Whatever they wait for, the next load brings it.
        self.pending.clear();
        let is_new = self.broken_because() != Some(&why);
        self.life = Life::Broken(Broken { why, at: now, is_mending: false });
        is_new
    }

    pub fn is_tried_again(&self, now: Instant) -> bool {
        matches!(&self.life, Life::Broken(broken) if now.saturating_duration_since(broken.at) >= BROKEN_RETRY)
    }

    /// `at`: where Redis is.
    pub fn sees_catalog(&mut self, seen: CatalogSeen, at: EndLsn) -> Look {
        if !self.stands() {
            // The load looks for itself, and what is broken is looked at again anyway.
            return Look::AsBefore;
        }
        let (fingerprint, mark, written_by) = match seen {
            CatalogSeen::Table { fingerprint, mark, written_by } => (fingerprint, mark, written_by),
            CatalogSeen::Unfit(why) => return Look::Breaks(why),
        };
        if !self.is_written_as(fingerprint) {
            return Look::Loads("its columns changed", Trust::Incomplete);
        }
        let established = self.established.as_mut().expect("what is written in some shape was loaded");
        match established.catalog {
            Some(before) if before == mark => {}
            // The files are those of a TRUNCATE, which the stream has brought.
            Some(before)
                if before.shape == mark.shape && written_by.is_some() && written_by == self.shape.emptied_by =>
            {
                established.catalog = Some(mark);
            }
            Some(before) if before.shape == mark.shape => {
                return Look::Loads("its rows were written anew", Trust::Stands);
            }
            Some(_) | None => {
                let text = "its partitions, row filter or types changed, or it is another table";
                return Look::Loads(text, Trust::Incomplete);
            }
        }
        self.shape.fit = (self.shape.fit.1, at);
        Look::AsBefore
    }

    pub fn was_emptied_by(&mut self, xid: u32) {
        self.shape.emptied_by = Some(xid);
    }

    // ---- keys -------------------------------------------------------------------------------------------------------

    pub fn is_pending(&self, key: &Key) -> bool {
        self.pending.contains(key)
    }

    pub fn has_pending(&self) -> bool {
        !self.pending.is_empty()
    }

    /// These keys must be read again; gives those that did not wait already. `at`: what the checkpoint says before the
    /// batch that left them behind.
    pub fn pend(&mut self, keys: Vec<Key>, at: EndLsn) -> Vec<Key> {
        let new: Vec<Key> = keys.into_iter().filter(|key| self.pending.insert(key.clone())).collect();
        if !new.is_empty() {
            self.as_of = self.as_of.or(Some(at));
        }
        new
    }

    /// It has too many pending keys, and is loaded as a whole: they wait no longer.
    pub fn gives_up_pending(&mut self) -> bool {
        let is_too_many = self.pending.len() > PENDING_KEYS;
        if is_too_many {
            self.pending.clear();
        }
        is_too_many
    }

    pub fn is_incomplete(&mut self) {
        if self.state == TableState::Loaded {
            self.state = TableState::Incomplete;
        }
    }

    pub fn is_settled(&mut self, key: &Key) {
        self.pending.remove(key);
    }

    pub fn was_truncated(&mut self) {
        self.pending.clear();
    }

    /// Until the table is read as a whole again, "not there" means nothing.
    pub fn keys_are_removed(&mut self) {
        self.removed = true;
        if let Some(load) = self.load_mut() {
            load.removed = true;
        }
        self.is_incomplete();
    }

    /// Merging needs a hash that is right: not one of another shape. A load of which only pending keys are left has all the
    /// others right: if changes to them made more of them, it would not end. `fingerprint`: of its present mapping.
    pub fn is_mergeable(&self, fingerprint: Option<u64>) -> bool {
        let right = matches!(self.state, TableState::Loaded | TableState::Incomplete)
            || self.load().is_some_and(|load| load.ended);
        right && fingerprint.is_some() && self.shape.written_as == fingerprint
    }

    // ---- time to live -----------------------------------------------------------------------------------------------

    pub fn renewal_begins(&mut self, at_ms: u64) {
        self.renewing_since_ms.get_or_insert(at_ms);
    }

    /// Every key that was there was renewed, or written with a full TTL, since the round began. What had expired by then
    /// stays gone: such a round promises nothing.
    pub fn renewal_ends(&mut self, redis_now_ms: u64) {
        let since = self.renewing_since_ms.take().expect("a round that ends has begun");
        let ttl_ms = self.spec.ttl_ms;
        let reach = since + ttl_ms;
        // A comparison says nothing of the TTL of what it does not write.
        let filled = self.load().filter(|load| load.purpose == Purpose::Fill);
        let of_load = filled.map(|load| (load.started_ms + ttl_ms).max(load.renewed_until_ms));
        if of_load.or(self.ttl_until_ms()).is_some_and(|until| until > redis_now_ms) {
            if let Some(load) = self.load_mut() {
                load.renewed_until_ms = load.renewed_until_ms.max(reach);
            }
            if let Some(until) = self.established.as_mut().and_then(|e| e.ttl_until_ms.as_mut()) {
                *until = reach.max(*until);
            }
        }
    }

    fn ttl_until_ms(&self) -> Option<u64> {
        self.established.as_ref()?.ttl_until_ms
    }

    /// A daemon that was frozen, or could not renew, finds keys gone that no change took away.
    pub fn may_have_expired(&self, redis_now_ms: u64) -> bool {
        self.stands() && self.ttl_until_ms().is_some_and(|until| until <= redis_now_ms)
    }

    /// Nobody has compared it for so long, nor tried to for `retry`.
    pub fn is_to_be_verified(&self, every_ms: u64, retry: Duration, redis_now_ms: u64, now: Instant) -> bool {
        let compared_ms = self.established.as_ref().and_then(|e| e.compared_ms).unwrap_or(0);
        let failed_lately = self.not_compared.is_some_and(|at| now.saturating_duration_since(at) < retry);
        compared_ms.saturating_add(every_ms) <= redis_now_ms && !self.is_broken() && !failed_lately
    }

    // ---- what is said of it -----------------------------------------------------------------------------------------

    /// With the next checkpoint: what is whole by now is said to be. Gives whether that changes it.
    pub fn settle(&mut self) -> bool {
        let before = (self.state, self.as_of);
        let settled = self.pending.is_empty() && self.stands();
        self.as_of = self.as_of.filter(|_| !settled);
        match self.state {
            TableState::Incomplete if settled && !self.removed => self.state = TableState::Loaded,
            TableState::Loaded if self.removed => self.state = TableState::Incomplete,
            _ => {}
        }
        before != (self.state, self.as_of)
    }

    /// What a checkpoint says of it. `None` before it was ever loaded or taken over. `dead_letters`: how many are recorded,
    /// and whether there may be more.
    pub fn mark(&self, (dead_letters, more_dead_letters): (u64, bool)) -> Option<TableMark> {
        let Established { template, fingerprint, catalog, ttl_until_ms, compared_ms, verified_ms } =
            self.established.as_ref()?;
        Some(TableMark {
            template: template.clone(),
            fingerprint: *fingerprint,
            catalog: *catalog,
            state: self.state,
            ttl_until_ms: *ttl_until_ms,
            as_of: self.as_of,
            removed: self.is_removed(),
            compared_ms: *compared_ms,
            verified_ms: *verified_ms,
            blocked: self.blocked().cloned(),
            dead_letters,
            more_dead_letters,
        })
    }

    /// Readers go by the checkpoint: a table that is no longer what it says there is not left so until the next heartbeat.
    pub fn says_otherwise(&self, written: &TableMark, more_dead_letters: bool) -> bool {
        written.state != self.state
            || written.blocked.as_ref() != self.blocked()
            || written.more_dead_letters != more_dead_letters
    }

    pub fn seen(&self, (dead_letters, more_dead_letters): (u64, bool)) -> TableSeen {
        let load = self.load();
        TableSeen {
            state: self.state,
            load_progress: load.map(|l| (l.tally.rows, l.estimated_rows.max(l.tally.rows))),
            compared_ms: self.established.as_ref().and_then(|e| e.compared_ms),
            verified_ms: self.established.as_ref().and_then(|e| e.verified_ms),
            blocked: self.blocked().cloned(),
            because: load.filter(|l| l.purpose == Purpose::Fill).map(|l| l.because.text.clone()),
            removed: self.removed,
            dead_letters,
            more_dead_letters,
        }
    }

    /// `reads_go_on`: some keys are being read again, or will not be any more.
    pub fn is_sound(&self, reads_go_on: bool) -> bool {
        let waits = self.pending.is_empty() || self.state != TableState::Loaded;
        let is_read = self.pending.is_empty() || reads_go_on || self.load().is_some();
        let is_followed = self.state != TableState::Loaded || self.blocked().is_none();
        waits && is_read && is_followed
    }
}
