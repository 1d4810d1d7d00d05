//! The Grafana dashboard queries only what the daemon exports, and every panel follows the variables and has a unit.

use crate::harness::{Daemon, Postgres, Redis};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};

const DASHBOARD: &str = include_str!("../deploy/grafana/dashboards/prefetchd.json");

fn dashboard() -> Value {
    serde_json::from_str(DASHBOARD).unwrap()
}

/// Returns every query, of panels, annotations and variables.
fn queries(value: &Value, into: &mut Vec<String>) {
    match value {
        // Its query is the type of data source.
        Value::Object(fields) if fields.get("type").is_some_and(|kind| kind == "datasource") => {}
        Value::Object(fields) => {
            for (name, field) in fields {
                match field.as_str().filter(|_| ["expr", "query"].contains(&name.as_str())) {
                    // `"type": "query"` of a variable is not a query.
                    Some(query) => into.push(query.to_owned()),
                    None => queries(field, into),
                }
            }
        }
        Value::Array(items) => items.iter().for_each(|item| queries(item, into)),
        _ => {}
    }
}

/// Returns the metrics of a query, each with the labels that it selects by.
fn metrics(query: &str) -> Vec<(String, BTreeSet<String>)> {
    let of_a_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let mut found = Vec::new();
    for (at, _) in query.match_indices("prefetchd_").chain(query.match_indices("process_")) {
        if query[..at].ends_with(of_a_name) {
            continue;
        }
        let rest = &query[at..];
        let end = rest.find(|c| !of_a_name(c)).unwrap_or(rest.len());
        let labels =
            rest[end..].strip_prefix('{').and_then(|rest| rest.split_once('}')).map_or("", |(labels, _)| labels);
        let names = labels.split(',').filter_map(|label| Some(label.split_once('=')?.0.trim().to_owned()));
        found.push((rest[..end].to_owned(), names.collect()));
    }
    found
}

#[tokio::test]
async fn every_query_names_a_metric_that_exists() {
    let (postgres, redis) = (Postgres::shared(), Redis::start());
    let daemon = Daemon::start(&postgres, &redis).await;
    daemon.ready().await;
    let mut told: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for series in daemon.metrics().await.into_keys() {
        let (name, labels) = series.split_once('{').unwrap_or((&series, ""));
        let labels =
            labels.trim_end_matches('}').split("\",").filter_map(|label| Some(label.split_once('=')?.0.to_owned()));
        told.entry(name.to_owned()).or_default().extend(labels);
    }
    let mut asked = Vec::new();
    queries(&dashboard(), &mut asked);
    assert!(asked.len() > 15, "{asked:?}");
    for query in asked {
        let metrics = metrics(&query);
        assert!(!metrics.is_empty(), "no metric in {query}");
        for (name, mut labels) in metrics {
            let has = told.get(&name).unwrap_or_else(|| panic!("{name} does not exist: {query}"));
            // Those for which there is a variable.
            let is_of_a_variable = query.starts_with("label_values(");
            assert!(labels.contains("instance") || is_of_a_variable, "{name} of every instance: {query}");
            assert!(labels.contains("table") || !has.contains("table") || is_of_a_variable, "every table: {query}");
            // Prometheus adds these.
            labels.retain(|label| !["instance", "job"].contains(&label.as_str()));
            assert!(labels.is_subset(has), "{name} has {has:?}: {query}");
            let by = query.split("by (").skip(1).filter_map(|by| by.split_once(')'));
            for label in by.flat_map(|(by, _)| by.split(", ")) {
                assert!(label == "instance" || has.contains(label), "{name} has {has:?}, not {label}: {query}");
            }
        }
    }
}

#[test]
fn every_panel_has_a_unit_and_follows_the_variables() {
    let dashboard = dashboard();
    let variables = dashboard["templating"]["list"].as_array().unwrap();
    let names: Vec<_> = variables.iter().map(|variable| variable["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["datasource", "instance", "table"]);
    let events = dashboard["annotations"]["list"].as_array().unwrap();
    let panels = dashboard["panels"].as_array().unwrap();
    let mut titles = BTreeSet::new();
    for panel in panels {
        let title = panel["title"].as_str().unwrap();
        assert!(titles.insert(title), "two panels {title}");
        let unit = &panel["fieldConfig"]["defaults"]["unit"];
        assert!(unit.as_str().is_some_and(|unit| !unit.is_empty()), "{title} has no unit");
    }
    assert!(titles.contains("Roles"), "{titles:?}");
    let targets = panels.iter().flat_map(|panel| panel["targets"].as_array().unwrap());
    for asks in targets.chain(panels).chain(events).chain(&variables[1..]) {
        assert_eq!(asks["datasource"]["uid"], "${datasource}", "{asks}");
    }
    let mut asked = Vec::new();
    queries(&dashboard["panels"], &mut asked);
    queries(&dashboard["annotations"], &mut asked);
    assert!(asked.len() > panels.len(), "{asked:?}");
    for query in asked {
        for (variable, selects) in [("instance", "instance=~\"$instance\""), ("table", "table=~\"$table\"")] {
            let (label, selected) = (format!("{variable}="), query.matches(selects).count());
            assert_eq!(query.matches(&label).count(), selected, "{variable} other than by its variable: {query}");
        }
    }
    let told: Vec<_> = events.iter().map(|event| event["expr"].as_str().unwrap()).collect();
    for event in ["prefetchd_start_time_seconds", "prefetchd_heals_total", "state=~\"loading|healing\""] {
        assert!(told.iter().any(|query| query.contains(event)), "{event}: {told:?}");
    }
}
