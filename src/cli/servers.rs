//! Throwaway servers: starts a private Postgres and Redis from the installed programs, on free loopback ports. The demo
//! and the integration tests use them.
//!
//! Each server has a guard: a small shell process in its own process group that is the server's parent and holds a pipe
//! from us. The pipe closes when we are done, or when we die from any signal. The guard then stops the server and
//! removes its directory. So no server outlives us, and no PID is signalled after its process was reaped.
//!
//! Other users of this machine can reach the ports, so every server requires a password, which never appears on a
//! command line. The servers' sockets and files are in directories that only their user can enter. Files that we open
//! with our own rights, which may be root's, are where the servers' user cannot replace them.
//!
//! It must not know what the servers are used for.

mod cluster;

use crate::code::Code;
pub use cluster::Cluster;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, User, geteuid};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_encode};
use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fmt;
use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, chown};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// A server that does not answer within this time never will.
const START_PATIENCE: Duration = Duration::from_secs(60);
/// Another process may take a free port before the server binds it.
const START_ATTEMPTS: usize = 3;
/// Below the range of ephemeral ports, and so are those [`BUS_OFFSET`] above. A client that keeps trying a port in that
/// range while its server is down will sooner or later connect to itself; and any connection may be using the port that a
/// server needs. Not more than that offset, so that no server gets the second port of another.
const PORTS: std::ops::Range<u16> = 11_000..21_000;
/// A node of a Redis Cluster talks to the other nodes on the port this far above its own.
pub const BUS_OFFSET: u16 = 10_000;

#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    #[error("{0} is not installed: apt-get install postgresql redis-server, or run scripts/demo, which does that")]
    Missing(&'static str),
    #[error(
        "setpriv (util-linux) is not installed, and servers must not run as root: install it, or run this as another user"
    )]
    NoSetpriv,
    #[error("{doing}: {error}")]
    Io { doing: String, error: std::io::Error },
    #[error(
        "a cluster needs Redis 7.0 or later, or Valkey, but {} is Redis {version}: install a newer one, or do without the cluster",
        program.display()
    )]
    TooOldForACluster { program: PathBuf, version: String },
    #[error("{what} did not start; the end of its log:\n{log}")]
    NotStarted { what: String, log: String },
}

impl ServerError {
    pub fn code(&self) -> Code {
        match self {
            ServerError::Missing(_)
            | ServerError::NoSetpriv
            | ServerError::Io { .. }
            | ServerError::TooOldForACluster { .. }
            | ServerError::NotStarted { .. } => Code::DemoServers,
        }
    }
}

fn io(doing: impl fmt::Display) -> impl FnOnce(std::io::Error) -> ServerError {
    move |error| ServerError::Io { doing: doing.to_string(), error }
}

// ------------------------------------------------------------------------------------------------ programs

/// Returns the first of `names` that is on the PATH.
pub fn on_path(names: &[&str]) -> Option<PathBuf> {
    names.iter().find_map(|name| path_dirs().into_iter().map(|dir| dir.join(name)).find(|file| is_program(file)))
}

fn path_dirs() -> Vec<PathBuf> {
    std::env::var_os("PATH").map(|path| std::env::split_paths(&path).collect()).unwrap_or_default()
}

fn is_program(file: &Path) -> bool {
    file.metadata().is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

/// Returns how to call a program of Postgres or Redis: by name if it is on the PATH, otherwise by its full path.
pub fn callable(names: &[&'static str]) -> PathBuf {
    if let Some(name) = names.iter().find(|name| on_path(&[name]).is_some()) {
        return PathBuf::from(name);
    }
    let first = names.first().copied().unwrap_or_default();
    postgres_dirs().into_iter().map(|dir| dir.join(first)).find(|file| is_program(file)).unwrap_or_else(|| first.into())
}

/// Where Postgres may be installed: the PATH, the directories of distributions (which keep it out of the PATH), newest
/// first, and the directory that `pg_config` reports.
fn postgres_dirs() -> Vec<PathBuf> {
    let mut dirs = path_dirs();
    // A link on the PATH may point to one program of a complete installation.
    dirs.extend(on_path(&["postgres"]).and_then(|p| p.canonicalize().ok()?.parent().map(Path::to_owned)));
    for (parent, prefix) in [("/usr/lib/postgresql", ""), ("/usr", "pgsql-")] {
        let entries = std::fs::read_dir(parent).into_iter().flatten().flatten();
        let version = |path: &Path| path.file_name()?.to_str()?.strip_prefix(prefix)?.parse::<u32>().ok();
        let mut found: Vec<_> = entries.filter_map(|e| Some((version(&e.path())?, e.path().join("bin")))).collect();
        found.sort_by(|a, b| b.cmp(a));
        dirs.extend(found.into_iter().map(|(_, dir)| dir));
    }
    if let Ok(output) = Command::new("pg_config").arg("--bindir").stdin(Stdio::null()).output() {
        dirs.push(PathBuf::from(OsStr::from_bytes(output.stdout.trim_ascii())));
    }
    dirs
}

/// The directory that scripts/test-matrix sets comes first.
fn postgres_programs() -> Result<PathBuf, ServerError> {
    let complete = |dir: &PathBuf| ["initdb", "postgres"].iter().all(|name| is_program(&dir.join(name)));
    let chosen = std::env::var_os("PREFETCHD_TEST_POSTGRES").map(PathBuf::from);
    chosen.into_iter().chain(postgres_dirs()).find(complete).ok_or(ServerError::Missing("postgres"))
}

/// As with Postgres. If the chosen directory has no server, tests must not run on another one.
fn redis_program() -> Result<PathBuf, ServerError> {
    const NAMES: [&str; 2] = ["redis-server", "valkey-server"];
    match std::env::var_os("PREFETCHD_TEST_REDIS").map(PathBuf::from) {
        Some(dir) => NAMES.map(|name| dir.join(name)).into_iter().find(|file| is_program(file)),
        None => on_path(&NAMES),
    }
    .ok_or(ServerError::Missing("redis-server"))
}

/// Returns a port of the loopback address that is currently free, as is the one [`BUS_OFFSET`] above it. This process gets
/// no port twice: a server that is down needs its own when it starts again.
///
/// # Errors
/// If there seems to be none.
pub fn free_port() -> Result<u16, ServerError> {
    static GIVEN: Mutex<BTreeSet<u16>> = Mutex::new(BTreeSet::new());
    let mut bytes = [0; 2];
    for _ in 0..200 {
        getrandom::fill(&mut bytes)
            .map_err(|error| io("getting random numbers")(std::io::Error::other(error.to_string())))?;
        let port = PORTS.start + u16::from_ne_bytes(bytes) % (PORTS.end - PORTS.start);
        let is_free = |port| TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok();
        let is_new = |port| GIVEN.lock().unwrap_or_else(PoisonError::into_inner).insert(port);
        if is_free(port) && is_free(port + BUS_OFFSET) && is_new(port) {
            return Ok(port);
        }
    }
    Err(io("looking for a free port")(std::io::ErrorKind::AddrInUse.into()))
}

/// The password of Postgres's superuser, on every cluster that this process starts.
pub fn postgres_password() -> &'static str {
    static PASSWORD: OnceLock<String> = OnceLock::new();
    random(&PASSWORD)
}

/// The password of Redis's default user, on every server that this process starts. It differs from Postgres's, because
/// it is sent to Redis in clear text.
pub fn redis_password() -> &'static str {
    static PASSWORD: OnceLock<String> = OnceLock::new();
    random(&PASSWORD)
}

fn random(password: &'static OnceLock<String>) -> &'static str {
    password.get_or_init(|| {
        let mut bytes = [0; 16];
        getrandom::fill(&mut bytes).expect("the system has random numbers");
        format!("{:032x}", u128::from_ne_bytes(bytes))
    })
}

// ------------------------------------------------------------------------------------------------ directories

/// Postgres refuses to run as root, so for root the servers run as a user that owns nothing else.
#[derive(Debug, Clone, Copy)]
struct Ids {
    uid: u32,
    gid: u32,
}

fn server_user() -> Option<Ids> {
    if !geteuid().is_root() {
        return None;
    }
    let user = ["nobody", "postgres"].iter().find_map(|name| User::from_name(name).ok().flatten())?;
    Some(Ids { uid: user.uid.as_raw(), gid: user.gid.as_raw() })
}

/// A directory for servers. Dropping it removes it; if it is never dropped, the guard of its last server does.
#[derive(Debug)]
pub struct Place {
    dir: tempfile::TempDir,
    kept: bool,
}

impl Place {
    /// # Errors
    /// If the directory for temporary files is not writable.
    pub fn new(prefix: &str) -> Result<Self, ServerError> {
        let mut base = std::env::temp_dir();
        // The path of a Unix socket has at most 107 bytes.
        if base.as_os_str().len() > 60 {
            base = PathBuf::from("/tmp");
        }
        // Regardless of the umask: whoever can write here could replace the logs and the passwords by links.
        let private = PermissionsExt::from_mode(0o700);
        let dir = tempfile::Builder::new().prefix(prefix).permissions(private).tempdir_in(&base);
        let dir = dir.map_err(io(base.display()))?;
        if let Some(ids) = server_user() {
            // The servers' user must be able to traverse the directory, but not to list or change it.
            let admit = || {
                chown(dir.path(), None, Some(ids.gid))?;
                std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o710))
            };
            admit().map_err(io(dir.path().display()))?;
        }
        Ok(Self { dir, kept: false })
    }

    /// Keeps the directory, whatever happens.
    #[must_use]
    pub fn kept(mut self) -> Self {
        self.dir.disable_cleanup(true);
        self.kept = true;
        self
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Creates a directory that only the servers' user can enter. The server's log and password are next to it.
    fn room(&self, name: &str, password: &str) -> Result<Room, ServerError> {
        let path = self.path().join(name);
        let make = || {
            std::fs::create_dir(&path)?;
            std::fs::set_permissions(&path, PermissionsExt::from_mode(0o700))?;
            give_to_servers(&path)
        };
        make().map_err(io(path.display()))?;
        let [log, password_file] = ["log", "password"].map(|what| self.path().join(format!("{name}.{what}")));
        secret_file(&password_file, &format!("{password}\n"))?;
        Ok(Room { log, password_file, path, kept: self.kept })
    }
}

fn give_to_servers(path: &Path) -> std::io::Result<()> {
    match server_user() {
        Some(ids) => chown(path, Some(ids.uid), Some(ids.gid)),
        None => Ok(()),
    }
}

/// Creates a file that only the servers' user can read.
fn secret_file(path: &Path, text: &str) -> Result<(), ServerError> {
    let write = || {
        let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
        file.write_all(text.as_bytes())?;
        give_to_servers(path)
    };
    write().map_err(io(path.display()))
}

#[derive(Debug)]
struct Room {
    path: PathBuf,
    log: PathBuf,
    password_file: PathBuf,
    kept: bool,
}

impl Room {
    /// Returns the last lines of the log, for an error message.
    fn log_end(&self) -> String {
        let text = std::fs::read(&self.log).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<_> = text.lines().collect();
        lines.get(lines.len().saturating_sub(20)..).unwrap_or_default().join("\n")
    }
}

// ------------------------------------------------------------------------------------------------ the guard

/// `$GUARD_STOP` is the signal that stops the server; `$GUARD_REMOVE` is the directory to remove when the pipe closes,
/// together with the files next to it whose names begin with its name. They are environment variables so that a `pkill
/// -f` aimed at us does not hit the guard.
///
/// USR1 ends the watcher when the server has exited on its own. Once the pipe has closed, the watcher ignores USR1, so
/// its exit status tells the two cases apart. The guard ignores signals to the process group of a terminal or service,
/// because we handle those.
const GUARD: &str = r#"
umask 077
trap '' HUP INT TERM PIPE
exec 3<&0 </dev/null
"$@" >>"$GUARD_LOG" 2>&1 3<&- &
server=$!
echo "$server"
(
    read -r line <&3
    trap '' USR1
    kill -s CONT "$server"
    kill -s "$GUARD_STOP" "$server"
    exit 0
) &
watcher=$!
exec 3<&-
wait "$server"
code=$?
kill -s USR1 "$watcher"
if wait "$watcher" && [ -n "$GUARD_REMOVE" ]; then
    rm -rf "$GUARD_REMOVE" "$GUARD_REMOVE".*
    rmdir "${GUARD_REMOVE%/*}"
fi
exit "$code"
"#;

/// A server and its guard. Dropping it stops both and waits until they have exited.
#[derive(Debug)]
struct GuardedServer {
    guard: Child,
    server: Pid,
    /// Kept open, so that writing to it cannot kill the guard.
    _output: BufReader<ChildStdout>,
}

impl GuardedServer {
    fn spawn(program: &Path, args: &[String], room: &Room, stop: Signal) -> Result<Self, ServerError> {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", GUARD, "guard"]);
        if let Some(Ids { uid, gid }) = server_user() {
            let setpriv = on_path(&["setpriv"]).ok_or(ServerError::NoSetpriv)?;
            command.arg(setpriv).arg(format!("--reuid={uid}")).arg(format!("--regid={gid}")).arg("--clear-groups");
        }
        let mut guard = command
            .arg(program)
            .args(args)
            .env("GUARD_LOG", &room.log)
            .env("GUARD_STOP", stop.as_str().trim_start_matches("SIG"))
            .env("GUARD_REMOVE", if room.kept { Path::new("") } else { &room.path })
            .current_dir(&room.path)
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .map_err(io("/bin/sh"))?;
        let stdout = guard.stdout.take().ok_or(std::io::ErrorKind::BrokenPipe.into()).map_err(io("/bin/sh"))?;
        let mut output = BufReader::new(stdout);
        let mut line = String::new();
        output.read_line(&mut line).map_err(io("/bin/sh"))?;
        let pid = line.trim().parse().map_err(|_| io("/bin/sh")(std::io::ErrorKind::InvalidData.into()))?;
        Ok(Self { guard, server: Pid::from_raw(pid), _output: output })
    }

    /// Returns the server's exit status as a shell reports it (128 + n for signal n), if it has exited.
    fn ended(&mut self) -> Result<Option<ExitStatus>, ServerError> {
        self.guard.try_wait().map_err(io("waiting for a server"))
    }

    fn wait(&mut self) -> Result<ExitStatus, ServerError> {
        // Not Child::wait, which would close the pipe and so stop the server.
        loop {
            if let Some(status) = self.ended()? {
                return Ok(status);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn signal(&self, signal: Signal) {
        // Fails only if it has exited, in which case there is nothing to do.
        let _ = kill(self.server, signal);
    }
}

impl Drop for GuardedServer {
    fn drop(&mut self) {
        drop(self.guard.stdin.take());
        let _ = self.guard.wait();
    }
}

fn wait_until_ready(
    what: &str,
    room: &Room,
    server: &mut GuardedServer,
    mut ready: impl FnMut() -> bool,
) -> Result<(), ServerError> {
    let deadline = Instant::now() + START_PATIENCE;
    while !ready() {
        if server.ended()?.is_some() || Instant::now() > deadline {
            return Err(ServerError::NotStarted { what: what.to_owned(), log: room.log_end() });
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

// ------------------------------------------------------------------------------------------------ Postgres

/// The shutdown mode of Postgres (`pg_ctl stop -m`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// Waits for clients to disconnect.
    Smart,
    /// Disconnects them.
    Fast,
    /// Without a checkpoint, as in a crash.
    Immediate,
}

/// A cluster with `wal_level=logical`, superuser `postgres`, UTF8 and locale C, that is not safe against an operating
/// system crash. Every login needs a password; the superuser's is [`postgres_password`].
#[derive(Debug)]
pub struct Postgres {
    room: Room,
    programs: PathBuf,
    port: u16,
    settings: Vec<(String, String)>,
    server: Option<GuardedServer>,
}

impl Postgres {
    /// Creates the cluster and starts it. `settings` go into postgresql.conf.
    ///
    /// # Errors
    /// If Postgres is not installed or does not start.
    pub fn start_new(place: &Place, settings: &[(&str, &str)]) -> Result<Self, ServerError> {
        let programs = postgres_programs()?;
        let room = place.room("postgres", postgres_password())?;
        let data = room.path.join("data").display().to_string();
        let password = format!("--pwfile={}", room.password_file.display());
        let args = ["-D", &data, "-U", "postgres", "-A", "scram-sha-256", &password, "-E", "UTF8", "--locale=C"];
        let args: Vec<_> = args.into_iter().chain(["--no-sync"]).map(str::to_owned).collect();
        // Not interrupted, because it only takes a second, and its child processes must not be left behind.
        let mut initdb = GuardedServer::spawn(&programs.join("initdb"), &args, &room, Signal::SIGCONT)?;
        if !initdb.wait()?.success() {
            return Err(ServerError::NotStarted { what: "initdb".to_owned(), log: room.log_end() });
        }
        let settings = settings.iter().map(|&(name, value)| (name.to_owned(), value.to_owned())).collect();
        let mut postgres = Self { room, programs, port: 0, settings, server: None };
        for attempt in 1.. {
            postgres.port = free_port()?;
            match postgres.start() {
                Ok(()) => break,
                Err(error) if attempt == START_ATTEMPTS => return Err(error),
                Err(_) => {}
            }
        }
        Ok(postgres)
    }

    /// Copies the cluster's files to a directory and a port of their own, without starting it. The original must be
    /// stopped meanwhile.
    ///
    /// # Errors
    /// If the files cannot be copied.
    pub fn copy(&self, place: &Place) -> Result<Self, ServerError> {
        let room = place.room("postgres", postgres_password())?;
        let copied = Command::new("cp").arg("-a").args([&self.data(), &room.path]).status().map_err(io("cp"))?;
        if !copied.success() {
            return Err(io("cp")(std::io::Error::other(copied.to_string())));
        }
        let (programs, settings) = (self.programs.clone(), self.settings.clone());
        Ok(Self { room, programs, port: free_port()?, settings, server: None })
    }

    /// Takes effect with the next start.
    pub fn set(&mut self, name: &str, value: &str) {
        self.settings.push((name.to_owned(), value.to_owned()));
    }

    /// Takes effect with the next start. The port is that of another server that has ended.
    pub fn move_to(&mut self, port: u16) {
        self.port = port;
    }

    /// Returns its data directory.
    pub fn data(&self) -> PathBuf {
        self.room.path.join("data")
    }

    /// Starts it again, on the same port.
    ///
    /// # Errors
    /// If it does not start.
    pub fn start(&mut self) -> Result<(), ServerError> {
        self.server = None;
        let data = self.data();
        let mut args = vec!["-D".to_owned(), data.display().to_string()];
        let port = self.port.to_string();
        let sockets = self.room.path.display().to_string();
        let ours = [
            ("listen_addresses", "127.0.0.1"),
            ("port", &port),
            ("unix_socket_directories", &sockets),
            ("unix_socket_permissions", "0700"),
            ("wal_level", "logical"),
            ("fsync", "off"),
        ];
        for (name, value) in ours.into_iter().chain(self.settings.iter().map(|(n, v)| (n.as_str(), v.as_str()))) {
            args.extend(["-c".to_owned(), format!("{name}={value}")]);
        }
        let mut server = GuardedServer::spawn(&self.programs.join("postgres"), &args, &self.room, Signal::SIGQUIT)?;
        let pid = server.server.to_string();
        wait_until_ready("postgres", &self.room, &mut server, || {
            // Line 1 is the PID, line 8 the state. If the server was killed, the file may be left over from the
            // previous one.
            let file = std::fs::read_to_string(data.join("postmaster.pid")).unwrap_or_default();
            let lines: Vec<_> = file.lines().map(str::trim).collect();
            lines.first() == Some(&pid.as_str()) && matches!(lines.get(7), Some(&("ready" | "standby")))
        })?;
        self.server = Some(server);
        Ok(())
    }

    /// # Errors
    /// If the system does not let us wait for it.
    pub fn stop(&mut self, how: Stop) -> Result<(), ServerError> {
        self.signal(match how {
            Stop::Smart => Signal::SIGTERM,
            Stop::Fast => Signal::SIGINT,
            Stop::Immediate => Signal::SIGQUIT,
        });
        self.wait()
    }

    /// Sends a signal to the postmaster.
    pub fn signal(&self, signal: Signal) {
        if let Some(server) = &self.server {
            server.signal(signal);
        }
    }

    /// Waits until it has exited.
    ///
    /// # Errors
    /// If the system does not let us wait for it.
    pub fn wait(&mut self) -> Result<(), ServerError> {
        match self.server.take() {
            Some(mut server) => server.wait().map(drop),
            None => Ok(()),
        }
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// Returns a URL for a role whose password is [`postgres_password`].
    pub fn url(&self, role: &str, database: &str) -> String {
        format!("postgres://{role}:{}@127.0.0.1:{}/{database}", postgres_password(), self.port)
    }

    /// A file that contains the password and nothing else.
    pub fn password_file(&self) -> &Path {
        &self.room.password_file
    }

    /// Returns the end of the server's log.
    pub fn log_end(&self) -> String {
        self.room.log_end()
    }
}

// ------------------------------------------------------------------------------------------------ Redis

/// A Redis (or Valkey) server that keeps everything in memory, unless its arguments say otherwise. The password of its
/// default user is [`redis_password`].
#[derive(Debug)]
pub struct Redis {
    room: Room,
    program: PathBuf,
    port: u16,
    args: Vec<String>,
    server: Option<GuardedServer>,
}

impl Redis {
    /// `name` distinguishes several servers in one place, `config` has additional lines for the configuration file, and
    /// `args` additional arguments.
    ///
    /// # Errors
    /// If Redis is not installed or does not start.
    pub fn start_new(place: &Place, name: &str, config: &str, args: &[&str]) -> Result<Self, ServerError> {
        let program = redis_program()?;
        let args = args.iter().map(|&a| a.to_owned()).collect();
        let mut redis = Self { room: place.room(name, redis_password())?, program, port: 0, args, server: None };
        // In the servers' own directory, because a Sentinel rewrites its configuration.
        secret_file(&redis.config_file(), &format!("requirepass {}\n{config}", redis_password()))?;
        for attempt in 1.. {
            redis.port = free_port()?;
            match redis.start() {
                Ok(()) => break,
                Err(error) if attempt == START_ATTEMPTS => return Err(error),
                Err(_) => {}
            }
        }
        Ok(redis)
    }

    /// Starts it again, on the same port.
    ///
    /// # Errors
    /// If it does not start.
    pub fn start(&mut self) -> Result<(), ServerError> {
        self.server = None;
        let dir = self.room.path.display().to_string();
        let (port, socket) = (self.port.to_string(), self.socket().display().to_string());
        let config = self.config_file().display().to_string();
        let ours = [&config, "--bind", "127.0.0.1", "--port", &port, "--dir", &dir];
        let sockets = ["--unixsocket", &socket, "--unixsocketperm", "700"];
        let memory = ["--save", "", "--appendonly", "no"];
        let ours = ours.into_iter().chain(sockets).chain(memory).map(str::to_owned);
        let args: Vec<_> = ours.chain(self.args.iter().cloned()).collect();
        let mut server = GuardedServer::spawn(&self.program, &args, &self.room, Signal::SIGKILL)?;
        let socket = self.socket();
        // Not over the port, which another server may have taken first.
        wait_until_ready("redis-server", &self.room, &mut server, || answers_ping(&socket).unwrap_or(false))?;
        self.server = Some(server);
        Ok(())
    }

    pub fn signal(&self, signal: Signal) {
        if let Some(server) = &self.server {
            server.signal(signal);
        }
    }

    /// Whether it was started, and nobody has waited for its end since.
    pub fn is_up(&self) -> bool {
        self.server.is_some()
    }

    /// Waits until it has exited.
    ///
    /// # Errors
    /// If the system does not let us wait for it.
    pub fn wait(&mut self) -> Result<(), ServerError> {
        match self.server.take() {
            Some(mut server) => server.wait().map(drop),
            None => Ok(()),
        }
    }

    /// Restarts it, without what it had in memory.
    ///
    /// # Errors
    /// If it does not start again.
    pub fn restart(&mut self) -> Result<(), ServerError> {
        self.signal(Signal::SIGTERM);
        self.wait()?;
        self.start()
    }

    /// Executes one command, made of words without spaces, whose reply is a status, a number or a text.
    ///
    /// # Errors
    /// If it does not answer, or answers with an error.
    pub fn command(&self, words: &[&str]) -> Result<(), ServerError> {
        self.ask(words).map(drop)
    }

    /// Returns the reply to such a command.
    fn ask(&self, words: &[&str]) -> Result<String, ServerError> {
        let ask = || -> std::io::Result<String> {
            let mut stream = UnixStream::connect(self.socket())?;
            stream.set_read_timeout(Some(Duration::from_secs(30)))?;
            stream.write_all(format!("AUTH {}\r\n{}\r\n", redis_password(), words.join(" ")).as_bytes())?;
            let mut replies = BufReader::new(stream);
            // AUTH is refused if the user has no password, which is as good.
            reply(&mut replies).ok();
            reply(&mut replies)
        };
        ask().map_err(io(words.join(" ")))
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn socket(&self) -> PathBuf {
        self.room.path.join("redis.sock")
    }

    fn config_file(&self) -> PathBuf {
        self.room.path.join("redis.conf")
    }

    pub fn url(&self) -> String {
        format!("redis://:{}@127.0.0.1:{}/0", redis_password(), self.port)
    }

    /// Connects over its socket, which only its user can reach. While it restarts, its port may belong to any program,
    /// and the password is sent in clear text.
    pub fn socket_url(&self) -> String {
        const PATH: &AsciiSet = &NON_ALPHANUMERIC.remove(b'/').remove(b'-').remove(b'.').remove(b'_');
        let socket = self.socket();
        format!("unix://{}?pass={}", percent_encode(socket.as_os_str().as_bytes(), PATH), redis_password())
    }

    /// A file that contains the password and nothing else.
    pub fn password_file(&self) -> &Path {
        &self.room.password_file
    }
}

/// Reads a status, a number or a text.
fn reply(from: &mut impl BufRead) -> std::io::Result<String> {
    let mut line = String::new();
    from.read_line(&mut line)?;
    let (kind, rest) = line.trim_end().split_at_checked(1).unwrap_or_default();
    match (kind, rest.parse::<usize>()) {
        ("+" | ":", _) => Ok(rest.to_owned()),
        ("$", Ok(length)) => {
            let mut text = vec![0; length + "\r\n".len()];
            from.read_exact(&mut text)?;
            text.truncate(length);
            String::from_utf8(text).map_err(std::io::Error::other)
        }
        _ => Err(std::io::Error::other(line.trim().to_owned())),
    }
}

/// Returns false while it loads its file, which it reports to clients that have logged in. Any other reply, such as
/// `NOAUTH` after the password was changed, comes from a server that may be ready.
fn answers_ping(socket: &Path) -> std::io::Result<bool> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(Duration::from_secs(1)))?;
    stream.write_all(format!("AUTH {}\r\nPING\r\n", redis_password()).as_bytes())?;
    let (mut answers, mut answer) = (BufReader::new(stream), String::new());
    answers.read_line(&mut answer)?;
    answer.clear();
    answers.read_line(&mut answer)?;
    Ok(!answer.is_empty() && !answer.starts_with("-LOADING"))
}
