//! Timeouts and intervals of the daemon that tests need to shorten.
//!
//! These are not settings, since there is no reason to change them in production. Only a debug build reads the
//! environment variable `PREFETCHD_TEST_TIMING`, for example `catalog=500ms drain=1s`.

use std::time::Duration;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timing {
    /// The interval between reads of the catalog. Schema changes must be followed within 15 s, including the load.
    pub catalog: Duration,
    /// How often to retry after a configuration problem that appeared while running.
    pub setup_retry: Duration,
    /// How long stopping may take to write to Redis what was received.
    pub drain: Duration,
    /// After Redis has neither read nor sent anything for this long, the connection to the walsender is closed, because
    /// it would delay a shutdown of Postgres indefinitely.
    pub let_go: Duration,
    /// If the checkpoint has not changed for this long, its daemon is considered hung: a working one writes it once a
    /// second.
    pub hangs: Duration,
}

impl Timing {
    const DEFAULT: Self = Self {
        catalog: Duration::from_secs(5),
        setup_retry: Duration::from_secs(5),
        drain: Duration::from_secs(5),
        let_go: Duration::from_secs(10),
        hangs: Duration::from_secs(11),
    };

    /// # Panics
    /// If a test sets a timing that does not exist.
    #[must_use]
    pub fn of_this_build() -> Self {
        match std::env::var("PREFETCHD_TEST_TIMING") {
            Ok(shorter) if cfg!(debug_assertions) => Self::DEFAULT.with(&shorter),
            _ => Self::DEFAULT,
        }
    }

    fn with(mut self, shorter: &str) -> Self {
        for pair in shorter.split_whitespace() {
            let (name, value) = pair.split_once('=').unwrap_or_else(|| panic!("{pair} is not name=duration"));
            let field = match name {
                "catalog" => &mut self.catalog,
                "setup_retry" => &mut self.setup_retry,
                "drain" => &mut self.drain,
                "let_go" => &mut self.let_go,
                "hangs" => &mut self.hangs,
                _ => panic!("there is no timing named {name}"),
            };
            *field = humantime::parse_duration(value).unwrap_or_else(|error| panic!("{pair}: {error}"));
        }
        self
    }
}
