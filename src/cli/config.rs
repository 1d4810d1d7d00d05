//! `prefetchd config`: prints the settings that result from file, environment and defaults, or the schema of the file.

use super::{Failure, print, say};
use crate::config::{self, Config};
use clap::Args;
use std::path::Path;

#[derive(Debug, Args)]
pub(super) struct ConfigArgs {
    /// Print the JSON Schema of the configuration file instead; reads no configuration
    #[arg(long)]
    schema: bool,
}

pub(super) fn run(file: Option<&Path>, args: &ConfigArgs) -> Result<(), Failure> {
    if args.schema {
        return print(&format!("{:#}\n", config::schema()));
    }
    let config = Config::load(file)?;
    for warning in &config.warnings {
        say(&format!("prefetchd: {}", warning.text));
    }
    print(&config.to_toml())
}
