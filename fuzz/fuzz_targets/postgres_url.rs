//! Any text is a connection to Postgres or an error, and neither shows the password.

#![no_main]

use libfuzzer_sys::fuzz_target;
use prefetchd::source::target::PostgresTarget;
use std::collections::HashMap;

fuzz_target!(|data: &[u8]| {
    let Ok(text) = str::from_utf8(data) else { return };
    // No file of this machine is looked for.
    let env = HashMap::from([("PGPASSWORD".to_owned(), "hunter2".to_owned())]);
    let shown = match PostgresTarget::parse(text, &env) {
        Ok(target) => {
            assert!(!target.servers.is_empty());
            format!("{target:?} {}", target.describe())
        }
        Err(error) => format!("{error} {error:?}"),
    };
    assert!(text.contains("hunter2") || !shown.contains("hunter2"));
});
