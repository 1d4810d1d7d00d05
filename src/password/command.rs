//! A password that a program prints, such as the token of a cloud identity, which expires within minutes.
//!
//! The program runs without a shell, for every new connection, and in a task of its own: one that takes longer than a
//! caller waits is not run in vain. Connections that are opened at the same time share a run. What it prints to stdout
//! is never shown; stderr is, except for the password.

use super::PasswordError;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::{AccessFlags, Pid, access};
use std::fmt;
use std::io;
use std::path::Path;
use std::process::Stdio;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::{Child, Command};
use tokio::sync::watch;
use tokio::time::timeout;

/// Then it is killed, together with the programs that it has started.
const TIMEOUT: Duration = Duration::from_secs(10);
/// How long a password is kept for the next connection if whoever asked for it did not wait for it.
const KEPT: Duration = Duration::from_secs(30);
/// What a program may print to stdout.
const MOST_BYTES: u64 = 64_000;
/// How much of the end of stderr is shown.
const SHOWN_BYTES: usize = 1_000;
/// More than a secret has that may be cut at its beginning.
const KEPT_BYTES: usize = 80 << 10;
/// Where execvp looks if `PATH` is not set.
const DEFAULT_PATH: &str = "/bin:/usr/bin";

/// A program and its arguments. All clones share its runs.
#[derive(Clone)]
pub struct PasswordCommand(Arc<Shared>);

struct Shared {
    /// The setting, for messages.
    key: &'static str,
    program: String,
    args: Vec<String>,
    runs: Mutex<Runs>,
}

#[derive(Default)]
struct Runs {
    /// The last one, and its number.
    last: Option<(u64, Run)>,
    /// The last password.
    password: Option<String>,
}

#[derive(Clone)]
struct Run {
    /// `None` while it runs.
    ended: watch::Receiver<Option<Ended>>,
    /// Somebody has received the answer.
    used: bool,
}

#[derive(Clone)]
struct Ended {
    at: Instant,
    answer: Result<String, PasswordError>,
}

impl PasswordCommand {
    /// `key`: the setting. Returns `None` if there is no program in `words`.
    pub fn new(key: &'static str, words: &[String]) -> Option<Self> {
        let (program, args) = words.split_first()?;
        let (program, args, runs) = (program.clone(), args.to_vec(), Mutex::default());
        Some(Self(Arc::new(Shared { key, program, args, runs })))
    }

    /// Returns a password from a run that has not answered anybody yet, usually a new one.
    ///
    /// # Errors
    /// If the program cannot be started, fails, or prints no password.
    pub async fn read(&self) -> Result<String, PasswordError> {
        self.answer(|run| match &*run.ended.borrow() {
            None => true,
            Some(ended) => !run.used && ended.at.elapsed() < KEPT,
        })
        .await
    }

    /// As [`Self::read`], but a password that was printed within `age` is recent enough.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub async fn read_again_after(&self, age: Duration) -> Result<String, PasswordError> {
        self.answer(|run| match &*run.ended.borrow() {
            None => true,
            Some(ended) => ended.answer.is_ok() && ended.at.elapsed() < age,
        })
        .await
    }

    /// Returns what it printed last.
    pub fn last(&self) -> Option<String> {
        self.runs().password.clone()
    }

    async fn answer(&self, serves: impl Fn(&Run) -> bool) -> Result<String, PasswordError> {
        let (number, mut ended) = {
            let mut runs = self.runs();
            match &runs.last {
                Some((number, run)) if serves(run) => (*number, run.ended.clone()),
                last => {
                    let number = last.as_ref().map_or(0, |(number, _)| number + 1);
                    let ended = self.start();
                    runs.last = Some((number, Run { ended: ended.clone(), used: false }));
                    (number, ended)
                }
            }
        };
        // It fails only at the end of the runtime.
        let ended = ended.wait_for(Option::is_some).await.ok().and_then(|ended| ended.clone());
        let mut runs = self.runs();
        if let Some((_, run)) = runs.last.as_mut().filter(|(last, _)| *last == number) {
            run.used = true;
        }
        ended.map_or_else(|| Err(self.0.wrong("was interrupted", "try again")), |ended| ended.answer)
    }

    fn start(&self) -> watch::Receiver<Option<Ended>> {
        let (send, ended) = watch::channel(None);
        let this = self.clone();
        tokio::spawn(async move {
            let answer = this.0.run(this.last(), TIMEOUT).await;
            if let Ok(password) = &answer {
                this.runs().password = Some(password.clone());
            }
            send.send_replace(Some(Ended { at: Instant::now(), answer }));
        });
        ended
    }

    fn runs(&self) -> MutexGuard<'_, Runs> {
        self.0.runs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PartialEq for PasswordCommand {
    fn eq(&self, other: &Self) -> bool {
        let of = |Self(shared): &Self| (shared.key, shared.program.clone(), shared.args.clone());
        of(self) == of(other)
    }
}

impl Eq for PasswordCommand {}

impl fmt::Display for PasswordCommand {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.program)
    }
}

impl Shared {
    fn wrong(&self, fact: impl fmt::Display, remedy: &'static str) -> PasswordError {
        PasswordError { thing: format!("{} ({})", self.key, self.program), fact: fact.to_string(), remedy }
    }

    /// `before`: an earlier password, which it may complain about.
    async fn run(&self, before: Option<String>, within: Duration) -> Result<String, PasswordError> {
        let mut command = Command::new(&self.program);
        command.args(&self.args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = command.process_group(0).kill_on_drop(true).spawn().map_err(|error| {
            self.wrong(format!("cannot be started ({error})"), "install it, or correct its path or its permissions")
        })?;
        match timeout(within, output(child)).await {
            Err(_) => Err(self.wrong(
                format!("did not end within {within:?}, and was killed"),
                "run it as the user of prefetchd to see what it waits for",
            )),
            Ok(Err(error)) => Err(self.wrong(format!("cannot be read ({error})"), "run it as the user of prefetchd")),
            Ok(Ok(Output { too_much: true, .. })) => {
                let fact = format!("printed more than {} kB, and was killed", MOST_BYTES / 1_000);
                Err(self.wrong(fact, "let it print the password and nothing else"))
            }
            Ok(Ok(output)) => self.password_in(output, before.as_deref()),
        }
    }

    fn password_in(&self, output: Output, before: Option<&str>) -> Result<String, PasswordError> {
        let line = output.stdout.split(|byte| *byte == b'\n').next().unwrap_or_default();
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        let password = std::str::from_utf8(line);
        if let Some(failed) = output.failed {
            let secrets = [password.ok(), before].into_iter().flatten();
            let said = shown(&output.stderr, secrets);
            return Err(self.wrong(format!("failed ({failed}{said})"), "run it as the user of prefetchd to see why"));
        }
        match password {
            // Its text would quote what was printed.
            Err(_) => Err(self.wrong("printed a line that is not UTF-8", "let it print the password as UTF-8")),
            Ok("") => Err(self.wrong(
                format!("printed no password{}", shown(&output.stderr, before.into_iter())),
                "let its first line be the password",
            )),
            Ok(text) if text.contains('\0') => {
                Err(self.wrong("printed a NUL byte", "let it print the password as text"))
            }
            Ok(text) => Ok(text.to_owned()),
        }
    }
}

/// Returns the end of what a program complained about, on one line, after a comma.
fn shown<'s>(stderr: &[u8], secrets: impl Iterator<Item = &'s str>) -> String {
    let text = String::from_utf8_lossy(stderr);
    let text = secrets.filter(|secret| !secret.is_empty()).fold(text.into_owned(), |text, s| text.replace(s, "…"));
    let words = text.split_whitespace().collect::<Vec<_>>().join(" ");
    // Cut after secrets were replaced: the end of one would not be recognised.
    let start = words.len().saturating_sub(SHOWN_BYTES);
    let start = (start..=words.len()).find(|at| words.is_char_boundary(*at)).unwrap_or(0);
    if words.is_empty() { String::new() } else { format!(", {}", &words[start..]) }
}

struct Output {
    stdout: Vec<u8>,
    too_much: bool,
    stderr: Vec<u8>,
    /// Its exit status, unless it succeeded.
    failed: Option<String>,
}

/// Kills the program, and what it has started, when this is dropped before it ends.
async fn output(mut child: Child) -> io::Result<Output> {
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let (stdout, stderr) = (stdout.expect("it is piped"), stderr.expect("it is piped"));
    // Dropped before the child: until it is waited for, no other process can have its number.
    let mut group = Group(child.id());
    let read = async {
        let mut bytes = Vec::new();
        stdout.take(MOST_BYTES + 1).read_to_end(&mut bytes).await?;
        match bytes.len() as u64 > MOST_BYTES {
            true => Err(None),
            false => Ok(bytes),
        }
    };
    let (stdout, stderr) = match tokio::try_join!(read, end_of(stderr)) {
        Ok(read) => read,
        Err(Some(error)) => return Err(error),
        Err(None) => return Ok(Output { stdout: Vec::new(), too_much: true, stderr: Vec::new(), failed: None }),
    };
    let status = child.wait().await?;
    group.0 = None;
    Ok(Output { stdout, too_much: false, stderr, failed: (!status.success()).then(|| status.to_string()) })
}

/// Reads everything, and keeps the end.
async fn end_of(mut from: impl AsyncRead + Unpin) -> Result<Vec<u8>, Option<io::Error>> {
    let (mut kept, mut piece) = (Vec::new(), [0; SHOWN_BYTES]);
    loop {
        match from.read(&mut piece).await? {
            0 => return Ok(kept),
            bytes => kept.extend_from_slice(&piece[..bytes]),
        }
        kept.drain(..kept.len().saturating_sub(KEPT_BYTES));
    }
}

/// A process group with this number.
struct Group(Option<u32>);

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(number) = self.0.and_then(|number| i32::try_from(number).ok()) {
            // It may have ended by itself.
            let _ = killpg(Pid::from_raw(number), Signal::SIGKILL);
        }
    }
}

/// Returns why a program cannot be started, if that is known beforehand. `path`: the variable `PATH`.
pub fn missing(program: &str, path: Option<&str>) -> Option<String> {
    let place = |path: &Path| match std::fs::metadata(path) {
        Err(error) => Some(error.to_string()),
        Ok(found) if !found.is_file() => Some("it is not a file".to_owned()),
        Ok(_) => access(path, AccessFlags::X_OK).err().map(|_| "it is not executable".to_owned()),
    };
    if program.contains('/') {
        return place(Path::new(program)).map(|why| format!("{program} cannot be started ({why})"));
    }
    let mut folders = std::env::split_paths(path.unwrap_or(DEFAULT_PATH));
    let found = folders.any(|folder| place(&folder.join(program)).is_none());
    (!found).then(|| format!("{program:?} is in no directory of PATH"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "redis.password_command";

    fn command(words: &[&str]) -> PasswordCommand {
        let words: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
        PasswordCommand::new(KEY, &words).unwrap()
    }

    /// A program that `script` describes; the shell is part of the test.
    fn shell(script: &str) -> PasswordCommand {
        command(&["/bin/sh", "-c", script])
    }

    #[tokio::test]
    async fn the_first_line_is_the_password() {
        for (printed, password) in [
            ("secret\\n", "secret"),
            ("secret", "secret"),
            ("secret\\r\\nmore\\n", "secret"),
            (" se cret \\n", " se cret "),
            ("\\303\\274\\n\\377", "ü"),
        ] {
            let read = command(&["printf", printed]).read().await;
            assert_eq!(read.as_deref(), Ok(password), "{printed}");
        }
    }

    #[tokio::test]
    async fn an_argument_is_taken_as_it_is() {
        for argument in ["$HOME `id`; echo x > /tmp/y | cat && 'a' \"b\" *", "$(id)", "a  b", "-n", ""] {
            let read = command(&["printf", "<%s>", argument]).read().await;
            assert_eq!(read, Ok(format!("<{argument}>")));
        }
    }

    #[tokio::test]
    async fn an_error_says_what_happened_and_never_what_was_printed() {
        for (script, fact) in [
            ("echo hunter2; exit 3", "failed (exit status: 3)"),
            ("echo hunter2; echo no token: hunter2 >&2; exit 1", "failed (exit status: 1, no token: …)"),
            ("echo; echo hunter2", "printed no password: "),
            ("exit 0", "printed no password: "),
            ("echo 'ask  your\n admin' >&2", "printed no password, ask your admin: "),
            ("printf 'hunter2\\377'", "not UTF-8"),
            ("printf 'hunter2\\000'", "NUL byte"),
            ("kill -9 $$", "signal: 9"),
            ("yes hunter2", "printed more than 64 kB"),
        ] {
            let command = shell(script);
            let error = command.read().await.expect_err(script);
            let text = format!("{error} {error:?} {:?}", super::super::Password::Command(command));
            assert!(error.to_string().starts_with("redis.password_command (/bin/sh) "), "{text}");
            assert!(text.contains(fact) && !text.contains("hunter"), "{script}: {text}");
        }
        let error = command(&["/nonexistent/program"]).read().await.unwrap_err().to_string();
        assert!(error.contains("/nonexistent/program) cannot be started"), "{error}");
        // Only the end of it.
        let error = shell("yes a | head -c 100000 >&2; echo the end >&2; exit 1").read().await.unwrap_err().to_string();
        assert!(error.contains("a the end)") && error.len() < SHOWN_BYTES + 300, "{error}");
    }

    #[tokio::test]
    async fn an_earlier_password_is_not_repeated_either() {
        let dir = tempfile::tempdir().unwrap();
        let again = dir.path().join("again");
        let script =
            format!("test -e {0} && {{ echo hunter2 >&2; exit 1; }}; touch {0}; echo hunter2", again.display());
        let command = shell(&script);
        assert_eq!(command.read().await.as_deref(), Ok("hunter2"));
        let error = command.read().await.unwrap_err().to_string();
        assert!(error.contains("exit status: 1, …)"), "{error}");
        assert_eq!(command.last().as_deref(), Some("hunter2"));
    }

    /// Prints how often it has run.
    fn counts(dir: &Path, before: &str) -> PasswordCommand {
        let file = dir.join("runs").display().to_string();
        shell(&format!("{before}; echo x >> {file}; wc -l < {file} | tr -d ' '"))
    }

    #[tokio::test]
    async fn every_connection_gets_a_new_password_and_those_of_one_moment_share_it() {
        let dir = tempfile::tempdir().unwrap();
        let command = counts(dir.path(), "sleep 0.2");
        for run in 1..=3 {
            let together = futures_util::future::join_all((0..16).map(|_| command.read())).await;
            assert!(together.iter().all(|read| *read == Ok(run.to_string())), "{run}: {together:?}");
        }
        let hour = Duration::from_secs(3600);
        assert_eq!(command.read_again_after(hour).await.as_deref(), Ok("3"));
        assert_eq!(command.read_again_after(Duration::ZERO).await.as_deref(), Ok("4"));
    }

    #[tokio::test]
    async fn whoever_does_not_wait_leaves_the_password_to_the_next() {
        let dir = tempfile::tempdir().unwrap();
        let command = counts(dir.path(), "sleep 0.2");
        assert!(timeout(Duration::from_millis(10), command.read()).await.is_err());
        let mut run = command.runs().last.clone().unwrap().1;
        assert!(run.ended.wait_for(Option::is_some).await.is_ok());
        assert_eq!(command.read().await.as_deref(), Ok("1"));
        assert_eq!(command.read().await.as_deref(), Ok("2"));
    }

    #[tokio::test]
    async fn one_that_hangs_is_killed_with_all_that_it_started() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("pid").display().to_string();
        let command = shell(&format!("sleep 1000 & echo $! > {file}; wait"));
        let mut within = Duration::from_millis(100);
        let pid: i32 = loop {
            let error = command.0.run(None, within).await.unwrap_err().to_string();
            assert!(error.contains(&format!("did not end within {within:?}")), "{error}");
            match std::fs::read_to_string(&file).ok().and_then(|text| text.trim().parse().ok()) {
                Some(pid) => break pid,
                // The machine is busy, and the program did not get that far.
                None => within *= 2,
            }
        };
        let runs = || {
            let state = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            !state.is_empty() && !state.contains(") Z ")
        };
        while runs() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    #[test]
    fn a_missing_program_is_noticed_beforehand() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("program");
        std::fs::write(&file, "").unwrap();
        let (here, file) = (dir.path().to_str().unwrap(), file.to_str().unwrap());
        assert!(missing("program", Some(here)).unwrap().contains("PATH"));
        assert!(missing(file, None).unwrap().contains("not executable"));
        std::fs::set_permissions(file, std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
        assert_eq!((missing("program", Some(here)), missing(file, None)), (None, None));
        assert!(missing("program", Some("/nonexistent")).is_some() && missing(here, None).is_some());
        assert_eq!(missing("sh", None), None);
    }
}
