//! What an outage may do to the load, with the policies that ledgerd has: the world of `examples/outage`, one seed.

#[path = "../examples/outage/world/mod.rs"]
#[expect(dead_code, reason = "the example shows more policies than promises are made for")]
mod world;

use world::{BASE, Fault, Policy, Record, Setup};

/// Long enough after either fault for a breaker of 60 s to close, with its ramp.
const SECONDS: u32 = 180;

fn run(policy: Policy, fault: Fault) -> Record {
    Setup { seconds: SECONDS, ..Setup::new(policy, fault, 100, 1) }.run()
}

fn holds(policy: Policy, fault: Fault, amplification: f64) {
    let record = run(policy, fault);
    let (found, peak) = (record.amplification(fault.span()), record.peak(BASE));
    assert!(found <= amplification, "fault {}: {found} calls per arrival", fault.letter());
    // 1.4 in the two digits of the tables: a breaker that has closed fills the backend's queue again on top of what it serves.
    assert!(peak < 1.405, "fault {}: peak of {peak} × the base", fault.letter());
    assert_eq!(record.failed, 0, "fault {}: tasks that failed", fault.letter());
    assert!(record.recovers_after(fault.span()).is_some(), "fault {}: goodput stays low", fault.letter());
}

#[test]
fn load_in_an_outage_is_a_fraction_of_the_arrivals() {
    holds(Policy::OURS, Fault::Down, 0.15);
    holds(Policy::DEFAULT, Fault::Down, 0.10);
}

#[test]
fn load_on_a_slow_backend_stays_below_what_it_can_bear() {
    holds(Policy::OURS, Fault::Slow, 0.45);
    holds(Policy::DEFAULT, Fault::Slow, 0.35);
}

#[test]
fn plain_retries_multiply_the_load_and_keep_it_up_after_its_cause_has_gone() {
    let record = run(Policy::PLAIN, Fault::Slow);
    assert!(record.amplification(Fault::Slow.span()) > 3.0);
    assert_eq!(record.recovers_after(Fault::Slow.span()), None);
}

#[test]
fn the_same_seed_is_the_same_world() {
    let short = Setup { seconds: 60, ..Setup::new(Policy::OURS, Fault::Slow, 100, 7) };
    assert_eq!(short.run(), short.run());
    assert_ne!(short.run(), Setup { seed: 8, ..short }.run());
}
