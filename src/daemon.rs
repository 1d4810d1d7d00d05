//! The composition root: binds the HTTP side, the metrics and the supervisor to one configuration, and takes them down again.

use crate::admin::ASKED_HELD;
use crate::bridge::context::Context;
use crate::bridge::{BridgeError, supervise};
use crate::config::{Config, Secret};
use crate::demo;
use crate::http::{self, AdminToken};
use crate::progress::resume::Adopt;
use crate::status::{ChangeEvent, State, Status};
use crate::token::Made;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::{Notify, broadcast, mpsc, watch};
use tokio_util::sync::CancellationToken;

/// After the stop, the HTTP side has this long to finish its answers.
const HTTP_PATIENCE: Duration = Duration::from_secs(2);

/// A daemon that runs: what others in the same process may look at.
#[derive(Clone)]
pub struct Daemon {
    pub listen: SocketAddr,
    pub status: watch::Receiver<Arc<Status>>,
    pub events: broadcast::Sender<ChangeEvent>,
    /// Notified: Postgres is asked for its position now.
    pub position_wanted: Arc<Notify>,
    pub admin_token: AdminToken,
}

/// Runs the daemon until `stop`, then drains. `started` is called once, when HTTP listens. `demo` is asked what the page
/// of a demo asks for.
///
/// # Errors
/// What retrying cannot fix at the start: [`crate::error::Disposition::Stop`]; or a port that cannot be had.
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
    // Its file is there until the end, and before anybody is told where to ask.
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
    // Nobody answers those any more.
    drop(asked);
    let _ = tokio::time::timeout(HTTP_PATIENCE, serving).await;
    if ended.is_ok() {
        tracing::info!("stopped");
    }
    ended
}

/// Where none is configured one is made, and lies in its file until that is dropped.
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
