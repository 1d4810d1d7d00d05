//! Connections to Postgres with TLS: every `sslmode`, channel binding, client certificates, and several servers.
//! Ordinary connections and the replication session must behave alike.

use crate::source::{APPLICATION, Server, ask, run, tables};
use prefetchd::cli::servers;
use prefetchd::error::Disposition;
use prefetchd::loader::range::{Range, Sizes};
use prefetchd::schema::QualifiedName;
use prefetchd::source::connect;
use prefetchd::source::new_slot;
use prefetchd::source::slot;
use prefetchd::source::snapshot::{self, Part, ReadRange};
use prefetchd::source::stream;
use prefetchd::source::target::PostgresTarget;
use prefetchd::source::wire::ReplicationConnection;
use prefetchd::tls::{Roots, TlsSettings, Verify};
use rcgen::{BasicConstraints, Certificate, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, date_time_ymd};
use std::collections::HashMap;
use std::net::{IpAddr, TcpListener, UdpSocket};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::{PrivatePkcs8KeyDer, ServerName};
use tokio_rustls::{TlsAcceptor, TlsConnector};

const PATIENCE: Duration = Duration::from_secs(30);
/// Without a password, encrypted or not: for a role without privileges, and over the socket, which only we can reach,
/// for everybody.
const OPEN: &str = "local all all trust\nhost all open all trust\nhost all all all scram-sha-256\n";

/// Creates the role of [`OPEN`].
async fn with_open_role(server: Server) -> Server {
    let client = connect::connect(&server.socket("postgres", "postgres"), APPLICATION).await.unwrap();
    run(&client, "CREATE ROLE open LOGIN REPLICATION").await;
    server
}

/// A certificate and its key.
pub struct Pair {
    certificate: Certificate,
    key: KeyPair,
}

type Ca = CertifiedIssuer<'static, KeyPair>;

fn params(common_name: &str, hosts: &[&str]) -> CertificateParams {
    let mut params = CertificateParams::new(hosts.iter().map(|h| (*h).to_owned()).collect::<Vec<_>>()).unwrap();
    params.distinguished_name.push(DnType::CommonName, common_name);
    params
}

fn ca(name: &str) -> Ca {
    let mut params = params(name, &[]);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    // Bound by SHA-384.
    Ca::self_signed(params, KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).unwrap()).unwrap()
}

fn signed(ca: &Ca, params: &CertificateParams) -> Pair {
    let key = KeyPair::generate().unwrap();
    Pair { certificate: params.signed_by(&key, ca).unwrap(), key }
}

/// As `openssl req -x509` creates it.
pub fn self_signed(hosts: &[&str]) -> Pair {
    let mut params = params("localhost", hosts);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().unwrap();
    Pair { certificate: params.self_signed(&key).unwrap(), key }
}

/// The directory of our certificates.
struct Files(tempfile::TempDir);

impl Files {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn put(&self, name: &str, pem: &str) -> PathBuf {
        let path = self.0.path().join(name);
        std::fs::write(&path, pem).unwrap();
        path
    }

    /// `sslcert=…&sslkey=…`
    fn identity(&self, name: &str, pair: &Pair) -> String {
        let certificate = self.put(&format!("{name}.crt"), &pair.certificate.pem());
        let key = self.put(&format!("{name}.key"), &pair.key.serialize_pem());
        format!("sslcert={}&sslkey={}", certificate.display(), key.display())
    }
}

/// Writes a file that only the server may read, as Postgres requires.
fn give(data: &Path, name: &str, text: &str) {
    let (path, owner) = (data.join(name), data.metadata().unwrap());
    std::fs::write(&path, text).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
    chown(&path, Some(owner.uid()), Some(owner.gid())).unwrap();
}

/// From now on the server presents this certificate.
fn show(server: &mut Server, pair: &Pair) {
    show_pem(server, &pair.certificate.pem(), &pair.key.serialize_pem());
}

fn show_pem(server: &mut Server, certificate: &str, key: &str) {
    give(&server.data(), "server.crt", certificate);
    give(&server.data(), "server.key", key);
    server.stop();
    server.start_again();
}

fn encrypted(hba: &str, pair: &Pair, clients: &Ca) -> Server {
    let mut server = Server::guarded(hba);
    let settings = server.data().join("postgresql.auto.conf");
    let before = std::fs::read_to_string(&settings).unwrap();
    give(&server.data(), "postgresql.auto.conf", &format!("{before}ssl = on\nssl_ca_file = 'root.crt'\n"));
    give(&server.data(), "root.crt", &clients.pem());
    show(&mut server, pair);
    server
}

/// The target of a URL, for a process without an environment.
fn target(role: &str, host: &str, port: u16, options: &str) -> PostgresTarget {
    let url = format!("postgres://{role}@{host}:{port}/postgres?{options}");
    PostgresTarget::parse(&url, &HashMap::new()).unwrap_or_else(|error| panic!("{url}: {error}"))
}

/// Returns how both kinds of connections are encrypted according to the server, or why there are none.
async fn outcome(target: &PostgresTarget) -> Result<String, String> {
    let ordinary = connect::connect(target, APPLICATION).await;
    let replication = ReplicationConnection::connect(target, APPLICATION).await;
    match (ordinary, replication) {
        (Ok(client), Ok(mut replication)) => {
            slot::identify(&mut replication).await.unwrap();
            let pid = replication.backend_pid();
            let sql = format!(
                "SELECT string_agg(DISTINCT CASE WHEN ssl THEN 'tls' ELSE 'plain' END, ' and ')
                   FROM pg_stat_ssl WHERE pid IN (pg_backend_pid(), {pid})"
            );
            Ok(ask(&client, &sql).await)
        }
        (Err(ordinary), Err(replication)) => {
            assert_eq!(ordinary.to_string(), replication.to_string());
            for error in [&ordinary, &replication] {
                assert_eq!(error.disposition(), Disposition::Stop, "{error:?}");
                assert!(!format!("{error} {error:?}").contains("hunter2"), "{error:?}");
            }
            assert!(!ordinary.to_string().contains('\n'), "{ordinary}");
            Err(ordinary.to_string())
        }
        (ordinary, replication) => {
            panic!("{:?} for one and {:?} for the other", ordinary.map(|_| ()), replication.map(|_| ()))
        }
    }
}

/// Compares with [`outcome`]; errors by a part of their text.
#[track_caller]
fn held(what: &str, outcome: &Result<String, String>, wanted: Result<&str, &str>) {
    let holds = match (outcome, wanted) {
        (Ok(outcome), Ok(wanted)) => outcome == wanted,
        (Err(outcome), Err(wanted)) => outcome.contains(wanted),
        _ => false,
    };
    assert!(holds, "{what}: {outcome:?} instead of {wanted:?}");
}

#[tokio::test]
async fn every_mode_takes_the_certificates_that_it_should() {
    let (ours, theirs, files) = (ca("ours"), ca("theirs"), Files::new());
    let good = params("localhost", &["localhost", "127.0.0.1"]);
    let mut server = with_open_role(encrypted(OPEN, &signed(&ours, &good), &ours)).await;
    let port = server.port();
    let ours_file = files.put("ours.pem", &ours.pem()).display().to_string();
    let theirs_file = files.put("theirs.pem", &(theirs.pem() + &ca("another").pem())).display().to_string();
    let (trusting, mistaken) = (format!("&sslrootcert={ours_file}"), format!("&sslrootcert={theirs_file}"));
    let stranger = format!("has a certificate that none in {theirs_file} has signed: name the file");
    let elsewhere = "&hostaddr=127.0.0.1";

    for (host, options, wanted) in [
        ("localhost", "sslmode=disable".to_owned(), Ok("plain")),
        ("localhost", String::new(), Ok("tls")),
        ("localhost", "sslmode=allow".to_owned(), Ok("tls")),
        ("localhost", "sslmode=prefer".to_owned(), Ok("tls")),
        // It would accept clear text as well.
        ("localhost", format!("sslmode=prefer{mistaken}"), Ok("tls")),
        ("localhost", "sslmode=require".to_owned(), Ok("tls")),
        ("localhost", format!("sslmode=require{trusting}"), Ok("tls")),
        ("localhost", format!("sslmode=require{mistaken}"), Err(stranger.as_str())),
        ("other.example", format!("sslmode=require{trusting}{elsewhere}"), Ok("tls")),
        ("localhost", format!("sslmode=verify-ca{trusting}"), Ok("tls")),
        ("localhost", format!("sslmode=verify-ca{mistaken}"), Err(&stranger)),
        ("other.example", format!("sslmode=verify-ca{trusting}{elsewhere}"), Ok("tls")),
        ("localhost", format!("sslmode=verify-full{trusting}"), Ok("tls")),
        ("127.0.0.1", format!("sslmode=verify-full{trusting}"), Ok("tls")),
        ("localhost", format!("sslmode=verify-full{mistaken}"), Err(&stranger)),
        ("other.example", format!("sslmode=verify-full{trusting}{elsewhere}"), Err("localhost")),
        ("127.0.0.1", format!("sslmode=verify-full&channel_binding=require{trusting}"), Err("channel_binding=require")),
    ] {
        let outcome = outcome(&target("open", host, port, &options)).await;
        held(&format!("{host} {options}"), &outcome, wanted);
    }
    // Unix sockets are never encrypted, and need not be.
    let socket =
        format!("host={} port={port} user=postgres dbname=postgres sslmode=require", server.sockets().display());
    held("socket", &outcome(&PostgresTarget::parse(&socket, &HashMap::new()).unwrap()).await, Ok("plain"));
    // Without a file, the system's certificate store is used, if there is one.
    match PostgresTarget::parse(
        &format!("postgres://open@localhost:{port}/postgres?sslmode=verify-full"),
        &HashMap::new(),
    ) {
        Ok(target) => held("system", &outcome(&target).await, Err("this machine's store")),
        Err(error) => assert!(error.to_string().contains("ca-certificates"), "{error}"),
    }

    show(&mut server, &signed(&ours, &params("other.example", &["other.example", "third.example"])));
    for (host, options, wanted) in [
        ("localhost", format!("sslmode=require{trusting}"), Ok("tls")),
        ("localhost", format!("sslmode=verify-ca{trusting}"), Ok("tls")),
        ("localhost", format!("sslmode=verify-full{trusting}"), Err("other.example")),
        ("127.0.0.1", format!("sslmode=verify-full{trusting}"), Err("third.example")),
        ("third.example", format!("sslmode=verify-full{trusting}{elsewhere}"), Ok("tls")),
    ] {
        held(&format!("{host} {options}"), &outcome(&target("open", host, port, &options)).await, wanted);
    }

    let mut expired = good.clone();
    expired.not_after = date_time_ymd(2020, 1, 1);
    show(&mut server, &signed(&ours, &expired));
    for (options, wanted) in [
        ("sslmode=require".to_owned(), Ok("tls")),
        (format!("sslmode=require{trusting}"), Err("has expired: renew it")),
        (format!("sslmode=verify-ca{trusting}"), Err("has expired")),
        (format!("sslmode=verify-full{trusting}"), Err("has expired")),
    ] {
        held(&options, &outcome(&target("open", "localhost", port, &options)).await, wanted);
    }

    let own = self_signed(&["localhost"]);
    show(&mut server, &own);
    let named = format!("&sslrootcert={}", files.put("own.pem", &own.certificate.pem()).display());
    for (host, options, wanted) in [
        ("localhost", format!("sslmode=verify-full{named}"), Ok("tls")),
        ("127.0.0.1", format!("sslmode=verify-full{named}"), Err("sslmode=verify-ca")),
        ("127.0.0.1", format!("sslmode=verify-ca{named}"), Ok("tls")),
        ("localhost", format!("sslmode=verify-ca{trusting}"), Err("certificate")),
    ] {
        held(&format!("{host} {options}"), &outcome(&target("open", host, port, &options)).await, wanted);
    }
}

/// Self-signed, and of version 1, as `openssl x509 -req` creates it before OpenSSL 3.2, followed by its key.
const VERSION_1: &str = include_str!("fixtures/version_1.pem");

#[tokio::test]
async fn old_certificates_will_do_where_nobody_verifies_them() {
    let (ours, files) = (ca("ours"), Files::new());
    let mut server = with_open_role(encrypted(OPEN, &self_signed(&["localhost"]), &ours)).await;
    show_pem(&mut server, VERSION_1, VERSION_1);
    let named = files.put("version_1.pem", VERSION_1).display().to_string();
    for (options, wanted) in [
        ("sslmode=require".to_owned(), Ok("tls")),
        // Read by the server only, which trusts others.
        (format!("sslmode=require&sslcert={named}&sslkey={named}"), Err("refuses our certificate")),
        (format!("sslmode=verify-ca&sslrootcert={named}"), Err("make it of version 3")),
    ] {
        held(&options, &outcome(&target("open", "localhost", server.port(), &options)).await, wanted);
    }
}

/// Returns an address of this machine that others can reach, too.
fn own_address() -> Option<IpAddr> {
    let socket = UdpSocket::bind("0.0.0.0:0").ok()?;
    // Nothing is sent: this is the address from which a packet would be sent.
    socket.connect("192.0.2.1:9").ok()?;
    Some(socket.local_addr().ok()?.ip()).filter(|ip| !ip.is_loopback() && !ip.is_unspecified())
}

#[tokio::test]
async fn a_server_without_tls_is_spoken_to_where_plaintext_is_meant() {
    let server = with_open_role(Server::start_guarded(&[("listen_addresses", "*")], OPEN)).await;
    let port = server.port();
    for mode in ["", "sslmode=disable", "sslmode=allow", "sslmode=prefer"] {
        held(mode, &outcome(&target("open", "127.0.0.1", port, mode)).await, Ok("plain"));
    }
    let outcome_of = async |host: &str, options: &str| outcome(&target("open", host, port, options)).await;
    held(
        "require",
        &outcome_of("127.0.0.1", "sslmode=require").await,
        Err("offers no TLS, which sslmode=require asks for"),
    );
    held("bound", &outcome_of("127.0.0.1", "channel_binding=require").await, Err("channel_binding=require"));
    let Some(ip) = own_address().map(|ip| ip.to_string()) else { return };
    for mode in ["", "sslmode=allow", "sslmode=prefer"] {
        let outcome = outcome_of(&ip, mode).await;
        held(mode, &outcome, Err("not this machine"));
        held(mode, &outcome, Err("sslmode=disable in postgres.url if plaintext is meant"));
    }
    held("disable", &outcome_of(&ip, "sslmode=disable").await, Ok("plain"));
}

/// What is between the client and the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Middle {
    /// Terminates our encrypted connection, and opens one of its own to the server.
    Eavesdropper,
    /// A proxy that expects TLS from the first byte, and uses clear text to the server.
    Proxy,
    /// The same, but without ALPN.
    Silent,
}

/// Returns the configuration of a server that presents this certificate.
pub fn shown(pair: &Pair) -> ServerConfig {
    let key = PrivatePkcs8KeyDer::from(pair.key.serialize_der());
    let config = ServerConfig::builder_with_provider(ring::default_provider().into());
    let config = config.with_safe_default_protocol_versions().unwrap().with_no_client_auth();
    config.with_single_cert(vec![pair.certificate.der().clone()], key.into()).unwrap()
}

async fn between(port: u16, pair: &Pair, who: Middle) -> u16 {
    let mut config = shown(pair);
    if who == Middle::Proxy {
        config.alpn_protocols = vec![b"postgresql".to_vec()];
    }
    let acceptor = TlsAcceptor::from(std::sync::Arc::new(config));
    let settings = TlsSettings { verify: Verify::Nothing, roots: Roots::System, identity: None };
    let connector = TlsConnector::from(settings.client_config().unwrap());
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let own = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        loop {
            let (mut near, _) = listener.accept().await.unwrap();
            let (acceptor, connector) = (acceptor.clone(), connector.clone());
            tokio::spawn(async move {
                let mut request = [0; 8];
                if who == Middle::Eavesdropper {
                    near.read_exact(&mut request).await?;
                    near.write_all(b"S").await?;
                }
                let mut near = acceptor.accept(near).await?;
                let mut far = TcpStream::connect(("127.0.0.1", port)).await?;
                match who {
                    Middle::Eavesdropper => {
                        far.write_all(&request).await?;
                        far.read_u8().await?;
                        let mut far = connector.connect(ServerName::try_from("localhost").unwrap(), far).await?;
                        copy_bidirectional(&mut near, &mut far).await
                    }
                    Middle::Proxy | Middle::Silent => {
                        let agreed = (who == Middle::Proxy).then_some(&b"postgresql"[..]);
                        assert_eq!(near.get_ref().1.alpn_protocol(), agreed);
                        copy_bidirectional(&mut near, &mut far).await
                    }
                }
            });
        }
    });
    own
}

#[tokio::test]
async fn a_login_is_bound_to_the_connection_that_it_came_over() {
    let (ours, files) = (ca("ours"), Files::new());
    let hba = "local all all trust\n\
               host all clear all password\nhost all md5er all md5\nhost all scram all scram-sha-256\n\
               host all open all trust\n";
    let server = encrypted(hba, &signed(&ours, &params("localhost", &["localhost"])), &ours);
    let port = server.port();
    let client = connect::connect(&server.socket("postgres", "postgres"), APPLICATION).await.unwrap();
    run(
        &client,
        "CREATE ROLE open LOGIN REPLICATION;
         CREATE ROLE clear LOGIN REPLICATION PASSWORD 'hunter2';
         SET password_encryption = md5; CREATE ROLE md5er LOGIN REPLICATION PASSWORD 'hunter2';
         SET password_encryption = 'scram-sha-256'; CREATE ROLE scram LOGIN REPLICATION PASSWORD 'hunter2'",
    )
    .await;
    let trusting = format!("sslmode=verify-full&sslrootcert={}", files.put("ca.pem", &ours.pem()).display());
    let unbound = Err("does not bind the login");
    for (role, options, wanted) in [
        ("scram:hunter2", "sslmode=disable", Ok("plain")),
        ("scram:hunter2", "sslmode=disable&channel_binding=require", unbound),
        ("scram:hunter2", "channel_binding=disable", Ok("tls")),
        ("scram:hunter2", "channel_binding=prefer", Ok("tls")),
        ("scram:hunter2", "channel_binding=require", Ok("tls")),
        ("scram:hunter3", "channel_binding=require", Err("password authentication failed")),
        ("scram", "channel_binding=require", Err("none is configured")),
        ("clear:hunter2", "channel_binding=prefer", Ok("tls")),
        ("md5er:hunter2", "channel_binding=prefer", Ok("tls")),
        ("clear:hunter2", "channel_binding=require", unbound),
        ("md5er:hunter2", "channel_binding=require", unbound),
        ("open", "channel_binding=require", unbound),
    ] {
        for options in [options.to_owned(), format!("{trusting}&{options}")] {
            // If an option is given twice, the last one applies.
            held(&format!("{role} {options}"), &outcome(&target(role, "localhost", port, &options)).await, wanted);
        }
    }

    // The same with a man in the middle, whom sslmode=require does not detect.
    let middle = between(port, &self_signed(&["localhost"]), Middle::Eavesdropper).await;
    for (options, wanted) in [
        ("sslmode=require&channel_binding=disable", Ok("tls")),
        ("sslmode=require", Err("SCRAM channel binding check failed")),
        ("sslmode=require&channel_binding=require", Err("SCRAM channel binding check failed")),
        (trusting.as_str(), Err("certificate")),
    ] {
        held(options, &outcome(&target("scram:hunter2", "localhost", middle, options)).await, wanted);
    }

    // With a proxy that encrypts in front of the server, channel binding is impossible, but connections work.
    let pair = signed(&ours, &params("localhost", &["localhost"]));
    let proxy = between(port, &pair, Middle::Proxy).await;
    let direct = format!("{trusting}&sslnegotiation=direct");
    held("direct", &outcome(&target("scram:hunter2", "localhost", proxy, &direct)).await, Ok("plain"));
    // A server of another protocol might have the same certificate.
    let silent = between(port, &pair, Middle::Silent).await;
    let disagrees = Err("does not agree over TLS to speak Postgres's protocol");
    held("silent", &outcome(&target("scram:hunter2", "localhost", silent, &direct)).await, disagrees);
}

#[tokio::test]
async fn our_own_certificate_lets_us_in() {
    let (ours, theirs, files) = (ca("ours"), ca("theirs"), Files::new());
    let hba = "local all all trust\n\
               hostssl all certified all cert\n\
               hostssl all twofold all scram-sha-256 clientcert=verify-full\n";
    let server = encrypted(hba, &signed(&ours, &params("localhost", &["localhost"])), &ours);
    let client = connect::connect(&server.socket("postgres", "postgres"), APPLICATION).await.unwrap();
    run(&client, "CREATE ROLE certified LOGIN REPLICATION; CREATE ROLE twofold LOGIN REPLICATION PASSWORD 'hunter2'")
        .await;
    let certified = files.identity("certified", &signed(&ours, &params("certified", &[])));
    let both = files.identity("both", &signed(&ours, &params("twofold", &[])));
    let foreign = files.identity("foreign", &signed(&theirs, &params("certified", &[])));
    for (role, identity, wanted) in [
        ("certified", certified.as_str(), Ok("tls")),
        ("certified", "", Err("sslcert")),
        ("certified", &both, Err("certificate authentication failed")),
        ("certified", &foreign, Err("refuses our certificate (UnknownCA)")),
        ("twofold:hunter2", &both, Ok("tls")),
        ("twofold:hunter2", "", Err("sslcert")),
        // The only error that Postgres reports for a certificate of another role.
        ("twofold:hunter2", &certified, Err("password authentication failed")),
        ("twofold:hunter3", &both, Err("password authentication failed")),
    ] {
        let options = format!("sslmode=require&{identity}");
        let outcome = outcome(&target(role, "localhost", server.port(), &options)).await;
        held(&format!("{role} {options}"), &outcome, wanted);
    }
    // Where libpq looks for them.
    let home = tempfile::tempdir().unwrap();
    let usual = home.path().join(".postgresql");
    std::fs::create_dir(&usual).unwrap();
    for (from, to) in [("certified.crt", "postgresql.crt"), ("certified.key", "postgresql.key")] {
        std::fs::copy(files.0.path().join(from), usual.join(to)).unwrap();
    }
    std::fs::write(usual.join("root.crt"), ours.pem()).unwrap();
    let env = [
        ("HOME", home.path().display().to_string()),
        ("PGHOST", "localhost".to_owned()),
        ("PGPORT", server.port().to_string()),
        ("PGUSER", "certified".to_owned()),
        ("PGDATABASE", "postgres".to_owned()),
        ("PGSSLMODE", "verify-full".to_owned()),
    ];
    let env: HashMap<String, String> = env.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
    held("environment", &outcome(&PostgresTarget::parse("postgres://", &env).unwrap()).await, Ok("tls"));
}

#[tokio::test]
async fn loads_and_the_stream_run_over_tls() {
    let ours = ca("ours");
    let server = encrypted(OPEN, &signed(&ours, &params("localhost", &["localhost"])), &ours);
    let superuser = format!("postgres:{}", servers::postgres_password());
    let target = target(&superuser, "localhost", server.port(), "sslmode=require");
    let client = connect::connect(&target, APPLICATION).await.unwrap();
    run(&client, "CREATE TABLE public.t (id int PRIMARY KEY, v text); CREATE PUBLICATION p FOR TABLE public.t").await;
    let mut replication = ReplicationConnection::connect(&target, APPLICATION).await.unwrap();
    let temporary = new_slot::create_temporary(&mut replication, "s").await.unwrap();
    let from = new_slot::name_slot(&client, &mut replication, &temporary, "s").await.unwrap();
    let copy = replication.start("s", "p", from).await.unwrap();
    let mut stream = stream::spawn(copy, tables(&client).await);
    // Values that take several TLS records, and enough rows for several reads.
    run(
        &client,
        "INSERT INTO public.t SELECT n, repeat('v', 1000) FROM generate_series(1, 50000) n;
         INSERT INTO public.t VALUES (0, repeat('x', 3000000))",
    )
    .await;
    let mut bytes = 0;
    while bytes < 53_000_000 {
        let delivered = timeout(PATIENCE, stream.deliveries.recv()).await.expect("the stream goes on");
        let Some(delivered) = delivered else { panic!("{}", stream.ended().await) };
        bytes += delivered.bytes;
    }
    stream.finish(None).await;

    // One that is interrupted: the cancel request also uses TLS.
    let name = QualifiedName { schema: "public".to_owned(), table: "t".to_owned() };
    let table = snapshot::describe(&client, &name, "p", &[], Sizes::Measured).await.unwrap().unwrap();
    let all = Range::leaf(0);
    let read_all = async |max_bytes| {
        let part = Part { table: &table, range: &all };
        match snapshot::read_range(&client, part, max_bytes, |_| {}).await.unwrap() {
            ReadRange::Rows(read) => (read.rows, read.rest),
            ReadRange::Gone => panic!("it is there"),
        }
    };
    assert!(read_all(1000).await.1.is_some());
    assert!(server.log_end().contains("canceling statement due to user request"), "{}", server.log_end());
    assert_eq!(read_all(usize::MAX).await, (50_001, None));
    // Nothing of it was sent in clear text.
    assert_eq!(
        ask(
            &client,
            "SELECT count(*) FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) WHERE client_port > 0 AND NOT ssl"
        )
        .await,
        "0"
    );
}

/// Returns a port on which nothing listens.
fn closed() -> u16 {
    servers::free_port().unwrap()
}

#[tokio::test]
async fn of_several_servers_the_first_that_will_do_is_taken() {
    let primary = Server::start(&[]);
    let mut standby = Server::start(&[]);
    give(&standby.data(), "standby.signal", "");
    standby.stop();
    standby.start_again();
    let (closed, primary_port, standby_port) = (closed(), primary.port(), standby.port());
    let list = |ports: &[u16], options: &str| {
        let hosts: Vec<String> = ports.iter().map(|port| format!("127.0.0.1:{port}")).collect();
        let (password, hosts) = (servers::postgres_password(), hosts.join(","));
        let url = format!("postgres://postgres:{password}@{hosts}/postgres?{options}");
        PostgresTarget::parse(&url, &HashMap::new()).unwrap()
    };
    let both = [closed, standby_port, primary_port];
    for (ports, attrs, wanted) in [
        (&[closed, primary_port][..], "any", Some(primary_port)),
        (&both, "any", Some(standby_port)),
        (&both, "read-write", Some(primary_port)),
        (&both, "primary", Some(primary_port)),
        (&[primary_port, standby_port], "read-only", Some(standby_port)),
        (&[primary_port, standby_port], "standby", Some(standby_port)),
        (&[primary_port, standby_port], "prefer-standby", Some(standby_port)),
        (&[closed, primary_port], "prefer-standby", Some(primary_port)),
        (&[closed], "any", None),
        (&[standby_port], "read-write", None),
        (&[primary_port], "standby", None),
    ] {
        let target = list(ports, &format!("target_session_attrs={attrs}"));
        let ordinary = connect::connect(&target, APPLICATION).await;
        let replication = ReplicationConnection::connect(&target, APPLICATION).await;
        match (ordinary, replication, wanted) {
            (Ok(client), Ok(mut replication), Some(wanted)) => {
                assert_eq!(ask(&client, "SHOW port").await, wanted.to_string(), "{target:?} {attrs}");
                let rows = replication.query("SHOW port").await.unwrap();
                assert_eq!(rows, [[Some(wanted.to_string())]], "{target:?} {attrs}");
            }
            (Err(ordinary), Err(replication), None) => {
                assert_eq!(ordinary.to_string(), replication.to_string());
                assert_eq!(ordinary.disposition(), Disposition::Retry, "{ordinary:?}");
                assert!(ports == [closed] || ordinary.to_string().contains("target_session_attrs"), "{ordinary}");
            }
            (ordinary, replication, _) => panic!("{attrs}: {:?}, {:?}", ordinary.map(|_| ()), replication.map(|_| ())),
        }
    }
}

#[tokio::test]
async fn a_server_that_says_nothing_is_given_up() {
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = silent.local_addr().unwrap().port();
    for options in ["connect_timeout=1", "connect_timeout=1&sslmode=disable"] {
        let target = target("open", "127.0.0.1", port, options);
        let ordinary = connect::connect(&target, APPLICATION).await.err().unwrap();
        let replication = ReplicationConnection::connect(&target, APPLICATION).await.err().unwrap();
        assert_eq!(ordinary.to_string(), replication.to_string());
        assert!(ordinary.to_string().contains("did not answer within 1 s"), "{ordinary}");
        assert_eq!(ordinary.disposition(), Disposition::Retry);
    }
}
