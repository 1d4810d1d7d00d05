//! Tables whose rows show whether they are complete and how new they are, sessions that write to them, and a comparison
//! of every row with its hash.
//!
//! Each writer owns a class of IDs: only it inserts, deletes and renames rows of that class. The versions of a key come
//! from a sequence while the row is locked, so they rise in commit order.

use super::consumer::Consumer;
use super::{Cluster, Daemon, Postgres, Redis, Settings};
use futures_util::TryStreamExt;
use prefetchd::lanes::Lane;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use redis::aio::MultiplexedConnection;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::task::JoinHandle;
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, NoTls, SimpleQueryMessage};

pub const WRITERS: u64 = 8;
/// How many rows `lefts` has, and `rights` as well. One of each is changed in the same transaction.
pub const PAIRS: u64 = 64;
/// Half of all changes and reads concern IDs below this one.
const HOT: u64 = 1_000;
/// What is appended to a row before its checksum is calculated.
pub const SALT: [u8; 4] = *b"salt";
const TABLES: [(&str, &str); 3] = [("items", "t:item:"), ("lefts", "t:left:"), ("rights", "t:right:")];
/// Their rows are inserted, changed and deleted by the dozen, and truncated. On a cluster, all of `crowd` lie in one hash
/// slot.
pub const BINS: [(&str, &str); 2] = [("bins", "t:bin:"), ("crowd", "t:crowd:{crowd}:")];
/// What the keys of sorted sets of items by `flag` begin with. The score is the version.
pub const LISTS: &str = "t:items-by-flag:";
/// What the keys of sets of items by `note` begin with.
pub const NOTES: &str = "t:items-by-note:";
/// The change stream.
pub const STREAM: &str = "changes";
/// The greatest ID in each of them.
pub const BIN_IDS: u64 = 300;
const SCHEMA: &str = r"
SET client_min_messages = warning;
CREATE SEQUENCE versions;
CREATE TABLE items (id bigint PRIMARY KEY, version bigint, flag boolean, note text, body text, large text, sum text);
ALTER TABLE items ALTER large SET STORAGE EXTERNAL;
CREATE TABLE lefts (id bigint PRIMARY KEY, version bigint, body text, sum text);
CREATE TABLE rights (LIKE lefts INCLUDING ALL);
CREATE FUNCTION checksum(VARIADIC parts text[]) RETURNS text LANGUAGE sql IMMUTABLE AS
    $$ SELECT 'md5' || md5(md5(array_to_string(parts, '|', '')) || 'salt') $$;
CREATE FUNCTION item() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.version := nextval('versions');
    NEW.sum := checksum(NEW.id::text, NEW.version::text, NEW.flag::text, NEW.note, NEW.body, NEW.large);
    RETURN NEW;
END $$;
CREATE TRIGGER item BEFORE INSERT OR UPDATE ON items FOR EACH ROW EXECUTE FUNCTION item();
CREATE FUNCTION half() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.version := coalesce(OLD.version, 0) + 1;
    NEW.sum := checksum(NEW.id::text, NEW.version::text, NEW.body);
    RETURN NEW;
END $$;
CREATE TRIGGER half BEFORE INSERT OR UPDATE ON lefts FOR EACH ROW EXECUTE FUNCTION half();
CREATE TRIGGER half BEFORE INSERT OR UPDATE ON rights FOR EACH ROW EXECUTE FUNCTION half();
GRANT SELECT ON items, lefts, rights TO prefetchd;
ALTER PUBLICATION prefetchd ADD TABLE items, lefts, rights;
";
const BINS_SCHEMA: &str = r"
CREATE TABLE bins (LIKE items INCLUDING ALL);
CREATE TABLE crowd (LIKE items INCLUDING ALL);
CREATE TRIGGER item BEFORE INSERT OR UPDATE ON bins FOR EACH ROW EXECUTE FUNCTION item();
CREATE TRIGGER item BEFORE INSERT OR UPDATE ON crowd FOR EACH ROW EXECUTE FUNCTION item();
GRANT SELECT ON bins, crowd TO prefetchd;
ALTER PUBLICATION prefetchd ADD TABLE bins, crowd;
";

/// Printed, so that a failed run can be repeated.
pub fn seed() -> u64 {
    let seed = std::env::var("PREFETCHD_TEST_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or_else(rand::random);
    println!("PREFETCHD_TEST_SEED={seed}");
    seed
}

/// A connection that waits for a slow or frozen Redis.
pub async fn patient(url: &str) -> redis::RedisResult<MultiplexedConnection> {
    let config = redis::AsyncConnectionConfig::new().set_response_timeout(None).set_connection_timeout(None);
    redis::Client::open(url)?.get_multiplexed_async_connection_with_config(&config).await
}

/// The tables of one test, with `rows` items.
#[derive(Debug, Clone, Copy)]
pub struct Traffic {
    pub rows: u64,
}

impl Traffic {
    pub async fn create(postgres: &Postgres, rows: u64) -> Self {
        postgres.execute(SCHEMA).await;
        let fill = format!(
            "INSERT INTO items (id, flag, note, body, large)
             SELECT i, i % 2 = 0, CASE WHEN i % 3 = 0 THEN 'note ' || i END, md5(i::text),
                    CASE WHEN i % 50 = 0 THEN repeat(md5(i::text), 80) END FROM generate_series(1, {rows}) i;
             INSERT INTO lefts (id, body) SELECT i, md5(i::text) FROM generate_series(1, {PAIRS}) i;
             INSERT INTO rights (id, body) SELECT i, md5(i::text) FROM generate_series(1, {PAIRS}) i;
             ANALYZE items; ANALYZE lefts; ANALYZE rights;"
        );
        postgres.execute(&fill).await;
        Self { rows }
    }

    /// The same with [`BINS`].
    pub async fn create_with_bins(postgres: &Postgres, rows: u64) -> Self {
        let traffic = Self::create(postgres, rows).await;
        postgres.execute(BINS_SCHEMA).await;
        traffic
    }

    pub fn settings(postgres: &Postgres, redis: &Redis) -> Settings {
        Settings::new(postgres, redis).tables(&TABLES.map(table).join("\n"))
    }

    /// With [`LISTS`] and [`STREAM`].
    pub fn settings_with_lists(postgres: &Postgres, redis: &Redis) -> Settings {
        with_lists(Settings::new(postgres, redis), &[])
    }

    /// With [`BINS`], [`LISTS`] and [`STREAM`].
    pub fn settings_on_cluster(postgres: &Postgres, cluster: &Cluster) -> Settings {
        with_lists(Settings::on_cluster(postgres, cluster), &BINS)
    }

    pub fn item_key(id: u64) -> String {
        format!("t:item:{id}")
    }

    pub fn pair_keys(id: u64) -> [String; 2] {
        [format!("t:left:{id}"), format!("t:right:{id}")]
    }

    /// Whether the row exists from the beginning, and is never deleted or renamed.
    pub fn stays(self, id: u64) -> bool {
        (1..=self.rows).contains(&id) && !(id / WRITERS).is_multiple_of(4)
    }

    /// Any ID that exists, existed, or may exist later.
    pub fn any(self, rng: &mut StdRng) -> u64 {
        let hot = rng.random_bool(0.5);
        rng.random_range(1..=if hot { HOT.min(self.rows) } else { self.rows + self.rows / 4 })
    }

    /// An ID of this writer's class whose row is inserted and deleted.
    fn of(self, writer: u64, rng: &mut StdRng) -> u64 {
        let any = self.any(rng);
        any / (4 * WRITERS) * (4 * WRITERS) + writer
    }

    /// Starts eight sessions that write until they are stopped, resting after each transaction.
    pub fn write(self, postgres: &Postgres, seed: u64, rest: Duration) -> Writers {
        self.start(postgres, seed, rest, Mix::Everything)
    }

    /// The same, but no row gets another key. On a cluster, such a row may have to be read again, and its table to be loaded if
    /// the daemon ends before.
    pub fn write_in_place(self, postgres: &Postgres, seed: u64, rest: Duration) -> Writers {
        self.start(postgres, seed, rest, Mix::InPlace)
    }

    /// Starts a session that writes to [`BINS`].
    pub fn write_bins(self, postgres: &Postgres, seed: u64, rest: Duration) -> Writers {
        self.start_some(1, postgres, seed ^ WRITERS, rest, Mix::Bins)
    }

    /// Starts eight sessions that make only small changes to single rows, without resting.
    pub fn touch(self, postgres: &Postgres, seed: u64) -> Writers {
        self.start(postgres, seed, Duration::ZERO, Mix::Touches)
    }

    /// Starts eight sessions that keep deleting and inserting the same few rows, without resting.
    pub fn churn(self, postgres: &Postgres, seed: u64) -> Writers {
        self.start(postgres, seed, Duration::ZERO, Mix::Churn)
    }

    fn start(self, postgres: &Postgres, seed: u64, rest: Duration, mix: Mix) -> Writers {
        self.start_some(WRITERS, postgres, seed, rest, mix)
    }

    fn start_some(self, sessions: u64, postgres: &Postgres, seed: u64, rest: Duration, mix: Mix) -> Writers {
        let (stop, changes) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let writer = |writer| {
            let (url, stop, changes) = (postgres.url("postgres"), Arc::clone(&stop), Arc::clone(&changes));
            let rng = StdRng::seed_from_u64(seed ^ (writer + 1));
            tokio::spawn(Writer { traffic: self, writer, mix, url, rng, rest, stop, changes }.run())
        };
        let tasks = (0..sessions).map(writer).collect();
        Writers { tasks, stop, changes }
    }

    /// Every hash equals its row, every row has its hash, and every TTL is in (0, ttl]. Nothing may be writing.
    pub async fn assert_equal(self, postgres: &Postgres, redis: &Redis, ttl: Duration) {
        let wrong = wrong(postgres, &TABLES, &[redis.url()], |_| 0, ttl).await.unwrap();
        let some = wrong.iter().take(20).cloned().collect::<Vec<_>>().join("\n");
        assert!(wrong.is_empty(), "{} keys are wrong:\n{some}", wrong.len());
    }

    /// The lists are those that the rows in Postgres give, and the consumer was told of the last change of each row. Nothing
    /// may be writing.
    pub async fn assert_listed_and_told(self, postgres: &Postgres, redis: &Redis, consumer: &mut Consumer) {
        for flag in ["true", "false"] {
            let sql = format!(
                "SELECT coalesce(string_agg(id || ' ' || version, ' ' ORDER BY version), '') FROM items WHERE flag = {flag}"
            );
            let members: Vec<String> =
                redis.command(&["ZRANGE", &format!("{LISTS}{flag}"), "0", "-1", "WITHSCORES"]).await;
            assert_eq!(members.join(" "), postgres.value(&sql).await.unwrap(), "the list of {flag}");
        }
        let sql = "SELECT count(*) FROM items WHERE coalesce(note, '') = ''";
        let without: u64 = redis.command(&["SCARD", NOTES]).await;
        assert_eq!(without.to_string(), postgres.value(sql).await.unwrap(), "those without a note");

        consumer.follow(&redis.url(), STREAM).await;
        self.assert_told(postgres, consumer).await;
    }

    /// The consumer was told of the last change of each row. Nothing may be writing.
    async fn assert_told(self, postgres: &Postgres, consumer: &Consumer) {
        for (table, literal) in TABLES {
            let rows = postgres.client().await.simple_query(&format!("SELECT id, xmin FROM {table}")).await.unwrap();
            let row = |message: &SimpleQueryMessage| match message {
                SimpleQueryMessage::Row(row) => Some((row.get(0)?.to_owned(), row.get(1)?.to_owned())),
                _ => None,
            };
            let rows: HashMap<String, String> = rows.iter().filter_map(row).collect();
            assert!(consumer.loaded.contains_key(table), "{table}");
            for (key, entry) in consumer.last.get(table).into_iter().flatten() {
                let xid = rows.get(key.strip_prefix(literal).unwrap());
                let told = (entry["op"] == "upsert").then_some(&entry["xid"]);
                assert_eq!(told, xid, "{entry:?}: the last change of {key} was not announced");
            }
        }
    }

    /// Whoever reads all of the change stream of a cluster is told of the last change of each row. Nothing may be writing.
    pub async fn assert_told_on(self, postgres: &Postgres, cluster: &Cluster) {
        let mut consumer = Consumer::of_large_rows();
        consumer.follow(&cluster.server_of(STREAM).await.url(), STREAM).await;
        self.assert_told(postgres, &consumer).await;
    }

    /// Returns the lists that differ on a cluster from what the rows in Postgres give; `None` if a node does not answer as
    /// it should.
    pub async fn wrong_lists_on(self, postgres: &Postgres, cluster: &Cluster) -> Option<Vec<String>> {
        let sql = format!(
            "WITH lists(list, member) AS (
                 SELECT '{LISTS}' || CASE WHEN flag THEN 'true' WHEN NOT flag THEN 'false' ELSE '' END, id || ' ' || version
                   FROM items
                  UNION ALL SELECT '{NOTES}' || coalesce(note, ''), id::text FROM items)
             SELECT json_object_agg(list, members) FROM
                    (SELECT list, json_agg(member ORDER BY member COLLATE \"C\") AS members FROM lists GROUP BY list) l"
        );
        let given: BTreeMap<String, Vec<String>> = serde_json::from_str(&postgres.value(&sql).await?).unwrap();
        let mut found: BTreeMap<String, Vec<String>> = BTreeMap::new();
        let owners = cluster.owners().await?;
        for index in masters_of(&owners) {
            let mut connection = patient(&cluster.node(index).url()).await.ok()?;
            for (prefix, ask) in [(LISTS, &["ZRANGE", "0", "-1", "WITHSCORES"][..]), (NOTES, &["SMEMBERS"])] {
                let keys: Vec<String> =
                    redis::cmd("KEYS").arg(format!("{prefix}*")).query_async(&mut connection).await.ok()?;
                for key in
                    keys.into_iter().filter(|key| owners[usize::from(Lane::of(key.as_bytes()).number())] == index)
                {
                    let mut command = redis::cmd(ask[0]);
                    command.arg(&key).arg(&ask[1..]);
                    let words: Vec<String> = command.query_async(&mut connection).await.ok()?;
                    let mut members: Vec<String> =
                        words.chunks(ask.len().min(2)).map(|words| words.join(" ")).collect();
                    members.sort_unstable();
                    found.insert(key, members);
                }
            }
        }
        let keys: HashSet<&String> = given.keys().chain(found.keys()).collect();
        let differ = keys.into_iter().filter(|key| given.get(*key) != found.get(*key));
        let some = |lists: &BTreeMap<String, Vec<String>>, key: &String, others: &BTreeMap<String, Vec<String>>| {
            let none = Vec::new();
            let others = others.get(key).unwrap_or(&none);
            let more = lists.get(key).into_iter().flatten().filter(|member| !others.contains(member));
            more.take(5).cloned().collect::<Vec<_>>()
        };
        let told = |key: &String| {
            format!("{key}: too many {:?}, missing {:?}", some(&found, key, &given), some(&given, key, &found))
        };
        Some(differ.map(told).collect())
    }

    /// Returns what is wrong on a cluster, with [`BINS`]; `None` if a node does not answer as it should.
    pub async fn wrong_on(self, postgres: &Postgres, cluster: &Cluster, ttl: Duration) -> Option<Vec<String>> {
        let tables: Vec<_> = TABLES.into_iter().chain(BINS).collect();
        let owners = cluster.owners().await?;
        let masters = masters_of(&owners);
        let urls: Vec<String> = masters.iter().map(|index| cluster.node(*index).url()).collect();
        let server_of = |key: &str| {
            let owner = owners[usize::from(Lane::of(key.as_bytes()).number())];
            masters.iter().position(|index| *index == owner).unwrap()
        };
        wrong(postgres, &tables, &urls, server_of, ttl).await.ok()
    }
}

/// Returns the masters that own any hash slot, each once.
fn masters_of(owners: &[usize]) -> Vec<usize> {
    owners.iter().copied().collect::<BTreeSet<usize>>().into_iter().collect()
}

/// Returns hashes that are not as their rows, rows without a hash, hashes without a row, and TTLs that are not in
/// (0, ttl]. Nothing may be writing.
async fn wrong(
    postgres: &Postgres,
    tables: &[(&str, &str)],
    servers: &[String],
    server_of: impl Fn(&str) -> usize,
    ttl: Duration,
) -> redis::RedisResult<Vec<String>> {
    let ttl_ms = i64::try_from(ttl.as_millis()).unwrap();
    let client = postgres.client().await;
    let mut connections = Vec::new();
    for url in servers {
        connections.push(patient(url).await?);
    }
    let mut wrong = Vec::new();
    for (table, literal) in tables {
        let mut keys = HashSet::new();
        let rows = client.simple_query_raw(&format!("SELECT * FROM {table}")).await.unwrap();
        let mut rows = std::pin::pin!(rows.try_ready_chunks(2_000));
        while let Some(messages) = rows.try_next().await.unwrap() {
            let mut expected: Vec<Vec<_>> = vec![Vec::new(); servers.len()];
            for (key, row) in messages.iter().filter_map(|m| hash_of(m, literal)) {
                expected[server_of(&key)].push((key, row));
            }
            for (expected, connection) in expected.into_iter().zip(&mut connections) {
                if expected.is_empty() {
                    // For example, only the row description has arrived.
                    continue;
                }
                let mut pipe = redis::pipe();
                for (key, _) in &expected {
                    pipe.hgetall(key).pttl(key);
                }
                let answers: Vec<redis::Value> = pipe.query_async(connection).await?;
                for ((key, row), answer) in expected.into_iter().zip(answers.chunks_exact(2)) {
                    let hash: BTreeMap<String, String> = redis::from_redis_value_ref(&answer[0])?;
                    let pttl: i64 = redis::from_redis_value_ref(&answer[1])?;
                    if hash != row {
                        wrong.push(format!("{key}: in redis {hash:?}, in postgres {row:?}"));
                    } else if pttl <= 0 || pttl > ttl_ms {
                        wrong.push(format!("{key}: its TTL is {pttl} ms"));
                    }
                    keys.insert(key);
                }
            }
        }
        for connection in &mut connections {
            let mut cursor = 0_u64;
            loop {
                let mut scan = redis::cmd("SCAN");
                scan.arg(cursor).arg("MATCH").arg(format!("{literal}*")).arg("COUNT").arg(2_000);
                let (next, page): (u64, Vec<String>) = scan.query_async(connection).await?;
                for key in page.into_iter().filter(|key| !keys.contains(key)) {
                    let version: Option<u64> =
                        redis::cmd("HGET").arg(&[&key, "version"]).query_async(connection).await?;
                    wrong.push(format!("{key}: has no row, and is there with version {version:?}"));
                }
                cursor = next;
                if cursor == 0 {
                    break;
                }
            }
        }
    }
    Ok(wrong)
}

/// With all tables and these, [`LISTS`], [`NOTES`] and [`STREAM`].
fn with_lists(settings: Settings, more: &[(&'static str, &'static str)]) -> Settings {
    let [items, lefts, rights] = TABLES.map(table);
    let lists = format!(
        "[[tables.lookups]]\nname = \"by_flag\"\nkey = \"{LISTS}{{flag}}\"\norder = \"version\"\n
         [[tables.lookups]]\nname = \"by_note\"\nkey = \"{NOTES}{{note}}\"\n"
    );
    let more = more.iter().copied().map(table).collect::<String>();
    let settings = settings.tables(&[items, lists, lefts, rights, more].join("\n"));
    settings.text("changes.stream", STREAM).set("changes.max_len", "100000000")
}

/// Returns the configuration of a table.
fn table((name, literal): (&str, &str)) -> String {
    let literal = literal.replace('{', "{{").replace('}', "}}");
    format!("[[tables]]\nname = {name:?}\ntable = \"public.{name}\"\nkey = \"{literal}{{id}}\"\n")
}

/// Returns a row as its hash must be.
fn hash_of(message: &SimpleQueryMessage, literal: &str) -> Option<(String, BTreeMap<String, String>)> {
    let SimpleQueryMessage::Row(row) = message else { return None };
    let value = |at: usize, name: &str| match (name, row.get(at)) {
        ("flag", Some("t")) => "true".to_owned(),
        ("flag", Some("f")) => "false".to_owned(),
        (_, value) => value.unwrap_or_default().to_owned(),
    };
    let fields = row.columns().iter().enumerate().map(|(at, c)| (c.name().to_owned(), value(at, c.name())));
    Some((format!("{literal}{}", row.get("id").unwrap()), fields.collect()))
}

pub struct Writers {
    tasks: Vec<JoinHandle<()>>,
    stop: Arc<AtomicBool>,
    changes: Arc<AtomicU64>,
}

impl Writers {
    /// The number of rows changed by committed transactions.
    pub fn changes(&self) -> u64 {
        self.changes.load(Ordering::Relaxed)
    }

    /// When it returns, every transaction has ended.
    pub async fn stop(mut self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        for task in std::mem::take(&mut self.tasks) {
            task.await.unwrap();
        }
        self.changes()
    }
}

impl Drop for Writers {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

#[derive(Clone, Copy)]
enum Mix {
    Everything,
    InPlace,
    Touches,
    Churn,
    Bins,
}

struct Writer {
    traffic: Traffic,
    writer: u64,
    mix: Mix,
    url: String,
    rng: StdRng,
    rest: Duration,
    stop: Arc<AtomicBool>,
    changes: Arc<AtomicU64>,
}

const TOUCH: &str = "UPDATE items SET body = md5(random()::text), flag = NOT flag";
const BODY: &str = "md5(random()::text)";
/// Stored out of line by Postgres, so a change that does not touch it leaves it out of the stream.
const LARGE: &str = "CASE WHEN random() < 0.2 THEN repeat(md5(random()::text), 80) END";

impl Writer {
    async fn run(mut self) {
        let mut client = None;
        while !self.stop.load(Ordering::Relaxed) {
            let open = match client.take() {
                Some(open) => open,
                None => match connect(&self.url).await {
                    Some(open) => open,
                    None => {
                        // Postgres is restarting.
                        tokio::time::sleep(Duration::from_millis(50)).await;
                        continue;
                    }
                },
            };
            let (sql, counts) = self.transaction();
            match open.simple_query(&sql).await {
                Ok(messages) => {
                    let rows = messages.iter().map(|m| match m {
                        SimpleQueryMessage::CommandComplete(rows) => *rows,
                        _ => 0,
                    });
                    self.changes.fetch_add(rows.sum::<u64>() * u64::from(counts), Ordering::Relaxed);
                    client = Some(open);
                }
                Err(error) => match error.code() {
                    Some(&SqlState::T_R_DEADLOCK_DETECTED) => {
                        // If Postgres ends meanwhile, a new connection is opened.
                        client = open.simple_query("ROLLBACK").await.ok().map(|_| open);
                    }
                    None => {}
                    Some(code) if code.code().starts_with("57") => {}
                    Some(_) => panic!("{sql}: {error:?}"),
                },
            }
            tokio::time::sleep(self.rest).await;
        }
    }

    /// Returns a transaction, and whether it commits.
    fn transaction(&mut self) -> (String, bool) {
        if matches!(self.mix, Mix::Bins) {
            return (bins(&mut self.rng), true);
        }
        let (t, w) = (self.traffic, self.writer);
        let rng = &mut self.rng;
        let (any, one, two) = (t.any(rng), t.of(w, rng), t.of(w, rng));
        let insert = format!(
            "INSERT INTO items (id, flag, note, body, large)
             VALUES ({one}, true, CASE WHEN random() < 0.5 THEN '' END, {BODY}, {LARGE}) ON CONFLICT (id) DO NOTHING"
        );
        let delete = format!("DELETE FROM items WHERE id = {one}");
        let rename = |from: u64, to: u64| {
            format!("UPDATE items SET id = {to} WHERE id = {from} AND NOT EXISTS (SELECT FROM items WHERE id = {to})")
        };
        // In a fixed order, to avoid deadlocks.
        let mut several: Vec<u64> = (0..12).map(|_| t.any(rng)).collect();
        several.sort_unstable();
        let several = several.iter().map(|id| format!("{TOUCH} WHERE id = {id};")).collect::<String>();
        let kind = match self.mix {
            Mix::Everything => rng.random_range(0..100),
            Mix::InPlace => [rng.random_range(0..30), rng.random_range(36..58)][rng.random_range(0..2)],
            Mix::Touches => 0,
            Mix::Churn => rng.random_range(36..58),
            Mix::Bins => unreachable!("it has transactions of its own"),
        };
        let sql = match kind {
            0..30 => format!("{TOUCH} WHERE id = {any}"),
            30..36 => {
                let note = "CASE WHEN note IS NULL THEN 'note' END";
                format!("UPDATE items SET note = {note}, body = {BODY}, large = {LARGE} WHERE id = {any}")
            }
            36..48 => insert,
            48..58 => delete,
            58..66 => rename(one, two),
            66..70 => {
                let spare = t.rows * 2 + w;
                format!("BEGIN; {}; {}; {}; COMMIT", rename(one, spare), rename(two, one), rename(spare, two))
            }
            70..74 => format!("BEGIN; {insert}; {TOUCH} WHERE id = {one}; {delete}; COMMIT"),
            74..78 => format!("BEGIN; {delete}; {insert}; {TOUCH} WHERE id = {one}; COMMIT"),
            78..82 => format!("BEGIN; {several} COMMIT"),
            82..86 => format!("BEGIN; {several} {delete}; ROLLBACK"),
            86..90 => format!("BEGIN; {insert}; SAVEPOINT s; {delete}; {several} ROLLBACK TO s; COMMIT"),
            _ => {
                let pair = rng.random_range(1..=PAIRS);
                let half = |table| format!("UPDATE {table} SET body = md5(random()::text) WHERE id = {pair}");
                format!("BEGIN; {}; {}; COMMIT", half("lefts"), half("rights"))
            }
        };
        let committed = !sql.ends_with("ROLLBACK");
        (sql, committed)
    }
}

/// Returns a transaction for [`BINS`].
fn bins(rng: &mut StdRng) -> String {
    let (table, _) = BINS[rng.random_range(0..BINS.len())];
    let first = rng.random_range(1..=BIN_IDS);
    let last = BIN_IDS.min(first + rng.random_range(0..24));
    let some = format!("WHERE id BETWEEN {first} AND {last}");
    let insert = format!(
        "INSERT INTO {table} (id, flag, note, body, large)
         SELECT i, true, CASE WHEN random() < 0.5 THEN '' END, {BODY}, {LARGE} FROM generate_series({first}, {last}) i
         ON CONFLICT (id) DO UPDATE SET body = excluded.body"
    );
    let delete = format!("DELETE FROM {table} {some}");
    match rng.random_range(0..100) {
        0..40 => insert,
        40..70 => format!("UPDATE {table} SET flag = NOT flag {some}"),
        70..80 => delete,
        80..88 => format!("BEGIN; {delete}; {insert}; COMMIT"),
        88..94 => format!("BEGIN; {insert}; {delete}; COMMIT"),
        94..98 => format!("BEGIN; {insert}; SAVEPOINT s; {delete}; ROLLBACK TO s; COMMIT"),
        98 => format!("TRUNCATE {table}"),
        _ => format!("BEGIN; TRUNCATE {table}; {insert}; COMMIT"),
    }
}

async fn connect(url: &str) -> Option<Client> {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await.ok()?;
    tokio::spawn(connection);
    client.batch_execute("SET deadlock_timeout = '20ms'").await.ok()?;
    Some(client)
}

/// Waits until every table is loaded, however long that takes.
pub async fn loaded(daemon: &Daemon) {
    let deadline = Instant::now() + Duration::from_secs(900);
    loop {
        let status = daemon.status().await;
        if status["tables"].as_array().unwrap().iter().all(|t| t["loaded"] == true) {
            return;
        }
        assert!(Instant::now() < deadline, "never loaded: {status}\n{}", daemon.log_text());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
