//! How many connections Postgres allows, and how many are in use.
//!
//! One SQLSTATE (53300) stands for four different limits, and the message that names the limit is in the server's
//! language. So the catalog is queried to find out which was reached. A mistake here gives wrong advice.

use super::SourceError;
use super::answer::{Cells, look};
use super::connect::{PostgresClient, connect};
use super::target::PostgresTarget;
use super::wire::ReplicationConnection;
use crate::remedy::Sql;
use crate::schema::Identifier;
use postgres_protocol::escape::escape_literal;
use tokio_postgres::Client;

/// Which connections a daemon opens as one role.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Opens {
    Everything,
    /// The stream's, and one more at startup.
    Replication,
    /// Those that read tables, if another role replicates.
    Reading,
}

/// The stream's connection, which `max_connections` does not count.
const STREAMS: i64 = 1;

impl Opens {
    /// The stream's, the sampler's, two that load, and one that watches the catalog.
    fn wanted(self) -> i64 {
        match self {
            Opens::Everything => 5,
            Opens::Replication => 2,
            Opens::Reading => 4,
        }
    }

    /// With fewer it cannot load: loading and watching the catalog then share one.
    fn least(self) -> i64 {
        match self {
            Opens::Everything => 3,
            Opens::Replication | Opens::Reading => 2,
        }
    }

    fn streams(self) -> i64 {
        match self {
            Opens::Everything | Opens::Replication => STREAMS,
            Opens::Reading => 0,
        }
    }
}
const TOO_MANY_CONNECTIONS: &str = "53300";

/// A limit that may prevent a session from being opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Limit {
    /// `ALTER ROLE … CONNECTION LIMIT`.
    Role(String),
    /// `ALTER DATABASE … CONNECTION LIMIT`.
    Database(String),
    /// `max_connections`, less the connections reserved for others.
    Server,
    /// `max_wal_senders`.
    WalSenders,
}

/// One limit, and how much of it is in use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConnectionLimit {
    pub limit: Limit,
    pub at_most: i64,
    pub others: i64,
    /// Those of the daemon with this application name, including the session that asks.
    pub ours: i64,
    /// With fewer, a daemon cannot work.
    pub least: i64,
    /// The most that a daemon ever opens.
    pub wanted: i64,
}

/// Every limit that applies to the session that asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConnectionLimits(pub Vec<ConnectionLimit>);

impl ConnectionLimit {
    pub fn left_for_us(&self) -> i64 {
        (self.at_most - self.others).max(0)
    }

    fn is_reached(&self) -> bool {
        self.ours + self.others >= self.at_most
    }

    /// Describes the limit and its use, for a sentence.
    pub fn fact(&self) -> String {
        let (at_most, others) = (self.at_most, self.others);
        let used = format!("{others} of {at_most} are in use by others");
        match &self.limit {
            Limit::Role(role) => format!("the connection limit of role {} is {at_most} ({used})", Identifier(role)),
            Limit::Database(database) => {
                format!("the connection limit of database {} is {at_most} ({used})", Identifier(database))
            }
            Limit::Server => format!("max_connections leaves {at_most} connections for this role ({used})"),
            Limit::WalSenders => format!("max_wal_senders is {at_most} ({used})"),
        }
    }

    pub fn remedy(&self) -> String {
        let enough = self.at_most.max(self.others + self.wanted);
        match &self.limit {
            Limit::Role(role) => Sql::RoleLimit { role, connections: enough }.to_string(),
            Limit::Database(database) => Sql::DatabaseLimit { database, connections: enough }.to_string(),
            Limit::Server => "end other sessions, or raise max_connections (needs a restart of postgres)".to_owned(),
            Limit::WalSenders => {
                "end another replication connection, or raise max_wal_senders (needs a restart of postgres)".to_owned()
            }
        }
    }
}

impl ConnectionLimits {
    /// Returns the limit that was reached, and the remedy.
    pub fn advice(&self) -> String {
        let reached = self.0.iter().find(|limit| limit.is_reached());
        // A session has ended meanwhile, so this is the limit with the fewest connections left.
        let reached = reached.or_else(|| self.0.iter().min_by_key(|limit| limit.at_most - limit.others - limit.ours));
        let text = reached.map(|limit| format!("{}: {}", limit.fact(), limit.remedy()));
        text.unwrap_or_else(|| "a connection limit was reached: end other sessions".to_owned())
    }
}

/// One statement for both kinds of sessions. Returns `NULL` for a limit that does not apply.
fn limits_sql(application_name: &str) -> String {
    let name = escape_literal(application_name);
    format!(
        "WITH a AS (SELECT a.datid, a.usesysid, w.pid IS NOT NULL AS walsender,
                           a.backend_type IS NULL OR a.backend_type IN ('client backend', 'walsender') AS counts,
                           a.usesysid = r.oid AND a.application_name = {name}::name::text AS ours
                      FROM pg_stat_activity a LEFT JOIN pg_stat_replication w ON w.pid = a.pid
                      JOIN pg_roles r ON r.rolname = session_user
                     WHERE a.usesysid IS NOT NULL)
         SELECT r.rolname, CASE WHEN r.rolconnlimit >= 0 AND NOT r.rolsuper THEN r.rolconnlimit END,
                (SELECT count(*) FROM a WHERE counts AND usesysid = r.oid AND NOT ours),
                (SELECT count(*) FROM a WHERE ours),
                d.datname, CASE WHEN d.datconnlimit >= 0 AND NOT r.rolsuper THEN d.datconnlimit END,
                (SELECT count(*) FROM a WHERE counts AND datid = d.oid AND NOT ours),
                current_setting('max_connections')::int - CASE WHEN r.rolsuper THEN 0 ELSE
                    current_setting('superuser_reserved_connections')::int
                    + CASE WHEN EXISTS (SELECT FROM pg_roles p WHERE p.rolname = 'pg_use_reserved_connections'
                                           AND pg_has_role(p.oid, 'USAGE')) THEN 0
                           ELSE coalesce(current_setting('reserved_connections', true), '0')::int END END,
                (SELECT count(*) FROM a WHERE counts AND NOT walsender AND NOT ours),
                (SELECT count(*) FROM a WHERE NOT walsender AND ours),
                current_setting('max_wal_senders')::int,
                (SELECT count(*) FROM a WHERE walsender AND NOT ours),
                (SELECT count(*) FROM a WHERE walsender AND ours)
           FROM pg_roles r, pg_database d WHERE r.rolname = session_user AND d.datname = current_database()"
    )
}

fn limits(cells: &[Option<&str>], opens: Opens) -> Option<ConnectionLimits> {
    let number = |index: usize| cells.get(index).copied().flatten().and_then(|text| text.parse::<i64>().ok());
    let text = |index: usize| cells.get(index).copied().flatten().map(str::to_owned);
    let ours = number(3)?;
    let mut limits = Vec::new();
    let (least, wanted) = (opens.least(), opens.wanted());
    if let Some(at_most) = number(1) {
        let (limit, others) = (Limit::Role(text(0)?), number(2)?);
        limits.push(ConnectionLimit { limit, at_most, others, ours, least, wanted });
    }
    if let Some(at_most) = number(5) {
        let (limit, others) = (Limit::Database(text(4)?), number(6)?);
        limits.push(ConnectionLimit { limit, at_most, others, ours, least, wanted });
    }
    let (at_most, others, ours) = (number(7)?, number(8)?, number(9)?);
    let (least, wanted) = (least - opens.streams(), wanted - opens.streams());
    limits.push(ConnectionLimit { limit: Limit::Server, at_most, others, ours, least, wanted });
    let (at_most, others, ours) = (number(10)?, number(11)?, number(12)?);
    let (limit, least, wanted) = (Limit::WalSenders, STREAMS, STREAMS);
    limits.push(ConnectionLimit { limit, at_most, others, ours, least, wanted });
    Some(ConnectionLimits(limits))
}

/// Queries the limits for the role that asks.
pub async fn connection_limits(
    client: &Client,
    application_name: &str,
    opens: Opens,
) -> Result<ConnectionLimits, SourceError> {
    let doing = "asking for the connection limits";
    let results = look(client, doing, &limits_sql(application_name)).await?;
    let row = results.iter().flatten().next().ok_or_else(|| SourceError::unexpected(doing, "no answer"))?;
    let row = Cells { doing, row };
    let cells = (0..13).map(|index| row.optional(index)).collect::<Result<Vec<_>, _>>()?;
    limits(&cells, opens).ok_or_else(|| SourceError::unexpected(doing, "a malformed answer"))
}

/// Adds the limit that was reached to an error about too many connections. Replication connections are counted
/// separately, so one may still be admitted to ask.
pub async fn explained(target: &PostgresTarget, application_name: &str, error: SourceError) -> SourceError {
    if !is_about_a_limit(&error) {
        return error;
    }
    let Ok(mut replication) = ReplicationConnection::connect(target, application_name).await else { return error };
    let Ok(rows) = replication.query(&limits_sql(application_name)).await else { return error };
    let cells: Vec<Option<&str>> = rows.iter().flatten().map(|cell| cell.as_deref()).collect();
    match limits(&cells, Opens::Everything) {
        Some(limits) => with_advice(error, &limits),
        None => error,
    }
}

/// The same for a refused replication connection, when an ordinary connection is available to ask.
pub async fn explained_by(client: &Client, application_name: &str, error: SourceError) -> SourceError {
    if !is_about_a_limit(&error) {
        return error;
    }
    match connection_limits(client, application_name, Opens::Everything).await {
        Ok(limits) => with_advice(error, &limits),
        Err(_) => error,
    }
}

fn is_about_a_limit(error: &SourceError) -> bool {
    error.server().is_some_and(|server| server.code == TOO_MANY_CONNECTIONS)
}

fn with_advice(mut error: SourceError, limits: &ConnectionLimits) -> SourceError {
    if let SourceError::Refused { error, .. } = &mut error {
        error.hint = Some(limits.advice());
    }
    error
}

/// Opens an ordinary connection. If a limit prevents that, the error names the limit.
pub async fn connect_or_explain(
    target: &PostgresTarget,
    application_name: &str,
) -> Result<PostgresClient, SourceError> {
    match connect(target, application_name).await {
        Ok(client) => Ok(client),
        Err(error) => Err(explained(target, application_name, error).await),
    }
}
