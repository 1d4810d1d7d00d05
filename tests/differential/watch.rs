//! A reader that keeps reading every key of every table: no row goes backwards, is torn, or comes back with the version
//! with which it disappeared.

use crate::harness::Redis;
use crate::harness::traffic::{SALT, patient};
use postgres_protocol::authentication::md5_hash;
use redis::aio::MultiplexedConnection;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use tokio::task::JoinHandle;

pub type Hash = BTreeMap<String, String>;

/// What the watcher needs to know about a table.
#[derive(Debug, Clone)]
pub struct Watched {
    pub literal: String,
    /// The field that holds `body`.
    pub body: String,
    /// The list of all its rows, by version.
    pub list: Option<String>,
}

pub struct Watcher {
    stop: Arc<AtomicBool>,
    /// Tables whose rows come and go unchanged: whole partitions, and rows excluded by a new filter.
    lenient: Arc<AtomicBool>,
    found: Arc<Mutex<Vec<String>>>,
    task: JoinHandle<u64>,
}

impl Watcher {
    pub async fn start(redis: &Redis, tables: Vec<Watched>) -> Self {
        let (stop, found) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Vec::new())));
        let lenient = Arc::new(AtomicBool::new(false));
        let mut connection = patient(&redis.url()).await.unwrap();
        let mut eyes =
            Eyes { seen: BTreeMap::new(), found: Arc::clone(&found), lenient: Arc::clone(&lenient), looks: 0 };
        let stopped = Arc::clone(&stop);
        let task = tokio::spawn(async move {
            while !stopped.load(Ordering::Relaxed) {
                for table in &tables {
                    eyes.look(&mut connection, table).await;
                }
                tokio::task::yield_now().await;
            }
            eyes.looks
        });
        Self { stop, lenient, found, task }
    }

    /// From now on rows may disappear and come back unchanged.
    pub fn forgive_returns(&self) {
        self.lenient.store(true, Ordering::Relaxed);
    }

    pub fn found(&self) -> Vec<String> {
        self.found.lock().unwrap().clone()
    }

    /// Returns how many rows it has read.
    pub async fn stop(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.task.await.unwrap()
    }
}

enum Seen {
    There(u64),
    Gone(u64),
}

struct Eyes {
    seen: BTreeMap<String, Seen>,
    found: Arc<Mutex<Vec<String>>>,
    lenient: Arc<AtomicBool>,
    looks: u64,
}

impl Eyes {
    async fn look(&mut self, connection: &mut MultiplexedConnection, table: &Watched) {
        let mut keys: BTreeSet<String> = keys(connection, &table.literal).await.into_iter().collect();
        let known = self.seen.range(table.literal.clone()..).map(|(key, _)| key);
        keys.extend(known.take_while(|key| key.starts_with(&table.literal)).cloned());
        let mut pipe = redis::pipe();
        pipe.atomic();
        for key in &keys {
            pipe.hgetall(key);
        }
        if keys.is_empty() {
            return;
        }
        if let Some(list) = &table.list {
            pipe.zrange_withscores(list, 0, -1);
        }
        let mut answers: Vec<redis::Value> = pipe.query_async(connection).await.unwrap();
        let listed: Option<BTreeMap<String, f64>> =
            table.list.as_ref().map(|_| redis::from_redis_value(answers.pop().unwrap()).unwrap());
        let hashes = answers.into_iter().map(|answer| redis::from_redis_value::<Hash>(answer).unwrap());
        for (key, hash) in keys.into_iter().zip(hashes) {
            self.looks += 1;
            let version = hash.get("version").map(|version| version.parse::<f64>().unwrap());
            if let Some(listed) = &listed
                && listed.get(key.strip_prefix(&table.literal).unwrap()).copied() != version
            {
                self.say(format!("{key} and its list disagree: {hash:?}"));
            }
            self.row(table, key, &hash);
        }
    }

    fn row(&mut self, table: &Watched, key: String, hash: &Hash) {
        let before = self.seen.get(&key);
        if hash.is_empty() {
            if let Some(Seen::There(version) | Seen::Gone(version)) = before {
                self.seen.insert(key, Seen::Gone(*version));
            }
            return;
        }
        let value = |field: &str| hash.get(field).map_or("", String::as_str);
        let text = [value("version"), value(&table.body), value("large")].join("|");
        let version: u64 = value("version").parse().unwrap_or_default();
        if value("sum") != md5_hash(b"", text.as_bytes(), SALT) {
            self.say(format!("torn: {key} is {hash:?}"));
        }
        match before {
            Some(Seen::There(last)) if version < *last => {
                self.say(format!("backwards: {key} has version {version} after {last}: {hash:?}"));
            }
            Some(Seen::Gone(last))
                if version < *last || (version == *last && !self.lenient.load(Ordering::Relaxed)) =>
            {
                self.say(format!("came back: {key} has version {version}, and was gone after {last}: {hash:?}"));
            }
            _ => {}
        }
        self.seen.insert(key, Seen::There(version));
    }

    fn say(&self, what: String) {
        eprintln!("{what:.2000}");
        self.found.lock().unwrap().push(what);
    }
}

/// Returns every key with this prefix.
pub async fn keys(connection: &mut MultiplexedConnection, literal: &str) -> Vec<String> {
    let escaped: String =
        literal.chars().flat_map(|c| if "*?[]\\".contains(c) { vec!['\\', c] } else { vec![c] }).collect();
    let (mut all, mut cursor) = (Vec::new(), 0_u64);
    loop {
        let mut scan = redis::cmd("SCAN");
        scan.arg(cursor).arg("MATCH").arg(format!("{escaped}*")).arg("COUNT").arg(1000);
        let (next, page): (u64, Vec<String>) = scan.query_async(connection).await.unwrap();
        all.extend(page);
        cursor = next;
        if cursor == 0 {
            return all;
        }
    }
}
