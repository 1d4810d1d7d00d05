//! What `scripts/release` packs: the tarball is made of the debug build, and unpacked.
//!
//! The release build, the Debian package and the SBOM take minutes, and are left to `scripts/release`, which checks them.

use crate::deploy::{assets, matching, root, text};
use crate::harness::skipped;
use flate2::read::GzDecoder;
use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use tar::Archive;

const COMMITTED_AT: u64 = 1_700_000_000;
/// What the documentation links to, and only the repository has.
const OF_THE_REPOSITORY: [&str; 6] =
    ["src/", "tests/", "crates/", "CONTRIBUTING.md", "Dockerfile", "docker-compose.yml"];

/// Runs `scripts/release` of the repository in `dir` for the program under test, which is large: a script stands for it.
fn release(repository: &Path, out: &Path, umask: &str) -> Output {
    let program = out.join("program");
    std::fs::write(&program, format!("#!/bin/sh\nexec '{}' \"$@\"\n", env!("CARGO_BIN_EXE_prefetchd"))).unwrap();
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o700)).unwrap();
    let script = format!("umask {umask} && exec scripts/release --binary '{0}/program' --out '{0}'", out.display());
    let mut command = Command::new("bash");
    command.args(["-c", &script]).current_dir(repository).env("SOURCE_DATE_EPOCH", COMMITTED_AT.to_string());
    command.output().unwrap()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&[&output.stdout[..], &output.stderr].concat()).into_owned()
}

/// The tarball, whose name is on stdout.
fn tarball(output: &Output) -> PathBuf {
    assert!(output.status.success(), "{}", said(output));
    PathBuf::from(String::from_utf8_lossy(&output.stdout).trim_end())
}

/// Says why there is nothing to test.
fn no_commit() -> bool {
    let no = !root().join(".git").exists();
    if no {
        skipped("scripts/release needs a commit");
    }
    no
}

/// Returns the content of every file by its path below the directory in the tarball.
fn unpacked(tarball: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut archive = Archive::new(GzDecoder::new(std::fs::File::open(tarball).unwrap()));
    let named = tarball.file_name().unwrap().to_str().unwrap().strip_suffix(".tar.gz").unwrap();
    let (mut files, mut before) = (BTreeMap::new(), PathBuf::new());
    for entry in archive.entries().unwrap() {
        let mut entry = entry.unwrap();
        let path = entry.path().unwrap().into_owned();
        let file = path.strip_prefix(named).unwrap().to_str().unwrap().to_owned();
        assert!(before < path, "{path:?} comes after {before:?}");
        let header = entry.header();
        assert_eq!((header.uid().unwrap(), header.gid().unwrap(), header.mtime().unwrap()), (0, 0, COMMITTED_AT));
        let executable = header.entry_type().is_dir() || file == "prefetchd";
        assert_eq!(header.mode().unwrap(), if executable { 0o755 } else { 0o644 }, "{file}");
        if header.entry_type().is_file() {
            let mut content = Vec::new();
            std::io::Read::read_to_end(&mut entry, &mut content).unwrap();
            files.insert(file, content);
        }
        before = path;
    }
    files
}

/// Returns the anchors of a document, as the usual renderers make them from its headings.
fn anchors(markdown: &str) -> BTreeSet<String> {
    let headings =
        markdown.lines().filter(|line| line.starts_with('#')).map(|line| line.trim_start_matches('#').trim());
    let kept = |c: &char| c.is_alphanumeric() || [' ', '-', '_'].contains(c);
    headings.map(|heading| heading.to_lowercase().chars().filter(kept).collect::<String>().replace(' ', "-")).collect()
}

/// Returns the path to which a link in `file` leads.
fn target(file: &str, link: &str) -> String {
    let mut parts: Vec<_> = file.split('/').collect();
    parts.pop();
    for part in link.split('/').filter(|part| !part.is_empty()) {
        match part {
            ".." => assert!(parts.pop().is_some(), "{file}: {link}"),
            "." => {}
            part => parts.push(part),
        }
    }
    parts.join("/")
}

#[test]
fn the_tarball_has_what_the_package_has_and_its_links_resolve() {
    if no_commit() {
        return;
    }
    let out = tempfile::tempdir().unwrap();
    let files = unpacked(&tarball(&release(&root(), out.path(), "077")));
    for [from, _, _] in assets() {
        match from.strip_prefix("target/generated/") {
            _ if from == "target/release/prefetchd" => assert!(files.contains_key("prefetchd")),
            None => matching(&from).iter().for_each(|file| assert!(files.contains_key(file), "{file}")),
            Some(generated) => {
                let name = generated.replace('*', "prefetchd");
                let found = files.keys().any(|file| {
                    let file = file.rsplit('/').next().unwrap();
                    file == name || file == format!("{name}.bash")
                });
                assert!(found, "{from}");
            }
        }
    }
    for file in ["deploy/prefetchd.service", "docs/install.md", "docs/decisions/README.md", "man/prefetchd-run.1"] {
        assert!(files.contains_key(file), "{file}");
    }
    // The charts of Kubernetes and the provisioning of Grafana are there as soon as they are in the repository.
    let of_deploy = Command::new("git").args(["ls-files", "deploy"]).current_dir(root()).output().unwrap();
    for file in String::from_utf8(of_deploy.stdout).unwrap().lines() {
        let is_packed = !["deploy/compose.sql", "deploy/rules.test.yml"].contains(&file);
        assert_eq!(files.contains_key(file), is_packed, "{file}");
    }
    let is_directory = |path: &str| files.keys().any(|file| file.starts_with(&format!("{path}/")));
    let (mut inside, mut outside, mut broken) = (0, 0, Vec::new());
    for (file, content) in files.iter().filter(|(file, _)| file.ends_with(".md")) {
        let content = String::from_utf8_lossy(content);
        let links = content.split("](").skip(1).filter_map(|rest| rest.split(')').next());
        for link in links.filter(|link| !link.contains("://")) {
            let (path, anchor) = link.split_once('#').map_or((link, None), |(path, anchor)| (path, Some(anchor)));
            let path = if path.is_empty() { file.clone() } else { target(file, path) };
            if OF_THE_REPOSITORY.iter().any(|start| format!("{path}/").starts_with(start) || path == *start) {
                outside += 1;
                if !root().join(&path).exists() {
                    broken.push(format!("{file}: {link}"));
                }
                continue;
            }
            inside += 1;
            let leads_to =
                |anchor| files.get(&path).is_some_and(|f| anchors(&String::from_utf8_lossy(f)).contains(anchor));
            if !(files.contains_key(&path) || is_directory(&path)) || !anchor.is_none_or(leads_to) {
                broken.push(format!("{file}: {link}"));
            }
        }
    }
    assert_eq!(broken, [""; 0]);
    assert!(inside > 200 && outside > 20, "{inside} {outside}");
    let licences = String::from_utf8_lossy(&files["LICENSES-THIRD-PARTY"]);
    for part in ["\ntokio 1.", "\nring 0.17", "Copyright (c) Tokio Contributors"] {
        assert!(licences.contains(part), "{part}");
    }
    assert!(!licences.contains("\nproptest "), "only what is in the program");
}

#[test]
fn the_same_files_give_the_same_tarball() {
    if no_commit() {
        return;
    }
    let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let first = std::fs::read(tarball(&release(&root(), one.path(), "022"))).unwrap();
    let second = std::fs::read(tarball(&release(&root(), other.path(), "077"))).unwrap();
    assert!(first == second, "{} and {} bytes", first.len(), second.len());
}

/// Returns a clone of the repository, with the scripts and the changelog as they are now.
fn clone() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let mut command = Command::new("git");
    command.args(["clone", "--quiet", "--depth", "1"]).arg(format!("file://{}", root().display())).arg(dir.path());
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
    for file in ["scripts/release", "scripts/generate.sh", "scripts/install.sh"] {
        std::fs::copy(root().join(file), dir.path().join(file)).unwrap();
    }
    dir
}

#[test]
fn a_release_is_what_is_committed() {
    if no_commit() {
        return;
    }
    let dir = clone();
    std::fs::write(dir.path().join("forgotten"), "").unwrap();
    let output = Command::new("scripts/release").current_dir(dir.path()).env_remove("DIRTY").output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    assert!(said(&output).contains("?? forgotten"), "{}", said(&output));
}

#[test]
fn a_release_has_the_version_of_the_changelog() {
    if no_commit() {
        return;
    }
    let (dir, out) = (clone(), tempfile::tempdir().unwrap());
    let version = env!("CARGO_PKG_VERSION");
    let listed = |sections: &str| {
        std::fs::write(dir.path().join("CHANGELOG.md"), format!("# Changelog\n\n{sections}\n- A change.\n")).unwrap();
        release(dir.path(), out.path(), "022")
    };
    let output = listed("## [Unreleased]\n\n## [9.9.9] - 2030-01-01\n");
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    assert!(said(&output).contains(&format!("has version {version}, and CHANGELOG.md 9.9.9")), "{}", said(&output));
    let name = |output: &Output| tarball(output).file_name().unwrap().to_str().unwrap().to_owned();
    let output = listed("## [Unreleased]\n");
    assert!(name(&output).starts_with(&format!("prefetchd-{version}-g")), "{}", said(&output));
    let output = listed(&format!("## [Unreleased]\n\n## [{version}] - 2030-01-01\n"));
    let released = format!("prefetchd-{version}-{}-linux-", std::env::consts::ARCH);
    assert!(name(&output).starts_with(&released), "{}", said(&output));
}

#[test]
fn package_and_documents_name_the_glibc_that_the_program_is_linked_with() {
    let script = text("scripts/release");
    let glibc = script.lines().find_map(|line| line.strip_prefix("GLIBC=")).unwrap();
    assert!(text("Cargo.toml").contains(&format!("\ndepends = \"libc6 (>= {glibc})\"\n")), "{glibc}");
    assert!(text("docs/install.md").contains(&format!("glibc {glibc} or later")), "{glibc}");
}
