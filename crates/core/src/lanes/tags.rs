//! For each lane a short text that hashes to it: the hash tag in the name of the lane's mark.
//!
//! Every version must find the marks that another has written, so the table never changes.

use super::Lane;
use crate::command::Key;
use bytes::Bytes;
use std::sync::LazyLock;

/// In the order in which tags are tried.
const DIGITS: &[u8; 36] = b"0123456789abcdefghijklmnopqrstuvwxyz";
/// Every lane has a tag of this length or less.
const LONGEST: usize = 4;

/// Tags of fewer than [`LONGEST`] characters are followed by zero bytes.
static TAGS: LazyLock<Vec<[u8; LONGEST]>> = LazyLock::new(|| {
    let mut tags = vec![[0; LONGEST]; usize::from(Lane::ALL)];
    let mut missing = tags.len();
    for length in 1..=LONGEST {
        for mut n in 0..DIGITS.len().pow(u32::try_from(length).expect("a few characters")) {
            let mut tag = [0; LONGEST];
            for digit in tag[..length].iter_mut().rev() {
                *digit = DIGITS[n % DIGITS.len()];
                n /= DIGITS.len();
            }
            let place = &mut tags[usize::from(Lane::of(&tag[..length]).number())];
            if *place == [0; LONGEST] {
                *place = tag;
                missing -= 1;
                if missing == 0 {
                    return tags;
                }
            }
        }
    }
    panic!("every lane has a tag of {LONGEST} characters");
});

/// Returns the first text of digits and lower-case letters, shorter ones first, that hashes to this lane.
pub fn tag(lane: Lane) -> &'static str {
    let tag = &TAGS[usize::from(lane.number())];
    let length = tag.iter().position(|byte| *byte == 0).unwrap_or(LONGEST);
    std::str::from_utf8(&tag[..length]).expect("digits and letters")
}

/// Returns the key of a lane's mark. `slot` is the name of the replication slot.
pub fn mark_key(lane: Lane, slot: &str) -> Key {
    Key(Bytes::from(["prefetchd:{", tag(lane), "}:", slot, ":mark"].concat()))
}

/// Returns the pattern of the keys of all marks, as Redis understands it.
pub fn every_mark(slot: &str) -> String {
    format!("prefetchd:{{*}}:{slot}:*")
}

/// Returns a key of the lane that is written to find out how far the writes before it have come.
pub fn fence_key(lane: Lane, slot: &str) -> Key {
    Key(Bytes::from(format!("prefetchd:{{{}}}:{slot}:fence", tag(lane))))
}

/// Returns a key of the lane that never exists.
pub fn unused_key(lane: Lane, slot: &str) -> Key {
    Key(Bytes::from(format!("prefetchd:{{{}}}:{slot}:unused", tag(lane))))
}

/// Returns a key of the lane for a row that is written to find out whether it is read as it was meant, and removed.
pub fn sample_key(lane: Lane, slot: &str) -> Key {
    Key(Bytes::from(format!("prefetchd:{{{}}}:{slot}:sample", tag(lane))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tag_hashes_to_its_lane() {
        for lane in Lane::every() {
            assert_eq!(Lane::of(tag(lane).as_bytes()), lane);
            assert_eq!(Lane::of(mark_key(lane, "a{b}c").as_bytes()), lane);
        }
    }

    #[test]
    fn the_table_never_changes() {
        let of = |number| tag(Lane::new(number).expect("in range"));
        assert_eq!([of(0), of(1), of(4768), of(12_739), of(16_383)], ["1bz", "emj", "hct", "za2", "hia"]);
        let all: Vec<&str> = Lane::every().map(tag).collect();
        let checksum = crc::Crc::<u32>::new(&crc::CRC_32_ISO_HDLC).checksum(all.join(",").as_bytes());
        assert_eq!(checksum, 0xf050_f722);
    }
}
