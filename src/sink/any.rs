//! The writer and the readers, whether all keys can be written in one transaction or not.

use super::connect::RedisTarget;
use super::lane_reader::LaneReader;
use super::lanes::LaneWriter;
use super::link::Moved;
use super::reader::{Read, Reader, RunId};
use super::server::{Lost, ServerInfo};
use super::writer::{Armed, Executed, Writer};
use super::{SinkError, Stored};
use crate::command::{DeadKey, Key};
use crate::lanes::book::Judged;
use crate::lsn::EndLsn;
use crate::resp::batch::{Batch, Limits, OwnKeys};
use crate::session::inspect::{Comparison, Differences, Probe};

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

    pub fn moved(&self) -> Moved {
        match self {
            AnyWriter::One(writer) => writer.moved(),
            AnyWriter::Lanes(writer) => writer.moved(),
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

    pub async fn execute(&mut self, batch: &Batch, checkpoint: &[u8]) -> Result<Executed, SinkError> {
        match self {
            AnyWriter::One(writer) => writer.execute(batch, checkpoint).await,
            AnyWriter::Lanes(writer) => writer.execute(batch, checkpoint).await,
        }
    }

    pub async fn probe(&mut self, keys: &[Key]) -> Result<Vec<Probe>, SinkError> {
        match self {
            AnyWriter::One(writer) => writer.probe(keys).await,
            AnyWriter::Lanes(writer) => writer.probe(keys).await,
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

/// The connections for reads: to one server, [`Reader`]; to all masters of a cluster, [`LaneReader`].
#[derive(Debug, Clone)]
pub enum AnyReader {
    One(Reader),
    Lanes(LaneReader),
}

impl AnyReader {
    /// Opens no connection yet. `lanes` as for [`AnyWriter::connect`].
    pub fn connect_lazy(target: &RedisTarget, own: &OwnKeys, lanes: Option<&str>) -> AnyReader {
        match lanes {
            None => AnyReader::One(Reader::connect_lazy(target, own)),
            Some(slot) => AnyReader::Lanes(LaneReader::connect_lazy(target, own, slot)),
        }
    }

    /// See [`Reader::for_batches`].
    pub fn for_batches(&self) -> AnyReader {
        match self {
            AnyReader::One(reader) => AnyReader::One(reader.for_batches()),
            AnyReader::Lanes(reader) => AnyReader::Lanes(reader.for_batches()),
        }
    }

    /// See [`Reader::rows`] and [`LaneReader::rows`].
    pub async fn rows(&self, table: &str, keys: &[Key]) -> Result<Read, SinkError> {
        match self {
            AnyReader::One(reader) => reader.rows(table, keys).await,
            AnyReader::Lanes(reader) => reader.rows(table, keys).await,
        }
    }

    /// See [`Reader::rows_and_dead`] and [`LaneReader::rows_and_dead`].
    pub async fn rows_and_dead(
        &self,
        table: &str,
        keys: &[Key],
        suspects: &[Key],
    ) -> Result<(Read, Vec<Option<DeadKey>>), SinkError> {
        match self {
            AnyReader::One(reader) => reader.rows_and_dead(table, keys, suspects).await,
            AnyReader::Lanes(reader) => reader.rows_and_dead(table, keys, suspects).await,
        }
    }

    /// Returns the checkpoint with the entries of all tables.
    pub async fn checkpoint(&self) -> Result<(Option<Stored>, RunId), SinkError> {
        match self {
            AnyReader::One(reader) => reader.checkpoint().await,
            AnyReader::Lanes(reader) => reader.checkpoint().await,
        }
    }

    /// Returns how many keys have been evicted; `None` if a server does not report that.
    pub async fn evicted_keys(&self) -> Result<Option<u64>, SinkError> {
        match self {
            AnyReader::One(reader) => reader.evicted_keys().await,
            AnyReader::Lanes(reader) => reader.evicted_keys().await,
        }
    }

    /// Returns one page of the keys that begin with `prefix`. Begin with cursor 0, and continue with the returned one
    /// until it is 0. A key may be returned twice.
    pub async fn scan_page(&self, prefix: &[u8], cursor: u64) -> Result<(u64, Vec<Key>), SinkError> {
        match self {
            AnyReader::One(reader) => reader.scan_page(prefix, cursor).await,
            AnyReader::Lanes(reader) => reader.scan_page(prefix, cursor).await,
        }
    }
}
