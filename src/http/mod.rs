//! Reads, health, metrics, events and the status page over HTTP.
//!
//! Rows come from Redis only: this layer must not know Postgres, nor write anything; operations are passed on. What a
//! read may promise follows from the checkpoint that is read in the same MULTI; the status only adds how old the last
//! contact with Postgres is. A mistake here returns 404 for a row that exists, or presents an old row as current.

mod admin;
mod app;
mod connection;
mod cursor;
mod demo;
mod describe;
mod events;
mod file;
mod guesses;
mod history;
mod list;
mod log;
mod memo;
mod names;
mod ops;
mod page;
mod places;
mod read;
pub mod refusal;
mod render;
mod site;
mod standing;
pub mod target;

pub use app::{AdminToken, HttpContext, Page};
pub use connection::HttpLimits;
pub use names::Names;

use app::{App, Held};
use guesses::Guesses;
use list::TableLists;
use memo::Memo;
use places::{Batches, Places};
use site::Site;
use std::sync::Arc;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Serves until `stop`; returns when requests in flight have ended, at most 2 s later. A new context is used by every
/// request after it; event streams end, and begin anew with it.
pub async fn serve(listener: TcpListener, contexts: watch::Receiver<HttpContext>, stop: CancellationToken) {
    serve_within(HttpLimits::default(), listener, contexts, stop).await;
}

/// [`serve`] with other limits.
pub async fn serve_within(
    limits: HttpLimits,
    listener: TcpListener,
    mut contexts: watch::Receiver<HttpContext>,
    stop: CancellationToken,
) {
    let context = contexts.borrow_and_update().clone();
    let held = Arc::new(Held {
        places: Places::new(&limits),
        guesses: Guesses::new(),
        batches: Batches::new(&context.reader),
        limits: limits.clone(),
    });
    let generation = |context: HttpContext, replaced: CancellationToken| {
        let lists = context.tables.iter().map(TableLists::of).collect();
        let marks = context.tables.iter().map(|_| Memo::default()).collect();
        let (heads, held, stop) = (Memo::default(), Arc::clone(&held), stop.clone());
        Site::new(Arc::new(App { context, held, heads, marks, lists, stop, replaced }))
    };
    let mut replaced = stop.child_token();
    let (sites, current) = watch::channel(generation(context, replaced.clone()));
    let follow = async {
        while contexts.changed().await.is_ok() {
            let before = std::mem::replace(&mut replaced, stop.child_token());
            let _before = sites.send_replace(generation(contexts.borrow_and_update().clone(), replaced.clone()));
            before.cancel();
        }
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = connection::serve(listener, current, &limits, &stop) => {}
        () = follow => {}
    }
}
