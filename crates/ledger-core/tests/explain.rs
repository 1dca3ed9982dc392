//! Why a task is not running, word for word: each gate alone, then together, then where it is when it does not wait.

mod serving;

use crate::session::session;
use crate::support::{
    LATER, Life, START, blocks, cancels, discards, fails, redrives, releases, seconds, updates,
};
use breaker_core::State as Breaker;
use ledger_core::event::Fact;
use ledger_core::explain::GateKind::{
    Behind, Blocked, Breaker as BreakerGate, Budget, Draining, NoWorker, NotDue, Paused, Ramp,
};
use ledger_core::explain::{
    AHEAD, BreakerFacts, BudgetFacts, Explanation, Facts, GateKind, RampFacts, Runner, WorkerFacts, explain,
};
use ledger_core::store::Pause;
use ledger_core::{
    Class, Event, Outcome, Overrides, Reason, ReleaseCause, SessionId, State, StopCause, Timestamp,
};
use std::time::Duration;

/// Facts of a task that nothing keeps from running: one worker with room for one.
fn facts(life: &Life) -> Facts {
    let mut facts = Facts {
        now: life.now,
        task: life.task.clone(),
        agent: "a".into(),
        max_retries: 3,
        max_losses: 3,
        runner: None,
        budget: BudgetFacts::default(),
        pause: None,
        breaker: Some(breaker(Breaker::Closed)),
        ramp: None,
        workers: WorkerFacts::of([&session(1, "w", &[1], 1)], "thumbnail"),
        ahead: 0,
        draining: false,
        told: None,
    };
    facts.hear(life.history.iter().cloned());
    facts
}

fn breaker(state: Breaker) -> BreakerFacts {
    BreakerFacts {
        state,
        cause: None,
        since: START.before(seconds(5)),
        until: None,
        probes: 0,
        permits: 2,
        actor: "".into(),
        reason: "".into(),
        task_type: "".into(),
    }
}

fn pause(until: Option<Timestamp>) -> Pause {
    Pause { actor: "ann".into(), reason: "new\nlicence".into(), since: START.before(seconds(90)), until }
}

type Shut = (GateKind, String, Option<Timestamp>, f64, f64);

fn shut(said: &Explanation) -> Vec<Shut> {
    said.gates
        .iter()
        .map(|gate| (gate.kind, gate.detail.clone(), gate.until, gate.current, gate.limit))
        .collect()
}

/// One gate, and nothing else, is shut.
#[track_caller]
fn alone(facts: &Facts, summary: &str, gate: (GateKind, &str, Option<Timestamp>, f64, f64)) {
    let said = explain(facts);
    let (kind, detail, until, current, limit) = gate;
    assert_eq!(shut(&said), [(kind, detail.to_owned(), until, current, limit)]);
    assert_eq!(said.summary, summary);
    assert_eq!((said.state, said.reason), (facts.task.state, facts.task.reason));
}

#[track_caller]
fn summary(life: &Life, expected: &str) {
    let said = explain(&facts(life));
    assert_eq!((said.summary.as_str(), said.gates.len()), (expected, 0));
}

#[test]
fn nothing_stands_in_the_way_of_a_due_task() {
    summary(&Life::new(), "Nothing stands in its way: it is handed out next.");
    let mut gated = Life::new();
    gated.apply(&Event::Gate);
    summary(&gated, "Nothing stands in its way: it is handed out next.");
}

#[test]
fn a_blocked_task_tells_who_asked_what_since_when_and_how_to_answer() {
    let mut life = Life::new();
    life.start().settle(blocks());
    life.wait(seconds(65));
    let detail = "w blocked it 1 min 5 s ago with the question \"may I?\"; \
                  `ledgerd task unblock t7 --answer TEXT` answers it.";
    let gist = "It waits for the answer to a question.";
    alone(&facts(&life), gist, (Blocked, detail, None, 0.0, 0.0));
    life.apply(&updates(Some(9), None));
    alone(&facts(&life), gist, (Blocked, detail, None, 0.0, 0.0));

    let mut life = Life::new();
    let until = START.after(seconds(7_200));
    life.start().settle(Outcome::Block { question: "".into(), until: Some(until) });
    let detail = "w blocked it 0 ms ago without a question; `ledgerd task unblock t7 --answer TEXT` answers it; \
                  without an answer it goes on in 2 h.";
    alone(&facts(&life), gist, (Blocked, detail, Some(until), 0.0, 0.0));
    // The wall clock was set an hour forward: the end that was named comes so much sooner.
    life.now.skew = 3_600_000;
    let facts = Facts { told: None, ..facts(&life) };
    let detail = "Its worker blocked it; `ledgerd task unblock t7 --answer TEXT` answers it; \
                  without an answer it goes on in 1 h.";
    alone(&facts, gist, (Blocked, detail, Some(until), 0.0, 0.0));
}

#[test]
fn a_long_question_is_cut() {
    let mut life = Life::new();
    life.start().settle(Outcome::Block { question: "é\n".repeat(300).into(), until: None });
    let said = explain(&facts(&life));
    assert!(said.gates[0].detail.contains(&format!("\"{}…\"", "é ".repeat(100))), "{}", said.gates[0].detail);
}

#[test]
fn the_newest_row_that_is_not_newer_than_the_task_is_heard() {
    let mut life = Life::new();
    life.start().settle(blocks());
    let mut known = facts(&life);
    life.apply(&Event::Unblock { answer: Some("yes".into()), actor: None });
    life.start().settle(Outcome::Block { question: "and now?".into(), until: None });
    known.hear(life.history.iter().cloned());
    assert_eq!(known.told.as_ref().and_then(|row| row.fact(Fact::Question)), Some("may I?"));
    assert_eq!(
        facts(&life).told.and_then(|row| row.fact(Fact::Question).map(str::to_owned)).as_deref(),
        Some("and now?")
    );
    assert!(!facts(&Life::new()).asks_history());
}

/// NOT_DUE of a task after this, the only gate.
#[track_caller]
fn waits(make: impl FnOnce(&mut Life), gist: &str, detail: &str) {
    let mut life = Life::new();
    make(&mut life);
    alone(&facts(&life), gist, (NotDue, detail, Some(life.task.run_at), 0.0, 0.0));
}

#[test]
fn a_back_off_names_the_retry_and_what_made_it_longer() {
    let fail = |hint: Option<Duration>| {
        move |life: &mut Life| {
            life.start();
            let Outcome::Fail { error, .. } = fails(Class::Transient) else { unreachable!() };
            life.settle(Outcome::Fail { error, retry_after: hint });
        }
    };
    waits(fail(None), "It is due in 100 ms.", "Its back-off before retry 1 of 3 lasts another 100 ms.");
    waits(
        fail(Some(seconds(20))),
        "It is due in 21 s.",
        "The other side asked for time (retry_after): retry 1 of 3 comes in 21 s.",
    );
    waits(
        fail(Some(seconds(86_400))),
        "It is due in 5 min 5 s.",
        "The other side asked for time (retry_after, cut to the longest allowed): retry 1 of 3 comes in 5 min 5 s.",
    );
    waits(
        |life| {
            life.claim_as(true);
            life.ack();
            life.settle(fails(Class::Transient));
        },
        "It is due in 100 ms.",
        "Its back-off before the next attempt (a failed probe costs no retry) lasts another 100 ms.",
    );
}

#[test]
fn other_waits_name_their_cause() {
    let gives_back = |cause| {
        move |life: &mut Life| {
            life.start().settle(Outcome::Release { cause, delay: seconds(5) });
        }
    };
    waits(
        gives_back(ReleaseCause::Declined),
        "It is due in 5 s.",
        "A worker declined it; it is offered again in 5 s.",
    );
    waits(
        gives_back(ReleaseCause::Drain),
        "It is due in 5 s.",
        "Its worker went away and gave it back; it is offered again in 5 s.",
    );
    waits(
        gives_back(ReleaseCause::Preempted),
        "It is due in 5 s.",
        "It made room for more urgent work; it is offered again in 5 s.",
    );
    waits(
        |life| {
            life.claim();
            life.apply(&Event::LeaseOver);
        },
        "It is due in 100 ms; w, which held it last, may still come back for it.",
        "Delivery 1 was not acknowledged in time; it is offered again in 100 ms.",
    );
    waits(
        |life| {
            life.start();
            life.lost_with.tasks = 4;
            life.apply(&Event::LeaseOver);
        },
        "It is due in 100 ms; w, which held it last, may still come back for it.",
        "Its worker was lost; its losses weigh 0.25 of 3, and it is tried again in 100 ms.",
    );
    waits(
        |life| {
            life.start().settle(fails(Class::Permanent));
            let at = Some(life.now.at.after(seconds(5)));
            let Event::Redrive(redrive) = redrives() else { unreachable!() };
            life.apply(&Event::Redrive(Box::new(ledger_core::Redrive { run_at: at, ..*redrive })));
        },
        "It is due in 5 s.",
        "It was redriven, to start in 5 s.",
    );
}

#[test]
fn a_time_that_a_user_named_goes_by_the_wall_clock() {
    let named = START.after(LATER);
    let mut life = Life::enqueued(Overrides::NONE, Some(named), None);
    let detail = |left| format!("It is not to start before a time that a user named, {left} from now.");
    alone(&facts(&life), "It is due in 1 h.", (NotDue, &detail("1 h"), Some(named), 0.0, 0.0));
    life.now.skew = 1_800_000;
    alone(&facts(&life), "It is due in 30 min.", (NotDue, &detail("30 min"), Some(named), 0.0, 0.0));
}

/// A task whose retry waits for a token; its back-off is over.
fn unpaid(deadline: Option<Timestamp>) -> Life {
    let mut life = Life::enqueued(Overrides::NONE, None, deadline);
    life.tokens = 0;
    life.start().settle(fails(Class::Timeout));
    life.wait(seconds(10));
    assert_eq!((life.task.state, life.task.reason), (State::Retry, Reason::Budget));
    life
}

#[test]
fn a_retry_without_a_token_tells_what_there_is_and_when_there_will_be_enough() {
    let life = unpaid(None);
    let gist = "Its retry waits for 2 budget tokens.";
    let at = life.now.at.after(Duration::from_millis(1_400));
    let budget = BudgetFacts { own: 399, shared: 45_000, affordable_at: Some(at), before: 0 };
    let known = Facts { budget, ..facts(&life) };
    let detail = "Its retry needs 2 budget tokens: agent a has 0.3 and all agents share 45; \
                  time alone brings enough in 1.4 s, and it may wait another 23 h 59 min.";
    alone(&known, gist, (Budget, detail, Some(at), 0.399, 2.0));

    let budget = BudgetFacts { own: 5_000, shared: 0, affordable_at: None, before: 0 };
    let life = unpaid(Some(START.after(seconds(70))));
    let detail = "Its retry needs 2 budget tokens: agent a has 5 and all agents share 0; \
                  only successes bring enough, and it may wait another 1 min.";
    alone(&Facts { budget, ..facts(&life) }, gist, (Budget, detail, None, 0.0, 2.0));

    for (before, said) in
        [(1, "1 retry waits"), (2, "2 retries wait"), (AHEAD + 1, "more than 10,000 retries wait")]
    {
        let budget = BudgetFacts { before, affordable_at: Some(at), ..budget };
        let said = format!("share 0; {said} before it, and it may wait");
        let gates = explain(&Facts { budget, ..facts(&life) }).gates;
        assert!(gates[0].detail.contains(&said) && gates[0].until.is_none(), "{}", gates[0].detail);
    }
}

#[test]
fn those_that_come_first_count_where_the_room_is_not_enough_for_all() {
    let room = |capacity| WorkerFacts::of([&session(1, "w", &[1], capacity)], "thumbnail");
    let behind = |ahead, capacity| Facts { ahead, workers: room(capacity), ..facts(&Life::new()) };
    alone(
        &behind(1, 1),
        "1 task comes first.",
        (Behind, "1 task comes first: it is more urgent, or as urgent and due earlier.", None, 1.0, 1.0),
    );
    alone(
        &behind(10_000, 7),
        "10,000 tasks come first.",
        (
            Behind,
            "10,000 tasks come first: they are more urgent, or as urgent and due earlier.",
            None,
            1e4,
            7.0,
        ),
    );
    alone(
        &behind(AHEAD + 1, 7),
        "More than 10,000 tasks come first.",
        (
            Behind,
            "More than 10,000 tasks come first: they are more urgent, or as urgent and due earlier.",
            None,
            1e4,
            7.0,
        ),
    );
    assert_eq!(shut(&explain(&behind(6, 7))), [], "there is room for it too");
    // What the breaker lets through is room as well.
    let probing = BreakerFacts { probes: 1, ..breaker(Breaker::HalfOpen) };
    let known = Facts { breaker: Some(probing), ..behind(1, 7) };
    assert_eq!(explain(&known).summary, "1 task comes first.");
    let ramp = RampFacts { share: 0.5, limit: 5, running: 4, until: START };
    assert_eq!(explain(&Facts { ramp: Some(ramp), ..behind(1, 7) }).summary, "1 task comes first.");
    assert_eq!(shut(&explain(&Facts { ramp: Some(ramp), ..behind(0, 7) })), []);
}

#[test]
fn a_daemon_that_goes_away_hands_out_nothing() {
    let known = Facts { draining: true, ..facts(&Life::new()) };
    let detail = "The daemon is shutting down and hands out nothing more.";
    alone(&known, "The daemon is shutting down.", (Draining, detail, None, 0.0, 0.0));
}

#[test]
fn all_gates_that_are_shut_come_in_order() {
    let life = unpaid(None);
    let mut all = facts(&life);
    all.task.run_at = life.now.at.after(seconds(9));
    all.pause = Some(pause(None));
    all.breaker = Some(breaker(Breaker::ForcedOpen));
    all.ramp = Some(RampFacts { share: 0.1, limit: 0, running: 0, until: START });
    all.workers = WorkerFacts::of([], "thumbnail");
    all.ahead = 5;
    all.draining = true;
    let kinds = |facts: &Facts| explain(facts).gates.iter().map(|gate| gate.kind).collect::<Vec<_>>();
    // Nobody comes before a task that is not due.
    assert_eq!(kinds(&all), [NotDue, Budget, Paused, BreakerGate, Ramp, NoWorker, Draining]);
    assert_eq!(explain(&all).summary, "It is due in 9 s; 6 more gates are shut.");
    let mut due = all.clone();
    (due.task.state, due.task.reason, due.task.run_at) = (State::Queued, Reason::None, START);
    assert_eq!(kinds(&due), [Paused, BreakerGate, Ramp, NoWorker, Behind, Draining]);
    assert_eq!(explain(&due).summary, "Agent a is paused; 5 more gates are shut.");
    let mut life = Life::new();
    life.start().settle(blocks());
    let blocked = Facts { task: life.task.clone(), ..all };
    assert_eq!(kinds(&blocked), [Blocked, Paused, BreakerGate, Ramp, NoWorker, Draining]);
    let two = Facts { draining: true, pause: Some(pause(None)), ..facts(&Life::new()) };
    assert_eq!(explain(&two).summary, "Agent a is paused; 1 more gate is shut.");
}

#[test]
fn a_task_that_the_breaker_holds_back_waits_for_it_and_for_those_before_it() {
    let mut life = Life::new();
    life.lose_once();
    life.apply(&Event::Gate);
    let open = BreakerFacts { until: Some(life.now.at.after(seconds(9))), ..breaker(Breaker::Open) };
    let said = explain(&Facts { breaker: Some(open), ahead: 2, ..facts(&life) });
    let kinds: Vec<_> = said.gates.iter().map(|gate| gate.kind).collect();
    assert_eq!(kinds, [BreakerGate, Behind]);
    assert_eq!(
        said.summary,
        "The breaker of agent a is OPEN; 1 more gate is shut; w, which held it last, may still come back for it."
    );
}

#[test]
fn a_running_task_tells_its_worker_its_attempt_and_its_lease() {
    let mut life = Life::new();
    life.claim();
    life.wait(seconds(1));
    summary(&life, "It was handed to w 1 s ago, and 9 s are left to acknowledge it.");
    life.ack();
    life.wait(seconds(30));
    summary(&life, "w has run attempt 1 for 30 s; it is not connected and the lease ends in 30 s.");
    let runner = Runner {
        connected: true,
        beat_at: life.now.at.before(seconds(2)),
        lease_until: life.now.at.after(seconds(58)),
    };
    let known =
        Facts { runner: Some(runner), ahead: 9, draining: true, pause: Some(pause(None)), ..facts(&life) };
    let said = explain(&known);
    assert_eq!(said.gates, [], "no gate holds what runs");
    assert_eq!(
        said.summary,
        "w has run attempt 1 for 30 s; its last beat came 2 s ago and the lease ends in 58 s."
    );
    life.apply(&cancels());
    life.wait(seconds(5));
    let said = explain(&Facts { runner: Some(runner), ..facts(&life) });
    assert!(
        said.summary.ends_with("; it was asked to stop (USER), for which 25 s are left."),
        "{}",
        said.summary
    );
    assert_eq!(life.task.stop.map(|stop| stop.cause), Some(StopCause::User));
    let mut other = life;
    other.task.holder.as_mut().expect("it runs").session = SessionId(9);
    assert!(explain(&facts(&other)).summary.starts_with("w has run"), "whatever the stream");
}

#[test]
fn an_ended_task_tells_how_and_when_and_what_can_be_done() {
    let mut life = Life::new();
    life.start().settle(Outcome::Complete);
    life.wait(seconds(5));
    summary(&life, "It has been DONE for 5 s, after 1 attempt.");

    let mut life = Life::new();
    life.start().settle(releases(ReleaseCause::Drain));
    life.start().settle(fails(Class::Permanent));
    life.wait(seconds(5));
    summary(
        &life,
        "It has been FAILED (PERMANENT) for 5 s, after 2 attempts: it broke; \
         `ledgerd dlq redrive t7` puts it back into the queue.",
    );
    life.apply(&discards());
    life.wait(seconds(5));
    summary(
        &life,
        "It has been FAILED (PERMANENT) for 10 s, after 2 attempts: it broke; its dead letter was discarded.",
    );

    let mut life = Life::new();
    life.apply(&cancels());
    summary(&life, "It has been CANCELLED (USER) for 0 ms, without an attempt: ann: enough.");
}
