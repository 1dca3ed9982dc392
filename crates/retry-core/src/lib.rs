//! When to try again.
//!
//! A [`Policy`] answers, for one failure, whether another try is worth it and when; a [`Bucket`] answers
//! whether there is allowance left for it. Both are plain functions over plain data: the time and the random
//! number are arguments, so the same question has the same answer in a test, in a replay and after a crash.
//!
//! ```
//! use retry_core::{Config, Decision, ErrorClass, Failure, Policy, Progress, draw};
//! use std::time::Duration;
//!
//! # fn main() -> Result<(), retry_core::ConfigErrors> {
//! let policy = Config { max_retries: 5, ..Config::default() }.build()?;
//! let progress = Progress::default();
//! let now = Duration::from_secs(1_000);
//!
//! match policy.next(&progress, Failure::new(ErrorClass::Timeout), now, None, draw(7, 42, 1)) {
//!     Decision::Retry { delay, at, .. } => {
//!         assert!(delay >= Duration::from_millis(50) && delay <= Duration::from_millis(150));
//!         assert_eq!(at, now + delay);
//!     }
//!     Decision::GiveUp { reason } => panic!("{reason}"),
//! }
//! # Ok(())
//! # }
//! ```
//!
//! # What it is not
//!
//! No scheduler: it names an instant and does not wait for it. No breaker: whether an agent may be called at all
//! is another question. No queue: a retry that finds the budget empty is refused here; whoever can store work
//! may let it wait instead, and then bounds that wait. With the features `sync` and `async` there are wrappers
//! around calls, which do wait, and which alone read a clock and take entropy.
//!
//! # Time
//!
//! A length of time is a [`Duration`](std::time::Duration). A point in time is one too, counted from an epoch of
//! the caller's choosing (the Unix epoch, the start of a process), which must be the same in all arguments of a
//! call. All arithmetic is in whole nanoseconds (budgets: whole milliseconds), rounds down and saturates.
//!
//! # Invariants
//!
//! - No input panics or overflows. What makes no sense is refused when a policy is built, all of it at once.
//! - `0 ≤ delay ≤ max_delay`, for every jitter, retry count and draw. Only a hint can lead beyond.
//! - With [`CapMode::Fold`] no single delay is likelier than its neighbours, at the cap neither.
//! - Equal (seed, task, attempt) give equal delays, on every machine and in every version.
//! - `max_retries` is never raised: not by hints, not by predicates, not by budgets.
//! - Nothing is retried past a deadline; that is known, and said, at once.
//! - Time running backwards mints no tokens; a restored budget is what was saved.
//!
//! # Features
//!
//! `sync` and `async`, both off by default: wrappers for blocking and async callables. Neither adds a dependency.

mod budget;
#[cfg(any(feature = "sync", feature = "async"))]
mod call;
mod class;
mod decision;
mod delay;
mod error;
mod policy;
mod total;

pub use budget::{Bucket, BucketConfig, Empty, Level, Limits, Paid, reserve_both, reserve_with_floor};
#[cfg(feature = "sync")]
pub use call::retry;
#[cfg(any(feature = "sync", feature = "async"))]
pub use call::{Cancel, Error, Retry};
#[cfg(feature = "async")]
pub use call::{Sleep, retry_async};
pub use class::{ErrorClass, Failure, Hint, Sample};
pub use decision::{Attempted, Decision, MAX_FAULTS, Progress, Reason, Spent};
pub use delay::draw;
pub use error::{ConfigError, ConfigErrors};
pub use policy::{CapMode, Config, HintMode, Jitter, Policy};
pub use total::Total;

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
