//! `prefetchd tail`: prints the changes that a running daemon applies, one line each.
//!
//! The daemon sends at most 100 changes a second and counts the rest. Changes made while the connection is down are not
//! shown, which a message says.

use super::client::{Client, ClientError};
use super::{Failure, print, printable, runtime, say};
use crate::code::Code;
use crate::telemetry::has_colours;
use clap::Args;
use rustix::termios::tcgetwinsize;
use serde_json::Value;
use std::io::{self, BufRead, BufReader, IsTerminal, Read};
use std::path::Path;
use std::time::Duration;
use tokio::sync::oneshot;

const RETRY: Duration = Duration::from_secs(1);

#[derive(Debug, Args)]
pub(super) struct TailArgs {
    /// Only changes of this table
    #[arg(long, value_name = "NAME")]
    table: Option<String>,
    /// Print the daemon's JSON, one object per line
    #[arg(long)]
    json: bool,
    /// Address of the daemon [default: from http.listen]
    #[arg(long, value_name = "URL")]
    url: Option<String>,
}

pub(super) fn run(file: Option<&Path>, args: &TailArgs) -> Result<(), Failure> {
    let client = Client::new(file, args.url.as_deref())?;
    let mut view = View::new(args.table.clone(), args.json, has_colours(&io::stdout()));
    let runtime = runtime()?;
    let (ended, end) = oneshot::channel();
    // Reading blocks, and only the end of the process ends it.
    std::thread::spawn(move || {
        let _ = ended.send(follow(&client, &mut view));
    });
    runtime.block_on(async {
        tokio::select! {
            _ = tokio::signal::ctrl_c() => Ok(()),
            end = end => end.unwrap_or_else(|_| Err(Failure::work(Code::Internal, "the reading thread is gone"))),
        }
    })
}

/// Reconnects forever once it has been connected. Returns only if nothing reads the output any more, if the table does not
/// exist, or if no daemon is there at the start.
fn follow(client: &Client, view: &mut View) -> Result<(), Failure> {
    let mut said = String::new();
    let mut connected_before = false;
    loop {
        let why = match client.get("/v1/events") {
            Ok(mut answer) if answer.status().as_u16() == 200 => {
                if connected_before {
                    say(&format!("prefetchd: {} answers again; changes in between are not shown", client.base));
                }
                connected_before = true;
                said.clear();
                let ended = read(BufReader::new(answer.body_mut().as_reader()), |event| {
                    // It may have changed since the last line.
                    view.width = terminal_width();
                    let line = view.line(event)?;
                    line.map_or(Ok(()), |line| print(&line))
                })?;
                format!("{} ended the stream{ended}", client.base)
            }
            // It has too many streams, or is stopping.
            Ok(answer) if connected_before || answer.status().as_u16() == 503 => {
                format!("{}/v1/events answered {}", client.base, answer.status())
            }
            Err(why) if connected_before => why.to_string(),
            Ok(answer) => {
                let at = format!("{}/v1/events", client.base);
                return Err(ClientError::by_a_stranger(&at, answer.status().as_u16()).into());
            }
            Err(why) => {
                let text = format!("{why}: start the daemon, or say where it is with --url");
                return Err(Failure::work(Code::DaemonUnreachable, text));
            }
        };
        if said != why {
            say(&format!("prefetchd: {why}; trying again"));
            said = why;
        }
        std::thread::sleep(RETRY);
    }
}

/// One server-sent event. <https://html.spec.whatwg.org/multipage/server-sent-events.html#parsing-an-event-stream>
#[derive(Debug, Default, PartialEq)]
struct Event {
    name: String,
    data: String,
}

/// The status of a thousand tables is shorter.
const LINE_BYTES: u64 = 4 << 20;

/// Passes on every complete event until the stream ends. Returns how it ended, for a message.
fn read(mut stream: impl BufRead, mut on: impl FnMut(&Event) -> Result<(), Failure>) -> Result<String, Failure> {
    let mut event = Event::default();
    let mut line = Vec::new();
    loop {
        line.clear();
        match stream.by_ref().take(LINE_BYTES).read_until(b'\n', &mut line) {
            Ok(0) => return Ok(String::new()),
            Err(error) => return Ok(format!(" ({error})")),
            Ok(length) if length as u64 == LINE_BYTES => {
                return Ok(format!(" (a line of more than {LINE_BYTES} bytes: is prefetchd running there?)"));
            }
            Ok(_) => {}
        }
        let text = String::from_utf8_lossy(&line);
        let text = text.trim_end_matches(['\n', '\r']);
        if text.is_empty() {
            on(&std::mem::take(&mut event))?;
            continue;
        }
        let (field, value) = text.split_once(':').unwrap_or((text, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "event" => event.name = value.to_owned(),
            "data" if event.data.is_empty() => event.data = value.to_owned(),
            "data" => {
                event.data.push('\n');
                event.data.push_str(value);
            }
            // A comment, which keeps the connection alive.
            _ => {}
        }
    }
}

/// The columns of the terminal that the lines go to; `None` if they go elsewhere.
fn terminal_width() -> Option<usize> {
    let out = io::stdout();
    let size = out.is_terminal().then(|| tcgetwinsize(&out).ok()).flatten()?;
    Some(usize::from(size.ws_col)).filter(|columns| *columns > 0)
}

/// The columns that a character takes at most. Many outside ASCII take two.
fn columns_of(c: char) -> usize {
    if c.is_ascii() || c == '…' { 1 } else { 2 }
}

fn columns(text: &str) -> usize {
    text.chars().map(columns_of).sum()
}

/// Text that takes at most so many columns, and ends in `…` where something is cut off.
fn cut(text: &str, most: usize) -> String {
    if columns(text) <= most {
        return text.to_owned();
    }
    let mut left = most.saturating_sub(1);
    let mut fits = |c: &char| {
        let fits = columns_of(*c) <= left;
        left = left.saturating_sub(columns_of(*c));
        fits
    };
    text.chars().take_while(|c| fits(c)).chain(['…']).collect()
}

/// Text that takes at least so many columns.
fn padded(text: String, least: usize) -> String {
    let missing = least.saturating_sub(columns(&text));
    text + &" ".repeat(missing)
}

/// Formats events as lines.
struct View {
    only: Option<String>,
    json: bool,
    colours: bool,
    /// A line takes no more columns, as it would wrap.
    width: Option<usize>,
    /// The widest so far: columns grow and never shrink.
    table_width: usize,
    key_width: usize,
}

impl View {
    fn new(only: Option<String>, json: bool, colours: bool) -> Self {
        Self { only, json, colours, width: None, table_width: 0, key_width: 24 }
    }

    fn line(&mut self, event: &Event) -> Result<Option<String>, Failure> {
        let Ok(data) = serde_json::from_str::<Value>(&event.data) else { return Ok(None) };
        match event.name.as_str() {
            "status" => self.learn(&data).map(|()| None),
            "change" if self.only.as_ref().is_some_and(|only| data["table"] != **only) => Ok(None),
            // As received, on one line.
            "change" | "more" if self.json => Ok(Some(event.data.replace('\n', " ") + "\n")),
            "change" => Ok(Some(self.change(&data))),
            "more" => {
                let of_all = if self.only.is_some() { ", of all tables" } else { "" };
                Ok(Some(format!("… and {} more{of_all}\n", data["more"].as_u64().unwrap_or_default())))
            }
            _ => Ok(None),
        }
    }

    /// Learns which tables exist.
    fn learn(&mut self, status: &Value) -> Result<(), Failure> {
        let names: Vec<&str> =
            status["tables"].as_array().into_iter().flatten().filter_map(|t| t["name"].as_str()).collect();
        match &self.only {
            Some(only) if !names.is_empty() && !names.contains(&only.as_str()) => {
                let fact = format!("the daemon has no table {only:?}: there is {}", names.join(", "));
                return Err(Failure::work(Code::UnknownTable, printable(&fact)));
            }
            Some(only) => self.table_width = self.table_width.max(only.chars().count()),
            None => self.table_width = names.iter().map(|n| n.chars().count()).fold(self.table_width, usize::max),
        }
        Ok(())
    }

    fn change(&mut self, change: &Value) -> String {
        let text = |name: &str| printable(change[name].as_str().unwrap_or("-"));
        let (time, table, op, key) = (text("time"), text("table"), text("op"), text("key"));
        // The time of `2026-01-31T12:34:56.789Z`; UTC, as in the log.
        let time = time.split_once('T').map_or(time.as_str(), |(_, time)| time);
        let lag = change["lag_ms"].as_f64().map_or("-".to_owned(), |ms| format!("{ms:.1} ms"));
        self.table_width = self.table_width.max(table.chars().count());
        self.key_width = self.key_width.max(key.chars().count()).min(60);
        let table_width = self.table_width;
        let (mut key, mut key_width) = (key, self.key_width);
        if let Some(width) = self.width {
            // What else is on the line: time, table, operation and lag, and the space between them.
            let beside = 13 + table_width.max(columns(&table)) + op.len().max(8) + lag.len().max(10) + 4 * 2;
            let Some(most) = width.checked_sub(beside).filter(|most| *most > 0) else {
                return cut(&format!("{time}  {table}  {op}  {key}  {lag}"), width) + "\n";
            };
            (key, key_width) = (cut(&key, most), key_width.min(most));
        }
        let (dim, colour, reset) = match (self.colours, op.as_str()) {
            (false, _) => ("", "", ""),
            (true, "upsert") => ("\u{1b}[2m", "\u{1b}[32m", "\u{1b}[0m"),
            (true, "delete") => ("\u{1b}[2m", "\u{1b}[31m", "\u{1b}[0m"),
            (true, _) => ("\u{1b}[2m", "\u{1b}[33m", "\u{1b}[0m"),
        };
        let (table, key) = (padded(table, table_width), padded(key, key_width));
        format!("{dim}{time:<13}{reset}  {table}  {colour}{op:<8}{reset}  {key}  {lag:>10}\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn events(stream: &str) -> Vec<(String, String)> {
        let mut events = Vec::new();
        read(stream.as_bytes(), |event| {
            events.push((event.name.clone(), event.data.clone()));
            Ok(())
        })
        .expect("no event fails");
        events
    }

    #[test]
    fn reads_events_and_nothing_that_is_cut_off() {
        let pair = |name: &str, data: &str| (name.to_owned(), data.to_owned());
        assert_eq!(
            events("event: a\ndata: 1\n\n: awake\r\n\r\nevent:b\ndata:x\ndata: y\n\nevent: c\ndata: lost\n"),
            [pair("a", "1"), pair("", ""), pair("b", "x\ny")]
        );
    }

    fn shown(view: &mut View, name: &str, data: &str) -> Option<String> {
        view.line(&Event { name: name.to_owned(), data: data.to_owned() }).expect("a line")
    }

    const CHANGE: &str = r#"{"time":"2026-01-31T12:34:56.789Z","table":"categories","op":"upsert","key":"cache:category:cat-001","lag_ms":1.234}"#;

    #[test]
    fn a_change_is_one_aligned_line() {
        let mut view = View::new(None, false, false);
        let line = shown(&mut view, "change", CHANGE);
        assert_eq!(
            line.as_deref(),
            Some("12:34:56.789Z  categories  upsert    cache:category:cat-001        1.2 ms\n")
        );
        let short = CHANGE.replace("categories", "c").replace("cat-001", "\\u001b[2J");
        let line = shown(&mut view, "change", &short).expect("a line");
        assert!(line.contains("  c           upsert    cache:category:\\u001b[2J"), "{line}");
        assert_eq!(shown(&mut view, "more", r#"{"more":7}"#).as_deref(), Some("… and 7 more\n"));
        assert_eq!(shown(&mut view, "change", "no json"), None);
        assert_eq!(shown(&mut view, "heartbeat", "{}"), None);
        assert!(
            shown(&mut View::new(None, false, true), "change", CHANGE).expect("a line").contains("\u{1b}[32mupsert")
        );
    }

    #[test]
    fn no_line_is_wider_than_the_terminal() {
        for key in
            ["short", "cache:category:a-rather-long-key-that-has-no-place", "cache:日本語日本語日本語日本語日本語"]
        {
            for width in 1..120 {
                let mut view = View::new(None, false, false);
                view.width = Some(width);
                let line = shown(&mut view, "change", &CHANGE.replace("cache:category:cat-001", key)).expect("a line");
                assert!(columns(line.trim_end()) <= width, "{width}: {line}");
                assert!(line.contains(key) || line.contains('…'), "{width}: {line}");
                assert!(width < 80 || line.contains("1.2 ms"), "{width}: {line}");
            }
        }
        let mut view = View::new(None, false, false);
        view.width = Some(70);
        let line = shown(&mut view, "change", &CHANGE.replace("cat-001", "cat-001-and-more")).expect("a line");
        assert_eq!(line, "12:34:56.789Z  categories  upsert    cache:category:cat-0…      1.2 ms\n");
    }

    #[test]
    fn other_tables_are_left_out_and_unknown_ones_refused() {
        let mut view = View::new(Some("orders".to_owned()), true, false);
        assert_eq!(shown(&mut view, "change", CHANGE), None);
        let mine = CHANGE.replace("categories", "orders");
        assert!(shown(&mut view, "change", &mine).expect("a line").contains("\"op\":\"upsert\""));
        let status = Event { name: "status".to_owned(), data: r#"{"tables":[{"name":"categories"}]}"#.to_owned() };
        assert!(view.line(&status).is_err());
        assert!(View::new(Some("categories".to_owned()), true, false).line(&status).is_ok());
    }
}
