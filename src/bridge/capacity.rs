//! Limits the size of batches after Redis has failed to accept one.
//!
//! The server's limits are read with every connection. If the server does not report them, or has less memory than they
//! suggest, only a failed batch reveals it; smaller batches are then sent for a while. A mistake here keeps a
//! transaction from ever being applied, or splits transactions without need.

use super::room::size;
use crate::resp::batch::{LEAST_PLANNED_BYTES, Limits};
use crate::sink::server::ServerInfo;
use crate::sink::{Class, SinkError};
use std::io;
use std::time::{Duration, Instant};

/// How long after the last failed batch larger ones are tried again.
const LEARNED_FOR: Duration = Duration::from_secs(600);
/// The lowest value of `client-query-buffer-limit`. A connection that breaks with less in flight broke for another
/// reason, unless all clients together use too much.
const LEAST_BUFFER_BYTES: usize = 1 << 20;

/// What one session learns for the next.
#[derive(Debug, Clone, Default)]
pub struct Learned {
    failed: Option<Failed>,
    planned: Option<(usize, Instant)>,
}

/// A batch that Redis did not accept.
#[derive(Debug, Clone)]
struct Failed {
    why: Why,
    weight: usize,
    /// How often this happened in a row, without a restart of the server.
    times: u32,
    /// The server, and how many clients it had disconnected before.
    run_id: Option<String>,
    disconnected_clients: Option<u64>,
    /// Batches have already been made smaller because of it. It does not make them smaller again, however often
    /// connections are opened.
    is_learned: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Why {
    Disconnected,
    OutOfMemory,
}

impl Learned {
    /// `server` is as reported when the connection was opened. Returns the error, with the suspected cause.
    pub fn batch_failed(&mut self, error: SinkError, weight: usize, server: &ServerInfo) -> SinkError {
        let why = match &error {
            SinkError::Lost { .. } => Why::Disconnected,
            SinkError::Refused { reply, .. } if reply.class() == Class::Full => Why::OutOfMemory,
            _ => return error,
        };
        if weight <= LEAST_PLANNED_BYTES || why == Why::OutOfMemory && is_full(server) {
            return error;
        }
        let before = self.failed.as_ref().filter(|failed| failed.why == why && failed.run_id == server.run_id);
        let times = before.map_or(1, |failed| failed.times + 1);
        let (run_id, disconnected_clients) = (server.run_id.clone(), server.clients.disconnected);
        self.failed = Some(Failed { why, weight, times, run_id, disconnected_clients, is_learned: false });
        match error {
            SinkError::Lost { redis, error } if times > 1 && weight > LEAST_BUFFER_BYTES => {
                let text = format!(
                    "{error}, {times} times while it was sent a batch of {}: client-query-buffer-limit or \
                     maxmemory-clients may be lower than that",
                    size(weight as u64)
                );
                SinkError::Lost { redis, error: io::Error::new(error.kind(), text) }
            }
            error => error,
        }
    }

    /// If `server` is full, the size of the batch was not the reason why it had no memory.
    pub fn connected(&mut self, server: &ServerInfo) {
        if is_full(server) {
            self.failed.take_if(|failed| failed.why == Why::OutOfMemory);
        }
    }

    pub fn batch_taken(&mut self, weight: usize) {
        if self.failed.as_ref().is_some_and(|failed| failed.weight / 2 <= weight) {
            self.failed = None;
        }
    }

    /// A batch was planned that is larger than `limits` allow. That is a bug in planning; a smaller batch works around
    /// it.
    pub fn misplanned(&mut self, limits: Limits, now: Instant) {
        let planned = (limits.planned_bytes / 2).max(LEAST_PLANNED_BYTES);
        self.planned = Some((planned, now + LEARNED_FOR));
    }

    /// Returns the limits for batches on a new connection, and what to report about them.
    pub fn limits(&mut self, server: &ServerInfo, now: Instant) -> (Limits, Option<String>) {
        let said = self.learn(server, now);
        self.forgets(now);
        let limits = match self.planned {
            Some((bytes, _)) => server.limits.planned_for(bytes),
            None => server.limits,
        };
        (limits, said)
    }

    fn learn(&mut self, server: &ServerInfo, now: Instant) -> Option<String> {
        self.connected(server);
        let failed = self.failed.as_mut().filter(|failed| !failed.is_learned)?;
        if failed.run_id != server.run_id || server.limits.planned_bytes < failed.weight {
            // The server was restarted since, or reports lower limits than before.
            self.failed = None;
            return None;
        }
        let rose = server.clients.disconnected > failed.disconnected_clients;
        let fact = match failed.why {
            Why::OutOfMemory => "redis had no memory to queue",
            Why::Disconnected if rose || failed.times > 1 => "redis closed the connection while it was sent",
            // Connections break for many reasons.
            Why::Disconnected => return None,
        };
        // Slightly more than half of a batch is for changes.
        let planned =
            self.planned.map_or(failed.weight, |(bytes, _)| bytes.min(failed.weight)).max(LEAST_PLANNED_BYTES);
        let text = format!(
            "{fact} a batch of {}: for {} min, batches are smaller and transactions over {} become visible in parts",
            size(failed.weight as u64),
            LEARNED_FOR.as_secs() / 60,
            size(server.limits.planned_for(planned).stream_bytes() as u64),
        );
        failed.is_learned = true;
        self.planned = Some((planned, now + LEARNED_FOR));
        Some(text)
    }

    /// Returns whether larger batches may be tried again from now on.
    pub fn forgets(&mut self, now: Instant) -> bool {
        self.planned.take_if(|(_, until)| *until <= now).is_some()
    }
}

/// Whether it lacks memory even for the smallest batch. It then refuses the first write, whatever its size.
fn is_full(server: &ServerInfo) -> bool {
    server.room_bytes.is_some_and(|room| room <= LEAST_PLANNED_BYTES as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sink::server::ClientsMemory;
    use crate::sink::{ErrorReply, Request};

    const BATCH: usize = 4 << 20;

    fn server(run_id: &str, disconnected: Option<u64>) -> ServerInfo {
        ServerInfo {
            run_id: Some(run_id.to_owned()),
            clients: ClientsMemory { disconnected, ..ClientsMemory::default() },
            ..ServerInfo::default()
        }
    }

    fn lost() -> SinkError {
        SinkError::Lost { redis: "r".to_owned(), error: io::ErrorKind::ConnectionReset.into() }
    }

    fn full() -> SinkError {
        let reply = ErrorReply::received(b"OOM command not allowed");
        SinkError::Refused { request: Request::new("HSET"), reply }
    }

    #[test]
    fn smaller_batches_follow_only_where_their_size_was_the_reason() {
        let none = || server("a", None);
        let lower = ServerInfo { limits: Limits::new(1 << 30, 1 << 20), ..none() };
        let counted = |count| server("a", Some(count));
        let with_room = |bytes| ServerInfo { room_bytes: Some(bytes), ..none() };
        for (what, errors, before, after, learns) in [
            ("once is chance", vec![lost()], none(), none(), false),
            ("twice is not", vec![lost(), lost()], none(), none(), true),
            ("another start of the server", vec![lost(), lost()], none(), server("b", None), false),
            ("redis has counted it", vec![lost()], counted(3), counted(4), true),
            ("redis has counted nothing", vec![lost()], counted(3), counted(3), false),
            ("redis says so", vec![full()], none(), none(), true),
            ("redis says so, and it is not full", vec![full()], with_room(1 << 20), with_room(1 << 20), true),
            ("it was full beforehand", vec![full(), full()], with_room(0), with_room(1 << 20), false),
            ("it is full now", vec![full()], with_room(1 << 20), with_room(0), false),
            ("the limit is known now", vec![lost(), lost()], none(), lower, false),
            ("something else", vec![SinkError::NotArmed], none(), none(), false),
        ] {
            let mut learned = Learned::default();
            for error in errors {
                learned.batch_failed(error, BATCH, &before);
            }
            let (limits, said) = learned.limits(&after, Instant::now());
            assert_eq!((limits.planned_bytes < after.limits.planned_bytes, said.is_some()), (learns, learns), "{what}");
            assert_eq!(limits.batch_bytes, after.limits.batch_bytes, "{what}: what a row may take is not learned");
        }
    }

    #[test]
    fn batches_shrink_to_a_floor_and_grow_again() {
        let (mut learned, server, now) = (Learned::default(), server("a", None), Instant::now());
        let (mut sent, mut planned) = (BATCH, usize::MAX);
        for _ in 0..30 {
            learned.batch_failed(full(), sent, &server);
            let (limits, _) = learned.limits(&server, now);
            assert!(limits.planned_bytes <= planned);
            (sent, planned) = (limits.stream_bytes(), limits.planned_bytes);
        }
        assert!((LEAST_PLANNED_BYTES..2 * LEAST_PLANNED_BYTES).contains(&learned.limits(&server, now).0.planned_bytes));
        assert!(!learned.forgets(now + LEARNED_FOR / 2));
        assert!(learned.forgets(now + LEARNED_FOR));
        assert_eq!(learned.limits(&server, now + LEARNED_FOR).0, server.limits);
    }

    #[test]
    fn the_reason_names_the_limits_when_it_repeats() {
        let (mut learned, server) = (Learned::default(), server("a", None));
        assert!(!learned.batch_failed(lost(), BATCH, &server).to_string().contains("client-query-buffer-limit"));
        let text = learned.batch_failed(lost(), BATCH, &server).to_string();
        assert!(text.contains("2 times") && text.contains("client-query-buffer-limit"), "{text}");
        learned.batch_taken(BATCH);
        assert!(!learned.batch_failed(lost(), BATCH, &server).to_string().contains("client-query-buffer-limit"));
    }
}
