//! The text of remedies that people paste: SQL statements, redis-cli commands and lines of configuration.
//!
//! The only module that writes them. Names reach a statement only through a field of [`Sql`], so they are always
//! quoted. A mistake here makes a remedy fail, or makes it change a different object with a similar name.

use crate::schema::{Identifier, QualifiedName};
use std::fmt;

/// The longest identifier that Postgres keeps (`NAMEDATALEN` - 1), in bytes.
const LONGEST_IDENTIFIER: usize = 63;

/// A statement for psql, including its semicolon. Names are spelled as in the catalog.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sql<'a> {
    WalLevelLogical,
    /// In megabytes.
    SlotWalLimit(u64),
    CreatePublication {
        publication: &'a str,
        tables: &'a [QualifiedName],
    },
    AddTable {
        publication: &'a str,
        table: &'a QualifiedName,
    },
    /// Excludes the tables that inherit from it.
    AddTableOnly {
        publication: &'a str,
        table: &'a QualifiedName,
    },
    PublishEverything {
        publication: &'a str,
    },
    PublishViaRoot {
        publication: &'a str,
    },
    DropPublication {
        publication: &'a str,
    },
    CreateSlot {
        slot: &'a str,
    },
    /// Does nothing if it exists: roles belong to the whole server. The name must not contain `$$`.
    CreateRole {
        role: &'a str,
    },
    Connect {
        database: &'a str,
        role: &'a str,
    },
    /// Makes it a member of a group.
    Member {
        group: &'a str,
        role: &'a str,
    },
    /// Drops the slot and creates it again.
    RecreateSlot {
        slot: &'a str,
    },
    UseSchema {
        schema: &'a str,
        role: &'a str,
    },
    /// Covers the whole table if `columns` is empty.
    Select {
        columns: &'a [String],
        table: &'a QualifiedName,
        role: &'a str,
    },
    /// `function` includes its argument types, as `regprocedure` prints it.
    Execute {
        function: &'a str,
        role: &'a str,
    },
    BypassRowSecurity {
        role: &'a str,
    },
    RoleLimit {
        role: &'a str,
        connections: i64,
    },
    DatabaseLimit {
        database: &'a str,
        connections: i64,
    },
    Replication {
        role: &'a str,
    },
    NoReplication {
        role: &'a str,
    },
    /// Moves a table to another schema, another name, or both.
    Move {
        from: &'a QualifiedName,
        to: &'a QualifiedName,
    },
    SetLogged {
        table: &'a QualifiedName,
    },
    IdentityDefault {
        table: &'a QualifiedName,
    },
    IdentityFull {
        table: &'a QualifiedName,
    },
    /// Its columns are left to whoever knows the table.
    PrimaryKey {
        table: &'a QualifiedName,
    },
    /// Uses an index over these columns, which must be unique.
    IdentityIndex {
        table: &'a QualifiedName,
        columns: &'a [String],
    },
}

impl fmt::Display for Sql<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Sql::WalLevelLogical => f.write_str("ALTER SYSTEM SET wal_level = logical;"),
            Sql::SlotWalLimit(megabytes) => {
                let (size, unit) = if megabytes % 1024 == 0 { (megabytes / 1024, "GB") } else { (megabytes, "MB") };
                write!(f, "ALTER SYSTEM SET max_slot_wal_keep_size = '{size}{unit}';")
            }
            Sql::CreatePublication { publication, tables } => {
                // ONLY: prefetchd does not read inheriting tables either. ONLY has no effect on partitioned tables.
                let tables = list(tables.iter().map(|table| format!("ONLY {table}")));
                let options = "WITH (publish_via_partition_root = true)";
                write!(f, "CREATE PUBLICATION {} FOR TABLE {tables} {options};", Identifier(publication))
            }
            Sql::AddTable { publication, table } => {
                write!(f, "ALTER PUBLICATION {} ADD TABLE {table};", Identifier(publication))
            }
            Sql::AddTableOnly { publication, table } => {
                write!(f, "ALTER PUBLICATION {} ADD TABLE ONLY {table};", Identifier(publication))
            }
            Sql::PublishEverything { publication } => {
                let all = "publish = 'insert, update, delete, truncate'";
                write!(f, "ALTER PUBLICATION {} SET ({all});", Identifier(publication))
            }
            Sql::PublishViaRoot { publication } => {
                write!(f, "ALTER PUBLICATION {} SET (publish_via_partition_root = true);", Identifier(publication))
            }
            Sql::DropPublication { publication } => write!(f, "DROP PUBLICATION {};", Identifier(publication)),
            Sql::CreateSlot { slot } => {
                write!(f, "SELECT pg_create_logical_replication_slot({}, 'pgoutput');", Literal(slot))
            }
            Sql::CreateRole { role } => {
                let exists = format!("SELECT FROM pg_catalog.pg_roles WHERE rolname = {}", Literal(role));
                let create = format!("CREATE ROLE {} LOGIN;", Identifier(role));
                write!(f, "DO $$ BEGIN IF NOT EXISTS ({exists}) THEN {create} END IF; END $$;")
            }
            Sql::Connect { database, role } => {
                write!(f, "GRANT CONNECT ON DATABASE {} TO {};", Identifier(database), Identifier(role))
            }
            Sql::Member { group, role } => write!(f, "GRANT {} TO {};", Identifier(group), Identifier(role)),
            Sql::RecreateSlot { slot } => {
                write!(f, "SELECT pg_drop_replication_slot({}); {}", Literal(slot), Sql::CreateSlot { slot })
            }
            Sql::UseSchema { schema, role } => {
                write!(f, "GRANT USAGE ON SCHEMA {} TO {};", Identifier(schema), Identifier(role))
            }
            Sql::Select { columns: [], table, role } => write!(f, "GRANT SELECT ON {table} TO {};", Identifier(role)),
            Sql::Select { columns, table, role } => {
                write!(f, "GRANT SELECT ({}) ON {table} TO {};", identifiers(columns), Identifier(role))
            }
            Sql::Execute { function, role } => {
                write!(f, "GRANT EXECUTE ON FUNCTION {function} TO {};", Identifier(role))
            }
            Sql::BypassRowSecurity { role } => write!(f, "ALTER ROLE {} BYPASSRLS;", Identifier(role)),
            Sql::RoleLimit { role, connections } => {
                write!(f, "ALTER ROLE {} CONNECTION LIMIT {connections};", Identifier(role))
            }
            Sql::DatabaseLimit { database, connections } => {
                write!(f, "ALTER DATABASE {} CONNECTION LIMIT {connections};", Identifier(database))
            }
            Sql::NoReplication { role } => write!(f, "ALTER ROLE {} NOREPLICATION;", Identifier(role)),
            Sql::Replication { role } => write!(f, "ALTER ROLE {} REPLICATION;", Identifier(role)),
            Sql::Move { from, to } => {
                let moved = QualifiedName { schema: to.schema.clone(), table: from.table.clone() };
                if from.schema != to.schema {
                    write!(f, "ALTER TABLE {from} SET SCHEMA {};", Identifier(&to.schema))?;
                }
                if from.schema != to.schema && from.table != to.table {
                    f.write_str(" ")?;
                }
                if from.table != to.table {
                    write!(f, "ALTER TABLE {moved} RENAME TO {};", Identifier(&to.table))?;
                }
                Ok(())
            }
            Sql::SetLogged { table } => write!(f, "ALTER TABLE {table} SET LOGGED;"),
            Sql::IdentityDefault { table } => write!(f, "ALTER TABLE {table} REPLICA IDENTITY DEFAULT;"),
            Sql::IdentityFull { table } => write!(f, "ALTER TABLE {table} REPLICA IDENTITY FULL;"),
            Sql::PrimaryKey { table } => write!(f, "ALTER TABLE {table} ADD PRIMARY KEY (…);"),
            Sql::IdentityIndex { table, columns } => {
                let name = index_name(&table.table);
                let not_null = list(columns.iter().map(|c| format!("ALTER {} SET NOT NULL", Identifier(c))));
                write!(f, "ALTER TABLE {table} {not_null}; ")?;
                write!(
                    f,
                    "CREATE UNIQUE INDEX IF NOT EXISTS {} ON {table} ({}); ",
                    Identifier(&name),
                    identifiers(columns)
                )?;
                write!(f, "ALTER TABLE {table} REPLICA IDENTITY USING INDEX {};", Identifier(&name))
            }
        }
    }
}

fn list(items: impl Iterator<Item = String>) -> String {
    items.collect::<Vec<_>>().join(", ")
}

fn identifiers(names: &[String]) -> String {
    list(names.iter().map(|name| Identifier(name).to_string()))
}

/// `{table}_identity`, truncated to the length that Postgres keeps.
fn index_name(table: &str) -> String {
    const SUFFIX: &str = "_identity";
    let mut name = String::new();
    for c in table.chars() {
        if name.len() + c.len_utf8() + SUFFIX.len() > LONGEST_IDENTIFIER {
            break;
        }
        name.push(c);
    }
    name + SUFFIX
}

/// An SQL string constant, quoted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Literal<'a>(pub &'a str);

impl fmt::Display for Literal<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Backslashes are literal unless standard_conforming_strings is off; E'…' means the same with both settings.
        let escape = if self.0.contains('\\') { "E" } else { "" };
        write!(f, "{escape}'{}'", self.0.replace('\'', "''").replace('\\', "\\\\"))
    }
}

/// A keyword/value connection string for libpq.
///
/// <https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-CONNSTRING-KEYWORD-VALUE>
#[derive(Debug, Clone, Copy)]
pub struct Conninfo<'a>(pub &'a [(&'a str, &'a str)]);

impl fmt::Display for Conninfo<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, (keyword, value)) in self.0.iter().enumerate() {
            let space = if i == 0 { "" } else { " " };
            let plain = !value.is_empty() && !value.contains(|c: char| c.is_whitespace() || matches!(c, '\'' | '\\'));
            match plain {
                true => write!(f, "{space}{keyword}={value}")?,
                false => write!(f, "{space}{keyword}='{}'", value.replace('\\', "\\\\").replace('\'', "\\'"))?,
            }
        }
        Ok(())
    }
}

/// A basic TOML string, including its quotes.
#[derive(Debug, Clone, Copy)]
pub struct Toml<'a>(pub &'a str);

impl fmt::Display for Toml<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("\"")?;
        for c in self.0.chars() {
            match c {
                '"' => f.write_str("\\\"")?,
                '\\' => f.write_str("\\\\")?,
                c if c.is_control() => write!(f, "\\u{:04X}", u32::from(c))?,
                c => write!(f, "{c}")?,
            }
        }
        f.write_str("\"")
    }
}

/// A command for the redis-cli prompt. A shell reads the quotes the same way unless a word contains a single quote.
#[derive(Debug, Clone, Copy)]
pub struct RedisCommand<'a>(pub &'a [&'a str]);

impl fmt::Display for RedisCommand<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, word) in self.0.iter().enumerate() {
            let space = if i == 0 { "" } else { " " };
            let plain = |c: char| c.is_alphanumeric() || matches!(c, '_' | '-' | '+' | ':' | '.' | '/' | '@');
            match word {
                word if !word.is_empty() && word.chars().all(plain) => write!(f, "{space}{word}")?,
                word if !word.contains(|c: char| c == '\'' || c.is_control()) => write!(f, "{space}'{word}'")?,
                word => write!(f, "{space}\"{}\"", word.replace('\\', "\\\\").replace('"', "\\\""))?,
            }
        }
        Ok(())
    }
}

/// Words for a shell, each quoted if necessary.
#[derive(Debug, Clone, Copy)]
pub struct Shell<'a>(pub &'a [&'a str]);

impl fmt::Display for Shell<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, word) in self.0.iter().enumerate() {
            let space = if i == 0 { "" } else { " " };
            let plain =
                |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '+' | ':' | '.' | '/' | '@' | '=' | ',');
            match !word.is_empty() && word.chars().all(plain) {
                true => write!(f, "{space}{word}")?,
                false => write!(f, "{space}'{}'", word.replace('\'', "'\\''"))?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_index_name_fits_whatever_the_table_is_called() {
        assert_eq!(index_name("orders"), "orders_identity");
        let long = index_name(&"ö".repeat(31));
        assert!(long.len() <= LONGEST_IDENTIFIER && long.ends_with("ö_identity"), "{long}");
    }

    #[test]
    fn words_are_quoted_as_their_reader_wants_them() {
        assert_eq!(Literal("it's \\").to_string(), r"E'it''s \\'");
        let pairs = [("host", "/run/pg"), ("dbname", "Shöp \"1\""), ("user", "o'\\x"), ("port", "")];
        assert_eq!(Conninfo(&pairs).to_string(), r#"host=/run/pg dbname='Shöp "1"' user='o\'\\x' port=''"#);
        assert_eq!(Toml("a\"b\\c\n\u{7f}é").to_string(), "\"a\\\"b\\\\c\\u000A\\u007Fé\"");
        let words = ["psql", "dbname=it's", "a b", "", "x=y"];
        assert_eq!(Shell(&words).to_string(), r"psql 'dbname=it'\''s' 'a b' '' x=y");
        let words = ["ACL", "SETUSER", "p", "~item:*", "~it's \"*", "+config|get", "~a\\*b*"];
        assert_eq!(RedisCommand(&words).to_string(), r#"ACL SETUSER p '~item:*' "~it's \"*" '+config|get' '~a\*b*'"#);
    }
}
