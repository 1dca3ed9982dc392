//! Windows, slow calls, hints, trips, ramps and the leases of probes.

mod support;

use breaker_core::{
    Availability, Breaker, Cause, Config, RejectCause, Sample, Snapshot, State, Tally, Transition, Window,
};
use proptest::prelude::*;
use std::time::Duration;
use support::{call, closed, config, half_open_with, open_with, secs};

fn with_window(window: Window) -> Config {
    Config { window: Some(window), failure_threshold: 8_000, slow_after: Some(secs(10)), ..config() }
}

const LAST_EIGHT: Window = Window::Count { size: 8, min_calls: 4 };

fn timed(breaker: &mut Breaker, sample: Sample, took: u64, now: Duration) -> Option<Transition> {
    let permit = breaker.try_acquire(now).expect("lets through");
    breaker.record_timed(permit, sample, secs(took), now, 0).transition
}

fn made(config: Config) -> Breaker {
    Breaker::new(config).expect("valid")
}

#[test]
fn half_of_the_window_failing_opens_it_and_fewer_calls_are_not_judged() {
    let mut breaker = made(with_window(LAST_EIGHT));
    for (sample, counts) in [
        (Sample::Failure, (1, 1, 0)),
        (Sample::Failure, (2, 2, 0)),
        (Sample::Neutral, (2, 2, 0)),
        (Sample::Success, (3, 2, 0)),
        // Half of four failed by now, but a success is no reason to judge.
        (Sample::Success, (4, 2, 0)),
    ] {
        assert_eq!(call(&mut breaker, sample, secs(0)).transition, None);
        assert_eq!(breaker.window_counts(secs(0)), Some(counts));
    }
    let opened = call(&mut breaker, Sample::Failure, secs(0)).transition.expect("3 of 5");
    assert_eq!((opened.to, opened.cause), (State::Open, Cause::FailureRate));
    assert_eq!(breaker.window_counts(secs(0)), Some((0, 0, 0)), "empty after each transition");
}

#[test]
fn slow_calls_open_it_and_a_slow_success_does_not_clear_the_run() {
    let mut breaker = made(Config { slow_rate: 0.75, ..with_window(LAST_EIGHT) });
    assert_eq!(timed(&mut breaker, Sample::Failure, 1, secs(0)), None);
    assert_eq!(timed(&mut breaker, Sample::Success, 10, secs(0)), None);
    assert_eq!((breaker.run(), breaker.window_counts(secs(0))), (1, Some((2, 1, 1))));
    assert_eq!(timed(&mut breaker, Sample::Success, 9, secs(0)), None);
    assert_eq!(breaker.run(), 0, "one that is not slow does");
    for _ in 0..4 {
        assert_eq!(timed(&mut breaker, Sample::Success, 11, secs(0)), None, "5 of 7 are too few");
    }
    let opened = timed(&mut breaker, Sample::Success, 60, secs(0)).expect("6 of 8");
    assert_eq!(opened.cause, Cause::SlowRate);
}

#[test]
fn a_time_window_forgets_what_is_ten_buckets_old() {
    let mut breaker = made(with_window(Window::Time { bucket: secs(1), min_calls: 1 }));
    call(&mut breaker, Sample::Success, secs(100));
    call(&mut breaker, Sample::Success, secs(105));
    assert_eq!(breaker.window_counts(secs(109)), Some((2, 0, 0)));
    assert_eq!(breaker.window_counts(secs(110)), Some((1, 0, 0)));
    assert_eq!(breaker.window_counts(secs(10_000)), Some((0, 0, 0)), "an idle gap needs no timer");
    // A clock that goes back counts into the newest bucket.
    call(&mut breaker, Sample::Success, secs(3));
    assert_eq!(breaker.window_counts(secs(105)), Some((3, 0, 0)));
}

#[test]
fn a_hint_opens_until_then_and_one_that_is_over_is_a_failure_like_others() {
    let mut breaker = closed();
    let permit = breaker.try_acquire(secs(10)).expect("closed");
    assert_eq!(breaker.record_hint(permit, secs(9), secs(10), 0).transition, None);
    assert_eq!(breaker.run(), 1);
    let permit = breaker.try_acquire(secs(10)).expect("closed");
    let opened = breaker.record_hint(permit, secs(500), secs(10), 0).transition.expect("opens");
    assert_eq!((opened.cause, breaker.open_until()), (Cause::ServerHint, Some(secs(500))));
    // Longer than open_max would be, and yet a restart keeps it.
    let far = open_by_hint(secs(50_000));
    let again = Breaker::restore(far.snapshot(), config(), secs(11)).expect("valid");
    assert_eq!(again.open_until(), Some(secs(50_000)));
    assert_eq!(open_by_hint(secs(900_000)).open_until(), Some(secs(10 + 86_400)), "a day at most");
    // Half-open: a failed probe, closed for at least as long as usual.
    let (mut breaker, probe) = half_open_with(config());
    breaker.record_hint(probe, secs(70), secs(60), 0);
    assert_eq!((breaker.open_until(), breaker.reopens()), (Some(secs(120)), 1));
    let (mut breaker, probe) = half_open_with(config());
    let moved = breaker.record_hint(probe, secs(300), secs(60), 0).transition.expect("opens");
    assert_eq!((moved.cause, breaker.open_until()), (Cause::ServerHint, Some(secs(300))));
}

fn open_by_hint(until: Duration) -> Breaker {
    let mut breaker = closed();
    let permit = breaker.try_acquire(secs(10)).expect("closed");
    breaker.record_hint(permit, until, secs(10), 0);
    breaker
}

#[test]
fn a_hint_beside_a_reached_threshold_opens_for_the_longer_of_both() {
    for (hint, until, cause) in [(20, 70, Cause::FailureRun), (200, 200, Cause::ServerHint)] {
        let mut breaker = made(Config { failure_threshold: 1, ..config() });
        let permit = breaker.try_acquire(secs(10)).expect("closed");
        let opened = breaker.record_hint(permit, secs(hint), secs(10), 0).transition.expect("opens");
        assert_eq!((opened.cause, breaker.open_until()), (cause, Some(secs(until))));
    }
}

#[test]
fn a_trip_opens_in_every_state_and_then_probes_as_usual() {
    let mut forced = closed();
    forced.force_open("ann", "why", None, secs(0));
    let mut states = vec![closed(), open_with(config(), secs(0)), half_open_with(config()).0, forced];
    for breaker in &mut states {
        let epoch = breaker.epoch();
        let moved = breaker.trip(Some(secs(7)), secs(60), 0);
        assert_eq!((moved.to, moved.cause, moved.epoch), (State::Open, Cause::Tripped, epoch + 1));
        assert_eq!((breaker.open_until(), breaker.order()), (Some(secs(67)), None));
        assert!(breaker.try_acquire(secs(67)).expect("a probe").probe);
        breaker.trip(None, secs(70), 0);
        assert_eq!(breaker.open_until(), Some(secs(130)), "its usual period");
    }
}

/// Closed at 61 s with a ramp of 10 s.
fn ramping() -> Breaker {
    let (mut breaker, probe) =
        half_open_with(Config { ramp_for: secs(10), ramp_start: 0.1, success_threshold: 1, ..config() });
    breaker.record(probe, Sample::Success, secs(61), 0);
    breaker
}

#[test]
fn after_closing_the_limit_grows_evenly_from_its_start_to_all() {
    let mut breaker = ramping();
    assert_eq!((breaker.state(), breaker.ramp_until()), (State::Closed, Some(secs(71))));
    for (now, limit) in [(0, 10), (61, 10), (66, 55), (70, 91), (71, 100), (900, 100)] {
        assert_eq!(breaker.ramp_limit(100, secs(now)), limit, "at {now} s");
    }
    assert_eq!(breaker.ramp_limit(1, secs(61)), 1, "at least one");
    assert_eq!(breaker.next_deadline(), Some(secs(71)));
    assert_eq!(breaker.is_available(secs(61)), Availability::Yes);
    assert_eq!(breaker.tick(secs(71), 0), None, "its end is no transition");
    assert_eq!((breaker.ramp_until(), breaker.next_deadline()), (None, None));
    // An order, a reset or a closing without a probe needs none.
    breaker.reset(secs(80));
    assert_eq!(breaker.ramp_limit(100, secs(80)), 100);
}

#[test]
fn a_relapse_during_the_ramp_is_another_reopening() {
    let (mut breaker, probe) =
        half_open_with(Config { ramp_for: secs(10), success_threshold: 1, open_multiplier: 2.0, ..config() });
    breaker.record(probe, Sample::Failure, secs(60), 0);
    assert_eq!((breaker.reopens(), breaker.open_until()), (1, Some(secs(180))));
    call(&mut breaker, Sample::Success, secs(180));
    assert_eq!((breaker.state(), breaker.reopens()), (State::Closed, 1));
    for _ in 0..5 {
        call(&mut breaker, Sample::Failure, secs(185));
    }
    assert_eq!((breaker.open_until(), breaker.ramp_until()), (Some(secs(185 + 120)), None));
    call(&mut breaker, Sample::Success, secs(305));
    call(&mut breaker, Sample::Success, secs(316));
    assert_eq!(breaker.reopens(), 0, "the ramp is over");
}

#[test]
fn a_ramp_goes_on_over_a_restart_and_never_grows() {
    let before = ramping();
    let after = Breaker::restore(before.snapshot(), *before.config(), secs(66)).expect("valid");
    assert_eq!(after.snapshot(), before.snapshot());
    // The clock went back by an hour: no longer than a whole ramp.
    let mut back = before.snapshot();
    (back.since, back.ramp_until) = (secs(3_661), Some(secs(3_671)));
    let after = Breaker::restore(back, *before.config(), secs(61)).expect("valid");
    assert_eq!((after.ramp_until(), after.ramp_limit(100, secs(61))), (Some(secs(71)), 10));
}

#[test]
fn a_probe_that_never_answers_is_a_failed_one_once() {
    let leased = Config { probe_timeout: Some(secs(30)), half_open_permits: 2, ..config() };
    let (mut breaker, hanging) = half_open_with(leased);
    let other = breaker.try_acquire(secs(70)).expect("second slot");
    let refused = breaker.try_acquire(secs(80)).expect_err("none left");
    assert_eq!((refused.cause, refused.retry_after), (RejectCause::ProbesInFlight, Some(secs(10))));
    assert_eq!(breaker.next_deadline(), Some(secs(90)));
    // Nobody ticks: who asks is told what a caller would get, then and later.
    let until = |now| match breaker.is_available(secs(now)) {
        Availability::No { retry_after, cause: RejectCause::Open } => {
            retry_after.map(|wait| wait + secs(now))
        }
        other => panic!("{other:?}"),
    };
    assert_eq!((until(90), until(149)), (Some(secs(150)), Some(secs(150))));
    assert_eq!(breaker.is_available(secs(150)), Availability::Probe);
    let recorded = breaker.record(hanging, Sample::Success, secs(95), 0);
    let moved = recorded.transition.expect("the lease was over");
    assert_eq!((moved.cause, moved.to, recorded.tally), (Cause::ProbeTimedOut, State::Open, Tally::Late));
    assert_eq!((breaker.reopens(), breaker.open_until()), (1, Some(secs(150))));
    assert!(breaker.record(other, Sample::Failure, secs(96), 0).late());
    assert_eq!(breaker.reopens(), 1);
}

#[test]
fn what_is_asked_past_the_longest_half_open_is_what_a_caller_gets() {
    for now in [secs(210), secs(240), secs(269), secs(270), secs(5_000)] {
        let (mut breaker, _hanging) = half_open_with(config());
        match (breaker.is_available(now), breaker.try_acquire(now)) {
            (Availability::No { retry_after, cause }, Err(refused)) => {
                assert_eq!((retry_after, cause), (refused.retry_after, refused.cause));
                assert!(now < secs(270));
            }
            (Availability::Probe, Ok(permit)) => assert!(permit.probe && now >= secs(270)),
            odd => panic!("{odd:?}"),
        }
    }
}

#[test]
fn a_result_told_twice_frees_no_other_probes_slot() {
    let (mut breaker, first) = half_open_with(Config { half_open_permits: 2, ..config() });
    breaker.record(first, Sample::Neutral, secs(60), 0);
    let _second = breaker.try_acquire(secs(60)).expect("free");
    let _third = breaker.try_acquire(secs(60)).expect("free");
    for sample in [Sample::Neutral, Sample::Success] {
        breaker.record(first, sample, secs(60), 0);
        breaker.release(first);
        assert_eq!((breaker.probes_in_flight(), breaker.successes()), (2, 0));
    }
}

#[test]
fn observing_tells_when_a_rate_would_have_opened_it() {
    let mut breaker = made(with_window(LAST_EIGHT));
    breaker.observe("ann", "trying settings", None, secs(0));
    let told: Vec<_> = (1..=8).filter(|_| call(&mut breaker, Sample::Failure, secs(0)).would_open).collect();
    assert_eq!((told, breaker.state()), (vec![4, 8], State::Observe));
}

#[test]
fn counts_of_a_window_outlive_a_restart_but_not_other_settings() {
    for window in [LAST_EIGHT, Window::Time { bucket: secs(1), min_calls: 100 }] {
        let config = Config { failure_rate: 1.0, ..with_window(window) };
        let mut breaker = made(config);
        for sample in [Sample::Failure, Sample::Success, Sample::Failure] {
            call(&mut breaker, sample, secs(5));
        }
        let row = breaker.snapshot();
        let same = Breaker::restore(row.clone(), config, secs(5)).expect("valid");
        assert_eq!(same, breaker);
        let other = Config { slow_after: Some(secs(3)), ..config };
        let fresh = Breaker::restore(row.clone(), other, secs(5)).expect("valid");
        assert_eq!(fresh.window_counts(secs(5)), Some((0, 0, 0)));
        assert_eq!((fresh.state(), fresh.epoch(), fresh.run()), (State::Closed, 0, 1));
        breaker.set_config(other, secs(5)).expect("valid");
        assert_eq!(breaker.window_counts(secs(5)), Some((0, 0, 0)));
        for torn in [Snapshot { window: vec![1; 9], ..row.clone() }, Snapshot { version: 99, ..row.clone() }]
        {
            let restored = Breaker::restore(torn, config, secs(5)).expect("valid");
            assert_eq!(restored.window_counts(secs(5)), Some((0, 0, 0)));
        }
    }
}

#[test]
fn every_cause_has_a_name_of_its_own() {
    for cause in Cause::ALL {
        assert_eq!(Cause::from_name(cause.as_str()), Some(cause));
    }
    assert_eq!(Cause::from_name("NOPE"), None);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    /// Against all calls, kept in a list: what is counted, and when it opens.
    #[test]
    fn windows_count_as_a_list_of_calls_would(
        by_count in any::<bool>(), size in 8..40_u32, least in 1..8_u32, rate in 0.01..=1.0_f64,
        slow_rate in 0.01..=1.0_f64,
        calls in proptest::collection::vec((any::<bool>(), any::<bool>(), 0..4_u64), 1..120),
    ) {
        let window = if by_count {
            Window::Count { size, min_calls: least }
        } else {
            Window::Time { bucket: secs(2), min_calls: least }
        };
        let config = Config { failure_rate: rate, slow_rate, ..with_window(window) };
        let mut breaker = made(config);
        let mut kept: Vec<(u64, bool, bool)> = Vec::new();
        let mut now = 1_000;
        for (failed, slow, by) in calls {
            now += by;
            kept.push((now, failed, slow));
            let counted: Vec<_> = if by_count {
                kept.iter().rev().take(size as usize).collect()
            } else {
                kept.iter().filter(|(at, ..)| at / 2 + 10 > now / 2).collect()
            };
            let failures = counted.iter().filter(|(_, failed, _)| *failed).count() as u32;
            let slows = counted.iter().filter(|(.., slow)| *slow).count() as u32;
            let all = counted.len() as u32;
            let part = |some: u32| f64::from(some) / f64::from(all);
            let judged = all >= least;
            let opens = judged && (failed && part(failures) >= rate || slow && part(slows) >= slow_rate);
            let sample = if failed { Sample::Failure } else { Sample::Success };
            let moved = timed(&mut breaker, sample, if slow { 10 } else { 0 }, secs(now));
            prop_assert_eq!(moved.is_some(), opens);
            if opens {
                breaker.reset(secs(now));
                kept.clear();
            } else {
                prop_assert_eq!(breaker.window_counts(secs(now)), Some((all, failures, slows)));
            }
            let again = Breaker::restore(breaker.snapshot(), config, secs(now)).expect("valid");
            prop_assert_eq!(&again.snapshot(), &breaker.snapshot());
        }
    }
}
