//! What the tests share: short words for driving a breaker.

#![allow(dead_code, reason = "each test binary uses its own part")]

use breaker_core::{Breaker, Config, Permit, Recorded, Sample, State};
use std::time::Duration;

pub(crate) fn secs(secs: u64) -> Duration {
    Duration::from_secs(secs)
}

/// Without jitter, so that times are exact, and with a longest half-open instead of leases of probes.
pub(crate) fn config() -> Config {
    Config { open_jitter: 0.0, probe_timeout: None, half_open_max: Some(secs(150)), ..Config::default() }
}

pub(crate) fn closed() -> Breaker {
    Breaker::new(config()).expect("valid")
}

/// One call from permit to result, all at `now`.
pub(crate) fn call(breaker: &mut Breaker, sample: Sample, now: Duration) -> Recorded {
    let permit = breaker.try_acquire(now).expect("lets through");
    breaker.record(permit, sample, now, 0)
}

pub(crate) fn fail_until_open(breaker: &mut Breaker, now: Duration) {
    for _ in 0..breaker.config().failure_threshold {
        call(breaker, Sample::Failure, now);
    }
    assert_eq!(breaker.state(), State::Open);
}

/// Opened at `now`, with these settings.
pub(crate) fn open_with(config: Config, now: Duration) -> Breaker {
    let mut breaker = Breaker::new(config).expect("valid");
    fail_until_open(&mut breaker, now);
    breaker
}

/// Opened at 0, half-open at 60 s with this first probe in flight.
pub(crate) fn half_open_with(config: Config) -> (Breaker, Permit) {
    let mut breaker = open_with(config, secs(0));
    let probe = breaker.try_acquire(secs(60)).expect("the period is over");
    assert_eq!(breaker.state(), State::HalfOpen);
    (breaker, probe)
}
