//! What ledger-core promises, each promise by name.

mod grid;
mod leases;
mod life;
mod stops;
mod support;
