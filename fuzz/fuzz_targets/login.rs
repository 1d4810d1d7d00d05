//! Any sequence of messages is a login or an error. No login succeeds without the server's consent or, if required,
//! without channel binding, and then a password is never sent in clear text.
//!
//! The first byte selects the credentials; the rest are messages of the server.

#![no_main]

use bytes::BytesMut;
use libfuzzer_sys::fuzz_target;
use postgres_protocol::message::backend::Message;
use prefetchd::source::login::{Credentials, Login, Step};
use prefetchd::source::target::ChannelBinding;

fuzz_target!(|data: &[u8]| {
    let Some((&who, messages)) = data.split_first() else { return };
    let required = who & 1 != 0;
    let credentials = Credentials {
        user: "somebody".to_owned(),
        password: (who & 2 == 0).then(|| "hunter2".to_owned()),
        channel_binding: if required { ChannelBinding::Require } else { ChannelBinding::Prefer },
        end_point: (who & 4 == 0).then(|| vec![7; 32]),
    };
    let mut login = Login::new("here".to_owned(), credentials);
    let mut messages = BytesMut::from(messages);
    let mut let_in = false;
    while let Ok(Some(message)) = Message::parse(&mut messages) {
        let consent = matches!(message, Message::AuthenticationOk);
        match login.take(message) {
            Ok(Step::LoggedIn { .. }) => {
                assert!(let_in && !required, "no server that knows no password can prove that it does");
                return;
            }
            Ok(Step::Send(answer)) => {
                let is_clear = answer.windows(7).any(|bytes| bytes == b"hunter2");
                assert!(!required || !is_clear && answer.windows(18).any(|bytes| bytes == b"SCRAM-SHA-256-PLUS"));
            }
            Ok(Step::Wait) => let_in |= consent,
            Err(_) => return,
        }
    }
});
