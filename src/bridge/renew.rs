//! Keeps keys from expiring while the daemon works: renews the keys of each table, those of its rows and then those of its
//! lookups, in rounds that are spread out over time.
//!
//! It only finds the keys. The writer renews them, in a batch with the checkpoint, so a daemon that is no longer the
//! writer renews nothing. While syncing is unhealthy, the apply loop takes no pages; keys then expire, which is what
//! the TTL is for.

use super::{BridgeError, walk};
use crate::command::Key;
use crate::plan::key::Area;
use crate::schema::TableSpec;
use crate::session::load_messages::RenewalPage;
use crate::sink::any_reader::AnyReader;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep, sleep_until};

/// A round begins a third of the TTL after the previous one began, and takes up to a sixth, unless there are many more keys
/// than in the round before. The remaining TTL of a key therefore hardly ever falls below half.
const ROUNDS_A_TTL: u32 = 3;
/// In the first round: nobody may have renewed the keys for a while.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// Returns the delay before the next page. `time` is the time for a whole round, `before` the number of pages in the
/// previous round, or 0; `done` the number of pages in this round so far. A round of unknown length counts as one fifth
/// done, so that the first round becomes faster the longer it gets.
fn pause(time: Duration, before: u32, done: u32) -> Duration {
    let pause = time / before.max(done.saturating_mul(4)).saturating_add(8);
    if before == 0 { pause.min(LONGEST_PAUSE) } else { pause }
}

/// Renews the keys of one table until the session ends.
pub async fn run(
    spec: TableSpec,
    reader: AnyReader,
    out: mpsc::Sender<(RenewalPage, oneshot::Sender<()>)>,
) -> Result<(), BridgeError> {
    let period = Duration::from_millis(spec.ttl_ms) / ROUNDS_A_TTL;
    let areas = spec.areas();
    let mut before = 0;
    loop {
        let began = Instant::now();
        let mut pages = 0;
        let (mut area, mut cursor) = (0, 0);
        loop {
            let (next, keys) = match &areas[area] {
                Area::Prefix(prefix) => walk::page(&reader, prefix, cursor).await?,
                // It may not exist.
                Area::One(key) => (0, vec![Key(key.clone().into())]),
            };
            pages += 1;
            cursor = next;
            area += usize::from(cursor == 0);
            let ends_round = area == areas.len();
            if !keys.is_empty() || ends_round {
                let (done, written) = oneshot::channel();
                let round_began = began.into_std();
                let page = RenewalPage { table: spec.id, keys, round_began, ends_round };
                out.send((page, done)).await.map_err(|_| BridgeError::SessionOver)?;
                // An error means that the session has ended.
                let _ = written.await;
            }
            if ends_round {
                break;
            }
            sleep(pause(period / 2, before, pages)).await;
        }
        before = pages;
        sleep_until(began + period).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_round_is_spread_over_its_time_and_not_much_longer_when_it_grew() {
        let time = Duration::from_secs(600);
        for (before, pages) in [(0, 1), (0, 1_000), (0, 100_000), (1_000, 1_000), (1_000, 10_000), (100_000, 100_000)] {
            let took: Duration = (1..=pages).map(|done| pause(time, before, done)).sum();
            assert!(took < time * 3, "{before} {pages} {took:?}");
            assert!(pages < 1_000 || took > time / 5, "{before} {pages} {took:?}");
        }
    }
}
