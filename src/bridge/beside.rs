//! The tasks of a session beside its stream: the loader, the renewal of TTLs, the checks of the catalog and of
//! evictions, the samples, and the check of durability.
//!
//! Each sends its results through a channel of its own, and ends the session when it fails. Here they are only started.

use super::catalog::Publishing;
use super::connections::Connections;
use super::context::Context;
use super::durable::Durable;
use super::load::{self, Means, Pieces};
use super::sampler::Sampler;
use super::{BridgeError, catalog, durable, evictions, renew};
use crate::checkpoint::Checkpoint;
use crate::config::Create;
use crate::lsn::EndLsn;
use crate::resp::batch::Limits;
use crate::schema::TableId;
use crate::session::load_messages::{CatalogSeen, Floors, FromLoad, LoadOrder, RenewalPage};
use crate::sink::any_syncer::AnySyncer;
use crate::source::connect::PostgresClient;
use crate::source::limits::Opens;
use crate::source::snapshot::Sample;
use crate::source::stream::Contact;
use std::sync::Arc;
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::task::JoinSet;

/// Chunks that may be queued between the loader and the machine.
const CHUNKS_IN_CHANNEL: usize = 2;

/// The tasks, and what they send.
pub struct Beside {
    pub tasks: JoinSet<Result<(), BridgeError>>,
    pub load: mpsc::Receiver<FromLoad>,
    /// A page, and where to report that its keys have been renewed.
    pub renewals: mpsc::Receiver<(RenewalPage, oneshot::Sender<()>)>,
    pub catalog: mpsc::Receiver<(TableId, CatalogSeen)>,
    /// How many keys Redis has evicted.
    pub evictions: mpsc::Receiver<u64>,
    pub samples: mpsc::Receiver<Sample>,
    pub durable: mpsc::Receiver<Durable>,
}

/// What the session tells the tasks.
pub struct Orders {
    pub load: mpsc::UnboundedSender<LoadOrder>,
    /// A lower bound of what the snapshot of each read in progress has seen.
    pub floors: Floors,
    /// What Redis has acknowledged everywhere, once that is known. `None` if it need not be found out whether it is durable.
    pub acknowledged: Option<watch::Sender<Option<EndLsn>>>,
    /// Notified when a sample is wanted immediately.
    pub sample_now: Arc<Notify>,
    /// The connections to Postgres that the tasks share.
    pub connections: Connections,
}

/// What the tasks take over from a session that begins.
pub struct FromSession<'a> {
    /// For the sampler: reads like every other connection of [`Orders::connections`].
    pub client: PostgresClient,
    /// `None` if Redis's memory is durable enough.
    pub syncer: Option<AnySyncer>,
    /// Templates of earlier configurations.
    pub retired: Vec<String>,
    pub limits: Limits,
    pub checkpoint: &'a Checkpoint,
    /// Of the stream.
    pub contact: watch::Receiver<Contact>,
}

impl Beside {
    pub fn start(ctx: &Context, session: FromSession<'_>) -> (Self, Orders) {
        let mut tasks = JoinSet::new();
        let connections = Connections::new(session.client.endpoint(), ctx.application_name.clone());
        let (orders, orders_taken) = mpsc::unbounded_channel();
        let (chunks, load) = mpsc::channel(CHUNKS_IN_CHANNEL);
        let floors = Floors::default();
        let means = Means {
            connections: connections.clone(),
            publication: ctx.config.postgres.publication.clone(),
            specs: ctx.specs.clone(),
            known: ctx.known.clone(),
            reader: ctx.reader.clone(),
            floors: floors.clone(),
            rate: ctx.load_rate.clone(),
            pieces: ctx.config.lanes().map_or_else(Pieces::of_one_transaction, |_| Pieces::of_hash_slots()),
        };
        tasks.spawn(load::run(means, session.limits, session.retired, orders_taken, chunks));
        let (pages, renewals) = mpsc::channel(1);
        for spec in ctx.specs.iter() {
            tasks.spawn(renew::run(spec.clone(), ctx.reader.clone(), pages.clone()));
        }
        let (seen, catalog) = mpsc::channel(1);
        let publishing = publishing(ctx, session.checkpoint);
        let (specs, known, said) = (ctx.specs.clone(), ctx.known.clone(), ctx.said.clone());
        tasks.spawn(catalog::run(ctx.timing.catalog, connections.clone(), publishing, specs, known, said, seen));
        let (evicted, evictions) = mpsc::channel(1);
        tasks.spawn(evictions::run(ctx.reader.clone(), evicted));
        let (taken, samples) = mpsc::channel(1);
        let sample_now = Arc::new(Notify::new());
        let sampler = Sampler {
            connections: connections.clone(),
            slot: ctx.config.postgres.slot.clone(),
            opens: if ctx.config.postgres.reader.is_some() { Opens::Reading } else { Opens::Everything },
            contact: session.contact,
            now: sample_now.clone(),
            out: taken,
        };
        tasks.spawn(sampler.run(session.client));
        let (answers, durable) = mpsc::channel(1);
        let acknowledged = session.syncer.map(|syncer| {
            let (acknowledged, seen) = watch::channel(None);
            tasks.spawn(durable::run(syncer, session.checkpoint.epoch, seen, answers));
            acknowledged
        });
        let beside = Self { tasks, load, renewals, catalog, evictions, samples, durable };
        (beside, Orders { load: orders, floors, acknowledged, sample_now, connections })
    }
}

fn publishing(ctx: &Context, checkpoint: &Checkpoint) -> Publishing {
    let settings = &ctx.config.postgres;
    let name = settings.publication.clone();
    if checkpoint.made(&name) && settings.create == Create::WhereMissing {
        Publishing::Ours(name, settings.reader.as_ref().map(|_| Box::new(settings.target.clone())))
    } else {
        Publishing::Theirs(name)
    }
}
