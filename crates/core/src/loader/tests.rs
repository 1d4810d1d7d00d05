use super::range::{Extent, KeyBound, Range, Span};
use super::*;
use crate::change::Nonce;
use crate::checkpoint::Blocked;
use crate::command::EncodedRows;
use crate::format::Format;
use crate::reason::Reason;
use crate::schema::{CatalogMark, Composition, LeafFile, NullRule, QualifiedName};
use crate::session::load_messages::{Content, Floors, Only, Purpose};
use crate::typed::known::KnownTypes;
use crate::typed::row_type::EncodedRowType;
use bytes::Bytes;
use std::collections::HashSet;
use std::time::Duration;

/// A loader with a given number of tables, and the errands that it has issued.
struct Scene {
    loader: Loader<u16>,
    now: Instant,
    todo: VecDeque<Errand<u16>>,
    said: Vec<FromLoad>,
}

impl Scene {
    fn new(tables: u16) -> Self {
        let spec = |table: u16| TableSpec {
            id: TableId(table),
            name: format!("t{table}"),
            table: QualifiedName { schema: "public".to_owned(), table: format!("t{table}") },
            key: key::parse_template(&format!("t{table}:{{id}}")).expect("a template"),
            columns: Vec::new(),
            rename: Vec::new(),
            null: NullRule::Empty,
            ttl_ms: 1_000,
            format: Format::Hash,
            lookups: Vec::new(),
        };
        let specs: Arc<[TableSpec]> = (0..tables).map(spec).collect();
        let loader = Loader::new(specs, Limits::default(), Measures::default(), Vec::new());
        Scene { loader, now: Instant::now(), todo: VecDeque::new(), said: Vec::new() }
    }

    fn hears(&mut self, heard: Heard<u16>) {
        for errand in self.loader.hears(heard, self.now) {
            match errand {
                Errand::Say(message) => self.said.push(*message),
                Errand::BeginsAgain { .. } => {}
                errand => self.todo.push_back(errand),
            }
        }
    }

    /// Orders a load of the first table, or of some of its leaves.
    fn orders_fill(&mut self, only: Only) {
        let (table, load, purpose) = (TableId(0), LoadId(1), Purpose::Fill);
        let order = LoadOrder::Table { table, load, purpose, only, because: Reason::ordinary("a test") };
        self.hears(Heard::Ordered(vec![order]));
    }

    /// Orders a load of the first table, which is one chunk and has keys in Redis, and continues up to the first visit.
    fn begins_where_keys_are(&mut self) {
        self.orders_fill(Only::All);
        self.todo.pop_front();
        self.hears(Heard::LookedUp(vec![loadable(TableId(0), Extent::Pages(vec![1]))]));
        self.todo.pop_front();
        self.hears(Heard::Empty(HashSet::new()));
    }

    /// Orders loads of tables with the given numbers of pages, and continues up to the first visits. Redis is empty.
    fn begins(&mut self, purpose: Purpose, pages: &[&[u32]]) {
        let order = |table: usize| LoadOrder::Table {
            table: TableId(table as u16),
            load: LoadId(table as u64),
            purpose,
            only: Only::All,
            because: Reason::ordinary("a test"),
        };
        self.hears(Heard::Ordered((0..pages.len()).map(order).collect()));
        self.is_looked_up(pages);
    }

    fn is_looked_up(&mut self, pages: &[&[u32]]) {
        let Some(Errand::LookUp { tables, .. }) = self.todo.pop_front() else { panic!("tables are looked up") };
        assert_eq!(tables.len(), pages.len());
        let extents = pages.iter().map(|pages| Extent::Pages(pages.to_vec()));
        let looked_up = tables.iter().zip(extents).map(|(table, extent)| loadable(*table, extent)).collect();
        self.hears(Heard::LookedUp(looked_up));
        if let Some(Errand::FindEmpty { tables, .. }) = self.todo.front() {
            let empty = tables.iter().copied().collect();
            self.todo.pop_front();
            self.hears(Heard::Empty(empty));
        }
    }

    fn next_visit(&mut self) -> (VisitId, Vec<Reading<u16>>) {
        match self.todo.pop_front() {
            Some(Errand::Visit { visit, parts, .. }) => (visit, parts),
            other => panic!("a visit was expected: {other:?}"),
        }
    }

    /// Every part of a visit returns some rows, which are written.
    fn is_made(&mut self, visit: VisitId, parts: &[Reading<u16>]) {
        self.hears(Heard::Visited(visit, parts.iter().map(|part| brought(part, 1, None)).collect()));
        self.chunks_are(Verdict::Written);
    }

    fn chunks_are(&mut self, verdict: Verdict) {
        let chunks: Vec<ChunkId> = self.chunks();
        self.said.retain(|message| !matches!(message, FromLoad::Chunk(_)));
        self.hears(Heard::Ordered(chunks.into_iter().map(|chunk| LoadOrder::Verdict(chunk, verdict)).collect()));
    }

    fn chunks(&self) -> Vec<ChunkId> {
        let id = |message: &FromLoad| match message {
            FromLoad::Chunk(chunk) => Some(chunk.id),
            _ => None,
        };
        self.said.iter().filter_map(id).collect()
    }

    fn has_ended(&self, table: u16) -> bool {
        self.said.iter().any(|m| matches!(m, FromLoad::Ended { table: TableId(ended), .. } if *ended == table))
    }
}

fn loadable(table: TableId, extent: Extent) -> LookedUp<u16> {
    LookedUp::Loadable(Loadable {
        fingerprint: 1,
        catalog: CatalogMark { shape: 1, storage: 1 },
        types: EncodedRowType("2:idn".into()),
        estimated_rows: 1,
        known_types: KnownTypes::default(),
        composition: composition(),
        extent,
        described: table.0,
    })
}

/// The composition of a table with as many leaves as any test needs.
fn composition() -> Composition {
    let file = |oid| LeafFile { oid, filenode: oid };
    Composition { apart_from_leaves: 1, leaves: (0..10).map(file).collect() }
}

fn brought(part: &Reading<u16>, filenode: u32, rest: Option<Range>) -> Got {
    let content = match &part.task {
        Task::Range(_) => Content::Rows(Vec::new()),
        Task::Orphans(keys) => Content::Orphans { asked: keys.clone(), exist: HashSet::new() },
        Task::Keys(keys) => Content::Keys {
            asked: keys.keys.clone(),
            found: EncodedRows::default(),
            unread: Vec::new(),
            checks: keys.checks,
            mapped_as: 0,
        },
    };
    Got::Brought(Box::new(Brought {
        snapshot: "10:10:".parse().expect("a snapshot"),
        filenode: Some(filenode),
        content,
        rest,
        unwritable: Vec::new(),
        keyless: Vec::new(),
        nonce: Nonce([0; 16]),
        floor: Floors::default().open(),
    }))
}

fn failed(cause: Cause) -> Unread {
    let why = Blocked { because: "it was so".to_owned(), remedy: String::new() };
    Unread { cause, text: why.to_string(), why }
}

fn keys(table: u16, checks: Option<LoadId>) -> LoadOrder {
    LoadOrder::Keys(KeysToRead { table: TableId(table), keys: vec![Key("t0:1".into())], checks })
}

fn tables_of(parts: &[Reading<u16>]) -> Vec<u16> {
    parts.iter().map(|part| part.table.0).collect()
}

#[test]
fn a_load_ends_when_each_range_was_written_once() {
    let mut scene = Scene::new(1);
    scene.begins(Purpose::Fill, &[&[200, 0]]);
    let mut ranges = Vec::new();
    while !scene.todo.is_empty() {
        assert!(!scene.has_ended(0));
        let (visit, parts) = scene.next_visit();
        ranges.extend(parts.iter().map(|part| format!("{:?}", part.task)));
        scene.is_made(visit, &parts);
    }
    assert!(scene.has_ended(0));
    ranges.sort();
    ranges.dedup();
    // Ranges end at pages 64, 128 and 192 and at the end of the first leaf; the second leaf is a single range.
    assert_eq!(ranges.len(), 5, "{ranges:?}");
}

#[test]
fn what_the_session_refuses_is_read_again() {
    let mut scene = Scene::new(1);
    scene.begins(Purpose::Fill, &[&[1]]);
    let (visit, parts) = scene.next_visit();
    scene.hears(Heard::Visited(visit, vec![brought(&parts[0], 1, None)]));
    scene.chunks_are(Verdict::ReadAgain);
    assert!(!scene.has_ended(0));
    let (visit, parts) = scene.next_visit();
    scene.is_made(visit, &parts);
    assert!(scene.has_ended(0));
}

#[test]
fn small_tables_are_read_together_and_large_ones_alone() {
    let mut scene = Scene::new(4);
    scene.begins(Purpose::Fill, &[&[30], &[30], &[30], &[200]]);
    let (_, first) = scene.next_visit();
    let (_, second) = scene.next_visit();
    assert_eq!((tables_of(&first), tables_of(&second)), (vec![0, 1], vec![2]));
    assert!(scene.todo.is_empty(), "two readers");
}

#[test]
fn what_was_in_the_way_of_others_is_read_alone() {
    let mut scene = Scene::new(2);
    scene.begins(Purpose::Fill, &[&[1], &[1]]);
    let (visit, parts) = scene.next_visit();
    assert_eq!(tables_of(&parts), [0, 1]);
    scene.hears(Heard::NotVisited(visit, failed(Cause::Lock)));
    let (_, first) = scene.next_visit();
    let (_, second) = scene.next_visit();
    assert_eq!((tables_of(&first), tables_of(&second)), (vec![0], vec![1]));
}

#[test]
fn a_locked_table_leaves_the_readers_to_the_others() {
    let mut scene = Scene::new(2);
    scene.begins(Purpose::Fill, &[&[1_000], &[1_000]]);
    let (first, parts) = scene.next_visit();
    assert_eq!(tables_of(&parts), [0]);
    scene.next_visit();
    scene.hears(Heard::NotVisited(first, failed(Cause::Lock)));
    let (_, parts) = scene.next_visit();
    assert_eq!(tables_of(&parts), [1]);
}

#[test]
fn only_leaves_that_were_attached_are_read_and_nothing_is_removed() {
    let mut scene = Scene::new(1);
    scene.orders_fill(Only::Leaves([1].into(), CatalogMark { shape: 1, storage: 1 }));
    scene.is_looked_up(&[&[100, 10, 100]]);
    let (visit, parts) = scene.next_visit();
    let [Reading { task: Task::Range(range), .. }] = &parts[..] else { panic!("one range: {parts:?}") };
    assert_eq!(range.leaf, 1);
    assert!(scene.todo.is_empty(), "nothing else is read");
    scene.is_made(visit, &parts);
    assert!(scene.todo.is_empty(), "no key is looked for");
    assert!(scene.has_ended(0));
}

#[test]
fn one_reader_is_left_to_a_load_that_waits() {
    let mut scene = Scene::new(1);
    scene.begins(Purpose::Fill, &[&[1_000]]);
    scene.hears(Heard::Ordered(vec![keys(0, None), keys(0, None)]));
    let (first, parts) = scene.next_visit();
    scene.next_visit();
    scene.is_made(first, &parts);
    let (of_keys, parts) = scene.next_visit();
    assert!(matches!(parts[0].task, Task::Keys(_)));
    scene.is_made(of_keys, &parts);
    let (_, parts) = scene.next_visit();
    assert!(matches!(parts[0].task, Task::Keys(_)), "the second reader is still with the load");
}

#[test]
fn a_table_that_was_rewritten_is_read_from_its_beginning() {
    let mut scene = Scene::new(1);
    scene.begins(Purpose::Fill, &[&[100]]);
    let (first, a) = scene.next_visit();
    let (second, b) = scene.next_visit();
    scene.hears(Heard::Visited(first, vec![brought(&a[0], 1, None)]));
    scene.hears(Heard::Visited(second, vec![brought(&b[0], 2, None)]));
    // What was read before no longer counts.
    let early = scene.chunks();
    scene.said.clear();
    scene.is_looked_up(&[&[100]]);
    let orders = early.into_iter().map(|chunk| LoadOrder::Verdict(chunk, Verdict::GivenUp)).collect();
    scene.hears(Heard::Ordered(orders));
    let mut visits = 0;
    while let Some(errand) = scene.todo.front() {
        if let Errand::Scan { .. } = errand {
            scene.todo.pop_front();
            scene.hears(Heard::Scanned { next: 0, keys: Vec::new() });
            continue;
        }
        visits += 1;
        let (visit, parts) = scene.next_visit();
        scene.hears(Heard::Visited(visit, vec![brought(&parts[0], 2, None)]));
        scene.chunks_are(Verdict::Written);
    }
    assert_eq!(visits, 2);
    assert!(scene.has_ended(0));
}

#[test]
fn a_range_that_is_read_again_leaves_out_the_rest_of_it() {
    let mut scene = Scene::new(1);
    scene.orders_fill(Only::All);
    scene.todo.pop_front();
    scene.hears(Heard::LookedUp(vec![loadable(TableId(0), Extent::Leaves(1))]));
    scene.todo.pop_front();
    scene.hears(Heard::Empty(HashSet::from([TableId(0)])));
    let (visit, parts) = scene.next_visit();
    let at = Some(KeyBound(vec!["5".to_owned()]));
    let rest = Range { leaf: 0, span: Span::Keys { after: at.clone(), through: None }, at_most_rows: None };
    scene.hears(Heard::Visited(visit, vec![brought(&parts[0], 1, Some(rest.clone()))]));
    scene.chunks_are(Verdict::ReadAgain);
    let mut spans = Vec::new();
    while !scene.todo.is_empty() {
        let (visit, parts) = scene.next_visit();
        let Task::Range(range) = &parts[0].task else { panic!("a range") };
        spans.push(range.span.clone());
        scene.is_made(visit, &parts);
    }
    assert_eq!(spans, [rest.span, Span::Keys { after: None, through: at }]);
    assert!(scene.has_ended(0));
}

#[test]
fn a_comparison_is_given_up_where_a_load_goes_on() {
    for cause in [Cause::Lock, Cause::Connection] {
        for purpose in [Purpose::Fill, Purpose::Compare(crate::admin::Repair::Mend)] {
            let mut scene = Scene::new(1);
            scene.begins(purpose, &[&[1]]);
            for _ in 0..40 {
                let Some(Errand::Visit { visit, .. }) = scene.todo.pop_front() else { break };
                scene.hears(Heard::NotVisited(visit, failed(cause)));
                scene.now += Duration::from_secs(5);
                scene.hears(Heard::Woke);
            }
            let given_up = scene.said.iter().any(|message| matches!(message, FromLoad::NotCompared { .. }));
            assert_eq!(given_up, purpose != Purpose::Fill, "{cause:?}");
            assert_eq!(scene.loader.is_idle(), given_up, "{cause:?}");
        }
    }
}

#[test]
fn the_session_is_told_of_every_read_of_keys_that_nobody_makes() {
    let mut scene = Scene::new(1);
    scene.begins(Purpose::Compare(crate::admin::Repair::OnlyCount), &[&[1_000]]);
    scene.hears(Heard::Ordered(vec![keys(0, Some(LoadId(0))), keys(0, Some(LoadId(0)))]));
    scene.hears(Heard::Ordered(vec![LoadOrder::Abandon(TableId(0), LoadId(0))]));
    assert_eq!(scene.said.iter().filter(|message| matches!(message, FromLoad::KeysNotRead)).count(), 2);
}

#[test]
fn a_locked_table_is_looked_up_until_it_can_be_loaded() {
    let mut scene = Scene::new(1);
    scene.orders_fill(Only::All);
    for _ in 0..20 {
        assert!(matches!(scene.todo.pop_front(), Some(Errand::LookUp { .. })));
        scene.hears(Heard::LookedUp(vec![LookedUp::Locked(failed(Cause::Lock).why)]));
        assert!(scene.todo.is_empty());
        scene.now = scene.loader.wakes_at().expect("it tries again");
        scene.hears(Heard::Woke);
    }
    assert!(scene.said.is_empty());
}

#[test]
fn a_loader_that_rests_reads_single_keys_and_no_chunk() {
    let mut scene = Scene::new(2);
    scene.begins(Purpose::Fill, &[&[1_000]]);
    let readers = Measures::default().readers;
    let visits: Vec<_> = (0..readers).map(|_| scene.next_visit()).collect();
    let until = scene.now + Duration::from_secs(5);
    for (visit, parts) in visits {
        scene.loader.rests_until(until);
        scene.is_made(visit, &parts);
    }
    assert!(scene.todo.is_empty() && !scene.loader.is_idle());
    scene.hears(Heard::Ordered(vec![keys(0, None)]));
    let (visit, parts) = scene.next_visit();
    assert!(matches!(parts[0].task, Task::Keys(_)), "{parts:?}");
    scene.is_made(visit, &parts);
    assert_eq!((scene.loader.wakes_at(), scene.todo.len()), (Some(until), 0));
    scene.hears(Heard::Woke);
    assert!(scene.todo.is_empty(), "too early");
    scene.now = until;
    scene.hears(Heard::Woke);
    assert_eq!((scene.loader.wakes_at(), scene.todo.len()), (None, readers));
}

#[test]
fn postgres_is_asked_only_about_keys_that_no_good_chunk_had() {
    let mut scene = Scene::new(1);
    scene.begins_where_keys_are();
    let with = |part: &Reading<u16>, keys: &[&str]| {
        let Got::Brought(mut brought) = brought(part, 1, None) else { unreachable!() };
        let rows = keys.iter().map(|key| (Key(Bytes::copy_from_slice(key.as_bytes())), 0)).collect();
        brought.content = Content::Rows(vec![EncodedRows { rows, ..EncodedRows::default() }]);
        vec![Got::Brought(brought)]
    };
    // What this chunk saw may be gone without a word in the stream.
    let (visit, parts) = scene.next_visit();
    scene.hears(Heard::Visited(visit, with(&parts[0], &["t0:1", "t0:2"])));
    scene.chunks_are(Verdict::ReadAgain);
    let (visit, parts) = scene.next_visit();
    scene.hears(Heard::Visited(visit, with(&parts[0], &["t0:2", "t0:3"])));
    scene.chunks_are(Verdict::Written);
    // Few are left of a page: they wait for those of the next.
    for (next, found) in [(7, ["t0:1", "t0:2"]), (0, ["t0:3", "t0:4"])] {
        assert!(matches!(scene.todo.pop_front(), Some(Errand::Scan { .. })));
        let keys = found.iter().map(|key| Key(Bytes::copy_from_slice(key.as_bytes()))).collect();
        scene.hears(Heard::Scanned { next, keys });
    }
    let (_, parts) = scene.next_visit();
    let [Reading { task: Task::Orphans(asked), .. }] = &parts[..] else { panic!("orphans: {parts:?}") };
    assert_eq!(asked, &[Key("t0:1".into()), Key("t0:4".into())]);
}

#[test]
fn a_search_for_orphans_keeps_nobody_waiting() {
    let mut scene = Scene::new(1);
    scene.begins_where_keys_are();
    let (visit, parts) = scene.next_visit();
    scene.is_made(visit, &parts);
    assert!(matches!(scene.todo.pop_front(), Some(Errand::Scan { .. })));
    // Ordered while Redis is asked for a page, of which none of the keys has to be asked about.
    scene.hears(Heard::Ordered(vec![keys(0, None)]));
    scene.hears(Heard::Scanned { next: 7, keys: Vec::new() });
    let (_, parts) = scene.next_visit();
    assert!(matches!(parts[0].task, Task::Keys(_)), "{parts:?}");
    assert!(matches!(scene.todo.pop_front(), Some(Errand::Scan { .. })), "the search goes on");
}
