//! What the writer knows of the lanes and of the record, and from it, for each batch, which calls write it. Pure: it
//! knows no connection, and only the time that it is told.
//!
//! A batch is a *round*. First the record gets what is worse than before, and lanes that are new (`before`). Then each
//! lane gets its commands with its new mark, all lanes at once (`calls`). Then the record gets the rest (`after`). Each
//! step waits for all acknowledgements of the step before. A daemon can die, and a node can lose what it acknowledged,
//! at any point:
//!
//! - Lanes that were written and whose batch never ended are *ahead* of what is delivered again. A batch consists of
//!   states, so a lane that is ahead already has them, and is left out until the batches have reached it. Keys that a
//!   TRUNCATE removes in batches of their own, without a new position, are removed from it with the batch that has one.
//! - Whatever the record promises was true of every lane before the record said so. A lane that was rolled back since
//!   has a mark with too early a `WHOLE`, or stands below the confirmed position.
//! - Whatever the record has taken back was taken back before a lane acted on it, and marks say so (`EPOCH`). A record
//!   that was rolled back says less than they do.

use super::mark::{BadMark, Home, Mark, Nonce};
use super::news::{News, Tables};
use super::reading::Seen;
use super::record::{Bitmap, Extra};
use super::refresh::Refresh;
use super::script::{Call, Part};
use super::split::{Dead, Split, split_after};
use super::{Lane, Lost, lane_of_stream, tags};
use crate::checkpoint::{Checkpoint, ENTERED, Place};
use crate::command::Key;
use crate::lsn::{EndLsn, Lsn};
use crate::progress::redelivery::Ahead;
use crate::resp::batch::{Batch, OwnKeys};
use crate::rules::{Rule, holds};
use bytes::Bytes;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What a takeover has read. The session already has the replication slot, so nobody confirms meanwhile; whoever still
/// writes makes the first write of this session fail.
#[derive(Debug, Clone, Default)]
pub struct Survey {
    pub head: Option<Bytes>,
    pub entries: Vec<(Bytes, Bytes)>,
    /// The value of `prefetchd:{NAME}:lanes`.
    pub lanes: Option<Bytes>,
    /// What lies at the keys of marks, in all lanes, listed or not.
    pub marks: BTreeMap<Lane, Bytes>,
}

/// Why a lane, or the record, cannot be relied on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Why {
    /// It has been written, and there is no mark.
    Missing,
    Unreadable(BadMark),
    /// It stands before a position that was confirmed.
    Below {
        at: Place,
        floor: EndLsn,
    },
    /// It stands beyond the server: Postgres has lost what it holds.
    Beyond {
        at: Place,
        server: EndLsn,
    },
    /// It lacks something that the record claims; or a command failed in it.
    NotWhole,
    /// Of the record: marks know of bad news that it does not have.
    LacksNews,
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Why::Missing => f.write_str("its mark is gone"),
            Why::Unreadable(error) => write!(f, "it has {error}"),
            Why::Below { at, floor } => write!(f, "it went back to {at}, before the confirmed {floor}"),
            Why::Beyond { at, server } => write!(f, "it is at {at}, and postgres at {server}"),
            Why::NotWhole => f.write_str("it went back to before its rows were complete, or a write failed"),
            Why::LacksNews => f.write_str("it went back to before a state that lanes know of"),
        }
    }
}

/// What follows from a survey.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Judged {
    pub lost: BTreeMap<Lane, Why>,
    /// How many lanes have lost nothing.
    pub kept: usize,
    /// Set if the record was rolled back. A missing one is the caller's to see.
    pub record: Option<Why>,
    /// The least place of the record and of every lane that is not lost: where to resume.
    pub least: Option<Place>,
    /// The greatest of them. Until the session has delivered and applied everything before it, there are lanes that are
    /// ahead.
    pub greatest: Option<Place>,
    /// The last transaction that was applied to lanes, or of which a part was: where it ends, or how much of it was, and its
    /// ID. If that is beyond the confirmed position, it must be delivered again; if it is not, or if another one follows that
    /// ends before `greatest`, Postgres was rewound.
    pub last: Option<Ahead>,
    /// Where each lane is, of those of which it is known.
    pub places: Places,
}

impl Judged {
    fn resumes_at(&mut self, place: Place) {
        self.least = Some(self.least.map_or(place, |least| least.min(place)));
        self.greatest = self.greatest.max(Some(place));
    }

    /// What this mark says was written, whether or not the lane has everything before it.
    fn was_written(&mut self, mark: &Mark) {
        self.greatest = self.greatest.max(Some(mark.place));
        let place = mark.last.map_or(mark.place, Place::between);
        self.last = self.last.max((mark.xid != 0).then_some(Ahead { place, xid: mark.xid }));
    }

    pub fn loss(&self) -> Option<Loss> {
        if let Some(why) = &self.record {
            return Some(Loss::Everything(format!("redis lost a part of its checkpoint: {why}")));
        }
        let (lane, why) = self.lost.first_key_value()?;
        let because = match self.lost.len() - 1 {
            0 => format!("redis lost something in hash slot {lane}: {why}"),
            more => format!("redis lost something in hash slot {lane}: {why}; and in {more} others"),
        };
        // What Postgres has lost may be in the others, too.
        let is_postgres = self.lost.values().any(|why| matches!(why, Why::Beyond { .. }));
        Some(match is_postgres || self.kept == 0 {
            true => Loss::Everything(because),
            false => Loss::Some(Lost { lanes: Arc::new(self.lost.keys().copied().collect()), because }),
        })
    }
}

/// Where lanes are, by what their marks say.
pub type Places = Arc<BTreeMap<Lane, Place>>;

/// What must be loaded again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Loss {
    /// Nothing that the record says may be relied on, for this reason.
    Everything(String),
    /// It holds for all other lanes.
    Some(Lost),
}

/// The calls of a batch, in the order in which they must be acknowledged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Round {
    pub before: Option<Call>,
    /// At most one for a lane. They may be sent, and answered, in any order.
    pub calls: Vec<Call>,
    /// The lane of the change stream: what is announced can be read.
    pub last: Option<Call>,
    pub after: Call,
}

/// What some of the lanes hold, all together.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Share {
    pub lanes: usize,
    /// How many of them lack something that the record claims.
    pub healing: usize,
    /// Where the last of them is. `None` if there are none, or it is not known of one.
    pub least: Option<Place>,
}

/// What the writer knows.
pub struct Book {
    own: OwnKeys,
    /// The name of the replication slot.
    slot: String,
    session: u64,
    /// The number of the last write.
    write: u64,
    /// Every lane that is announced, listed, or has a mark.
    lanes: BTreeMap<Lane, Known>,
    /// How many of the listed lanes are at each place, or at none that is known.
    places: BTreeMap<Option<Place>, usize>,
    record: Record,
    /// The greatest confirmed position that anything here knows of.
    floor: Option<EndLsn>,
    /// The greatest stamp that was seen or given.
    newest: u64,
    /// Nothing has been planned yet.
    is_first: bool,
    refresh: Refresh,
    /// Improvements that the record does not say yet: see [`WITHHELD`].
    withheld: Tables,
    /// When all lanes were last written because of an improvement.
    stamped: Instant,
    /// When the record last said which lanes are listed.
    listed: Instant,
    /// Records of dead letters to remove once the lane of their row, which is ahead, has been reached: the row's key,
    /// and the hash that has the record.
    forgotten: BTreeMap<Bytes, Bytes>,
    /// Keys that a TRUNCATE removes from lanes that are ahead.
    owed: BTreeMap<Lane, Vec<Key>>,
    /// Where lanes were found that have moved.
    moved: BTreeMap<Lane, Home>,
    /// Those of them that the session has not been told.
    newly_moved: BTreeSet<Lane>,
    /// Lanes that have been read again where they are, and whose marks do not say so yet.
    settled: BTreeSet<Lane>,
    /// What the change stream had when the session began: entries of transactions that commit before that.
    announced: Option<Lsn>,
    /// What is acknowledged next.
    pending: Pending,
}

/// An improvement is stamped on every lane. Small ones, such as how long a table's rows last, are frequent where there
/// are many tables; without the latest of them the record is correct as well.
const WITHHELD: Duration = Duration::from_secs(5);

/// How often the record says again which lanes are listed, in case somebody has removed that.
const LISTED_AGAIN: Duration = Duration::from_secs(5);

/// A lane, as it was found, or as its last call was acknowledged.
#[derive(Debug, Clone)]
struct Known {
    /// Empty: there is none.
    mark: Bytes,
    /// `None`: it is not known what the lane holds, so it is behind everything.
    place: Option<Place>,
    last: Last,
    whole: u64,
    home: WhereComplete,
}

/// The last transaction that a lane's writer had applied: see [`Mark::xid`] and [`Mark::last`].
type Last = (u32, Option<EndLsn>);
const NOTHING: Last = (0, None);

/// On which node a lane was last known to be complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum WhereComplete {
    At(Home),
    /// It has moved since, and may have lost something on the way.
    Moved,
    /// Wherever it is: it is new, or all of it is loaded.
    Here,
}

impl Known {
    /// Whether the lane's mark already says what this one does. Only their nonces differ.
    fn is_as(&self, mark: &Mark) -> bool {
        let may_be = (self.place, self.whole) == (Some(mark.place), mark.whole);
        may_be && Mark::read(&self.mark).is_ok_and(|old| Mark { nonce: mark.nonce, ..old } == *mark)
    }
}

/// Whether this lane has more than everything up to `place`.
fn is_ahead(lanes: &BTreeMap<Lane, Known>, lane: Lane, place: Place) -> bool {
    lanes.get(&lane).is_some_and(|known| known.place > Some(place))
}

/// The record, as it was found, or as its last call was acknowledged.
#[derive(Clone)]
struct Record {
    /// Empty: there is none.
    head: Bytes,
    /// What the head says, without tables. `None` if the record cannot be read.
    checkpoint: Option<Arc<Checkpoint>>,
    tables: Arc<Tables>,
    extra: Extra,
    bitmap: Bitmap,
}

/// What becomes known with the acknowledgements of a round.
#[derive(Default)]
struct Pending {
    before: Option<Record>,
    lanes: BTreeMap<Lane, Known>,
    after: Option<Record>,
    planned: Option<Instant>,
}

impl Pending {
    fn is_nothing(&self) -> bool {
        self.before.is_none() && self.lanes.is_empty() && self.after.is_none()
    }
}

/// A call of the record that is being put together.
struct Edit<'a> {
    next: Record,
    /// The head's JSON, without what is [`Extra`].
    head: Vec<u8>,
    replaces_entries: bool,
    entries: &'a Tables,
    dead: &'a mut dyn Iterator<Item = &'a Dead>,
}

/// The last transaction that this checkpoint covers, or covers in part.
fn last_of(checkpoint: &Checkpoint) -> Last {
    match (checkpoint.within, checkpoint.last) {
        (Some(within), _) => (within.begin.xid, None),
        (None, Some(last)) => (last.xid, Some(last.end)),
        (None, None) => (0, None),
    }
}

impl Book {
    /// `slot` is the name of the replication slot, `session` a number drawn at random.
    pub fn new(own: OwnKeys, slot: &str, survey: &Survey, session: u64, now: Instant) -> Self {
        let head = survey.head.clone().unwrap_or_default();
        let mut checkpoint = Checkpoint::read(&head, &survey.entries).ok();
        let tables = checkpoint.as_mut().map(|checkpoint| std::mem::take(&mut checkpoint.tables));
        let record = Record {
            checkpoint: checkpoint.map(Arc::new),
            tables: Arc::new(tables.unwrap_or_default()),
            extra: Extra::of(&head),
            bitmap: Bitmap::new(survey.lanes.as_deref()),
            head,
        };
        let mut book = Book {
            own,
            slot: slot.to_owned(),
            session,
            write: 0,
            lanes: BTreeMap::new(),
            places: BTreeMap::new(),
            floor: record.extra.floor,
            newest: record.extra.whole.max(record.extra.news),
            record,
            is_first: true,
            refresh: Refresh::new(now),
            withheld: Tables::new(),
            stamped: now,
            listed: now,
            forgotten: BTreeMap::new(),
            owed: BTreeMap::new(),
            moved: BTreeMap::new(),
            newly_moved: BTreeSet::new(),
            settled: BTreeSet::new(),
            announced: None,
            pending: Pending::default(),
        };
        Lane::every().for_each(|lane| book.finds(lane, survey.marks.get(&lane), now));
        book
    }

    fn finds(&mut self, lane: Lane, mark: Option<&Bytes>, now: Instant) {
        let Record { bitmap, extra, .. } = &self.record;
        let mark = mark.cloned().unwrap_or_default();
        if mark.is_empty() && !bitmap.lists(lane) && !bitmap.announces(lane) {
            return;
        }
        let known = match Mark::read(&mark) {
            Ok(Mark { place, xid, last, epoch, floor, whole, home, .. }) => {
                self.newest = self.newest.max(whole).max(epoch);
                self.floor = self.floor.max(floor);
                let home = home.map_or(WhereComplete::Moved, WhereComplete::At);
                Known { mark, place: Some(place), last: (xid, last), whole, home }
            }
            // One that was only announced was not written, so it lacks nothing.
            Err(_) if mark.is_empty() && !bitmap.lists(lane) => {
                Known { mark, place: None, last: NOTHING, whole: extra.whole, home: WhereComplete::Here }
            }
            Err(_) => Known { mark, place: None, last: NOTHING, whole: 0, home: WhereComplete::Here },
        };
        self.knows(lane, known);
        self.refresh.is_written(lane, now);
    }

    fn knows(&mut self, lane: Lane, known: Known) {
        let is_listed = self.record.bitmap.lists(lane) || !known.mark.is_empty();
        if self.is_listed(lane)
            && let Some(old) = self.lanes.get(&lane)
            && let Some(count) = self.places.get_mut(&old.place)
        {
            *count -= 1;
            if *count == 0 {
                self.places.remove(&old.place);
            }
        }
        if is_listed {
            *self.places.entry(known.place).or_default() += 1;
        }
        self.lanes.insert(lane, known);
    }

    // ---- takeover ---------------------------------------------------------------------------------------------------

    /// Judges what was found. `confirmed` is the slot's position; `server` the server's, or the end of the record's
    /// timeline if the server has left that.
    pub fn judge(&self, confirmed: EndLsn, server: EndLsn) -> Judged {
        let floor = self.floor.map_or(confirmed, |floor| floor.max(confirmed));
        let mut judged = Judged::default();
        for (lane, known) in &self.lanes {
            if !self.is_listed(*lane) {
                continue;
            }
            match self.judge_lane(known, floor, server) {
                Err(why) => {
                    if let (Why::NotWhole, Ok(mark)) = (&why, Mark::read(&known.mark)) {
                        self.judge_record(&mark, &mut judged);
                        judged.was_written(&mark);
                    }
                    judged.lost.insert(*lane, why);
                }
                Ok(mark) => {
                    self.judge_record(&mark, &mut judged);
                    judged.kept += 1;
                    judged.resumes_at(mark.place);
                    judged.was_written(&mark);
                }
            }
        }
        let is_relied_on = |lane: &Lane| judged.lost.get(lane).is_none_or(|why| *why == Why::NotWhole);
        let known = self.lanes.iter().filter(|(lane, _)| is_relied_on(lane));
        judged.places = Arc::new(known.filter_map(|(lane, known)| Some((*lane, known.place?))).collect());
        if let Some(checkpoint) = &self.record.checkpoint {
            if checkpoint.lsn < floor {
                judged.record = Some(Why::Below { at: Place::between(checkpoint.lsn), floor });
            }
            judged.resumes_at(checkpoint.place());
        }
        judged
    }

    fn judge_record(&self, mark: &Mark, judged: &mut Judged) {
        if mark.epoch > self.record.extra.news && holds(Rule::NoticeRecordLacksNews) {
            judged.record = Some(Why::LacksNews);
        }
    }

    fn judge_lane(&self, known: &Known, floor: EndLsn, server: EndLsn) -> Result<Mark, Why> {
        if known.mark.is_empty() {
            return Err(Why::Missing);
        }
        let mark = Mark::read(&known.mark).map_err(Why::Unreadable)?;
        let at = mark.place;
        // Within a transaction, `at` is where its commit record begins.
        let is_beyond = at.end() > server || (at.done > 0 && at.end() == server);
        match () {
            () if at.end() < floor && holds(Rule::NoticeLaneWentBack) => Err(Why::Below { at, floor }),
            () if is_beyond => Err(Why::Beyond { at, server }),
            () if mark.whole < self.record.extra.whole && holds(Rule::NoticeLaneNotWhole) => Err(Why::NotWhole),
            () => Ok(mark),
        }
    }

    /// Nothing that was found is relied on: every table is loaded. Lanes are behind whatever comes, even if Postgres
    /// went back, and say so until all of them are complete.
    ///
    /// To be called before the first [`Self::plan`].
    pub fn disown(&mut self) {
        assert!(self.is_first, "a session decides at its beginning what it relies on");
        // What a Postgres had confirmed that was restored, or replaced, says nothing about this one.
        self.floor = None;
        for (lane, known) in self.lanes.clone() {
            self.knows(lane, Known { place: None, last: NOTHING, whole: 0, home: WhereComplete::Here, ..known });
        }
    }

    /// What these lanes hold is not relied on. They say so until a checkpoint does not say any more that lanes are being
    /// healed.
    ///
    /// What was written to them while an earlier session healed them is ahead, as in other lanes: no row goes back. But
    /// they do not have everything before it, so what is loaded into them must have seen all that.
    ///
    /// To be called before the first [`Self::plan`].
    pub fn heal(&mut self, lost: &BTreeMap<Lane, Why>) {
        assert!(self.is_first, "a session decides at its beginning what it relies on");
        for (lane, why) in lost {
            let known = self.lanes.get(lane).expect("a lane that has lost something was judged").clone();
            let kept = (known.place, known.last);
            let (place, last) = if *why == Why::NotWhole { kept } else { (None, NOTHING) };
            self.knows(*lane, Known { place, last, whole: 0, home: WhereComplete::Here, ..known });
        }
    }

    // ---- what is known ----------------------------------------------------------------------------------------------

    /// The position up to which every lane and the record are acknowledged. More must not be confirmed.
    pub fn safe(&self) -> Option<EndLsn> {
        let record = self.record.checkpoint.as_ref()?.lsn;
        let least = self.places.keys().next().map(|place| place.map(Place::end));
        let least = least.filter(|_| holds(Rule::ConfirmWhatLanesHave));
        least.map_or(Some(record), |least| least.min(Some(record)))
    }

    /// A lane that has been written: it must have a mark.
    fn is_listed(&self, lane: Lane) -> bool {
        self.record.bitmap.lists(lane) || self.lanes.get(&lane).is_some_and(|known| !known.mark.is_empty())
    }

    /// Returns lanes that were found on another node than the one on which they were last known to be complete.
    pub fn take_moved(&mut self) -> BTreeSet<Lane> {
        std::mem::take(&mut self.newly_moved)
    }

    /// These lanes are complete where they are.
    pub fn settles(&mut self, lanes: &BTreeSet<Lane>) {
        for lane in lanes {
            if let (Some(here), Some(known)) = (self.moved.remove(lane), self.lanes.get_mut(lane)) {
                known.home = WhereComplete::At(here);
                self.settled.insert(*lane);
            }
        }
    }

    /// What is at the key of this lane's mark, if nobody else has written it. Empty: nothing.
    pub fn expects(&self, lane: Lane) -> &[u8] {
        self.lanes.get(&lane).map_or(&[], |known| &known.mark)
    }

    /// The lanes that must have a mark.
    pub fn listed(&self) -> impl Iterator<Item = Lane> + use<'_> {
        self.lanes.keys().copied().filter(|lane| self.is_listed(*lane))
    }

    /// What the lanes of these hash slots hold.
    pub fn share(&self, slots: &[RangeInclusive<u16>]) -> Share {
        let lanes = slots.iter().filter_map(|range| Some(Lane::new(*range.start())?..=Lane::new(*range.end())?));
        let is_listed = |(lane, known): &(&Lane, &Known)| !known.mark.is_empty() || self.record.bitmap.lists(**lane);
        let known = lanes.flat_map(|range| self.lanes.range(range)).filter(is_listed);
        let mut share = Share::default();
        let mut least: Option<Option<Place>> = None;
        for (_, known) in known {
            share.lanes += 1;
            share.healing += usize::from(known.place.is_none() || known.whole < self.record.extra.whole);
            least = Some(least.map_or(known.place, |least| least.min(known.place)));
        }
        Share { least: least.flatten(), ..share }
    }

    // ---- a round ----------------------------------------------------------------------------------------------------

    /// Returns the calls that write this batch. `head` is the checkpoint's, as for one Redis; `home` tells on which
    /// node a lane lies.
    ///
    /// To be called when everything of the last round has been acknowledged.
    pub fn plan(&mut self, batch: &Batch, head: &[u8], now: Instant, home: impl Fn(Lane) -> Option<Home>) -> Round {
        assert!(self.pending.is_nothing(), "one round follows another");
        let next = Arc::new(Checkpoint::head(head).expect("this process has encoded it"));
        let owed = self.owed_by(&next);
        let stream = lane_of_stream(&self.own);
        if self.is_first {
            let place = stream.and_then(|lane| self.lanes.get(&lane)?.place);
            self.announced = place.map(|place| place.at).filter(|_| holds(Rule::AnnounceOnce));
        }
        let is_ahead = |lane| self.has(lane, next.place()) && holds(Rule::RenewLanesAhead);
        let mut split = split_after(owed, batch.body(), &self.own, self.announced, is_ahead);
        self.postpone_forgetting(&mut split.dead, next.place());
        let news = self.news(&split, &next, now);
        let stamp = (news.is_good && holds(Rule::StampBeforeGoodNews)).then(|| self.stamp(next.beat_ms, now));
        let lanes = std::mem::take(&mut split.lanes);
        let mut parts = self.parts(lanes, std::mem::take(&mut split.renewals), &next, stamp.is_some(), now, &home);
        self.floor = self.floor.max(next.floor);
        let mut extra = Extra { floor: self.floor, ..self.record.extra };
        if news.is_bad {
            extra.news = self.newer(next.beat_ms);
        }
        let before = self.announce_and_take_back(&next, &news, extra, &split, &parts, now);
        let base = self.pending.before.clone().unwrap_or_else(|| self.record.clone());
        let mut bitmap = base.bitmap.clone();
        if self.is_first {
            // Those that a record which was rolled back does not list.
            self.listed().for_each(|lane| bitmap.list(lane));
        }
        parts.keys().for_each(|lane| bitmap.list(*lane));
        let last = stream.filter(|_| holds(Rule::AnnounceLast)).and_then(|lane| Some((lane, parts.remove(&lane)?)));
        let mut call = |(lane, part)| self.call(lane, part, &next, stamp, &extra, home(lane));
        let calls = parts.into_iter().map(&mut call).collect();
        let last = last.map(call);
        extra.whole = stamp.unwrap_or(extra.whole);
        let tables = news.tables_after(&base.tables, split.replaces_entries);
        let after = Edit {
            next: Record { head: Bytes::new(), checkpoint: Some(next), tables, extra, bitmap },
            head: head.to_vec(),
            replaces_entries: split.replaces_entries,
            entries: &news.entries,
            dead: &mut split.dead.iter(),
        };
        let (after, acknowledged) = self.edit(&base, after, now);
        self.pending.after = Some(acknowledged);
        self.pending.planned = Some(now);
        self.is_first = false;
        Round { before, calls, last, after }
    }

    /// Takes an acknowledgement: the call was answered with `ok`, or with its own new mark when it was sent again.
    pub fn acknowledged(&mut self, call: &Call) {
        let planned = self.pending.planned.expect("a call belongs to a round");
        if let Some(lane) = call.lane {
            assert!(self.pending.before.is_none(), "the lanes wait for the record");
            let known = self.pending.lanes.remove(&lane).expect("a lane is written once in a round");
            assert_eq!(known.mark, call.new, "a call of this round");
            self.knows(lane, known);
            self.refresh.is_written(lane, planned);
            return;
        }
        let record = match self.pending.before.take() {
            Some(before) => before,
            None => {
                assert!(self.pending.lanes.is_empty(), "the record waits for the lanes");
                self.pending.after.take().expect("a round ends once")
            }
        };
        assert_eq!(record.head, call.new, "a call of this round");
        self.record = record;
    }

    /// Tells readers of this process what these calls, which are acknowledged, have written.
    pub fn shows<'a>(&self, calls: impl IntoIterator<Item = &'a Call>, seen: &mut Seen) {
        let Some(checkpoint) = &self.record.checkpoint else { return };
        for lane in calls.into_iter().filter_map(|call| call.lane) {
            if let Some(place) = self.lanes.get(&lane).and_then(|known| known.place) {
                seen.was_written(checkpoint, lane, place);
            }
        }
    }

    /// A stamp for this time of Redis's clock, greater than all others.
    fn newer(&mut self, redis_ms: u64) -> u64 {
        self.newest = self.newest.saturating_add(1).max(redis_ms);
        self.newest
    }

    fn stamp(&mut self, redis_ms: u64, now: Instant) -> u64 {
        self.stamped = now;
        self.newer(redis_ms)
    }

    fn nonce(&mut self) -> Nonce {
        self.write += 1;
        Nonce { session: self.session, write: self.write }
    }

    fn news(&mut self, split: &Split, next: &Checkpoint, now: Instant) -> News {
        let is_due = now.saturating_duration_since(self.stamped) >= WITHHELD;
        let Record { checkpoint, tables, .. } = &self.record;
        let is_healed = next.healing == 0 && checkpoint.as_deref().is_some_and(|old| old.healing > 0);
        let mut news = News::of(split, next, checkpoint.as_deref(), tables, &mut self.withheld, is_due || is_healed);
        news.is_good |= is_healed;
        // From now on, marks prove that this session has taken over.
        news.is_bad |= self.is_first;
        // Lists are written apart from their rows.
        news.is_bad |= next.lists_in_doubt && !checkpoint.as_deref().is_some_and(|old| old.lists_in_doubt);
        // Lanes lack keys that are there at their position.
        news.is_bad |= next.clearing.is_some() && checkpoint.as_deref().and_then(|old| old.clearing) != next.clearing;
        news
    }

    /// The record of a dead letter is as new as the lane of its row. What removes it in a lane that is ahead waits until
    /// the batches have reached that; what writes it does no harm.
    fn postpone_forgetting(&mut self, dead: &mut Vec<Dead>, place: Place) {
        let lanes = &self.lanes;
        let is_ahead = |row: &[u8]| is_ahead(lanes, Lane::of(row), place);
        let mut due: Vec<Dead> = Vec::new();
        self.forgotten.retain(|row, hash| {
            let waits = is_ahead(row);
            if !waits {
                due.push(Dead { hash: hash.clone(), row: row.clone(), set: None });
            }
            waits
        });
        for dead in dead.drain(..) {
            match &dead.set {
                None if is_ahead(&dead.row) => _ = self.forgotten.insert(dead.row, dead.hash),
                None => due.push(dead),
                Some(_) => {
                    self.forgotten.remove(&dead.row);
                    due.push(dead);
                }
            }
        }
        *dead = due;
    }

    /// Whether this lane already has what goes with a checkpoint at `place`.
    fn has(&self, lane: Lane, place: Place) -> bool {
        let before = self.record.checkpoint.as_deref().map(Checkpoint::place);
        let known = self.lanes.get(&lane).and_then(|known| known.place);
        known.is_some_and(|known| known.has_batch(before, place))
    }

    /// Whether this checkpoint goes with keys that a TRUNCATE removes ahead of the position.
    fn only_clears(&self, next: &Checkpoint) -> bool {
        next.clearing.is_some() && self.record.checkpoint.as_deref().map(Checkpoint::place) == Some(next.place())
    }

    /// The removals that lanes were spared while they were ahead, if this checkpoint has reached the TRUNCATE.
    fn owed_by(&mut self, next: &Checkpoint) -> BTreeMap<Lane, Part> {
        if self.only_clears(next) {
            return BTreeMap::new();
        }
        let removals = |keys: Vec<Key>| {
            let mut part = Part::default();
            keys.iter().for_each(|key| part.push(b"DEL", key.as_bytes(), [].into_iter()));
            part
        };
        std::mem::take(&mut self.owed).into_iter().map(|(lane, keys)| (lane, removals(keys))).collect()
    }

    /// Leaves out what lanes have that are ahead, and adds lanes without commands: all of them if they are to be stamped,
    /// otherwise those to be refreshed.
    fn parts(
        &mut self,
        mut parts: BTreeMap<Lane, Part>,
        renewals: BTreeMap<Lane, Part>,
        next: &Checkpoint,
        all: bool,
        now: Instant,
        home: impl Fn(Lane) -> Option<Home>,
    ) -> BTreeMap<Lane, Part> {
        // These were written by a session that did not end its round. They have all of this, but perhaps not yet the
        // TRUNCATE for which keys are removed ahead of the position.
        let (place, only_clears) = (next.place(), self.only_clears(next));
        let has_all: BTreeSet<Lane> = parts.keys().copied().filter(|lane| self.has(*lane, place)).collect();
        let is_ahead = |lane: &Lane| has_all.contains(lane);
        let removes = |part: &Part| only_clears && part.commands.only_delete();
        for (lane, part) in parts.iter().filter(|(lane, part)| removes(part) && is_ahead(lane)) {
            self.owed.entry(*lane).or_default().extend(part.keys.iter().cloned());
        }
        parts.retain(|lane, _| !is_ahead(lane) || !holds(Rule::LeaveOutLanesAhead));
        // A table that is loaded promises that its rows last, whoever wrote them.
        parts.extend(renewals);
        // Once the record does not say any more that keys are missing, no lane may stand before the TRUNCATE.
        let was_clearing = self.record.checkpoint.as_deref().and_then(|old| old.clearing);
        let cleared_for = was_clearing.filter(|_| next.clearing.is_none()).map(|begin| begin.commit.0);
        if let Some(commit) = cleared_for {
            let is_before = |known: &Known| known.place.is_none_or(|place| place.at <= commit);
            let before = self.lanes.iter().filter(|(_, known)| is_before(known));
            before.for_each(|(lane, _)| _ = parts.entry(*lane).or_default());
        }
        if self.is_first && next.healing > 0 {
            let healing = self.lanes.iter().filter(|(_, known)| known.whole == 0);
            healing.for_each(|(lane, _)| _ = parts.entry(*lane).or_default());
        }
        // Readers wait for that.
        std::mem::take(&mut self.settled).into_iter().for_each(|lane| _ = parts.entry(lane).or_default());
        if all {
            self.lanes.keys().for_each(|lane| _ = parts.entry(*lane).or_default());
        } else {
            let due = self.refresh.due(now, |lane| parts.contains_key(&lane), home);
            parts.extend(due.into_iter().map(|lane| (lane, Part::default())));
        }
        parts
    }

    /// Returns the record's call before those of the lanes, if they must wait for one.
    fn announce_and_take_back(
        &mut self,
        next: &Checkpoint,
        news: &News,
        extra: Extra,
        split: &Split,
        parts: &BTreeMap<Lane, Part>,
        now: Instant,
    ) -> Option<Call> {
        let old = self.record.clone();
        let mut bitmap = old.bitmap.clone();
        if holds(Rule::AnnounceLanes) {
            parts.keys().for_each(|lane| bitmap.announce(*lane));
        }
        let is_bad = news.is_bad && holds(Rule::BadNewsFirst);
        if parts.is_empty() || !(is_bad || bitmap != old.bitmap) {
            return None;
        }
        // The position does not advance. Without a record to be read, this one says of no table that it is there.
        let mut tables = (*old.tables).clone();
        tables.extend(news.worse.clone());
        let mut checkpoint = Checkpoint { tables, ..old.checkpoint.as_deref().unwrap_or(next).clone() };
        if next.place() < checkpoint.place() {
            // A lane went back. Once the epoch is another one, readers take it to have what the record says.
            (checkpoint.lsn, checkpoint.within) = (next.lsn, next.within);
        }
        checkpoint.epoch = checkpoint.epoch.max(next.epoch);
        checkpoint.clearing = next.clearing.or(checkpoint.clearing);
        checkpoint.healing = checkpoint.healing.max(next.healing);
        checkpoint.lists_in_doubt |= next.lists_in_doubt;
        for template in next.retired.iter().filter(|_| old.checkpoint.is_some()) {
            if !checkpoint.retired.contains(template) {
                checkpoint.retired.push(template.clone());
            }
        }
        let head = checkpoint.to_json();
        let tables = Arc::new(std::mem::take(&mut checkpoint.tables));
        let edit = Edit {
            next: Record { head: Bytes::new(), checkpoint: Some(Arc::new(checkpoint)), tables, extra, bitmap },
            head,
            replaces_entries: old.checkpoint.is_none(),
            entries: &news.worse,
            dead: &mut split.dead.iter().filter(|dead| dead.set.is_some()),
        };
        let (call, acknowledged) = self.edit(&old, edit, now);
        self.pending.before = Some(acknowledged);
        Some(call)
    }

    fn call(
        &mut self,
        lane: Lane,
        part: Part,
        next: &Checkpoint,
        stamp: Option<u64>,
        extra: &Extra,
        here: Option<Home>,
    ) -> Call {
        // A lane that is new lacks nothing.
        let (whole, home) = (self.record.extra.whole, WhereComplete::Here);
        let new = Known { mark: Bytes::new(), place: None, last: NOTHING, whole, home };
        let known = self.lanes.get(&lane).cloned().unwrap_or(new);
        let place = next.place();
        let (place, last) = match known.place {
            Some(ahead) if ahead > place => (ahead, known.last),
            _ => (place, last_of(next)),
        };
        let is_healing = next.healing > 0 && known.whole == 0;
        let whole = stamp.filter(|_| !is_healing).unwrap_or(known.whole);
        let home = self.home_of(lane, known.home, here);
        let nonce = self.nonce();
        let (epoch, floor) = (extra.news, extra.floor);
        let at = if let WhereComplete::At(home) = home { Some(home) } else { None };
        let mark = Mark { place, xid: last.0, last: last.1, nonce, epoch, floor, whole, swept: 0, was: None, home: at };
        let failed = Mark { whole: 0, ..mark.clone() };
        let (new, if_failed) = match part.commands.is_empty() && known.is_as(&mark) {
            // Whoever reads it notices a loss, and a late write, as well as whoever writes it.
            true => (known.mark.clone(), known.mark.clone()),
            false => (mark.to_bytes(), failed.to_bytes()),
        };
        let Part { mut keys, commands } = part;
        keys.insert(0, tags::mark_key(lane, &self.slot));
        let call = Call { lane: Some(lane), keys, expected: known.mark, new, if_failed, commands };
        let known = Known { mark: call.new.clone(), place: Some(place), last, whole, home };
        self.pending.lanes.insert(lane, known);
        call
    }

    /// That a slot has moved does not make it incomplete, unless the node that it moved from was lost meanwhile.
    fn home_of(&mut self, lane: Lane, complete: WhereComplete, here: Option<Home>) -> WhereComplete {
        let Some(here) = here else { return complete };
        match complete {
            WhereComplete::Here => WhereComplete::At(here),
            WhereComplete::At(home) if home == here => complete,
            WhereComplete::At(_) | WhereComplete::Moved => {
                if self.moved.insert(lane, here) != Some(here) {
                    self.newly_moved.insert(lane);
                }
                WhereComplete::Moved
            }
        }
    }

    /// Returns a call of the record, and what the record is once it is acknowledged.
    fn edit(&mut self, old: &Record, edit: Edit<'_>, now: Instant) -> (Call, Record) {
        let Edit { mut next, head, replaces_entries, entries, dead } = edit;
        let mut part = Part::default();
        let write = self.nonce();
        let tables = self.own.tables().as_bytes();
        match (replaces_entries, old.extra.entered) {
            (true, _) => part.push(b"DEL", tables, [].into_iter()),
            (false, Some(entered)) => {
                part.push(b"=HGET", tables, [ENTERED, entered.to_string().as_bytes()].into_iter());
            }
            (false, None) => {}
        }
        for (name, entry) in entries {
            part.push(b"HSET", tables, [name.as_bytes(), &entry.to_json()].into_iter());
        }
        if replaces_entries || !entries.is_empty() {
            part.push(b"HSET", tables, [ENTERED, write.to_string().as_bytes()].into_iter());
            next.extra.entered = Some(write);
        } else {
            next.extra.entered = old.extra.entered;
        }
        if next.bitmap != old.bitmap || now.saturating_duration_since(self.listed) >= LISTED_AGAIN {
            self.listed = now;
            let lanes = format!("{}lanes", self.own.prefix());
            part.push(b"SET", lanes.as_bytes(), [&next.bitmap.to_bytes()[..]].into_iter());
        }
        for Dead { hash, row, set } in dead {
            match set {
                Some(record) => part.push(b"HSET", hash, [&row[..], record].into_iter()),
                None => part.push(b"HDEL", hash, [&row[..]].into_iter()),
            }
        }
        next.extra.write = Some(write);
        next.head = next.extra.add_to(&head).into();
        let call = Call {
            lane: None,
            keys: std::iter::once(self.own.checkpoint().clone()).chain(part.keys).collect(),
            expected: old.head.clone(),
            new: next.head.clone(),
            if_failed: Bytes::new(),
            commands: part.commands,
        };
        (call, next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::change::{Begin, CommitTime};
    use crate::checkpoint::{TableMark, TableState};
    use crate::command::{Announced, Announcement, Command, DeadKey};
    use crate::lanes::reading::{Around, Listing};
    use crate::lsn::CommitLsn;
    use crate::resp::batch::Limits;

    fn own() -> OwnKeys {
        OwnKeys::under("prefetchd:{s}:")
    }

    fn end(n: u64) -> EndLsn {
        EndLsn(Lsn::new(n).expect("not zero"))
    }

    fn mark(state: TableState) -> TableMark {
        let entry = r#"{"template":"t:{id}","fingerprint":"00000000000000ff","state":"loaded",
                        "catalog":"00000000000000aa:0000000000000bbb","ttl_until_ms":5}"#;
        TableMark { state, ..TableMark::from_json(entry.as_bytes()).expect("the settled format") }
    }

    fn checkpoint(lsn: u64, tables: &[(&str, TableState)]) -> Checkpoint {
        let head = r#"{"system_id":"7","timeline":1,"database":"shop","lsn":"0/1","state":"ready","epoch":1,"seq":1,
                       "beat_ms":1000,"base":"0/1","entries":0}"#;
        let tables = tables.iter().map(|(name, state)| ((*name).to_owned(), mark(*state))).collect();
        Checkpoint { lsn: end(lsn), tables, ..Checkpoint::head(head.as_bytes()).expect("the settled format") }
    }

    fn batch(commands: &[Command]) -> Batch {
        let mut batch = Batch::new(own(), Limits::default());
        commands.iter().for_each(|command| batch.push(command).expect("small"));
        batch
    }

    fn delete(key: &str) -> Command {
        Command::Delete { key: Key(Bytes::copy_from_slice(key.as_bytes())) }
    }

    fn enter(name: &str, mark: &TableMark) -> Command {
        Command::Enter { table: name.to_owned(), entry: mark.to_json() }
    }

    fn lane(key: &str) -> Lane {
        Lane::of(key.as_bytes())
    }

    /// What survives a daemon.
    #[derive(Clone, Default)]
    struct Redis(Survey);

    impl Redis {
        /// A record of one loaded table, and lanes of these keys at these places.
        fn with(lsn: u64, lanes: &[(&str, u64)]) -> (Self, Book) {
            let mut redis = Redis::default();
            let mut book = redis.book();
            let first = checkpoint(1, &[("t", TableState::Loaded)]);
            redis.performs(&mut book, &[enter("t", &mark(TableState::Loaded))], &first);
            for (key, at) in lanes {
                redis.performs(&mut book, &[delete(key)], &checkpoint(*at, &[("t", TableState::Loaded)]));
            }
            redis.performs(&mut book, &[], &checkpoint(lsn, &[("t", TableState::Loaded)]));
            let book = redis.book();
            (redis, book)
        }

        fn book(&self) -> Book {
            Book::new(own(), "s", &self.0, 0xabc, Instant::now())
        }

        fn plans(book: &mut Book, commands: &[Command], checkpoint: &Checkpoint) -> Round {
            book.plan(&batch(commands), &checkpoint.to_json(), Instant::now(), |_| None)
        }

        fn performs(&mut self, book: &mut Book, commands: &[Command], checkpoint: &Checkpoint) -> Round {
            let round = Self::plans(book, commands, checkpoint);
            for call in round.before.iter().chain(&round.calls).chain([&round.after]) {
                self.does(call);
                book.acknowledged(call);
            }
            round
        }

        /// A session whose round ends after its first lane, which is this key's.
        fn is_left_in_mid_round(&mut self, key: &str, commands: &[Command], checkpoint: &Checkpoint) {
            let round = Self::plans(&mut self.book(), commands, checkpoint);
            self.does(round.before.as_ref().expect("the first of a session"));
            self.does(round.calls.iter().find(|call| call.lane == Some(lane(key))).expect("a call"));
        }

        /// Does what a call says about marks and the record.
        fn does(&mut self, call: &Call) {
            let Some(lane) = call.lane else {
                assert_eq!(self.0.head.clone().unwrap_or_default(), call.expected);
                self.0.head = Some(call.new.clone());
                for words in call.words() {
                    match &words[..] {
                        [name, _tables] if &name[..] == b"DEL" => self.0.entries.clear(),
                        [name, _, table, expected] if &name[..] == b"=HGET" => {
                            assert!(self.0.entries.contains(&(table.clone(), expected.clone())));
                        }
                        [name, tables, table, entry] if &name[..] == b"HSET" && tables == own().tables().as_bytes() => {
                            self.0.entries.retain(|(name, _)| name != table);
                            self.0.entries.push((table.clone(), entry.clone()));
                        }
                        [name, _lanes, bitmap] if &name[..] == b"SET" => self.0.lanes = Some(bitmap.clone()),
                        _ => {}
                    }
                }
                return;
            };
            assert_eq!(self.0.marks.get(&lane).cloned().unwrap_or_default(), call.expected);
            self.0.marks.insert(lane, call.new.clone());
        }

        fn mark(&self, key: &str) -> Mark {
            Mark::read(&self.0.marks[&lane(key)]).expect("a mark")
        }

        fn says(&self, table: &str) -> TableState {
            let read = Checkpoint::read(self.0.head.as_deref().unwrap_or_default(), &self.0.entries);
            read.expect("a record").tables[table].state
        }
    }

    /// Without the check that the entries are those that were written.
    fn words(call: &Call) -> Vec<String> {
        call.words()
            .iter()
            .filter(|words| &words[0][..] != b"=HGET")
            .map(|words| words.iter().map(|word| word.escape_ascii().to_string()).collect::<Vec<_>>().join(" "))
            .collect()
    }

    #[test]
    fn a_node_has_the_lanes_of_its_hash_slots() {
        let (_, mut book) = Redis::with(20, &[("a", 10), ("b", 20), ("c", 15)]);
        let of = |key: &str| lane(key).number()..=lane(key).number();
        let whole = Share { lanes: 2, healing: 0, least: Some(Place::between(end(10))) };
        assert_eq!(book.share(&[of("a"), of("c")]), whole);
        assert_eq!(book.share(&[0..=Lane::ALL - 1]).lanes, 3);
        assert_eq!(book.share(&[of("d")]), Share::default());
        book.disown();
        assert_eq!(book.share(&[of("b")]), Share { lanes: 1, healing: 1, least: None });
    }

    #[test]
    fn a_first_start_writes_the_record_alone() {
        let mut redis = Redis::default();
        let mut book = redis.book();
        let judged = book.judge(end(5), end(5));
        assert_eq!(judged, Judged::default());
        book.disown();
        let loading = checkpoint(10, &[("t", TableState::Loading)]);
        let round = redis.performs(&mut book, &[enter("t", &mark(TableState::Loading))], &loading);
        assert_eq!((round.before, round.calls.len()), (None, 0));
        assert_eq!(round.after.expected, Bytes::new());
        assert_eq!(book.safe(), Some(end(10)));
        assert_eq!(Extra::of(&round.after.new).news, 1_000, "when Redis's clock shows it");
        let read = Checkpoint::read(&round.after.new, &redis.0.entries).expect("a record");
        assert_eq!(Checkpoint { whole: 0, ..read }, loading);
    }

    #[test]
    fn a_new_lane_is_announced_before_it_is_written_and_listed_after() {
        let (mut redis, mut book) = Redis::with(10, &[]);
        let loaded = checkpoint(20, &[("t", TableState::Loaded)]);
        redis.performs(&mut book, &[], &loaded);
        let round = Redis::plans(&mut book, &[delete("a"), delete("b")], &loaded);
        let bitmap = |call: &Call| Bitmap::new(Some(call.words().last().expect("a command").last().expect("a value")));
        let before = round.before.expect("lanes are announced");
        assert!(bitmap(&before).announces(lane("a")) && !bitmap(&before).lists(lane("a")));
        assert!(bitmap(&round.after).lists(lane("a")) && bitmap(&round.after).lists(lane("b")));
        assert_eq!(round.calls.len(), 2);
        let of_a = round.calls.iter().find(|call| call.lane == Some(lane("a"))).expect("a call");
        assert_eq!((words(of_a), &of_a.expected[..]), (vec!["DEL a".to_owned()], &b""[..]));
        let read = Mark::read(&of_a.new).expect("a mark");
        assert_eq!((read.place, read.whole), (Place::between(end(20)), Extra::of(&before.new).whole));
        assert_eq!(Mark::read(&of_a.if_failed).expect("a mark"), Mark { whole: 0, ..read });

        // Whoever takes over meanwhile finds nothing lost.
        redis.does(&before);
        let between = redis.book();
        assert_eq!(between.judge(end(10), end(30)).lost, BTreeMap::new());
        assert_eq!(between.safe(), Some(end(20)));
        assert!(between.lanes.contains_key(&lane("a")), "a late write is expected");
        for call in round.calls.iter().chain([&round.after]) {
            redis.does(call);
        }
        redis.0.marks.remove(&lane("b"));
        let lost = redis.book().judge(end(10), end(30)).lost;
        assert_eq!(lost, BTreeMap::from([(lane("b"), Why::Missing)]));
    }

    #[test]
    fn bad_news_comes_before_the_lanes_and_good_news_after_all_of_them() {
        let (mut redis, mut book) = Redis::with(10, &[("a", 5), ("b", 10)]);
        let loaded = checkpoint(10, &[("t", TableState::Loaded)]);
        redis.performs(&mut book, &[], &loaded);
        let epoch = redis.mark("a").epoch;

        let incomplete = checkpoint(20, &[("t", TableState::Incomplete)]);
        let commands = [delete("a"), enter("t", &mark(TableState::Incomplete))];
        let round = Redis::plans(&mut book, &commands, &incomplete);
        let before = round.before.clone().expect("something is worse");
        redis.does(&before);
        assert_eq!(redis.says("t"), TableState::Incomplete);
        let head = Checkpoint::head(&before.new).expect("a head");
        assert_eq!(head.lsn, end(10), "the lanes are not there yet");
        let news = Extra::of(&before.new).news;
        assert!(news > epoch);
        book.acknowledged(&before);
        for call in &round.calls {
            redis.does(call);
            book.acknowledged(call);
        }
        assert_eq!(redis.mark("a").epoch, news);
        redis.does(&round.after);
        book.acknowledged(&round.after);

        // A record from before that is recognised.
        let mut back = redis.clone();
        back.0.head = Some(
            Extra { whole: 1, news: news - 1, floor: None, write: None, entered: None }
                .add_to(&loaded.to_json())
                .into(),
        );
        assert_eq!(back.book().judge(end(1), end(30)).record, Some(Why::LacksNews));
        assert_eq!(redis.book().judge(end(1), end(30)).loss(), None);

        let whole = checkpoint(20, &[("t", TableState::Loaded)]);
        let round = Redis::plans(&mut book, &[enter("t", &mark(TableState::Loaded))], &whole);
        assert_eq!((round.before, round.calls.len()), (None, 2), "every lane vouches for it");
        let unstamped = redis.0.marks[&lane("b")].clone();
        for call in &round.calls {
            redis.does(call);
            book.acknowledged(call);
            assert_eq!(redis.says("t"), TableState::Incomplete);
        }
        redis.does(&round.after);
        assert_eq!(redis.says("t"), TableState::Loaded);
        assert_eq!(redis.mark("b").whole, Extra::of(&round.after.new).whole);
        redis.0.marks.insert(lane("b"), unstamped);
        assert_eq!(redis.book().judge(end(1), end(30)).lost, BTreeMap::from([(lane("b"), Why::NotWhole)]));
    }

    #[test]
    fn a_record_that_was_lost_hides_rows_before_it_has_a_position() {
        let (mut redis, _) = Redis::with(10, &[("a", 10)]);
        (redis.0.head, redis.0.entries) = (None, Vec::new());
        let mut book = redis.book();
        book.disown();
        let commands = [delete("a"), enter("t", &mark(TableState::Healing))];
        let round = Redis::plans(&mut book, &commands, &checkpoint(20, &[("t", TableState::Healing)]));
        redis.does(&round.before.expect("the first of a session"));
        assert_eq!(redis.says("t"), TableState::Healing);
    }

    #[test]
    fn a_position_is_taken_back_before_lanes_are_written() {
        let (_, mut book) = Redis::with(10, &[("a", 5), ("b", 10)]);
        let resumed = Checkpoint { epoch: 2, ..checkpoint(5, &[("t", TableState::Loaded)]) };
        let before = Redis::plans(&mut book, &[delete("a")], &resumed).before.expect("the first of a session");
        let head = Checkpoint::head(&before.new).expect("a head");
        assert_eq!((head.epoch, head.lsn), (2, end(5)));
    }

    #[test]
    fn a_lane_that_is_ahead_is_left_out_until_it_is_reached() {
        let (mut redis, _) = Redis::with(10, &[("a", 5), ("b", 10)]);
        let loaded = |at| checkpoint(at, &[("t", TableState::Loaded)]);
        redis.is_left_in_mid_round("b", &[delete("a"), delete("b")], &loaded(30));

        let mut book = redis.book();
        let judged = book.judge(end(5), end(50));
        let (least, greatest) = (Place::between(end(5)), Place::between(end(30)));
        assert_eq!((judged.least, judged.greatest, judged.loss()), (Some(least), Some(greatest), None));
        redis.performs(&mut book, &[], &loaded(5));
        let lanes = |round: &Round| round.calls.iter().map(|call| call.lane).collect::<Vec<_>>();
        let round = redis.performs(&mut book, &[delete("a"), delete("b")], &loaded(29));
        assert_eq!(lanes(&round), [Some(lane("a"))]);
        assert_eq!(book.safe(), Some(end(29)));
        let round = redis.performs(&mut book, &[delete("b")], &loaded(30));
        assert_eq!(lanes(&round), [], "it has all of this already");
        let round = redis.performs(&mut book, &[delete("b")], &loaded(31));
        assert_eq!(lanes(&round), [Some(lane("b"))]);
        assert_eq!(book.safe(), Some(end(29)), "the other has not been refreshed");
    }

    /// The entries lie in a key of their own, which may be removed, or go back, alone.
    #[test]
    fn a_record_whose_entries_are_not_its_own_is_none() {
        let (redis, book) = Redis::with(10, &[("a", 5)]);
        assert!(book.record.checkpoint.is_some());
        type Entries = Vec<(Bytes, Bytes)>;
        let breaks: [fn(&mut Entries); 4] = [
            |entries: &mut Entries| entries.clear(),
            |entries: &mut Entries| entries.retain(|(name, _)| name == ENTERED),
            |entries: &mut Entries| entries.retain(|(name, _)| name != ENTERED),
            |entries: &mut Entries| {
                entries.iter_mut().for_each(|(name, of)| {
                    if name == ENTERED {
                        *of = "00000000000000ab.1".into();
                    }
                })
            },
        ];
        for break_them in breaks {
            let mut broken = redis.clone();
            break_them(&mut broken.0.entries);
            assert!(broken.book().record.checkpoint.is_none(), "{:?}", broken.0.entries);
        }
    }

    #[test]
    fn every_call_of_the_record_checks_its_entries() {
        let (mut redis, mut book) = Redis::with(10, &[("a", 5)]);
        let loaded = checkpoint(10, &[("t", TableState::Loaded)]);
        for commands in [&[][..], &[delete("a")], &[enter("t", &mark(TableState::Incomplete))], &[]] {
            let entered = redis.0.entries.iter().find(|(name, _)| name == ENTERED).expect("it is there").1.clone();
            let round = redis.performs(&mut book, commands, &loaded);
            let first = round.before.as_ref().unwrap_or(&round.after);
            assert_eq!(
                first.words()[0][..],
                [Bytes::from_static(b"=HGET"), own().tables().0.clone(), "".into(), entered]
            );
        }
    }

    #[test]
    fn which_lanes_are_listed_is_said_again() {
        let (_, mut book) = Redis::with(10, &[("a", 5)]);
        let loaded = checkpoint(10, &[("t", TableState::Loaded)]);
        let is_listed = |book: &mut Book, now| {
            let round = book.plan(&batch(&[]), &loaded.to_json(), now, |_| None);
            let is_said = round.after.words().iter().any(|words| &words[0][..] == b"SET");
            for call in round.before.iter().chain(&round.calls).chain([&round.after]) {
                book.acknowledged(call);
            }
            is_said
        };
        let start = book.listed;
        assert!(!is_listed(&mut book, start + LISTED_AGAIN / 2));
        assert!(is_listed(&mut book, start + LISTED_AGAIN));
        assert!(!is_listed(&mut book, start + LISTED_AGAIN * 3 / 2));
    }

    /// What a lane had lost ahead of its place, for a TRUNCATE, must not come back when the stream reaches that place again.
    #[test]
    fn a_lane_does_not_get_again_what_it_has_at_its_place() {
        let (mut redis, _) = Redis::with(10, &[("a", 5), ("b", 10)]);
        let loaded = |at| checkpoint(at, &[("t", TableState::Loaded)]);
        redis.is_left_in_mid_round("b", &[delete("a"), delete("b")], &loaded(30));
        let mut book = redis.book();
        redis.performs(&mut book, &[], &loaded(5));
        let lanes = |round: &Round| round.calls.iter().map(|call| call.lane).collect::<Vec<_>>();
        let round = redis.performs(&mut book, &[delete("a"), delete("b")], &loaded(30));
        assert_eq!(lanes(&round), [Some(lane("a"))]);
        // But what is written without advancing is new.
        let round = redis.performs(&mut book, &[delete("b")], &loaded(30));
        assert_eq!(lanes(&round), [Some(lane("b"))]);
    }

    /// A TRUNCATE removes keys ahead of its position. A lane that is ahead of that, but behind the TRUNCATE, must lose them as
    /// well, and not before it is reached: nobody else has written what they held there.
    #[test]
    fn a_lane_that_is_ahead_gets_the_removals_of_a_truncate_when_it_is_reached() {
        let (mut redis, _) = Redis::with(10, &[("a", 5), ("b", 5), ("c", 10)]);
        let loaded = |at| checkpoint(at, &[("t", TableState::Loaded)]);
        for (key, at) in [("b", 22), ("c", 30)] {
            redis.is_left_in_mid_round(key, &[delete("a"), delete(key)], &loaded(at));
        }
        let mut book = redis.book();
        redis.performs(&mut book, &[], &loaded(20));
        let truncate = Begin { commit: CommitLsn(Lsn::new(25).expect("not zero")), xid: 7, time: CommitTime(0) };
        let clearing = Checkpoint { clearing: Some(truncate), ..loaded(20) };
        let of = |round: &Round, key: &str| round.calls.iter().find(|call| call.lane == Some(lane(key))).map(words);
        let round = redis.performs(&mut book, &[delete("a"), delete("b"), delete("c")], &clearing);
        assert_eq!(of(&round, "a"), Some(vec!["DEL a".to_owned()]));
        assert_eq!((of(&round, "b"), of(&round, "c")), (None, None));
        let round = redis.performs(&mut book, &[], &loaded(26));
        assert_eq!(of(&round, "b"), Some(vec!["DEL b".to_owned()]));
        assert_eq!(of(&round, "c"), None, "it is beyond the TRUNCATE");
    }

    #[test]
    fn what_is_disowned_is_behind_everything_and_whole_only_when_all_is() {
        let (mut redis, mut book) = Redis::with(300, &[("a", 300), ("b", 300)]);
        let judged = book.judge(end(100), end(200));
        let beyond = Why::Beyond { at: Place::between(end(300)), server: end(200) };
        assert_eq!(judged.lost, BTreeMap::from([(lane("a"), beyond.clone()), (lane("b"), beyond)]));
        book.disown();
        let healing = checkpoint(200, &[("t", TableState::Healing)]);
        let commands = [Command::Delete { key: own().tables().clone() }, enter("t", &mark(TableState::Healing))];
        redis.performs(&mut book, &commands, &healing);
        assert_eq!(book.safe(), None, "nothing is known to be in any lane");
        let counted = |book: &Book| book.places.values().sum::<usize>();
        assert_eq!(counted(&book), 2);
        redis.performs(&mut book, &[delete("a")], &checkpoint(210, &[("t", TableState::Healing)]));
        assert_eq!((redis.mark("a").place, redis.mark("a").whole), (Place::between(end(210)), 0));
        assert!(matches!(redis.book().judge(end(100), end(220)).lost[&lane("a")], Why::NotWhole));
        redis.performs(
            &mut book,
            &[enter("t", &mark(TableState::Loaded))],
            &checkpoint(220, &[("t", TableState::Loaded)]),
        );
        assert_eq!((book.safe(), counted(&book), book.places.len()), (Some(end(220)), 2, 1));
        assert_eq!(redis.book().judge(end(100), end(220)).loss(), None);
    }

    /// A Postgres that was restored, or is another one, may stand before what an earlier one had confirmed.
    #[test]
    fn what_was_confirmed_to_a_postgres_that_went_back_is_forgotten_with_what_it_held() {
        let (mut redis, mut book) = Redis::with(300, &[("a", 300)]);
        let confirmed = Checkpoint { floor: Some(end(250)), ..checkpoint(300, &[("t", TableState::Loaded)]) };
        redis.performs(&mut book, &[delete("a")], &confirmed);
        assert_eq!(redis.mark("a").floor, Some(end(250)));
        let mut book = redis.book();
        assert!(book.judge(end(100), end(200)).loss().is_some());
        book.disown();
        let healing = checkpoint(200, &[("t", TableState::Healing)]);
        redis.performs(&mut book, &[enter("t", &mark(TableState::Healing))], &healing);
        let loaded = checkpoint(210, &[("t", TableState::Loaded)]);
        redis.performs(&mut book, &[enter("t", &mark(TableState::Loaded))], &loaded);
        assert_eq!(redis.book().judge(end(100), end(220)).loss(), None);
        let head = redis.0.head.clone().expect("a record");
        let mark = redis.0.marks.get(&lane("a")).cloned();
        let shown = Listing::new(&head, None).judge(lane("a"), &Around { before: mark.clone(), after: mark }, None);
        assert!(shown.is_ok(), "{shown:?}");
    }

    #[test]
    fn a_lane_that_has_moved_is_complete_where_it_was_until_it_is_read_again() {
        let mut redis = Redis::default();
        let mut book = redis.book();
        let loaded = |at| checkpoint(at, &[("t", TableState::Loaded)]);
        let node = |name: &str| Home::of(name).expect("a name");
        let mut write = |book: &mut Book, at, home: &str| {
            let commands = batch(&[delete("a"), delete("b")]);
            let round = book.plan(&commands, &loaded(at).to_json(), Instant::now(), |_| Some(node(home)));
            for call in round.before.iter().chain(&round.calls).chain([&round.after]) {
                redis.does(call);
                book.acknowledged(call);
            }
            (redis.mark("a").home, redis.clone())
        };
        assert_eq!(write(&mut book, 20, "x").0, Some(node("x")));
        assert_eq!(book.take_moved(), BTreeSet::new());
        assert_eq!(write(&mut book, 30, "y").0, None, "it may lack what was lost on the way");
        assert_eq!(book.take_moved(), [lane("a"), lane("b")].into());
        let (_, redis) = write(&mut book, 40, "y");
        assert_eq!(book.take_moved(), BTreeSet::new(), "once");

        // The next daemon does not know either.
        let mut next = redis.book();
        assert_eq!(write(&mut next, 50, "y").0, None);
        assert_eq!(next.take_moved(), [lane("a"), lane("b")].into());
        next.settles(&[lane("a")].into());
        let (home, redis) = write(&mut next, 60, "y");
        assert_eq!((home, redis.mark("b").home), (Some(node("y")), None));

        // Back where it was, it may lack what was lost on the way back.
        assert_eq!(write(&mut next, 70, "x").0, None);
        assert_eq!(next.take_moved(), [lane("a"), lane("b")].into());
    }

    #[test]
    fn a_mark_that_would_stay_as_it_is_is_only_read() {
        let (mut redis, mut book) = Redis::with(10, &[("a", 10)]);
        let start = Instant::now();
        let mut refreshes = |seconds, at| {
            let loaded = checkpoint(at, &[("t", TableState::Loaded)]).to_json();
            let round = book.plan(&batch(&[]), &loaded, start + Duration::from_secs(seconds), |_| None);
            for call in round.before.iter().chain(&round.calls).chain([&round.after]) {
                redis.does(call);
                book.acknowledged(call);
            }
            let [call] = &round.calls[..] else { panic!("one lane") };
            if call.only_reads() { "read" } else { "written" }
        };
        assert_eq!(refreshes(30, 10), "written", "another session has written it");
        assert_eq!(refreshes(60, 10), "read");
        assert_eq!(refreshes(90, 11), "written");
        assert_eq!(refreshes(120, 11), "read");
        assert_eq!(book.safe(), Some(end(11)));
    }

    #[test]
    fn small_improvements_wait() {
        let (mut redis, mut book) = Redis::with(10, &[("a", 5)]);
        let start = Instant::now();
        let loaded = checkpoint(10, &[("t", TableState::Loaded)]);
        redis.performs(&mut book, &[], &loaded);
        let longer = |ms| TableMark { ttl_until_ms: Some(ms), ..mark(TableState::Loaded) };
        let round = redis.performs(&mut book, &[enter("t", &longer(9))], &loaded);
        assert_eq!((round.before, round.calls.len()), (None, 0));
        let says = |redis: &Redis| TableMark::from_json(&redis.0.entries[0].1).expect("an entry").ttl_until_ms;
        assert_eq!(says(&redis), Some(5));
        let round = book.plan(&batch(&[]), &loaded.to_json(), start + 2 * WITHHELD, |_| None);
        assert_eq!(round.calls.len(), 1, "every lane");
        redis.does(&round.after);
        assert_eq!(says(&redis), Some(9));
    }

    #[test]
    fn the_record_doubts_lists_before_they_are_written_and_while_they_are() {
        let (mut redis, mut book) = Redis::with(10, &[("t:1", 10), ("all", 10)]);
        let loaded = |at, lists_in_doubt| Checkpoint { lists_in_doubt, ..checkpoint(at, &[("t", TableState::Loaded)]) };
        redis.performs(&mut book, &[], &loaded(10, false));
        let doubts = |call: &Call| Checkpoint::head(&call.new).expect("a head").lists_in_doubt;
        let list = Key(Bytes::from_static(b"all"));
        let join = Command::Join { key: list, members: vec![(Bytes::from_static(b"1"), None)], ttl_ms: 9 };
        let changes = [delete("t:1"), join];
        let round = redis.performs(&mut book, &changes, &loaded(20, true));
        assert_eq!(round.before.as_ref().map(doubts), Some(true));
        assert_eq!((round.calls.len(), doubts(&round.after)), (2, true));
        let round = redis.performs(&mut book, &changes, &loaded(30, true));
        assert_eq!(round.before, None, "it says so already");
        let round = redis.performs(&mut book, &[], &loaded(30, false));
        assert_eq!((round.before, doubts(&round.after)), (None, false));
    }

    #[test]
    fn what_is_announced_is_written_first() {
        let redis = Redis::with(10, &[("a", 10)]).0;
        let own = own().announcing(Some(crate::resp::batch::ChangeStream::at("changes", 10)));
        let mut book = Book::new(own.clone(), "s", &redis.0, 0xabc, Instant::now());
        let mut batch = Batch::new(own, Limits::default());
        let by = Some(Begin { xid: 1, commit: CommitLsn(Lsn::new(15).expect("not zero")), time: CommitTime(1) });
        let (op, table, key) = (Announced::Delete, "t".to_owned(), Bytes::from_static(b"a"));
        for command in [delete("a"), Command::Announce(Announcement { op, table, key, by }), delete("{changes}:1")] {
            batch.push(&command).expect("small");
        }
        let loaded = checkpoint(20, &[("t", TableState::Loaded)]);
        let round = book.plan(&batch, &loaded.to_json(), Instant::now(), |_| None);
        assert_eq!(round.calls.iter().map(|call| call.lane).collect::<Vec<_>>(), [Some(lane("a"))]);
        let last = words(&round.last.expect("the lane of the stream"));
        assert!(last.len() == 2 && last[0].starts_with("XADD changes"), "{last:?}");
    }

    #[test]
    fn a_row_that_dies_is_recorded_before_it_is_gone_and_one_that_lives_forgotten_after() {
        let (mut redis, mut book) = Redis::with(10, &[("a", 10)]);
        let loaded = |at| checkpoint(at, &[("t", TableState::Loaded)]);
        redis.performs(&mut book, &[], &loaded(10));
        let row = Key(Bytes::from_static(b"a"));
        let dead = DeadKey { table: "t".to_owned(), reason: "r".to_owned(), lsn: "0/1".to_owned() };
        let dies = [delete("a"), Command::Remember { key: row.clone(), dead }];
        let round = redis.performs(&mut book, &dies, &loaded(20));
        let hash = String::from_utf8_lossy(own().dead_keys_of(&row).as_bytes()).into_owned();
        let before = words(&round.before.expect("a key is missing from now on"));
        assert!(before[0].starts_with(&format!("HSET {hash} a")), "{before:?}");
        let lives = [delete("a"), Command::Forget { key: row }];
        let round = redis.performs(&mut book, &lives, &loaded(30));
        assert_eq!((round.before, words(&round.after)), (None, vec![format!("HDEL {hash} a")]));

        // In a lane that is ahead, it may be dead again.
        let mut book = redis.book();
        redis.performs(&mut book, &[], &loaded(10));
        let round = redis.performs(&mut book, &lives, &loaded(20));
        assert_eq!((round.calls.len(), words(&round.after)), (0, vec![]));
        let round = redis.performs(&mut book, &[], &loaded(30));
        assert_eq!(words(&round.after), [format!("HDEL {hash} a")]);
    }
}
