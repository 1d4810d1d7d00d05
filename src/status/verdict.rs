//! The daemon's condition in words for people, decided here and nowhere else. The status, the page and the command show
//! it unchanged.
//!
//! It must never reassure without a reason: `good` requires that no problem is known and every table is ready. All
//! problems are listed, the most serious first, each with its remedy.

use super::state::{Moment, State, Status, TableStatus};
use crate::admin::Tally;
use crate::checkpoint::{Blocked, TableState};
use crate::code::Code;
use crate::words::{MOST_NAMES, counted, listed};
use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The server is asked once a second; a longer silence than this is reported.
const SILENT: Duration = Duration::from_secs(4);

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    Good,
    /// It passes by itself, or can wait.
    Warning,
    /// An operator has to act now.
    Bad,
}

impl Level {
    pub fn as_str(self) -> &'static str {
        match self {
            Level::Good => "good",
            Level::Warning => "warning",
            Level::Bad => "bad",
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    pub level: Level,
    pub text: String,
    /// What to do: one line for each problem that has a remedy.
    pub remedy: String,
    /// The operation that mends the most serious problem that one does.
    pub action: Option<Action>,
    /// Of the most serious problem.
    pub code: Option<Code>,
}

/// An operation that a person may want now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    Resume,
    /// Verify with repair.
    Repair,
    Refetch,
}

impl Action {
    pub fn as_str(self) -> &'static str {
        match self {
            Action::Resume => "resume",
            Action::Repair => "repair",
            Action::Refetch => "refetch",
        }
    }
}

struct Finding {
    level: Level,
    text: String,
    remedy: String,
    action: Option<Action>,
    code: Option<Code>,
}

impl Finding {
    fn bad(text: impl Into<String>, remedy: impl Into<String>) -> Self {
        Finding { level: Level::Bad, text: text.into(), remedy: remedy.into(), action: None, code: None }
    }

    fn warning(text: impl Into<String>, remedy: impl Into<String>) -> Self {
        Finding { level: Level::Warning, text: text.into(), remedy: remedy.into(), action: None, code: None }
    }

    fn with(self, action: Action) -> Self {
        Finding { action: Some(action), ..self }
    }

    fn coded(self, code: impl Into<Option<Code>>) -> Self {
        Finding { code: code.into(), ..self }
    }
}

impl Status {
    /// The verdict as of `now`.
    pub fn verdict(&self, now: Moment, max_staleness: Duration) -> Verdict {
        let mut problems = self.problems(now);
        let reasons = self.readiness(now, max_staleness);
        // Too old, or unknown: whatever the state is called, readers get 503 for missing rows.
        let stale =
            self.is_stale(now, max_staleness) && self.state != State::Connecting && self.state != State::Stopping;
        if stale && !self.paused {
            let text = format!("Redis is not known to be current: {}.", self.staleness(now, max_staleness).join("; "));
            let remedy = "Find out what holds it up: the server that does not answer, or a backlog.";
            problems.push(Finding::bad(text, remedy).coded(Code::Stale));
        }
        if problems.is_empty() && !reasons.is_empty() {
            let text = format!("Not ready: {}.", reasons.join("; "));
            problems.push(Finding::bad(text, "See the log.").coded(Code::NotReady));
        }
        if problems.is_empty() {
            return self.good();
        }
        problems.sort_by_key(|problem| Reverse(problem.level));
        let level = problems.first().map_or(Level::Good, |problem| problem.level);
        let texts: Vec<&str> = problems.iter().map(|problem| problem.text.as_str()).collect();
        let mut remedies: Vec<&str> = Vec::new();
        for problem in &problems {
            if !problem.remedy.is_empty() && !remedies.contains(&problem.remedy.as_str()) {
                remedies.push(&problem.remedy);
            }
        }
        let action = problems.iter().find_map(|problem| problem.action);
        let code = problems.first().and_then(|problem| problem.code);
        Verdict { level, text: texts.join(" "), remedy: remedies.join("\n"), action, code }
    }

    fn good(&self) -> Verdict {
        let text = match (self.state, self.operation) {
            (State::Standby, _) => {
                "Standing by: another daemon is at work, and this one answers reads as well.".to_owned()
            }
            (_, Some(operation)) => format!("All is well; a {operation} is under way."),
            (_, None) => "All is well: every table is in the cache and follows Postgres.".to_owned(),
        };
        let mut verdict =
            Verdict { level: Level::Good, text, remedy: "Nothing to do.".to_owned(), action: None, code: None };
        if let Some(repaired) =
            self.last_verify.as_ref().map(|last| last.tally.repaired).filter(|repaired| *repaired > 0)
        {
            verdict.text += &format!(" The last verify repaired {}.", counted(repaired, "difference"));
            verdict.remedy = "Find out who else writes there. The log names keys that differed.".to_owned();
        }
        verdict
    }

    /// The current problems, the most urgent kind first.
    fn problems(&self, now: Moment) -> Vec<Finding> {
        let mut problems: Vec<Finding> = self.of_the_state(now).into_iter().collect();
        problems.extend(self.beside_the_stream());
        problems.extend(self.blocked());
        if self.paused {
            problems.push(self.pause());
        } else {
            problems.extend(self.of_loads(now));
        }
        problems.extend(self.removed_keys());
        problems.extend(self.slot());
        problems.extend(self.drift());
        problems.extend(self.not_compared());
        if self.dead_letters() > 0 {
            let text = format!("{} could not become a row in Redis.", counted(self.dead_letters(), "change"));
            let remedy = "Look at the dead letters: each says its table, key and reason.";
            problems.push(Finding::warning(text, remedy).coded(Code::DeadLetter));
        }
        problems.extend(self.more_dead_letters());
        problems
    }

    fn of_the_state(&self, now: Moment) -> Option<Finding> {
        let kept = match self.slot_retained_bytes {
            Some(bytes) => format!(" Postgres keeps at least {} of WAL meanwhile.", size(bytes)),
            None => String::new(),
        };
        let silent = self.last_contact.map(|at| now.instant.saturating_duration_since(at)).filter(|s| *s > SILENT);
        match (self.state, &self.waiting_for) {
            (State::Stopping, _) => {
                Some(Finding::warning("Stopping.", "A restart goes on where it was.").coded(Code::Stopping))
            }
            (State::Stalled, waiting) => {
                let waiting = waiting.as_deref().unwrap_or("a server");
                let text = format!("Stalled: {waiting}.{kept}");
                Some(Finding::bad(text, "Mend what it names; it tries again by itself.").coded(self.waiting_code))
            }
            (State::Connecting, Some(waiting)) => {
                let remedy = "If that server is just starting, wait. Else see that it runs, and that address and \
                              password are right.";
                Some(Finding::bad(format!("Not connected: {waiting}.{kept}"), remedy).coded(self.waiting_code))
            }
            (State::Connecting, None) => {
                let remedy = "Wait. If it lasts, see that both servers run and can be reached.";
                Some(Finding::warning("Starting: connecting to Postgres and Redis.", remedy))
            }
            // While the stream runs, `waiting_for` names what fails beside it.
            (State::Healing, Some(waiting)) if self.beside_stream.is_none() => {
                let text = format!("Finding out what Redis and Postgres have: {waiting}.");
                Some(Finding::warning(text, "Wait. Readers get 503 meanwhile.").coded(Code::Healing))
            }
            // A standby's `waiting_for` names the holder of the slot.
            (State::Standby | State::Streaming | State::CatchingUp | State::Loading | State::Healing, _) => {
                if let Some(silent) = silent {
                    let text = format!("Postgres has not answered for {} s.", silent.as_secs());
                    let remedy = "See that it runs and can be reached.";
                    return Some(Finding::warning(text, remedy).coded(Code::PostgresUnreachable));
                }
                // While paused, nothing catches up.
                (self.state == State::CatchingUp && !self.paused).then(|| {
                    let behind = self.lag_bytes().filter(|bytes| *bytes > 0);
                    let behind = behind.map_or(String::new(), |bytes| format!(": {} behind Postgres", size(bytes)));
                    let remedy = "Wait while the lag falls. Where it rises for long, Redis or this machine is too slow \
                                  for what is written.";
                    Finding::warning(format!("Catching up{behind}."), remedy)
                })
            }
        }
    }

    /// Readers lose nothing while the stream is current, so this does not affect readiness.
    fn beside_the_stream(&self) -> Option<Finding> {
        let text = format!("Waiting for {}", sentence(self.beside_stream.as_ref()?));
        let remedy = "Do what the message says, or see that Postgres accepts connections: it is tried again by itself. \
                      Until then loads and verifications wait.";
        Some(Finding::warning(text, remedy))
    }

    /// Nothing is loaded while paused, whatever was lost.
    fn pause(&self) -> Finding {
        let kept = match self.slot_retained_bytes {
            Some(bytes) => format!(", which keeps {} of WAL for that", size(bytes)),
            None => String::new(),
        };
        let mut text = format!("Paused: nothing is applied, changes wait in Postgres{kept}.");
        let of_state = |wanted: fn(&TableStatus) -> bool| {
            let tables = self.tables.iter().filter(|t| t.blocked.is_none()).filter(|t| wanted(t));
            listed(&tables.map(|t| format!("{}{}", t.name, because(t))).collect::<Vec<_>>())
        };
        let lost = of_state(|t| t.state == Some(TableState::Healing));
        // Removed keys are reported separately.
        let partial = of_state(|t| match t.state {
            Some(TableState::Loading) => true,
            Some(TableState::Incomplete) => !t.removed,
            _ => false,
        });
        if lost.is_empty() && partial.is_empty() && self.healing_slots == 0 {
            let remedy = "Resume when you are done: prefetchd resume.";
            return Finding::warning(text, remedy).with(Action::Resume).coded(Code::Paused);
        }
        if !lost.is_empty() {
            text += &format!(
                " Meanwhile Redis has lost what it had of {lost}, or it cannot be trusted: reads get 503, and nothing is \
                 loaded before you resume."
            );
        }
        if self.healing_slots > 0 {
            text += &format!(
                " Meanwhile Redis has lost what it had in {}: reads of it get 503, and nothing is loaded before you resume.",
                counted(self.healing_slots, "hash slot")
            );
        }
        if !partial.is_empty() {
            text += &format!(
                " Not all rows of {partial} are in Redis: reads that miss get 503, and nothing is loaded before you resume."
            );
        }
        let remedy = "Resume: prefetchd resume. What is missing is loaded then.";
        Finding::bad(text, remedy).with(Action::Resume).coded(Code::Paused)
    }

    /// Tables that are being loaded, or whose state is unknown.
    fn of_loads(&self, now: Moment) -> Vec<Finding> {
        let of_state = |state: TableState| {
            let is_so = |table: &&TableStatus| table.blocked.is_none() && table.state == Some(state);
            self.tables.iter().filter(is_so).collect::<Vec<_>>()
        };
        let mut problems = Vec::new();
        let healing = of_state(TableState::Healing);
        if !healing.is_empty() {
            let text = format!("Healing {}. Readers get 503 meanwhile.", loads(&healing, now));
            let remedy = "Wait: every row is loaded again from Postgres.";
            problems.push(Finding::warning(text, remedy).coded(Code::Healing));
        }
        if self.healing_slots > 0 {
            let text = format!(
                "Healing {}. Readers of what lies there get 503 meanwhile, others do not.",
                counted(self.healing_slots, "hash slot")
            );
            problems.push(Finding::warning(text, "Wait: it is loaded again from Postgres.").coded(Code::Healing));
        }
        let loading = of_state(TableState::Loading);
        if !loading.is_empty() {
            let text = format!("Loading {}.", loads(&loading, now));
            let remedy = "Wait. Rows that are there are served; of the others nobody says that they do not exist.";
            problems.push(Finding::warning(text, remedy).coded(Code::Loading));
        }
        let again = self.tables.iter().filter(|t| t.blocked.is_none() && !t.removed);
        let again = again.filter(|t| t.state == Some(TableState::Incomplete)).map(|t| t.name.to_string());
        let again = listed(&again.collect::<Vec<_>>());
        if !again.is_empty() {
            let text = format!("Some rows of {again} are being read again from Postgres.");
            problems.push(Finding::warning(text, "Wait.").coded(Code::Loading));
        }
        problems
    }

    fn removed_keys(&self) -> Option<Finding> {
        let removed = self.tables.iter().filter(|t| t.removed && t.state == Some(TableState::Incomplete));
        let removed = listed(&removed.filter(|t| t.blocked.is_none()).map(|t| t.name.to_string()).collect::<Vec<_>>());
        if removed.is_empty() {
            return None;
        }
        let text = format!("Keys of {removed} were removed, and are not loaded again.");
        let remedy = "prefetchd refetch brings them back. Until then readers get 503 for what is not there.";
        Some(Finding::bad(text, remedy).with(Action::Refetch).coded(Code::Incomplete))
    }

    fn slot(&self) -> Option<Finding> {
        let (kept, limit) = (self.slot_retained_bytes?, self.slot_limit_bytes?);
        (kept > limit / 2).then(|| {
            let text = format!("The slot keeps {} of WAL, of {} that it may.", size(kept), size(limit));
            let remedy = "Beyond its limit Postgres gives the slot up, and every table is loaded again: find out why \
                          changes are not confirmed, or raise max_slot_wal_keep_size.";
            Finding::bad(text, remedy).coded(Code::SlotNearLimit)
        })
    }

    fn blocked(&self) -> Vec<Finding> {
        let blocked: Vec<_> = self.tables.iter().filter_map(|t| Some((&t.name, t.blocked.as_ref()?))).collect();
        let finding = |(name, why): &(&Arc<str>, &Blocked)| {
            Finding::bad(format!("Table {name} is blocked: {}.", why.because), why.remedy.as_str()).coded(Code::Blocked)
        };
        let mut findings: Vec<Finding> = blocked.iter().take(MOST_NAMES).map(finding).collect();
        if let Some(more) = blocked.len().checked_sub(MOST_NAMES).filter(|more| *more > 0) {
            let text = format!("{} more are blocked.", counted(more as u64, "table"));
            let remedy = "The list of tables has the cause and the remedy of each.";
            findings.push(Finding::bad(text, remedy).coded(Code::Blocked));
        }
        findings
    }

    fn drift(&self) -> Option<Finding> {
        let differ: Vec<_> = self.tables.iter().filter(|table| table.drift.drift() > 0).collect();
        let mut sum = Tally::default();
        differ.iter().for_each(|table| sum.add(&table.drift));
        let kinds = [
            (sum.missing, "missing"),
            (sum.stale, "stale"),
            (sum.orphaned, "orphaned"),
            (sum.lookups, "wrong in lookups"),
        ];
        let found: Vec<String> = kinds.iter().filter(|(n, _)| *n > 0).map(|(n, kind)| format!("{n} {kind}")).collect();
        let tables = listed(&differ.iter().map(|table| table.name.to_string()).collect::<Vec<_>>());
        (!differ.is_empty()).then(|| {
            let text = format!("A verify of {tables} found drift, not repaired: {}.", found.join(", "));
            Finding::warning(text, "prefetchd verify --repair mends this.").with(Action::Repair).coded(Code::Drift)
        })
    }

    fn not_compared(&self) -> Vec<Finding> {
        let mut causes: BTreeMap<&str, Vec<String>> = BTreeMap::new();
        for table in &self.tables {
            if let Some(why) = &table.not_compared {
                causes.entry(why).or_default().push(table.name.to_string());
            }
        }
        let finding = |(why, tables): (&str, Vec<String>)| {
            let tables = listed(&tables);
            let text = format!("{tables} could not be compared with Postgres: {}", sentence(why));
            Finding::warning(text, "").coded(Code::NotCompared)
        };
        causes.into_iter().map(finding).collect()
    }

    fn more_dead_letters(&self) -> Option<Finding> {
        let tables =
            listed(&self.tables.iter().filter(|t| t.more_dead_letters).map(|t| t.name.to_string()).collect::<Vec<_>>());
        (!tables.is_empty()).then(|| {
            let text = format!(
                "More rows of {tables} cannot be held by Redis than are on record: what is missing of it is 503."
            );
            let remedy = "Mend what the dead letters name, then prefetchd refetch --table with its name.";
            Finding::warning(text, remedy).coded(Code::DeadLetter)
        })
    }

    /// What is going on with this table, for whoever misses a row of it. `None` if nothing is known to be.
    pub fn load_of(&self, table: &str, now: Moment) -> Option<String> {
        let table = self.tables.iter().find(|of| &*of.name == table)?;
        let verb = match table.state? {
            TableState::Healing => "Healing",
            TableState::Loading => "Loading",
            TableState::Incomplete | TableState::Loaded => return None,
        };
        Some(format!("{verb} {}.", loads(&[table], now)))
    }

    fn is_stale(&self, now: Moment, max_staleness: Duration) -> bool {
        // Before anything is known, the state says so.
        self.fresh_as_of.is_some() && !self.staleness(now, max_staleness).is_empty()
    }
}

fn because(table: &TableStatus) -> String {
    table.because.as_ref().map_or(String::new(), |why| format!(" ({why})"))
}

/// Loads in progress: how far, and how long still.
fn loads(tables: &[&TableStatus], now: Moment) -> String {
    if tables.len() <= MOST_NAMES {
        let one = |table: &&TableStatus| {
            let left = Progress::of(&[table]);
            format!("{}{}{}", table.name, because(table), left.map_or(String::new(), |left| left.text(now)))
        };
        return tables.iter().map(one).collect::<Vec<_>>().join("; ");
    }
    let cause = because(tables[0]);
    let cause = if tables.iter().all(|table| because(table) == cause) { &*cause } else { "" };
    let progress = Progress::of(tables).map_or(String::new(), |progress| progress.text(now));
    format!("{} tables{cause}{progress}", tables.len())
}

struct Progress {
    rows: u64,
    estimated: u64,
    began: Option<Instant>,
}

impl Progress {
    /// `None` if none of them is being read.
    fn of(tables: &[&TableStatus]) -> Option<Self> {
        let known = || tables.iter().filter_map(|table| table.load_progress);
        known().next()?;
        Some(Progress {
            rows: known().map(|(rows, _)| rows).sum(),
            estimated: known().map(|(_, estimated)| estimated).sum(),
            began: tables.iter().filter_map(|table| table.load_began).min(),
        })
    }

    fn text(&self, now: Moment) -> String {
        let Progress { rows, estimated, began } = self;
        let left = began.and_then(|began| self.left(now.instant.saturating_duration_since(began)));
        let left = left.map_or(String::new(), |left| format!(", about {} left", humantime::format_duration(left)));
        format!(", {rows} of about {estimated} rows{left}")
    }

    /// At the present pace. `None` as long as that says little.
    fn left(&self, elapsed: Duration) -> Option<Duration> {
        let says_much = elapsed > Duration::from_secs(2) && self.rows > self.estimated / 50 && self.rows > 0;
        let rows_left = self.estimated.checked_sub(self.rows).filter(|left| *left > 0 && says_much)?;
        Some(Duration::from_secs((elapsed.as_secs_f64() * rows_left as f64 / self.rows as f64).ceil() as u64))
    }
}

fn size(bytes: u64) -> String {
    bytesize::ByteSize(bytes).display().si().to_string()
}

/// Returns `text` with a full stop at its end.
fn sentence(text: &str) -> String {
    match text.is_empty() || text.ends_with('.') {
        true => text.to_owned(),
        false => format!("{text}."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::Blocked;
    use crate::format::Format;
    use crate::lsn::{EndLsn, Lsn};
    use crate::schema::{KeyTemplate, NullRule, QualifiedName, TableId, TableSpec};
    use crate::status::LastVerify;
    use std::time::SystemTime;

    const LIMIT: Duration = Duration::from_secs(30);

    fn spec(id: u16, name: &str) -> TableSpec {
        TableSpec {
            id: TableId(id),
            name: name.to_owned(),
            table: QualifiedName { schema: "public".to_owned(), table: name.to_owned() },
            key: KeyTemplate { literal: format!("{name}:"), columns: vec!["id".to_owned()] },
            columns: vec![],
            rename: vec![],
            null: NullRule::Empty,
            ttl_ms: 1000,
            format: Format::Hash,
            lookups: Vec::new(),
        }
    }

    /// Two tables without problems.
    fn healthy() -> (Status, Moment) {
        let mut status = Status::starting(&[spec(0, "a"), spec(1, "b")]);
        let now = Moment::now();
        status.state = State::Streaming;
        (status.last_contact, status.fresh_as_of) = (Some(now.instant), Some(now.instant));
        for table in &mut status.tables {
            table.state = Some(TableState::Loaded);
        }
        (status, now)
    }

    fn blocks(table: &mut TableStatus) {
        table.state = Some(TableState::Incomplete);
        table.blocked = Some(Blocked::from_message("table public.a was dropped: create it again"));
    }

    type Change = fn(&mut Status);

    /// Everything that can be wrong, and what must be reported about it.
    const WRONG: &[(&str, Change, Level, &str, &str)] = &[
        ("stopping", |s| s.state = State::Stopping, Level::Warning, "Stopping", "restart"),
        (
            "stalled",
            |s| (s.state, s.waiting_for) = (State::Stalled, Some("redis does not answer".to_owned())),
            Level::Bad,
            "Stalled: redis does not answer",
            "Mend",
        ),
        (
            "not connected",
            |s| (s.state, s.waiting_for) = (State::Connecting, Some("refused".to_owned())),
            Level::Bad,
            "Not connected: refused",
            "address and password",
        ),
        ("starting", |s| s.state = State::Connecting, Level::Warning, "Starting", "Wait"),
        (
            "slot creation waits",
            |s| (s.state, s.waiting_for) = (State::Connecting, Some("pid 7".to_owned())),
            Level::Bad,
            "Not connected: pid 7",
            "wait",
        ),
        (
            "beside the stream",
            |s| {
                s.beside_stream = Some("a connection to postgres beside the stream's: no room".to_owned());
                s.waiting_for = s.beside_stream.clone();
            },
            Level::Warning,
            "Waiting for a connection to postgres beside the stream's: no room.",
            "Do what the message says",
        ),
        (
            "finding out",
            |s| {
                (s.state, s.waiting_for, s.fresh_as_of) = (State::Healing, Some("lost".to_owned()), None);
                s.tables.iter_mut().for_each(|t| t.state = None);
            },
            Level::Warning,
            "Finding out what Redis and Postgres have: lost",
            "Wait",
        ),
        ("catching up", |s| s.state = State::CatchingUp, Level::Warning, "Catching up", "lag falls"),
        (
            "blocked",
            |s| blocks(&mut s.tables[0]),
            Level::Bad,
            "Table a is blocked: table public.a was dropped",
            "create it again",
        ),
        (
            "healing",
            |s| {
                s.state = State::Healing;
                let table = &mut s.tables[1];
                (table.state, table.because) = (Some(TableState::Healing), Some("redis has no checkpoint".to_owned()));
                table.load_progress = Some((3, 9));
            },
            Level::Warning,
            "Healing b (redis has no checkpoint), 3 of about 9 rows",
            "Wait",
        ),
        (
            "loading",
            |s| (s.state, s.tables[1].state) = (State::Loading, Some(TableState::Loading)),
            Level::Warning,
            "Loading b",
            "Wait",
        ),
        (
            "read again",
            |s| s.tables[0].state = Some(TableState::Incomplete),
            Level::Warning,
            "Some rows of a are being read",
            "Wait",
        ),
        (
            "removed",
            |s| (s.tables[0].state, s.tables[0].removed) = (Some(TableState::Incomplete), true),
            Level::Bad,
            "Keys of a were removed",
            "refetch",
        ),
        ("paused", |s| s.paused = true, Level::Warning, "Paused: nothing is applied", "prefetchd resume"),
        (
            "paused, and something was lost",
            |s| {
                (s.paused, s.tables[0].state) = (true, Some(TableState::Healing));
                s.tables[0].because = Some("redis has no checkpoint".to_owned());
            },
            Level::Bad,
            "Meanwhile Redis has lost what it had of a",
            "prefetchd resume",
        ),
        (
            "slot",
            |s| (s.slot_retained_bytes, s.slot_limit_bytes) = (Some(600), Some(1000)),
            Level::Bad,
            "The slot keeps 600 B of WAL, of 1.0 kB",
            "max_slot_wal_keep_size",
        ),
        (
            "drift",
            |s| s.tables[1].drift = Tally { missing: 1, orphaned: 2, ..Tally::default() },
            Level::Warning,
            "A verify of b found drift, not repaired: 1 missing, 2 orphaned.",
            "verify --repair",
        ),
        (
            "not compared",
            |s| s.tables[1].not_compared = Some("no right: GRANT it".to_owned()),
            Level::Warning,
            "b could not be compared with Postgres: no right: GRANT it.",
            "",
        ),
        (
            "dead letters",
            |s| s.tables[0].dead_letters = 1,
            Level::Warning,
            "1 change could not become a row",
            "dead letters",
        ),
        ("not known", |s| s.tables[0].state = None, Level::Bad, "Not ready: table a is not known yet", ""),
        ("not fresh", |s| s.fresh_as_of = None, Level::Bad, "Not ready: what Postgres has committed", ""),
        ("no contact", |s| s.last_contact = None, Level::Bad, "no contact with Postgres yet", ""),
    ];

    #[test]
    fn all_is_well_where_nothing_is_wrong() {
        let (mut status, now) = healthy();
        let verdict = status.verdict(now, LIMIT);
        assert_eq!((verdict.level, verdict.remedy.as_str()), (Level::Good, "Nothing to do."));
        assert!(verdict.text.starts_with("All is well: every table"), "{verdict:?}");
        status.operation = Some("verify");
        assert_eq!(status.verdict(now, LIMIT).text, "All is well; a verify is under way.");
        (status.state, status.waiting_for) = (State::Standby, Some("the slot is held by pid 7".to_owned()));
        let verdict = status.verdict(now, LIMIT);
        assert!(verdict.level == Level::Good && verdict.text.starts_with("Standing by"), "{verdict:?}");
    }

    #[test]
    fn whatever_is_wrong_is_said_with_its_remedy() {
        for (what, change, level, text, remedy) in WRONG {
            let (mut status, now) = healthy();
            change(&mut status);
            let verdict = status.verdict(now, LIMIT);
            assert_eq!(verdict.level, *level, "{what}: {verdict:?}");
            assert!(verdict.text.contains(text), "{what}: {verdict:?}");
            assert!(verdict.remedy.contains(remedy), "{what}: {verdict:?}");
            assert!(!verdict.text.contains("All is well"), "{what}: {verdict:?}");
        }
    }

    /// `docs/verdicts.md` has every sentence as it is for two tables, a and b, with its remedy.
    #[test]
    fn every_sentence_is_documented() {
        let documented = include_str!("../../docs/verdicts.md");
        let row = |verdict: &Verdict| {
            let level = verdict.level.as_str();
            format!("| {level} | {} | {} |", verdict.text, verdict.remedy.replace('\n', "<br>"))
        };
        let mut missing = String::new();
        for (_, change, ..) in WRONG {
            let (mut status, now) = healthy();
            change(&mut status);
            let row = row(&status.verdict(now, LIMIT));
            if !documented.contains(&row) {
                missing += &format!("{row}\n");
            }
        }
        let (mut status, now) = healthy();
        let mut good = row(&status.verdict(now, LIMIT));
        let tally = Tally { repaired: 5, ..Tally::default() };
        let at = SystemTime::UNIX_EPOCH;
        status.last_verify = Some(LastVerify { at, tally, elapsed: Duration::ZERO, lsn: EndLsn(Lsn::FIRST) });
        good += &format!("\n{}", row(&status.verdict(now, LIMIT)));
        assert!(missing.is_empty() && documented.contains(&good), "docs/verdicts.md lacks\n{missing}{good}");
    }

    /// Two problems at a time: the worse one decides, and the daemon's problem does not hide a table's.
    #[test]
    fn nothing_is_hidden_by_something_else() {
        for (first, change_first, level_first, ..) in WRONG {
            for (second, change_second, level_second, ..) in WRONG {
                let (mut status, now) = healthy();
                change_first(&mut status);
                change_second(&mut status);
                let verdict = status.verdict(now, LIMIT);
                assert!(
                    verdict.level >= Level::Warning && !verdict.text.contains("All is well"),
                    "{first}, {second}: {verdict:?}"
                );
                // The daemon has one state, and so has each table: the later change may have overwritten the earlier
                // one.
                if status.tables[0].blocked.is_some() {
                    assert!(
                        verdict.text.contains("Table a is blocked") && verdict.level == Level::Bad,
                        "{first}, {second}: {verdict:?}"
                    );
                    assert!(
                        verdict.remedy.lines().any(|line| line == "create it again"),
                        "{first}, {second}: {verdict:?}"
                    );
                }
                if status.tables[1].drift.drift() > 0 {
                    assert!(verdict.text.contains("A verify of b found"), "{first}, {second}: {verdict:?}");
                }
                if status.paused {
                    assert!(verdict.text.contains("Paused"), "{first}, {second}: {verdict:?}");
                }
                let of_tables = ["blocked", "drift", "not compared", "dead letters", "slot", "paused"];
                if of_tables.contains(first) {
                    assert!(verdict.level >= *level_first, "{first}, {second}: {verdict:?}");
                }
                if of_tables.contains(second) {
                    assert!(verdict.level >= *level_second, "{first}, {second}: {verdict:?}");
                }
            }
        }
    }

    #[test]
    fn a_blocked_table_is_never_said_to_repair_itself() {
        let (mut status, now) = healthy();
        blocks(&mut status.tables[0]);
        for state in [TableState::Healing, TableState::Loading, TableState::Incomplete, TableState::Loaded] {
            status.tables[0].state = Some(state);
            let verdict = status.verdict(now, LIMIT);
            assert!(!verdict.text.contains("Healing") && !verdict.text.contains("Loading"), "{verdict:?}");
            assert_eq!(verdict.remedy, "create it again");
        }
        let reasons = status.readiness(now, LIMIT);
        assert_eq!(reasons, ["table a is blocked: table public.a was dropped: create it again"]);
        let json: serde_json::Value = serde_json::from_str(&status.to_json(&[], now, LIMIT)).expect("JSON");
        let table = &json["tables"][0];
        assert_eq!(
            (&table["state"], &table["because"], &table["remedy"], &table["loaded"]),
            (&"blocked".into(), &"table public.a was dropped".into(), &"create it again".into(), &false.into())
        );
    }

    #[test]
    fn what_redis_lost_during_a_pause_is_said_and_not_called_healing() {
        let (mut status, now) = healthy();
        (status.paused, status.state) = (true, State::Healing);
        let table = &mut status.tables[0];
        (table.state, table.because) = (Some(TableState::Healing), Some("redis has no checkpoint".to_owned()));
        let verdict = status.verdict(now, LIMIT);
        assert_eq!(verdict.level, Level::Bad);
        assert!(verdict.text.contains("Redis has lost what it had of a (redis has no checkpoint)"), "{verdict:?}");
        assert!(!verdict.text.contains("Healing") && verdict.remedy.starts_with("Resume"), "{verdict:?}");
    }

    #[test]
    fn hash_slots_that_are_healed_do_not_keep_readers_away() {
        let (mut status, now) = healthy();
        (status.state, status.healing_slots) = (State::Healing, 5_461);
        let verdict = status.verdict(now, LIMIT);
        assert_eq!((verdict.level, status.readiness(now, LIMIT)), (Level::Warning, vec![]));
        assert!(verdict.text.starts_with("Healing 5461 hash slots."), "{verdict:?}");
        status.paused = true;
        let verdict = status.verdict(now, LIMIT);
        assert_eq!(verdict.level, Level::Bad);
        assert!(verdict.text.contains("lost what it had in 5461 hash slots") && verdict.remedy.starts_with("Resume"));
    }

    #[test]
    fn trouble_beside_the_stream_is_said_in_every_state_and_readers_stay() {
        let trouble = "a connection to postgres beside the stream's: max_connections leaves 17: end other sessions";
        for (state, of_table, said) in [
            (State::Streaming, TableState::Loaded, ""),
            (State::CatchingUp, TableState::Loaded, "Catching up."),
            (State::Loading, TableState::Loading, "Loading a, 3 of about 9 rows."),
            (State::Healing, TableState::Healing, "Healing a, 3 of about 9 rows."),
        ] {
            let (mut status, now) = healthy();
            (status.state, status.tables[0].state) = (state, Some(of_table));
            status.tables[0].load_progress = Some((3, 9));
            let reasons = status.readiness(now, LIMIT);
            (status.waiting_for, status.beside_stream) = (Some(trouble.to_owned()), Some(trouble.to_owned()));
            let verdict = status.verdict(now, LIMIT);
            assert_eq!(verdict.level, Level::Warning, "{verdict:?}");
            assert!(verdict.text.contains(&format!("Waiting for {trouble}.")), "{verdict:?}");
            assert!(verdict.text.contains(said) && verdict.remedy.contains("tried again by itself"), "{verdict:?}");
            for wrong in ["All is well", "has not begun", "Finding out"] {
                assert!(!verdict.text.contains(wrong), "{verdict:?}");
            }
            assert_eq!(status.readiness(now, LIMIT), reasons, "{state:?}");
        }
        let (mut status, now) = healthy();
        (status.state, status.waiting_for) = (State::Stalled, Some("redis does not answer".to_owned()));
        status.beside_stream = Some(trouble.to_owned());
        let verdict = status.verdict(now, LIMIT);
        assert!(
            verdict.level == Level::Bad && verdict.text.starts_with("Stalled: redis does not answer."),
            "{verdict:?}"
        );
        assert!(verdict.text.contains(trouble), "{verdict:?}");
    }

    #[test]
    fn rows_that_are_missing_during_a_pause_are_said() {
        for state in [TableState::Loading, TableState::Incomplete] {
            let (mut status, now) = healthy();
            status.paused = true;
            status.tables[1].state = Some(state);
            let verdict = status.verdict(now, LIMIT);
            assert_eq!(verdict.level, Level::Bad, "{verdict:?}");
            assert!(verdict.text.contains("Not all rows of b are in Redis: reads that miss get 503"), "{verdict:?}");
            assert!(verdict.remedy.starts_with("Resume: prefetchd resume."), "{verdict:?}");
        }
        let (mut status, now) = healthy();
        (status.paused, status.tables[1].state, status.tables[1].removed) = (true, Some(TableState::Incomplete), true);
        let verdict = status.verdict(now, LIMIT);
        assert!(
            verdict.text.contains("Keys of b were removed") && !verdict.text.contains("Not all rows"),
            "{verdict:?}"
        );
    }

    #[test]
    fn silence_and_age_are_said() {
        let (mut status, now) = healthy();
        let later = |seconds| Moment { instant: now.instant + Duration::from_secs(seconds), ..now };
        assert_eq!(status.verdict(later(3), LIMIT).level, Level::Good);
        status.state = State::CatchingUp;
        let verdict = status.verdict(later(6), LIMIT);
        assert!(verdict.text.starts_with("Postgres has not answered for 6 s"), "{verdict:?}");
        let verdict = status.verdict(later(40), LIMIT);
        assert_eq!(verdict.level, Level::Bad);
        assert!(verdict.text.contains("Redis is 40 s behind Postgres, more than 30s"), "{verdict:?}");
    }
}
