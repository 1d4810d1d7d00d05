//! Whether rows of lanes may be shown, and whether they are of one moment, by the lanes' marks and by the record that was
//! read before them.

use super::Lane;
use super::mark::{Home, Mark};
use super::record::{Bitmap, Extra};
use crate::checkpoint::{Checkpoint, Place, TableMark, TableState};
use crate::lsn::EndLsn;
use crate::rules::{Rule, holds};
use bytes::Bytes;
use std::cmp::Ordering;
use std::collections::BTreeMap;

/// What the record says of all lanes.
pub struct Listing {
    epoch: u64,
    /// Every lane has everything up to here. `None` if the record cannot be read.
    place: Option<Place>,
    /// See [`Checkpoint::base`]. Another one: a takeover relied on nothing that was in Redis.
    base: Option<EndLsn>,
    extra: Extra,
    bitmap: Bitmap,
}

/// What was found at the key of a lane's mark, before and after rows of the lane were read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Around {
    pub before: Option<Bytes>,
    pub after: Option<Bytes>,
}

/// The places of a lane before and after rows of it were read. `None`: it had never been written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Held {
    before: Option<Place>,
    after: Option<Place>,
    /// Nothing was written to it meanwhile.
    is_still: bool,
    /// Where it was last known to be complete, according to its mark before.
    home: Option<Home>,
}

impl Held {
    /// Whether keys may be missing, although no mark says so: the lane has moved to this node, and what lies in it has
    /// not been read again.
    pub fn may_lack_keys(&self, here: Option<Home>) -> bool {
        self.before.is_some() && here.is_some() && self.home != here
    }
}

/// Why rows of a lane may not be shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Doubt {
    /// Its mark is gone, or is not one.
    Lost,
    /// Its node went back to an earlier state.
    WentBack,
    /// Somebody knows of a later record, or of bad news that this one does not have: the record went back.
    RecordWentBack,
}

impl Listing {
    /// `bitmap` may be missing if every lane has a mark.
    pub fn new(head: &[u8], bitmap: Option<&[u8]>) -> Self {
        let checkpoint = Checkpoint::head(head).ok();
        let checkpoint = checkpoint.as_ref();
        Listing {
            epoch: checkpoint.map_or(0, |checkpoint| checkpoint.epoch),
            place: checkpoint.map(Checkpoint::place),
            base: checkpoint.map(|checkpoint| checkpoint.base),
            extra: Extra::of(head),
            bitmap: Bitmap::new(bitmap),
        }
    }

    /// Two readings with the same stamps are of the same writer, without bad news in between.
    pub fn stamps(&self) -> (u64, u64) {
        (self.epoch, self.extra.news)
    }

    /// Judges a lane by its marks. `shown`: what had been shown of it before they were read.
    ///
    /// # Errors
    /// If the lane may lack something that the record says is there, or that was shown before.
    pub fn judge(&self, lane: Lane, marks: &Around, shown: Option<Shown>) -> Result<Held, Doubt> {
        let before = self.judge_mark(lane, marks.before.as_deref(), shown)?;
        let after = self.judge_mark(lane, marks.after.as_deref(), shown)?;
        let home = before.as_ref().and_then(|mark| mark.home);
        let [before, after] = [before, after].map(|mark| mark.map(|mark| mark.place));
        Ok(Held { before, after, is_still: marks.before == marks.after, home })
    }

    fn judge_mark(&self, lane: Lane, mark: Option<&[u8]>, shown: Option<Shown>) -> Result<Option<Mark>, Doubt> {
        // Postgres itself may have gone back. Nothing is then shown until everything has been compared with it.
        let shown = shown.filter(|shown| shown.base == self.base && holds(Rule::RememberLanes));
        if shown.is_some_and(|shown| shown.epoch > self.epoch) {
            return Err(Doubt::RecordWentBack);
        }
        let lacks_what_was_shown = |place| shown.is_some_and(|shown| self.is_before(place, &shown));
        let Some(mark) = mark else {
            // A lane is listed only after its first write.
            let was_there = self.bitmap.lists(lane) || lacks_what_was_shown(None);
            return if was_there { Err(Doubt::Lost) } else { Ok(None) };
        };
        let mark = Mark::read(mark).map_err(|_| Doubt::Lost)?;
        let is_below = self.extra.floor.is_some_and(|floor| mark.place.end() < floor);
        if is_below || mark.whole < self.extra.whole || lacks_what_was_shown(Some(mark.place)) {
            return Err(Doubt::WentBack);
        }
        if mark.epoch > self.extra.news { Err(Doubt::RecordWentBack) } else { Ok(Some(mark)) }
    }

    /// Whether a lane with a mark at `place` may be older than what was shown of it.
    fn is_before(&self, place: Option<Place>, shown: &Shown) -> bool {
        if shown.epoch == self.epoch {
            return place < Some(shown.mark);
        }
        // Whoever has taken over since knows where every lane is, and applies again what they lack.
        place.max(self.place) < Some(shown.furthest)
    }

    /// Whether rows of lanes at these places are as of one moment: no transaction shows in one of them, and not in
    /// another.
    pub fn is_one_moment(&self, lanes: &[Held]) -> bool {
        // Whatever they hold is also what they held when the record was read.
        let are_as_recorded = lanes.iter().all(|held| held.after <= self.place);
        let are_together = lanes.iter().all(|held| held.is_still && held.after == lanes[0].after);
        are_as_recorded || are_together
    }
}

/// Rows that were read from lanes at these places are as new as this, at least. `None` if a mark does not tell.
pub fn as_of(lanes: &[Held]) -> Option<EndLsn> {
    lanes.iter().map(|held| held.before.map(Place::end)).min().flatten()
}

/// What was last shown of a lane, or written to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shown {
    base: Option<EndLsn>,
    epoch: u64,
    /// The greatest place of its mark in this epoch. If it later has an earlier one, its node went back.
    mark: Place,
    /// The greatest place of its mark in any epoch. A takeover does not mend a node that went back, but the deliveries
    /// after it do: all that the node lacks, or else the takeover sets another base.
    furthest: Place,
}

/// What was last shown of each lane, or written to it by this process.
#[derive(Debug, Default)]
pub struct Seen(BTreeMap<Lane, Shown>);

impl Seen {
    /// To be asked before the lane is read, as reads may end in any order.
    pub fn of(&self, lane: Lane) -> Option<Shown> {
        self.0.get(&lane).copied()
    }

    /// Rows of this lane are about to be shown.
    pub fn shows(&mut self, listing: &Listing, lane: Lane, held: &Held) {
        let Some(mark) = held.after else { return };
        let now = Shown { base: listing.base, epoch: listing.epoch, mark, furthest: mark };
        let shown = self.0.entry(lane).or_insert(now);
        if shown.base != now.base {
            *shown = now;
            return;
        }
        shown.furthest = shown.furthest.max(mark);
        match shown.epoch.cmp(&now.epoch) {
            Ordering::Less => (shown.epoch, shown.mark) = (now.epoch, mark),
            Ordering::Equal => shown.mark = shown.mark.max(mark),
            // A read from before a takeover that another one has seen.
            Ordering::Greater => {}
        }
    }

    /// This lane has been written, and whoever reads it from now on may rely on that. `checkpoint`: the record's.
    ///
    /// A lane that its node took back to before what was shown counts only once it has come that far again.
    pub fn was_written(&mut self, checkpoint: &Checkpoint, lane: Lane, mark: Place) {
        let base = Some(checkpoint.base);
        let now = Shown { base, epoch: checkpoint.epoch, mark, furthest: mark };
        let shown = self.0.entry(lane).or_insert(now);
        if shown.base != base || mark >= shown.furthest {
            *shown = now;
        }
    }
}

/// Returns the entry of a table of which rows may not be shown.
pub fn healing(entry: &[u8]) -> Bytes {
    match TableMark::from_json(entry) {
        Ok(mark) => TableMark { state: TableState::Healing, ..mark }.to_json().into(),
        // Whoever reads it finds out.
        Err(_) => Bytes::copy_from_slice(entry),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lsn::Lsn;

    fn lane(number: u16) -> Lane {
        Lane::new(number).expect("in range")
    }

    fn mark(at: u64, whole: u64, epoch: u64) -> String {
        format!("1 {at:016x} 0 0 {0:016x} 00000000000000ab.1 {epoch:016x} {0:016x} {whole:016x} {0:016x} {0:016x} -", 0)
    }

    fn place(at: u64) -> Place {
        Place { at: Lsn::new(at).expect("not zero"), done: 0 }
    }

    /// The head of a record at this position, with these fields in addition.
    fn head(epoch: u64, at: u64, base: u64, fields: &str) -> Vec<u8> {
        format!(
            r#"{{"system_id":"7","timeline":1,"database":"d","lsn":"0/{at:X}","state":"ready","epoch":{epoch},"seq":1,
                "beat_ms":0,"base":"0/{base:X}","entries":0{fields}}}"#
        )
        .into_bytes()
    }

    fn listing(epoch: u64, at: u64, base: u64) -> Listing {
        Listing::new(&head(epoch, at, base, ""), None)
    }

    /// Marks of a lane that is at this place all the time.
    fn still(at: u64) -> Around {
        let mark = Some(mark(at, 1, 0).into());
        Around { before: mark.clone(), after: mark }
    }

    const NEVER_WRITTEN: Around = Around { before: None, after: None };

    #[test]
    fn a_lane_is_shown_that_has_what_the_record_says() {
        let mut bitmap = Bitmap::new(None);
        bitmap.list(lane(7));
        let fields = r#","whole":5,"news":6,"floor":"0/50""#;
        let listing = Listing::new(&head(1, 0x50, 1, fields), Some(&bitmap.to_bytes()));
        let good = mark(0x50, 5, 6);
        for (number, found, judged) in [
            (7, Some(good.clone()), Ok(Some(place(0x50)))),
            (7, Some(mark(0x60, 9, 1)), Ok(Some(place(0x60)))),
            (8, None, Ok(None)),
            (7, None, Err(Doubt::Lost)),
            (7, Some("x".to_owned()), Err(Doubt::Lost)),
            (7, Some(mark(0x4f, 5, 6)), Err(Doubt::WentBack)),
            (7, Some(mark(0x60, 4, 6)), Err(Doubt::WentBack)),
            (7, Some(mark(0x60, 5, 7)), Err(Doubt::RecordWentBack)),
        ] {
            let found = found.map(Bytes::from);
            let before = Around { before: found.clone(), after: Some(good.clone().into()) };
            let after = Around { before: Some(good.clone().into()), after: found };
            let of = |marks| listing.judge(lane(number), &marks, None);
            assert_eq!(of(before).map(|held| held.before), judged);
            assert_eq!(of(after).map(|held| held.after), judged);
        }
    }

    /// Shows the lane if it may be shown.
    fn show(seen: &mut Seen, listing: &Listing, marks: &Around) -> Result<(), Doubt> {
        let held = listing.judge(lane(7), marks, seen.of(lane(7)))?;
        seen.shows(listing, lane(7), &held);
        Ok(())
    }

    #[test]
    fn a_lane_that_was_shown_and_is_gone_is_lost_before_it_is_listed() {
        let mut seen = Seen::default();
        assert_eq!(show(&mut seen, &listing(1, 5, 1), &NEVER_WRITTEN), Ok(()));
        assert_eq!(show(&mut seen, &listing(1, 5, 1), &still(8)), Ok(()));
        assert_eq!(show(&mut seen, &listing(1, 6, 1), &NEVER_WRITTEN), Err(Doubt::Lost));
        assert_eq!(show(&mut seen, &listing(2, 7, 1), &NEVER_WRITTEN), Err(Doubt::Lost));
        assert_eq!(show(&mut seen, &listing(2, 8, 1), &NEVER_WRITTEN), Ok(()), "the record has what was shown");
    }

    #[test]
    fn a_lane_that_went_back_is_not_shown_until_everything_has_been_delivered_again() {
        let mut seen = Seen::default();
        assert_eq!(show(&mut seen, &listing(1, 5, 1), &still(5)), Ok(()));
        assert_eq!(show(&mut seen, &listing(1, 5, 1), &still(8)), Ok(()));
        assert_eq!(seen.of(lane(8)), None, "lanes are at different places");
        assert_eq!(show(&mut seen, &listing(1, 9, 1), &still(7)), Err(Doubt::WentBack));
        assert_eq!(show(&mut seen, &listing(1, 9, 1), &still(7)), Err(Doubt::WentBack), "nobody has taken over");
        assert_eq!(show(&mut seen, &listing(2, 6, 1), &still(7)), Err(Doubt::WentBack), "the record is before that");
        assert_eq!(show(&mut seen, &listing(2, 8, 1), &still(7)), Ok(()));
        assert_eq!(show(&mut seen, &listing(2, 8, 1), &still(6)), Err(Doubt::WentBack));
        assert_eq!(show(&mut seen, &listing(2, 8, 1), &still(7)), Ok(()));
        assert_eq!(show(&mut seen, &listing(3, 6, 1), &still(7)), Err(Doubt::WentBack), "8 was shown");
        assert_eq!(show(&mut seen, &listing(3, 6, 1), &still(9)), Ok(()));
        assert_eq!(show(&mut seen, &listing(2, 9, 1), &still(9)), Err(Doubt::RecordWentBack));
    }

    #[test]
    fn what_was_written_counts_as_shown() {
        let mut seen = Seen::default();
        let record = |epoch, at, base| Checkpoint::head(&head(epoch, at, base, "")).expect("a head");
        seen.was_written(&record(1, 5, 1), lane(7), place(8));
        assert_eq!(show(&mut seen, &listing(1, 8, 1), &still(7)), Err(Doubt::WentBack));
        assert_eq!(show(&mut seen, &listing(1, 8, 1), &still(8)), Ok(()));
        // Whoever has taken over writes the lane where it found it.
        seen.was_written(&record(2, 6, 1), lane(7), place(6));
        assert_eq!(show(&mut seen, &listing(2, 6, 1), &still(6)), Err(Doubt::WentBack));
        seen.was_written(&record(2, 7, 1), lane(7), place(9));
        assert_eq!(show(&mut seen, &listing(2, 7, 1), &still(8)), Err(Doubt::WentBack));
        seen.was_written(&record(3, 4, 3), lane(7), place(4));
        assert_eq!(show(&mut seen, &listing(3, 4, 3), &still(4)), Ok(()), "Postgres went back");
    }

    #[test]
    fn what_a_postgres_that_went_back_had_shown_is_forgotten() {
        let mut seen = Seen::default();
        assert_eq!(show(&mut seen, &listing(1, 5, 1), &still(8)), Ok(()));
        assert_eq!(show(&mut seen, &listing(2, 4, 3), &still(4)), Ok(()));
        assert_eq!(show(&mut seen, &listing(3, 4, 3), &still(4)), Ok(()));
        assert_eq!(show(&mut seen, &listing(3, 4, 3), &still(3)), Err(Doubt::WentBack));
        // Redis has lost the record, and whoever has taken over knows of no epoch.
        assert_eq!(show(&mut seen, &listing(1, 3, 2), &still(3)), Ok(()));
        assert_eq!(show(&mut seen, &listing(1, 3, 2), &still(2)), Err(Doubt::WentBack));
    }

    #[test]
    fn rows_of_lanes_are_of_one_moment_where_no_round_shows_in_a_part_of_them() {
        let listing = listing(1, 5, 1);
        let held = |before, after| {
            let mark = |at: u64| (at > 0).then(|| Bytes::from(mark(at, 1, 0)));
            listing.judge(lane(7), &Around { before: mark(before), after: mark(after) }, None).expect("good marks")
        };
        for (lanes, is_one) in [
            (vec![(3, 3), (5, 5), (0, 0)], true),
            (vec![(3, 4), (4, 5)], true),
            (vec![(5, 5), (6, 6)], false),
            (vec![(0, 0), (6, 6)], false),
            (vec![(6, 6), (6, 6)], true),
            (vec![(6, 6), (7, 7)], false),
            (vec![(5, 6), (6, 6)], false),
            (vec![(5, 6)], false),
            (vec![(6, 6)], true),
            (vec![], true),
        ] {
            let held: Vec<Held> = lanes.iter().map(|(before, after)| held(*before, *after)).collect();
            assert_eq!(listing.is_one_moment(&held), is_one, "{lanes:?}");
        }
    }

    #[test]
    fn a_lane_may_lack_keys_where_it_has_not_been_read_again() {
        let (one, other) = (Home::of("one"), Home::of("other"));
        let found = |home| {
            let mark = Mark { home, ..Mark::read(mark(5, 1, 0).as_bytes()).expect("a mark") }.to_bytes();
            let marks = Around { before: Some(mark.clone()), after: Some(mark) };
            listing(1, 5, 1).judge(lane(7), &marks, None).expect("a good mark")
        };
        let at = |home, here| found(home).may_lack_keys(here);
        assert_eq!([at(one, one), at(one, None), at(None, None)], [false; 3]);
        assert_eq!([at(one, other), at(None, one)], [true; 2]);
        let never = listing(1, 5, 1).judge(lane(7), &NEVER_WRITTEN, None).expect("nothing is missing");
        assert!(!never.may_lack_keys(one));
    }

    #[test]
    fn rows_are_as_new_as_the_oldest_lane_was_before_them() {
        let held = |before, after| Held { before, after, is_still: before == after, home: None };
        let [three, five] = [3, 5].map(|at| Some(place(at)));
        let end = |at| Lsn::new(at).map(EndLsn);
        assert_eq!(as_of(&[held(five, five), held(three, five)]), end(3));
        assert_eq!(as_of(&[held(five, five), held(None, five)]), None);
        assert_eq!(as_of(&[]), None);
    }

    #[test]
    fn a_split_transaction_is_within_a_place() {
        let within = r#","within":{"commit":"0/9","xid":3,"time_us":1,"changes_done":4}"#;
        let listing = Listing::new(&head(1, 5, 1, within), None);
        assert_eq!(listing.place, Some(Place { at: place(9).at, done: 4 }));
    }
}
