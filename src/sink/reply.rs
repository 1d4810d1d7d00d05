//! What an error reply means, and how much of its text may be shown.
//!
//! Redis, Sentinels and proxies repeat arguments in their error messages: `ERR unknown command 'AUTH', with args
//! beginning with: 'the password'`. Every error text passes through [`ErrorReply`] before it reaches a log, the status
//! or an HTTP response. Only the code word (`NOPERM`, `OOM`) decides what an error means, because providers word the
//! rest as they like.
//!
//! <https://redis.io/docs/latest/develop/reference/protocol-spec/#simple-errors>

use crate::code::Code;
use crate::resp;
use std::fmt;

/// Longer texts are explanations for people who type commands, or repeat a command.
const MOST_TEXT_BYTES: usize = 300;
/// Larger requests are not searched for what the server repeated. No text is shown then.
const MOST_SEARCHED_BYTES: usize = 1 << 20;
/// A shorter word reveals nothing, unless it is the whole argument.
const TELLING_BYTES: usize = 4;

/// A server's error reply, without what it repeats of the request.
#[derive(Clone, PartialEq, Eq)]
pub struct ErrorReply {
    code: String,
    text: String,
    class: Class,
}

/// What an error reply means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// The server is starting, busy, without the replicas that it requires, or handing over the key's hash slot.
    Away,
    /// Out of memory.
    Full,
    /// A replica, or a server that cannot save to disk and therefore accepts no writes.
    ReadOnly,
    /// The user's ACL does not allow it.
    Denied,
    /// Not logged in, or not with the credentials that the server wants.
    Login,
    WrongType,
    /// The node does not serve the key's hash slot. Another node of the cluster may.
    Elsewhere,
    /// The keys lie in several hash slots.
    CrossSlot,
    /// `ERR` or an unknown code word. Only the command that was sent tells more.
    Other,
}

/// Where, or when, a request that a node of a cluster refused may succeed. Nothing of it was done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Redirect {
    /// At another node, which has the hash slot.
    Elsewhere,
    /// Later: the hash slot is moving, or the node is not ready.
    Later,
}

/// What RedisJSON says instead of a code word.
const OTHER_TYPE_THAN_JSON: &str = "Existing key has wrong Redis type";

impl Class {
    /// Returns `None` for an unknown code word.
    fn of(code: &str) -> Option<Class> {
        Some(match code {
            "LOADING" | "BUSY" | "MASTERDOWN" | "NOREPLICAS" | "ASK" | "TRYAGAIN" | "UNKILLABLE" | "NOTREADY" => {
                Class::Away
            }
            "OOM" => Class::Full,
            "READONLY" | "MISCONF" => Class::ReadOnly,
            "NOPERM" => Class::Denied,
            "NOAUTH" | "WRONGPASS" | "DENIED" => Class::Login,
            "WRONGTYPE" => Class::WrongType,
            "MOVED" | "CLUSTERDOWN" => Class::Elsewhere,
            "CROSSSLOT" => Class::CrossSlot,
            "ERR" | "EXECABORT" | "NOSCRIPT" => Class::Other,
            _ => return None,
        })
    }
}

impl ErrorReply {
    /// `line` is the reply as received, without the `-`.
    pub fn received(line: &[u8]) -> Self {
        let line = String::from_utf8_lossy(line);
        if line.starts_with(OTHER_TYPE_THAN_JSON) {
            return ErrorReply { code: String::new(), text: OTHER_TYPE_THAN_JSON.to_owned(), class: Class::WrongType };
        }
        let (first, rest) = line.split_once([' ', '\r', '\n']).unwrap_or((&line, ""));
        if !is_code(first) {
            return ErrorReply { code: String::new(), text: unquoted(&line), class: Class::Other };
        }
        let class = match first {
            // `EXECABORT Transaction discarded because of: OOM …` counts as OOM.
            "EXECABORT" => {
                let words = rest.split(|c: char| !c.is_ascii_alphanumeric());
                words.filter(|word| is_code(word)).find_map(Class::of)
            }
            code => Class::of(code),
        };
        ErrorReply { code: first.to_owned(), text: unquoted(rest), class: class.unwrap_or(Class::Other) }
    }

    /// Cuts the text off where it begins to repeat an argument of `request`, which is RESP, or a `secret`.
    #[must_use]
    pub fn without(mut self, request: &[u8], secret: Option<&str>) -> Self {
        if request.len() > MOST_SEARCHED_BYTES {
            self.text.clear();
            return self;
        }
        let mut sent: Vec<String> = resp::arguments(request).into_iter().map(words_of).collect();
        sent.extend(secret.map(|secret| words_of(secret.as_bytes())));
        sent.retain(|words| !words.is_empty());
        if let Some(at) = repeats(&self.text, &sent) {
            self.text.truncate(at);
            self.text.truncate(self.text.trim_end_matches(|c: char| !c.is_ascii_alphanumeric()).len());
            self.text.push_str(if self.text.is_empty() { "…" } else { " …" });
        }
        if Class::of(&self.code).is_none() && repeats(&self.code, &sent).is_some() {
            self.code.clear();
        }
        self
    }

    /// Keeps the code word only.
    #[must_use]
    pub fn without_text(mut self) -> Self {
        self.text.clear();
        if Class::of(&self.code).is_none() {
            self.code.clear();
        }
        self
    }

    pub fn class(&self) -> Class {
        self.class
    }

    pub(super) fn code_of_class(&self) -> Code {
        match self.class {
            Class::Away => Code::RedisBusy,
            Class::Full => Code::RedisFull,
            Class::ReadOnly if self.code == "READONLY" => Code::RedisReplica,
            Class::ReadOnly => Code::RedisReadOnly,
            Class::Denied => Code::RedisAcl,
            Class::Login => Code::RedisLogin,
            Class::WrongType => Code::RedisKeyType,
            Class::Elsewhere if self.code == "CLUSTERDOWN" => Code::RedisClusterDown,
            Class::Elsewhere => Code::RedisClusterChanging,
            Class::CrossSlot => Code::HashSlots,
            Class::Other => Code::RedisError,
        }
    }

    /// Returns `None` if neither another node nor the same one a little later would do what was requested.
    pub fn redirect(&self) -> Option<Redirect> {
        match (self.class, self.code.as_str()) {
            // A replica, and one that has lost its master: there is another master, or there will be.
            (_, "READONLY" | "MASTERDOWN") | (Class::Elsewhere, _) => Some(Redirect::Elsewhere),
            // A script is loaded again.
            (_, "NOSCRIPT") | (Class::Away, _) => Some(Redirect::Later),
            _ => None,
        }
    }

    /// The code word; empty if there is none.
    pub fn code(&self) -> &str {
        &self.code
    }

    /// Whether the reply is a plain `ERR`: the server rejects the command for a reason that has no code word. An
    /// unknown code word, or none, may stand for a temporary condition (`THROTTLED`).
    pub fn is_plain(&self) -> bool {
        self.code == "ERR"
    }

    /// The node that a redirection leads to: `MOVED 3999 127.0.0.1:6381`. Its host may be missing, if it is that of the
    /// node that answered, and all of it, if the request has it as well.
    pub fn leads_to(&self) -> Option<&str> {
        let node = matches!(self.code(), "MOVED" | "ASK").then(|| self.text.split(' ').nth(1)).flatten();
        node.filter(|node| node.contains(':') && !node.starts_with(':'))
    }

    /// Whether a transaction was discarded for a reason that an earlier reply gave.
    pub fn is_discarded(&self) -> bool {
        self.code == "EXECABORT"
    }
}

impl fmt::Display for ErrorReply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.code.as_str(), self.text.as_str()) {
            ("", "") => f.write_str("an error"),
            ("", text) => f.write_str(text),
            (code, "") => f.write_str(code),
            (code, text) => write!(f, "{code} {text}"),
        }
    }
}

impl fmt::Debug for ErrorReply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ErrorReply({self}, {:?})", self.class)
    }
}

fn is_code(word: &str) -> bool {
    word.len() >= 2 && word.bytes().all(|b| b.is_ascii_uppercase() || b.is_ascii_digit())
}

/// Returns the text up to the first quote, escape or non-ASCII character, where a server usually begins to repeat the
/// request.
fn unquoted(text: &str) -> String {
    // What Redis says where it is full: the only quotes of its own around a word that matters.
    let text = &text.replace("'maxmemory'", "maxmemory");
    let bytes = text.as_bytes();
    let alphanumeric = |at: Option<usize>| at.and_then(|at| bytes.get(at)).is_some_and(u8::is_ascii_alphanumeric);
    let ends = |(at, &byte): (usize, &u8)| match byte {
        // An apostrophe, as in "it's".
        b'\'' => !(alphanumeric(at.checked_sub(1)) && alphanumeric(Some(at + 1))),
        b'"' | b'`' | b'\\' => true,
        byte => !(byte.is_ascii_graphic() || byte == b' '),
    };
    let end = bytes.iter().take(MOST_TEXT_BYTES).enumerate().position(|(at, byte)| ends((at, byte)));
    let end = end.unwrap_or(bytes.len().min(MOST_TEXT_BYTES));
    let shown = text[..end].trim();
    let cut = !text[end..].trim().is_empty();
    if cut && !shown.is_empty() { format!("{} …", shown.trim_end_matches([',', ':'])) } else { shown.to_owned() }
}

/// Returns the alphanumeric words of an argument in lower case, with spaces around each. Escapes and separators may
/// change on the way back; words do not.
fn words_of(argument: &[u8]) -> String {
    let mut words = String::new();
    for word in argument.split(|b| !b.is_ascii_alphanumeric()).filter(|word| !word.is_empty()) {
        words.push(' ');
        words.extend(word.iter().map(|b| char::from(b.to_ascii_lowercase())));
    }
    if !words.is_empty() {
        words.push(' ');
    }
    words
}

/// Returns where `text` begins to repeat one of these [`words_of`] arguments.
fn repeats(text: &str, sent: &[String]) -> Option<usize> {
    let mut from = 0;
    text.split(|c: char| !c.is_ascii_alphanumeric()).find_map(|word| {
        let at = from;
        from += word.len() + text[at + word.len()..].chars().next().map_or(0, char::len_utf8);
        let plain = word.to_ascii_lowercase();
        let rest = words_of(&text.as_bytes()[at..]);
        let repeated = !plain.is_empty()
            && sent.iter().any(|words| {
                if rest.starts_with(words.as_str()) {
                    return true;
                }
                // The repeated word may be truncated, joined with something, or one of many.
                let joined = |telling: &str| telling.len() >= TELLING_BYTES && plain.contains(telling);
                plain.len() >= TELLING_BYTES && (words.contains(&plain) || words.split(' ').any(joined))
            });
        repeated.then_some(at)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::BytesMut;
    use proptest::prelude::*;

    fn shown(line: &str, request: &[&str]) -> String {
        let mut sent = BytesMut::new();
        resp::command(&mut sent, &request.iter().map(|word| word.as_bytes()).collect::<Vec<_>>());
        ErrorReply::received(line.as_bytes()).without(&sent, Some("hunter2")).to_string()
    }

    #[test]
    fn a_code_word_alone_says_what_an_error_means() {
        for (line, class) in [
            ("LOADING Redis is loading the dataset in memory", Class::Away),
            ("EXECABORT Transaction discarded because of: OOM command not allowed", Class::Full),
            ("EXECABORT Transaction discarded because of previous errors.", Class::Other),
            ("NOPERM this user has no permissions", Class::Denied),
            ("NOAUTH Authentication required.", Class::Login),
            ("CROSSSLOT", Class::CrossSlot),
            ("MOVED 4768 127.0.0.1:7001", Class::Elsewhere),
            ("EXECABORT Transaction discarded because of: CLUSTERDOWN Hash slot not served", Class::Elsewhere),
            ("ERR unknown command 'OOM'", Class::Other),
            ("no upstream host", Class::Other),
            ("", Class::Other),
        ] {
            assert_eq!(ErrorReply::received(line.as_bytes()).class(), class, "{line}");
        }
    }

    #[test]
    fn a_node_of_a_cluster_says_whether_to_go_elsewhere_or_to_wait() {
        for (line, redirect) in [
            ("MOVED 4768 127.0.0.1:7001", Some(Redirect::Elsewhere)),
            ("CLUSTERDOWN The cluster is down", Some(Redirect::Elsewhere)),
            ("READONLY You can't write against a read only replica.", Some(Redirect::Elsewhere)),
            ("MASTERDOWN Link with MASTER is down", Some(Redirect::Elsewhere)),
            ("ASK 4768 127.0.0.1:7001", Some(Redirect::Later)),
            ("TRYAGAIN Multiple keys request during rehashing of slot", Some(Redirect::Later)),
            ("LOADING Redis is loading the dataset in memory", Some(Redirect::Later)),
            ("BUSY Redis is busy running a script.", Some(Redirect::Later)),
            ("NOREPLICAS Not enough good replicas to write.", Some(Redirect::Later)),
            ("NOSCRIPT No matching script.", Some(Redirect::Later)),
            ("MISCONF Redis is configured to save RDB snapshots", None),
            ("OOM command not allowed", None),
            ("NOPERM this user has no permissions", None),
            ("ERR unknown command", None),
        ] {
            assert_eq!(ErrorReply::received(line.as_bytes()).redirect(), redirect, "{line}");
        }
    }

    #[test]
    fn only_err_is_a_plain_refusal() {
        for (line, plain) in [
            ("ERR unknown command", true),
            ("ERR", true),
            ("THROTTLED try again later", false),
            ("UPSTREAM", false),
            ("no upstream host", false),
            ("", false),
            ("EXECABORT Transaction discarded because of previous errors.", false),
            ("OOM command not allowed", false),
        ] {
            assert_eq!(ErrorReply::received(line.as_bytes()).is_plain(), plain, "{line}");
        }
    }

    #[test]
    fn what_a_server_repeats_is_cut_off() {
        let hset = ["HSET", "cache:user:7", "name", "Ada Lovelace", "age", "36", "code", "a-b"];
        for (line, text) in [
            ("ERR unknown command 'HSET', with args beginning with: 'cache:user:7' 'name'", "ERR unknown command …"),
            ("ERR unknown command `HSET`, with args beginning with: `name`, `Ada`, ", "ERR unknown command …"),
            ("ERR cannot do HSET cache:user:7 name Ada Lovelace", "ERR cannot do HSET …"),
            ("ERR refused (ADA LOVELACE)", "ERR refused …"),
            ("ERR refused Lovel", "ERR refused …"),
            ("ERR 36 is refused", "ERR …"),
            ("ERR refused: a b", "ERR refused …"),
            ("ERR refused: xxLovelacexx", "ERR refused …"),
            ("ERR refused: Ad\u{e4}", "ERR refused: Ad …"),
            ("LOVELACE is refused", "is refused"),
            ("ERR the password hunter2 is of no use", "ERR the password …"),
            ("ERR it's refused", "ERR it's refused"),
            ("NOPERM No permissions to access the 'cache:user:7' key", "NOPERM No permissions to access the …"),
            (
                "OOM command not allowed when used memory > 'maxmemory'.",
                "OOM command not allowed when used memory > maxmemory.",
            ),
        ] {
            assert_eq!(shown(line, &hset), text, "{line}");
        }
        assert_eq!(shown("ERR AUTH hunter2", &["AUTH", "hunter2"]), "ERR AUTH …");
        let auth = ["AUTH", "prefetchd", "of-the-tests"];
        let wrong = "WRONGPASS invalid username-password pair or user is disabled.";
        assert_eq!(shown(wrong, &auth), wrong);
    }

    proptest! {
        #[test]
        fn no_word_of_an_argument_is_ever_shown(
            secret in "[a-zA-Z0-9]{4,20}", before in "[ -~]{0,40}", after in "[ -~]{0,40}", code in "(ERR |NOPERM |)",
        ) {
            let line = format!("{code}{before}{secret}{after}");
            let shown = shown(&line, &["HSET", "k", "f", &format!("x {secret}")]);
            prop_assert!(!shown.contains(&secret) || code.contains(&secret), "{line} -> {shown}");
        }

        #[test]
        fn any_bytes_are_taken(line in proptest::collection::vec(any::<u8>(), 0..400), sent in any::<Vec<u8>>()) {
            let _ = ErrorReply::received(&line).without(&sent, None).to_string();
        }
    }
}
