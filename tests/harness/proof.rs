//! Proves that the harness does what its tests rely on: a test that cannot fail is a defect.

use super::proxy::{Cut, Proxy, Way};
use super::{Daemon, PATIENCE, Postgres, Redis, Settings, Stop, eventually, psql};
use nix::sys::signal::Signal;
use prefetchd::cli::servers;
use std::io::ErrorKind;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const FIRST: &str = "cache:category:cat-001";

#[tokio::test]
async fn a_daemon_on_a_database_of_its_own_follows_and_stops() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let daemon = Daemon::start(&postgres, &redis).await;
    daemon.ready().await;
    assert_eq!(redis.keys("cache:*").await.len(), 5);
    let lsn = postgres.execute("UPDATE categories SET name = 'Drinks' WHERE id = 'cat-001'").await;
    daemon.applied(lsn).await;
    assert_eq!(redis.hash(FIRST).await["name"], "Drinks");
    let status = daemon.status().await;
    assert_eq!(status["prefetched"], 5);
    assert_eq!(status["source"]["database"], postgres.database());
    let metrics = daemon.metrics().await;
    assert_eq!(metrics[r#"prefetchd_changes_applied_total{op="upsert",table="categories"}"#], 1.0);
    assert!(daemon.peak_memory_bytes() > 1 << 20);
    assert_eq!(daemon.said("streaming from"), 1, "{}", daemon.log_text());
    assert_eq!(daemon.stop().await, Some(0));
}

#[tokio::test]
async fn databases_side_by_side_do_not_see_each_other() {
    let (one, two) = (Postgres::shared(), Postgres::shared());
    psql(&one.url("postgres"), "DELETE FROM categories WHERE id = 'cat-005'");
    assert_eq!(one.value("SELECT count(*) FROM categories").await.unwrap(), "4");
    assert_eq!(two.value("SELECT count(*) FROM categories").await.unwrap(), "5");
}

#[tokio::test]
async fn servers_stop_and_come_back_where_they_were() {
    let (mut postgres, mut redis) = (Postgres::own(&[]), Redis::with(&["--appendonly", "yes"]));
    postgres.execute("DELETE FROM categories WHERE id = 'cat-005'").await;
    for how in [Stop::Smart, Stop::Fast, Stop::Immediate] {
        postgres.restart(how);
    }
    postgres.kill();
    postgres.start_again();
    assert_eq!(postgres.value("SELECT count(*) FROM categories").await.unwrap(), "4");

    redis.command::<()>(&["SET", "a", "b"]).await;
    redis.stop();
    redis.start_again();
    redis.kill();
    redis.start_again();
    assert_eq!(redis.command::<String>(&["GET", "a"]).await, "b");
    redis.flush().await;
    assert_eq!(redis.keys("*").await, [""; 0]);
}

#[tokio::test]
async fn what_is_frozen_when_a_test_ends_ends_too() {
    let began = Instant::now();
    let (mut postgres, redis) = (Postgres::own(&[]), Redis::start());
    postgres.signal(Signal::SIGSTOP);
    redis.signal(Signal::SIGSTOP);
    drop((postgres, redis));
    assert!(began.elapsed() < PATIENCE);
}

/// A daemon that has logged a warning because its Redis is gone.
async fn troubled() -> (Postgres, Daemon) {
    let (postgres, mut redis) = (Postgres::shared(), Redis::start());
    let daemon = Daemon::start(&postgres, &redis).await;
    daemon.ready().await;
    redis.kill();
    daemon.logged("WARN").await;
    (postgres, daemon)
}

#[tokio::test]
#[should_panic(expected = "unexpected in the log")]
async fn an_unexpected_warning_fails_the_test() {
    let (_postgres, _daemon) = troubled().await;
}

#[tokio::test]
async fn a_warning_that_is_allowed_does_not() {
    let (_postgres, daemon) = troubled().await;
    daemon.allow_warnings();
    daemon.kill9();
}

#[tokio::test]
async fn a_refusal_comes_with_its_exit_code() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let (code, said) = Daemon::refused(&Settings::new(&postgres, &redis).text("cache.tttl", "1h"));
    assert_eq!(code, Some(78), "{said}");
    assert!(said.contains("cache.tttl"), "{said}");
}

/// Connects to Redis through a proxy, and exchanges one request.
async fn through(proxy: &Proxy) -> TcpStream {
    let place = proxy.url();
    let place = place.split('@').nth(1).unwrap().trim_end_matches("/0").to_owned();
    let mut stream = TcpStream::connect(place).await.unwrap();
    says(&mut stream, &format!("AUTH {}\r\n", servers::redis_password()), "+OK\r\n").await;
    says(&mut stream, "PING\r\n", "+PONG\r\n").await;
    stream
}

async fn says(stream: &mut TcpStream, request: &str, answer: &str) {
    stream.write_all(request.as_bytes()).await.unwrap();
    hears(stream, answer).await;
}

async fn hears(stream: &mut TcpStream, answer: &str) {
    let mut heard = vec![0; answer.len()];
    tokio::time::timeout(PATIENCE, stream.read_exact(&mut heard)).await.unwrap().unwrap();
    assert_eq!(String::from_utf8_lossy(&heard), answer);
}

#[tokio::test]
async fn what_a_proxy_holds_arrives_when_its_sender_is_gone() {
    let redis = Redis::start();
    let proxy = Proxy::to_redis(&redis).await;
    let mut old = through(&proxy).await;
    proxy.hold();
    old.write_all(b"SET a 1\r\nSET b 2\r\n").await.unwrap();
    eventually("it is held", async || proxy.held_bytes(), |held| *held == 18).await;
    // As after kill -9: unread data turns the close into a reset.
    socket2::SockRef::from(&old).set_linger(Some(Duration::ZERO)).unwrap();
    drop(old);
    let mut new = through(&proxy).await;
    says(&mut new, "SET a 0\r\nEXISTS b\r\n", "+OK\r\n:0\r\n").await;
    proxy.release();
    eventually("it arrives", async || redis.keys("*").await, |keys| *keys == ["a", "b"]).await;
    assert_eq!(redis.command::<String>(&["GET", "a"]).await, "1");
}

#[tokio::test]
async fn a_silent_proxy_says_nothing_until_it_is_healed() {
    let redis = Redis::start();
    let proxy = Proxy::to_redis(&redis).await;
    let mut stream = through(&proxy).await;
    for way in [Way::ToServer, Way::ToClient] {
        proxy.silence(way);
        stream.write_all(b"INCR n\r\n").await.unwrap();
        let arrived = async || redis.command::<Option<String>>(&["GET", "n"]).await;
        if way == Way::ToClient {
            eventually("it arrives", arrived, |n| n.as_deref() == Some("2")).await;
        }
        let silence = tokio::time::timeout(Duration::from_millis(50), stream.read_u8()).await;
        assert!(silence.is_err(), "{way:?}: {silence:?}");
        proxy.heal();
        hears(&mut stream, if way == Way::ToServer { ":1\r\n" } else { ":2\r\n" }).await;
    }
}

#[tokio::test]
async fn a_proxy_cuts_in_mid_write() {
    let redis = Redis::start();
    let proxy = Proxy::to_redis(&redis).await;
    let mut stream = through(&proxy).await;
    let write = async {
        stream.write_all(b"SET a 1\r\nSET b 2\r\n").await.unwrap();
        stream.read_to_end(&mut Vec::new()).await
    };
    // The second one is incomplete.
    let _ = tokio::join!(proxy.cut_in_mid_write(17), write);
    eventually("the first arrives", async || redis.keys("*").await, |keys| *keys == ["a"]).await;
    for how in [Cut::Fin, Cut::Rst] {
        let mut stream = through(&proxy).await;
        proxy.cut(how);
        let end = stream.read_u8().await.unwrap_err().kind();
        let expected = if how == Cut::Fin { ErrorKind::UnexpectedEof } else { ErrorKind::ConnectionReset };
        assert_eq!(end, expected);
    }
}

#[tokio::test]
async fn a_throttled_proxy_is_slow_and_whole() {
    let redis = Redis::start();
    let proxy = Proxy::to_redis(&redis).await;
    let mut stream = through(&proxy).await;
    proxy.throttle(Some(20_000));
    let began = Instant::now();
    let value = "v".repeat(4_000);
    says(&mut stream, &format!("SET a {value}\r\n"), "+OK\r\n").await;
    assert!(began.elapsed() >= Duration::from_millis(180), "{:?}", began.elapsed());
    assert_eq!(redis.command::<String>(&["GET", "a"]).await, value);
    proxy.delay(Duration::from_millis(50));
    let began = Instant::now();
    says(&mut stream, "PING\r\n", "+PONG\r\n").await;
    assert!(began.elapsed() >= Duration::from_millis(100), "{:?}", began.elapsed());
}
