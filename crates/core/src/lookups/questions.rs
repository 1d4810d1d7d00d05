//! What must be read of rows and lists before members are added or removed, and the answers. Nothing of it is watched: nobody
//! else writes there, and the checkpoint is watched.

use super::{Fields, ListKind, Score};
use crate::command::Key;
use bytes::Bytes;
use std::sync::Arc;

/// Questions of one kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Questions {
    /// The values of these fields of each row.
    Rows(Vec<(Key, Arc<Fields>)>),
    /// Whether each key can have a list of this kind.
    Lists(Vec<(Key, ListKind)>),
    /// Members of each list, from this cursor on.
    Members(Vec<(Key, ListKind, u64)>),
    /// Whether each list has this member, and its score.
    Held(Vec<(Key, ListKind, Bytes)>),
}

/// The answers, in the same order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answers {
    /// `None` is no field. A key that does not exist, or holds something else, has no fields.
    Rows(Vec<Vec<Option<Bytes>>>),
    Lists(Vec<Fits>),
    Members(Vec<Page>),
    Held(Vec<Held>),
}

/// What lies at the key of a list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fits {
    /// Such a list, or nothing.
    Yes,
    /// Something else.
    OtherType,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Page {
    /// Some members with their scores, perhaps twice, and the cursor to continue from, which is 0 at the end.
    Members(Vec<(Bytes, Option<Score>)>, u64),
    OtherType,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Held {
    Yes(Option<Score>),
    No,
    OtherType,
}

impl Questions {
    /// Returns the keys that they are about.
    pub fn keys(&self) -> Box<dyn Iterator<Item = &Key> + '_> {
        match self {
            Questions::Rows(rows) => Box::new(rows.iter().map(|(key, _)| key)),
            Questions::Lists(lists) => Box::new(lists.iter().map(|(key, _)| key)),
            Questions::Members(lists) => Box::new(lists.iter().map(|(key, ..)| key)),
            Questions::Held(members) => Box::new(members.iter().map(|(key, ..)| key)),
        }
    }

    pub fn count(&self) -> usize {
        match self {
            Questions::Rows(rows) => rows.len(),
            Questions::Lists(lists) => lists.len(),
            Questions::Members(lists) => lists.len(),
            Questions::Held(members) => members.len(),
        }
    }
}
