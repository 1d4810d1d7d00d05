//! The smallest HTTP client: one connection, which stays open, so that what is measured is the server.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};

pub struct Http(BufReader<TcpStream>);

impl Http {
    pub fn connect(to: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect(to)?;
        stream.set_nodelay(true)?;
        Ok(Self(BufReader::new(stream)))
    }

    /// Returns the body.
    ///
    /// # Errors
    /// If the answer is not 200.
    pub fn get(&mut self, path: &str) -> io::Result<Vec<u8>> {
        let (head, body) = self.answer(path)?;
        if is_200(&head) { Ok(body) } else { Err(io::Error::other(format!("{path}: {head}"))) }
    }

    pub fn is_ready(&mut self) -> io::Result<bool> {
        Ok(is_200(&self.answer("/readyz")?.0))
    }

    fn answer(&mut self, path: &str) -> io::Result<(String, Vec<u8>)> {
        self.0.get_mut().write_all(format!("GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n").as_bytes())?;
        let (mut head, mut length) = (String::new(), 0);
        while !head.ends_with("\r\n\r\n") {
            let begin = head.len();
            if self.0.read_line(&mut head)? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            if let Some(value) = head[begin..].strip_prefix("content-length:") {
                length = value.trim().parse().map_err(io::Error::other)?;
            }
        }
        let mut body = vec![0; length];
        self.0.read_exact(&mut body)?;
        Ok((head, body))
    }
}

fn is_200(head: &str) -> bool {
    head.starts_with("HTTP/1.1 200 ")
}
