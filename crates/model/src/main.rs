//! Explores the protocol for Redis Cluster (docs/decisions/010-a-lane-per-hash-slot.md) by random schedules, each run twice.
//!
//!     cargo run --profile simulate -p prefetchd-model -- --seeds 2000 --from 0
//!
//! A schedule that breaks a promise is printed. `--trace` prints the first one as it is. `--ablate` switches the rules off one
//! by one instead: a schedule must break a promise without it, unless the rule only saves work.

mod cluster;
mod load;
mod observer;
mod postgres;
mod rng;
mod rules;
mod session;
mod world;

use rules::{Rule, Rules};
use std::ops::Range;
use std::process::ExitCode;

const USAGE: &str = "usage: lanes [--seeds N] [--from SEED] [--off RULE] [--trace | --ablate]";
/// Failing schedules that are printed as a whole.
const SHOWN: usize = 1;

struct Arguments {
    seeds: Range<u64>,
    rules: Rules,
    trace: bool,
    ablate: bool,
}

fn arguments() -> Result<Arguments, String> {
    let (mut count, mut from, mut off, mut trace, mut ablate) = (2_000, 0, None, false, false);
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let value = if word == "--trace" || word == "--ablate" { None } else { words.next() };
        let number = |value: Option<String>| value.and_then(|v| v.parse().ok()).ok_or(format!("{word}?\n{USAGE}"));
        match word.as_str() {
            "--seeds" => count = number(value)?,
            "--from" => from = number(value)?,
            "--off" => {
                let found = Rule::ALL.iter().find(|rule| value.as_deref() == Some(&format!("{rule:?}")));
                off = Some(*found.ok_or(format!("no such rule; there are {:?}", Rule::ALL))?);
            }
            "--trace" => trace = true,
            "--ablate" => ablate = true,
            _ => return Err(format!("unknown argument {word}\n{USAGE}")),
        }
    }
    Ok(Arguments { seeds: from..from + count, rules: Rules::without(off), trace, ablate })
}

/// Runs a seed twice.
fn explore(seed: u64, rules: Rules) -> world::Outcome {
    let first = world::run(seed, rules, false);
    let second = world::run(seed, rules, false);
    assert_eq!(first.digest, second.digest, "seed {seed} came to something else the second time");
    first
}

fn ablation(seeds: Range<u64>) -> ExitCode {
    let mut missed = 0;
    for rule in Rule::ALL {
        let rules = Rules::without(Some(*rule));
        let broken = seeds.clone().find_map(|seed| Some((seed, world::run(seed, rules, false).violation?)));
        let verdict = match broken {
            Some((seed, violation)) => format!("seed {seed}, {}", violation.lines().next().unwrap_or_default()),
            None => {
                missed += 1;
                "NOT MISSED".to_owned()
            }
        };
        println!("{rule:?}: {}\n    without it: {verdict}", rule.says());
    }
    if missed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn main() -> ExitCode {
    let Arguments { seeds, rules, trace, ablate } = match arguments() {
        Ok(arguments) => arguments,
        Err(message) => {
            eprintln!("{message}");
            return ExitCode::from(2);
        }
    };
    if ablate {
        return ablation(seeds);
    }
    if trace {
        let violation = world::run(seeds.start, rules, true).violation;
        println!("{}", violation.as_deref().unwrap_or("whole"));
        return if violation.is_none() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    }
    let (mut failed, mut faults, mut longest) = (0, 0, (0, 0));
    for seed in seeds.clone() {
        let outcome = explore(seed, rules);
        faults += outcome.faults;
        longest = longest.max((outcome.settled_after, seed));
        if let Some(violation) = outcome.violation {
            failed += 1;
            eprintln!("seed {seed}: {violation}");
            if failed <= SHOWN {
                world::run(seed, rules, true);
            }
        }
    }
    println!(
        "{} schedules from {}, each twice, with {faults} faults: {failed} failed; whole at most {} steps after the last \
         fault (seed {})",
        seeds.end - seeds.start,
        seeds.start,
        longest.0,
        longest.1
    );
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
