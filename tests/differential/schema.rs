//! Random tables, and what is done to them while rows change.
//!
//! Whatever their columns, all have four more: `version`, from one sequence; `body`; `large`, stored out of line so
//! that the stream leaves it out if it did not change; and `sum`, the checksum of the three. A trigger sets the version
//! while the key is locked, so a key's versions rise in commit order.

use super::values::{self, Kind};
use super::watch::Hash;
use rand::Rng;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use std::fmt::Write;

pub const PRELUDE: &str = r"
SET client_min_messages = warning;
CREATE SEQUENCE versions;
CREATE FUNCTION is_boolean(of oid) RETURNS boolean LANGUAGE sql STABLE AS $$
    WITH RECURSIVE base AS (SELECT of AS oid UNION ALL
        SELECT t.typbasetype FROM base JOIN pg_type t ON t.oid = base.oid WHERE t.typtype = 'd')
    SELECT bool_or(oid = 'boolean'::regtype) FROM base $$;
CREATE FUNCTION stamp() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_advisory_xact_lock(l) FROM unnest(ARRAY[
        hashtext(TG_ARGV[0] || (SELECT string_agg(jsonb_hash(to_jsonb(NEW) -> k)::text, ' ') FROM unnest(TG_ARGV[1:]) k)),
        CASE TG_OP WHEN 'UPDATE' THEN
            hashtext(TG_ARGV[0] || (SELECT string_agg(jsonb_hash(to_jsonb(OLD) -> k)::text, ' ') FROM unnest(TG_ARGV[1:]) k)) END
    ]) l WHERE l IS NOT NULL ORDER BY l;
    NEW.version := nextval('versions');
    NEW.sum := 'md5' || md5(md5(concat_ws('|', NEW.version, coalesce(NEW.body, ''), coalesce(NEW.large, ''))) || 'salt');
    RETURN NEW;
END $$;
";

/// What the keys of all lists begin with.
pub const LISTS: &str = "list:";

/// A member of a list, and its score in a sorted set.
pub type Member = (String, String);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Identity {
    Default,
    Index,
    Full,
}

#[derive(Debug, Clone)]
pub struct Column {
    pub name: String,
    pub kind: &'static Kind,
    /// The configuration or the publication names it, so it must stay.
    pub named: bool,
}

#[derive(Debug, Clone)]
pub struct Table {
    pub name: String,
    pub key: Vec<(&'static str, &'static Kind)>,
    pub identity: Identity,
    pub partitioned: bool,
    /// A partition that exists but is detached at the moment.
    pub detached: bool,
    pub filter: Option<String>,
    pub listed: bool,
    /// Whether the configuration lists columns.
    chosen: bool,
    renamed: bool,
    /// Whether its rows are documents.
    pub documents: bool,
    /// Whether it has lookups.
    pub has_lists: bool,
    pub parent: Option<(String, &'static str, &'static Kind)>,
    pub columns: Vec<Column>,
    next_column: usize,
}

/// What a new table may have.
#[derive(Debug, Clone, Copy)]
pub struct Server {
    pub major: u32,
}

impl Table {
    pub fn any(at: usize, first: Option<&Table>, server: Server, rng: &mut StdRng) -> Self {
        const NAMES: [&str; 3] = ["k1", "k 2", "K3"];
        let partitioned = rng.random_bool(0.25);
        let parts = *[1, 1, 1, 2, 2, 3].choose(rng).unwrap();
        let mut key: Vec<(&str, &Kind)> =
            (0..parts).map(|part| (NAMES[part], values::KEYS.choose(rng).unwrap())).collect();
        if partitioned {
            // The partition key.
            key.push(("region", &REGION));
        }
        let identity = match rng.random_range(0..10) {
            0..5 => Identity::Default,
            5..7 if !partitioned => Identity::Index,
            _ => Identity::Full,
        };
        let chosen = rng.random_bool(0.25);
        let filter = (server.major >= 15 && rng.random_bool(0.3)).then(|| match identity {
            // A filter may use only columns of the identity.
            Identity::Default | Identity::Index => format!("\"{}\" IS DISTINCT FROM {}", key[0].0, key[0].1.key(rng)),
            Identity::Full => "body IS NULL OR body < '8'".to_owned(),
        });
        let listed = server.major >= 15 && identity != Identity::Full && rng.random_bool(0.3);
        let refers =
            first.filter(|first| first.key.len() == 1 && first.identity != Identity::Index && rng.random_bool(0.4));
        let mut table = Self {
            name: format!("t{at}"),
            key,
            identity,
            partitioned,
            detached: false,
            filter,
            listed,
            chosen,
            renamed: rng.random_bool(0.3),
            documents: false,
            has_lists: false,
            parent: refers.map(|first| (first.name.clone(), first.key[0].0, first.key[0].1)),
            columns: Vec::new(),
            next_column: 0,
        };
        for _ in 0..rng.random_range(1..9) {
            let column = table.new_column(rng);
            table.columns.push(Column { named: rng.random_bool(0.4), ..column });
        }
        table
    }

    fn new_column(&mut self, rng: &mut StdRng) -> Column {
        self.next_column += 1;
        let name = match rng.random_range(0..4) {
            0 => format!("C \"{}\" {{}}", self.next_column),
            _ => format!("c{}", self.next_column),
        };
        Column { name, kind: values::any(rng), named: false }
    }

    pub fn literal(&self) -> String {
        match self.name.as_str() {
            // Prefixes that are similar, and characters that are special to SCAN.
            "t0" => "app:1:".to_owned(),
            "t1" => "app:10:".to_owned(),
            "t2" => "a *[p]?\\:".to_owned(),
            name => format!("{name}:"),
        }
    }

    /// For the configuration.
    pub fn toml(&self) -> String {
        let template: String = self.key.iter().map(|(name, _)| format!("{{{name}}}")).collect::<Vec<_>>().join(":");
        let mut toml = format!(
            "[[tables]]\nname = '{0}'\ntable = 'public.{0}'\nkey = '{1}{template}'\n",
            self.name,
            self.literal()
        );
        if self.chosen {
            writeln!(toml, "columns = {}", serde_json::to_string(&self.chosen_columns()).unwrap()).unwrap();
        }
        if self.renamed {
            let pairs = self.renames().map(|(from, to)| format!("{} = {}", json(from), json(&to)));
            writeln!(toml, "rename = {{ {} }}", pairs.collect::<Vec<_>>().join(", ")).unwrap();
        }
        if self.documents {
            toml += "format = 'json'\n";
        }
        if self.has_lists {
            let (all, key) = (self.list_of_all(), self.key[0].0);
            let [body, two] = self.lists();
            writeln!(toml, "[[tables.lookups]]\nname = 'all'\nkey = '{all}'\norder = 'version'").unwrap();
            writeln!(toml, "[[tables.lookups]]\nname = 'body'\nkey = '{body}{{body}}'").unwrap();
            writeln!(toml, "[[tables.lookups]]\nname = 'two'\nkey = '{two}{{{key}}}:{{body}}'\norder = 'version'")
                .unwrap();
        }
        toml
    }

    /// The key of the list of all rows.
    pub fn list_of_all(&self) -> String {
        format!("{LISTS}{}-all", self.name)
    }

    fn lists(&self) -> [String; 2] {
        ["body", "two"].map(|name| format!("{LISTS}{}-{name}:", self.name))
    }

    /// Returns the lists of which the row at `key` is a member, if these are the fields of its hash, and the scores: a second
    /// implementation.
    pub fn lists_of(&self, key: &str, hash: &Hash) -> Vec<(String, Member)> {
        let member = key.strip_prefix(&self.literal()).unwrap();
        let version = hash["version"].parse::<f64>().unwrap().to_string();
        let [of_body, of_two] = self.lists();
        let mut lists = vec![(self.list_of_all(), (member.to_owned(), version.clone()))];
        if let Some(body) = hash.get(&self.field("body").unwrap()) {
            let escaped = |text: &str| text.replace('%', "%25").replace(':', "%3A");
            let two = format!("{of_two}{}:{}", escaped(&hash[self.key[0].0]), escaped(body));
            lists.push((format!("{of_body}{body}"), (member.to_owned(), String::new())));
            lists.push((two, (member.to_owned(), version)));
        }
        lists
    }

    fn chosen_columns(&self) -> Vec<&str> {
        let named = self.columns.iter().filter(|c| c.named).map(|c| c.name.as_str());
        self.key.iter().map(|(name, _)| *name).chain(["version", "body", "large", "sum"]).chain(named).collect()
    }

    fn renames(&self) -> impl Iterator<Item = (&str, String)> {
        let named = self.columns.iter().filter(|c| c.named).map(|c| c.name.as_str());
        named.chain(["body"]).map(|name| (name, format!("was {name}")))
    }

    /// Returns the field for a column; `None` if the configuration leaves it out.
    pub fn field(&self, column: &str) -> Option<String> {
        if self.chosen && !self.chosen_columns().contains(&column) {
            return None;
        }
        let renamed = self.renames().find(|(from, _)| self.renamed && *from == column).map(|(_, to)| to);
        Some(renamed.unwrap_or_else(|| column.to_owned()))
    }

    /// Creates the table, with its privileges, and adds it to the publication.
    pub fn create(&self) -> String {
        let name = &self.name;
        let mut sql = format!("CREATE TABLE {name} (");
        for (column, kind) in &self.key {
            write!(sql, "\"{column}\" {} NOT NULL, ", kind.name).unwrap();
        }
        // The key need not come first, nor the additional columns last.
        for (at, column) in self.columns.iter().enumerate() {
            if at == 1 {
                sql += "body text, ";
            }
            write!(sql, "{} {}, ", quoted(&column.name), column.kind.name).unwrap();
        }
        if let Some((_, _, kind)) = &self.parent {
            write!(sql, "parent {}, ", kind.name).unwrap();
        }
        if self.columns.len() < 2 {
            sql += "body text, ";
        }
        sql += "version bigint, doubled bigint GENERATED ALWAYS AS (version * 2) STORED, large text, sum text";
        let columns = self.key.iter().map(|(name, _)| format!("\"{name}\"")).collect::<Vec<_>>().join(", ");
        match self.identity {
            Identity::Index => {
                write!(sql, ", pk bigserial PRIMARY KEY, CONSTRAINT {name}_key UNIQUE ({columns}))").unwrap()
            }
            Identity::Default | Identity::Full => {
                write!(sql, ", CONSTRAINT {name}_key PRIMARY KEY ({columns}))").unwrap()
            }
        }
        let mut all = vec![name.clone()];
        if self.partitioned {
            write!(sql, " PARTITION BY LIST (region); CREATE TABLE {name}_p0 PARTITION OF {name} FOR VALUES IN ('eu')")
                .unwrap();
            // A partition whose columns are in another order.
            write!(sql, "; CREATE TABLE {name}_p1 (LIKE {name} INCLUDING GENERATED); ALTER TABLE {name}_p1 DROP COLUMN large, ADD COLUMN large text").unwrap();
            write!(sql, "; {}", self.attach()).unwrap();
            all.extend([format!("{name}_p0"), format!("{name}_p1")]);
        }
        for table in &all {
            if self.identity == Identity::Full {
                write!(sql, "; ALTER TABLE {table} REPLICA IDENTITY FULL").unwrap();
            }
            write!(sql, "; ALTER TABLE {table} ALTER large SET STORAGE EXTERNAL; GRANT SELECT ON {table} TO prefetchd")
                .unwrap();
        }
        if self.identity == Identity::Index {
            write!(sql, "; ALTER TABLE {name} REPLICA IDENTITY USING INDEX {name}_key").unwrap();
        }
        let keys = self.key.iter().map(|(name, _)| format!("'{name}'")).collect::<Vec<_>>().join(", ");
        write!(sql, "; CREATE TRIGGER stamp BEFORE INSERT OR UPDATE ON {name} FOR EACH ROW EXECUTE FUNCTION stamp('{name}', {keys})").unwrap();
        if let Some((parent, key, _)) = &self.parent {
            write!(sql, "; ALTER TABLE {name} ADD CONSTRAINT parent FOREIGN KEY (parent) REFERENCES {parent} (\"{key}\") ON DELETE SET NULL ON UPDATE CASCADE").unwrap();
        }
        write!(sql, "; ALTER PUBLICATION prefetchd ADD TABLE {}", self.published()).unwrap();
        sql
    }

    /// The table as in the publication, with its columns and filter.
    fn published(&self) -> String {
        let mut sql = self.name.clone();
        if self.listed {
            let named = self.columns.iter().filter(|c| c.named || self.chosen).map(|c| quoted(&c.name));
            let key = self.key.iter().map(|(name, _)| format!("\"{name}\""));
            let columns: Vec<_> =
                ["version", "body", "large", "sum"].map(str::to_owned).into_iter().chain(key).chain(named).collect();
            write!(sql, " ({})", columns.join(", ")).unwrap();
        }
        if let Some(filter) = &self.filter {
            write!(sql, " WHERE ({filter})").unwrap();
        }
        sql
    }

    fn attach(&self) -> String {
        let name = &self.name;
        format!("ALTER TABLE {name} ATTACH PARTITION {name}_p1 FOR VALUES IN ('us', 'on its way')")
    }

    /// Returns one change of the table itself, and its kind. The stream announces hardly any of them.
    pub fn alter(&mut self, rng: &mut StdRng) -> (&'static str, String) {
        let name = self.name.clone();
        let free: Vec<usize> =
            (0..self.columns.len()).filter(|at| !(self.columns[*at].named || self.listed && self.chosen)).collect();
        let some = free.choose(rng).copied();
        match (rng.random_range(0..13), some) {
            (0, _) => {
                let column = self.new_column(rng);
                let sql = format!("ALTER TABLE {name} ADD COLUMN {} {}", quoted(&column.name), column.kind.name);
                self.columns.push(column);
                ("add column", sql)
            }
            (1, _) => {
                let column = self.new_column(rng);
                let (kind, value) = (column.kind.name, column.kind.value(rng));
                let sql = format!("ALTER TABLE {name} ADD COLUMN {} {kind} DEFAULT {value}", quoted(&column.name));
                self.columns.push(column);
                ("add column with default", sql)
            }
            (2, Some(at)) => {
                let column = self.columns.remove(at);
                ("drop column", format!("ALTER TABLE {name} DROP COLUMN {}", quoted(&column.name)))
            }
            (3, Some(at)) => {
                let new = self.new_column(rng).name;
                let old = std::mem::replace(&mut self.columns[at].name, new.clone());
                ("rename column", format!("ALTER TABLE {name} RENAME COLUMN {} TO {}", quoted(&old), quoted(&new)))
            }
            (4, Some(at)) => {
                self.columns[at].kind = values::TEXT;
                let column = quoted(&self.columns[at].name);
                (
                    "retype column",
                    format!("ALTER TABLE {name} ALTER COLUMN {column} TYPE text USING upper({column}::text)"),
                )
            }
            (5 | 6, _) if self.partitioned => {
                self.detached = !self.detached;
                if self.detached {
                    ("detach", format!("ALTER TABLE {name} DETACH PARTITION {name}_p1"))
                } else {
                    ("attach", self.attach())
                }
            }
            (7, _) if self.partitioned => ("truncate partition", format!("TRUNCATE {name}_p0")),
            (5, _) => ("recreate", format!("BEGIN; DROP TABLE {name} CASCADE; {}; COMMIT", self.create())),
            (6, _) => ("drop, then create", format!("DROP TABLE {name} CASCADE\n{}", self.create())),
            (7, _) => (
                "rename away and back",
                format!("ALTER TABLE {name} RENAME TO elsewhere\nALTER TABLE elsewhere RENAME TO {name}"),
            ),
            (8, _) if !self.partitioned => ("cluster", format!("CLUSTER {name} USING {name}_key")),
            (9, _) if !self.listed && self.filter.is_none() && !self.partitioned => {
                let (identity, say) = match self.identity {
                    Identity::Full => (Identity::Default, "DEFAULT".to_owned()),
                    Identity::Default => (Identity::Full, "FULL".to_owned()),
                    Identity::Index => (Identity::Index, format!("USING INDEX {name}_key")),
                };
                self.identity = identity;
                ("replica identity", format!("ALTER TABLE {name} REPLICA IDENTITY {say}"))
            }
            (10, _) if self.filter.is_some() => {
                // Another filter, under which other rows belong to the copy.
                let key = &self.key[0];
                self.filter = Some(format!("\"{}\" IS DISTINCT FROM {}", key.0, key.1.key(rng)));
                (
                    "row filter",
                    format!(
                        "BEGIN; ALTER PUBLICATION prefetchd DROP TABLE {name}; ALTER PUBLICATION prefetchd ADD TABLE {}; COMMIT",
                        self.published()
                    ),
                )
            }
            (11, _) => {
                let (from, to) = *[("sad", "blue"), ("blue", "sad")].choose(rng).unwrap();
                ("rename enum value", format!("ALTER TYPE mood RENAME VALUE '{from}' TO '{to}'"))
            }
            (12, _) => (
                "rename attribute",
                "ALTER TYPE pair RENAME ATTRIBUTE b TO c; ALTER TYPE pair RENAME ATTRIBUTE c TO b".to_owned(),
            ),
            _ => ("vacuum full", format!("VACUUM FULL {name}")),
        }
    }
}

static REGION: Kind = Kind { name: "text", values: &["eu", "us", "on its way"] };

pub fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

fn json(text: &str) -> String {
    serde_json::to_string(text).unwrap()
}
