//! Counts as people read them.

use std::fmt::Display;

/// `1 row`, `2 rows`.
pub fn counted<T: Display + PartialEq + From<u8>>(count: T, one: &str) -> String {
    let s = if count == T::from(1) { "" } else { "s" };
    format!("{count} {one}{s}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_one_is_singular() {
        assert_eq!([0_u64, 1, 2].map(|count| counted(count, "row")), ["0 rows", "1 row", "2 rows"]);
    }
}
