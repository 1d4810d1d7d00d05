//! The log, which goes to stderr as text or JSON. Its last lines are kept for a report of a problem.

use crate::config::{LogFormat, LogSettings};
use crate::terminal::{LogLines, printable};
use std::collections::VecDeque;
use std::fmt::{Debug, Write as _};
use std::io::{self, IsTerminal};
use std::sync::{Mutex, PoisonError};
use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, fmt, registry};

/// Whether this stream should get ANSI colours. <https://no-color.org>
pub fn has_colours(stream: &impl IsTerminal) -> bool {
    stream.is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// Starts the process's log. A second call has no effect.
pub fn init(settings: &LogSettings) {
    // The configuration has already rejected filters that cannot be parsed.
    let filter = EnvFilter::try_new(&settings.level).unwrap_or_else(|_| EnvFilter::new("info"));
    let to_stderr = fmt::layer().with_writer(|| LogLines(io::stderr()));
    let to_stderr = match settings.format {
        LogFormat::Text => to_stderr.with_ansi(has_colours(&io::stderr())).boxed(),
        LogFormat::Json => to_stderr.json().flatten_event(true).boxed(),
    };
    let _ = registry().with(filter).with(to_stderr).with(Keeper).try_init();
}

/// The log's last lines, oldest first, and how many came before them. `hide` gets the message, and each field, by itself.
pub fn last_lines(hide: impl Fn(&str) -> String) -> (Vec<String>, u64) {
    let last = LAST.lock().unwrap_or_else(PoisonError::into_inner);
    (last.lines.iter().map(|line| line.shown(&hide)).collect(), last.forgotten)
}

/// The process has one log, so it has one memory of it.
static LAST: Mutex<LastLines> = Mutex::new(LastLines { lines: VecDeque::new(), bytes: 0, forgotten: 0 });

const MOST_LINES: usize = 1_000;
const MOST_BYTES: usize = 256 << 10;
/// Of one message or field. The rest is cut off.
const MOST_PART_BYTES: usize = 4 << 10;

struct LastLines {
    lines: VecDeque<Line>,
    bytes: usize,
    forgotten: u64,
}

impl LastLines {
    fn add(&mut self, line: Line) {
        self.bytes += line.bytes();
        self.lines.push_back(line);
        while self.lines.len() > MOST_LINES || self.bytes > MOST_BYTES {
            let Some(oldest) = self.lines.pop_front() else { break };
            self.bytes -= oldest.bytes();
            self.forgotten += 1;
        }
    }
}

/// A line of the log, in parts that can be hidden one by one.
#[derive(Default)]
struct Line {
    /// Time, level and module.
    head: String,
    message: String,
    /// `name=value`
    fields: Vec<String>,
}

impl Line {
    fn bytes(&self) -> usize {
        self.head.len() + self.message.len() + self.fields.iter().map(String::len).sum::<usize>()
    }

    fn shown(&self, hide: impl Fn(&str) -> String) -> String {
        let mut out = format!("{} {}", self.head, hide(&self.message));
        for field in &self.fields {
            let _ = write!(out, " {}", hide(field));
        }
        out
    }
}

impl Visit for Line {
    fn record_str(&mut self, field: &Field, value: &str) {
        let text = cut(printable(value));
        match field.name() {
            "message" => self.message = text,
            name => self.fields.push(format!("{name}={text}")),
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.record_str(field, &format!("{value:?}"));
    }
}

fn cut(mut text: String) -> String {
    if text.len() > MOST_PART_BYTES {
        let end = (0..=MOST_PART_BYTES).rev().find(|at| text.is_char_boundary(*at));
        text.truncate(end.unwrap_or_default());
        text.push('…');
    }
    text
}

/// Keeps what the filter lets pass.
struct Keeper;

impl<S: Subscriber> Layer<S> for Keeper {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let (now, about) = (jiff::Timestamp::now(), event.metadata());
        let mut line = Line { head: format!("{now:.3} {:>5} {}:", about.level(), about.target()), ..Line::default() };
        event.record(&mut line);
        LAST.lock().unwrap_or_else(PoisonError::into_inner).add(line);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(message: &str) -> Line {
        Line { head: "now".to_owned(), message: message.to_owned(), fields: vec!["key=secret".to_owned()] }
    }

    #[test]
    fn the_oldest_lines_go_first() {
        let mut last = LastLines { lines: VecDeque::new(), bytes: 0, forgotten: 0 };
        (0..=MOST_LINES).for_each(|n| last.add(line(&n.to_string())));
        assert_eq!((last.lines.len(), last.forgotten, last.lines[0].message.as_str()), (MOST_LINES, 1, "1"));
        (0..80).for_each(|_| last.add(line(&"x".repeat(MOST_PART_BYTES))));
        assert!(last.bytes <= MOST_BYTES && last.lines.len() < 80, "{}", last.bytes);
        assert_eq!(last.bytes, last.lines.iter().map(Line::bytes).sum::<usize>());
    }

    #[test]
    fn each_part_is_hidden_by_itself() {
        let hide = |text: &str| text.replace("secret", "…");
        assert_eq!(line("m").shown(hide), "now m key=…");
        assert_eq!(cut("é".repeat(MOST_PART_BYTES)).len(), MOST_PART_BYTES + '…'.len_utf8());
    }
}
