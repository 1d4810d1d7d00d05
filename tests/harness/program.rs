//! The program's other commands, run as a person runs them in a shell.

use super::{PATIENCE, Settings};
use prefetchd::cli::servers::on_path;
use std::path::Path;
use std::process::Stdio;
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStderr, ChildStdout, Command};

/// The result of a command that has exited.
#[derive(Debug)]
pub struct Ran {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Ran {
    /// Returns both streams.
    pub fn said(&self) -> String {
        format!("{}{}", self.stdout, self.stderr)
    }
}

/// Runs a command with these settings until it exits.
pub async fn run_program(settings: &Settings, args: &[&str]) -> Ran {
    let config = settings.file();
    run(command(settings.environment(), config.path(), args)).await
}

/// Runs a command with a configuration that need not exist, and with these variables.
pub async fn run_configured(config: &Path, environment: &[(&str, &str)], args: &[&str]) -> Ran {
    run(command(environment.iter().copied(), config, args)).await
}

async fn run(mut command: Command) -> Ran {
    let output = tokio::time::timeout(PATIENCE, command.output());
    let output = output.await.unwrap_or_else(|_| panic!("a command does not end")).unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    Ran { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
}

/// A command that runs until it is dropped, such as `tail`.
pub struct Running {
    _child: Child,
    lines: Lines<BufReader<ChildStdout>>,
    complaints: Lines<BufReader<ChildStderr>>,
    _config: tempfile::NamedTempFile,
}

impl Running {
    pub fn start(settings: &Settings, args: &[&str]) -> Self {
        let config = settings.file();
        let mut child = command(settings.environment(), config.path(), args)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let complaints = BufReader::new(child.stderr.take().unwrap()).lines();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        Self { _child: child, lines, complaints, _config: config }
    }

    /// Returns the next line of its stdout.
    pub async fn line(&mut self) -> String {
        let line = tokio::time::timeout(PATIENCE, self.lines.next_line()).await.expect("a line, and in time");
        line.unwrap().expect("it goes on")
    }

    /// Returns the next line of its stderr.
    pub async fn complaint(&mut self) -> String {
        let line = tokio::time::timeout(PATIENCE, self.complaints.next_line()).await.expect("a line, and in time");
        line.unwrap().expect("it goes on")
    }
}

fn command<'e>(environment: impl Iterator<Item = (&'e str, &'e str)>, config: &Path, args: &[&str]) -> Command {
    let program = env!("CARGO_BIN_EXE_prefetchd");
    // With setpriv, if installed, it is killed together with the test program.
    let mut command = match on_path(&["setpriv"]) {
        Some(setpriv) => {
            let mut command = Command::new(setpriv);
            command.args(["--pdeathsig", "KILL", program]);
            command
        }
        None => Command::new(program),
    };
    for (name, _) in std::env::vars_os() {
        if ["PREFETCHD__", "PG"].iter().any(|ours| name.to_string_lossy().starts_with(ours)) {
            command.env_remove(name);
        }
    }
    command.envs(environment);
    command.args(args).arg("--config").arg(config).stdin(Stdio::null()).kill_on_drop(true);
    command
}
