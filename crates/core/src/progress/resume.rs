//! Where to resume: one table over what Redis remembers and what Postgres has. The first match wins.
//!
//! It must not know how the facts were obtained, nor how tables are loaded. A mistake here means changes that never arrive,
//! or rows from another database.

use crate::checkpoint::{Checkpoint, Place, SlotState, TableState};
use crate::lanes::Lost;
use crate::lanes::book::{Judged, Loss};
use crate::lsn::{EndLsn, Lsn};
use crate::reason::{Heal, Reason};
use crate::rules::{Rule, holds};
use crate::schema::CatalogMark;

/// Whether a checkpoint of another Postgres system or database may be replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Adopt {
    Refuse,
    Accept,
}

/// A configured table, with the fingerprint that its rows would be written under now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfiguredTable {
    pub name: String,
    pub template: String,
    pub fingerprint: u64,
    pub catalog: CatalogMark,
}

/// What is known before the stream starts.
#[derive(Debug, Clone, Copy)]
pub struct Facts<'a> {
    pub checkpoint: Option<&'a Checkpoint>,
    pub slot: &'a SlotState,
    /// Why the slot cannot be used, although Postgres shows it as sound.
    pub replace_slot: Option<&'a Reason>,
    pub system_id: &'a str,
    pub database: &'a str,
    /// The server's.
    pub timeline: u32,
    /// Where the checkpoint's timeline ended. `None` if it is the server's timeline, or not one of its ancestors.
    pub checkpoint_timeline_ended: Option<Lsn>,
    /// The server's flushed position now.
    pub flushed: EndLsn,
    /// Why the previous session found that Postgres was rewound.
    pub went_back: Option<&'a str>,
    pub adopt: Adopt,
    pub hash_slots: HashSlots<'a>,
    /// Redis TIME, milliseconds since the Unix epoch.
    pub redis_time_ms: u64,
    pub tables: &'a [ConfiguredTable],
    /// Tables that were missing from the publication: loaded whatever the checkpoint says.
    pub added: &'a [(String, Reason)],
}

/// What is known of hash slots that are written one by one. Nothing where all keys lie in one.
#[derive(Debug, Clone, Copy, Default)]
pub struct HashSlots<'a> {
    /// Why nothing may be relied on.
    pub unreliable: Option<&'a str>,
    /// Those that have lost something, although the rest may be relied on.
    pub lost: Option<&'a Lost>,
    /// What all of them have reached.
    pub reached: Option<Place>,
}

impl<'a> HashSlots<'a> {
    /// `loss` is that of `judged`.
    pub fn of(judged: Option<&Judged>, loss: Option<&'a Loss>) -> Self {
        let (unreliable, lost) = match loss {
            None => (None, None),
            Some(Loss::Everything(because)) => (Some(because.as_str()), None),
            Some(Loss::Some(lost)) => (None, Some(lost)),
        };
        HashSlots { unreliable, lost, reached: judged.and_then(|judged| judged.least) }
    }
}

/// What to do. `because` is shown in logs and in the status.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ResumeDecision {
    Refuse {
        because: String,
    },
    /// Create a slot, then load every table.
    NewSlot {
        drop_old: bool,
        because: Reason,
    },
    /// Keep the slot, but trust nothing in Redis: stream from the slot's position, apply only above `base`, load every
    /// table.
    Deliver {
        from: EndLsn,
        base: EndLsn,
        because: Reason,
    },
    /// Resume. `load`: tables to load beside the stream, by name.
    Stream {
        from: EndLsn,
        load: Vec<(String, Reason)>,
    },
}

impl ResumeDecision {
    /// Whether rows will be read from Postgres.
    pub fn loads(&self) -> bool {
        match self {
            ResumeDecision::Refuse { .. } => false,
            ResumeDecision::NewSlot { .. } | ResumeDecision::Deliver { .. } => true,
            ResumeDecision::Stream { load, .. } => !load.is_empty(),
        }
    }
}

const FIRST_START_INTERRUPTED: &str = "the first start was interrupted";

/// The resume table. A slot that exists is complete: every snapshot sees the commits that it leaves out.
pub fn decide(facts: &Facts<'_>) -> ResumeDecision {
    use ResumeDecision::{Deliver, NewSlot, Refuse, Stream};
    let stranger = facts.checkpoint.and_then(|c| other_server(c, facts));
    if let (Some(because), Adopt::Refuse) = (&stranger, facts.adopt) {
        let because = format!("{because}: correct postgres.url, or run with --adopt to load from this one");
        return Refuse { because };
    }
    if let (Some(because), false) = (facts.replace_slot, *facts.slot == SlotState::Absent) {
        return NewSlot { drop_old: true, because: because.clone() };
    }
    let confirmed = match (facts.slot, facts.checkpoint) {
        (SlotState::Absent, None) => return NewSlot { drop_old: false, because: Reason::ordinary("first start") },
        (SlotState::Absent, Some(c)) if c.is_blank() => {
            return NewSlot { drop_old: false, because: Reason::ordinary(FIRST_START_INTERRUPTED) };
        }
        (SlotState::Absent, Some(_)) => {
            let because = Reason::heals(Heal::SlotLost, "the replication slot is gone");
            return NewSlot { drop_old: false, because };
        }
        (SlotState::Invalidated { reason }, _) => {
            let because = Reason::heals(Heal::SlotLost, format!("the replication slot was invalidated ({reason})"));
            return NewSlot { drop_old: true, because };
        }
        (SlotState::Ready { confirmed, .. }, _) if *confirmed > facts.flushed => {
            // Postgres would accept it, and skip whatever commits below it from now on.
            let text = format!("the slot stands at {confirmed}, beyond the server's position {}", facts.flushed);
            return NewSlot { drop_old: true, because: Reason::heals(Heal::PostgresWentBack, text) };
        }
        (SlotState::Ready { confirmed, .. }, _) => *confirmed,
    };
    let deliver = |because| Deliver { from: confirmed, base: facts.flushed, because };
    if let Some(because) = stranger {
        return deliver(Reason::ordinary(because));
    }
    let Some(checkpoint) = facts.checkpoint else {
        return deliver(Reason::heals(Heal::RedisLost, "redis has no checkpoint"));
    };
    if let Some(because) = postgres_went_back(checkpoint, facts).filter(|_| holds(Rule::NoticePostgresWentBack)) {
        return deliver(Reason::heals(Heal::PostgresWentBack, because));
    }
    if checkpoint.lsn < confirmed && checkpoint.is_blank() {
        return deliver(Reason::ordinary(FIRST_START_INTERRUPTED));
    }
    if checkpoint.lsn < confirmed && holds(Rule::NoticeRedisWentBack) {
        let at = checkpoint.lsn;
        let text = format!("redis went back to {at}, before the confirmed {confirmed}; or the slot was made anew");
        return deliver(Reason::heals(Heal::RedisWentBack, text));
    }
    if let Some(because) = facts.hash_slots.unreliable {
        return deliver(Reason::heals(Heal::RedisWentBack, because));
    }
    let load =
        facts.tables.iter().filter_map(|t| Some((t.name.clone(), why_load(t, checkpoint, facts.redis_time_ms)?)));
    Stream { from: confirmed, load: load.chain(facts.added.iter().cloned()).collect() }
}

fn other_server(checkpoint: &Checkpoint, facts: &Facts<'_>) -> Option<String> {
    if checkpoint.system_id != facts.system_id {
        return Some(format!(
            "redis holds a copy of another Postgres system ({}, this one is {})",
            checkpoint.system_id, facts.system_id
        ));
    }
    (checkpoint.database != facts.database).then(|| {
        format!("redis holds a copy of another database ({:?}, this one is {:?})", checkpoint.database, facts.database)
    })
}

fn postgres_went_back(checkpoint: &Checkpoint, facts: &Facts<'_>) -> Option<String> {
    let at = checkpoint.lsn;
    // Redis has parts of transactions whose commit records begin at `commit`.
    let parts = [checkpoint.within.map(|within| within.begin), checkpoint.clearing];
    let is_beyond = |end: Lsn| at.0 > end || parts.iter().flatten().any(|begin| begin.commit.0 >= end);
    if is_beyond(facts.flushed.0) {
        return Some(format!("postgres went back: it stands at {}, redis is at {at}", facts.flushed));
    }
    if checkpoint.timeline != facts.timeline {
        match facts.checkpoint_timeline_ended {
            Some(end) if !is_beyond(end) => {}
            Some(end) => {
                return Some(format!(
                    "postgres went back: timeline {} ended at {end}, redis is at {at}",
                    checkpoint.timeline
                ));
            }
            None => {
                return Some(format!(
                    "postgres went back: its timeline {} does not come from {}",
                    facts.timeline, checkpoint.timeline
                ));
            }
        }
    }
    facts.went_back.map(str::to_owned)
}

fn why_load(table: &ConfiguredTable, checkpoint: &Checkpoint, redis_time_ms: u64) -> Option<Reason> {
    let Some(mark) = checkpoint.tables.get(&table.name) else { return Some(Reason::ordinary("the table is new")) };
    let (heals, text) = match mark.state {
        _ if mark.template != table.template => (Heal::Schema, "its key template changed"),
        _ if mark.fingerprint != table.fingerprint => (Heal::Schema, "its columns or settings changed"),
        TableState::Loading if holds(Rule::LoadInterrupted) => (Heal::Interrupted, "its load was interrupted"),
        TableState::Healing => (Heal::Interrupted, "its repair was interrupted"),
        // Rows that had to be read again are not known any more, whatever an operator has removed besides.
        TableState::Incomplete if (!mark.removed || mark.as_of.is_some()) && holds(Rule::LoadIncomplete) => {
            (Heal::Interrupted, "some of its rows had to be read again")
        }
        _ if mark.catalog != Some(table.catalog) && holds(Rule::LoadChangedCatalog) => {
            (Heal::Schema, "it may have been changed without a word in the stream")
        }
        _ if mark.ttl_until_ms.is_none_or(|until| until <= redis_time_ms) && holds(Rule::LoadExpired) => {
            (Heal::Expired, "rows may have expired while nothing renewed them")
        }
        // Keys that an operator removed stay away until somebody requests a load: they were removed for practice.
        _ => return None,
    };
    Some(Reason::heals(heals, text))
}

#[cfg(test)]
impl<'a> Facts<'a> {
    /// A server and a slot that fit a checkpoint of system 7, timeline 1, database shop; the server is at 200.
    pub(crate) fn fitting(
        checkpoint: Option<&'a Checkpoint>,
        slot: &'a SlotState,
        tables: &'a [ConfiguredTable],
    ) -> Self {
        Facts {
            checkpoint,
            slot,
            replace_slot: None,
            system_id: "7",
            database: "shop",
            timeline: 1,
            checkpoint_timeline_ended: None,
            flushed: EndLsn(Lsn::new(200).expect("not zero")),
            went_back: None,
            adopt: Adopt::Refuse,
            hash_slots: HashSlots::default(),
            redis_time_ms: 1_000,
            tables,
            added: &[],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::change::{Begin, CommitTime};
    use crate::checkpoint::{LastTransaction, TableMark, Within};
    use crate::lsn::CommitLsn;
    use std::collections::BTreeMap;
    use std::sync::LazyLock;

    fn end(n: u64) -> EndLsn {
        EndLsn(Lsn::new(n).expect("not zero"))
    }

    fn begin(commit: u64) -> Begin {
        Begin { xid: 8, commit: CommitLsn(end(commit).0), time: CommitTime(9) }
    }

    fn checkpoint() -> Checkpoint {
        let mark = TableMark {
            catalog: Some(CatalogMark { shape: 1, storage: 2 }),
            ttl_until_ms: Some(2_000),
            as_of: None,
            ..TableMark::unread("c:{id}".to_owned(), 5, TableState::Loaded)
        };
        Checkpoint {
            system_id: "7".to_owned(),
            timeline: 1,
            database: "shop".to_owned(),
            lsn: end(100),
            epoch: 1,
            seq: 1,
            within: None,
            clearing: None,
            last: None,
            beat_ms: 0,
            base: end(1),
            floor: None,
            whole: 0,
            healing: 0,
            lists_in_doubt: false,
            evicted: 0,
            made_publication: None,
            retired: Vec::new(),
            tables: BTreeMap::from([("categories".to_owned(), mark)]),
        }
    }

    fn ready(confirmed: u64) -> SlotState {
        SlotState::Ready { confirmed: end(confirmed), active_pid: None }
    }

    static TABLES: LazyLock<[ConfiguredTable; 1]> = LazyLock::new(|| {
        [ConfiguredTable {
            name: "categories".to_owned(),
            template: "c:{id}".to_owned(),
            fingerprint: 5,
            catalog: CatalogMark { shape: 1, storage: 2 },
        }]
    });

    /// A server and a slot that fit the checkpoint, but for what `change` says.
    fn decided<'a>(
        checkpoint: Option<&'a Checkpoint>,
        slot: &'a SlotState,
        change: impl FnOnce(&mut Facts<'a>),
    ) -> ResumeDecision {
        let mut facts = Facts::fitting(checkpoint, slot, &*TABLES);
        change(&mut facts);
        decide(&facts)
    }

    fn because(decision: &ResumeDecision) -> &str {
        match decision {
            ResumeDecision::Refuse { because } => because,
            ResumeDecision::NewSlot { because, .. } | ResumeDecision::Deliver { because, .. } => &because.text,
            ResumeDecision::Stream { load, .. } => load.first().map_or("", |(_, because)| &because.text),
        }
    }

    #[test]
    fn another_system_or_database_is_refused_unless_adopted() {
        let c = checkpoint();
        for other in [|f: &mut Facts<'_>| f.system_id = "8", |f: &mut Facts<'_>| f.database = "other"] {
            for slot in [SlotState::Absent, ready(50)] {
                let refused = decided(Some(&c), &slot, other);
                assert!(matches!(refused, ResumeDecision::Refuse { .. }), "{refused:?}");
                assert!(because(&refused).contains("--adopt"));
            }
            let adopted = decided(Some(&c), &ready(50), |f| {
                other(f);
                f.adopt = Adopt::Accept;
            });
            assert!(
                matches!(adopted, ResumeDecision::Deliver { from, base, .. } if from == end(50) && base == end(200))
            );
            let adopted = decided(Some(&c), &SlotState::Absent, |f| {
                other(f);
                f.adopt = Adopt::Accept;
            });
            assert!(matches!(adopted, ResumeDecision::NewSlot { drop_old: false, .. }));
        }
    }

    #[test]
    fn a_slot_that_is_gone_or_invalidated_is_made_anew() {
        let c = checkpoint();
        let gone = decided(Some(&c), &SlotState::Absent, |_| {});
        assert_eq!(because(&gone), "the replication slot is gone");
        assert!(matches!(gone, ResumeDecision::NewSlot { drop_old: false, .. }));
        let lost = SlotState::Invalidated { reason: "wal_removed".to_owned() };
        for checkpoint in [Some(&c), None] {
            let lost = decided(checkpoint, &lost, |_| {});
            assert!(matches!(lost, ResumeDecision::NewSlot { drop_old: true, .. }), "{lost:?}");
            assert!(because(&lost).contains("wal_removed"));
        }
    }

    #[test]
    fn a_slot_that_cannot_be_decoded_is_made_anew() {
        let (c, why) = (checkpoint(), Reason::heals(Heal::SlotLost, "the publication is younger"));
        let lost = SlotState::Invalidated { reason: "wal_removed".to_owned() };
        for slot in [&ready(50), &ready(120), &lost] {
            let decision = decided(Some(&c), slot, |f| f.replace_slot = Some(&why));
            assert_eq!(decision, ResumeDecision::NewSlot { drop_old: true, because: why.clone() });
        }
        let gone = decided(Some(&c), &SlotState::Absent, |f| f.replace_slot = Some(&why));
        assert_eq!(because(&gone), "the replication slot is gone");
        let refused = decided(Some(&c), &ready(50), |f| (f.system_id, f.replace_slot) = ("8", Some(&why)));
        assert!(matches!(refused, ResumeDecision::Refuse { .. }), "{refused:?}");
    }

    #[test]
    fn a_table_that_was_missing_from_the_publication_is_loaded() {
        let (c, added) = (checkpoint(), [("categories".to_owned(), Reason::ordinary("it was missing"))]);
        let decision = decided(Some(&c), &ready(50), |f| f.added = &added);
        assert_eq!(decision, ResumeDecision::Stream { from: end(50), load: added.to_vec() });
    }

    #[test]
    fn the_first_start_makes_a_slot() {
        let first = decided(None, &SlotState::Absent, |_| {});
        assert_eq!(first, ResumeDecision::NewSlot { drop_old: false, because: Reason::ordinary("first start") });
    }

    #[test]
    fn a_first_start_that_was_interrupted_is_still_a_first_start() {
        let mut c = Checkpoint { base: end(100), ..checkpoint() };
        c.tables.values_mut().for_each(|mark| mark.state = TableState::Loading);
        let because = Reason::ordinary("the first start was interrupted");
        let without = ResumeDecision::NewSlot { drop_old: false, because: because.clone() };
        assert_eq!(decided(Some(&c), &SlotState::Absent, |_| {}), without);
        // The slot got its name, and no checkpoint knows of it: it leaves out nothing that a load may miss.
        let with = ResumeDecision::Deliver { from: end(120), base: end(200), because };
        assert_eq!(decided(Some(&c), &ready(120), |_| {}), with);
        // Another daemon, which wrote last, began later than the one that was quicker.
        for confirmed in [90, 100] {
            let decision = decided(Some(&c), &ready(confirmed), |_| {});
            assert!(
                matches!(&decision, ResumeDecision::Stream { from, load } if *from == end(confirmed) && load.len() == 1),
                "{decision:?}"
            );
        }
        let last = LastTransaction { end: end(90), xid: 7, time: CommitTime(3) };
        let gone = decided(Some(&Checkpoint { last: Some(last), ..c }), &SlotState::Absent, |_| {});
        assert_eq!(self::because(&gone), "the replication slot is gone", "something may have been written");
    }

    #[test]
    fn a_slot_beyond_the_server_is_never_streamed_from() {
        let c = checkpoint();
        for checkpoint in [Some(&c), None] {
            let beyond = decided(checkpoint, &ready(201), |_| {});
            assert!(matches!(beyond, ResumeDecision::NewSlot { drop_old: true, .. }), "{beyond:?}");
        }
    }

    #[test]
    fn a_postgres_that_went_back_is_loaded_from() {
        let c = Checkpoint { lsn: end(300), ..checkpoint() };
        let back = decided(Some(&c), &ready(50), |_| {});
        assert!(matches!(back, ResumeDecision::Deliver { from, base, .. } if from == end(50) && base == end(200)));
        assert!(because(&back).contains("went back"));

        let c = checkpoint();
        for (ended, streams) in [(Some(100), true), (Some(99), false), (None, false)] {
            let decision = decided(Some(&c), &ready(50), |f| {
                f.timeline = 2;
                f.checkpoint_timeline_ended = ended.and_then(Lsn::new);
            });
            assert_eq!(matches!(decision, ResumeDecision::Stream { .. }), streams, "{ended:?} {decision:?}");
            assert!(streams || matches!(decision, ResumeDecision::Deliver { .. }));
        }
        // Half of a transaction is there, of which the other half is lost.
        let within = Some(Within { begin: begin(150), changes_done: 3 });
        let clearing = Some(begin(150));
        for halves in [Checkpoint { within, ..checkpoint() }, Checkpoint { clearing, ..checkpoint() }] {
            for (ended, flushed, streams) in [(151, 200, true), (150, 200, false), (151, 150, false), (151, 151, true)]
            {
                let decision = decided(Some(&halves), &ready(50), |f| {
                    f.timeline = 2;
                    f.checkpoint_timeline_ended = Lsn::new(ended);
                    f.flushed = end(flushed);
                });
                let is_stream = matches!(decision, ResumeDecision::Stream { .. });
                assert_eq!(is_stream, streams, "{ended} {flushed} {decision:?}");
            }
        }
        let found_out = decided(Some(&c), &ready(50), |f| f.went_back = Some("transaction 7 was not redelivered"));
        assert!(matches!(found_out, ResumeDecision::Deliver { .. }));
        assert_eq!(because(&found_out), "transaction 7 was not redelivered");
    }

    #[test]
    fn a_redis_that_lost_its_checkpoint_or_went_back_is_loaded_into() {
        let lost = decided(None, &ready(50), |_| {});
        assert!(matches!(lost, ResumeDecision::Deliver { from, base, .. } if from == end(50) && base == end(200)));
        let c = checkpoint();
        let older = decided(Some(&c), &ready(101), |_| {});
        assert!(matches!(older, ResumeDecision::Deliver { from, base, .. } if from == end(101) && base == end(200)));
        assert!(because(&older).contains("redis went back to 0/64, before the confirmed 0/65"), "{older:?}");
    }

    #[test]
    fn hash_slots_that_lost_something_are_loaded_into() {
        let c = checkpoint();
        let decision = decided(Some(&c), &ready(50), |f| f.hash_slots.unreliable = Some("slot 7 has no mark"));
        assert!(matches!(decision, ResumeDecision::Deliver { from, base, .. } if from == end(50) && base == end(200)));
        assert_eq!(because(&decision), "slot 7 has no mark");
    }

    #[test]
    fn rows_that_may_have_expired_are_loaded() {
        let c = checkpoint();
        for (now, loads) in [(1_999, false), (2_000, true), (9_000, true)] {
            let decision = decided(Some(&c), &ready(50), |f| f.redis_time_ms = now);
            let ResumeDecision::Stream { load, .. } = decision else { panic!("{decision:?}") };
            assert_eq!(!load.is_empty(), loads, "{now}");
        }
    }

    #[test]
    fn a_table_that_is_not_whole_or_not_the_same_is_loaded_beside_the_stream() {
        type Change = fn(&mut TableMark);
        let changes: [(Change, &str); 7] = [
            (|m| m.catalog = None, "it may have been changed without a word in the stream"),
            (|m| m.state = TableState::Loading, "its load was interrupted"),
            (|m| m.state = TableState::Healing, "its repair was interrupted"),
            (|m| m.state = TableState::Incomplete, "some of its rows had to be read again"),
            (|m| m.fingerprint = 6, "its columns or settings changed"),
            (|m| m.template = "d:{id}".to_owned(), "its key template changed"),
            (|m| m.ttl_until_ms = None, "rows may have expired while nothing renewed them"),
        ];
        for (change, why) in changes {
            let mut c = checkpoint();
            change(c.tables.get_mut("categories").expect("configured"));
            let decision = decided(Some(&c), &ready(50), |_| {});
            let ResumeDecision::Stream { from, load } = &decision else { panic!("{decision:?}") };
            assert_eq!((*from, load.len(), because(&decision)), (end(50), 1, why));
        }
        let c = Checkpoint { tables: BTreeMap::new(), ..checkpoint() };
        assert_eq!(because(&decided(Some(&c), &ready(50), |_| {})), "the table is new");
    }

    #[test]
    fn what_an_operator_removed_stays_away_unless_the_table_is_loaded_anyway() {
        let mut c = checkpoint();
        let mark = c.tables.get_mut("categories").expect("configured");
        (mark.state, mark.removed) = (TableState::Incomplete, true);
        for (now, loads) in [(1_999, false), (2_000, true)] {
            let decision = decided(Some(&c), &ready(50), |f| f.redis_time_ms = now);
            assert_eq!(decision.loads(), loads, "{decision:?}");
        }
        // Rows had to be read again, and nobody knows which.
        c.tables.get_mut("categories").expect("configured").as_of = Some(end(40));
        let decision = decided(Some(&c), &ready(50), |f| f.redis_time_ms = 1_999);
        assert_eq!(because(&decision), "some of its rows had to be read again");
    }

    #[test]
    fn a_decision_says_whether_rows_will_be_read() {
        let because = Reason::ordinary("a test");
        let load = vec![("categories".to_owned(), because.clone())];
        let (from, base, drop_old) = (end(1), end(2), false);
        for (decision, loads) in [
            (ResumeDecision::Refuse { because: String::new() }, false),
            (ResumeDecision::NewSlot { drop_old, because: because.clone() }, true),
            (ResumeDecision::Deliver { from, base, because }, true),
            (ResumeDecision::Stream { from, load }, true),
            (ResumeDecision::Stream { from, load: Vec::new() }, false),
        ] {
            assert_eq!(decision.loads(), loads, "{decision:?}");
        }
    }

    #[test]
    fn otherwise_it_goes_on_and_loads_nothing() {
        let c = checkpoint();
        for confirmed in [50, 100] {
            let decision = decided(Some(&c), &ready(confirmed), |_| {});
            assert_eq!(decision, ResumeDecision::Stream { from: end(confirmed), load: Vec::new() });
        }
        let idle = decided(Some(&c), &ready(100), |f| f.flushed = end(100));
        assert_eq!(idle, ResumeDecision::Stream { from: end(100), load: Vec::new() }, "nothing was written since");
    }
}
