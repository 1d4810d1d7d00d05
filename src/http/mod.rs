//! Reads, health, metrics and events over HTTP.
