//! Whether to try at all: a circuit breaker as a plain state machine.
//!
//! A breaker watches how calls to one other side end. After a run of failures it *opens* and
//! refuses calls, which protects both sides; after a while it lets a few *probes* through, and
//! their results close or reopen it.
//!
//! **What is here.** [`Breaker`] is the machine, a value that can be cloned, compared, printed,
//! stored as a [`Snapshot`] and restored. [`Shared`] puts it behind an atomic word and a mutex,
//! for many threads. The features `sync` and `async` (both off) add `Circuit`, which has a clock
//! and wraps calls, and `Registry`, which keeps one circuit per key.
//!
//! **What is not here.** No retrying, no back-off, no time limits on calls, no task or thread of
//! its own, no dependency. The machine reads no clock and throws no dice: `now` is an argument
//! and so is each random draw. That makes every decision repeatable, and a test steps time
//! instead of sleeping.
//!
//! # Invariants
//!
//! - The breaker opens *on* the failure that reaches the threshold, not on the next.
//! - Every transition adds one to the epoch. A result whose permit carries another epoch decides
//!   nothing; it is counted as late.
//! - At most `half_open_permits` slots are in use in one half-open epoch. A permit names its slot: a
//!   result told twice frees no other probe's.
//! - A cancelled probe frees its slot and says nothing. A probe that never answers is a failed one
//!   when its lease (`probe_timeout`) is over, and half-open lasts no longer than `half_open_max`.
//! - An open period never grows once begun: not by a restore, new settings or a clock going back.
//! - No input panics or overflows.
//!
//! ```
//! use breaker_core::{Availability, Breaker, Config, Sample};
//! use std::time::Duration;
//!
//! let mut breaker = Breaker::new(Config { failure_threshold: 1, ..Config::default() })?;
//! let mut now = Duration::ZERO;
//!
//! let permit = breaker.try_acquire(now)?;
//! breaker.record(permit, Sample::Failure, now, 0);
//! assert!(breaker.try_acquire(now).is_err());
//!
//! now += Duration::from_secs(60);
//! assert_eq!(breaker.is_available(now), Availability::Probe);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod aside;
mod breaker;
mod broken;
#[cfg(any(feature = "sync", feature = "async"))]
mod circuit;
mod config;
mod look;
mod moves;
#[cfg(any(feature = "sync", feature = "async"))]
mod registry;
mod shared;
mod snapshot;
mod span;
mod window;
mod words;

pub use breaker::Breaker;
pub use broken::{ConfigError, ConfigErrors};
#[cfg(any(feature = "sync", feature = "async"))]
pub use circuit::{CallError, Circuit, Rim};
pub use config::{Config, Window};
#[cfg(any(feature = "sync", feature = "async"))]
pub use registry::{Registry, Report};
pub use shared::{Guard, Locked, Shared};
pub use snapshot::{Probe, Snapshot};
pub use words::{
    Availability, Cause, Order, Permit, Recorded, RejectCause, Rejected, Sample, State, Stats, Tally,
    Transition, UnknownState,
};

#[cfg(all(doctest, feature = "sync"))]
#[doc = include_str!("../README.md")]
struct Readme;
