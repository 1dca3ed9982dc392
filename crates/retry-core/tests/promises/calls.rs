//! The call wrappers: waiting, cancelling, budgets. What they decide is tested where it is decided.

#[cfg(feature = "sync")]
use crate::support::ms;
use crate::support::secs;
use retry_core::{Bucket, BucketConfig, Config, Policy};
use std::sync::Mutex;
use std::time::Duration;

/// Delays of an hour: a test that waits for one of them does not end.
fn patient() -> Policy {
    Config { base_delay: secs(3_600), max_delay: secs(3_600), ..Config::default() }.build().unwrap()
}

fn tokens(capacity: u32) -> Mutex<Bucket> {
    let limits = BucketConfig { capacity, deposit: 0.1, floor: 0.0 }.build().unwrap();
    Mutex::new(Bucket::full(limits, Duration::ZERO))
}

fn left(budget: &Mutex<Bucket>) -> u64 {
    budget.lock().unwrap().available(Duration::ZERO)
}

#[cfg(feature = "sync")]
mod blocking {
    use super::*;
    use retry_core::{Cancel, Error, ErrorClass, Failure, Reason, Retry, retry};
    use std::sync::mpsc;
    use std::thread;

    #[test]
    fn cancelling_wakes_a_parked_thread_which_returns_its_last_error() {
        let (cancel, budget, policy) = (Cancel::new(), tokens(5), patient());
        let (failing, failed) = mpsc::channel();
        thread::scope(|scope| {
            let call = scope.spawn(|| {
                Retry::new(&policy).cancel(&cancel).budget(&budget).run(|| -> Result<(), &str> {
                    failing.send(()).unwrap();
                    Err("no")
                })
            });
            failed.recv_timeout(secs(10)).unwrap();
            // Whether the thread is parked by now or not: neither order may lose the cancellation.
            cancel.cancel();
            let expected = Error::Exhausted {
                last: "no",
                attempts: 1,
                slept: Duration::ZERO,
                reason: Reason::Cancelled,
            };
            assert_eq!(call.join().unwrap(), Err(expected));
        });
        assert_eq!(left(&budget), 5_000, "the reserved token goes back");
    }

    #[test]
    fn a_call_cancelled_before_it_fails_makes_one_attempt_and_never_waits() {
        let (cancel, policy) = (Cancel::new(), patient());
        cancel.cancel();
        let call = Retry::new(&policy).cancel(&cancel);
        assert_eq!(call.run(|| Ok::<_, &str>(1)), Ok(1));
        let failed = call.run(|| Err::<(), _>("no")).unwrap_err();
        assert!(matches!(failed, Error::Exhausted { attempts: 1, reason: Reason::Cancelled, .. }));
    }

    #[test]
    fn a_permanent_error_is_returned_at_once() {
        let policy = patient();
        let failed = Retry::new(&policy)
            .classify(&|_| Failure::new(ErrorClass::Permanent))
            .run(|| Err::<(), _>("bad input"))
            .unwrap_err();
        assert_eq!((*failed.last(), failed.attempts()), ("bad input", 1));
        assert!(matches!(failed, Error::Exhausted { reason: Reason::NotRetryable, .. }));
    }

    #[test]
    fn a_deadline_shorter_than_the_delay_ends_the_call_at_once() {
        let policy = patient();
        let failed = Retry::new(&policy).deadline(secs(60)).run(|| Err::<(), _>("no")).unwrap_err();
        assert!(matches!(failed, Error::Exhausted { attempts: 1, reason: Reason::Deadline, .. }));
    }

    #[test]
    fn retries_draw_on_the_budget_by_class_and_successes_fill_it() {
        let config = Config {
            base_delay: Duration::from_micros(1),
            max_delay: ms(1),
            max_retries: 9,
            ..Config::default()
        };
        let (budget, policy) = (tokens(5), config.build().unwrap());
        let call = Retry::new(&policy).budget(&budget).classify(&|_| Failure::new(ErrorClass::Timeout));
        let failed = call.run(|| Err::<(), _>("slow")).unwrap_err();
        assert!(matches!(failed, Error::Exhausted { attempts: 3, reason: Reason::Budget, .. }));
        assert_eq!(left(&budget), 1_000, "two retries at two tokens each");
        call.run(|| Ok::<_, &str>(())).unwrap();
        assert_eq!(left(&budget), 1_100);
    }

    #[test]
    fn the_same_key_waits_the_same_time() {
        let config = Config { base_delay: Duration::from_micros(50), max_delay: ms(1), ..Config::default() };
        let policy = config.build().unwrap();
        let slept = |task| match Retry::new(&policy).key(7, task).run(|| Err::<(), _>(())) {
            Err(Error::Exhausted { slept, .. }) => slept,
            other => panic!("{other:?}"),
        };
        assert_eq!(slept(1), slept(1));
        assert_ne!(slept(1), slept(2));
    }

    #[test]
    fn calls_without_a_key_do_not_wait_in_step() {
        let config = Config { base_delay: Duration::from_micros(50), max_delay: ms(1), ..Config::default() };
        let policy = config.build().unwrap();
        let slept = || match retry(&policy, || Err::<(), _>(())) {
            Err(Error::Exhausted { slept, .. }) => slept,
            other => panic!("{other:?}"),
        };
        assert_ne!([slept(), slept(), slept()], [slept(), slept(), slept()]);
    }

    #[test]
    fn an_error_shows_its_reason_and_leads_to_the_last_error() {
        use std::error::Error as _;
        let number = || "x".parse::<u32>();
        let failed = retry(&patient().with_max_retries(0).unwrap(), number).unwrap_err();
        assert_eq!(failed.to_string(), "invalid digit found in string");
        let policy = patient();
        let failed = Retry::new(&policy).deadline(ms(1)).run(number).unwrap_err();
        assert_eq!(failed.to_string(), "gave up after attempt 1: the deadline leaves no time for a retry");
        assert_eq!(failed.source().unwrap().to_string(), "invalid digit found in string");
    }
}

#[cfg(feature = "async")]
mod asynchronous {
    use super::*;
    use crate::support::block_on;
    use retry_core::{Cancel, Error, Reason, Retry};
    use std::cell::RefCell;
    use std::future::{pending, ready};
    use std::pin::pin;
    use std::sync::mpsc;
    use std::task::{Context, Poll, Waker};
    use std::thread;

    #[test]
    fn cancelling_wakes_a_sleeping_future_which_returns_its_last_error() {
        let (cancel, budget, policy) = (Cancel::new(), tokens(5), patient());
        let (sleeping, slept) = mpsc::channel();
        thread::scope(|scope| {
            let cancel = &cancel;
            scope.spawn(move || {
                slept.recv_timeout(secs(10)).unwrap();
                cancel.cancel();
            });
            let sleep = |_| {
                sleeping.send(()).unwrap();
                pending::<()>()
            };
            let failed = block_on(
                Retry::new(&policy)
                    .cancel(cancel)
                    .budget(&budget)
                    .run_async(sleep, || ready(Err::<(), _>("no"))),
            );
            assert!(matches!(
                failed,
                Err(Error::Exhausted { last: "no", attempts: 1, reason: Reason::Cancelled, .. })
            ));
        });
        assert_eq!(left(&budget), 5_000);
    }

    #[test]
    fn one_handle_cancels_many_futures_and_dropped_ones_leave_no_trace() {
        let (cancel, policy) = (Cancel::new(), patient());
        let retry = Retry::new(&policy).cancel(&cancel);
        let call = || Box::pin(retry.run_async(|_| pending::<()>(), || ready(Err::<(), _>("no"))));
        let mut cx = Context::from_waker(Waker::noop());
        let mut calls: Vec<_> = (0..3).map(|_| call()).collect();
        assert!(calls.iter_mut().all(|call| call.as_mut().poll(&mut cx).is_pending()));
        drop(calls.remove(1));
        cancel.cancel();
        for call in &mut calls {
            assert!(matches!(call.as_mut().poll(&mut cx), Poll::Ready(Err(_))));
        }
    }

    #[test]
    fn a_dropped_future_gives_its_token_back() {
        let (budget, policy) = (tokens(5), patient());
        {
            let retry = Retry::new(&policy).budget(&budget);
            let mut call = pin!(retry.run_async(|_| pending::<()>(), || ready(Err::<(), _>("no"))));
            assert!(call.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
            assert_eq!(left(&budget), 4_000);
        }
        assert_eq!(left(&budget), 5_000);
    }

    #[test]
    fn slept_time_counts_even_where_sleeping_is_instant() {
        let config =
            Config { max_elapsed: Some(secs(3)), base_delay: secs(1), max_retries: 100, ..Config::default() };
        let policy = config.build().unwrap();
        let sleeps = RefCell::new(Duration::ZERO);
        let sleep = |delay| {
            *sleeps.borrow_mut() += delay;
            ready(())
        };
        let failed =
            block_on(Retry::new(&policy).run_async(sleep, || ready(Err::<(), _>("no")))).unwrap_err();
        assert!(matches!(failed, Error::Exhausted { reason: Reason::MaxElapsed, .. }));
        assert!(*sleeps.borrow() <= secs(3));
    }

    #[test]
    fn the_future_can_be_sent_to_another_thread() {
        fn sendable<T: Send>(value: T) -> T {
            value
        }
        let (cancel, budget, policy) = (Cancel::new(), tokens(5), Policy::default());
        let retry = Retry::new(&policy)
            .cancel(&cancel)
            .budget(&budget)
            .classify(&|_| retry_core::Failure::new(retry_core::ErrorClass::Timeout));
        let call = sendable(retry.run_async(|_| ready(()), || ready(Err::<(), _>(String::new()))));
        assert!(block_on(call).is_err());
    }
}
