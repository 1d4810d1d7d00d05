//! Rows as JSON with types, as Postgres's `row_to_json` writes them.
//!
//! [`row_type`] describes the columns of a table: small enough to lie next to the checkpoint, where readers find it without
//! asking Postgres. [`json`] writes a row from that description and from the texts of its values. [`document`] writes and
//! patches the rows of tables whose format is JSON, whose types [`known`] has; [`redisjson`] knows what that module makes of them.

pub mod document;
pub mod json;
pub mod known;
pub mod redisjson;
pub mod row_type;

/// What is left of a text that is read from its beginning.
struct Rest<'a>(&'a [u8]);

impl<'a> Rest<'a> {
    /// Skips this ASCII character, if it comes next.
    fn skips(&mut self, byte: u8) -> bool {
        let skips = self.0.first() == Some(&byte);
        if skips {
            self.0 = &self.0[1..];
        }
        skips
    }

    fn next(&mut self) -> Option<u8> {
        let (next, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*next)
    }

    /// Takes everything up to one of these ASCII characters, which stays.
    fn until(&mut self, ends: impl Fn(u8) -> bool) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at(self.0.iter().position(|byte| ends(*byte))?);
        self.0 = rest;
        Some(taken)
    }
}
