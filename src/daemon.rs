//! The composition root: starts HTTP server and supervisor on one configuration, and stops them in order.

use crate::admin::ASKED_HELD;
use crate::bridge::context::Context;
use crate::bridge::{BridgeError, supervise};
use crate::config::{Config, Secret};
use crate::demo;
use crate::history::{History, Kind, Totals};
use crate::http::{self, AdminToken};
use crate::metrics::Metrics;
use crate::progress::resume::Adopt;
use crate::status::{ChangeEvent, Level, Moment, ReadCounts, State, Status};
use crate::token::Made;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::{Notify, broadcast, mpsc, watch};
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

/// How long the HTTP server may take to finish its responses after the stop.
const HTTP_PATIENCE: Duration = Duration::from_secs(2);

/// A running daemon, as others in the same process see it.
#[derive(Clone)]
pub struct Daemon {
    pub listen: SocketAddr,
    pub status: watch::Receiver<Arc<Status>>,
    pub events: broadcast::Sender<ChangeEvent>,
    /// When notified, the daemon asks Postgres for its position at once.
    pub position_wanted: Arc<Notify>,
    pub admin_token: AdminToken,
}

/// Runs the daemon until `stop`, then drains. `started` is called once, when the HTTP server listens. `demo` receives the
/// requests of the demo's page.
///
/// # Errors
/// At the start, one that retrying cannot fix ([`crate::error::Disposition::Stop`]), or a port that cannot be bound.
pub async fn run(
    config: Config,
    adopt: Adopt,
    stop: CancellationToken,
    demo: Option<mpsc::Sender<demo::DemoRequest>>,
    started: impl FnOnce(Daemon),
) -> Result<(), BridgeError> {
    let address = config.http.listen;
    let listener = TcpListener::bind(address).await.map_err(|error| BridgeError::Listen { address, error })?;
    let listen = listener.local_addr().map_err(|error| BridgeError::Listen { address, error })?;
    let (ctx, status) = Context::new(config, adopt, stop);
    // The token's file exists until the end, and before the address is announced.
    let (admin_token, _file) = admin_token(ctx.config.http.admin_token.as_ref(), listen);
    tracing::info!(
        listen = %listen,
        postgres = ctx.config.postgres.target.describe(),
        redis = %ctx.config.redis.target,
        slot = ctx.config.postgres.slot,
        "listening on http://{listen}"
    );
    let (ask, mut asked) = mpsc::channel(ASKED_HELD);
    let http_stop = CancellationToken::new();
    let serving = tokio::spawn(http::serve(
        listener,
        http::HttpContext {
            status: status.clone(),
            reader: ctx.reader.clone(),
            sightings: ctx.sightings.clone(),
            tables: ctx.specs.clone(),
            metrics: ctx.metrics.clone(),
            history: ctx.history.clone(),
            events: ctx.events.clone(),
            position_wanted: ctx.position_wanted.clone(),
            max_staleness: ctx.config.cache.max_staleness,
            ask,
            admin_token: admin_token.clone(),
            names: http::Names::new(listen.ip(), &ctx.config.http.hosts),
            page: http::Page { is_shown: ctx.config.http.page, demo },
        },
        http_stop.clone(),
    ));
    let keeping = tokio::spawn(keep_history(
        ctx.history.clone(),
        status.clone(),
        ctx.metrics.clone(),
        ctx.config.cache.max_staleness,
    ));
    started(Daemon {
        listen,
        status,
        events: ctx.events.clone(),
        position_wanted: ctx.position_wanted.clone(),
        admin_token,
    });
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);

    let ended = supervise::supervise(&ctx, &mut asked).await;
    ctx.set_state(State::Stopping, None);
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    http_stop.cancel();
    keeping.abort();
    // Requests that are still queued are refused.
    drop(asked);
    let _ = tokio::time::timeout(HTTP_PATIENCE, serving).await;
    if ended.is_ok() {
        tracing::info!("stopped");
    }
    ended
}

/// Records a figure a second.
async fn keep_history(
    history: Arc<History>,
    status: watch::Receiver<Arc<Status>>,
    metrics: Arc<Metrics>,
    max_staleness: Duration,
) {
    let mut level = None;
    let version = env!("CARGO_PKG_VERSION");
    history.happened(Level::Good, Kind::Started, None, format!("prefetchd {version} started"));
    let mut second = tokio::time::interval(Duration::from_secs(1));
    second.set_missed_tick_behavior(MissedTickBehavior::Delay);
    // The first one is at once.
    second.tick().await;
    loop {
        second.tick().await;
        let (hits, misses) = metrics.read_counts().iter().fold((0, 0), |(h, m), of| (h + of.hits, m + of.misses));
        let totals = Totals { reads: ReadCounts { hits, misses }, errors: metrics.read_errors() };
        let status = Arc::clone(&status.borrow());
        let now = Moment::now();
        history.second(&status, totals, now);
        let verdict = status.verdict(now, max_staleness);
        if level.replace(verdict.level).is_some_and(|before| before != verdict.level) {
            tracing::info!(verdict = verdict.level.as_str(), "{}", verdict.text);
        }
    }
}

/// If no token is configured one is generated, and stays in its file until that is dropped.
fn admin_token(configured: Option<&Secret>, listen: SocketAddr) -> (AdminToken, Option<Made>) {
    if let Some(token) = configured {
        return (AdminToken::Configured(token.expose().into()), None);
    }
    match Made::make(listen) {
        Ok(made) => {
            tracing::info!("administration takes the token in {}", made.path().display());
            (AdminToken::Made(made.token().into()), Some(made))
        }
        Err(why) => {
            let text = format!(
                "administration is refused, since there is no token for it: http.admin_token_file is not set, and none \
                 could be made ({why}): set it, or RUNTIME_DIRECTORY to a directory of prefetchd's own"
            );
            tracing::warn!("{text}");
            (AdminToken::None(text.into()), None)
        }
    }
}
