//! The actions behind the buttons of the demo's page: they change rows in Postgres and, to show how the cache heals,
//! break the cache behind the daemon's back.
//!
//! The daemon does not know about it. This module uses only what anybody can: the daemon's status, its routes, the keys
//! in Redis. It breaks only servers that the demo started; on servers that the user provided, it changes rows and
//! nothing else.

use crate::checkpoint::TableState;
use crate::cli::servers::{self, Cluster, ServerError};
use crate::command::Key;
use crate::daemon::Daemon;
use crate::demo::{ASKED_HELD, DemoRefusal, DemoRequest};
use crate::format::Format;
use crate::lanes::Lane;
use crate::lsn::Lsn;
use crate::sink::SinkError;
use crate::sink::any_reader::AnyReader;
use crate::sink::reader::StoredRow;
use crate::source::connect::{self, PostgresClient};
use crate::source::target::PostgresTarget;
use crate::status::State;
use bytes::Bytes;
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_postgres::Client;
use tokio_postgres::types::ToSql;

const CATEGORY: &str = "cache:category:";
const PROMOTION: &str = "cache:promotion:";
/// Its master is the one that is emptied or frozen.
const FIRST: &str = "cache:category:cat-001";
/// The key of a row that no table has.
const GHOST: &str = "cache:category:cat-ghost";
/// The most rows that are compared on the page.
const ROWS_SHOWN: i64 = 200;
const BURST: i32 = 10_000;
const WRITES: i32 = 50;
/// What takes longer than this to heal, even on a slow machine, never heals.
const PATIENCE: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(20);
/// How long keys are looked for.
const WALK_PATIENCE: Duration = Duration::from_millis(500);

/// The Redis of the demo. One of its own may be emptied and restarted, or a replica may take over.
#[derive(Clone)]
pub(super) enum DemoRedis {
    /// The user provided it.
    Given,
    One(Arc<Mutex<servers::Redis>>),
    Cluster(Arc<Mutex<Cluster>>),
}

pub(super) struct DemoDesk {
    pub daemon: Daemon,
    /// With a role that may write.
    pub postgres: PostgresTarget,
    pub reader: AnyReader,
    pub redis: DemoRedis,
    pub has_promotions: bool,
    /// A line to paste into a shell, which changes a row.
    pub psql: String,
    /// A line to paste into a shell, which moves hash slots of the demo's own cluster.
    pub reshard: Option<String>,
    /// The action whose healing must be observed before the next one may start.
    pub under_way: Arc<Mutex<Option<&'static str>>>,
}

pub(super) fn channel() -> (mpsc::Sender<DemoRequest>, mpsc::Receiver<DemoRequest>) {
    mpsc::channel(ASKED_HELD)
}

/// Performs the requested actions concurrently, until dropped.
pub(super) async fn serve(desk: DemoDesk, mut asked: mpsc::Receiver<DemoRequest>) {
    let desk = Arc::new(desk);
    let mut acts = JoinSet::new();
    while let Some(DemoRequest { action, with, answer }) = asked.recv().await {
        while acts.try_join_next().is_some() {}
        let desk = Arc::clone(&desk);
        acts.spawn(async move {
            // The client may have disconnected.
            let _ = answer.send(desk.act(&action, &with).await);
        });
    }
}

type Done = Result<Value, DemoRefusal>;

impl DemoDesk {
    async fn act(&self, action: &str, with: &Map<String, Value>) -> Done {
        match action {
            "state" => self.state().await,
            "add" => self.add(with).await,
            "update" => self.update(with).await,
            "delete" => self.delete(with).await,
            "ghost" => self.alone("the planting of a key", self.ghost()).await,
            "flushall" => self.alone("the healing after FLUSHALL", self.flushall()).await,
            "restart-redis" => self.alone("the restart of Redis", self.restart_redis()).await,
            "fail-over" => self.alone("the failover of a master", self.fail_over()).await,
            "kill-replication" => self.alone("the end of the replication connection", self.kill_replication()).await,
            "burst" => self.alone("the burst of updates", self.burst()).await,
            "two-tables" => self.alone("the transaction over two tables", self.two_tables()).await,
            "read-your-writes" => self.alone("the reading of one's own writes", self.read_your_writes()).await,
            other => Err(DemoRefusal::Unknown(other.to_owned())),
        }
    }

    /// One at a time, because otherwise it would be unclear what healed.
    async fn alone(&self, what: &'static str, act: impl Future<Output = Done>) -> Done {
        {
            let mut under_way = self.under_way.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(other) = *under_way {
                return Err(DemoRefusal::Busy(other.to_owned()));
            }
            *under_way = Some(what);
        }
        let _over = Over(Arc::clone(&self.under_way));
        act.await
    }

    // -------------------------------------------------------------------------------------------- both sides

    /// Always succeeds, because the state includes servers that are unavailable.
    async fn state(&self) -> Done {
        let (rows, unreadable) = match self.differences().await {
            Ok(rows) => (Some(rows), None),
            Err(why) => (None, Some(why.to_string())),
        };
        Ok(json!({
            "rows": rows,
            "unreadable": unreadable,
            "redis": match self.redis {
                DemoRedis::Given => "given",
                DemoRedis::One(_) => "one",
                DemoRedis::Cluster(_) => "cluster",
            },
            "promotions": self.has_promotions,
            "psql": self.psql,
            "reshard": self.reshard,
        }))
    }

    /// Ignores differences that disappear within the next moments, while changes are in flight.
    async fn differences(&self) -> Result<Vec<Value>, DemoRefusal> {
        let first = self.compare().await?;
        if first.iter().all(|row| row["note"] == "") {
            return Ok(first);
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
        let mut second = self.compare().await?;
        for row in &mut second {
            if !first.iter().any(|before| before["id"] == row["id"] && before["note"] == row["note"]) {
                row["note"] = "".into();
            }
        }
        Ok(second)
    }

    /// Returns every category that Postgres or the cache has, how it differs, and in a cluster where it is.
    async fn compare(&self) -> Result<Vec<Value>, DemoRefusal> {
        let mut sides: BTreeMap<String, [Option<String>; 2]> = BTreeMap::new();
        let client = self.client().await?;
        let sql = "SELECT id, name FROM public.categories ORDER BY id LIMIT $1";
        for row in client.client.query(sql, &[&ROWS_SHOWN]).await.map_err(by_postgres)? {
            sides.entry(row.get(0)).or_default()[0] = Some(row.get(1));
        }
        let mut keys: BTreeSet<Key> = sides.keys().map(|id| key(CATEGORY, id)).collect();
        self.find(&mut keys).await;
        for (id, name) in self.cached(keys).await? {
            sides.entry(id).or_default()[1] = Some(name);
        }
        let note = |sides: &[Option<String>; 2]| match sides {
            [Some(_), None] => "missing from the cache",
            [None, Some(_)] => "orphaned in the cache",
            [postgres, cache] if postgres != cache => "stale in the cache",
            _ => "",
        };
        let mut rows = Vec::new();
        for (id, both) in &sides {
            let place = self.reader.place_of(&key(CATEGORY, id)).await.map_err(by_redis)?;
            let place = place.map(|(lane, node)| format!("slot {lane}, port {}", node.port));
            rows.push(json!({"id": id, "postgres": both[0], "cache": both[1], "note": note(both), "place": place}));
        }
        Ok(rows)
    }

    /// Adds the keys of categories in Redis. While hash slots of a cluster are moving, which a complete walk would wait
    /// for, it may miss keys; what else goes wrong goes wrong for whoever reads the rows, too.
    async fn find(&self, keys: &mut BTreeSet<Key>) {
        let mut cursor = 0;
        let all = async {
            loop {
                let (next, page) = self.reader.scan_page(CATEGORY.as_bytes(), cursor).await?;
                keys.extend(page);
                cursor = next;
                if cursor == 0 || keys.len() as i64 >= ROWS_SHOWN {
                    return Ok::<_, SinkError>(());
                }
            }
        };
        let _ = tokio::time::timeout(WALK_PATIENCE, all).await;
    }

    /// Returns the names of those categories that are in Redis, by ID.
    async fn cached(&self, keys: BTreeSet<Key>) -> Result<BTreeMap<String, String>, DemoRefusal> {
        let keys: Vec<Key> = keys.into_iter().collect();
        let read = self.reader.rows("categories", Format::Hash, &keys).await.map_err(by_redis)?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let name = |row: StoredRow| match row {
            StoredRow::Fields(fields) => fields.iter().find(|(field, _)| field == "name").map(|(_, name)| text(name)),
            StoredRow::Document(_) => None,
        };
        let rows = keys.iter().zip(read.rows);
        Ok(rows
            .filter_map(|(key, row)| {
                let id = text(key.as_bytes().get(CATEGORY.len()..).unwrap_or_default());
                Some((id, name(row?).unwrap_or_default()))
            })
            .collect())
    }

    // -------------------------------------------------------------------------------------------- rows

    async fn add(&self, with: &Map<String, Value>) -> Done {
        let (id, name) = (text(with, "id")?, text(with, "name")?);
        let order = optional(with, "display_order");
        self.write(
            "INSERT INTO public.categories (id, name, display_order, featured) VALUES ($1, $2, $3::text::integer, false)",
            &[&id, &name, &order],
        )
        .await
    }

    async fn update(&self, with: &Map<String, Value>) -> Done {
        let (id, field) = (text(with, "id")?, text(with, "field")?);
        let value = optional(with, "value");
        let sql = match field.as_str() {
            "name" => "UPDATE public.categories SET name = coalesce($2::text, '') WHERE id = $1",
            "display_order" => "UPDATE public.categories SET display_order = $2::text::integer WHERE id = $1",
            "featured" => "UPDATE public.categories SET featured = $2::text::boolean WHERE id = $1",
            "parent_id" => "UPDATE public.categories SET parent_id = $2 WHERE id = $1",
            other => return Err(DemoRefusal::Wrong(format!("there is no field {other:?} that can be changed"))),
        };
        self.write(sql, &[&id, &value]).await
    }

    async fn delete(&self, with: &Map<String, Value>) -> Done {
        self.write("DELETE FROM public.categories WHERE id = $1", &[&text(with, "id")?]).await
    }

    /// Executes a statement that changes one row, and measures how long after the commit the cache has the change.
    async fn write(&self, sql: &str, values: &[&(dyn ToSql + Sync)]) -> Done {
        let client = self.client().await?;
        if client.client.execute(sql, values).await.map_err(by_postgres)? == 0 {
            return Err(DemoRefusal::Refused("there is no such row in Postgres".to_owned()));
        }
        let committed = Instant::now();
        let lsn = self.applied(&client.client).await?;
        Ok(json!({"lsn": lsn.to_string(), "applied_ms": millis(committed)}))
    }

    // -------------------------------------------------------------------------------------------- what breaks it

    async fn ghost(&self) -> Done {
        self.at_server_of(GHOST, &["HSET", GHOST, "id", "cat-ghost", "name", "Ghost"]).await?;
        Ok(json!({"key": GHOST}))
    }

    async fn flushall(&self) -> Done {
        let began = Instant::now();
        self.at_server_of(FIRST, &["FLUSHALL"]).await?;
        self.healed().await?;
        Ok(json!({"healed_ms": millis(began)}))
    }

    async fn restart_redis(&self) -> Done {
        let DemoRedis::One(redis) = &self.redis else { return Err(self.has_no("single Redis")) };
        let began = Instant::now();
        with(redis, servers::Redis::restart).await?;
        self.healed().await?;
        Ok(json!({"healed_ms": millis(began)}))
    }

    /// Freezes a master until its replica has taken over. Then it becomes that one's replica.
    async fn fail_over(&self) -> Done {
        let DemoRedis::Cluster(cluster) = &self.redis else { return Err(self.has_no("cluster")) };
        let lane = Lane::of(FIRST.as_bytes());
        let drift = differing(&self.differences().await?);
        let began = Instant::now();
        let frozen = with(cluster, move |cluster| {
            let master = cluster.master_of(lane)?;
            cluster.freeze(master);
            Ok(master)
        });
        let frozen = frozen.await?;
        let taken_over = async {
            let patience = Patience::new("no replica has taken over");
            loop {
                match with(cluster, move |cluster| cluster.master_of(lane)).await? {
                    master if master == frozen => patience.wait().await?,
                    master => return Ok(master),
                }
            }
        };
        let taken_over = taken_over.await;
        let thawed = with(cluster, |cluster| {
            cluster.thaw();
            Ok(())
        });
        thawed.await?;
        let master = taken_over?;
        self.healed_but_for(&drift).await?;
        let healed_ms = millis(began);
        let patience = Patience::new("the old master has not become a replica");
        while !with(cluster, move |cluster| cluster.is_replica(frozen)).await? {
            patience.wait().await?;
        }
        let ports = with(cluster, move |cluster| Ok([frozen, master].map(|node| cluster.port(node)))).await?;
        Ok(json!({"healed_ms": healed_ms, "old_port": ports[0], "new_port": ports[1]}))
    }

    async fn kill_replication(&self) -> Done {
        let client = self.client().await?;
        let slot = self.daemon.status.borrow().source.as_ref().map(|source| source.slot.clone());
        let slot =
            slot.ok_or_else(|| DemoRefusal::Refused("there is no replication connection at the moment".to_owned()))?;
        let before = reader_of(&client.client, &slot).await?;
        let pid = before
            .ok_or_else(|| DemoRefusal::Refused("nothing is reading the slot at the moment: try again".to_owned()))?;
        let began = Instant::now();
        client.client.execute("SELECT pg_terminate_backend($1)", &[&pid]).await.map_err(by_postgres)?;
        let patience = Patience::new("the replication connection was not re-established");
        while reader_of(&client.client, &slot).await?.is_none_or(|now| now == pid) || !self.is_streaming() {
            patience.wait().await?;
        }
        self.applied(&client.client).await?;
        Ok(json!({"healed_ms": millis(began)}))
    }

    /// Increments as often as it decrements, so every row ends unchanged.
    async fn burst(&self) -> Done {
        let client = self.client().await?;
        let ids = self.ids(&client.client).await?;
        let quoted: Vec<String> = ids.iter().map(|id| format!("'{}'", id.replace('\'', "''"))).collect();
        let sql = format!(
            "DO $$ DECLARE ids text[] := ARRAY[{}]; half integer := {BURST} / 2; BEGIN
             FOR i IN 0 .. {BURST} - 1 LOOP
                 UPDATE public.categories
                 SET display_order = coalesce(display_order, 0) + CASE WHEN i < half THEN 1 ELSE -1 END
                 WHERE id = ids[1 + (i % half) % cardinality(ids)];
                 COMMIT;
             END LOOP; END $$",
            quoted.join(", ").replace('$', "' || chr(36) || '")
        );
        let began = Instant::now();
        client.client.batch_execute(&sql).await.map_err(by_postgres)?;
        let written_ms = millis(began);
        let committed = Instant::now();
        self.applied(&client.client).await?;
        Ok(json!({"updates": BURST, "written_ms": written_ms, "applied_ms": millis(committed)}))
    }

    /// A reader sees both changes or neither.
    async fn two_tables(&self) -> Done {
        if !self.has_promotions {
            return Err(DemoRefusal::NotOurs("the Postgres that you provided has no table promotions".to_owned()));
        }
        let mut client = self.client().await?;
        let transaction = client.client.transaction().await.map_err(by_postgres)?;
        let sql = "SELECT id, coalesce(featured, false) FROM public.categories ORDER BY id LIMIT 1 FOR UPDATE";
        let row = transaction.query_opt(sql, &[]).await.map_err(by_postgres)?;
        let row = row.ok_or_else(|| DemoRefusal::Refused("there is no category to promote".to_owned()))?;
        let (id, featured): (String, bool) = (row.get(0), row.get(1));
        let promotion = format!("promo-{}", jiff::Timestamp::now().as_millisecond());
        let insert = "INSERT INTO public.promotions (id, category_id, headline) VALUES ($1, $2, 'New: ' || $2::text)";
        transaction.execute("DELETE FROM public.promotions", &[]).await.map_err(by_postgres)?;
        transaction.execute(insert, &[&promotion, &id]).await.map_err(by_postgres)?;
        let feature = "UPDATE public.categories SET featured = $2 WHERE id = $1";
        transaction.execute(feature, &[&id, &!featured]).await.map_err(by_postgres)?;

        let keys = [key(PROMOTION, &promotion), key(CATEGORY, &id)];
        let looking = async {
            let (mut looks, mut half) = (0_u64, 0_u64);
            let deadline = Instant::now() + PATIENCE;
            loop {
                let read = self.reader.rows("categories", Format::Hash, &keys).await.map_err(by_redis)?;
                let fields = match read.rows.get(1) {
                    Some(Some(StoredRow::Fields(fields))) => &fields[..],
                    _ => &[],
                };
                let now = fields.iter().find(|(name, _)| name == "featured").map(|(_, value)| value == "true");
                let (promoted, featured) = (read.rows.first().is_some_and(Option::is_some), now == Some(!featured));
                looks += 1;
                half += u64::from(promoted != featured);
                if promoted && featured {
                    return Ok((looks, half));
                }
                if Instant::now() > deadline {
                    return Err(DemoRefusal::Refused("the transaction was not applied".to_owned()));
                }
            }
        };
        let committing = async {
            transaction.commit().await.map_err(by_postgres)?;
            Ok(Instant::now())
        };
        let ((looks, half), committed) = tokio::try_join!(looking, committing)?;
        Ok(json!({"looks": looks, "half": half, "applied_ms": millis(committed), "category": id}))
    }

    /// Reads each write over HTTP at once, both without and with the position of the write.
    async fn read_your_writes(&self) -> Done {
        let client = self.client().await?;
        let ids = self.ids(&client.client).await?;
        let id = ids.first().cloned().unwrap_or_default();
        let sql = "SELECT coalesce(display_order, 0) FROM public.categories WHERE id = $1";
        let before: i32 = client.client.query_one(sql, &[&id]).await.map_err(by_postgres)?.get(0);
        let path = percent_encoding::utf8_percent_encode(&id, percent_encoding::NON_ALPHANUMERIC);
        let url = format!("http://{}/v1/tables/categories/{path}", self.daemon.listen);
        let config = ureq::Agent::config_builder().http_status_as_error(false).proxy(None);
        let agent = ureq::Agent::new_with_config(config.timeout_global(Some(PATIENCE)).build());
        let mut tally = [(0_u32, Duration::ZERO); 2];
        for n in 1..=WRITES {
            let value = if n == WRITES { before } else { before.wrapping_add(n) };
            let update = "UPDATE public.categories SET display_order = $2 WHERE id = $1";
            client.client.execute(update, &[&id, &value]).await.map_err(by_postgres)?;
            let lsn = position(&client.client).await?;
            let both = [url.clone(), format!("{url}?min_lsn={lsn}&wait=30s")].map(|url| {
                let agent = agent.clone();
                tokio::task::spawn_blocking(move || display_order(&agent, &url))
            });
            let both: Vec<_> = futures_util::future::join_all(both).await;
            for ((stale, time), read) in tally.iter_mut().zip(both) {
                let (read, took) = read.map_err(|error| DemoRefusal::Refused(error.to_string()))??;
                *stale += u32::from(read != value.to_string());
                *time += took;
            }
        }
        let [plain, waiting] =
            tally.map(|(stale, time)| json!({"stale": stale, "read_ms": rounded(time / WRITES.unsigned_abs())}));
        Ok(json!({"writes": WRITES, "off": plain, "on": waiting}))
    }

    // -------------------------------------------------------------------------------------------- helpers

    async fn client(&self) -> Result<PostgresClient, DemoRefusal> {
        let client = connect::connect(&self.postgres, "prefetchd_demo").await;
        client.map_err(|error| DemoRefusal::Refused(error.to_string()))
    }

    async fn ids(&self, client: &Client) -> Result<Vec<String>, DemoRefusal> {
        let sql = "SELECT id FROM public.categories ORDER BY id LIMIT 100";
        let rows = client.query(sql, &[]).await.map_err(by_postgres)?;
        if rows.is_empty() {
            return Err(DemoRefusal::Refused("there is no category left: add one".to_owned()));
        }
        Ok(rows.iter().map(|row| row.get(0)).collect())
    }

    /// Executes a command on the demo's own Redis; in a cluster, on the master of the key.
    async fn at_server_of(&self, key: &str, words: &'static [&'static str]) -> Result<(), DemoRefusal> {
        let lane = Lane::of(key.as_bytes());
        match &self.redis {
            DemoRedis::Given => Err(self.has_no("own Redis")),
            DemoRedis::One(redis) => with(redis, |redis| redis.command(words)).await,
            DemoRedis::Cluster(cluster) => {
                with(cluster, move |cluster| cluster.command(cluster.master_of(lane)?, words)).await
            }
        }
    }

    fn has_no(&self, what: &str) -> DemoRefusal {
        match self.redis {
            DemoRedis::Given => {
                DemoRefusal::NotOurs("you provided this Redis, so the demo does not break it".to_owned())
            }
            DemoRedis::One(_) | DemoRedis::Cluster(_) => DemoRefusal::Refused(format!("this demo has no {what}")),
        }
    }

    /// Waits until everything that is committed now is in Redis.
    async fn applied(&self, client: &Client) -> Result<Lsn, DemoRefusal> {
        let lsn = position(client).await?;
        let mut status = self.daemon.status.clone();
        let arrived = async {
            loop {
                {
                    let now = status.borrow_and_update();
                    let segment = now.source.as_ref().map_or(0, |source| source.wal_segment_bytes);
                    if now.applied.is_some_and(|applied| applied.0 >= lsn.before_page_header(segment)) {
                        return;
                    }
                }
                self.daemon.position_wanted.notify_one();
                let _ = tokio::time::timeout(POLL, status.changed()).await;
            }
        };
        let late = |_| DemoRefusal::Refused("it is committed, but not in the cache yet".to_owned());
        tokio::time::timeout(PATIENCE, arrived).await.map_err(late)?;
        Ok(lsn)
    }

    fn is_streaming(&self) -> bool {
        let status = self.daemon.status.borrow();
        status.state == State::Streaming && status.tables.iter().all(|t| t.state == Some(TableState::Loaded))
    }

    /// Waits until the cache equals Postgres again.
    async fn healed(&self) -> Result<(), DemoRefusal> {
        self.healed_but_for(&BTreeSet::new()).await
    }

    /// `drift`: rows whose difference has another cause, which nothing but verify mends.
    async fn healed_but_for(&self, drift: &BTreeSet<String>) -> Result<(), DemoRefusal> {
        let patience = Patience::new("it has not healed");
        loop {
            // Redis may be unavailable meanwhile.
            let rows = self.compare().await.unwrap_or_default();
            if !rows.is_empty() && differing(&rows).is_subset(drift) && self.is_streaming() {
                return Ok(());
            }
            patience.wait().await?;
        }
    }
}

/// Returns the IDs of rows that are not the same on both sides.
fn differing(rows: &[Value]) -> BTreeSet<String> {
    rows.iter().filter(|row| row["note"] != "").map(|row| row["id"].to_string()).collect()
}

/// Does what may block to a server.
async fn with<S: Send + 'static, R: Send + 'static>(
    server: &Arc<Mutex<S>>,
    act: impl FnOnce(&mut S) -> Result<R, ServerError> + Send + 'static,
) -> Result<R, DemoRefusal> {
    let server = Arc::clone(server);
    let done = tokio::task::spawn_blocking(move || act(&mut server.lock().unwrap_or_else(PoisonError::into_inner)));
    let done = done.await.map_err(|error| DemoRefusal::Refused(error.to_string()))?;
    done.map_err(|error| DemoRefusal::Refused(error.to_string()))
}

/// Clears the action in progress when dropped, even if nobody waits for it any more.
struct Over(Arc<Mutex<Option<&'static str>>>);

impl Drop for Over {
    fn drop(&mut self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

/// A wait with a time limit.
struct Patience {
    until: Instant,
    otherwise: &'static str,
}

impl Patience {
    fn new(otherwise: &'static str) -> Self {
        Self { until: Instant::now() + PATIENCE, otherwise }
    }

    async fn wait(&self) -> Result<(), DemoRefusal> {
        if Instant::now() > self.until {
            return Err(DemoRefusal::Refused(format!("{} after {} s", self.otherwise, PATIENCE.as_secs())));
        }
        tokio::time::sleep(POLL).await;
        Ok(())
    }
}

/// Returns the PID of the walsender that reads the slot.
async fn reader_of(client: &Client, slot: &str) -> Result<Option<i32>, DemoRefusal> {
    let sql = "SELECT active_pid FROM pg_catalog.pg_replication_slots WHERE slot_name = $1::text";
    let row = client.query_opt(sql, &[&slot]).await.map_err(by_postgres)?;
    Ok(row.and_then(|row| row.get(0)))
}

/// Returns the current position as an application takes it after a commit.
async fn position(client: &Client) -> Result<Lsn, DemoRefusal> {
    let sql = "SELECT pg_current_wal_insert_lsn()::text";
    let text: String = client.query_one(sql, &[]).await.map_err(by_postgres)?.get(0);
    text.parse().map_err(|_| DemoRefusal::Refused(format!("Postgres calls its position {text:?}")))
}

/// Returns the value read over HTTP, and how long the read took.
fn display_order(agent: &ureq::Agent, url: &str) -> Result<(String, Duration), DemoRefusal> {
    let began = Instant::now();
    let refused = |error: ureq::Error| DemoRefusal::Refused(error.to_string());
    let text = agent.get(url).call().map_err(refused)?.body_mut().read_to_string().map_err(refused)?;
    let row: Value = serde_json::from_str(&text).unwrap_or_default();
    match row["display_order"].as_str() {
        Some(value) => Ok((value.to_owned(), began.elapsed())),
        None => Err(DemoRefusal::Refused(format!("a read answered {text}"))),
    }
}

fn key(prefix: &str, id: &str) -> Key {
    Key(Bytes::from(format!("{prefix}{id}")))
}

fn text(with: &Map<String, Value>, name: &str) -> Result<String, DemoRefusal> {
    let text = with.get(name).and_then(Value::as_str).filter(|text| !text.is_empty());
    text.map(str::to_owned).ok_or_else(|| DemoRefusal::Wrong(format!("{name:?} is missing or not a string")))
}

/// A missing value is NULL.
fn optional(with: &Map<String, Value>, name: &str) -> Option<String> {
    with.get(name).and_then(Value::as_str).filter(|text| !text.is_empty()).map(str::to_owned)
}

fn by_postgres(error: tokio_postgres::Error) -> DemoRefusal {
    let text = error.as_db_error().map_or_else(|| error.to_string(), |db| db.message().to_owned());
    DemoRefusal::Refused(format!("Postgres: {text}"))
}

fn by_redis(error: SinkError) -> DemoRefusal {
    DemoRefusal::Refused(format!("Redis: {error}"))
}

fn millis(since: Instant) -> f64 {
    rounded(since.elapsed())
}

fn rounded(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e4).round() / 10.0
}
