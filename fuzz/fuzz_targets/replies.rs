//! Any bytes are replies or an error, however they are split; and the scanner accepts what passes the bounds.

#![no_main]

use libfuzzer_sys::fuzz_target;
use prefetchd::resp::{Malformed, Token, token};
use prefetchd::sink::ErrorReply;
use prefetchd::sink::bounds::ReplyBounds;
use prefetchd::sink::replies::{Replies, Transaction};
use std::ops::ControlFlow;

fuzz_target!(|data: &[u8]| {
    let Some((&kind, replies)) = data.split_first() else { return };
    let number = usize::from(kind % 4);
    let mut plain = Replies::new(number + 1);
    let scanned = scan(replies, |token| plain.take(token));
    let mut transaction = Transaction::new(number, 1);
    let _ = scan(replies, |token| transaction.take(token));
    let _ = (transaction.not_queued(), transaction.finish());

    let cut = (1 + usize::from(kind >> 2)).min(replies.len());
    let (mut whole, mut pieces) = (ReplyBounds::new(0, 1 << 20), ReplyBounds::new(0, 1 << 20));
    let passed = whole.follow(replies);
    assert_eq!(replies.chunks(cut.max(1)).try_for_each(|piece| pieces.follow(piece)), passed);
    // What is complete and within the bounds is valid for both or for neither.
    if let (Ok(_), Err(error)) = (&scanned, &passed) {
        assert!(
            scanned == Ok(ControlFlow::Break(())) || matches!(error, Malformed::TooLong(_) | Malformed::Length),
            "{error}"
        );
    }
    let _ = ErrorReply::received(replies).without(replies, Some("hunter2")).to_string();
});

fn scan(
    mut rest: &[u8],
    mut take: impl FnMut(Token<'_>) -> Result<ControlFlow<()>, Malformed>,
) -> Result<ControlFlow<()>, Malformed> {
    while let Some((token, length)) = token(rest)? {
        rest = &rest[length..];
        if take(token)?.is_break() {
            return Ok(ControlFlow::Break(()));
        }
    }
    Ok(ControlFlow::Continue(()))
}
