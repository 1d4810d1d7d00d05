//! The two roles: one replicates, and the same or another one reads tables and the catalog (`postgres.reader_url`).
//!
//! Slot, publication and stream belong to the first role; loads, checks and watermarks to the second. A mistake here
//! reads rows from a different server than the changes come from, or runs code of a table's owner as a role that may
//! replicate.

use super::SourceError;
use super::connect::{PostgresClient, connect, unsuited};
use super::limits::connect_or_explain;
use super::slot;
use super::target::PostgresTarget;
use crate::code::Code;

/// An ordinary connection for each role.
pub struct Roles {
    reads: PostgresClient,
    /// `None` if it is the role that reads.
    replicates: Option<PostgresClient>,
}

impl Roles {
    /// # Errors
    /// [`SourceError::Unsuitable`] if the two URLs lead to different systems or databases. A temporary error if they
    /// lead to two servers of one system.
    pub async fn connect(
        replicates: &PostgresTarget,
        reads: Option<&PostgresTarget>,
        application_name: &str,
    ) -> Result<Self, SourceError> {
        let first = connect_or_explain(replicates, application_name).await?;
        let Some(target) = reads else { return Ok(Self { reads: first, replicates: None }) };
        let reads = connect(target, application_name).await?;
        same_server(&first, &reads, target).await?;
        Ok(Self { reads, replicates: Some(first) })
    }

    pub fn reads(&self) -> &PostgresClient {
        &self.reads
    }

    pub fn replicates(&self) -> &PostgresClient {
        self.replicates.as_ref().unwrap_or(&self.reads)
    }

    pub fn into_reader(self) -> PostgresClient {
        self.reads
    }
}

async fn same_server(
    replicates: &PostgresClient,
    reads: &PostgresClient,
    target: &PostgresTarget,
) -> Result<(), SourceError> {
    let unsuitable = |what: &str, here: &str, there: &str| {
        SourceError::unsuitable(
            Code::ReaderServer,
            format!("postgres.reader_url leads to {what} {there}, and postgres.url to {here}"),
            "let both lead to the same database of the same server",
        )
    };
    let (here, there) = (slot::database(replicates).await?, slot::database(reads).await?);
    match (here.system_id, there.system_id) {
        (Some(here), Some(there)) if here != there => return Err(unsuitable("system", &here, &there)),
        _ => {}
    }
    if here.name != there.name {
        return Err(unsuitable("database", &here.name, &there.name));
    }
    if replicates.server_started != reads.server_started {
        let why = "postgres.reader_url leads to another server than postgres.url, or one of them has restarted";
        return Err(unsuited(&target.describe(), why));
    }
    Ok(())
}
