//! A role that may read only some columns of a table, so that the others can never leak.

use crate::harness::{Daemon, Postgres, Redis, Settings, eventually, psql, run_program, skipped};
use serde_json::json;
use std::collections::BTreeMap;

/// A role that no other test uses, and a table that contains private data.
async fn set_up(postgres: &Postgres) -> String {
    let role = format!("columns_{}", postgres.database());
    let made = format!(
        "CREATE ROLE {role} LOGIN REPLICATION;
         CREATE TABLE people (id int PRIMARY KEY, a text, big text, secret text);
         ALTER TABLE people ALTER big SET STORAGE EXTERNAL;
         INSERT INTO people SELECT n, 'a' || n, repeat(md5(n::text), 20), 'secret' FROM generate_series(1, 5000) n;
         UPDATE people SET big = repeat(md5(id::text), 200) WHERE id % 100 = 0;
         GRANT SELECT (id, a, big) ON people TO {role};
         CREATE PUBLICATION listed FOR TABLE people (id, a, big) WITH (publish_via_partition_root = true)"
    );
    postgres.execute(&made).await;
    role
}

fn settings(postgres: &Postgres, redis: &Redis, role: &str, columns: &str) -> Settings {
    let table =
        format!("[[tables]]\nname = \"people\"\ntable = \"public.people\"\nkey = \"person:{{id}}\"\n{columns}\n");
    Settings::new(postgres, redis)
        .text("postgres.url", &postgres.url(role))
        .text("postgres.publication", "listed")
        .tables(&table)
}

const COLUMNS: &str = "columns = [\"id\", \"a\", \"big\"]";

async fn rows(postgres: &Postgres) -> BTreeMap<String, BTreeMap<String, String>> {
    let json = postgres.value("SELECT json_object_agg('person:' || id, json_build_object('id', id::text, 'a', a, 'big', big)) FROM people").await;
    serde_json::from_str(&json.unwrap()).unwrap()
}

async fn assert_equal(postgres: &Postgres, redis: &Redis) {
    let rows = rows(postgres).await;
    let keys: Vec<String> = rows.keys().cloned().collect();
    assert_eq!(redis.keys("person:*").await, keys);
    let mut pipe = redis::pipe();
    for key in &keys {
        pipe.hgetall(key);
    }
    let hashes: Vec<BTreeMap<String, String>> = pipe.query_async(&mut redis.connection().await).await.unwrap();
    assert!(hashes.iter().eq(rows.values()), "every row as it is, without the secret");
}

#[tokio::test]
async fn a_role_with_some_columns_is_enough_for_everything() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    if postgres.version_num().await < 150_000 {
        return skipped("Postgres 14 has no column lists");
    }
    let role = set_up(&postgres).await;
    for columns in [COLUMNS, ""] {
        let settings = settings(&postgres, &redis, &role, columns);
        let checked = run_program(&settings, &["check", "--all"]).await;
        assert_eq!(checked.code, Some(0), "{checked:?}");
        assert!(checked.stdout.contains("5000 rows of about"), "{checked:?}");

        let daemon = Daemon::with(&settings).await;
        daemon.allow_warning("verify with repair of people");
        daemon.ready().await;
        assert_equal(&postgres, &redis).await;

        postgres
            .execute(
                "INSERT INTO people VALUES (0, 'new', '', 'secret'); DELETE FROM people WHERE id = 17;
                 UPDATE people SET a = 'it''s', secret = 'other' WHERE id = 18; UPDATE people SET id = -19 WHERE id = 19",
            )
            .await;
        daemon.applied(postgres.position().await).await;
        // Its large value is not sent again, and must be read.
        let gone: i32 = redis.command(&["DEL", "person:100"]).await;
        assert_eq!(gone, 1);
        postgres.execute("UPDATE people SET a = 'b' WHERE id = 100").await;
        eventually("the row is read again", async || redis.hash("person:100").await, |row| row.len() == 3).await;
        daemon.ready().await;
        assert_equal(&postgres, &redis).await;

        redis.command::<()>(&["HSET", "person:999999", "id", "999999"]).await;
        redis.command::<()>(&["HSET", "person:20", "a", "drift"]).await;
        let verify = daemon.operate("verify", &json!({"table": "people", "repair": true})).await;
        let found = verify.json();
        assert_eq!(
            (&found["stale"], &found["orphaned"], &found["missing"]),
            (&json!(1), &json!(1), &json!(0)),
            "{found}"
        );
        assert_eq!(found["repaired"], 2, "{found}");
        let refetch = daemon.operate("refetch", &json!({"table": "people"})).await;
        assert_eq!(refetch.json()["loaded"], 5000, "{refetch:?}");
        assert_equal(&postgres, &redis).await;

        // The catalog watcher notices a rewrite, which is not sent.
        postgres.execute("ALTER TABLE people ALTER secret TYPE text USING upper(secret)").await;
        let reloaded = async || daemon.metrics().await.get(r#"prefetchd_heals_total{reason="schema"}"#).copied();
        eventually("a rewrite", reloaded, |heals| heals.is_some_and(|heals| heals >= 1.0)).await;
        daemon.ready().await;
        assert_equal(&postgres, &redis).await;
        assert_eq!(daemon.stop().await, Some(0));

        let restore = "DELETE FROM people WHERE id < 1; INSERT INTO people VALUES (17, 'a', '', ''), (19, 'a', '', '')";
        postgres.execute(restore).await;
        postgres.drop_slot().await;
        redis.flush().await;
    }
}

#[tokio::test]
async fn the_remedy_grants_what_is_lacking_and_no_more() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    if postgres.version_num().await < 150_000 {
        return skipped("Postgres 14 has no column lists");
    }
    let role = set_up(&postgres).await;
    let settings = |columns| settings(&postgres, &redis, &role, columns);
    let remedy = async |columns: &'static str| {
        let checked = run_program(&settings(columns), &["check"]).await;
        assert_eq!(checked.code, Some(78), "{checked:?}");
        let line = checked.stdout.lines().find(|line| line.starts_with("fail")).unwrap().to_owned();
        line[line.find("GRANT").unwrap()..=line.rfind(';').unwrap()].to_owned()
    };
    postgres.execute(&format!("REVOKE SELECT (big) ON people FROM {role}")).await;
    let grant = remedy(COLUMNS).await;
    assert_eq!(grant, format!("GRANT SELECT (id, a, big) ON public.people TO {role};"));
    // With fewer columns, no privilege is missing, whatever the publication sends.
    let fewer = run_program(&settings("columns = [\"id\", \"a\"]"), &["check"]).await;
    assert_eq!(fewer.code, Some(0), "{fewer:?}");
    psql(&postgres.url("postgres"), &grant);
    assert_eq!(run_program(&settings(COLUMNS), &["check"]).await.code, Some(0));

    // A row filter reads columns, too.
    let filtered = "CREATE PUBLICATION filtered FOR TABLE people (id, a, big) WHERE (secret <> 'x')";
    postgres.execute(&format!("ALTER TABLE people REPLICA IDENTITY FULL; DROP PUBLICATION listed; {filtered}")).await;
    postgres.execute("ALTER PUBLICATION filtered RENAME TO listed").await;
    let grant = remedy(COLUMNS).await;
    assert!(grant.contains("(id, a, big, secret)"), "it reads what is not listed: {grant}");
    psql(&postgres.url("postgres"), &grant);
    assert_eq!(run_program(&settings(COLUMNS), &["check"]).await.code, Some(0));
}
