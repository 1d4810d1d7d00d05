//! Every way to connect to Redis: encrypted, with client certificates, through Sentinels, with replicas or a file to
//! wait for; and the messages if something is wrong.

use crate::harness::{Cluster, Daemon, Feature, Postgres, Redis, Settings, eventually};
use nix::sys::signal::Signal;
use prefetchd::cli::servers::{self, redis_password};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

const FIRST: &str = "cache:category:cat-001";

/// A directory of certificates, all signed by one authority.
struct Certificates {
    dir: TempDir,
    authority: CertifiedIssuer<'static, KeyPair>,
}

impl Certificates {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, "an authority of the tests");
        let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let dir = TempDir::new().unwrap();
        std::fs::write(dir.path().join("ca.crt"), authority.pem()).unwrap();
        // If the tests run as root, Redis runs as another user.
        open_to(dir.path(), 0o755);
        Self { dir, authority }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    /// Creates `name.crt` and `name.key`.
    fn sign(&self, name: &str, hosts: &[&str]) {
        let mut params = CertificateParams::new(hosts.iter().map(|&h| h.to_owned()).collect::<Vec<_>>()).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.authority).unwrap();
        for (file, pem) in [("crt", certificate.pem()), ("key", key.serialize_pem())] {
            let path = self.path(&format!("{name}.{file}"));
            std::fs::write(&path, pem).unwrap();
            open_to(&path, 0o644);
        }
    }

    /// A Redis that also listens with TLS, on the returned port.
    fn redis(&self, server: &str, clients: &str) -> (Redis, u16) {
        self.redis_with(server, clients, &[])
    }

    fn redis_with(&self, server: &str, clients: &str, args: &[&str]) -> (Redis, u16) {
        let port = servers::free_port().unwrap();
        let (port_text, ca) = (port.to_string(), self.text("ca.crt"));
        let (certificate, key) = (self.text(&format!("{server}.crt")), self.text(&format!("{server}.key")));
        let tls = [
            "--tls-port",
            &port_text,
            "--tls-cert-file",
            &certificate,
            "--tls-key-file",
            &key,
            "--tls-ca-cert-file",
            &ca,
            "--tls-auth-clients",
            clients,
        ];
        (Redis::with(&[&tls, args].concat()), port)
    }
}

fn open_to(path: &Path, mode: u32) {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}

/// Loads, follows, and answers reads over this URL, as the daemon's user.
async fn works(postgres: &Postgres, redis: &Redis, url: &str) {
    let url = match url.strip_prefix("unix://") {
        Some(path) => format!("unix://{path}?{}", redis.login().replace(':', "&pass=").replacen("", "user=", 1)),
        None => url.replace("://", &format!("://{}@", redis.login())),
    };
    let daemon = Daemon::with(&Settings::new(postgres, redis).text("redis.url", &url)).await;
    daemon.ready().await;
    let lsn = postgres.execute("UPDATE categories SET display_order = display_order + 1 WHERE id = 'cat-001'").await;
    daemon.applied(lsn).await;
    let answer = daemon.get("/v1/tables/categories/cat-001").await;
    assert_eq!(answer.status, 200, "{url}");
    assert_eq!(daemon.stop().await, Some(0));
}

fn refused(postgres: &Postgres, redis: &Redis, url: &str, parts: &[&str]) {
    let (code, said) = Daemon::refused(&Settings::new(postgres, redis).text("redis.url", url));
    assert_eq!(code, Some(78), "{url}: {said}");
    for part in parts {
        assert!(said.contains(part), "{url}: {part:?} is not in {said}");
    }
    assert!(!said.contains("hunter2"), "{said}");
}

#[tokio::test]
async fn an_encrypted_redis_is_used_where_its_certificate_is_right() {
    if Redis::lacks(Feature::Tls).await {
        return;
    }
    let certificates = Certificates::new();
    certificates.sign("server", &["localhost", "127.0.0.1"]);
    let (redis, port) = certificates.redis("server", "no");
    let (postgres, ca) = (Postgres::shared(), certificates.text("ca.crt"));
    works(&postgres, &redis, &format!("rediss://127.0.0.1:{port}/0?cacert={ca}")).await;
    works(&postgres, &redis, &format!("rediss://localhost:{port}/0?cacert={ca}")).await;
    works(&postgres, &redis, &format!("rediss://127.0.0.1:{port}/0?insecure")).await;
    works(&postgres, &redis, &format!("unix://{}", redis.socket().display())).await;

    let stranger = Certificates::new();
    let unknown = ["127.0.0.1", "invalid peer certificate", "cacert"];
    refused(&postgres, &redis, &format!("rediss://127.0.0.1:{port}/0?cacert={}", stranger.text("ca.crt")), &unknown);
    refused(&postgres, &redis, &format!("rediss://127.0.0.1:{port}/0"), &["127.0.0.1", "cacert"]);
}

#[tokio::test]
async fn an_encrypted_cluster_is_used_at_the_ports_that_it_announces_for_tls() {
    if Redis::lacks(Feature::Tls).await {
        return;
    }
    let certificates = Certificates::new();
    certificates.sign("server", &["127.0.0.1"]);
    // Before 7.2 a node announces the same port to all its clients: with tls-cluster, the one for TLS.
    let args = ["--cluster-enabled", "yes", "--tls-cluster", "yes", "--tls-replication", "yes"];
    let nodes = (0..3).map(|_| certificates.redis_with("server", "no", &args));
    let (nodes, ports): (Vec<Redis>, Vec<u16>) = nodes.unzip();
    let (postgres, cluster) = (Postgres::shared(), Cluster::of(nodes, 3).await);
    let (login, ca) = (cluster.node(0).login(), certificates.text("ca.crt"));
    let url = format!("rediss+cluster://{login}@127.0.0.1:{}?cacert={ca}", ports[0]);
    let table = "[[tables]]\nname = \"categories\"\ntable = \"public.categories\"\n";
    let key = format!("key = \"{{{{{}}}}}:category:{{id}}\"\n", postgres.slot());
    let settings = Settings::on_cluster(&postgres, &cluster).tables(&format!("{table}{key}")).text("redis.url", &url);
    let daemon = Daemon::with(&settings).await;
    daemon.ready().await;
    assert_eq!(daemon.get("/v1/tables/categories/cat-001").await.status, 200);
    let home = cluster.server_of(&format!("{{{}}}", postgres.slot())).await;
    let clients: String = home.command(&["CLIENT", "LIST"]).await;
    let tls = ports[cluster.nodes().iter().position(|node| node.port() == home.port()).unwrap()];
    let writer = clients.lines().find(|client| client.contains("name=prefetchd")).unwrap();
    assert!(writer.contains(&format!("laddr=127.0.0.1:{tls}")), "{writer}");
    assert_eq!(daemon.stop().await, Some(0));
}

#[tokio::test]
async fn a_certificate_for_another_host_is_refused() {
    if Redis::lacks(Feature::Tls).await {
        return;
    }
    let certificates = Certificates::new();
    certificates.sign("server", &["redis.example.com"]);
    let (redis, port) = certificates.redis("server", "no");
    let url = format!("rediss://127.0.0.1:{port}/0?cacert={}", certificates.text("ca.crt"));
    refused(
        &Postgres::shared(),
        &redis,
        &url,
        &["127.0.0.1", "not valid for name", "the host name as in the certificate"],
    );
}

#[tokio::test]
async fn a_redis_that_wants_client_certificates_gets_one_or_says_so() {
    if Redis::lacks(Feature::Tls).await {
        return;
    }
    let certificates = Certificates::new();
    certificates.sign("server", &["127.0.0.1"]);
    certificates.sign("client", &["prefetchd"]);
    // Readable by us only: a key that others can read causes a warning.
    open_to(&certificates.path("client.key"), 0o600);
    let (redis, port) = certificates.redis("server", "yes");
    let (postgres, ca) = (Postgres::shared(), certificates.text("ca.crt"));
    let ours = format!("cert={}&key={}", certificates.text("client.crt"), certificates.text("client.key"));
    works(&postgres, &redis, &format!("rediss://127.0.0.1:{port}/0?cacert={ca}&{ours}")).await;
    refused(
        &postgres,
        &redis,
        &format!("rediss://127.0.0.1:{port}/0?cacert={ca}"),
        &["rejected the connection", "cert=FILE"],
    );
}

#[tokio::test]
async fn a_wrong_password_is_one_clear_line() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let port = redis.port();
    refused(&postgres, &redis, &format!("redis://:hunter2@127.0.0.1:{port}/0"), &["WRONGPASS", "redis.password_file"]);
    refused(&postgres, &redis, &format!("redis://127.0.0.1:{port}/0"), &["NOAUTH", "redis.password_file"]);
    let url = redis.url().replace("/0", "/3");
    let daemon = Daemon::with(&Settings::new(&postgres, &redis).text("redis.url", &url)).await;
    daemon.ready().await;
    assert_eq!(daemon.get("/v1/tables/categories/cat-001").await.status, 200);
}

#[tokio::test]
async fn a_closed_port_is_waited_for() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let url = format!("redis://127.0.0.1:{}/0", servers::free_port().unwrap());
    let daemon = Daemon::with(&Settings::new(&postgres, &redis).text("redis.url", &url)).await;
    daemon.allow_warnings();
    let status = daemon.status_when("waiting", |status| !status["waiting_for"].is_null()).await;
    assert!(status["waiting_for"].as_str().unwrap().contains("cannot reach Redis at 127.0.0.1"), "{status}");
    daemon.kill9();
}

/// Two servers, the second a replica of the first, and three Sentinels that watch them.
struct Watched {
    first: Redis,
    second: Redis,
    sentinels: Vec<Redis>,
}

impl Watched {
    async fn start() -> Self {
        let first = Redis::start();
        let master = first.port().to_string();
        let second = first.replica().await;
        let lines = format!(
            "sentinel monitor mymaster 127.0.0.1 {master} 2\n\
             sentinel down-after-milliseconds mymaster 500\n\
             sentinel failover-timeout mymaster 2000"
        );
        let sentinels = (1..=3).map(|_| Redis::configured(&lines, &["--sentinel"])).collect();
        Self { first, second, sentinels }
    }

    async fn settled(&self) {
        for sentinel in &self.sentinels {
            eventually(
                "a sentinel knows the others and the replica",
                async || {
                    let master: std::collections::HashMap<String, String> =
                        sentinel.command(&["SENTINEL", "MASTER", "mymaster"]).await;
                    (master["num-slaves"].clone(), master["num-other-sentinels"].clone())
                },
                |(replicas, others)| replicas == "1" && others == "2",
            )
            .await;
        }
    }

    fn url(&self) -> String {
        let at: Vec<String> = self.sentinels.iter().map(|s| format!("127.0.0.1:{}", s.port())).collect();
        // The first does not answer, so the others must be asked.
        let (login, password) = (self.first.login(), redis_password());
        format!(
            "redis+sentinel://{login}@127.0.0.1:{},{}/mymaster/0?sentinel_password={password}",
            servers::free_port().unwrap(),
            at.join(",")
        )
    }
}

#[tokio::test]
async fn sentinels_name_the_master_and_a_failover_is_followed() {
    let (postgres, watched) = (Postgres::shared(), Watched::start().await);
    watched.settled().await;
    let settings = Settings::new(&postgres, &watched.first).text("redis.url", &watched.url());
    // Users are not replicated, so whichever may become the master needs them, too.
    watched.second.daemon_user().grant(settings.redis_rules());
    let daemon = Daemon::with(&settings).await;
    daemon.allow_warnings();
    daemon.ready().await;
    assert_eq!(watched.first.hash(FIRST).await["name"], "Beverages");

    watched.first.signal(Signal::SIGSTOP);
    let lsn = postgres.execute("UPDATE categories SET name = 'Drinks' WHERE id = 'cat-001'").await;
    daemon.applied(lsn).await;
    daemon.ready().await;
    assert_eq!(watched.second.hash(FIRST).await["name"], "Drinks");
    assert_eq!(daemon.get("/v1/tables/categories/cat-001").await.json()["name"], "Drinks");

    // The old master comes back, is demoted, and must not be mistaken for the master again.
    watched.first.signal(Signal::SIGCONT);
    // A Sentinel closes all connections of a server that it demotes, including ours.
    let first_follows = async || {
        let connection = redis::Client::open(watched.first.url()).unwrap().get_multiplexed_async_connection().await;
        let Ok(mut connection) = connection else { return String::new() };
        redis::cmd("INFO").arg("replication").query_async::<String>(&mut connection).await.unwrap_or_default()
    };
    eventually("the old master is demoted", first_follows, |info| info.contains("role:slave")).await;
    let lsn = postgres.execute("UPDATE categories SET name = 'Beverages' WHERE id = 'cat-001'").await;
    daemon.applied(lsn).await;
    assert_eq!(watched.second.hash(FIRST).await["name"], "Beverages");
    assert_eq!(daemon.stop().await, Some(0));
}

#[tokio::test]
async fn a_master_that_no_sentinel_knows_is_said() {
    let (postgres, watched) = (Postgres::shared(), Watched::start().await);
    watched.settled().await;
    let url = watched.url().replace("mymaster", "other");
    let daemon = Daemon::with(&Settings::new(&postgres, &watched.first).text("redis.url", &url)).await;
    daemon.allow_warnings();
    let status = daemon.status_when("waiting", |status| !status["waiting_for"].is_null()).await;
    assert!(status["waiting_for"].as_str().unwrap().contains("knows no master \"other\""), "{status}");
    daemon.kill9();
}

#[tokio::test]
async fn a_change_is_confirmed_only_when_the_replica_has_it() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let replica = redis.replica().await;
    let daemon = Daemon::with(&Settings::new(&postgres, &redis).text("redis.durability", "replicas:1")).await;
    daemon.allow_warnings();
    daemon.ready().await;

    replica.signal(Signal::SIGSTOP);
    let lsn = postgres.execute("UPDATE categories SET name = 'Drinks' WHERE id = 'cat-001'").await;
    daemon.applied(lsn).await;
    assert_eq!(redis.hash(FIRST).await["name"], "Drinks", "readers need not wait");
    let stalled = daemon.status_when("stalled", |status| status["state"] == "stalled").await;
    assert!(stalled["waiting_for"].as_str().unwrap().contains("0 of 1 replicas"), "{stalled}");
    assert!(postgres.confirmed().await < lsn);

    replica.signal(Signal::SIGCONT);
    eventually("it is confirmed", async || postgres.confirmed().await, |at| *at >= lsn).await;
    daemon.ready().await;
    // Stopping confirms what was applied, here too.
    let lsn = postgres.execute("UPDATE categories SET name = 'Beverages' WHERE id = 'cat-001'").await;
    daemon.applied(lsn).await;
    assert_eq!(daemon.stop().await, Some(0));
    assert!(postgres.confirmed().await >= lsn);
}

#[tokio::test]
async fn a_durability_that_the_server_cannot_give_is_refused() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    for (wanted, parts) in [
        ("replicas:2", ["0 replicas are connected", "ask for fewer"]),
        // Before 7.2 there is no WAITAOF; later there is, but the file is off.
        ("aof", ["cannot provide redis.durability", "or another redis.durability"]),
    ] {
        let (code, said) = Daemon::refused(&Settings::new(&postgres, &redis).text("redis.durability", wanted));
        assert_eq!(code, Some(78), "{said}");
        assert!(parts.iter().all(|part| said.contains(part)), "{said}");
    }
}
