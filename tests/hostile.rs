//! Untrusted parties: servers that want a login without proving anything or send more than memory holds, and a role
//! that may do nothing but write to the WAL.
//!
//! The servers here are attackers, and implement only as much of a protocol as the attack needs.

use crate::harness::{Daemon, Postgres, Redis, Settings, eventually};
use crate::source::APPLICATION;
use crate::source_tls::{self, self_signed};
use prefetchd::source::SourceError;
use prefetchd::source::connect;
use prefetchd::source::target::PostgresTarget;
use prefetchd::source::wire::ReplicationConnection;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

mod postgres {
    use super::*;

    fn message(tag: u8, body: &[u8]) -> Vec<u8> {
        let length = u32::try_from(body.len() + 4).unwrap();
        [&[tag], &length.to_be_bytes()[..], body].concat()
    }

    fn authentication(kind: u32, rest: &[u8]) -> Vec<u8> {
        message(b'R', &[&kind.to_be_bytes()[..], rest].concat())
    }

    fn let_in() -> Vec<u8> {
        authentication(0, b"")
    }

    fn wants_password() -> Vec<u8> {
        authentication(3, b"")
    }

    fn wants_md5() -> Vec<u8> {
        authentication(5, b"salt")
    }

    fn scram(mechanisms: &str) -> Vec<u8> {
        authentication(10, mechanisms.as_bytes())
    }

    const PLAIN: &str = "SCRAM-SHA-256\0\0";
    const PLUS: &str = "SCRAM-SHA-256-PLUS\0SCRAM-SHA-256\0\0";

    fn proof_of_the_server() -> Vec<u8> {
        authentication(12, b"v=AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=")
    }

    fn parameter() -> Vec<u8> {
        message(b'S', b"server_version\x0015.0\0")
    }

    fn process() -> Vec<u8> {
        message(b'K', b"\0\0\0\x07\0\0\0\x07")
    }

    fn ready() -> Vec<u8> {
        message(b'Z', b"I")
    }

    fn notice() -> Vec<u8> {
        message(b'N', b"SNOTICE\0Mhello\0\0")
    }

    /// What an attacker does with a connection after the startup message.
    #[derive(Clone)]
    enum Act {
        Say(Vec<u8>),
        /// Accepts the beginning of SCRAM, and sends a challenge for any password.
        Challenge,
        /// Reads one message.
        Listen,
        /// Sends this over and over again.
        Flood(Vec<u8>),
    }
    use Act::{Challenge, Flood, Listen, Say};

    /// How the connection begins.
    #[derive(Clone)]
    enum Opening {
        Plain,
        Tls(TlsAcceptor),
        /// Answers the request for TLS with this, and continues in clear text.
        Says(Vec<u8>),
    }

    /// No flood lasts longer: whoever has read this much has read too much.
    const FLOOD_BYTES: usize = 400 << 20;

    struct Attacker {
        port: u16,
        heard: Arc<std::sync::Mutex<Vec<u8>>>,
        flooded: Arc<AtomicUsize>,
    }

    impl Attacker {
        async fn new(opening: Opening, acts: Vec<Act>) -> Self {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let attacker = Attacker {
                port: listener.local_addr().unwrap().port(),
                heard: Arc::default(),
                flooded: Arc::default(),
            };
            let (heard, flooded) = (attacker.heard.clone(), attacker.flooded.clone());
            tokio::spawn(async move {
                while let Ok((mut socket, _)) = listener.accept().await {
                    let (opening, acts) = (opening.clone(), acts.clone());
                    let (heard, flooded) = (heard.clone(), flooded.clone());
                    tokio::spawn(async move {
                        if !matches!(opening, Opening::Plain) {
                            socket.read_exact(&mut [0; 8]).await?;
                        }
                        match opening {
                            Opening::Plain => attack(socket, acts, &heard, &flooded).await,
                            Opening::Tls(acceptor) => {
                                socket.write_all(b"S").await?;
                                attack(acceptor.accept(socket).await?, acts, &heard, &flooded).await
                            }
                            Opening::Says(answer) => {
                                socket.write_all(&answer).await?;
                                attack(socket, acts, &heard, &flooded).await
                            }
                        }
                    });
                }
            });
            attacker
        }

        fn target(&self, options: &str) -> PostgresTarget {
            let url = format!("postgres://somebody:hunter2@127.0.0.1:{}/shop?connect_timeout=15&{options}", self.port);
            PostgresTarget::parse(&url, &HashMap::new()).unwrap()
        }

        /// Why either kind of connection fails, other than by a timeout.
        async fn refused(&self, options: &str) -> [String; 2] {
            let target = self.target(options);
            let ordinary = connect::connect(&target, APPLICATION).await.err();
            let replication = ReplicationConnection::connect(&target, APPLICATION).await.err();
            [ordinary, replication].map(|error| {
                let error = error.expect("nobody is let in");
                assert!(!matches!(error, SourceError::Silent { .. }), "{options}: went on, until {error}");
                error.to_string()
            })
        }
    }

    async fn heard<S: AsyncRead + Unpin>(
        socket: &mut S,
        heard: &std::sync::Mutex<Vec<u8>>,
    ) -> std::io::Result<Vec<u8>> {
        let _tag = socket.read_u8().await?;
        let length = socket.read_u32().await?;
        let mut body = vec![0; length as usize - 4];
        socket.read_exact(&mut body).await?;
        heard.lock().unwrap().extend_from_slice(&body);
        Ok(body)
    }

    async fn attack<S: AsyncRead + AsyncWrite + Unpin>(
        mut socket: S,
        acts: Vec<Act>,
        words: &std::sync::Mutex<Vec<u8>>,
        flooded: &AtomicUsize,
    ) -> std::io::Result<()> {
        let length = socket.read_u32().await?;
        socket.read_exact(&mut vec![0; length as usize - 4]).await?;
        for act in acts {
            match act {
                Say(bytes) => socket.write_all(&bytes).await?,
                Listen => drop(heard(&mut socket, words).await?),
                Challenge => {
                    let first = String::from_utf8_lossy(&heard(&mut socket, words).await?).into_owned();
                    let nonce = first.rsplit_once("r=").unwrap().1;
                    let challenge = format!("r={nonce}x,s=c2FsdHNhbHQ=,i=4096");
                    socket.write_all(&authentication(11, challenge.as_bytes())).await?;
                    heard(&mut socket, words).await?;
                }
                Flood(bytes) => {
                    let piece = bytes.repeat((64 << 10) / bytes.len() + 1);
                    while flooded.load(Ordering::Relaxed) < FLOOD_BYTES {
                        socket.write_all(&piece).await?;
                        flooded.fetch_add(piece.len(), Ordering::Relaxed);
                    }
                }
            }
            socket.flush().await?;
        }
        loop {
            let byte = socket.read_u8().await?;
            words.lock().unwrap().push(byte);
        }
    }

    fn tls() -> Opening {
        Opening::Tls(TlsAcceptor::from(Arc::new(source_tls::shown(&self_signed(&["localhost"])))))
    }

    #[tokio::test]
    async fn nothing_but_a_bound_login_is_one_where_that_is_required() {
        let unbound = "does not bind the login";
        for (acts, why) in [
            (vec![Say(ready())], ""),
            (vec![Say([process(), ready()].concat())], ""),
            (vec![Say([parameter(), ready()].concat())], ""),
            (vec![Say([let_in(), ready()].concat())], unbound),
            (vec![Say(wants_password())], unbound),
            (vec![Say(wants_md5())], unbound),
            (vec![Say(scram(PLAIN))], unbound),
            (vec![Say(scram(PLUS)), Listen, Say([let_in(), ready()].concat())], ""),
            (vec![Say(scram(PLUS)), Listen, Say(ready())], ""),
            (vec![Say(scram(PLUS)), Challenge, Say([let_in(), ready()].concat())], ""),
            (vec![Say(scram(PLUS)), Challenge, Say(ready())], ""),
            (vec![Say(scram(PLUS)), Challenge, Say([proof_of_the_server(), let_in(), ready()].concat())], ""),
            (vec![Say(scram(PLUS)), Listen, Say(wants_password())], ""),
        ] {
            let attacker = Attacker::new(tls(), acts).await;
            for error in attacker.refused("sslmode=require&channel_binding=require").await {
                assert!(error.contains(why), "{error} instead of {why}");
            }
            let heard = String::from_utf8_lossy(&attacker.heard.lock().unwrap()).into_owned();
            assert!(!heard.contains("hunter2") && !heard.contains("md5"), "{heard:?}");
        }
    }

    #[tokio::test]
    async fn a_message_out_of_turn_ends_every_login() {
        let negotiation = message(b'v', b"\0\x03\0\0\0\0\0\0");
        for acts in [
            vec![Say(ready())],
            vec![Say([process(), ready()].concat())],
            vec![Say([parameter(), let_in(), ready()].concat())],
            vec![Say([notice(), let_in(), ready()].concat())],
            vec![Say([negotiation, let_in(), ready()].concat())],
            vec![Say([let_in(), let_in(), ready()].concat())],
            vec![Say([let_in(), wants_password()].concat())],
            vec![Say(wants_password()), Listen, Say(ready())],
            vec![Say(wants_password()), Listen, Say([parameter(), let_in(), ready()].concat())],
            vec![Say(wants_password()), Listen, Say(wants_password())],
            vec![Say(wants_md5()), Listen, Say(wants_password())],
            vec![Say(wants_md5()), Listen, Say(ready())],
            vec![Say(scram(PLAIN)), Listen, Say([let_in(), ready()].concat())],
            vec![Say(scram(PLAIN)), Listen, Say(scram(PLAIN))],
            vec![Say(scram(PLAIN)), Listen, Say(wants_password())],
            vec![Say(scram(PLAIN)), Listen, Say(proof_of_the_server())],
            vec![Say(scram(PLAIN)), Challenge, Say([let_in(), ready()].concat())],
            vec![Say(scram(PLAIN)), Challenge, Say(wants_password())],
            vec![Say(scram(PLAIN)), Challenge, Say([proof_of_the_server(), let_in(), ready()].concat())],
            vec![Say(authentication(11, b"r=x,s=c2FsdA==,i=1"))],
            vec![Say(proof_of_the_server())],
            vec![Say([let_in(), proof_of_the_server(), ready()].concat())],
        ] {
            Attacker::new(Opening::Plain, acts).await.refused("sslmode=disable").await;
        }
    }

    #[tokio::test]
    async fn what_comes_in_the_clear_before_tls_counts_for_nothing() {
        let error = message(b'E', b"SFATAL\0C28000\0Mcall 555 and tell your password\0\0");
        for (answer, acts) in [
            ([b"S".to_vec(), let_in(), ready()].concat(), Vec::new()),
            (b"N".to_vec(), vec![Say([let_in(), ready()].concat())]),
            (b"X".to_vec(), vec![Say([let_in(), ready()].concat())]),
            (error, Vec::new()),
        ] {
            let attacker = Attacker::new(Opening::Says(answer), acts).await;
            for error in attacker.refused("sslmode=require").await {
                assert!(!error.contains("call 555"), "{error}");
            }
        }
    }

    /// Enough for what is in transit, and for what may be buffered.
    const TAKEN_BYTES: usize = 100 << 20;

    #[tokio::test]
    async fn a_server_that_never_ends_is_left() {
        let claim = |tag: u8| [&[tag], &(i32::MAX - 1).to_be_bytes()[..], &[0; 59]].concat();
        let admitted = || Say([let_in(), process(), ready()].concat());
        let row = message(b'D', b"\0\x01\0\0\0\x01x");
        for acts in [
            vec![Flood(claim(b'R'))],
            vec![Flood(claim(b'E'))],
            vec![Say(let_in()), Flood(parameter())],
            vec![Say(let_in()), Flood(claim(b'S'))],
            vec![Say(let_in()), Flood(notice())],
            vec![admitted(), Listen, Flood(row)],
            vec![admitted(), Listen, Flood(claim(b'D'))],
            vec![admitted(), Listen, Flood(claim(b'd'))],
            vec![admitted(), Listen, Flood(claim(b'C'))],
        ] {
            let attacker = Attacker::new(Opening::Plain, acts).await;
            attacker.refused("sslmode=disable").await;
            let taken = attacker.flooded.load(Ordering::Relaxed);
            assert!(taken < 2 * TAKEN_BYTES, "{taken} bytes by three connections");
        }
    }
}

/// The most memory that a daemon may use, whatever others write.
const MOST_BYTES: u64 = 100 << 20;

#[tokio::test]
async fn what_others_write_into_the_wal_costs_no_memory() {
    let (postgres, redis) = (Postgres::own(&[]), Redis::start());
    let role = format!("nobody_{}", postgres.database());
    let made = format!(
        "CREATE TABLE t (id int PRIMARY KEY, v text); GRANT SELECT ON t TO prefetchd;
         CREATE TABLE theirs (id int PRIMARY KEY, v text); CREATE ROLE {role} LOGIN; GRANT ALL ON theirs TO {role};
         CREATE PUBLICATION everything FOR ALL TABLES"
    );
    postgres.execute(&made).await;
    let settings = Settings::new(&postgres, &redis)
        .text("postgres.publication", "everything")
        .tables("[[tables]]\nname = 't'\ntable = 'public.t'\nkey = 't:{id}'");
    let daemon = Daemon::with(&settings).await;
    daemon.ready().await;
    let pid = "SELECT pid::text FROM pg_stat_replication";
    let walsender = postgres.value(pid).await;
    for (id, attack) in [
        "SELECT pg_logical_emit_message(true, 'outbox', repeat('x', 300000000))",
        "SELECT pg_logical_emit_message(false, 'outbox', repeat('x', 300000000))",
        // Only the prefix is this daemon's own.
        "SELECT pg_logical_emit_message(true, 'prefetchd', repeat('x', 300000000))",
        "INSERT INTO theirs VALUES (1, 'small'), (2, repeat('x', 300000000))",
        "UPDATE theirs SET id = 3 WHERE id = 2",
    ]
    .iter()
    .enumerate()
    {
        postgres.execute(&format!("SET SESSION AUTHORIZATION {role}; {attack}; RESET SESSION AUTHORIZATION")).await;
        postgres.execute(&format!("INSERT INTO t VALUES ({id}, 'ours')")).await;
        eventually(attack, async || redis.hash(&format!("t:{id}")).await.len(), |fields| *fields == 2).await;
        let peak = daemon.peak_memory_bytes();
        assert!(peak < MOST_BYTES, "{attack}: {} MB", peak >> 20);
    }
    assert_eq!(postgres.value(pid).await, walsender, "one session all the time");
    daemon.stop().await;
}

mod redis {
    use prefetchd::resp::batch::OwnKeys;
    use prefetchd::sink::SinkError;
    use prefetchd::sink::connect::RedisTarget;
    use prefetchd::sink::reader::Reader;
    use prefetchd::sink::writer::Writer;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    /// A server that sends `head` in response to anything, then `tail` forever.
    async fn flood(head: String, tail: &'static str) -> (String, Arc<AtomicUsize>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let flooded = Arc::new(AtomicUsize::new(0));
        let sent = flooded.clone();
        tokio::spawn(async move {
            while let Ok((mut socket, _)) = listener.accept().await {
                let (sent, head) = (sent.clone(), head.clone());
                tokio::spawn(async move {
                    socket.read_u8().await?;
                    socket.write_all(head.as_bytes()).await?;
                    let piece = tail.repeat((64 << 10) / tail.len());
                    while sent.load(Ordering::Relaxed) < 1 << 30 {
                        socket.write_all(piece.as_bytes()).await?;
                        sent.fetch_add(piece.len(), Ordering::Relaxed);
                    }
                    socket.read_u8().await
                });
            }
        });
        (format!("redis://:hunter2@127.0.0.1:{port}/1"), flooded)
    }

    #[tokio::test]
    async fn a_server_that_never_ends_is_left() {
        const LOGGED_IN: &str = "+OK\r\n+OK\r\n+OK\r\n+OK\r\n*2\r\n:1\r\n:1\r\n";
        let own = OwnKeys::under("prefetchd:{test}:");
        for (head, tail) in [
            ("+", "x"),
            ("-ERR ", "x"),
            ("$2000000000\r\n", "x"),
            ("*1000000000\r\n", ":1\r\n"),
            ("*99999999999999\r\n", ":1\r\n"),
            ("*1\r\n", "*1\r\n"),
            ("%1000000000\r\n", ":1\r\n"),
        ] {
            for logged_in in ["", LOGGED_IN] {
                let head = format!("{logged_in}{head}");
                let (url, flooded) = flood(head.clone(), tail).await;
                let target = RedisTarget::parse(&url).unwrap();
                let error = Writer::connect(&target, &own).await.expect_err("that is no Redis");
                assert!(!matches!(error, SinkError::TimedOut { .. }), "{head:?}: {error}");
                Reader::connect_lazy(&target, &own)
                    .rows("t", prefetchd::format::Format::Hash, &[prefetchd::command::Key("k".into())])
                    .await
                    .expect_err("that is no Redis");
                let taken = flooded.load(Ordering::Relaxed);
                assert!(taken < 200 << 20, "{head:?}: {taken} bytes by three connections");
            }
        }
    }
}
