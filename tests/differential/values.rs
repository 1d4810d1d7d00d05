//! Types and values: some of every built-in family of Postgres, and those that have broken other programs.

use rand::Rng;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;

/// One type, with values of it as written between quotes.
#[derive(Debug)]
pub struct Kind {
    pub name: &'static str,
    pub values: &'static [&'static str],
}

const fn kind(name: &'static str, values: &'static [&'static str]) -> Kind {
    Kind { name, values }
}

/// The types that [`KINDS`] uses.
pub const TYPES: &str = "
    CREATE TYPE mood AS ENUM ('sad', 'so so', 'it''s \"fine\"', 'NULL');
    CREATE TYPE pair AS (a int, b text);
    CREATE DOMAIN agreed AS boolean;
    CREATE DOMAIN signed AS agreed;
    CREATE DOMAIN percent AS numeric(5,2) CHECK (VALUE >= 0);
    CREATE DOMAIN tags AS text[];
    CREATE DOMAIN couple AS pair;
    CREATE DOMAIN pairs AS pair[];
    CREATE TYPE floatrange AS RANGE (subtype = float8);
    CREATE TYPE nested AS (p pair, \"a \"\"b\"\"\" tags, ok signed, j jsonb, at timestamptz[], of pairs);
";

const TEXTS: &[&str] = &[
    "",
    " ",
    "plain",
    "\\N",
    "\\.",
    "NULL",
    "a\tb\nc\r\nd\\e\u{8}\u{b}\u{c}\u{1f}",
    "'; DROP TABLE x; --",
    "\"q\" {x} [y] *?%:$1",
    "ünïcödé \u{1f600}\u{301}\u{202e}",
    "$3\r\nDEL\r\n*1",
    "\u{7f}\u{80}\u{ffff}\u{10ffff}",
];

pub static TEXT: &Kind = &kind("text", TEXTS);

pub static KINDS: &[Kind] = &[
    kind("boolean", &["t", "f"]),
    kind("agreed", &["t", "f"]),
    kind("signed", &["t", "f"]),
    kind("smallint", &["0", "-32768", "32767"]),
    kind("integer", &["0", "-2147483648", "2147483647"]),
    kind("bigint", &["0", "-9223372036854775808", "9007199254740993"]),
    kind("numeric", &["0", "0.00", "NaN", "Infinity", "-Infinity", "1e-40", "12345678901234567890123.4500"]),
    kind("numeric(10,2)", &["0", "NaN", "-99999999.99", "1.005"]),
    kind("percent", &["0", "100", "33.333"]),
    kind("real", &["0.1", "-0", "NaN", "Infinity", "1e-38", "16777217"]),
    kind("double precision", &["0.1", "0.30000000000000004", "-0", "NaN", "-Infinity", "1e300"]),
    kind("money", &["0", "-1234567.89", "0.01"]),
    kind("text", TEXTS),
    kind("varchar(80)", TEXTS),
    kind("char(12)", &["", "ab", "ab  ", "ü"]),
    kind("\"char\"", &["", "x", "\\"]),
    kind("name", &["", "pg_class", "with space"]),
    kind("bytea", &["", "\\x00", "\\x00ff5c0a", "\\x"]),
    kind("date", &["2024-02-29", "infinity", "-infinity", "0044-03-15 BC", "12345-06-07"]),
    kind("time", &["00:00", "23:59:59.999999", "24:00"]),
    kind("timetz", &["04:05:06+05:45", "24:00-12"]),
    kind("timestamp", &["2024-01-02 03:04:05.000001", "infinity", "0001-01-01 BC"]),
    kind("timestamptz", &["2024-01-02 03:04:05+05:45", "-infinity", "1890-01-01 00:00:00 Asia/Kolkata"]),
    kind("interval", &["1 year 2 mons -3 days 04:05:06.7", "0", "-1 mon +2 days -03:00", "178000000 years"]),
    kind("uuid", &["A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11", "00000000-0000-0000-0000-000000000000"]),
    kind(
        "json",
        &["{\"a\" :  [1, null, \"\\u00fc\"], \"a\": 1e999, \"\\ud800\": \"\\u0000\"}", "null", "\"\"", " [] "],
    ),
    kind("jsonb", &["{\"b\": 1, \"a\": [true, null]}", "null", "\"\\\\N\\t\"", "1.10"]),
    kind("jsonpath", &["$.a[*] ? (@ > 1)", "strict $"]),
    kind("xml", &["<a b=\"c\">d</a>", "no element"]),
    kind("inet", &["10.0.0.1/8", "::1", "192.168.0.1"]),
    kind("cidr", &["10.0.0.0/8", "2001:db8::/32"]),
    kind("macaddr", &["08:00:2b:01:02:03"]),
    kind("macaddr8", &["08:00:2b:01:02:03:04:05"]),
    kind("bit(5)", &["10101", "00000"]),
    kind("bit varying", &["", "1", "0101010101"]),
    kind("point", &["(1.5,-0.1)", "(NaN,Infinity)"]),
    kind("line", &["{1,2,3}"]),
    kind("lseg", &["[(0,0),(1,1e-20)]"]),
    kind("box", &["(2,2),(0,0)"]),
    kind("path", &["[(0,0),(1,1)]", "((0,0),(1,1))"]),
    kind("polygon", &["((0,0),(1,1),(1,0))"]),
    kind("circle", &["<(1,2),3>"]),
    kind("tsvector", &["fat cats a:1A b:2", "'it''s' '\\\\'", ""]),
    kind("tsquery", &["fat & (rat | !cat) <-> x:*", ""]),
    kind("pg_lsn", &["FF/0", "100/0"]),
    kind("oid", &["0", "4294967295"]),
    kind("regclass", &["pg_class", "-", "versions"]),
    kind("regtype", &["mood", "timestamptz"]),
    kind("int4range", &["[1,5)", "empty", "(,)", "(,7]"]),
    kind("numrange", &["[1.0,1.10)", "(NaN,)"]),
    kind("tstzrange", &["[2024-01-01 00:00+05:45,)", "empty"]),
    kind("daterange", &["[2024-01-01,infinity)"]),
    kind("floatrange", &["[0.1,0.30000000000000004)"]),
    kind("int4multirange", &["{[1,3),[5,7)}", "{}"]),
    kind("text[]", &["{}", "{a,\"b \\\"q\\\"\",NULL,\"NULL\",\"\"}", "[0:1]={x,\"\\\\\"}"]),
    kind("integer[]", &["{{1,2},{3,NULL}}", "[-1:0]={1,2}"]),
    kind("boolean[]", &["{t,f,NULL}"]),
    kind("jsonb[]", &["{\"{\\\"a\\\": 1}\",NULL}"]),
    kind("timestamptz[]", &["{\"2024-07-01 00:00+02\"}"]),
    kind("mood", &["sad", "so so", "it's \"fine\"", "NULL"]),
    kind("mood[]", &["{sad,\"so so\",NULL,\"NULL\"}"]),
    kind("pair", &["(1,\"x,y\")", "(,)", "(2,\"\")"]),
    kind("pair[]", &["{\"(1,\\\"a b\\\")\",NULL}"]),
    kind("couple", &["(7,)"]),
    kind("tags", &["{x}", "{}"]),
    kind("oidvector", &["1 2", ""]),
    kind("int2vector", &["-1 0 2"]),
    kind("oidvector[]", &["{\"1 2\",NULL}"]),
    kind("numeric[]", &["{NaN,1.50,NULL}", "{{{1}},{{2}}}"]),
    kind("real[]", &["{-0,Infinity,1e+20}"]),
    kind("date[]", &["{\"0044-03-15 BC\",infinity}"]),
    kind("timestamp[]", &["{\"0044-03-15 12:00 BC\",-infinity}"]),
    kind("box[]", &["{(2,2),(0,0);(1,1),(0,0)}", "{}"]),
    kind("json[]", &["{\"{\\\"a\\\" : 1}\",null,\"\\\"x\\\"\"}"]),
    kind("bytea[]", &["{\"\\\\x00ff\",NULL}"]),
    kind("signed[]", &["{t,NULL}"]),
    kind("tags[]", &["{\"{a,\\\"b c\\\"}\",\"{}\"}"]),
    kind("pairs", &["{\"(1,b)\",\"(,)\"}", "{}"]),
    kind(
        "nested",
        &[
            "(\"(1,\"\"x,\\\\y\"\")\",\"{a,\"\"b c\"\"}\",t,\"{\"\"k\"\": [1]}\",\"{\"\"2024-07-01 00:00+02\"\"}\",\"{\"\"(2,)\"\"}\")",
            "(,,,,,)",
            "(,,,\"\"\"\"\"\",\"{}\",)",
        ],
    ),
    kind("xid8", &["18446744073709551615"]),
    kind("tid", &["(0,1)"]),
];

/// Types that may be a key or a part of one. The last value is kept free for rows that move from one key to another.
pub static KEYS: &[Kind] = &[
    kind("integer", &["0", "1", "2", "3", "-4", "5", "6", "7", "8", "9", "10", "11", "999"]),
    kind("bigint", &["1", "2", "3", "4", "5", "6", "7", "9223372036854775807"]),
    kind(
        "text",
        &[
            "",
            " ",
            "a",
            "A",
            "a:b",
            "a%3Ab",
            "%",
            ":",
            "{b}*?[a-z]\\",
            "new\nline\r\ttab",
            "\"q\" 'q'",
            "ключ \u{1f511}",
            "a/b?c#d&e=f",
            "1",
            "10",
            "10:",
            "NULL",
            "\\N",
            "KKKK",
            "(on its way)",
        ],
    ),
    kind(
        "uuid",
        &[
            "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11",
            "A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A12",
            "00000000-0000-0000-0000-000000000000",
            "ffffffff-ffff-ffff-ffff-ffffffffffff",
            "00000000-0000-0000-0000-00000000000e",
        ],
    ),
    // Equal, but written differently.
    kind("numeric", &["1", "1.0", "1.00", "2", "2.50", "2.5", "NaN", "-0.0", "0", "77"]),
    kind("char(6)", &["", "a", "a ", "b:", "ü", "(tmp)"]),
    kind(
        "timestamptz",
        &[
            "2024-01-02 03:04:05+05:45",
            "2024-01-01 21:19:05+00",
            "infinity",
            "0044-03-15 12:00+00 BC",
            "1999-12-31 UTC",
        ],
    ),
    kind("bytea", &["", "\\x00", "\\x3a25", "\\xff"]),
    kind("boolean", &["t", "f", "f"]),
    kind("inet", &["10.0.0.1/8", "10.0.0.1", "::1", "::2", "1.1.1.1"]),
];

impl Kind {
    pub fn value(&self, rng: &mut StdRng) -> String {
        self.quoted(rng.random_range(0..self.values.len()))
    }

    /// A key that no row has for long.
    pub fn spare(&self) -> String {
        self.quoted(self.values.len() - 1)
    }

    /// Any key but the spare one.
    pub fn key(&self, rng: &mut StdRng) -> String {
        self.quoted(rng.random_range(0..self.values.len() - 1))
    }

    fn quoted(&self, at: usize) -> String {
        match self.values[at] {
            // Longer than any sensible key, and stored compressed.
            "KKKK" => format!("repeat('k: %', 2500)::{}", self.name),
            value => format!("'{}'::{}", value.replace('\'', "''"), self.name),
        }
    }
}

pub fn any(rng: &mut StdRng) -> &'static Kind {
    KINDS.choose(rng).unwrap()
}
