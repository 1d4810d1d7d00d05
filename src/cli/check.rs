//! `prefetchd check`.

use super::Failure;
use crate::config::Config;
use std::path::Path;

pub(super) fn run(file: Option<&Path>) -> Result<(), Failure> {
    Config::load(file)?;
    Ok(())
}
