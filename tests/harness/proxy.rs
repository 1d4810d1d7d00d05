//! An unreliable network: a TCP proxy on loopback between a daemon and one of its servers.
//!
//! It forwards bytes, and closes a connection when the server closes it or has been told that the client has. What is
//! delayed, silenced or held still arrives afterwards, in order, as in a real network; its sender may be long gone.

use super::{Postgres, Redis};
use socket2::SockRef;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::sleep;

const PIECE_BYTES: usize = 64 * 1024;
/// How often a throttled connection forwards data.
const PIECES_A_SECOND: usize = 20;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    ToServer,
    ToClient,
}

/// How both ends learn that a connection was closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// In an orderly way.
    Fin,
    Rst,
}

/// Whose connections are closed, and not accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Barred {
    Nobody,
    One(IpAddr),
    Everybody,
}

impl Barred {
    fn includes(self, client: IpAddr) -> bool {
        match self {
            Barred::Nobody => false,
            Barred::One(barred) => barred == client,
            Barred::Everybody => true,
        }
    }
}

pub struct Proxy {
    /// The server's URL, through this proxy.
    url: String,
    port: u16,
    network: Arc<Network>,
    accepting: JoinHandle<()>,
}

/// The present rules. Connections are numbered from 1.
#[derive(Debug, Clone, Copy)]
struct Rules {
    server: SocketAddr,
    /// For each piece.
    delay: Duration,
    /// For each connection and direction.
    bytes_per_second: Option<usize>,
    /// Indexed by [`Way`].
    silent: [bool; 2],
    held_up_to: u64,
    cut_up_to: u64,
    cut: Cut,
    barred: Barred,
    /// What the server says, and what the client hears instead.
    misheard: Option<(&'static str, &'static str)>,
}

impl Rules {
    fn ends(&self, connection: u64, client: IpAddr) -> bool {
        connection <= self.cut_up_to || self.barred.includes(client)
    }

    fn held(&self, connection: u64, way: Way) -> bool {
        way == Way::ToServer && connection <= self.held_up_to
    }
}

struct Network {
    rules: watch::Sender<Rules>,
    connections: AtomicU64,
    held_bytes: AtomicUsize,
    /// After so many more bytes in this direction, everything is cut.
    until_cut: Mutex<Option<(Way, usize)>>,
}

impl Proxy {
    /// The value for `redis.url`.
    pub async fn to_redis(redis: &Redis) -> Self {
        Self::new(&redis.daemon_url(), redis.port()).await
    }

    /// The value for `postgres.url`.
    pub async fn to_postgres(postgres: &Postgres) -> Self {
        Self::new(&postgres.url("prefetchd"), postgres.port()).await
    }

    /// `url` contains this port of the loopback address.
    pub async fn new(url: &str, port: u16) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let own = listener.local_addr().unwrap().port();
        let (server, delay, cut) = (SocketAddr::from(([127, 0, 0, 1], port)), Duration::ZERO, Cut::Fin);
        let rules = Rules {
            server,
            delay,
            bytes_per_second: None,
            silent: [false; 2],
            held_up_to: 0,
            cut_up_to: 0,
            cut,
            barred: Barred::Nobody,
            misheard: None,
        };
        let network = Arc::new(Network {
            rules: watch::Sender::new(rules),
            connections: AtomicU64::new(0),
            held_bytes: AtomicUsize::new(0),
            until_cut: Mutex::new(None),
        });
        let accepted = Arc::clone(&network);
        let accepting = tokio::spawn(async move {
            while let Ok((client, from)) = listener.accept().await {
                tokio::spawn(Arc::clone(&accepted).carry(client, from.ip()));
            }
        });
        let url = url.replace(&format!(":{port}"), &format!(":{own}"));
        assert!(url.contains(&format!(":{own}")), "{url}");
        Self { url, port: own, network, accepting }
    }

    fn set(&self, change: impl FnOnce(&mut Rules)) {
        self.network.rules.send_modify(change);
    }

    pub fn url(&self) -> String {
        self.url.clone()
    }

    /// Where it listens.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// From now on, clients at these addresses, and no others, have no connection.
    pub fn bar(&self, barred: Barred) {
        self.set(|rules| rules.barred = barred);
    }

    /// Delays every piece by this much.
    pub fn delay(&self, delay: Duration) {
        self.set(|rules| rules.delay = delay);
    }

    /// `None` removes the limit.
    pub fn throttle(&self, bytes_per_second: Option<usize>) {
        self.set(|rules| rules.bytes_per_second = bytes_per_second);
    }

    /// Keeps connections open and accepts new ones, but forwards nothing in this direction.
    pub fn silence(&self, way: Way) {
        self.set(|rules| rules.silent[way as usize] = true);
    }

    /// Forwards nothing at all.
    pub fn black_hole(&self) {
        self.silence(Way::ToServer);
        self.silence(Way::ToClient);
    }

    /// Forwards what was silenced, and everything from now on.
    pub fn heal(&self) {
        let none = (Duration::ZERO, None, [false; 2]);
        self.set(|rules| (rules.delay, rules.bytes_per_second, rules.silent) = none);
    }

    /// Where the server says this, clients hear something else of the same length.
    pub fn mishear(&self, said: &'static str, heard: &'static str) {
        assert_eq!(said.len(), heard.len());
        self.set(|rules| rules.misheard = Some((said, heard)));
    }

    /// Closes every open connection.
    pub fn cut(&self, how: Cut) {
        self.network.cut(how);
    }

    /// Forwards so many more bytes to the server, counted over all connections, then closes the connections. Returns
    /// once it has.
    pub async fn cut_in_mid_write(&self, bytes: usize) {
        self.network.cut_after(Way::ToServer, bytes).await;
    }

    /// The same for bytes from the server.
    pub async fn cut_in_mid_read(&self, bytes: usize) {
        self.network.cut_after(Way::ToClient, bytes).await;
    }

    /// Holds back what the clients of the present connections send, and hides from the server that they close. New
    /// connections are not affected.
    pub fn hold(&self) {
        let made = self.network.connections.load(Ordering::SeqCst);
        self.set(|rules| rules.held_up_to = made);
    }

    pub fn held_bytes(&self) -> usize {
        self.network.held_bytes.load(Ordering::SeqCst)
    }

    /// Delivers what was held, including the close of a client that is gone.
    pub fn release(&self) {
        self.set(|rules| rules.held_up_to = 0);
    }

    /// From now on, another server is at this address, on this port of the loopback address. As in a failover, open
    /// connections are cut.
    pub fn lead_to(&self, port: u16) {
        self.set(|rules| rules.server.set_port(port));
        self.cut(Cut::Rst);
    }

    /// Returns how many connections have been opened.
    pub fn connections(&self) -> u64 {
        self.network.connections.load(Ordering::SeqCst)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.accepting.abort();
        self.set(|rules| rules.cut_up_to = u64::MAX);
    }
}

impl Network {
    /// Waits until the rules are as wanted.
    async fn until(&self, wanted: impl FnMut(&Rules) -> bool) -> Rules {
        *self.rules.subscribe().wait_for(wanted).await.expect("the sender is here")
    }

    fn cut(&self, how: Cut) {
        let made = self.connections.load(Ordering::SeqCst);
        self.rules.send_modify(|rules| (rules.cut_up_to, rules.cut) = (made, how));
    }

    async fn cut_after(&self, way: Way, bytes: usize) {
        let before = self.rules.borrow().cut_up_to;
        *self.until_cut.lock().unwrap() = Some((way, bytes));
        self.until(|rules| rules.cut_up_to > before).await;
    }

    /// Returns how many of these bytes may pass, and whether to cut everything after them.
    fn allowed(&self, way: Way, bytes: usize) -> (usize, bool) {
        let mut until_cut = self.until_cut.lock().unwrap();
        match until_cut.take() {
            Some((cut, left)) if cut == way && left <= bytes => return (left, true),
            Some((cut, left)) => *until_cut = Some((cut, if cut == way { left - bytes } else { left })),
            None => {}
        }
        (bytes, false)
    }

    async fn carry(self: Arc<Self>, mut client: TcpStream, from: IpAddr) {
        let id = self.connections.fetch_add(1, Ordering::SeqCst) + 1;
        let rules = self.until(|rules| !rules.silent[Way::ToServer as usize] || rules.ends(id, from)).await;
        if rules.barred.includes(from) {
            return;
        }
        let Ok(mut server) = TcpStream::connect(rules.server).await else { return };
        for end in [&client, &server] {
            let _ = end.set_nodelay(true);
        }
        let how = {
            let (client_in, client_out) = client.split();
            let (server_in, server_out) = server.split();
            let to_server = async {
                self.pump(id, Way::ToServer, client_in, server_out).await;
                // The server closes it once it has read that.
                std::future::pending::<()>().await;
            };
            tokio::select! {
                rules = self.until(|rules| rules.ends(id, from)) => rules.cut,
                () = to_server => Cut::Fin,
                () = self.pump(id, Way::ToClient, server_in, client_out) => Cut::Fin,
            }
        };
        if how == Cut::Rst {
            for end in [&client, &server] {
                let _ = SockRef::from(end).set_linger(Some(Duration::ZERO));
            }
        }
    }

    /// Runs until one end has closed, and the other has been told.
    async fn pump(&self, id: u64, way: Way, mut from: ReadHalf<'_>, mut to: WriteHalf<'_>) {
        let (mut piece, mut kept) = (vec![0; PIECE_BYTES], Vec::new());
        let released = || self.until(|rules| !rules.held(id, way));
        loop {
            let read = tokio::select! {
                read = from.read(&mut piece) => read.unwrap_or(0),
                _ = released(), if !kept.is_empty() => {
                    self.pass(way, &kept, &mut to).await;
                    kept.clear();
                    continue;
                }
            };
            kept.extend_from_slice(&piece[..read]);
            if read > 0 && self.rules.borrow().held(id, way) {
                self.held_bytes.fetch_add(read, Ordering::SeqCst);
                continue;
            }
            released().await;
            if way == Way::ToClient {
                self.falsify(&mut kept);
            }
            self.pass(way, &kept, &mut to).await;
            kept.clear();
            if read == 0 {
                let _ = to.shutdown().await;
                return;
            }
        }
    }

    fn falsify(&self, bytes: &mut [u8]) {
        let Some((said, heard)) = self.rules.borrow().misheard else { return };
        for at in 0..=bytes.len().saturating_sub(said.len()) {
            if bytes[at..].starts_with(said.as_bytes()) {
                bytes[at..at + heard.len()].copy_from_slice(heard.as_bytes());
            }
        }
    }

    /// Forwards bytes as the rules allow. If an end does not accept them, nothing is reported, because its own side
    /// will notice.
    async fn pass(&self, way: Way, mut bytes: &[u8], to: &mut WriteHalf<'_>) {
        let delay = self.rules.borrow().delay;
        if !delay.is_zero() {
            sleep(delay).await;
        }
        loop {
            let rate = self.until(|rules| !rules.silent[way as usize]).await.bytes_per_second;
            if bytes.is_empty() {
                return;
            }
            let most = rate.map_or(bytes.len(), |rate| bytes.len().min((rate / PIECES_A_SECOND).max(1)));
            let (now, last) = self.allowed(way, most);
            let _ = to.write_all(&bytes[..now]).await;
            if last {
                self.cut(Cut::Fin);
                return std::future::pending().await;
            }
            bytes = &bytes[now..];
            if let Some(rate) = rate {
                sleep(Duration::from_secs_f64(now as f64 / rate as f64)).await;
            }
        }
    }
}
