//! `prefetchd page`: prints the address of the running daemon's status page, including the admin token.
//!
//! The token is in the fragment, which browsers do not send; the page reads it there.

use super::client::{Client, ClientError, Door};
use super::{Failure, print};
use crate::code::Code;
use clap::Args;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use std::path::Path;

/// Leaves unescaped what a fragment may contain. <https://www.rfc-editor.org/rfc/rfc3986#section-3.5>
const FRAGMENT: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

#[derive(Debug, Args)]
pub(super) struct PageArgs {
    /// Address of the daemon [default: from http.listen]
    #[arg(long, value_name = "URL")]
    url: Option<String>,
}

pub(super) fn run(file: Option<&Path>, args: &PageArgs) -> Result<(), Failure> {
    let client = Client::new(file, args.url.as_deref())?;
    match client.get("/")?.status().as_u16() {
        200 => {}
        404 => {
            let text = format!("{} has no page: set http.page = true", client.base);
            return Err(Failure::work(Code::PageDisabled, text));
        }
        status => return Err(ClientError::by_a_stranger(&format!("{}/", client.base), status).into()),
    }
    let Door { base, token } = client.door();
    let token = token.map_err(|why| Failure::work(Code::AdminToken, format!("no token for {base}: {why}")))?;
    print(&format!("{}\n", address(&base, token.expose())))
}

/// Returns the address of the page at `base`.
pub(super) fn address(base: &str, token: &str) -> String {
    format!("{base}/#token={}", utf8_percent_encode(token, FRAGMENT))
}
