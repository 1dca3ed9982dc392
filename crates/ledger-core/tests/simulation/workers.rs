//! Workers: they ack, work, beat, crash, come back, and repeat outcomes until they are receipted.

use super::{Dice, Down, Message, Up};
use crate::support::{blocks, fails, releases};
use ledger_core::{Class, Outcome, ReleaseCause, TaskId};
use std::collections::BTreeMap;

#[derive(Clone, Debug)]
enum Work {
    Got,
    Acked,
    Stopping,
    /// With its digest.
    Ended(Outcome, u64),
}

#[derive(Debug, Default)]
struct Worker {
    incarnation: u64,
    /// Steps until it is up again.
    down_for: u64,
    holds: BTreeMap<(TaskId, u64), Work>,
}

pub(super) struct Workers(Vec<Worker>);

impl Workers {
    pub(super) fn new(n: usize) -> Self {
        Self((0..n).map(|_| Worker { down_for: 1, ..Worker::default() }).collect())
    }

    /// Crashes now and then; all that was held in memory is gone.
    pub(super) fn fate(&mut self, dice: &mut Dice) {
        for worker in &mut self.0 {
            if worker.down_for == 0 && dice.one_in(80) {
                worker.down_for = 1 + dice.below(60);
                worker.holds.clear();
            }
        }
    }

    pub(super) fn hears(&mut self, worker: usize, incarnation: u64, down: &Down) {
        let worker = &mut self.0[worker];
        if worker.down_for > 0 || worker.incarnation != incarnation {
            return;
        }
        match down {
            Down::Assignment(task, fence) => {
                worker.holds.entry((*task, *fence)).or_insert(Work::Got);
            }
            Down::Receipt(task, fence) | Down::Lost(task, fence) => {
                worker.holds.remove(&(*task, *fence));
            }
            Down::Stop(task, fence) => {
                if let Some(work) = worker.holds.get_mut(&(*task, *fence))
                    && !matches!(work, Work::Ended(..))
                {
                    *work = Work::Stopping;
                }
            }
        }
    }

    pub(super) fn work(&mut self, healed: bool, dice: &mut Dice) -> Vec<Message> {
        let mut said = Vec::new();
        for (at, worker) in self.0.iter_mut().enumerate() {
            if worker.down_for > 0 {
                worker.down_for -= 1;
                if worker.down_for > 0 {
                    continue;
                }
                worker.incarnation += 1;
                said.push(Message::Up { worker: at, incarnation: worker.incarnation, up: Up::Hello });
            }
            let incarnation = worker.incarnation;
            let mut say = |up| said.push(Message::Up { worker: at, incarnation, up });
            // A beat and a Hello are said again and again: messages are lost.
            if dice.one_in(4) {
                say(Up::Hello);
                say(Up::Beat(worker.holds.keys().copied().collect()));
            }
            for ((task, fence), work) in &mut worker.holds {
                match work {
                    Work::Got if dice.one_in(3) => {
                        *work = Work::Acked;
                        say(Up::Ack(*task, *fence));
                    }
                    // Without an ack, or after one that may be lost.
                    Work::Got | Work::Acked if dice.one_in(8) => {
                        *work = Work::Ended(outcome(healed, dice), dice.roll());
                    }
                    Work::Stopping if dice.one_in(8) => {
                        let outcome = if dice.one_in(2) { Outcome::Cancelled } else { outcome(healed, dice) };
                        *work = Work::Ended(outcome, dice.roll());
                    }
                    Work::Ended(outcome, digest) if dice.one_in(2) => {
                        say(Up::Outcome(*task, *fence, outcome.clone(), *digest));
                    }
                    _ => {}
                }
            }
        }
        said
    }
}

fn outcome(healed: bool, dice: &mut Dice) -> Outcome {
    match dice.below(if healed { 1 } else { 12 }) {
        0..=3 => Outcome::Complete,
        4..=6 => fails(Class::Transient),
        7 => fails(Class::Timeout),
        8 => fails(Class::Permanent),
        9 => releases(ReleaseCause::Declined),
        10 => releases(ReleaseCause::Drain),
        _ => blocks(),
    }
}
