//! `prefetchd config`: prints the settings that result from file, environment and defaults.

use super::{Failure, print, say};
use crate::config::Config;
use std::path::Path;

pub(super) fn run(file: Option<&Path>) -> Result<(), Failure> {
    let config = Config::load(file)?;
    for warning in &config.warnings {
        say(&format!("prefetchd: {warning}"));
    }
    print(&config.to_toml())
}
