//! Chunks on their way to Redis: each waits until the stream has delivered its watermark, and then for its turn.

use super::load_messages::{Chunk, ChunkId, Content};
use crate::change::Nonce;
use crate::command::{self, DeadLetter, EncodedRows};
use std::collections::{BTreeSet, HashMap, VecDeque};

/// How many chunks may wait here for their turn; more wait in the loader's channel.
const CHUNKS_HELD: usize = 4;
/// How many watermarks may arrive before their chunks. Foreign ones are among them, and are forgotten first.
const MARKS_HELD: usize = 1_024;
/// Bytes for the names, position and table of a dead letter.
const LETTER_BYTES: usize = 512;
const LETTER_FIELDS: usize = 6;

pub(super) fn weight_of_letter(letter: &DeadLetter) -> usize {
    let bytes = letter.key.len() + letter.reason.len() + letter.row.len();
    command::weight(bytes + LETTER_BYTES, 1, LETTER_FIELDS)
}

#[derive(Default)]
pub(super) struct Chunks {
    /// Chunks whose watermark has not been delivered.
    waiting: HashMap<Nonce, Chunk>,
    /// Delivered watermarks whose chunk has not arrived.
    marks: VecDeque<Nonce>,
    ready: VecDeque<Ready>,
}

/// A chunk whose watermark has been delivered.
pub(super) struct Ready {
    pub chunk: Chunk,
    /// The index of its next part.
    pub part: usize,
    /// How many batches must be acknowledged before it is judged, because a comparison is about what Redis has, not
    /// about what is in flight.
    behind: u64,
    /// The next part is too large to be written together with changes of the stream. It is written before further
    /// changes, once `behind` is reached, so that Redis has what its snapshot saw.
    alone: bool,
}

impl Ready {
    pub fn is_last_part(&self) -> bool {
        !matches!(&self.chunk.content, Content::Rows(parts) if self.part + 1 < parts.len())
    }

    /// The weight of its next part.
    fn weight(&self) -> usize {
        let rows = match &self.chunk.content {
            Content::Rows(parts) => parts.get(self.part).map_or(0, EncodedRows::weight),
            Content::Keys { found, .. } => found.weight(),
            Content::Orphans { .. } => 0,
        };
        let letters = || self.chunk.unwritable.iter().map(|row| weight_of_letter(&row.letter)).sum::<usize>();
        rows + if self.is_last_part() { letters() } else { 0 }
    }
}

impl Chunks {
    pub fn has_room(&self) -> bool {
        self.waiting.len() + self.ready.len() < CHUNKS_HELD
    }

    /// A watermark was delivered. Returns its chunk if that has arrived.
    pub fn marked(&mut self, nonce: Nonce) -> Option<Chunk> {
        let chunk = self.waiting.remove(&nonce);
        if chunk.is_none() {
            self.marks.push_back(nonce);
            if self.marks.len() > MARKS_HELD {
                self.marks.pop_front();
            }
        }
        chunk
    }

    /// A chunk has arrived. Returns it if its watermark has been delivered.
    pub fn arrived(&mut self, chunk: Chunk) -> Option<Chunk> {
        match self.marks.iter().position(|mark| *mark == chunk.nonce) {
            Some(at) => {
                self.marks.remove(at);
                Some(chunk)
            }
            None => {
                self.waiting.insert(chunk.nonce, chunk);
                None
            }
        }
    }

    /// `behind` is the number of batches that must be acknowledged before it is judged.
    pub fn is_ready(&mut self, chunk: Chunk, behind: u64) {
        self.ready.push_back(Ready { chunk, part: 0, behind, alone: false });
    }

    /// `done` is the number of acknowledged batches.
    pub fn has_ready(&self, done: u64) -> bool {
        self.ready.front().is_some_and(|ready| ready.behind <= done)
    }

    pub fn is_any_ready(&self) -> bool {
        !self.ready.is_empty()
    }

    pub fn take_ready(&mut self) -> Option<Ready> {
        self.ready.pop_front()
    }

    /// Its next part is written with a later batch.
    pub fn put_back(&mut self, ready: Ready) {
        self.ready.push_front(Ready { part: ready.part + 1, alone: false, ..ready });
    }

    /// Returns the weight of the next part.
    pub fn next_weight(&self) -> Option<usize> {
        self.ready.front().map(Ready::weight)
    }

    /// The next part is written alone, once `behind` batches are acknowledged.
    pub fn put_off(&mut self, behind: u64) {
        if let Some(ready) = self.ready.front_mut() {
            (ready.behind, ready.alone) = (behind, true);
        }
    }

    pub fn goes_alone(&self) -> bool {
        self.ready.front().is_some_and(|ready| ready.alone)
    }

    /// Drops these chunks. Returns them in a fixed order, because the same inputs must have the same effects.
    pub fn give_up(&mut self, stale: impl Fn(&Chunk) -> bool) -> BTreeSet<ChunkId> {
        let all = self.waiting.values().chain(self.ready.iter().map(|ready| &ready.chunk));
        let given_up = all.filter(|chunk| stale(chunk)).map(|chunk| chunk.id).collect();
        self.waiting.retain(|_, chunk| !stale(chunk));
        self.ready.retain(|ready| !stale(&ready.chunk));
        given_up
    }

    pub fn clear(&mut self) {
        self.waiting.clear();
        self.ready.clear();
    }
}
