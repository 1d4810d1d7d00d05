//! How long a comparison goes on where its table cannot be read. A load waits for as long as it takes.

use super::messages::Cause;
use crate::schema::TableId;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// How long lock timeouts may go on.
const LOCK_PATIENCE: Duration = Duration::from_secs(10);
/// How long it may find no connection, or lose each that it gets.
pub const CONNECTION_PATIENCE: Duration = Duration::from_secs(30);

#[derive(Default)]
pub(super) struct Patience {
    /// Since when somebody's lock, or lost connections, have kept a table from being read.
    unread_since: BTreeMap<TableId, Instant>,
}

impl Patience {
    pub fn forget(&mut self, table: TableId) {
        self.unread_since.remove(&table);
    }

    pub fn gives_up_on(&mut self, table: TableId, cause: Cause, now: Instant) -> bool {
        if matches!(cause, Cause::Table | Cause::Query) {
            return true;
        }
        let since = *self.unread_since.entry(table).or_insert(now);
        Self::is_over(cause, since, now)
    }

    pub fn is_over(cause: Cause, since: Instant, now: Instant) -> bool {
        let patience = match cause {
            Cause::Lock => LOCK_PATIENCE,
            Cause::Connection => CONNECTION_PATIENCE,
            Cause::Table | Cause::Query => return true,
        };
        now.saturating_duration_since(since) >= patience
    }
}
