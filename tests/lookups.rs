//! Lookups: sets and sorted sets whose members are rows, equal to what the hashes or documents in Redis give after everything
//! that can happen to a row.

use crate::harness::{Daemon, Postgres, Redis, Settings, eventually, run_program};
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet};

const TABLE: &str = r#"
[[tables]]
name = "items"
table = "public.items"
key = "item:{shop}:{id}"

[[tables.lookups]]
name = "by_parent"
key = "items-by-parent:{parent}"
order = "place"

[[tables.lookups]]
name = "all"
key = "items-all"
order = "since"

[[tables.lookups]]
name = "by_tag"
key = "items-by-tag:{shop}:{tags[]}"
"#;

async fn create(postgres: &Postgres) {
    let sql = "CREATE TABLE items (shop text, id int, parent text, place numeric, since timestamptz, tags text[], big text,
                                   PRIMARY KEY (shop, id));
               ALTER TABLE items ALTER big SET STORAGE EXTERNAL;
               GRANT SELECT ON items TO prefetchd;
               ALTER PUBLICATION prefetchd ADD TABLE items;
               INSERT INTO items SELECT 'eu', n, 'p' || n % 3, n, '2026-01-01'::timestamptz + n * interval '1 s',
                                        ARRAY['t' || n % 2, 'all'], repeat(md5(n::text), 200) FROM generate_series(1, 30) n";
    postgres.execute(sql).await;
}

fn settings(postgres: &Postgres, redis: &Redis) -> Settings {
    Settings::new(postgres, redis).tables(TABLE)
}

fn settings_in(format: &str, postgres: &Postgres, redis: &Redis) -> Settings {
    let key = "key = \"item:{shop}:{id}\"";
    Settings::new(postgres, redis).tables(&TABLE.replace(key, &format!("{key}\nformat = \"{format}\"")))
}

type Lists = BTreeMap<String, BTreeMap<String, Option<String>>>;

/// Returns the lists in Redis, with the scores of sorted sets.
async fn found(redis: &Redis) -> Lists {
    let mut lists = Lists::new();
    for key in redis.keys("items-*").await {
        let members: BTreeMap<String, Option<String>> = match &*redis.command::<String>(&["TYPE", &key]).await {
            "zset" => {
                let scored: Vec<(String, String)> = redis.command(&["ZRANGE", &key, "0", "-1", "WITHSCORES"]).await;
                scored.into_iter().map(|(member, score)| (member, Some(number(&score)))).collect()
            }
            "set" => {
                redis.command::<BTreeSet<String>>(&["SMEMBERS", &key]).await.into_iter().map(|m| (m, None)).collect()
            }
            other => panic!("{key} is a {other}"),
        };
        let pttl = redis.pttl(&key).await;
        assert!(pttl > 0 && pttl <= 24 * 3_600_000, "{key}: {pttl}");
        lists.insert(key, members);
    }
    lists
}

/// Versions of Redis print the same number with more or fewer digits.
fn number(score: &str) -> String {
    score.parse::<f64>().unwrap().to_string()
}

/// Returns the lists that the rows in Postgres give: a second implementation, in SQL.
async fn given(postgres: &Postgres) -> Lists {
    let escaped = |column: &str| format!("replace(replace({column}, '%', '%25'), ':', '%3A')");
    let (shop, tag) = (escaped("shop"), escaped("tag"));
    let sql = format!(
        "WITH members AS (
            SELECT {shop} || ':' || id AS member, * FROM items),
        lists(list, member, score) AS (
            SELECT 'items-by-parent:' || coalesce(parent, ''), member,
                   CASE WHEN place IS NULL OR place = 'NaN' THEN 'inf' ELSE place::float8::text END FROM members
             UNION ALL
            SELECT 'items-all', member, coalesce(extract(epoch FROM since)::float8::text, 'inf') FROM members
             UNION ALL
            SELECT DISTINCT 'items-by-tag:' || {shop} || ':' || {tag}, member, NULL
              FROM members CROSS JOIN LATERAL unnest(tags) tag WHERE tag IS NOT NULL AND array_ndims(tags) = 1)
        SELECT coalesce(json_object_agg(list, members), '{{}}')
          FROM (SELECT list, json_object_agg(member, score) AS members FROM lists GROUP BY list) l"
    );
    let mut lists: Lists = serde_json::from_str(&postgres.value(&sql).await.unwrap()).unwrap();
    lists.values_mut().flat_map(BTreeMap::values_mut).flatten().for_each(|score| *score = number(score));
    lists
}

async fn agree(postgres: &Postgres, redis: &Redis, what: &str) {
    assert_eq!(found(redis).await, given(postgres).await, "{what}");
}

#[tokio::test]
async fn members_follow_their_rows_through_every_change() {
    members_follow_rows("hash").await;
}

#[tokio::test]
async fn members_follow_documents_through_every_change() {
    members_follow_rows("json").await;
}

async fn members_follow_rows(format: &str) {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    create(&postgres).await;
    let daemon = Daemon::with(&settings_in(format, &postgres, &redis)).await;
    daemon.ready().await;
    agree(&postgres, &redis, "the load").await;
    let children: Vec<String> = redis.command(&["ZRANGE", "items-by-parent:p1", "0", "2"]).await;
    assert_eq!(children, ["eu:1", "eu:4", "eu:7"]);
    for sql in [
        "INSERT INTO items VALUES ('u:s', 1, 'p:1', 7.5, NULL, '{a:b,c%d}', 'x'), ('eu', 99, NULL, NULL, NULL, NULL, 'x')",
        // The large value is not sent.
        "UPDATE items SET parent = 'p9' WHERE id < 5",
        "UPDATE items SET place = 'NaN', tags = '{{a},{b}}' WHERE id = 6",
        "UPDATE items SET since = '0044-03-15 BC' WHERE id = 7",
        // Another key, with the large value taken from the old one.
        "UPDATE items SET id = id + 1000 WHERE id BETWEEN 10 AND 12",
        "BEGIN; UPDATE items SET id = -1 WHERE id = 20; UPDATE items SET id = 20 WHERE id = 21;
         UPDATE items SET id = 21 WHERE id = -1; COMMIT",
        "BEGIN; DELETE FROM items WHERE id = 22; INSERT INTO items VALUES ('eu', 22, 'p22', 1, NULL, '{x}', 'y'); COMMIT",
        "BEGIN; UPDATE items SET parent = 'a' WHERE id = 23; UPDATE items SET parent = 'b' WHERE id = 23; COMMIT",
        "DELETE FROM items WHERE id % 2 = 0",
        "BEGIN; TRUNCATE items; INSERT INTO items VALUES ('eu', 1, 'p1', 1, NULL, '{x}', 'y'); COMMIT",
        "TRUNCATE items",
        "INSERT INTO items VALUES ('eu', 1, 'p1', 1, NULL, '{x,y}', 'y'), ('eu', 2, 'p1', 0, NULL, '{x}', 'y')",
    ] {
        daemon.applied(postgres.execute(sql).await).await;
        agree(&postgres, &redis, sql).await;
    }
    // Keys that an operator removes take their memberships with them.
    assert_eq!(daemon.operate("invalidate", &json!({"table": "items", "keys": ["eu:1"]})).await.status, 200);
    assert_eq!(redis.command::<Vec<String>>(&["ZRANGE", "items-by-parent:p1", "0", "-1"]).await, ["eu:2"]);
    assert_eq!(daemon.operate("clear", &json!({"table": "items", "confirm": "items"})).await.status, 200);
    assert_eq!(found(&redis).await, Lists::new());
    assert_eq!(daemon.operate("refetch", &json!({})).await.status, 200);
    agree(&postgres, &redis, "a refetch").await;
    assert_eq!(daemon.stop().await, Some(0));
}

#[tokio::test]
async fn verify_finds_members_that_their_rows_do_not_give_and_mends_them() {
    verify_mends_members("hash").await;
}

#[tokio::test]
async fn verify_finds_members_that_documents_do_not_give_and_mends_them() {
    verify_mends_members("json").await;
}

async fn verify_mends_members(format: &str) {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    create(&postgres).await;
    let daemon = Daemon::with(&settings_in(format, &postgres, &redis)).await;
    daemon.ready().await;
    // Missing; with another score; too many; in a list that no row gives.
    redis.command::<i32>(&["ZREM", "items-by-parent:p1", "eu:1"]).await;
    redis.command::<i32>(&["ZADD", "items-by-parent:p2", "77", "eu:2"]).await;
    redis.command::<i32>(&["SADD", "items-by-tag:eu:all", "us:5"]).await;
    redis.command::<i32>(&["SADD", "items-by-tag:eu:none", "eu:3"]).await;
    daemon.allow_warning(" of items: 30 rows");
    for (repair, repaired) in [(false, 0), (true, 4)] {
        let answer = daemon.operate("verify", &json!({"repair": repair})).await.json();
        assert_eq!(
            (&answer["lookups"], &answer["repaired"], &answer["rows"]),
            (&json!(4), &json!(repaired), &json!(30)),
            "{answer}"
        );
    }
    agree(&postgres, &redis, "a repair").await;
    let answer = daemon.operate("verify", &json!({})).await.json();
    assert_eq!((&answer["lookups"], &answer["repaired"]), (&json!(null), &json!(0)));
    assert_eq!(daemon.metrics().await["prefetchd_drift_total{kind=\"lookup\",table=\"items\"}"], 8.0);

    // A key of another type does not stop the stream.
    redis.command::<()>(&["SET", "items-by-parent:p1", "no list"]).await;
    redis.command::<i32>(&["DEL", "items-all"]).await;
    redis.command::<i32>(&["SADD", "items-all", "eu:1"]).await;
    let moved = postgres.execute("UPDATE items SET parent = 'p1', since = now() WHERE id = 2").await;
    daemon.applied(moved).await;
    assert_eq!(redis.command::<Vec<String>>(&["ZRANGE", "items-by-parent:p1", "0", "-1"]).await, ["eu:2"]);
    assert_eq!(daemon.operate("verify", &json!({"repair": true})).await.status, 200);
    agree(&postgres, &redis, "a repair of other types").await;
    assert_eq!(daemon.stop().await, Some(0));
}

#[tokio::test]
async fn lookups_that_are_configured_later_or_no_longer_are_made_and_removed_without_a_load() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    create(&postgres).await;
    let table = &TABLE[..TABLE.find("[[tables.lookups]]").unwrap()];
    let with = |tables: &str| Settings::new(&postgres, &redis).tables(tables);
    let daemon = Daemon::with(&with(table)).await;
    daemon.ready().await;
    assert_eq!(found(&redis).await, Lists::new());
    assert_eq!(daemon.stop().await, Some(0));

    let daemon = Daemon::with(&with(TABLE)).await;
    daemon.ready().await;
    agree(&postgres, &redis, "ready means that the lists are there").await;
    assert_eq!(daemon.status().await["primary_reads"], 0, "the rows in Redis are enough");
    assert_eq!(daemon.stop().await, Some(0));

    // One list changes its kind, one is gone, and beside it lies a key of somebody else.
    redis.command::<()>(&["SET", "items-allergens", "theirs"]).await;
    let place = TABLE
        .replace("order = \"since\"\n", "")
        .replace("name = \"all\"\nkey = \"items-all\"", "name = \"all\"\nkey = \"items-whole\"");
    let place = place.replace("order = \"place\"\n", "");
    let daemon = Daemon::with(&with(&place)).await;
    daemon.ready().await;
    assert_eq!(redis.command::<String>(&["TYPE", "items-by-parent:p1"]).await, "set");
    assert_eq!(redis.command::<i32>(&["SCARD", "items-whole"]).await, 30);
    let old = async || redis.command::<i32>(&["EXISTS", "items-all"]).await;
    eventually("the old list is gone", old, |exists| *exists == 0).await;
    assert_eq!(redis.command::<String>(&["GET", "items-allergens"]).await, "theirs");
    assert_eq!(daemon.stop().await, Some(0));

    let ran = run_program(&with(&place), &["teardown", "--keys"]).await;
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert!(ran.stdout.contains("key items-whole: 1 removed"), "{ran:?}");
    assert_eq!(redis.keys("item*").await, ["items-allergens"]);
}

#[tokio::test]
async fn members_are_right_whatever_the_format_was_before() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    create(&postgres).await;
    for (format, kind) in [("hash", "hash"), ("json", "string"), ("hash", "hash")] {
        let daemon = Daemon::with(&settings_in(format, &postgres, &redis)).await;
        daemon.ready().await;
        assert_eq!(redis.command::<String>(&["TYPE", "item:eu:1"]).await, kind);
        agree(&postgres, &redis, format).await;
        let moved = postgres.execute("UPDATE items SET parent = parent || 'x', place = -place WHERE id % 4 = 1").await;
        daemon.applied(moved).await;
        agree(&postgres, &redis, format).await;
        assert_eq!(daemon.stop().await, Some(0));
        postgres
            .execute("UPDATE items SET parent = parent || 'y', tags = array_append(tags, 'z') WHERE id % 4 = 2")
            .await;
    }
}

/// Values are those that a reader of the document sees.
#[tokio::test]
async fn keys_are_made_of_what_a_document_shows() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let sql = "CREATE TABLE events (id bigint PRIMARY KEY, at timestamptz, flags bool[], price numeric, open bool, doc jsonb);
               GRANT SELECT ON events TO prefetchd;
               ALTER PUBLICATION prefetchd ADD TABLE events;
               INSERT INTO events VALUES (1, '2026-01-02 03:04:05.5', '{t,f}', 1.50, true, '{\"a\": 1}')";
    postgres.execute(sql).await;
    let lookup =
        |column: &str| format!("[[tables.lookups]]\nname = \"{column}\"\nkey = \"by-{column}:{{{column}}}\"\n");
    let lookups = ["at", "flags[]", "price", "open", "doc"]
        .map(|column| lookup(column).replace("[]\"", "\"").replace("-flags[]", "-flags"));
    let tables = format!(
        "[[tables]]\nname = \"events\"\ntable = \"public.events\"\nkey = \"event:{{id}}\"\nformat = \"json\"\n\n{}",
        lookups.join("\n")
    );
    let daemon = Daemon::with(&Settings::new(&postgres, &redis).tables(&tables)).await;
    daemon.ready().await;
    let lists = async || redis.keys("by-*").await;
    let first = [
        "by-at:2026-01-02T03:04:05.5+00:00",
        "by-doc:{\"a\": 1}",
        "by-flags:false",
        "by-flags:true",
        "by-open:true",
        "by-price:1.50",
    ];
    assert_eq!(lists().await, first);
    let listed = daemon.get("/v1/lookups/events/at/2026-01-02T03%3A04%3A05.5%2B00%3A00").await.json();
    assert_eq!((&listed["total"], &listed["rows"][0]["price"]), (&json!(1), &json!(1.5)));
    daemon
        .applied(
            postgres
                .execute("UPDATE events SET at = '-infinity', flags = NULL, price = 'NaN', open = NULL, doc = '[]'")
                .await,
        )
        .await;
    assert_eq!(lists().await, ["by-at:-infinity", "by-doc:[]", "by-open:", "by-price:NaN"]);
    assert_eq!(daemon.stop().await, Some(0));
}

#[tokio::test]
async fn lists_live_as_long_as_their_rows() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    create(&postgres).await;
    let daemon = Daemon::with(&settings(&postgres, &redis).text("cache.ttl", "6s")).await;
    daemon.ready().await;
    let began = std::time::Instant::now();
    // Longer than a TTL: without a renewal they would be gone.
    eventually("two rounds of renewals", async || began.elapsed().as_secs(), |seconds| *seconds >= 9).await;
    assert_eq!(found(&redis).await, given(&postgres).await);
    assert_eq!(daemon.stop().await, Some(0));
}

#[tokio::test]
async fn a_row_that_redis_cannot_hold_is_a_member_of_nothing() {
    let (postgres, redis) = (Postgres::shared(), Redis::with(&["--proto-max-bulk-len", "1mb"]));
    create(&postgres).await;
    let daemon = Daemon::with(&settings(&postgres, &redis)).await;
    daemon.allow_warning("cannot be in redis");
    daemon.ready().await;
    let grown = postgres.execute("UPDATE items SET big = repeat('x', 2000000) WHERE id = 1").await;
    daemon.applied(grown).await;
    let is_member = async |list: &str| redis.command::<Option<String>>(&["ZSCORE", list, "eu:1"]).await.is_some();
    assert!(!is_member("items-by-parent:p1").await && !is_member("items-all").await);
    daemon.applied(postgres.execute("UPDATE items SET big = 'x' WHERE id = 1").await).await;
    agree(&postgres, &redis, "it fits again").await;
    assert_eq!(daemon.stop().await, Some(0));
}

#[tokio::test]
async fn what_cannot_be_a_lookup_is_refused_with_a_remedy() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    create(&postgres).await;
    postgres.execute("ALTER TABLE items ADD corners box[]").await;
    let with = |old: &str, new: &str| Settings::new(&postgres, &redis).tables(&TABLE.replace(old, new));
    let table = TABLE.replace(
        "table = \"public.items\"",
        "table = \"public.items\"\ncolumns = [\"shop\", \"id\", \"parent\", \"tags\"]",
    );
    for (settings, parts) in [
        (
            with("order = \"place\"", "order = \"big\""),
            &["order", "has no score", "a number, boolean, date or timestamp"][..],
        ),
        (with("order = \"place\"", "order = \"tags\""), &["has no score"]),
        (with("{tags[]}", "{parent[]}"), &["(text)", "is no array", "without"]),
        (with("{tags[]}", "{corners[]}"), &["not separated by commas"]),
        (with("{parent}", "{perent}"), &["no column \"perent\"", "lookups.key"]),
        (with("\"place\"", "\"plaec\""), &["no column \"plaec\"", "lookups.order"]),
        (with("items-by-parent:{", "items-by-parent{"), &["does not end in \":\""]),
        (with("\"items-all\"", "\"item:\""), &["begin the same way", "choose literals of which none begins another"]),
        (with("\"items-all\"", "\"items-by\""), &["begin the same way"]),
        (with("\"items-all\"", "\"prefetchd:all\""), &["belongs to prefetchd itself"]),
        (with("\"items-all\"", "\"\""), &["is empty"]),
        (with("{shop}:{tags[]}", "{tags[]}:{tags[]}"), &["names column"]),
        (with("name = \"all\"", "name = \"by_tag\""), &["two lookups of this table have the name \"by_tag\""]),
        (with("order = \"since\"", "sorted = \"since\""), &["no such setting", "did you mean order?"]),
        (Settings::new(&postgres, &redis).tables(&table), &["\"place\"", "not among the columns"]),
    ] {
        for command in ["run", "check"] {
            let ran = run_program(&settings, &[command]).await;
            assert_eq!(ran.code, Some(78), "{parts:?}: {ran:?}");
            // In a log as JSON, quotes are escaped.
            let said = ran.said().replace('\\', "");
            parts.iter().for_each(|part| assert!(said.contains(part), "{part:?} is missing in {said}"));
        }
    }
}

/// As its key's columns: the table is blocked until they fit, and the others go on.
#[tokio::test]
async fn a_column_of_a_lookup_that_is_gone_blocks_the_table() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    create(&postgres).await;
    let daemon = Daemon::with(&settings(&postgres, &redis)).await;
    daemon.ready().await;
    daemon.allow_warnings();
    postgres.execute("ALTER TABLE items RENAME place TO position").await;
    let status = daemon.status_when("blocked", |status| status["tables"][0]["state"] == "blocked").await;
    assert!(status["tables"][0]["because"].as_str().unwrap().contains("no column \"place\""), "{status}");
    postgres.execute("ALTER TABLE items RENAME position TO place").await;
    daemon.ready().await;
    agree(&postgres, &redis, "it fits again").await;
    assert_eq!(daemon.stop().await, Some(0));
}
