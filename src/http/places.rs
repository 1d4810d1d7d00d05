//! How much may be in hand at once, so that no reader takes what the others need: requests, reads of Redis, and answers
//! that their peers have not taken yet.

use super::connection::Limits;
use super::refusal::Refusal;
use axum::body::Body;
use bytes::Bytes;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

/// Reads of one row that are under way in Redis.
const SINGLE: usize = 64;
/// Reads of several rows, a hundred at most each: what they bring is in memory twice, as rows and as an answer.
const BATCHES: usize = 4;
/// Others wait so long for their turn.
const PATIENCE: Duration = Duration::from_secs(2);
/// Answers up to this size are bounded by the number of connections alone.
const SMALL_BYTES: usize = 64 << 10;
/// What a permit for answers stands for.
const UNIT_BYTES: usize = 1 << 10;
/// So many answers have space at once, however large.
const ANSWERS: usize = 4;

pub(super) struct Places {
    requests: Arc<Semaphore>,
    waiting: Arc<Semaphore>,
    single: Arc<Semaphore>,
    batches: Arc<Semaphore>,
    answers: Arc<Semaphore>,
    answer_units: usize,
}

/// Given back when it is dropped.
pub(super) type Place = OwnedSemaphorePermit;

impl Places {
    pub(super) fn new(limits: &Limits) -> Self {
        let semaphore = |permits| Arc::new(Semaphore::new(permits));
        let answer_units = limits.answer_bytes / UNIT_BYTES;
        Self {
            requests: semaphore(limits.requests),
            waiting: semaphore(limits.waiting),
            single: semaphore(SINGLE),
            batches: semaphore(BATCHES),
            answers: semaphore(answer_units),
            answer_units,
        }
    }

    /// For one request, until its answer is there.
    pub(super) fn request(&self) -> Result<Place, Refusal> {
        let place = Arc::clone(&self.requests).try_acquire_owned();
        place.map_err(|_| Refusal::Overloaded("too many requests are under way: try again".to_owned()))
    }

    /// For a request that waits for a position, beside the one that it has.
    pub(super) fn waiting(&self) -> Result<Place, Refusal> {
        let place = Arc::clone(&self.waiting).try_acquire_owned();
        place.map_err(|_| Refusal::Overloaded("too many reads wait for a position: try again".to_owned()))
    }

    /// For a read of so many rows, until they are an answer.
    pub(super) async fn read(&self, rows: usize) -> Result<Place, Refusal> {
        let reads = if rows > 1 { &self.batches } else { &self.single };
        let place = timeout(PATIENCE, Arc::clone(reads).acquire_owned()).await;
        let place = place.map_err(|_| Refusal::Overloaded("too many reads are under way: try again".to_owned()))?;
        Ok(place.expect("the semaphore is never closed"))
    }

    /// For an answer of about so many bytes, until its peer has taken it. A small one needs none.
    pub(super) async fn answer(&self, bytes: usize) -> Result<Option<Place>, Refusal> {
        if bytes <= SMALL_BYTES {
            return Ok(None);
        }
        // One answer never takes all the space, so that a peer that takes its time keeps nobody from the rest.
        let units = bytes.div_ceil(UNIT_BYTES).min(self.answer_units / ANSWERS);
        let units = u32::try_from(units).unwrap_or(u32::MAX);
        match timeout(PATIENCE, Arc::clone(&self.answers).acquire_many_owned(units)).await {
            Ok(place) => Ok(Some(place.expect("the semaphore is never closed"))),
            Err(_) => Err(Refusal::Overloaded("others have not taken their large answers yet: try again".to_owned())),
        }
    }
}

/// An answer that holds its place until it is written.
pub(super) fn held(bytes: Vec<u8>, place: Option<Place>) -> Body {
    struct Held {
        bytes: Vec<u8>,
        _place: Place,
    }
    impl AsRef<[u8]> for Held {
        fn as_ref(&self) -> &[u8] {
            &self.bytes
        }
    }
    match place {
        None => bytes.into(),
        Some(place) => Bytes::from_owner(Held { bytes, _place: place }).into(),
    }
}
