//! Answers to ordinary queries, as text and by column position.
//!
//! It must not know the query. Every transaction begins with [`PINS`], whatever was run in the session before.

use super::SourceError;
use super::settings::SESSION_OPTIONS;
use crate::schema::QualifiedName;
use postgres_protocol::escape::{escape_identifier, escape_literal};
use std::str::FromStr;
use std::sync::LazyLock;
use std::time::Duration;
use tokio_postgres::{Client, SimpleQueryMessage, SimpleQueryRow};

/// How long a daemon that is frozen between two statements holds its lock on the table, with an ALTER TABLE waiting
/// behind it, and every other session behind that.
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);

/// Sets [`SESSION_OPTIONS`] for one transaction, so that names in the following statements refer to the server's own
/// objects even if another role's function has changed the session. Not a SELECT: that would take the snapshot.
pub(super) static PINS: LazyLock<String> = LazyLock::new(|| {
    let list = |value: &str| value.split(", ").map(escape_literal).collect::<Vec<_>>().join(", ");
    SESSION_OPTIONS.iter().map(|(name, value)| format!("SET LOCAL {name} = {};", list(value))).collect()
});

/// Runs statements that change nothing, in their own transaction and one round trip. Returns the rows of each.
pub(super) async fn look(client: &Client, doing: &str, sql: &str) -> Result<Vec<Vec<SimpleQueryRow>>, SourceError> {
    pinned(client, doing, "READ ONLY", sql).await
}

/// The same for statements that change something.
pub(super) async fn act(client: &Client, doing: &str, sql: &str) -> Result<Vec<Vec<SimpleQueryRow>>, SourceError> {
    pinned(client, doing, "READ WRITE", sql).await
}

/// The statements of one message are one transaction, which ends with the message.
///
/// <https://www.postgresql.org/docs/current/protocol-flow.html#PROTOCOL-FLOW-MULTI-STATEMENT>
async fn pinned(client: &Client, doing: &str, mode: &str, sql: &str) -> Result<Vec<Vec<SimpleQueryRow>>, SourceError> {
    let sql = format!("SET TRANSACTION ISOLATION LEVEL READ COMMITTED {mode}; {} {sql}", *PINS);
    let mut results = query(client, doing, &sql).await?;
    Ok(results.split_off((1 + SESSION_OPTIONS.len()).min(results.len())))
}

/// Returns the rows of each statement, in whatever transaction is open.
pub(super) async fn query(client: &Client, doing: &str, sql: &str) -> Result<Vec<Vec<SimpleQueryRow>>, SourceError> {
    let messages = client.simple_query(sql).await.map_err(|e| SourceError::query(doing, e))?;
    let (mut results, mut rows) = (Vec::new(), Vec::new());
    for message in messages {
        match message {
            SimpleQueryMessage::Row(row) => rows.push(row),
            SimpleQueryMessage::CommandComplete(_) => results.push(std::mem::take(&mut rows)),
            _ => {}
        }
    }
    Ok(results)
}

/// Ends the transaction that `work` began, whether or not it succeeded.
pub(super) async fn in_transaction<T>(
    client: &Client,
    doing: &str,
    work: impl Future<Output = Result<T, SourceError>>,
) -> Result<T, SourceError> {
    match work.await {
        Ok(value) => {
            query(client, doing, "COMMIT").await?;
            Ok(value)
        }
        Err(error) => {
            // Also fails if the connection is lost, which `error` says already.
            let _ = query(client, doing, "ROLLBACK").await;
            Err(error)
        }
    }
}

/// Begins a read-only transaction with a single snapshot. JIT compilation and parallel workers are off: the queries
/// look far more expensive than they are.
pub(super) fn begin_sql(lock_timeout: Duration) -> String {
    let (lock, idle) = (lock_timeout.as_millis(), IDLE_TIMEOUT.as_millis());
    format!(
        "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; {} SET LOCAL lock_timeout = {lock};
        SET LOCAL idle_in_transaction_session_timeout = {idle};
        SET LOCAL jit = off; SET LOCAL max_parallel_workers_per_gather = 0;",
        *PINS
    )
}

/// A row of an answer, read by column position.
pub(super) struct Cells<'a> {
    pub(super) doing: &'a str,
    pub(super) row: &'a SimpleQueryRow,
}

impl<'a> Cells<'a> {
    pub(super) fn optional(&self, index: usize) -> Result<Option<&'a str>, SourceError> {
        self.row.try_get(index).map_err(|e| SourceError::query(self.doing, e))
    }

    pub(super) fn text(&self, index: usize) -> Result<&'a str, SourceError> {
        self.optional(index)?.ok_or_else(|| SourceError::unexpected(self.doing, format!("NULL in column {index}")))
    }

    /// Reads a JSON array of strings; NULL counts as an empty one.
    pub(super) fn names(&self, index: usize) -> Result<Vec<String>, SourceError> {
        let Some(json) = self.optional(index)? else { return Ok(Vec::new()) };
        serde_json::from_str(json).map_err(|e| SourceError::unexpected(self.doing, format!("column {index}: {e}")))
    }

    pub(super) fn yes(&self, index: usize) -> Result<bool, SourceError> {
        Ok(self.text(index)? == "t")
    }

    pub(super) fn parse<T: FromStr>(&self, index: usize) -> Result<T, SourceError> {
        let text = self.text(index)?;
        text.parse().map_err(|_| SourceError::unexpected(self.doing, format!("{text:?} in column {index}")))
    }

    pub(super) fn parse_optional<T: FromStr>(&self, index: usize) -> Result<Option<T>, SourceError> {
        self.optional(index)?.map(|_| self.parse(index)).transpose()
    }
}

pub(super) fn quoted(name: &QualifiedName) -> String {
    format!("{}.{}", escape_identifier(&name.schema), escape_identifier(&name.table))
}
