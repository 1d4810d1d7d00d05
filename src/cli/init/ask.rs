//! The question which tables to follow, on a terminal.

use super::draft::Table;
use super::pattern::Pattern;
use crate::bridge::room;
use crate::cli::{Failure, aligned, print, printable};
use crate::code::Code;
use crate::source::candidates::Identity;
use std::io::BufRead;

/// Shows the tables with numbers, and reads the choice from `input`. Returns the places of those that were chosen.
///
/// # Errors
/// If there is no answer.
pub(super) fn choose(tables: &[Table], mut input: impl BufRead) -> Result<Vec<usize>, Failure> {
    print(&listed(tables))?;
    loop {
        print("Which of them? Numbers (1 3-5), patterns (shop.*), or all: ")?;
        let mut line = String::new();
        match input.read_line(&mut line) {
            Ok(0) | Err(_) => return Err(Failure::work(Code::InitTables, "no table was chosen: nothing was written")),
            Ok(_) => {}
        }
        match chosen(&line, tables) {
            Ok(places) if places.is_empty() => {}
            Ok(places) => return Ok(places),
            Err(why) => print(&format!("{why}\n"))?,
        }
    }
}

fn listed(tables: &[Table]) -> String {
    let heads = ["", "TABLE", "ROWS", "IDENTITY", "IN REDIS"].map(str::to_owned).to_vec();
    let row = |(place, table): (usize, &Table)| {
        let rows = table.size.map(|size| size.rows).or(table.candidate.rows);
        let identity = match &table.candidate.identity {
            Identity::Key(columns) => printable(&columns.join(", ")),
            Identity::Nothing | Identity::Missing(_) => "none: it is left out".to_owned(),
        };
        vec![
            (place + 1).to_string(),
            printable(&table.candidate.name.to_string()),
            rows.map_or_else(|| "?".to_owned(), |rows| format!("{rows:.0}")),
            identity,
            table.size.map_or_else(|| "?".to_owned(), |size| room::size(size.bytes as u64)),
        ]
    };
    aligned(&std::iter::once(heads).chain(tables.iter().enumerate().map(row)).collect::<Vec<_>>())
}

/// Returns the places of the tables that a line names, each once, in their order.
fn chosen(line: &str, tables: &[Table]) -> Result<Vec<usize>, String> {
    let mut places = vec![false; tables.len()];
    for word in words(line) {
        let range = word.split_once('-').unwrap_or((&word, &word));
        match (range.0.parse::<usize>(), range.1.parse::<usize>()) {
            (Ok(first), Ok(last)) if (1..=last).contains(&first) && last <= tables.len() => {
                places[first - 1..last].fill(true);
            }
            (Ok(_), Ok(_)) => return Err(format!("{word} is none of these numbers")),
            _ if word == "all" => places.fill(true),
            _ => {
                let pattern: Pattern = word.parse()?;
                let named = |table: &Table| pattern.matches(&table.candidate.name);
                if !tables.iter().any(named) {
                    return Err(format!("{} matches none of these tables", printable(&word)));
                }
                places.iter_mut().zip(tables).filter(|(_, table)| named(table)).for_each(|(chosen, _)| *chosen = true);
            }
        }
    }
    Ok(places.iter().enumerate().filter(|(_, chosen)| **chosen).map(|(place, _)| place).collect())
}

/// Splits at commas and blanks outside of quotes.
fn words(line: &str) -> Vec<String> {
    let mut quoted = false;
    let ends = |c: char| {
        quoted ^= c == '"';
        !quoted && (c == ',' || c.is_whitespace())
    };
    line.split(ends).filter(|word| !word.is_empty()).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::init::draft::{Layout, tables};
    use crate::schema::QualifiedName;
    use crate::source::candidates::Candidate;

    #[test]
    fn tables_are_chosen_by_number_and_by_name() {
        let candidate = |(schema, table): (&str, &str)| Candidate {
            name: QualifiedName { schema: schema.to_owned(), table: table.to_owned() },
            instead: None,
            rows: Some(7.0),
            identity: Identity::Key(vec!["id".to_owned()]),
            readable: true,
            has_row_security: false,
            relations: Vec::new(),
            closed_schemas: Vec::new(),
        };
        let names = [("My Schema", "users"), ("public", "a"), ("shop", "orders"), ("shop", "products")];
        let tables = tables(names.map(candidate).to_vec(), "prefetchd", Layout::Anywhere);
        for (line, places) in [
            ("2\n", Ok(vec![1])),
            ("4, 1-2", Ok(vec![0, 1, 3])),
            ("all", Ok(vec![0, 1, 2, 3])),
            ("shop.*  a", Ok(vec![1, 2, 3])),
            ("\"My Schema\".users", Ok(vec![0])),
            ("\n", Ok(vec![])),
            ("5", Err(())),
            ("0", Err(())),
            ("3-2", Err(())),
            ("nothing", Err(())),
        ] {
            assert_eq!(chosen(line, &tables).map_err(drop), places, "{line:?}");
        }
        assert!(choose(&tables, &b"9\n3\n"[..]).is_ok_and(|places| places == [2]));
        assert!(choose(&tables, &b""[..]).is_err());
        assert!(listed(&tables).contains("3  shop.orders           7  id        ?"), "{}", listed(&tables));
    }
}
