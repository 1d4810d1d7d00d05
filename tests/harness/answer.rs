//! HTTP responses exactly as received: no client library that follows, retries or normalizes anything.

use std::net::SocketAddr;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Longer than the longest `wait` of a read.
const ANSWER_PATIENCE: Duration = Duration::from_secs(40);

#[derive(Debug, Clone)]
pub struct Answer {
    pub status: u16,
    pub head: String,
    pub body: String,
}

/// Sends one request without a body, on a connection of its own.
///
/// # Errors
/// If nothing listens there, or if the connection is closed without a response.
pub async fn request(address: SocketAddr, method: &str, target: &str) -> std::io::Result<Answer> {
    let mut stream = TcpStream::connect(address).await?;
    let head = format!("{method} {target} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    stream.write_all(head.as_bytes()).await?;
    let bytes = Answer::bytes(&mut stream).await;
    if bytes.is_empty() {
        return Err(std::io::ErrorKind::UnexpectedEof.into());
    }
    Ok(Answer::parse(&bytes))
}

/// Sends a POST with this body, and with these header lines in addition to `Host`.
///
/// # Errors
/// If nothing listens there.
pub async fn post(address: SocketAddr, target: &str, headers: &[&str], body: &str) -> std::io::Result<Answer> {
    let mut stream = TcpStream::connect(address).await?;
    let mut head = format!("POST {target} HTTP/1.1\r\nConnection: close\r\nContent-Length: {}\r\n", body.len());
    if !headers.iter().any(|line| line.starts_with("Host:")) {
        head += &format!("Host: {address}\r\n");
    }
    headers.iter().for_each(|line| head += &format!("{line}\r\n"));
    stream.write_all(format!("{head}\r\n{body}").as_bytes()).await?;
    Ok(Answer::read(&mut stream).await)
}

impl Answer {
    /// Reads until the server closes the connection.
    pub async fn read(stream: &mut TcpStream) -> Self {
        Self::parse(&Self::bytes(stream).await)
    }

    async fn bytes(stream: &mut TcpStream) -> Vec<u8> {
        let mut bytes = Vec::new();
        // A reset after the response, because the server did not read everything, also counts as its end.
        let _ = tokio::time::timeout(ANSWER_PATIENCE, stream.read_to_end(&mut bytes)).await.expect("no end");
        bytes
    }

    fn parse(bytes: &[u8]) -> Self {
        let text = String::from_utf8(bytes.to_vec()).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no head in {text:?}"));
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        Self { status, head: head.to_owned(), body: body.to_owned() }
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().skip(1).find_map(|line| {
            let (n, value) = line.split_once(": ")?;
            n.eq_ignore_ascii_case(name).then_some(value)
        })
    }

    #[track_caller]
    pub fn json(&self) -> serde_json::Value {
        assert_eq!(self.header("content-type"), Some("application/json"), "{self:?}");
        serde_json::from_str(&self.body).unwrap()
    }

    /// Asserts the status and the error code.
    #[track_caller]
    pub fn refusal(&self) -> (u16, String) {
        let json = self.json();
        assert!(!json["message"].as_str().unwrap().is_empty(), "{self:?}");
        (self.status, json["error"].as_str().unwrap().to_owned())
    }
}
