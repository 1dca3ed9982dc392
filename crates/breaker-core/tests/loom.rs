//! Every interleaving of a few threads on one shared breaker: three threads with up to three operations each. Empty unless
//! compiled with `--cfg loom`: `just loom`.

#![cfg(loom)]

use breaker_core::{Config, Permit, Sample, Shared, State};
use loom::sync::Arc;
use loom::sync::atomic::{AtomicU32, Ordering::SeqCst};
use loom::thread;
use std::time::Duration;

fn secs(secs: u64) -> Duration {
    Duration::from_secs(secs)
}

fn config() -> Config {
    Config { open_jitter: 0.0, probe_timeout: None, ..Config::default() }
}

/// Runs three threads in every order in which they can be switched between, up to so many forced switches.
fn explore(switches: usize, model: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(switches);
    builder.check(model);
}

/// Open at 0 s, and due at 60 s.
fn due(config: Config) -> Shared {
    let shared = Shared::new(Config { failure_threshold: 1, ..config }).expect("valid");
    let permit = shared.try_acquire(secs(0)).expect("closed");
    shared.record(permit, Sample::Failure, secs(0), 0);
    shared
}

fn three(shared: &Arc<Shared>, work: impl Fn(usize, &Shared) + Send + Sync + Copy + 'static) {
    let others: Vec<_> = (1..3)
        .map(|number| {
            let shared = Arc::clone(shared);
            thread::spawn(move || work(number, &shared))
        })
        .collect();
    work(0, shared);
    for other in others {
        other.join().expect("no panic");
    }
}

#[test]
fn probes_in_flight_never_exceed_the_limit_and_one_caller_moves_it() {
    for permits in [1, 2] {
        explore(2, move || {
            let shared =
                Arc::new(due(Config { half_open_permits: permits, success_threshold: 9, ..config() }));
            let in_flight = Arc::new(AtomicU32::new(0));
            let given = Arc::new(AtomicU32::new(0));
            let threads: Vec<_> = (0..2)
                .map(|_| {
                    let (shared, in_flight, given) =
                        (Arc::clone(&shared), Arc::clone(&in_flight), Arc::clone(&given));
                    thread::spawn(move || try_probe(&shared, &in_flight, &given, permits))
                })
                .collect();
            try_probe(&shared, &in_flight, &given, permits);
            for thread in threads {
                thread.join().expect("no panic");
            }
            let breaker = shared.lock();
            assert_eq!((breaker.state(), breaker.probes_in_flight()), (State::HalfOpen, 0));
            assert_eq!(breaker.epoch(), 2, "one winner of the move");
            assert_eq!(breaker.successes(), given.load(SeqCst), "no probe is lost");
        });
    }
}

fn try_probe(shared: &Shared, in_flight: &AtomicU32, given: &AtomicU32, permits: u32) {
    if let Ok(permit) = shared.try_acquire(secs(60)) {
        assert!(permit.probe);
        assert!(in_flight.fetch_add(1, SeqCst) < permits, "more probes than permits");
        given.fetch_add(1, SeqCst);
        in_flight.fetch_sub(1, SeqCst);
        shared.record(permit, Sample::Success, secs(60), 0);
    }
}

#[test]
fn no_failure_is_lost() {
    explore(2, || {
        let shared = Arc::new(Shared::new(Config { failure_threshold: 3, ..config() }).expect("valid"));
        three(&shared, |_, shared| {
            if let Ok(permit) = shared.try_acquire(secs(1)) {
                shared.record(permit, Sample::Failure, secs(1), 0);
            }
        });
        let breaker = shared.lock();
        assert_eq!((breaker.state(), breaker.epoch()), (State::Open, 1), "the third of three opens it");
        assert_eq!(breaker.stats().failures, 3);
    });
}

#[test]
fn one_transition_has_one_winner_and_the_others_are_late() {
    explore(2, || {
        let config = Config { half_open_permits: 3, success_threshold: 1, ..config() };
        let shared = Arc::new(due(config));
        let permits: [Permit; 3] =
            std::array::from_fn(|_| shared.try_acquire(secs(60)).expect("three slots"));
        three(&shared, move |number, shared| {
            let sample = if number == 0 { Sample::Failure } else { Sample::Success };
            shared.record(permits[number], sample, secs(60), 0);
        });
        let breaker = shared.lock();
        assert_eq!(breaker.epoch(), 3, "opened, half-open, and one verdict");
        let stats = breaker.stats();
        assert_eq!(stats.late_ok + stats.late_err, 2);
        assert_eq!(breaker.probes_in_flight(), 0);
    });
}

#[test]
fn a_slot_is_freed_once_however_often_its_result_is_told() {
    explore(2, || {
        let shared = Arc::new(due(Config { half_open_permits: 2, success_threshold: 9, ..config() }));
        let first = shared.try_acquire(secs(60)).expect("a slot");
        let _second = shared.try_acquire(secs(60)).expect("a slot");
        three(&shared, move |number, shared| {
            if number < 2 {
                shared.release(first);
            } else if let Ok(permit) = shared.try_acquire(secs(60)) {
                shared.release(permit);
            }
        });
        assert_eq!(shared.lock().probes_in_flight(), 1, "the second is still in flight");
    });
}

#[test]
fn what_a_closed_breaker_counts_is_exact() {
    explore(2, || {
        let shared = Arc::new(Shared::new(config()).expect("valid"));
        three(&shared, |number, shared| {
            let permit = shared.try_acquire(secs(1)).expect("closed");
            let sample = if number == 0 { Sample::Failure } else { Sample::Success };
            shared.record(permit, sample, secs(1), 0);
        });
        let stats = shared.stats();
        assert_eq!((stats.calls, stats.successes, stats.failures), (3, 2, 1));
    });
}
