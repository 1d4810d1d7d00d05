//! What this process knows of the masters of a Redis Cluster: written by whoever talks to them, read by the status and
//! the metrics.
//!
//! Nothing is decided here, and nothing is asked for its sake: most of it is what the writer knows anyway. A mistake
//! here shows operators something other than what happens.

use crate::lanes::Lane;
use crate::lanes::book::Share;
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A request may take this long before the wait is mentioned.
const PATIENCE: Duration = Duration::from_secs(2);
/// A request may take this long, and a node may be silent so long, before it counts as down. Masters are asked every
/// second during a session, and with every attempt to begin one.
const SILENT: Duration = Duration::from_secs(15);

/// The masters that were discovered last, in the order of their first hash slots. All clones share them.
#[derive(Debug, Clone, Default)]
pub struct Nodes(Arc<Mutex<Vec<NodeSeen>>>);

/// A master that serves hash slots.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NodeSeen {
    /// Host and port.
    pub at: String,
    pub slots: Vec<RangeInclusive<u16>>,
    /// What the writer has there. `None` before it is connected.
    pub share: Option<Share>,
    pub usage: Usage,
    pub answered: Option<Instant>,
    /// When the request was sent that it has not answered yet.
    asked: Option<Instant>,
    /// Why the last request failed, until one succeeds.
    failed: Option<String>,
    refused: Option<Refused>,
}

/// A request that a node refuses, and that is repeated until it accepts it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Refused {
    since: Instant,
    why: String,
}

/// What a server reports of its memory. `None` for what it does not report.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    pub used_memory_bytes: Option<u64>,
    /// 0 for no limit.
    pub maxmemory_bytes: Option<u64>,
    /// Since it started.
    pub evicted_keys: Option<u64>,
}

impl NodeSeen {
    pub fn hash_slots(&self) -> usize {
        self.slots.iter().map(ExactSizeIterator::len).sum()
    }

    pub fn serves(&self, lane: Lane) -> bool {
        self.slots.iter().any(|range| range.contains(&lane.number()))
    }

    /// What is wrong with it; `None` also if nobody has asked it yet.
    pub fn trouble(&self, now: Instant) -> Option<String> {
        let since = |at: Option<Instant>, most: Duration| {
            at.map(|at| now.saturating_duration_since(at)).filter(|passed| *passed > most)
        };
        let silent = since(self.asked, PATIENCE).or_else(|| since(self.answered, SILENT));
        match (&self.failed, silent) {
            (Some(why), _) => Some(why.clone()),
            (None, Some(silent)) => Some(format!("no answer for {} s", silent.as_secs())),
            (None, None) => self.refuses(now).map(str::to_owned),
        }
    }

    /// What it has refused for so long that it is worth mentioning.
    fn refuses(&self, now: Instant) -> Option<&str> {
        let refused = self.refused.as_ref()?;
        (now.saturating_duration_since(refused.since) > PATIENCE).then_some(&refused.why)
    }

    /// `None` if nobody has asked it yet.
    pub fn is_up(&self, now: Instant) -> Option<bool> {
        let is_silent = |at: Option<Instant>| at.is_some_and(|at| now.saturating_duration_since(at) > SILENT);
        match (&self.failed, self.answered) {
            (Some(_), _) => Some(false),
            (None, answered @ Some(_)) => Some(!is_silent(answered) && !is_silent(self.asked)),
            (None, None) => None,
        }
    }
}

impl Nodes {
    /// These are all masters that serve hash slots, and the slots of each, in the order of their first slots. What is
    /// known of others is dropped.
    pub fn discovered(&self, masters: impl Iterator<Item = (String, Vec<RangeInclusive<u16>>)>) {
        let mut seen = self.lock();
        let mut before = std::mem::take(&mut *seen);
        *seen = masters
            .map(|(at, slots)| match before.iter().position(|node| node.at == at) {
                Some(place) => NodeSeen { slots, ..before.swap_remove(place) },
                None => NodeSeen { at, slots, ..NodeSeen::default() },
            })
            .collect();
    }

    /// A request is sent to this node.
    pub fn asks(&self, at: &str) {
        self.change(at, |node| _ = node.asked.get_or_insert_with(Instant::now));
    }

    pub fn answered(&self, at: &str) {
        self.change(at, |node| (node.answered, node.asked, node.failed) = (Some(Instant::now()), None, None));
    }

    pub fn failed(&self, at: &str, why: String) {
        self.change(at, |node| (node.asked, node.failed) = (None, Some(why)));
    }

    /// This node has said, or not said, how much memory it uses. It may be another connection that waits for an answer.
    pub fn reports(&self, at: &str, usage: Result<Usage, String>) {
        self.change(at, |node| match usage {
            Ok(usage) => (node.answered, node.usage, node.failed) = (Some(Instant::now()), usage, None),
            Err(why) => node.failed = Some(why),
        });
    }

    pub fn holds(&self, at: &str, share: Share) {
        self.change(at, |node| node.share = Some(share));
    }

    /// This node refuses a request, which is repeated.
    pub fn refuses(&self, at: &str, why: String) {
        self.change(at, |node| {
            let since = node.refused.take().map_or_else(Instant::now, |refused| refused.since);
            node.refused = Some(Refused { since, why });
        });
    }

    /// Nothing waits for a node that refuses.
    pub fn goes_on(&self) {
        self.lock().iter_mut().for_each(|node| node.refused = None);
    }

    /// Why a request has had to be repeated for so long that it is worth mentioning.
    pub fn refusal(&self) -> Option<String> {
        let now = Instant::now();
        self.lock().iter().find_map(|node| node.refuses(now)).map(str::to_owned)
    }

    /// The nodes that have not answered for some time. They may be receiving a large request.
    pub fn silent(&self) -> Vec<String> {
        let is_silent = |node: &&NodeSeen| node.asked.is_some_and(|at| at.elapsed() > PATIENCE);
        self.lock().iter().filter(is_silent).map(|node| node.at.clone()).collect()
    }

    /// All masters, in the order of their hash slots.
    pub fn seen(&self) -> Vec<NodeSeen> {
        self.lock().clone()
    }

    fn change(&self, at: &str, change: impl FnOnce(&mut NodeSeen)) {
        // It may have left the cluster, or become a replica.
        if let Some(node) = self.lock().iter_mut().find(|node| node.at == at) {
            change(node);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<NodeSeen>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nodes() -> Nodes {
        let nodes = Nodes::default();
        nodes.discovered([("a:1".to_owned(), vec![0..=9]), ("b:1".to_owned(), vec![10..=29])].into_iter());
        nodes
    }

    fn later(seconds: u64) -> Instant {
        Instant::now() + Duration::from_secs(seconds)
    }

    #[test]
    fn what_is_known_of_a_master_stays_while_its_hash_slots_change() {
        let nodes = nodes();
        let share = Share { lanes: 7, ..Share::default() };
        nodes.holds("b:1", share);
        nodes.holds("c:1", share);
        nodes.discovered([("c:1".to_owned(), vec![0..=9]), ("b:1".to_owned(), vec![10..=19, 25..=25])].into_iter());
        let seen = nodes.seen();
        let seen: Vec<_> = seen.iter().map(|node| (&*node.at, node.hash_slots(), node.share)).collect();
        assert_eq!(seen, [("c:1", 10, None), ("b:1", 11, Some(share))]);
    }

    #[test]
    fn a_master_that_nobody_has_asked_is_not_down() {
        let node = nodes().seen().swap_remove(0);
        assert_eq!((node.is_up(later(99)), node.trouble(later(99))), (None, None));
    }

    #[test]
    fn a_master_that_is_asked_and_does_not_answer_is_down_after_a_while() {
        let nodes = nodes();
        nodes.answered("a:1");
        nodes.asks("a:1");
        let node = || nodes.seen().swap_remove(0);
        assert_eq!((node().is_up(later(1)), node().trouble(later(1))), (Some(true), None));
        assert_eq!(
            (node().is_up(later(5)), node().trouble(later(5))),
            (Some(true), Some("no answer for 5 s".to_owned()))
        );
        assert_eq!(node().is_up(later(16)), Some(false));
        // Another connection gets an answer.
        nodes.reports("a:1", Ok(Usage::default()));
        assert_eq!(node().trouble(later(5)), Some("no answer for 5 s".to_owned()));
        nodes.answered("a:1");
        assert_eq!((node().is_up(later(5)), node().trouble(later(5))), (Some(true), None));
        assert_eq!(node().is_up(later(16)), Some(false), "nobody has heard of it since");
    }

    #[test]
    fn what_a_master_refuses_is_mentioned_until_somebody_goes_on() {
        let nodes = nodes();
        nodes.answered("a:1");
        nodes.refuses("a:1", "hash slot 5 is moving".to_owned());
        let node = || nodes.seen().swap_remove(0);
        assert_eq!(node().trouble(later(0)), None, "slots move all the time");
        assert_eq!(
            (node().is_up(later(5)), node().trouble(later(5))),
            (Some(true), Some("hash slot 5 is moving".to_owned()))
        );
        nodes.goes_on();
        assert_eq!(node().trouble(later(5)), None);
    }
}
