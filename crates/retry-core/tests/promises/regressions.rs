//! Defects of other libraries, kept out of this one; one test or more for each.

use crate::support::{MODES, ms, sample, secs};
use retry_core::{
    Bucket, BucketConfig, CapMode, Config, Decision, ErrorClass, Hint, Jitter, Limits, Policy, Progress, draw,
};
use std::collections::HashSet;
use std::sync::Mutex;
use std::time::Duration;

#[test]
fn jitter_is_not_lost_to_whole_seconds() {
    let config = Config { base_delay: secs(1), ..Config::default() };
    for jitter in [Jitter::Proportional(0.5), Jitter::Full, Jitter::Equal, Jitter::Decorrelated] {
        let policy = Config { jitter, ..config }.build().unwrap();
        // 1 distinct first delay in 300 runs was the finding; and none at all at the cap.
        for k in [0, 30] {
            let distinct: HashSet<_> = sample(&policy, k, secs(30), 300).into_iter().collect();
            assert!(distinct.len() > 295, "{jitter:?} retry {k}: {}", distinct.len());
        }
    }
}

#[test]
fn the_cap_is_not_exceeded_by_jitter() {
    for jitter in MODES.into_iter().chain([Jitter::Proportional(1.0), Jitter::Proportional(0.499_999_999)]) {
        for cap_mode in [CapMode::Fold, CapMode::Clamp] {
            let policy = Config { jitter, cap_mode, ..Config::default() }.build().unwrap();
            for k in 0..80 {
                assert!(policy.delay(k, u64::MAX, secs(30)) <= secs(30), "{jitter:?} {cap_mode:?} {k}");
            }
        }
    }
}

#[test]
fn budget_ratios_are_not_truncated() {
    for (ratio, millitokens) in [(0.7, 700), (0.9, 900), (0.4, 400), (0.29, 290), (0.001, 1)] {
        let limits = BucketConfig { deposit: ratio, ..BucketConfig::default() }.build().unwrap();
        assert_eq!(limits.deposit(), millitokens, "{ratio}");
    }
}

#[test]
fn a_token_is_never_granted_twice() {
    let limits = BucketConfig { capacity: 100, deposit: 0.0, floor: 0.0 }.build().unwrap();
    let bucket = Mutex::new(Bucket::full(limits, Duration::ZERO));
    let granted: usize = std::thread::scope(|scope| {
        let ask = || (0..1_000).filter(|_| bucket.lock().unwrap().withdraw(Duration::ZERO, 1)).count();
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(ask)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).sum()
    });
    assert_eq!(granted, 100);
}

#[test]
fn nothing_panics_on_overflow() {
    let longest = Duration::from_secs(7 * 86_400);
    for jitter in MODES.into_iter().chain([Jitter::Proportional(1.0), Jitter::Proportional(0.004)]) {
        for exponential_base in [1.0, 1.0 + f64::EPSILON, 1.000_001, 10.0] {
            let config = Config {
                jitter,
                exponential_base,
                base_delay: secs(86_400),
                max_delay: longest,
                hint_max: secs(86_400),
                max_elapsed: Some(Duration::MAX),
                min_window: longest,
                ..Config::default()
            };
            let policy = config.build().unwrap();
            for k in [0, 1, 63, 64, 65, u32::MAX - 1, u32::MAX] {
                for draw in [0, 1, u64::MAX] {
                    assert!(policy.delay(k, draw, Duration::MAX) <= longest);
                }
                let total = policy.total_delay(k);
                assert!(total.min <= total.mean && total.mean <= total.max);
            }
            let failure =
                retry_core::Failure::new(ErrorClass::Overloaded).with_hint(Hint::from_nanos(i128::MAX));
            let progress = Progress { started: Duration::MAX, ..Progress::default() };
            let decision = policy.next(&progress, failure, Duration::MAX, Some(Duration::MAX), u64::MAX);
            assert!(matches!(decision, Decision::Retry { at: Duration::MAX, hint_cut: true, .. }));
        }
    }
}

#[test]
fn a_tiny_jitter_neither_panics_nor_vanishes() {
    let policy = Config { jitter: Jitter::Proportional(0.004), ..Config::default() }.build().unwrap();
    let delays = sample(&policy, 0, Duration::ZERO, 300);
    assert!(
        delays
            .iter()
            .all(|delay| (Duration::from_micros(99_600)..=Duration::from_micros(100_400)).contains(delay))
    );
    assert!(delays.iter().collect::<HashSet<_>>().len() > 290);
}

#[test]
fn negative_factors_are_refused() {
    for exponential_base in [-1.0, -2.0, 0.0, 0.5] {
        assert!(Config { exponential_base, ..Config::default() }.build().is_err());
    }
}

#[test]
fn first_delays_do_not_gather_at_the_minimum_and_leave_no_gap() {
    let delays = sample(&Policy::default(), 0, Duration::ZERO, 10_000);
    assert!(delays.iter().filter(|delay| **delay == ms(50)).count() <= 1);
    // Half were exactly the minimum, and nothing lay between 100 % and 124 % of the nominal delay.
    let between = delays.iter().filter(|delay| (ms(100)..ms(124)).contains(delay)).count();
    assert!((2_200..2_600).contains(&between), "{between}");
}

#[test]
fn there_is_jitter_at_the_cap_and_no_atom() {
    for jitter in [Jitter::Proportional(0.5), Jitter::Full, Jitter::Equal, Jitter::Decorrelated] {
        let policy = Config { jitter, ..Config::default() }.build().unwrap();
        let mut delays = sample(&policy, 20, secs(30), 100_000);
        delays.sort_unstable();
        let fullest = delays.chunk_by(|a, b| a == b).map(<[_]>::len).max().unwrap();
        assert!(fullest <= 100, "{jitter:?}: {fullest} of 100,000 have one value");
    }
    // The folded range is wide, not a sliver below the cap.
    let folded = Policy::default();
    assert!(folded.delay(20, 0, Duration::ZERO) <= secs(10));
    assert!(folded.delay(20, u64::MAX, Duration::ZERO) > secs(30) - Duration::from_nanos(3));
}

#[test]
fn clamp_has_the_atom_that_fold_avoids() {
    let policy = Config { cap_mode: CapMode::Clamp, ..Config::default() }.build().unwrap();
    let at_cap =
        sample(&policy, 20, Duration::ZERO, 10_000).iter().filter(|delay| **delay == secs(30)).count();
    assert!((4_800..5_200).contains(&at_cap), "{at_cap}");
}

#[test]
fn decimal_shares_and_factors_are_what_was_written() {
    let nine_tenths = Config { jitter: Jitter::Proportional(0.9), ..Config::default() }.build().unwrap();
    assert_eq!(nine_tenths.delay(0, 0, Duration::ZERO), ms(10));
    assert_eq!(nine_tenths.delay(0, u64::MAX, Duration::ZERO), ms(190));
    let steady = Config { jitter: Jitter::None, exponential_base: 1.7, ..Config::default() }.build().unwrap();
    assert_eq!(steady.delay(2, 0, Duration::ZERO), ms(289));
}

#[test]
fn a_constant_seed_does_not_put_tasks_in_step() {
    for seed in [0, 1, u64::MAX, 0x9E37_79B9_7F4A_7C15] {
        let draws: HashSet<_> = (0..1_000).map(|task| draw(seed, task, 0)).collect();
        assert_eq!(draws.len(), 1_000, "seed {seed}");
    }
}

#[cfg(feature = "async")]
#[test]
fn the_budget_is_asked_before_sleeping() {
    use retry_core::{Error, Reason, Retry};
    use std::future::{Ready, ready};

    let mut bucket = Bucket::full(Limits::default(), Duration::ZERO);
    assert!(bucket.withdraw(Duration::ZERO, 10));
    let (budget, policy) = (Mutex::new(bucket), Policy::default());
    let sleep = |_| -> Ready<()> { panic!("slept, only to be refused") };
    let failed = crate::support::block_on(
        Retry::new(&policy).budget(&budget).run_async(sleep, || ready(Err::<(), _>("no"))),
    );
    let expected =
        Error::Exhausted { last: "no", attempts: 1, slept: Duration::ZERO, reason: Reason::Budget };
    assert_eq!(failed, Err(expected));
}

#[cfg(feature = "sync")]
#[test]
fn the_budget_is_asked_before_parking() {
    use retry_core::{Error, Reason, Retry};

    let mut bucket = Bucket::full(Limits::default(), Duration::ZERO);
    assert!(bucket.withdraw(Duration::ZERO, 10));
    let hour = Config { base_delay: secs(3_600), max_delay: secs(3_600), ..Config::default() };
    let (budget, policy) = (Mutex::new(bucket), hour.build().unwrap());
    let failed = Retry::new(&policy).budget(&budget).run(|| Err::<(), _>("no"));
    let expected =
        Error::Exhausted { last: "no", attempts: 1, slept: Duration::ZERO, reason: Reason::Budget };
    assert_eq!(failed, Err(expected));
}

#[cfg(feature = "sync")]
#[test]
fn callers_that_share_a_budget_never_retry_more_often_than_it_pays_for() {
    use retry_core::Retry;
    use std::sync::atomic::{AtomicUsize, Ordering};

    let limits = BucketConfig { capacity: 100, deposit: 0.0, floor: 0.0 }.build().unwrap();
    let (budget, attempts) = (Mutex::new(Bucket::full(limits, Duration::ZERO)), AtomicUsize::new(0));
    let config = Config { base_delay: Duration::ZERO, max_retries: 1_000, ..Config::default() };
    let policy = config.build().unwrap();
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let failed = Retry::new(&policy).budget(&budget).run(|| {
                    attempts.fetch_add(1, Ordering::Relaxed);
                    Err::<(), _>("no")
                });
                assert!(failed.is_err());
            });
        }
    });
    assert_eq!(attempts.into_inner(), 8 + 100);
}

/// A lock that is held while somebody's call runs, or while a caller waits, makes all others wait with it.
#[cfg(feature = "sync")]
#[test]
fn the_budget_is_not_locked_during_a_call() {
    use retry_core::{Failure, Retry};

    let budget = Mutex::new(Bucket::full(Limits::default(), Duration::ZERO));
    let policy = Config { base_delay: Duration::ZERO, ..Config::default() }.build().unwrap();
    let is_free = || assert!(budget.try_lock().is_ok(), "locked while other code runs");
    let classify = |_: &&str| {
        is_free();
        Failure::new(ErrorClass::Transient)
    };
    let only_if = |_: &&str, _: &retry_core::Attempted| {
        is_free();
        true
    };
    let call = Retry::new(&policy).budget(&budget).classify(&classify).only_if(&only_if);
    let failed = call.run(|| {
        is_free();
        Err::<(), _>("no")
    });
    assert_eq!(failed.unwrap_err().attempts(), 4);
}

#[cfg(feature = "async")]
#[test]
fn the_budget_is_not_locked_during_a_sleep() {
    use retry_core::Retry;
    use std::future::ready;

    let (budget, policy) = (Mutex::new(Bucket::full(Limits::default(), Duration::ZERO)), Policy::default());
    let is_free = || assert!(budget.try_lock().is_ok(), "locked while other code runs");
    let sleep = |_| async { is_free() };
    let failed = crate::support::block_on(Retry::new(&policy).budget(&budget).run_async(sleep, || {
        is_free();
        ready(Err::<(), _>("no"))
    }));
    assert_eq!(failed.unwrap_err().attempts(), 4);
}

#[test]
fn bounded_deferral_is_the_caller_s_since_a_refusal_here_is_final_and_says_when_to_ask_again() {
    // A job that was deferred without end could never become terminal. Nothing here defers: a withdrawal answers at
    // once, and next_at tells a caller who can store work how long its bounded wait would be, or that it is vain.
    let mut bucket = Bucket::full(Limits::default(), Duration::ZERO);
    assert!(bucket.withdraw(Duration::ZERO, 10));
    assert!(!bucket.withdraw(Duration::ZERO, 1));
    assert_eq!(bucket.next_at(Duration::ZERO, 1), Some(secs(10)));
    let never = BucketConfig { floor: 0.0, ..BucketConfig::default() }.build().unwrap();
    assert_eq!(Bucket::restore(never, bucket.level()).next_at(Duration::ZERO, 1), None);
}
