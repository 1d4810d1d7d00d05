//! `prefetchd run`: runs the daemon in the foreground until a signal. The demo runs the same way.

use super::{Failure, RUNTIME_PATIENCE, demo, exit_code, runtime};
use crate::bridge::BridgeError;
use crate::code::Code;
use crate::config::{Config, LogFormat, LogSettings, Warning};
use crate::daemon;
use crate::progress::resume::Adopt;
use crate::reload::Reread;
use crate::telemetry;
use clap::Args;
use std::path::Path;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

#[derive(Debug, Default, Args)]
pub(super) struct RunArgs {
    /// Accept a Postgres system or database other than the one named in Redis's checkpoint, and load from it
    #[arg(long)]
    adopt: bool,
}

pub(super) fn run(file: Option<&Path>, args: &RunArgs) -> Result<(), Failure> {
    let config = Config::load(file)?;
    telemetry::init(&config.log);
    for Warning { code, text } in &config.warnings {
        tracing::warn!(code = code.as_str(), "{text}");
    }
    let path = file.map(Path::to_owned);
    let reread: Reread = Box::new(move || Config::load(path.as_deref()));
    let adopt = if args.adopt { Adopt::Accept } else { Adopt::Refuse };
    until_a_signal(async |stop| {
        // As a task of its own, because messages between the blocked main thread and the other tasks would switch
        // threads.
        let daemon = tokio::spawn(daemon::run(config, adopt, stop, None, Some(reread), |_| {}));
        let ended =
            daemon.await.map_err(|error| Failure::work(Code::Internal, format!("the daemon failed: {error}")))?;
        ended.map_err(|error| {
            match &error {
                // Nothing is lost.
                BridgeError::NotDrained(_) => tracing::warn!(code = error.code().as_str(), "{error}"),
                _ => tracing::error!(code = error.code().as_str(), "{error}"),
            }
            Failure::silent(exit_code(error.disposition()))
        })
    })
}

pub(super) fn demo(args: demo::Args) -> Result<(), Failure> {
    // The demo prints what happens in its own words.
    telemetry::init(&LogSettings { level: "warn".to_owned(), format: LogFormat::Text });
    until_a_signal(async |stop| {
        let ended = demo::run(args, stop).await;
        ended.map_err(|error| Failure::of(error.disposition(), error.code(), error.to_string()))
    })
}

/// Runs the work on a new runtime, with a token that SIGTERM or SIGINT cancels.
fn until_a_signal(work: impl AsyncFnOnce(CancellationToken) -> Result<(), Failure>) -> Result<(), Failure> {
    let runtime = runtime()?;
    let ended = runtime.block_on(async {
        let stop = CancellationToken::new();
        // Before anything is started, so that from here on a signal drains.
        let signals = signal(SignalKind::terminate()).and_then(|term| Ok((term, signal(SignalKind::interrupt())?)));
        let (terminate, interrupt) =
            signals.map_err(|error| Failure::work(Code::Internal, format!("signals cannot be received: {error}")))?;
        tokio::spawn(stop_on_signal(terminate, interrupt, stop.clone()));
        work(stop).await
    });
    runtime.shutdown_timeout(RUNTIME_PATIENCE);
    ended
}

/// The first signal drains. The second ends the process at once, which is safe because everything confirmed is in
/// Redis.
async fn stop_on_signal(mut terminate: Signal, mut interrupt: Signal, stop: CancellationToken) {
    let mut next = async || {
        tokio::select! {
            _ = terminate.recv() => "SIGTERM",
            _ = interrupt.recv() => "SIGINT",
        }
    };
    let signal = next().await;
    tracing::info!(signal, "stopping, a second signal exits at once");
    stop.cancel();
    let signal = next().await;
    tracing::warn!(code = Code::NotDrained.as_str(), signal, "exiting before everything was drained");
    std::process::exit(1);
}
