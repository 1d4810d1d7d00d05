//! Answers questions about lookups and their rows, in pages whose replies are bounded, on one server or over hash slots.

use super::answers::inspected;
use super::replies::Reply;
use super::{Class, SinkError};
use crate::command::Key;
use crate::format::Format;
use crate::lookups::Fields;
use crate::lookups::questions::{Answers, Questions};
use std::iter::Peekable;
use std::sync::Arc;
use std::vec;

/// Rows that are read at once: enough for one round trip in most batches.
const INSPECTED_PAGE: usize = 500;
/// The same of documents, of which only some fields are kept. A longer one comes by itself.
const INSPECTED_BYTES: usize = 16 << 20;

/// A writer that is asked.
pub(super) trait Inspects {
    /// Returns the replies to questions, in order.
    async fn ask_questions(&mut self, questions: &Questions) -> Result<Vec<Reply>, SinkError>;

    /// Returns the replies to STRLEN of these keys.
    async fn ask_lengths(&mut self, keys: &[&Key]) -> Result<Vec<Reply>, SinkError>;
}

/// Answers questions about lookups and their rows.
pub(super) async fn inspect(writer: &mut impl Inspects, questions: &Questions) -> Result<Answers, SinkError> {
    let Questions::Rows(rows) = questions else { return answers(writer, questions).await };
    let mut values = Vec::with_capacity(rows.len());
    for mut page in rows.chunks(INSPECTED_PAGE) {
        let mut lengths = lengths_of_documents(writer, page).await?.into_iter().peekable();
        while !page.is_empty() {
            let (some, rest) = page.split_at(fitting(&mut lengths, page.len()));
            match answers(writer, &Questions::Rows(some.to_vec())).await? {
                Answers::Rows(some) => values.extend(some),
                other => unreachable!("the answers about rows are {other:?}"),
            }
            page = rest;
        }
    }
    Ok(Answers::Rows(values))
}

async fn answers(writer: &mut impl Inspects, questions: &Questions) -> Result<Answers, SinkError> {
    let replies = writer.ask_questions(questions).await?;
    inspected(questions, replies)
}

/// Returns the lengths of those rows that are read as a whole; 0 for others. Where STRLEN is denied, each is taken for a
/// long one.
async fn lengths_of_documents(
    writer: &mut impl Inspects,
    rows: &[(Key, Arc<Fields>)],
) -> Result<Vec<usize>, SinkError> {
    let is_document = |fields: &Fields| fields.format != Format::Hash;
    let documents: Vec<&Key> = rows.iter().filter(|(_, fields)| is_document(fields)).map(|(key, _)| key).collect();
    let replies = if documents.is_empty() { Vec::new() } else { writer.ask_lengths(&documents).await? };
    let mut replies = replies.into_iter();
    let mut length = || match replies.next() {
        Some(Reply::Integer(length)) => usize::try_from(length).unwrap_or(INSPECTED_BYTES),
        // Another type, which GET does not return, either.
        Some(Reply::Error(reply)) if reply.class() == Class::WrongType => 0,
        _ => INSPECTED_BYTES,
    };
    Ok(rows.iter().map(|(_, fields)| if is_document(fields) { length() } else { 0 }).collect())
}

/// Takes the lengths of documents that are read at once; returns how many. At least one of `count`.
fn fitting(lengths: &mut Peekable<vec::IntoIter<usize>>, count: usize) -> usize {
    let (mut room, mut fit) = (INSPECTED_BYTES, 0);
    while fit < count
        && let Some(length) = lengths.next_if(|length| fit == 0 || *length <= room)
    {
        room = room.saturating_sub(length);
        fit += 1;
    }
    fit
}
