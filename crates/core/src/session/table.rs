//! The state of one table: what readers may rely on, what is being read of it, and what prevents it from being
//! followed.

use super::load_messages::{CatalogSeen, LoadId, Only, Purpose};
use super::tables::TableSeen;
use crate::admin::{Repair, Tally};
use crate::checkpoint::{Blocked, TableMark, TableState};
use crate::command::Key;
use crate::lookups::Lookups;
use crate::lookups::changes::Known;
use crate::lookups::sweep::{Extent, Sweep};
use crate::lsn::EndLsn;
use crate::reason::Reason;
use crate::rules::{Rule, holds};
use crate::schema::{CatalogMark, Composition, Oid, TableId, TableSpec};
use crate::typed::row_type::EncodedRowType;
use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long to wait before a table that cannot be followed is tried again.
const BROKEN_RETRY: Duration = Duration::from_secs(10);
/// The most pending keys of one table. With more, the table is loaded in full.
pub(super) const PENDING_KEYS: usize = 20_000;

/// What is known about a table's rows in Redis when a load begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Trust {
    /// Some may be missing or have other fields. Until the load ends, a missing key proves nothing.
    Incomplete,
    /// They are what the stream delivered, and remain valid while they are compared.
    Stands,
}

pub(super) struct Table {
    pub spec: TableSpec,
    lookups: Option<Arc<Lookups>>,
    /// A comparison of members and rows in progress.
    sweep: Option<Box<Sweep>>,
    state: TableState,
    life: Life,
    /// What the last completed load established, in this run of the daemon or an earlier one.
    established: Option<Established>,
    shape: Shape,
    /// Keys that must be read again before they can be trusted.
    pending: HashSet<Key>,
    /// The stream has brought a change of it in this session.
    is_touched: bool,
    /// A chunk must have seen everything up to here.
    base: EndLsn,
    /// An operator removed keys that are not loaded again yet.
    removed: bool,
    /// See [`TableMark::changed_beside`].
    changed_beside: bool,
    /// Pending rows, and rows that were pending when a load began, are as old as this position.
    as_of: Option<EndLsn>,
    /// When the current round of TTL renewals began, by Redis TIME.
    renewing_since_ms: Option<u64>,
    /// When a comparison last failed because it could not be made.
    not_compared: Option<Instant>,
}

enum Life {
    Followed,
    /// A load or a comparison is in progress.
    Reading(Load),
    /// The table cannot be followed. It is tried again from time to time.
    Broken(Broken),
    /// A load tries whether it can be followed again.
    Mending(Broken, Load),
}

struct Broken {
    why: Blocked,
    /// When that was last found.
    at: Instant,
    /// A load is reading rows, so the table can apparently be followed again.
    is_mending: bool,
}

struct Established {
    template: String,
    fingerprint: u64,
    /// What the catalog said when the last load began.
    catalog: Option<CatalogMark>,
    /// The composition that `catalog` is the mark of, if the catalog was read in this session.
    composition: Option<Composition>,
    /// What the columns become in JSON, if known and the same for all hashes.
    types: Option<EncodedRowType>,
    ttl_until_ms: Option<u64>,
    compared_ms: Option<u64>,
    verified_ms: Option<u64>,
    /// The fingerprint of the lookups whose lists are complete.
    lookups: Option<u64>,
}

/// The table's columns, and what the catalog says about it.
struct Shape {
    /// The mapping with which its hashes were written, or with which the load in progress writes them.
    written_as: Option<u64>,
    /// The fingerprint for which the table was last read again, so that no load follows another for the same one.
    reread_for: Option<u64>,
    /// Hashes may have columns of other types than those established, until the table has been read again.
    is_mixed: bool,
    /// The same because of rows that were read again during the last load. Those that were older than what it had found, it has
    /// written again; a look at the catalog that begins after the load tells whether any are newer. This many looks must find
    /// nothing new.
    looks_to_come: u8,
    /// Redis's position when the catalog last matched the hashes, and the position at the check before that. Redis has
    /// every change before the latter.
    fit: (EndLsn, EndLsn),
    /// The newest transaction that truncated the table without writing a row afterwards. The stream has delivered every
    /// row that the table has since then.
    emptied_by: Option<u32>,
}

/// A load or a comparison in progress.
pub(super) struct Load {
    pub id: LoadId,
    pub purpose: Purpose,
    pub because: Reason,
    pub started: Instant,
    /// By Redis TIME.
    started_ms: u64,
    /// The TTLs of the rows that the load wrote last at least until then, according to the last complete round of
    /// renewals during the load; 0 before the first.
    renewed_until_ms: u64,
    /// It began when no hash slot was ahead of what is delivered again. If one was, its snapshots may miss changes that
    /// were left out there.
    pub has_caught_up: bool,
    /// What was read and, for a comparison, what differed.
    pub tally: Tally,
    estimated_rows: u64,
    found: Option<Found>,
    pub only: Only,
    /// The mappings of rows that others have written meanwhile. They may be newer than what the load has found.
    rows_as: Vec<u64>,
    /// How many keys a comparison must read again.
    again: usize,
    /// An operator removed keys since the load began.
    removed: bool,
    /// The stream had brought no change of the table when it delivered the load's first watermark. Any that it had would be
    /// from before the load read the catalog, and rows may have changed in between without a word in the stream.
    is_untouched: Option<bool>,
    /// Everything was read and the orphans are removed. Only pending keys may be left.
    ended: bool,
    /// The members of lists were compared with the rows, or need not be.
    is_swept: bool,
}

/// What a load finds in the catalog.
pub(super) struct Found {
    pub catalog: CatalogMark,
    pub composition: Composition,
    pub types: EncodedRowType,
    /// Redis has no rows and no lists of the table but those that this session has written.
    pub is_empty: bool,
}

impl Load {
    pub fn new(
        id: LoadId,
        purpose: Purpose,
        (only, has_caught_up): (Only, bool),
        because: Reason,
        started: Instant,
        started_ms: u64,
    ) -> Self {
        Load {
            id,
            purpose,
            only,
            because,
            started,
            started_ms,
            renewed_until_ms: 0,
            has_caught_up,
            tally: Tally::default(),
            estimated_rows: 0,
            found: None,
            rows_as: Vec::new(),
            again: 0,
            removed: false,
            is_untouched: None,
            ended: false,
            is_swept: false,
        }
    }

    pub fn is_of_the_whole_table(&self) -> bool {
        self.only == Only::All
    }

    pub fn is_of_hash_slots(&self) -> bool {
        matches!(self.only, Only::HashSlots(_))
    }

    /// Whether rows that it does not read stay as they are.
    fn keeps_rows(&self) -> bool {
        self.purpose != Purpose::Fill || !self.is_of_the_whole_table()
    }

    fn has_compared_rows(&self) -> bool {
        self.ended && self.again == 0
    }

    fn is_whole(&self) -> bool {
        self.has_compared_rows() && !self.is_to_be_swept()
    }

    /// Whether Redis has no rows of the table but those that this session has written, all with their memberships. A row that
    /// the load writes is then either new or as it was, and its lists can hold nothing else.
    pub fn fills_nothing(&self) -> bool {
        let is_fill = self.purpose == Purpose::Fill && self.is_of_the_whole_table();
        is_fill && self.is_untouched == Some(true) && self.found.as_ref().is_some_and(|found| found.is_empty)
    }

    fn is_to_be_swept(&self) -> bool {
        !self.is_swept && !self.fills_nothing()
    }
}

/// What a check of the catalog implies.
pub(super) enum Look {
    AsBefore,
    Breaks(Blocked),
    Loads(&'static str, Trust),
    /// These partitions were attached to the table, which now has this mark.
    Attached(Arc<[Oid]>, CatalogMark),
}

const ANOTHER_SHAPE: &str = "its partitions, row filter or types changed, or it is another table";

impl Table {
    /// `mark` is the table's entry in the checkpoint, whose position is `at`.
    pub fn new(spec: TableSpec, mark: Option<&TableMark>, at: EndLsn, base: EndLsn, now: Instant) -> Self {
        let broken = mark.and_then(|m| m.blocked.clone()).map(|why| Broken { why, at: now, is_mending: false });
        let lookups = Lookups::of(&spec);
        Table {
            lookups: lookups.clone(),
            sweep: None,
            spec,
            state: mark.map_or(TableState::Loading, |m| m.state),
            life: broken.map_or(Life::Followed, Life::Broken),
            established: mark.map(|m| Established {
                template: m.template.clone(),
                fingerprint: m.fingerprint,
                catalog: m.catalog,
                composition: None,
                types: m.types.clone(),
                ttl_until_ms: m.ttl_until_ms,
                compared_ms: m.compared_ms,
                verified_ms: m.verified_ms,
                // Those of other lookups are no longer kept, and would not be complete if these were configured again.
                lookups: m.lookups_as.filter(|_| m.lookups_as == lookups.as_ref().map(|lookups| lookups.fingerprint())),
            }),
            shape: Shape {
                written_as: mark.map(|m| m.fingerprint),
                reread_for: None,
                is_mixed: false,
                looks_to_come: 0,
                fit: (at, at),
                emptied_by: None,
            },
            pending: HashSet::new(),
            is_touched: false,
            base,
            removed: mark.is_some_and(|m| m.removed),
            changed_beside: mark.is_some_and(|m| m.changed_beside),
            // The position may have been taken back since.
            as_of: mark.and_then(|m| m.as_of).map(|as_of| as_of.min(at)),
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
        self.sweep = None;
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

    /// Returns why the table cannot be followed, even while another attempt is being made.
    pub fn broken_because(&self) -> Option<&Blocked> {
        self.broken().map(|broken| &broken.why)
    }

    /// Returns why the table cannot be followed, as far as is known.
    pub fn blocked(&self) -> Option<&Blocked> {
        self.broken().filter(|broken| !broken.is_mending).map(|broken| &broken.why)
    }

    /// Returns whether what the checkpoint says about the table holds, and nothing is read of it.
    pub fn stands(&self) -> bool {
        matches!(self.life, Life::Followed)
    }

    /// Returns whether Redis has every change of the table that the checkpoint covers. A table that is being loaded in
    /// full or cannot be followed may be new, or may not have been followed before.
    pub fn was_followed(&self) -> bool {
        match &self.life {
            Life::Followed => true,
            Life::Reading(load) => load.keeps_rows(),
            Life::Broken(_) | Life::Mending(..) => false,
        }
    }

    pub fn is_compared(&self) -> bool {
        self.load().is_some_and(|load| load.purpose != Purpose::Fill)
    }

    /// Returns whether only keys that an operator removed are missing. If rows are also waiting to be read again, the
    /// next run of the daemon has to load the table.
    fn is_removed(&self) -> bool {
        let loads_attached = self.load().is_some_and(|load| matches!(load.only, Only::Leaves(..)));
        self.removed && self.pending.is_empty() && !self.is_broken() && !loads_attached
    }

    pub fn has_removed_keys(&self) -> bool {
        self.removed
    }

    // ---- the change stream ------------------------------------------------------------------------------------------

    /// A load or a repair changes rows, beside the stream of Postgres.
    pub fn changes_beside(&mut self) {
        self.changed_beside = true;
    }

    /// Whether a load or a repair has changed rows, and the change stream does not say so yet.
    pub fn has_changed_beside(&self) -> bool {
        self.changed_beside
    }

    /// The change stream says so.
    pub fn tells_of_changes_beside(&mut self) {
        self.changed_beside = false;
    }

    // ---- loads ------------------------------------------------------------------------------------------------------

    /// Some rows may be missing or have other fields.
    pub fn mistrust(&mut self) {
        if matches!(self.state, TableState::Loaded | TableState::Incomplete) {
            // The existing rows stay correct while they are read again.
            self.state = TableState::Loading;
        }
        self.shape.written_as = None;
    }

    /// Returns whether a load has read everything that it was to read. Like in [`Self::is_mergeable`], only pending keys
    /// may be left.
    pub fn has_read(&self) -> bool {
        self.load().is_some_and(|load| load.ended && load.has_caught_up)
    }

    /// Begins a load. What was delivered up to `delivered` may be in Redis with other fields, or not at all, so every
    /// chunk must have seen it.
    pub fn begin(&mut self, load: Load, delivered: EndLsn) {
        self.base = self.base.max(delivered);
        self.sweep = None;
        let has_no_lists = self.lookups.is_none() || !holds(Rule::SweepMembers);
        let is_all_of_lists = load.is_of_the_whole_table() || load.is_of_hash_slots() && holds(Rule::SweepReadAgain);
        let load = Load { is_swept: has_no_lists || !is_all_of_lists, ..load };
        self.life = match std::mem::replace(&mut self.life, Life::Followed) {
            Life::Followed | Life::Reading(_) => Life::Reading(load),
            Life::Broken(broken) | Life::Mending(broken, _) => Life::Mending(broken, load),
        };
    }

    /// Called when the load has read the catalog. A load that starts over does so more than once; what it read before
    /// then no longer counts.
    ///
    /// # Errors
    /// Returns why the whole table must be loaded instead: the hashes were written with another mapping, or a load of
    /// attached partitions finds that more has changed than those.
    pub fn looked_up(
        &mut self,
        id: LoadId,
        fingerprint: u64,
        found: Found,
        estimated_rows: u64,
    ) -> Result<(), &'static str> {
        if self.load().is_none_or(|load| load.id != id) {
            return Ok(());
        }
        let mark = found.catalog;
        self.learns_types(fingerprint, mark, &found.types);
        let load = self.load_mut().expect("it was there a moment ago");
        let only = load.only.clone();
        (load.tally, load.estimated_rows, load.found) = (Tally::default(), estimated_rows, Some(found));
        let keeps_rows = load.keeps_rows();
        if keeps_rows && !self.is_written_as(fingerprint) {
            return Err("its columns changed");
        }
        let is_another = match only {
            Only::All => false,
            Only::Leaves(_, expected) => expected != mark,
            // What was written anew is noticed by the next look at the catalog.
            Only::HashSlots(_) => {
                let established = self.established.as_ref().and_then(|established| established.catalog);
                established.is_some_and(|established| established.shape != mark.shape)
            }
        };
        if is_another {
            return Err(ANOTHER_SHAPE);
        }
        if keeps_rows {
            return Ok(());
        }
        if self.shape.written_as.replace(fingerprint) != Some(fingerprint) && self.state == TableState::Loaded {
            self.state = TableState::Loading;
        }
        Ok(())
    }

    /// The stream brings a change of it.
    pub fn touches(&mut self) {
        self.is_touched = true;
    }

    pub fn is_touched(&self) -> bool {
        self.is_touched
    }

    /// The stream has delivered a watermark of this load.
    pub fn delivers_watermark(&mut self, of: Option<LoadId>) {
        let is_touched = self.is_touched;
        if let Some(load) = self.load_mut().filter(|load| Some(load.id) == of) {
            load.is_untouched.get_or_insert(!is_touched);
        }
    }

    pub fn everything_is_read(&mut self, id: LoadId) {
        if let Some(load) = self.load_mut().filter(|load| load.id == id) {
            assert!(!load.ended, "a load ends once");
            load.ended = true;
        }
    }

    /// Records that rows of the load `of` were written: `rows` of those that it read, and the differences found.
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

    /// Counts keys that a comparison reads again, and returns its ID.
    pub fn reads_again(&mut self, of: Option<LoadId>, keys: usize) -> Option<LoadId> {
        let load = self.load_mut().filter(|load| Some(load.id) == of && keys > 0)?;
        load.again += keys;
        Some(load.id)
    }

    pub fn were_read_again(&mut self, keys: usize) {
        if let Some(load) = self.load_mut() {
            assert!(load.again >= keys, "every key that is read again was counted");
            load.again -= keys;
        }
    }

    /// Returns whether the load is complete except for the checkpoint that records it.
    pub fn is_whole(&self) -> bool {
        self.pending.is_empty() && self.load().is_some_and(Load::is_whole)
    }

    /// Ends a load; the next checkpoint records it. `is_verification` means that a comparison has proven every row
    /// correct.
    pub fn finish(&mut self, is_verification: bool) -> Option<Load> {
        let mut load = if self.is_whole() { self.take_load() } else { None }?;
        let found = load.found.take();
        let types = found.as_ref().map(|found| found.types.clone());
        let (catalog, composition) = found.map(|found| (found.catalog, found.composition)).unzip();
        self.not_compared = None;
        let lookups = self.lookups_now();
        let is_mixed = load.rows_as.iter().any(|mapping| Some(*mapping) != self.shape.written_as);
        let types = types.filter(|_| !is_mixed || !holds(Rule::TypesOfAllRows));
        // One may have begun before the load ended.
        let looks_to_come = if is_mixed { 2 } else { 0 };
        match (load.purpose, &load.only) {
            (Purpose::Fill, Only::Leaves(..)) => {
                self.state = TableState::Loaded;
                self.removed = load.removed;
                let established =
                    self.established.as_mut().expect("a table to which partitions are attached was loaded");
                // The rows of the other partitions are as old as before, and so are their TTLs.
                (established.catalog, established.composition) = (catalog, composition);
            }
            // What the entry says of the table now holds for the rows in those hash slots, too.
            (Purpose::Fill, Only::HashSlots(_)) => {
                // All lists were compared with all rows.
                self.established.iter_mut().for_each(|established| established.lookups = lookups);
            }
            (Purpose::Fill, Only::All) => {
                self.life = Life::Followed;
                self.shape.fit = (self.base, self.base);
                self.state = TableState::Loaded;
                self.removed = load.removed;
                (self.shape.is_mixed, self.shape.looks_to_come) = (is_mixed, looks_to_come);
                self.established = Some(Established {
                    template: self.spec.key.to_string(),
                    fingerprint: self.shape.written_as.expect("a load that ended has read the catalog"),
                    catalog,
                    composition,
                    types,
                    ttl_until_ms: Some(load.renewed_until_ms.max(load.started_ms + self.spec.ttl_ms)),
                    compared_ms: Some(load.started_ms),
                    verified_ms: self.established.as_ref().and_then(|before| before.verified_ms),
                    lookups,
                });
            }
            (Purpose::Compare(repair), _) => {
                let is_right = repair == Repair::Mend || load.tally.drift() == 0;
                let established = self.established.as_mut().expect("what is compared was loaded");
                if is_right {
                    established.compared_ms = Some(load.started_ms);
                }
                if is_right && is_verification {
                    established.verified_ms = Some(load.started_ms);
                }
                if repair == Repair::Mend {
                    (established.catalog, established.composition) = (catalog, composition);
                    // Every row that differed was written again.
                    established.types = types;
                    established.lookups = lookups;
                    (self.shape.is_mixed, self.shape.looks_to_come) = (is_mixed, looks_to_come);
                    self.removed = load.removed;
                }
            }
        }
        Some(load)
    }

    /// A comparison that cannot be made proves nothing about the table, whose state is left unchanged. Returns `false`
    /// if another load has replaced it.
    pub fn cannot_be_compared(&mut self, id: LoadId, now: Instant) -> bool {
        let is_this = self.load().is_some_and(|load| load.id == id && load.purpose != Purpose::Fill);
        if is_this {
            self.take_load();
            self.not_compared = Some(now);
        }
        is_this
    }

    // ---- lookups ----------------------------------------------------------------------------------------------------

    pub fn lookups(&self) -> Option<&Arc<Lookups>> {
        self.lookups.as_ref()
    }

    fn lookups_now(&self) -> Option<u64> {
        self.lookups.as_ref().map(|lookups| lookups.fingerprint())
    }

    /// Whether the lists are as the rows in Redis give them, apart from what nobody can know.
    fn has_all_members(&self) -> bool {
        self.established.as_ref().is_some_and(|established| established.lookups == self.lookups_now())
    }

    /// What may be assumed about the memberships of rows that are written now.
    pub fn knows(&self) -> Known {
        match self.load().is_none() && self.has_all_members() || !holds(Rule::AddMembersAgain) {
            true => Known::Memberships,
            false => Known::Nothing,
        }
    }

    /// Whether members are to be compared with rows: at the end of a load, or because the lookups have changed.
    pub fn is_to_be_swept(&self) -> bool {
        match self.load() {
            Some(load) => load.has_compared_rows() && load.is_to_be_swept(),
            None => self.lookups.is_some() && self.stands() && self.established.is_some() && !self.has_all_members(),
        }
    }

    /// Returns the comparison in progress, which begins if there is none.
    pub fn begin_sweep(&mut self) -> Option<&mut Sweep> {
        let lookups = self.lookups.as_ref().filter(|_| self.is_to_be_swept())?;
        let extent = match self.load() {
            // Every row was written or left to the stream, with all its memberships.
            Some(load) if load.purpose == Purpose::Fill && !load.is_of_hash_slots() => Extent::Lists,
            // Lists in these hash slots may lack members whose rows lie elsewhere.
            Some(_) | None => Extent::ListsAndRows,
        };
        let sweep = self.sweep.take().unwrap_or_else(|| Box::new(Sweep::new(lookups.clone(), extent)));
        Some(self.sweep.insert(sweep))
    }

    /// Returns the comparison in progress, unless it was given up.
    pub fn sweep(&mut self) -> Option<&mut Sweep> {
        self.sweep.as_deref_mut()
    }

    /// What is found is written, not only counted.
    pub fn mends_members(&self) -> bool {
        self.load().is_none_or(|load| load.purpose != Purpose::Compare(Repair::OnlyCount))
    }

    /// The comparison has ended.
    pub fn is_swept(&mut self) {
        let found = self.sweep.take().map_or(0, |sweep| sweep.found());
        let (lookups, mends) = (self.lookups_now(), self.mends_members());
        match self.load_mut() {
            Some(load) => {
                load.is_swept = true;
                load.tally.lookups += found;
                load.tally.repaired += if mends { found } else { 0 };
            }
            None => {
                let established = self.established.as_mut().expect("a table that stands was loaded");
                established.lookups = lookups;
            }
        }
    }

    // ---- the catalog ------------------------------------------------------------------------------------------------

    /// Returns whether the hashes have this mapping, or will have it once the load in progress has written them.
    pub fn is_written_as(&self, fingerprint: u64) -> bool {
        self.shape.written_as == Some(fingerprint)
    }

    /// Returns whether the table must be read again because of a row with this mapping, which differs from that of the
    /// hashes.
    pub fn is_reread_for(&mut self, fingerprint: u64) -> bool {
        let not_looked_up_yet = self.load().is_some() && self.shape.written_as.is_none();
        !not_looked_up_yet && self.shape.reread_for.replace(fingerprint) != Some(fingerprint)
    }

    /// Marks the table as one that cannot be followed and no longer counts as complete. Existing rows stay; if they
    /// were correct, they are as of the last check of the catalog that matched; with `lacks_rows`, some were not. Returns
    /// `false` if this was known already.
    pub fn breaks(&mut self, why: Blocked, lacks_rows: bool, now: Instant) -> bool {
        if lacks_rows {
            self.state = TableState::Healing;
        } else if self.state != TableState::Healing {
            self.state = TableState::Incomplete;
            self.as_of = self.as_of.or(Some(self.shape.fit.0));
        }
        self.shape.written_as = None;
        // The next load brings the rows that they wait for.
        self.pending.clear();
        self.sweep = None;
        let is_new = self.broken_because() != Some(&why);
        self.life = Life::Broken(Broken { why, at: now, is_mending: false });
        is_new
    }

    pub fn is_tried_again(&self, now: Instant) -> bool {
        matches!(&self.life, Life::Broken(broken) if now.saturating_duration_since(broken.at) >= BROKEN_RETRY)
    }

    /// Compares the catalog with the table's state. `at` is the position that Redis has reached.
    pub fn sees_catalog(&mut self, seen: CatalogSeen, at: EndLsn) -> Look {
        if !self.stands() {
            // The load reads the catalog itself, and a broken table is tried again anyway. But rows that count as complete
            // meanwhile may no longer be.
            return match seen {
                CatalogSeen::Table { mark, .. } if self.state == TableState::Loaded && self.began_before(mark) => {
                    Look::Loads(ANOTHER_SHAPE, Trust::Incomplete)
                }
                CatalogSeen::Table { .. } | CatalogSeen::Unfit(_) => Look::AsBefore,
            };
        }
        let (fingerprint, mark, composition, types, written_by) = match seen {
            CatalogSeen::Table { fingerprint, mark, composition, types, written_by } => {
                (fingerprint, mark, composition, types, written_by)
            }
            CatalogSeen::Unfit(why) => return Look::Breaks(why),
        };
        if !self.is_written_as(fingerprint) {
            return Look::Loads("its columns changed", Trust::Incomplete);
        }
        let is_right = self.state == TableState::Loaded && self.pending.is_empty() && !self.removed;
        let established = self.established.as_mut().expect("a table whose hashes have a mapping was loaded");
        match established.catalog {
            Some(before) if before == mark => established.composition = Some(composition),
            // The files were replaced by a TRUNCATE that the stream has delivered.
            Some(before)
                if before.shape == mark.shape && written_by.is_some() && written_by == self.shape.emptied_by =>
            {
                (established.catalog, established.composition) = (Some(mark), Some(composition));
            }
            Some(before) if before.shape == mark.shape => {
                return Look::Loads("its rows were written anew", Trust::Stands);
            }
            Some(_) | None => {
                let attached = established.composition.as_ref().and_then(|before| composition.attached_since(before));
                return match attached.filter(|_| is_right) {
                    Some(leaves) => Look::Attached(leaves, mark),
                    None => Look::Loads(ANOTHER_SHAPE, Trust::Incomplete),
                };
            }
        }
        if self.shape.looks_to_come > 0 {
            self.shape.looks_to_come -= 1;
            self.shape.is_mixed = self.shape.looks_to_come > 0;
        }
        self.learns_types(fingerprint, mark, &types);
        self.shape.fit = (self.shape.fit.1, at);
        Look::AsBefore
    }

    /// Returns whether the load in progress found the table in another shape.
    fn began_before(&self, mark: CatalogMark) -> bool {
        let found = self.load().and_then(|load| load.found.as_ref());
        found.is_some_and(|before| before.catalog.shape != mark.shape)
    }

    /// Rows with this mapping are written. It may differ from that of the others, and from what a load in progress finds, or
    /// has found.
    pub fn gets_rows_of(&mut self, fingerprint: u64) {
        if let Some(load) = self.load_mut().filter(|load| !load.rows_as.contains(&fingerprint)) {
            load.rows_as.push(fingerprint);
        }
        let is_other = |established: &&mut Established| established.fingerprint != fingerprint;
        if let Some(established) = self.established.as_mut().filter(is_other)
            && holds(Rule::TypesOfAllRows)
        {
            (established.types, self.shape.is_mixed) = (None, true);
            self.shape.looks_to_come = 0;
        }
    }

    /// Takes over what the catalog says about the types of columns: at once if all hashes have these types, otherwise
    /// when a load has ended. An entry that an earlier version wrote gets its types so, without a load.
    fn learns_types(&mut self, fingerprint: u64, catalog: CatalogMark, types: &EncodedRowType) {
        let Some(established) = self.established.as_mut().filter(|_| !self.shape.is_mixed) else { return };
        let is_same = established.catalog.is_some_and(|then| then.shape == catalog.shape);
        let is_mixed = established.fingerprint != fingerprint
            || (!is_same && established.types.as_ref().is_some_and(|known| !known.is_like(types)));
        if is_mixed && holds(Rule::TypesOfAllRows) {
            (established.types, self.shape.is_mixed) = (None, true);
        } else if is_same || established.types.is_some() {
            established.types = Some(types.clone());
        }
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

    /// Marks keys as pending, and returns those that were not pending before. `at` is the position of the checkpoint
    /// before the batch that made them pending.
    pub fn pend(&mut self, keys: Vec<Key>, at: EndLsn) -> Vec<Key> {
        let new: Vec<Key> = keys.into_iter().filter(|key| self.pending.insert(key.clone())).collect();
        if !new.is_empty() {
            self.as_of = self.as_of.or(Some(at));
        }
        new
    }

    /// Returns whether there are too many pending keys. If so, they are dropped, because the table is loaded in full.
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

    /// Until the whole table has been read again, a missing key proves nothing.
    pub fn keys_are_removed(&mut self) {
        self.removed = true;
        if let Some(load) = self.load_mut() {
            load.removed = true;
        }
        self.is_incomplete();
    }

    /// Returns whether merging is allowed: it needs a correct hash with the current mapping, whose fingerprint is
    /// `fingerprint`. Once only pending keys remain of a load, all other rows are correct; if changes to those made
    /// more keys pending, the load would never end. While an attached partition is loaded, a key of its rows may still
    /// have the values of a partition that was detached.
    pub fn is_mergeable(&self, fingerprint: Option<u64>) -> bool {
        let right = match self.load() {
            Some(load) if load.ended => true,
            Some(load) if matches!(load.only, Only::Leaves(..)) => false,
            Some(_) | None => matches!(self.state, TableState::Loaded | TableState::Incomplete),
        };
        right && fingerprint.is_some() && self.shape.written_as == fingerprint
    }

    // ---- time to live -----------------------------------------------------------------------------------------------

    pub fn renewal_begins(&mut self, at_ms: u64) {
        self.renewing_since_ms.get_or_insert(at_ms);
    }

    /// Ends a round of renewals: since it began, every key was renewed or written with a full TTL. Keys that had
    /// expired by then are gone, in which case the round proves nothing.
    pub fn renewal_ends(&mut self, redis_now_ms: u64) {
        let since = self.renewing_since_ms.take().expect("a round that ends has begun");
        let ttl_ms = self.spec.ttl_ms;
        let reach = since + ttl_ms;
        // A comparison does not touch the TTL of rows that are equal.
        let filled = self.load().filter(|load| load.purpose == Purpose::Fill && load.is_of_the_whole_table());
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

    /// Returns whether keys may have expired unnoticed because the daemon was frozen or could not renew their TTLs.
    pub fn may_have_expired(&self, redis_now_ms: u64) -> bool {
        self.stands() && self.ttl_until_ms().is_some_and(|until| until <= redis_now_ms)
    }

    /// Returns whether the table has not been compared for `every_ms`, and no attempt has failed within the last
    /// `retry`.
    pub fn is_to_be_verified(&self, every_ms: u64, retry: Duration, redis_now_ms: u64, now: Instant) -> bool {
        let compared_ms = self.established.as_ref().and_then(|e| e.compared_ms).unwrap_or(0);
        let failed_lately = self.not_compared.is_some_and(|at| now.saturating_duration_since(at) < retry);
        compared_ms.saturating_add(every_ms) <= redis_now_ms && !self.is_broken() && !failed_lately
    }

    // ---- what is reported -------------------------------------------------------------------------------------------

    /// Updates the state for the next checkpoint. Returns whether that changes the table's entry.
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

    /// Returns the table's entry for the checkpoint; `None` if it was never loaded or taken over. The argument is the
    /// number of dead letters recorded, and whether there may be more.
    pub fn mark(&self, (dead_letters, more_dead_letters): (u64, bool)) -> Option<TableMark> {
        let Established {
            template, fingerprint, catalog, types, ttl_until_ms, compared_ms, verified_ms, lookups, ..
        } = self.established.as_ref()?;
        Some(TableMark {
            template: template.clone(),
            fingerprint: *fingerprint,
            catalog: *catalog,
            types: types.clone(),
            state: self.state,
            ttl_until_ms: *ttl_until_ms,
            as_of: self.as_of,
            removed: self.is_removed(),
            compared_ms: *compared_ms,
            verified_ms: *verified_ms,
            blocked: self.blocked().cloned(),
            dead_letters,
            more_dead_letters,
            changed_beside: self.changed_beside,
            lookups: self.spec.lookups.iter().map(|lookup| lookup.key.to_string()).collect(),
            lookups_as: *lookups,
        })
    }

    /// Returns whether the table's entry in the checkpoint is out of date. Readers rely on the entry, so updating it
    /// must not wait for the next heartbeat.
    pub fn says_otherwise(&self, written: &TableMark, more_dead_letters: bool) -> bool {
        written.state != self.state
            || written.blocked.as_ref() != self.blocked()
            || written.more_dead_letters != more_dead_letters
            || self.established.as_ref().is_some_and(|established| established.lookups != written.lookups_as)
    }

    pub fn seen(&self, (dead_letters, more_dead_letters): (u64, bool)) -> TableSeen {
        let load = self.load();
        // The rows are there, and readers of rows may rely on that. People wait for the lists.
        let lacks_lists = self.state == TableState::Loaded && load.is_none() && !self.has_all_members();
        TableSeen {
            state: if lacks_lists { TableState::Loading } else { self.state },
            load_began: load.map(|load| load.started),
            load_progress: load.map(|l| (l.tally.rows, l.estimated_rows.max(l.tally.rows))),
            compared_ms: self.established.as_ref().and_then(|e| e.compared_ms),
            verified_ms: self.established.as_ref().and_then(|e| e.verified_ms),
            blocked: self.blocked().cloned(),
            because: match load.filter(|load| load.purpose == Purpose::Fill) {
                Some(load) => Some(load.because.text.clone()),
                None => lacks_lists.then(|| "its lookups are made from the rows in redis".to_owned()),
            },
            removed: self.removed,
            dead_letters,
            more_dead_letters,
        }
    }

    /// `reads_go_on` says whether keys are still being read again.
    pub fn is_sound(&self, reads_go_on: bool) -> bool {
        let waits = self.pending.is_empty() || self.state != TableState::Loaded;
        let is_read = self.pending.is_empty() || reads_go_on || self.load().is_some();
        let is_followed = self.state != TableState::Loaded || self.blocked().is_none();
        waits && is_read && is_followed
    }
}
