//! The script that writes one lane, or the record: it compares the mark with the expected one, sets the new one, and
//! runs the commands, all or nothing.
//!
//! Hash slots have no transaction in common, and `WATCH` is no fence for pipelined writes. A call of this script is
//! both, for one slot: it is refused as a whole unless it continues exactly the state that its sender expected.

use super::Lane;
use crate::command::Key;
use crate::resp;
use bytes::{Bytes, BytesMut};

/// `KEYS[1]` is the mark, or the record's head; all other keys that the commands name follow. `ARGV[1]` is the expected
/// mark (empty: there must be none), `ARGV[2]` the new one, `ARGV[3]` the one to set if a command fails (empty: that from
/// before). Then the commands: name, index of the key in `KEYS`, number of arguments after the key, arguments. If the
/// name begins with `?`, the key must be a hash, or the command has failed. After a failed command the others still
/// run.
///
/// The mark is set first. A server that accepts no writes, or is out of memory, refuses that, and nothing is done; a
/// later command could fail for the same reason after others have succeeded.
///
/// Answers `ok`; or `mark` and the mark that was found instead (empty: none), and nothing was done; or `failed` and the
/// first error.
pub const SCRIPT: &str = r"
local found = redis.call('GET', KEYS[1]) or ''
if found ~= ARGV[1] then
  return {'mark', found}
end
redis.call('SET', KEYS[1], ARGV[2])
local failed
local at = 4
while at <= #ARGV do
  local name, key, count = ARGV[at], KEYS[tonumber(ARGV[at + 1])], tonumber(ARGV[at + 2])
  local first = at + 3
  local reply
  if string.sub(name, 1, 1) == '?' then
    name = string.sub(name, 2)
    local found = redis.pcall('TYPE', key)
    if found.ok ~= 'hash' then
      reply = {err = found.err or ('WRONGTYPE ' .. name .. ' needs a hash, and the key is ' .. found.ok)}
    end
  end
  reply = reply or redis.pcall(name, key, unpack(ARGV, first, first + count - 1))
  if type(reply) == 'table' and reply.err then
    failed = failed or reply.err
  end
  at = first + count
end
if not failed then
  return {'ok'}
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
    /// Appends this call as `EVALSHA`. `sha` is what `SCRIPT LOAD` has answered.
    pub fn write(&self, out: &mut BytesMut, sha: &[u8]) {
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

    /// An upper bound in bytes of what [`Self::write`] appends.
    pub fn len_bytes(&self) -> usize {
        const ARGUMENT: usize = "$4294967295\r\n\r\n".len();
        let keys: usize = self.keys.iter().map(|key| ARGUMENT + key.as_bytes().len()).sum();
        let marks = self.expected.len() + self.new.len() + self.if_failed.len();
        const AROUND: usize = 8 * ARGUMENT + 64;
        AROUND + keys + marks + self.commands.body.len()
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
}

impl Commands {
    /// `key` is the index in `KEYS`, beginning with 1. `arguments` are those after the key.
    pub fn push<'a>(&mut self, name: &[u8], key: usize, arguments: impl ExactSizeIterator<Item = &'a [u8]>) {
        assert!(arguments.len() <= MOST_ARGUMENTS, "a row has at most 1,600 columns");
        let number = |out: &mut BytesMut, n: usize| resp::bulk(out, itoa::Buffer::new().format(n).as_bytes());
        self.arguments += 3 + arguments.len();
        self.count += 1;
        self.deletions += usize::from(name == b"DEL");
        resp::bulk(&mut self.body, name);
        number(&mut self.body, key);
        number(&mut self.body, arguments.len());
        arguments.for_each(|argument| resp::bulk(&mut self.body, argument));
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
        if self.keys.last().is_none_or(|last| last.as_bytes() != key) {
            self.keys.push(Key(Bytes::copy_from_slice(key)));
        }
        // The mark is the first.
        self.commands.push(name, self.keys.len() + 1, arguments);
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
        assert!(out.len() <= call.len_bytes(), "{} and {}", out.len(), call.len_bytes());
    }
}
