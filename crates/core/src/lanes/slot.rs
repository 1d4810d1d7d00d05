//! The hash slot of a key, as the Redis Cluster specification computes it. If this were wrong, commands would be sent to
//! a node that refuses them, and rows would be written under the mark of another lane.
//!
//! <https://redis.io/docs/latest/operate/oss_and_stack/reference/cluster-spec/#key-distribution-model>

use crc::{CRC_16_XMODEM, Crc, Table};
use std::fmt;

/// The number of hash slots in every cluster.
const SLOTS: u16 = 16_384;

static CRC: Crc<u16, Table<16>> = Crc::<u16, Table<16>>::new(&CRC_16_XMODEM);

/// A hash slot of Redis Cluster: 0 to 16,383.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lane(u16);

impl Lane {
    /// How many lanes there are.
    pub const ALL: u16 = SLOTS;

    /// Returns `None` if there is no such hash slot.
    pub const fn new(number: u16) -> Option<Self> {
        if number < SLOTS { Some(Self(number)) } else { None }
    }

    /// All lanes, in ascending order.
    pub fn every() -> impl Iterator<Item = Self> {
        (0..SLOTS).map(Self)
    }

    /// Returns the hash slot of a key.
    pub fn of(key: &[u8]) -> Self {
        Self(CRC.checksum(hash_tag(key).unwrap_or(key)) % SLOTS)
    }

    pub const fn number(self) -> u16 {
        self.0
    }
}

impl fmt::Display for Lane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Returns what lies between the first `{` and the first `}` after it: keys with the same hash tag have the same hash slot.
/// `None` if there is none or it is empty; the hash slot is then that of the whole key.
pub fn hash_tag(key: &[u8]) -> Option<&[u8]> {
    let after = &key[memchr::memchr(b'{', key)? + 1..];
    let length = memchr::memchr(b'}', after)?;
    (length > 0).then(|| &after[..length])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hash_slots_are_those_of_the_server() {
        // As CLUSTER KEYSLOT of Redis 7.0 answers.
        let slots: [(&[u8], u16); 13] = [
            (b"", 0),
            (b"123456789", 12739),
            (b"foo", 12182),
            (b"{user1000}.following", 3443),
            (b"{user1000}.followers", 3443),
            (b"foo{}{bar}", 8363),
            (b"foo{{bar}}zap", 4015),
            (b"foo{bar}{zap}", 5061),
            (b"foo{bar", 15278),
            (b"foo}bar{", 11073),
            (b"a}b{c}d", 7365),
            (b"prefetchd:{prefetchd}:checkpoint", 4768),
            (b"\xc3\xa4\x00\xff", 6100),
        ];
        for (key, slot) in slots {
            assert_eq!(Lane::of(key).number(), slot, "{}", key.escape_ascii());
        }
    }

    #[test]
    fn there_are_16384_lanes() {
        assert_eq!(Lane::new(16_383).map(Lane::number), Some(16_383));
        assert_eq!(Lane::new(Lane::ALL), None);
    }
}
