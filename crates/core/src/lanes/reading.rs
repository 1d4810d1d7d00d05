//! Whether rows of a lane may be shown, by its mark and by the record that was read before it.

use super::Lane;
use super::mark::Mark;
use super::record::{Bitmap, Extra};
use crate::checkpoint::{Checkpoint, Place, TableMark, TableState};
use crate::rules::{Rule, holds};
use bytes::Bytes;
use std::collections::BTreeMap;

/// What the record says of all lanes.
pub struct Listing {
    epoch: u64,
    extra: Extra,
    bitmap: Bitmap,
}

/// Why rows of a lane may not be shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Doubt {
    /// Its mark is gone, or is not one.
    Lost,
    /// Its node went back to an earlier state.
    WentBack,
    /// It knows of bad news that the record does not have: the record went back.
    RecordWentBack,
}

impl Listing {
    /// `bitmap` may be missing if every lane has a mark.
    pub fn new(head: &[u8], bitmap: Option<&[u8]>) -> Self {
        let epoch = Checkpoint::head(head).map_or(0, |checkpoint| checkpoint.epoch);
        Listing { epoch, extra: Extra::of(head), bitmap: Bitmap::new(bitmap) }
    }

    /// Two readings with the same stamps are of the same writer, without bad news in between.
    pub fn stamps(&self) -> (u64, u64) {
        (self.epoch, self.extra.news)
    }

    /// Judges what was found at the key of the lane's mark after this record was read.
    ///
    /// # Errors
    /// If the lane may lack something that the record says is there, or that was shown before.
    pub fn judge(&self, lane: Lane, mark: Option<&[u8]>, seen: &mut Seen) -> Result<(), Doubt> {
        let Some(mark) = mark else {
            // A lane is listed only after its first write.
            let was_there = self.bitmap.lists(lane) || seen.has(self.epoch, lane);
            return if was_there { Err(Doubt::Lost) } else { Ok(()) };
        };
        let mark = Mark::read(mark).map_err(|_| Doubt::Lost)?;
        let is_below = self.extra.floor.is_some_and(|floor| mark.place.end() < floor);
        if is_below || mark.whole < self.extra.whole || !seen.shows(self.epoch, lane, mark.place) {
            return Err(Doubt::WentBack);
        }
        if mark.epoch > self.extra.news { Err(Doubt::RecordWentBack) } else { Ok(()) }
    }
}

/// The greatest place of each lane that was shown. If a lane later has an earlier one, its node went back.
#[derive(Debug, Default)]
pub struct Seen {
    /// Of the record. A takeover has judged all lanes, and may have taken them back with Postgres.
    epoch: u64,
    places: BTreeMap<Lane, Place>,
}

impl Seen {
    fn has(&self, epoch: u64, lane: Lane) -> bool {
        epoch <= self.epoch && self.places.contains_key(&lane)
    }

    fn shows(&mut self, epoch: u64, lane: Lane, place: Place) -> bool {
        if epoch > self.epoch {
            *self = Seen { epoch, places: BTreeMap::new() };
        }
        let seen = self.places.entry(lane).or_insert(place);
        let is_new = place >= *seen;
        *seen = place.max(*seen);
        is_new || epoch < self.epoch || !holds(Rule::RememberLanes)
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
        format!("1 {at:016x} 0 0 00000000000000ab.1 {epoch:016x} {:016x} {whole:016x} {:016x} {:016x} -", 0, 0, 0)
    }

    fn place(at: u64) -> Place {
        Place { at: Lsn::new(at).expect("not zero"), done: 0 }
    }

    #[test]
    fn a_lane_is_shown_that_has_what_the_record_says() {
        let mut bitmap = Bitmap::new(None);
        bitmap.list(lane(7));
        let listing = Listing::new(br#"{"whole":5,"news":6,"floor":"0/50"}"#, Some(&bitmap.to_bytes()));
        let judged =
            |lane, mark: Option<String>| listing.judge(lane, mark.as_deref().map(str::as_bytes), &mut Seen::default());
        assert_eq!(judged(lane(7), Some(mark(0x50, 5, 6))), Ok(()));
        assert_eq!(judged(lane(7), Some(mark(0x60, 9, 1))), Ok(()));
        assert_eq!(judged(lane(8), None), Ok(()), "nothing was ever written to it");
        assert_eq!(judged(lane(7), None), Err(Doubt::Lost));
        assert_eq!(judged(lane(7), Some("x".to_owned())), Err(Doubt::Lost));
        assert_eq!(judged(lane(7), Some(mark(0x4f, 5, 6))), Err(Doubt::WentBack));
        assert_eq!(judged(lane(7), Some(mark(0x60, 4, 6))), Err(Doubt::WentBack));
        assert_eq!(judged(lane(7), Some(mark(0x60, 5, 7))), Err(Doubt::RecordWentBack));
    }

    #[test]
    fn a_lane_that_was_shown_and_is_gone_is_lost_before_it_is_listed() {
        let listing = Listing::new(b"{}", None);
        let mut seen = Seen::default();
        assert_eq!(listing.judge(lane(7), None, &mut seen), Ok(()));
        assert_eq!(listing.judge(lane(7), Some(mark(0x50, 5, 0).as_bytes()), &mut seen), Ok(()));
        assert_eq!(listing.judge(lane(7), None, &mut seen), Err(Doubt::Lost));
    }

    #[test]
    fn a_lane_that_went_back_is_not_shown_until_somebody_has_taken_over() {
        let mut seen = Seen::default();
        assert!(seen.shows(1, lane(7), place(5)));
        assert!(seen.shows(1, lane(7), place(8)));
        assert!(seen.shows(1, lane(8), place(5)), "lanes are at different places");
        assert!(!seen.shows(1, lane(7), place(7)));
        assert!(!seen.shows(1, lane(7), place(7)));
        assert!(seen.shows(2, lane(7), place(7)));
        assert!(!seen.shows(2, lane(7), place(6)));
    }
}
