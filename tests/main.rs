//! The integration tests. They are one program, so that one Postgres and one build serve them all.
//!
//! They start their own servers, see [`harness`], and use no others.

#![allow(clippy::unwrap_used, reason = "a test that panics is a test that fails")]

mod harness;

mod access;
mod admin;
mod aof;
mod changes;
mod chaos;
mod check;
mod cluster;
mod commands;
mod comparisons;
mod confirm;
mod demo;
mod deploy;
mod differential;
mod failover;
mod faults;
mod grafana;
mod history;
mod hostile;
mod http;
mod json;
mod kill;
mod lane_durability;
mod lane_lookups;
mod lane_reads;
mod lane_script;
mod lanes;
mod lanes_faults;
mod lanes_nodes;
mod lanes_resize;
mod lanes_trials;
mod layers;
mod limits;
mod lists;
mod load;
mod lookups;
mod nodes;
mod notify;
mod openapi;
mod owners;
mod packed;
mod page;
mod page_states;
mod poison;
mod privileges;
mod prometheus;
mod provider;
mod reads;
mod redis_ways;
mod redisjson;
mod reload;
mod remedies;
mod rotation;
mod rows;
mod schema;
mod search;
mod sessions;
mod setup;
mod slot;
mod source;
mod source_tls;
mod standby;
mod stopping;
mod stream;
mod support;
mod teardown;
mod terminal;
mod ttl;
mod typed;
mod types;
mod verdict;
