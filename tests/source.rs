//! The source layer with a real Postgres: logins, the stream, slots, publications, and how tables are read.
//!
//! Every test has a server of its own, because most of them change server settings: authentication, timeouts, how much
//! WAL is kept.

use bytes::Bytes;
use prefetchd::change::{Cell, Change, Delivery, NewRow, Nonce, OldRow, Row};
use prefetchd::checkpoint::SlotState;
use prefetchd::cli::servers;
use prefetchd::error::Disposition;
use prefetchd::loader::range::{Range, Sizes, Span, Tid, TidBound, ranges};
use prefetchd::lsn::{AppliedLsn, EndLsn, Lsn};
use prefetchd::progress::ledger::Ledger;
use prefetchd::schema::{QualifiedName, Relation, ReplicaIdentity};
use prefetchd::source::SourceError;
use prefetchd::source::connect::{self, PostgresClient};
use prefetchd::source::new_slot::{self, Blocker};
use prefetchd::source::slot;
use prefetchd::source::snapshot::{self, Access, Asked, CatalogTable, Part, ReadRange, ReadRows, TableKind, Wanted};
use prefetchd::source::stream::{self, Stream};
use prefetchd::source::target::PostgresTarget;
use prefetchd::source::wire::ReplicationConnection;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::PathBuf;
use std::time::{Duration, Instant};
use tokio::time::timeout;

pub const APPLICATION: &str = "prefetchd_test";
/// Anything that takes longer never ends.
const PATIENCE: Duration = Duration::from_secs(30);

/// A Postgres of the test's own.
pub struct Server {
    postgres: servers::Postgres,
    place: servers::Place,
}

impl Server {
    pub fn start(settings: &[(&str, &str)]) -> Self {
        let place = servers::Place::new("prefetchd-test-").unwrap();
        let usual = [("max_prepared_transactions", "5")];
        let settings: Vec<_> = usual.iter().chain(settings).copied().collect();
        let postgres = servers::Postgres::start_new(&place, &settings).unwrap_or_else(|error| panic!("{error}"));
        Server { postgres, place }
    }

    /// With this pg_hba.conf.
    pub fn guarded(hba: &str) -> Self {
        Self::start_guarded(&[], hba)
    }

    pub fn start_guarded(settings: &[(&str, &str)], hba: &str) -> Self {
        let mut server = Self::start(settings);
        std::fs::write(server.data().join("pg_hba.conf"), hba).unwrap();
        server.stop();
        server.start_again();
        server
    }

    pub fn sockets(&self) -> PathBuf {
        self.place.path().join("postgres")
    }

    pub fn data(&self) -> PathBuf {
        self.sockets().join("data")
    }

    pub fn port(&self) -> u16 {
        self.postgres.port()
    }

    pub fn log_end(&self) -> String {
        self.postgres.log_end()
    }

    /// Over TCP, for a role with the password of this test run.
    fn tcp(&self, user: &str, database: &str) -> PostgresTarget {
        target(&self.postgres.url(user, database))
    }

    /// Over the Unix socket.
    pub fn socket(&self, user: &str, database: &str) -> PostgresTarget {
        let (sockets, port) = (self.sockets(), self.postgres.port());
        let password = servers::postgres_password();
        target(&format!("host={} port={port} user={user} password={password} dbname={database}", sockets.display()))
    }

    async fn client(&self) -> PostgresClient {
        connect::connect(&self.tcp("postgres", "postgres"), APPLICATION).await.unwrap()
    }

    async fn replication(&self) -> ReplicationConnection {
        ReplicationConnection::connect(&self.tcp("postgres", "postgres"), APPLICATION).await.unwrap()
    }

    /// Stops it as `pg_ctl stop` does, and returns how long it took.
    pub fn stop(&mut self) -> Duration {
        let begun = Instant::now();
        self.postgres.stop(servers::Stop::Fast).unwrap();
        begun.elapsed()
    }

    pub fn start_again(&mut self) {
        self.postgres.start().unwrap_or_else(|error| panic!("{error}"));
    }
}

fn target(url: &str) -> PostgresTarget {
    PostgresTarget::parse(url, &HashMap::new()).unwrap()
}

fn name(schema: &str, table: &str) -> QualifiedName {
    QualifiedName { schema: schema.to_owned(), table: table.to_owned() }
}

pub async fn run(client: &PostgresClient, sql: &str) {
    client.batch_execute(sql).await.unwrap_or_else(|e| panic!("{sql}: {e:?}"));
}

pub async fn ask(client: &PostgresClient, sql: &str) -> String {
    let messages = client.simple_query(sql).await.unwrap_or_else(|e| panic!("{sql}: {e:?}"));
    let cell = messages.iter().find_map(|m| match m {
        tokio_postgres::SimpleQueryMessage::Row(row) => Some(row.get(0).unwrap_or("NULL").to_owned()),
        _ => None,
    });
    cell.unwrap_or_default()
}

/// Waits for the answer, without a limit on when it must come.
async fn until(client: &PostgresClient, sql: &str, wanted: &str) {
    let begun = Instant::now();
    loop {
        let got = ask(client, sql).await;
        if got == wanted {
            return;
        }
        assert!(begun.elapsed() < PATIENCE, "{sql}: {got} instead of {wanted}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn position(client: &PostgresClient) -> Lsn {
    ask(client, "SELECT pg_current_wal_insert_lsn()").await.parse().unwrap()
}

/// Returns every table, to be followed.
pub async fn tables(client: &PostgresClient) -> HashSet<QualifiedName> {
    let sql = "SELECT relnamespace::regnamespace::text, relname FROM pg_class
                WHERE relkind IN ('r', 'p') AND relnamespace::regnamespace::text NOT IN ('pg_catalog', 'information_schema')";
    let messages = client.simple_query(sql).await.unwrap();
    let table = |message: &_| match message {
        tokio_postgres::SimpleQueryMessage::Row(row) => {
            Some(name(row.get(0).unwrap().trim_matches('"'), row.get(1).unwrap()))
        }
        _ => None,
    };
    messages.iter().filter_map(table).collect()
}

/// Creates the slot. Everything that precedes it is visible, because nothing else runs here.
async fn make_slot(client: &PostgresClient, replication: &mut ReplicationConnection, name: &str) -> EndLsn {
    let temporary = new_slot::create_temporary(replication, name).await.unwrap();
    new_slot::name_slot(client, replication, &temporary, name).await.unwrap()
}

/// Creates the publication of all tables and the slot, and streams from its first position.
async fn follow(server: &Server) -> Stream {
    let client = server.client().await;
    run(&client, "CREATE PUBLICATION everything FOR ALL TABLES WITH (publish_via_partition_root = true)").await;
    let mut replication = server.replication().await;
    let from = make_slot(&client, &mut replication, "s").await;
    let copy = replication.start("s", "everything", from).await.unwrap();
    stream::spawn(copy, tables(&client).await)
}

/// Returns everything delivered up to the commit that ends at or after `end`.
async fn delivered(stream: &mut Stream, end: Lsn) -> Vec<Delivery> {
    let mut out = Vec::new();
    loop {
        let next = timeout(PATIENCE, stream.deliveries.recv()).await.expect("the stream goes on");
        let Some(next) = next else { panic!("{}", stream.ended().await) };
        for item in next.items {
            let at = match &item {
                Delivery::Commit { end, .. } | Delivery::Position(end) => Some(end.0),
                _ => None,
            };
            out.push(item);
            if at.is_some_and(|at| at >= end) {
                return out;
            }
        }
    }
}

fn text(cells: Vec<Option<&[u8]>>) -> Vec<Option<String>> {
    cells.into_iter().map(|cell| cell.map(|c| String::from_utf8(c.to_vec()).unwrap())).collect()
}

fn cells(row: &Row) -> Vec<Option<String>> {
    text(row.cells().collect())
}

fn some(cells: &[&str]) -> Vec<Option<String>> {
    cells.iter().map(|c| Some((*c).to_owned())).collect()
}

mod logins {
    use super::*;

    const PASSWORD: &str = "pa ss'wörd\\\"";

    async fn guarded() -> Server {
        let hba = "local all postgres trust\n\
                   local all clear password\nlocal all md5er md5\nlocal all scram scram-sha-256\n\
                   host all postgres 127.0.0.1/32 scram-sha-256\nhost all nobody 127.0.0.1/32 trust\n\
                   host all clear 127.0.0.1/32 password\nhost all md5er 127.0.0.1/32 md5\n\
                   host all scram 127.0.0.1/32 scram-sha-256\nhost all out 127.0.0.1/32 reject\n";
        let server = Server::guarded(hba);
        let client = connect::connect(&server.socket("postgres", "postgres"), APPLICATION).await.unwrap();
        let literal = PASSWORD.replace('\'', "''");
        run(
            &client,
            &format!(
                "CREATE ROLE clear LOGIN REPLICATION PASSWORD '{literal}';
                 SET password_encryption = md5; CREATE ROLE md5er LOGIN REPLICATION PASSWORD '{literal}';
                 SET password_encryption = 'scram-sha-256'; CREATE ROLE scram LOGIN REPLICATION PASSWORD '{literal}';
                 CREATE ROLE nobody LOGIN; CREATE ROLE out LOGIN REPLICATION"
            ),
        )
        .await;
        server
    }

    fn with_password(mut target: PostgresTarget, password: &str) -> PostgresTarget {
        target.password = prefetchd::password::Password::Literal(password.to_owned());
        target
    }

    /// Returns the errors of both kinds of connections.
    async fn refused(target: &PostgresTarget) -> [SourceError; 2] {
        let ordinary = connect::connect(target, APPLICATION).await.err().expect("no entry");
        let replication = ReplicationConnection::connect(target, APPLICATION).await.err().expect("no entry");
        [ordinary, replication]
    }

    #[tokio::test]
    async fn every_common_way_to_log_in_works_over_both_sockets() {
        let server = guarded().await;
        for user in ["postgres", "clear", "md5er", "scram"] {
            for target in [server.tcp(user, "postgres"), server.socket(user, "postgres")] {
                let target = if user == "postgres" { target } else { with_password(target, PASSWORD) };
                let client = connect::connect(&target, APPLICATION).await.unwrap_or_else(|e| panic!("{target:?}: {e}"));
                assert_eq!(ask(&client, "SELECT current_user").await, user);
                let replication = ReplicationConnection::connect(&target, APPLICATION).await;
                let mut replication = replication.unwrap_or_else(|e| panic!("{target:?}: {e}"));
                let identity = slot::identify(&mut replication).await.unwrap();
                assert_eq!((identity.timeline, identity.database.as_str()), (1, "postgres"));
                let pid = replication.backend_pid();
                let shown = format!("SELECT application_name FROM pg_stat_activity WHERE pid = {pid}");
                assert_eq!(ask(&server.client().await, &shown).await, APPLICATION);
            }
        }
    }

    #[tokio::test]
    async fn a_wrong_password_stops_and_is_not_shown() {
        let server = guarded().await;
        for user in ["clear", "md5er", "scram"] {
            for error in refused(&with_password(server.tcp(user, "postgres"), "hunter2")).await {
                assert_eq!(error.disposition(), Disposition::Stop, "{error}");
                let shown = format!("{error} {error:?}");
                assert!(!shown.contains("hunter2") && shown.contains("password_file"), "{shown}");
            }
            let mut without = server.socket(user, "postgres");
            without.password = prefetchd::password::Password::None;
            for error in refused(&without).await {
                assert!(matches!(error, SourceError::Login { .. }), "{error:?}");
                assert_eq!(error.disposition(), Disposition::Stop);
            }
        }
    }

    #[tokio::test]
    async fn what_a_person_must_change_stops_and_what_passes_does_not() {
        let mut server = guarded().await;
        for error in refused(&server.tcp("out", "postgres")).await {
            assert_eq!(error.disposition(), Disposition::Stop, "{error}");
        }
        for error in refused(&server.tcp("postgres", "nowhere")).await {
            assert_eq!(error.disposition(), Disposition::Stop, "{error}");
        }
        let target = server.tcp("nobody", "postgres");
        connect::connect(&target, APPLICATION).await.unwrap();
        let error = ReplicationConnection::connect(&target, APPLICATION).await.err().unwrap();
        assert_eq!(error.disposition(), Disposition::Stop);
        assert!(error.to_string().contains("REPLICATION"), "{error}");
        server.stop();
        for error in refused(&server.tcp("postgres", "postgres")).await {
            assert!(matches!(error, SourceError::Unreachable { .. }), "{error:?}");
            assert_eq!(error.disposition(), Disposition::Retry);
        }
        server.start_again();
    }
}

mod streaming {
    use super::*;

    #[tokio::test]
    async fn delivers_every_kind_of_change_in_order() {
        let server = Server::start(&[]);
        let client = server.client().await;
        run(
            &client,
            "CREATE TABLE public.t (id int PRIMARY KEY, v text, big text);
             ALTER TABLE public.t ALTER big SET STORAGE EXTERNAL;
             CREATE TABLE public.f (id int, v text); ALTER TABLE public.f REPLICA IDENTITY FULL",
        )
        .await;
        let mut stream = follow(&server).await;
        let nonce = Nonce([7; 16]);
        run(
            &client,
            "INSERT INTO public.t VALUES (1, 'a', repeat('x', 3000)), (2, NULL, '');
             UPDATE public.t SET v = 'b' WHERE id = 1;
             UPDATE public.t SET id = 3 WHERE id = 2;
             DELETE FROM public.t WHERE id = 3;
             INSERT INTO public.f VALUES (1, 'x'); DELETE FROM public.f;
             TRUNCATE public.t, public.f;
             SELECT pg_logical_emit_message(false, 'prefetchd', 'not a nonce');
             SELECT pg_logical_emit_message(true, 'other', '0123456789abcdef')",
        )
        .await;
        let end = snapshot::emit_marks(&client, &[nonce]).await.unwrap();
        let got = delivered(&mut stream, end).await;

        let mut relations: BTreeMap<u32, Relation> = BTreeMap::new();
        let mut seen = Vec::new();
        let mut open = false;
        for item in &got {
            match item {
                Delivery::Begin(_) => {
                    assert!(!open);
                    open = true;
                }
                Delivery::Commit { commit, end } => {
                    assert!(open && commit.0 < end.0);
                    open = false;
                }
                Delivery::Relation(relation) => {
                    assert!(open);
                    relations.insert(relation.oid, (**relation).clone());
                }
                Delivery::Change(change) => {
                    assert!(open);
                    let table = |oid: &u32| relations[oid].name.table.clone();
                    seen.push(match change {
                        Change::Insert { relation, new } => format!("+{} {:?}", table(relation), new.cell(0)),
                        Change::Update { relation, old, new } => {
                            let old = old.as_ref().map(|old| old.row().cell(0).unwrap().to_vec());
                            let (id, big) = match new {
                                NewRow::Full(row) => (row.cell(0).unwrap(), "full"),
                                NewRow::Partial(row) => match (row.cell(0), row.cell(2)) {
                                    (Cell::Text(id), Cell::Unchanged) => (id, "unchanged"),
                                    other => panic!("{other:?}"),
                                },
                            };
                            format!("{} {old:?} -> {id:?} {big}", table(relation))
                        }
                        Change::Delete { relation, old: OldRow::Key(old) } => {
                            format!("-{} {:?}", table(relation), cells(old))
                        }
                        Change::Delete { relation, old: OldRow::Full(old) } => {
                            format!("-{} {:?} in full", table(relation), cells(old))
                        }
                        Change::Foreign { .. } => panic!("every table is followed"),
                        Change::Truncate { relations } => {
                            format!("truncate {:?}", relations.iter().map(table).collect::<Vec<_>>())
                        }
                    });
                }
                Delivery::Mark(found) => assert!(open && *found == nonce),
                Delivery::Position(_) => assert!(!open),
            }
        }
        assert_eq!(got.iter().filter(|d| matches!(d, Delivery::Mark(_))).count(), 1, "only our own message is a mark");
        assert_eq!(
            seen,
            [
                "+t Some([49])",
                "+t Some([50])",
                "t None -> [49] unchanged",
                "t Some([50]) -> [51] full",
                "-t [Some(\"3\"), None, None]",
                "+f Some([49])",
                "-f [Some(\"1\"), Some(\"x\")] in full",
                "truncate [\"t\", \"f\"]",
            ]
        );
        stream.finish(None).await;
        until(&client, "SELECT count(*) FROM pg_stat_replication", "0").await;
    }

    #[tokio::test]
    async fn a_consumer_that_takes_nothing_ends_no_session() {
        // Long enough for a machine on which everything is slow.
        let server = Server::start(&[("wal_sender_timeout", "4s")]);
        let client = server.client().await;
        run(&client, "CREATE TABLE public.t (id int PRIMARY KEY, v text)").await;
        let mut stream = follow(&server).await;
        let pid = stream.backend_pid;
        // Far more than the channels and sockets can buffer.
        run(&client, "INSERT INTO public.t SELECT n, repeat('v', 1000) FROM generate_series(1, 60000) n").await;
        let end = position(&client).await;
        tokio::time::sleep(Duration::from_secs(9)).await;
        assert_eq!(ask(&client, "SELECT pid FROM pg_stat_replication").await, pid.to_string());
        let contact = *stream.contact.borrow();
        assert!(contact.received.is_none_or(|r| r.0.0 < end), "{contact:?}: the consumer was not blocked at all");
        let got = delivered(&mut stream, end).await;
        let rows = got.iter().filter(|d| matches!(d, Delivery::Change(Change::Insert { .. }))).count();
        assert_eq!(rows, 60_000);
        assert_eq!(ask(&client, "SELECT pid FROM pg_stat_replication").await, pid.to_string());
    }

    #[tokio::test]
    async fn an_idle_server_says_where_it_is_when_asked() {
        let server = Server::start(&[]);
        let client = server.client().await;
        run(&client, "CREATE TABLE public.t (id int PRIMARY KEY)").await;
        let mut stream = follow(&server).await;
        // Not published, and not part of any transaction that the stream would send.
        run(&client, "CREATE TEMP TABLE other AS SELECT 1").await;
        run(&client, "SELECT pg_logical_emit_message(true, 'other', '')").await;
        let at = snapshot::sample(&client, "s").await.unwrap().flushed.before_page_header(16 << 20);
        stream.feedback.send_modify(|f| f.pings += 1);
        delivered(&mut stream, at).await;
        let slot = snapshot::sample(&client, "s").await.unwrap().slot.unwrap();
        assert_eq!(slot.active_pid, Some(stream.backend_pid));
        assert!(slot.confirmed.is_some());
    }

    /// Returns what the daemon would confirm if Redis had all of this.
    async fn ledger(client: &PostgresClient, from: EndLsn, deliveries: &[Delivery]) -> Ledger {
        let mut ledger = Ledger::new(from);
        for delivery in deliveries {
            match delivery {
                Delivery::Begin(begin) => ledger.begin(*begin),
                Delivery::Commit { end, .. } => {
                    ledger.delivered(*end);
                    ledger.applied(AppliedLsn(*end));
                }
                _ => {}
            }
        }
        ledger.seen(&snapshot::sample(client, "s").await.unwrap().snapshot.parse().unwrap());
        ledger
    }

    async fn inserted(client: &PostgresClient, stream: &mut Stream, id: u32) -> Vec<Delivery> {
        run(client, &format!("INSERT INTO public.t VALUES ({id})")).await;
        let end = snapshot::emit_marks(client, &[Nonce([0; 16])]).await.unwrap();
        delivered(stream, end).await
    }

    fn ids(deliveries: &[Delivery]) -> Vec<String> {
        let id = |delivery: &Delivery| match delivery {
            Delivery::Change(Change::Insert { new, .. }) => cells(new)[0].clone(),
            _ => None,
        };
        deliveries.iter().filter_map(id).collect()
    }

    #[tokio::test]
    async fn what_is_confirmed_does_not_come_again_and_the_rest_does() {
        let server = Server::start(&[]);
        let client = server.client().await;
        run(&client, "CREATE TABLE public.t (id int PRIMARY KEY)").await;
        let mut stream = follow(&server).await;
        let SlotState::Ready { confirmed: from, .. } = slot::slot_state(&client, "s").await.unwrap() else { panic!() };
        let first = inserted(&client, &mut stream, 1).await;
        let confirmed = ledger(&client, from, &first).await.confirmed().unwrap();
        assert!(confirmed.end() > from);
        stream.feedback.send_modify(|f| f.confirmed = Some(confirmed));
        let position = "SELECT confirmed_flush_lsn FROM pg_replication_slots";
        until(&client, position, &confirmed.to_string()).await;

        assert_eq!(ids(&inserted(&client, &mut stream, 2).await), ["2"]);
        drop(stream);
        until(&client, "SELECT active FROM pg_replication_slots", "f").await;
        assert_eq!(ask(&client, position).await, confirmed.to_string());
        let copy = server.replication().await.start("s", "everything", confirmed.end()).await.unwrap();
        let mut stream = stream::spawn(copy, tables(&client).await);
        let again = inserted(&client, &mut stream, 3).await;
        assert_eq!(ids(&again), ["2", "3"]);

        // The final message of an orderly end is received.
        let confirmed = ledger(&client, confirmed.end(), &again).await.confirmed().unwrap();
        stream.finish(Some(confirmed)).await;
        until(&client, position, &confirmed.to_string()).await;
    }

    #[tokio::test]
    async fn a_dropped_stream_lets_the_server_stop() {
        let mut server = Server::start(&[]);
        let client = server.client().await;
        run(&client, "CREATE TABLE public.t (id int PRIMARY KEY, v text)").await;
        let stream = follow(&server).await;
        run(&client, "INSERT INTO public.t SELECT n, repeat('v', 1000) FROM generate_series(1, 60000) n").await;
        // Nothing confirms it, and the walsender would wait forever.
        drop(stream);
        until(&client, "SELECT count(*) FROM pg_stat_replication", "0").await;
        drop(client);
        assert!(server.stop() < Duration::from_secs(10));
    }

    #[tokio::test]
    async fn a_shutdown_is_told_from_a_failure() {
        let mut server = Server::start(&[]);
        let client = server.client().await;
        run(&client, "CREATE TABLE public.t (id int PRIMARY KEY)").await;
        let mut stream = follow(&server).await;
        let pid = stream.backend_pid;
        run(&client, &format!("SELECT pg_terminate_backend({pid})")).await;
        while stream.deliveries.recv().await.is_some() {}
        let error = stream.ended().await;
        assert_eq!(error.server().map(|e| e.code.as_str()), Some("57P01"), "{error:?}");
        assert_eq!(error.disposition(), Disposition::Retry);

        let replication = server.replication().await;
        let from = EndLsn("0/1".parse().unwrap());
        let mut stream =
            stream::spawn(replication.start("s", "everything", from).await.unwrap(), tables(&client).await);
        drop(client);
        let stopping = tokio::task::spawn_blocking(move || {
            server.stop();
            server
        });
        // When stopping, the walsender waits until everything it sent is flushed, and only then ends the session.
        // Nothing was confirmed here, so its connection must be closed.
        let ended = async {
            while stream.deliveries.recv().await.is_some() {}
            stream.ended().await
        };
        if let Ok(error) = timeout(Duration::from_secs(2), ended).await {
            assert!(matches!(error, SourceError::Shutdown { .. }), "{error:?}");
        }
        drop(stream);
        stopping.await.unwrap();
    }
}

mod slots {
    use super::*;

    async fn state(client: &PostgresClient, name: &str) -> Result<SlotState, SourceError> {
        slot::slot_state(client, name).await
    }

    fn unsuitable(state: Result<SlotState, SourceError>) -> String {
        let error = state.expect_err("unsuitable");
        assert!(matches!(error, SourceError::Unsuitable { .. }), "{error:?}");
        assert_eq!(error.disposition(), Disposition::Stop);
        error.to_string()
    }

    #[tokio::test]
    async fn the_server_tells_what_it_is() {
        let server = Server::start(&[("max_replication_slots", "3"), ("max_slot_wal_keep_size", "2GB")]);
        let client = server.client().await;
        run(&client, "ALTER SYSTEM SET synchronous_standby_names = 'ANY 1 (\"x\"\"y\", prefetchd_other)'").await;
        run(&client, "SELECT pg_reload_conf()").await;
        until(&client, "SELECT current_setting('synchronous_standby_names') <> ''", "t").await;
        let facts = slot::server_facts(&client).await.unwrap();
        assert!(facts.version_num >= 140_000 && !facts.in_recovery);
        assert_eq!(facts.wal_level, "logical");
        assert_eq!((facts.wal_segment_bytes, facts.slot_limit_bytes), (16 << 20, Some(2 << 30)));
        assert_eq!((facts.free_slots, facts.free_walsenders, facts.encoding.as_str()), (3, 10, "UTF8"));
        assert!(facts.names_as_synchronous_standby("Prefetchd_Other") && facts.names_as_synchronous_standby("x\"y"));
        assert!(!facts.names_as_synchronous_standby(APPLICATION));
    }

    #[tokio::test]
    async fn a_slot_is_absent_ready_active_and_lost() {
        let server = Server::start(&[]);
        let client = server.client().await;
        run(&client, "CREATE TABLE public.t (id int PRIMARY KEY); CREATE PUBLICATION p FOR TABLE public.t").await;
        assert_eq!(state(&client, "s").await.unwrap(), SlotState::Absent);
        slot::drop_slot(&client, "s").await.unwrap();

        let mut replication = server.replication().await;
        let before = slot::identify(&mut replication).await.unwrap();
        let temporary = new_slot::create_temporary(&mut replication, "s").await.unwrap();
        let seen = new_slot::exported_snapshot(&client, &temporary.snapshot_name).await.unwrap();
        assert_eq!(seen.split(':').count(), 3, "{seen}");
        assert_eq!(state(&client, "s").await.unwrap(), SlotState::Absent, "it has its name only when it is complete");
        let positions = "SELECT string_agg(confirmed_flush_lsn::text, ' ') FROM pg_replication_slots";
        let stands_at = ask(&client, positions).await;
        run(&client, "INSERT INTO public.t VALUES (1)").await;
        let confirmed = new_slot::name_slot(&client, &mut replication, &temporary, "s").await.unwrap();
        assert!(confirmed >= before.flushed);
        assert_eq!(confirmed.to_string(), stands_at, "the copy stands where the temporary one stood");
        assert_eq!(ask(&client, positions).await, stands_at, "which is gone");
        let ready = |active_pid| SlotState::Ready { confirmed, active_pid };
        assert_eq!(state(&client, "s").await.unwrap(), ready(None), "a session that only made it does not hold it");

        let pid = replication.backend_pid();
        let copy = replication.start("s", "p", confirmed).await.unwrap();
        let stream = stream::spawn(copy, tables(&client).await);
        assert_eq!(state(&client, "s").await.unwrap(), ready(Some(pid)));
        let error = server.replication().await.start("s", "p", confirmed).await.err().unwrap();
        assert!(matches!(error, SourceError::SlotInUse { pid: Some(holder), .. } if holder == pid), "{error:?}");
        let error = slot::drop_slot(&client, "s").await.unwrap_err();
        assert!(matches!(error, SourceError::SlotInUse { .. }), "{error:?}");
        assert!(!slot::terminate_walsender(&client, pid, "somebody").await.unwrap(), "not another program's");
        assert!(slot::terminate_walsender(&client, pid, APPLICATION).await.unwrap());
        until(&client, "SELECT active FROM pg_replication_slots WHERE slot_name = 's'", "f").await;
        drop(stream);

        // The snapshot ended with its session.
        let error = new_slot::exported_snapshot(&client, &temporary.snapshot_name).await.unwrap_err();
        assert_eq!(error.disposition(), Disposition::Retry, "{error}");
        let mut replication = server.replication().await;
        let temporary = new_slot::create_temporary(&mut replication, "s").await.unwrap();
        let error = new_slot::name_slot(&client, &mut replication, &temporary, "s").await.unwrap_err();
        assert!(matches!(error, SourceError::SlotInUse { .. }), "{error:?}");
        drop(replication);

        run(&client, "ALTER SYSTEM SET max_slot_wal_keep_size = '1MB'").await;
        run(&client, "SELECT pg_reload_conf()").await;
        for _ in 0..3 {
            run(&client, "INSERT INTO public.t SELECT coalesce(max(id), 0) + 1 FROM public.t; SELECT pg_switch_wal()")
                .await;
        }
        run(&client, "CHECKPOINT").await;
        let SlotState::Invalidated { reason } = state(&client, "s").await.unwrap() else { panic!("it has its WAL") };
        assert!(reason.contains("max_slot_wal_keep_size"), "{reason}");
        let error = server.replication().await.start("s", "p", confirmed).await.err().unwrap();
        assert_eq!(error.disposition(), Disposition::Reload, "{error}");
        // The rejected walsender releases it a moment later.
        until(&client, "SELECT active FROM pg_replication_slots WHERE slot_name = 's'", "f").await;
        slot::drop_slot(&client, "s").await.unwrap();
        assert_eq!(state(&client, "s").await.unwrap(), SlotState::Absent);
    }

    #[tokio::test]
    async fn a_slot_of_another_kind_is_refused_by_name() {
        let server = Server::start(&[]);
        let client = server.client().await;
        run(&client, "SELECT pg_create_physical_replication_slot('physical')").await;
        assert!(unsuitable(state(&client, "physical").await).contains("physical"));
        run(&client, "SELECT pg_create_logical_replication_slot('temporary', 'pgoutput', true)").await;
        assert!(unsuitable(state(&client, "temporary").await).contains("temporary"));
        run(&client, "SELECT pg_create_logical_replication_slot('two', 'pgoutput', false, true)").await;
        assert!(unsuitable(state(&client, "two").await).contains("two_phase"));
        run(&client, "CREATE DATABASE elsewhere").await;
        let elsewhere = connect::connect(&server.tcp("postgres", "elsewhere"), APPLICATION).await.unwrap();
        run(&elsewhere, "SELECT pg_create_logical_replication_slot('far', 'pgoutput')").await;
        assert!(unsuitable(state(&client, "far").await).contains("database elsewhere"));
        // It is part of the server, but not of every package.
        let made = client.batch_execute("SELECT pg_create_logical_replication_slot('plugin', 'test_decoding')").await;
        if made.is_ok() {
            assert!(unsuitable(state(&client, "plugin").await).contains("test_decoding"));
        }
        let mut replication = server.replication().await;
        let error = new_slot::create_temporary(&mut replication, "no such name").await.unwrap_err();
        assert!(matches!(error, SourceError::Unsuitable { .. }), "{error:?}");
        let since_17 = slot::server_facts(&client).await.unwrap().version_num >= 170_000;
        match new_slot::require_failover_slots(&mut replication).await {
            Ok(()) => assert!(since_17),
            Err(error) => assert!(!since_17 && error.to_string().contains("failover"), "{error}"),
        }
    }

    #[tokio::test]
    async fn a_slot_takes_two_for_a_moment() {
        let server = Server::start(&[("max_replication_slots", "1")]);
        let client = server.client().await;
        let mut replication = server.replication().await;
        let temporary = new_slot::create_temporary(&mut replication, "s").await.unwrap();
        let error = new_slot::name_slot(&client, &mut replication, &temporary, "s").await;
        let said = unsuitable(error.map(|_| SlotState::Absent));
        assert!(said.contains("takes two") && said.contains("raise max_replication_slots"), "{said}");
        let said = unsuitable(
            new_slot::create_temporary(&mut server.replication().await, "s").await.map(|_| SlotState::Absent),
        );
        assert!(said.contains("raise max_replication_slots"), "{said}");
        drop(replication);
        until(&client, "SELECT count(*) FROM pg_replication_slots", "0").await;
    }

    /// Since Postgres 17. A copy is none at first, and its maker may have died before it became one.
    #[tokio::test]
    async fn a_slot_becomes_one_that_standbys_keep() {
        let server = Server::start(&[]);
        let client = server.client().await;
        let mut replication = server.replication().await;
        make_slot(&client, &mut replication, "s").await;
        let since_17 = new_slot::require_failover_slots(&mut replication).await.is_ok();
        assert_eq!(new_slot::keep_on_standbys(&client, &mut replication, "s").await.unwrap(), since_17);
        assert!(!new_slot::keep_on_standbys(&client, &mut replication, "s").await.unwrap());
        if since_17 {
            assert_eq!(ask(&client, "SELECT failover FROM pg_replication_slots").await, "t");
        }
    }

    #[tokio::test]
    async fn creation_says_whom_it_waits_for() {
        let server = Server::start(&[]);
        let client = server.client().await;
        run(&client, "CREATE DATABASE elsewhere").await;
        let other = connect::connect(&server.tcp("postgres", "elsewhere"), "a long job").await.unwrap();
        run(&other, "BEGIN; SELECT pg_current_xact_id()").await;
        let preparing = connect::connect(&server.tcp("postgres", "postgres"), "preparer").await.unwrap();
        run(&preparing, "BEGIN; SELECT pg_current_xact_id(); PREPARE TRANSACTION 'it''s'").await;

        let mut replication = server.replication().await;
        let pid = replication.backend_pid();
        let creating =
            tokio::spawn(
                async move { new_slot::create_temporary(&mut replication, "s").await.map(|c| (c, replication)) },
            );
        let waits = format!("SELECT count(*) FROM pg_locks WHERE pid = {pid} AND NOT granted");
        until(&client, &waits, "1").await;
        assert_eq!(state(&client, "s").await.unwrap(), SlotState::Absent);
        let blockers = new_slot::slot_creation_blockers(&client, pid).await.unwrap();
        let other_pid: i32 = ask(&other, "SELECT pg_backend_pid()").await.parse().unwrap();
        let [Blocker::Session { pid, application, since: Some(_) }, Blocker::Prepared { gid, .. }] = &blockers[..]
        else {
            panic!("{blockers:?}")
        };
        assert_eq!((*pid, application.as_str(), gid.as_str()), (other_pid, "a long job", "it's"));

        run(&other, "ROLLBACK").await;
        let walsender = creating_pid(&client).await;
        let begun = Instant::now();
        loop {
            let blockers = new_slot::slot_creation_blockers(&client, walsender).await.unwrap();
            if let [Blocker::Prepared { .. }] = &blockers[..] {
                break;
            }
            assert!(begun.elapsed() < PATIENCE, "{blockers:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        run(&preparing, "ROLLBACK PREPARED 'it''s'").await;
        timeout(PATIENCE, creating).await.expect("nothing is in the way").unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_slot_that_somebody_is_making_by_hand_is_in_use() {
        let server = Server::start(&[]);
        let client = server.client().await;
        let other = server.client().await;
        run(&other, "BEGIN; SELECT pg_current_xact_id()").await;
        let by_hand = server.client().await;
        let making = tokio::spawn(async move {
            run(&by_hand, "SELECT pg_create_logical_replication_slot('s', 'pgoutput')").await;
        });
        until(&client, "SELECT count(*) FROM pg_replication_slots", "1").await;
        let error = state(&client, "s").await.unwrap_err();
        let pid = creating_pid(&client).await;
        assert!(matches!(error, SourceError::SlotInUse { pid: Some(holder), .. } if holder == pid), "{error:?}");
        assert_eq!(error.disposition(), Disposition::Retry);
        run(&other, "COMMIT").await;
        timeout(PATIENCE, making).await.expect("nothing is in the way").unwrap();
        assert!(matches!(state(&client, "s").await.unwrap(), SlotState::Ready { active_pid: None, .. }));
    }

    async fn creating_pid(client: &PostgresClient) -> i32 {
        ask(client, "SELECT active_pid FROM pg_replication_slots").await.parse().unwrap()
    }

    #[tokio::test]
    async fn creation_that_was_given_up_leaves_nothing_behind() {
        let server = Server::start(&[]);
        let client = server.client().await;
        let other = server.client().await;
        run(&other, "BEGIN; SELECT pg_current_xact_id()").await;
        let mut replication = server.replication().await;
        let creation = timeout(Duration::from_secs(1), new_slot::create_temporary(&mut replication, "s")).await;
        assert!(creation.is_err(), "the transaction is in the way");
        assert_ne!(ask(&client, "SELECT count(*) FROM pg_replication_slots").await, "0");
        drop(replication);
        // The transaction is still open.
        until(&client, "SELECT count(*) FROM pg_replication_slots", "0").await;
        run(&other, "COMMIT").await;
    }

    #[tokio::test]
    async fn a_promoted_server_tells_where_the_last_timeline_ended() {
        let mut server = Server::start(&[]);
        let mut replication = server.replication().await;
        assert_eq!(slot::timeline_history(&mut replication, 1).await.unwrap(), []);
        assert_eq!(slot::timeline_history(&mut replication, 9).await.unwrap(), [], "it knows no such timeline");
        let before = slot::identify(&mut replication).await.unwrap();
        drop(replication);
        server.stop();
        std::fs::write(server.data().join("standby.signal"), "").unwrap();
        server.start_again();
        let client = server.client().await;
        assert!(slot::server_facts(&client).await.unwrap().in_recovery);
        run(&client, "SELECT pg_promote()").await;
        until(&client, "SELECT pg_is_in_recovery()", "f").await;
        let mut replication = server.replication().await;
        let now = slot::identify(&mut replication).await.unwrap();
        assert_eq!((now.timeline, &now.system_id), (2, &before.system_id));
        let history = slot::timeline_history(&mut replication, now.timeline).await.unwrap();
        let [first] = history[..] else { panic!("{history:?}") };
        assert_eq!(first.timeline, 1);
        assert!(before.flushed.0 <= first.end && first.end <= now.flushed.0, "{first:?}");
    }
}

mod publications {
    use super::*;

    #[tokio::test]
    async fn coverage_is_what_postgres_sends() {
        let server = Server::start(&[]);
        let client = server.client().await;
        let is_14 = ask(&client, "SHOW server_version_num").await.starts_with("14");
        // Whole schemas are new in Postgres 15.
        let in_schema = if is_14 { "TABLE \"My Shop\".\"Or\"\"der\"" } else { "TABLES IN SCHEMA \"My Shop\"" };
        run(
            &client,
            &format!("CREATE SCHEMA \"My Shop\";
             CREATE TABLE public.plain (id int PRIMARY KEY); CREATE TABLE \"My Shop\".\"Or\"\"der\" (id int PRIMARY KEY);
             CREATE UNLOGGED TABLE public.unlogged (id int PRIMARY KEY);
             CREATE TABLE public.whole (id int PRIMARY KEY) PARTITION BY RANGE (id);
             CREATE TABLE public.part PARTITION OF public.whole FOR VALUES FROM (0) TO (10);
             CREATE PUBLICATION everything FOR ALL TABLES WITH (publish_via_partition_root = true);
             CREATE PUBLICATION in_schema FOR {in_schema};
             CREATE PUBLICATION parts FOR TABLE public.whole WITH (publish = 'insert, delete')"),
        )
        .await;
        let (plain, order) = (name("public", "plain"), name("My Shop", "Or\"der"));
        let (whole, part) = (name("public", "whole"), name("public", "part"));
        let get = async |name: &str| slot::publication(&client, name).await.unwrap();
        assert_eq!(get("nothing").await, None);
        let everything = get("everything").await.unwrap();
        assert!(everything.all_tables && everything.via_partition_root);
        assert!(everything.lacking_operations().is_empty());
        assert!([&plain, &order, &whole].into_iter().all(|t| everything.covers(t)));
        assert!(!everything.covers(&part) && !everything.covers(&name("public", "unlogged")));
        let in_schema = get("in_schema").await.unwrap();
        assert!(in_schema.covers(&order) && !in_schema.covers(&plain) && !in_schema.all_tables);
        let parts = get("parts").await.unwrap();
        assert!(parts.covers(&part) && !parts.covers(&whole));
        assert_eq!(parts.lacking_operations(), ["update", "truncate"]);

        let made = "it's \"ours\"";
        slot::create_publication(&client, made, &[order.clone(), whole.clone()]).await.unwrap();
        let ours = get(made).await.unwrap();
        assert!(ours.covers(&order) && ours.covers(&whole) && !ours.covers(&plain) && ours.via_partition_root);
        slot::add_table(&client, made, &plain).await.unwrap();
        assert!(get(made).await.unwrap().covers(&plain));
        for _ in 0..2 {
            slot::drop_publication(&client, made).await.unwrap();
            assert_eq!(get(made).await, None);
        }
    }

    #[tokio::test]
    async fn a_role_without_the_right_is_told_the_statement() {
        let server = Server::start(&[]);
        let client = server.client().await;
        let role = format!("CREATE ROLE reader LOGIN PASSWORD '{}'", servers::postgres_password());
        run(&client, &format!("{role}; CREATE TABLE public.t (id int PRIMARY KEY)")).await;
        let reader = connect::connect(&server.tcp("reader", "postgres"), APPLICATION).await.unwrap();
        let tables = [name("public", "t")];
        let error = slot::create_publication(&reader, "p", &tables).await.unwrap_err();
        assert_eq!(error.disposition(), Disposition::Stop);
        assert!(error.to_string().contains("CREATE PUBLICATION p FOR TABLE ONLY public.t "), "{error}");
        // The right to create is not enough.
        run(&client, "GRANT CREATE ON DATABASE postgres TO reader").await;
        let error = slot::create_publication(&reader, "p", &tables).await.unwrap_err();
        assert!(error.to_string().contains("owner"), "{error}");
        run(&client, "ALTER TABLE public.t OWNER TO reader").await;
        slot::create_publication(&reader, "p", &tables).await.unwrap();
    }

    #[tokio::test]
    async fn a_locked_table_is_not_waited_for_without_end() {
        let server = Server::start(&[]);
        let (client, other) = (server.client().await, server.client().await);
        run(&client, "CREATE TABLE public.t (id int PRIMARY KEY)").await;
        run(&other, "BEGIN; LOCK TABLE public.t IN SHARE MODE").await;
        let error = slot::create_publication(&client, "p", &[name("public", "t")]).await.unwrap_err();
        assert_eq!((error.disposition(), error.is_about_the_table()), (Disposition::Retry, true), "{error}");
        run(&other, "COMMIT").await;
        slot::create_publication(&client, "p", &[name("public", "t")]).await.unwrap();
    }
}

mod tables {
    use super::*;

    async fn describe(client: &PostgresClient, table: &QualifiedName) -> CatalogTable {
        snapshot::describe(client, table, "p", &[], Sizes::Measured).await.unwrap().expect("a table")
    }

    async fn range(
        client: &PostgresClient,
        table: &CatalogTable,
        range: &Range,
        bytes: usize,
    ) -> (Vec<Row>, Option<Range>) {
        let mut rows = Vec::new();
        let read = found(read(client, table, range, bytes, |row| rows.push(row)).await.unwrap()).expect("it is there");
        assert_eq!(read.filenode, table.leaves[range.leaf].filenode);
        assert_eq!(read.rows, rows.len() as u64);
        (rows, read.rest)
    }

    async fn read(
        client: &PostgresClient,
        table: &CatalogTable,
        range: &Range,
        bytes: usize,
        on_row: impl FnMut(Row),
    ) -> Result<ReadRange, SourceError> {
        snapshot::read_range(client, Part { table, range }, bytes, on_row).await
    }

    fn found(read: ReadRange) -> Option<ReadRows> {
        match read {
            ReadRange::Rows(read) => Some(read),
            ReadRange::Gone => None,
        }
    }

    /// Reads the whole table, in chunks of `pages` pages and `bytes` bytes.
    async fn whole(client: &PostgresClient, table: &CatalogTable, pages: u32, bytes: usize) -> Vec<Row> {
        let mut todo = ranges(&table.extent(), pages);
        todo.reverse();
        let mut rows = Vec::new();
        while let Some(next) = todo.pop() {
            let (found, rest) = range(client, table, &next, bytes).await;
            rows.extend(found);
            todo.extend(rest);
        }
        rows
    }

    fn columns(table: &CatalogTable) -> Vec<&str> {
        table.columns.iter().map(|c| c.name.as_str()).collect()
    }

    #[tokio::test]
    async fn an_awkward_table_is_read_as_the_stream_sends_it() {
        let server = Server::start(&[]);
        let client = server.client().await;
        run(
            &client,
            "CREATE SCHEMA \"My Shop\"; CREATE DOMAIN \"My Shop\".yes AS boolean; CREATE DOMAIN \"My Shop\".\"Yes2\" AS \"My Shop\".yes;
             CREATE TABLE \"My Shop\".\"T\"\"\" (
                gone int, \"Id\" int, double int GENERATED ALWAYS AS (\"Id\" * 2) STORED, \"a b\" text,
                ok \"My Shop\".\"Yes2\", plain boolean, also_gone text, PRIMARY KEY (\"Id\"));
             ALTER TABLE \"My Shop\".\"T\"\"\" DROP COLUMN gone, DROP COLUMN also_gone",
        )
        .await;
        let awkward = name("My Shop", "T\"");
        assert!(!describe(&client, &awkward).await.published.is_listed);
        let mut stream = follow(&server).await;
        run(&client, "CREATE PUBLICATION p FOR TABLE \"My Shop\".\"T\"\"\"").await;
        let table = describe(&client, &awkward).await;
        assert!(table.published.is_listed);
        assert_eq!((table.kind, table.identity), (TableKind::Table, ReplicaIdentity::Default));
        assert_eq!(columns(&table), ["Id", "a b", "ok", "plain"]);
        assert_eq!(table.identity_columns, ["Id"]);
        assert_eq!(table.columns.iter().map(|c| c.boolean).collect::<Vec<_>>(), [false, false, true, true]);
        let booleans = snapshot::boolean_types(&client).await.unwrap();
        assert!(table.columns.iter().all(|c| c.boolean == booleans.contains(&c.type_oid)));

        run(
            &client,
            r#"INSERT INTO "My Shop"."T""" ("Id", "a b", ok, plain) VALUES
                (1, E'a\tb\nc\\d\re\b\f\x0b', true, false), (2, NULL, NULL, NULL), (3, '', false, true),
                (4, '\N', NULL, true), (5, E'ü\u20ac\U0001F600', true, true), (6, repeat(E'x\t', 500000), true, true)"#,
        )
        .await;
        let end = snapshot::emit_marks(&client, &[Nonce([1; 16])]).await.unwrap();
        let streamed: Vec<Row> = rows_of(&delivered(&mut stream, end).await, &awkward);
        for (pages, bytes) in [(1000, usize::MAX), (1, 1), (1, usize::MAX), (1000, 100)] {
            assert_eq!(whole(&client, &table, pages, bytes).await, streamed, "{pages} pages, {bytes} bytes");
        }
        assert_eq!(cells(&streamed[0])[1].as_deref(), Some("a\tb\nc\\d\re\u{8}\u{c}\u{b}"));
        assert_eq!(cells(&streamed[1]), [Some("2".to_owned()), None, None, None]);
        let relation = relation_of(&server, &awkward).await;
        assert_eq!(table.relation(), relation, "what the catalog says is what the stream says");
    }

    /// Returns the relation as a new stream describes it.
    async fn relation_of(server: &Server, table: &QualifiedName) -> Relation {
        let client = server.client().await;
        let mut replication = server.replication().await;
        let from = make_slot(&client, &mut replication, "describing").await;
        let copy = replication.start("describing", "p", from).await.unwrap();
        let mut stream = stream::spawn(copy, [table.clone()].into());
        let quoted = format!("\"{}\".\"{}\"", table.schema, table.table.replace('"', "\"\""));
        run(&client, &format!("DELETE FROM {quoted}")).await;
        let end = position(&client).await;
        run(&client, "SELECT pg_logical_emit_message(true, 'flush', '')").await;
        let got = delivered(&mut stream, end).await;
        let found = got.iter().find_map(|d| match d {
            Delivery::Relation(relation) if relation.name == *table => Some((**relation).clone()),
            _ => None,
        });
        found.expect("a change was made")
    }

    fn rows_of(deliveries: &[Delivery], table: &QualifiedName) -> Vec<Row> {
        let mut oid = None;
        let mut rows = Vec::new();
        for delivery in deliveries {
            match delivery {
                Delivery::Relation(relation) if relation.name == *table => oid = Some(relation.oid),
                Delivery::Change(Change::Insert { relation, new }) if Some(*relation) == oid => rows.push(new.clone()),
                _ => {}
            }
        }
        rows
    }

    #[tokio::test]
    async fn copy_and_stream_write_every_value_alike() {
        let server = Server::start(&[]);
        let client = server.client().await;
        run(
            &client,
            "ALTER DATABASE postgres SET DateStyle = 'German'; ALTER DATABASE postgres SET TimeZone = 'Asia/Tokyo';
             ALTER ROLE postgres SET IntervalStyle = 'iso_8601'; ALTER ROLE postgres SET bytea_output = 'escape';
             ALTER ROLE postgres SET extra_float_digits = '-5'; ALTER ROLE postgres SET quote_all_identifiers = on;
             ALTER ROLE postgres SET search_path = 'public'",
        )
        .await;
        let client = server.client().await;
        run(
            &client,
            "CREATE TYPE public.\"Mood\" AS ENUM ('so so', 'good'); CREATE TYPE public.pair AS (a int, b text);
             CREATE TABLE public.pg_class_like (id int);
             CREATE TABLE public.t (id bigint PRIMARY KEY, f4 real, f8 double precision, n numeric, m money, b bytea,
                d date, ts timestamp, tz timestamptz, tt timetz, iv interval, u uuid, j json, jb jsonb, arr text[],
                ba boolean[], c char(5), mood public.\"Mood\", p public.pair, r int4range, mr int4multirange, ip inet,
                x xml, bits bit varying, cls regclass, ty regtype, pt point, tsv tsvector, o \"char\")",
        )
        .await;
        let mut stream = follow(&server).await;
        run(
            &client,
            r#"INSERT INTO public.t VALUES
                (1, 0.1, 0.1::float8 + 0.2, 1.10, 12.5, '\x00ff5c', '2024-02-29', '2024-02-29 13:14:15.123456',
                 '2024-02-29 13:14:15+09', '13:14:15+02', '1 year 2 days 03:04:05.6', 'A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11',
                 '{"a" :1}', '{"b":2, "a":1}', ARRAY['a b', NULL, 'q"x', E'\\'], ARRAY[true, NULL, false], 'ab', 'so so',
                 ROW(1, 'x y'), '[1,5)', '{[1,3),[5,7)}', '10.0.0.1/8', '<a>b</a>', B'101', 'public.pg_class_like'::regclass,
                 'timestamptz'::regtype, '(1,2)', 'a:1 b:2', 'z'),
                (-9223372036854775808, 'NaN', '-Infinity', 'NaN', -0.01, '', 'infinity', '-infinity', '0044-03-15 12:00:00+00 BC',
                 NULL, '-1 mon +2 days -03:00', NULL, 'null', 'null', '{}', '{}', '', 'good', ROW(NULL, ''), 'empty', '{}', '::1',
                 NULL, B'', 'pg_catalog.pg_class'::regclass, 'public."Mood"'::regtype, NULL, '', NULL)"#,
        )
        .await;
        let end = snapshot::emit_marks(&client, &[Nonce([1; 16])]).await.unwrap();
        let table = name("public", "t");
        let streamed = rows_of(&delivered(&mut stream, end).await, &table);
        let table = describe(&client, &table).await;
        let copied = whole(&client, &table, 1000, usize::MAX).await;
        assert_eq!(copied.len(), 2);
        for (copied, streamed) in copied.iter().zip(&streamed) {
            for ((column, copied), streamed) in table.columns.iter().zip(cells(copied)).zip(cells(streamed)) {
                assert_eq!(copied, streamed, "{}", column.name);
            }
        }
        let first = cells(&copied[0]);
        let at = |name: &str| first[table.columns.iter().position(|c| c.name == name).unwrap()].clone().unwrap();
        assert_eq!(at("f4"), "0.1");
        assert_eq!(at("f8"), "0.30000000000000004");
        assert_eq!(at("tz"), "2024-02-29 04:14:15+00");
        assert_eq!(at("iv"), "1 year 2 days 03:04:05.6");
        assert_eq!(at("b"), "\\x00ff5c");
        assert_eq!(at("cls"), "public.pg_class_like");
        assert_eq!(at("ba"), "{t,NULL,f}");
        assert_eq!(at("c"), "ab   ");

        // Also by key, one for each type that may be a key.
        for (key, value) in
            [("id", "1"), ("u", "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"), ("mood", "so so"), ("c", "ab   ")]
        {
            let mut found = Vec::new();
            let (key, values) = ([key.to_owned()], [vec![Bytes::from_static(value.as_bytes())]]);
            let read = snapshot::read_keys(&client, &table, &key, &values, Wanted::WholeRows, |r| found.push(r));
            read.await.unwrap();
            assert_eq!(found, copied[..1], "{key:?}");
        }
    }

    #[tokio::test]
    async fn partitions_filters_and_column_lists_are_read_as_published() {
        let server = Server::start(&[]);
        let client = server.client().await;
        run(
            &client,
            "CREATE TABLE public.whole (id int, region text, secret text, PRIMARY KEY (id, region)) PARTITION BY LIST (region);
             CREATE TABLE public.eu PARTITION OF public.whole FOR VALUES IN ('eu') PARTITION BY RANGE (id);
             CREATE TABLE public.eu1 PARTITION OF public.eu FOR VALUES FROM (0) TO (100);
             CREATE TABLE public.rest (secret text, junk int, region text NOT NULL, id int NOT NULL);
             ALTER TABLE public.rest DROP COLUMN junk; ALTER TABLE public.whole ATTACH PARTITION public.rest DEFAULT;
             CREATE PUBLICATION p FOR TABLE public.whole (id, region) WHERE (id <> 7 AND region <> 'x')
                WITH (publish_via_partition_root = true);
             INSERT INTO public.whole VALUES (1, 'eu', 's'), (7, 'eu', 's'), (2, 'us', 's'), (3, 'x', 's')",
        )
        .await;
        let table = describe(&client, &name("public", "whole")).await;
        assert_eq!((table.kind, columns(&table)), (TableKind::Partitioned, vec!["id", "region"]));
        assert_eq!(table.identity_columns, ["id", "region"]);
        assert_eq!(table.leaves.iter().map(|l| l.name.table.as_str()).collect::<Vec<_>>(), ["eu1", "rest"]);
        let rows = whole(&client, &table, 1, 1).await;
        assert_eq!(rows.iter().map(cells).collect::<Vec<_>>(), [some(&["1", "eu"]), some(&["2", "us"])]);

        let mut found = Vec::new();
        let key: Vec<String> = table.identity_columns.clone();
        let keys: Vec<Vec<Bytes>> = [("1", "eu"), ("7", "eu"), ("3", "x"), ("no number", "eu"), ("2", "us"), ("9", "")]
            .map(|(a, b)| vec![Bytes::from_static(a.as_bytes()), Bytes::from_static(b.as_bytes())])
            .to_vec();
        snapshot::read_keys(&client, &table, &key, &keys, Wanted::KeysOnly, |row| found.push(cells(&row)))
            .await
            .unwrap();
        found.sort();
        assert_eq!(found, [some(&["1", "eu"]), some(&["2", "us"])]);

        let error = snapshot::describe(&client, &name("public", "eu1"), "p", &[], Sizes::Measured).await.unwrap_err();
        assert!(error.to_string().contains("partition of public.whole"), "{error}");
        run(&client, "DROP PUBLICATION p; CREATE PUBLICATION p FOR TABLE public.whole").await;
        let error = snapshot::describe(&client, &name("public", "whole"), "p", &[], Sizes::Measured).await.unwrap_err();
        assert!(error.to_string().contains("publish_via_partition_root"), "{error}");
    }

    #[tokio::test]
    async fn rows_that_move_and_pages_that_empty_are_noticed_or_harmless() {
        let server = Server::start(&[("autovacuum", "off")]);
        let client = server.client().await;
        run(
            &client,
            "CREATE TABLE public.t (id int PRIMARY KEY, v text);
             INSERT INTO public.t SELECT n, repeat('v', 200) FROM generate_series(1, 2000) n;
             DELETE FROM public.t WHERE id % 3 = 0",
        )
        .await;
        run(&client, "VACUUM public.t").await;
        let table = describe(&client, &name("public", "t")).await;
        let ids = |rows: &[Row]| {
            rows.iter().map(|r| cells(r)[0].clone().unwrap().parse::<u32>().unwrap()).collect::<Vec<_>>()
        };
        let expected: Vec<u32> = (1..=2000).filter(|n| n % 3 != 0).collect();
        for (pages, bytes) in [(1, usize::MAX), (7, 1000), (1000, 10_000), (1000, usize::MAX)] {
            assert_eq!(ids(&whole(&client, &table, pages, bytes).await), expected, "{pages} pages, {bytes} bytes");
        }
        // The last range has no end, so it includes what was appended meanwhile.
        run(&client, "INSERT INTO public.t SELECT n, repeat('v', 200) FROM generate_series(2001, 3000) n").await;
        let last = ranges(&table.extent(), 10).pop().unwrap();
        assert_eq!(ids(&range(&client, &table, &last, usize::MAX).await.0).last(), Some(&3000));

        run(&client, "VACUUM FULL public.t").await;
        let moved = found(read(&client, &table, &last, usize::MAX, |_| {}).await.unwrap()).expect("it is there");
        assert_ne!(moved.filenode, table.leaves[0].filenode, "rows have moved, and the read says so");
        run(
            &client,
            "DROP TABLE public.t; CREATE TABLE public.t (id int PRIMARY KEY, v text); INSERT INTO public.t VALUES (1)",
        )
        .await;
        let gone = read(&client, &table, &last, usize::MAX, |_| panic!("of another table")).await.unwrap();
        assert_eq!(gone, ReadRange::Gone);
        let behind = Tid { block: 0, offset: 1 };
        assert!(matches!(last.span, Span::Places { from: TidBound::Page(page), .. } if page > behind.block));
    }

    #[tokio::test]
    async fn a_read_that_is_cut_short_leaves_a_session_that_works() {
        let server = Server::start(&[]);
        let client = server.client().await;
        run(
            &client,
            "CREATE TABLE public.t (id int PRIMARY KEY, v text);
             INSERT INTO public.t SELECT n, repeat('v', 1000) FROM generate_series(1, 100000) n",
        )
        .await;
        let table = describe(&client, &name("public", "t")).await;
        let all = Range::leaf(0);
        let begun = Instant::now();
        for bytes in [1, 1000, 100_000, 50_000_000] {
            let (rows, rest) = range(&client, &table, &all, bytes).await;
            let size: usize = rows.iter().map(Row::len_bytes).sum();
            assert!(size >= bytes && size < bytes + 2000, "{size} for {bytes}");
            let rest = rest.expect("there is more");
            let next = range(&client, &table, &rest, 1).await.0;
            assert_eq!(cells(&next[0])[0], Some((rows.len() + 1).to_string()), "it goes on right behind the last row");
            assert_eq!(ask(&client, "SELECT pg_current_xact_id_if_assigned() IS NULL").await, "t");
            until(&client, "SELECT count(*) FROM pg_locks WHERE relation = 'public.t'::regclass", "0").await;
        }
        assert!(begun.elapsed() < PATIENCE);
        assert_eq!(whole(&client, &table, u32::MAX, 30_000_000).await.len(), 100_000);
    }

    #[tokio::test]
    async fn what_cannot_be_read_says_so_with_its_remedy() {
        let server = Server::start(&[]);
        let client = server.client().await;
        let role = format!("CREATE ROLE \"the reader\" LOGIN PASSWORD '{}'", servers::postgres_password());
        run(&client, &role).await;
        run(
            &client,
            "CREATE TABLE public.t (id int PRIMARY KEY, v text);
             CREATE VIEW public.v AS SELECT * FROM public.t; CREATE UNLOGGED TABLE public.u (id int PRIMARY KEY);
             CREATE TABLE public.whole (id int PRIMARY KEY) PARTITION BY RANGE (id);
             CREATE TABLE public.part PARTITION OF public.whole FOR VALUES FROM (0) TO (9);
             CREATE TABLE public.safe (id int PRIMARY KEY); ALTER TABLE public.safe ENABLE ROW LEVEL SECURITY;
             GRANT SELECT ON public.whole, public.safe TO \"the reader\"",
        )
        .await;
        let mut target = server.tcp("postgres", "postgres");
        target.user = "the reader".to_owned();
        let reader = connect::connect(&target, APPLICATION).await.unwrap();
        let error = async |table: &str| {
            let error =
                snapshot::describe(&reader, &name("public", table), "p", &[], Sizes::Measured).await.unwrap_err();
            assert!(error.is_about_the_table() && matches!(error, SourceError::Unsuitable { .. }), "{error:?}");
            error.to_string()
        };
        assert!(error("t").await.contains("GRANT SELECT ON public.t TO \"the reader\";"));
        assert!(error("whole").await.contains("GRANT SELECT ON public.part TO \"the reader\";"));
        assert!(error("safe").await.contains("ALTER ROLE \"the reader\" BYPASSRLS"));
        assert!(error("v").await.contains("a view"));
        assert!(error("u").await.contains("SET LOGGED"));
        assert_eq!(
            snapshot::describe(&reader, &name("public", "nothing"), "p", &[], Sizes::Measured).await.unwrap(),
            None
        );
        run(&client, "GRANT SELECT ON public.t TO \"the reader\"").await;
        let table = describe(&reader, &name("public", "t")).await;
        // Somebody alters the table for longer than a read waits. Other sessions are not delayed by that.
        run(&client, "REVOKE SELECT ON public.t FROM \"the reader\"").await;
        let all = Range::leaf(0);
        let error = read(&reader, &table, &all, 1, |_| {}).await.unwrap_err();
        assert!(error.is_about_the_table(), "{error}");
        // The failed read has ended its transaction.
        assert_eq!(ask(&reader, "SELECT 1").await, "1");
    }

    #[tokio::test]
    async fn a_locked_table_fails_in_time_and_holds_up_no_reader() {
        let server = Server::start(&[]);
        let (client, other, third) = (server.client().await, server.client().await, server.client().await);
        run(&client, "CREATE TABLE public.t (id int PRIMARY KEY); INSERT INTO public.t VALUES (1)").await;
        let table = describe(&client, &name("public", "t")).await;
        run(&other, "BEGIN; LOCK TABLE public.t IN ACCESS EXCLUSIVE MODE").await;
        let all = Range::leaf(0);
        let error = read(&client, &table, &all, 1, |_| {}).await.unwrap_err();
        assert_eq!(error.server().map(|e| e.code.as_str()), Some("55P03"), "{error}");
        assert!(error.is_about_the_table());
        run(&other, "COMMIT").await;
        // While a read waits behind a writer's ALTER TABLE, it blocks nobody.
        run(&other, "BEGIN; LOCK TABLE public.t IN ACCESS EXCLUSIVE MODE").await;
        let waiting = tokio::spawn(async move {
            let mut rows = 0;
            read(&client, &table, &all, usize::MAX, |_| rows += 1).await.map(|_| rows)
        });
        until(&third, "SELECT count(*) FROM pg_locks WHERE NOT granted", "1").await;
        run(&other, "COMMIT").await;
        assert_eq!(timeout(PATIENCE, waiting).await.unwrap().unwrap().unwrap(), 1);
        run(&third, "SELECT * FROM public.t").await;
    }

    #[tokio::test]
    async fn tables_are_described_together_each_with_its_own_answer() {
        let server = Server::start(&[]);
        let (client, other) = (server.client().await, server.client().await);
        let tables = (0..40).map(|n| format!("CREATE TABLE public.t{n} (id int PRIMARY KEY, v{n} text);"));
        run(&client, &tables.collect::<String>()).await;
        run(
            &client,
            "CREATE VIEW public.v AS SELECT 1 AS id; INSERT INTO public.t7 SELECT n, 'x' FROM generate_series(1, 1000) n;
             CREATE TYPE public.mood AS ENUM ('good'); ALTER TABLE public.t8 ADD m public.mood, ADD ms public.mood[]",
        )
        .await;
        // Column lists and row filters came with Postgres 15.
        let filters = slot::server_facts(&client).await.unwrap().version_num >= 150_000;
        let t7 = if filters { "public.t7 (id) WHERE (id > 5)" } else { "public.t7" };
        run(&client, &format!("CREATE PUBLICATION p FOR TABLE {t7}, public.t8")).await;
        let mut names: Vec<QualifiedName> = (0..40).map(|n| name("public", &format!("t{n}"))).collect();
        names.extend([name("public", "v"), name("public", "nothing"), name("public", "t7")]);
        let asked: Vec<Asked<'_>> = names.iter().map(|name| Asked { name, chosen: &[] }).collect();
        let alone = async |sizes| {
            let mut out = Vec::new();
            for Asked { name, chosen } in &asked {
                out.push(snapshot::describe(&client, name, "p", chosen, sizes).await.map_err(|e| e.to_string()));
            }
            out
        };
        let together = async |sizes| {
            let described = snapshot::describe_all(&client, &asked, "p", sizes).await.unwrap();
            described.into_iter().map(|table| table.map_err(|e| e.to_string())).collect::<Vec<_>>()
        };
        for sizes in [Sizes::Measured, Sizes::Remembered] {
            assert_eq!(together(sizes).await, alone(sizes).await);
        }
        let described = together(Sizes::Measured).await;
        let table = |place: usize| described[place].as_ref().unwrap().as_ref().unwrap();
        let expected = if filters { (vec!["id"], Some("(id > 5)")) } else { (vec!["id", "v7"], None) };
        assert_eq!((columns(table(7)), table(7).published.row_filter.as_deref()), expected);
        assert_eq!((columns(table(8)), table(8).published.is_listed), (vec!["id", "v8", "m", "ms"], true));
        assert_ne!((&*table(8).columns[2].made_of, &*table(8).columns[1].made_of), ("", ""));
        assert_eq!((columns(table(9)), table(9).published.is_listed), (vec!["id", "v9"], false));
        assert!(described[40].as_ref().unwrap_err().contains("a view") && described[41] == Ok(None));
        assert_eq!(described[42], described[7]);

        // If one of them is locked, sizes are those of the last ANALYZE.
        run(&client, "DROP PUBLICATION p; ANALYZE public.t7").await;
        run(&other, "BEGIN; LOCK TABLE public.t8 IN ACCESS EXCLUSIVE MODE").await;
        let described = together(Sizes::Measured).await;
        let pages = |place: usize| described[place].as_ref().unwrap().as_ref().unwrap().leaves[0].pages;
        assert!(pages(7) > 1);
        assert_eq!(pages(8), 0);
    }

    #[tokio::test]
    async fn a_read_locks_no_partition_but_its_own() {
        let server = Server::start(&[]);
        let (client, other) = (server.client().await, server.client().await);
        run(
            &client,
            "CREATE TABLE public.whole (id int PRIMARY KEY) PARTITION BY RANGE (id);
             CREATE TABLE public.a PARTITION OF public.whole FOR VALUES FROM (0) TO (10);
             CREATE TABLE public.b PARTITION OF public.whole FOR VALUES FROM (10) TO (20);
             INSERT INTO public.whole SELECT generate_series(0, 19)",
        )
        .await;
        let table = describe(&client, &name("public", "whole")).await;
        let (a, b) = (Range::leaf(0), Range::leaf(1));
        run(&other, "BEGIN; LOCK TABLE public.b IN ACCESS EXCLUSIVE MODE").await;
        assert_eq!(range(&client, &table, &a, usize::MAX).await.0.len(), 10);
        let looked_at = snapshot::describe(&client, &table.name, "p", &[], Sizes::Remembered).await.unwrap();
        assert_eq!(looked_at.map(|table| table.leaves.len()), Some(2), "nor does a look wait for any of them");
        let both = [Part { table: &table, range: &a }, Part { table: &table, range: &b }];
        let error = snapshot::read_ranges(&client, &both, usize::MAX, |_, _| {}).await.unwrap_err();
        assert!(error.is_about_a_lock(), "of several, none is waited for: {error}");
        run(&other, "COMMIT").await;

        let mut rows = [0, 0];
        let whole = snapshot::read_ranges(&client, &both, usize::MAX, |place, _| rows[place] += 1).await.unwrap();
        assert_eq!((rows, whole.len()), ([10, 10], 2));
        let first = snapshot::read_ranges(&client, &both, 1, |_, _| {}).await.unwrap();
        assert!(
            matches!(&first[..], [ReadRange::Rows(ReadRows { rest: Some(_), .. })]),
            "what does not fit: {first:?}"
        );

        // The rows of a renamed partition are not lost, and a detached one is not read.
        for change in [
            "ALTER TABLE public.b RENAME TO c",
            "ALTER TABLE public.c RENAME TO b; ALTER TABLE public.whole DETACH PARTITION public.b",
            "DROP TABLE public.b; CREATE TABLE public.b PARTITION OF public.whole FOR VALUES FROM (10) TO (20)",
            "DROP TABLE public.b",
        ] {
            run(&client, change).await;
            let gone = read(&client, &table, &b, usize::MAX, |row| panic!("{row:?}")).await.unwrap();
            assert_eq!(gone, ReadRange::Gone, "{change}");
        }
        assert_eq!(range(&client, &table, &a, usize::MAX).await.0.len(), 10);
    }

    /// Opens a session with a role that may read these columns.
    async fn column_reader(server: &Server, client: &PostgresClient, grants: &str) -> PostgresClient {
        let role = format!("CREATE ROLE reader LOGIN PASSWORD '{}'", servers::postgres_password());
        run(client, &format!("{role}; {grants}")).await;
        connect::connect(&server.tcp("reader", "postgres"), APPLICATION).await.unwrap()
    }

    async fn chosen(client: &PostgresClient, table: &str, columns: &[&str]) -> CatalogTable {
        let columns: Vec<String> = columns.iter().map(|c| (*c).to_owned()).collect();
        let described = snapshot::describe(client, &name("public", table), "p", &columns, Sizes::Measured).await;
        described.unwrap().expect("a table")
    }

    /// Without the right to `ctid`, only the key can be used: every row once, whatever the key consists of.
    #[tokio::test]
    async fn columns_that_may_be_read_are_read_by_key() {
        let server = Server::start(&[]);
        let client = server.client().await;
        run(
            &client,
            r#"CREATE DOMAIN public.code AS varchar(40) CHECK (value <> '');
             CREATE TABLE public.t ("K 2" int, secret text, k1 public.code COLLATE "C", v text, PRIMARY KEY (k1, "K 2"));
             INSERT INTO public.t SELECT n, 'secret', (ARRAY['it''s', 'Ä', 'a\b', '"', 'z:z'])[1 + abs(n) % 5], md5(n::text)
               FROM generate_series(-2500, 2500) n;
             CREATE TYPE public.size AS ENUM ('small', 'large');
             CREATE TABLE public.whole (id int, s public.size, b bool, secret text, PRIMARY KEY (s, id, b))
               PARTITION BY HASH (id);
             CREATE TABLE public.w0 PARTITION OF public.whole FOR VALUES WITH (MODULUS 2, REMAINDER 0);
             CREATE TABLE public.w1 PARTITION OF public.whole FOR VALUES WITH (MODULUS 2, REMAINDER 1);
             INSERT INTO public.whole SELECT n, 'large', n % 3 = 0, 'secret' FROM generate_series(1, 3000) n;
             INSERT INTO public.whole SELECT n, 'small', true, 'secret' FROM generate_series(1, 3000) n"#,
        )
        .await;
        let grants = "GRANT SELECT (k1, \"K 2\", v) ON public.t TO reader;
             GRANT SELECT (id, s, b) ON public.whole, public.w0, public.w1 TO reader";
        let reader = column_reader(&server, &client, grants).await;
        for (table, columns) in [("t", &["k1", "K 2", "v"][..]), ("whole", &["id", "s", "b"])] {
            let by_key = chosen(&reader, table, columns).await;
            let by_place = chosen(&client, table, columns).await;
            assert_eq!((by_key.access, by_place.access), (Access::Columns, Access::Whole));
            assert_eq!(by_key.mark(), by_place.mark());
            let mut expected: Vec<_> = whole(&client, &by_place, 1000, usize::MAX).await.iter().map(cells).collect();
            expected.sort();
            assert!(expected.iter().all(|row| !row.contains(&Some("secret".to_owned()))), "it is not even read");
            for bytes in [1_000, 50_000, usize::MAX] {
                let mut found: Vec<_> = whole(&reader, &by_key, 7, bytes).await.iter().map(cells).collect();
                found.sort();
                assert_eq!(found, expected, "{table}, {bytes} bytes");
            }
            // Read once more without its remainder, a chunk returns the same rows.
            let mut first = ranges(&by_key.extent(), 1).swap_remove(0);
            let (rows, rest) = range(&reader, &by_key, &first, 20_000).await;
            first.without(&rest.expect("there is more"));
            let mut again = Vec::new();
            let mut todo = vec![Range { at_most_rows: None, ..first }];
            while let Some(next) = todo.pop() {
                let (rows, rest) = range(&reader, &by_key, &next, 7_000).await;
                again.extend(rows);
                todo.extend(rest);
            }
            assert_eq!(again, rows);
        }
    }

    /// A SELECT has its snapshot before it has its lock: what a rewrite in between hides must not be missed.
    #[tokio::test]
    async fn a_rewrite_between_snapshot_and_lock_hides_no_rows() {
        let server = Server::start(&[]);
        let (client, other) = (server.client().await, server.client().await);
        run(
            &client,
            "CREATE TABLE public.t (id int PRIMARY KEY, v text, secret text);
             INSERT INTO public.t SELECT n, 'v', 's' FROM generate_series(1, 100) n",
        )
        .await;
        let reader = column_reader(&server, &client, "GRANT SELECT (id, v) ON public.t TO reader").await;
        for rewrite in [
            "ALTER TABLE public.t ALTER v TYPE text USING v || 'w'",
            "CREATE TABLE public.u (LIKE public.t INCLUDING ALL); INSERT INTO public.u SELECT * FROM public.t;
             GRANT SELECT (id, v) ON public.u TO reader;
             DROP TABLE public.t; ALTER TABLE public.u RENAME TO t",
        ] {
            let table = chosen(&reader, "t", &["id", "v"]).await;
            run(&other, &format!("BEGIN; LOCK TABLE public.t IN ACCESS EXCLUSIVE MODE; {rewrite}")).await;
            let all = ranges(&table.extent(), 1).swap_remove(0);
            let keys = [vec![Bytes::from_static(b"7")]];
            let read = async {
                let read = found(read(&reader, &table, &all, usize::MAX, |_| {}).await.unwrap());
                let mut by_key = 0;
                let key = ["id".to_owned()];
                snapshot::read_keys(&reader, &table, &key, &keys, Wanted::WholeRows, |_| by_key += 1).await.unwrap();
                (read, by_key)
            };
            let commit = async {
                until(&client, "SELECT count(*) FROM pg_locks WHERE NOT granted", "1").await;
                run(&other, "COMMIT").await;
            };
            let ((read, by_key), ()) = tokio::join!(read, commit);
            let described = table.leaves[0].filenode;
            assert!(read.as_ref().is_none_or(|r| r.filenode != described), "{rewrite}: it is known to be another file");
            // No row was requested of a table that only has the same name.
            let same_table = !rewrite.contains("DROP");
            assert_eq!((read.map(|r| r.rows), by_key), (same_table.then_some(100), 1), "{rewrite}");
        }
    }
}
