//! How long changes took, counted in classes: a percentile is exact to 2 %, whatever the number of changes, and the
//! percentiles of several seconds come from their counts, not from their percentiles.

use std::time::Duration;

/// Classes for each doubling. The middle of a class is at most 1 in 64 from every lag in it.
const PARTS: u64 = 32;
const PARTS_LOG2: u32 = PARTS.ilog2();
/// Lags above this (71 minutes) count as it.
const MOST_MICROS: u64 = u32::MAX as u64;
const CLASSES: usize = class_of(MOST_MICROS) + 1;

/// The lags of the second in progress.
#[derive(Debug, Clone)]
pub(super) struct Counting {
    counts: Box<[u32]>,
    max_micros: u64,
}

/// The same of a second that is over: only the classes that occurred, in ascending order.
#[derive(Debug, Clone, Default)]
pub(super) struct Lags {
    counts: Box<[(u16, u32)]>,
    max_micros: u64,
}

#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Percentiles {
    pub p50_ms: Option<f64>,
    pub p99_ms: Option<f64>,
    pub max_ms: Option<f64>,
}

const fn class_of(micros: u64) -> usize {
    let micros = if micros > MOST_MICROS { MOST_MICROS } else { micros };
    if micros < PARTS {
        return micros as usize;
    }
    let doublings = micros.ilog2() - PARTS_LOG2;
    ((doublings as u64 + 1) * PARTS + (micros >> doublings) - PARTS) as usize
}

fn middle_of(class: usize) -> f64 {
    let class = class as u64;
    if class < PARTS {
        return class as f64;
    }
    let (doublings, part) = (class / PARTS - 1, class % PARTS);
    (((PARTS + part) << doublings) as f64) + ((1_u64 << doublings) - 1) as f64 / 2.0
}

impl Counting {
    pub fn new() -> Self {
        Counting { counts: vec![0; CLASSES].into(), max_micros: 0 }
    }

    pub fn add(&mut self, lag: Duration) {
        let micros = u64::try_from(lag.as_micros()).unwrap_or(u64::MAX);
        let count = &mut self.counts[class_of(micros)];
        *count = count.saturating_add(1);
        self.max_micros = self.max_micros.max(micros);
    }

    /// Returns what was counted, and begins again.
    pub fn take(&mut self) -> Lags {
        let seen = self.counts.iter_mut().enumerate().filter(|(_, count)| **count > 0);
        // There are fewer than 2^16 classes.
        let counts = seen.map(|(class, count)| (class as u16, std::mem::take(count))).collect();
        Lags { counts, max_micros: std::mem::take(&mut self.max_micros) }
    }
}

/// Of all these seconds together, by nearest rank: the smallest lag that at least so many percent of them do not exceed.
pub(super) fn percentiles<'l>(seconds: impl Iterator<Item = &'l Lags>) -> Percentiles {
    let (mut counts, mut total, mut max_micros) = ([0_u64; CLASSES], 0_u64, 0);
    for lags in seconds {
        for (class, count) in &lags.counts {
            counts[usize::from(*class)] += u64::from(*count);
            total += u64::from(*count);
        }
        max_micros = max_micros.max(lags.max_micros);
    }
    if total == 0 {
        return Percentiles::default();
    }
    let percentile = |percent: u64| {
        let (rank, mut below) = ((total * percent).div_ceil(100), 0);
        let class = counts.iter().position(|count| {
            below += count;
            below >= rank
        });
        // The middle of the highest class may be above the highest lag.
        Some(millis(middle_of(class.expect("the last rank is the total")).min(max_micros as f64)))
    };
    Percentiles { p50_ms: percentile(50), p99_ms: percentile(99), max_ms: Some(millis(max_micros as f64)) }
}

fn millis(micros: f64) -> f64 {
    micros.round() / 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(micros: impl IntoIterator<Item = u64>) -> Lags {
        let mut counting = Counting::new();
        micros.into_iter().for_each(|micros| counting.add(Duration::from_micros(micros)));
        counting.take()
    }

    #[test]
    fn every_lag_is_near_the_middle_of_its_class() {
        let mut last = 0;
        for micros in (0..100_000).chain([1 << 20, (1 << 31) - 1, 1 << 31, MOST_MICROS]) {
            let class = class_of(micros);
            assert!(class >= last && class < CLASSES, "{micros}");
            last = class;
            let off = (middle_of(class) - micros as f64).abs();
            assert!(off <= micros as f64 / 64.0, "{micros} is {off} from the middle");
        }
        assert_eq!(class_of(u64::MAX), CLASSES - 1);
    }

    #[test]
    fn percentiles_are_those_of_all_changes() {
        assert_eq!(percentiles([Lags::default()].iter()), Percentiles::default());
        let (quiet, busy) = (of([10; 990]), of([1_000_000; 10]));
        let together = percentiles([&quiet, &busy].into_iter());
        assert_eq!((together.p50_ms, together.p99_ms, together.max_ms), (Some(0.01), Some(0.01), Some(1000.0)));
        let slower = of([1_000_000; 11]);
        let together = percentiles([&quiet, &slower].into_iter());
        assert!(together.p99_ms.is_some_and(|p99| (980.0..=1000.0).contains(&p99)), "{together:?}");
        assert_eq!(percentiles([&of([7])].into_iter()).p50_ms, Some(0.007));
    }

    #[test]
    fn what_was_taken_is_not_counted_again() {
        let mut counting = Counting::new();
        counting.add(Duration::from_micros(5));
        assert_eq!(counting.take().counts[..], [(5, 1)]);
        assert_eq!(percentiles([&counting.take()].into_iter()), Percentiles::default());
    }
}
