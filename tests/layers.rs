//! The layers of src/lib.rs, where the compiler does not enforce them: who imports whom, and who must not know what.
//! The core crate has no dependency that could do I/O, so that is enforced by the compiler.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

const EVERYTHING: &str = "";

/// A module, and what it may import besides itself. Everything that matches a file counts.
const IMPORTS: &[(&str, &[&str])] = &[
    ("bounded", &[]),
    ("code", &["plan::key", "plan::mapping"]),
    ("demo", &[]),
    ("error", &[]),
    ("nodes", &["lanes"]),
    ("password", &[]),
    ("sightings", &[]),
    ("row_keys", &["schema", "plan::key"]),
    ("terminal", &[]),
    ("timing", &[]),
    ("tls", &[]),
    ("token", &[]),
    ("words", &[]),
    // Independent of each other.
    (
        "source",
        &[
            "bounded",
            "code",
            "error",
            "fingerprint",
            "format",
            "loader::range",
            "lsn",
            "password",
            "remedy",
            "tls",
            "schema",
            "change",
            "checkpoint::SlotState",
            "progress::ledger::ConfirmedLsn",
            "typed::known",
            "typed::row_type",
        ],
    ),
    (
        "sink",
        &[
            "bounded",
            "code",
            "error",
            "password",
            "remedy",
            "tls",
            "schema",
            "change",
            "command",
            "format",
            "lanes",
            "lookups",
            "lsn",
            "nodes",
            "resp",
            "session::inspect",
            "words",
        ],
    ),
    // What others may see of the daemon.
    ("admin", &[]),
    ("status", &["admin", "code", "lsn", "schema", "checkpoint", "command::Op", "lanes", "nodes", "words"]),
    ("history", &["status", "words"]),
    ("metrics", &["command::Op", "nodes", "reason", "schema", "status"]),
    (
        "config",
        &[
            "code",
            "format",
            "lanes",
            "password",
            "remedy",
            "schema",
            "plan::key",
            "resp::batch::ChangeStream",
            "sink::connect",
            "sink::durability",
            "source::target",
            "tls",
        ],
    ),
    ("reload", &["config", "schema", "words"]),
    ("telemetry", &["config", "terminal"]),
    // No path to Postgres, and none to the writer.
    (
        "http",
        &[
            "admin",
            "checkpoint",
            "code",
            "command",
            "demo",
            "history",
            "format",
            "lookups",
            "lsn",
            "metrics",
            "plan::key",
            "reload",
            "row_keys",
            "schema",
            "sightings",
            "sink::Class",
            "sink::SinkError",
            "sink::any_reader",
            "sink::list_reader",
            "sink::reader",
            "status",
            "telemetry",
            "typed",
        ],
    ),
    (
        "bridge",
        &[
            "admin",
            "change",
            "checkpoint",
            "code",
            "command",
            "config",
            "error",
            "format",
            "history",
            "loader",
            "lookups",
            "lsn",
            "metrics",
            "nodes",
            "plan",
            "progress",
            "reason",
            "reload",
            "remedy",
            "resp",
            "schema",
            "session",
            "sightings",
            "lanes",
            "sink",
            "source",
            "status",
            "typed",
            "timing",
            "words",
        ],
    ),
    // Starts the HTTP side; the sessions do not know about it.
    (
        "daemon",
        &[
            "admin",
            "bridge",
            "code",
            "config",
            "demo",
            "history",
            "http",
            "metrics",
            "progress::resume::Adopt",
            "reload",
            "schema",
            "status",
            "token",
        ],
    ),
    ("cli", &[EVERYTHING]),
    ("main", &[EVERYTHING]),
    ("lib", &[EVERYTHING]),
];

/// Names that only these modules may use.
const KNOWN_ONLY_TO: &[(&str, &[&str])] = &[
    ("redis::", &["sink"]),
    ("postgres_protocol::", &["source"]),
    ("tokio_postgres::", &["source", "cli"]),
    ("axum::", &["http"]),
    ("hyper::", &["http"]),
    ("hyper_util::", &["http"]),
    ("prometheus::", &["metrics"]),
    ("clap::", &["cli", "main"]),
    ("ureq::", &["cli"]),
];

/// Declared for tests only, and so free to use anything.
const TESTS: &str = "#[cfg(test)]";

struct File {
    /// For example `sink::writer`.
    module: String,
    /// Without comments and unit tests.
    code: String,
}

fn sources() -> Vec<File> {
    fn rust_files(dir: &Path, into: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                rust_files(&path, into);
            } else if path.extension().is_some_and(|e| e == "rs") {
                into.push(path);
            }
        }
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut paths = Vec::new();
    rust_files(&root, &mut paths);
    let (mut files, mut of_tests) = (Vec::new(), Vec::new());
    for path in paths {
        let name = path.strip_prefix(&root).unwrap().with_extension("");
        let parts: Vec<_> = name.iter().map(|part| part.to_str().unwrap()).filter(|&part| part != "mod").collect();
        let module = parts.join("::");
        let text = std::fs::read_to_string(path).unwrap();
        of_tests.extend(test_modules(&text).into_iter().map(|name| format!("{module}::{name}")));
        files.push(File { module, code: code(&text) });
    }
    files.retain(|file| !of_tests.iter().any(|tests| is_within(&file.module, tests)));
    files
}

/// Modules in files of their own that only tests use.
fn test_modules(text: &str) -> Vec<String> {
    let lines: Vec<_> = text.lines().map(str::trim).collect();
    let two = lines.windows(2).filter(|two| two[0] == TESTS);
    two.filter_map(|two| Some(two[1].strip_suffix(';')?.rsplit_once("mod ")?.1.to_owned())).collect()
}

/// Removes comments, and the unit tests at the end, which may use anything.
fn code(text: &str) -> String {
    let lines: Vec<_> = text.lines().map(str::trim).collect();
    let begin_tests = |two: &[&str]| two[0] == TESTS && two[1].contains("mod ") && two[1].ends_with('{');
    let tests = lines.windows(2).position(begin_tests);
    let kept = &lines[..tests.unwrap_or(lines.len())];
    kept.iter().filter(|line| !line.starts_with("//")).map(|line| format!("{line}\n")).collect()
}

/// Returns every path that begins with `crate::`, without that prefix and with groups expanded.
fn imports(code: &str) -> BTreeSet<String> {
    let mut paths = BTreeSet::new();
    for (at, _) in code.match_indices("crate::") {
        expand(&code[at + "crate::".len()..], "", &mut paths);
    }
    paths
}

/// Reads one path or group, adds the paths in it, and returns the rest of the text.
fn expand<'a>(text: &'a str, prefix: &str, paths: &mut BTreeSet<String>) -> &'a str {
    let text = text.trim_start();
    if let Some(mut rest) = text.strip_prefix('{') {
        loop {
            rest = rest.trim_start();
            if let Some(after) = rest.strip_prefix('}') {
                return after;
            }
            let after = expand(rest, prefix, paths);
            rest = after.trim_start().trim_start_matches(',');
            assert!(after.len() < text.len() && !after.is_empty(), "an import that does not end: {text:.80}");
        }
    }
    let end = text.find(|c: char| !c.is_ascii_alphanumeric() && c != '_' && c != '*').unwrap_or(text.len());
    let path = if prefix.is_empty() { text[..end].to_owned() } else { format!("{prefix}::{}", &text[..end]) };
    match text[end..].strip_prefix("::") {
        Some(rest) => expand(rest, &path, paths),
        None => {
            paths.insert(path);
            let rest = &text[end..];
            // `self as name`
            rest.trim_start()
                .strip_prefix("as ")
                .map_or(rest, |rest| rest.trim_start_matches(|c: char| c.is_alphanumeric()))
        }
    }
}

fn is_within(path: &str, module: &str) -> bool {
    module == EVERYTHING || path == module || path.strip_prefix(module).is_some_and(|rest| rest.starts_with("::"))
}

#[test]
fn imports_run_downwards() {
    let mut wrong = Vec::new();
    for File { module, code } in sources() {
        let rules: Vec<_> = IMPORTS.iter().filter(|(name, _)| is_within(&module, name)).collect();
        if rules.is_empty() {
            wrong.push(format!("{module}: which layer is it? (IMPORTS)"));
        }
        let allowed: Vec<_> = rules.iter().flat_map(|(_, allowed)| *allowed).collect();
        let own = module.split("::").next().unwrap();
        for path in imports(&code) {
            if !is_within(&path, own) && !allowed.iter().any(|allowed| is_within(&path, allowed)) {
                wrong.push(format!("{module} imports crate::{path}"));
            }
        }
        // Another way to write `crate::` or its modules, which this test does not resolve.
        if code.contains("super::super::") {
            wrong.push(format!("{module} says super::super:: : say crate::"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Within the bridge, too: who starts others is not known to them.
#[test]
fn the_bridge_has_no_cycles() {
    let bridge: Vec<_> = sources().into_iter().filter(|file| is_within(&file.module, "bridge")).collect();
    let knows =
        |module: &str| {
            let mut known = BTreeSet::new();
            for File { code, .. } in bridge.iter().filter(|file| is_within(&file.module, module)) {
                let paths = imports(&code.replace("super::", "crate::bridge::"));
                known.extend(paths.iter().filter_map(|path| {
                    Some(format!("bridge::{}", path.strip_prefix("bridge::")?.split("::").next()?))
                }));
            }
            known
        };
    for File { module, .. } in bridge.iter().filter(|file| file.module != "bridge") {
        let (mut reached, mut todo) = (BTreeSet::new(), vec![module.clone()]);
        while let Some(next) = todo.pop() {
            todo.extend(knows(&next).into_iter().filter(|known| known != &next && reached.insert(known.clone())));
        }
        assert!(!reached.contains(module), "{module} knows itself by way of {reached:?}");
    }
}

#[test]
fn what_only_one_layer_knows_is_named_nowhere_else() {
    let mut wrong = Vec::new();
    for File { module, code } in sources() {
        for (name, known_to) in KNOWN_ONLY_TO {
            // Not as the end of a longer name, as in `crate::bridge::redis::`.
            let names = |(at, _): (usize, &str)| {
                !code[..at].ends_with(|c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':' || c == '"')
            };
            if code.match_indices(name).any(names) && !known_to.iter().any(|known| is_within(&module, known)) {
                wrong.push(format!("{module} names {name}, which only {known_to:?} may"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn imports_are_found_however_they_are_written() {
    let code = code(
        "//! crate::comment\nuse crate::a::B;\nuse crate::{c, d::{self, E, f::*}, g as h};\nfn x(y: crate::i::J<u8>) {}\n\
         #[cfg(test)]\nmod tests {\nuse crate::k;\n}\n",
    );
    let found: Vec<_> = imports(&code).into_iter().collect();
    assert_eq!(found, ["a::B", "c", "d::E", "d::f::*", "d::self", "g", "i::J"]);
    assert!(is_within("a::B", "a") && is_within("a", "a") && !is_within("ab", "a") && is_within("a", EVERYTHING));
}

/// In a statement written by hand, a name could be unquoted.
#[test]
fn what_people_are_to_paste_is_written_in_one_place() {
    const BEGINNINGS: [&str; 9] = [
        "ALTER TABLE ",
        "ALTER DATABASE ",
        "ALTER ROLE ",
        "ALTER PUBLICATION ",
        "CREATE PUBLICATION ",
        "DROP PUBLICATION ",
        "GRANT ",
        "SELECT pg_create_logical_replication_slot(",
        "ACL SETUSER ",
    ];
    let mut wrong = Vec::new();
    for File { module, code } in sources() {
        // The demo has servers of its own, where all names are plain.
        if module != "remedy" && !is_within(&module, "cli::demo") {
            let found = BEGINNINGS.iter().filter(|beginning| code.contains(*beginning));
            wrong.extend(found.map(|beginning| format!("{module} writes {beginning:?}: see remedy::Sql")));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
