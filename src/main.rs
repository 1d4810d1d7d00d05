//! Turns arguments into an exit code.

use clap::Parser;
use std::process::ExitCode;

fn main() -> ExitCode {
    prefetchd::cli::Cli::parse().run()
}
