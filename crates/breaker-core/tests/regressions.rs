//! Defects found in other breakers, each made impossible here.

mod support;

use breaker_core::{Breaker, Config, RejectCause, Sample, State, Tally, Window};
use support::{call, closed, config, half_open_with, open_with, secs};

fn with_permits(half_open_permits: u32) -> Config {
    Config { half_open_permits, success_threshold: 200, ..config() }
}

#[test]
fn half_open_does_not_admit_everyone() {
    for limit in [1, 2, 7] {
        let mut breaker = open_with(with_permits(limit), secs(0));
        let admitted = (0..1_000).filter(|_| breaker.try_acquire(secs(60)).is_ok()).count();
        assert_eq!(admitted, limit as usize);
    }
}

#[test]
fn success_admitted_before_the_trip_does_not_close() {
    let mut breaker = Breaker::new(Config { success_threshold: 1, ..config() }).expect("valid");
    let early = breaker.try_acquire(secs(0)).expect("closed");
    for _ in 0..5 {
        call(&mut breaker, Sample::Failure, secs(0));
    }
    assert_eq!(breaker.record(early, Sample::Success, secs(1), 0).tally, Tally::Late);
    assert_eq!(breaker.state(), State::Open);
    let _probe = breaker.try_acquire(secs(60)).expect("due");
    assert!(breaker.record(early, Sample::Success, secs(61), 0).late());
    assert_eq!((breaker.state(), breaker.stats().late_ok), (State::HalfOpen, 2));
}

#[test]
fn results_of_the_closed_period_do_not_decide_the_half_open_verdict() {
    let mut breaker = closed();
    let early: Vec<_> = (0..10).map(|_| breaker.try_acquire(secs(0)).expect("closed")).collect();
    for permit in &early[..5] {
        breaker.record(*permit, Sample::Failure, secs(0), 0);
    }
    let probe = breaker.try_acquire(secs(60)).expect("due");
    for permit in &early[5..] {
        breaker.record(*permit, Sample::Failure, secs(61), 0);
    }
    assert_eq!((breaker.state(), breaker.stats().late_err), (State::HalfOpen, 5));
    assert!(breaker.record(probe, Sample::Success, secs(61), 0).counted());
}

#[test]
fn cancelled_probes_do_not_reject_for_ever() {
    let (mut breaker, mut probe) = half_open_with(config());
    for _ in 0..100 {
        breaker.record(probe, Sample::Neutral, secs(60), 0);
        probe = breaker.try_acquire(secs(60)).expect("the slot is free again");
    }
    breaker.record(probe, Sample::Success, secs(60), 0);
    call(&mut breaker, Sample::Success, secs(60));
    assert_eq!(breaker.state(), State::Closed);
}

#[test]
fn cancelled_probe_does_not_close() {
    let (mut breaker, probe) = half_open_with(Config { success_threshold: 1, ..config() });
    let recorded = breaker.record(probe, Sample::Neutral, secs(60), 0);
    assert_eq!((recorded.tally, recorded.transition), (Tally::Uncounted, None));
    assert_eq!((breaker.state(), breaker.successes()), (State::HalfOpen, 0));
}

#[test]
fn probe_counter_does_not_underflow() {
    let (mut breaker, probe) = half_open_with(with_permits(1));
    for sample in [Sample::Neutral, Sample::Neutral, Sample::Success, Sample::Success] {
        breaker.record(probe, sample, secs(60), 0);
        breaker.release(probe);
    }
    assert_eq!(breaker.probes_in_flight(), 0);
    assert_eq!(breaker.successes(), 0, "a slot that is gone decides nothing");
    let admitted = (0..100).filter(|_| breaker.try_acquire(secs(60)).is_ok()).count();
    assert_eq!(admitted, 1);
}

#[test]
fn foreign_release_does_not_lift_permits_above_the_limit() {
    let mut breaker = closed();
    breaker.set_config(with_permits(2), secs(0)).expect("valid");
    let foreign = breaker.try_acquire(secs(0)).expect("closed");
    for _ in 0..5 {
        call(&mut breaker, Sample::Failure, secs(0));
    }
    let _first = breaker.try_acquire(secs(60)).expect("due");
    let _second = breaker.try_acquire(secs(60)).expect("two slots");
    let forged = breaker_core::Permit { epoch: breaker.epoch(), probe: false, slot: 0 };
    for permit in [foreign, forged] {
        for sample in [Sample::Neutral, Sample::Success, Sample::Failure] {
            breaker.record(permit, sample, secs(60), 0);
        }
    }
    assert_eq!((breaker.state(), breaker.probes_in_flight()), (State::HalfOpen, 2));
    let rejected = breaker.try_acquire(secs(60)).expect_err("both slots are in use");
    assert_eq!(rejected.cause, RejectCause::ProbesInFlight);
}

#[test]
fn opens_on_the_fifth_failure_and_not_on_the_sixth() {
    let mut breaker = closed();
    let opened = (1..=6).find(|_| call(&mut breaker, Sample::Failure, secs(0)).transition.is_some());
    assert_eq!(opened, Some(5));
}

#[test]
fn hanging_probe_does_not_block_for_ever() {
    // By the timer of whoever keeps one …
    let (mut breaker, _hanging) = half_open_with(config());
    assert_eq!(breaker.next_deadline(), Some(secs(210)));
    assert_eq!(breaker.tick(secs(209), 0), None);
    let moved = breaker.tick(secs(210), 0).expect("150 s of half-open");
    assert_eq!((moved.to, moved.cause), (State::Open, breaker_core::Cause::Inconclusive));
    assert!(breaker.try_acquire(secs(270)).expect("a new half-open").probe);

    // … and without a timer, by asking.
    let (mut breaker, hanging) = half_open_with(config());
    let rejected = breaker.try_acquire(secs(210)).expect_err("opens again");
    assert_eq!((rejected.cause, rejected.retry_after), (RejectCause::Open, Some(secs(60))));
    let _probe = breaker.try_acquire(secs(270)).expect("a new half-open");
    assert!(breaker.record(hanging, Sample::Success, secs(271), 0).late());
    assert_eq!((breaker.probes_in_flight(), breaker.successes()), (1, 0));
}

#[test]
fn clock_going_back_does_not_lengthen_an_open_period() {
    let mut breaker = open_with(config(), secs(10_000));
    assert_eq!(breaker.retry_after(secs(100)), Some(secs(60)));
    assert_eq!(breaker.try_acquire(secs(100)).expect_err("open").retry_after, Some(secs(60)));
    assert!(breaker.try_acquire(secs(160)).is_ok());
}

fn windowed(window: Window) -> Breaker {
    let config = Config { window: Some(window), failure_rate: 0.5, failure_threshold: 8_000, ..config() };
    Breaker::new(config).expect("valid")
}

#[test]
fn a_window_of_a_hundred_forgets_ten_thousand_successes() {
    let mut breaker = windowed(Window::Count { size: 100, min_calls: 100 });
    for _ in 0..10_000 {
        call(&mut breaker, Sample::Success, secs(1));
    }
    let failures = (1..).find(|_| {
        call(&mut breaker, Sample::Failure, secs(1));
        breaker.state() == State::Open
    });
    assert_eq!(failures, Some(50), "half of the last hundred");
}

#[test]
fn a_time_window_is_fed() {
    let mut breaker = windowed(Window::Time { bucket: secs(1), min_calls: 10 });
    for _ in 0..5 {
        call(&mut breaker, Sample::Success, secs(1));
        call(&mut breaker, Sample::Failure, secs(1));
    }
    assert_eq!(breaker.state(), State::Open);
}

#[cfg(feature = "sync")]
#[test]
fn the_lock_is_not_held_during_a_call() {
    let circuit = breaker_core::Circuit::new(config()).expect("valid");
    // It would never return.
    let inner = circuit.call(|| circuit.call(|| Ok::<_, ()>(circuit.breaker().lock().state())).map_err(drop));
    assert_eq!(inner.map_err(drop), Ok(State::Closed));
}
