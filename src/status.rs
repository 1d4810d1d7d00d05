//! What the daemon knows about itself: one value, written by the bridge, read by everything else through a watch
//! channel.
//!
//! It is only a copy. What a read may promise comes from the checkpoint that is read with it. Readiness, lag and their
//! JSON are computed here, so that `/readyz`, `/metrics`, the events and the page cannot disagree.

mod lag;
mod nodes;
mod report;
mod state;
mod verdict;

pub use lag::{LagWindow, SyncLag};
pub use nodes::Keys;
pub(crate) use report::{StatusReport, VerdictReport, rfc3339};
pub use state::{
    ChangeEvent, DEAD_LETTERS_SHOWN, DeadLetterSeen, LastLoad, LastVerify, Moment, ReadCounts, Source, State, Status,
    TableStatus,
};
pub use verdict::{Action, Level, Verdict};
