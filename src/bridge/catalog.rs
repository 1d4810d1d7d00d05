//! Checks the catalog from time to time for changes that the stream does not announce: a column with a default, rows
//! rewritten in place, a renamed table, an attached partition, an enum's label.
//!
//! It only reads; the machine decides what follows. It runs beside the loader, since a check may wait for a lock on a
//! table. If no connection is available, it checks later.

use super::BridgeError;
use super::connections::Connections;
use super::context::Said;
use super::load::{KnownTables, look_up};
use crate::code::Code;
use crate::loader::LookedUp;
use crate::loader::range::Sizes;
use crate::remedy::Sql;
use crate::schema::{TableId, TableSpec};
use crate::session::load_messages::CatalogSeen;
use crate::source::connect::{PostgresClient, connect};
use crate::source::slot::Publication;
use crate::source::snapshot;
use crate::source::target::PostgresTarget;
use crate::source::{SourceError, slot};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;

/// Who owns the publication.
pub enum Publishing {
    /// prefetchd created it, and may change it; with this role, if it reads with another one.
    Ours(String, Option<Box<PostgresTarget>>),
    Theirs(String),
}

impl Publishing {
    fn name(&self) -> &str {
        let (Publishing::Ours(name, _) | Publishing::Theirs(name)) = self;
        name
    }
}

/// Runs until the session ends.
pub async fn run(
    interval: Duration,
    connections: Connections,
    publication: Publishing,
    specs: Arc<[TableSpec]>,
    known: KnownTables,
    said: Arc<Said>,
    out: mpsc::Sender<(TableId, CatalogSeen)>,
) -> Result<(), BridgeError> {
    // What the last check found, and what a snapshot saw before it. As long as snapshots see nothing new, no catalog
    // has changed.
    let mut last = None;
    loop {
        tokio::time::sleep(interval).await;
        let client = connections.take().await?;
        let looked = async {
            let snapshot = snapshot::current(&client.client).await?;
            if let Some((_, seen)) = last.take_if(|(before, _)| *before == snapshot) {
                return Ok((Some(snapshot), seen));
            }
            let Look { seen, complete } =
                look(&client, connections.application_name(), &publication, &specs, &known, &said).await?;
            Ok((complete.then_some(snapshot), seen))
        };
        match looked.await {
            Ok((snapshot, seen)) => {
                connections.worked();
                connections.give_back(client);
                for (table, seen) in &seen {
                    out.send((*table, seen.clone())).await.map_err(|_| BridgeError::SessionOver)?;
                }
                last = snapshot.map(|snapshot| (snapshot, seen));
            }
            // Checked again later, on another connection.
            Err(BridgeError::Source(error)) if !error.is_about_the_query() => connections.failed(&error),
            // Checked again later, on the same connection.
            Err(BridgeError::Source(error)) if error.is_transient_query_failure() => {
                connections.failed(&error);
                connections.give_back(client);
            }
            Err(error) => return Err(error),
        }
    }
}

struct Look {
    seen: Vec<(TableId, CatalogSeen)>,
    /// Nothing is left for the next check.
    complete: bool,
}

async fn look(
    client: &PostgresClient,
    application_name: &str,
    publication: &Publishing,
    specs: &[TableSpec],
    known: &KnownTables,
    said: &Said,
) -> Result<Look, BridgeError> {
    let mut complete = true;
    let name = publication.name();
    match slot::publication(&client.client, name).await? {
        Some(found) => {
            // Something has been left out already, and it is not known what.
            publishes_everything(&found).map_err(|error| BridgeError::Reload(error.code(), error.to_string()))?;
            let missing: Vec<_> = specs.iter().filter(|spec| !found.covers(&spec.table)).collect();
            if let Publishing::Ours(_, owner) = publication
                && !missing.is_empty()
            {
                complete = false;
                match owner {
                    None => publish_again(client, name, &missing).await?,
                    Some(owner) => publish_again(&connect(owner, application_name).await?, name, &missing).await?,
                }
            }
        }
        // Up to Postgres 17 the stream then ends. Since 18 it continues, but contains no changes.
        None => {
            let doing = format!("looking at publication {name}");
            return Err(SourceError::unexpected(doing, "it is there no longer").into());
        }
    }
    let all: Vec<&TableSpec> = specs.iter().collect();
    let mut seen = Vec::with_capacity(specs.len());
    for (spec, looked_up) in specs.iter().zip(look_up(client, &all, name, Sizes::Remembered, known).await?) {
        let found = match looked_up {
            LookedUp::Locked(_) => {
                complete = false;
                continue;
            }
            LookedUp::Loadable(table) => {
                let catalog = &table.described.catalog;
                if let Some(left_out) = catalog.left_out(name) {
                    said.left_out(&spec.name, &left_out);
                }
                let (fingerprint, mark) = (table.fingerprint, table.catalog);
                let (composition, types) = (table.composition.clone(), table.types.clone());
                CatalogSeen::Table { fingerprint, mark, composition, types, written_by: catalog.written_by() }
            }
            LookedUp::Blocked(why) => CatalogSeen::Unfit(why),
        };
        seen.push((spec.id, found));
    }
    Ok(Look { seen, complete })
}

/// A table that was dropped and created again is no longer in the publication.
async fn publish_again(client: &PostgresClient, publication: &str, missing: &[&TableSpec]) -> Result<(), SourceError> {
    for spec in missing {
        if !slot::may_publish(client, &spec.table).await? {
            continue;
        }
        match slot::add_table(client, publication, &spec.table).await {
            Ok(()) => {
                let table = &spec.name;
                tracing::info!(table, publication, "table added to the publication again");
            }
            // A long transaction is writing to it, or it was dropped again.
            Err(error) if error.is_about_the_table() => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// # Errors
/// If it does not publish every operation: Postgres then leaves out changes silently.
pub fn publishes_everything(publication: &Publication) -> Result<(), BridgeError> {
    let (name, lacking) = (&publication.name, publication.lacking_operations());
    if lacking.is_empty() {
        return Ok(());
    }
    let (lacking, remedy) = (lacking.join(", "), Sql::PublishEverything { publication: name });
    let text = format!("publication {name} does not publish {lacking}: {remedy}");
    Err(BridgeError::Setup(Code::PublicationOperations, text))
}
