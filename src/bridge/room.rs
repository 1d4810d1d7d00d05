//! Checks whether the rows fit into Redis, before any of them is loaded.
//!
//! The size is an estimate from a sample of the rows and a rule of thumb (docs/operating.md, "Memory"). A mistake here
//! refuses a load that would fit. So a load is refused only if even the lowest estimate is too large, and allowed if
//! there is none.

use super::BridgeError;
use crate::format::Format;
use crate::loader::range;
use crate::plan::mapping::{self, Mapping};
use crate::schema::TableSpec;
use crate::source::SourceError;
use crate::source::connect::PostgresClient;
use crate::source::snapshot;
use crate::source::survey::{self, TableSize};
use crate::typed::known::KnownTypes;
use crate::words::counted;

/// Bytes that a key with a TTL takes besides its name; likewise a field, while the hash is a listpack, and a field of a
/// document.
const KEY_BYTES: u64 = 100;
const FIELD_BYTES: u64 = 10;
const FIELD_BYTES_IN_JSON: u64 = 4;
/// Bytes that a member of a lookup takes at least: in a sorted set of ten on Redis 7.0. In a large one it takes 110.
const MEMBER_BYTES: u64 = 25;
/// Additional bytes of a field once the hash is not a listpack.
const WIDE_FIELD_BYTES: f64 = 75.0;
/// The rule of thumb is accurate to about this factor.
const RULE: f64 = 0.9;
/// By how many standard errors a sample is off at most, practically.
const ERRORS: f64 = 3.0;

/// What the configured tables need in Redis.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct WorkingSet {
    pub rows: f64,
    pub bytes: f64,
    /// A lower bound that holds with near certainty.
    pub at_least: f64,
}

impl WorkingSet {
    /// Adds what other tables need.
    pub fn include(&mut self, other: &WorkingSet) {
        self.rows += other.rows;
        self.bytes += other.bytes;
        self.at_least += other.at_least;
    }

    /// `wide_bytes`: additional bytes of a row that is not a listpack.
    fn add(&mut self, sizes: TableSize, wide_bytes: f64) {
        self.rows += sizes.rows;
        self.bytes += sizes.bytes + sizes.wide_rows * wide_bytes;
        self.at_least += (sizes.bytes - ERRORS * sizes.error_bytes).max(0.0) * RULE;
    }
}

/// Estimates the tables that can be examined.
pub async fn working_set(
    client: &PostgresClient,
    specs: &[TableSpec],
    publication: &str,
) -> Result<WorkingSet, SourceError> {
    let mut all = WorkingSet::default();
    for spec in specs {
        if let Some(one) = of_table(client, spec, publication).await? {
            all.include(&one);
        }
    }
    Ok(all)
}

/// Estimates one table. `None` if it cannot be examined.
pub async fn of_table(
    client: &PostgresClient,
    spec: &TableSpec,
    publication: &str,
) -> Result<Option<WorkingSet>, SourceError> {
    match one(client, spec, publication).await {
        Ok(Some((sizes, wide_bytes))) => {
            let mut set = WorkingSet::default();
            set.add(sizes, wide_bytes);
            Ok(Some(set))
        }
        Ok(None)
        | Err(SourceError::Failed { .. } | SourceError::Unsuitable { .. } | SourceError::OwnersCode { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

async fn one(
    client: &PostgresClient,
    spec: &TableSpec,
    publication: &str,
) -> Result<Option<(TableSize, f64)>, SourceError> {
    let Some(table) =
        snapshot::describe(&client.client, &spec.table, publication, &spec.columns, range::Sizes::Measured).await?
    else {
        return Ok(None);
    };
    let identified = mapping::check_identity(spec, table.identity, &table.identity_columns, &table.relation());
    let bound = identified.and_then(|()| Mapping::bind(spec, &table.relation(), &KnownTypes::default()));
    let Ok(mapping) = bound else { return Ok(None) };
    let fields = &mapping.layout.fields;
    let names: usize = fields.iter().map(|field| field.name.len()).sum();
    let (field_bytes, wide_bytes) = match spec.format {
        Format::Hash => (FIELD_BYTES, fields.len() as f64 * WIDE_FIELD_BYTES),
        Format::Json => (FIELD_BYTES_IN_JSON, 0.0),
        // A value takes a pointer, and what it points to.
        Format::RedisJson => (FIELD_BYTES, fields.len() as f64 * WIDE_FIELD_BYTES),
    };
    let members = MEMBER_BYTES * spec.lookups.len() as u64;
    let row_bytes = (spec.key.literal.len() + names) as u64 + KEY_BYTES + field_bytes * fields.len() as u64 + members;
    let columns: Vec<&str> = fields
        .iter()
        .map(|field| table.columns[field.cell].name.as_str())
        .chain(spec.key.columns.iter().map(String::as_str))
        .collect();
    Ok(Some((survey::sizes(&client.client, &table, &columns, row_bytes).await?, wide_bytes)))
}

/// # Errors
/// [`BridgeError::NoRoom`] if even the lowest estimate exceeds `limit`, where 0 means no limit.
pub async fn or_wait(
    client: &PostgresClient,
    specs: &[TableSpec],
    publication: &str,
    limit: Option<u64>,
) -> Result<(), BridgeError> {
    let Some(limit) = limit.filter(|limit| *limit > 0) else { return Ok(()) };
    let needed = working_set(client, specs, publication).await?;
    match refusal(&needed, limit) {
        Some(why) => Err(BridgeError::NoRoom(why)),
        None => Ok(()),
    }
}

/// Returns a `maxmemory` that leaves room beside so many bytes: for connections, batches, and some growth.
pub fn megabytes_for(bytes: u64) -> u64 {
    const BESIDE: u64 = 16;
    bytes.saturating_add(bytes / 3).div_ceil(1 << 20) + BESIDE
}

/// Returns why the rows cannot fit; `None` if they may.
pub fn refusal(needed: &WorkingSet, limit: u64) -> Option<String> {
    (needed.at_least > limit as f64).then(|| {
        format!(
            "redis has maxmemory {}, and {needed}: nothing is loaded until they fit; raise maxmemory (CONFIG SET maxmemory {}mb, \
             or more if Redis has other keys), or configure fewer tables or columns",
            size(limit),
            megabytes_for(needed.bytes as u64)
        )
    })
}

impl std::fmt::Display for WorkingSet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let a_row = if self.rows > 0.0 { self.bytes / self.rows } else { 0.0 };
        write!(
            f,
            "the configured tables need about {} (an estimate: {} of about {})",
            size(self.bytes as u64),
            counted(self.rows.round(), "row"),
            counted(a_row.round(), "byte")
        )
    }
}

/// Formats a size for people.
pub fn size(bytes: u64) -> String {
    bytesize::ByteSize::b(bytes).display().si().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(bytes: f64, error_bytes: f64) -> WorkingSet {
        let mut set = WorkingSet::default();
        set.add(TableSize { rows: 1_000.0, bytes, error_bytes, wide_rows: 0.0 }, 0.0);
        set
    }

    #[test]
    fn only_what_is_too_much_by_the_lowest_estimate_is_refused() {
        assert!(refusal(&of(1_200_000.0, 0.0), 1_000_000).is_some());
        assert!(refusal(&of(1_050_000.0, 0.0), 1_000_000).is_none(), "the rule of thumb may be wrong");
        assert!(refusal(&of(2_000_000.0, 400_000.0), 1_000_000).is_none(), "the sample may be");
        assert!(refusal(&of(f64::MAX, 0.0), 0).is_some());
        let why = refusal(&of(2_000_000.0, 0.0), 1_000_000).expect("too much");
        for part in ["maxmemory 1.0 MB", "about 2.0 MB", "1000 rows of about 2000 bytes", "CONFIG SET maxmemory 19mb"] {
            assert!(why.contains(part), "{part}: {why}");
        }
    }
}
