//! What only some breakers have at a time, kept apart so that all others stay small.
//!
//! Not a decision: `breaker` makes those. Invariant: where nothing is kept, nothing is allocated after the next transition.

use crate::config::Window;
use crate::snapshot::Probe;
use crate::window::Seen;
use crate::words::Order;
use std::time::Duration;

/// Nothing, or some of the parts.
#[derive(Clone, Debug, Default)]
pub(crate) struct Aside(Option<Box<Parts>>);

#[derive(Clone, Debug, Default, PartialEq)]
struct Parts {
    /// While closed or observing, where the settings have a window and there was a call.
    window: Option<Seen>,
    /// In half-open, those in flight.
    probes: Vec<Probe>,
    next_slot: u8,
    order: Option<Order>,
}

/// Equal to what is kept of nothing.
static NOTHING: Parts = Parts { window: None, probes: Vec::new(), next_slot: 0, order: None };

impl PartialEq for Aside {
    fn eq(&self, other: &Self) -> bool {
        self.parts() == other.parts()
    }
}

impl Aside {
    fn parts(&self) -> &Parts {
        self.0.as_deref().unwrap_or(&NOTHING)
    }

    fn made(&mut self) -> &mut Parts {
        self.0.get_or_insert_default()
    }

    /// What a transition leaves.
    pub(crate) fn keep_order_alone(&mut self) {
        let order = self.0.take().and_then(|parts| parts.order);
        if let Some(order) = order {
            self.set_order(order);
        }
    }

    pub(crate) fn order(&self) -> Option<&Order> {
        self.parts().order.as_ref()
    }

    pub(crate) fn set_order(&mut self, order: Order) {
        self.made().order = Some(order);
    }

    pub(crate) fn drop_order(&mut self) {
        if let Some(parts) = &mut self.0 {
            parts.order = None;
        }
    }

    pub(crate) fn window(&self) -> Option<&Seen> {
        self.parts().window.as_ref()
    }

    #[inline]
    pub(crate) fn window_or_new(&mut self, window: Window) -> &mut Seen {
        self.made().window.get_or_insert_with(|| Seen::new(window))
    }

    pub(crate) fn set_window(&mut self, seen: Seen) {
        self.made().window = Some(seen);
    }

    pub(crate) fn drop_window(&mut self) {
        if let Some(parts) = &mut self.0 {
            parts.window = None;
        }
    }

    #[inline]
    pub(crate) fn probes(&self) -> &[Probe] {
        &self.parts().probes
    }

    pub(crate) fn probes_mut(&mut self) -> &mut [Probe] {
        self.0.as_deref_mut().map_or(&mut [], |parts| &mut parts.probes)
    }

    /// As stored; slots are given on from the highest.
    pub(crate) fn set_probes(&mut self, probes: Vec<Probe>) {
        if !probes.is_empty() {
            let next_slot = probes.iter().map(|probe| probe.slot.wrapping_add(1)).max().unwrap_or(0);
            let parts = self.made();
            (parts.probes, parts.next_slot) = (probes, next_slot);
        }
    }

    pub(crate) fn take_slot(&mut self, lease_until: Option<Duration>) -> u8 {
        let Parts { probes, next_slot, .. } = self.made();
        // More numbers than slots: one in use is found in a few steps.
        while probes.iter().any(|probe| probe.slot == *next_slot) {
            *next_slot = next_slot.wrapping_add(1);
        }
        let slot = *next_slot;
        *next_slot = slot.wrapping_add(1);
        probes.push(Probe { slot, lease_until });
        slot
    }

    pub(crate) fn free_slot(&mut self, slot: u8) {
        if let Some(parts) = &mut self.0 {
            parts.probes.retain(|probe| probe.slot != slot);
        }
    }
}
