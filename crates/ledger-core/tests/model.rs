//! The life of one task, every order of events: the real transition function under a model checker.
//!
//! Modelled: one task, two workers, max_retries 1, max_losses 2, one redrive, an abstract clock on which every delay is one
//! tick. Acks, beats, outcomes and stops are lost, repeated and late as they like; leases, graces and timeouts end at any
//! time; the budget has a token or not, the breaker is open or not, at any time. A restart of the daemon keeps the rows
//! and is therefore no step of its own.
//!
//! Proved for every reachable state: the properties of [`Fault`], each by its name; that a terminal state can be reached
//! without a person's help, but for a block that waits for one; and that nothing goes round without bound but what
//! [`KNOWN_LOOPS`] lists.
//!
//! Left out: the store and its transactions, sessions and room, payloads, wall-clock steps (`simulation` has those), how
//! long anything takes, STALL (the arm of TIMEOUT), losses that weigh less than a whole one or are forgotten, and more than
//! one redrive. Numbers and counterexamples: `docs/design/0005-models.md`.

mod graph;
mod life;
mod variant;
mod world;

use ledger_core::Reason;
use ledger_core::limits::IDLE_DELIVERIES;
use life::{Life, PERSONS, Seen};
use stateright::{Checker, HasDiscoveries, Model, Property};
use std::collections::{BTreeMap, BTreeSet};
use variant::Variant;
use world::World;

/// How much of life a run looks at: all of it at once is too much for every push.
#[derive(Clone, Copy)]
pub(crate) struct Scope {
    workers: u8,
    /// Deliveries come under breaker permits, probes among them.
    probes: bool,
    /// Retries need tokens.
    budget: bool,
    /// Some tasks have a deadline, three ticks ahead.
    deadline: bool,
    queue_timeout: bool,
    redrives: u32,
    /// Not claimed any more after so many idle deliveries.
    idle: u32,
}

/// Both workers and all that they can do to each other's deliveries.
const WORKERS: Scope = Scope {
    workers: 2,
    probes: false,
    budget: false,
    deadline: true,
    queue_timeout: true,
    redrives: 1,
    idle: 2,
};
/// One worker; the breaker and the budget instead.
const GATES: Scope = Scope { workers: 1, probes: true, budget: true, deadline: false, ..WORKERS };
/// One worker, all of its idle deliveries: what goes round without bound shows here.
const LOOPS: Scope = Scope {
    workers: 1,
    budget: true,
    deadline: false,
    queue_timeout: false,
    redrives: 0,
    idle: IDLE_DELIVERIES,
    ..WORKERS
};

macro_rules! faults {
    ($($(#[$meta:meta])* $name:ident = $text:literal),+ $(,)?) => {
        /// What must never be seen.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub(crate) enum Fault { $($(#[$meta])* $name),+ }

        impl Fault {
            const fn name(self) -> &'static str {
                match self { $(Self::$name => $text),+ }
            }

            fn properties() -> Vec<Property<Life>> {
                vec![$(Property::always($text, |_, world: &World| world.fault != Some(Self::$name))),+]
            }
        }
    };
}

faults! {
    Fence = "a fence never falls and is issued once",
    Twice = "at most one outcome is recorded for a fence",
    Receipt = "a repeated outcome gets the first receipt",
    Zombie = "who does not hold the newest fence changes nothing",
    Revoked = "the end of a grace revokes its fence",
    Terminal = "an ended task changes by redrive and discard alone",
    Refused = "a refusal changes nothing",
    Fold = "folding the history gives the state",
    Counters = "retries, losses and deliveries keep their bounds",
    Tokens = "tokens are neither minted nor lost",
    Sample = "a permit gives exactly one sample",
    Early = "nothing is claimed before it is due",
}

/// What goes round without bound, by the step without which it would not.
///
/// The first two are by design: each round needs news from outside the task, more urgent work or another verdict on its
/// agent. The others are bounded by counts that are too long for a model's states, which leave them out: `loops` has a
/// test for each. A line that is not needed any more fails the test.
const KNOWN_LOOPS: [&str; 5] = [
    "preempt",
    "ungate",
    // Free a hundred times in a row; then they count as idle deliveries.
    "release for drain",
    "release as preempted",
    // A thousand times in a row; then the task fails.
    "the block ends by itself",
];

struct Run {
    graph: graph::Graph,
    seen: Seen,
    /// Properties that do not hold, each with the steps of a shortest way to see it.
    broken: Vec<(&'static str, Vec<String>)>,
}

/// Checks everything, or until `expected` is broken.
fn run(name: &str, scope: Scope, variant: Variant, expected: Option<Fault>) -> Run {
    let life = Life::new(scope, variant);
    let (walked, seen) = (life.walked.clone(), life.seen.clone());
    let builder = life.checker();
    let checker = match expected {
        None => builder.threads(2).spawn_bfs().join(),
        Some(fault) => builder.finish_when(HasDiscoveries::AnyOf([fault.name()].into())).spawn_bfs().join(),
    };
    let mut broken: Vec<(_, Vec<_>)> = checker
        .discoveries()
        .into_iter()
        .map(|(name, path)| (name, path.into_actions().iter().map(|step| format!("{step:?}")).collect()))
        .collect();
    broken.sort();
    let (graph, seen) = (walked.graph(), seen.lock().expect("the checker has joined").clone());
    let (states, edges) = (checker.unique_state_count(), graph.edges());
    println!("{name}, {variant:?}: {states} states, {edges} edges, depth {}", checker.max_depth());
    for (property, steps) in &broken {
        println!("  broken: {property}\n    {}", steps.join("\n    "));
    }
    Run { graph, seen, broken }
}

/// All that is promised of the ledger as it is. Gives the reasons that were seen.
fn holds(name: &str, scope: Scope) -> BTreeSet<Reason> {
    let Run { graph, seen, broken } = run(name, scope, Variant::Real, None);
    assert_eq!(broken, [], "{name}");

    let stuck = graph.stuck(&seen.ended, |label| !PERSONS.contains(&label));
    let helpless: Vec<_> = stuck.difference(&seen.waits_for_a_person).collect();
    assert_eq!(helpless.len(), 0, "{name}: states from which no end can be reached without a person");
    let stuck = graph.stuck(&seen.ended, |label| label != PERSONS[0]);
    assert_eq!(stuck.len(), 0, "{name}: states from which an answer leads to no end");

    let others = graph.cycles(|label| !PERSONS.contains(&label) && !KNOWN_LOOPS.contains(&label));
    assert_eq!(others, BTreeMap::new(), "{name}: goes round without bound");
    seen.reasons
}

#[test]
fn known_loops_go_round() {
    let Run { graph, .. } = run("loops", LOOPS, Variant::Real, None);
    for known in KNOWN_LOOPS {
        let alone =
            |label: &str| !PERSONS.contains(&label) && (label == known || !KNOWN_LOOPS.contains(&label));
        match graph.cycles(alone).remove(known) {
            Some(cycle) => println!("  goes round: {}", cycle.join(", ")),
            None => panic!("`{known}` does not go round any more: take it from KNOWN_LOOPS"),
        }
    }
}

#[test]
fn every_order_of_events_keeps_the_promises() {
    let mut reasons = BTreeSet::new();
    for (name, scope) in [("workers", WORKERS), ("gates", GATES), ("loops", LOOPS)] {
        reasons.append(&mut holds(name, scope));
    }
    let missed: Vec<_> = Reason::ALL.iter().filter(|reason| !reasons.contains(reason)).collect();
    assert_eq!(missed, Vec::<&Reason>::new(), "never reached, so nothing was proved of it");
}

#[test]
fn a_broken_ledger_is_caught() {
    for (variant, scope, expected) in [
        (Variant::OldFences, WORKERS, Fault::Zombie),
        (Variant::SameFence, WORKERS, Fault::Revoked),
        (Variant::KeptLease, WORKERS, Fault::Zombie),
        (Variant::KeptHolder, WORKERS, Fault::Twice),
        (Variant::NoReplayCheck, WORKERS, Fault::Receipt),
        (Variant::ForgottenLosses, WORKERS, Fault::Fold),
        (Variant::NoRefund, GATES, Fault::Tokens),
        (Variant::ToldTwice, GATES, Fault::Sample),
    ] {
        let run = run("broken", scope, variant, Some(expected));
        let found: Vec<_> = run.broken.iter().map(|(name, _)| *name).collect();
        assert!(found.contains(&expected.name()), "{variant:?}: {expected:?} not among {found:?}");
    }
}

#[test]
fn forgotten_losses_go_round_without_bound() {
    let graph = run("broken", LOOPS, Variant::UncountedLosses, None).graph;
    let cycles = graph.cycles(|label| !PERSONS.contains(&label) && !KNOWN_LOOPS.contains(&label));
    assert!(cycles.contains_key("lost"), "{cycles:?}");
}
