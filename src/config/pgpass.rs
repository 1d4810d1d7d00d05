//! The password that a connection string leaves out, where libpq would look for it.
//! <https://www.postgresql.org/docs/current/libpq-pgpass.html>

use super::{ConfigError, refuse};
use crate::source::target::{Host, PostgresTarget};
use std::collections::HashMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// Socket directories that the file calls `localhost`: the default of Postgres, and that of Debian's packages.
const DEFAULT_SOCKETS: [&str; 2] = ["/tmp", "/var/run/postgresql"];

/// `PGPASSWORD`, else the first fitting line of `PGPASSFILE` or `~/.pgpass`.
pub(super) fn password(
    target: &PostgresTarget,
    env: &HashMap<String, String>,
    warnings: &mut Vec<String>,
) -> Result<Option<String>, ConfigError> {
    let set = |name: &str| env.get(name).filter(|value| !value.is_empty());
    if let Some(password) = set("PGPASSWORD") {
        return Ok(Some(password.clone()));
    }
    let path = match (set("PGPASSFILE"), set("HOME")) {
        (Some(file), _) => PathBuf::from(file),
        (None, Some(home)) => Path::new(home).join(".pgpass"),
        (None, None) => return Ok(None),
    };
    let shown = path.display();
    // As libpq does: a file that is not there or not private is passed over.
    let Ok(metadata) = std::fs::metadata(&path) else { return Ok(None) };
    if !metadata.is_file() {
        warnings.push(format!("password file {shown} is no plain file, passed over"));
        return Ok(None);
    }
    if metadata.permissions().mode() & 0o077 != 0 {
        warnings.push(format!("password file {shown} can be read by others, passed over: chmod 600 {shown}"));
        return Ok(None);
    }
    let text = match std::fs::read(&path) {
        Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
        Err(error) => {
            warnings.push(format!("password file {shown} cannot be read ({error}), passed over"));
            return Ok(None);
        }
    };
    let mut found: Option<String> = None;
    for server in &target.servers {
        let wanted = [&name(&server.host), &server.port.to_string(), &target.database, &target.user];
        let Some(password) = text.lines().find_map(|line| matching(line, &wanted)) else { continue };
        if found.as_ref().is_some_and(|other| *other != password) {
            let fact = "the servers of postgres.url have different passwords in it".to_owned();
            return refuse(shown.to_string(), fact, "give them one password, or set postgres.password_file");
        }
        found = Some(password);
    }
    Ok(found)
}

/// What the file calls a server.
fn name(host: &Host) -> String {
    match host {
        Host::Tcp { name, .. } => name.clone(),
        Host::Socket(directory) if DEFAULT_SOCKETS.iter().any(|d| directory == Path::new(d)) => "localhost".to_owned(),
        Host::Socket(directory) => directory.display().to_string(),
    }
}

/// The password of a line `host:port:database:user:password`, if the first four are those wanted or `*`.
fn matching(line: &str, wanted: &[&String; 4]) -> Option<String> {
    if line.starts_with('#') {
        return None;
    }
    let mut rest = line.strip_suffix('\r').unwrap_or(line);
    for wanted in wanted {
        let (end, value) = field(rest);
        if value != **wanted && &rest[..end] != "*" {
            return None;
        }
        rest = rest[end..].strip_prefix(':')?;
    }
    let (_, password) = field(rest);
    (!password.is_empty()).then_some(password)
}

/// A field up to a colon or the end: where it ends, and what it says once `\:` and `\\` are read.
fn field(text: &str) -> (usize, String) {
    let mut value = String::new();
    let mut characters = text.char_indices();
    while let Some((at, c)) = characters.next() {
        match c {
            ':' => return (at, value),
            '\\' => value.extend(characters.next().map(|(_, escaped)| escaped)),
            c => value.push(c),
        }
    }
    (text.len(), value)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn private(text: &str, mode: u32) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(&file, text).unwrap();
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(mode)).unwrap();
        file
    }

    fn look(url: &str, file: &Path, more: &[(&str, &str)]) -> (Result<Option<String>, ConfigError>, Vec<String>) {
        let mut env: HashMap<String, String> = more.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect();
        env.insert("PGPASSFILE".to_owned(), file.display().to_string());
        let mut warnings = Vec::new();
        let target = PostgresTarget::parse(url, &HashMap::new()).unwrap();
        (password(&target, &env, &mut warnings), warnings)
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
