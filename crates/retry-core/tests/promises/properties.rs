//! Properties over all valid policies, 2,000 cases each, and the shape of the distributions.

use crate::support::{MODES, ms, policy, sample, secs};
use proptest::prelude::*;
use retry_core::{
    Bucket, BucketConfig, CapMode, Config, ErrorClass, Failure, Hint, HintMode, Jitter, Level, Policy,
    Progress, draw,
};
use std::time::Duration;

const DAY: u64 = 86_400_000_000_000;

/// On every push 2,000; a release asks for 100,000 by `PROPTEST_CASES`.
fn cases() -> ProptestConfig {
    let asked = ProptestConfig::default();
    ProptestConfig { cases: asked.cases.max(2_000), failure_persistence: None, ..asked }
}

fn jitters() -> impl Strategy<Value = Jitter> {
    prop_oneof![
        Just(Jitter::None),
        (0.0..=1.0).prop_map(Jitter::Proportional),
        Just(Jitter::Full),
        Just(Jitter::Equal),
        Just(Jitter::Decorrelated),
    ]
}

fn nanos(most: u64) -> impl Strategy<Value = u64> {
    // Evenly over magnitudes: an even choice of nanoseconds would hardly ever be below a second.
    (0..=63_u32, any::<u64>()).prop_map(move |(shift, bits)| (bits >> shift).min(most))
}

fn configs() -> impl Strategy<Value = Config> {
    let cap_modes = prop_oneof![Just(CapMode::Fold), Just(CapMode::Clamp)];
    let growth = prop_oneof![Just(1.0), Just(2.0), 1.0..=1.01, 1.0..=10.0];
    (nanos(DAY), nanos(7 * DAY), growth, jitters(), cap_modes).prop_map(
        |(base, more, exponential_base, jitter, cap_mode)| Config {
            base_delay: Duration::from_nanos(base),
            max_delay: Duration::from_nanos(base.saturating_add(more).min(7 * DAY)),
            exponential_base,
            jitter,
            cap_mode,
            ..Config::default()
        },
    )
}

fn retries() -> impl Strategy<Value = u32> {
    prop_oneof![0..100_u32, any::<u32>(), Just(u32::MAX)]
}

/// The formulas of `Jitter`, in doubles: least and most of a delay.
fn bounds(config: &Config, k: u32, previous: Duration) -> (f64, f64) {
    let (base, cap) = (config.base_delay.as_nanos() as f64, config.max_delay.as_nanos() as f64);
    let r = if base == 0.0 { 0.0 } else { base * config.exponential_base.powf(f64::from(k)) };
    let c = r.min(cap);
    match config.jitter {
        Jitter::None => (c, c),
        Jitter::Full => (0.0, c),
        Jitter::Equal => (c / 2.0, c),
        Jitter::Decorrelated => (base, cap.min(3.0 * (previous.as_nanos() as f64).max(base)).max(base)),
        Jitter::Proportional(p) => {
            let c = if config.cap_mode == CapMode::Fold { c.min(cap / (1.0 + p)) } else { c };
            (c * (1.0 - p), (c * (1.0 + p)).min(cap))
        }
    }
}

proptest! {
    #![proptest_config(cases())]

    #[test]
    fn delays_lie_within_the_bounds_of_their_mode(
        config in configs(), k in retries(), bits: u64, previous in nanos(u64::MAX),
    ) {
        let previous = Duration::from_nanos(previous);
        let delay = config.build().unwrap().delay(k, bits, previous);
        prop_assert!(delay <= config.max_delay);
        let (least, most) = bounds(&config, k, previous);
        // Two nanoseconds for rounding down, and what doubles, and a p in billionths, lose in large numbers. Near
        // factor 1, powf of a large k and squaring drift apart by more.
        let slack = |value: f64| 2.0 + value * 3e-6;
        let nanos = delay.as_nanos() as f64;
        prop_assert!(nanos >= least - slack(least), "{nanos} < {least}");
        prop_assert!(nanos <= most + slack(most), "{nanos} > {most}");
    }

    #[test]
    fn a_longer_draw_is_never_a_shorter_delay(config in configs(), k in retries(), a: u64, b: u64) {
        let policy = config.build().unwrap();
        let delay = |bits| policy.delay(k, bits, config.base_delay);
        prop_assert!(delay(a.min(b)) <= delay(a.max(b)));
        prop_assert!(delay(0) <= delay(a) && delay(a) <= delay(u64::MAX));
    }

    #[test]
    fn the_same_key_gives_the_same_delay(config in configs(), key: (u64, u64, u64), k in retries()) {
        let delay = |policy: &Policy| policy.delay(k, draw(key.0, key.1, key.2), ms(250));
        // Two policies built apart: two replicas, or one before and after a crash.
        prop_assert_eq!(delay(&config.build().unwrap()), delay(&config.build().unwrap()));
    }

    #[test]
    fn total_delay_brackets_every_realised_sum(config in configs(), n in 0..100_u32, seed: u64) {
        let policy = config.build().unwrap();
        let total = policy.total_delay(n);
        prop_assert!(total.min <= total.mean && total.mean <= total.max);
        let sum = |bits: &dyn Fn(u32) -> u64| {
            let mut previous = Duration::ZERO;
            (0..n).map(|k| { previous = policy.delay(k, bits(k), previous); previous }).sum::<Duration>()
        };
        let drawn = sum(&|k| draw(seed, 1, u64::from(k)));
        prop_assert!(total.min <= drawn && drawn <= total.max);
        // And the bracket is tight.
        prop_assert_eq!(sum(&|_| 0), total.min);
        prop_assert_eq!(sum(&|_| u64::MAX), total.max);
    }

    #[test]
    fn decisions_never_panic_and_keep_their_promises(
        config in configs(), class in 0..11_usize, hint in proptest::option::of(any::<i64>()), mode in 0..3_usize,
        counts: (u32, u32, u32), times in (nanos(u64::MAX), nanos(u64::MAX), nanos(u64::MAX)),
        deadline in proptest::option::of(nanos(u64::MAX)), elapsed in proptest::option::of(1..u64::MAX), bits: u64,
    ) {
        let config = Config {
            hint: [HintMode::AtLeast, HintMode::Exact, HintMode::Ignore][mode],
            max_elapsed: elapsed.map(Duration::from_nanos),
            ..config
        };
        let policy = config.build().unwrap();
        let progress = Progress {
            retries_made: counts.0 % 5,
            losses: counts.1 % 5,
            loss_fraction: counts.1 % 1_000,
            faults: counts.2 % 13,
            previous_delay: Duration::from_nanos(times.0),
            started: Duration::from_nanos(times.1),
        };
        let failure = Failure { hint: hint.map(Hint::from_millis), ..Failure::new(ErrorClass::ALL[class]) };
        let (now, deadline) = (Duration::from_nanos(times.2), deadline.map(Duration::from_nanos));
        let decision = policy.next(&progress, failure, now, deadline, bits);
        prop_assert_eq!(decision, policy.next(&progress, failure, now, deadline, bits));
        if let retry_core::Decision::Retry { delay, at, .. } = decision {
            prop_assert!(failure.class.retryable() && failure.hint != Some(Hint::Never));
            prop_assert_eq!(at, now + delay);
            prop_assert!(deadline.is_none_or(|deadline| at <= deadline));
            prop_assert!(config.max_elapsed.is_none_or(|most| at <= progress.started + most));
            prop_assert!(delay <= config.max_delay.max(config.hint_max + secs(10)));
        }
    }

    #[test]
    fn tokens_are_conserved_over_every_window(
        capacity in 1..50_u32, deposit in 0..=1_000_u32, floor in 0..=5_000_u32, saved in 0..60_000_u64,
        steps in proptest::collection::vec((0..6_u8, -2_000..5_000_i64, 0..4_u32), 1..60),
    ) {
        let config = BucketConfig { capacity, deposit: f64::from(deposit) / 1e3, floor: f64::from(floor) / 1e3 };
        let limits = config.build().unwrap();
        let mut clock = 1_000_000_i64;
        let mut bucket = Bucket::restore(limits, Level { millitokens: saved, updated_at: 1_000_000 });
        // After each step: the latest time the bucket was changed at, millitokens withdrawn, millitokens deposited.
        let mut trail = vec![(clock, 0_i128, 0_i128)];
        for (what, step, tokens) in steps {
            clock += step;
            let now = ms(clock.unsigned_abs());
            let (mut latest, mut withdrawn, mut deposited) = *trail.last().unwrap();
            match what {
                0 | 1 if bucket.deposit(now) => {
                    deposited += i128::from(deposit);
                    latest = latest.max(clock);
                }
                2 | 3 if bucket.withdraw(now, tokens) && tokens > 0 => {
                    withdrawn += i128::from(tokens) * 1_000;
                    latest = latest.max(clock);
                }
                4 => bucket = Bucket::restore(limits, bucket.level()),
                _ => {}
            }
            prop_assert!(bucket.level().millitokens <= limits.capacity());
            trail.push((latest, withdrawn, deposited));
        }
        for first in 1..trail.len() {
            // The window opens at the first change in it; what was withdrawn before that does not belong to it.
            let (before, start) = (trail[first - 1], trail[first]);
            for end in &trail[first..] {
                let minted = (i128::from(end.0 - start.0) * i128::from(floor) + 999) / 1_000;
                let most = i128::from(limits.capacity()) + minted + end.2 - before.2;
                let spent = end.1 - before.1;
                prop_assert!(spent <= most, "{before:?} {start:?} to {end:?}: {spent} > {most}");
            }
        }
    }

    #[test]
    fn a_bucket_holds_what_one_brought_up_to_date_at_each_step_would(
        capacity in 1..50_u32, deposit in 0..=1_000_u32, floor in 0..=5_000_000_u32, saved in 0..60_000_u64,
        steps in proptest::collection::vec((0..5_u8, 0..46_u32, any::<u64>(), 0..6_u32), 1..60),
    ) {
        let config = BucketConfig { capacity, deposit: f64::from(deposit) / 1e3, floor: f64::from(floor) / 1e3 };
        let most = u64::from(capacity) * 1_000;
        let minted = |at: u64| u128::from(at) * u128::from(floor) / 1_000;
        let (mut clock, mut held) = (1_000_000_u64, saved.min(most));
        let mut bucket = Bucket::restore(config.build().unwrap(), Level { millitokens: saved, updated_at: clock });
        for (what, bits, step, tokens) in steps {
            // From nothing to a thousand years, so that products leave 64 bits.
            let before = clock;
            clock = clock.saturating_add(step & ((1 << bits) - 1));
            let more = u64::try_from(minted(clock) - minted(before)).unwrap_or(u64::MAX);
            held = held.saturating_add(more).min(most);
            let now = ms(clock);
            match what {
                0 => {
                    bucket.deposit(now);
                    held = (held + u64::from(deposit)).min(most);
                }
                1 => {
                    let price = u64::from(tokens) * 1_000;
                    prop_assert_eq!(bucket.withdraw(now, tokens), held >= price);
                    held = held.checked_sub(price).unwrap_or(held);
                }
                2 => {
                    bucket.refund(tokens);
                    held = (held + u64::from(tokens) * 1_000).min(most);
                }
                3 => {
                    bucket.resize(bucket.limits(), now);
                    prop_assert_eq!(bucket.level(), Level { millitokens: held, updated_at: clock });
                }
                _ => bucket = Bucket::restore(bucket.limits(), bucket.level()),
            }
            prop_assert_eq!(bucket.available(now), held);
        }
    }

    #[test]
    fn next_at_agrees_with_withdraw(
        capacity in 1..50_u32, floor in 0..=5_000_u32, saved in 0..60_000_u64, tokens in 0..60_u32, wait in 0..100_000_u64,
    ) {
        let config = BucketConfig { capacity, deposit: 0.1, floor: f64::from(floor) / 1e3 };
        let bucket = Bucket::restore(config.build().unwrap(), Level { millitokens: saved, updated_at: 1_000_000 });
        let now = ms(1_000_000 + wait);
        match bucket.next_at(now, tokens) {
            Some(at) => {
                prop_assert!(at >= now && bucket.clone().withdraw(at, tokens));
                prop_assert!(at == now || bucket.available(at - ms(1)) < u64::from(tokens) * 1_000);
            }
            None => prop_assert!(tokens > capacity || floor == 0),
        }
    }
}

#[test]
fn delays_are_uniform_in_every_mode() {
    let ranges = [
        (Jitter::Proportional(0.5), 3, ms(400), ms(1_200)),
        (Jitter::Proportional(0.5), 20, secs(10), secs(30)),
        (Jitter::Full, 3, ms(0), ms(800)),
        (Jitter::Equal, 3, ms(400), ms(800)),
        (Jitter::Decorrelated, 3, ms(100), ms(1_500)),
    ];
    const N: u64 = 100_000;
    for (jitter, k, low, high) in ranges {
        let mut delays = sample(&policy(jitter), k, ms(500), N);
        delays.sort_unstable();
        let width = (high - low).as_secs_f64();
        let distance = delays.iter().zip(0_u32..).map(|(delay, rank)| {
            let at = (*delay - low.min(*delay)).as_secs_f64() / width;
            let (below, above) = (f64::from(rank) / N as f64, f64::from(rank + 1) / N as f64);
            (at - below).abs().max((above - at).abs())
        });
        let distance = distance.fold(0.0, f64::max);
        // Kolmogorov and Smirnov: p > 0.001 for a distance × √n below 1.95.
        assert!(distance * (N as f64).sqrt() < 1.95, "{jitter:?} retry {k}: {distance}");
    }
    // Without jitter there is one value, and the test has nothing to measure.
    assert!(sample(&policy(Jitter::None), 3, ms(500), 100).iter().all(|delay| *delay == ms(800)));
}

#[test]
fn the_mean_is_what_many_tasks_wait_on_average() {
    const TASKS: u64 = 40_000;
    for jitter in MODES {
        for cap_mode in [CapMode::Fold, CapMode::Clamp] {
            for n in [1, 3, 12] {
                let config = Config { jitter, cap_mode, max_delay: secs(5), ..Config::default() };
                let policy = config.build().unwrap();
                let waited: f64 = (0..TASKS)
                    .map(|task| {
                        let mut previous = Duration::ZERO;
                        (0..n)
                            .map(|k| {
                                previous = policy.delay(k, draw(3, task, u64::from(k)), previous);
                                previous.as_secs_f64()
                            })
                            .sum::<f64>()
                    })
                    .sum();
                let (seen, mean) = (waited / TASKS as f64, policy.total_delay(n).mean.as_secs_f64());
                assert!((seen / mean - 1.0).abs() < 0.015, "{jitter:?} {cap_mode:?} {n}: {seen} and {mean}");
            }
        }
    }
}

#[test]
fn long_totals_go_on_as_the_settled_delay_does() {
    for jitter in MODES {
        let policy = policy(jitter);
        let (some, more) = (policy.total_delay(1_000), policy.total_delay(3_000));
        let step = |a: Duration, b: Duration| (b - a).as_secs_f64() / 2_000.0;
        let (min, mean, max) =
            (step(some.min, more.min), step(some.mean, more.mean), step(some.max, more.max));
        assert!(min <= mean && mean <= max && max <= 30.0, "{jitter:?}: {min} {mean} {max}");
        assert!(policy.total_delay(u32::MAX).max <= secs(30) * u32::MAX);
    }
}
