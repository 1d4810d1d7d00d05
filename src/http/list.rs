//! Reads of lists: the rows that a lookup has for a value, in their order and all as of one moment.

use super::app::App;
use super::connection::ClientAddress;
use super::places::Permit;
use super::read::{self, Attempt, Origin, Question, unreadable};
use super::refusal::Refusal;
use super::standing::Claim;
use super::target::{Asking, ListTarget, Values};
use super::{cursor, render};
use crate::lookups::Lookups;
use crate::schema::TableSpec;
use crate::sink::SinkError;
use crate::sink::list_reader::{ListRead, Slice};
use crate::sink::reader::StoredRow;
use crate::status::Status;
use crate::typed::row_type::RowType;
use axum::Extension;
use axum::extract::State;
use axum::http::Uri;
use axum::response::{IntoResponse, Response};
use std::sync::Arc;

/// The lookups of one table.
pub(super) struct TableLists {
    lookups: Arc<Lookups>,
    fingerprint: u64,
}

impl TableLists {
    /// Returns `None` if the table has no lookups.
    pub(super) fn of(spec: &TableSpec) -> Option<Self> {
        let lookups = Lookups::of(spec)?;
        Some(TableLists { fingerprint: lookups.fingerprint(), lookups })
    }
}

/// `GET /v1/lookups/{table}/{lookup}/{value...}`.
pub(super) async fn list(app: &App, peer: ClientAddress, uri: &Uri) -> Response {
    match ListTarget::parse(uri, &app.context.tables) {
        Ok(target) => app.answer(peer, &target).await,
        Err(refusal) => refusal.into_response(),
    }
}

/// `HEAD` of the same.
pub(super) async fn head(State(app): State<Arc<App>>, Extension(peer): Extension<ClientAddress>, uri: Uri) -> Response {
    list(&app, peer, &uri).await
}

/// Rows about which a promise can be made: they, and no others, have the value.
pub(super) struct FoundList {
    rows: Vec<StoredRow>,
    /// Set if the values are written with types.
    row_type: Option<RowType>,
    total: u64,
    next: Option<String>,
    origin: Origin,
    /// Held because the rows stay in memory until the answer is built.
    _place: Permit,
}

impl Question for ListTarget<'_> {
    type Found = FoundList;

    fn asking(&self) -> &Asking<'_> {
        &self.asking
    }

    fn rows(&self) -> usize {
        1
    }

    fn hits_and_misses(&self, found: &FoundList) -> (usize, usize) {
        (found.rows.len(), usize::from(found.total == 0))
    }

    fn bytes(&self, found: &FoundList) -> usize {
        render::bytes(found.row_type.as_ref(), found.rows.iter())
    }

    fn response(&self, found: FoundList, place: Option<Permit>) -> Response {
        found.into_response(place)
    }

    async fn attempt(&self, app: &App, status: &Status) -> Result<Attempt<FoundList>, Refusal> {
        let table = self.asking.table;
        let lists = app.lists[table.id.index()].as_ref().expect("the target names a lookup of the table");
        let place = app.places.batch().await?;
        let before = app.context.sightings.before();
        let slice = Slice {
            lookups: &lists.lookups,
            list: &self.list,
            kind: lists.lookups.kind(self.lookup),
            direction: self.direction,
            after: self.after.as_ref(),
            limit: self.limit,
        };
        let listed = {
            let mut lent = app.batches.lend();
            let listed = lent.reader.list(&table.name, table.format, &slice).await;
            lent.has_answered = !matches!(listed, Err(SinkError::TimedOut { .. }));
            listed
        };
        let ListRead { read, total, next } = listed.map_err(unreadable)?;
        let (standing, lsn) = match app.stand(&self.asking, &read, before, status)? {
            Attempt::Found(stand) => stand,
            Attempt::Behind(min) => return Ok(Attempt::Behind(min)),
        };
        standing.allows(if total == 0 { Claim::Absence } else { Claim::WholeList })?;
        if total == 0 && standing.has_dead_letters() {
            return Err(Refusal::UnlistedDeadLetters(table.name.clone()));
        }
        if standing.mark.as_ref().and_then(|mark| mark.lookups_as) != Some(lists.fingerprint) {
            return Err(Refusal::ListsIncomplete(table.name.clone()));
        }
        let origin = Origin { moments: read.moments, lsn, age: standing.age(), redis: read.redis };
        let rows: Option<Vec<StoredRow>> = read.rows.into_iter().collect();
        let rows = rows.ok_or_else(|| {
            let what =
                format!("a list of {0} names rows that somebody has removed: verify {0} with repair", table.name);
            Refusal::Healing(what)
        })?;
        let row_type = match self.asking.values {
            Values::Typed if !rows.is_empty() => Some(standing.row_type()?),
            Values::Typed | Values::Strings => None,
        };
        let next = next.as_ref().map(cursor::write);
        Ok(Attempt::Found(FoundList { rows, row_type, total, next, origin, _place: place }))
    }
}

impl FoundList {
    fn into_response(self, place: Option<Permit>) -> Response {
        let bytes = self.rows.iter().map(StoredRow::bytes).sum();
        let next = self.next.as_deref();
        let mut response =
            read::json(|| render::list(self.row_type.as_ref(), &self.rows, (self.total, next), bytes), place);
        self.origin.is_told_by(&mut response);
        response
    }
}
