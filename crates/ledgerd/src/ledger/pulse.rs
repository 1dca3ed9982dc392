//! Signs of life of the ledger loop, for whoever asks whether the daemon should be killed.
//!
//! The loop counts its turns and says whether it may be waiting for the store. Nobody writes but the loop, and nobody reads
//! more than one number, so that asking costs the loop nothing and never waits for a commit.

use std::sync::atomic::{AtomicU64, Ordering};

/// Turns of the loop, and whether it is between two of them: the lowest bit says that it may wait for the store.
#[derive(Debug, Default)]
pub(crate) struct Pulse(AtomicU64);

/// What was seen of the loop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Beat(u64);

impl Beat {
    /// It decides, writes, or waits for what it wrote. A disk or a database may take as long as it takes.
    #[must_use]
    pub const fn may_wait_for_the_store(self) -> bool {
        self.0 & 1 == 1
    }
}

impl Pulse {
    /// The loop has come here.
    pub(crate) fn beat(&self, may_wait_for_the_store: bool) {
        let turn = (self.0.load(Ordering::Relaxed) >> 1).wrapping_add(1);
        self.0.store(turn << 1 | u64::from(may_wait_for_the_store), Ordering::Relaxed);
    }

    /// What can be seen now.
    pub(crate) fn seen(&self) -> Beat {
        Beat(self.0.load(Ordering::Relaxed))
    }
}
