//! Opens a socket on which a login can begin: chooses the server, limits the time, and starts TLS.
//!
//! Every connection to Postgres begins here: ordinary ones, the replication session and cancel requests. It does not
//! know what they are used for. A mistake here makes the daemon wait forever, talk to the wrong server, or send in
//! clear text what should be encrypted.
//!
//! <https://www.postgresql.org/docs/current/protocol-flow.html#PROTOCOL-FLOW-SSL>

use super::SourceError;
use super::target::{Encryption, Host, Negotiation, PostgresTarget, SessionAttrs, SslMode, TargetServer};
use crate::code::Code;
use crate::error::Disposition;
use crate::tls::{self, Roots};
use bytes::BytesMut;
use postgres_protocol::message::frontend;
use socket2::SockRef;
use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpStream, UnixStream, lookup_host};
use tokio::time::timeout;
use tokio_postgres::tls::{ChannelBinding, TlsConnect};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::rustls::{AlertDescription, CertificateError, Error as RustlsError};

/// What a client must announce if TLS is not negotiated: <https://www.postgresql.org/docs/current/protocol-flow.html>
const ALPN: &[u8] = b"postgresql";

/// A connected socket on which nothing has been sent yet. If TLS ends without close_notify, that counts as an ordinary
/// end, because Postgres's messages show whether they are complete.
pub(super) struct Socket {
    stream: Stream,
    pub peer: Peer,
}

enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
    Tls(Box<TlsStream<TcpStream>>),
}

/// Where a session is connected: which of several servers, and which address of its name.
#[derive(Debug, Clone)]
pub(super) struct Peer {
    server: TargetServer,
    address: Address,
}

#[derive(Debug, Clone)]
enum Address {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

pub(super) type Reader = Box<dyn AsyncRead + Send + Unpin>;
pub(super) type Writer = Box<dyn AsyncWrite + Send + Unpin>;

/// Opens a session with the first server that answers, admits us and matches `target_session_attrs`.
///
/// If there is none, returns a temporary error if there was any, because a server that is unavailable now may be the
/// one that would admit us. `log_in` gets the server's name for messages, and the attributes that the server must have.
pub(super) async fn first<T, F: Future<Output = Result<T, SourceError>>>(
    target: &PostgresTarget,
    log_in: impl Fn(Socket, String, SessionAttrs) -> F,
) -> Result<T, SourceError> {
    let mut failed: Option<SourceError> = None;
    for wanted in target.wanted.rounds() {
        failed = None;
        for server in &target.servers {
            let at = format!("{server}/{}", target.database);
            let error = match enter(target, server, &at, *wanted, &log_in).await {
                Ok(session) => return Ok(session),
                Err(error) => refusal(target, server, &at, error),
            };
            match &failed {
                Some(kept) if kept.disposition() == Disposition::Retry => {}
                Some(_) | None => failed = Some(error),
            }
        }
    }
    Err(failed.unwrap_or_else(|| SourceError::unexpected("connecting", "no server")))
}

async fn enter<T, F: Future<Output = Result<T, SourceError>>>(
    target: &PostgresTarget,
    server: &TargetServer,
    at: &str,
    wanted: SessionAttrs,
    log_in: &impl Fn(Socket, String, SessionAttrs) -> F,
) -> Result<T, SourceError> {
    let (stream, address) = reach(target, server, at).await?;
    let after = target.connect_timeout;
    let peer = Peer { server: server.clone(), address };
    let session = async { log_in(encrypt(target, peer, stream, at).await?, at.to_owned(), wanted).await };
    timeout(after, session).await.unwrap_or_else(|_| Err(SourceError::Silent { at: at.to_owned(), after }))
}

/// Opens another session with a session's server.
pub(super) async fn beside<T, F: Future<Output = Result<T, SourceError>>>(
    target: &PostgresTarget,
    peer: &Peer,
    log_in: impl Fn(Socket, String, SessionAttrs) -> F,
) -> Result<T, SourceError> {
    let (at, after) = (format!("{}/{}", peer.server, target.database), target.connect_timeout);
    let session = async { log_in(again(target, peer).await?, at.clone(), SessionAttrs::Any).await };
    let session = timeout(after, session).await;
    let session = session.unwrap_or_else(|_| Err(SourceError::Silent { at: at.clone(), after }));
    session.map_err(|error| refusal(target, &peer.server, &at, error))
}

/// Opens another socket to a session's server. The caller limits the time.
pub(super) async fn again(target: &PostgresTarget, peer: &Peer) -> Result<Socket, SourceError> {
    let at = peer.server.to_string();
    let stream = connect(target, &peer.address).await;
    let stream = stream.map_err(|source| SourceError::Unreachable { at: at.clone(), source })?;
    encrypt(target, peer.clone(), stream, &at).await
}

/// Connects to the first address of a server that answers, without TLS yet.
async fn reach(target: &PostgresTarget, server: &TargetServer, at: &str) -> Result<(Stream, Address), SourceError> {
    let after = target.connect_timeout;
    let unreachable = |source| SourceError::Unreachable { at: at.to_owned(), source };
    let silent = || SourceError::Silent { at: at.to_owned(), after };
    let addresses: Vec<Address> = match &server.host {
        Host::Socket(directory) => vec![Address::Unix(directory.join(format!(".s.PGSQL.{}", server.port)))],
        Host::Tcp { address: Some(ip), .. } => vec![Address::Tcp((*ip, server.port).into())],
        Host::Tcp { name, address: None } => {
            let found = timeout(after, lookup_host((name.as_str(), server.port))).await.map_err(|_| silent())?;
            found.map_err(unreachable)?.map(Address::Tcp).collect()
        }
    };
    let mut failed = unreachable(io::Error::new(io::ErrorKind::NotFound, "the name has no address"));
    for address in addresses {
        match timeout(after, connect(target, &address)).await {
            Ok(Ok(stream)) => return Ok((stream, address)),
            Ok(Err(source)) => failed = unreachable(source),
            Err(_) => failed = silent(),
        }
    }
    Err(failed)
}

async fn connect(target: &PostgresTarget, address: &Address) -> io::Result<Stream> {
    let tcp = match address {
        Address::Tcp(address) => TcpStream::connect(address).await?,
        Address::Unix(path) => return UnixStream::connect(path).await.map(Stream::Unix),
    };
    tcp.set_nodelay(true)?;
    let socket = SockRef::from(&tcp);
    if let Some(keepalive) = &target.keepalive {
        socket.set_tcp_keepalive(keepalive)?;
    }
    // The stream writes every second, so keepalives never take effect: this timeout detects a dead network.
    #[cfg(target_os = "linux")]
    socket.set_tcp_user_timeout(Some(target.tcp_user_timeout))?;
    Ok(Stream::Tcp(tcp))
}

/// Encrypts a connection if the target asks for it. The only place where TLS begins.
async fn encrypt(target: &PostgresTarget, peer: Peer, stream: Stream, at: &str) -> Result<Socket, SourceError> {
    let (mut tcp, ip) = match (stream, &peer.address) {
        (Stream::Tcp(tcp), Address::Tcp(address)) => (tcp, address.ip()),
        // Nothing can eavesdrop on a Unix socket, and Postgres does not encrypt it.
        (stream, _) => return Ok(Socket { stream, peer }),
    };
    let encryption = target.tls.encryption(ip);
    let settings = match &encryption {
        Encryption::Never => return Ok(Socket { stream: Stream::Tcp(tcp), peer }),
        Encryption::IfOffered(settings) | Encryption::Required(settings) => settings,
    };
    let login = |fact: String, remedy| SourceError::Login { code: Code::PostgresTls, at: at.to_owned(), fact, remedy };
    if target.tls.negotiation == Negotiation::Asked {
        let answer = ask(&mut tcp).await.map_err(|source| SourceError::Unreachable { at: at.to_owned(), source })?;
        match (answer, &encryption) {
            (b'S', _) => {}
            (b'N', Encryption::Required(_)) => {
                let why = match target.tls.mode {
                    SslMode::Allow | SslMode::Prefer => "a host that is not this machine needs".to_owned(),
                    mode => format!("sslmode={mode} asks for"),
                };
                let remedy =
                    "set ssl = on in its postgresql.conf, or sslmode=disable in postgres.url if plaintext is meant";
                return Err(login(format!("offers no TLS, which {why}"), remedy));
            }
            (b'N', _) => return Ok(Socket { stream: Stream::Tcp(tcp), peer }),
            (other, _) => {
                return Err(SourceError::unexpected(
                    format!("asking {at} for TLS"),
                    format!("{:?} for an answer", char::from(other)),
                ));
            }
        }
    }
    let unusable = |error: String| login(format!("is to be spoken to over TLS, and {error}"), FILES);
    let mut config = settings.client_config().map_err(|error| unusable(error.to_string()))?;
    if target.tls.negotiation == Negotiation::Direct {
        Arc::make_mut(&mut config).alpn_protocols = vec![ALPN.to_vec()];
    }
    let name = name(&peer.server).ok_or_else(|| unusable("its name cannot appear in a certificate".to_owned()))?;
    let tls = TlsConnector::from(config).connect(name, tcp).await;
    let tls = tls.map_err(|source| SourceError::Unreachable { at: at.to_owned(), source })?;
    // Like libpq: a server of another protocol may have the same certificate, and could be made to answer for Postgres.
    if target.tls.negotiation == Negotiation::Direct && tls.get_ref().1.alpn_protocol() != Some(ALPN) {
        let fact = "does not agree over TLS to speak Postgres's protocol (ALPN)".to_owned();
        return Err(login(fact, "leave out sslnegotiation=direct, which takes Postgres 17 or a proxy that knows it"));
    }
    Ok(Socket { stream: Stream::Tls(Box::new(tls)), peer })
}

/// Asks whether the server supports TLS: `S` or `N`. Reads no further byte, so that nothing sent in clear text can pass
/// for something encrypted.
async fn ask(tcp: &mut TcpStream) -> io::Result<u8> {
    let mut request = BytesMut::new();
    frontend::ssl_request(&mut request);
    tcp.write_all(&request).await?;
    tcp.read_u8().await
}

fn name(server: &TargetServer) -> Option<ServerName<'static>> {
    match &server.host {
        Host::Socket(_) => None,
        Host::Tcp { name, .. } => ServerName::try_from(name.clone()).ok(),
    }
}

const FILES: &str = "correct sslrootcert, sslcert and sslkey";

/// Returns the error, or for a permanent TLS failure, the problem and what a person can do about it. Our certificate is
/// rejected only after our side of the handshake is complete, so this may happen during the login.
fn refusal(target: &PostgresTarget, server: &TargetServer, at: &str, error: SourceError) -> SourceError {
    let source = match &error {
        SourceError::Unreachable { source, .. } | SourceError::Lost { source, .. } => source,
        _ => return error,
    };
    let Some(tls) = source.get_ref().and_then(|cause| cause.downcast_ref::<RustlsError>()) else { return error };
    let roots = match &target.tls.roots {
        Some(Roots::File(path)) => path.display().to_string(),
        Some(Roots::System) | None => "this machine's store of root certificates".to_owned(),
    };
    let (fact, remedy) = match tls {
        RustlsError::InvalidCertificate(certificate) => match certificate {
            CertificateError::UnknownIssuer => (
                format!("has a certificate that none in {roots} has signed"),
                "name the file of the right CA's certificate with sslrootcert",
            ),
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
                ("has a certificate that has expired".to_owned(), "renew it there")
            }
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                ("has a certificate that is not valid yet".to_owned(), "set the clocks, or wait")
            }
            CertificateError::NotValidForName => {
                (format!("has a certificate for another host than {server}"), OTHER_HOST)
            }
            CertificateError::NotValidForNameContext { presented, .. } => {
                let names = if presented.is_empty() { "no host at all".to_owned() } else { presented.join(", ") };
                (format!("has a certificate for {names}"), OTHER_HOST)
            }
            other => (
                format!("has a certificate that cannot be used ({other})"),
                "make it of version 3, with the host in its subjectAltName and no CA's",
            ),
        },
        RustlsError::AlertReceived(
            alert @ (AlertDescription::BadCertificate
            | AlertDescription::UnsupportedCertificate
            | AlertDescription::CertificateRevoked
            | AlertDescription::CertificateExpired
            | AlertDescription::CertificateUnknown
            | AlertDescription::UnknownCA
            | AlertDescription::AccessDenied
            | AlertDescription::DecryptError
            | AlertDescription::CertificateRequired),
        ) => (
            format!("refuses our certificate ({alert:?})"),
            "set sslcert and sslkey to one that a CA in its ssl_ca_file has signed",
        ),
        RustlsError::AlertReceived(
            alert @ (AlertDescription::ProtocolVersion
            | AlertDescription::HandshakeFailure
            | AlertDescription::InsufficientSecurity
            | AlertDescription::NoApplicationProtocol),
        ) => (format!("speaks no TLS that we do ({alert:?})"), "let it speak TLS 1.2 or 1.3"),
        RustlsError::PeerIncompatible(why) => {
            (format!("speaks no TLS that we do ({why:?})"), "let it speak TLS 1.2 or 1.3")
        }
        _ => return error,
    };
    SourceError::Login { code: Code::PostgresTls, at: at.to_owned(), fact, remedy }
}

const OTHER_HOST: &str = "call it by that name in postgres.url, renew the certificate, or use sslmode=verify-ca";

impl Socket {
    /// Returns the data for channel binding, a hash of the server's certificate, so that the login cannot be relayed.
    /// `None` without TLS.
    pub fn end_point(&self) -> Option<Vec<u8>> {
        match &self.stream {
            Stream::Tcp(_) | Stream::Unix(_) => None,
            Stream::Tls(tls) => tls::server_end_point(tls.get_ref().1.peer_certificates()?.first()?),
        }
    }

    /// Splits it into both directions, which are used at the same time.
    pub fn split(self) -> (Reader, Writer) {
        match self.stream {
            Stream::Tcp(tcp) => {
                let (reader, writer) = tcp.into_split();
                (Box::new(reader), Box::new(writer))
            }
            Stream::Unix(unix) => {
                let (reader, writer) = unix.into_split();
                (Box::new(reader), Box::new(writer))
            }
            Stream::Tls(_) => {
                let (reader, writer) = tokio::io::split(self);
                (Box::new(reader), Box::new(writer))
            }
        }
    }
}

impl AsyncRead for Socket {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match &mut self.stream {
            Stream::Tcp(tcp) => Pin::new(tcp).poll_read(cx, buf),
            Stream::Unix(unix) => Pin::new(unix).poll_read(cx, buf),
            Stream::Tls(tls) => match Pin::new(tls.as_mut()).poll_read(cx, buf) {
                Poll::Ready(Err(error)) if error.kind() == io::ErrorKind::UnexpectedEof => Poll::Ready(Ok(())),
                read => read,
            },
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match &mut self.stream {
            Stream::Tcp(tcp) => Pin::new(tcp).poll_write(cx, buf),
            Stream::Unix(unix) => Pin::new(unix).poll_write(cx, buf),
            Stream::Tls(tls) => Pin::new(tls.as_mut()).poll_write(cx, buf),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.stream {
            Stream::Tcp(tcp) => Pin::new(tcp).poll_flush(cx),
            Stream::Unix(unix) => Pin::new(unix).poll_flush(cx),
            Stream::Tls(tls) => Pin::new(tls.as_mut()).poll_flush(cx),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.stream {
            Stream::Tcp(tcp) => Pin::new(tcp).poll_shutdown(cx),
            Stream::Unix(unix) => Pin::new(unix).poll_shutdown(cx),
            Stream::Tls(tls) => Pin::new(tls.as_mut()).poll_shutdown(cx),
        }
    }
}

impl tokio_postgres::tls::TlsStream for Socket {
    fn channel_binding(&self) -> ChannelBinding {
        self.end_point().map_or_else(ChannelBinding::none, ChannelBinding::tls_server_end_point)
    }
}

impl tokio_postgres::tls::TlsStream for &mut Socket {
    fn channel_binding(&self) -> ChannelBinding {
        (**self).channel_binding()
    }
}

/// Makes tokio-postgres accept a [`Socket`] as an established TLS connection, whether it is encrypted or not: with
/// [`SslMode::Require`](tokio_postgres::config::SslMode::Require) and
/// [`SslNegotiation::Direct`](tokio_postgres::config::SslNegotiation::Direct) it does not ask the server, and gets the
/// data for channel binding.
pub(super) struct AsItIs;

impl<S: tokio_postgres::tls::TlsStream + Unpin> TlsConnect<S> for AsItIs {
    type Stream = S;
    type Error = Infallible;
    type Future = std::future::Ready<Result<S, Infallible>>;

    fn connect(self, socket: S) -> Self::Future {
        std::future::ready(Ok(socket))
    }
}
