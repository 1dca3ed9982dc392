//! The ledger as it is, and broken on purpose: what each break does to an event and to the state after it.
//!
//! The broken ones stay. Each must be caught by the property that it is there for; one that is not would mean that the
//! property proves nothing.

use super::Fault;
use super::world::World;
use ledger_core::{Applied, Event};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Variant {
    /// As it is.
    Real,
    /// An outcome is taken from whoever was ever given the task.
    OldFences,
    /// The end of a grace takes the lease from its holder, but does not raise the fence.
    SameFence,
    /// The end of a grace neither raises the fence nor takes the lease from its holder.
    KeptLease,
    /// A released task goes on being held, so that its outcome is taken twice.
    KeptHolder,
    /// A refused outcome is not looked up among those that were recorded.
    NoReplayCheck,
    /// A loss is forgotten when the holder comes back.
    ForgottenLosses,
    /// A loss is not counted.
    UncountedLosses,
    /// A token that was reserved for a retry is not given back with a late outcome.
    NoRefund,
    /// A late outcome is a sample, although its loss was one.
    ToldTwice,
}

impl Variant {
    /// The event that the broken ledger sees instead.
    pub(super) fn event(self, event: Event, world: &World) -> Event {
        match (self, event, world.task.holder.as_ref()) {
            (Self::OldFences, Event::Settle(mut caller, _, outcome), Some(holder)) => {
                caller.worker = holder.worker.clone();
                Event::Settle(caller, world.task.fence, outcome)
            }
            (_, event, _) => event,
        }
    }

    /// What the broken ledger leaves instead.
    pub(super) fn after(self, event: &Event, before: &World, world: &mut World, applied: &mut Applied) {
        let task = &mut world.task;
        let keep = match (self, event) {
            (Self::SameFence | Self::KeptLease, Event::GraceOver) => {
                task.fence = before.task.fence;
                self == Self::KeptLease
            }
            (Self::KeptHolder, Event::Settle(..)) => true,
            (Self::ForgottenLosses, Event::Ack(..) | Event::Beat(..))
            | (Self::UncountedLosses, Event::LeaseOver) => {
                task.losses = 0;
                false
            }
            (Self::NoRefund, _) => {
                applied.effects.refund = 0;
                false
            }
            (Self::ToldTwice, Event::Settle(..)) => {
                applied.effects.sample =
                    before.task.sample.map(|sample| (sample.permit, breaker_core::Sample::Success));
                false
            }
            _ => false,
        };
        if keep && !task.state.is_terminal() {
            task.holder.clone_from(&before.task.holder);
            task.lease = before.task.lease;
        }
    }

    /// Whether `fault` is looked for. Two breaks are left unseen by the property that names them, to show that a second
    /// one catches them, too.
    pub(super) fn shows(self, fault: Fault) -> bool {
        !matches!((self, fault), (Self::UncountedLosses, Fault::Fold) | (Self::KeptLease, Fault::Revoked))
    }
}
