//! `prefetchd explain`: prints what docs/errors.md says about a code.

use super::{Failure, print};
use crate::code::Code;
use clap::Args;

#[derive(Debug, Args)]
pub(super) struct ExplainArgs {
    /// As check, the log and HTTP name it; without it, all codes are listed
    #[arg(value_parser = code)]
    code: Option<Code>,
}

/// An unknown code is a wrong command line.
fn code(text: &str) -> Result<Code, String> {
    // As in the last part of an address.
    let text = &*text.trim_start_matches('#').to_ascii_lowercase();
    Code::of(text).ok_or_else(|| {
        format!("no such code: did you mean {}? prefetchd explain lists all", Code::nearest(text).as_str())
    })
}

pub(super) fn run(args: &ExplainArgs) -> Result<(), Failure> {
    match args.code {
        Some(code) => print(&format!("{}\n", code.section().unwrap_or(code.as_str()).trim_end())),
        None => {
            let mut codes: Vec<&str> = Code::ALL.iter().map(|code| code.as_str()).collect();
            codes.sort_unstable();
            print(&(codes.join("\n") + "\n"))
        }
    }
}
