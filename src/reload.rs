//! A configuration that is read again while the daemon runs: who asks, what comes of it, and what it cannot change.

use crate::config::{Config, ConfigError};
use crate::schema::TableSpec;
use crate::words::listed;
use tokio::sync::oneshot;

/// How many requests to reload may wait. Further ones are refused as `busy`.
pub const WAITING: usize = 4;

/// Reads the configuration again, from where it was read.
pub type Reread = Box<dyn Fn() -> Result<Config, ConfigError> + Send + Sync>;

/// Somebody wants the configuration to be read again. A signal awaits no answer.
pub type Wanted = Option<oneshot::Sender<Result<Changes, Refused>>>;

/// Why the new configuration is not taken. The old one stays.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    pub reasons: Vec<String>,
}

impl Refused {
    pub fn because(reason: impl Into<String>) -> Self {
        Refused { reasons: vec![reason.into()] }
    }
}

/// What a new configuration changes: names of tables, and settings.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Changes {
    pub added: Vec<String>,
    pub removed: Vec<String>,
    pub changed: Vec<String>,
    /// Settings that differ and stay as they are until the daemon is started again.
    pub restart_required: Vec<String>,
    /// Other settings that take effect now.
    pub settings: Vec<String>,
}

impl Changes {
    /// Between what the daemon runs with, and what was read again.
    pub fn between(old: &Config, new: &Config) -> Self {
        fn of<'c>(config: &'c Config, name: &str) -> Option<&'c TableSpec> {
            config.tables.iter().find(|table| table.name == name)
        }
        let mut changes = Changes::default();
        for table in &new.tables {
            match of(old, &table.name) {
                None => changes.added.push(table.name.clone()),
                Some(before) if !before.is_like(table) => changes.changed.push(table.name.clone()),
                Some(_) => {}
            }
        }
        let gone = old.tables.iter().filter(|table| of(new, &table.name).is_none());
        changes.removed = gone.map(|table| table.name.clone()).collect();
        let (settings, restart_required) =
            old.settings_that_differ(new).into_iter().partition(|s| s.starts_with("cache."));
        (changes.settings, changes.restart_required) = (settings, restart_required);
        changes
    }

    /// Whether the daemon goes on as before.
    pub fn are_none(&self) -> bool {
        [&self.added, &self.removed, &self.changed, &self.settings].iter().all(|names| names.is_empty())
    }

    /// For people.
    pub fn text(&self) -> String {
        let of = |verb: &str, names: &[String]| (!names.is_empty()).then(|| format!("{verb} {}", listed(names)));
        let parts = [
            of("added", &self.added),
            of("removed", &self.removed),
            of("changed", &self.changed),
            of("set", &self.settings),
            of("only with a restart:", &self.restart_required),
        ];
        let parts: Vec<String> = parts.into_iter().flatten().collect();
        if parts.is_empty() { "nothing has changed".to_owned() } else { parts.join("; ") }
    }
}
