//! The settings, from a TOML file and the environment, checked as far as possible without a server.
//!
//! Knows files, variables and text; opens no connection. Everything is read here, including passwords: they are read
//! again for every connection, but a missing file must be reported at startup. A mistake here silently ignores a
//! misspelled key, turns the password `00123` into `123`, or writes a secret to a log. Values therefore stay text until
//! they are parsed by name, and neither `Debug` nor any error shows one that may be secret.

mod pgpass;
mod schema;
mod show;

pub use schema::schema;

use crate::code::Code;
use crate::format::Format;
use crate::lanes::{Lane, hash_tag};
use crate::password::command::{self, PasswordCommand};
use crate::password::{self, Password, PasswordError};
use crate::plan::key::{self, Area};
use crate::resp::batch::ChangeStream;
use crate::schema::{LookupSpec, NullRule, QualifiedName, TableId, TableSpec};
use crate::sink::connect::{Address, RedisTarget};
use crate::sink::durability::Durability;
use crate::source::target::PostgresTarget;
use config::{FileFormat, Source, Value, ValueKind};
use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Where the configuration file is looked for if none is given, in this order.
pub const DEFAULT_PATHS: [&str; 2] = ["./config/prefetchd.toml", "/etc/prefetchd/prefetchd.toml"];

/// The name of a variable is this prefix and the key in upper case, with [`ENV_SEPARATOR`] between section and key.
const ENV_PREFIX: &str = "PREFETCHD__";
const ENV_SEPARATOR: &str = "__";

/// The minimum length at which random letters and digits are safe from guessing.
const SHORTEST_TOKEN: usize = 16;
/// Keys are renewed every third of the TTL, and renewing a page of keys takes some milliseconds.
const SHORTEST_TTL: Duration = Duration::from_secs(1);
/// Ten years. Anything longer is a typing error, and would defeat the TTL's purpose as a safety net.
const LONGEST_TTL: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// A row may have more. Anything lower is a typing error.
const LOWEST_LOAD_RATE: NonZeroU64 = NonZeroU64::new(10_000).expect("it is above 0");
/// The length that Postgres allows for a name (`NAMEDATALEN` - 1).
const LONGEST_IDENTIFIER_BYTES: usize = 63;

/// The type of a setting's value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Text,
    /// A Postgres connection string, which may contain a password.
    PostgresUrl,
    /// A Redis URL, which may contain a password.
    RedisUrl,
    /// `true` or `false`.
    Flag,
    /// Names, separated by commas in a variable.
    Names,
    /// A program and its arguments; in a variable, as a JSON array.
    Command,
    /// A whole number.
    Count,
    /// `64MB`, or a number of bytes.
    Size,
    /// `500ms`, `30s`, `24h`.
    Time,
}

/// Every key except those of the tables, with its type and default.
const SETTINGS: &[(&str, Kind, &str)] = &[
    ("postgres.url", Kind::PostgresUrl, "postgres://prefetchd@127.0.0.1:5432/shop"),
    ("postgres.password_file", Kind::Text, ""),
    ("postgres.password_command", Kind::Command, "[]"),
    ("postgres.reader_url", Kind::PostgresUrl, ""),
    ("postgres.slot", Kind::Text, "prefetchd"),
    ("postgres.publication", Kind::Text, "prefetchd"),
    ("postgres.create", Kind::Flag, "true"),
    ("postgres.failover", Kind::Flag, "false"),
    ("redis.url", Kind::RedisUrl, "redis://127.0.0.1:6379/0"),
    ("redis.password_file", Kind::Text, ""),
    ("redis.password_command", Kind::Command, "[]"),
    ("redis.sentinel_password_command", Kind::Command, "[]"),
    ("redis.packed", Kind::Text, "auto"),
    ("redis.durability", Kind::Text, "memory"),
    ("cache.ttl", Kind::Time, "24h"),
    ("cache.null", Kind::Text, "empty"),
    ("cache.max_staleness", Kind::Time, "30s"),
    ("cache.max_atomic_changes", Kind::Count, "10000"),
    ("cache.max_atomic_bytes", Kind::Size, "64MB"),
    ("cache.verify_every", Kind::Time, "24h"),
    ("cache.load_rate", Kind::Size, ""),
    ("changes.stream", Kind::Text, ""),
    ("changes.max_len", Kind::Count, "100000"),
    ("http.listen", Kind::Text, "127.0.0.1:8787"),
    ("http.admin_token_file", Kind::Text, ""),
    ("http.hosts", Kind::Names, ""),
    ("http.page", Kind::Flag, "true"),
    ("log.level", Kind::Text, "info"),
    ("log.format", Kind::Text, "text"),
];
/// Files of secrets: their names in warnings, and their keys.
const SECRET_FILES: [(&str, &str); 3] = [
    ("token file", "http.admin_token_file"),
    ("password file", "postgres.password_file"),
    ("password file", "redis.password_file"),
];
const SECTIONS: [&str; 6] = ["postgres", "redis", "cache", "changes", "http", "log"];
const TABLE_KEYS: [&str; 8] = ["name", "table", "key", "columns", "rename", "ttl", "format", "lookups"];
const LOOKUP_KEYS: [&str; 3] = ["name", "key", "order"];

/// All settings.
#[derive(Debug, Clone)]
pub struct Config {
    pub postgres: PostgresSettings,
    pub redis: RedisSettings,
    pub cache: CacheSettings,
    /// At least one. A table's index is its [`TableId`].
    pub tables: Vec<TableSpec>,
    /// Where changes are announced, if they are.
    pub changes: Option<ChangeStream>,
    pub http: HttpSettings,
    pub log: LogSettings,
    /// Warnings to log once there is a log.
    pub warnings: Vec<Warning>,
    /// As [`Config::to_toml`] shows them.
    settings: Vec<(&'static str, String)>,
}

/// What does not keep the daemon from running, and a person should know.
#[derive(Debug, Clone)]
pub struct Warning {
    pub code: Code,
    pub text: String,
}

impl Warning {
    /// Others than the daemon can read a secret.
    fn exposed(text: String) -> Self {
        Warning { code: Code::SecretExposed, text }
    }
}

#[derive(Debug, Clone)]
pub struct PostgresSettings {
    /// The server, and the role that replicates and owns the slot, publication and stream. Includes the password from
    /// whatever source.
    pub target: PostgresTarget,
    /// The role that reads tables and the catalog, if it is a different one.
    pub reader: Option<PostgresTarget>,
    pub slot: String,
    pub publication: String,
    pub create: Create,
    /// Whether a slot is created as a failover slot (Postgres 17).
    pub failover: bool,
}

/// Whether to create a missing slot or publication.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Create {
    WhereMissing,
    /// They are managed elsewhere. Without them the daemon does not start.
    Never,
}

#[derive(Debug, Clone)]
pub struct RedisSettings {
    /// Includes the password from whatever source.
    pub target: RedisTarget,
    pub durability: Durability,
}

#[derive(Debug, Clone)]
pub struct CacheSettings {
    pub max_staleness: Duration,
    pub max_atomic_changes: u64,
    pub max_atomic_bytes: usize,
    /// `None` for never.
    pub verify_every: Option<Duration>,
    /// Bytes a second that loads, verifications and refetches may read from Postgres. `None`: no limit.
    pub load_rate: Option<NonZeroU64>,
}

#[derive(Debug, Clone)]
pub struct HttpSettings {
    pub listen: SocketAddr,
    pub admin_token: Option<Secret>,
    /// Additional host names under which it may be addressed.
    pub hosts: Vec<String>,
    /// Whether `/` serves the status page.
    pub page: bool,
}

/// The settings for commands that talk to a running daemon.
#[derive(Debug)]
pub struct ClientSettings {
    pub listen: SocketAddr,
    /// As in [`HttpSettings`].
    pub hosts: Vec<String>,
    /// An error if it cannot be read, which matters only to commands that need it.
    pub admin_token: Result<Option<Secret>, ConfigError>,
}

#[derive(Debug, Clone)]
pub struct LogSettings {
    /// A level, or directives of `tracing_subscriber::EnvFilter`.
    pub level: String,
    pub format: LogFormat,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    Text,
    Json,
}

/// Text that no log and no message may show.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl From<String> for Secret {
    fn from(text: String) -> Self {
        Self(text)
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// A problem with the configuration. Retrying cannot help: exit 78.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{thing}: {fact}{}{remedy}", if remedy.is_empty() { "" } else { ": " })]
pub struct ConfigError {
    pub code: Code,
    /// The key and its file, or the variable.
    pub thing: String,
    pub fact: String,
    /// Empty if the fact already says it.
    pub remedy: String,
}

/// Refuses a value that its setting does not take.
fn refuse<T>(thing: impl Into<String>, fact: impl Into<String>, remedy: impl Into<String>) -> Result<T, ConfigError> {
    refuse_as(Code::ConfigValue, thing, fact, remedy)
}

fn refuse_as<T>(
    code: Code,
    thing: impl Into<String>,
    fact: impl Into<String>,
    remedy: impl Into<String>,
) -> Result<T, ConfigError> {
    Err(ConfigError { code, thing: thing.into(), fact: fact.into(), remedy: remedy.into() })
}

impl Config {
    /// Returns the names of the settings, but for those of tables, that another configuration has otherwise. Secrets are not
    /// compared.
    pub fn settings_that_differ(&self, other: &Config) -> Vec<String> {
        let pairs = self.settings.iter().zip(&other.settings);
        pairs.filter(|(before, after)| before != after).map(|((name, _), _)| (*name).to_owned()).collect()
    }

    /// Returns what takes effect of `new` without a restart: its tables, and its `cache` settings.
    pub fn reloaded(&self, new: Config) -> Config {
        let Config { postgres, redis, changes, http, log, .. } = self.clone();
        let now =
            |(new, own): (_, &(&'static str, String))| if own.0.starts_with("cache.") { new } else { own.clone() };
        let settings = new.settings.into_iter().zip(&self.settings).map(now).collect();
        let Config { cache, tables, warnings, .. } = new;
        Config { postgres, redis, cache, tables, changes, http, log, warnings, settings }
    }

    /// Whether all keys share one hash slot, because every template has the hash tag of prefetchd's own keys. On a cluster
    /// they are then written as on a single Redis.
    pub fn one_slot(&self) -> bool {
        self.tables.iter().all(|table| shares_slot(table, &self.postgres.slot))
    }

    /// Returns the prefixes of the tables' row keys.
    pub fn key_prefixes(&self) -> Vec<String> {
        self.tables.iter().map(|table| table.key.literal.clone()).collect()
    }

    /// Returns the prefixes of those that are RedisJSON documents.
    pub fn document_prefixes(&self) -> Vec<String> {
        let tables = self.tables.iter().filter(|table| table.format == Format::RedisJson);
        tables.map(|table| table.key.literal.clone()).collect()
    }

    /// Returns the prefixes of the keys of lookups.
    pub fn lookup_prefixes(&self) -> Vec<String> {
        let lookups = self.tables.iter().flat_map(|table| &table.lookups);
        lookups.map(|lookup| lookup.key.literal.clone()).collect()
    }

    /// Returns the name of the replication slot if the rows lie in several hash slots of a cluster. They lie in that of the
    /// checkpoint if all templates have the same hash tag, the slot's name.
    pub fn lanes(&self) -> Option<&str> {
        let is_cluster = matches!(self.redis.target.address, Address::Cluster(_));
        (is_cluster && !self.one_slot()).then_some(self.postgres.slot.as_str())
    }

    /// Returns the first of these templates, which this or an earlier configuration had, whose keys the writer of one hash slot
    /// cannot remove, because they lie in others. `None` if it is not used, or on a single Redis.
    pub fn out_of_reach<'t>(&self, mut templates: impl Iterator<Item = &'t String>) -> Option<&'t str> {
        if !matches!(self.redis.target.address, Address::Cluster(_)) || !self.one_slot() {
            return None;
        }
        let elsewhere = |template: &&String| {
            Area::of(template).is_some_and(|area| !prefix_shares_slot(area.prefix(), &self.postgres.slot))
        };
        templates.find(elsewhere).map(String::as_str)
    }

    /// Reads `file`, or the first of [`DEFAULT_PATHS`] that exists, and the environment of this process.
    ///
    /// # Errors
    /// The first problem found in the settings; also if a password file cannot be read.
    pub fn load(file: Option<&Path>) -> Result<Self, ConfigError> {
        let (text, name, env) = read(file)?;
        Self::parse(&text, &name, &env)
    }

    /// Parses the settings in `text`, which messages call `file`, and in the variables `env`, which take precedence.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn parse(text: &str, file: &str, env: &HashMap<String, String>) -> Result<Self, ConfigError> {
        let merged = Merged::read(text, file, env)?;
        let cache_ttl = merged.ttl("cache.ttl")?;
        let null = merged.choice("cache.null", &[("empty", NullRule::Empty), ("omit", NullRule::Omit)])?;
        let tables = merged.tables(null, cache_ttl)?;
        let mut warnings = Vec::new();
        let postgres = merged.postgres(env, &mut warnings)?;
        let redis = merged.redis(&postgres.slot, env)?;
        let cache = CacheSettings {
            max_staleness: merged.time_above_zero("cache.max_staleness")?,
            max_atomic_changes: merged.count("cache.max_atomic_changes")?,
            max_atomic_bytes: merged.size("cache.max_atomic_bytes")?,
            verify_every: Some(merged.time("cache.verify_every")?).filter(|every| !every.is_zero()),
            load_rate: merged.load_rate()?,
        };
        let changes = merged.changes(&tables)?;
        let http = HttpSettings {
            listen: merged.listen()?,
            admin_token: merged.admin_token()?,
            hosts: merged.hosts()?,
            page: merged.flag("http.page")?,
        };
        let log = LogSettings {
            level: merged.log_level()?,
            format: merged.choice("log.format", &[("text", LogFormat::Text), ("json", LogFormat::Json)])?,
        };
        for (what, key) in SECRET_FILES {
            warnings.extend(password::shared(what, Path::new(&merged.text(key)?)).map(Warning::exposed));
        }
        let redis_key = redis.target.tls.as_ref().and_then(|tls| tls.identity.as_ref());
        let reader_key = postgres.reader.as_ref().and_then(PostgresTarget::key_file);
        let keys = [postgres.target.key_file(), reader_key, redis_key.map(|identity| identity.key.as_path())];
        let exposed = keys.into_iter().flatten().filter_map(|key| password::shared("key file", key));
        warnings.extend(exposed.map(Warning::exposed));
        if merged.holds_password()?
            && let Some(shared) = password::shared("configuration file", Path::new(file))
        {
            warnings.push(Warning::exposed(format!("{shared}, or move its password to a password_file")));
        }
        if matches!(redis.target.address, Address::Cluster(_)) {
            warnings.extend(lies_apart(&tables, &postgres.slot));
        }
        let settings = show::settings(&merged)?;
        let config = Self { postgres, redis, cache, tables, changes, http, log, warnings, settings };
        config.announces_in_one_slot(&merged)?;
        config.documents_share_slot(file)?;
        Ok(config)
    }

    /// Where all keys of a cluster lie in one hash slot, rows and their announcements are written in one transaction.
    fn announces_in_one_slot(&self, merged: &Merged) -> Result<(), ConfigError> {
        let Some(stream) = self.changes.as_ref().filter(|_| matches!(self.redis.target.address, Address::Cluster(_)))
        else {
            return Ok(());
        };
        let slot = &self.postgres.slot;
        let place = merged.place("changes.stream");
        if self.lanes().is_none() && hash_tag(stream.key.as_bytes()) != Some(slot.as_bytes()) {
            let remedy = format!("write {{{slot}}} into it, as in \"changes:{{{slot}}}\"");
            return refuse_as(
                Code::HashSlots,
                place,
                format!("{:?} lies in another hash slot than the rows", stream.key.to_string()),
                remedy,
            );
        }
        Ok(())
    }

    fn documents_share_slot(&self, file: &str) -> Result<(), ConfigError> {
        let mut documents = self.tables.iter().filter(|table| table.format == Format::RedisJson);
        let (Some(slot), Some(table)) = (self.lanes(), documents.next()) else { return Ok(()) };
        refuse_as(
            Code::HashSlots,
            format!("table {:?} in {file}", table.name),
            "on a Redis Cluster, RedisJSON documents are written only where all keys lie in one hash slot",
            format!("begin the key of every table with \"{{{{{slot}}}}}:\", or write format = \"json\""),
        )
    }

    /// Returns the effective settings as a TOML file, with secrets as `***`.
    pub fn to_toml(&self) -> String {
        show::toml(&self.settings, &self.tables)
    }
}

impl ClientSettings {
    /// Reads the same file and variables as [`Config::load`], but only these settings, so that asking for the status
    /// does not require read access to the daemon's passwords.
    ///
    /// # Errors
    /// As [`Config::load`], for fewer settings.
    pub fn load(file: Option<&Path>) -> Result<Self, ConfigError> {
        let (text, name, env) = read(file)?;
        let merged = Merged::read(&text, &name, &env)?;
        Ok(Self { listen: merged.listen()?, hosts: merged.hosts()?, admin_token: merged.admin_token() })
    }
}

/// Reads the configuration file. Returns its text, its name, and the environment of this process.
fn read(file: Option<&Path>) -> Result<(String, String, HashMap<String, String>), ConfigError> {
    let path = match file {
        Some(path) => path.to_owned(),
        None => DEFAULT_PATHS.iter().map(PathBuf::from).find(|path| path.exists()).ok_or_else(no_file)?,
    };
    let name = path.display().to_string();
    let text = match std::fs::read(&path).map(String::from_utf8) {
        Ok(Ok(text)) => text,
        Ok(Err(_)) => return refuse_as(Code::ConfigUnreadable, name, "it is not UTF-8", "save it as UTF-8"),
        Err(error) => {
            return refuse_as(
                Code::ConfigUnreadable,
                name,
                format!("it cannot be read ({error})"),
                "correct --config, or the file's permissions",
            );
        }
    };
    // Not `vars()`, which panics on any variable that is not UTF-8.
    let mut env = HashMap::new();
    for (name, value) in std::env::vars_os() {
        match (name.into_string(), value.into_string()) {
            (Ok(name), Ok(value)) => {
                env.insert(name, value);
            }
            (Ok(name), Err(_)) if is_ours(&name) || name == "PGPASSWORD" || PostgresTarget::reads(&name) => {
                return refuse_as(Code::ConfigUnreadable, name, "it is not UTF-8", "correct the variable");
            }
            _ => {}
        }
    }
    Ok((text, name, env))
}

fn no_file() -> ConfigError {
    let remedy = "write one, beginning with\n\n\
        [postgres]\nurl = \"postgres://prefetchd@127.0.0.1:5432/shop\"\n\n\
        [redis]\nurl = \"redis://127.0.0.1:6379/0\"\n\n\
        [[tables]]\nname = \"categories\"\ntable = \"public.categories\"\nkey = \"cache:category:{id}\"\n\n\
        or name another with --config FILE";
    ConfigError {
        code: Code::ConfigMissing,
        thing: "no configuration".to_owned(),
        fact: format!("neither {} nor {} exists", DEFAULT_PATHS[0], DEFAULT_PATHS[1]),
        remedy: remedy.to_owned(),
    }
}

fn is_ours(variable: &str) -> bool {
    variable.get(..ENV_PREFIX.len()).is_some_and(|prefix| prefix.eq_ignore_ascii_case(ENV_PREFIX))
}

fn variable_of(key: &str) -> String {
    format!("{ENV_PREFIX}{}", key.replace('.', ENV_SEPARATOR)).to_uppercase()
}

/// File and environment merged, with known keys only. Values are still text.
struct Merged {
    values: HashMap<String, Value>,
    file: String,
    /// The variables that are set, by key.
    variables: BTreeMap<String, String>,
}

impl Merged {
    fn read(text: &str, file: &str, env: &HashMap<String, String>) -> Result<Self, ConfigError> {
        let source = config::File::from_str(text, FileFormat::Toml);
        let in_file = source.collect().or_else(|error| malformed(file, &error))?;
        for (key, value) in &in_file {
            known(file, key, value)?;
        }
        let mut variables = BTreeMap::new();
        let ours: HashMap<String, String> =
            env.iter().filter(|(n, _)| is_ours(n)).map(|(n, v)| (n.clone(), v.clone())).collect();
        for name in ours.keys() {
            let key = name[ENV_PREFIX.len()..].to_lowercase().replace(ENV_SEPARATOR, ".");
            if key == "tables" || key.starts_with("tables.") {
                return refuse_as(
                    Code::ConfigUnknownKey,
                    name,
                    "tables cannot come from the environment",
                    format!("write [[tables]] in {file}"),
                );
            }
            if setting(&key).is_none() {
                return refuse_as(
                    Code::ConfigUnknownKey,
                    name,
                    "no such setting",
                    format!("did you mean {}?", variable_of(nearest(&key))),
                );
            }
            if let Some(other) = variables.insert(key, name.clone()) {
                return refuse_as(Code::ConfigConflict, name, format!("it is also set as {other}"), "set one of them");
            }
        }
        let environment = config::Environment::with_prefix(ENV_PREFIX.trim_end_matches(ENV_SEPARATOR))
            .prefix_separator(ENV_SEPARATOR)
            .separator(ENV_SEPARATOR)
            .try_parsing(false)
            .source(Some(ours));
        let merged = config::Config::builder().add_source(source).add_source(environment).build();
        let values = merged.and_then(|merged| merged.collect()).or_else(|error| malformed(file, &error))?;
        Ok(Self { values, file: file.to_owned(), variables })
    }

    /// Returns a setting's name and where it was set, for messages.
    fn place(&self, key: &str) -> String {
        match self.variables.get(key) {
            Some(variable) => variable.clone(),
            None => format!("{key} in {}", self.file),
        }
    }

    /// Returns the text of a setting, or its default.
    fn text(&self, key: &str) -> Result<String, ConfigError> {
        let (_, kind, default) = *setting(key).expect("asked for by its name in SETTINGS");
        let (section, name) = key.split_once('.').expect("every key has a section");
        let value = match self.values.get(section).map(|section| &section.kind) {
            Some(ValueKind::Table(table)) => table.get(name).map(|value| &value.kind),
            _ => None,
        };
        match (value, kind) {
            (None | Some(ValueKind::Nil), _) => Ok(default.to_owned()),
            (Some(ValueKind::String(_)), Kind::Names | Kind::Command) if !self.variables.contains_key(key) => {
                refuse(self.place(key), "it is not a list", form(kind))
            }
            (Some(ValueKind::String(text)), _) => Ok(text.clone()),
            (Some(ValueKind::Boolean(flag)), Kind::Flag) => Ok(flag.to_string()),
            (Some(ValueKind::I64(number)), Kind::Count | Kind::Size) => Ok(number.to_string()),
            (Some(ValueKind::Array(names)), Kind::Names) => {
                let name = |value: &Value| match &value.kind {
                    ValueKind::String(name) if !name.contains(',') => Ok(name.clone()),
                    _ => refuse(self.place(key), "it must contain names only", form(kind)),
                };
                Ok(names.iter().map(name).collect::<Result<Vec<_>, _>>()?.join(","))
            }
            (Some(ValueKind::Array(words)), Kind::Command) => {
                let word = |value: &Value| match &value.kind {
                    ValueKind::String(word) => Ok(serde_json::Value::from(word.as_str())),
                    _ => refuse(self.place(key), "it must contain strings only", form(kind)),
                };
                let words = words.iter().map(word).collect::<Result<Vec<_>, _>>()?;
                Ok(serde_json::Value::from(words).to_string())
            }
            // The value is not shown, because it may be a misplaced password.
            (Some(_), _) => refuse(self.place(key), "not a value of this setting", form(kind)),
        }
    }

    /// Whether the file itself contains a password, as part of a URL.
    fn holds_password(&self) -> Result<bool, ConfigError> {
        for (key, kind, _) in SETTINGS.iter().filter(|(key, _, _)| !self.variables.contains_key(*key)) {
            let text = self.text(key)?;
            let masked = match kind {
                Kind::PostgresUrl => show::mask_postgres(&text),
                Kind::RedisUrl => show::mask_redis(&text),
                _ => continue,
            };
            if masked != text {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Returns the words of a command, none if it is not set.
    fn words(&self, key: &str) -> Result<Vec<String>, ConfigError> {
        let text = self.text(key)?;
        match serde_json::from_str::<Vec<String>>(&text) {
            _ if text.is_empty() => Ok(Vec::new()),
            Ok(words) if words.first().is_some_and(String::is_empty) => {
                refuse(self.place(key), "its program has no name", form(Kind::Command))
            }
            Ok(words) if words.iter().any(|word| word.contains('\0')) => {
                refuse(self.place(key), "an argument contains a NUL byte", "remove it")
            }
            Ok(words) => Ok(words),
            // Only a variable.
            Err(_) => refuse(self.place(key), "it is not a list of strings", form(Kind::Command)),
        }
    }

    fn choice<T: Copy>(&self, key: &str, choices: &[(&str, T)]) -> Result<T, ConfigError> {
        let text = self.text(key)?;
        match choices.iter().find(|(name, _)| *name == text) {
            Some((_, choice)) => Ok(*choice),
            None => {
                let names: Vec<String> = choices.iter().map(|(name, _)| format!("{name:?}")).collect();
                refuse(self.place(key), format!("{text:?} is not a choice"), format!("write {}", names.join(" or ")))
            }
        }
    }

    fn flag(&self, key: &str) -> Result<bool, ConfigError> {
        match self.text(key)?.as_str() {
            "true" => Ok(true),
            "false" => Ok(false),
            other => refuse(self.place(key), format!("{other:?} is neither true nor false"), form(Kind::Flag)),
        }
    }

    fn count(&self, key: &str) -> Result<u64, ConfigError> {
        let text = self.text(key)?;
        match text.parse() {
            Ok(0) | Err(_) => refuse(self.place(key), format!("{text:?} is not a number above 0"), form(Kind::Count)),
            Ok(number) => Ok(number),
        }
    }

    fn size(&self, key: &str) -> Result<usize, ConfigError> {
        let text = self.text(key)?;
        let size = text.parse::<bytesize::ByteSize>().ok().and_then(|size| usize::try_from(size.as_u64()).ok());
        match size {
            None | Some(0) => refuse(self.place(key), format!("{text:?} is not a size above 0"), form(Kind::Size)),
            Some(size) => Ok(size),
        }
    }

    fn load_rate(&self) -> Result<Option<NonZeroU64>, ConfigError> {
        let (key, text) = ("cache.load_rate", self.text("cache.load_rate")?);
        if text.is_empty() {
            return Ok(None);
        }
        let remedy = "write the bytes a second, such as \"20MB\", at least \"10kB\", or \"\" for no limit";
        match text.parse::<bytesize::ByteSize>().map(|size| NonZeroU64::new(size.as_u64())) {
            Ok(Some(rate)) if rate >= LOWEST_LOAD_RATE => Ok(Some(rate)),
            Ok(_) => refuse(self.place(key), format!("{text:?} is so little that no load would end"), remedy),
            Err(_) => refuse(self.place(key), format!("{text:?} is not a size"), remedy),
        }
    }

    fn time(&self, key: &str) -> Result<Duration, ConfigError> {
        time(&self.place(key), &self.text(key)?)
    }

    fn time_above_zero(&self, key: &str) -> Result<Duration, ConfigError> {
        match self.time(key)? {
            Duration::ZERO => refuse(self.place(key), "it is 0", form(Kind::Time)),
            time => Ok(time),
        }
    }

    fn ttl(&self, key: &str) -> Result<u64, ConfigError> {
        ttl_ms(&self.place(key), &self.text(key)?)
    }

    fn postgres(
        &self,
        env: &HashMap<String, String>,
        warnings: &mut Vec<Warning>,
    ) -> Result<PostgresSettings, ConfigError> {
        let password = self.password("postgres.password_file", "postgres.password_command", env)?;
        let target = self.postgres_target("postgres.url", password, env, warnings)?;
        let reader = match self.text("postgres.reader_url")?.is_empty() {
            true => None,
            false => Some(self.postgres_target("postgres.reader_url", None, env, warnings)?),
        };
        let slot = self.text("postgres.slot")?;
        if !is_slot_name(&slot) {
            return refuse(
                self.place("postgres.slot"),
                format!("{slot:?} is not a valid slot name"),
                format!("write 1 to {LONGEST_IDENTIFIER_BYTES} of a-z, 0-9 and _"),
            );
        }
        let publication = self.text("postgres.publication")?;
        if !(1..=LONGEST_IDENTIFIER_BYTES).contains(&publication.len()) || publication.contains('\0') {
            return refuse(
                self.place("postgres.publication"),
                format!("{publication:?} is not a valid publication name"),
                format!("write 1 to {LONGEST_IDENTIFIER_BYTES} bytes"),
            );
        }
        let create = if self.flag("postgres.create")? { Create::WhereMissing } else { Create::Never };
        Ok(PostgresSettings { target, reader, slot, publication, create, failover: self.flag("postgres.failover")? })
    }

    /// `password` is that of the setting that takes precedence over the URL.
    fn postgres_target(
        &self,
        key: &str,
        password: Option<Password>,
        env: &HashMap<String, String>,
        warnings: &mut Vec<Warning>,
    ) -> Result<PostgresTarget, ConfigError> {
        let mut target = match PostgresTarget::parse(&self.text(key)?, env) {
            Ok(target) => target,
            Err(error) => return refuse_as(error.code(), self.place(key), error.to_string(), ""),
        };
        match password {
            Some(Password::Command(_)) if target.password != Password::None => {
                return self.two_passwords("postgres.password_command", key);
            }
            Some(password) => target.password = password,
            None if target.password != Password::None => {}
            None => {
                let found = pgpass::password(&target, env, warnings);
                target.password = found
                    .or_else(|error| refuse_as(Code::SecretUnavailable, self.place(key), error.to_string(), ""))?;
            }
        }
        Ok(target)
    }

    fn redis(&self, slot: &str, env: &HashMap<String, String>) -> Result<RedisSettings, ConfigError> {
        let mut target = match RedisTarget::parse(&self.text("redis.url")?) {
            Ok(target) => target,
            Err(error) => {
                let text = error.to_string();
                // The error names the key; the place does so more precisely.
                let fact = text.strip_prefix("redis.url").unwrap_or(&text).trim_start_matches([':', ' ']);
                return refuse_as(error.code(), self.place("redis.url"), fact, "");
            }
        };
        match self.password("redis.password_file", "redis.password_command", env)? {
            Some(Password::Command(_)) if target.password != Password::None => {
                return self.two_passwords("redis.password_command", "redis.url");
            }
            Some(password) => target.password = password,
            None => {}
        }
        if let Some(command) = self.password_command("redis.sentinel_password_command", env)? {
            let place = self.place("redis.sentinel_password_command");
            let Address::Sentinel(sentinels) = &mut target.address else {
                return refuse_as(
                    Code::ConfigConflict,
                    place,
                    "redis.url names no Sentinels",
                    "remove it, or set redis.password_command",
                );
            };
            if sentinels.password != Password::None {
                return refuse_as(
                    Code::ConfigConflict,
                    place,
                    "redis.url has sentinel_password, too",
                    "remove one of them",
                );
            }
            sentinels.password = Password::Command(command);
        }
        target.packs = match &*self.text("redis.packed")? {
            "auto" => true,
            "off" => false,
            text => {
                let remedy = "write \"auto\" or \"off\"";
                return refuse(self.place("redis.packed"), format!("{text:?} is not a choice"), remedy);
            }
        };
        // The hash tag of prefetchd's own keys is the slot's name.
        let target = target.at_home(Lane::of(slot.as_bytes()));
        Ok(RedisSettings { target, durability: self.durability()? })
    }

    fn durability(&self) -> Result<Durability, ConfigError> {
        let text = self.text("redis.durability")?;
        match text.split_once(':').map(|(word, number)| (word, number.parse::<u32>())) {
            None if text == "memory" => Ok(Durability::Memory),
            None if text == "aof" => Ok(Durability::Aof),
            Some(("replicas", Ok(number))) if number > 0 => Ok(Durability::Replicas(number)),
            _ => refuse(
                self.place("redis.durability"),
                format!("{text:?} is not a choice"),
                "write \"memory\", \"replicas:1\" (or another number) or \"aof\"",
            ),
        }
    }

    fn changes(&self, tables: &[TableSpec]) -> Result<Option<ChangeStream>, ConfigError> {
        let (stream, max_len) = (self.text("changes.stream")?, self.count("changes.max_len")?);
        let place = || self.place("changes.stream");
        // XADD takes a signed number, and would fail in the middle of a transaction.
        if max_len > i64::MAX.unsigned_abs() {
            return refuse(self.place("changes.max_len"), "it is more than Redis can count", form(Kind::Count));
        }
        if stream.is_empty() {
            return Ok(None);
        }
        if stream.starts_with(key::OWN_PREFIX) {
            let fact = format!("{stream:?} begins with {:?}, which belongs to prefetchd itself", key::OWN_PREFIX);
            return refuse_as(Code::KeyPrefix, place(), fact, "choose another key");
        }
        let is_beside = |literal: &str| !stream.starts_with(literal) && !literal.starts_with(&stream);
        let literals = tables.iter().flat_map(|table| literals(table).into_iter().map(move |(_, l)| (table, l)));
        if let Some((table, literal)) = literals.into_iter().find(|(_, literal)| !is_beside(literal)) {
            let fact = format!("{stream:?} and {literal:?} of table {:?} begin the same way", table.name);
            return refuse_as(
                Code::KeyPrefix,
                place(),
                fact,
                "choose a key that begins with no table's literal, and begins none",
            );
        }
        Ok(Some(ChangeStream::at(&stream, max_len)))
    }

    fn listen(&self) -> Result<SocketAddr, ConfigError> {
        let text = self.text("http.listen")?;
        let port = |text: &str| text.strip_prefix("localhost:").and_then(|port| port.parse().ok());
        match text.parse().ok().or_else(|| port(&text).map(|port: u16| (Ipv4Addr::LOCALHOST, port).into())) {
            Some(address) => Ok(address),
            None => refuse(
                self.place("http.listen"),
                format!("{text:?} is not an address with a port"),
                "write 127.0.0.1:8787, 0.0.0.0:8787 or [::1]:8787",
            ),
        }
    }

    fn hosts(&self) -> Result<Vec<String>, ConfigError> {
        let text = self.text("http.hosts")?;
        let names = text.split(',').map(str::trim).filter(|name| !name.is_empty());
        names
            .map(|name| {
                let bare = name.trim_start_matches('[').trim_end_matches(']');
                let is_name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
                if bare.parse::<IpAddr>().is_ok() || bare.chars().all(is_name) {
                    return Ok(bare.trim_end_matches('.').to_ascii_lowercase());
                }
                let remedy = "write the name alone, without http:// and port";
                refuse(self.place("http.hosts"), format!("{name:?} is not a host name"), remedy)
            })
            .collect()
    }

    fn admin_token(&self) -> Result<Option<Secret>, ConfigError> {
        let token = self.secret_file("http.admin_token_file")?;
        if token.as_ref().is_some_and(|token| !token.expose().bytes().all(|b| b.is_ascii_graphic())) {
            return refuse_as(
                Code::SecretUnavailable,
                self.place("http.admin_token_file"),
                format!("the token in {} cannot be sent in a header", self.text("http.admin_token_file")?),
                "use visible ASCII characters, without spaces",
            );
        }
        if let Some(length) = token.as_ref().map(|token| token.expose().len()).filter(|&length| length < SHORTEST_TOKEN)
        {
            let path = self.text("http.admin_token_file")?;
            return refuse_as(
                Code::SecretUnavailable,
                self.place("http.admin_token_file"),
                format!("the token in {path} has only {length} characters, so it could be guessed"),
                format!("write {SHORTEST_TOKEN} or more, as `openssl rand -hex 24` makes them"),
            );
        }
        Ok(token)
    }

    fn log_level(&self) -> Result<String, ConfigError> {
        const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];
        let text = self.text("log.level")?;
        // A filter takes a word that is not a level for a module name, and then logs nothing.
        let is_directive =
            |part: &str| part.contains('=') || LEVELS.iter().any(|l| l.eq_ignore_ascii_case(part.trim()));
        if text.split(',').all(is_directive) && tracing_subscriber::EnvFilter::try_new(&text).is_ok() {
            return Ok(text);
        }
        refuse(
            self.place("log.level"),
            format!("{text:?} is not a log level"),
            format!("write one of {}, or directives like \"warn,prefetchd::bridge=debug\"", LEVELS.join(", ")),
        )
    }

    /// Returns the password of a server's settings, if they name a file or a command.
    fn password(
        &self,
        file: &str,
        command: &'static str,
        env: &HashMap<String, String>,
    ) -> Result<Option<Password>, ConfigError> {
        match (self.password_file(file)?, self.password_command(command, env)?) {
            (Some(_), Some(_)) => self.two_passwords(command, file),
            (file, command) => Ok(file.or(command.map(Password::Command))),
        }
    }

    fn two_passwords<T>(&self, command: &str, other: &str) -> Result<T, ConfigError> {
        refuse_as(
            Code::ConfigConflict,
            self.place(command),
            format!("the password is in {other}, too"),
            "remove one of them",
        )
    }

    /// Returns the command that a setting has, if any. Its program must be there at startup; it runs for every connection.
    fn password_command(
        &self,
        key: &'static str,
        env: &HashMap<String, String>,
    ) -> Result<Option<PasswordCommand>, ConfigError> {
        let words = self.words(key)?;
        let path = env.get("PATH").map(String::as_str);
        match words.first().and_then(|program| command::missing(program, path)) {
            Some(why) => refuse_as(
                Code::SecretUnavailable,
                self.place(key),
                why,
                "install it, or correct its path or its permissions",
            ),
            None => Ok(PasswordCommand::new(key, &words)),
        }
    }

    /// Returns the file that a setting names, if any. It must be usable at startup, and is read again for every
    /// connection.
    fn password_file(&self, key: &str) -> Result<Option<Password>, ConfigError> {
        Ok(self.secret_file(key)?.map(|_| Password::File(self.text(key).unwrap_or_default().into())))
    }

    /// Returns the contents of the file that a setting names, if any, without the final newline.
    fn secret_file(&self, key: &str) -> Result<Option<Secret>, ConfigError> {
        let path = self.text(key)?;
        if path.is_empty() {
            return Ok(None);
        }
        match password::secret_in(Path::new(&path)) {
            Ok(secret) => Ok(Some(Secret(secret))),
            Err(PasswordError { fact, remedy, .. }) => {
                refuse_as(Code::SecretUnavailable, self.place(key), format!("{path} {fact}"), remedy)
            }
        }
    }

    fn tables(&self, null: NullRule, cache_ttl_ms: u64) -> Result<Vec<TableSpec>, ConfigError> {
        let entries: &[Value] = match self.values.get("tables").map(|tables| &tables.kind) {
            None => &[],
            Some(ValueKind::Array(entries)) => entries,
            Some(_) => {
                return refuse_as(
                    Code::ConfigTables,
                    format!("tables in {}", self.file),
                    "it is not a list",
                    "write [[tables]]",
                );
            }
        };
        if entries.is_empty() {
            return refuse_as(
                Code::ConfigTables,
                &self.file,
                "it names no table",
                "add [[tables]] with name = \"categories\", table = \"public.categories\", key = \"cache:category:{id}\"",
            );
        }
        let mut tables: Vec<TableSpec> = Vec::with_capacity(entries.len());
        for (index, entry) in entries.iter().enumerate() {
            let ValueKind::Table(values) = &entry.kind else {
                return refuse_as(
                    Code::ConfigTables,
                    format!("tables in {}", self.file),
                    "an entry is not a table",
                    "write [[tables]]",
                );
            };
            let Ok(id) = u16::try_from(index) else {
                return refuse_as(Code::ConfigTables, &self.file, "it names more than 65,536 tables", "remove some");
            };
            let entry = Entry { values, number: index + 1, file: &self.file };
            let table = entry.spec(TableId(id), null, cache_ttl_ms)?;
            entry.within(&table)?;
            for other in &tables {
                entry.beside(&table, other)?;
            }
            tables.push(table);
        }
        Ok(tables)
    }
}

fn shares_slot(table: &TableSpec, slot: &str) -> bool {
    table.areas().iter().all(|area| prefix_shares_slot(area.prefix(), slot))
}

/// Returns a warning if the rows of all tables of a cluster lie in one hash slot, and a lookup alone has all keys spread over
/// hash slots.
fn lies_apart(tables: &[TableSpec], slot: &str) -> Option<Warning> {
    if !tables.iter().all(|table| prefix_shares_slot(&table.key.literal, slot)) {
        return None;
    }
    let lookups = tables.iter().flat_map(|table| &table.lookups);
    let apart =
        lookups.map(|lookup| Area::of_lookup(&lookup.key)).find(|area| !prefix_shares_slot(area.prefix(), slot))?;
    let text = format!(
        "all rows lie in one hash slot of the cluster, and the lookup {:?} does not, so a row and its lookups, and the changes of a \
         transaction, no longer appear at once: begin its key with \"{{{{{slot}}}}}:\", too",
        apart.prefix()
    );
    Some(Warning { code: Code::HashSlots, text })
}

fn prefix_shares_slot(prefix: &str, slot: &str) -> bool {
    hash_tag(prefix.as_bytes()) == Some(slot.as_bytes())
}

/// One `[[tables]]`.
struct Entry<'a> {
    values: &'a HashMap<String, Value>,
    /// Counted from 1.
    number: usize,
    file: &'a str,
}

impl Entry<'_> {
    fn place(&self, key: &str) -> String {
        match self.values.get("name").map(|name| &name.kind) {
            Some(ValueKind::String(name)) if key != "name" => format!("{key} of table {name:?} in {}", self.file),
            _ => format!("{key} of [[tables]] number {} in {}", self.number, self.file),
        }
    }

    fn spec(&self, id: TableId, null: NullRule, cache_ttl_ms: u64) -> Result<TableSpec, ConfigError> {
        for key in self.values.keys() {
            if !TABLE_KEYS.contains(&key.as_str()) {
                let meant = closest(key, TABLE_KEYS.into_iter());
                return refuse_as(
                    Code::ConfigUnknownKey,
                    self.place(key),
                    "no such setting",
                    format!("did you mean {meant}?"),
                );
            }
        }
        let name = self.text("name")?;
        if !is_url_name(&name) {
            return refuse_as(
                Code::ConfigTables,
                self.place("name"),
                format!("{name:?} cannot be used in a URL"),
                "write letters and digits, then also - and .",
            );
        }
        let table = match qualified_name(&self.text("table")?) {
            Some(table) => table,
            None => {
                return refuse_as(
                    Code::ConfigTables,
                    self.place("table"),
                    format!("{:?} is not a table name", self.text("table")?),
                    "write schema.table, or 'schema.\"Table\"' to keep capitals, spaces and dots",
                );
            }
        };
        let template = self.text("key")?;
        let key = match key::parse_template(&template) {
            Ok(key) => key,
            Err(error) => return refuse_as(Code::of_template(&error), self.place("key"), error.to_string(), ""),
        };
        let columns = self.columns()?;
        if let Some(missing) = key.columns.iter().find(|c| !columns.is_empty() && !columns.contains(c)) {
            return refuse_as(
                Code::ConfigTables,
                self.place("columns"),
                format!("it leaves out {missing:?}, which the key needs"),
                "add it",
            );
        }
        let rename = self.rename()?;
        for (column, field) in &rename {
            if !columns.is_empty() && !columns.contains(column) {
                let fact = format!("it names {column:?}, which is not among the columns");
                return refuse_as(Code::ConfigTables, self.place("rename"), fact, "correct it, or add the column");
            }
            let keeps_name = |other: &str| !rename.iter().any(|(renamed, _)| renamed == other);
            if columns.iter().any(|other| other == field && other != column && keeps_name(other)) {
                let fact = format!("columns {column:?} and {field:?} would both become field {field:?}");
                return refuse_as(Code::ConfigTables, self.place("rename"), fact, "choose another field");
            }
        }
        let ttl_ms = match self.optional_text("ttl")? {
            Some(text) if !text.is_empty() => ttl_ms(&self.place("ttl"), &text)?,
            _ => cache_ttl_ms,
        };
        let format = self.format()?;
        let mut spec = TableSpec { id, name, table, key, columns, rename, null, ttl_ms, format, lookups: Vec::new() };
        spec.lookups = self.lookups(&spec)?;
        if spec.format == Format::RedisJson && !spec.lookups.is_empty() {
            return refuse_as(
                Code::ConfigTables,
                self.place("lookups"),
                "rows in the format \"redisjson\" have no lookups",
                "write \"json\" or \"hash\", or let RediSearch index the documents",
            );
        }
        Ok(spec)
    }

    fn format(&self) -> Result<Format, ConfigError> {
        match self.optional_text("format")?.as_deref() {
            None | Some("hash") => Ok(Format::Hash),
            Some("json") => Ok(Format::Json),
            Some("redisjson") => Ok(Format::RedisJson),
            Some(text) => refuse(
                self.place("format"),
                format!("{text:?} is not a choice"),
                "write \"hash\", \"json\" or \"redisjson\"",
            ),
        }
    }

    fn lookups(&self, table: &TableSpec) -> Result<Vec<LookupSpec>, ConfigError> {
        let entries = match self.values.get("lookups").map(|value| &value.kind) {
            None => return Ok(Vec::new()),
            Some(ValueKind::Array(entries)) => entries,
            Some(_) => {
                return refuse_as(
                    Code::ConfigTables,
                    self.place("lookups"),
                    "it is not a list",
                    "write [[tables.lookups]]",
                );
            }
        };
        let mut lookups: Vec<LookupSpec> = Vec::with_capacity(entries.len());
        for (number, entry) in (1..).zip(entries) {
            let ValueKind::Table(values) = &entry.kind else {
                return refuse_as(
                    Code::ConfigTables,
                    self.place("lookups"),
                    "an entry is not a table",
                    "write [[tables.lookups]]",
                );
            };
            let entry = LookupEntry { table: self, values, number };
            let lookup = entry.spec(table)?;
            if lookups.iter().any(|other| other.name == lookup.name) {
                let fact = format!("two lookups of this table have the name {:?}", lookup.name);
                return refuse_as(Code::ConfigTables, entry.place("name"), fact, "rename one");
            }
            lookups.push(lookup);
        }
        Ok(lookups)
    }

    /// Checks what must differ between two tables.
    fn beside(&self, table: &TableSpec, other: &TableSpec) -> Result<(), ConfigError> {
        if table.name == other.name {
            return refuse_as(
                Code::ConfigTables,
                self.place("name"),
                format!("two tables have the name {:?}", table.name),
                "rename one",
            );
        }
        if table.table == other.table {
            let fact = format!("{} is already table {:?}", table.table, other.name);
            return refuse_as(Code::ConfigTables, self.place("table"), fact, "name each table once");
        }
        for (setting, mine) in literals(table) {
            for (_, theirs) in literals(other) {
                let whose = format!("{theirs:?} of table {:?}", other.name);
                apart(self.place(&setting), mine, theirs, &whose)?;
            }
        }
        Ok(())
    }

    /// Checks that the keys of a table and of its lookups cannot be mixed up.
    fn within(&self, table: &TableSpec) -> Result<(), ConfigError> {
        let literals = literals(table);
        for (n, (setting, mine)) in literals.iter().enumerate() {
            for (other, theirs) in &literals[..n] {
                apart(self.place(setting), mine, theirs, &format!("{theirs:?} of {other}"))?;
            }
        }
        Ok(())
    }

    fn optional_text(&self, key: &str) -> Result<Option<String>, ConfigError> {
        optional_text(self.values, key, || self.place(key))
    }

    fn text(&self, key: &str) -> Result<String, ConfigError> {
        match self.optional_text(key)? {
            Some(text) => Ok(text),
            None => refuse_as(
                Code::ConfigTables,
                self.place(key),
                "it is missing",
                "every table needs a name, a table and a key",
            ),
        }
    }

    fn columns(&self) -> Result<Vec<String>, ConfigError> {
        const REMEDY: &str = "write columns = [\"id\", \"name\"], or [] for all";
        let columns = match self.values.get("columns").map(|value| &value.kind) {
            None => return Ok(Vec::new()),
            Some(ValueKind::Array(columns)) => columns,
            Some(_) => return refuse_as(Code::ConfigTables, self.place("columns"), "it is not a list", REMEDY),
        };
        let mut names: Vec<String> = Vec::with_capacity(columns.len());
        for column in columns {
            match &column.kind {
                ValueKind::String(name) if names.contains(name) => {
                    return refuse_as(
                        Code::ConfigTables,
                        self.place("columns"),
                        format!("it names {name:?} twice"),
                        "name each column once",
                    );
                }
                ValueKind::String(name) if !name.is_empty() => names.push(name.clone()),
                _ => return refuse_as(Code::ConfigTables, self.place("columns"), "it must contain names only", REMEDY),
            }
        }
        Ok(names)
    }

    fn rename(&self) -> Result<Vec<(String, String)>, ConfigError> {
        const REMEDY: &str = "write rename = { column = \"field\" }";
        let fields = match self.values.get("rename").map(|value| &value.kind) {
            None => return Ok(Vec::new()),
            Some(ValueKind::Table(fields)) => fields,
            Some(_) => {
                return refuse_as(Code::ConfigTables, self.place("rename"), "it is not a table of names", REMEDY);
            }
        };
        let mut rename: Vec<(String, String)> = Vec::with_capacity(fields.len());
        for (column, field) in fields {
            let ValueKind::String(field) = &field.kind else {
                return refuse_as(
                    Code::ConfigTables,
                    self.place("rename"),
                    format!("the field of {column:?} is not a string"),
                    REMEDY,
                );
            };
            if let Some((other, _)) = rename.iter().find(|(_, name)| name == field) {
                let fact = format!("columns {other:?} and {column:?} would both become field {field:?}");
                return refuse_as(Code::ConfigTables, self.place("rename"), fact, "choose another field");
            }
            rename.push((column.clone(), field.clone()));
        }
        rename.sort();
        Ok(rename)
    }
}

/// Returns the literals of a table's keys, each with the setting that has it.
fn literals(table: &TableSpec) -> Vec<(String, &str)> {
    let lookups = table.lookups.iter().map(|lookup| (format!("key of lookup {:?}", lookup.name), &*lookup.key.literal));
    [("key".to_owned(), &*table.key.literal)].into_iter().chain(lookups).collect()
}

/// Checks that no key can begin with both literals. `whose`: the second one, for the message.
fn apart(place: String, mine: &str, theirs: &str, whose: &str) -> Result<(), ConfigError> {
    if !mine.starts_with(theirs) && !theirs.starts_with(mine) {
        return Ok(());
    }
    let fact = format!("{mine:?} and {whose} begin the same way, so their keys could be mixed up");
    refuse_as(Code::KeyPrefix, place, fact, "choose literals of which none begins another")
}

/// One `[[tables.lookups]]`.
struct LookupEntry<'a> {
    table: &'a Entry<'a>,
    values: &'a HashMap<String, Value>,
    /// Counted from 1.
    number: usize,
}

impl LookupEntry<'_> {
    fn place(&self, key: &str) -> String {
        let of = match self.values.get("name").map(|name| &name.kind) {
            Some(ValueKind::String(name)) if key != "name" => format!("lookup {name:?}"),
            _ => format!("[[tables.lookups]] number {}", self.number),
        };
        self.table.place(&format!("{key} of {of}"))
    }

    fn text(&self, key: &str) -> Result<Option<String>, ConfigError> {
        optional_text(self.values, key, || self.place(key))
    }

    fn needed(&self, key: &str) -> Result<String, ConfigError> {
        match self.text(key)? {
            Some(text) => Ok(text),
            None => {
                refuse_as(Code::ConfigTables, self.place(key), "it is missing", "every lookup needs a name and a key")
            }
        }
    }

    fn spec(&self, table: &TableSpec) -> Result<LookupSpec, ConfigError> {
        if let Some(key) = self.values.keys().find(|key| !LOOKUP_KEYS.contains(&key.as_str())) {
            let meant = closest(key, LOOKUP_KEYS.into_iter());
            return refuse_as(
                Code::ConfigUnknownKey,
                self.place(key),
                "no such setting",
                format!("did you mean {meant}?"),
            );
        }
        let name = self.needed("name")?;
        if !is_url_name(&name) {
            let fact = format!("{name:?} cannot be used in a URL");
            return refuse_as(
                Code::ConfigTables,
                self.place("name"),
                fact,
                "write letters and digits, then also - and .",
            );
        }
        let key = match key::parse_lookup(&self.needed("key")?) {
            Ok(key) => key,
            Err(error) => return refuse_as(Code::of_template(&error), self.place("key"), error.to_string(), ""),
        };
        let order = self.text("order")?.filter(|order| !order.is_empty());
        let of_key = key.columns.iter().map(|column| ("key", &column.name));
        for (setting, column) in of_key.chain(order.iter().map(|column| ("order", column))) {
            if !table.columns.is_empty() && !table.columns.contains(column) {
                let fact = format!("it names {column:?}, which is not among the columns");
                return refuse_as(Code::ConfigTables, self.place(setting), fact, "correct it, or add the column");
            }
        }
        Ok(LookupSpec { name, key, order })
    }
}

/// Letters and digits, then also `-` and `.`.
fn is_url_name(name: &str) -> bool {
    let first = name.bytes().next().unwrap_or(b'.');
    (first.is_ascii_alphanumeric() || first == b'_')
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.'))
}

fn optional_text(
    values: &HashMap<String, Value>,
    key: &str,
    place: impl FnOnce() -> String,
) -> Result<Option<String>, ConfigError> {
    match values.get(key).map(|value| &value.kind) {
        None => Ok(None),
        Some(ValueKind::String(text)) => Ok(Some(text.clone())),
        Some(_) => refuse_as(Code::ConfigTables, place(), "it is not a string", "write it in quotes"),
    }
}

fn setting(key: &str) -> Option<&'static (&'static str, Kind, &'static str)> {
    SETTINGS.iter().find(|(name, _, _)| *name == key)
}

/// Rejects unknown settings, at any depth of a file.
fn known(file: &str, key: &str, value: &Value) -> Result<(), ConfigError> {
    if key == "tables" || setting(key).is_some() {
        return Ok(());
    }
    match &value.kind {
        ValueKind::Table(inner) if SECTIONS.contains(&key) || (!key.contains('.') && !inner.is_empty()) => {
            inner.iter().try_for_each(|(name, value)| known(file, &format!("{key}.{name}"), value))
        }
        _ if SECTIONS.contains(&key) => refuse_as(
            Code::ConfigUnknownKey,
            format!("{key} in {file}"),
            "it is a section, not a value",
            format!("write [{key}], and its settings below"),
        ),
        _ => refuse_as(
            Code::ConfigUnknownKey,
            format!("{key} in {file}"),
            "no such setting",
            format!("did you mean {}?", nearest(key)),
        ),
    }
}

fn nearest(key: &str) -> &'static str {
    let leaf = key.rsplit('.').next().unwrap_or(key);
    let names = || SETTINGS.iter().map(|(name, _, _)| *name);
    // The right key in the wrong section.
    let moved = names().filter(|name| name.split_once('.').is_some_and(|(_, own)| own == leaf));
    let mut moved = moved.collect::<Vec<_>>();
    moved.sort_by_key(|name| strsim::damerau_levenshtein(key, name));
    moved.first().copied().unwrap_or_else(|| closest(key, names().chain(["tables"])))
}

fn closest<'a>(word: &str, names: impl Iterator<Item = &'a str>) -> &'a str {
    names.min_by_key(|name| strsim::damerau_levenshtein(word, name)).unwrap_or_default()
}

fn form(kind: Kind) -> &'static str {
    match kind {
        Kind::Text | Kind::PostgresUrl | Kind::RedisUrl => "write a string, in quotes",
        Kind::Names => "write a list, such as [\"cache.example\"]",
        Kind::Command => "write a list of strings, such as [\"/usr/bin/print-token\", \"--user\", \"prefetchd\"]",
        Kind::Flag => "write true or false",
        Kind::Count => "write a whole number, such as 10000",
        Kind::Size => "write a size, such as \"64MB\"",
        Kind::Time => "write a duration, such as \"500ms\", \"30s\" or \"24h\"",
    }
}

fn time(place: &str, text: &str) -> Result<Duration, ConfigError> {
    // humantime accepts a bare "0".
    match humantime::parse_duration(text) {
        Ok(time) => Ok(time),
        Err(error) => refuse(place, format!("{text:?} is not a duration ({error})"), form(Kind::Time)),
    }
}

fn ttl_ms(place: &str, text: &str) -> Result<u64, ConfigError> {
    match time(place, text)? {
        time if time < SHORTEST_TTL => {
            refuse(place, format!("{text:?} is too short"), "write 1s or more, such as \"24h\"")
        }
        time if time > LONGEST_TTL => {
            refuse(place, format!("{text:?} is too long"), "write 3650d or less, such as \"24h\"")
        }
        time => Ok(u64::try_from(time.as_millis()).unwrap_or(u64::MAX)),
    }
}

/// The characters that Postgres allows, because a slot is a directory. The name is also part of the checkpoint's key.
/// <https://www.postgresql.org/docs/current/functions-admin.html#FUNCTIONS-REPLICATION>
fn is_slot_name(name: &str) -> bool {
    (1..=LONGEST_IDENTIFIER_BYTES).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
}

/// Parses `schema.table` or `table` as Postgres reads identifiers: folded to lower case unless quoted.
fn qualified_name(text: &str) -> Option<QualifiedName> {
    let (first, rest) = identifier(text.trim())?;
    match rest {
        "" => Some(QualifiedName { schema: "public".to_owned(), table: first }),
        rest => {
            let (table, rest) = identifier(rest.strip_prefix('.')?)?;
            rest.is_empty().then_some(QualifiedName { schema: first, table })
        }
    }
}

/// Parses one identifier, and returns what follows it.
fn identifier(text: &str) -> Option<(String, &str)> {
    let (name, rest) = match text.strip_prefix('"') {
        None => {
            let end = text.find('.').unwrap_or(text.len());
            (text[..end].to_ascii_lowercase(), &text[end..])
        }
        Some(mut rest) => {
            let mut name = String::new();
            loop {
                let (part, after) = rest.split_once('"')?;
                name.push_str(part);
                match after.strip_prefix('"') {
                    Some(after) => {
                        name.push('"');
                        rest = after;
                    }
                    None => break (name, after),
                }
            }
        }
    };
    let quoted = text.starts_with('"');
    let fits = !name.is_empty() && (quoted || !name.contains(|c: char| c.is_whitespace() || c == '"'));
    (fits && !name.contains('\0')).then_some((name, rest))
}

/// Reports where and why a file is not valid TOML, without the line itself, which may contain a password.
fn malformed<T>(file: &str, error: &config::ConfigError) -> Result<T, ConfigError> {
    let text = match error {
        config::ConfigError::FileParse { cause, .. } => cause.to_string(),
        other => other.to_string(),
    };
    // "TOML parse error at line 3, column 7", then the line with a mark below it, then the reason.
    let lines: Vec<&str> = text.lines().collect();
    let at = lines.first().and_then(|l| l.strip_prefix("TOML parse error at ")).unwrap_or("an unknown place");
    let why = lines.iter().skip(1).filter(|l| !l.contains('|')).copied().collect::<Vec<_>>().join(", ");
    refuse_as(
        Code::ConfigSyntax,
        file,
        format!("it is not valid TOML at {at}"),
        if why.is_empty() { "correct it" } else { &why },
    )
}

#[cfg(test)]
mod tests;
