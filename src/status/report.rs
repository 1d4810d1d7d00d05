//! The status as JSON: the body of `GET /v1/status`, which the page and `prefetchd status` read as well.

use super::state::{DeadLetterSeen, LastLoad, LastVerify, Moment, ReadCounts, Status, TableStatus};
use super::verdict::{Action, Verdict};
use crate::checkpoint::TableState;
use crate::code::Code;
use crate::nodes::NodeSeen;
use serde::Serialize;
use std::time::{Duration, SystemTime};
use utoipa::ToSchema;

impl Status {
    /// The body of `GET /v1/status`. `reads` are in configuration order, like the tables.
    pub fn to_json(&self, reads: &[ReadCounts], now: Moment, max_staleness: Duration) -> String {
        let not_ready_because = self.readiness(now, max_staleness);
        let verdict = self.verdict(now, max_staleness);
        let (hits, misses) = reads.iter().fold((0, 0), |(h, m), r| (h + r.hits, m + r.misses));
        let reads_of = |place: usize| reads.get(place).copied().unwrap_or_default();
        let tables = self.tables.iter().enumerate().map(|(place, table)| table.report(reads_of(place)));
        let report = StatusReport {
            version: env!("CARGO_PKG_VERSION"),
            state: self.state.as_str(),
            verdict: VerdictReport::of(&verdict),
            waiting_for: self.waiting_for.as_deref(),
            paused: self.paused,
            ready: not_ready_because.is_empty(),
            not_ready_because,
            operation: self.operation,
            uptime_seconds: millis(now.instant.saturating_duration_since(self.started)) / 1000.0,
            source: self.source_report(),
            lsn: LsnReport {
                received: self.received.map(|l| l.to_string()),
                applied: self.applied.map(|l| l.to_string()),
                confirmed: self.confirmed.map(|l| l.to_string()),
                server: self.server.map(|l| l.to_string()),
            },
            lag: LagReport { bytes: self.lag_bytes(), seconds: self.lag_seconds(now) },
            slot: SlotReport { retained_bytes: self.slot_retained_bytes, limit_bytes: self.slot_limit_bytes },
            nodes: self.nodes().into_iter().map(|node| self.node_report(node, now)).collect(),
            hits,
            misses,
            hit_rate_pct: (hits + misses > 0).then(|| hits as f64 * 100.0 / (hits + misses) as f64),
            prefetched: self.tables.iter().map(|t| t.prefetched).sum(),
            sync_events_applied: self.tables.iter().map(|t| t.upserts + t.deletes + t.truncates).sum(),
            sync_lag_ms: SyncLagReport {
                avg: self.sync_lag.avg_ms,
                p50: self.sync_lag.p50_ms,
                p99: self.sync_lag.p99_ms,
                count: self.sync_lag.count,
            },
            primary_reads: self.primary_reads,
            load_rate: self.load_rate.map(|rate| LoadRateReport { bytes_a_second: rate.get() }),
            dead_letters: self.dead_letters(),
            dead_letter_keys: &self.dead_letter_keys,
            last_load: self.last_load.as_ref().map(load_report),
            last_verify: self.verify_report(),
            tables: tables.collect(),
        };
        serde_json::to_string(&report).expect("the report has string keys, and a String takes any text")
    }

    fn source_report(&self) -> SourceReport<'_> {
        let source = self.source.as_ref();
        SourceReport {
            system_id: source.map(|s| s.system_id.as_str()),
            timeline: source.map(|s| s.timeline),
            database: source.map(|s| s.database.as_str()),
            slot: source.map(|s| s.slot.as_str()),
            publication: source.map(|s| s.publication.as_str()),
        }
    }

    fn node_report(&self, node: NodeSeen, now: Moment) -> NodeReport {
        let least = node.share.and_then(|share| share.least);
        NodeReport {
            hash_slots: node.hash_slots(),
            lanes: node.share.map(|share| share.lanes),
            healing: node.share.map(|share| share.healing),
            lsn: least.map(|place| place.end().to_string()),
            behind_bytes: least.and_then(|place| Some(self.applied?.0.bytes_since(place.at))),
            used_memory_bytes: node.usage.used_memory_bytes,
            max_memory_bytes: node.usage.maxmemory_bytes,
            evicted_keys: node.usage.evicted_keys,
            up: node.is_up(now.instant),
            answered_seconds_ago: node.answered.map(|at| millis(now.instant.saturating_duration_since(at)) / 1000.0),
            trouble: node.trouble(now.instant),
            node: node.at,
        }
    }

    fn verify_report(&self) -> Option<VerifyReport> {
        let report = |at, last: Option<&LastVerify>| VerifyReport {
            at,
            rows: last.map(|l| l.tally.rows),
            keys: last.map(|l| l.tally.keys()),
            missing: last.map(|l| l.tally.missing),
            stale: last.map(|l| l.tally.stale),
            orphaned: last.map(|l| l.tally.orphaned),
            lookups: last.map(|l| l.tally.lookups).filter(|members| *members > 0),
            repaired: last.map(|l| l.tally.repaired),
            elapsed_ms: last.map(|l| u64::try_from(l.elapsed.as_millis()).unwrap_or(u64::MAX)),
            lsn: last.map(|l| l.lsn.to_string()),
        };
        match (&self.last_verify, self.verified_at) {
            (Some(last), _) => Some(report(rfc3339(last.at), Some(last))),
            // From an earlier run only the time is known.
            (None, Some(time)) => Some(report(rfc3339(time), None)),
            (None, None) => None,
        }
    }
}

impl TableStatus {
    fn report(&self, reads: ReadCounts) -> TableReport<'_> {
        TableReport {
            name: &self.name,
            table: &self.table,
            loaded: self.state == Some(TableState::Loaded) && self.blocked.is_none(),
            state: self.state_name(),
            because: self.blocked.as_ref().map(|b| b.because.as_str()).or(self.because.as_deref()),
            remedy: self.blocked.as_ref().map(|b| b.remedy.as_str()),
            loading: self.load_progress.map(|(rows, estimated)| ProgressReport { rows, estimated }),
            prefetched: self.prefetched,
            upserts: self.upserts,
            deletes: self.deletes,
            truncates: self.truncates,
            hits: reads.hits,
            misses: reads.misses,
            rows: self.rows,
            compared_at: self.compared_at.and_then(rfc3339),
            verified_at: self.verified_at.and_then(rfc3339),
            not_compared: self.not_compared.as_deref(),
            checked_at: self.checked_at.and_then(rfc3339),
            drift: self.drift.drift(),
            dead_letters: self.dead_letters + self.keyless,
            more_dead_letters: self.more_dead_letters,
        }
    }
}

fn load_report(load: &LastLoad) -> LoadReport<'_> {
    LoadReport {
        rows: load.rows,
        elapsed_ms: u64::try_from(load.elapsed.as_millis()).unwrap_or(u64::MAX),
        lsn: load.lsn.to_string(),
        reason: &load.reason,
    }
}

/// UTC, with milliseconds. `None` for a time outside the years that can be represented.
pub(crate) fn rfc3339(at: SystemTime) -> Option<String> {
    jiff::Timestamp::try_from(at).ok().map(|t| format!("{t:.3}"))
}

fn millis(d: Duration) -> f64 {
    (d.as_secs_f64() * 1e6).round() / 1e3
}

/// Everything the daemon knows of itself, in the order in which people read it.
#[derive(Serialize, ToSchema)]
#[schema(as = Status)]
pub(crate) struct StatusReport<'a> {
    version: &'static str,
    /// `connecting`, `standby`, `loading`, `catching_up`, `streaming`, `healing`, `stalled`, `stopping`
    state: &'static str,
    verdict: VerdictReport<'a>,
    waiting_for: Option<&'a str>,
    paused: bool,
    /// As `/readyz` says it.
    ready: bool,
    not_ready_because: Vec<String>,
    /// The refetch or verify under way.
    operation: Option<&'static str>,
    uptime_seconds: f64,
    source: SourceReport<'a>,
    lsn: LsnReport,
    lag: LagReport,
    slot: SlotReport,
    /// The masters of a Redis Cluster, in the order of their hash slots. If all keys are in one hash slot, only its
    /// master. None if Redis is not a cluster.
    nodes: Vec<NodeReport>,
    tables: Vec<TableReport<'a>>,
    hits: u64,
    misses: u64,
    /// Null before the first read.
    hit_rate_pct: Option<f64>,
    prefetched: u64,
    sync_events_applied: u64,
    sync_lag_ms: SyncLagReport,
    /// Tables read from Postgres, one for each load or verify of a table. Never by a reader.
    primary_reads: u64,
    /// Null if loads, verifications and refetches read as fast as they can.
    load_rate: Option<LoadRateReport>,
    /// Rows that Postgres has and Redis cannot hold; of those without a key, all since the start.
    dead_letters: u64,
    /// At most 20 of them. A standby lists none.
    dead_letter_keys: &'a [DeadLetterSeen],
    last_load: Option<LoadReport<'a>>,
    last_verify: Option<VerifyReport>,
}

/// What loads, verifications and refetches may read from Postgres, all together: `cache.load_rate`.
#[derive(Serialize, ToSchema)]
#[schema(as = LoadRate)]
struct LoadRateReport {
    bytes_a_second: u64,
}

/// How it is, and what to do: the sentence that the page shows.
#[derive(Serialize, ToSchema)]
#[schema(as = Verdict)]
pub(crate) struct VerdictReport<'a> {
    /// `good`, `warning`, `bad`
    level: &'static str,
    text: &'a str,
    remedy: &'a str,
    /// The operation that mends it, if one does: `resume`, `repair` (a verify with repair), `refetch`.
    action: Option<&'static str>,
    /// Of the most serious problem: its section in docs/errors.md, as `prefetchd explain` prints it.
    code: Option<&'static str>,
}

impl<'a> VerdictReport<'a> {
    pub fn of(Verdict { level, text, remedy, action, code }: &'a Verdict) -> Self {
        let (action, code) = (action.map(Action::as_str), code.map(Code::as_str));
        VerdictReport { level: level.as_str(), text, remedy, action, code }
    }
}

#[derive(Serialize, ToSchema)]
#[schema(as = Source)]
struct SourceReport<'a> {
    system_id: Option<&'a str>,
    timeline: Option<u32>,
    database: Option<&'a str>,
    slot: Option<&'a str>,
    publication: Option<&'a str>,
}

#[derive(Serialize, ToSchema)]
#[schema(as = Positions)]
struct LsnReport {
    received: Option<String>,
    applied: Option<String>,
    confirmed: Option<String>,
    server: Option<String>,
}

#[derive(Serialize, ToSchema)]
#[schema(as = Lag)]
struct LagReport {
    bytes: Option<u64>,
    seconds: Option<f64>,
}

/// WAL that Postgres keeps for the slot, and how much that may become before it gives the slot up.
#[derive(Serialize, ToSchema)]
#[schema(as = Slot)]
struct SlotReport {
    retained_bytes: Option<u64>,
    /// Null: without limit, or not known.
    limit_bytes: Option<u64>,
}

#[derive(Serialize, ToSchema)]
#[schema(as = Node)]
struct NodeReport {
    /// Host and port.
    node: String,
    hash_slots: usize,
    /// Hash slots with rows, or that had some. This and the next three: as of about a second ago.
    lanes: Option<usize>,
    /// How many of those have lost something and are being loaded.
    healing: Option<usize>,
    /// Every lane has at least the changes up to here. One in which nothing changes is written every 25 seconds.
    lsn: Option<String>,
    /// How far that is before the applied position.
    behind_bytes: Option<u64>,
    used_memory_bytes: Option<u64>,
    /// 0: without limit.
    max_memory_bytes: Option<u64>,
    /// Since it started.
    evicted_keys: Option<u64>,
    /// Null: it has not been asked yet.
    up: Option<bool>,
    answered_seconds_ago: Option<f64>,
    /// Why it is not up, or what is waited for.
    trouble: Option<String>,
}

#[derive(Serialize, ToSchema)]
#[schema(as = Table)]
struct TableReport<'a> {
    name: &'a str,
    table: &'a str,
    loaded: bool,
    /// `loading`, `healing`, `incomplete`, `loaded`, `blocked`: the last one needs a person
    state: Option<&'static str>,
    /// Why it is blocked, or why it is loaded while it is.
    because: Option<&'a str>,
    /// What a person is to do where it is blocked.
    remedy: Option<&'a str>,
    /// Of a load that is under way.
    loading: Option<ProgressReport>,
    prefetched: u64,
    upserts: u64,
    deletes: u64,
    truncates: u64,
    hits: u64,
    misses: u64,
    /// As of the last load or verify in this life.
    rows: Option<u64>,
    compared_at: Option<String>,
    verified_at: Option<String>,
    /// Why the last comparison could not be made, until one succeeds. The table is served as before.
    not_compared: Option<&'a str>,
    /// When a verify last ended in this life, whatever it found.
    checked_at: Option<String>,
    /// Keys that it found to differ, and that nobody has repaired.
    drift: u64,
    /// Rows that Postgres has and Redis cannot hold.
    dead_letters: u64,
    /// There may be more of them than are known: every missing row is 503 `dead_letter`.
    more_dead_letters: bool,
}

#[derive(Serialize, ToSchema)]
#[schema(as = Progress)]
struct ProgressReport {
    rows: u64,
    estimated: u64,
}

#[derive(Serialize, ToSchema)]
#[schema(as = SyncLag)]
struct SyncLagReport {
    avg: Option<f64>,
    p50: Option<f64>,
    p99: Option<f64>,
    count: u64,
}

#[derive(Serialize, ToSchema)]
#[schema(as = LastLoad)]
struct LoadReport<'a> {
    rows: u64,
    elapsed_ms: u64,
    lsn: String,
    reason: &'a str,
}

#[derive(Serialize, ToSchema)]
#[schema(as = LastVerify)]
struct VerifyReport {
    at: Option<String>,
    rows: Option<u64>,
    keys: Option<u64>,
    missing: Option<u64>,
    stale: Option<u64>,
    orphaned: Option<u64>,
    /// Members of lookups that differed from their rows, if any did.
    #[serde(skip_serializing_if = "Option::is_none")]
    lookups: Option<u64>,
    repaired: Option<u64>,
    elapsed_ms: Option<u64>,
    lsn: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lsn::EndLsn;
    use crate::status::state::tests::{LIMIT, after, ready};
    use crate::status::{Source, State};
    use std::num::NonZeroU64;

    fn lsn(s: &str) -> EndLsn {
        EndLsn(s.parse().expect("a literal LSN"))
    }

    #[test]
    fn what_is_not_known_is_null() {
        let (mut status, now) = ready();
        (status.state, status.last_contact, status.tables[0].state) = (State::Connecting, None, None);
        let expected = format!(
            r#"{{"version":"{}","state":"connecting","verdict":{{"level":"warning","text":"Starting: connecting to Postgres and Redis.","remedy":"Wait. If it lasts, see that both servers run and can be reached.","action":null,"code":null}},"waiting_for":null,"paused":false,"ready":false,"#,
            env!("CARGO_PKG_VERSION")
        ) + concat!(
            r#""not_ready_because":["the stream does not run: connecting","table categories is not known yet","#,
            r#""no contact with Postgres yet"],"operation":null,"uptime_seconds":0.0,"#,
            r#""source":{"system_id":null,"timeline":null,"database":null,"slot":null,"publication":null},"#,
            r#""lsn":{"received":null,"applied":null,"confirmed":null,"server":null},"#,
            r#""lag":{"bytes":null,"seconds":null},"slot":{"retained_bytes":null,"limit_bytes":null},"#,
            r#""nodes":[],"tables":[{"name":"categories","table":"public.categories","loaded":false,"state":null,"#,
            r#""because":null,"remedy":null,"#,
            r#""loading":null,"prefetched":0,"upserts":0,"deletes":0,"truncates":0,"hits":0,"misses":0,"#,
            r#""rows":null,"compared_at":null,"verified_at":null,"not_compared":null,"#,
            r#""checked_at":null,"drift":0,"dead_letters":0,"more_dead_letters":false}],"#,
            r#""hits":0,"misses":0,"hit_rate_pct":null,"prefetched":0,"sync_events_applied":0,"#,
            r#""sync_lag_ms":{"avg":null,"p50":null,"p99":null,"count":0},"#,
            r#""primary_reads":0,"load_rate":null,"dead_letters":0,"dead_letter_keys":[],"last_load":null,"last_verify":null}"#
        );
        assert_eq!(status.to_json(&[], now, LIMIT), expected);
    }

    #[test]
    fn what_is_known_is_shown() {
        let (mut status, now) = ready();
        status.source = Some(Source {
            system_id: "7000".to_owned(),
            timeline: 2,
            database: "shop".to_owned(),
            slot: "s".to_owned(),
            publication: "p".to_owned(),
            wal_segment_bytes: 16 << 20,
        });
        (status.applied, status.server) = (Some(lsn("0/10")), Some(lsn("0/1A").0));
        let table = &mut status.tables[0];
        (table.prefetched, table.upserts, table.deletes, table.load_progress) = (5, 3, 1, Some((7, 9)));
        status.last_load = Some(LastLoad {
            rows: 5,
            elapsed: Duration::from_micros(12_700),
            lsn: lsn("0/1A"),
            reason: "first start".to_owned(),
        });
        let now = after(now, Duration::from_millis(12_345));
        (status.slot_retained_bytes, status.slot_limit_bytes) = (Some(100), Some(200));
        (status.tables[0].rows, status.load_rate) = (Some(4), NonZeroU64::new(5));
        let json = status.to_json(&[ReadCounts { hits: 3, misses: 1 }], now, LIMIT);
        let json: serde_json::Value = serde_json::from_str(&json).expect("JSON");
        for (pointer, value) in [
            ("/uptime_seconds", serde_json::json!(12.345)),
            ("/source/timeline", 2.into()),
            ("/lsn/applied", "0/10".into()),
            ("/lag/bytes", 10.into()),
            ("/slot", serde_json::json!({"retained_bytes": 100, "limit_bytes": 200})),
            ("/load_rate", serde_json::json!({"bytes_a_second": 5})),
            ("/tables/0/rows", 4.into()),
            ("/tables/0/loaded", true.into()),
            ("/tables/0/state", "loaded".into()),
            ("/tables/0/loading", serde_json::json!({"rows": 7, "estimated": 9})),
            ("/tables/0/hits", 3.into()),
            ("/hit_rate_pct", serde_json::json!(75.0)),
            ("/prefetched", 5.into()),
            ("/sync_events_applied", 4.into()),
            ("/last_load", serde_json::json!({"rows": 5, "elapsed_ms": 12, "lsn": "0/1A", "reason": "first start"})),
        ] {
            assert_eq!(json.pointer(pointer), Some(&value), "{pointer}");
        }
    }
}
