//! What the schedules reached: how often each variant of the session's inputs, effects and states occurred. A variant
//! that no schedule reaches is not tested, however many seeds are run.

use super::loader::{Errand, Heard, LookedUp};
use super::readers::Told;
use super::redis::{Redirect, Served};
use super::starting::Judgement;
use super::store::Called;
use super::writer::Planned;
use super::{Fault, Servers};
use crate::admin::{Answer, Operation, Refusal};
use crate::checkpoint::TableState;
use crate::loader::range::{Span, TidBound};
use crate::loader::{Again, Cause, Got};
use crate::lookups::questions::Questions;
use crate::progress::resume::ResumeDecision;
use crate::reason::Heal;
use crate::session::inspect::Probe;
use crate::session::load_messages::{CatalogSeen, Content, FromLoad, LoadOrder, Only, Purpose, Verdict};
use crate::session::startup::Request;
use crate::session::{Effect, Input, SafeWhen};
use std::collections::BTreeMap;

/// A type whose variants are counted.
pub(super) trait Kinds {
    const TYPE: &'static str;
    const NAMES: &'static [&'static str];
    fn kind(&self) -> &'static str;
}

/// The matches are exhaustive, so a new variant has to be added here.
macro_rules! kinds {
    ($($type:ident { $($name:literal: $pattern:pat),+ $(,)? })+) => {
        $(impl Kinds for $type {
            const TYPE: &'static str = stringify!($type);
            const NAMES: &'static [&'static str] = &[$($name),+];

            fn kind(&self) -> &'static str {
                match self { $($pattern => $name),+ }
            }
        })+

        const ALL: &[(&str, &[&str])] = &[$((stringify!($type), <$type as Kinds>::NAMES)),+];
    };
}

kinds! {
    Input {
        "Moved": Input::Moved(_),
        "Delivered": Input::Delivered { .. },
        "Load": Input::Load(_),
        "Renew": Input::Renew(_),
        "Probed": Input::Probed(_),
        "Inspected": Input::Inspected(_),
        "Scanned": Input::Scanned { .. },
        "Executed": Input::Executed { .. },
        "Sampled": Input::Sampled { .. },
        "Catalog": Input::Catalog(..),
        "Evicted": Input::Evicted(_),
        "Compared": Input::Compared(_),
        "NotCompared": Input::NotCompared(_),
        "Asked": Input::Asked(..),
        "Durable": Input::Durable(_),
        "PositionWanted": Input::PositionWanted,
        "Tick": Input::Tick,
    }
    Effect {
        "Probe": Effect::Probe(_),
        "Inspect": Effect::Inspect(_),
        "Scan": Effect::Scan { .. },
        "Compare": Effect::Compare(_),
        "Execute": Effect::Execute { .. },
        "Order": Effect::Order(_),
        "Applied": Effect::Applied(_),
        "Renewed": Effect::Renewed(_),
        "TableLoaded": Effect::TableLoaded { .. },
        "TableCompared": Effect::TableCompared { .. },
        "Differs": Effect::Differs { .. },
        "TableNotCompared": Effect::TableNotCompared { .. },
        "Compared": Effect::Compared { .. },
        "Settled": Effect::Settled(_),
        "Answer": Effect::Answer(..),
        "TooLarge": Effect::TooLarge(_),
        "TableBlocked": Effect::TableBlocked { .. },
        "WentBack": Effect::WentBack { .. },
    }
    Questions {
        "Rows": Questions::Rows(_),
        "Lists": Questions::Lists(_),
        "Members": Questions::Members(_),
        "Held": Questions::Held(_),
    }
    FromLoad {
        "Began": FromLoad::Began { .. },
        "Chunk": FromLoad::Chunk(_),
        "Ended": FromLoad::Ended { .. },
        "KeysNotRead": FromLoad::KeysNotRead,
        "Blocked": FromLoad::Blocked { .. },
        "NotCompared": FromLoad::NotCompared { .. },
        "DeadLetter": FromLoad::DeadLetter { .. },
        "Orphans": FromLoad::Orphans { .. },
        "Retired": FromLoad::Retired { .. },
    }
    Heard {
        "Ordered": Heard::Ordered(_),
        "LookedUp": Heard::LookedUp(_),
        "NotLookedUp": Heard::NotLookedUp(_),
        "Empty": Heard::Empty(_),
        "Scanned": Heard::Scanned { .. },
        "Refused": Heard::Refused { .. },
        "Visited": Heard::Visited(..),
        "NotVisited": Heard::NotVisited(..),
        "Woke": Heard::Woke,
    }
    Errand {
        "LookUp": Errand::LookUp { .. },
        "FindEmpty": Errand::FindEmpty { .. },
        "Scan": Errand::Scan { .. },
        "Visit": Errand::Visit { .. },
        "Say": Errand::Say(_),
        "BeginsAgain": Errand::BeginsAgain { .. },
    }
    LookedUp {
        "Loadable": LookedUp::Loadable(_),
        "Blocked": LookedUp::Blocked(_),
        "Locked": LookedUp::Locked(_),
    }
    Got {
        "Brought": Got::Brought(_),
        "Gone": Got::Gone,
        "Crowded": Got::Crowded,
    }
    Cause {
        "Lock": Cause::Lock,
        "Table": Cause::Table,
        "Query": Cause::Query,
        "Connection": Cause::Connection,
    }
    Again {
        "Changed": Again::Changed,
        "Rewritten": Again::Rewritten,
    }
    Span {
        "Places": Span::Places { from: TidBound::Page(_), .. },
        "Places, a rest": Span::Places { from: TidBound::Behind(_), .. },
        "Keys": Span::Keys { after: None, .. },
        "Keys, a rest": Span::Keys { after: Some(_), .. },
    }
    Content {
        "Rows": Content::Rows(_),
        "Keys": Content::Keys { checks: None, .. },
        "Keys, for a comparison": Content::Keys { checks: Some(_), .. },
        "Orphans": Content::Orphans { .. },
    }
    LoadOrder {
        "Table": LoadOrder::Table { only: Only::All, .. },
        "Table, attached": LoadOrder::Table { only: Only::Leaves(..), .. },
        "Table, hash slots": LoadOrder::Table { only: Only::HashSlots(_), .. },
        "Keys": LoadOrder::Keys(_),
        "Verdict": LoadOrder::Verdict(..),
        "Abandon": LoadOrder::Abandon(..),
    }
    Purpose {
        "Fill": Purpose::Fill,
        "Compare, mend": Purpose::Compare(crate::admin::Repair::Mend),
        "Compare, only count": Purpose::Compare(crate::admin::Repair::OnlyCount),
    }
    Verdict {
        "Written": Verdict::Written,
        "ReadAgain": Verdict::ReadAgain,
        "GivenUp": Verdict::GivenUp,
    }
    CatalogSeen {
        "Table": CatalogSeen::Table { .. },
        "Unfit": CatalogSeen::Unfit(_),
    }
    Probe {
        "Hash": Probe::Hash,
        "String": Probe::String,
        "Document": Probe::Document(_),
        "RedisJson": Probe::RedisJson,
        "Unread": Probe::Unread,
        "Absent": Probe::Absent,
        "OtherType": Probe::OtherType,
    }
    TableState {
        "Loaded": TableState::Loaded,
        "Loading": TableState::Loading,
        "Healing": TableState::Healing,
        "Incomplete": TableState::Incomplete,
    }
    SafeWhen {
        "Acknowledged": SafeWhen::Acknowledged,
        "Told": SafeWhen::Told,
    }
    ResumeDecision {
        "Refuse": ResumeDecision::Refuse { .. },
        "NewSlot": ResumeDecision::NewSlot { drop_old: false, .. },
        "NewSlot, drop the old one": ResumeDecision::NewSlot { drop_old: true, .. },
        "Deliver": ResumeDecision::Deliver { .. },
        "Stream": ResumeDecision::Stream { .. },
    }
    Request {
        "Disown": Request::Disown(_),
        "DropSlot": Request::DropSlot,
        "CreateTemporarySlot": Request::CreateTemporarySlot,
        "TakeSnapshot": Request::TakeSnapshot,
        "NameSlot": Request::NameSlot,
        "TakeOver": Request::TakeOver(_),
        "Stream": Request::Stream(_),
    }
    Heal {
        "RedisLost": Heal::RedisLost,
        "RedisWentBack": Heal::RedisWentBack,
        "PostgresWentBack": Heal::PostgresWentBack,
        "SlotLost": Heal::SlotLost,
        "Expired": Heal::Expired,
        "Schema": Heal::Schema,
        "Interrupted": Heal::Interrupted,
        "Evicted": Heal::Evicted,
        "Skipped": Heal::Skipped,
    }
    Operation {
        "Pause": Operation::Pause,
        "Resume": Operation::Resume,
        "Refetch": Operation::Refetch(_),
        "Verify": Operation::Verify(..),
        "Invalidate": Operation::Invalidate(..),
        "Clear": Operation::Clear(_),
        "Skip": Operation::Skip(_),
    }
    Answer {
        "Paused": Answer::Paused,
        "Resumed": Answer::Resumed,
        "Refetched": Answer::Refetched { .. },
        "Verified": Answer::Verified { .. },
        "Deleted": Answer::Deleted(_),
        "Skipped": Answer::Skipped,
    }
    Refusal {
        "Busy": Refusal::Busy(_),
        "Paused": Refusal::Paused,
        "NotNow": Refusal::NotNow(_),
        "Interrupted": Refusal::Interrupted(_),
        "NotCompared": Refusal::NotCompared(_),
        "Pointless": Refusal::Pointless(_),
    }
    Fault {
        "Crash": Fault::Crash,
        "CutRedis": Fault::CutRedis,
        "CutPostgres": Fault::CutPostgres,
        "RestartPostgres": Fault::RestartPostgres,
        "Flush": Fault::Flush,
        "Save": Fault::Save,
        "RollBack": Fault::RollBack,
        "DeleteCheckpoint": Fault::DeleteCheckpoint,
        "Evict": Fault::Evict,
        "RemoveKey": Fault::RemoveKey,
        "FailOver": Fault::FailOver,
        "HoursPass": Fault::HoursPass,
        "BreakTable": Fault::BreakTable,
        "MendTable": Fault::MendTable,
        "ChangeShape": Fault::ChangeShape,
        "AttachPartition": Fault::AttachPartition,
        "Reconfigure": Fault::Reconfigure,
        "SpoilLists": Fault::SpoilLists,
        "DropSlot": Fault::DropSlot,
        "SecondDaemon": Fault::SecondDaemon,
        "Freeze": Fault::Freeze,
        "Thaw": Fault::Thaw,
        "WalSenderTimeout": Fault::WalSenderTimeout,
        "CopyPostgres": Fault::CopyPostgres,
        "Promote": Fault::Promote,
        "Restore": Fault::Restore,
        "MoveSlot": Fault::MoveSlot,
        "BeginMove": Fault::BeginMove,
        "GiveUpMove": Fault::GiveUpMove,
        "LosePart": Fault::LosePart,
        "DeleteMark": Fault::DeleteMark,
    }
    Served {
        "Read": Served::Read,
        "Wrote": Served::Wrote,
        "Refused, ASK": Served::Refused(Redirect::Ask),
        "Refused, TRYAGAIN": Served::Refused(Redirect::TryAgain),
        "Called, done": Served::Called { called: Called::Done, is_late: false },
        "Called, refused": Served::Called { called: Called::Other(_), is_late: false },
        "Called, failed": Served::Called { called: Called::Failed, is_late: false },
        "Called, late, done": Served::Called { called: Called::Done, is_late: true },
        "Called, late, refused": Served::Called { called: Called::Other(_), is_late: true },
        "Called, late, failed": Served::Called { called: Called::Failed, is_late: true },
    }
    Judgement {
        "Even": Judgement::Even,
        "Uneven": Judgement::Uneven,
        "RecordLost": Judgement::RecordLost,
        "LanesLost": Judgement::LanesLost,
        "AllLost": Judgement::AllLost,
    }
    Planned {
        "Plain": Planned::Plain,
        "LeavesOut": Planned::LeavesOut,
        "InThreeSteps": Planned::InThreeSteps,
        "Refreshes": Planned::Refreshes,
    }
    Told {
        "Row": Told::Row(_),
        "NotFound": Told::NotFound,
        "OnTheMove": Told::OnTheMove,
        "NoRecord": Told::NoRecord,
        "InDoubt": Told::InDoubt,
        "Healing": Told::Healing,
        "Incomplete": Told::Incomplete,
        "DeadLetter": Told::DeadLetter,
    }
}

/// A type, a variant of it, and why no schedule can reach it.
type Unreached = (&'static str, &'static str, &'static str);

/// Variants that no schedule can reach.
const UNREACHED: &[Unreached] = &[
    ("Effect", "TooLarge", "reports a batch that was planned too large, which would be a bug"),
    ("FromLoad", "DeadLetter", "every row has a key"),
    ("Probe", "OtherType", "nothing else writes under the prefixes"),
    ("Probe", "RedisJson", "no table has that format"),
    ("ResumeDecision", "Refuse", "there is only one Postgres system"),
    ("Heal", "Skipped", "the bridge performs skips"),
    ("Operation", "Skip", "the bridge performs skips"),
    ("Answer", "Skipped", "the bridge performs skips"),
    ("Refusal", "Pointless", "the bridge performs skips"),
];

const UNREACHED_ON_ONE: &[Unreached] = &[
    ("LoadOrder", "Table, hash slots", "all keys lie in one"),
    ("Input", "Moved", "there is one node"),
    ("Effect", "Settled", "there is one node"),
    ("Fault", "MoveSlot", "there is one node"),
    ("Fault", "BeginMove", "there is one node"),
    ("Fault", "GiveUpMove", "there is one node"),
    ("Fault", "LosePart", "there is one node"),
    ("Fault", "DeleteMark", "there are no marks"),
];

/// Types that are of a cluster alone.
const OF_CLUSTER: &[&str] = &["Served", "Judgement", "Planned", "Told"];

const UNREACHED_ON_CLUSTER: &[Unreached] = &[
    ("SafeWhen", "Acknowledged", "the checkpoint may be ahead of a lane"),
    ("Served", "Wrote", "it is written by calls"),
];

/// Variants that so few schedules of a cluster reach that a thousand of them may not.
const RARE_ON_CLUSTER: &[(&str, &str)] = &[
    ("FromLoad", "Orphans"),
    ("Request", "DropSlot"),
    // Whatever takes a row away between a probe and its merge usually takes the mark along.
    ("Served", "Called, failed"),
    ("Served", "Called, late, failed"),
];

fn unreached(servers: Servers, of: &str, name: &str) -> Option<&'static str> {
    let more = match servers {
        Servers::One => UNREACHED_ON_ONE,
        Servers::Cluster => UNREACHED_ON_CLUSTER,
    };
    UNREACHED.iter().chain(more).find(|(o, n, _)| (*o, *n) == (of, name)).map(|(_, _, why)| *why)
}

#[derive(Default)]
pub struct Coverage(BTreeMap<(&'static str, &'static str), u64>);

impl Coverage {
    pub(super) fn saw<T: Kinds>(&mut self, what: &T) {
        *self.0.entry((T::TYPE, what.kind())).or_default() += 1;
    }

    pub fn add(&mut self, other: &Coverage) {
        other.0.iter().for_each(|(what, count)| *self.0.entry(*what).or_default() += count);
    }

    fn count(&self, of: &'static str, name: &'static str) -> u64 {
        self.0.get(&(of, name)).copied().unwrap_or(0)
    }

    fn counts(&self, servers: Servers) -> impl Iterator<Item = (&'static str, &'static str, u64)> + '_ {
        let all = ALL.iter().filter(move |(of, _)| servers == Servers::Cluster || !OF_CLUSTER.contains(of));
        let all = all.flat_map(|(of, names)| names.iter().map(|name| (*of, *name)));
        all.map(|(of, name)| (of, name, self.count(of, name)))
    }

    /// Returns the variants that contradict what is known to be unreachable there: not reached though listed nowhere, or
    /// reached though listed.
    pub fn gaps(&self, servers: Servers) -> Vec<String> {
        let gaps = self.counts(servers).filter_map(|(of, name, count)| match (count, unreached(servers, of, name)) {
            (0, None) if servers == Servers::Cluster && RARE_ON_CLUSTER.contains(&(of, name)) => None,
            (0, None) => Some(format!("{of}: {name} was never reached")),
            (1.., Some(_)) => Some(format!("{of}: {name} was reached, but is listed as unreachable")),
            _ => None,
        });
        gaps.collect()
    }

    /// Returns a table of type, variant and count.
    pub fn table(&self, servers: Servers) -> String {
        let mut table = String::new();
        for (of, name, count) in self.counts(servers) {
            let why = unreached(servers, of, name).filter(|_| count == 0).unwrap_or_default();
            let line = format!("{of:<16} {name:<28} {count:>12}  {why}");
            table.push_str(line.trim_end());
            table.push('\n');
        }
        table
    }
}
