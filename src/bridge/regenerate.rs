//! Takes a configuration that was read again: judges it while the daemon goes on, and prepares what the next session
//! begins with.
//!
//! Whatever only Postgres knows of the tables that are new is asked beforehand, so that a configuration that cannot work
//! changes nothing.

use super::BridgeError;
use super::context::{Context, prefixes};
use super::prerequisites;
use crate::code::Code;
use crate::config::Create;
use crate::reload::{Changes, Refused, Reread};
use crate::remedy::Sql;
use crate::schema::TableSpec;
use crate::sink::survey;
use crate::source::roles::Roles;
use crate::source::slot;
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// How long Postgres may take to say what it has.
const PATIENCE: Duration = Duration::from_secs(30);

/// What a reload comes to.
pub struct Regenerated {
    pub changes: Changes,
    /// `None` if nothing changes that takes effect without a restart.
    pub next: Option<Arc<Context>>,
}

/// # Errors
/// Why the configuration is not taken.
pub async fn regenerate(ctx: &Context, reread: &Reread, stop: CancellationToken) -> Result<Regenerated, Refused> {
    let new = reread().map_err(|error| Refused::because(error.to_string()))?;
    let changes = Changes::between(&ctx.config, &new);
    if changes.are_none() {
        return Ok(Regenerated { changes, next: None });
    }
    let new = ctx.config.reloaded(new);
    if new.lanes().is_some() != ctx.config.lanes().is_some() {
        return Err(Refused::because(
            "the tables' keys would lie in other hash slots of the cluster: stop the daemon, run prefetchd teardown --keys \
             with the present configuration, and start it with the new one",
        ));
    }
    let mut next = ctx.next(new, stop);
    let is_new = |spec: &&TableSpec| changes.added.contains(&spec.name) || changes.changed.contains(&spec.name);
    let specs: Vec<TableSpec> = next.specs.iter().filter(is_new).cloned().collect();
    if !specs.is_empty() {
        let asked = tokio::time::timeout(PATIENCE, ask_postgres(&next, &specs)).await;
        let silent = || Refused::because(format!("postgres has not answered for {} s: try again", PATIENCE.as_secs()));
        asked.map_err(|_| silent())?.map_err(|error| Refused::because(error.to_string()))?;
        let (target, durability) = (&next.config.redis.target, next.config.redis.durability);
        let prefixes = prefixes(&next.config);
        let asked = survey::require(target, &next.own, &prefixes, durability, next.config.lanes());
        let asked = tokio::time::timeout(PATIENCE, asked).await;
        let silent = || Refused::because(format!("redis has not answered for {} s: try again", PATIENCE.as_secs()));
        asked.map_err(|_| silent())?.map_err(|error| Refused::because(error.to_string()))?;
    }
    next.metrics = Arc::new(ctx.metrics.for_tables(&next.specs));
    Ok(Regenerated { changes, next: Some(Arc::new(next)) })
}

/// Whether these tables can be followed.
async fn ask_postgres(ctx: &Context, specs: &[TableSpec]) -> Result<(), BridgeError> {
    let settings = &ctx.config.postgres;
    let roles = Roles::connect(&settings.target, settings.reader.as_ref(), &ctx.application_name).await?;
    prerequisites::describe_strictly(ctx, roles.reads(), specs).await?;
    let publication = slot::publication(&roles.reads().client, &settings.publication).await?;
    for spec in specs {
        let is_missing = publication.as_ref().is_some_and(|publication| !publication.covers(&spec.table));
        if is_missing && settings.create == Create::Never {
            let (name, table) = (&settings.publication, &spec.table);
            let add = Sql::AddTable { publication: name, table };
            let text = format!("table {table} is not in publication {name}: {add}");
            return Err(BridgeError::Setup(Code::TableUnpublished, text));
        }
    }
    Ok(())
}
