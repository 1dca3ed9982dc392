//! Every state against every event, as the design's table of a task's life says. Written from that table, not from the
//! code: where they differ, the design wins.

use crate::support::updates;
use crate::support::{
    LATER, Life, START, blocks, caller, cancels, discards, fails, holder, redrives, releases, seconds,
    unblocks,
};
use ledger_core::{Caller, Class, Event, EventKind, Outcome, Overrides, Refusal, ReleaseCause, State};
use std::collections::BTreeMap;

/// Names of states, each with how to get there. Those that were delivered have two fences, so that one of them is stale.
type Start = fn() -> Life;

const STATES: [(&str, Start); 28] = [
    // Never delivered.
    ("new", Life::new),
    ("ahead", || Life::enqueued(Overrides::NONE, Some(START.after(LATER)), None)),
    // QUEUED after a delivery that nobody acknowledged.
    ("given_up", given_up),
    ("undeliverable", || {
        let mut life = given_up();
        while life.task.idle_deliveries < 20 {
            life.claim();
            life.apply(&Event::TakenBack { sampled: false });
        }
        life
    }),
    ("unacked_late", || due(unacked_late())),
    ("unacked_late_early", unacked_late),
    // RETRY.
    ("backoff", || due(after(acked(), fails(Class::Transient)))),
    ("backoff_early", || after(acked(), fails(Class::Transient))),
    ("budget", || {
        let mut life = acked();
        life.tokens = 0;
        let mut life = due(after(life, fails(Class::Transient)));
        life.tokens = 10;
        life
    }),
    ("lost", || due(lost())),
    ("lost_early", lost),
    // BLOCKED.
    ("gated", || on(given_up(), &Event::Gate)),
    ("gated_lost", || on(due(lost()), &Event::Gate)),
    ("asks", || after(acked(), blocks())),
    // RUNNING.
    ("unacked", unacked),
    ("acked", acked),
    ("unacked_user", || on(unacked(), &cancels())),
    ("unacked_deadline", || on(unacked(), &Event::DeadlinePassed)),
    ("unacked_preempt", || on(unacked(), &Event::Preempt)),
    ("stop_user", || on(acked(), &cancels())),
    ("stop_deadline", || on(acked(), &Event::DeadlinePassed)),
    ("stop_timeout", || on(acked(), &Event::AttemptTimeout)),
    ("stop_stall", || on(acked(), &Event::Stall)),
    ("stop_preempt", || on(acked(), &Event::Preempt)),
    // Ended.
    ("done", || after(acked(), Outcome::Complete)),
    ("failed", || after(acked(), fails(Class::Permanent))),
    ("discarded", || on(after(acked(), fails(Class::Permanent)), &discards())),
    ("cancelled", || on(given_up(), &cancels())),
];

/// Names for many states at once.
const GROUPS: [(&str, &str); 9] = [
    ("@never", "new ahead"),
    ("@gone", "given_up undeliverable backoff backoff_early budget gated asks"),
    ("@resumable", "unacked_late unacked_late_early lost lost_early gated_lost"),
    ("@waiting", "@never @gone @resumable"),
    ("@unacked_stop", "unacked_user unacked_deadline unacked_preempt"),
    ("@acked_stop", "stop_user stop_deadline stop_timeout stop_stall stop_preempt"),
    ("@unacked", "unacked @unacked_stop"),
    ("@running", "@unacked acked @acked_stop"),
    ("@ended", "done failed discarded cancelled"),
];

/// For each event: in these states, this comes of it. `STATE REASON KIND` is a transition (`-`: no reason), `soft` is yes
/// without a row, one word in capitals is the refusal. `others` are the states that the event does not name.
const TABLE: &str = "
claim
    new given_up undeliverable unacked_late backoff lost | RUNNING - ASSIGNED
    gated gated_lost                       | RUNNING - ASSIGNED
    others                                 | WRONG_STATE

ack by the holder
    @unacked                               | RUNNING - STARTED
    acked @acked_stop                      | soft
    @resumable                             | RUNNING - RESUMED
    @never                                 | UNKNOWN_FENCE
    @gone                                  | LEASE_LOST
    @ended                                 | TASK_TERMINAL

beat by the holder
    @running                               | soft
    @resumable                             | RUNNING - RESUMED
    @never                                 | UNKNOWN_FENCE
    @gone                                  | LEASE_LOST
    @ended                                 | TASK_TERMINAL

complete by the holder
    @running @resumable                    | DONE - COMPLETED
    @never                                 | UNKNOWN_FENCE
    @gone                                  | LEASE_LOST
    @ended                                 | TASK_TERMINAL

fail, retryable, by the holder
    unacked acked @resumable               | RETRY BACKOFF FAILED
    unacked_preempt stop_preempt           | RETRY BACKOFF FAILED
    stop_timeout stop_stall                | RETRY BACKOFF FAILED
    unacked_user stop_user                 | CANCELLED USER FAILED
    unacked_deadline stop_deadline         | FAILED DEADLINE FAILED
    @never                                 | UNKNOWN_FENCE
    @gone                                  | LEASE_LOST
    @ended                                 | TASK_TERMINAL

fail, permanent, by the holder
    unacked acked @resumable               | FAILED PERMANENT FAILED
    unacked_preempt stop_preempt           | FAILED PERMANENT FAILED
    stop_timeout stop_stall                | RETRY BACKOFF FAILED
    unacked_user stop_user                 | CANCELLED USER FAILED
    unacked_deadline stop_deadline         | FAILED DEADLINE FAILED
    @never                                 | UNKNOWN_FENCE
    @gone                                  | LEASE_LOST
    @ended                                 | TASK_TERMINAL

release, declined, by the holder
    unacked acked @resumable               | QUEUED DECLINED RELEASED
    unacked_preempt stop_preempt           | QUEUED PREEMPTED RELEASED
    stop_timeout stop_stall                | RETRY BACKOFF RELEASED
    unacked_user stop_user                 | CANCELLED USER RELEASED
    unacked_deadline stop_deadline         | FAILED DEADLINE RELEASED
    @never                                 | UNKNOWN_FENCE
    @gone                                  | LEASE_LOST
    @ended                                 | TASK_TERMINAL

release, drain, by the holder
    unacked acked @resumable               | QUEUED DRAIN RELEASED
    unacked_preempt stop_preempt           | QUEUED PREEMPTED RELEASED
    stop_timeout stop_stall                | RETRY BACKOFF RELEASED
    unacked_user stop_user                 | CANCELLED USER RELEASED
    unacked_deadline stop_deadline         | FAILED DEADLINE RELEASED
    @never                                 | UNKNOWN_FENCE
    @gone                                  | LEASE_LOST
    @ended                                 | TASK_TERMINAL

release, preempted, by the holder
    unacked acked @resumable               | QUEUED PREEMPTED RELEASED
    unacked_preempt stop_preempt           | QUEUED PREEMPTED RELEASED
    stop_timeout stop_stall                | RETRY BACKOFF RELEASED
    unacked_user stop_user                 | CANCELLED USER RELEASED
    unacked_deadline stop_deadline         | FAILED DEADLINE RELEASED
    @never                                 | UNKNOWN_FENCE
    @gone                                  | LEASE_LOST
    @ended                                 | TASK_TERMINAL

block by the holder
    unacked acked @resumable               | BLOCKED WORKER BLOCKED
    unacked_preempt stop_preempt           | BLOCKED WORKER BLOCKED
    stop_timeout stop_stall                | RETRY BACKOFF BLOCKED
    unacked_user stop_user                 | CANCELLED USER BLOCKED
    unacked_deadline stop_deadline         | FAILED DEADLINE BLOCKED
    @never                                 | UNKNOWN_FENCE
    @gone                                  | LEASE_LOST
    @ended                                 | TASK_TERMINAL

cancelled by the holder
    unacked acked @resumable               | STOP_NOT_REQUESTED
    unacked_preempt stop_preempt           | QUEUED PREEMPTED STOPPED
    stop_timeout stop_stall                | RETRY BACKOFF STOPPED
    unacked_user stop_user                 | CANCELLED USER STOPPED
    unacked_deadline stop_deadline         | FAILED DEADLINE STOPPED
    @never                                 | UNKNOWN_FENCE
    @gone                                  | LEASE_LOST
    @ended                                 | TASK_TERMINAL

anything by another worker
    @running @resumable                    | NOT_HOLDER
    @never                                 | UNKNOWN_FENCE
    @gone                                  | LEASE_LOST
    @ended                                 | TASK_TERMINAL

anything of a stale fence
    @running @resumable @gone              | LEASE_LOST
    @never                                 | UNKNOWN_FENCE
    @ended                                 | TASK_TERMINAL

anything of a fence never issued
    @waiting @running @ended               | UNKNOWN_FENCE

lease over
    unacked                                | QUEUED ACK_TIMEOUT ACK_TIMEOUT
    acked                                  | RETRY LOST LOST
    unacked_user                           | CANCELLED USER ACK_TIMEOUT
    stop_user                              | CANCELLED USER LOST
    unacked_deadline                       | FAILED DEADLINE ACK_TIMEOUT
    stop_deadline                          | FAILED DEADLINE LOST
    stop_timeout stop_stall                | RETRY BACKOFF LOST
    unacked_preempt                        | QUEUED PREEMPTED ACK_TIMEOUT
    stop_preempt                           | QUEUED PREEMPTED LOST
    others                                 | WRONG_STATE

taken back
    unacked                                | QUEUED ACK_TIMEOUT ACK_TIMEOUT
    acked                                  | RETRY LOST LOST
    unacked_user                           | CANCELLED USER ACK_TIMEOUT
    stop_user                              | CANCELLED USER LOST
    unacked_deadline                       | FAILED DEADLINE ACK_TIMEOUT
    stop_deadline                          | FAILED DEADLINE LOST
    stop_timeout stop_stall                | RETRY BACKOFF LOST
    unacked_preempt                        | QUEUED PREEMPTED ACK_TIMEOUT
    stop_preempt                           | QUEUED PREEMPTED LOST
    others                                 | WRONG_STATE

gate
    new given_up undeliverable unacked_late backoff lost | BLOCKED BREAKER_OPEN GATED
    others                                 | WRONG_STATE

ungate
    gated gated_lost                       | QUEUED - UNGATED
    others                                 | WRONG_STATE

unblock
    asks                                   | QUEUED - UNBLOCKED
    gated gated_lost                       | BLOCKED_BY_BREAKER
    others                                 | WRONG_STATE

cancel
    @waiting                               | CANCELLED USER CANCELLED
    unacked acked                          | RUNNING - STOP_REQUESTED
    unacked_deadline unacked_preempt       | RUNNING - STOP_REQUESTED
    stop_deadline stop_timeout stop_stall stop_preempt | RUNNING - STOP_REQUESTED
    unacked_user stop_user cancelled       | soft
    done failed discarded                  | TASK_TERMINAL

preempt
    unacked acked                          | RUNNING - STOP_REQUESTED
    @unacked_stop @acked_stop              | soft
    others                                 | WRONG_STATE

deadline passed
    @waiting                               | FAILED DEADLINE DEADLINE_PASSED
    unacked acked                          | RUNNING - STOP_REQUESTED
    @unacked_stop @acked_stop              | soft
    @ended                                 | WRONG_STATE

queue timeout
    @never given_up undeliverable          | FAILED QUEUE_TIMEOUT QUEUE_TIMEOUT
    unacked_late unacked_late_early gated  | FAILED QUEUE_TIMEOUT QUEUE_TIMEOUT
    others                                 | WRONG_STATE

attempt timeout
    acked                                  | RUNNING - STOP_REQUESTED
    @acked_stop                            | soft
    others                                 | WRONG_STATE

stall
    acked                                  | RUNNING - STOP_REQUESTED
    @acked_stop                            | soft
    others                                 | WRONG_STATE

grace over
    unacked_user stop_user                 | CANCELLED ABANDONED ABANDONED
    unacked_deadline stop_deadline         | FAILED DEADLINE ABANDONED
    stop_timeout stop_stall                | RETRY BACKOFF ABANDONED
    unacked_preempt stop_preempt           | QUEUED PREEMPTED ABANDONED
    others                                 | WRONG_STATE

budget granted
    budget                                 | RETRY BACKOFF BUDGET_GRANTED
    others                                 | WRONG_STATE

budget expired
    budget                                 | FAILED BUDGET BUDGET_EXPIRED
    others                                 | WRONG_STATE

undeliverable
    undeliverable                          | FAILED UNDELIVERABLE UNDELIVERABLE
    others                                 | WRONG_STATE

update, priority
    @never                                 | QUEUED - UPDATED
    given_up undeliverable                 | QUEUED ACK_TIMEOUT UPDATED
    unacked_late unacked_late_early        | QUEUED ACK_TIMEOUT UPDATED
    backoff backoff_early                  | RETRY BACKOFF UPDATED
    budget                                 | RETRY BUDGET UPDATED
    lost lost_early                        | RETRY LOST UPDATED
    gated gated_lost                       | BLOCKED BREAKER_OPEN UPDATED
    asks                                   | BLOCKED WORKER UPDATED
    others                                 | WRONG_STATE

update, time
    @never gated gated_lost                | QUEUED - UPDATED
    given_up undeliverable                 | QUEUED ACK_TIMEOUT UPDATED
    unacked_late unacked_late_early        | QUEUED ACK_TIMEOUT UPDATED
    backoff backoff_early                  | RETRY BACKOFF UPDATED
    budget                                 | RETRY BUDGET UPDATED
    lost lost_early                        | RETRY LOST UPDATED
    others                                 | WRONG_STATE

redrive
    failed                                 | QUEUED REDRIVEN REDRIVEN
    discarded                              | DISCARDED
    others                                 | WRONG_STATE

discard
    failed                                 | FAILED PERMANENT DISCARDED
    discarded                              | soft
    others                                 | WRONG_STATE
";

fn on(mut life: Life, event: &Event) -> Life {
    life.apply(event);
    life
}

fn after(mut life: Life, outcome: Outcome) -> Life {
    life.settle(outcome);
    life
}

fn due(mut life: Life) -> Life {
    life.wait(LATER);
    life
}

fn given_up() -> Life {
    let mut life = Life::new();
    for _ in 0..2 {
        life.claim();
        life.apply(&Event::TakenBack { sampled: false });
    }
    life
}

fn unacked() -> Life {
    let mut life = given_up();
    life.claim();
    life
}

fn acked() -> Life {
    let mut life = unacked();
    life.ack();
    life
}

fn unacked_late() -> Life {
    on(unacked(), &Event::LeaseOver)
}

fn lost() -> Life {
    on(acked(), &Event::LeaseOver)
}

/// Everything that a lease's holder can say.
fn says(who: &Caller, fence: u64) -> Vec<(&'static str, Event)> {
    let settle = |outcome| Event::Settle(who.clone(), fence, outcome);
    vec![
        ("ack", Event::Ack(who.clone(), fence)),
        ("beat", Event::Beat(who.clone(), fence)),
        ("complete", settle(Outcome::Complete)),
        ("fail, retryable,", settle(fails(Class::Transient))),
        ("fail, permanent,", settle(fails(Class::Permanent))),
        ("release, declined,", settle(releases(ReleaseCause::Declined))),
        ("release, drain,", settle(releases(ReleaseCause::Drain))),
        ("release, preempted,", settle(releases(ReleaseCause::Preempted))),
        ("block", settle(blocks())),
        ("cancelled", settle(Outcome::Cancelled)),
    ]
}

/// Every event, under the name that the table has for it.
fn events(newest: u64) -> Vec<(String, Event)> {
    let mut events: Vec<(String, Event)> = says(&caller("w"), newest)
        .into_iter()
        .map(|(what, event)| (format!("{what} by the holder"), event))
        .collect();
    let strangers = [
        ("by another worker", "other", vec![newest]),
        ("of a stale fence", "w", vec![newest.saturating_sub(1)]),
        ("of a fence never issued", "w", vec![0, newest + 1, u64::MAX]),
    ];
    for (name, worker, fences) in strangers {
        for fence in fences {
            let said = says(&caller(worker), fence);
            events.extend(said.into_iter().map(|(_, event)| (format!("anything {name}"), event)));
        }
    }
    let others = [
        ("claim", Event::Claim { holder: holder("w2"), permit: None }),
        ("lease over", Event::LeaseOver),
        ("taken back", Event::TakenBack { sampled: false }),
        ("taken back", Event::TakenBack { sampled: true }),
        ("gate", Event::Gate),
        ("ungate", Event::Ungate),
        ("unblock", unblocks()),
        ("unblock", Event::Unblock { answer: Some("yes".into()), actor: Some("ann".into()) }),
        ("cancel", cancels()),
        ("preempt", Event::Preempt),
        ("deadline passed", Event::DeadlinePassed),
        ("queue timeout", Event::QueueTimeout),
        ("attempt timeout", Event::AttemptTimeout),
        ("stall", Event::Stall),
        ("grace over", Event::GraceOver),
        ("budget granted", Event::BudgetGranted),
        ("budget expired", Event::BudgetExpired),
        ("undeliverable", Event::Undeliverable),
        ("update, priority", updates(Some(9), None)),
        ("update, time", updates(None, Some(START.after(2 * LATER)))),
        ("redrive", redrives()),
        ("discard", discards()),
    ];
    events.extend(others.map(|(name, event)| (name.to_owned(), event)));
    events
}

fn expand(names: &str) -> Vec<&'static str> {
    names
        .split_whitespace()
        .flat_map(|name| match GROUPS.iter().find(|(group, _)| *group == name) {
            Some((_, members)) => expand(members),
            None => {
                let state = STATES.iter().find(|(state, _)| *state == name);
                vec![state.unwrap_or_else(|| panic!("no state is called {name}")).0]
            }
        })
        .collect()
}

/// The table as a map: event, state, what comes of it. Every pair once.
fn table() -> BTreeMap<(&'static str, &'static str), &'static str> {
    let mut cells = BTreeMap::new();
    for section in TABLE.trim().split("\n\n") {
        let mut lines = section.lines();
        let event = lines.next().expect("a section has a name").trim();
        for line in lines {
            let (states, expected) = line.split_once('|').expect("states | what comes of it");
            let others = states.trim() == "others";
            let named = if others { STATES.iter().map(|(name, _)| *name).collect() } else { expand(states) };
            for state in named {
                if others && cells.contains_key(&(event, state)) {
                    continue;
                }
                let twice = cells.insert((event, state), expected.trim());
                assert_eq!(twice, None, "{event} in {state} is there twice");
            }
        }
        assert_eq!(cells.keys().filter(|(known, _)| *known == event).count(), STATES.len(), "{event}");
    }
    cells
}

#[test]
fn every_event_does_in_every_state_what_the_design_says() {
    let table = table();
    let mut wrong = Vec::new();
    let mut seen = 0;
    for (state, build) in STATES {
        let start = build();
        for (name, event) in events(start.task.fence) {
            let expected = *table
                .get(&(name.as_str(), state))
                .unwrap_or_else(|| panic!("the table lacks {name} in {state}"));
            let mut life = start.clone();
            let got = match life.try_apply(&event) {
                Ok(applied) => match applied.record {
                    None => "soft".to_owned(),
                    Some(row) => {
                        let fence = start.task.fence
                            + u64::from(matches!(row.kind, EventKind::Assigned | EventKind::Abandoned));
                        assert_eq!(life.task.fence, fence, "the fence after {name} in {state}");
                        let reason = if row.reason.as_str().is_empty() { "-" } else { row.reason.as_str() };
                        format!("{} {reason} {}", row.to, row.kind)
                    }
                },
                Err(refusal) => {
                    if let Refusal::WrongState(named) = refusal {
                        assert_eq!(named, start.task.state, "{name} in {state}: a refusal names the state");
                    }
                    refusal.reason().to_owned()
                }
            };
            seen += 1;
            if got != expected {
                wrong.push(format!("{name} in {state}: expected {expected}, got {got}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{} of {seen} pairs:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn every_state_of_the_grid_is_what_its_name_says() {
    let state = |name: &str| {
        let (_, build) = STATES.iter().find(|(known, _)| *known == name).expect("a state of the grid");
        build().task
    };
    for name in expand("@ended") {
        assert!(state(name).state.is_terminal(), "{name}");
    }
    for name in expand("@running") {
        assert_eq!(state(name).state, State::Running, "{name}");
    }
    for name in expand("@resumable") {
        assert!(state(name).is_resumable(), "{name}");
    }
    for name in expand("@never @gone") {
        assert!(!state(name).is_resumable() && !state(name).state.is_terminal(), "{name}");
    }
    let covered: Vec<_> = expand("@waiting @running @ended");
    assert_eq!(covered.len(), STATES.len(), "the groups cover the grid");
    assert!(Life::new().wait(seconds(1)).task.can_be_claimed(ledger_core::Now::steady(START)));
}
