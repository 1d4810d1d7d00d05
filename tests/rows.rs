//! What a row looks like in Redis, whichever path it took.

use crate::harness::{Daemon, Postgres, Redis, Settings, run_program};
use prefetchd::lsn::Lsn;
use serde_json::json;
use std::collections::BTreeMap;

/// A daemon for one table that already has rows.
async fn following(postgres: &Postgres, redis: &Redis, ddl: &str, table: &str) -> Daemon {
    postgres.execute(ddl).await;
    let daemon = Daemon::with(&Settings::new(postgres, redis).tables(table)).await;
    daemon.ready().await;
    daemon
}

async fn apply(postgres: &Postgres, daemon: &Daemon, sql: &str) {
    let lsn: Lsn = postgres.execute(sql).await;
    daemon.applied(lsn).await;
}

fn row<const N: usize>(fields: [(&str, &str); N]) -> BTreeMap<String, String> {
    fields.into_iter().map(|(field, value)| (field.to_owned(), value.to_owned())).collect()
}

#[tokio::test]
async fn two_rows_never_share_a_composite_key() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let daemon = following(
        &postgres,
        &redis,
        "CREATE TABLE items (part text, whole text, n int, PRIMARY KEY (whole, part));
         INSERT INTO items VALUES ('b', 'a:', 1), (':b', 'a', 2), ('%3Ab', 'a', 3), ('', '', 4), ('c', '', 5), ('', 'c', 6);
         GRANT SELECT ON items TO prefetchd; ALTER PUBLICATION prefetchd ADD TABLE items",
        // In an order different from the primary key's, and from the table's.
        "[[tables]]\nname = 'items'\ntable = 'public.items'\nkey = 'item:{part}:{whole}'",
    )
    .await;
    let keys = |n: usize| ["item:%253Ab:a", "item:%3Ab:a", "item::", "item::c", "item:b:a%3A", "item:c:"][..n].to_vec();
    assert_eq!(redis.keys("item:*").await, keys(6));
    assert_eq!(redis.hash("item:%253Ab:a").await, row([("part", "%3Ab"), ("whole", "a"), ("n", "3")]));

    apply(&postgres, &daemon, "DELETE FROM items WHERE part = 'c'; UPDATE items SET n = n * 10 WHERE n < 4").await;
    assert_eq!(redis.keys("item:*").await, keys(5));
    for (path, n) in [("b/a:", "10"), (":b/a", "20"), ("%3Ab/a", "20"), ("%253Ab/a", "30"), ("%25%33Ab/a", "30")] {
        let answer = daemon.get(&format!("/v1/tables/items/{path}")).await;
        assert_eq!(answer.status, 200, "{path}: {answer:?}");
        assert_eq!(answer.json()["n"], n, "{path}");
    }
    // In a batch read, keys are written as in Redis, and percent-encoded once more for the query string.
    let answer = daemon.get("/v1/tables/items?key=b:a%253A&key=%253Ab:a&key=b:b").await.json();
    assert_eq!(answer["rows"]["b:a%3A"]["n"], "10", "{answer}");
    assert_eq!(answer["rows"]["%3Ab:a"]["n"], "20", "{answer}");
    assert_eq!(answer["rows"]["b:b"], json!(null), "{answer}");
}

#[tokio::test]
async fn a_key_of_one_column_is_the_value_as_it_is() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let ids = ["a:b%c", "", " x ", "new\nline", "{b}*?[a-z]\\", "ключ \u{1f511}", "\"quoted\" 'too'", "a/b?c#d&e=f"];
    let list = ids.map(|id| format!("(E'{}')", id.replace('\\', "\\\\").replace('\'', "\\'"))).join(", ");
    let daemon = following(
        &postgres,
        &redis,
        &format!(
            "CREATE TABLE t (id text PRIMARY KEY, n int DEFAULT 0); INSERT INTO t VALUES {list};
             GRANT SELECT ON t TO prefetchd; ALTER PUBLICATION prefetchd ADD TABLE t"
        ),
        "[[tables]]\nname = 't'\ntable = 'public.t'\nkey = 'a *[t]?\\:{id}'",
    )
    .await;
    let key = |id: &str| format!("a *[t]?\\:{id}");
    for n in ["0", "1"] {
        assert_eq!(redis.keys("*").await.len(), ids.len() + 2, "rows, and both parts of the checkpoint");
        for id in ids {
            assert_eq!(redis.hash(&key(id)).await, row([("id", id), ("n", n)]), "{id:?}");
        }
        apply(&postgres, &daemon, "UPDATE t SET n = 1").await;
    }
    for id in ids {
        let path: String = id.bytes().map(|byte| format!("%{byte:02X}")).collect();
        let answer = daemon.get(&format!("/v1/tables/t/{path}")).await;
        assert_eq!((answer.status, &answer.json()["id"]), (200, &json!(id)), "{id:?}");
    }
    apply(&postgres, &daemon, "DELETE FROM t").await;
    assert_eq!(redis.keys("*").await.len(), 2, "both parts of the checkpoint");
}

#[tokio::test]
async fn a_hash_has_the_chosen_columns_under_their_new_names() {
    for null in ["empty", "omit"] {
        let (postgres, redis) = (Postgres::shared(), Redis::start());
        let table = "[[tables]]\nname = 'categories'\ntable = 'public.categories'\nkey = 'c:{id}'\n\
             columns = ['parent_id', 'id', 'name', 'featured']\nrename = { name = 'Title', parent_id = 'name' }";
        let settings = Settings::new(&postgres, &redis).text("cache.null", null).tables(table);
        let daemon = Daemon::with(&settings).await;
        daemon.ready().await;
        let expected = |id: &str, title: &str, parent: Option<&str>, featured: Option<&str>| {
            let mut row = row([("id", id), ("Title", title)]);
            for (field, value) in [("name", parent), ("featured", featured)] {
                match (value, null) {
                    (Some(value), _) => row.insert(field.to_owned(), value.to_owned()),
                    (None, "empty") => row.insert(field.to_owned(), String::new()),
                    (None, _) => None,
                };
            }
            row
        };
        assert_eq!(redis.hash("c:cat-001").await, expected("cat-001", "Beverages", None, Some("true")));
        assert_eq!(redis.hash("c:cat-005").await, expected("cat-005", "Coffee, tea", Some("cat-001"), Some("true")));
        apply(
            &postgres,
            &daemon,
            "UPDATE categories SET parent_id = NULL, featured = NULL, name = '' WHERE id = 'cat-005';
             UPDATE categories SET parent_id = 'cat-002' WHERE id = 'cat-001';
             INSERT INTO categories VALUES ('cat-006', 'N')",
        )
        .await;
        assert_eq!(redis.hash("c:cat-005").await, expected("cat-005", "", None, None), "{null}");
        assert_eq!(redis.hash("c:cat-001").await, expected("cat-001", "Beverages", Some("cat-002"), Some("true")));
        assert_eq!(redis.hash("c:cat-006").await, expected("cat-006", "N", None, None), "{null}");
    }
}

#[tokio::test]
async fn booleans_are_words_only_where_they_are_a_column_of_their_own() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let daemon = following(
        &postgres,
        &redis,
        "CREATE DOMAIN agreed AS boolean NOT NULL; CREATE DOMAIN signed AS agreed; CREATE TYPE pair AS (a boolean, b int);
         CREATE DOMAIN flags AS boolean[];
         CREATE TABLE t (id int PRIMARY KEY, b boolean, d agreed, e signed, a boolean[], f flags, p pair, t text, c char);
         INSERT INTO t VALUES (1, false, true, false, '{t,f,NULL}', '{f}', '(t,1)', 't', 'f');
         GRANT SELECT ON t TO prefetchd; ALTER PUBLICATION prefetchd ADD TABLE t",
        "[[tables]]\nname = 't'\ntable = 'public.t'\nkey = 't:{id}'",
    )
    .await;
    apply(&postgres, &daemon, "INSERT INTO t VALUES (2, true, false, true, '{{t},{f}}', '{t,t}', '(f,)', 'true', 't')")
        .await;
    let loaded = [
        ("id", "1"),
        ("b", "false"),
        ("d", "true"),
        ("e", "false"),
        ("a", "{t,f,NULL}"),
        ("f", "{f}"),
        ("p", "(t,1)"),
        ("t", "t"),
        ("c", "f"),
    ];
    let streamed = [
        ("id", "2"),
        ("b", "true"),
        ("d", "false"),
        ("e", "true"),
        ("a", "{{t},{f}}"),
        ("f", "{t,t}"),
        ("p", "(f,)"),
        ("t", "true"),
        ("c", "t"),
    ];
    assert_eq!(redis.hash("t:1").await, row(loaded));
    assert_eq!(redis.hash("t:2").await, row(streamed));
    assert_eq!(daemon.get("/v1/tables/t/1").await.json()["b"], "false");
}

#[tokio::test]
async fn values_arrive_byte_for_byte() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let large = "0123456789abcde\t".repeat(1 << 16);
    let control: String = (1..=0x1f_u8).map(char::from).chain(['\u{7f}', '\u{80}', '\u{85}']).collect();
    let values = [
        Some(""),
        None,
        Some("\\N"),
        Some("\\\\N"),
        Some("a\tb\nc\rd\\e"),
        Some("\\t\\n\\"),
        Some("\\."),
        Some("NULL"),
        Some("\"'\"'$1 %s {} \\x00"),
        Some("ünïcödé \u{1f600}\u{0301} \u{202e}עברית"),
        Some("\r\n$3\r\nDEL\r\n"),
        Some(&control),
        Some(&large),
    ];
    postgres
        .execute(
            "CREATE TABLE t (id int PRIMARY KEY, v text, w varchar, last text DEFAULT 'end');
             GRANT SELECT ON t TO prefetchd; ALTER PUBLICATION prefetchd ADD TABLE t",
        )
        .await;
    let client = postgres.client().await;
    let insert = async |from: i32| {
        for (id, value) in (from..).zip(&values) {
            client.execute("INSERT INTO t VALUES ($1, $2::text, $2::text)", &[&id, value]).await.unwrap();
        }
    };
    insert(0).await;
    let tables = "[[tables]]\nname = 't'\ntable = 'public.t'\nkey = 't:{id}'";
    let daemon = Daemon::with(&Settings::new(&postgres, &redis).text("cache.null", "omit").tables(tables)).await;
    daemon.ready().await;
    insert(100).await;
    daemon.applied(postgres.position().await).await;
    for (id, value) in values.iter().enumerate() {
        for id in [id, id + 100] {
            let mut expected = row([("id", id.to_string().as_str()), ("last", "end")]);
            for field in ["v", "w"] {
                expected.extend(value.map(|value| (field.to_owned(), value.to_owned())));
            }
            assert!(redis.hash(&format!("t:{id}")).await == expected, "row {id}: {value:.60?}");
            let served = daemon.get(&format!("/v1/tables/t/{id}")).await.json();
            assert!(served == json!(expected), "row {id}: {value:.60?}");
        }
    }
}

/// Every setting that could change a byte, for the daemon's role and for its database.
const HOSTILE: &str = "
    ALTER DATABASE {db} SET DateStyle = 'SQL, DMY';
    ALTER ROLE prefetchd IN DATABASE {db} SET DateStyle = 'German';
    ALTER DATABASE {db} SET TimeZone = 'Asia/Kathmandu';
    ALTER ROLE prefetchd IN DATABASE {db} SET TimeZone = 'America/St_Johns';
    ALTER ROLE prefetchd IN DATABASE {db} SET IntervalStyle = 'sql_standard';
    ALTER ROLE prefetchd IN DATABASE {db} SET bytea_output = 'escape';
    ALTER ROLE prefetchd IN DATABASE {db} SET extra_float_digits = -3;
    ALTER ROLE prefetchd IN DATABASE {db} SET xmloption = 'document';
    ALTER ROLE prefetchd IN DATABASE {db} SET client_encoding = 'LATIN1';
    ALTER ROLE prefetchd IN DATABASE {db} SET standard_conforming_strings = off;
    ALTER ROLE prefetchd IN DATABASE {db} SET quote_all_identifiers = on;
    ALTER ROLE prefetchd IN DATABASE {db} SET search_path = evil, public, pg_catalog;
    ALTER ROLE prefetchd IN DATABASE {db} SET default_transaction_read_only = on;
    ALTER ROLE prefetchd IN DATABASE {db} SET default_transaction_isolation = 'serializable';
    ALTER ROLE prefetchd IN DATABASE {db} SET default_transaction_deferrable = on;
    ALTER ROLE prefetchd IN DATABASE {db} SET statement_timeout = '1ms';
    ALTER ROLE prefetchd IN DATABASE {db} SET lock_timeout = '1ms';
    ALTER ROLE prefetchd IN DATABASE {db} SET idle_session_timeout = '300ms';
    ALTER ROLE prefetchd IN DATABASE {db} SET idle_in_transaction_session_timeout = '1ms';
    CREATE SCHEMA evil; GRANT USAGE ON SCHEMA evil TO prefetchd;
    CREATE TABLE evil.pg_class (oid oid); CREATE TABLE evil.pg_publication (oid oid);
    CREATE TABLE evil.pg_attribute (oid oid); CREATE TABLE evil.zoo (id int PRIMARY KEY);
    CREATE FUNCTION evil.pg_current_snapshot() RETURNS text LANGUAGE sql AS 'SELECT ''1:1:''';
    CREATE FUNCTION evil.pg_current_wal_flush_lsn() RETURNS pg_lsn LANGUAGE sql AS 'SELECT ''0/1''::pg_lsn'";

#[tokio::test]
async fn settings_of_role_and_database_change_no_byte() {
    const ZOO: &str = "
        CREATE TYPE mood AS ENUM ('sad', 'so so', 'it''s fine');
        CREATE TABLE zoo (
            id int PRIMARY KEY, at timestamptz, local timestamp, day date, span interval, raw bytea, f4 float4, f8 float8,
            num numeric, js json, jsb jsonb, u uuid, ip inet, list text[], times timestamptz[], m mood, r tstzrange, bits varbit,
            p point, rel regclass, money numeric(10,2), fixed char(5), vec tsvector, oidv oidvector, bigger int8);
        GRANT SELECT ON zoo TO prefetchd; ALTER PUBLICATION prefetchd ADD TABLE zoo";
    const VALUES: &str = r#"
        '2024-01-02 03:04:05.678+00'::timestamptz, '2024-01-02 03:04:05'::timestamp, '2024-12-31'::date,
        '1 year 2 months -3 days 04:05:06.7'::interval, '\x00ff5c'::bytea, 0.1::float4, 0.1::float8 + 0.2::float8,
        12345678901234567890.10::numeric, '{"a":  1}'::json, '{"b":1,"a":[true]}'::jsonb,
        'A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11'::uuid, '10.0.0.1/8'::inet, ARRAY['a', 'b "q"', NULL, 'NULL', 'ü'],
        ARRAY['2024-07-01 00:00+02'::timestamptz], 'it''s fine'::mood, '[2024-01-01 00:00+00,)'::tstzrange, B'0101',
        '(1.5,-0.1)'::point, 'public.zoo'::regclass, 1.5, 'ab', 'fat cats'::tsvector, '1 2'::oidvector, -9223372036854775808"#;
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    postgres.execute(&format!("{ZOO}; INSERT INTO zoo SELECT 1, {VALUES}")).await;
    let client = postgres.client().await;
    for sql in HOSTILE.replace("{db}", postgres.database()).split_inclusive(';') {
        client.batch_execute(sql).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
    }
    let tables = "[[tables]]\nname = 'zoo'\ntable = 'public.zoo'\nkey = 'zoo:{id}'";
    let daemon = Daemon::with(&Settings::new(&postgres, &redis).tables(tables)).await;
    daemon.ready().await;
    apply(&postgres, &daemon, &format!("INSERT INTO public.zoo SELECT 2, {VALUES}")).await;

    let expected = [
        ("at", "2024-01-02 03:04:05.678+00"),
        ("local", "2024-01-02 03:04:05"),
        ("day", "2024-12-31"),
        ("span", "1 year 2 mons -3 days +04:05:06.7"),
        ("raw", "\\x00ff5c"),
        ("f4", "0.1"),
        ("f8", "0.30000000000000004"),
        ("num", "12345678901234567890.10"),
        ("js", "{\"a\":  1}"),
        ("jsb", "{\"a\": [true], \"b\": 1}"),
        ("u", "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"),
        ("ip", "10.0.0.1/8"),
        ("list", "{a,\"b \\\"q\\\"\",NULL,\"NULL\",ü}"),
        ("times", "{\"2024-06-30 22:00:00+00\"}"),
        ("m", "it's fine"),
        ("r", "[\"2024-01-01 00:00:00+00\",)"),
        ("bits", "0101"),
        ("p", "(1.5,-0.1)"),
        ("rel", "public.zoo"),
        ("money", "1.50"),
        ("fixed", "ab   "),
        ("vec", "'cats' 'fat'"),
        ("oidv", "1 2"),
        ("bigger", "-9223372036854775808"),
    ];
    for id in ["1", "2"] {
        let mut expected = row(expected);
        expected.insert("id".to_owned(), id.to_owned());
        assert_eq!(redis.hash(&format!("zoo:{id}")).await, expected);
    }
    // Longer than all of these timeouts: the once-a-second query is repeated throughout.
    let lsn = postgres.execute("CREATE TABLE public.elsewhere (); DROP TABLE public.elsewhere").await;
    daemon.applied(lsn).await;
    let samples = |status: &serde_json::Value| status["uptime_seconds"].as_f64().unwrap();
    daemon.status_when("three samples", |status| samples(status) > 3.0).await;
    daemon.ready().await;
    assert_eq!(daemon.metrics().await[r#"prefetchd_reconnects_total{peer="postgres"}"#], 0.0);
}

#[tokio::test]
async fn names_of_any_kind_are_found() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let daemon = following(
        &postgres,
        &redis,
        r#"CREATE SCHEMA "My Schema";
           CREATE TABLE "My Schema"."Odd.""Table" ("Id" int PRIMARY KEY, "a b" text, "select" text, "ü{}" text, dropped int);
           ALTER TABLE "My Schema"."Odd.""Table" DROP COLUMN dropped;
           ALTER TABLE "My Schema"."Odd.""Table" ADD COLUMN late text DEFAULT 'l''ate';
           INSERT INTO "My Schema"."Odd.""Table" VALUES (1, 'x', 'y', 'z');
           GRANT USAGE ON SCHEMA "My Schema" TO prefetchd; GRANT SELECT ON "My Schema"."Odd.""Table" TO prefetchd;
           ALTER PUBLICATION prefetchd ADD TABLE "My Schema"."Odd.""Table""#,
        r#"[[tables]]
           name = 'odd'
           table = '"My Schema"."Odd.""Table"'
           key = 'odd:{Id}'"#,
    )
    .await;
    apply(&postgres, &daemon, r#"INSERT INTO "My Schema"."Odd.""Table" VALUES (2, 'x', 'y', 'z')"#).await;
    for id in ["1", "2"] {
        let expected = row([("Id", id), ("a b", "x"), ("select", "y"), ("ü{}", "z"), ("late", "l'ate")]);
        assert_eq!(redis.hash(&format!("odd:{id}")).await, expected);
    }
}

#[tokio::test]
async fn generated_columns_are_left_out_by_both_ways() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let daemon = following(
        &postgres,
        &redis,
        "CREATE TABLE t (g int GENERATED ALWAYS AS (id * 2) STORED, id int PRIMARY KEY, v text, h text GENERATED ALWAYS AS (v || '!') STORED,
                         i int GENERATED ALWAYS AS IDENTITY);
         INSERT INTO t (id, v) VALUES (1, 'a');
         GRANT SELECT ON t TO prefetchd; ALTER PUBLICATION prefetchd ADD TABLE t",
        "[[tables]]\nname = 't'\ntable = 'public.t'\nkey = 't:{id}'",
    )
    .await;
    apply(&postgres, &daemon, "INSERT INTO t (id, v) VALUES (2, 'b')").await;
    assert_eq!(redis.hash("t:1").await, row([("id", "1"), ("v", "a"), ("i", "1")]));
    assert_eq!(redis.hash("t:2").await, row([("id", "2"), ("v", "b"), ("i", "2")]));
    apply(&postgres, &daemon, "UPDATE t SET v = 'c' WHERE id = 1").await;
    assert_eq!(redis.hash("t:1").await, row([("id", "1"), ("v", "c"), ("i", "1")]));
}

#[tokio::test]
async fn partitions_are_rows_of_their_root() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let daemon = following(
        &postgres,
        &redis,
        "CREATE TABLE t (id int, region text, v text, PRIMARY KEY (id, region)) PARTITION BY LIST (region);
         CREATE TABLE t_eu PARTITION OF t FOR VALUES IN ('eu');
         CREATE TABLE t_us (v text, region text NOT NULL, id int NOT NULL, PRIMARY KEY (id, region));
         ALTER TABLE t ATTACH PARTITION t_us FOR VALUES IN ('us');
         INSERT INTO t VALUES (1, 'eu', 'a'), (2, 'us', 'b');
         GRANT SELECT ON t, t_eu, t_us TO prefetchd; ALTER PUBLICATION prefetchd ADD TABLE t",
        "[[tables]]\nname = 't'\ntable = 'public.t'\nkey = 't:{id}:{region}'",
    )
    .await;
    assert_eq!(redis.hash("t:2:us").await, row([("id", "2"), ("region", "us"), ("v", "b")]));
    apply(&postgres, &daemon, "UPDATE t SET region = 'us' WHERE id = 1; INSERT INTO t VALUES (3, 'us', 'c')").await;
    assert_eq!(redis.keys("t:*").await, ["t:1:us", "t:2:us", "t:3:us"]);
    assert_eq!(redis.hash("t:1:us").await, row([("id", "1"), ("region", "us"), ("v", "a")]));
    assert_eq!(redis.hash("t:3:us").await, row([("id", "3"), ("region", "us"), ("v", "c")]));
    apply(&postgres, &daemon, "TRUNCATE t").await;
    assert_eq!(redis.keys("t:*").await, [""; 0]);
}

/// Inheriting tables are tables of their own: the stream sends their rows under their own names, and a load leaves them
/// out.
#[tokio::test]
async fn rows_of_inheriting_tables_are_not_rows_of_the_table() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    postgres
        .execute(
            "CREATE TABLE t (id int PRIMARY KEY, v text); CREATE TABLE child (PRIMARY KEY (id)) INHERITS (t);
             INSERT INTO t VALUES (1, 'own'); INSERT INTO child VALUES (2, 'of the child');
             GRANT SELECT ON t, child TO prefetchd; ALTER PUBLICATION prefetchd ADD TABLE t",
        )
        .await;
    let settings =
        Settings::new(&postgres, &redis).tables("[[tables]]\nname = 't'\ntable = 'public.t'\nkey = 't:{id}'");
    let checked = run_program(&settings, &["check"]).await;
    let warning = checked.stdout.lines().find(|line| line.starts_with("warn  table t: 1 table inherits from public.t"));
    assert!(warning.is_some_and(|line| line.contains("(public.child)")), "{checked:?}");
    let daemon = Daemon::with(&settings).await;
    daemon.allow_warning("1 table inherits from public.t (public.child)");
    daemon.ready().await;
    assert_eq!(daemon.said("inherits from public.t"), 1, "{}", daemon.log_text());
    assert_eq!(redis.keys("t:*").await, ["t:1"]);
    apply(
        &postgres,
        &daemon,
        "INSERT INTO child VALUES (3, 'x'); UPDATE t SET v = 'changed'; INSERT INTO t VALUES (4, '')",
    )
    .await;
    assert_eq!(redis.keys("t:*").await, ["t:1", "t:4"]);
    apply(&postgres, &daemon, "TRUNCATE t").await;
    assert_eq!(redis.keys("t:*").await, [""; 0]);
}

#[tokio::test]
async fn a_table_that_comes_to_inherit_is_warned_of_once() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let daemon = Daemon::start(&postgres, &redis).await;
    daemon.ready().await;
    daemon.allow_warning("2 tables inherit from public.categories (public.");
    let make = "CREATE TABLE \"Late\" () INHERITS (categories); CREATE TABLE later () INHERITS (categories)";
    postgres.execute(make).await;
    let line = daemon.logged("inherit from public.categories").await;
    assert_eq!(line["level"], "WARN", "{line}");
    postgres.execute("CREATE TABLE latest () INHERITS (categories)").await;
    let lsn = postgres.execute("UPDATE categories SET name = 'x' WHERE id = 'cat-001'").await;
    daemon.applied(lsn).await;
    daemon.ready().await;
}
