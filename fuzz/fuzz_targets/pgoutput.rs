//! Any bytes are a pgoutput message or an error, and a message's rows can be walked to their end.

#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use prefetchd::change::{NewRow, Row};
use prefetchd::source::pgoutput::{Message, message};

fuzz_target!(|data: &[u8]| {
    match message(Bytes::copy_from_slice(data)) {
        Ok(Message::Insert { new, .. }) => walk_new(&new),
        Ok(Message::Update { old, new, .. }) => {
            old.iter().for_each(|old| walk(old.row()));
            walk_new(&new);
        }
        Ok(Message::Delete { old, .. }) => walk(old.row()),
        Ok(_) | Err(_) => {}
    }
});

fn walk_new(row: &NewRow) {
    match row {
        NewRow::Full(row) => walk(row),
        NewRow::Partial(row) => assert_eq!(row.cells().count(), row.cells().len()),
    }
}

fn walk(row: &Row) {
    assert_eq!(row.cells().count(), row.cells().len());
}
