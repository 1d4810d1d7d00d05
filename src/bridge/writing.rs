//! The writer, and its operation in progress: at most one at a time.
//!
//! An operation takes the writer and returns it at its end, so that the loop can continue meanwhile. This module must
//! not know what an operation is for, nor what follows from its end. A mistake here makes a session wait for a Redis
//! that is silent, or abandon one that is merely slow.

use super::BridgeError;
use crate::command::Key;
use crate::lanes::Lane;
use crate::lookups::questions::{Answers, Questions};
use crate::resp::batch::{Batch, Limits};
use crate::session::inspect::{Comparison, Differences, Inspection, Probe};
use crate::sink::SinkError;
use crate::sink::any_writer::AnyWriter;
use crate::sink::link::Moved;
use crate::sink::server::ServerInfo;
use crate::sink::writer::Executed;
use bytes::Bytes;
use std::collections::BTreeSet;
use std::pin::Pin;
use std::time::{Duration, Instant};

/// A large batch may take longer: one more second for each of these.
const BYTES_A_SECOND: usize = 8 << 20;

pub struct Writing {
    /// `None` while an operation is in progress.
    writer: Option<AnyWriter>,
    under_way: Option<UnderWay>,
    moved: Moved,
    /// How much had moved, and when that was last seen to increase.
    moved_at: (u64, Instant),
    /// How long Redis may be silent during any operation.
    patience: Duration,
}

struct UnderWay {
    future: Pin<Box<dyn Future<Output = (AnyWriter, Answered)> + Send>>,
    began: Instant,
    patience: Duration,
}

/// An operation that has ended.
pub struct WriterDone {
    pub done: Answered,
    pub took: Duration,
}

pub enum Answered {
    /// Also the number of changes in the batch, and its weight.
    Executed {
        result: Result<Executed, SinkError>,
        changes: u64,
        weight: usize,
    },
    Probed(Result<Vec<Probe>, SinkError>),
    Inspected(Result<Answers, SinkError>),
    /// Keys, and the cursor from which to continue.
    Scanned(Result<(Vec<Key>, u64), SinkError>),
    Compared(Result<Differences, SinkError>),
}

impl Writing {
    /// `patience`: how long Redis may be silent.
    pub fn new(writer: AnyWriter, patience: Duration) -> Self {
        let moved = writer.moved();
        let moved_at = (moved.bytes(), Instant::now());
        Self { writer: Some(writer), under_way: None, moved, moved_at, patience }
    }

    pub fn probe(&mut self, asked: Inspection) -> Result<(), BridgeError> {
        self.begin(0, async move |mut writer| {
            let probed = writer.probe(&asked).await;
            (writer, Answered::Probed(probed))
        })
    }

    pub fn inspect(&mut self, questions: Questions) -> Result<(), BridgeError> {
        self.begin(0, async move |mut writer| {
            let inspected = writer.inspect(&questions).await;
            (writer, Answered::Inspected(inspected))
        })
    }

    pub fn scan(&mut self, prefix: Bytes, cursor: u64, limit: usize, within: Duration) -> Result<(), BridgeError> {
        self.begin(0, async move |mut writer| {
            let scanned = scan(&mut writer, &prefix, cursor, limit, within).await;
            (writer, Answered::Scanned(scanned))
        })
    }

    pub fn compare(&mut self, wanted: Comparison) -> Result<(), BridgeError> {
        self.begin(wanted.rows.resp.len(), async move |mut writer| {
            let compared = writer.compare(&wanted).await;
            (writer, Answered::Compared(compared))
        })
    }

    pub fn execute(&mut self, batch: Batch, checkpoint: Vec<u8>, changes: u64) -> Result<(), BridgeError> {
        self.begin(batch.len_bytes(), async move |mut writer| {
            let result = writer.execute(&batch, &checkpoint).await;
            (writer, Answered::Executed { result, changes, weight: batch.weight() })
        })
    }

    /// See [`AnyWriter::take_moved`].
    pub fn take_moved(&mut self) -> BTreeSet<Lane> {
        self.writer.as_mut().map(AnyWriter::take_moved).unwrap_or_default()
    }

    /// See [`AnyWriter::settles`].
    pub fn settles(&mut self, lanes: &BTreeSet<Lane>) -> Result<(), BridgeError> {
        let writer = self.writer.as_mut().ok_or(BridgeError::Internal("two operations of the writer at once"))?;
        writer.settles(lanes);
        Ok(())
    }

    /// `bytes`: the size of what is sent.
    fn begin<F>(&mut self, bytes: usize, operation: impl FnOnce(AnyWriter) -> F) -> Result<(), BridgeError>
    where
        F: Future<Output = (AnyWriter, Answered)> + Send + 'static,
    {
        let writer = self.writer.take().ok_or(BridgeError::Internal("two operations of the writer at once"))?;
        let began = Instant::now();
        self.moved_at.1 = began;
        let patience = self.patience + Duration::from_secs((bytes / BYTES_A_SECOND) as u64);
        self.under_way = Some(UnderWay { future: Box::pin(operation(writer)), began, patience });
        Ok(())
    }

    /// Waits for the operation in progress to end; forever if there is none. Cancelling it loses nothing.
    pub async fn finished(&mut self) -> WriterDone {
        let Some(operation) = &mut self.under_way else { return std::future::pending().await };
        let (writer, done) = operation.future.as_mut().await;
        let took = operation.began.elapsed();
        self.under_way = None;
        self.writer = Some(writer);
        WriterDone { done, took }
    }

    /// How long no byte has moved during an operation. A large batch on a slow link is not silence.
    pub fn silence(&self) -> Duration {
        self.under_way.as_ref().map_or(Duration::ZERO, |_| self.moved_at.1.elapsed())
    }

    /// # Errors
    /// [`BridgeError::RedisSilent`] if that is longer than the operation may take.
    pub fn check_silence(&mut self) -> Result<(), BridgeError> {
        let moved = self.moved.bytes();
        if moved != self.moved_at.0 {
            self.moved_at = (moved, Instant::now());
        }
        let silence = self.silence();
        match &self.under_way {
            Some(operation) if silence > operation.patience => Err(BridgeError::RedisSilent(silence)),
            Some(_) | None => Ok(()),
        }
    }

    /// `None` while an operation is in progress.
    pub fn server(&self) -> Option<&ServerInfo> {
        self.writer.as_ref().map(AnyWriter::server)
    }

    /// `None` while an operation is in progress.
    pub fn limits(&self) -> Option<Limits> {
        self.writer.as_ref().map(AnyWriter::limits)
    }
}

/// Returns keys under a prefix, and the next cursor. SCAN visits every key in Redis, including those of other
/// applications, so it returns after some time whatever it has found.
async fn scan(
    writer: &mut AnyWriter,
    prefix: &[u8],
    mut cursor: u64,
    limit: usize,
    within: Duration,
) -> Result<(Vec<Key>, u64), SinkError> {
    let (mut keys, began) = (Vec::new(), Instant::now());
    loop {
        let page;
        (cursor, page) = writer.scan_page(prefix, cursor).await?;
        keys.extend(page);
        if cursor == 0 || keys.len() >= limit || began.elapsed() >= within {
            return Ok((keys, cursor));
        }
    }
}
