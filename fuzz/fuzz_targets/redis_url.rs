//! Any text is a Redis URL or an error, and neither shows the password.

#![no_main]

use libfuzzer_sys::fuzz_target;
use prefetchd::sink::connect::RedisTarget;

fuzz_target!(|data: &[u8]| {
    let Ok(text) = str::from_utf8(data) else { return };
    let _ = shown(text);
    // Used as a password, it is never shown.
    if data.len() >= 4 && data.iter().all(u8::is_ascii_alphanumeric) {
        assert!(!shown(&format!("redis://u:{text}zz@h:7/3")).contains(&format!("{text}zz")));
        assert!(!shown(&format!("redis+sentinel://u:{text}zz@h:7/m/3")).contains(&format!("{text}zz")));
    }
});

fn shown(url: &str) -> String {
    match RedisTarget::parse(url) {
        Ok(target) => format!("{target} {target:?}"),
        Err(error) => format!("{error} {error:?}"),
    }
}
