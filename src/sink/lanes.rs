//! The only writer of a cluster. It divides each batch among the lanes of its keys, sends one call of the script to each
//! lane, and writes the record before and after, as the [`Book`] plans it.
//!
//! It must see every redirect itself: a client that follows them silently would hide a slot that has moved from the
//! rules of the book. A call whose reply was not read may have been performed; the session then ends, and the marks that
//! the next one reads tell.
//!
//! <https://redis.io/docs/latest/operate/oss_and_stack/reference/cluster-spec/>

use super::answers::{
    differences, document_of, exactly, foreign, inspect_request, lengths_of, probe_of, refusal, scan_request, scanned,
    stored, time_of, unexpected, value_of,
};
use super::bounds::{REPLY_BYTES, ROWS_BYTES};
use super::connect::{self, CONNECT_TIMEOUT, RedisTarget};
use super::inspecting::{self, Inspects};
use super::link::{Link, Moved, TIME};
use super::missing_rights::Missing;
use super::moves::{self, Masters, PATIENCE};
use super::replies::Reply;
use super::server::{self, Lives, Lost, ServerInfo};
use super::topology::{Node, Topology};
use super::writer::{Armed, Executed, is_change_stream, read_dead_keys};
use super::{Class, ErrorReply, Found, Redirect, Request, SinkError};
use crate::command::Key;
use crate::lanes::book::{Book, Judged, Survey, Why};
use crate::lanes::reading::Seen;
use crate::lanes::script::{Call, SCRIPT};
use crate::lanes::tags::{every_mark, mark_key, sample_key, unused_key};
use crate::lanes::{Lane, lane_of_stream};
use crate::lookups::ListKind;
use crate::lookups::questions::{Answers, Questions};
use crate::lsn::EndLsn;
use crate::nodes::Nodes;
use crate::resp;
use crate::resp::batch::{Batch, Limits, OwnKeys};
use crate::session::inspect::{Comparison, Differences, Inspection, Probe};
use bytes::{Bytes, BytesMut};
use futures_util::future::{join_all, try_join_all};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::time::timeout;

/// Marks in one request.
const MARKS_PAGE: usize = 4096;
/// About this much of what is sent to a master is encoded at a time.
const PIECE_BYTES: usize = 64 << 10;
/// The delay before a request is repeated that was refused because its slot is on the move, or its node is not ready.
const PAUSE: Duration = Duration::from_millis(50);

/// How often it is shown what each node has. That takes a walk through all lanes.
const SHOWN_EVERY: Duration = Duration::from_secs(1);
/// How long a slot must have been on the move before it is asked where to.
const WONDERS_AFTER: Duration = Duration::from_secs(1);

/// The connections that write, one to each master.
///
/// A call that fails, or is dropped before it completes, leaves the writer unarmed: every later call returns
/// [`SinkError::NotArmed`], and new connections are needed.
pub struct LaneWriter {
    target: RedisTarget,
    own: OwnKeys,
    /// The name of the replication slot.
    slot: String,
    /// Where the record lies.
    home: Lane,
    topology: Topology,
    /// Increases with every change of the topology.
    topologies: u64,
    masters: Vec<Master>,
    /// The index of each lane's master, by the lane's number.
    routes: Vec<Option<usize>>,
    sha: Bytes,
    book: Book,
    /// The record's, as this session has left it.
    head: Option<Bytes>,
    server: ServerInfo,
    /// Of the masters, from before their marks were read.
    lives: Lives,
    scan: Scan,
    /// The topology in which lists were last read in part.
    cursors_of: u64,
    moved: Moved,
    nodes: Nodes,
    /// What readers of this process may rely on.
    seen: Arc<Mutex<Seen>>,
    /// When it was last shown what each node has.
    shown: Instant,
    is_armed: bool,
}

/// A connection to a master.
struct Master {
    node: Node,
    /// Its name in `nodes`.
    at: String,
    link: Link,
    nodes: Nodes,
}

/// What is sent to the master of a lane.
trait Ask {
    fn lane(&self) -> Lane;

    fn write(&self, out: &mut BytesMut, sha: &[u8]);
}

impl Ask for Call {
    fn lane(&self) -> Lane {
        self.lane.unwrap_or_else(|| Lane::of(self.keys[0].as_bytes()))
    }

    fn write(&self, out: &mut BytesMut, sha: &[u8]) {
        Call::write(self, out, sha);
    }
}

/// An encoded request.
impl Ask for (Lane, Bytes) {
    fn lane(&self) -> Lane {
        self.0
    }

    fn write(&self, out: &mut BytesMut, _: &[u8]) {
        out.extend_from_slice(&self.1);
    }
}

/// A walk through all keys, a node after the other. What it finds is complete only if no slot moved meanwhile.
#[derive(Default)]
struct Scan {
    /// The cursor that callers get: those of the nodes do not tell the node. Never 0, once a walk has begun.
    number: u64,
    at: usize,
    cursor: u64,
    topologies: u64,
}

impl LaneWriter {
    /// Connects to every master and reads the record and all marks, within [`CONNECT_TIMEOUT`].
    pub async fn connect(target: &RedisTarget, own: &OwnKeys, slot: &str) -> Result<(LaneWriter, Armed), SinkError> {
        let with_password = target.with_password().await?;
        match timeout(CONNECT_TIMEOUT, Self::connect_unbounded(&with_password, own, slot)).await {
            // Masters that it connects to later get a password of their own.
            Ok(done) => done.map(|(writer, armed)| (LaneWriter { target: target.clone(), ..writer }, armed)),
            Err(_) => {
                let silent = target.nodes().map(Nodes::silent).unwrap_or_default();
                let redis = if silent.is_empty() { target.to_string() } else { silent.join(", ") };
                Err(SinkError::TimedOut { redis, after: CONNECT_TIMEOUT })
            }
        }
    }

    async fn connect_unbounded(
        target: &RedisTarget,
        own: &OwnKeys,
        slot: &str,
    ) -> Result<(LaneWriter, Armed), SinkError> {
        let topology = Topology::discover(target).await?;
        if topology.uncovered() > 0 {
            return Err(SinkError::Uncovered { redis: target.to_string(), lanes: topology.uncovered() });
        }
        let (moved, nodes) = (Moved::default(), target.nodes().cloned().unwrap_or_default());
        let connect = |node: &Node| Master::connect(node.clone(), target, slot, moved.clone(), nodes.clone());
        // All of them, so that it is known which ones can be reached.
        let connected = join_all(topology.nodes().iter().map(connect)).await;
        let connected: Vec<_> = connected.into_iter().collect::<Result<_, _>>()?;
        nodes.goes_on();
        let (mut masters, servers): (Vec<Master>, Vec<ServerInfo>) = connected.into_iter().unzip();
        let life = |(master, server): (&Master, &ServerInfo)| {
            (master.node.id.clone(), (server.run_id.clone(), server.replication_id.clone()))
        };
        let lives = masters.iter().zip(&servers).map(life).collect();
        let sha = try_join_all(masters.iter_mut().map(Master::load_script)).await?.swap_remove(0);
        let home = Lane::of(own.checkpoint().as_bytes());
        let record = masters.iter_mut().find(|master| master.node.serves(home)).expect("every hash slot is served");
        // The record first: a writer that is still alive then cannot end a round between the two without being noticed.
        let (armed, lanes) = record.record(own).await?;
        if let Some(lane) = lane_of_stream(own) {
            let home = masters.iter_mut().find(|master| master.node.serves(lane)).expect("every hash slot is served");
            is_change_stream(&mut home.link, own).await?;
        }
        let marks = try_join_all(masters.iter_mut().map(|master| master.marks(slot))).await?;
        let (head, entries) = armed.checkpoint.clone().map(|stored| (stored.head, stored.entries)).unzip();
        let marks = marks.into_iter().flatten().collect();
        let routes = routes(&masters);
        let survey = Survey { head: head.clone(), entries: entries.unwrap_or_default(), lanes, marks };
        let mut writer = LaneWriter {
            target: target.clone(),
            own: own.clone(),
            slot: slot.to_owned(),
            home,
            topology,
            topologies: 0,
            masters,
            routes,
            sha,
            book: Book::new(own.clone(), slot, &survey, session()?, Instant::now()),
            head,
            server: together(servers.iter()),
            lives,
            scan: Scan::default(),
            cursors_of: 0,
            moved,
            nodes,
            seen: target.lanes_seen(),
            shown: Instant::now(),
            is_armed: true,
        };
        writer.show();
        Ok((writer, armed))
    }

    pub fn target(&self) -> &RedisTarget {
        &self.target
    }

    /// What the masters were when this session began to rely on what they hold.
    pub fn lives(&self) -> &Lives {
        &self.lives
    }

    pub fn moved(&self) -> Moved {
        self.moved.clone()
    }

    /// See [`Writer::trusts_packing`](super::writer::Writer::trusts_packing).
    pub async fn trusts_packing(&mut self) -> Result<bool, SinkError> {
        let Some(packing) = self.server.limits.packing else { return Ok(true) };
        let slot = &self.slot;
        let asks = self.masters.iter_mut().map(async |master| {
            let lane = master.node.lane().expect("a master of the topology has slots");
            server::reads_back(&mut master.link, &sample_key(lane, slot), &packing).await
        });
        let is_right = try_join_all(asks).await?.into_iter().all(|is_right| is_right);
        self.server.limits.packing = Some(packing).filter(|_| is_right);
        Ok(is_right)
    }

    /// Returns what the masters reported when the connections were opened: sums, and the lowest limits.
    pub fn server(&self) -> &ServerInfo {
        &self.server
    }

    /// See [`Book::judge`].
    pub fn judge(&self, confirmed: EndLsn, server: EndLsn) -> Judged {
        self.book.judge(confirmed, server)
    }

    /// See [`Book::disown`].
    pub fn disown(&mut self) {
        self.book.disown();
    }

    /// See [`Book::take_moved`].
    pub fn take_moved(&mut self) -> BTreeSet<Lane> {
        self.book.take_moved()
    }

    /// See [`Book::settles`].
    pub fn settles(&mut self, lanes: &BTreeSet<Lane>) {
        self.book.settles(lanes);
    }

    /// See [`Book::heal`].
    pub fn heal(&mut self, lost: &BTreeMap<Lane, Why>) {
        self.book.heal(lost);
    }

    /// Executes `batch`: all that concerns one lane at once, a lane independently of the others. Then writes the record.
    ///
    /// If the future is dropped, or fails, it is open what was applied; the marks tell.
    pub async fn execute(&mut self, batch: &Batch, checkpoint: &[u8]) -> Result<Executed, SinkError> {
        self.spend()?;
        let (masters, routes) = (&self.masters, &self.routes);
        let home = |lane: Lane| masters[routes[usize::from(lane.number())]?].node.home;
        let round = self.book.plan(batch, checkpoint, Instant::now(), home);
        if let Some(before) = round.before {
            self.perform(&[before]).await?;
        }
        self.perform(&round.calls).await?;
        self.perform(round.last.as_slice()).await?;
        let calls = round.calls.iter().chain(&round.last);
        self.book.shows(calls, &mut self.seen.lock().unwrap_or_else(PoisonError::into_inner));
        let after = (self.home, self.encoded(&round.after));
        let time = (self.home, Bytes::from_static(TIME));
        let [reply, time] = exactly("EVALSHA", self.ask_all(&[after, time], REPLY_BYTES).await?)?;
        self.takes(&round.after, reply)?;
        self.head = Some(round.after.new);
        if self.shown.elapsed() >= SHOWN_EVERY {
            self.show();
        }
        let redis_time_ms = time_of(time)?;
        self.is_armed = true;
        Ok(Executed { redis_time_ms, safe: self.book.safe() })
    }

    /// Shows what each node has.
    fn show(&mut self) {
        self.shown = Instant::now();
        self.masters.iter().for_each(|master| self.nodes.holds(&master.at, self.book.share(&master.node.slots)));
    }

    async fn perform(&mut self, calls: &[Call]) -> Result<(), SinkError> {
        let replies = self.ask_all(calls, REPLY_BYTES).await?;
        calls.iter().zip(replies).try_for_each(|(call, reply)| self.takes(call, reply))
    }

    fn encoded(&self, call: &Call) -> Bytes {
        let mut out = BytesMut::new();
        call.write(&mut out, &self.sha);
        out.freeze()
    }

    /// # Errors
    /// Unless the call was performed.
    fn takes(&mut self, call: &Call, reply: Reply) -> Result<(), SinkError> {
        judge(call, reply, || self.encoded(call))?;
        self.book.acknowledged(call);
        Ok(())
    }

    /// Sends each request to the master of its lane, and returns the replies in order. Follows slots that have moved,
    /// and waits for those that are moving, and for nodes that are not ready: such a refusal leaves nothing done.
    async fn ask_all<R: Ask>(&mut self, requests: &[R], most: usize) -> Result<Vec<Reply>, SinkError> {
        let mut replies: Vec<Option<Reply>> = vec![None; requests.len()];
        let mut left: Vec<usize> = (0..requests.len()).collect();
        let mut heard = Instant::now();
        let mut waits = Waits::default();
        while !left.is_empty() {
            let mut by_master: Vec<Vec<usize>> = vec![Vec::new(); self.masters.len()];
            for at in left.drain(..) {
                by_master[self.master_of(requests[at].lane())?].push(at);
            }
            let sha = &self.sha;
            let asks = self.masters.iter_mut().zip(&by_master).filter(|(_, asked)| !asked.is_empty());
            let answered = join_all(asks.map(|(master, asked)| master.ask_some(requests, asked, sha, most))).await;
            let (mut refused, mut has_moved) = (None, false);
            let by_master = by_master.iter().enumerate().filter(|(_, asked)| !asked.is_empty());
            for ((master, asked), answers) in by_master.zip(answered) {
                for (at, reply) in asked.iter().zip(answers?) {
                    match reply {
                        Reply::Error(reply) if reply.redirect().is_some() => {
                            has_moved |= reply.redirect() == Some(Redirect::Elsewhere);
                            left.push(*at);
                            refused = Some((master, requests[*at].lane(), reply));
                        }
                        reply => {
                            heard = Instant::now();
                            replies[*at] = Some(reply);
                        }
                    }
                }
            }
            let Some((master, lane, reply)) = refused else { continue };
            self.waits(&mut waits, master, lane, &reply).await?;
            if heard.elapsed() > PATIENCE {
                return Err(self.never_served(lane, reply));
            }
            tokio::time::sleep(PAUSE).await;
            if has_moved {
                self.rediscover().await?;
            }
        }
        if waits.since.is_some() {
            self.nodes.goes_on();
        }
        Ok(replies.into_iter().flatten().collect())
    }

    /// Shows that a request about this hash slot waits, because of what a master has replied.
    async fn waits(
        &mut self,
        waits: &mut Waits,
        master: usize,
        lane: Lane,
        reply: &ErrorReply,
    ) -> Result<(), SinkError> {
        let since = *waits.since.get_or_insert_with(Instant::now);
        let is_moving = matches!(reply.code(), "ASK" | "TRYAGAIN");
        if is_moving && waits.leads_to.is_none() && since.elapsed() > WONDERS_AFTER {
            // TRYAGAIN does not say where the slot is going.
            waits.leads_to = self.on_the_move(&[lane]).await?.map(|(_, ask)| (lane, ask));
        }
        let at = &self.masters[master].at;
        let known = waits.leads_to.as_ref().filter(|(known, _)| is_moving && *known == lane).map(|(_, ask)| ask);
        self.nodes.refuses(at, why_it_waits(at, lane, known.unwrap_or(reply)));
        Ok(())
    }

    /// Redis has refused requests about this hash slot for [`PATIENCE`], lately with `reply`.
    fn never_served(&self, lane: Lane, reply: ErrorReply) -> SinkError {
        match reply.code() {
            "ASK" | "TRYAGAIN" => SinkError::OnTheMove { redis: self.target.to_string(), lane, after: PATIENCE, reply },
            _ => SinkError::Refused { request: Request::new("EVALSHA"), reply },
        }
    }

    fn master_of(&self, lane: Lane) -> Result<usize, SinkError> {
        let unserved = || SinkError::Unserved { redis: self.target.to_string(), lane };
        self.routes[usize::from(lane.number())].ok_or_else(unserved)
    }

    /// Returns what these keys hold.
    pub async fn probe(&mut self, asked: &Inspection) -> Result<Vec<Probe>, SinkError> {
        self.spend()?;
        let types = asked.types.iter().map(|key| about(b"TYPE", key));
        let lengths = asked.documents.iter().map(|key| about(b"STRLEN", key));
        let requests: Vec<_> = types.chain(lengths).collect();
        let mut replies = self.ask_all(&requests, REPLY_BYTES).await?.into_iter();
        let types = asked.types.iter().zip(&mut replies).map(|(key, reply)| probe_of(key, reply));
        let mut probes = types.collect::<Result<Vec<Probe>, SinkError>>()?;
        let (mut documents, wanted, bytes) = lengths_of(asked, replies.collect())?;
        if !wanted.is_empty() {
            let requests: Vec<_> = wanted.iter().map(|at| about(b"GET", &asked.documents[*at])).collect();
            let replies = self.ask_all(&requests, bytes).await?;
            for (at, reply) in wanted.into_iter().zip(replies) {
                documents[at] = document_of(&asked.documents[at], reply)?;
            }
        }
        probes.append(&mut documents);
        self.is_armed = true;
        Ok(probes)
    }

    /// See [`inspecting::inspect`].
    pub async fn inspect(&mut self, questions: &Questions) -> Result<Answers, SinkError> {
        self.spend()?;
        let answers = match questions {
            Questions::Members(lists) => self.members(lists.clone()).await?,
            _ => inspecting::inspect(self, questions).await?,
        };
        self.is_armed = true;
        Ok(answers)
    }

    /// A cursor is that of a node: where another one has taken over, a list is read from its beginning.
    async fn members(&mut self, mut lists: Vec<(Key, ListKind, u64)>) -> Result<Answers, SinkError> {
        loop {
            if std::mem::replace(&mut self.cursors_of, self.topologies) != self.topologies {
                lists.iter_mut().for_each(|(_, _, cursor)| *cursor = 0);
            }
            let answers = inspecting::inspect(self, &Questions::Members(lists.clone())).await?;
            if self.cursors_of == self.topologies {
                return Ok(answers);
            }
        }
    }

    /// Compares rows with those in Redis: hashes field by field, documents byte by byte.
    pub async fn compare(&mut self, wanted: &Comparison) -> Result<Differences, SinkError> {
        self.spend()?;
        let asked = wanted.asked();
        let rows = asked.iter().map(|(key, _)| about(wanted.format.read_command().as_bytes(), key));
        let requests: Vec<_> = rows.chain(wanted.keys.iter().map(|key| about(b"TYPE", key))).collect();
        let replies = self.ask_all(&requests, ROWS_BYTES).await?;
        self.is_armed = true;
        differences(wanted, &asked, replies.into_iter().map(Some).collect())
    }

    /// Returns one page of the keys that begin with `prefix`. Begin with cursor 0, and continue with the returned one
    /// until it is 0. A key may be returned twice, and one that is created or deleted meanwhile may be returned. A walk
    /// starts over if another one has begun in between.
    pub async fn scan_page(&mut self, prefix: &[u8], cursor: u64) -> Result<(u64, Vec<Key>), SinkError> {
        self.spend()?;
        // If topologies differ, a slot may have moved from a node that was yet to be visited to one that was not. Another walk
        // may have begun since.
        let goes_on = cursor != 0 && cursor == self.scan.number && self.scan.topologies == self.topologies;
        if !goes_on || self.scan.at >= self.masters.len() {
            self.begin_scan();
        }
        let (at, cursor) = (self.scan.at, self.scan.cursor);
        let mut out = BytesMut::new();
        scan_request(&mut out, prefix, cursor);
        let [reply] = exactly("SCAN", self.masters[at].ask(REPLY_BYTES, &out, 1).await?)?;
        let (next, keys) = scanned(prefix, reply)?;
        self.scan.cursor = next;
        if next == 0 {
            self.scan.at += 1;
        }
        if next == 0 && self.scan.at == self.masters.len() {
            let topologies = self.topologies;
            self.rediscover().await?;
            let listed: Vec<Lane> = self.book.listed().collect();
            let any_moved = moves::ended(self, &listed).await?;
            if any_moved {
                self.nodes.goes_on();
            }
            self.is_armed = true;
            if topologies == self.topologies && !any_moved {
                return Ok((0, keys));
            }
            self.begin_scan();
        }
        self.is_armed = true;
        Ok((self.scan.number, keys))
    }

    fn begin_scan(&mut self) {
        self.scan = Scan { number: self.scan.number + 1, topologies: self.topologies, at: 0, cursor: 0 };
    }

    /// Removes `keys` and returns how many existed. Removes nothing if another writer has written the record. For use while
    /// no daemon runs: it writes no record, and the record may be among the keys.
    pub async fn remove(&mut self, keys: &[Key]) -> Result<u64, SinkError> {
        self.spend()?;
        let checkpoint = self.own.checkpoint().clone();
        let [reply] = exactly("GET", self.ask_all(&[about(b"GET", &checkpoint)], REPLY_BYTES).await?)?;
        let found = value_of(Request::of("GET", &checkpoint), reply)?;
        if found != self.head {
            return superseded(None, &found.unwrap_or_default());
        }
        let mut by_lane: BTreeMap<Lane, Vec<&[u8]>> = BTreeMap::new();
        for key in keys {
            by_lane.entry(Lane::of(key.as_bytes())).or_insert_with(|| vec![b"DEL"]).push(key.as_bytes());
        }
        let request = |(lane, words): (Lane, Vec<&[u8]>)| {
            let mut out = BytesMut::new();
            resp::command(&mut out, &words);
            (lane, out.freeze())
        };
        let requests: Vec<_> = by_lane.into_iter().map(request).collect();
        let replies = self.ask_all(&requests, REPLY_BYTES).await?;
        let mut removed = 0;
        for reply in replies {
            match reply {
                Reply::Integer(n) => removed += u64::try_from(n).unwrap_or_default(),
                other => return Err(refusal(Request::new("DEL"), "DEL", other)),
            }
        }
        if keys.contains(&checkpoint) {
            self.head = None;
        }
        self.is_armed = true;
        Ok(removed)
    }

    /// Returns the keys of all marks.
    pub fn marks(&self) -> Vec<Key> {
        self.book.listed().map(|lane| mark_key(lane, &self.slot)).collect()
    }

    /// From here until all replies have been read, nothing else may be sent.
    fn spend(&mut self) -> Result<(), SinkError> {
        if std::mem::take(&mut self.is_armed) { Ok(()) } else { Err(SinkError::NotArmed) }
    }
}

impl Inspects for LaneWriter {
    /// What a lane says is relied on only if it is as this session has left it: its node may have lost something, and may have
    /// been replaced by the time the batch is written.
    async fn ask_questions(&mut self, questions: &Questions) -> Result<Vec<Reply>, SinkError> {
        let lanes: BTreeSet<Lane> = questions.keys().map(|key| Lane::of(key.as_bytes())).collect();
        let marks: Vec<Key> = lanes.iter().map(|lane| mark_key(*lane, &self.slot)).collect();
        let question = |(at, key): (usize, &Key)| {
            let mut out = BytesMut::new();
            inspect_request(&mut out, questions, at);
            (Lane::of(key.as_bytes()), out.freeze())
        };
        let requests = marks.iter().map(|mark| about(b"GET", mark));
        let requests: Vec<_> = requests.chain(questions.keys().enumerate().map(question)).collect();
        let mut replies = self.ask_all(&requests, ROWS_BYTES).await?.into_iter();
        for ((lane, mark), reply) in lanes.into_iter().zip(&marks).zip(&mut replies) {
            let found = value_of(Request::of("GET", mark), reply)?.unwrap_or_default();
            if found != self.book.expects(lane) {
                return superseded(Some(lane), &found);
            }
        }
        Ok(replies.collect())
    }

    async fn ask_lengths(&mut self, keys: &[&Key]) -> Result<Vec<Reply>, SinkError> {
        let requests: Vec<_> = keys.iter().map(|key| about(b"STRLEN", key)).collect();
        self.ask_all(&requests, REPLY_BYTES).await
    }
}

impl Masters for LaneWriter {
    async fn on_the_move(&mut self, lanes: &[Lane]) -> Result<Option<(Lane, ErrorReply)>, SinkError> {
        let requests: Vec<_> = lanes.iter().map(|lane| about(b"TYPE", &unused_key(*lane, &self.slot))).collect();
        for master in &mut self.masters {
            let asked: Vec<usize> = (0..lanes.len()).filter(|at| master.node.serves(lanes[*at])).collect();
            if asked.is_empty() {
                continue;
            }
            let replies = master.ask_some(&requests, &asked, &self.sha, REPLY_BYTES).await?;
            for (at, reply) in asked.iter().zip(replies) {
                match reply {
                    Reply::Error(reply) if reply.redirect().is_some() => return Ok(Some((lanes[*at], reply))),
                    Reply::Error(_) => return Err(refusal(Request::new("TYPE"), "TYPE", reply)),
                    _ => {}
                }
            }
        }
        Ok(None)
    }

    /// Connects to masters that are new.
    async fn rediscover(&mut self) -> Result<(), SinkError> {
        let topology = Topology::discover(&self.target).await?;
        if topology.uncovered() > 0 || topology == self.topology {
            // The failover is not over.
            return Ok(());
        }
        let mut known = std::mem::take(&mut self.masters);
        for node in topology.nodes() {
            let at = known.iter().position(|master| master.node.is_where(node));
            let master = match at {
                Some(at) => Master { node: node.clone(), ..known.swap_remove(at) },
                None => {
                    let (moved, nodes, target) = (self.moved.clone(), self.nodes.clone(), &self.target);
                    let (mut master, _) = Master::connect(node.clone(), target, &self.slot, moved, nodes).await?;
                    master.load_script().await?;
                    master
                }
            };
            self.masters.push(master);
        }
        self.routes = routes(&self.masters);
        self.topology = topology;
        self.topologies += 1;
        self.show();
        Ok(())
    }

    fn shows(&mut self, lane: Lane, reply: &ErrorReply) -> Result<(), SinkError> {
        let at = &self.masters[self.master_of(lane)?].at;
        self.nodes.refuses(at, why_it_waits(at, lane, reply));
        Ok(())
    }

    fn redis(&self) -> String {
        self.target.to_string()
    }
}

impl fmt::Debug for LaneWriter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LaneWriter").field("target", &self.target).finish_non_exhaustive()
    }
}

impl Master {
    async fn connect(
        node: Node,
        target: &RedisTarget,
        slot: &str,
        moved: Moved,
        nodes: Nodes,
    ) -> Result<(Self, ServerInfo), SinkError> {
        let at = node.at.to_string();
        let connected = async {
            nodes.asks(&at);
            let stream = connect::open_at(target, &node.at).await?;
            let mut link = Link::over(stream, &target.at(&node.at), moved).await?;
            let lane = node.lane().expect("a master of the topology has slots");
            let server = server::inspect(&mut link, &unused_key(lane, slot), Some(lane)).await?;
            match server.software.clone().filter(|software| !software.is_seven()) {
                None => Ok((link, server)),
                Some(software) => Err(SinkError::TooOldForLanes { redis: at.clone(), software, tag: slot.to_owned() }),
            }
        };
        let (link, server) = heard(&nodes, &at, connected.await)?;
        nodes.reports(&at, Ok(server.usage()));
        Ok((Master { node, at, link, nodes }, server))
    }

    /// Sends this in one write, and shows whether there is an answer.
    async fn ask(&mut self, most: usize, request: &[u8], replies: usize) -> Result<Vec<Reply>, SinkError> {
        self.nodes.asks(&self.at);
        heard(&self.nodes, &self.at, self.link.ask_within(most, request, replies).await)
    }

    async fn load_script(&mut self) -> Result<Bytes, SinkError> {
        let mut out = BytesMut::new();
        resp::command(&mut out, &[b"SCRIPT", b"LOAD", SCRIPT.as_bytes()]);
        match self.link.ask_exactly::<1>(&out, "SCRIPT LOAD").await? {
            [Reply::Bulk(sha)] => Ok(sha),
            [Reply::Error(reply)] if reply.class() == Class::Denied => {
                Err(self.forbidden(Missing::of_command("script|load")))
            }
            [other] => Err(refusal(Request::new("SCRIPT LOAD"), "SCRIPT LOAD", other)),
        }
    }

    /// Reads the record, and the bitmap of listed lanes.
    async fn record(&mut self, own: &OwnKeys) -> Result<(Armed, Option<Bytes>), SinkError> {
        let (checkpoint, tables, dead, lanes) = (own.checkpoint(), own.tables(), own.dead(), own.lanes());
        let mut out = BytesMut::new();
        resp::command(&mut out, &[b"TYPE", dead.as_bytes()]);
        resp::command(&mut out, &[b"TYPE", checkpoint.as_bytes()]);
        resp::command(&mut out, &[b"GET", checkpoint.as_bytes()]);
        resp::command(&mut out, &[b"TYPE", tables.as_bytes()]);
        resp::command(&mut out, &[b"HGETALL", tables.as_bytes()]);
        resp::command(&mut out, &[b"GET", lanes.as_bytes()]);
        out.extend_from_slice(TIME);
        let replies: [Reply; 7] = self.link.ask_exactly(&out, "GET").await?;
        let [dead_type, checkpoint_type, head, tables_type, entries, listed, time] = replies;
        foreign(dead, dead_type, "stream")?;
        let checkpoint = stored(own, checkpoint_type, head, tables_type, entries)?;
        let listed = value_of(Request::of("GET", &lanes), listed)?;
        let dead_keys = read_dead_keys(&mut self.link, own).await?;
        Ok((Armed { checkpoint, redis_time_ms: time_of(time)?, dead_keys }, listed))
    }

    /// Reads the marks of all its slots, listed or not.
    async fn marks(&mut self, slot: &str) -> Result<Vec<(Lane, Bytes)>, SinkError> {
        let lanes: Vec<Lane> = self.node.slots.iter().cloned().flatten().filter_map(Lane::new).collect();
        let mut marks = Vec::new();
        for page in lanes.chunks(MARKS_PAGE) {
            let keys: Vec<Key> = page.iter().map(|lane| mark_key(*lane, slot)).collect();
            let mut out = BytesMut::new();
            keys.iter().for_each(|key| resp::command(&mut out, &[b"GET", key.as_bytes()]));
            let replies = self.link.ask(&out, page.len()).await?;
            for ((lane, key), reply) in page.iter().zip(&keys).zip(replies) {
                if matches!(&reply, Reply::Error(reply) if reply.class() == Class::Denied) {
                    return Err(self.forbidden(Missing::of_pattern(every_mark(slot))));
                }
                if let Some(mark) = value_of(Request::of("GET", key), reply)? {
                    marks.push((*lane, mark));
                }
            }
        }
        Ok(marks)
    }

    fn forbidden(&self, missing: Missing) -> SinkError {
        SinkError::Forbidden { user: self.link.target().acl_user().to_owned(), missing }
    }

    /// Sends the requests at these places together.
    async fn ask_some<R: Ask>(
        &mut self,
        requests: &[R],
        asked: &[usize],
        sha: &[u8],
        most: usize,
    ) -> Result<Vec<Reply>, SinkError> {
        let mut rest = asked.iter();
        let pieces = std::iter::from_fn(|| {
            let mut piece = BytesMut::with_capacity(PIECE_BYTES);
            while piece.len() < PIECE_BYTES
                && let Some(at) = rest.next()
            {
                requests[*at].write(&mut piece, sha);
            }
            (!piece.is_empty()).then_some(piece)
        });
        let request = |at: usize| {
            let mut out = BytesMut::new();
            requests[asked[at]].write(&mut out, sha);
            out
        };
        self.nodes.asks(&self.at);
        let answered = self.link.ask_each(most, pieces, asked.len(), request).await;
        let replies = heard(&self.nodes, &self.at, answered)?;
        if replies.iter().any(|reply| matches!(reply, Reply::Error(reply) if reply.code() == "NOSCRIPT")) {
            // The node was restarted, or somebody has flushed its scripts.
            self.load_script().await?;
        }
        Ok(replies)
    }
}

/// Shows what came of a request to this node.
fn heard<T>(nodes: &Nodes, at: &str, answer: Result<T, SinkError>) -> Result<T, SinkError> {
    match &answer {
        Ok(_) => nodes.answered(at),
        Err(error) => nodes.failed(at, error.to_string()),
    }
    answer
}

/// What a call has waited for.
#[derive(Default)]
struct Waits {
    since: Option<Instant>,
    /// A hash slot, and the redirection of its master.
    leads_to: Option<(Lane, ErrorReply)>,
}

/// `at` has refused a request about this hash slot.
fn why_it_waits(at: &str, lane: Lane, reply: &ErrorReply) -> String {
    let to = reply.leads_to();
    match (reply.code(), to) {
        ("ASK", Some(to)) => format!("hash slot {lane} is moving from {at} to {to}"),
        ("ASK" | "TRYAGAIN", _) => format!("hash slot {lane} is moving from {at} to another node"),
        ("MOVED", Some(to)) => format!("the nodes disagree about hash slot {lane}, which {at} says is on {to}"),
        ("READONLY", _) => format!("{at} has become a replica, and hash slot {lane} has no new master yet"),
        _ => format!("{at} refuses hash slot {lane}: {reply}"),
    }
}

/// Returns the index of each lane's master.
fn routes(masters: &[Master]) -> Vec<Option<usize>> {
    Lane::every().map(|lane| masters.iter().position(|master| master.node.serves(lane))).collect()
}

/// Returns a random number that no other session has.
fn session() -> Result<u64, SinkError> {
    let mut bytes = [0; 8];
    getrandom::fill(&mut bytes).map_err(|error| SinkError::Client(error.to_string()))?;
    Ok(u64::from_ne_bytes(bytes))
}

fn about(command: &[u8], key: &Key) -> (Lane, Bytes) {
    let mut out = BytesMut::new();
    resp::command(&mut out, &[command, key.as_bytes()]);
    (Lane::of(key.as_bytes()), out.freeze())
}

/// Another mark, or head of the record, was found than this session has left.
fn superseded<T>(lane: Option<Lane>, found: &[u8]) -> Result<T, SinkError> {
    let found = if found.is_empty() { Found::Nothing } else { Found::SomethingElse };
    Err(SinkError::Superseded { lane, found })
}

/// `request` returns the call as it was sent: a server may repeat it in what it says about a command that failed.
///
/// # Errors
/// Unless the call was performed.
fn judge(call: &Call, reply: Reply, request: impl Fn() -> Bytes) -> Result<(), SinkError> {
    let superseded = |found: &[u8]| superseded(call.lane, found);
    if call.only_reads() {
        return match value_of(Request::of("GET", &call.keys[0]), reply)? {
            Some(found) if found == call.expected => Ok(()),
            found => superseded(&found.unwrap_or_default()),
        };
    }
    let items = match reply {
        Reply::Bulk(ok) if ok == "ok" => return Ok(()),
        Reply::Array(items) => items,
        other => return Err(refusal(Request::new("EVALSHA"), "EVALSHA", other)),
    };
    match &items[..] {
        [Reply::Bulk(mark), Reply::Bulk(found)] if mark == "mark" => superseded(found),
        [Reply::Bulk(failed), Reply::Bulk(error)] if failed == "failed" => {
            Err(SinkError::Failed { lane: call.lane, reply: ErrorReply::received(error).without(&request(), None) })
        }
        _ => Err(unexpected("EVALSHA", &Reply::Array(items))),
    }
}

/// Sums, and the lowest limits. Rows are spread evenly, so together the masters have room for as many times what the
/// smallest one has.
fn together<'a>(servers: impl Iterator<Item = &'a ServerInfo> + Clone) -> ServerInfo {
    let sum = |value: fn(&ServerInfo) -> Option<u64>| servers.clone().map(value).sum::<Option<u64>>();
    let Some(first) = servers.clone().next() else { return ServerInfo::default() };
    let limits = servers.clone().map(|server| server.limits);
    let most: Option<Vec<u64>> = servers.clone().map(|server| server.maxmemory_bytes).collect();
    let smallest = most.map(|most| most.into_iter().filter(|most| *most > 0).min().unwrap_or(0));
    let mut lost: Vec<Lost> = Vec::new();
    servers.clone().flat_map(|server| &server.lost).for_each(|l| {
        if !lost.contains(l) {
            lost.push(*l);
        }
    });
    ServerInfo {
        used_memory_bytes: sum(|server| server.used_memory_bytes),
        maxmemory_bytes: smallest.map(|smallest| smallest.saturating_mul(servers.clone().count() as u64)),
        room_bytes: servers.clone().filter_map(|server| server.room_bytes).min(),
        evicted_keys: sum(|server| server.evicted_keys),
        limits: limits.reduce(Limits::lowest).unwrap_or_default(),
        lost,
        ..first.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_smallest_master_is_full_first() {
        let of = |maxmemory_bytes| ServerInfo { maxmemory_bytes, ..ServerInfo::default() };
        for (most, all) in [
            ([Some(10), Some(10)], Some(20)),
            ([Some(10), Some(90)], Some(20)),
            ([Some(0), Some(10)], Some(20)),
            ([Some(0), Some(0)], Some(0)),
            ([None, Some(10)], None),
        ] {
            assert_eq!(together(most.map(of).iter()).maxmemory_bytes, all, "{most:?}");
        }
    }

    #[test]
    fn what_a_failed_command_says_does_not_show_the_row() {
        let mark = Bytes::from_static(b"m");
        let call = Call {
            lane: Lane::new(5),
            keys: vec![Key(mark.clone())],
            expected: Bytes::new(),
            new: mark.clone(),
            if_failed: mark,
            commands: Default::default(),
        };
        let mut request = BytesMut::new();
        resp::command(&mut request, &[b"EVALSHA", b"0", b"1", b"m", b"HSET", b"1", b"2", b"name", b"Secret Name"]);
        let text = Bytes::from_static(b"ERR cannot store Secret Name here");
        let reply = Reply::Array(vec![Reply::Bulk(Bytes::from_static(b"failed")), Reply::Bulk(text)]);
        let error = judge(&call, reply, || request.clone().freeze()).unwrap_err().to_string();
        assert!(error.contains("hash slot 5: ERR cannot store"), "{error}");
        assert!(!error.contains("Secret"), "{error}");
    }
}
