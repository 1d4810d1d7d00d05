//! What a row of seven columns costs in each step between the sockets: decoding it from the stream and from COPY, encoding
//! it for Redis, scanning the replies, reading the checkpoint. Compare with an earlier run: `--save-baseline NAME`, later
//! `--baseline NAME`.

use bytes::{Bytes, BytesMut};
use criterion::{BatchSize, Criterion, Throughput};
use prefetchd::change::{Row, RowBuilder};
use prefetchd::checkpoint::Checkpoint;
use prefetchd::command::Key;
use prefetchd::format::Form;
use prefetchd::resp::batch::Limits;
use prefetchd::resp::{self, packed::Packing};
use prefetchd::schema::{Field, Layout, NullRule, Render};
use prefetchd::source::pgoutput;
use prefetchd::source::snapshot::parse_copy_line;
use std::hint::black_box;

const NAMES: [&str; 7] = ["id", "name", "category", "price", "stock", "active", "updated_at"];
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
    for (name, limits) in [("encode as DEL, HSET, PEXPIRE", plain), ("encode as RESTORE", packed)] {
        let mut out = BytesMut::with_capacity(1 << 20);
        group.bench_function(name, |b| {
            b.iter(|| {
                out.clear();
                resp::put(&mut out, black_box(&key), &layout, &row, &limits).expect("it is small")
            });
        });
    }

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

/// Each read over HTTP needs it; each batch writes it.
fn checkpoint(criterion: &mut Criterion) {
    let json = br#"{"system_id":"7714311709051234567","timeline":1,"database":"shop","lsn":"0/1A2B3C4","state":"streaming","epoch":1767225601,"seq":4711,"beat_ms":1767225606116,"base":"0/1A2B3C4","entries":1}"#;
    criterion.bench_function("checkpoint/read the head", |b| b.iter(|| Checkpoint::head(black_box(json))));
}
