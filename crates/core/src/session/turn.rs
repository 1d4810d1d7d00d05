//! One step of the session: its time, and its effects.

use super::Effect;
use super::load_messages::LoadOrder;
use crate::admin::{Answer, Refusal};
use crate::command::Command;
use crate::progress::redelivery::Redelivered;
use crate::resp::batch::Batch;
use crate::session::operation::AskId;
use std::time::Instant;

pub(super) struct Turn {
    pub now: Instant,
    effects: Vec<Effect>,
}

impl Turn {
    pub fn at(now: Instant) -> Self {
        Turn { now, effects: Vec::new() }
    }

    pub fn into_effects(self) -> Vec<Effect> {
        self.effects
    }

    pub fn does(&mut self, effect: Effect) {
        self.effects.push(effect);
    }

    pub fn orders(&mut self, order: LoadOrder) {
        self.does(Effect::Order(order));
    }

    pub fn answers(&mut self, ask: AskId, answer: Result<Answer, Refusal>) {
        self.does(Effect::Answer(ask, answer));
    }

    pub fn heeds(&mut self, answer: Redelivered) {
        if let Redelivered::WentBack { because } = answer {
            self.does(Effect::WentBack { because });
        }
    }

    /// Adds a small command, for which there is always space.
    pub fn puts(&mut self, batch: &mut Batch, command: &Command) {
        if let Err(too_large) = batch.push(command) {
            self.does(Effect::TooLarge(too_large));
        }
    }
}
