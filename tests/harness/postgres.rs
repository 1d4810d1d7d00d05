//! A database of a test's own, on the shared server or on a server of its own.

use super::Stop;
use nix::sys::signal::Signal;
use prefetchd::cli::servers;
use prefetchd::lsn::Lsn;
use std::io::Write;
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};
use tokio::task::JoinHandle;
use tokio_postgres::tls::NoTlsStream;
use tokio_postgres::{Client, Connection, NoTls, SimpleQueryMessage, Socket};

/// The database with `migrations/` applied, of which every other one is a copy.
const TEMPLATE: &str = "shop";
const MIGRATIONS: [&str; 3] = [
    include_str!("../../migrations/001_categories.sql"),
    include_str!("../../migrations/002_role.sql"),
    include_str!("../../migrations/003_publication.sql"),
];
const SETTINGS: &[(&str, &str)] = &[
    ("max_replication_slots", "100"),
    ("max_wal_senders", "100"),
    ("max_connections", "300"),
    ("full_page_writes", "off"),
    ("shared_buffers", "64MB"),
    // Closes a connection without a word. A test that shares its thread with others may take long to log in.
    ("authentication_timeout", "600s"),
];

struct Server {
    server: servers::Postgres,
    _place: servers::Place,
}

/// The shared server. It is never dropped; its guard stops it after the last test.
static SHARED: OnceLock<Server> = OnceLock::new();
static DATABASES: AtomicUsize = AtomicUsize::new(1);

pub struct Postgres {
    /// `None` if it is the shared server.
    own: Option<Arc<Server>>,
    database: String,
}

/// Statements that are executed again and again.
pub struct Repeated {
    stop: Arc<AtomicBool>,
    rounds: JoinHandle<u32>,
}

impl Repeated {
    /// Returns the number of the last round.
    pub async fn stop(self) -> u32 {
        self.stop.store(true, Ordering::Relaxed);
        self.rounds.await.unwrap()
    }
}

impl Server {
    fn start(settings: &[(&str, &str)]) -> Self {
        let place = servers::Place::new("prefetchd-test-").unwrap();
        let all: Vec<_> = SETTINGS.iter().chain(settings).copied().collect();
        let server = servers::Postgres::start_new(&place, &all).unwrap_or_else(|error| panic!("{error}"));
        psql(&server.url("postgres", "postgres"), &format!("CREATE DATABASE {TEMPLATE}"));
        for migration in MIGRATIONS {
            psql(&server.url("postgres", TEMPLATE), migration);
        }
        Self { server, _place: place }
    }
}

impl Postgres {
    /// Creates a database on the shared server. Slots belong to the server, so the slot needs a unique name, too:
    /// [`Self::slot`].
    pub fn shared() -> Self {
        let server = &SHARED.get_or_init(|| Server::start(&[])).server;
        let database = format!("db{}", DATABASES.fetch_add(1, Ordering::Relaxed));
        psql(&server.url("postgres", "postgres"), &format!("CREATE DATABASE {database} TEMPLATE {TEMPLATE}"));
        Self { own: None, database }
    }

    /// Starts a server of the test's own, for what other tests must not notice. `settings` go into postgresql.conf.
    pub fn own(settings: &[(&str, &str)]) -> Self {
        Self { own: Some(Arc::new(Server::start(settings))), database: TEMPLATE.to_owned() }
    }

    /// Creates another database on this server.
    pub fn another_database(&self) -> Self {
        let database = format!("db{}", DATABASES.fetch_add(1, Ordering::Relaxed));
        psql(&self.server().url("postgres", "postgres"), &format!("CREATE DATABASE {database} TEMPLATE {TEMPLATE}"));
        Self { own: self.own.clone(), database }
    }

    /// The same, in an encoding other than UTF8.
    pub fn another_database_in(&self, encoding: &str) -> Self {
        let database = format!("db{}", DATABASES.fetch_add(1, Ordering::Relaxed));
        let locale = "LC_COLLATE 'C' LC_CTYPE 'C'";
        let sql = format!("CREATE DATABASE {database} TEMPLATE template0 ENCODING '{encoding}' {locale}");
        psql(&self.server().url("postgres", "postgres"), &sql);
        let made = Self { own: self.own.clone(), database };
        MIGRATIONS.iter().for_each(|migration| drop(psql(&made.url("postgres"), migration)));
        made
    }

    fn server(&self) -> &servers::Postgres {
        match &self.own {
            Some(own) => &own.server,
            None => &SHARED.get().unwrap().server,
        }
    }

    fn own_server(&mut self) -> &mut servers::Postgres {
        let own = self.own.as_mut().expect("the shared server is not for one test to stop: Postgres::own");
        &mut Arc::get_mut(own).expect("nobody else is on it").server
    }

    pub fn database(&self) -> &str {
        &self.database
    }

    /// The name of the slot, which no other test uses.
    pub fn slot(&self) -> String {
        format!("slot_{}", self.database)
    }

    pub fn port(&self) -> u16 {
        self.server().port()
    }

    /// Returns a URL for `postgres`, `prefetchd`, or a role that [`psql`] or [`Self::execute`] created without a
    /// password.
    pub fn url(&self, role: &str) -> String {
        self.server().url(role, &self.database)
    }

    /// The same without the password.
    pub fn bare_url(&self, role: &str) -> String {
        without_password(&self.url(role))
    }

    /// Connects as superuser.
    pub async fn client(&self) -> Client {
        let (client, connection) = self.connect().await;
        tokio::spawn(connection);
        client
    }

    /// If it fails, the server knows more than its client.
    pub async fn connect(&self) -> (Client, Connection<Socket, NoTlsStream>) {
        let connected = tokio_postgres::connect(&self.url("postgres"), NoTls).await;
        connected.unwrap_or_else(|error| panic!("{error:?}; the end of its log:\n{}", self.server().log_end()))
    }

    /// Executes statements as superuser, in one transaction unless they say otherwise. Returns the position after their
    /// commit, to wait for.
    pub async fn execute(&self, sql: &str) -> Lsn {
        self.simple_query(sql).await;
        self.position().await
    }

    /// Executes what `sql` gives for the rounds 1, 2, 3 and so on, until it is stopped.
    pub fn repeat(self: &Arc<Self>, sql: impl Fn(u32) -> String + Send + 'static) -> Repeated {
        let (stop, postgres) = (Arc::new(AtomicBool::new(false)), Arc::clone(self));
        let stopped = Arc::clone(&stop);
        let rounds = tokio::spawn(async move {
            let mut round = 0;
            while !stopped.load(Ordering::Relaxed) {
                round += 1;
                postgres.execute(&sql(round)).await;
            }
            round
        });
        Repeated { stop, rounds }
    }

    /// Returns a position after everything that is committed now.
    pub async fn position(&self) -> Lsn {
        self.value("SELECT pg_current_wal_insert_lsn()").await.unwrap().parse().unwrap()
    }

    /// Returns 150013 for 15.13.
    pub async fn version_num(&self) -> u32 {
        self.value("SHOW server_version_num").await.unwrap().parse().unwrap()
    }

    /// Returns the first column of the first row.
    pub async fn value(&self, sql: &str) -> Option<String> {
        let messages = self.simple_query(sql).await;
        messages.iter().find_map(|message| match message {
            SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
            _ => None,
        })
    }

    /// Uses a connection of its own and closes it.
    async fn simple_query(&self, sql: &str) -> Vec<SimpleQueryMessage> {
        let (client, connection) = self.connect().await;
        let connection = tokio::spawn(connection);
        let messages = client.simple_query(sql).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
        if sql.contains("CREATE ROLE") {
            client.batch_execute(&missing_passwords()).await.unwrap();
        }
        drop(client);
        connection.await.unwrap().unwrap();
        messages
    }

    /// [`Stop::Smart`] waits until every [`Self::client`] and daemon has disconnected.
    pub fn stop(&mut self, how: Stop) {
        self.own_server().stop(how).unwrap();
    }

    /// Starts it again, on the same port.
    pub fn start_again(&mut self) {
        // After a kill, child processes may hold on to shared memory for a moment, and it refuses to start until they
        // exit.
        let start = || self.own_server().start().map_err(|error| error.to_string());
        super::eventually_blocking("postgres starts again", start, Result::is_ok)
            .unwrap_or_else(|error| panic!("{error}"));
    }

    pub fn restart(&mut self, how: Stop) {
        self.stop(how);
        self.start_again();
    }

    pub fn kill(&mut self) {
        let server = self.own_server();
        server.signal(Signal::SIGKILL);
        server.wait().unwrap();
    }

    /// Returns the slot's confirmed position, according to Postgres.
    pub async fn confirmed(&self) -> Lsn {
        let slot = self.slot();
        let sql = format!("SELECT confirmed_flush_lsn FROM pg_replication_slots WHERE slot_name = '{slot}'");
        self.value(&sql).await.unwrap().parse().unwrap()
    }

    /// Drops the slot. Terminates the session that reads it, which may be quick to acquire it again, or to create
    /// another.
    pub async fn drop_slot(&self) {
        let (since, of) =
            (self.position().await, format!("FROM pg_replication_slots WHERE slot_name = '{}'", self.slot()));
        let sql = format!(
            "DO $$ BEGIN PERFORM pg_terminate_backend(active_pid, 5000) {of};
             PERFORM pg_drop_replication_slot(slot_name) {of};
             EXCEPTION WHEN object_in_use OR undefined_object THEN NULL; END $$"
        );
        // A slot that is being created has no position yet.
        let left = format!("SELECT count(*) {of} AND confirmed_flush_lsn < '{since}'");
        let dropped = async || {
            self.execute(&sql).await;
            self.value(&left).await
        };
        super::eventually("the slot is dropped", dropped, |left| left.as_deref() == Some("0")).await;
    }

    /// Copies its files to a server with a port of its own, which is not started. Stops the original while copying.
    pub fn twin(&mut self) -> Self {
        self.stop(Stop::Fast);
        let place = servers::Place::new("prefetchd-test-").unwrap();
        let server = self.own_server().copy(&place).unwrap_or_else(|error| panic!("{error}"));
        self.start_again();
        Self { own: Some(Arc::new(Server { server, _place: place })), database: self.database.clone() }
    }

    /// Removes its slots, as a base backup does. It must be stopped.
    pub fn without_slots(mut self) -> Self {
        for slot in std::fs::read_dir(self.own_server().data().join("pg_replslot")).unwrap() {
            std::fs::remove_dir_all(slot.unwrap().path()).unwrap();
        }
        self
    }

    /// Changes a setting, with effect from the next start.
    pub fn set(&mut self, name: &str, value: &str) {
        self.own_server().set(name, value);
    }

    /// Starts it as a standby of `primary`, and returns once it streams.
    pub async fn follow(&mut self, primary: &Self) {
        let server = self.own_server();
        std::fs::write(server.data().join("standby.signal"), "").unwrap();
        let (port, password) = (primary.port(), servers::postgres_password());
        let conninfo = format!("host=127.0.0.1 port={port} user=postgres password={password} application_name=twin");
        // Not on the command line, which everybody can read. The last line takes precedence.
        let file = std::fs::OpenOptions::new().append(true).open(server.data().join("postgresql.auto.conf"));
        writeln!(file.unwrap(), "primary_conninfo = '{conninfo} dbname={TEMPLATE}'").unwrap();
        server.set("wal_retrieve_retry_interval", "100ms");
        self.start_again();
        let sql = "SELECT state FROM pg_stat_replication WHERE application_name = 'twin'";
        let state = async || primary.value(sql).await;
        super::eventually("the standby follows", state, |state| state.as_deref() == Some("streaming")).await;
    }

    /// Promotes a standby.
    pub async fn promote(&self) {
        assert_eq!(self.value("SELECT pg_promote()").await.as_deref(), Some("t"));
    }

    /// Swaps the two: from now on `other` is found at this address, and this one remains there, stopped.
    pub fn change_places(&mut self, other: &mut Self) {
        for one in [&mut *self, &mut *other] {
            one.stop(Stop::Fast);
        }
        let (here, there) = (self.port(), other.port());
        std::mem::swap(&mut self.own, &mut other.own);
        self.own_server().move_to(here);
        other.own_server().move_to(there);
        self.start_again();
    }

    /// Signals the postmaster only. To freeze a walsender, signal its own PID: see `pg_stat_replication.pid`.
    pub fn signal(&mut self, signal: Signal) {
        self.own_server().signal(signal);
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        if self.database != TEMPLATE {
            // Including its slots, once they are inactive, because they would retain WAL, and there are not enough for
            // every test.
            let sql = format!("DROP DATABASE {} WITH (FORCE)", self.database);
            let url = self.server().url("postgres", "postgres");
            // Postgres waits for every connection that is logging in. One that goes through a proxy of this test gets
            // no further while this waits, because the proxy runs on the same thread.
            let dropping = std::thread::spawn(move || run_psql(&url, &sql));
            let patience = Instant::now() + Duration::from_secs(2);
            while !dropping.is_finished() && Instant::now() < patience {
                std::thread::sleep(Duration::from_millis(2));
            }
        }
    }
}

fn without_password(url: &str) -> String {
    url.replace(&format!(":{}@", servers::postgres_password()), "@")
}

/// Sets passwords for roles that were created without one, which they need to log in. Another test may be doing so for
/// the same role.
fn missing_passwords() -> String {
    let password = servers::postgres_password();
    format!(
        "DO $$ DECLARE role text; BEGIN
         FOR role IN SELECT rolname FROM pg_catalog.pg_authid WHERE rolcanlogin AND rolpassword IS NULL LOOP
             BEGIN EXECUTE format('ALTER ROLE %I PASSWORD %L', role, '{password}'); EXCEPTION WHEN OTHERS THEN NULL; END;
         END LOOP; END $$;"
    )
}

/// The password is not on the command line, which every user of this machine can read.
fn run_psql(url: &str, sql: &str) -> Output {
    let psql = |stdin: Stdio| {
        let mut psql = Command::new(servers::callable(&["psql"]));
        psql.args(["-XAtq", "-v", "ON_ERROR_STOP=1", "-d", &without_password(url)]).stdin(stdin);
        psql.env("PGPASSWORD", servers::postgres_password()).stdout(Stdio::piped()).stderr(Stdio::piped());
        psql
    };
    let output = psql(Stdio::null()).args(["-c", sql]).output().unwrap();
    if sql.contains("CREATE ROLE") {
        let mut giving = psql(Stdio::piped()).spawn().unwrap();
        giving.stdin.take().unwrap().write_all(missing_passwords().as_bytes()).unwrap();
        assert!(giving.wait().unwrap().success());
    }
    output
}

/// Returns what `psql` prints.
#[track_caller]
pub fn psql(url: &str, sql: &str) -> String {
    let output = run_psql(url, sql);
    assert!(output.status.success(), "{sql}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim_end().to_owned()
}
