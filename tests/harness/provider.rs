//! A Redis as some providers offer it: a proxy in front of a real one that answers some commands itself.
//!
//! For each command that it answers itself, the real server receives an unknown command instead. A transaction with a
//! refused command therefore fails as it does with a real provider.

use super::Redis;
use bytes::{Buf, BytesMut};
use prefetchd::resp::{Token, token};
use std::io;
use std::sync::{Arc, Mutex};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

/// Returns the reply to a command, as RESP, or `None` to let the real server answer.
pub type Wording = dyn Fn(&[String]) -> Option<String> + Send + Sync;

pub struct Provider {
    url: String,
    port: u16,
    wording: Arc<Mutex<Arc<Wording>>>,
    accepting: JoinHandle<()>,
}

impl Provider {
    pub async fn before(redis: &Redis, wording: impl Fn(&[String]) -> Option<String> + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let (port, server) = (listener.local_addr().unwrap().port(), redis.port());
        let wording: Arc<Mutex<Arc<Wording>>> = Arc::new(Mutex::new(Arc::new(wording)));
        let shared = Arc::clone(&wording);
        let accepting = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let wording = Arc::clone(&shared);
                // It ends when either end closes.
                tokio::spawn(async move { carry(client, server, &wording).await });
            }
        });
        let url = redis.daemon_url().replace(&format!(":{server}"), &format!(":{port}"));
        Self { url, port, wording, accepting }
    }

    /// The value for `redis.url`.
    pub fn url(&self) -> String {
        self.url.clone()
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// Applies from now on, also to open connections.
    pub fn answers(&self, wording: impl Fn(&[String]) -> Option<String> + Send + Sync + 'static) {
        *self.wording.lock().unwrap() = Arc::new(wording);
    }
}

impl Drop for Provider {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

async fn carry(mut client: TcpStream, server: u16, wording: &Mutex<Arc<Wording>>) -> io::Result<()> {
    let mut server = TcpStream::connect(("127.0.0.1", server)).await?;
    let (mut asked, mut answered) = (BytesMut::new(), BytesMut::new());
    loop {
        let bytes = whole(&mut client, &mut asked).await?;
        let words = words(&bytes);
        let ours = Arc::clone(&wording.lock().unwrap());
        match ours(&words) {
            Some(reply) => {
                server.write_all(b"*1\r\n$4\r\nNONE\r\n").await?;
                whole(&mut server, &mut answered).await?;
                client.write_all(reply.as_bytes()).await?;
            }
            None => {
                server.write_all(&bytes).await?;
                let reply = whole(&mut server, &mut answered).await?;
                client.write_all(&reply).await?;
            }
        }
    }
}

/// Reads the next command or reply.
async fn whole(from: &mut TcpStream, buffer: &mut BytesMut) -> io::Result<BytesMut> {
    loop {
        if let Some(len) = len_of(buffer) {
            return Ok(buffer.split_to(len));
        }
        if from.read_buf(buffer).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
}

/// Returns the length of the first command or reply, once it is complete.
fn len_of(bytes: &[u8]) -> Option<usize> {
    let (mut at, mut open) = (0, 1_u64);
    while open > 0 {
        let (token, len) = token(&bytes[at..]).unwrap()?;
        at += len;
        open -= 1;
        if let Token::Array(n) = token {
            open += n;
        }
    }
    Some(at)
}

fn words(mut command: &[u8]) -> Vec<String> {
    let mut words = Vec::new();
    while let Ok(Some((token, len))) = token(command) {
        if let Token::Bulk(word) = token {
            words.push(String::from_utf8_lossy(word).into_owned());
        }
        command.advance(len);
    }
    words
}
