//! Looks up the password that a connection string leaves out where libpq would look for it.
//!
//! <https://www.postgresql.org/docs/current/libpq-pgpass.html>

use super::Warning;
use crate::code::Code;
use crate::password::{PassedOver, Password, PasswordError, PgPass};
use crate::source::target::{Host, PostgresTarget};
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// Socket directories that a password file calls `localhost`: the default of Postgres, and that of Debian's packages.
const DEFAULT_SOCKETS: [&str; 2] = ["/tmp", "/var/run/postgresql"];

/// `PGPASSWORD`, otherwise the first matching line of `PGPASSFILE` or `~/.pgpass`, which need not exist yet.
pub(super) fn password(
    target: &PostgresTarget,
    env: &HashMap<String, String>,
    warnings: &mut Vec<Warning>,
) -> Result<Password, PasswordError> {
    let set = |name: &str| env.get(name).filter(|value| !value.is_empty());
    if let Some(password) = set("PGPASSWORD") {
        return Ok(Password::Literal(password.clone()));
    }
    let file = match (set("PGPASSFILE"), set("HOME")) {
        (Some(file), _) => PathBuf::from(file),
        (None, Some(home)) => Path::new(home).join(".pgpass"),
        (None, None) => return Ok(Password::None),
    };
    let server =
        |(host, port): (&Host, u16)| [name(host), port.to_string(), target.database.clone(), target.user.clone()];
    let wanted = target.servers.iter().map(|s| server((&s.host, s.port))).collect();
    let pgpass = PgPass { file, wanted };
    if let Err(PassedOver::Because(why)) = pgpass.read()? {
        warnings.push(Warning { code: Code::SecretUnavailable, text: why });
    }
    Ok(Password::PgPass(pgpass))
}

/// Returns the name of a server in a password file.
fn name(host: &Host) -> String {
    match host {
        Host::Tcp { name, .. } => name.clone(),
        Host::Socket(directory) if DEFAULT_SOCKETS.iter().any(|d| directory == Path::new(d)) => "localhost".to_owned(),
        Host::Socket(directory) => directory.display().to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn private(text: &str, mode: u32) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(&file, text).unwrap();
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(mode)).unwrap();
        file
    }

    fn look(url: &str, file: &Path, more: &[(&str, &str)]) -> (Result<Option<String>, PasswordError>, Vec<Warning>) {
        let mut env: HashMap<String, String> = more.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect();
        env.insert("PGPASSFILE".to_owned(), file.display().to_string());
        let mut warnings = Vec::new();
        let target = PostgresTarget::parse(url, &HashMap::new()).unwrap();
        (password(&target, &env, &mut warnings).map(|password| password.to_hide()), warnings)
    }

    #[test]
    fn the_first_fitting_line_holds() {
        for (lines, password) in [
            ("h:5432:shop:me:pw", Some("pw")),
            ("# a comment\n\nh:5432:shop:you:no\n*:*:*:me:yes\nh:5432:shop:me:late", Some("yes")),
            ("h:5433:shop:me:pw", None),
            ("h:*:shop:me:a\\:b\\\\c", Some("a:b\\c")),
            ("h:*:shop:me:00123\r\n", Some("00123")),
            ("h:*:shop:me:first:second", Some("first")),
            ("\\*:*:*:*:pw", None),
            ("h:*:shop:me", None),
            ("h:*:shop:me:", None),
        ] {
            let file = private(lines, 0o600);
            let (found, warnings) = look("postgres://me@h/shop", file.path(), &[]);
            assert_eq!(found, Ok(password.map(str::to_owned)), "{lines:?}");
            assert!(warnings.is_empty(), "{warnings:?}");
        }
    }

    #[test]
    fn a_file_that_others_can_read_is_passed_over() {
        let file = private("*:*:*:*:pw", 0o644);
        let (found, warnings) = look("postgres://me@h/shop", file.path(), &[]);
        assert_eq!((found, warnings.len()), (Ok(None), 1));
    }

    #[test]
    fn the_variable_comes_before_the_file() {
        let file = private("*:*:*:*:pw", 0o600);
        let (found, _) = look("postgres://me@h/shop", file.path(), &[("PGPASSWORD", "00123")]);
        assert_eq!(found, Ok(Some("00123".to_owned())));
    }

    #[test]
    fn sockets_and_several_servers_are_looked_up_as_libpq_does() {
        let file = private("localhost:5432:shop:me:socket\na:1:shop:me:one\nb:2:shop:me:one\nc:*:*:*:other", 0o600);
        for (url, wanted) in [
            ("host=/var/run/postgresql user=me dbname=shop", Ok(Some("socket"))),
            ("host=/elsewhere user=me dbname=shop", Ok(None)),
            ("postgres://me@a:1,b:2/shop", Ok(Some("one"))),
            ("postgres://me@z:1,b:2/shop", Ok(Some("one"))),
            ("postgres://me@a:1,c:2/shop", Err(())),
        ] {
            let (found, _) = look(url, file.path(), &[]);
            if let Err(error) = &found {
                assert!(!error.to_string().contains("other"), "{error}");
            }
            assert_eq!(found.map_err(|_| ()), wanted.map(|w| w.map(str::to_owned)), "{url}");
        }
    }
}
