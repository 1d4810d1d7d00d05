//! What a database offers to be followed: its tables, with their keys, and the names that are taken.
//!
//! Knows the catalog, and nothing of a configuration. It must change nothing. A mistake here proposes a table that cannot
//! be followed, or hides one that can.

use super::SourceError;
use super::answer::{Cells, look};
use crate::schema::QualifiedName;
use tokio_postgres::Client;

/// A table, or what looks like one.
#[derive(Debug, Clone, PartialEq)]
pub struct Candidate {
    pub name: QualifiedName,
    /// What it is, if it cannot be followed under its own name.
    pub instead: Option<String>,
    /// As of the last ANALYZE. `None` if there was none.
    pub rows: Option<f64>,
    pub identity: Identity,
    /// Whether the role of this connection may read all of its rows.
    pub readable: bool,
    /// Itself and, if it is partitioned, its partitions at the lowest level: loads read those.
    pub relations: Vec<QualifiedName>,
    /// Whether policies may hide rows of one of them from a role.
    pub has_row_security: bool,
    /// Their schemas that not everybody may use.
    pub closed_schemas: Vec<String>,
}

/// What identifies the rows of a table in the stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Identity {
    /// These columns, in the order of their index.
    Key(Vec<String>),
    /// REPLICA IDENTITY NOTHING.
    Nothing,
    /// There is no primary key. These columns have a unique index, if there are any.
    Missing(Vec<String>),
}

/// What else decides about a first configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Surroundings {
    pub database: String,
    /// Whether everybody may connect to the database.
    pub database_is_open: bool,
    /// A group whose members may replicate, in place of the attribute.
    pub replication_group: Option<String>,
    /// The names of all slots of the server and all publications of the database.
    pub taken: Vec<String>,
}

/// Returns the tables of all schemas but the system's, and what looks like one, ordered by name.
pub async fn tables(client: &Client) -> Result<Vec<Candidate>, SourceError> {
    let doing = "listing the tables";
    let columns = "SELECT json_agg(a.attname ORDER BY k.place)
                     FROM unnest(i.indkey) WITH ORDINALITY k(number, place)
                     JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.number
                    WHERE k.place <= i.indnkeyatts";
    let sql = format!(
        "SELECT n.nspname, c.relname,
                CASE WHEN c.relkind = 'v' THEN 'a view' WHEN c.relkind = 'm' THEN 'a materialized view'
                     WHEN c.relkind = 'f' THEN 'a foreign table'
                     WHEN c.relpersistence = 'u' THEN 'unlogged' WHEN c.relpersistence = 't' THEN 'temporary'
                     WHEN c.relispartition THEN 'a partition of '
                          || (SELECT h.inhparent::regclass::text FROM pg_inherits h WHERE h.inhrelid = c.oid LIMIT 1)
                     WHEN EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid
                                                            AND d.deptype = 'e') THEN 'part of an extension' END,
                CASE WHEN c.reltuples >= 0 AND c.relkind <> 'p' THEN c.reltuples END,
                c.relreplident = 'n',
                (SELECT ({columns}) FROM pg_index i
                  WHERE i.indrelid = c.oid AND i.indisvalid AND i.indimmediate
                    AND CASE c.relreplident WHEN 'i' THEN i.indisreplident ELSE i.indisprimary END),
                (SELECT ({columns}) FROM pg_index i
                  WHERE i.indrelid = c.oid AND i.indisvalid AND i.indimmediate AND i.indisunique
                    AND i.indpred IS NULL AND i.indexprs IS NULL ORDER BY i.indnkeyatts, i.indexrelid LIMIT 1),
                own.readable, own.secured, own.schemas, own.tables, own.closed
           FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
          CROSS JOIN LATERAL (
                SELECT bool_and(has_schema_privilege(s.oid, 'USAGE') AND has_table_privilege(r.oid, 'SELECT')
                                AND NOT row_security_active(r.oid)) AS readable,
                       bool_or(r.relrowsecurity) AS secured,
                       json_agg(s.nspname ORDER BY r.oid) AS schemas, json_agg(r.relname ORDER BY r.oid) AS tables,
                       json_agg(DISTINCT s.nspname) FILTER (WHERE NOT has_schema_privilege('public', s.oid, 'USAGE')) AS closed
                  FROM (SELECT c.oid UNION SELECT t.relid::oid FROM pg_partition_tree(c.oid) t
                                            WHERE t.isleaf AND c.relkind = 'p') these(oid)
                  JOIN pg_class r ON r.oid = these.oid JOIN pg_namespace s ON s.oid = r.relnamespace) own
          WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f') AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'
          ORDER BY n.nspname COLLATE \"C\", c.relname COLLATE \"C\""
    );
    let results = look(client, doing, &sql).await?;
    let named = |(schema, table): (String, String)| QualifiedName { schema, table };
    let candidate = |row| {
        let row = Cells { doing, row };
        let (key, unique) = (row.names(5)?, row.names(6)?);
        let identity = match (row.yes(4)?, key.is_empty()) {
            (true, _) => Identity::Nothing,
            (false, true) => Identity::Missing(unique),
            (false, false) => Identity::Key(key),
        };
        Ok(Candidate {
            name: QualifiedName { schema: row.text(0)?.to_owned(), table: row.text(1)?.to_owned() },
            instead: row.optional(2)?.map(str::to_owned),
            rows: row.parse_optional(3)?,
            identity,
            readable: row.yes(7)?,
            has_row_security: row.yes(8)?,
            relations: row.names(9)?.into_iter().zip(row.names(10)?).map(named).collect(),
            closed_schemas: row.names(11)?,
        })
    };
    results.iter().flatten().map(candidate).collect()
}

pub async fn surroundings(client: &Client) -> Result<Surroundings, SourceError> {
    let doing = "asking for the names that are taken";
    // Amazon RDS and Aurora.
    let sql = "SELECT current_database(), has_database_privilege('public', current_database(), 'CONNECT'),
                      (SELECT rolname FROM pg_roles WHERE rolname = 'rds_replication'),
                      (SELECT json_agg(name) FROM (SELECT slot_name FROM pg_replication_slots
                                                    UNION SELECT pubname FROM pg_publication) taken(name))";
    let results = look(client, doing, sql).await?;
    let row = results.iter().flatten().next().ok_or_else(|| SourceError::unexpected(doing, "no answer"))?;
    let row = Cells { doing, row };
    Ok(Surroundings {
        database: row.text(0)?.to_owned(),
        database_is_open: row.yes(1)?,
        replication_group: row.optional(2)?.map(str::to_owned),
        taken: row.names(3)?,
    })
}
