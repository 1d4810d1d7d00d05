//! `prefetchd config`: what file, environment and defaults amount to.

use super::{Failure, print, say};
use crate::config::Config;
use std::path::Path;

pub(super) fn run(file: Option<&Path>) -> Result<(), Failure> {
    let config = Config::load(file)?;
    for warning in &config.warnings {
        say(&format!("prefetchd: {warning}"));
    }
    print(config.to_toml())
}
