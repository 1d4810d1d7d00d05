//! The servers, the table, and everything that moves its rows.

use super::processes::Pids;
use prefetchd::cli::servers::{self, Cluster, Place, Postgres};
use std::error::Error;
use std::fmt;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

pub type Outcome<T> = Result<T, Box<dyn Error>>;

const PATIENCE: Duration = Duration::from_secs(600);
/// How often a waiting thread polls Redis.
const LOOK_EVERY: Duration = Duration::from_millis(2);
const KEY: &str = "bench:item:";
pub const CHECKPOINT: &str = "prefetchd:{prefetchd}:checkpoint";
/// The other half of the checkpoint: what it says of each table.
const TABLES: &str = "prefetchd:{prefetchd}:tables";
const TTL_MS: u64 = 86_400_000;
/// The ID of the marker row, whose value tells which backlog has been drained.
const MARK: u64 = 0;

/// About 100 bytes per row, as text. Row 0 is the marker.
const TABLE: &str = "
CREATE TABLE items (
    id bigint PRIMARY KEY, name text NOT NULL, category text NOT NULL, price numeric(10,2) NOT NULL, stock integer NOT NULL,
    active boolean NOT NULL, updated_at timestamptz NOT NULL);
CREATE PUBLICATION prefetchd FOR TABLE items;
CREATE PROCEDURE backlog(changes bigint, per bigint) LANGUAGE plpgsql AS $$
BEGIN
    FOR done IN 0 .. changes - 1 BY per LOOP
        UPDATE items SET stock = stock + 1 WHERE id > done AND id <= least(done + per, changes);
        COMMIT;
    END LOOP;
END $$;";

/// Turns COPY's text into Redis commands. mawk counts bytes.
const MAWK: &str = r#"
BEGIN { FS = "\t"; split("id name category price stock active updated_at", name, " ") }
function arg(text) { printf "$%d\r\n%s\r\n", length(text), text }
{
    key = "bench:item:" $1
    $6 = ($6 == "t") ? "true" : "false"
    if (DELETES) { printf "*2\r\n$3\r\nDEL\r\n"; arg(key) }
    printf "*16\r\n$4\r\nHSET\r\n"; arg(key)
    for (i = 1; i <= 7; i++) { arg(name[i]); arg($i) }
    printf "*3\r\n$7\r\nPEXPIRE\r\n"; arg(key); arg(TTL)
}"#;

/// How both servers are reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    Unix,
    Tcp,
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Way::Unix => "unix sockets",
            Way::Tcp => "loopback TCP",
        })
    }
}

pub struct World {
    rows: u64,
    postgres: Postgres,
    redis: servers::Redis,
    client: redis::Client,
    place: Place,
}

/// Changes that wait in a slot.
pub struct Backlog {
    /// The marker row's value at the end.
    mark: u64,
    /// The position of its end.
    end: String,
    /// What Redis had before.
    checkpoint: Vec<u8>,
}

impl World {
    /// Starts the servers.
    pub fn start(rows: u64) -> Outcome<Self> {
        let place = Place::new("prefetchd-bench-")?;
        // As a careful administrator would set them for this table. Everything else is the default, including fsync.
        let settings = [
            ("fsync", "on"),
            ("shared_buffers", "512MB"),
            ("max_wal_size", "8GB"),
            ("checkpoint_timeout", "1h"),
            ("autovacuum", "off"),
        ];
        let postgres = Postgres::start_new(&place, &settings)?;
        let redis = servers::Redis::start_new(&place, "redis", "", &[])?;
        let client = redis::Client::open(unix_url(&redis))?;
        Ok(Self { rows, postgres, redis, client, place })
    }

    /// Starts the servers, and creates the table.
    pub fn new(rows: u64) -> Outcome<Self> {
        let world = Self::start(rows)?;
        world.sql(TABLE)?;
        world.sql(&format!(
            "INSERT INTO items SELECT n, 'Item number ' || n, 'category-' || n % 97, n % 100000 / 100.0, n % 1000, n % 2 = 0, \
             timestamptz '2024-01-01 00:00Z' + n * interval '1 second' FROM generate_series(0, {rows}) n; VACUUM ANALYZE items; \
             CHECKPOINT"
        ))?;
        Ok(world)
    }

    /// Starts a Redis Cluster of masters only, beside the Redis that is there.
    pub fn cluster(&self) -> Outcome<Cluster> {
        Ok(Cluster::start_new(&self.place, 0)?)
    }

    /// A file of the run, which is removed with everything.
    pub fn file(&self, name: &str) -> PathBuf {
        self.place.path().join(name)
    }

    pub fn redis_port(&self) -> u16 {
        self.redis.port()
    }

    pub fn pids(&self) -> Pids {
        let file = self.sockets().join("data/postmaster.pid");
        let postmaster = std::fs::read_to_string(file).ok().and_then(|text| text.lines().next()?.parse().ok());
        let redis = self.redis_info("process_id").ok().and_then(|pid| pid.parse().ok());
        Pids { postmaster: postmaster.unwrap_or_default(), redis: redis.unwrap_or_default() }
    }

    fn sockets(&self) -> PathBuf {
        self.place.path().join("postgres")
    }

    /// Over loopback: host, port and password of Postgres, port and password of Redis.
    pub fn addresses(&self) -> [String; 5] {
        let (postgres, redis) = (self.postgres.port(), self.redis.port());
        let of = |password: &str| password.to_owned();
        [
            "127.0.0.1".to_owned(),
            postgres.to_string(),
            of(servers::postgres_password()),
            redis.to_string(),
            of(servers::redis_password()),
        ]
    }

    fn postgres_args(&self, way: Way) -> Vec<String> {
        let host = match way {
            Way::Unix => self.sockets().display().to_string(),
            Way::Tcp => "127.0.0.1".to_owned(),
        };
        ["-h", &host, "-p", &self.postgres.port().to_string(), "-U", "postgres", "-d", "postgres"]
            .map(str::to_owned)
            .into()
    }

    fn redis_args(&self, way: Way) -> Vec<String> {
        match way {
            Way::Unix => vec!["-s".to_owned(), self.redis.socket().display().to_string()],
            Way::Tcp => vec!["-p".to_owned(), self.redis.port().to_string()],
        }
    }

    fn psql(&self) -> Command {
        let mut psql = Command::new(servers::callable(&["psql"]));
        psql.args(["-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1"]).args(self.postgres_args(Way::Unix));
        psql.env("PGPASSWORD", servers::postgres_password());
        psql
    }

    /// Returns the answer. Statements after a `;` run on their own.
    pub fn sql(&self, text: &str) -> Outcome<String> {
        let mut psql = self.psql().stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        if let Some(mut stdin) = psql.stdin.take() {
            stdin.write_all(text.as_bytes())?;
        }
        let output = psql.wait_with_output()?;
        if !output.status.success() {
            return Err(format!("psql failed at: {text}").into());
        }
        Ok(String::from_utf8(output.stdout)?.trim().to_owned())
    }

    fn ask<T: redis::FromRedisValue>(&self, words: &[&[u8]]) -> Outcome<T> {
        let mut command = redis::Cmd::new();
        words.iter().for_each(|word| {
            command.arg(*word);
        });
        Ok(command.query(&mut self.client.get_connection()?)?)
    }

    pub fn redis_info(&self, name: &str) -> Outcome<String> {
        let info: String = self.ask(&[b"INFO"])?;
        let line = info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        Ok(line.unwrap_or_default().trim().to_owned())
    }

    pub fn flush(&self) -> Outcome<()> {
        self.ask(&[b"FLUSHALL", b"SYNC"])
    }

    /// # Errors
    /// Unless Redis has every row.
    pub fn is_full(&self) -> Outcome<()> {
        // Row 0 is one more.
        self.has_rows(self.rows + 1)
    }

    /// The marker row is the first.
    pub fn has_any_row(&self) -> Outcome<bool> {
        self.ask(&[b"EXISTS", format!("{KEY}{MARK}").as_bytes()])
    }

    /// # Errors
    /// Unless Redis has so many keys of rows.
    pub fn has_rows(&self, rows: u64) -> Outcome<()> {
        let keys: u64 = self.ask(&[b"DBSIZE"])?;
        let ours: u64 = self.ask(&[b"EXISTS", CHECKPOINT.as_bytes(), TABLES.as_bytes()])?;
        if keys - ours == rows { Ok(()) } else { Err(format!("{keys} keys in Redis, {rows} rows in Postgres").into()) }
    }

    // ---- loads

    /// COPY, turned into commands by mawk, and `redis-cli --pipe`.
    pub fn load_by_hand(&self) -> Outcome<Duration> {
        let started = Instant::now();
        self.pipeline("COPY items TO STDOUT", self.deletes()?, |mawk| {
            run(redis_cli().args(self.redis_args(Way::Unix)).arg("--pipe").stdin(mawk).stdout(Stdio::null()))
        })?;
        Ok(started.elapsed())
    }

    /// Fields that a row no longer has must be removed; in an empty Redis there are none.
    fn deletes(&self) -> Outcome<bool> {
        Ok(self.ask::<u64>(&[b"DBSIZE"])? > 0)
    }

    fn pipeline(&self, copy: &str, deletes: bool, end: impl FnOnce(Stdio) -> Outcome<()>) -> Outcome<()> {
        let mut psql = self.psql().args(["-c", copy]).stdout(Stdio::piped()).spawn()?;
        let rows = psql.stdout.take().ok_or("no pipe")?;
        let (deletes, ttl) = (format!("DELETES={}", u8::from(deletes)), format!("TTL={TTL_MS}"));
        let mut mawk = Command::new("mawk");
        let mut mawk = mawk.args(["-v", &deletes, "-v", &ttl, MAWK]).stdin(rows).stdout(Stdio::piped()).spawn()?;
        end(mawk.stdout.take().ok_or("no pipe")?.into())?;
        if mawk.wait()?.success() && psql.wait()?.success() { Ok(()) } else { Err("psql or mawk failed".into()) }
    }

    /// Makes the next start a first start.
    pub fn forget_slot_and_checkpoint(&self) -> Outcome<()> {
        self.ask::<u64>(&[b"DEL", CHECKPOINT.as_bytes(), TABLES.as_bytes()])?;
        self.drop_slot("prefetchd")
    }

    pub fn wait_for_load(&self) -> Outcome<()> {
        self.wait_for_load_in(&mut self.client.get_connection()?)
    }

    /// Waits until the checkpoint, in this Redis, says that the table is loaded.
    pub fn wait_for_load_in(&self, redis: &mut redis::Connection) -> Outcome<()> {
        self.wait_for("the load", || {
            let entry: Option<Vec<u8>> = redis::cmd("HGET").arg(TABLES).arg("items").query(redis)?;
            let json: serde_json::Value = serde_json::from_slice(&entry.unwrap_or_default()).unwrap_or_default();
            Ok(json["state"] == "loaded")
        })
    }

    fn checkpoint(&self) -> Outcome<Vec<u8>> {
        Ok(self.ask::<Option<Vec<u8>>>(&[b"GET", CHECKPOINT.as_bytes()])?.unwrap_or_default())
    }

    /// Waits until the checkpoint says so of this many tables.
    pub fn wait_for_loads(&self, tables: usize) -> Outcome<()> {
        let mut redis = self.client.get_connection()?;
        self.wait_for("the loads", || {
            let entries: Vec<Vec<u8>> = redis::cmd("HVALS").arg(TABLES).query(&mut redis)?;
            let is_loaded = |entry: &Vec<u8>| {
                serde_json::from_slice(entry).is_ok_and(|entry: serde_json::Value| entry["state"] == "loaded")
            };
            Ok(entries.len() == tables && entries.iter().all(is_loaded))
        })
    }

    pub fn wait_for(&self, what: &str, mut done: impl FnMut() -> Outcome<bool>) -> Outcome<()> {
        let until = Instant::now() + PATIENCE;
        while !done()? {
            if Instant::now() > until {
                return Err(format!("{what} did not come to an end; the daemon says:\n{}", self.log()).into());
            }
            std::thread::sleep(LOOK_EVERY);
        }
        Ok(())
    }

    // ---- backlogs

    /// The slot `base` stays at the beginning; each contender gets a copy of it.
    pub fn prepare_backlog(&self, changes: u64, per: u64) -> Outcome<Backlog> {
        // The daemon brings Redis and its slot to the beginning of the backlog.
        let daemon = self.daemon(Way::Unix)?;
        self.wait_for_load()?;
        self.wait_until_idle()?;
        daemon.stop()?;
        self.sql("VACUUM items; CHECKPOINT")?;
        let checkpoint = self.checkpoint()?;
        self.drop_slot("base")?;
        self.sql("SELECT pg_copy_logical_replication_slot('prefetchd', 'base')")?;
        self.sql(&format!("SET synchronous_commit = off; CALL backlog({changes}, {per})"))?;
        let end = self.sql("CHECKPOINT; SELECT pg_current_wal_insert_lsn()")?;
        Ok(Backlog { mark: self.change_mark()?, end, checkpoint })
    }

    /// Returns the marker row's new value.
    pub fn change_mark(&self) -> Outcome<u64> {
        let change = format!("UPDATE items SET stock = stock + 1 WHERE id = {MARK} RETURNING stock");
        Ok(self.sql(&change)?.parse()?)
    }

    /// The marker row's value.
    pub fn mark(&self) -> Outcome<u64> {
        self.stock(MARK)
    }

    fn stock(&self, id: u64) -> Outcome<u64> {
        Ok(self.sql(&format!("SELECT stock FROM items WHERE id = {id}"))?.parse()?)
    }

    /// Waits until Redis has the row as it is in Postgres by now.
    pub fn wait_until_current(&self, id: u64) -> Outcome<()> {
        let (mut observer, stock) = (self.observer(Way::Unix)?, self.stock(id)?);
        self.wait_for("the stream", || Ok(observer.stock(id)? == Some(stock)))
    }

    /// # Errors
    /// Unless Redis has the row as it is in Postgres.
    pub fn row_is_current(&self, id: u64) -> Outcome<()> {
        let (ours, theirs) = (self.observer(Way::Unix)?.stock(id)?, self.stock(id)?);
        if ours == Some(theirs) { Ok(()) } else { Err(format!("row {id}: {ours:?} in Redis, not {theirs}").into()) }
    }

    /// Waits until Redis has everything from the stream.
    pub fn wait_until_idle(&self) -> Outcome<()> {
        self.wait_for_mark_of(self.change_mark()?)
    }

    pub fn wait_for_mark_of(&self, value: u64) -> Outcome<()> {
        let mut observer = self.observer(Way::Unix)?;
        self.wait_for("the stream", || Ok(observer.stock(MARK)? == Some(value)))
    }

    /// Restores the state before the backlog, for the daemon.
    pub fn restore(&self, backlog: &Backlog) -> Outcome<()> {
        self.copy_slot("prefetchd")?;
        self.ask::<()>(&[b"SET", CHECKPOINT.as_bytes(), &backlog.checkpoint])?;
        // It reappears once everything before it is there.
        self.ask::<()>(&[b"HSET", format!("{KEY}{MARK}").as_bytes(), b"stock", b"0"])
    }

    pub fn wait_for_mark(&self, backlog: &Backlog) -> Outcome<()> {
        self.wait_for_mark_of(backlog.mark)
    }

    /// Writes what Redis has to do for these changes to a file, as plain commands.
    pub fn write_commands(&self, changes: u64) -> Outcome<()> {
        let copy = format!("COPY (SELECT * FROM items WHERE id BETWEEN 1 AND {changes} ORDER BY id) TO STDOUT");
        self.pipeline(&copy, true, |mawk| run(Command::new("cat").stdin(mawk).stdout(File::create(self.commands())?)))
    }

    fn commands(&self) -> PathBuf {
        self.place.path().join("commands")
    }

    /// Runs `pg_recvlogical` to /dev/null and, with `beside`, concurrently `redis-cli --pipe` with prepared commands.
    /// The longer time counts.
    pub fn receive(&self, way: Way, backlog: &Backlog, beside: bool) -> Outcome<Duration> {
        self.copy_slot("yardstick")?;
        let started = Instant::now();
        let mut receiver = self.recvlogical(way, "/dev/null").args(["--endpos", &backlog.end]).spawn()?;
        if beside {
            run(redis_cli()
                .args(self.redis_args(way))
                .arg("--pipe")
                .stdin(File::open(self.commands())?)
                .stdout(Stdio::null()))?;
        }
        let received = receiver.wait()?;
        let elapsed = started.elapsed();
        if !received.success() {
            return Err("pg_recvlogical failed".into());
        }
        self.drop_slot("yardstick")?;
        Ok(elapsed)
    }

    fn recvlogical(&self, way: Way, file: &str) -> Command {
        let mut receiver = Command::new(servers::callable(&["pg_recvlogical"]));
        receiver
            .args(self.postgres_args(way))
            .args(["-S", "yardstick", "--start", "-o", "proto_version=1", "-o", "publication_names=prefetchd"])
            .args(["-f", file])
            .env("PGPASSWORD", servers::postgres_password());
        receiver
    }

    /// Starts `pg_recvlogical`, which follows the slot `yardstick` from now on. With `-` it prints to a pipe.
    pub fn receiver(&self, way: Way, file: &str) -> Outcome<Child> {
        self.drop_slot("yardstick")?;
        self.sql("SELECT pg_create_logical_replication_slot('yardstick', 'pgoutput')")?;
        Ok(self.recvlogical(way, file).stdout(Stdio::piped()).spawn()?)
    }

    /// Waits until the walsender of `yardstick` has sent everything that is committed by now.
    pub fn wait_until_sent(&self, asking: &mut Commits) -> Outcome<()> {
        let position = asking.position()?;
        // Once something after it has been read, everything before it has been sent.
        asking.change_mark()?;
        self.wait_for("the walsender", || asking.has_sent(&position))
    }

    fn copy_slot(&self, name: &str) -> Outcome<()> {
        self.drop_slot(name)?;
        self.sql(&format!("SELECT pg_copy_logical_replication_slot('base', '{name}')")).map(drop)
    }

    pub fn drop_slot(&self, name: &str) -> Outcome<()> {
        self.wait_until_inactive(name)?;
        let drop_it = "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = ";
        self.sql(&format!("{drop_it}'{name}'")).map(drop)
    }

    pub fn wait_until_inactive(&self, name: &str) -> Outcome<()> {
        self.wait_for("the end of a walsender", || {
            let active = "SELECT count(*) FROM pg_replication_slots WHERE active AND slot_name = ";
            Ok(self.sql(&format!("{active}'{name}'"))? == "0")
        })
    }

    // ---- the daemon

    pub fn daemon(&self, way: Way) -> Outcome<Daemon> {
        self.daemon_on(way, &self.redis_url(way), &format!("{KEY}{{id}}"), "")
    }

    pub fn redis_url(&self, way: Way) -> String {
        match way {
            Way::Unix => unix_url(&self.redis),
            Way::Tcp => self.redis.url(),
        }
    }

    /// `way` leads to Postgres; `redis` is a URL, `key` the template of the rows' keys, and `further` the rest of the table's
    /// configuration.
    pub fn daemon_on(&self, way: Way, redis: &str, key: &str, further: &str) -> Outcome<Daemon> {
        let table = format!("[[tables]]\nname = \"items\"\ntable = \"public.items\"\nkey = \"{key}\"\n{further}");
        self.daemon_of(way, redis, &table)
    }

    /// `tables` is their part of the configuration.
    pub fn daemon_of(&self, way: Way, redis: &str, tables: &str) -> Outcome<Daemon> {
        let postgres = match way {
            Way::Unix => {
                let (sockets, port, password) = (self.sockets(), self.postgres.port(), servers::postgres_password());
                let sockets = sockets.display();
                format!("host={sockets} port={port} user=postgres password={password} dbname=postgres")
            }
            Way::Tcp => self.postgres.url("postgres", "postgres"),
        };
        let http = SocketAddr::from((Ipv4Addr::LOCALHOST, servers::free_port()?));
        let file = self.config_file();
        std::fs::write(
            &file,
            format!(
                "[postgres]\nurl = \"{postgres}\"\n[redis]\nurl = \"{redis}\"\n[http]\nlisten = \"{http}\"\n{tables}"
            ),
        )?;
        let log = File::options().create(true).append(true).open(self.log_file())?;
        let mut guard = Command::new("/bin/sh")
            .args([Path::new("-c"), Path::new(GUARD), Path::new(env!("CARGO_BIN_EXE_prefetchd"))])
            .args([Path::new("run"), Path::new("-c"), &file])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()?;
        let mut pid = String::new();
        BufReader::new(guard.stdout.take().ok_or("no pipe")?).read_line(&mut pid)?;
        Ok(Daemon { guard, pid: pid.trim().parse()?, http })
    }

    /// Runs a command that asks the running daemon.
    ///
    /// # Errors
    /// If its exit code is not 0: `verify` has found differences, for example.
    pub fn cli(&self, command: &str) -> Outcome<()> {
        run(Command::new(env!("CARGO_BIN_EXE_prefetchd"))
            .arg("-c")
            .arg(self.config_file())
            .arg(command)
            .stdout(Stdio::null()))
    }

    fn config_file(&self) -> PathBuf {
        self.file("prefetchd.toml")
    }

    fn log_file(&self) -> PathBuf {
        self.place.path().join("prefetchd.log")
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.log_file()).unwrap_or_default()
    }

    // ---- latency

    pub fn observer(&self, way: Way) -> Outcome<Observer> {
        let client = match way {
            Way::Unix => self.client.clone(),
            Way::Tcp => redis::Client::open(self.redis.url())?,
        };
        Ok(Observer(client.get_connection()?))
    }

    pub fn commits(&self) -> Outcome<Commits> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let mut config = tokio_postgres::Config::new();
        config.host_path(self.sockets()).port(self.postgres.port()).user("postgres").dbname("postgres");
        config.password(servers::postgres_password());
        let client = runtime.block_on(async {
            let (client, connection) = config.connect(tokio_postgres::NoTls).await?;
            tokio::spawn(connection);
            Ok::<_, tokio_postgres::Error>(client)
        })?;
        let update = "UPDATE items SET stock = $2::int8::int4 WHERE id = $1::int8";
        let update = runtime.block_on(client.prepare(update))?;
        let position = runtime.block_on(client.prepare("SELECT pg_current_wal_insert_lsn()::text"))?;
        Ok(Commits { runtime, client, update, position })
    }
}

/// The daemon's parent. Ends it when our pipe closes, so that it does not outlive us however we end.
const GUARD: &str = r#"
trap '' HUP INT TERM
"$0" "$@" </dev/null >/dev/null &
echo $!
read -r line
kill $!
wait $!
"#;

/// A running daemon, which ends when this is dropped.
pub struct Daemon {
    guard: Child,
    pub pid: u32,
    pub http: SocketAddr,
}

impl Daemon {
    pub fn stop(mut self) -> Outcome<()> {
        drop(self.guard.stdin.take());
        let status = self.guard.wait()?;
        if status.success() { Ok(()) } else { Err(format!("the daemon ended with {status}").into()) }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        drop(self.guard.stdin.take());
        // Fails if it has exited.
        let _ = self.guard.wait();
    }
}

/// Polls Redis.
pub struct Observer(redis::Connection);

impl Observer {
    /// Returns `None` if the row does not exist.
    pub fn stock(&mut self, id: u64) -> Result<Option<u64>, String> {
        Ok(self.stocks([id])?[0])
    }

    /// The same of several rows, in one round trip.
    pub fn stocks(&mut self, ids: impl IntoIterator<Item = u64>) -> Result<Vec<Option<u64>>, String> {
        let mut pipeline = redis::pipe();
        for id in ids {
            pipeline.hget(format!("{KEY}{id}"), "stock");
        }
        pipeline.query(&mut self.0).map_err(|error| error.to_string())
    }
}

/// A connection to Postgres: commits one row at a time, or many.
pub struct Commits {
    runtime: tokio::runtime::Runtime,
    client: tokio_postgres::Client,
    update: tokio_postgres::Statement,
    position: tokio_postgres::Statement,
}

impl Commits {
    /// Returns once Postgres has reported the commit.
    pub fn set_stock(&mut self, id: u64, value: u64) -> Outcome<()> {
        let (id, value) = (i64::try_from(id)?, i64::try_from(value)?);
        self.runtime.block_on(self.client.execute(&self.update, &[&id, &value]))?;
        Ok(())
    }

    /// Updates so many rows, and last the marker row, in one transaction. Returns how long it took, from BEGIN to the answer
    /// to COMMIT.
    pub fn update_rows(&mut self, rows: u64) -> Outcome<Duration> {
        let started = Instant::now();
        let execute = |text: String| self.runtime.block_on(async { self.client.batch_execute(&text).await });
        execute("BEGIN".to_owned())?;
        execute(format!("UPDATE items SET stock = stock + 1 WHERE id BETWEEN 1 AND {rows}"))?;
        execute(format!("UPDATE items SET stock = stock + 1 WHERE id = {MARK}"))?;
        execute("COMMIT".to_owned())?;
        Ok(started.elapsed())
    }

    /// For reads that wait for what is committed by now.
    pub fn position(&mut self) -> Outcome<String> {
        let row = self.runtime.block_on(self.client.query_one(&self.position, &[]))?;
        Ok(row.try_get(0)?)
    }

    fn change_mark(&mut self) -> Outcome<()> {
        let change = format!("UPDATE items SET stock = stock + 1 WHERE id = {MARK}");
        Ok(self.runtime.block_on(self.client.batch_execute(&change))?)
    }

    fn has_sent(&mut self, position: &str) -> Outcome<bool> {
        let query = format!(
            "SELECT FROM pg_stat_replication r JOIN pg_replication_slots s ON s.active_pid = r.pid \
             WHERE s.slot_name = 'yardstick' AND r.sent_lsn > '{position}'"
        );
        Ok(!self.runtime.block_on(self.client.query(&query, &[]))?.is_empty())
    }
}

fn redis_cli() -> Command {
    let mut cli = Command::new(servers::callable(&["redis-cli", "valkey-cli"]));
    cli.env("REDISCLI_AUTH", servers::redis_password());
    cli
}

fn unix_url(redis: &servers::Redis) -> String {
    format!("unix://{}?pass={}", redis.socket().display(), servers::redis_password())
}

fn run(command: &mut Command) -> Outcome<()> {
    let status = command.status()?;
    if status.success() { Ok(()) } else { Err(format!("{:?} failed", command.get_program()).into()) }
}
