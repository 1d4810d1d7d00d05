//! `prefetchd completions SHELL` and `prefetchd man-pages DIR`: what a shell and `man` know of the command line, made of
//! the same definition as `--help`.

use super::{Cli, Failure, print};
use crate::code::Code;
use clap::{Args, CommandFactory};
use clap_complete::Shell;
use std::path::PathBuf;

#[derive(Debug, Args)]
pub(super) struct CompletionsArgs {
    /// The shell that will read the script
    shell: Shell,
}

#[derive(Debug, Args)]
pub(super) struct ManPagesArgs {
    /// An existing directory; files of the same names are overwritten
    #[arg(value_name = "DIR")]
    dir: PathBuf,
}

pub(super) fn run(args: &CompletionsArgs) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "prefetchd", &mut script);
    print(&String::from_utf8_lossy(&script))
}

pub(super) fn man_pages(args: &ManPagesArgs) -> Result<(), Failure> {
    let written = clap_mangen::generate_to(Cli::command(), &args.dir);
    written
        .map_err(|error| Failure::work(Code::CannotWrite, format!("cannot write to {}: {error}", args.dir.display())))
}
