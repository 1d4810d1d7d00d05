//! Hash slots whose rows are read again, one table after the other: those that have lost something, and those that have
//! moved to another node, in case that one got less than there was.

use super::load_messages::{LoadId, Only};
use super::table::Load;
use crate::command::Key;
use crate::lanes::{Lane, Lost, count};
use crate::reason::{Heal, Reason};
use crate::rules::{Rule, holds};
use crate::schema::TableId;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Slots usually move one after the other. They are read again together when none has moved for this time.
const SETTLED: Duration = Duration::from_secs(10);

#[derive(Default)]
pub(super) struct HashSlots {
    lost: Option<Rereading>,
    moved: Option<Rereading>,
    /// Those that have moved meanwhile, and when the last of them did.
    moving: Option<(BTreeSet<Lane>, Instant)>,
}

/// All rows of some hash slots are being read again.
struct Rereading {
    lanes: Arc<BTreeSet<Lane>>,
    because: Reason,
    /// The tables of which they are still to be read.
    left: BTreeSet<TableId>,
    /// Loads from this one on began after that was known.
    since: LoadId,
}

impl Rereading {
    /// Whether this load has read all of its table that is to be read.
    fn is_done_by(&self, load: &Load) -> bool {
        match &load.only {
            Only::HashSlots(lanes) => Arc::ptr_eq(lanes, &self.lanes),
            Only::All => load.has_caught_up && load.id >= self.since,
            Only::Leaves(..) => false,
        }
    }
}

impl HashSlots {
    /// What these hold is not relied on.
    pub fn lose(&mut self, Lost { lanes, because }: Lost, tables: impl Iterator<Item = TableId>) {
        let because = Reason::heals(Heal::RedisWentBack, because);
        self.lost = Some(Rereading { lanes, because, left: tables.collect(), since: LoadId(0) });
    }

    /// These have moved to another node.
    pub fn move_away(&mut self, lanes: BTreeSet<Lane>, now: Instant) {
        if !lanes.is_empty() {
            let (all, at) = self.moving.get_or_insert((BTreeSet::new(), now));
            all.extend(lanes);
            *at = now;
        }
    }

    /// Returns what is to be read now, why, and of which tables.
    ///
    /// `tables` are those that may be read, `since` is the next load.
    pub fn next(
        &mut self,
        tables: impl Iterator<Item = TableId>,
        since: LoadId,
        now: Instant,
    ) -> Option<(Only, Reason, Vec<TableId>)> {
        if self.is_idle() {
            let is_settled = |(_, at): &mut (_, Instant)| now.saturating_duration_since(*at) >= SETTLED;
            self.moved = self.moving.take_if(is_settled).map(|(lanes, _)| Rereading {
                lanes: Arc::new(lanes),
                because: Reason::ordinary("hash slots have moved to another node"),
                left: tables.filter(|_| holds(Rule::ReadMovedAgain)).collect(),
                since,
            });
        }
        let Rereading { lanes, because, left, .. } = self.lost.as_ref().or(self.moved.as_ref())?;
        Some((Only::HashSlots(lanes.clone()), because.clone(), left.iter().copied().collect()))
    }

    /// This load of the table has ended.
    pub fn were_read(&mut self, table: TableId, load: &Load) {
        for rereading in [&mut self.lost, &mut self.moved].into_iter().flatten() {
            if rereading.is_done_by(load) {
                rereading.left.remove(&table);
            }
        }
        self.lost.take_if(|lost| lost.left.is_empty());
    }

    /// The table cannot be read before a person has helped, and is loaded in full then. Returns whether rows of it may be
    /// missing or old until then.
    pub fn give_up(&mut self, table: TableId) -> bool {
        self.moved.iter_mut().for_each(|moved| _ = moved.left.remove(&table));
        let lacks_rows = self.lost.as_mut().is_some_and(|lost| lost.left.remove(&table));
        self.lost.take_if(|lost| lost.left.is_empty());
        lacks_rows
    }

    /// Whether any have lost something that is still to be read.
    pub fn is_healing(&self) -> bool {
        self.lost.is_some()
    }

    /// Returns how many have lost something that is still to be read.
    pub fn healing(&self) -> u16 {
        self.lost.as_ref().map_or(0, |lost| count(&lost.lanes))
    }

    /// Whether nothing is being read again.
    pub fn is_idle(&self) -> bool {
        self.lost.is_none() && self.moved.is_none()
    }

    /// Whether what lies at this key of the table may be missing or old, so that values which a change leaves out must not
    /// be taken from it: a load that has read the row before that change would leave what comes of it to the stream.
    ///
    /// Before what has moved is read again, that does no harm: the load sees the change.
    pub fn lacks(&self, table: TableId, key: &Key) -> bool {
        let lane = Lane::of(key.as_bytes());
        let lacks = |of: &Rereading| of.left.contains(&table) && of.lanes.contains(&lane);
        [&self.lost, &self.moved].into_iter().flatten().any(lacks)
    }

    /// Returns slots of which all rows have been read since they moved, unless they have moved again.
    pub fn take_settled(&mut self) -> BTreeSet<Lane> {
        let Some(moved) = self.moved.take_if(|moved| moved.left.is_empty()) else { return BTreeSet::new() };
        let is_moving = |lane: &Lane| self.moving.as_ref().is_some_and(|(lanes, _)| lanes.contains(lane));
        moved.lanes.iter().copied().filter(|lane| !is_moving(lane)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::load_messages::Purpose;
    use super::*;

    fn lanes(numbers: &[u16]) -> BTreeSet<Lane> {
        numbers.iter().map(|number| Lane::new(*number).expect("in range")).collect()
    }

    fn tables() -> impl Iterator<Item = TableId> {
        [TableId(0), TableId(1)].into_iter()
    }

    fn load(id: u64, only: &Only, has_caught_up: bool) -> Load {
        let because = Reason::ordinary("a test");
        Load::new(LoadId(id), Purpose::Fill, (only.clone(), has_caught_up), because, Instant::now(), 0)
    }

    #[test]
    fn what_is_lost_is_read_first_and_what_has_moved_once_nothing_moves() {
        let (mut slots, start) = (HashSlots::default(), Instant::now());
        let after = |seconds| start + Duration::from_secs(seconds);
        slots.move_away(lanes(&[1]), start);
        slots.move_away(lanes(&[2]), after(8));
        assert!(slots.next(tables(), LoadId(9), after(12)).is_none(), "more may follow");
        slots.lose(Lost { lanes: Arc::new(lanes(&[7])), because: "a test".to_owned() }, tables());
        assert_eq!(slots.healing(), 1);
        let (only, _, left) = slots.next(tables(), LoadId(9), after(30)).expect("something is lost");
        assert_eq!((&only, left.len()), (&Only::HashSlots(Arc::new(lanes(&[7]))), 2));
        slots.were_read(TableId(0), &load(1, &only, true));
        slots.were_read(TableId(1), &load(1, &Only::All, false));
        assert_eq!(slots.healing(), 1, "it may have missed what was left out");
        slots.were_read(TableId(1), &load(1, &Only::All, true));
        assert_eq!(slots.healing(), 0);

        let (only, because, _) = slots.next(tables(), LoadId(9), after(30)).expect("something has moved");
        assert_eq!((&only, because.heals), (&Only::HashSlots(Arc::new(lanes(&[1, 2]))), None));
        slots.move_away(lanes(&[2, 3]), after(31));
        slots.were_read(TableId(0), &load(1, &only, true));
        slots.were_read(TableId(1), &load(9, &Only::HashSlots(Arc::new(lanes(&[1, 2]))), true));
        slots.were_read(TableId(1), &load(8, &Only::All, true));
        assert_eq!(slots.take_settled(), lanes(&[]), "those were other loads");
        slots.were_read(TableId(1), &load(1, &only, true));
        assert_eq!(slots.take_settled(), lanes(&[1]), "the other one has moved again");
        let (only, ..) = slots.next(tables(), LoadId(9), after(41)).expect("something has moved since");
        assert_eq!(only, Only::HashSlots(Arc::new(lanes(&[2, 3]))));
        slots.were_read(TableId(0), &load(9, &Only::All, true));
        assert!(!slots.give_up(TableId(1)), "nothing is lost");
        assert_eq!(slots.take_settled(), lanes(&[2, 3]), "a table that cannot be read holds nothing up");
    }

    #[test]
    fn a_row_may_be_missing_until_its_table_was_read() {
        let mut slots = HashSlots::default();
        let [lost, kept] = ["a", "b"].map(|key| Key(bytes::Bytes::from_static(key.as_bytes())));
        let of = Arc::new(BTreeSet::from([Lane::of(lost.as_bytes())]));
        slots.lose(Lost { lanes: of.clone(), because: "a test".to_owned() }, tables());
        slots.were_read(TableId(0), &load(1, &Only::HashSlots(Arc::new((*of).clone())), true));
        let is_lost = |slots: &HashSlots, key, table| slots.lacks(TableId(table), key);
        assert!(is_lost(&slots, &lost, 0), "another load of the same slots");
        let (only, ..) = slots.next(tables(), LoadId(9), Instant::now()).expect("something is lost");
        slots.were_read(TableId(0), &load(1, &only, true));
        let of = [(&lost, 0), (&lost, 1), (&kept, 1)].map(|(key, table)| is_lost(&slots, key, table));
        assert_eq!(of, [false, true, false]);
        assert!(slots.give_up(TableId(1)) && !slots.give_up(TableId(1)));
        assert_eq!(slots.healing(), 0);

        let start = Instant::now();
        slots.move_away([Lane::of(lost.as_bytes())].into(), start);
        assert!(!is_lost(&slots, &lost, 0), "the load will see whatever changes meanwhile");
        let (only, ..) = slots.next(tables(), LoadId(9), start + SETTLED).expect("something has moved");
        assert!(is_lost(&slots, &lost, 0) && !is_lost(&slots, &kept, 0));
        slots.were_read(TableId(0), &load(9, &only, true));
        assert!(!is_lost(&slots, &lost, 0) && is_lost(&slots, &lost, 1));
    }
}
