//! A digest of all inputs and effects of the sessions of one schedule. Running a schedule twice must produce the same
//! digest.

use super::coverage::{Coverage, Kinds};
use crate::admin::{Answer, Operation, Refusal};
use crate::command::{EncodedRows, Key};
use crate::session::inspect::{Comparison, Differences};
use crate::session::load_messages::{Content, FromLoad, LoadOrder};
use crate::session::{Effect, Input};
use std::collections::{BTreeSet, HashSet};
use std::fmt::{self, Write as _};
use std::hash::{DefaultHasher, Hasher as _};

pub struct Log {
    digest: Digest,
    pub coverage: Coverage,
}

/// [`DefaultHasher::new`] has no random keys. `None`: nothing is written.
struct Digest(Option<DefaultHasher>);

impl fmt::Write for Digest {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.bytes(text.as_bytes());
        Ok(())
    }
}

impl Digest {
    fn bytes(&mut self, bytes: &[u8]) {
        self.0.iter_mut().for_each(|hasher| hasher.write(bytes));
    }

    fn debug(&mut self, what: &impl fmt::Debug) {
        if self.0.is_none() {
            return;
        }
        write!(self, "{what:?};").expect("hashing cannot fail");
    }

    /// The iteration order of a set differs from run to run.
    fn set(&mut self, keys: &HashSet<Key>) {
        if self.0.is_none() {
            return;
        }
        self.debug(&keys.iter().collect::<BTreeSet<_>>());
    }

    fn rows(&mut self, rows: &EncodedRows) {
        self.bytes(&rows.resp);
        self.debug(&rows.rows);
    }

    fn content(&mut self, content: &Content) {
        match content {
            Content::Rows(parts) => parts.iter().for_each(|rows| self.rows(rows)),
            Content::Keys { asked, found, unread, checks, mapped_as } => {
                self.rows(found);
                self.debug(&(asked, unread, checks, mapped_as));
            }
            Content::Orphans { asked, exist } => {
                self.debug(asked);
                self.set(exist);
            }
        }
    }
}

impl Log {
    pub fn new(digested: bool) -> Self {
        Log { digest: Digest(digested.then(DefaultHasher::new)), coverage: Coverage::default() }
    }

    /// Returns 0 if nothing was written into it.
    pub fn digest(&self) -> u64 {
        self.digest.0.as_ref().map_or(0, DefaultHasher::finish)
    }

    pub(super) fn saw<T: Kinds + fmt::Debug>(&mut self, what: &T) {
        self.coverage.saw(what);
        self.digest.debug(what);
    }

    pub fn input(&mut self, input: &Input) {
        self.coverage.saw(input);
        match input {
            Input::Load(message) => self.load_says(message),
            Input::Compared(Differences { missing, stale, present }) => {
                [missing, stale, present].into_iter().for_each(|keys| self.digest.set(keys));
            }
            Input::Probed(probes) => probes.iter().for_each(|probe| self.saw(probe)),
            Input::Catalog(table, seen) => {
                self.digest.debug(table);
                self.saw(seen);
            }
            Input::Asked(ask, operation) => self.asked(ask, operation),
            _ => self.digest.debug(input),
        }
    }

    fn asked(&mut self, ask: &impl fmt::Debug, operation: &Operation) {
        self.digest.debug(ask);
        self.saw(operation);
    }

    fn load_says(&mut self, message: &FromLoad) {
        self.coverage.saw(message);
        match message {
            FromLoad::Chunk(chunk) => {
                self.coverage.saw(&chunk.content);
                self.digest.debug(&(
                    chunk.id,
                    chunk.table,
                    chunk.load,
                    chunk.nonce,
                    &chunk.snapshot,
                    &chunk.unwritable,
                ));
                self.digest.content(&chunk.content);
            }
            FromLoad::Began { table, load, fingerprint, catalog, .. } => {
                self.digest.debug(&(table, load, fingerprint, catalog));
            }
            _ => self.digest.debug(message),
        }
    }

    pub fn effect(&mut self, effect: &Effect) {
        self.coverage.saw(effect);
        match effect {
            Effect::Execute { batch, checkpoint, changes } => {
                self.digest.bytes(batch.body());
                self.digest.bytes(checkpoint);
                self.digest.debug(changes);
            }
            Effect::Compare(Comparison { rows, format: _, left_out, keys }) => {
                self.digest.rows(rows);
                self.digest.set(left_out);
                self.digest.debug(keys);
            }
            Effect::Order(order) => self.order(order),
            Effect::Answer(ask, answer) => self.answer(ask, answer),
            _ => self.digest.debug(effect),
        }
    }

    fn order(&mut self, order: &LoadOrder) {
        self.saw(order);
        match order {
            LoadOrder::Table { purpose, because, .. } => {
                self.coverage.saw(purpose);
                because.heals.iter().for_each(|heal| self.coverage.saw(heal));
            }
            LoadOrder::Verdict(_, verdict) => self.coverage.saw(verdict),
            LoadOrder::Keys(_) | LoadOrder::Abandon(..) => {}
        }
    }

    fn answer(&mut self, ask: &impl fmt::Debug, answer: &Result<Answer, Refusal>) {
        self.digest.debug(ask);
        match answer {
            Ok(answer) => self.saw(answer),
            Err(refusal) => self.saw(refusal),
        }
    }
}
