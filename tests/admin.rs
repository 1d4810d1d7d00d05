//! What an operator may request of a running daemon: who may, how it answers, and that readers do not notice.

use crate::harness::traffic::{Traffic, loaded, seed};
use crate::harness::watcher::Watcher;
use crate::harness::{Answer, Daemon, Postgres, Redis, Settings, post, run_program};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use std::time::{Duration, Instant};

const FIRST: &str = "cache:category:cat-001";
const ROW: &str = "/v1/tables/categories/cat-001";
const TTL: Duration = Duration::from_secs(24 * 60 * 60);

fn refused(status: u16, code: &str) -> (u16, String) {
    (status, code.to_owned())
}

/// Returns the answer without its duration and position, which vary.
#[track_caller]
fn found(answer: &Answer) -> Value {
    assert_eq!(answer.status, 200, "{answer:?}");
    let mut json = answer.json();
    let object = json.as_object_mut().unwrap();
    assert!(object.remove("elapsed_ms").unwrap().is_u64());
    object.remove("lsn");
    json
}

/// Makes Redis differ from Postgres in every way.
async fn spoil(redis: &Redis) {
    redis.command::<i32>(&["DEL", FIRST]).await;
    redis.command::<i32>(&["HSET", "cache:category:cat-002", "name", "Wrong"]).await;
    redis.command::<i32>(&["HDEL", "cache:category:cat-003", "featured"]).await;
    redis.command::<i32>(&["HSET", "cache:category:cat-004", "beside", "it"]).await;
    redis.command::<()>(&["SET", "cache:category:cat-005", "no hash"]).await;
    redis.command::<i32>(&["HSET", "cache:category:nobody", "id", "nobody"]).await;
    redis.command::<()>(&["SET", "cache:category:no:hash", "x"]).await;
}

async fn is_equal(redis: &Redis) {
    let keys = redis.keys("cache:*").await;
    assert_eq!(keys.len(), 5, "{keys:?}");
    let first = redis.hash(FIRST).await;
    let fields: Vec<(&str, &str)> = first.iter().map(|(f, v)| (f.as_str(), v.as_str())).collect();
    assert_eq!(
        fields,
        [("display_order", "1"), ("featured", "true"), ("id", "cat-001"), ("name", "Beverages"), ("parent_id", "")]
    );
    for key in keys {
        assert_eq!(redis.hash(&key).await.len(), 5, "{key}");
        assert!(redis.pttl(&key).await > 0, "{key}");
    }
}

#[tokio::test]
async fn verify_finds_exactly_what_differs_and_mends_it_when_asked() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let daemon = Daemon::start(&postgres, &redis).await;
    daemon.ready().await;
    assert_eq!(daemon.status().await["last_verify"], Value::Null);
    let clean = json!({"rows": 5, "keys": 5, "missing": 0, "stale": 0, "orphaned": 0, "repaired": 0});
    let answer = daemon.operate("verify", &json!({})).await;
    assert_eq!(found(&answer), clean);
    assert!(answer.json()["lsn"].as_str().unwrap().contains('/'));
    assert_eq!(daemon.status().await["last_verify"]["rows"], 5);

    spoil(&redis).await;
    daemon.allow_warning("verify of categories");
    let drift = json!({"rows": 5, "keys": 6, "missing": 1, "stale": 4, "orphaned": 2, "repaired": 0});
    for body in [json!({}), json!({"repair": false}), json!({"table": "categories"})] {
        assert_eq!(found(&daemon.operate("verify", &body).await), drift);
    }
    assert_eq!(redis.hash("cache:category:cat-002").await["name"], "Wrong", "nobody asked for a repair");
    let metrics = daemon.metrics().await;
    for (kind, seen) in [("missing", 3.0), ("stale", 12.0), ("orphaned", 6.0)] {
        assert_eq!(metrics[&format!(r#"prefetchd_drift_total{{kind="{kind}",table="categories"}}"#)], seen);
    }

    daemon.allow_warning("verify with repair of categories");
    let mended = json!({"rows": 5, "keys": 6, "missing": 1, "stale": 4, "orphaned": 2, "repaired": 7});
    assert_eq!(found(&daemon.operate("verify", &json!({"repair": true})).await), mended);
    is_equal(&redis).await;
    assert_eq!(found(&daemon.operate("verify", &json!({})).await), clean);
    assert_eq!(daemon.status().await["primary_reads"], 7, "one load, six verifications of one table");
    daemon.applied(postgres.position().await).await;
    assert!(daemon.metrics().await["prefetchd_last_verify_timestamp_seconds"] > 1e9);
    assert_eq!(daemon.stop().await, Some(0));

    // The daemon remembers it.
    let daemon = Daemon::start(&postgres, &redis).await;
    daemon.ready().await;
    let last = daemon.status_when("known", |status| !status["last_verify"].is_null()).await["last_verify"].clone();
    assert!(last["at"].as_str().unwrap().starts_with("20"), "{last}");
    assert_eq!(last["rows"], Value::Null);
}

#[tokio::test]
async fn refetch_makes_everything_right_and_says_what_it_was() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let daemon = Daemon::start(&postgres, &redis).await;
    daemon.ready().await;
    assert_eq!(found(&daemon.operate("refetch", &json!({})).await), json!({"loaded": 5, "repaired": 0, "removed": 0}));
    spoil(&redis).await;
    let body = json!({"table": "categories"});
    assert_eq!(found(&daemon.operate("refetch", &body).await), json!({"loaded": 5, "repaired": 5, "removed": 2}));
    is_equal(&redis).await;
    let status = daemon.status().await;
    assert_eq!((&status["prefetched"], &status["last_load"]["rows"]), (&json!(15), &json!(5)));
    assert_eq!(status["last_load"]["reason"], "refetch");
    assert_eq!(status["operation"], Value::Null);
}

#[tokio::test]
async fn what_an_operator_removed_is_no_row_that_does_not_exist() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let mut daemon = Daemon::start(&postgres, &redis).await;
    daemon.ready().await;
    let invalidate = |keys: &[&str]| json!({"table": "categories", "keys": keys});
    let answer = daemon.operate("invalidate", &invalidate(&["nobody"])).await;
    assert_eq!(answer.json(), json!({"deleted": 0}));
    assert_eq!(daemon.get("/v1/tables/categories/nobody").await.refusal(), refused(404, "not_found"));

    let answer = daemon.operate("invalidate", &invalidate(&["cat-001", "cat-002", "cat-001", "nobody"])).await;
    assert_eq!(answer.json(), json!({"deleted": 2}));
    let is_gone = async |daemon: &Daemon| {
        assert_eq!(daemon.get(ROW).await.refusal(), refused(503, "incomplete"));
        assert_eq!(daemon.get("/v1/tables/categories/nobody").await.refusal(), refused(503, "incomplete"));
        assert_eq!(daemon.get("/v1/tables/categories/cat-003").await.status, 200);
        let ready = daemon.get("/readyz").await;
        assert!(ready.status == 503 && ready.body.contains("incomplete"), "{ready:?}");
    };
    is_gone(&daemon).await;
    // A restart neither makes the table whole nor forgets that it is not.
    for how in [Signal::SIGTERM, Signal::SIGKILL] {
        daemon.signal(how);
        drop(daemon);
        daemon = Daemon::start(&postgres, &redis).await;
        daemon.status_when("streams", |status| status["state"] == "streaming").await;
        is_gone(&daemon).await;
    }
    // A change of the row restores that row.
    let lsn = postgres.execute("UPDATE categories SET display_order = 1 WHERE id = 'cat-001'").await;
    daemon.applied(lsn).await;
    assert_eq!(daemon.get(ROW).await.status, 200);
    assert_eq!(daemon.get("/v1/tables/categories/cat-002").await.refusal(), refused(503, "incomplete"));
    let answer = daemon.operate("refetch", &json!({})).await;
    assert_eq!(found(&answer), json!({"loaded": 5, "repaired": 1, "removed": 0}));
    is_equal(&redis).await;
    daemon.ready().await;
    assert_eq!(daemon.get("/v1/tables/categories/nobody").await.refusal(), refused(404, "not_found"));

    let answer = daemon.operate("clear", &json!({"table": "categories", "confirm": "categories"})).await;
    assert_eq!(answer.json(), json!({"deleted": 5}));
    assert_eq!(redis.keys("cache:*").await.len(), 0);
    assert_eq!(daemon.get(ROW).await.refusal(), refused(503, "incomplete"));
    daemon.allow_warning("verify with repair");
    let answer = daemon.operate("verify", &json!({"repair": true})).await;
    assert_eq!(found(&answer)["missing"], 5);
    is_equal(&redis).await;
    daemon.ready().await;
}

#[tokio::test]
async fn a_paused_daemon_applies_nothing_and_loses_nothing() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let settings = Settings::new(&postgres, &redis).text("cache.ttl", "3s").text("cache.max_staleness", "1s");
    let daemon = Daemon::with(&settings).await;
    daemon.ready().await;
    for _ in 0..2 {
        assert_eq!(daemon.operate("pause", &json!({})).await.json(), json!({"paused": true}));
    }
    let lsn = postgres.execute("UPDATE categories SET name = 'Later' WHERE id = 'cat-001'").await;
    let status = daemon.status_when("lags", |status| status["lag"]["seconds"].as_f64() > Some(2.5)).await;
    assert_eq!(status["paused"], true);
    assert!(status["lag"]["bytes"].as_u64() > Some(0), "{status}");
    assert_eq!(redis.hash(FIRST).await["name"], "Beverages");
    let answer = daemon.get(&format!("{ROW}?min_lsn={lsn}&wait=10ms")).await;
    assert_eq!(answer.refusal(), refused(504, "lagging"));
    assert_eq!(daemon.get("/v1/tables/categories/nobody").await.refusal(), refused(503, "stale"));
    for operation in ["refetch", "verify"] {
        assert_eq!(daemon.operate(operation, &json!({})).await.refusal(), refused(409, "paused"));
    }
    // Longer than the TTL, which is renewed all the while.
    let began = daemon.status().await["uptime_seconds"].as_f64().unwrap();
    daemon.status_when("a TTL later", |status| status["uptime_seconds"].as_f64().unwrap() > began + 4.0).await;
    assert_eq!(daemon.get(ROW).await.status, 200);
    assert_eq!(daemon.operate("resume", &json!({})).await.json(), json!({"paused": false}));
    daemon.applied(lsn).await;
    assert_eq!(redis.hash(FIRST).await["name"], "Later");
    daemon.ready().await;
    assert_eq!(daemon.status().await["primary_reads"], 1);

    daemon.operate("pause", &json!({})).await;
    let lsn = postgres.execute("UPDATE categories SET name = 'Again' WHERE id = 'cat-001'").await;
    assert_eq!(daemon.stop().await, Some(0));
    let daemon = Daemon::with(&settings).await;
    daemon.applied(lsn).await;
    assert_eq!((redis.hash(FIRST).await["name"].as_str(), &daemon.status().await["paused"]), ("Again", &json!(false)));
}

#[tokio::test]
async fn one_heavy_operation_at_a_time_and_the_second_is_told_which() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let daemon = Daemon::start(&postgres, &redis).await;
    daemon.ready().await;
    // Nothing can read the table meanwhile.
    let holder = postgres.client().await;
    holder.batch_execute("BEGIN; LOCK TABLE categories IN ACCESS EXCLUSIVE MODE").await.unwrap();
    let all = json!({});
    let (first, second) = tokio::join!(daemon.operate("refetch", &all), async {
        daemon.status_when("refetching", |status| status["operation"] == "refetch").await;
        let second = daemon.operate("verify", &all).await;
        holder.batch_execute("COMMIT").await.unwrap();
        second
    });
    assert_eq!(second.refusal(), refused(409, "busy"));
    assert!(second.body.contains("refetch"), "{second:?}");
    assert_eq!(first.status, 200, "{first:?}");
}

#[tokio::test]
async fn a_background_verification_mends_what_somebody_did() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let daemon = Daemon::with(&Settings::new(&postgres, &redis).text("cache.verify_every", "2s")).await;
    daemon.ready().await;
    daemon.allow_warning("verify with repair of categories");
    spoil(&redis).await;
    daemon.status_when("verified", |status| status["last_verify"]["repaired"] == 7).await;
    is_equal(&redis).await;
}

/// Many in a row, while eight sessions write as fast as they can: no live key is ever missing, none goes backwards, and
/// no false drift is found.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readers_notice_nothing_of_refetches_and_verifications() {
    let seed = seed();
    for synchronous_commit in ["on", "off"] {
        let postgres = Postgres::own(&[("synchronous_commit", synchronous_commit), ("fsync", "on")]);
        let redis = Redis::start();
        let traffic = Traffic::create(&postgres, 2_000).await;
        let daemon = Daemon::with(&Traffic::settings(&postgres, &redis)).await;
        loaded(&daemon).await;
        let watcher = Watcher::start(&redis, &postgres.slot(), traffic, seed).await;
        let writers = traffic.write(&postgres, seed, Duration::ZERO);
        let began = Instant::now();
        for round in 0..refetches() {
            finds_nothing(&daemon, "refetch", &json!({}), &["repaired", "removed"]).await;
            if round % 5 == 0 {
                let repair = json!({"repair": round % 2 == 0});
                finds_nothing(&daemon, "verify", &repair, &["missing", "stale", "orphaned", "repaired"]).await;
            }
            watcher.check().await;
        }
        let (changes, took) = (writers.changes(), began.elapsed());
        println!("synchronous_commit {synchronous_commit}: {} refetches in {took:?}, {changes} changes", refetches());
        writers.stop().await;
        daemon.applied(postgres.position().await).await;
        daemon.ready().await;
        traffic.assert_equal(&postgres, &redis, TTL).await;
        watcher.stop().await;
    }
}

async fn finds_nothing(daemon: &Daemon, operation: &str, body: &Value, counts: &[&str]) {
    let answer = daemon.operate(operation, body).await;
    assert_eq!(answer.status, 200, "{answer:?}\n{}", daemon.log_text());
    let found = answer.json();
    assert!(counts.iter().all(|name| found[*name] == 0), "{operation}: {answer:?}");
}

/// The number for each kind of commit.
fn refetches() -> u32 {
    std::env::var("PREFETCHD_REFETCHES").map_or(20, |number| number.parse().unwrap())
}

#[tokio::test]
async fn who_may_not_ask_is_refused_before_anything_happens() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let daemon = Daemon::start(&postgres, &redis).await;
    daemon.ready().await;
    let json_type = "Content-Type: application/json";
    let (own, token) = (format!("Origin: http://{}", daemon.address()), daemon.authorization());
    let body = r#"{"table": "categories", "confirm": "categories"}"#;
    let ask = async |headers: &[&str]| {
        let headers: Vec<&str> = headers.iter().copied().chain([&*token]).collect();
        post(daemon.address(), "/v1/admin/clear", &headers, body).await.unwrap().refusal()
    };
    for (headers, status, code) in [
        (&[][..], 415, "unsupported_media_type"),
        (&["Content-Type: text/plain"], 415, "unsupported_media_type"),
        (&[json_type, "Origin: https://evil.example"], 403, "foreign_origin"),
        (&[json_type, "Origin: null"], 403, "foreign_origin"),
        (&[json_type, "Sec-Fetch-Site: cross-site"], 403, "foreign_origin"),
        (&[json_type, "Host: rebound.example"], 403, "admin_disabled"),
        (&[json_type, "X-Forwarded-For: 10.0.0.1"], 403, "admin_disabled"),
        (&[json_type, "X-Forwarded-Port: 80"], 403, "admin_disabled"),
        (&[json_type, "X-Real-IP: 10.0.0.1"], 403, "admin_disabled"),
        (&[json_type, "Via: 1.1 proxy"], 403, "admin_disabled"),
        (&[json_type, "Forwarded: for=10.0.0.1"], 403, "admin_disabled"),
    ] {
        assert_eq!(ask(headers).await, refused(status, code), "{headers:?}");
    }
    for (operation, body, status, code) in [
        ("clear", r#"{"table": "categories"}"#, 400, "bad_request"),
        ("clear", r#"{"table": "categories", "confirm": "Categories"}"#, 400, "bad_request"),
        ("clear", r#"{"table": "others", "confirm": "others"}"#, 404, "unknown_table"),
        ("clear", "{}", 400, "bad_request"),
        ("invalidate", r#"{"table": "categories", "keys": "cat-001"}"#, 400, "bad_request"),
        ("refetch", r#"{"tables": ["categories"]}"#, 400, "bad_request"),
        ("refetch", r#"{"table": "others"}"#, 404, "unknown_table"),
        ("verify", "[1", 400, "bad_request"),
        ("pause", "[]", 400, "bad_request"),
        ("skip", r#"{"lsn": "1A2B"}"#, 400, "bad_request"),
        ("skip", r#"{"lsn": "0/1A2B"}"#, 409, "nothing_to_skip"),
        ("explode", "{}", 404, "unknown_route"),
    ] {
        let answer =
            post(daemon.address(), &format!("/v1/admin/{operation}"), &[json_type, &token], body).await.unwrap();
        assert_eq!(answer.refusal(), refused(status, code), "{operation} {body}");
    }
    assert_eq!(daemon.get("/v1/admin/pause").await.refusal(), refused(405, "method_not_allowed"));
    let large = format!(r#"{{"table": "{}"}}"#, "x".repeat(70 << 10));
    let answer = post(daemon.address(), "/v1/admin/refetch", &[json_type, &token], &large).await.unwrap();
    assert_eq!(answer.refusal(), refused(413, "body_too_large"));
    is_equal(&redis).await;
    let answer =
        post(daemon.address(), "/v1/admin/clear", &[json_type, &token, &own, "Sec-Fetch-Site: same-origin"], body)
            .await;
    assert_eq!(answer.unwrap().json(), json!({"deleted": 5}));
}

#[tokio::test]
async fn with_a_token_whoever_has_it_may_ask_from_anywhere() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let token = tempfile::NamedTempFile::new_in(redis.dir()).unwrap();
    std::fs::write(token.path(), "s3cret-s3cret-s3cret\n").unwrap();
    let settings = Settings::new(&postgres, &redis).text("http.admin_token_file", token.path().to_str().unwrap());
    let daemon = Daemon::with(&settings).await;
    daemon.ready().await;
    let ask = async |headers: &[&str]| {
        let headers: Vec<&str> = ["Content-Type: application/json"].iter().chain(headers).copied().collect();
        post(daemon.address(), "/v1/admin/pause", &headers, "").await.unwrap()
    };
    for wrong in
        [&[][..], &["Authorization: Bearer s3cret-s3cret-s3cre"], &["Authorization: Basic s3cret-s3cret-s3cret"]]
    {
        let answer = ask(wrong).await;
        assert_eq!(answer.refusal(), refused(401, "unauthorized"), "{wrong:?}");
        assert_eq!(answer.header("www-authenticate"), Some("Bearer"));
    }
    assert_eq!(daemon.status().await["paused"], false);
    let answer =
        ask(&["Authorization: Bearer s3cret-s3cret-s3cret", "Host: cache.example", "X-Forwarded-For: 10.0.0.1"]).await;
    assert_eq!(answer.json(), json!({"paused": true}));
    let foreign = ask(&["Authorization: Bearer s3cret-s3cret-s3cret", "Origin: https://evil.example"]).await;
    assert_eq!(foreign.refusal(), refused(403, "foreign_origin"));
    assert_eq!(daemon.get(ROW).await.status, 200, "reads need none");
    assert!(!daemon.log_text().contains("s3cret-s3cret-s3cret"));
    daemon.allow_warning("wrong admin token");

    let url = format!("http://{}", daemon.address());
    let ran = run_program(&settings, &["resume", "--url", &url]).await;
    assert_eq!((ran.code, ran.stdout.trim()), (Some(0), "resumed"), "{}", ran.stderr);
}

#[tokio::test]
async fn the_commands_ask_for_the_same() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let settings = Settings::new(&postgres, &redis);
    let daemon = Daemon::with(&settings).await;
    daemon.ready().await;
    daemon.allow_warnings();
    let url = format!("http://{}", daemon.address());
    let url = url.as_str();
    for (words, code, says) in [
        (&["verify"][..], 0, &["5 rows, 5 keys at "][..]),
        (&["invalidate", "categories", "cat-001", "cat-002"], 0, &["2 keys removed"]),
        (&["verify", "--table", "categories"], 1, &["2 missing, 0 stale, 0 orphaned", "2 keys differ"]),
        (&["verify", "--repair"], 0, &["2 missing", "2 repaired"]),
        (&["clear", "categories"], 0, &["5 keys removed"]),
        (&["refetch", "--table", "categories"], 0, &["5 rows loaded", "5 repaired"]),
        (&["pause"], 0, &["paused"]),
        (&["refetch"], 1, &["resume first"]),
        (&["resume"], 0, &["resumed"]),
        (&["refetch", "--table", "others"], 1, &["others"]),
        (&["skip", "0/1"], 1, &["nothing to skip"]),
        (&["invalidate", "categories"], 2, &["KEY"]),
    ] {
        let words: Vec<&str> = words.iter().copied().chain(["--url", url]).collect();
        let ran = run_program(&settings, &words).await;
        assert_eq!(ran.code, Some(code), "{words:?}: {ran:?}");
        assert!(says.iter().all(|part| ran.said().contains(part)), "{words:?}: {ran:?}");
    }
    is_equal(&redis).await;
}
