//! The HTTP side with a real Redis: every status code of the contract, and what unknown clients may do to a server.
//!
//! The test plays the bridge: it writes hashes and the checkpoint itself, and sets the status.

use crate::harness::{Answer, Redis, eventually, post};
use bytes::Bytes;
use prefetchd::checkpoint::{Checkpoint, TableMark, TableState};
use prefetchd::command::Key;
use prefetchd::command::Op;
use prefetchd::format::Format;
use prefetchd::http::{self, AdminToken, HttpContext, HttpLimits, Names, Page};
use prefetchd::lookups::Lookups;
use prefetchd::lsn::{EndLsn, Lsn};
use prefetchd::metrics::Metrics;
use prefetchd::plan::key::parse_lookup;
use prefetchd::resp::batch::OwnKeys;
use prefetchd::schema::{KeyTemplate, LookupSpec, NullRule, QualifiedName, TableId, TableSpec};
use prefetchd::sink::any_reader::AnyReader;
use prefetchd::sink::connect::RedisTarget;
use prefetchd::sink::reader::Reader;
use prefetchd::status::{ChangeEvent, Source, State, Status};
use prefetchd::typed::row_type::EncodedRowType;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::sync::{Notify, broadcast, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

const CHECKPOINT: &str = "prefetchd:{prefetchd}:checkpoint";
const TABLES: &str = "prefetchd:{prefetchd}:tables";
/// The token of every stage, as `run` would create it.
pub const TOKEN: &str = "a-token-of-this-stage";
const SEGMENT: u64 = 16 << 20;

// ---------------------------------------------------------------------------------------------------- the stage

pub struct Stage {
    redis: Redis,
    connection: redis::aio::MultiplexedConnection,
    address: std::net::SocketAddr,
    status: watch::Sender<Arc<Status>>,
    events: broadcast::Sender<ChangeEvent>,
    position_wanted: Arc<Notify>,
    stop: CancellationToken,
    server: JoinHandle<()>,
}

fn table(id: u16, name: &str, literal: &str, columns: &[&str]) -> TableSpec {
    TableSpec {
        id: TableId(id),
        name: name.to_owned(),
        table: QualifiedName { schema: "public".to_owned(), table: name.to_owned() },
        key: KeyTemplate { literal: literal.to_owned(), columns: columns.iter().map(|&c| c.to_owned()).collect() },
        columns: vec![],
        rename: vec![],
        null: NullRule::Empty,
        ttl_ms: 60_000,
        format: Format::Hash,
        lookups: Vec::new(),
    }
}

fn tables() -> Vec<TableSpec> {
    let key = parse_lookup("cache:categories-by-name:{name}").unwrap();
    let by_name = LookupSpec { name: "by_name".to_owned(), key, order: None };
    vec![
        TableSpec { lookups: vec![by_name], ..table(0, "categories", "cache:category:", &["id"]) },
        table(1, "order items", "cache:item:", &["order_id", "line"]),
    ]
}

fn end(lsn: &str) -> EndLsn {
    EndLsn(lsn.parse().unwrap())
}

fn checkpoint(lsn: &str, state: TableState) -> Checkpoint {
    let mark = |spec: &TableSpec| TableMark {
        ttl_until_ms: Some(u64::MAX / 2),
        as_of: None,
        lookups_as: Lookups::fingerprint_of(spec),
        ..TableMark::unread(spec.key.to_string(), 1, state)
    };
    Checkpoint {
        system_id: "7000".to_owned(),
        timeline: 1,
        database: "shop".to_owned(),
        lsn: end(lsn),
        epoch: 3,
        seq: 10,
        within: None,
        clearing: None,
        last: None,
        beat_ms: 1,
        base: end("0/1"),
        floor: None,
        healing: 0,
        lists_in_doubt: false,
        whole: 0,
        evicted: 0,
        made_publication: None,
        retired: vec![],
        tables: tables().iter().map(|t| (t.name.clone(), mark(t))).collect(),
    }
}

/// Streaming, everything loaded, contact just now.
fn healthy() -> Status {
    let mut status = Status::starting(&tables());
    let now = Instant::now();
    status.state = State::Streaming;
    status.source = Some(Source {
        system_id: "7000".to_owned(),
        timeline: 1,
        database: "shop".to_owned(),
        slot: "prefetchd".to_owned(),
        publication: "prefetchd".to_owned(),
        wal_segment_bytes: SEGMENT,
    });
    status.applied = Some(end("0/1A"));
    status.received = Some(end("0/1A"));
    status.server = Some(end("0/1A").0);
    status.last_contact = Some(now);
    status.fresh_as_of = Some(now);
    (status.epoch, status.seq) = (3, 10);
    for table in &mut status.tables {
        table.state = Some(TableState::Loaded);
    }
    status
}

impl Stage {
    async fn set() -> Self {
        Self::set_within(HttpLimits::default()).await
    }

    async fn set_within(limits: HttpLimits) -> Self {
        Self::set_with(limits, |_| {}).await
    }

    pub async fn set_with(limits: HttpLimits, change: impl FnOnce(&mut HttpContext)) -> Self {
        let redis = Redis::start();
        let connection = redis.connection().await;
        let reader = reader(&redis.url());
        let specs = tables();
        let (status, seen) = watch::channel(Arc::new(healthy()));
        let (events, _) = broadcast::channel(64);
        let position_wanted = Arc::new(Notify::new());
        let mut context = HttpContext {
            status: seen,
            reader: AnyReader::One(reader),
            sightings: Arc::default(),
            metrics: Arc::new(Metrics::new(&specs)),
            history: Arc::default(),
            all_tables: specs.clone().into(),
            tables: specs.into(),
            events: events.clone(),
            position_wanted: Arc::clone(&position_wanted),
            max_staleness: Duration::from_secs(30),
            // Nothing answers: what is tested here is who may ask, not what operations do.
            ask: tokio::sync::mpsc::channel(1).0,
            reload: None,
            changed: Arc::default(),
            admin_token: AdminToken::Made(TOKEN.into()),
            names: Names::new(Ipv4Addr::LOCALHOST.into(), &[]),
            page: Page { is_shown: true, demo: None },
        };
        change(&mut context);
        context.sightings.wrote((healthy().epoch, healthy().seq));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let stop = CancellationToken::new();
        let server = tokio::spawn(http::serve_within(limits, listener, watch::channel(context).1, stop.clone()));
        let mut stage = Self { redis, connection, address, status, events, position_wanted, stop, server };
        stage.checkpoint(&checkpoint("0/1A", TableState::Loaded)).await;
        stage.row("cache:category:cat-001", &[("id", "cat-001"), ("name", "Beverages"), ("featured", "true")]).await;
        stage.run(redis::cmd("SADD").arg("cache:categories-by-name:Beverages").arg("cat-001")).await;
        stage
    }

    pub async fn run(&mut self, command: &redis::Cmd) {
        command.exec_async(&mut self.connection).await.unwrap();
    }

    async fn checkpoint(&mut self, checkpoint: &Checkpoint) {
        self.run(redis::cmd("DEL").arg(TABLES)).await;
        for (table, entry) in checkpoint.entries() {
            self.run(redis::cmd("HSET").arg(TABLES).arg(table).arg(entry)).await;
        }
        self.run(redis::cmd("SET").arg(CHECKPOINT).arg(checkpoint.to_json())).await;
    }

    async fn row(&mut self, key: impl AsRef<[u8]>, fields: &[(&str, &str)]) {
        let mut command = redis::cmd("HSET");
        command.arg(key.as_ref());
        for (field, value) in fields {
            command.arg(field).arg(value);
        }
        self.run(&command).await;
        self.run(redis::cmd("PEXPIRE").arg(key.as_ref()).arg(50_000)).await;
    }

    pub fn status(&self, change: impl FnOnce(&mut Status)) {
        self.status.send_modify(|status| change(Arc::make_mut(status)));
    }

    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).await.unwrap()
    }

    pub fn address(&self) -> std::net::SocketAddr {
        self.address
    }

    /// The status of a response that does not end.
    pub async fn first_status(&self, target: &str) -> u16 {
        let mut stream = self.connect().await;
        stream.write_all(format!("GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n").as_bytes()).await.unwrap();
        let mut head = [0; 12];
        stream.read_exact(&mut head).await.unwrap();
        std::str::from_utf8(&head).unwrap().rsplit_once(' ').unwrap().1.parse().unwrap()
    }

    /// Sends one request on a connection of its own, and reads until the server closes it.
    pub async fn raw(&self, request: impl AsRef<[u8]>) -> Answer {
        let mut stream = self.connect().await;
        stream.write_all(request.as_ref()).await.unwrap();
        Answer::read(&mut stream).await
    }

    async fn request(&self, method: &str, target: &str) -> Answer {
        self.raw(format!("{method} {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")).await
    }

    async fn get(&self, target: &str) -> Answer {
        self.request("GET", target).await
    }

    async fn code(&self, target: &str) -> (u16, String) {
        self.get(target).await.refusal()
    }
}

fn reader(url: &str) -> Reader {
    let target = RedisTarget::parse(url).unwrap();
    Reader::connect_lazy(&target, &OwnKeys::under("prefetchd:{prefetchd}:"))
}

fn is(status: u16, code: &str) -> (u16, String) {
    (status, code.to_owned())
}

const ROW: &str = "/v1/tables/categories/cat-001";
const NONE: &str = "/v1/tables/categories/cat-999";

fn ago(d: Duration) -> Option<Instant> {
    Some(Instant::now().checked_sub(d).unwrap())
}

// ---------------------------------------------------------------------------------------------------- one row

#[tokio::test]
async fn a_row_comes_in_its_stored_order_and_with_its_headers() {
    let stage = Stage::set().await;
    stage.status(|s| s.last_contact = ago(Duration::from_millis(2500)));
    let answer = stage.get(ROW).await;
    assert_eq!(answer.status, 200);
    assert_eq!(answer.body, r#"{"id":"cat-001","name":"Beverages","featured":"true"}"#);
    assert_eq!(answer.header("prefetchd-lsn"), Some("0/1A"));
    assert_eq!(answer.header("age"), Some("2"));
    assert_eq!(answer.header("cache-control"), Some("no-store"));
    assert_eq!(answer.header("content-type"), Some("application/json"));
    let ttl: u64 = answer.header("prefetchd-ttl-ms").unwrap().parse().unwrap();
    assert!((40_000..=50_000).contains(&ttl), "{ttl}");
    let timing = answer.header("server-timing").unwrap().strip_prefix("redis;dur=").unwrap();
    assert!(timing.parse::<f64>().unwrap() < 1000.0, "{timing}");
}

#[tokio::test]
async fn a_404_says_that_there_is_no_such_row_and_as_of_when() {
    let stage = Stage::set().await;
    let answer = stage.get(NONE).await;
    assert_eq!(answer.refusal(), is(404, "not_found"));
    assert_eq!(answer.header("prefetchd-lsn"), Some("0/1A"));
    assert_eq!(answer.header("age"), Some("0"));
    assert_eq!(answer.header("prefetchd-ttl-ms"), None);
    assert!(answer.body.contains("categories has no row cat-999"), "{}", answer.body);
}

#[tokio::test]
async fn bytes_that_are_not_text_become_replacement_characters() {
    let mut stage = Stage::set().await;
    stage.run(redis::cmd("HSET").arg("cache:category:raw").arg("data").arg(b"a\xffb\"\n")).await;
    assert_eq!(stage.get("/v1/tables/categories/raw").await.json()["data"], "a\u{fffd}b\"\n");
}

#[tokio::test]
async fn keys_of_any_bytes_are_found() {
    let mut stage = Stage::set().await;
    for (path, key) in [
        ("a%2Fb", &b"cache:category:a/b"[..]),
        ("a%3Ab", b"cache:category:a:b"),
        ("a:b+c", b"cache:category:a:b+c"),
        ("%20x%20", b"cache:category: x "),
        ("%25", b"cache:category:%"),
        ("%2E%2E", b"cache:category:.."),
        ("%FF%00%fe", b"cache:category:\xff\x00\xfe"),
        ("%7Bid%7D*%3F", b"cache:category:{id}*?"),
    ] {
        stage.row(key, &[("path", path)]).await;
        let answer = stage.get(&format!("/v1/tables/categories/{path}")).await;
        assert_eq!((answer.status, &answer.json()["path"]), (200, &path.into()), "{path}");
    }
}

#[tokio::test]
async fn composite_keys_are_path_segments_in_the_order_of_the_template() {
    let mut stage = Stage::set().await;
    stage.row("cache:item:o-1:2", &[("n", "plain")]).await;
    stage.row("cache:item:a%3Ab:50%25", &[("n", "escaped")]).await;
    assert_eq!(stage.get("/v1/tables/order%20items/o-1/2").await.json()["n"], "plain");
    assert_eq!(stage.get("/v1/tables/order%20items/a:b/50%25").await.json()["n"], "escaped");
    for wrong in ["o-1", "o-1/2/3", "o-1/2/"] {
        assert_eq!(stage.code(&format!("/v1/tables/order%20items/{wrong}")).await, is(400, "bad_request"), "{wrong}");
    }
}

#[tokio::test]
async fn an_empty_text_is_a_key_like_any_other() {
    let mut stage = Stage::set().await;
    assert_eq!(stage.code("/v1/tables/categories/").await, is(404, "not_found"));
    stage.row("cache:category:", &[("id", "")]).await;
    assert_eq!(stage.get("/v1/tables/categories/").await.body, r#"{"id":""}"#);
    assert_eq!(stage.get("/v1/tables/categories?key=").await.body, r#"{"rows":{"":{"id":""}}}"#);
}

#[tokio::test]
async fn values_have_types_once_the_entry_of_the_table_tells_them() {
    let mut stage = Stage::set().await;
    stage.row("cache:category:full", &[("tags", "{a,b}"), ("data", "\"\n"), ("id", "full"), ("other", "1")]).await;
    stage.run(redis::cmd("HSET").arg("cache:category:full").arg("data").arg(b"a\xffb\"\n")).await;
    for target in ["/v1/tables/categories/full?typed=true", "/v1/tables/categories?key=full&typed=true"] {
        assert_eq!(stage.code(target).await, is(503, "loading"));
    }
    assert_eq!(stage.code("/v1/tables/categories/none?typed=true").await, is(404, "not_found"));
    for (types, expected) in [
        ("2:id!s4:name!s4:data!s4:tags[,s", Some(r#"{"id":"full","name":null,"data":"a�b\"\n","tags":["a","b"]}"#)),
        ("", Some("{}")),
        ("2:id", None),
        ("of a later version", None),
    ] {
        let mut checkpoint = checkpoint("0/1A", TableState::Loaded);
        let mark = checkpoint.tables.get_mut("categories").unwrap();
        mark.types = Some(EncodedRowType(types.into()));
        stage.checkpoint(&checkpoint).await;
        let one = stage.get("/v1/tables/categories/full?typed=true").await;
        let several = stage.get("/v1/tables/categories?key=full&key=none&typed=true").await;
        match expected {
            Some(row) => {
                assert_eq!((one.status, one.body.as_str()), (200, row), "{types}");
                assert_eq!(several.body, format!(r#"{{"rows":{{"full":{row},"none":null}}}}"#));
            }
            None => assert_eq!((one.refusal(), several.refusal()), (is(503, "loading"), is(503, "loading")), "{types}"),
        }
        assert_eq!(stage.get("/v1/tables/categories/full?typed=false").await.json()["tags"], "{a,b}");
    }
}

/// Names of attributes are not in the text of a composite value.
#[tokio::test]
async fn a_row_that_becomes_far_longer_with_types_is_refused() {
    let mut stage = Stage::set().await;
    let mut checkpoint = checkpoint("0/1A", TableState::Loaded);
    let types = EncodedRowType(format!("4:data[,(200:{}s)", "x".repeat(200)).into());
    checkpoint.tables.get_mut("categories").unwrap().types = Some(types);
    stage.checkpoint(&checkpoint).await;
    for (values, expected) in [(100, 200), (20_000, 400)] {
        stage.row("cache:category:long", &[("data", &format!("{{{}()}}", "(),".repeat(values)))]).await;
        for target in ["/v1/tables/categories/long?typed=true", "/v1/tables/categories?key=long&typed=true"] {
            let answer = stage.get(target).await;
            assert_eq!(answer.status, expected, "{answer:.200?}");
            if expected == 400 {
                assert_eq!(answer.refusal(), is(400, "too_large"));
            }
        }
        assert_eq!(stage.get("/v1/tables/categories/long").await.status, 200);
    }
}

#[tokio::test]
async fn a_request_that_means_nothing_is_400_with_a_reason() {
    let stage = Stage::set().await;
    for (target, reason) in [
        ("/v1/tables/categories/a/b", "path segments"),
        ("/v1/tables/categories/%zz", "escape"),
        ("/v1/tables/categories/%f", "escape"),
        ("/v1/tables/categories", "which rows"),
        ("/v1/tables/categories/a?key=b", "several rows"),
        ("/v1/tables/categories/a?minlsn=0/1", "minlsn"),
        ("/v1/tables/categories/a?wait=1s&wait=2s", "twice"),
        ("/v1/tables/categories/a?max_age=soon", "max_age"),
        ("/v1/tables/categories/a?max_age=-1s", "max_age"),
        ("/v1/tables/categories/a?max_age=30", "max_age"),
        ("/v1/tables/categories/a?typed=yes", "typed"),
        ("/v1/tables/categories?key=a&typed", "typed"),
        ("/v1/tables/categories/a?typed=true&typed=true", "twice"),
        ("/v1/tables/order%20items?key=one", "no key"),
        ("/v1/events?table=x", "no parameters"),
    ] {
        let answer = stage.get(target).await;
        assert_eq!(answer.refusal(), is(400, "bad_request"), "{target}");
        let message = answer.json()["message"].as_str().unwrap().to_owned();
        assert!(message.contains(reason), "{target}: {message}");
    }
    assert_eq!(stage.code("/v1/tables/nope/1").await, is(404, "unknown_table"));
    assert_eq!(stage.code("/v1/tables/nope?key=1").await, is(404, "unknown_table"));
}

// ---------------------------------------------------------------------------------------------------- what may be said

#[tokio::test]
async fn a_row_that_redis_cannot_hold_is_not_said_not_to_exist() {
    let mut stage = Stage::set().await;
    let mut with = checkpoint("0/1A", TableState::Loaded);
    let mark = with.tables.get_mut("categories").unwrap();
    mark.dead_letters = 1;
    stage.checkpoint(&with).await;
    let own = OwnKeys::under("prefetchd:{prefetchd}:");
    let key = Key(Bytes::from_static(b"cache:category:cat-999"));
    for record in [&br#"{"table":"categories","reason":"too_large","lsn":"0/1A"}"#[..], b"of a later version"] {
        let hash = own.dead_keys_of(&key);
        stage.run(redis::cmd("HSET").arg(hash.as_bytes()).arg(key.as_bytes()).arg(record)).await;
        assert_eq!(stage.code(NONE).await, is(503, "dead_letter"));
        assert_eq!(stage.code("/v1/tables/categories?key=cat-001&key=cat-999").await, is(503, "dead_letter"));
        assert_eq!(stage.get(ROW).await.status, 200);
        assert_eq!(stage.code("/v1/tables/categories/other").await, is(404, "not_found"));
        assert_eq!(stage.get("/v1/tables/categories?key=cat-001&key=other").await.status, 200);
    }
    let mark = with.tables.get_mut("categories").unwrap();
    (mark.dead_letters, mark.more_dead_letters) = (0, true);
    stage.checkpoint(&with).await;
    assert_eq!(stage.get(ROW).await.status, 200);
    assert_eq!(stage.code("/v1/tables/categories/other").await, is(503, "dead_letter"));
    // Something else is in place of the records: nothing can be said.
    (with.tables.get_mut("categories").unwrap().dead_letters, with.seq) = (1, with.seq + 1);
    with.tables.get_mut("categories").unwrap().more_dead_letters = false;
    stage.checkpoint(&with).await;
    stage.run(redis::cmd("SET").arg(own.dead_keys_of(&key).as_bytes()).arg("x")).await;
    assert_eq!(stage.code(NONE).await, is(503, "healing"));
}

#[tokio::test]
async fn the_state_in_the_checkpoint_decides_what_a_miss_means() {
    let mut stage = Stage::set().await;
    for (state, hit, miss) in [
        (TableState::Loaded, None, is(404, "not_found")),
        (TableState::Loading, None, is(503, "loading")),
        (TableState::Incomplete, None, is(503, "incomplete")),
        (TableState::Healing, Some(is(503, "healing")), is(503, "healing")),
    ] {
        stage.checkpoint(&checkpoint("0/1A", state)).await;
        match hit {
            None => assert_eq!(stage.get(ROW).await.status, 200, "{state:?}"),
            Some(refusal) => assert_eq!(stage.code(ROW).await, refusal, "{state:?}"),
        }
        assert_eq!(stage.code(NONE).await, miss, "{state:?}");
    }
}

#[tokio::test]
async fn a_table_that_the_checkpoint_does_not_know_is_loading() {
    let mut stage = Stage::set().await;
    let mut known = checkpoint("0/1A", TableState::Loaded);
    known.tables.get_mut("categories").unwrap().template = "other:{id}".to_owned();
    stage.checkpoint(&known).await;
    assert_eq!(stage.code(NONE).await, is(503, "loading"));
    known.tables.clear();
    stage.checkpoint(&known).await;
    assert_eq!(stage.code(NONE).await, is(503, "loading"));
    assert_eq!(stage.get(ROW).await.status, 200);
}

#[tokio::test]
async fn keys_that_may_have_expired_are_not_called_missing() {
    let mut stage = Stage::set().await;
    let mut frozen = checkpoint("0/1A", TableState::Loaded);
    frozen.beat_ms = 5000;
    frozen.tables.get_mut("categories").unwrap().ttl_until_ms = Some(5000);
    stage.checkpoint(&frozen).await;
    assert_eq!(stage.code(NONE).await, is(503, "healing"));
    assert_eq!(stage.get(ROW).await.status, 200);
}

#[tokio::test]
async fn a_redis_that_lost_something_is_healing_for_hits_and_misses() {
    let mut stage = Stage::set().await;
    let good = checkpoint("0/1A", TableState::Loaded);
    let with = |change: fn(&mut Checkpoint)| {
        let mut changed = good.clone();
        change(&mut changed);
        changed
    };
    for lost in [with(|c| c.seq = 9), with(|c| (c.epoch, c.seq) = (2, 99)), with(|c| c.system_id = "1".to_owned())] {
        stage.checkpoint(&lost).await;
        assert_eq!(stage.code(ROW).await, is(503, "healing"), "{lost:?}");
        assert_eq!(stage.code(NONE).await, is(503, "healing"), "{lost:?}");
    }
    for newer in [with(|c| c.seq = 11), with(|c| (c.epoch, c.seq) = (4, 1))] {
        stage.checkpoint(&newer).await;
        assert_eq!(stage.get(ROW).await.status, 200, "{newer:?}");
        assert_eq!(stage.code(NONE).await, is(404, "not_found"), "{newer:?}");
    }
    // What any read has returned counts, whatever the daemon knows about it.
    stage.checkpoint(&with(|c| c.seq = 11)).await;
    assert_eq!(stage.code(ROW).await, is(503, "healing"));
    for garbage in ["", "{", "{}", "null", "\u{1}"] {
        stage.run(redis::cmd("SET").arg(CHECKPOINT).arg(garbage)).await;
        assert_eq!(stage.code(ROW).await, is(503, "healing"), "{garbage}");
    }
    stage.run(&redis::cmd("FLUSHALL")).await;
    assert_eq!(stage.code(NONE).await, is(503, "healing"));
    assert_eq!(stage.code("/v1/tables/categories?key=cat-999").await, is(503, "healing"));
}

/// It may have come up with less data, which only a daemon that takes it over finds out.
#[tokio::test]
async fn a_redis_that_was_started_again_is_healing_until_it_is_taken_over() {
    let mut stage = Stage::set().await;
    let mut found = checkpoint("0/1A", TableState::Loaded);
    let restart = async |stage: &mut Stage| {
        stage.redis.command::<()>(&["SAVE"]).await;
        stage.redis.kill();
        stage.redis.start_again();
        stage.connection = stage.redis.connection().await;
        let is_up = |answer: &Answer| answer.status == 200 || answer.refusal().1 != "redis_unavailable";
        eventually("it answers", async || stage.get(ROW).await, is_up).await
    };
    assert_eq!(restart(&mut stage).await.status, 200, "what this daemon wrote itself last");
    found.seq += 1;
    stage.checkpoint(&found).await;
    assert_eq!(stage.get(ROW).await.status, 200);
    assert_eq!(restart(&mut stage).await.refusal(), is(503, "healing"), "another one may have written more");
    found.epoch += 1;
    stage.checkpoint(&found).await;
    assert_eq!(stage.get(ROW).await.status, 200);
}

#[tokio::test]
async fn something_else_in_the_place_of_a_row_is_neither_a_row_nor_a_missing_one() {
    let mut stage = Stage::set().await;
    stage.run(redis::cmd("SET").arg("cache:category:odd").arg("x")).await;
    assert_eq!(stage.code("/v1/tables/categories/odd").await, is(503, "healing"));
    assert_eq!(stage.code("/v1/tables/categories?key=cat-001&key=odd").await, is(503, "healing"));
    assert_eq!(stage.get(ROW).await.status, 200);
    stage.run(redis::cmd("DEL").arg(CHECKPOINT)).await;
    stage.run(redis::cmd("SADD").arg(CHECKPOINT).arg("x")).await;
    assert_eq!(stage.code(ROW).await, is(503, "healing"));
}

#[tokio::test]
async fn a_miss_without_recent_contact_is_stale_and_a_hit_is_served() {
    let stage = Stage::set().await;
    for fresh_as_of in [None, ago(Duration::from_secs(31))] {
        stage.status(|s| s.fresh_as_of = fresh_as_of);
        assert_eq!(stage.code(NONE).await, is(503, "stale"));
        assert_eq!(stage.get(ROW).await.status, 200);
    }
    stage.status(|s| s.fresh_as_of = ago(Duration::from_secs(20)));
    assert_eq!(stage.code(NONE).await, is(404, "not_found"));
}

#[tokio::test]
async fn max_age_refuses_hits_too() {
    let stage = Stage::set().await;
    stage.status(|s| s.last_contact = ago(Duration::from_secs(10)));
    assert_eq!(stage.get(&format!("{ROW}?max_age=30s")).await.status, 200);
    assert_eq!(stage.code(&format!("{ROW}?max_age=5s")).await, is(503, "stale"));
    assert_eq!(stage.code(&format!("{NONE}?max_age=5s")).await, is(503, "stale"));
    assert_eq!(stage.code(&format!("{NONE}?max_age=30s")).await, is(404, "not_found"));
    assert_eq!(stage.code("/v1/tables/categories?key=cat-001&max_age=5s").await, is(503, "stale"));
    stage.status(|s| s.last_contact = None);
    let answer = stage.get(ROW).await;
    assert_eq!((answer.status, answer.header("age")), (200, None));
    assert_eq!(stage.code(&format!("{ROW}?max_age=1h")).await, is(503, "stale"));
}

#[tokio::test]
async fn a_daemon_that_waits_for_postgres_serves_what_is_there() {
    let stage = Stage::set().await;
    stage.status(|s| *s = Status::starting(&tables()));
    // It may find out in a moment that Redis was rewound.
    assert_eq!(stage.code(ROW).await, is(503, "healing"));
    stage.status(|s| s.waiting_for = Some("postgres does not answer".to_owned()));
    assert_eq!(stage.get(ROW).await.status, 200);
    assert_eq!(stage.code(NONE).await, is(503, "stale"));
    assert_eq!(stage.get(&format!("{ROW}?min_lsn=0/1A")).await.status, 200);
    assert_eq!(stage.code(&format!("{ROW}?min_lsn=0/1B&wait=50ms")).await, is(504, "lagging"));
}

#[tokio::test]
async fn a_redis_that_is_away_is_said_so_and_found_again() {
    let mut stage = Stage::set().await;
    assert_eq!(stage.get(ROW).await.status, 200);
    stage.redis.signal(nix::sys::signal::Signal::SIGSTOP);
    let asked = Instant::now();
    assert_eq!(stage.code(ROW).await, is(503, "redis_unavailable"));
    assert!(asked.elapsed() < Duration::from_secs(5), "{:?}", asked.elapsed());
    stage.redis.signal(nix::sys::signal::Signal::SIGCONT);
    let until = Instant::now() + Duration::from_secs(10);
    while stage.get(ROW).await.status != 200 {
        assert!(Instant::now() < until, "it was not found again");
    }
    stage.redis.kill();
    assert_eq!(stage.code(ROW).await, is(503, "redis_unavailable"));
    assert_eq!(stage.code("/v1/tables/categories?key=cat-001").await, is(503, "redis_unavailable"));
    assert_eq!(stage.get("/healthz").await.status, 200);
}

// ---------------------------------------------------------------------------------------------------- min_lsn

#[tokio::test]
async fn a_position_that_is_applied_is_answered_at_once() {
    let stage = Stage::set().await;
    for min in ["0/1A", "0/1", "0/0", "00000000/0000001a"] {
        assert_eq!(stage.get(&format!("{ROW}?min_lsn={min}&wait=0s")).await.status, 200, "{min}");
    }
    let answer = stage.get(&format!("{NONE}?min_lsn=0/1A")).await;
    assert_eq!(answer.refusal(), is(404, "not_found"));
    assert_eq!(answer.header("prefetchd-lsn"), Some("0/1A"));
}

#[tokio::test]
async fn a_read_waits_for_its_position_and_asks_for_it_meanwhile() {
    let mut stage = Stage::set().await;
    let asked = Instant::now();
    let target = format!("GET {ROW}?min_lsn=0/2B&wait=20s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    let mut stream = stage.connect().await;
    stream.write_all(target.as_bytes()).await.unwrap();
    for _ in 0..3 {
        stage.position_wanted.notified().await;
    }
    assert!(asked.elapsed() > Duration::from_millis(150), "asked more often than every 100 ms");
    // The status knows it a moment before Redis shows it: the read must keep waiting for the checkpoint.
    stage.status(|s| s.applied = Some(end("0/2B")));
    let early = tokio::time::timeout(Duration::from_millis(200), stream.read_u8()).await;
    assert!(early.is_err(), "answered from an older checkpoint");
    let mut newer = checkpoint("0/2B", TableState::Loaded);
    newer.seq = 11;
    stage.checkpoint(&newer).await;
    stage.row("cache:category:cat-001", &[("name", "Drinks")]).await;
    stage.status(|s| s.seq = 11);
    let answer = Answer::read(&mut stream).await;
    assert_eq!((answer.status, answer.header("prefetchd-lsn")), (200, Some("0/2B")));
    assert_eq!(answer.json()["name"], "Drinks");
}

#[tokio::test]
async fn a_position_that_does_not_come_is_lagging_after_the_wait() {
    let stage = Stage::set().await;
    for (wait, least) in [("&wait=300ms", 300), ("", 1000), ("&wait=0s", 0)] {
        let asked = Instant::now();
        assert_eq!(stage.code(&format!("{ROW}?min_lsn=0/1B{wait}")).await, is(504, "lagging"));
        let took = asked.elapsed();
        assert!(took >= Duration::from_millis(least), "{took:?}");
        assert!(took < Duration::from_millis(least + 600), "{took:?}");
    }
    assert_eq!(stage.code("/v1/tables/categories?key=a&min_lsn=0/1B&wait=10ms").await, is(504, "lagging"));
    // What the reader can do, who has no way to Postgres.
    let said = stage.get(&format!("{ROW}?min_lsn=0/1B&wait=0s")).await.body;
    assert!(said.contains("a longer wait (at most 30s)") && said.contains("without min_lsn"), "{said}");
    assert!(!said.contains("Postgres"), "{said}");
}

#[tokio::test]
async fn positions_compare_as_numbers() {
    let mut stage = Stage::set().await;
    stage.checkpoint(&checkpoint("100/0", TableState::Loaded)).await;
    stage.status(|s| s.applied = Some(end("100/0")));
    assert_eq!(stage.get(&format!("{ROW}?min_lsn=FF/0")).await.status, 200);
}

#[tokio::test]
async fn a_position_behind_a_page_header_is_the_page_boundary() {
    let mut stage = Stage::set().await;
    for (boundary, header) in [(SEGMENT, 40), (SEGMENT + 8192, 24)] {
        let lsn = |n: u64| Lsn::new(n).unwrap();
        stage.checkpoint(&checkpoint(&lsn(boundary).to_string(), TableState::Loaded)).await;
        stage.status(|s| s.applied = Some(EndLsn(lsn(boundary))));
        let at = |n| format!("{ROW}?min_lsn={}&wait=0s", lsn(n));
        let answer = stage.get(&at(boundary + header)).await;
        assert_eq!((answer.status, answer.header("prefetchd-lsn")), (200, Some(&*lsn(boundary + header).to_string())));
        assert_eq!(stage.code(&at(boundary + header + 8)).await, is(504, "lagging"));
    }
}

#[tokio::test]
async fn a_position_or_wait_that_is_none_is_400() {
    let stage = Stage::set().await;
    for min in ["", "0", "0/", "/0", "x", "0/123456789", "0x1/0", "-1/1", "+1/1", "0%2F%zz", "1/1/1", "%201/1", "0/G"] {
        assert_eq!(stage.code(&format!("{ROW}?min_lsn={min}")).await, is(400, "bad_request"), "{min}");
    }
    for wait in ["", "1", "-1s", "31s", "1h", "30001ms", "soon"] {
        assert_eq!(stage.code(&format!("{ROW}?min_lsn=0/1&wait={wait}")).await, is(400, "bad_request"), "{wait}");
    }
    assert_eq!(stage.get(&format!("{ROW}?min_lsn=0%2F1&wait=30s")).await.status, 200);
}

// ---------------------------------------------------------------------------------------------------- several rows

#[tokio::test]
async fn several_rows_come_in_one_object_and_a_missing_one_is_null() {
    let mut stage = Stage::set().await;
    stage.row("cache:category:a b", &[("id", "a b"), ("name", "x")]).await;
    let answer = stage.get("/v1/tables/categories?key=cat-001&key=nope&key=a%20b&key=a+b&key=cat-001").await;
    assert_eq!(answer.status, 200);
    assert_eq!(
        answer.body,
        r#"{"rows":{"cat-001":{"id":"cat-001","name":"Beverages","featured":"true"},"nope":null,"a b":{"id":"a b","name":"x"}}}"#
    );
    assert_eq!(answer.header("prefetchd-lsn"), Some("0/1A"));
    assert_eq!(answer.header("age"), Some("0"));
    assert_eq!(answer.header("cache-control"), Some("no-store"));
    assert!(answer.header("server-timing").is_some());
}

#[tokio::test]
async fn composite_keys_of_a_batch_are_written_as_in_redis() {
    let mut stage = Stage::set().await;
    stage.row("cache:item:a%3Ab:1", &[("n", "1")]).await;
    let answer = stage.get("/v1/tables/order%20items?key=a%253Ab:1&key=c%3A2").await;
    assert_eq!(answer.body, r#"{"rows":{"a%3Ab:1":{"n":"1"},"c:2":null}}"#);
}

#[tokio::test]
async fn a_batch_with_a_row_that_may_only_be_late_is_refused() {
    let mut stage = Stage::set().await;
    stage.checkpoint(&checkpoint("0/1A", TableState::Loading)).await;
    assert_eq!(stage.get("/v1/tables/categories?key=cat-001").await.status, 200);
    assert_eq!(stage.code("/v1/tables/categories?key=cat-001&key=nope").await, is(503, "loading"));
    stage.checkpoint(&checkpoint("0/1A", TableState::Incomplete)).await;
    assert_eq!(stage.code("/v1/tables/categories?key=cat-001&key=nope").await, is(503, "incomplete"));
    stage.checkpoint(&checkpoint("0/1A", TableState::Loaded)).await;
    stage.status(|s| s.fresh_as_of = None);
    assert_eq!(stage.code("/v1/tables/categories?key=cat-001&key=nope").await, is(503, "stale"));
}

#[tokio::test]
async fn a_batch_holds_a_hundred_keys() {
    let stage = Stage::set().await;
    let keys = |n: usize| (0..n).map(|i| format!("key=k{i}")).collect::<Vec<_>>().join("&");
    let answer = stage.get(&format!("/v1/tables/categories?{}", keys(100))).await;
    assert_eq!(answer.json()["rows"].as_object().unwrap().len(), 100);
    let answer = stage.get(&format!("/v1/tables/categories?{}", keys(101))).await;
    assert_eq!(answer.refusal(), is(400, "bad_request"));
}

// ---------------------------------------------------------------------------------------------------- operations

#[tokio::test]
async fn health_and_readiness_have_their_codes() {
    let stage = Stage::set().await;
    assert_eq!(stage.get("/healthz").await.status, 200);
    let without_verdict = |answer: &Answer| {
        let mut body = answer.json();
        assert!(body.as_object_mut().unwrap().remove("verdict").is_some(), "{answer:?}");
        (answer.status, body)
    };
    let ready = stage.get("/readyz").await;
    assert_eq!(without_verdict(&ready), (200, serde_json::json!({"ready": true, "reasons": []})));
    stage.status(|s| s.tables[1].state = Some(TableState::Loading));
    let not = stage.get("/readyz").await;
    assert_eq!(
        without_verdict(&not),
        (503, serde_json::json!({"ready": false, "reasons": ["table order items is loading"]}))
    );
    assert_eq!(stage.get("/healthz").await.status, 200);
}

#[tokio::test]
async fn the_metrics_count_reads() {
    let stage = Stage::set().await;
    stage.get(ROW).await;
    stage.get(NONE).await;
    stage.get("/v1/tables/categories?key=cat-001&key=nope").await;
    stage.get("/v1/tables/categories/a/b").await;
    stage.status(|s| s.fresh_as_of = None);
    stage.get(NONE).await;
    let answer = stage.get("/metrics").await;
    assert_eq!(answer.header("content-type"), Some("text/plain; version=0.0.4; charset=utf-8"));
    for line in [
        "prefetchd_reads_total{result=\"hit\",table=\"categories\"} 2",
        "prefetchd_reads_total{result=\"miss\",table=\"categories\"} 2",
        "prefetchd_reads_total{result=\"error\",table=\"categories\"} 1",
        "prefetchd_read_duration_seconds_count 4",
        "prefetchd_state{state=\"streaming\"} 1",
    ] {
        assert!(answer.body.lines().any(|l| l == line), "{line} is not in\n{}", answer.body);
    }
    let status = stage.get("/v1/status").await.json();
    assert_eq!((&status["hits"], &status["misses"]), (&2.into(), &2.into()));
    assert_eq!(status["hit_rate_pct"], 50.0);
    assert_eq!(status["tables"][0]["hits"], 2);
}

#[tokio::test]
async fn the_status_has_every_key_of_the_contract() {
    let stage = Stage::set().await;
    let status = stage.get("/v1/status").await.json();
    for pointer in [
        "/version",
        "/state",
        "/waiting_for",
        "/paused",
        "/uptime_seconds",
        "/source/system_id",
        "/source/timeline",
        "/source/database",
        "/source/slot",
        "/source/publication",
        "/lsn/received",
        "/lsn/applied",
        "/lsn/confirmed",
        "/lsn/server",
        "/lag/bytes",
        "/lag/seconds",
        "/tables/0/name",
        "/tables/0/table",
        "/tables/0/loaded",
        "/tables/0/prefetched",
        "/tables/0/upserts",
        "/tables/0/deletes",
        "/tables/0/truncates",
        "/tables/0/hits",
        "/tables/0/misses",
        "/hits",
        "/misses",
        "/hit_rate_pct",
        "/prefetched",
        "/sync_events_applied",
        "/sync_lag_ms/avg",
        "/sync_lag_ms/p50",
        "/sync_lag_ms/p99",
        "/sync_lag_ms/count",
        "/primary_reads",
        "/dead_letters",
        "/last_load",
        "/last_verify",
    ] {
        assert!(status.pointer(pointer).is_some(), "{pointer} is not in {status}");
    }
    assert_eq!(status["state"], "streaming");
    assert_eq!(status["lsn"]["applied"], "0/1A");
    assert_eq!(status["lsn"]["confirmed"], serde_json::Value::Null);
    assert_eq!(status["lag"], serde_json::json!({"bytes": 0, "seconds": 0.0}));
}

#[tokio::test]
async fn routes_and_methods_that_do_not_exist_are_json_too() {
    let stage = Stage::set().await;
    for target in ["/nope", "/v1", "/v1/tables", "/v1/tables/", "/healthz/", "//", "/v1/status/x"] {
        let (status, code) = stage.code(target).await;
        assert_eq!((status, code.starts_with("unknown_")), (404, true), "{target} {code}");
    }
    for target in ["/healthz", "/v1/status", "/v1/events", ROW, "/"] {
        let answer = stage.request("POST", target).await;
        assert_eq!(answer.refusal(), is(405, "method_not_allowed"), "{target}");
        assert_eq!(answer.header("allow"), Some("GET,HEAD"), "{target}");
    }
    for odd in ["OPTIONS * HTTP/1.1", "CONNECT x:80 HTTP/1.1", "GET x HTTP/1.1", "BREW / HTTP/1.1", "TRACE / HTTP/1.1"]
    {
        let answer = stage.raw(format!("{odd}\r\nHost: localhost\r\nConnection: close\r\n\r\n")).await;
        assert!((400..500).contains(&answer.status), "{odd}: {answer:?}");
    }
}

#[tokio::test]
async fn the_page_lets_a_browser_load_nothing_from_elsewhere() {
    let stage = Stage::set().await;
    let mut targets = vec!["/".to_owned()];
    let mut next = 0;
    while let Some(target) = targets.get(next).cloned() {
        next += 1;
        let answer = stage.get(&target).await;
        let kind = match target.rsplit_once('.') {
            Some((_, "css")) => "text/css; charset=utf-8",
            Some((_, "js")) => "text/javascript; charset=utf-8",
            _ => "text/html; charset=utf-8",
        };
        assert_eq!((answer.status, answer.header("content-type")), (200, Some(kind)), "{target}");
        let policy = answer.header("content-security-policy").unwrap();
        let rules: Vec<&str> = policy.split("; ").collect();
        for rule in [
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'self'",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        ] {
            assert!(rules.contains(&rule), "{target}: {policy}");
        }
        assert_eq!(answer.header("x-content-type-options"), Some("nosniff"));
        assert_eq!(answer.header("referrer-policy"), Some("no-referrer"));
        // No address of another server, except for names of namespaces.
        let text = answer.body.replace("http://www.w3.org/2000/svg", "");
        assert!(!text.contains("http:") && !text.contains("https:") && !text.contains("innerHTML"), "{target}");
        // What it loads: files of its own, and nothing that is not there.
        let own = text.split('"').filter_map(|word| word.strip_prefix("/page/").or_else(|| word.strip_prefix("./")));
        let own: Vec<_> = own.map(|name| format!("/page/{name}")).filter(|name| !targets.contains(name)).collect();
        targets.extend(own);
    }
    assert!(targets.len() > 8, "{targets:?}");
    assert!(!stage.get("/").await.body.contains("demo"), "no part of the demo without a demo");
    for other in ["/page/demo.js", "/page/", "/page/%FF", "/page/page.rs", "/page/..%2Fpage.rs"] {
        assert_eq!(stage.code(other).await, is(404, "unknown_route"), "{other}");
    }
    assert_eq!(stage.request("POST", "/demo/flushall").await.refusal(), is(404, "unknown_route"));

    let without = Stage::set_with(HttpLimits::default(), |context| context.page.is_shown = false).await;
    for target in ["/", "/page/page.css", "/page/page.js"] {
        assert_eq!(without.code(target).await, is(404, "unknown_route"), "{target}");
    }
    assert_eq!(without.get("/v1/status").await.status, 200);
}

/// Actions of the demo are subject to the same conditions as operations.
#[tokio::test]
async fn the_demo_answers_as_administration_does() {
    let (demo, mut asked) = tokio::sync::mpsc::channel::<prefetchd::demo::DemoRequest>(1);
    let stage = Stage::set_with(HttpLimits::default(), |context| context.page.demo = Some(demo)).await;
    tokio::spawn(async move {
        while let Some(asked) = asked.recv().await {
            let _ = asked.answer.send(Ok(serde_json::json!({"did": asked.action, "with": asked.with})));
        }
    });
    let json = "Content-Type: application/json";
    let token = format!("Authorization: Bearer {TOKEN}");
    let ask = async |headers: &[&str], body: &str| {
        let headers: Vec<&str> = headers.iter().copied().chain([&*token]).collect();
        post(stage.address, "/demo/add", &headers, body).await.unwrap()
    };
    let answer = ask(&[json], r#"{"id": "x"}"#).await;
    assert_eq!(answer.json(), serde_json::json!({"did": "add", "with": {"id": "x"}}));
    assert_eq!(ask(&[], "{}").await.refusal(), is(415, "unsupported_media_type"));
    assert_eq!(ask(&[json, "Origin: http://evil.example"], "{}").await.refusal(), is(403, "foreign_origin"));
    assert_eq!(ask(&[json, "Host: evil.example"], "{}").await.refusal(), is(403, "admin_disabled"));
    assert_eq!(ask(&[json], "[]").await.refusal(), is(400, "bad_request"));
    let without = post(stage.address, "/demo/add", &[json], "{}").await.unwrap();
    assert_eq!(without.refusal(), is(401, "unauthorized"));
    assert_eq!(stage.request("GET", "/demo/add").await.refusal(), is(405, "method_not_allowed"));
    assert!(stage.get("/").await.body.contains("/page/demo.js"));
}

#[tokio::test]
async fn head_is_get_without_the_body() {
    let stage = Stage::set().await;
    for target in ["/healthz", "/readyz", "/v1/status", "/metrics", ROW, NONE, "/"] {
        let (get, head) = (stage.get(target).await, stage.request("HEAD", target).await);
        assert_eq!((get.status, ""), (head.status, head.body.as_str()), "{target}");
        assert_eq!(get.header("content-type"), head.header("content-type"), "{target}");
        assert!(head.header("content-length").is_some(), "{target}");
    }
    assert_eq!(stage.request("HEAD", ROW).await.header("prefetchd-lsn"), Some("0/1A"));
}

// ---------------------------------------------------------------------------------------------------- events

/// Reads events until `enough` returns true.
async fn follow(
    stream: &mut TcpStream,
    enough: impl Fn(&[(String, serde_json::Value)]) -> bool,
) -> Vec<(String, serde_json::Value)> {
    let (mut text, mut buffer) = (String::new(), [0; 4096]);
    loop {
        let read = tokio::time::timeout(Duration::from_secs(10), stream.read(&mut buffer)).await.expect("no event");
        let n = read.unwrap();
        assert!(n > 0, "the stream ended: {text}");
        text.push_str(std::str::from_utf8(&buffer[..n]).unwrap());
        let body: String = text.lines().map(|line| format!("{line}\n")).collect();
        let events: Vec<_> = body
            .split("\n\n")
            .filter_map(|event| {
                let name = event.lines().find_map(|l| l.strip_prefix("event: "))?;
                let data = event.lines().find_map(|l| l.strip_prefix("data: "))?;
                Some((name.to_owned(), serde_json::from_str(data).ok()?))
            })
            .collect();
        if enough(&events) {
            return events;
        }
    }
}

fn change(n: u64) -> ChangeEvent {
    ChangeEvent {
        at: SystemTime::UNIX_EPOCH + Duration::from_millis(1_700_000_000_123),
        table: "categories".into(),
        op: Op::Upsert,
        key: format!("cache:category:{n}"),
        lag: Duration::from_micros(1500),
    }
}

async fn listen(stage: &Stage) -> TcpStream {
    let mut stream = stage.connect().await;
    stream.write_all(b"GET /v1/events HTTP/1.1\r\nHost: localhost\r\n\r\n").await.unwrap();
    stream
}

#[tokio::test]
async fn the_event_stream_tells_status_and_changes() {
    let stage = Stage::set().await;
    let mut stream = listen(&stage).await;
    let first = follow(&mut stream, |e| e.len() > 1).await;
    assert_eq!(first[0].0, "history");
    assert_eq!((first[1].0.as_str(), &first[1].1["state"]), ("status", &"streaming".into()));
    stage.events.send(change(7)).unwrap();
    let events = follow(&mut stream, |e| e.iter().any(|(name, _)| name == "status")).await;
    assert_eq!(events[0].0, "change");
    assert_eq!(
        events[0].1,
        serde_json::json!({"time": "2023-11-14T22:13:20.123Z", "table": "categories", "op": "upsert",
                           "key": "cache:category:7", "lag_ms": 1.5})
    );
}

#[tokio::test]
async fn a_flood_of_changes_is_thinned_and_counted() {
    let stage = Stage::set().await;
    let mut stream = listen(&stage).await;
    follow(&mut stream, |e| e.len() > 1).await;
    for n in 0..500 {
        stage.events.send(change(n)).unwrap();
        if n % 20 == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
    let events = follow(&mut stream, |e| e.iter().any(|(name, _)| name == "more")).await;
    let shown = events.iter().filter(|(name, _)| name == "change").count() as u64;
    let more = events.iter().find(|(name, _)| name == "more").unwrap().1["more"].as_u64().unwrap();
    assert!(shown <= 100, "{shown}");
    assert_eq!(shown + more, 500);
}

#[tokio::test]
async fn event_streams_are_bounded() {
    let stage = Stage::set_within(HttpLimits { streams: 1, ..HttpLimits::default() }).await;
    let mut first = listen(&stage).await;
    follow(&mut first, |e| !e.is_empty()).await;
    assert_eq!(stage.code("/v1/events").await, is(503, "too_many_streams"));
    drop(first);
    let until = Instant::now() + Duration::from_secs(5);
    loop {
        let mut again = listen(&stage).await;
        let mut head = [0; 12];
        again.read_exact(&mut head).await.unwrap();
        if &head == b"HTTP/1.1 200" {
            break;
        }
        assert!(Instant::now() < until, "the place was not given back");
    }
}

// ---------------------------------------------------------------------------------------------------- strangers

#[tokio::test]
async fn what_is_no_http_is_400() {
    let stage = Stage::set().await;
    for request in [
        &b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 garbage\r\n\r\n"[..],
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
        b"GET / HTTP/1.1\r\nContent-Length: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"GET /a b HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nX: \x00\r\n\r\n",
    ] {
        let answer = stage.raw(request).await;
        assert_eq!(answer.status, 400, "{}: {answer:?}", request.escape_ascii());
    }
    assert_eq!(stage.get(ROW).await.status, 200);
}

/// A page of rebound.example, whose name was made to resolve to 127.0.0.1, sends a request to its own origin.
#[tokio::test]
async fn a_page_under_another_name_reads_nothing_on_loopback() {
    let stage = Stage::set().await;
    let host = async |stage: &Stage, target: &str, host: &str| {
        stage.raw(format!("GET {target} HTTP/1.1\r\n{host}Connection: close\r\n\r\n")).await
    };
    let batch = "/v1/tables/categories?key=cat-001";
    for target in [ROW, NONE, batch, "/v1/status", "/v1/events", "/openapi.json", "/", "/page/page.js"] {
        let foreign = host(&stage, target, "Host: rebound.example:8787\r\n").await;
        assert_eq!(foreign.refusal(), is(421, "foreign_host"), "{target}");
    }
    let foreign =
        stage.raw(format!("GET http://rebound.example{ROW} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"));
    assert_eq!(foreign.await.refusal(), is(421, "foreign_host"));
    for own in ["localhost", "LOCALHOST:1", "127.0.0.1:8787", "127.9.9.9", "[::1]:8787"] {
        assert_eq!(host(&stage, ROW, &format!("Host: {own}\r\n")).await.status, 200, "{own}");
    }
    // Monitoring may use any name, because these contain no rows.
    for target in ["/healthz", "/readyz", "/metrics"] {
        assert_eq!(host(&stage, target, "Host: cache.internal\r\n").await.status, 200, "{target}");
    }
    for hosts in ["", "Host: localhost\r\nHost: rebound.example\r\n", "Host: localhost\r\nHost: localhost\r\n"] {
        for target in [ROW, "/healthz"] {
            assert_eq!(host(&stage, target, hosts).await.refusal(), is(400, "bad_request"), "{target} {hosts}");
        }
    }
    assert_eq!(stage.raw(format!("GET {ROW} HTTP/1.0\r\n\r\n")).await.status, 200);

    let listed = ["cache.internal".to_owned()];
    let names = Names::new(Ipv4Addr::LOCALHOST.into(), &listed);
    let stage = Stage::set_with(HttpLimits::default(), |context| context.names = names).await;
    assert_eq!(host(&stage, ROW, "Host: Cache.Internal:80\r\n").await.status, 200);
    assert_eq!(host(&stage, ROW, "Host: rebound.example\r\n").await.status, 421);
    let names = Names::new(Ipv4Addr::UNSPECIFIED.into(), &[]);
    let stage = Stage::set_with(HttpLimits::default(), |context| context.names = names).await;
    assert_eq!(host(&stage, ROW, "Host: any.example\r\n").await.status, 200);
}

#[tokio::test]
async fn a_head_that_is_too_large_is_refused() {
    let stage = Stage::set().await;
    let long = "x".repeat(100 << 10);
    let answer = stage.raw(format!("GET / HTTP/1.1\r\nX: {long}\r\n\r\n")).await;
    assert_eq!(answer.status, 431);
    let answer = stage.raw(format!("GET /{long} HTTP/1.1\r\n\r\n")).await;
    assert!([414, 431].contains(&answer.status), "{answer:?}");
    let many: String = (0..100).map(|i| format!("X{i}: 1\r\n")).collect();
    assert_eq!(stage.raw(format!("GET / HTTP/1.1\r\n{many}\r\n")).await.status, 431);
}

#[tokio::test]
async fn a_large_body_is_refused_unread() {
    let stage = Stage::set().await;
    for method in ["GET", "POST"] {
        let answer =
            stage.raw(format!("{method} /healthz HTTP/1.1\r\nHost: localhost\r\nContent-Length: 65537\r\n\r\n")).await;
        assert_eq!(answer.refusal(), is(413, "body_too_large"));
        assert_eq!(answer.header("connection"), Some("close"));
    }
    let small = "GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 3\r\n\r\nabc";
    assert_eq!(stage.raw(small).await.status, 200);
    // A chunked body has no length. It is not read, and its connection is closed after the response.
    let mut stream = stage.connect().await;
    stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n").await.unwrap();
    assert_eq!(Answer::read(&mut stream).await.status, 200);
}

#[tokio::test]
async fn slow_heads_and_idle_connections_are_dropped() {
    let stage =
        Stage::set_within(HttpLimits { head_timeout: Duration::from_millis(300), ..HttpLimits::default() }).await;
    let mut slow = stage.connect().await;
    let mut idle = stage.connect().await;
    idle.write_all(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n").await.unwrap();
    let mut silent = stage.connect().await;
    slow.write_all(b"GET / HTTP/1.1\r\nX-Slow: ").await.unwrap();
    let began = Instant::now();
    let mut dripped = 0;
    // Sending one byte at a time must not extend the time limit.
    while slow.write_all(b"x").await.is_ok() && began.elapsed() < Duration::from_secs(5) {
        dripped += 1;
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(began.elapsed() < Duration::from_secs(3), "{dripped} bytes");
    assert_eq!(Answer::read(&mut idle).await.status, 200);
    let mut rest = Vec::new();
    tokio::time::timeout(Duration::from_secs(3), silent.read_to_end(&mut rest)).await.expect("kept").unwrap();
    assert!(began.elapsed() < Duration::from_secs(3));
}

/// Many requests whose last byte never arrives.
#[tokio::test]
async fn half_sent_requests_silence_nobody() {
    let stage = Stage::set_within(HttpLimits { connections: 20, ..HttpLimits::default() }).await;
    let mut half = Vec::new();
    for _ in 0..60 {
        let mut stream = stage.connect().await;
        stream.write_all(b"GET / HTTP/1.1\r\nX-Half: ").await.unwrap();
        half.push(stream);
    }
    for target in ["/healthz", "/metrics", ROW] {
        let asked = tokio::time::timeout(Duration::from_secs(10), stage.get(target)).await;
        assert_eq!(asked.expect("no answer").status, 200, "{target}");
    }
    // The oldest were closed to make space; the latest are open.
    let mut rest = [0; 1];
    let closed = tokio::time::timeout(Duration::from_secs(10), half[0].read(&mut rest)).await.expect("it is kept");
    assert!(matches!(closed, Ok(0) | Err(_)), "{closed:?}");
    let kept = tokio::time::timeout(Duration::from_millis(200), half[59].read(&mut rest)).await;
    assert!(kept.is_err(), "{kept:?}");
}

#[tokio::test]
async fn a_connection_with_something_in_hand_makes_no_room() {
    let stage = Stage::set_within(HttpLimits { connections: 2, ..HttpLimits::default() }).await;
    let mut events = listen(&stage).await;
    follow(&mut events, |e| !e.is_empty()).await;
    let mut waits = stage.connect().await;
    let wait = format!("GET {ROW}?min_lsn=F/0&wait=3s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    waits.write_all(wait.as_bytes()).await.unwrap();
    stage.position_wanted.notified().await;
    // There is no space, and no connection is idle.
    let mut third = stage.connect().await;
    assert!(matches!(third.read(&mut [0]).await, Ok(0) | Err(_)));
    assert_eq!(Answer::read(&mut waits).await.refusal(), is(504, "lagging"));
    assert_eq!(stage.get("/healthz").await.status, 200);
    follow(&mut events, |e| e.len() > 1).await;
}

/// Starts so many reads, each on a connection of its own, that wait for a position which is never reached. Returns
/// their responses as they arrive.
async fn waiting_reads(stage: &Stage, number: usize) -> UnboundedReceiver<Answer> {
    let (answered, answers) = unbounded_channel();
    for _ in 0..number {
        let (mut stream, answered) = (stage.connect().await, answered.clone());
        tokio::spawn(async move {
            let wait =
                format!("GET {ROW}?min_lsn=F/0&wait=30s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
            stream.write_all(wait.as_bytes()).await.unwrap();
            let _ = answered.send(Answer::read(&mut stream).await);
        });
    }
    answers
}

#[tokio::test]
async fn health_and_metrics_are_answered_however_much_is_in_hand() {
    let stage = Stage::set_within(HttpLimits { requests: 2, ..HttpLimits::default() }).await;
    let mut answers = waiting_reads(&stage, 3).await;
    // Two wait for what never comes, and one finds no space.
    assert_eq!(answers.recv().await.unwrap().refusal(), is(503, "overloaded"));
    assert_eq!(stage.code(ROW).await, is(503, "overloaded"));
    for target in ["/healthz", "/readyz", "/metrics"] {
        assert_eq!(stage.get(target).await.status, 200, "{target}");
    }
}

#[tokio::test]
async fn reads_that_wait_for_a_position_keep_nobody_from_reading() {
    let stage = Stage::set_within(HttpLimits { requests: 4, waiting: 2, ..HttpLimits::default() }).await;
    let mut answers = waiting_reads(&stage, 5).await;
    for _ in 0..3 {
        assert_eq!(answers.recv().await.unwrap().refusal(), is(503, "overloaded"));
    }
    assert_eq!(stage.get(ROW).await.status, 200);
}

#[tokio::test]
async fn a_body_that_never_ends_is_not_waited_for() {
    let limits = HttpLimits { body_timeout: Duration::from_millis(300), ..HttpLimits::default() };
    let stage = Stage::set_within(limits).await;
    for body in ["Content-Length: 100\r\n\r\n{", "Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n"] {
        let head = "POST /v1/admin/pause HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n";
        let mut stream = stage.connect().await;
        stream.write_all(format!("{head}Authorization: Bearer {TOKEN}\r\n{body}").as_bytes()).await.unwrap();
        let answer = tokio::time::timeout(Duration::from_secs(20), Answer::read(&mut stream)).await.expect("no answer");
        assert_eq!(answer.refusal(), is(408, "request_timeout"));
        assert_eq!(answer.header("connection"), Some("close"));
    }
}

#[tokio::test]
async fn a_key_named_a_hundred_times_is_read_once() {
    let mut stage = Stage::set().await;
    stage.row("cache:category:large", &[("v", &"x".repeat(1 << 20))]).await;
    let keys = ["key=large"; 100].join("&");
    let commands = async |stage: &mut Stage| {
        let info: String = redis::cmd("INFO").arg("commandstats").query_async(&mut stage.connection).await.unwrap();
        let calls = info.lines().find_map(|line| line.strip_prefix("cmdstat_hgetall:calls=")).map(str::to_owned);
        calls.map_or(0, |calls| calls.split(',').next().unwrap().parse::<u64>().unwrap())
    };
    let before = commands(&mut stage).await;
    let answer = stage.get(&format!("/v1/tables/categories?{keys}")).await;
    assert_eq!((answer.status, answer.body.len()), (200, r#"{"rows":{"large":{"v":""}}}"#.len() + (1 << 20)));
    assert_eq!(commands(&mut stage).await - before, 1);
}

/// Batches of large rows, as many as a client cares to request: they wait for each other, and readers of one row wait
/// for none.
#[tokio::test(flavor = "multi_thread")]
async fn batches_of_large_rows_starve_nobody() {
    let mut stage = Stage::set().await;
    let value = "x".repeat(1 << 20);
    for n in 0..10 {
        stage.row(format!("cache:category:large-{n}"), &[("v", &value)]).await;
    }
    let keys: Vec<String> = (0..10).map(|n| format!("key=large-{n}")).collect();
    let head = format!("GET /v1/tables/categories?{} HTTP/1.1\r\nHost: localhost\r\n", keys.join("&"));
    let address = stage.address();
    let ask = |head: String| async move {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(format!("{head}Connection: close\r\n\r\n").as_bytes()).await.unwrap();
        let mut buffer = vec![0; 1 << 20];
        let mut status = String::new();
        loop {
            match stream.read(&mut buffer).await.unwrap_or(0) {
                0 => return status,
                n if status.is_empty() => status = String::from_utf8_lossy(&buffer[9..n.min(12)]).into_owned(),
                _ => {}
            }
        }
    };
    let batches: Vec<_> = (0..16).map(|_| tokio::spawn(ask(head.clone()))).collect();
    let mut single = 0;
    while !batches.iter().all(JoinHandle::is_finished) {
        assert_eq!(stage.get(ROW).await.status, 200, "after {single}");
        single += 1;
    }
    assert!(single > 0);
    for batch in batches {
        let status = batch.await.unwrap();
        assert!(["200", "503"].contains(&status.as_str()), "{status}");
    }
    assert_eq!(ask(head).await, "200");
}

/// A batch is held in memory, so its size is limited, whatever the size of the rows.
#[tokio::test]
async fn a_batch_that_is_too_large_is_refused_and_costs_others_nothing() {
    let mut stage = Stage::set().await;
    let value = "x".repeat(2 << 20);
    for n in 0..20 {
        stage.row(format!("cache:category:large-{n}"), &[("v", &value)]).await;
    }
    let batch = |rows: u32| {
        let keys: Vec<String> = (0..rows).map(|n| format!("key=large-{n}")).collect();
        format!("/v1/tables/categories?{}", keys.join("&"))
    };
    for _ in 0..2 {
        assert_eq!(stage.code(&batch(20)).await, is(400, "too_large"));
        assert_eq!(stage.get(&batch(5)).await.status, 200);
    }
    // A client that disconnects during a read does not affect the next one.
    for _ in 0..2 {
        let mut leaves = stage.connect().await;
        leaves.write_all(format!("GET {} HTTP/1.1\r\nHost: localhost\r\n\r\n", batch(15)).as_bytes()).await.unwrap();
        tokio::time::sleep(Duration::from_millis(20)).await;
        drop(leaves);
        assert_eq!(stage.get(&batch(15)).await.status, 200);
    }
    assert_eq!(stage.get(ROW).await.status, 200);
}

#[tokio::test]
async fn answers_that_nobody_takes_are_few_and_end() {
    let limits = HttpLimits { answer_bytes: 40 << 20, write_timeout: Duration::from_secs(15), ..HttpLimits::default() };
    let mut stage = Stage::set_within(limits).await;
    stage.row("cache:category:large", &[("v", &"x".repeat(16 << 20))]).await;
    let request = "GET /v1/tables/categories/large HTTP/1.1\r\nHost: localhost\r\n\r\n";
    let mut deaf = Vec::new();
    // One that uses more than a quarter of the space leaves the rest to others.
    for _ in 0..4 {
        let mut stream = stage.connect().await;
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut head = [0; 12];
        stream.read_exact(&mut head).await.unwrap();
        assert_eq!(&head, b"HTTP/1.1 200");
        deaf.push(stream);
    }
    assert_eq!(stage.code("/v1/tables/categories/large").await, is(503, "overloaded"));
    assert_eq!(stage.get(ROW).await.status, 200, "a small one needs no place");
    let large = async || stage.get("/v1/tables/categories/large").await.status;
    eventually("the others are cut off", large, |status| *status == 200).await;
}

/// A client that reads a little from time to time counts as not reading.
#[tokio::test]
async fn a_peer_that_takes_its_answer_in_drops_is_cut_off() {
    let mut stage =
        Stage::set_within(HttpLimits { write_timeout: Duration::from_secs(6), ..HttpLimits::default() }).await;
    stage.row("cache:category:large", &[("v", &"x".repeat(48 << 20))]).await;
    // A small window, with pauses short enough that the daemon can write again in time: the kernel reports space only
    // once a third of its buffer is free.
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(64 << 10).unwrap();
    let mut slow = socket.connect(stage.address).await.unwrap();
    slow.write_all(b"GET /v1/tables/categories/large HTTP/1.1\r\nHost: localhost\r\n\r\n").await.unwrap();
    let (began, mut drop, mut taken) = (Instant::now(), vec![0; 64 << 10], 0);
    while began.elapsed() < Duration::from_secs(20) {
        taken += slow.read(&mut drop).await.unwrap_or(0);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let mut rest = Vec::new();
    let _ = tokio::time::timeout(Duration::from_secs(30), slow.read_to_end(&mut rest)).await.expect("it is kept");
    assert!(taken + rest.len() < 48 << 20, "it was written to the end");
}

#[tokio::test]
async fn a_peer_that_takes_nothing_is_cut_off() {
    let limits = HttpLimits { write_timeout: Duration::from_millis(300), connections: 1, ..HttpLimits::default() };
    let mut stage = Stage::set_within(limits).await;
    let value = "x".repeat(16 << 20);
    stage.row("cache:category:large", &[("v", &value)]).await;
    let mut deaf = stage.connect().await;
    deaf.write_all(b"GET /v1/tables/categories/large HTTP/1.1\r\nHost: localhost\r\n\r\n").await.unwrap();
    // The only slot is free again once that client has been disconnected.
    assert_eq!(stage.get("/healthz").await.status, 200);
    drop(deaf);
}

#[tokio::test]
async fn requests_of_one_connection_follow_each_other() {
    let stage = Stage::set().await;
    let request = format!("GET {ROW} HTTP/1.1\r\nHost: localhost\r\n\r\n");
    let last = "GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
    let answer = stage.raw(format!("{request}{request}{last}")).await;
    assert_eq!(answer.body.matches("HTTP/1.1 200 OK").count(), 2, "{answer:?}");
}

// ---------------------------------------------------------------------------------------------------- the stop

#[tokio::test]
async fn the_stop_lets_requests_finish_and_ends_streams() {
    let mut stage = Stage::set().await;
    let mut idle = stage.connect().await;
    idle.write_all(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n").await.unwrap();
    let mut events = listen(&stage).await;
    follow(&mut events, |e| !e.is_empty()).await;
    let wait = |min: &str| format!("GET {ROW}?min_lsn={min}&wait=30s HTTP/1.1\r\nHost: localhost\r\n\r\n");
    let (mut soon, mut never) = (stage.connect().await, stage.connect().await);
    soon.write_all(wait("0/2B").as_bytes()).await.unwrap();
    never.write_all(wait("F/0").as_bytes()).await.unwrap();
    stage.position_wanted.notified().await;
    tokio::time::sleep(Duration::from_millis(100)).await;

    let stopped = Instant::now();
    stage.stop.cancel();
    stage.checkpoint(&checkpoint("0/2B", TableState::Loaded)).await;
    stage.status(|s| s.applied = Some(end("0/2B")));
    assert_eq!(Answer::read(&mut soon).await.status, 200);
    assert_eq!(Answer::read(&mut never).await.refusal(), is(503, "stopping"));
    assert_eq!(Answer::read(&mut idle).await.status, 200);
    let mut rest = Vec::new();
    events.read_to_end(&mut rest).await.unwrap();
    assert!(rest.ends_with(b"0\r\n\r\n"), "the event stream was torn: {}", rest.escape_ascii());
    stage.server.await.unwrap();
    assert!(stopped.elapsed() < Duration::from_millis(2500), "{:?}", stopped.elapsed());
    assert!(TcpStream::connect(stage.address).await.is_err(), "still listening");
}

#[tokio::test]
async fn the_stop_does_not_wait_for_half_a_request() {
    let stage = Stage::set().await;
    let mut half = stage.connect().await;
    half.write_all(b"GET / HTTP/1.1\r\nX-Half: ").await.unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    let stopped = Instant::now();
    stage.stop.cancel();
    stage.server.await.unwrap();
    assert!(stopped.elapsed() < Duration::from_secs(3), "{:?}", stopped.elapsed());
}
