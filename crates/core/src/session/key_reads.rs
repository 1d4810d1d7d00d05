//! Keys to read again: a limited number of reads at a time, each of a limited size.

use super::load_messages::{KeysToRead, LoadId, LoadOrder};
use super::take_keys;
use super::turn::Turn;
use crate::command::Key;
use crate::resp::batch::Limits;
use crate::schema::TableId;
use std::collections::VecDeque;

/// How many keys one query reads again.
const KEYS_A_READ: usize = 500;
/// How many reads of single keys are in progress at a time.
const KEY_READS_OUT: usize = 2;

#[derive(Default)]
pub(super) struct KeyReads {
    /// Not requested yet.
    waiting: VecDeque<KeysToRead>,
    /// How many reads were ordered and are neither judged nor given up.
    out: usize,
}

impl KeyReads {
    /// With `checks`, they are compared for this load; otherwise they are pending.
    pub fn add(&mut self, table: TableId, keys: &[Key], checks: Option<LoadId>, limits: &Limits) {
        for some in keys.chunks(KEYS_A_READ) {
            let mut rest = some.to_vec();
            while !rest.is_empty() {
                let keys = take_keys(&mut rest, limits);
                self.waiting.push_back(KeysToRead { table, keys, checks });
            }
        }
    }

    pub fn order(&mut self, turn: &mut Turn) {
        while self.out < KEY_READS_OUT {
            let Some(keys) = self.waiting.pop_front() else { return };
            self.out += 1;
            turn.orders(LoadOrder::Keys(keys));
        }
    }

    /// A read of keys was judged, or will not be made.
    pub fn settle(&mut self) {
        assert!(self.out > 0, "a read of keys was ordered");
        self.out -= 1;
    }

    /// Drops everything that is still to be requested for this table.
    pub fn forget_table(&mut self, table: TableId) {
        self.waiting.retain(|read| read.table != table);
    }

    pub fn forget_comparison(&mut self, load: LoadId) {
        self.waiting.retain(|read| read.checks != Some(load));
    }

    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty() && self.out == 0
    }

    pub fn is_sound(&self) -> bool {
        self.out <= KEY_READS_OUT
    }
}
