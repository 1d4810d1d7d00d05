//! What the checkpoint has in addition on a cluster, where it is the record of all lanes: fields of its head, and a
//! bitmap of lanes.

use super::Lane;
use super::mark::Nonce;
use crate::checkpoint::Checkpoint;
use crate::lsn::{EndLsn, Lsn};
use bytes::Bytes;
use serde::Deserialize;

/// What the head says about the lanes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extra {
    /// See [`Checkpoint::whole`]; here, what is missing counts as [`FIRST_WHOLE`].
    pub whole: u64,
    /// The stamp of the last bad news. A mark with a later one proves that the record was rolled back.
    pub news: u64,
    /// See [`Checkpoint::floor`].
    pub floor: Option<EndLsn>,
    /// Makes each head different from every other. A reader that caches the tables' entries must read them again when
    /// it changes: two heads may have the same `seq`.
    pub write: Option<Nonce>,
    /// The write that last changed the tables' entries, which lie in a key of their own. That key says so, too: otherwise
    /// somebody has removed it, or it went back alone.
    pub entered: Option<Nonce>,
}

/// A lane that nothing has damaged has at least this stamp. 0 means damaged.
pub const FIRST_WHOLE: u64 = 1;

#[derive(Default, Deserialize)]
#[serde(default)]
struct Json {
    whole: u64,
    news: u64,
    floor: Option<String>,
    entered: Option<String>,
}

impl Extra {
    /// Reads these fields of a head. Missing ones have their lowest values; `write` is not read.
    pub fn of(head: &[u8]) -> Self {
        let Json { whole, news, floor, entered } = serde_json::from_slice(head).unwrap_or_default();
        let floor = floor.and_then(|text| text.parse::<Lsn>().ok()).map(EndLsn);
        let entered = entered.and_then(|text| text.parse().ok());
        Extra { whole: whole.max(FIRST_WHOLE), news, floor, write: None, entered }
    }

    /// Sets these fields in a head, which must be as [`Checkpoint`] writes it.
    pub fn add_to(&self, head: &[u8]) -> Vec<u8> {
        let mut head = Checkpoint::with_stamp(head, self.whole, self.floor).expect("this process has encoded it");
        head.pop();
        let nonce = |name: &str, nonce: Option<Nonce>| nonce.map_or(String::new(), |n| format!(r#","{name}":"{n}""#));
        let (write, entered) = (nonce("write", self.write), nonce("entered", self.entered));
        head.extend_from_slice(format!(r#","news":{}{write}{entered}}}"#, self.news).as_bytes());
        head
    }
}

/// Bytes of a bit for each lane.
const BITMAP_BYTES: usize = Lane::ALL as usize / 8;

/// Two bits for each lane, counted as SETBIT counts. Bit `n` means that the lane is *listed*: it has been written, so
/// it must have a mark. Bit 16,384 + `n` means that it is *announced*: it may have been.
///
/// A lane is announced before its first write, so that whoever takes over expects a late one. It is listed after it, so
/// that no lane counts as lost that was never written.
#[derive(Clone, PartialEq, Eq)]
pub struct Bitmap(Vec<u8>);

impl Bitmap {
    /// `found` may be shorter; the bits that it lacks are 0.
    pub fn new(found: Option<&[u8]>) -> Self {
        let mut bytes = found.unwrap_or_default().to_vec();
        bytes.resize(2 * BITMAP_BYTES, 0);
        Bitmap(bytes)
    }

    pub fn lists(&self, lane: Lane) -> bool {
        self.bit(0, lane)
    }

    pub fn announces(&self, lane: Lane) -> bool {
        self.bit(BITMAP_BYTES, lane)
    }

    pub fn list(&mut self, lane: Lane) {
        self.set(0, lane);
        self.announce(lane);
    }

    pub fn announce(&mut self, lane: Lane) {
        self.set(BITMAP_BYTES, lane);
    }

    pub fn to_bytes(&self) -> Bytes {
        Bytes::copy_from_slice(&self.0)
    }

    fn bit(&self, from: usize, lane: Lane) -> bool {
        let number = usize::from(lane.number());
        self.0[from + number / 8] & (0x80 >> (number % 8)) != 0
    }

    fn set(&mut self, from: usize, lane: Lane) {
        let number = usize::from(lane.number());
        self.0[from + number / 8] |= 0x80 >> (number % 8);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str = r#"{"system_id":"7","timeline":1,"database":"shop","lsn":"0/64","state":"ready","epoch":1,"seq":1,"beat_ms":0,"base":"0/1","entries":0}"#;

    #[test]
    fn the_format_is_settled() {
        let floor = Lsn::new(0x50).map(EndLsn);
        let write = Some(Nonce { session: 0xab, write: 3 });
        let entered = Some(Nonce { session: 0xab, write: 2 });
        let extra = Extra { whole: 5, news: 6, floor, write, entered };
        let head = extra.add_to(HEAD.as_bytes());
        let wanted = r#""base":"0/1","floor":"0/50","whole":5,"entries":0,"news":6,"write":"00000000000000ab.3","entered":"00000000000000ab.2"}"#;
        assert!(std::str::from_utf8(&head).unwrap().ends_with(wanted), "{}", head.escape_ascii());
        assert_eq!(Extra::of(&head), Extra { write: None, ..extra });
        let plain = Checkpoint::head(&head).expect("the settled format");
        assert_eq!(Checkpoint { floor: None, whole: 0, ..plain }.to_json(), HEAD.as_bytes(), "others ignore the rest");
    }

    #[test]
    fn a_head_without_these_fields_claims_the_least() {
        let least = Extra { whole: FIRST_WHOLE, news: 0, floor: None, write: None, entered: None };
        assert_eq!(Extra::of(HEAD.as_bytes()), least);
        assert_eq!(Extra::of(b"garbage"), least);
    }

    #[test]
    fn bits_are_counted_as_the_server_counts_them() {
        let lane = |number| Lane::new(number).expect("in range");
        let mut bitmap = Bitmap::new(None);
        bitmap.announce(lane(0));
        bitmap.list(lane(9));
        bitmap.list(lane(16_383));
        let bytes = bitmap.to_bytes();
        assert_eq!((bytes.len(), bytes[1], bytes[2047]), (4096, 0b0100_0000, 1));
        assert_eq!((bytes[2048], bytes[2049], bytes[4095]), (0x80, 0b0100_0000, 1));
        assert!(!bitmap.lists(lane(0)) && bitmap.announces(lane(0)));
        assert!(bitmap.lists(lane(9)) && bitmap.announces(lane(9)) && !bitmap.lists(lane(8)));
        assert!(Bitmap::new(Some(&bytes)) == bitmap);
        assert!(Bitmap::new(Some(&bytes[..2048])).lists(lane(9)));
    }
}
