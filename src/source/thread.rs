//! The thread of the replication session, which opens its socket and reads it.
//!
//! A runtime watches its sockets on whichever of its threads is idle. On the daemon's runtime, each message of a walsender
//! would wake that thread, also while the reader pauses to let a few messages accumulate ([`super::pace`]). Under a backlog
//! that would cost the walsender and the daemon more than the messages themselves. This thread has a runtime of its own,
//! so that nobody watches the socket while it pauses.

use std::io;
use std::sync::LazyLock;
use tokio::runtime::{Builder, Handle, Runtime};
use tokio_util::task::AbortOnDropHandle;
use tracing::Instrument;

static RUNTIME: LazyLock<io::Result<Runtime>> =
    LazyLock::new(|| Builder::new_multi_thread().worker_threads(1).thread_name("stream").enable_all().build());

/// Runs `task` there, until it ends or what is returned is dropped.
pub fn spawn<T: Send + 'static>(task: impl Future<Output = T> + Send + 'static) -> AbortOnDropHandle<T> {
    // Without a thread of its own it is only slower.
    let handle = RUNTIME.as_ref().map_or_else(|_| Handle::current(), |runtime| runtime.handle().clone());
    AbortOnDropHandle::new(handle.spawn(task.in_current_span()))
}
