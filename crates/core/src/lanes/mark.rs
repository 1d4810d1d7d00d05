//! A lane's mark: the string that says what the lane holds. It lies in the lane's own hash slot, so it moves with the
//! rows, and is rolled back with them.
//!
//! The format is stable. A mark of another version, or one that is not exactly as this module writes it, is an error:
//! nothing is then known about the lane.

use crate::checkpoint::Place;
use crate::lsn::{EndLsn, Lsn};
use bytes::Bytes;
use std::fmt;
use std::str::FromStr;

/// Makes each mark, and each head of the record, different from every other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Nonce {
    /// Drawn at random when the session begins.
    pub session: u64,
    /// The number of the write in its session.
    pub write: u64,
}

impl fmt::Display for Nonce {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}.{}", self.session, self.write)
    }
}

impl FromStr for Nonce {
    type Err = BadMark;

    fn from_str(text: &str) -> Result<Self, BadMark> {
        let parse = || {
            let (session, write) = text.split_once('.')?;
            Some(Nonce { session: u64::from_str_radix(session, 16).ok()?, write: write.parse().ok()? })
        };
        parse().ok_or(BadMark::Malformed)
    }
}

/// Bytes of a node's id that a mark keeps.
const HOME_BYTES: usize = 16;

/// The node on which a lane lies, or one that was its master or replica and stands for both: the first 16 characters of
/// its id.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Home {
    /// Shorter ids are followed by zero bytes.
    id: [u8; HOME_BYTES],
}

impl Home {
    /// `None` if this is not the id of a node.
    pub fn of(node_id: &str) -> Option<Self> {
        let bytes = &node_id.as_bytes()[..node_id.len().min(HOME_BYTES)];
        let mut id = [0; HOME_BYTES];
        id[..bytes.len()].copy_from_slice(bytes);
        (!bytes.is_empty() && bytes.iter().all(u8::is_ascii_alphanumeric)).then_some(Home { id })
    }

    fn as_bytes(&self) -> &[u8] {
        let length = self.id.iter().position(|byte| *byte == 0).unwrap_or(HOME_BYTES);
        &self.id[..length]
    }
}

impl fmt::Display for Home {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(std::str::from_utf8(self.as_bytes()).expect("letters and digits"))
    }
}

impl fmt::Debug for Home {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What a lane holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mark {
    /// The lane has every change of its keys up to here.
    pub place: Place,
    /// The last transaction that the writer had applied, or had begun to apply; 0 if it knew of none.
    pub xid: u32,
    /// Where it ends. `None` if the lane has only a part of it.
    pub last: Option<EndLsn>,
    pub nonce: Nonce,
    /// The stamp of the last bad news that the record was known to have. A record with an earlier one was rolled back.
    pub epoch: u64,
    /// The highest position that was known to be confirmed.
    pub floor: Option<EndLsn>,
    /// The lane has everything that a record with this stamp, or an earlier one, claims. 0: it has not.
    pub whole: u64,
    /// The stamp of the last comparison of its lookups with their rows. 0: never since a loss.
    pub swept: u64,
    /// The position of the last write that added to the lookup values that rows of this lane no longer have.
    pub was: Option<EndLsn>,
    /// The node on which it was last known to be complete. `None`: it has not been compared where it is.
    pub home: Option<Home>,
}

const VERSION: &str = "1";

/// Nothing is known about the lane.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadMark {
    #[error("a mark of another version")]
    Version,
    #[error("a malformed mark")]
    Malformed,
}

impl fmt::Display for Mark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(std::str::from_utf8(&self.to_bytes()).expect("letters, digits and spaces"))
    }
}

impl Mark {
    /// `1 AT DONE XID LAST NONCE EPOCH FLOOR WHOLE SWEPT WAS HOME`. Positions and stamps have 16 hexadecimal digits, so that
    /// they compare as text.
    ///
    /// Every call writes two of them, so this does not go through [`fmt`].
    pub fn to_bytes(&self) -> Bytes {
        let position = |lsn: Option<EndLsn>| lsn.map_or(0, |EndLsn(lsn)| lsn.get());
        let Mark { place: Place { at, done }, xid, last, nonce, epoch, floor, whole, swept, was, home } = self;
        let mut out = Text { bytes: [0; LONGEST], len: 0 };
        out.push(VERSION.as_bytes());
        out.hex(b" ", at.get());
        out.decimal(b" ", *done);
        out.decimal(b" ", u64::from(*xid));
        out.hex(b" ", position(*last));
        out.hex(b" ", nonce.session);
        out.decimal(b".", nonce.write);
        for number in [*epoch, position(*floor), *whole, *swept, position(*was)] {
            out.hex(b" ", number);
        }
        out.push(b" ");
        out.push(home.as_ref().map_or(b"-", Home::as_bytes));
        Bytes::copy_from_slice(&out.bytes[..out.len])
    }
}

/// No mark has more bytes.
const LONGEST: usize = 241;

struct Text {
    bytes: [u8; LONGEST],
    len: usize,
}

impl Text {
    fn push(&mut self, bytes: &[u8]) {
        self.bytes[self.len..self.len + bytes.len()].copy_from_slice(bytes);
        self.len += bytes.len();
    }

    fn hex(&mut self, before: &[u8], number: u64) {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        self.push(before);
        let digit = |at: usize| DIGITS[(number >> (60 - 4 * at)) as usize & 0xf];
        self.push(&std::array::from_fn::<u8, 16, _>(digit));
    }

    fn decimal(&mut self, before: &[u8], number: u64) {
        self.push(before);
        self.push(itoa::Buffer::new().format(number).as_bytes());
    }
}

impl FromStr for Mark {
    type Err = BadMark;

    fn from_str(text: &str) -> Result<Self, BadMark> {
        let (version, rest) = text.split_once(' ').ok_or(BadMark::Malformed)?;
        if version != VERSION {
            return Err(BadMark::Version);
        }
        let mark = fields(rest).ok_or(BadMark::Malformed)?;
        // There is one way to write a mark.
        if mark.to_string() == text { Ok(mark) } else { Err(BadMark::Malformed) }
    }
}

fn fields(text: &str) -> Option<Mark> {
    let fields: Vec<&str> = text.split(' ').collect();
    let [at, done, xid, last, nonce, epoch, floor, whole, swept, was, home] = fields[..] else { return None };
    let hex = |digits| u64::from_str_radix(digits, 16).ok();
    let position = |digits| hex(digits).map(|position| Lsn::new(position).map(EndLsn));
    Some(Mark {
        place: Place { at: Lsn::new(hex(at)?)?, done: done.parse().ok()? },
        xid: xid.parse().ok()?,
        last: position(last)?,
        nonce: nonce.parse().ok()?,
        epoch: hex(epoch)?,
        floor: position(floor)?,
        whole: hex(whole)?,
        swept: hex(swept)?,
        was: position(was)?,
        home: if home == "-" { None } else { Some(Home::of(home)?) },
    })
}

impl Mark {
    /// Reads what lies at a mark's key.
    ///
    /// # Errors
    /// If it is not a mark of this version.
    pub fn read(bytes: &[u8]) -> Result<Self, BadMark> {
        std::str::from_utf8(bytes).map_err(|_| BadMark::Malformed)?.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn positions() -> impl Strategy<Value = Lsn> {
        (1..=u64::MAX).prop_map(|n| Lsn::new(n).expect("not zero"))
    }

    fn marks() -> impl Strategy<Value = Mark> {
        let home = prop::option::of("[0-9a-zA-Z]{1,40}".prop_map(|id| Home::of(&id).expect("an id")));
        let places = (positions(), any::<u64>(), any::<u32>(), prop::option::of(positions()));
        let numbers = (any::<u64>(), any::<u64>(), any::<u64>(), any::<u64>(), any::<u64>());
        (places, numbers, prop::option::of(positions()), prop::option::of(positions()), home).prop_map(
            |((at, done, xid, last), (session, write, epoch, whole, swept), floor, was, home)| Mark {
                place: Place { at, done },
                xid,
                last: last.map(EndLsn),
                nonce: Nonce { session, write },
                epoch,
                floor: floor.map(EndLsn),
                whole,
                swept,
                was: was.map(EndLsn),
                home,
            },
        )
    }

    proptest! {
        #[test]
        fn reads_what_it_wrote(mark in marks()) {
            prop_assert_eq!(Mark::read(mark.to_string().as_bytes()), Ok(mark));
        }

        #[test]
        fn any_other_byte_is_another_mark_or_none(mark in marks(), at in any::<prop::sample::Index>(), byte in any::<u8>()) {
            let written = mark.to_string().into_bytes();
            let mut other = written.clone();
            other[at.index(written.len())] = byte;
            if let Ok(read) = Mark::read(&other) {
                prop_assert_eq!(read.to_string().into_bytes(), other.clone());
                prop_assert_eq!(read == mark, other == written);
            }
        }

        #[test]
        fn marks_compare_as_text_by_their_position(one in positions(), two in positions()) {
            let text = |at| Mark { place: Place { at, done: 0 }, ..PLAIN.parse().expect("a mark") }.to_string();
            prop_assert_eq!(text(one).cmp(&text(two)), one.cmp(&two));
        }
    }

    const PLAIN: &str = "1 00000001a2b3c4d5 17 742 00000001a2b3c400 0123456789abcdef.3 0000018c00000001 00000001a2b3c000 \
                         0000018c00000002 0000000000000000 0000000000000000 07c37dfeb235213a";

    #[test]
    fn the_format_is_settled() {
        let mark: Mark = PLAIN.parse().expect("the settled format");
        assert_eq!(mark.to_string(), PLAIN);
        assert_eq!(mark.place.to_string(), "1/A2B3C4D5+17");
        assert_eq!((mark.xid, mark.nonce.write, mark.epoch), (742, 3, 0x18c_0000_0001));
        assert_eq!(mark.last, Lsn::new(0x1_a2b3_c400).map(EndLsn));
        assert_eq!((mark.whole, mark.swept, mark.was), (0x18c_0000_0002, 0, None));
        assert_eq!(mark.home, Home::of("07c37dfeb235213a872192d90877d0cd55635b91"));
    }

    #[test]
    fn anything_else_is_an_error() {
        assert_eq!(PLAIN.replacen('1', "2", 1).parse::<Mark>(), Err(BadMark::Version));
        for (from, to) in [
            (" 17 ", " 017 "),
            (" 17 ", " +17 "),
            (" 17 ", "  17 "),
            ("1a2b3c4d5 ", "1A2B3C4D5 "),
            ("00000001a2b3c4d5 ", "1a2b3c4d5 "),
            ("00000001a2b3c4d5 ", "0000000000000000 "),
            (".3", ""),
            ("07c37dfeb235213a", ""),
            ("07c37dfeb235213a", "07c37dfeb235213a8"),
            ("07c37dfeb235213a", "07c3-dfeb235213a"),
            ("07c37dfeb235213a", "- "),
        ] {
            let other = PLAIN.replacen(from, to, 1);
            assert_ne!(other, PLAIN);
            assert_eq!(other.parse::<Mark>(), Err(BadMark::Malformed), "{other}");
        }
        assert_eq!("".parse::<Mark>(), Err(BadMark::Malformed));
        assert_eq!(Mark::read(b"1 \xff"), Err(BadMark::Malformed));
    }

    #[test]
    fn places_are_in_the_order_of_the_stream() {
        let place = |at, done| Place { at: Lsn::new(at).expect("not zero"), done };
        let stream = [place(5, 0), place(5, 1), place(5, 10), place(6, 0), place(20, 0)];
        assert!(stream.is_sorted());
        assert_eq!(place(5, 10).end().0.get(), 5);
    }
}
