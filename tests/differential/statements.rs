//! Random transactions over the tables of one round: which statements, in which order, and how they end.
//!
//! What fails (a key that is taken, a column that was dropped) fails as it does for an application, and ends its
//! transaction.

use super::schema::{Table, quoted};
use rand::Rng;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;

/// What one session sends, in order, each statement separately.
#[derive(Debug, Clone)]
pub struct Transaction {
    pub kind: &'static str,
    pub statements: Vec<String>,
}

type Tables<'a> = &'a [Table];

/// Returns the transactions of one session in one half of a round. `session` names what it prepares.
pub fn transactions(tables: Tables, session: &str, how_many: usize, rng: &mut StdRng) -> Vec<Transaction> {
    let mut all = Vec::new();
    let mut prepared: Vec<(usize, String)> = Vec::new();
    for at in 0..how_many {
        all.push(any(tables, &format!("{session} {at}"), &mut prepared, at, rng));
        for (_, end) in prepared.extract_if(.., |(due, _)| *due <= at) {
            all.push(Transaction { kind: "end of a prepared transaction", statements: vec![end] });
        }
    }
    let rest = prepared.into_iter().map(|(_, end)| end).collect();
    all.push(Transaction { kind: "end of a prepared transaction", statements: rest });
    all
}

fn any(tables: Tables, name: &str, prepared: &mut Vec<(usize, String)>, at: usize, rng: &mut StdRng) -> Transaction {
    let table = tables.choose(rng).unwrap();
    let several = |rng: &mut StdRng| -> Vec<String> {
        (0..rng.random_range(1..6)).map(|_| statement(tables.choose(rng).unwrap(), rng)).collect()
    };
    let whole = |middle: Vec<String>, end: &str| {
        ["BEGIN".to_owned()].into_iter().chain(middle).chain([end.to_owned()]).collect::<Vec<_>>()
    };
    let (kind, statements) = match rng.random_range(0..100) {
        0..34 => ("single statement", vec![statement(table, rng)]),
        34..50 => ("several statements", whole(several(rng), "COMMIT")),
        50..56 => ("swap of two keys", whole(rotation(table, 2, rng), "COMMIT")),
        56..61 => ("rotation of keys", whole(rotation(table, 3, rng), "COMMIT")),
        61..66 => {
            let (key, other) = (Key::any(table, rng), Key::any(table, rng));
            let mut middle = vec![key.delete(), key.insert(rng, "")];
            if rng.random_bool(0.5) {
                middle.extend([other.delete(), key.becomes(&other)]);
            }
            ("delete and insert of one key", whole(middle, "COMMIT"))
        }
        66..70 => {
            let key = Key::any(table, rng);
            let middle = vec![key.insert(rng, CONFLICT), key.touch(rng), key.delete()];
            ("insert and delete of one key", whole(middle, "COMMIT"))
        }
        70..78 => {
            let mut middle = several(rng);
            middle.push("SAVEPOINT s".to_owned());
            middle.extend(several(rng));
            middle.push("ROLLBACK TO s".to_owned());
            middle.extend(several(rng));
            ("savepoint rolled back", whole(middle, "COMMIT"))
        }
        78..83 => ("rolled back", whole(several(rng), "ROLLBACK")),
        83..88 => {
            let end = ["COMMIT PREPARED", "COMMIT PREPARED", "ROLLBACK PREPARED"].choose(rng).unwrap();
            prepared.push((at + rng.random_range(0..4), format!("{end} '{name}'")));
            ("prepared", whole(several(rng), &format!("PREPARE TRANSACTION '{name}'")))
        }
        88..92 => {
            let middle = (0..rng.random_range(2..6)).flat_map(|_| {
                let table = tables.choose(rng).unwrap();
                [everything(table, rng), statement(table, rng)]
            });
            ("over the atomic limit", whole(middle.collect(), "COMMIT"))
        }
        92..94 => {
            let truncate = truncate(tables, rng);
            let mut middle = several(rng);
            middle.push(truncate);
            middle.extend(several(rng));
            ("truncate among others", whole(middle, "COMMIT"))
        }
        94 => ("truncate", vec![truncate(tables, rng)]),
        _ => {
            let message = format!(
                "SELECT pg_logical_emit_message({}, {}, {})",
                rng.random_bool(0.5),
                ["''", "'prefetchd'", "'somebody'"].choose(rng).unwrap(),
                ["''", "'\\x00ff'::bytea", "repeat('x', 10000)"].choose(rng).unwrap()
            );
            let mut middle = several(rng);
            middle.push(message);
            middle.extend(several(rng));
            ("foreign message", whole(middle, "COMMIT"))
        }
    };
    Transaction { kind, statements }
}

const CONFLICT: &str = " ON CONFLICT DO NOTHING";

fn statement(table: &Table, rng: &mut StdRng) -> String {
    let key = Key::any(table, rng);
    match rng.random_range(0..100) {
        0..33 => key.insert(rng, CONFLICT),
        33..36 => key.insert(rng, ""),
        36..46 => format!(
            "INSERT INTO {} ({}, body) SELECT * FROM (VALUES {}) v ON CONFLICT DO NOTHING",
            table.name,
            key.columns(),
            (0..5)
                .map(|_| format!("({}, {})", Key::any(table, rng).values(), short(rng)))
                .collect::<Vec<_>>()
                .join(", ")
        ),
        46..62 => key.touch(rng),
        62..70 => format!("UPDATE {} SET large = {} WHERE {}", table.name, large(rng), key.is()),
        70..80 => match table.columns.choose(rng) {
            Some(column) => {
                let value = if rng.random_bool(0.3) { "NULL".to_owned() } else { column.kind.value(rng) };
                format!("UPDATE {} SET {} = {value} WHERE {}", table.name, quoted(&column.name), key.is())
            }
            None => key.touch(rng),
        },
        80..90 => key.becomes(&Key::any(table, rng)),
        90..92 => everything(table, rng),
        92..94 => match &table.parent {
            Some((parent, column, _)) => {
                let any = format!("SELECT \"{column}\" FROM {parent} ORDER BY 1 LIMIT 1");
                format!("UPDATE {} SET parent = ({any}) WHERE {}", table.name, key.is())
            }
            None => key.touch(rng),
        },
        _ => key.delete(),
    }
}

/// Changes every row of the table.
fn everything(table: &Table, rng: &mut StdRng) -> String {
    format!("UPDATE {} SET body = left(md5(coalesce(body, '') || {}), 12)", table.name, short(rng))
}

fn truncate(tables: Tables, rng: &mut StdRng) -> String {
    let mut names: Vec<&str> = tables.iter().filter(|_| rng.random_bool(0.4)).map(|t| t.name.as_str()).collect();
    if names.is_empty() {
        names.push(&tables.choose(rng).unwrap().name);
    }
    let how = ["", " RESTART IDENTITY", " CASCADE", " CASCADE"].choose(rng).unwrap();
    format!("TRUNCATE {}{how}", names.join(", "))
}

/// The first key is moved aside, each other one moves up, and the first takes the last place.
fn rotation(table: &Table, of: usize, rng: &mut StdRng) -> Vec<String> {
    let keys: Vec<Key> = (0..of).map(|_| Key::any(table, rng)).collect();
    let spare = Key { table, values: table.key.iter().map(|(_, kind)| kind.spare()).collect() };
    let mut moves = vec![keys[0].becomes(&spare)];
    moves.extend(keys.windows(2).map(|pair| pair[1].becomes(&pair[0])));
    moves.push(spare.becomes(&keys[of - 1]));
    moves
}

/// The key of a row, or one that a row may get.
struct Key<'a> {
    table: &'a Table,
    values: Vec<String>,
}

impl<'a> Key<'a> {
    fn any(table: &'a Table, rng: &mut StdRng) -> Self {
        Self { table, values: table.key.iter().map(|(_, kind)| kind.key(rng)).collect() }
    }

    fn columns(&self) -> String {
        self.table.key.iter().map(|(name, _)| format!("\"{name}\"")).collect::<Vec<_>>().join(", ")
    }

    fn values(&self) -> String {
        self.values.join(", ")
    }

    fn is(&self) -> String {
        format!("({}) = ({})", self.columns(), self.values())
    }

    fn insert(&self, rng: &mut StdRng, conflict: &str) -> String {
        let (mut columns, mut values) = (self.columns(), self.values());
        for column in &self.table.columns {
            if rng.random_bool(0.7) {
                columns += &format!(", {}", quoted(&column.name));
                values += &format!(", {}", column.kind.value(rng));
            }
        }
        let (body, large) = (short(rng), large(rng));
        format!("INSERT INTO {} ({columns}, body, large) VALUES ({values}, {body}, {large}){conflict}", self.table.name)
    }

    fn touch(&self, rng: &mut StdRng) -> String {
        format!("UPDATE {} SET body = {} WHERE {}", self.table.name, short(rng), self.is())
    }

    fn becomes(&self, other: &Self) -> String {
        let set = match self.values.len() {
            1 => format!("{} = {}", self.columns(), other.values()),
            _ => format!("({}) = ({})", self.columns(), other.values()),
        };
        format!("UPDATE {} SET {set} WHERE {}", self.table.name, self.is())
    }

    fn delete(&self) -> String {
        format!("DELETE FROM {} WHERE {}", self.table.name, self.is())
    }
}

fn short(rng: &mut StdRng) -> String {
    match rng.random_range(0..12) {
        0 => "NULL".to_owned(),
        1 => "''".to_owned(),
        _ => format!("'{:x}'", rng.random::<u32>()),
    }
}

/// Small, or too large to be stored in line.
fn large(rng: &mut StdRng) -> String {
    match rng.random_range(0..6) {
        0 => "NULL".to_owned(),
        1 | 2 => format!("'{:x}'", rng.random::<u16>()),
        _ => format!("repeat(md5('{}'), {})", rng.random::<u32>(), rng.random_range(80..400)),
    }
}
