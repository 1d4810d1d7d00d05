//! Where a password comes from. It is read for every new connection, so that a changed password is used at once.
//!
//! Knows files, programs and text; opens no connection. A mistake here keeps the daemon from logging in after a rotation, or
//! writes a secret to a log. Neither `Debug` nor any error shows a password.

pub mod command;

use command::PasswordCommand;
use std::fmt;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The source of a password, which [`Password::read_for_login`] resolves.
#[derive(Clone, PartialEq, Eq)]
pub enum Password {
    /// No source is configured.
    None,
    /// From a URL, or from an environment variable of this process.
    Literal(String),
    /// The contents of a file that holds only the password.
    File(PathBuf),
    /// A line of a password file in libpq's format.
    PgPass(PgPass),
    /// What a program prints.
    Command(PasswordCommand),
}

/// A password file in libpq's format, and the entry to look up in it.
/// <https://www.postgresql.org/docs/current/libpq-pgpass.html>
#[derive(Clone, PartialEq, Eq)]
pub struct PgPass {
    pub file: PathBuf,
    /// Host, port, database and user of each server.
    pub wanted: Vec<[String; 4]>,
}

/// Why a configured password cannot be used. Shows nothing of what was read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{thing} {fact}: {remedy}")]
pub struct PasswordError {
    /// The file, or the setting and its program.
    pub thing: String,
    pub fact: String,
    pub remedy: &'static str,
}

impl PasswordError {
    fn new(path: &Path, fact: impl Into<String>, remedy: &'static str) -> Self {
        PasswordError { thing: format!("password file {}", path.display()), fact: fact.into(), remedy }
    }
}

impl Password {
    /// Returns the password for a new connection.
    ///
    /// # Errors
    /// If a configured file cannot be used, or a command prints no password.
    pub async fn read_for_login(&self) -> Result<Option<String>, PasswordError> {
        match self {
            Password::None => Ok(None),
            Password::Literal(password) => Ok(Some(password.clone())),
            Password::Command(command) => command.read().await.map(Some),
            // It may lie on a network, and must not hold up the thread of other connections.
            Password::File(_) | Password::PgPass(_) => {
                let password = self.clone();
                let read = tokio::task::spawn_blocking(move || password.in_a_file()).await;
                read.unwrap_or_else(|failed| match failed.try_into_panic() {
                    Ok(panic) => std::panic::resume_unwind(panic),
                    // Only at the end of the runtime, of which the login is a part.
                    Err(_) => Ok(None),
                })
            }
        }
    }

    /// As [`Self::read_for_login`], for connections that are made all the time: no command runs again within `age`.
    ///
    /// # Errors
    /// As [`Self::read_for_login`].
    pub async fn read_again_after(&self, age: Duration) -> Result<Option<String>, PasswordError> {
        match self {
            Password::Command(command) => command.read_again_after(age).await.map(Some),
            Password::None | Password::Literal(_) | Password::File(_) | Password::PgPass(_) => {
                self.read_for_login().await
            }
        }
    }

    /// Returns what a file says, or what is known without reading anything.
    fn in_a_file(&self) -> Result<Option<String>, PasswordError> {
        match self {
            Password::None => Ok(None),
            Password::Literal(password) => Ok(Some(password.clone())),
            Password::File(path) => secret_in(path).map(Some),
            Password::PgPass(pgpass) => pgpass.read().map(|found| found.ok()),
            Password::Command(command) => Ok(command.last()),
        }
    }

    /// Returns the password to remove from whatever a server repeats; `None` if there is none, or if it cannot be read.
    pub fn to_hide(&self) -> Option<String> {
        self.in_a_file().ok().flatten()
    }
}

impl From<Option<String>> for Password {
    fn from(password: Option<String>) -> Self {
        password.map_or(Password::None, Password::Literal)
    }
}

impl fmt::Debug for Password {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Password::None => f.write_str("none"),
            Password::Literal(_) => f.write_str("***"),
            Password::File(path) | Password::PgPass(PgPass { file: path, .. }) => write!(f, "in {}", path.display()),
            Password::Command(command) => write!(f, "printed by {command}"),
        }
    }
}

/// Returns the contents of a file without its final newline.
pub fn secret_in(path: &Path) -> Result<String, PasswordError> {
    let wrong = |fact: String, remedy| Err(PasswordError::new(path, fact, remedy));
    match std::fs::read(path).map(String::from_utf8) {
        Err(error) => wrong(format!("cannot be read ({error})"), "correct the path, or the file's rights"),
        // The text of such an error quotes what was read.
        Ok(Err(_)) => wrong("is not UTF-8".to_owned(), "write the secret as UTF-8"),
        Ok(Ok(mut text)) => {
            if text.ends_with('\n') {
                text.pop();
                if text.ends_with('\r') {
                    text.pop();
                }
            }
            if text.is_empty() {
                return wrong("is empty".to_owned(), "write the secret into it");
            }
            if text.contains('\0') {
                return wrong("has a NUL byte".to_owned(), "write the secret as text");
            }
            Ok(text)
        }
    }
}

/// Returns a warning if others can read a file of secrets. As in libpq's rule for keys, root may share a file with a
/// group, which is how systemd provides credentials and Kubernetes provides secrets.
/// <https://www.postgresql.org/docs/current/libpq-ssl.html#LIBPQ-SSL-CLIENTCERT>
pub fn shared(what: &str, path: &Path) -> Option<String> {
    let found = std::fs::metadata(path).ok()?;
    let too_many = if found.uid() == 0 { 0o007 } else { 0o077 };
    let shown = path.display();
    (found.mode() & too_many != 0).then(|| format!("{what} {shown} can be read by others: chmod 600 {shown}"))
}

/// Why libpq would ignore the password file. That is worth a warning, unless the file does not exist.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PassedOver {
    Absent,
    NoLine,
    Because(String),
}

impl PgPass {
    /// # Errors
    /// If the servers have different passwords.
    pub fn read(&self) -> Result<Result<String, PassedOver>, PasswordError> {
        let shown = self.file.display();
        let passed_over = |why: String| Ok(Err(PassedOver::Because(why)));
        // Like libpq, ignore a file that does not exist or is not private.
        let Ok(metadata) = std::fs::metadata(&self.file) else { return Ok(Err(PassedOver::Absent)) };
        if !metadata.is_file() {
            return passed_over(format!("password file {shown} is not a plain file and is ignored"));
        }
        if metadata.permissions().mode() & 0o077 != 0 {
            let text = format!("password file {shown} can be read by others and is ignored: chmod 600 {shown}");
            return passed_over(text);
        }
        let text = match std::fs::read(&self.file) {
            Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
            // The file is being replaced.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Err(PassedOver::Absent)),
            Err(error) => return passed_over(format!("password file {shown} cannot be read and is ignored ({error})")),
        };
        let mut found: Option<String> = None;
        for wanted in &self.wanted {
            let Some(password) = text.lines().find_map(|line| matching(line, wanted)) else { continue };
            if found.as_ref().is_some_and(|other| *other != password) {
                let fact = "has different passwords for the servers of postgres.url";
                return Err(PasswordError::new(&self.file, fact, "give them one, or set postgres.password_file"));
            }
            found = Some(password);
        }
        Ok(found.ok_or(PassedOver::NoLine))
    }
}

/// Returns the password of a line `host:port:database:user:password` whose first four fields match `wanted` or are `*`.
fn matching(line: &str, wanted: &[String; 4]) -> Option<String> {
    if line.starts_with('#') {
        return None;
    }
    let mut rest = line.strip_suffix('\r').unwrap_or(line);
    for wanted in wanted {
        let (end, value) = field(rest);
        if value != *wanted && &rest[..end] != "*" {
            return None;
        }
        rest = rest[end..].strip_prefix(':')?;
    }
    let (_, password) = field(rest);
    (!password.is_empty()).then_some(password)
}

/// Reads a field up to a colon or the end. Returns where it ends, and its text with `\:` and `\\` unescaped.
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

    #[test]
    fn a_secret_that_others_can_read_is_worth_a_word() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for (mode, by_root, by_others) in [
            (0o600, false, false),
            (0o400, false, false),
            (0o640, false, true),
            (0o604, true, true),
            (0o644, true, true),
        ] {
            std::fs::set_permissions(&file, PermissionsExt::from_mode(mode)).unwrap();
            let owner = std::fs::metadata(&file).unwrap().uid();
            let said = shared("token file", file.path());
            assert_eq!(said.is_some(), if owner == 0 { by_root } else { by_others }, "{mode:o}");
            assert!(said.is_none_or(|said| said.contains("chmod 600")));
        }
        assert_eq!(shared("token file", Path::new("/nonexistent")), None);
    }

    #[tokio::test]
    async fn a_file_is_read_each_time_and_shown_never() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let password = Password::File(file.path().to_owned());
        for content in ["hunter1\n", "hunter2\r\n"] {
            std::fs::write(&file, content).unwrap();
            assert_eq!(password.read_for_login().await, Ok(Some(content.trim_end().to_owned())));
        }
        for content in [&b""[..], b"\n", b"hunter2\xff", b"hunter2\0"] {
            std::fs::write(&file, content).unwrap();
            let error = password.read_for_login().await.unwrap_err();
            assert!(!format!("{error} {error:?} {password:?}").contains("hunter"), "{error}");
        }
        let path = file.path().display().to_string();
        drop(file);
        let error = password.read_for_login().await.unwrap_err().to_string();
        assert!(error.contains(&path) && error.contains("cannot be read"), "{error}");
        assert_eq!(format!("{:?}", Password::Literal("hunter2".to_owned())), "***");
    }
}
