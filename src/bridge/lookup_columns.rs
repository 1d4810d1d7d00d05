//! Whether the columns that lookups use have types that serve: an order needs a score, and elements an array.

use crate::plan::mapping::{MappingError, OfLookup};
use crate::schema::{LookupSpec, TableSpec};
use crate::source::snapshot::{CatalogColumn, CatalogTable};
use crate::typed::row_type::JsonType;

/// The types whose values have a score, as [`Score::of`](crate::lookups::Score::of) reads them.
const SCORED: [&str; 10] =
    ["int2", "int4", "int8", "float4", "float8", "numeric", "bool", "date", "timestamp", "timestamptz"];

/// That the columns exist is checked before, by the mapping.
///
/// # Errors
/// If a column has no score, or is no array.
pub fn check(spec: &TableSpec, table: &CatalogTable) -> Result<(), MappingError> {
    let named = |name: &str| table.columns.iter().find(|column| column.name == name);
    let of = |lookup: &LookupSpec, column: &CatalogColumn| OfLookup {
        table: table.name.to_string(),
        name: spec.name.clone(),
        lookup: lookup.name.clone(),
        column: column.name.clone(),
        type_name: type_name(column),
    };
    for lookup in &spec.lookups {
        if let Some(column) = lookup.order.as_deref().and_then(named)
            && !SCORED.contains(&type_name(column).as_str())
        {
            return Err(MappingError::NoScore(of(lookup, column)));
        }
        let arrays = lookup.key.columns.iter().filter(|column| column.each_element);
        for column in arrays.filter_map(|column| named(&column.name)) {
            match &column.json.json_type {
                JsonType::Array { delimiter: b',', .. } => {}
                JsonType::Array { .. } => return Err(MappingError::OtherDelimiter(of(lookup, column))),
                _ => return Err(MappingError::NoArray(of(lookup, column))),
            }
        }
    }
    Ok(())
}

/// The type, or the one that it is a domain over. One of the server itself is not qualified.
fn type_name(column: &CatalogColumn) -> String {
    let name = &column.base_type;
    name.strip_prefix("pg_catalog.").unwrap_or(name).trim_matches('"').to_owned()
}
