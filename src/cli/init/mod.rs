//! `prefetchd init`: looks at a live Postgres and a live Redis, and writes what a first start needs.
//!
//! It changes no server and overwrites no file. What it writes passes `prefetchd check` once it is applied. A mistake
//! here follows a table that nobody asked for, or writes a password to a file that others can read.

mod ask;
mod draft;
mod pattern;
mod servers;
mod write;

use super::{Failure, print, printable, runtime};
use crate::bridge::room::{self, WorkingSet};
use crate::code::Code;
use crate::config::Config;
use crate::loader::range::Sizes;
use crate::plan::mapping::{self, Mapping};
use crate::remedy::{Shell, Sql};
use crate::schema::TableSpec;
use crate::source::candidates::{self, Candidate, Surroundings};
use crate::source::connect::{self, PostgresClient};
use crate::source::{SourceError, slot, snapshot};
use crate::words::counted;
use clap::Args;
use draft::{Layout, Problem, Table};
use pattern::Pattern;
use servers::{Kind, PostgresSide, RedisSide, environment, settings};
use std::collections::HashMap;
use std::fmt::Write as _;
use std::fs::OpenOptions;
use std::io::{self, IsTerminal, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use write::Files;

const APPLICATION_NAME: &str = "prefetchd init";
/// How long the sizes of the tables are measured that a person chooses from. The others are shown without.
const MEASURING: Duration = Duration::from_secs(10);
/// Only to parse the URLs.
const ANY_TABLE: &str = "[[tables]]\nname = \"any\"\ntable = \"any\"\nkey = \"any:{id}\"\n";

#[derive(Debug, Args)]
pub(super) struct InitArgs {
    /// The database, with any role that can see its catalog; SELECT on the tables makes estimates possible
    #[arg(long, value_name = "URL")]
    postgres: String,
    /// The Redis, Sentinels or cluster
    #[arg(long, value_name = "URL")]
    redis: String,
    /// Tables to follow: products, 'shop.*', '"My Schema".users'; without it, init asks [may be repeated]
    #[arg(long = "table", value_name = "PATTERN")]
    tables: Vec<Pattern>,
    /// The directory for prefetchd.toml, postgres.sql and redis.acl
    #[arg(long, value_name = "DIR", default_value = ".")]
    out: PathBuf,
}

pub(super) fn run(args: &InitArgs) -> Result<(), Failure> {
    if args.tables.is_empty() && !(io::stdin().is_terminal() && io::stdout().is_terminal()) {
        return Err(Failure::work(
            Code::InitTables,
            "there is no terminal to ask which tables: name them with --table, such as --table '*.*'",
        ));
    }
    let dir = std::path::absolute(&args.out).map_err(|error| unwritable(&args.out, &error))?;
    for name in ["prefetchd.toml", "postgres.sql", "redis.acl"] {
        let file = dir.join(name);
        if file.symlink_metadata().is_ok() {
            let file = file.display();
            return Err(Failure::work(
                Code::FileExists,
                format!("{file} exists, and nothing is overwritten: choose another --out, or move it away"),
            ));
        }
    }
    runtime()?.block_on(init(args, &dir))
}

fn unwritable(path: &Path, error: &io::Error) -> Failure {
    Failure::work(Code::CannotWrite, format!("cannot write {}: {error}", path.display()))
}

fn failed(error: &SourceError) -> Failure {
    Failure::work(error.code(), error.to_string())
}

async fn init(args: &InitArgs, dir: &Path) -> Result<(), Failure> {
    let env = environment();
    let targets = settings(&args.postgres, &args.redis, draft::ROLE, ANY_TABLE, &env)?;
    let target = &targets.postgres.target;
    let client = connect::connect(target, APPLICATION_NAME).await.map_err(|error| failed(&error))?;
    let facts = slot::server_facts(&client).await.map_err(|error| failed(&error))?;
    if facts.in_recovery {
        return Err(Failure::work(
            Code::PostgresStandby,
            "postgres is a standby in recovery: name the primary with --postgres",
        ));
    }
    let surroundings = candidates::surroundings(&client).await.map_err(|error| failed(&error))?;
    let name = draft::free_name(&surroundings.taken);
    let redis = RedisSide::look(&args.redis, &targets.redis.target, &name).await;
    let redis = redis.map_err(|error| Failure::work(error.code(), error.to_string()))?;
    let postgres = PostgresSide::of(&args.postgres, target, &env).await?;

    let found = candidates::tables(&client).await.map_err(|error| failed(&error))?;
    let there = Draft { args, env: &env, client: &client, name: &name, layout: redis.layout };
    let tables = match args.tables.is_empty() {
        false => there.examined(matching(&args.tables, &found, &surroundings)?, None).await?,
        true => {
            let all: Vec<Candidate> = found.into_iter().filter(|candidate| candidate.instead.is_none()).collect();
            if all.is_empty() {
                return Err(Failure::work(
                    Code::InitTables,
                    format!("database {} has no tables", printable(&surroundings.database)),
                ));
            }
            let all = there.examined(all, Some(Instant::now() + MEASURING)).await?;
            let chosen = ask::choose(&all, io::stdin().lock())?;
            // Names are unique among those that were chosen.
            let chosen = chosen.into_iter().map(|place| all[place].candidate.clone()).collect();
            there.examined(chosen, None).await?
        }
    };
    let files = Files {
        dir,
        postgres: &postgres,
        redis: &redis,
        surroundings: &surroundings,
        facts: &facts,
        name: &name,
        tables: &tables,
    };
    if files.followed().next().is_none() {
        return Err(Failure::work(
            Code::InitTables,
            format!("nothing was written, because no table can be followed:\n{}", problems(&tables)),
        ));
    }
    write(&files)?;
    print(&report(&files))
}

/// What a draft of the configuration takes.
struct Draft<'a> {
    args: &'a InitArgs,
    env: &'a HashMap<String, String>,
    client: &'a PostgresClient,
    /// Of slot and publication.
    name: &'a str,
    layout: Layout,
}

impl Draft<'_> {
    /// Gives the tables their names and keys, and finds out of each whether it can be followed, and how large it is, until
    /// `until`.
    async fn examined(&self, candidates: Vec<Candidate>, until: Option<Instant>) -> Result<Vec<Table>, Failure> {
        let mut tables = draft::tables(candidates, self.name, self.layout);
        for table in tables.iter_mut().filter(|table| table.problem.is_none() && table.candidate.readable) {
            if until.is_some_and(|until| Instant::now() > until) {
                break;
            }
            let spec = self.spec(table)?;
            table.problem = self.problem(&spec).await?;
            if table.problem.is_none() {
                let size = room::of_table(self.client, &spec, self.name).await;
                table.size = size.map_err(|error| failed(&error))?;
            }
        }
        Ok(tables)
    }

    /// Returns what the configuration will say, as the daemon will read it.
    fn spec(&self, table: &Table) -> Result<TableSpec, Failure> {
        let lines = write::table_text(table);
        let config: Config = settings(&self.args.postgres, &self.args.redis, self.name, &lines, self.env)?;
        Ok(config.tables.into_iter().next().expect("a configuration has a table"))
    }

    /// Returns why a table cannot be followed, by the daemon's own rules.
    async fn problem(&self, spec: &TableSpec) -> Result<Option<Problem>, Failure> {
        let client = self.client;
        let described = snapshot::describe(client, &spec.table, self.name, &spec.columns, Sizes::Measured).await;
        let problem = |reason: String| Ok(Some(Problem { reason, remedy: String::new() }));
        let table = match described {
            Ok(Some(table)) => table,
            Ok(None) => return problem("it was dropped a moment ago".to_owned()),
            Err(error) if error.is_about_the_query() => return problem(error.to_string()),
            Err(error) => return Err(failed(&error)),
        };
        let booleans = snapshot::boolean_types(client).await.map_err(|error| failed(&error))?;
        let identified = mapping::check_identity(spec, table.identity, &table.identity_columns, &table.relation());
        let types = table.known_types(spec.format, &booleans);
        match identified.and_then(|()| Mapping::bind(spec, &table.relation(), &types).map(drop)) {
            Ok(()) => Ok(None),
            Err(error) => problem(error.knowing(&table.generated).to_string()),
        }
    }
}

/// Returns the tables that patterns match.
///
/// # Errors
/// If one of them matches none.
fn matching(patterns: &[Pattern], found: &[Candidate], there: &Surroundings) -> Result<Vec<Candidate>, Failure> {
    for pattern in patterns {
        let mut matching = found.iter().filter(|candidate| pattern.matches(&candidate.name)).peekable();
        let database = printable(&there.database);
        if matching.peek().is_none() {
            let close = pattern.close(found.iter().filter(|c| c.instead.is_none()).map(|candidate| &candidate.name));
            let meant = match close.is_empty() {
                true => "it has no tables".to_owned(),
                false => format!("did you mean {}?", printable(&close.join(", "))),
            };
            return Err(Failure::work(
                Code::InitTables,
                format!("no table of database {database} matches {}: {meant}", printable(&pattern.text)),
            ));
        }
        let others: Vec<String> = matching
            .clone()
            .filter_map(|candidate| Some(format!("{} is {}", candidate.name, candidate.instead.as_ref()?)))
            .collect();
        if others.len() == matching.count() {
            let others = printable(&others.join(", "));
            return Err(Failure::work(
                Code::InitTables,
                format!("{} matches no table that can be followed: {others}", printable(&pattern.text)),
            ));
        }
    }
    let wanted = |candidate: &&Candidate| {
        candidate.instead.is_none() && patterns.iter().any(|pattern| pattern.matches(&candidate.name))
    };
    Ok(found.iter().filter(wanted).cloned().collect())
}

fn write(files: &Files<'_>) -> Result<(), Failure> {
    std::fs::create_dir_all(files.dir).map_err(|error| unwritable(files.dir, &error))?;
    let texts = [
        (files.configuration(), files.configuration_text()),
        (files.sql(), files.sql_text()),
        (files.acl(), files.acl_text()),
    ];
    for (path, text) in texts {
        let written = OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(&path)
            .and_then(|mut file| file.write_all(text.as_bytes()));
        written.map_err(|error| unwritable(&path, &error))?;
    }
    Ok(())
}

fn problems(tables: &[Table]) -> String {
    let mut out = String::new();
    for table in tables {
        let Some(Problem { reason, remedy }) = &table.problem else { continue };
        let colon = if remedy.is_empty() { "" } else { ": " };
        let _ = writeln!(out, "{}", printable(&format!("{}: {reason}{colon}{remedy}", table.candidate.name)));
    }
    out
}

/// What was written, and what to do with it.
fn report(files: &Files<'_>) -> String {
    let mut needed = WorkingSet::default();
    files.followed().filter_map(|table| table.size.as_ref()).for_each(|size| needed.include(size));
    let mut out = format!("{} in {}", counted(files.followed().count(), "table"), files.configuration().display());
    if needed.rows > 0.0 {
        let _ = write!(out, ": {needed}");
    }
    out.push('\n');
    let left_out = problems(files.tables);
    if !left_out.is_empty() {
        let _ = write!(out, "\nLeft out, as comments:\n{left_out}");
    }
    for warning in warnings(files, &needed) {
        let _ = write!(out, "\n{warning}\n");
    }
    let shell = |path: &Path| Shell(&[&path.to_string_lossy()]).to_string();
    let (sql, acl, password) = (shell(&files.sql()), shell(&files.acl()), shell(&files.redis_password()));
    let passwords: Vec<String> = match files.postgres.has_password {
        true => vec![shell(&files.postgres_password()), password.clone()],
        false => vec![password.clone()],
    };
    // Where another prefetchd may use the role, it must keep its password.
    let is_ours = files.name == draft::ROLE;
    let (enter, prompt) = match files.postgres.has_password && is_ours {
        true => (" -c '\\password prefetchd'", " (psql asks for the first of the new ones)"),
        false => ("", ""),
    };
    let decode = match files.facts.can_decode() {
        true => String::new(),
        false if files.surroundings.replication_group.is_some() => String::new(),
        false => {
            let statement = Sql::WalLevelLogical.to_string();
            format!("  {} -c {}      # then restart Postgres\n", files.postgres.psql, Shell(&[statement.as_str()]))
        }
    };
    let configuration = shell(&files.configuration());
    let _ = write!(
        out,
        "\nRead the files. Then write a password to each of these, such as (umask 077; openssl rand -hex 24 > FILE):\n  {}\n",
        passwords.join("\n  ")
    );
    let _ = write!(
        out,
        "\nand run, with the administrators' passwords in PGPASSWORD and REDISCLI_AUTH{prompt}:\n{decode}  {} -v ON_ERROR_STOP=1 -f {sql}{enter}\n  \
         test -s {password} && (sed -n 's/^user //p' {acl}; printf '#'; tr -d '\\n' < {password} | sha256sum | cut -c1-64) | xargs {} ACL SETUSER\n  \
         prefetchd -c {configuration} check\n  \
         prefetchd -c {configuration} run\n\
         \nThe last two as the user who is to run it, without those passwords: it must be able to read the files.\n",
        files.postgres.psql, files.redis.redis_cli,
    );
    out
}

fn warnings(files: &Files<'_>, needed: &WorkingSet) -> Vec<String> {
    let mut warnings = Vec::new();
    if files.name != draft::ROLE {
        warnings.push(format!(
            "A slot or publication with the name {} exists already: this one, and the user in Redis, have the name {}, and \
             the keys begin otherwise.",
            draft::ROLE,
            files.name
        ));
        if files.postgres.has_password {
            warnings.push(format!(
                "If the role {role} exists as well, write its present password to {}; otherwise set one: \\password {role}.",
                files.postgres_password().display(),
                role = draft::ROLE
            ));
        }
    }
    if !files.facts.can_decode() {
        let (level, file) = (&files.facts.wal_level, files.sql());
        warnings.push(format!("wal_level is {level}, and must be logical, after a restart: see {}.", file.display()));
    }
    if let Some(refusal) = files.redis.maxmemory_bytes.and_then(|limit| room::refusal(needed, limit)) {
        warnings.push(refusal);
    }
    if files.redis.kind == Kind::Sentinel {
        let text = "In the second command, MASTER stands for the present master. Run it for each replica, too.";
        warnings.push(text.to_owned());
    }
    if let Some(policy) = &files.redis.evicts {
        warnings.push(format!(
            "Redis evicts keys ({policy}): CONFIG SET maxmemory-policy noeviction, and the same in redis.conf."
        ));
    }
    warnings
}
