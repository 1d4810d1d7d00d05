//! What is to be written: which tables under which names and keys, and which of them cannot be followed yet.
//!
//! A mistake here gives two tables the same prefix, and prefetchd would remove the rows of one as orphans of the other.

use crate::bridge::room::WorkingSet;
use crate::plan::key::parse_template;
use crate::remedy::Sql;
use crate::schema::KeyTemplate;
use crate::source::candidates::{Candidate, Identity};
use std::collections::HashSet;

/// The role in Postgres, and the user in Redis unless that name is taken.
pub(super) const ROLE: &str = "prefetchd";

/// A table to configure.
#[derive(Debug, Clone)]
pub(super) struct Table {
    pub candidate: Candidate,
    /// For URLs, and part of the keys: letters, digits, `_`, `-` and `.`.
    pub name: String,
    /// Of a table without a key, only the literal is known.
    pub key: KeyTemplate,
    /// Why it cannot be followed. It is written as a comment then.
    pub problem: Option<Problem>,
    /// `None` if it could not be examined.
    pub size: Option<WorkingSet>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Problem {
    pub reason: String,
    /// A statement, or empty if the reason says it.
    pub remedy: String,
}

/// Where the keys of a cluster lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Layout {
    /// Wherever they hash, or not on a cluster.
    Anywhere,
    /// In the hash slot of prefetchd's own keys, because nodes before Redis 7.0 cannot do otherwise.
    OneHashSlot,
}

/// Gives names and keys to tables. `slot` is the name of the replication slot: [`free_name`]. The keys of a second
/// prefetchd begin otherwise than those of the first, which may be in the same Redis.
pub(super) fn tables(candidates: Vec<Candidate>, slot: &str, layout: Layout) -> Vec<Table> {
    let tag = match layout {
        Layout::Anywhere => String::new(),
        Layout::OneHashSlot => format!("{{{slot}}}:"),
    };
    let root = slot.replacen(ROLE, "cache", 1);
    let names = names(&candidates);
    let table = |(candidate, name): (Candidate, String)| {
        let columns = match &candidate.identity {
            Identity::Key(columns) => columns.clone(),
            Identity::Nothing | Identity::Missing(_) => Vec::new(),
        };
        let key = KeyTemplate { literal: format!("{tag}{root}:{name}:"), columns };
        Table { problem: problem(&candidate, &key), candidate, name, key, size: None }
    };
    candidates.into_iter().zip(names).map(table).collect()
}

fn problem(candidate: &Candidate, key: &KeyTemplate) -> Option<Problem> {
    let table = &candidate.name;
    let (reason, remedy) = match &candidate.identity {
        Identity::Key(_) if parse_template(&key.to_string()).is_ok_and(|parsed| parsed == *key) => return None,
        Identity::Key(columns) => {
            let columns = columns.join(", ");
            (format!("a template cannot hold the braces in the names of its key's columns, {columns}"), String::new())
        }
        Identity::Nothing => ("its REPLICA IDENTITY is NOTHING".to_owned(), Sql::IdentityDefault { table }.to_string()),
        Identity::Missing(unique) if unique.is_empty() => {
            ("it has no primary key".to_owned(), Sql::PrimaryKey { table }.to_string())
        }
        Identity::Missing(unique) => (
            "it has no primary key, but a unique index".to_owned(),
            Sql::IdentityIndex { table, columns: unique }.to_string(),
        ),
    };
    Some(Problem { reason, remedy })
}

/// Returns a unique name for each: that of the table, with its schema if that is not public, or if another one has the
/// same name.
fn names(candidates: &[Candidate]) -> Vec<String> {
    let mut taken = HashSet::new();
    let name = |candidate: &Candidate| {
        let of_table = &candidate.name.table;
        let shares = candidates.iter().filter(|other| other.name.table == *of_table).count() > 1;
        let wanted = match candidate.name.schema.as_str() {
            "public" if !shares => slug(of_table),
            schema => format!("{}.{}", slug(schema), slug(of_table)),
        };
        let numbered = (2..).map(|number| format!("{wanted}-{number}"));
        let free = std::iter::once(wanted.clone()).chain(numbered).find(|name| taken.insert(name.clone()));
        free.expect("there are more numbers than tables")
    };
    candidates.iter().map(name).collect()
}

/// Replaces what cannot be in a URL, so that the name also needs no quotes in an ACL.
fn slug(name: &str) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() || matches!(c, '_' | '-') { c } else { '_' };
    let slug: String = name.chars().map(plain).collect();
    if slug.starts_with('-') { format!("_{slug}") } else { slug }
}

/// Returns the first name that no slot and no publication has.
pub(super) fn free_name(taken: &[String]) -> String {
    let numbered = (2..).map(|number| format!("{ROLE}_{number}"));
    let mut names = std::iter::once(ROLE.to_owned()).chain(numbered);
    names.find(|name| !taken.contains(name)).expect("there are more numbers than names")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schema::QualifiedName;

    fn candidate(schema: &str, table: &str, columns: &[&str]) -> Candidate {
        Candidate {
            name: QualifiedName { schema: schema.to_owned(), table: table.to_owned() },
            instead: None,
            rows: None,
            identity: Identity::Key(columns.iter().map(|column| (*column).to_owned()).collect()),
            readable: true,
            has_row_security: false,
            relations: Vec::new(),
            closed_schemas: Vec::new(),
        }
    }

    #[test]
    fn prefixes_are_unique_and_none_begins_another() {
        let tables = [
            ("public", "products"),
            ("shop", "orders"),
            ("public", "orders"),
            ("My Schema", "users"),
            ("my schema", "us\"er;s"),
            ("my schema", "us er*s"),
            ("public", "{id}:x"),
            ("public", "-a"),
            ("public", "préfix"),
        ];
        let drafted = super::tables(
            tables.iter().map(|(schema, table)| candidate(schema, table, &["a", "b c"])).collect(),
            ROLE,
            Layout::Anywhere,
        );
        let names: Vec<&str> = drafted.iter().map(|table| table.name.as_str()).collect();
        assert_eq!(
            names,
            [
                "products",
                "shop.orders",
                "public.orders",
                "My_Schema.users",
                "my_schema.us_er_s",
                "my_schema.us_er_s-2",
                "_id__x",
                "_-a",
                "pr_fix"
            ]
        );
        assert!(drafted.iter().all(|table| table.problem.is_none()), "{drafted:?}");
        assert_eq!(drafted[0].key.to_string(), "cache:products:{a}:{b c}");
        for (a, b) in drafted.iter().flat_map(|a| drafted.iter().map(move |b| (a, b))) {
            assert!(a.name == b.name || !a.key.literal.starts_with(&b.key.literal), "{a:?} {b:?}");
        }
    }

    #[test]
    fn a_key_that_no_template_can_hold_is_a_problem() {
        let drafted = tables(vec![candidate("public", "t", &["a}"])], ROLE, Layout::Anywhere);
        assert!(drafted[0].problem.is_some());
        let drafted = tables(vec![candidate("public", "t", &["a"])], "prefetchd_2", Layout::OneHashSlot);
        assert_eq!(drafted[0].key.to_string(), "{{prefetchd_2}}:cache_2:t:{a}");
    }

    #[test]
    fn a_name_that_is_taken_is_counted_up() {
        assert_eq!(free_name(&[]), "prefetchd");
        assert_eq!(free_name(&["prefetchd".to_owned(), "prefetchd_2".to_owned()]), "prefetchd_3");
    }
}
