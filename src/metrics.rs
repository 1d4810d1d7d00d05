//! What Prometheus scrapes: every name, label and bucket, and the only code that turns [`Status`] into gauges.
//!
//! It must not know where a number comes from: the bridge and the reads count their own events, and the gauges are set
//! from the status at each scrape. Labels are bounded by the configuration, by enums, and by the masters of the cluster.
//! Except for those, every child exists from the start, because `increase()` misses the first event of a series that did not exist before. An unknown number is NaN,
//! so that no alert mistakes it for a healthy one.

use crate::command::Op;
use crate::nodes::NodeSeen;
use crate::reason::Heal;
use crate::schema::{TableId, TableSpec};
use crate::status::{Moment, ReadCounts, State, Status};
use prometheus::{
    Gauge, GaugeVec, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
    TextEncoder,
};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, UNIX_EPOCH};

/// From the commit in Postgres to the acknowledgement by Redis: a loopback round trip as well as an outage.
const SYNC_LAG_BUCKETS: &[f64] =
    &[0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];
const LOAD_BUCKETS: &[f64] = &[0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 14400.0];
/// A read may wait for an LSN up to 30 s.
const READ_BUCKETS: &[f64] =
    &[0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 0.25, 1.0, 2.5, 10.0, 30.0];
const BATCH_BUCKETS: &[f64] = &[0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 30.0];
const BATCH_CHANGES_BUCKETS: &[f64] = &[1.0, 2.0, 5.0, 10.0, 25.0, 100.0, 500.0, 1000.0, 5000.0, 10_000.0, 100_000.0];

/// Dead-letter reasons whose series exist from the start. Others may be added; they are constants in the code, never
/// data.
const DEAD_LETTER_REASONS: &[&str] = &["null_key", "key_not_sent", "too_large", "unrepresentable", "unparsable"];

/// The peer to which a connection was lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Peer {
    Postgres,
    Redis,
}

impl Peer {
    const ALL: [Peer; 2] = [Peer::Postgres, Peer::Redis];

    fn as_str(self) -> &'static str {
        match self {
            Peer::Postgres => "postgres",
            Peer::Redis => "redis",
        }
    }
}

/// Why the caller of an operation was rejected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AdminRefused {
    /// The request had no token.
    Missing,
    Wrong,
}

impl AdminRefused {
    const ALL: [AdminRefused; 2] = [AdminRefused::Missing, AdminRefused::Wrong];

    fn as_str(self) -> &'static str {
        match self {
            AdminRefused::Missing => "missing",
            AdminRefused::Wrong => "wrong",
        }
    }
}

/// What a comparison found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Drift {
    Missing,
    Stale,
    Orphaned,
    /// A member of a lookup.
    Lookup,
}

impl Drift {
    const ALL: [Drift; 4] = [Drift::Missing, Drift::Stale, Drift::Orphaned, Drift::Lookup];

    fn as_str(self) -> &'static str {
        match self {
            Drift::Missing => "missing",
            Drift::Stale => "stale",
            Drift::Orphaned => "orphaned",
            Drift::Lookup => "lookup",
        }
    }
}

/// How the read of a row ended. Malformed requests are not counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReadResult {
    Hit,
    /// Known not to exist.
    Miss,
    /// Answered with 503 or 504.
    Error,
}

/// All of the daemon's metrics, in a registry of their own.
pub struct Metrics {
    registry: Registry,
    /// In configuration order.
    tables: Vec<TableMetrics>,
    families: TableFamilies,
    counters: Counters,
    histograms: Histograms,
    /// Locked, so that one scrape shows one status.
    gauges: Arc<Mutex<StatusGauges>>,
}

/// The series of one table.
struct TableMetrics {
    name: String,
    upserts: IntCounter,
    deletes: IntCounter,
    truncates: IntCounter,
    rows_loaded: IntCounter,
    hits: IntCounter,
    misses: IntCounter,
    errors: IntCounter,
    drift: [IntCounter; 4],
    keys: IntGauge,
}

/// The families whose children [`TableMetrics`] holds.
#[derive(Clone)]
struct TableFamilies {
    changes: IntCounterVec,
    rows_loaded: IntCounterVec,
    reads: IntCounterVec,
    drift: IntCounterVec,
    keys: IntGaugeVec,
}

/// Events of the daemon as a whole; dead letters by table.
#[derive(Clone)]
struct Counters {
    transactions_applied: IntCounter,
    ttl_renewals: IntCounter,
    primary_reads: IntCounter,
    reconnects: IntCounterVec,
    admin_refused: IntCounterVec,
    heals: IntCounterVec,
    dead_letters: IntCounterVec,
}

#[derive(Clone)]
struct Histograms {
    sync_lag: Histogram,
    load_duration: Histogram,
    read_duration: Histogram,
    batch_duration: Histogram,
    batch_changes: Histogram,
}

/// Gauges that are copies of the status.
struct StatusGauges {
    state: IntGaugeVec,
    ready: Gauge,
    lag_seconds: Gauge,
    lag_bytes: Gauge,
    slot_retained_bytes: Gauge,
    slot_limit_bytes: Gauge,
    last_verify: Gauge,
    lsn: GaugeVec,
    nodes: Vec<NodeGauge>,
}

/// One figure of each master of a Redis Cluster.
struct NodeGauge {
    series: GaugeVec,
    of: OfNode,
}

type OfNode = fn(&NodeSeen, Instant) -> f64;

/// The name, the help text, and the figure.
const NODE_GAUGES: &[(&str, &str, OfNode)] = &[
    ("prefetchd_redis_node_up", "1 while this master answers, 0 while it does not.", |node, now| {
        node.is_up(now).map_or(f64::NAN, |up| f64::from(u8::from(up)))
    }),
    ("prefetchd_redis_node_hash_slots", "Hash slots that this master serves.", |node, _| node.hash_slots() as f64),
    ("prefetchd_redis_node_lanes", "Hash slots with rows on this master.", |node, _| {
        known(node.share.map(|share| share.lanes as u64))
    }),
    (
        "prefetchd_redis_node_healing_lanes",
        "Hash slots on this master that have lost something and are being loaded.",
        |node, _| known(node.share.map(|share| share.healing as u64)),
    ),
    (
        "prefetchd_redis_node_lsn",
        "WAL position that every lane on this master has reached, as a byte number.",
        |node, _| known(node.share.and_then(|share| share.least).map(|place| place.at.get())),
    ),
    ("prefetchd_redis_node_used_memory_bytes", "Memory that this master uses.", |node, _| {
        known(node.usage.used_memory_bytes)
    }),
    ("prefetchd_redis_node_max_memory_bytes", "maxmemory of this master; 0 for no limit.", |node, _| {
        known(node.usage.maxmemory_bytes)
    }),
    ("prefetchd_redis_node_evicted_keys", "Keys that this master has evicted since it started.", |node, _| {
        known(node.usage.evicted_keys)
    }),
];

impl TableFamilies {
    fn register(into: &Registry) -> Self {
        Self {
            changes: counter_vec(
                into,
                "prefetchd_changes_applied_total",
                "Changes from the stream that Redis acknowledged.",
                &["table", "op"],
            ),
            rows_loaded: counter_vec(
                into,
                "prefetchd_rows_loaded_total",
                "Rows read from Postgres by loads.",
                &["table"],
            ),
            reads: counter_vec(into, "prefetchd_reads_total", "Rows asked for over HTTP.", &["table", "result"]),
            drift: counter_vec(
                into,
                "prefetchd_drift_total",
                "Differences between Postgres and Redis that a verify found.",
                &["table", "kind"],
            ),
            keys: int_gauge_vec(into, "prefetchd_keys", "Keys as of the last load or verify.", &["table"]),
        }
    }

    /// Removes the series of a table.
    fn forget(&self, table: &str) {
        // They may be gone already.
        for op in [Op::Upsert, Op::Delete, Op::Truncate] {
            let _ = self.changes.remove_label_values(&[table, op.as_str()]);
        }
        for result in ["hit", "miss", "error"] {
            let _ = self.reads.remove_label_values(&[table, result]);
        }
        for kind in Drift::ALL {
            let _ = self.drift.remove_label_values(&[table, kind.as_str()]);
        }
        let _ = self.rows_loaded.remove_label_values(&[table]);
        let _ = self.keys.remove_label_values(&[table]);
    }

    fn of(&self, table: &TableSpec) -> TableMetrics {
        let name = table.name.as_str();
        let changes = |op: Op| self.changes.with_label_values(&[name, op.as_str()]);
        let reads = |result| self.reads.with_label_values(&[name, result]);
        TableMetrics {
            name: name.to_owned(),
            upserts: changes(Op::Upsert),
            deletes: changes(Op::Delete),
            truncates: changes(Op::Truncate),
            rows_loaded: self.rows_loaded.with_label_values(&[name]),
            hits: reads("hit"),
            misses: reads("miss"),
            errors: reads("error"),
            drift: Drift::ALL.map(|kind| self.drift.with_label_values(&[name, kind.as_str()])),
            keys: self.keys.with_label_values(&[name]),
        }
    }
}

impl Counters {
    /// Removes the series of a table.
    fn forget(&self, table: &str) {
        for reason in DEAD_LETTER_REASONS {
            // It may be gone already.
            let _ = self.dead_letters.remove_label_values(&[table, reason]);
        }
    }

    fn register(into: &Registry) -> Self {
        Self {
            transactions_applied: counter(
                into,
                "prefetchd_transactions_applied_total",
                "Postgres transactions that Redis acknowledged.",
            ),
            ttl_renewals: counter(
                into,
                "prefetchd_ttl_renewals_total",
                "Keys whose TTL was set to its full value again.",
            ),
            primary_reads: counter(
                into,
                "prefetchd_primary_reads_total",
                "Tables read from Postgres: one per load or verify of a table, never one per read.",
            ),
            reconnects: counter_vec(
                into,
                "prefetchd_reconnects_total",
                "Connections that were lost and made again.",
                &["peer"],
            ),
            admin_refused: counter_vec(
                into,
                "prefetchd_admin_refused_total",
                "Requests for operations without a token, or with a wrong one.",
                &["token"],
            ),
            heals: counter_vec(
                into,
                "prefetchd_heals_total",
                "Times that tables had to be loaded again to be right.",
                &["reason"],
            ),
            dead_letters: counter_vec(
                into,
                "prefetchd_dead_letters_total",
                "Changes that could not become a row in Redis.",
                &["table", "reason"],
            ),
        }
    }

    /// Creates every series at zero.
    fn start(&self, tables: &[TableSpec]) {
        for peer in Peer::ALL {
            self.reconnects.with_label_values(&[peer.as_str()]);
        }
        for reason in AdminRefused::ALL {
            self.admin_refused.with_label_values(&[reason.as_str()]);
        }
        for reason in Heal::ALL {
            self.heals.with_label_values(&[reason.as_str()]);
        }
        for table in tables {
            for reason in DEAD_LETTER_REASONS {
                self.dead_letters.with_label_values(&[table.name.as_str(), reason]);
            }
        }
    }
}

impl Histograms {
    fn register(into: &Registry) -> Self {
        Self {
            sync_lag: histogram(
                into,
                "prefetchd_sync_lag_seconds",
                "Commit in Postgres to acknowledged by Redis.",
                SYNC_LAG_BUCKETS,
            ),
            load_duration: histogram(into, "prefetchd_load_duration_seconds", "Loads of whole tables.", LOAD_BUCKETS),
            read_duration: histogram(
                into,
                "prefetchd_read_duration_seconds",
                "Reads over HTTP, waiting for an LSN included.",
                READ_BUCKETS,
            ),
            batch_duration: histogram(
                into,
                "prefetchd_redis_batch_duration_seconds",
                "A batch from its first byte to Redis's last reply.",
                BATCH_BUCKETS,
            ),
            batch_changes: histogram(
                into,
                "prefetchd_redis_batch_changes",
                "Changes in a batch.",
                BATCH_CHANGES_BUCKETS,
            ),
        }
    }
}

impl StatusGauges {
    fn register(into: &Registry) -> Self {
        Self {
            state: int_gauge_vec(
                into,
                "prefetchd_state",
                "1 for the state that the daemon is in, 0 for the others.",
                &["state"],
            ),
            ready: gauge(into, "prefetchd_ready", "1 while /readyz answers 200."),
            lag_seconds: gauge(
                into,
                "prefetchd_replication_lag_seconds",
                "Age of the oldest commit received and not applied, or time without contact to Postgres.",
            ),
            lag_bytes: gauge(
                into,
                "prefetchd_replication_lag_bytes",
                "WAL between the server's position and what is applied.",
            ),
            slot_retained_bytes: gauge(
                into,
                "prefetchd_slot_retained_bytes",
                "WAL that Postgres keeps because of the slot.",
            ),
            slot_limit_bytes: gauge(
                into,
                "prefetchd_slot_limit_bytes",
                "max_slot_wal_keep_size: beyond it Postgres invalidates the slot.",
            ),
            last_verify: gauge(
                into,
                "prefetchd_last_verify_timestamp_seconds",
                "When the last successful verify of every table began, in Unix time; 0 before the first.",
            ),
            lsn: gauge_vec(into, "prefetchd_lsn", "WAL positions, as byte numbers.", &["point"]),
            nodes: NODE_GAUGES
                .iter()
                .map(|(name, help, of)| NodeGauge { series: gauge_vec(into, name, help, &["node"]), of: *of })
                .collect(),
        }
    }
}

impl Metrics {
    /// Registers everything, and creates the series of each of `tables` at zero.
    pub fn new(tables: &[TableSpec]) -> Self {
        let registry = Registry::new();
        let build = gauge_vec(&registry, "prefetchd_build_info", "Always 1; the labels say what runs.", &["version"]);
        build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1.0);
        // process_start_time_seconds is 0 where /proc shows processes only, as under the packaged systemd unit.
        gauge(&registry, "prefetchd_start_time_seconds", "When this daemon started, in Unix time.")
            .set(UNIX_EPOCH.elapsed().map_or(f64::NAN, |since| since.as_secs_f64()));
        #[cfg(target_os = "linux")]
        register(&registry, prometheus::process_collector::ProcessCollector::for_self());
        let families = TableFamilies::register(&registry);
        let counters = Counters::register(&registry);
        counters.start(tables);
        Self {
            tables: tables.iter().map(|table| families.of(table)).collect(),
            families,
            counters,
            histograms: Histograms::register(&registry),
            gauges: Arc::new(Mutex::new(StatusGauges::register(&registry))),
            registry,
        }
    }

    /// The same metrics for other tables. Those of a table that both have go on counting.
    pub fn for_tables(&self, tables: &[TableSpec]) -> Self {
        self.counters.start(tables);
        Metrics {
            registry: self.registry.clone(),
            tables: tables.iter().map(|table| self.families.of(table)).collect(),
            families: self.families.clone(),
            counters: self.counters.clone(),
            histograms: self.histograms.clone(),
            gauges: self.gauges.clone(),
        }
    }

    /// Removes the series of a table.
    pub fn forget(&self, table: &str) {
        self.families.forget(table);
        self.counters.forget(table);
    }

    pub fn changes_applied(&self, table: TableId, op: Op, changes: u64) {
        let Some(table) = self.tables.get(table.index()) else { return };
        match op {
            Op::Upsert => &table.upserts,
            Op::Delete => &table.deletes,
            Op::Truncate => &table.truncates,
        }
        .inc_by(changes);
    }

    pub fn transactions_applied(&self, transactions: u64) {
        self.counters.transactions_applied.inc_by(transactions);
    }

    pub fn rows_loaded(&self, table: TableId, rows: u64) {
        if let Some(table) = self.tables.get(table.index()) {
            table.rows_loaded.inc_by(rows);
        }
    }

    /// Sets the number of keys of a table, as just counted by a load or verify.
    pub fn keys(&self, table: TableId, keys: u64) {
        if let Some(table) = self.tables.get(table.index()) {
            table.keys.set(i64::try_from(keys).unwrap_or(i64::MAX));
        }
    }

    pub fn observe_sync_lag(&self, lag: Duration) {
        self.histograms.sync_lag.observe(lag.as_secs_f64());
    }

    pub fn redis_batch(&self, took: Duration, changes: u64) {
        self.histograms.batch_duration.observe(took.as_secs_f64());
        self.histograms.batch_changes.observe(changes as f64);
    }

    /// A connection was lost and is being re-established.
    pub fn reconnected(&self, peer: Peer) {
        self.counters.reconnects.with_label_values(&[peer.as_str()]).inc();
    }

    pub fn admin_refused(&self, reason: AdminRefused) {
        self.counters.admin_refused.with_label_values(&[reason.as_str()]).inc();
    }

    pub fn healed(&self, reason: Heal) {
        self.counters.heals.with_label_values(&[reason.as_str()]).inc();
    }

    pub fn ttl_renewals(&self, keys: u64) {
        self.counters.ttl_renewals.inc_by(keys);
    }

    /// `reason` is a constant from the code (`null_key`), never a message, so that labels stay bounded.
    pub fn dead_letter(&self, table: TableId, reason: &'static str) {
        if let Some(table) = self.tables.get(table.index()) {
            self.counters.dead_letters.with_label_values(&[table.name.as_str(), reason]).inc();
        }
    }

    /// A load or verify of one table began to read Postgres.
    pub fn primary_read(&self) {
        self.counters.primary_reads.inc();
    }

    pub fn load_duration(&self, took: Duration) {
        self.histograms.load_duration.observe(took.as_secs_f64());
    }

    pub fn drift(&self, table: TableId, kind: Drift, keys: u64) {
        if let Some(table) = self.tables.get(table.index()) {
            table.drift[kind as usize].inc_by(keys);
        }
    }

    /// Counts `rows` rows of one request with this result.
    pub fn read(&self, table: TableId, result: ReadResult, rows: u64) {
        let Some(table) = self.tables.get(table.index()) else { return };
        match result {
            ReadResult::Hit => &table.hits,
            ReadResult::Miss => &table.misses,
            ReadResult::Error => &table.errors,
        }
        .inc_by(rows);
    }

    pub fn observe_read(&self, took: Duration) {
        self.histograms.read_duration.observe(took.as_secs_f64());
    }

    /// Returns the counts of each table, in configuration order.
    pub fn read_counts(&self) -> Vec<ReadCounts> {
        self.tables.iter().map(|t| ReadCounts { hits: t.hits.get(), misses: t.misses.get() }).collect()
    }

    /// Returns the counts of the table with this name, which is most likely at this place.
    pub fn read_counts_of(&self, place: usize, name: &str) -> ReadCounts {
        let at_place = self.tables.get(place).filter(|of| of.name == name);
        let table = at_place.or_else(|| self.tables.iter().find(|of| of.name == name));
        table.map(|t| ReadCounts { hits: t.hits.get(), misses: t.misses.get() }).unwrap_or_default()
    }

    /// Returns how many reads of rows were answered with an error.
    pub fn read_errors(&self) -> u64 {
        self.tables.iter().map(|t| t.errors.get()).sum()
    }

    /// Renders the text format, version 0.0.4.
    /// <https://prometheus.io/docs/instrumenting/exposition_formats/>
    pub fn render(&self, status: &Status, now: Moment, max_staleness: Duration) -> String {
        // Held until the text is complete: another scrape sets the gauges.
        let gauges = self.gauges.lock().unwrap_or_else(PoisonError::into_inner);
        gauges.follow(status, now, max_staleness);
        TextEncoder::new()
            .encode_to_string(&self.registry.gather())
            .expect("every family has a name and children, and a String takes any text")
    }
}

impl StatusGauges {
    fn follow(&self, status: &Status, now: Moment, max_staleness: Duration) {
        for state in State::ALL {
            self.state.with_label_values(&[state.as_str()]).set(i64::from(state == status.state));
        }
        let ready = status.readiness(now, max_staleness).is_empty();
        self.ready.set(if ready { 1.0 } else { 0.0 });
        self.lag_seconds.set(status.lag_seconds(now).unwrap_or(f64::NAN));
        self.lag_bytes.set(known(status.lag_bytes()));
        self.slot_retained_bytes.set(known(status.slot_retained_bytes));
        self.slot_limit_bytes.set(known(status.slot_limit_bytes));
        let verified = status.verified_at.and_then(|at| at.duration_since(UNIX_EPOCH).ok());
        self.last_verify.set(verified.map_or(0.0, |at| at.as_secs_f64()));
        for (point, lsn) in [
            ("received", status.received.map(|l| l.0)),
            ("applied", status.applied.map(|l| l.0)),
            ("confirmed", status.confirmed.map(|l| l.0)),
            ("server", status.server),
        ] {
            self.lsn.with_label_values(&[point]).set(known(lsn.map(|l| l.get())));
        }
        let nodes = status.nodes();
        for gauge in &self.nodes {
            // Masters come and go.
            gauge.series.reset();
            nodes.iter().for_each(|node| {
                gauge.series.with_label_values(&[&node.at]).set((gauge.of)(node, now.instant));
            });
        }
    }
}

fn known(value: Option<u64>) -> f64 {
    value.map_or(f64::NAN, |v| v as f64)
}

fn register<C: prometheus::core::Collector + 'static>(registry: &Registry, collector: C) {
    registry.register(Box::new(collector)).expect("every metric is registered once, under a name of its own");
}

fn counter(registry: &Registry, name: &str, help: &str) -> IntCounter {
    let counter = IntCounter::new(name, help).expect("the metric's name is valid");
    register(registry, counter.clone());
    counter
}

fn counter_vec(registry: &Registry, name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
    let vec = IntCounterVec::new(Opts::new(name, help), labels).expect("the metric's name and labels are valid");
    register(registry, vec.clone());
    vec
}

fn gauge(registry: &Registry, name: &str, help: &str) -> Gauge {
    let gauge = Gauge::new(name, help).expect("the metric's name is valid");
    register(registry, gauge.clone());
    gauge
}

fn gauge_vec(registry: &Registry, name: &str, help: &str, labels: &[&str]) -> GaugeVec {
    let vec = GaugeVec::new(Opts::new(name, help), labels).expect("the metric's name and labels are valid");
    register(registry, vec.clone());
    vec
}

fn int_gauge_vec(registry: &Registry, name: &str, help: &str, labels: &[&str]) -> IntGaugeVec {
    let vec = IntGaugeVec::new(Opts::new(name, help), labels).expect("the metric's name and labels are valid");
    register(registry, vec.clone());
    vec
}

fn histogram(registry: &Registry, name: &str, help: &str, buckets: &[f64]) -> Histogram {
    let opts = HistogramOpts::new(name, help).buckets(buckets.to_vec());
    let histogram = Histogram::with_opts(opts).expect("the metric's name is valid and its buckets ascend");
    register(registry, histogram.clone());
    histogram
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::Place;
    use crate::format::Format;
    use crate::lanes::book::Share;
    use crate::lsn::EndLsn;
    use crate::nodes::{Nodes, Usage};
    use crate::schema::{KeyTemplate, NullRule, QualifiedName};
    use crate::status::Keys;

    fn spec(id: u16, name: &str) -> TableSpec {
        TableSpec {
            id: TableId(id),
            name: name.to_owned(),
            table: QualifiedName { schema: "public".to_owned(), table: name.to_owned() },
            key: KeyTemplate { literal: format!("cache:{name}:"), columns: vec!["id".to_owned()] },
            columns: vec![],
            rename: vec![],
            null: NullRule::Empty,
            ttl_ms: 1000,
            format: Format::Hash,
            lookups: Vec::new(),
        }
    }

    #[test]
    fn a_fresh_daemon_shows_every_name_with_a_zero_for_every_table() {
        let tables = [spec(0, "categories"), spec(1, "orders")];
        let metrics = Metrics::new(&tables);
        let text = metrics.render(&Status::starting(&tables), Moment::now(), Duration::from_secs(30));
        for line in [
            "prefetchd_build_info{version=\"0.1.0\"} 1",
            "prefetchd_state{state=\"connecting\"} 1",
            "prefetchd_state{state=\"streaming\"} 0",
            "prefetchd_ready 0",
            "prefetchd_replication_lag_seconds NaN",
            "prefetchd_replication_lag_bytes NaN",
            "prefetchd_slot_retained_bytes NaN",
            "prefetchd_slot_limit_bytes NaN",
            "prefetchd_lsn{point=\"server\"} NaN",
            "prefetchd_last_verify_timestamp_seconds 0",
            "prefetchd_keys{table=\"orders\"} 0",
            "prefetchd_sync_lag_seconds_bucket{le=\"0.0005\"} 0",
            "prefetchd_sync_lag_seconds_bucket{le=\"60\"} 0",
            "prefetchd_load_duration_seconds_count 0",
            "prefetchd_read_duration_seconds_count 0",
            "prefetchd_redis_batch_duration_seconds_count 0",
            "prefetchd_redis_batch_changes_count 0",
            "prefetchd_changes_applied_total{op=\"truncate\",table=\"categories\"} 0",
            "prefetchd_transactions_applied_total 0",
            "prefetchd_rows_loaded_total{table=\"orders\"} 0",
            "prefetchd_reads_total{result=\"error\",table=\"orders\"} 0",
            "prefetchd_reconnects_total{peer=\"redis\"} 0",
            "prefetchd_admin_refused_total{token=\"wrong\"} 0",
            "prefetchd_heals_total{reason=\"redis_lost\"} 0",
            "prefetchd_drift_total{kind=\"orphaned\",table=\"orders\"} 0",
            "prefetchd_ttl_renewals_total 0",
            "prefetchd_dead_letters_total{reason=\"null_key\",table=\"orders\"} 0",
            "prefetchd_primary_reads_total 0",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
        let started = text.lines().find_map(|l| l.strip_prefix("prefetchd_start_time_seconds "));
        let started: f64 = started.and_then(|value| value.parse().ok()).expect("a number");
        let age = UNIX_EPOCH.elapsed().expect("later than 1970").as_secs_f64() - started;
        assert!((0.0..3600.0).contains(&age), "{started}");
        #[cfg(target_os = "linux")]
        assert!(text.contains("process_resident_memory_bytes"), "{text}");
    }

    #[test]
    fn what_is_counted_shows() {
        let tables = [spec(0, "categories"), spec(1, "orders")];
        let metrics = Metrics::new(&tables);
        metrics.changes_applied(TableId(1), Op::Delete, 3);
        metrics.drift(TableId(0), Drift::Stale, 2);
        metrics.dead_letter(TableId(0), "empty_key");
        metrics.read(TableId(0), ReadResult::Hit, 2);
        metrics.read(TableId(0), ReadResult::Miss, 1);
        metrics.observe_sync_lag(Duration::from_millis(2));
        let text = metrics.render(&Status::starting(&tables), Moment::now(), Duration::from_secs(30));
        for line in [
            "prefetchd_changes_applied_total{op=\"delete\",table=\"orders\"} 3",
            "prefetchd_drift_total{kind=\"stale\",table=\"categories\"} 2",
            "prefetchd_dead_letters_total{reason=\"empty_key\",table=\"categories\"} 1",
            "prefetchd_sync_lag_seconds_bucket{le=\"0.001\"} 0",
            "prefetchd_sync_lag_seconds_bucket{le=\"0.0025\"} 1",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
        assert_eq!(metrics.read_counts(), [ReadCounts { hits: 2, misses: 1 }, ReadCounts::default()]);
    }

    #[test]
    fn masters_of_a_cluster_come_and_go() {
        let tables = [spec(0, "categories")];
        let (metrics, nodes) = (Metrics::new(&tables), Nodes::default());
        let keys = Some(Keys { nodes: nodes.clone(), only: None });
        let status = Status { keys, ..Status::starting(&tables) };
        let shown = || {
            let text = metrics.render(&status, Moment::now(), Duration::from_secs(30));
            let lines = text.lines().filter(|line| line.starts_with("prefetchd_redis_node"));
            lines.map(|line| line.trim_start_matches("prefetchd_redis_node_").to_owned()).collect::<Vec<_>>()
        };
        assert_eq!(shown(), [""; 0]);
        nodes.discovered([("a:1".to_owned(), vec![0..=9, 20..=29]), ("b:1".to_owned(), vec![10..=19])].into_iter());
        nodes.reports("a:1", Ok(Usage { used_memory_bytes: Some(7), maxmemory_bytes: Some(0), evicted_keys: None }));
        nodes.holds(
            "a:1",
            Share { lanes: 3, healing: 1, least: Some(Place::between(EndLsn("0/1A".parse().expect("an LSN")))) },
        );
        nodes.failed("b:1", "refused".to_owned());
        let text = shown();
        for line in [
            "up{node=\"a:1\"} 1",
            "up{node=\"b:1\"} 0",
            "hash_slots{node=\"a:1\"} 20",
            "lanes{node=\"a:1\"} 3",
            "lanes{node=\"b:1\"} NaN",
            "healing_lanes{node=\"a:1\"} 1",
            "lsn{node=\"a:1\"} 26",
            "used_memory_bytes{node=\"a:1\"} 7",
            "max_memory_bytes{node=\"a:1\"} 0",
            "evicted_keys{node=\"a:1\"} NaN",
        ] {
            assert!(text.iter().any(|l| l == line), "{line} is not in {text:#?}");
        }
        nodes.discovered([("b:1".to_owned(), vec![0..=29])].into_iter());
        assert!(shown().iter().all(|line| !line.contains("a:1")), "{:?}", shown());
    }

    #[test]
    fn a_table_that_is_not_configured_counts_nothing() {
        let metrics = Metrics::new(&[spec(0, "categories")]);
        metrics.changes_applied(TableId(7), Op::Upsert, 1);
        metrics.read(TableId(7), ReadResult::Hit, 1);
        metrics.dead_letter(TableId(7), "null_key");
    }
}
