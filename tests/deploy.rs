//! What surrounds the binary: the unit, the package, the image, the compose file, the alerts. Without a container
//! engine, systemd as init or a build of the package, it is checked that names, paths and options match each other and
//! the program.
//!
//! Missing tools are reported, and their checks are skipped.

use crate::harness::{Postgres, psql, skipped};
use prefetchd::cli::servers::on_path;
use prefetchd::format::Format;
use prefetchd::metrics::Metrics;
use prefetchd::nodes::Nodes;
use prefetchd::schema::{KeyTemplate, NullRule, QualifiedName, TableId, TableSpec};
use prefetchd::status::{Keys, Moment, Status};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::time::Duration;

const CONFIGURATION: &str = "/etc/prefetchd/prefetchd.toml";
/// The result of `systemd-analyze security`, in tenths. With systemd 252 it is 1.1, half of which is for the required
/// network.
const EXPOSURE: &str = "15";

pub fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

pub fn text(file: &str) -> String {
    std::fs::read_to_string(root().join(file)).unwrap_or_else(|error| panic!("{file}: {error}"))
}

fn yaml(file: &str) -> Value {
    serde_norway::from_str(&text(file)).unwrap_or_else(|error| panic!("{file}: {error}"))
}

/// Returns `None` if it is not installed.
fn tool(name: &str, args: &[&str]) -> Option<Output> {
    let Some(program) = on_path(&[name]) else {
        skipped(format_args!("{name} is not installed"));
        return None;
    };
    Some(Command::new(program).args(args).current_dir(root()).output().unwrap())
}

#[track_caller]
fn succeeds(output: &Output) {
    let said = [&output.stdout[..], &output.stderr].concat();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&said));
}

// ------------------------------------------------------------------------------------------------ systemd

/// Returns every `name=value` of the unit, in order.
fn unit() -> Vec<(String, String)> {
    let text = text("deploy/prefetchd.service");
    let lines = text.lines().filter(|line| !line.starts_with(['#', '[']));
    lines.filter_map(|line| line.split_once('=')).map(|(n, v)| (n.to_owned(), v.to_owned())).collect()
}

fn of_unit(name: &str) -> String {
    let values: Vec<_> = unit().into_iter().filter(|(n, _)| n == name).collect();
    assert_eq!(values.len(), 1, "{name}: {values:?}");
    values[0].1.clone()
}

#[test]
fn systemd_takes_the_unit() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("prefetchd.service");
    // It checks that the program exists.
    let unit = text("deploy/prefetchd.service").replace("/usr/bin/prefetchd", env!("CARGO_BIN_EXE_prefetchd"));
    std::fs::write(&file, unit).unwrap();
    let Some(output) = tool("systemd-analyze", &["verify", file.to_str().unwrap()]) else { return };
    succeeds(&output);
    // It only warns about unknown options.
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!said.contains("prefetchd.service"), "{said}");
}

#[test]
fn the_unit_is_hardened() {
    let threshold = format!("--threshold={EXPOSURE}");
    let args = ["security", "--offline=true", "--no-pager", &threshold, "deploy/prefetchd.service"];
    let Some(output) = tool("systemd-analyze", &args) else { return };
    if String::from_utf8_lossy(&output.stderr).contains("unrecognized option") {
        skipped("systemd-analyze is older than 250");
        return;
    }
    succeeds(&output);
}

#[test]
fn the_unit_and_the_program_agree() {
    let start = of_unit("ExecStart");
    let mut words = start.split(' ');
    assert_eq!(words.next(), Some("/usr/bin/prefetchd"));
    assert_eq!(words.collect::<Vec<_>>(), ["--config", CONFIGURATION, "run"]);
    assert_eq!(of_unit("ConditionPathExists"), CONFIGURATION);
    assert_eq!((of_unit("Type"), of_unit("RestartPreventExitStatus")), ("notify".to_owned(), "78".to_owned()));
    // A server may be away for longer than any limit.
    assert_eq!((of_unit("Restart"), of_unit("StartLimitIntervalSec")), ("always".to_owned(), "0".to_owned()));
    assert!(!unit().iter().any(|(name, _)| name == "StartLimitBurst"), "of no use");
    assert_eq!(of_unit("ExecReload"), "/bin/kill -HUP $MAINPID");
    assert_eq!(of_unit("Documentation"), "file:///usr/share/doc/prefetchd/README.md");
    // For an installation by hand, the documentation says what to change, and where everything is.
    let by_hand = "sed 's|/usr/bin/prefetchd|/usr/local/bin/prefetchd|' deploy/prefetchd.service";
    for part in [by_hand, CONFIGURATION, "/usr/local/bin/prefetchd", "/usr/share/doc/prefetchd/examples/prefetchd.toml"]
    {
        assert!(text("docs/operating.md").contains(part), "{part}");
    }
}

// ------------------------------------------------------------------------------------------------ package

/// What Cargo knows offline.
fn cargo_metadata(args: &[&str]) -> Value {
    let mut command = Command::new(env!("CARGO"));
    command.args(["metadata", "--offline", "--locked", "--format-version", "1"]).args(args).current_dir(root());
    let output = command.output().unwrap();
    succeeds(&output);
    serde_json::from_slice(&output.stdout).unwrap()
}

/// What the package contains: source, destination, and mode.
pub fn assets() -> Vec<[String; 3]> {
    let metadata = cargo_metadata(&["--no-deps"]);
    let mut packages = metadata["packages"].as_array().unwrap().iter();
    let deb = packages.find(|package| package["name"] == "prefetchd").unwrap()["metadata"]["deb"].clone();
    assert_eq!(deb["maintainer-scripts"], "deploy", "where the unit is");
    assert_eq!(deb["systemd-units"]["unit-name"], "prefetchd");
    assert_eq!(deb["license-file"][0], "LICENSE");
    serde_json::from_value(deb["assets"].clone()).unwrap()
}

/// Returns the files of the repository that match an asset, whose name may begin with `*`.
pub fn matching(asset: &str) -> Vec<String> {
    let (dir, name) = asset.rsplit_once('/').map_or((String::new(), asset), |(dir, name)| (format!("{dir}/"), name));
    let entries = std::fs::read_dir(root().join(&dir)).unwrap();
    let entries = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let fits = |file: &String| name.strip_prefix('*').map_or(file == name, |suffix| file.ends_with(suffix));
    entries.filter(fits).map(|file| format!("{dir}{file}")).collect()
}

#[test]
fn the_package_holds_what_is_there_where_it_is_looked_for() {
    let mut installed = Vec::new();
    for [from, to, mode] in assets() {
        if let Some(generated) = from.strip_prefix("target/generated/") {
            // "*.1" is written by `man-pages`, which writes one for each command.
            let file = generated.replace('*', "prefetchd");
            let written = text("scripts/generate.sh").contains(&format!(">\"$3/{file}\"\n"));
            assert!(generated == "*.1" || written, "{file}");
            installed.push(format!("/{to}{file}"));
            continue;
        }
        if from.starts_with("target/") {
            assert_eq!((from.as_str(), mode.as_str()), ("target/release/prefetchd", "755"));
            installed.push(format!("/{to}prefetchd"));
            continue;
        }
        assert_eq!(mode, "644", "{from}");
        let files = matching(&from);
        assert!(!files.is_empty(), "{from} is not there");
        let names = files.iter().map(|file| file.rsplit('/').next().unwrap());
        installed.extend(names.map(|name| format!("/{to}{name}")));
    }
    let doc = "/usr/share/doc/prefetchd";
    for file in ["README.md", "LICENSE-MIT", "LICENSE-APACHE", "docs/operating.md", "examples/prefetchd.toml"] {
        assert!(installed.contains(&format!("{doc}/{file}")), "{file}: {installed:?}");
    }
    for file in ["man/man1/prefetchd.1", "bash-completion/completions/prefetchd", "zsh/vendor-completions/_prefetchd"] {
        assert!(installed.contains(&format!("/usr/share/{file}")), "{file}: {installed:?}");
    }
    assert!(installed.contains(&of_unit("ExecStart").split(' ').next().unwrap().to_owned()), "{installed:?}");
    // Otherwise it would start before it is configured.
    assert!(!installed.iter().any(|file| file.starts_with("/etc")), "{installed:?}");
    // Files that the README refers to are included.
    let readme = text("README.md");
    let links = readme.split("](").skip(1).filter_map(|rest| rest.split([')', '#']).next());
    for link in links.filter(|link| link.starts_with("docs/") || link.starts_with("LICENSE")) {
        assert!(installed.contains(&format!("{doc}/{link}")), "README.md: {link}");
    }
}

#[test]
fn the_stated_version_of_rust_is_enough_for_every_dependency() {
    let version = |text: &str| text.split('.').map(|part| part.parse().unwrap()).collect::<Vec<u32>>();
    let stated = env!("CARGO_PKG_RUST_VERSION");
    // Packages for other systems need not be available.
    let metadata = cargo_metadata(&["--filter-platform", &format!("{}-unknown-linux-gnu", std::env::consts::ARCH)]);
    for package in metadata["packages"].as_array().unwrap() {
        if let Some(needed) = package["rust_version"].as_str() {
            assert!(version(needed)[..2] <= version(stated)[..], "{} needs Rust {needed}", package["name"]);
        }
    }
    assert!(text("README.md").contains(&format!("({stated} or later)")), "README.md says {stated}");
}

// ------------------------------------------------------------------------------------------------ containers

#[test]
fn the_compose_file_fits_its_schema() {
    let schema: Value = serde_json::from_str(&text("tests/fixtures/compose-spec.json")).unwrap();
    let validator = jsonschema::validator_for(&schema).unwrap();
    let compose = yaml("docker-compose.yml");
    let errors: Vec<_> = validator.iter_errors(&compose).map(|e| format!("{}: {e}", e.instance_path())).collect();
    assert!(errors.is_empty(), "{errors:#?}");
}

#[test]
fn the_compose_file_publishes_to_this_machine_alone() {
    let compose = yaml("docker-compose.yml");
    let services = compose["services"].as_object().unwrap();
    assert_eq!(services.keys().collect::<Vec<_>>(), ["grafana", "postgres", "prefetchd", "prometheus", "redis"]);
    for (name, service) in services {
        for port in service["ports"].as_array().unwrap() {
            assert!(port.as_str().unwrap().starts_with("127.0.0.1:"), "{name}: {port}");
        }
        assert!(service["network_mode"].is_null() && service["privileged"].is_null(), "{name}");
        // That of prefetchd is in its image, and must not be replaced by one of readiness.
        assert_eq!(service["healthcheck"].is_object(), name != "prefetchd", "{name}");
        for volume in service["volumes"].as_array().into_iter().flatten() {
            let volume = volume.as_str().unwrap();
            let (from, rest) = volume.split_once(':').unwrap();
            match from.strip_prefix("./") {
                Some(file) => {
                    assert!(root().join(file).exists(), "{name}: {volume}");
                    assert!(rest.ends_with(":ro"), "{name}: {volume}");
                }
                None => assert!(compose["volumes"].get(from).is_some(), "{name}: {volume}"),
            }
        }
    }
    let ours = &services["prefetchd"];
    assert_eq!((&ours["read_only"], &ours["cap_drop"][0]), (&true.into(), &"ALL".into()));
    assert_eq!(ours["volumes"][0], format!("./config/prefetchd.toml:{CONFIGURATION}:ro"));
    // The rules are where the configuration next to them expects them.
    assert_eq!(yaml("deploy/prometheus.yml")["rule_files"], serde_json::json!(["rules.yml"]));
    for file in ["prometheus.yml", "rules.yml"] {
        let mount = format!("./deploy/{file}:/etc/prometheus/{file}:ro");
        assert!(services["prometheus"]["volumes"].as_array().unwrap().contains(&mount.into()), "{file}");
    }
}

#[test]
fn the_settings_of_the_compose_file_are_good_ones() {
    let compose = yaml("docker-compose.yml");
    let mut command = Command::new(env!("CARGO_BIN_EXE_prefetchd"));
    for (name, value) in compose["services"]["prefetchd"]["environment"].as_object().unwrap() {
        command.env(name, value.as_str().unwrap());
    }
    let output = command.current_dir(root()).args(["config", "-c", "config/prefetchd.toml"]).output().unwrap();
    succeeds(&output);
    let effective = String::from_utf8(output.stdout).unwrap();
    assert!(effective.contains("listen = \"0.0.0.0:8787\"") && effective.contains("postgres:5432/shop"), "{effective}");
}

#[test]
fn the_image_runs_as_nobody_in_particular() {
    let text = text("Dockerfile");
    let stages: Vec<_> = text.lines().filter_map(|line| line.strip_prefix("FROM ")).collect();
    assert_eq!(stages.len(), 2, "{stages:?}");
    assert!(stages[1].ends_with(":nonroot"), "{stages:?}");
    // Built on the Debian version on which it runs, so that the C library is the same.
    assert!(stages[0].contains("bookworm") && stages[1].contains("debian12"), "{stages:?}");
    // Liveness: readiness would end a long first load, wherever unhealthy containers are restarted.
    let health = text.lines().find(|line| line.starts_with("HEALTHCHECK ")).unwrap();
    let (options, command) = health.split_once(" CMD ").unwrap();
    assert_eq!(command, "[\"/usr/local/bin/prefetchd\", \"status\", \"--live\"]");
    for option in ["--interval=", "--timeout=", "--start-period=", "--retries="] {
        assert!(options.contains(option), "{option}: {health}");
    }
    for line in ["ENTRYPOINT [\"/usr/local/bin/prefetchd\"]", "EXPOSE 8787"] {
        assert!(text.lines().any(|l| l.starts_with(line)), "{line}");
    }
    // What the build includes must not be ignored.
    let ignored = std::fs::read_to_string(root().join(".dockerignore")).unwrap();
    for needed in ["src", "Cargo.lock", "migrations", "config"] {
        assert!(!ignored.lines().any(|line| line.trim_matches(['/', '*']) == needed), "{needed}");
    }
    assert!(ignored.lines().any(|line| line == "!docs/errors.md"), "{ignored}");
}

// ------------------------------------------------------------------------------------------------ Prometheus

#[test]
fn alerts_fire_when_they_should() {
    if let Some(output) = tool("promtool", &["test", "rules", "deploy/rules.test.yml"]) {
        succeeds(&output);
        // This also finds the rules.
        succeeds(&tool("promtool", &["check", "config", "deploy/prometheus.yml"]).unwrap());
    }
}

/// Returns every series of a newly started daemon on a cluster: its name and its labels.
fn series() -> Vec<(String, BTreeMap<String, String>)> {
    let table = TableSpec {
        id: TableId(0),
        name: "t".to_owned(),
        table: QualifiedName { schema: "public".to_owned(), table: "t".to_owned() },
        key: KeyTemplate { literal: "t:".to_owned(), columns: vec!["id".to_owned()] },
        columns: vec![],
        rename: vec![],
        null: NullRule::Empty,
        ttl_ms: 1000,
        format: Format::Hash,
        lookups: Vec::new(),
    };
    let tables = [table];
    let nodes = Nodes::default();
    nodes.discovered([("127.0.0.1:7001".to_owned(), vec![0..=16_383])].into_iter());
    let status = Status { keys: Some(Keys { nodes, only: None }), ..Status::starting(&tables) };
    let text = Metrics::new(&tables).render(&status, Moment::now(), Duration::from_secs(30));
    let lines = text.lines().filter(|line| !line.starts_with('#')).map(|line| line.rsplit_once(' ').unwrap().0);
    lines
        .map(|line| match line.split_once('{') {
            None => (line.to_owned(), BTreeMap::new()),
            Some((name, labels)) => {
                let pairs = labels.trim_end_matches('}').split(',').filter_map(|pair| pair.split_once('='));
                (name.to_owned(), pairs.map(|(n, v)| (n.to_owned(), v.trim_matches('"').to_owned())).collect())
            }
        })
        .collect()
}

/// Returns the names in `text` that begin like ours, each with the `label="value"` pairs in the braces after it.
fn selectors(text: &str) -> Vec<(String, Vec<(String, String)>)> {
    let mut found = Vec::new();
    for (at, _) in text.match_indices("prefetchd_") {
        let of_a_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let rest = &text[at..];
        let (name, rest) = rest.split_at(rest.find(|c| !of_a_name(c)).unwrap_or(rest.len()));
        // `prefetchd_*.deb` is a file.
        if text[..at].ends_with(of_a_name) || rest.starts_with('*') {
            continue;
        }
        let inside = rest.strip_prefix('{').and_then(|rest| rest.split_once('}')).map_or("", |(inside, _)| inside);
        let pairs = inside.split(',').filter_map(|pair| pair.split_once('='));
        let labels = pairs.map(|(n, v)| (n.trim().to_owned(), v.trim().to_owned())).collect();
        found.push((name.to_owned(), labels));
    }
    found
}

#[test]
fn alerts_and_documents_name_metrics_that_are_there() {
    let series = series();
    for file in ["deploy/rules.yml", "docs/operating.md", "docs/guarantees.md", "docs/alerts.md"] {
        let text = text(file);
        let found = selectors(&text);
        let names_few = ["docs/guarantees.md", "docs/alerts.md"].contains(&file);
        assert!(found.len() > 5 || names_few, "{file}: {found:?}");
        for (name, labels) in found {
            // A histogram is listed under its base name.
            let named = |series: &str| series == name || series.strip_prefix(&name) == Some("_count");
            let same: Vec<_> = series.iter().filter(|(series, _)| named(series)).collect();
            assert!(!same.is_empty(), "{file}: there is no {name}");
            for (label, value) in labels {
                // `!=` and `=~` leave one character over.
                let label_name = label.trim_end_matches('!');
                let values: Vec<_> = same.iter().filter_map(|(_, labels)| labels.get(label_name)).collect();
                let of_prometheus = ["job", "instance"].contains(&label_name);
                assert!(!values.is_empty() || of_prometheus, "{file}: {name} has no label {label_name}");
                for value in value.trim_start_matches('~').trim_matches('"').split('|') {
                    assert!(
                        of_prometheus || values.iter().any(|v| *v == value),
                        "{file}: {name} has no {label}={value}"
                    );
                }
            }
        }
    }
    let rules = yaml("deploy/rules.yml");
    for rule in rules["groups"][0]["rules"].as_array().unwrap() {
        let name = rule["alert"].as_str().unwrap();
        assert!(["page", "ticket"].contains(&rule["labels"]["severity"].as_str().unwrap()), "{name}");
        assert!(text("deploy/rules.test.yml").contains(&format!("alertname: {name}\n")), "{name} is not tried");
        assert!(rule["annotations"]["summary"].is_string() && rule["annotations"]["description"].is_string(), "{name}");
    }
}

/// Returns the headings of this level, `##` for example.
fn headings(markdown: &str, level: &str) -> Vec<String> {
    let start = format!("{level} ");
    markdown.lines().filter_map(|line| line.strip_prefix(&start)).map(str::to_owned).collect()
}

#[test]
fn every_alert_leads_to_its_section_and_every_section_has_an_alert() {
    let rules = yaml("deploy/rules.yml");
    let docs = text("docs/alerts.md");
    let mut sections = headings(&docs, "##");
    let parts: Vec<_> = docs.split("\n## ").skip(1).collect();
    // The directory is the one that the unit names, in which the package installs the documentation.
    let base = of_unit("Documentation").replace("README.md", "docs/alerts.md");
    for rule in rules["groups"][0]["rules"].as_array().unwrap() {
        let name = rule["alert"].as_str().unwrap();
        // Anchors are in lower case.
        let anchor = format!("{base}#{}", name.to_lowercase());
        assert_eq!(rule["annotations"]["runbook_url"], anchor.as_str(), "{name}");
        let at = sections.iter().position(|section| section == name);
        sections.remove(at.unwrap_or_else(|| panic!("docs/alerts.md has no section {name}")));
        let part = parts.iter().find(|part| part.lines().next() == Some(name)).unwrap();
        for what in ["**Means.**", "**Readers see**", "**Cause", "emedy", "**Goes away**"] {
            assert!(part.contains(what), "{name}: {what}");
        }
        let severity = rule["labels"]["severity"].as_str().unwrap();
        let listed = docs.lines().find(|line| line.starts_with("| [")).unwrap();
        let (pages, tickets) = listed.split_once(" | ").unwrap();
        let column = if severity == "page" { pages } else { tickets };
        assert!(column.contains(&format!("[{name}](#{})", name.to_lowercase())), "{name} is a {severity}");
    }
    assert_eq!(sections, [""; 0], "sections without an alert");
}

#[test]
fn statements_for_alerts_run_when_pasted() {
    let postgres = Postgres::own(&[]);
    let url = postgres.url("postgres");
    psql(&url, "SELECT pg_create_logical_replication_slot('prefetchd', 'pgoutput')");
    let docs = text("docs/alerts.md");
    let blocks: Vec<_> = docs.split("```sql\n").skip(1).map(|rest| rest.split_once("```").unwrap().0).collect();
    assert!(blocks.len() > 8, "{blocks:?}");
    // ALTER SYSTEM and CHECKPOINT run outside of transactions, as when pasted.
    for statement in blocks.iter().flat_map(|block| block.split_inclusive(";\n")).filter(|s| !s.trim().is_empty()) {
        psql(&url, statement);
    }
    assert_eq!(psql(&url, "SELECT count(*) FROM pg_replication_slots"), "0");
}

#[test]
fn the_documents_name_every_alert() {
    let rules = yaml("deploy/rules.yml");
    let names = rules["groups"][0]["rules"].as_array().unwrap().iter().map(|r| r["alert"].as_str().unwrap().to_owned());
    let docs = text("docs/operating.md");
    for name in names {
        let link = format!("[`{name}`](alerts.md#{})", name.to_lowercase());
        assert!(docs.contains(&link), "{link}");
    }
}
