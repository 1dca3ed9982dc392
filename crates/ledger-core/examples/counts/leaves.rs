//! Rows of breaker-core and retry-core.

use crate::row;
use breaker_core::{Breaker, Config, Permit, Sample, Shared, Window};
use retry_core::{Bucket, BucketConfig, Level, Policy, draw};
use std::hint::black_box;
use std::time::Duration;

const CALLS: u32 = 1_000;
const NOW: Duration = Duration::new(1_700_000_000, 123_456_789);
const SECOND: Duration = Duration::from_secs(1);

pub(crate) fn rows() {
    closed();
    refusing();
    half_open();
    windows();
    budget();
    delay();
}

/// As the daemon's agents have it; more failures than a row has calls.
fn config() -> Config {
    Config { failure_threshold: 8_000, probe_timeout: None, ramp_for: 10 * SECOND, ..Config::default() }
}

fn breaker(config: Config) -> Breaker {
    Breaker::new(config).expect("valid")
}

fn opened() -> Breaker {
    let mut breaker = breaker(Config { success_threshold: 200, half_open_permits: 2, ..config() });
    breaker.trip(None, NOW, 0);
    breaker
}

/// A permitted call, from the question to the answer's transition, as the daemon makes it.
#[inline(always)]
fn call(breaker: &mut Breaker, sample: Sample) {
    let breaker = black_box(breaker);
    if let Ok(permit) = breaker.try_acquire(black_box(NOW)) {
        let told = breaker.record(black_box(permit), sample, black_box(NOW), black_box(7));
        black_box(told.transition.is_some());
    }
}

#[inline(always)]
fn call_timed(breaker: &mut Breaker) {
    let breaker = black_box(breaker);
    if let Ok(permit) = breaker.try_acquire(black_box(NOW)) {
        let took = black_box(SECOND);
        let told =
            breaker.record_timed(black_box(permit), Sample::Success, took, black_box(NOW), black_box(7));
        black_box(told.transition.is_some());
    }
}

#[inline(always)]
fn call_shared(shared: &Shared) {
    let shared = black_box(shared);
    if let Ok(permit) = shared.try_acquire(black_box(NOW)) {
        let told = shared.record(black_box(permit), Sample::Success, black_box(NOW), black_box(7));
        black_box(told.transition.is_some());
    }
}

/// What [`call`] is given, and what comes of it.
#[inline(always)]
fn given<T>(breaker: &mut T) {
    black_box(breaker);
    black_box(NOW);
    let _ = black_box(Permit { epoch: 0, probe: false, slot: 0 });
    black_box(NOW);
    black_box(7_u64);
    black_box(false);
}

fn sampled(name: &str, calls: u32, breaker: &Breaker, call: impl Fn(&mut Breaker)) {
    let (mut given_to, mut called) = (breaker.clone(), breaker.clone());
    row(name, calls, |_| given(&mut given_to), |_| call(&mut called));
    assert_eq!(called.state(), breaker.state(), "{name} is one state's");
}

fn succeeding(name: &str, calls: u32, breaker: &Breaker) {
    sampled(name, calls, breaker, |breaker| call(breaker, Sample::Success));
}

fn failing(name: &str, calls: u32, breaker: &Breaker) {
    sampled(name, calls, breaker, |breaker| call(breaker, Sample::Failure));
}

fn closed() {
    let new = breaker(config());
    succeeding("breaker closed, acquire + success", CALLS, &new);
    let (mut given_to, mut called) = (new.clone(), new.clone());
    let inputs = |_| {
        given(&mut given_to);
        black_box(SECOND);
    };
    row("breaker closed, acquire + timed success", CALLS, inputs, |_| call_timed(&mut called));
    failing("breaker closed, acquire + failure", CALLS, &new);

    let (mut given_to, called) = (Shared::from(new.clone()), Shared::from(new));
    // A thread's first call finds its stripe.
    call_shared(&called);
    row("shared closed, acquire + success", CALLS, |_| given(&mut given_to), |_| call_shared(&called));
}

fn refusing() {
    let (mut given_to, mut called, shared) = (opened(), opened(), Shared::from(opened()));
    let mut inputs = |_| {
        black_box(&mut given_to);
        black_box(Some(black_box(NOW + SECOND)));
    };
    let refused = |_| {
        let refused = black_box(&mut called).try_acquire(black_box(NOW + SECOND)).err();
        black_box(refused.and_then(|refused| refused.retry_after));
    };
    row("breaker open, reject", CALLS, &mut inputs, refused);
    let refused = |_| {
        let refused = black_box(&shared).try_acquire(black_box(NOW + SECOND)).err();
        black_box(refused.and_then(|refused| refused.retry_after));
    };
    row("shared open, reject", CALLS, &mut inputs, refused);
}

fn half_open() {
    let mut probing = opened();
    let permit = probing.try_acquire(NOW + 600 * SECOND).expect("the period is over");
    probing.record(permit, Sample::Success, NOW + 600 * SECOND, 0);
    succeeding("breaker half-open, acquire + success", 100, &probing);
}

fn windows() {
    let count = Window::Count { size: 1_024, min_calls: 100 };
    let time = Window::Time { bucket: SECOND, min_calls: 100 };
    for (name, window) in [("count window", count), ("time window", time)] {
        let mut full = breaker(Config { window: Some(window), ..config() });
        for _ in 0..10_000 {
            call(&mut full, Sample::Success);
        }
        succeeding(&format!("breaker {name}, acquire + success"), CALLS, &full);
        // Fewer than half of what the window holds.
        failing(&format!("breaker {name}, acquire + failure"), 500, &full);
    }
}

fn budget() {
    let limits = BucketConfig { capacity: 1_000_000, ..BucketConfig::default() }.build().expect("valid");
    let half = || Bucket::restore(limits, Level { millitokens: 500_000_000, updated_at: 1_700_000_000_123 });
    // Time goes on, so that the floor mints.
    let later = |call: u32| Duration::new(NOW.as_secs() + u64::from(call), NOW.subsec_nanos());
    let mut given_to = half();
    let mut given = |call| {
        black_box(&mut given_to);
        black_box(later(call));
        black_box(1_u32);
        black_box(true);
    };

    let mut bucket = half();
    let withdrawn = |call| {
        let bucket = black_box(&mut bucket);
        let now = black_box(later(call));
        black_box(bucket.withdraw(now, black_box(1)));
    };
    row("budget withdraw", CALLS, &mut given, withdrawn);

    for (name, mut bucket) in
        [("budget deposit", half()), ("budget deposit, full", Bucket::full(limits, NOW))]
    {
        let deposited = |call| {
            let bucket = black_box(&mut bucket);
            let now = black_box(later(call));
            black_box(1_u32);
            black_box(bucket.deposit(now));
        };
        row(name, CALLS, &mut given, deposited);
    }
}

fn delay() {
    let policy = Policy::default();
    let keyed = |_| {
        let (seed, task, attempt) = black_box((1_u64, 2_u64, 3_u64));
        let draw = draw(seed, task, attempt);
        black_box(black_box(&policy).delay(black_box(2), draw, black_box(Duration::ZERO)));
    };
    let inputs = |_| {
        black_box((1_u64, 2_u64, 3_u64));
        black_box(&policy);
        black_box(2_u32);
        black_box(Duration::ZERO);
        black_box(Duration::ZERO);
    };
    row("delay keyed", CALLS, inputs, keyed);
}
