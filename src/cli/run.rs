//! `prefetchd run`: the daemon in the foreground, until a signal. The demo runs in the same way.

use super::{EX_CONFIG, Failure, RUNTIME_PATIENCE, demo, runtime};
use crate::bridge::BridgeError;
use crate::config::{Config, LogFormat, LogSettings};
use crate::daemon;
use crate::error::Disposition;
use crate::progress::resume::Adopt;
use crate::telemetry;
use clap::Args;
use std::path::Path;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

#[derive(Debug, Default, Args)]
pub(super) struct RunArgs {
    /// Accept another Postgres system or database than the checkpoint in Redis names, and load from it
    #[arg(long)]
    adopt: bool,
}

pub(super) fn run(file: Option<&Path>, args: &RunArgs) -> Result<(), Failure> {
    let config = Config::load(file)?;
    telemetry::init(&config.log);
    for warning in &config.warnings {
        tracing::warn!("{warning}");
    }
    let adopt = if args.adopt { Adopt::Accept } else { Adopt::Refuse };
    until_a_signal(async |stop| {
        // Among the others: to the thread that waits here, every message between tasks would be a switch of threads.
        let daemon = tokio::spawn(daemon::run(config, adopt, stop, None, |_| {}));
        let ended = daemon.await.map_err(|error| Failure::work(format!("the daemon failed: {error}")))?;
        ended.map_err(|error| {
            match &error {
                // Nothing is lost.
                BridgeError::NotDrained(_) => tracing::warn!("{error}"),
                _ => tracing::error!("{error}"),
            }
            Failure { code: code(error.disposition()), message: None }
        })
    })
}

pub(super) fn demo(args: demo::Args) -> Result<(), Failure> {
    // The demo tells what happens in its own words.
    telemetry::init(&LogSettings { level: "warn".to_owned(), format: LogFormat::Text });
    until_a_signal(async |stop| {
        demo::run(args, stop)
            .await
            .map_err(|error| Failure { code: code(error.disposition()), message: Some(error.to_string()) })
    })
}

fn code(disposition: Disposition) -> u8 {
    match disposition {
        Disposition::Stop => EX_CONFIG,
        Disposition::Retry | Disposition::Reload => 1,
    }
}

/// Does the work on threads of its own. It gets a token that SIGTERM or SIGINT cancels.
fn until_a_signal(work: impl AsyncFnOnce(CancellationToken) -> Result<(), Failure>) -> Result<(), Failure> {
    let runtime = runtime()?;
    let ended = runtime.block_on(async {
        let stop = CancellationToken::new();
        // Before anything is begun: from here on a signal drains.
        let signals = signal(SignalKind::terminate()).and_then(|term| Ok((term, signal(SignalKind::interrupt())?)));
        let (terminate, interrupt) =
            signals.map_err(|error| Failure::work(format!("signals cannot be received: {error}")))?;
        tokio::spawn(stop_on_signal(terminate, interrupt, stop.clone()));
        work(stop).await
    });
    runtime.shutdown_timeout(RUNTIME_PATIENCE);
    ended
}

/// The first signal drains. The second ends the process where it stands: what was acknowledged is safe at any moment.
async fn stop_on_signal(mut terminate: Signal, mut interrupt: Signal, stop: CancellationToken) {
    let mut next = async || {
        tokio::select! {
            _ = terminate.recv() => "SIGTERM",
            _ = interrupt.recv() => "SIGINT",
        }
    };
    let signal = next().await;
    tracing::info!(signal, "stopping, a second signal ends at once");
    stop.cancel();
    let signal = next().await;
    tracing::warn!(signal, "ended before everything was drained");
    std::process::exit(1);
}
