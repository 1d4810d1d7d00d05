//! The only writer, whether all keys can be written in one transaction or not.

use super::SinkError;
use super::connect::RedisTarget;
use super::lanes::LaneWriter;
use super::link::Moved;
use super::server::{Lives, Lost, ServerInfo};
use super::writer::{Armed, Executed, Writer};
use crate::command::Key;
use crate::lanes::Lane;
use crate::lanes::book::{Judged, Why};
use crate::lookups::questions::{Answers, Questions};
use crate::lsn::EndLsn;
use crate::resp::batch::{Batch, Limits, OwnKeys};
use crate::session::inspect::{Comparison, Differences, Inspection, Probe};
use std::collections::{BTreeMap, BTreeSet};

/// The only writer: of a single Redis, or of one hash slot, [`Writer`]; of a cluster, [`LaneWriter`].
#[derive(Debug)]
pub enum AnyWriter {
    /// All keys can be written in one transaction.
    One(Box<Writer>),
    /// Each hash slot is written by itself.
    Lanes(Box<LaneWriter>),
}

impl AnyWriter {
    /// `lanes`: the name of the replication slot, if the keys lie in several hash slots of a cluster.
    pub async fn connect(
        target: &RedisTarget,
        own: &OwnKeys,
        lanes: Option<&str>,
    ) -> Result<(AnyWriter, Armed), SinkError> {
        match lanes {
            None => Writer::connect(target, own).await.map(|(writer, armed)| (AnyWriter::One(Box::new(writer)), armed)),
            Some(slot) => {
                let (writer, armed) = LaneWriter::connect(target, own, slot).await?;
                Ok((AnyWriter::Lanes(Box::new(writer)), armed))
            }
        }
    }

    /// See [`Book::judge`](crate::lanes::book::Book::judge). `None` where there are no lanes.
    pub fn judge(&self, confirmed: EndLsn, server: EndLsn) -> Option<Judged> {
        match self {
            AnyWriter::One(_) => None,
            AnyWriter::Lanes(writer) => Some(writer.judge(confirmed, server)),
        }
    }

    /// Nothing that lies in Redis is relied on.
    pub fn disown(&mut self) {
        match self {
            AnyWriter::One(_) => {}
            AnyWriter::Lanes(writer) => writer.disown(),
        }
    }

    /// Returns hash slots that were found on another node than before, each once.
    pub fn take_moved(&mut self) -> BTreeSet<Lane> {
        match self {
            AnyWriter::One(_) => BTreeSet::new(),
            AnyWriter::Lanes(writer) => writer.take_moved(),
        }
    }

    /// These hash slots, which have moved, are complete where they are.
    pub fn settles(&mut self, lanes: &BTreeSet<Lane>) {
        match self {
            AnyWriter::One(_) => {}
            AnyWriter::Lanes(writer) => writer.settles(lanes),
        }
    }

    /// What lies in these hash slots is not relied on.
    pub fn heal(&mut self, lost: &BTreeMap<Lane, Why>) {
        match self {
            AnyWriter::One(_) => {}
            AnyWriter::Lanes(writer) => writer.heal(lost),
        }
    }

    pub fn moved(&self) -> Moved {
        match self {
            AnyWriter::One(writer) => writer.moved(),
            AnyWriter::Lanes(writer) => writer.moved(),
        }
    }

    /// See [`LaneWriter::lives`]. `None` where there are no lanes.
    pub fn lives(&self) -> Option<&Lives> {
        match self {
            AnyWriter::One(_) => None,
            AnyWriter::Lanes(writer) => Some(writer.lives()),
        }
    }

    pub fn server(&self) -> &ServerInfo {
        match self {
            AnyWriter::One(writer) => writer.server(),
            AnyWriter::Lanes(writer) => writer.server(),
        }
    }

    pub fn lost(&self) -> &[Lost] {
        &self.server().lost
    }

    pub fn limits(&self) -> Limits {
        self.server().limits
    }

    /// See [`Writer::trusts_packing`].
    pub async fn trusts_packing(&mut self) -> Result<bool, SinkError> {
        match self {
            AnyWriter::One(writer) => writer.trusts_packing().await,
            AnyWriter::Lanes(writer) => writer.trusts_packing().await,
        }
    }

    pub async fn execute(&mut self, batch: &Batch, checkpoint: &[u8]) -> Result<Executed, SinkError> {
        match self {
            AnyWriter::One(writer) => writer.execute(batch, checkpoint).await,
            AnyWriter::Lanes(writer) => writer.execute(batch, checkpoint).await,
        }
    }

    /// See [`Writer::remove`] and [`LaneWriter::remove`].
    pub async fn remove(&mut self, keys: &[Key]) -> Result<u64, SinkError> {
        match self {
            AnyWriter::One(writer) => writer.remove(keys).await,
            AnyWriter::Lanes(writer) => writer.remove(keys).await,
        }
    }

    /// Returns the keys of prefetchd's own that do not lie under its prefix.
    pub fn marks(&self) -> Vec<Key> {
        match self {
            AnyWriter::One(_) => Vec::new(),
            AnyWriter::Lanes(writer) => writer.marks(),
        }
    }

    pub fn target(&self) -> &RedisTarget {
        match self {
            AnyWriter::One(writer) => writer.target(),
            AnyWriter::Lanes(writer) => writer.target(),
        }
    }

    pub async fn probe(&mut self, asked: &Inspection) -> Result<Vec<Probe>, SinkError> {
        match self {
            AnyWriter::One(writer) => writer.probe(asked).await,
            AnyWriter::Lanes(writer) => writer.probe(asked).await,
        }
    }

    pub async fn inspect(&mut self, questions: &Questions) -> Result<Answers, SinkError> {
        match self {
            AnyWriter::One(writer) => writer.inspect(questions).await,
            AnyWriter::Lanes(writer) => writer.inspect(questions).await,
        }
    }

    pub async fn compare(&mut self, wanted: &Comparison) -> Result<Differences, SinkError> {
        match self {
            AnyWriter::One(writer) => writer.compare(wanted).await,
            AnyWriter::Lanes(writer) => writer.compare(wanted).await,
        }
    }

    pub async fn scan_page(&mut self, prefix: &[u8], cursor: u64) -> Result<(u64, Vec<Key>), SinkError> {
        match self {
            AnyWriter::One(writer) => writer.scan_page(prefix, cursor).await,
            AnyWriter::Lanes(writer) => writer.scan_page(prefix, cursor).await,
        }
    }
}
