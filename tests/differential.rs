//! Random tables, rows and statements in concurrent sessions. In the end every hash equals its row, and meanwhile no
//! reader sees a row that is torn, old or resurrected.
//!
//! Everything random comes from one number, which is printed: `PREFETCHD_TEST_SEED=7 scripts/test differential` repeats
//! the run, except for the timing of the sessions. `scripts/soak` tries new numbers.

mod schema;
mod statements;
pub mod values;
mod watch;

use crate::harness::traffic::patient;
use crate::harness::{Daemon, Postgres, Redis, Settings};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use redis::aio::MultiplexedConnection;
use schema::{Member, Server, Table};
use serde_json::value::RawValue;
use serde_json::{Value, json};
use statements::Transaction;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio_postgres::{Client, SimpleQueryMessage};
use watch::{Hash, Watched, Watcher};

/// What the suite runs. Together they cover every kind of table and statement.
const SEEDS: [u64; 4] = [1, 2, 3, 4];
const ROUNDS: usize = 3;
/// For one session, in one half of a round.
const TRANSACTIONS: usize = 25;
/// For schema changes that the stream does not announce. 15 s are promised, on a machine that is not overloaded.
const FOLLOWED: Duration = Duration::from_secs(30);
/// The daemon's own session settings.
const PINNED: &str = "SET DateStyle = 'ISO'; SET IntervalStyle = 'postgres'; SET TimeZone = 'UTC'; \
    SET extra_float_digits = 1; SET bytea_output = 'hex'; SET lc_monetary = 'C'; SET search_path = 'pg_catalog'";
const HOSTILE: &str = "SET DateStyle = 'SQL, DMY';SET TimeZone = 'Asia/Kathmandu';SET IntervalStyle = 'sql_standard';\
    SET bytea_output = 'escape';SET extra_float_digits = -3;SET search_path = public;SET xmloption = 'document'";

fn server() -> Postgres {
    Postgres::own(&[("max_prepared_transactions", "60"), ("deadlock_timeout", "30ms")])
}

#[tokio::test]
async fn whatever_happens_to_tables_every_hash_is_its_row() {
    let postgres = server();
    let asked_for = std::env::var("PREFETCHD_TEST_SEED").ok().and_then(|seed| seed.parse().ok());
    let seeds = asked_for.map_or(SEEDS.to_vec(), |seed| vec![seed]);
    for pair in seeds.chunks(2) {
        let done = pair.iter().map(|seed| run(postgres.another_database(), *seed));
        for tally in futures_util::future::join_all(done).await {
            println!("{tally:?}");
        }
    }
}

/// Run by `scripts/soak`.
#[tokio::test]
#[ignore = "runs as long as it is told to: scripts/soak"]
async fn soak() {
    let minutes =
        std::env::var("PREFETCHD_SOAK_MINUTES").ok().and_then(|text| text.parse::<f64>().ok()).unwrap_or(10.0);
    let end = Instant::now() + Duration::from_secs_f64(minutes * 60.0);
    let (postgres, mut total) = (server(), Tally::default());
    while Instant::now() < end {
        total.add(run(postgres.another_database(), rand::random::<u32>().into()).await);
        println!("{}", total.line());
    }
    println!("{total:#?}");
}

#[derive(Debug, Default)]
struct Tally {
    seeds: usize,
    rounds: usize,
    rows_compared: usize,
    rows_watched: u64,
    slowest_to_follow: Duration,
    /// Committed and failed transactions, by kind.
    transactions: BTreeMap<&'static str, (usize, usize)>,
    admin: BTreeMap<String, usize>,
}

impl Tally {
    fn add(&mut self, other: Self) {
        self.seeds += other.seeds;
        self.rounds += other.rounds;
        self.rows_compared += other.rows_compared;
        self.rows_watched += other.rows_watched;
        self.slowest_to_follow = self.slowest_to_follow.max(other.slowest_to_follow);
        for (kind, (good, bad)) in other.transactions {
            let sum = self.transactions.entry(kind).or_default();
            *sum = (sum.0 + good, sum.1 + bad);
        }
        for (kind, n) in other.admin {
            *self.admin.entry(kind).or_default() += n;
        }
    }

    fn line(&self) -> String {
        let (good, bad) = self.transactions.values().fold((0, 0), |sum, n| (sum.0 + n.0, sum.1 + n.1));
        format!(
            "{} seeds, {} rounds, {good} transactions and {bad} that failed, {} rows compared, {} watched, no difference",
            self.seeds, self.rounds, self.rows_compared, self.rows_watched
        )
    }
}

/// What the sessions of one seed share.
#[derive(Default)]
struct Journal {
    lines: Mutex<Vec<String>>,
    done: AtomicUsize,
    tally: Mutex<BTreeMap<&'static str, (usize, usize)>>,
}

impl Journal {
    fn count(&self, kind: &'static str, good: bool) {
        let mut tally = self.tally.lock().unwrap();
        let entry = tally.entry(kind).or_default();
        if good {
            entry.0 += 1;
        } else {
            entry.1 += 1;
        }
    }

    fn note(&self, who: &str, sql: &str, outcome: &str) {
        self.lines.lock().unwrap().push(format!("{who}: {sql:.3000}; -- {outcome}"));
    }
}

/// Runs one seed: its tables and its rounds.
async fn run(postgres: Postgres, seed: u64) -> Tally {
    println!("PREFETCHD_TEST_SEED={seed}");
    let journal = Arc::new(Journal::default());
    let keeper = Keeper { seed, journal: Arc::clone(&journal) };
    let mut rng = StdRng::seed_from_u64(seed);
    let mut tally = Tally { seeds: 1, ..Tally::default() };
    let major = postgres.value("SHOW server_version_num").await.unwrap().parse::<u32>().unwrap() / 10_000;
    let mut tables: Vec<Table> = Vec::new();
    let null = if rng.random_bool(0.3) { Null::Omit } else { Null::Empty };
    for at in 0..rng.random_range(1..=4) {
        let mut table = Table::any(at, tables.first(), Server { major }, &mut rng);
        // `row_to_json` does not leave out NULLs. The watcher reads hashes, of which there is at least one table.
        table.documents = at > 0 && null == Null::Empty && rng.random_bool(0.5);
        table.has_lists = rng.random_bool(0.6);
        tables.push(table);
    }
    let client = session(&postgres, "setup", &journal).await;
    let setup: String = tables.iter().map(|t| t.create() + ";\n").collect();
    let hostile = HOSTILE.split(';').fold(String::new(), |mut sql, set| {
        write!(sql, "ALTER ROLE prefetchd IN DATABASE {} {set};", postgres.database()).unwrap();
        sql
    });
    for sql in [schema::PRELUDE, values::TYPES, &hostile, &setup] {
        journal.note("setup", sql, "");
        client.batch_execute(sql).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
    }
    execute(&client, "setup", statements::transactions(&tables, "setup", 40, &mut rng), &journal).await;

    let redis = Redis::start();
    let toml: String = tables.iter().map(Table::toml).collect();
    journal.note("configuration", &toml, "");
    let settings = Settings::new(&postgres, &redis)
        .tables(&toml)
        .text("cache.null", if null == Null::Omit { "omit" } else { "empty" })
        .set("cache.max_atomic_changes", if rng.random_bool(0.5) { "10" } else { "10000" });
    let watched = |t: &Table| Watched {
        literal: t.literal(),
        body: t.field("body").unwrap(),
        list: t.has_lists.then(|| t.list_of_all()),
    };
    let hashes = tables.iter().filter(|table| !table.documents);
    let watcher = Watcher::start(&redis, hashes.map(watched).collect()).await;
    let mut seat = Seat { daemon: Some(Daemon::with(&settings).await), settings, altered: false };
    for round in 0..ROUNDS {
        tally.rounds += 1;
        let alters = round > 0 && rng.random_bool(0.6);
        if alters && !seat.altered {
            seat.altered = true;
            seat.daemon().allow_warnings();
            watcher.forgive_returns();
        }
        let mut work: Vec<Vec<Transaction>> = Vec::new();
        let sessions = rng.random_range(2..=4);
        for at in 0..sessions {
            work.push(statements::transactions(&tables, &format!("{seed} {round} {at} a"), TRANSACTIONS, &mut rng));
        }
        let mut changes = Vec::new();
        for _ in 0..if alters { rng.random_range(1..5) } else { 0 } {
            let at = rng.random_range(0..tables.len());
            changes.push(tables[at].alter(&mut rng));
        }
        for (at, work) in work.iter_mut().enumerate() {
            let second = format!("{seed} {round} {at} b");
            work.extend(statements::transactions(&tables, &second, TRANSACTIONS, &mut rng));
        }
        let total: usize = journal.done.load(Ordering::Relaxed) + work.iter().map(Vec::len).sum::<usize>();
        let third = total - work.iter().map(Vec::len).sum::<usize>() * 2 / 3;
        let mut running = Vec::new();
        for (at, work) in work.into_iter().enumerate() {
            let who = format!("round {round} session {at}");
            let client = session(&postgres, &who, &journal).await;
            let journal = Arc::clone(&journal);
            running.push(tokio::spawn(async move { execute(&client, &who, work, &journal).await }));
        }
        let altering = {
            let (client, journal) = (session(&postgres, "ddl", &journal).await, Arc::clone(&journal));
            tokio::spawn(async move {
                progress(&journal, third).await;
                for (kind, sql) in changes {
                    journal.count(kind, alter(&client, &sql, &journal).await);
                }
            })
        };
        seat.operate(&journal, total, &mut rng, &mut tally).await;
        for task in running {
            task.await.unwrap();
        }
        altering.await.unwrap();
        let left = client.simple_query("SELECT gid FROM pg_prepared_xacts WHERE database = current_database()").await;
        for row in left.unwrap() {
            if let SimpleQueryMessage::Row(row) = row {
                client.batch_execute(&format!("ROLLBACK PREPARED '{}'", row.get(0).unwrap())).await.unwrap();
            }
        }
        seat.settled(&postgres, &redis, &tables, null, &mut tally).await;
        let found = watcher.found();
        let log = || seat.daemon().log_text();
        assert!(found.is_empty(), "round {round}: the watcher saw {:.3000}\n{}", found.join("\n"), log());
    }
    assert_eq!(seat.daemon().status().await["dead_letters"], 0);
    tally.rows_watched = watcher.stop().await;
    assert_eq!(seat.daemon.take().unwrap().stop().await, Some(0));
    tally.transactions = std::mem::take(&mut *journal.tally.lock().unwrap());
    std::mem::forget(keeper);
    tally
}

/// Keeps the statements if the seed failed.
struct Keeper {
    seed: u64,
    journal: Arc<Journal>,
}

impl Drop for Keeper {
    fn drop(&mut self) {
        let file = std::env::temp_dir().join(format!("prefetchd-differential-{}.sql", self.seed));
        let lines = self.journal.lines.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if std::fs::write(&file, lines.join("\n")).is_ok() {
            eprintln!("PREFETCHD_TEST_SEED={} failed; its statements: {}", self.seed, file.display());
        }
    }
}

async fn session(postgres: &Postgres, who: &str, journal: &Journal) -> Client {
    let client = postgres.client().await;
    journal.note(who, "connected", "");
    client.batch_execute("SET lock_timeout = '400ms'; SET statement_timeout = '20s'").await.unwrap();
    client
}

/// Runs each transaction to its end; one that fails is rolled back.
async fn execute(client: &Client, who: &str, transactions: Vec<Transaction>, journal: &Journal) {
    for transaction in transactions {
        let mut good = true;
        for sql in transaction.statements {
            let result = client.batch_execute(&sql).await;
            let outcome = result.as_ref().map_or_else(
                |e| e.as_db_error().unwrap_or_else(|| panic!("{sql}: {e:?}")).message().to_owned(),
                |()| "done".to_owned(),
            );
            journal.note(who, &sql, &outcome);
            if result.is_err() {
                good = false;
                if transaction.kind != "end of a prepared transaction" {
                    // Without a transaction, this is just a warning.
                    client.batch_execute("ROLLBACK").await.unwrap();
                    break;
                }
            }
        }
        journal.count(transaction.kind, good);
        journal.done.fetch_add(1, Ordering::Relaxed);
    }
}

/// Against sessions that lock the table; tries a few times.
async fn alter(client: &Client, sql: &str, journal: &Journal) -> bool {
    for part in sql.split('\n') {
        let mut result = Ok(());
        for _ in 0..20 {
            result = client.batch_execute(part).await;
            let busy = |e: &tokio_postgres::Error| e.code().is_some_and(|c| matches!(c.code(), "55P03" | "40P01"));
            if !result.as_ref().is_err_and(busy) {
                break;
            }
            client.batch_execute("ROLLBACK").await.unwrap();
        }
        let outcome = result.as_ref().map_or_else(|e| format!("{e:?}"), |()| "done".to_owned());
        journal.note("ddl", part, &outcome);
        if result.is_err() {
            client.batch_execute("ROLLBACK").await.unwrap();
            return false;
        }
    }
    true
}

async fn progress(journal: &Journal, until: usize) {
    while journal.done.load(Ordering::Relaxed) < until {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Null {
    Empty,
    Omit,
}

/// The daemon, and what is known about it.
struct Seat {
    daemon: Option<Daemon>,
    settings: Settings,
    /// Tables have been altered, so warnings and drift are acceptable.
    altered: bool,
}

impl Seat {
    fn daemon(&self) -> &Daemon {
        self.daemon.as_ref().unwrap()
    }

    /// Runs operations and restarts while sessions write, until `total` transactions are done.
    async fn operate(&mut self, journal: &Journal, total: usize, rng: &mut StdRng, tally: &mut Tally) {
        let restarts = rng.random_range(0..4);
        loop {
            let done = journal.done.load(Ordering::Relaxed);
            if done >= total {
                return;
            }
            let next = (done + rng.random_range(10..60)).min(total);
            let operation = match rng.random_range(0..10) {
                0..3 => "verify",
                3..6 => "refetch",
                6 => "repair",
                7 if restarts == 0 => "restart",
                8 if restarts == 1 => "kill",
                _ => "rest",
            };
            *tally.admin.entry(operation.to_owned()).or_default() += 1;
            journal.note("admin", operation, "");
            match operation {
                "restart" | "kill" => {
                    let daemon = self.daemon.take().unwrap();
                    match operation {
                        "kill" => daemon.kill9(),
                        _ => assert_eq!(daemon.stop().await, Some(0)),
                    }
                    self.daemon = Some(Daemon::with(&self.settings).await);
                    if self.altered {
                        self.daemon().allow_warnings();
                    }
                }
                "verify" => self.verify(&json!({})).await.into_iter().for_each(drop),
                "repair" => self.verify(&json!({"repair": true})).await.into_iter().for_each(drop),
                "refetch" => drop(self.daemon().operate("refetch", &json!({})).await),
                _ => {}
            }
            progress(journal, next).await;
        }
    }

    /// Asserts that there is no drift, if that can be checked now.
    async fn verify(&self, body: &Value) -> Option<Value> {
        let answer = self.daemon().operate("verify", body).await;
        if answer.status != 200 {
            return None;
        }
        let found = answer.json();
        let clean = is_clean(&found);
        assert!(clean || self.altered, "verify found drift: {found}\n{}", self.daemon().log_text());
        Some(found)
    }

    /// Every hash equals its row, and the daemon agrees.
    async fn settled(&mut self, postgres: &Postgres, redis: &Redis, tables: &[Table], null: Null, tally: &mut Tally) {
        let begun = Instant::now();
        self.daemon().applied(postgres.position().await).await;
        if !self.altered {
            self.daemon().ready().await;
        }
        let client = postgres.client().await;
        client.batch_execute(PINNED).await.unwrap();
        loop {
            let (rows, wrong) = differences(&client, redis, tables, null).await;
            if wrong.is_empty() {
                tally.rows_compared += rows;
                break;
            }
            let late = !self.altered || begun.elapsed() > FOLLOWED;
            let some = wrong.iter().take(10).cloned().collect::<Vec<_>>().join("\n");
            assert!(!late, "{} keys are wrong:\n{some:.5000}\n{}", wrong.len(), self.daemon().log_text());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        tally.slowest_to_follow = tally.slowest_to_follow.max(begun.elapsed());
        loop {
            self.daemon().ready().await;
            if let Some(found) = self.verify(&json!({})).await {
                assert!(is_clean(&found), "verify found drift: {found}\n{}", self.daemon().log_text());
                break;
            }
        }
        let (_, wrong) = differences(&client, redis, tables, null).await;
        assert!(wrong.is_empty(), "after all was well: {wrong:?}");
    }
}

/// Returns what a reader of a document sees of its fields; NULL is the empty text.
fn shown(document: &str) -> Hash {
    let fields: BTreeMap<String, Box<RawValue>> = serde_json::from_str(document).unwrap();
    let text = |value: &RawValue| match value.get() {
        "null" => String::new(),
        text if text.starts_with('"') => serde_json::from_str(text).unwrap_or_default(),
        other => other.to_owned(),
    };
    fields.into_iter().map(|(field, value)| (field, text(&value))).collect()
}

/// Whether a verification has found no drift.
fn is_clean(found: &Value) -> bool {
    ["missing", "stale", "orphaned"].iter().all(|kind| found[kind] == 0) && found["lookups"].as_u64().unwrap_or(0) == 0
}

/// Compares Redis with what it must have. Returns the number of rows, and the differences.
async fn differences(client: &Client, redis: &Redis, tables: &[Table], null: Null) -> (usize, Vec<String>) {
    let mut connection = patient(&redis.url()).await.unwrap();
    let (mut rows, mut wrong) = (0, Vec::new());
    let mut lists: BTreeMap<String, BTreeSet<Member>> = BTreeMap::new();
    for table in tables {
        let expected = expected(client, table, null).await;
        rows += expected.len();
        for (key, hash) in expected.iter().filter(|_| table.has_lists) {
            let fields = if table.documents { shown(&hash[DOCUMENT]) } else { hash.clone() };
            for (list, member) in table.lists_of(key, &fields) {
                lists.entry(list).or_default().insert(member);
            }
        }
        let there = watch::keys(&mut connection, &table.literal()).await;
        let keys: BTreeSet<&String> = there.iter().chain(expected.keys()).collect();
        for key in keys {
            let mut pipe = redis::pipe();
            let (hash, pttl): (Hash, i64) = if table.documents {
                pipe.get(key).pttl(key);
                let (document, pttl): (Option<String>, i64) = pipe.query_async(&mut connection).await.unwrap();
                (document.map(|document| (DOCUMENT.to_owned(), document)).into_iter().collect(), pttl)
            } else {
                pipe.hgetall(key).pttl(key);
                pipe.query_async(&mut connection).await.unwrap()
            };
            match expected.get(key) {
                None => wrong.push(format!("{key}: has no row")),
                Some(row) if hash != *row => wrong.push(format!("{key}:\n in redis    {hash:?}\n in postgres {row:?}")),
                Some(_) if !(1..=86_400_000).contains(&pttl) => wrong.push(format!("{key}: its TTL is {pttl} ms")),
                Some(_) => {}
            }
        }
    }
    let there = watch::keys(&mut connection, schema::LISTS).await;
    for key in there.iter().chain(lists.keys()).collect::<BTreeSet<_>>() {
        let found = list(&mut connection, key).await;
        let expected = lists.get(key).cloned().unwrap_or_default();
        if found != expected {
            wrong.push(format!("{key}:\n in redis    {found:?}\n by its rows {expected:?}"));
        }
    }
    (rows, wrong)
}

async fn list(connection: &mut MultiplexedConnection, key: &String) -> BTreeSet<Member> {
    let (kind, pttl): (String, i64) =
        redis::pipe().cmd("TYPE").arg(key).pttl(key).query_async(connection).await.unwrap();
    assert!(kind == "none" || (1..=86_400_000).contains(&pttl), "{key}: its TTL is {pttl} ms");
    match &*kind {
        "set" => {
            let members: BTreeSet<String> = redis::cmd("SMEMBERS").arg(key).query_async(connection).await.unwrap();
            members.into_iter().map(|member| (member, String::new())).collect()
        }
        "zset" => {
            let members: Vec<(String, f64)> =
                redis::cmd("ZRANGE").arg(key).arg(0).arg(-1).arg("WITHSCORES").query_async(connection).await.unwrap();
            members.into_iter().map(|(member, score)| (member, score.to_string())).collect()
        }
        _ => BTreeSet::new(),
    }
}

/// The only field of a row that is a document.
const DOCUMENT: &str = "document";

/// Returns the rows of a table as hashes, by key, read without any code of the daemon.
async fn expected(client: &Client, table: &Table, null: Null) -> BTreeMap<String, Hash> {
    let name = &table.name;
    let listed = if table.listed {
        format!("AND attname = ANY (SELECT unnest(attnames) FROM pg_publication_tables WHERE tablename = '{name}')")
    } else {
        String::new()
    };
    let sql = format!(
        "SELECT attname, public.is_boolean(atttypid) FROM pg_attribute WHERE attrelid = 'public.{name}'::regclass \
         AND attnum > 0 AND NOT attisdropped AND attgenerated = '' {listed} ORDER BY attnum"
    );
    let columns: Vec<(String, bool)> = values_of(client, &sql)
        .await
        .into_iter()
        .map(|row| (row[0].clone().unwrap(), row[1].as_deref() == Some("t")))
        .collect();
    let mut list: Vec<String> = columns.iter().map(|(name, _)| schema::quoted(name)).collect();
    let field =
        |column: &String| Some(format!("{} AS {}", schema::quoted(column), schema::quoted(&table.field(column)?)));
    let fields: Vec<String> = columns.iter().filter_map(|(name, _)| field(name)).collect();
    list.push(format!("(SELECT row_to_json(x)::text FROM (SELECT {}) x)", fields.join(", ")));
    let filter = table.filter.as_deref().unwrap_or("true");
    let sql = format!("SELECT {} FROM public.{name} WHERE {filter}", list.join(", "));
    let mut rows = BTreeMap::new();
    for row in values_of(client, &sql).await {
        let at = |column: &str| columns.iter().position(|(name, _)| name == column).unwrap();
        let parts: Vec<&str> = table.key.iter().map(|(column, _)| row[at(column)].as_deref().unwrap()).collect();
        let mut hash = Hash::new();
        let mut key = table.literal();
        for (place, ((_, kind), part)) in table.key.iter().zip(&parts).enumerate() {
            let part = match (kind.name, *part) {
                ("boolean", "t") => "true",
                ("boolean", _) => "false",
                (_, other) => other,
            };
            key += if place > 0 { ":" } else { "" };
            key += &if parts.len() > 1 { part.replace('%', "%25").replace(':', "%3A") } else { part.to_owned() };
        }
        if table.documents {
            hash.insert(DOCUMENT.to_owned(), row[columns.len()].clone().unwrap());
        }
        for ((column, boolean), value) in columns.iter().zip(&row).filter(|_| !table.documents) {
            let Some(field) = table.field(column) else { continue };
            let value = match value.as_deref() {
                Some("t") if *boolean => "true".to_owned(),
                Some("f") if *boolean => "false".to_owned(),
                Some(text) => text.to_owned(),
                None if null == Null::Omit => continue,
                None => String::new(),
            };
            hash.insert(field, value);
        }
        assert!(rows.insert(key.clone(), hash).is_none(), "two rows at {key}");
    }
    rows
}

async fn values_of(client: &Client, sql: &str) -> Vec<Vec<Option<String>>> {
    let messages = client.simple_query(sql).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
    let row = |message| match message {
        SimpleQueryMessage::Row(row) => Some((0..row.len()).map(|at| row.get(at).map(str::to_owned)).collect()),
        _ => None,
    };
    messages.into_iter().filter_map(row).collect()
}
