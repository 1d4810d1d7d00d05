//! Limits on what may be in flight at once, so that no reader exhausts what the others need: requests, event streams,
//! reads of Redis, and answers that their peers have not read yet.

use super::connection::{ClientAddress, HttpLimits};
use super::refusal::Refusal;
use crate::sink::any_reader::AnyReader;
use axum::body::Body;
use bytes::Bytes;
use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

/// Concurrent reads of one row.
const SINGLE: usize = 256;
/// Concurrent reads of several rows, each of at most 32 MB in total: the result is in memory twice, as rows and as an
/// answer.
const BATCHES: usize = 4;
/// Other reads wait at most this long for their turn.
const PATIENCE: Duration = Duration::from_secs(2);
/// Answers up to this size are bounded by the number of connections alone.
const SMALL_BYTES: usize = 64 << 10;
/// Bytes of an answer that one permit covers.
const UNIT_BYTES: usize = 1 << 10;
/// At least this many answers fit at once, however large they are.
const ANSWERS: usize = 4;

pub(super) struct Places {
    requests: Arc<Semaphore>,
    waiting: Shares,
    streams: Shares,
    single: Arc<Semaphore>,
    batches: Arc<Semaphore>,
    answers: Arc<Semaphore>,
    answer_units: usize,
}

/// Released when it is dropped.
pub(super) type Permit = OwnedSemaphorePermit;

/// Readers of several rows, each used by one request at a time: as many as there are permits for such reads.
pub(super) struct Batches(Mutex<Vec<AnyReader>>);

impl Batches {
    pub(super) fn new(reader: &AnyReader) -> Self {
        Self(Mutex::new((0..BATCHES).map(|_| reader.for_batches()).collect()))
    }

    /// Lends a reader to the holder of such a permit.
    pub(super) fn lend(&self) -> Lent<'_> {
        let reader = locked(&self.0).pop().expect("as many as places");
        Lent { batches: self, reader, has_answered: false }
    }
}

pub(super) struct Lent<'a> {
    batches: &'a Batches,
    pub(super) reader: AnyReader,
    pub(super) has_answered: bool,
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        // Otherwise replies that nobody waits for may still arrive on this connection.
        let next = if self.has_answered { self.reader.clone() } else { self.reader.for_batches() };
        locked(&self.batches.0).push(next);
    }
}

impl Places {
    pub(super) fn new(limits: &HttpLimits) -> Self {
        let semaphore = |permits| Arc::new(Semaphore::new(permits));
        let answer_units = limits.answer_bytes / UNIT_BYTES;
        Self {
            requests: semaphore(limits.requests),
            waiting: Shares::new(limits.waiting),
            streams: Shares::new(limits.streams),
            single: semaphore(SINGLE),
            batches: semaphore(BATCHES),
            answers: semaphore(answer_units),
            answer_units,
        }
    }

    /// A permit for one request, held until its answer is ready.
    pub(super) fn request(&self) -> Result<Permit, Refusal> {
        let place = Arc::clone(&self.requests).try_acquire_owned();
        place.map_err(|_| Refusal::Overloaded("too many requests are under way: try again".to_owned()))
    }

    /// A share for a request that waits for a position, in addition to its permit.
    pub(super) fn waiting(&self, peer: ClientAddress) -> Result<Share, Refusal> {
        let share = self.waiting.take(peer);
        share.ok_or_else(|| Refusal::Overloaded("too many reads wait for a position: try again".to_owned()))
    }

    /// A share for an event stream, held until the stream ends.
    pub(super) fn stream(&self, peer: ClientAddress) -> Result<Share, Refusal> {
        self.streams.take(peer).ok_or(Refusal::TooManyStreams)
    }

    /// A permit to read `rows` rows, held until the answer is built from them.
    pub(super) async fn read(&self, rows: usize) -> Result<Permit, Refusal> {
        if rows > 1 { self.batch().await } else { place_among(&self.single).await }
    }

    /// A permit to read several rows, held until the answer is built from them.
    pub(super) async fn batch(&self) -> Result<Permit, Refusal> {
        place_among(&self.batches).await
    }

    /// A permit for an answer of about `bytes` bytes, held until its peer has read it. A small answer needs none.
    pub(super) async fn answer(&self, bytes: usize) -> Result<Option<Permit>, Refusal> {
        if bytes <= SMALL_BYTES {
            return Ok(None);
        }
        // One answer never takes all the capacity, so that a slow peer does not block the others.
        let units = bytes.div_ceil(UNIT_BYTES).min(self.answer_units / ANSWERS);
        let units = u32::try_from(units).unwrap_or(u32::MAX);
        match timeout(PATIENCE, Arc::clone(&self.answers).acquire_many_owned(units)).await {
            Ok(place) => Ok(Some(place.expect("the semaphore is never closed"))),
            Err(_) => Err(Refusal::Overloaded("others have not taken their large answers yet: try again".to_owned())),
        }
    }
}

async fn place_among(reads: &Arc<Semaphore>) -> Result<Permit, Refusal> {
    let place = timeout(PATIENCE, Arc::clone(reads).acquire_owned()).await;
    let place = place.map_err(|_| Refusal::Overloaded("too many reads are under way: try again".to_owned()))?;
    Ok(place.expect("the semaphore is never closed"))
}

/// Places that are held for a long time: no address gets more than half of them.
struct Shares {
    places: Arc<Semaphore>,
    half: usize,
    held: Arc<Mutex<HashMap<IpAddr, usize>>>,
}

impl Shares {
    fn new(places: usize) -> Self {
        Self { places: Arc::new(Semaphore::new(places)), half: places.div_ceil(2), held: Arc::default() }
    }

    /// Returns `None` if all are taken, or half of them by this address.
    fn take(&self, ClientAddress(peer): ClientAddress) -> Option<Share> {
        let place = Arc::clone(&self.places).try_acquire_owned().ok()?;
        let holder = holder(peer.ip());
        if let Some(address) = holder {
            let mut held = locked(&self.held);
            let number = held.entry(address).or_default();
            if *number >= self.half {
                return None;
            }
            *number += 1;
        }
        Some(Share { held: Arc::clone(&self.held), holder, _place: place })
    }
}

/// Whom a share counts against. For IPv6 it is a whole network, since one machine may use any address in it. `None` for
/// this machine itself: a proxy on it stands for everybody.
fn holder(ip: IpAddr) -> Option<IpAddr> {
    match ip.to_canonical() {
        ip if ip.is_loopback() => None,
        IpAddr::V4(ip) => Some(ip.into()),
        IpAddr::V6(ip) => Some(IpAddr::V6((ip.to_bits() & !u128::from(u64::MAX)).into())),
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Released when it is dropped.
pub(super) struct Share {
    held: Arc<Mutex<HashMap<IpAddr, usize>>>,
    holder: Option<IpAddr>,
    _place: Permit,
}

impl Drop for Share {
    fn drop(&mut self) {
        let Some(address) = self.holder else { return };
        let mut held = locked(&self.held);
        match held.get_mut(&address) {
            Some(number) if *number > 1 => *number -= 1,
            _ => drop(held.remove(&address)),
        }
    }
}

/// An answer that holds its permit until it is written.
pub(super) fn held(bytes: Vec<u8>, place: Option<Permit>) -> Body {
    struct HeldAnswer {
        bytes: Vec<u8>,
        _place: Permit,
    }
    impl AsRef<[u8]> for HeldAnswer {
        fn as_ref(&self) -> &[u8] {
            &self.bytes
        }
    }
    match place {
        None => bytes.into(),
        Some(place) => Bytes::from_owner(HeldAnswer { bytes, _place: place }).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(ip: &str) -> ClientAddress {
        ClientAddress((ip.parse::<IpAddr>().unwrap(), 1).into())
    }

    #[test]
    fn one_address_leaves_half_of_the_places_to_others() {
        for (one, same, other) in
            [("192.0.2.1", "::ffff:192.0.2.1", "192.0.2.2"), ("2001:db8::1", "2001:db8::ffff:0:0:2", "2001:db8:0:1::1")]
        {
            let shares = Shares::new(4);
            let mut taken: Vec<Share> = (0..2).map(|_| shares.take(peer(one)).unwrap()).collect();
            assert!(shares.take(peer(one)).is_none() && shares.take(peer(same)).is_none());
            taken.extend((0..2).map(|_| shares.take(peer(other)).unwrap()));
            assert!(shares.take(peer("192.0.2.3")).is_none(), "all are taken");
            taken.remove(0);
            assert!(shares.take(peer(same)).is_some(), "one was given back");
            drop(taken);
            assert!(locked(&shares.held).is_empty());
        }
    }

    /// These may all come from a proxy, or the daemon listens on loopback only.
    #[test]
    fn this_machine_may_take_every_place() {
        let shares = Shares::new(4);
        let taken: Vec<_> = (0..5).map(|_| shares.take(peer("127.0.0.1"))).collect();
        assert_eq!(taken.iter().filter(|share| share.is_some()).count(), 4);
    }
}
