//! Lists over HTTP: the rows of a lookup, in their order and of one moment, page by page.

use crate::harness::proxy::Proxy;
use crate::harness::{Daemon, Postgres, Redis, Settings};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::Arc;

const TABLES: &str = r#"
[[tables]]
name = "items"
table = "public.items"
key = "item:{id}"

[[tables.lookups]]
name = "by_shop"
key = "items-by-shop:{shop}:{kind}"
order = "place"

[[tables.lookups]]
name = "all"
key = "items-all"
order = "place"

[[tables.lookups]]
name = "by_tag"
key = "items-by-tag:{tags[]}"

[[tables]]
name = "plain"
table = "public.plain"
key = "plain:{id}"
"#;

async fn start(rows: &str) -> (Arc<Postgres>, Redis, Daemon) {
    let (postgres, redis) = (Arc::new(Postgres::shared()), Redis::start());
    let settings = Settings::new(&postgres, &redis);
    let daemon = start_with(&postgres, settings, rows).await;
    (postgres, redis, daemon)
}

async fn start_with(postgres: &Postgres, settings: Settings, rows: &str) -> Daemon {
    let sql = format!(
        "CREATE TABLE items (id text PRIMARY KEY, shop text, kind text, place int, tags text[], version int DEFAULT 0);
         CREATE TABLE plain (id int PRIMARY KEY);
         GRANT SELECT ON items, plain TO prefetchd;
         ALTER PUBLICATION prefetchd ADD TABLE items, plain;
         INSERT INTO items (id, shop, kind, place, tags) {rows}"
    );
    postgres.execute(&sql).await;
    let daemon = Daemon::with(&settings.tables(TABLES)).await;
    daemon.ready().await;
    daemon
}

async fn list(daemon: &Daemon, target: &str) -> Value {
    let answer = daemon.get(&format!("/v1/lookups/items/{target}")).await;
    assert_eq!(answer.status, 200, "{target}: {answer:?}");
    answer.json()
}

fn ids(list: &Value) -> Vec<&str> {
    list["rows"].as_array().unwrap().iter().map(|row| row["id"].as_str().unwrap()).collect()
}

#[tokio::test]
async fn lists_of_rows_in_json_have_their_documents() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let sql = "CREATE TABLE items (id text PRIMARY KEY, shop text, kind text, place int, tags text[], doc jsonb);
               GRANT SELECT ON items TO prefetchd;
               ALTER PUBLICATION prefetchd ADD TABLE items;
               INSERT INTO items SELECT 'i' || n, 'a', 'k', -n, ARRAY['t'], '{\"n\": 1.50}' FROM generate_series(1, 3) n";
    postgres.execute(sql).await;
    let tables = TABLES.split("[[tables]]\nname = \"plain\"").next().unwrap();
    let tables = tables.replace("key = \"item:{id}\"", "key = \"item:{id}\"\nformat = \"json\"");
    let daemon = Daemon::with(&Settings::new(&postgres, &redis).tables(&tables)).await;
    daemon.ready().await;
    for query in ["", "?typed=true"] {
        let answer = daemon.get(&format!("/v1/lookups/items/by_shop/a/k{query}")).await;
        let first =
            r#"{"rows":[{"id":"i3","shop":"a","kind":"k","place":-3,"tags":["t"],"doc":{"n": 1.50}},{"id":"i2","#;
        assert!(answer.body.starts_with(first), "{}", answer.body);
    }
    assert_eq!(ids(&list(&daemon, "by_tag/t?order=desc&limit=2").await), ["i3", "i2"]);
    assert_eq!(list(&daemon, "by_tag/nothing").await, json!({"rows": [], "total": 0, "next": null}));
    // Something else in place of a document.
    redis.command::<()>(&["SET", "item:i2", "no document"]).await;
    let refused = daemon.get("/v1/lookups/items/all").await;
    assert_eq!(refused.refusal(), (503, "healing".to_owned()));
    assert_eq!(daemon.stop().await, Some(0));
}

#[tokio::test]
async fn rows_come_in_the_order_of_their_list_page_by_page() {
    let rows = "SELECT 'i' || n, CASE WHEN n % 2 = 0 THEN 'a/b' END, 'k:' || n % 2, n / 3, ARRAY['t', 'u' || n % 2]
                  FROM generate_series(1, 12) n";
    let (_postgres, _redis, daemon) = start(rows).await;
    let all = ["i1", "i2", "i3", "i4", "i5", "i6", "i7", "i8", "i10", "i11", "i9", "i12"];
    let whole = list(&daemon, "all").await;
    assert_eq!(ids(&whole), all);
    assert_eq!((&whole["total"], &whole["next"]), (&json!(12), &Value::Null));
    assert_eq!(
        whole["rows"][0],
        json!({"id": "i1", "shop": "", "kind": "k:1", "place": "0", "tags": "{t,u1}", "version": "0"})
    );
    let typed = list(&daemon, "all?limit=1&typed=true").await;
    assert_eq!(
        typed["rows"],
        json!([{"id": "i1", "shop": null, "kind": "k:1", "place": 0, "tags": ["t", "u1"], "version": 0}])
    );
    // Values that need escapes, NULL, elements of an array.
    assert_eq!(ids(&list(&daemon, "by_shop/a%2Fb/k%3A0").await), ["i2", "i4", "i6", "i8", "i10", "i12"]);
    assert_eq!(ids(&list(&daemon, "by_shop//k:1").await), ["i1", "i3", "i5", "i7", "i11", "i9"]);
    assert_eq!(ids(&list(&daemon, "by_tag/u0").await), ["i10", "i12", "i2", "i4", "i6", "i8"]);
    assert_eq!(list(&daemon, "by_tag/nothing").await, json!({"rows": [], "total": 0, "next": null}));

    let by_name = ["i1", "i10", "i11", "i12", "i2", "i3", "i4", "i5", "i6", "i7", "i8", "i9"];
    for (lookup, in_order) in [("all", all), ("by_tag/t", by_name)] {
        for order in ["asc", "desc"] {
            for limit in [1, 5, 6, 12, 13] {
                let (mut found, mut after) = (Vec::new(), String::new());
                loop {
                    let page = list(&daemon, &format!("{lookup}?order={order}&limit={limit}{after}")).await;
                    assert_eq!(page["total"], 12);
                    assert!(ids(&page).len() <= limit && !ids(&page).is_empty());
                    found.extend(ids(&page).into_iter().map(str::to_owned));
                    match page["next"].as_str() {
                        Some(next) => after = format!("&after={next}"),
                        None => break,
                    }
                }
                let mut expected = in_order.to_vec();
                if order == "desc" {
                    expected.reverse();
                }
                assert_eq!(found, expected, "{lookup} {order} {limit}");
            }
        }
    }
}

#[tokio::test]
async fn what_cannot_be_a_list_is_refused() {
    let (_postgres, redis, daemon) = start("SELECT 'i' || n, 'a', 'k', n, '{t}' FROM generate_series(1, 30) n").await;
    let code = async |target: &str| daemon.get(&format!("/v1/lookups/{target}")).await.refusal();
    let bad = (400, "bad_request".to_owned());
    assert_eq!(code("nothing/all").await, (404, "unknown_table".to_owned()));
    assert_eq!(code("items/nothing/x").await, (404, "unknown_lookup".to_owned()));
    assert_eq!(code("plain/all").await, (404, "unknown_lookup".to_owned()));
    let page = list(&daemon, "all?limit=2").await;
    let (of_sorted, page) = (page["next"].as_str().unwrap(), list(&daemon, "by_tag/t?limit=2").await);
    let of_set = page["next"].as_str().unwrap();
    for target in [
        "items".to_owned(),
        "items/by_shop/a".to_owned(),
        "items/by_shop/a/k/x".to_owned(),
        "items/all/x".to_owned(),
        "items/all?limit=0".to_owned(),
        "items/all?limit=1001".to_owned(),
        "items/all?limit=-1".to_owned(),
        "items/all?order=up".to_owned(),
        "items/all?after=".to_owned(),
        "items/all?after=x".to_owned(),
        "items/all?after=%F0".to_owned(),
        format!("items/all?after={of_set}"),
        format!("items/by_tag/t?after={of_sorted}"),
        format!("items/all?after={of_sorted}&after={of_sorted}"),
        "items/all?key=i1".to_owned(),
        "items/by_shop/%zz/k".to_owned(),
    ] {
        assert_eq!(code(&target).await, bad, "{target}");
    }
    // A set has no order: a large one would have to be read whole for every page.
    let members: Vec<String> = (0..10_001).map(|n| n.to_string()).collect();
    for chunk in members.chunks(1000) {
        let mut command = vec!["SADD", "items-by-tag:many"];
        command.extend(chunk.iter().map(String::as_str));
        redis.command::<u64>(&command).await;
    }
    assert_eq!(code("items/by_tag/many").await, (400, "too_large".to_owned()));
    redis.command::<u64>(&["SREM", "items-by-tag:many", "0"]).await;
    let (status, _) = code("items/by_tag/many").await;
    assert_eq!(status, 503, "its members have no rows");
}

#[tokio::test]
async fn an_empty_list_is_an_answer_only_where_a_miss_is_one() {
    let rows = "SELECT 'i' || n, 'a', 'k', n, '{t}' FROM generate_series(1, 3) n";
    let (postgres, redis, daemon) = start(rows).await;
    let code = async |target: &str| {
        let answer = daemon.get(&format!("/v1/lookups/items/{target}")).await;
        if answer.status == 200 { (200, String::new()) } else { answer.refusal() }
    };
    let (answered, fresh) = ((200, String::new()), "all?max_age=10s");
    assert_eq!(code("by_tag/x").await, answered);
    assert_eq!(code(fresh).await, answered);
    // Read your own writes.
    postgres.execute("INSERT INTO items VALUES ('i4', 'a', 'k', 4, '{x}')").await;
    let lsn = postgres.value("SELECT pg_current_wal_insert_lsn()").await.unwrap();
    assert_eq!(ids(&list(&daemon, &format!("by_tag/x?min_lsn={lsn}&wait=10s")).await), ["i4"]);
    assert_eq!(code("all?min_lsn=FFFF/0&wait=1ms").await, (504, "lagging".to_owned()));

    // Redis cannot hold it, and nobody knows its tags.
    redis.command::<()>(&["CONFIG", "SET", "proto-max-bulk-len", "1mb"]).await;
    daemon.allow_warnings();
    postgres.execute("INSERT INTO items VALUES ('i5', repeat('x', 2000000), 'k', 5, '{y}')").await;
    daemon.status_when("a dead letter", |status| status["dead_letters"] == 1).await;
    daemon.ready().await;
    assert_eq!(code("by_tag/y").await, (503, "dead_letter".to_owned()));
    assert_eq!(ids(&list(&daemon, "all").await), ["i1", "i2", "i3", "i4"]);
    postgres.execute("DELETE FROM items WHERE id = 'i5'").await;
    daemon.status_when("no dead letter", |status| status["tables"][0]["dead_letters"] == 0).await;
    daemon.ready().await;

    // Somebody has removed a row.
    redis.command::<u64>(&["DEL", "item:i2"]).await;
    assert_eq!(code("all").await, (503, "healing".to_owned()));
    assert_eq!(code("by_tag/x").await, answered);
    let mended = daemon.operate("verify", &json!({"table": "items", "repair": true})).await;
    assert_eq!(mended.status, 200);
    assert_eq!(code("all").await, answered);

    let removed = daemon.operate("invalidate", &json!({"table": "items", "keys": ["i4"]})).await;
    assert_eq!(removed.json()["deleted"], 1);
    for target in ["by_tag/x", "all"] {
        assert_eq!(code(target).await, (503, "incomplete".to_owned()), "{target}");
    }
    daemon.operate("refetch", &json!({"table": "items"})).await;
    assert_eq!(ids(&list(&daemon, "by_tag/x").await), ["i4"]);
}

/// In each transaction all rows get the same version, and change places.
#[tokio::test]
async fn all_rows_of_a_list_are_of_one_moment() {
    let (postgres, redis) = (Arc::new(Postgres::shared()), Redis::start());
    let proxy = Proxy::to_redis(&redis).await;
    let settings = Settings::new(&postgres, &redis).text("redis.url", &proxy.url());
    let rows = "SELECT repeat('i', 30) || n, 's' || n % 2, 'k', n, '{t}' FROM generate_series(1, 1500) n";
    let daemon = start_with(&postgres, settings, rows).await;
    // A request for so many rows reaches Redis in several parts, and batches come in between.
    proxy.throttle(Some(3_000_000));
    // A quarter of them is in the list, another one each time.
    let writes = postgres.repeat(|version| {
        format!(
            "UPDATE items SET version = {version}, place = (hashtext(id) # {version}) % 7,
                    shop = CASE WHEN abs(hashtext(id) # {version}) % 4 = 0 THEN 'here' ELSE 'there' END;
             SELECT pg_sleep(0.1)"
        )
    });
    let (mut answers, mut versions) = (0, BTreeMap::<String, usize>::new());
    while answers < 40 {
        let changing = list(&daemon, "by_shop/here/k?limit=1000").await;
        let rows = changing["rows"].as_array().unwrap();
        assert_eq!(json!(rows.len()), changing["total"]);
        assert!(rows.iter().all(|row| row["shop"] == "here"), "{changing}");
        let places: Vec<(i64, &str)> = rows
            .iter()
            .map(|row| (row["place"].as_str().unwrap().parse().unwrap(), row["id"].as_str().unwrap()))
            .collect();
        assert!(places.is_sorted(), "{places:?}");
        let constant = list(&daemon, "by_tag/t?limit=1000").await;
        assert_eq!((constant["rows"].as_array().unwrap().len(), &constant["total"]), (1000, &json!(1500)));
        for list in [&changing, &constant] {
            let mut of_rows = list["rows"].as_array().unwrap().iter().map(|row| &row["version"]);
            let Some(version) = of_rows.next() else { continue };
            assert!(of_rows.all(|of_row| of_row == version), "{list}");
            *versions.entry(version.to_string()).or_default() += 1;
        }
        answers += 1;
    }
    let written = writes.stop().await;
    assert!(versions.len() > 5, "{} of {written} versions were seen", versions.len());
}

/// Rows that stay come once, whatever happens to others, to the row at the end of a page, and to rows of the same score.
#[tokio::test]
async fn a_cursor_survives_changes() {
    // The last ones have no place.
    let rows = "SELECT 'i' || lpad(n::text, 3, '0'), 'a', 'k', nullif(n / 50, 7), '{t}' FROM generate_series(1, 400) n";
    let (postgres, _redis, daemon) = start(rows).await;
    let reaching = async |sql: &str| format!("&min_lsn={}&wait=10s", postgres.execute(sql).await);
    for (lookup, order) in [("all", "asc"), ("all", "desc"), ("by_tag/t", "asc"), ("by_tag/t", "desc")] {
        let all = "INSERT INTO items SELECT 'i' || lpad(n::text, 3, '0'), 'a', 'k', nullif(n / 50, 7), '{t}'
                     FROM generate_series(1, 400) n ON CONFLICT DO NOTHING";
        let (mut found, mut after, mut pages) = (Vec::new(), reaching(all).await, 0);
        loop {
            let page = list(&daemon, &format!("{lookup}?order={order}&limit=20{after}")).await;
            found.extend(ids(&page).into_iter().map(str::to_owned));
            let Some(next) = page["next"].as_str() else { break };
            after = format!("&after={next}");
            pages += 1;
            // The last row of the page leaves, and many before it and after it come and go. Odd ones stay.
            let last = found.last().unwrap();
            let sql = format!(
                "DELETE FROM items WHERE id = '{last}' AND right(id, 1)::int % 2 = 0;
                 DELETE FROM items WHERE right(id, 1)::int % 2 = 0 AND hashtext(id || '{pages}') % 5 = 0;
                 INSERT INTO items SELECT 'x{pages}-' || n, 'a', 'k', n, '{{t}}' FROM generate_series(-3, 9) n;
                 DELETE FROM items WHERE id ~ '^x' AND hashtext(id || '{pages}') % 3 = 0"
            );
            after += &reaching(&sql).await;
        }
        let mut stayed: Vec<&String> =
            found.iter().filter(|id| id.starts_with('i') && id.ends_with(['1', '3', '5', '7', '9'])).collect();
        if order == "desc" {
            stayed.reverse();
        }
        let odd: Vec<String> = (1..=400).filter(|n| n % 2 == 1).map(|n| format!("i{n:03}")).collect();
        assert_eq!(stayed, odd.iter().collect::<Vec<_>>(), "{lookup} {order}");
    }
}
