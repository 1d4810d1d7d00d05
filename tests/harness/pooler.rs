//! A PgBouncer between a daemon and its Postgres.

use super::Postgres;
use nix::unistd::{User, geteuid};
use prefetchd::cli::servers::{free_port, on_path, postgres_password};
use std::os::unix::fs::{PermissionsExt, chown};
use std::process::{Child, Command, Stdio};

pub struct Pooler {
    child: Child,
    url: String,
    _dir: tempfile::TempDir,
}

impl Pooler {
    /// Starts one in front of this database; `settings` are lines of pgbouncer.ini. Returns `None` if PgBouncer is not
    /// installed.
    pub async fn start(postgres: &Postgres, settings: &str) -> Option<Self> {
        let Some(program) = on_path(&["pgbouncer", "/usr/sbin/pgbouncer"]) else {
            println!("skipped: PgBouncer is not installed");
            return None;
        };
        let port = free_port().unwrap();
        let dir = tempfile::tempdir().unwrap();
        // PgBouncer refuses to run as root.
        let user = geteuid().is_root().then(|| User::from_name("nobody").unwrap().unwrap());
        let write = |name: &str, text: &str| {
            let file = dir.path().join(name);
            std::fs::write(&file, text).unwrap();
            std::fs::set_permissions(&file, PermissionsExt::from_mode(0o600)).unwrap();
            chown(&file, user.as_ref().map(|user| user.uid.as_raw()), None).unwrap();
            file
        };
        std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o711)).unwrap();
        let password = postgres_password();
        let users = write("users", &format!("\"prefetchd\" \"{password}\"\n\"postgres\" \"{password}\"\n"));
        let database = postgres.database();
        let config = format!(
            "[databases]\n{database} = host=127.0.0.1 port={} dbname={database}\n[pgbouncer]\nlisten_addr = 127.0.0.1\n\
             listen_port = {port}\nunix_socket_dir =\nauth_type = scram-sha-256\nauth_file = {}\n{settings}\n",
            postgres.port(),
            users.display()
        );
        let config = write("pgbouncer.ini", &config);
        // It is killed together with the test program.
        let mut command = Command::new(on_path(&["setpriv"])?);
        command.args(["--pdeathsig", "KILL"]);
        if let Some(user) = user {
            command.args([format!("--reuid={}", user.uid), format!("--regid={}", user.gid)]).arg("--clear-groups");
        }
        let log = std::fs::File::create(dir.path().join("log")).unwrap();
        let child = command.arg(program).arg(config).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let child = child.spawn().unwrap();
        let url = postgres.url("prefetchd").replace(&format!(":{}", postgres.port()), &format!(":{port}"));
        let pooler = Self { child, url, _dir: dir };
        let answers = async || tokio::net::TcpStream::connect(("127.0.0.1", port)).await.is_ok();
        super::eventually("PgBouncer listens", answers, |answers| *answers).await;
        Some(pooler)
    }

    /// The value for `postgres.url`.
    pub fn url(&self) -> &str {
        &self.url
    }
}

impl Drop for Pooler {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
