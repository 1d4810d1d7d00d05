//! The command line, with one file for each command.
//!
//! Exit codes are part of the public contract: 0 for success, 1 for a failure while working, 2 for a wrong command line
//! (from clap), 78 for what retrying cannot fix. Messages go to stderr, requested output to stdout.

mod admin;
mod check;
mod client;
mod completions;
mod config;
pub mod demo;
mod explain;
mod init;
mod page;
mod run;
pub mod servers;
mod status;
mod support;
mod tail;
mod teardown;

use crate::code::Code;
use crate::config::ConfigError;
use crate::error::Disposition;
use crate::terminal::{self, printable};
use clap::{Parser, Subcommand};
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;
use tokio::runtime::Runtime;

/// `EX_CONFIG` of sysexits.h.
const EX_CONFIG: u8 = 78;
/// How long a stopped daemon waits for blocking threads, such as one that resolves a name.
const RUNTIME_PATIENCE: Duration = Duration::from_secs(1);

/// Keeps a warm, exact, live Redis copy of Postgres tables.
#[derive(Debug, Parser)]
#[command(name = "prefetchd", version, disable_help_subcommand = true)]
pub struct Cli {
    /// The configuration [default: ./config/prefetchd.toml, then /etc/prefetchd/prefetchd.toml]
    #[arg(short, long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the daemon until SIGTERM or SIGINT (also with no command)
    Run(run::RunArgs),
    /// Try prefetchd with a throwaway Postgres and Redis; Ctrl-C removes everything
    Demo(demo::Args),
    /// Check configuration and servers and say what to fix; changes nothing
    Check(check::CheckArgs),
    /// Show the state of a running daemon; exit code 1 if it is not ready or not reachable
    Status(status::StatusArgs),
    /// Follow the applied changes of a running daemon, one line each
    Tail(tail::TailArgs),
    /// Compare every row with the cache; exit code 1 if differences remain
    Verify(admin::VerifyArgs),
    /// Load again from Postgres while changes are applied; no key goes missing
    Refetch(admin::RefetchArgs),
    /// Stop applying changes until resume or a restart
    Pause(admin::Daemon),
    /// Continue after a pause
    Resume(admin::Daemon),
    /// Remove rows from the cache, to practise failures; refetch brings them back
    Invalidate(admin::InvalidateArgs),
    /// Remove all rows of a table from the cache, to practise failures; refetch brings them back
    Clear(admin::ClearArgs),
    /// Skip a change that Postgres cannot send, then load the tables again
    Skip(admin::SkipArgs),
    /// Let a running daemon read its configuration again; prints what changed
    Reload(admin::Daemon),
    /// Drop the slot and the publication that prefetchd created; with --keys also remove its keys from Redis
    Teardown(teardown::TeardownArgs),
    /// Print the address of a running daemon's page, including the token for operations
    Page(page::PageArgs),
    /// Write an archive to attach to a report of a problem: versions, settings, status and log, without rows and secrets
    Support(support::SupportArgs),
    /// Look at a live Postgres and Redis, and write what a first start needs; changes no server, overwrites no file
    Init(init::InitArgs),
    /// Print the effective configuration, with secrets as ***, or the schema of its file
    Config(config::ConfigArgs),
    /// Explain the code of a problem: its cause and its remedy; without a code, list all
    Explain(explain::ExplainArgs),
    /// Print a completion script, such as for ~/.local/share/bash-completion/completions/prefetchd
    Completions(completions::CompletionsArgs),
    /// Write the man pages of all commands
    #[command(hide = true)]
    ManPages(completions::ManPagesArgs),
}

/// Why a command failed.
#[derive(Debug)]
pub struct Failure {
    exit: u8,
    /// `None` if it has already been printed.
    said: Option<Said>,
}

#[derive(Debug)]
struct Said {
    message: String,
    /// `None` if a newer daemon has said it, with a code of its own.
    code: Option<Code>,
}

impl Failure {
    /// Something failed while working: exit code 1.
    pub fn work(code: Code, message: impl Into<String>) -> Self {
        Self::with(1, code, message.into())
    }

    /// Retrying cannot help: exit code 78.
    pub fn config(code: Code, message: impl Into<String>) -> Self {
        Self::with(EX_CONFIG, code, message.into())
    }

    /// A server's error: a refused password cannot be retried, a server that is away can.
    fn of(disposition: Disposition, code: Code, message: String) -> Self {
        Self::with(exit_code(disposition), code, message)
    }

    fn with(exit: u8, code: Code, message: String) -> Self {
        Self { exit, said: Some(Said { message, code: Some(code) }) }
    }

    /// Everything has been printed.
    fn silent(exit: u8) -> Self {
        Self { exit, said: None }
    }
}

fn exit_code(disposition: Disposition) -> u8 {
    match disposition {
        Disposition::Stop => EX_CONFIG,
        Disposition::Retry | Disposition::Reload => 1,
    }
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Self {
        Self::config(error.code, error.to_string())
    }
}

impl Cli {
    pub fn run(self) -> ExitCode {
        let file = self.config.as_deref();
        let done = match self.command {
            None => run::run(file, &run::RunArgs::default()),
            Some(Command::Run(args)) => run::run(file, &args),
            Some(Command::Demo(args)) => run::demo(args),
            Some(Command::Check(args)) => check::run(file, &args),
            Some(Command::Status(args)) => status::run(file, &args),
            Some(Command::Tail(args)) => tail::run(file, &args),
            Some(Command::Verify(args)) => admin::verify(file, &args),
            Some(Command::Refetch(args)) => admin::refetch(file, &args),
            Some(Command::Pause(daemon)) => admin::pause(file, &daemon),
            Some(Command::Resume(daemon)) => admin::resume(file, &daemon),
            Some(Command::Invalidate(args)) => admin::invalidate(file, &args),
            Some(Command::Clear(args)) => admin::clear(file, &args),
            Some(Command::Skip(args)) => admin::skip(file, &args),
            Some(Command::Reload(daemon)) => admin::reload(file, &daemon),
            Some(Command::Teardown(args)) => teardown::run(file, &args),
            Some(Command::Page(args)) => page::run(file, &args),
            Some(Command::Support(args)) => support::run(file, &args),
            Some(Command::Init(args)) => init::run(&args),
            Some(Command::Config(args)) => config::run(file, &args),
            Some(Command::Explain(args)) => explain::run(&args),
            Some(Command::Completions(args)) => completions::run(&args),
            Some(Command::ManPages(args)) => completions::man_pages(&args),
        };
        match done {
            Ok(()) => ExitCode::SUCCESS,
            Err(Failure { exit, said }) => {
                if let Some(Said { message, code }) = said {
                    let more =
                        code.map_or(String::new(), |code| format!("\nmore: prefetchd explain {}", code.as_str()));
                    say(&format!("prefetchd: {}{more}", message.trim_end()));
                }
                ExitCode::from(exit)
            }
        }
    }
}

/// Prints a message to stderr. If stderr is closed, nobody can be told.
fn say(text: &str) {
    let _ = writeln!(io::stderr(), "{}", terminal::message(text));
}

/// Writes lines to stdout at once. Text from others must be [`printable`], or it could forge a line.
///
/// # Errors
/// If nothing reads stdout any more, as with `| head`: silently, and with exit code 0. For any other reason, with a
/// message.
fn print(text: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    match out.write_all(terminal::lines(text).as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Err(Failure::silent(0)),
        Err(error) => Err(Failure::work(Code::CannotWrite, format!("cannot write to stdout: {error}"))),
    }
}

/// Formats rows with aligned columns: text to the left, numbers to the right.
fn aligned(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |c: usize| rows.iter().filter_map(|row| row.get(c)).map(|cell| cell.chars().count()).max().unwrap_or(0);
    let number = |c: usize| rows.iter().skip(1).filter_map(|r| r.get(c)).all(|v| v.bytes().all(|b| b.is_ascii_digit()));
    let layout: Vec<(usize, bool)> = (0..columns).map(|c| (width(c), number(c))).collect();
    let mut out = String::new();
    for row in rows {
        let cells: Vec<String> = row
            .iter()
            .zip(&layout)
            .map(|(cell, (width, number))| if *number { format!("{cell:>width$}") } else { format!("{cell:<width$}") })
            .collect();
        out.push_str(cells.join("  ").trim_end());
        out.push('\n');
    }
    out
}

/// Starts the threads for asynchronous work.
///
/// # Errors
/// If the system refuses to create them.
pub fn runtime() -> Result<Runtime, Failure> {
    Runtime::new().map_err(|error| Failure::work(Code::Internal, format!("cannot start threads: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_configuration_can_be_named_before_and_behind_the_command() {
        for args in
            [&["prefetchd", "-c", "f", "status"][..], &["prefetchd", "status", "--config", "f"], &["prefetchd", "-cf"]]
        {
            let cli = Cli::try_parse_from(args).expect("a good command line");
            assert_eq!(cli.config, Some(PathBuf::from("f")), "{args:?}");
        }
        assert_eq!(Cli::try_parse_from(["prefetchd", "nonsense"]).expect_err("no such command").exit_code(), 2);
    }

    #[test]
    fn numbers_stand_to_the_right() {
        let rows = [["NAME", "ROWS"], ["a", "10"], ["long name", "5"]].map(|r| r.map(str::to_owned).to_vec());
        assert_eq!(aligned(&rows), "NAME       ROWS\na            10\nlong name     5\n");
    }
}
