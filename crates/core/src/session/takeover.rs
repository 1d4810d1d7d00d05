//! The checkpoint with which a daemon becomes the writer, and what its session begins with. Pure.
//!
//! Turns the decision of the resume table into values. A mistake here starts a session from a position that Redis has not
//! reached, or tells readers that old rows are correct.

use crate::checkpoint::{Checkpoint, TableMark, TableState};
use crate::lanes::Lost;
use crate::lsn::EndLsn;
use crate::progress::resume::{ConfiguredTable, Facts};
use crate::reason::Reason;
use crate::rules::{Rule, holds};
use crate::schema::{TableId, TableSpec};
use std::collections::{BTreeMap, BTreeSet};

/// What a takeover needs to know in addition to the facts of the resume table.
#[derive(Clone, Copy)]
pub struct Takeover<'a> {
    pub facts: &'a Facts<'a>,
    pub specs: &'a [TableSpec],
    /// The highest epoch that this process has written or read.
    pub epoch_seen: u64,
    pub made_publication: Option<&'a str>,
    /// `evicted_keys` of Redis. `None` if it does not say.
    pub evicted: Option<u64>,
}

/// What a session begins with, once its checkpoint is acknowledged.
#[derive(Debug)]
pub struct Taken {
    /// Where the stream begins.
    pub from: EndLsn,
    pub checkpoint: Checkpoint,
    pub load: Vec<(TableId, Reason)>,
    /// Hash slots of which what they hold is not relied on.
    pub lost: Option<Lost>,
}

impl Takeover<'_> {
    /// A checkpoint that vouches for nothing, to be written before a slot is created or dropped.
    pub(super) fn disowned(&self, because: &Reason) -> Checkpoint {
        let was_lost = self.facts.checkpoint.is_some_and(|c| !c.is_blank()) || because.heals.is_some();
        self.fresh(self.facts.flushed, if was_lost { TableState::Healing } else { TableState::Loading })
    }

    /// Nothing in Redis is trusted; everything up to `base` is left to the loads.
    pub(crate) fn anew(&self, from: EndLsn, base: EndLsn, because: &Reason) -> Taken {
        let base = if holds(Rule::ApplyOnlyAboveBase) { base } else { from };
        let mut checkpoint = self.fresh(base, TableState::Healing);
        checkpoint.seq += 1;
        Taken { from, checkpoint, load: self.all(because), lost: None }
    }

    /// The checkpoint in Redis is trusted; some tables are loaded beside the stream.
    pub(super) fn resumed(&self, from: EndLsn, load: impl IntoIterator<Item = (String, Reason)>) -> Taken {
        let found = self.facts.checkpoint.expect("the resume table streams from a checkpoint");
        let mut loads: BTreeMap<TableId, Reason> = BTreeMap::new();
        for (name, because) in load {
            if let Some(spec) = self.specs.iter().find(|t| t.name == name) {
                loads.entry(spec.id).or_insert(because);
            }
        }
        let mut checkpoint = found.clone();
        if let Some(reached) = self.facts.hash_slots.reached
            && reached < checkpoint.place()
        {
            // What lies before the base is left to loads, which have not ended if any hash slot has not reached it.
            checkpoint.lsn = EndLsn(reached.at).max(checkpoint.base).min(checkpoint.lsn);
            checkpoint.within = None;
        }
        let lost = self.facts.hash_slots.lost.cloned();
        checkpoint.healing = lost.as_ref().map_or(0, Lost::count);
        if std::mem::take(&mut checkpoint.lists_in_doubt) && holds(Rule::DoubtLists) {
            checkpoint.tables.values_mut().for_each(|mark| mark.lookups_as = None);
        }
        checkpoint.epoch = self.epoch();
        checkpoint.seq += 1;
        checkpoint.timeline = self.facts.timeline;
        checkpoint.beat_ms = self.facts.redis_time_ms;
        checkpoint.made_publication = self.made_publication.map(str::to_owned);
        checkpoint.retired = self.retired();
        let fresh = self.marks(TableState::Loading);
        checkpoint.tables.retain(|name, _| fresh.contains_key(name));
        for spec in self.specs.iter().filter(|spec| loads.contains_key(&spec.id)) {
            let mark = checkpoint.tables.get(&spec.name);
            let kept = mark.filter(|m| m.state == TableState::Healing).map(|m| m.state);
            let state = kept.unwrap_or(TableState::Loading);
            // Rows that wait to be read again stay as old as they were, until they are loaded.
            let mark = fresh.get(&spec.name).cloned().map(|m| match mark {
                Some(old) if old.template == m.template => {
                    let (verified_ms, blocked) = (old.verified_ms, old.blocked.clone());
                    let as_of = old.as_of.filter(|_| holds(Rule::KeepAsOf));
                    // The rows still have the columns of these types, until the stream or a load brings others.
                    let is_same = old.fingerprint == m.fingerprint && self.has_shape_of(spec, old);
                    let types = old.types.clone().filter(|_| is_same);
                    TableMark { state, as_of, verified_ms, blocked, types, ..m }
                }
                Some(_) | None => TableMark { state, ..m },
            });
            checkpoint.tables.extend(mark.map(|m| (spec.name.clone(), m)));
        }
        Taken { from, checkpoint, load: loads.into_iter().collect(), lost }
    }

    /// Whether the catalog says of the table what it said when the table was last read.
    fn has_shape_of(&self, spec: &TableSpec, old: &TableMark) -> bool {
        let now = self.facts.tables.iter().find(|table| table.name == spec.name).map(|table| table.catalog.shape);
        now.is_some() && now == old.catalog.map(|catalog| catalog.shape)
    }

    pub(super) fn all(&self, because: &Reason) -> Vec<(TableId, Reason)> {
        self.specs.iter().map(|spec| (spec.id, because.clone())).collect()
    }

    /// Above every epoch that anybody has seen, even if Redis has lost the last ones: the clock sees to that.
    fn epoch(&self) -> u64 {
        let found = self.facts.checkpoint.map_or(0, |c| c.epoch);
        self.epoch_seen.max(found).max(self.facts.redis_time_ms / 1000) + 1
    }

    fn marks(&self, state: TableState) -> BTreeMap<String, TableMark> {
        let lookups = |name: &String| {
            let spec = self.specs.iter().find(|spec| spec.name == *name);
            spec.into_iter().flat_map(|spec| &spec.lookups).map(|lookup| lookup.key.to_string()).collect()
        };
        let mark = |t: &ConfiguredTable| TableMark {
            lookups: lookups(&t.name),
            ..TableMark::unread(t.template.clone(), t.fingerprint, state)
        };
        self.facts.tables.iter().map(|t| (t.name.clone(), mark(t))).collect()
    }

    /// Templates, of tables and of lookups, that are no longer configured.
    fn retired(&self) -> Vec<String> {
        let Some(found) = self.facts.checkpoint else { return Vec::new() };
        let marks = found.tables.values().flat_map(|mark| mark.lookups.iter().chain([&mark.template]));
        let lookups = self.specs.iter().flat_map(|spec| &spec.lookups).map(|lookup| lookup.key.to_string());
        let configured: BTreeSet<String> =
            lookups.chain(self.facts.tables.iter().map(|table| table.template.clone())).collect();
        let known = found.retired.iter().chain(marks);
        let mut retired: Vec<String> = known.filter(|template| !configured.contains(*template)).cloned().collect();
        retired.sort();
        retired.dedup();
        retired
    }

    /// Vouches for no row.
    fn fresh(&self, at: EndLsn, state: TableState) -> Checkpoint {
        Checkpoint {
            system_id: self.facts.system_id.to_owned(),
            timeline: self.facts.timeline,
            database: self.facts.database.to_owned(),
            lsn: at,
            epoch: self.epoch(),
            seq: self.facts.checkpoint.map_or(0, |c| c.seq) + 1,
            within: None,
            clearing: None,
            last: None,
            beat_ms: self.facts.redis_time_ms,
            base: at,
            floor: None,
            whole: self.facts.checkpoint.map_or(0, |c| c.whole),
            healing: 0,
            lists_in_doubt: false,
            evicted: self.evicted.unwrap_or(0),
            made_publication: self.made_publication.map(str::to_owned),
            tables: self.marks(state),
            retired: self.retired(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::change::{Begin, CommitTime};
    use crate::checkpoint::{Blocked, Place, SlotState, Within};
    use crate::format::Format;
    use crate::lsn::{CommitLsn, Lsn};
    use crate::plan::key;
    use crate::progress::resume::{Adopt, HashSlots};
    use crate::reason::Heal;
    use crate::schema::{CatalogMark, NullRule, QualifiedName};
    use crate::typed::row_type::EncodedRowType;

    #[test]
    fn the_stream_is_applied_from_where_the_last_hash_slot_is() {
        let at = |at| Lsn::new(at).expect("not zero");
        let head = r#"{"system_id":"7","timeline":1,"database":"shop","lsn":"0/64","state":"ready","epoch":1,"seq":1,
                       "beat_ms":0,"base":"0/A","entries":0}"#;
        let begin = Begin { xid: 9, commit: CommitLsn(at(120)), time: CommitTime(1) };
        let split = Checkpoint {
            within: Some(Within { begin, changes_done: 5 }),
            ..Checkpoint::head(head.as_bytes()).expect("the settled format")
        };
        let slot = SlotState::Ready { confirmed: EndLsn(at(5)), active_pid: None };
        let begins = |reached: Option<(u64, u64)>| {
            let mut facts = Facts::fitting(Some(&split), &slot, &[]);
            facts.hash_slots.reached = reached.map(|(place, done)| Place { at: at(place), done });
            let takeover = Takeover { facts: &facts, specs: &[], epoch_seen: 0, made_publication: None, evicted: None };
            let checkpoint = takeover.resumed(EndLsn(at(5)), []).checkpoint;
            (checkpoint.lsn.0.get(), checkpoint.within.map(|within| within.changes_done))
        };
        for everywhere in [None, Some((120, 5)), Some((120, 6)), Some((130, 0))] {
            assert_eq!(begins(everywhere), (100, Some(5)), "{everywhere:?}");
        }
        assert_eq!(begins(Some((120, 4))), (100, None), "the split transaction is applied from its start");
        assert_eq!(begins(Some((110, 0))), (100, None));
        assert_eq!(begins(Some((40, 0))), (40, None));
        assert_eq!(begins(Some((7, 0))), (10, None), "the loads have what lies before the base");
    }

    /// Of a Redis that went back: a daemon that has only just started knows of none of the takeovers since, but whoever
    /// reads here may.
    #[test]
    fn an_epoch_is_above_those_that_redis_forgot() {
        let found = r#"{"system_id":"7","timeline":1,"database":"shop","lsn":"0/10","state":"ready","epoch":1700000000,
                        "seq":5,"beat_ms":1700000000000,"base":"0/1","entries":0}"#;
        let found = Checkpoint::head(found.as_bytes()).expect("the settled format");
        let slot = SlotState::Ready { confirmed: found.lsn, active_pid: None };
        let epoch = |epoch_seen, redis_time_ms| {
            let facts = Facts {
                checkpoint: Some(&found),
                slot: &slot,
                replace_slot: None,
                system_id: "7",
                database: "shop",
                timeline: 1,
                checkpoint_timeline_ended: None,
                flushed: found.lsn,
                went_back: None,
                adopt: Adopt::Refuse,
                hash_slots: HashSlots::default(),
                redis_time_ms,
                tables: &[],
                added: &[],
            };
            let takeover = Takeover { facts: &facts, specs: &[], epoch_seen, made_publication: None, evicted: None };
            takeover.resumed(found.lsn, []).checkpoint.epoch
        };
        let forgotten = epoch(0, 1_700_000_100_000);
        assert_eq!(forgotten, 1_700_000_101);
        assert!(epoch(0, 1_700_000_200_000) > forgotten);
        // A clock that was set back.
        assert_eq!(epoch(1_700_000_150, 5_000), 1_700_000_151);
        assert_eq!(epoch(0, 5_000), 1_700_000_001);
    }

    fn specs(names: &[&str]) -> Vec<TableSpec> {
        let spec = |(id, name): (u16, &&str)| TableSpec {
            id: TableId(id),
            name: (*name).to_owned(),
            table: QualifiedName { schema: "public".to_owned(), table: (*name).to_owned() },
            key: key::parse_template(&format!("{name}:{{id}}")).expect("a template"),
            columns: Vec::new(),
            rename: Vec::new(),
            null: NullRule::Empty,
            ttl_ms: 1,
            format: Format::Hash,
            lookups: Vec::new(),
        };
        (0..).zip(names).map(spec).collect()
    }

    fn configured(specs: &[TableSpec]) -> Vec<ConfiguredTable> {
        let catalog = CatalogMark { shape: 3, storage: 4 };
        let table = |spec: &TableSpec| ConfiguredTable {
            name: spec.name.clone(),
            template: spec.key.to_string(),
            fingerprint: 5,
            catalog,
        };
        specs.iter().map(table).collect()
    }

    /// A table of which everything is known.
    fn known(template: &str, state: TableState) -> TableMark {
        TableMark {
            template: template.to_owned(),
            fingerprint: 4,
            catalog: Some(CatalogMark { shape: 1, storage: 2 }),
            types: Some(EncodedRowType("2:idn".into())),
            state,
            ttl_until_ms: Some(2_000),
            as_of: Some(EndLsn(Lsn::new(70).expect("not zero"))),
            removed: true,
            compared_ms: Some(6),
            verified_ms: Some(7),
            blocked: Some(Blocked::from_message("a fact: a remedy")),
            dead_letters: 8,
            more_dead_letters: true,
            changed_beside: true,
            lookups: BTreeSet::new(),
            lookups_as: None,
        }
    }

    /// A table of which nothing is known.
    fn unknown(template: &str, state: TableState) -> TableMark {
        TableMark {
            template: template.to_owned(),
            fingerprint: 5,
            catalog: None,
            types: None,
            state,
            ttl_until_ms: None,
            as_of: Some(EndLsn(Lsn::FIRST)),
            removed: false,
            compared_ms: None,
            verified_ms: None,
            blocked: None,
            dead_letters: 0,
            more_dead_letters: false,
            changed_beside: true,
            lookups: BTreeSet::new(),
            lookups_as: None,
        }
    }

    fn found(tables: &[(&str, TableMark)]) -> Checkpoint {
        let head = r#"{"system_id":"7","timeline":1,"database":"shop","lsn":"0/64","state":"ready","epoch":3,"seq":5,
                       "beat_ms":1,"base":"0/1","last":{"end":"0/64","xid":9,"time_us":1},"evicted":2,
                       "made_publication":"old","retired":["older:{id}"],"entries":0}"#;
        let tables = tables.iter().map(|(name, mark)| ((*name).to_owned(), mark.clone())).collect();
        Checkpoint { tables, ..Checkpoint::head(head.as_bytes()).expect("the settled format") }
    }

    #[test]
    fn a_table_that_is_loaded_beside_the_stream_keeps_what_its_rows_can_still_promise() {
        use TableState::{Healing, Incomplete, Loaded, Loading};
        let specs = specs(&["whole", "torn", "sick", "moved", "new"]);
        let tables = configured(&specs);
        let found = found(&[
            ("whole", known("whole:{id}", Loaded)),
            ("torn", known("torn:{id}", Incomplete)),
            ("sick", known("sick:{id}", Healing)),
            ("moved", known("before:{id}", Healing)),
            ("gone", known("gone:{id}", Loaded)),
        ]);
        let slot = SlotState::Ready { confirmed: found.lsn, active_pid: None };
        let facts = Facts { timeline: 2, ..Facts::fitting(Some(&found), &slot, &tables) };
        let made_publication = Some("prefetchd");
        let takeover = Takeover { facts: &facts, specs: &specs, epoch_seen: 0, made_publication, evicted: Some(9) };
        let [first, second] = ["first", "second"].map(Reason::ordinary);
        let load = ["new", "moved", "sick", "torn", "who"].map(|name| (name.to_owned(), first.clone()));
        let taken = takeover.resumed(found.lsn, load.into_iter().chain([("torn".to_owned(), second)]));
        let kept = |template, state| {
            let TableMark { as_of, verified_ms, blocked, .. } = known(template, state);
            TableMark { as_of, verified_ms, blocked, ..unknown(template, state) }
        };
        let expected = Checkpoint {
            timeline: 2,
            epoch: 4,
            seq: 6,
            beat_ms: 1_000,
            made_publication: made_publication.map(str::to_owned),
            // Its template is no longer configured, and neither is that of `gone`.
            retired: ["before:{id}", "gone:{id}", "older:{id}"].map(str::to_owned).to_vec(),
            tables: BTreeMap::from([
                ("whole".to_owned(), known("whole:{id}", Loaded)),
                ("torn".to_owned(), kept("torn:{id}", Loading)),
                ("sick".to_owned(), kept("sick:{id}", Healing)),
                ("moved".to_owned(), unknown("moved:{id}", Healing)),
                ("new".to_owned(), unknown("new:{id}", Loading)),
            ]),
            ..found.clone()
        };
        assert_eq!(taken.checkpoint, expected);
        assert_eq!(taken.load, [1, 2, 3, 4].map(|id| (TableId(id), first.clone())), "for the first reason");
        assert_eq!(taken.from, found.lsn);
    }

    #[test]
    fn types_are_kept_while_the_columns_are_the_same() {
        let specs = specs(&["same", "columns", "shape", "trusted"]);
        let tables = configured(&specs);
        let (fingerprint, shape) = (tables[0].fingerprint, tables[0].catalog.shape);
        let known = |spec: &str, fingerprint, shape| TableMark {
            fingerprint,
            catalog: Some(CatalogMark { shape, storage: 9 }),
            ..known(&format!("{spec}:{{id}}"), TableState::Incomplete)
        };
        let found = found(&[
            ("same", known("same", fingerprint, shape)),
            ("columns", known("columns", fingerprint + 1, shape)),
            ("shape", known("shape", fingerprint, shape + 1)),
            ("trusted", known("trusted", fingerprint, shape)),
        ]);
        let slot = SlotState::Ready { confirmed: found.lsn, active_pid: None };
        let facts = Facts::fitting(Some(&found), &slot, &tables);
        let takeover = Takeover { facts: &facts, specs: &specs, epoch_seen: 0, made_publication: None, evicted: None };
        let load = ["same", "columns", "shape"].map(|name| (name.to_owned(), Reason::ordinary("a test")));
        let taken = takeover.resumed(found.lsn, load);
        let has_types = |name: &str| taken.checkpoint.tables[name].types.is_some();
        assert!(has_types("same") && has_types("trusted"));
        assert!(!has_types("columns") && !has_types("shape"));
        let anew = takeover.anew(found.lsn, found.lsn, &Reason::ordinary("a test"));
        assert!(anew.checkpoint.tables.values().all(|mark| mark.types.is_none()));
    }

    #[test]
    fn what_nobody_trusts_vouches_for_nothing() {
        let specs = specs(&["a", "b"]);
        let tables = configured(&specs);
        let found = found(&[("a", known("a:{id}", TableState::Loaded))]);
        let slot = SlotState::Absent;
        let at = |at| EndLsn(Lsn::new(at).expect("not zero"));
        let because = Reason::ordinary("a test");
        let take = |checkpoint: Option<&Checkpoint>, evicted| {
            let facts = Facts::fitting(checkpoint, &slot, &tables);
            let takeover = Takeover { facts: &facts, specs: &specs, epoch_seen: 20, made_publication: None, evicted };
            (takeover.anew(at(90), at(150), &because), takeover.disowned(&because))
        };
        let expected = |state| Checkpoint {
            lsn: at(150),
            epoch: 21,
            last: None,
            beat_ms: 1_000,
            base: at(150),
            evicted: 9,
            made_publication: None,
            retired: Vec::new(),
            tables: ["a", "b"].map(|name| (name.to_owned(), unknown(&format!("{name}:{{id}}"), state))).into(),
            ..found.clone()
        };
        let (taken, disowned) = take(None, Some(9));
        assert_eq!(taken.checkpoint, Checkpoint { seq: 2, ..expected(TableState::Healing) });
        assert_eq!(taken.load, [0, 1].map(|id| (TableId(id), because.clone())));
        assert_eq!(taken.from, at(90));
        let lsn = at(200);
        assert_eq!(disowned, Checkpoint { seq: 1, lsn, base: lsn, ..expected(TableState::Loading) });
        let (taken, disowned) = take(Some(&found), None);
        let retired = vec!["older:{id}".to_owned()];
        let lost = Checkpoint { evicted: 0, retired, ..expected(TableState::Healing) };
        assert_eq!(taken.checkpoint, Checkpoint { seq: 7, ..lost.clone() });
        assert_eq!(disowned, Checkpoint { seq: 6, lsn, base: lsn, ..lost });
    }

    #[test]
    fn only_an_interrupted_first_start_has_lost_nothing() {
        use TableState::{Healing, Loading};
        let (specs, slot) = (specs(&["a"]), SlotState::Absent);
        let tables = configured(&specs);
        let blank = Checkpoint { last: None, base: found(&[]).lsn, ..found(&[("a", unknown("a:{id}", Loading))]) };
        assert!(blank.is_blank());
        let heals = Reason::heals(Heal::SlotLost, "the slot is gone");
        let ordinary = Reason::ordinary("first start");
        for (found, because, state) in [
            (None, &ordinary, Loading),
            (None, &heals, Healing),
            (Some(&blank), &ordinary, Loading),
            (Some(&blank), &heals, Healing),
            (Some(&found(&[])), &ordinary, Healing),
        ] {
            let facts = Facts::fitting(found, &slot, &tables);
            let takeover =
                Takeover { facts: &facts, specs: &specs, epoch_seen: 0, made_publication: None, evicted: None };
            assert_eq!(takeover.disowned(because).tables["a"].state, state, "{found:?} {because}");
        }
    }
}
