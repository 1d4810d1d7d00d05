//! The admin token that `run` creates for its lifetime if none is configured. It is kept in a file that only the
//! daemon's user and root can read, where commands on the same machine find it.
//!
//! Knows files and addresses; opens no connection. A mistake here lets another local user read the token, or makes a
//! command send the token to that user's program. Therefore nothing that others may have put in place is followed or
//! trusted, and the token itself tells for which address it is valid: it is not sent to a program on `[::1]:8787` if
//! the daemon listens on 127.0.0.1:8787. The daemon holds a lock on the file, so that the token of a daemon that was
//! killed is not sent to whoever uses its port now.

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg, OFlag};
use nix::unistd::geteuid;
use ring::digest::{SHA256, digest};
use std::ffi::OsString;
use std::fmt;
use std::fmt::Write as _;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Where the daemon of the systemd unit keeps it, since RUNTIME_DIRECTORY is not set in a shell.
const OF_THE_UNIT: &str = "/run/prefetchd";
const RANDOM_BYTES: usize = 24;
const ADDRESS_BYTES: usize = 8;
/// Longer files are not tokens.
const LONGEST: u64 = 1024;

/// A token in its file. Dropping this removes the file.
pub struct Made {
    token: String,
    path: PathBuf,
    /// Locked while the token is valid.
    _file: Flock<File>,
}

impl Made {
    /// Creates the token of a daemon that is already listening, so that no other program can have the port.
    ///
    /// # Errors
    /// If there is no place for the file. Says what is wrong with each candidate.
    pub fn make(listen: SocketAddr) -> Result<Self, String> {
        Self::make_in(&directories(|name| std::env::var_os(name)), listen)
    }

    fn make_in(directories: &[PathBuf], listen: SocketAddr) -> Result<Self, String> {
        let token = new(listen).map_err(|error| format!("no random bytes: {error}"))?;
        let mut wrong = Vec::new();
        for directory in directories {
            let path = directory.join(file_name(listen));
            match write(directory, &path, &token) {
                Ok(file) => return Ok(Self { token, path, _file: file }),
                Err(error) => wrong.push(format!("{}: {error}", directory.display())),
            }
        }
        if wrong.is_empty() {
            wrong.push("none of RUNTIME_DIRECTORY, XDG_RUNTIME_DIR and HOME is set".to_owned());
        }
        Err(wrong.join("; "))
    }

    pub fn token(&self) -> &str {
        &self.token
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        // Another daemon may have replaced it since.
        if open(&self.path, None).and_then(text).is_ok_and(|token| token == self.token) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

impl fmt::Debug for Made {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "in {}", self.path.display())
    }
}

/// Returns the token of the daemon that listens on this loopback address.
///
/// # Errors
/// If none was found. Says where it was looked for, and why existing files do not count.
pub fn find(at: SocketAddr) -> Result<String, String> {
    let mut places = directories(|name| std::env::var_os(name));
    if !places.iter().any(|place| place == Path::new(OF_THE_UNIT)) {
        places.push(OF_THE_UNIT.into());
    }
    find_in(&places, at)
}

fn find_in(places: &[PathBuf], at: SocketAddr) -> Result<String, String> {
    if !at.ip().is_loopback() {
        return Err(format!(
            "{at} is not a loopback address, and the token that run creates is sent to no other address"
        ));
    }
    let mut wrong = Vec::new();
    for place in places {
        let path = place.join(file_name(at));
        match open(&path, owner_of_the_unit(place)).and_then(in_use).and_then(text) {
            Ok(token) if is_good_at(&token, at) => return Ok(token),
            Ok(_) => wrong.push(format!("{} belongs to a daemon that does not listen on {at}", path.display())),
            Err(error) if error.kind() == ErrorKind::NotFound => {
                wrong.push(format!("{} does not exist", path.display()))
            }
            Err(error) if error.kind() == ErrorKind::PermissionDenied => {
                wrong.push(format!(
                    "{} can be read by the daemon's user and root only: run this as one of them",
                    path.display()
                ));
            }
            Err(error) => wrong.push(format!("{}: {error}", path.display())),
        }
    }
    Err(wrong.join("; "))
}

/// The directories where it may be, best first.
fn directories(env: impl Fn(&str) -> Option<OsString>) -> Vec<PathBuf> {
    let within = |name: &str, below: &str| Some(PathBuf::from(env(name)?).join(below));
    // systemd separates several directories with colons; the first is the main one.
    let runtime = env("RUNTIME_DIRECTORY").and_then(|all| std::env::split_paths(&all).next());
    [runtime, within("XDG_RUNTIME_DIR", "prefetchd"), within("HOME", ".local/state/prefetchd")]
        .into_iter()
        .flatten()
        .filter(|directory| directory.is_absolute())
        .collect()
}

fn file_name(at: SocketAddr) -> String {
    format!("{}.token", at.port())
}

fn new(listen: SocketAddr) -> Result<String, getrandom::Error> {
    let mut random = [0; RANDOM_BYTES];
    getrandom::fill(&mut random)?;
    let random = hex(&random);
    Ok(format!("{random}{}", of_address(&random, listen)))
}

/// A daemon that listens on all addresses also listens on the loopback addresses.
fn is_good_at(token: &str, at: SocketAddr) -> bool {
    let Some((random, address)) = token.split_at_checked(2 * RANDOM_BYTES) else { return false };
    // One that listens on 0.0.0.0 does not listen on [::1], where another program may.
    let everywhere: &[IpAddr] = match at {
        SocketAddr::V4(_) => &[IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V6(Ipv6Addr::UNSPECIFIED)],
        SocketAddr::V6(_) => &[IpAddr::V6(Ipv6Addr::UNSPECIFIED)],
    };
    let listening = std::iter::once(at.ip()).chain(everywhere.iter().copied()).map(|ip| SocketAddr::new(ip, at.port()));
    listening.into_iter().any(|listen| of_address(random, listen) == address)
}

/// Ties the random part to an address without revealing it.
fn of_address(random: &str, listen: SocketAddr) -> String {
    hex(&digest(&SHA256, format!("{random} {listen}").as_bytes()).as_ref()[..ADDRESS_BYTES])
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn write(directory: &Path, path: &Path, token: &str) -> io::Result<Flock<File>> {
    DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    let found = std::fs::symlink_metadata(directory)?;
    if !found.is_dir() {
        return Err(io::Error::other("it is not a directory"));
    }
    if found.uid() != geteuid().as_raw() {
        return Err(io::Error::other("it belongs to another user"));
    }
    if found.mode() & 0o022 != 0 {
        return Err(io::Error::other("it is writable by others: chmod 700"));
    }
    // Left behind by a daemon that was killed.
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    // Follows no symlink: creates the file or fails.
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    let mut file = Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, error)| error)?;
    file.write_all(token.as_bytes())?;
    Ok(file)
}

/// Opens a token file of ours, of root's or of `owner`'s.
fn open(path: &Path, owner: Option<u32>) -> io::Result<File> {
    // Does not wait for the other end of a named pipe, either.
    let flags = (OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK).bits();
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    is_private(&file, owner)?;
    Ok(file)
}

/// Checks that the daemon that created the token is running.
fn in_use(file: File) -> io::Result<File> {
    match Flock::lock(file, FlockArg::LockSharedNonblock) {
        Err((file, Errno::EWOULDBLOCK)) => Ok(file),
        Err((_, error)) => Err(error.into()),
        Ok(_) => Err(io::Error::other("it was left behind by a daemon that has ended")),
    }
}

fn text(file: File) -> io::Result<String> {
    let mut text = String::new();
    file.take(LONGEST).read_to_string(&mut text)?;
    Ok(text.trim_end().to_owned())
}

fn is_private(file: &File, owner: Option<u32>) -> io::Result<()> {
    let found = file.metadata()?;
    if !found.is_file() {
        return Err(io::Error::other("it is not a plain file"));
    }
    if ![Some(geteuid().as_raw()), Some(0), owner].contains(&Some(found.uid())) {
        return Err(io::Error::other("it belongs to another user"));
    }
    if found.mode() & 0o077 != 0 {
        return Err(io::Error::other("it can be read by others, so it is not used"));
    }
    Ok(())
}

/// Returns the user of the unit's daemon. Root created that directory, and may use what is in it.
fn owner_of_the_unit(place: &Path) -> Option<u32> {
    let is_it = place == Path::new(OF_THE_UNIT) && geteuid().is_root();
    let found = std::fs::symlink_metadata(place).ok().filter(|found| is_it && found.is_dir())?;
    Some(found.uid())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;
    use std::os::unix::fs::{PermissionsExt, symlink};

    fn at(address: &str) -> SocketAddr {
        address.parse().unwrap()
    }

    fn mode(path: &Path) -> u32 {
        std::fs::metadata(path).unwrap().mode() & 0o777
    }

    #[test]
    fn it_is_its_users_alone_and_goes_at_the_end() {
        let home = tempfile::tempdir().unwrap();
        let place = home.path().join("state/prefetchd");
        let made = Made::make_in(std::slice::from_ref(&place), at("127.0.0.1:8787")).unwrap();
        assert_eq!(made.path(), place.join("8787.token"));
        assert_eq!((mode(&place), mode(made.path())), (0o700, 0o600));
        assert_eq!(find_in(std::slice::from_ref(&place), at("127.0.0.1:8787")).as_deref(), Ok(made.token()));
        assert!(!format!("{made:?}").contains(made.token()));
        let path = made.path().to_owned();
        drop(made);
        assert!(!path.exists());
    }

    #[test]
    fn one_that_was_left_behind_is_replaced_and_a_later_one_is_left_alone() {
        let place = tempfile::tempdir().unwrap();
        let places = [place.path().to_owned()];
        let elsewhere = tempfile::NamedTempFile::new().unwrap();
        symlink(elsewhere.path(), place.path().join("8787.token")).unwrap();
        let first = Made::make_in(&places, at("127.0.0.1:8787")).unwrap();
        assert_eq!(std::fs::read_to_string(elsewhere.path()).unwrap(), "", "a symlink was followed");
        let second = Made::make_in(&places, at("127.0.0.2:8787")).unwrap();
        drop(first);
        assert_eq!(find_in(&places, at("127.0.0.2:8787")).as_deref(), Ok(second.token()));
    }

    /// The token is not sent to whatever uses the port now.
    #[test]
    fn one_of_a_daemon_that_was_killed_is_not_used() {
        let place = tempfile::tempdir().unwrap();
        let places = [place.path().to_owned()];
        let made = Made::make_in(&places, at("127.0.0.1:8787")).unwrap();
        let (token, path) = (made.token().to_owned(), made.path().to_owned());
        drop(made);
        let mut left = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path).unwrap();
        left.write_all(token.as_bytes()).unwrap();
        let wrong = find_in(&places, at("127.0.0.1:8787")).unwrap_err();
        assert!(wrong.contains("8787.token: it was left behind by a daemon that has ended"), "{wrong}");
        let next = Made::make_in(&places, at("127.0.0.1:8787")).unwrap();
        assert_eq!(find_in(&places, at("127.0.0.1:8787")).as_deref(), Ok(next.token()));
    }

    #[test]
    fn it_is_good_at_its_own_address_alone() {
        let place = tempfile::tempdir().unwrap();
        let places = [place.path().to_owned()];
        for (listen, good, bad) in [
            ("127.0.0.1:8787", &["127.0.0.1:8787"][..], &["127.0.0.2:8787", "[::1]:8787", "127.0.0.1:8788"][..]),
            ("[::1]:8787", &["[::1]:8787"], &["127.0.0.1:8787"]),
            ("0.0.0.0:8787", &["127.0.0.1:8787"], &["10.0.0.1:8787", "0.0.0.0:8787", "[::1]:8787"]),
            ("[::]:8787", &["127.0.0.1:8787", "[::1]:8787"], &["[::1]:8788"]),
            ("10.0.0.1:8787", &[], &["10.0.0.1:8787", "127.0.0.1:8787"]),
        ] {
            let made = Made::make_in(&places, at(listen)).unwrap();
            for address in good {
                assert_eq!(find_in(&places, at(address)).as_deref(), Ok(made.token()), "{listen} at {address}");
            }
            for address in bad {
                assert!(find_in(&places, at(address)).is_err(), "{listen} at {address}");
            }
        }
    }

    #[test]
    fn what_others_may_have_put_there_or_may_read_is_not_used() {
        let place = tempfile::tempdir().unwrap();
        let places = [place.path().to_owned()];
        let made = Made::make_in(&places, at("127.0.0.1:8787")).unwrap();
        let here = || find_in(&places, at("127.0.0.1:8787"));
        std::fs::set_permissions(made.path(), PermissionsExt::from_mode(0o640)).unwrap();
        assert!(here().unwrap_err().contains("can be read by others"));
        std::fs::rename(made.path(), place.path().join("real")).unwrap();
        std::fs::set_permissions(place.path().join("real"), PermissionsExt::from_mode(0o600)).unwrap();
        symlink(place.path().join("real"), made.path()).unwrap();
        assert!(here().is_err(), "a symlink was followed");
        std::fs::remove_file(made.path()).unwrap();
        std::fs::create_dir(made.path()).unwrap();
        assert!(here().unwrap_err().contains("not a plain file"));
    }

    #[test]
    fn a_place_that_others_may_write_to_is_passed_over() {
        let home = tempfile::tempdir().unwrap();
        let [open, file, good] = ["open", "file", "good"].map(|name| home.path().join(name));
        std::fs::create_dir(&open).unwrap();
        std::fs::set_permissions(&open, PermissionsExt::from_mode(0o777)).unwrap();
        std::fs::write(&file, "").unwrap();
        let wrong = Made::make_in(&[open.clone(), file.clone()], at("127.0.0.1:1")).unwrap_err();
        assert!(wrong.contains("chmod 700") && wrong.contains("/file: "), "{wrong}");
        assert!(Made::make_in(&[], at("127.0.0.1:1")).unwrap_err().contains("HOME"));
        let made = Made::make_in(&[open, file, good.clone()], at("127.0.0.1:1")).unwrap();
        assert!(made.path().starts_with(good));
    }

    #[test]
    fn places_come_from_the_environment_in_their_order() {
        let env = HashMap::from([
            ("RUNTIME_DIRECTORY", "/run/prefetchd:/run/other"),
            ("XDG_RUNTIME_DIR", "/run/user/7"),
            ("HOME", "/home/me"),
        ]);
        let all = directories(|name| env.get(name).map(OsString::from));
        let expected = ["/run/prefetchd", "/run/user/7/prefetchd", "/home/me/.local/state/prefetchd"];
        assert_eq!(all, expected.map(PathBuf::from));
        assert!(directories(|name| (name != "XDG_RUNTIME_DIR").then(|| "here".into())).is_empty());
    }
}
