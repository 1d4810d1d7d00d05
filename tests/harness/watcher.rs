//! A reader that never stops: reads random rows from Redis while everything else goes on, and checks them against what
//! a reader may rely on.
//!
//! Each read is one MULTI that includes the checkpoint, so it is known what Redis claimed to be at that moment. For a
//! cluster, which has no such MULTI, see [`lanes::LanesWatcher`].

pub mod lanes;

use super::scene::tables_key;
use super::traffic::{BIN_IDS, LISTS, NOTES, PAIRS, SALT, Traffic, patient};
use super::{Answer, POLL, Redis};
use postgres_protocol::authentication::md5_hash;
use prefetchd::checkpoint::{Checkpoint, TableState};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use redis::aio::MultiplexedConnection;
use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::Mutex;
use tokio::task::JoinHandle;

const ITEMS_A_LOOK: usize = 48;
const PAIRS_A_LOOK: usize = 8;
/// The pause between two reads, because the watcher shares the machine with what it watches.
const REST: Duration = Duration::from_millis(1);
const VIOLATIONS_KEPT: usize = 20;
const ITEM: &[&str] = &["id", "version", "flag", "note", "body", "large"];
const HALF: &[&str] = &["id", "version", "body"];

type Hash = BTreeMap<String, String>;

pub struct Watcher {
    eyes: Arc<Mutex<Eyes>>,
    stop: Arc<AtomicBool>,
    task: JoinHandle<()>,
}

#[derive(Clone, Copy)]
enum Seen {
    There(u64),
    /// It existed before, with this version.
    Gone(u64),
}

impl Seen {
    /// Says what is wrong if the row is there afterwards with this version.
    fn contradicts(self, version: u64) -> Option<String> {
        match self {
            Seen::There(last) if version < last => Some(format!("went backwards to version {version} after {last}")),
            Seen::Gone(last) if version <= last => Some(format!("came back with version {version}, gone after {last}")),
            Seen::There(_) | Seen::Gone(_) => None,
        }
    }
}

/// Returns the version of a row that is whole; `None` if it is torn.
fn version_of(fields: &[&str], row: &Hash) -> Option<u64> {
    let value = |field: &&str| row.get(*field).map_or("absent", String::as_str);
    let text = fields.iter().map(value).collect::<Vec<_>>().join("|");
    let is_whole = row.len() == fields.len() + 1 && value(&"sum") == md5_hash(b"", text.as_bytes(), SALT);
    is_whole.then(|| value(&"version").parse().unwrap())
}

struct Eyes {
    traffic: Traffic,
    checkpoint: String,
    /// Items have [`LISTS`].
    has_lists: bool,
    seen: HashMap<String, Seen>,
    /// Postgres itself may lose something.
    may_go_back: bool,
    rows: u64,
    whole_pairs: u64,
    violations: Vec<String>,
}

impl Watcher {
    pub async fn start(redis: &Redis, slot: &str, traffic: Traffic, seed: u64) -> Self {
        Self::at(redis.url(), slot, traffic, seed).await
    }

    /// Watches a Redis that may later be another one.
    pub async fn at(url: String, slot: &str, traffic: Traffic, seed: u64) -> Self {
        let eyes = Eyes {
            traffic,
            checkpoint: format!("prefetchd:{{{slot}}}:checkpoint"),
            has_lists: false,
            seen: HashMap::new(),
            may_go_back: false,
            rows: 0,
            whole_pairs: 0,
            violations: Vec::new(),
        };
        let (eyes, stop) = (Arc::new(Mutex::new(eyes)), Arc::new(AtomicBool::new(false)));
        let mut connection = patient(&url).await.unwrap();
        let (watching, stopped) = (Arc::clone(&eyes), Arc::clone(&stop));
        let task = tokio::spawn(async move {
            let mut rng = StdRng::seed_from_u64(seed);
            while !stopped.load(Ordering::Relaxed) {
                if watching.lock().await.look(&mut connection, &mut rng).await.is_err() {
                    // The connection was cut, or Redis is unavailable.
                    tokio::time::sleep(POLL).await;
                    if let Ok(again) = patient(&url).await {
                        connection = again;
                    }
                }
                tokio::time::sleep(REST).await;
            }
        });
        Self { eyes, stop, task }
    }

    /// Empties Redis. The watcher no longer expects what it saw before.
    pub async fn flush(&self, redis: &Redis) {
        let mut eyes = self.eyes.lock().await;
        redis.flush().await;
        eyes.seen.clear();
    }

    /// Sees nothing while the guard exists, and no longer expects what it saw before, because Redis itself loses
    /// something.
    pub async fn blind(&self) -> impl Drop + use<> {
        let mut eyes = Arc::clone(&self.eyes).lock_owned().await;
        eyes.seen.clear();
        eyes
    }

    /// From here on, each item must be a member of the lists that its values give, and of no others.
    pub async fn reads_lists(&self) {
        self.eyes.lock().await.has_lists = true;
    }

    /// Whether Postgres may lose something from here on. Rows may then go backwards, but only while the checkpoint says
    /// that their table is healing.
    pub async fn postgres_may_go_back(&self, may: bool) {
        self.eyes.lock().await.may_go_back = may;
    }

    /// Asserts that nothing was torn, nothing went backwards, and nothing vanished that must exist.
    pub async fn check(&self) {
        let eyes = self.eyes.lock().await;
        assert!(eyes.violations.is_empty(), "the watcher saw:\n{}", eyes.violations.join("\n"));
    }

    pub async fn stop(self) {
        self.stop.store(true, Ordering::Relaxed);
        self.check().await;
        self.task.await.unwrap();
        let eyes = self.eyes.lock().await;
        println!("watched {} rows and {} pairs of loaded tables", eyes.rows, eyes.whole_pairs);
        assert!(eyes.rows > 0, "the watcher saw nothing at all");
    }
}

impl Eyes {
    async fn look(&mut self, connection: &mut MultiplexedConnection, rng: &mut StdRng) -> redis::RedisResult<()> {
        let items: Vec<u64> = (0..ITEMS_A_LOOK).map(|_| self.traffic.any(rng)).collect();
        let pairs: Vec<u64> = (0..PAIRS_A_LOOK).map(|_| rng.random_range(1..=PAIRS)).collect();
        let mut pipe = redis::pipe();
        pipe.atomic().get(&self.checkpoint).hgetall(tables_key(&self.checkpoint));
        for id in &items {
            pipe.hgetall(Traffic::item_key(*id));
        }
        let listed = if self.has_lists { &items[..] } else { &[] };
        for id in listed {
            for flag in ["true", "false"] {
                pipe.zscore(format!("{LISTS}{flag}"), id);
            }
            pipe.sismember(NOTES, id);
        }
        for key in pairs.iter().flat_map(|id| Traffic::pair_keys(*id)) {
            pipe.hgetall(key);
        }
        let mut answers = pipe.query_async::<Vec<redis::Value>>(connection).await?.into_iter();
        let checkpoint: Option<Vec<u8>> = redis::from_redis_value(answers.next().unwrap())?;
        let entries: BTreeMap<Vec<u8>, Vec<u8>> = redis::from_redis_value(answers.next().unwrap())?;
        let entries: Vec<_> = entries.into_iter().map(|(name, entry)| (name.into(), entry.into())).collect();
        // A part of it may have been removed.
        let checkpoint = checkpoint.and_then(|head| Checkpoint::read(&head, &entries).ok());
        if self.may_go_back && checkpoint.as_ref().is_some_and(heals) {
            self.seen.clear();
        }
        let mut hashes: Vec<Hash> = Vec::with_capacity(items.len() + 2 * pairs.len());
        hashes.extend(answers.by_ref().take(items.len()).map(|value| redis::from_redis_value(value).unwrap()));
        for (id, row) in listed.iter().zip(&hashes) {
            let mut next = || redis::from_redis_value::<Option<f64>>(answers.next().unwrap()).unwrap();
            let found = (next(), next(), next());
            let version = row.get("version").map(|version| version.parse().unwrap());
            let of = |flag: &str| version.filter(|_| row["flag"] == flag);
            let has_no_note = version.map_or(0.0, |_| f64::from(u8::from(row["note"].is_empty())));
            if found != (of("true"), of("false"), Some(has_no_note)) {
                self.violation(format!("lists and row {id} disagree: {found:?} {row:?}"));
            }
        }
        hashes.extend(answers.map(|value| redis::from_redis_value::<Hash>(value).unwrap()));
        let mut hashes = hashes.into_iter();
        let loaded = |table: &str| {
            checkpoint.as_ref().and_then(|c| c.tables.get(table)).is_some_and(|t| t.state == TableState::Loaded)
        };
        let (items_loaded, pairs_loaded) = (loaded("items"), loaded("lefts") && loaded("rights"));
        for id in items {
            let must_exist = self.traffic.stays(id).then_some(items_loaded);
            self.row(Traffic::item_key(id), ITEM, &hashes.next().unwrap(), must_exist);
        }
        for id in pairs {
            let [left, right] = Traffic::pair_keys(id);
            let one = self.row(left, HALF, &hashes.next().unwrap(), Some(pairs_loaded));
            let other = self.row(right, HALF, &hashes.next().unwrap(), Some(pairs_loaded));
            if pairs_loaded {
                self.whole_pairs += 1;
                if one != other {
                    self.violation(format!("half a transaction: pair {id} has versions {one:?} and {other:?}"));
                }
            }
        }
        Ok(())
    }

    /// Checks one row as it is in Redis, and returns its version. `must_exist` is set if the row always exists, and
    /// then says whether the checkpoint has its table as loaded.
    fn row(&mut self, key: String, fields: &[&str], hash: &Hash, must_exist: Option<bool>) -> Option<u64> {
        self.rows += 1;
        let before = self.seen.get(&key).copied();
        if hash.is_empty() {
            match (must_exist, before) {
                (Some(true), _) => self.violation(format!("gone: {key} is not there, and its table is loaded")),
                (Some(false), Some(_)) => self.violation(format!("gone: {key} was there, and never deleted")),
                (_, Some(Seen::There(version) | Seen::Gone(version))) => {
                    self.seen.insert(key, Seen::Gone(version));
                }
                (_, None) => {}
            }
            return None;
        }
        let Some(version) = version_of(fields, hash) else {
            self.violation(format!("torn: {key} is {hash:?}"));
            return None;
        };
        match before.and_then(|before| before.contradicts(version)) {
            Some(how) => self.violation(format!("{key} {how}")),
            None => _ = self.seen.insert(key, Seen::There(version)),
        }
        Some(version)
    }

    fn violation(&mut self, what: String) {
        if self.violations.len() < VIOLATIONS_KEPT {
            eprintln!("{what}");
            self.violations.push(what);
        }
    }
}

fn heals(checkpoint: &Checkpoint) -> bool {
    checkpoint.tables.values().any(|table| table.state == TableState::Healing)
}

/// The same over HTTP, from all present daemons. A loss of Redis is no excuse here.
pub struct HttpWatcher {
    looks: Arc<Mutex<Looks>>,
    stop: Arc<AtomicBool>,
    task: JoinHandle<()>,
}

struct Looks {
    traffic: Traffic,
    /// `items`, or one of the [`BINS`](super::traffic::BINS).
    table: &'static str,
    /// Reads lists, too.
    has_lists: bool,
    daemons: Vec<SocketAddr>,
    seen: HashMap<u64, Seen>,
    /// Postgres itself may lose something.
    may_go_back: bool,
    hits: u64,
    misses: u64,
    refused: BTreeMap<String, u64>,
    violations: Vec<String>,
}

impl HttpWatcher {
    pub fn start(traffic: Traffic, seed: u64) -> Self {
        Self::of("items", traffic, seed)
    }

    /// Reads the rows of `items`, or of one of the [`BINS`](super::traffic::BINS).
    pub fn of(table: &'static str, traffic: Traffic, seed: u64) -> Self {
        let (daemons, seen, refused, violations) = (Vec::new(), HashMap::new(), BTreeMap::new(), Vec::new());
        let looks = Looks {
            traffic,
            table,
            has_lists: false,
            daemons,
            seen,
            may_go_back: false,
            hits: 0,
            misses: 0,
            refused,
            violations,
        };
        let (looks, stop) = (Arc::new(Mutex::new(looks)), Arc::new(AtomicBool::new(false)));
        let (looking, stopped) = (Arc::clone(&looks), Arc::clone(&stop));
        let task = tokio::spawn(async move {
            let mut rng = StdRng::seed_from_u64(seed);
            while !stopped.load(Ordering::Relaxed) {
                looking.lock().await.look(&mut rng).await;
                tokio::time::sleep(REST).await;
            }
        });
        Self { looks, stop, task }
    }

    /// From here on, reads the rows of lists, too.
    pub async fn reads_lists(&self) {
        self.looks.lock().await.has_lists = true;
    }

    /// Reads from these daemons from now on.
    pub async fn ask(&self, daemons: Vec<SocketAddr>) {
        self.looks.lock().await.daemons = daemons;
    }

    /// Whether Postgres may lose something from here on. Rows may then go backwards, but not before a reader was told
    /// that their table is healing.
    pub async fn postgres_may_go_back(&self, may: bool) {
        self.looks.lock().await.may_go_back = may;
    }

    /// Returns how many reads were refused, or not answered.
    pub async fn all_refused(&self) -> u64 {
        self.looks.lock().await.refused.values().sum()
    }

    /// Returns how many reads were refused with this code.
    pub async fn refused(&self, code: &str) -> u64 {
        self.looks.lock().await.refused.get(code).copied().unwrap_or(0)
    }

    pub async fn check(&self) {
        let looks = self.looks.lock().await;
        assert!(looks.violations.is_empty(), "seen over HTTP:\n{}", looks.violations.join("\n"));
    }

    /// Returns what it saw.
    pub async fn stop(self) -> String {
        self.stop.store(true, Ordering::Relaxed);
        self.check().await;
        self.task.await.unwrap();
        let looks = self.looks.lock().await;
        // A bin may be empty all the time.
        let answers = if looks.table == "items" { looks.hits } else { looks.hits + looks.misses };
        assert!(answers > 0, "it saw nothing of {}", looks.table);
        format!("{} rows, {} known not to be there, refused {:?}", looks.hits, looks.misses, looks.refused)
    }
}

impl Looks {
    async fn look(&mut self, rng: &mut StdRng) {
        if self.daemons.is_empty() {
            return;
        }
        let daemon = self.daemons[rng.random_range(0..self.daemons.len())];
        if self.has_lists && rng.random_bool(0.2) {
            return self.list(daemon, rng).await;
        }
        let is_items = self.table == "items";
        let id = if is_items { self.traffic.any(rng) } else { rng.random_range(1..=BIN_IDS) };
        let target = format!("/v1/tables/{}/{id}", self.table);
        let Some(answer) = self.ask(daemon, &target).await else { return };
        match answer.status {
            200 => {
                self.hits += 1;
                let row: Hash = serde_json::from_str(&answer.body).unwrap();
                self.row(id, &row, &answer);
            }
            404 if is_items && self.traffic.stays(id) => {
                self.violation(format!("{id} is there, and was called missing: {answer:?}"))
            }
            404 => {
                self.misses += 1;
                if let Some(Seen::There(version) | Seen::Gone(version)) = self.seen.get(&id).copied() {
                    self.seen.insert(id, Seen::Gone(version));
                }
            }
            _ => self.no_row(&answer),
        }
    }

    /// Reads the newest rows of a list.
    async fn list(&mut self, daemon: SocketAddr, rng: &mut StdRng) {
        let flag = ["true", "false"][rng.random_range(0..2)];
        let target = format!("/v1/lookups/items/by_flag/{flag}?order=desc&limit=20");
        let Some(answer) = self.ask(daemon, &target).await else { return };
        if answer.status != 200 {
            return self.no_row(&answer);
        }
        let list = answer.json();
        let rows: Vec<Hash> = serde_json::from_value(list["rows"].clone()).unwrap();
        let versions: Vec<u64> = rows.iter().map(|row| row["version"].parse().unwrap()).collect();
        // Over several hash slots, while rows leave the list.
        let is_whole = rows.len() == 20 || answer.header("prefetchd-consistent") == Some("false");
        if !versions.iter().rev().is_sorted() || rows.iter().any(|row| row["flag"] != flag) || !is_whole {
            self.violation(format!("a wrong list: {answer:?}"));
        }
        for row in rows {
            self.hits += 1;
            self.row(row["id"].parse().unwrap(), &row, &answer);
        }
    }

    async fn ask(&mut self, daemon: SocketAddr, target: &str) -> Option<Answer> {
        let asked = super::request(daemon, "GET", target);
        let answer = tokio::time::timeout(Duration::from_secs(5), asked).await.ok().and_then(Result::ok);
        if answer.is_none() {
            *self.refused.entry("no answer".to_owned()).or_default() += 1;
        }
        answer
    }

    fn row(&mut self, id: u64, row: &Hash, answer: &Answer) {
        let Some(version) = version_of(ITEM, row) else { return self.violation(format!("torn: {id} is {row:?}")) };
        match self.seen.get(&id).and_then(|before| before.contradicts(version)) {
            Some(how) => self.violation(format!("{id} {how}, {answer:?}")),
            None => _ = self.seen.insert(id, Seen::There(version)),
        }
    }

    fn no_row(&mut self, answer: &Answer) {
        match answer.status {
            503 | 504 => {
                let code = answer.refusal().1;
                if self.may_go_back && code == "healing" {
                    self.seen.clear();
                }
                *self.refused.entry(code).or_default() += 1;
            }
            _ => self.violation(format!("{answer:?}")),
        }
    }

    fn violation(&mut self, what: String) {
        if self.violations.len() < VIOLATIONS_KEPT {
            eprintln!("{what}");
            self.violations.push(what);
        }
    }
}
