//! Runs many schedules on every core, and shrinks each failing one to the shortest that still fails.

use super::coverage::Coverage;
use super::{Outcome, Schedule, Servers};
use crate::rules::{self, Rule};
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

/// How many runs shrinking one schedule may take.
const RUNS_TO_SHRINK: usize = 2_000;

#[derive(Default)]
pub struct Report {
    /// The seeds that violated a guarantee, with the guarantee, in ascending order.
    pub failures: Vec<(u64, String)>,
    pub coverage: Coverage,
    pub loads: u64,
    /// How many rows were checked against the guarantees.
    pub rows_looked_at: u64,
    pub verifications: u64,
    pub dead_letters: u64,
    /// The most steps that any schedule needed to settle after its last fault, and its seed.
    pub longest_to_settle: (usize, u64),
}

impl Report {
    fn add(&mut self, seed: u64, outcome: Outcome) {
        self.failures.extend(outcome.violation.map(|violation| (seed, violation)));
        self.coverage.add(&outcome.coverage);
        self.loads += outcome.loads;
        self.rows_looked_at += outcome.rows_looked_at;
        self.verifications += outcome.verifications;
        self.dead_letters += outcome.dead_letters;
        self.longest_to_settle = self.longest_to_settle.max((outcome.steps_to_settle, seed));
    }
}

/// How often each schedule is run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Times {
    /// In less than half of the time: nothing that happens is written into a digest.
    Once,
    /// Both runs must be identical.
    Twice,
}

/// Runs every schedule.
pub fn run(servers: Servers, seeds: Range<u64>, times: Times) -> Report {
    let (next, report) = (AtomicU64::new(seeds.start), Mutex::new(Report::default()));
    let work = || {
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= seeds.end {
                return;
            }
            let outcome = match times {
                Times::Once => Schedule { digested: false, ..Schedule::of(servers, seed) }.run(),
                Times::Twice => twice(servers, seed),
            };
            report.lock().expect("no thread panics with it").add(seed, outcome);
        }
    };
    on_every_core(work);
    let mut report = report.into_inner().expect("no thread panics with it");
    report.failures.sort();
    report
}

fn twice(servers: Servers, seed: u64) -> Outcome {
    let schedule = Schedule::of(servers, seed);
    let (first, second) = (schedule.run(), schedule.run());
    let differs = (first.digest, first.steps) != (second.digest, second.steps);
    let violation = first.violation.clone().or(differs.then(|| "the same schedule ran differently".to_owned()));
    Outcome { violation, ..first }
}

/// Returns the first of these schedules that violates a guarantee without this rule: its seed, its steps, and the
/// guarantee.
pub fn caught(servers: Servers, rule: Rule, seeds: Range<u64>) -> Option<(u64, usize, String)> {
    let (next, first) = (AtomicU64::new(seeds.start), Mutex::new(None::<(u64, usize, String)>));
    let work = || {
        rules::switch_off(Some(rule));
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            let is_over = first.lock().expect("no thread panics with it").is_some();
            if seed >= seeds.end || is_over {
                return;
            }
            let Outcome { violation, steps, steps_to_settle, .. } = Schedule::of(servers, seed).run();
            if let Some(violation) = violation {
                first.lock().expect("no thread panics with it").get_or_insert((
                    seed,
                    steps + steps_to_settle,
                    violation,
                ));
            }
        }
    };
    on_every_core(work);
    first.into_inner().expect("no thread panics with it")
}

fn on_every_core(work: impl Fn() + Sync) {
    thread::scope(|scope| {
        let cores = thread::available_parallelism().map_or(1, usize::from);
        (0..cores).for_each(|_| drop(scope.spawn(&work)));
    });
}

/// Leaves out sequences of steps, shorter and shorter ones, as long as the rest fails in the same way (delta
/// debugging).
pub fn shrunk(servers: Servers, seed: u64) -> Schedule {
    let mut schedule = Schedule::of(servers, seed);
    let first = schedule.run();
    let Some(violation) = first.violation else { return schedule };
    let mut steps: Vec<usize> = (0..first.steps).collect();
    let (mut size, mut runs) = (steps.len().div_ceil(2), 0);
    while size > 0 && runs < RUNS_TO_SHRINK {
        let mut at = 0;
        while at < steps.len() && runs < RUNS_TO_SHRINK {
            let fewer: Vec<usize> = steps[..at].iter().chain(steps.iter().skip(at + size)).copied().collect();
            let candidate = Schedule { steps: Some(fewer.clone()), ..Schedule::of(servers, seed) };
            runs += 1;
            match candidate.run().violation {
                Some(other) if kind(&other) == kind(&violation) => steps = fewer,
                Some(_) | None => at += size,
            }
        }
        size /= 2;
    }
    schedule.steps = Some(steps);
    schedule
}

/// Returns the kind of a violation regardless of its details: the words before the first number or bracket.
fn kind(violation: &str) -> &str {
    violation.split(|c: char| c.is_ascii_digit() || "{[(:".contains(c)).next().unwrap_or_default()
}
