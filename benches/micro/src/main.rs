//! What a row of seven columns costs in each step between the sockets: decoding it from the stream and from COPY, planning,
//! encoding it for Redis as a hash and as a document, comparing it with what Redis has, scanning the replies, reading the
//! checkpoint. Compare with an earlier run: `--save-baseline NAME`, later
//! `--baseline NAME`.

use bytes::{Bytes, BytesMut};
use criterion::measurement::WallTime;
use criterion::{BatchSize, BenchmarkGroup, Criterion, Throughput};
use prefetchd::change::{Change, NewRow, Row, RowBuilder};
use prefetchd::checkpoint::Checkpoint;
use prefetchd::command::Key;
use prefetchd::format::{Form, Format};
use prefetchd::plan::key::parse_template;
use prefetchd::plan::key_states::KeyStates;
use prefetchd::plan::mapping::Mapping;
use prefetchd::resp::batch::Limits;
use prefetchd::resp::{self, Begins, packed::Packing};
use prefetchd::schema::{
    Field, Layout, NullRule, QualifiedName, Relation, RelationColumn, Render, ReplicaIdentity, TableId, TableSpec,
};
use prefetchd::source::pgoutput;
use prefetchd::source::snapshot::parse_copy_line;
use prefetchd::typed::known::KnownTypes;
use prefetchd::typed::row_type::JsonType;
use std::hint::black_box;
use std::sync::Arc;

const NAMES: [&str; 7] = ["id", "name", "category", "price", "stock", "active", "updated_at"];
const TYPES: [JsonType; 7] = [
    JsonType::Number,
    JsonType::String,
    JsonType::String,
    JsonType::Number,
    JsonType::Number,
    JsonType::Boolean,
    JsonType::TimestampTz,
];
const VALUES: [&str; 7] =
    ["123456", "Item number 123456", "category-17", "234.50", "456", "t", "2024-01-01 00:00:00+00"];

/// An UPDATE without the old row, as pgoutput sends it.
/// <https://www.postgresql.org/docs/current/protocol-logicalrep-message-formats.html>
fn update() -> Bytes {
    let mut message = vec![b'U'];
    message.extend(16_385_u32.to_be_bytes());
    message.push(b'N');
    message.extend(7_u16.to_be_bytes());
    for value in VALUES {
        message.push(b't');
        message.extend(u32::try_from(value.len()).expect("it is short").to_be_bytes());
        message.extend(value.as_bytes());
    }
    message.into()
}

fn row() -> Row {
    let mut row = RowBuilder::with_capacity(100);
    VALUES.iter().for_each(|value| row.cell(Some(value.as_bytes())));
    row.row()
}

fn layout() -> Layout {
    let render = |name| if name == "active" { Render::Boolean } else { Render::AsIs };
    let field = |(cell, name): (usize, &&'static str)| Field {
        cell,
        name: Bytes::from_static(name.as_bytes()),
        render: render(*name),
    };
    let fields = NAMES.iter().enumerate().map(field).collect();
    Layout { fields, null: NullRule::Empty, cells: 7, ttl_ms: 86_400_000, form: Form::Hash }
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    let mut group = criterion.benchmark_group("row");
    group.throughput(Throughput::Elements(1));

    let message = update();
    group.bench_function("decode an UPDATE", |b| {
        b.iter_batched(
            || message.clone(),
            |message| pgoutput::message(message).expect("it is valid"),
            BatchSize::SmallInput,
        );
    });

    let line = VALUES.join("\t").into_bytes();
    group.bench_function("decode a line of COPY", |b| {
        b.iter(|| {
            let mut row = RowBuilder::with_capacity(line.len());
            parse_copy_line(black_box(&line), 7, &mut row).expect("it is valid");
            row.row()
        });
    });

    let (key, row, layout) = (Key(Bytes::from_static(b"bench:item:123456")), row(), layout());
    let plain = Limits::new(512 << 20, 64 << 20);
    let packed = Limits { packing: Some(Packing::new(None, None)), ..plain.clone() };
    let document = Layout { form: Form::Json(TYPES.to_vec()), ..layout.clone() };
    for (name, layout, limits) in [
        ("encode as DEL, HSET, PEXPIRE", &layout, &plain),
        ("encode as RESTORE", &layout, &packed),
        ("encode as a JSON document", &document, &plain),
    ] {
        let mut out = BytesMut::with_capacity(1 << 20);
        group.bench_function(name, |b| {
            b.iter(|| {
                out.clear();
                resp::put(&mut out, black_box(&key), layout, &row, limits).expect("it is small")
            });
        });
    }

    let (mut written, mut reply) = (BytesMut::new(), BytesMut::new());
    resp::put(&mut written, &key, &layout, &row, &plain).expect("it is small");
    let shown = VALUES.map(|value| if value == "t" { "true" } else { value });
    let pairs: Vec<&[u8]> =
        NAMES.iter().zip(&shown).flat_map(|(name, value)| [name.as_bytes(), value.as_bytes()]).collect();
    resp::command(&mut reply, &pairs);
    group.bench_function("compare with the reply to HGETALL", |b| {
        b.iter(|| {
            let expected = resp::hash_of(black_box(&written), &key).expect("it is a hash");
            assert_eq!(expected.begins(black_box(&reply)), Begins::Whole(reply.len()));
        });
    });
    plan(&mut group);

    let replies = b"+QUEUED\r\n:1\r\n+OK\r\n".repeat(1000);
    group.throughput(Throughput::Elements(3000));
    group.bench_function("scan 3,000 replies", |b| {
        b.iter(|| {
            let mut at = 0;
            while let Ok(Some((token, len))) = resp::token(black_box(&replies[at..])) {
                black_box(token);
                at += len;
            }
            assert_eq!(at, replies.len());
        });
    });
    group.finish();
    checkpoint(&mut criterion);
    criterion.final_summary();
}

/// A thousand updates of different rows, of a transaction that is over, become the state of their keys.
fn plan(group: &mut BenchmarkGroup<'_, WallTime>) {
    const ROWS: u64 = 1_000;
    let name = QualifiedName { schema: "public".to_owned(), table: "items".to_owned() };
    let column = |name: &&str| RelationColumn {
        name: (*name).to_owned(),
        type_oid: 25,
        type_modifier: -1,
        in_identity: *name == "id",
    };
    let columns = NAMES.iter().map(column).collect();
    let relation = Relation { oid: 16_385, name: name.clone(), identity: ReplicaIdentity::Default, columns };
    let spec = TableSpec {
        id: TableId(0),
        name: "items".to_owned(),
        table: name,
        key: parse_template("bench:item:{id}").expect("it is valid"),
        columns: Vec::new(),
        rename: Vec::new(),
        null: NullRule::Empty,
        ttl_ms: 86_400_000,
        format: Format::Hash,
        lookups: Vec::new(),
    };
    let mapping = Arc::new(Mapping::bind(&spec, &relation, &KnownTypes::default()).expect("it has the key's column"));
    let change = |id: u64| {
        let mut row = RowBuilder::with_capacity(100);
        row.cell(Some(id.to_string().as_bytes()));
        VALUES[1..].iter().for_each(|value| row.cell(Some(value.as_bytes())));
        Change::Update { relation: 16_385, old: None, new: NewRow::Full(row.row()) }
    };
    let changes: Vec<Change> = (0..ROWS).map(change).collect();
    group.throughput(Throughput::Elements(ROWS));
    group.bench_function("plan 1,000 updates", |b| {
        b.iter(|| {
            let mut states = KeyStates::default();
            for change in &changes {
                states.apply(&mapping, black_box(change)).expect("each has a key");
            }
            states
        });
    });
}

/// Each read over HTTP needs it; each batch writes it.
fn checkpoint(criterion: &mut Criterion) {
    let json = br#"{"system_id":"7714311709051234567","timeline":1,"database":"shop","lsn":"0/1A2B3C4","state":"streaming","epoch":1767225601,"seq":4711,"beat_ms":1767225606116,"base":"0/1A2B3C4","entries":1}"#;
    criterion.bench_function("checkpoint/read the head", |b| b.iter(|| Checkpoint::head(black_box(json))));
}
