//! What keeps all tasks of an agent, or of a type, from running: a pause, a breaker, its ramp, and workers.

use super::{alone, breaker, facts, pause, shut};
use crate::session::session;
use crate::support::{Life, START, seconds};
use breaker_core::{Cause, State as Breaker};
use ledger_core::explain::GateKind::{Breaker as BreakerGate, NoRoom, NoWorker, Paused, Ramp, TypeNotServed};
use ledger_core::explain::{BreakerFacts, Facts, RampFacts, WorkerFacts, explain};
use ledger_core::{Now, TaskId};

#[test]
fn a_pause_tells_by_whom_and_why_and_its_end() {
    let life = Life::new();
    let detail = "Agent a was paused 1 min 30 s ago by ann (new licence), until it is resumed.";
    let known = Facts { pause: Some(pause(None)), ..facts(&life) };
    alone(&known, "Agent a is paused.", (Paused, detail, None, 0.0, 0.0));
    let until = START.after(seconds(600));
    let mut silent = pause(Some(until));
    (silent.actor, silent.reason) = ("".into(), "".into());
    // The end is on the steady clock; people read it on theirs.
    let now = Now { at: START, skew: 1_000 };
    let known = Facts { now, pause: Some(silent), ..facts(&life) };
    let detail = "Agent a was paused 1 min 30 s ago, for another 10 min.";
    alone(&known, "Agent a is paused.", (Paused, detail, Some(until.after(seconds(1))), 0.0, 0.0));
}

#[test]
fn a_shut_breaker_tells_its_state_its_cause_and_its_next_probe() {
    let until = Some(START.after(seconds(55)));
    let open = BreakerFacts { until, cause: Some(Cause::FailureRun), ..breaker(Breaker::Open) };
    let typed = BreakerFacts { task_type: "thumbnail".into(), ..open.clone() };
    let tripped = BreakerFacts { actor: "ann".into(), reason: "it lies".into(), ..open.clone() };
    let forced =
        BreakerFacts { actor: "ann".into(), reason: "repairs".into(), ..breaker(Breaker::ForcedOpen) };
    let for_now = BreakerFacts { until, ..forced.clone() };
    let probing = BreakerFacts { probes: 2, ..breaker(Breaker::HalfOpen) };
    let cases = [
        (open, "OPEN", "OPEN for 5 s (too many failures in a row) and lets a probe through in 55 s"),
        (typed, "OPEN", "OPEN for 5 s (too many failures in a row) and lets a probe through in 55 s"),
        (tripped, "OPEN", "OPEN for 5 s by ann (it lies) and lets a probe through in 55 s"),
        (forced, "FORCED_OPEN", "FORCED_OPEN for 5 s by ann (repairs), until somebody ends that"),
        (for_now, "FORCED_OPEN", "FORCED_OPEN for 5 s by ann (repairs), for another 55 s"),
        (probing, "HALF_OPEN", "HALF_OPEN for 5 s: 2 of 2 probes in flight, and how they end decides"),
    ];
    for (breaker, state, said) in cases {
        let whose = if breaker.task_type.is_empty() { "a" } else { "a for type thumbnail" };
        let (until, probes) = (breaker.until, f64::from(breaker.probes));
        let detail = format!("The breaker of agent {whose} has been {said}.");
        let gist = format!("The breaker of agent {whose} is {state}.");
        let known = Facts { breaker: Some(breaker), ..facts(&Life::new()) };
        alone(&known, &gist, (BreakerGate, &detail, until, probes, probes));
    }
}

#[test]
fn a_breaker_that_lets_work_through_is_no_gate() {
    let over = Some(START);
    for breaker in [
        breaker(Breaker::Closed),
        breaker(Breaker::Disabled),
        breaker(Breaker::Observe),
        BreakerFacts { until: over, ..breaker(Breaker::Open) },
        BreakerFacts { until: over, ..breaker(Breaker::ForcedOpen) },
        BreakerFacts { probes: 1, ..breaker(Breaker::HalfOpen) },
    ] {
        let known = Facts { breaker: Some(breaker), ..facts(&Life::new()) };
        assert_eq!(shut(&explain(&known)), []);
    }
    assert_eq!(shut(&explain(&Facts { breaker: None, ..facts(&Life::new()) })), []);
}

#[test]
fn a_ramp_is_shut_when_its_part_is_taken() {
    let until = START.after(seconds(20));
    let ramp = RampFacts { share: 0.3, limit: 3, running: 3, until };
    let known = Facts { ramp: Some(ramp), ..facts(&Life::new()) };
    let detail = "The breaker of agent a has just closed: 30 % of the usual number may run, and 3 of 3 do; \
                  all may in 20 s.";
    let gist = "The breaker of agent a has just closed and lets only part through.";
    alone(&known, gist, (Ramp, detail, Some(until), 3.0, 3.0));
    let ramp = RampFacts { running: 2, ..ramp };
    assert_eq!(shut(&explain(&Facts { ramp: Some(ramp), ..facts(&Life::new()) })), []);
}

#[test]
fn without_workers_the_last_one_seen_is_named() {
    let workers = WorkerFacts::of([], "thumbnail");
    let gist = "No worker of agent a is connected.";
    let known = Facts { workers: workers.clone(), ..facts(&Life::new()) };
    alone(&known, gist, (NoWorker, gist, None, 0.0, 0.0));
    let workers = WorkerFacts { last_seen: Some(("w".into(), START.before(seconds(12)))), ..workers };
    let known = Facts { workers, ..known };
    let detail = "No worker of agent a is connected; w was last seen 12 s ago.";
    alone(&known, gist, (NoWorker, detail, None, 0.0, 0.0));
}

#[test]
fn a_type_that_nobody_takes_is_told_with_those_that_are_taken() {
    let takes = |id, types: &[&str]| {
        let mut session = session(id, "w", &[1], 1);
        session.types = Some(types.iter().map(|name| (*name).into()).collect());
        session
    };
    let gist = "No connected worker takes type thumbnail.";
    let one = takes(1, &["resize"]);
    let known = Facts { workers: WorkerFacts::of([&one], "thumbnail"), ..facts(&Life::new()) };
    let detail = "The one connected worker of agent a does not take type thumbnail: it takes resize.";
    alone(&known, gist, (TypeNotServed, detail, None, 0.0, 1.0));
    let two = takes(2, &["f", "e", "d", "c", "b", "resize"]);
    let known = Facts { workers: WorkerFacts::of([&one, &two], "thumbnail"), ..known };
    let detail = "None of the 2 connected workers of agent a takes type thumbnail: \
                  they take b, c, d, e, f and 1 more type.";
    alone(&known, gist, (TypeNotServed, detail, None, 0.0, 2.0));
}

#[test]
fn those_who_take_the_type_tell_what_else_they_take() {
    let mut one = session(1, "w", &[1], 1);
    one.types = Some(["b".into(), "a".into()].into());
    let mut other = session(2, "v", &[1], 1);
    other.types = Some(["c".into()].into());
    let known = WorkerFacts::of([&one, &other], "a");
    assert_eq!((known.connected, known.takers, known.room), (2, 1, 1));
    assert_eq!(known.taken, Some(vec!["a".into(), "b".into()]));
    let all = session(3, "u", &[1], 1);
    assert_eq!(WorkerFacts::of([&one, &other, &all], "a").taken, None);
}

#[test]
fn workers_without_room_are_told_apart() {
    let mut full = session(1, "v", &[1], 2);
    full.held.extend([TaskId(1), TaskId(2)]);
    let closed = session(2, "w", &[1], 0);
    let mut slow = session(3, "x", &[1], 1_000);
    slow.unsent.add(3 << 19);
    slow.held.insert(TaskId(3));
    let mut silent = session(4, "y", &[1], 9);
    silent.unacked_run = 3;
    let gist = "No worker that takes it has room.";
    let of = |sessions: &[&ledger_core::session::Session]| Facts {
        workers: WorkerFacts::of(sessions.iter().copied(), "thumbnail"),
        ..facts(&Life::new())
    };
    let detail = "The one worker that takes it has no room: 1 full; it holds 2 of at most 2 tasks.";
    alone(&of(&[&full]), gist, (NoRoom, detail, None, 2.0, 2.0));
    let detail = "None of the 4 workers that take it has room: 1 full, 1 with capacity 0, \
                  1 behind in reading (1.5 MiB unsent), 1 with 3 deliveries in a row unacknowledged; \
                  they hold 3 of at most 1,011 tasks.";
    alone(&of(&[&full, &closed, &slow, &silent]), gist, (NoRoom, detail, None, 3.0, 1_011.0));
    let free = session(5, "z", &[1], 1);
    assert_eq!(shut(&explain(&of(&[&full, &closed, &slow, &silent, &free]))), []);
}
