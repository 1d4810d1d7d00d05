//! Any sequence of CopyData bodies is delivered in order or rejected, and what is rejected delivers nothing.
//!
//! The input is split into bodies by a two-byte length before each.

#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use prefetchd::change::Delivery;
use prefetchd::schema::QualifiedName;
use prefetchd::source::assemble::Assembler;
use std::collections::HashSet;

fuzz_target!(|data: &[u8]| {
    let (mut assembler, mut out, mut rest) = (Assembler::new(followed()), Vec::new(), data);
    while let Some((length, behind)) = rest.split_first_chunk::<2>() {
        let (frame, behind) = behind.split_at(behind.len().min(u16::from_be_bytes(*length).into()));
        rest = behind;
        let before = out.len();
        // As for a large one whose head has arrived.
        if frame.len() > 64 && assembler.is_foreign(&frame[..64]) {
            if assembler.pass_over(&frame[..64], &mut out).is_err() {
                assert_eq!(out.len(), before);
                break;
            }
            continue;
        }
        if assembler.take(Bytes::copy_from_slice(frame), &mut out).is_err() {
            assert_eq!(out.len(), before);
            break;
        }
    }
    let mut open = false;
    for delivery in &out {
        match delivery {
            Delivery::Begin(_) => assert!(!std::mem::replace(&mut open, true)),
            Delivery::Commit { .. } => assert!(std::mem::replace(&mut open, false)),
            Delivery::Relation(_) | Delivery::Change(_) => assert!(open),
            Delivery::Position(_) => assert!(!open),
            Delivery::Mark(_) => {}
        }
    }
});

fn followed() -> HashSet<QualifiedName> {
    ["t", ""].map(|table| QualifiedName { schema: "public".to_owned(), table: table.to_owned() }).into()
}
