//! Looks at the catalog now and then, for changes that the stream does not announce: a column with a default, rows
//! rewritten in place, a renamed table, a partition attached, an enum's label.
//!
//! It only looks; what follows is the machine's matter. Beside the loader, since looking waits for whoever holds a table's
//! lock. Where no connection can be had, it looks later.

use super::BridgeError;
use super::chunk::CatalogSeen;
use super::connections::Connections;
use super::load::{KnownTables, blocked_by, look_up};
use crate::schema::{TableId, TableSpec};
use crate::source::connect::PostgresClient;
use crate::source::slot::Publication;
use crate::source::snapshot::Sizes;
use crate::source::{SourceError, slot};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;

/// Changes are followed within 15 s: one look, and the load.
const INTERVAL: Duration = Duration::from_secs(5);

/// Works until the session ends.
pub async fn run(
    connections: Connections,
    publication: String,
    specs: Arc<[TableSpec]>,
    known: KnownTables,
    out: mpsc::Sender<(TableId, CatalogSeen)>,
) -> Result<(), BridgeError> {
    loop {
        tokio::time::sleep(INTERVAL).await;
        let client = connections.take().await?;
        match look(&client, &publication, &specs, &known, &out).await {
            Ok(()) => {
                connections.worked();
                connections.give_back(client);
            }
            // Next time, on another.
            Err(BridgeError::Source(error)) if !error.is_about_the_query() => connections.failed(&error),
            Err(error) => return Err(error),
        }
    }
}

async fn look(
    client: &PostgresClient,
    publication: &str,
    specs: &[TableSpec],
    known: &KnownTables,
    out: &mpsc::Sender<(TableId, CatalogSeen)>,
) -> Result<(), BridgeError> {
    match slot::publication(&client.client, publication).await? {
        // Something was left out already, it is not known what.
        Some(found) => publishes_everything(&found).map_err(|error| BridgeError::Reload(error.to_string()))?,
        // Up to Postgres 17 the stream ends then. Since 18 it goes on, without a change in it.
        None => {
            let doing = format!("looking at publication {publication}");
            return Err(SourceError::unexpected(doing, "it is there no longer").into());
        }
    }
    for spec in specs {
        let seen = match look_up(client, spec, publication, Sizes::Remembered, known).await {
            // Next time.
            Err(BridgeError::Source(error)) if error.is_about_a_lock() => continue,
            Ok(Ok(shape)) => {
                let (fingerprint, mark) = (shape.mapping.fingerprint, shape.catalog.mark());
                CatalogSeen::Table { fingerprint, mark }
            }
            Ok(Err(why)) => CatalogSeen::Unfit(why),
            Err(BridgeError::Source(error)) if error.is_about_the_table() => CatalogSeen::Unfit(blocked_by(&error)),
            Err(error) => return Err(error),
        };
        out.send((spec.id, seen)).await.map_err(|_| BridgeError::SessionOver)?;
    }
    Ok(())
}

/// # Errors
/// Where it keeps an operation to itself: Postgres then leaves out changes without a word.
pub fn publishes_everything(publication: &Publication) -> Result<(), BridgeError> {
    let (name, lacking) = (&publication.name, publication.lacking_operations());
    if lacking.is_empty() {
        return Ok(());
    }
    Err(BridgeError::Setup(format!(
        "publication {name} does not publish {}: ALTER PUBLICATION {name} SET (publish = 'insert, update, delete, truncate')",
        lacking.join(", ")
    )))
}
