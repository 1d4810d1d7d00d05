//! Any line of COPY is a row with the requested number of cells or an error, and a row survives what COPY TO would
//! write for it.

#![no_main]

use libfuzzer_sys::fuzz_target;
use prefetchd::change::RowBuilder;
use prefetchd::source::snapshot::parse_copy_line;

fuzz_target!(|data: &[u8]| {
    let Some((&cells, line)) = data.split_first() else { return };
    let cells = usize::from(cells % 8);
    let mut row = RowBuilder::with_capacity(line.len());
    if parse_copy_line(line, cells, &mut row).is_ok() {
        let row = row.row();
        assert_eq!(row.cells().count(), cells);
        let mut again = RowBuilder::with_capacity(line.len());
        parse_copy_line(&copied(row.cells()), cells, &mut again).expect("as COPY TO writes it");
        assert_eq!(again.row(), row);
    }
});

/// As COPY TO writes it: <https://www.postgresql.org/docs/current/sql-copy.html#id-1.9.3.55.9.2>
fn copied<'a>(cells: impl Iterator<Item = Option<&'a [u8]>>) -> Vec<u8> {
    let mut line = Vec::new();
    for (at, cell) in cells.enumerate() {
        if at > 0 {
            line.push(b'\t');
        }
        let Some(text) = cell else {
            line.extend_from_slice(b"\\N");
            continue;
        };
        for &byte in text {
            match byte {
                0x08 => line.extend_from_slice(b"\\b"),
                b'\t' => line.extend_from_slice(b"\\t"),
                b'\n' => line.extend_from_slice(b"\\n"),
                0x0b => line.extend_from_slice(b"\\v"),
                0x0c => line.extend_from_slice(b"\\f"),
                b'\r' => line.extend_from_slice(b"\\r"),
                b'\\' => line.extend_from_slice(b"\\\\"),
                other => line.push(other),
            }
        }
    }
    line
}
