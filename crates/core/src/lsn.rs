//! Positions in the write-ahead log, as types that cannot be confused.
//!
//! An unknown position is `Option<Lsn>`; there is no zero LSN. The newtypes do not convert into each other: what was
//! received is not yet applied, and only [`crate::progress::ledger`] can say what is confirmed.

use std::fmt;
use std::num::NonZeroU64;
use std::str::FromStr;

/// A byte position in the WAL, printed as Postgres prints `pg_lsn`: two hexadecimal halves, `X/X`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lsn(NonZeroU64);

/// Size of a WAL page in every packaged Postgres (`XLOG_BLCKSZ`).
const WAL_PAGE_BYTES: u64 = 8192;
/// `SizeOfXLogShortPHD`: the header of every WAL page but a segment's first.
const SHORT_PAGE_HEADER_BYTES: u64 = 24;
/// `SizeOfXLogLongPHD`: the header of a segment's first page.
const LONG_PAGE_HEADER_BYTES: u64 = 40;

impl Lsn {
    /// The lowest position.
    pub const FIRST: Self = Self(NonZeroU64::MIN);

    /// `None` for 0, Postgres's "invalid LSN".
    pub const fn new(position: u64) -> Option<Self> {
        match NonZeroU64::new(position) {
            Some(n) => Some(Self(n)),
            None => None,
        }
    }

    pub const fn get(self) -> u64 {
        self.0.get()
    }

    /// This position, moved back before a page header if nothing follows that header yet.
    ///
    /// At a page boundary, `pg_current_wal_insert_lsn()` returns the position after the header of a page that holds no
    /// record yet. The walsender's position stays before that header, so an idle database would never appear to reach
    /// it.
    pub fn before_page_header(self, wal_segment_bytes: u64) -> Self {
        let at = self.get();
        let header = match wal_segment_bytes {
            0 => SHORT_PAGE_HEADER_BYTES,
            segment if (at % segment) / WAL_PAGE_BYTES == 0 => LONG_PAGE_HEADER_BYTES,
            _ => SHORT_PAGE_HEADER_BYTES,
        };
        if at % WAL_PAGE_BYTES == header { Self::new(at - header).unwrap_or(self) } else { self }
    }

    /// Bytes of WAL between `earlier` and this position; 0 if `earlier` is not earlier.
    pub fn bytes_since(self, earlier: Self) -> u64 {
        self.get().saturating_sub(earlier.get())
    }
}

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:X}/{:X}", self.get() >> 32, self.get() & 0xffff_ffff)
    }
}

impl fmt::Debug for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A text that is not an LSN.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not an LSN: expected X/X, 1 to 8 hexadecimal digits each, not 0/0")]
pub struct NotAnLsn(pub String);

impl FromStr for Lsn {
    type Err = NotAnLsn;

    fn from_str(s: &str) -> Result<Self, NotAnLsn> {
        let half = |h: &str| -> Option<u64> {
            let digits = (1..=8).contains(&h.len()) && h.bytes().all(|b| b.is_ascii_hexdigit());
            digits.then(|| u64::from_str_radix(h, 16).ok()).flatten()
        };
        s.split_once('/')
            .and_then(|(hi, lo)| Self::new((half(hi)? << 32) | half(lo)?))
            .ok_or_else(|| NotAnLsn(s.to_owned()))
    }
}

macro_rules! position {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }
    };
}

position! {
    /// The start of a commit record. Orders transactions. Resuming here sends the transaction again.
    CommitLsn(Lsn)
}
position! {
    /// A position that no transaction spans: the end of a commit record, or the walsender's position between two
    /// transactions. Resuming here does not send transactions that ended at or before it.
    EndLsn(Lsn)
}
position! {
    /// This session's stream has delivered everything before it.
    ReceivedLsn(EndLsn)
}
position! {
    /// Redis has everything before it: the `lsn` of an acknowledged checkpoint.
    AppliedLsn(EndLsn)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lsn(s: &str) -> Lsn {
        s.parse().expect("a literal LSN")
    }

    #[test]
    fn compares_as_a_number_and_not_as_text() {
        assert!(lsn("FF/0") < lsn("100/0"));
        assert!(lsn("0/9") < lsn("0/10"));
    }

    #[test]
    fn prints_what_it_parsed() {
        for s in ["0/1", "16/B374D848", "FFFFFFFF/FFFFFFFF", "1/0"] {
            assert_eq!(lsn(s).to_string(), s);
            assert_eq!(format!("{:?}", lsn(s)), s);
        }
        assert_eq!(lsn("0/00000abc").to_string(), "0/ABC");
    }

    #[test]
    fn refuses_everything_else() {
        for s in [
            "",
            "0",
            "/",
            "0/",
            "/0",
            "0/0",
            "0/123456789",
            "123456789/0",
            "0x1/0",
            "+1/0",
            "-1/1",
            " 1/1",
            "1/1 ",
            "G/1",
            "1/1/1",
            "1\u{0661}/1",
        ] {
            assert!(s.parse::<Lsn>().is_err(), "{s:?}");
        }
    }

    #[test]
    fn an_empty_page_counts_as_its_beginning() {
        const SEGMENT: u64 = 16 << 20;
        let at = |n| Lsn::new(n).expect("not zero").before_page_header(SEGMENT).get();
        assert_eq!(at(SEGMENT + 8192 + 24), SEGMENT + 8192);
        assert_eq!(at(SEGMENT + 40), SEGMENT);
        assert_eq!(at(SEGMENT + 24), SEGMENT + 24, "inside a long header, never a position");
        assert_eq!(at(SEGMENT + 8192 + 40), SEGMENT + 8192 + 40, "a record may end 16 bytes into a page");
        assert_eq!(at((1 << 20) + 40), (1 << 20) + 40, "a megabyte boundary is no segment boundary");
    }
}
