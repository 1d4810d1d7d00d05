//! `prefetchd demo`: the commands that it prints work when pasted, and it leaves nothing behind, however it ends.

use crate::harness::{Feature, PATIENCE, Redis, eventually_blocking, skipped};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, User, geteuid};
use prefetchd::cli::servers;
use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Read};
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

pub struct Demo {
    child: Child,
    lines: Receiver<String>,
    seen: Vec<String>,
    /// The parent of the demo's directory.
    tmp: tempfile::TempDir,
    /// Where it leaves its token.
    _runtime: tempfile::TempDir,
}

/// What a demo prints once it is ready.
pub struct Printed {
    /// The address of the page to open.
    pub url: String,
    pub address: std::net::SocketAddr,
    /// The header line with the token.
    pub authorization: String,
    /// A shell command that changes a row.
    pub update: String,
}

impl Demo {
    pub fn start(args: &[&str]) -> Self {
        let tmp = tempfile::Builder::new().prefix("demo-").tempdir_in("/tmp").unwrap();
        // If the tests run as root, the servers' user must be able to traverse it.
        std::fs::set_permissions(tmp.path(), PermissionsExt::from_mode(0o755)).unwrap();
        let runtime = tempfile::tempdir().unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_prefetchd"))
            .args(["demo", "--port", "0"])
            .args(args)
            .env("TMPDIR", tmp.path())
            .env("RUNTIME_DIRECTORY", runtime.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let (line, lines) = channel();
        std::thread::spawn(move || stdout.lines().map_while(Result::ok).try_for_each(|l| line.send(l)));
        Self { child, lines, seen: Vec::new(), tmp, _runtime: runtime }
    }

    /// Returns the next line that contains this text.
    #[track_caller]
    pub fn line(&mut self, text: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) if line.contains(text) => return line,
                Ok(line) => self.seen.push(line),
                Err(error) => panic!("{text:?} was never printed ({error}), but:\n{}", self.seen.join("\n")),
            }
        }
    }

    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(i32::try_from(self.child.id()).unwrap()), signal).unwrap();
    }

    pub fn ready(&mut self) -> Printed {
        let page = self.line(" in a browser");
        let url = page.split(' ').find(|word| word.starts_with("http://")).unwrap().to_owned();
        let (address, token) = url["http://".len()..].split_once("/#token=").unwrap();
        let (address, authorization) = (address.parse().unwrap(), format!("Authorization: Bearer {token}"));
        let update = self.line("UPDATE categories");
        self.line("Changes that arrive");
        Printed { url, address, authorization, update }
    }

    fn directories(&self) -> Vec<PathBuf> {
        std::fs::read_dir(self.tmp.path()).unwrap().map(|entry| entry.unwrap().path()).collect()
    }

    /// The servers' PIDs, from the files that they write.
    fn servers(&self) -> BTreeSet<i32> {
        let dir = self.directories().pop().expect("the demo's directory");
        let postmaster = std::fs::read_to_string(dir.join("postgres/data/postmaster.pid")).unwrap();
        let postmaster: i32 = postmaster.lines().next().unwrap().parse().unwrap();
        processes_in(&dir).into_iter().chain([postmaster]).collect()
    }
}

impl Drop for Demo {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Every process whose working directory is this one or below it.
fn processes_in(dir: &Path) -> BTreeSet<i32> {
    let pids = std::fs::read_dir("/proc").unwrap().filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok());
    pids.filter(|pid| std::fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd.starts_with(dir))).collect()
}

/// Whether it is running, rather than a zombie.
fn runs(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'))
}

/// Runs a command as a person would paste it.
#[track_caller]
pub fn paste(line: &str) -> String {
    let output = Command::new("/bin/sh").args(["-c", line]).output().unwrap();
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn the_printed_lines_work_and_a_change_is_shown() {
    let mut demo = Demo::start(&[]);
    let hgetall = demo.line("HGETALL cache:category:cat-001");
    let curl = demo.line("/v1/tables/categories/cat-001");
    let update = demo.line("UPDATE categories");
    let [all, children, members, reparent] =
        ["lookups/categories/all", "by_parent/cat-001", "ZRANGE", "SET parent_id"].map(|text| demo.line(text));
    demo.line("Changes that arrive");
    assert_eq!(paste(&hgetall), "id\ncat-001\nname\nBeverages\ndisplay_order\n1\nfeatured\ntrue\nparent_id\n\n");
    let row = paste(&curl);
    assert!(
        row.ends_with(r#"{"id":"cat-001","name":"Beverages","display_order":"1","featured":"true","parent_id":""}"#)
    );
    assert_eq!(paste(&update).trim(), "UPDATE 1");
    let change = demo.line("cache:category:cat-001");
    let words: Vec<_> = change.split_whitespace().collect();
    assert_eq!(
        (words[1..4].join(" ").as_str(), words[5]),
        ("categories upsert cache:category:cat-001", "ms"),
        "{change}"
    );
    assert!(words[4].parse::<f64>().unwrap() >= 0.0, "{change}");
    assert!(paste(&hgetall).contains("Hot drinks"));

    let ids = |list: &str| -> Vec<String> {
        let list: serde_json::Value = serde_json::from_str(&paste(list)).unwrap();
        list["rows"].as_array().unwrap().iter().map(|row| row["id"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(ids(&all), ["cat-001", "cat-002", "cat-003", "cat-004", "cat-005"]);
    assert_eq!((ids(&children), paste(&members)), (vec!["cat-005".to_owned()], "cat-005\n".to_owned()));
    assert_eq!(paste(&reparent).trim(), "UPDATE 1");
    demo.line("cache:category:cat-002");
    assert_eq!(ids(&children), ["cat-002", "cat-005"]);
    assert_eq!(paste(&members), "cat-002\ncat-005\n");

    for statement in ["INSERT", "DELETE"] {
        let line = demo.seen.iter().find(|line| line.contains(statement)).unwrap().clone();
        paste(&line);
        demo.line("cache:category:cat-006");
    }
    demo.signal(Signal::SIGTERM);
    assert_eq!(demo.child.wait().unwrap().code(), Some(0));
}

#[tokio::test]
async fn a_cluster_is_read_changed_and_resharded_with_the_printed_lines() {
    if no_cluster_is_possible().await {
        return;
    }
    let mut demo = Demo::start(CLUSTER);
    let hgetall = demo.line("HGETALL cache:category:cat-001");
    let update = demo.line("UPDATE categories");
    let [reshard, failover, check] = ["--cluster reshard", "CLUSTER FAILOVER", "--cluster check"].map(|l| demo.line(l));
    demo.line("Changes that arrive");
    assert!(paste(&hgetall).starts_with("id\ncat-001\nname\nBeverages\n"));
    assert!(paste(&check).contains("[OK] All 16384 slots covered."));
    assert!(paste(&reshard).contains("Moving slot 6493 "), "that of cat-002");
    // Redis has the row before it is shown.
    let changed = |demo: &mut Demo, row: &str, name: &str| {
        paste(&update.replace("cat-001", row).replace("Hot drinks", name));
        demo.line(&format!("cache:category:{row}"));
        let read = paste(&hgetall.replace("cat-001", row));
        assert!(read.contains(&format!("\nname\n{name}\n")), "{read}");
    };
    changed(&mut demo, "cat-001", "Hot drinks");
    changed(&mut demo, "cat-002", "Moved");
    // It fails while the nodes disagree.
    let said = || paste(&format!("{check} || true"));
    let masters = || said().lines().filter(|line| line.contains(" slots | ")).map(str::to_owned).collect::<Vec<_>>();
    let before: BTreeSet<_> = masters().into_iter().collect();
    assert_eq!(paste(&failover).trim(), "OK");
    let new = |now: &Vec<String>| now.len() == 3 && now.iter().any(|master| !before.contains(master));
    eventually_blocking("the replica has taken over", masters, new);
    changed(&mut demo, "cat-001", "Taken over");
    demo.signal(Signal::SIGTERM);
    assert_eq!(demo.child.wait().unwrap().code(), Some(0));
}

#[test]
fn a_cluster_is_not_started_beside_a_given_redis_or_of_old_servers() {
    let demo = |args: &[&str], programs: &Path| {
        let mut demo = Command::new(env!("CARGO_BIN_EXE_prefetchd"));
        let output = demo.args(["demo", "--port", "0", "--cluster"]).args(args).env("PREFETCHD_TEST_REDIS", programs);
        let output = output.output().unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let old = tempfile::tempdir().unwrap();
    let program = old.path().join("redis-server");
    std::fs::write(&program, "#!/bin/sh\necho 'Redis server v=6.2.5 sha=00000000:0 malloc=jemalloc-5.1.0'\n").unwrap();
    std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
    let (code, said) = demo(&["--redis-url", "redis://127.0.0.1"], old.path());
    assert!(code == Some(2) && said.contains("'--cluster' cannot be used with '--redis-url"), "{said}");
    let (code, said) = demo(&[], old.path());
    assert!(code == Some(1) && said.contains("needs Redis 7.0 or later, or Valkey"), "{said}");
    assert!(said.contains(&format!("{} is Redis 6.2.5", program.display())), "{said}");
}

/// A shell of another user of this machine, who knows what everybody can see. If the tests do not run as root, one of
/// our own without access to our files.
fn as_user(name: &str, script: &str) -> std::process::Output {
    let mut shell = match geteuid().is_root() {
        true => {
            let user = User::from_name(name).unwrap().unwrap();
            let mut shell = Command::new("setpriv");
            shell.args([format!("--reuid={}", user.uid), format!("--regid={}", user.gid)]).arg("--clear-groups");
            shell.arg("/bin/sh");
            shell
        }
        false => Command::new("/bin/sh"),
    };
    shell.args(["-c", script]).env_clear().env("PATH", std::env::var_os("PATH").unwrap()).current_dir("/");
    shell.output().unwrap()
}

#[test]
fn other_users_of_the_machine_do_not_get_in() {
    let mut demo = Demo::start(&[]);
    let hgetall = demo.line("HGETALL cache:category:cat-001");
    let update = demo.line("UPDATE categories");
    demo.line("Changes that arrive");
    let dir = demo.directories().pop().unwrap();
    let numbers: Vec<_> = update.split(|c: char| !c.is_ascii_digit()).filter(|n| n.len() == 5).collect();
    let postgres = numbers.into_iter().rfind(|n| (11_000..21_000).contains(&n.parse().unwrap())).unwrap().to_owned();
    let redis = redis_port(&hgetall);

    let psql = format!("{} -w -d postgres -c 'SELECT 1' -p {postgres}", servers::callable(&["psql"]).display());
    let cli = servers::callable(&["redis-cli", "valkey-cli"]);
    let (dir_text, cli) = (dir.display(), cli.display());
    let mut ways = Vec::new();
    for role in ["postgres", "prefetchd"] {
        ways.push((format!("{psql} -U {role} -h 127.0.0.1"), "no password supplied"));
        ways.push((format!("{psql} -U {role} -h {dir_text}/postgres"), ""));
    }
    ways.push((format!("{cli} -e -p {redis} PING"), "NOAUTH"));
    ways.push((format!("{cli} -e -s {dir_text}/redis/redis.sock PING"), ""));
    if geteuid().is_root() {
        for file in ["postgres.password", "redis.password", "redis/redis.conf", "postgres.log"] {
            ways.push((format!("cat {dir_text}/{file}"), "Permission denied"));
        }
    }
    for (way, refusal) in ways {
        let output = as_user("daemon", &way);
        let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        assert!(!output.status.success() && said.contains(refusal), "{way}: {said}");
    }

    // What everybody can see: every command line, and the modes of the files in /tmp.
    let passwords = ["postgres.password", "redis.password"]
        .map(|file| std::fs::read_to_string(dir.join(file)).unwrap().trim().to_owned());
    assert!(passwords.iter().all(|password| password.len() >= 32), "{passwords:?}");
    assert_ne!(passwords[0], passwords[1], "Redis is sent its own in clear");
    for process in std::fs::read_dir("/proc").unwrap() {
        let line = std::fs::read(process.unwrap().path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        assert!(!passwords.iter().any(|password| line.contains(password)), "{line}");
    }
    for socket in [format!("postgres/.s.PGSQL.{postgres}"), "redis/redis.sock".to_owned()] {
        assert_eq!(dir.join(&socket).metadata().unwrap().permissions().mode() & 0o777, 0o700, "{socket}");
    }
    for (place, open_to) in [("", 0o010), ("postgres", 0), ("redis", 0), ("postgres/data", 0)] {
        assert_eq!(dir.join(place).metadata().unwrap().permissions().mode() & 0o077 & !open_to, 0, "{place}");
    }
}

/// The command that reads a row uses the socket and does not mention the port.
fn redis_port(hgetall: &str) -> u16 {
    let said = paste(&hgetall.replace("HGETALL cache:category:cat-001", "CONFIG GET port"));
    said.lines().nth(1).unwrap().parse().unwrap()
}

/// A program that takes the port of a restarting Redis is not sent its password.
#[test]
fn whoever_takes_the_port_of_redis_while_it_restarts_learns_nothing() {
    let mut demo = Demo::start(&[]);
    let hgetall = demo.line("HGETALL cache:category:cat-001");
    let port = redis_port(&hgetall);
    let server = demo.directories().pop().unwrap().join("redis");
    let servers = processes_in(&server);
    // Like the button on the page, but another program is faster.
    let squatter = std::thread::spawn(move || {
        let listener = loop {
            match TcpListener::bind((Ipv4Addr::LOCALHOST, port)) {
                Ok(listener) => break listener,
                Err(_) => std::thread::yield_now(),
            }
        };
        listener.set_nonblocking(true).unwrap();
        let deadline = Instant::now() + Duration::from_secs(4);
        let mut heard = Vec::new();
        while Instant::now() < deadline {
            if let Ok((mut stream, _)) = listener.accept() {
                stream.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
                let mut bytes = [0; 512];
                let length = stream.read(&mut bytes).unwrap_or_default();
                heard.extend_from_slice(&bytes[..length]);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        String::from_utf8_lossy(&heard).into_owned()
    });
    for pid in servers {
        let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        if name.contains("-server") {
            kill(Pid::from_raw(pid), Signal::SIGTERM).unwrap();
        }
    }
    assert_eq!(squatter.join().unwrap(), "");
}

/// Other users must not be able to put links in place of logs and passwords, whatever the umask.
#[test]
fn a_place_for_servers_is_its_users_alone_whatever_the_umask() {
    let output = Command::new("/bin/sh")
        .args(["-c", "umask 0; exec \"$0\" --exact demo::a_place_under_an_open_umask --ignored --nocapture"])
        .arg(std::env::current_exe().unwrap())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("1 passed"), "{said}");
}

#[test]
#[ignore = "a part of the one above, in a process with a umask of its own"]
fn a_place_under_an_open_umask() {
    let place = servers::Place::new("prefetchd-test-").unwrap();
    let mode = place.path().metadata().unwrap().permissions().mode() & 0o777;
    assert_eq!(mode & 0o067, 0, "{mode:o}");
}

#[test]
fn the_servers_user_cannot_make_root_write_elsewhere() {
    if !geteuid().is_root() {
        return skipped("only root's servers run as another user");
    }
    let place = servers::Place::new("prefetchd-test-").unwrap();
    let mut redis = servers::Redis::start_new(&place, "redis", "", &[]).unwrap();
    let victim = tempfile::NamedTempFile::new().unwrap();
    let path = place.path().display();
    let room = redis.socket().parent().unwrap().display().to_string();
    for log in [format!("{room}/log"), format!("{path}/redis.log"), format!("{path}/redis.password")] {
        as_user("nobody", &format!("rm -f {log}; ln -s {} {log}", victim.path().display()));
    }
    redis.restart().unwrap();
    assert_eq!(std::fs::read_to_string(victim.path()).unwrap(), "");
}

/// A demo with a cluster: its nodes, and the first process of Postgres.
const CLUSTER: &[&str] = &["--cluster"];
const CLUSTER_SERVERS: usize = 6 + 1;

/// Whether the installed Redis can do what the demo's cluster needs.
async fn no_cluster_is_possible() -> bool {
    Redis::lacks(Feature::AnnouncedHostname).await
}

fn leaves_nothing_after(signal: Signal, args: &[&str]) {
    let mut demo = Demo::start(args);
    demo.line("Changes that arrive");
    let servers = demo.servers();
    let enough = if args == CLUSTER { CLUSTER_SERVERS } else { 3 };
    assert!(servers.len() >= enough && servers.iter().all(|&pid| runs(pid)), "{servers:?}");
    demo.signal(signal);
    assert_eq!(demo.child.wait().unwrap().code(), Some(0), "{signal}");
    assert_eq!(servers.into_iter().filter(|&pid| runs(pid)).collect::<Vec<_>>(), [0; 0], "{signal}");
    assert!(demo.directories().is_empty(), "{signal}: {:?}", demo.directories());
}

#[test]
fn nothing_is_left_after_an_orderly_end() {
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        leaves_nothing_after(signal, &[]);
    }
}

#[tokio::test]
async fn nothing_is_left_of_a_cluster_after_an_orderly_end() {
    if !no_cluster_is_possible().await {
        leaves_nothing_after(Signal::SIGINT, CLUSTER);
    }
}

fn leaves_nothing_after_a_kill(args: &[&str]) {
    let mut demo = Demo::start(args);
    demo.line("Changes that arrive");
    let servers = demo.servers();
    demo.signal(Signal::SIGKILL);
    demo.child.wait().unwrap();
    let running = || servers.iter().copied().filter(|&pid| runs(pid)).collect::<Vec<_>>();
    eventually_blocking("the servers end", running, Vec::is_empty);
    eventually_blocking("the directory goes", || demo.directories(), Vec::is_empty);
}

#[test]
fn nothing_is_left_after_a_kill() {
    leaves_nothing_after_a_kill(&[]);
}

#[tokio::test]
async fn nothing_is_left_of_a_cluster_after_a_kill() {
    if !no_cluster_is_possible().await {
        leaves_nothing_after_a_kill(CLUSTER);
    }
}

/// `begun`: what is in the demo's directory when it is killed.
fn leaves_nothing_after_a_kill_in_the_middle_of_the_start(args: &[&str], begun: &str) {
    let mut demo = Demo::start(args);
    demo.line("starting");
    eventually_blocking("the directory comes", || demo.directories(), |dirs| !dirs.is_empty());
    let dir = demo.directories().pop().unwrap();
    eventually_blocking("a server is being started", || dir.join(begun).exists(), |&there| there);
    demo.signal(Signal::SIGKILL);
    demo.child.wait().unwrap();
    eventually_blocking("the processes end", || processes_in(&dir), BTreeSet::is_empty);
    eventually_blocking("the directory goes", || demo.directories(), Vec::is_empty);
}

#[test]
fn nothing_is_left_after_a_kill_in_the_middle_of_the_start() {
    leaves_nothing_after_a_kill_in_the_middle_of_the_start(&[], "postgres/data");
}

#[tokio::test]
async fn nothing_is_left_of_a_cluster_after_a_kill_while_it_is_formed() {
    if !no_cluster_is_possible().await {
        leaves_nothing_after_a_kill_in_the_middle_of_the_start(CLUSTER, "redis-6/nodes.conf");
    }
}

#[test]
fn what_is_to_be_kept_is_kept() {
    let mut demo = Demo::start(&["--keep"]);
    demo.line("Changes that arrive");
    let servers = demo.servers();
    demo.signal(Signal::SIGTERM);
    let kept = demo.line("kept ");
    assert_eq!(demo.child.wait().unwrap().code(), Some(0));
    assert_eq!(servers.into_iter().filter(|&pid| runs(pid)).collect::<Vec<_>>(), [0; 0]);
    let dir = demo.directories().pop().unwrap();
    assert!(kept.contains(dir.to_str().unwrap()), "{kept}");
    assert!(dir.join("postgres/data/PG_VERSION").exists());
}

#[test]
fn a_port_that_is_taken_is_said_before_anything_is_started() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port().to_string();
    let output = Command::new(env!("CARGO_BIN_EXE_prefetchd")).args(["demo", "--port", &port]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains(&format!("port {port} is taken")) && said.contains("--port"), "{said}");
    assert!(output.stdout.is_empty());
}
