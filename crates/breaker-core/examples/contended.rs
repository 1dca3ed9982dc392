//! What a second thread costs the first: both make calls through one closed breaker, as fast as they can.
//!
//! Prints a line of JSON: nanoseconds of an acquire and a success, for each thread, with one and with two threads, as
//! medians of rounds in turn, and their ratio: 1 where threads do not disturb each other. The same of the best round of
//! each follows, which is what is left when others use the machine too; and of two threads with a breaker each, which is
//! what the machine itself takes.

use breaker_core::{Config, Sample, Shared};
use std::hint::black_box;
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

const CALLS: u32 = 200_000;
const ROUNDS: usize = 301;
const NOW: Duration = Duration::from_secs(1_700_000_000);

fn main() {
    let shared = breaker();
    let (other, another) = (breaker(), breaker());
    let mut times: [Vec<f64>; 3] = Default::default();
    // In turn, so that a slow while of the machine hits all alike.
    for _ in 0..ROUNDS {
        times[0].push(round(&[&shared]));
        times[1].push(round(&[&shared, &shared]));
        times[2].push(round(&[&other, &another]));
    }
    let expected = u64::from(CALLS) * 3 * ROUNDS as u64;
    assert_eq!(
        (shared.stats().calls, shared.stats().successes),
        (expected, expected),
        "each call counts once"
    );
    let [one, two, apart] = times.map(|mut times| {
        times.sort_by(f64::total_cmp);
        (times[times.len() / 2], times[0])
    });
    println!(
        "{{\"one_thread_ns\": {:.2}, \"two_threads_ns\": {:.2}, \"ratio\": {:.3}, \"best_one_thread_ns\": {:.2}, \
         \"best_two_threads_ns\": {:.2}, \"best_ratio\": {:.3}, \"apart_ratio\": {:.3}, \"best_apart_ratio\": {:.3}}}",
        one.0,
        two.0,
        two.0 / one.0,
        one.1,
        two.1,
        two.1 / one.1,
        apart.0 / one.0,
        apart.1 / one.1
    );
}

fn breaker() -> Shared {
    Shared::new(Config::default()).expect("the default is valid")
}

/// Nanoseconds a call of each of the threads, one for each breaker.
fn round(breakers: &[&Shared]) -> f64 {
    let start = Barrier::new(breakers.len());
    let spent: Vec<Duration> = thread::scope(|scope| {
        let threads: Vec<_> = breakers.iter().map(|breaker| scope.spawn(|| work(breaker, &start))).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    });
    let longest = spent.into_iter().max().unwrap_or_default();
    longest.as_secs_f64() * 1e9 / f64::from(CALLS)
}

#[expect(clippy::disallowed_methods, reason = "measures")]
fn work(breaker: &Shared, start: &Barrier) -> Duration {
    start.wait();
    let begun = Instant::now();
    for _ in 0..CALLS {
        if let Ok(permit) = breaker.try_acquire(black_box(NOW)) {
            black_box(breaker.record(black_box(permit), Sample::Success, black_box(NOW), 0));
        }
    }
    begun.elapsed()
}
