//! Cases that schedules rarely reach, fed to the machine step by step.

use super::Rng;
use super::daemon::Setting;
use super::postgres::{Extra, Postgres, RowId, Values, end_lsn, lsn, relation, updated};
use super::starting::facts;
use crate::admin::{Operation, Refusal, Repair, Scope};
use crate::change::{Begin, Change, CommitTime, Delivery, Nonce};
use crate::checkpoint::{Checkpoint, Place, SlotState, TableState, Within};
use crate::command::{DeadKey, Key};
use crate::format::Format;
use crate::lanes::{Lane, Lost};
use crate::lsn::CommitLsn;
use crate::reason::Reason;
use crate::resp::batch::{Limits, Members};
use crate::schema::TableId;
use crate::session::inspect::{Differences, Probe};
use crate::session::load_messages::{Chunk, ChunkId, Content, Floors, FromLoad, LoadOrder, Only, Verdict};
use crate::session::operation::AskId;
use crate::session::takeover::{Taken, Takeover};
use crate::session::{Effect, HEARTBEAT, Input, Machine, SafeWhen, Spread, Start};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

const ROW: RowId = RowId { table: 0, id: 1 };
const BEFORE: Values = Values { small: 1, large: [2, 3] };
const AFTER: Values = Values { small: 4, ..BEFORE };

fn transaction(xid: u32, at: u64, items: Vec<Delivery>) -> Vec<Delivery> {
    let commit = CommitLsn(lsn(at));
    let mut all = vec![Delivery::Begin(Begin { xid, commit, time: CommitTime(0) })];
    all.extend(items);
    all.push(Delivery::Commit { commit, end: end_lsn(at + 8) });
    all
}

/// Performs one input, answering for a Redis in which every key is a hash. Returns the verdicts on chunks.
fn tell(machine: &mut Machine, input: Input) -> Vec<Verdict> {
    let (mut inputs, mut verdicts) = (vec![input], Vec::new());
    while let Some(input) = inputs.pop() {
        for effect in machine.step(input, Instant::now()) {
            match effect {
                Effect::Probe(of) => inputs.push(Input::Probed(vec![Probe::Hash; of.keys().count()])),
                Effect::Execute { .. } => inputs.push(Input::Executed { redis_time_ms: 1_000 }),
                Effect::Order(LoadOrder::Verdict(_, verdict)) => verdicts.push(verdict),
                _ => {}
            }
        }
    }
    verdicts
}

/// Takes over an empty Redis: everything up to 100 has to be loaded.
fn taken(setting: &Setting, postgres: &Postgres) -> Taken {
    let tables = setting.configured(postgres);
    let facts = facts(&SlotState::Absent, &tables);
    let takeover = Takeover {
        facts: &facts,
        specs: &setting.specs,
        epoch_seen: 0,
        made_publication: Some("prefetchd"),
        evicted: Some(0),
    };
    takeover.anew(end_lsn(100), end_lsn(100), &Reason::ordinary("a test"))
}

/// Returns the verdicts on a chunk that does not see transaction 10, during which the previous session ended.
fn verdicts(within: Option<Within>) -> Vec<Verdict> {
    let setting = Setting::new(Limits::default(), SafeWhen::Acknowledged, [None; 2], [Format::Hash; 2]);
    let postgres = Postgres::new(&mut Rng::of(0, 0));
    let mut taken = taken(&setting, &postgres);
    taken.checkpoint.within = within;
    let (mut machine, effects) =
        Machine::start(setting.start(taken, (Spread::OneSlot, Default::default()), Vec::new(), 1_000, Instant::now()));
    let load = effects.iter().find_map(|effect| match effect {
        Effect::Order(LoadOrder::Table { table: TableId(0), load, .. }) => Some(*load),
        _ => None,
    });
    let load = load.expect("the load was ordered");
    let update = Change::Update { relation: 100, old: None, new: updated(ROW, AFTER, Extra::NoColumn, [false, false]) };
    let mut items = transaction(10, 200, vec![Delivery::Relation(relation(0, 0)), Delivery::Change(update)]);
    items.extend(transaction(11, 220, vec![Delivery::Mark(Nonce([7; 16]))]));
    let mut seen = tell(&mut machine, Input::Delivered { items, bytes: 100 });
    seen.extend(tell(&mut machine, Input::Load(setting.began(TableId(0), load, &postgres))));
    let chunk = Chunk {
        id: ChunkId(1),
        table: TableId(0),
        load: Some(load),
        nonce: Nonce([7; 16]),
        snapshot: "10:11:10".parse().expect("a snapshot"),
        content: Content::Rows(vec![setting.encoded(&[(ROW, BEFORE, Extra::NoColumn)], 0, Members::Unknown).0]),
        unwritable: Vec::new(),
        floor: Floors::default().open(),
    };
    seen.extend(tell(&mut machine, Input::Load(FromLoad::Chunk(chunk))));
    seen
}

#[test]
fn a_load_may_begin_while_the_last_batch_of_a_comparison_is_on_its_way() {
    let setting = Setting::new(Limits::default(), SafeWhen::Acknowledged, [None; 2], [Format::Hash; 2]);
    let postgres = Postgres::new(&mut Rng::of(0, 0));
    let mut taken = taken(&setting, &postgres);
    taken.load.clear();
    for mark in taken.checkpoint.tables.values_mut() {
        (mark.state, mark.as_of, mark.ttl_until_ms) = (TableState::Loaded, None, Some(u64::MAX / 4));
    }
    let now = Instant::now();
    let (mut machine, _) =
        Machine::start(setting.start(taken, (Spread::OneSlot, Default::default()), Vec::new(), 1_000, now));
    let verify = Operation::Verify(Scope::Table(TableId(0)), Repair::OnlyCount);
    let effects = machine.step(Input::Asked(AskId(1), verify), now);
    let load = effects.iter().find_map(|effect| match effect {
        Effect::Order(LoadOrder::Table { load, .. }) => Some(*load),
        _ => None,
    });
    let load = load.expect("a comparison was ordered");
    machine.step(Input::Load(setting.began(TableId(0), load, &postgres)), now);
    let effects = machine.step(Input::Load(FromLoad::Ended { table: TableId(0), load }), now);
    assert!(effects.iter().any(|effect| matches!(effect, Effect::Execute { .. })), "{effects:?}");
    let effects = machine.step(Input::Evicted(5), now);
    let is_told = |effect: &Effect| matches!(effect, Effect::Answer(AskId(1), Err(Refusal::Interrupted(_))));
    assert!(effects.iter().any(is_told), "{effects:?}");
    machine.step(Input::Executed { redis_time_ms: 1_000 }, now);
}

/// Postgres takes 1.0 for 1, and so may return another row than that of the key that a comparison reads again. The stream has
/// changed that row meanwhile.
#[test]
fn a_row_that_was_not_asked_for_is_not_written_by_a_comparison() {
    let setting = Setting::new(Limits::default(), SafeWhen::Acknowledged, [None; 2], [Format::Hash; 2]);
    let (postgres, now, other) = (Postgres::new(&mut Rng::of(0, 0)), Instant::now(), RowId { id: 2, ..ROW });
    let encoded = |rows: &[RowId]| {
        let rows: Vec<_> = rows.iter().map(|row| (*row, BEFORE, Extra::NoColumn)).collect();
        setting.encoded(&rows, 0, Members::Unknown).0
    };
    let change = |row| {
        let new = updated(row, AFTER, Extra::NoColumn, [false, false]);
        Delivery::Change(Change::Update { relation: 100, old: None, new })
    };
    let mark = |nonce, at| transaction(99, at, vec![Delivery::Mark(Nonce([nonce; 16]))]);
    let chunk = |nonce: u8, load, snapshot: &str, content| {
        let (snapshot, floor) = (snapshot.parse().expect("a snapshot"), Floors::default().open());
        let (id, nonce) = (ChunkId(nonce.into()), Nonce([nonce; 16]));
        let chunk = Chunk { id, table: TableId(0), load, nonce, snapshot, content, unwritable: Vec::new(), floor };
        Input::Load(FromLoad::Chunk(chunk))
    };
    let delivered = |items| Input::Delivered { items, bytes: 100 };

    let mut machine =
        followed(Setting::new(Limits::default(), SafeWhen::Acknowledged, [None; 2], [Format::Hash; 2]), &postgres);
    let refetch = Operation::Refetch(Scope::Table(TableId(0)));
    let load = machine.step(Input::Asked(AskId(1), refetch), now).iter().find_map(|effect| match effect {
        Effect::Order(LoadOrder::Table { load, .. }) => Some(*load),
        _ => None,
    });
    let load = load.expect("a comparison was ordered");
    let (key, asked) = (setting.key(ROW), setting.key(other));
    let content = Content::Keys {
        asked: vec![asked.clone()],
        found: encoded(&[ROW, other]),
        unread: Vec::new(),
        checks: Some(load),
        mapped_as: setting.mapping(TableId(0), 0).fingerprint,
    };
    let mut compared = Vec::new();
    for input in [
        Input::Load(setting.began(TableId(0), load, &postgres)),
        // The range does not see that the other row has changed, and it is not in Redis: it is read again.
        delivered(transaction(10, 400, vec![Delivery::Relation(relation(0, 0)), change(other)])),
        delivered(mark(6, 420)),
        chunk(6, Some(load), "10:11:10", Content::Rows(vec![encoded(&[other])])),
        Input::Tick,
        delivered(transaction(12, 440, vec![change(ROW)])),
        delivered(mark(7, 460)),
        chunk(7, None, "12:13:12", content),
        Input::Tick,
    ] {
        let mut inputs = vec![input];
        while let Some(input) = inputs.pop() {
            for effect in machine.step(input, now) {
                match effect {
                    Effect::Probe(of) => inputs.push(Input::Probed(vec![Probe::Hash; of.keys().count()])),
                    Effect::Execute { .. } => inputs.push(Input::Executed { redis_time_ms: 1_000 }),
                    Effect::Compare(of) => {
                        compared.extend(of.asked().into_iter().map(|(key, _)| key.clone()));
                        inputs.push(Input::Compared(Differences::default()));
                    }
                    _ => {}
                }
            }
        }
    }
    assert_eq!(compared, [asked], "{key} was not asked for");
}

/// A machine that has everything up to 300, while the stream begins at 100.
fn followed(setting: Setting, postgres: &Postgres) -> Machine {
    followed_by(setting, postgres, |start| start).0
}

fn followed_by(setting: Setting, postgres: &Postgres, change: impl FnOnce(Start) -> Start) -> (Machine, Vec<Effect>) {
    let mut taken = taken(&setting, postgres);
    taken.load.clear();
    taken.checkpoint.lsn = end_lsn(300);
    for (table, mark) in (0..).zip(taken.checkpoint.tables.values_mut()) {
        (mark.state, mark.as_of, mark.ttl_until_ms) = (TableState::Loaded, None, Some(u64::MAX / 4));
        mark.catalog = Some(postgres.mark(table));
    }
    let start = setting.start(taken, (Spread::OneSlot, Default::default()), Vec::new(), 1_000, Instant::now());
    Machine::start(change(Start { clear_keys: 1, ..start }))
}

/// Postgres was rewound, and has written another history since.
#[test]
fn a_transaction_that_was_not_there_before_is_noticed_while_its_table_is_compared() {
    let postgres = Postgres::new(&mut Rng::of(0, 0));
    let update = Change::Update { relation: 100, old: None, new: updated(ROW, AFTER, Extra::NoColumn, [false, false]) };
    let items = transaction(10, 200, vec![Delivery::Relation(relation(0, 0)), Delivery::Change(update)]);
    for repair in [None, Some(Repair::OnlyCount), Some(Repair::Mend)] {
        let mut machine =
            followed(Setting::new(Limits::default(), SafeWhen::Acknowledged, [None; 2], [Format::Hash; 2]), &postgres);
        let verify = repair.map(|repair| Operation::Verify(Scope::All, repair));
        verify.into_iter().for_each(|verify| drop(machine.step(Input::Asked(AskId(1), verify), Instant::now())));
        let effects = machine.step(Input::Delivered { items: items.clone(), bytes: 100 }, Instant::now());
        let is_noticed = effects.iter().any(|effect| matches!(effect, Effect::WentBack { .. }));
        assert!(is_noticed, "{repair:?} {effects:?}");
    }
}

#[test]
fn a_transaction_that_was_not_there_before_is_noticed_while_a_partition_is_loaded() {
    let mut rng = Rng::of(0, 0);
    let mut postgres = Postgres::new(&mut rng);
    let row = RowId { table: 1, id: 0 };
    let update = Change::Update { relation: 101, old: None, new: updated(row, AFTER, Extra::NoColumn, [false, false]) };
    let items = transaction(10, 200, vec![Delivery::Relation(relation(1, 0)), Delivery::Change(update)]);
    let setting = || Setting::new(Limits::default(), SafeWhen::Acknowledged, [None; 2], [Format::Hash; 2]);
    let (mut machine, now) = (followed(setting(), &postgres), Instant::now());
    machine.step(Input::Catalog(TableId(1), setting().catalog(TableId(1), &postgres)), now);
    postgres.attach(|_| false, &mut rng);
    let effects = machine.step(Input::Catalog(TableId(1), setting().catalog(TableId(1), &postgres)), now);
    let reads_partition =
        |effect: &Effect| matches!(effect, Effect::Order(LoadOrder::Table { only: Only::Leaves(..), .. }));
    assert!(effects.iter().any(reads_partition), "{effects:?}");
    let effects = machine.step(Input::Delivered { items, bytes: 100 }, now);
    assert!(effects.iter().any(|effect| matches!(effect, Effect::WentBack { .. })), "{effects:?}");
}

/// If Postgres loses the TRUNCATE, the keys that were removed because of it are missing.
#[test]
fn the_checkpoint_names_the_transaction_that_truncates_until_it_is_applied() {
    let postgres = Postgres::new(&mut Rng::of(0, 0));
    let setting = Setting::new(Limits::default(), SafeWhen::Acknowledged, [None; 2], [Format::Hash; 2]);
    let keys = [1, 2].map(|id| setting.key(RowId { id, ..ROW }));
    let mut machine = followed(setting, &postgres);
    let truncate = Delivery::Change(Change::Truncate { relations: vec![100] });
    let items = transaction(10, 400, vec![Delivery::Relation(relation(0, 0)), truncate]);
    let clearing = |effects: &[Effect]| {
        let written = effects.iter().find_map(|effect| match effect {
            Effect::Execute { checkpoint, .. } => Some(checkpoint),
            _ => None,
        });
        let checkpoint = Checkpoint::head(written.expect("something is written")).expect("a checkpoint");
        (checkpoint.lsn, checkpoint.clearing.map(|begin| (begin.xid, begin.commit)))
    };
    let now = Instant::now();
    machine.step(Input::Delivered { items, bytes: 100 }, now);
    let nothing_yet = machine.step(Input::Scanned { keys: Vec::new(), next: 7 }, now);
    assert_eq!(clearing(&nothing_yet), (end_lsn(300), None));
    machine.step(Input::Executed { redis_time_ms: 1_000 }, now);
    let some = machine.step(Input::Scanned { keys: keys[..1].to_vec(), next: 8 }, now);
    assert_eq!(clearing(&some), (end_lsn(300), Some((10, CommitLsn(lsn(400))))));
    machine.step(Input::Executed { redis_time_ms: 1_000 }, now);
    let all = machine.step(Input::Scanned { keys: keys[1..].to_vec(), next: 0 }, now);
    assert_eq!(clearing(&all), (end_lsn(408), None));
}

/// Only that is read again, and not before every hash slot takes what is delivered.
#[test]
fn what_lay_in_hash_slots_that_have_lost_something_is_loaded() {
    let (postgres, now) = (Postgres::new(&mut Rng::of(0, 0)), Instant::now());
    let setting = Setting::new(Limits::default(), SafeWhen::Acknowledged, [None; 2], [Format::Hash; 2]);
    let [lost, kept] = [1, 2].map(|id| RowId { id, ..ROW });
    let [key_lost, key_kept] = [lost, kept].map(|row| setting.key(row));
    let lanes = Arc::new(BTreeSet::from([Lane::of(key_lost.as_bytes())]));
    assert!(!lanes.contains(&Lane::of(key_kept.as_bytes())));
    let rows =
        setting.encoded(&[(lost, BEFORE, Extra::NoColumn), (kept, BEFORE, Extra::NoColumn)], 0, Members::Unknown).0;
    let began = |load| setting.began(TableId(0), load, &postgres);
    let start = |start: Start| Start {
        spread: Spread::Slots { ahead: Some(Place::between(end_lsn(408))), last: None },
        places: Default::default(),
        lost: Some(Lost { lanes: lanes.clone(), because: "a test".to_owned() }),
        ..start
    };
    let (mut machine, effects) = followed_by(
        Setting::new(Limits::default(), SafeWhen::Acknowledged, [None; 2], [Format::Hash; 2]),
        &postgres,
        start,
    );
    let loads = |effects: &[Effect]| {
        let load = |effect: &Effect| match effect {
            Effect::Order(LoadOrder::Table { table, load, only: Only::HashSlots(of), .. }) if *of == lanes => {
                Some((*table, *load))
            }
            _ => None,
        };
        effects.iter().filter_map(load).collect::<Vec<_>>()
    };
    let written = |effects: &[Effect]| {
        let written = effects.iter().find_map(|effect| match effect {
            Effect::Execute { batch, checkpoint, .. } => Some((batch.body().to_vec(), checkpoint.clone())),
            _ => None,
        });
        let (body, checkpoint) = written.expect("something is written");
        let has = |key: &Key| memchr::memmem::find(&body, key.as_bytes()).is_some();
        (has(&key_lost), has(&key_kept), Checkpoint::head(&checkpoint).expect("a checkpoint").healing)
    };
    assert_eq!(loads(&effects), []);

    // A value that is left out must not be taken from what lies in a slot that has lost something.
    let update = |row| updated(row, AFTER, Extra::NoColumn, [true, false]);
    let update = |row| Delivery::Change(Change::Update { relation: 100, old: None, new: update(row) });
    let items = transaction(10, 400, vec![Delivery::Relation(relation(0, 0)), update(lost), update(kept)]);
    machine.step(Input::Delivered { items, bytes: 100 }, now);
    let effects = machine.step(Input::Probed(vec![Probe::Hash; 2]), now);
    assert_eq!(written(&effects), (false, true, 1));
    let reads_again =
        |effect: &Effect| matches!(effect, Effect::Order(LoadOrder::Keys(of)) if of.keys == [key_lost.clone()]);
    assert!(effects.iter().any(reads_again), "{effects:?}");
    let effects = machine.step(Input::Executed { redis_time_ms: 1_000 }, now);
    let ordered = loads(&effects);
    assert_eq!(ordered.len(), setting.specs.len());

    for (table, load) in ordered {
        machine.step(Input::Load(setting.began(table, load, &postgres)), now);
        if table == TableId(0) {
            machine.step(Input::Load(began(load)), now);
            let items = transaction(11, 500, vec![Delivery::Mark(Nonce([7; 16]))]);
            tell(&mut machine, Input::Delivered { items, bytes: 100 });
            let chunk = Chunk {
                id: ChunkId(1),
                table,
                load: Some(load),
                nonce: Nonce([7; 16]),
                snapshot: "11:11:".parse().expect("a snapshot"),
                content: Content::Rows(vec![rows.clone()]),
                unwritable: Vec::new(),
                floor: Floors::default().open(),
            };
            let effects = machine.step(Input::Load(FromLoad::Chunk(chunk)), now);
            assert_eq!(written(&effects), (true, false, 1));
            machine.step(Input::Executed { redis_time_ms: 1_000 }, now);
        }
        let effects = machine.step(Input::Load(FromLoad::Ended { table, load }), now);
        let is_last = usize::from(table.0) + 1 == setting.specs.len();
        assert_eq!(written(&effects).2, u16::from(!is_last), "{table:?}");
        machine.step(Input::Executed { redis_time_ms: 1_000 }, now);
    }
}

/// The row may be an old one that a replica of the slot's node had, and the load may have read it before the change.
#[test]
fn a_value_that_is_left_out_is_not_taken_from_a_slot_that_has_moved_and_is_being_read_again() {
    let (postgres, start) = (Postgres::new(&mut Rng::of(0, 0)), Instant::now());
    let setting = Setting::new(Limits::default(), SafeWhen::Acknowledged, [None; 2], [Format::Hash; 2]);
    let key = setting.key(ROW);
    let moved = BTreeSet::from([Lane::of(key.as_bytes())]);
    let mut machine = followed(setting, &postgres);
    machine.step(Input::Moved(moved.clone()), start);
    let mut changes = |xid, at, now| {
        let new = updated(ROW, AFTER, Extra::NoColumn, [true, false]);
        let update = Delivery::Change(Change::Update { relation: 100, old: None, new });
        let items = transaction(xid, at, vec![Delivery::Relation(relation(0, 0)), update]);
        let mut effects = machine.step(Input::Delivered { items, bytes: 100 }, now);
        effects.extend(machine.step(Input::Probed(vec![Probe::Hash]), now));
        effects.extend(machine.step(Input::Executed { redis_time_ms: 1_000 }, now));
        let is_written = |effect: &Effect| match effect {
            Effect::Execute { batch, .. } => memchr::memmem::find(batch.body(), key.as_bytes()).is_some(),
            _ => false,
        };
        let is_read = |effect: &Effect| match effect {
            Effect::Order(LoadOrder::Table { only: Only::HashSlots(of), .. }) => **of == moved,
            _ => false,
        };
        (effects.iter().any(is_written), effects.iter().any(is_read))
    };
    assert_eq!(changes(10, 400, start), (true, false), "a load that begins later sees the change");
    assert_eq!(changes(11, 500, start + 2 * HEARTBEAT), (true, false));
    let settled = start + Duration::from_secs(11);
    assert_eq!(changes(12, 600, settled), (true, true));
    assert_eq!(changes(13, 700, settled), (false, false));
}

/// A record of a dead letter whose removal waited for a hash slot that is ahead is not remembered by anybody.
#[test]
fn dead_letters_are_read_again_where_a_hash_slot_is_ahead() {
    let (postgres, now) = (Postgres::new(&mut Rng::of(0, 0)), Instant::now());
    for (ahead, is_read) in [(None, false), (Some(Place::between(end_lsn(408))), true)] {
        let setting = Setting::new(Limits::default(), SafeWhen::Acknowledged, [None; 2], [Format::Hash; 2]);
        let key = setting.key(ROW);
        let dead = DeadKey { table: "a".to_owned(), reason: "too_large".to_owned(), lsn: "0/1".to_owned() };
        let start = |start: Start| Start {
            spread: Spread::Slots { ahead, last: None },
            places: Default::default(),
            dead_keys: vec![(key.clone(), dead)],
            most_dead_keys: 10,
            ..start
        };
        let (mut machine, mut effects) = followed_by(setting, &postgres, start);
        let reads = |effect: &Effect| matches!(effect, Effect::Order(LoadOrder::Keys(of)) if of.keys == [key.clone()]);
        let mut takes = |input, at| {
            let mut new = machine.step(input, at);
            while let Some(executed) = new.iter().rposition(|effect| matches!(effect, Effect::Execute { .. })) {
                effects.extend(new.drain(..=executed));
                new.extend(machine.step(Input::Executed { redis_time_ms: 1_000 }, at));
            }
            effects.extend(new);
            effects.iter().any(reads)
        };
        assert!(!takes(Input::Tick, now), "not before all have caught up");
        takes(Input::Delivered { items: transaction(10, 400, vec![Delivery::Mark(Nonce([7; 16]))]), bytes: 100 }, now);
        assert_eq!(takes(Input::Tick, now + 2 * HEARTBEAT), is_read);
    }
}

/// Whoever follows it cannot know what it has lost.
#[test]
fn a_change_stream_in_a_hash_slot_that_has_lost_something_tells_of_all_tables() {
    let (postgres, now) = (Postgres::new(&mut Rng::of(0, 0)), Instant::now());
    let stream = super::announced::stream();
    for (lost, is_told) in [(&b"something else"[..], false), (stream.key.as_bytes(), true)] {
        let mut setting = Setting::new(Limits::default(), SafeWhen::Told, [None; 2], [Format::Hash; 2]);
        setting.own = setting.own.announcing(Some(stream.clone()));
        let lanes = Arc::new(BTreeSet::from([Lane::of(lost)]));
        let start = |mut start: Start| {
            start.checkpoint.tables.values_mut().for_each(|mark| mark.changed_beside = false);
            let lost = Some(Lost { lanes, because: "a test".to_owned() });
            Start { spread: Spread::Slots { ahead: None, last: None }, places: Default::default(), lost, ..start }
        };
        let (mut machine, _) = followed_by(setting, &postgres, start);
        let effects = machine.step(Input::Tick, now + 2 * HEARTBEAT);
        let says_so = |effect: &Effect| match effect {
            Effect::Execute { batch, .. } => memchr::memmem::find(batch.body(), b"changed_beside").is_some(),
            _ => false,
        };
        assert_eq!(effects.iter().any(says_so), is_told, "{effects:?}");
    }
}

/// Otherwise rows in hash slots that have lost something wait to be read again for as long as they change.
#[test]
fn a_load_that_began_while_something_was_ahead_begins_anew_if_something_is_lost() {
    let (postgres, now) = (Postgres::new(&mut Rng::of(0, 0)), Instant::now());
    let loads = |effects: &[Effect]| {
        let is_load = |effect: &&Effect| {
            matches!(effect, Effect::Order(LoadOrder::Table { table: TableId(1), only: Only::All, .. }))
        };
        effects.iter().filter(is_load).count()
    };
    for (lost, times) in [(None, 0), (Some(7), 1)] {
        let lanes = |number| Arc::new(BTreeSet::from([Lane::new(number).expect("in range")]));
        let start = |start: Start| Start {
            spread: Spread::Slots { ahead: Some(Place::between(end_lsn(408))), last: None },
            places: Default::default(),
            lost: lost.map(|number| Lost { lanes: lanes(number), because: "a test".to_owned() }),
            load: vec![(TableId(1), Reason::ordinary("a test"))],
            ..start
        };
        let setting = Setting::new(Limits::default(), SafeWhen::Acknowledged, [None; 2], [Format::Hash; 2]);
        let (mut machine, effects) = followed_by(setting, &postgres, start);
        assert_eq!(loads(&effects), 1);
        let items = transaction(10, 400, vec![Delivery::Mark(Nonce([7; 16]))]);
        let mut effects = machine.step(Input::Delivered { items, bytes: 100 }, now);
        effects.extend(machine.step(Input::Tick, now + HEARTBEAT));
        effects.extend(machine.step(Input::Executed { redis_time_ms: 1_000 }, now + HEARTBEAT));
        assert_eq!(loads(&effects), times, "{lost:?}");
    }
}

#[test]
fn rows_of_a_transaction_that_an_earlier_session_began_are_not_left_to_the_stream() {
    // Its one change counts as done, and the row may have been pending.
    let begin = Begin { xid: 10, commit: CommitLsn(lsn(200)), time: CommitTime(0) };
    let within = Within { begin, changes_done: 1 };
    assert_eq!(verdicts(Some(within)), [Verdict::ReadAgain]);
    // If this session applies the change, the row is either left to the stream or known to be pending.
    assert_eq!(verdicts(None), [Verdict::Written]);
}
