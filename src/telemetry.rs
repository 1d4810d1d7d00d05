//! The log, which goes to stderr as text or JSON.

use crate::config::{LogFormat, LogSettings};
use crate::terminal::LogLines;
use std::io::{self, IsTerminal};
use tracing_subscriber::EnvFilter;

/// Whether this stream should get ANSI colours. <https://no-color.org>
pub fn has_colours(stream: &impl IsTerminal) -> bool {
    stream.is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// Starts the process's log. A second call has no effect.
pub fn init(settings: &LogSettings) {
    // The configuration has already rejected filters that cannot be parsed.
    let filter = EnvFilter::try_new(&settings.level).unwrap_or_else(|_| EnvFilter::new("info"));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(|| LogLines(io::stderr()));
    let _ = match settings.format {
        LogFormat::Text => log.with_ansi(has_colours(&io::stderr())).try_init(),
        LogFormat::Json => log.json().flatten_event(true).try_init(),
    };
}
