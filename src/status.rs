//! What the daemon knows of itself: one value, written by the bridge, read by everybody else through a watch channel.
//!
//! Nothing here is more than a copy. What a read may promise comes from the checkpoint that is read with it.
//! Whether the daemon is ready, how far it lags, and the JSON of both are computed here, so that `/readyz`, `/metrics`,
//! the events and the page cannot disagree.

mod lag;
mod report;
mod state;
mod verdict;

pub use lag::{LagWindow, SyncLag};
pub(crate) use report::StatusReport;
pub use state::{
    ChangeEvent, DEAD_LETTERS_SHOWN, DeadLetterSeen, LastLoad, LastVerify, Moment, ReadCounts, Source, State, Status,
    TableStatus,
};
pub use verdict::{Level, Verdict};
