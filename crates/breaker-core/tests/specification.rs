//! The nineteen behaviours that the first specification asked of a breaker, one test each.

mod support;

use breaker_core::{Availability, RejectCause, Sample, State};
use support::{call, closed, config, fail_until_open, half_open_with, open_with, secs};

#[test]
fn breaker_starts_closed() {
    assert_eq!(closed().state(), State::Closed);
    assert_eq!(closed().epoch(), 0);
}

#[test]
fn success_in_closed_stays_closed() {
    let mut breaker = closed();
    assert!(call(&mut breaker, Sample::Success, secs(0)).counted());
    assert_eq!((breaker.state(), breaker.run(), breaker.epoch()), (State::Closed, 0, 0));
}

#[test]
fn failures_are_counted() {
    let mut breaker = closed();
    for run in 1..=4 {
        call(&mut breaker, Sample::Failure, secs(0));
        assert_eq!((breaker.state(), breaker.run()), (State::Closed, run));
    }
}

#[test]
fn breaker_opens_at_the_threshold() {
    let mut breaker = closed();
    for _ in 0..4 {
        assert_eq!(call(&mut breaker, Sample::Failure, secs(0)).transition, None);
    }
    let moved = call(&mut breaker, Sample::Failure, secs(0)).transition.expect("the fifth opens");
    assert_eq!((moved.from, moved.to), (State::Closed, State::Open));
    assert_eq!(breaker.open_until(), Some(secs(60)));
}

#[test]
fn open_rejects_at_once() {
    let mut breaker = open_with(config(), secs(0));
    let rejected = breaker.try_acquire(secs(1)).expect_err("open");
    assert_eq!((rejected.retry_after, rejected.cause), (Some(secs(59)), RejectCause::Open));
    assert_eq!(rejected.epoch, breaker.epoch());
}

#[test]
fn open_becomes_half_open_after_the_timeout_and_not_before() {
    let mut breaker = open_with(config(), secs(0));
    let before = secs(60) - std::time::Duration::from_nanos(1);
    assert!(breaker.try_acquire(before).is_err());
    assert_eq!(breaker.state(), State::Open);
    assert!(breaker.try_acquire(secs(60)).expect("due").probe);
    assert_eq!(breaker.state(), State::HalfOpen);
}

#[test]
fn half_open_closes_after_the_success_threshold() {
    let (mut breaker, probe) = half_open_with(config());
    assert_eq!(breaker.record(probe, Sample::Success, secs(61), 0).transition, None);
    assert_eq!((breaker.state(), breaker.successes()), (State::HalfOpen, 1));
    call(&mut breaker, Sample::Success, secs(62));
    assert_eq!(breaker.state(), State::Closed);
}

#[test]
fn half_open_failure_opens() {
    let (mut breaker, probe) = half_open_with(config());
    breaker.record(probe, Sample::Failure, secs(61), 0);
    assert_eq!((breaker.state(), breaker.reopens()), (State::Open, 1));
    assert_eq!(breaker.open_until(), Some(secs(121)));
}

#[test]
fn success_resets_the_failure_count() {
    let mut breaker = closed();
    for _ in 0..10 {
        for _ in 0..4 {
            call(&mut breaker, Sample::Failure, secs(0));
        }
        call(&mut breaker, Sample::Success, secs(0));
        assert_eq!((breaker.state(), breaker.run()), (State::Closed, 0));
    }
}

#[test]
fn manual_reset_closes() {
    let mut breaker = open_with(config(), secs(0));
    let moved = breaker.reset(secs(1));
    assert_eq!((moved.from, moved.to), (State::Open, State::Closed));
    assert_eq!((breaker.run(), breaker.successes(), breaker.reopens()), (0, 0, 0));
    assert!(breaker.try_acquire(secs(1)).is_ok());
}

#[test]
fn is_available_in_each_state() {
    let no = |retry_after, cause| Availability::No { retry_after, cause };
    let mut breaker = closed();
    assert_eq!(breaker.is_available(secs(0)), Availability::Yes);

    fail_until_open(&mut breaker, secs(0));
    assert_eq!(breaker.is_available(secs(20)), no(Some(secs(40)), RejectCause::Open));
    assert_eq!(breaker.is_available(secs(60)), Availability::Probe);
    assert_eq!(breaker.state(), State::Open, "looking moves nothing");

    let probe = breaker.try_acquire(secs(60)).expect("due");
    assert_eq!(breaker.is_available(secs(60)), no(Some(secs(150)), RejectCause::ProbesInFlight));
    breaker.release(probe);
    assert_eq!(breaker.is_available(secs(60)), Availability::Probe);

    breaker.force_open("ann", "maintenance", Some(secs(100)), secs(60));
    assert_eq!(breaker.is_available(secs(70)), no(Some(secs(30)), RejectCause::ForcedOpen));
    assert_eq!(breaker.is_available(secs(100)), Availability::Yes);
    breaker.force_open("ann", "maintenance", None, secs(60));
    assert_eq!(breaker.is_available(secs(70)), no(None, RejectCause::ForcedOpen));
    breaker.disable("ann", "known noise", None, secs(60));
    assert_eq!(breaker.is_available(secs(70)), Availability::Yes);
    breaker.observe("ann", "trying settings", None, secs(60));
    assert_eq!(breaker.is_available(secs(70)), Availability::Yes);
}

#[test]
fn statistics_count_calls_successes_and_failures() {
    let mut breaker = closed();
    for sample in [Sample::Success, Sample::Failure, Sample::Success, Sample::Neutral] {
        call(&mut breaker, sample, secs(0));
    }
    let stats = breaker.stats();
    assert_eq!((stats.calls, stats.successes, stats.failures), (4, 2, 1));
    assert_eq!((stats.rejections, stats.transitions), (0, 0));
}

#[test]
fn rejections_are_counted() {
    let mut breaker = open_with(config(), secs(0));
    for _ in 0..3 {
        breaker.try_acquire(secs(1)).expect_err("open");
    }
    let _ = breaker.is_available(secs(1));
    assert_eq!(breaker.stats().rejections, 3);
}

#[test]
fn transitions_are_counted() {
    let (mut breaker, probe) = half_open_with(config());
    breaker.record(probe, Sample::Success, secs(60), 0);
    call(&mut breaker, Sample::Success, secs(60));
    assert_eq!(breaker.stats().transitions, 3, "opened, half-opened, closed");
    assert_eq!(breaker.epoch(), 3);
}

#[cfg(any(feature = "sync", feature = "async"))]
mod rim {
    use super::support::{config, secs};
    use breaker_core::{Breaker, CallError, Circuit, Registry, Rim, State};
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

    /// A clock that a test steps, in seconds.
    fn stepped() -> (Arc<AtomicU64>, Rim) {
        let clock = Arc::new(AtomicU64::new(0));
        let hand = Arc::clone(&clock);
        (clock, Rim::new(move || secs(hand.load(SeqCst)), || 0))
    }

    fn circuit() -> (Arc<AtomicU64>, Circuit) {
        let (clock, rim) = stepped();
        (clock, Circuit::with_rim(Breaker::new(config()).expect("valid"), rim))
    }

    fn open(circuit: &Circuit) {
        let now = circuit.now();
        super::fail_until_open(&mut circuit.breaker().lock(), now);
    }

    #[cfg(feature = "sync")]
    mod blocking {
        use super::*;
        use breaker_core::Sample;
        use std::panic::{AssertUnwindSafe, catch_unwind};

        #[test]
        fn a_circuit_with_a_window_counts_successes_too() {
            let window = Some(breaker_core::Window::Count { size: 8, min_calls: 4 });
            let rate =
                breaker_core::Config { window, failure_rate: 0.5, failure_threshold: 8_000, ..config() };
            let circuit = Circuit::with_rim(Breaker::new(rate).expect("valid"), stepped().1);
            let call = |good: bool| circuit.call(|| if good { Ok(()) } else { Err(()) });
            for good in [true, true, true, true, true, false, false, false] {
                let _ = call(good);
            }
            assert_eq!(circuit.breaker().state(), State::Closed, "three of eight");
            let _ = call(false);
            assert_eq!(circuit.breaker().state(), State::Open, "four of eight");
        }

        #[test]
        fn a_circuit_times_its_calls() {
            let (clock, rim) = stepped();
            let window = Some(breaker_core::Window::Count { size: 8, min_calls: 4 });
            let slow = breaker_core::Config { window, slow_after: Some(secs(2)), slow_rate: 1.0, ..config() };
            let circuit = Circuit::with_rim(Breaker::new(slow).expect("valid"), rim);
            let call = |takes| circuit.call(|| Ok::<_, ()>(clock.fetch_add(takes, SeqCst)));
            for takes in [1, 2, 2, 2] {
                call(takes).expect("closed");
            }
            assert_eq!(circuit.breaker().state(), State::Closed, "one of four was quick");
            for _ in 0..5 {
                let _ = call(2);
            }
            assert_eq!(
                circuit.breaker().state(),
                State::Open,
                "all of the last eight were slow, and succeeded"
            );
        }

        #[test]
        fn sync_callable_runs_through_the_breaker() {
            let (clock, circuit) = circuit();
            assert_eq!(circuit.call(|| Ok::<_, ()>(7)), Ok(7));
            for _ in 0..5 {
                assert_eq!(circuit.call(|| Err::<(), _>("down")), Err(CallError::Failed("down")));
            }
            let mut ran = false;
            let refused = circuit.call(|| {
                ran = true;
                Ok::<_, ()>(())
            });
            assert!(matches!(refused, Err(CallError::Rejected(_))) && !ran, "open rejects without calling");
            clock.store(60, SeqCst);
            assert!(circuit.is_available());
            circuit.call(|| Ok::<_, ()>(())).expect("probe");
            circuit.call(|| Ok::<_, ()>(())).expect("probe");
            assert_eq!(circuit.breaker().state(), State::Closed);
            let stats = circuit.stats();
            assert_eq!((stats.calls, stats.successes, stats.failures, stats.rejections), (8, 3, 5, 1));
        }

        #[test]
        fn error_of_the_call_passes_through_unchanged() {
            #[derive(Debug, PartialEq)]
            struct Precise(Box<u8>);
            let (_, circuit) = circuit();
            let error = circuit.call(|| Err::<(), _>(Precise(Box::new(7)))).expect_err("failed");
            assert_eq!(error, CallError::Failed(Precise(Box::new(7))));
        }

        #[test]
        fn errors_that_do_not_count_are_neutral() {
            let (_, circuit) = circuit();
            for _ in 0..9 {
                let answer = circuit.call_if(|| Err::<(), _>("not found"), |error| *error != "not found");
                assert_eq!(answer, Err(CallError::Failed("not found")));
            }
            assert_eq!((circuit.breaker().state(), circuit.stats().failures), (State::Closed, 0));
            for _ in 0..5 {
                circuit.call_with(|| Ok::<_, ()>(500), |_| Sample::Failure).expect("an answer all the same");
            }
            assert_eq!(circuit.breaker().state(), State::Open);
        }

        #[test]
        fn panic_in_a_call_counts_as_failure() {
            let (_, circuit) = circuit();
            for _ in 0..5 {
                let call = AssertUnwindSafe(|| circuit.call(|| -> Result<(), ()> { panic!("callee") }));
                assert!(catch_unwind(call).is_err());
            }
            assert_eq!((circuit.breaker().state(), circuit.stats().failures), (State::Open, 5));
        }
    }

    #[cfg(feature = "async")]
    mod futures {
        use super::*;
        use std::future::{Future, pending, poll_fn, ready};
        use std::panic::{AssertUnwindSafe, catch_unwind};
        use std::pin::pin;
        use std::task::{Context, Poll, Waker};

        fn poll_once<F: Future>(future: F) -> Poll<F::Output> {
            pin!(future).poll(&mut Context::from_waker(Waker::noop()))
        }

        #[test]
        fn async_callable_runs_through_the_breaker() {
            let (clock, circuit) = circuit();
            for _ in 0..5 {
                let answer = poll_once(circuit.call_async(|| ready(Err::<(), _>("down"))));
                assert_eq!(answer, Poll::Ready(Err(CallError::Failed("down"))));
            }
            let mut ran = false;
            let refused = poll_once(circuit.call_async(|| {
                ran = true;
                ready(Ok::<_, ()>(()))
            }));
            assert!(matches!(refused, Poll::Ready(Err(CallError::Rejected(_)))) && !ran);
            clock.store(60, SeqCst);
            for _ in 0..2 {
                assert_eq!(poll_once(circuit.call_async(|| ready(Ok::<_, ()>(7)))), Poll::Ready(Ok(7)));
            }
            assert_eq!(circuit.breaker().state(), State::Closed);
        }

        #[test]
        fn cancelled_future_is_neutral() {
            let (clock, circuit) = circuit();
            open(&circuit);
            clock.store(60, SeqCst);
            for _ in 0..9 {
                // Polled once, then dropped at its await.
                assert!(poll_once(circuit.call_async(pending::<Result<(), ()>>)).is_pending());
            }
            let breaker = circuit.breaker().lock();
            assert_eq!((breaker.state(), breaker.probes_in_flight()), (State::HalfOpen, 0));
        }

        #[test]
        fn panicking_future_counts_as_failure() {
            let (_, circuit) = circuit();
            let call = circuit.call_async(|| poll_fn(|_| -> Poll<Result<(), ()>> { panic!("callee") }));
            assert!(catch_unwind(AssertUnwindSafe(|| poll_once(call))).is_err());
            assert_eq!(circuit.stats().failures, 1);
        }

        #[test]
        fn unpolled_future_takes_no_permit() {
            let (_, circuit) = circuit();
            drop(circuit.call_async(|| ready(Ok::<_, ()>(()))));
            assert_eq!(circuit.stats().calls, 0);
        }
    }

    #[test]
    fn registry_creates_returns_the_same_one_resets_all_and_reports_all() {
        let (_, rim) = stepped();
        let registry = Registry::with_rim(config(), rim).expect("valid");
        let (claude, codex) = (registry.get("claude"), registry.get("codex"));
        assert!(Arc::ptr_eq(&claude, &registry.get("claude")) && !Arc::ptr_eq(&claude, &codex));
        open(&claude);
        open(&codex);

        let report = registry.report();
        let keys: Vec<_> = report.iter().map(|one| (one.key.as_str(), one.state)).collect();
        assert_eq!(keys, [("claude", State::Open), ("codex", State::Open)]);
        assert!(report.iter().all(|one| one.stats.failures == 5 && one.epoch == 1));

        assert_eq!(registry.reset_all().len(), 2);
        assert!(registry.report().iter().all(|one| one.state == State::Closed));
        assert!(registry.remove("codex").is_some());
        assert!(!Arc::ptr_eq(&codex, &registry.get("codex")));
    }

    #[test]
    fn one_agents_failure_leaves_the_others_working() {
        let (_, rim) = stepped();
        let registry = Registry::with_rim(config(), rim).expect("valid");
        open(&registry.get("claude"));
        assert!(!registry.get("claude").is_available());
        assert!(registry.get("codex").is_available() && registry.get("gemini").is_available());
    }

    #[test]
    fn system_clock_gives_time_since_1970_and_never_goes_back() {
        let circuit = Circuit::new(config()).expect("valid");
        let first = circuit.now();
        assert!(first > secs(1_700_000_000) && circuit.now() >= first);
    }
}
