//! The settings that every session shares, ordinary ones and the replication session.
//!
//! It knows no connection: what to ask is here, and what the answer must be. When it is wrong, loads and the stream show the
//! same value as different text (`DateStyle` of a role, say).

use super::SourceError;
use crate::code::Code;

/// What every session sets, whatever the server, the database or the role would have: COPY and the stream must write
/// one value with the same bytes.
///
/// They are the last of the session's `options`, so that none of the user's own can change them.
pub const SESSION_OPTIONS: &[(&str, &str)] = &[
    ("DateStyle", "ISO"),
    ("IntervalStyle", "postgres"),
    ("TimeZone", "UTC"),
    ("extra_float_digits", "1"),
    ("bytea_output", "hex"),
    ("lc_monetary", "C"),
    // Decides how `regclass` and its like are written. Unless it is named, pg_temp comes first.
    ("search_path", "pg_catalog, pg_temp"),
    ("quote_all_identifiers", "off"),
    ("client_encoding", "UTF8"),
    ("standard_conforming_strings", "on"),
    // A policy that hides rows from a load and not from the stream must fail loudly.
    ("row_security", "off"),
    // With it the planner calls functions in a table's CHECK constraints, which are its owner's.
    ("constraint_exclusion", "off"),
    // The daemon bounds its waiting itself: a role's limits would end loads of large tables, and idle sessions.
    ("statement_timeout", "0"),
    ("lock_timeout", "0"),
    ("idle_in_transaction_session_timeout", "0"),
    ("idle_session_timeout", "0"),
];

/// The remedy where the session is not what its login asked for, or cannot be.
pub(super) const POOLER: &str = "a pooler stands between: connect to Postgres itself";

/// Set where the server knows them: an unknown name in `options` would end the login.
const NEWER_SETTINGS: &[(&str, &str)] = &[
    // Since Postgres 17.
    ("transaction_timeout", "0"),
    // Since 17, and 16.4, 15.8, 14.13: what stands in the place of a table, and runs functions of its owner.
    ("restrict_nonsystem_relation_kind", "view, foreign-table"),
];

/// What every new session is asked, as one statement: a walsender of Postgres 14 takes no more at once. Also makes
/// [`NEWER_SETTINGS`].
pub(super) fn session_sql() -> String {
    let settings: Vec<String> =
        SESSION_OPTIONS.iter().map(|(name, _)| format!("pg_catalog.current_setting('{name}', true)")).collect();
    let newer: Vec<String> = NEWER_SETTINGS.iter().map(|(name, value)| format!("('{name}', '{value}')")).collect();
    format!(
        "SELECT {}, pg_catalog.pg_postmaster_start_time(),
                (SELECT pg_catalog.count(pg_catalog.set_config(s.name, newer.value, false))
                   FROM (VALUES {}) newer(name, value)
                   JOIN pg_catalog.pg_settings s ON s.name OPERATOR(pg_catalog.=) newer.name)",
        settings.join(", "),
        newer.join(", ")
    )
}

/// Holds the answer to [`session_sql`] against [`SESSION_OPTIONS`], and returns the time when the server started, which tells
/// one server from another. A pooler may drop `options` (`ignore_startup_parameters` of PgBouncer), and then the values of
/// this session and of another would be written differently.
pub(super) fn check_session(at: &str, answer: &[Option<&str>]) -> Result<String, SourceError> {
    for ((name, pinned), value) in SESSION_OPTIONS.iter().zip(answer) {
        let value = value.unwrap_or_default();
        // The order of day, month and year follows, which does not matter for the ISO style.
        let is = if *name == "DateStyle" { value.split(',').next().unwrap_or_default() } else { value };
        if is != *pinned {
            let fact = format!("gave the session {name} = '{value}' where the login asked for '{pinned}'");
            return Err(SourceError::Login { code: Code::PostgresPooler, at: at.to_owned(), fact, remedy: POOLER });
        }
    }
    let started = answer.get(SESSION_OPTIONS.len()).copied().flatten();
    started.map(str::to_owned).ok_or_else(|| SourceError::unexpected("preparing a session", "no time of start"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_with_another_setting_than_asked_for_is_refused() {
        let good: Vec<Option<&str>> =
            SESSION_OPTIONS.iter().map(|(_, value)| Some(*value)).chain([Some("then")]).collect();
        assert_eq!(check_session("h", &good).unwrap(), "then");
        for index in 0..SESSION_OPTIONS.len() {
            for other in [Some("other"), Some(""), None] {
                let mut bad = good.clone();
                bad[index] = other;
                let error = check_session("h", &bad).unwrap_err();
                assert_eq!(error.disposition(), crate::error::Disposition::Stop);
                let text = error.to_string();
                assert!(text.contains(SESSION_OPTIONS[index].0) && text.ends_with(POOLER), "{text}");
            }
        }
        let style = SESSION_OPTIONS.iter().position(|(name, _)| *name == "DateStyle").unwrap();
        for (value, good_style) in [("ISO, DMY", true), ("ISO, YMD", true), ("German, DMY", false), ("ISOX", false)] {
            let mut answer = good.clone();
            answer[style] = Some(value);
            assert_eq!(check_session("h", &answer).is_ok(), good_style, "{value}");
        }
    }
}
