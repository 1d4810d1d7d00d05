//! Values of every built-in type, in every encoding: a load and the stream write the same bytes, whatever the settings
//! of role and database. Over HTTP, with types, they are what `row_to_json` writes.

use crate::differential::values::{KINDS, TYPES};
use crate::harness::{Daemon, Postgres, Redis, Settings, skipped};
use std::collections::BTreeMap;
use tokio_postgres::{Client, SimpleQueryMessage};

/// Whatever could change a byte. `default_text_search_config` and similar settings change input, not output.
const HOSTILE: &[(&str, &str)] = &[
    ("DateStyle", "'SQL, DMY'"),
    ("IntervalStyle", "'iso_8601'"),
    ("TimeZone", "'Asia/Kathmandu'"),
    ("extra_float_digits", "-10"),
    ("bytea_output", "'escape'"),
    ("lc_monetary", "'C.UTF-8'"),
    ("search_path", "'elsewhere'"),
    ("xmlbinary", "'hex'"),
    ("xmloption", "'document'"),
    ("quote_all_identifiers", "on"),
    ("array_nulls", "off"),
    ("escape_string_warning", "off"),
    ("standard_conforming_strings", "off"),
    ("client_encoding", "'SQL_ASCII'"),
];
const PINNED: &str = "SET DateStyle = 'ISO'; SET IntervalStyle = 'postgres'; SET TimeZone = 'UTC'; \
    SET extra_float_digits = 1; SET bytea_output = 'hex'; SET lc_monetary = 'C'; SET search_path = 'pg_catalog'; \
    SET quote_all_identifiers = off";

type Hash = BTreeMap<String, String>;

/// Reads the rows with the promised session settings.
async fn rows(client: &Client, table: &str) -> BTreeMap<i32, Hash> {
    let messages = client.simple_query(&format!("SELECT * FROM public.{table}")).await.unwrap();
    let boolean = |name: &str| ["boolean", "agreed", "signed"].iter().any(|of| name.starts_with(of));
    let row = |message: &SimpleQueryMessage| {
        let SimpleQueryMessage::Row(row) = message else { return None };
        let value = |at: usize, name: &str| match row.get(at)? {
            "t" if boolean(name) => Some("true".to_owned()),
            "f" if boolean(name) => Some("false".to_owned()),
            text => Some(text.to_owned()),
        };
        let fields = row.columns().iter().enumerate();
        let hash = fields.filter_map(|(at, c)| Some((c.name().to_owned(), value(at, c.name())?))).collect();
        Some((row.get("id").unwrap().parse().unwrap(), hash))
    };
    messages.iter().filter_map(row).collect()
}

/// Settings that change what a byte is.
async fn is_hostile(postgres: &Postgres) {
    for (at, (name, value)) in HOSTILE.iter().enumerate() {
        let (role, database) = ("prefetchd", postgres.database());
        let whom =
            if at % 2 == 0 { format!("ROLE {role} IN DATABASE {database}") } else { format!("DATABASE {database}") };
        postgres.execute(&format!("ALTER {whom} SET {name} = {value}")).await;
    }
}

/// A daemon whose format is JSON, beside the rows that are there; then `insert` creates the rows 201, 202, … Each document is
/// what the query `json` gives for its id.
async fn are_documents(postgres: &Postgres, json: &str, insert: impl AsyncFn(i32) -> usize) {
    let redis = Redis::start();
    let tables = "[[tables]]\nname = 't'\ntable = 'public.t'\nkey = 't:{id}'\nformat = 'json'";
    let daemon = Daemon::with(&Settings::new(postgres, &redis).tables(tables)).await;
    daemon.allow_warning("loading every table again");
    daemon.ready().await;
    insert(200).await;
    daemon.applied(postgres.position().await).await;
    let client = postgres.client().await;
    client.batch_execute(PINNED).await.unwrap();
    let mut count = 0;
    for message in client.simple_query(json).await.unwrap() {
        let SimpleQueryMessage::Row(row) = message else { continue };
        let id = row.get(0).unwrap();
        let document: String = redis.command(&["GET", &format!("t:{id}")]).await;
        assert_eq!(document, row.get(1).unwrap(), "row {id}");
        count += 1;
    }
    assert_eq!(redis.keys("t:*").await.len(), count);
    are_typed(&daemon, &client, json).await;
    let found = daemon.operate("verify", &serde_json::json!({})).await.json();
    assert_eq!((&found["stale"], &found["missing"], &found["orphaned"]), (&0.into(), &0.into(), &0.into()), "{found}");
    assert_eq!(daemon.status().await["dead_letters"], 0);
}

/// Reads the rows over HTTP, one by one and several at once, and compares them with what this query gives for each id.
pub async fn are_typed(daemon: &Daemon, client: &Client, json: &str) {
    let messages = client.simple_query(json).await.unwrap();
    let rows = messages.iter().filter_map(|message| match message {
        SimpleQueryMessage::Row(row) => Some((row.get(0).unwrap(), row.get(1).unwrap())),
        _ => None,
    });
    let rows: Vec<(&str, &str)> = rows.collect();
    assert!(!rows.is_empty());
    for (id, json) in &rows {
        let answer = daemon.get(&format!("/v1/tables/t/{id}?typed=true")).await;
        assert_eq!((answer.status, answer.body.as_str()), (200, *json), "row {id}");
    }
    for rows in rows.chunks(50) {
        let keys: Vec<String> = rows.iter().map(|(id, _)| format!("key={id}")).collect();
        let answer = daemon.get(&format!("/v1/tables/t?{}&typed=true&key=0", keys.join("&"))).await;
        let rows: Vec<String> = rows.iter().map(|(id, json)| format!("\"{id}\":{json}")).collect();
        assert_eq!(answer.body, format!("{{\"rows\":{{{},\"0\":null}}}}", rows.join(",")));
    }
}

/// A daemon for an existing table `t`, whose rows 1, 2, … are loaded; then `insert` creates the rows 101, 102, … `json` is a
/// query for the rows as JSON.
async fn same_by_both_ways(postgres: &Postgres, json: &str, insert: impl AsyncFn(i32) -> usize) {
    let redis = Redis::start();
    is_hostile(postgres).await;
    let count = insert(0).await;
    let tables = "[[tables]]\nname = 't'\ntable = 'public.t'\nkey = 't:{id}'";
    let settings = Settings::new(postgres, &redis).text("cache.null", "omit").tables(tables);
    let daemon = Daemon::with(&settings).await;
    daemon.ready().await;
    assert_eq!(insert(100).await, count);
    daemon.applied(postgres.position().await).await;
    let client = postgres.client().await;
    client.batch_execute(PINNED).await.unwrap();
    let expected = rows(&client, "t").await;
    assert_eq!(expected.len(), 2 * count);
    for (id, row) in &expected {
        let hash = redis.hash(&format!("t:{id}")).await;
        for (field, value) in row {
            assert_eq!(hash.get(field), Some(value), "row {id}: {field}");
        }
        assert_eq!(hash.len(), row.len(), "row {id}");
    }
    are_typed(&daemon, &client, json).await;
    let found = daemon.operate("verify", &serde_json::json!({})).await.json();
    assert_eq!((&found["stale"], &found["missing"], &found["orphaned"]), (&0.into(), &0.into(), &0.into()), "{found}");
}

/// The name of the column for a type.
fn column(at: usize) -> String {
    format!("\"{} {at}\"", KINDS[at].name.replace('"', ""))
}

/// One column for every type.
async fn table_of_every_type(postgres: &Postgres) {
    let columns: Vec<String> = (0..KINDS.len()).map(|at| format!("{} {}", column(at), KINDS[at].name)).collect();
    postgres
        .execute(&format!(
            "CREATE SEQUENCE versions; {TYPES} CREATE TABLE t (id int PRIMARY KEY, {});
             GRANT SELECT ON t TO prefetchd; ALTER PUBLICATION prefetchd ADD TABLE t",
            columns.join(", ")
        ))
        .await;
}

/// Enough rows for the type with the most values, behind this id.
async fn insert_every_type(client: &Client, from: i32, sendable: impl Fn(char) -> bool) -> usize {
    let most = KINDS.iter().map(|kind| kind.values.len()).max().unwrap();
    // The database has the hostile settings by now.
    let with_xml = client.simple_query("SELECT '<a/>'::xml").await.is_ok();
    client.batch_execute("SET search_path = public; SET standard_conforming_strings = on; SET xmloption = 'content'; SET DateStyle = ISO; SET array_nulls = on; SET client_encoding = 'UTF8'").await.unwrap();
    for row in 0..=most {
        // The last one is all NULL.
        let value = |at: usize| {
            let kind = &KINDS[at];
            let text: String = kind.values[row % kind.values.len()].chars().filter(|c| sendable(*c)).collect();
            match kind.name {
                _ if row == most => "NULL".to_owned(),
                "xml" if !with_xml => "NULL".to_owned(),
                name => format!("'{}'::{name}", text.replace('\'', "''")),
            }
        };
        let values: Vec<String> = (0..KINDS.len()).map(value).collect();
        let sql = format!("INSERT INTO t VALUES ({}, {})", from + i32::try_from(row).unwrap() + 1, values.join(", "));
        client.batch_execute(&sql).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
    }
    most + 1
}

async fn every_type(postgres: &Postgres, sendable: impl Fn(char) -> bool) {
    table_of_every_type(postgres).await;
    let client = postgres.client().await;
    let json = "SELECT id, row_to_json(t) FROM public.t";
    let insert = async |from| insert_every_type(&client, from, &sendable).await;
    same_by_both_ways(postgres, json, insert).await;
    are_documents(postgres, json, insert).await;
}

#[tokio::test]
async fn every_type_is_written_alike_in_a_utf8_database() {
    every_type(&Postgres::shared(), |_| true).await;
}

#[tokio::test]
async fn every_type_is_written_alike_in_a_latin1_database() {
    every_type(&Postgres::shared().another_database_in("LATIN1"), |c| u32::from(c) < 256).await;
}

/// It accepts any bytes. Valid UTF-8 arrives; for other bytes see [`crate::poison`].
#[tokio::test]
async fn every_type_is_written_alike_in_a_database_without_an_encoding() {
    every_type(&Postgres::shared().another_database_in("SQL_ASCII"), |_| true).await;
}

#[tokio::test]
async fn types_of_extensions_are_written_alike() {
    let postgres = Postgres::shared();
    let there = "SELECT count(*) FROM pg_available_extensions WHERE name IN ('hstore', 'citext', 'ltree')";
    if postgres.value(there).await.as_deref() != Some("3") {
        skipped("hstore, citext and ltree are not installed (postgresql-contrib)");
        return;
    }
    postgres
        .execute(
            "CREATE SCHEMA ext; CREATE EXTENSION hstore SCHEMA ext; CREATE EXTENSION citext SCHEMA ext;
             CREATE EXTENSION ltree SCHEMA ext;
             CREATE TABLE t (id int PRIMARY KEY, h ext.hstore, c ext.citext, l ext.ltree, q ext.lquery, hs ext.hstore[]);
             GRANT SELECT ON t TO prefetchd; ALTER PUBLICATION prefetchd ADD TABLE t",
        )
        .await;
    // A cast to json of their own is left out.
    let json = "SELECT id, row_to_json(x) FROM (SELECT id, h::text, c, l, q, hs::text[] FROM public.t) x";
    same_by_both_ways(&postgres, json, async |from| {
        let sql = format!(
            r#"SET search_path = public; SET standard_conforming_strings = on; INSERT INTO t VALUES
               ({from} + 1, '"a b"=>"1,2", c=>NULL, d=>"NULL"', 'MiXed', 'Top.Child_1', '*.a|b@*.c{{1,2}}', '{{"a=>b",NULL}}'),
               ({from} + 2, '', '', '', NULL, '{{}}')"#
        );
        postgres.execute(&sql).await;
        2
    })
    .await;
}

/// NULL cannot be told from the empty text, so the latter is read as NULL.
#[tokio::test]
async fn every_type_is_typed_where_null_is_the_empty_text() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    is_hostile(&postgres).await;
    table_of_every_type(&postgres).await;
    let client = postgres.client().await;
    insert_every_type(&client, 0, |_| true).await;
    let tables = "[[tables]]\nname = 't'\ntable = 'public.t'\nkey = 't:{id}'";
    let daemon = Daemon::with(&Settings::new(&postgres, &redis).tables(tables)).await;
    daemon.ready().await;
    insert_every_type(&client, 100, |_| true).await;
    daemon.applied(postgres.position().await).await;
    let client = postgres.client().await;
    client.batch_execute(PINNED).await.unwrap();
    let filled = |at| {
        let column = column(at);
        format!("CASE WHEN format('%s', {column}) <> '' THEN {column} END AS {column}")
    };
    let columns: Vec<String> = (0..KINDS.len()).map(filled).collect();
    let json = format!("SELECT id, row_to_json(x) FROM (SELECT id, {} FROM public.t) x", columns.join(", "));
    are_typed(&daemon, &client, &json).await;
}

/// Two spellings of one key: the row is at the key with the present spelling.
#[tokio::test]
async fn a_key_that_is_only_spelled_otherwise_moves() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    postgres
        .execute(
            "CREATE TABLE t (id numeric PRIMARY KEY, v text); INSERT INTO t VALUES (1.0, 'a'), (2, 'b');
             GRANT SELECT ON t TO prefetchd; ALTER PUBLICATION prefetchd ADD TABLE t",
        )
        .await;
    let tables = "[[tables]]\nname = 't'\ntable = 'public.t'\nkey = 't:{id}'";
    let daemon = Daemon::with(&Settings::new(&postgres, &redis).tables(tables)).await;
    daemon.ready().await;
    assert_eq!(redis.keys("t:*").await, ["t:1.0", "t:2"]);
    let lsn = postgres.execute("UPDATE t SET id = 1.00 WHERE id = 1; DELETE FROM t WHERE id = 2.00").await;
    daemon.applied(lsn).await;
    assert_eq!(redis.keys("t:*").await, ["t:1.00"]);
    let found = daemon.operate("verify", &serde_json::json!({})).await.json();
    assert_eq!((&found["missing"], &found["orphaned"]), (&0.into(), &0.into()), "{found}");
}

/// It is written as in the hash.
#[tokio::test]
async fn a_boolean_in_a_key_is_a_word_too() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    postgres
        .execute(
            "CREATE TABLE t (id int, on_sale boolean, v text, PRIMARY KEY (id, on_sale)); INSERT INTO t VALUES (1, true, 'a');
             GRANT SELECT ON t TO prefetchd; ALTER PUBLICATION prefetchd ADD TABLE t",
        )
        .await;
    let tables = "[[tables]]\nname = 't'\ntable = 'public.t'\nkey = 't:{id}:{on_sale}'";
    let daemon = Daemon::with(&Settings::new(&postgres, &redis).tables(tables)).await;
    daemon.ready().await;
    let lsn =
        postgres.execute("INSERT INTO t VALUES (1, false, 'b'), (2, true, 'c'); DELETE FROM t WHERE id = 2").await;
    daemon.applied(lsn).await;
    assert_eq!(redis.keys("t:*").await, ["t:1:false", "t:1:true"]);
    let found = daemon.operate("refetch", &serde_json::json!({})).await.json();
    assert_eq!((&found["loaded"], &found["removed"]), (&2.into(), &0.into()), "{found}");
    assert_eq!(redis.keys("t:*").await, ["t:1:false", "t:1:true"]);
    assert_eq!(daemon.get("/v1/tables/t/1/true").await.json()["v"], "a");
}
