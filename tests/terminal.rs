//! How text from hostile servers, and from those who write to the tables, appears on terminals and in logs.

use crate::demo::{Demo, paste};
use crate::harness::{Postgres, Redis, Settings, run_program};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

const HOSTILE: &str = "no\nprefetchd: all is well\u{1b}[2J\u{9b}2J\r\u{202e}\u{2066}\u{2028}\u{7f}";

/// A Postgres that rejects every login with these words.
async fn hostile_postgres() -> (u16, JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let fields = format!("SFATAL\0VFATAL\0C28000\0M{HOSTILE}\0D{HOSTILE}\0H{HOSTILE}\0\0");
    let mut error = vec![b'E'];
    error.extend(u32::try_from(fields.len() + 4).unwrap().to_be_bytes());
    error.extend(fields.as_bytes());
    (port, answering(listener, error))
}

fn answering(listener: TcpListener, answer: Vec<u8>) -> JoinHandle<()> {
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            let answer = answer.clone();
            tokio::spawn(async move {
                let mut asked = [0; 4096];
                while client.read(&mut asked).await.is_ok_and(|read| read > 0) {
                    let _ = client.write_all(&answer).await;
                }
            });
        }
    })
}

#[track_caller]
fn is_harmless(said: &str) {
    let bad = |c: &char| c.is_control() && *c != '\n' || ('\u{2028}'..='\u{202e}').contains(c) || *c == '\u{2066}';
    assert_eq!(said.chars().filter(bad).collect::<Vec<_>>(), [' '; 0], "{said:?}");
    // The log has its own escapes.
    assert!(said.contains("\\u001b[2J") || said.contains("\\x1b[2J"), "{said:?}");
    assert!(!said.lines().any(|line| line.starts_with("prefetchd: all is well")), "{said}");
}

#[tokio::test]
async fn a_server_cannot_write_to_the_terminal_or_forge_a_line() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let settings = || Settings::new(&postgres, &redis).text("log.format", "text");
    let (port, _server) = hostile_postgres().await;
    let url = format!("postgres://prefetchd@127.0.0.1:{port}/shop?sslmode=disable");
    for command in ["run", "check", "teardown"] {
        let ran = run_program(&settings().text("postgres.url", &url), &[command]).await;
        assert_ne!(ran.code, Some(0), "{ran:?}");
        is_harmless(&ran.said());
    }
    let json = settings().text("postgres.url", &url).text("log.format", "json");
    is_harmless(&run_program(&json, &["run"]).await.said());
}

#[tokio::test]
async fn a_server_given_to_the_demo_cannot_either() {
    let (port, _server) = hostile_postgres().await;
    let url = format!("postgres://prefetchd@127.0.0.1:{port}/shop?sslmode=disable");
    let mut demo = tokio::process::Command::new(env!("CARGO_BIN_EXE_prefetchd"));
    let output = demo.args(["demo", "--port", "0", "--postgres-url", &url]).output().await.unwrap();
    assert_ne!(output.status.code(), Some(0));
    is_harmless(&String::from_utf8([output.stdout, output.stderr].concat()).unwrap());
}

#[test]
fn whoever_inserts_a_row_cannot_write_to_the_demos_terminal() {
    let mut demo = Demo::start(&[]);
    let update = demo.ready().update;
    let (psql, _) = update.split_once(" -c ").unwrap();
    let id = r"E'x\x1b[2J\nforged \u202e\u009b'";
    paste(&format!(r#"{psql} -c "INSERT INTO categories VALUES ({id}, 'n', 1, true, NULL)""#));
    let line = demo.line("cache:category:x");
    assert!(line.contains(r"cache:category:x\u001b[2J\nforged \u202e\u009b"), "{line:?}");
}
