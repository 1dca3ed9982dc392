//! The fourteen behaviours of the first specification, by name.

use crate::support::{MODES, ms, policy, sample, secs};
use retry_core::{CapMode, Config, Jitter, Policy, Total};
use std::collections::HashSet;
use std::time::Duration;

#[test]
fn exact_delays_without_jitter() {
    let policy = policy(Jitter::None);
    let expected = [100, 200, 400, 800, 1_600, 3_200, 6_400, 12_800, 25_600, 30_000, 30_000];
    for (k, millis) in (0..).zip(expected) {
        assert_eq!(policy.delay(k, u64::MAX, Duration::ZERO), ms(millis), "retry {k}");
    }
}

#[test]
fn jitter_stays_inside_fifty_percent_and_is_not_constant() {
    let policy = Policy::default();
    for (k, (least, most)) in (0..).zip([(50, 150), (100, 300), (200, 600), (400, 1_200)]) {
        let delays = sample(&policy, k, Duration::ZERO, 1_000);
        assert!(delays.iter().all(|delay| (ms(least)..=ms(most)).contains(delay)), "retry {k}");
        assert!(delays.iter().collect::<HashSet<_>>().len() > 990, "retry {k}");
        // The whole range is used, not its middle.
        assert_eq!(policy.delay(k, 0, Duration::ZERO), ms(least));
        assert_eq!(policy.delay(k, u64::MAX, Duration::ZERO), ms(most));
    }
}

#[test]
fn delays_are_capped() {
    for jitter in MODES {
        for cap_mode in [CapMode::Fold, CapMode::Clamp] {
            let policy = Config { jitter, cap_mode, ..Config::default() }.build().unwrap();
            for k in [8, 9, 10, 63, 64, 65, 1_000, u32::MAX] {
                let longest = policy.delay(k, u64::MAX, Duration::MAX);
                assert!(longest <= secs(30), "{jitter:?} {cap_mode:?} retry {k}: {longest:?}");
                // To the nanosecond that rounding down may cost.
                assert!(
                    k == 8 || longest >= secs(30) - Duration::from_nanos(2),
                    "{jitter:?} {k}: {longest:?}"
                );
            }
        }
    }
}

#[test]
fn delays_grow_until_the_cap() {
    for jitter in MODES {
        let policy = policy(jitter);
        for k in 0..20 {
            let (now, next) = (policy.delay(k, 1 << 63, ms(100)), policy.delay(k + 1, 1 << 63, ms(100)));
            assert!(next >= now, "{jitter:?} retry {k}: {now:?} then {next:?}");
            if k < 7 && jitter != Jitter::Decorrelated {
                assert!(next > now, "{jitter:?} retry {k}");
            }
        }
    }
}

#[test]
fn total_delay_can_be_computed() {
    let total = Policy::default().total_delay(3);
    assert_eq!(total, Total { min: ms(350), mean: ms(700), max: ms(1_050) });
    assert_eq!(policy(Jitter::None).total_delay(10).mean, ms(51_100 + 30_000));
    assert_eq!(Policy::default().total_delay(0).max, Duration::ZERO);
}

#[test]
fn the_default_config_is_the_specified_one() {
    let config = Config::default();
    assert_eq!(config.max_retries, 3);
    assert_eq!(config.base_delay, ms(100));
    assert_eq!(config.exponential_base.to_bits(), 2.0_f64.to_bits());
    assert_eq!(config.max_delay, secs(30));
    assert_eq!(config.jitter, Jitter::Proportional(0.5));
    assert_eq!(config.cap_mode, CapMode::Fold);
    assert_eq!(config.build().unwrap(), Policy::default());
}

#[cfg(any(feature = "sync", feature = "async"))]
mod calls {
    use super::{Config, Duration, Policy, ms};
    #[cfg(feature = "sync")]
    use retry_core::{ErrorClass, Failure};

    pub(super) fn quick(max_retries: u32) -> Policy {
        let (base_delay, max_delay) = (Duration::from_micros(10), ms(1));
        Config { max_retries, base_delay, max_delay, ..Config::default() }.build().unwrap()
    }

    #[cfg(feature = "sync")]
    pub(super) fn by_text(error: &&'static str) -> Failure {
        Failure::new(if *error == "timeout" { ErrorClass::Timeout } else { ErrorClass::Transient })
    }
}

#[cfg(feature = "sync")]
mod blocking {
    use super::calls::{by_text, quick};
    use super::{Config, Duration, ms, secs};
    use retry_core::{Error, ErrorClass, Reason, Retry, retry};

    #[test]
    fn a_sync_callable_is_retried() {
        let mut calls = 0;
        let answer = retry(&quick(3), || {
            calls += 1;
            if calls < 2 { Err("no") } else { Ok(calls) }
        });
        assert_eq!(answer, Ok(2));
    }

    #[test]
    fn success_the_first_time_calls_once_and_never_waits() {
        let policy = Config { base_delay: secs(3_600), max_delay: secs(3_600), ..Config::default() };
        let mut calls = 0;
        let answer: Result<_, Error<&str>> = retry(&policy.build().unwrap(), || {
            calls += 1;
            Ok(calls)
        });
        assert_eq!(answer, Ok(1));
    }

    #[test]
    fn success_after_retries_is_success() {
        let mut calls = 0;
        let answer = retry(&quick(3), || {
            calls += 1;
            if calls < 4 { Err("no") } else { Ok(calls) }
        });
        assert_eq!(answer, Ok(4));
    }

    #[test]
    fn exhaustion_returns_the_last_error() {
        let mut calls = 0;
        let failed = retry(&quick(3), || -> Result<(), u32> {
            calls += 1;
            Err(calls)
        });
        let error = failed.unwrap_err();
        assert!(matches!(error, Error::Exhausted { last: 4, attempts: 4, reason: Reason::Exhausted, .. }));
        assert_eq!(error.into_last(), 4);
    }

    #[test]
    fn a_condition_stops_a_retry() {
        let policy = quick(9);
        let only_timeouts =
            Retry::new(&policy).classify(&by_text).only_if(&|_, seen| seen.class == ErrorClass::Timeout);
        let mut answers = ["timeout", "timeout", "broken", "timeout"].into_iter();
        let failed = only_timeouts.run(|| -> Result<(), _> { Err(answers.next().unwrap()) });
        assert!(matches!(
            failed,
            Err(Error::Exhausted { last: "broken", attempts: 3, reason: Reason::Refused, .. })
        ));
    }

    #[test]
    fn zero_retries_make_the_first_failure_final_and_unwrapped() {
        let mut calls = 0;
        let failed = retry(&quick(0), || -> Result<(), &str> {
            calls += 1;
            Err("no")
        });
        assert_eq!((failed, calls), (Err(Error::Single("no")), 1));
    }

    #[test]
    fn no_delay_follows_the_final_failure() {
        // Two retries of 1 ms, then one that would last an hour if it were waited for.
        let config =
            Config { max_retries: 2, base_delay: ms(1), max_delay: secs(3_600), ..Config::default() };
        let failed = retry(&config.build().unwrap(), || -> Result<(), &str> { Err("no") });
        let Err(Error::Exhausted { slept, attempts: 3, .. }) = failed else { panic!("{failed:?}") };
        assert!(slept > Duration::ZERO && slept <= ms(2 + 3), "{slept:?}");
    }
}

#[cfg(feature = "async")]
mod asynchronous {
    use super::calls::quick;
    use super::{Duration, Policy};
    use crate::support::block_on;
    use retry_core::{Error, Reason, retry_async};
    use std::cell::{Cell, RefCell};
    use std::future::ready;

    #[test]
    fn an_async_callable_is_retried() {
        let calls = Cell::new(0);
        let answer = block_on(retry_async(
            &quick(3),
            |_| ready(()),
            || {
                calls.set(calls.get() + 1);
                ready(if calls.get() < 3 { Err("no") } else { Ok(calls.get()) })
            },
        ));
        assert_eq!(answer, Ok(3));
    }

    #[test]
    fn no_delay_follows_the_final_failure_of_an_async_callable() {
        let sleeps = RefCell::new(Vec::new());
        let sleep = |delay: Duration| {
            sleeps.borrow_mut().push(delay);
            ready(())
        };
        let failed = block_on(retry_async(&Policy::default(), sleep, || ready(Err::<(), _>("no"))));
        let sum = sleeps.borrow().iter().sum();
        assert_eq!(sleeps.borrow().len(), 3);
        let expected = Error::Exhausted { last: "no", attempts: 4, slept: sum, reason: Reason::Exhausted };
        assert_eq!(failed, Err(expected));
    }
}
