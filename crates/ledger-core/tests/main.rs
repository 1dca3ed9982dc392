//! What ledger-core promises, each promise by name.

mod budgets;
mod dispatch;
mod explain;
mod grid;
mod leases;
mod life;
mod loops;
mod model;
mod outage;
mod properties;
mod session;
mod settings;
mod simulation;
mod stops;
mod support;
mod waiting;
mod who_wins;
