//! Eight threads on one breaker: the limit of permits holds and each transition has one winner.

mod support;

use breaker_core::{Breaker, Cause, Config, Rejected, Sample, Shared, State};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::sync::{Barrier, Mutex};
use std::thread;
use support::{config, fail_until_open, open_with, secs};

const THREADS: usize = 8;

fn in_threads(work: impl Fn(usize) + Sync) {
    let work = &work;
    thread::scope(|scope| {
        for index in 0..THREADS {
            scope.spawn(move || work(index));
        }
    });
}

#[test]
fn probes_in_flight_never_exceed_the_limit() {
    const LIMIT: usize = 3;
    let config = Config { half_open_permits: LIMIT as u32, success_threshold: 200, ..config() };
    let shared = Shared::from(open_with(config, secs(0)));
    let (in_flight, most) = (AtomicUsize::new(0), AtomicUsize::new(0));
    in_threads(|index| {
        for round in 0..2_000 {
            let Ok(guard) = shared.acquire(secs(60)) else { continue };
            assert!(guard.permit().probe);
            most.fetch_max(in_flight.fetch_add(1, SeqCst) + 1, SeqCst);
            thread::yield_now();
            in_flight.fetch_sub(1, SeqCst);
            // Mostly given up by dropping; some by saying so twice.
            if (round + index) % 3 == 0 {
                let permit = guard.permit();
                guard.record(Sample::Neutral, secs(60), 0);
                assert_eq!(permit.epoch, 2);
            }
        }
    });
    assert!((1..=LIMIT).contains(&most.load(SeqCst)), "{most:?}");
    let breaker = shared.lock();
    assert_eq!((breaker.state(), breaker.probes_in_flight()), (State::HalfOpen, 0));
}

#[test]
fn every_transition_has_exactly_one_winner() {
    let shared =
        Shared::new(Config { failure_threshold: 3, success_threshold: 2, ..config() }).expect("valid");
    let clock = AtomicU64::new(0);
    let won = Mutex::new(Vec::new());
    let barrier = Barrier::new(THREADS);
    in_threads(|index| {
        for round in 0..500_u64 {
            if barrier.wait().is_leader() {
                clock.fetch_add(30, SeqCst);
            }
            barrier.wait();
            let now = secs(clock.load(SeqCst));
            let Ok(permit) = shared.try_acquire(now) else { continue };
            let sample =
                if (round / 7 + index as u64).is_multiple_of(3) { Sample::Success } else { Sample::Failure };
            if let Some(transition) = shared.record(permit, sample, now, 0).transition {
                won.lock().expect("no panic").push(transition);
            }
        }
    });
    let breaker = shared.lock();
    assert_eq!(breaker.epoch(), breaker.stats().transitions);
    let mut won = won.into_inner().expect("no panic");
    won.sort_by_key(|transition| transition.epoch);
    assert!(won.len() > 50, "{} transitions", won.len());
    for pair in won.windows(2) {
        assert!(pair[0].epoch < pair[1].epoch, "one winner each");
        // What lies between two recorded ones is the acquiring of a first probe.
        let between = pair[1].epoch - pair[0].epoch - 1;
        assert_eq!(between, u64::from(pair[1].cause != Cause::FailureRun), "{pair:?}");
    }
}

#[test]
fn one_thread_of_eight_makes_an_open_breaker_half_open() {
    for _ in 0..200 {
        let shared = Shared::from(open_with(config(), secs(0)));
        let barrier = Barrier::new(THREADS);
        let probes = AtomicUsize::new(0);
        in_threads(|_| {
            barrier.wait();
            if shared.try_acquire(secs(60)).is_ok() {
                probes.fetch_add(1, SeqCst);
            }
        });
        assert_eq!(probes.into_inner(), 1);
        assert_eq!(shared.stats().transitions, 2);
    }
}

#[test]
fn statistics_are_exact_once_all_calls_have_returned() {
    const CALLS: u64 = 20_000;
    let shared = Shared::new(Config { failure_threshold: 8_000, ..config() }).expect("valid");
    in_threads(|index| {
        for call in 0..CALLS {
            let permit = shared.try_acquire(secs(0)).expect("closed");
            let failed = index == 0 && call % 100 == 0;
            shared.record(permit, if failed { Sample::Failure } else { Sample::Success }, secs(0), 0);
            if call % 5_000 == 0 {
                let _ = shared.stats();
            }
        }
    });
    let stats = shared.stats();
    let all = CALLS * THREADS as u64;
    assert_eq!((stats.calls, stats.successes, stats.failures), (all, all - CALLS / 100, CALLS / 100));

    fail_until_open(&mut shared.lock(), secs(0));
    in_threads(|_| {
        for _ in 0..CALLS {
            let rejected = shared.try_acquire(secs(20)).expect_err("open");
            assert_eq!(rejected.retry_after, Some(secs(40)));
        }
    });
    assert_eq!(shared.stats().rejections, all);
}

#[test]
fn no_failure_is_lost_between_threads() {
    let shared = Shared::new(Config { failure_threshold: 8_000, ..config() }).expect("valid");
    in_threads(|_| {
        for _ in 0..1_000 {
            let permit = shared.try_acquire(secs(0)).expect("closed");
            shared.record(permit, Sample::Failure, secs(0), 0);
        }
    });
    assert_eq!((shared.state(), shared.lock().epoch()), (State::Open, 1));
}

#[test]
fn order_given_under_the_lock_binds_the_fast_path_at_once() {
    let shared = Shared::new(config()).expect("valid");
    shared.lock().force_open("ann", "maintenance", None, secs(0));
    assert!(shared.try_acquire(secs(0)).is_err());
    shared.lock().reset(secs(0));
    assert!(shared.try_acquire(secs(0)).is_ok());
}

#[test]
fn panic_while_holding_the_lock_leaves_a_working_breaker() {
    let shared = Shared::new(config()).expect("valid");
    let panicked = thread::scope(|scope| {
        let holder = scope.spawn(|| {
            let mut breaker = shared.lock();
            fail_until_open(&mut breaker, secs(0));
            panic!("holder");
        });
        holder.join().is_err()
    });
    assert!(panicked);
    let rejected: Rejected = shared.try_acquire(secs(1)).expect_err("what was done under the lock holds");
    assert_eq!(rejected.retry_after, Some(secs(59)));
}

#[test]
fn epoch_beyond_the_word_takes_the_lock_and_stays_exact() {
    for epoch in [(1 << 48) - 1, 1 << 48, u64::MAX] {
        let mut snapshot = support::closed().snapshot();
        snapshot.epoch = epoch;
        let shared = Shared::from(Breaker::restore(snapshot, config(), secs(0)).expect("valid"));
        let permit = shared.try_acquire(secs(0)).expect("closed");
        assert_eq!(permit.epoch, epoch);
        assert!(shared.record(permit, Sample::Success, secs(0), 0).counted());
        fail_until_open(&mut shared.lock(), secs(0));
        assert_eq!(shared.try_acquire(secs(0)).expect_err("open").epoch, epoch.wrapping_add(1));
    }
}
