//! Medians, spreads and percentiles, as the tables show them.

use std::time::Duration;

/// The median.
pub fn median(times: &[Duration]) -> Duration {
    let mut sorted = times.to_vec();
    sorted.sort_unstable();
    sorted[sorted.len() / 2]
}

/// In thousands per second.
pub fn rate(count: u64, time: Duration) -> f64 {
    count as f64 / time.as_secs_f64() / 1000.0
}

/// The median rate, and from the lowest to the highest.
pub fn rates(count: u64, times: &[Duration]) -> String {
    let rates: Vec<f64> = times.iter().map(|time| rate(count, *time)).collect();
    let middle = rate(count, median(times));
    let decimals = [10.0, 1.0].iter().filter(|least| middle < **least).count();
    spread(middle, "k", decimals, &rates)
}

/// The median in seconds, and from the shortest to the longest.
pub fn seconds(times: &[Duration]) -> String {
    let seconds: Vec<f64> = times.iter().map(Duration::as_secs_f64).collect();
    spread(median(times).as_secs_f64(), "s", 2, &seconds)
}

fn spread(middle: f64, unit: &str, decimals: usize, all: &[f64]) -> String {
    if all.len() == 1 {
        return format!("{middle:.decimals$} {unit}");
    }
    let (lowest, highest) = all.iter().fold((f64::INFINITY, 0.0_f64), |(a, b), one| (a.min(*one), b.max(*one)));
    format!("{middle:.decimals$} {unit} ({lowest:.decimals$} to {highest:.decimals$})")
}

/// Latencies in ascending order.
pub struct Sorted(Vec<Duration>);

impl Sorted {
    pub fn new(mut times: Vec<Duration>) -> Self {
        times.sort_unstable();
        Self(times)
    }

    /// In milliseconds: `part` 0.5 is the median, 1.0 the largest.
    pub fn ms(&self, part: f64) -> f64 {
        let at = self.0.len().saturating_sub(1) as f64 * part;
        self.0.get(at as usize).map_or(f64::NAN, |time| time.as_secs_f64() * 1000.0)
    }
}
