//! The script that writes one lane, or the record: it compares the mark with the expected one, sets the new one, and
//! runs the commands, all or nothing.
//!
//! Hash slots have no transaction in common, and `WATCH` is no fence for pipelined writes. A call of this script is
//! both, for one slot: it is refused as a whole unless it continues exactly the state that its sender expected.

use super::Lane;
use crate::command::Key;
use crate::resp;
use bytes::{Bytes, BytesMut};
use std::ops::Range;

/// `KEYS[1]` is the mark, or the record's head; all other keys that the commands name follow. `ARGV[1]` is the expected
/// mark (empty: there must be none), `ARGV[2]` the new one, `ARGV[3]` the one to set if a command fails (empty: that from
/// before). Then the commands: name, index of the key in `KEYS`, number of arguments after the key, arguments. If the
/// name begins with `?`, the key must be a hash, or the command has failed. After a failed command the others still run.
/// If it begins with `=`, it comes before all others: the command without its last argument must answer with that, or
/// nothing is done.
///
/// [`PACKED`] stands for `RESTORE … REPLACE` of rows whose keys follow one another: index of the first key, number of
/// rows, the TTL of all of them, and the payloads. What a call costs a server is mostly the number of its arguments.
///
/// The mark is set first. A server that accepts no writes, or is out of memory, refuses that, and nothing is done; a
/// later command could fail for the same reason after others have succeeded.
///
/// Answers `ok`; or an array: `mark` and the mark that was found instead (empty: none), and nothing was done; or `failed`
/// and the first error.
pub const SCRIPT: &str = r"
local found = redis.call('GET', KEYS[1]) or ''
if found ~= ARGV[1] then
  return {'mark', found}
end
redis.call('SET', KEYS[1], ARGV[2])
local failed
local at, last = 4, #ARGV
while at <= last do
  local name, key, count = ARGV[at], tonumber(ARGV[at + 1]), tonumber(ARGV[at + 2])
  local first = at + 3
  if name == 'P' then
    local ttl = ARGV[first]
    for row = 1, count do
      local reply = redis.pcall('RESTORE', KEYS[key + row - 1], ttl, ARGV[first + row], 'REPLACE')
      failed = failed or reply.err
    end
    at = first + 1 + count
  else
    local reply
    if string.byte(name) == 61 then
      reply = redis.pcall(string.sub(name, 2), KEYS[key], unpack(ARGV, first, first + count - 2))
      if reply ~= ARGV[first + count - 1] then
        failed = type(reply) == 'table' and reply.err or 'ERR ' .. KEYS[key] .. ' has been changed by somebody else'
        break
      end
    elseif string.byte(name) == 63 then
      name = string.sub(name, 2)
      local found = redis.pcall('TYPE', KEYS[key])
      if found.ok ~= 'hash' then
        reply = {err = found.err or ('WRONGTYPE ' .. name .. ' needs a hash, and the key is ' .. found.ok)}
      end
    end
    reply = reply or redis.pcall(name, KEYS[key], unpack(ARGV, first, first + count - 1))
    if type(reply) == 'table' and reply.err then
      failed = failed or reply.err
    end
    at = first + count
  end
end
if not failed then
  return 'ok'
end
if ARGV[3] ~= '' then
  redis.call('SET', KEYS[1], ARGV[3])
elseif ARGV[1] ~= '' then
  redis.call('SET', KEYS[1], ARGV[1])
else
  redis.call('DEL', KEYS[1])
end
return {'failed', failed}
";

const PACKED: &[u8] = b"P";
/// The most rows under one [`PACKED`]. Their number is written with as many digits, zeros first.
const MOST_PACKED: usize = 9_999;

/// Lua cannot pass more values to a function: `LUAI_MAXCSTACK` is 8,000. Postgres's limit of 1,600 columns keeps rows far
/// below it.
const MOST_ARGUMENTS: usize = 7_000;

/// A write of one lane, or of the record. At most one for each is on its way.
///
/// One whose answer was lost may be sent again: if it was done, it is refused with its own new mark.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    /// `None`: the record, which lies in the slot of the replication slot's name.
    pub lane: Option<Lane>,
    /// `KEYS`. All of them hash to the same slot.
    pub keys: Vec<Key>,
    /// What the mark, or the record's head, must be for the call to be accepted. Empty: there must be none.
    pub expected: Bytes,
    /// What it is after the call.
    pub new: Bytes,
    /// What it is if a command fails. Empty: what it was before.
    pub if_failed: Bytes,
    pub commands: Commands,
}

impl Call {
    /// Whether this call leaves everything as it is expected to be. It then only reads the mark, at a fraction of the cost.
    pub fn only_reads(&self) -> bool {
        self.new == self.expected && self.commands.is_empty()
    }

    /// Appends this call as `EVALSHA`, or as `GET` if it only reads. `sha` is what `SCRIPT LOAD` has answered.
    pub fn write(&self, out: &mut BytesMut, sha: &[u8]) {
        if self.only_reads() {
            return resp::command(out, &[b"GET", self.keys[0].as_bytes()]);
        }
        resp::header(out, 3 + self.keys.len() + 3 + self.commands.arguments);
        resp::bulk(out, b"EVALSHA");
        resp::bulk(out, sha);
        resp::bulk(out, itoa::Buffer::new().format(self.keys.len()).as_bytes());
        for key in &self.keys {
            resp::bulk(out, key.as_bytes());
        }
        for argument in [&self.expected, &self.new, &self.if_failed] {
            resp::bulk(out, argument);
        }
        out.extend_from_slice(&self.commands.body);
    }
}

#[cfg(any(test, feature = "sim"))]
impl Call {
    /// The commands, with keys in place of their numbers.
    pub(crate) fn words(&self) -> Vec<Vec<Bytes>> {
        let mut body = BytesMut::new();
        resp::header(&mut body, self.commands.arguments);
        body.extend_from_slice(&self.commands.body);
        let mut arguments = resp::arguments(&body).into_iter();
        // The first is taken for a name.
        let first = resp::command_at(&body, 0).map(|(name, _)| name);
        let mut first = first.filter(|_| !self.commands.is_empty());
        let mut commands = Vec::new();
        while let Some(name) = first.take().or_else(|| arguments.next().map(Bytes::copy_from_slice)) {
            let mut number = || -> usize {
                let digits = arguments.next().expect("a number");
                std::str::from_utf8(digits).expect("digits").parse().expect("a number")
            };
            let (key, count) = (number(), number());
            if name == PACKED {
                let ttl = Bytes::copy_from_slice(arguments.next().expect("a TTL"));
                for (key, payload) in self.keys[key - 1..].iter().zip(arguments.by_ref().take(count)) {
                    let payload = Bytes::copy_from_slice(payload);
                    commands.push(vec!["RESTORE".into(), key.0.clone(), ttl.clone(), payload, "REPLACE".into()]);
                }
                continue;
            }
            let mut words = vec![name, self.keys[key - 1].0.clone()];
            words.extend(arguments.by_ref().take(count).map(Bytes::copy_from_slice));
            commands.push(words);
        }
        assert_eq!(commands.len(), self.commands.len());
        commands
    }
}

/// The commands of one call, encoded.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Commands {
    body: BytesMut,
    arguments: usize,
    count: usize,
    deletions: usize,
    /// The rows at the end of `body`.
    packed: Option<Packed>,
}

/// Rows under one [`PACKED`], to which further ones may be added.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Packed {
    /// The index of the key that must be that of the next one.
    next: usize,
    rows: usize,
    /// Where in the body their number is, and their TTL.
    number: Range<usize>,
    ttl: Range<usize>,
}

impl Commands {
    /// `key` is the index in `KEYS`, beginning with 1. `arguments` are those after the key.
    pub fn push<'a>(&mut self, name: &[u8], key: usize, arguments: impl ExactSizeIterator<Item = &'a [u8]>) {
        assert!(arguments.len() <= MOST_ARGUMENTS, "a row has at most 1,600 columns");
        self.packed = None;
        self.arguments += 3 + arguments.len();
        self.count += 1;
        self.deletions += usize::from(name == b"DEL");
        resp::bulk(&mut self.body, name);
        resp::bulk_number(&mut self.body, key as u64);
        resp::bulk_number(&mut self.body, arguments.len() as u64);
        arguments.for_each(|argument| resp::bulk(&mut self.body, argument));
    }

    /// Adds `RESTORE … ttl payload REPLACE`.
    pub fn restore(&mut self, key: usize, ttl: &[u8], payload: &[u8]) {
        // Most calls have one row.
        const AROUND: usize = 96;
        self.body.reserve(payload.len() + AROUND);
        let joins =
            |packed: &Packed| packed.next == key && packed.rows < MOST_PACKED && &self.body[packed.ttl.clone()] == ttl;
        let mut packed = match self.packed.take().filter(joins) {
            Some(packed) => packed,
            None => self.begin_packed(key, ttl),
        };
        packed.rows += 1;
        packed.next += 1;
        self.body[packed.number.clone()].copy_from_slice(format!("{:04}", packed.rows).as_bytes());
        self.packed = Some(packed);
        self.arguments += 1;
        self.count += 1;
        resp::bulk(&mut self.body, payload);
    }

    fn begin_packed(&mut self, key: usize, ttl: &[u8]) -> Packed {
        let mut last = |argument: &[u8]| {
            resp::bulk(&mut self.body, argument);
            let end = self.body.len() - b"\r\n".len();
            end - argument.len()..end
        };
        last(PACKED);
        last(itoa::Buffer::new().format(key).as_bytes());
        let (number, ttl) = (last(b"0000"), last(ttl));
        self.arguments += 4;
        Packed { next: key, rows: 0, number, ttl }
    }

    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Whether there is nothing but DEL.
    pub fn only_delete(&self) -> bool {
        self.deletions == self.count
    }

    /// The number of commands.
    pub fn len(&self) -> usize {
        self.count
    }
}

/// Commands of one hash slot with the keys that they name, before it is known what mark they go with.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Part {
    /// `KEYS` without the first. A key may be there several times.
    pub keys: Vec<Key>,
    pub commands: Commands,
}

impl Part {
    /// `arguments` are those after the key.
    pub fn push<'a>(&mut self, name: &[u8], key: &[u8], arguments: impl ExactSizeIterator<Item = &'a [u8]>) {
        let key = self.number_of(key);
        self.commands.push(name, key, arguments);
    }

    /// See [`Commands::restore`].
    pub fn restore(&mut self, key: &[u8], ttl: &[u8], payload: &[u8]) {
        let key = self.number_of(key);
        self.commands.restore(key, ttl, payload);
    }

    /// Names this key unless it was the last one. The mark is the first.
    fn number_of(&mut self, key: &[u8]) -> usize {
        if self.keys.last().is_none_or(|last| last.as_bytes() != key) {
            self.keys.push(Key(Bytes::copy_from_slice(key)));
        }
        self.keys.len() + 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_names_its_keys_and_counts_its_arguments() {
        let mut part = Part::default();
        part.push(b"DEL", b"a", [].into_iter());
        part.push(b"?HSET", b"a", [&b"f"[..], b"v"].into_iter());
        part.push(b"DEL", b"b", [].into_iter());
        let key = |text: &'static str| Key(Bytes::from_static(text.as_bytes()));
        assert_eq!(part.keys, [key("a"), key("b")]);
        let keys = std::iter::once(key("m")).chain(part.keys).collect();
        let [expected, new, if_failed] = ["x", "yy", ""].map(|text| Bytes::from_static(text.as_bytes()));
        let call = Call { lane: None, keys, expected, new, if_failed, commands: part.commands };
        let mut out = BytesMut::new();
        call.write(&mut out, b"5ha");
        let mut wanted = BytesMut::new();
        let words = "EVALSHA 5ha 3 m a b x yy _ DEL 2 0 ?HSET 2 2 f v DEL 3 0";
        let words: Vec<&[u8]> = words.split(' ').map(|word| word.trim_matches('_').as_bytes()).collect();
        resp::command(&mut wanted, &words);
        assert_eq!(out, wanted);
        assert!(!call.only_reads());
        let mut out = BytesMut::new();
        let same = Call { new: call.expected.clone(), commands: Commands::default(), ..call };
        same.write(&mut out, b"5ha");
        assert_eq!(&out[..], b"*2\r\n$3\r\nGET\r\n$1\r\nm\r\n");
    }

    #[test]
    fn packed_rows_are_written_together_as_long_as_they_can() {
        let mut part = Part::default();
        part.restore(b"a", b"9", b"1");
        part.restore(b"b", b"9", b"2");
        part.restore(b"b", b"9", b"3");
        part.restore(b"c", b"8", b"4");
        part.push(b"DEL", b"d", [].into_iter());
        part.restore(b"e", b"8", b"5");
        let mut body = BytesMut::new();
        for word in "P 2 0002 9 1 2 P 3 0001 9 3 P 4 0001 8 4 DEL 5 0 P 6 0001 8 5".split(' ') {
            resp::bulk(&mut body, word.as_bytes());
        }
        assert_eq!(part.commands.body, body);
        assert_eq!((part.commands.arguments, part.commands.len()), (24, 6));
        let mark = Key(Bytes::from_static(b"m"));
        let keys = std::iter::once(mark).chain(part.keys).collect();
        let [expected, new, if_failed] = [Bytes::new(), Bytes::new(), Bytes::new()];
        let call = Call { lane: None, keys, expected, new, if_failed, commands: part.commands };
        let keys: Vec<Bytes> = call.words().into_iter().map(|words| words[1].clone()).collect();
        assert_eq!(keys, ["a", "b", "b", "c", "d", "e"]);
    }

    #[test]
    fn the_number_of_packed_rows_has_four_digits() {
        let mut part = Part::default();
        for n in 0..=MOST_PACKED {
            part.restore(n.to_string().as_bytes(), b"9", b"");
        }
        assert_eq!(part.commands.arguments, 2 * 4 + MOST_PACKED + 1);
        assert!(part.commands.body.starts_with(b"$1\r\nP\r\n$1\r\n2\r\n$4\r\n9999\r\n"));
    }
}
