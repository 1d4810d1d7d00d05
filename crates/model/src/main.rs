//! Explores the protocol for Redis Cluster (docs/decisions/010-a-lane-per-hash-slot.md) with random schedules, each run
//! twice.
//!
//!     cargo run --profile simulate -p prefetchd-model -- --seeds 2000 --from 0
//!
//! Prints a schedule that breaks a promise. `--trace` prints the events of the first one. `--ablate` instead switches
//! off one rule at a time: some schedule must then break a promise, unless the rule stands on an argument.

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
/// Failing schedules that are printed in full.
const SHOWN: usize = 1;

/// Rules whose absence breaks few schedules in a hundred thousand, or none that was found: they stand on an argument.
const ARGUED: &[(Rule, &str)] = &[
    (
        Rule::FlagsFirst,
        "a lookup that is written from a lost lane before its flag is compared by nobody: seldom in time",
    ),
    (Rule::NewEpoch, "a late call of one epoch vouches for another with the same number, if the record has gone back"),
    (Rule::Look, "all that knows of a lane may be lost at once, and an old dump bring back some of its keys"),
    (Rule::Swept, "a lookup lane that goes back to before its sweep has members that no redelivered change removes"),
    (Rule::Floor, "`was` is deleted up to a confirmed position that a restart of Postgres takes back"),
];

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

fn ablation(seeds: Range<u64>, only: Option<Rule>) -> ExitCode {
    let mut missed = 0;
    for rule in Rule::ALL.iter().filter(|rule| only.is_none_or(|only| only == **rule)) {
        let rules = Rules::without(Some(*rule));
        let broken = seeds.clone().find_map(|seed| Some((seed, world::run(seed, rules, false).violation?)));
        let verdict = match broken {
            Some((seed, violation)) => format!("seed {seed}, {}", violation.lines().next().unwrap_or_default()),
            None => match ARGUED.iter().find(|(argued, _)| argued == rule) {
                Some((_, why)) => format!("none of these schedules misses it, and it is there because {why}"),
                None => {
                    missed += 1;
                    "NOT MISSED".to_owned()
                }
            },
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
        return ablation(seeds, rules.off());
    }
    if trace {
        let violation = world::run(seeds.start, rules, true).violation;
        println!("{}", violation.as_deref().unwrap_or("whole"));
        return if violation.is_none() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    }
    let (mut failed, mut faults, mut longest, mut digest) = (0, 0, (0, 0), 0_u64);
    for seed in seeds.clone() {
        let outcome = explore(seed, rules);
        faults += outcome.faults;
        digest = digest.rotate_left(1) ^ outcome.digest;
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
         fault (seed {}); digest {digest:016x}",
        seeds.end - seeds.start,
        seeds.start,
        longest.0,
        longest.1
    );
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
