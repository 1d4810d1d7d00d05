//! Any sequence of CopyData bodies is delivered in order or refused, and what is refused delivers nothing.
//!
//! The input is cut into bodies by a length of two bytes before each.

#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use prefetchd::change::Delivery;
use prefetchd::source::assemble::Assembler;

fuzz_target!(|data: &[u8]| {
    let (mut assembler, mut out, mut rest) = (Assembler::new(), Vec::new(), data);
    while let Some((length, behind)) = rest.split_first_chunk::<2>() {
        let (frame, behind) = behind.split_at(behind.len().min(u16::from_be_bytes(*length).into()));
        rest = behind;
        let before = out.len();
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
