//! How long a comparison is tried while its table cannot be read. A load is tried for as long as it takes.

use super::messages::Cause;
use crate::schema::TableId;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// How long a comparison may run into lock timeouts.
const LOCK_PATIENCE: Duration = Duration::from_secs(10);
/// How long it may fail to get a connection, or lose every connection that it gets.
pub const CONNECTION_PATIENCE: Duration = Duration::from_secs(30);

#[derive(Default)]
pub(super) struct Patience {
    /// Since when locks or lost connections have prevented each table from being read.
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
