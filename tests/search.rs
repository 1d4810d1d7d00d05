//! RediSearch indexes the hashes as they are, on a server that has it.

use crate::harness::{Daemon, Postgres, Redis, Settings, eventually, skipped};
use std::collections::BTreeSet;

/// Returns the keys that an index has for a query.
async fn found(redis: &Redis, index: &str, query: &str) -> BTreeSet<String> {
    let answer: Vec<redis::Value> = redis.command(&["FT.SEARCH", index, query, "NOCONTENT"]).await;
    answer.into_iter().skip(1).map(|key| redis::from_redis_value(key).unwrap()).collect()
}

async fn create(redis: &Redis, index: &str) {
    let schema = "name TEXT display_order NUMERIC SORTABLE featured TAG parent_id TAG";
    let create = format!("FT.CREATE {index} ON HASH PREFIX 1 cache:category: SCHEMA {schema}");
    redis.command::<()>(&create.split(' ').collect::<Vec<_>>()).await;
}

#[tokio::test]
async fn an_index_that_is_there_before_the_load_and_one_that_is_made_after_it_follow_the_rows() {
    let Some(module) = Redis::module("redisearch.so") else { return skipped("this server comes without RediSearch") };
    for packed in ["auto", "off"] {
        let (postgres, redis) = (Postgres::shared(), Redis::with(&["--loadmodule", &module]));
        create(&redis, "before").await;
        let daemon = Daemon::with(&Settings::new(&postgres, &redis).text("redis.packed", packed)).await;
        daemon.ready().await;
        create(&redis, "after").await;
        let agree = async |query: &str, ids: &[&str]| {
            let wanted: BTreeSet<String> = ids.iter().map(|id| format!("cache:category:{id}")).collect();
            for index in ["before", "after"] {
                // An index that is made over existing keys is filled in the background.
                let what = format!("{query} in the index made {index}");
                eventually(&what, async || found(&redis, index, query).await, |found| *found == wanted).await;
            }
        };
        agree("bakery", &["cat-002"]).await;
        agree("@featured:{true}", &["cat-001", "cat-003", "cat-005"]).await;
        agree("@display_order:[2 4]", &["cat-002", "cat-003", "cat-004"]).await;
        for sql in [
            "UPDATE categories SET name = 'Bread', display_order = 40 WHERE id = 'cat-002'",
            "DELETE FROM categories WHERE id = 'cat-004'",
            "UPDATE categories SET id = 'cat-033' WHERE id = 'cat-003'",
        ] {
            daemon.applied(postgres.execute(sql).await).await;
        }
        agree("bakery", &[]).await;
        agree("bread", &["cat-002"]).await;
        agree("@display_order:[2 4]", &["cat-033"]).await;
        assert_eq!(daemon.operate("refetch", &serde_json::json!({})).await.status, 200);
        agree("@featured:{true}", &["cat-001", "cat-033", "cat-005"]).await;
        assert_eq!(daemon.stop().await, Some(0));
    }
}
