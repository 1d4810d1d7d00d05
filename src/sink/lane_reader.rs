//! Reads rows of a cluster, those of a lane between two readings of its mark, and all of them between two readings of the
//! record.
//!
//! What the record says of a table holds for rows that were read between two readings in which it says the same. What it
//! says of a lane holds if the lane's mark bears it out: a node that lost something has no mark, or an earlier one. Rows
//! of several lanes are of one moment if no mark is later than the record before them. A mistake here would show the rows
//! of a node that went back, report a lost row as one that does not exist, or half of a transaction as all of it.

use super::connect::{HostPort, RedisTarget};
use super::list_reader::ListReader;
use super::moves::{self, Masters};
use super::reader::{ATTEMPTS, Moments, READ_TIMEOUT, Read, Reader, RunId, StoredRow, failure, restless};
use super::topology::{Node, Topology};
use super::{ErrorReply, Request, SinkError, Stored};
use crate::command::{DeadKey, Key};
use crate::format::Format;
use crate::lanes::Lane;
use crate::lanes::mark::Home;
use crate::lanes::reading::{Around, Doubt, Held, Listing, Seen, Shown, as_of, healing};
use crate::lanes::tags::{mark_key, unused_key};
use crate::resp::batch::OwnKeys;
use futures_util::future::join_all;
use redis::{Cmd, Value};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// The delay before a read is repeated because a slot has moved, or is moving.
const PAUSE: Duration = Duration::from_millis(20);
/// How long the masters are taken to be the same without any sign that they are not.
const KNOWN_FOR: Duration = Duration::from_secs(10);
/// Lanes in one request.
const LANES_PAGE: usize = 4096;

/// The connections for reads, shared by all clones.
#[derive(Clone)]
pub struct LaneReader(Arc<Shared>);

struct Shared {
    target: RedisTarget,
    own: OwnKeys,
    slot: String,
    record: Reader,
    masters: tokio::sync::Mutex<Known>,
    /// Whether these connections take one call at a time.
    batches: bool,
    seen: Arc<Mutex<Seen>>,
}

#[derive(Default)]
struct Known {
    /// In the order of the topology.
    all: Vec<Master>,
    /// Increases whenever the topology changes; 0 before it is known.
    generation: u64,
    /// When it was last known to be this one.
    discovered: Option<Instant>,
}

#[derive(Clone)]
struct Master {
    node: Node,
    reader: Reader,
}

/// A cursor consists of the number of the topology, that of the node, and the node's own cursor.
struct Cursor {
    generation: u64,
    node: usize,
    inner: u64,
}

impl Cursor {
    const NODE_BITS: u32 = 10;
    const INNER_BITS: u32 = 46;
    const GENERATIONS: u64 = 1 << (u64::BITS - Self::NODE_BITS - Self::INNER_BITS);

    fn of(packed: u64) -> Self {
        Cursor {
            generation: packed >> (Self::NODE_BITS + Self::INNER_BITS),
            node: (packed >> Self::INNER_BITS) as usize & ((1 << Self::NODE_BITS) - 1),
            inner: packed & ((1 << Self::INNER_BITS) - 1),
        }
    }

    fn packed(&self) -> u64 {
        (self.generation << (Self::NODE_BITS + Self::INNER_BITS))
            | ((self.node as u64) << Self::INNER_BITS)
            | self.inner
    }
}

impl LaneReader {
    /// Opens no connection yet. `slot`: the name of the replication slot.
    pub fn connect_lazy(target: &RedisTarget, own: &OwnKeys, slot: &str) -> Self {
        let record = Reader::connect_lazy(target, own);
        Self::with(target.clone(), own.clone(), slot.to_owned(), record, false)
    }

    /// See [`Reader::for_batches`].
    pub fn for_batches(&self) -> Self {
        let Shared { target, own, slot, record, .. } = &*self.0;
        Self::with(target.clone(), own.clone(), slot.clone(), record.for_batches(), true)
    }

    fn with(target: RedisTarget, own: OwnKeys, slot: String, record: Reader, batches: bool) -> Self {
        let seen = target.lanes_seen();
        LaneReader(Arc::new(Shared { target, own, slot, record, masters: Default::default(), batches, seen }))
    }

    /// Returns the rows at `keys`, and the checkpoint's head and the entry of `table` from before them.
    ///
    /// The entry says `healing` if a lane of these keys lost something.
    pub async fn rows(&self, table: &str, format: Format, keys: &[Key]) -> Result<Read, SinkError> {
        Ok(self.rows_and_dead(table, (format, keys), &[]).await?.0)
    }

    /// Like [`Self::rows`], with the records of those `suspects` that are dead letters, from before or after the rows.
    ///
    /// Tries a few times to read all rows as of one moment.
    pub async fn rows_and_dead(
        &self,
        table: &str,
        (format, keys): (Format, &[Key]),
        suspects: &[Key],
    ) -> Result<(Read, Vec<Option<DeadKey>>), SinkError> {
        let (read, dead, _) = self.read(table, Asked { format, keys, list: None }, suspects).await?;
        Ok((read, dead))
    }

    async fn read(
        &self,
        table: &str,
        asked: Asked<'_>,
        suspects: &[Key],
    ) -> Result<(Read, Vec<Option<DeadKey>>, Vec<Value>), SinkError> {
        let format = asked.format;
        let (began, mut bitmap, mut of_several_moments) = (Instant::now(), None, None);
        let mut before = self.0.record.rows_and_dead(table, (format, &[]), suspects).await?;
        for _ in 0..ATTEMPTS {
            let shown = self.shown(&asked);
            let rows = self.lane_rows(asked, began).await?;
            if bitmap.is_none() && rows.marks.values().any(|marks| marks.before.is_none() || marks.after.is_none()) {
                // Either the lane never had rows, or it lost them. The bitmap must be older than the rows to tell.
                bitmap = Some(self.0.record.values(&[self.0.own.lanes()]).await?.pop().flatten());
                before = self.0.record.rows_and_dead(table, (format, &[]), suspects).await?;
                continue;
            }
            let after = self.0.record.rows_and_dead(table, (format, &[]), suspects).await?;
            let (mut read, mut dead) = std::mem::replace(&mut before, after);
            let (after, dead_after) = &before;
            let bitmap = bitmap.as_ref().and_then(Option::as_deref);
            let record = Listing::new(read.checkpoint.as_deref().unwrap_or_default(), bitmap);
            let stamps = Listing::new(after.checkpoint.as_deref().unwrap_or_default(), None).stamps();
            if read.entry != after.entry || record.stamps() != stamps {
                continue;
            }
            for (dead, after) in dead.iter_mut().zip(dead_after) {
                *dead = dead.take().or_else(|| after.clone());
            }
            match self.shows(&record, &rows.marks, &shown) {
                Err(doubt) => {
                    tracing::debug!(?doubt, "rows are not shown");
                    read.entry = read.entry.as_deref().map(healing);
                }
                Ok(lanes) => {
                    read.marked = as_of(&lanes);
                    let mut held = lanes.iter().zip(rows.marks.keys());
                    read.may_lack_keys = held.any(|(held, lane)| held.may_lack_keys(rows.homes[lane]));
                    if (asked.keys.len() > 1 || asked.list.is_some()) && !record.is_one_moment(&lanes) {
                        read.moments = Moments::Several;
                    }
                }
            }
            (read.rows, read.ttl_ms, read.redis) = (rows.rows, rows.ttl_ms, began.elapsed());
            match read.moments {
                Moments::One => return Ok((read, dead, rows.beside)),
                Moments::Several => of_several_moments = Some((read, dead, rows.beside)),
            }
        }
        of_several_moments.ok_or_else(restless)
    }

    /// Returns what was last shown of the lanes of these keys, or written to them.
    fn shown(&self, asked: &Asked<'_>) -> BTreeMap<Lane, Shown> {
        let seen = self.0.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let of = |key: &Key| {
            let lane = Lane::of(key.as_bytes());
            Some((lane, seen.of(lane)?))
        };
        asked.keys.iter().chain(asked.list.map(|(list, _)| list)).filter_map(of).collect()
    }

    /// Where lanes with these marks are, as far as rows of all of them may be shown.
    fn shows(
        &self,
        record: &Listing,
        marks: &BTreeMap<Lane, Around>,
        shown: &BTreeMap<Lane, Shown>,
    ) -> Result<Vec<Held>, Doubt> {
        let judge = |(lane, marks): (&Lane, &Around)| record.judge(*lane, marks, shown.get(lane).copied());
        let lanes = marks.iter().map(judge).collect::<Result<Vec<Held>, Doubt>>()?;
        let mut seen = self.0.seen.lock().unwrap_or_else(PoisonError::into_inner);
        marks.keys().zip(&lanes).for_each(|(lane, held)| seen.shows(record, *lane, held));
        Ok(lanes)
    }

    /// Reads rows and marks, from the masters that have the lanes now.
    async fn lane_rows(&self, asked: Asked<'_>, began: Instant) -> Result<Rows, SinkError> {
        loop {
            let (masters, generation) = self.masters().await?;
            let error = match self.lane_rows_of(asked, &masters).await {
                Err(error) if is_about_the_way(&error) && began.elapsed() + PAUSE < READ_TIMEOUT => error,
                done => return done,
            };
            tokio::time::sleep(PAUSE).await;
            if let Err(unknown) = self.rediscover_since(generation).await {
                tracing::debug!(%unknown, "the masters of the cluster are unknown");
                return Err(error);
            }
        }
    }

    async fn lane_rows_of(&self, asked: Asked<'_>, masters: &[Master]) -> Result<Rows, SinkError> {
        let Asked { format, keys, list } = asked;
        // By master: the places of its keys.
        let mut asked: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        for (at, key) in keys.iter().enumerate() {
            asked.entry(self.master_of(masters, Lane::of(key.as_bytes()))?).or_default().push(at);
        }
        let of_list = list.map(|(list, _)| self.master_of(masters, Lane::of(list.as_bytes()))).transpose()?;
        of_list.into_iter().for_each(|master| _ = asked.entry(master).or_default());
        let ask = async |master: &usize, places: &[usize]| {
            let keys: Vec<Key> = places.iter().map(|at| keys[*at].clone()).collect();
            let (list, commands) = list.filter(|_| of_list == Some(*master)).unzip();
            let lanes: BTreeSet<Lane> = keys.iter().chain(list).map(|key| Lane::of(key.as_bytes())).collect();
            let marks: Vec<Key> = lanes.iter().map(|lane| mark_key(*lane, &self.0.slot)).collect();
            let reader = &masters[*master].reader;
            let found = reader.rows_between(&marks, (format, &keys), commands.unwrap_or_default()).await?;
            Ok::<_, SinkError>((lanes, found))
        };
        // All replies are read, so that none is left for the next request on a connection.
        let answers = join_all(asked.iter().map(|(master, places)| ask(master, places))).await;
        let answers: Vec<_> = answers.into_iter().collect::<Result<_, SinkError>>()?;
        let (marks, homes, beside) = (BTreeMap::new(), BTreeMap::new(), Vec::new());
        let mut rows = Rows { marks, homes, rows: vec![None; keys.len()], ttl_ms: vec![None; keys.len()], beside };
        for ((master, places), (lanes, found)) in asked.iter().zip(answers) {
            rows.homes.extend(lanes.iter().map(|lane| (*lane, masters[*master].node.home)));
            if let Some((list, _)) = list {
                are_answers(list, &found.beside)?;
            }
            rows.beside.extend(found.beside);
            let marks = found.before.into_iter().zip(found.after).map(|(before, after)| Around { before, after });
            rows.marks.extend(lanes.into_iter().zip(marks));
            for ((at, row), ttl_ms) in places.iter().zip(found.rows).zip(found.ttl_ms) {
                (rows.rows[*at], rows.ttl_ms[*at]) = (row, ttl_ms);
            }
        }
        Ok(rows)
    }

    fn master_of(&self, masters: &[Master], lane: Lane) -> Result<usize, SinkError> {
        let unserved = || SinkError::Unserved { redis: self.0.target.to_string(), lane };
        masters.iter().position(|master| master.node.serves(lane)).ok_or_else(unserved)
    }

    /// Returns the masters, and the number of the topology.
    async fn masters(&self) -> Result<(Vec<Master>, u64), SinkError> {
        {
            let masters = self.0.masters.lock().await;
            if masters.generation > 0 {
                return Ok((masters.all.clone(), masters.generation));
            }
        }
        self.rediscover_since(0).await?;
        let masters = self.0.masters.lock().await;
        Ok((masters.all.clone(), masters.generation))
    }

    /// Asks for the topology, unless another call has done so since it had this number.
    async fn rediscover_since(&self, generation: u64) -> Result<(), SinkError> {
        let mut masters = self.0.masters.lock().await;
        if masters.generation != generation {
            return Ok(());
        }
        let topology = Topology::discover(&self.0.target).await?;
        masters.discovered = Some(Instant::now());
        if masters.all.iter().map(|master| &master.node).eq(topology.nodes()) {
            return Ok(());
        }
        let mut known = std::mem::take(&mut masters.all);
        let all = topology.nodes().iter().map(|node| {
            let reader = match known.iter().position(|master| master.node.is_where(node)) {
                Some(at) => known.swap_remove(at).reader,
                None => self.reader_of(node),
            };
            Master { node: node.clone(), reader }
        });
        masters.all = all.collect();
        masters.generation += 1;
        Ok(())
    }

    fn reader_of(&self, node: &Node) -> Reader {
        let reader = Reader::connect_lazy(&self.0.target.at(&node.at), &self.0.own);
        if self.0.batches { reader.for_batches() } else { reader }
    }

    /// Returns the checkpoint with the entries of all tables.
    pub async fn checkpoint(&self) -> Result<(Option<Stored>, RunId), SinkError> {
        self.0.record.checkpoint().await
    }

    /// Returns the hash slot of a key, and the master that reads of it are sent to. `None` if no node serves the slot.
    pub async fn place_of(&self, key: &Key) -> Result<Option<(Lane, HostPort)>, SinkError> {
        let lane = Lane::of(key.as_bytes());
        let (masters, _) = self.masters().await?;
        let master = masters.into_iter().find(|master| master.node.serves(lane));
        Ok(master.map(|master| (lane, master.node.at)))
    }

    /// Returns how many keys all masters have evicted since they started; `None` if one does not report that.
    ///
    /// Looks for other masters now and then: a replica that took over evicts keys, and its old master does not tell.
    pub async fn evicted_keys(&self) -> Result<Option<u64>, SinkError> {
        let (_, generation) = self.masters().await?;
        let is_old = self.0.masters.lock().await.discovered.is_none_or(|at| at.elapsed() > KNOWN_FOR);
        if is_old && let Err(unknown) = self.rediscover_since(generation).await {
            tracing::debug!(%unknown, "the masters of the cluster are unknown");
        }
        let (masters, _) = self.masters().await?;
        let usage = async |Master { node, reader }: &Master| {
            let lane = node.lane().expect("a master of the topology has slots");
            let usage = reader.usage(&unused_key(lane, &self.0.slot)).await;
            self.0.target.reports(lane, &usage);
            usage
        };
        // All of them, so that each is shown as it is.
        let usages = join_all(masters.iter().map(usage)).await;
        usages.into_iter().map(|usage| Ok(usage?.evicted_keys)).sum()
    }

    /// Returns one page of the keys that begin with `prefix`. Begin with cursor 0, and continue with the returned one
    /// until it is 0. A key may be returned twice. Begins again when slots have moved to other nodes.
    pub async fn scan_page(&self, prefix: &[u8], cursor: u64) -> Result<(u64, Vec<Key>), SinkError> {
        let (masters, topology) = self.masters().await?;
        // Never 0, so that a cursor is not.
        let generation = topology % (Cursor::GENERATIONS - 1) + 1;
        let mut cursor = Cursor::of(cursor);
        if cursor.generation != generation || cursor.node >= masters.len() {
            cursor = Cursor { generation, node: 0, inner: 0 };
        }
        let Master { node, reader } = &masters[cursor.node];
        let unused = node.lane().map_or_else(|| self.0.own.unused(), |lane| unused_key(lane, &self.0.slot));
        let (inner, keys) = match reader.scan(prefix, cursor.inner, &unused).await {
            Ok(page) => page,
            Err(error) => {
                // The node may no longer be a master.
                self.rediscover_since(topology).await?;
                return Err(error);
            }
        };
        if inner >> Cursor::INNER_BITS != 0 {
            let got = format!("the cursor {inner}");
            return Err(SinkError::Unexpected { command: "SCAN", got });
        }
        let next = match inner {
            0 if cursor.node + 1 == masters.len() => {
                // A slot may have moved from a node that was yet to be visited to one that was not.
                self.rediscover_since(topology).await?;
                let every: Vec<Lane> = Lane::every().collect();
                let any_moved = moves::ended(&mut &*self, &every).await.inspect_err(|error| {
                    if let SinkError::OnTheMove { .. } = error {
                        tracing::warn!(code = error.code().as_str(), %error, "the keys in redis cannot be listed");
                    }
                })?;
                let (_, now) = self.masters().await?;
                if now == topology && !any_moved { 0 } else { Cursor { generation: 0, node: 0, inner: 1 }.packed() }
            }
            0 => Cursor { node: cursor.node + 1, inner: 0, ..cursor }.packed(),
            inner => Cursor { inner, ..cursor }.packed(),
        };
        Ok((next, keys))
    }
}

impl ListReader for LaneReader {
    const ARE_APART: bool = true;

    fn reader(&self) -> &Reader {
        &self.0.record
    }

    async fn read_list(
        &self,
        table: &str,
        (format, keys): (Format, &[Key]),
        list: &Key,
        commands: &[Cmd],
    ) -> Result<(Read, Vec<Value>), SinkError> {
        let (read, _, replies) = self.read(table, Asked { format, keys, list: Some((list, commands)) }, &[]).await?;
        Ok((read, replies))
    }

    async fn ask_list(&self, list: &Key, _: &'static str, commands: &[Cmd]) -> Result<Vec<Value>, SinkError> {
        let asked = Asked { format: Format::Hash, keys: &[], list: Some((list, commands)) };
        Ok(self.lane_rows(asked, Instant::now()).await?.beside)
    }
}

/// What is read between marks.
#[derive(Clone, Copy)]
struct Asked<'a> {
    format: Format,
    keys: &'a [Key],
    /// A list, and commands about it.
    list: Option<(&'a Key, &'a [Cmd])>,
}

/// # Errors
/// If one of the replies to commands about this list is that another node may have the answer.
fn are_answers(list: &Key, replies: &[Value]) -> Result<(), SinkError> {
    let errors = replies.iter().filter(|reply| matches!(reply, Value::ServerError(_)));
    let errors = errors.map(|error| failure(Request::of("ZRANGE", list), "ZRANGE", error.clone()));
    errors.filter(is_about_the_way).map(Err).next().unwrap_or(Ok(()))
}

/// For [`moves::ended`], which needs no more than the shared connections.
impl Masters for &LaneReader {
    async fn on_the_move(&mut self, lanes: &[Lane]) -> Result<Option<(Lane, ErrorReply)>, SinkError> {
        for Master { node, reader } in self.masters().await?.0 {
            let here: Vec<Lane> = lanes.iter().copied().filter(|lane| node.serves(*lane)).collect();
            for page in here.chunks(LANES_PAGE) {
                let unused: Vec<Key> = page.iter().map(|lane| unused_key(*lane, &self.0.slot)).collect();
                match reader.values(&unused).await {
                    Ok(_) => {}
                    Err(SinkError::Refused { request: Request { key: Some(key), .. }, reply })
                        if reply.redirect().is_some() =>
                    {
                        return Ok(Some((Lane::of(key.as_bytes()), reply)));
                    }
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(None)
    }

    async fn rediscover(&mut self) -> Result<(), SinkError> {
        let (_, topology) = self.masters().await?;
        self.rediscover_since(topology).await
    }

    fn shows(&mut self, _: Lane, _: &ErrorReply) -> Result<(), SinkError> {
        Ok(())
    }

    fn redis(&self) -> String {
        self.0.target.to_string()
    }
}

/// Rows, and the marks of their lanes from before and after them.
struct Rows {
    marks: BTreeMap<Lane, Around>,
    /// The nodes that have these lanes.
    homes: BTreeMap<Lane, Option<Home>>,
    rows: Vec<Option<StoredRow>>,
    ttl_ms: Vec<Option<u64>>,
    /// Replies to the commands about a list.
    beside: Vec<Value>,
}

/// Whether another node may have the answer, or the same one a little later.
fn is_about_the_way(error: &SinkError) -> bool {
    match error {
        SinkError::Refused { reply, .. } => reply.redirect().is_some(),
        SinkError::Unreachable { .. } | SinkError::Lost { .. } | SinkError::Unserved { .. } => true,
        _ => false,
    }
}

impl fmt::Debug for LaneReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LaneReader({})", self.0.target)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cursor_has_all_of_its_parts() {
        let largest = |bits: u32| (1_u64 << bits) - 1;
        for (generation, node, inner) in [
            (1, 0, 0),
            (1, 2, 5),
            (Cursor::GENERATIONS - 1, largest(Cursor::NODE_BITS) as usize, largest(Cursor::INNER_BITS)),
        ] {
            let read = Cursor::of(Cursor { generation, node, inner }.packed());
            assert_eq!((read.generation, read.node, read.inner), (generation, node, inner));
        }
        let start = Cursor::of(0);
        assert_eq!((start.generation, start.node, start.inner), (0, 0, 0));
    }
}
