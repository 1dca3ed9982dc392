//! The shared breaker, checked state by state: replicas with stale memories, one row in a store, and the real machine.
//!
//! Modelled: a row that holds a snapshot of [`Breaker`](breaker_core::Breaker); in each transaction it is restored, asked or
//! told, and stored again. A replica decides a claim from what it remembers, which may be old; the claim's transaction
//! looks at the epoch again, and takes a slot where it is a probe's. A sample is applied in the transaction of its
//! outcome, which is known by its work and fence: told again, it is found. Replicas crash at any time, and then nobody
//! hears of their calls, or hears late. Time is a step: the end of an open period and of a probe's lease come with it.
//!
//! Proved for every reachable state: the properties of [`Fault`], each by its name, and that CLOSED can be reached from it
//! by steps of which none is a crash or a late answer.
//!
//! Left out: a clock that goes back, jitter and growing open periods, windows and ramps, orders by a person (they are
//! transitions like any other), folding a batch of outcomes, and a store that loses what it has committed.
//! Numbers and counterexamples: `docs/design/0005-models.md`.

mod model;
mod row;

use breaker_core::Config;
use model::{Fault, Protocol, Step, Walked};
use row::TICK;
use stateright::{Checker, Model};
use std::collections::{HashMap, HashSet};
use std::sync::Arc;

#[derive(Clone, Copy, Debug)]
struct Size {
    replicas: usize,
    calls: usize,
    permits: u32,
}

const SMALL: Size = Size { replicas: 2, calls: 2, permits: 1 };
const LARGE: Size = Size { replicas: 3, calls: 3, permits: 2 };

/// The protocol as it is, and broken on purpose. The broken ones stay, and must be caught.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Variant {
    Real,
    /// A result counts whatever epoch it is of.
    NoFence,
    /// A probe may take for ever.
    NoLease,
    /// The claim transaction does not look at the epoch that was decided on.
    NoEpochCheck,
    /// A replica gives a probe's permit from what it remembers, without taking a slot in the row.
    NoGuard,
    /// An outcome that is told again is not recognised.
    NoIdentity,
    /// Nobody looks at a half-open period that has lasted its longest.
    NoTimer,
}

struct Run {
    /// Reachable states from which CLOSED is not.
    stuck: usize,
    /// Properties that do not hold.
    broken: Vec<&'static str>,
}

fn protocol(size: Size, variant: Variant) -> Protocol {
    let leased = variant != Variant::NoLease;
    let config = Config {
        failure_threshold: 2,
        success_threshold: 2,
        open_timeout: TICK,
        open_jitter: 0.0,
        half_open_permits: size.permits,
        probe_timeout: None,
        half_open_max: leased.then_some(TICK),
        ..Config::default()
    };
    Protocol { size, variant, config, walked: Arc::default() }
}

/// Looks at all that is reachable.
fn run(size: Size, variant: Variant) -> Run {
    let protocol = protocol(size, variant);
    let walked = Arc::clone(&protocol.walked);
    let checker = protocol.checker().threads(2).spawn_bfs().join();
    let broken = checker.discoveries().into_keys().collect();
    let walked = walked.lock().expect("the checker has joined");
    let stuck = stuck(&walked);
    let (states, edges) = (checker.unique_state_count(), walked.edges);
    println!("{size:?} {variant:?}: {states} states, {edges} edges, {stuck} without a way back");
    Run { stuck, broken }
}

/// Looks ever deeper until `fault` is seen; no deeper than 20 steps. Gives the steps that lead to it.
fn counterexample(size: Size, variant: Variant, fault: Fault) -> Option<Vec<Step>> {
    (2..=20).find_map(|depth| {
        let checker = protocol(size, variant).checker().target_max_depth(depth).spawn_bfs().join();
        checker.discovery(fault.name()).map(|path| path.into_actions())
    })
}

/// How many states have no way back to a closed one.
fn stuck(walked: &Walked) -> usize {
    let mut before: HashMap<u64, Vec<u64>> = HashMap::new();
    for (to, from) in &walked.back {
        before.entry(*to).or_default().push(*from);
    }
    let mut reaches: HashSet<u64> = HashSet::new();
    let mut next: Vec<u64> = walked.closed.iter().copied().collect();
    while let Some(state) = next.pop() {
        if reaches.insert(state) {
            next.extend(before.get(&state).into_iter().flatten());
        }
    }
    walked.states.difference(&reaches).count()
}

fn holds(size: Size) {
    let run = run(size, Variant::Real);
    assert_eq!(run.broken, [""; 0], "{size:?}");
    assert_eq!(run.stuck, 0, "{size:?}: states without a way back to closed");
}

#[test]
fn two_replicas_keep_the_promises() {
    holds(SMALL);
}

#[test]
fn three_replicas_with_two_permits_keep_the_promises() {
    holds(LARGE);
}

#[test]
fn a_broken_protocol_is_caught() {
    for (variant, fault) in [
        (Variant::NoFence, Fault::StaleDecides),
        (Variant::NoEpochCheck, Fault::AdmittedWhileOpen),
        (Variant::NoGuard, Fault::TooManyProbes),
        (Variant::NoIdentity, Fault::CountedTwice),
    ] {
        let found = counterexample(SMALL, variant, fault);
        let steps = found.unwrap_or_else(|| panic!("{variant:?} is not caught: {}", fault.name()));
        println!("{variant:?}: not so: {}, after {steps:?}", fault.name());
    }
}

#[test]
fn without_leases_or_timers_there_are_states_without_a_way_back() {
    for variant in [Variant::NoLease, Variant::NoTimer] {
        let run = run(SMALL, variant);
        assert_eq!(run.broken, [""; 0], "{variant:?} is safe");
        assert!(run.stuck > 0, "{variant:?} can always come back to closed");
    }
}
