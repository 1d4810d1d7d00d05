//! Writes a row as one command, `RESTORE key ttl payload REPLACE`, whose payload is the hash in Redis's internal
//! format.
//!
//! RESTORE replaces whatever is at the key, sets the TTL, and costs Redis half of what DEL, HSET and PEXPIRE cost.
//! Redis stores a small hash as a listpack, one contiguous piece of memory, and the payload contains that listpack as
//! it is. Rows with a value or a field name over the server's limit for listpacks are left to [`super::put`].
//!
//! A payload carries an RDB version and a checksum. Servers accept older versions, so this module writes that of Redis
//! 7.0, the first version with listpacks for hashes. [`probe`] asks whether a server accepts it. A mistake here puts
//! wrong values into the cache without any error.
//!
//! <https://github.com/antirez/listpack/blob/master/listpack.md>, and rdb.h, rdb.c and t_hash.c of Redis.

use crate::change::Row;
use crate::command::Key;
use crate::resp::{self, Cursor};
use crate::schema::{Layout, NullRule};
use bytes::{BufMut, Bytes, BytesMut};
use crc::{CRC_64_REDIS, Crc, Table};

/// Up to which size the server stores a hash as a listpack. It would convert a larger one at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packing {
    /// `hash-max-listpack-entries`.
    fields: usize,
    /// `hash-max-listpack-value`, which applies to names, too.
    value_bytes: usize,
}

/// The defaults of every version that has listpacks: Redis 7.0 to 8, and Valkey. A server with lower settings accepts
/// larger listpacks, too, and converts them to hash tables.
const DEFAULT_FIELDS: usize = 512;
const DEFAULT_VALUE_BYTES: usize = 64;
/// The most that a listpack's two-byte string length can express.
const MOST_VALUE_BYTES: usize = 4095;
/// A listpack that counts its entries can have at most 65,534 of them.
const MOST_FIELDS: usize = 10_000;

const RESTORE: &[u8] = b"*5\r\n$7\r\nRESTORE\r\n";
const REPLACE: &[u8] = b"\r\n$7\r\nREPLACE\r\n";
/// The header of a payload whose length has three digits.
const BULK_HEAD: &[u8] = b"$000\r\n";
/// RDB_TYPE_HASH_LISTPACK.
const HASH: u8 = 16;
/// RDB_VERSION of Redis 7.0.
const VERSION: u16 = 10;
/// A string length in the four bytes that follow.
const LENGTH_IN_FOUR: u8 = 0x80;
const LISTPACK_END: u8 = 0xff;
/// Bytes of a listpack's header.
const LISTPACK_HEAD: usize = 6;
static CRC: Crc<u64, Table<16>> = Crc::<u64, Table<16>>::new(&CRC_64_REDIS);

impl Packing {
    /// Returns sizes that two servers store as listpacks.
    #[must_use]
    pub fn lowest(self, other: Packing) -> Self {
        Packing { fields: self.fields.min(other.fields), value_bytes: self.value_bytes.min(other.value_bytes) }
    }

    /// `None` if the server does not report the setting.
    pub fn new(fields: Option<usize>, value_bytes: Option<usize>) -> Self {
        Packing {
            fields: fields.unwrap_or(DEFAULT_FIELDS).min(MOST_FIELDS),
            value_bytes: value_bytes.unwrap_or(DEFAULT_VALUE_BYTES).min(MOST_VALUE_BYTES),
        }
    }
}

/// Asks whether the server accepts such payloads: it replies `+OK` if it does. Writes nothing, because the restored key
/// expired in 1970. `key` must not be in use.
pub fn probe(out: &mut BytesMut, key: &Key) {
    let payload = restore(out, key, 1);
    entry(out, b"id");
    entry(out, b"1");
    payload.end(out, 2);
    out.extend_from_slice(b"\r\n$6\r\nABSTTL\r\n");
}

/// Writes a row to `key` as one command, with values of every encoding that the server's sizes allow, and returns what
/// HGETALL must then answer, in the order of the fields. It is gone after `ttl_ms`.
pub fn sample(out: &mut BytesMut, key: &Key, packing: &Packing, ttl_ms: u64) -> Vec<(Bytes, Bytes)> {
    let texts = ["0", "127", "-4096", "32767", "-8388608", "2147483647", "-9223372036854775808", "007", "", "ü\r\n$1"];
    let longest = "x".repeat(packing.value_bytes);
    let fits = |value: &&str| value.len() <= packing.value_bytes;
    let values = texts.into_iter().chain([&longest[..]]).filter(fits).take(packing.fields);
    let pairs: Vec<(Bytes, Bytes)> =
        values.enumerate().map(|(n, value)| (n.to_string().into(), value.to_owned().into())).collect();
    let payload = restore(out, key, ttl_ms);
    let mut entries = 0;
    for (field, value) in &pairs {
        entry(out, field);
        entry(out, value);
        entries += 2;
    }
    payload.end(out, entries);
    out.extend_from_slice(REPLACE);
    pairs
}

/// Begins a RESTORE, up to where the payload's entries follow.
fn restore(out: &mut BytesMut, key: &Key, ttl_ms: u64) -> Payload {
    out.extend_from_slice(RESTORE);
    resp::bulk(out, key.as_bytes());
    resp::bulk_number(out, ttl_ms);
    Payload::begin(out)
}

/// Writes a row as one command. Returns `false`, with nothing written, if the row is too large for that.
#[must_use]
pub fn put(out: &mut BytesMut, key: &Key, layout: &Layout, row: &Row, packing: &Packing) -> bool {
    if layout.fields.len() > packing.fields {
        return false;
    }
    let start = out.len();
    let payload = restore(out, key, layout.ttl_ms);
    let mut values = Cursor::new(row.cells());
    let mut entries = 0;
    for field in &layout.fields {
        let value = match (values.at(field.cell).flatten(), layout.null) {
            (Some(text), _) => field.render.value(text),
            (None, NullRule::Empty) => b"",
            (None, NullRule::Omit) => continue,
        };
        if value.len().max(field.name.len()) > packing.value_bytes {
            out.truncate(start);
            return false;
        }
        entry(out, &field.name);
        entry(out, value);
        entries += 2;
    }
    if entries == 0 {
        // Redis has no empty hashes.
        out.truncate(start);
        return false;
    }
    payload.end(out, entries);
    out.extend_from_slice(REPLACE);
    true
}

/// A payload that is being written to the end of a buffer.
struct Payload {
    /// Offset of the bulk header, which holds the payload's length.
    head: usize,
    listpack: usize,
}

impl Payload {
    fn begin(out: &mut BytesMut) -> Self {
        let head = out.len();
        out.extend_from_slice(BULK_HEAD);
        out.put_u8(HASH);
        out.put_u8(LENGTH_IN_FOUR);
        out.put_u32(0);
        let listpack = out.len();
        out.put_bytes(0, LISTPACK_HEAD);
        Payload { head, listpack }
    }

    fn end(self, out: &mut BytesMut, entries: u16) {
        let Payload { head, listpack } = self;
        out.put_u8(LISTPACK_END);
        // Far below u32::MAX: at most MOST_FIELDS pairs of at most MOST_VALUE_BYTES each.
        let bytes = u32::try_from(out.len() - listpack).unwrap_or(u32::MAX);
        out[listpack - 4..listpack].copy_from_slice(&bytes.to_be_bytes());
        out[listpack..listpack + 4].copy_from_slice(&bytes.to_le_bytes());
        out[listpack + 4..listpack + 6].copy_from_slice(&entries.to_le_bytes());
        out.put_u16_le(VERSION);
        let payload = head + BULK_HEAD.len();
        let checksum = CRC.checksum(&out[payload..]);
        out.put_u64_le(checksum);
        let length = out.len() - payload;
        let mut digits = itoa::Buffer::new();
        let digits = digits.format(length).as_bytes();
        let more = digits.len().saturating_sub(3);
        if more > 0 {
            out.put_bytes(0, more);
            out.copy_within(payload..payload + length, payload + more);
        } else if digits.len() < 3 {
            let less = 3 - digits.len();
            out.copy_within(payload..payload + length, payload - less);
            out.truncate(out.len() - less);
        }
        out[head + 1..head + 1 + digits.len()].copy_from_slice(digits);
        out[head + 1 + digits.len()..head + 3 + digits.len()].copy_from_slice(b"\r\n");
    }
}

/// Writes one entry, followed by its length for reading backwards. Numbers are stored as integers, as Redis does to
/// save memory.
fn entry(out: &mut BytesMut, text: &[u8]) {
    let start = out.len();
    match number(text) {
        Some(n @ 0..=127) => out.put_u8(n as u8),
        Some(n @ -4096..=4095) => out.put_u16(0xc000 | (n as u16 & 0x1fff)),
        Some(n) => {
            let bytes = n.to_le_bytes();
            let (kind, len) = match n {
                -0x8000..=0x7fff => (0xf1, 2),
                -0x80_0000..=0x7f_ffff => (0xf2, 3),
                -0x8000_0000..=0x7fff_ffff => (0xf3, 4),
                _ => (0xf4, 8),
            };
            out.put_u8(kind);
            out.extend_from_slice(&bytes[..len]);
        }
        None => {
            match text.len() {
                len @ 0..64 => out.put_u8(0x80 | len as u8),
                len => out.put_u16(0xe000 | len as u16),
            }
            out.extend_from_slice(text);
        }
    }
    match out.len() - start {
        len @ 0..128 => out.put_u8(len as u8),
        len => out.extend_from_slice(&[(len >> 7) as u8, (len & 127) as u8 | 128]),
    }
}

/// Returns the number only if printing it gives the same text.
fn number(text: &[u8]) -> Option<i64> {
    let digits = text.strip_prefix(b"-").unwrap_or(text);
    match digits {
        [b'1'..=b'9', ..] | [b'0'] if digits.len() < 20 && text != b"-0" => {
            std::str::from_utf8(text).ok()?.parse().ok()
        }
        _ => None,
    }
}
