//! What a session needs in Postgres before it can begin: a server that can be followed, tables that fit their
//! configuration, a publication that contains them.
//!
//! It must not write to Redis, nor touch the slot. A mistake here lets a session begin that can never load a table or
//! never gets its changes.

use super::BridgeError;
use super::catalog;
use super::context::Context;
use super::lookup_columns;
use crate::checkpoint::Checkpoint;
use crate::code::Code;
use crate::config::Create;
use crate::loader::range::Sizes;
use crate::plan::mapping::{self, Mapping};
use crate::progress::resume::ConfiguredTable;
use crate::reason::Reason;
use crate::remedy::Sql;
use crate::schema::{CatalogMark, TableSpec};
use crate::source::SourceError;
use crate::source::connect::PostgresClient;
use crate::source::slot::{self, ServerFacts};
use crate::source::snapshot::{self, Asked, CatalogTable};
use crate::typed::known::KnownTypes;

/// The oldest Postgres whose pgoutput sends logical messages.
const OLDEST_POSTGRES: u32 = 140_000;
/// The configured tables as they are in the catalog now.
pub struct Described {
    pub tables: Vec<ConfiguredTable>,
    pub types: KnownTypes,
}

/// What was done about the publication.
pub struct Published {
    pub created: bool,
    /// Tables that were missing from it and must be loaded, with the reason.
    pub added: Vec<(String, Reason)>,
}

pub fn check_server(facts: &ServerFacts, application_name: &str) -> Result<(), BridgeError> {
    let setup = |code: Code, message: String| Err(BridgeError::Setup(code, message));
    if facts.version_num < OLDEST_POSTGRES {
        let text = format!("postgres {} is too old: prefetchd needs 14 or newer", facts.version_num / 10_000);
        return setup(Code::PostgresVersion, text);
    }
    if facts.in_recovery {
        return Err(BridgeError::Waiting(
            Code::PostgresStandby,
            "postgres is a standby in recovery; prefetchd follows the primary".to_owned(),
        ));
    }
    if !facts.can_decode() {
        let (level, remedy) = (&facts.wal_level, Sql::WalLevelLogical);
        return setup(Code::WalLevel, format!("postgres has wal_level = {level}: {remedy} then restart postgres"));
    }
    if facts.names_as_synchronous_standby(application_name) {
        let text = format!(
            "synchronous_standby_names would make prefetchd a synchronous standby, and commits would wait for it: \
             name your standbys there instead of '*' (it is {:?})",
            facts.synchronous_standby_names
        );
        return setup(Code::SynchronousStandby, text);
    }
    Ok(())
}

/// Checks every configured table. At the first start a table that cannot be followed is an error, unless only its owner can
/// fix it. Later the loader reports it and stops following that table alone.
pub async fn describe(ctx: &Context, client: &PostgresClient) -> Result<Described, BridgeError> {
    let stops_that_table_alone = |error: &BridgeError| match error {
        BridgeError::Source(SourceError::OwnersCode { .. }) => true,
        BridgeError::Setup(..) => ctx.has_begun(),
        BridgeError::Source(error) => error.is_about_the_table() && ctx.has_begun(),
        _ => false,
    };
    describe_all(ctx, client, &ctx.specs, stops_that_table_alone).await
}

/// Fails for any of these tables that cannot be followed.
pub async fn describe_strictly(
    ctx: &Context,
    client: &PostgresClient,
    specs: &[TableSpec],
) -> Result<Described, BridgeError> {
    describe_all(ctx, client, specs, |_| false).await
}

async fn describe_all(
    ctx: &Context,
    client: &PostgresClient,
    specs: &[TableSpec],
    stops_that_table_alone: impl Fn(&BridgeError) -> bool,
) -> Result<Described, BridgeError> {
    let booleans = snapshot::boolean_types(&client.client).await?;
    let mut types = KnownTypes { booleans: booleans.clone(), ..KnownTypes::default() };
    let mut tables = Vec::new();
    let asked: Vec<Asked<'_>> = specs.iter().map(|spec| Asked { name: &spec.table, chosen: &spec.columns }).collect();
    let publication = &ctx.config.postgres.publication;
    let found = snapshot::describe_all(&client.client, &asked, publication, Sizes::Remembered).await?;
    for (spec, found) in specs.iter().zip(found) {
        let seen = found.map_err(BridgeError::from).and_then(|catalog| {
            let of_table =
                catalog.as_ref().map(|catalog| catalog.known_types(spec.format, &booleans)).unwrap_or_default();
            types.learn(of_table);
            describe_table(ctx, spec, catalog, &types)
        });
        let (fingerprint, catalog) = match seen {
            Err(error) if stops_that_table_alone(&error) => (0, CatalogMark { shape: 0, storage: 0 }),
            seen => seen?,
        };
        let template = spec.key.to_string();
        tables.push(ConfiguredTable { name: spec.name.clone(), template, fingerprint, catalog });
    }
    Ok(Described { tables, types })
}

fn describe_table(
    ctx: &Context,
    spec: &TableSpec,
    catalog: Option<CatalogTable>,
    types: &KnownTypes,
) -> Result<(u64, CatalogMark), BridgeError> {
    let Some(catalog) = catalog else {
        let text = format!(
            "table {} (tables.name = {:?}) does not exist in this database: if it has another name now, correct `table`, else \
             create it",
            spec.table, spec.name
        );
        return Err(BridgeError::Setup(Code::TableMissing, text));
    };
    if let Some(left_out) = catalog.left_out(&ctx.config.postgres.publication) {
        ctx.said.left_out(&spec.name, &left_out);
    }
    let setup = |error: mapping::MappingError| {
        let error = error.knowing(&catalog.generated);
        BridgeError::Setup(Code::of_mapping(&error), error.to_string())
    };
    mapping::check_identity(spec, catalog.identity, &catalog.identity_columns, &catalog.relation()).map_err(setup)?;
    let mapping = Mapping::bind(spec, &catalog.relation(), types).map_err(setup)?;
    lookup_columns::check(spec, &catalog).map_err(setup)?;
    Ok((mapping.fingerprint, catalog.mark()))
}

pub async fn publish(
    ctx: &Context,
    client: &PostgresClient,
    found: Option<&Checkpoint>,
) -> Result<Published, BridgeError> {
    let settings = &ctx.config.postgres;
    let name = &settings.publication;
    let tables: Vec<_> = ctx.specs.iter().map(|s| s.table.clone()).collect();
    let Some(publication) = slot::publication(&client.client, name).await? else {
        if settings.create == Create::Never {
            let create = Sql::CreatePublication { publication: name, tables: &tables };
            let text = format!("publication {name} does not exist: set postgres.create = true, or {create}");
            return Err(BridgeError::Setup(Code::PublicationMissing, text));
        }
        slot::create_publication(&client.client, name, &tables).await?;
        tracing::info!(publication = name, "publication created");
        return Ok(Published { created: true, added: Vec::new() });
    };
    catalog::publishes_everything(&publication)?;
    let mut added = Vec::new();
    for spec in ctx.specs.iter().filter(|s| !publication.covers(&s.table)) {
        let ours = found.is_some_and(|c| c.made(name)) && settings.create == Create::WhereMissing;
        if !ours && ctx.has_begun() {
            added.push((spec.name.clone(), Reason::ordinary("it is missing from the publication")));
            continue;
        }
        if !ours {
            let add = Sql::AddTable { publication: name, table: &spec.table };
            let text = format!("table {} is not in publication {name}: {add}", spec.table);
            return Err(BridgeError::Setup(Code::TableUnpublished, text));
        }
        match slot::add_table(&client.client, name, &spec.table).await {
            // It was dropped: the loader reports that.
            Err(error) if error.is_about_the_table() && ctx.has_begun() => {}
            done => done?,
        }
        tracing::info!(publication = name, table = spec.name, "table added to the publication");
        added.push((spec.name.clone(), Reason::ordinary("it was missing from the publication")));
    }
    Ok(Published { created: false, added })
}

/// Fails if `postgres.create` does not allow a new slot. `because`: why one is needed.
pub fn require_create(ctx: &Context, because: &str) -> Result<(), BridgeError> {
    if ctx.config.postgres.create == Create::WhereMissing {
        return Ok(());
    }
    let slot = &ctx.config.postgres.slot;
    let remedy = Sql::CreateSlot { slot };
    let text = format!(
        "slot {slot} is needed ({because}), and postgres.create is false: set postgres.create = true, or {remedy}"
    );
    Err(BridgeError::Setup(Code::SlotMissing, text))
}
