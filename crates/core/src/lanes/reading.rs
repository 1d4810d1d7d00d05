//! Whether rows of a lane may be shown, by its mark and by the record that was read before it.

use super::Lane;
use super::mark::Mark;
use super::record::{Bitmap, Extra};
use crate::checkpoint::Place;
use std::collections::BTreeMap;

/// What the record says of all lanes.
pub struct Listing {
    extra: Extra,
    bitmap: Bitmap,
}

/// A lane whose rows may be shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shown {
    /// What its rows have reached; `None` if it never had any.
    pub place: Option<Place>,
    /// The record lacks news that the lane knows of: it must be read again, and is not to be believed if they are still
    /// missing.
    pub news: u64,
}

impl Listing {
    pub fn new(head: &[u8], bitmap: Option<&[u8]>) -> Self {
        Listing { extra: Extra::of(head), bitmap: Bitmap::new(bitmap) }
    }

    /// The stamp of the last bad news that the record has.
    pub fn news(&self) -> u64 {
        self.extra.news
    }

    /// Judges what was found at the key of the lane's mark after this record was read.
    ///
    /// # Errors
    /// If the lane lost something that the record says is there; says what.
    pub fn judge(&self, lane: Lane, mark: Option<&[u8]>) -> Result<Shown, &'static str> {
        let Some(mark) = mark else {
            return match self.bitmap.lists(lane) {
                true => Err("its node lost its rows"),
                false => Ok(Shown { place: None, news: 0 }),
            };
        };
        let mark = Mark::read(mark).map_err(|_| "another program has written its mark")?;
        let is_below = self.extra.floor.is_some_and(|floor| mark.place.end() < floor);
        if is_below || mark.whole < self.extra.whole {
            return Err("its node went back to an earlier state");
        }
        Ok(Shown { place: Some(mark.place), news: mark.epoch })
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
    /// Returns whether the lane has what it had when it was last shown.
    pub fn shows(&mut self, epoch: u64, lane: Lane, place: Place) -> bool {
        if epoch > self.epoch {
            *self = Seen { epoch, places: BTreeMap::new() };
        }
        let seen = self.places.entry(lane).or_insert(place);
        let is_new = place >= *seen;
        *seen = place.max(*seen);
        is_new || epoch < self.epoch
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

    #[test]
    fn a_lane_is_shown_that_has_what_the_record_says() {
        let mut bitmap = Bitmap::new(None);
        bitmap.list(lane(7));
        let head = br#"{"whole":5,"news":6,"floor":"0/50"}"#;
        let listing = Listing::new(head, Some(&bitmap.to_bytes()));
        let place = |at| Some(Place { at: Lsn::new(at).expect("not zero"), done: 0 });
        let judged = |lane, mark: Option<String>| listing.judge(lane, mark.as_deref().map(str::as_bytes));
        assert_eq!(judged(lane(7), Some(mark(0x50, 5, 6))), Ok(Shown { place: place(0x50), news: 6 }));
        assert_eq!(judged(lane(7), Some(mark(0x60, 9, 9))), Ok(Shown { place: place(0x60), news: 9 }));
        assert_eq!(judged(lane(8), None), Ok(Shown { place: None, news: 0 }), "nothing was ever written to it");
        for lost in [None, Some(mark(0x4f, 5, 6)), Some(mark(0x60, 4, 6)), Some("x".to_owned())] {
            assert!(judged(lane(7), lost.clone()).is_err(), "{lost:?}");
        }
    }

    #[test]
    fn a_lane_that_went_back_is_not_shown_until_somebody_has_taken_over() {
        let mut seen = Seen::default();
        let place = |at| Place { at: Lsn::new(at).expect("not zero"), done: 0 };
        assert!(seen.shows(1, lane(7), place(5)));
        assert!(seen.shows(1, lane(7), place(8)));
        assert!(seen.shows(1, lane(8), place(5)), "lanes are at different places");
        assert!(!seen.shows(1, lane(7), place(7)));
        assert!(!seen.shows(1, lane(7), place(7)));
        assert!(seen.shows(2, lane(7), place(7)));
        assert!(!seen.shows(2, lane(7), place(6)));
    }
}
