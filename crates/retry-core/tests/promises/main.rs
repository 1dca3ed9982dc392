//! What retry-core promises, one module a kind of promise.

mod behaviours;
mod budget;
#[cfg(any(feature = "sync", feature = "async"))]
mod calls;
mod decisions;
mod properties;
mod regressions;
mod support;
mod validation;
