//! Makes text safe for terminals and logs. Much of it comes from servers, or from whoever can write to their tables.
//! Such text must not move the cursor, forge a line of our output, or reorder the text next to it.
//!
//! Everything that the program prints or logs goes through here. The escapes are those of JSON, so JSON stays valid.

use std::fmt::Write as _;
use std::io;
use unicode_properties::{GeneralCategory, UnicodeGeneralCategory};

/// Characters that a terminal does not show as themselves: control characters; format characters, which change the
/// direction of text or have no width; line and paragraph separators; unassigned and private-use code points; and
/// letters and marks that are invisible anyway. <https://www.unicode.org/reports/tr44/#Default_Ignorable_Code_Point>
fn is_unsafe(c: char) -> bool {
    use GeneralCategory::{Control, Format, LineSeparator, ParagraphSeparator, PrivateUse, Unassigned};
    let invisible = || {
        matches!(c, '\u{34f}' | '\u{115f}' | '\u{1160}' | '\u{17b4}' | '\u{17b5}' | '\u{180b}'..='\u{180f}'
            | '\u{3164}' | '\u{fe00}'..='\u{fe0f}' | '\u{ffa0}' | '\u{e0000}'..='\u{e0fff}')
    };
    match c.general_category() {
        Control | Format | LineSeparator | ParagraphSeparator | PrivateUse | Unassigned => true,
        _ => invisible(),
    }
}

/// Returns the colour sequence if the text begins with one that we or the log use. Those cannot hide anything.
fn colour(text: &str) -> Option<&str> {
    let number = text.strip_prefix("\u{1b}[")?.split_once('m')?.0;
    matches!(number, "0" | "1" | "2" | "3" | "31" | "32" | "33" | "34" | "35")
        .then(|| &text[..number.len() + "\u{1b}[m".len()])
}

fn escape(out: &mut String, c: char) {
    let _ = match c {
        '\n' => out.write_str("\\n"),
        '\r' => out.write_str("\\r"),
        '\t' => out.write_str("\\t"),
        // Beyond the basic plane as a surrogate pair, as in JSON.
        c if is_unsafe(c) => c.encode_utf16(&mut [0; 2]).iter().try_for_each(|unit| write!(out, "\\u{unit:04x}")),
        c => out.write_char(c),
    };
}

/// Returns untrusted text as one line.
pub fn printable(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    text.chars().for_each(|c| escape(&mut out, c));
    out
}

/// The same for text that contains our colours.
fn coloured(mut text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    while let Some(c) = text.chars().next() {
        let length = match colour(text) {
            Some(colour) => {
                out.push_str(colour);
                colour.len()
            }
            None => {
                escape(&mut out, c);
                c.len_utf8()
            }
        };
        text = &text[length..];
    }
    out
}

/// Text of several lines, with our line breaks and colours.
pub fn lines(text: &str) -> String {
    text.split('\n').map(coloured).collect::<Vec<_>>().join("\n")
}

/// A message with untrusted parts. Its lines after the first are indented, so that they cannot pass for ours.
pub fn message(text: &str) -> String {
    text.trim_end().split('\n').map(printable).collect::<Vec<_>>().join("\n  ")
}

/// Receives one event of the log with each write, and makes it one line.
#[derive(Debug)]
pub struct LogLines<W>(pub W);

impl<W: io::Write> io::Write for LogLines<W> {
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(event);
        let line = coloured(text.strip_suffix('\n').unwrap_or(&text)) + "\n";
        self.0.write_all(line.as_bytes())?;
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    const HOSTILE: &str = "é\u{1b}[2J\u{1b}[8m\nb\r\t\u{7f}\u{9b}\u{202e}\u{2066}\u{200f}\u{2028}\u{61c}\
                           a\u{200b}d\u{2060}m\u{ad}i\u{feff}n\u{e0061}\u{e000}\u{378}\u{3164}\u{fe0f}日本e\u{301}";
    const ESCAPED: &str = concat!(
        r"é\u001b[2J\u001b[8m\nb\r\t\u007f\u009b\u202e\u2066\u200f\u2028\u061c",
        r"a\u200bd\u2060m\u00adi\ufeffn\udb40\udc61\ue000\u0378\u3164\ufe0f日本e",
        "\u{301}"
    );

    #[test]
    fn what_others_chose_stays_on_its_line_and_in_its_place() {
        assert_eq!(printable(HOSTILE), ESCAPED);
        assert_eq!(printable("\u{1b}[31mred"), r"\u001b[31mred");
        assert_eq!(message(&format!("a\n{HOSTILE}\n")), format!("a\n  {}", ESCAPED.replace(r"\n", "\n  ")));
    }

    #[test]
    fn only_breaks_and_colours_of_ours_pass() {
        assert_eq!(lines("\u{1b}[31mred\u{1b}[0m\n\u{1b}[2K\u{1b}[\n"), "\u{1b}[31mred\u{1b}[0m\n\\u001b[2K\\u001b[\n");
    }

    #[test]
    fn an_event_is_one_line_and_json_stays_json() {
        let mut log = LogLines(Vec::new());
        log.write_all(format!("{HOSTILE}\n").as_bytes()).unwrap();
        assert_eq!(String::from_utf8(log.0).unwrap(), format!("{ESCAPED}\n"));
        let json = serde_json::json!({ "message": HOSTILE }).to_string();
        let mut log = LogLines(Vec::new());
        log.write_all(format!("{json}\n").as_bytes()).unwrap();
        assert!(log.0.is_ascii() || !String::from_utf8_lossy(&log.0).contains('\u{202e}'));
        assert_eq!(serde_json::from_slice::<serde_json::Value>(&log.0).unwrap()["message"], HOSTILE);
    }
}
