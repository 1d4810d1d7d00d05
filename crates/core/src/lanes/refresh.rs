//! Which lanes are written although nothing changes in them: so that what they are known to hold does not fall behind,
//! and a loss is noticed. Where the mark would stay as it is, because the position has not moved, it is only read.

use super::Lane;
use super::mark::Home;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

/// Every lane is written once in this time, or in a little more if there are very many. Confirmation may lag as much.
const CYCLE: Duration = Duration::from_secs(25);
/// The most lanes that one round refreshes.
pub(super) const MOST: usize = 600;
/// One lane of each node is written about as often as the heartbeat: a little less, because that is not exact.
const NODES: Duration = Duration::from_millis(900);

pub(super) struct Refresh {
    /// When each lane was last written, or read at the takeover, by its number.
    written: Vec<Option<Instant>>,
    /// How many lanes that are.
    lanes: usize,
    /// Oldest first. An entry is void if its lane has been written since.
    oldest: VecDeque<(Instant, Lane)>,
    /// In lanes times nanoseconds: `CYCLE` worth of it is a lane.
    credit: u128,
    credited: Instant,
    nodes_seen: Instant,
}

impl Refresh {
    pub fn new(now: Instant) -> Self {
        let written = vec![None; usize::from(Lane::ALL)];
        let oldest = VecDeque::new();
        Refresh { written, lanes: 0, oldest, credit: 0, credited: now, nodes_seen: now }
    }

    /// Time does not go back from one call to the next.
    pub fn is_written(&mut self, lane: Lane, now: Instant) {
        let before = self.written[usize::from(lane.number())].replace(now);
        if before == Some(now) {
            return;
        }
        self.lanes += usize::from(before.is_none());
        self.oldest.push_back((now, lane));
        if self.oldest.len() > 2 * usize::from(Lane::ALL) {
            let written = &self.written;
            self.oldest.retain(|entry| is_current(written, entry));
        }
    }

    /// Returns lanes to refresh in a round that writes those for which `is_taken` holds. `home` tells their nodes.
    pub fn due(
        &mut self,
        now: Instant,
        is_taken: impl Fn(Lane) -> bool,
        home: impl Fn(Lane) -> Option<Home>,
    ) -> BTreeSet<Lane> {
        let lanes = self.lanes as u128;
        let passed = now.saturating_duration_since(self.credited).as_nanos();
        self.credited = now;
        self.credit = (self.credit + passed * lanes).min(MOST as u128 * CYCLE.as_nanos());
        let quota = usize::try_from(self.credit / CYCLE.as_nanos()).unwrap_or(MOST);
        self.credit %= CYCLE.as_nanos();
        let written = &self.written;
        while self.oldest.front().is_some_and(|entry| !is_current(written, entry)) {
            self.oldest.pop_front();
        }
        let oldest = || self.oldest.iter().filter(|entry| is_current(written, entry)).map(|(_, lane)| *lane);
        let mut due: BTreeSet<Lane> = oldest().filter(|lane| !is_taken(*lane)).take(quota).collect();
        if now.saturating_duration_since(self.nodes_seen) >= NODES {
            self.nodes_seen = now;
            let mut of_node: BTreeMap<Home, (bool, Lane)> = BTreeMap::new();
            for lane in oldest() {
                if let Some(home) = home(lane) {
                    let (is_written, _) = of_node.entry(home).or_insert((false, lane));
                    *is_written = *is_written || due.contains(&lane) || is_taken(lane);
                }
            }
            due.extend(of_node.into_values().filter(|(is_written, _)| !is_written).map(|(_, lane)| lane));
        }
        due
    }
}

/// Whether the lane has not been written since this entry.
fn is_current(written: &[Option<Instant>], (at, lane): &(Instant, Lane)) -> bool {
    written[usize::from(lane.number())] == Some(*at)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lane(number: u16) -> Lane {
        Lane::new(number).expect("in range")
    }

    fn refresh(lanes: impl Iterator<Item = u16>, now: Instant) -> Refresh {
        let mut refresh = Refresh::new(now);
        lanes.for_each(|number| refresh.is_written(lane(number), now));
        refresh
    }

    fn node(lane: Lane) -> Option<Home> {
        Home::of(["a", "b", "c"][usize::from(lane.number() % 3)])
    }

    #[test]
    fn all_lanes_are_refreshed_within_30_seconds() {
        for lanes in [1, 7, 1_000, Lane::ALL] {
            let start = Instant::now();
            let mut refresh = refresh(0..lanes, start);
            let mut last: BTreeMap<Lane, u64> = BTreeMap::new();
            for second in 1..100 {
                let now = start + Duration::from_secs(second);
                let due = refresh.due(now, |_| false, |_| None);
                assert!(due.len() <= MOST);
                for lane in due {
                    refresh.is_written(lane, now);
                    assert!(second - last.insert(lane, second).unwrap_or(0) <= 30);
                }
            }
            assert_eq!(last.len(), usize::from(lanes));
            assert!(last.values().all(|second| *second >= 70));
        }
    }

    #[test]
    fn many_rounds_refresh_no_more_than_few() {
        let start = Instant::now();
        let mut refresh = refresh(0..1_000, start);
        let mut count = 0;
        for tick in 1..=10_000_u64 {
            let now = start + Duration::from_millis(tick);
            for lane in refresh.due(now, |_| false, |_| None) {
                refresh.is_written(lane, now);
                count += 1;
            }
        }
        assert_eq!(count, 400, "10 of 25 seconds");
    }

    #[test]
    fn one_lane_of_each_node_is_written_every_second() {
        let start = Instant::now();
        let mut refresh = refresh((0..3).chain([9]), start);
        let soon = refresh.due(start + Duration::from_millis(10), |_| false, node);
        assert!(soon.is_empty());
        let due = refresh.due(start + Duration::from_secs(1), |of| of == lane(9), node);
        assert_eq!(due, [lane(1), lane(2)].into(), "a lane of the first node is written anyway");
    }
}
