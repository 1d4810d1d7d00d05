//! The three files, as text.
//!
//! All names in them come from the catalog and are hostile until proven otherwise: statements are made by
//! [`Sql`], and every line of a comment is marked as one, or a name with a line break could add a statement that a
//! superuser runs. No password is known here.

use super::draft::{Layout, Problem, ROLE, Table};
use super::servers::{Kind, PostgresSide, RedisSide};
use crate::bridge::room;
use crate::remedy::{Sql, Toml};
use crate::schema::QualifiedName;
use crate::source::candidates::Surroundings;
use crate::source::slot::ServerFacts;
use crate::terminal::printable;
use crate::words::counted;
use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

/// The user that the integration tests run the daemon under.
const ACL: &str = include_str!("../../../migrations/redis.acl");

/// Where sentences are broken.
const PROSE_COLUMNS: usize = 100;

/// Everything that the files say.
#[derive(Debug)]
pub(super) struct Files<'a> {
    /// An absolute path.
    pub dir: &'a Path,
    pub postgres: &'a PostgresSide,
    pub redis: &'a RedisSide,
    pub surroundings: &'a Surroundings,
    pub facts: &'a ServerFacts,
    /// Of slot, publication and Redis user.
    pub name: &'a str,
    pub tables: &'a [Table],
}

impl Files<'_> {
    pub fn configuration(&self) -> PathBuf {
        self.dir.join("prefetchd.toml")
    }

    pub fn sql(&self) -> PathBuf {
        self.dir.join("postgres.sql")
    }

    pub fn acl(&self) -> PathBuf {
        self.dir.join("redis.acl")
    }

    pub fn redis_password(&self) -> PathBuf {
        self.dir.join("redis.password")
    }

    pub fn postgres_password(&self) -> PathBuf {
        self.dir.join("postgres.password")
    }

    pub fn followed(&self) -> impl Iterator<Item = &Table> {
        self.tables.iter().filter(|table| table.problem.is_none())
    }

    pub fn configuration_text(&self) -> String {
        let mut out = prose(
            "#",
            "Written by `prefetchd init`: what differs from the defaults. `prefetchd config` prints all settings, and \
             `prefetchd check` tests them with the servers.",
        );
        out += "\n[postgres]\n";
        out += &prose("#", &format!("The role is that of {}.", self.sql().display()));
        let _ = writeln!(out, "url = {}", Toml(&self.postgres.url));
        let password = Toml(&self.postgres_password().to_string_lossy()).to_string();
        if self.postgres.has_password {
            out += &prose("#", "Contains the role's password and nothing else. Create it with mode 600.");
            let _ = writeln!(out, "password_file = {password}");
        } else {
            out += &prose(
                "#",
                "`init` logged in without a password. If pg_hba.conf wants one of the role prefetchd, write it to this file, \
                 with mode 600:",
            );
            let _ = writeln!(out, "# password_file = {password}");
        }
        if self.name != ROLE {
            out += &prose("#", &format!("A slot or publication with the name {ROLE} existed already."));
            let _ = writeln!(out, "slot = {}", Toml(self.name));
            let _ = writeln!(out, "publication = {}", Toml(self.name));
        }
        out += "\n[redis]\n";
        out += &prose("#", &format!("The user is that of {}.", self.acl().display()));
        let _ = writeln!(out, "url = {}", Toml(&self.redis.url));
        out += &prose("#", "Contains the user's password and nothing else. Create it with mode 600.");
        let _ = writeln!(out, "password_file = {}", Toml(&self.redis_password().to_string_lossy()));
        if self.redis.has_sentinel_password {
            out += &prose("#", "A program that prints the password of the Sentinels. Create the file with mode 600.");
            let file = self.dir.join("sentinel.password");
            let _ = writeln!(out, "sentinel_password_command = [\"cat\", {}]", Toml(&file.to_string_lossy()));
        }
        out += "\n[http]\n";
        out += &prose("#", "Rows, state and metrics, for this machine alone unless it says otherwise.");
        out += "# listen = \"127.0.0.1:8787\"\n";
        out + &self.tables_text()
    }

    fn tables_text(&self) -> String {
        let mut out = String::from("\n");
        out += &prose(
            "#",
            "What a key begins with, up to its first column, belongs to prefetchd: other keys under it are removed.",
        );
        for table in self.tables {
            out.push('\n');
            let lines = table_text(table);
            match &table.problem {
                None => {
                    out += &prose("#", &about(table));
                    out += &lines;
                }
                Some(problem) => {
                    out += &left_out("#", &table.candidate.name, problem);
                    out += &comment("#", lines.trim_end());
                }
            }
        }
        out
    }

    pub fn sql_text(&self) -> String {
        let role = ROLE;
        let mut out = prose(
            "--",
            &format!(
                "Written by `prefetchd init`: what the role of {} needs in the database {}. Apply it there with psql, as a \
                 superuser or as an owner of the tables who may create such roles.",
                self.configuration().display(),
                self.surroundings.database
            ),
        );
        if !self.facts.can_decode() {
            out += &prose(
                "--",
                &format!(
                    "wal_level is {}. First change that, and restart Postgres, which this file does not do:",
                    self.facts.wal_level
                ),
            );
            match &self.surroundings.replication_group {
                None => out += &comment("--", &Sql::WalLevelLogical.to_string()),
                Some(_) => out += &prose("--", "set rds.logical_replication = 1 in the parameter group."),
            }
        }
        out += "\nBEGIN;\n\n";
        out += &prose("--", "No password is set here: set one with \\password prefetchd.");
        let _ = writeln!(out, "{}", Sql::CreateRole { role });
        out += &prose(
            "--",
            "It may create a slot and read the stream, which contains the changes of every table of the server.",
        );
        match &self.surroundings.replication_group {
            None => writeln!(out, "{}", Sql::Replication { role }),
            Some(group) => writeln!(out, "{}", Sql::Member { group, role }),
        }
        .unwrap_or_default();
        if !self.surroundings.database_is_open {
            let _ = writeln!(out, "{}", Sql::Connect { database: &self.surroundings.database, role });
        }
        out.push('\n');
        out += &prose("--", "Loads and verifications read the rows. Nothing is ever written.");
        let closed: BTreeSet<_> = self.followed().flat_map(|table| &table.candidate.closed_schemas).collect();
        for schema in closed {
            let _ = writeln!(out, "{}", Sql::UseSchema { schema, role });
        }
        if self.followed().any(|table| table.candidate.relations.len() > 1) {
            out += &prose(
                "--",
                "Of a partitioned table, the partitions are read. Give the same right to those that come later.",
            );
        }
        for table in self.followed().flat_map(|table| &table.candidate.relations) {
            let _ = writeln!(out, "{}", Sql::Select { columns: &[], table, role });
        }
        if self.followed().any(|table| table.candidate.has_row_security) {
            out += &prose("--", "Row security would hide rows from loads that the stream contains.");
            let _ = writeln!(out, "{}", Sql::BypassRowSecurity { role });
        }
        out.push('\n');
        out += &prose("--", "What the stream contains. It must be older than the slot, which the first start creates.");
        let tables: Vec<QualifiedName> = self.followed().map(|table| table.candidate.name.clone()).collect();
        let _ = writeln!(out, "{}", Sql::CreatePublication { publication: self.name, tables: &tables });
        out += "\nCOMMIT;\n";
        for table in self.tables {
            let (name, Some(problem)) = (&table.candidate.name, &table.problem) else { continue };
            out.push('\n');
            out += &left_out("--", name, problem);
            for table in &table.candidate.relations {
                out += &comment("--", &Sql::Select { columns: &[], table, role }.to_string());
            }
            out += &comment("--", &Sql::AddTableOnly { publication: self.name, table: name }.to_string());
        }
        out
    }

    pub fn acl_text(&self) -> String {
        let mut out = prose(
            "#",
            &format!(
                "Written by `prefetchd init`: the user of {}, with everything that it needs and nothing else. No password is \
                 set here, so nobody can log in as it yet. `include` this file in redis.conf, or copy the line into the ACL \
                 file. After ACL SETUSER, it is kept over a restart by ACL SAVE or CONFIG REWRITE.",
                self.configuration().display()
            ),
        );
        out += &prose("#", "Redis does not replicate users: replicas, and all nodes of a cluster, need it, too.");
        out += &prose(
            "#",
            "docs/operating.md says what each command is for, and which further ones lookups, the change stream, other formats \
             and redis.durability need.",
        );
        for table in self.tables.iter().filter(|table| table.problem.is_some()) {
            out += &prose("#", &format!("Left out, as in prefetchd.toml: ~{}*", table.key.literal));
        }
        let line = ACL.lines().find_map(|line| line.strip_prefix("user prefetchd ")).unwrap_or_default();
        let (before, commands): (Vec<&str>, Vec<&str>) =
            line.split(' ').filter(|word| !word.starts_with('~')).partition(|word| !word.starts_with('+'));
        let mut patterns: Vec<String> = self.followed().map(|table| format!("~{}*", table.key.literal)).collect();
        patterns.push(format!("~prefetchd:{{{}}}:*", self.name));
        let mut further = Vec::new();
        if self.redis.db != 0 {
            further.push("+select");
        }
        if self.redis.kind == Kind::Cluster {
            further.extend(["+cluster|slots", "+cluster|info"]);
            if self.redis.layout == Layout::Anywhere {
                patterns.push(format!("~prefetchd:{{*}}:{}:*", self.name));
                further.extend(["+evalsha", "+script|load"]);
            }
        }
        let patterns = patterns.iter().map(String::as_str);
        // Means the same, and `redis-cli --cluster call` does not take it for an option of its own.
        let before = before.into_iter().map(|word| if word == "-@all" { "nocommands" } else { word });
        let words: Vec<&str> = before.chain(patterns).chain(commands).chain(further).collect();
        let _ = writeln!(out, "user {} {}", self.name, words.join(" "));
        out
    }
}

/// Returns the `[[tables]]` of one table.
pub(super) fn table_text(table: &Table) -> String {
    let key = match table.key.columns.is_empty() {
        true => format!("{}{{…}}", table.key.literal.replace('{', "{{").replace('}', "}}")),
        false => table.key.to_string(),
    };
    let (name, of) = (Toml(&table.name).to_string(), Toml(&table.candidate.name.to_string()).to_string());
    format!("[[tables]]\nname = {name}\ntable = {of}\nkey = {}\n", Toml(&key))
}

/// Returns a line about what is cached.
fn about(table: &Table) -> String {
    let name = &table.candidate.name;
    match table.size {
        Some(size) if size.rows > 0.0 => {
            let (rows, bytes) = (counted(size.rows.round(), "row"), room::size(size.bytes as u64));
            format!("{name}: about {rows}, {bytes} in Redis")
        }
        Some(_) => format!("{name}: no rows at present"),
        None => format!("{name}: of unknown size"),
    }
}

fn left_out(mark: &str, name: &QualifiedName, Problem { reason, remedy }: &Problem) -> String {
    let fact = prose(mark, &format!("{name} is left out: {reason}."));
    match remedy.is_empty() {
        true => fact,
        false => fact + &prose(mark, "Run `prefetchd init` again, or take it in here, after:") + &comment(mark, remedy),
    }
}

/// Marks every line as a comment, and makes what is no text visible.
fn comment(mark: &str, text: &str) -> String {
    text.split(['\n', '\r']).map(|line| format!("{mark} {}\n", printable(line))).collect()
}

/// The same for sentences, which may be broken at any blank.
fn prose(mark: &str, text: &str) -> String {
    let (mut out, mut column) = (String::new(), usize::MAX);
    for word in text.split_whitespace().map(printable) {
        let length = word.chars().count();
        if column.saturating_add(1 + length) > PROSE_COLUMNS {
            let end = if out.is_empty() { "" } else { "\n" };
            let _ = write!(out, "{end}{mark}");
            column = mark.len();
        }
        let _ = write!(out, " {word}");
        column += 1 + length;
    }
    out + "\n"
}
