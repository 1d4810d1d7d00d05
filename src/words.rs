//! Counts and lists as people read them.

use std::fmt::Display;

/// `1 row`, `2 rows`.
pub fn counted<T: Display + PartialEq + From<u8>>(count: T, one: &str) -> String {
    let s = if count == T::from(1) { "" } else { "s" };
    format!("{count} {one}{s}")
}

/// How many names a sentence has. Of more, it says how many they are.
pub const MOST_NAMES: usize = 3;

/// At most a few of them, and how many more there are.
pub fn listed(names: &[String]) -> String {
    match names.len().checked_sub(MOST_NAMES) {
        Some(more) if more > 0 => format!("{} and {more} more", names[..MOST_NAMES].join(", ")),
        _ => names.join(", "),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_one_is_singular_and_long_lists_are_counted() {
        let names =
            |count: u8| listed(&(b'a'..b'a' + count).map(|name| char::from(name).to_string()).collect::<Vec<_>>());
        assert_eq!([0, 1, 3, 5].map(names), ["", "a", "a, b, c", "a, b, c and 2 more"]);
        assert_eq!([0_u64, 1, 2].map(|count| counted(count, "row")), ["0 rows", "1 row", "2 rows"]);
    }
}
