//! Passes each delivery that the intake takes on to the other parts of the session.

use super::Machine;
use super::turn::Turn;
use crate::change::Delivery;

impl Machine {
    /// Takes deliveries in order. What does not fit into the growing batch waits until that has been sent.
    pub(super) fn deliver_what_fits(&mut self, turn: &mut Turn) {
        while let Some(item) = self.intake.next_that_fits(&mut self.growing, &mut self.tables, self.outbox.limits()) {
            self.deliver(item, turn);
        }
    }

    fn deliver(&mut self, item: Delivery, turn: &mut Turn) {
        match item {
            Delivery::Begin(begin) => {
                self.feedback.begins(begin);
                self.intake.begin(begin, self.outbox.checkpoint().within, turn);
            }
            Delivery::Relation(relation) => self.intake.relation(relation),
            Delivery::Change(change) => {
                match self.intake.shape_of(&change) {
                    Some(Ok(mapping)) => {
                        let (table, fingerprint) = (mapping.table, mapping.fingerprint);
                        self.follows_shape(table, fingerprint, turn);
                        if !self.tables.get(table).is_touched() {
                            self.tables.get_mut(table).touches();
                        }
                    }
                    Some(Err((table, why))) => {
                        let why = why.clone();
                        self.breaks(table, why, turn);
                    }
                    None => {}
                }
                self.intake.change(change, &mut self.growing, &mut self.tables);
            }
            Delivery::Mark(nonce) => {
                self.intake.mark();
                if let Some(chunk) = self.chunks.marked(nonce) {
                    self.is_ready(chunk);
                }
            }
            Delivery::Commit { end, .. } => {
                self.intake.commit(end, &mut self.growing, &mut self.tables, turn);
                self.feedback.delivered(end);
            }
            Delivery::Position(at) => {
                self.feedback.delivered(at);
                self.growing.reaches(at);
                let answer = self.intake.position(at);
                turn.heeds(answer);
            }
        }
    }
}
