//! A place in a list as text: what an answer gives as `next`, and a request takes as `after`.
//!
//! It needs no escaping in a URL. A client must not rely on what it says.

use crate::lookups::Score;
use crate::sink::list_reader::{Element, Place};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;

/// No list is as long. Redis takes ranks up to 2^63.
const HIGHEST_RANK: u64 = 1 << 62;

/// `7:12.5:cat-001`; in a set, `7::cat-001`.
pub(super) fn write(Place { rank, element: Element { score, member } }: &Place) -> String {
    let score = score.map(|score| score.to_string()).unwrap_or_default();
    URL_SAFE_NO_PAD.encode([format!("{rank}:{score}:").as_bytes(), member].concat())
}

/// Returns `None` if the text is no place in such a list.
pub(super) fn read(text: &str, is_sorted: bool) -> Option<Place> {
    let bytes = URL_SAFE_NO_PAD.decode(text).ok()?;
    let mut parts = bytes.splitn(3, |byte| *byte == b':');
    let (rank, score, member) = (parts.next()?, parts.next()?, parts.next()?);
    let rank = std::str::from_utf8(rank).ok()?.parse().ok().filter(|rank| *rank <= HIGHEST_RANK)?;
    let score = match (is_sorted, score) {
        (false, []) => None,
        (false, _) => return None,
        (true, score) => Some(Score::read(score)?),
    };
    Some(Place { rank, element: Element { score, member: Bytes::copy_from_slice(member) } })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn ranks_that_no_list_has_are_refused() {
        let text = |rank: u64| URL_SAFE_NO_PAD.encode(format!("{rank}:1:a"));
        assert!(read(&text(HIGHEST_RANK), true).is_some());
        assert_eq!([HIGHEST_RANK + 1, u64::MAX].map(|rank| read(&text(rank), true)), [None, None]);
    }

    proptest! {
        #[test]
        fn every_place_comes_back(rank in 0..=HIGHEST_RANK, number in proptest::option::of(proptest::num::f64::ANY), member in proptest::collection::vec(any::<u8>(), 0..40)) {
            let score = number.and_then(|number| Score::read(number.to_string().as_bytes()));
            let place = Place { rank, element: Element { score, member: member.into() } };
            let text = write(&place);
            prop_assert!(text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_'));
            prop_assert_eq!(read(&text, score.is_some()), Some(place));
            prop_assert_eq!(read(&text, score.is_none()), None);
        }

        #[test]
        fn no_text_breaks_the_reader(text in ".{0,60}") {
            let _ = read(&text, true);
            let _ = read(&text, false);
        }
    }
}
