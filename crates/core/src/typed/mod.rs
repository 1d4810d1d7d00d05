//! Rows as JSON with types, as Postgres's `row_to_json` writes them.
//!
//! [`row_type`] describes the columns of a table: small enough to lie next to the checkpoint, where readers find it without
//! asking Postgres. [`json`] writes a row from that description and from the texts that lie in Redis.

pub mod json;
pub mod row_type;

/// What is left of a text that is read from its beginning.
struct Rest<'a>(&'a str);

impl<'a> Rest<'a> {
    /// Skips this ASCII character, if it comes next.
    fn skips(&mut self, byte: u8) -> bool {
        let skips = self.0.as_bytes().first() == Some(&byte);
        if skips {
            self.0 = &self.0[1..];
        }
        skips
    }

    fn next(&mut self) -> Option<char> {
        let mut chars = self.0.chars();
        let next = chars.next()?;
        self.0 = chars.as_str();
        Some(next)
    }

    /// Takes everything up to one of these ASCII characters, which stays.
    fn until(&mut self, ends: impl Fn(u8) -> bool) -> Option<&'a str> {
        let (taken, rest) = self.0.split_at(self.0.bytes().position(ends)?);
        self.0 = rest;
        Some(taken)
    }
}
