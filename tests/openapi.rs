//! `/openapi.json` is accurate: it contains every route of the sources, and exactly the statuses that were returned at
//! least once.

use crate::harness::Answer;
use crate::http::{Stage, TOKEN};
use prefetchd::admin::{self, Operation, Tally};
use prefetchd::demo;
use prefetchd::http::{AdminToken, HttpContext, HttpLimits};
use prefetchd::lsn::EndLsn;
use prefetchd::reload::{self, Changes, Refused};
use prefetchd::status::State;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;
use tokio::sync::mpsc;

const JSON: &str = "Content-Type: application/json";

/// For example `get /v1/status 200`.
type Seen = BTreeSet<String>;

fn see(seen: &mut Seen, route: &str, answer: &Answer) {
    seen.insert(format!("{route} {}", answer.status));
    if !(200..300).contains(&answer.status) && !route.ends_with("/readyz") {
        answer.refusal();
    }
}

async fn ask(stage: &Stage, method: &str, target: &str, headers: &[&str], body: &str) -> Answer {
    let mut head = format!("{method} {target} HTTP/1.1\r\nConnection: close\r\nContent-Length: {}\r\n", body.len());
    if !headers.iter().any(|line| line.starts_with("Host:")) {
        head += &format!("Host: {}\r\n", stage.address());
    }
    headers.iter().for_each(|line| head += &format!("{line}\r\n"));
    if method == "POST" {
        head += &format!("Authorization: Bearer {TOKEN}\r\n");
    }
    stage.raw(format!("{head}\r\n{body}")).await
}

/// Operations and the demo: a valid body, and whether the table in it can be wrong.
const POSTS: &[(&str, &str, bool)] = &[
    ("/v1/admin/pause", "{}", false),
    ("/v1/admin/resume", "{}", false),
    ("/v1/admin/refetch", r#"{"table": "categories"}"#, true),
    ("/v1/admin/verify", r#"{"table": "categories", "repair": true}"#, true),
    ("/v1/admin/invalidate", r#"{"table": "categories", "keys": ["cat-001"]}"#, true),
    ("/v1/admin/clear", r#"{"table": "categories", "confirm": "categories"}"#, true),
    ("/v1/admin/skip", r#"{"lsn": "0/1A"}"#, false),
    ("/v1/admin/reload", "{}", false),
    ("/v1/admin/log", "{}", false),
    ("/demo/add", "{}", false),
];

fn route(target: &str) -> String {
    format!("post {}", target.replace("/demo/add", "/demo/{action}"))
}

/// Performs every operation, or refuses every one.
fn operator(context: &mut HttpContext, refuses: bool) {
    let (ask, mut asked) = mpsc::channel::<admin::Asked>(1);
    context.ask = ask;
    tokio::spawn(async move {
        while let Some(admin::Asked { operation, answer }) = asked.recv().await {
            // Left out if there are none.
            let tally = Tally { lookups: 1, ..Tally::default() };
            let (lsn, elapsed) = (EndLsn("0/1A".parse().unwrap()), Duration::ZERO);
            let done = match operation {
                Operation::Pause => admin::Answer::Paused,
                Operation::Resume => admin::Answer::Resumed,
                Operation::Refetch(_) => admin::Answer::Refetched { tally, elapsed },
                Operation::Verify(..) => admin::Answer::Verified { tally, lsn, elapsed },
                Operation::Invalidate(..) | Operation::Clear(_) => admin::Answer::Deleted(1),
                Operation::Skip(_) => admin::Answer::Skipped,
            };
            let _ = answer.send(if refuses {
                Err(admin::Refusal::Busy("a load is under way".to_owned()))
            } else {
                Ok(done)
            });
        }
    });
    let (reload, mut reloads) = mpsc::channel::<reload::Wanted>(1);
    context.reload = Some(reload);
    tokio::spawn(async move {
        while let Some(answer) = reloads.recv().await.flatten() {
            let refused = Refused { reasons: vec!["it is no TOML".to_owned()] };
            let _ = answer.send(if refuses { Err(refused) } else { Ok(Changes::default()) });
        }
    });
    let (ask, mut asked) = mpsc::channel::<demo::DemoRequest>(1);
    context.page.demo = Some(ask);
    tokio::spawn(async move {
        while let Some(demo::DemoRequest { action, answer, .. }) = asked.recv().await {
            let _ = answer.send(match (refuses, action.as_str()) {
                (false, "add") => Ok(json!({})),
                (false, _) => Err(demo::DemoRefusal::Unknown(action)),
                (true, _) => Err(demo::DemoRefusal::NotOurs("it was given".to_owned())),
            });
        }
    });
}

/// Returns the routes as registered with axum's router.
fn routes_of_the_sources() -> BTreeSet<String> {
    let mut routes = BTreeSet::new();
    for entry in std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/http")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "rs") {
            continue;
        }
        let text = std::fs::read_to_string(path).unwrap();
        for (at, _) in text.match_indices(".route(\"") {
            let (path, handler) = text[at + ".route(\"".len()..].split_once('"').unwrap();
            let handler = handler.trim_start_matches([',', ' ']);
            let method = if handler.starts_with("post(") { "post" } else { "get" };
            assert!(["post(", "get(", "file("].iter().any(|known| handler.starts_with(known)), "{path}: {handler:.30}");
            match path {
                // One handler serves both.
                "/v1/tables/{*key}" => {
                    routes.extend(["get /v1/tables/{name}".to_owned(), "get /v1/tables/{name}/{key}".to_owned()]);
                }
                "/v1/lookups/{*value}" => drop(routes.insert("get /v1/lookups/{table}/{lookup}/{value}".to_owned())),
                path => drop(routes.insert(format!("{method} {path}"))),
            }
        }
    }
    routes
}

async fn description(stage: &Stage) -> Value {
    let answer = ask(stage, "GET", "/openapi.json", &[], "").await;
    assert_eq!(answer.status, 200);
    answer.json()
}

fn described(description: &Value) -> (BTreeSet<String>, Seen) {
    let (mut routes, mut statuses) = (BTreeSet::new(), Seen::new());
    for (path, item) in description["paths"].as_object().unwrap() {
        for (method, operation) in item.as_object().unwrap() {
            routes.insert(format!("{method} {path}"));
            for status in operation["responses"].as_object().unwrap().keys() {
                statuses.insert(format!("{method} {path} {status}"));
            }
        }
    }
    (routes, statuses)
}

#[tokio::test]
async fn every_route_and_every_status_is_described_and_no_other() {
    let mut stage = Stage::set_with(HttpLimits::default(), |context| operator(context, false)).await;
    let description = description(&stage).await;
    let (routes, statuses) = described(&description);
    assert_eq!(routes, routes_of_the_sources());

    let mut seen = Seen::new();
    const ROW: &str = "get /v1/tables/{name}/{key}";
    const ROWS: &str = "get /v1/tables/{name}";
    const LIST: &str = "get /v1/lookups/{table}/{lookup}/{value}";
    for (route, target) in [
        ("get /healthz", "/healthz"),
        ("get /readyz", "/readyz"),
        ("get /metrics", "/metrics"),
        ("get /v1/status", "/v1/status"),
        ("get /v1/history", "/v1/history"),
        ("get /openapi.json", "/openapi.json"),
        ("get /", "/"),
        ("get /page/{file}", "/page/page.js"),
        ("get /page/{file}", "/page/nothing.js"),
        ("get /v1/events", "/v1/events?a=b"),
        (ROW, "/v1/tables/categories/cat-001"),
        (ROW, "/v1/tables/categories/nobody"),
        (ROW, "/v1/tables/categories/a/b"),
        (ROW, "/v1/tables/categories/cat-001?min_lsn=F/0&wait=1ms"),
        (ROW, "/v1/tables/categories/cat-001?typed=true"),
        (ROWS, "/v1/tables/categories?key=cat-001&key=nobody"),
        (ROWS, "/v1/tables/nothing?key=a"),
        (ROWS, "/v1/tables/categories"),
        (ROWS, "/v1/tables/categories?key=cat-001&min_lsn=F/0&wait=1ms"),
        (LIST, "/v1/lookups/categories/by_name/Beverages"),
        (LIST, "/v1/lookups/categories/nothing/Beverages"),
        (LIST, "/v1/lookups/categories/by_name"),
        (LIST, "/v1/lookups/categories/by_name/Beverages?min_lsn=F/0&wait=1ms"),
    ] {
        see(&mut seen, route, &ask(&stage, "GET", target, &[], "").await);
        let foreign = ask(&stage, "GET", target, &["Host: rebound.example"], "").await;
        if !["/healthz", "/readyz", "/metrics"].contains(&target) {
            assert_eq!(foreign.status, 421, "{target}");
        }
        see(&mut seen, route, &foreign);
    }
    for &(target, good, has_table) in POSTS {
        let large = "x".repeat(70_000);
        for (headers, body) in [
            (&[JSON][..], good),
            (&[JSON], "[]"),
            (&[], good),
            (&[JSON, "Origin: http://evil.example"], good),
            (&[JSON], &large),
        ] {
            see(&mut seen, &route(target), &ask(&stage, "POST", target, headers, body).await);
        }
        if has_table {
            let wrong = good.replace("categories", "nothing");
            see(&mut seen, &route(target), &ask(&stage, "POST", target, &[JSON], &wrong).await);
        }
    }
    see(&mut seen, "post /demo/{action}", &ask(&stage, "POST", "/demo/nothing", &[JSON], "{}").await);
    // The stream does not end: its head is enough.
    seen.insert(format!("get /v1/events {}", stage.first_status("/v1/events").await));
    stage.status(|status| status.state = State::Stalled);
    see(&mut seen, "get /readyz", &ask(&stage, "GET", "/readyz", &[], "").await);
    stage.run(redis::cmd("FLUSHALL").arg("SYNC")).await;
    see(&mut seen, ROW, &ask(&stage, "GET", "/v1/tables/categories/cat-001", &[], "").await);
    see(&mut seen, ROWS, &ask(&stage, "GET", "/v1/tables/categories?key=cat-001", &[], "").await);
    see(&mut seen, LIST, &ask(&stage, "GET", "/v1/lookups/categories/by_name/Beverages", &[], "").await);

    let refuses =
        Stage::set_with(HttpLimits { streams: 0, ..HttpLimits::default() }, |context| operator(context, true)).await;
    let locked = Stage::set_with(HttpLimits::default(), |context| {
        operator(context, false);
        context.admin_token = AdminToken::Configured("another-token-of-some-length".into());
    })
    .await;
    let impatient = HttpLimits { body_timeout: Duration::from_millis(50), ..HttpLimits::default() };
    let impatient = Stage::set_with(impatient, |context| operator(context, false)).await;
    for &(target, ..) in POSTS {
        let head = format!("POST {target} HTTP/1.1\r\nHost: localhost\r\n{JSON}\r\nAuthorization: Bearer {TOKEN}\r\n");
        see(&mut seen, &route(target), &impatient.raw(format!("{head}Content-Length: 9\r\n\r\n")).await);
    }
    // Nothing is there any more.
    let ending = Stage::set_with(HttpLimits::default(), |context| context.page.demo = Some(mpsc::channel(1).0)).await;
    // It never gets round to it.
    let (reload, _reloads) = mpsc::channel(1);
    reload.try_send(None).unwrap();
    let late = Stage::set_with(HttpLimits::default(), |context| context.reload = Some(reload)).await;
    see(&mut seen, "post /v1/admin/reload", &ask(&late, "POST", "/v1/admin/reload", &[JSON], "{}").await);
    see(&mut seen, "get /v1/events", &ask(&refuses, "GET", "/v1/events", &[], "").await);
    for stage in [&refuses, &locked, &ending] {
        for &(target, good, _) in POSTS {
            see(&mut seen, &route(target), &ask(stage, "POST", target, &[JSON], good).await);
        }
    }
    let never: Vec<_> = statuses.difference(&seen).collect();
    let untold: Vec<_> = seen.difference(&statuses).collect();
    assert!(
        never.is_empty() && untold.is_empty(),
        "described and never answered: {never:?}; answered and not described: {untold:?}"
    );
}

#[tokio::test]
async fn what_a_read_may_ask_for_is_described() {
    let stage = Stage::set_with(HttpLimits::default(), |_| {}).await;
    let description = description(&stage).await;
    for (path, target, further) in [
        ("/v1/tables/{name}", "/v1/tables/categories", &["key"][..]),
        ("/v1/tables/{name}/{key}", "/v1/tables/categories/a", &[]),
        ("/v1/lookups/{table}/{lookup}/{value}", "/v1/lookups/categories/by_name/a", &["limit", "after", "order"]),
    ] {
        let parameters = description["paths"][path]["get"]["parameters"].as_array().unwrap();
        let of_query = parameters.iter().filter(|parameter| parameter["in"] == "query");
        let names: Vec<&str> = of_query.map(|parameter| parameter["name"].as_str().unwrap()).collect();
        assert_eq!(names, [further, &["min_lsn", "wait", "max_age", "typed"]].concat());
        let refusal = ask(&stage, "GET", &format!("{target}?b=c"), &[], "").await.json();
        assert!(names.iter().all(|name| refusal["message"].as_str().unwrap().contains(name)), "{refusal}");
    }
}

#[tokio::test]
async fn what_is_turned_off_is_not_described() {
    let stage = Stage::set_with(HttpLimits::default(), |context| context.page.is_shown = false).await;
    let (routes, _) = described(&description(&stage).await);
    assert!(routes.contains("get /v1/status") && routes.contains("post /v1/admin/pause"));
    assert!(!routes.iter().any(|route| route.contains("/demo") || route.contains("/page") || route.ends_with(" /")));
}

/// In both directions: every described field occurs, and every field that occurs is described.
#[track_caller]
fn fits(description: &Value, schema: &Value, value: &Value, at: &str) {
    let schema = match schema["$ref"].as_str() {
        Some(name) => description.pointer(name.trim_start_matches('#')).unwrap(),
        None => schema,
    };
    if let Some(any) = schema["oneOf"].as_array().filter(|_| !value.is_null()) {
        let one = any.iter().find(|one| one["type"] != "null").unwrap();
        return fits(description, one, value, at);
    }
    match value {
        Value::Object(fields) if !schema["properties"].is_null() => {
            let keys = |object: &Value| object.as_object().unwrap().keys().cloned().collect::<BTreeSet<_>>();
            assert_eq!(keys(&schema["properties"]), keys(value), "{at}");
            for (name, field) in fields {
                fits(description, &schema["properties"][name], field, &format!("{at}/{name}"));
            }
        }
        Value::Array(items) => items.iter().for_each(|item| fits(description, &schema["items"], item, at)),
        value => {
            let kind = match value {
                Value::Null => "null",
                Value::Bool(_) => "boolean",
                Value::String(_) => "string",
                Value::Number(number) if number.is_f64() => "number",
                Value::Number(_) => "integer",
                Value::Array(_) | Value::Object(_) => "object",
            };
            let kinds = schema["type"].to_string() + &schema["oneOf"].to_string();
            assert!(
                kinds.contains(kind) || (kind == "integer" && kinds.contains("number")),
                "{at}: {value} is no {schema}"
            );
        }
    }
}

#[tokio::test]
async fn bodies_are_as_described() {
    let stage = Stage::set_with(HttpLimits::default(), |context| operator(context, false)).await;
    let description = description(&stage).await;
    let schema = |method: &str, path: &str, kind: &str| {
        let operation = &description["paths"][path][method];
        operation["responses"]["200"]["content"][kind]["schema"].clone()
    };
    for path in ["/readyz", "/v1/status"] {
        let answer = ask(&stage, "GET", path, &[], "").await;
        fits(&description, &schema("get", path, "application/json"), &answer.json(), path);
    }
    let list = ask(&stage, "GET", "/v1/lookups/categories/by_name/Beverages", &[], "").await.json();
    let described = schema("get", "/v1/lookups/{table}/{lookup}/{value}", "application/json");
    fits(&description, &described, &list, "a list");
    for &(path, good, _) in POSTS.iter().filter(|(path, ..)| path.starts_with("/v1")) {
        let answer = ask(&stage, "POST", path, &[JSON], good).await;
        fits(&description, &schema("post", path, "application/json"), &answer.json(), path);
    }
}
