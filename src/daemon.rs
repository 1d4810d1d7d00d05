//! The composition root: starts HTTP server and supervisor on one configuration, and stops them in order.

use crate::admin::{ASKED_HELD, Asked};
use crate::bridge::context::Context;
use crate::bridge::regenerate::{Regenerated, regenerate};
use crate::bridge::{BridgeError, supervise};
use crate::code::Code;
use crate::config::{Config, Secret};
use crate::demo;
use crate::history::{Kind, Totals};
use crate::http::{self, AdminToken};
use crate::progress::resume::Adopt;
use crate::reload::{self, Changes, Refused, Reread, Wanted};
use crate::schema::TableSpec;
use crate::status::{ChangeEvent, Level, Moment, ReadCounts, State, Status};
use crate::token::Made;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
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
/// requests of the demo's page. `reload` reads the configuration again, if it can be.
///
/// # Errors
/// At the start, one that retrying cannot fix ([`crate::error::Disposition::Stop`]), or a port that cannot be bound.
pub async fn run(
    config: Config,
    adopt: Adopt,
    stop: CancellationToken,
    demo: Option<mpsc::Sender<demo::DemoRequest>>,
    reload: Option<Reread>,
    started: impl FnOnce(Daemon),
) -> Result<(), BridgeError> {
    let address = config.http.listen;
    let listener = TcpListener::bind(address).await.map_err(|error| BridgeError::Listen { address, error })?;
    let listen = listener.local_addr().map_err(|error| BridgeError::Listen { address, error })?;
    let (ctx, status) = Context::new(config, adopt, stop.child_token());
    let mut ctx = Arc::new(ctx);
    // The token's file exists until the end, and before the address is announced.
    let (admin_token, _file) = admin_token(ctx.config.http.admin_token.as_ref(), listen);
    tracing::info!(
        listen = %listen,
        postgres = ctx.config.postgres.target.describe(),
        redis = %ctx.config.redis.target,
        slot = ctx.config.postgres.slot,
        "listening on http://{listen}"
    );
    let version = env!("CARGO_PKG_VERSION");
    ctx.history.happened(Level::Good, Kind::Started, None, format!("prefetchd {version} started"));
    let (ask, mut asked) = mpsc::channel(ASKED_HELD);
    let (reloads, mut wanted) = mpsc::channel(reload::WAITING);
    let http_stop = CancellationToken::new();
    let (contexts, served) = watch::channel(http::HttpContext {
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
        reload: reload.is_some().then(|| reloads.clone()),
        all_tables: ctx.specs.clone(),
        changed: Arc::default(),
        admin_token: admin_token.clone(),
        names: http::Names::new(listen.ip(), &ctx.config.http.hosts),
        page: http::Page { is_shown: ctx.config.http.page, demo },
    });
    let serving = tokio::spawn(http::serve(listener, served, http_stop.clone()));
    let hangups = reload.is_some().then(|| tokio::spawn(reload_on_hangup(reloads)));
    started(Daemon {
        listen,
        status,
        events: ctx.events.clone(),
        position_wanted: ctx.position_wanted.clone(),
        admin_token,
    });
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);

    let ended = loop {
        let keeping = tokio::spawn(keep_history(ctx.clone()));
        let reread = reload.as_ref().map(|reread| (reread, &mut wanted));
        let worked = until_reloaded(&ctx, &mut asked, reread, &stop, &contexts).await;
        keeping.abort();
        match worked {
            Ok(Some(next)) => (ctx, asked) = next,
            Ok(None) => break Ok(()),
            Err(error) => break Err(error),
        }
    };
    ctx.set_state(State::Stopping, None, None);
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    http_stop.cancel();
    hangups.inspect(|hangups| hangups.abort());
    // Requests that are still queued are refused.
    drop((asked, wanted));
    let _ = tokio::time::timeout(HTTP_PATIENCE, serving).await;
    if ended.is_ok() {
        tracing::info!("stopped");
    }
    ended
}

/// Works until the daemon is stopped, or until a new configuration is taken: returns what goes on with that.
async fn until_reloaded(
    ctx: &Context,
    asked: &mut mpsc::Receiver<Asked>,
    reread: Option<(&Reread, &mut mpsc::Receiver<Wanted>)>,
    stop: &CancellationToken,
    contexts: &watch::Sender<http::HttpContext>,
) -> Result<Option<(Arc<Context>, mpsc::Receiver<Asked>)>, BridgeError> {
    let Some((reread, wanted)) = reread else { return supervise::supervise(ctx, asked).await.map(|()| None) };
    let mut work = pin!(supervise::supervise(ctx, asked));
    loop {
        let answer = tokio::select! {
            ended = &mut work => return ended.map(|()| None),
            Some(answer) = wanted.recv() => answer,
        };
        let regenerated = tokio::select! {
            ended = &mut work => return ended.map(|()| None),
            regenerated = regenerate(ctx, reread, stop.child_token()) => regenerated,
        };
        say_reloaded(ctx, &regenerated);
        // Whoever asked by HTTP may be gone.
        let answers = |answered| answer.map(|answer| answer.send(answered));
        match regenerated {
            Err(refused) => _ = answers(Err(refused)),
            Ok(Regenerated { changes, next: None }) => _ = answers(Ok(changes)),
            Ok(Regenerated { changes, next: Some(next) }) => {
                // Before the session ends, so that readers see neither the end nor the beginning.
                let asked = serve_with(&next, ctx, &changes, contexts);
                ctx.is_replaced();
                match work.await {
                    Ok(()) => {}
                    // It is delivered again. What Redis has is not known before that.
                    Err(BridgeError::NotDrained(_)) => ctx.update(|status| status.fresh_as_of = None),
                    Err(error) => return Err(error),
                }
                next.follows(ctx);
                answers(Ok(changes));
                return Ok(Some((next, asked)));
            }
        }
    }
}

fn say_reloaded(ctx: &Context, regenerated: &Result<Regenerated, Refused>) {
    match regenerated {
        Err(Refused { reasons }) => {
            let reasons = reasons.join("; ");
            let code = Code::InvalidConfiguration.as_str();
            tracing::error!(code, reasons, "the configuration was read again and is refused, the old one stays");
            let text = format!("a new configuration was refused: {reasons}");
            ctx.history.happened(Level::Bad, Kind::Operator, None, text);
        }
        Ok(Regenerated { changes, .. }) => {
            let text = changes.text();
            tracing::info!("the configuration was read again: {text}");
            ctx.history.happened(Level::Good, Kind::Operator, None, format!("reloaded: {text}"));
        }
    }
}

/// Lets HTTP use the next context. Returns what is asked from then on: what was asked before names the old tables, by their
/// places, and must not reach the session of the new ones.
fn serve_with(
    next: &Context,
    before: &Context,
    changes: &Changes,
    contexts: &watch::Sender<http::HttpContext>,
) -> mpsc::Receiver<Asked> {
    let (ask, asked) = mpsc::channel(ASKED_HELD);
    contexts.send_modify(|context| {
        let is_new = |spec: &&TableSpec| !context.all_tables.iter().any(|known| known.is_like(spec));
        let new = next.specs.iter().filter(is_new);
        context.all_tables = context.all_tables.iter().chain(new).cloned().collect();
        context.changed = Arc::new((changes.changed.clone(), before.sightings.newest().0));
        (context.tables, context.metrics) = (next.specs.clone(), next.metrics.clone());
        (context.ask, context.max_staleness) = (ask, next.config.cache.max_staleness);
    });
    asked
}

/// Asks for a reload with each SIGHUP.
async fn reload_on_hangup(reloads: mpsc::Sender<Wanted>) {
    let mut hangups = match signal(SignalKind::hangup()) {
        Ok(hangups) => hangups,
        Err(error) => {
            let code = Code::Internal.as_str();
            return tracing::warn!(code, %error, "SIGHUP cannot be received: reload with prefetchd reload");
        }
    };
    while hangups.recv().await.is_some() {
        // One that waits will read the same.
        let _ = reloads.try_send(None);
    }
}

const SECOND: Duration = Duration::from_secs(1);
/// A tick that is later than this is reported: nothing here takes that long, so the process stood still.
const STOOD_STILL: Duration = Duration::from_secs(5);

/// Records a figure a second.
async fn keep_history(ctx: Arc<Context>) {
    let (metrics, history, status) = (&ctx.metrics, &ctx.history, ctx.watch_status());
    let mut level = None;
    let mut second = tokio::time::interval(SECOND);
    second.set_missed_tick_behavior(MissedTickBehavior::Delay);
    // The first one is at once.
    second.tick().await;
    let mut last = Instant::now();
    loop {
        second.tick().await;
        let stood = last.elapsed().saturating_sub(SECOND);
        last = Instant::now();
        if stood > STOOD_STILL {
            let text = format!(
                "this process did not run for {} s: it was stopped, or its machine had no time for it",
                stood.as_secs()
            );
            tracing::warn!(code = Code::StoodStill.as_str(), "{text}");
            history.happened(Level::Warning, Kind::Interrupted, None, text);
        }
        let (hits, misses) = metrics.read_counts().iter().fold((0, 0), |(h, m), of| (h + of.hits, m + of.misses));
        let totals = Totals { reads: ReadCounts { hits, misses }, errors: metrics.read_errors() };
        let status = Arc::clone(&status.borrow());
        let now = Moment::now();
        history.second(&status, totals, now);
        let verdict = status.verdict(now, ctx.config.cache.max_staleness);
        if level.replace(verdict.level).is_some_and(|before| before != verdict.level) {
            let level = verdict.level.as_str();
            match verdict.level {
                Level::Bad => {
                    let code = verdict.code.unwrap_or(Code::NotReady).as_str();
                    tracing::error!(code, verdict = level, "{}", verdict.text);
                }
                Level::Good | Level::Warning => tracing::info!(verdict = level, "{}", verdict.text),
            }
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
            tracing::warn!(code = Code::AdminToken.as_str(), "{text}");
            (AdminToken::None(text.into()), None)
        }
    }
}
