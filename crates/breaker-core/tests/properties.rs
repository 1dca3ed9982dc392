//! Against an independent sequential reference, and what must hold for every history.

mod support;

use breaker_core::{Availability, Breaker, Config, Permit, Probe, Sample, Shared, Snapshot, State};
use proptest::prelude::*;
use std::time::Duration;

/// The table of transitions written down once more, in whole milliseconds and without cleverness.
struct Reference {
    c: Config,
    state: State,
    epoch: u64,
    run: u32,
    ok: u32,
    probes: Vec<u8>,
    next_slot: u8,
    reopens: u32,
    since: u64,
    until: Option<u64>,
}

impl Reference {
    fn go(&mut self, to: State, since: u64, until: Option<u64>) {
        (self.state, self.since, self.until) = (to, since, until);
        (self.epoch, self.run, self.ok) = (self.epoch + 1, 0, 0);
        self.probes.clear();
        self.next_slot = 0;
        if !matches!(to, State::Open | State::HalfOpen) {
            self.reopens = 0;
        }
    }
    fn open(&mut self, now: u64) {
        let mut period = ms(self.c.open_timeout);
        for _ in 0..self.reopens {
            period = (period * self.c.open_multiplier as u64).min(ms(self.c.open_max));
        }
        self.go(State::Open, now, Some(now + period));
    }
    fn tick(&mut self, now: u64) {
        match (self.state, self.until) {
            (State::Open | State::HalfOpen, until) if now < self.since => {
                self.until = until.map(|until| until - self.since + now);
                self.since = now;
            }
            (State::HalfOpen, Some(until)) if now >= until => self.open(until),
            (State::ForcedOpen | State::Disabled | State::Observe, Some(until)) if now >= until => {
                self.go(State::Closed, now, None);
            }
            _ => {}
        }
    }
    fn acquire(&mut self, now: u64) -> Option<Permit> {
        self.tick(now);
        if self.state == State::Open && self.until.is_some_and(|until| now >= until) {
            self.go(State::HalfOpen, now, self.c.half_open_max.map(|max| now + ms(max)));
        }
        let probe = self.state == State::HalfOpen;
        let full = probe && self.probes.len() >= self.c.half_open_permits as usize;
        if full || matches!(self.state, State::Open | State::ForcedOpen) {
            return None;
        }
        let slot = if probe { self.next_slot } else { 0 };
        if probe {
            self.probes.push(slot);
            self.next_slot = slot.wrapping_add(1);
        }
        Some(Permit { epoch: self.epoch, probe, slot })
    }
    fn record(&mut self, permit: Permit, sample: Sample, now: u64) {
        self.tick(now);
        let probe = self.state == State::HalfOpen;
        let gone = probe && !self.probes.contains(&permit.slot);
        if permit.epoch != self.epoch || permit.probe != probe || gone {
            return;
        }
        self.probes.retain(|slot| !probe || *slot != permit.slot);
        match (self.state, sample) {
            (State::Closed | State::Observe, Sample::Success) => self.run = 0,
            (State::Closed | State::Observe, Sample::Failure) => {
                self.run += 1;
                if self.run == self.c.failure_threshold {
                    self.run = 0;
                    if self.state == State::Closed {
                        self.open(now);
                    }
                }
            }
            (State::HalfOpen, Sample::Success) => {
                self.ok += 1;
                if self.ok == self.c.success_threshold {
                    self.go(State::Closed, now, None);
                }
            }
            (State::HalfOpen, Sample::Failure) => {
                self.reopens += 1;
                self.open(now);
            }
            _ => {}
        }
    }
}

fn ms(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).expect("small")
}

fn at(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

#[derive(Clone, Copy, Debug)]
enum Event {
    Acquire,
    /// Records the permit at this place of those given so far, again and again as it may be.
    Record(usize, Sample),
    Tick,
    Order(State, Option<u64>),
    Auto,
    Reset,
    Restart,
}

fn samples() -> impl Strategy<Value = Sample> {
    prop_oneof![3 => Just(Sample::Failure), 2 => Just(Sample::Success), 1 => Just(Sample::Neutral)]
}

/// An event and how far the clock moves before it, mostly forward.
fn events() -> impl Strategy<Value = Vec<(Event, i64)>> {
    let orders = prop_oneof![Just(State::ForcedOpen), Just(State::Disabled), Just(State::Observe)];
    let event = prop_oneof![
        20 => Just(Event::Acquire),
        24 => (0..6_usize, samples()).prop_map(|(place, sample)| Event::Record(place, sample)),
        4 => Just(Event::Tick),
        1 => (orders, proptest::option::of(0..200_000_u64)).prop_map(|(to, until)| Event::Order(to, until)),
        1 => Just(Event::Auto),
        1 => Just(Event::Reset),
        2 => Just(Event::Restart),
    ];
    let step = prop_oneof![4 => Just(0), 6 => 0..400_i64, 1 => -3_000..0_i64];
    proptest::collection::vec((event, step), 0..500)
}

fn configs(jitter: impl Strategy<Value = f64>) -> impl Strategy<Value = Config> {
    (
        1..6_u32,
        1..4_u32,
        10..1_000_u64,
        1..4_u32,
        1..9_u64,
        1..4_u32,
        proptest::option::of(10..2_000_u64),
        jitter,
    )
        .prop_map(
            |(failures, successes, timeout, multiplier, most, permits, half_open_max, open_jitter)| Config {
                failure_threshold: failures,
                success_threshold: successes,
                open_timeout: at(timeout),
                open_multiplier: f64::from(multiplier),
                open_max: at(timeout * most),
                open_jitter,
                half_open_permits: permits,
                probe_timeout: None,
                half_open_max: half_open_max.map(at),
                ..Config::default()
            },
        )
}

fn order(breaker: &mut Breaker, to: State, until: Option<Duration>, now: Duration) {
    match to {
        State::ForcedOpen => breaker.force_open("ann", "why", until, now),
        State::Disabled => breaker.disable("ann", "why", until, now),
        _ => breaker.observe("ann", "why", until, now),
    };
}

fn step(now: u64, by: i64) -> u64 {
    now.saturating_add_signed(by)
}

/// The place counts from the newest permit back, so that live ones are met most often.
fn pick(permits: &[Permit], place: usize) -> Option<Permit> {
    permits.iter().rev().nth(place).copied()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn machine_and_shared_agree_with_the_reference(config in configs(Just(0.0)), events in events()) {
        let mut machine = Breaker::new(config).expect("valid");
        let shared = Shared::new(config).expect("valid");
        let mut reference = Reference {
            c: config, state: State::Closed, epoch: 0, run: 0, ok: 0, probes: Vec::new(), next_slot: 0, reopens: 0, since: 0, until: None,
        };
        let mut permits = Vec::new();
        let mut clock = 10_000;
        for (event, by) in events {
            clock = step(clock, by);
            let now = at(clock);
            match event {
                Event::Acquire => {
                    let available = machine.is_available(now);
                    prop_assert_eq!(available, shared.is_available(now));
                    let given = machine.try_acquire(now);
                    prop_assert_eq!(given, shared.try_acquire(now));
                    prop_assert_eq!(given.ok(), reference.acquire(clock));
                    match (available, given) {
                        (Availability::Yes, Ok(permit)) => prop_assert!(!permit.probe),
                        (Availability::Probe, Ok(permit)) => prop_assert!(permit.probe),
                        (Availability::No { retry_after, cause }, Err(rejected)) => {
                            prop_assert_eq!((retry_after, cause), (rejected.retry_after, rejected.cause));
                        }
                        odd => prop_assert!(false, "{odd:?}"),
                    }
                    permits.extend(given);
                }
                Event::Record(place, sample) => {
                    let Some(permit) = pick(&permits, place) else { continue };
                    let recorded = machine.record(permit, sample, now, 0);
                    prop_assert_eq!(recorded, shared.record(permit, sample, now, 0));
                    reference.record(permit, sample, clock);
                }
                Event::Tick => {
                    prop_assert_eq!(machine.tick(now, 0), shared.tick(now, 0));
                    reference.tick(clock);
                }
                Event::Order(to, after) => {
                    let until = after.map(|after| clock + after / 100);
                    order(&mut machine, to, until.map(at), now);
                    order(&mut shared.lock(), to, until.map(at), now);
                    reference.go(to, clock, until);
                }
                Event::Auto => {
                    let ended = machine.auto(now);
                    prop_assert_eq!(ended, shared.lock().auto(now));
                    if reference.state.is_ordered() {
                        reference.go(State::Closed, clock, None);
                    }
                }
                Event::Reset => {
                    machine.reset(now);
                    shared.lock().reset(now);
                    reference.go(State::Closed, clock, None);
                }
                Event::Restart => {}
            }
            prop_assert_eq!(machine.state(), reference.state);
            prop_assert_eq!(machine.state(), shared.state());
            prop_assert_eq!(machine.epoch(), reference.epoch);
            prop_assert_eq!(machine.run(), reference.run);
            prop_assert_eq!(machine.successes(), reference.ok);
            prop_assert_eq!(machine.probes_in_flight() as usize, reference.probes.len());
            prop_assert_eq!(machine.reopens(), reference.reopens);
            prop_assert_eq!(machine.next_deadline(), reference.until.map(at));
        }
        prop_assert_eq!(&machine, &*shared.lock());
    }

    #[test]
    fn restore_is_identity_and_never_lengthens(
        config in configs(0.0..=1.0), events in events(), draw in any::<u64>(), other in configs(0.0..=1.0),
        jump in -100_000..100_000_i64,
    ) {
        let mut machine = Breaker::new(config).expect("valid");
        let mut permits = Vec::new();
        let mut clock = 10_000;
        let mut newest = 0;
        for (event, by) in events {
            clock = step(clock, by);
            newest = clock.max(newest);
            let now = at(clock);
            match event {
                Event::Acquire => permits.extend(machine.try_acquire(now)),
                Event::Record(place, sample) => {
                    if let Some(permit) = pick(&permits, place) {
                        machine.record(permit, sample, now, draw);
                    }
                }
                Event::Tick => { machine.tick(now, draw); }
                Event::Order(to, after) => order(&mut machine, to, after.map(|after| at(clock + after / 100)), now),
                Event::Auto => { machine.auto(now); }
                Event::Reset => { machine.reset(now); }
                Event::Restart => {
                    let before = machine.snapshot();
                    // With a clock that did not go back, nothing at all changes.
                    let same = Breaker::restore(before.clone(), config, at(newest)).expect("valid");
                    prop_assert_eq!(same.snapshot(), before.clone());

                    // With any clock and any settings, what decides stays and no wait grows.
                    let then = at(step(clock, jump));
                    let after = Breaker::restore(before.clone(), other, then).expect("valid");
                    prop_assert!(same_verdict(&before, &after.snapshot()));
                    if let (Some(old), Some(new)) = (before.until, after.open_until()) {
                        prop_assert!(new <= old);
                        let wait = new.saturating_sub(then);
                        prop_assert!(wait <= old.saturating_sub(before.since));
                        prop_assert!(wait <= other.longest_open_period());
                        prop_assert!(after.retry_after(then).unwrap_or_default() == wait);
                    }
                    machine = same;
                }
            }
            prop_assert!(machine.probes_in_flight() <= config.half_open_permits);
            if let Some(wait) = machine.retry_after(now).filter(|_| machine.state() == State::Open) {
                prop_assert!(wait <= config.longest_open_period());
            }
        }
    }

    #[test]
    fn no_input_panics(
        state in 0..6_usize, numbers in any::<[u32; 4]>(), epoch in any::<u64>(), times in any::<[Duration; 3]>(),
        nows in proptest::collection::vec(any::<Duration>(), 1..60), draw in any::<u64>(),
        until in any::<bool>(), probe in any::<bool>(), open_max in 86_400..u64::MAX,
    ) {
        let config = Config {
            open_max: Duration::from_secs(open_max), open_multiplier: 10.0, open_jitter: 1.0, ..Config::default()
        };
        let mut row = Breaker::new(config).expect("valid").snapshot();
        row.state = State::ALL[state];
        row.epoch = epoch;
        [row.run, row.successes, _, row.reopens] = numbers;
        let lease_until = until.then_some(times[0]);
        row.probes = (0..numbers[2] % 300).map(|slot| Probe { slot: slot as u8, lease_until }).collect();
        row.since = times[0];
        row.until = until.then_some(times[1]);
        let mut machine = Breaker::restore(row, config, times[2]).expect("valid");
        let shared = Shared::from(machine.clone());
        for (index, now) in nows.into_iter().enumerate() {
            let sample = [Sample::Failure, Sample::Failure, Sample::Neutral, Sample::Success][index % 4];
            let permit = machine.try_acquire(now).unwrap_or(Permit { epoch, probe, slot: 3 });
            prop_assert_eq!(shared.try_acquire(now).unwrap_or(Permit { epoch, probe, slot: 3 }), permit);
            let recorded = machine.record(permit, sample, now, draw);
            prop_assert_eq!(shared.record(permit, sample, now, draw), recorded);
            if index % 9 == 8 {
                machine.tick(now, draw);
                shared.tick(now, draw);
            }
            prop_assert_eq!(machine.is_available(now), shared.is_available(now));
        }
        prop_assert_eq!(&machine, &*shared.lock());
    }

    #[test]
    fn jitter_only_adds_and_stays_within_its_part(
        config in configs(0.0..=1.0), reopens in any::<u32>(), draw in any::<u64>(),
    ) {
        let least = config.open_period(reopens, 0);
        let period = config.open_period(reopens, draw);
        prop_assert!(least >= config.open_timeout && least <= config.open_max);
        prop_assert!(period >= least && period <= config.longest_open_period());
        prop_assert!(period <= least.mul_f64(1.0 + config.open_jitter) + Duration::from_nanos(2));
    }
}

fn same_verdict(a: &Snapshot, b: &Snapshot) -> bool {
    let key = |s: &Snapshot| (s.state, s.epoch, s.run, s.successes, s.probes.len(), s.reopens);
    key(a) == key(b)
}
