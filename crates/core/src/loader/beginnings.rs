//! How a load begins: its tables are looked up in the catalog, and those without keys in Redis are determined. A table
//! of which only single keys are read is looked up as well, unless it is being loaded.

use super::messages::{Again, Asks, Cause, Errand, Loadable, LookedUp, Unread};
use super::one_load::Active;
use super::patience::Patience;
use super::range::Sizes;
use super::{Asked, Loader, asks_for, say};
use crate::backoff::Backoff;
use crate::checkpoint::Blocked;
use crate::schema::TableId;
use crate::session::load_messages::{FromLoad, KeysToRead, LoadId, LoadOrder, Only, Purpose};
use std::collections::HashSet;
use std::time::Instant;

/// A load that is to begin.
#[derive(Debug, Clone)]
pub(super) struct Beginning {
    pub table: TableId,
    pub load: LoadId,
    pub purpose: Purpose,
    pub only: Only,
}

pub(super) struct LookUp {
    of: LookUpOf,
    since: Instant,
    backoff: Backoff,
    /// After a failed attempt, when the next one may begin.
    pub again_at: Option<Instant>,
}

pub(super) enum LookUpOf {
    /// Loads of different tables, or comparisons of different tables.
    Beginnings(Vec<Beginning>, Asks),
    /// Keys of a table that is not being loaded.
    Keys(KeysToRead),
}

impl LookUp {
    pub fn errand<T>(&self) -> Errand<T> {
        let (tables, sizes, asks) = match &self.of {
            LookUpOf::Beginnings(begins, asks) => (begins.iter().map(|b| b.table).collect(), Sizes::Measured, *asks),
            LookUpOf::Keys(keys) => (vec![keys.table], Sizes::Remembered, asks_for(keys)),
        };
        Errand::LookUp { tables, sizes, asks }
    }

    fn asks(&self) -> Asks {
        match &self.of {
            LookUpOf::Beginnings(_, asks) => *asks,
            LookUpOf::Keys(keys) => asks_for(keys),
        }
    }
}

impl<T: Clone> Loader<T> {
    /// Collects the loads that were ordered directly after `first` and can begin together with it.
    pub(super) fn with_those_behind(&mut self, first: Beginning) -> Vec<Beginning> {
        let asks = Asks::from(first.purpose);
        let mut begins = vec![first];
        while let Some(LoadOrder::Table { table, load, purpose, only, .. }) = self.inbox.orders.front() {
            let next = Beginning { table: *table, load: *load, purpose: *purpose, only: only.clone() };
            let of_a_kind = Asks::from(next.purpose) == asks;
            if !of_a_kind || begins.iter().any(|begin| begin.table == next.table) {
                break;
            }
            begins.push(next);
            self.inbox.orders.pop_front();
        }
        begins
    }

    pub(super) fn begin(&mut self, begins: Vec<Beginning>, now: Instant, out: &mut Vec<Errand<T>>) {
        let Some(first) = begins.first() else { return };
        let asks = first.purpose.into();
        for Beginning { table, .. } in &begins {
            self.loads.remove(table);
            self.patience.forget(*table);
        }
        self.look_up(LookUpOf::Beginnings(begins, asks), now, out);
    }

    pub(super) fn begin_again(&mut self, table: TableId, because: Again, now: Instant, out: &mut Vec<Errand<T>>) {
        let Some(Active { id: load, purpose, only, .. }) = self.loads.get(&table) else { return };
        let begin = Beginning { table, load: *load, purpose: *purpose, only: only.clone() };
        out.push(Errand::BeginsAgain { table, because });
        self.begin(vec![begin], now, out);
    }

    pub(super) fn look_up(&mut self, of: LookUpOf, now: Instant, out: &mut Vec<Errand<T>>) {
        let look_up = LookUp { of, since: now, backoff: Backoff::default(), again_at: None };
        out.push(look_up.errand());
        self.asked = Some(Asked::LookUp(look_up));
    }

    /// Receives the description of each table, or the reason why it cannot be followed. If a load finds a table locked,
    /// all of them are looked up again later.
    pub(super) fn looked_up(&mut self, tables: Vec<LookedUp<T>>, now: Instant, out: &mut Vec<Errand<T>>) {
        let Some(Asked::LookUp(look_up)) = self.asked.take() else { unreachable!("tables were looked up") };
        let is_locked = tables.iter().any(|table| matches!(table, LookedUp::Locked(_)));
        if is_locked && look_up.asks() == Asks::Load {
            return self.look_up_later(look_up, now);
        }
        self.knows(look_up.of, tables, out);
    }

    /// A load repeats a failed lookup until it succeeds. A comparison repeats it only after a lost connection, and only
    /// for a limited time.
    pub(super) fn not_looked_up(&mut self, unread: &Unread, now: Instant, out: &mut Vec<Errand<T>>) {
        let Some(Asked::LookUp(look_up)) = self.asked.take() else { unreachable!("tables were looked up") };
        let is_over = unread.cause != Cause::Connection || Patience::is_over(unread.cause, look_up.since, now);
        if look_up.asks() == Asks::Comparison && is_over {
            let tables = match &look_up.of {
                LookUpOf::Beginnings(begins, _) => begins.len(),
                LookUpOf::Keys(_) => 1,
            };
            let blocked = (0..tables).map(|_| LookedUp::Blocked(unread.why.clone())).collect();
            return self.knows(look_up.of, blocked, out);
        }
        self.look_up_later(look_up, now);
    }

    fn look_up_later(&mut self, mut look_up: LookUp, now: Instant) {
        look_up.again_at = Some(now + look_up.backoff.next_delay());
        self.asked = Some(Asked::LookUp(look_up));
    }

    fn knows(&mut self, of: LookUpOf, tables: Vec<LookedUp<T>>, out: &mut Vec<Errand<T>>) {
        match of {
            LookUpOf::Beginnings(begins, asks) => self.begin_known(begins, asks, tables, out),
            LookUpOf::Keys(keys) => match tables.into_iter().next().expect("an answer for each table") {
                LookedUp::Loadable(table) => self.read_keys(keys, table.described, out),
                LookedUp::Blocked(why) | LookedUp::Locked(why) => {
                    self.cannot_read(keys.table, keys.checks, why, out);
                    out.push(say(FromLoad::KeysNotRead));
                }
            },
        }
    }

    fn begin_known(&mut self, begins: Vec<Beginning>, asks: Asks, tables: Vec<LookedUp<T>>, out: &mut Vec<Errand<T>>) {
        let mut known = Vec::with_capacity(begins.len());
        for (begin, looked_up) in begins.into_iter().zip(tables) {
            let Beginning { table, load, purpose, .. } = begin;
            match looked_up {
                LookedUp::Loadable(loadable) => known.push((begin, loadable)),
                LookedUp::Blocked(why) | LookedUp::Locked(why) => {
                    let comparison = (purpose != Purpose::Fill).then_some(load);
                    self.cannot_read(table, comparison, why, out);
                }
            }
        }
        let mut is_first = |begin: &Beginning| self.begun.insert(begin.table) && begin.only == Only::All;
        let begun = known.iter().map(|(begin, _)| begin).filter(|begin| is_first(begin));
        let first: Vec<TableId> = begun.map(|begin| begin.table).collect();
        if !first.is_empty() {
            out.push(Errand::FindEmpty { tables: first, asks });
            self.asked = Some(Asked::Empty(known));
            return;
        }
        self.begin_all(known, &HashSet::new(), out);
    }

    /// Reports a table that cannot be read in its present state.
    fn cannot_read(&mut self, table: TableId, comparison: Option<LoadId>, why: Blocked, out: &mut Vec<Errand<T>>) {
        match comparison {
            Some(load) => self.not_compared(table, load, why.to_string(), out),
            None => out.push(say(FromLoad::Blocked { table, why })),
        }
    }

    pub(super) fn empty(&mut self, empty: &HashSet<TableId>, out: &mut Vec<Errand<T>>) {
        let Some(Asked::Empty(begins)) = self.asked.take() else { unreachable!("somebody looks for keys") };
        self.begin_all(begins, empty, out);
    }

    /// `empty`: tables that had no keys in Redis before this session's first load of them. This session has written
    /// every key they have now, from the stream, so none is an orphan. Keys written by an earlier load may be orphans,
    /// because rows can leave a table without a message in the stream.
    fn begin_all(&mut self, begins: Vec<(Beginning, Loadable<T>)>, empty: &HashSet<TableId>, out: &mut Vec<Errand<T>>) {
        for (begin, loadable) in begins {
            let (table, load) = (begin.table, begin.load);
            let is_empty = empty.contains(&table);
            // The estimate is for the whole table; none exists for a part of it.
            let estimated_rows = if begin.only == Only::All { loadable.estimated_rows } else { 0 };
            out.push(say(FromLoad::Began {
                table,
                load,
                fingerprint: loadable.fingerprint,
                catalog: loadable.catalog,
                composition: loadable.composition.clone(),
                types: loadable.types.clone(),
                estimated_rows,
                known_types: loadable.known_types.clone(),
                is_empty,
            }));
            self.last_attempt += 1;
            let active = Active::new(begin, self.last_attempt, loadable, &self.measures, is_empty);
            self.loads.insert(table, active);
            self.inbox.advancing.push_back(table);
        }
    }
}
