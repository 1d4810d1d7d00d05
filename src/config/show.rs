//! Prints the effective settings as TOML that can be read again, and removes passwords from URLs.

use super::{ConfigError, Kind, Merged, SETTINGS};
use crate::remedy::Toml;
use crate::schema::TableSpec;
use std::fmt::Write as _;

const MASK: &str = "***";

/// Returns every setting but those of tables, as it is shown, in the order of [`SETTINGS`].
pub(super) fn settings(merged: &Merged) -> Result<Vec<(&'static str, String)>, ConfigError> {
    let setting = |(key, kind, _): &(&'static str, Kind, &str)| {
        let text = merged.text(key)?;
        let value = match kind {
            Kind::Text | Kind::Size | Kind::Time => quoted(&text),
            Kind::PostgresUrl => quoted(&mask_postgres(&text)),
            Kind::RedisUrl => quoted(&mask_redis(&text)),
            Kind::Flag | Kind::Count => text,
            Kind::Command => {
                let words: Vec<String> = merged.words(key)?.iter().map(|word| quoted(word)).collect();
                format!("[{}]", words.join(", "))
            }
            Kind::Names => {
                let names: Vec<String> = text.split(',').filter(|name| !name.is_empty()).map(quoted).collect();
                format!("[{}]", names.join(", "))
            }
        };
        Ok((*key, value))
    };
    SETTINGS.iter().map(setting).collect()
}

pub(super) fn toml(settings: &[(&'static str, String)], tables: &[TableSpec]) -> String {
    let mut out = String::new();
    let mut section = "";
    for (key, value) in settings {
        let (within, name) = key.split_once('.').unwrap_or_default();
        if within != section {
            let _ = writeln!(out, "{}[{within}]", if out.is_empty() { "" } else { "\n" });
            section = within;
        }
        let _ = writeln!(out, "{name} = {value}");
    }
    for table in tables {
        let list = |names: &[String]| names.iter().map(|n| quoted(n)).collect::<Vec<_>>().join(", ");
        let rename: Vec<String> = table.rename.iter().map(|(c, f)| format!("{} = {}", quoted(c), quoted(f))).collect();
        let rename = if rename.is_empty() { "{}".to_owned() } else { format!("{{ {} }}", rename.join(", ")) };
        let _ = writeln!(out, "\n[[tables]]\nname = {}", quoted(&table.name));
        let _ = writeln!(out, "table = {}\nkey = {}", quoted(&table.table.to_string()), quoted(&table.key.to_string()));
        let _ = writeln!(out, "columns = [{}]\nrename = {rename}", list(&table.columns));
        let _ = writeln!(out, "ttl = {}", quoted(&time(table.ttl_ms)));
        let _ = writeln!(out, "format = {}", quoted(table.format.as_str()));
        for lookup in &table.lookups {
            let (name, key) = (quoted(&lookup.name), quoted(&lookup.key.to_string()));
            let order = quoted(lookup.order.as_deref().unwrap_or_default());
            let _ = writeln!(out, "\n[[tables.lookups]]\nname = {name}\nkey = {key}\norder = {order}");
        }
    }
    out
}

/// Uses the largest unit up to hours that divides it, because people write `24h` here rather than `1day`.
fn time(ms: u64) -> String {
    match ms {
        ms if ms % 3_600_000 == 0 => format!("{}h", ms / 3_600_000),
        ms if ms % 60_000 == 0 => format!("{}m", ms / 60_000),
        ms if ms % 1_000 == 0 => format!("{}s", ms / 1_000),
        ms => format!("{ms}ms"),
    }
}

fn quoted(text: &str) -> String {
    Toml(text).to_string()
}

/// Takes a string that [`PostgresTarget::parse`](crate::source::target::PostgresTarget::parse) has accepted.
pub(super) fn mask_postgres(url: &str) -> String {
    match url.split_once("://") {
        // Credentials end at the first @, because a second one is rejected as part of the host.
        Some((scheme, rest)) => format!("{scheme}://{}", mask_parts(rest, rest.find('@'))),
        None => mask_pairs(url),
    }
}

/// Takes a URL that [`RedisTarget::parse`](crate::sink::connect::RedisTarget::parse) has accepted.
pub(super) fn mask_redis(url: &str) -> String {
    let Some((scheme, rest)) = url.split_once("://") else { return MASK.to_owned() };
    let authority = &rest[..rest.find(['/', '?', '#']).unwrap_or(rest.len())];
    format!("{scheme}://{}", mask_parts(rest, authority.rfind('@')))
}

/// Masks what follows `://`. The credentials come before `at`.
fn mask_parts(rest: &str, at: Option<usize>) -> String {
    let (credentials, rest) = rest.split_at(at.unwrap_or(0));
    let mut out = match credentials.split_once(':') {
        Some((user, _)) => format!("{user}:{MASK}"),
        None => credentials.to_owned(),
    };
    let Some((path, query)) = rest.split_once('?') else { return out + rest };
    out.push_str(path);
    for (i, pair) in query.split('&').enumerate() {
        out.push(if i == 0 { '?' } else { '&' });
        let (name, _) = pair.split_once('=').unwrap_or((pair, ""));
        let decoded = percent_encoding::percent_decode_str(name).decode_utf8_lossy();
        if matches!(&*decoded, "password" | "pass" | "sslpassword" | "sentinel_password") {
            let _ = write!(out, "{name}={MASK}");
        } else {
            out.push_str(pair);
        }
    }
    out
}

/// Masks `key = value` and `key = 'a value'`.
fn mask_pairs(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some((name, after)) = rest.split_once('=') {
        let value = after.trim_start();
        let quote = value.starts_with('\'');
        let mut escaped = false;
        let ends = |(i, c): &(usize, char)| {
            let ends = !escaped && if quote { *i > 0 && *c == '\'' } else { c.is_whitespace() };
            escaped = !escaped && *c == '\\';
            ends
        };
        let end = value.char_indices().find(ends).map_or(value.len(), |(i, _)| i + usize::from(quote));
        let shown = if matches!(name.trim(), "password" | "sslpassword") { MASK } else { &value[..end] };
        let _ = write!(out, "{name}={shown}");
        rest = &value[end..];
    }
    out + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_the_password_out_of_every_form_of_url() {
        for (url, shown) in [
            ("postgres://u@h/d", "postgres://u@h/d"),
            ("postgres://h/d", "postgres://h/d"),
            ("postgres://u:secret@h:1,g:2/d?a=b", "postgres://u:***@h:1,g:2/d?a=b"),
            ("postgres://u:se?cr/et@h/d", "postgres://u:***@h/d"),
            ("postgres://u:se:cret@h/d", "postgres://u:***@h/d"),
            ("postgres://h/d?user=u&password=secret&x=y", "postgres://h/d?user=u&password=***&x=y"),
            ("postgres://h/d?pass%77ord=secret", "postgres://h/d?pass%77ord=***"),
            ("host=h password=secret dbname=d", "host=h password=*** dbname=d"),
            ("host=h password = 'se cr\\'et' dbname=d", "host=h password =*** dbname=d"),
            ("password=se\\ cret host=h", "password=*** host=h"),
            ("host=h options='-c a=b' password=''", "host=h options='-c a=b' password=***"),
        ] {
            assert_eq!(mask_postgres(url), shown, "{url}");
        }
        for (url, shown) in [
            ("redis://h:1/2", "redis://h:1/2"),
            ("redis://:secret@h", "redis://:***@h"),
            ("redis://u:se@cret@h/0", "redis://u:***@h/0"),
            ("unix:///s?db=1&pass=secret", "unix:///s?db=1&pass=***"),
            ("unix:///s@t?password=secret", "unix:///s@t?password=***"),
            ("redis+sentinel://h/m?sentinel_password=secret", "redis+sentinel://h/m?sentinel_password=***"),
        ] {
            assert_eq!(mask_redis(url), shown, "{url}");
        }
    }

    #[test]
    fn a_time_is_written_as_people_do() {
        for (ms, text) in [(86_400_000, "24h"), (5_400_000, "90m"), (90_000, "90s"), (1_500, "1500ms")] {
            assert_eq!(time(ms), text);
            assert_eq!(humantime::parse_duration(text).map(|t| t.as_millis()), Ok(u128::from(ms)));
        }
    }
}
