//! Reports what a session does to the log, the metrics, the status and the listeners to events.
//!
//! It decides nothing. Changes of the status are published together, once for each turn of the loop: publishing wakes
//! everything that waits for a position, and copies the status if somebody is reading it. A mistake here tells people
//! and monitoring something other than what happens.

use super::context::Context;
use crate::admin::{DriftKind, Tally};
use crate::checkpoint::{Blocked, TableState};
use crate::code::Code;
use crate::command::{Key, Op};
use crate::history::{Kind, Load};
use crate::lsn::EndLsn;
use crate::metrics::Drift;
use crate::reason::{Heal, Reason};
use crate::schema::TableId;
use crate::session::load_messages::{LoadOrder, Purpose};
use crate::session::operation::Heavy;
use crate::session::{Applied, Machine, Observed};
use crate::status::{ChangeEvent, DEAD_LETTERS_SHOWN, DeadLetterSeen, LastLoad, LastVerify, Level, State, Status};
use crate::words::counted;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Summarizing the lags copies them.
const LAGS_SHOWN_EVERY: Duration = Duration::from_millis(5);
/// The daemon is streaming, as opposed to catching up, if Redis was current this recently.
const CAUGHT_UP: Duration = Duration::from_secs(5);

type StatusChange = Box<dyn FnOnce(&mut Status) + Send>;

pub struct Observers<'a> {
    ctx: &'a Context,
    /// Not published yet.
    changes: Vec<StatusChange>,
    /// Sent after `changes` are published.
    events: Vec<ChangeEvent>,
    lags_shown: Instant,
    /// When the load that ended last had begun.
    load_began: Option<Instant>,
    /// Loads that nothing is said of yet, because others are about to begin or to end.
    begun: Vec<(TableId, &'static str, String)>,
    ended: Vec<LoadEnded>,
    ended_first: Option<Instant>,
    under_way: BTreeSet<TableId>,
}

struct LoadEnded {
    table: TableId,
    rows: u64,
    started: Instant,
    elapsed: Duration,
    lsn: EndLsn,
    because: String,
}

/// Up to this many loads that begin, or end, together have a line each.
const LOADS_SAID_ONE_BY_ONE: usize = 3;
/// How long the end of a load may go unsaid while others are under way.
const LOADS_HELD: Duration = Duration::from_secs(1);

/// What is known outside the machine.
pub struct Surroundings {
    /// Which server, or hash slot, a batch has been waiting for.
    pub stalled: Option<String>,
    /// What prevents applied changes from being durable.
    pub not_durable: Option<String>,
    /// What fails beside the stream.
    pub beside_stream: Option<String>,
    /// When Postgres was last heard from.
    pub last_contact: Instant,
}

impl<'a> Observers<'a> {
    pub fn new(ctx: &'a Context) -> Self {
        Self {
            ctx,
            changes: Vec::new(),
            events: Vec::new(),
            lags_shown: Instant::now(),
            load_began: None,
            begun: Vec::new(),
            ended: Vec::new(),
            ended_first: None,
            under_way: BTreeSet::new(),
        }
    }

    fn name(&self, table: TableId) -> &'a str {
        &self.ctx.specs[table.index()].name
    }

    fn change(&mut self, change: impl FnOnce(&mut Status) + Send + 'static) {
        self.changes.push(Box::new(change));
    }

    /// Publishes what has changed since the last time.
    pub fn publish(&mut self) {
        self.say_begun();
        let is_due = self.ended_first.is_some_and(|first| first.elapsed() >= LOADS_HELD);
        if self.under_way.is_empty() || is_due {
            self.say_ended();
        }
        if !self.changes.is_empty() {
            self.ctx.update(|status| self.changes.drain(..).for_each(|change| change(status)));
        }
        for event in self.events.drain(..) {
            // There may be no listeners.
            let _ = self.ctx.events.send(event);
        }
    }

    /// Loads that begin together for the same reason are one line: at the start there may be hundreds.
    fn say_begun(&mut self) {
        let mut begun = std::mem::take(&mut self.begun);
        while let Some((table, doing, because)) = begun.first().cloned() {
            let is_same = |one: &(TableId, &str, String)| (one.1, &one.2) == (doing, &because);
            let tables = begun.iter().filter(|one| is_same(one)).count();
            if tables > LOADS_SAID_ONE_BY_ONE {
                tracing::info!(tables, reason = because, "{doing} {tables} tables: {because}");
                begun.retain(|one| !is_same(one));
            } else {
                let name = self.name(table);
                tracing::info!(table = name, reason = because, "{doing} {name}: {because}");
                begun.remove(0);
            }
        }
    }

    fn say_ended(&mut self) {
        self.ended_first = None;
        let mut ended = std::mem::take(&mut self.ended);
        while let Some(because) = ended.first().map(|load| load.because.clone()) {
            let (same, others): (Vec<_>, Vec<_>) = ended.into_iter().partition(|load| load.because == because);
            ended = others;
            if same.len() > LOADS_SAID_ONE_BY_ONE {
                say_loaded_together(&same);
            } else {
                same.iter().for_each(|load| self.say_loaded(load));
            }
        }
    }

    fn say_loaded(&self, load: &LoadEnded) {
        let LoadEnded { table, rows, elapsed, lsn, because, .. } = load;
        let (name, elapsed_ms) = (self.name(*table), elapsed.as_millis() as u64);
        tracing::info!(
            table = name,
            rows,
            elapsed_ms,
            %lsn,
            reason = because,
            "loaded {} of {name} in {elapsed_ms} ms, streaming from {lsn}",
            counted(*rows, "row")
        );
    }

    pub fn ordered(&mut self, order: &LoadOrder) {
        if let LoadOrder::Abandon(table, _) = order {
            self.under_way.remove(table);
        }
        let LoadOrder::Table { table, purpose, because, .. } = order else { return };
        let name = self.name(*table);
        let doing = match purpose {
            Purpose::Fill => {
                self.under_way.insert(*table);
                "loading"
            }
            Purpose::Compare(_) => "comparing",
        };
        self.begun.push((*table, doing, because.to_string()));
        if because.heals == Some(Heal::Evicted) {
            tracing::warn!(
                code = Code::RedisEvicts.as_str(),
                table = name,
                "redis evicts keys, and rows of {name} with them: CONFIG SET maxmemory-policy noeviction, and give it more \
                 memory"
            );
        }
        if let Some(what) = because.heals {
            self.ctx.metrics.healed(what);
        }
        self.ctx.metrics.primary_read();
        self.change(|status| status.primary_reads += 1);
    }

    /// `rows` are those that were read, and whether the table has no others; `lsn` is the position of Redis.
    pub fn loaded(
        &mut self,
        table: TableId,
        (rows, is_whole): (u64, bool),
        started: Instant,
        because: Reason,
        lsn: EndLsn,
    ) {
        let elapsed = started.elapsed();
        self.under_way.remove(&table);
        self.ended_first.get_or_insert_with(Instant::now);
        let kind = match because.heals {
            None => Kind::Loaded,
            Some(Heal::Schema) => Kind::Schema,
            Some(_) => Kind::Healed,
        };
        let table_name = self.name(table).to_owned();
        let load = Load { kind, table: table_name, rows, elapsed, because: because.text.clone() };
        self.ctx.history.loaded(load, Instant::now());
        self.ended.push(LoadEnded { table, rows, started, elapsed, lsn, because: because.to_string() });
        self.ctx.metrics.load_duration(elapsed);
        if is_whole {
            self.ctx.metrics.keys(table, rows);
        }
        let together = self.load_began.replace(started) == Some(started);
        self.change(move |status| {
            let table = &mut status.tables[table.index()];
            if is_whole {
                (table.rows, table.not_compared, table.drift) = (Some(rows), None, Tally::default());
            }
            // The rows of all tables whose loads began together.
            let others = status.last_load.as_ref().filter(|_| together).map_or(0, |last| last.rows);
            status.last_load = Some(LastLoad { rows: rows + others, elapsed, lsn, reason: because.text });
        });
    }

    /// Names keys, so that whoever looks for the cause has something to go by once they are repaired.
    pub fn differs(&mut self, table: TableId, keys: &[(DriftKind, Key)]) {
        let named = keys.iter().map(|(kind, key)| format!("{key} is {}", kind.as_str()));
        let (table, named) = (self.name(table), named.collect::<Vec<_>>().join(", "));
        tracing::info!(table, "differs from Postgres: {named}");
    }

    pub fn compared(&mut self, table: TableId, what: Heavy, tally: Tally, started: Instant) {
        let (name, elapsed) = (self.name(table), started.elapsed());
        let Tally { rows, missing, stale, orphaned, lookups, repaired } = tally;
        let of_lookups =
            if lookups > 0 { format!("{} of lookups, ", counted(lookups, "member")) } else { String::new() };
        let text = format!(
            "{what} of {name}: {}, {missing} missing, {stale} stale, {orphaned} orphaned, {of_lookups}{repaired} \
             repaired, in {} ms",
            counted(rows, "row"),
            elapsed.as_millis()
        );
        // Drift that was not made on purpose deserves a warning.
        let verifies = what != Heavy::Refetch;
        if tally.drift() > 0 && verifies {
            let code = Code::Drift.as_str();
            tracing::warn!(code, table = name, rows, missing, stale, orphaned, lookups, repaired, "{text}");
            self.ctx.history.happened(Level::Warning, Kind::Drift, Some(name), &*text);
        } else {
            tracing::info!(table = name, rows, missing, stale, orphaned, lookups, repaired, "{text}");
        }
        let metrics = &self.ctx.metrics;
        metrics.load_duration(elapsed);
        metrics.keys(table, rows);
        if verifies {
            metrics.drift(table, Drift::Missing, missing);
            metrics.drift(table, Drift::Stale, stale);
            metrics.drift(table, Drift::Orphaned, orphaned);
            metrics.drift(table, Drift::Lookup, lookups);
        }
        self.change(move |status| {
            let table = &mut status.tables[table.index()];
            (table.rows, table.not_compared) = (Some(rows), None);
            table.drift = if tally.drift() > repaired { tally } else { Tally::default() };
            if verifies {
                table.checked_at = Some(SystemTime::now());
            }
        });
    }

    pub fn not_compared(&mut self, table: TableId, what: Heavy, why: String) {
        let name = self.name(table);
        let is_news = self.ctx.table(table).not_compared.as_ref() != Some(&why);
        if is_news {
            let code = Code::NotCompared.as_str();
            tracing::warn!(code, table = name, why, "{what} of {name} was given up, the table stays as it is");
            let text = format!("{what} of {name} was given up, the table stays as it is: {why}");
            self.ctx.history.happened(Level::Warning, Kind::NotCompared, Some(name), text);
        } else {
            tracing::debug!(table = name, why, "{what} of {name} was given up again");
        }
        self.change(move |status| status.tables[table.index()].not_compared = Some(why));
    }

    /// All tables have been compared.
    pub fn all_compared(&mut self, what: Heavy, tally: Tally, elapsed: Duration, lsn: EndLsn) {
        let level = if tally.drift() > tally.repaired { Level::Warning } else { Level::Good };
        let (rows, drift, repaired, ms) = (tally.rows, tally.drift(), tally.repaired, elapsed.as_millis());
        let differ = match drift {
            0 => "nothing differs".to_owned(),
            _ => format!("{drift} differ, {repaired} repaired"),
        };
        let text = format!("{what}: {rows} rows compared in {ms} ms, {differ}");
        self.ctx.history.happened(level, Kind::Verified, None, text);
        self.change(move |status| match what {
            Heavy::Refetch => {
                let reason = what.as_str().to_owned();
                status.last_load = Some(LastLoad { rows: tally.rows, elapsed, lsn, reason });
            }
            Heavy::Verify(_) => {
                status.last_verify = Some(LastVerify { at: SystemTime::now(), tally, elapsed, lsn });
            }
        });
    }

    pub fn blocked(&mut self, table: TableId, why: &Blocked) {
        self.under_way.remove(&table);
        self.ctx.metrics.healed(Heal::Schema);
        let table = self.name(table);
        self.ctx.history.happened(Level::Bad, Kind::Blocked, Some(table), format!("{table} cannot be followed: {why}"));
        let code = Code::Blocked.as_str();
        tracing::error!(code, table, %why, "table cannot be followed until this is mended; the others go on");
    }

    /// A batch was acknowledged.
    pub fn applied(&mut self, applied: Applied) {
        let (ctx, now) = (self.ctx, SystemTime::now());
        count(ctx, &applied);
        let changes = applied.counts.iter().map(|counts| counts.upserts + counts.deletes + counts.truncates).sum();
        ctx.applied(changes, applied.commits.iter().map(|time| time.age(now)));
        warn_of_dead_letters(ctx, &applied);
        // Immediately if little happens, so that a client that has seen a change finds its lag. During a flood the next
        // tick summarizes them.
        if !applied.commits.is_empty() && self.lags_shown.elapsed() >= LAGS_SHOWN_EVERY {
            self.lags_shown = Instant::now();
            let sync_lag = ctx.sync_lag();
            self.change(move |status| status.sync_lag = sync_lag);
        }
        if ctx.events.receiver_count() > 0 {
            self.events.extend(applied.events.iter().map(|(table, op, key, commit)| ChangeEvent {
                at: now,
                table: ctx.specs[table.index()].name.as_str().into(),
                op: *op,
                key: String::from_utf8_lossy(key.as_bytes()).into_owned(),
                lag: commit.age(now),
            }));
        }
        self.change(move |status| {
            for (table, counts) in status.tables.iter_mut().zip(&applied.counts) {
                table.upserts += counts.upserts;
                table.deletes += counts.deletes;
                table.truncates += counts.truncates;
                table.prefetched += counts.loaded;
                table.keyless += counts.keyless;
            }
        });
    }

    /// Updates everything that changes with time or with a batch.
    pub fn all(&mut self, machine: &Machine, surroundings: Surroundings) {
        let observed = machine.observe();
        let sync_lag = self.ctx.sync_lag();
        let dead = machine.dead_keys(DEAD_LETTERS_SHOWN).into_iter().map(|(key, dead)| DeadLetterSeen {
            table: dead.table,
            key: String::from_utf8_lossy(key.as_bytes()).into_owned(),
            reason: dead.reason,
            lsn: dead.lsn,
        });
        let dead = dead.collect();
        let seen: Vec<_> = observed
            .tables
            .iter()
            .map(|seen| (seen.load_progress, seen.load_began, seen.compared_ms, seen.verified_ms))
            .collect();
        self.positions(machine, observed, surroundings);
        self.change(move |status| {
            status.sync_lag = sync_lag;
            status.dead_letter_keys = dead;
            for (table, (load_progress, load_began, compared_ms, verified_ms)) in status.tables.iter_mut().zip(seen) {
                (table.load_progress, table.load_began) = (load_progress, load_began);
                table.compared_at = compared_ms.map(redis_time);
                table.verified_at = verified_ms.map(redis_time);
            }
        });
    }

    /// Called after every batch: it wakes what waits for a position.
    pub fn positions(&mut self, machine: &Machine, observed: Observed, surroundings: Surroundings) {
        let Surroundings { stalled, not_durable, beside_stream, last_contact } = surroundings;
        let (state, code, waiting_for) = match state_of(&observed) {
            _ if self.ctx.is_stopping() => (State::Stopping, None, None),
            _ if stalled.is_some() => (State::Stalled, Some(Code::RedisUnreachable), stalled),
            _ if not_durable.is_some() => (State::Stalled, Some(Code::RedisDurability), not_durable),
            // The stream continues, and something beside it waits.
            state => (state, None, beside_stream.clone()),
        };
        // Before the tables: a client that learns that all are loaded must not find the state still `loading`.
        self.ctx.set_state(state, code, waiting_for);
        self.ctx.sightings.wrote((observed.epoch, observed.seq));
        let verified_ms = machine.verified_ms();
        self.change(move |status| {
            status.beside_stream = beside_stream;
            status.received = Some(observed.received);
            status.applied = Some(observed.applied);
            status.confirmed = observed.confirmed.map(|c| c.end());
            status.server = observed.server;
            status.last_contact = Some(last_contact);
            // Until this session knows more, what was known before a reload holds.
            status.fresh_as_of = observed.fresh_as_of.or(status.fresh_as_of);
            status.oldest_unapplied = observed
                .oldest_unapplied
                .map(|t| UNIX_EPOCH + Duration::from_micros(u64::try_from(t.0).unwrap_or_default()));
            status.operation = observed.operation.map(Heavy::as_str);
            status.verified_at = verified_ms.map(redis_time);
            status.healing_slots = observed.healing;
            status.epoch = observed.epoch;
            status.seq = observed.seq;
            for (table, seen) in status.tables.iter_mut().zip(observed.tables) {
                (table.state, table.blocked) = (Some(seen.state), seen.blocked);
                (table.because, table.removed) = (seen.because, seen.removed);
                (table.dead_letters, table.more_dead_letters) = (seen.dead_letters, seen.more_dead_letters);
            }
        });
    }
}

/// What has ended is said, even if the session ends first.
impl Drop for Observers<'_> {
    fn drop(&mut self) {
        self.say_begun();
        self.say_ended();
    }
}

fn say_loaded_together(loads: &[LoadEnded]) {
    let (Some(last), Some(began)) = (loads.last(), loads.iter().map(|load| load.started).min()) else { return };
    let ended = loads.iter().map(|load| load.started + load.elapsed).max().unwrap_or(began);
    let (tables, rows) = (loads.len(), loads.iter().map(|load| load.rows).sum::<u64>());
    let (lsn, elapsed_ms) = (last.lsn, ended.duration_since(began).as_millis() as u64);
    tracing::info!(
        tables,
        rows,
        elapsed_ms,
        %lsn,
        reason = last.because,
        "loaded {tables} tables, {}, in {elapsed_ms} ms, streaming from {lsn}",
        counted(rows, "row")
    );
}

fn count(ctx: &Context, applied: &Applied) {
    let metrics = &ctx.metrics;
    metrics.transactions_applied(applied.transactions);
    metrics.ttl_renewals(applied.renewed);
    for (spec, counts) in ctx.specs.iter().zip(&applied.counts) {
        metrics.changes_applied(spec.id, Op::Upsert, counts.upserts);
        metrics.changes_applied(spec.id, Op::Delete, counts.deletes);
        metrics.changes_applied(spec.id, Op::Truncate, counts.truncates);
        metrics.rows_loaded(spec.id, counts.loaded);
    }
}

fn warn_of_dead_letters(ctx: &Context, applied: &Applied) {
    let mut letters: BTreeMap<(TableId, &str), u64> = BTreeMap::new();
    for (table, reason) in &applied.dead_letters {
        ctx.metrics.dead_letter(*table, reason);
        *letters.entry((*table, reason)).or_default() += 1;
    }
    for ((table, reason), rows) in letters {
        let (table, dead) = (&ctx.specs[table.index()].name, ctx.own.dead().to_string());
        let text = format!("{} of {table} cannot be in redis ({reason})", counted(rows, "row"));
        ctx.history.happened(Level::Bad, Kind::DeadLetter, Some(table), text);
        tracing::error!(
            code = Code::DeadLetter.as_str(),
            table,
            reason,
            rows,
            "{} of {table} cannot be in redis, see XRANGE '{dead}' - +",
            counted(rows, "row")
        );
    }
}

fn redis_time(ms: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_millis(ms)
}

fn state_of(observed: &Observed) -> State {
    // A table that waits for an operator is not being worked on.
    let any = |state| observed.tables.iter().any(|t| t.state == state && t.blocked.is_none());
    if observed.healing > 0 || any(TableState::Healing) {
        State::Healing
    } else if any(TableState::Loading) {
        State::Loading
    } else if observed.fresh_as_of.is_some_and(|at| at.elapsed() < CAUGHT_UP) {
        State::Streaming
    } else {
        State::CatchingUp
    }
}
