//! Creates the replication slot, so that a slot that has its name is complete.
//!
//! A slot does not send what committed before its first position, and ordinary snapshots may not see all of that yet.
//! Therefore it is first created as a temporary slot, which disappears with its session whatever happens. The exported
//! snapshot tells what the slot leaves out. Once ordinary snapshots see that, the slot is copied under its name. It must
//! not decide when that is, nor whether a slot may be created. A mistake here loses rows for good that committed just
//! before the slot.
//!
//! <https://www.postgresql.org/docs/current/protocol-replication.html#PROTOCOL-REPLICATION-CREATE-REPLICATION-SLOT>
//! <https://www.postgresql.org/docs/current/functions-admin.html#FUNCTIONS-REPLICATION>

use super::SourceError;
use super::answer::{Cells, PINS, act, in_transaction, look, query};
use super::slot::PLUGIN;
use super::wire::ReplicationConnection;
use crate::code::Code;
use crate::lsn::EndLsn;
use postgres_protocol::escape::{escape_identifier, escape_literal};
use std::fmt;
use std::time::Duration;
use tokio_postgres::{Client, SimpleQueryRow};

/// The first version with failover slots.
const FAILOVER_SINCE: u32 = 170_000;
/// How often a walsender that waits for transactions checks that its client is still connected.
const CLIENT_CHECK: Duration = Duration::from_secs(5);
/// The maximum length of a slot's name.
const NAME_BYTES: usize = 63;

/// A slot that disappears with the connection that created it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TemporarySlot {
    name: String,
    /// Sees every transaction before the slot's first position. Valid until the connection runs its next command or ends.
    pub snapshot_name: String,
}

/// A transaction that has to end before the slot can be created.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Blocker {
    Session { pid: i32, application: String, since: Option<String> },
    Prepared { gid: String, since: String },
}

impl fmt::Display for Blocker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Blocker::Session { pid, application, since } => {
                let application = Some(application.as_str()).filter(|a| !a.is_empty());
                match (application, since) {
                    (Some(application), Some(since)) => write!(f, "pid {pid} ({application}, since {since})"),
                    (Some(application), None) => write!(f, "pid {pid} ({application})"),
                    (None, Some(since)) => write!(f, "pid {pid} (since {since})"),
                    (None, None) => write!(f, "pid {pid}"),
                }
            }
            Blocker::Prepared { gid, since } => write!(f, "prepared transaction '{gid}' (since {since})"),
        }
    }
}

/// A name that no other session uses.
fn temporary_name(name: &str, pid: i32) -> String {
    let pid = pid.to_string();
    let most = NAME_BYTES - 1 - pid.len();
    let end = (0..=most.min(name.len())).rev().find(|end| name.is_char_boundary(*end)).unwrap_or(0);
    format!("{}_{pid}", &name[..end])
}

/// Creates the temporary slot from which `name` will be copied. Waits for every running transaction, prepared ones too: see
/// [`slot_creation_blockers`].
///
/// If this future is dropped while it waits, the walsender notices within seconds that its client is gone.
pub async fn create_temporary(
    replication: &mut ReplicationConnection,
    name: &str,
) -> Result<TemporarySlot, SourceError> {
    let doing = format!("creating replication slot {name}");
    notice_a_lost_client(replication).await?;
    let temporary = temporary_name(name, replication.backend_pid());
    // The old syntax, which all versions accept.
    let command =
        format!("CREATE_REPLICATION_SLOT {} TEMPORARY LOGICAL {PLUGIN} EXPORT_SNAPSHOT", escape_identifier(&temporary));
    let rows = replication.query(&command).await.map_err(|error| creation_failed(name, &doing, error))?;
    match rows.into_iter().next().as_deref() {
        Some([_, Some(_), Some(snapshot_name), ..]) => {
            Ok(TemporarySlot { name: temporary, snapshot_name: snapshot_name.clone() })
        }
        Some(_) | None => Err(SourceError::unexpected(doing, "no position, or no snapshot")),
    }
}

/// Copies the temporary slot to `name`, and drops it. Returns the slot's position: transactions that commit after it are
/// sent.
///
/// `replication`: the connection that created the temporary slot. `client`: of the same role, on the same server.
pub async fn name_slot(
    client: &Client,
    replication: &mut ReplicationConnection,
    temporary: &TemporarySlot,
    name: &str,
) -> Result<EndLsn, SourceError> {
    let doing = format!("naming replication slot {name}");
    let sql = format!(
        "SELECT lsn FROM pg_copy_logical_replication_slot({}, {}, false)",
        escape_literal(&temporary.name),
        escape_literal(name)
    );
    let results = act(client, &doing, &sql).await.map_err(|error| creation_failed(name, &doing, error))?;
    let row = results.iter().flatten().next().ok_or_else(|| SourceError::unexpected(&*doing, "no position"))?;
    let confirmed = EndLsn(Cells { doing: &doing, row }.parse(0)?);
    replication.command(&format!("DROP_REPLICATION_SLOT {}", escape_identifier(&temporary.name))).await?;
    Ok(confirmed)
}

/// # Errors
/// If the server has no failover slots.
pub async fn require_failover_slots(replication: &mut ReplicationConnection) -> Result<(), SourceError> {
    let version = replication.server_version().await?;
    if version < FAILOVER_SINCE {
        return Err(SourceError::unsuitable(
            Code::FailoverSlots,
            format!("postgres.failover is set, and Postgres {} has no failover slots", version / 10_000),
            "set postgres.failover = false, or upgrade Postgres to 17",
        ));
    }
    Ok(())
}

/// Makes the slot a failover slot if it is not one: a copy never is. Returns whether it had to.
pub async fn keep_on_standbys(
    client: &Client,
    replication: &mut ReplicationConnection,
    name: &str,
) -> Result<bool, SourceError> {
    let sql = format!(
        "SELECT to_jsonb(s) ->> 'failover' FROM pg_replication_slots s WHERE s.slot_name = {}",
        escape_literal(name)
    );
    let results = look(client, &format!("looking at replication slot {name}"), &sql).await?;
    // NULL on older servers.
    let lacks = results.iter().flatten().next().and_then(|row| row.get(0)) == Some("false");
    if lacks {
        replication.command(&format!("ALTER_REPLICATION_SLOT {} (FAILOVER true)", escape_identifier(name))).await?;
    }
    Ok(lacks)
}

/// Lets the server notice a lost connection while it creates the slot. It does not read from the connection then, so as long
/// as an old transaction stays open, the unfinished slot would count against max_replication_slots.
async fn notice_a_lost_client(replication: &mut ReplicationConnection) -> Result<(), SourceError> {
    let set = format!("SET client_connection_check_interval = {}", CLIENT_CHECK.as_millis());
    match replication.query(&set).await {
        // SQL statements start Postgres's timer, replication commands do not. It is still running when the slot is being
        // created, and restarts itself there.
        Ok(_) => replication.query("SELECT 1").await.map(drop),
        // Not every operating system supports it.
        Err(SourceError::Failed { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

fn creation_failed(name: &str, doing: &str, error: SourceError) -> SourceError {
    let SourceError::Failed { error, .. } = error else { return error };
    match error.code.as_str() {
        // Another daemon was faster.
        "42710" => SourceError::SlotInUse { slot: name.to_owned(), pid: None },
        "42602" => SourceError::unsuitable(
            Code::SlotUnsuitable,
            format!("{name:?} cannot be the name of a replication slot"),
            "set postgres.slot to lower-case letters, digits and underscores, at most 63",
        ),
        "53400" => SourceError::unsuitable(
            Code::SlotsExhausted,
            format!("every replication slot is in use, and making {name} takes two, one of them for a moment"),
            "raise max_replication_slots, or drop a slot that nobody reads",
        ),
        _ => SourceError::Failed { doing: doing.to_owned(), error },
    }
}

/// `pg_current_snapshot()` under the exported snapshot.
pub async fn exported_snapshot(client: &Client, snapshot_name: &str) -> Result<String, SourceError> {
    let doing = "reading the snapshot of the new slot";
    let sql = format!(
        "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SET TRANSACTION SNAPSHOT {}; {} SELECT pg_current_snapshot()",
        escape_literal(snapshot_name),
        *PINS
    );
    let results = match in_transaction(client, doing, query(client, doing, &sql)).await {
        Ok(results) => results,
        // It is gone: the next attempt starts over.
        Err(SourceError::Failed { error, .. }) if matches!(error.code.as_str(), "22023" | "42704") => {
            return Err(SourceError::unexpected(doing, error.message));
        }
        Err(error) => return Err(error),
    };
    let row = results.iter().flatten().next().ok_or_else(|| SourceError::unexpected(doing, "no snapshot"))?;
    Ok(Cells { doing, row }.text(0)?.to_owned())
}

/// Which transactions keep the walsender `pid` from creating its slot: those in any database that are older.
pub async fn slot_creation_blockers(client: &Client, pid: i32) -> Result<Vec<Blocker>, SourceError> {
    let doing = "asking what slot creation waits for";
    // pg_blocking_pids tells what it waits for now, whatever else this role may see; 0 is a prepared transaction. The
    // others are those that it will wait for next.
    let sql = format!(
        "WITH waited_for AS MATERIALIZED (SELECT unnest(pg_blocking_pids({pid})) AS pid),
              walsender AS MATERIALIZED (SELECT query_start AS began FROM pg_stat_activity WHERE pid = {pid})
         SELECT a.pid, a.application_name, NULL, a.xact_start::timestamptz(0)::text, a.xact_start AS since
           FROM pg_stat_activity a
          WHERE a.pid NOT IN ({pid}, pg_backend_pid())
            AND (a.pid IN (SELECT pid FROM waited_for)
                 OR a.backend_xid IS NOT NULL AND a.xact_start < (SELECT began FROM walsender))
          UNION ALL
         SELECT NULL, NULL, p.gid, p.prepared::timestamptz(0)::text, p.prepared
           FROM pg_prepared_xacts p
          WHERE p.prepared < (SELECT began FROM walsender) OR 0 IN (SELECT pid FROM waited_for)
          ORDER BY since NULLS LAST, 1"
    );
    let results = look(client, doing, &sql).await?;
    let blocker = |row: &SimpleQueryRow| {
        let row = Cells { doing, row };
        let since = row.optional(3)?.map(str::to_owned);
        Ok(match row.optional(2)? {
            Some(gid) => Blocker::Prepared { gid: gid.to_owned(), since: since.unwrap_or_default() },
            None => Blocker::Session {
                pid: row.parse(0)?,
                application: row.optional(1)?.unwrap_or_default().to_owned(),
                since,
            },
        })
    };
    results.iter().flatten().map(blocker).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_temporary_name_fits_and_belongs_to_one_session() {
        assert_eq!(temporary_name("prefetchd", 17), "prefetchd_17");
        let long = "s".repeat(63);
        assert_eq!(temporary_name(&long, 4_194_304), format!("{}_4194304", "s".repeat(55)));
        assert!(temporary_name(&"ä".repeat(40), 123).len() <= NAME_BYTES);
    }

    #[test]
    fn blockers_are_named_by_what_is_known_of_them() {
        let session = |application: &str, since: Option<&str>| {
            let blocker = Blocker::Session { pid: 7, application: application.into(), since: since.map(Into::into) };
            blocker.to_string()
        };
        assert_eq!(session("psql", Some("2024-01-01 00:00:00+00")), "pid 7 (psql, since 2024-01-01 00:00:00+00)");
        assert_eq!(session("psql", None), "pid 7 (psql)");
        assert_eq!(session("", None), "pid 7");
        let prepared = Blocker::Prepared { gid: "g".to_owned(), since: "2024-01-01 00:00:00+00".to_owned() };
        assert_eq!(prepared.to_string(), "prepared transaction 'g' (since 2024-01-01 00:00:00+00)");
    }
}
