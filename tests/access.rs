//! Who is admitted, and to whom a token is sent, including what an attacker would try.

use crate::harness::{Answer, Daemon, Postgres, Redis, Running, Settings, post, run_program, skipped};
use serde_json::json;
use std::io;
use std::net::{Ipv6Addr, SocketAddr};
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};

const JSON: &str = "Content-Type: application/json";
const CLEAR: &str = r#"{"table": "categories", "confirm": "categories"}"#;

/// Reads up to the empty line, and whatever arrived after it.
async fn head_of(stream: &mut TcpStream) -> String {
    let (mut head, mut buffer) = (String::new(), [0; 4096]);
    while !head.contains("\r\n\r\n") {
        match stream.read(&mut buffer).await.unwrap_or(0) {
            0 => break,
            n => head.push_str(std::str::from_utf8(&buffer[..n]).unwrap()),
        }
    }
    head
}

/// Like nginx with nothing but `proxy_pass http://ADDRESS`: sends the daemon's own address as Host, and does not reveal
/// the client.
async fn proxy_to(daemon: SocketAddr) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            tokio::spawn(async move {
                let head = head_of(&mut client).await;
                let line = |line: &str| match line.starts_with("Host: ") {
                    true => format!("Host: {daemon}"),
                    false => line.to_owned(),
                };
                let head: Vec<String> = head.split("\r\n").map(line).collect();
                let mut server = TcpStream::connect(daemon).await.unwrap();
                server.write_all(head.join("\r\n").as_bytes()).await.unwrap();
                let _ = copy_bidirectional(&mut client, &mut server).await;
            });
        }
    });
    address
}

/// Another user's program, which answers nothing useful and records what it was sent.
struct Stranger {
    address: SocketAddr,
    heads: Arc<Mutex<Vec<String>>>,
}

impl Stranger {
    async fn at(address: SocketAddr) -> io::Result<Self> {
        let listener = TcpListener::bind(address).await?;
        let address = listener.local_addr()?;
        let heads = Arc::new(Mutex::new(Vec::new()));
        let into = Arc::clone(&heads);
        tokio::spawn(async move {
            while let Ok((mut client, _)) = listener.accept().await {
                let head = head_of(&mut client).await;
                into.lock().unwrap().push(head);
                let answer = "HTTP/1.1 500 No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
                let _ = client.write_all(answer.as_bytes()).await;
            }
        });
        Ok(Self { address, heads })
    }

    #[track_caller]
    fn was_asked_without(&self, token: &str) {
        let heads = self.heads.lock().unwrap();
        assert!(!heads.is_empty(), "nobody asked");
        let told = |head: &String| head.contains(token) || head.to_ascii_lowercase().contains("authorization");
        assert!(!heads.iter().any(told), "{heads:#?}");
    }
}

#[tokio::test]
async fn whoever_comes_through_a_proxy_needs_the_token_too() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let daemon = Daemon::start(&postgres, &redis).await;
    daemon.ready().await;
    daemon.allow_warning("wrong admin token");
    let proxy = proxy_to(daemon.address()).await;
    let ask = async |headers: &[&str]| -> Answer {
        let headers: Vec<&str> = [JSON, "Host: cache.example"].iter().chain(headers).copied().collect();
        post(proxy, "/v1/admin/clear", &headers, CLEAR).await.unwrap()
    };
    let refused = ask(&[]).await;
    assert_eq!(refused.refusal(), (401, "unauthorized".to_owned()));
    assert_eq!(refused.header("www-authenticate"), Some("Bearer"));
    assert_eq!(ask(&["Authorization: Bearer "]).await.status, 401);
    assert_eq!(ask(&["Authorization: Bearer a-guess-of-some-length"]).await.status, 401);
    assert_eq!(redis.keys("cache:*").await.len(), 5);
    let token = daemon.authorization();
    assert_eq!(ask(&[&token, "X-Forwarded-For: 10.0.0.1"]).await.refusal(), (403, "admin_disabled".to_owned()));
    assert_eq!(ask(&[&token]).await.json(), json!({"deleted": 5}));
}

#[tokio::test]
async fn the_token_lies_in_a_file_of_its_user_for_as_long_as_the_daemon_runs() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let settings = Settings::new(&postgres, &redis);
    let daemon = Daemon::with(&settings).await;
    let (file, token) = (daemon.token_file().to_owned(), daemon.token());
    let mode = |path: &std::path::Path| std::fs::metadata(path).unwrap().mode() & 0o777;
    assert_eq!((mode(&file), mode(file.parent().unwrap())), (0o600, 0o700));
    assert_eq!(daemon.said(file.to_str().unwrap()), 1, "{}", daemon.log_text());
    assert!(!daemon.log_text().contains(&token));
    let listen = daemon.address().to_string();
    daemon.kill9();
    assert!(file.exists());
    let again = Daemon::with(&settings.text("http.listen", &listen)).await;
    assert_ne!(again.token(), token);
    assert_eq!(again.stop().await, Some(0));
    assert!(!file.exists(), "it was left behind");
}

#[tokio::test]
async fn without_a_place_for_a_token_the_daemon_runs_and_nobody_administers_it() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let nowhere = |settings: Settings, name| settings.env(name, "/proc/self/nothing");
    let settings =
        ["RUNTIME_DIRECTORY", "XDG_RUNTIME_DIR", "HOME"].into_iter().fold(Settings::new(&postgres, &redis), nowhere);
    let daemon = Daemon::with(&settings).await;
    daemon.allow_warning("administration is refused");
    daemon.ready().await;
    assert!(daemon.log_text().contains("http.admin_token_file is not set"), "{}", daemon.log_text());
    let answer = post(daemon.address(), "/v1/admin/clear", &[JSON, "Authorization: Bearer "], CLEAR).await.unwrap();
    assert_eq!(answer.refusal(), (403, "admin_disabled".to_owned()));
    assert!(answer.json()["message"].as_str().unwrap().contains("http.admin_token_file"), "{answer:?}");
    let url = format!("http://{}", daemon.address());
    let page = run_program(&settings, &["page", "--url", &url]).await;
    assert!(page.code == Some(1) && page.stdout.is_empty() && page.stderr.contains("no token"), "{page:?}");
}

/// For the configured daemon, and for a URL that somebody has passed on.
#[tokio::test]
async fn a_configured_token_goes_to_no_url_that_it_is_not_meant_for() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let token = "a-token-that-is-long-enough";
    let file = tempfile::NamedTempFile::new_in(redis.dir()).unwrap();
    std::fs::write(&file, token).unwrap();
    let settings = Settings::new(&postgres, &redis)
        .text("http.admin_token_file", file.path().to_str().unwrap())
        .text("http.listen", "127.0.0.1:1");
    let stranger = Stranger::at(SocketAddr::from(([127, 0, 0, 1], 0))).await.unwrap();
    let url = format!("http://{}", stranger.address);
    for words in [&["status"][..], &["pause"], &["verify"], &["page"]] {
        let words: Vec<&str> = words.iter().copied().chain(["--url", &url]).collect();
        let ran = run_program(&settings, &words).await;
        assert!(ran.code == Some(1) && !ran.said().contains(token), "{ran:?}");
    }
    let mut tail = Running::start(&settings, &["tail", "--url", &url]);
    tail.complaint().await;
    stranger.was_asked_without(token);
}

#[tokio::test]
async fn who_guesses_is_counted_named_and_slowed_down_and_nobody_else_is() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let daemon = Daemon::start(&postgres, &redis).await;
    daemon.ready().await;
    daemon.allow_warning("wrong admin token");
    let address = daemon.address();
    let began = Instant::now();
    let guess = |n: usize| async move {
        let guess = format!("Authorization: Bearer guess-{n}");
        post(address, "/v1/admin/pause", &[JSON, &guess], "{}").await.unwrap()
    };
    let guesses: Vec<_> = (0..40).map(|n| tokio::spawn(guess(n))).collect();
    // A request with the token does not wait behind them.
    assert_eq!(daemon.operate("resume", &json!({})).await.status, 200);
    for guess in guesses {
        let answer = guess.await.unwrap();
        assert_eq!(answer.refusal(), (401, "unauthorized".to_owned()));
        assert_eq!(answer.header("connection"), Some("close"));
    }
    assert!(began.elapsed() >= Duration::from_secs(1), "{:?}", began.elapsed());
    assert_eq!(post(address, "/v1/admin/pause", &[JSON], "{}").await.unwrap().status, 401);
    let metrics = daemon.metrics().await;
    assert_eq!(metrics[r#"prefetchd_admin_refused_total{token="wrong"}"#], 40.0);
    assert_eq!(metrics[r#"prefetchd_admin_refused_total{token="missing"}"#], 1.0);
    let line = daemon.logged("wrong admin token").await;
    assert!(line["peer"].as_str().unwrap().starts_with("127.0.0.1:"), "{line}");
    assert!(daemon.said("wrong admin token") < 5, "{}", daemon.log_text());
    assert!(!daemon.log_text().contains("guess-"));
}

/// Next to the daemon, at another address that leads to this machine.
#[tokio::test]
async fn commands_take_the_token_to_its_own_daemon_alone() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let settings = Settings::new(&postgres, &redis);
    let daemon = Daemon::with(&settings).await;
    daemon.ready().await;
    let port = daemon.address().port();
    let beside = Stranger::at(SocketAddr::from(([127, 0, 0, 2], port))).await.unwrap();
    let url = format!("http://{}", beside.address);
    for words in [&["pause"][..], &["clear", "categories"], &["status"], &["page"]] {
        let words: Vec<&str> = words.iter().copied().chain(["--url", &url]).collect();
        let ran = run_program(&settings, &words).await;
        assert_eq!(ran.code, Some(1), "{ran:?}");
        assert!(!ran.said().contains(&daemon.token()), "{ran:?}");
    }
    beside.was_asked_without(&daemon.token());
    // A name with several addresses: only the daemon is contacted.
    match Stranger::at(SocketAddr::from((Ipv6Addr::LOCALHOST, port))).await {
        Err(error) => skipped(format!("no IPv6 here: {error}")),
        Ok(six) => {
            let ran = run_program(&settings, &["pause", "--url", &format!("http://localhost:{port}")]).await;
            assert_eq!(ran.code, Some(0), "{ran:?}");
            assert!(six.heads.lock().unwrap().is_empty());
            assert_eq!(daemon.status().await["paused"], true);
        }
    }
}
