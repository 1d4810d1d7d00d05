//! Runs random schedules of the whole session, each twice (`--once` for once), and prints what they covered.
//!
//!     cargo run -p prefetchd-core --features sim --bin simulate -- --seeds 1000 --from 0
//!
//! `--cluster` runs schedules on a Redis Cluster with keys in several hash slots, otherwise they run on a single Redis. A
//! schedule that breaks a promise is shrunk, and its steps are printed. `--trace` prints the steps of the first seed
//! as they are. `--ablate` switches off one rule at a time instead, or only the
//! one of `--rule NAME`: some schedule must then break a promise.

use prefetchd_core::rules::Rule;
use prefetchd_core::sim::{self, Schedule, Servers, Times};
use std::ops::Range;
use std::process::ExitCode;

/// With this many seeds, everything that can be reached must be.
const SEEDS_TO_COVER: u64 = 1_000;
/// For how many failing schedules the shrunk steps are printed.
const SHRUNK: usize = 2;

const USAGE: &str = "usage: simulate [--cluster] [--seeds N] [--from SEED] [--once | --trace | --ablate | --rule NAME]";

struct Arguments {
    servers: Servers,
    seeds: u64,
    from: u64,
    times: Times,
    trace: bool,
    /// Rules to switch off, one by one.
    ablate: Vec<Rule>,
}

fn arguments() -> Result<Arguments, String> {
    let servers = Servers::One;
    let mut arguments =
        Arguments { servers, seeds: SEEDS_TO_COVER, from: 0, times: Times::Twice, trace: false, ablate: Vec::new() };
    let (mut ablates, mut words) = (false, std::env::args().skip(1));
    while let Some(word) = words.next() {
        let mut number = || {
            let value = words.next().and_then(|value| value.parse().ok());
            value.ok_or_else(|| format!("{word} takes a number\n{USAGE}"))
        };
        match word.as_str() {
            "--cluster" => arguments.servers = Servers::Cluster,
            "--seeds" => arguments.seeds = number()?,
            "--from" => arguments.from = number()?,
            "--once" => arguments.times = Times::Once,
            "--trace" => arguments.trace = true,
            "--ablate" => ablates = true,
            "--rule" => {
                let name = words.next().unwrap_or_default();
                let mut rules = Rule::OF_ONE.iter().chain(Rule::OF_CLUSTER);
                let rule = rules.find(|rule| format!("{rule:?}") == name);
                arguments.ablate.push(*rule.ok_or_else(|| format!("no rule is called {name:?}\n{USAGE}"))?);
            }
            _ => return Err(format!("unknown argument {word}\n{USAGE}")),
        }
    }
    if ablates {
        arguments.ablate.extend(match arguments.servers {
            Servers::One => Rule::OF_ONE,
            Servers::Cluster => Rule::OF_CLUSTER,
        });
    }
    Ok(arguments)
}

fn main() -> ExitCode {
    let Arguments { servers, seeds, from, times, trace, ablate } = match arguments() {
        Ok(arguments) => arguments,
        Err(message) => {
            eprintln!("{message}");
            return ExitCode::from(2);
        }
    };
    sim::keep_panics();
    if trace {
        return show(&Schedule { traced: true, ..Schedule::of(servers, from) });
    }
    if !ablate.is_empty() {
        return ablation(servers, &ablate, from..from.saturating_add(seeds));
    }
    let report = sim::run(servers, from..from.saturating_add(seeds), times);
    print!("{}", report.coverage.table(servers));
    let (steps, seed) = report.longest_to_settle;
    println!(
        "{seeds} schedules from {from}, each {}: {} loads, {} rows looked at, {} verifications, {} dead letters; whole at \
         most {steps} steps after the last fault (seed {seed})",
        format!("{times:?}").to_lowercase(),
        report.loads,
        report.rows_looked_at,
        report.verifications,
        report.dead_letters
    );
    let gaps = if seeds >= SEEDS_TO_COVER { report.coverage.gaps(servers) } else { Vec::new() };
    gaps.iter().for_each(|gap| eprintln!("{gap}"));
    report.failures.iter().for_each(|(seed, violation)| eprintln!("seed {seed}: {violation}"));
    for (seed, _) in report.failures.iter().take(SHRUNK) {
        eprintln!("seed {seed}, shrunk:");
        show(&Schedule { traced: true, ..sim::shrunk(servers, *seed) });
    }
    if report.failures.is_empty() && gaps.is_empty() {
        return ExitCode::SUCCESS;
    }
    eprintln!("{} of {seeds} schedules failed, {} gaps", report.failures.len(), gaps.len());
    ExitCode::FAILURE
}

/// Prints a table of rules: the first seed that breaks a promise without the rule, its steps, and the promise.
fn ablation(servers: Servers, rules: &[Rule], seeds: Range<u64>) -> ExitCode {
    let mut not_caught = 0;
    for rule in rules {
        let name = format!("{rule:?}");
        match sim::caught(servers, *rule, seeds.clone()) {
            Some((seed, steps, violation)) => {
                let short: String = violation.lines().next().unwrap_or_default().chars().take(90).collect();
                println!("{name:<26} seed {seed:>5} {steps:>6} steps  {short}");
            }
            None => {
                not_caught += 1;
                println!("{name:<26} NOT CAUGHT");
            }
        }
    }
    if not_caught == 0 {
        return ExitCode::SUCCESS;
    }
    eprintln!("{not_caught} rules can be switched off without a schedule failing");
    ExitCode::FAILURE
}

/// Prints its steps as they happen.
fn show(schedule: &Schedule) -> ExitCode {
    match schedule.run().violation {
        Some(violation) => {
            eprintln!("{violation}");
            ExitCode::FAILURE
        }
        None => ExitCode::SUCCESS,
    }
}
