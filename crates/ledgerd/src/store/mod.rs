//! Where the ledger is kept: what the loop calls, behind the seam of `ledger_core::store`.
//!
//! Not a place of decisions: a store takes what was decided, and names the tasks that can be claimed. Invariants: a
//! [`Committed`] is made by a commit alone, after everything of its batch is durable; an error leaves nothing of the
//! batch behind, in memory too once the caller has recovered.

mod bind;
#[cfg(test)]
mod conformance;
mod entries;
mod fresh;
#[cfg(test)]
mod model;
pub mod moving;
mod page;
pub mod postgres;
mod ready;
#[cfg(test)]
mod rig;
mod rows;
pub mod schema;
mod sqlite;
mod text;
mod wake;

pub use sqlite::{OpenError, Options, SqliteReader, SqliteStore, open, steps};
pub use wake::Wake;

pub(crate) use text::settings_text;

/// Bytes of a result that fits into its task's row: the row is to stay narrow.
const SMALL_RESULT: usize = 256;

/// Proof that a batch is durable: replies are made from it. Only a store's commit can make one.
#[derive(Debug)]
pub struct Committed {
    /// Number of the newest transition that is durable with it.
    seq: u64,
}

impl Committed {
    /// Only for stores: after the commit of everything up to transition `seq`.
    pub(in crate::store) const fn up_to(seq: u64) -> Self {
        Self { seq }
    }

    /// Number of the newest transition that is durable.
    #[must_use]
    pub const fn seq(&self) -> u64 {
        self.seq
    }
}

/// A store of either kind.
pub type DynStore = Box<dyn ledger_core::store::Store<Proof = Committed>>;
