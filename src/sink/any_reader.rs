//! The connections for reads, whether all keys lie on one server or not.

use super::connect::{HostPort, RedisTarget};
use super::lane_reader::LaneReader;
use super::list_reader::{self, ListRead, Slice};
use super::reader::{Read, Reader, RunId};
use super::{SinkError, Stored};
use crate::command::{DeadKey, Key};
use crate::format::Format;
use crate::lanes::Lane;
use crate::resp::batch::OwnKeys;

/// The connections for reads: to one server, [`Reader`]; to all masters of a cluster, [`LaneReader`].
#[derive(Debug, Clone)]
pub enum AnyReader {
    One(Reader),
    Lanes(LaneReader),
}

impl AnyReader {
    /// Opens no connection yet. `lanes` : the name of the replication slot, if the keys lie in several hash slots of a cluster.
    pub fn connect_lazy(target: &RedisTarget, own: &OwnKeys, lanes: Option<&str>) -> AnyReader {
        match lanes {
            None => AnyReader::One(Reader::connect_lazy(target, own)),
            Some(slot) => AnyReader::Lanes(LaneReader::connect_lazy(target, own, slot)),
        }
    }

    /// Whether hash slots are written one by one, so that some may be ahead of the checkpoint.
    pub fn has_lanes(&self) -> bool {
        match self {
            AnyReader::One(_) => false,
            AnyReader::Lanes(_) => true,
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
    pub async fn rows(&self, table: &str, format: Format, keys: &[Key]) -> Result<Read, SinkError> {
        match self {
            AnyReader::One(reader) => reader.rows(table, format, keys).await,
            AnyReader::Lanes(reader) => reader.rows(table, format, keys).await,
        }
    }

    /// See [`Reader::rows_and_dead`] and [`LaneReader::rows_and_dead`].
    pub async fn rows_and_dead(
        &self,
        table: &str,
        rows: (Format, &[Key]),
        suspects: &[Key],
    ) -> Result<(Read, Vec<Option<DeadKey>>), SinkError> {
        match self {
            AnyReader::One(reader) => reader.rows_and_dead(table, rows, suspects).await,
            AnyReader::Lanes(reader) => reader.rows_and_dead(table, rows, suspects).await,
        }
    }

    /// See [`list_reader::read`].
    pub async fn list(&self, table: &str, format: Format, slice: &Slice<'_>) -> Result<ListRead, SinkError> {
        match self {
            AnyReader::One(reader) => list_reader::read(reader, table, format, slice).await,
            AnyReader::Lanes(reader) => list_reader::read(reader, table, format, slice).await,
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

    /// See [`LaneReader::place_of`]. `None` if all keys lie on one server, too.
    pub async fn place_of(&self, key: &Key) -> Result<Option<(Lane, HostPort)>, SinkError> {
        match self {
            AnyReader::One(_) => Ok(None),
            AnyReader::Lanes(reader) => reader.place_of(key).await,
        }
    }
}
