//! How long the daemon waits before it looks again or gives up, where a test of what happens then would wait as long.
//!
//! These are not settings: nobody has a reason to change them in production. Only a debug build reads the environment
//! variable `PREFETCHD_TEST_TIMING`, as `catalog=500ms drain=1s`, so that tests need not wait for the real timeouts.

use std::time::Duration;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timing {
    /// Between two reads of the catalog. Changes are followed within 15 s: one read, and the load.
    pub catalog: Duration,
    /// A mistake in the setup that shows up only after a good start is looked at again this often.
    pub setup_retry: Duration,
    /// What is in hand at the stop has this long to get to Redis.
    pub drain: Duration,
    /// A Redis that has taken and sent nothing for this long costs the walsender its connection: it would hold up a
    /// shutdown of Postgres without end.
    pub let_go: Duration,
    /// A checkpoint that stands still for this long is that of a daemon that hangs: one that works writes it once a second.
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
    /// Where a test asks for what there is not.
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
